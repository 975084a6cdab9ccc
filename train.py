"""Train a portfolio agent and the encoder of its features together: PPO on top of a learned feature reducer.

reads   data/features/*.parquet                      (getData.py; without data: a synthetic market)
        data/checkpoints/feature_reducer.pt          (feature_reducer.py; without it: a random encoder)
writes  data/checkpoints/<run>/{pretrained,best,final}.pt  (policy and reducer)
        data/checkpoints/<run>/last.pt               (everything that --resume needs)
        data/checkpoints/{pretrained,best,final,last}.pt  (links to those of the newest run)
        data/runs/<run>/                             (metrics.csv, TensorBoard)
        data/reports/<run>/       (report.html, metrics.json, series.parquet, trades.csv: the test split)
        data/paper/<run>.sqlite, data/paper/<run>/   (--job paper: its decisions, and the bars it looked at)

    python train.py                    train (scale "full" on a CUDA GPU, "small" otherwise)
    python train.py --resume           go on where the last run stopped
    python train.py --seeds 0,1,2      three trainings, and the mean of their logits as the agent
    python train.py --grid "HOLD=4,12 POLICY_RATE=1e-3,3e-4"    each combination; validation chooses
    python train.py --job evaluate     report on a checkpoint, on these or on other bars
    python train.py --job signal       print the weights that best.pt wants at the newest complete bar
    python train.py --job paper        follow best.pt on an exchange's new bars, without sending any order
    python train.py --job paper --report    page of that account so far
    torchrun --nproc-per-node 2 -- train.py     the same training on two GPUs

Letters in shape comments: T bars, N coins, A = N + 1 assets (cash first), E environments, S steps,
B minibatch, D window values, L latent, W token width. Rewards are log returns per decision, costs are
fractions per side.

Exit codes: 0 done; 1 a mistake, in one line; 2 wrong flag or constant; 3 another training is at work on the
run, or another job keeps the paper account, or that is new and the exchange is away; 5 a checkpoint could not
be written; 130, 143 and 129 stopped by Ctrl-C, SIGTERM or a closed terminal, and saved (a second one ends at
once).
"""

import asyncio
import copy
import ctypes
import hashlib
import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, NotRequired

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from pydantic import Field, StrictBool, StrictFloat, StrictStr
from torch import Tensor, nn
from tqdm import tqdm
from typing_extensions import TypedDict

import feature_reducer
import getData
import portfolio_env
from feature_reducer import (
    Counter,
    EncoderCheckpoint,
    EquivariantLinear,
    FeatureReducer,
    FeatureWindows,
    ReducerCheckpoint,
)
from getData import Count, Fraction, NonNegative, Number, Positive, Seed, Share, UsageError, UserError, Whole
from portfolio_env import Backtest, VectorPortfolioEnv, bp_per_day, decides_every, weights_from_logits

# Job and files
JOB: Literal["train", "evaluate", "signal", "paper"] = "train"  # all but train take the agent in CHECKPOINT
DATA_DIR: Path = getData.DATA_DIR  # holds everything that the scripts read and write; set in getData.py
RUN: str = ""  # name of the run's folders; empty: scale and time, with RESUME the run that saved last
RESUME: bool = False  # go on from last.pt
WALK_FORWARD: Whole = 0  # folds, each trained and tested on later bars; 0: the splits of the features
FOLD: Whole = 0  # the only one of WALK_FORWARD to train, from 1 on; 0: all

# Several runs (seeds, folds, combinations of a grid): each in a process of its own
SEEDS: tuple[Seed, ...] = (getData.SEED,)  # more than one: each is trained, their ensemble is the agent
GRID: str = ""  # constants to vary: "HOLD=4,12 POLICY_RATE=1e-3,3e-4"; a tuple's values are parted by ";"
ENGINE: Literal["local", "ray"] = "local"  # local: one after another; ray: on the cluster at RAY_ADDRESS

# Other jobs than training
CHECKPOINT: str = "best.pt"  # the agent: a file in DATA_DIR/checkpoints, a folder of seeds, or a path
EVALUATE_SPLIT: Literal["train", "validation", "test", "all"] = "test"
HOLDINGS: tuple[NonNegative, ...] = (1.0,)  # weights held now, cash first; missing ones are 0
MAX_AGE: Count = 600  # seconds since the newest bar closed; no signal for older bars

# Paper account
EXCHANGE: str = getData.EXCHANGE  # whose new bars are decided on; no order is ever sent; set in getData.py
BASE_URL: str = getData.BASE_URL  # set in getData.py
POLL: Positive = 20.0  # seconds between two looks at the exchange's clock
MAX_LATE: Annotated[Number, Field(gt=0, lt=300)] = 60.0  # seconds after a bar's close; then it is no decision
CALL: str = ""  # program that gets each decision as JSON on its standard input, as "python broker.py"
CALL_TIMEOUT: Positive = 60.0  # seconds until that program is stopped
REPORT: bool = False  # write the page of the account as it stands, and end

# Market
FEE_RATE: Fraction = portfolio_env.FEE_RATE  # per side; set in portfolio_env.py
SLIPPAGE_RATE: Fraction = portfolio_env.SLIPPAGE_RATE  # per side, on top; set in portfolio_env.py
FILL: Literal["next_open", "close"] = portfolio_env.FILL  # close is optimistic; set in portfolio_env.py
HOLD: Whole = 0  # bars from one decision to the next, everywhere; 0: that of HOLDS which validates best
HOLDS: tuple[Count, ...] = (12, 48, 288)  # an hour, four hours, a day: each is pretrained for PROBE_EPOCHS
PROBE_EPOCHS: Count = 3  # of pretraining, with each of HOLDS
REWARD: Literal["excess", "growth"] = "excess"  # excess: over the equal-weight benchmark
REBALANCE_EVERY: Count = portfolio_env.REBALANCE_EVERY  # bars; of the baselines; set in portfolio_env.py
LOOK_BACK: Count = portfolio_env.LOOK_BACK  # bars; of the baselines; set in portfolio_env.py

# Model (the reducer's sizes apply only without a feature_reducer.pt, which has its own)
SCALE: Literal["auto", "full", "small"] = feature_reducer.SCALE  # auto: full on a GPU; see feature_reducer.py
REDUCER: Literal["checkpoint", "random"] = "checkpoint"  # checkpoint: feature_reducer.pt where it exists
WINDOW_BARS: tuple[Count, ...] = feature_reducer.WINDOW_BARS  # of each timeframe; set in feature_reducer.py
HIDDEN_DIM: Count = feature_reducer.HIDDEN_DIM  # set in feature_reducer.py
LATENT_DIM: Count = feature_reducer.LATENT_DIM  # set in feature_reducer.py
TRUNK: tuple[Count, ...] = (768, 384)  # layers between the latent and the tokens
TOKEN_WIDTH: Count = 192
HEADS: Count = 12
FEED_FORWARD: Count = 768
BLOCKS: Count = 8
TIE_COINS: Literal["always", "pretrain", "never"] = feature_reducer.TIE_COINS  # pretrain: untied after it
ACTION_SCALE: Positive = 3.0  # logits = this x output of the actor head
LOG_STD: Annotated[Number, Field(ge=-10, le=3)] = -0.5  # initial, of the logits; only rollouts have noise
SHUFFLE_COINS: bool = True  # untied: permute each segment's coins, to learn from one about all

# Both phases of training
MASK: Fraction = 0.3  # share of a window's coins x timeframes to hide, against fitting noise
CONFIDENCE: Fraction = 0.95  # of a validation's interval: above 0, or best.pt keeps equal weights

# Pretraining through the accounting
PRETRAIN_EPOCHS: Whole = 10  # 0: off
PRETRAIN_STEPS: Count = 100  # optimizer steps per epoch
PRETRAIN_SEGMENTS: Count = 16  # per optimizer step
PRETRAIN_DECISIONS: Count = 32  # per segment
PRETRAIN_NOISE: NonNegative = 1.0  # standard deviations, on each value of a window, against fitting noise
PRETRAIN_POLICY_RATE: Positive = 0.0003  # Adam; both rates fall to a tenth along a cosine
PRETRAIN_ENCODER_RATE: Positive = 0.00005  # Adafactor, for a trained reducer, whose weights are small
PRETRAIN_RANDOM_ENCODER_RATE: Positive = 0.0001  # for one that starts at random

# Online training
BATCHES: Whole = 5_000
NUM_ENVS: Count = 8  # segments of the market
REPLICAS: Count = 8  # of each segment, with noise of their own: what they share is the market's doing
STEPS: Count = 128  # per environment and batch
REWARD_SCALE: Positive = 0.17  # keeps returns under 1: the gradient's norm is clipped with the critic's in it
UPDATE_EPOCHS: Count = 1  # a segment's windows cost the most; new ones teach more than old ones again
MINIBATCH: Count = 256  # windows
GAMMA_START: Share = 0.5  # per decision, rising linearly: a near horizon shows what an action brings soonest
GAMMA_END: Share = 0.9  # a far one what it costs later
GAE_LAMBDA: Share = 0.95
CLIP: Positive = 0.2
CRITIC_WEIGHT: NonNegative = 0.5
ENTROPY_WEIGHT: NonNegative = 0.01
POLICY_SHARE: NonNegative = 0.7  # of the encoder's loss
RECONSTRUCTION_SHARE: NonNegative = 0.3  # of the encoder's loss
MAX_NORM: Positive = 1.0  # gradient clipping, policy and reducer each
POLICY_RATE: Positive = 0.0005  # Adam; both rates fall to a tenth along a cosine
ENCODER_RATE: Positive = 0.00005
ENCODER_OPTIMIZER: Literal["adafactor", "adam"] = "adafactor"
TRAIN_ENCODER: bool = True  # False: the encoder stays as it starts
TARGET_KL: NonNegative = 0.7  # an update stops at a KL over 1.5 x this, over 10 x the rates fall; 0: never
EPSILON_START: Fraction = 0.075  # share of random steps at the start, falling linearly
EPSILON_END: Fraction = 0.02
EXPLORATION_STD: Positive = 1.0  # of the random steps' logits
ROLLING: Count = 50  # batches in the rolling reward
PATIENCE: Count = 100  # batches without a better rolling reward, after which both learning rates are halved
VALIDATE_EVERY: Whole = 100  # batches; no record: half the rates, back to a find in best.pt; 0: at the end
SAVE_EVERY: Count = 25  # batches between writes of last.pt
TEST: bool = True  # evaluate best and final on the test split at the end

# System
SEED: Seed = getData.SEED  # of a single training: --seed 1 is --seeds 1; set in getData.py
DEVICE: str = feature_reducer.DEVICE  # auto | cpu | cuda | cuda:1 ...; set in feature_reducer.py
AMP: Literal["auto", "on", "off"] = feature_reducer.AMP  # float16 mixed precision; set in feature_reducer.py
ENCODE_BATCH: Count = 512  # windows per forward pass where no gradient is needed

# What SCALE = "small" uses in place of the constants above (a flag still wins)
SMALL = {
    **{name: feature_reducer.SMALL[name] for name in ("WINDOW_BARS", "HIDDEN_DIM", "LATENT_DIM")},
    "TRUNK": (320, 160),
    "TOKEN_WIDTH": 32,
    "HEADS": 4,
    "FEED_FORWARD": 128,
    "BLOCKS": 2,
    "PRETRAIN_STEPS": 20,
    "PRETRAIN_SEGMENTS": 48,
    "PRETRAIN_POLICY_RATE": 0.0005,  # a smaller network tolerates larger steps, and takes fewer
    "PRETRAIN_ENCODER_RATE": 0.0001,
    "PRETRAIN_RANDOM_ENCODER_RATE": 0.0004,  # each hidden unit sums a seventh as many inputs
    "BATCHES": 40,  # too few for PATIENCE to matter
    "NUM_ENVS": 16,
    "MINIBATCH": 512,
    "POLICY_RATE": 0.001,  # as large as a start at random can use; validations that fall lower them
    "ENCODER_RATE": 0.0008,
    "VALIDATE_EVERY": 10,
    "ROLLING": 20,
}

# The flags that each job takes
_AGENT = ("JOB", "DATA_DIR", "CHECKPOINT", "DEVICE", "AMP", "ENCODE_BATCH")
_TRADING = ("FEE_RATE", "SLIPPAGE_RATE", "FILL", "REBALANCE_EVERY", "LOOK_BACK")
_PAPER = ("EXCHANGE", "BASE_URL", "POLL", "MAX_LATE", "CALL", "CALL_TIMEOUT", "REPORT")
_JOBS = {
    "train": ("all but", "CHECKPOINT", "EVALUATE_SPLIT", "HOLDINGS", "MAX_AGE", *_PAPER),
    "evaluate": ("only", *_AGENT, "EVALUATE_SPLIT", *_TRADING),
    "signal": ("only", *_AGENT, "HOLDINGS", "MAX_AGE"),
    "paper": ("only", *_AGENT, "RUN", *_PAPER, "FEE_RATE", "SLIPPAGE_RATE", "REBALANCE_EVERY", "LOOK_BACK"),
}
# What the page of a paper account takes of these
_OF_PAGE = {"JOB", "DATA_DIR", "CHECKPOINT", "RUN", "REPORT", "REBALANCE_EVERY", "LOOK_BACK"}

# All other constants must be the same in a resumed run
_MAY_CHANGE_ON_RESUME = (
    "JOB", "DATA_DIR", "RUN", "RESUME", "DEVICE", "ENCODE_BATCH", "SAVE_EVERY", "TEST", "REBALANCE_EVERY",
    "LOOK_BACK", "CHECKPOINT", "EVALUATE_SPLIT", "HOLDINGS", "MAX_AGE", "SEEDS", "GRID", "ENGINE",
    *_PAPER,
)  # fmt: skip
# Not in a grid: what the accounts of all combinations have in common, and what several runs set themselves
_NOT_IN_A_GRID = (
    *_MAY_CHANGE_ON_RESUME, "SEED", "WALK_FORWARD", "FOLD", "SCALE", "AMP", "FEE_RATE", "SLIPPAGE_RATE",
    "FILL",
)  # fmt: skip
_RECONSTRUCTION_WINDOWS = 256  # in the sample that the report reconstructs
_LEAST_FACTOR = 1 / 32  # of the learning rates
# times TARGET_KL, measured before an update's last step: the steps of a well pretrained agent at full scale
# were too large at first
_TOO_FAR = 10

_SEGMENT = 96  # decisions, of an evaluation's segments that run side by side
_ROUNDS = 4  # of the segments, before what has not settled is decided one after another


# ----------------------------------------------------------------------------------------------------- policy


class ScaleGradient(torch.autograd.Function):
    """The identity forward; multiplies the gradient by a constant backward."""

    @staticmethod
    def forward(ctx, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.scale, None


class PolicyShape(TypedDict):
    """The keywords of `ActorCritic` that give a policy its shape, as checkpoints keep them."""

    assets: Count
    trunk: Annotated[list[Count], Field(min_length=2, max_length=2)]
    width: Count
    heads: Count
    feed_forward: Count
    blocks: Count
    action_scale: Positive
    tied: StrictBool


class AnyLayerNorm(nn.Module):
    """Layer normalisation of any width, without weights of its own."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x [..., W] with mean 0 and variance 1 over the last dimension."""
        return F.layer_norm(x, x.shape[-1:])


class ActorCritic(nn.Module):
    """Policy and value from the latent and the weights held now; attention runs over the assets.

    Args:
        latent_dim: L; assets: A, cash included.
        trunk: widths of the two layers between latent and tokens; the rest describes the transformer.
        action_scale: the actor head's output is multiplied by it.
        log_std: initial log standard deviation of the logits.
        tied: one set of weights for all coins. The market's block becomes the cash token, and the agent is
            equivariant: permuting the coins of the latent and of the weights held permutes the logits,
            however many coins there are. `latent_dim`, `trunk` are the widths in all at A - 1 coins.
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
        tied: bool = False,
    ) -> None:
        super().__init__()
        self.width, self.action_scale, self.tied = width, action_scale, tied
        self.shape = PolicyShape(
            assets=assets, trunk=list(trunk), width=width, heads=heads, feed_forward=feed_forward,
            blocks=blocks, action_scale=action_scale, tied=tied,
        )  # fmt: skip
        widths = latent_dim, *trunk
        if tied:
            norm, layer = AnyLayerNorm(), EquivariantLinear
            sizes = [*(feature_reducer.blocks_of(wide, assets - 1) for wide in widths), (width, width)]
        else:
            norm, layer, sizes = nn.LayerNorm(latent_dim), nn.Linear, [*widths, assets * width]
        layers = [layer(*pair) for pair in pairwise(sizes)]
        self.trunk = nn.Sequential(norm, layers[0], nn.GELU(), layers[1], nn.GELU(), layers[2])
        embedding = None if tied else nn.Parameter(0.02 * torch.randn(assets, width))
        self.register_parameter("asset_embedding", embedding)  # tied: the bias of the last layer is one
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
        self.log_std = nn.Parameter(torch.full((1 if tied else assets - 1,), log_std))
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2 and "embedding" not in name:
                sum_of_two = tied and "trunk" in name  # of a coin's own and the shared part
                nn.init.orthogonal_(parameter, gain=1.0 if "in_proj" in name or sum_of_two else math.sqrt(2))
        nn.init.orthogonal_(self.actor.weight, gain=0.01)
        # until the critic has learnt something, 0 is a better value than a random one
        for zero in (self.critic.weight, self.critic.bias, self.actor.bias):
            nn.init.zeros_(zero)

    @property
    def abstains(self) -> bool:
        """Whether its logits are 0 whatever the market: it holds all assets alike."""
        return not self.actor.weight.any()

    def market_tokens(self, latent: Tensor) -> Tensor:
        """Return tokens [..., A, W] of latents [..., L]; they do not depend on the weights held."""
        tokens = self.trunk(latent).unflatten(-1, (-1, self.width))
        # tied: the market's block, which comes last, is the cash token
        return tokens.roll(1, -2) if self.tied else tokens + self.asset_embedding

    def forward(self, tokens: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean logits [B, N] (cash is at 0) and values [B] of tokens [B, A, W], weights [B, A].

        All of it is in float32: over so few tokens, once per decision, casts to float16 would cost more than
        they save. The critic trains its head alone: what it can predict of a market's returns is
        little, and its errors drown the actor in layers that both share.
        """
        with torch.autocast(tokens.device.type, enabled=False):
            hidden = tokens.float() + self.weight_embedding(weights.unsqueeze(-1))  # [B, A, W]
            for block in self.blocks:
                hidden = block(hidden)
            hidden = self.norm(hidden)
            scores = self.actor(hidden).squeeze(-1)  # [B, A]
            mean = self.action_scale * (scores[:, 1:] - scores[:, :1])
            return mean, self.critic(hidden.mean(1).detach()).squeeze(-1)

    @torch.no_grad()
    def to_dense(self, coins: int) -> "ActorCritic":
        """Return the function of a tied policy of so many coins as a dense one."""
        layers = [self.trunk[position] for position in (1, 3, 5)]
        latent_dim, *trunk = (feature_reducer.width_of(layer.inputs, coins) for layer in layers)
        changes = {"assets": coins + 1, "trunk": trunk, "tied": False}
        dense = ActorCritic(latent_dim, **(self.shape | changes)).to(self.log_std.device)
        for position, layer in zip((1, 3, 5), layers, strict=True):
            dense.trunk[position] = layer.to_dense(coins)
        for part in (dense.trunk[5].weight, dense.trunk[5].bias):
            part.copy_(part.unflatten(0, (-1, self.width)).roll(1, 0).flatten(0, 1))  # cash first
        dense.asset_embedding.zero_()
        dense.log_std.copy_(self.log_std.expand(coins))
        rest = {name: part for name, part in self.state_dict().items() if not name.startswith("trunk")}
        dense.load_state_dict({**dense.state_dict(), **rest, "log_std": dense.log_std})
        return dense


class PolicyEnsemble(nn.Module):
    """Several policies of one shape as one, whose logits are the mean of theirs; for `EncoderEnsemble`."""

    tied = False

    def __init__(self, policies: Sequence[ActorCritic]) -> None:
        super().__init__()
        self.members = nn.ModuleList(policies)

    @property
    def abstains(self) -> bool:
        """Whether all members do."""
        return all(policy.abstains for policy in self.members)

    def market_tokens(self, latent: Tensor) -> Tensor:
        """Return the members' tokens [..., A, K * W] side by side, of latents [..., K * L]."""
        parts = latent.chunk(len(self.members), -1)
        return torch.cat([one.market_tokens(part) for one, part in zip(self.members, parts, strict=True)], -1)

    def forward(self, tokens: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Return the members' mean logits [B, N] and values [B] of tokens [B, A, K * W], weights [B, A]."""
        parts = tokens.chunk(len(self.members), -1)
        outputs = [one(part, weights) for one, part in zip(self.members, parts, strict=True)]
        logits, values = (torch.stack(part).mean(0) for part in zip(*outputs, strict=True))
        return logits, values


class EncoderEnsemble(nn.Module):
    """Several reducers of one shape as one, whose latents [B, K * L] stand side by side."""

    def __init__(self, reducers: Sequence[FeatureReducer]) -> None:
        super().__init__()
        self.members = nn.ModuleList(reducers)

    def encoder(self, windows: Tensor) -> Tensor:
        """Return the members' latents [B, K * L] of windows [B, D]."""
        return torch.cat([one.encoder(windows) for one in self.members], -1)

    def forward(self, windows: Tensor) -> tuple[Tensor, Tensor]:
        """Return the latents [B, K * L] and the mean of the members' reconstructions [B, D]."""
        latents, parts = zip(*(one(windows) for one in self.members), strict=True)
        return torch.cat(latents, -1), torch.stack(parts).mean(0)


def gaussian_log_prob(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Return the log density [...] of independent Gaussians at x [..., N].

    A Gaussian on logits followed by a softmax is logistic-normal (Aitchison & Shen 1980); the softmax's
    Jacobian cancels in every ratio.
    """
    return (-0.5 * ((x - mean) / log_std.exp()).square() - log_std - 0.5 * math.log(2 * math.pi)).sum(-1)


def gaussian_entropy(log_std: Tensor) -> Tensor:
    """Return the entropy of the Gaussian part of the policy, in nats."""
    return (log_std + 0.5 * math.log(2 * math.pi * math.e)).sum()


# -------------------------------------------------------------------------------------------------------- PPO


def compute_gae(
    rewards: Tensor, values: Tensor, next_values: Tensor, terminated: Tensor, truncated: Tensor,
    gamma: float, gae_lambda: float,
) -> Tensor:  # fmt: skip
    """Return generalised advantage estimates [S, E] (Schulman et al. 2016, eq. 16); all tensors are [S, E].

    `next_values` belong to the states that the steps led to, before any reset. A truncated end bootstraps
    from them, a terminated one is worth 0; no advantage flows back across either.
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
    """One batch of experience, [S, E, ...] each; the K replicas of a segment stand side by side in E."""

    rows: Tensor  # decision rows
    masked: Tensor  # coins and timeframes hidden in the window [S, E, N, F]
    order: Tensor  # coin in each slot of what the policy sees [S, E, N]; weights and logits are in that order
    weights: Tensor  # held when deciding [S, E, A]
    logits: Tensor  # sampled [S, E, N]
    explores: Tensor  # whether the step is random
    log_prob: Tensor  # of the sampled logits where it is not
    value: Tensor
    returns: Tensor  # what the critic learns: value + GAE
    advantage: Tensor  # GAE less the replicas' baseline
    alive: Tensor  # False after ruin: such steps are not trained on
    reward: Tensor  # unscaled
    portfolio: Tensor  # value of the portfolio after each step, 1 at the start
    benchmark: Tensor


@dataclass(frozen=True, kw_only=True)
class PPO:
    """The constants of the same names that the losses depend on."""

    seed: int
    gamma: float
    gae_lambda: float
    reward_scale: float  # of rewards, which are in standard deviations of a return between decisions
    exploration_std: float  # of the random steps' logits
    clip: float
    critic_weight: float
    entropy_weight: float
    policy_share: float
    reconstruction_share: float
    target_kl: float
    max_norm: float
    replicas: int
    update_epochs: int
    minibatch: int
    shuffle_coins: bool


def generator_for(*key: int, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a generator that depends on the key alone, so that a resumed run draws the same numbers."""
    return torch.Generator(device).manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))


def random_weights(count: int, assets: int, generator: torch.Generator) -> Tensor:
    """Draw weights [E, A]: half of them all in one random asset, half uniform on the simplex; float64."""
    spread = -torch.rand(count, assets, generator=generator, dtype=torch.float64).clamp(min=1e-12).log()
    single = F.one_hot(torch.randint(assets, (count,), generator=generator), assets).double()
    pick = torch.rand(count, 1, generator=generator) < 0.5
    return torch.where(pick, single, spread / spread.sum(1, keepdim=True))


def draw_starts(rows: Tensor, count: int, bars: int, generator: torch.Generator) -> Tensor:
    """Draw starts [E] of segments whose bars and fills all lie within the split `rows` [R]."""
    check_segment(rows, bars)
    return rows[torch.randint(len(rows) - bars - 2, (count,), generator=generator).to(rows.device)]


def check_segment(rows: Tensor, bars: int) -> None:
    """Raise UserError where the split `rows` [R] is too short for segments of so many bars."""
    needed, found = bars + 3, len(rows)
    if found < needed:
        raise UserError(f"too little history: a segment needs {needed} bars, the training split has {found}")


def draw_noise(
    steps: int, segments: int, replicas: int, coins: int, epsilon: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Draw standard normal noise [S, G, K, N] of the actions, and whether each step explores [S, G].

    The replicas of a segment explore together, with the same action: the fees of one replica's random step
    would drown what the others' noise shows.
    """
    noise = torch.randn(steps, segments, replicas, coins, generator=generator)
    explores = torch.rand(steps, segments, generator=generator) < epsilon
    return torch.where(explores[..., None, None], noise[:, :, :1], noise), explores


def draw_orders(count: int, coins: int, generator: torch.Generator) -> Tensor:
    """Draw an order of the coins for each segment [E, N]."""
    return torch.rand(count, coins, generator=generator).argsort(1)


def segment_rows(starts: Tensor, steps: int, hold_bars: int = 1) -> Tensor:
    """Return the rows [(S + 1) * E] of the states of segments from `starts` [E] on, step by step."""
    return (starts + hold_bars * torch.arange(steps + 1, device=starts.device).unsqueeze(1)).flatten()


class CoinOrder:
    """Convert weights between the market's order of the coins and that of the policy's slots, cash first.

    Args:
        order: coin in each slot [E, N].
    """

    def __init__(self, order: Tensor) -> None:
        self.coins = order
        self._to_slots = torch.cat([torch.zeros_like(order[:, :1]), order + 1], 1)  # [E, A]
        self._to_market = self._to_slots.argsort(1)

    def to_slots(self, weights: Tensor) -> Tensor:
        """Return weights [E, A] of the market's order in that of the slots."""
        return weights.gather(1, self._to_slots)

    def to_market(self, weights: Tensor) -> Tensor:
        """Return weights [E, A] of the slots' order in the market's."""
        return weights.gather(1, self._to_market)


@dataclass(frozen=True)
class Setup:
    """What a run works on."""

    device: torch.device
    amp: bool
    footer: dict
    windows: FeatureWindows
    env: VectorPortfolioEnv  # knows the cost and the bars between decisions
    prices: tuple[np.ndarray, np.ndarray]  # open, close [T, N]
    train_rows: Tensor  # decision rows of the training split [R]
    spans: dict[str, tuple[int, int]]  # split -> first decision row and the one after the last
    return_scale: float  # 1 / standard deviation of a return from one decision to the next
    ppo: PPO
    policy: ActorCritic | PolicyEnsemble
    reducer: FeatureReducer | EncoderEnsemble
    random_encoder: bool  # whether the reducer starts at random

    def autocast(self) -> torch.autocast:
        """Return the context of half precision, where this run has it on."""
        return feature_reducer.half_precision(self.device, self.amp)

    def shuffles(self) -> bool:
        """Return whether the coins of each segment are permuted; to tied weights it makes no difference."""
        return self.ppo.shuffle_coins and not self.policy.tied

    def modules(self) -> dict[str, nn.Module]:
        """Return the trained modules by the names that messages use."""
        return {"policy": self.policy, "reducer": self.reducer}


@dataclass(frozen=True)
class Draws:
    """What is random in a rollout of K replicas of G segments, drawn before it begins."""

    starts: Tensor  # decision rows [G]
    weights: Tensor  # held at the start [G, A], float64
    order: CoinOrder  # [G, N]
    masked: Tensor  # coins and timeframes hidden in each window [S + 1, G, N, F]
    noise: Tensor  # of the actions, as `draw_noise` gives it [S, G, K, N]
    explores: Tensor  # [S, G]


@torch.no_grad()
def encode(
    policy: ActorCritic, reducer: FeatureReducer, windows: FeatureWindows, rows: Tensor, chunk: int,
    order: Tensor | None = None, masked: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Return the market tokens [R, A, W] of many decisions in a few large passes of `chunk` windows."""
    tokens = []
    for part in torch.arange(len(rows), device=rows.device).split(chunk):
        inputs = windows(rows[part], None if order is None else order[part])
        if masked is not None:
            mask_windows(inputs, masked[part], windows)
        tokens.append(policy.market_tokens(reducer.encoder(inputs)))
    return torch.cat(tokens)


@torch.no_grad()
def collect_rollout(setup: Setup, tokens: Tensor, draws: Draws) -> Rollout:
    """Step K replicas of G segments S times.

    Args:
        tokens: of the encoded windows [S + 1, G, A, W], from those of `draws.starts` on.
    """
    policy, env, ppo = setup.policy, setup.env, setup.ppo
    steps, _, replicas, _ = draws.noise.shape
    starts, weights, coins = (
        part.repeat_interleave(replicas, 0) for part in (draws.starts, draws.weights, draws.order.coins)
    )
    order, noise = CoinOrder(coins), draws.noise.flatten(1, 2)  # [S, E, N]
    explores, masked = (part.repeat_interleave(replicas, 1) for part in (draws.explores, draws.masked))
    weights = env.reset(starts, steps, weights)  # [E, A] float64
    log_std = policy.log_std.float()
    alive = torch.ones(len(starts), dtype=torch.bool, device=tokens.device)
    names = ("rows", "order", "weights", "logits", "log_prob", "value", "alive", "reward", "portfolio")
    kept: dict[str, list[Tensor]] = {name: [] for name in (*names, "benchmark")}
    terminations, truncations = [], []
    for step in range(steps + 1):
        weights = order.to_slots(weights)
        mean, value = policy(tokens[step].repeat_interleave(replicas, 0), weights.float())
        kept["value"].append(value)
        if step == steps:
            break
        own = mean + log_std.exp() * noise[step]
        logits = torch.where(explores[step, :, None], ppo.exploration_std * noise[step], own)
        kept["rows"].append(env.row)
        kept["order"].append(order.coins)
        kept["weights"].append(weights.float())
        kept["logits"].append(logits)
        kept["log_prob"].append(gaussian_log_prob(logits, mean, log_std))
        kept["alive"].append(alive)
        target = order.to_market(weights_from_logits(logits.double()))
        weights, reward, terminated, truncated = env.step(target)
        kept["reward"].append(reward)
        kept["portfolio"].append(env.value)
        kept["benchmark"].append(env.benchmark_value)
        terminations.append(terminated)
        truncations.append(truncated)
        alive = alive & ~terminated
    stacked = {name: torch.stack(items) for name, items in kept.items()}
    values = stacked["value"]  # [S + 1, E]
    stacked["value"] = values[:-1]
    rewards = (ppo.reward_scale * setup.return_scale * stacked["reward"]).float()
    ends = torch.stack(terminations), torch.stack(truncations)
    gae = compute_gae(rewards, values[:-1], values[1:], *ends, ppo.gamma, ppo.gae_lambda)
    advantage = minus_others(gae.unflatten(1, (-1, replicas)), stacked["alive"].unflatten(1, (-1, replicas)))
    return Rollout(
        **stacked, masked=masked[:-1], explores=explores, returns=values[:-1] + gae,
        advantage=advantage.flatten(1, 2),
    )  # fmt: skip


def minus_others(advantage: Tensor, alive: Tensor) -> Tensor:
    """Return advantages [..., K] less the mean of the others that are alive; 0 for those that are not.

    The replicas of a segment meet the same market, and no action moves it. So the mean of the others is a
    baseline that knows the market's future but not the replica's own action, and changes no expected
    gradient (leave-one-out over an input-dependent baseline: Mao et al. 2019, arXiv:1807.02264, section 4).
    Which steps explore, and the actions there, are part of that common input; they depend on no weight.
    """
    kept = torch.where(alive, advantage, 0.0)
    others = alive.sum(-1, keepdim=True) - alive.int()
    baseline = (kept.sum(-1, keepdim=True) - kept) / others.clamp(min=1)
    return torch.where(alive, advantage - baseline, 0.0)


def flatten_rollout(rollout: Rollout, replicas: int) -> Rollout:
    """Return the transitions of each window [S * G, K, ...], without those after the ruin of all replicas."""
    windows = [field.unflatten(1, (-1, replicas)).flatten(0, 1) for field in rollout]
    used = Rollout(*windows).alive.any(1)
    return Rollout(*(field[used] for field in windows))


def normalised(advantage: Tensor, alive: Tensor) -> Tensor:
    """Scale advantages [B, K] to mean 0 and standard deviation 1 over those alive; a single one stays."""
    counted = advantage[alive]
    if len(counted) < 2:  # the standard deviation of one number is NaN
        return advantage
    return (advantage - counted.mean()) / (counted.std() + 1e-8)


def ppo_losses(
    mean: Tensor, value: Tensor, log_std: Tensor, batch: Rollout, advantage: Tensor, weight: Tensor, ppo: PPO
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """Return the policy loss (clipped PPO, Schulman et al. 2017, eq. 7, 9) of a minibatch, and its parts.

    A step is random with probability epsilon, whatever the weights are: given that it is, the density of its
    action does not depend on them and the ratio is 1; given that it is not, the density is the Gaussian's.
    approx_kl is the estimator (ratio - 1) - log ratio (Schulman 2020), never negative.

    Args:
        advantage, weight: [B, K], normalised over the minibatch, of which `batch` may be one process's share:
            the weights to mean 1, with 0 for what followed a ruin.
    """
    log_ratio = gaussian_log_prob(batch.logits, mean, log_std) - batch.log_prob
    log_ratio = torch.where(batch.explores | (weight == 0), 0.0, log_ratio)
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - ppo.clip, 1 + ppo.clip)
    actor = -(weight * torch.min(ratio * advantage, clipped * advantage)).mean()
    critic = (weight * (value - batch.returns).square()).mean()
    entropy = gaussian_entropy(log_std.expand(mean.shape[-1]))
    loss = actor + ppo.critic_weight * critic - ppo.entropy_weight * entropy
    stats = {
        "policy_loss": loss,
        "actor_loss": actor,
        "critic_loss": critic,
        "entropy": entropy,
        "approx_kl": (weight * (ratio - 1 - log_ratio)).mean(),
        "clip_fraction": (weight * ((ratio - 1).abs() > ppo.clip)).mean(),
        "ratio_max": ratio.max(),
    }
    return loss, {name: value.detach() for name, value in stats.items()}


def joint_loss(policy_loss: Tensor, reconstruction_loss: Tensor, reconstruction_share: float) -> Tensor:
    """Return the scalar to differentiate.

    With the latent passed through ScaleGradient(0.7) the policy gets its own full gradient and the encoder
    exactly that of 0.7 policy loss + 0.3 reconstruction loss.
    """
    return policy_loss + reconstruction_share * reconstruction_loss


def optimizer_step(
    loss: Tensor, setup: Setup, optimizers: Sequence[torch.optim.Optimizer], scaler: torch.amp.GradScaler
) -> dict[str, float]:
    """Take one step with both optimizers, after clipping each gradient in true units; return their norms.

    A step with gradients that are not finite is skipped. Without its own optimizer the reducer stays.
    """
    trained = (setup.policy, setup.reducer)[: len(optimizers)]
    norms, skipped = feature_reducer.clipped_step(loss, trained, optimizers, scaler, setup.ppo.max_norm)
    names = ("policy_grad_norm", "encoder_grad_norm")
    return {**dict.fromkeys(names, 0.0), **dict(zip(names, norms, strict=False)), "skipped": float(skipped)}


def explained_variance(values: Tensor, returns: Tensor) -> float:
    """Return 1 - Var(returns - values) / Var(returns): 1 for a perfect critic, 0 for a constant one."""
    variance = returns.var()
    return float(1 - (returns - values).var() / variance) if variance > 0 else float("nan")


def baseline_share(rollout: Rollout) -> float:
    """Return the share of the variance of the GAE that the replicas' baseline took out."""
    gae = (rollout.returns - rollout.value)[rollout.alive]
    return float(1 - rollout.advantage[rollout.alive].var() / gae.var()) if gae.var() > 0 else math.nan


def finite_mean(values: list[float]) -> float:
    """Return the mean of the finite values (a skipped step has infinite gradients), NaN without any."""
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan


def rollout_metrics(rollout: Rollout, hold_bars: int = 1) -> dict[str, float]:
    """Return the figures of one batch, means over the environments (exploration and its fees included)."""
    alive = rollout.alive
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
        "advantage_mean": float(rollout.advantage[alive].mean()),
        "advantage_std": float(rollout.advantage[alive].std()),
        "explained_variance": explained_variance(rollout.value[alive], rollout.returns[alive]),
        "baseline_share": baseline_share(rollout),
    }


# ------------------------------------------------------------------------------------------------- evaluation


@torch.no_grad()
def decide(policy: ActorCritic, tokens: Tensor, weights: Tensor) -> Tensor:
    """Return targets [B, A], float64, of the agent (the policy's mean) that holds `weights` [B, A]."""
    mean, _ = policy(tokens, weights.float())
    return weights_from_logits(mean.double())


def agent_targets(
    policy: ActorCritic, tokens: Tensor, mark: Tensor, segments: int, held: Tensor | None = None
) -> Tensor:
    """Return targets [R, A], float64, of the deterministic agent over R decisions in a row.

    The weights held are the agent's only state, and their influence fades quickly. So the decisions are cut
    into `segments` that run in parallel: in the first round each starts from all cash, in the next ones from
    where the segment before it ended, until every segment holds bit for bit what it held in the round before.
    If that does not happen within a few rounds (an agent that keeps what it holds), the rest is decided one
    after another, from the first segment that still changes.

    Args:
        tokens: market tokens of the decisions [R, A, W].
        mark: price relatives [R, A] from the fill of a decision to the close at which the next one is taken.
        held: weights [1, A] at the first decision; None: all cash.
    """
    count, assets = mark.shape
    length = -(-count // segments)
    segments = -(-count // length)
    rows = torch.arange(segments * length, device=mark.device).view(segments, length).T  # [S, P]
    inside = rows < count  # the last segment may be shorter
    rows = rows.clamp(max=count - 1)
    cash = torch.eye(assets, dtype=mark.dtype, device=mark.device)[:1]
    first = cash if held is None else held
    start = torch.cat([first, cash.expand(segments - 1, assets)])
    seen = mark.new_full((length + 1, segments, assets), math.inf)  # at each decision, and the end
    targets = mark.new_empty(length, segments, assets)

    def moved(weights: Tensor, step: int) -> Tensor:
        """Return which segments [P] hold other weights at this step than in the round before."""
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
        start = torch.cat([first, seen[length, :-1]])
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


# ------------------------------------------------------------------------------------ this script's own steps


def check_constants() -> None:
    """Raise UsageError for constants that cannot work together, before anything is computed."""
    processes, batch, cost = feature_reducer.world_size(), NUM_ENVS * STEPS, FEE_RATE + SLIPPAGE_RATE
    parts = RUN.split("/") if RUN else []
    plain_name = all(
        part not in ("", ".", "..") and "\0" not in part and len(os.fsencode(part)) <= (200 if place else 100)
        for place, part in enumerate(parts)
    ) and all(re.match("fold-|seed-|[A-Z_]+=", part) for part in parts[1:])  # as `Planned.name` has them
    wrong = {
        f"TRUNK must be two widths, not {TRUNK}": len(TRUNK) != 2,
        f"FEE_RATE + SLIPPAGE_RATE must be under 1 per side, not {cost}": cost >= 1,
        f"RUN must be a plain name, not {RUN!r}": not plain_name,
        f"RUN must be another name than {RUN}": (
            RUN.startswith(("trials.csv", "feature_reducer")) or any(part.endswith(".pt") for part in parts)
        ),
        f"TOKEN_WIDTH {TOKEN_WIDTH} must be divisible by HEADS {HEADS}": TOKEN_WIDTH % HEADS != 0,
        f"NUM_ENVS {NUM_ENVS} must be divisible by the {processes} processes": NUM_ENVS % processes != 0,
        f"MINIBATCH {MINIBATCH} must be within a batch of NUM_ENVS x STEPS = {batch}": batch < MINIBATCH,
        "WALK_FORWARD is a test: it needs TEST": WALK_FORWARD > 0 and not FOLD and not TEST,
        f"FOLD must be one of the WALK_FORWARD {WALK_FORWARD} folds, not {FOLD}": FOLD > WALK_FORWARD,
        f"SEEDS must be different numbers, not {SEEDS}": len(set(SEEDS)) < len(SEEDS),
        f"SEED {SEED} is not in SEEDS {SEEDS}: set SEEDS, or SEED in getData.py": SEED not in SEEDS,
        "ENGINE = ray is for several runs: SEEDS, WALK_FORWARD or GRID": ENGINE == "ray" and not several(),
        f"several runs need a process each, not {processes} for one: start without torchrun": (
            several() and processes > 1
        ),
        "HOLD = 0 is chosen by pretraining: PRETRAIN_EPOCHS = 0 needs --hold": HOLD == PRETRAIN_EPOCHS == 0,
        f"HOLDS must be different numbers, not {HOLDS}": len(set(HOLDS)) < len(HOLDS),
        f"BASE_URL must begin with http:// or https:// and a host, not {BASE_URL!r}": (
            BASE_URL != "" and not getData.is_web_address(BASE_URL)
        ),
        f"CALL must be a program and its arguments, not {CALL!r}": CALL != "" and not can_be_called(CALL),
    }
    for message, is_wrong in wrong.items():
        if is_wrong:
            raise UsageError(message)
    grid_points()


def several() -> bool:
    """Return whether the constants ask for more than one run."""
    return bool(GRID.strip()) or len(SEEDS) > 1 or (WALK_FORWARD > 0 and not FOLD)


def grid_points() -> list[dict[str, object]]:
    """Return the constants of each combination of GRID, {name: value}; one without any where it is empty.

    Raises:
        UsageError: a name or a value that no constant has, or that cannot differ between the runs of a grid.
    """
    script, axes = sys.modules[__name__], {}
    for word in GRID.split():
        name, _, values = word.partition("=")
        if name in axes or name in _NOT_IN_A_GRID:
            raise UsageError(
                f"GRID: {name} {'is there twice' if name in axes else 'is the same in all runs'}"
            )
        parted = ";" if isinstance(getattr(script, name, None), tuple) else ","
        try:
            axes[name] = [getData.constant_from_text(script, name, text) for text in values.split(parted)]
        except UsageError as error:
            raise UsageError(f"GRID: {error}") from None
        if len(set(axes[name])) < len(axes[name]):
            raise UsageError(f"GRID: {name} has a value twice")
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


@dataclass(kw_only=True)
class Progress(feature_reducer.StepCounts):
    """Where a run stands; kept in last.pt."""

    run: StrictStr
    started: StrictStr  # UTC
    hold_bars: Counter = 0  # between decisions; 0: not chosen yet
    probes: dict[str, StrictFloat] = field(default_factory=dict)  # bars -> best validation, of those tried
    pretrain_encoder_rate: StrictFloat
    pretrain_steps: Counter = 0
    pretrain_sums: dict[str, StrictFloat] = field(default_factory=dict)  # of the epoch's figures
    pretrained: StrictBool = False
    batch: Counter = 0
    best_validation: StrictFloat = -math.inf  # bp per day over the benchmark, of the best checkpoint on disk
    found: StrictBool = False  # by more than chance; otherwise best.pt keeps equal weights
    best_failed: StrictBool = False  # its last write: a resume tries again
    rolling: list[StrictFloat] = field(default_factory=list)  # rewards of the last batches
    best_reward: StrictFloat = -math.inf  # rolling reward
    stale: Counter = 0  # batches since then
    rate_factor: StrictFloat = 1.0  # of the online learning rates
    seconds: StrictFloat = 0.0

    def rolling_reward(self) -> float:
        """Return the mean reward of the last batches."""
        return sum(self.rolling) / len(self.rolling)


class Validation(NamedTuple):
    """Growth over the benchmark on the validation split, and the ends of its interval, in bp per day."""

    growth: float
    low: float  # NaN: the split is too short for an interval
    high: float

    @property
    def found(self) -> bool:
        """Whether its own interval is above 0, or could not be told; best of many, some are so by chance."""
        return not (self.low <= 0 or math.isnan(self.growth))

    def beats(self, progress: Progress) -> bool:
        """Whether it is the best so far; what is above chance comes before all that is not."""
        return (self.found, self.growth) > (progress.found, progress.best_validation)

    def __str__(self) -> str:
        interval = f" ({self.low:+.0f} to {self.high:+.0f})" if math.isfinite(self.low) else ""
        return f"validation {self.growth:+.1f}{interval} bp/day over the benchmark"


class Agent(EncoderCheckpoint):
    """What every checkpoint of a run holds."""

    run: str
    seed: Seed
    hold_bars: Count  # from one decision to the next
    policy: feature_reducer.Weights
    policy_shape: PolicyShape


class Member(TypedDict):
    """What the agents of an ensemble do not have in common."""

    seed: Seed
    policy: feature_reducer.Weights
    reducer: feature_reducer.Weights


class AgentCheckpoint(Agent):
    """pretrained.pt, best.pt and final.pt; of an ensemble its first agent, and the `others`."""

    kind: Literal["train"]
    others: NotRequired[list[Member]]


class AgentState(Agent):
    """last.pt."""

    kind: Literal["train_last"]
    optimizers: list[dict]
    scaler: dict
    progress: Progress
    fixed: dict[str, object]  # constants that must be the same in a resumed run


@dataclass
class Run:
    """A training under way: what its functions hand to each other beside the `Setup`."""

    progress: Progress
    fixed: dict[str, object]  # constants that must be the same in a resumed run
    optimizers: tuple[torch.optim.Optimizer, ...]
    scaler: torch.amp.GradScaler
    stop: feature_reducer.StopSignal
    writer: feature_reducer.CheckpointWriter
    trial: dict[str, object] | None = None  # of a new run: counted from its first save on


def return_scale_of(close: np.ndarray, span: tuple[int, int], hold_bars: int) -> float:
    """Return 1 / standard deviation of the coins' log returns over `hold_bars`, relative to their mean."""
    log_close = np.log(close[span[0] : span[1]])
    returns = log_close[hold_bars:] - log_close[:-hold_bars]  # [R - h, N]
    if not len(returns):  # too short to train on
        return 1.0
    relative = returns - returns.mean(1, keepdims=True) if returns.shape[1] > 1 else returns
    return float(1 / max(relative.std(), 1e-6))


def find_reducer(path: Path) -> ReducerCheckpoint | None:
    """Load the checkpoint of the trained reducer; None without one, or where the encoder starts at random."""
    if REDUCER == "random" or WALK_FORWARD or not path.exists():
        reason = "REDUCER = random" if REDUCER == "random" else f"there is no {path}"
        reason = "a trained one would know later folds" if WALK_FORWARD else reason
        print(f"encoder: starts at random ({reason})")
        return None
    saved = feature_reducer.load_checkpoint(path, ReducerCheckpoint)
    if saved["scale"] != SCALE:
        raise UserError(
            f"{path} is of scale {saved['scale']}, this run of scale {SCALE}: run python feature_reducer.py "
            f"--scale {SCALE}, or start from a random encoder with --reducer random"
        )
    if (saved["coins"] is None) != (TIE_COINS == "never"):
        found = "tied between the coins" if saved["coins"] else "dense"
        raise UserError(
            f"{path} is {found}, TIE_COINS is {TIE_COINS}: run python feature_reducer.py --tie-coins "
            f"{TIE_COINS}, or start from a random encoder with --reducer random"
        )
    return saved


def policy_memory(latent: int, assets: int, transitions: int, decisions: int) -> dict[str, float]:
    """Return the bytes that the policy takes: {what: bytes}.

    Args:
        transitions: of the largest batch that is differentiated. decisions: whose tokens are encoded at once.
    """
    tokens = assets * TOKEN_WIDTH
    weights = latent * TRUNK[0] + TRUNK[0] * TRUNK[1] + TRUNK[1] * tokens
    weights += BLOCKS * (4 * TOKEN_WIDTH**2 + 2 * TOKEN_WIDTH * FEED_FORWARD)
    kept = transitions * assets * BLOCKS * (10 * TOKEN_WIDTH + 2 * FEED_FORWARD)  # for the backward pass
    encoded = 2 * 4 * decisions * tokens  # in parts, then joined
    return {"policy": 4 * (4 * weights + kept), "encoded decisions": encoded}


def dims_of(dims: Sequence[int], coins: int | None, here: int) -> list[int]:
    """Return the dims D, H, L with `here` coins of a reducer that has `dims` with `coins`."""
    if not coins:
        return list(dims)
    blocks = [(dims[0] // coins, 0), *(feature_reducer.blocks_of(width, coins) for width in dims[1:])]
    return [feature_reducer.width_of(part, here) for part in blocks]


def plan_memory(
    windows: FeatureWindows, footer: dict, dims: Sequence[int], coins: int | None, amp: bool, held: float,
    choosing: bool, folder: Path,
) -> None:  # fmt: skip
    """Print what the run needs, and stop where memory or disk cannot hold it.

    Args:
        held: bytes of host memory that the run has already. choosing: whether HOLD is still to be chosen.
        folder: of the run's checkpoints.
    """
    pretraining = PRETRAIN_SEGMENTS * (PRETRAIN_DECISIONS + 1) if PRETRAIN_EPOCHS else 0
    online = MINIBATCH if BATCHES else 0
    largest, transitions = max(online, pretraining), max(online * REPLICAS, pretraining)  # largest: windows
    here, plan = dims_of(dims, coins, windows.coins), feature_reducer.reducer_memory
    needs = plan(dims, coins, largest, amp, ENCODER_OPTIMIZER)
    copied = needs["parameters"] if choosing else 0.0
    if TIE_COINS == "pretrain":  # dense in the end
        needs = plan(here, None, largest, amp, ENCODER_OPTIMIZER)
    needs["activations"] *= here[0] / dims[0]
    evaluated = max(footer["splits"][name][1] - footer["splits"][name][0] for name in ("validation", "test"))
    every = getData.BAR_MS * (HOLD or min(HOLDS))
    encoded = max(NUM_ENVS * (STEPS + 1), evaluated // every)  # decisions
    needs |= policy_memory(here[2], len(footer["symbols"]) + 1, transitions, encoded)
    needs["copy, to choose HOLD"] = copied
    needs["activations"] = max(needs["activations"], 4 * ENCODE_BATCH * (here[0] + 2 * here[1]))
    size = needs["parameters"]
    last = size + (2 * size if ENCODER_OPTIMIZER == "adam" else 0.0)
    advice = "use --scale small, or lower --minibatch, --replicas and --pretrain-segments"
    feature_reducer.check_memory(needs, last, windows.device, advice, held)
    files = dict.fromkeys(("pretrained.pt", "best.pt", "final.pt"), size) | {"last.pt": last}
    feature_reducer.check_disk(folder, files)


def run_folder(run: str) -> Path:
    """Return the folder of a run's checkpoints."""
    return DATA_DIR / "checkpoints" / run


def fold_splits(market: Path) -> feature_reducer.Splits | None:
    """Return the splits of the walk-forward fold to train; None without one."""
    if not FOLD:
        return None
    _, footer = getData.load_prices(market)
    shares, purge_ms = footer["split_shares"], footer["purge_ms"]
    return getData.walk_forward_splits(footer["splits"], shares, purge_ms, WALK_FORWARD)[FOLD - 1]


def prepare(
    device: torch.device,
    amp: bool,
    resumed: AgentState | None,
    flags: dict[str, object],
    hold_bars: int,
    market: Path,
    run: str,
) -> Setup:
    """Load data and reducer, build the policy, and check that all of it fits together and into memory.

    Args:
        resumed: where the weights come from; None: from a trained reducer, or at random.
        flags: constants given on the command line. hold_bars: between decisions; 0: still to be chosen.
        market: folder of the features. run: its name.

    Raises:
        UserError: something does not fit, with the next action.
    """
    torch.manual_seed(SEED)
    shared = shared_market(run) or DATA_DIR / "checkpoints"
    saved = resumed or find_reducer(shared / "feature_reducer.pt")
    bars = saved["window_bars"] if saved else WINDOW_BARS
    windows, footer = feature_reducer.load_windows(market, bars, device, saved, fold_splits(market))
    if saved:
        feature_reducer.check_market(saved, footer)
    alike = footer["inputs"], footer["splits"], saved["dims"] if saved else None
    feature_reducer.check_alike(alike, "bars, splits or feature_reducer.pt")
    dims = saved["dims"] if saved else (windows.input_dim, HIDDEN_DIM, LATENT_DIM)
    coins = saved["coins"] if saved else feature_reducer.tied_coins(TIE_COINS, windows)
    used = {"WINDOW_BARS": tuple(bars), "HIDDEN_DIM": dims[1], "LATENT_DIM": dims[2]}
    for name, value in used.items() if not resumed else ():
        if flags.get(name, value) != value:
            given = flags[name]
            raise UserError(f"the encoder's checkpoint has {name} {value}, not {given}: use --reducer random")
    assets = len(footer["symbols"]) + 1
    held = feature_reducer.held_bytes(saved)
    plan_memory(windows, footer, dims, coins, amp, held, not hold_bars, run_folder(run))
    if saved:
        reducer = feature_reducer.reducer_from_checkpoint(saved, device)
    else:
        reducer = FeatureReducer(*dims, coins).to(device)
    shape = {
        "assets": coins + 1 if coins else assets, "trunk": list(TRUNK), "width": TOKEN_WIDTH, "heads": HEADS,
        "feed_forward": FEED_FORWARD, "blocks": BLOCKS, "action_scale": ACTION_SCALE, "tied": bool(coins),
    }  # fmt: skip
    policy = ActorCritic(dims[2], **(resumed["policy_shape"] if resumed else shape), log_std=LOG_STD)
    bars = hold_bars or min(HOLDS)
    setup = build_setup(device, amp, market, windows, footer, reducer, policy, saved is None, bars)
    check_segment(setup.train_rows, longest_segment(setup.env.hold_bars))
    if resumed:
        load_weights(setup.policy, resumed["policy"], "the checkpoint's policy")
    feature_reducer.copy_from_first([setup.policy, setup.reducer])
    sizes = [sum(map(Tensor.numel, module.parameters())) / 1e6 for module in (reducer, setup.policy)]
    print(f"market: {footer['source']}, {len(footer['symbols'])} coins")
    counts = [f"{name} {stop - start:,}" for name, (start, stop) in setup.spans.items()]
    print("decisions: " + ", ".join(counts))
    values, hidden, latent = dims_of(dims, coins, windows.coins)
    shape = f"{values:,} -> {hidden:,} -> {latent:,} ({values / latent:.1f}x)"
    print(f"reducer: {shape}, {sizes[0]:.1f} M parameters{', tied between the coins' if coins else ''}")
    print(f"policy: {BLOCKS} blocks, {HEADS} heads, {assets} actions, 1 value, {sizes[1]:.2f} M parameters")
    return setup


def build_setup(
    device: torch.device,
    amp: bool,
    market: Path,
    windows: FeatureWindows,
    footer: dict,
    reducer: FeatureReducer,
    policy: ActorCritic,
    random_encoder: bool,
    hold_bars: int,
) -> Setup:
    """Load prices, and build environment and splits around the given modules."""
    table, _ = getData.load_prices(market)
    if not np.array_equal(feature_reducer.close_ms(table), windows.times):
        advice = getData.making_command(market, features=True)
        raise UserError(f"prices and features in {market / 'features'} are of other times: {advice}")
    if hold_bars + 2 > len(table):
        raise UserError(f"too little history: HOLD {hold_bars}, and {len(table)} bars in all")
    prices = portfolio_env.price_arrays(table, footer["symbols"])
    rows = {name: windows.rows(split, name) for name, split in footer["splits"].items()}
    names = *footer["splits"], "all"
    spans = {name: portfolio_env.split_rows(table.index, footer, name, FILL) for name in names}
    return Setup(
        device=device, amp=amp, footer=footer, windows=windows, prices=prices,
        train_rows=rows["train"], spans=spans, **market_of(prices, spans["train"], hold_bars, device),
        ppo=ppo_constants(), policy=policy.to(device), reducer=reducer, random_encoder=random_encoder,
    )  # fmt: skip


def market_of(
    prices: tuple[np.ndarray, np.ndarray], span: tuple[int, int], hold_bars: int, device: torch.device
) -> dict[str, object]:
    """Return the environment of decisions `hold_bars` apart, and the scale of their returns, for `Setup`."""
    on_device = [torch.tensor(part, device=device) for part in prices]
    trading = {"cost": FEE_RATE + SLIPPAGE_RATE, "fill": FILL, "reward": REWARD}
    env = VectorPortfolioEnv(*on_device, **trading, hold_bars=hold_bars)
    return {"env": env, "return_scale": return_scale_of(prices[1], span, hold_bars)}


def longest_segment(hold_bars: int) -> int:
    """Return the bars of the longest segment that a training draws."""
    decisions = max(bool(BATCHES) * STEPS, bool(PRETRAIN_EPOCHS) * PRETRAIN_DECISIONS)
    return decisions * hold_bars


def ppo_constants() -> PPO:
    """Collect the constants of this script that `PPO` names."""
    return PPO(
        seed=SEED, gamma=GAMMA_START, gae_lambda=GAE_LAMBDA, reward_scale=REWARD_SCALE,
        exploration_std=EXPLORATION_STD, clip=CLIP, critic_weight=CRITIC_WEIGHT,
        entropy_weight=ENTROPY_WEIGHT, policy_share=POLICY_SHARE, reconstruction_share=RECONSTRUCTION_SHARE,
        target_kl=TARGET_KL, max_norm=MAX_NORM, replicas=REPLICAS, update_epochs=UPDATE_EPOCHS,
        minibatch=MINIBATCH, shuffle_coins=SHUFFLE_COINS,
    )  # fmt: skip


def load_weights(module: nn.Module, weights: dict[str, Tensor], what: str) -> None:
    """Copy the weights into the module in place, without a second copy on the device.

    Raises:
        UserError: they have another shape.
    """
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()
        raise UserError(f"{what} is of another shape ({reason}); remove it") from None


def agent_checkpoint(setup: Setup, run: str, abstain: bool = False) -> AgentCheckpoint:
    """Collect policy and reducer with all that it takes to run them elsewhere.

    One that is to abstain has an actor of zeros, with which all logits are 0: it holds all assets alike.
    """
    content = feature_reducer.reducer_checkpoint(setup.reducer, setup.windows, setup.footer, SCALE)
    content |= {"kind": "train", "run": run, "seed": SEED, "hold_bars": setup.env.hold_bars}
    policy = setup.policy.state_dict()
    if abstain:
        policy |= {"actor.weight": torch.zeros_like(policy["actor.weight"])}
    return content | {"policy": policy, "policy_shape": setup.policy.shape}


def load_agent(path: Path, setup: Setup, run: str) -> None:
    """Copy the weights of this run's checkpoint into the modules of all processes."""
    if feature_reducer.rank() == 0:
        saved = feature_reducer.load_checkpoint(path, AgentCheckpoint)
        if saved["run"] != run:
            reason = "another training wrote into the same folder"
            raise UserError(f"{path} is of run {saved['run']}, not of {run}: {reason}")
        load_weights(setup.policy, saved["policy"], str(path))
        load_weights(setup.reducer, saved["reducer"], str(path))
    feature_reducer.copy_from_first([setup.policy, setup.reducer])


def agent_orders(setup: Setup, split: str, before: Backtest | None = None) -> np.ndarray:
    """Return the orders [R, A] of the deterministic agent in the bars of a split; zeros between decisions.

    Args:
        before: the account up to then, which the agent takes over; None: it begins with cash.
    """
    start, stop = setup.spans[split]
    rows = torch.arange(start, stop, setup.env.hold_bars, device=setup.device)  # of the decisions [S]
    mark = np.ones((len(rows), setup.env.assets))
    *_, coins = portfolio_env.align_prices(*setup.prices, FILL, setup.env.hold_bars)
    mark[:-1, 1:] = coins[rows[:-1].cpu().numpy()]  # nothing follows the last one
    mark = torch.from_numpy(mark).to(setup.device)
    held = None
    if before is not None:
        held = torch.from_numpy(portfolio_env.weights_seen(before, *setup.prices, FILL)).to(setup.device)
    with setup.autocast(), stop_where_not_finite(setup, f"on the {split} split"):
        count = -(-len(rows) // feature_reducer.world_size())  # each of several processes encodes as many
        mine = feature_reducer.rank() * count + torch.arange(count, device=rows.device)
        mine = rows[mine.clamp(max=len(rows) - 1)]
        tokens = encode(setup.policy, setup.reducer, setup.windows, mine, ENCODE_BATCH)
        tokens = feature_reducer.gather(tokens)[: len(rows)]
        segments = -(-len(rows) // _SEGMENT)
        targets = agent_targets(setup.policy, tokens, mark, segments, held)
    orders = np.zeros((stop - start, setup.env.assets))
    orders[:: setup.env.hold_bars] = targets.cpu().numpy()
    return orders


def backtest_agent(setup: Setup, split: str) -> Backtest:
    """Run the deterministic agent over a whole split."""
    return account_of(setup, agent_orders(setup, split), setup.spans[split][1])


def account_of(setup: Setup, orders: np.ndarray, stop: int) -> Backtest:
    """Return the account that follows `orders` [R, A] (zeros: none) in the R bars before row `stop`."""
    start = stop - len(orders)

    def target(row: int, _: np.ndarray) -> np.ndarray | None:
        return orders[row - start] if orders[row - start].any() else None

    return portfolio_env.backtest(target, *setup.prices, start, stop, cost=setup.env.cost, fill=FILL)


def load_agents(path: Path) -> AgentCheckpoint:
    """Load the checkpoint of an agent, or those of its seeds as an ensemble."""
    return combined({one: feature_reducer.load_checkpoint(one, AgentCheckpoint) for one in agent_files(path)})


def agent_files(path: Path) -> list[Path]:
    """Return the files of an agent: of a folder its best.pt, or else those of its seeds."""
    best = path / "best.pt"
    if not path.is_dir() or best.exists():
        return [best if path.is_dir() else path]
    return sorted(path.glob("seed-*/best.pt")) or [best]


def combined(agents: dict[Path, AgentCheckpoint]) -> AgentCheckpoint:
    """Return the ensemble of agents, which decides at the (lower) median of their intervals; of one, itself.

    Raises:
        UserError: they differ in more than their weights.
    """
    (path, first), *others = agents.items()
    if not others:
        return first
    for other, agent in others:
        names = ("dims", "coins", "window_bars", "market", "policy_shape")
        wrong = [name for name in names if agent[name] != first[name]]
        tensors = [
            (part[column], first["normalisation"][kind][column])
            for kind, part in agent["normalisation"].items()
            for column in part
        ]
        if wrong or not all(torch.equal(*pair) for pair in tensors):
            what = wrong[0] if wrong else "normalisation"
            raise UserError(f"{path} and {other} differ in {what}: they are no ensemble, name one of them")
    hold_bars = statistics.median_low(agent["hold_bars"] for agent in agents.values())
    members = [{name: agent[name] for name in Member.__annotations__} for _, agent in others]
    run = first["run"].rpartition("/")[0] or first["run"]
    return first | {"run": run, "hold_bars": hold_bars, "others": members}


def members_of(saved: AgentCheckpoint) -> list[AgentCheckpoint | Member]:
    """Return the agents of an ensemble, or the only one."""
    return [saved, *saved.get("others", [])]


def modules_of(
    saved: AgentCheckpoint, path: Path, device: torch.device
) -> tuple[ActorCritic | PolicyEnsemble, FeatureReducer | EncoderEnsemble]:
    """Build policy and reducer of a checkpoint, or of an ensemble's, which came from `path`."""
    policies, reducers = [], []
    for agent in members_of(saved):
        reducers.append(
            feature_reducer.reducer_from_checkpoint(saved | {"reducer": agent["reducer"]}, device)
        )
        try:
            policies.append(ActorCritic(reducers[-1].latent_dim, **saved["policy_shape"]).to(device))
        except (TypeError, ValueError, AssertionError, RuntimeError):
            raise UserError(f"{path} names an impossible policy: {saved['policy_shape']}") from None
        load_weights(policies[-1], agent["policy"], f"the policy in {path}")
    if len(policies) == 1:
        return policies[0], reducers[0]
    return PolicyEnsemble(policies), EncoderEnsemble(reducers)


def setup_of(saved: AgentCheckpoint, market: Path, device: torch.device, amp: bool, path: Path) -> Setup:
    """Build what an agent works on: the features of `market`, which may be others than its own.

    Args:
        path: where the checkpoint came from.
    """
    splits = saved["market"]["splits"] if market != DATA_DIR else None  # of a fold
    windows, footer = feature_reducer.load_windows(market, saved["window_bars"], device, saved, splits)
    policy, reducer = modules_of(saved, path, device)
    hold_bars = saved["hold_bars"]
    return build_setup(device, amp, market, windows, footer, reducer, policy, False, hold_bars)


def open_agent(device: torch.device, amp: bool) -> tuple[Setup, AgentCheckpoint]:
    """Load the agent of CHECKPOINT on the features of DATA_DIR, which may be others than its own."""
    path = feature_reducer.checkpoint_path(DATA_DIR, CHECKPOINT)
    saved = load_agents(path)
    return setup_of(saved, DATA_DIR, device, amp, path), saved


def new_coins(setup: Setup, saved: AgentCheckpoint) -> list[str]:
    """Return the symbols of the features at hand that the agent was not trained on."""
    return [symbol for symbol in setup.footer["symbols"] if symbol not in saved["market"]["symbols"]]


def report_checkpoint(device: torch.device, amp: bool) -> int:
    """Report on one checkpoint over one split of the features at hand; return the exit code."""
    setup, saved = open_agent(device, amp)
    first, stop = setup.spans[EVALUATE_SPLIT]
    days = int(setup.windows.times[first]), int(setup.windows.times[stop - 1])
    relation = portfolio_env.relation_to_training(saved["market"]["splits"], *days)
    path = feature_reducer.checkpoint_path(DATA_DIR, CHECKPOINT)
    chosen_in = getData.owner_of(path) or DATA_DIR  # where its trials are
    if new := new_coins(setup, saved):
        relation += f"; coins new to the agent: {', '.join(new)}"
    name = path.name.removesuffix(".pt")
    agents = {f"agent ({name})": backtest_agent(setup, EVALUATE_SPLIT)}
    place = DATA_DIR / "reports" / f"{saved['run']}-{name}-{EVALUATE_SPLIT}"
    seeds = [agent["seed"] for agent in members_of(saved)]
    report(
        setup, place, agents, EVALUATE_SPLIT, relation, chosen_in / "runs", run=saved["run"],
        scale=saved["scale"], seeds=seeds, abstains=setup.policy.abstains,
    )  # fmt: skip
    return 0


@torch.no_grad()
def newest_target(
    policy: ActorCritic | PolicyEnsemble, reducer: FeatureReducer | EncoderEnsemble, windows: FeatureWindows,
    held: np.ndarray, amp: bool,
) -> np.ndarray:  # fmt: skip
    """Return the weights [A] that an agent which holds `held` [A] wants at the last row of `windows`.

    Raises:
        UserError: they are not finite; names the tensor.
    """
    row = torch.tensor([len(windows.times) - 1], device=windows.device)
    with feature_reducer.half_precision(windows.device, amp):
        tokens = encode(policy, reducer, windows, row, ENCODE_BATCH)
        target = decide(policy, tokens, torch.from_numpy(held[None]).to(windows.device))[0]
    if not torch.isfinite(target).all():
        tensors = {"encoded window": tokens, "decision": target}
        bad = feature_reducer.first_bad_tensor({"policy": policy, "reducer": reducer}, tensors)
        raise UserError(f"no weights at the newest bar: {bad}; use another --checkpoint")
    return target.cpu().numpy()


def print_signal(device: torch.device, amp: bool) -> int:
    """Print the weights that the agent wants at the newest complete bar: a table, and one line of JSON.

    Raises:
        UserError: the newest bar is old or incomplete. UsageError: HOLDINGS are no weights.
    """
    setup, saved = open_agent(device, amp)
    symbols, closed = setup.footer["symbols"], int(setup.windows.times[-1]) / 1000
    when = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(closed))
    opened = pd.Timestamp(closed - getData.BAR_MS / 1000, unit="s", tz="UTC")
    bars = getData.load_bars(DATA_DIR, symbols)
    if filled := [symbol for symbol in symbols if bars[symbol].at[opened, "filled"]]:
        names = ", ".join(filled)
        raise UserError(f"the newest bar ({when}) is missing for {names}: run python getData.py again")
    age = time.time() - closed
    if not 0 <= age <= MAX_AGE:
        future = "lies in the future of this machine's clock"
        reason = f"is {age / 60:,.0f} minutes old" if age > 0 else future
        raise UserError(
            f"the newest bar, closed {when}, {reason} (MAX_AGE is {MAX_AGE} s): run python getData.py first"
        )
    held = np.zeros(len(symbols) + 1)
    held[: len(HOLDINGS)] = HOLDINGS[: len(held)]
    if len(HOLDINGS) > len(held) or abs(held.sum() - 1) > 1e-6:
        raise UsageError(f"HOLDINGS must be up to {len(held)} weights, cash first, of sum 1")
    target = newest_target(setup.policy, setup.reducer, setup.windows, held, setup.amp)
    print(f"agent of run {saved['run']}, decision at {when}, {setup.footer['source']}\n")
    if setup.policy.abstains:
        print(f"nothing that it learnt was above chance on the validation split: {portfolio_env.ABSTAINS}\n")
    if new := new_coins(setup, saved):
        print(f"coins new to the agent: {', '.join(new)}\n")
    print(f"{'asset':10}{'held':>10}{'target':>10}{'change':>10}")
    names = ["cash", *symbols]
    for name, now, wanted in zip(names, held, target, strict=True):
        print(f"{name:10}{now:10.4f}{wanted:10.4f}{wanted - now:+10.4f}")
    weights = {name: round(float(wanted), 6) for name, wanted in zip(names, target, strict=True)}
    after = closed + saved["hold_bars"] * getData.BAR_MS / 1000
    until = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(after))
    later = decides_every(saved["hold_bars"])
    print(f"\nno order before the next decision, at the close of {until} ({later} later)\n")
    about = {"run": saved["run"], "market": setup.footer["source"], "close_time_ms": int(closed * 1000)}
    print(json.dumps(about | {"next_decision_ms": int(after * 1000), "weights": weights}))
    return 0


# The paper account. Time is the exchange's: this machine's clock, and its jumps, decide nothing. What has
# passed is told by bars that came, so that an exchange's clock that jumps ahead skips no decision.


@dataclass(frozen=True)
class Paper:
    """What the job of a paper account works on."""

    policy: ActorCritic | PolicyEnsemble
    reducer: FeatureReducer | EncoderEnsemble
    saved: AgentCheckpoint
    amp: bool
    account: portfolio_env.PaperAccount
    about: dict[str, object]  # what the account is of; nothing else may be traded in it
    client: getData.CarefulClient
    stores: list[getData.SymbolBars]  # of each coin

    def bars(self) -> dict[str, pd.DataFrame]:
        """Return the collected bars on one grid."""
        return getData.on_one_grid({store.symbol: store.frame() for store in self.stores})


def can_be_called(command: str) -> bool:
    """Return whether a command line names a program that is there."""
    try:
        words = shlex.split(command)
    except ValueError:  # a quotation that does not end
        return False
    return bool(words) and shutil.which(words[0]) is not None


def refuse_unused(flags: dict[str, object]) -> None:
    """Refuse flags of the job for its page and the other way round, before anything is read.

    Raises:
        UsageError: names the first.
    """
    of_job = {"REBALANCE_EVERY", "LOOK_BACK"}
    if unused := sorted(flags.keys() - _OF_PAGE if REPORT else flags.keys() & of_job):
        where = "with --report" if REPORT else "without --report"
        raise UsageError(f"{unused[0]} does nothing {where} in --job paper: leave it out")


def paper_name() -> str:
    """Return the name of the paper account: RUN, or else the run of CHECKPOINT.

    Raises:
        UserError: RUN is not given, there are accounts, and none is of that run: a newer one's best.pt is not
            to begin another account by itself.
    """
    path = feature_reducer.checkpoint_path(DATA_DIR, CHECKPOINT)
    name, folder = RUN or load_agents(path)["run"], DATA_DIR / "paper"
    others = [str(other.relative_to(folder).with_suffix("")) for other in sorted(folder.rglob("*.sqlite"))]
    if not RUN and others and name not in others:
        raise UserError(
            f"{path} is of run {name}, and the accounts in {folder} are {', '.join(others)}: name one with "
            f"--run, or begin another with --run {name}"
        )
    return name


def paper_agent(kept: Path, begun: bool) -> AgentCheckpoint:
    """Return the agent of the paper account, of which a new one keeps a copy: best.pt does not stay as it is.

    Raises:
        UserError: another CHECKPOINT than the default was given, and is not the account's.
    """
    path = feature_reducer.checkpoint_path(DATA_DIR, CHECKPOINT)
    if not begun:
        saved = load_agents(path)
        feature_reducer.save_checkpoint(kept, saved)
        return saved
    saved = feature_reducer.load_checkpoint(kept, AgentCheckpoint)
    if CHECKPOINT != "best.pt":
        pairs = itertools.zip_longest(members_of(saved), members_of(load_agents(path)))
        if any(None in pair or not same_weights(*pair) for pair in pairs):
            raise UserError(
                f"the account's agent, in {kept}, is not that of {path}: leave --checkpoint out, or give the "
                "account a name of its own with --run"
            )
    return saved


def same_weights(one: AgentCheckpoint | Member, other: AgentCheckpoint | Member) -> bool:
    """Return whether two agents have the same tensors."""
    parts = [(one[part], other[part]) for part in ("policy", "reducer")]
    return all(
        left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
        for left, right in parts
    )


def paper_identity(kept: Path, saved: AgentCheckpoint) -> dict[str, object]:
    """Return what an account is of: the agent, by the hash of its copy, and how it trades where."""
    with open(kept, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {
        "run": saved["run"], "checkpoint": digest, "trained on": saved["market"]["source"],
        "splits": dict(saved["market"]["splits"]), "symbols": list(saved["market"]["symbols"]),
        "hold_bars": saved["hold_bars"], "cost": FEE_RATE + SLIPPAGE_RATE, "exchange": EXCHANGE,
        "base_url": BASE_URL,
    }  # fmt: skip


def keep_paper_account(device: torch.device, amp: bool) -> int:
    """Book the agent's decisions on the new bars of EXCHANGE, until the process is stopped.

    A decision at the close of bar t sees bars up to t, and is booked at most MAX_LATE seconds after that
    close by the exchange's clock: then bar t+1, at whose open it is filled, has not closed, and the exchange
    has no bar yet that judges it. What comes later is booked as none, and what is held drifts: "late" was
    decided too late, "missed" fell into a time without this job or the exchange, "no data" names coins
    without their bar. The first decision that is not late begins the account; the next are HOLD bars apart.

    Raises:
        UserError: the account is of another agent, or trades otherwise. TryLater: another job keeps it, or
            it is new and the exchange does not answer.
    """
    folder = DATA_DIR / "paper" / paper_name()
    kept = folder / "agent.pt"
    with getData.locked(folder, "paper job"):
        account = portfolio_env.PaperAccount(folder.with_name(f"{folder.name}.sqlite"))
        about = account.about()
        saved = paper_agent(kept, bool(about))
        policy, reducer = modules_of(saved, kept, device)
        here = {"symbols": saved["market"]["symbols"], "channels": getData.CHANNELS}
        feature_reducer.check_columns(saved, here | {"timeframes": getData.TIMEFRAMES})
        wanted = paper_identity(kept, saved)
        if about and (other := [key for key in wanted if about.get(key) != wanted[key]]):
            raise UserError(
                f"{account.path} is of {other[0]} {about.get(other[0])}, not {wanted[other[0]]}: give this "
                "account a name of its own with --run"
            )
        collecting = {"DATA_DIR": folder, "SYMBOLS": tuple(wanted["symbols"]), "EXCHANGE": EXCHANGE}
        # gaps are kept, and a failure is short: this job tries again
        collecting |= {"BASE_URL": BASE_URL, "END": "", "MAX_GAP": 0, "MAX_RETRIES": 2}
        getData.assign_constants(getData, collecting)
        getData.set_damaged_aside(folder / "ohlcv")
        decisions = account.decisions()
        for close in decisions.index[(decisions["call"] != "") & decisions["result"].isna()]:
            account.record_call(int(close), "unknown")
            said = "CALL: unknown whether it was done, since this job ended meanwhile; it is not repeated"
            print(f"{getData.when(close)}  {said}", file=sys.stderr)
        for number in {signal.SIGTERM, signal.SIGHUP}:
            if signal.getsignal(number) != signal.SIG_IGN:  # as nohup leaves it
                signal.signal(number, lambda number, _: sys.exit(128 + number))
        new = "" if about else "new "
        print(f"{new}paper account {account.path}: agent of run {saved['run']}, {EXCHANGE}, no order is sent")
        if policy.abstains:
            print(
                f"nothing that it learnt was above chance on the validation split: {portfolio_env.ABSTAINS}"
            )
        asyncio.run(trade_on_paper(policy.to(device), reducer, saved, amp, account, about or wanted))
    return 0


async def trade_on_paper(
    policy: ActorCritic | PolicyEnsemble, reducer: FeatureReducer | EncoderEnsemble, saved: AgentCheckpoint,
    amp: bool, account: portfolio_env.PaperAccount, about: dict[str, object],
) -> None:  # fmt: skip
    """Collect and decide, bar after bar, without end; arguments as in `Paper`."""
    client = getData.open_exchange(EXCHANGE)
    stores = [getData.SymbolBars(symbol) for symbol in about["symbols"]]
    paper = Paper(policy, reducer, saved, amp, account, about, client, stores)
    try:
        client.quiet = bool(account.about())
        begun, newest, waits, trouble = False, 0, "", ""
        while True:
            before = newest
            try:
                if not begun:
                    await begin_paper(paper)
                    begun = client.quiet = True
                # while a decision waits for a bar that is closed: at once
                await getData.wait_for_bar(client, newest - bool(waits), POLL)
                newest, waits = await collect_on_paper(paper), "undecided"  # also where the next line fails
                waits = await book_due(paper, newest)
                problem = next((str(store.error) for store in stores if store.error), waits)
            except (getData.TryLater, getData.DataRefused) as error:
                if not account.about():
                    raise
                problem = str(error)
            if problem != trouble:
                said = f"this job waits and tries again: {problem}" if problem else "all is well again"
                print(f"{getData.when(newest)}  {said}", file=sys.stderr, flush=True)
            trouble = problem
            if waits or newest == before:
                await asyncio.sleep(POLL)
    finally:
        await client.close()


async def begin_paper(paper: Paper) -> None:
    """Load the exchange's pairs; for a new account collect and check the bars of a window, and begin it.

    Raises:
        TryLater: no answer. DataRefused: bars are bad. UsageError: a coin is not listed.
    """
    client, stores, about = paper.client, paper.stores, paper.about
    clock = await getData.exchange_clock(client)
    getData.say_clock(client)
    await getData.load_pairs(client, stores)
    if "first_ms" in about:
        return
    history = getData.look_back_ms(paper.saved["window_bars"])
    about["first_ms"] = clock // getData.DAY_MS * getData.DAY_MS - history
    getData.see_closed_bars(client, clock)
    await collect_on_paper(paper)
    for store in stores:
        if store.error:
            raise store.error
    market = {store.symbol: store.bars for store in stores}
    getData.print_overview(market, about["first_ms"], client.closed)
    getData.say_unchecked(getData.unchecked_times(market))
    newest_window(paper, paper.bars())  # there is one
    paper.account.begin(about)


async def collect_on_paper(paper: Paper) -> int:
    """Bring all coins up to date, as far as they can be; return the close time of the newest bar, ms."""
    client, stores = paper.client, paper.stores
    for store in stores:
        store.error = None if store.symbol in client.pairs else store.error
    with tqdm(disable=True) as silent:
        await getData.update_stores(client, stores, paper.about["first_ms"], client.closed, silent)
    return max(store.end() for store in stores)


async def book_due(paper: Paper, newest: int) -> str:
    """Book the decisions due up to the newest close (ms); return why the last of them waits, or ""."""
    booked = paper.account.decisions()
    step = paper.about["hold_bars"] * getData.BAR_MS
    due = range(int(booked.index[-1]) + step, newest + 1, step) if len(booked) else [newest]
    if not due:
        return ""
    clock = await getData.exchange_clock(paper.client)
    behind = f"the clock of {EXCHANGE} is behind its bars"
    for close in due:
        if close < newest:
            book_none(paper, close, clock, "missed")
    if due[-1] < newest:
        return ""
    if clock < newest:
        return behind
    silent = [store.symbol for store in paper.stores if store.end() != newest]
    reason = f"no data: {', '.join(silent)}" if silent else ""
    if silent and clock - newest <= 1000 * MAX_LATE:
        return reason
    if not silent:
        result, held, target = decide_on_paper(paper, booked)
        clock = await getData.exchange_clock(paper.client)  # as late as can be
        if clock < newest:
            return behind
        reason = "late" if clock - newest > 1000 * MAX_LATE else ""
    if not reason:
        paper.account.book(newest, clock, target.tolist(), call=CALL)
        if CALL:  # before a print, which may fail: a booked decision is not handed over twice
            call_user(paper, newest, held, target)
        print_paper(paper, newest, clock, result, held, target)
    elif len(booked):  # an account begins with a decision
        book_none(paper, newest, clock, reason)
    return ""


def call_user(paper: Paper, close: int, held: np.ndarray, target: np.ndarray) -> None:
    """Hand a decision that has just been booked to the user's program, once, and book how that ended."""
    names, after = ["cash", *paper.about["symbols"]], close + paper.about["hold_bars"] * getData.BAR_MS
    message = {"run": paper.about["run"], "market": EXCHANGE, "close_time_ms": close}
    message |= {"next_decision_ms": after, "weights": dict(zip(names, target.tolist(), strict=True))}
    message |= {"held": dict(zip(names, held.tolist(), strict=True))}
    said = call_program(CALL, message, CALL_TIMEOUT)
    paper.account.record_call(close, said)
    if said != "done":
        print(f"{getData.when(close)}  CALL: {said}", file=sys.stderr, flush=True)


def newest_window(paper: Paper, bars: dict[str, pd.DataFrame]) -> FeatureWindows:
    """Return the window of the newest bar that all coins have in `bars`, as its last row.

    Raises:
        UserError: a coin has too little history.
    """
    rows = paper.saved["window_bars"]
    frames = getData.newest_features(bars, rows)
    windows = FeatureWindows(
        frames, rows, next(paper.policy.parameters()).device, paper.saved["normalisation"]
    )
    if not windows.valid[-1]:
        raise UserError(
            f"too little history on {EXCHANGE}: a coin was listed too late for a window of {rows} bars"
        )
    return windows


def decide_on_paper(paper: Paper, booked: pd.DataFrame) -> tuple[Backtest | None, np.ndarray, np.ndarray]:
    """Return the account up to the newest close, the weights [A] that it holds there, and those wanted."""
    bars = paper.bars()
    times, *prices = portfolio_env.paper_prices(bars)
    result = portfolio_env.paper_result(booked, times, *prices, paper.about["cost"])
    held = portfolio_env.paper_weights(result, *prices)
    windows = newest_window(paper, bars)
    return result, held, newest_target(paper.policy, paper.reducer, windows, held, paper.amp)


def book_none(paper: Paper, close: int, clock: int, reason: str) -> None:
    """Book that there is no decision at a close (ms), and say it."""
    paper.account.book(close, clock, None, reason)
    print(f"{getData.when(close)}  no decision ({reason})", flush=True)


def print_paper(
    paper: Paper, close: int, clock: int, result: Backtest | None, held: np.ndarray, target: np.ndarray
) -> None:
    """Print the line of a decision: when, how late, value so far (benchmark), weights held and wanted."""
    value, benchmark = (result.value[-1], result.benchmark[-1]) if result else (1.0, 1.0)
    names = ["cash", *paper.about["symbols"]]
    changes = [f"{name} {now:.3f}>{then:.3f}" for name, now, then in zip(names, held, target, strict=True)]
    seconds = (clock - close) / 1000
    print(
        f"{getData.when(close)}  booked after {seconds:4.1f} s  value {value:.4f} ({benchmark:.4f})  "
        + "  ".join(changes),
        flush=True,
    )


def call_program(command: str, message: dict[str, object], seconds: float) -> str:
    """Run a program with a decision as JSON on its standard input; return "done" or what went wrong.

    Args:
        seconds: after which it is killed, with what it has started, also where this job is stopped meanwhile:
            its orders may be half sent.
    """
    try:
        process = subprocess.Popen(
            shlex.split(command), stdin=subprocess.PIPE, text=True, start_new_session=True
        )
    except OSError as error:
        return f"not started: {os.strerror(error.errno)}"
    try:
        process.communicate(json.dumps(message) + "\n", timeout=seconds)
    except subprocess.TimeoutExpired:
        return f"stopped after {seconds:g} s"
    except (KeyboardInterrupt, SystemExit):
        with suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
        raise
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return "done" if process.returncode == 0 else f"exit code {process.returncode}"


def agent_abstains(saved: AgentCheckpoint) -> bool:
    """Return whether all agents of a checkpoint hold all assets alike."""
    return not any(agent["policy"]["actor.weight"].any() for agent in members_of(saved))


def report_paper_account() -> int:
    """Write the page of the paper account as it stands; return the exit code.

    Raises:
        UserError: there is no such account, or no bar has followed its first decision.
    """
    name = paper_name()
    folder = DATA_DIR / "paper" / name
    path = folder.with_name(f"{folder.name}.sqlite")
    if not path.exists():
        raise UserError(f"there is no {path}: begin it with python train.py --job paper")
    account = portfolio_env.PaperAccount(path)
    about, decisions = account.about(), account.decisions()
    if not about:
        raise UserError(f"{path} holds no decision yet: let python train.py --job paper run on")
    times, *prices = portfolio_env.paper_prices(getData.load_bars(folder, about["symbols"]))
    cost = about["cost"]
    result = portfolio_env.paper_result(decisions, times, *prices, cost)
    if result is None:
        raise UserError(f"no bar has closed since the first decision in {path}: try again later")
    first, stop = int(result.rows[0]), int(result.rows[-1]) + 1
    relation = portfolio_env.relation_to_training(about["splits"], int(times[first]), int(times[stop - 1]))
    if about["trained on"] != about["exchange"]:
        relation += f"; the agent was trained on {about['trained on']}"
    periods = {"rebalance_every": REBALANCE_EVERY, "look_back": LOOK_BACK}
    rules = portfolio_env.baselines(*prices, first, stop, cost=cost, fill="next_open", **periods)
    market = about["exchange"] + (f" at {about['base_url']}" if about["base_url"] else "")
    agent = feature_reducer.load_checkpoint(folder / "agent.pt", AgentCheckpoint)
    page = portfolio_env.Report(
        run=name, market=market, split="paper", times=times[first:stop], symbols=about["symbols"], cost=cost,
        fill="next_open", others=rules, agents={"agent (paper)": result}, relation=relation,
        agent=about["run"], checkpoint=about["checkpoint"], hold_bars=about["hold_bars"],
        abstains=agent_abstains(agent), remarks=portfolio_env.paper_remarks(decisions, result),
        trial_sharpes=portfolio_env.read_trial_sharpes(DATA_DIR / "runs" / "trials.csv"),
    )  # fmt: skip
    portfolio_env.publish(DATA_DIR / "reports" / f"paper-{name}", page, f"paper account {path}")
    return 0


def out_of_sample(setup: Setup, progress: Progress) -> dict[str, Backtest]:
    """Run the agents (`setup` holds the last one) on bars unused in training and choosing, the best first."""
    agents = {"agent (final)": backtest_agent(setup, "test")}
    if progress.best_validation > -math.inf:  # otherwise best.pt could not be written
        load_agent(run_folder(progress.run) / "best.pt", setup, progress.run)
        agents = {"agent (best)": backtest_agent(setup, "test"), **agents}
    return agents


def trial_of(
    setup: Setup, progress: Progress, fixed: dict[str, object], changed: dict[str, object]
) -> dict[str, object]:
    """Return the row of a training in the list of trials, without its figures."""
    return {
        "time": progress.started, "run": progress.run, "seed": SEED,
        "market": setup.footer["source"], "data_sha256": portfolio_env.data_sha256(setup.footer),
        "changed": json.dumps({name: changed[name] for name in changed if name in fixed}),
        "validation_bp_day": math.nan, "constants": json.dumps(fixed),
    }  # fmt: skip


def make_optimizers(
    setup: Setup, policy_rate: float, encoder_rate: float
) -> tuple[torch.optim.Optimizer, ...]:  # fmt: skip
    """Make Adam for the policy, and Adafactor (or Adam) for the reducer unless it is frozen."""
    setup.reducer.requires_grad_(TRAIN_ENCODER)
    policy = torch.optim.Adam(setup.policy.parameters(), lr=policy_rate)
    if not TRAIN_ENCODER:
        return (policy,)
    if ENCODER_OPTIMIZER == "adam":
        encoder = torch.optim.Adam(setup.reducer.parameters(), lr=encoder_rate)
    else:
        encoder = feature_reducer.make_adafactor(setup.reducer, encoder_rate)
    return policy, encoder


def cosine(done: float) -> float:
    """Return the factor of a learning rate after the share `done` of a phase: from 1 to a tenth."""
    return 0.1 + 0.45 * (1 + math.cos(math.pi * done))


def set_rates(optimizers: Sequence[torch.optim.Optimizer], rates: Sequence[float], factor: float) -> None:
    """Set the learning rates of policy and reducer."""
    for optimizer, rate in zip(optimizers, rates, strict=False):
        optimizer.param_groups[0]["lr"] = rate * factor


@contextmanager
def one_thread() -> Iterator[None]:
    """Use one CPU thread: in many tiny steps several wait for each other (10 x slower on a busy machine)."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def stop_where_not_finite(setup: Setup, what: str) -> Iterator[None]:
    """Name the tensor that is not finite where weights are refused because of it."""
    try:
        yield
    except portfolio_env.WrongWeights as error:
        bad = feature_reducer.first_bad_tensor(setup.modules())
        advice = "lower the learning rates or --log-std" if JOB == "train" else "use another --checkpoint"
        raise UserError(f"{error} {what}: {bad}; {advice}") from None


def draw_coin_order(setup: Setup, count: int, generator: torch.Generator) -> CoinOrder:
    """Draw the order of the coins in each of `count` segments."""
    coins, shuffled = setup.env.assets - 1, setup.shuffles()
    order = draw_orders(count, coins, generator) if shuffled else torch.arange(coins).expand(count, coins)
    return CoinOrder(order.to(setup.device))


def draw_masks(windows: FeatureWindows, steps: int, segments: int, generator: torch.Generator) -> Tensor:
    """Draw which coins and timeframes to hide in the windows of so many segments [S, G, N, F]."""
    return torch.rand(steps, segments, windows.coins, len(windows.bars), generator=generator) < MASK


def mask_windows(inputs: Tensor, masked: Tensor, windows: FeatureWindows) -> Tensor:
    """Set the coins and timeframes `masked` [B, N, F] of windows [B, D] to 0, the mean; return them."""
    blocks = inputs.view(len(inputs), windows.coins, -1)  # [B, N, P]
    for position, part in enumerate(windows.slices.values()):
        blocks[..., part].masked_fill_(masked[..., position : position + 1], 0.0)
    return inputs


def add_noise(inputs: Tensor, segments: int, generator: torch.Generator) -> None:
    """Add Gaussian noise to the windows [S * E, D] of S decisions in this process's E of so many segments.

    A decision at a time, so that what is drawn stays in the processor's cache.
    """
    mine, _ = feature_reducer.share(segments)
    for decision in inputs.unflatten(0, (-1, mine.stop - mine.start)):  # [E, D]
        drawn = torch.randn(segments, inputs.shape[1], generator=generator, device=inputs.device)
        decision.add_(drawn[mine], alpha=PRETRAIN_NOISE)


def pretrain_loss(
    setup: Setup, starts: Tensor, start_weights: Tensor, order: CoinOrder, masked: Tensor,
    noise: torch.Generator | None = None,
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:  # fmt: skip
    """Compute the loss of S decisions from `starts` [E] whose windows are `masked` [S + 1, E, N, F].

    It is minus the segment's growth net of costs, plus the critic's error on the returns (discounted per
    decision; it trains its head alone), plus the reconstruction error of every fourth window as it was,
    without mask and `noise` (unbiased, and cheaper; a masked autoencoder: He et al. 2022, arXiv:2111.06377;
    a denoising one: Vincent et al. 2010, JMLR 11).

    Returns:
        The loss, its parts, and the tensors on the way that may stop being finite.
    """
    policy, ppo, steps = setup.policy, setup.ppo, len(masked) - 1
    rows = segment_rows(starts, steps, setup.env.hold_bars)
    orders = order.coins.repeat(steps + 1, 1) if setup.shuffles() else None
    inputs = setup.windows(rows, orders)  # [(S + 1) * E, D]
    wanted = inputs.unflatten(0, (steps + 1, -1))[::4].flatten(0, 1).clone()
    mask_windows(inputs, masked.flatten(0, 1), setup.windows)
    if noise:
        add_noise(inputs, PRETRAIN_SEGMENTS, noise)
    weights = setup.env.reset(starts, steps, start_weights)
    rewards, values = [], []
    with setup.autocast(), stop_where_not_finite(setup, "in pretraining"):
        latent = setup.reducer.encoder(inputs)
        reconstruction = setup.reducer.decoder(latent.unflatten(0, (steps + 1, -1))[::4].flatten(0, 1))
        tokens = policy.market_tokens(ScaleGradient.apply(latent, ppo.policy_share))
        tokens = tokens.unflatten(0, (steps + 1, -1))  # [S + 1, E, A, W]
        for step in range(steps + 1):
            held = order.to_slots(weights).float()
            mean, value = policy(tokens[step], held)
            values.append(value)
            if step < steps:
                target = order.to_market(weights_from_logits(mean.double()))
                weights, reward, _, _ = setup.env.step(target)
                rewards.append(setup.return_scale * reward)
    returns = [values[-1].detach()]
    for reward in reversed(rewards):
        returns.append(ppo.reward_scale * reward.detach().float() + ppo.gamma * returns[-1])
    growth = torch.stack(rewards).mean()
    critic = F.mse_loss(torch.stack(values[:-1]), torch.stack(returns[:0:-1]))
    error = (reconstruction.float() - wanted).square().mean()
    loss = joint_loss(ppo.critic_weight * critic - steps * growth.float(), error, ppo.reconstruction_share)
    stats = {"loss": loss, "critic_loss": critic, "reconstruction_loss": error}
    stats["growth_bp_day"] = bp_per_day(growth / setup.return_scale / setup.env.hold_bars)
    stats = {name: value.detach() for name, value in stats.items()}
    tensors = {"windows": inputs, "latent": latent, "reconstruction": reconstruction}
    return loss, stats, tensors | {"values": torch.stack(values), "growth": growth}


def pretrain_step(
    setup: Setup, run: Run, step: int, total: int, optimizers: tuple, scaler: torch.amp.GradScaler
) -> dict[str, float]:
    """Take optimizer step `step` of a pretraining of `total`; return its figures."""
    rates = PRETRAIN_POLICY_RATE, run.progress.pretrain_encoder_rate
    set_rates(optimizers, rates, cosine(step / total))
    generator = generator_for(setup.ppo.seed, 1, step)
    bars = PRETRAIN_DECISIONS * setup.env.hold_bars
    starts = draw_starts(setup.train_rows, PRETRAIN_SEGMENTS, bars, generator)
    weights = random_weights(PRETRAIN_SEGMENTS, setup.env.assets, generator).to(setup.device)
    coins = draw_coin_order(setup, PRETRAIN_SEGMENTS, generator).coins
    mine, share = feature_reducer.share(PRETRAIN_SEGMENTS)
    masked = draw_masks(setup.windows, PRETRAIN_DECISIONS + 1, PRETRAIN_SEGMENTS, generator)
    masked = masked[:, mine].to(setup.device)
    drawn = starts[mine], weights[mine], CoinOrder(coins[mine]), masked
    noise = generator_for(setup.ppo.seed, 4, step, device=setup.device) if PRETRAIN_NOISE else None
    loss, stats, tensors = pretrain_loss(setup, *drawn, noise)
    stats = feature_reducer.mean_over_processes(stats, share)
    where = f"in pretraining step {step + 1}"
    feature_reducer.check_finite(stats["loss"], scaler, setup.modules(), where, tensors)
    del tensors  # its windows need not live through the step and the next forward pass
    norms = optimizer_step(share * loss, setup, optimizers, scaler)
    feature_reducer.count_skipped(run.progress, int(norms["skipped"]), 1, setup.modules(), where)
    return stats


def choose_hold(setup: Setup, run: Run, trial: dict[str, object]) -> Setup:
    """Pretrain shortly with each interval of HOLDS, and return the setup of that which validates best.

    All start from the same weights and draw the same random numbers, and each is a trial like `trial`, the
    run's own. After a stop a resume repeats the one under way.
    """
    progress = run.progress
    possible = [hold for hold in HOLDS if longest_segment(hold) + 3 <= len(setup.train_rows)]
    if left_out := [hold for hold in HOLDS if hold not in possible]:
        print(f"too little history for decisions every {', '.join(map(str, left_out))} bars")
    save_last(setup, run)
    for hold in possible:
        if str(hold) in progress.probes:
            continue
        validation = probe_hold(setup, run, hold)
        if run.stop.exit_code:
            return setup
        progress.probes[str(hold)] = validation
        print(
            f"decisions every {hold} bars: validation {validation:+.1f} bp/day over the benchmark", flush=True
        )
        changed = json.dumps(json.loads(trial["changed"]) | {"HOLD": hold})
        own = {"run": f"{progress.run} (HOLD {hold})", "changed": changed, "validation_bp_day": validation}
        if feature_reducer.rank() == 0:
            portfolio_env.append_trial(DATA_DIR / "runs" / "trials.csv", trial | own)
        save_last(setup, run)
    progress.hold_bars = int(max(progress.probes, key=progress.probes.__getitem__))
    return with_hold(setup, progress.hold_bars)


def probe_hold(setup: Setup, run: Run, hold_bars: int) -> float:
    """Pretrain copies of the modules for PROBE_EPOCHS; return the best validation, bp per day."""
    modules = {"policy": copy.deepcopy(setup.policy), "reducer": copy.deepcopy(setup.reducer)}
    probe = replace(with_hold(setup, hold_bars), **modules)
    optimizers = make_optimizers(probe, POLICY_RATE, ENCODER_RATE)
    scaler = torch.amp.GradScaler(setup.device.type, enabled=setup.amp)
    best, total = -math.inf, PROBE_EPOCHS * PRETRAIN_STEPS
    bar = feature_reducer.progress_bar(total, 0, f"every {hold_bars} bars", "step")
    for step in range(total):
        pretrain_step(probe, run, step, total, optimizers, scaler)
        bar.update()
        run.stop.agree()
        if run.stop.exit_code:
            break
        if (step + 1) % PRETRAIN_STEPS == 0:
            best = max(best, validate(probe).growth)
    bar.close()
    return best


def with_hold(setup: Setup, hold_bars: int) -> Setup:
    """Return the setup with decisions so many bars apart."""
    return replace(setup, **market_of(setup.prices, setup.spans["train"], hold_bars, setup.device))


def pretrain(setup: Setup, run: Run) -> None:
    """Train on growth through the differentiable accounting; keep the epoch that validates best."""
    progress, log_folder = run.progress, DATA_DIR / "runs" / run.progress.run
    log = feature_reducer.RunLog(log_folder / "pretrain", progress.pretrain_steps // PRETRAIN_STEPS)
    total = PRETRAIN_EPOCHS * PRETRAIN_STEPS
    bar = feature_reducer.progress_bar(total, progress.pretrain_steps, "pretrain", "step")
    while progress.pretrain_steps < total and not run.stop.exit_code:
        stats = pretrain_step(setup, run, progress.pretrain_steps, total, run.optimizers, run.scaler)
        progress.pretrain_steps += 1
        sums = progress.pretrain_sums
        progress.pretrain_sums = {name: sums.get(name, 0.0) + value for name, value in stats.items()}
        growth, error = stats["growth_bp_day"], stats["reconstruction_loss"]
        bar.update()
        bar.set_postfix(growth=f"{growth:+.0f} bp/day", mse=f"{error:.3f}")
        if progress.pretrain_steps % PRETRAIN_STEPS == 0:
            means = {name: value / PRETRAIN_STEPS for name, value in progress.pretrain_sums.items()}
            progress.pretrain_sums = {}
            validation = validate(setup)
            improved = validation.beats(progress)
            epoch = progress.pretrain_steps // PRETRAIN_STEPS
            log.add(epoch, {**means, "validation_bp_day": validation.growth})
            bar.write(
                f"pretrain {epoch:2d}/{PRETRAIN_EPOCHS}  growth {means['growth_bp_day']:+8.1f} bp/day  "
                f"mse {means['reconstruction_loss']:.4f}  {validation}{'  *' * improved}"
            )
            print(end="", flush=True)
            if improved:
                save_best(setup, run, "pretrained.pt", validation)
            save_last(setup, run)
        run.stop.agree()
    bar.close()
    log.close()


def minibatches(transitions: Rollout, batch: int, ppo: PPO) -> Iterator[Rollout]:
    """Yield all windows `update_epochs` times, each time in a new order, a minibatch at a time."""
    for epoch in range(ppo.update_epochs):
        order = torch.randperm(len(transitions.rows), generator=generator_for(ppo.seed, 3, batch, epoch))
        for chosen in order.to(transitions.rows.device).split(ppo.minibatch):
            yield Rollout(*(field[chosen] for field in transitions))


def update(
    setup: Setup, rollout: Rollout, batch: int,
    optimizers: Sequence[torch.optim.Optimizer], scaler: torch.amp.GradScaler,
) -> dict[str, float]:  # fmt: skip
    """Run PPO on one rollout; every minibatch re-encodes its windows with gradient, once for all replicas.

    Returns:
        Means over the optimizer steps, and the last approx_kl: above 1.5 x target_kl the update stops.
    """
    history: dict[str, list[float]] = {}
    updates, ppo = 0, setup.ppo
    for minibatch in minibatches(flatten_rollout(rollout, ppo.replicas), batch, ppo):
        mine, share = feature_reducer.share(len(minibatch.rows))
        advantage = normalised(minibatch.advantage, minibatch.alive)[mine]
        weight = (minibatch.alive / minibatch.alive.float().mean())[mine]
        minibatch = Rollout(*(field[mine] for field in minibatch))
        rows, order, masked = minibatch.rows[:, 0], minibatch.order[:, 0], minibatch.masked[:, 0]
        wanted = setup.windows(rows, order if setup.shuffles() else None)  # [B, D]
        inputs = mask_windows(wanted.clone(), masked, setup.windows)
        with setup.autocast():
            latent = setup.reducer.encoder(inputs)
            tokens = setup.policy.market_tokens(ScaleGradient.apply(latent, ppo.policy_share))
            tokens = tokens.repeat_interleave(ppo.replicas, 0)
            mean, value = setup.policy(tokens, minibatch.weights.flatten(0, 1))
        mean, value = (part.unflatten(0, (-1, ppo.replicas)) for part in (mean, value))
        policy_loss, stats = ppo_losses(mean, value, setup.policy.log_std, minibatch, advantage, weight, ppo)
        stats["ratio_max"] = feature_reducer.gather(stats["ratio_max"].reshape(1)).max()
        stats = feature_reducer.mean_over_processes(stats, share)
        approx_kl = stats.pop("approx_kl")
        if ppo.target_kl and updates and approx_kl > 1.5 * ppo.target_kl:
            break
        with setup.autocast():
            reconstruction = setup.reducer.decoder(latent)
        difference = reconstruction.float() - wanted
        error = difference.square().mean()
        loss = joint_loss(policy_loss, error, ppo.reconstruction_share)
        tensors = {"windows": inputs, "latent": latent, "reconstruction": reconstruction}
        tensors |= {"mean": mean, "value": value, "policy loss": policy_loss}
        accuracy = feature_reducer.within_tolerance(difference[::8])  # of a sample: it is only shown
        parts = {"loss": loss, "reconstruction_loss": error, "accuracy": accuracy}
        parts = feature_reducer.mean_over_processes(parts, share)
        total = parts.pop("loss")
        feature_reducer.check_finite(total, scaler, setup.modules(), f"in batch {batch + 1}", tensors)
        norms = optimizer_step(share * loss, setup, optimizers, scaler)
        updates += 1
        parts["encoder_loss"] = (
            ppo.policy_share * stats["policy_loss"] + ppo.reconstruction_share * parts["reconstruction_loss"]
        )
        for name, part in {**stats, **parts, **norms}.items():
            history.setdefault(name, []).append(part)
    skipped = int(sum(history.pop("skipped")))
    return {name: finite_mean(values) for name, values in history.items()} | {
        "approx_kl": approx_kl, "updates": updates, "skipped": skipped,
    }  # fmt: skip


@torch.no_grad()
def reconstruction_on(setup: Setup, split: str) -> dict[str, float]:
    """Return `reconstruction_metrics` of the current reducer on windows evenly spread over a split."""

    def reconstruct(windows: Tensor) -> Tensor:
        with setup.autocast():
            return setup.reducer(windows)[1]

    rows = torch.arange(*setup.spans[split], device=setup.device)
    sample = feature_reducer.spread_rows(rows, _RECONSTRUCTION_WINDOWS)
    return feature_reducer.reconstruction_metrics(reconstruct, setup.windows, sample, ENCODE_BATCH)


def report(
    setup: Setup, folder: Path, agents: dict[str, Backtest], split: str, relation: str, runs: Path,
    part: str = "", **fields: object,
) -> None:  # fmt: skip
    """Print and write the report on `agents` (first the headline, whose weights `setup` has) and baselines.

    Args:
        folder: to write into. relation: of these bars to the training. runs: where all trials left logs.
        part: of several runs that which is shown. fields: more of `portfolio_env.Report`.
    """
    reconstruction = {f"{part} split": reconstruction_on(setup, part) for part in ("train", split)}
    if feature_reducer.rank():
        return
    headline = next(iter(agents.values()))
    first, stop = int(headline.rows[0]), int(headline.rows[-1]) + 1
    rules = portfolio_env.baselines(
        *setup.prices, first, stop, cost=setup.env.cost, fill=FILL, rebalance_every=REBALANCE_EVERY,
        look_back=LOOK_BACK,
    )  # fmt: skip
    page = portfolio_env.Report(
        market=setup.footer["source"],
        split=split,
        times=setup.windows.times[first:stop],
        symbols=setup.footer["symbols"],
        cost=setup.env.cost,
        fill=FILL,
        others=rules,
        agents=agents,
        relation=relation,
        hold_bars=setup.env.hold_bars,
        trial_sharpes=portfolio_env.read_trial_sharpes(runs / "trials.csv"),
        curves=portfolio_env.read_curves(runs / fields["run"] / part),
        reconstruction=reconstruction,
        data=portfolio_env.data_sha256(setup.footer),
        **fields,
    )
    portfolio_env.publish(folder, page, f"\n{split} split ({relation})")


def agent_state(setup: Setup, run: Run) -> AgentState:
    """Collect all that it takes to go on later."""
    state = {"kind": "train_last", "progress": asdict(run.progress), "fixed": run.fixed}
    state |= {"scaler": run.scaler.state_dict(), "optimizers": [part.state_dict() for part in run.optimizers]}
    return agent_checkpoint(setup, run.progress.run) | state


def save_last(setup: Setup, run: Run) -> None:
    """Write last.pt in the background; a run that has one is a trial, even if it is stopped."""
    last = run_folder(run.progress.run) / "last.pt"
    run.writer.write(last, agent_state(setup, run))
    if not run.trial or feature_reducer.rank():
        return
    run.writer.wait()
    try:
        portfolio_env.append_trial(DATA_DIR / "runs" / "trials.csv", run.trial)
    except OSError as error:  # a full disk, which ends no training: again with the next save
        print(f"warning: trials.csv has to wait ({error}); training goes on", file=sys.stderr)
        return
    run.trial = None
    if last not in run.writer.failed:
        feature_reducer.drop_other_pins(last, setup.footer)


def save_best(setup: Setup, run: Run, name: str, validation: Validation) -> None:
    """Write the best agent so far; where that fails the one before stays, and a resume tries again.

    The best of many validations is above 0 also where there is nothing to find. So until one is above it by
    more than chance, best.pt holds all assets alike.
    """
    abstain = name == "best.pt" and not validation.found
    content = agent_checkpoint(setup, run.progress.run, abstain)
    written = run.writer.write_now(run_folder(run.progress.run) / name, content)
    run.progress.best_failed = not written
    if written:
        run.progress.best_validation, run.progress.found = validation.growth, validation.found


def restore_best(setup: Setup, run: Run) -> None:
    """Let the current agent compete where the best one of a resumed run is missing or was not written."""
    progress, name = run.progress, "best.pt" if run.progress.pretrained else "pretrained.pt"
    if progress.best_validation > -math.inf and feature_reducer.is_missing(run_folder(progress.run) / name):
        progress.best_validation, progress.found, progress.best_failed = -math.inf, False, True
    if progress.best_failed:
        validation = validate(setup)
        print(f"resumed: {validation}", flush=True)
        if validation.beats(progress):
            save_best(setup, run, name, validation)
        save_last(setup, run)


def go_back(setup: Setup, run: Run) -> None:
    """Go on from the best agent at half the rates: what does not validate was noise, or too large a step.

    Where its file could not be written, or is gone, or none has been above chance yet, the training goes on
    from where it is.
    """
    path = run_folder(run.progress.run) / "best.pt"
    lower_rates(run.progress)
    place = "on"
    if run.progress.found and not run.progress.best_failed and feature_reducer.from_first(path.exists()):
        load_agent(path, setup, run.progress.run)
        place = "back to the best agent"
    print(f"{place}, at {run.progress.rate_factor:.3g} of the learning rates", flush=True)


def lower_rates(progress: Progress) -> None:
    """Halve the online learning rates, down to a floor."""
    progress.rate_factor = max(progress.rate_factor / 2, _LEAST_FACTOR)


def validate(setup: Setup) -> Validation:
    """Return what the agent makes on the validation split."""
    returns = portfolio_env.excess_returns(backtest_agent(setup, "validation"))
    block = portfolio_env.block_length(returns)
    interval = portfolio_env.bootstrap_interval(returns, block, level=CONFIDENCE)
    return feature_reducer.from_first(Validation(*map(bp_per_day, (float(returns.mean()), *interval))))


def draw_rollout(setup: Setup, epsilon: float, generator: torch.Generator) -> Draws:
    """Draw for all environments; of several processes each keeps what its share of them needs."""
    mine, _ = feature_reducer.share(NUM_ENVS)
    coins = setup.env.assets - 1
    starts = draw_starts(setup.train_rows, NUM_ENVS, STEPS * setup.env.hold_bars, generator)
    weights = random_weights(NUM_ENVS, coins + 1, generator).to(setup.device)
    order = draw_coin_order(setup, NUM_ENVS, generator)
    drawn = (
        draw_masks(setup.windows, STEPS + 1, NUM_ENVS, generator),
        *draw_noise(STEPS, NUM_ENVS, REPLICAS, coins, epsilon, generator),
    )
    drawn = (part[:, mine].to(setup.device) for part in drawn)
    return Draws(starts[mine], weights[mine], CoinOrder(order.coins[mine]), *drawn)


def on_plateau(progress: Progress, reward: float) -> bool:
    """Add a batch's reward to the rolling one; return whether that has not improved for PATIENCE batches."""
    progress.rolling = [*progress.rolling, reward][-ROLLING:]
    progress.stale += 1
    if progress.batch + 1 >= min(ROLLING, BATCHES) and progress.rolling_reward() > progress.best_reward:
        progress.best_reward, progress.stale = progress.rolling_reward(), 0
    elif progress.stale >= PATIENCE:
        progress.stale = 0
        return True
    return False


def print_batch(
    progress: Progress, row: dict[str, float | None], validation: Validation | None, improved: bool
) -> None:
    """Print one line about the batch that `row` logs."""
    left = (BATCHES - progress.batch) * progress.seconds / progress.batch
    print(
        f"batch {progress.batch:5d}/{BATCHES}  "
        f"value {row['portfolio_value']:.4f} ({row['benchmark_value']:.4f})  "
        f"reward {bp_per_day(row['reward']):+8.1f} rolling {bp_per_day(row['rolling_reward']):+8.1f} bp/day  "
        f"kl {row['approx_kl']:.4f}  clip {row['clip_fraction']:.2f}  entropy {row['entropy']:+.2f}  "
        f"ev {row['explained_variance']:+.2f}  mse {row['reconstruction_loss']:.3f}  "
        f"updates {row['updates']:2d}  left {left / 60:5.1f} min"
        + ("" if validation is None else f"  {validation}{' *' * improved}"),
        flush=True,
    )


def untie(setup: Setup) -> Setup:
    """Return the setup with the tied agent's function in dense matrices, weights of its own for each coin."""
    coins = setup.env.assets - 1
    return replace(setup, policy=setup.policy.to_dense(coins), reducer=setup.reducer.to_dense(coins))


def train_agent(setup: Setup, run: Run) -> Setup:
    """Pretrain, then train online, from where `run.progress` stands; return early when the user stops it.

    Returns:
        The setup with the trained modules, which are others than before where the coins were untied.
    """
    progress, stop, scaler = run.progress, run.stop, run.scaler
    checkpoints = run_folder(progress.run)
    if not progress.pretrained:
        pretrain(setup, run)
        if stop.exit_code:
            save_last(setup, run)
            return setup
        if progress.best_validation > -math.inf:  # otherwise no epoch could be written: keep the last one
            load_agent(checkpoints / "pretrained.pt", setup, progress.run)
        run.optimizers = make_optimizers(setup, POLICY_RATE, ENCODER_RATE)
        progress.pretrained, progress.best_validation, progress.found = True, -math.inf, False
    if TIE_COINS == "pretrain" and setup.policy.tied:
        setup = untie(setup)
        run.optimizers = make_optimizers(setup, POLICY_RATE, ENCODER_RATE)
    if progress.best_validation == -math.inf:  # there is no best.pt yet: this agent is the first candidate
        validation = validate(setup)
        print(f"at batch {progress.batch}: {validation}", flush=True)
        save_best(setup, run, "best.pt", validation)
        save_last(setup, run)

    log = feature_reducer.RunLog(DATA_DIR / "runs" / progress.run, progress.batch)
    while progress.batch < BATCHES and not stop.exit_code:
        batch, begun = progress.batch, time.perf_counter()
        done = batch / max(1, BATCHES - 1)
        epsilon = EPSILON_START + (EPSILON_END - EPSILON_START) * done
        gamma = GAMMA_START + (GAMMA_END - GAMMA_START) * done
        setup = replace(setup, ppo=replace(setup.ppo, gamma=gamma))
        set_rates(run.optimizers, (POLICY_RATE, ENCODER_RATE), progress.rate_factor * cosine(batch / BATCHES))
        draws = draw_rollout(setup, epsilon, generator_for(SEED, 2, batch))

        # the market does not depend on the actions: encode the windows of the whole batch first
        rows = segment_rows(draws.starts, STEPS, setup.env.hold_bars)
        orders = draws.order.coins.repeat(STEPS + 1, 1) if setup.shuffles() else None
        with setup.autocast(), stop_where_not_finite(setup, f"in batch {batch + 1}"):
            masked = draws.masked.flatten(0, 1)
            tokens = encode(setup.policy, setup.reducer, setup.windows, rows, ENCODE_BATCH, orders, masked)
            encoded = time.perf_counter()
            with one_thread():
                rollout = collect_rollout(setup, tokens.unflatten(0, (STEPS + 1, -1)), draws)
        rollout = Rollout(*(feature_reducer.gather(field, dim=1) for field in rollout))
        stepped = time.perf_counter()
        row = rollout_metrics(rollout, setup.env.hold_bars)
        row = feature_reducer.from_first(row)  # the reward decides about the rates
        row |= update(setup, rollout, batch, run.optimizers, scaler)
        updated = time.perf_counter()

        far = TARGET_KL and row["approx_kl"] > _TOO_FAR * TARGET_KL  # in a step or two
        if on_plateau(progress, row["reward"]) or far:
            lower_rates(progress)
        skipped, where = row.pop("skipped"), f"in batch {batch + 1}"
        feature_reducer.count_skipped(progress, skipped, row["updates"], setup.modules(), where)
        progress.batch += 1
        stop.agree()
        validation, improved = None, False
        if (VALIDATE_EVERY and progress.batch % VALIDATE_EVERY == 0) or progress.batch == BATCHES:
            validation = validate(setup)
            improved = validation.beats(progress)

        progress.seconds += time.perf_counter() - begun
        steps = NUM_ENVS * STEPS
        rates = [optimizer.param_groups[0]["lr"] for optimizer in run.optimizers]
        row |= {
            "rolling_reward": progress.rolling_reward(),
            "validation_bp_day": validation and validation.growth,
            "loss_scale": scaler.get_scale(), "skipped_steps": progress.skipped, "epsilon": epsilon,
            "gamma": gamma,
            "policy_rate": rates[0], "encoder_rate": rates[-1] if TRAIN_ENCODER else 0.0,
            "encode_steps_per_second": steps / (encoded - begun),
            "rollout_steps_per_second": steps * REPLICAS / (stepped - encoded),
            "update_steps_per_second": MINIBATCH * row["updates"] / (updated - stepped),
        }  # fmt: skip
        log.add(progress.batch, row)
        print_batch(progress, row, validation, improved)
        if improved:
            progress.best_failed = True  # a resume from here writes it: best.pt is never newer than last.pt
            save_last(setup, run)
            save_best(setup, run, "best.pt", validation)
        elif validation is not None and progress.batch < BATCHES:
            go_back(setup, run)
        if progress.batch % SAVE_EVERY == 0 or stop.exit_code > 0 or progress.batch == BATCHES:
            save_last(setup, run)
    log.close()
    if not stop.exit_code:
        run.writer.write_now(checkpoints / "final.pt", agent_checkpoint(setup, progress.run))
    return setup


def now() -> str:
    """Return the time in UTC, the first process's in all."""
    return feature_reducer.from_first(time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))


def new_run_name() -> str:
    """Return the name of a run that was given none: its scale and the time."""
    return f"{SCALE}-{now().translate(str.maketrans('T', '-', ':-Z'))}"


def newest_run() -> str:
    """Return the name of the run that saved last.

    Raises:
        UserError: there is none.
    """
    folder = DATA_DIR / "checkpoints"
    states = [path for path in folder.glob("*/**/last.pt") if path.is_file()]
    if not states:
        earlier = folder / "last.pt"
        if earlier.is_file():
            raise UserError(f"{earlier} was written by an earlier version of these scripts: start anew")
        raise UserError(f"there is no {folder}/*/last.pt; it is written by python train.py")
    return max(states, key=lambda path: path.stat().st_mtime).relative_to(folder).parts[0]


def add_trial(trial: dict[str, object], test: Backtest | None = None) -> None:
    """Write a run's row to the list of trials, and its figures to TensorBoard's table of runs."""
    runs = DATA_DIR / "runs"
    trial = portfolio_env.append_trial(runs / "trials.csv", trial, test)
    figures = {name: trial[name] for name in trial if name.endswith("_bp_day")}
    feature_reducer.log_outcome(runs / trial["run"], json.loads(trial["constants"]), figures)


def conclude(setup: Setup, progress: Progress, trial: dict[str, object]) -> None:
    """Print how the training ended, test it, and complete its `trial` and report."""
    runs = DATA_DIR / "runs"
    print(f"run: {progress.run}\nbatches: {progress.batch}\nskipped steps: {progress.skipped}")
    print(f"best validation: {progress.best_validation:+.1f} bp/day over the benchmark")
    if not progress.found and not progress.best_failed:
        print(f"that is no more than chance (CONFIDENCE = {CONFIDENCE:g}): {portfolio_env.ABSTAINS}")
    print(f"checkpoints: {run_folder(progress.run)}")
    trial["validation_bp_day"] = round(progress.best_validation, 3)
    if TEST:
        agents = out_of_sample(setup, progress)
    if feature_reducer.rank() == 0:
        add_trial(trial, next(iter(agents.values())) if TEST else None)
    if TEST:
        folder = DATA_DIR / "reports" / progress.run
        report(
            setup, folder, agents, "test", "out of sample", runs, run=progress.run, scale=SCALE,
            seeds=[SEED], probes=progress.probes, abstains=setup.policy.abstains,
            constants=json.loads(trial["changed"]),
        )  # fmt: skip


def lengthen(saved: AgentState) -> None:
    """Let a stopped or finished run go on for more batches, and say what follows.

    One that had ended has been tested already: it counts as another trial.
    """
    before = saved["fixed"].get("BATCHES")
    if not isinstance(before, int) or not 0 < before < BATCHES:
        return
    if saved["progress"].batch >= before:
        saved["progress"].started = now()
    print(
        f"batches: {BATCHES} instead of {before}; learning rates, epsilon and gamma go on as they would have "
        f"been there in a run of {BATCHES}"
    )
    saved["fixed"]["BATCHES"] = BATCHES


def train_run(
    device: torch.device, amp: bool, flags: dict[str, object], changed: dict[str, object], name: str
) -> int:
    """Train one agent; then complete its trial and write the report.

    Args:
        flags: the constants given on the command line. changed: those of them that differ from the script's.
        name: of the run.

    Returns:
        The exit code.
    """
    last = run_folder(name) / "last.pt"
    fixed = feature_reducer.fixed_constants(globals(), _MAY_CHANGE_ON_RESUME) | {"AMP": amp}
    checkpoints = DATA_DIR / "checkpoints"
    links = None if "/" in name else checkpoints  # one of several runs is not the newest agent
    stop, writer = feature_reducer.StopSignal(), feature_reducer.CheckpointWriter(links)
    if RESUME and not last.exists() and any(last.parent.glob("*/**/last.pt")):
        raise UserError(f"{name} is several runs: give the flags that it was started with")
    saved = feature_reducer.load_checkpoint(last, AgentState) if RESUME else None
    if saved:
        if saved["run"] != name:
            raise UserError(f"{last} is of run {saved['run']}: move it to {run_folder(saved['run'])}")
        if "BATCHES" in flags:
            lengthen(saved)
        feature_reducer.check_resumed(saved, fixed)
    progress = saved["progress"] if saved else None
    place = (progress.pretrain_steps, progress.batch) if progress else None
    feature_reducer.check_alike((fixed, RESUME, TEST, place), "constants")
    hold = progress.hold_bars if progress else HOLD
    with feature_reducer.unchanged_features(DATA_DIR):
        market = shared_market(name) or feature_reducer.market_folder(DATA_DIR, last, saved)
        setup = prepare(device, amp, saved, flags, hold, market, name)
        if saved:
            feature_reducer.check_resumed(saved, fixed, setup.footer)
        elif market == DATA_DIR:
            feature_reducer.pin_market(DATA_DIR, last, setup.footer)
    rate = PRETRAIN_RANDOM_ENCODER_RATE if setup.random_encoder else PRETRAIN_ENCODER_RATE
    progress = progress or Progress(
        run=name, started=now(), hold_bars=hold, pretrain_encoder_rate=rate, pretrained=PRETRAIN_EPOCHS == 0
    )
    optimizers = make_optimizers(setup, POLICY_RATE, ENCODER_RATE)  # pretraining sets its own rates
    run = Run(progress, fixed, optimizers, torch.amp.GradScaler(device.type, enabled=amp), stop, writer)
    if saved:
        feature_reducer.load_states([run.scaler, *optimizers], [saved["scaler"], *saved["optimizers"]])
    else:
        if feature_reducer.rank() == 0:
            for old in (DATA_DIR / "runs" / name).rglob("metrics.csv"):  # of a run of the same name
                old.unlink()
        portfolio_env.read_trial_sharpes(DATA_DIR / "runs" / "trials.csv")  # not damaged
        run.trial = trial_of(setup, progress, fixed, changed)
    saved = optimizers = None  # the weights are in the modules now: free their second copy
    if not progress.hold_bars:
        setup = choose_hold(setup, run, trial_of(setup, progress, fixed, changed))
    if not stop.exit_code:
        restore_best(setup, run)
        setup = train_agent(setup, run)
    stop.agree()
    if stop.exit_code:
        place = f"batch {progress.batch}"
        place = place if progress.pretrained else f"pretraining step {progress.pretrain_steps}"
        place = place if progress.hold_bars else f"{len(progress.probes)} of HOLDS were tried"
        named = () if "RUN" in flags else ("--run", name)
        print(f"stopped after {place}; go on with: {feature_reducer.resume_command('train.py', *named)}")
        return writer.exit_code(stop.exit_code)
    stop.close()
    conclude(setup, progress, trial_of(setup, progress, fixed, changed))
    return writer.exit_code()


class Planned(NamedTuple):
    """One of several runs."""

    point: dict[str, object]  # the constants of its combination of GRID
    fold: int  # from 1 on; 0: none
    seed: int

    def combination(self) -> str:
        """Return the name of its combination: HOLD=4,POLICY_RATE=0.001."""
        values = {name: value if isinstance(value, tuple) else (value,) for name, value in self.point.items()}
        return ",".join(f"{name}={'x'.join(map(str, value))}" for name, value in values.items())

    def name(self) -> str:
        """Return its place in the folders of all: combination, fold and seed, where there are several."""
        fold, seed = f"fold-{self.fold}" * bool(self.fold), f"seed-{self.seed}" * (len(SEEDS) > 1)
        return "/".join(part for part in (self.combination(), fold, seed) if part)


def planned_runs() -> list[Planned]:
    """Return all runs that the constants ask for."""
    folds = [FOLD] if FOLD else range(1, WALK_FORWARD + 1) or [0]
    return [Planned(*parts) for parts in itertools.product(grid_points(), folds, SEEDS)]


def check_hold(given: Iterable[str]) -> None:
    """Raise UsageError where constants were given that only choose HOLD, and HOLD too."""
    if unused := HOLD and sorted({"HOLDS", "PROBE_EPOCHS"}.intersection(given)):
        raise UsageError(f"{' and '.join(unused)} are for HOLD = 0, which is {HOLD}")


def check_combinations(flags: dict[str, object], run: str) -> None:
    """Raise UsageError for a combination of the grid whose constants, or the name of its run, cannot be."""
    script = sys.modules[__name__]
    for point in grid_points():
        if both := flags.keys() & point.keys():
            raise UsageError(f"GRID varies {min(both)}, which is also given as a flag: leave one of them out")
        values = point | {"RUN": f"{run}/{Planned(point, 0, 0).combination()}".rstrip("/")}
        before = {name: getattr(script, name) for name in values}
        getData.assign_constants(script, values)
        try:
            check_constants()
            check_hold([*flags, *point])
        finally:
            getData.assign_constants(script, before)


def shared_market(name: str) -> Path | None:
    """Return the features that several runs have in common, for one of them; None for a run of its own."""
    if "/" not in name:
        return None
    pins = [path for path in run_folder(name.split("/")[0]).glob("last.market-*") if path.suffix != ".tmp"]
    return max(pins, key=lambda path: path.stat().st_mtime, default=None)  # others: of an unfinished start


def command_of(plan: Planned, run: str, flags: dict[str, object]) -> list[str]:
    """Return the command that trains one of several runs, from its last.pt where it has one."""
    name = f"{run}/{plan.name()}"
    values = flags | plan.point
    values |= {"DATA_DIR": DATA_DIR.absolute(), "RUN": name, "SEED": plan.seed, "FOLD": plan.fold}
    values |= {"WALK_FORWARD": WALK_FORWARD, "GRID": "", "ENGINE": "local", "TEST": False}
    values |= {"RESUME": (run_folder(name) / "last.pt").exists()}
    values.pop("SEEDS", None)
    texts = [getData.flag_text(flag, value) for flag, value in values.items()]
    return [sys.executable, "-u", str(Path(__file__).resolve()), *texts]


def start_process(command: list[str], log: Path) -> subprocess.Popen:
    """Start a run, which writes into `log`, hears no Ctrl-C, and ends where this process is killed."""
    libc = ctypes.CDLL(None)

    def end_with_parent() -> None:
        if hasattr(libc, "prctl"):  # Linux
            libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG

    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
            preexec_fn=end_with_parent,
        )  # fmt: skip


def run_process(command: list[str], log: Path) -> int:
    """Run to the end, and return the exit code; an interrupt is a request to stop and save."""
    process = start_process(command, log)
    while True:
        try:
            return process.wait(0.2)
        except subprocess.TimeoutExpired:  # Ray's interrupt is no signal, and ends no waiting
            continue
        except KeyboardInterrupt:
            process.terminate()


class LocalEngine:
    """Runs on this machine, one at a time."""

    slots = 1

    start = staticmethod(start_process)
    poll = staticmethod(subprocess.Popen.poll)
    stop = staticmethod(subprocess.Popen.terminate)


class RayEngine:
    """Runs on a Ray cluster: that at RAY_ADDRESS, or else one of this machine's cores.

    All its machines need this script, its packages and DATA_DIR at the same paths. Each run takes one CPU,
    and one GPU where it trains on one.

    Raises:
        UserError: Ray is not installed, no cluster answers, or it has no GPU.
    """

    slots = math.inf  # Ray keeps those that have to wait

    def __init__(self, device: torch.device) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            import ray
        except ImportError:
            raise UserError("ENGINE = ray needs Ray: pip install ray, or leave --engine out") from None
        self.ray = ray
        quiet = {"log_to_driver": False, "logging_level": "ERROR"}
        try:
            if address := os.environ.get("RAY_ADDRESS"):
                ray.init(address=address, **quiet)
            else:
                ray.init(address="local", include_dashboard=False, _node_ip_address="127.0.0.1", **quiet)
        except ConnectionError as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{reason}: are RAY_ADDRESS and RAY_AUTH_TOKEN those of a cluster?") from None
        gpus = int(device.type == "cuda")
        if gpus > ray.cluster_resources().get("GPU", 0):
            raise UserError("the Ray cluster has no GPU: use --device cpu, or a cluster that has one")
        self.run = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=0)(run_process)

    def start(self, command: list[str], log: Path) -> object:
        """Hand a run to the cluster."""
        return self.run.remote(command, log)

    def poll(self, reference: object) -> int | None:
        """Return the exit code of a run, None while it goes on; -SIGKILL where its machine or worker died."""
        if not self.ray.wait([reference], timeout=0)[0]:
            return None
        try:
            return self.ray.get(reference)
        except self.ray.exceptions.RayError:
            return -signal.SIGKILL

    def stop(self, reference: object) -> None:
        """Let a run stop and save; one that has not begun never begins."""
        self.ray.cancel(reference, force=False)


def last_line(log: Path) -> str:
    """Return the last line that a run printed."""
    lines = log.read_text("utf-8", "replace").split("\n") if log.exists() else []
    return next((line.strip()[:200] for line in reversed(lines) if line.strip()), "it printed nothing")


def run_all(
    plans: list[Planned], run: str, flags: dict[str, object], engine: LocalEngine | RayEngine,
    stop: feature_reducer.StopSignal,
) -> dict[str, int]:  # fmt: skip
    """Train all runs; one that dies is started once more, from its last.pt.

    Returns:
        {name: exit code} of those that died again, or could not begin. All others have ended unless `stop`
        says so.
    """
    every = {plan.name(): plan for plan in plans}
    waiting = list(every)
    runs = DATA_DIR.absolute() / "runs"  # a worker on a cluster is elsewhere
    logs = {name: runs / run / name / "output.txt" for name in waiting}
    going: dict[str, object] = {}
    again, dead, ended, begun = set[str](), dict[str, int](), 0, time.monotonic()
    bar = feature_reducer.progress_bar(len(plans), 0, run, "run")
    while going or (waiting and not stop.exit_code):
        while waiting and len(going) < engine.slots and not stop.exit_code:
            name = waiting.pop(0)
            going[name] = engine.start(command_of(every[name], run, flags), logs[name])
            bar.set_postfix_str(name)
        asked = stop.exit_code
        stop.agree()
        if stop.exit_code and not asked:
            for reference in going.values():
                engine.stop(reference)
        for name, reference in list(going.items()):
            code = engine.poll(reference)
            if code is None:
                continue
            del going[name]
            if code == 0:
                ended += 1
                minutes = (time.monotonic() - begun) / 60
                left = minutes / ended * (len(plans) - ended - len(dead))
                validation = trial_row(f"{run}/{name}")["validation_bp_day"]
                bar.write(
                    f"run {ended}/{len(plans)}  {name}  validation {validation:+.1f} bp/day  "
                    f"left {left:5.1f} min"
                )
                print(end="", flush=True)
                bar.update()
            elif stop.exit_code:
                continue
            elif code in (2, 3) or name in again:  # a wrong constant, another process: the same once more
                dead[name] = code
                bar.write(f"run {name} died (exit code {code}): {last_line(logs[name])}", file=sys.stderr)
            else:
                again.add(name)
                waiting.append(name)
                reason = f"(exit code {code}): {last_line(logs[name])}"
                bar.write(f"run {name} died {reason}; once more, from its last checkpoint", file=sys.stderr)
        time.sleep(0.1)
    bar.close()
    return dead


def trial_row(run: str) -> dict[str, object]:
    """Return the newest row of a run in the list of trials."""
    trials = portfolio_env.read_trials(DATA_DIR / "runs" / "trials.csv")
    return trials[trials["run"] == run].iloc[-1].to_dict()


def tested_combination(
    plans: list[Planned], run: str, market: Path, device: torch.device, amp: bool
) -> tuple[Setup, dict[str, Backtest]]:
    """Test the ensemble of a combination's seeds, and each seed, in one account of all folds.

    Returns:
        The setup of the agent (of the last fold), and {name: account}, the agent first.
    """
    orders: dict[str, list[np.ndarray]] = {}
    for _, fold in itertools.groupby(plans, lambda plan: plan.fold):
        paths = {run_folder(f"{run}/{plan.name()}") / "best.pt": plan.seed for plan in fold}
        agents = {path: feature_reducer.load_checkpoint(path, AgentCheckpoint) for path in paths}
        setup = setup_of(combined(agents), market, device, amp, next(iter(paths)))
        setups = {"ensemble": setup}
        if len(agents) > 1:
            members = zip(agents.items(), setup.policy.members, setup.reducer.members, strict=True)
            for (path, agent), policy, reducer in members:
                one = with_hold(replace(setup, policy=policy, reducer=reducer), agent["hold_bars"])
                setups[f"seed {paths[path]}"] = one
        for name, one in setups.items():
            parts = orders.setdefault(name, [])
            # an order sets all weights, so the fold before is enough to know what is held
            before = account_of(one, parts[-1], one.spans["test"][0]) if parts else None
            parts.append(agent_orders(one, "test", before))
    stop = setup.spans["test"][1]
    return setup, {name: account_of(setup, np.concatenate(parts), stop) for name, parts in orders.items()}


def forget_runs(run: str, plans: list[Planned]) -> None:
    """Remove checkpoints and logs of earlier runs of these names, and seeds that an ensemble would find."""
    for folder in {run_folder(f"{run}/{plan.name()}") for plan in plans}:
        for old in folder.parent.glob("seed-*/*.pt") if len(SEEDS) > 1 else folder.glob("*.pt"):
            old.unlink()
    (run_folder(run) / "last.pt").unlink(missing_ok=True)
    for old in (DATA_DIR / "runs" / run).rglob("*.*"):
        if old.name in ("metrics.csv", "output.txt"):
            old.unlink()


def check_reducer(path: Path, footer: dict) -> None:
    """Refuse the trained reducer that runs on these features would start from, where it does not fit."""
    if saved := find_reducer(path):
        feature_reducer.check_columns(saved, footer)
        feature_reducer.check_market(saved, footer)


def train_several(device: torch.device, amp: bool, flags: dict[str, object], run: str) -> int:
    """Train all runs that the constants ask for; then test them, and report on the best by validation.

    The runs of one combination of the grid (its seeds and folds) are one agent, the ensemble of the seeds.

    Returns:
        The exit code.
    """
    if "/" in run:
        raise UsageError(f"several runs have one plain name, not {run!r}")
    check_combinations(flags, run)
    engine = RayEngine(device) if ENGINE == "ray" else LocalEngine()
    stop, plans = feature_reducer.StopSignal(), planned_runs()
    named = () if "RUN" in flags else ("--run", run)
    go_on = feature_reducer.resume_command("train.py", *named)
    last = run_folder(run) / "last.pt"
    if RESUME and (last.exists() or not shared_market(f"{run}/")):
        raise UserError(f"{run} is not several runs to go on with: leave --resume, or --run, out")
    begun = any((run_folder(f"{run}/{plan.name()}") / "last.pt").exists() for plan in plans)
    if not RESUME or not begun:
        with feature_reducer.unchanged_features(DATA_DIR):
            _, footer = getData.load_prices(DATA_DIR)
            reducer = DATA_DIR / "checkpoints" / "feature_reducer.pt"
            if not plans[0].point:  # a grid may vary what it must fit
                check_reducer(reducer, footer)
            feature_reducer.pin_market(DATA_DIR, last, footer, [reducer] * reducer.exists())
        if not RESUME:
            forget_runs(run, plans)
        feature_reducer.drop_other_pins(last, footer)
    market = shared_market(f"{run}/")
    print(f"runs: {len(plans)} of {run}, {ENGINE}", flush=True)
    # what "auto" is on another machine may differ; Ray gives each run one GPU, which is its first
    chosen = {"SCALE": SCALE, "DEVICE": device.type if ENGINE == "ray" else str(device)}
    dead = run_all(plans, run, flags | chosen, engine, stop)
    if stop.exit_code:
        print(f"stopped; go on with: {go_on}")
        return stop.exit_code
    stop.close()
    groups = {name: list(group) for name, group in itertools.groupby(plans, Planned.combination)}
    whole = {name: group for name, group in groups.items() if not dead.keys() & {p.name() for p in group}}
    for name in dead:
        log = DATA_DIR / "runs" / run / name / "output.txt"
        reason = f"(exit code {dead[name]}): {last_line(log)}"
        print(f"error: run {name} did not end {reason}; see {log}", file=sys.stderr)
    code = conclude_several(whole, run, market, device, amp) if whole else 0
    if dead:
        print(f"go on with: {go_on}")
    codes = set(dead.values()) or {code}
    return max(codes) if len(codes) == 1 and max(codes) >= 0 else 1


def finished_run(plan: Planned, run: str) -> portfolio_env.RunResult:
    """Return what one of several runs came to; one that abstains has the validation of equal weights."""
    saved = feature_reducer.load_checkpoint(run_folder(f"{run}/{plan.name()}") / "best.pt", AgentCheckpoint)
    abstains = agent_abstains(saved)
    validation = 0.0 if abstains else trial_row(f"{run}/{plan.name()}")["validation_bp_day"]
    return portfolio_env.RunResult(
        plan.name(), plan.combination(), plan.fold, plan.seed, saved["hold_bars"], validation, abstains
    )


def conclude_several(
    groups: dict[str, list[Planned]], run: str, market: Path, device: torch.device, amp: bool
) -> int:
    """Keep the combination that validates best as best.pt, test all, and write trials and report.

    Args:
        groups: the runs of each combination, which have all ended. market: folder of the features.

    Returns:
        The exit code.
    """
    runs = [finished_run(plan, run) for plan in itertools.chain(*groups.values())]
    validations = {
        name: statistics.fmean(one.validation for one in runs if one.combination == name) for name in groups
    }
    found = {one.combination for one in runs if not one.abstains}
    best = max(validations, key=lambda name: (name in found, validations[name]))
    last_fold = groups[best][-len(SEEDS) :]
    paths = [run_folder(f"{run}/{plan.name()}") / "best.pt" for plan in last_fold]
    agents = {path: feature_reducer.load_checkpoint(path, AgentCheckpoint) for path in paths}
    links = DATA_DIR / "checkpoints"
    writer = feature_reducer.CheckpointWriter(links)
    if writer.write_now(run_folder(run) / "best.pt", combined(agents) | {"run": run}):
        for name in ("pretrained.pt", "final.pt", "last.pt"):  # several runs have none
            if (links / name).is_symlink():
                (links / name).unlink()
    print(f"run: {run}\nbest validation: {validations[best]:+.1f} bp/day over the benchmark {best}")
    print(f"checkpoints: {run_folder(run)}")
    if not TEST:
        return writer.exit_code()
    rows = {one.name: trial_row(f"{run}/{one.name}") for one in runs}
    setups, accounts, results = {}, {}, []
    for name, plans in groups.items():
        setups[name], tested = tested_combination(plans, run, market, device, amp)
        accounts[name] = tested["ensemble"]
        for one in (one for one in runs if one.combination == name):
            result = tested[f"seed {one.seed}" if len(SEEDS) > 1 else "ensemble"]
            results.append(one._replace(result=result))
            if len(plans) == len(SEEDS):  # a fold alone is no account
                add_trial(rows[one.name], result)
        if len(plans) > 1:  # an agent of its own
            whole = {"run": f"{run}/{name}".rstrip("/"), "seed": " ".join(map(str, SEEDS))}
            whole["validation_bp_day"] = validations[name]
            add_trial(rows[plans[0].name()] | whole, accounts[name])
    folds = len({plan.fold for plan in groups[best]})
    what = [f"ensemble of {len(SEEDS)} seeds"] * (len(SEEDS) > 1) + [f"{folds} folds"] * (folds > 1)
    changed = json.loads(rows[groups[best][0].name()]["changed"])
    changed = {name: value for name, value in changed.items() if name not in ("SEED", "FOLD", "SCALE")}
    headline = {f"agent ({', '.join(what) or 'best'})": accounts[best]}
    report(
        setups[best], DATA_DIR / "reports" / run, headline, "test", "out of sample", DATA_DIR / "runs", best,
        run=run, scale=SCALE, seeds=SEEDS, constants=changed, abstains=best not in found, runs=results,
        ensembles=accounts if len(SEEDS) > 1 else {}, best=best,
    )  # fmt: skip
    return writer.exit_code()


def main(argv: list[str] | None = None) -> int:
    script = sys.modules[__name__]
    defaults = dict(vars(script))
    flags = getData.set_constants(script, argv, _JOBS)
    device = feature_reducer.pick_device(DEVICE)
    amp = feature_reducer.amp_enabled(AMP, device)
    if JOB == "train":  # a checkpoint has its own scale
        getData.assign_constants(script, feature_reducer.apply_scale(SCALE, device, SMALL, flags))
    if "SEED" in flags:
        if "SEEDS" in flags:
            raise UsageError("--seed 1 is short for --seeds 1: give one of them")
        getData.assign_constants(script, {"SEEDS": (SEED,)})
    elif SEED == getData.SEED:
        getData.assign_constants(script, {"SEED": SEEDS[0]})
    check_constants()
    check_hold(flags.keys())
    if JOB == "paper":
        refuse_unused(flags)
    if JOB != "train":
        feature_reducer.refuse_many(JOB)
        jobs = {"evaluate": report_checkpoint, "signal": print_signal, "paper": keep_paper_account}
        return report_paper_account() if JOB == "paper" and REPORT else jobs[JOB](device, amp)
    defaults |= SMALL if SCALE == "small" else {}
    changed = {name: value for name, value in flags.items() if value != defaults[name]}
    name = feature_reducer.from_first(RUN or (newest_run() if RESUME else new_run_name()))
    with feature_reducer.training_folder(DATA_DIR, run_folder(name), getData.SEED):
        if several():
            return train_several(device, amp, flags, name)
        return train_run(device, amp, flags, changed, name)


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    feature_reducer.run_training(main)
