"""What several test files share: small markets, tiny flags, runs of the scripts, a trained data folder."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import is_dataclass
from pathlib import Path
from types import ModuleType

os.environ["OMP_NUM_THREADS"] = "1"  # everything here is tiny: more threads only wait for each other

import numpy as np
import pandas as pd
import pytest
import torch
from filelock import FileLock
from forked import Script
from hypothesis import settings

import feature_reducer
import getData
import train

# a suite started in the background inherits "ignore Ctrl-C", and so would the scripts that tests interrupt
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
settings.register_profile("patient", deadline=None)  # a busy machine is no failure
settings.load_profile("patient")

ROOT = Path(__file__).parents[1]
COINS = "BTCUSDT,ETHUSDT,SOLUSDT"
REAL_BARS = ROOT.parent / "shared" / "market" / "dev"
WINDOW = ("--window-bars", "6,4,3,2,1")
REDUCER = ("--hidden-dim", "34", "--latent-dim", "16", "--pca-windows", "200", "--validation-windows", "200",
           "--windows-per-epoch", "512", "--epochs", "2", "--batch-size", "64")  # fmt: skip
POLICY = ("--trunk", "16,12", "--token-width", "8", "--heads", "2", "--feed-forward", "16", "--blocks", "1")
AGENT = (*POLICY, "--pretrain-epochs", "2", "--pretrain-steps", "3", "--pretrain-segments", "4",
         "--pretrain-decisions", "6", "--batches", "4", "--num-envs", "2", "--steps", "12",
         "--minibatch", "8", "--update-epochs", "2", "--hold", "12", "--rolling", "2",
         "--validate-every", "2", "--run", "tiny")  # fmt: skip
FORMS = {
    "last": train.AgentState,
    "feature_reducer": feature_reducer.ReducerCheckpoint,
    "feature_reducer_last": feature_reducer.ReducerState,
}


@pytest.fixture(autouse=True)
def interruptible() -> Iterator[None]:
    """Give Ctrl-C back to pytest: a script that has ended leaves the default actions of signals."""
    yield
    signal.signal(signal.SIGINT, signal.default_int_handler)


def make_market(data_dir: Path, *flags: str) -> Path:
    """Run getData.py into data_dir: 3 coins, 110 days, unless flags say otherwise."""
    run("getData.py", data_dir, "--source", "synthetic", "--symbols", COINS, "--days", "110", *flags)
    return data_dir


@contextmanager
def put_back(script: ModuleType) -> Iterator[None]:
    """Give a script its constants back at the end: main sets those that are given as flags."""
    before = {name: value for name, value in vars(script).items() if name.isupper()}
    try:
        yield
    finally:
        vars(script).update(before)


def run(script: str, data_dir: Path, *flags: str, code: int = 0) -> subprocess.CompletedProcess:
    command = [ROOT / script, "--data-dir", data_dir, *flags]
    with Script(command) as process:
        texts = process.communicate(timeout=300)
    result = subprocess.CompletedProcess(command, process.returncode, *texts)
    assert result.returncode == code, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    return result


def load(path: Path) -> dict:
    """A checkpoint, checked to be what its name says."""
    return feature_reducer.load_checkpoint(path, FORMS.get(path.stem, train.AgentCheckpoint))


def copy_market(market_dir: Path, target: Path) -> Path:
    """A folder of its own for checkpoints, with the shared bars and features."""
    target.mkdir()
    for name in ("ohlcv", "features"):
        shutil.copytree(market_dir / name, target / name)
    return target


def altered(content: dict, keys: list[str], value: object) -> dict:
    """A copy of nested dictionaries with another value at `keys`, or (...) without the last key."""
    content = part = dict(content)
    *outer, last = keys
    for key in outer:
        part[key] = part = dict(part[key])
    part.pop(last, None) if value is ... else part.update({last: value})
    return content


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


def stop_and_resume(
    stopped: Path, stop_after: str, *flags: str, skip: int = 0, sent: signal.Signals = signal.SIGTERM
) -> None:
    """Run train.py, send a signal when it prints a line that begins with `stop_after` (after `skip` such
    lines), then resume to the end, with constants that may change."""
    command = [str(ROOT / "train.py"), "--data-dir", str(stopped), *AGENT, *flags]
    with Script(command) as process:
        for line in process.stdout:
            skip -= line.startswith(stop_after)
            if skip < 0:
                process.send_signal(sent)
                break
        rest = process.communicate(timeout=300)
    assert process.returncode == 128 + sent, rest
    (advice,) = (line for line in rest[0].splitlines() if "go on with: " in line)
    advised = shlex.split(advice.split("go on with: ")[1])
    assert advised == ["python", "train.py", *command[1:], "--resume"]
    assert not (stopped / "reports").exists()

    def untested() -> list[bool]:
        trials = pd.read_csv(stopped / "runs" / "trials.csv")
        return trials.loc[trials["run"] == "tiny", "validation_bp_day"].isna().tolist()

    assert untested() == [True]  # what was looked at has been tried
    run("train.py", stopped, *AGENT, *flags, "--resume", "--encode-batch", "64", "--save-minutes", "0")
    assert untested() == [False]


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


def killed_runs(command: list[str], data_dir: Path, kills: int, rng: np.random.Generator) -> int:
    """Start the script again and again, each time going on from its last checkpoint where there is one (or
    anew after a training that had come to its end), and SIGKILL it: by turns at a random moment after its
    first word, and while a checkpoint is being written. Whatever stands under its final name afterwards must
    load. Returns how often a half-written file was left."""
    of_agent = "train.py" in command[0]
    folder = data_dir / "checkpoints" / ("tiny" if of_agent else "")
    last = folder / ("last.pt" if of_agent else "feature_reducer_last.pt")
    halves = 0
    for kill in range(kills):
        if (folder / "final.pt").exists():
            for name in ("pretrained", "best", "final", "last"):
                (folder / f"{name}.pt").unlink()
            shutil.rmtree(data_dir / "runs")
        resume = ["--resume"] if last.exists() else []
        with Script([*command, *resume]) as process:
            process.stdout.readline()
            if kill % 2:
                for _ in range(rng.integers(1, 5)):  # that many checkpoints, or to the end
                    for half_written in (False, True):
                        while process.poll() is None and any(folder.glob("*.tmp")) != half_written:
                            time.sleep(0.0002)
            else:
                time.sleep(rng.uniform(0, 3))
            process.kill()
        halves += any(folder.glob("*.tmp"))
        for path in folder.glob("*.pt"):
            load(path)
        for path in data_dir.rglob("*.parquet"):
            getData.read_frame(path)
    return halves


def metrics_of(data_dir: Path, report: str = "tiny") -> dict:
    return json.loads((data_dir / "reports" / report / "metrics.json").read_text())


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A folder that `make` has filled, once for all of pytest-xdist's processes. Read only: copy it."""
    root = factory.getbasetemp()
    folder = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / name
    done = folder.with_suffix(".done")
    with FileLock(folder.with_suffix(".lock")):
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)  # of a `make` that failed
            make(folder)
            done.touch()
    return folder


def printed_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], str]) -> tuple[Path, str]:
    """The folder of `made_once`, and what `make` returned."""

    def make_and_keep(folder: Path) -> None:
        printed = make(folder)
        (folder / "printed.txt").write_text(printed)

    folder = made_once(factory, name, make_and_keep)
    return folder, (folder / "printed.txt").read_text()


@pytest.fixture(scope="session")
def market_dir(tmp_path_factory) -> Path:
    """Bars and features of 3 coins, 110 days, with the planted drift. Read only: copy it to change it."""
    return made_once(tmp_path_factory, "market", make_market)


@pytest.fixture(scope="session")
def martingale_dir(tmp_path_factory) -> Path:
    """The same without any planted drift: nothing can be predicted. Read only."""
    return made_once(tmp_path_factory, "martingale", lambda folder: make_market(folder, "--signal", "0"))


@pytest.fixture(scope="session")
def trained(market_dir, tmp_path_factory) -> tuple[Path, str]:
    """A data folder after feature_reducer.py and train.py, and what train.py printed. Read only: copy it."""

    def train_both(folder: Path) -> str:
        run("feature_reducer.py", copy_market(market_dir, folder), *WINDOW, *REDUCER)
        return run("train.py", folder, *AGENT).stdout

    return printed_once(tmp_path_factory, "pipeline", train_both)
