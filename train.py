"""Train a portfolio agent and the encoder of its features together: PPO on top of a learned feature reducer.

reads   data/features/*.parquet                      (getData.py; without data: a synthetic market)
        data/checkpoints/feature_reducer.pt          (feature_reducer.py; without it: a random encoder)
writes  data/checkpoints/<run>/{pretrained,best,final,refit}.pt  (policy, reducer; links for the newest run)
        data/checkpoints/<run>/last.pt               (everything that --resume needs)
        data/runs/<run>/                             (metrics.csv, TensorBoard)
        data/reports/<run>/       (report.html, metrics.json, series.parquet, trades.csv: the test split;
                                  importance.csv: the validation split)
        data/power/<run>/<strength>-<seed>/, data/reports/<run>-power/     (--job power)
        data/paper/<run>.sqlite, data/paper/<run>/   (--job paper: its decisions, and the bars it looked at)

    python train.py                    train (scale "full" on a CUDA GPU, "small" otherwise)
    python train.py --resume           go on where the last run stopped
    python train.py --refit            and then train the best agent once more, on all bars
    python train.py --seeds 0,1,2      three trainings, and the mean of their logits as the agent
    python train.py --grid "HOLD=4,12 POLICY_RATE=1e-3,3e-4"    each combination; validation chooses
    python train.py --search "HOLD=12|48|288, POLICY_RATE=1e-4..1e-2 log"    draws; a third goes on, twice
    python train.py --job power        what would have been found: planted drifts, RUN's constants
    python train.py --job evaluate     report on a checkpoint, on these or on other bars
    python train.py --job importance   what best.pt owes to each channel, timeframe and coin
    python train.py --job signal       print the weights that best.pt wants at the newest complete bar
    python train.py --job paper        follow best.pt on an exchange's new bars, without sending any order
    python train.py --job paper --report    page of that account so far
    python train.py --job trials       all trainings on one page, validation beside test

Letters in shape comments: T bars, N coins, A = N + 1 assets (cash first), E environments, S steps,
B minibatch, D window values, L latent, W token width. Rewards are log returns per decision, costs are
fractions per side.

Exit codes: 0 done; 1 a mistake, in one line; 2 wrong flag or constant; 3 another training is at work on the
run, or another job keeps the paper account, or that is new and the exchange is away; 5 a checkpoint could not
be written; 130, 143, 129 stopped by Ctrl-C, SIGTERM, a closed terminal, and saved (a second ends at once).
"""

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
import threading
import time
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from enum import IntEnum
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, NoReturn, NotRequired

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from pydantic import Field, StrictBool, StrictFloat, StrictStr, TypeAdapter, ValidationError
from torch import Tensor, nn
from typing_extensions import TypedDict

import feature_reducer
import getData
import portfolio_env
from feature_reducer import EncoderCheckpoint, FeatureReducer, FeatureWindows, ReducerCheckpoint
from getData import Count, Fraction, NonNegative, Positive, Scaled, Seed, Share, UsageError, UserError, Whole
from portfolio_env import REFITTED, Backtest, RunResult, bp_per_day, decides_every, weights_from_logits

# What the brackets mean stands in getData.py
# Job and files [all; free]
JOB: Literal["train", "power", "evaluate", "importance", "signal", "paper", "trials"] = "train"
DATA_DIR: Path = getData.DATA_DIR  # holds everything that the scripts read and write; set in getData.py
DEVICE: str = feature_reducer.DEVICE  # auto | cpu | cuda | cuda:1 ...; set in feature_reducer.py

# Name [train power paper; free]
RUN: str = ""  # name of the run's folders; empty: scale and time, with RESUME the run that saved last

# Resume, save, test, launch [train; free]
RESUME: bool = False  # go on from last.pt
SAVE_MINUTES: NonNegative = feature_reducer.SAVE_MINUTES  # of last.pt; set in feature_reducer.py
TEST: bool = True  # evaluate best and final on the test split at the end
REFIT: bool = False  # afterwards train as far as best.pt came on all bars, test included, as refit.pt
STOP_AT: Annotated[Share, Field(gt=0)] = 1.0  # share of a run's work, after which it waits for a resume

# Several runs (seeds, folds, combinations of a grid), each in a process of its own [train power; free]
ENGINE: Literal["local", "ray"] = "local"  # local: one after another; ray: on the cluster at RAY_ADDRESS

# What several runs have in common [train power; common]
GRID: str = ""  # constants to vary: "HOLD=4,12 POLICY_RATE=1e-3,3e-4 TRUNK=320x160,768x384"
SEARCH: str = ""  # constants to draw: "POLICY_RATE=1e-4..1e-2 log, HOLD=12|48|288, MASK=0..0.5"
TRIALS: Count = 30  # draws of SEARCH; the third of them that validates best goes on, and a third of that
SEEDS: Annotated[tuple[Seed, ...], getData.Alias("--seed")] = (getData.SEED,)  # several: an ensemble
WALK_FORWARD: Whole = 0  # folds, each trained and tested on later bars; 0: the splits of the features
FOLD: Whole = 0  # the only one of WALK_FORWARD to train, from 1 on; 0: all
SCALE: Literal["auto", "full", "small"] = feature_reducer.SCALE  # auto: full on a GPU; see feature_reducer.py

# Power: would it have been found? With one seed by default, this one and the next two [power; free]
STRENGTHS: tuple[Annotated[getData.Strength, Field(gt=0)], ...] = (0.1, 0.15, 0.2, 0.3)  # planted, as --plant

# Other jobs than training [evaluate importance signal paper; free]
CHECKPOINT: str = "best.pt"  # the agent: a file in DATA_DIR/checkpoints, a folder of seeds, or a path

# Evaluation [evaluate; free]
EVALUATE_SPLIT: Literal["train", "validation", "test", "all"] = "test"

# Signal [signal; free]
HOLDINGS: tuple[NonNegative, ...] = (1.0,)  # weights held now, cash first; missing ones are 0
MAX_AGE: Count = 600  # seconds since the newest bar closed; no signal for older bars

# Paper account [paper; free]
EXCHANGE: str = getData.EXCHANGE  # whose new bars are decided on; no order is ever sent; set in getData.py
BASE_URL: getData.WebAddress = getData.BASE_URL  # set in getData.py
POLL: Positive = 20.0  # seconds between two looks at the exchange's clock
MAX_LATE: Annotated[Positive, Field(lt=300)] = 60.0  # seconds after a bar's close; then it is no decision
CALL: str = ""  # program that gets each decision as JSON on its standard input, as "python broker.py"
CALL_TIMEOUT: Positive = 60.0  # seconds until that program is stopped
REPORT: bool = False  # write the page of the account as it stands, and end

# Costs [train power evaluate importance paper; common]
FEE_RATE: Fraction = portfolio_env.FEE_RATE  # per side; set in portfolio_env.py
SLIPPAGE_RATE: Fraction = portfolio_env.SLIPPAGE_RATE  # per side, on top; set in portfolio_env.py
DELISTING_LOSS: Fraction = portfolio_env.DELISTING_LOSS  # of the last close; set in portfolio_env.py

# Fills [train power evaluate importance; common]
FILL: Literal["next_open", "close"] = portfolio_env.FILL  # close is optimistic; set in portfolio_env.py

# Limits of what the account trades into [train power evaluate importance paper signal; common]
MAX_WEIGHT: Share = portfolio_env.MAX_WEIGHT  # of a coin; 1: off; set in portfolio_env.py
MIN_CASH: Fraction = portfolio_env.MIN_CASH  # weight of cash; 0: off; set in portfolio_env.py
NO_TRADE_BAND: Fraction = portfolio_env.NO_TRADE_BAND  # no order for less; 0: off; set in portfolio_env.py

# Decisions [train power]
HOLD: Whole = 0  # bars from one decision to the next, everywhere; 0: that of HOLDS which validates best
HOLDS: tuple[Count, ...] = (12, 48, 288, 864, 2_016)  # an hour to a week: each is pretrained a little
REWARD: Literal["excess", "growth"] = "excess"  # excess: over the equal-weight benchmark

# Model (the reducer's sizes apply only without a feature_reducer.pt, which has its own) [train power]
REDUCER: Literal["checkpoint", "random"] = "checkpoint"  # checkpoint: feature_reducer.pt where it exists
WINDOW_BARS: tuple[Count, ...] = feature_reducer.WINDOW_BARS  # of each timeframe; set in feature_reducer.py
HIDDEN_DIM: Count = feature_reducer.HIDDEN_DIM  # set in feature_reducer.py
LATENT_DIM: Count = feature_reducer.LATENT_DIM  # set in feature_reducer.py
TRUNK: tuple[Count, Count] = Scaled((768, 384), small=(320, 160))  # layers from latent to tokens
TOKEN_WIDTH: Count = Scaled(192, small=32)
HEADS: Count = Scaled(12, small=4)
BLOCKS: Count = Scaled(8, small=2)
TIE_COINS: bool = feature_reducer.TIE_COINS  # set in feature_reducer.py
LOG_STD: Annotated[getData.Number, Field(ge=-10, le=3)] = -0.5  # initial, of the logits, in rollouts

# Both phases of training [train power]
MASK: Fraction = 0.3  # share of a window's coins x timeframes to hide, against fitting noise

# Pretraining through the accounting [train power]
PRETRAIN_EPOCHS: Whole = 10  # 0: off
PRETRAIN_STEPS: Count = Scaled(100, small=20)  # optimizer steps per epoch
PRETRAIN_SEGMENTS: Count = Scaled(16, small=48)  # per optimizer step
SWEEPS: Literal["auto"] | Whole = "auto"  # all decisions at once, so many times; 0: in turn; auto: 3 on a GPU
PRETRAIN_NOISE: NonNegative = 1.0  # standard deviations, on each value of a window, against fitting noise
PRETRAIN_POLICY_RATE: Positive = Scaled(0.0003, small=0.0005)  # Adam; both rates fall to a tenth: a cosine
PRETRAIN_ENCODER_RATE: tuple[Positive, Positive] = Scaled((5e-5, 1e-4), small=(1e-4, 4e-4))  # trained, random

# Online training [train power]
BATCHES: Whole = Scaled(5_000, small=10)
NUM_ENVS: Count = Scaled(8, small=16)  # segments of the market
REPLICAS: Count = 8  # portfolios per segment; the mean advantage of the others is each one's baseline
STEPS: Count = 128  # per environment and batch
UPDATE_EPOCHS: Count = 1  # passes over a batch; encoding costs the most, and new windows teach more
MINIBATCH: Count = Scaled(256, small=512)  # windows
GAMMA: tuple[Share, Share] = (0.5, 0.9)  # discount per decision, first to last batch; a short one: less noise
CLIP: Positive = 0.2
POLICY_SHARE: NonNegative = 0.7  # of the encoder's loss
RECONSTRUCTION_SHARE: NonNegative = 0.3  # of the encoder's loss
POLICY_RATE: Positive = Scaled(0.0005, small=0.001)  # Adam; both rates fall to a tenth along a cosine
ENCODER_RATE: Positive = Scaled(0.00005, small=0.0008)
TRAIN_ENCODER: bool = True  # False: the encoder stays as it starts
TARGET_KL: NonNegative = 0.7  # of an update, to which both rates are fitted; over 1.5 x it stops; 0: off
EPSILON: tuple[Fraction, Fraction] = (0.075, 0.02)  # share of random steps, first to last batch
PATIENCE: Count = 100  # batches without a better rolling reward, after which both learning rates are halved
VALIDATE_EVERY: Whole = Scaled(100, small=5)  # batches; 0: at the end

# Precision [all; common]
AMP: Literal["auto", "on", "off"] = feature_reducer.AMP  # float16 mixed precision; set in feature_reducer.py

_SEVERAL = "several.json"  # constants of several runs, in the folder of their checkpoints
_RUNGS = 1 / 9, 1 / 3  # shares of a run's work, after which a search chooses who goes on
_RANKS = "search.json"  # validations of the combinations at each rung, in the same folder
_CONFIDENCE = 0.95  # with which the best validation is no chance, or best.pt keeps equal weights
_CRITIC_WEIGHT = 0.5
_ENCODE_BATCH = 512  # windows per forward pass where no gradient is needed
_ENTROPY_WEIGHT = 0.01
_MAX_NORM = 1.0  # gradient clipping, policy and reducer each
_GAE_LAMBDA = 0.95
_LEAST_COINS = 3  # that tied weights see in a step of training, chosen at random
_PRETRAIN_DECISIONS = 32  # per segment
_PRETRAIN_PATIENCE = 4  # epochs without a better validation, after which pretraining ends
_PROBE_EPOCHS = 1, 3  # of pretraining, after which the better half of HOLDS goes on
_UNSETTLED = 0.02  # change of a weight in the last of SWEEPS, above which the next epoch takes one more
_ROLLING = 50  # batches in the rolling reward
_REWARD_SCALE = 0.17  # keeps returns under 1: the gradient's norm is clipped with the critic's in it
_FIRST_STEP = 1 / 16  # of the online rates: those of a well pretrained agent are too large
_STEP_FACTOR = 1.5  # of the online rates, from one batch to the next
_ROLLOUT_SWEEPS = 10  # where SWEEPS are taken: rewards agree to 1e-4 with those of one after another
_SEGMENT = 96  # decisions, of an evaluation's segments that run side by side
_ROUNDS = 4  # of the segments, before what has not settled is decided one after another
_IMPORTANCE_DECISIONS = 720  # the last ones, that the report of a training looks at; the job: at all
_IMPORTANCE_BATCH = 64  # windows, each encoded twice for each part of it that is exchanged

Presence = Tensor | None  # which coins are there [..., N]; None: all of them


# ----------------------------------------------------------------------------------------------------- policy


def scale_gradient(x: Tensor, scale: float) -> Tensor:
    """Return x itself, whose gradient is multiplied by `scale` on the way back."""
    return x.detach().lerp(x, scale)


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


class ActorCritic(nn.Module):
    """Policy and value from the latent and the weights held now; attention runs over the assets.

    Two layers of the widths `trunk` lead from the latent to the tokens, a transformer to actor and critic.
    `tied`: with one set of weights for all coins the market's block becomes the cash token, and the agent is
    equivariant: permuting the coins of the latent and of the weights held permutes the logits, however many
    coins there are. `latent_dim` and `trunk` are then the widths in all at A - 1 coins.
    """

    def __init__(
        self, latent_dim: int, assets: int, trunk: tuple[int, int] = (768, 384), width: int = 192,
        heads: int = 12, feed_forward: int = 768, blocks: int = 8, action_scale: float = 3.0,
        log_std: float = -2.0, tied: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.width, self.action_scale, self.tied = width, action_scale, tied
        self.shape = PolicyShape(
            assets=assets, trunk=list(trunk), width=width, heads=heads, feed_forward=feed_forward,
            blocks=blocks, action_scale=action_scale, tied=tied,
        )  # fmt: skip
        widths = latent_dim, *trunk
        if tied:
            norm, layer = nn.Identity(), feature_reducer.EquivariantLinear
            sizes = [*(feature_reducer.blocks_of(wide, assets - 1) for wide in widths), (width, width)]
        else:
            norm, layer, sizes = nn.LayerNorm(latent_dim), nn.Linear, [*widths, assets * width]
        layers = [layer(*pair) for pair in pairwise(sizes)]
        self.trunk = feature_reducer.Layers(norm, layers[0], nn.GELU(), layers[1], nn.GELU(), layers[2])
        # tied: the bias of the last layer is one
        self.asset_embedding = None if tied else nn.Parameter(0.02 * torch.randn(assets, width))
        self.weight_embedding = nn.Linear(1, width)
        block = partial(nn.TransformerEncoderLayer, width, heads, feed_forward, dropout=0.0, batch_first=True)
        self.blocks = nn.ModuleList(block(activation="gelu", norm_first=True) for _ in range(blocks))
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

    def market_tokens(self, latent: Tensor, present: Presence = None) -> Tensor:
        """Return tokens [..., A, W] of latents [..., L]; they do not depend on the weights held."""
        if self.tied:  # without weights, which would have one width
            latent = layer_norm(latent, present, self.trunk[1].inputs[1])
        tokens = self.trunk(latent, present).unflatten(-1, (-1, self.width))
        # tied: the market's block, which comes last, is the cash token
        return tokens.roll(1, -2) if self.tied else tokens + self.asset_embedding

    def forward(self, tokens: Tensor, weights: Tensor, present: Presence = None) -> tuple[Tensor, Tensor]:
        """Return mean logits [B, N] (cash is at 0) and values [B] of tokens [B, A, W], weights [B, A].

        Coins that are not `present` [..., N] are not seen, and their logits mean nothing. All is in float32:
        over so few tokens casts to float16 would cost more than they save. The critic trains its head alone:
        it can predict little of a market's returns, and its errors drown the actor in layers that both share.
        """
        with torch.autocast(tokens.device.type, enabled=False):
            hidden = tokens.float() + self.weight_embedding(weights.unsqueeze(-1))  # [B, A, W]
            absent = None if present is None else F.pad(~present.flatten(0, -2), (1, 0))  # cash is there
            for block in self.blocks:
                hidden = block(hidden, src_key_padding_mask=absent)
            hidden = self.norm(hidden)
            scores = self.actor(hidden).squeeze(-1)  # [B, A]
            mean = self.action_scale * (scores[:, 1:] - scores[:, :1])
            pooled = hidden.mean(1) if absent is None else feature_reducer.mean_present(hidden, ~absent)
            return mean, self.critic(pooled.detach()).squeeze(-1)


def layer_norm(latent: Tensor, present: Presence, market: int) -> Tensor:
    """Normalise latents [..., L] over the blocks of coins `present` [..., N] and `market`; others stay 0."""
    if present is None:
        return F.layer_norm(latent, latent.shape[-1:])
    coin = (latent.shape[-1] - market) // present.shape[-1]
    there = F.pad(present.repeat_interleave(coin, -1), (0, market), value=True)  # [..., L]
    count = there.sum(-1, keepdim=True)
    centred = (latent - latent.sum(-1, keepdim=True, dtype=torch.float32) / count) * there
    return centred / (centred.square().sum(-1, keepdim=True) / count + 1e-5).sqrt()


class Ensemble(nn.Module):
    """Several agents of one shape as one, whose logits are the mean of theirs: policy and reducer in one."""

    def __init__(self, agents: Sequence[tuple[ActorCritic, FeatureReducer]]) -> None:
        super().__init__()
        self.policies, self.reducers = (nn.ModuleList(part) for part in zip(*agents, strict=True))

    @property
    def abstains(self) -> bool:
        """Whether all members do."""
        return all(policy.abstains for policy in self.policies)

    def _each(self, modules: Sequence[Callable], joined: Tensor, *others: Presence) -> list:
        parts = joined.chunk(len(self.policies), -1)
        return [module(part, *others) for module, part in zip(modules, parts, strict=True)]

    def encoder(self, windows: Tensor, present: Presence = None) -> Tensor:
        """Return the latents [B, K * L] of windows [B, D]."""
        return torch.cat([reducer.encoder(windows, present) for reducer in self.reducers], -1)

    def decoder(self, latent: Tensor, present: Presence = None) -> Tensor:
        """Return the mean of the members' reconstructions [B, D]."""
        return torch.stack(self._each([one.decoder for one in self.reducers], latent, present)).mean(0)

    def market_tokens(self, latent: Tensor, present: Presence = None) -> Tensor:
        """Return tokens [..., A, K * W] of latents [..., K * L]."""
        return torch.cat(self._each([policy.market_tokens for policy in self.policies], latent, present), -1)

    def forward(self, tokens: Tensor, weights: Tensor, present: Presence = None) -> tuple[Tensor, Tensor]:
        """Return the members' mean logits [B, N] and values [B] of tokens [B, A, K * W], weights [B, A]."""
        outputs = self._each(self.policies, tokens, weights, present)
        return tuple(torch.stack(part).mean(0) for part in zip(*outputs, strict=True))


def gaussian_log_prob(x: Tensor, mean: Tensor, log_std: Tensor, present: Presence = None) -> Tensor:
    """Return the log density [...] of independent Gaussians at x [..., N], of the coins that are `present`.

    A Gaussian on logits followed by a softmax is logistic-normal (Aitchison & Shen 1980); the softmax's
    Jacobian cancels in every ratio.
    """
    density = -0.5 * ((x - mean) / log_std.exp()).square() - log_std - 0.5 * math.log(2 * math.pi)
    return (density if present is None else density.where(present, 0.0)).sum(-1)


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
    permutation: Tensor  # coin in each slot of what the policy sees [S, E, N], also of weights and logits
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


# what random numbers are drawn for, each with generators of its own
Stream = IntEnum("Stream", ["PRETRAINING", "ROLLOUT", "MINIBATCHES", "NOISE", "IMPORTANCE"])


def generator_for(*key: int, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a generator that depends on the key alone (seed, `Stream`, step), as a resumed run needs it."""
    return torch.Generator(device).manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))


def random_weights(count: int, assets: int, generator: torch.Generator) -> Tensor:
    """Draw weights [E, A]: half of them all in one random asset, half uniform on the simplex; float64."""
    spread = -torch.rand(count, assets, generator=generator, dtype=torch.float64).clamp(min=1e-12).log()
    single = F.one_hot(torch.randint(assets, (count,), generator=generator), assets).double()
    pick = torch.rand(count, 1, generator=generator) < 0.5
    return torch.where(pick, single, spread / spread.sum(1, keepdim=True))


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


def segment_rows(starts: Tensor, steps: int, hold_bars: int) -> Tensor:
    """Return the rows [(S + 1) * E] of the states of segments from `starts` [E] on, step by step."""
    return (starts + hold_bars * torch.arange(steps + 1, device=starts.device).unsqueeze(1)).flatten()


class Permutation:
    """Converts weights between the environment's coins [E, A] and the slots of the policy [E, K + 1].

    The policy may see fewer coins than there are; it holds nothing of the others.
    """

    def __init__(self, coins: Tensor, assets: int) -> None:
        self.coins, self._assets = coins, assets  # in each slot [E, K]
        self._slots = torch.cat([torch.zeros_like(coins[:, :1]), coins + 1], 1)  # cash first

    def to_slots(self, weights: Tensor) -> Tensor:
        return weights.gather(-1, self._slots.expand(*weights.shape[:-1], -1))

    def to_env(self, weights: Tensor) -> Tensor:
        zeros = weights.new_zeros(*weights.shape[:-1], self._assets)
        return zeros.scatter(-1, self._slots.expand_as(weights), weights)


@dataclass(frozen=True, kw_only=True)
class Data:
    """Features and prices, on the device."""

    device: torch.device
    amp: bool
    footer: dict
    windows: FeatureWindows
    prices: tuple[np.ndarray, np.ndarray]  # open, close [T, N]
    listed: np.ndarray | None = None  # where a coin has a price [T, N]
    train_rows: Tensor  # decision rows of the training split [R]
    spans: dict[str, tuple[int, int]]  # split -> first decision row and the one after the last

    def present(self) -> np.ndarray | None:
        """Return which coins are there at each decision [T, N]; None: all of them always."""
        return None if self.windows.present is None else self.windows.present.cpu().numpy()

    def autocast(self) -> torch.autocast:
        """Return the context of half precision, where this run has it on."""
        return feature_reducer.half_precision(self.device, self.amp)


@dataclass(frozen=True, kw_only=True)
class Setup(Data):
    """What an agent works on, and its modules."""

    env: portfolio_env.VectorPortfolioEnv  # knows the cost and the bars between decisions
    return_scale: float  # 1 / standard deviation of a return from one decision to the next
    policy: ActorCritic | Ensemble
    reducer: FeatureReducer | Ensemble

    def modules(self) -> dict[str, nn.Module]:
        """Return the modules by the names that messages use."""
        return {"policy": self.policy, "reducer": self.reducer}


class Draws(NamedTuple):
    """What is random in a rollout of K replicas of G segments, drawn before it begins."""

    starts: Tensor  # decision rows [G]
    weights: Tensor  # held at the start [G, A], float64
    permutation: Permutation  # [G, N]
    masked: Tensor  # coins and timeframes hidden in each window [S + 1, G, N, F]
    noise: Tensor  # of the actions, as `draw_noise` gives it [S, G, K, N]
    explores: Tensor  # [S, G]


@torch.no_grad()
def encode(
    policy: ActorCritic, reducer: FeatureReducer, windows: FeatureWindows, rows: Tensor, chunk: int,
    permutation: Tensor | None = None, masked: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Return the market tokens [R, A, W] of many decisions in a few large passes of `chunk` windows."""
    tokens = []
    for part in torch.arange(len(rows), device=rows.device).split(chunk):
        which = rows[part], None if permutation is None else permutation[part]
        inputs, there = windows(*which), windows.there(*which)
        if masked is not None:
            mask_windows(inputs, masked[part], windows)
        tokens.append(policy.market_tokens(reducer.encoder(inputs, there), there))
    return torch.cat(tokens)


class Decisions(NamedTuple):
    """S decisions of E portfolios; weights and logits are in the policy's slots."""

    weights: Tensor  # held when deciding, and after the last one [S + 1, E, K + 1]
    mean: Tensor  # logits that the policy wants [S, E, K]
    value: Tensor  # [S + 1, E]
    logits: Tensor  # taken [S, E, K]
    target: Tensor  # of the environment [S, E, A]


def decide_segment(
    setup: Setup, tokens: Tensor, starts: Tensor, weights: Tensor, permutation: Permutation, sweeps: int,
    act: Callable[[Tensor, slice], Tensor] = lambda mean, _: mean,
) -> tuple[Decisions, portfolio_env.Outcomes, Tensor]:  # fmt: skip
    """Take S decisions from rows `starts` [E] and `weights` [E, A] on, with market tokens [S + 1, ..., A, W].

    They depend on each other through the weights held alone, less and less. So they are taken in turn, or all
    at once, `sweeps` times, from the weights that the sweep before led to (Picard iteration; exact after S +
    1). The account is exact for the targets either way. Returns also how far the weights decided on are from
    those held then, at most. `act` gives the logits of some decisions, from the policy's and which they are.
    """
    env, steps = setup.env, len(tokens) - 1
    states = segment_rows(starts, steps, env.hold_bars).view(steps + 1, -1)

    def present(rows: Tensor) -> Presence:
        return setup.windows.there(rows, permutation.coins.expand(len(rows), -1, -1))

    held = first = permutation.to_slots(weights).unsqueeze(0)
    if sweeps:  # a guess that does not depend on the start: what stays of it is what the agent remembers
        held = torch.cat([first, torch.full_like(first, 1 / first.shape[-1]).expand(steps, -1, -1)])
    parts: list[Decisions] = []
    for number in range(sweeps or steps + 1):
        which = slice(None) if sweeps else slice(number, number + 1)
        at = states[:-1][which]  # none at the end of the segment
        seen = tokens[which].flatten(0, -3), held.float().flatten(0, 1), present(states[which])
        mean, value = setup.policy(*seen)
        mean, value = (part.unflatten(0, (-1, len(starts))) for part in (mean, value))
        logits = act(mean[: len(at)], which)
        target = permutation.to_env(weights_from_logits(logits.double(), present(at)))
        if env.limits != portfolio_env.NO_LIMITS:  # in turn, from what is held
            orders, now = [], permutation.to_env(held[0])
            for row, asked in zip(at, target, strict=True):
                orders.append(env.within_limits(row, now, asked))
                now = env.seen(row, orders[-1])
            target = torch.stack(orders) if orders else target
        parts = [*parts[: number * (not sweeps)], Decisions(held, mean[: len(at)], value, logits, target)]
        held = permutation.to_slots(env.seen(at, target))
        held = torch.cat([first, held]) if sweeps else held
    taken = Decisions(*map(torch.cat, zip(*parts, strict=True)))
    unsettled = (held - taken.weights).abs().max() if sweeps else first.new_zeros(())
    return taken, env.outcomes(starts, weights, taken.target), unsettled.detach()


@torch.no_grad()
def collect_rollout(setup: Setup, tokens: Tensor, draws: Draws, gamma: float, sweeps: int = 0) -> Rollout:
    """Step K replicas of G segments S times, with the market tokens [S + 1, G, A, W] of their windows."""
    steps, _, replicas, _ = draws.noise.shape
    parts = draws.starts, draws.weights, draws.permutation.coins
    starts, weights, coins = (part.repeat_interleave(replicas, 0) for part in parts)
    permutation, noise = Permutation(coins, setup.env.assets), draws.noise.flatten(1, 2)  # [S, E, N]
    explores, masked = (part.repeat_interleave(replicas, 1) for part in (draws.explores, draws.masked))
    log_std = setup.policy.log_std.float()

    def act(mean: Tensor, steps: slice) -> Tensor:
        own = mean + log_std.exp() * noise[steps]
        return torch.where(explores[steps].unsqueeze(-1), noise[steps], own)

    tokens = tokens.unsqueeze(2).expand(-1, -1, replicas, -1, -1)
    taken, outcomes, _ = decide_segment(setup, tokens, starts, weights, permutation, sweeps, act)
    if not torch.isfinite(outcomes.reward).all():
        raise portfolio_env.WrongWeights("the agent's decisions are not finite")
    rewards = (_REWARD_SCALE * setup.return_scale * outcomes.reward).float()
    over = torch.zeros_like(outcomes.terminated)  # truncated: the end, which nothing follows
    values, next_values = taken.value[:-1], taken.value[1:]
    gae = compute_gae(rewards, values, next_values, outcomes.terminated, over, gamma, _GAE_LAMBDA)
    advantage = minus_others(*(part.unflatten(1, (-1, replicas)) for part in (gae, outcomes.alive)))
    rows = segment_rows(starts, steps - 1, setup.env.hold_bars).view(steps, -1)
    coins = coins.expand(steps, -1, -1)
    density = taken.logits, taken.mean, log_std, setup.windows.there(rows, coins)
    return Rollout(
        rows=rows, masked=masked[:-1], permutation=coins, weights=taken.weights[:-1].float(),
        logits=taken.logits, explores=explores, log_prob=gaussian_log_prob(*density), value=values,
        returns=values + gae, advantage=advantage.flatten(1, 2), alive=outcomes.alive,
        reward=outcomes.reward, portfolio=outcomes.value, benchmark=outcomes.benchmark_value,
    )  # fmt: skip


def minus_others(advantage: Tensor, alive: Tensor) -> Tensor:
    """Return advantages [..., K] less the mean of the others that are alive; 0 for those that are not.

    The replicas of a segment meet the same market, and no action moves it. So the mean of the others is a
    baseline that knows the market's future but not the replica's own action, and changes no expected
    gradient (leave-one-out over an input-dependent baseline: Mao et al. 2019, arXiv:1807.02264, section 4).
    Which steps explore, and the actions there, are part of that common input; they depend on no weight.
    """
    counted = torch.where(alive, advantage, 0.0)
    others = alive.sum(-1, keepdim=True) - alive.int()
    baseline = (counted.sum(-1, keepdim=True) - counted) / others.clamp(min=1)
    return torch.where(alive, advantage - baseline, 0.0)


def flatten_rollout(rollout: Rollout, replicas: int) -> Rollout:
    """Return the transitions of each window [S * G, K, ...], without those after the ruin of all replicas."""
    windows = [part.unflatten(1, (-1, replicas)).flatten(0, 1) for part in rollout]
    used = Rollout(*windows).alive.any(1).nonzero().squeeze(1)
    return Rollout(*(part[used] for part in windows))


def ppo_losses(
    mean: Tensor, value: Tensor, log_std: Tensor, minibatch: Rollout, clip: float, present: Presence = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the policy loss (clipped PPO, Schulman et al. 2017, eq. 7, 9) of a minibatch, and its parts.

    A step is random with probability epsilon, whatever the weights are: given that it is, the density of its
    action does not depend on them and the ratio is 1; given that it is not, the density is the Gaussian's.
    What followed a ruin has weight 0. approx_kl is the estimator (ratio - 1) - log ratio (Schulman 2020),
    never negative.
    """
    advantage, count = minibatch.advantage, minibatch.alive.sum()
    if (size := advantage.numel()) > 1:  # the standard deviation of one number is NaN
        mean_advantage = torch.where(minibatch.alive, advantage, 0.0).sum() / count
        spread = torch.where(minibatch.alive, advantage, mean_advantage).std()
        spread = spread * ((size - 1) / (count - 1)).sqrt()  # of those alive
        normalised = (advantage - mean_advantage) / (spread + 1e-8)
        advantage = torch.where(count > 1, normalised, advantage)
    weight = minibatch.alive / minibatch.alive.float().mean()  # [B, K] of mean 1
    log_ratio = gaussian_log_prob(minibatch.logits, mean, log_std, present) - minibatch.log_prob
    log_ratio = torch.where(minibatch.explores | ~minibatch.alive, 0.0, log_ratio)
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip, 1 + clip)
    actor = -(weight * torch.min(ratio * advantage, clipped * advantage)).mean()
    critic = (weight * (value - minibatch.returns).square()).mean()
    entropy = log_std.expand(mean.shape[-1]) + 0.5 * math.log(2 * math.pi * math.e)  # of a coin, in nats
    entropy = entropy.sum() if present is None else (entropy * present).sum(-1).mean()
    loss = actor + _CRITIC_WEIGHT * critic - _ENTROPY_WEIGHT * entropy
    stats = {
        "policy_loss": loss, "actor_loss": actor, "critic_loss": critic, "entropy": entropy,
        "approx_kl": (weight * (ratio - 1 - log_ratio)).mean(),
        "clip_fraction": (weight * ((ratio - 1).abs() > clip)).mean(),
        "ratio_max": ratio.max(),
    }  # fmt: skip
    return loss, {name: value.detach() for name, value in stats.items()}


def rollout_metrics(rollout: Rollout, hold_bars: int) -> dict[str, float]:
    """Return the figures of one batch, means over the environments (exploration and its fees included)."""
    alive = rollout.alive.nonzero(as_tuple=True)
    advantage, returns = rollout.advantage[alive], rollout.returns[alive]
    gae = returns - rollout.value[alive]
    path = torch.cat([torch.ones_like(rollout.portfolio[:1]), rollout.portfolio])  # [S + 1, E]
    growth = path.log().diff(dim=0)
    sharpe = growth.mean() / growth.std().clamp(min=1e-12) * math.sqrt(getData.BARS_PER_YEAR / hold_bars)
    explained = 1 - gae.var() / returns.var(), 1 - advantage.var() / gae.var()  # 0 of a constant critic
    figures = {
        "reward": rollout.reward.mean() / hold_bars,
        "portfolio_value": path[-1].mean(),
        "benchmark_value": rollout.benchmark[-1].mean(),
        "sharpe": sharpe,
        "max_drawdown": (1 - path / path.cummax(0).values).max(0).values.mean(),
        "advantage_mean": advantage.mean(),
        "advantage_std": advantage.std(),
        "explained_variance": torch.where(returns.var() > 0, explained[0], math.nan),
        "baseline_share": torch.where(gae.var() > 0, explained[1], math.nan),
    }
    return dict(zip(figures, feature_reducer.numbers_of(figures.values()), strict=True))


# ------------------------------------------------------------------------ training: a run and its checkpoints


@dataclass(kw_only=True)
class Progress(feature_reducer.TrainingProgress):
    """Where a run stands; kept in last.pt."""

    run: StrictStr
    started: StrictStr  # UTC
    hold_bars: Whole = 0  # between decisions; 0: not chosen yet
    probes: dict[str, list[StrictFloat]] = field(default_factory=dict)  # bars -> best validation, by round
    pretrain_encoder_rate: StrictFloat
    pretrain_steps: Whole = 0
    stale_epochs: Whole = 0  # of pretraining, since the best
    best_growth: StrictFloat = -math.inf  # of a validation in pretraining, bp per day
    validations: dict[str, list[list[StrictFloat]]] = field(default_factory=dict)  # bars -> `days` of each
    p_value: StrictFloat = math.nan  # of the best, that one of all these is so good by chance; NaN: few days
    pretrain_sums: dict[str, StrictFloat] = field(default_factory=dict)  # of the epoch's figures
    pretrained: StrictBool = False
    sweeps: Whole = 0  # of pretraining: SWEEPS, and those that had to be added
    batch: Whole = 0
    best_epoch: Whole = 0  # of pretraining, that pretrained.pt is of
    best_batch: Whole = 0  # that best.pt is of
    best_validation: StrictFloat = -math.inf  # bp per day over the benchmark, of the best checkpoint on disk
    best_days: list[StrictFloat] = field(default_factory=list)  # `days` of that validation
    block: StrictFloat = 1.0  # of the bootstrap, in days: the longest of all validations
    rolling: list[StrictFloat] = field(default_factory=list)  # rewards of the last batches
    best_reward: StrictFloat = -math.inf  # rolling reward
    stale: Whole = 0  # batches since then
    halvings: Whole = 0  # of what the online learning rates may be at most, at plateaus; five count
    step_size: StrictFloat = _FIRST_STEP  # share of the online learning rates that suits TARGET_KL
    seconds: StrictFloat = 0.0

    def rolling_reward(self) -> float:
        """Return the mean reward of the last batches."""
        return sum(self.rolling) / len(self.rolling)

    @property
    def above_chance(self) -> bool:
        """Whether the best validation is more than the best of so many by chance, or it cannot be told."""
        return not self.p_value > 1 - _CONFIDENCE

    def improves(self, validation: "Validation") -> bool:
        """Add a validation; return whether it is the best so far: by a lower end above 0, else by growth."""
        if not math.isfinite(validation.growth):
            return False
        self.validations.setdefault(str(self.hold_bars), []).append(validation.days)
        self.block, any_yet = max(self.block, validation.block), self.best_validation > -math.inf
        every = [validation.days, self.best_days if any_yet else validation.days]
        every += itertools.chain(*self.validations.values())
        _, p_values, low = portfolio_env.above_chance(np.transpose(every), self.block, level=_CONFIDENCE)
        new, old = (max(0.0, bound) for bound in low[:2].tolist())  # 0, too, where there is none
        better = (new, validation.growth) > (old * any_yet, self.best_validation)
        self.p_value = float(p_values[0 if better else 1])
        return better


class Validation(NamedTuple):
    """Growth over the benchmark on the validation split, and the ends of its own interval, in bp per day."""

    growth: float
    low: float  # NaN: the split is too short for an interval
    high: float
    days: list[float]  # log growth over the benchmark of each day [D]
    block: float  # of the bootstrap, in days

    def __str__(self) -> str:
        interval = f" ({self.low:+.0f} to {self.high:+.0f})" if math.isfinite(self.low) else ""
        return f"validation {self.growth:+.1f}{interval} bp/day over the benchmark"


class Agent(EncoderCheckpoint):
    """What every checkpoint of a run holds."""

    run: str
    seed: Seed
    hold_bars: Whole  # from one decision to the next; 0 in a last.pt: not chosen yet
    policy: feature_reducer.Weights
    policy_shape: PolicyShape


class Member(TypedDict):
    """What the agents of an ensemble do not have in common."""

    seed: Seed
    abstains: bool
    policy: feature_reducer.Weights
    reducer: feature_reducer.Weights


class AgentCheckpoint(Agent):
    """pretrained.pt, best.pt and final.pt; of an ensemble its first agent, and the `others`."""

    kind: Literal["train"]
    abstains: bool  # it holds equal weights, since no validation was above chance
    others: NotRequired[list[Member]]
    refit: NotRequired[StrictBool]  # is it refit.pt, which has seen the test split?


class AgentState(Agent):
    """last.pt."""

    kind: Literal["train_last"]
    optimizers: list[dict]
    scaler: dict
    progress: Progress
    fixed: dict[str, object]  # constants that must be the same in a resumed run


@dataclass(kw_only=True)
class Run(feature_reducer.Run):
    """The training of an agent under way."""

    data: Data
    policy: ActorCritic
    reducer: FeatureReducer
    flags: dict[str, object]  # with which a resume goes on, but for its name
    changed: dict[str, object]  # constants that differ from the script's, at SCALE = "full"
    counted: bool  # whether the list of trials has it
    recipe: tuple[int, int] | None = None  # epochs and batches of a refit, which validates nothing
    share: float = 1.0  # of its work, after which it waits for a resume; a probe's is whole

    def work(self) -> tuple[float, float]:
        """Return the work done, and in all, in pretraining steps; a batch counts by its windows."""
        epochs, batches = self.recipe or (PRETRAIN_EPOCHS, BATCHES)
        batch = NUM_ENVS * STEPS * (UPDATE_EPOCHS + 1 / 3)  # windows; a third: without the backward pass
        batch /= PRETRAIN_SEGMENTS * (_PRETRAIN_DECISIONS + 1)
        pretraining = epochs * PRETRAIN_STEPS
        done = pretraining if self.progress.pretrained else self.progress.pretrain_steps
        return done + self.progress.batch * batch, pretraining + batches * batch

    def waits(self) -> bool:
        """Return whether the user stops it, or it has done its share of the work, and an epoch at least."""
        done, total = self.work()
        first = PRETRAIN_STEPS * (PRETRAIN_EPOCHS > 0)  # without a validation it could not be compared
        return bool(self.stop.exit_code) or (self.share < 1 and done >= max(self.share * total, first))


def run_folder(run: str) -> Path:
    """Return the folder of a run's checkpoints."""
    return DATA_DIR / "checkpoints" / run


def agent_checkpoint(run: Run, abstains: bool = False) -> AgentCheckpoint:
    """Collect policy and reducer with all that it takes to run them elsewhere."""
    content = feature_reducer.reducer_checkpoint(run.reducer, run.data.windows, run.data.footer, SCALE)
    about = {"kind": "train", "run": run.progress.run, "seed": SEEDS[0], "hold_bars": run.progress.hold_bars}
    policy = {"policy": run.policy.state_dict(), "policy_shape": run.policy.shape, "abstains": abstains}
    return content | about | policy


def save_last(run: Run) -> None:
    """Write last.pt; a run that has one is a trial, even if it is stopped."""
    run.save_last(agent_checkpoint(run))
    if not run.counted:
        try:
            portfolio_env.append_trial(DATA_DIR / "runs" / "trials.csv", trial_of(run))
            run.counted = True
        except OSError as error:  # a full disk, which ends no training: again with the next save
            print(f"warning: trials.csv has to wait ({error}); training goes on", file=sys.stderr)


def save_best(run: Run, name: str, validation: Validation) -> None:
    """Write the best agent so far; until one is above chance, best.pt holds all assets alike."""
    content = agent_checkpoint(run, abstains=name == "best.pt" and not run.progress.above_chance)
    progress = run.progress
    if run.save_best(run.last.with_name(name), content):
        progress.best_validation, progress.best_days = validation.growth, validation.days
        progress.best_batch = progress.batch
        if not progress.pretrained:
            progress.best_epoch = progress.pretrain_steps // PRETRAIN_STEPS


def load_weights(run: Run, path: Path, form: type[Agent] = AgentCheckpoint) -> Agent:
    """Copy the weights of a checkpoint of this run into the modules; return it."""
    saved = feature_reducer.load_checkpoint(path, form)
    load_policy(run.policy, saved)
    run.reducer.load_state_dict(saved["reducer"])
    return saved


def load_policy(policy: ActorCritic, saved: Agent | Member) -> None:
    """Copy the weights of a checkpoint's policy; of one that abstains so that all its logits are 0."""
    policy.load_state_dict(saved["policy"])
    if saved.get("abstains"):
        nn.init.zeros_(policy.actor.weight)


def adapt_step(progress: Progress, approx_kl: float) -> None:
    """Fit the size of an online step to TARGET_KL, as rsl_rl does (Schwarke 2025, arXiv:2509.10771)."""
    if approx_kl > 2 * TARGET_KL:
        progress.step_size /= _STEP_FACTOR
    elif approx_kl < TARGET_KL / 2:
        progress.step_size = min(1.0, progress.step_size * _STEP_FACTOR)


def validate(setup: Setup) -> Validation:
    """Return what the agent makes on the validation split."""
    returns = portfolio_env.excess_returns(backtest_agent(setup, "validation"))
    block = portfolio_env.block_length(returns)
    interval = portfolio_env.bootstrap_interval(returns, block, level=_CONFIDENCE)
    days = [float(day.sum()) for day in np.array_split(returns, -(-len(returns) // getData.BARS_PER_DAY))]
    figures = map(bp_per_day, (float(returns.mean()), *interval))
    return Validation(*figures, days, block * len(days) / len(returns))


def on_plateau(progress: Progress, reward: float) -> bool:
    """Add a batch's reward to the rolling one; return whether that has not improved for PATIENCE batches."""
    progress.rolling = [*progress.rolling, reward][-_ROLLING:]
    progress.stale += 1
    if progress.batch + 1 >= min(_ROLLING, BATCHES) and progress.rolling_reward() > progress.best_reward:
        progress.best_reward, progress.stale = progress.rolling_reward(), 0
    elif progress.stale >= PATIENCE:
        progress.stale = 0
        return True
    return False


# ------------------------------------------------------------------------------ training: the parts of a step


def joint_loss(policy_loss: Tensor | float, reconstruction_loss: Tensor | float) -> Tensor | float:
    """Return the scalar to differentiate: policy loss + 0.3 reconstruction loss.

    With the latent passed through `scale_gradient` at 0.7 the policy gets its own full gradient and the
    encoder exactly that of 0.7 policy loss + 0.3 reconstruction loss.
    """
    return policy_loss + RECONSTRUCTION_SHARE * reconstruction_loss


def optimizer_step(
    loss: Tensor, run: Run, stats: dict[str, Tensor], limits: dict[str, float] | None = None
) -> dict[str, float]:
    """Step with both optimizers, each gradient clipped, where `stats` are in `limits`; return figures."""
    trained = (run.policy, run.reducer)[: len(run.optimizers)]  # without an optimizer the reducer stays
    options = trained, run.optimizers, run.scaler, _MAX_NORM, stats, limits
    norms, skipped, numbers = feature_reducer.clipped_step(loss, *options)
    own = dict(zip(("policy_grad_norm", "encoder_grad_norm"), [*norms, 0.0], strict=False))
    return numbers | own | {"skipped": float(skipped)}


def set_rates(
    optimizers: Sequence[torch.optim.Optimizer], first: tuple[float, ...], done: float, factor: float = 1.0
) -> tuple[float, ...]:
    """Set the rates of policy and encoder, times `factor`, after the share `done` of a phase; return them."""
    cosine = 0.1 + 0.45 * (1 + math.cos(math.pi * done))
    rates = tuple(rate * factor * cosine for rate in first)
    for optimizer, rate in zip(optimizers, rates, strict=False):
        optimizer.param_groups[0]["lr"] = rate
    return rates


def make_optimizers(policy: nn.Module, reducer: nn.Module) -> tuple[torch.optim.Optimizer, ...]:
    """Make Adam for the policy, and Adafactor for the reducer unless it is frozen."""
    reducer.requires_grad_(TRAIN_ENCODER)
    adam = torch.optim.Adam(policy.parameters(), lr=POLICY_RATE)
    return (adam, feature_reducer.make_adafactor(reducer, ENCODER_RATE)) if TRAIN_ENCODER else (adam,)


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
def stop_where_not_finite(policy: nn.Module, reducer: nn.Module, what: str) -> Iterator[None]:
    """Name the tensor that is not finite where weights are refused because of it."""
    try:
        yield
    except portfolio_env.WrongWeights as error:
        bad = feature_reducer.first_bad_tensor({"policy": policy, "reducer": reducer})
        advice = "lower the learning rates or --log-std" if JOB == "train" else "use another --checkpoint"
        raise feature_reducer.Diverged(f"{error} {what}: {bad}; {advice}") from None


def draw_segments(
    setup: Setup, count: int, steps: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Permutation, Tensor]:
    """Draw what `Draws` names first of `count` segments of the training split."""
    span, rows = steps * setup.env.hold_bars + 2, setup.train_rows  # all fills are in the split
    send = partial(Tensor.to, device=setup.device, non_blocking=True)  # behind what a GPU still works on
    if setup.windows.present is not None:
        rows, span = rows[:-span][rows[span:] - rows[:-span] == span], 0  # across no hole in the history
    starts = rows[send(torch.randint(len(rows) - span, (count,), generator=generator))]
    # A random order, so that a dense policy learns of all coins; of tied weights a random choice of coins,
    # since each is another market.
    number = setup.windows.most
    order = send(torch.rand(count, setup.windows.coins, generator=generator))
    if (there := setup.windows.there(starts)) is not None:
        order += ~there  # those that are there come first
    if setup.policy.tied:
        number = int(torch.randint(min(_LEAST_COINS, number), number + 1, (), generator=generator))
    permutation = Permutation(order.argsort(1)[:, :number], setup.env.assets)
    weights = permutation.to_env(send(random_weights(count, number + 1, generator)))
    if there is not None:
        weights = portfolio_env.project(weights, weights.shape, F.pad(there, (1, 0), value=True))
    masked = torch.rand(steps + 1, count, number, len(setup.windows.bars), generator=generator) < MASK
    return starts, weights, permutation, send(masked)


def mask_windows(inputs: Tensor, masked: Tensor, windows: FeatureWindows) -> Tensor:
    """Set the coins and timeframes `masked` [B, N, F] of windows [B, D] to 0, the mean; return them."""
    blocks = inputs.view(*masked.shape[:2], -1)  # [B, N, P]
    for position, part in enumerate(windows.slices.values()):
        blocks[..., part].masked_fill_(masked[..., position : position + 1], 0.0)
    return inputs


@cache
def noise_bank(seed: int, size: int, device: torch.device) -> Tensor:
    """Return so many values of Gaussian noise: to draw as many for each window takes a seventh of a step."""
    return torch.randn(size, generator=generator_for(seed, Stream.NOISE, device=device), device=device)


def add_noise(inputs: Tensor, segments: int, bank: Tensor, generator: torch.Generator) -> None:
    """Add noise from random places of the bank to the windows [S * E, D] of S decisions in E `segments`."""
    decisions = inputs.unflatten(0, (-1, segments))  # [E, D] at a time stay in the processor's cache
    size = decisions[0].numel()
    places = np.asarray(torch.randint(len(bank) - size, (len(decisions),), generator=generator))
    for decision, place in zip(decisions, places, strict=True):
        decision.add_(bank[place : place + size].view_as(decision), alpha=PRETRAIN_NOISE)


def segment_loss(
    setup: Setup, starts: Tensor, start_weights: Tensor, permutation: Permutation, masked: Tensor,
    noise: torch.Generator | None = None, sweeps: int = 0,
) -> tuple[Tensor, dict, dict]:  # fmt: skip
    """Compute the loss of S decisions of E segments, of windows `masked` [S + 1, E, N, F] and with `noise`.

    It is minus the segment's growth net of costs, plus the critic's error on the returns (discounted per
    decision; it trains its head alone), plus the reconstruction error of every fourth window as it was
    (unbiased, and cheaper; a masked autoencoder: He et al. 2022, arXiv:2111.06377; a denoising one: Vincent
    et al. 2010, JMLR 11). Returns also the loss's parts, and the tensors on the way that may stop being
    finite. Reads no value of the device, which would wait for a GPU.
    """
    steps = len(masked) - 1
    rows = segment_rows(starts, steps, setup.env.hold_bars)
    which = rows, permutation.coins.repeat(steps + 1, 1)
    inputs, there = setup.windows(*which), setup.windows.there(*which)  # [(S + 1) * E, D], [..., K]
    originals = inputs.unflatten(0, (steps + 1, -1))[::4].flatten(0, 1).clone()
    fourth = None if there is None else there.unflatten(0, (steps + 1, -1))[::4].flatten(0, 1)
    mask_windows(inputs, masked.flatten(0, 1), setup.windows)
    if noise:
        bank = noise_bank(SEEDS[0], max(2**22, 2 * len(starts) * setup.windows.input_dim), setup.device)
        add_noise(inputs, len(starts), bank, noise)
    with setup.autocast():
        latent = setup.reducer.encoder(inputs, there)
        fourths = latent.unflatten(0, (steps + 1, -1))[::4].flatten(0, 1)
        reconstruction = setup.reducer.decoder(fourths, fourth)
        tokens = setup.policy.market_tokens(scale_gradient(latent, POLICY_SHARE), there)
        tokens = tokens.unflatten(0, (steps + 1, -1))  # [S + 1, E, A, W]
        taken, outcomes, unsettled = decide_segment(setup, tokens, starts, start_weights, permutation, sweeps)
    rewards = setup.return_scale * outcomes.reward  # [S, E]
    returns = [taken.value[-1].detach()]
    for reward in reversed(_REWARD_SCALE * rewards.detach().float()):
        returns.append(reward + GAMMA[0] * returns[-1])
    growth = rewards.mean()
    critic = F.mse_loss(taken.value[:-1], torch.stack(returns[:0:-1]))
    error = feature_reducer.mean_square(reconstruction.float() - originals, fourth)
    objective = _CRITIC_WEIGHT * critic - steps * growth.float()
    loss = joint_loss(objective, error)
    stats = {"loss": loss, "critic_loss": critic, "reconstruction_loss": error, "unsettled": unsettled}
    stats["growth_bp_day"] = bp_per_day(growth / setup.return_scale / setup.env.hold_bars)
    tensors = {"windows": inputs, "latent": latent, "reconstruction": reconstruction}
    tensors |= {"values": taken.value, "growth": growth}
    return loss, *({name: one.detach() for name, one in part.items()} for part in (stats, tensors))


def pretrain_step(setup: Setup, run: Run, total: int) -> dict[str, float]:
    """Take the next optimizer step of a pretraining of `total`; return its figures."""
    progress, step = run.progress, run.progress.pretrain_steps
    set_rates(run.optimizers, (PRETRAIN_POLICY_RATE, progress.pretrain_encoder_rate), step / total)
    generator = generator_for(SEEDS[0], Stream.PRETRAINING, step)
    segments = draw_segments(setup, PRETRAIN_SEGMENTS, _PRETRAIN_DECISIONS, generator)
    noise = generator_for(SEEDS[0], Stream.NOISE, step) if PRETRAIN_NOISE else None
    loss, stats, tensors = segment_loss(setup, *segments, noise, progress.sweeps)
    figures = optimizer_step(loss, run, stats)
    where = f"in pretraining step {step + 1}"
    scale = run.scaler if math.isfinite(figures["growth_bp_day"]) else None  # none mends a forward pass
    feature_reducer.check_finite(figures["loss"], scale, setup.modules(), where, tensors)
    feature_reducer.count_skipped(progress, int(figures["skipped"]), 1, setup.modules(), where)
    if (step + 1) % PRETRAIN_STEPS == 0 and figures["unsettled"] > _UNSETTLED:
        progress.sweeps = min(progress.sweeps + 1, 2 * SWEEPS)  # plan_memory has room for no more
    return {name: figures[name] for name in stats}


def draw_rollout(setup: Setup, batch: int, epsilon: float) -> Draws:
    """Draw what is random in the rollout of a batch."""
    generator = generator_for(SEEDS[0], Stream.ROLLOUT, batch)
    segments = draw_segments(setup, NUM_ENVS, STEPS, generator)
    noise = draw_noise(STEPS, NUM_ENVS, REPLICAS, segments[2].coins.shape[1], epsilon, generator)
    return Draws(*segments, *(part.to(setup.device, non_blocking=True) for part in noise))


def minibatches(transitions: Rollout, batch: int) -> Iterator[Rollout]:
    """Yield all windows UPDATE_EPOCHS times, each time in a new order, a minibatch at a time."""
    for epoch in range(UPDATE_EPOCHS):
        generator = generator_for(SEEDS[0], Stream.MINIBATCHES, batch, epoch)
        permutation = torch.randperm(len(transitions.rows), generator=generator)
        for rows in permutation.to(transitions.rows.device).split(MINIBATCH):
            yield Rollout(*(part[rows] for part in transitions))


def update(setup: Setup, run: Run, rollout: Rollout) -> dict[str, float]:
    """Run PPO on one rollout; every minibatch re-encodes its windows with gradient, once for all replicas."""
    history: list[dict[str, float]] = []
    for minibatch in minibatches(flatten_rollout(rollout, REPLICAS), run.progress.batch):
        which = minibatch.rows[:, 0], minibatch.permutation[:, 0]
        originals, there = setup.windows(*which), setup.windows.there(*which)  # [B, D], [B, K]
        inputs = mask_windows(originals.clone(), minibatch.masked[:, 0], setup.windows)
        with setup.autocast():
            latent = setup.reducer.encoder(inputs, there)
            tokens = setup.policy.market_tokens(scale_gradient(latent, POLICY_SHARE), there)
            tokens = tokens.repeat_interleave(REPLICAS, 0)
            present = setup.windows.there(minibatch.rows, minibatch.permutation)  # [B, replicas, K]
            mean, value = setup.policy(tokens, minibatch.weights.flatten(0, 1), present)
        mean, value = (part.unflatten(0, (-1, REPLICAS)) for part in (mean, value))
        policy_loss, stats = ppo_losses(mean, value, setup.policy.log_std, minibatch, CLIP, present)
        with setup.autocast():
            reconstruction = setup.reducer.decoder(latent, there)
        difference = reconstruction.float() - originals
        error = feature_reducer.mean_square(difference, there)
        loss = joint_loss(policy_loss, error)
        tensors = {"windows": inputs, "latent": latent, "reconstruction": reconstruction}
        tensors |= {"mean": mean, "value": value, "policy loss": policy_loss}
        eighth = difference.detach()[::8], None if there is None else there[::8]
        accuracy = (feature_reducer.of_present(*eighth).abs() < 0.1).float().mean()  # only shown
        stats |= {"reconstruction_loss": error, "accuracy": accuracy, "loss": loss}
        most = 1.5 * TARGET_KL if TARGET_KL and history else math.inf
        stats = optimizer_step(loss, run, stats, {"approx_kl": most})
        approx_kl = stats.pop("approx_kl")
        if approx_kl > most:
            break
        where = f"in batch {run.progress.batch + 1}"
        feature_reducer.check_finite(stats.pop("loss"), run.scaler, setup.modules(), where, tensors)
        stats["encoder_loss"] = joint_loss(POLICY_SHARE * stats["policy_loss"], stats["reconstruction_loss"])
        history.append(stats)
    skipped, means = int(sum(row.pop("skipped") for row in history)), {}
    for name in history[0]:  # of the finite values: a skipped step has infinite gradients
        finite = [row[name] for row in history if math.isfinite(row[name])]
        means[name] = sum(finite) / len(finite) if finite else math.nan
    return means | {"approx_kl": approx_kl, "updates": len(history), "skipped": skipped}


# -------------------------------------------------------------------------------- training: from start to end


def find_reducer(path: Path) -> ReducerCheckpoint | None:
    """Load the checkpoint of the trained reducer; None without one, or where the encoder starts at random."""
    if REDUCER == "random" or WALK_FORWARD or not path.exists():
        reason = "REDUCER = random" if REDUCER == "random" else f"there is no {path}"
        reason = "a trained one would know later folds" if WALK_FORWARD else reason
        print(f"encoder: starts at random ({reason})")
        return None
    saved = feature_reducer.load_checkpoint(path, ReducerCheckpoint)
    own = {"SCALE": (saved["scale"], SCALE), "TIE_COINS": (bool(saved["coins"]), TIE_COINS)}
    for name, (value, here) in own.items():
        if value != here:
            advice = f"run python feature_reducer.py {getData.flag_text(name, here)}, or use --reducer random"
            raise UserError(f"{path} has {name} {value}, this run {here}: {advice}")
    return saved


def plan_memory(
    reducer: FeatureReducer, policy: ActorCritic, data: Data, used: float, choosing: bool, folder: Path
) -> None:
    """Print what a run needs, beside the bytes `used` already, and stop where memory or disk is too small."""
    pretraining = PRETRAIN_SEGMENTS * (_PRETRAIN_DECISIONS + 1) if PRETRAIN_EPOCHS else 0
    online, coins = MINIBATCH if BATCHES else 0, data.windows.coins
    needs = feature_reducer.training_memory(reducer, coins, max(online, pretraining), data.amp)
    values, hidden, _ = reducer.dims(coins)
    needs["activations"] = max(needs["activations"], 4 * _ENCODE_BATCH * (values + 2 * hidden))
    tokens, weights = (coins + 1) * TOKEN_WIDTH, sum(map(Tensor.numel, policy.parameters()))
    activations = max(online * REPLICAS, pretraining * max(1, 2 * SWEEPS)) * tokens * BLOCKS * 18  # backward
    needs["policy"] = 4 * (4 * weights + activations)
    evaluated = max(end - first for first, end in map(data.footer["splits"].get, ("validation", "test")))
    decisions = max(NUM_ENVS * (STEPS + 1), evaluated // (getData.BAR_MS * (HOLD or min(HOLDS))))
    needs["encoded decisions"] = 2 * 4 * decisions * tokens  # in parts, then joined
    needs["copy, to choose HOLD"] = needs["parameters"] * choosing
    advice = "use --scale small, or lower --minibatch, --replicas and --pretrain-segments"
    probes = [f"hold-{hold}/{name}" for hold in HOLDS for name in ("last.pt", "pretrained.pt")] * choosing
    files = dict.fromkeys(["pretrained.pt", "best.pt", "final.pt", "last.pt", *probes], needs["parameters"])
    feature_reducer.check_room(needs, used, data.device, advice, folder, files)


def load_data(
    device: torch.device, amp: bool, data_dir: Path, saved: EncoderCheckpoint | None,
    splits: feature_reducer.Splits | None,
) -> Data:  # fmt: skip
    """Load features and prices, as windows of a checkpoint, and with `splits` in place of their own."""
    bars = saved["window_bars"] if saved else WINDOW_BARS
    windows, footer = feature_reducer.load_windows(data_dir, bars, device, saved, splits)
    table, _ = getData.load_prices(data_dir)
    rows = {name: windows.rows(split, name) for name, split in footer["splits"].items()}
    spans = {name: portfolio_env.split_rows(table.index, footer, name, FILL) for name in (*rows, "all")}
    return Data(
        device=device, amp=amp, footer=footer, windows=windows, train_rows=rows["train"], spans=spans,
        prices=portfolio_env.price_arrays(table, footer["symbols"], DELISTING_LOSS),
        listed=table[[f"{symbol}.close" for symbol in footer["symbols"]]].notna().to_numpy(),
    )  # fmt: skip


def build_setup(data: Data, policy: nn.Module, reducer: nn.Module, hold_bars: int) -> Setup:
    """Put the modules into the environment of decisions `hold_bars` apart."""
    if hold_bars + 2 > len(data.windows.times):
        raise UserError(f"too little history: HOLD {hold_bars}, and {len(data.windows.times)} bars in all")
    trading = {"cost": FEE_RATE + SLIPPAGE_RATE, "fill": FILL, "reward": REWARD, "hold_bars": hold_bars}
    trading["limits"] = portfolio_env.Limits(MAX_WEIGHT, MIN_CASH, NO_TRADE_BAND)
    prices = (torch.tensor(part, device=data.device) for part in data.prices)
    env = portfolio_env.VectorPortfolioEnv(*prices, **trading, present=data.windows.present)
    train = slice(*data.spans["train"])
    log_close = np.log(data.prices[1][train])
    returns = log_close[hold_bars:] - log_close[:-hold_bars]  # [R - h, N]
    if data.windows.present is not None:
        returns = np.ma.array(returns, mask=~data.present()[train][:-hold_bars])
    if returns.shape[1] > 1:
        returns -= returns.mean(1, keepdims=True)
    scale = float(1 / max(returns.std(), 1e-6)) if len(returns) else 1.0  # too short to train on
    return Setup(**vars(data), env=env, return_scale=scale, policy=policy, reducer=reducer)


def least_bars(hold_bars: int) -> int:
    """Return how many bars the training split needs for the longest segment that is drawn from it."""
    decisions = max(bool(BATCHES) * STEPS, bool(PRETRAIN_EPOCHS) * _PRETRAIN_DECISIONS)
    return decisions * hold_bars + 3


def longest_piece(data: Data) -> int:
    """Return how many decision rows of the training split follow each other across no hole."""
    rows = data.train_rows - torch.arange(len(data.train_rows), device=data.train_rows.device)
    return int(rows.unique_consecutive(return_counts=True)[1].max())


def first_agent(
    data: Data, saved: AgentState | None, source: EncoderCheckpoint | None, flags: dict[str, object],
    folder: Path,
) -> tuple[ActorCritic, FeatureReducer]:  # fmt: skip
    """Build policy and reducer, and check that they fit the data, memory, and the disk of `folder`."""
    footer, windows = data.footer, data.windows
    values, coins = feature_reducer.reducer_input(windows, TIE_COINS)
    dims = values, HIDDEN_DIM, LATENT_DIM
    if source and not saved:
        feature_reducer.check_market(source, footer)
    if source:
        dims, coins = source["dims"], source["coins"]
        sizes = {"WINDOW_BARS": tuple(source["window_bars"]), "HIDDEN_DIM": dims[1], "LATENT_DIM": dims[2]}
        for name, value in sizes.items() if not saved else ():
            if flags.get(name, value) != value:
                raise UserError(f"the encoder's checkpoint has {name} {value}: use that, or --reducer random")
    hold_bars = saved["hold_bars"] if saved else HOLD
    if (longest := longest_piece(data)) < (shortest := least_bars(hold_bars or min(HOLDS))):
        problem = f"too little history to train on: {longest} bars, not {shortest}"
        raise UserError(f"{problem}; collect more days, or lower HOLD or STEPS")
    shape = saved["policy_shape"] if saved else PolicyShape(
        assets=(coins or windows.coins) + 1, trunk=list(TRUNK), width=TOKEN_WIDTH, heads=HEADS,
        feed_forward=4 * TOKEN_WIDTH, blocks=BLOCKS, action_scale=3.0, tied=bool(coins),
    )  # fmt: skip
    build_policy = partial(ActorCritic, dims[2], **shape, log_std=LOG_STD)
    with torch.device("meta"):
        plan = FeatureReducer(*dims, coins), build_policy()
    used = sum(part.nbytes for part in source["reducer"].values()) if source else 0
    plan_memory(*plan, data, used, not hold_bars, folder)
    if source:
        reducer = feature_reducer.reducer_from_checkpoint(source, data.device)
    else:
        reducer = FeatureReducer(*dims, coins).to(data.device)
    policy = build_policy().to(data.device)
    if saved:
        policy.load_state_dict(saved["policy"])
    print(f"market: {footer['source']}, {len(footer['symbols'])} coins")
    print("decisions: " + ", ".join(f"{name} {end - first:,}" for name, (first, end) in data.spans.items()))
    values, hidden, latent = reducer.dims(windows.coins)
    millions = [sum(map(Tensor.numel, module.parameters())) / 1e6 for module in (reducer, policy)]
    widths = f"{values:,} -> {hidden:,} -> {latent:,} ({values / latent:.1f}x)"
    print(f"reducer: {widths}, {millions[0]:.1f} M parameters{', tied between the coins' if coins else ''}")
    shape = f"{BLOCKS} blocks, {HEADS} heads, {windows.coins + 1} actions"
    print(f"policy: {shape}, {millions[1]:.2f} M parameters")
    return policy, reducer


def read_json(path: Path, form: Any) -> Any:
    """Return what a file of several runs holds, or raise UserError where it is not of that form."""
    try:
        return TypeAdapter(form).validate_json(path.read_bytes())
    except ValidationError:
        raise UserError(f"{path} is damaged: leave --resume out, or give another --run") from None


def constants_before(run: str, flags: dict[str, object]) -> dict[str, object]:
    """Return the constants of the run to resume, or of its several runs; but for those more `--batches`."""
    last, several, before = run_folder(run) / "last.pt", run_folder(run) / _SEVERAL, {}
    if last.exists():
        before = feature_reducer.load_checkpoint(last, AgentState)["fixed"]
    elif several.exists():
        before = read_json(several, dict[str, object])
    if 0 < before.get("BATCHES", 0) < flags.get("BATCHES", 0):
        del before["BATCHES"]
    return {name: tuple(value) if isinstance(value, list) else value for name, value in before.items()}


def open_run(
    device: torch.device, amp: bool, flags: dict[str, object], changed: dict[str, object], name: str,
    recipe: tuple[int, int] | None = None,
) -> Run:  # fmt: skip
    """Start the run, or go on where its last.pt stands; with a `recipe` it is a refit on all bars."""
    last = run_folder(name) / "last.pt"
    links = None if "/" in name else DATA_DIR / "checkpoints"  # one of several runs is not the newest agent
    stop, saver = feature_reducer.StopSignal(), feature_reducer.Saver(SAVE_MINUTES, links)
    begins = not last.exists() if recipe else not RESUME
    saved = None if begins else feature_reducer.load_checkpoint(last, AgentState)
    if saved and saved["run"] != name:
        raise UserError(f"{last} is of run {saved['run']}: move it to {run_folder(saved['run'])}")
    torch.manual_seed(SEEDS[0])
    shared, splits = shared_features(name), None
    path = (shared or DATA_DIR / "checkpoints") / "feature_reducer.pt"
    source = saved or find_reducer(path)
    features = feature_reducer.run_features(DATA_DIR, last, saved, [path] * bool(source))
    with nullcontext(shared) if shared else features as data_dir:
        if recipe:
            splits = getData.load_prices(data_dir)[1]["splits"]
            splits = splits | {"train": [splits["train"][0], splits["test"][1]]}
        elif FOLD:
            splits = getData.walk_forward_splits(*getData.load_prices(data_dir), WALK_FORWARD)[FOLD - 1]
        data = load_data(device, amp, data_dir, source, splits)
        if saved:
            feature_reducer.check_bars(saved, data.footer)
        policy, reducer = first_agent(data, saved, source, flags, last.parent)
    if saved:
        progress, before = saved["progress"], saved["fixed"]["BATCHES"]
        if before != BATCHES:  # a stopped or finished run may be given more
            if progress.batch >= before:  # it has been tested already: this is another trial
                progress.started = now()
            print(f"batches: {BATCHES} instead of {before}; rates, epsilon and gamma go on as in such a run")
    else:
        files = *last.parent.glob("refit*.pt"), *last.parent.glob("refit-*/*.pt"), last.with_name(_SEVERAL)
        for old in (*files, *(DATA_DIR / "runs" / name).rglob("metrics.csv")):
            old.unlink(missing_ok=True)  # of a run, or several, of the same name
        portfolio_env.read_trial_sharpes(DATA_DIR / "runs" / "trials.csv")  # not damaged
        progress = Progress(
            run=name, started=now(), hold_bars=HOLD, pretrained=PRETRAIN_EPOCHS == 0,
            pretrain_encoder_rate=PRETRAIN_ENCODER_RATE[source is None], sweeps=SWEEPS,
            step_size=_FIRST_STEP if PRETRAIN_EPOCHS else 1.0,
        )  # fmt: skip
    run = Run(
        last=last, progress=progress, fixed=feature_reducer.fixed_constants(globals()), stop=stop,
        saver=saver, data=data, policy=policy, reducer=reducer, flags=flags, changed=changed,
        counted=bool(saved or recipe), recipe=recipe, share=1.0 if recipe else STOP_AT,
        optimizers=make_optimizers(policy, reducer), scaler=torch.amp.GradScaler(device.type, enabled=amp),
    )  # fmt: skip
    if saved:
        run.go_on(saved)
    if progress.hold_bars or not saved:  # of another of its name, or when a kill came before
        drop_probes(run)
    return run


def choose_hold(run: Run) -> None:
    """Pretrain copies of the agent with each of HOLDS; the better half goes on, and then the best.

    All start from the same weights and draw the same numbers; one that diverges loses. Each is a run in a
    folder of its own, from where a resume goes on (successive halving: Jamieson & Talwalkar 2016).
    """
    growths, folder, logs = run.progress.probes, run.last.parent, DATA_DIR / "runs" / run.progress.run
    validations = run.progress.validations  # of all probes
    rivals = [hold for hold in HOLDS if least_bars(hold) <= longest_piece(run.data)]
    if short := [hold for hold in HOLDS if hold not in rivals]:
        print(f"too little history for decisions every {', '.join(map(str, short))} bars")
    save_last(run)
    for number, epochs in enumerate(_PROBE_EPOCHS):
        for hold in rivals:
            if len(growths.get(str(hold), [])) > number:  # before a resume
                continue
            growth = probe_hold(run, hold, epochs)
            if run.stop.exit_code:
                return
            growths.setdefault(str(hold), []).append(growth)
            trial = trial_of(run, growth if math.isfinite(growth) else math.nan)
            trial |= {"run": f"{run.progress.run} (HOLD {hold})"}
            trial["changed"] = json.dumps(run.changed | {"HOLD": hold})
            portfolio_env.append_trial(DATA_DIR / "runs" / "trials.csv", trial)
            save_last(run)
        rivals = sorted(rivals, key=lambda hold: -growths[str(hold)][number])[: math.ceil(len(rivals) / 2)]
        rivals = [hold for hold in rivals if growths[str(hold)][number] > -math.inf]
    if not rivals:
        raise UserError(f"with HOLDS {', '.join(growths)} all diverged: lower the learning rates")
    run.progress.hold_bars, probe = rivals[0], folder / f"hold-{rivals[0]}"
    if (probe / "last.pt").exists():  # otherwise it could not be written: pretraining begins anew
        run.go_on(load_weights(run, probe / "last.pt", AgentState))
        run.progress.probes, run.progress.validations = growths, validations
    best = probe / "pretrained.pt"
    agent = feature_reducer.load_checkpoint(best, AgentCheckpoint) if best.exists() else None
    if not agent or not run.saver.write(folder / best.name, agent):  # an earlier run's may be there
        run.progress.best_validation = -math.inf
    if (logs / probe.name).exists():
        shutil.rmtree(logs / "pretrain", ignore_errors=True)
        (logs / probe.name).rename(logs / "pretrain")
    save_last(run)
    drop_probes(run)


def probe_hold(run: Run, hold: int, epochs: int) -> float:
    """Pretrain a copy of the agent that decides every `hold` bars; return its best validation in bp a day."""
    name = f"hold-{hold}"
    probe = replace(
        run, last=run.last.parent / name / "last.pt", progress=replace(run.progress, hold_bars=hold),
        policy=copy.deepcopy(run.policy), reducer=copy.deepcopy(run.reducer), counted=True,
        scaler=torch.amp.GradScaler(run.data.device.type, enabled=run.data.amp),
        saver=feature_reducer.Saver(SAVE_MINUTES), share=1.0,  # without links: it is not the newest agent
    )  # fmt: skip
    probe.optimizers = make_optimizers(probe.policy, probe.reducer)
    if probe.last.exists():
        probe.go_on(load_weights(probe, probe.last, AgentState))
        own = {name: days for name, days in probe.progress.validations.items() if name == str(hold)}
        run.progress.validations.update(own)  # of the others it has what they were then
        probe.progress.validations = run.progress.validations
    setup = build_setup(run.data, probe.policy, probe.reducer, hold)
    try:
        growth = pretrain(setup, probe, epochs, DATA_DIR / "runs" / run.progress.run / name)
        save_last(probe)
        outcome = f"validation {growth:+.1f} bp/day over the benchmark"
    except feature_reducer.Diverged as error:
        growth, outcome = -math.inf, f"diverged ({error})"
    if not run.stop.exit_code:
        print(f"decisions every {hold} bars: {outcome}", flush=True)
    return growth


def drop_probes(run: Run) -> None:
    """Delete what the probes of a run have left."""
    for parent in (run.last.parent, DATA_DIR / "runs" / run.progress.run):
        for folder in parent.glob("hold-*"):
            shutil.rmtree(folder, ignore_errors=True)


def pretrain(setup: Setup, run: Run, epochs: int, folder: Path) -> float:
    """Train on growth, to the end of `epochs` at most, with a log in `folder`; return the best validation."""
    progress = run.progress
    log = feature_reducer.RunLog(folder, progress.pretrain_steps // PRETRAIN_STEPS)
    total, end = (min(count, PRETRAIN_EPOCHS) * PRETRAIN_STEPS for count in (PRETRAIN_EPOCHS, epochs))
    what = f"every {progress.hold_bars} bars"
    bar = feature_reducer.progress_bar(end, progress.pretrain_steps, what, "step")
    first, second = _PROBE_EPOCHS  # while HOLD is chosen the other probes are work ahead
    others = (len(HOLDS) - 1) * first + (math.ceil(len(HOLDS) / 2) - 1) * (second - first)
    others *= PRETRAIN_STEPS * (epochs < PRETRAIN_EPOCHS and not run.recipe)
    while progress.pretrain_steps < end and not run.waits():
        if progress.stale_epochs >= _PRETRAIN_PATIENCE:
            bar.write(f"pretraining ends: no better validation in {_PRETRAIN_PATIENCE} epochs")
            break
        stats = pretrain_step(setup, run, total)
        progress.pretrain_steps += 1
        sums = progress.pretrain_sums
        progress.pretrain_sums = {name: sums.get(name, 0.0) + value for name, value in stats.items()}
        growth, error = stats["growth_bp_day"], stats["reconstruction_loss"]
        bar.update()
        done, whole = run.work()
        run.say_duration(bar, others + whole - done)
        bar.set_postfix(growth=f"{growth:+.0f} bp/day", mse=f"{error:.3f}")
        if progress.pretrain_steps % PRETRAIN_STEPS == 0:
            means = {name: value / PRETRAIN_STEPS for name, value in progress.pretrain_sums.items()}
            progress.pretrain_sums = {}
            validation, improved = None if run.recipe else validate(setup), False
            if validation:
                improved = progress.improves(validation)
                better = improved or validation.growth > progress.best_growth  # it may be on its way
                progress.stale_epochs = 0 if better else progress.stale_epochs + 1
                progress.best_growth = max(progress.best_growth, validation.growth)
            epoch = progress.pretrain_steps // PRETRAIN_STEPS
            log.add(epoch, {**means, "validation_bp_day": validation and validation.growth})
            bar.write(
                f"pretrain {epoch:2d}/{PRETRAIN_EPOCHS}  {what}  "
                f"growth {means['growth_bp_day']:+8.1f} bp/day  "
                f"mse {means['reconstruction_loss']:.4f}  {validation or ''}{'  *' * improved}"
            )
            print(end="", flush=True)
            if improved:
                save_best(run, "pretrained.pt", validation)
        if run.saver.due():
            save_last(run)
    bar.close()
    log.flush()
    return progress.best_validation


def train_agent(setup: Setup, run: Run) -> None:
    """Pretrain, then train online, from where `run.progress` stands; return early when the user stops it."""
    progress = run.progress
    epochs, batches = run.recipe or (PRETRAIN_EPOCHS, BATCHES)
    if not run.last.with_name("best.pt" if progress.pretrained else "pretrained.pt").exists():
        progress.best_validation = -math.inf  # none yet, or it was taken away
    if not progress.pretrained:
        pretrain(setup, run, epochs, DATA_DIR / "runs" / progress.run / "pretrain")
        if run.waits():
            save_last(run)
            return
        if progress.best_validation > -math.inf:  # otherwise no epoch could be written: keep the last one
            load_weights(run, run.last.with_name("pretrained.pt"))
        else:
            progress.best_epoch = progress.pretrain_steps // PRETRAIN_STEPS
        run.optimizers = make_optimizers(run.policy, run.reducer)
        progress.pretrained, progress.best_validation = True, -math.inf
    best_due = progress.best_failed or progress.best_validation == -math.inf  # a better or a first best.pt
    if best_due and not run.recipe:
        validation = validate(setup)
        print(f"at batch {progress.batch}: {validation}", flush=True)
        if progress.improves(validation):
            save_best(run, "best.pt", validation)
        save_last(run)

    log = feature_reducer.RunLog(DATA_DIR / "runs" / progress.run, progress.batch)
    while progress.batch < batches and not run.waits():
        batch, begun = progress.batch, time.perf_counter()
        done, where = batch / max(1, BATCHES - 1), f"in batch {batch + 1}"
        epsilon, gamma = (first + (last - first) * done for first, last in (EPSILON, GAMMA))
        factor = min(0.5 ** min(progress.halvings, 5), progress.step_size if TARGET_KL else 1.0)
        rates = set_rates(run.optimizers, (POLICY_RATE, ENCODER_RATE), batch / BATCHES, factor)
        draws = draw_rollout(setup, batch, epsilon)

        # the market does not depend on the actions: encode the windows of the whole batch first
        rows = segment_rows(draws.starts, STEPS, setup.env.hold_bars)
        coins, masked = draws.permutation.coins.repeat(STEPS + 1, 1), draws.masked.flatten(0, 1)
        with setup.autocast(), stop_where_not_finite(setup.policy, setup.reducer, where):
            tokens = encode(setup.policy, setup.reducer, setup.windows, rows, _ENCODE_BATCH, coins, masked)
            encoded = time.perf_counter()
            with one_thread():
                tokens = tokens.unflatten(0, (STEPS + 1, -1))
                rollout = collect_rollout(setup, tokens, draws, gamma, _ROLLOUT_SWEEPS * (SWEEPS > 0))
        stepped = time.perf_counter()
        row = rollout_metrics(rollout, setup.env.hold_bars)
        row |= update(setup, run, rollout)
        updated = time.perf_counter()

        skipped = row.pop("skipped")
        feature_reducer.count_skipped(progress, skipped, row["updates"], setup.modules(), where)
        adapt_step(progress, row["approx_kl"])
        progress.halvings += on_plateau(progress, row["reward"])
        progress.batch += 1
        due = (VALIDATE_EVERY and progress.batch % VALIDATE_EVERY == 0) or progress.batch == BATCHES
        validation = validate(setup) if due and not run.recipe else None
        improved = validation is not None and progress.improves(validation)

        progress.seconds += time.perf_counter() - begun
        row |= {
            "rolling_reward": progress.rolling_reward(),
            "validation_bp_day": validation and validation.growth,
            "loss_scale": run.scaler.get_scale(), "skipped_steps": progress.skipped,
            "epsilon": epsilon, "gamma": gamma,
            "policy_rate": rates[0], "encoder_rate": rates[1] if TRAIN_ENCODER else 0.0,
            "encode_steps_per_second": NUM_ENVS * STEPS / (encoded - begun),
            "rollout_steps_per_second": NUM_ENVS * STEPS * REPLICAS / (stepped - encoded),
            "update_steps_per_second": MINIBATCH * row["updates"] / (updated - stepped),
        }  # fmt: skip
        log.add(progress.batch, row)
        left = (batches - progress.batch) * progress.seconds / progress.batch
        bp = {name: bp_per_day(row[name]) for name in ("reward", "rolling_reward")}
        print(
            f"batch {progress.batch:5d}/{BATCHES}  "
            f"value {row['portfolio_value']:.4f} ({row['benchmark_value']:.4f})  "
            f"reward {bp['reward']:+8.1f} rolling {bp['rolling_reward']:+8.1f} bp/day  "
            f"kl {row['approx_kl']:.4f}  clip {row['clip_fraction']:.2f}  entropy {row['entropy']:+.2f}  "
            f"ev {row['explained_variance']:+.2f}  mse {row['reconstruction_loss']:.3f}  "
            f"updates {row['updates']:2d}  left {left / 60:5.1f} min"
            + (f"  {validation}{' *' * improved}" if validation else ""),
            flush=True,
        )
        if improved:
            progress.best_failed = True  # a resume from here writes it: best.pt is never newer than last.pt
            save_last(run)
            save_best(run, "best.pt", validation)
        if run.saver.due():
            save_last(run)
    save_last(run)
    log.flush()
    if progress.best_validation > -math.inf:  # whether it is above chance depends on those after it too
        best = run.last.with_name("best.pt")
        saved, abstains = feature_reducer.load_checkpoint(best, AgentCheckpoint), not progress.above_chance
        if saved["abstains"] != abstains and not progress.best_failed:
            run.saver.write(best, saved | {"abstains": abstains})
    if not (run.waits() or run.recipe):
        run.saver.write(run.last.with_name("final.pt"), agent_checkpoint(run))


def train_run(run: Run) -> int:
    """Train one agent, test it, and complete its trial and report; return the exit code."""
    if not run.progress.hold_bars:
        choose_hold(run)
    progress, stop, name = run.progress, run.stop, run.progress.run
    if not stop.exit_code:
        setup = build_setup(run.data, run.policy, run.reducer, progress.hold_bars)
        train_agent(setup, run)
    if stop.exit_code:
        return say_stop(run, name)
    stop.close()

    trials, trial = DATA_DIR / "runs" / "trials.csv", trial_of(run, round(progress.best_validation, 3))
    portfolio_env.append_trial(trials, trial)
    if run.waits():  # at STOP_AT
        return say_stop(run, name, STOP_AT=1.0)
    print(f"run: {name}\nbatches: {progress.batch}\nskipped steps: {progress.skipped}")
    choice = f"the best of {sum(map(len, progress.validations.values()))}"
    choice += "" if math.isnan(progress.p_value) else f" (p = {progress.p_value:.3f})"
    choice += "" if progress.above_chance else f": no more than chance (at {_CONFIDENCE:.0%})"
    print(f"best validation: {progress.best_validation:+.1f} bp/day over the benchmark, {choice}")
    print(f"checkpoints: {run.last.parent}")
    if not TEST:
        return run.saver.exit_code()
    # on bars unused in training and choosing, the best agent first
    final = backtest_agent(setup, "test")
    agents = {"agent (final)": final}
    if progress.best_validation > -math.inf:  # otherwise best.pt could not be written
        load_weights(run, run.last.with_name("best.pt"))
        best = backtest_agent(setup, "test")
        agents = {portfolio_env.agent_name("best", setup.policy.abstains): best, **agents}
        if np.array_equal(best.weights, final.weights):
            agents = {portfolio_env.agent_name("best = final", setup.policy.abstains): best}
    portfolio_env.append_trial(trials, trial, next(iter(agents.values())))
    report(
        setup, DATA_DIR / "reports" / name, agents, "test", DATA_DIR / "runs", run=name, scale=SCALE,
        seeds=SEEDS, abstains=setup.policy.abstains, constants=json.loads(trial["changed"]),
        refit=portfolio_env.TO_REFIT * (REFIT and not setup.policy.abstains), choice=choice,
        probes={hold: values[-1] for hold, values in progress.probes.items()},
        importance=None if setup.policy.abstains else importance(setup),
    )  # fmt: skip
    return run.saver.exit_code()


def say_stop(run: Run, name: str, **others: object) -> int:
    """Print how far a run came, and how to go on with it, as `name`; return the exit code."""
    progress, flags = run.progress, run.flags | {"RUN": name} | others
    place = f"{progress.pretrain_steps} pretraining steps and {progress.batch} batches"
    place += " of the refit" * bool(run.recipe)
    place = place if progress.hold_bars else "a part of the choice of HOLD"
    print(f"stopped after {place}; go on with: {feature_reducer.resume_command(globals(), flags)}")
    return run.saver.exit_code(run.stop.exit_code)


def refit(name: str, open_one: Callable[..., Run]) -> int:
    """Train once more as far as best.pt came, on all bars and without validation; return the exit code."""
    folder, links = run_folder(name), DATA_DIR / "checkpoints"
    best = feature_reducer.load_checkpoint(folder / "best.pt", AgentCheckpoint)
    progress = feature_reducer.load_checkpoint(folder / "last.pt", AgentState)["progress"]
    recipe = progress.best_epoch, progress.best_batch
    if best["abstains"] or not recipe[PRETRAIN_EPOCHS == 0]:
        print("refit: none, since best.pt holds equal weights, or is as it began: refit.pt is a copy of it")
        saver = feature_reducer.Saver(SAVE_MINUTES, links)
        saver.write(folder / "refit.pt", best | {"refit": True})
        return saver.exit_code()
    getData.assign_constants(globals(), {"HOLD": best["hold_bars"]})
    print(f"refit: {recipe[0]} epochs of pretraining and {recipe[1]} batches on all bars", flush=True)
    own = f"{name}/refit-{recipe[0]}-{recipe[1]}-of-{BATCHES}"  # its last.pt; with more batches it is another
    run_folder(own).mkdir(exist_ok=True)
    run = open_one(own, recipe)
    train_agent(build_setup(run.data, run.policy, run.reducer, HOLD), run)
    if run.stop.exit_code:
        return say_stop(run, name)
    run.saver.links = links
    run.saver.write(folder / "refit.pt", agent_checkpoint(run) | {"run": name, "refit": True})
    return run.saver.exit_code()


def trial_of(run: Run, growth: float = math.nan) -> dict[str, object]:
    """Return the row of a training in the list of trials, without the figures of its test."""
    return {
        "time": run.progress.started, "run": run.progress.run, "seed": SEEDS[0],
        "market": run.data.footer["source"], "data_sha256": portfolio_env.data_sha256(run.data.footer),
        "changed": json.dumps(run.changed), "validation_bp_day": growth, "constants": json.dumps(run.fixed),
    }  # fmt: skip


def now() -> str:
    """Return the time in UTC."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


# ------------------------------------------------------------------------------------ evaluation and its jobs


@torch.no_grad()
def decide(policy: ActorCritic, tokens: Tensor, weights: Tensor, there: Presence = None) -> Tensor:
    """Return targets [B, A], float64, of the agent (the policy's mean) that holds `weights` [B, A]."""
    mean, _ = policy(tokens, weights.float(), there)
    return weights_from_logits(mean.double(), there)


def agent_targets(
    policy: ActorCritic, tokens: Tensor, mark: Tensor, segments: int, held: Tensor | None = None,
    there: Presence = None, limit: Callable = lambda rows, weights, target: target,
) -> Tensor:  # fmt: skip
    """Return targets [R, A], float64, of the deterministic agent over R decisions in a row.

    The weights held (at first `held` [1, A], or cash) are its only state, and soon forgotten. So decisions
    are cut into `segments` side by side: in the first round each starts from cash, then from where the one
    before it ended, until each holds bit for bit what it held in the round before. What still changes after
    _ROUNDS (of an agent that keeps what it holds) is decided one after another. `mark` [R, A] has the price
    relatives from a decision's fill to the close of the next; `limit` what the account leaves of targets.
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

    def moved(weights: Tensor, step: int) -> Tensor:  # segments [P] that held others in the round before
        return (weights != seen[step]).any(1) & inside[step]

    for number in range(_ROUNDS):
        weights = start
        for step in range(length):  # looked at after 0, 1, 2, 4, 8 ...: a GPU is waited for then
            if number and step & (step - 1) == 0 and not moved(weights, step).any():
                break
            seen[step] = weights
            present = None if there is None else there[rows[step]]
            asked = decide(policy, tokens[rows[step]], weights, present)
            targets[step] = limit(rows[step], weights, asked)
            weights, _ = portfolio_env.drift(targets[step], mark[rows[step]])
        else:
            seen[length] = weights
        if not torch.isfinite(targets).all():
            raise portfolio_env.WrongWeights("the agent's decisions are not finite")
        start = torch.cat([first, seen[length, :-1]])
        if not moved(start, 0).any():
            break
    targets = targets.transpose(0, 1).flatten(0, 1)[:count]  # [R, A]
    if (unsettled := moved(start, 0).nonzero()).numel():
        segment = int(unsettled[0])
        rest, first = slice(segment * length, count), start[segment : segment + 1]
        what = policy, tokens[rest], mark[rest], 1, first, None if there is None else there[rest]
        with one_thread():
            targets[rest] = agent_targets(*what, lambda at, *one: limit(at + rest.start, *one))
    return targets


def agent_orders(setup: Setup, split: str, before: Backtest | None = None) -> np.ndarray:
    """Return the agent's orders [R, A] in a split, zeros between decisions, from the account `before` on."""
    start, stop = setup.spans[split]
    rows = torch.arange(start, stop, setup.env.hold_bars, device=setup.device)  # of the decisions [S]
    mark = setup.env.mark[rows.clamp(max=setup.env.rows - 1)]  # [S, A]; nothing follows the last decision
    held = None if before is None else torch.from_numpy(before.weights_seen[None]).to(setup.device)
    with setup.autocast(), stop_where_not_finite(setup.policy, setup.reducer, f"on the {split} split"):
        tokens = encode(setup.policy, setup.reducer, setup.windows, rows, _ENCODE_BATCH)
        what = setup.policy, tokens, mark, -(-len(rows) // _SEGMENT), held, setup.windows.there(rows)
        targets = agent_targets(*what, lambda at, *one: setup.env.within_limits(rows[at], *one))
    orders = np.zeros((stop - start, setup.env.assets))
    orders[:: setup.env.hold_bars] = targets.cpu().numpy()
    return orders


def backtest_agent(setup: Setup, split: str) -> Backtest:
    """Run the deterministic agent over a whole split."""
    return account_of(setup, agent_orders(setup, split), setup.spans[split][1])


def account_of(setup: Setup, orders: np.ndarray, stop: int) -> Backtest:
    """Return the account that follows `orders` [R, A] (zeros: none) in the R bars before row `stop`."""
    start, targets = stop - len(orders), [order if order.any() else None for order in orders]
    trading = {"cost": setup.env.cost, "fill": FILL, "present": setup.present()}
    return portfolio_env.backtest(lambda row, _: targets[row - start], *setup.prices, start, stop, **trading)


def load_agents(path: Path) -> AgentCheckpoint:
    """Load the agent of a file; of a folder its best.pt, or else those of its seeds as an ensemble."""
    best = path / "best.pt" if path.is_dir() else path
    files = [best] if best.exists() else sorted(path.glob("seed-*/best.pt")) or [best]
    return combined({one: feature_reducer.load_checkpoint(one, AgentCheckpoint) for one in files})


def combined(agents: dict[Path, AgentCheckpoint]) -> AgentCheckpoint:
    """Return the ensemble of agents, deciding at the lower median of their intervals; of one, itself."""
    (path, first), *others = agents.items()
    if not others:
        return first
    for other, agent in others:
        names = ("dims", "coins", "window_bars", "market", "policy_shape")
        wrong = [name for name in names if agent[name] != first[name]]
        both = first["normalisation"], agent["normalisation"]
        scales = ([x for part in one.values() for x in part.values()] for one in both)
        wrong += ["normalisation"] * (not all(map(torch.equal, *scales)))
        if wrong:
            raise UserError(f"{path} and {other} differ in {wrong[0]}: no ensemble, so name one of them")
    hold_bars = statistics.median_low(agent["hold_bars"] for agent in agents.values())
    members = [{name: agent[name] for name in Member.__annotations__} for _, agent in others]
    run = first["run"].rpartition("/")[0] or first["run"]
    return first | {"run": run, "hold_bars": hold_bars, "others": members}


def modules_of(saved: AgentCheckpoint, device: torch.device) -> tuple[nn.Module, nn.Module]:
    """Build policy and reducer of a checkpoint, or those of an ensemble's agents as one."""
    agents = []
    for agent in (saved, *saved.get("others", [])):
        reducer = feature_reducer.reducer_from_checkpoint(saved | {"reducer": agent["reducer"]}, device)
        policy = ActorCritic(reducer.latent_dim, **saved["policy_shape"]).to(device)
        load_policy(policy, agent)
        agents.append((policy, reducer))
    return agents[0] if len(agents) == 1 else (Ensemble(agents),) * 2


def open_agent(device: torch.device, amp: bool) -> tuple[Setup, AgentCheckpoint]:
    """Load the agent of CHECKPOINT on the features of DATA_DIR."""
    saved = load_agents(feature_reducer.checkpoint_path(DATA_DIR, CHECKPOINT))
    data = load_data(device, amp, DATA_DIR, saved, None)
    return build_setup(data, *modules_of(saved, device), saved["hold_bars"]), saved


@torch.no_grad()
def reconstruction_on(setup: Setup, split: str, measure: Callable) -> Any:
    """Return what `measure` says of the current reducer on windows evenly spread over a split."""
    rows, reducer = torch.arange(*setup.spans[split], device=setup.device), setup.reducer
    options = setup.windows, feature_reducer.spread_rows(rows, 256), _ENCODE_BATCH
    with setup.autocast():
        return measure(lambda x, there: reducer.decoder(reducer.encoder(x, there), there), *options)


def report(
    setup: Setup, folder: Path, agents: dict[str, Backtest], split: str, logs: Path, part: str = "",
    **fields: object,
) -> None:  # fmt: skip
    """Write the report on `agents` (first the headline, whose weights `setup` has) and baselines to `folder`.

    `logs` is the folder of all runs' logs, `part` one of several; `fields` are of `portfolio_env.Report`.
    """
    market, symbols, present = setup.footer["source"], setup.footer["symbols"], setup.present()
    measure = feature_reducer.reconstruction_metrics
    reconstruction = {f"{name} split": reconstruction_on(setup, name, measure) for name in ("train", split)}
    headline = next(iter(agents.values()))
    first, stop = int(headline.rows[0]), int(headline.rows[-1]) + 1
    periods = {"rebalance_every": portfolio_env.REBALANCE_EVERY, "look_back": portfolio_env.LOOK_BACK}
    trading = {"cost": setup.env.cost, "fill": FILL, "limits": setup.env.limits}
    coins = {"symbols": symbols, "present": present}
    page = portfolio_env.Report(
        market=market, data=portfolio_env.data_sha256(setup.footer),
        symbols=symbols, split=split, times=setup.windows.times[headline.rows],
        hold_bars=setup.env.hold_bars, agents=agents, reconstruction=reconstruction,
        others=portfolio_env.baselines(*setup.prices, first, stop, **coins, **trading, **periods),
        trial_sharpes=portfolio_env.read_trial_sharpes(logs / "trials.csv"),
        curves=portfolio_env.read_curves(logs / fields["run"] / part),
        **{"trained_on": market, "relation": "out of sample"} | trading | fields,
    )  # fmt: skip
    remarks = portfolio_env.remarks_on_members(page, setup.prices, present, setup.listed)
    portfolio_env.publish(folder, replace(page, remarks=remarks), f"\n{split} split ({page.relation})")


Places = list[tuple[slice, slice]]  # in windows [B, N, P]: coins, values of a coin


def parts_of_windows(windows: FeatureWindows, footer: dict, detail: bool) -> dict[tuple[str, ...], Places]:
    """Return {(kind, name, timeframe): places} of each channel, timeframe and, in `detail`, both and coin."""
    every, channels, spans = slice(None), footer["channels"], windows.slices
    cells = {
        (channel, timeframe): (every, slice(spans[timeframe].start + k, spans[timeframe].stop, len(channels)))
        for (k, channel), timeframe in itertools.product(enumerate(channels), spans)
    }
    parts = {("channel", name, ""): [cells[name, timeframe] for timeframe in spans] for name in channels}
    if detail:
        parts |= {("channel x timeframe", *cell): [place] for cell, place in cells.items()}
        parts |= {("coin", s, ""): [(slice(k, k + 1), every)] for k, s in enumerate(footer["symbols"])}
    return parts | {("timeframe", "", timeframe): [(every, span)] for timeframe, span in spans.items()}


def other_moments(count: int, block: int, generator: torch.Generator) -> Tensor:
    """Return for each of `count` decisions in a row another one [S]: blocks of about `block` change places.

    There are at least eight, and each gives way to the one before it in a random cycle of all: none stays.
    """
    blocks, position = min(count, max(8, count // block)), torch.arange(count)
    own = position * blocks // count  # block of each decision [S]
    first, cycle = torch.searchsorted(own, torch.arange(blocks)), torch.randperm(blocks, generator=generator)
    source = torch.empty_like(cycle).index_copy(0, cycle, cycle.roll(1))
    return (first[source[own]] + position - first[own]).clamp(max=count - 1)


def exchanged_tokens(setup: Setup, pair: tuple[Tensor, Tensor], parts: Collection[Places]) -> Tensor:
    """Return tokens [2, 1 + P, B, A, W] of windows of two sets of rows [B], with none or one part swapped."""
    windows = [setup.windows(rows).unflatten(1, (setup.windows.coins, -1)) for rows in pair]  # [B, N, P]
    tokens, there = [], setup.windows.there(pair[0])
    if there is not None:  # a coin that is absent at the other moment keeps its own
        windows[1] = torch.where(setup.windows.there(pair[1]).unsqueeze(-1), windows[1], windows[0])
    for (own, other), places in itertools.product((windows, windows[::-1]), [[], *parts]):
        inputs = own.clone()
        for place in places:
            inputs[:, *place] = other[:, *place]
        latent = setup.reducer.encoder(inputs.flatten(1), there)
        tokens.append(setup.policy.market_tokens(latent, there))
    return torch.stack(tokens).unflatten(0, (2, -1))


@torch.no_grad()
def growth_by_part(setup: Setup, rows: Tensor, parts: Collection[Places], draws: int) -> np.ndarray:
    """Return the log growth per bar [S, 2, P] that the agent owes to each part, at each decision's row [S].

    First what it loses where the part is of another moment; then what it gains where all is but the part. In
    each draw of `other_moments` all these agents decide side by side, from cash on.
    """
    hold_bars = setup.env.hold_bars
    week, growth = max(1, 7 * getData.BARS_PER_DAY // hold_bars), 0.0
    bar = feature_reducer.progress_bar(draws * len(rows), 0, "importance", "decision")
    env = copy.copy(setup.env)
    env.ruin = 0.0  # what is ruined would be worth as much as the benchmark from then on
    for draw in range(draws):
        moments = other_moments(len(rows), week, generator_for(0, Stream.IMPORTANCE, draw)).to(setup.device)
        weights, rewards = env.reset(rows[:1].repeat(2 * (1 + len(parts))), len(rows)), []
        with setup.autocast(), stop_where_not_finite(setup.policy, setup.reducer, "of the importance"):
            for pair in torch.stack([rows, rows[moments]]).split(_IMPORTANCE_BATCH, 1):
                for tokens in exchanged_tokens(setup, pair, parts).flatten(0, 1).unbind(1):
                    target = decide(setup.policy, tokens, weights, setup.windows.there(env.row))
                    weights, reward, *_ = env.step(target)
                    rewards.append(reward)
                bar.update(pair.shape[1])
        growth += torch.stack(rewards).cpu().numpy().reshape(len(rows), 2, -1) / (hold_bars * draws)
    bar.close()
    return (growth[..., :1] - growth[..., 1:]) * [[1], [-1]]


def importance(setup: Setup, run: Path | None = None) -> pd.DataFrame:
    """Return what the agent owes to each part of its windows on the validation split, in bp per day.

    With the folder of its `run` at all decisions and in detail, and with the variance of each part that its
    encoder explains, and the one that the training began with.
    """
    hold_bars, parts = setup.env.hold_bars, parts_of_windows(setup.windows, setup.footer, run is not None)
    start, stop = setup.spans["validation"]
    rows = torch.arange(start, max(start + 1, stop - hold_bars + 1), hold_bars, device=setup.device)
    rows, draws = (rows, 3) if run else (rows[-_IMPORTANCE_DECISIONS:], 1)
    growth = growth_by_part(setup, rows, parts.values(), draws)
    block = portfolio_env.block_length(np.repeat(growth.mean((1, 2)), hold_bars)) / hold_bars
    figures = bp_per_day(np.stack([growth.mean(0), *portfolio_env.bootstrap_interval(growth, block)]))
    names = [f"{what}{end}_bp_day" for what in ("lost", "alone") for end in ("", "_low", "_high")]
    table = pd.DataFrame(list(parts), columns=["kind", "name", "timeframe"])
    table[names] = figures.transpose(2, 1, 0).reshape(len(parts), -1)
    if not run:
        return table
    reducers = {"explained_variance": setup.reducer}
    for folder in (run, *run.parents[:3]):  # several runs have theirs in common
        for pin in folder.glob("last.market-*/feature_reducer.pt"):
            saved = feature_reducer.load_checkpoint(pin, ReducerCheckpoint)
            if saved["window_bars"] == list(setup.windows.bars.values()):
                before = feature_reducer.reducer_from_checkpoint(saved, setup.device)
                reducers.setdefault("explained_variance_before", before)
    for name, reducer in reducers.items():
        one = replace(setup, reducer=reducer)
        sums, *_ = reconstruction_on(one, "validation", feature_reducer.reconstruction_sums)  # [2, N, P]
        of_parts = (sum(sums[:, *place].sum((1, 2)) for place in places) for places in parts.values())
        table[name] = [1 - float(error / square) if square else math.nan for error, square in of_parts]
    return table


def report_checkpoint(device: torch.device, amp: bool) -> int:
    """Report on one checkpoint over one split of the features, or what it looks at; return the exit code."""
    setup, saved = open_agent(device, amp)
    split = "validation" if JOB == "importance" else EVALUATE_SPLIT
    first, stop = setup.spans[split]
    days = map(int, setup.windows.times[[first, stop - 1]])
    splits, trained_on = saved["market"]["splits"], saved["market"]["source"]
    relation = portfolio_env.relation_to_training(splits, trained_on, setup.footer["source"], *days)
    path = feature_reducer.checkpoint_path(DATA_DIR, CHECKPOINT)
    chosen_in = getData.owner_of(path) or DATA_DIR  # where its trials are
    run = chosen_in / "checkpoints" / saved["run"] if JOB == "importance" else None
    if new := [symbol for symbol in setup.footer["symbols"] if symbol not in saved["market"]["symbols"]]:
        relation += f"; coins new to the agent: {', '.join(new)}"
    name, abstains = path.name.removesuffix(".pt"), setup.policy.abstains
    if run and abstains:
        advice = "use --checkpoint pretrained.pt or final.pt, of the same run"
        raise UserError(f"{path} holds equal weights whatever it sees, so nothing has importance: {advice}")
    folder = DATA_DIR / "reports" / f"{saved['run']}-{name}-{'importance' if run else split}"
    agents = {portfolio_env.agent_name(name, abstains): backtest_agent(setup, split)}
    report(
        setup, folder, agents, split, chosen_in / "runs", run=saved["run"], scale=saved["scale"],
        seeds=[agent["seed"] for agent in (saved, *saved.get("others", []))], relation=relation,
        abstains=abstains, refit=REFITTED * saved.get("refit", False), trained_on=trained_on,
        importance=run and importance(setup, run),
    )  # fmt: skip
    return 0


@torch.no_grad()
def newest_target(
    policy: nn.Module, reducer: nn.Module, windows: FeatureWindows, held: np.ndarray, amp: bool
) -> np.ndarray:
    """Return the weights [A] that an agent which holds `held` [A] wants at the last row of `windows`."""
    row = torch.tensor([len(windows.times) - 1], device=windows.device)
    where = policy, reducer, "at the newest bar"
    with feature_reducer.half_precision(windows.device, amp), stop_where_not_finite(*where):
        tokens = encode(policy, reducer, windows, row, _ENCODE_BATCH)
        held_now = torch.from_numpy(held[None]).to(windows.device)
        targets = agent_targets(policy, tokens, torch.ones_like(held_now), 1, held_now, windows.there(row))
    return targets[0].cpu().numpy()


def print_signal(device: torch.device, amp: bool) -> int:
    """Print the weights that the agent wants at the newest complete bar: a table, and one line of JSON."""
    setup, saved = open_agent(device, amp)
    symbols, source, close = setup.footer["symbols"], setup.footer["source"], int(setup.windows.times[-1])
    when = f"{getData.when(close)} UTC"
    bars = getData.load_bars(DATA_DIR, symbols, setup.footer["max_gap"])
    opening = pd.Timestamp(close - getData.BAR_MS, unit="ms", tz="UTC")
    gaps = [symbol for symbol in symbols if bars[symbol].at[opening, "filled"]]
    silent = f"the newest bar ({when}) is missing for {', '.join(gaps)}" * bool(gaps)
    if gaps and (len(gaps) == len(symbols) or not setup.footer["absent"]):
        raise UserError(f"{silent}: run python getData.py")
    age = time.time() - close / 1000
    if not 0 <= age <= MAX_AGE:
        reason = f"is {age / 60:,.0f} minutes old" if age > 0 else "lies ahead of this machine's clock"
        raise UserError(f"the newest bar, {when}, {reason} (MAX_AGE {MAX_AGE} s): run python getData.py")
    held = np.zeros(len(symbols) + 1)
    held[: len(HOLDINGS)] = HOLDINGS[: len(held)]
    if len(HOLDINGS) > len(held) or abs(held.sum() - 1) > 1e-6:
        raise UsageError(f"HOLDINGS must be up to {len(held)} weights, cash first, of sum 1")
    target = newest_target(setup.policy, setup.reducer, setup.windows, held, setup.amp)
    target = portfolio_env.constrain(held, target, 0.0, setup.env.limits)
    trained_on, abstains = saved["market"]["source"], setup.policy.abstains
    mark, refitted = portfolio_env.market_mark(source, trained_on), saved.get("refit", False)
    for text in filter(None, (mark, portfolio_env.ABSTAINS * abstains, REFITTED * refitted, silent)):
        print(f"{text}\n")
    file = feature_reducer.checkpoint_path(DATA_DIR, CHECKPOINT).name
    print(f"{file}, the agent of run {saved['run']}, decision at {when}, {source}\n")
    if new := [symbol for symbol in symbols if symbol not in saved["market"]["symbols"]]:
        print(f"coins new to the agent: {', '.join(new)}\n")
    table = pd.DataFrame({"held": held, "target": target, "change": target - held}, ["cash", *symbols])
    texts = table.map("{:.4f}".format).assign(change=table["change"].map("{:+.4f}".format))
    print(texts.rename_axis(columns="asset").to_string())
    weights = table["target"].round(6).to_dict()
    following, later = close + saved["hold_bars"] * getData.BAR_MS, decides_every(saved["hold_bars"])
    until = f"{getData.when(following)} UTC ({later} later)"
    print(f"\nno order before the next decision, at the close of {until}\n")
    about = {"trained_on": trained_on, "abstains": abstains, "refitted": refitted, "run": saved["run"]}
    about |= {"market": source, "close_time_ms": close, "next_decision_ms": following, "weights": weights}
    print(json.dumps(about))
    return 0


def paper_name() -> str:
    """Return RUN, or else the run of CHECKPOINT, which begins no account beside others without --run."""
    path = feature_reducer.checkpoint_path(DATA_DIR, CHECKPOINT)
    name, folder = RUN or load_agents(path)["run"], DATA_DIR / "paper"
    names = sorted(str(file.relative_to(folder).with_suffix("")) for file in folder.rglob("*.sqlite"))
    if not RUN and names and name not in names:
        accounts = f"the accounts in {folder} are {', '.join(names)}"
        advice = f"name one with --run, or begin another with --run {name}"
        raise UserError(f"{path} is of run {name}, and {accounts}: {advice}")
    return name


def paper_agent(folder: Path, about: dict[str, object], given: bool) -> tuple[AgentCheckpoint, str]:
    """Return the agent of the paper account that is `about` that ({}: new), and the SHA-256 of its file.

    That is a copy in the account's folder, as best.pt does not stay what it is; one that is `given` is new.
    """
    digest, new = about.get("checkpoint"), folder / "agent-new.pt"
    if given or not about:
        path = feature_reducer.checkpoint_path(DATA_DIR, CHECKPOINT)
        feature_reducer.save_checkpoint(new, load_agents(path))
        digest = hashlib.sha256(new.read_bytes()).hexdigest()
        new.replace(folder / f"agent-{digest[:12]}.pt")
    files = {hashlib.sha256(file.read_bytes()).hexdigest(): file for file in folder.glob("agent*.pt")}
    if digest not in files:
        raise UserError(f"the account's agent, SHA-256 {digest}, is not in {folder}: name it by --checkpoint")
    return feature_reducer.load_checkpoint(files[digest], AgentCheckpoint), digest


def keep_paper_account(given: bool, device: torch.device, amp: bool) -> NoReturn:
    """Book the agent's decisions on the new bars of EXCHANGE, until the process is stopped."""
    path = DATA_DIR / "paper" / f"{paper_name()}.sqlite"
    folder = path.with_suffix("")
    with getData.locked(folder, "paper job"):
        account = portfolio_env.PaperAccount(path)
        before = account.about()
        saved, digest = paper_agent(folder, before, given)
        market, rows = saved["market"], saved["window_bars"]
        here = {"channels": getData.CHANNELS, "timeframes": getData.TIMEFRAMES}
        feature_reducer.check_columns(saved, market | here | {"formulas_sha256": getData.formulas_sha256()})
        policy, reducer = modules_of(saved, device)

        symbols, absent = market["symbols"], market["absent"]
        if absent and before:  # a new account is of the coins that trade
            symbols = [symbol for symbol in before["symbols"] if symbol in symbols]

        def decide(bars: dict[str, pd.DataFrame], held: np.ndarray, gone: list[str]) -> np.ndarray:
            frames, members = getData.newest_features(bars, rows), None
            if policy.tied and (gone or absent):
                members = getData.members_over_time(bars, market["universe"], market["member_days"])
                there = members.to_numpy()[-1] & ~np.isin(list(bars), gone)
                members = np.tile(there, (len(next(iter(frames.values()))), 1))
            windows = FeatureWindows(frames, rows, device, saved["normalisation"], members=members)
            if not windows.valid[-1]:
                raise UserError(f"a coin was listed on {EXCHANGE} too late for a window of {rows} bars")
            return newest_target(policy, reducer, windows, held, amp)

        identity = {
            "run": saved["run"], "checkpoint": digest, "abstains": policy.abstains,
            "refitted": saved.get("refit", False), "trained on": market["source"],
            "splits": dict(market["splits"]), "symbols": list(symbols), "absent": absent,
            "hold_bars": saved["hold_bars"], "cost": FEE_RATE + SLIPPAGE_RATE,
            "delisting_loss": DELISTING_LOSS,
            "exchange": EXCHANGE, "base_url": BASE_URL, "limits": [MAX_WEIGHT, MIN_CASH, NO_TRADE_BAND],
        }  # fmt: skip
        portfolio_env.PaperTrading(
            account, identity, decide, getData.look_back_ms(rows),
            poll=POLL, max_late=MAX_LATE, call=CALL, call_timeout=CALL_TIMEOUT,
        ).run()  # fmt: skip


# ----------------------------------------------------------------------------------------------- several runs


def several() -> bool:
    """Return whether the constants ask for more than one run."""
    both = GRID + SEARCH
    return JOB == "power" or bool(both.strip()) or len(SEEDS) > 1 or (WALK_FORWARD > 0 and not FOLD)


class Plan(NamedTuple):
    """One of several runs."""

    name: str  # its place in the folders of all: combination, fold and seed, where there are several
    combination: str  # of GRID or SEARCH: HOLD=4,POLICY_RATE=0.001
    point: dict[str, object]  # the constants of that
    fold: int  # from 1 on; 0: none
    seed: int
    data_dir: Path | None = None  # with the market that it trains on and all that it writes; None: DATA_DIR
    market: Sequence[str] = ()  # the command that makes that

    def place(self, run: str) -> tuple[Path, str]:
        """Return its data folder, and its name there."""
        return (self.data_dir, run) if self.data_dir else (DATA_DIR.absolute(), f"{run}/{self.name}")

    def file(self, run: str, folder: str, name: str) -> Path:
        """Return a file of its own in a folder of its data folder."""
        data_dir, own = self.place(run)
        return data_dir / folder / own / name


def drawn(axis: Sequence, kind: str | None, share: float) -> object:
    """Return the value of an axis of SEARCH at a `share` in [0, 1): one of all, or a number between two."""
    if kind is None:
        return axis[int(share * len(axis))]
    low, high = axis
    end = high + isinstance(low, int)
    value = low * (end / low) ** share if kind == " log" else low + (end - low) * share
    return min(high, max(low, int(value) if end > high else float(f"{value:.4g}")))


def plan_runs() -> list[Plan]:
    """Return all runs that are asked for: each combination of GRID or draw of SEARCH, each fold and seed."""
    marks, axes, kinds, example = getData.constant_marks(globals()), {}, [], "HOLD=4,12 TRUNK=320x160,768x384"
    where, words, separator = "GRID", GRID.split(), ","
    if SEARCH:
        where, words, separator = "SEARCH", SEARCH.split(","), "|"
        example = "MASK=0..0.5, POLICY_RATE=1e-4..1e-2 log, HOLD=4|12"
    for word in words:
        name, _, values = word.strip().partition("=")
        if name in marks and (marks[name].mark or not marks[name].has_job("train")):
            raise UsageError(f"{where}: {name} is the same in all runs")
        ends = re.fullmatch(r"(.+?)\.\.(.+?)( log)?", values) if SEARCH else None
        texts = ends.group(1, 2) if ends else values.split(separator)
        if isinstance(globals().get(name), tuple):
            texts = [text.replace("x", ",") for text in texts]
        try:
            axis = [getData.constant_value(globals(), name, text, strict=False) for text in texts]
        except UsageError as error:
            raise UsageError(f"{where}: {error}; write it as in {example}") from None
        if name in axes or len(set(axis)) < len(axis):
            raise UsageError(f"{where}: {name}, or a value of it, is there twice")
        axes[name], kind = axis, ends and (ends[3] or "")
        if ends and ({*map(type, axis)} - {int, float} or axis[0] > axis[1] or (kind and axis[0] <= 0)):
            raise UsageError(f"{where}: {word.strip()} is no range of numbers; write it as in {example}")
        kinds.append(kind)
    points = itertools.product(*axes.values())
    if SEARCH:  # a Sobol sequence fills the space evenly
        shares = torch.quasirandom.SobolEngine(len(axes), scramble=True, seed=SEEDS[0])
        shares = shares.draw(TRIALS, dtype=torch.float64).tolist()
        points = [tuple(map(drawn, axes.values(), kinds, row)) for row in shares]
    plans, folds = [], [FOLD] if FOLD else range(1, WALK_FORWARD + 1) or [0]
    for point, fold, seed in itertools.product(dict.fromkeys(points), folds, SEEDS):
        point = dict(zip(axes, point, strict=True))
        texts = {name: getData.plain_text(value).replace(",", "x") for name, value in point.items()}
        combination = ",".join(map("=".join, texts.items()))
        parts = combination, f"fold-{fold}" * bool(fold), f"seed-{seed}" * (len(SEEDS) > 1)
        plans.append(Plan("/".join(filter(None, parts)), combination, point, fold, seed))
    return plans


def check_combinations(flags: dict[str, object], run: str) -> None:
    """Raise UsageError for a combination of the grid whose constants, or the name of its run, cannot be."""
    if "/" in run:
        raise UsageError(f"several runs have one plain name, not {run!r}")
    for plan in plan_runs():
        if both := flags.keys() & plan.point.keys():
            raise UsageError(f"{min(both)} varies, and is also given as a flag: leave one of them out")
        values = plan.point | {"RUN": f"{run}/{plan.name}"}
        before = {name: globals()[name] for name in values}
        getData.assign_constants(globals(), values)
        try:
            check_constants([*flags, *plan.point])
        finally:
            getData.assign_constants(globals(), before)


def shared_features(name: str) -> Path | None:
    """Return the features that several runs have in common, for one of them; None for a run of its own."""
    if "/" not in name:
        return None
    pins = [path for path in run_folder(name.split("/")[0]).glob("last.market-*") if path.suffix != ".tmp"]
    return max(pins, key=lambda path: path.stat().st_mtime, default=None)  # others: of an unfinished start


def run_process(commands: list[list[str]], log: Path, stopping: Callable[[], bool] = lambda: False) -> int:
    """Run a training, and before it what it needs, which write into `log`; return the last exit code.

    It hears no Ctrl-C: it stops and saves when `stopping` says so, or Ray interrupts this function.
    """
    prctl = ctypes.CDLL(None).prctl
    log.parent.mkdir(parents=True, exist_ok=True)
    for command in commands:
        with log.open("ab") as file:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=lambda: prctl(1, signal.SIGKILL),  # PR_SET_PDEATHSIG: it ends with this process
            )  # fmt: skip
        with suppress(KeyboardInterrupt):  # Ray's, which is no signal: it would not end a longer sleep
            while process.poll() is None and not stopping():
                time.sleep(0.1)
        process.terminate()  # nothing happens where it has ended
        if code := process.wait():
            break
    return code


@contextmanager
def local_runs() -> Iterator[Callable]:
    """Yield what starts `run_process` on this machine, for one run after another; at the end none goes on."""
    stopping = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        try:
            yield lambda *process: pool.submit(run_process, *process, stopping.is_set)
        finally:  # those that wait never begin, the run under way stops and saves
            pool.shutdown(wait=False, cancel_futures=True)
            stopping.set()


@contextmanager
def ray_runs() -> Iterator[Callable]:
    """Yield what starts `run_process` on the Ray cluster at RAY_ADDRESS, or else one on this machine."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError:
        raise UserError("ENGINE = ray needs Ray: pip install ray, or leave --engine out") from None
    here = {"address": "local", "include_dashboard": False, "_node_ip_address": "127.0.0.1"}
    place = {"address": os.environ["RAY_ADDRESS"]} if os.environ.get("RAY_ADDRESS") else here
    try:
        ray.init(**place, log_to_driver=False, logging_level="ERROR")
    except ConnectionError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{reason}: are RAY_ADDRESS and RAY_AUTH_TOKEN those of a cluster?") from None
    gpus = int(DEVICE == "cuda")
    if gpus > ray.cluster_resources().get("GPU", 0):
        raise UserError("the Ray cluster has no GPU: use --device cpu, or a cluster that has one")
    run, futures = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=0)(run_process), []

    def start(*process: object) -> Future[int]:
        exit_code, future = Future(), run.remote(*process).future()
        future.add_done_callback(  # an exception: its machine or worker died
            lambda _: exit_code.set_result(-signal.SIGKILL if future.exception() else future.result())
        )
        futures.append(future)
        return exit_code

    try:
        yield start
    finally:
        pending = [future for future in futures if not future.done()]
        for future in reversed(pending):  # first those that would take a free place
            ray.cancel(future.object_ref, force=False)
        wait(pending)


def run_all(
    plans: list[Plan], run: str, flags: dict[str, object], start: Callable, stop: feature_reducer.StopSignal
) -> dict[str, int]:
    """Train all runs, or until `stop`; return {name: exit code} of those that died twice or cannot begin."""

    def begin(plan: Plan) -> Future[int]:  # from its last.pt where it has one
        data_dir, name = plan.place(run)  # absolute: a worker on a cluster is elsewhere
        resume = plan.file(run, "checkpoints", "last.pt").exists()
        own = {"DATA_DIR": data_dir, "RUN": name, "SEEDS": (plan.seed,), "FOLD": plan.fold, "JOB": "train"}
        own |= {"WALK_FORWARD": WALK_FORWARD, "GRID": "", "SEARCH": "", "ENGINE": "local", "RESUME": resume}
        own |= {"SCALE": SCALE, "DEVICE": DEVICE, "TEST": plan.data_dir is not None}
        values = {"BATCHES": BATCHES} | flags | plan.point | own  # one that has begun may have fewer batches
        texts = [getData.flag_text(*one) for one in values.items() if one[0] not in ("TRIALS", "STRENGTHS")]
        command = [sys.executable, "-u", str(Path(__file__).resolve()), *texts]
        commands = [plan.market, command] if plan.market and not resume else [command]
        return start(commands, plan.file(run, "runs", "output.txt"))

    def last_line(log: Path) -> str:
        text = log.read_text("utf-8", "replace") if log.exists() else ""
        return text.strip().rpartition("\n")[2].strip()[:200]

    futures = {begin(plan): plan for plan in plans}
    again, dead, begun, shown = set[str](), dict[str, int](), time.monotonic(), -math.inf
    with feature_reducer.progress_bar(len(plans), 0, run, "run") as bar:
        while futures:
            done, _ = wait(futures, 0.2, FIRST_COMPLETED)
            if stop.exit_code:
                break
            if time.monotonic() - shown > (60 if bar.disable else 1):
                logs = {plan.file(run, "runs", "output.txt"): plan.name for plan in futures.values()}
                log = max(filter(Path.exists, logs), key=os.path.getmtime, default=None)
                if log and last_line(log):
                    shown, state = time.monotonic(), f"{logs[log]}: {last_line(log)}"
                    bar.write(f"at work: {state}") if bar.disable else bar.set_postfix_str(state)
            for future in done:
                plan = futures.pop(future)
                name, code = plan.name, future.result()
                if code == 0:
                    ended = len(plans) - len(futures) - len(dead)
                    left = (time.monotonic() - begun) / 60 / ended * len(futures)
                    outcome = outcome_of(plan, run)
                    figures = f"validation {outcome.trial['validation_bp_day']:+.1f} bp/day"
                    figures += " (no more than chance)" * outcome.abstains
                    bar.write(f"run {ended}/{len(plans)}  {name}  {figures}  left {left:5.1f} min")
                    bar.update()
                    continue
                log = plan.file(run, "runs", "output.txt")
                reason = last_line(log) or "it printed nothing"
                says_why = code in (2, 3) or (code == 1 and reason.startswith("error: "))
                reason = f"(exit code {code}): {reason}"
                if says_why or name in again:  # a mistake or a divergence would be the same once more
                    dead[name] = code
                    bar.write(f"error: run {name} did not end {reason}; see {log}", file=sys.stderr)
                else:
                    again.add(name)
                    futures[begin(plan)] = plan
                    bar.write(f"run {name} died {reason}; once more, from its last.pt", file=sys.stderr)
            print(end="", flush=True)
    return dead


@dataclass(frozen=True, kw_only=True)
class Outcome(RunResult):
    """What one of several runs has come to."""

    fold: int  # of a walk forward; 0: none
    trial: dict[str, object]  # its row in the list of trials
    path: Path  # of its best.pt
    agent: AgentCheckpoint
    progress: Progress  # at its end


def outcome_of(plan: Plan, run: str) -> Outcome:
    """Read what a run left when it ended."""
    data_dir, name = plan.place(run)
    trials = portfolio_env.read_trials(data_dir / "runs" / "trials.csv")
    trial = trials[trials["run"] == name].iloc[-1].to_dict()
    path = plan.file(run, "checkpoints", "best.pt")
    path = path if path.exists() else path.with_name("pretrained.pt")  # it waits in the first phase
    agent = feature_reducer.load_checkpoint(path, AgentCheckpoint)
    state = feature_reducer.load_checkpoint(path.with_name("last.pt"), AgentState)
    return Outcome(
        name=plan.name, combination=plan.combination, fold=plan.fold, seed=plan.seed, trial=trial, path=path,
        agent=agent, progress=state["progress"], hold_bars=agent["hold_bars"], abstains=agent["abstains"],
        rungs=[rung[plan.name] for rung in read_rungs(run)],
        test_start=agent["market"]["splits"]["test"][0],
        validation=math.nan if agent["abstains"] else trial["validation_bp_day"],
    )  # fmt: skip


def combinations_above_chance(
    combinations: dict[str, list[Outcome]], others: Sequence[Progress] = ()
) -> tuple[list[str], dict[str, float]]:
    """Return the combinations whose validation is more than the best of all is by chance, and all p-values.

    A combination, the mean of its seeds, 0 where one abstains, is compared with every validation of every
    run, also of `others`, from which all are chosen. Each fold chooses by itself: there the p-value of all
    its runs (Simes, Biometrika 73, 1986) counts, times the number of combinations (Bonferroni).
    """
    every = list(itertools.chain(*combinations.values()))
    if every[0].fold:
        p_values = {}
        for name, part in combinations.items():
            ranked = np.sort([one.progress.p_value for one in part])
            simes = np.fmin.reduce(len(part) * ranked / np.arange(1, len(part) + 1))
            p_values[name] = float(np.minimum(1.0, len(combinations) * simes))
        return [name for name, p_value in p_values.items() if p_value <= 1 - _CONFIDENCE], p_values
    series = []
    for part in combinations.values():
        series.append(np.mean([np.array(one.progress.best_days) * (not one.abstains) for one in part], 0))
    for progress in (*(one.progress for one in every), *others):
        series += itertools.chain(*progress.validations.values())
    block = max(one.progress.block for one in every)
    above, p_values, _ = portfolio_env.above_chance(np.transpose(series), block, level=_CONFIDENCE)
    names = [name for name, beyond in zip(combinations, above, strict=False) if beyond]
    return names, dict(zip(combinations, p_values.tolist(), strict=False))


def choose_combination(
    combinations: dict[str, list[Outcome]], run: str, left: Sequence[RunResult]
) -> tuple[str, bool, float, str]:
    """Return the best combination, whether it is above chance, its validation, and which are, in words."""
    ranks = {}
    for name, part in combinations.items():  # who abstains counts as the benchmark, but comes last
        validation = np.nan_to_num([one.validation for one in part]).mean()
        ranks[name] = not all(one.abstains for one in part), validation
    best = max(ranks, key=ranks.get)
    if not ranks[best][0] or len(combinations) + len(left) == 1:
        return best, *ranks[best], ""
    files = [run_folder(f"{run}/{one.name}") / "last.pt" for one in left]
    states = [feature_reducer.load_checkpoint(file, AgentState) for file in files if file.exists()]
    names, p_values = combinations_above_chance(combinations, [state["progress"] for state in states])
    best = max(names or ranks, key=ranks.get)
    if math.isnan(p_values[best]):  # too few days to tell
        return best, *ranks[best], ""
    text = f"above chance among all: {', '.join(names) or 'none'}; {best}: p = {p_values[best]:.3f}"
    return best, best in names, ranks[best][1], text


def test_as_one(part: list[Outcome], folds: dict[int, Data]) -> tuple[Setup, Backtest]:
    """Test runs as one agent, the ensemble of each fold's seeds; return its last setup, and the account."""
    orders: list[np.ndarray] = []
    for fold, runs in itertools.groupby(part, lambda one: one.fold):
        agent = combined({one.path: one.agent for one in runs})
        setup = build_setup(folds[fold], *modules_of(agent, folds[fold].device), agent["hold_bars"])
        # an order sets all weights, so the fold before is enough to know what is held
        before = account_of(setup, orders[-1], setup.spans["test"][0]) if orders else None
        orders.append(agent_orders(setup, "test", before))
    return setup, account_of(setup, np.concatenate(orders), setup.spans["test"][1])


def test_combination(
    outcomes: list[Outcome], run: str, load: Callable[..., Data]
) -> tuple[Setup, Backtest, list[RunResult]]:
    """Test the seeds of a combination, and its agent; return the agent's setup and account, and results."""
    agents, accounts = {one.fold: one.agent for one in outcomes}, {}  # seeds have the same windows
    folds = {fold: load(agent, agent["market"]["splits"]) for fold, agent in agents.items()}
    for seed in SEEDS:
        part = [one for one in outcomes if one.seed == seed]
        setup, accounts[seed] = test_as_one(part, folds)
        if len(part) == 1:  # a fold alone is no account
            portfolio_env.append_trial(DATA_DIR / "runs" / "trials.csv", part[0].trial, accounts[seed])
    account = accounts[SEEDS[0]]
    if len(SEEDS) > 1:
        setup, account = test_as_one(outcomes, folds)
    if len(outcomes) > 1:  # an agent of its own
        trial = {"run": f"{run}/{outcomes[0].combination}".rstrip("/"), "seed": " ".join(map(str, SEEDS))}
        trial["validation_bp_day"] = statistics.fmean(one.validation for one in outcomes)
        portfolio_env.append_trial(DATA_DIR / "runs" / "trials.csv", outcomes[0].trial | trial, account)
    return setup, account, [replace(one, result=accounts[one.seed]) for one in outcomes]


def read_rungs(run: str) -> list[dict[str, float]]:
    """Return the validations of all that reached each rung of a search."""
    path = run_folder(run) / _RANKS
    return read_json(path, list[dict[str, float]]) if path.exists() else []


def search_runs(
    plans: list[Plan], run: str, flags: dict[str, object], start: Callable, stop: feature_reducer.StopSignal
) -> tuple[list[Plan], list[RunResult], dict[str, int]]:
    """Train all draws a little: the third that validates best goes on, at each of _RUNGS, as `choose_hold`.

    Who ends with an error is out. Returns who goes on, who does not, and exit codes; where a run could not
    end, none goes on.
    """
    rungs, left = read_rungs(run), []
    for number, share in enumerate(_RUNGS):
        if number == len(rungs):
            dead = run_all(plans, run, flags | {"STOP_AT": share}, start, stop)
            if stop.exit_code or set(dead.values()) - {1} or len(dead) == len(plans):
                return [], [], dead
            trials = portfolio_env.read_trials(DATA_DIR / "runs" / "trials.csv")
            growth = trials.set_index("run")["validation_bp_day"].to_dict()  # the newest of a name
            growth |= {f"{run}/{name}": -math.inf for name in dead}
            rungs.append({plan.name: growth[f"{run}/{plan.name}"] for plan in plans})
            portfolio_env.replace_text(run_folder(run) / _RANKS, json.dumps(rungs))  # a resume reads them
        growth, parts = rungs[number], itertools.groupby(plans, lambda plan: plan.combination)
        ranks = {name: statistics.fmean(growth[plan.name] for plan in part) for name, part in parts}
        best = sorted(ranks, key=ranks.get, reverse=True)[: math.ceil(len(ranks) / 3)]
        best = [name for name in best if ranks[name] > -math.inf]
        out = [plan for plan in plans if plan.combination not in best]
        for plan in out:
            path = [rung[plan.name] for rung in rungs[: number + 1]]
            left.append(RunResult(plan.name, plan.combination, plan.seed, path[-1], rungs=path))
        plans = [plan for plan in plans if plan.combination in best]
    return plans, left, {}


def conclude_several(
    plans: list[Plan], run: str, load: Callable[..., Data], left: Sequence[RunResult] = ()
) -> int:
    """Keep the combination that validates best as best.pt, test all, report, with what a search `left`."""
    ended = itertools.groupby([outcome_of(plan, run) for plan in plans], lambda one: one.combination)
    combinations = {name: list(part) for name, part in ended}
    best, above, validation, corrected = choose_combination(combinations, run, left)
    if not above:
        equal = {"abstains": True}
        combinations[best] = [replace(one, **equal, agent=one.agent | equal) for one in combinations[best]]
    links = DATA_DIR / "checkpoints"
    saver = feature_reducer.Saver(SAVE_MINUTES, links)
    agent = combined({one.path: one.agent for one in combinations[best][-len(SEEDS) :]})  # of the last fold
    if saver.write(run_folder(run) / "best.pt", agent | {"run": run}):
        for name in ("pretrained.pt", "final.pt", "last.pt", "refit.pt"):  # several runs have none
            if (links / name).is_symlink():
                (links / name).unlink()
    figure = f"{validation:+.1f} bp/day over the benchmark {best}".rstrip()
    none = f"none of {len(plans) + len(left)} runs found anything above chance"
    lines = f"run: {run}", f"best validation: {figure if above else none}", corrected
    print(*filter(None, lines), f"checkpoints: {run_folder(run)}", sep="\n")
    if not TEST:
        return saver.exit_code()
    accounts, results = {}, []
    for name, part in combinations.items():
        setup, accounts[name], tested = test_combination(part, run, load)
        results += tested
        if name == best:
            best_setup = setup
    chosen = combinations[best]
    folds = len(chosen) // len(SEEDS)
    what = [f"ensemble of {len(SEEDS)} seeds"] * (len(SEEDS) > 1) + [f"{folds} folds"] * (folds > 1)
    changed = json.loads(chosen[0].trial["changed"])
    for name in changed.keys() & {"SEEDS", "FOLD", "SCALE", "GRID", "SEARCH"}:
        del changed[name]
    headline = portfolio_env.agent_name(", ".join(what) or "best", not above)
    report(
        best_setup, DATA_DIR / "reports" / run, {headline: accounts[best]}, "test", DATA_DIR / "runs", best,
        run=run, scale=SCALE, seeds=SEEDS, constants=changed, abstains=not above, best=best,
        runs=[*results, *left], ensembles=accounts if len(SEEDS) > 1 else {}, choice=corrected,
        importance=importance(best_setup) if above else None,
    )  # fmt: skip
    return saver.exit_code()


def open_several(plans: list[Plan], run: str) -> Path:
    """Make ready to start several runs, or to go on with them; return the folder of their features."""
    last, pin = run_folder(run) / "last.pt", shared_features(f"{run}/")
    if RESUME and (last.exists() or not pin):
        raise UserError(f"{run} is not several runs to go on with: leave --resume, or --run, out")
    folders = {run_folder(f"{run}/{plan.name}") for plan in plans}
    if RESUME and any((folder / "last.pt").exists() for folder in folders):
        return pin
    with getData.features_lock(DATA_DIR):
        _, footer = getData.load_prices(DATA_DIR)
        reducer = DATA_DIR / "checkpoints" / "feature_reducer.pt"
        if not plans[0].point and (saved := find_reducer(reducer)):  # a grid may vary what it must fit
            feature_reducer.check_columns(saved, footer)
            feature_reducer.check_market(saved, footer)
        wanted = (REDUCER == "checkpoint" or "REDUCER" in GRID + SEARCH) and not WALK_FORWARD
        feature_reducer.pin_features(DATA_DIR, last, [reducer] * (wanted and reducer.exists()))
    if not RESUME:  # earlier runs of these names, and seeds that an ensemble would have too
        old = [one.parent.glob("seed-*/*.pt") if len(SEEDS) > 1 else one.glob("*.pt") for one in folders]
        old += [(DATA_DIR / "runs" / run).rglob(name) for name in ("metrics.csv", "output.txt")]
        for file in {last, last.with_name(_RANKS), *itertools.chain(*old)}:
            file.unlink(missing_ok=True)
    feature_reducer.drop_other_pins(last, footer)
    return shared_features(f"{run}/")


def train_several(flags: dict[str, object], run: str, load: Callable[..., Data]) -> int:
    """Train all runs that the constants ask for, test them, and report; return the exit code."""
    left, dead = [], dict[str, int]()
    with ray_runs() if ENGINE == "ray" else local_runs() as start:
        stop, plans = feature_reducer.StopSignal(), plan_runs()
        data_dir = open_several(plans, run)
        constants = json.dumps(feature_reducer.fixed_constants(globals()))
        portfolio_env.replace_text(run_folder(run) / _SEVERAL, constants)  # what a resume needs
        print(f"runs: {len(plans)} of {run}, {ENGINE}", flush=True)
        if SEARCH:
            plans, left, dead = search_runs(plans, run, flags, start, stop)
        dead = dead or run_all(plans, run, flags, start, stop)
    go_on = feature_reducer.resume_command(globals(), flags | {"RUN": run})
    if stop.exit_code:
        print(f"stopped; go on with: {go_on}")
        return stop.exit_code
    stop.close()
    incomplete = {plan.combination for plan in plans if plan.name in dead}
    whole = [plan for plan in plans if plan.combination not in incomplete]
    code = conclude_several(whole, run, partial(load, data_dir), left) if whole else 0
    if not dead:
        return code
    print(f"go on with: {go_on}")
    codes = set(dead.values())
    return max(codes) if len(codes) == 1 and max(codes) > 0 else 1


# ------------------------------------------------------------------------------------------------------ power


def informed_rule(to_come: np.ndarray, start: int, hold_bars: int, threshold: float) -> portfolio_env.Policy:
    """Return the policy that knows what the planted drift has still to bring each coin [T, N], in logs.

    It is -1 where a coin is absent. Every `hold_bars` from `start` on it moves all into the coin, or cash,
    with most to come, if by over the `threshold` more than what it holds; until then it has equal weights.
    """
    assets = np.eye(to_come.shape[1] + 1)

    def decide(row: int, held: np.ndarray) -> np.ndarray | None:
        if (row - start) % hold_bars:
            return None
        scores = np.append(0.0, to_come[row])
        if scores.max() - scores @ held > threshold:
            return assets[scores.argmax()]
        there = np.append(not (to_come[row] > -1).any(), to_come[row] > -1)
        return there / there.sum() if row == start else None

    return decide


def planted_outcome(plan: Plan, run: str) -> dict[str, object]:
    """Return what a training made on its planted bars, and what `informed_rule` makes there."""
    outcome, strength = outcome_of(plan, run), float(plan.combination)
    page = json.loads(plan.file(run, "reports", "metrics.json").read_text("utf-8"))
    agent = next(iter(page["skill"].values()))
    table, footer = getData.load_prices(plan.data_dir)
    footer, symbols = footer | {"splits": outcome.agent["market"]["splits"]}, footer["symbols"]
    prices, hold_bars = portfolio_env.price_arrays(table, symbols, DELISTING_LOSS), outcome.hold_bars
    to_come = np.zeros_like(prices[0])
    for coin, symbol in enumerate(symbols if strength else ()):
        bars = getData.read_frame(DATA_DIR / "ohlcv" / f"{symbol}.parquet")
        drift = getData.drift_to_come(symbol, bars, strength, plan.seed)
        to_come[:, coin] = drift.reindex(table.index).ffill().fillna(0.0)
    present = getData.members_of(table, symbols)
    if present is not None:
        to_come[~present] = -1.0
    rows = {split: portfolio_env.split_rows(table.index, footer, split, FILL) for split in ("train", "test")}
    trading = {"cost": FEE_RATE + SLIPPAGE_RATE, "fill": FILL, "present": present}
    trading["limits"] = portfolio_env.Limits(MAX_WEIGHT, MIN_CASH, NO_TRADE_BAND)

    def growth(threshold: float, split: str = "train") -> float:
        rule = informed_rule(to_come, rows[split][0], hold_bars, threshold)
        account = portfolio_env.backtest(rule, *prices, *rows[split], **trading)
        return portfolio_env.metrics(account)["excess_bp_day"]

    fees = -2 * math.log1p(-trading["cost"])  # of a sale and a purchase
    threshold = max((fees * times for times in (math.inf, 8, 4, 2, 1, 0.5)), key=growth)
    hold = np.log(portfolio_env.align_prices(*prices, FILL, hold_bars)[2])
    spread = np.arange(rows["train"][0], min(rows["test"][1], len(hold)), hold_bars)
    there = to_come[spread] > -1
    pair = [np.ma.array(part[spread], mask=~there) for part in (to_come, hold)]
    pair = [(part - part.mean(1, keepdims=True)).compressed() for part in pair]
    return {
        "strength": strength, "seed": plan.seed,
        "found": not (outcome.abstains or math.isnan(outcome.progress.p_value)),
        "p_value": outcome.progress.p_value,
        "validation": outcome.trial["validation_bp_day"], "growth": agent["excess_bp_day"],
        "low": agent["excess_low_bp_day"], "high": agent["excess_high_bp_day"],
        "rule": growth(threshold, "test"),
        "correlation": np.corrcoef(*pair)[0, 1] if strength else math.nan,
    }  # fmt: skip


def measure_power(flags: dict[str, object], run: str) -> int:
    """Train on the bars at hand with known drifts in them, report what is found; return the exit code."""
    folder, page = DATA_DIR.absolute() / "power" / run, DATA_DIR / "reports" / run
    beside, (_, footer) = page.with_name(f"{page.name}-power"), getData.load_prices(DATA_DIR)
    if getData.not_real(footer["source"]) and ":signal=0.0" not in footer["source"]:
        raise UserError(f"{DATA_DIR} has a drift already: use recorded bars, or make some with --signal 0")
    constants = {x: y for x, y in feature_reducer.fixed_constants(globals()).items() if x != "SEEDS"}
    market = {"SOURCE": (DATA_DIR / "ohlcv").resolve(), "SYMBOLS": footer["symbols"]}
    market |= {"SPLITS": footer["split_shares"], "PURGE_DAYS": footer["purge_ms"] // getData.DAY_MS}
    if footer["absent"]:
        names = "MAX_GAP", "UNIVERSE", "MEMBER_DAYS"
        market |= {"ABSENT": "allow"} | {name: footer[name.lower()] for name in names}
    inputs = RUN and (page / "metrics.json").exists() and load_agents(run_folder(run))["market"]["inputs"]
    if RUN and inputs != footer["inputs"]:
        print(f"{page} is not there, or of other bars than {DATA_DIR} has: no verdict will be put on it")
    plans, script = [], [sys.executable, "-u", getData.__file__, *shlex.split(footer["command"])[2:]]
    for seed, strength in itertools.product(SEEDS, sorted({0.0, *STRENGTHS})):
        data_dir = folder / f"{strength:g}-{seed}"
        own = market | {"PLANT": strength or "placebo", "SEED": seed, "DATA_DIR": data_dir}
        command = [*script, *(getData.flag_text(*flag) for flag in own.items())]
        plans.append(Plan(data_dir.name, f"{strength:g}", {}, FOLD, seed, data_dir, command))
    with getData.locked(folder, "power job"):
        of = {name: str(value) for name, value in market.items() if name != "SOURCE"}  # which may move
        begun = folder / "power.json"
        text = json.dumps({"inputs": footer["inputs"], "market": of, "constants": constants})
        if begun.exists() and begun.read_text("utf-8") != text:
            raise UserError(f"{folder} is of other bars or constants: give another --run, or remove it")
        portfolio_env.replace_text(begun, text)
        todo = [plan for plan in plans if not plan.file(run, "reports", "metrics.json").exists()]
        print(f"runs: {len(todo)} of {len(plans)} in {folder}, {ENGINE}", flush=True)
        with ray_runs() if ENGINE == "ray" else local_runs() as start:
            stop = feature_reducer.StopSignal()
            dead = run_all(todo, run, flags, start, stop)
        if dead or stop.exit_code:
            print("the same command goes on")
            return stop.exit_code or 1
        stop.close()
        trainings = pd.DataFrame([planted_outcome(plan, run) for plan in plans])
    power = portfolio_env.publish_power(beside, run, trainings, constants)
    portfolio_env.replace_text(beside / "power.json", json.dumps(power))
    if inputs == footer["inputs"]:
        portfolio_env.show_power(page, power)
    return 0


# ------------------------------------------------------------------------------------------------------- main


def check_constants(given: Iterable[str] = ()) -> None:
    """Raise UsageError for constants that cannot work together, of which some were `given`."""
    batch, cost = NUM_ENVS * STEPS, FEE_RATE + SLIPPAGE_RATE
    first, *rest = RUN.split("/")  # as `plan_runs` has them
    plain = all(re.match("fold-|seed-|[A-Z_]+=", part) and len(os.fsencode(part)) <= 200 for part in rest)
    plain &= "\0" not in RUN and (first not in ("", ".", "..") or not RUN) and len(os.fsencode(first)) <= 100
    wrong = {
        f"FEE_RATE + SLIPPAGE_RATE must be under 1 per side, not {cost}": cost >= 1,
        f"RUN must be a plain name, not {RUN!r}": not plain,
        f"RUN must be another name than {RUN}": re.match(r"trials\.csv|feature_reducer|.*\.pt(/|$)", RUN),
        f"TOKEN_WIDTH {TOKEN_WIDTH} must be divisible by HEADS {HEADS}": TOKEN_WIDTH % HEADS != 0,
        f"MINIBATCH {MINIBATCH} must be within a batch of NUM_ENVS x STEPS = {batch}": batch < MINIBATCH,
        "WALK_FORWARD is a test: it needs TEST": WALK_FORWARD > 0 and not FOLD and not TEST,
        f"FOLD must be one of the WALK_FORWARD {WALK_FORWARD} folds, not {FOLD}": FOLD > WALK_FORWARD,
        f"SEEDS must be different numbers, not {SEEDS}": len(set(SEEDS)) < len(SEEDS),
        "ENGINE = ray is for SEEDS, WALK_FORWARD, GRID and SEARCH": ENGINE == "ray" and not several(),
        "--job power is of one training: name a combination, a fold, as in --run NAME/fold-1": JOB == "power"
        and ((GRID + SEARCH).strip() or (WALK_FORWARD and not FOLD)),
        "HOLD = 0 is chosen by pretraining: PRETRAIN_EPOCHS = 0 needs --hold": HOLD == PRETRAIN_EPOCHS == 0,
        f"HOLDS are for HOLD = 0, which is {HOLD}": HOLD and "HOLDS" in given,
        "REFIT is for one run, as --resume --run NAME/seed-0": REFIT and several(),
        "REFIT comes after the whole of a run: it needs STOP_AT 1": REFIT and STOP_AT < 1,
        "STOP_AT is for one run": STOP_AT < 1 and several(),
        "SEARCH excludes GRID and WALK_FORWARD: leave them out": SEARCH and (GRID or WALK_FORWARD),
        f"TRIALS are of SEARCH, which is {SEARCH!r}": "TRIALS" in given and not SEARCH,
        f"CALL {CALL!r} is no program that is there": CALL and not portfolio_env.can_be_called(CALL),
    }
    if messages := [message for message, is_wrong in wrong.items() if is_wrong]:
        raise UsageError(messages[0])
    plan_runs()


def main(argv: list[str] | None = None) -> int:
    full = dict(globals())
    flags = getData.set_constants(globals(), argv)
    device, amp = feature_reducer.pick_device(DEVICE, AMP)
    if JOB not in ("train", "power"):  # a checkpoint has its own scale
        getData.choose_scale(globals(), "full")
        check_constants(flags)
        if JOB == "paper" and REPORT:
            if unused := sorted(flags.keys() - {"JOB", "DATA_DIR", "CHECKPOINT", "RUN", "REPORT"}):
                raise UsageError(f"{unused[0]} does nothing with --report in --job paper: leave it out")
            periods = {"rebalance_every": portfolio_env.REBALANCE_EVERY, "look_back": portfolio_env.LOOK_BACK}
            portfolio_env.report_paper_account(DATA_DIR, paper_name(), **periods)
            return 0
        jobs = {"signal": print_signal, "paper": partial(keep_paper_account, "CHECKPOINT" in flags)}
        jobs["trials"] = lambda *_: portfolio_env.publish_trials(DATA_DIR)
        return jobs.get(JOB, report_checkpoint)(device, amp)
    name = RUN
    if RESUME and not RUN:  # the run that saved last
        folder = DATA_DIR / "checkpoints"
        states = [path for path in folder.glob("*/**/last.pt") if path.is_file()]
        if not states:
            raise UserError(f"there is no {folder}/*/last.pt; it is written by python train.py")
        name = max(states, key=lambda path: path.stat().st_mtime).relative_to(folder).parts[0]
    before = constants_before(name, flags if RESUME else {}) if RESUME or (RUN and JOB == "power") else {}
    if JOB == "power":
        before.pop("SEEDS", None)
        if "SEEDS" not in flags and len(SEEDS) == 1:
            getData.assign_constants(globals(), {"SEEDS": tuple(range(SEEDS[0], SEEDS[0] + 3))})
    stays = feature_reducer.settle_constants(globals(), flags, device, before)
    check_constants(flags)
    if several():  # "auto" may differ on another machine; Ray gives each run one GPU, which is its first
        getData.assign_constants(globals(), {"DEVICE": device.type if ENGINE == "ray" else str(device)})
    if JOB == "power":
        return measure_power(flags | stays, name or SCALE)
    name = name or f"{SCALE}-{now().translate(str.maketrans('T', '-', ':-Z'))}"
    if several():
        check_combinations(flags, name)
    getData.choose_scale(full, "full")
    fixed = feature_reducer.fixed_constants(globals()).items()
    changed = {name: x for name, x in fixed if x != full[name] and (name in flags or full[name] != "auto")}
    with feature_reducer.training_folder(DATA_DIR, run_folder(name), getData.SEED):
        if several():
            return train_several(flags | stays, name, partial(load_data, device, AMP == "on"))
        if RESUME and any(run_folder(name).glob("refit-*/last.pt")):  # a refit that has begun goes on
            getData.assign_constants(globals(), {"REFIT": True})
        open_one = partial(open_run, device, AMP == "on", flags | stays, changed)
        code = train_run(open_one(name))
        return refit(name, open_one) if code == 0 and REFIT else code


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    getData.run_script(main)
