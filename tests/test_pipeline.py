"""What the scripts promise, run as a user runs them at a tiny size: files, figures, resume, causality."""

import base64
import html
import json
import os
import pty
import re
import resource
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pytest
import torch
from conftest import (
    AGENT,
    ALONE,
    COINS,
    REAL_BARS,
    REDUCER,
    ROOT,
    WINDOW,
    assert_same_runs,
    copy_market,
    copy_reducer,
    headline,
    killed_runs,
    load,
    make_market,
    metrics_of,
    open_agent,
    put_back,
    refusal,
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
import planted_rules

# ------------------------------------------------------------------------------------------ files and figures


def test_the_pipeline_leaves_what_it_promises(trained):
    data_dir, printed = trained
    assert {path.name for path in (data_dir / "checkpoints").glob("*.pt")} == {
        "feature_reducer.pt", "feature_reducer_last.pt", "pretrained.pt", "best.pt", "final.pt", "last.pt",
    }  # fmt: skip
    assert not list(data_dir.rglob("*.tmp"))
    reducer = load(data_dir / "checkpoints" / "feature_reducer.pt")
    for name in ("pretrained", "best", "final"):
        saved = load(data_dir / "checkpoints" / f"{name}.pt")
        assert saved["policy"]["blocks.0.linear1.weight"].shape == (32, 8)
        assert saved["market"]["symbols"] == reducer["market"]["symbols"]
        assert same_tensors(saved["normalisation"], reducer["normalisation"])
        for key, value in saved["reducer"].items():
            assert torch.isfinite(value).all()
            assert not torch.equal(value, reducer["reducer"][key]), f"{name}: {key} was not trained"
    log = pd.read_csv(data_dir / "runs" / "tiny" / "metrics.csv")
    assert log["step"].tolist() == [1, 2, 3, 4]
    promised = [
        "portfolio_value", "benchmark_value", "sharpe", "max_drawdown", "entropy", "advantage_mean",
        "advantage_std", "clip_fraction", "approx_kl", "explained_variance", "accuracy", "encoder_loss",
        "policy_loss", "critic_loss", "reconstruction_loss", "policy_grad_norm", "encoder_grad_norm",
        "loss_scale", "skipped_steps", "epsilon", "policy_rate", "encoder_rate", "encode_steps_per_second",
        "rollout_steps_per_second", "update_steps_per_second",
    ]  # fmt: skip
    assert np.isfinite(log[promised]).all(axis=None)
    assert log["epsilon"].iloc[[0, -1]].tolist() == pytest.approx([0.075, 0.02])
    assert log["validation_bp_day"].notna().tolist() == [False, True, False, True]
    assert list((data_dir / "runs" / "tiny").glob("events.out.tfevents.*"))
    assert "agent (best" in printed
    lines = [line.split(": ")[0].split("  ")[0] for line in printed.splitlines()]
    assert lines.index("decisions") < lines.index("time") <= lines.index("pretrain") + 2  # after four steps


def test_the_report_is_what_the_accounting_says(trained):
    """The table's rows again, from the bars: benchmark, hold and costs."""
    data_dir, _ = trained
    table = metrics_of(data_dir)["test"]
    prices, footer = getData.load_prices(data_dir)
    opens = prices[[f"{symbol}.open" for symbol in footer["symbols"]]].to_numpy()
    times, (start, end) = prices.index.as_unit("ms").asi8, footer["splits"]["test"]
    # the last two have no fill or no price to hold to
    rows = np.flatnonzero((times >= start) & (times < end))[:-2]
    held = np.log((opens[rows[-1] + 2] / opens[rows[0] + 1]).mean())
    assert table["equal-weight hold"]["growth"] == pytest.approx(held + np.log(1 - 0.001), abs=1e-9)
    assert table["cash"]["growth"] == 0
    days = len(rows) / 288
    for name, row in table.items():
        assert row["excess_bp_day"] == pytest.approx(1e4 * (row["growth"] - held) / days, abs=1e-6), name
        cost = 0.001 * row["turnover_day"] * days
        assert row["cost_paid"] == pytest.approx(cost, rel=2e-3, abs=1e-12), name


def test_the_page_opens_offline_and_shows_the_numbers(trained):
    folder, printed = trained[0] / "reports" / "tiny", trained[1]
    files = {"report.html", "metrics.json", "series.parquet", "trades.csv", "importance.csv"}
    assert {path.name for path in folder.iterdir()} == files
    content = json.loads((folder / "metrics.json").read_text(), parse_constant=pytest.fail)
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "src=" not in "".join(re.findall("<script[^>]*>", page))  # all code is in the page
    page = re.sub("<script.*?</script>", "", page, flags=re.S)
    assert not re.search(r"url\(|@import|<(link|iframe|object|base)\b", page)
    opened = []
    for end, tag in re.findall(r"<(/?)(\w+)", page):
        if end:
            assert opened.pop() == tag
        elif tag not in ("meta", "img", "br"):
            opened.append(tag)
    assert opened == []
    for loaded in re.findall(r"""\s(?:src|href|srcset|data)=["']?([^"'\s>]*)""", page):
        assert base64.b64decode(loaded.removeprefix("data:image/png;base64,")).startswith(b"\x89PNG")
    texts = [html.unescape(text) for text in re.split("<[^>]*>", page)]
    cells = set(texts)
    for name, skill in content["skill"].items():
        row = content["test"][name]
        growth, drawdown = f"{row['growth_bp_day']:+.1f}", f"{row['max_drawdown']:.1%}"
        probability = f"{skill['probabilistic_sharpe']:.1%}"
        assert {name, growth, drawdown, f"{row['sharpe']:+.2f}", probability, "– to –"} <= cells
        assert skill["excess_low_bp_day"] is None  # the split is three days
        assert skill["deflated_sharpe"] == skill["probabilistic_sharpe"]  # one trial
        assert skill["trials"] == 1
        assert skill["excess_bp_day"] == pytest.approx(row["excess_bp_day"], rel=1e-9)
        sentence = next(text for text in texts if text.startswith(f"{name}: "))
        assert "Nothing can be said about skill." in sentence
        assert sentence in printed
    assert list(content["reconstruction"]) == ["train split", "test split"]
    assert content["these bars are"] == "out of sample"
    assert {f"{row['mse']:.4f}" for row in content["reconstruction"].values()} <= cells
    assert {"explained variance 1d", "over benchmark"} <= cells  # the notes


def test_compressed_latents_are_the_encoder_of_the_windows(trained, tmp_path):
    data_dir = shutil.copytree(trained[0], tmp_path / "data")
    target, run_name = data_dir / "latents.parquet", load(data_dir / "checkpoints" / "best.pt")["run"]
    for checkpoint, name in (("feature_reducer.pt", ""), ("best.pt", run_name)):
        run("feature_reducer.py", data_dir, "--job", "compress", "--checkpoint", checkpoint)
        latents, footer = pd.read_parquet(target), getData.read_footer(target)
        saved = load(data_dir / "checkpoints" / checkpoint)
        reducer = feature_reducer.reducer_from_checkpoint(saved, "cpu")
        windows, _ = feature_reducer.load_windows(data_dir, saved["window_bars"], torch.device("cpu"), saved)
        assert latents.shape == (windows.valid.sum(), 1 + 16)
        chosen = [0, 1_000, -1]
        with torch.no_grad():
            expected = reducer.encoder(windows(torch.from_numpy(np.flatnonzero(windows.valid)[chosen])))
        assert target.stat().st_size < 2 * 16 * len(latents)
        # float16 has 11 bits; the shape of a batch may change the last one
        values = latents.iloc[chosen, 1:].to_numpy(np.float16)
        np.testing.assert_allclose(values, expected.half().numpy(), rtol=2**-10, atol=1e-6)
        assert latents["close_time"].iloc[-1] == pd.Timestamp(windows.times[-1], unit="ms", tz="UTC")
        assert (footer["checkpoint"], footer["run"]) == (checkpoint, name)
        assert footer["source"] == saved["market"]["source"]

    old, limits = target.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(old) // 2, limits[1]))  # stands for a full disk
    try:
        assert str(target) in refusal("feature_reducer.py", data_dir, "--job", "compress")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert target.read_bytes() == old
    assert not list(data_dir.glob("*.tmp"))


def test_everything_about_a_planted_market_says_that_it_is_not_real(trained, tmp_path):
    source = str(trained[0] / "ohlcv")
    run("getData.py", tmp_path, "--source", source, "--symbols", COINS, "--plant", "0.3")
    mark = "NOT REAL: a drift of strength 0.3 was planted into recorded bars"
    market = f"planted:strength=0.3,seed=0 on recorded:{source} ({mark})"
    assert f"market: {market}" in run("feature_reducer.py", tmp_path, *WINDOW, *REDUCER).stdout
    printed = run("train.py", tmp_path, *AGENT).stdout
    assert f"market: {market}" in printed
    assert f"\n{mark}.\n" in printed
    assert pd.read_csv(tmp_path / "runs" / "trials.csv")["market"].tolist() == [market]
    assert f"test: {market}; " in run("portfolio_env.py", tmp_path).stdout
    for report in ("tiny", "baselines-test"):
        assert metrics_of(tmp_path, report)["market"] == market
        page = (tmp_path / "reports" / report / "report.html").read_text()
        assert page.count(mark) >= 3  # the market's name, the verdict, and the caveat
    now = run("train.py", tmp_path, "--job", "signal", "--max-age", "2000000000").stdout
    assert now.startswith(mark)
    assert f" UTC, {market}\n" in now
    assert json.loads(now.splitlines()[-1])["market"] == market
    # its agent on bars that pass for real
    other = tmp_path / "real"
    run("getData.py", other, "--source", source, "--symbols", COINS)
    agent = ("--checkpoint", tmp_path / "checkpoints" / "best.pt")
    first = f"TRAINED ON PLANTED BARS, NOT ON THIS MARKET: {market}"
    now = run("train.py", other, "--job", "signal", "--max-age", "2000000000", *agent).stdout
    assert now.startswith(first)
    assert json.loads(now.splitlines()[-1])["trained_on"] == market
    assert f"\n{first}.\n" in run("train.py", other, "--job", "evaluate", *agent).stdout
    assert metrics_of(other, "tiny-best-test")["trained on"] == market
    page = (other / "reports" / "tiny-best-test" / "report.html").read_text()
    assert page.split('class="verdict">')[1].lstrip().startswith(f"<p>{first}")
    # a market of its own: what was trained elsewhere is not trained on here
    shutil.copy(trained[0] / "checkpoints" / "feature_reducer.pt", tmp_path / "checkpoints")
    assert "trained on synthetic:" in refusal("train.py", tmp_path, *AGENT)


@pytest.mark.skipif(not REAL_BARS.exists(), reason="no recorded bars beside the project")
def test_recorded_bars_go_through(tmp_path):
    symbols, data_dir = ("BTCUSDT", "ETHUSDT", "TRXUSDT"), tmp_path / "data"
    for name in (f"{symbol}.parquet" for symbol in symbols):  # 130 days are enough for the tiny windows
        pd.read_parquet(REAL_BARS / name).head(130 * 288).to_parquet(tmp_path / name)
    run("getData.py", data_dir, "--source", tmp_path, "--symbols", ",".join(symbols))
    run("feature_reducer.py", data_dir, *WINDOW, *REDUCER)
    assert "recorded:" in run("train.py", data_dir, *AGENT).stdout
    table = metrics_of(data_dir)["test"]
    assert np.isfinite([list(row.values()) for name, row in table.items() if name.startswith("agent")]).all()


def test_no_data_makes_a_synthetic_market_first(tmp_path, monkeypatch):
    """As on a fresh machine, but with market, windows, network and run cut down to seconds."""
    monkeypatch.setattr(getData, "DAYS", 110)
    monkeypatch.setattr(getData, "SYMBOLS", tuple(COINS.split(",")))
    printed = run("train.py", tmp_path, *ALONE, "--pretrain-epochs", "0", "--batches", "1").stdout
    assert "synthetic" in printed
    assert "scale: small" in printed
    assert (tmp_path / "ohlcv" / "BTCUSDT.parquet").exists()
    assert (tmp_path / "checkpoints" / "best.pt").exists()


@pytest.mark.parametrize("symbols", [1, 25])
def test_one_coin_and_many_go_through(tmp_path, symbols):
    names = ",".join(f"C{number}USDT" for number in range(symbols))
    short = ("--days", "62", "--purge-days", "3")
    run("getData.py", tmp_path, "--source", "synthetic", "--symbols", names, *short)
    flags = ("--window-bars", "2,1,1,1,1", "--hidden-dim", 4 * symbols + 4, "--latent-dim", 2 * symbols + 2)
    trunk = ("--trunk", f"{2 * symbols + 8},{2 * symbols + 8}")
    run("train.py", tmp_path, *AGENT, *flags, *trunk, "--batches", "1")
    assert None not in headline(metrics_of(tmp_path), "test").values()
    assert load(tmp_path / "checkpoints" / "best.pt")["policy_shape"]["assets"] == symbols + 1


# ------------------------------------------------------------------------ stop and resume, and learning rates


def test_a_run_stopped_at_four_places_equals_the_uninterrupted_one(trained, tmp_path):
    """At each it goes on with its own bars, though ten more days have come into the folder meanwhile."""
    stopped = copy_reducer(trained[0], tmp_path / "data")
    places = ["pretrain  1/2", "pretrain  2/2", "batch     1/4", "batch     3/4"]
    longer = lambda: make_market(stopped, "--days", "120")  # noqa: E731
    stop_and_resume(stopped, places, *AGENT, "--no-test", after_first=longer)
    assert_same_runs(trained[0], stopped)


def test_a_run_killed_in_pretraining_while_saving_and_online_equals_the_uninterrupted_one(trained, tmp_path):
    killed = copy_reducer(trained[0], tmp_path / "data")
    killed_runs("train.py", killed, ["pretrain  1/2", "last.pt.tmp", "batch     3/4"], *AGENT, "--no-test")
    assert_same_runs(trained[0], killed)


def test_half_precision_and_the_choice_of_hold_resume_exactly(market_dir, tmp_path):
    """float16 on the CPU, from a scale at which the first steps overflow: it must come back.
    Each interval between decisions is a trial; two go on after one epoch, and the one that validates best
    after three. One whose segments are longer than the training split is left out.
    """
    flags = (*ALONE, "--hold", "0", "--holds", "2,30,3,9000", "--amp", "on", "--patience", "1",
             "--reconstruction-share", "3000", "--pretrain-epochs", "6")  # fmt: skip
    whole, stopped, killed = (copy_market(market_dir, tmp_path / name) for name in ("a", "b", "c"))
    printed = run("train.py", whole, *flags, "--test").stdout
    last = load(whole / "checkpoints" / "last.pt")
    progress, probes = last["progress"], last["progress"].probes
    assert last["scaler"]["scale"] != torch.amp.GradScaler("cpu").get_scale()
    assert progress.halvings > 0  # of the plateau
    assert list(probes) == ["2", "30", "3"]
    first, second = sorted(probes, key=lambda bars: -probes[bars][0])[:2]
    assert {bars: len(values) for bars, values in probes.items()} == {
        **dict.fromkeys(probes, 1),
        first: 2,
        second: 2,
    }
    best = max((first, second), key=lambda bars: probes[bars][1])
    assert load(whole / "checkpoints" / "best.pt")["hold_bars"] == progress.hold_bars == int(best)
    trials = pd.read_csv(whole / "runs" / "trials.csv").set_index("run")
    log = pd.read_csv(whole / "runs" / "tiny" / "pretrain" / "metrics.csv")
    assert log["step"].tolist() == list(range(1, len(log) + 1))
    assert log["validation_bp_day"][0] == pytest.approx(probes[best][0], rel=1e-9)
    assert len(log) > 4
    for bars, (*_, value) in probes.items():
        assert re.search(rf"every {bars} bars: .* {re.escape(f'{value:+.1f}')} ", printed)
        row = trials.loc[f"tiny (HOLD {bars})"]
        assert row["validation_bp_day"] == pytest.approx(value)
        assert json.loads(row["changed"])["HOLD"] == int(bars)
    content = metrics_of(whole)
    assert headline(content)["trials"] == 4
    assert content["decides every"].startswith(f"{5 * progress.hold_bars} minutes (chosen by validation")

    places = [
        "pretrain  1/6  every 30",
        "decisions every 30",
        f"pretrain  3/6  every {first}",
        "batch     2/4",
    ]
    stop_and_resume(stopped, places, *flags, sent=signal.SIGINT)
    killed_runs(
        "train.py", killed, [f"pretrain  2/6  every {second}", "last.pt.tmp", "batch     2/4"], *flags
    )
    for data_dir in (stopped, killed):
        assert_same_runs(whole, data_dir)
        assert not any(data_dir.rglob("hold-*"))


def test_a_sweep_that_was_added_is_kept_by_a_resume(market_dir, tmp_path, monkeypatch):
    """One sweep over the decisions is too few."""
    monkeypatch.setattr(train, "_UNSETTLED", 1e-4)
    whole, stopped = (copy_market(market_dir, tmp_path / name) for name in ("whole", "stopped"))
    flags = (*ALONE, "--sweeps", "1", "--pretrain-epochs", "3")
    run("train.py", whole, *flags)
    assert load(whole / "checkpoints" / "last.pt")["progress"].sweeps == 2
    unsettled = pd.read_csv(whole / "runs" / "tiny" / "pretrain" / "metrics.csv")["unsettled"]
    assert unsettled[0] > 1e-4 > unsettled[1] > 0
    stop_and_resume(stopped, ["pretrain  1/3", "batch     2/4"], *flags)
    assert_same_runs(whole, stopped)


def test_pretraining_ends_where_validation_does_not_improve(market_dir, tmp_path, monkeypatch):
    """Steps too small to change a weight: the first epoch is the best."""
    monkeypatch.setattr(train, "_PRETRAIN_PATIENCE", 2)
    data_dir = copy_market(market_dir, tmp_path / "data")
    rates = "--pretrain-policy-rate", "1e-30", "--pretrain-encoder-rate", "1e-30,1e-30"
    run("train.py", data_dir, *ALONE, *rates, "--pretrain-epochs", "9", "--batches", "0")
    log = pd.read_csv(data_dir / "runs" / "tiny" / "pretrain" / "metrics.csv")
    assert log["step"].tolist() == [1, 2, 3]


def test_bars_after_the_training_split_change_nothing_that_is_learnt(market_dir, tmp_path):
    """What crosses into other splits would be an outcome. One epoch: validation has nothing to choose."""
    noise, rng = copy_market(market_dir, tmp_path / "noise"), np.random.default_rng(0)
    _, footer = getData.load_prices(noise)
    boundary = footer["splits"]["train"][1]  # decisions are before it, closes of bars
    for symbol in footer["symbols"]:
        bars, about = (
            read(noise / "ohlcv" / f"{symbol}.parquet") for read in (getData.read_frame, getData.read_footer)
        )
        later = bars["timestamp"].astype("int64") + getData.BAR_MS >= boundary
        walk = np.exp(0.003 * rng.normal(size=later.sum())).cumprod()[:, None]
        bars.loc[later, ["open", "high", "low", "close"]] *= walk
        getData.store_bars(noise, symbol, bars, about["source"], about["command"])
    run("getData.py", noise, "--job", "features", "--symbols", COINS, "--purge-days", "9")
    agents = []
    for data_dir in (copy_market(market_dir, tmp_path / "market"), noise):
        run("train.py", data_dir, *ALONE, "--pretrain-epochs", "1", "--hold", "288", "--steps", "8")
        agents.append(load(data_dir / "checkpoints" / "tiny" / "last.pt"))
    assert agents[0]["market"]["splits"] == agents[1]["market"]["splits"]
    assert agents[0]["market"]["inputs"] != agents[1]["market"]["inputs"]
    assert all(
        same_tensors(*(agent[part] for agent in agents)) for part in ("policy", "reducer", "optimizers")
    )
    assert same_tensors(*(agent["normalisation"] for agent in agents))


def test_the_reducer_resumes_exactly_while_new_bars_come(market_dir, tmp_path):
    whole, halves = (copy_market(market_dir, tmp_path / name) for name in ("whole", "halves"))
    common = (*WINDOW, *REDUCER, "--init", "random", "--learning-rate", "0.001", "--amp", "on")
    run("feature_reducer.py", whole, *common)
    run("feature_reducer.py", halves, *common, "--epochs", "1")
    make_market(halves, "--days", "120")
    line = refusal("feature_reducer.py", halves, *common, "--resume", "--batch-size", "32", "--seed", "1")
    assert all(value in line for value in ("BATCH_SIZE=64", "SEED=0"))
    run("feature_reducer.py", halves, "--epochs", "2", "--resume")
    for name in ("feature_reducer", "feature_reducer_last"):
        contents = [load(folder / "checkpoints" / f"{name}.pt") for folder in (whole, halves)]
        assert same_tensors(*contents), name
    path = "runs/feature_reducer/metrics.csv"
    log, same = pd.read_csv(halves / path), pd.read_csv(whole / path)
    assert log["step"].tolist() == [1, 2]
    assert log["validation_mse"].iloc[1] < log["validation_mse"].iloc[0]  # reconstruction falls
    assert log.equals(same)


def test_a_closed_terminal_saves_and_a_resume_goes_on_for_longer(trained, tmp_path):
    """The kernel sends SIGHUP, and what is written to is gone; then with twice the batches."""
    data_dir = shutil.copytree(trained[0], tmp_path / "data")
    (data_dir / "checkpoints" / "last.pt").unlink()
    flags = (*AGENT, "--run", "hung", "--no-test")
    terminal, other_end = pty.openpty()
    command = [ROOT / "train.py", "--data-dir", data_dir, *flags]
    with Script(command, log=os.ttyname(other_end), stop_at="batch     1/4", sent=signal.SIGSTOP) as process:
        while psutil.Process(process.pid).status() != psutil.STATUS_STOPPED:
            time.sleep(0.01)
        os.close(terminal)  # with SIGHUP the kernel sends SIGCONT
        assert process.wait(60) == 129
    os.close(other_end)
    assert load(data_dir / "checkpoints" / "last.pt")["progress"].batch == 1
    flags = ("--run", "hung", "--no-test", "--resume", "--batches")
    assert "batches: 8 instead of 4" in run("train.py", data_dir, *flags, "8").stdout
    log = pd.read_csv(data_dir / "runs" / "hung" / "metrics.csv")
    assert log["step"].tolist() == list(range(1, 9))
    assert train.EPSILON[1] == pytest.approx(log["epsilon"][7])
    assert log["epsilon"][7] < log["epsilon"][1]
    assert "BATCHES=8" in refusal("train.py", data_dir, *flags, "6")
    run("train.py", data_dir, *flags, "9")
    trials = pd.read_csv(data_dir / "runs" / "trials.csv")
    assert (trials["run"] == "hung").sum() == 2  # it had ended, and could be looked at


@pytest.mark.parametrize(("epochs", "first"), [("0", 1), ("1", 1 / 16)])
def test_steps_that_move_the_policy_too_far_become_smaller(market_dir, tmp_path, epochs, first):
    """A bound that each exceeds, one that none reaches, and none; after a pretraining the first is small."""
    flags = (*ALONE, "--pretrain-epochs", epochs, "--batches", "8", "--validate-every", "0")
    batches = np.arange(8)
    factors = {"1e-11": first * 1.5**-batches, "1e9": np.minimum(first * 1.5**batches, 1), "0": np.ones(8)}
    for bound, factor in factors.items():
        data_dir = copy_market(market_dir, tmp_path / bound)
        run("train.py", data_dir, *flags, "--target-kl", bound)
        log = pd.read_csv(data_dir / "runs" / "tiny" / "metrics.csv")
        rates = factor * (0.1 + 0.45 * (1 + np.cos(np.pi * batches / 8)))
        np.testing.assert_allclose(log["policy_rate"], train.POLICY_RATE.small * rates, rtol=1e-6)


def test_the_best_agent_survives_steps_that_destroy_it(market_dir, tmp_path):
    data_dir = copy_market(market_dir, tmp_path / "data")
    flags = (*ALONE, "--batches", "2", "--validate-every", "1", "--policy-rate", "3.0", "--target-kl", "0")
    printed = run("train.py", data_dir, *flags, "--pretrain-noise", "0").stdout
    assert not re.search(r"(?m)^batch .*\*$", printed)
    first, best, final = (
        (content["policy"], content["reducer"])
        for content in (
            load(data_dir / "checkpoints" / f"{name}.pt") for name in ("pretrained", "best", "final")
        )
    )
    assert same_tensors(first[1], best[1])
    assert not same_tensors(best, final)


def test_a_frozen_encoder_stays_as_it_is(trained, tmp_path):
    data_dir = copy_reducer(trained[0], tmp_path / "data")
    run("train.py", data_dir, *AGENT, "--batches", "1", "--no-test", "--no-train-encoder")
    before, after = (load(data_dir / "checkpoints" / f"{name}.pt") for name in ("feature_reducer", "final"))
    assert same_tensors(before["reducer"], after["reducer"])


# ----------------------------------------------------------------------------------------- what can be learnt

LEARNER = ("--window-bars", "1,1,6,4,1", "--hidden-dim", "48", "--latent-dim", "32", "--trunk", "32,24",
           "--token-width", "16", "--heads", "2", "--blocks", "1", "--pretrain-epochs", "3",
           "--pretrain-steps", "40", "--pretrain-segments", "48", "--pretrain-policy-rate", "0.003",
           "--pretrain-encoder-rate", "0.0001,0.0015", "--batches", "2", "--num-envs", "4", "--steps", "32",
           "--hold", "6", "--minibatch", "64", "--validate-every", "0", "--run", "tiny",
           "--no-test")  # fmt: skip


def judge(data_dir: Path, checkpoint: str = "best.pt", fee: float = 0.001) -> dict[str, float]:
    """The figures of an agent on the test split."""
    with put_back(train):
        train.FEE_RATE = fee
        result = train.backtest_agent(open_agent(data_dir, checkpoint), "test")
    sharpe = portfolio_env.sharpe_per_bar(portfolio_env.excess_returns(result))
    return portfolio_env.skill(result, [sharpe]) | portfolio_env.metrics(result)


def test_the_filter_that_knows_the_drift(tmp_path):
    """Its gain by hand for one coin."""
    # phi = 0.5, q = 0.75, R = 1: P' = 0.25 P' / (P' + 1) + 0.75 has the root sqrt(0.75), so K = 0.4641
    returns = np.random.default_rng(0).normal(size=(60, 1))
    means = planted_rules.kalman(returns, np.ones((60, 1)), 0.0, 1.0, 1.0)[:, 0]
    gains = (means[1:] - 0.5 * means[:-1]) / (returns[1:, 0] - 0.5 * means[:-1])
    assert gains[0] == pytest.approx(0.875 / 1.875)  # P' = 1, P = 0.5 in the first bar
    assert gains[-1] == pytest.approx(0.75**0.5 / (0.75**0.5 + 1))


@pytest.mark.parametrize("lives", [(), ("--births-and-deaths", "--absent", "allow", "--member-days", "3")])
def test_what_the_filter_earns_is_causal_and_that_of_the_account(lives, tmp_path):
    make_market(tmp_path, "--days", "72", "--purge-days", "3", *lives)
    market = planted_rules.Market(tmp_path)
    symbols, present = market.footer["symbols"], market.members
    bars = getData.load_bars(tmp_path, symbols, market.footer["max_gap"])
    drift = planted_rules.expected_drift(bars, 1.0, planted=True)
    changed = {symbol: frame.copy() for symbol, frame in bars.items()}
    changed[symbols[0]].iloc[12_000:, :4] *= 1.5
    again = planted_rules.expected_drift(changed, 1.0, planted=True)
    assert np.array_equal(drift[:12_000], again[:12_000])
    assert not np.allclose(drift[12_001:12_500], again[12_001:12_500])
    assert market.growth(drift, 0.3, "test") > 100
    start, stop = market.spans["test"]
    score = drift[start:stop] if present is None else np.where(present, drift, -np.inf)[start:stop]
    path = planted_rules.choices(score, 0.3)
    orders = {start + row: np.eye(4)[path[row]] for row in np.flatnonzero(np.diff(path, prepend=0))}
    trading = {"cost": 0.001, "present": present}
    result = portfolio_env.backtest(lambda row, _: orders.get(row), *market.prices, start, stop, **trading)
    growth = portfolio_env.metrics(result)["excess_bp_day"]
    assert market.path_growth(path, "test") == pytest.approx(growth)


def test_a_tiny_agent_beats_the_benchmark_on_a_planted_market(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "_PRETRAIN_DECISIONS", 8)  # of these markets they show enough
    make_market(tmp_path, "--days", "200", "--purge-days", "7")
    run("train.py", tmp_path, *LEARNER)
    agent = judge(tmp_path)
    market = planted_rules.Market(tmp_path)
    rule = market.growth(planted_rules.averages(market.prices[1], 24), 1.0, "test")
    assert agent["excess_bp_day"] > 0.6 * rule > 100
    assert agent["excess_low_bp_day"] > 0


def test_a_tiny_agent_without_signal_shows_no_skill_and_a_leak_is_an_alarm(tmp_path, monkeypatch):
    """The leak: what each coin will earn in the half hour from the next open in place of its 5m channels."""
    monkeypatch.setattr(train, "_PRETRAIN_DECISIONS", 8)
    make_market(tmp_path, "--days", "140", "--signal", "0")
    run("train.py", tmp_path, *LEARNER)
    # little is paid for trading; validation picks among noise, so not quite nothing
    for checkpoint in ("best.pt", "final.pt"):
        agent = judge(tmp_path, checkpoint)
        assert agent["excess_low_bp_day"] < 0, checkpoint
        assert 1e4 * agent["cost_paid"] / agent["days"] < 40, checkpoint

    path = tmp_path / "features" / "5m.parquet"
    footer, frame = getData.read_footer(path), pd.read_parquet(path)
    prices, _ = getData.load_prices(tmp_path)
    for symbol in footer["symbols"]:
        opens = prices[f"{symbol}.open"]
        leak = np.log(opens.shift(-7) / opens.shift(-1)).fillna(0.0).astype(np.float32)
        frame = frame.assign(**{f"{symbol}.{channel}": leak for channel in footer["channels"]})
    getData.write_parquet(path, frame, footer)
    # what half an hour brings is less than the usual fees
    run("train.py", tmp_path, *LEARNER, "--fee-rate", "0.0002")
    agent = judge(tmp_path, fee=0.0002)  # nothing honest earns this much
    assert agent["excess_bp_day"] > 300
    assert agent["sharpe"] > 30
    assert agent["excess_low_bp_day"] > 0
    assert agent["deflated_sharpe"] > 0.999


def test_nothing_of_the_test_split_reaches_what_is_trained_or_chosen(trained, tmp_path):
    """With noise for all features and prices from the test split on, every weight is the same to the bit."""
    poisoned = copy_market(trained[0], tmp_path / "data")
    rng = np.random.default_rng(0)
    for path in (poisoned / "features").glob("*.parquet"):
        frame, footer = pd.read_parquet(path), getData.read_footer(path)
        late = frame.index.as_unit("ms").asi8 >= footer["splits"]["test"][0]
        noise = rng.normal(size=(late.sum(), frame.shape[1]))
        frame.loc[late] = (np.exp(noise) if path.stem == "prices" else noise).astype(frame.dtypes.iloc[0])
        getData.write_parquet(path, frame, footer)
    run("feature_reducer.py", poisoned, *WINDOW, *REDUCER)
    run("train.py", poisoned, *AGENT, "--no-test")
    for name in ("feature_reducer", "pretrained", "best", "final"):
        contents = [load(folder / "checkpoints" / f"{name}.pt") for folder in (trained[0], poisoned)]
        assert same_tensors(*contents), name


def test_an_agent_gives_no_orders_between_its_decisions(trained):
    """The account of the test split again: a trade at every 12th bar, and drift alone in between."""
    setup = open_agent(trained[0])
    result = train.backtest_agent(setup, "test")
    decides = np.arange(len(result.rows)) % 12 == 0
    assert np.array_equal(result.turnover > 0, decides)
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


def test_agent_and_baselines_stay_within_the_limits_of_the_account(trained, tmp_path):
    """Trained, tested, reported and signalled so; a coin is left alone where it would move by little."""
    data_dir = copy_reducer(trained[0], tmp_path / "data")
    limits = ("--max-weight", "0.4", "--min-cash", "0.2", "--no-trade-band", "0.01")
    run("train.py", data_dir, *AGENT, *limits)
    folder = data_dir / "reports" / "tiny"
    assert "MAX_WEIGHT 0.4, MIN_CASH 0.2, NO_TRADE_BAND 0.01" in (folder / "report.html").read_text()
    series, trades = pd.read_parquet(folder / "series.parquet"), pd.read_csv(folder / "trades.csv")
    ordered = series[(series["turnover"] > 0) & (series["name"] != "hindsight optimum")]
    assert ordered["name"].nunique() > 10
    assert ordered.filter(regex="after.*USDT").max(axis=None) <= 0.4 + 1e-6
    assert ordered["after.cash"].min() >= 0.2 - 1e-6
    assert series.loc[series["name"] == "hindsight optimum", "after.cash"].min() == 0
    agent = series["name"].iloc[0]
    own, orders = series[(series["name"] == agent)][::12], trades[trades["name"] == agent]
    assert 0 < len(orders) < len(own)  # of three coins
    assert (orders["after"] - orders["before"]).abs().min() > 0.005  # what stays moves others a little
    figures = headline(metrics_of(data_dir), "test")
    run("train.py", data_dir, "--job", "evaluate", *limits)
    assert headline(metrics_of(data_dir, "tiny-best-test"), "test") == figures
    signal = ("--job", "signal", "--max-age", "2000000000", "--holdings", "0.256,0.255,0.245,0.244")
    held = json.loads(run("train.py", data_dir, *signal, *limits).stdout.splitlines()[-1])["weights"]
    assert list(held.values()) == [0.256, 0.255, 0.245, 0.244]


def test_coins_that_come_and_go_from_bars_to_page(tmp_path):
    """Five coins with lives of their own, of which three are members; the same pages, jobs and refusals."""
    symbols, data_dir = "BTCUSDT,ETHUSDT,SOLUSDT,XRPUSDT,ADAUSDT", tmp_path / "data"
    lives = ("--births-and-deaths", "--absent", "allow", "--universe", "3", "--days", "220")
    market = ("--source", "synthetic", "--symbols", symbols, "--seed", "4")
    assert "BIRTHS_AND_DEATHS" in refusal("getData.py", data_dir, *market, *lives[:1], code=2)
    printed = run("getData.py", data_dir, *market, *lives).stdout
    assert "ended" in printed
    assert "listed" in printed
    prices, footer = getData.load_prices(data_dir)
    members = getData.members_of(prices, footer["symbols"])
    assert set(members.sum(1)) <= {0, 1, 2, 3}
    assert members.any(0).sum() > 3
    checked = run("getData.py", data_dir, "--job", "causality", "--symbols", symbols, *lives[1:5]).stdout
    assert "causal: no value" in checked

    assert "--tie-coins" in refusal("train.py", data_dir, *ALONE, "--no-tie-coins")
    assert "--tie-coins" in refusal("feature_reducer.py", data_dir, *WINDOW, *REDUCER, "--no-tie-coins")
    run("feature_reducer.py", data_dir, *WINDOW, *REDUCER)
    printed = run("train.py", data_dir, *AGENT).stdout
    page = (data_dir / "reports" / "tiny" / "report.html").read_text()
    for text in (printed, page):
        assert "Members: " in text
        assert "gap: chosen with hindsight" in text
    trades = pd.read_csv(data_dir / "reports" / "tiny" / "trades.csv")
    series = pd.read_parquet(data_dir / "reports" / "tiny" / "series.parquet")
    there = pd.DataFrame(members, prices.index, footer["symbols"])
    agent = series[series["name"] == series["name"].iloc[0]].set_index("time")
    for symbol in footer["symbols"]:
        held = agent[f"after.{symbol}"][agent["turnover"] > 0]
        assert not held[~there[symbol].reindex(held.index).to_numpy()].any()
    assert len(trades)
    final = ("--checkpoint", "final.pt")
    for job in (("importance", *final), ("evaluate", "--evaluate-split", "all", *final)):
        run("train.py", data_dir, "--job", *job)
    run("feature_reducer.py", data_dir, "--job", "compress")
    assert "survivors" in run("portfolio_env.py", data_dir, "--split", "test").stdout.lower()
    stops = there.columns[there.iloc[-1]][0]  # a member trades no more
    path = data_dir / "ohlcv" / f"{stops}.parquet"
    bars, about = getData.read_frame(path), getData.read_footer(path)
    getData.store_bars(data_dir, path.stem, bars[:-50], about["source"], about["command"])
    run("getData.py", data_dir, "--job", "features", "--symbols", symbols, *lives[1:5])
    printed = run("train.py", data_dir, "--job", "signal", *final, "--max-age", "1000000000").stdout
    assert "no order before the next decision" in printed
    assert re.search(rf"the newest bar .* is missing for {path.stem}", printed)
    run("portfolio_env.py", data_dir, "--split", "test")
