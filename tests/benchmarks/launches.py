"""Kernels that a GPU would launch, and waits for it, in a step of each part of a training; needs no GPU.

ATen calls that are no views stand for kernels. Eight blocks, 32 decisions of pretraining, 128 of a rollout;
one decision after another, and in sweeps. What is drawn at random, on the CPU, is not counted.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parents[2]))
import feature_reducer
import getData
import train

VIEWS = """_local_scalar_dense _unsafe_view alias as_strided chunk detach diagonal empty empty_like
empty_strided expand is_same_size lift_fresh narrow new_empty new_empty_strided numel permute select slice
split split_with_sizes squeeze t transpose unbind unflatten unsqueeze view"""


class _Reads(TorchFunctionMode):
    """Counts tensors that are read as a whole."""

    reads = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.reads += getattr(function, "__name__", "") in ("tolist", "numpy", "cpu")
        return function(*args, **(kwargs or {}))


class _Calls(TorchDispatchMode):
    """Counts kernels, and those that end with a wait; not Adam's count of its steps, which is on the CPU."""

    kernels = waits = 0

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        super().__init__()
        self.optimizers = optimizers

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name == "_local_scalar_dense":
            states = [state["step"] for one in self.optimizers for state in one.state.values()]
            self.waits += all(args[0] is not step for step in states)
        masks = args[1] if name in ("index", "index_put_") else ()
        self.waits += name in ("equal", "is_nonzero", "nonzero", "masked_select")
        self.waits += any(mask is not None and mask.dtype == torch.bool for mask in masks)
        self.kernels += name not in VIEWS.split()
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def counted(optimizers: Sequence[torch.optim.Optimizer] = ()) -> Iterator[list[int]]:
    """Give a list that holds kernels and waits at the end of the `with` block."""
    counts: list[int] = []
    with _Reads() as reads, _Calls(optimizers) as calls:
        yield counts
    counts += [calls.kernels, calls.waits + reads.reads]


def count_parts(
    setup: train.Setup, optimizers: Sequence[torch.optim.Optimizer], sweeps: int
) -> dict[str, list]:
    """Count a pretraining step, a rollout, and the update of its one minibatch."""
    run = SimpleNamespace(policy=setup.policy, reducer=setup.reducer, optimizers=optimizers)
    run.progress = train.Progress(run="", started="", pretrain_encoder_rate=1e-4, sweeps=sweeps)
    run.scaler = torch.amp.GradScaler("cpu", enabled=False)
    draws, draw_segments = train.draw_rollout(setup, 0, 0.05), train.draw_segments
    segments = draw_segments(
        setup, train.PRETRAIN_SEGMENTS, train._PRETRAIN_DECISIONS, train.generator_for(0)
    )
    train.draw_segments = lambda *_: segments
    try:
        with counted(optimizers) as pretraining:
            train.pretrain_step(setup, run, 1)
    finally:
        train.draw_segments = draw_segments
    steps = len(draws.explores)
    rows = train.segment_rows(draws.starts, steps, setup.env.hold_bars)
    coins, masked = draws.permutation.coins.repeat(steps + 1, 1), draws.masked.flatten(0, 1)
    tokens = train.encode(setup.policy, setup.reducer, setup.windows, rows, 512, coins, masked)
    with counted() as rolling:
        tokens = tokens.unflatten(0, (steps + 1, -1))
        rollout = train.collect_rollout(setup, tokens, draws, 0.5, train._ROLLOUT_SWEEPS * (sweeps > 0))
    with counted(optimizers) as updating:
        train.update(setup, run, rollout)
    return {"pretraining step": pretraining, "rollout": rolling, "update": updating}


def count_evaluation(policy: Callable, decisions: int, width: int) -> list[int]:
    """Count the decisions of a split, without the encoding."""
    tokens = torch.randn(decisions, 11, width)
    mark = 1 + 0.01 * torch.rand(decisions, 11, dtype=torch.float64)
    with counted() as counts, torch.no_grad():
        train.agent_targets(policy, tokens, mark, -(-decisions // train._SEGMENT))
    return counts


def make_setup() -> train.Setup:
    """Random features and prices of ten coins, full depth, small widths."""
    getData.choose_scale(vars(train), "full")
    train.NUM_ENVS, train.REPLICAS, train.PRETRAIN_SEGMENTS, train.MINIBATCH = 2, 2, 4, 256
    rng, bars = np.random.default_rng(0), 4_000
    index = pd.to_datetime((np.arange(bars) + 1) * 300_000, unit="ms", utc=True)
    columns = [f"COIN{coin}.{name}" for coin in range(10) for name in "ab"]
    frames = {"5m": pd.DataFrame(rng.normal(size=(bars, 20)).astype(np.float32), index, columns)}
    windows = feature_reducer.FeatureWindows(frames, (6,), train=(0, bars * 300_000))
    prices = np.exp(0.001 * rng.normal(size=(2, bars, 10)).cumsum(1))
    data = train.Data(
        device=torch.device("cpu"), amp=False, footer={}, windows=windows, prices=tuple(prices),
        train_rows=torch.arange(100, 3_900), spans={"train": (100, 3_900)},
    )  # fmt: skip
    reducer = feature_reducer.FeatureReducer(windows.input_dim, 55, 44, 10)
    return train.build_setup(
        data, train.ActorCritic(44, 11, (44, 33), 24, feed_forward=48, tied=True), reducer, 1
    )


def make_optimizers(setup: train.Setup) -> tuple[torch.optim.Optimizer, ...]:
    """Make those of a training, Adam as on a GPU: all weights at once."""
    optimizers = train.make_optimizers(setup.policy, setup.reducer)
    optimizers[0].param_groups[0]["foreach"] = True
    return optimizers


def main() -> None:
    setup = make_setup()
    optimizers = make_optimizers(setup)
    for sweeps in (0, 3, 4):
        for part, (kernels, waits) in count_parts(setup, optimizers, sweeps).items():
            print(f"sweeps {sweeps}  {part:18} kernels {kernels:7,}  waits {waits}")
    kernels, waits = count_evaluation(setup.policy, 9_600, setup.policy.width)
    print(f"evaluation of 9,600 decisions: kernels {kernels:,}  waits {waits}")


if __name__ == "__main__":
    main()
