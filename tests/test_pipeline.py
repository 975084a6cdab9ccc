"""What the scripts promise, run as a user runs them at a tiny size: files, figures, resume, causality."""

import base64
import json
import os
import pty
import re
import resource
import shutil
import signal
import subprocess
import sys
from functools import partial
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import (
    AGENT,
    COINS,
    REAL_BARS,
    REDUCER,
    ROOT,
    WINDOW,
    assert_same_runs,
    copy_market,
    load,
    make_market,
    metrics_of,
    put_back,
    run,
    same_tensors,
    stop_and_resume,
)
from forked import Script

import feature_reducer
import getData
import portfolio_env
import train

sys.path.append(str(Path(__file__).parent / "benchmarks"))
from momentum_rule import momentum_rule


def test_the_pipeline_leaves_what_it_promises(trained):
    data_dir, printed = trained
    for name in (
        "feature_reducer.pt",
        "feature_reducer_last.pt",
        "pretrained.pt",
        "best.pt",
        "final.pt",
        "last.pt",
    ):
        assert (data_dir / "checkpoints" / name).exists()
    assert not list(data_dir.rglob("*.tmp"))
    log = pd.read_csv(data_dir / "runs" / "tiny" / "metrics.csv")
    assert log["step"].tolist() == [1, 2, 3, 4]
    for name in (
        "portfolio_value", "benchmark_value", "sharpe", "max_drawdown", "entropy", "advantage_mean",
        "advantage_std", "clip_fraction", "approx_kl", "explained_variance", "accuracy", "encoder_loss",
        "policy_loss", "critic_loss", "reconstruction_loss", "policy_grad_norm", "encoder_grad_norm",
        "loss_scale", "skipped_steps", "epsilon", "policy_rate", "encoder_rate", "encode_steps_per_second",
        "rollout_steps_per_second", "update_steps_per_second",
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
        assert row["cost_paid"] == pytest.approx(0.001 * row["turnover_day"] * days, rel=2e-3, abs=1e-12), (
            name
        )


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
    files = {"report.html", "metrics.json", "series.parquet", "trades.csv"}
    assert {path.name for path in folder.iterdir()} == files
    content = json.loads((folder / "metrics.json").read_text(), parse_constant=no_constant)
    reader = PageReader()
    page = (folder / "report.html").read_text(encoding="utf-8")
    # the library, the curves, and what draws them; none is loaded
    scripts = re.findall("<script[^>]*>", page)
    assert scripts == ["<script>", '<script type="application/json" id="chart-data">', "<script>"]
    page = re.sub("<script.*?</script>", "", page, flags=re.S)
    reader.feed(page)
    assert reader.open == []
    for tag, attributes in reader.tags:
        assert tag not in ("script", "link", "iframe", "object", "base")
        assert all(attributes.get(name, "data:image/png;base64,").startswith("data:image/png;base64,")
                   for name in ("src", "href", "srcset", "data"))  # fmt: skip
    assert "url(" not in page
    assert "@import" not in page
    images = [attributes["src"] for tag, attributes in reader.tags if tag == "img"]
    # equity in print, rolling figures, returns, weights of two agents, trading, pretraining, online
    assert len(images) == 8
    assert all(base64.b64decode(image.partition(",")[2]).startswith(b"\x89PNG") for image in images)

    cells = set(reader.texts)
    for name, skill in content["skill"].items():
        row = content["test"][name]
        assert {
            name,
            f"{row['growth_bp_day']:+.1f}",
            f"{row['max_drawdown']:.1%}",
            f"{row['sharpe']:+.2f}",
        } <= cells
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
        run("train.py", data_dir, *WINDOW, "--hidden-dim", "34", "--latent-dim", "16", *AGENT, "--no-test",
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
    stop_and_resume(stopped, stop_after, "--no-test")
    assert_same_runs(data_dir, stopped)


def test_a_run_goes_on_with_its_bars_while_new_ones_come(trained, tmp_path):
    """Both trainings are stopped; then ten more days are in the folder, and both end as if they were not."""
    whole = trained[0]
    data_dir = copy_market(whole, tmp_path / "data")
    with Script([ROOT / "feature_reducer.py", "--data-dir", data_dir, *WINDOW, *REDUCER]) as process:
        assert any(line.startswith("epoch   1") for line in process.stdout)
        process.send_signal(signal.SIGTERM)
    make_market(data_dir, "--days", "120")
    run("feature_reducer.py", data_dir, *WINDOW, *REDUCER, "--resume")
    first, second = (load(folder / "checkpoints" / "feature_reducer.pt") for folder in (whole, data_dir))
    assert same_tensors(first["reducer"], second["reducer"])

    old = copy_market(whole, tmp_path / "old")
    (old / "checkpoints").mkdir()
    shutil.copy(whole / "checkpoints" / "feature_reducer.pt", old / "checkpoints")
    with Script([ROOT / "train.py", "--data-dir", old, *AGENT]) as process:
        assert any(line.startswith("batch     1/4") for line in process.stdout)
        process.send_signal(signal.SIGTERM)
    make_market(old, "--days", "120")
    run("train.py", old, *AGENT, "--resume", "--no-test")
    assert_same_runs(whole, old)


def test_a_closed_terminal_saves_and_a_resume_goes_on_for_longer(trained, tmp_path):
    """The kernel sends SIGHUP, and what is written to is gone; then with twice the batches."""
    data_dir = shutil.copytree(trained[0], tmp_path / "data")
    (data_dir / "checkpoints" / "last.pt").unlink()
    child, terminal = pty.fork()
    if not child:
        os.environ["OMP_NUM_THREADS"] = "1"
        command = [sys.executable, "-u", str(ROOT / "train.py"), "--data-dir", str(data_dir), *AGENT]
        os.execv(sys.executable, [*command, "--run", "hung", "--no-test", "--save-every", "100"])
    with open(terminal, "rb", buffering=0) as output:
        seen = b""
        while b"batch     1/4" not in seen:
            seen += output.read(4096)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 129
    last = load(data_dir / "checkpoints" / "last.pt")["progress"]
    assert 0 < last.batch < 4
    flags = (*AGENT, "--run", "hung", "--no-test", "--resume", "--batches")
    printed = run("train.py", data_dir, *flags, "8").stdout
    assert "batches: 8 instead of 4; learning rates" in printed
    log = pd.read_csv(data_dir / "runs" / "hung" / "metrics.csv")
    assert log["step"].tolist() == list(range(1, 9))
    assert log["epsilon"][7] == pytest.approx(train.EPSILON_END)
    assert log["epsilon"][last.batch] > train.EPSILON_END
    refused = run("train.py", data_dir, *flags, "6", code=1).stderr
    assert "BATCHES = 8" in refused
    run("train.py", data_dir, *flags, "9")
    trials = pd.read_csv(data_dir / "runs" / "trials.csv")
    assert (trials["run"] == "hung").sum() == 2  # it had ended, and could be looked at


def test_half_precision_resumes_exactly_with_its_loss_scale(market_dir, tmp_path):
    """float16 on the CPU, from a scale at which the first steps overflow: it must come back. With Adam."""
    flags = (*WINDOW, "--hidden-dim", "34", "--latent-dim", "16", "--amp", "on", "--patience", "1",
             "--encoder-optimizer", "adam", "--reconstruction-share", "3000")  # fmt: skip
    whole, stopped = (
        copy_market(market_dir, tmp_path / "whole"),
        copy_market(market_dir, tmp_path / "stopped"),
    )
    run("train.py", whole, *AGENT, *flags, "--no-test")
    last = load(whole / "checkpoints" / "last.pt")
    assert last["scaler"]["scale"] != torch.amp.GradScaler("cpu").get_scale()
    assert last["progress"].rate_factor < 1  # the plateau halved it
    stop_and_resume(stopped, "batch     2/4", *flags, "--no-test", sent=signal.SIGINT)
    assert_same_runs(whole, stopped)


def test_a_batch_that_moves_the_policy_far_beyond_the_bound_halves_the_rates(market_dir, tmp_path):
    """A bound that each exceeds, down to a 32nd; one that none reaches."""
    flags = (*WINDOW, "--hidden-dim", "34", "--latent-dim", "16", *AGENT, "--pretrain-epochs", "0",
             "--batches", "7", "--validate-every", "0", "--no-test")  # fmt: skip
    for bound, factors in (("1e-9", [1, 1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 32]), ("1e9", [1] * 7)):
        data_dir = copy_market(market_dir, tmp_path / bound)
        run("train.py", data_dir, *flags, "--target-kl", bound)
        log = pd.read_csv(data_dir / "runs" / "tiny" / "metrics.csv")
        rates = [train.POLICY_RATE * train.cosine(batch / 7) * factor for batch, factor in enumerate(factors)]
        small = train.SMALL["POLICY_RATE"] / train.POLICY_RATE  # the scale without a GPU
        np.testing.assert_allclose(log["policy_rate"], np.multiply(rates, small), rtol=1e-6)


def test_training_goes_back_to_the_best_agent_at_half_the_rates_where_validation_falls(market_dir, tmp_path):
    """Steps so large that they destroy the pretrained agent: the rates by their formula, and the weights."""
    data_dir = copy_market(market_dir, tmp_path / "data")
    flags = (*WINDOW, "--hidden-dim", "34", "--latent-dim", "16", *AGENT, "--batches", "90", "--no-test",
             "--validate-every", "1", "--policy-rate", "3.0", "--target-kl", "0",
             "--pretrain-noise", "0")  # fmt: skip
    with Script([ROOT / "train.py", "--data-dir", data_dir, *flags]) as process:
        lines = []
        for line in process.stdout:
            lines.append(line)
            if line.startswith("batch     8/90"):
                process.send_signal(signal.SIGTERM)
    assert process.returncode == 143
    batches = [line for line in lines if line.startswith("batch ")]
    fell = np.array([not line.rstrip().endswith("*") for line in batches])
    assert fell[-1]
    log = pd.read_csv(data_dir / "runs" / "tiny" / "metrics.csv")
    assert len(log) == len(batches) < 90
    done = np.arange(len(log)) / 90
    halved = np.maximum(0.5 ** np.concatenate([[0], fell.cumsum()[:-1]]), 1 / 32)
    assert halved[-1] == 1 / 32
    expected = 3.0 * halved * (0.1 + 0.9 * (1 + np.cos(np.pi * done)) / 2)
    np.testing.assert_allclose(log["policy_rate"], expected, rtol=1e-12)
    best, last = (load(data_dir / "checkpoints" / f"{name}.pt") for name in ("best", "last"))
    assert same_tensors((best["policy"], best["reducer"]), (last["policy"], last["reducer"]))


def test_the_reducer_resumes_exactly(market_dir, tmp_path):
    whole, halves = copy_market(market_dir, tmp_path / "whole"), copy_market(market_dir, tmp_path / "halves")
    common = (*WINDOW, *REDUCER, "--init", "random", "--learning-rate", "0.001", "--amp", "on")
    run("feature_reducer.py", whole, *common)
    for flags in (("--epochs", "1"), ("--epochs", "2", "--resume")):
        run("feature_reducer.py", halves, *common, *flags)
    refused = run(
        "feature_reducer.py", halves, *common, "--resume", "--batch-size", "32", "--seed", "1", code=1
    ).stderr
    assert "needs the constants of the stopped run, which had BATCH_SIZE = 64, SEED = 0" in refused
    for name in ("feature_reducer", "feature_reducer_last"):
        contents = [load(folder / "checkpoints" / f"{name}.pt") for folder in (whole, halves)]
        assert same_tensors(*contents), name
    log = pd.read_csv(halves / "runs" / "feature_reducer" / "metrics.csv")
    assert log["step"].tolist() == [1, 2]
    assert log["validation_mse"].iloc[1] < log["validation_mse"].iloc[0]  # reconstruction falls
    assert log.equals(pd.read_csv(whole / "runs" / "feature_reducer" / "metrics.csv"))


LEARNER = ("--window-bars", "1,1,6,4,1", "--hidden-dim", "48", "--latent-dim", "32", "--trunk", "32,24",
           "--token-width", "16", "--heads", "2", "--feed-forward", "32", "--blocks", "1",
           "--pretrain-epochs", "3", "--pretrain-steps", "50", "--pretrain-segments", "24",
           "--pretrain-decisions", "24", "--pretrain-policy-rate", "0.002",
           "--pretrain-random-encoder-rate", "0.001", "--batches", "2",
           "--num-envs", "4", "--steps", "32", "--hold", "6", "--minibatch", "64", "--rolling", "2",
           "--validate-every", "0", "--run", "tiny")  # fmt: skip


def leak_the_future(data_dir: Path) -> None:
    """Put what each coin will earn in the half hour from the next open in place of its 5m channels."""
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
    else:  # no skill, and little paid for trading: validation picks among noise, so not quite nothing
        for name, statistics in content["skill"].items():
            assert statistics["excess_low_bp_day"] < 0, name
            assert 1e4 * table[name]["cost_paid"] / table[name]["days"] < 40, name
        assert "lies above zero" not in printed


def test_nothing_of_the_test_split_reaches_what_is_trained_or_chosen(market_dir, tmp_path):
    """With noise for all features and prices from the test split on, every weight is the same to the bit."""
    clean, poisoned = (
        copy_market(market_dir, tmp_path / "clean"),
        copy_market(market_dir, tmp_path / "poisoned"),
    )
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


def test_compressed_latents_are_the_encoder_of_the_windows(trained, tmp_path):
    data_dir = shutil.copytree(trained[0], tmp_path / "data")
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
    np.testing.assert_allclose(
        latents.iloc[[0, 1_000, -1], 1:].to_numpy(np.float16), expected, rtol=2**-10, atol=1e-6
    )
    assert latents["close_time"].iloc[-1] == pd.Timestamp(windows.times[-1], unit="ms", tz="UTC")
    footer = getData.read_footer(data_dir / "latents.parquet")
    assert (footer["checkpoint"], footer["run"]) == ("feature_reducer.pt", "")
    assert footer["source"] == saved["market"]["source"]

    run("feature_reducer.py", data_dir, "--job", "compress", "--checkpoint", "best.pt")
    saved = load(data_dir / "checkpoints" / "best.pt")
    assert getData.read_footer(data_dir / "latents.parquet")["run"] == saved["run"]
    with torch.no_grad():
        expected = feature_reducer.reducer_from_checkpoint(saved, "cpu").encoder(windows(rows)).half().numpy()
    latents = pd.read_parquet(data_dir / "latents.parquet")
    np.testing.assert_allclose(
        latents.iloc[[0, 1_000, -1], 1:].to_numpy(np.float16), expected, rtol=2**-10, atol=1e-6
    )

    old = (data_dir / "latents.parquet").read_bytes()
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (len(old) // 2, resource.RLIM_INFINITY))
    command = [
        sys.executable,
        str(ROOT / "feature_reducer.py"),
        "--data-dir",
        str(data_dir),
        "--job",
        "compress",
    ]
    result = subprocess.run(command, capture_output=True, text=True, preexec_fn=limit)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith(f"error: cannot write {data_dir / 'latents.parquet'}")
    assert (data_dir / "latents.parquet").read_bytes() == old
    assert not list(data_dir.glob("*.tmp"))


def test_no_data_makes_a_synthetic_market_first(tmp_path):
    """As on a fresh machine, but with windows, network and run cut down to seconds."""
    result = run("train.py", tmp_path / "data", *WINDOW, "--hidden-dim", "34", "--latent-dim", "16", *AGENT,
                 "--pretrain-epochs", "0", "--batches", "1", "--no-test")  # fmt: skip
    assert "synthetic" in result.stdout
    assert "scale: small" in result.stdout
    assert (tmp_path / "data" / "ohlcv" / "BTCUSDT.parquet").exists()
    assert (tmp_path / "data" / "checkpoints" / "best.pt").exists()


def test_the_interval_between_decisions_is_chosen_by_validation(market_dir, tmp_path):
    """Each candidate is a trial; the best one is used from then on; a stop in between changes nothing.

    A candidate whose segments are longer than the training split is left out.
    """
    flags = (*WINDOW, "--hidden-dim", "34", "--latent-dim", "16", "--hold", "0", "--probe-epochs", "2")
    flags += ("--holds", "2,30,3,9000")
    whole, stopped = (copy_market(market_dir, tmp_path / name) for name in ("whole", "stopped"))
    printed = run("train.py", whole, *AGENT, *flags).stdout
    assert "too little history for decisions every 9000 bars" in printed
    found = re.findall(r"decisions every (\d+) bars: validation ([-+.\d]+)", printed)
    probes = {int(bars): float(value) for bars, value in found}
    assert list(probes) == [2, 30, 3]
    best = max(probes, key=probes.__getitem__)
    progress = load(whole / "checkpoints" / "last.pt")["progress"]
    assert load(whole / "checkpoints" / "best.pt")["hold_bars"] == progress.hold_bars == best
    assert {int(bars): round(value, 1) for bars, value in progress.probes.items()} == probes
    trials = pd.read_csv(whole / "runs" / "trials.csv").set_index("run")
    for bars, value in probes.items():
        row = trials.loc[f"tiny (HOLD {bars})"]
        assert row["validation_bp_day"] == pytest.approx(value, abs=0.06)
        assert json.loads(row["changed"])["HOLD"] == bars
    content = metrics_of(whole)
    assert content["skill"]["agent (best)"]["trials"] == 4
    assert 0 <= content["skill"]["agent (best)"]["deflated_sharpe"] <= 1
    assert content["decides every"].startswith(f"{5 * best} minutes (chosen by validation")

    stop_and_resume(stopped, "decisions every 30", *flags)
    assert_same_runs(whole, stopped)


def test_an_agent_gives_no_orders_between_its_decisions(trained):
    """The account of the test split again: a trade at every 12th bar, and drift alone in between."""
    data_dir, _ = trained
    with put_back(train):
        train.DATA_DIR = data_dir
        setup, _ = train.open_agent(torch.device("cpu"), False)
    result = train.backtest_agent(setup, "test")
    decides = np.arange(len(result.rows)) % 12 == 0
    assert (result.turnover[~decides] == 0).all()
    assert (result.turnover[decides] > 0).all()
    np.testing.assert_array_equal(result.weights[~decides], result.before[~decides])
    # what it wants depends on what it holds at the close of the bar before the fill
    held = np.eye(4)[0]
    opens, closes = setup.prices
    for step, row in list(enumerate(result.rows[:100]))[::12]:
        tokens = train.encode(setup.policy, setup.reducer, setup.windows, torch.tensor([row]), 64)
        target = train.decide(setup.policy, tokens, torch.from_numpy(held[None]))[0].numpy()
        np.testing.assert_allclose(result.weights[step], target, atol=1e-5)
        held = target * np.concatenate([[1.0], closes[row + 12] / opens[row + 1]])
        held /= held.sum()


def test_untying_in_the_middle_of_a_run_resumes_exactly(market_dir, tmp_path):
    """Tied while it pretrains, dense from then on: stopped before and after, the end is the same."""
    flags = (*WINDOW, "--hidden-dim", "34", "--latent-dim", "16", "--tie-coins", "pretrain", "--no-test")
    whole = copy_market(market_dir, tmp_path / "whole")
    run("train.py", whole, *flags, *AGENT)
    ties = [load(whole / "checkpoints" / f"{name}.pt")["coins"] for name in ("pretrained", "best", "final")]
    assert ties == [3, None, None]
    for stop_after in ("pretrain  2/2", "batch     1/4"):
        stopped = copy_market(market_dir, tmp_path / stop_after[:5])
        stop_and_resume(stopped, stop_after, *flags)
        assert_same_runs(whole, stopped)


@pytest.mark.parametrize(("symbols", "days"), [(1, 110), (100, 62)])
def test_one_coin_and_a_hundred_go_through(tmp_path, symbols, days):
    names = ",".join(f"C{number}USDT" for number in range(symbols))
    short = ("--purge-days", "3", "--days", str(days)) if symbols > 1 else ("--days", str(days))
    run("getData.py", tmp_path, "--source", "synthetic", "--symbols", names, *short)
    wide = ("--hidden-dim", str(4 * symbols + 4), "--latent-dim", str(2 * symbols + 2))
    flags = (
        "--window-bars",
        "2,1,1,1,1",
        *wide,
        "--trunk",
        f"{2 * symbols + 8},{2 * symbols + 8}",
        "--batches",
        "1",
    )
    run("train.py", tmp_path, *AGENT, *flags)
    table = metrics_of(tmp_path)["test"]
    assert all(value is not None for value in table["agent (best)"].values())
    assert load(tmp_path / "checkpoints" / "best.pt")["policy_shape"]["assets"] == symbols + 1


def test_a_frozen_encoder_stays_as_it_is(trained, tmp_path):
    data_dir = shutil.copytree(trained[0], tmp_path / "data")
    run("train.py", data_dir, *AGENT, "--no-train-encoder", "--no-test")
    saved = load(data_dir / "checkpoints" / "final.pt")
    reducer = load(data_dir / "checkpoints" / "feature_reducer.pt")
    assert same_tensors(saved["reducer"], reducer["reducer"])
    learnt = load(trained[0] / "checkpoints" / "final.pt")
    assert not same_tensors(learnt["reducer"], reducer["reducer"])


def test_the_agent_never_sees_the_future(trained):
    """Targets of the trained agent before a moment do not depend on any feature or price after it."""
    data_dir, _ = trained
    saved = load(data_dir / "checkpoints" / "best.pt")
    frames, footer = getData.load_features(data_dir)
    policy = train.ActorCritic(16, **saved["policy_shape"])
    policy.load_state_dict(saved["policy"])
    reducer = feature_reducer.reducer_from_checkpoint(saved, "cpu")
    prices, _ = getData.load_prices(data_dir)
    opens, closes = (
        prices[[f"{s}.{kind}" for s in footer["symbols"]]].to_numpy() for kind in ("open", "close")
    )
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
        windows = feature_reducer.FeatureWindows(
            changed, saved["window_bars"], normalisation=saved["normalisation"]
        )
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


def test_everything_about_a_planted_market_says_that_it_is_not_real(trained, market_dir, tmp_path):
    source = str(market_dir / "ohlcv")
    run("getData.py", tmp_path, "--source", source, "--symbols", COINS, "--plant", "0.3")
    mark = "NOT REAL: a drift of strength 0.3 was planted into recorded bars"
    market = f"planted:strength=0.3,seed=0 on recorded:{source} ({mark})"
    assert f"market: {market}" in run("feature_reducer.py", tmp_path, *WINDOW, *REDUCER).stdout
    printed = run("train.py", tmp_path, *AGENT).stdout
    assert f"market: {market}" in printed
    assert f"{mark}. agent (best): " in printed
    assert pd.read_csv(tmp_path / "runs" / "trials.csv")["market"].tolist() == [market]
    assert f"UTC, {market}, cost" in run("portfolio_env.py", tmp_path).stdout
    for report in ("tiny", "baselines-test"):
        assert metrics_of(tmp_path, report)["market"] == market
        page = (tmp_path / "reports" / report / "report.html").read_text()
        assert page.count(mark) >= 3  # the market's name, the verdict, and the caveat
    now = run("train.py", tmp_path, "--job", "signal", "--max-age", "2000000000").stdout
    assert f" UTC, {market}\n" in now
    assert json.loads(now.splitlines()[-1])["market"] == market

    # a market of its own: what was trained elsewhere is not trained on here, but can be evaluated
    shutil.copy(trained[0] / "checkpoints" / "feature_reducer.pt", tmp_path / "checkpoints")
    refused = run("train.py", tmp_path, *AGENT, code=1).stderr
    assert "the checkpoint was trained on source synthetic:" in refused
    elsewhere = ("--job", "evaluate", "--checkpoint", str(trained[0] / "checkpoints" / "best.pt"))
    assert mark in run("train.py", tmp_path, *elsewhere).stdout


@pytest.mark.skipif(not REAL_BARS.exists(), reason="no recorded bars beside the project")
def test_recorded_bars_go_through(tmp_path):
    bars = tmp_path / "bars"  # the first 130 days are enough for the tiny windows
    bars.mkdir()
    for symbol in ("BTCUSDT", "ETHUSDT", "TRXUSDT"):
        pd.read_parquet(REAL_BARS / f"{symbol}.parquet").head(130 * 288).to_parquet(
            bars / f"{symbol}.parquet"
        )
    run("getData.py", tmp_path, "--source", str(bars), "--symbols", "BTCUSDT,ETHUSDT,TRXUSDT")
    run("feature_reducer.py", tmp_path, *WINDOW, *REDUCER)
    printed = run("train.py", tmp_path, *AGENT).stdout
    assert "recorded:" in printed
    table = json.loads((tmp_path / "reports" / "tiny" / "metrics.json").read_text())["test"]
    assert all(
        np.isfinite(list(row.values())).all() for name, row in table.items() if name.startswith("agent")
    )
