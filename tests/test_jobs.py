"""Constants and flags, and the jobs beside training: evaluate, signal, walk-forward, the list of trials."""

import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Literal, get_args, get_origin, get_type_hints

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import (
    AGENT,
    WINDOW,
    load,
    make_market,
    metrics_of,
    put_back,
    run,
)
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
    facts = {"BAR_MS", "DAY_MS", "BARS_PER_DAY", "BARS_PER_YEAR"}
    assert names - facts == types_of(script).keys()
    before = dict(vars(script))
    with put_back(script):
        getData.set_constants(vars(script), [])
        script.check_constants()
        assert vars(script) == before
        getData.assign_constants(vars(script), getattr(script, "SMALL", {}))
        script.check_constants()


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
            getData.assign_constants(vars(script), {name: value})
            script.check_constants()
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


@pytest.fixture
def scripts(tmp_path) -> Callable:
    """A function that copies the four scripts, edits them ({script: {old: new}}), returns their folder."""

    def copy(edits: dict[str, dict[str, str]]) -> Path:
        for script in SCRIPTS:
            path = Path(script.__file__)
            text = path.read_text()
            for old, new in edits.get(path.name, {}).items():
                assert text.count(old) == 1, old
                text = text.replace(old, new)
            (tmp_path / path.name).write_text(text)
        return tmp_path

    return copy


@pytest.mark.parametrize(
    ("script", "old", "new", "said"),
    [
        ("getData.py", "DAYS: Count = 730", 'DAYS: Count = "3"', "DAYS = '3': Input should be"),
        ("feature_reducer.py", "EPOCHS: Whole = 10", "EPOCHS: Whole = -1", "EPOCHS = -1: Input should be"),
        ("feature_reducer.py", '"EPOCHS": 2', '"EPOCHS": True', "EPOCHS = True: Input should be"),
        ("portfolio_env.py", "FEE_RATE: Fraction = 0.001", "FEE_RATE: Fraction = 1", "FEE_RATE = 1: Input"),
        ("portfolio_env.py", "Fraction = 0.001", 'Fraction = "1%"', "FEE_RATE = '1%': Input should be"),
        ("train.py", "TEST: bool = True", "TEST: bool = 1", "TEST = 1: Input should be a valid boolean"),
        ("train.py", '"HEADS": 4', '"HEAD": 4', "HEAD is no constant of train.py"),
    ],
)  # fmt: skip
def test_a_wrong_edit_is_one_line_and_exit_code_2(scripts, script, old, new, said):
    folder = scripts({script: {old: new}})
    scale = ("--scale", "small") if script in ("feature_reducer.py", "train.py") else ()
    command = [sys.executable, str(folder / script), *scale]
    result = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: {said}")
    assert result.stderr.count("\n") == 1
    assert not (folder / "data").exists()


def test_a_fee_that_is_no_number_is_named_by_the_script_that_takes_it_over(scripts):
    folder = scripts({"portfolio_env.py": {"FEE_RATE: Fraction = 0.001": 'FEE_RATE: Fraction = "0.1%"'}})
    result = subprocess.run([sys.executable, folder / "train.py"], capture_output=True, text=True, cwd=folder)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert "FEE_RATE" in result.stderr


def test_a_constant_has_one_home(scripts):
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
    folder = scripts(homes)
    changed = {
        "DATA_DIR": "elsewhere", "SEED": 7, "FEE_RATE": 0.002, "SLIPPAGE_RATE": 0.003, "FILL": "close",
        "SCALE": "small", "WINDOW_BARS": [1, 2, 3, 4, 5], "HIDDEN_DIM": 99, "LATENT_DIM": 33, "DEVICE": "cpu",
        "AMP": "off", "REBALANCE_EVERY": 12, "LOOK_BACK": 24,
    }  # fmt: skip
    code = (
        "import json, feature_reducer, numpy, portfolio_env, train\n"
        "prices = numpy.ones((9, 1))\n"
        "for script in (feature_reducer, portfolio_env, train):\n"
        f"    values = {{name: getattr(script, name) for name in {list(changed)} if hasattr(script, name)}}\n"
        "    print(json.dumps(values, default=str))\n"
        "print(train.SMALL['LATENT_DIM'])\n"
        "made = portfolio_env.PortfolioEnv(prices, prices, steps=1, look_back=1)\n"
        "print(json.dumps({'cost': made.cost, 'fill': made.fill}))"
    )
    printed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=folder, check=True
    ).stdout
    reducer, env, training, small, made = map(json.loads, printed.splitlines())
    assert training == changed
    assert reducer == {name: changed[name] for name in reducer}
    assert env == {name: changed[name] for name in env}
    assert {"DATA_DIR", "SEED"} <= reducer.keys() & env.keys()
    assert small == 303
    assert made == {"cost": 0.005, "fill": "close"}


def written(script: ModuleType, name: str) -> str:
    """What stands behind a constant's name in a script."""
    return re.search(rf"^{name}: .*? = (.*?)(  #|$)", Path(script.__file__).read_text(), re.M)[1]


def test_no_constant_is_written_twice():
    own = {"JOB", "RESUME", "CHECKPOINT", "MAX_NORM"}  # of each script
    for script in SCRIPTS:
        for name in types_of(script).keys() - own:
            homes = [other for other in SCRIPTS if name in types_of(other)]
            if script is not homes[0]:
                assert written(script, name) in [f"{home.__name__}.{name}" for home in homes], (script, name)


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
        train: (
            "Job and files",
            "Evaluation (--job evaluate)",
            "Costs (--job train, evaluate, paper)",
            "Precision",
        ),
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
    ("script", "flags", "said"),
    [
        (train, "--job signal --walk-forward 3", "--walk-forward does nothing in --job signal"),
        (train, "--job evaluate --resume", "--resume does nothing in --job evaluate"),
        (train, "--job evaluate --holdings 0.5,0.5", "--holdings does nothing in --job evaluate"),
        (train, "--job signal --fee-rate 0.1", "--fee-rate does nothing in --job signal"),
        (train, "--checkpoint final.pt", "--checkpoint does nothing in --job train"),
        (train, "--max-age 5", "--max-age does nothing in --job train"),
        (train, "--call cat", "--call does nothing in --job train"),
        (train, "--job signal --report", "--report does nothing in --job signal"),
        (train, "--job evaluate --scale small", "--scale does nothing in --job evaluate"),
        (train, "--job signal --seed 1", "--seed does nothing in --job signal"),
        (feature_reducer, "--job compress --scale full", "--scale does nothing in --job compress"),
        (getData, "--job features --seed 1", "--seed does nothing in --job features"),
        (feature_reducer, "--job compress --epochs 3", "--epochs does nothing in --job compress"),
        (feature_reducer, "--job compress --resume", "--resume does nothing in --job compress"),
        (getData, "--job features --source synthetic", "--source does nothing in --job features"),
        (getData, "--job bars --purge-days 3", "--purge-days does nothing in --job bars"),
        (getData, "--job causality --replace", "--replace does nothing in --job causality"),
        (getData, "--causality-cuts 3", "--causality-cuts does nothing in --job collect"),
    ],
)
def test_a_flag_of_another_job_is_refused(script, flags, said, tmp_path):
    with put_back(script), pytest.raises(getData.UsageError, match=f"^{said}: ") as error:
        script.main(["--data-dir", str(tmp_path), *flags.split()])
    assert error.value.code == 2
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("script", [getData, feature_reducer, train])
def test_the_marks_of_the_constants_name_jobs(script):
    """Each group says which jobs take its flags; a stray comment line would end its group."""
    kinds, marks = types_of(script), getData.constant_marks(vars(script))
    assert marks.keys() == kinds.keys()
    assert {job for mark in marks.values() for job in mark.jobs} <= set(get_args(kinds["JOB"]))
    assert marks["JOB"].jobs == marks["DATA_DIR"].jobs == ()
    text = Path(script.__file__).read_text()
    before = re.findall(r"^(.*)\n(?:[A-Z_]+): [^\n]*=", text, re.M)
    headers = {line for line in before if line.startswith("#")}
    assert all(re.search(r"\[[a-z ;]+\]$", line) for line in headers)
    assert len(headers) > 3


def test_any_split_of_any_market_can_be_evaluated(trained, market_dir, tmp_path):
    data_dir = shutil.copytree(trained[0], tmp_path / "data")
    printed = run("train.py", data_dir, "--job", "evaluate").stdout
    assert "=== scale" not in printed
    again, first = metrics_of(data_dir, "tiny-best-test"), metrics_of(data_dir)
    assert again["test"] == {name: row for name, row in first["test"].items() if name != "agent (final)"}
    assert again["these bars are"] == "out of sample"
    for split, meaning in (("train", "IN SAMPLE"), ("validation", "chosen on"), ("all", "IN SAMPLE")):
        printed = run(
            "train.py", data_dir, "--job", "evaluate", "--evaluate-split", split, "--checkpoint", "final.pt"
        ).stdout
        content = metrics_of(data_dir, f"tiny-final-{split}")
        assert "this says nothing about skill" in printed
        assert content["these bars are"].startswith(meaning)
        assert content["these bars are"] in printed
        assert list(content["skill"]) == ["agent (final)"]

    elsewhere = make_market(tmp_path / "other", "--seed", "5")
    checkpoint = str(data_dir / "checkpoints" / "best.pt")
    trials, extra = data_dir / "runs" / "trials.csv", 3
    pd.concat([pd.read_csv(trials)] * (1 + extra)).to_csv(trials, index=False)
    yardstick = (
        "--fill",
        "close",
        "--slippage-rate",
        "0.001",
        "--rebalance-every",
        "24",
        "--look-back",
        "48",
    )
    run("train.py", elsewhere, "--job", "evaluate", "--checkpoint", checkpoint, *yardstick)
    there = metrics_of(elsewhere, "tiny-best-test")
    assert (there["seed"], there["scale"]) == ("0", "small")  # of the training
    prices, footer = getData.load_prices(elsewhere)
    arrays = portfolio_env.price_arrays(prices, footer["symbols"])
    rows = portfolio_env.split_rows(prices.index, footer, "test", "close")
    periods = {"rebalance_every": 24, "look_back": 48}
    expected = portfolio_env.baselines(*arrays, *rows, cost=0.002, fill="close", **periods)
    for name, result in expected.items():
        assert there["test"][name] == pytest.approx(portfolio_env.metrics(result)), name
    assert there["market"].startswith("synthetic:seed=5")
    assert (
        there["skill"]["agent (best)"]["trials"] == 1 + extra
    )  # those behind the checkpoint, wherever it is tested
    assert "new to the agent" not in there["these bars are"]
    assert "there is no" in run("train.py", elsewhere, "--job", "evaluate", code=1).stderr


def test_a_tied_agent_runs_on_other_coins_and_a_dense_one_refuses(trained, tmp_path):
    """Two coins instead of three, one of them new: evaluated, named in the report; and trained on."""
    other = make_market(tmp_path / "two", "--symbols", "ETHUSDT,NEWUSDT")
    path = trained[0] / "checkpoints" / "best.pt"
    run("train.py", other, "--job", "evaluate", "--checkpoint", str(path))
    content = metrics_of(other, "tiny-best-test")
    assert content["these bars are"] == "out of sample; coins new to the agent: NEWUSDT"
    in_sample = run(
        "train.py", other, "--job", "evaluate", "--checkpoint", str(path), "--evaluate-split", "train"
    )
    assert "this says nothing about skill" in in_sample.stdout
    now = run(
        "train.py", other, "--job", "signal", "--checkpoint", str(path), "--max-age", "2000000000"
    ).stdout
    assert "coins new to the agent: NEWUSDT" in now
    assert content["these bars are"] in (other / "reports" / "tiny-best-test" / "report.html").read_text()
    (other / "checkpoints").mkdir()
    shutil.copy(trained[0] / "checkpoints" / "feature_reducer.pt", other / "checkpoints")
    run("train.py", other, *AGENT, "--no-test")
    saved = load(other / "checkpoints" / "best.pt")
    assert (saved["coins"], saved["market"]["symbols"]) == (3, ["ETHUSDT", "NEWUSDT"])

    dense = make_market(tmp_path / "dense")
    never = ("--no-tie-coins",)
    run("train.py", dense, *WINDOW, "--hidden-dim", "34", "--latent-dim", "16", *AGENT, *never, "--no-test")
    path = dense / "checkpoints" / "best.pt"
    refused = run("train.py", other, "--job", "evaluate", "--checkpoint", str(path), code=1).stderr
    assert "was trained on symbols" in refused
    refused = run("train.py", other, *AGENT, *never, code=1).stderr
    assert "feature_reducer.pt is tied, TIE_COINS is False" in refused


def test_every_training_run_adds_its_row_to_the_trials(trained, tmp_path):
    data_dir = shutil.copytree(trained[0], tmp_path / "data")
    (row,) = pd.read_csv(data_dir / "runs" / "trials.csv").to_dict("records")
    test = metrics_of(data_dir)
    assert row["run"] == "tiny"
    assert row["test_bp_day"] == pytest.approx(test["test"]["agent (best)"]["excess_bp_day"], abs=1e-3)
    assert row["test_sharpe_bar"] == pytest.approx(test["skill"]["agent (best)"]["sharpe_excess_bar"])
    changed = json.loads(row["changed"])
    assert changed["BATCHES"] == 4
    assert "DATA_DIR" not in changed
    assert "GAMMA_END" not in changed
    constants = json.loads(row["constants"])  # all of them: those edited in the file too
    assert (constants["BATCHES"], constants["GAMMA_END"]) == (4, train.GAMMA_END)

    run("train.py", data_dir, *AGENT, "--run", "second", "--gamma-end", "0.8", "--no-test")
    run("train.py", data_dir, *AGENT, "--run", "third", "--seed", "1")
    trials = pd.read_csv(data_dir / "runs" / "trials.csv")
    assert trials["run"].tolist() == ["tiny", "second", "third"]
    assert json.loads(trials["changed"][1])["GAMMA_END"] == 0.8
    assert math.isnan(trials["test_bp_day"][1])
    assert trials["data_sha256"].nunique() == 1
    log = EventAccumulator(str(data_dir / "runs" / "third")).Reload()
    table = log.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    assert b"GAMMA_END" in table
    assert log.Scalars("outcome/test_bp_day")[0].value == pytest.approx(trials["test_bp_day"][2], abs=1e-3)
    third = metrics_of(data_dir, "third")["skill"]["agent (best)"]
    assert third["trials"] == 3
    assert third["deflated_sharpe"] < third["probabilistic_sharpe"]


def test_the_signal_is_what_the_agent_wants_at_the_newest_bar(trained, tmp_path):
    data_dir = shutil.copytree(trained[0], tmp_path / "data")
    ages = ("--job", "signal", "--max-age", "2000000000")
    held = (0.25, 0.5, 0.25, 0.0)
    printed = run("train.py", data_dir, *ages, "--holdings", "0.25,0.5,0.25").stdout
    signal_now = json.loads(printed.splitlines()[-1])
    saved = load(data_dir / "checkpoints" / "best.pt")
    windows, footer = feature_reducer.load_windows(data_dir, saved["window_bars"], torch.device("cpu"), saved)
    policy = train.ActorCritic(16, **saved["policy_shape"])
    policy.load_state_dict(saved["policy"])
    reducer = feature_reducer.reducer_from_checkpoint(saved, "cpu")
    with torch.no_grad():
        tokens = policy.market_tokens(reducer.encoder(windows(torch.tensor([len(windows.times) - 1]))))
        logits = policy(tokens, torch.tensor([held]))[0]
    expected = torch.cat([torch.zeros(1, 1), logits], 1).exp()
    assert list(signal_now["weights"]) == ["cash", *footer["symbols"]]
    np.testing.assert_allclose(
        list(signal_now["weights"].values()), (expected / expected.sum())[0], atol=1e-5
    )
    assert signal_now["close_time_ms"] == int(windows.times[-1])
    assert signal_now["next_decision_ms"] == int(windows.times[-1]) + 12 * 300_000
    assert "no order before the next decision" in printed

    assert "above chance" not in printed

    saved["policy"]["actor.weight"].zero_()
    feature_reducer.save_checkpoint(data_dir / "checkpoints" / "nothing.pt", saved)
    printed = run("train.py", data_dir, *ages, "--checkpoint", "nothing.pt").stdout
    assert "nothing that it learnt was above chance on the validation split" in printed
    assert set(json.loads(printed.splitlines()[-1])["weights"].values()) == {0.25}

    for weight, bad in (("trunk", "the encoded window"), ("actor", "the decision")):
        wild = load(data_dir / "checkpoints" / "best.pt")
        name = next(name for name in wild["policy"] if name.startswith(weight) and name.endswith("weight"))
        wild["policy"][name].fill_(3e38)
        feature_reducer.save_checkpoint(data_dir / "checkpoints" / "wild.pt", wild)
        refused = run("train.py", data_dir, *ages, "--checkpoint", "wild.pt", code=1).stderr
        assert (
            refused == f"error: no weights at the newest bar: {bad} is not finite; use another --checkpoint\n"
        )

    old = run("train.py", data_dir, "--job", "signal", code=1).stderr
    assert "minutes old (MAX_AGE is 600 s): run python getData.py first" in old
    for holdings in ("0.5,0.2", "0,0,0,0,1"):
        refused = run("train.py", data_dir, *ages, "--holdings", holdings, code=2).stderr
        assert refused == "error: HOLDINGS must be up to 4 weights, cash first, of sum 1\n"
    soon = data_dir / "soon"  # bars of the future, by this machine's clock
    for symbol, frame in getData.load_bars(data_dir, footer["symbols"]).items():
        later = frame.drop(columns="filled").reset_index(names="timestamp")
        later["timestamp"] += (
            pd.Timestamp.now(tz="UTC").floor("1D") + pd.Timedelta("2D") - later["timestamp"].iloc[-1]
        )
        soon.mkdir(exist_ok=True)
        later.to_parquet(soon / f"{symbol}.parquet")
    run("getData.py", data_dir / "future", "--source", str(soon), "--symbols", ",".join(footer["symbols"]))
    best = ("--checkpoint", str(data_dir / "checkpoints" / "best.pt"))
    refused = run("train.py", data_dir / "future", *ages, *best, code=1).stderr
    assert "lies in the future of this machine's clock" in refused

    # the others go on while one coin is silent for a day: its price is the old one, carried forward
    gap = data_dir / "gap"
    gap.mkdir()
    for symbol, frame in getData.load_bars(data_dir, footer["symbols"]).items():
        kept = frame.drop(columns="filled").reset_index(names="timestamp")
        kept = pd.concat([kept.iloc[:-289], kept.iloc[-1:]]) if symbol == "ETHUSDT" else kept.iloc[:-1]
        kept.to_parquet(gap / f"{symbol}.parquet")
    silent = data_dir / "silent"
    run("getData.py", silent, "--source", str(gap), "--symbols", ",".join(footer["symbols"]))
    assert "is missing for ETHUSDT" in run("train.py", silent, *ages, *best, code=1).stderr
