"""Several runs: seeds and their ensemble, walk-forward folds and grids; here, and on a Ray cluster."""

import json
import os
import re
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from operator import gt
from pathlib import Path
from threading import Timer
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import psutil
import pytest
import torch
from conftest import (
    ALONE,
    copy_market,
    headline,
    load,
    metrics_of,
    printed_once,
    put_back,
    refusal,
    run,
    same_tensors,
    set_constants,
)
from filelock import FileLock
from forked import Script

import feature_reducer
import getData
import portfolio_env
import train
from getData import UserError

SMALL = ALONE[:-1]  # with a report
CPU = torch.device("cpu")


def start(data_dir: Path, *flags: str, **environment: str) -> Script:
    return Script([train.__file__, "--data-dir", data_dir, *flags], os.environ | environment)


def wait_for(find: Callable[[], Any], process: Script) -> Any:
    """Return what `find` does, once that is something, while the process runs."""
    deadline = time.monotonic() + 240
    while not (thing := find()):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return thing


def child_of(pid: int, *flags: str) -> psutil.Process | None:
    """Return the descendant of a process that was started with these flags."""
    for child in psutil.Process(pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # a zombie, or gone meanwhile
            if set(flags) <= set(child.cmdline()):
                return child
    return None


def stop(
    data_dir: Path, seeds: Sequence[int], sent: signal.Signals, *flags: str, **environment: str
) -> tuple[str, str]:
    """Start several runs, stop them when all of `seeds` wait at the lock, and return what was printed.
    While the lock of trials.csv is held, each run waits after its first save, to add its trial.
    """
    logs = [data_dir / "runs" / "tiny" / f"seed-{seed}" / "output.txt" for seed in seeds]
    (data_dir / "runs").mkdir(exist_ok=True)
    lock = FileLock(data_dir / "runs" / ".lock")
    lock.acquire()
    with start(data_dir, *flags, **environment) as process:
        assert any(line.startswith("runs: ") for line in process.stdout)  # an earlier run is removed
        for seed in seeds:
            wait_for((data_dir / "checkpoints" / "tiny" / f"seed-{seed}" / "last.pt").exists, process)
        sizes = [log.stat().st_size for log in logs]
        process.send_signal(sent)
        wait_for(lambda: all(map(gt, (log.stat().st_size for log in logs), sizes)), process)  # all say so
        lock.release()
        printed, errors = process.communicate(timeout=120)
    assert process.returncode == 128 + sent, printed + errors
    return printed, errors


def assert_same_agents(first: Path, second: Path) -> None:
    """All checkpoints of two runs equal bit for bit, but for their names and the clock."""
    for name in ("pretrained", "best", "final", "last"):
        one, two = (load(folder / f"{name}.pt") for folder in (first, second))
        two["run"] = one["run"]
        if name == "last":
            for other in ("run", "started", "seconds"):
                setattr(two["progress"], other, getattr(one["progress"], other))
        assert same_tensors(one, two), name


def conclude(data_dir: Path, **constants: object) -> None:
    """Test and report on several runs that have ended, without starting a process for each."""
    with put_back(train):
        set_constants(train, {"DATA_DIR": data_dir, "SCALE": "small", **constants})
        features = train.shared_features("tiny/")
        load_data = partial(train.load_data, CPU, False, features)
        assert train.conclude_several(train.plan_runs(), "tiny", load_data) == 0


@pytest.fixture(scope="module")
def three(market_dir, tmp_path_factory) -> tuple[Path, str]:
    """A data folder with a run of three seeds, read only, and what train.py printed."""

    def train_three(folder: Path) -> str:
        return run("train.py", copy_market(market_dir, folder), *SMALL, "--seeds", "0,1,2").stdout

    return printed_once(tmp_path_factory, "three", train_three)


def test_each_seed_is_what_it_would_be_alone_and_the_report_shows_all(three, tmp_path):
    data_dir, printed = three
    alone = copy_market(data_dir, tmp_path / "data")
    run("train.py", alone, *SMALL, "--seed", "1")
    assert_same_agents(alone / "checkpoints" / "tiny", data_dir / "checkpoints" / "tiny" / "seed-1")

    content, name = metrics_of(data_dir), "agent (ensemble of 3 seeds)"
    assert list(content["skill"]) == [name]
    assert list(content["runs"]) == ["seed 0", "seed 1", "seed 2", "ensemble"]
    growth = {name: row["excess_bp_day"] for name, row in content["runs"].items()}
    assert growth["seed 1"] == headline(metrics_of(alone), "test")["excess_bp_day"]
    assert growth["ensemble"] == content["test"][name]["excess_bp_day"]
    assert content["seed"] == "0, 1, 2"
    page = (data_dir / "reports" / "tiny" / "report.html").read_text()
    for column in ("validation_bp_day", "excess_bp_day"):
        first, middle, last = sorted(content["runs"][f"seed {seed}"][column] for seed in range(3))
        for text in (f"{middle:+.1f}", f"{first:+.1f} to {last:+.1f}"):
            assert f"<td>{text}</td>" in page.split("median of 3 seeds")[1]
            assert text in printed.split("median of 3 seeds")[1]

    trials = pd.read_csv(data_dir / "runs" / "trials.csv").set_index("run")
    assert sorted(trials.index) == ["tiny", "tiny/seed-0", "tiny/seed-1", "tiny/seed-2"]
    assert content["skill"][name]["trials"] == 4
    for name, key in (("tiny", "ensemble"), ("tiny/seed-2", "seed 2")):
        row, validation = trials.loc[name], content["runs"][key]["validation_bp_day"]
        assert row["test_bp_day"] == pytest.approx(growth[key], abs=1e-3)
        assert row["validation_bp_day"] == pytest.approx(validation, abs=1e-3)
    seeds = [trials["validation_bp_day"][f"tiny/seed-{seed}"] for seed in range(3)]
    assert trials["validation_bp_day"]["tiny"] == pytest.approx(np.mean(seeds))


def test_best_is_the_ensemble_for_signal_and_evaluate(three, tmp_path):
    """The weights again, from the seeds' own checkpoints; and the folder of the seeds instead of the file."""
    data_dir = shutil.copytree(three[0], tmp_path / "data", symlinks=True)
    flags = ("--job", "signal", "--max-age", "2000000000", "--holdings", "0.25,0.5,0.25")
    now = json.loads(run("train.py", data_dir, *flags).stdout.splitlines()[-1])
    folder, logits = data_dir / "checkpoints" / "tiny", []
    for seed in range(3):
        saved = load(folder / f"seed-{seed}" / "best.pt")
        windows, _ = feature_reducer.load_windows(data_dir, saved["window_bars"], CPU, saved)
        policy = train.ActorCritic(16, **saved["policy_shape"])
        policy.load_state_dict(saved["policy"])
        reducer = feature_reducer.reducer_from_checkpoint(saved, "cpu")
        with torch.no_grad():
            tokens = policy.market_tokens(reducer.encoder(windows(torch.tensor([len(windows.times) - 1]))))
            logits.append(policy(tokens, torch.tensor([[0.25, 0.5, 0.25, 0.0]]))[0])
    expected = torch.cat([torch.zeros(1, 1), sum(logits) / 3], 1).softmax(1)[0]
    np.testing.assert_allclose(list(now["weights"].values()), expected, atol=1e-5)
    assert now["run"] == "tiny"
    assert os.readlink(data_dir / "checkpoints" / "best.pt") == "tiny/best.pt"

    (folder / "best.pt").unlink()
    run("train.py", data_dir, "--job", "evaluate", "--checkpoint", "tiny")
    again, first = metrics_of(data_dir, "tiny-tiny-test"), metrics_of(data_dir)
    assert again["test"]["agent (tiny)"] == first["test"]["agent (ensemble of 3 seeds)"]
    assert again["seed"] == "0, 1, 2"


def test_an_ensemble_has_no_latents_but_a_paper_account(three, tmp_path, monkeypatch):
    """Which keeps a copy of it."""
    line = refusal("feature_reducer.py", three[0], "--job", "compress", "--checkpoint", "best.pt")
    assert "best.pt is an ensemble" in line
    with pytest.raises(UserError, match="is an ensemble"):
        portfolio_env.PortfolioEnv(data_dir=three[0], observation="latents", checkpoint="best.pt")
    monkeypatch.setattr(train, "DATA_DIR", three[0])
    best = three[0] / "checkpoints" / "best.pt"
    assert train.paper_name() == "tiny"
    seeds = [load(best.with_name("tiny") / f"seed-{seed}" / "best.pt") for seed in range(3)]
    about = {}
    for checkpoint, given in (("best.pt", False), ("best.pt", False), ("tiny", True), (str(best), True)):
        monkeypatch.setattr(train, "CHECKPOINT", checkpoint)
        copy, about["checkpoint"] = train.paper_agent(tmp_path, about, given)
        for agent, seed in zip([copy, *copy["others"]], seeds, strict=True):
            assert same_tensors([agent["policy"], agent["reducer"]], [seed["policy"], seed["reducer"]])


def test_what_found_nothing_is_named(three, tmp_path, capsys):
    """One seed's agent abstains, then all: the page says so, and the signal where all do."""
    data_dir = shutil.copytree(three[0], tmp_path / "data", symlinks=True)
    folder = data_dir / "checkpoints" / "tiny"
    for seed, hold_bars in ((0, 24), (1, 12)):
        saved = load(folder / f"seed-{seed}" / "best.pt")
        saved["abstains"] = True
        feature_reducer.save_checkpoint(folder / f"seed-{seed}" / "best.pt", saved | {"hold_bars": hold_bars})
        conclude(data_dir, SEEDS=(0, 1))
        figures = metrics_of(data_dir)
        printed = capsys.readouterr().out
        with put_back(train), ThreadPoolExecutor(1) as pool:
            set_constants(train, {"DATA_DIR": data_dir, "SEEDS": (0, 1)})
            ended = lambda *_: pool.submit(int)  # noqa: E731
            train.run_all(train.plan_runs(), "tiny", {}, ended, SimpleNamespace(exit_code=0))
        lines = re.findall(
            r"seed-(\d)  validation \S+ bp/day( \(no more than chance\))?", capsys.readouterr().out
        )
        assert {int(each) for each, chance in lines if chance} == set(range(seed + 1)), lines
        assert len(lines) == 2
        start = ("1 of 2 runs found nothing above chance", "none of 2 runs found anything above chance")[seed]
        assert figures["validation"].startswith(start)
        assert f"\n{start[0].upper()}{start[1:]}" in printed
        assert figures["abstains"] == (seed == 1) == ("equal weights" in next(iter(figures["skill"])))
        assert ("best validation: none of 2 runs" in printed) == (seed == 1)
        names = [f"seed {each}" + " (equal weights)" * (each <= seed) for each in range(2)]
        assert list(figures["runs"]) == [*names, "ensemble" + " (equal weights)" * seed]
        assert printed.count(" (equal weights)") == (1, 3)[seed]
        assert figures["runs"][names[0]]["validation_bp_day"] is None  # it was of what was lost
        intervals = "60 minutes (seed-0 120 minutes, seed-1 60 minutes)"
        assert figures["decides every"] == intervals
        assert intervals in (data_dir / "reports" / "tiny" / "report.html").read_text()
    now = run("train.py", data_dir, "--job", "signal", "--max-age", "2000000000").stdout
    assert portfolio_env.ABSTAINS in now.split("agent of run")[0]
    assert json.loads(now.splitlines()[-1])["abstains"] is True
    assert set(json.loads(now.splitlines()[-1])["weights"].values()) == {0.25}


def test_several_runs_start_from_the_reducer_that_was_there_at_their_start(trained, tmp_path):
    data_dir = copy_market(trained[0], tmp_path / "data")
    path = shutil.copytree(trained[0] / "checkpoints", data_dir / "checkpoints") / "feature_reducer.pt"
    first, last = load(path), data_dir / "checkpoints" / "x" / "last.pt"
    feature_reducer.pin_features(data_dir, last, [path])
    later = {name: weights + 1 for name, weights in first["reducer"].items()}
    feature_reducer.save_checkpoint(path, first | {"reducer": later})
    for name, expected in (("x/seed-1", first["reducer"]), ("y", later)):
        (data_dir / "checkpoints" / name).mkdir(parents=True)
        with put_back(train):
            set_constants(train, {"DATA_DIR": data_dir, "SCALE": "small", "HOLD": 12, "SWEEPS": 0})
            reducer = train.open_run(CPU, False, {}, {}, name).reducer
        assert same_tensors(reducer.state_dict(), expected)


def test_agents_that_differ_in_more_than_their_weights_are_no_ensemble(three):
    paths = [three[0] / "checkpoints" / "tiny" / f"seed-{seed}" / "best.pt" for seed in range(2)]
    first, second = map(load, paths)
    both = train.combined({paths[0]: first, paths[1]: second | {"hold_bars": 4}})
    assert (both["hold_bars"], len(both["others"])) == (4, 1)
    means = {name: 2 * mean for name, mean in first["normalisation"]["mean"].items()}
    for name, value in (("dims", [1, 2, 3]), ("normalisation", first["normalisation"] | {"mean": means})):
        with pytest.raises(UserError, match=f"differ in {name}"):
            train.combined({paths[0]: first, paths[1]: second | {name: value}})


def test_a_grid_trains_every_combination_and_validation_chooses(market_dir, tmp_path):
    data_dir = copy_market(market_dir, tmp_path / "data")
    grid, place = "HOLD=6,24 POLICY_RATE=1e-3", SMALL.index("--hold")
    flags = (*SMALL[:place], *SMALL[place + 2 :], "--pretrain-epochs", "1", "--batches", "2", "--grid", grid)
    printed = run("train.py", data_dir, *flags).stdout
    assert printed.count("\nrun ") == 2
    names = ["HOLD=6,POLICY_RATE=0.001", "HOLD=24,POLICY_RATE=0.001"]
    trials = pd.read_csv(data_dir / "runs" / "trials.csv").set_index("run")
    assert sorted(trials.index) == sorted(f"tiny/{name}" for name in names)
    validations = {name: trials["validation_bp_day"][f"tiny/{name}"] for name in names}
    best = max(validations, key=validations.get)
    content = metrics_of(data_dir)
    assert content["chosen by validation"] == f"{best}, of 2 combinations"
    assert [row["combination"] for row in content["runs"].values()] == names
    for name, row in zip(names, content["runs"].values(), strict=True):
        hold_bars = load(data_dir / "checkpoints" / "tiny" / name / "best.pt")["hold_bars"]
        assert name.startswith(f"HOLD={hold_bars},")
        assert row["validation_bp_day"] == validations[name]
        assert row["excess_bp_day"] == pytest.approx(trials["test_bp_day"][f"tiny/{name}"], abs=1e-3)
    agent = headline(content, "test")
    assert agent["excess_bp_day"] == content["runs"][f"{best} seed 0"]["excess_bp_day"]
    assert headline(content)["trials"] == 2
    assert best.startswith(f"HOLD={load(data_dir / 'checkpoints' / 'best.pt')['hold_bars']},")

    # what found nothing is not chosen, whatever its validation was
    path = data_dir / "checkpoints" / "tiny" / best / "best.pt"
    saved = load(path)
    saved["abstains"] = True
    feature_reducer.save_checkpoint(path, saved)
    conclude(data_dir, GRID=grid)
    (other,) = set(names) - {best}
    assert metrics_of(data_dir)["chosen by validation"] == f"{other}, of 2 combinations"


def test_a_combination_that_diverges_is_named_once_and_the_others_go_on(market_dir, tmp_path):
    data_dir, rate = copy_market(market_dir, tmp_path / "data"), "PRETRAIN_POLICY_RATE"
    flags = (*SMALL, "--pretrain-epochs", "1", "--pretrain-steps", "1", "--batches", "0")
    ended = run("train.py", data_dir, *flags, "--grid", f"{rate}=1e30,1e-4", code=1)
    (line,) = ended.stderr.splitlines()
    assert re.search(rf"run {rate}=1e\+30 .*on the validation split: .*; lower the learning rates", line)
    assert list(metrics_of(data_dir)["runs"]) == [f"{rate}=0.0001 seed 0"]


def test_the_state_of_the_run_at_work_is_shown(tmp_path, capsys):
    """The last line of its output; the second one has not begun."""
    futures = []

    def start(_: list[str], log: Path) -> Future[int]:
        futures.append(Future())
        if len(futures) == 1:
            log.parent.mkdir(parents=True)
            log.write_text("market: x\nbatch 1/4 left 2 min\n")
        Timer(1, futures[-1].set_result, [3]).start()
        return futures[-1]

    with put_back(train):
        set_constants(train, {"DATA_DIR": tmp_path, "SEEDS": (0, 1)})
        dead = train.run_all(train.plan_runs(), "tiny", {}, start, SimpleNamespace(exit_code=0))
    assert dead == {"seed-0": 3, "seed-1": 3}
    assert capsys.readouterr().out.splitlines() == ["at work: seed-0: batch 1/4 left 2 min"]


def test_a_start_that_is_refused_removes_nothing(three, trained, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    data_dir = shutil.copytree(three[0], tmp_path / "data", symlinks=True)
    before = sorted((data_dir / "checkpoints" / "tiny").rglob("*.pt"))
    prices = data_dir / "features" / "prices.parquet"
    content = prices.read_bytes()
    prices.write_bytes(content[:-100])
    assert str(prices) in refusal("train.py", data_dir, *SMALL, "--seeds", "0,1")
    prices.write_bytes(content)
    shutil.copy(trained[0] / "checkpoints" / "feature_reducer.pt", data_dir / "checkpoints")
    for flags, code, fault in (
        (("--seeds", "0,1", "--no-tie-coins"), 1, "feature_reducer.pt has TIE_COINS"),
        (("--seeds", "0,1", "--run", "x/seed-1"), 2, "'x/seed-1'"),
        (("--seeds", "0,1", "--engine", "ray"), 1, "pip install ray"),
        (("--seeds", "0,1", "--resume"), 1, "SEEDS=0,1,2"),
        (("--grid", "HOLD=6"), 2, "HOLD varies"),
    ):
        assert fault in refusal("train.py", data_dir, *SMALL, *flags, code=code)
    assert sorted((data_dir / "checkpoints" / "tiny").rglob("*.pt")) == before


def test_after_a_stop_and_two_deaths_a_resume_ends_as_if_nothing_had_happened(three, tmp_path, monkeypatch):
    """In the place of an earlier run, whose agent stays the newest one until these have ended. A resume needs
    none of the flags, not even for a seed that had not begun."""
    data_dir = shutil.copytree(three[0], tmp_path / "data", symlinks=True)
    folder, lock = data_dir / "checkpoints" / "tiny", FileLock(data_dir / "runs" / ".lock")
    flags, last = (*SMALL, "--seeds", "0,1"), folder / "seed-0" / "last.pt"
    printed, _ = stop(data_dir, [0], signal.SIGTERM, *flags)
    command = ["python", "train.py", f"--data-dir={data_dir}", "--run=tiny", "--resume"]
    assert printed.splitlines()[-1].endswith(f" {shlex.join(command)}")
    assert load(data_dir / "checkpoints" / "best.pt")["others"]
    assert not any((folder / f"seed-{seed}" / "best.pt").exists() for seed in (1, 2))

    lock.acquire()
    with start(data_dir, "--resume") as process:
        child = wait_for(lambda: child_of(process.pid, "--run=tiny/seed-0", "--resume"), process)
        child.kill()
        child.wait(60)
        whole = last.read_bytes()
        last.write_bytes(whole[:-100])  # seed 1 comes first, and waits
        lock.release()
        printed, errors = process.communicate(timeout=120)
    assert process.returncode == 1, errors
    first, second = errors.strip().splitlines()[-2:]
    assert re.search(r"seed-0 .*exit code -9.*once more", first)
    assert re.search(rf"seed-0 .*exit code 1.*{last} cannot be read", second)
    assert second.endswith(str(data_dir / "runs" / "tiny" / "seed-0" / "output.txt"))
    assert "run 1/2  seed-1  validation" in printed
    assert list(metrics_of(data_dir)["runs"]) == ["seed 0", "seed 1", "seed 2", "ensemble"]  # as before

    last.write_bytes(whole)
    run("train.py", data_dir, "--resume")
    assert_same_agents(three[0] / "checkpoints" / "tiny" / "seed-0", folder / "seed-0")
    assert list(metrics_of(data_dir)["runs"]) == ["seed 0", "seed 1", "ensemble"]

    # a resume with more batches that was stopped before its first run: the next one gives them to all
    several = folder / "several.json"
    several.write_text(json.dumps(json.loads(several.read_text()) | {"BATCHES": 6}))
    monkeypatch.setattr(train, "BATCHES", 6)
    run("train.py", data_dir, "--resume")
    assert [load(folder / f"seed-{seed}" / "last.pt")["progress"].batch for seed in (0, 1)] == [6, 6]


@pytest.fixture
def cluster() -> Iterator[tuple[subprocess.Popen, dict[str, str]]]:
    """The first process of a Ray cluster of one machine with two CPUs on loopback (Ray takes 127.0.0.1 for
    another address), and what the environment must say about it."""
    command = [
        str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--num-cpus=2",
        "--node-ip-address=127.0.0.2", "--port=0", "--include-dashboard=false", "--disable-usage-stats",
    ]  # fmt: skip
    secret = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, env=os.environ | secret, **pipes) as head:
        address = next(part[1] for line in head.stdout if (part := re.search("--address='(.+?)'", line)))
        yield head, secret | {"RAY_ADDRESS": address}
        head.terminate()


def test_a_ray_cluster_trains_the_same_agents_and_stops_and_goes_on(three, cluster, tmp_path):
    """Two at once; Ctrl-C saves both, and the end is that of the runs one after another, also where a worker
    of the cluster dies."""
    head, environment = cluster
    data_dir = copy_market(three[0], tmp_path / "data")
    folder, lock = data_dir / "checkpoints" / "tiny", FileLock(data_dir / "runs" / ".lock")
    flags = (*SMALL, "--seeds", "0,1,2", "--engine", "ray")
    _, errors = stop(data_dir, [0, 1], signal.SIGINT, *flags, **environment)
    assert "Traceback" not in errors
    assert not (folder / "seed-2" / "last.pt").exists()  # two CPUs: it waited, and never began
    for seed in (0, 1):
        assert "stopped after" in (data_dir / "runs" / "tiny" / f"seed-{seed}" / "output.txt").read_text()
    lock.acquire()
    with start(data_dir, *flags, "--resume", **environment) as process:
        child = wait_for(lambda: child_of(head.pid, "--run=tiny/seed-1", "--resume"), process)
        assert {"--scale=small", "--device=cpu"} <= set(child.cmdline())  # whatever that machine has
        child.parent().kill()
        lock.release()
        printed, errors = process.communicate(timeout=180)
    assert process.returncode == 0, printed + errors
    (death,) = (line for line in errors.splitlines() if "died" in line)
    assert re.search("seed-1 .*exit code -9", death)
    assert not child.is_running()
    for seed in range(3):
        assert_same_agents(three[0] / "checkpoints" / "tiny" / f"seed-{seed}", folder / f"seed-{seed}")
    assert metrics_of(data_dir)["runs"] == metrics_of(three[0])["runs"]


def test_trials_of_runs_side_by_side_are_all_kept(tmp_path):
    path = tmp_path / "runs" / "trials.csv"
    rows = [{"time": str(row), "run": name} for row in range(10) for name in "abcd"]
    with ThreadPoolExecutor(4) as pool:  # the lock is a file's: threads are as good as processes
        list(pool.map(partial(portfolio_env.append_trial, path), rows))
    assert portfolio_env.read_trials(path)["run"].value_counts().tolist() == [10] * 4


def test_walk_forward_folds_are_runs_whose_accounts_are_stitched(market_dir, tmp_path):
    """One curve over the second half, each part by an agent of its time; trained by Ray on this machine."""
    data_dir = copy_market(market_dir, tmp_path / "data")
    with start(data_dir, *SMALL, "--walk-forward", "2", "--seeds", "0,3", "--engine", "ray") as process:
        texts = process.communicate(timeout=300)
    assert process.returncode == 0, texts
    content = metrics_of(data_dir)
    (headline,) = content["skill"]
    assert headline == "agent (ensemble of 2 seeds, 2 folds)"
    folds = getData.walk_forward_splits(*getData.load_prices(data_dir), 2)
    days = (folds[1]["test"][1] - folds[0]["test"][0]) / 86_400_000
    assert content["test"][headline]["days"] == pytest.approx(days, abs=0.02)
    parts = [row["days"] for name, row in content["runs"].items() if name.startswith("fold ")]
    assert sum(parts) == pytest.approx(content["test"][headline]["days"])
    assert len(parts) == 2
    trials = pd.read_csv(data_dir / "runs" / "trials.csv").set_index("run")
    names = [f"tiny/fold-{fold}/seed-{seed}" for fold in (1, 2) for seed in (0, 3)]
    assert sorted(trials.index) == sorted(["tiny", *names])
    assert trials.loc[names, "test_bp_day"].isna().all()  # a fold alone is no account

    # the agents at the end, which do not hold all alike: the second of seed 3 takes over what the first held
    orders, before = [], None
    frames, _ = getData.load_features(data_dir)
    for number, fold in enumerate(folds, 1):
        path = data_dir / "checkpoints" / "tiny" / f"fold-{number}" / "seed-3" / "best.pt"
        saved = load(path)
        assert saved["market"]["splits"] == fold
        # the normalisation of each fold knows nothing that came after its training
        assert same_tensors(saved["normalisation"], feature_reducer.fit_normalisation(frames, fold["train"]))
        shutil.copy(path.with_name("final.pt"), path)
        with put_back(train):
            train.DATA_DIR, train.CHECKPOINT = data_dir, str(path)
            setup, _ = train.open_agent(CPU, False)
        first, stop = map(int, np.searchsorted(setup.windows.times, fold["test"]))
        stop -= 2 * (number == 2)  # nothing follows the last bar
        setup = replace(setup, spans={"test": (first, stop)})
        before = train.account_of(setup, orders[0], first) if orders else None
        orders.append(train.agent_orders(setup, "test", before))
    weights_seen, ends = [], iter([*orders[0], np.zeros(4)])

    def follow(_: int, weights: np.ndarray) -> np.ndarray | None:
        weights_seen.append(weights)
        return order if (order := next(ends)).any() else None

    portfolio_env.backtest(follow, *setup.prices, first - len(orders[0]), first + 1, cost=setup.env.cost)
    np.testing.assert_allclose(before.weights_seen, weights_seen[-1], atol=1e-12)
    assert np.abs(orders[1][0] - train.agent_orders(setup, "test")[0]).max() > 1e-6
    account = train.account_of(setup, np.concatenate(orders), stop)
    with put_back(train):
        train.DATA_DIR, train.SEEDS, train.WALK_FORWARD = data_dir, (0, 3), 2
        outcomes = [train.outcome_of(plan, "tiny") for plan in train.plan_runs() if plan.seed == 3]
        features = train.shared_features("tiny/")
        load_data = partial(train.load_data, CPU, False, features)
        data = {one.fold: load_data(one.agent, one.agent["market"]["splits"]) for one in outcomes}
        tested = train.test_as_one(outcomes, data)[1]
    np.testing.assert_allclose(tested.weights, account.weights, atol=1e-9)
    assert load(data_dir / "checkpoints" / "best.pt")["market"]["splits"] == folds[1]


def test_a_combination_is_compared_with_every_validation_of_all():
    """With folds, which choose by themselves, their p-values count together, times the combinations."""
    rng = np.random.default_rng(0)

    def outcome(
        combination: str, fold: int, seed: int, days: np.ndarray, abstains: bool = False, p: float = np.nan
    ) -> train.Outcome:
        progress = train.Progress(
            run="a", started="", pretrain_encoder_rate=0.1, best_days=days.tolist(), block=3.0, p_value=p,
            validations={"12": [days.tolist(), (days - 1).tolist()], "48": rng.normal(size=(9, 60)).tolist()},
        )  # fmt: skip
        return train.Outcome(
            name="", combination=combination, seed=seed, hold_bars=12, validation=0.0, abstains=abstains,
            fold=fold, trial={}, path=Path(), agent={}, progress=progress,
        )  # fmt: skip

    good, noise = rng.normal(size=60) + 0.6, rng.normal(size=60)
    alone = {
        "A": [outcome("A", 0, 0, good)],
        "B": [outcome("B", 0, 0, noise)],
        "C": [outcome("C", 0, 0, good, True)],
    }
    names, p_values = train.combinations_above_chance(alone)
    every = [
        days for (one,) in alone.values() for of_hold in one.progress.validations.values() for days in of_hold
    ]
    above, expected, _ = portfolio_env.above_chance(np.transpose([good, noise, 0 * good, *every]), 3.0)
    assert names == ["A"]
    assert list(p_values.values()) == expected[:3].tolist()
    assert above[:3].tolist() == [True, False, False]

    folds = {
        name: [outcome(name, fold, 0, good, p=p) for fold, p in enumerate(ps, 1)]
        for name, ps in (
            ("A", (0.5, 0.005)),
            ("B", (0.009, np.nan)),
            ("C", (np.nan, np.nan)),
            ("D", (0.012, 0.011)),
        )
    }
    names, p_values = train.combinations_above_chance(folds)
    assert names == ["A", "D"]  # Simes: the smaller p-value of two counts twice, the larger once
    np.testing.assert_allclose(list(p_values.values()), [8 * 0.005, 8 * 0.009, np.nan, 4 * 0.012])
