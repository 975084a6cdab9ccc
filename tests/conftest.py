"""What several test files share: small markets, tiny flags, runs of the scripts, a trained data folder."""

import importlib
import io
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import is_dataclass
from pathlib import Path
from types import ModuleType

os.environ["OMP_NUM_THREADS"] = "1"  # everything here is tiny: more threads only wait for each other

import pandas as pd
import pytest
import torch
from filelock import FileLock
from forked import Output, Script
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
REDUCER = ("--hidden-dim", "34", "--latent-dim", "16", "--pca-windows", "200",
           "--windows-per-epoch", "512", "--epochs", "2", "--batch-size", "64")  # fmt: skip
AGENT = ("--trunk", "16,12", "--token-width", "8", "--heads", "2", "--blocks", "1",
         "--pretrain-epochs", "2", "--pretrain-steps", "2", "--pretrain-segments", "2",
         "--batches", "4", "--num-envs", "2", "--steps", "12", "--minibatch", "8", "--update-epochs", "2",
         "--hold", "12", "--validate-every", "2", "--run", "tiny")  # fmt: skip
# an encoder that starts at random, and no report
ALONE = (*WINDOW, "--hidden-dim", "34", "--latent-dim", "16", *AGENT, "--no-test")
FORMS = {
    "last": train.AgentState,
    "feature_reducer": feature_reducer.ReducerCheckpoint,
    "feature_reducer_last": feature_reducer.ReducerState,
}


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    """Give signals back to pytest: a script that has ended leaves others' actions, or the default ones."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, action in before.items():
        signal.signal(number, action)


def make_market(data_dir: Path, *flags: str) -> Path:
    """Run getData.py into data_dir: 3 coins, 110 days, unless flags say otherwise.

    Three of them are validated on: too few for an interval, so that the best agent is what grows most.
    """
    few = "--symbols", COINS, "--days", "110", "--purge-days", "9"
    run("getData.py", data_dir, "--source", "synthetic", *few, *flags)
    return data_dir


@contextmanager
def put_back(script: ModuleType) -> Iterator[None]:
    """Give a script its constants back at the end: main sets those that are given as flags."""
    before = {name: value for name, value in vars(script).items() if name.isupper()}
    try:
        yield
    finally:
        vars(script).update(before)


def set_constants(script: ModuleType, values: dict[str, object]) -> None:
    """Give a script other constants than those of full scale, and let it check all of them."""
    getData.choose_scale(vars(script), "full")
    getData.assign_constants(vars(script), values)
    getattr(script, "check_constants", lambda: None)()


def run(
    script: str, data_dir: Path, *flags: object, code: int = 0, stop_at: str = "\0",
    sent: signal.Signals = signal.SIGTERM,
) -> subprocess.CompletedProcess:  # fmt: skip
    """Run a script as its last lines do, but in this process, which saves 5 seconds of imports; it must end
    with this exit code. With the line that begins with `stop_at` it gets the signal `sent`."""
    module = importlib.import_module(script.removesuffix(".py"))
    command = [script, "--data-dir", str(data_dir), *map(str, flags)]
    out, err = Output(io.BytesIO(), stop_at, sent), Output(io.BytesIO())
    with pytest.MonkeyPatch.context() as patch, put_back(module), redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", command)
        with pytest.raises(SystemExit) as end:
            getData.run_script(module.main)
    texts = (stream.buffer.getvalue().decode() for stream in (out, err))
    result = subprocess.CompletedProcess(command, end.value.code, *texts)
    assert result.returncode == code, result.stdout + result.stderr
    return result


def refusal(script: str, data_dir: Path, *flags: object, code: int = 1) -> str:
    """Return the line with which a script ends."""
    (line,) = run(script, data_dir, *flags, code=code).stderr.splitlines()
    return line.removeprefix("error: ")


def load(path: Path) -> dict:
    """A checkpoint, checked to be what its name says."""
    return feature_reducer.load_checkpoint(path, FORMS.get(path.stem, train.AgentCheckpoint))


def copy_market(market_dir: Path, target: Path) -> Path:
    """A folder of its own for checkpoints, with the shared bars and features."""
    for name in ("ohlcv", "features"):
        shutil.copytree(market_dir / name, target / name)
    return target


def copy_reducer(trained: Path, target: Path) -> Path:
    """The same with the trained reducer, before any agent."""
    (copy_market(trained, target) / "checkpoints").mkdir()
    shutil.copy(trained / "checkpoints" / "feature_reducer.pt", target / "checkpoints")
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
    data_dir: Path, places: list[str], *flags: str, sent: signal.Signals = signal.SIGTERM,
    after_first: Callable[[], object] = lambda: None,
) -> None:  # fmt: skip
    """Run train.py, and stop it with the lines that begin with `places`, each time resumed with constants
    that may change; then resume it to the end."""
    for number, place in enumerate(places):
        own = ("--resume", "--no-test", "--save-minutes", "0") if number else flags
        stopped = run("train.py", data_dir, *own, code=128 + sent, stop_at=place, sent=sent)
        (advice,) = (line for line in stopped.stdout.splitlines() if "go on with: " in line)
        own = [f"--data-dir={data_dir}", "--run=tiny", "--no-test"] + ["--save-minutes=0.0"] * bool(number)
        command = shlex.split(advice.split("go on with: ")[1])
        assert (command[:2], set(command[2:])) == (["python", "train.py"], {*own, "--resume"})
        trials = pd.read_csv(data_dir / "runs" / "trials.csv")  # what was looked at has been tried
        assert trials.loc[trials["run"] == "tiny", "validation_bp_day"].isna().tolist() == [True]
        if not number:
            after_first()
    run("train.py", data_dir, "--resume", "--no-test")


def assert_same_runs(data_dir: Path, stopped: Path) -> None:
    """Checkpoints equal bit for bit, the same log but for the clock, and one trial."""
    for name in ("final", "best", "last"):
        first, second = (load(folder / "checkpoints" / f"{name}.pt") for folder in (data_dir, stopped))
        if name == "last":
            for clock in ("seconds", "started"):
                setattr(second["progress"], clock, getattr(first["progress"], clock))
        assert same_tensors(first, second), name
    logs = [pd.read_csv(folder / "runs" / "tiny" / "metrics.csv") for folder in (data_dir, stopped)]
    pd.testing.assert_frame_equal(*(log.loc[:, ~log.columns.str.contains("second")] for log in logs))
    trials = pd.read_csv(stopped / "runs" / "trials.csv").set_index("run")
    assert trials.loc[["tiny"], "validation_bp_day"].notna().tolist() == [True]


def killed_runs(script: str, data_dir: Path, places: list[str], *flags: object) -> None:
    """Run a script, killed at each of `places` (see `forked.Script`), and at last to its end. What stands
    under its final name after a kill must load."""
    for number, place in enumerate(places):
        command = [ROOT / script, "--data-dir", data_dir, *flags, "--save-minutes", "0"]
        with Script([*command, *["--resume"] * bool(number)], stop_at=place) as process:
            texts = process.communicate(timeout=300)
        assert process.returncode == -signal.SIGKILL, texts
        assert any(data_dir.rglob("*.tmp")) == place.endswith(".tmp")
        for path in data_dir.rglob("*.pt"):
            load(path)
    run(script, data_dir, *flags, "--resume")
    assert not any(data_dir.rglob("*.tmp"))


def metrics_of(data_dir: Path, report: str = "tiny") -> dict:
    return json.loads((data_dir / "reports" / report / "metrics.json").read_text())


def headline(content: dict, part: str = "skill") -> dict:
    """The figures of the first agent."""
    return next(iter(content[part].values()))


def open_agent(data_dir: Path, checkpoint: str = "best.pt") -> train.Setup:
    """What the jobs other than training work on."""
    with put_back(train):
        train.DATA_DIR, train.CHECKPOINT = data_dir, checkpoint
        return train.open_agent(torch.device("cpu"), False)[0]


def printed_once(factory: pytest.TempPathFactory, name: str, make: Callable) -> tuple[Path, str]:
    """A folder that `make` has filled, once for all of pytest-xdist's processes, and what `make` returned."""
    root = factory.getbasetemp()
    folder = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / name
    done = folder.with_suffix(".done")
    with FileLock(folder.with_suffix(".lock")):
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)  # of a `make` that failed
            printed = str(make(folder))
            done.write_text(printed)
    return folder, done.read_text()


@pytest.fixture(scope="session")
def market_dir(tmp_path_factory) -> Path:
    """Bars and features of 3 coins, 110 days, with the planted drift. Read only: copy it to change it."""
    return printed_once(tmp_path_factory, "market", make_market)[0]


@pytest.fixture(scope="session")
def martingale_dir(tmp_path_factory) -> Path:
    """The same without any planted drift: nothing can be predicted. Read only."""
    return printed_once(tmp_path_factory, "martingale", lambda to: make_market(to, "--signal", "0"))[0]


@pytest.fixture(scope="session")
def trained(market_dir, tmp_path_factory) -> tuple[Path, str]:
    """A data folder after feature_reducer.py and train.py, and what train.py printed. Read only: copy it."""

    def train_both(folder: Path) -> str:
        run("feature_reducer.py", copy_market(market_dir, folder), *WINDOW, *REDUCER)
        return run("train.py", folder, *AGENT).stdout

    return printed_once(tmp_path_factory, "pipeline", train_both)
