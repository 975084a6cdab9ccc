"""A portfolio of cash and coins on 5-minute bars: costs, environments, backtest, metrics, baselines, report.

reads   data/features/prices.parquet       (getData.py; without any data a synthetic market is made first)
writes  data/reports/baselines-<split>/    (report.html, metrics.json, series.parquet, trades.csv)

    python portfolio_env.py                      table and page of the baselines, for each split of the data
    python portfolio_env.py --fee-rate 0.0005    the same with another fee
    gymnasium.make("portfolio_env:CryptoPortfolio-v0", data_dir="data", split="train")
    gymnasium.make_vec("portfolio_env:CryptoPortfolio-v0", num_envs=256, hold_bars=12)     (stepped at once)

Weights are [cash, coin 1 ... coin N], not negative, sum 1. A decision t is taken at the close of bar t, on
weights valued at that close. It is filled at f[t], the open of bar t+1 (FILL "next_open") or that same close
("close", optimistic), and held to f[t+1]. Value and benchmark are 1 at the first fill, before its trade.

Returns, costs and turnover are fractions: cost per side of the money that changes hands, turnover of the
value at the fill (coins sold + cash spent on coins, so cost paid = cost x turnover). Letters in shape
comments: T bars, N coins, A = N + 1 assets, E environments, S steps, B any batch.
"""

import asyncio
import base64
import functools
import hashlib
import io
import itertools
import json
import math
import os
import shlex
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from statistics import NormalDist, median
from typing import Any, Literal, NamedTuple

import gymnasium
import jinja2
import markupsafe
import numpy as np
import pandas as pd
import torch
from filelock import FileLock
from gymnasium.vector.utils import batch_space
from torch import Tensor
from tqdm import tqdm

import feature_reducer
import getData
from getData import BARS_PER_DAY, BARS_PER_YEAR, Count, Fraction, Seed, UsageError, UserError

# Files and data
DATA_DIR: Path = getData.DATA_DIR  # holds everything that the scripts read and write; set in getData.py
SEED: Seed = getData.SEED  # of the synthetic market, where there is no data yet; set in getData.py
SPLIT: Literal["train", "validation", "test", "all"] = "all"  # all: one table for each

# Trading
FEE_RATE: Fraction = 0.001  # per side
SLIPPAGE_RATE: Fraction = 0.0  # per side, on top
FILL: Literal["next_open", "close"] = "next_open"  # close is optimistic

# Baselines
REBALANCE_EVERY: Count = 288  # bars between two rebalancings (288 = a day)
LOOK_BACK: Count = 2_016  # bars that inverse volatility and momentum look back over (2,016 = a week)

# (row, weights seen [A]) -> target [A], or None: no order
Policy = Callable[[int, np.ndarray], np.ndarray | None]


# --- accounting ---------------------------------------------------------------------------------------------


def rebalance(weights: Tensor, target: Tensor, cost: float) -> Tensor:
    """Return the share of the value kept, mu [B], when `weights` [B, A] are traded into `target` [B, A].

    mu is the root of  w0 + (1-c) sum max(w_i - mu a_i, 0) - sum max(mu a_i - w_i, 0) / (1-c) = mu a0  (i over
    coins), as in Ormos and Urban (2013) and Jiang, Xu and Liang (2017, arXiv:1706.10059). For a given set of
    sold coins the equation is linear and mu a quotient, so each Newton step is that quotient, and the search
    ends with the exact root when the set no longer changes. The last quotient is taken with gradient and
    gives the implicit gradient of the root in both arguments (at a kink: one of the two one-sided ones).

    Args:
        cost: c, fraction per side.

    Raises:
        ValueError: as `check_cost`.
    """
    check_cost(cost)
    with torch.no_grad():
        sold = weights > target  # mu = 1
        for _ in range(2 * weights.shape[-1]):  # a few rounds; more only for coins within rounding of a kink
            mu = _value_kept(weights, target, sold, cost)
            old_sold, sold = sold, weights > mu[..., None] * target
            if torch.equal(sold, old_sold):
                break
    return _value_kept(weights, target, sold, cost)


def _value_kept(weights: Tensor, target: Tensor, sold: Tensor, cost: float) -> Tensor:
    """Return the root [B] of the cost equation, given which coins are sold: `sold` [B, A]."""
    price = torch.full_like(weights, 1 / (1 - cost)).masked_fill(sold, 1 - cost)
    price[..., 0] = 1  # cash per unit of each asset
    return (price * weights).sum(-1) / (price * target).sum(-1)


def rebalance_one(weights: np.ndarray, target: np.ndarray, cost: float) -> tuple[float, float]:
    """Return value kept and turnover of one portfolio [A] in numpy; the equation of `rebalance`."""
    sold = weights > target
    for _ in range(2 * len(weights)):
        price = np.where(sold, 1 - cost, 1 / (1 - cost))
        price[0] = 1
        mu = (price @ weights) / (price @ target)
        old_sold, sold = sold, weights > mu * target
        if (sold == old_sold).all():
            break
    return float(mu), float(turnover_of(weights, target, mu, cost))


def drift(weights: Any, relatives: Any) -> tuple[Any, Any]:
    """Return weights [..., A] after prices moved by `relatives` [..., A] (cash 1), and the growth [...]."""
    grown = weights * relatives
    growth = grown.sum(-1)
    return grown / growth[..., None], growth


def turnover_of(weights: Any, target: Any, mu: Any, cost: float) -> Any:
    """Return coins sold + cash spent on coins [...], fractions of the value before the trade; torch or numpy.

    Args:
        mu: [..., 1] value kept.
    """
    moved = (weights - mu * target)[..., 1:]
    return (moved.clip(min=0) - moved.clip(max=0) / (1 - cost)).sum(-1)


class WrongWeights(ValueError):
    """Weights that are NaN, infinite, negative, or all zero."""


def weights_from_logits(logits: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Return the weights [..., A] of the coins' logits [..., N]: their softmax, with the cash logit at 0.

    Raises:
        ValueError: another shape. WrongWeights: NaN or infinity.
    """
    if logits.shape != shape:
        raise ValueError(
            f"logits must have the shape {shape}, one per coin, without cash; got {logits.shape}"
        )
    if not np.isfinite(logits).all():
        raise WrongWeights("logits must be finite")
    logits = np.concatenate([np.zeros((*shape[:-1], 1)), logits], axis=-1)
    grown = np.exp(logits - logits.max(-1, keepdims=True))
    return grown / grown.sum(-1, keepdims=True)


def project(target: Any, shape: tuple[int, ...]) -> Any:
    """Divide non-negative numbers of the given shape by their sum over the last axis; torch or numpy.

    Raises:
        ValueError: another shape. WrongWeights: NaN, infinity, a negative number, or all zero.
    """
    if tuple(target.shape) != shape:
        raise ValueError(f"weights must have the shape {shape}, cash first; got {tuple(target.shape)}")
    total = target.sum(-1)[..., None]
    if not bool((target >= 0).all() & (total > 0).all() & (total < np.inf).all()):
        raise WrongWeights("weights must be finite, not negative, and not all zero")
    return target / total


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Refuse a value that is none of the choices.

    Raises:
        ValueError: with the choices.
    """
    if value not in choices:
        wanted = " or ".join(f'"{choice}"' for choice in choices)
        raise ValueError(f"{name} must be {wanted}; got {value!r}")


def check_cost(cost: float) -> None:
    """Refuse a cost that is not a fraction per side.

    Raises:
        ValueError: it is not at least 0 and under 1.
    """
    if not 0 <= cost < 1:
        raise ValueError(f"cost must be a fraction per side, at least 0 and under 1; got {cost}")


def align_prices(
    open_prices: Any, close_prices: Any, fill: str, hold_bars: int = 1
) -> tuple[Any, Any, Any, Any]:
    """Compute fill prices and price relatives for each decision row t, from prices [T, N] (numpy or torch).

    R is the number of rows on which a decision can be filled and held for h = `hold_bars` bars.

    Returns:
        fill_prices f [R+h, N]; gap [R, N] from the close of bar t to f[t]; hold [R, N] from f[t] to f[t+h];
        mark [R, N] from f[t] to the close of bar t+h.

    Raises:
        ValueError: an unknown fill, or prices of a wrong shape or too few.
    """
    check_choice("fill", fill, ("next_open", "close"))
    shape, least = open_prices.shape, hold_bars + 2
    if len(shape) != 2 or shape != close_prices.shape or hold_bars < 1 or len(open_prices) < least:
        raise ValueError(f"prices must be two arrays [T, N], T >= {least}; got {shape}, {close_prices.shape}")
    fill_prices = open_prices[1:] if fill == "next_open" else close_prices
    rows = len(fill_prices) - hold_bars
    gap = fill_prices[:rows] / close_prices[:rows]
    hold = fill_prices[hold_bars:] / fill_prices[:rows]
    mark = close_prices[hold_bars : rows + hold_bars] / fill_prices[:rows]
    return fill_prices, gap, hold, mark


def with_cash(relatives: np.ndarray) -> np.ndarray:
    """Prepend cash, whose relative is always 1, to the relatives of the coins: [R, N] -> [R, A]."""
    return np.concatenate([np.ones((len(relatives), 1)), relatives], axis=1)


class Account:
    """One portfolio in numpy, float64: the accounting of `PortfolioEnv` and `backtest`.

    Attributes:
        weights: [A] at the fill; before the trade until `trade` is called, after it from then on.
        weights_seen: [A] valued at the close at which the next decision is taken.
    """

    def __init__(self, weights: np.ndarray, weights_seen: np.ndarray, cost: float) -> None:
        self.weights, self.weights_seen, self.cost = weights, weights_seen, cost

    def trade(self, target: Any) -> tuple[float, float]:
        """Trade into `target` [A], projected by its sum; return value kept and turnover as fractions.

        Raises:
            ValueError: as `project`; nothing is traded.
        """
        target = project(np.asarray(target, np.float64), self.weights.shape)
        mu, turnover = rebalance_one(self.weights, target, self.cost)
        self.weights = target
        return mu, turnover

    def hold(self, hold: np.ndarray, mark: np.ndarray) -> float:
        """Hold the weights to the next fill and return the growth.

        Args:
            hold: [A] price relatives from this fill to the next.
            mark: [A] from this fill to the close of the next decision.
        """
        self.weights_seen, _ = drift(self.weights, mark)
        self.weights, growth = drift(self.weights, hold)
        return growth


# --- environments -------------------------------------------------------------------------------------------


class VectorPortfolioEnv:
    """Step E portfolios at once in torch, float64, on the device of the prices; all of it is differentiable.

    The benchmark is an equal-weight buy-and-hold of the coins from the first fill on, without costs. A
    portfolio whose value falls under `ruin` is terminated, and keeps its value, with reward 0, to the end.

    Args:
        open_prices, close_prices: [T, N].
        cost: fraction per side.  fill: "next_open" or "close".  reward: "excess" or "growth".
        hold_bars: bars from one decision to the next, without an order in between.

    Attributes:
        rows: number of decision rows with prices to be filled and held at.
        value, benchmark_value: [E] 1 at the start.
        turnover, cost_paid: [E] of the last step, fractions of the value.
        row: [E] of the next decision.
    """

    def __init__(
        self,
        open_prices: Tensor,
        close_prices: Tensor,
        *,
        cost: float,
        fill: str = "next_open",
        reward: str = "excess",
        ruin: float = 0.1,
        hold_bars: int = 1,
    ) -> None:
        check_cost(cost)
        check_choice("reward", reward, ("excess", "growth"))
        prices = open_prices.to(torch.float64), close_prices.to(torch.float64)
        self._fill_prices, gap, hold, mark = align_prices(*prices, fill, hold_bars)
        padded = (torch.nn.functional.pad(part, (1, 0), value=1.0) for part in (gap, hold, mark))
        self._gap, self._hold, self._mark = padded  # [R, A]: cash 1
        usable = torch.isfinite(self._gap * self._hold * self._mark).all(-1)
        self._unusable_before = torch.nn.functional.pad((~usable).cumsum(0), (1, 0))  # [R+1]
        self.cost, self.reward, self.ruin, self.hold_bars = cost, reward, ruin, hold_bars
        self.rows, self.assets = self._hold.shape

    def reset(
        self, start: Tensor, steps: int, weights: Tensor | None = None, where: Tensor | None = None
    ) -> Tensor:
        """Start segments of `steps` decisions at rows `start` [E], and return the weights seen [E, A].

        Args:
            weights: [E, A] held at the close of the first decision; all cash if None.
            where: positions [K] of the portfolios that start, where not all do; `start`, `weights` and what
                is returned are then theirs alone, [K] in place of [E].

        Raises:
            ValueError: a segment leaves the rows that can be traded or has missing prices, or as `project`.
        """
        after = start + (steps - 1) * self.hold_bars + 1  # the row after the last decision
        if steps < 1 or int(start.min()) < 0 or int(after.max()) > self.rows:
            raise ValueError(
                f"segments of {steps} steps must lie within the {self.rows} rows that can be traded"
            )
        if bool((self._unusable_before[after] > self._unusable_before[start]).any()):
            raise ValueError("a segment has missing prices: start after the last coin's listing")
        if weights is None:
            weights = torch.zeros(len(start), self.assets, dtype=torch.float64, device=self._hold.device)
            weights[:, 0] = 1
        weights = project(weights.to(torch.float64), (len(start), self.assets))
        fresh = {
            "row": start,
            "_steps_left": torch.full_like(start, steps),
            "_weights": drift(weights, self._gap[start])[0],  # at the fill, before the trade
            "_first_prices": self._fill_prices[start],  # [E, N]
            "value": torch.ones_like(weights[:, 0]),
            "benchmark_value": torch.ones_like(weights[:, 0]),
            "turnover": torch.zeros_like(weights[:, 0]),
            "cost_paid": torch.zeros_like(weights[:, 0]),
            "_terminated": torch.zeros_like(start, dtype=torch.bool),
        }
        for name, part in fresh.items():
            setattr(self, name, part if where is None else getattr(self, name).index_copy(0, where, part))
        return weights

    def step(self, target: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Trade into `target` [E, A], projected by its sum, and hold it until the next decision.

        Returns:
            weights seen at the next decision [E, A], reward [E], terminated [E], truncated [E].

        Raises:
            RuntimeError: the segment is over. ValueError: as `project`.
        """
        if not self._steps_left.all():
            raise RuntimeError("the segment is over: call reset")
        target = project(target.to(torch.float64), (len(self.row), self.assets))
        mu = rebalance(self._weights, target, self.cost)  # [E]
        turnover = turnover_of(self._weights, target, mu[:, None], self.cost)
        self._weights, growth = drift(target, self._hold[self.row])
        weights_seen, _ = drift(target, self._mark[self.row])

        benchmark_value = (self._fill_prices[self.row + self.hold_bars] / self._first_prices).mean(-1)
        reward = torch.log(mu * growth)
        if self.reward == "excess":
            reward = reward - torch.log(benchmark_value / self.benchmark_value)
        alive = ~self._terminated
        zero = torch.zeros_like(mu)
        reward = torch.where(alive, reward, zero)
        self.value = torch.where(alive, self.value * mu * growth, self.value)
        self.turnover = torch.where(alive, turnover, zero)
        self.cost_paid = torch.where(alive, 1 - mu, zero)
        self.benchmark_value = benchmark_value
        self.row = self.row + self.hold_bars
        self._steps_left = self._steps_left - 1
        self._terminated = self.value < self.ruin
        return weights_seen, reward, self._terminated, ~self._terminated & (self._steps_left == 0)


class Market:
    """Prices, and what an environment sees of them at its decisions; environments of a process share it.

    Args:
        open_prices, close_prices: [T, N].
        times: [T] of the closes, ms since 1970; without them since the first bar.
        data_dir: where prices are from; None: given as arrays.
    """

    def __init__(
        self,
        open_prices: np.ndarray,
        close_prices: np.ndarray,
        times: np.ndarray | None = None,
        data_dir: Path | None = None,
    ) -> None:
        # no copy where torch and rows can be taken from them as they are
        self.open_prices = np.require(open_prices, np.float64, ["C", "W"])
        self.close_prices = np.require(close_prices, np.float64, ["C", "W"])
        bars = getData.BAR_MS * np.arange(len(self.close_prices))
        self.times = bars if times is None else np.asarray(times, np.int64)
        self.data_dir = data_dir

    @functools.cached_property
    def log_returns(self) -> np.ndarray:
        """Close-to-close log returns [T-1, N], float32, clipped to +-10; row t leads from bar t to t+1."""
        return np.diff(np.log(self.close_prices), axis=0).clip(-10, 10).astype(np.float32)


@functools.lru_cache(maxsize=4)
def _stored_market(data_dir: Path, written: int) -> tuple[Market, pd.DatetimeIndex, dict]:
    """Load prices, index and footer of a folder; `written` tells one version from another."""
    frame, footer = getData.load_prices(data_dir)
    times = frame.index.as_unit("ms").asi8
    return Market(*price_arrays(frame, footer["symbols"]), times, data_dir), frame.index, footer


def stored_market(data_dir: Path) -> tuple[Market, pd.DatetimeIndex, dict]:
    """Return the prices of a folder, their index and footer: the same objects until the file is replaced.

    Raises:
        UserError: as `getData.load_prices`.
    """
    data_dir = Path(data_dir).absolute()
    return _stored_market(data_dir, written_at(data_dir / "features" / "prices.parquet"))


def written_at(path: Path) -> int:
    """Return when a file was written, ns since 1970; 0 if it is missing."""
    return path.stat().st_mtime_ns if path.exists() else 0


Encoder = tuple[feature_reducer.FeatureReducer, feature_reducer.FeatureWindows]


@functools.lru_cache(maxsize=4)
def _open_encoder(data_dir: Path, path: Path, written: tuple[int, int]) -> Encoder:
    """Load the reducer of a checkpoint and the windows of a folder that it was trained to encode."""
    saved, device = feature_reducer.load_encoder(path), torch.device("cpu")
    windows, footer = feature_reducer.load_windows(data_dir, saved["window_bars"], device, saved)
    feature_reducer.check_market(saved, footer)
    return feature_reducer.reducer_from_checkpoint(saved, device).requires_grad_(False), windows


def open_encoder(market: Market, checkpoint: str) -> Encoder:
    """Return a reducer and the windows that it encodes: the same objects until their files are replaced.

    Args:
        checkpoint: a file in checkpoints/ of the market's folder, or a path.

    Raises:
        ValueError: prices were given as arrays. UserError: as `feature_reducer.load_encoder`, `load_windows`
            and `check_market`.
    """
    if market.data_dir is None:
        raise ValueError("arrays of prices have neither windows nor latents: give data_dir instead")
    path = feature_reducer.checkpoint_path(market.data_dir, checkpoint)
    written = written_at(path), written_at(market.data_dir / "features" / "prices.parquet")
    return _open_encoder(market.data_dir, path, written)


@functools.lru_cache(maxsize=4)
def encode_rows(encoder: Encoder, first: int, last: int) -> np.ndarray:
    """Return the latents [R, L], float32, of all decisions from one time to another, ms since 1970.

    Raises:
        UserError: a window is incomplete.
    """
    reducer, windows = encoder
    rows = windows.rows((first, last + 1))
    parts = tqdm(rows.split(512), desc="encode", unit="batch", disable=None, leave=False)
    with torch.no_grad():
        return torch.cat([reducer.encoder(windows(part)) for part in parts]).numpy()


class PortfolioEnv(gymnasium.Env):
    """One portfolio as a gymnasium environment; the same accounting as VectorPortfolioEnv, up to rounding.

    Observation: Box, float32: what `observation` names, then the weights held now [A].
        "returns": close-to-close log returns of the last `look_back` bars [look_back * N], oldest first, all
        coins of a bar together, clipped to +-10. "windows": the normalised window [D] of feature_reducer.py.
        "latents": its code [L] by the encoder of `checkpoint`; all decisions are encoded once, when the first
        environment of the process is made.
    Action: Box. "weights": [A] non-negative numbers, which are divided by their sum. (The box starts slightly
        above 0, so that a library that clips into it never sends all zeros. Single zeros are accepted.)
        "logits": [N] one per coin; the weights are their softmax with the cash logit at 0.
    Reward: log growth of the value net of costs, minus that of the benchmark if `reward` is "excess".
    Episode end: terminated when the value falls under `ruin`, truncated after `steps` decisions.
    info: row and time (close of the bar of the next decision, ms since 1970, UTC) as int64; value,
        benchmark_value, turnover, cost_paid of the last step, and weights [A], in float64.

    Args:
        open_prices, close_prices: [T, N]; without them the `split` of `data_dir`, whose prices the
            environments of a process share.
        times: [T] of the closes of these arrays, ms; without them since the first bar.
        split: "train", "validation", "test" or "all".
        cost: fraction per side; None: FEE_RATE + SLIPPAGE_RATE.
        fill: "next_open" or "close".  reward: "excess" or "growth".
        ruin: value under which the episode is terminated.  steps: decisions until it is truncated.
        hold_bars: bars from one decision to the next, without an order in between.
        look_back: bars of "returns".  random_weights: start from random weights instead of cash.
        checkpoint: of "latents" and "windows": feature_reducer.pt, or one of train.py's, such as best.pt; in
            data_dir/checkpoints, or a path.
        render_mode: "rgb_array": `render` draws value and weights of the episode so far; or None.

    Raises:
        ValueError: an argument is wrong, or prices are missing or too few. UserError: data_dir has no
        complete data, or no reducer that fits them.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}

    def __init__(
        self,
        open_prices: np.ndarray | None = None,
        close_prices: np.ndarray | None = None,
        *,
        times: np.ndarray | None = None,
        data_dir: str | Path = DATA_DIR,
        split: str = "train",
        cost: float | None = None,
        fill: str = FILL,
        reward: str = "excess",
        ruin: float = 0.1,
        steps: int = 288,
        hold_bars: int = 1,
        look_back: int = 48,
        random_weights: bool = False,
        action: str = "weights",
        observation: str = "returns",
        checkpoint: str = "feature_reducer.pt",
        render_mode: str | None = None,
    ) -> None:
        cost = FEE_RATE + SLIPPAGE_RATE if cost is None else cost
        check_cost(cost)
        check_choice("reward", reward, ("excess", "growth"))
        check_choice("fill", fill, ("next_open", "close"))
        check_choice("action", action, ("weights", "logits"))
        check_choice("observation", observation, ("returns", "latents", "windows"))
        if render_mode is not None:
            check_choice("render_mode", render_mode, self.metadata["render_modes"])
        if open_prices is None or close_prices is None:
            self.market, index, footer = stored_market(Path(data_dir))
            first, stop = split_rows(index, footer, split, fill)
        else:
            self.market = Market(open_prices, close_prices, times)
            first, stop = 0, len(self.market.close_prices)
        opens, self._close_prices = self.market.open_prices, self.market.close_prices
        self._fill_prices = opens[1:] if fill == "next_open" else self._close_prices
        self.cost, self.fill, self.reward, self.ruin = cost, fill, reward, ruin
        self.steps, self.hold_bars = steps, hold_bars
        self.random_weights, self.action, self.render_mode = random_weights, action, render_mode
        coins = self._close_prices.shape[1]
        self.assets = coins + 1
        before = look_back if observation == "returns" else 0
        self.first_row = max(first, before)
        # the last one to start at: all is held within the split and the prices
        self.last_row = min(stop, len(self._fill_prices) - 1) - steps * hold_bars
        if min(steps, hold_bars, look_back) < 1 or self.last_row < self.first_row:
            raise ValueError(
                f"look_back {look_back} and {steps} steps of {hold_bars} bars must be at least 1 and fit "
                f"into {stop - first} rows"
            )
        used = slice(self.first_row - before, self.last_row + steps * hold_bars + 1)
        if not (np.isfinite(self._fill_prices[used]).all() and np.isfinite(self._close_prices[used]).all()):
            raise ValueError("prices are missing: start after the last coin's listing")
        self.observe_market = self._observer(observation, look_back, checkpoint)
        seen = len(self.observe_market(self.first_row))
        bound = 10.0 if observation == "returns" else np.inf
        high = np.append(np.full(seen, bound), np.ones(self.assets)).astype(np.float32)
        self.observation_space = gymnasium.spaces.Box(np.where(high > 1, -high, 0), high, dtype=np.float32)
        if action == "weights":
            self.action_space = gymnasium.spaces.Box(1e-8, 1.0, (self.assets,), dtype=np.float32)
        else:
            self.action_space = gymnasium.spaces.Box(-10.0, 10.0, (coins,), dtype=np.float32)
        self._over = True

    def _observer(
        self, observation: str, look_back: int, checkpoint: str
    ) -> Callable[[Any], np.ndarray]:  # fmt: skip
        """Return the function from a row, or rows [B], to what is seen of the market then: [D] or [B, D]."""
        first, last = self.first_row, self.last_row + self.steps * self.hold_bars
        if observation == "latents":
            encoder = open_encoder(self.market, checkpoint)
            latents = encode_rows(encoder, int(self.market.times[first]), int(self.market.times[last]))
            return lambda rows: latents[rows - first]
        if observation == "windows":
            _, windows = open_encoder(self.market, checkpoint)
            windows.rows(self.market.times[[first, last]])
            return lambda rows: windows(torch.as_tensor(rows).view(-1)).numpy().reshape(*np.shape(rows), -1)
        returns = self.market.log_returns  # [T-1, N]
        coins = returns.shape[1]
        view = np.lib.stride_tricks.sliding_window_view(returns.ravel(), look_back * coins)[::coins]
        return lambda rows: view[rows - look_back]

    def draw(
        self, rng: np.random.Generator, size: tuple[int, ...], options: dict | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Draw rows to start at [*size] and weights held there [*size, A], or take those of `options`.

        Raises:
            ValueError: an unknown option, a start out of range, or as `project`.
        """
        options = options or {}
        if unknown := options.keys() - {"start", "weights"}:
            raise ValueError(f'reset options are "start" and "weights"; got {min(unknown)!r}')
        start = rng.integers(self.first_row, self.last_row + 1, size)
        equal = np.ones(self.assets)
        weights = rng.dirichlet(equal, size) if self.random_weights else np.zeros((*size, self.assets))
        weights[..., 0] += 0 if self.random_weights else 1
        start = np.array(np.broadcast_to(options.get("start", start), size), np.int64)
        if not ((start >= self.first_row) & (start <= self.last_row)).all():
            raise ValueError(f"start must be a row from {self.first_row} to {self.last_row}; got {start}")
        weights = np.asarray(options.get("weights", weights), np.float64)
        return start, project(weights, (*size, self.assets))

    def weights_of(self, action: Any, size: tuple[int, ...]) -> np.ndarray:
        """Return the weights [*size, A] that an action asks for, not projected yet.

        Raises:
            ValueError: as `weights_from_logits`.
        """
        action = np.asarray(action, np.float64)
        return weights_from_logits(action, (*size, self.assets - 1)) if self.action == "logits" else action

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        """Start an episode at a random row, and return observation and info.

        Args:
            options: {"start": row of the first decision, "weights": [A] held at its close}, both optional.

        Raises:
            ValueError: an unknown option, the start is out of range, or as `project`.
        """
        super().reset(seed=seed)
        start, weights_seen = self.draw(self.np_random, (), options)
        self._start = self._row = row = int(start)
        gap = np.append(1.0, self._fill_prices[row] / self._close_prices[row])
        self._account = Account(drift(weights_seen, gap)[0], weights_seen, self.cost)
        self._value = self._benchmark_value = 1.0
        self._over = False
        self._shown: list[dict] = []  # the infos of the episode, where they are drawn
        return self._observe(), self._info(0.0, 0.0)

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        """Trade into the weights of `action`, and hold them for `hold_bars` bars.

        Returns:
            observation, reward, terminated, truncated, info.

        Raises:
            RuntimeError: the episode is over. ValueError: as `project` or `weights_from_logits`.
        """
        if self._over:
            raise RuntimeError("the episode is over: call reset")
        mu, turnover = self._account.trade(self.weights_of(action, ()))
        filled = self._fill_prices[self._row]
        self._row += self.hold_bars
        hold, mark = self._fill_prices[self._row] / filled, self._close_prices[self._row] / filled
        growth = self._account.hold(np.append(1.0, hold), np.append(1.0, mark))
        self._value *= mu * growth
        old_benchmark_value = self._benchmark_value
        self._benchmark_value = float((self._fill_prices[self._row] / self._fill_prices[self._start]).mean())
        reward = float(np.log(mu * growth))
        if self.reward == "excess":
            reward -= float(np.log(self._benchmark_value / old_benchmark_value))
        terminated = bool(self._value < self.ruin)
        truncated = self._row - self._start == self.steps * self.hold_bars and not terminated
        self._over = terminated or truncated
        return self._observe(), reward, terminated, truncated, self._info(turnover, 1 - mu)

    def _observe(self) -> np.ndarray:
        """Return the observation at the close of the current bar."""
        return np.append(self.observe_market(self._row), self._account.weights_seen.astype(np.float32))

    def _info(self, turnover: float, cost_paid: float) -> dict[str, Any]:
        """Return the info of the current bar."""
        info = {
            "row": np.int64(self._row),
            "time": self.market.times[self._row],
            "value": np.float64(self._value),
            "benchmark_value": np.float64(self._benchmark_value),
            "turnover": np.float64(turnover),
            "cost_paid": np.float64(cost_paid),
            "weights": self._account.weights_seen.copy(),
        }
        if self.render_mode:
            self._shown.append(info)
        return info

    def render(self) -> np.ndarray | None:
        """Draw value, benchmark and weights of the episode so far, uint8 [480, 640, 3]; None without a mode.

        Raises:
            RuntimeError: there was no reset.
        """
        if self.render_mode is None:
            return None
        if not hasattr(self, "_shown"):
            raise RuntimeError("nothing to draw yet: call reset")
        shown = {name: np.array([info[name] for info in self._shown]) for name in self._shown[0]}
        figure, (value, weights) = new_figure(2, 1, 4.8, width=6.4, sharex=True)
        value.plot(shown["value"], label=f"value {shown['value'][-1]:.4f}")
        value.plot(shown["benchmark_value"], "k--", label=f"benchmark {shown['benchmark_value'][-1]:.4f}")
        value.legend(fontsize=8, frameon=False, loc="upper left")
        value.set_title(f"{pd.Timestamp(shown['time'][-1], unit='ms'):%Y-%m-%d %H:%M} UTC", fontsize=9)
        weights.stackplot(np.arange(len(shown["row"])), shown["weights"].T, colors=asset_colors(), lw=0)
        weights.set(ylim=(0, 1), xlim=(0, self.steps), xlabel="decision", ylabel="weights, cash lowest")
        return pixels(figure)


class GymVectorEnv(gymnasium.vector.VectorEnv):
    """E portfolios as one gymnasium vector environment, stepped at once by VectorPortfolioEnv.

    It does what `num_envs` synchronous PortfolioEnvs do, to rounding: an episode that ends starts again in
    the same step (AutoresetMode.SAME_STEP), with info["final_obs"] and info["final_info"]. Only the random
    starts differ, since one generator draws them all.

    Args:
        num_envs: E.
        options: those of PortfolioEnv, except render_mode.

    Raises:
        ValueError, UserError: as PortfolioEnv.
    """

    metadata = {"autoreset_mode": gymnasium.vector.AutoresetMode.SAME_STEP, "render_modes": []}

    def __init__(self, num_envs: int = 1, **options: Any) -> None:
        if options.get("render_mode") is not None:
            raise ValueError("portfolios that are stepped at once are not drawn: leave render_mode out")
        if num_envs < 1:
            raise ValueError(f"num_envs must be at least 1; got {num_envs}")
        self._one = one = PortfolioEnv(**options)  # spaces, starts and observations
        self.num_envs = num_envs
        self.autoreset_mode = self.metadata["autoreset_mode"]  # where SyncVectorEnv has it, and TorchRL looks
        self.single_observation_space, self.single_action_space = one.observation_space, one.action_space
        self.observation_space = batch_space(one.observation_space, num_envs)
        self.action_space = batch_space(one.action_space, num_envs)
        prices = torch.from_numpy(one.market.open_prices), torch.from_numpy(one.market.close_prices)
        self._portfolios = VectorPortfolioEnv(
            *prices, cost=one.cost, fill=one.fill, reward=one.reward, ruin=one.ruin, hold_bars=one.hold_bars
        )
        self._over = True

    @torch.no_grad()
    def reset(
        self, *, seed: int | None = None, options: dict | None = None
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Start an episode in each environment, and return observations [E, D] and infos.

        Args:
            options: {"start": rows [E] of the first decision, "weights": [E, A] held there}, both optional.

        Raises:
            ValueError: as `PortfolioEnv.reset`.
        """
        super().reset(seed=seed)
        drawn = self._one.draw(self.np_random, (self.num_envs,), options)
        start, weights = map(torch.from_numpy, drawn)
        self._weights = self._portfolios.reset(start, self._one.steps, weights).numpy()
        self._over = False
        return self._observe(), self._info()

    @torch.no_grad()
    def step(
        self, actions: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Step all portfolios; those that end start again.

        Args:
            actions: [E, A] weights or [E, N] logits.

        Returns:
            observations [E, D], rewards, terminated, truncated [E], infos.

        Raises:
            RuntimeError: before a reset. ValueError: as `PortfolioEnv.step`.
        """
        if self._over:
            raise RuntimeError("no episode has started: call reset")
        target = self._one.weights_of(actions, (self.num_envs,))
        weights, *results = self._portfolios.step(torch.from_numpy(target))
        self._weights = weights.numpy()
        reward, terminated, truncated = (part.numpy() for part in results)
        over = terminated | truncated
        if not over.any():
            return self._observe(), reward, terminated, truncated, self._info()
        ended = np.flatnonzero(over)
        final_obs = np.full(self.num_envs, None, dtype=object)
        final_obs[ended] = list(self._observe()[ended])
        final = {
            "final_obs": final_obs,
            "final_info": self._info(over),
            "_final_obs": over,
            "_final_info": over,
        }
        start, weights = map(torch.from_numpy, self._one.draw(self.np_random, ended.shape, None))
        self._portfolios.reset(start, self._one.steps, weights, where=torch.from_numpy(ended))
        self._weights[ended] = weights
        return self._observe(), reward, terminated, truncated, self._info() | final

    def _observe(self) -> np.ndarray:
        """Return the observations [E, D] at the closes of the current bars."""
        market = self._one.observe_market(self._portfolios.row.numpy())
        return np.concatenate([market, self._weights], axis=1, dtype=np.float32, casting="same_kind")

    def _info(self, known: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """Return the infos [E] of the current bars, and who has them: `known` [E], or all."""
        row = self._portfolios.row.numpy()
        names = "value", "benchmark_value", "turnover", "cost_paid"
        info = {"row": row, "time": self._one.market.times[row]}
        info |= {name: getattr(self._portfolios, name).numpy() for name in names}
        info["weights"] = self._weights.copy()
        known = np.ones(self.num_envs, bool) if known is None else known
        return info | {f"_{name}": known for name in info}


gymnasium.register(
    id="CryptoPortfolio-v0",
    entry_point="portfolio_env:PortfolioEnv",
    vector_entry_point="portfolio_env:GymVectorEnv",
)


# --- backtest and metrics -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Backtest:
    """The results of one policy over S consecutive decisions; value and benchmark are taken at the fills."""

    rows: np.ndarray  # [S] decision rows
    weights: np.ndarray  # [S, A] after the trade
    value: np.ndarray  # [S+1] 1 at the first fill, before its trade
    benchmark: np.ndarray  # [S+1] equal-weight buy-and-hold of the coins, no costs
    turnover: np.ndarray  # [S] fraction of the value at the fill
    cost_paid: np.ndarray  # [S] fraction of the value at the fill
    held: np.ndarray  # [S, A] at the fill, before the trade; equal to weights where there is no order
    gains: np.ndarray  # [S, N] of each coin until the next fill, fraction of the value after the trade


def backtest(
    policy: Policy,
    open_prices: np.ndarray,
    close_prices: np.ndarray,
    start: int,
    stop: int,
    *,
    cost: float,
    fill: str = "next_open",
) -> Backtest:
    """Run `policy` from all cash over the decisions start ... stop-1 on prices [T, N].

    Args:
        policy: (t, weights seen [A]) -> target [A], which is projected by its sum, or None for no order. A
            target equal to the weights seen is an order: the weights have moved by the time of the fill.
        cost: fraction per side.

    Raises:
        ValueError: rows outside the prices, missing prices, or as `project`.
    """
    check_cost(cost)
    fill_prices, _, hold, mark = align_prices(open_prices, close_prices, fill)
    if not 0 <= start < stop <= len(hold):
        raise ValueError(
            f"decisions must lie within rows 0 to {len(hold) - 1} of the prices; got {start} to {stop - 1}"
        )
    hold, mark = with_cash(hold[start:stop]), with_cash(mark[start:stop])  # [S, A]
    if not (np.isfinite(hold).all() and np.isfinite(mark).all()):
        raise ValueError(f"prices are missing between rows {start} and {stop}")
    steps, assets = hold.shape
    weights, held, value = np.empty((steps, assets)), np.empty((steps, assets)), np.ones(steps + 1)
    turnover, cost_paid = np.zeros(steps), np.zeros(steps)
    account = Account(np.eye(assets)[0], np.eye(assets)[0], cost)
    for step in range(steps):
        held[step] = account.weights
        target = policy(start + step, account.weights_seen)
        mu = 1.0
        if target is not None:
            mu, turnover[step] = account.trade(target)
            cost_paid[step] = 1 - mu
        weights[step] = account.weights
        value[step + 1] = value[step] * mu * account.hold(hold[step], mark[step])
    benchmark = (fill_prices[start : stop + 1] / fill_prices[start]).mean(1)
    gains = weights[:, 1:] * (hold[:, 1:] - 1)
    return Backtest(np.arange(start, stop), weights, value, benchmark, turnover, cost_paid, held, gains)


def weights_seen(
    result: Backtest, open_prices: np.ndarray, close_prices: np.ndarray, fill: str
) -> np.ndarray:
    """Return the weights [1, A] at the close of the bar after the account's last, of the next decision."""
    row = result.rows[-1]
    price = open_prices[row + 1] if fill == "next_open" else close_prices[row]  # of the last row's fill
    weights, _ = drift(result.weights[-1:], with_cash((close_prices[row + 1] / price)[None]))
    return weights


def metrics(result: Backtest) -> dict[str, float]:
    """Compute the usual figures as fractions, not percentages; a ratio whose denominator is 0 is 0.

    growth: log of the last value; growth_bp_day, growth_year: the same per day in basis points, and per year.
    sharpe, sortino: mean of the *simple* returns per bar over their standard deviation (downside deviation
    from 0), times sqrt(bars per year), risk-free rate 0. max_drawdown: largest fall from a peak, as a
    fraction. calmar: compound annual return / max_drawdown. turnover_day: mean per day, both sides counted.
    cost_paid: sum over steps of fractions of the value. hit_rate: share of bars with more growth than the
    benchmark. excess_bp_day: log growth over the benchmark per day.
    """
    returns = result.value[1:] / result.value[:-1] - 1  # [S]
    bars = len(returns)
    days = bars / BARS_PER_DAY
    growth, benchmark_growth = np.log(result.value[-1]), np.log(result.benchmark[-1])
    deviation = returns.std(ddof=1) if bars > 1 else 0.0
    downside = np.sqrt(np.mean(np.minimum(returns, 0) ** 2))
    drawdown = np.max(1 - result.value / np.maximum.accumulate(result.value))
    annual_return = np.expm1(min(growth / bars * BARS_PER_YEAR, 600.0))  # e^709 is the largest in float64
    beaten = excess_returns(result) > 1e-12  # by more than rounding
    numbers = {
        "days": days,
        "growth": growth,
        "growth_bp_day": 1e4 * growth / days,
        "growth_year": growth / bars * BARS_PER_YEAR,
        "excess_bp_day": 1e4 * (growth - benchmark_growth) / days,
        "sharpe": _ratio(returns.mean(), deviation) * BARS_PER_YEAR**0.5,
        "sortino": _ratio(returns.mean(), downside) * BARS_PER_YEAR**0.5,
        "max_drawdown": drawdown,
        "calmar": _ratio(annual_return, drawdown),
        "turnover_day": result.turnover.mean() * BARS_PER_DAY,
        "cost_paid": result.cost_paid.sum(),
        "hit_rate": beaten.mean(),
    }
    return {name: float(number) for name, number in numbers.items()}


def _ratio(numerator: float, denominator: float) -> float:
    """Divide two numbers; 0 if the denominator is not positive."""
    return numerator / denominator if denominator > 0 else 0.0


def show(number: float | None, form: str) -> str:
    """Return a formatted number, or a dash where there is none."""
    return "–" if number is None or not math.isfinite(number) else f"{number:{form}}"


def show_metric(numbers: dict[str, float], key: str, form: str) -> str:
    """Return one of `metrics` formatted; the size of a ratio beyond 1,000 says nothing and is left out."""
    number = numbers[key]
    if key in ("sharpe", "sortino", "calmar") and abs(number) > 1_000:
        return "> 1,000" if number > 0 else "< -1,000"
    return show(number, form)


def format_table(results: dict[str, dict[str, float]]) -> str:
    """Return the text of a table with one aligned line for each entry of {name: metrics}."""
    columns = {  # heading: (metric, format)
        "growth": ("growth", "+.4f"),
        "bp/day": ("growth_bp_day", "+.1f"),
        "over benchmark": ("excess_bp_day", "+.1f"),
        "Sharpe": ("sharpe", "+.2f"),
        "Sortino": ("sortino", "+.2f"),
        "drawdown": ("max_drawdown", ".1%"),
        "  Calmar": ("calmar", "+.3g"),
        "turnover/day": ("turnover_day", ".4f"),
        "cost paid": ("cost_paid", ".4f"),
        "hit rate": ("hit_rate", ".1%"),
    }
    first = max(len(name) for name in results)
    lines = [" " * first + "".join(f"{heading:>{len(heading) + 3}}" for heading in columns)]
    for name, numbers in results.items():
        cells = (
            show_metric(numbers, key, form).rjust(len(heading) + 3)
            for heading, (key, form) in columns.items()
        )
        lines.append(f"{name:{first}}" + "".join(cells))
    return "\n".join(lines)


# --- how sure, and at what cost -----------------------------------------------------------------------------


def excess_returns(result: Backtest) -> np.ndarray:
    """Return the log growth over the benchmark of each bar [S], on which all statistics below are based."""
    return np.diff(np.log(result.value)) - np.diff(np.log(result.benchmark))


def block_length(returns: np.ndarray) -> float:
    """Choose the mean block of `bootstrap_interval`, in bars, for returns [S].

    It is three days, since positions are held for days, or the optimal block of the *hourly* sums if that is
    longer; at most a fifth of the series, at least a day.

    Optimal: Politis and White, "Automatic block-length selection for the dependent bootstrap", Econometric
    Reviews 23 (2004), corrected by Patton, Politis and White, Econometric Reviews 28 (2009). Their rule looks
    sqrt(S) lags back, on 5-minute bars less than a day. On daily sums of a few weeks it is so noisy that
    simulated 95 % intervals covered 68 to 87 %; blocks of one day covered 78 to 87 % where the excess drifts
    with a half-life of 12 hours.
    """
    hour = BARS_PER_DAY // 24
    hours = len(returns) // hour
    optimal = (
        hour * _optimal_block(returns[: hours * hour].reshape(hours, hour).sum(1)) if hours >= 48 else 0.0
    )
    return max(float(BARS_PER_DAY), min(max(3.0 * BARS_PER_DAY, optimal), len(returns) / 5))


def _optimal_block(series: np.ndarray) -> float:
    """Compute Politis and White's mean block for bootstrapping the mean of `series` [n], n >= 20."""
    n = len(series)
    centred = series - series.mean()
    run = max(5, int(np.log10(n)))  # number of autocorrelations in a row that must be insignificant
    lags = int(np.ceil(np.sqrt(n))) + run
    covariance = np.array([centred[lag:] @ centred[: n - lag] for lag in range(lags + 1)]) / n
    norms = [(centred[lag + 1 :] ** 2).sum() * (centred[: n - lag - 1] ** 2).sum() for lag in range(lags + 1)]
    if not min(norms) > 0:  # constant
        return 1.0
    small = np.abs(covariance) * n < 2 * np.sqrt(np.log10(n) / n) * np.sqrt(norms)
    quiet = [lag for lag in range(lags - run + 1) if small[lag : lag + run].all()]
    last = min(2 * max(quiet[0], 1), lags) if quiet else lags
    lag = np.arange(1, last + 1)
    taper = np.minimum(1, 2 * (1 - lag / last))  # flat top
    slope = 2 * (taper * lag * covariance[1 : last + 1]).sum()
    variance = covariance[0] + 2 * (taper * covariance[1 : last + 1]).sum()  # of the mean, times n
    longest = np.ceil(min(3 * np.sqrt(n), n / 3))
    return float(min(_ratio(slope**2, variance**2) ** (1 / 3) * n ** (1 / 3), longest))


def bootstrap_interval(
    returns: np.ndarray, block: float, *, level: float = 0.95, resamples: int = 2_000, seed: int = 0
) -> tuple[float, float]:
    """Estimate a confidence interval of the mean of `returns` [S] by the stationary bootstrap.

    Politis and Romano, "The stationary bootstrap", Journal of the American Statistical Association 89 (1994):
    blocks of geometric length with mean `block` bars, from random places of the series, which is closed to a
    circle. The sum of a block is a difference of running sums, so a resample copies no data. The deviations
    from the mean are widened by sqrt(m / (m - 1)) and Student's t over the normal quantile, as for m = S /
    block independent observations; otherwise intervals of few blocks are too narrow.

    Returns:
        low, high; NaN where m < 4, too few blocks for an interval.
    """
    count = len(returns)
    blocks = count / block
    if blocks < 4:
        return np.nan, np.nan
    rng = np.random.default_rng(seed)
    sums = np.append(0.0, np.cumsum(np.tile(returns, 2)))  # [2S+1], two rounds of the circle
    means = np.empty(resamples)
    for resample in range(resamples):
        breaks = np.flatnonzero(rng.random(count, dtype=np.float32) < 1 / block)
        lengths = np.diff(breaks[breaks > 0], prepend=0, append=count)
        starts = rng.integers(count, size=len(lengths))
        means[resample] = (sums[starts + lengths] - sums[starts]).sum() / count
    mean = returns.mean()
    tails = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    low, high = mean + (tails - mean) * np.sqrt(blocks / (blocks - 1)) * _student_over_normal(
        level, blocks - 1
    )
    return float(low), float(high)


def _student_over_normal(level: float, freedom: float) -> float:
    """Return Student's two-sided quantile over the normal one: Abramowitz and Stegun (1964), 26.7.5."""
    z = NormalDist().inv_cdf((1 + level) / 2)
    terms = (
        (z**2 + 1) / 4,
        (5 * z**4 + 16 * z**2 + 3) / 96,
        (3 * z**6 + 19 * z**4 + 17 * z**2 - 15) / 384,
    )
    return 1 + sum(term / freedom**power for power, term in enumerate(terms, start=1))


def sharpe_per_bar(returns: np.ndarray) -> float:
    """Return mean over standard deviation of `returns` [S], not annualised; NaN if they do not vary."""
    deviation = returns.std(ddof=1) if len(returns) > 1 else 0.0
    return float(returns.mean() / deviation) if deviation > 0 else np.nan


def probabilistic_sharpe(returns: np.ndarray, threshold: float = 0.0) -> float:
    """Estimate the probability that the true Sharpe ratio per bar is above `threshold`, given `returns` [S].

    Bailey and Lopez de Prado, "The Sharpe ratio efficient frontier", Journal of Risk 15 (2012):
    Phi((SR - SR*) sqrt(S - 1) / sqrt(1 - skewness SR + (kurtosis - 1) / 4 SR^2)). It assumes independent
    returns; where they are not, the bootstrap interval is more reliable. NaN if the returns do not vary.
    """
    sharpe = sharpe_per_bar(returns)
    if not np.isfinite(sharpe):
        return np.nan
    centred = returns - returns.mean()
    variance = np.mean(centred**2)
    skewness, kurtosis = np.mean(centred**3) / variance**1.5, np.mean(centred**4) / variance**2
    error = np.sqrt((1 - skewness * sharpe + (kurtosis - 1) / 4 * sharpe**2) / (len(returns) - 1))
    return NormalDist().cdf((sharpe - threshold) / error)


def expected_best_sharpe(trial_sharpes: Sequence[float], bars: int) -> float:
    """Return the largest Sharpe ratio per bar to be expected from as many trials without skill.

    Bailey and Lopez de Prado, "The deflated Sharpe ratio", Journal of Portfolio Management 40 (2014), from
    the number of trials and the variance of their ratios. A trial without a result (NaN) counts in the
    number. One trial: 0. With fewer than two results the standard deviation is that of a ratio without
    skill over so many bars, 1 / sqrt(bars - 1) (Lo, "The statistics of Sharpe ratios", 2002).
    """
    trials = len(trial_sharpes)
    if trials <= 1:
        return 0.0
    known = np.array([sharpe for sharpe in trial_sharpes if np.isfinite(sharpe)])
    deviation = known.std(ddof=1) if len(known) > 1 else 1 / np.sqrt(max(bars - 1, 1))
    quantiles = (NormalDist().inv_cdf(1 - share / trials) for share in (1, np.exp(-1)))
    return float(deviation * np.dot((1 - np.euler_gamma, np.euler_gamma), list(quantiles)))


def replay(result: Backtest, cost: float) -> Backtest:
    """Recompute a result for the same trades at another `cost` per side.

    Weights, seen or held, do not depend on costs, so this is what the same policy would have done at that
    cost (unless it uses the cost itself, as the hindsight optimum does).
    """
    held, weights = torch.from_numpy(result.held), torch.from_numpy(result.weights)
    mu = rebalance(held, weights, cost)  # [S], 1 where there is no order
    turnover = turnover_of(held, weights, mu[:, None], cost).numpy()
    factors = result.value[1:] / result.value[:-1] / (1 - result.cost_paid) * mu.numpy()
    value = np.append(1.0, np.cumprod(factors))
    return replace(result, value=value, turnover=turnover, cost_paid=1 - mu.numpy())


def cost_sweep(result: Backtest, costs: Sequence[float]) -> dict[float, float]:
    """Return the log growth over the benchmark, bp per day, of the same trades at each cost per side."""
    return {cost: metrics(replay(result, cost))["excess_bp_day"] for cost in costs}


def break_even_cost(result: Backtest) -> float:
    """Find the cost per side at which the same trades would grow exactly as much as the benchmark.

    NaN if they grow less even without costs; infinity if they grow more and nothing is ever traded. A
    portfolio that only buys at the start also has a break-even cost, but it says nothing about trading.
    Regula falsi, Illinois variant (Dowell and Jarratt, BIT 11, 1971).
    """
    traded = result.turnover > 0
    held, weights = torch.from_numpy(result.held[traded]), torch.from_numpy(result.weights[traded])
    free = np.log(result.value[-1] / result.benchmark[-1]) - np.log1p(-result.cost_paid).sum()

    def excess(cost: float) -> float:
        return float(free + rebalance(held, weights, cost).log().sum())

    if not free > 0:
        return np.nan
    if not traded.any():
        return np.inf
    low, high = 0.0, 0.999_999
    above, below = free, excess(high)
    last_side = 0
    for _ in range(200):
        cost = (low * below - high * above) / (below - above)
        now = excess(cost)
        if abs(now) < 1e-12 or not low < cost < high:
            break
        side = 1 if now > 0 else -1
        if side > 0:
            low, above, below = cost, now, below / 2 if side == last_side else below
        else:
            high, below, above = cost, now, above / 2 if side == last_side else above
        last_side = side
    return float(cost)


def skill(result: Backtest, trial_sharpes: Sequence[float], costs: Sequence[float] = ()) -> dict[str, Any]:
    """Compute the uncertainty of the growth over the benchmark, and its size at other costs.

    All ratios are of `excess_returns`, except probabilistic_sharpe_plain, which is of the portfolio's own
    returns. excess_low_bp_day and excess_high_bp_day are the ends of the 95 % interval.

    Args:
        trial_sharpes: per bar, of all trials that this one was chosen from, itself included.
        costs: per side, of the sweep.
    """
    returns = excess_returns(result)
    block = block_length(returns)
    low, high = bootstrap_interval(returns, block)
    expected_best = expected_best_sharpe(trial_sharpes, len(returns))
    return {
        "excess_bp_day": 1e4 * BARS_PER_DAY * float(returns.mean()),
        "excess_low_bp_day": 1e4 * BARS_PER_DAY * low,
        "excess_high_bp_day": 1e4 * BARS_PER_DAY * high,
        "block_days": block / BARS_PER_DAY,
        "sharpe_excess_bar": sharpe_per_bar(returns),
        "probabilistic_sharpe": probabilistic_sharpe(returns),
        "probabilistic_sharpe_plain": probabilistic_sharpe(result.value[1:] / result.value[:-1] - 1),
        "trials": len(trial_sharpes),
        "expected_best_sharpe_bar": expected_best,
        "deflated_sharpe": probabilistic_sharpe(returns, expected_best),
        "break_even_cost": break_even_cost(result),
        "cost_sweep_bp_day": cost_sweep(result, costs),
    }


def days_to_tell(result: Backtest) -> tuple[float, float, bool]:
    """Return how long a track record must be to tell its growth over the benchmark from chance.

    Both by the 95 % interval of `bootstrap_interval`, whose width falls with the square root of the length,
    or, where that has too few bars, by the standard error of independent bars (the minimum track record
    length of Bailey and Lopez de Prado 2012 without its terms for skewness and tails), which is narrower.

    Returns:
        bp per day that can be told from chance in as many days as there are; days that a growth of the size
        found would take (infinity where there is none); whether by the interval.
    """
    returns = excess_returns(result)
    low, high = bootstrap_interval(returns, block_length(returns))
    deviation = returns.std(ddof=1) if len(returns) > 1 else math.inf
    enough = math.isfinite(low)
    half = (high - low) / 2 if enough else 1.96 * deviation / math.sqrt(len(returns))
    found = abs(float(returns.mean()))
    days = len(returns) / BARS_PER_DAY
    return 1e4 * BARS_PER_DAY * half, days * (half / found) ** 2 if found > 0 else math.inf, enough


def monthly_returns(value: np.ndarray, times: np.ndarray) -> pd.Series:
    """Return the simple return of each calendar month (UTC, index "2024-01").

    Args:
        value: [S+1]. times: [S] of the decisions, ms.
    """
    months = pd.to_datetime(times, unit="ms").strftime("%Y-%m")
    growth = pd.Series(np.diff(np.log(value))).groupby(np.asarray(months)).sum()
    return np.expm1(growth)


def worst_drawdowns(value: np.ndarray, times: np.ndarray, count: int = 5) -> pd.DataFrame:
    """Return the deepest falls from a peak: depth (fraction), from, lowest, recovered (ms; NaN: not yet).

    Args:
        value: [K]. times: [K] of these values, ms.
    """
    under = value < np.maximum.accumulate(value)
    edges = np.diff(under.astype(int), append=0)
    peaks = np.flatnonzero(edges > 0)  # the last value before each fall
    falls = []
    for peak, last in zip(peaks, np.flatnonzero(edges < 0), strict=True):
        lowest = peak + int(value[peak : last + 1].argmin())
        recovered = times[last + 1] if last + 1 < len(value) else np.nan
        falls.append((1 - value[lowest] / value[peak], times[peak], times[lowest], recovered))
    table = pd.DataFrame(falls, columns=["depth", "from", "lowest", "recovered"], dtype=float)
    return table.nlargest(count, "depth").reset_index(drop=True)


def daily_returns(value: np.ndarray, times: np.ndarray) -> pd.Series:
    """Return the simple returns of the whole days (UTC) among decisions at `times` [S], ms; value: [S+1]."""
    growth = pd.Series(np.diff(np.log(value)), index=pd.to_datetime(times, unit="ms").floor("D"))
    days = growth.groupby(level=0).agg(["sum", "count"])
    return np.expm1(days["sum"][days["count"] == BARS_PER_DAY])


def profit_per_coin(result: Backtest) -> np.ndarray:
    """Return what each coin made [N] and what the costs took (last), fractions of the value at the start.

    They sum up to the last value - 1.
    """
    value = result.value[:-1]
    coins = (value * (1 - result.cost_paid)) @ result.gains
    return np.append(coins, -(value * result.cost_paid).sum())


def rolling_excess(result: Backtest, bars: int) -> tuple[np.ndarray, np.ndarray]:
    """Return growth over the benchmark, bp per day, and its yearly Sharpe ratio over the last `bars` bars.

    Both are [S]; the first `bars` - 1 are NaN, and so is the ratio where the excess does not vary.
    """
    rolling = pd.Series(excess_returns(result)).rolling(bars)
    mean, deviation = rolling.mean(), rolling.std()
    sharpe = mean / deviation.where(deviation > 1e-12) * BARS_PER_YEAR**0.5
    return (_BP_DAY * mean).to_numpy(), sharpe.to_numpy()


# --- baselines ----------------------------------------------------------------------------------------------

_HINDSIGHT = "hindsight optimum"  # the only one that knows the future


def baselines(
    open_prices: np.ndarray,
    close_prices: np.ndarray,
    start: int,
    stop: int,
    *,
    cost: float,
    fill: str = "next_open",
    rebalance_every: int,
    look_back: int,
) -> dict[str, Backtest]:
    """Run every baseline, and the hindsight optimum, which no policy can beat; the rest as `backtest`."""
    policies = baseline_policies(close_prices, start, rebalance_every=rebalance_every, look_back=look_back)
    policies[_HINDSIGHT] = hindsight(open_prices, close_prices, start, stop, cost=cost, fill=fill)
    return {
        name: backtest(policy, open_prices, close_prices, start, stop, cost=cost, fill=fill)
        for name, policy in policies.items()
    }


def baseline_policies(
    close_prices: np.ndarray, start: int, *, rebalance_every: int, look_back: int
) -> dict[str, Policy]:
    """Return the causal baselines, whose decision t looks only at closes [T, N] up to row t.

    The first three never sell; the others trade at `start` and every `rebalance_every` bars after it.
    """
    coins = close_prices.shape[1]
    equal = np.append(0.0, np.full(coins, 1 / coins))

    def once(target: np.ndarray) -> Policy:
        return lambda t, weights_seen: target if t == start else None

    def regularly(decide: Callable[[int], np.ndarray]) -> Policy:
        return lambda t, weights_seen: decide(t) if (t - start) % rebalance_every == 0 else None

    return {
        "cash": lambda t, weights_seen: None,
        "first coin hold": once(np.eye(coins + 1)[1]),
        "equal-weight hold": once(equal),
        "equal-weight rebalanced": regularly(lambda t: equal),
        "inverse volatility": regularly(inverse_volatility(close_prices, look_back)),
        "time-series momentum": regularly(time_series_momentum(close_prices, look_back)),
        "OLMAR": regularly(olmar(close_prices, rebalance_every)),
        "PAMR": regularly(pamr(close_prices, rebalance_every)),
    }


def inverse_volatility(close_prices: np.ndarray, look_back: int) -> Callable[[int], np.ndarray]:
    """Weight coins by 1 / standard deviation of `look_back` log returns; flat coins get nothing."""

    def decide(t: int) -> np.ndarray:
        deviation = (
            np.diff(np.log(close_prices[max(t - look_back, 0) : t + 1]), axis=0).std(0) if t > 0 else 0.0
        )
        deviation = np.broadcast_to(deviation, close_prices.shape[1])
        inverse = np.divide(1.0, deviation, out=np.zeros(len(deviation)), where=deviation > 0)
        return np.append(0.0, inverse if inverse.any() else np.ones(len(inverse)))

    return decide


def time_series_momentum(close_prices: np.ndarray, look_back: int) -> Callable[[int], np.ndarray]:
    """Hold 1/N in each coin that rose over `look_back` bars and the rest in cash.

    The long side, unscaled, of Moskowitz, Ooi and Pedersen, "Time series momentum", Journal of Financial
    Economics 104 (2012).
    """

    def decide(t: int) -> np.ndarray:
        coins = (close_prices[t] > close_prices[max(t - look_back, 0)]) / close_prices.shape[1]
        return np.append(1 - coins.sum(), coins)

    return decide


def olmar(
    close_prices: np.ndarray, period: int, window: int = 5, epsilon: float = 10.0
) -> Callable[[int], np.ndarray]:
    """Apply on-line moving average reversion (OLMAR-1) with periods of `period` bars.

    Li and Hoi, "On-Line Portfolio Selection with Moving Average Reversion", ICML 2012; the predicted next
    price is the mean of `window` closes.
    """
    portfolio = np.full(close_prices.shape[1], 1 / close_prices.shape[1])

    def decide(t: int) -> np.ndarray:
        nonlocal portfolio
        closes = close_prices[np.maximum(t - period * np.arange(window), 0)]  # [window, N], latest first
        if t >= (window - 1) * period and np.isfinite(closes).all():
            predicted = closes.mean(0) / closes[0]
            spread = predicted - predicted.mean()
            step = _ratio(max(0.0, epsilon - portfolio @ predicted), spread @ spread)
            portfolio = nearest_on_simplex(portfolio + step * spread)
        return np.append(0.0, portfolio)

    return decide


def pamr(close_prices: np.ndarray, period: int, epsilon: float = 0.5) -> Callable[[int], np.ndarray]:
    """Apply passive aggressive mean reversion (PAMR-0) with periods of `period` bars.

    Li, Zhao, Hoi and Gopalkrishnan, "PAMR: Passive aggressive mean reversion strategy for portfolio
    selection", Machine Learning 87 (2012).
    """
    portfolio = np.full(close_prices.shape[1], 1 / close_prices.shape[1])

    def decide(t: int) -> np.ndarray:
        nonlocal portfolio
        relatives = close_prices[t] / close_prices[max(t - period, 0)]
        if t >= period and np.isfinite(relatives).all():
            spread = relatives - relatives.mean()
            step = _ratio(max(0.0, portfolio @ relatives - epsilon), spread @ spread)
            portfolio = nearest_on_simplex(portfolio - step * spread)
        return np.append(0.0, portfolio)

    return decide


def nearest_on_simplex(point: np.ndarray) -> np.ndarray:
    """Project a point [N] to the nearest non-negative numbers of sum 1: Duchi et al., ICML 2008."""
    ordered = np.sort(point)[::-1]
    excess = (np.cumsum(ordered) - 1) / np.arange(1, len(point) + 1)
    return np.maximum(point - excess[ordered > excess][-1], 0)


def hindsight(
    open_prices: np.ndarray, close_prices: np.ndarray, start: int, stop: int, *, cost: float, fill: str
) -> Policy:
    """Return the exact optimum net of costs for known future prices, as a policy to replay."""
    _, _, hold, _ = align_prices(open_prices, close_prices, fill)
    path, _ = hindsight_path(with_cash(hold[start:stop]), cost)
    assets = np.eye(hold.shape[1] + 1)
    changes = np.diff(path, prepend=0) != 0  # from all cash

    def policy(t: int, weights_seen: np.ndarray) -> np.ndarray | None:
        return assets[path[t - start]] if changes[t - start] else None

    return policy


def hindsight_path(relatives: np.ndarray, cost: float) -> tuple[np.ndarray, float]:
    """Find the asset to hold in each step [S] for the largest final value, from cash, and its log growth.

    Final value is linear in the amounts held, since each can be traded regardless of the others, so holding a
    single asset is always optimal. J[i], the log of the final value of one unit in asset i before the trade,
    is the larger of that of keeping it and that of selling it to buy the best asset to enter.

    Args:
        relatives: [S, A] of prices, cash first. cost: fraction per side.
    """
    steps, assets = relatives.shape
    gains = np.log(relatives)
    side = np.full(assets, np.log1p(-cost))  # of selling or buying an asset
    side[0] = 0.0
    entry = np.empty(steps, dtype=np.int64)
    stays = np.empty((steps, assets), dtype=bool)
    future = np.zeros(assets)  # J
    for step in reversed(range(steps)):
        held = gains[step] + future
        entered = side + held
        entry[step] = entered.argmax()
        moved = side + entered[entry[step]]
        stays[step] = held >= moved
        future = np.maximum(held, moved)
    path = np.empty(steps, dtype=np.int64)
    asset = 0
    for step in range(steps):
        asset = asset if stays[step, asset] else entry[step]
        path[step] = asset
    return path, float(future[0])


# --- report: one page that opens offline, and the same numbers as JSON --------------------------------------

_TRAINED_ON, _CHOSEN_ON = "IN SAMPLE: trained on these days", "chosen on these days, so not out of sample"
_REPORT_COSTS = (0.0, 0.0002, 0.0005, 0.001, 0.0025)  # of the sweep, per side
_COLUMNS = {  # of the headline table: metric -> heading, format
    "growth_bp_day": ("growth, bp/day", "+.1f"),
    "excess_bp_day": ("over benchmark, bp/day", "+.1f"),
    "growth": ("log growth", "+.4f"),
    "sharpe": ("Sharpe, yearly", "+.2f"),
    "sortino": ("Sortino, yearly", "+.2f"),
    "max_drawdown": ("largest drawdown", ".1%"),
    "calmar": ("Calmar", "+.3g"),
    "turnover_day": ("turnover/day", ".3f"),
    "cost_paid": ("cost paid", ".2%"),
    "hit_rate": ("bars above benchmark", ".1%"),
}
_BP_DAY = 1e4 * BARS_PER_DAY  # x log return per bar
_PANELS = {  # of the training curves: title -> column: factor
    "log growth, bp/day": {
        "growth_bp_day": 1,
        "reward": _BP_DAY,
        "rolling_reward": _BP_DAY,
        "validation_bp_day": 1,
    },
    "reconstruction, mse": {"reconstruction_loss": 1},
    "reconstruction, share within 0.1 std": {"accuracy": 1},
    "critic loss": {"critic_loss": 1},
    "explained variance of the returns": {"explained_variance": 1},
    "variance taken by the replicas' mean": {"baseline_share": 1},
    "KL of an update": {"approx_kl": 1},
    "clip fraction": {"clip_fraction": 1},
    "entropy, nats": {"entropy": 1},
    "gradient norms": {"policy_grad_norm": 1, "encoder_grad_norm": 1},
    "learning rates": {"policy_rate": 1, "encoder_rate": 1},
}
_NOTES = {  # section of the page -> name of a number: meaning
    "results": {
        "benchmark": "equal-weight hold of the coins, bought at the first fill without costs",
        "over benchmark": "log growth above that of the benchmark",
        "Sharpe, Sortino": "mean of the simple returns per bar / their standard deviation (Sortino: their "
        "downside deviation from zero), times the square root of the bars of a year; risk-free rate 0",
        "Calmar": "compound annual return / largest drawdown",
        "> 1,000": "the days are so few, or the losses so small, that the size of the ratio says nothing; "
        "metrics.json has the number",
        "turnover": "coins sold + cash spent on coins, as a fraction of the value, mean per day",
        "cost paid": "sum over all decisions of the cost as a fraction of the value",
    },
    "statistics": {
        "95 % interval": "of the growth over the benchmark, by the stationary bootstrap (Politis and Romano "
        "1994) of its 5-minute log growth; mean block three days, or longer by the rule of Politis and White "
        "on hourly sums, at most a fifth of the split; none under four days. If it includes zero, no skill "
        "is shown",
        "Sharpe over the benchmark": "mean / standard deviation of the log growth over the benchmark per "
        "bar, annualised; the two probabilities below are of it",
        "probabilistic Sharpe": "probability that the true ratio is above zero, given length, skewness and "
        "tails (Bailey and Lopez de Prado 2012). It assumes independent bars; where it disagrees with the "
        "interval, rely on the interval",
        "deflated Sharpe": "the same above the ratio that the best of so many trials without skill would "
        "show (Bailey and Lopez de Prado 2014); the trials are the rows of data/runs/trials.csv and this "
        "run. It needs trials that differ: where all have nearly the same ratio, it is the probabilistic one",
        "break-even cost": "cost per side at which the same trades would only grow as the benchmark does; a "
        "dash where the agent stays behind the benchmark even at no cost, or is ahead without any trade",
        "at 0, 2, 5, 10, 25 bp per side": "growth over the benchmark of the same trades at another cost",
    },
    "curves": {  # and other columns of metrics.csv
        "portfolio_value, benchmark_value": "portfolio and equal-weight hold after a rollout (start: 1)",
        "reward": "mean log growth over the benchmark per bar; here and on the console in bp per day. "
        "Rollouts explore, and exploring pays fees: on the same bars their reward lies below that of the "
        "deterministic policy, which validation, test and all other parts of this page use",
        "sharpe": "mean / standard deviation of the log returns between decisions, per year",
        "approx_kl, clip_fraction": "how far the update moved the policy; it stops at 1.5 x TARGET_KL",
        "entropy": "of the Gaussian part of the policy, nats",
        "explained_variance": "of the returns by the critic: 1 perfect, 0 no better than a constant",
        "baseline_share": "share of the advantages' variance that the mean of the replicas took out",
        "accuracy": "share of reconstructed values within 0.1 standard deviation",
    },
}
_LOG_TICKS = """
const {start, end} = cb_data, decades = [], digits = []
for (let power = Math.floor(Math.log10(start)); 10 ** power <= end; power++) {
  decades.push(10 ** power)
  digits.push(10 ** power, 2 * 10 ** power, 5 * 10 ** power)
}
for (const marks of [decades, digits]) {
  const inside = marks.filter((mark) => start <= mark && mark <= end)
  if (inside.length > 3) return inside
}
// less than a decade: equal steps
const step = (end - start) / 6, power = 10 ** Math.floor(Math.log10(step))
const round = [1, 2, 5, 10].map((digit) => digit * power).find((size) => size >= step)
const ticks = []
for (let k = Math.ceil(start / round); k * round <= end; k++) ticks.push(k * round)
return ticks
"""
_PAGE = """\
{% macro table(header, rows, style="") %}
<div class="table"><table{% if style %} class="{{ style }}"{% endif %}>
{% if header %}
<tr>{% for cell in header %}<th>{{ cell }}</th>{% endfor %}</tr>
{% endif %}
{% for row in rows %}
<tr{% if row[0] in report.agents %} class="agent"{% endif %}>
{% for cell in row %}<td>{{ cell }}</td>{% endfor %}
</tr>
{% endfor %}
</table></div>
{% endmacro %}
{% macro heat(shades, header, rows) %}
<div class="table"><table class="heat">
<tr>{% for cell in header %}<th>{{ cell }}</th>{% endfor %}</tr>
{% for row in rows %}
{% set colors = shades[loop.index0] %}
<tr><td>{{ row[0] }}</td>
{% for cell in row[1:] %}<td style="background: {{ colors[loop.index0] }}">{{ cell }}</td>{% endfor %}
</tr>
{% endfor %}
</table></div>
{% endmacro %}
{% macro picture(png, caption) %}
<figure>
<img alt="{{ caption }}" src="data:image/png;base64,{{ png }}">
<figcaption>{{ caption }}</figcaption>
</figure>
{% endmacro %}
{% macro explained(name) %}
<details><summary>What the numbers mean</summary>{{ table([], notes[name].items(), "text") }}</details>
{% endmacro %}
<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{{ report.title() }}</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; color: #222; }
body { max-width: 1060px; margin: 2em auto; padding: 0 1em; }
h1 { font-size: 1.6em; } h2 { font-size: 1.2em; margin: 2em 0 .5em; border-bottom: 1px solid #ccc; }
table { border-collapse: collapse; font-size: .87em; font-variant-numeric: tabular-nums; margin: .5em 0; }
th, td { padding: .25em .5em; text-align: right; border-bottom: 1px solid #e5e5e5; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
th:first-child, td { white-space: nowrap; }
tr.agent td { font-weight: 600; }
table.text td { text-align: left; vertical-align: top; }
table.text td:last-child { white-space: normal; overflow-wrap: anywhere; }
div.verdict { background: #f4f4f0; border-left: 4px solid #888; padding: .2em 1em; }
p.note, figcaption, details { color: #555; font-size: .87em; }
details { margin: .5em 0; } details table { font-size: 1em; } summary { cursor: pointer; }
figure { margin: 1em 0; } img { max-width: 100%; }
div.table { overflow-x: auto; } table.heat td { border: 1px solid #fff; }
h3 { font-size: 1em; margin: 1em 0 .3em; } .paper { display: none; }
@media screen and (max-width: 600px) {
th:first-child, td:first-child { white-space: normal; } figure { overflow-x: auto; }
figure img { max-width: none; width: 700px; }
}
@media print {
body { max-width: none; margin: 0; font-size: 11px; print-color-adjust: exact; }
figure, table { break-inside: avoid; } h2, h3, summary { break-after: avoid; }
div.table { overflow-x: visible; } .screen { display: none; } .paper { display: block; }
}
</style>
<noscript><style>.screen { display: none; } .paper { display: block; }</style></noscript>
<script>{{ chart_library }}</script></head><body>
<h1>{{ report.title() }}</h1>
<div class="verdict">
{% for text in verdicts %}
<p>{{ text }}</p>
{% endfor %}
<p class="note">{{ caveat }}</p>
</div>
<figure class="screen"><div id="chart"></div>
<figcaption>Value on a log scale. A click in the legend switches a curve off; drag to zoom. The hindsight
optimum would be off the scale and is left out.</figcaption></figure>
<script type="application/json" id="chart-data">{{ chart }}</script>
<script>Bokeh.embed.embed_item(JSON.parse(document.getElementById("chart-data").textContent));</script>
<div class="paper">
{{ picture(value, "Value on a log scale. The hindsight optimum would be off the scale and is left out.") }}
</div>
<h2>Results</h2>
{{ table(*results) }}
{{ explained("results") }}
{% if report.runs %}
<h2>All runs</h2>
{{ table(*runs) }}
<p class="note">Growth over the benchmark in bp per day: on the validation split, which chose, and on this
one, which chose nothing, with its 95 % interval. An ensemble decides by the mean of its seeds' logits;
its validation is the mean of theirs.</p>
{% endif %}
{% if report.agents %}
<h2>How sure, and at what cost</h2>
{{ table(statistics[0], statistics[1][:8]) }}
<details><summary>More statistics</summary>{{ table(statistics[0], statistics[1][8:]) }}</details>
{{ explained("statistics") }}
<h2>Over time</h2>
{{ picture(rolling, "Rolling figures against the benchmark.") }}
{{ picture(returns, "Returns of whole days, and what each coin made: with the costs, the profit.") }}
<h2>Weights</h2>
{% for name, png in weights.items() %}
{{ picture(png, name) }}
{% endfor %}
<h2>Trading</h2>
{{ picture(trading, "Cost " ~ heading["cost per side"] ~ " of the money that changes hands, per side.") }}
{% endif %}
<h2>Worst drawdowns</h2>
{% for name, falls in drawdowns.items() %}
<h3>{{ name }}</h3>
{{ table(*falls) }}
{% endfor %}
<p class="note">Days from the peak until it is reached again.</p>
<h2>Returns by month</h2>
{{ heat(shades, *months) }}
<p class="note">Simple returns, net of costs; the first and the last month may be incomplete.</p>
{% if curves %}
<h2>Training</h2>
{% for name, png in curves.items() %}
{{ picture(png, name) }}
{% endfor %}
{{ explained("curves") }}
{% endif %}
{% if report.reconstruction %}
<h2>Reconstruction</h2>
{{ table(*reconstruction) }}
<p class="note">Of normalised windows. Accuracy: share of values within 0.1 standard deviation.</p>
{% endif %}
<h2>What was run</h2>
{{ table([], heading.items(), "text") }}
{% if report.constants %}
<h3>Constants that differ from the scripts'</h3>
{{ table([], report.constants.items(), "text") }}
{% endif %}
</body></html>
"""


Table = tuple[Sequence[str], Sequence[Sequence[str]]]  # header, rows


class RunResult(NamedTuple):
    """What one of several runs, or the ensemble of their seeds, did."""

    combination: str  # of a grid's constants: "HOLD=4"
    name: str
    validation: float  # bp per day over the benchmark; of several folds and of an ensemble the mean
    result: Backtest  # on the split of the page


@dataclass(frozen=True)
class Report:
    """The content of a page: results over the same S decisions, and where they come from."""

    run: str
    market: str  # the source of the bars
    split: str  # of the features, or "paper" for an account of later days
    times: np.ndarray  # [S] of the decisions, ms
    symbols: Sequence[str]  # [N]
    cost: float  # per side
    fill: str
    others: dict[str, Backtest]  # baselines
    agents: dict[str, Backtest] = field(default_factory=dict)  # the first one is the headline
    known: str = ""  # how these bars relate to the agents' training (`relation_to_training`)
    trial_sharpes: Sequence[float] = ()  # per bar, over the benchmark, of all trials with this one (`skill`)
    curves: dict[str, pd.DataFrame] = field(default_factory=dict)  # metrics.csv of each training
    remarks: Sequence[str] = ()  # below the verdicts
    reconstruction: dict[str, dict[str, float]] = field(default_factory=dict)  # split -> its metrics
    facts: dict[str, str] = field(default_factory=dict)  # more about the run
    constants: dict[str, object] = field(default_factory=dict)  # those that differ from the script's
    data: str = ""  # `data_sha256` of the features
    runs: Sequence[RunResult] = ()  # of all that were trained together, and of their ensembles

    def heading(self) -> dict[str, str]:
        """Return the lines that say what was run."""
        first, last = pd.to_datetime(self.times[[0, -1]], unit="ms").strftime("%Y-%m-%d %H:%M")
        lines = {
            "run": self.run,
            "market": self.market,
            "split": self.split,
            "decisions": f"{first} to {last} UTC",
            "these bars are": self.known,
            "cost per side": f"{self.cost:.3%}",
            "fill": self.fill,
            **self.facts,
            "coins": ", ".join(self.symbols),
            "data": self.data and f"SHA-256 {self.data}",
        }
        return {name: text for name, text in lines.items() if text}

    def title(self) -> str:
        """Return the title of the page."""
        return f"{self.run}: paper account" if self.split == "paper" else f"{self.run}: {self.split} split"

    def rules(self) -> dict[str, Backtest]:
        """Return the baselines that do not know the future."""
        return {name: result for name, result in self.others.items() if name != _HINDSIGHT}


def write_report(folder: Path, report: Report) -> dict:
    """Write report.html, which opens offline, metrics.json, series.parquet and trades.csv into `folder`.

    Returns:
        What metrics.json holds; there a number that does not exist (NaN, infinity) is null.
    """
    results = {**report.agents, **report.others}
    benchmark = benchmark_of(next(iter(results.values())))
    table = {name: metrics(result) for name, result in results.items()}
    skills = {
        name: skill(result, report.trial_sharpes, _REPORT_COSTS) for name, result in report.agents.items()
    }
    followed = {**(report.agents or report.rules()), "benchmark": benchmark}
    months = pd.DataFrame(
        {name: monthly_returns(result.value, report.times) for name, result in followed.items()}
    )
    content = {
        **report.heading(),
        "cost": report.cost,
        report.split: table,
        "skill": skills,
        "monthly_returns": months.to_dict(),
        "reconstruction": report.reconstruction,
        "constants": {name: str(value) for name, value in report.constants.items()},
        **({"runs": run_figures(report.runs)} if report.runs else {}),
    }
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
    page = environment.from_string(_PAGE).render(
        report=report,
        heading=report.heading(),
        notes=_NOTES,
        verdicts=verdicts(report, content),
        caveat=caveat(report.market),
        chart=chart_json(value_chart(report, benchmark)),
        chart_library=chart_library(),
        value=png_text(value_figure(report, benchmark)),
        drawdowns={
            name: drawdowns_table(result, report.times)
            for name, result in {**report.agents, "benchmark": benchmark}.items()
        },
        returns=png_text(returns_figure(report, benchmark)) if report.agents else "",
        rolling=png_text(rolling_figure(report.agents, report.times)) if report.agents else "",
        results=results_table(report, table, benchmark),
        runs=runs_table(content.get("runs", {})),
        statistics=statistics_table(skills),
        weights={
            name: png_text(weights_figure(result, report.times, report.symbols))
            for name, result in report.agents.items()
        },
        trading=png_text(trading_figure(report.agents, report.times)) if report.agents else "",
        months=months_table(months),
        shades=[[shade(x) for x in row] for row in months.to_numpy()],
        curves={name: png_text(curves_figure(log)) for name, log in report.curves.items()},
        reconstruction=reconstruction_table(report.reconstruction),
    )
    replace_text(folder / "report.html", page)
    replace_text(folder / "metrics.json", json.dumps(without_nan(content), indent=1, allow_nan=False))
    getData.write_parquet(folder / "series.parquet", series_table(report), report.heading())
    replace_text(folder / "trades.csv", trades_table(report).to_csv(index=False))
    return content


def publish(folder: Path, report: Report, what: str) -> None:
    """Write the report into `folder` and print its figures, beginning with `what` they are of."""
    content = write_report(folder, report)
    costs = f"cost {content['cost per side']} per side, fill {report.fill}"
    print(f"{what}, decisions {content['decisions']}, {report.market}, {costs}")
    print(format_table(content[report.split]))
    if report.runs:
        print(format_runs(content["runs"]))
    print(*verdicts(report, content), sep="\n")
    print(f"report: {folder / 'report.html'}")


def series_table(report: Report) -> pd.DataFrame:
    """Return what each agent and baseline did at each decision: S rows for each `name`.

    Columns: name; time of the decision (close of its bar); turnover and cost_paid, fractions of the value at
    the fill; value and benchmark at the next fill (1 at the first fill, before its trade); before.ASSET and
    after.ASSET, the weights at the fill (float32), before and after the trade.
    """
    assets = ["cash", *report.symbols]
    when = pd.to_datetime(report.times, unit="ms", utc=True)
    tables = []
    for name, result in {**report.agents, **report.others}.items():
        numbers = {"turnover": result.turnover, "cost_paid": result.cost_paid}
        numbers |= {"value": result.value[1:], "benchmark": result.benchmark[1:]}
        weights = {"before": result.held.astype(np.float32), "after": result.weights.astype(np.float32)}
        for side, columns in weights.items():
            numbers |= {f"{side}.{asset}": columns[:, k] for k, asset in enumerate(assets)}
        tables.append(pd.DataFrame({"name": name, "time": when, **numbers}))
    return pd.concat(tables, ignore_index=True)


def trades_table(report: Report) -> pd.DataFrame:
    """Return every purchase and sale of a coin: amounts in units of the value at the start.

    Columns: name; time of the decision; coin; side; amount: worth of the coins that changed hands; cost; and
    the coin's weights before and after.
    """
    tables = []
    for name, result in {**report.agents, **report.others}.items():
        kept = (1 - result.cost_paid)[:, None]
        moved = (kept * result.weights - result.held)[:, 1:]  # [S, N] of the value at the fill
        step, coin = np.nonzero((np.abs(moved) > 1e-12) & (result.turnover > 0)[:, None])
        moved = moved[step, coin]
        amount = np.abs(moved) * result.value[step]
        # who sells for 1 gets 1 - c; who buys 1 pays 1 / (1 - c)
        cost = amount * np.where(moved < 0, report.cost, report.cost / (1 - report.cost))
        columns = {"time": pd.to_datetime(report.times[step], unit="ms", utc=True)}
        columns |= {"coin": np.array(report.symbols)[coin], "side": np.where(moved < 0, "sell", "buy")}
        columns |= {"amount": amount, "cost": cost}
        columns |= {"before": result.held[step, coin + 1], "after": result.weights[step, coin + 1]}
        tables.append(pd.DataFrame({"name": name, **columns}))
    return pd.concat(tables, ignore_index=True)


def data_sha256(footer: dict) -> str:
    """Return a hash of the bars and splits that features were made of, from their footer."""
    text = json.dumps({name: footer[name] for name in ("inputs", "splits")}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def replace_text(path: Path, text: str) -> None:
    """Write a text in UTF-8 in one atomic step; errors as `getData.replacing`."""
    with getData.replacing(path) as file:
        file.write(text.encode())


def without_nan(value: object) -> object:
    """Replace NaN and infinity by None; JSON has neither."""
    if isinstance(value, dict):
        return {str(key): without_nan(part) for key, part in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_trials(path: Path) -> pd.DataFrame:
    """Return the list of trials; errors as `read_table`."""
    kinds = {"time": str, "run": str, "seed": str, "test_sharpe_bar": float}  # a run may be called NA
    trials = read_table(path, dtype=kinds, keep_default_na=False, na_values=[""])
    if not {"time", "run"} <= set(trials):
        raise UserError(f"{path} is damaged (it has no time or no run): move it away")
    return trials


def append_trial(path: Path, trial: dict[str, object]) -> None:
    """Add a training to the list of all that were tried here, or replace its own row."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(".lock")):  # runs side by side write into the same list
        others = None
        if path.exists():
            trials = read_trials(path)
            known = [name for name in ("time", "run", "seed") if name in trials and name in trial]
            itself = (trials[known] == [str(trial[name]) for name in known]).all(axis=1)
            for old in trials[itself].to_dict("records"):  # a test stays where the run is ended once more
                trial = {name: value for name, value in old.items() if not pd.isna(value)} | trial
            others = trials[~itself]
        table = pd.concat([others, pd.DataFrame([trial])])  # without None
        replace_text(path, table.to_csv(index=False))


def read_trial_sharpes(path: Path) -> list[float]:
    """Return each trial's Sharpe ratio per bar over the benchmark; NaN for a run without a test."""
    if not path.exists():
        return []
    trials = read_trials(path)
    return trials.get("test_sharpe_bar", pd.Series(math.nan, trials.index)).tolist()


def read_curves(folder: Path) -> dict[str, pd.DataFrame]:
    """Return the logs of a run that exist and hold a row: pretraining and online, of each fold and seed."""
    logs = {"pretraining, by epoch": Path("pretrain", "metrics.csv"), "online, by batch": Path("metrics.csv")}
    parts = sorted({path.parent for path in folder.rglob("metrics.csv") if path.parent.name != "pretrain"})
    paths = {
        f"{', '.join([*part.relative_to(folder).parts, name])}": part / log
        for part in [folder, *parts] for name, log in logs.items()
    }  # fmt: skip
    tables = {name: read_table(path) for name, path in paths.items() if path.exists() and path.stat().st_size}
    return {name: table for name, table in tables.items() if len(table)}


def read_table(path: Path, **options: object) -> pd.DataFrame:
    """Read a csv file of the runs.

    Raises:
        UserError: it is damaged.
    """
    try:
        return pd.read_csv(path, **options)
    except ValueError as error:  # from pandas, or from bytes that are not UTF-8
        raise UserError(f"{path} is damaged ({str(error).splitlines()[0].strip()}): move it away") from None


def relation_to_training(splits: dict[str, list[int]], first: int, last: int) -> str:
    """Return how the bars from `first` to `last` (ms) relate to the training of an agent on `splits` (ms)."""
    for name, meaning in (("train", _TRAINED_ON), ("validation", _CHOSEN_ON)):
        if first < splits[name][1] and last >= splits[name][0]:
            return meaning
    if first >= splits["validation"][1]:
        return "out of sample"
    return (
        "before the training split" if last < splits["train"][0] else "between training and validation split"
    )


def verdicts(report: Report, content: dict) -> list[str]:
    """Return what the page shows and does not show: a text per agent, or for the baselines, and the remarks.

    Args:
        content: what `write_report` returned.
    """
    table = content[report.split]
    others = {name: table[name] for name in report.others}
    mark = getData.not_real(report.market)
    mark = f"{mark}. " if mark else ""
    if report.agents:
        texts = [
            mark + verdict(name, table[name], content["skill"][name], others, report.known)
            for name in report.agents
        ]
        return [*texts, *report.remarks]
    best = max(report.rules(), key=lambda name: others[name]["excess_bp_day"])
    return [
        f"{mark}Baselines only: rules that learn nothing, as a yardstick for agents. "
        f"Looking back, the best of them on these bars was {best} "
        f"({others[best]['excess_bp_day']:+.1f} bp per day over the benchmark)."
    ]


def verdict(
    name: str, numbers: dict[str, float], skill: dict, others: dict[str, dict[str, float]], known: str
) -> str:
    """Return what the figures of one agent do and do not show; `known` is its `relation_to_training`."""
    low, high = skill["excess_low_bp_day"], skill["excess_high_bp_day"]
    text = f"{name}: {numbers['excess_bp_day']:+.1f} bp per day over the benchmark, "
    few = math.isnan(low)
    text += "on bars too few for an interval. " if few else f"95 % interval {low:+.1f} to {high:+.1f}. "
    if known.startswith((_TRAINED_ON, _CHOSEN_ON)):
        text += f"But it was {known.removeprefix('IN SAMPLE: ')}: this says nothing about skill."
    elif few:
        return text + "Nothing can be said about skill."
    elif low > 0:
        text += "The interval lies above zero: on these bars chance alone is an unlikely explanation."
        if not skill["deflated_sharpe"] > 0.95:
            deflated = show(skill["deflated_sharpe"], ".1%")
            text += (
                f" But its deflated Sharpe ratio ({deflated}, {skill['trials']} trials) leaves room for luck."
            )
    elif high < 0:
        text += "The interval lies below zero: it does worse than holding the coins."
    else:
        text += "The interval includes zero: no skill shown."
    if numbers["growth"] < 0:
        text += f" It lost money ({numbers['growth_bp_day']:+.1f} bp per day), so cash did better."
    causal = {
        other: row["excess_bp_day"] for other, row in others.items() if other not in (_HINDSIGHT, "cash")
    }
    best = max(causal, key=causal.get, default=None)
    if best and causal[best] > numbers["excess_bp_day"]:
        text += f" The baseline {best} did better ({causal[best]:+.1f} over the benchmark)."
    return text


def caveat(market: str) -> str:
    """Return what no figure on the page can show."""
    text = "One stretch of one market. Fills at a fixed cost per side: no market impact, no outage. "
    if market.startswith("synthetic"):
        text += "This market is synthetic: what can be predicted in it was planted, "
        text += "so nothing here is about real markets. "
    elif mark := getData.not_real(market):
        text += f"{mark}. What can be predicted here may be that alone: it is no result on real markets. "
    text += "The benchmark is an equal-weight hold of the coins without costs; "
    return text + "where it falls, cash beats it too."


def benchmark_of(result: Backtest) -> Backtest:
    """Return the benchmark of a result as a result of its own."""
    nothing = np.zeros_like(result.turnover)
    return replace(result, value=result.benchmark, turnover=nothing, cost_paid=nothing)


def results_table(report: Report, table: dict[str, dict[str, float]], benchmark: Backtest) -> Table:
    """Return the headline table: agents first, then the benchmark and the baselines."""
    rows = {name: table[name] for name in report.agents} | {"benchmark": metrics(benchmark)} | table
    columns = [(key, form) for key, (_, form) in _COLUMNS.items()]
    cells = [[name, *(show_metric(row, *column) for column in columns)] for name, row in rows.items()]
    return ["", *(title for title, _ in _COLUMNS.values())], cells


def run_figures(runs: Sequence[RunResult]) -> dict[str, dict[str, Any]]:
    """Return the figures of each of several runs."""
    rows = {}
    for combination, name, validation, result in runs:
        returns = excess_returns(result)
        low, high = bootstrap_interval(returns, block_length(returns))
        row = {"combination": combination, "run": name, "validation_bp_day": validation, **metrics(result)}
        row |= {"excess_low_bp_day": _BP_DAY * low, "excess_high_bp_day": _BP_DAY * high}
        rows[f"{combination} {name}".strip()] = row
    return rows


def runs_table(figures: dict[str, dict[str, Any]]) -> Table:
    """Return `run_figures` for the page, with median and range of the seeds of each combination."""
    cells = []
    for combination, group in itertools.groupby(figures.items(), lambda item: item[1]["combination"]):
        rows = dict(group)
        for name, row in rows.items():
            low, high = (show(row[f"excess_{end}_bp_day"], "+.1f") for end in ("low", "high"))
            cells.append(
                [name, show(row["validation_bp_day"], "+.1f"), show(row["excess_bp_day"], "+.1f"),
                 f"{low} to {high}", show_metric(row, "sharpe", "+.2f"), show(row["max_drawdown"], ".1%"),
                 show(row["turnover_day"], ".3f")]
            )  # fmt: skip
        seeds = [row for row in rows.values() if row["run"] != "ensemble"]
        if len(seeds) > 1:
            of = f"of {len(seeds)} seeds"
            columns = [[row[key] for row in seeds] for key in ("validation_bp_day", "excess_bp_day")]
            middle = [show(median(column), "+.1f") for column in columns]
            ends = [f"{show(min(column), '+.1f')} to {show(max(column), '+.1f')}" for column in columns]
            cells.append([f"{combination} median {of}".strip(), *middle, "", "", "", ""])
            cells.append([f"{combination} range {of}".strip(), *ends, "", "", "", ""])
    header = (
        "",
        "validation",
        "this split",
        "95 % interval",
        "Sharpe, yearly",
        "largest drawdown",
        "turnover/day",
    )
    return header, cells


def format_runs(figures: dict[str, dict[str, Any]]) -> str:
    """Return `runs_table` as lines of text, without its last columns."""
    header, cells = runs_table(figures)
    table = pd.DataFrame([row[1:5] for row in cells], [row[0] for row in cells], header[1:5])
    return table.to_string()


def statistics_table(skills: dict[str, dict]) -> Table:
    """Return the statistics beside the headline, one column per agent; the first eight lines matter most."""
    year = BARS_PER_YEAR**0.5

    def column(s: dict) -> dict[str, str]:
        low, high = (show(s[f"excess_{end}_bp_day"], "+.1f") for end in ("low", "high"))
        best = show(s["expected_best_sharpe_bar"] * year, "+.2f")
        at_cost = {cost: show(excess, "+.1f") for cost, excess in s["cost_sweep_bp_day"].items()}
        return {
            "over the benchmark, bp/day": show(s["excess_bp_day"], "+.1f"),
            "95 % interval, bp/day": f"{low} to {high}",
            "Sharpe of returns over the benchmark, yearly": show(s["sharpe_excess_bar"] * year, "+.2f"),
            "probabilistic Sharpe, over the benchmark": show(s["probabilistic_sharpe"], ".1%"),
            "deflated Sharpe, over the benchmark": show(s["deflated_sharpe"], ".1%"),
            "trials it is deflated by": str(s["trials"]),
            "yearly Sharpe that the best of them would show without skill": best,
            "break-even cost, bp per side": show(1e4 * s["break_even_cost"], ".2f"),
            "mean block of the bootstrap, days": show(s["block_days"], ".1f"),
            "probabilistic Sharpe of its own returns": show(s["probabilistic_sharpe_plain"], ".1%"),
            **{
                f"over the benchmark at {1e4 * cost:g} bp per side, bp/day": text
                for cost, text in at_cost.items()
            },
        }

    return ["", *skills], pd.DataFrame(
        {name: column(s) for name, s in skills.items()}
    ).reset_index().values.tolist()


def months_table(months: pd.DataFrame) -> Table:
    """Return the simple returns of the calendar months."""
    return ["month (UTC)", *months], [
        [month, *(show(x, "+.2%") for x in row)] for month, *row in months.itertuples()
    ]


def shade(value: float) -> str:
    """Return the colour of a month's return in the heat map: red to white to green, full at 30 %."""
    if not math.isfinite(value):
        return "transparent"
    color = "46, 160, 67" if value > 0 else "218, 54, 51"
    return f"rgba({color}, {min(abs(value) / 0.3, 1) ** 0.5 * 0.6:.2f})"


def drawdowns_table(result: Backtest, times: np.ndarray) -> Table:
    """Return the worst drawdowns with their dates."""
    fills = np.append(times, times[-1] + getData.BAR_MS)  # [S+1], to within a bar
    rows = []
    for depth, *dates in worst_drawdowns(result.value, fills).itertuples(index=False):
        peak, _, recovered = dates
        days = (recovered - peak) / getData.DAY_MS
        shown = [f"{pd.Timestamp(x, unit='ms'):%Y-%m-%d}" if x == x else "not yet" for x in dates]
        rows.append([show(depth, ".1%"), *shown, show(days, ".1f")])
    return ["depth", "from", "lowest", "recovered", "days"], rows


def reconstruction_table(reconstruction: dict[str, dict[str, float]]) -> Table:
    """Return how well windows are reconstructed, overall and per timeframe."""
    names = list(dict.fromkeys(name for row in reconstruction.values() for name in row))
    header = [
        "",
        *(name.replace("explained_variance", "explained variance").replace("_", " ") for name in names),
    ]
    return header, [
        [key, *(show(row.get(name), ".4f") for name in names)] for key, row in reconstruction.items()
    ]


def new_figure(rows: int, columns: int, height: float, width: float = 11, **options: object) -> tuple:
    """Return a figure, of the page's width, and its axes, made without a window system or global state."""
    from matplotlib.figure import Figure  # not at the top: the import takes a second

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, columns, **options)
    for each in np.ravel(axes):
        each.grid(alpha=0.25)
        each.margins(x=0.01)
        each.spines[["top", "right"]].set_visible(False)
    return figure, axes


def pixels(figure: object, dpi: int = 100) -> np.ndarray:
    """Return the figure as RGB, uint8 [height, width, 3], drawn once (savefig: twice, for the layout)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # not at the top, as above

    figure.set_dpi(dpi)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def png_text(figure: object) -> str:
    """Return the figure as PNG in base64, with a palette: a third of the bytes."""
    from PIL import Image  # not at the top: only reports need it

    buffer = io.BytesIO()
    Image.fromarray(pixels(figure, dpi=120)).quantize(128).save(buffer, format="png")
    return base64.b64encode(buffer.getvalue()).decode()


@dataclass(frozen=True)
class Curve:
    """One line of the value chart, and its look there and in print."""

    result: Backtest
    color: str
    width: float
    dashed: bool = False


def curves(report: Report, benchmark: Backtest) -> dict[str, Curve]:
    """Return the curves of the value chart, by name; the first ones belong on top."""
    strong = iter(("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728"))
    weak = iter(("#2ca02c", "#9467bd", "#8c564b", "#e377c2", "#bcbd22", "#17becf", "#d62728", "#7f7f7f"))
    found = {name: Curve(result, next(strong, "navy"), 1.6) for name, result in report.agents.items()}
    found["benchmark"] = Curve(benchmark, "black", 1.2, dashed=True)
    rules = report.rules().items()
    return found | {name: Curve(result, next(weak, "grey"), 0.8) for name, result in rules}


def drawdown(value: np.ndarray) -> np.ndarray:
    """Return value over its highest so far - 1."""
    return value / np.maximum.accumulate(value) - 1


def thinned(value: np.ndarray, buckets: int) -> np.ndarray:
    """Return the positions [<= 2 x buckets + 2] of a curve's lowest and highest points in equal buckets.

    With as many buckets as there are pixels the curve looks as before; first and last point stay.
    """
    edges = np.linspace(0, len(value), min(buckets, len(value)) + 1).astype(int)
    kept = {0, len(value) - 1}
    for first, stop in pairwise(edges):
        kept |= {first + int(value[first:stop].argmin()), first + int(value[first:stop].argmax())}
    return np.array(sorted(kept))


def value_chart(report: Report, benchmark: Backtest) -> object:
    """Build value on a log scale and drawdown to hover over, zoom, and switch curves off in the legend."""
    from bokeh.layouts import gridplot
    from bokeh.models import CustomJSTicker, HoverTool, Legend, LegendItem, NumeralTickFormatter
    from bokeh.plotting import figure

    shared = {"x_axis_type": "datetime", "min_width": 300, "min_border_left": 70, "active_drag": "box_zoom"}
    shared |= {"tools": "box_zoom,pan,wheel_zoom,reset"}
    upper = figure(height=340, y_axis_type="log", y_axis_label="value (start = 1)", **shared)
    lower = figure(height=180, x_range=upper.x_range, y_axis_label="drawdown", **shared)
    items = []
    shown = curves(report, benchmark)
    for name, curve in reversed(shown.items()):  # the last one drawn is on top
        value = curve.result.value[1:]
        at = thinned(value, 600)
        source = {"time": report.times[at].astype(float), "value": value[at].astype(np.float32)}
        source["drawdown"] = drawdown(curve.result.value)[1:][at].astype(np.float32)
        style = {"name": name, "color": curve.color, "line_width": 1.25 * curve.width}
        style |= {"line_dash": "dashed" if curve.dashed else "solid"}
        top = upper.line("time", "value", source=source, **style)
        bottom = lower.line("time", "drawdown", source=top.data_source, **style)
        items.append(LegendItem(label=f"{name} {value[-1]:.3f}", renderers=[top, bottom]))
    for each, shows in ((upper, "@value{0.0000}"), (lower, "@drawdown{0.0%}")):
        tips = [("", "$name"), ("", "@time{%F %H:%M} UTC"), ("", shows)]
        each.add_tools(HoverTool(tooltips=tips, formatters={"@time": "datetime"}))
    upper.x_range.range_padding = 0.01
    upper.yaxis.ticker = CustomJSTicker(major_code=_LOG_TICKS)
    upper.yaxis.formatter = NumeralTickFormatter(format="0.[0000]")
    lower.yaxis.formatter = NumeralTickFormatter(format="0%")
    legend = Legend(items=items[::-1], click_policy="hide", ncols=2, label_text_font_size="7pt", padding=0)
    legend.border_line_color, legend.spacing, legend.glyph_height, legend.glyph_width = None, 0, 14, 14
    legend.location = "center"
    lower.add_layout(legend, "below")
    lower.height += 20 * -(-len(items) // 2)
    return gridplot([[upper], [lower]], sizing_mode="stretch_width", toolbar_location="above")


def chart_json(chart: object) -> markupsafe.Markup:
    """Return a chart as JSON that may stand in a page: without "<", which could end the script it is in."""
    from bokeh.embed import json_item

    return markupsafe.Markup(json.dumps(json_item(chart, "chart")).replace("<", "\\u003c"))


def chart_library() -> markupsafe.Markup:
    """Return the script that draws charts, 1.3 MB, so that the page needs no network."""
    from bokeh.resources import Resources

    return markupsafe.Markup(Resources(mode="inline", components=["bokeh"], minified=True).js_raw[0])


def value_figure(report: Report, benchmark: Backtest) -> object:
    """Draw what `value_chart` shows for print."""
    from matplotlib.ticker import LogLocator, MaxNLocator

    figure, (value, fall) = new_figure(2, 1, 6.5, sharex=True, height_ratios=(2, 1))
    when = report.times.astype("datetime64[ms]")
    for position, (name, curve) in enumerate(curves(report, benchmark).items()):
        result = curve.result
        style = {"color": curve.color, "lw": curve.width, "ls": "--" if curve.dashed else "-"}
        style["zorder"] = 100 - position  # the first one on top
        value.plot(when, result.value[1:], label=f"{name} {result.value[-1]:.3f}", **style)
        fall.plot(when, drawdown(result.value)[1:], **style)
    value.set_yscale("log")
    low, high = value.get_ylim()
    steps = MaxNLocator(7) if high < 3 * low else LogLocator(subs=(1, 2, 5) if high < 300 * low else (1,))
    value.yaxis.set_major_locator(steps)
    value.yaxis.set_major_formatter("{x:.4g}")
    value.yaxis.set_minor_locator(MaxNLocator(1))
    value.yaxis.set_minor_formatter("")
    value.set_ylabel("value (start = 1)")
    fall.set_ylabel("drawdown")
    fall.yaxis.set_major_formatter(lambda x, _: f"{x:.0%}")
    value.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=8, frameon=False)
    return figure


def asset_colors() -> tuple:
    """Return the colours of cash and coins, in this order, in stacks of weights."""
    from matplotlib import colormaps

    return "lightgrey", *colormaps["tab20"].colors


def weights_figure(result: Backtest, times: np.ndarray, symbols: Sequence[str]) -> object:
    """Draw the weights after each trade, stacked, cash at the bottom."""
    figure, axes = new_figure(1, 1, 3.2)
    every = max(1, len(times) // 1500)
    when = times[::every].astype("datetime64[ms]")
    axes.stackplot(when, result.weights[::every].T, labels=["cash", *symbols], colors=asset_colors(), lw=0)
    axes.set_ylim(0, 1)
    axes.set_xlim(when[0], when[-1])
    axes.set_ylabel("weight")
    handles, labels = axes.get_legend_handles_labels()
    place = {"loc": "upper left", "bbox_to_anchor": (1.0, 1.05)}
    axes.legend(handles[::-1], labels[::-1], fontsize=8, frameon=False, **place)  # in the stack's order
    return figure


def daily_turnover(turnover: np.ndarray, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the edges [D+1] of the days (UTC) of decisions at `times` [S], ms, and turnover per day [D].

    The first and the last day last from the first decision and to the end of the last one, and their turnover
    is divided by that share of a day.
    """
    days = times // getData.DAY_MS
    sums = pd.Series(turnover).groupby(days).sum()
    edges = np.append(sums.index.to_numpy() * getData.DAY_MS, times[-1] + getData.BAR_MS)
    edges[0] = times[0]
    return edges.astype("datetime64[ms]"), sums.to_numpy() / (np.diff(edges) / getData.DAY_MS)


def returns_figure(report: Report, benchmark: Backtest) -> object:
    """Draw the distribution of daily returns, and what each coin and the costs contributed."""
    figure, (spread, coins) = new_figure(1, 2, 3.6)
    daily = {name: daily_returns(result.value, report.times) for name, result in report.agents.items()}
    daily["benchmark"] = daily_returns(benchmark.value, report.times)
    together = np.concatenate(list(daily.values()))
    edges = np.histogram_bin_edges(together, bins=30) if len(together) else 30
    for name, returns in daily.items():
        look = {"color": "black", "ls": "--"} if name == "benchmark" else {}
        spread.hist(returns, bins=edges, histtype="step", lw=1.5, label=name, **look)
    spread.axvline(0, color="grey", lw=0.8)
    spread.xaxis.set_major_formatter(lambda x, _: f"{x:.1%}")
    spread.set(xlabel="return of a whole day (UTC)", ylabel="days")
    spread.legend(fontsize=8, frameon=False)
    names = [*report.symbols, "costs"]
    height = 0.8 / len(report.agents)
    for position, (name, result) in enumerate(report.agents.items()):
        places = np.arange(len(names)) + position * height
        coins.barh(places, profit_per_coin(result), height=height, label=name)
    coins.set_yticks(np.arange(len(names)) + 0.4 - height / 2, names, fontsize=8)
    coins.invert_yaxis()
    coins.axvline(0, color="grey", lw=0.8)
    coins.set_xlabel("profit, in units of the value at the start")
    coins.legend(fontsize=8, frameon=False)
    return figure


def rolling_figure(agents: dict[str, Backtest], times: np.ndarray) -> object:
    """Draw growth over the benchmark and its Sharpe ratio over 30 days, or a quarter of fewer days."""
    figure, (growth, sharpe) = new_figure(2, 1, 4.5, sharex=True)
    bars = min(30 * BARS_PER_DAY, max(len(times) // 4, 2))
    for name, result in agents.items():
        for axes, numbers in zip((growth, sharpe), rolling_excess(result, bars), strict=True):
            axes.plot(times.astype("datetime64[ms]"), numbers, lw=1.2, label=name)
    for axes in (growth, sharpe):
        axes.axhline(0, color="grey", lw=0.8)
    growth.set_title(f"over the last {bars / BARS_PER_DAY:.3g} days", fontsize=9)
    growth.set_ylabel("over benchmark, bp/day")
    sharpe.set_ylabel("Sharpe of it, yearly")
    growth.legend(fontsize=8, frameon=False)
    return figure


def trading_figure(agents: dict[str, Backtest], times: np.ndarray) -> object:
    """Draw the turnover of each day, an incomplete one as long as it is, and the costs paid so far."""
    figure, (turnover, paid) = new_figure(2, 1, 5.5, sharex=True)
    for name, result in agents.items():
        edges, rate = daily_turnover(result.turnover, times)
        turnover.stairs(rate, edges, lw=1.5, label=name)
        paid.plot(times.astype("datetime64[ms]"), 100 * result.cost_paid.cumsum(), lw=1.5, label=name)
    turnover.set_ylabel("turnover per day, x value")
    paid.set_ylabel("costs so far, % of the value")
    turnover.legend(fontsize=8, frameon=False)
    return figure


def curves_figure(table: pd.DataFrame) -> object:
    """Draw the columns of a log in small panels."""
    panels = {title: [name for name in columns if name in table] for title, columns in _PANELS.items()}
    panels = {title: names for title, names in panels.items() if names}
    rows = -(-len(panels) // 3)
    figure, axes = new_figure(rows, 3, 2.2 * rows, squeeze=False)
    for each in axes.flat[len(panels) :]:
        each.set_visible(False)
    for each, (title, names) in zip(axes.flat, panels.items(), strict=False):
        each.set_title(title, fontsize=9)
        each.tick_params(labelsize=8)
        each.ticklabel_format(useOffset=False)
        each.xaxis.get_major_locator().set_params(integer=True)
        for name in names:
            known = table[["step", name]].dropna()
            marker = "o" if len(known) < 30 else ""
            each.plot(
                known["step"], known[name] * _PANELS[title][name], lw=1, marker=marker, ms=2.5, label=name
            )
        if len(names) > 1:
            each.legend(fontsize=7, frameon=False)
    return figure


# --- a paper account: decisions that were booked before the bars that judge them existed --------------------
#
# All times are the exchange's: the clock of this machine decides nothing. Which decisions are due is told by
# the bars that have come, so that a clock of the exchange that jumps ahead skips none.


class PaperAccount:
    """The decisions of one agent in an SQLite file, to which rows are only ever added.

    A decision at the close of bar t is booked while bar t+1, whose open it is filled at, has not closed, so
    before any bar exists that judges it. The account is computed anew from decisions and bars by `backtest`
    (`paper_result`): there is no state that a kill could leave half changed, or that could drift. The close
    of bar t is the key, so a bar has one decision at most.

    Tables: about (name, value as JSON), written once; decisions (close_ms of bar t; booked_ms by the
    exchange's clock; weights [A] as JSON, cash first, or NULL for none; reason for none; call: the program
    that was then called, or ""); calls (close_ms, result of that program). A call without a result ended
    with the job, and is not repeated.

    Args:
        path: of the file NAME.sqlite, made where there is none; the folder NAME beside it holds the bars.

    Raises:
        UserError: it is no such file.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.folder = path, path.with_suffix("")
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._named_errors():
            self._file = sqlite3.connect(path, timeout=30, isolation_level=None)
            self._file.execute("PRAGMA synchronous = EXTRA")  # a booked decision survives a power failure
            self._file.executescript(_PAPER_TABLES)

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        """Report what SQLite cannot do in one line."""
        try:
            yield
        except sqlite3.Error as error:
            raise UserError(f"{self.path}: {error}: what was booked before is kept") from error

    def about(self) -> dict[str, Any]:
        """Return what `begin` was given; {} of a new account."""
        with self._named_errors():
            rows = self._file.execute("SELECT name, value FROM about").fetchall()
        return {name: json.loads(value) for name, value in rows}

    def begin(self, about: dict[str, Any]) -> None:
        """Write down what the account is of, in one step."""
        rows = [(name, json.dumps(value)) for name, value in about.items()]
        with self._named_errors(), self._file:
            self._file.execute("BEGIN")
            self._file.executemany("INSERT INTO about VALUES (?, ?)", rows)

    def book(
        self, close_ms: int, booked_ms: int, weights: Sequence[float] | None, reason: str = "", call: str = ""
    ) -> None:
        """Book a decision, or none with its reason; on the disk when this returns.

        Raises:
            UserError: the bar has one already, or the disk is full.
        """
        row = close_ms, booked_ms, None if weights is None else json.dumps(list(weights)), reason, call
        with self._named_errors():
            self._file.execute("INSERT INTO decisions VALUES (?, ?, ?, ?, ?)", row)

    def record_call(self, close_ms: int, result: str) -> None:
        """Book the result of the program that was called after a decision."""
        with self._named_errors():
            self._file.execute("INSERT INTO calls VALUES (?, ?)", (close_ms, result))

    def decisions(self) -> pd.DataFrame:
        """Return the booked decisions by close_ms: booked_ms, weights ([A] or None), reason, call, result."""
        query = "SELECT decisions.*, calls.result FROM decisions LEFT JOIN calls USING (close_ms) ORDER BY 1"
        with self._named_errors():
            rows = self._file.execute(query).fetchall()
        columns = ["close_ms", "booked_ms", "weights", "reason", "call", "result"]
        table = pd.DataFrame(rows, columns=columns, dtype=object).set_index("close_ms")
        table.index = table.index.astype(np.int64)
        table["weights"] = [text and np.array(json.loads(text)) for text in table["weights"]]
        return table


_PAPER_TABLES = """
CREATE TABLE IF NOT EXISTS about (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS decisions (
    close_ms INTEGER PRIMARY KEY, booked_ms INTEGER NOT NULL, weights TEXT, reason TEXT NOT NULL,
    call TEXT NOT NULL, CHECK ((weights IS NULL) = (reason != '')));
CREATE TABLE IF NOT EXISTS calls (
    close_ms INTEGER PRIMARY KEY REFERENCES decisions, result TEXT NOT NULL);
"""


def paper_prices(bars: dict[str, pd.DataFrame]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return close times [T], ms, and open and close prices [T+1, N] of what getData.load_bars returns.

    The last row stands for the bar that is not closed yet: its open is not known, so what is held is valued
    at the last close.
    """
    table = getData.price_table(bars)
    open_prices, close_prices = price_arrays(table, list(bars))
    last = close_prices[-1:]
    times = table.index.as_unit("ms").asi8
    return times, np.concatenate([open_prices, last]), np.concatenate([close_prices, last])


def paper_result(
    decisions: pd.DataFrame, times: np.ndarray, open_prices: np.ndarray, close_prices: np.ndarray, cost: float
) -> Backtest | None:
    """Return the account of the decisions of a `PaperAccount` up to the last close; None before a first bar.

    It starts with cash at the first decision; without an order what is held drifts. Fills are at the next
    open. Prices as `paper_prices` returns them.
    """
    if decisions.empty or decisions.index[0] >= times[-1]:
        return None
    orders = decisions["weights"].to_dict()
    start, stop = int(np.searchsorted(times, decisions.index[0])), len(times) - 1

    def target(row: int, _: np.ndarray) -> np.ndarray | None:
        return orders.get(int(times[row]))

    return backtest(target, open_prices, close_prices, start, stop, cost=cost, fill="next_open")


# bars of all coins as getData.load_bars returns them, and the weights [A] held at their last close
# -> target [A]; UserError where they give none
Decide = Callable[[dict[str, pd.DataFrame], np.ndarray], np.ndarray]


@dataclass
class PaperTrading:
    """A paper account at work: books the agent's decisions on the new bars of an exchange.

    A decision at the close of bar t sees bars up to t, and is booked at most `max_late` seconds after that
    close by the exchange's clock: then bar t+1, at whose open it is filled, has not closed, and the exchange
    has no bar yet that judges it. What comes later is booked as none, and what is held drifts: "late" was
    decided too late, "missed" fell into a time without this job or the exchange, "no data" names coins
    without their bar. The first decision that is not late begins the account; the next are HOLD bars apart.

    Raises:
        UserError: the account is of something else than `identity`.
    """

    account: PaperAccount
    identity: dict[str, Any]  # what the account is of: run, symbols, hold_bars, cost, exchange ...
    decide: Decide
    history_ms: int  # that `decide` sees
    poll: float  # seconds between two looks at the exchange's clock
    max_late: float  # seconds
    call: str  # program that gets each decision (`call_program`), or ""
    call_timeout: float  # seconds

    def __post_init__(self) -> None:
        self.about = self.account.about() or self.identity
        for name, value in self.identity.items():
            if self.about.get(name) != value:
                raise UserError(
                    f"{self.account.path} is of {name} {self.about.get(name)}, not {value}: give this "
                    "account a name of its own with --run"
                )
        self.step = self.about["hold_bars"] * getData.BAR_MS  # between two decisions

    def run(self) -> None:
        """Collect and decide, bar after bar, until a signal ends the process.

        Raises:
            TryLater: the account is new and the exchange does not answer.
        """
        getData.set_damaged_aside(self.account.folder / "ohlcv")
        decisions = self.account.decisions()
        for close in decisions.index[(decisions["call"] != "") & decisions["result"].isna()]:
            self.account.record_call(int(close), "unknown")
            self.warn(close, "CALL: unknown whether it was done, since this job ended; it is not repeated")
        for number in {signal.SIGTERM, signal.SIGHUP}:
            if signal.getsignal(number) != signal.SIG_IGN:  # as nohup leaves it
                signal.signal(number, lambda number, _: sys.exit(128 + number))
        new = "" if self.account.about() else "new "
        agent = f"agent of run {self.about['run']}, {self.about['exchange']}"
        print(f"{new}paper account {self.account.path}: {agent}, no order is sent")
        asyncio.run(self.trade())

    def warn(self, close: int, text: str) -> None:
        """Print what went wrong at a close (ms)."""
        print(f"{getData.when(close)}  {text}", file=sys.stderr, flush=True)

    async def trade(self) -> None:
        """Collect and decide without end; what an account that has begun cannot have now, it waits for."""
        self.stores = [getData.SymbolBars(symbol) for symbol in self.about["symbols"]]
        self.client = getData.open_exchange(self.about["exchange"])
        self.client.quiet = bool(self.account.about())
        ready, newest, undecided, trouble = False, 0, "", ""
        try:
            while True:
                before = newest
                try:
                    if not ready:
                        await self.begin()
                        ready = self.client.quiet = True
                    # while a decision waits for a bar that is closed: at once
                    await getData.wait_for_bar(self.client, newest - bool(undecided), self.poll)
                    newest, undecided = await self.collect(), "undecided"  # also where the next line fails
                    undecided = await self.book_due(newest)
                    problem = next((str(store.error) for store in self.stores if store.error), undecided)
                except (getData.TryLater, getData.DataRefused) as error:
                    if not self.account.about():
                        raise
                    problem = str(error)
                if problem != trouble:
                    retry = f"this job waits and tries again: {problem}" if problem else "all is well again"
                    self.warn(newest, retry)
                trouble = problem
                if undecided or newest == before:
                    await asyncio.sleep(self.poll)
        finally:
            await self.client.close()

    async def begin(self) -> None:
        """Load the exchange's pairs; for a new account collect and check what `decide` sees, and begin it.

        Raises:
            TryLater: no answer. DataRefused: bars are bad. UsageError: a coin is not listed. As `decide`.
        """
        clock = await getData.exchange_clock(self.client)
        getData.say_clock(self.client)
        await getData.load_pairs(self.client, self.stores)
        if "first_ms" in self.about:
            return
        self.about["first_ms"] = clock // getData.DAY_MS * getData.DAY_MS - self.history_ms
        getData.see_closed_bars(self.client, clock)
        await self.collect()
        for store in self.stores:
            if store.error:
                raise store.error
        market = {store.symbol: store.bars for store in self.stores}
        getData.print_overview(market, self.about["first_ms"], self.client.closed)
        getData.say_unchecked(getData.unchecked_times(market))
        self.decide(self.bars(), np.eye(len(self.stores) + 1)[0])
        self.account.begin(self.about)

    async def collect(self) -> int:
        """Bring all coins up to date, as far as they can be; return the close time of the newest bar, ms."""
        for store in self.stores:
            store.error = None if store.symbol in self.client.pairs else store.error
        with tqdm(disable=True) as silent:
            first, closed = self.about["first_ms"], self.client.closed
            await getData.update_stores(self.client, self.stores, first, closed, silent)
        return max(store.end() for store in self.stores)

    def bars(self) -> dict[str, pd.DataFrame]:
        """Return the collected bars as getData.load_bars does."""
        return getData.on_one_grid({store.symbol: store.frame() for store in self.stores})

    async def book_due(self, newest: int) -> str:
        """Book the decisions due up to the newest close (ms); return why the last of them waits, or ""."""
        booked = self.account.decisions()
        due = range(int(booked.index[-1]) + self.step, newest + 1, self.step) if len(booked) else [newest]
        if not due:
            return ""
        clock = await getData.exchange_clock(self.client)
        for close in due:
            if close < newest:
                self.book_none(close, clock, "missed")
        if due[-1] < newest:
            return ""
        behind = f"the clock of {self.about['exchange']} is behind its bars"
        if clock < newest:
            return behind
        if missing := [store.symbol for store in self.stores if store.end() != newest]:
            reason = f"no data: {', '.join(missing)}"
            if clock - newest <= 1000 * self.max_late:
                return reason
        else:
            bars = self.bars()
            times, *prices = paper_prices(bars)
            result = paper_result(booked, times, *prices, self.about["cost"])
            held = weights_seen(result, *prices, "next_open")[0] if result else np.eye(len(bars) + 1)[0]
            target = self.decide(bars, held)
            clock = await getData.exchange_clock(self.client)  # as late as can be
            if clock < newest:
                return behind
            reason = "late" if clock - newest > 1000 * self.max_late else ""
        if not reason:
            self.account.book(newest, clock, target.tolist(), call=self.call)
            if self.call:  # before a print, which may fail: a booked decision is not handed over twice
                self.hand_over(newest, held, target)
            value, benchmark = (result.value[-1], result.benchmark[-1]) if result else (1.0, 1.0)
            names = ["cash", *self.about["symbols"]]
            changes = [f"{name} {a:.3f}>{b:.3f}" for name, a, b in zip(names, held, target, strict=True)]
            seconds = (clock - newest) / 1000
            text = f"booked after {seconds:4.1f} s  value {value:.4f} ({benchmark:.4f})  {'  '.join(changes)}"
            print(f"{getData.when(newest)}  {text}", flush=True)
        elif len(booked):  # an account begins with a decision
            self.book_none(newest, clock, reason)
        return ""

    def book_none(self, close: int, clock: int, reason: str) -> None:
        """Book that there is no decision at a close (ms), and print it."""
        self.account.book(close, clock, None, reason)
        print(f"{getData.when(close)}  no decision ({reason})", flush=True)

    def hand_over(self, close: int, held: np.ndarray, target: np.ndarray) -> None:
        """Give a decision that has just been booked to the user's program, once, and book how that ended."""
        names = ["cash", *self.about["symbols"]]
        message = {
            "run": self.about["run"], "market": self.about["exchange"], "close_time_ms": close,
            "next_decision_ms": close + self.step, "weights": dict(zip(names, target.tolist(), strict=True)),
            "held": dict(zip(names, held.tolist(), strict=True)),
        }  # fmt: skip
        result = call_program(self.call, message, self.call_timeout)
        self.account.record_call(close, result)
        if result != "done":
            self.warn(close, f"CALL: {result}")


def can_be_called(command: str) -> bool:
    """Return whether a command line names a program that is there."""
    try:
        words = shlex.split(command)
    except ValueError:  # a quotation that does not end
        return False
    return bool(words) and shutil.which(words[0]) is not None


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


def paper_report(data_dir: Path, name: str, *, rebalance_every: int, look_back: int) -> Report:
    """Return the page of a paper account as it stands, beside the baselines on the same bars.

    Raises:
        UserError: there is no such account, or no bar has followed its first decision.
    """
    path = data_dir / "paper" / f"{name}.sqlite"
    if not path.exists():
        raise UserError(f"there is no {path}: begin it with python train.py --job paper")
    account = PaperAccount(path)
    about, decisions = account.about(), account.decisions()
    if not about:
        raise UserError(f"{path} holds no decision yet: let python train.py --job paper run on")
    times, *prices = paper_prices(getData.load_bars(account.folder, about["symbols"]))
    result = paper_result(decisions, times, *prices, about["cost"])
    if result is None:
        raise UserError(f"no bar has closed since the first decision in {path}: try again later")
    first, stop = int(result.rows[0]), int(result.rows[-1]) + 1
    known = relation_to_training(about["splits"], int(times[first]), int(times[stop - 1]))
    if about["trained on"] != about["exchange"]:
        known += f"; the agent was trained on {about['trained on']}"
    trading = {"cost": about["cost"], "fill": "next_open"}
    rules = {"rebalance_every": rebalance_every, "look_back": look_back}
    return Report(
        run=name, split="paper", times=times[first:stop], symbols=about["symbols"], **trading, known=known,
        market=about["exchange"] + (f" at {about['base_url']}" if about["base_url"] else ""),
        others=baselines(*prices, first, stop, **trading, **rules),
        agents={"agent (paper)": result},
        trial_sharpes=read_trial_sharpes(data_dir / "runs" / "trials.csv")
        or [sharpe_per_bar(excess_returns(result))],
        facts={"checkpoint": f"SHA-256 {about['checkpoint']}"},
        remarks=paper_remarks(decisions, result),
    )  # fmt: skip


def paper_remarks(decisions: pd.DataFrame, result: Backtest) -> list[str]:
    """Return what the length and the gaps of an account mean."""
    days = len(result.rows) / BARS_PER_DAY
    least, needed, enough = days_to_tell(result)
    excess = 1e4 * BARS_PER_DAY * float(excess_returns(result).mean())
    length = (
        f"In {days:.1f} days only a growth over the benchmark beyond {least:.0f} bp per day, up or down, "
    )
    length += f"can be told from chance{'' if enough else ', and that only if bars were independent'}. "
    if abs(excess) <= least:
        length += f"What was found, {excess:+.1f}, says nothing yet: "
        moved = math.isfinite(needed)
        length += f"it would take {needed:,.0f} days. " if moved else "nothing was gained or lost on it. "
    elif not enough:
        length += f"What was found, {excess:+.1f}, is more, but four days are the least. "
    length += "Each decision was booked before the bar existed that judged it."
    reasons = decisions.loc[decisions["weights"].isna(), "reason"].str.split(":").str[0].value_counts()
    none = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
    gaps = f"Decisions: {len(decisions):,}"
    gaps += f", of them none: {none}; what was held then drifted." if none else "."
    calls = decisions[decisions["call"] != ""]
    if len(calls):
        done = (calls["result"] == "done").sum()
        gaps += f" Calls of the user's program: {len(calls):,}, done {done:,}."
    return [length, gaps]


# --- the table of the data at hand --------------------------------------------------------------------------


def price_arrays(frame: pd.DataFrame, symbols: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return open and close prices [T, N], float64, from the frame of getData.load_prices."""
    opens, closes = (frame[[f"{symbol}.{name}" for symbol in symbols]] for name in ("open", "close"))
    return opens.to_numpy(np.float64), closes.to_numpy(np.float64)


def split_rows(index: pd.DatetimeIndex, footer: dict, split: str, fill: str) -> tuple[int, int]:
    """Return the first decision row of a split and the one after the last that can be held.

    Args:
        split: "train", "validation", "test", or "all": from the first row of one to the last of them.

    Raises:
        ValueError: there is no such split.
    """
    spans = footer["splits"] | {"all": [min(footer["splits"].values())[0], max(footer["splits"].values())[1]]}
    check_choice("split", split, spans)
    first, stop = index.searchsorted(pd.to_datetime(spans[split], unit="ms", utc=True))
    last_rows = 2 if fill == "next_open" else 1  # without a later bar to be filled at and to be held to
    return int(first), int(min(stop, len(index) - last_rows))


def main(argv: list[str] | None = None) -> int:
    """Print the table of the baselines and write their page, for each split."""
    given = getData.set_constants(globals(), argv)
    check_constants()
    cost = FEE_RATE + SLIPPAGE_RATE
    getData.ensure_data(DATA_DIR, SEED)
    frame, footer = getData.load_prices(DATA_DIR)
    open_prices, close_prices = price_arrays(frame, footer["symbols"])
    for split in footer["splits"] if SPLIT == "all" else [SPLIT]:
        start, stop = split_rows(frame.index, footer, split, FILL)
        periods = {"rebalance_every": REBALANCE_EVERY, "look_back": LOOK_BACK}
        results = baselines(open_prices, close_prices, start, stop, cost=cost, fill=FILL, **periods)
        report = Report(
            run="baselines", market=footer["source"], split=split, symbols=footer["symbols"], cost=cost,
            times=frame.index.as_unit("ms").asi8[start:stop], fill=FILL, others=results,
            constants=given, data=data_sha256(footer),
        )  # fmt: skip
        publish(DATA_DIR / "reports" / f"baselines-{split}", report, f"\n{split}: {stop - start:,} bars")
    print(f"\nfirst coin: {footer['symbols'][0]}")
    return 0


def check_constants() -> None:
    """Refuse constants that make no sense.

    Raises:
        UsageError: names the constant.
    """
    if FEE_RATE + SLIPPAGE_RATE >= 1:
        raise UsageError(f"FEE_RATE + SLIPPAGE_RATE must be under 1 per side, not {FEE_RATE + SLIPPAGE_RATE}")


if __name__ == "__main__":
    getData.run_script(main)
