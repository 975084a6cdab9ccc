"""Constants and flags, and the jobs beside training: evaluate, signal, walk-forward, the list of trials."""

import json
import math
import re
import shutil
from pathlib import Path
from types import ModuleType
from typing import Literal, get_args, get_origin, get_type_hints

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import (
    AGENT,
    ALONE,
    copy_market,
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
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import feature_reducer
import getData
import portfolio_env
import train

SCRIPTS = (getData, feature_reducer, portfolio_env, train)
PARTS = st.one_of(st.integers(-2, 9), st.floats(), st.text(max_size=2))
ANYTHING = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(-3, 3), st.floats(), st.text(max_size=8),
    st.builds(Path), st.binary(max_size=3), st.lists(PARTS, max_size=4),
    st.lists(PARTS, max_size=4).map(tuple),
)  # fmt: skip


def types_of(script: ModuleType) -> dict[str, object]:
    """The annotations of a script's constants."""
    hints = get_type_hints(script, include_extras=True)
    return {name: kind for name, kind in hints.items() if name.isupper() and not name.startswith("_")}


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_constant_has_a_type_and_values_of_it(script):
    """A constant without a type would have neither a flag nor a check; only file format facts have none."""
    kinds = (bool, int, float, str, tuple, Path)
    names = {name for name, value in vars(script).items() if name.isupper() and isinstance(value, kinds)}
    names = {name for name in names if not name.startswith("_")}
    facts = {"BAR_MS", "DAY_MS", "BARS_PER_DAY", "BARS_PER_YEAR", "ABSTAINS", "FIRST_COMPLETED"}
    assert names - facts == types_of(script).keys()
    before = dict(vars(script))
    with put_back(script):
        set_constants(script, {})
        assert vars(script) == before
        set_constants(script, getattr(script, "SMALL", {}))


@pytest.mark.parametrize("script", SCRIPTS)
@settings(max_examples=300)
@given(data=st.data())
def test_a_wrong_constant_is_one_line_and_nothing_else(script, data):
    """Whatever somebody writes behind a constant's name, it is taken, or refused by that name."""
    name = data.draw(st.sampled_from(sorted(types_of(script))))
    value = data.draw(ANYTHING)
    refusal, expected = "", type(getattr(script, name))
    with put_back(script):
        try:
            set_constants(script, {name: value})
        except getData.UsageError as error:
            refusal = str(error)
        found = getattr(script, name)
    assert "\n" not in refusal
    if refusal:
        assert name in refusal
    else:  # of the type that the script was written with; a whole number may stand for a fraction
        assert type(found) is expected
        assert type(value) is expected or (type(value), expected) == (int, float)
        assert found == value


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
    ("script", "old", "new"),
    [
        ("getData.py", "DAYS: Count = 730", 'DAYS: Count = "3"'),
        ("feature_reducer.py", "EPOCHS: Whole = 10", "EPOCHS: Whole = -1"),
        ("feature_reducer.py", '"EPOCHS": 2', '"EPOCHS": True'),
        ("portfolio_env.py", "FEE_RATE: Fraction = 0.001", "FEE_RATE: Fraction = 1"),
        ("portfolio_env.py", "FEE_RATE: Fraction = 0.001", 'FEE_RATE: Fraction = "0.1%"'),
        ("train.py", "TEST: bool = True", "TEST: bool = 1"),
        ("train.py", '"HEADS": 4', '"HEAD": 4'),
    ],
)
def test_a_wrong_edit_is_one_line_and_exit_code_2(tmp_path, monkeypatch, script, old, new):
    """Whether the script is run or, where it has the edited constant too, a later one."""
    edit_scripts(tmp_path, {script: {old: new}})
    monkeypatch.chdir(tmp_path)
    for edited in (script, "train.py") if script == "portfolio_env.py" else (script,):
        scale = ("--scale", "small") if edited in ("feature_reducer.py", "train.py") else ()
        with Script([tmp_path / edited, *scale]) as process:
            (line,) = process.communicate()[1].splitlines()
        assert process.returncode == 2
        assert line.startswith(f"error: {re.search('[A-Z_]+', new)[0]} ")
        assert not (tmp_path / "data").exists()


def test_a_constant_has_one_home(tmp_path):
    """Edited there, it is another one in every later script."""
    homes = {
        "getData.py": {
            'DATA_DIR: Path = Path("data")': 'DATA_DIR: Path = Path("elsewhere")',
            "SEED: Seed = 0": "SEED: Seed = 7",
        },
        "portfolio_env.py": {
            "FEE_RATE: Fraction = 0.001": "FEE_RATE: Fraction = 0.002",
            "SLIPPAGE_RATE: Fraction = 0.0 ": "SLIPPAGE_RATE: Fraction = 0.003 ",
            '"close"] = "next_open"': '"close"] = "close"',
            "REBALANCE_EVERY: Count = 288": "REBALANCE_EVERY: Count = 12",
            "LOOK_BACK: Count = 2_016": "LOOK_BACK: Count = 24",
        },
        "feature_reducer.py": {
            '"small"] = "auto"': '"small"] = "small"',
            "= (192, 96, 72, 30, 7)": "= (1, 2, 3, 4, 5)",
            "HIDDEN_DIM: Count = 3_222": "HIDDEN_DIM: Count = 99",
            "LATENT_DIM: Count = 2_148": "LATENT_DIM: Count = 33",
            'DEVICE: str = "auto"': 'DEVICE: str = "cpu"',
            '"off"] = "auto"': '"off"] = "off"',
            '"LATENT_DIM": 304': '"LATENT_DIM": 303',
        },
    }
    edit_scripts(tmp_path, homes)
    changed = {
        "DATA_DIR": "elsewhere", "SEED": 7, "FEE_RATE": 0.002, "SLIPPAGE_RATE": 0.003, "FILL": "close",
        "SCALE": "small", "WINDOW_BARS": [1, 2, 3, 4, 5], "HIDDEN_DIM": 99, "LATENT_DIM": 33, "DEVICE": "cpu",
        "AMP": "off", "REBALANCE_EVERY": 12, "LOOK_BACK": 24,
    }  # fmt: skip
    code = (
        "import json, numpy\n"
        "import feature_reducer, portfolio_env, train\n"
        "prices = numpy.ones((9, 1))\n"
        "for script in (feature_reducer, portfolio_env, train):\n"
        f"    values = {{name: getattr(script, name) for name in {list(changed)} if hasattr(script, name)}}\n"
        "    print(json.dumps(values, default=str))\n"
        "print(train.SMALL['LATENT_DIM'])\n"
        "made = portfolio_env.PortfolioEnv(prices, prices, steps=1, look_back=1)\n"
        "print(json.dumps({'cost': made.cost, 'fill': made.fill}))"
    )
    (tmp_path / "show.py").write_text(code)
    with Script([tmp_path / "show.py"]) as process:
        printed, errors = process.communicate()
    assert process.returncode == 0, errors
    reducer, env, training, small, made = map(json.loads, printed.splitlines())
    once = {"SEED", "REBALANCE_EVERY", "LOOK_BACK"}  # train.py has SEEDS, and takes these where they are
    assert training == {name: value for name, value in changed.items() if name not in once}
    assert reducer == {name: changed[name] for name in reducer}
    assert env == {name: changed[name] for name in env}
    assert {"DATA_DIR"} <= reducer.keys() & env.keys()
    assert small == 303
    assert made == {"cost": 0.005, "fill": "close"}


def test_no_constant_is_written_twice():
    own = {"JOB", "RESUME", "CHECKPOINT"}  # of each script
    for script in SCRIPTS:
        text = Path(script.__file__).read_text()
        for name in types_of(script).keys() - own:
            homes = [other for other in SCRIPTS if name in types_of(other)]
            written = re.search(rf"^{name}: .*? = (.*?)(  #|$)", text, re.M)[1]
            if script is not homes[0]:
                assert written in [f"{home.__name__}.{name}" for home in homes], (script, name)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_shows_groups_and_choices(script, capsys):
    with pytest.raises(SystemExit) as stop:
        script.main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    groups = {
        getData: ("Job and files", "Source (--job collect, bars)", "Splits (--job collect, features)"),
        feature_reducer: ("Job and files", "Model (--job train)", "System"),
        portfolio_env: ("Files and data", "Trading", "Baselines"),
        train: ("Job and files", "Evaluation (--job evaluate)", "Costs (--job train, evaluate, paper)"),
    }
    places = [text.index(f"\n{group}:\n") for group in groups[script]]
    assert places == sorted(places)
    # a comment too long for its line is wrapped with its value, and lost
    assert not re.findall(r"^(\w+): .* = \(\n    [^\n,]+  #", Path(script.__file__).read_text(), re.M)
    for name, kind in types_of(script).items():
        flag = "--" + name.lower().replace("_", "-")
        choices = f" {{{','.join(get_args(kind))}}}" if get_origin(kind) is Literal else ""
        assert f"\n  {flag}{choices}" in text


@pytest.mark.parametrize(
    ("script", "flags"),
    [
        (train, "--job signal --walk-forward 3"),
        (train, "--job signal --fee-rate 0.1"),
        (train, "--job signal --report"),
        (train, "--job signal --seeds 1"),
        (train, "--job evaluate --resume"),
        (train, "--job evaluate --holdings 0.5,0.5"),
        (train, "--job evaluate --scale small"),
        (train, "--job train --checkpoint final.pt"),
        (train, "--job train --max-age 5"),
        (train, "--job train --call cat"),
        (feature_reducer, "--job compress --scale full"),
        (feature_reducer, "--job compress --epochs 3"),
        (feature_reducer, "--job compress --resume"),
        (getData, "--job features --seed 1"),
        (getData, "--job features --source synthetic"),
        (getData, "--job bars --purge-days 3"),
        (getData, "--job causality --replace"),
        (getData, "--job causality --splits 0.6,0.2,0.2"),
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
    text = Path(script.__file__).read_text()
    headers = re.findall(r"^(#.*)\n[A-Z_]+: [^\n]*=", text, re.M)
    assert all(re.search(r"\[[a-z ;]+\]$", line) for line in headers)
    assert len(headers) > 3


def test_any_split_of_any_market_can_be_evaluated(trained, martingale_dir, tmp_path, monkeypatch):
    data_dir = shutil.copytree(trained[0], tmp_path / "data")
    evaluate = ("--job", "evaluate")
    assert "=== scale" not in run("train.py", data_dir, *evaluate).stdout
    again, first = metrics_of(data_dir, "tiny-best-test"), metrics_of(data_dir)
    assert again["test"] == {name: row for name, row in first["test"].items() if name != "agent (final)"}
    assert again["these bars are"] == "out of sample"
    other = ("--evaluate-split", "validation", "--checkpoint", "final.pt")
    printed = run("train.py", data_dir, *evaluate, *other).stdout
    content = metrics_of(data_dir, "tiny-final-validation")
    assert content["these bars are"] in printed
    assert content["these bars are"].startswith("chosen on")
    assert list(content["skill"]) == ["agent (final)"]

    elsewhere = copy_market(martingale_dir, tmp_path / "other")
    checkpoint = data_dir / "checkpoints" / "best.pt"
    trials, extra = data_dir / "runs" / "trials.csv", 3
    pd.concat([pd.read_csv(trials)] * (1 + extra)).to_csv(trials, index=False)
    yardstick = ("--fill", "close", "--slippage-rate", "0.001")
    monkeypatch.setattr(portfolio_env, "REBALANCE_EVERY", 24)
    monkeypatch.setattr(portfolio_env, "LOOK_BACK", 48)
    run("train.py", elsewhere, *evaluate, "--checkpoint", checkpoint, *yardstick)
    there = metrics_of(elsewhere, "tiny-best-test")
    assert (there["seed"], there["scale"]) == ("0", "small")  # of the training
    prices, footer = getData.load_prices(elsewhere)
    arrays = portfolio_env.price_arrays(prices, footer["symbols"])
    rows = portfolio_env.split_rows(prices.index, footer, "test", "close")
    periods = {"rebalance_every": 24, "look_back": 48}
    expected = portfolio_env.baselines(*arrays, *rows, cost=0.002, fill="close", **periods)
    for name, result in expected.items():
        assert there["test"][name] == pytest.approx(portfolio_env.metrics(result)), name
    assert there["market"] == footer["source"] != first["market"]
    # those behind the checkpoint, wherever it is tested
    assert there["skill"]["agent (best)"]["trials"] == 1 + extra
    assert "new to the agent" not in there["these bars are"]
    assert "best.pt" in refusal("train.py", elsewhere, *evaluate)


def test_a_tied_agent_runs_on_other_coins_and_a_dense_one_refuses(trained, tmp_path):
    """Two coins instead of three, one of them new: evaluated, named in the report; and trained on."""
    other = make_market(tmp_path / "two", "--symbols", "ETHUSDT,NEWUSDT")
    agent = ("--checkpoint", trained[0] / "checkpoints" / "best.pt")
    run("train.py", other, "--job", "evaluate", *agent)
    bars = metrics_of(other, "tiny-best-test")["these bars are"]
    assert bars == "out of sample; coins new to the agent: NEWUSDT"
    assert bars in (other / "reports" / "tiny-best-test" / "report.html").read_text()
    now = run("train.py", other, "--job", "signal", "--max-age", "2000000000", *agent).stdout
    assert "coins new to the agent: NEWUSDT" in now
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


def test_every_training_run_adds_its_row_to_the_trials(trained, tmp_path):
    data_dir = shutil.copytree(trained[0], tmp_path / "data")
    (row,) = pd.read_csv(data_dir / "runs" / "trials.csv").to_dict("records")
    test = metrics_of(data_dir)
    assert row["run"] == "tiny"
    assert row["test_bp_day"] == pytest.approx(test["test"]["agent (best)"]["excess_bp_day"], abs=1e-3)
    assert row["test_sharpe_bar"] == pytest.approx(test["skill"]["agent (best)"]["sharpe_excess_bar"])
    changed = json.loads(row["changed"])
    assert changed["BATCHES"] == 4
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
    log = EventAccumulator(str(data_dir / "runs" / "third")).Reload()
    table = log.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    assert b"GAMMA" in table
    assert log.Scalars("outcome/test_bp_day")[0].value == pytest.approx(trials["test_bp_day"][2], abs=1e-3)
    third = metrics_of(data_dir, "third")["skill"]["agent (best)"]
    assert third["trials"] == 3
    assert third["deflated_sharpe"] < third["probabilistic_sharpe"]
    finals = [load(data_dir / "checkpoints" / name / "final.pt") for name in ("tiny", "third")]
    assert not same_tensors(*(saved["policy"] for saved in finals))  # of another seed


def store_bars(bars: dict[str, pd.DataFrame], source: Path, data_dir: Path) -> Path:
    """Write bars as recorded files to `source`, and collect them into data_dir."""
    source.mkdir()
    for symbol, frame in bars.items():
        frame.to_parquet(source / f"{symbol}.parquet")
    run("getData.py", data_dir, "--source", source, "--symbols", ",".join(bars))
    return data_dir


def test_the_signal_is_what_the_agent_wants_at_the_newest_bar(trained, tmp_path):
    data_dir = shutil.copytree(trained[0], tmp_path / "data")
    ages = ("--job", "signal", "--max-age", "2000000000")
    printed = run("train.py", data_dir, *ages, "--holdings", "0.25,0.5,0.25").stdout
    signal_now = json.loads(printed.splitlines()[-1])
    setup = open_agent(data_dir)
    windows, policy = setup.windows, setup.policy
    with torch.no_grad():
        newest = windows(torch.tensor([len(windows.times) - 1]))
        tokens = policy.market_tokens(setup.reducer.encoder(newest))
        logits = policy(tokens, torch.tensor([[0.25, 0.5, 0.25, 0.0]]))[0]
    expected = torch.cat([torch.zeros(1, 1), logits], 1).exp()
    symbols = setup.footer["symbols"]
    assert list(signal_now["weights"]) == ["cash", *symbols]
    weights = list(signal_now["weights"].values())
    np.testing.assert_allclose(weights, (expected / expected.sum())[0], atol=1e-5)
    assert signal_now["close_time_ms"] == int(windows.times[-1])
    assert signal_now["next_decision_ms"] == int(windows.times[-1]) + 12 * 300_000
    assert "no order before the next decision" in printed
    assert "above chance" not in printed

    best = data_dir / "checkpoints" / "best.pt"
    saved = load(best)
    saved["policy"]["actor.weight"].zero_()
    feature_reducer.save_checkpoint(data_dir / "checkpoints" / "nothing.pt", saved)
    printed = run("train.py", data_dir, *ages, "--checkpoint", "nothing.pt").stdout
    assert "above chance" in printed
    assert set(json.loads(printed.splitlines()[-1])["weights"].values()) == {0.25}

    for weight, place in (("trunk", "the encoded window"), ("actor", "the decision")):
        wild = load(best)
        name = next(name for name in wild["policy"] if name.startswith(weight) and name.endswith("weight"))
        wild["policy"][name].fill_(3e38)
        feature_reducer.save_checkpoint(data_dir / "checkpoints" / "wild.pt", wild)
        assert place in refusal("train.py", data_dir, *ages, "--checkpoint", "wild.pt")

    assert "MAX_AGE" in refusal("train.py", data_dir, "--job", "signal")
    for holdings in ("0.5,0.2", "0,0,0,0,1"):
        assert "HOLDINGS" in refusal("train.py", data_dir, *ages, "--holdings", holdings, code=2)

    bars = {
        symbol: frame.drop(columns="filled").reset_index(names="timestamp")
        for symbol, frame in getData.load_bars(data_dir, symbols).items()
    }
    # the others go on while one coin is silent for a day: its price is the old one, carried forward
    gap = {symbol: frame.iloc[:-1] for symbol, frame in bars.items()}
    gap["ETHUSDT"] = pd.concat([bars["ETHUSDT"].iloc[:-289], bars["ETHUSDT"].iloc[-1:]])
    silent = store_bars(gap, tmp_path / "gap", tmp_path / "silent")
    assert "ETHUSDT" in refusal("train.py", silent, *ages, "--checkpoint", best)
    shift = (
        pd.Timestamp.now(tz="UTC").floor("1D") + pd.Timedelta("2D") - bars["ETHUSDT"]["timestamp"].iloc[-1]
    )
    for frame in bars.values():  # later than this machine's clock
        frame["timestamp"] += shift
    future = store_bars(bars, tmp_path / "soon", tmp_path / "future")
    assert "clock" in refusal("train.py", future, *ages, "--checkpoint", best)
