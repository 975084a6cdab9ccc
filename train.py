"""Train a portfolio agent and the encoder of its features together: PPO on top of a learned feature reducer.

reads   data/features/*.parquet                       (getData.py; without any data a synthetic market is made first)
        data/checkpoints/feature_reducer.pt           (feature_reducer.py; without it the encoder starts at random)
writes  data/checkpoints/{pretrained,best,final}.pt   (policy and reducer)
        data/checkpoints/last.pt                      (everything that --resume needs)
        data/runs/<run>/                              (metrics.csv, TensorBoard)
        data/reports/<run>/                           (report.html, metrics.json: the test split)

    python train.py                    train (scale "full" on a CUDA GPU, "small" otherwise)
    python train.py --resume           go on where the last run stopped
    python train.py --job evaluate     report on a checkpoint, on these or on other bars
    python train.py --job signal       print the weights that best.pt wants at the newest complete bar
    torchrun --nproc-per-node 2 train.py                  the same training on two GPUs

Letters in shape comments: T bars, N coins, A = N + 1 assets (cash first), E environments, S steps, B minibatch,
D window values, L latent, W token width. Rewards are log returns per 5-minute bar, costs fractions per side.
"""

import hashlib
import json
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from tqdm import tqdm

import feature_reducer
import getData
import portfolio_env
from feature_reducer import FeatureReducer, FeatureWindows
from getData import Count, Fraction, NonNegative, Number, Positive, Seed, Share, UsageError, UserError, Whole
from portfolio_env import Backtest, VectorPortfolioEnv

# Job and files
JOB: Literal["train", "evaluate", "signal"] = "train"  # evaluate: report on CHECKPOINT; signal: its weights for now
DATA_DIR: Path = getData.DATA_DIR  # holds everything that the scripts read and write; set in getData.py
RUN: str = ""  # name of the run's folders; empty: scale and time
RESUME: bool = False  # go on from last.pt
WALK_FORWARD: Whole = 0  # folds: train and test that many times, ever later; 0: once, on the splits of the features

# Other jobs than training
CHECKPOINT: str = "best.pt"  # what to evaluate or to ask for a signal: a file in DATA_DIR/checkpoints, or a path
EVALUATE_SPLIT: Literal["train", "validation", "test", "all"] = "test"
HOLDINGS: tuple[NonNegative, ...] = (1.0,)  # weights held when the signal comes, cash first; what is left out is 0
MAX_AGE: Count = 600  # seconds since the newest bar's close, beyond which there is no signal

# Market
FEE_RATE: Fraction = portfolio_env.FEE_RATE  # per side; set in portfolio_env.py
SLIPPAGE_RATE: Fraction = portfolio_env.SLIPPAGE_RATE  # per side, on top; set in portfolio_env.py
FILL: Literal["next_open", "close"] = portfolio_env.FILL  # close is optimistic; set in portfolio_env.py
REWARD: Literal["excess", "growth"] = "excess"  # excess: over the equal-weight benchmark

# Model (the reducer's numbers hold only where there is no feature_reducer.pt, which brings its own)
SCALE: Literal["auto", "full", "small"] = feature_reducer.SCALE  # auto: full with a GPU; set in feature_reducer.py
REDUCER: Literal["checkpoint", "random"] = "checkpoint"  # checkpoint: feature_reducer.pt where it exists
WINDOW_BARS: tuple[Count, ...] = feature_reducer.WINDOW_BARS  # bars of each timeframe; set in feature_reducer.py
HIDDEN_DIM: Count = feature_reducer.HIDDEN_DIM  # set in feature_reducer.py
LATENT_DIM: Count = feature_reducer.LATENT_DIM  # set in feature_reducer.py
TRUNK: tuple[Count, ...] = (768, 384)  # layers between the latent and the tokens
TOKEN_WIDTH: Count = 192
HEADS: Count = 12
FEED_FORWARD: Count = 768
BLOCKS: Count = 8
ACTION_SCALE: Positive = 3.0  # logits = this x output of the actor head
LOG_STD: Annotated[Number, Field(ge=-10, le=3)] = -2.0  # initial, of the logits (without pretraining: -0.5)
SHUFFLE_COINS: bool = True  # each training segment sees the coins in another order: what is learnt of one holds for all

# Pretraining through the accounting
PRETRAIN_EPOCHS: Whole = 10  # 0: off
PRETRAIN_STEPS: Count = 100  # optimizer steps per epoch
PRETRAIN_SEGMENTS: Count = 16  # per optimizer step
PRETRAIN_DECISIONS: Count = 32  # per segment
PRETRAIN_HOLD: Count = 4  # bars from one decision to the next: what is worth its fees is slower than a bar
PRETRAIN_POLICY_RATE: Positive = 0.0003  # Adam; both rates fall to a tenth along a cosine
PRETRAIN_ENCODER_RATE: Positive = 0.00005  # Adafactor, for a reducer from feature_reducer.pt: its weights are small
PRETRAIN_RANDOM_ENCODER_RATE: Positive = 0.0001  # for one that starts at random

# Online training
BATCHES: Whole = 5_000
NUM_ENVS: Count = 8
STEPS: Count = 128  # per environment and batch
HOLD: Count = 12  # bars from one decision of a rollout to the next: exploring costs fees at each, and shows its outcome
REWARD_SCALE: Positive = 0.05  # x log return / standard deviation of a bar; larger: the critic drowns the actor
UPDATE_EPOCHS: Count = 2
MINIBATCH: Count = 256  # windows
GAMMA: Share = 0.99
GAE_LAMBDA: Share = 0.95
CLIP: Positive = 0.2
CRITIC_WEIGHT: NonNegative = 0.5
ENTROPY_WEIGHT: NonNegative = 0.01
POLICY_SHARE: NonNegative = 0.7  # of the encoder's loss
RECONSTRUCTION_SHARE: NonNegative = 0.3  # of the encoder's loss
MAX_NORM: Positive = 1.0  # gradient clipping, policy and reducer each
POLICY_RATE: Positive = 0.0005  # Adam
ENCODER_RATE: Positive = 0.00005
ENCODER_OPTIMIZER: Literal["adafactor", "adam"] = "adafactor"
TRAIN_ENCODER: bool = True  # False: the encoder stays as it starts
TARGET_KL: NonNegative = 0.03  # an update stops where the KL passes 1.5 x this; 0: never
EPSILON_START: Fraction = 0.075  # share of random steps, falling linearly to
EPSILON_END: Fraction = 0.02
EXPLORATION_STD: Positive = 1.0  # of the random steps' logits
ROLLING: Count = 50  # batches in the rolling reward
PATIENCE: Count = 100  # batches without improvement of the rolling reward before both learning rates are halved
VALIDATE_EVERY: Whole = 100  # batches between two looks at the validation split, which choose best.pt; 0: at the end
SAVE_EVERY: Count = 25  # batches between two last.pt
TEST: bool = True  # evaluate best and final on the test split at the end

# System
SEED: Seed = getData.SEED  # set in getData.py
DEVICE: str = feature_reducer.DEVICE  # auto | cpu | cuda | cuda:1 ...; set in feature_reducer.py
AMP: Literal["auto", "on", "off"] = feature_reducer.AMP  # float16 mixed precision; set in feature_reducer.py
ENCODE_BATCH: Count = 512  # windows per forward pass where no gradient is needed

# What SCALE = "small" uses in place of the constants above (a flag still wins)
SMALL = {
    **{name: feature_reducer.SMALL[name] for name in ("WINDOW_BARS", "HIDDEN_DIM", "LATENT_DIM")},
    "TRUNK": (128, 64),
    "TOKEN_WIDTH": 32,
    "HEADS": 4,
    "FEED_FORWARD": 128,
    "BLOCKS": 2,
    "PRETRAIN_STEPS": 20,
    "PRETRAIN_SEGMENTS": 48,
    "PRETRAIN_POLICY_RATE": 0.0005,  # a smaller network stands larger steps, and has fewer of them
    "PRETRAIN_ENCODER_RATE": 0.0001,
    "PRETRAIN_RANDOM_ENCODER_RATE": 0.0004,  # a seventh of the inputs add up in each hidden unit
    "BATCHES": 60,  # too few for PATIENCE to matter
    "NUM_ENVS": 16,
    "MINIBATCH": 512,
    "POLICY_RATE": 0.00003,  # larger steps take a pretrained policy of this size past the KL limit at once
    "ENCODER_RATE": 0.000003,  # a tenth of it, as at full scale; from a market without signal larger ones learn noise
    "VALIDATE_EVERY": 10,
    "ROLLING": 20,
}

# The flags that each job takes
_AGENT = ("JOB", "DATA_DIR", "CHECKPOINT", "SCALE", "SEED", "DEVICE", "AMP", "ENCODE_BATCH")
_JOBS = {
    "train": ("all but", "CHECKPOINT", "EVALUATE_SPLIT", "HOLDINGS", "MAX_AGE"),
    "evaluate": ("only", *_AGENT, "EVALUATE_SPLIT", "FEE_RATE", "SLIPPAGE_RATE", "FILL"),
    "signal": ("only", *_AGENT, "HOLDINGS", "MAX_AGE"),
}

# All other constants must be the same in a resumed run
_MAY_CHANGE_ON_RESUME = (
    "JOB", "DATA_DIR", "RUN", "RESUME", "DEVICE", "ENCODE_BATCH", "SAVE_EVERY", "TEST",
    "CHECKPOINT", "EVALUATE_SPLIT", "HOLDINGS", "MAX_AGE",
)  # fmt: skip
_RECONSTRUCTION_WINDOWS = 256  # in the sample that the report reconstructs
_SEGMENT = 96  # decisions, of an evaluation's segments that run side by side
_ROUNDS = 4  # of the segments, before what has not settled is decided one after another


# ---------------------------------------------------------------------------------------------------------- policy


class ScaleGradient(torch.autograd.Function):
    """Identity forward; multiplies the gradient by a constant backward."""

    @staticmethod
    def forward(ctx, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.scale, None


class ActorCritic(nn.Module):
    """Latent and weights held now -> mean of the coins' logits, value; attention runs over the assets.

    Args:
        latent_dim: L; assets: A, cash included.
        trunk: widths of the two layers between latent and tokens; the rest describes the transformer.
        action_scale: the actor head's output is multiplied by it.
        log_std: initial log standard deviation of the logits.
    """

    def __init__(
        self,
        latent_dim: int,
        assets: int,
        trunk: tuple[int, int] = (768, 384),
        width: int = 192,
        heads: int = 12,
        feed_forward: int = 768,
        blocks: int = 8,
        action_scale: float = 3.0,
        log_std: float = -2.0,
    ) -> None:
        super().__init__()
        self.assets, self.width, self.action_scale = assets, width, action_scale
        self.trunk = nn.Sequential(
            nn.LayerNorm(latent_dim),
            nn.Linear(latent_dim, trunk[0]),
            nn.GELU(),
            nn.Linear(trunk[0], trunk[1]),
            nn.GELU(),
            nn.Linear(trunk[1], assets * width),
        )
        self.asset_embedding = nn.Parameter(0.02 * torch.randn(assets, width))
        self.weight_embedding = nn.Linear(1, width)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, heads, feed_forward, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
            )
            for _ in range(blocks)
        )
        self.norm = nn.LayerNorm(width)
        self.actor = nn.Linear(width, 1)
        self.critic = nn.Linear(width, 1)
        self.log_std = nn.Parameter(torch.full((assets - 1,), log_std))
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2 and "embedding" not in name:
                nn.init.orthogonal_(parameter, gain=1.0 if "in_proj" in name else math.sqrt(2))
        nn.init.orthogonal_(self.actor.weight, gain=0.01)
        nn.init.orthogonal_(self.critic.weight, gain=1.0)
        for head in (self.actor, self.critic):
            nn.init.zeros_(head.bias)

    def market_tokens(self, latent: Tensor) -> Tensor:
        """What does not depend on the weights held, so that a rollout computes it once: [..., L] -> [..., A, W]."""
        return self.trunk(latent).unflatten(-1, (self.assets, self.width)) + self.asset_embedding

    def forward(self, tokens: Tensor, weights: Tensor, critic_gradient: float = 1.0) -> tuple[Tensor, Tensor]:
        """Market tokens [B, A, W], weights [B, A] -> mean logits [B, N] (cash is at 0), value [B]; float32.

        `critic_gradient` is the share of the critic's gradient that reaches the layers it shares with the actor.
        """
        hidden = tokens + self.weight_embedding(weights.unsqueeze(-1))  # [B, A, W]
        for block in self.blocks:
            hidden = block(hidden)
        hidden = self.norm(hidden)
        scores = self.actor(hidden).squeeze(-1).float()  # [B, A]
        mean = self.action_scale * (scores[:, 1:] - scores[:, :1])
        pooled = ScaleGradient.apply(hidden.mean(1), critic_gradient)
        return mean, self.critic(pooled).squeeze(-1).float()


def weights_from_logits(logits: Tensor) -> Tensor:
    """Logits of the coins [..., N] -> weights [..., A]: softmax with the cash logit at 0."""
    return torch.cat([torch.zeros_like(logits[..., :1]), logits], -1).softmax(-1)


def gaussian_log_prob(x: Tensor, mean: Tensor | float, log_std: Tensor) -> Tensor:
    """Log density [...] of independent Gaussians at x [..., N]."""
    return (-0.5 * ((x - mean) / log_std.exp()).square() - log_std - 0.5 * math.log(2 * math.pi)).sum(-1)


def mixture_log_prob(logits: Tensor, mean: Tensor, log_std: Tensor, epsilon: float, exploration_std: float) -> Tensor:
    """Log density [...] of the policy that acts: (1 - epsilon) N(mean, std) + epsilon N(0, exploration_std), float32.

    Random steps are part of the policy, so the PPO ratio is exact for them too. A Gaussian policy on logits followed
    by a softmax is logistic-normal (Aitchison & Shen 1980); the softmax's Jacobian cancels in every ratio.
    """
    inside = gaussian_log_prob(logits, mean, log_std)
    if epsilon == 0:
        return inside
    broad = gaussian_log_prob(logits, 0.0, torch.full_like(log_std, math.log(exploration_std)))
    return torch.logaddexp(math.log1p(-epsilon) + inside, math.log(epsilon) + broad)


def gaussian_entropy(log_std: Tensor) -> Tensor:
    """Entropy of the Gaussian part of the policy, in nats."""
    return (log_std + 0.5 * math.log(2 * math.pi * math.e)).sum()


# ------------------------------------------------------------------------------------------------------------- PPO


def compute_gae(
    rewards: Tensor,
    values: Tensor,
    next_values: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    gamma: float,
    gae_lambda: float,
) -> Tensor:
    """Generalised advantage estimates [S, E] (Schulman et al. 2016, eq. 16); all arguments are [S, E].

    `next_values` are the values of the states that each step led to, before any reset: a truncated end bootstraps from
    them, a terminated one is worth 0. Neither lets the advantage of what follows leak back over the end.
    """
    advantages = torch.zeros_like(rewards)
    following = torch.zeros_like(rewards[0])
    deltas = rewards + gamma * next_values * (~terminated) - values
    for step in reversed(range(len(rewards))):
        goes_on = ~(terminated[step] | truncated[step])
        following = deltas[step] + gamma * gae_lambda * torch.where(goes_on, following, 0.0)
        advantages[step] = following
    return advantages


class Rollout(NamedTuple):
    """One batch of experience, [S, E, ...] each."""

    rows: Tensor  # decision rows
    order: Tensor  # coin in each slot of what the policy sees [S, E, N]; weights and logits are in that order
    weights: Tensor  # held when deciding [S, E, A]
    logits: Tensor  # sampled [S, E, N]
    log_prob: Tensor  # of the sampled logits under the mixture
    value: Tensor
    advantage: Tensor
    alive: Tensor  # False after ruin: such steps are not trained on
    reward: Tensor  # unscaled
    portfolio: Tensor  # value of the portfolio after each step, 1 at the start
    benchmark: Tensor


def generator_for(*key: int) -> torch.Generator:
    """A CPU generator that is a function of the key alone: a resumed run draws what the uninterrupted one would."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))


def random_weights(count: int, assets: int, generator: torch.Generator) -> Tensor:
    """Starting weights [E, A]: half of them all in one random asset, half uniform on the simplex; float64."""
    spread = -torch.rand(count, assets, generator=generator, dtype=torch.float64).clamp(min=1e-12).log()
    single = F.one_hot(torch.randint(assets, (count,), generator=generator), assets).double()
    pick = torch.rand(count, 1, generator=generator) < 0.5
    return torch.where(pick, single, spread / spread.sum(1, keepdim=True))


def draw_starts(rows: Tensor, count: int, bars: int, generator: torch.Generator) -> Tensor:
    """Random starts [E] of segments so that all their bars and fills lie within the split `rows` [R]."""
    check_segment(rows, bars)
    return rows[torch.randint(len(rows) - bars - 2, (count,), generator=generator).to(rows.device)]


def check_segment(rows: Tensor, bars: int) -> None:
    """Refuse segments of so many bars where the split `rows` [R] is shorter."""
    if len(rows) < bars + 3:
        raise UserError(f"too little history: a segment needs {bars + 3} bars, the training split has {len(rows)}")


def draw_noise(steps: int, count: int, coins: int, epsilon: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Standard normal noise [S, E, N] of a rollout's actions, and whether each step explores [S, E, 1]."""
    noise = torch.randn(steps, count, coins, generator=generator)
    return noise, torch.rand(steps, count, 1, generator=generator) < epsilon


def draw_orders(count: int, coins: int, generator: torch.Generator) -> Tensor:
    """A random order of the coins for each segment [E, N]."""
    return torch.rand(count, coins, generator=generator).argsort(1)


def segment_rows(starts: Tensor, steps: int, hold_bars: int = 1) -> Tensor:
    """Rows of the S + 1 states of the segments that begin at `starts` [E], step by step: [(S + 1) * E]."""
    return (starts + hold_bars * torch.arange(steps + 1, device=starts.device).unsqueeze(1)).flatten()


class CoinOrder:
    """Weights between the market's order of the coins and that of the policy's slots; cash stays first.

    Args:
        order: coin in each slot [E, N].
    """

    def __init__(self, order: Tensor) -> None:
        self.coins = order
        self._to_slots = torch.cat([torch.zeros_like(order[:, :1]), order + 1], 1)  # [E, A]
        self._to_market = self._to_slots.argsort(1)

    def to_slots(self, weights: Tensor) -> Tensor:
        """Weights [E, A] in the market's order -> in that of the slots."""
        return weights.gather(1, self._to_slots)

    def to_market(self, weights: Tensor) -> Tensor:
        """Weights [E, A] in the order of the slots -> in the market's."""
        return weights.gather(1, self._to_market)


@torch.no_grad()
def encode(
    policy: ActorCritic,
    reducer: FeatureReducer,
    windows: FeatureWindows,
    rows: Tensor,
    chunk: int,
    order: Tensor | None = None,
) -> Tensor:
    """Market tokens [R, A, W] of many decisions in a few large passes; the weights are read once per chunk."""
    orders = [None] * -(-len(rows) // chunk) if order is None else order.split(chunk)
    parts = zip(rows.split(chunk), orders, strict=True)
    return torch.cat([policy.market_tokens(reducer.encoder(windows(*part))) for part in parts])


@torch.no_grad()
def collect_rollout(
    policy: ActorCritic,
    tokens: Tensor,
    env: VectorPortfolioEnv,
    starts: Tensor,
    start_weights: Tensor,
    order: CoinOrder,
    noise: Tensor,
    explores: Tensor,
    epsilon: float,
    exploration_std: float,
    reward_scale: float,
    gamma: float,
    gae_lambda: float,
) -> Rollout:
    """Step E environments S times from `starts` [E].

    Args:
        tokens: of the encoded windows [S + 1, E, A, W]. noise, explores: of the actions, as `draw_noise` gives them.
    """
    steps, count, device = len(tokens) - 1, len(starts), tokens.device
    weights = env.reset(starts, steps, start_weights)  # [E, A] float64
    log_std = policy.log_std.float()
    alive = torch.ones(count, dtype=torch.bool, device=device)
    kept: dict[str, list[Tensor]] = {name: [] for name in Rollout._fields}
    terminations, truncations = [], []
    for step in range(steps + 1):
        weights = order.to_slots(weights)
        mean, value = policy(tokens[step], weights.float())
        kept["value"].append(value)
        if step == steps:
            break
        logits = torch.where(explores[step], exploration_std * noise[step], mean + log_std.exp() * noise[step])
        kept["rows"].append(env.row)
        kept["order"].append(order.coins)
        kept["weights"].append(weights.float())
        kept["logits"].append(logits)
        kept["log_prob"].append(mixture_log_prob(logits, mean, log_std, epsilon, exploration_std))
        kept["alive"].append(alive)
        weights, reward, terminated, truncated = env.step(order.to_market(weights_from_logits(logits.double())))
        kept["reward"].append(reward)
        kept["portfolio"].append(env.value)
        kept["benchmark"].append(env.benchmark_value)
        terminations.append(terminated)
        truncations.append(truncated)
        alive = alive & ~terminated
    stacked = {name: torch.stack(items) for name, items in kept.items() if items}
    values = stacked["value"]  # [S + 1, E]
    stacked["value"] = values[:-1]
    rewards = (reward_scale * stacked["reward"]).float()
    ends = torch.stack(terminations), torch.stack(truncations)
    return Rollout(**stacked, advantage=compute_gae(rewards, values[:-1], values[1:], *ends, gamma, gae_lambda))


def flatten_rollout(rollout: Rollout) -> Rollout:
    """The transitions that count, [S * E, ...] each (those after a ruin are left out)."""
    alive = rollout.alive.flatten()
    return Rollout(*(field.flatten(0, 1)[alive] for field in rollout))


def normalised(advantage: Tensor) -> Tensor:
    """The advantages [B] of a minibatch with mean 0 and standard deviation 1; a single one as it is."""
    if len(advantage) < 2:  # the standard deviation of one number is NaN
        return advantage
    return (advantage - advantage.mean()) / (advantage.std() + 1e-8)


def ppo_losses(
    mean: Tensor,
    value: Tensor,
    log_std: Tensor,
    batch: Rollout,
    advantage: Tensor,
    epsilon: float,
    exploration_std: float,
    clip: float,
    critic_weight: float,
    entropy_weight: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Policy loss (clipped PPO, Schulman et al. 2017, eq. 7 and 9) of one minibatch, and its parts.

    `advantage` [B] is that of `batch`, normalised over the minibatch (of which `batch` may be one process's share).
    approx_kl is the estimator (ratio - 1) - log ratio (Schulman 2020), never negative.
    """
    log_ratio = mixture_log_prob(batch.logits, mean, log_std, epsilon, exploration_std) - batch.log_prob
    ratio = log_ratio.exp()
    actor = -torch.min(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage).mean()
    critic = F.mse_loss(value, batch.value + batch.advantage)
    entropy = gaussian_entropy(log_std)
    loss = actor + critic_weight * critic - entropy_weight * entropy
    stats = {
        "policy_loss": loss,
        "actor_loss": actor,
        "critic_loss": critic,
        "entropy": entropy,
        "approx_kl": (ratio - 1 - log_ratio).mean(),
        "clip_fraction": ((ratio - 1).abs() > clip).float().mean(),
        "ratio_max": ratio.max(),
    }
    return loss, {name: value.detach() for name, value in stats.items()}


def joint_loss(policy_loss: Tensor, reconstruction_loss: Tensor, reconstruction_share: float) -> Tensor:
    """The one scalar to differentiate. With the latent passed through ScaleGradient(0.7) the policy gets its own full
    gradient and the encoder exactly 0.7 policy loss + 0.3 reconstruction loss."""
    return policy_loss + reconstruction_share * reconstruction_loss


def optimizer_step(
    loss: Tensor,
    policy: ActorCritic,
    reducer: FeatureReducer,
    optimizers: tuple[torch.optim.Optimizer, ...],
    scaler: torch.amp.GradScaler,
    max_norm: float,
) -> dict[str, float]:
    """One backward pass, clipping in true units, both optimizers; one with infinite gradients skips.

    With the policy's optimizer alone the reducer stays as it is.
    """
    trained = (policy, reducer)[: len(optimizers)]  # a frozen reducer has no optimizer
    norms, skipped = feature_reducer.clipped_step(loss, trained, optimizers, scaler, max_norm)
    names = ("policy_grad_norm", "encoder_grad_norm")
    return {**dict.fromkeys(names, 0.0), **dict(zip(names, norms, strict=False)), "skipped": float(skipped)}


def explained_variance(values: Tensor, returns: Tensor) -> float:
    """1 - Var(returns - values) / Var(returns): 1 is a perfect critic, 0 as good as a constant."""
    variance = returns.var()
    return float(1 - (returns - values).var() / variance) if variance > 0 else float("nan")


def finite_mean(values: list[float]) -> float:
    """Mean of the finite values (a skipped step has infinite gradients); NaN where there is none."""
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan


def bp_per_day(log_return: float | Tensor) -> float | Tensor:
    """A mean log return per 5-minute bar in basis points per day."""
    return 1e4 * getData.BARS_PER_DAY * log_return


def rollout_metrics(rollout: Rollout, hold_bars: int = 1) -> dict[str, float]:
    """Money figures of one batch, means over the environments (exploration noise and its fees included)."""
    start = torch.ones_like(rollout.portfolio[:1])
    path = torch.cat([start, rollout.portfolio])  # [S + 1, E]
    growth = path.log().diff(dim=0)
    sharpe = growth.mean() / growth.std().clamp(min=1e-12) * math.sqrt(getData.BARS_PER_YEAR / hold_bars)
    return {
        "reward": float(rollout.reward.mean()) / hold_bars,
        "portfolio_value": float(path[-1].mean()),
        "benchmark_value": float(rollout.benchmark[-1].mean()),
        "sharpe": float(sharpe),
        "max_drawdown": float((1 - path / path.cummax(0).values).max(0).values.mean()),
    }


# ------------------------------------------------------------------------------------------------------ evaluation


@torch.no_grad()
def decide(policy: ActorCritic, tokens: Tensor, weights: Tensor) -> Tensor:
    """Targets [B, A] of the deterministic agent (the mean of the policy) that holds `weights` [B, A]; float64."""
    mean, _ = policy(tokens, weights.float())
    return weights_from_logits(mean.double())


def agent_targets(policy: ActorCritic, tokens: Tensor, mark: Tensor, segments: int) -> Tensor:
    """Targets [R, A] of the deterministic agent over R decisions in a row, from all cash; float64.

    The weights held are the agent's only state, and it soon forgets where it came from. So the decisions are cut into
    `segments` that run side by side: first each from all cash, then each from where the one before it ended, until all
    hold what they held at the same decision in the round before, bit for bit. Where that does not happen in a few
    rounds (an agent that keeps what it holds), the rest is decided one after another, from the first segment on that
    still moves.

    Args:
        tokens: market tokens of the decisions [R, A, W].
        mark: price relatives [R, A] from the fill of a decision to the close at which the next one is taken.
    """
    count, assets = mark.shape
    length = -(-count // segments)
    segments = -(-count // length)
    rows = torch.arange(segments * length, device=mark.device).view(segments, length).T  # [S, P]
    inside = rows < count  # the last segment may be shorter
    rows = rows.clamp(max=count - 1)
    cash = torch.eye(assets, dtype=mark.dtype, device=mark.device)[:1]
    start = cash.expand(segments, assets)
    seen = mark.new_full((length + 1, segments, assets), math.inf)  # weights seen at each decision, and at the end
    targets = mark.new_empty(length, segments, assets)

    def moved(weights: Tensor, step: int) -> Tensor:
        """The segments [P] that hold other weights at this step than in the round before."""
        return (weights != seen[step]).any(1) & inside[step]

    for _ in range(_ROUNDS):
        weights = start
        for step in range(length):
            if not moved(weights, step).any():
                break
            seen[step] = weights
            targets[step] = decide(policy, tokens[rows[step]], weights)
            weights, _ = portfolio_env.drift(targets[step], mark[rows[step]])
        else:
            seen[length] = weights
        start = torch.cat([cash, seen[length, :-1]])
        if not moved(start, 0).any():
            break
    targets = targets.transpose(0, 1).flatten(0, 1)[:count]  # [R, A]
    if (unsettled := moved(start, 0).nonzero()).numel():
        segment = int(unsettled[0])
        weights = start[segment : segment + 1]
        with one_thread():
            for row in range(segment * length, count):
                targets[row] = decide(policy, tokens[row : row + 1], weights)[0]
                weights, _ = portfolio_env.drift(targets[row : row + 1], mark[row : row + 1])
    return targets


# ------------------------------------------------------------------------------------- this script's own steps


def check_constants() -> None:
    """Refuse constants that cannot work, before anything is computed."""
    wrong = {
        f"TRUNK must be two widths, not {TRUNK}": len(TRUNK) != 2,
        f"FEE_RATE + SLIPPAGE_RATE must be under 1 per side, not {FEE_RATE + SLIPPAGE_RATE}": (
            FEE_RATE + SLIPPAGE_RATE >= 1
        ),
        f"RUN must be a plain name, not {RUN!r}": Path(RUN).name != RUN
        or RUN == ".."
        or "\0" in RUN
        or len(os.fsencode(RUN)) > 100,
        f"RUN must be another name than {RUN}": RUN in ("trials.csv", "feature_reducer"),
        f"TOKEN_WIDTH {TOKEN_WIDTH} must be divisible by HEADS {HEADS}": TOKEN_WIDTH % HEADS != 0,
        f"NUM_ENVS {NUM_ENVS} must be divisible by the {feature_reducer.world_size()} processes": (
            NUM_ENVS % feature_reducer.world_size() != 0
        ),
        f"MINIBATCH {MINIBATCH} must be within a batch of NUM_ENVS x STEPS = {NUM_ENVS * STEPS}": (
            MINIBATCH > NUM_ENVS * STEPS
        ),
        "WALK_FORWARD is a test: it needs TEST": WALK_FORWARD > 0 and not TEST,
    }
    for message, is_wrong in wrong.items():
        if is_wrong:
            raise UsageError(message)


class Setup(NamedTuple):
    """What a run works on."""

    device: torch.device
    amp: bool
    footer: dict
    windows: FeatureWindows
    env: VectorPortfolioEnv  # decides every HOLD bars
    slow_env: VectorPortfolioEnv  # every PRETRAIN_HOLD bars
    prices: tuple[np.ndarray, np.ndarray]  # open, close [T, N]
    train_rows: Tensor  # decision rows of the training split [R]
    spans: dict[str, tuple[int, int]]  # split -> first decision row and the one after the last
    reward_scale: float
    policy: ActorCritic
    reducer: FeatureReducer
    random_encoder: bool  # whether the reducer starts at random

    def autocast(self) -> torch.autocast:
        """Half precision, where this run has it on."""
        return feature_reducer.half_precision(self.device, self.amp)

    def modules(self) -> dict[str, nn.Module]:
        """What is trained, by the names that messages use."""
        return {"policy": self.policy, "reducer": self.reducer}


def reward_scale_of(close: np.ndarray, span: tuple[int, int]) -> float:
    """1 / standard deviation of the coins' 5-minute log returns relative to their mean, over the training split."""
    returns = np.diff(np.log(close[span[0] : span[1]]), axis=0)  # [R - 1, N]
    relative = returns - returns.mean(1, keepdims=True) if returns.shape[1] > 1 else returns
    return float(1 / max(relative.std(), 1e-6))


def find_reducer(path: Path) -> dict | None:
    """The checkpoint of the pretrained reducer, or None where there is none (or REDUCER says random)."""
    if REDUCER == "random" or WALK_FORWARD or not path.exists():
        reason = "REDUCER = random" if REDUCER == "random" else f"there is no {path}"
        print(f"encoder: starts at random ({'it must not know later folds' if WALK_FORWARD else reason})")
        return None
    saved = feature_reducer.load_checkpoint(path, "feature_reducer")
    if saved["scale"] != SCALE:
        raise UserError(
            f"{path} is of scale {saved['scale']}, this run of scale {SCALE}: run python feature_reducer.py "
            f"--scale {SCALE}, or start from a random encoder with --reducer random"
        )
    return saved


def policy_memory(latent: int, assets: int, windows: int, decisions: int) -> dict[str, float]:
    """Bytes that the policy takes: {what: bytes}.

    Args:
        windows: of the largest batch that is differentiated. decisions: whose tokens are encoded at once.
    """
    tokens = assets * TOKEN_WIDTH
    weights = latent * TRUNK[0] + TRUNK[0] * TRUNK[1] + TRUNK[1] * tokens
    weights += BLOCKS * (4 * TOKEN_WIDTH**2 + 2 * TOKEN_WIDTH * FEED_FORWARD)
    kept = windows * assets * BLOCKS * (10 * TOKEN_WIDTH + 2 * FEED_FORWARD)  # for the backward pass
    return {"policy": 4 * (4 * weights + kept), "encoded decisions": 2 * 4 * decisions * tokens}  # parts, then joined


def prepare(
    device: torch.device,
    amp: bool,
    resumed: dict | None,
    flags: dict[str, object],
    splits: dict | None = None,
    held: float = 0.0,
) -> Setup:
    """Load data and reducer, build the policy, and check that all of it fits together and into memory; a walk-forward
    fold brings its own `splits`. `held` are the bytes of host memory that the run has already, `resumed` aside."""
    torch.manual_seed(SEED)
    saved = resumed or find_reducer(DATA_DIR / "checkpoints" / "feature_reducer.pt")
    bars = saved["window_bars"] if saved else WINDOW_BARS
    windows, footer = feature_reducer.load_windows(DATA_DIR, bars, device, saved, splits)
    if saved:
        feature_reducer.check_market(saved["market"], footer)
    alike = footer["inputs"], footer["splits"], saved["dims"] if saved else None
    feature_reducer.check_alike(alike, "bars, splits or feature_reducer.pt")
    hidden, latent = saved["dims"][1:] if saved else (HIDDEN_DIM, LATENT_DIM)
    used = {"WINDOW_BARS": tuple(bars), "HIDDEN_DIM": hidden, "LATENT_DIM": latent}
    for name, value in used.items():
        if flags.get(name, value) != value:
            raise UserError(f"the encoder's checkpoint has {name} {value}, not {flags[name]}: use --reducer random")
    shape = (len(footer["symbols"]) + 1, TRUNK, TOKEN_WIDTH, HEADS, FEED_FORWARD, BLOCKS, ACTION_SCALE)
    pretraining = PRETRAIN_SEGMENTS * (PRETRAIN_DECISIONS + 1) if PRETRAIN_EPOCHS else 0
    largest = max(MINIBATCH, pretraining)
    needs = feature_reducer.reducer_memory(windows.input_dim, hidden, latent, largest, amp, ENCODER_OPTIMIZER)
    evaluated = max(footer["splits"][name][1] - footer["splits"][name][0] for name in ("validation", "test"))
    encoded = max(NUM_ENVS * (STEPS + 1), evaluated // getData.BAR_MS)
    needs |= policy_memory(latent, shape[0], largest, encoded)
    needs["activations"] = max(needs["activations"], 4 * ENCODE_BATCH * (windows.input_dim + 2 * hidden))
    size = needs["parameters"]
    optimizer = 2 * size if ENCODER_OPTIMIZER == "adam" else 0.0
    advice = "use --scale small, or lower --minibatch and --pretrain-segments"
    held += feature_reducer.held_bytes(saved)
    feature_reducer.check_memory(needs, size + optimizer, device, advice, held)
    names = ("pretrained.pt", "best.pt", "final.pt")
    feature_reducer.check_disk(DATA_DIR / "checkpoints", {**dict.fromkeys(names, size), "last.pt": size + optimizer})
    if saved:
        reducer = feature_reducer.reducer_from_checkpoint(saved, device)
    else:
        reducer = FeatureReducer(windows.input_dim, hidden, latent).to(device)
    setup = build_setup(device, amp, windows, footer, reducer, ActorCritic(latent, *shape, LOG_STD), saved is None)
    longest = max(bool(BATCHES) * STEPS * HOLD, bool(PRETRAIN_EPOCHS) * PRETRAIN_DECISIONS * PRETRAIN_HOLD)
    check_segment(setup.train_rows, longest)
    if resumed:
        load_weights(setup.policy, resumed["policy"], "the checkpoint's policy")
    feature_reducer.copy_from_first([setup.policy, setup.reducer])
    sizes = [sum(parameter.numel() for parameter in module.parameters()) / 1e6 for module in (reducer, setup.policy)]
    print(f"market: {footer['source']}, {len(footer['symbols'])} coins")
    print("decisions: " + ", ".join(f"{name} {stop - start:,}" for name, (start, stop) in setup.spans.items()))
    ratio = windows.input_dim / latent
    print(f"reducer: {windows.input_dim:,} -> {hidden:,} -> {latent:,} ({ratio:.1f}x), {sizes[0]:.1f} M parameters")
    print(f"policy: {BLOCKS} blocks, {HEADS} heads, {shape[0]} actions, 1 value, {sizes[1]:.2f} M parameters")
    return setup


def build_setup(
    device: torch.device,
    amp: bool,
    windows: FeatureWindows,
    footer: dict,
    reducer: FeatureReducer,
    policy: ActorCritic,
    random_encoder: bool,
) -> Setup:
    """Prices, environments and splits around the given modules."""
    table, _ = getData.load_prices(DATA_DIR)
    if not np.array_equal(feature_reducer.close_ms(table), windows.times):
        place = DATA_DIR / "features"
        raise UserError(f"prices and features in {place} are of other times: run python getData.py --job features")
    if max(HOLD, PRETRAIN_HOLD) + 2 > len(table):
        raise UserError(f"too little history: HOLD {HOLD}, PRETRAIN_HOLD {PRETRAIN_HOLD}, and {len(table)} bars in all")
    prices = portfolio_env.price_arrays(table, footer["symbols"])
    on_device = [torch.tensor(part, device=device) for part in prices]
    trading = {"cost": FEE_RATE + SLIPPAGE_RATE, "fill": FILL, "reward": REWARD}
    env = VectorPortfolioEnv(*on_device, **trading, hold_bars=HOLD)
    slow_env = VectorPortfolioEnv(*on_device, **trading, hold_bars=PRETRAIN_HOLD)
    rows = {name: windows.rows(split, name) for name, split in footer["splits"].items()}
    spans = {name: portfolio_env.split_rows(table.index, footer, name, FILL) for name in footer["splits"]}
    spans["all"] = (spans["train"][0], spans["test"][1])
    scale = reward_scale_of(prices[1], spans["train"])
    modules = policy.to(device), reducer
    return Setup(
        device, amp, footer, windows, env, slow_env, prices, rows["train"], spans, scale, *modules, random_encoder
    )


def load_weights(module: nn.Module, weights: dict[str, Tensor], what: str) -> None:
    """Copy the weights into the module in place: no second copy on the device.

    Raises:
        UserError: they are of another shape.
    """
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(f"{what} is of another shape ({str(error).splitlines()[1].strip()}); remove it") from None


def agent_checkpoint(setup: Setup, run: str) -> dict:
    """Policy and trained reducer with all that it takes to run them elsewhere."""
    policy = setup.policy
    content = feature_reducer.reducer_checkpoint(setup.reducer, setup.windows, setup.footer, SCALE)
    shape = [policy.assets, list(TRUNK), TOKEN_WIDTH, HEADS, FEED_FORWARD, BLOCKS, ACTION_SCALE]
    content |= {"kind": "train", "run": run, "seed": SEED}
    return content | {"policy": policy.state_dict(), "policy_shape": shape}


def load_agent(path: Path, setup: Setup, run: str) -> None:
    """Copy the weights of this run's checkpoint into the modules; of several processes the first one reads it."""
    if feature_reducer.rank() == 0:
        saved = feature_reducer.load_checkpoint(path, "train")
        if saved["run"] != run:
            raise UserError(
                f"{path} is of run {saved['run']}, not of {run}: another training wrote into the same folder"
            )
        if saved["market"]["splits"] != setup.footer["splits"]:
            raise UserError(f"{path} is of another fold of run {run}: start anew")
        load_weights(setup.policy, saved["policy"], str(path))
        load_weights(setup.reducer, saved["reducer"], str(path))
    feature_reducer.copy_from_first([setup.policy, setup.reducer])


def evaluate(setup: Setup, split: str) -> Backtest:
    """Run the deterministic agent over a whole split."""
    start, stop = setup.spans[split]
    rows = torch.arange(start, stop, device=setup.device)
    *_, mark = portfolio_env.align_prices(*setup.prices, FILL)
    mark = torch.from_numpy(portfolio_env.with_cash(mark[start:stop])).to(setup.device)  # [R, A]
    with setup.autocast(), stop_where_not_finite(setup, f"on the {split} split"):
        count = -(-len(rows) // feature_reducer.world_size())  # each of several processes encodes as many
        mine = rows[(feature_reducer.rank() * count + torch.arange(count, device=rows.device)).clamp(max=len(rows) - 1)]
        tokens = encode(setup.policy, setup.reducer, setup.windows, mine, ENCODE_BATCH)
        tokens = feature_reducer.gather(tokens)[: len(rows)]
        targets = agent_targets(setup.policy, tokens, mark, -(-len(rows) // _SEGMENT))
        return account_of(setup, targets.cpu().numpy(), stop)


def account_of(setup: Setup, targets: np.ndarray, stop: int) -> Backtest:
    """The account that trades into `targets` [S, A] at the S decisions before row `stop`."""
    start = stop - len(targets)

    def target(row: int, _: np.ndarray) -> np.ndarray:
        return targets[row - start]

    return portfolio_env.backtest(target, *setup.prices, start, stop, cost=setup.env.cost, fill=FILL)


def checkpoint_path() -> Path:
    """The file that CHECKPOINT names."""
    path = DATA_DIR / "checkpoints" / CHECKPOINT  # an absolute path stays as it is
    return (path if path.exists() else Path(CHECKPOINT)).absolute()


def open_agent(device: torch.device, amp: bool) -> tuple[Setup, dict]:
    """The agent of CHECKPOINT on the features of DATA_DIR, which need not be those that it was trained on."""
    path = checkpoint_path()
    saved = feature_reducer.load_checkpoint(path, "train")
    windows, footer = feature_reducer.load_windows(DATA_DIR, saved["window_bars"], device, saved)
    reducer = feature_reducer.reducer_from_checkpoint(saved, device)
    try:
        policy = ActorCritic(reducer.latent_dim, *saved["policy_shape"])
    except (TypeError, ValueError, AssertionError, RuntimeError):
        raise UserError(f"{path} names a policy that cannot be: {saved['policy_shape']}") from None
    load_weights(policy, saved["policy"], f"the policy in {path}")
    return build_setup(device, amp, windows, footer, reducer, policy, False), saved


def report_checkpoint(device: torch.device, amp: bool) -> int:
    """The report of one checkpoint over one split of the features at hand."""
    setup, saved = open_agent(device, amp)
    first, stop = setup.spans[EVALUATE_SPLIT]
    days = int(setup.windows.times[first]), int(setup.windows.times[stop - 1])
    known = portfolio_env.relation_to_training(saved["market"]["splits"], *days)
    path = checkpoint_path()
    chosen_in = path.parents[1] if path.parent.name == "checkpoints" else DATA_DIR  # the data folder with its trials
    agents = {f"agent ({path.stem})": evaluate(setup, EVALUATE_SPLIT)}
    place = DATA_DIR / "reports" / f"{saved['run']}-{path.stem}-{EVALUATE_SPLIT}"
    report(setup, saved, chosen_in / "runs", place, agents, EVALUATE_SPLIT, known)
    return 0


def print_signal(device: torch.device, amp: bool) -> int:
    """Print the weights that the agent wants at the newest complete bar: a table, and one line of JSON.

    Raises:
        UserError: the newest bar is old or incomplete, or HOLDINGS are no weights.
    """
    setup, saved = open_agent(device, amp)
    symbols, row = setup.footer["symbols"], len(setup.windows.times) - 1
    closed = int(setup.windows.times[row]) / 1000
    when = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(closed))
    opened = pd.Timestamp(closed - getData.BAR_MS / 1000, unit="s", tz="UTC")
    bars = getData.load_bars(DATA_DIR, symbols)
    if filled := [symbol for symbol in symbols if bars[symbol].at[opened, "filled"]]:
        raise UserError(f"the newest bar ({when}) is missing for {', '.join(filled)}: run python getData.py again")
    age = time.time() - closed
    if not 0 <= age <= MAX_AGE:
        reason = f"is {age / 60:,.0f} minutes old" if age > 0 else "lies in the future of this machine's clock"
        raise UserError(
            f"the newest bar, closed {when}, {reason} (MAX_AGE is {MAX_AGE} s): run python getData.py first"
        )
    held = np.zeros(len(symbols) + 1)
    held[: len(HOLDINGS)] = HOLDINGS[: len(held)]
    if len(HOLDINGS) > len(held) or min(HOLDINGS) < 0 or abs(held.sum() - 1) > 1e-6:
        raise UserError(f"HOLDINGS must be up to {len(held)} weights, cash first, none negative, of sum 1")
    with setup.autocast(), stop_where_not_finite(setup, "at the newest bar"):
        rows = torch.tensor([row], device=setup.device)
        tokens = encode(setup.policy, setup.reducer, setup.windows, rows, ENCODE_BATCH)
        target = decide(setup.policy, tokens, torch.from_numpy(held[None]).to(setup.device))[0].cpu().numpy()
    print(f"agent of run {saved['run']}, decision at {when}, {setup.footer['source']}\n")
    print(f"{'asset':10}{'held':>10}{'target':>10}{'change':>10}")
    names = ["cash", *symbols]
    for name, now, wanted in zip(names, held, target, strict=True):
        print(f"{name:10}{now:10.4f}{wanted:10.4f}{wanted - now:+10.4f}")
    weights = {name: round(float(wanted), 6) for name, wanted in zip(names, target, strict=True)}
    print("\n" + json.dumps({"run": saved["run"], "close_time_ms": int(closed * 1000), "weights": weights}))
    return 0


def out_of_sample(setup: Setup, done: dict) -> dict[str, Backtest]:
    """The run's agents (the last one is in `setup`) on the bars that played no part in training or choosing, the
    headline first."""
    if WALK_FORWARD:
        targets = torch.cat(done["out_of_sample"]).numpy()
        return {f"agent ({WALK_FORWARD} folds)": account_of(setup, targets, setup.spans["test"][1])}
    agents = {"agent (final)": evaluate(setup, "test")}
    if done["best_validation"] > -math.inf:  # else best.pt could not be written
        load_agent(DATA_DIR / "checkpoints" / "best.pt", setup, done["run"])
        agents = {"agent (best)": evaluate(setup, "test"), **agents}
    return agents


def data_hash(footer: dict) -> str:
    """SHA-256 over the hashes of all bars behind the features."""
    return hashlib.sha256(json.dumps(footer["inputs"], sort_keys=True).encode()).hexdigest()


def trial_of(setup: Setup, done: dict, fixed: dict[str, object], changed: dict[str, object]) -> dict[str, object]:
    """The row of a training in the list of trials, without its figures."""
    return {
        "time": done["started"], "run": done["run"], "seed": SEED,
        "market": setup.footer["source"], "data_sha256": data_hash(setup.footer),
        "changed": json.dumps({name: changed[name] for name in changed if name in fixed}),
        "validation_bp_day": math.nan, "constants": json.dumps(fixed),
    }  # fmt: skip


def append_trial(path: Path, trial: dict[str, object]) -> None:
    """Add one training run to the list of all that were ever tried here, or put it in the place of its own row."""
    if feature_reducer.rank():
        return
    table = pd.DataFrame([trial])
    if path.exists():
        trials = portfolio_env.read_trials(path)
        itself = (trials["time"] == trial["time"]) & (trials["run"] == trial["run"])
        table = pd.concat([trials[~itself], table])
    path.parent.mkdir(parents=True, exist_ok=True)
    portfolio_env.replace_text(path, table.to_csv(index=False))


def make_optimizers(setup: Setup, policy_rate: float, encoder_rate: float) -> tuple[torch.optim.Optimizer, ...]:
    """Adam for the policy; Adafactor (or Adam) for the reducer, unless it is frozen."""
    setup.reducer.requires_grad_(TRAIN_ENCODER)
    policy = torch.optim.Adam(setup.policy.parameters(), lr=policy_rate)
    if not TRAIN_ENCODER:
        return (policy,)
    if ENCODER_OPTIMIZER == "adam":
        encoder = torch.optim.Adam(setup.reducer.parameters(), lr=encoder_rate)
    else:
        encoder = feature_reducer.make_adafactor(setup.reducer, encoder_rate)
    return policy, encoder


@contextmanager
def one_thread() -> Iterator[None]:
    """For many tiny CPU steps one after another: there, threads wait for each other (10 x slower on a busy machine)."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def stop_where_not_finite(setup: Setup, what: str) -> Iterator[None]:
    """The environment refuses weights that are not finite: say in one line which tensor went bad."""
    try:
        yield
    except ValueError as error:
        bad = feature_reducer.first_bad_tensor(setup.modules())
        raise UserError(f"{error} {what}: {bad}; lower the learning rates or --log-std") from None


def draw_coin_order(setup: Setup, count: int, generator: torch.Generator) -> CoinOrder:
    """The order of the coins in each of `count` segments."""
    coins = setup.policy.assets - 1
    order = draw_orders(count, coins, generator) if SHUFFLE_COINS else torch.arange(coins).expand(count, coins)
    return CoinOrder(order.to(setup.device))


def pretrain_loss(
    setup: Setup, starts: Tensor, start_weights: Tensor, order: CoinOrder
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Loss of S decisions from `starts` [E]: minus the segment's growth net of costs, the critic's error on the returns
    met (discounted per decision; it trains its head alone), and the reconstruction (of every fourth window: unbiased,
    and cheaper). Also its parts, and the tensors on the way that may go bad.
    """
    policy, steps = setup.policy, PRETRAIN_DECISIONS
    rows = segment_rows(starts, steps, PRETRAIN_HOLD)
    inputs = setup.windows(rows, order.coins.repeat(steps + 1, 1) if SHUFFLE_COINS else None)  # [(S + 1) * E, D]
    weights = setup.slow_env.reset(starts, steps, start_weights)
    rewards, values = [], []
    with setup.autocast(), stop_where_not_finite(setup, "in pretraining"):
        latent = setup.reducer.encoder(inputs)
        every_fourth = (part.unflatten(0, (steps + 1, -1))[::4].flatten(0, 1) for part in (latent, inputs))
        latent_part, wanted = every_fourth
        reconstruction = setup.reducer.decoder(latent_part)
        tokens = policy.market_tokens(ScaleGradient.apply(latent, POLICY_SHARE)).unflatten(0, (steps + 1, -1))
        for step in range(steps + 1):
            held = order.to_slots(weights).float()
            mean, value = policy(tokens[step], held, critic_gradient=0.0)  # growth alone shapes the rest
            values.append(value)
            if step < steps:
                target = order.to_market(weights_from_logits(mean.double()))
                weights, reward, _, _ = setup.slow_env.step(target)
                rewards.append(setup.reward_scale * reward)
    returns = [values[-1].detach()]
    for reward in reversed(rewards):
        returns.append(REWARD_SCALE * reward.detach().float() + GAMMA * returns[-1])
    growth = torch.stack(rewards).mean()
    critic = F.mse_loss(torch.stack(values[:-1]), torch.stack(returns[:0:-1]))
    error = (reconstruction.float() - wanted).square().mean()
    loss = joint_loss(CRITIC_WEIGHT * critic - steps * growth.float(), error, RECONSTRUCTION_SHARE)
    stats = {"loss": loss, "critic_loss": critic, "reconstruction_loss": error}
    stats["growth_bp_day"] = bp_per_day(growth / setup.reward_scale / PRETRAIN_HOLD)
    stats = {name: value.detach() for name, value in stats.items()}
    met = {"windows": inputs, "latent": latent, "reconstruction": reconstruction, "values": torch.stack(values)}
    return loss, stats, met | {"growth": growth}


def pretrain(
    setup: Setup,
    done: dict,
    folder: Path,
    path: Path,
    validate: Callable,
    save: Callable,
    optimizers: tuple,
    scaler: torch.amp.GradScaler,
    stop: feature_reducer.StopSignal,
) -> None:
    """Ten epochs straight through the accounting; `path` keeps the epoch that is best on the validation split."""
    log = feature_reducer.RunLog(folder / "pretrain", done["pretrain_steps"] // PRETRAIN_STEPS)
    total = PRETRAIN_EPOCHS * PRETRAIN_STEPS
    hidden = feature_reducer.rank() > 0 or None  # None: where there is no terminal
    bar = tqdm(total=total, initial=done["pretrain_steps"], desc="pretrain", unit="step", disable=hidden)
    while done["pretrain_steps"] < total and not stop.exit_code:
        step = done["pretrain_steps"]
        fall = 0.1 + 0.45 * (1 + math.cos(math.pi * step / total))
        for optimizer, rate in zip(optimizers, (PRETRAIN_POLICY_RATE, done["pretrain_encoder_rate"]), strict=False):
            optimizer.param_groups[0]["lr"] = rate * fall
        generator = generator_for(SEED, 1, step)
        starts = draw_starts(setup.train_rows, PRETRAIN_SEGMENTS, PRETRAIN_DECISIONS * PRETRAIN_HOLD, generator)
        weights = random_weights(PRETRAIN_SEGMENTS, setup.policy.assets, generator).to(setup.device)
        order = draw_coin_order(setup, PRETRAIN_SEGMENTS, generator)
        mine, share = feature_reducer.share(PRETRAIN_SEGMENTS)
        loss, stats, met = pretrain_loss(setup, starts[mine], weights[mine], CoinOrder(order.coins[mine]))
        stats = feature_reducer.mean_over_processes(stats, share)
        where = f"in pretraining step {step + 1}"
        feature_reducer.check_finite(stats["loss"], scaler, setup.modules(), where, met)
        del met  # its windows need not live through the step and the next forward pass
        norms = optimizer_step(share * loss, setup.policy, setup.reducer, optimizers, scaler, MAX_NORM)
        feature_reducer.count_skipped(done, int(norms["skipped"]), 1, setup.modules(), where)
        done["pretrain_steps"] += 1
        done["pretrain_sums"] = {name: done["pretrain_sums"].get(name, 0.0) + value for name, value in stats.items()}
        bar.update()
        bar.set_postfix(growth=f"{stats['growth_bp_day']:+.0f} bp/day", mse=f"{stats['reconstruction_loss']:.3f}")
        if done["pretrain_steps"] % PRETRAIN_STEPS == 0:
            means = {name: value / PRETRAIN_STEPS for name, value in done["pretrain_sums"].items()}
            done["pretrain_sums"] = {}
            validation, improved = validate()
            epoch = done["pretrain_steps"] // PRETRAIN_STEPS
            log.add(epoch, {**means, "validation_bp_day": validation})
            bar.write(
                f"pretrain {epoch:2d}/{PRETRAIN_EPOCHS}  growth {means['growth_bp_day']:+8.1f} bp/day  validation "
                f"{validation:+8.1f} over the benchmark  mse {means['reconstruction_loss']:.4f}{'  *' * improved}"
            )
            print(end="", flush=True)
            save(path if improved else None, validation)
        stop.agree()
    bar.close()
    log.close()


def minibatches(transitions: Rollout, batch: int) -> Iterator[Rollout]:
    """UPDATE_EPOCHS times all transitions, each time in a new order, MINIBATCH at a time."""
    for epoch in range(UPDATE_EPOCHS):
        order = torch.randperm(len(transitions.rows), generator=generator_for(SEED, 3, batch, epoch))
        for chosen in order.to(transitions.rows.device).split(MINIBATCH):
            yield Rollout(*(field[chosen] for field in transitions))


def update(
    setup: Setup, rollout: Rollout, batch: int, epsilon: float, optimizers: tuple, scaler: torch.amp.GradScaler
) -> dict[str, float]:
    """PPO on one rollout; every minibatch re-encodes its windows with gradient. Means over the optimizer steps, but the
    last approx_kl that was computed: past 1.5 x TARGET_KL no further step is taken."""
    history: dict[str, list[float]] = {}
    updates = 0
    losses = (EXPLORATION_STD, CLIP, CRITIC_WEIGHT, ENTROPY_WEIGHT)
    for minibatch in minibatches(flatten_rollout(rollout), batch):
        mine, share = feature_reducer.share(len(minibatch.rows))
        advantage = normalised(minibatch.advantage)[mine]
        minibatch = Rollout(*(field[mine] for field in minibatch))
        inputs = setup.windows(minibatch.rows, minibatch.order if SHUFFLE_COINS else None)  # [B, D]
        with setup.autocast():
            latent = setup.reducer.encoder(inputs)
            tokens = setup.policy.market_tokens(ScaleGradient.apply(latent, POLICY_SHARE))
            mean, value = setup.policy(tokens, minibatch.weights)
        policy_loss, stats = ppo_losses(mean, value, setup.policy.log_std, minibatch, advantage, epsilon, *losses)
        stats["ratio_max"] = feature_reducer.gather(stats["ratio_max"].reshape(1)).max()
        stats = feature_reducer.mean_over_processes(stats, share)
        approx_kl = stats.pop("approx_kl")
        if TARGET_KL and updates and approx_kl > 1.5 * TARGET_KL:
            break
        with setup.autocast():
            reconstruction = setup.reducer.decoder(latent)
        difference = reconstruction.float() - inputs
        error = difference.square().mean()
        loss = joint_loss(policy_loss, error, RECONSTRUCTION_SHARE)
        met = {"windows": inputs, "latent": latent, "reconstruction": reconstruction, "mean": mean, "value": value}
        met["policy loss"] = policy_loss
        accuracy = feature_reducer.within_tolerance(difference[::8])  # of a sample: it is only shown
        parts = {"loss": loss, "reconstruction_loss": error, "accuracy": accuracy}
        parts = feature_reducer.mean_over_processes(parts, share)
        total = parts.pop("loss")
        feature_reducer.check_finite(total, scaler, setup.modules(), f"in batch {batch + 1}", met)
        norms = optimizer_step(share * loss, setup.policy, setup.reducer, optimizers, scaler, MAX_NORM)
        updates += 1
        parts["encoder_loss"] = (
            POLICY_SHARE * stats["policy_loss"] + RECONSTRUCTION_SHARE * parts["reconstruction_loss"]
        )
        for name, part in {**stats, **parts, **norms}.items():
            history.setdefault(name, []).append(part)
    skipped = int(sum(history.pop("skipped")))
    return {name: finite_mean(values) for name, values in history.items()} | {
        "approx_kl": approx_kl, "updates": updates, "skipped": skipped,
    }  # fmt: skip


@torch.no_grad()
def reconstruction_on(setup: Setup, split: str) -> dict[str, float]:
    """`reconstruction_metrics` of the reducer as it is now on a sample of windows, evenly spread over a split."""

    def reconstruct(windows: Tensor) -> Tensor:
        with setup.autocast():
            return setup.reducer(windows)[1]

    rows = torch.arange(*setup.spans[split], device=setup.device)
    sample = feature_reducer.spread_rows(rows, _RECONSTRUCTION_WINDOWS)
    return feature_reducer.reconstruction_metrics(reconstruct, setup.windows, sample, MINIBATCH)


def report(
    setup: Setup, origin: dict, runs: Path, folder: Path, agents: dict[str, Backtest], split: str, known: str
) -> None:
    """Print and write the report on `agents` (the headline first, and its weights in `setup`) beside the baselines.

    Args:
        origin: the training's "run", "scale" and "seed". runs: where it and the other trials left their logs.
        folder: to write into. known: what the agents knew of these bars.
    """
    reconstruction = {f"{part} split": reconstruction_on(setup, part) for part in ("train", split)}
    if feature_reducer.rank():
        return
    headline = next(iter(agents.values()))
    first, stop = int(headline.rows[0]), int(headline.rows[-1]) + 1
    sharpe = portfolio_env.sharpe_per_bar(portfolio_env.excess_returns(headline))
    about = portfolio_env.Report(
        run=origin["run"],
        market=setup.footer["source"],
        split=split,
        times=setup.windows.times[first:stop],
        symbols=setup.footer["symbols"],
        cost=setup.env.cost,
        fill=FILL,
        others=portfolio_env.baselines(*setup.prices, first, stop, cost=setup.env.cost, fill=FILL),
        agents=agents,
        known=known,
        trial_sharpes=portfolio_env.read_trial_sharpes(runs / "trials.csv") or [sharpe],
        curves=portfolio_env.read_curves(runs / origin["run"]),
        reconstruction=reconstruction,
        facts={"scale": origin["scale"], "seed": str(origin["seed"])},
    )
    content = portfolio_env.write_report(folder, about)
    print(
        f"\n{split} split ({known}), decisions {content['decisions']}, {about.market}, cost "
        f"{content['cost per side']} per side"
    )
    print(portfolio_env.format_table(content[split]))
    print(*portfolio_env.verdicts(about, content), sep="\n")
    print(f"report: {folder / 'report.html'}")


def train_agent(
    setup: Setup,
    done: dict,
    resumed: dict | None,
    fixed: dict[str, object],
    stop: feature_reducer.StopSignal,
    writer: feature_reducer.CheckpointWriter,
) -> None:
    """Pretraining and all online batches, from where `done` stands (with the states of scaler and optimizers that are
    `resumed`); returns early when the user stops it."""
    checkpoints = DATA_DIR / "checkpoints"
    folder = DATA_DIR / "runs" / done["run"] / (f"fold-{done['fold']}" if WALK_FORWARD else "")
    scaler = torch.amp.GradScaler(setup.device.type, enabled=setup.amp)
    optimizers = make_optimizers(setup, POLICY_RATE, ENCODER_RATE)  # pretraining sets its own rates
    if resumed:
        feature_reducer.load_states([scaler, *optimizers], [resumed["scaler"], *resumed["optimizers"]])

    def save(best: Path | None = None, validation: float = -math.inf, last: bool = True) -> None:
        """Write last.pt, and before it `best`, where this agent is the best so far, with its growth over the benchmark
        on the validation split. `done` knows the best that is on disk: where the write fails, it is the one before."""
        writer.wait()  # what failed before is undone before `done` is looked at
        before, files, agent = done["best_validation"], {}, agent_checkpoint(setup, done["run"])
        if best:
            done["best_validation"] = validation
            files[best] = agent
        if last:
            state = {"kind": "train_last", "done": done, "fixed": fixed, "scaler": scaler.state_dict()}
            state["optimizers"] = [optimizer.state_dict() for optimizer in optimizers]
            files[checkpoints / "last.pt"] = agent | state
        writer.write(files, lambda failed: done.update(best_validation=before) if failed == best else None)

    def validate() -> tuple[float, bool]:
        """Growth over the benchmark on the validation split, bp a day, and whether it is the best so far."""
        validation = feature_reducer.from_first(portfolio_env.metrics(evaluate(setup, "validation"))["excess_bp_day"])
        written()
        return validation, validation > done["best_validation"]

    def written() -> None:
        """Wait until all files are written; the first process knows which of them failed."""
        writer.wait()
        done["best_validation"] = feature_reducer.from_first(done["best_validation"])

    if done["fold"] and not resumed:
        save()  # before the best.pt of this fold takes the place of that of the one before
        writer.wait()
        if checkpoints / "last.pt" in writer.failed:
            reason = "last.pt could not be written, and without it the next fold cannot begin"
            raise feature_reducer.NotWritten(f"{reason}: free some space, then python train.py --resume")
    if not done["pretrained"]:
        path = checkpoints / "pretrained.pt"
        pretrain(setup, done, folder, path, validate, save, optimizers, scaler, stop)
        if stop.exit_code:
            save()
            return
        written()
        if done["best_validation"] > -math.inf:  # else it could not be written, and the last epoch has to do
            load_agent(path, setup, done["run"])
        optimizers = make_optimizers(setup, POLICY_RATE, ENCODER_RATE)
        done["pretrained"] = True
    if done["batch"] == 0 or done["best_validation"] == -math.inf:  # or no best.pt could be written before a stop
        validation, _ = validate()
        print(f"at batch {done['batch']}: validation {validation:+.1f} bp/day over the benchmark", flush=True)
        done["best_validation"] = -math.inf  # pretraining's own best is loaded now: it is the first candidate
        save(checkpoints / "best.pt", validation)

    log = feature_reducer.RunLog(folder, done["batch"])
    while done["batch"] < BATCHES and not stop.exit_code:
        batch, begun = done["batch"], time.perf_counter()
        epsilon = EPSILON_START + (EPSILON_END - EPSILON_START) * batch / max(1, BATCHES - 1)
        generator = generator_for(SEED, 2, batch)

        # drawn for all environments, of which each of several processes steps its share
        mine, _ = feature_reducer.share(NUM_ENVS)
        coins = setup.policy.assets - 1
        starts = draw_starts(setup.train_rows, NUM_ENVS, STEPS * HOLD, generator)[mine]  # [E]
        start_weights = random_weights(NUM_ENVS, coins + 1, generator)[mine].to(setup.device)
        order = CoinOrder(draw_coin_order(setup, NUM_ENVS, generator).coins[mine])
        drawn = draw_noise(STEPS, NUM_ENVS, coins, epsilon, generator)
        noise, explores = (part[:, mine].to(setup.device) for part in drawn)

        # the market does not depend on the actions: encode the windows of the whole batch first
        rows = segment_rows(starts, STEPS, HOLD)
        with setup.autocast(), stop_where_not_finite(setup, f"in batch {batch + 1}"):
            order_rows = order.coins.repeat(STEPS + 1, 1) if SHUFFLE_COINS else None
            tokens = encode(setup.policy, setup.reducer, setup.windows, rows, ENCODE_BATCH, order_rows)
            encoded = time.perf_counter()
            with one_thread():
                rollout = collect_rollout(
                    setup.policy, tokens.unflatten(0, (STEPS + 1, -1)), setup.env, starts, start_weights, order,
                    noise, explores, epsilon, EXPLORATION_STD, REWARD_SCALE * setup.reward_scale, GAMMA, GAE_LAMBDA,
                )  # fmt: skip
        rollout = Rollout(*(feature_reducer.gather(field, dim=1) for field in rollout))
        stepped = time.perf_counter()

        row = feature_reducer.from_first(rollout_metrics(rollout, HOLD))  # it decides about the learning rates
        row["advantage_mean"] = float(rollout.advantage.mean())
        row["advantage_std"] = float(rollout.advantage.std())
        row["explained_variance"] = explained_variance(rollout.value, rollout.value + rollout.advantage)
        row |= update(setup, rollout, batch, epsilon, optimizers, scaler)
        updated = time.perf_counter()

        # a plateau of the rolling reward halves the learning rates
        done["rolling"] = [*done["rolling"], row["reward"]][-ROLLING:]
        rolling = sum(done["rolling"]) / len(done["rolling"])
        done["stale"] += 1
        if batch + 1 >= min(ROLLING, BATCHES) and rolling > done["best_reward"]:
            done["best_reward"], done["stale"] = rolling, 0
        elif done["stale"] >= PATIENCE:
            done["stale"] = 0
            for optimizer in optimizers:
                optimizer.param_groups[0]["lr"] /= 2
        skipped = row.pop("skipped")
        feature_reducer.count_skipped(done, skipped, row["updates"], setup.modules(), f"in batch {batch + 1}")
        done["batch"] = batch + 1
        stop.agree()
        validation, improved = None, False
        if (VALIDATE_EVERY and (batch + 1) % VALIDATE_EVERY == 0) or batch + 1 == BATCHES:
            validation, improved = validate()

        done["seconds"] += time.perf_counter() - begun
        steps = NUM_ENVS * STEPS
        rates = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
        row |= {
            "rolling_reward": rolling, "validation_bp_day": validation, "loss_scale": scaler.get_scale(),
            "skipped_steps": done["skipped"], "epsilon": epsilon,
            "policy_rate": rates[0], "encoder_rate": rates[-1] if TRAIN_ENCODER else 0.0,
            "encode_steps_per_second": steps / (encoded - begun),
            "rollout_steps_per_second": steps / (stepped - encoded),
            "update_steps_per_second": MINIBATCH * row["updates"] / (updated - stepped),
        }  # fmt: skip
        log.add(batch + 1, row)
        left = (BATCHES - batch - 1) * done["seconds"] / (batch + 1)
        print(
            f"batch {batch + 1:5d}/{BATCHES}  value {row['portfolio_value']:.4f} ({row['benchmark_value']:.4f})  "
            f"reward {bp_per_day(row['reward']):+8.1f} rolling {bp_per_day(rolling):+8.1f} bp/day  "
            f"kl {row['approx_kl']:.4f}  clip {row['clip_fraction']:.2f}  entropy {row['entropy']:+.2f}  "
            f"ev {row['explained_variance']:+.2f}  mse {row['reconstruction_loss']:.3f}  updates {row['updates']:2d}  "
            f"left {left / 60:5.1f} min"
            + ("" if validation is None else f"  validation {validation:+.1f} bp/day{' *' * improved}"),
            flush=True,
        )
        last = (batch + 1) % SAVE_EVERY == 0 or stop.exit_code > 0 or batch + 1 == BATCHES
        if improved or last:
            save(checkpoints / "best.pt" if improved else None, validation, last)
    log.close()
    if not stop.exit_code:
        writer.write({checkpoints / "final.pt": agent_checkpoint(setup, done["run"])})
    written()


def new_state(run: str, started: str, fold: int, pretrain_encoder_rate: float) -> dict:
    """The counters of a run (of one fold of it), as `last.pt` keeps them."""
    return {
        "run": run, "started": started, "fold": fold, "pretrain_steps": 0, "pretrain_sums": {},
        "pretrained": PRETRAIN_EPOCHS == 0, "pretrain_encoder_rate": pretrain_encoder_rate,
        "best_validation": -math.inf, "batch": 0, "rolling": [], "best_reward": -math.inf,
        "stale": 0, "skipped": 0, "skipped_in_a_row": 0, "seconds": 0.0, "out_of_sample": [],
    }  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    script = sys.modules[__name__]
    defaults = dict(vars(script))
    flags = getData.set_constants(script, argv, _JOBS)
    device = feature_reducer.pick_device(DEVICE)
    amp = feature_reducer.amp_enabled(AMP, device)
    getData.assign_constants(script, feature_reducer.apply_scale(SCALE, device, SMALL, flags))
    check_constants()
    if JOB != "train":
        feature_reducer.refuse_many(JOB)
        return report_checkpoint(device, amp) if JOB == "evaluate" else print_signal(device, amp)
    defaults |= SMALL if SCALE == "small" else {}
    changed = {name: value for name, value in flags.items() if value != defaults[name]}
    with feature_reducer.only_first(getData.locked(DATA_DIR / "checkpoints", "training")):
        if feature_reducer.rank() == 0:
            getData.ensure_data(DATA_DIR, SEED)
        feature_reducer.from_first(None)  # the data is there
        return train_folds(device, amp, flags, changed)


def train_folds(device: torch.device, amp: bool, flags: dict[str, object], changed: dict[str, object]) -> int:
    """One training, or one for each walk-forward fold; then the trial's row and the report. Returns the exit code.

    Args:
        flags: the constants given on the command line. changed: those of them that differ from the script's.
    """
    checkpoints = DATA_DIR / "checkpoints"
    fixed = feature_reducer.fixed_constants(globals(), _MAY_CHANGE_ON_RESUME) | {"AMP": amp}
    stop, writer = feature_reducer.StopSignal(), feature_reducer.CheckpointWriter()
    trials = DATA_DIR / "runs" / "trials.csv"
    saved = feature_reducer.load_checkpoint(checkpoints / "last.pt", "train_last") if RESUME else None
    done = saved["done"] if saved else None
    if saved:
        feature_reducer.check_resumed(saved, fixed)
    feature_reducer.check_alike(fixed, "constants")
    folds = [None]
    if WALK_FORWARD:
        _, footer = getData.load_prices(DATA_DIR)
        folds = getData.walk_forward_splits(footer["splits"], footer["split_shares"], footer["purge_ms"], WALK_FORWARD)
    for fold in range(done["fold"] if done else 0, len(folds)):
        previous = saved or (feature_reducer.load_checkpoint(checkpoints / "best.pt", "train") if fold else None)
        setup = None  # the memory of the fold before
        setup = prepare(device, amp, previous, flags, folds[fold], writer.held())
        if saved:
            feature_reducer.check_resumed(saved, fixed, setup.footer)
        elif fold:
            old, done = done, new_state(done["run"], done["started"], fold, done["pretrain_encoder_rate"])
            done["out_of_sample"] = old["out_of_sample"]
        else:
            rate = PRETRAIN_RANDOM_ENCODER_RATE if setup.random_encoder else PRETRAIN_ENCODER_RATE
            started = feature_reducer.from_first(time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))
            done = new_state(RUN or f"{SCALE}-{started.translate(str.maketrans('T', '-', ':-Z'))}", started, fold, rate)
            if feature_reducer.rank() == 0:
                for old in (trials.parent / done["run"]).rglob("metrics.csv"):  # of an earlier run of this name
                    old.unlink()
            append_trial(trials, trial_of(setup, done, fixed, changed))  # one that is stopped has been tried, too
        state = {name: saved[name] for name in ("scaler", "optimizers")} if saved else None
        saved = previous = None  # the weights are in the modules now: no second copy in memory
        train_agent(setup, done, state, fixed, stop, writer)
        if WALK_FORWARD and not stop.exit_code:
            if done["best_validation"] == -math.inf:
                reason = "best.pt could not be written, and it is what this fold is tested with"
                raise feature_reducer.NotWritten(f"{reason}: free some space, then python train.py --resume")
            load_agent(checkpoints / "best.pt", setup, done["run"])
            done["out_of_sample"] = [*done["out_of_sample"], torch.from_numpy(evaluate(setup, "test").weights)]
        stop.agree()
        if stop.exit_code:
            place = f"batch {done['batch']}" if done["pretrained"] else f"pretraining step {done['pretrain_steps']}"
            print(f"stopped after {place}; go on with: python train.py --resume")
            return writer.exit_code(stop.exit_code)
    stop.close()
    print(f"run: {done['run']}\nbatches: {done['batch']}\nskipped steps: {done['skipped']}")
    print(f"best validation: {done['best_validation']:+.1f} bp/day over the benchmark\ncheckpoints: {checkpoints}")
    trial = trial_of(setup, done, fixed, changed)
    trial["validation_bp_day"] = round(done["best_validation"], 3)
    if not TEST:
        append_trial(trials, trial)
        return writer.exit_code()
    agents = out_of_sample(setup, done)
    headline = next(iter(agents.values()))
    trial["test_bp_day"] = round(portfolio_env.metrics(headline)["excess_bp_day"], 3)
    trial["test_sharpe_bar"] = portfolio_env.sharpe_per_bar(portfolio_env.excess_returns(headline))
    append_trial(trials, trial)
    origin = {"run": done["run"], "scale": SCALE, "seed": SEED}
    report(setup, origin, trials.parent, DATA_DIR / "reports" / done["run"], agents, "test", "out of sample")
    return writer.exit_code()


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    feature_reducer.run_training(main)
