"""Several processes, as torchrun starts them: gloo over loopback."""

import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import AGENT, REDUCER, ROOT, WINDOW, copy_market, load, run
from forked import Script

import feature_reducer

LOOPBACK = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
# small steps: keys' biases, which cancel in attention, move by the rate whatever the rounding says
RATES = ("--policy-rate", "3e-5", "--encoder-rate", "3e-6")
RANDOM = (*WINDOW, "--hidden-dim", "34", "--latent-dim", "16", *AGENT, "--pretrain-steps", "12", *RATES)
NO_GRADIENT = ("actor.bias", "norm.bias")  # cancel in the logits: pretraining moves them by rounding alone


def start(
    script: str, data_dir: Path, *flags: str, other: Path | None = None, second: tuple[str, ...] = ()
) -> list[Script]:
    """Two processes of one training, as torchrun starts them; the second may have other folders, flags."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
    }
    return [
        Script(
            [ROOT / script, "--data-dir", folder, *flags, *(second if rank else ())],
            os.environ | LOOPBACK | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank, folder in enumerate((data_dir, other or data_dir))
    ]


def end(processes: list[Script]) -> list[tuple[int, str, str]]:
    """Exit code, output and errors of each process."""
    try:
        ends = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *texts) for process, texts in zip(processes, ends, strict=True)]


def wait_for(process: Script, beginning: str) -> None:
    """Read what the process prints until a line begins so."""
    if not any(line.startswith(beginning) for line in process.stdout):
        raise AssertionError(process.communicate())


def assert_close(first: Path, second: Path) -> None:
    """The same weights, to the rounding of sums in another order."""
    before, after = load(first), load(second)
    for part in {"reducer", "policy"} & before.keys():
        for name, weights in before[part].items():
            if name not in NO_GRADIENT:
                torch.testing.assert_close(after[part][name], weights, rtol=1e-3, atol=1e-4, msg=name)


@pytest.fixture(scope="module")
def alone(market_dir, tmp_path_factory) -> Path:
    """The data folder of a training in one process."""
    data_dir = copy_market(market_dir, tmp_path_factory.mktemp("processes") / "data")
    run("train.py", data_dir, *RANDOM)
    return data_dir


def test_two_processes_train_the_agent_that_one_does(alone, market_dir, tmp_path):
    """Started by torchrun itself: equal logs, weights and report; one voice, no file twice."""
    data_dir = copy_market(market_dir, tmp_path / "data")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    command = [
        *torchrun,
        "--nproc-per-node",
        "2",
        "--",
        str(ROOT / "train.py"),
        "--data-dir",
        str(data_dir),
        *RANDOM,
    ]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | LOOPBACK, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("batch     4/4") == result.stdout.count("report:") == 1
    for name in ("pretrained.pt", "best.pt", "final.pt"):
        assert_close(alone / "checkpoints" / name, data_dir / "checkpoints" / name)
    for name in ("metrics.csv", "pretrain/metrics.csv"):
        one, two = (pd.read_csv(folder / "runs" / "tiny" / name) for folder in (alone, data_dir))
        assert one.columns.tolist() == two.columns.tolist()
        for column in one.columns[
            ~one.columns.str.contains("per_second|accuracy")
        ]:  # accuracy is of a sample
            np.testing.assert_allclose(two[column], one[column], rtol=0.02, atol=1e-4, err_msg=column)
    trials = pd.read_csv(data_dir / "runs" / "trials.csv")
    assert len(trials) == 1
    before = pd.read_csv(alone / "runs" / "trials.csv")
    assert trials["test_bp_day"].tolist() == pytest.approx(before["test_bp_day"].tolist(), abs=0.1)


def test_two_processes_train_the_reducer_that_one_does(market_dir, tmp_path):
    one, two = (copy_market(market_dir, tmp_path / name) for name in ("one", "two"))
    flags = (*WINDOW, *REDUCER, "--init", "random", "--learning-rate", "0.001")
    run("feature_reducer.py", one, *flags)
    ends = end(start("feature_reducer.py", two, *flags))
    assert [code for code, *_ in ends] == [0, 0], ends
    assert [texts[0].count("checkpoint:") for _, *texts in ends] == [1, 0]
    for name in ("feature_reducer.pt", "feature_reducer_last.pt"):
        assert_close(one / "checkpoints" / name, two / "checkpoints" / name)
    logs = [pd.read_csv(folder / "runs" / "feature_reducer" / "metrics.csv") for folder in (one, two)]
    pd.testing.assert_frame_equal(*logs, rtol=1e-3, atol=1e-4)
    assert logs[0]["train_mse"].iloc[-1] < 0.98 * logs[0]["train_mse"].iloc[0]


def test_a_training_goes_on_in_another_number_of_processes(alone, market_dir, tmp_path):
    """One process, stopped in pretraining; two, one of which is told to stop; one: as if never stopped."""
    data_dir = copy_market(market_dir, tmp_path / "data")
    with Script([ROOT / "train.py", "--data-dir", data_dir, *RANDOM], os.environ | LOOPBACK) as first:
        wait_for(first, "pretrain  1/2")
        first.send_signal(signal.SIGTERM)
        assert first.wait(60) == 143
    assert not load(data_dir / "checkpoints" / "last.pt")["progress"].pretrained
    both = start("train.py", data_dir, *RANDOM, "--resume")
    wait_for(both[0], "batch     1/4")
    both[1].send_signal(signal.SIGINT)  # the other one stops after the same batch
    ends = end(both)
    assert [code for code, *_ in ends] == [130, 130], ends
    assert "go on with: python train.py" in ends[0][1]
    assert load(data_dir / "checkpoints" / "last.pt")["progress"].batch in (2, 3)
    run("train.py", data_dir, *RANDOM, "--resume")
    assert_close(alone / "checkpoints" / "final.pt", data_dir / "checkpoints" / "final.pt")
    logs = [pd.read_csv(folder / "runs" / "tiny" / "metrics.csv") for folder in (alone, data_dir)]
    assert logs[1]["step"].tolist() == [1, 2, 3, 4]
    np.testing.assert_allclose(logs[1]["policy_loss"], logs[0]["policy_loss"], rtol=0.02, atol=1e-4)


def test_a_process_that_dies_ends_the_training_in_one_line(market_dir, tmp_path):
    data_dir = copy_market(market_dir, tmp_path / "data")
    both = start("train.py", data_dir, *RANDOM, "--batches", "4000")
    wait_for(both[0], "batch     3/")
    both[1].kill()
    (code, _, errors), (killed, _, nothing) = end(both)
    assert (code, killed, nothing) == (1, -signal.SIGKILL, "")
    assert errors.splitlines() == [
        "error: another process of this training ended: start all again, with --resume"
    ]
    assert load(data_dir / "checkpoints" / "last.pt")["progress"].batch >= 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((*RANDOM, "--num-envs", "3"), "NUM_ENVS 3 must be divisible by the 2 processes"),
        (
            (*RANDOM, "--seeds", "0,1"),
            "several runs need a process each, not 2 for one: start without torchrun",
        ),
        (("--job", "evaluate"), "--job evaluate is work for one process: start it without torchrun"),
        (
            (*RANDOM, "--seed", "1", "--resume"),
            "needs the constants of the stopped run, which had SEED = 0",
        ),
    ],
)
def test_a_mistake_of_all_processes_is_one_line(alone, tmp_path, flags, message):
    data_dir = shutil.copytree(alone, tmp_path / "data")
    ends = end(start("train.py", data_dir, *flags))
    assert all(code in (1, 2) for code, *_ in ends)
    (line,) = "".join(errors for *_, errors in ends).strip().splitlines()
    assert line.startswith("error: ")
    assert message in line


def test_processes_with_other_bars_are_refused(market_dir, martingale_dir, tmp_path):
    first, second = (
        copy_market(market, tmp_path / name) for market, name in ((market_dir, "a"), (martingale_dir, "b"))
    )
    ends = end(start("train.py", first, *RANDOM, other=second))
    errors = "".join(errors for *_, errors in ends).strip()
    assert errors.startswith(
        "error: the processes differ in bars, splits or feature_reducer.pt: give all of them"
    )
    assert len(errors.splitlines()) == 1


def test_processes_with_other_constants_are_refused(alone, tmp_path):
    first, second = start("train.py", copy_market(alone, tmp_path / "data"), *RANDOM, second=("--seed", "1"))
    errors = "".join(errors for *_, errors in end([first, second])).strip()
    assert (
        errors == "error: the processes differ in constants: give all of them the same flags and --data-dir"
    )


def test_uneven_shares_and_folds(market_dir, tmp_path):
    """Segments and minibatches that two processes cannot halve, and one walk-forward fold of two."""
    flags = (*RANDOM, "--pretrain-segments", "5", "--minibatch", "7", "--walk-forward", "2", "--fold", "2")
    flags += ("--hold", "0", "--holds", "12,6", "--probe-epochs", "1")
    one, two = (copy_market(market_dir, tmp_path / name) for name in ("one", "two"))
    run("train.py", one, *flags)
    ends = end(start("train.py", two, *flags))
    assert [code for code, *_ in ends] == [0, 0], ends
    for name in ("best.pt", "final.pt"):
        assert_close(one / "checkpoints" / name, two / "checkpoints" / name)
    trials = [pd.read_csv(folder / "runs" / "trials.csv").set_index("run") for folder in (one, two)]
    assert trials[0].index.tolist() == trials[1].index.tolist()  # the run, and each interval that was tried
    assert len(trials[0]) == 3
    for name in ("validation_bp_day", "test_bp_day"):
        np.testing.assert_allclose(trials[1][name], trials[0][name], atol=0.1)


def test_the_exit_code_is_that_of_the_first_process(market_dir, tmp_path):
    """None ends before the first has written its files; a file that it could not write is everybody's 5."""
    data_dir = copy_market(market_dir, tmp_path / "data")
    (data_dir / "checkpoints" / "tiny" / "final.pt").mkdir(parents=True)  # nothing can be renamed to it
    ends = end(start("train.py", data_dir, *RANDOM))
    assert [code for code, *_ in ends] == [5, 5], ends


def test_shares_are_everything_once():
    """Of any count and number of processes, and weights of sum 1; one that would be empty weighs nothing."""
    for count in range(1, 30):
        for processes in range(1, 9):
            parts = []
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(feature_reducer, "world_size", lambda processes=processes: processes)
                for number in range(processes):
                    patch.setattr(feature_reducer, "rank", lambda number=number: number)
                    parts.append(feature_reducer.share(count))
            chosen = [index for part, weight in parts if weight for index in range(count)[part]]
            assert chosen == list(range(count))
            assert sum(weight for _, weight in parts) == pytest.approx(1)
            for part, weight in parts:
                assert weight in (0, len(range(count)[part]) / count)
                assert len(range(count)[part]) >= 1
