"""The refit: as far as the best came, once more on all bars."""

import json
import re
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from conftest import ALONE as TINY
from conftest import copy_market, killed_runs, load, metrics_of, refusal, run, same_tensors

import feature_reducer
import getData
import portfolio_env

ALONE = ("--seed", "6", *TINY)  # its second batch is better than its fourth


def checkpoint(data_dir: Path, name: str) -> dict:
    return load(data_dir / "checkpoints" / name)


def assert_same_weights(first: dict, second: dict) -> None:
    assert all(same_tensors(first[name], second[name]) for name in ("policy", "reducer", "normalisation"))


@pytest.fixture(scope="module")
def refitted(market_dir, tmp_path_factory) -> tuple[Path, str]:
    """A data folder with a run that has been refitted, read only, and what was printed."""
    data_dir = copy_market(market_dir, tmp_path_factory.mktemp("refit"))
    return data_dir, run("train.py", data_dir, *ALONE[:-1], "--refit").stdout


def test_a_refit_is_the_run_on_other_splits_stopped_where_the_best_stood(refitted, market_dir, tmp_path):
    """Made by hand: features whose footers say that all bars are of the training split."""
    data_dir, printed = refitted
    progress, agent = checkpoint(data_dir, "last.pt")["progress"], checkpoint(data_dir, "refit.pt")
    assert progress.best_epoch == 2
    assert 0 < progress.best_batch < progress.batch
    assert f"refit: 2 epochs of pretraining and {progress.best_batch} batches" in printed
    batch = 2 * 12 * (2 + 1 / 3) / (2 * 33)  # its windows, in those of a pretraining step
    ahead = [f"{count * batch:.0f}" for count in (progress.batch, progress.best_batch)]
    assert re.findall(r"time: .* as (\d+) steps", printed) == ahead
    frames, footer = getData.load_features(data_dir)
    first, _ = checkpoint(data_dir, "last.pt")["market"]["splits"]["train"]  # from the first whole window on
    stop = footer["splits"]["test"][1]
    assert agent["market"]["splits"] == footer["splits"] | {"train": [first, stop]}
    assert same_tensors(
        agent["normalisation"],
        feature_reducer.fit_normalisation(frames, (footer["splits"]["train"][0], stop)),
    )
    assert stop > frames["5m"].index.as_unit("ms").asi8[-1]
    assert (agent["run"], agent["refit"]) == ("tiny", True)
    trials = portfolio_env.read_trials(data_dir / "runs" / "trials.csv")
    assert trials["run"].tolist() == ["tiny"]  # nothing was tried

    by_hand = copy_market(market_dir, tmp_path / "data")
    for path in (by_hand / "features").glob("*.parquet"):
        footer = getData.read_footer(path)
        footer["splits"]["train"][1] = stop
        getData.write_parquet(path, getData.read_frame(path), footer)
    run("train.py", by_hand, *ALONE, code=143, stop_at=f"batch {progress.best_batch:5d}/")
    assert checkpoint(by_hand, "last.pt")["progress"].batch == progress.best_batch
    assert checkpoint(by_hand, "last.pt")["progress"].best_epoch == 2
    assert_same_weights(checkpoint(by_hand, "last.pt"), agent)


def test_a_refit_goes_on_after_kills_and_stops(refitted, tmp_path):
    data_dir = shutil.copytree(refitted[0], tmp_path / "data", symlinks=True)
    folder, first = data_dir / "checkpoints" / "tiny", checkpoint(refitted[0], "refit.pt")
    for own in (*folder.glob("refit-*/*"), folder / "refit.pt", folder.with_name("refit.pt")):
        own.unlink()
    places = ["refit: 2", "pretrain  1/2", "refit.pt.tmp"]
    killed_runs("train.py", data_dir, places, "--refit", "--no-test", "--resume")
    assert same_tensors(checkpoint(data_dir, "refit.pt"), first)
    for own in folder.glob("refit-*/*"):
        own.unlink()
    flags = ("--resume", "--refit", "--no-test", "--save-minutes", "0")
    stopped = run("train.py", data_dir, *flags, code=143, stop_at="batch     1/4").stdout
    assert " of the refit; go on with: " in stopped.splitlines()[-1]
    (folder / "refit.pt").unlink()
    page = data_dir / "reports" / "tiny" / "report.html"
    page.unlink()
    run("train.py", data_dir, "--resume")  # needs no --refit
    assert portfolio_env.TO_REFIT in page.read_text()
    assert same_tensors(checkpoint(data_dir, "refit.pt"), first)


def test_what_speaks_says_that_it_has_no_test_of_its_own(refitted):
    data_dir, _ = refitted
    page = (data_dir / "reports" / "tiny" / "report.html").read_text()
    assert portfolio_env.TO_REFIT in page
    for name, mark in (("best.pt", False), ("refit.pt", True)):
        flags = ("--job", "signal", "--max-age", "2000000000", "--checkpoint", name)
        printed = run("train.py", data_dir, *flags).stdout
        assert (portfolio_env.REFITTED in printed) == mark
        assert f"{name}, the agent of run tiny, " in printed
        assert json.loads(printed.splitlines()[-1])["refitted"] == mark
    run("train.py", data_dir, "--job", "evaluate", "--checkpoint", "refit.pt")
    assert metrics_of(data_dir, "tiny-refit-test")["these bars are"].startswith("IN SAMPLE")
    page = (data_dir / "reports" / "tiny-refit-test" / "report.html").read_text()
    assert portfolio_env.REFITTED in page


def test_equal_weights_are_not_refitted_and_several_runs_neither(refitted, tmp_path):
    data_dir = shutil.copytree(refitted[0], tmp_path / "data", symlinks=True)
    state = checkpoint(data_dir, "last.pt")
    progress = asdict(replace(state["progress"], p_value=0.5))  # best.pt is made to agree
    feature_reducer.save_checkpoint(
        data_dir / "checkpoints" / "tiny" / "last.pt", state | {"progress": progress}
    )
    printed = run("train.py", data_dir, "--resume", "--no-test", "--refit").stdout
    assert printed.splitlines()[-1].startswith("refit: none")
    assert checkpoint(data_dir, "refit.pt")["abstains"]
    assert "REFIT" in refusal("train.py", data_dir, *TINY, "--refit", "--seeds", "0,1", code=2)
    run("train.py", data_dir, *ALONE)  # another run of that name
    assert not [*(data_dir / "checkpoints" / "tiny").rglob("refit*.pt")]
