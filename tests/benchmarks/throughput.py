"""Ratios of the hot paths, each measured against its reference in the same run.

Random features of the real shapes (10 coins x 34 channels); --full: full-scale networks (15 GB of memory).
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path

import gymnasium
import numpy as np
import pandas as pd
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
import feature_reducer
import train
from feature_reducer import FeatureReducer, FeatureWindows
from portfolio_env import VectorPortfolioEnv, drift

LENGTHS = {"5m": 300_000, "15m": 900_000, "1h": 3_600_000, "4h": 14_400_000, "1d": 86_400_000}
DAYS, BATCH = 60, 128
COLUMNS = [f"COIN{coin}.channel{channel}" for coin in range(10) for channel in range(34)]


def seconds(run: Callable[[], object], repeat: int = 5) -> float:
    """The best of a few runs: the machine may be shared."""
    best = float("inf")
    for _ in range(repeat):
        begun = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - begun)
    return best


def main() -> None:
    full = "--full" in sys.argv
    bars, dims = ((192, 96, 72, 30, 7), (3_222, 2_148)) if full else ((24, 12, 10, 6, 4), (456, 304))
    rng = np.random.default_rng(0)
    frames = {}
    for name, length in LENGTHS.items():
        count = DAYS * 86_400_000 // length
        index = pd.to_datetime((np.arange(count) + 1) * length, unit="ms", utc=True)
        values = rng.normal(size=(count, len(COLUMNS))).astype(np.float32)
        frames[name] = pd.DataFrame(values, index=index, columns=COLUMNS)
    windows = FeatureWindows(frames, bars, train=(20 * 86_400_000, 60 * 86_400_000))
    rows = torch.randint(10_000, 17_000, (BATCH,))
    batch = windows(rows)
    copy = seconds(batch.clone)
    gather = seconds(lambda: windows(rows))
    print(f"window values: {windows.input_dim:,}")
    print(f"gather {BATCH} windows: {1e3 * gather:.1f} ms, {gather / copy:.2f} x a plain copy of the result")
    stored = len(frames["5m"]) * windows.input_dim * 4
    compact = sum(frame.size * 4 for frame in frames.values())
    print(f"materialised windows / compact arrays: {stored / compact:.0f} x")

    reducer = FeatureReducer(windows.input_dim, *dims)
    with torch.no_grad():
        together = seconds(lambda: reducer.encoder(batch), 3)
        alone = seconds(lambda: [reducer.encoder(batch[k : k + 1]) for k in range(BATCH)], 1)
    print(f"encode {BATCH} windows at once: {together:.3f} s; one at a time: {alone / together:.1f} x that")

    closes = torch.from_numpy(np.exp(0.001 * rng.normal(size=(17_000, 10)).cumsum(0)))
    env = VectorPortfolioEnv(closes, closes, cost=0.001)
    generator = train.generator_for(0)
    rates = {}
    for envs in (1, 16, 256):
        target = train.random_weights(envs, 11, generator)
        env.reset(torch.arange(envs), 64)
        rates[envs] = 64 * envs / seconds(lambda target=target, envs=envs: run(env, target, envs), 3)
    print("environment steps/s: " + ", ".join(f"{envs} at once {rate:,.0f}" for envs, rate in rates.items()))
    print(f"256 at once against 1: {rates[256] / rates[1]:.0f} x")
    prices = {"open_prices": closes.numpy(), "close_prices": closes.numpy()}
    for envs, mode in ((256, "vector_entry_point"), (16, "sync")):
        many = gymnasium.make_vec("CryptoPortfolio-v0", num_envs=envs, vectorization_mode=mode, **prices)
        many.reset(seed=0)
        actions = many.action_space.sample()
        rate = (
            64 * envs / seconds(lambda many=many, actions=actions: [many.step(actions) for _ in range(64)], 3)
        )
        print(f"as gymnasium's vector environment ({mode}), {envs} at once: {rate:,.0f} steps/s")

    compare_optimizers(reducer, batch)
    compare_evaluations(train.ActorCritic(dims[1], 11) if full else small_policy(), closes)


def compare_optimizers(reducer: FeatureReducer, batch: torch.Tensor) -> None:
    """A reducer's update with the library's Adafactor, in blocks, and its matrix products alone."""
    from transformers.optimization import Adafactor

    options = {"lr": 5e-5, "scale_parameter": False, "relative_step": False, "warmup_init": False}
    scaler = torch.amp.GradScaler("cpu", enabled=False)

    def products() -> torch.Tensor:
        reducer.zero_grad(set_to_none=True)
        loss = (reducer(batch)[1] - batch).square().mean()
        loss.backward()
        return loss

    def update(optimizer: torch.optim.Optimizer) -> None:
        loss = (reducer(batch)[1] - batch).square().mean()
        feature_reducer.clipped_step(loss, [reducer], [optimizer], scaler, 1.0)

    blocks, library = (
        feature_reducer.make_adafactor(reducer, 5e-5),
        Adafactor(reducer.parameters(), **options),
    )
    alone = seconds(products, 3)
    steps = {
        name: seconds(optimizer.step, 3) for name, optimizer in {"blocks": blocks, "library": library}.items()
    }
    print(f"Adafactor of the library / in blocks: {steps['library'] / steps['blocks']:.1f} x")
    whole = {
        name: seconds(lambda optimizer=optimizer: update(optimizer), 3)
        for name, optimizer in {"blocks": blocks, "library": library}.items()
    }
    for name, time_taken in whole.items():
        print(
            f"update of {BATCH} windows, Adafactor {name}: {time_taken / alone:.2f} x its matrix products, "
            f"{steps[name] / time_taken:.0%} of it the optimizer"
        )


def small_policy() -> train.ActorCritic:
    names = {"TRUNK": "trunk", "TOKEN_WIDTH": "width", "HEADS": "heads", "BLOCKS": "blocks"}
    shape = {argument: getattr(train, name).small for name, argument in names.items()}
    shape["feed_forward"] = 4 * shape["width"]
    return train.ActorCritic(train.LATENT_DIM.small, 11, **shape)


@torch.no_grad()
def compare_evaluations(policy: train.ActorCritic, closes: torch.Tensor) -> None:
    """A split of decisions in segments side by side, and one after another; without the encoding."""
    relatives = (closes[1:6_401] / closes[:6_400]).clamp(0.9, 1.1)
    mark = torch.cat([torch.ones(len(relatives), 1, dtype=torch.float64), relatives], 1)
    tokens = torch.randn(len(mark), 11, policy.width)

    def one_after_another() -> torch.Tensor:
        weights, targets = torch.eye(11, dtype=torch.float64)[:1], []
        for row in range(len(mark)):
            targets.append(train.decide(policy, tokens[row : row + 1], weights))
            weights, _ = drift(targets[-1], mark[row : row + 1])
        return torch.cat(targets)

    segments = -(-len(mark) // train._SEGMENT)
    together = seconds(lambda: train.agent_targets(policy, tokens, mark, segments), 3)
    with train.one_thread():
        alone = seconds(one_after_another, 1)
    print(
        f"evaluation of {len(mark):,} decisions, one after another / side by side: {alone / together:.1f} x"
    )


def run(env: VectorPortfolioEnv, target: torch.Tensor, envs: int) -> None:
    env.reset(torch.arange(envs), 64)
    for _ in range(64):
        env.step(target)


if __name__ == "__main__":
    main()
