"""What goes wrong around the scripts: kills, full disks, too little memory or history, mistakes."""

import ctypes
import itertools
import math
import os
import re
import resource
import shutil
import signal
import stat
import subprocess
import sys
from functools import partial

import numpy as np
import pandas as pd
import psutil
import pytest
import torch
from conftest import (
    AGENT,
    ALONE,
    COINS,
    REDUCER,
    ROOT,
    WINDOW,
    assert_same_runs,
    copy_market,
    killed_runs,
    load,
    make_market,
    metrics_of,
    refusal,
    run,
    same_tensors,
)
from forked import Script
from test_feature_reducer import full_disk
from tqdm import tqdm

import feature_reducer
import getData
import train


def test_trainings_share_a_data_folder_but_no_run(market_dir, tmp_path):
    """The first one is stopped in the middle, by SIGSTOP, so that it surely still holds its folder.
    Meanwhile the features are made anew, a reducer is trained, and another agent, to whom the names in
    checkpoints/ then belong; the first one goes on with the bars and the encoder that it began with.
    """
    data_dir = copy_market(market_dir, tmp_path / "data")
    command = [ROOT / "train.py", "--data-dir", data_dir, *ALONE]
    with Script(command, stop_at="pretrain  2/2", sent=signal.SIGSTOP) as first:
        assert any(line.startswith("decisions: ") for line in first.stdout)
        while psutil.Process(first.pid).status() != psutil.STATUS_STOPPED:
            assert first.poll() is None
        for again in ((), ("--resume",)):
            line = refusal("train.py", data_dir, *ALONE, *again, code=3)
            assert str(data_dir / "checkpoints" / "tiny") in line
        make_market(data_dir, "--days", "115")
        run("feature_reducer.py", data_dir, *WINDOW, *REDUCER)
        run("train.py", data_dir, *ALONE, "--run", "other")
        assert load(data_dir / "checkpoints" / "last.pt")["run"] == "other"
        first.send_signal(signal.SIGTERM)
        first.send_signal(signal.SIGCONT)
        first.communicate()
    assert first.returncode == 143
    for link in ("other/best.pt", "other/final.pt", "tiny/last.pt"):
        assert os.readlink(data_dir / "checkpoints" / link.partition("/")[2]) == link
    run("train.py", data_dir, *ALONE, "--resume")
    alone = copy_market(market_dir, tmp_path / "alone")
    run("train.py", alone, *ALONE)
    assert_same_runs(alone, data_dir)


def test_a_reducer_stopped_and_killed_twice_equals_the_whole_one(market_dir, tmp_path, monkeypatch):
    """Stopped after 10 of 32 batches; killed at the end of that epoch, and while it saves."""
    whole, killed = (copy_market(market_dir, tmp_path / name) for name in ("whole", "killed"))
    flags = (*WINDOW, *REDUCER, "--batch-size", "16", "--init", "random", "--learning-rate", "0.001")
    run("feature_reducer.py", whole, *flags)
    progress_bar, batches = feature_reducer.progress_bar, itertools.count(1)

    def bar_that_stops(*arguments: object) -> tqdm:
        bar = progress_bar(*arguments)
        bar.update = lambda: signal.raise_signal(signal.SIGTERM) if next(batches) == 10 else None
        return bar

    with monkeypatch.context() as patch:
        patch.setattr(feature_reducer, "progress_bar", bar_that_stops)
        run("feature_reducer.py", killed, *flags, code=143)
    progress = load(killed / "checkpoints" / "feature_reducer_last.pt")["progress"]
    assert (progress.epoch, progress.batch) == (0, 10)
    places = ["epoch   1", "feature_reducer_last.pt.tmp"]
    killed_runs("feature_reducer.py", killed, places, *flags, "--resume")
    for name in ("feature_reducer", "feature_reducer_last"):
        first, second = (load(folder / "checkpoints" / f"{name}.pt") for folder in (whole, killed))
        assert same_tensors(first, second), name
    logs = [(folder / "runs" / "feature_reducer" / "metrics.csv").read_text() for folder in (whole, killed)]
    assert logs[0] == logs[1]


def test_a_second_signal_ends_at_once_unless_a_terminal_is_closed(tmp_path):
    (tmp_path / "script.py").write_text("""
import signal, sys, feature_reducer
stop = feature_reducer.StopSignal()
for number in sys.argv[1:]:
    signal.raise_signal(int(number))
sys.exit(stop.exit_code)
""")
    for signals, code in {(15,): 143, (2, 1, 1): 130, (15, 2): 130, (1, 1): 129, (1, 15, 2): 143}.items():
        with Script([tmp_path / "script.py", *signals]) as process:
            _, errors = process.communicate()
        assert process.returncode == code, signals
        assert errors.count("finishing the batch") == (signals[0] != signal.SIGHUP)  # nobody would read it


def test_a_full_disk_ends_no_training_and_keeps_the_old_files(trained, tmp_path):
    """Not a byte can be written before the first batch has ended; then room comes back."""
    data_dir = shutil.copytree(trained[0], tmp_path / "data")
    old = {path.name: path.read_bytes() for path in (data_dir / "checkpoints").glob("*.pt")}

    def make_room(*_: object) -> None:
        assert {name: (data_dir / "checkpoints" / name).read_bytes() for name in old} == old
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    signal.signal(signal.SIGUSR1, make_room)
    flags = (*AGENT, "--run", "full", "--no-test")
    with full_disk(0):
        result = run("train.py", data_dir, *flags, code=5, stop_at="batch     1/4", sent=signal.SIGUSR1)
    checkpoints = data_dir / "checkpoints"
    for name in ("pretrained.pt", "best.pt", "last.pt"):
        assert f"cannot write {checkpoints / 'full' / name}" in result.stderr
    for name in ("metrics.csv", "trials.csv"):
        assert re.search(f"warning: .*{name} has to wait", result.stderr)
    assert f"error: {checkpoints / 'full' / 'pretrained.pt'}" in result.stderr.splitlines()[-1]
    assert (checkpoints / "pretrained.pt").read_bytes() == old["pretrained.pt"]
    assert pd.read_csv(data_dir / "runs" / "full" / "metrics.csv")["step"].tolist() == [1, 2, 3, 4]
    assert pd.read_csv(data_dir / "runs" / "trials.csv")["run"].tolist().count("full") == 1
    for name in ("best", "final", "last"):
        assert load(checkpoints / f"{name}.pt")["run"] == "full"
    assert load(checkpoints / "last.pt")["progress"].best_validation > -math.inf


def test_an_agent_that_could_not_be_written_is_written_by_a_resume(market_dir, tmp_path):
    """Folders lie where pretrained.pt, and later best.pt, belong."""
    data_dir = copy_market(market_dir, tmp_path / "data")
    folder = data_dir / "checkpoints" / "tiny"
    pretrained, best, last = (folder / f"{name}.pt" for name in ("pretrained", "best", "last"))
    pretrained.mkdir(parents=True)
    run("train.py", data_dir, *ALONE, code=5, stop_at="pretrain  1/2")
    assert load(last)["progress"].best_failed
    assert load(last)["progress"].best_validation == -math.inf
    pretrained.rmdir()
    run("train.py", data_dir, *ALONE, "--resume", code=143, stop_at="pretrain  2/2")
    assert load(pretrained)["run"] == "tiny"
    assert not load(last)["progress"].best_failed

    best.mkdir()
    errors = run("train.py", data_dir, *ALONE, "--resume", code=5).stderr
    assert f"error: {best}" in errors.splitlines()[-1]
    assert load(last)["progress"].best_failed
    best.rmdir()
    for _ in range(2):  # then best.pt is taken away
        assert "at batch 4: validation" in run("train.py", data_dir, *ALONE, "--resume").stdout
        assert same_tensors(load(best)["reducer"], load(last)["reducer"])
        assert not load(last)["progress"].best_failed
        assert load(last)["progress"].best_validation > -math.inf
        best.unlink()


def test_the_reducer_writes_its_best_when_it_can(market_dir, tmp_path):
    """A folder lies where feature_reducer.pt belongs, through the training; then the file is deleted."""
    data_dir = copy_market(market_dir, tmp_path / "data")
    best = data_dir / "checkpoints" / "feature_reducer.pt"
    best.mkdir(parents=True)
    run("feature_reducer.py", data_dir, *WINDOW, *REDUCER, code=5)
    best.rmdir()
    for _ in range(2):
        run("feature_reducer.py", data_dir, *WINDOW, *REDUCER, "--resume")
        progress = load(data_dir / "checkpoints" / "feature_reducer_last.pt")["progress"]
        assert progress.best == load(best)["metrics"]
        assert not progress.best_failed
        best.unlink()


@pytest.mark.parametrize("script", ["feature_reducer.py", "train.py"])
def test_what_is_too_large_for_the_machine_is_refused_with_numbers(market_dir, tmp_path, monkeypatch, script):
    """Memory, also what the machine has but the process may not have (a limit on its addresses), and disk."""
    data_dir = copy_market(market_dir, tmp_path / "data")
    flags = (*WINDOW, *REDUCER) if script == "feature_reducer.py" else ALONE
    line = refusal(script, data_dir, *flags, "--hidden-dim", "90000000")
    assert re.search(r"not enough memory: \d+\.\d GB needed, \d+\.\d GB free", line)
    large = (*flags, "--hidden-dim", "50000", "--no-tie-coins")
    limit = psutil.Process().memory_info().vms + 4 * 10**8
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
    try:
        assert "allocate" in refusal(script, data_dir, *large)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**12, 10**12, 1000))
    line = refusal(script, data_dir, *flags)
    assert re.search(r"not enough disk: .* need \d+\.\d GB more in .*, 0\.0 GB are free", line)
    assert not list((data_dir / "checkpoints").glob("**/*.pt"))


def test_a_loss_that_is_not_finite_ends_the_run_and_names_a_tensor(trained, tmp_path):
    data_dir = shutil.copytree(trained[0], tmp_path / "data")
    line = refusal("train.py", data_dir, *AGENT, "--policy-rate", "1e30")
    assert re.search(r"in batch \d.*: .* is not finite", line), line
    assert load(data_dir / "checkpoints" / "last.pt")["progress"].batch < 4
    load(data_dir / "checkpoints" / "best.pt")
    line = refusal("feature_reducer.py", data_dir, *WINDOW, *REDUCER, "--learning-rate", "1e30")
    assert re.search(r"in epoch 1: .* is not finite", line), line
    load(data_dir / "checkpoints" / "feature_reducer.pt")


HUGE = ("1e30", "--pretrain-steps", "1", "--validate-every", "1", "--update-epochs", "1", "--minibatch", "24")


@pytest.mark.parametrize(
    ("script", "flags"),
    [
        ("train.py", (*ALONE, "--pretrain-policy-rate", *HUGE)),
        ("train.py", (*ALONE, "--policy-rate", *HUGE)),
        ("train.py", (*ALONE, "--encoder-rate", *HUGE)),
        ("feature_reducer.py", (*WINDOW, *REDUCER, "--learning-rate", "1e30", "--batch-size", "512")),
    ],
    ids=["pretraining", "policy", "encoder", "reducer"],
)
def test_a_divergence_that_shows_in_a_validation_is_one_line(market_dir, tmp_path, script, flags):
    line = refusal(script, copy_market(market_dir, tmp_path / "data"), *flags)
    assert re.search("on the validation split: .*; lower the learning rates", line), line


def test_an_interval_that_diverges_loses_and_the_run_goes_on(market_dir, tmp_path, monkeypatch):
    """The first of two, with rates that only it is given; then both."""
    data_dir, step = copy_market(market_dir, tmp_path / "data"), train.pretrain_step

    def one_that_diverges(setup: train.Setup, *arguments: object) -> dict[str, float]:
        rate = 1e30 if setup.env.hold_bars in diverge else 1e-4
        with monkeypatch.context() as patch:
            patch.setattr(train, "PRETRAIN_POLICY_RATE", rate)
            return step(setup, *arguments)

    monkeypatch.setattr(train, "pretrain_step", one_that_diverges)
    flags, diverge = (*ALONE, "--hold", "0", "--holds", "6,12"), {6}
    printed = run("train.py", data_dir, *flags, "--test").stdout
    assert re.search(r"(?s)every 6 bars: diverged \(.* in pretraining.*every 12 bars: validation", printed)
    assert load(data_dir / "checkpoints" / "best.pt")["hold_bars"] == 12
    trials = pd.read_csv(data_dir / "runs" / "trials.csv").set_index("run")["validation_bp_day"]
    assert np.isnan(trials["tiny (HOLD 6)"])
    diverge = {6, 12}
    for again in ((), ("--resume",)):
        assert "HOLDS 6, 12" in refusal("train.py", data_dir, *flags, "--run", "both", *again)


@pytest.mark.parametrize("script", ["getData.py", "feature_reducer.py", "train.py"])
def test_a_folder_that_cannot_be_written_is_named(trained, tmp_path, script):
    data_dir = shutil.copytree(trained[0], tmp_path / "data")
    folders = [path for path in (data_dir, *data_dir.rglob("*")) if path.is_dir()]
    for path in (data_dir, *data_dir.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    flags = {"getData.py": ("--source", "synthetic"), "train.py": AGENT}.get(script, (*WINDOW, *REDUCER))
    command = [sys.executable, str(ROOT / script), "--data-dir", str(data_dir), *flags]
    # root obeys permissions too: the exec gives up the right to override them (CAP_DAC_OVERRIDE, 1)
    drop = partial(ctypes.CDLL(None).prctl, 24, 1, 0, 0, 0)  # PR_CAPBSET_DROP
    result = subprocess.run(command, capture_output=True, text=True, preexec_fn=drop)
    for path in folders:
        path.chmod(0o755)
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"error: Permission denied ({data_dir}")


def test_one_bar_less_than_the_minimum_is_refused_with_numbers(tmp_path):
    """The shortest history that getData.py takes trains; with a segment a bar too long, train.py says so."""
    market = ("--source", "synthetic", "--symbols", "AUSDT")
    line = refusal("getData.py", tmp_path, *market, "--days", "40")
    days = int(re.search(r"too little history: (\d+) days needed, 40\.0 found", line).group(1))
    for count, code in ((days - 1, 1), (days, 0)):
        run("getData.py", tmp_path, *market, "--days", str(count), code=code)
    windows, footer = feature_reducer.load_windows(tmp_path, (2, 1, 1, 1, 1), torch.device("cpu"))
    rows = len(windows.rows(footer["splits"]["train"]))
    flags = (*AGENT, "--window-bars", "2,1,1,1,1", "--hidden-dim", "8", "--latent-dim", "4",
             "--num-envs", "1", "--pretrain-epochs", "0", "--batches", "1", "--no-test")  # fmt: skip
    line = refusal("train.py", tmp_path, *flags, "--hold", "1", "--steps", str(rows - 2))
    assert f"{rows} bars, not {rows + 1}" in line
    hold = max(bars for bars in range(1, 300) if (rows - 3) % bars == 0)  # fewer steps take less time
    run("train.py", tmp_path, *flags, "--hold", str(hold), "--steps", str((rows - 3) // hold))


def test_mistakes_get_one_line(trained, tmp_path):
    data_dir = shutil.copytree(trained[0], tmp_path / "data")
    cases = {
        (2, "train.py", "--heads", "3"): "TOKEN_WIDTH",
        (2, "train.py", "--batches", "many"): "BATCHES",
        (2, "train.py", "--batch", "3"): "--batch",
        (2, "train.py", "--job", "signal", "--walk-forward", "3"): "--walk-forward",
        (2, "feature_reducer.py", *WINDOW, *REDUCER, "--latent-dim", "100"): "HIDDEN_DIM",
        (2, "feature_reducer.py", *WINDOW, *REDUCER, "--device", "cuda:9"): "DEVICE",
        (1, "train.py", *AGENT, "--scale", "full"): "SCALE small",
        (1, "train.py", "--resume", "--gamma", "0.5,0.8"): "GAMMA=0.5,0.9",
        (1, "train.py", *AGENT, "--resume", "--blocks", "2"): "BLOCKS=1",
        (1, "train.py", *AGENT, "--resume", "--walk-forward", "2"): "WALK_FORWARD=0",
        (1, "train.py", *AGENT, "--num-envs", "1", "--steps", "200000"): "too little history",
        (1, "feature_reducer.py", *REDUCER, "--window-bars", "6,4,3,2,60"): "WINDOW_BARS",
    }
    for (code, script, *flags), name in cases.items():
        assert name in refusal(script, data_dir, *flags, code=code)


def test_extreme_bars_go_through_without_a_number_that_is_not_finite(tmp_path):
    """Ten times up in a bar and down again, no volume for three days, all coins flat for two, one coin halted
    for two; in the training split and again in the test split."""
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
    flags = ("--symbols", ",".join(bars), "--max-gap", "576")
    run("getData.py", tmp_path, "--source", str(tmp_path / "bars"), *flags)
    frames, footer = getData.load_features(tmp_path)
    assert all(np.isfinite(frame[30:]).all(axis=None) for frame in frames.values())
    prices, _ = getData.load_prices(tmp_path)
    assert float(np.log(prices["AUSDT.close"]).diff().abs().max()) > 2.2
    run("feature_reducer.py", tmp_path, *WINDOW, *REDUCER)
    large = ("--num-envs", "32", "--steps", "256", "--replicas", "2", "--minibatch", "1024", "--hold", "1")
    run("train.py", tmp_path, *AGENT, *large)
    log = pd.read_csv(tmp_path / "runs" / "tiny" / "metrics.csv").drop(columns="validation_bp_day")
    assert np.isfinite(log.to_numpy()).all()
    assert log["skipped_steps"].max() == 0
    for row in metrics_of(tmp_path)["test"].values():
        assert all(value is not None for value in row.values())
    for path in (tmp_path / "checkpoints").glob("*.pt"):
        saved = torch.load(str(path), weights_only=True)
        tensors = [*saved["reducer"].values(), *saved.get("policy", {}).values()]
        assert all(torch.isfinite(tensor).all() for tensor in tensors)


def test_files_stay_in_the_data_folder_and_nothing_uses_the_network(tmp_path):
    """With its own home, temporary folder and working folder; libraries may cache in the first two."""
    folders = {name: tmp_path / name for name in ("home", "tmp", "work", "site")}
    for path in folders.values():
        path.mkdir()
    (folders["site"] / "sitecustomize.py").write_text("""
import os, sys
def refuse(event, arguments):
    if event in ("socket.bind", "socket.connect", "socket.getaddrinfo", "socket.sendto"):
        os.write(2, f"the network was used: {event} {arguments}".encode())
        os._exit(99)
sys.addaudithook(refuse)
""")
    environment = os.environ | {
        "HOME": str(folders["home"]), "TMPDIR": str(folders["tmp"]), "PYTHONPATH": str(folders["site"]),
        "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    sources = set(ROOT.glob("*"))
    market = ("--source", "synthetic", "--symbols", COINS, "--days", "110")
    jobs = {"getData.py": market, "feature_reducer.py": (*WINDOW, *REDUCER), "train.py": AGENT}
    for script, flags in jobs.items():
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
