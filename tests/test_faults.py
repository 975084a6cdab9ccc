"""What goes wrong around the scripts: kills, full disks, too little memory or history, mistakes."""

import ctypes
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
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import (
    AGENT,
    REDUCER,
    ROOT,
    WINDOW,
    assert_same_runs,
    copy_market,
    killed_runs,
    load,
    make_market,
    metrics_of,
    run,
    same_tensors,
)
from forked import Script

import feature_reducer
import getData

DENSE = ("--tie-coins", "never")  # for its large files


def test_trainings_share_a_data_folder_but_no_run(market_dir, tmp_path):
    """The first one is stopped in the middle, by SIGSTOP, so that it surely still holds its folder.

    Meanwhile the features are made anew, a reducer is trained, and another agent, to whom the names in
    checkpoints/ then belong; the first one goes on with the bars and the encoder that it began with.
    """
    data_dir = copy_market(market_dir, tmp_path / "data")
    small = (*WINDOW, "--hidden-dim", "34", "--latent-dim", "16", *AGENT, "--no-test")
    with Script([ROOT / "train.py", "--data-dir", data_dir, *small]) as first:
        assert any(line.startswith("pretrain  2/2") for line in first.stdout)
        first.send_signal(signal.SIGSTOP)
        folder = data_dir / "checkpoints" / "tiny"
        for again in ((), ("--resume",)):
            refused = run("train.py", data_dir, *small, *again, code=3).stderr
            assert refused == f"error: another training is at work in {folder}: run again when it is done\n"
        make_market(data_dir, "--days", "115")
        run("feature_reducer.py", data_dir, *WINDOW, *REDUCER)
        run("train.py", data_dir, *small, "--run", "other")
        first.kill()
    links = {
        path.name: os.readlink(path) for path in (data_dir / "checkpoints").glob("*.pt") if path.is_symlink()
    }
    assert links == {name: f"other/{name}" for name in ("pretrained.pt", "best.pt", "final.pt", "last.pt")}
    assert load(data_dir / "checkpoints" / "best.pt")["run"] == "other"
    run("train.py", data_dir, *small, "--resume")
    alone = copy_market(market_dir, tmp_path / "alone")
    run("train.py", alone, *small)
    assert_same_runs(alone, data_dir)


def test_kills_at_any_moment_lose_nothing(market_dir, tmp_path):
    """Files of 20 MB, so that there is a while in which they are half written."""
    whole, data_dir = copy_market(market_dir, tmp_path / "whole"), copy_market(market_dir, tmp_path / "data")
    flags = (*WINDOW, *REDUCER, "--hidden-dim", "1600", "--windows-per-epoch", "128", *DENSE)
    run("feature_reducer.py", whole, *flags)
    agent = (*AGENT, *DENSE)
    run("train.py", whole, *agent)
    rng = np.random.default_rng(0)
    reducer = [str(ROOT / "feature_reducer.py"), "--data-dir", str(data_dir), *flags]
    halves = killed_runs(reducer, data_dir, 8, rng)
    going_on = (data_dir / "checkpoints" / "feature_reducer_last.pt").exists()
    run("feature_reducer.py", data_dir, *flags, *["--resume"] * going_on)
    train_it = [str(ROOT / "train.py"), "--data-dir", str(data_dir), *agent]
    halves += killed_runs(train_it, data_dir, 20, rng)
    assert halves >= 5
    run("train.py", data_dir, *agent, *["--resume"] * (data_dir / "checkpoints" / "last.pt").exists())
    assert_same_runs(whole, data_dir)
    assert not list(data_dir.rglob("*.tmp"))
    assert pd.read_csv(data_dir / "runs" / "trials.csv")["validation_bp_day"].notna().sum() == 1


def test_a_second_ctrl_c_ends_at_once_and_harms_nothing(trained, tmp_path):
    """The batch is made so long that the first Ctrl-C alone would have to wait for it."""
    data_dir = shutil.copytree(trained[0], tmp_path / "data")
    before = {path.name: path.read_bytes() for path in (data_dir / "checkpoints").glob("*.pt")}
    slow = ("--pretrain-epochs", "0", "--num-envs", "64", "--steps", "2000", "--hold", "1",
            "--minibatch", "16", "--run", "long")  # fmt: skip
    with Script([ROOT / "train.py", "--data-dir", data_dir, *AGENT, *slow]) as process:
        assert any(line.startswith("at batch 0") for line in process.stdout)
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        assert any("Ctrl-C again: stop at once" in line for line in process.stderr)
        process.send_signal(signal.SIGINT)
        printed = process.communicate(timeout=10)[0]
    assert process.returncode == 130
    assert "stopped after" not in printed  # nothing was finished
    for name in ("pretrained.pt", "final.pt", "feature_reducer.pt"):
        assert (data_dir / "checkpoints" / name).read_bytes() == before[name]
    assert load(data_dir / "checkpoints" / "long" / "last.pt")["progress"].batch == 0


def test_the_reducer_stopped_within_an_epoch_goes_on_there(market_dir, tmp_path):
    whole, stopped = (
        copy_market(market_dir, tmp_path / "whole"),
        copy_market(market_dir, tmp_path / "stopped"),
    )
    flags = (*WINDOW, *REDUCER, "--batch-size", "2", "--init", "random", "--learning-rate", "0.001")
    run("feature_reducer.py", whole, *flags)
    with Script([ROOT / "feature_reducer.py", "--data-dir", stopped, *flags]) as process:
        assert any(line.startswith("epoch   1") for line in process.stdout)
        process.send_signal(signal.SIGTERM)
        rest = process.communicate(timeout=60)
    assert process.returncode == 143, rest
    progress = load(stopped / "checkpoints" / "feature_reducer_last.pt")["progress"]
    assert progress.epoch == 1
    assert 0 < progress.batch < 256
    run("feature_reducer.py", stopped, *flags, "--resume")
    for name in ("feature_reducer", "feature_reducer_last"):
        contents = [load(folder / "checkpoints" / f"{name}.pt") for folder in (whole, stopped)]
        assert same_tensors(*contents), name
    logs = [(folder / "runs" / "feature_reducer" / "metrics.csv").read_text() for folder in (whole, stopped)]
    assert logs[0] == logs[1]


# ------------------------------------------------------------------------------------- too little of anything


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
    assert errors.splitlines()[-1].startswith(
        f"error: {data_dir / 'checkpoints' / 'full' / 'pretrained.pt'} is not up to date"
    )
    assert (data_dir / "checkpoints" / "pretrained.pt").read_bytes() == old["pretrained.pt"]
    assert pd.read_csv(data_dir / "runs" / "full" / "metrics.csv")["step"].tolist() == [1, 2, 3, 4]
    for name in ("best", "final", "last"):
        assert load(data_dir / "checkpoints" / f"{name}.pt")["run"] == "full"
    # what could be written is what a run without trouble writes, but for the epochs that were to be gone back
    # to
    last = load(data_dir / "checkpoints" / "last.pt")
    assert last["progress"].best_validation > -math.inf


def test_a_disk_that_fills_between_pretraining_and_batches_ends_nothing(trained, tmp_path):
    data_dir = shutil.copytree(trained[0], tmp_path / "data")
    command = [ROOT / "train.py", "--data-dir", data_dir, *AGENT, "--run", "full", "--no-test"]
    with Script(command) as process:
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
        [sys.executable, "-c", code, "--data-dir", str(data_dir), *flags],
        capture_output=True,
        text=True,
        cwd=ROOT,
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
    """Root obeys permissions too: its next exec gives up the right to override them (CAP_DAC_OVERRIDE, 1)."""
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


def test_one_bar_less_than_the_minimum_is_refused_with_numbers(tmp_path):
    """The shortest history that getData.py takes trains; with a segment a bar too long, train.py says so."""
    refused = run(
        "getData.py", tmp_path, "--source", "synthetic", "--symbols", "AUSDT", "--days", "40", code=1
    ).stderr
    days = int(re.search(r"too little history: (\d+) days needed, 40\.0 found", refused).group(1))
    for count, code in ((days - 1, 1), (days, 0)):
        run(
            "getData.py",
            tmp_path,
            "--source",
            "synthetic",
            "--symbols",
            "AUSDT",
            "--days",
            str(count),
            code=code,
        )
    rows = len(feature_reducer.load_windows(tmp_path, (2, 1, 1, 1, 1), torch.device("cpu"))[0].rows(
        getData.load_prices(tmp_path)[1]["splits"]["train"]))  # fmt: skip
    flags = (*AGENT, "--window-bars", "2,1,1,1,1", "--hidden-dim", "8", "--latent-dim", "4",
             "--pretrain-epochs", "0", "--batches", "1", "--num-envs", "1", "--hold", "1",
             "--no-test")  # fmt: skip
    refused = run("train.py", tmp_path, *flags, "--steps", str(rows - 2), code=1).stderr
    assert f"a segment needs {rows + 1} bars, the training split has {rows}" in refused
    run("train.py", tmp_path, *flags, "--steps", str(rows - 3), "--minibatch", "4096")


# ------------------------------------------------------------------------------- extreme bars, files, network


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
    assert set(feature_reducer.check_features(frames).values()) == {30}
    prices, _ = getData.load_prices(tmp_path)
    assert float(np.log(prices["AUSDT.close"]).diff().abs().max()) > 2.2
    run("feature_reducer.py", tmp_path, *WINDOW, *REDUCER)
    run(
        "train.py",
        tmp_path,
        *AGENT,
        "--num-envs",
        "32",
        "--steps",
        "256",
        "--hold",
        "1",
        "--minibatch",
        "1024",
    )
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
    """With its own home, temporary folder and working folder; libraries may cache in the first two."""
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


def test_prices_of_other_times_than_the_features_are_refused(trained, tmp_path):
    data_dir = shutil.copytree(trained[0], tmp_path / "data")
    path = data_dir / "features" / "prices.parquet"
    getData.write_parquet(path, pd.read_parquet(path).iloc[100:], getData.read_footer(path))
    refused = run("train.py", data_dir, "--job", "evaluate", code=1).stderr
    assert "are of other times: run python getData.py --job features" in refused


def test_a_file_that_cannot_be_written_ends_no_training_but_is_in_its_exit_code(trained, tmp_path):
    """A folder that lies where the file belongs cannot be replaced by it."""
    data_dir = copy_market(trained[0], tmp_path / "data")
    checkpoints = data_dir / "checkpoints" / "tiny"
    flags = (*WINDOW, "--hidden-dim", "34", "--latent-dim", "16", *AGENT)
    (checkpoints / "last.pt").mkdir(parents=True)
    result = run("train.py", data_dir, *flags, code=5)
    assert result.stderr.splitlines()[-1].startswith(f"error: {checkpoints / 'last.pt'} is not up to date")
    assert "agent (best)" in result.stdout
    for name in ("best", "final"):
        assert load(checkpoints / f"{name}.pt")["run"] == "tiny"

    (checkpoints / "last.pt").rmdir()
    (checkpoints / "best.pt").unlink()
    (checkpoints / "best.pt").mkdir()
    run("train.py", data_dir, *flags, code=5)
    assert load(checkpoints / "last.pt")["progress"].best_failed
    (checkpoints / "best.pt").rmdir()
    assert "agent (best)" in run("train.py", data_dir, *flags, "--resume").stdout
    assert not load(checkpoints / "last.pt")["progress"].best_failed


@pytest.mark.parametrize("kept", [False, True])
def test_a_resume_writes_the_best_agent_that_is_missing_or_could_not_be_written(trained, tmp_path, kept):
    """The state says what could not be written; a deleted file is seen. The last agent is now the best."""
    data_dir = shutil.copytree(trained[0], tmp_path / "data")
    best, last = (data_dir / "checkpoints" / "tiny" / f"{name}.pt" for name in ("best", "last"))
    if kept:
        state = load(last)
        state["progress"].best_failed, state["progress"].best_validation = True, -1e9
        feature_reducer.save_checkpoint(last, state | {"progress": vars(state["progress"])})
        shutil.copy(best.with_name("pretrained.pt"), best)
    else:
        best.unlink()
    printed = run("train.py", data_dir, *AGENT, "--resume").stdout
    assert (f"{best} is missing: " in printed) == (not kept)
    assert same_tensors(load(best)["policy"], load(last)["policy"])
    progress = load(last)["progress"]
    assert progress.best_validation > -1e9
    assert not progress.best_failed
    assert "agent (best)" in printed


def test_a_stop_in_pretraining_remembers_what_could_not_be_written(market_dir, tmp_path):
    """A folder lies where pretrained.pt belongs; after the stop it is gone."""
    data_dir = copy_market(market_dir, tmp_path / "data")
    pretrained = data_dir / "checkpoints" / "tiny" / "pretrained.pt"
    pretrained.mkdir(parents=True)
    flags = (*WINDOW, "--hidden-dim", "24", "--latent-dim", "16", *AGENT, "--pretrain-epochs", "200")
    command = [ROOT / "train.py", "--data-dir", data_dir, *flags]
    with Script(command) as process:
        assert any(line.startswith("pretrain  1/200") for line in process.stdout)
        process.send_signal(signal.SIGTERM)
        errors = process.communicate(timeout=60)[1]
    assert process.returncode == 5, errors
    progress = load(data_dir / "checkpoints" / "last.pt")["progress"]
    assert progress.best_failed
    assert progress.best_validation == -math.inf
    pretrained.rmdir()
    with Script([*command, "--resume"]) as again:
        assert any(line.startswith("resumed: validation") for line in again.stdout)
        again.send_signal(signal.SIGTERM)
        again.communicate(timeout=60)
    assert again.returncode == 143
    assert load(pretrained)["run"] == "tiny"


def test_the_reducer_writes_its_best_when_it_can(market_dir, tmp_path):
    """A folder lies where feature_reducer.pt belongs, through the training; then the file is deleted."""
    data_dir = copy_market(market_dir, tmp_path / "data")
    best = data_dir / "checkpoints" / "feature_reducer.pt"
    best.mkdir(parents=True)
    run("feature_reducer.py", data_dir, *WINDOW, *REDUCER, code=5)
    best.rmdir()
    for _ in range(2):
        printed = run("feature_reducer.py", data_dir, *WINDOW, *REDUCER, "--resume").stdout
        assert f"{best} is missing: " in printed
        last = load(data_dir / "checkpoints" / "feature_reducer_last.pt")
        assert last["progress"].best == load(best)["metrics"]
        assert not last["progress"].best_failed
        best.unlink()


def test_an_allocation_that_fails_is_one_line(trained, tmp_path):
    """More than the process may have, though the machine has it: a limit on its addresses is the memory."""
    data_dir = copy_market(trained[0], tmp_path / "data")
    limit = partial(resource.setrlimit, resource.RLIMIT_AS, (3 * 10**9, resource.RLIM_INFINITY))
    for script, flags in (("train.py", AGENT), ("feature_reducer.py", REDUCER)):
        command = [sys.executable, str(ROOT / script), "--data-dir", str(data_dir), *WINDOW, *flags]
        command += ["--latent-dim", "16", "--hidden-dim", "130000", *DENSE]
        result = subprocess.run(command, capture_output=True, text=True, preexec_fn=limit)
        assert result.returncode == 1, result.stderr
        (line,) = result.stderr.splitlines()
        assert re.search(r"allocate .*: use --scale small, or smaller batches", line), line


def test_mistakes_get_one_line(trained, tmp_path):
    data_dir = shutil.copytree(trained[0], tmp_path / "data")
    cases = {
        (2, "train.py", "--heads", "3"): "TOKEN_WIDTH",
        (2, "train.py", "--batches", "many"): "BATCHES = 'many': Input should be a valid integer",
        (2, "train.py", "--batch", "3"): "unrecognized arguments: --batch",
        (
            2,
            "train.py",
            "--job",
            "signal",
            "--walk-forward",
            "3",
        ): "--walk-forward does nothing in --job signal",
        (2, "feature_reducer.py", *WINDOW, *REDUCER, "--latent-dim", "100"): "HIDDEN_DIM >= LATENT_DIM",
        (2, "feature_reducer.py", *WINDOW, *REDUCER, "--device", "cuda:9"): "DEVICE",
        (1, "train.py", *AGENT, "--scale", "full"): "is of scale small, this run of scale full",
        (1, "train.py", *AGENT, "--resume", "--gamma-end", "0.8"): "GAMMA_END = 0.9",
        (1, "train.py", *AGENT, "--resume", "--blocks", "2"): "BLOCKS = 1",
        (1, "train.py", *AGENT, "--resume", "--walk-forward", "2"): "tiny is not several runs to go on with",
        (1, "train.py", *AGENT, "--hold", "1000000"): "too little history: HOLD 1000000",
        (1, "feature_reducer.py", *REDUCER, "--window-bars", "6,4,3,2,60"): "looks back",
    }
    for (code, script, *flags), message in cases.items():
        result = run(script, data_dir, *flags, code=code)
        assert message in result.stderr, result.stderr
        assert len(result.stderr.strip().splitlines()) == 1, result.stderr
