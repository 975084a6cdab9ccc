"""How much of PPO's gradient is signal, with and without each of its parts.

    python train.py --batches 0 --pretrain-epochs 0 --hold 12    the agent before any training, or another one
    python tests/benchmarks/gradient_quality.py                   that of data/checkpoints/final.pt

For each variant, gradients of the actor's loss are taken from independent batches of the same windows: the
cosine between any two of them, and with the exact gradient, that of the growth of as many segments through
the accounting, without action noise and discount. All are means over the pairs; the encoder's and the
policy's gradients are one vector.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))
import getData
import train
from train import Draws, Rollout, Setup

SEGMENTS, STEPS, EPSILON = 16, 128, 0.05
EXACT_STEPS, EXACT_SEGMENTS, EXACT_BATCHES = 32, 64, 24
VARIANTS = {  # replicas, baseline, shared random steps, gamma
    "one replica": (1, False, True, 0.5),
    "8 replicas, no baseline": (8, False, True, 0.5),
    "8 replicas, baseline, random steps of their own": (8, True, False, 0.5),
    "8 replicas, baseline, shared random steps": (8, True, True, 0.5),
    "the same, gamma 0.8": (8, True, True, 0.8),
    "the same, gamma 0.9": (8, True, True, 0.9),
    "the same, gamma 0.99": (8, True, True, 0.99),
}


def rollout_of(setup: Setup, key: int, replicas: int, baseline: bool, shared: bool) -> Rollout:
    """Return a batch of `SEGMENTS` x `STEPS` windows; the same market for the same key."""
    generator = train.generator_for(1, key)
    bars = STEPS * setup.env.hold_bars
    starts = train.draw_starts(setup.train_rows, SEGMENTS, bars, generator)
    weights = train.random_weights(SEGMENTS, setup.env.assets, generator)
    order = torch.arange(setup.env.assets - 1).expand(SEGMENTS, -1)
    masked = torch.zeros(STEPS + 1, SEGMENTS, setup.windows.coins, len(setup.windows.bars), dtype=torch.bool)
    rows = train.segment_rows(starts, STEPS, setup.env.hold_bars)
    tokens = train.encode(setup.policy, setup.reducer, setup.windows, rows, 512).unflatten(0, (STEPS + 1, -1))
    copies = 1 if shared else replicas  # each a segment of its own
    starts, weights, order = (part.repeat_interleave(copies, 0) for part in (starts, weights, order))
    tokens, masked = (part.repeat_interleave(copies, 1) for part in (tokens, masked))
    noise = train.draw_noise(STEPS, len(starts), replicas // copies, order.shape[1], EPSILON, generator)
    rollout = train.collect_rollout(
        setup, tokens, Draws(starts, weights, train.CoinOrder(order), masked, *noise)
    )
    gae = rollout.returns - rollout.value
    if baseline:
        grouped = (part.unflatten(1, (-1, replicas)) for part in (gae, rollout.alive))
        gae = train.minus_others(*grouped).flatten(1)
    return rollout._replace(advantage=gae)


def flat_gradient(setup: Setup) -> Tensor:
    """Return the gradients of encoder and policy, heads of the critic and the noise aside, as one vector."""
    policy = (
        part
        for name, part in setup.policy.named_parameters()
        if name.split(".")[0] not in ("critic", "log_std")
    )
    return torch.cat([part.grad.flatten() for part in (*policy, *setup.reducer.encoder.parameters())])


def ppo_gradient(setup: Setup, rollout: Rollout) -> Tensor:
    """Return the gradient that `update` would step along, if all windows were one minibatch."""
    optimizers = [torch.optim.SGD(module.parameters(), lr=0.0) for module in setup.modules().values()]
    train.update(setup, rollout, 0, optimizers, torch.amp.GradScaler("cpu", enabled=False))
    return flat_gradient(setup)


def exact_gradient(setup: Setup) -> Tensor:
    """Return the gradient of minus the growth of many segments through the accounting."""
    optimizers = [torch.optim.SGD(module.parameters(), lr=0.0) for module in setup.modules().values()]
    total = torch.zeros(())
    for batch in range(EXACT_BATCHES):
        generator = train.generator_for(2, batch)
        bars = EXACT_STEPS * setup.env.hold_bars
        starts = train.draw_starts(setup.train_rows, EXACT_SEGMENTS, bars, generator)
        weights = train.random_weights(EXACT_SEGMENTS, setup.env.assets, generator)
        order = train.CoinOrder(torch.arange(setup.env.assets - 1).expand(EXACT_SEGMENTS, -1))
        masked = torch.zeros(EXACT_STEPS + 1, EXACT_SEGMENTS, setup.windows.coins, len(setup.windows.bars))
        loss, *_ = train.pretrain_loss(setup, starts, weights, order, masked.bool())
        train.optimizer_step(loss, setup, optimizers, torch.amp.GradScaler("cpu", enabled=False))
        total = total + flat_gradient(setup)
    return total


def cosines(first: Sequence[Tensor], second: Sequence[Tensor] | None = None) -> float:
    """Return the mean cosine of all pairs within `first`, or between `first` and `second`."""
    pairs = combinations(first, 2) if second is None else [(a, b) for a in first for b in second]
    return float(torch.stack([torch.cosine_similarity(a, b, 0) for a, b in pairs]).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data-dir", type=Path, default=getData.DATA_DIR)
    parser.add_argument("--checkpoint", default="final.pt")
    parser.add_argument("--batches", type=int, default=6, help="of each variant")
    given = parser.parse_args()
    train.DATA_DIR, train.CHECKPOINT = given.data_dir, given.checkpoint
    setup, _ = train.open_agent(torch.device("cpu"), False)
    alone = {"critic_weight": 0.0, "entropy_weight": 0.0, "reconstruction_share": 0.0, "policy_share": 1.0}
    whole = {"max_norm": float("inf"), "minibatch": SEGMENTS * STEPS * 8, "update_epochs": 1}
    setup = replace(setup, ppo=replace(setup.ppo, **alone, **whole, shuffle_coins=False))
    print(f"{setup.footer['source']}, {given.checkpoint}, a decision every {setup.env.hold_bars} bars")
    exact = exact_gradient(setup)
    print(f"{'':50s}{'two batches':>12s}{'exact':>8s}{'baseline took':>15s}")
    for name, (replicas, baseline, shared, gamma) in VARIANTS.items():
        variant = replace(setup, ppo=replace(setup.ppo, replicas=replicas if shared else 1, gamma=gamma))
        gradients, share = [], 0.0
        for key in range(given.batches):
            rollout = rollout_of(variant, key, replicas, baseline, shared)
            share += train.baseline_share(rollout) / given.batches
            gradients.append(ppo_gradient(variant, rollout))
        print(
            f"{name:50s}{cosines(gradients):12.3f}{cosines(gradients, [exact]):8.3f}{share:15.1%}", flush=True
        )


if __name__ == "__main__":
    main()
