"""Constants and flags, and the jobs beside training: evaluate, signal, walk-forward, the list of trials."""

import json
import math
import re
import shutil
from pathlib import Path
from types import ModuleType
from typing import Literal, Union, get_args, get_origin, get_type_hints

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import (
    AGENT,
    ALONE,
    copy_market,
    headline,
    load,
    make_market,
    metrics_of,
    open_agent,
    put_back,
    refusal,
    run,
    same_tensors,
    set_constants,
)
from forked import Script
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

import feature_reducer
import getData
import portfolio_env
import train

SCRIPTS = (getData, feature_reducer, portfolio_env, train)
PARTS = st.lists(st.one_of(st.integers(-2, 9), st.floats(), st.text(max_size=2)), max_size=4)
ANYTHING = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(-3, 3), st.floats(), st.text(max_size=8),
    st.builds(Path), st.binary(max_size=3), PARTS, PARTS.map(tuple),
)  # fmt: skip


def types_of(script: ModuleType) -> dict[str, object]:
    """The annotations of a script's constants."""
    return {name: kind for name, kind in get_type_hints(script).items() if name[0] != "_" and name.isupper()}


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_constant_has_a_type_and_values_of_it(script):
    """A constant without a type would have neither a flag nor a check; only file format facts have none."""
    kinds = (bool, int, float, str, tuple, Path, getData.Scaled)
    names = {name for name, value in vars(script).items() if name.isupper() and isinstance(value, kinds)}
    facts = {"BAR_MS", "DAY_MS", "BARS_PER_DAY", "BARS_PER_YEAR", "FIRST_COMPLETED", "NO_LIMITS"}
    facts |= {"ABSTAINS", "REFITTED", "TO_REFIT"}
    assert {name for name in names - facts if name[0] != "_"} == types_of(script).keys()
    before = dict(vars(script))
    for scale in ("full", "small"):
        with put_back(script):
            getData.set_constants(vars(script), [])
            assert vars(script) == before
            getData.choose_scale(vars(script), scale)
            set_constants(script, {})


@pytest.mark.parametrize("script", SCRIPTS)
@settings(max_examples=300)
@given(data=st.data())
def test_a_wrong_constant_is_one_line_and_nothing_else(script, data):
    """Whatever somebody writes behind a constant's name, it is taken, or refused by that name."""
    name = data.draw(st.sampled_from(sorted(types_of(script))))
    value = data.draw(ANYTHING)
    refusal = name
    with put_back(script):
        set_constants(script, {})
        hint = types_of(script)[name]
        union = get_args(hint) if get_origin(hint) is Union else ()
        expected = {type(getattr(script, name)), *(part for part in union if isinstance(part, type))}
        try:
            set_constants(script, {name: value})
        except getData.UsageError as error:
            refusal = str(error)
        result = getattr(script, name)
    assert name in refusal
    assert "\n" not in refusal
    if refusal != name:
        return
    # of the type that the script was written with; a whole number may stand for a fraction
    assert type(result) in expected
    assert type(value) in expected or (type(value), expected) == (int, {float})
    assert result == (float(value) if isinstance(result, float) else value)  # a large one is rounded


def edit_scripts(folder: Path, edits: dict[str, dict[str, str]]) -> None:
    """Copy the four scripts, edited ({script: {old: new}})."""
    for script in SCRIPTS:
        path = Path(script.__file__)
        text = path.read_text()
        for old, new in edits.get(path.name, {}).items():
            assert text.count(old) == 1, old
            text = text.replace(old, new)
        (folder / path.name).write_text(text)


@pytest.mark.parametrize(
    ("edited", "old", "new", "script"),
    [
        ("getData.py", "DAYS: Count = 730", 'DAYS: Count = "3"', "getData.py"),
        ("feature_reducer.py", "EPOCHS: Whole = Scaled(10, small=2)", "EPOCHS: Whole = True",
         "feature_reducer.py"),
        ("portfolio_env.py", "FEE_RATE: Fraction = 0.001", "FEE_RATE: Fraction = 1", "train.py"),
        ("train.py", "HEADS: Count = Scaled(12, small=4)", "HEADS: Count = Scaled(12, small=0)", "train.py"),
    ],
)  # fmt: skip
def test_a_wrong_edit_is_one_line_and_exit_code_2(tmp_path, monkeypatch, edited, old, new, script):
    """Whether the script is run or, where it has the edited constant too, a later one."""
    edit_scripts(tmp_path, {edited: {old: new}})
    monkeypatch.chdir(tmp_path)
    scale = ("--scale", "small") if script in ("feature_reducer.py", "train.py") else ()
    with Script([tmp_path / script, *scale]) as process:
        (line,) = process.communicate()[1].splitlines()
    assert process.returncode == 2
    assert line.startswith(f"error: {re.search('[A-Z_]+', new)[0]} ")
    assert not (tmp_path / "data").exists()


def test_a_constant_has_one_home(tmp_path):
    """It is written once, and edited there it is another one in every later script."""
    homes = {
        "getData.py": {'DATA_DIR: Path = Path("data")': 'DATA_DIR: Path = Path("elsewhere")'},
        "portfolio_env.py": {
            "FEE_RATE: Fraction = 0.001": "FEE_RATE: Fraction = 0.002",
            "SLIPPAGE_RATE: Fraction = 0.0 ": "SLIPPAGE_RATE: Fraction = 0.003 ",
            '"close"] = "next_open"': '"close"] = "close"',
        },
        "feature_reducer.py": {
            "HIDDEN_DIM: Count = Scaled(3_222, small=456)": "HIDDEN_DIM: Count = 99",
            "Scaled(2_148, small=304)": "Scaled(2_148, small=303)",
        },
        "train.py": {"BATCHES: Whole = Scaled(5_000, small=10)": "BATCHES: Whole = 3"},
    }
    edit_scripts(tmp_path, homes)
    code = (
        "import numpy, sys\n"
        "for name in ('getData', 'feature_reducer'):\n"
        "    sys.modules.pop(name, None)\n"  # as they were before the edit
        "import feature_reducer, portfolio_env, train as t\n"
        "print({str(script.DATA_DIR) for script in (feature_reducer, portfolio_env, t)})\n"
        "t.getData.choose_scale(vars(t), 'small')\n"
        "print(t.FEE_RATE, t.SLIPPAGE_RATE, t.FILL, t.HIDDEN_DIM, t.LATENT_DIM, t.BATCHES, t.HEADS)\n"
        "env = portfolio_env.PortfolioEnv(*[numpy.ones((9, 1))] * 2, steps=1, look_back=1)\n"
        "print(env.cost, env.fill)"
    )
    (tmp_path / "show.py").write_text(code)
    with Script([tmp_path / "show.py"]) as process:
        printed, errors = process.communicate()
    assert process.returncode == 0, errors
    assert printed.splitlines() == ["{'elsewhere'}", "0.002 0.003 close 99 303 3 4", "0.005 close"]

    own = {"JOB", "RESUME", "CHECKPOINT"}  # of each script
    for script in SCRIPTS:
        text = Path(script.__file__).read_text()
        for name in types_of(script).keys() - own:
            homes = [other for other in SCRIPTS if name in types_of(other)]
            written = re.search(rf"^{name}: .*? = (.*?)(  #|$)", text, re.M)[1]
            if script is not homes[0]:
                assert written in [f"{home.__name__}.{name}" for home in homes], (script, name)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_shows_flags_and_choices(script, capsys):
    with pytest.raises(SystemExit) as stop:
        script.main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    # a comment too long for its line is wrapped with its value, and lost
    assert not re.findall(r"^(\w+): .* = \(\n    [^\n,]+  #", Path(script.__file__).read_text(), re.M)
    for name, kind in types_of(script).items():
        flag = "--" + name.lower().replace("_", "-")
        choices = f" {{{','.join(get_args(kind))}}}" if get_origin(kind) is Literal else ""
        assert f"\n  {flag}{choices}" in text


@pytest.mark.parametrize(
    ("script", "flags"),
    [
        (train, "--job signal --fee-rate 0.1"),
        (train, "--job signal --report"),
        (train, "--job evaluate --resume"),
        (train, "--job evaluate --holdings 0.5,0.5"),
        (train, "--job train --checkpoint final.pt"),
        (train, "--job train --call cat"),
        (feature_reducer, "--job compress --epochs 3"),
        (feature_reducer, "--job compress --resume"),
        (getData, "--job features --seed 1"),
        (getData, "--job bars --purge-days 3"),
        (getData, "--job causality --replace"),
    ],
)
def test_a_flag_of_another_job_is_refused(script, flags, tmp_path):
    _, job, flag, *_ = flags.split()
    line = refusal(f"{script.__name__}.py", tmp_path, *flags.split(), code=2)
    assert line.startswith(f"{flag} ")
    assert f"--job {job}" in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("script", [getData, feature_reducer, train])
def test_the_marks_of_the_constants_name_jobs(script):
    """Each group says which jobs take its flags; a stray comment line would end its group."""
    kinds, marks = types_of(script), getData.constant_marks(vars(script))
    assert marks.keys() == kinds.keys()
    assert {job for mark in marks.values() for job in mark.jobs} <= set(get_args(kinds["JOB"]))
    assert marks["JOB"].jobs == marks["DATA_DIR"].jobs == ()
    headers = re.findall(r"^(#.*)\n[A-Z_]+: [^\n]*=", Path(script.__file__).read_text(), re.M)
    assert len([line for line in headers if re.search(r"\[[a-z ;]+\]$", line)]) == len(headers) > 3


def test_any_split_of_any_market_can_be_evaluated(trained, martingale_dir, tmp_path, monkeypatch):
    data_dir = shutil.copytree(trained[0], tmp_path / "data")
    evaluate = ("--job", "evaluate")
    assert "=== scale" not in run("train.py", data_dir, *evaluate).stdout
    again, first = metrics_of(data_dir, "tiny-best-test"), metrics_of(data_dir)
    assert again["test"] == {name.replace(" = final", ""): row for name, row in first["test"].items()}
    assert again["these bars are"] == "out of sample"
    other = ("--evaluate-split", "validation", "--checkpoint", "final.pt")
    printed = run("train.py", data_dir, *evaluate, *other).stdout
    content = metrics_of(data_dir, "tiny-final-validation")
    assert content["these bars are"] in printed
    assert content["these bars are"].startswith("chosen on")
    assert list(content["skill"]) == ["agent (final)"]
    assert content["trained on"] == content["market"]

    elsewhere = copy_market(martingale_dir, tmp_path / "other")
    checkpoint = data_dir / "checkpoints" / "best.pt"
    trials = data_dir / "runs" / "trials.csv"
    pd.concat([pd.read_csv(trials)] * 4).to_csv(trials, index=False)
    yardstick = {"rebalance_every": 24, "look_back": 48}
    for name, bars in yardstick.items():
        monkeypatch.setattr(portfolio_env, name.upper(), bars)
    costs = ("--fill", "close", "--slippage-rate", "0.001")
    run("train.py", elsewhere, *evaluate, "--checkpoint", checkpoint, *costs)
    there = metrics_of(elsewhere, "tiny-best-test")
    assert (there["seed"], there["scale"]) == ("0", "small")  # of the training
    prices, footer = getData.load_prices(elsewhere)
    arrays = portfolio_env.price_arrays(prices, footer["symbols"])
    rows = portfolio_env.split_rows(prices.index, footer, "test", "close")
    yardstick["symbols"] = footer["symbols"]
    expected = portfolio_env.baselines(*arrays, *rows, cost=0.002, fill="close", **yardstick)
    for name, result in expected.items():
        assert there["test"][name] == pytest.approx(portfolio_env.metrics(result)), name
    assert there["market"] == footer["source"] != first["market"]
    # those behind the checkpoint, wherever it is tested
    assert headline(there)["trials"] == 4
    # dates of two synthetic markets have nothing to do with each other
    assert there["these bars are"] == "of another market than those of the training"
    assert there["trained on"] == first["market"]
    assert "best.pt" in refusal("train.py", elsewhere, *evaluate)


def test_a_tied_agent_runs_on_other_coins_and_a_dense_one_refuses(trained, tmp_path):
    """Two coins instead of three, one of them new: evaluated, named in the report; and trained on."""
    other = make_market(tmp_path / "two", "--symbols", "ETHUSDT,NEWUSDT")
    agent = ("--checkpoint", trained[0] / "checkpoints" / "best.pt")
    run("train.py", other, "--job", "evaluate", *agent)
    new = "coins new to the agent: NEWUSDT"
    assert metrics_of(other, "tiny-best-test")["these bars are"].endswith(f"; {new}")
    assert new in (other / "reports" / "tiny-best-test" / "report.html").read_text()
    assert new in run("train.py", other, "--job", "signal", "--max-age", "2000000000", *agent).stdout
    (other / "checkpoints").mkdir()
    shutil.copy(trained[0] / "checkpoints" / "feature_reducer.pt", other / "checkpoints")
    run("train.py", other, *AGENT, "--no-test")
    saved = load(other / "checkpoints" / "best.pt")
    assert (saved["coins"], saved["market"]["symbols"]) == (3, ["ETHUSDT", "NEWUSDT"])
    assert "TIE_COINS" in refusal("train.py", other, *AGENT, "--no-tie-coins")

    dense = copy_market(trained[0], tmp_path / "dense")
    run("train.py", dense, *ALONE, "--no-tie-coins", "--pretrain-epochs", "0", "--batches", "1")
    agent = ("--checkpoint", dense / "checkpoints" / "best.pt")
    assert "symbols" in refusal("train.py", other, "--job", "evaluate", *agent)


def test_importance_of_each_part_and_what_the_encoders_explain_of_it(trained, tmp_path):
    data_dir = shutil.copytree(trained[0], tmp_path / "data")
    short = pd.read_csv(data_dir / "reports" / "tiny" / "importance.csv")
    assert short["kind"].value_counts().to_dict() == {"channel": 34, "timeframe": 5}
    assert "What it looks at" in (data_dir / "reports" / "tiny" / "report.html").read_text()
    reducer = data_dir / "checkpoints" / "feature_reducer.pt"
    before = feature_reducer.reducer_from_checkpoint(load(reducer), "cpu")
    reducer.unlink()  # the run has it
    assert "lost without" in run("train.py", data_dir, "--job", "importance").stdout
    folder = data_dir / "reports" / "tiny-best-importance"
    table = pd.read_csv(folder / "importance.csv", keep_default_na=False).set_index("kind")
    assert table.index.value_counts().to_dict() == {
        "channel x timeframe": 170,
        "channel": 34,
        "timeframe": 5,
        "coin": 3,
    }
    setup = open_agent(data_dir)
    sample = feature_reducer.spread_rows(torch.arange(*setup.spans["validation"]), 256)
    windows = setup.windows(sample).view(len(sample), 3, -1)
    for column, module in (("explained_variance", setup.reducer), ("explained_variance_before", before)):
        with torch.no_grad():
            error = module.decoder(module.encoder(windows.flatten(1))).view_as(windows) - windows
        share = 1 - error.square().sum((0, 1)) / windows.square().sum((0, 1))
        cell = table.loc["channel x timeframe"].query("name == 'ret' and timeframe == '1d'")
        assert cell[column].item() == pytest.approx(share[-34].item(), abs=1e-5)  # of one bar
        of_coin = 1 - error[:, 1].square().sum() / windows[:, 1].square().sum()
        assert table.loc["coin"][column].iloc[1] == pytest.approx(of_coin.item(), abs=1e-5)
    saved = load(data_dir / "checkpoints" / "best.pt")
    saved["abstains"] = True
    feature_reducer.save_checkpoint(data_dir / "checkpoints" / "equal.pt", saved)
    assert "equal.pt" in refusal("train.py", data_dir, "--job", "importance", "--checkpoint", "equal.pt")


def test_importance_shows_the_planted_drift_and_nothing_else(tmp_path):
    """With a half-life of 12 hours it is in the moves of the last hours: neither in volume nor in days."""
    data_dir = make_market(tmp_path / "data", "--signal", "3", "--days", "150")
    rates = ("--pretrain-policy-rate", "0.003", "--pretrain-encoder-rate", "0.003,0.003")
    steps = (
        "--pretrain-epochs",
        "1",
        "--pretrain-steps",
        "40",
        "--pretrain-segments",
        "16",
        "--batches",
        "0",
    )
    run("train.py", data_dir, *ALONE, *rates, *steps)
    setup = open_agent(data_dir)
    names = setup.footer["channels"]
    undirected = {"range", "relvol", "adx14", "mass", "atr14", "volratio", "bbkc", "pvo", "pvoh"}

    def places(channels: set[str], *timeframes: str) -> list[tuple[slice, slice]]:
        parts = [setup.windows.slices[timeframe] for timeframe in timeframes]
        offsets = [names.index(channel) for channel in channels]
        return [(slice(None), slice(part.start + k, part.stop, 34)) for part in parts for k in offsets]

    parts = {
        "all": [(slice(None), slice(None))], "moves": places({*names} - undirected, "5m", "15m", "1h"),
        "volume": places({"relvol", "pvo", "pvoh"}, *setup.windows.slices), "days": places({*names}, "1d"),
        "range": places(undirected, *setup.windows.slices),
    }  # fmt: skip
    start, stop = setup.spans["validation"]
    growth = train.growth_by_part(setup, torch.arange(start, stop - 11, 12), parts.values(), 2)
    low, _ = portfolio_env.bootstrap_interval(growth, portfolio_env.BARS_PER_DAY / 12)
    shares = dict(zip(parts, growth.mean(0).T / growth.mean(0)[:, 0], strict=True))  # without it, and alone
    assert (low[:, 1] > 0).all()
    assert (shares["moves"] > 0.8).all()
    assert all((abs(shares[name]) < 0.05).all() for name in ("volume", "days", "range"))
    timeframes = train.importance(setup).query("kind == 'timeframe'").set_index("timeframe")
    for owed in (timeframes["lost_bp_day"], timeframes["alone_bp_day"]):
        assert owed.idxmax() in ("5m", "15m", "1h")
        assert abs(owed["1d"]) < 0.05 * train.bp_per_day(growth.mean(0)[0, 0])


def test_an_agent_of_features_of_other_formulas_is_refused(trained, tmp_path):
    data_dir, saved = copy_market(trained[0], tmp_path / "data"), load(trained[0] / "checkpoints" / "best.pt")
    (data_dir / "checkpoints").mkdir()
    other = saved | {"market": saved["market"] | {"formulas_sha256": "other"}}
    feature_reducer.save_checkpoint(data_dir / "checkpoints" / "best.pt", other)
    for job in ("evaluate", "signal", "paper", "compress"):
        script = "feature_reducer.py" if job == "compress" else "train.py"
        assert "other formulas" in refusal(script, data_dir, "--job", job, "--checkpoint", "best.pt")


def test_every_training_run_adds_its_row_to_the_trials(trained, tmp_path):
    data_dir = shutil.copytree(trained[0], tmp_path / "data")
    (row,) = pd.read_csv(data_dir / "runs" / "trials.csv").to_dict("records")
    skill = headline(metrics_of(data_dir))
    assert row["test_bp_day"] == pytest.approx(skill["excess_bp_day"], abs=1e-3)
    assert row["test_sharpe_bar"] == pytest.approx(skill["sharpe_excess_bar"])
    changed = json.loads(row["changed"])
    assert (changed["BATCHES"], changed["POLICY_RATE"]) == (4, train.POLICY_RATE.small)
    assert metrics_of(data_dir)["constants"] == {name: str(value) for name, value in changed.items()}
    assert not {"DATA_DIR", "GAMMA"} & changed.keys()
    constants = json.loads(row["constants"])  # all of them: those edited in the file too
    assert (constants["BATCHES"], constants["GAMMA"]) == (4, list(train.GAMMA))

    short = ("--pretrain-epochs", "0", "--batches", "1")
    run("train.py", data_dir, *AGENT, *short, "--run", "second", "--gamma", "0.5,0.8", "--no-test")
    run("train.py", data_dir, *AGENT, "--run", "third", "--seed", "1")
    trials = pd.read_csv(data_dir / "runs" / "trials.csv")
    assert trials["run"].tolist() == ["tiny", "second", "third"]
    assert json.loads(trials["changed"][1])["GAMMA"] == [0.5, 0.8]
    assert math.isnan(trials["test_bp_day"][1])
    assert trials["data_sha256"].nunique() == 1
    third = headline(metrics_of(data_dir, "third"))
    assert third["trials"] == 3
    assert third["deflated_sharpe"] < third["probabilistic_sharpe"]
    finals = [load(data_dir / "checkpoints" / name / "final.pt") for name in ("tiny", "third")]
    assert not same_tensors(*(saved["policy"] for saved in finals))  # of another seed


def test_all_trials_are_one_page_with_their_rank_correlation(tmp_path):
    """By SciPy, of those with both figures; under five of these too few to rank; offline."""
    path, page = tmp_path / "runs" / "trials.csv", tmp_path / "reports" / "trials" / "index.html"
    assert str(path) in refusal("train.py", tmp_path, "--job", "trials")
    rows = [(4.0, 9.0), (3.0, -2.0), (2.5, 8.0), (math.nan, 1.0), (1.0, 5.0), (0.5, 7.0)]
    for number, (validation, test) in enumerate(rows):
        row = {
            "time": str(number),
            "run": f"<{number}>",
            "validation_bp_day": validation,
            "test_bp_day": test,
        }
        portfolio_env.append_trial(path, row)
        pairs = np.array(rows[: number + 1])
        pairs = pairs[~np.isnan(pairs[:, 0])]
        rank = f"{stats.spearmanr(*pairs.T).statistic:+.2f}" if len(pairs) >= 5 else "too few to rank"
        (line,) = run("train.py", tmp_path, "--job", "trials").stdout.splitlines()
        for text in (line, page.read_text()):
            assert f"{number + 1} trials; " in text
            assert f": {rank}, {len(pairs)} pairs" in text
    assert "&lt;5&gt;" in page.read_text()
    assert "://" not in page.read_text()  # no address
    assert "--checkpoint" in refusal("train.py", tmp_path, "--job", "trials", "--checkpoint", "x", code=2)


def test_the_signal_is_what_the_agent_wants_at_the_newest_bar(trained, tmp_path):
    data_dir = shutil.copytree(trained[0], tmp_path / "data")
    ages = ("--job", "signal", "--max-age", "2000000000")
    printed = run("train.py", data_dir, *ages, "--holdings", "0.25,0.5,0.25").stdout
    signal_now = json.loads(printed.splitlines()[-1])
    setup = open_agent(data_dir)
    windows, policy, symbols = setup.windows, setup.policy, setup.footer["symbols"]
    with torch.no_grad():
        newest = windows(torch.tensor([len(windows.times) - 1]))
        tokens = policy.market_tokens(setup.reducer.encoder(newest))
        logits = policy(tokens, torch.tensor([[0.25, 0.5, 0.25, 0.0]]))[0]
    expected = torch.cat([torch.zeros(1, 1), logits], 1).softmax(1)[0].tolist()
    assert list(signal_now["weights"]) == ["cash", *symbols]
    assert list(signal_now["weights"].values()) == pytest.approx(expected, abs=1e-5)
    assert signal_now["close_time_ms"] == int(windows.times[-1])
    assert signal_now["next_decision_ms"] == int(windows.times[-1]) + 12 * 300_000
    assert "no order before the next decision" in printed
    assert "above chance" not in printed

    best, edited = (data_dir / "checkpoints" / name for name in ("best.pt", "edited.pt"))

    def edit(weight: str, value: float) -> None:
        saved = load(best)
        name = next(name for name in saved["policy"] if name.startswith(weight) and name.endswith("weight"))
        saved["policy"][name].fill_(value)
        feature_reducer.save_checkpoint(edited, saved)

    edit("actor", 0)
    printed = run("train.py", data_dir, *ages, "--checkpoint", edited).stdout
    assert "above chance" in printed
    assert set(json.loads(printed.splitlines()[-1])["weights"].values()) == {0.25}
    for weight in ("trunk", "actor"):
        edit(weight, 3e38)
        assert "not finite at the newest bar" in refusal("train.py", data_dir, *ages, "--checkpoint", edited)

    assert "MAX_AGE" in refusal("train.py", data_dir, "--job", "signal")
    assert "HOLDINGS" in refusal("train.py", data_dir, *ages, "--holdings", "0.5,0.2", code=2)

    bars = {
        symbol: frame.drop(columns="filled").reset_index(names="timestamp")
        for symbol, frame in getData.load_bars(data_dir, symbols).items()
    }
    # the others go on while one coin is silent for a day: its price is the old one, carried forward
    gap = {symbol: frame.iloc[:-1] for symbol, frame in bars.items()}
    gap["ETHUSDT"] = pd.concat([bars["ETHUSDT"].iloc[:-289], bars["ETHUSDT"].iloc[-1:]])
    # later than this machine's clock
    shift = pd.Timestamp.now("UTC").floor("1D") + pd.Timedelta("2D") - bars["ETHUSDT"]["timestamp"].iloc[-1]
    soon = {symbol: frame.assign(timestamp=frame["timestamp"] + shift) for symbol, frame in bars.items()}
    for frames, at_fault in ((gap, "ETHUSDT"), (soon, "clock")):
        source = tmp_path / f"bars of {at_fault}"
        source.mkdir()
        for symbol, frame in frames.items():
            frame.to_parquet(source / f"{symbol}.parquet")
        run("getData.py", tmp_path / at_fault, "--source", source, "--symbols", ",".join(frames))
        assert at_fault in refusal("train.py", tmp_path / at_fault, *ages, "--checkpoint", best)
