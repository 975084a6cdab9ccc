"""The scripts as a user runs them, at a tiny size, by subprocess."""

import base64
import ctypes
import json
import math
import os
import re
import resource
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import is_dataclass
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Literal, get_args, get_origin, get_type_hints

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import make_market, put_back
from hypothesis import given, settings
from hypothesis import strategies as st

import feature_reducer
import getData
import portfolio_env
import train
from feature_reducer import load_checkpoint

sys.path.append(str(Path(__file__).parent / "benchmarks"))
from momentum_rule import momentum_rule

ROOT = Path(__file__).parents[1]
REAL_BARS = ROOT.parent / "shared" / "market" / "dev"
WINDOW = ("--window-bars", "6,4,3,2,1")
REDUCER = ("--hidden-dim", "24", "--latent-dim", "16", "--pca-windows", "200", "--validation-windows", "200",
           "--windows-per-epoch", "512", "--epochs", "2", "--batch-size", "64")  # fmt: skip
POLICY = ("--trunk", "16,12", "--token-width", "8", "--heads", "2", "--feed-forward", "16", "--blocks", "1")
AGENT = (*POLICY, "--pretrain-epochs", "2", "--pretrain-steps", "3", "--pretrain-segments", "4",
         "--pretrain-decisions", "6", "--batches", "4", "--num-envs", "2", "--steps", "12", "--minibatch", "8",
         "--update-epochs", "2", "--rolling", "2", "--validate-every", "2", "--save-every", "2",
         "--run", "tiny")  # fmt: skip


FORMS = {
    "last": train.AgentState,
    "feature_reducer": feature_reducer.ReducerCheckpoint,
    "feature_reducer_last": feature_reducer.ReducerState,
}


def run(script: str, data_dir: Path, *flags: str, code: int = 0) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / script), "--data-dir", str(data_dir), *flags]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert result.returncode == code, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    return result


def load(path: Path) -> dict:
    """A checkpoint, checked to be what its name says."""
    return load_checkpoint(path, FORMS.get(path.stem, train.AgentCheckpoint))


def copy_market(market_dir: Path, target: Path) -> Path:
    """A folder of its own for checkpoints, with the shared bars and features."""
    target.mkdir()
    for name in ("ohlcv", "features"):
        shutil.copytree(market_dir / name, target / name)
    return target


def same_tensors(first: object, second: object) -> bool:
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if is_dataclass(first):
        return same_tensors(vars(first), vars(second))
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same_tensors(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same_tensors, first, second))
    return first == second or (first != first and second != second)


@pytest.fixture(scope="module")
def trained(market_dir, tmp_path_factory) -> tuple[Path, str]:
    """A data folder after feature_reducer.py and train.py, and what train.py printed."""
    data_dir = copy_market(market_dir, tmp_path_factory.mktemp("pipeline") / "data")
    run("feature_reducer.py", data_dir, *WINDOW, *REDUCER)
    return data_dir, run("train.py", data_dir, *AGENT).stdout


def test_the_pipeline_leaves_what_it_promises(trained):
    data_dir, printed = trained
    for name in ("feature_reducer.pt", "feature_reducer_last.pt", "pretrained.pt", "best.pt", "final.pt", "last.pt"):
        assert (data_dir / "checkpoints" / name).exists()
    assert not list(data_dir.rglob("*.tmp"))
    log = pd.read_csv(data_dir / "runs" / "tiny" / "metrics.csv")
    assert log["step"].tolist() == [1, 2, 3, 4]
    for name in (
        "portfolio_value", "benchmark_value", "sharpe", "max_drawdown", "entropy", "advantage_mean", "advantage_std",
        "clip_fraction", "approx_kl", "explained_variance", "accuracy", "encoder_loss", "policy_loss", "critic_loss",
        "reconstruction_loss", "policy_grad_norm", "encoder_grad_norm", "loss_scale", "skipped_steps", "epsilon",
        "policy_rate", "encoder_rate", "encode_steps_per_second", "rollout_steps_per_second", "update_steps_per_second",
    ):  # fmt: skip
        assert np.isfinite(log[name]).all(), name
    assert log["epsilon"].iloc[[0, -1]].tolist() == pytest.approx([0.075, 0.02])
    assert log["validation_bp_day"].notna().tolist() == [False, True, False, True]
    assert list((data_dir / "runs" / "tiny").glob("events.out.tfevents.*"))
    assert (data_dir / "reports" / "tiny" / "report.html").stat().st_size > 100_000
    assert "agent (best)" in printed
    assert "left" in printed


def test_the_report_is_what_the_accounting_says(trained):
    """The table's rows again, from the bars: benchmark, hold and costs; and the agent from its checkpoint."""
    data_dir, _ = trained
    table = json.loads((data_dir / "reports" / "tiny" / "metrics.json").read_text())["test"]
    prices, footer = getData.load_prices(data_dir)
    opens = prices[[f"{symbol}.open" for symbol in footer["symbols"]]].to_numpy()
    times = prices.index.as_unit("ms").asi8
    rows = np.flatnonzero((times >= footer["splits"]["test"][0]) & (times < footer["splits"]["test"][1]))[
        :-2
    ]  # the last two have no fill or no price to hold to
    held = np.log((opens[rows[-1] + 2] / opens[rows[0] + 1]).mean())
    hold = table["equal-weight hold"]
    assert hold["growth"] == pytest.approx(held + np.log(1 - 0.001), abs=1e-9)  # bought once, 0.1 %
    assert table["cash"]["growth"] == 0
    for name, row in table.items():
        days = len(rows) / 288
        assert row["excess_bp_day"] == pytest.approx(1e4 * (row["growth"] - held) / days, abs=1e-6), name
        assert row["cost_paid"] == pytest.approx(0.001 * row["turnover_day"] * days, rel=2e-3, abs=1e-12), name


class PageReader(HTMLParser):
    """Collects tags, attributes and text; every element must be closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "img", "link", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def no_constant(name: str) -> None:
    raise AssertionError(f"{name} is not JSON")


def test_the_page_opens_offline_and_shows_the_numbers(trained):
    data_dir, printed = trained
    folder = data_dir / "reports" / "tiny"
    assert {path.name for path in folder.iterdir()} == {"report.html", "metrics.json"}
    content = json.loads((folder / "metrics.json").read_text(), parse_constant=no_constant)
    reader = PageReader()
    page = (folder / "report.html").read_text(encoding="utf-8")
    reader.feed(page)
    assert reader.open == []
    for tag, attributes in reader.tags:
        assert tag not in ("script", "link", "iframe", "object", "base")
        assert all(attributes.get(name, "data:image/png;base64,").startswith("data:image/png;base64,")
                   for name in ("src", "href", "srcset", "data"))  # fmt: skip
    assert "url(" not in page
    assert "@import" not in page
    images = [attributes["src"] for tag, attributes in reader.tags if tag == "img"]
    assert len(images) == 6  # equity, weights of two agents, trading, pretraining, online
    assert all(base64.b64decode(image.partition(",")[2]).startswith(b"\x89PNG") for image in images)

    cells = set(reader.texts)
    for name, skill in content["skill"].items():
        row = content["test"][name]
        assert {name, f"{row['growth_bp_day']:+.1f}", f"{row['max_drawdown']:.1%}", f"{row['sharpe']:+.2f}"} <= cells
        assert skill["excess_low_bp_day"] is None  # the split is three days
        assert "– to –" in cells
        assert f"{skill['probabilistic_sharpe']:.1%}" in cells
        assert skill["deflated_sharpe"] == skill["probabilistic_sharpe"]  # one trial
        assert skill["trials"] == 1
        assert list(skill["cost_sweep_bp_day"]) == ["0.0", "0.0002", "0.0005", "0.001", "0.0025"]
        assert skill["cost_sweep_bp_day"]["0.001"] == pytest.approx(row["excess_bp_day"], rel=1e-9)
        assert skill["excess_bp_day"] == pytest.approx(row["excess_bp_day"], rel=1e-9)
        sentence = next(text for text in reader.texts if text.startswith(f"{name}: "))
        assert "Nothing can be said about skill." in sentence
        assert sentence in printed
    benchmark = content["monthly_returns"]["benchmark"]
    assert all(f"{value:+.2%}" in cells for value in benchmark.values())
    assert list(content["reconstruction"]) == ["train split", "test split"]
    assert content["these bars are"] == "out of sample"
    for row in content["reconstruction"].values():
        assert f"{row['mse']:.4f}" in cells
    assert "explained variance 1d" in cells
    assert {"Calmar", "over benchmark", "deflated Sharpe", "approx_kl, clip_fraction"} <= cells  # the notes


def test_best_and_final_hold_policy_and_trained_reducer(trained):
    data_dir, _ = trained
    reducer = load(data_dir / "checkpoints" / "feature_reducer.pt")
    for name in ("pretrained", "best", "final"):
        saved = load(data_dir / "checkpoints" / f"{name}.pt")
        assert saved["policy"]["blocks.0.linear1.weight"].shape == (16, 8)
        assert saved["market"]["symbols"] == reducer["market"]["symbols"]
        assert same_tensors(saved["normalisation"], reducer["normalisation"])
        for key, value in saved["reducer"].items():
            assert torch.isfinite(value).all()
            assert not torch.equal(value, reducer["reducer"][key]), f"{name}: {key} was not trained"


def test_the_same_seed_gives_the_same_run_and_another_another(market_dir, tmp_path):
    finals = []
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        data_dir = copy_market(market_dir, tmp_path / name)
        run("train.py", data_dir, *WINDOW, "--hidden-dim", "24", "--latent-dim", "16", *AGENT, "--no-test",
            "--batches", "2", "--pretrain-epochs", "1", "--seed", seed)  # fmt: skip
        finals.append(load(data_dir / "checkpoints" / "final.pt"))
    assert same_tensors(finals[0], finals[1])
    assert not same_tensors(finals[0]["policy"], finals[2]["policy"])


@pytest.mark.parametrize("stop_after", ["pretrain  1/2", "pretrain  2/2", "batch     1/4", "batch     3/4"])
def test_a_stopped_and_resumed_run_equals_the_uninterrupted_one(trained, tmp_path, stop_after):
    data_dir, _ = trained
    stopped = copy_market(data_dir, tmp_path / "data")
    (stopped / "checkpoints").mkdir()
    shutil.copy(data_dir / "checkpoints" / "feature_reducer.pt", stopped / "checkpoints")
    stop_and_resume(stopped, stop_after)
    assert_same_runs(data_dir, stopped)


def test_half_precision_resumes_exactly_with_its_loss_scale(market_dir, tmp_path):
    """float16 on the CPU, from a scale at which the first steps overflow: the scale must come back. Both with Adam."""
    flags = (*WINDOW, "--hidden-dim", "24", "--latent-dim", "16", "--amp", "on", "--patience", "1",
             "--encoder-optimizer", "adam")  # fmt: skip
    whole, stopped = copy_market(market_dir, tmp_path / "whole"), copy_market(market_dir, tmp_path / "stopped")
    run("train.py", whole, *AGENT, *flags, "--no-test")
    last = load(whole / "checkpoints" / "last.pt")
    assert last["scaler"]["scale"] != torch.amp.GradScaler("cpu").get_scale()
    assert last["optimizers"][0]["param_groups"][0]["lr"] < train.SMALL["POLICY_RATE"]  # the plateau halved it
    stop_and_resume(stopped, "batch     2/4", *flags, "--no-test", sent=signal.SIGINT)
    assert_same_runs(whole, stopped)


def stop_and_resume(
    stopped: Path, stop_after: str, *flags: str, skip: int = 0, sent: signal.Signals = signal.SIGTERM
) -> None:
    """Run train.py, send a signal when it prints a line that begins with `stop_after` (after `skip` such lines), then
    resume to the end, with constants that may change."""
    command = [sys.executable, "-u", str(ROOT / "train.py"), "--data-dir", str(stopped), *AGENT, *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        for line in process.stdout:
            skip -= line.startswith(stop_after)
            if skip < 0:
                process.send_signal(sent)
                break
        rest = process.communicate(timeout=300)
    assert process.returncode == 128 + sent, rest
    assert not (stopped / "reports").exists()
    trials = stopped / "runs" / "trials.csv"
    assert pd.read_csv(trials)["validation_bp_day"].isna().tolist() == [True]  # what was looked at has been tried
    run("train.py", stopped, *AGENT, *flags, "--resume", "--encode-batch", "64", "--save-every", "1")
    assert pd.read_csv(trials)["validation_bp_day"].isna().tolist() == [False]


def assert_same_runs(data_dir: Path, stopped: Path) -> None:
    """Checkpoints equal bit for bit, and the same log but for the clock."""
    for name in ("final", "best", "last"):
        first, second = (load(folder / "checkpoints" / f"{name}.pt") for folder in (data_dir, stopped))
        if name == "last":
            for clock in ("seconds", "started"):
                setattr(second["progress"], clock, getattr(first["progress"], clock))
        assert same_tensors(first, second), name
    timing = "seconds|per_second"
    logs = [pd.read_csv(folder / "runs" / "tiny" / "metrics.csv") for folder in (data_dir, stopped)]
    pd.testing.assert_frame_equal(*(log.loc[:, ~log.columns.str.contains(timing)] for log in logs))


def test_the_reducer_resumes_exactly(market_dir, tmp_path):
    whole, halves = copy_market(market_dir, tmp_path / "whole"), copy_market(market_dir, tmp_path / "halves")
    common = (*WINDOW, *REDUCER, "--init", "random", "--learning-rate", "0.001", "--amp", "on")
    run("feature_reducer.py", whole, *common)
    for flags in (("--epochs", "1"), ("--epochs", "2", "--resume")):
        run("feature_reducer.py", halves, *common, *flags)
    refused = run("feature_reducer.py", halves, *common, "--resume", "--batch-size", "32", "--seed", "1", code=1).stderr
    assert "needs the constants of the stopped run, which had BATCH_SIZE = 64, SEED = 0" in refused
    for name in ("feature_reducer", "feature_reducer_last"):
        contents = [load(folder / "checkpoints" / f"{name}.pt") for folder in (whole, halves)]
        assert same_tensors(*contents), name
    log = pd.read_csv(halves / "runs" / "feature_reducer" / "metrics.csv")
    assert log["step"].tolist() == [1, 2]
    assert log["validation_mse"].iloc[1] < log["validation_mse"].iloc[0]  # reconstruction falls
    assert log.equals(pd.read_csv(whole / "runs" / "feature_reducer" / "metrics.csv"))


LEARNER = ("--window-bars", "1,1,6,4,1", "--hidden-dim", "48", "--latent-dim", "32", "--trunk", "32,24",
           "--token-width", "16", "--heads", "2", "--feed-forward", "32", "--blocks", "1", "--pretrain-epochs", "3",
           "--pretrain-steps", "50", "--pretrain-segments", "24", "--pretrain-decisions", "24",
           "--pretrain-policy-rate", "0.002", "--pretrain-random-encoder-rate", "0.001", "--batches", "2",
           "--num-envs", "4", "--steps", "32", "--hold", "1", "--minibatch", "64", "--rolling", "2",
           "--validate-every", "0", "--run", "tiny")  # fmt: skip


def leak_the_future(data_dir: Path) -> None:
    """Put what each coin will earn in the half hour from the next open on in place of its 5-minute channels."""
    path = data_dir / "features" / "5m.parquet"
    footer, frame = getData.read_footer(path), pd.read_parquet(path)
    prices, _ = getData.load_prices(data_dir)
    for symbol in footer["symbols"]:
        opens = prices[f"{symbol}.open"]
        leak = np.log(opens.shift(-7) / opens.shift(-1)).fillna(0.0)
        for channel in footer["channels"]:
            frame[f"{symbol}.{channel}"] = leak.astype(np.float32)
    getData.write_parquet(path, frame, footer)


@pytest.mark.parametrize("market", ["planted", "martingale", "leak"])
def test_a_tiny_agent_earns_only_where_there_is_something_to_know(tmp_path, market):
    make_market(tmp_path, "--days", "140", "--signal", "1" if market == "planted" else "0")
    fee = ()
    if market == "leak":
        leak_the_future(tmp_path)
        fee = ("--fee-rate", "0.0002")  # what half an hour brings is less than the usual fees
    printed = run("train.py", tmp_path, *LEARNER, *fee).stdout
    content = json.loads((tmp_path / "reports" / "tiny" / "metrics.json").read_text())
    table, skill = content["test"], content["skill"]["agent (best)"]
    agent = table["agent (best)"]
    if market == "leak":  # the alarm: nothing honest earns this much
        assert agent["excess_bp_day"] > 300
        assert agent["sharpe"] > 30
        assert skill["excess_low_bp_day"] > 0
        assert skill["deflated_sharpe"] > 0.999
    elif market == "planted":
        prices, footer = getData.load_prices(tmp_path)
        arrays = portfolio_env.price_arrays(prices, footer["symbols"])
        span = portfolio_env.split_rows(prices.index, footer, "test", "next_open")
        rule = portfolio_env.backtest(momentum_rule(arrays[1], 24, 1.0), *arrays, *span, cost=0.001)
        assert agent["excess_bp_day"] > 0.6 * portfolio_env.metrics(rule)["excess_bp_day"] > 100
        assert skill["excess_low_bp_day"] > 0
        assert agent["excess_bp_day"] > table["time-series momentum"]["excess_bp_day"]
    else:  # no skill, and little paid for trading: the validation split picks among noise, so not quite nothing
        for name, statistics in content["skill"].items():
            assert statistics["excess_low_bp_day"] < 0, name
            assert 1e4 * table[name]["cost_paid"] / table[name]["days"] < 40, name
        assert "lies above zero" not in printed


def test_nothing_of_the_test_split_reaches_what_is_trained_or_chosen(market_dir, tmp_path):
    """With noise in place of all features and prices from the test split on, every weight is the same to the bit."""
    clean, poisoned = copy_market(market_dir, tmp_path / "clean"), copy_market(market_dir, tmp_path / "poisoned")
    rng = np.random.default_rng(0)
    for path in (poisoned / "features").glob("*.parquet"):
        frame, footer = pd.read_parquet(path), getData.read_footer(path)
        late = frame.index.as_unit("ms").asi8 >= footer["splits"]["test"][0]
        noise = rng.normal(size=(late.sum(), frame.shape[1]))
        frame.loc[late] = (np.exp(noise) if path.stem == "prices" else noise).astype(frame.dtypes.iloc[0])
        getData.write_parquet(path, frame, footer)
    for data_dir in (clean, poisoned):
        run("feature_reducer.py", data_dir, *WINDOW, *REDUCER)
        run("train.py", data_dir, *AGENT, "--no-test")
    for name in ("feature_reducer", "pretrained", "best", "final"):
        contents = [load(folder / "checkpoints" / f"{name}.pt") for folder in (clean, poisoned)]
        assert same_tensors(*contents), name


def test_compressed_latents_are_the_encoder_of_the_windows(trained):
    data_dir, _ = trained
    run("feature_reducer.py", data_dir, "--job", "compress")
    latents = pd.read_parquet(data_dir / "latents.parquet")
    saved = load(data_dir / "checkpoints" / "feature_reducer.pt")
    reducer = feature_reducer.reducer_from_checkpoint(saved, "cpu")
    windows, _ = feature_reducer.load_windows(data_dir, saved["window_bars"], torch.device("cpu"), saved)
    assert latents.shape == (windows.valid.sum(), 1 + 16)
    rows = torch.from_numpy(np.flatnonzero(windows.valid)[[0, 1_000, -1]])
    with torch.no_grad():
        expected = reducer.encoder(windows(rows)).half().numpy()
    # float16 has 11 bits; the shape of a batch may change the last one
    np.testing.assert_allclose(latents.iloc[[0, 1_000, -1], 1:].to_numpy(np.float16), expected, rtol=2**-10, atol=1e-6)
    assert latents["close_time"].iloc[-1] == pd.Timestamp(windows.times[-1], unit="ms", tz="UTC")

    old = (data_dir / "latents.parquet").read_bytes()
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (len(old) // 2, resource.RLIM_INFINITY))
    command = [sys.executable, str(ROOT / "feature_reducer.py"), "--data-dir", str(data_dir), "--job", "compress"]
    result = subprocess.run(command, capture_output=True, text=True, preexec_fn=limit)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith(f"error: cannot write {data_dir / 'latents.parquet'}")
    assert (data_dir / "latents.parquet").read_bytes() == old
    assert not list(data_dir.glob("*.tmp"))


def test_no_data_makes_a_synthetic_market_first(tmp_path):
    """As on a fresh machine, but with windows, network and run cut down to seconds."""
    result = run("train.py", tmp_path / "data", *WINDOW, "--hidden-dim", "24", "--latent-dim", "16", *AGENT,
                 "--pretrain-epochs", "0", "--batches", "1", "--no-test")  # fmt: skip
    assert "synthetic" in result.stdout
    assert "scale: small" in result.stdout
    assert (tmp_path / "data" / "ohlcv" / "BTCUSDT.parquet").exists()
    assert (tmp_path / "data" / "checkpoints" / "best.pt").exists()


def test_two_trainings_cannot_share_a_folder(market_dir, tmp_path):
    """The first one is stopped in the middle, by SIGSTOP, so that it surely still holds the folder."""
    data_dir = copy_market(market_dir, tmp_path / "data")
    small = (*WINDOW, "--hidden-dim", "24", "--latent-dim", "16", *AGENT)
    command = [sys.executable, "-u", str(ROOT / "train.py"), "--data-dir", str(data_dir), *small]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as first:
        assert any(line.startswith("pretrain  2/2") for line in first.stdout)
        first.send_signal(signal.SIGSTOP)
        for script, flags in (("train.py", small), ("feature_reducer.py", (*WINDOW, *REDUCER))):
            refused = run(script, data_dir, *flags, code=3).stderr
            assert "another training is at work in" in refused
        first.kill()
    run("train.py", data_dir, *small, "--resume")


def killed_runs(command: list[str], data_dir: Path, kills: int, rng: np.random.Generator) -> int:
    """Start the script again and again, each time going on from its last checkpoint where there is one (or anew after a
    training that had come to its end), and SIGKILL it: by turns at a random moment after its first word, and while a
    checkpoint is being written. Whatever stands under its final name afterwards must load. Returns how often a
    half-written file was left."""
    folder = data_dir / "checkpoints"
    last = folder / ("last.pt" if "train.py" in command[2] else "feature_reducer_last.pt")
    halves = 0
    for kill in range(kills):
        if (folder / "final.pt").exists():
            for name in ("pretrained", "best", "final", "last"):
                (folder / f"{name}.pt").unlink()
            shutil.rmtree(data_dir / "runs")
        resume = ["--resume"] if last.exists() else []
        with subprocess.Popen([*command, *resume], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
            process.stdout.readline()
            if kill % 2:
                for _ in range(rng.integers(1, 5)):  # that many checkpoints, or to the end
                    for half_written in (False, True):
                        while process.poll() is None and any(folder.glob("*.tmp")) != half_written:
                            time.sleep(0.0002)
            else:
                time.sleep(rng.uniform(0, 4))
            process.kill()
        halves += any(folder.glob("*.tmp"))
        for path in folder.glob("*.pt"):
            load(path)
        for path in data_dir.rglob("*.parquet"):
            getData.read_frame(path)
    return halves


def test_kills_at_any_moment_lose_nothing(market_dir, tmp_path):
    """Files of 20 MB, so that there is a while in which they are half written."""
    whole, data_dir = copy_market(market_dir, tmp_path / "whole"), copy_market(market_dir, tmp_path / "data")
    flags = (*WINDOW, *REDUCER, "--hidden-dim", "1600", "--windows-per-epoch", "128")
    run("feature_reducer.py", whole, *flags)
    run("train.py", whole, *AGENT)
    rng = np.random.default_rng(0)
    reducer = [sys.executable, "-u", str(ROOT / "feature_reducer.py"), "--data-dir", str(data_dir), *flags]
    halves = killed_runs(reducer, data_dir, 8, rng)
    going_on = (data_dir / "checkpoints" / "feature_reducer_last.pt").exists()
    run("feature_reducer.py", data_dir, *flags, *["--resume"] * going_on)
    train_it = [sys.executable, "-u", str(ROOT / "train.py"), "--data-dir", str(data_dir), *AGENT]
    halves += killed_runs(train_it, data_dir, 20, rng)
    assert halves >= 5
    run("train.py", data_dir, *AGENT, *["--resume"] * (data_dir / "checkpoints" / "last.pt").exists())
    assert_same_runs(whole, data_dir)
    assert not list(data_dir.rglob("*.tmp"))
    assert pd.read_csv(data_dir / "runs" / "trials.csv")["validation_bp_day"].notna().sum() == 1


def test_a_second_ctrl_c_ends_at_once_and_harms_nothing(trained, tmp_path):
    """The batch is made so long that the first Ctrl-C alone would have to wait for it."""
    data_dir = shutil.copytree(trained[0], tmp_path / "data")
    before = {path.name: path.read_bytes() for path in (data_dir / "checkpoints").glob("*.pt")}
    slow = ("--pretrain-epochs", "0", "--num-envs", "64", "--steps", "2000", "--hold", "1", "--minibatch", "16",
            "--run", "long")  # fmt: skip
    command = [sys.executable, "-u", str(ROOT / "train.py"), "--data-dir", str(data_dir), *AGENT, *slow]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert any(line.startswith("at batch 0") for line in process.stdout)
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        assert any("once more to stop at once" in line for line in process.stderr)
        process.send_signal(signal.SIGINT)
        printed = process.communicate(timeout=10)[0]
    assert process.returncode == 130
    assert "stopped after" not in printed  # nothing was finished
    for name in ("pretrained.pt", "final.pt", "feature_reducer.pt"):
        assert (data_dir / "checkpoints" / name).read_bytes() == before[name]
    assert load(data_dir / "checkpoints" / "last.pt")["progress"].batch == 0


def test_the_reducer_stopped_within_an_epoch_goes_on_there(market_dir, tmp_path):
    whole, stopped = copy_market(market_dir, tmp_path / "whole"), copy_market(market_dir, tmp_path / "stopped")
    flags = (*WINDOW, *REDUCER, "--batch-size", "2", "--init", "random", "--learning-rate", "0.001")
    run("feature_reducer.py", whole, *flags)
    command = [sys.executable, "-u", str(ROOT / "feature_reducer.py"), "--data-dir", str(stopped), *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert any(line.startswith("epoch   1") for line in process.stdout)
        process.send_signal(signal.SIGTERM)
        rest = process.communicate(timeout=60)
    assert process.returncode == 143, rest
    progress = load(stopped / "checkpoints" / "feature_reducer_last.pt")["progress"]
    assert progress["epoch"] == 1
    assert 0 < progress["batch"] < 256
    run("feature_reducer.py", stopped, *flags, "--resume")
    for name in ("feature_reducer", "feature_reducer_last"):
        contents = [load(folder / "checkpoints" / f"{name}.pt") for folder in (whole, stopped)]
        assert same_tensors(*contents), name
    logs = [(folder / "runs" / "feature_reducer" / "metrics.csv").read_text() for folder in (whole, stopped)]
    assert logs[0] == logs[1]


# ------------------------------------------------------------------------------------------ too little of anything


def test_a_full_disk_keeps_the_old_files_and_the_training_going(trained, tmp_path):
    """A limit on the size of files stands for the disk; room comes back after the first batch."""
    data_dir = shutil.copytree(trained[0], tmp_path / "data")
    old = {path.name: path.read_bytes() for path in (data_dir / "checkpoints").glob("*.pt")}
    small = min(map(len, old.values())) // 2
    flags = (*AGENT, "--run", "full", "--no-test")
    full = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (small, resource.RLIM_INFINITY))
    command = [sys.executable, "-u", str(ROOT / "train.py"), "--data-dir", str(data_dir), *flags]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, preexec_fn=full, **pipes) as process:
        assert any(line.startswith("batch     1/4") for line in process.stdout)
        process.send_signal(signal.SIGSTOP)
        assert {name: (data_dir / "checkpoints" / name).read_bytes() for name in old} == old
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        process.send_signal(signal.SIGCONT)
        printed, errors = process.communicate(timeout=120)
    assert process.returncode == 5, errors
    assert "Traceback" not in errors
    assert errors.count("warning: cannot write") >= 3
    assert errors.splitlines()[-1].startswith(f"error: {data_dir / 'checkpoints' / 'pretrained.pt'} is not up to date")
    assert (data_dir / "checkpoints" / "pretrained.pt").read_bytes() == old["pretrained.pt"]
    assert pd.read_csv(data_dir / "runs" / "full" / "metrics.csv")["step"].tolist() == [1, 2, 3, 4]
    for name in ("best", "final", "last"):
        assert load(data_dir / "checkpoints" / f"{name}.pt")["run"] == "full"
    # what could be written is what a run without trouble writes, but for the epochs that were to be gone back to
    last = load(data_dir / "checkpoints" / "last.pt")
    assert last["progress"].best_validation > -math.inf


def test_a_disk_that_fills_between_pretraining_and_batches_ends_nothing(trained, tmp_path):
    data_dir = shutil.copytree(trained[0], tmp_path / "data")
    command = [sys.executable, "-u", str(ROOT / "train.py"), "--data-dir", str(data_dir), *AGENT, "--run", "full"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([*command, "--no-test"], **pipes) as process:
        for line, room in (("pretrain  1/2", 0), ("batch     2/4", resource.RLIM_INFINITY)):
            assert any(printed.startswith(line) for printed in process.stdout)
            process.send_signal(signal.SIGSTOP)
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
            process.send_signal(signal.SIGCONT)
        _, errors = process.communicate(timeout=120)
    assert process.returncode == (5 if "is not up to date" in errors else 0), errors
    assert "Traceback" not in errors
    assert "warning: no TensorBoard curves" in errors
    assert pd.read_csv(data_dir / "runs" / "full" / "metrics.csv")["step"].tolist() == [1, 2, 3, 4]
    assert load(data_dir / "checkpoints" / "last.pt")["progress"].batch == 4


@pytest.mark.parametrize("script", ["feature_reducer", "train"])
def test_a_disk_too_small_for_the_checkpoints_is_refused_before_the_run(market_dir, tmp_path, script):
    data_dir = copy_market(market_dir, tmp_path / "data")
    code = (
        "import shutil, sys\n"
        "shutil.disk_usage = lambda path: shutil._ntuple_diskusage(10**12, 10**12, 1000)\n"
        f"import getData, {script} as script\n"
        "getData.run_script(script.main)\n"
    )
    flags = (*WINDOW, *REDUCER) if script == "feature_reducer" else (*WINDOW, *AGENT)
    result = subprocess.run(
        [sys.executable, "-c", code, "--data-dir", str(data_dir), *flags], capture_output=True, text=True, cwd=ROOT
    )
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert re.search(r"not enough disk: .* need \d+\.\d GB more in .*, 0\.0 GB are free", line)
    assert not list((data_dir / "checkpoints").glob("*.pt"))


def test_a_loss_that_is_not_finite_ends_the_run_and_names_a_tensor(trained, tmp_path):
    data_dir = shutil.copytree(trained[0], tmp_path / "data")
    refused = run("train.py", data_dir, *AGENT, "--policy-rate", "1e30", code=1).stderr
    assert re.search(r"error: .* in batch \d.*: .* is not finite; lower the learning rates", refused), refused
    assert load(data_dir / "checkpoints" / "last.pt")["progress"].batch < 4
    load(data_dir / "checkpoints" / "best.pt")
    refused = run("feature_reducer.py", data_dir, *WINDOW, *REDUCER, "--learning-rate", "1e30", code=1).stderr
    assert re.search(r"error: .* in epoch 1: .* is not finite; lower the learning rates", refused), refused
    load(data_dir / "checkpoints" / "feature_reducer.pt")


def without_override() -> None:
    """Root obeys permissions too: it gives up the right to override them (CAP_DAC_OVERRIDE, 1) at its next exec."""
    ctypes.CDLL(None).prctl(24, 1, 0, 0, 0)  # PR_CAPBSET_DROP


@pytest.mark.parametrize("script", ["getData.py", "feature_reducer.py", "train.py"])
def test_a_folder_that_cannot_be_written_is_named(trained, tmp_path, script):
    data_dir = shutil.copytree(trained[0], tmp_path / "data")
    folders = [data_dir, *(path for path in data_dir.rglob("*") if path.is_dir())]
    for path in data_dir.rglob("*"):
        path.chmod(0o555 if path.is_dir() else 0o444)
    data_dir.chmod(0o555)
    flags = {"getData.py": ("--source", "synthetic"), "train.py": AGENT}.get(script, (*WINDOW, *REDUCER))
    command = [sys.executable, str(ROOT / script), "--data-dir", str(data_dir), *flags]
    result = subprocess.run(command, capture_output=True, text=True, preexec_fn=without_override)
    for path in folders:
        path.chmod(0o755)
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"error: Permission denied ({data_dir}")


def test_what_is_too_large_for_the_machine_is_said_with_numbers(trained, tmp_path):
    data_dir = shutil.copytree(trained[0], tmp_path / "data")
    cases = {
        ("train.py", *WINDOW, *AGENT, "--reducer", "random", "--hidden-dim", "90000000"): "not enough memory",
        ("feature_reducer.py", *WINDOW, *REDUCER, "--hidden-dim", "90000000"): "not enough memory",
        ("train.py", *AGENT, "--num-envs", "1", "--steps", "200000"): "too little history",
    }
    for (script, *flags), message in cases.items():
        result = run(script, data_dir, *flags, code=1)
        (line,) = result.stderr.splitlines()
        assert message in line
        assert "pretrain  1/2" not in result.stdout
        assert len(re.findall(r"\d+(?:\.\d+)?", line)) >= 2, line  # needed and found


@pytest.mark.parametrize(("symbols", "days"), [(1, 110), (100, 62)])
def test_one_coin_and_a_hundred_go_through(tmp_path, symbols, days):
    names = ",".join(f"C{number}USDT" for number in range(symbols))
    short = ("--purge-days", "3", "--days", str(days)) if symbols > 1 else ("--days", str(days))
    run("getData.py", tmp_path, "--source", "synthetic", "--symbols", names, *short)
    flags = ("--window-bars", "2,1,1,1,1", "--hidden-dim", "8", "--latent-dim", "4", "--batches", "1")
    run("train.py", tmp_path, *AGENT, *flags)
    table = metrics_of(tmp_path)["test"]
    assert all(value is not None for value in table["agent (best)"].values())
    assert load(tmp_path / "checkpoints" / "best.pt")["policy_shape"]["assets"] == symbols + 1


def test_one_bar_less_than_the_minimum_is_refused_with_numbers(tmp_path):
    """The shortest history that getData.py takes trains; with a segment one bar too long, train.py says what it has."""
    refused = run("getData.py", tmp_path, "--source", "synthetic", "--symbols", "AUSDT", "--days", "40", code=1).stderr
    days = int(re.search(r"too little history: (\d+) days needed, 40\.0 found", refused).group(1))
    for count, code in ((days - 1, 1), (days, 0)):
        run("getData.py", tmp_path, "--source", "synthetic", "--symbols", "AUSDT", "--days", str(count), code=code)
    rows = len(feature_reducer.load_windows(tmp_path, (2, 1, 1, 1, 1), torch.device("cpu"))[0].rows(
        getData.load_prices(tmp_path)[1]["splits"]["train"]))  # fmt: skip
    flags = (*AGENT, "--window-bars", "2,1,1,1,1", "--hidden-dim", "8", "--latent-dim", "4", "--pretrain-epochs", "0",
             "--batches", "1", "--num-envs", "1", "--hold", "1", "--no-test")  # fmt: skip
    refused = run("train.py", tmp_path, *flags, "--steps", str(rows - 2), code=1).stderr
    assert f"a segment needs {rows + 1} bars, the training split has {rows}" in refused
    run("train.py", tmp_path, *flags, "--steps", str(rows - 3), "--minibatch", "4096")


# ---------------------------------------------------------------------------------------- extreme bars, files, network


def test_extreme_bars_go_through_without_a_number_that_is_not_finite(tmp_path):
    """Ten times up in a bar and down again, no volume for three days, all coins flat for two, one coin halted for two;
    in the training split and again in the test split."""
    bars = getData.synthetic_market(["AUSDT", "BUSDT", "CUSDT"], 120, 0, 1.0)
    for start in (60 * 288, 110 * 288):
        for symbol, frame in bars.items():
            prices = frame.columns.get_indexer(["open", "high", "low", "close"])
            quiet, flat = slice(start, start + 3 * 288), slice(start + 4 * 288, start + 6 * 288)
            frame.iloc[quiet, frame.columns.get_loc("volume")] = 0.0
            frame.iloc[flat, prices] = frame["close"].iloc[flat.start - 1]
            if symbol == "AUSDT":
                frame.iloc[start + 100 : start + 1_000, prices] *= 10.0
                frame.iloc[start + 1_500, prices[1]] *= 10.0
    halted = slice(61 * 288, 63 * 288)
    bars["BUSDT"] = bars["BUSDT"].drop(bars["BUSDT"].index[halted]).reset_index(drop=True)
    (tmp_path / "bars").mkdir()
    for symbol, frame in bars.items():
        frame.to_parquet(tmp_path / "bars" / f"{symbol}.parquet")
    run("getData.py", tmp_path, "--source", str(tmp_path / "bars"), "--symbols", ",".join(bars))
    frames, footer = getData.load_features(tmp_path)
    assert set(feature_reducer.check_features(frames).values()) == {30}
    prices, _ = getData.load_prices(tmp_path)
    assert float(np.log(prices["AUSDT.close"]).diff().abs().max()) > 2.2
    run("feature_reducer.py", tmp_path, *WINDOW, *REDUCER)
    run("train.py", tmp_path, *AGENT, "--num-envs", "32", "--steps", "256", "--hold", "1", "--minibatch", "1024")
    log = pd.read_csv(tmp_path / "runs" / "tiny" / "metrics.csv").drop(columns="validation_bp_day")
    assert np.isfinite(log.to_numpy()).all()
    assert log["skipped_steps"].max() == 0
    for row in metrics_of(tmp_path)["test"].values():
        assert all(value is not None for value in row.values())
    for path in (tmp_path / "checkpoints").glob("*.pt"):
        saved = torch.load(str(path), weights_only=True)
        tensors = [*saved["reducer"].values(), *saved.get("policy", {}).values()]
        assert all(torch.isfinite(tensor).all() for tensor in tensors)


WATCH = """
import os, sys

def refuse(event, arguments):
    if event in ("socket.bind", "socket.connect", "socket.getaddrinfo", "socket.sendto"):
        os.write(2, f"the network was used: {event} {arguments}".encode())
        os._exit(99)

sys.addaudithook(refuse)
"""


def test_files_stay_in_the_data_folder_and_nothing_uses_the_network(tmp_path):
    """With a home, a temporary folder and a working folder of its own; libraries may keep caches in the first two."""
    folders = {name: tmp_path / name for name in ("home", "tmp", "work", "site")}
    for path in folders.values():
        path.mkdir()
    (folders["site"] / "sitecustomize.py").write_text(WATCH)
    environment = os.environ | {
        "HOME": str(folders["home"]), "TMPDIR": str(folders["tmp"]), "PYTHONPATH": str(folders["site"]),
        "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    sources = set(ROOT.glob("*"))
    for script, flags in (
        ("getData.py", ("--source", "synthetic", "--symbols", "BTCUSDT,ETHUSDT,SOLUSDT", "--days", "110")),
        ("feature_reducer.py", (*WINDOW, *REDUCER)),
        ("train.py", AGENT),
    ):
        command = [sys.executable, str(ROOT / script), *flags]
        settings = {"cwd": folders["work"], "env": environment, "umask": 0o022}
        result = subprocess.run(command, capture_output=True, text=True, timeout=300, **settings)
        assert result.returncode == 0, result.stderr
    assert [path.name for path in folders["work"].iterdir()] == ["data"]
    assert all(path.name.startswith("torchinductor") for path in folders["tmp"].iterdir())
    assert {path.name for path in folders["home"].iterdir()} <= {".cache", ".config"}
    assert set(ROOT.glob("*")) == sources
    modes = {stat.S_IMODE(path.stat().st_mode) for path in folders["work"].rglob("*") if path.is_file()}
    assert modes == {0o644}
    assert (folders["work"] / "data" / "reports" / "tiny" / "report.html").exists()
    # and the watch works
    seen = subprocess.run([sys.executable, "-c", "import socket; socket.socket().connect(('127.0.0.1', 9))"],
                          env=environment, capture_output=True)  # fmt: skip
    assert seen.returncode == 99


SCRIPTS = (getData, feature_reducer, portfolio_env, train)
PARTS = st.one_of(st.integers(-2, 9), st.floats(), st.text(max_size=2))
ANYTHING = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(-3, 3), st.floats(), st.text(max_size=8), st.builds(Path),
    st.binary(max_size=3), st.lists(PARTS, max_size=4), st.lists(PARTS, max_size=4).map(tuple),
)  # fmt: skip


def types_of(script: ModuleType) -> dict[str, object]:
    """The annotations of a script's constants."""
    hints = get_type_hints(script, include_extras=True)
    return {name: kind for name, kind in hints.items() if name.isupper() and not name.startswith("_")}


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_constant_has_a_type_and_values_of_it(script):
    """A constant without a type would have neither a flag nor a check; only facts of the file format have none."""
    kinds = (bool, int, float, str, tuple, Path)
    names = {name for name, value in vars(script).items() if name.isupper() and isinstance(value, kinds)}
    names = {name for name in names if not name.startswith("_")}
    facts = {"BAR_MS", "DAY_MS", "BARS_PER_DAY", "BARS_PER_YEAR"}
    assert names - facts == types_of(script).keys()
    before = dict(vars(script))
    with put_back(script):
        getData.set_constants(script, [])
        script.check_constants()
        assert vars(script) == before
        getData.assign_constants(script, getattr(script, "SMALL", {}))
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
            getData.assign_constants(script, {name: value})
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
    """A function that copies the four scripts, edits them ({script: {old: new}}), and returns their folder."""

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
        ("getData.py", "DAYS: Count = 240", 'DAYS: Count = "3"', "DAYS = '3': Input should be a valid integer"),
        ("feature_reducer.py", "EPOCHS: Whole = 10", "EPOCHS: Whole = -1", "EPOCHS = -1: Input should be greater than"),
        ("feature_reducer.py", '"EPOCHS": 2', '"EPOCHS": True', "EPOCHS = True: Input should be a valid integer"),
        ("portfolio_env.py", "FEE_RATE: Fraction = 0.001", "FEE_RATE: Fraction = 1", "FEE_RATE = 1: Input should"),
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
        "AMP": "off",
    }  # fmt: skip
    code = (
        "import json, feature_reducer, portfolio_env, train\n"
        "for script in (feature_reducer, portfolio_env, train):\n"
        f"    values = {{name: getattr(script, name) for name in {list(changed)} if hasattr(script, name)}}\n"
        "    print(json.dumps(values, default=str))\n"
        "print(train.SMALL['LATENT_DIM'])"
    )
    printed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=folder, check=True
    ).stdout
    reducer, env, training, small = map(json.loads, printed.splitlines())
    assert training == changed
    assert reducer == {name: changed[name] for name in reducer}
    assert env == {name: changed[name] for name in env}
    assert {"DATA_DIR", "SEED"} <= reducer.keys() & env.keys()
    assert small == 303


def written(script: ModuleType, name: str) -> str:
    """What stands behind a constant's name in a script."""
    return re.search(rf"^{name}: .*? = (.*?)(  #|$)", Path(script.__file__).read_text(), re.M)[1]


def test_no_constant_is_written_twice():
    own = {"JOB", "RESUME", "MAX_NORM"}  # of each script
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
        getData: ("Job and files", "Data", "Exchange", "Splits", "System"),
        feature_reducer: ("Job and files", "Model", "Optimisation", "System"),
        portfolio_env: ("Files and data", "Trading", "Baselines"),
        train: ("Job and files", "Other jobs than training", "Market", "Online training", "System"),
    }
    places = [text.index(f"\n{group}:\n") for group in groups[script]]
    assert places == sorted(places)
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
def test_the_table_of_jobs_names_jobs_and_constants(script):
    kinds = types_of(script)
    assert list(script._JOBS) == list(get_args(kinds["JOB"]))
    for rule, *names in script._JOBS.values():
        assert rule in ("only", "all but")
        assert set(names) <= kinds.keys()
        assert all((name in names) == (rule == "only") for name in ("JOB", "DATA_DIR", "SEED"))


def metrics_of(data_dir: Path, report: str = "tiny") -> dict:
    return json.loads((data_dir / "reports" / report / "metrics.json").read_text())


def test_any_split_of_any_market_can_be_evaluated(trained, market_dir, tmp_path):
    data_dir = shutil.copytree(trained[0], tmp_path / "data")
    run("train.py", data_dir, "--job", "evaluate")
    again, first = metrics_of(data_dir, "tiny-best-test"), metrics_of(data_dir)
    assert again["test"]["agent (best)"] == first["test"]["agent (best)"]
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
    run("train.py", elsewhere, "--job", "evaluate", "--checkpoint", checkpoint, "--seed", "9")
    there = metrics_of(elsewhere, "tiny-best-test")
    assert (there["seed"], there["scale"]) == ("0", "small")  # of the training, whatever the constants say now
    assert there["market"].startswith("synthetic:seed=5")
    assert there["skill"]["agent (best)"]["trials"] == 1 + extra  # those behind the checkpoint, wherever it is tested
    two_coins = make_market(tmp_path / "two", "--symbols", "BTCUSDT,ETHUSDT")
    refused = run("train.py", two_coins, "--job", "evaluate", "--checkpoint", checkpoint, code=1).stderr
    assert "was trained on symbols" in refused
    assert "there is no" in run("train.py", two_coins, "--job", "evaluate", code=1).stderr


def test_prices_of_other_times_than_the_features_are_refused(trained, tmp_path):
    data_dir = shutil.copytree(trained[0], tmp_path / "data")
    path = data_dir / "features" / "prices.parquet"
    getData.write_parquet(path, pd.read_parquet(path).iloc[100:], getData.read_footer(path))
    refused = run("train.py", data_dir, "--job", "evaluate", code=1).stderr
    assert "are of other times: run python getData.py --job features" in refused


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
    assert "GAMMA" not in changed
    constants = json.loads(row["constants"])  # all of them: those edited in the file too
    assert (constants["BATCHES"], constants["GAMMA"]) == (4, train.GAMMA)

    run("train.py", data_dir, *AGENT, "--run", "second", "--gamma", "0.9", "--no-test")
    run("train.py", data_dir, *AGENT, "--run", "third", "--seed", "1")
    trials = pd.read_csv(data_dir / "runs" / "trials.csv")
    assert trials["run"].tolist() == ["tiny", "second", "third"]
    assert json.loads(trials["changed"][1])["GAMMA"] == 0.9
    assert math.isnan(trials["test_bp_day"][1])
    assert trials["data_sha256"].nunique() == 1
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
    np.testing.assert_allclose(list(signal_now["weights"].values()), (expected / expected.sum())[0], atol=1e-5)
    assert signal_now["close_time_ms"] == int(windows.times[-1])

    for flags, message in (
        (
            (
                "--job",
                "signal",
            ),
            "minutes old (MAX_AGE is 600 s): run python getData.py first",
        ),
        ((*ages, "--holdings", "0.5,0.2"), "HOLDINGS must be up to 4 weights"),
        ((*ages, "--holdings", "0,0,0,0,1"), "HOLDINGS must be up to 4 weights"),
    ):
        assert message in run("train.py", data_dir, *flags, code=1).stderr
    soon = data_dir / "soon"  # bars of the future, by this machine's clock
    for symbol, frame in getData.load_bars(data_dir, footer["symbols"]).items():
        later = frame.drop(columns="filled").reset_index(names="timestamp")
        later["timestamp"] += pd.Timestamp.now(tz="UTC").floor("1D") + pd.Timedelta("2D") - later["timestamp"].iloc[-1]
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


def test_a_walk_forward_run_stitches_its_folds(market_dir, tmp_path):
    """One curve over the second half, each part by an agent of its time; also when stopped in the second fold."""
    data_dir = copy_market(market_dir, tmp_path / "data")
    small = (*WINDOW, "--hidden-dim", "24", "--latent-dim", "16", "--walk-forward", "2")
    printed = run("train.py", data_dir, *small, *AGENT).stdout
    content = metrics_of(data_dir)
    assert list(content["skill"]) == ["agent (2 folds)"]
    _, footer = getData.load_prices(data_dir)
    folds = getData.walk_forward_splits(footer["splits"], footer["split_shares"], footer["purge_ms"], 2)
    days = (folds[1]["test"][1] - folds[0]["test"][0]) / 86_400_000
    assert content["test"]["agent (2 folds)"]["days"] == pytest.approx(days, abs=0.02)
    saved = load(data_dir / "checkpoints" / "best.pt")
    assert saved["market"]["splits"] == folds[1]
    assert printed.count("encoder: starts at random") == 1  # the second fold goes on from the first one's weights
    assert {path.name for path in (data_dir / "runs" / "tiny").iterdir()} == {"fold-0", "fold-1"}
    assert len(pd.read_csv(data_dir / "runs" / "trials.csv")) == 1

    # the normalisation knows nothing that came after the first fold's training
    frames, _ = getData.load_features(data_dir)
    expected = feature_reducer.fit_normalisation(frames, folds[0]["train"])
    assert same_tensors(saved["normalisation"], expected)

    stopped = copy_market(market_dir, tmp_path / "stopped")
    stop_and_resume(stopped, "batch     3/4", *small, skip=1)
    assert metrics_of(stopped)["test"] == content["test"]

    killed = copy_market(market_dir, tmp_path / "killed")
    command = [sys.executable, "-u", str(ROOT / "train.py"), "--data-dir", str(killed), *small, *AGENT]
    killed_runs(command, killed, 6, np.random.default_rng(1))
    run("train.py", killed, *small, *AGENT, *["--resume"] * (killed / "checkpoints" / "last.pt").exists())
    assert metrics_of(killed)["test"] == content["test"]


def test_a_fold_is_on_disk_before_its_best_replaces_that_of_the_fold_before(market_dir, tmp_path):
    """Else a run killed in between would test the earlier fold with an agent of the later one."""
    whole, killed = copy_market(market_dir, tmp_path / "whole"), copy_market(market_dir, tmp_path / "killed")
    flags = (*WINDOW, "--hidden-dim", "24", "--latent-dim", "16", *AGENT, "--pretrain-epochs", "0",
             "--walk-forward", "2")  # fmt: skip
    run("train.py", whole, *flags)
    command = [sys.executable, "-u", str(ROOT / "train.py"), "--data-dir", str(killed), *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        starts = (line for line in process.stdout if line.startswith("at batch 0"))
        assert next(starts)
        assert next(starts)
        process.kill()
    progress = load(killed / "checkpoints" / "last.pt")["progress"]
    assert (progress.fold, progress.batch, len(progress.out_of_sample)) == (1, 0, 1)
    run("train.py", killed, *flags, "--resume")
    assert metrics_of(killed)["test"] == metrics_of(whole)["test"]

    # the disk is full when the second fold begins
    full = copy_market(market_dir, tmp_path / "full")
    command = [sys.executable, "-u", str(ROOT / "train.py"), "--data-dir", str(full), *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert any(line.startswith("batch     4/4") for line in process.stdout)
        process.send_signal(signal.SIGSTOP)
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
        process.send_signal(signal.SIGCONT)
        errors = process.communicate(timeout=120)[1]
    assert process.returncode == 5, errors
    assert "error: last.pt could not be written, and without it the next fold cannot begin" in errors
    run("train.py", full, *flags, "--resume")
    assert metrics_of(full)["test"] == metrics_of(whole)["test"]


def test_a_file_that_cannot_be_written_ends_no_training_but_is_in_its_exit_code(trained, tmp_path):
    """A folder that lies where the file belongs cannot be replaced by it."""
    data_dir = copy_market(trained[0], tmp_path / "data")
    checkpoints = data_dir / "checkpoints"
    flags = (*WINDOW, "--hidden-dim", "24", "--latent-dim", "16", *AGENT)
    (checkpoints / "last.pt").mkdir(parents=True)
    result = run("train.py", data_dir, *flags, code=5)
    assert result.stderr.splitlines()[-1].startswith(f"error: {checkpoints / 'last.pt'} is not up to date")
    assert "agent (best)" in result.stdout
    for name in ("best", "final"):
        assert load(checkpoints / f"{name}.pt")["run"] == "tiny"

    (checkpoints / "last.pt").rmdir()
    (checkpoints / "best.pt").unlink()
    (checkpoints / "best.pt").mkdir()
    result = run("train.py", data_dir, *flags, "--walk-forward", "2", code=5)
    assert result.stderr.splitlines()[-1].startswith("error: best.pt could not be written")
    (checkpoints / "best.pt").rmdir()
    assert "agent (2 folds)" in run("train.py", data_dir, *flags, "--walk-forward", "2", "--resume").stdout


def test_an_allocation_that_fails_is_one_line(trained, tmp_path):
    """More than the process may have, though the machine has it: a limit on its addresses stands for the memory."""
    data_dir = copy_market(trained[0], tmp_path / "data")
    limit = partial(resource.setrlimit, resource.RLIMIT_AS, (3 * 10**9, resource.RLIM_INFINITY))
    for script, flags in (("train.py", AGENT), ("feature_reducer.py", REDUCER)):
        command = [sys.executable, str(ROOT / script), "--data-dir", str(data_dir), *WINDOW, *flags]
        command += ["--latent-dim", "16", "--hidden-dim", "130000"]
        result = subprocess.run(command, capture_output=True, text=True, preexec_fn=limit)
        assert result.returncode == 1, result.stderr
        (line,) = result.stderr.splitlines()
        assert re.search(r"allocate .*: use --scale small, or smaller batches", line), line


def test_a_frozen_encoder_stays_as_it_is(trained, tmp_path):
    data_dir = shutil.copytree(trained[0], tmp_path / "data")
    run("train.py", data_dir, *AGENT, "--no-train-encoder", "--no-test")
    saved = load(data_dir / "checkpoints" / "final.pt")
    reducer = load(data_dir / "checkpoints" / "feature_reducer.pt")
    assert same_tensors(saved["reducer"], reducer["reducer"])
    learnt = load(trained[0] / "checkpoints" / "final.pt")
    assert not same_tensors(learnt["reducer"], reducer["reducer"])


def test_mistakes_get_one_line(trained, tmp_path):
    data_dir, _ = trained
    cases = {
        (2, "train.py", "--heads", "3"): "TOKEN_WIDTH",
        (2, "train.py", "--batches", "many"): "BATCHES = 'many': Input should be a valid integer",
        (2, "train.py", "--batch", "3"): "unrecognized arguments: --batch",
        (2, "train.py", "--job", "signal", "--walk-forward", "3"): "--walk-forward does nothing in --job signal",
        (2, "feature_reducer.py", *WINDOW, *REDUCER, "--latent-dim", "100"): "HIDDEN_DIM >= LATENT_DIM",
        (2, "feature_reducer.py", *WINDOW, *REDUCER, "--device", "cuda:9"): "DEVICE",
        (1, "train.py", *AGENT, "--scale", "full"): "is of scale small, this run of scale full",
        (1, "train.py", *AGENT, "--resume", "--gamma", "0.9"): "GAMMA = 0.99",
        (1, "train.py", *AGENT, "--resume", "--blocks", "2"): "BLOCKS = 1",
        (1, "train.py", *AGENT, "--resume", "--walk-forward", "2"): "WALK_FORWARD = 0",
        (1, "train.py", *AGENT, "--hold", "1000000"): "too little history: HOLD 1000000",
        (1, "feature_reducer.py", *REDUCER, "--window-bars", "6,4,3,2,60"): "looks back",
    }
    for (code, script, *flags), message in cases.items():
        result = run(script, data_dir, *flags, code=code)
        assert message in result.stderr, result.stderr
        assert len(result.stderr.strip().splitlines()) == 1, result.stderr


def test_the_agent_never_sees_the_future(trained):
    """Targets of the trained agent before a moment do not depend on any feature or price after it."""
    data_dir, _ = trained
    saved = load(data_dir / "checkpoints" / "best.pt")
    frames, footer = getData.load_features(data_dir)
    policy = train.ActorCritic(16, 4, (16, 12), 8, 2, 16, 1, train.ACTION_SCALE, train.LOG_STD)
    policy.load_state_dict(saved["policy"])
    reducer = feature_reducer.reducer_from_checkpoint(saved, "cpu")
    prices, _ = getData.load_prices(data_dir)
    opens, closes = (prices[[f"{s}.{kind}" for s in footer["symbols"]]].to_numpy() for kind in ("open", "close"))
    times = prices.index.as_unit("ms").asi8
    first = int(np.searchsorted(times, footer["splits"]["test"][0]))
    cut = first + 150
    now = prices.index[cut]
    targets = []
    for after in (None, 5.0):
        changed = {name: frame.copy() for name, frame in frames.items()}
        later = [part.copy() for part in (opens, closes)]
        if after is not None:
            for frame in changed.values():
                frame.loc[frame.index > now] = after
            later[0][cut + 1 :] *= after
            later[1][cut + 1 :] *= after
        windows = feature_reducer.FeatureWindows(changed, saved["window_bars"], normalisation=saved["normalisation"])
        rows = torch.arange(first, first + 300)
        mark = portfolio_env.align_prices(*later, "next_open")[3][first : first + 300]
        tokens = train.encode(policy, reducer, windows, rows, 64)
        mark = torch.from_numpy(portfolio_env.with_cash(mark))
        targets.append(train.agent_targets(policy, tokens, mark, 6).numpy())
    weights, one_by_one = torch.eye(4, dtype=torch.float64)[:1], []
    for row in range(300):  # the trained agent, in segments or one decision after another
        one_by_one.append(train.decide(policy, tokens[row : row + 1], weights))
        weights, _ = portfolio_env.drift(one_by_one[-1], mark[row : row + 1])
    np.testing.assert_allclose(targets[1], torch.cat(one_by_one).numpy(), rtol=0, atol=1e-5)
    np.testing.assert_array_equal(targets[0][: cut - first + 1], targets[1][: cut - first + 1])
    assert not np.array_equal(targets[0][cut - first + 1], targets[1][cut - first + 1])


@pytest.mark.skipif(not REAL_BARS.exists(), reason="no recorded bars beside the project")
def test_recorded_bars_go_through(tmp_path):
    bars = tmp_path / "bars"  # the first 130 days are enough for the tiny windows
    bars.mkdir()
    for symbol in ("BTCUSDT", "ETHUSDT", "TRXUSDT"):
        pd.read_parquet(REAL_BARS / f"{symbol}.parquet").head(130 * 288).to_parquet(bars / f"{symbol}.parquet")
    run("getData.py", tmp_path, "--source", str(bars), "--symbols", "BTCUSDT,ETHUSDT,TRXUSDT")
    run("feature_reducer.py", tmp_path, *WINDOW, *REDUCER)
    printed = run("train.py", tmp_path, *AGENT).stdout
    assert "recorded:" in printed
    table = json.loads((tmp_path / "reports" / "tiny" / "metrics.json").read_text())["test"]
    assert all(np.isfinite(list(row.values())).all() for name, row in table.items() if name.startswith("agent"))
