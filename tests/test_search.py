"""The search: draws of constants, of which the third that validates best goes on."""

from pathlib import Path

import pandas as pd
import pytest
from conftest import ALONE, copy_market, load, metrics_of, put_back, refusal, run, same_tensors, set_constants
from hypothesis import given, settings
from hypothesis import strategies as st
from test_runs import start, wait_for

import portfolio_env
import train

TEXT = "POLICY_RATE=1e-4..1e-2 log, HOLD=6|12|24, STEPS=10..12"
PLACE, STEPS = ALONE.index("--hold"), ALONE.index("--steps")
FLAGS = (*ALONE[:STEPS], *ALONE[STEPS + 2 : PLACE], *ALONE[PLACE + 2 : -1], "--search", TEXT, "--trials", "4")


def draws(text: str, count: int = 30, seed: int = 0) -> list[dict[str, object]]:
    with put_back(train):
        set_constants(train, {"SEARCH": text, "TRIALS": count, "SEEDS": (seed,)})
        return [plan.point for plan in train.plan_runs()]


@given(st.integers(0, 2**32 - 1), st.sampled_from(["", " log"]), st.floats(1e-6, 0.3), st.floats(1.001, 1e3))
@settings(max_examples=20)
def test_draws_stay_in_bounds_and_come_again(seed, log, low, factor):
    high = low * factor
    text = f"POLICY_RATE={low}..{high}{log}, STEPS=3..5{log}, BATCHES=1..1000 log,TRUNK=8x4|16x8"
    points = draws(text, 64, seed)
    assert points == draws(text, 64, seed)
    assert all(low <= point["POLICY_RATE"] <= high for point in points)
    assert {point["STEPS"] for point in points} == {3, 4, 5}
    assert all(type(point["STEPS"]) is type(point["BATCHES"]) is int for point in points)
    assert {point["TRUNK"] for point in points} == {(8, 4), (16, 8)}
    assert len({point["BATCHES"] // 10**2 for point in points}) > 1
    assert 20 <= sum(point["BATCHES"] < 31 for point in points) <= 44  # half of the logarithms


def test_draws_fill_the_range_evenly():
    """A Sobol sequence: each quarter has its quarter of 64, uniform or in the logarithm."""
    points = pd.DataFrame(draws("MASK=0..0.8, POLICY_RATE=1e-4..1 log", 64))
    assert (points["MASK"] // 0.2).value_counts().between(15, 17).all()
    edges = [0, 1e-3, 1e-2, 1e-1, 1]
    assert pd.cut(points["POLICY_RATE"], edges).value_counts().between(15, 17).all()
    assert len(draws("HOLD=6|12", 30)) == 2  # each once


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        (("--search", "HOLD"), "HOLD"),
        (("--search", "HOLDING=3..4"), "HOLDING"),
        (("--search", "HOLD=24..12"), "HOLD=24..12"),
        (("--search", "MASK=0..0.5 log"), "MASK=0..0.5 log"),
        (("--search", "MASK=0..1.5"), "MASK"),
        (("--search", "TRUNK=8x4..16x8"), "TRUNK"),
        (("--search", "TRAIN_ENCODER=0..1"), "TRAIN_ENCODER"),
        (("--search", "HOLD=6|6"), "HOLD"),
        (("--search", "HOLD=6|7, HOLD=8|9"), "HOLD"),
        (("--search", "FEE_RATE=0..0.1"), "FEE_RATE"),
        (("--search", " "), "SEARCH"),
        (("--search", "HOLD=6|7", "--grid", "HOLD=6,7"), "GRID"),
        (("--search", "HOLD=6|7", "--hold", "6"), "HOLD"),
        (("--search", "MINIBATCH=1000..100000"), "MINIBATCH"),
        (("--trials", "3"), "TRIALS"),
        (("--search", "HOLD=6|7", "--stop-at", "0.5"), "STOP_AT"),
    ],
)
def test_a_search_that_cannot_be_is_one_line(tmp_path, flags, name):
    assert name in refusal("train.py", tmp_path, *flags, code=2)
    assert not (tmp_path / "checkpoints").exists()


@pytest.fixture(scope="module")
def searched(market_dir, tmp_path_factory) -> tuple[Path, str]:
    """A data folder with a search of four draws, read only, and what was printed."""
    data_dir = copy_market(market_dir, tmp_path_factory.mktemp("search"))
    return data_dir, run("train.py", data_dir, *FLAGS).stdout


def test_a_search_gives_up_what_validates_worst(searched):
    data_dir, printed = searched
    points = draws(TEXT, 4)
    rows = pd.DataFrame(metrics_of(data_dir)["runs"]).T.set_index("combination")
    assert sorted(rows.index) == sorted(
        f"POLICY_RATE={p['POLICY_RATE']},HOLD={p['HOLD']},STEPS={p['STEPS']}" for p in points
    )
    whole = rows["excess_bp_day"].notna()
    assert sum(whole) == 1
    folder = data_dir / "checkpoints" / "tiny"
    trials = portfolio_env.read_trials(data_dir / "runs" / "trials.csv").set_index("run")
    for name, row in rows.iterrows():
        assert trials["validation_bp_day"][f"tiny/{name}"] == row["validation_bp_day"]
        assert trials["test_sharpe_bar"].notna()[f"tiny/{name}"] == whole[name]
        assert (folder / name / "final.pt").exists() == whole[name]
    rungs = pd.read_json(folder / "search.json").T  # [combinations, rungs]
    assert rungs[0].sort_values(ascending=False, kind="stable").index[:2].tolist() == (
        rungs[0].dropna()[rungs[1].notna()].sort_values(ascending=False, kind="stable").index.tolist()
    )
    winner = rungs[1].idxmax()
    assert whole[winner]
    for name, row in rows.iterrows():
        assert row["rungs"] == rungs.loc[name].dropna().tolist()
        assert whole[name] or row["rungs"][-1] == row["validation_bp_day"]
    assert f"{winner}, of 4 combinations" == metrics_of(data_dir)["chosen by validation"]
    assert ", ".join(map("{:+.1f}".format, rungs.loc[winner])) in printed


def test_a_killed_search_ends_as_if_nothing_had_happened(searched, market_dir, tmp_path):
    """Killed in the second rung: a resume does not rank the first one by what came later."""
    data_dir = copy_market(market_dir, tmp_path / "data")
    with start(data_dir, *FLAGS) as process:
        wait_for((data_dir / "checkpoints" / "tiny" / "search.json").exists, process)
        process.kill()
        process.communicate(timeout=60)
    run("train.py", data_dir, "--resume")
    assert metrics_of(data_dir)["runs"] == metrics_of(searched[0])["runs"]
    best, expected = (load(one / "checkpoints" / "best.pt") for one in (data_dir, searched[0]))
    assert same_tensors(best, expected)
