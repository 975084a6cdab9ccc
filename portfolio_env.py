"""A portfolio of cash and coins on 5-minute bars: costs, environments, backtest, metrics, baselines, report.

reads   data/features/prices.parquet       (getData.py; without any data a synthetic market is made first)
writes  data/reports/baselines-<split>/    (report.html, metrics.json, series.parquet, trades.csv)
        data/reports/<file>/               (the same of weights of your own)

    python portfolio_env.py                      table and page of the baselines, for each split of the data
    python portfolio_env.py --fee-rate 0.0005    the same with another fee
    python portfolio_env.py --weights my.csv     page of your own orders, a trial as a training is
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
import functools
import hashlib
import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import NormalDist, fmean
from typing import Any, Literal, NamedTuple

import gymnasium
import jinja2
import numpy as np
import pandas as pd
import torch
from bokeh.palettes import Category10_10, Category20_20, RdBu11
from filelock import FileLock
from gymnasium.vector import AutoresetMode
from markupsafe import Markup, escape
from torch import Tensor
from tqdm import tqdm

import feature_reducer
import getData
from getData import BARS_PER_DAY, BARS_PER_YEAR, Count, Fraction, Share, UsageError, UserError

# Files and data
DATA_DIR: Path = getData.DATA_DIR  # holds everything that the scripts read and write; set in getData.py
SPLIT: Literal["train", "validation", "test", "all"] = "all"  # one table for each; WEIGHTS: all as one
WEIGHTS: str = ""  # a csv or parquet file of your own weights, whose page comes in place of the baselines'

# Trading
FEE_RATE: Fraction = 0.001  # per side
SLIPPAGE_RATE: Fraction = 0.0  # per side, on top
FILL: Literal["next_open", "close"] = "next_open"  # close is optimistic
DELISTING_LOSS: Fraction = 0.0  # of the last close of a coin that trades no more, at which it is sold

# Limits of what an account trades into; the equal-weight benchmark and the hindsight optimum have none
MAX_WEIGHT: Share = 1.0  # of a coin after a trade, the rest is cash; 1: off
MIN_CASH: Fraction = 0.0  # weight of cash after a trade; 0: off
NO_TRADE_BAND: Fraction = 0.0  # no order for a coin whose weight would move by less; 0: off

# Baselines
REBALANCE_EVERY: Count = 288  # bars between two rebalancings (288 = a day); not of slow rules
LOOK_BACK: Count = 2_016  # bars that inverse volatility looks back over (2,016 = a week)

Policy = Callable[[int, np.ndarray], np.ndarray | None]  # row, weights seen [A] -> target [A]; None: no order


# --- accounting ---------------------------------------------------------------------------------------------


def rebalance(weights: Tensor, target: Tensor, cost: float) -> Tensor:
    """Return the share of the value kept, mu [B], when `weights` [B, A] are traded into `target` [B, A].

    mu is the root of  w0 + (1-c) sum max(w_i - mu a_i, 0) - sum max(mu a_i - w_i, 0) / (1-c) = mu a0  (i over
    coins; c: `cost` per side), as in Ormos and Urban (2013) and Jiang, Xu and Liang (2017, arXiv:1706.10059):
    for a given set of sold coins the equation is linear and mu a quotient, so each Newton step is that
    quotient. From mu = 1, over the root, it never falls under the root, and passes a kink (one a coin) or
    ends with the root; the slopes differ by (1-c)^2 at most, so the error shrinks to a share of 1 - (1-c)^2,
    which it is at first. That bounds the rounds without a look at mu. The last quotient is taken with
    gradient and gives the implicit gradient of the root in both arguments (at a kink: a one-sided one).
    """
    check_cost(cost)
    with torch.no_grad():
        sold = weights > target  # mu = 1
        for power in range(1, weights.shape[-1]):
            if (1 - (1 - cost) ** 2) ** power < 2**-53:  # the error, relative to 1, is rounding
                break
            sold = weights > _value_kept(weights, target, sold, cost)[..., None] * target
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
    """Return coins sold + cash spent on coins [...], fractions of the value; mu [..., 1]: value kept."""
    moved = (weights - mu * target)[..., 1:]
    return (moved.clip(min=0) - moved.clip(max=0) / (1 - cost)).sum(-1)


class Limits(NamedTuple):
    """What an account may hold after a trade, and which orders it leaves out."""

    max_weight: float = 1.0  # of each coin
    min_cash: float = 0.0
    no_trade_band: float = 0.0


NO_LIMITS = Limits()


def constrain(weights: Any, target: Any, cost: float, limits: Limits) -> Any:
    """Return what is left of a target [..., A] for an account that holds `weights`; torch or numpy.

    Coins are cut, and scaled down to leave the cash. A coin that would then move by less than the band stays,
    unless it weighs too much, or is to be 0, or to be sold where there is too little cash. The rest is traded
    as a portfolio of its own into the proportions asked for: with what that is worth then, all weights are a
    target that `rebalance` reaches by the same trades.
    """
    if limits == NO_LIMITS:
        return target
    if isinstance(target, np.ndarray):
        return constrain(torch.from_numpy(weights), torch.from_numpy(target), cost, limits).numpy()
    target = cap(target, limits.max_weight, limits.min_cash)
    least = (1 - cost) ** 2  # of the value, which every trade keeps
    stays = ((weights - target).abs() < limits.no_trade_band) & (target > 0)
    stays &= weights <= (limits.max_weight * least if limits.max_weight < 1 else math.inf)
    stays[..., 0] = False
    short = (weights * ~stays).sum(-1, keepdim=True) * least < limits.min_cash
    stays &= ~short | (weights < target)
    free, part = weights * ~stays, target * ~stays
    free[..., 0] += 1e-300  # so that no sum is 0
    part[..., 0] += part.sum(-1) == 0
    share = free.sum(-1, keepdim=True)
    part = cap(share * part / part.sum(-1, keepdim=True), limits.max_weight, limits.min_cash / least)
    after = weights * stays + rebalance(free, part, cost)[..., None] * part
    sub = stays.any(-1, keepdim=True) & (share * least >= limits.min_cash)
    return torch.where(sub, after / after.sum(-1, keepdim=True), target)


def cap(amounts: Tensor, most: float, cash: float) -> Tensor:
    """Cut the coins of `amounts` [..., A] at `most`, and scale them down to leave `cash`, which grows."""
    total, coins = amounts.sum(-1, keepdim=True), amounts[..., 1:].clip(max=most)
    room = (total - cash).clip(min=1e-12)
    coins = coins * (room / torch.maximum(room, coins.sum(-1, keepdim=True)))
    return torch.cat([(total - coins.sum(-1, keepdim=True)).clip(min=0), coins], -1)


class WrongWeights(ValueError):
    """Weights that are NaN, infinite, negative, or all zero."""


def weights_from_logits(logits: Tensor, present: Tensor | None = None) -> Tensor:
    """Return weights [..., A] of logits [..., N]: softmax over coins present and cash, whose logit is 0."""
    if present is not None:
        logits = logits.masked_fill(~present, -math.inf)
    return torch.cat([torch.zeros_like(logits[..., :1]), logits], -1).softmax(-1)


def project(target: Any, shape: tuple[int, ...], present: Any = None) -> Any:
    """Divide non-negative numbers of the given shape by their sum over the last axis; torch or numpy.

    What is asked of assets that are not `present` [..., A] counts for nothing; of none else, cash is held.
    """
    if tuple(target.shape) != shape:
        raise ValueError(f"weights must have the shape {shape}, cash first; got {tuple(target.shape)}")
    total = target.sum(-1)
    if not bool((target >= 0).all() & (total > 0).all() & (total < np.inf).all()):
        raise WrongWeights("weights must be finite, not negative, and not all zero")
    if present is not None:
        target = target * present
        target[..., 0] += target.sum(-1) == 0
    return target / target.sum(-1)[..., None]


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Refuse a value that is none of the choices with a ValueError."""
    if value not in choices:
        raise ValueError(f"{name} must be {' or '.join(map(json.dumps, choices))}; got {value!r}")


def check_cost(cost: float) -> None:
    """Refuse a cost that is not a fraction per side with a ValueError."""
    if not 0 <= cost < 1:
        raise ValueError(f"cost must be a fraction per side, at least 0 and under 1; got {cost}")


def check_prices(open_prices: Any, close_prices: Any) -> None:
    """Refuse prices [T, N], numpy or torch, that are infinite or not positive (ValueError); NaN passes."""
    for name, prices in (("open", open_prices), ("close", close_prices)):
        wrong = (prices <= 0) | (prices == math.inf)
        if bool(wrong.any()):
            row, coin = divmod(int((1 * wrong).argmax()), wrong.shape[-1])
            price = f"{name} price of row {row}, column {coin} is {prices[row, coin]:g}"
            raise ValueError(f"{price}: prices must be finite and positive")


def align_prices(
    open_prices: Any, close_prices: Any, fill: str, hold_bars: int = 1
) -> tuple[Any, Any, Any, Any]:
    """Compute fill prices and price relatives for each decision row t, from prices [T, N] (numpy or torch).

    R is the number of rows on which a decision can be filled and held for h = `hold_bars` bars.

    Returns: fill prices f [R+h, N]; gap [R+h, N] from the close of bar t to f[t]; hold [R, N] from f[t] to
    f[t+h]; mark [R, N] from f[t] to the close of bar t+h.
    """
    check_choice("fill", fill, ("next_open", "close"))
    shape, least = open_prices.shape, hold_bars + 2
    if len(shape) != 2 or shape != close_prices.shape or hold_bars < 1 or len(open_prices) < least:
        raise ValueError(f"prices must be two arrays [T, N], T >= {least}; got {shape}, {close_prices.shape}")
    check_prices(open_prices, close_prices)
    fill_prices = open_prices[1:] if fill == "next_open" else close_prices
    rows = len(fill_prices) - hold_bars
    gap = fill_prices / close_prices[: len(fill_prices)]
    hold = fill_prices[hold_bars:] / fill_prices[:rows]
    mark = close_prices[hold_bars : rows + hold_bars] / fill_prices[:rows]
    return fill_prices, gap, hold, mark


def with_cash(coins: np.ndarray) -> np.ndarray:
    """Prepend cash, always there and of relative 1, to what is true of the coins: [..., N] -> [..., A]."""
    return np.concatenate([np.ones_like(coins[..., :1]), coins], axis=-1)


class Account:
    """One portfolio in numpy, float64: the accounting of `PortfolioEnv` and `backtest`."""

    def __init__(self, weights: np.ndarray, weights_seen: np.ndarray, cost: float, limits: Limits) -> None:
        self.weights = weights  # [A] at the fill: before the trade until `trade`, after it from then on
        self.weights_seen = weights_seen  # [A] valued at the close at which the next decision is taken
        self.cost, self.limits = cost, limits

    def trade(self, target: Any, present: np.ndarray | None = None) -> tuple[float, float]:
        """Trade into `target` [A], as `project` and `constrain` give it; return value kept and turnover."""
        target = project(np.asarray(target, np.float64), self.weights.shape, present)
        target = constrain(self.weights, target, self.cost, self.limits)
        mu, turnover = rebalance_one(self.weights, target, self.cost)
        self.weights = target
        return mu, turnover

    def hold(self, hold: np.ndarray, mark: np.ndarray) -> float:
        """Return the growth to the next fill, given price relatives [A] to it, and to the close before it."""
        self.weights_seen, _ = drift(self.weights, mark)
        self.weights, growth = drift(self.weights, hold)
        return growth


class EqualWeight:
    """The benchmark: an equal-weight hold of the coins from some fill on, without costs.

    Where coins are `present` [T, N] at some decisions and not at others, it is one of those which are, formed
    anew at the fill that follows each change; of none, cash.
    """

    def __init__(self, fill_prices: Any, present: Any = None) -> None:
        self.fill_prices, self.present = torch.as_tensor(fill_prices), None
        if present is None:
            return
        self.present = present = torch.as_tensor(present)[: len(self.fill_prices)]
        changes = (present[1:] != present[:-1]).any(1)
        self.period = torch.nn.functional.pad(changes.cumsum(0), (1, 0))  # [T]
        self.first = torch.nn.functional.pad(changes.nonzero()[:, 0] + 1, (1, 0))  # row of each period [M]
        grown = self._grown(self.first[1:], self.first[:-1])
        self.chain = torch.nn.functional.pad(grown.cumprod(0), (1, 0), value=1.0)  # to the start of each [M]

    def _grown(self, rows: Tensor, base: Tensor) -> Tensor:
        """Return the growth [...] to the fills of `rows` of what was formed at those of rows `base`."""
        relatives, present = self.fill_prices[rows] / self.fill_prices[base], self.present[base]
        return torch.where(present.any(-1), (relatives * present).sum(-1) / present.sum(-1).clamp(min=1), 1.0)

    def __call__(self, rows: Tensor, start: Tensor) -> Tensor:
        """Return the value [...] at the fills of `rows` of what was formed at those of `start`."""
        if self.present is None:
            return (self.fill_prices[rows] / self.fill_prices[start]).mean(-1)
        start = start.expand_as(rows)
        here, there = self.period[start], self.period[rows]
        following = (here + 1).clamp(max=len(self.first) - 1)
        later = self._grown(self.first[following], start) * self._grown(rows, self.first[there])
        later = later * self.chain[there] / self.chain[following]
        return torch.where(here == there, self._grown(rows, start), later)


# --- environments -------------------------------------------------------------------------------------------


class Outcomes(NamedTuple):
    """What S decisions of E portfolios lead to, [S, E] each."""

    before: Tensor  # weights at the fill, before the trade [S, E, A]
    after: Tensor  # weights at the next fill [S, E, A]
    mu: Tensor  # share of the value that the trade leaves
    reward: Tensor
    value: Tensor
    benchmark_value: Tensor
    alive: Tensor  # whether the portfolio had not been ruined before
    terminated: Tensor


class VectorPortfolioEnv:
    """Step E portfolios at once in torch, float64, on the device of the prices; all of it is differentiable.

    The benchmark is `EqualWeight`. A portfolio whose value falls under `ruin` is terminated, and keeps its
    value, with reward 0, to the end. Decisions are `hold_bars` apart, without an order in between. Prices are
    [T, N], `cost` is a fraction per side, `fill` "next_open" or "close", `reward` "excess" or "growth". Coins
    that are not `present` [T, N] at a decision cannot be asked for; what is held of them is sold at its fill.

    Attributes:
        rows: number of decision rows with prices to be filled and held at.
        mark: price relatives [rows, A] from the fill to the close at the next decision.
        row: [E] of the next decision.  value, benchmark_value: [E] 1 at the start.
        turnover, cost_paid: [E] of the last step, fractions of the value.
    """

    def __init__(
        self, open_prices: Tensor, close_prices: Tensor, *, cost: float, fill: str = "next_open",
        reward: str = "excess", ruin: float = 0.1, hold_bars: int = 1, present: Tensor | None = None,
        limits: Limits = NO_LIMITS,
    ) -> None:  # fmt: skip
        check_cost(cost)
        check_choice("reward", reward, ("excess", "growth"))
        prices = open_prices.to(torch.float64), close_prices.to(torch.float64)
        self._fill_prices, *relatives = align_prices(*prices, fill, hold_bars)
        padded = (torch.nn.functional.pad(part, (1, 0), value=1.0) for part in relatives)
        self._gap, self._hold, self.mark = padded  # [R, A], gap [R+h, A]: cash 1
        usable = torch.isfinite(self._gap[:-hold_bars] * self._hold * self.mark).all(-1)
        self._unusable_before = torch.nn.functional.pad((~usable).cumsum(0), (1, 0))  # [R+1]
        self.cost, self.limits, self.reward, self.ruin, self.hold_bars = cost, limits, reward, ruin, hold_bars
        self.rows, self.assets = self._hold.shape
        self._benchmark = EqualWeight(self._fill_prices, present)
        self.present = None if present is None else torch.nn.functional.pad(present, (1, 0), value=True)

    def reset(
        self, start: Tensor, steps: int, weights: Tensor | None = None, where: Tensor | None = None
    ) -> Tensor:
        """Start segments of `steps` decisions at rows `start` [E], and return the weights seen [E, A].

        `weights` [E, A], or all cash, are held at the close of the first decision. `where` [K]: positions of
        the portfolios that start, if not all do; the rest is then [K], too. A segment that leaves the rows
        that can be traded, or has missing prices, is a ValueError.
        """
        after = start + (steps - 1) * self.hold_bars + 1  # the row after the last decision
        if steps < 1 or int(start.min()) < 0 or int(after.max()) > self.rows:
            raise ValueError(f"{steps} steps must lie within the {self.rows} rows that can be traded")
        if bool((self._unusable_before[after] > self._unusable_before[start]).any()):
            raise ValueError("a segment has missing prices: start after the last coin's listing")
        if weights is None:
            weights = torch.eye(self.assets, device=self._hold.device)[:1].expand(len(start), -1)
        weights = project(weights.to(torch.float64), (len(start), self.assets))
        fresh = {"row": start, "_start": start, "_steps_left": torch.full_like(start, steps)}
        fresh["_weights"] = drift(weights, self._gap[start])[0]  # at the fill, before the trade
        fresh |= dict.fromkeys(("value", "benchmark_value"), torch.ones_like(weights[:, 0]))
        fresh |= dict.fromkeys(("turnover", "cost_paid"), torch.zeros_like(weights[:, 0]))
        for name, part in fresh.items():
            setattr(self, name, part if where is None else getattr(self, name).index_copy(0, where, part))
        return weights

    def step(self, target: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Trade into `target` [E, A]; return weights seen next [E, A], reward, terminated, truncated [E]."""
        if not self._steps_left.all():
            raise RuntimeError("the segment is over: call reset")
        present = None if self.present is None else self.present[self.row]
        target = project(target.to(torch.float64), (len(self.row), self.assets), present)
        target = constrain(self._weights, target, self.cost, self.limits)
        start = self.row, self._weights, self._start, self.value, self.benchmark_value
        one = Outcomes(*(part[0] for part in self._trade(target[None], *start)))
        turnover = turnover_of(one.before, target, one.mu[:, None], self.cost)
        weights_seen = self.seen(self.row, target)
        self.turnover = torch.where(one.alive, turnover, 0.0)
        self.cost_paid = torch.where(one.alive, 1 - one.mu, 0.0)
        self._weights, self.value, self.benchmark_value = one.after, one.value, one.benchmark_value
        self.row = self.row + self.hold_bars
        self._steps_left = self._steps_left - 1
        return weights_seen, one.reward, one.terminated, ~one.terminated & (self._steps_left == 0)

    def seen(self, row: Tensor, target: Tensor) -> Tensor:
        """Return the weights seen at the decisions [...] that follow those at `row` for `target` [..., A]."""
        return drift(target, self.mark[row])[0]

    def within_limits(self, row: Tensor, weights: Tensor, target: Tensor) -> Tensor:
        """Return what `constrain` leaves of a target [E, A] at the fills of `row` [E]; `weights` are seen."""
        return constrain(drift(weights, self._gap[row])[0], target, self.cost, self.limits)

    def outcomes(self, start: Tensor, weights: Tensor, targets: Tensor) -> Outcomes:
        """Account for S decisions at once, without a state: `targets` [S, E, A] from rows `start` [E] on.

        Nothing is checked, so that no GPU is waited for: a target that is not finite gives such rewards. They
        are `within_limits` already, float64 and of sum 1, as the `weights` [E, A] seen at the first decision.
        """
        one = torch.ones_like(weights[:, 0])
        return self._trade(targets, start, drift(weights, self._gap[start])[0], start, one, one)

    def _trade(
        self, targets: Tensor, row: Tensor, weights: Tensor, start: Tensor, value: Tensor, benchmark: Tensor
    ) -> Outcomes:
        """Trade the weights [E, A] at the fill of `row` [E] into the targets [S, E, A], one after another."""
        rows = row + self.hold_bars * torch.arange(len(targets), device=row.device).unsqueeze(1)  # [S, E]
        after, growth = drift(targets, self._hold[rows])
        before = torch.cat([weights[None], after[:-1]])
        mu = rebalance(before, targets, self.cost)
        benchmarks = self._benchmark(rows + self.hold_bars, start)
        reward = torch.log(mu * growth)
        if self.reward == "excess":
            reward = reward - torch.log(benchmarks / torch.cat([benchmark[None], benchmarks[:-1]]))
        factors = torch.cat([value[None], mu * growth])
        ruined = (factors.cumprod(0) < self.ruin).cumsum(0) > 0  # [S + 1, E]
        alive = ~ruined[:-1]
        value = torch.cat([factors[:1], torch.where(alive, factors[1:], 1.0)]).cumprod(0)[1:]
        reward = torch.where(alive, reward, 0.0)
        return Outcomes(before, after, mu, reward, value, benchmarks, alive, ruined[1:])


def price_arrays(
    frame: pd.DataFrame, symbols: list[str], delisting_loss: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """Return open and close prices [T, N], float64, from the frame of getData.load_prices.

    Where coins may be absent, an absent one opens at the next open at which it trades, and where it trades no
    more, at its last close less `delisting_loss`, so that what is held of it can be sold there at any fill.
    Where no coin is there, history has a hole: all open at their last close.
    """
    opens, closes = (frame[[f"{symbol}.{name}" for symbol in symbols]] for name in ("open", "close"))
    opens, closes = (part.to_numpy(np.float64, copy=True) for part in (opens, closes))  # writable, for torch
    if getData.members_of(frame, symbols) is None:
        return opens, closes
    hole = np.isnan(closes).all(1, keepdims=True)
    over = np.isnan(closes[::-1]).cumprod(0)[::-1] > 0  # after its last bar [T, N]
    last = pd.DataFrame(closes).ffill().to_numpy()
    closes = pd.DataFrame(np.where(over, last * (1 - delisting_loss), last)).bfill().to_numpy()
    return np.array(pd.DataFrame(np.where(over | hole, closes, opens)).bfill()), closes


def split_rows(index: pd.DatetimeIndex, footer: dict, split: str, fill: str) -> tuple[int, int]:
    """Return the first decision row of a split, or of "all", and the one after the last that can be held."""
    spans = footer["splits"] | {"all": [min(footer["splits"].values())[0], max(footer["splits"].values())[1]]}
    check_choice("split", split, spans)
    first, stop = index.searchsorted(pd.to_datetime(spans[split], unit="ms", utc=True))
    last_rows = 2 if fill == "next_open" else 1  # without a later bar to be filled at and to be held to
    return int(first), int(min(stop, len(index) - last_rows))


@dataclass(eq=False)
class Market:
    """What the environments of a process have in common."""

    open_prices: np.ndarray  # [T, N]
    close_prices: np.ndarray  # [T, N]
    times: np.ndarray  # [T] of the closes, ms since 1970, or since the first bar
    present: np.ndarray | None = None  # coins that may be held after the decision of each bar [T, N]; all
    reducer: feature_reducer.FeatureReducer | None = None
    windows: feature_reducer.FeatureWindows | None = None

    def __post_init__(self) -> None:
        # no copy where torch and rows can be taken from them as they are
        self.open_prices = np.require(self.open_prices, np.float64, ["C", "W"])
        self.close_prices = np.require(self.close_prices, np.float64, ["C", "W"])
        check_prices(self.open_prices, self.close_prices)

    @functools.cached_property
    def log_returns(self) -> np.ndarray:
        """Close-to-close log returns [T-1, N], float32, clipped to +-10; row t leads from bar t to t+1."""
        return np.diff(np.log(self.close_prices), axis=0).clip(-10, 10).astype(np.float32)


@functools.lru_cache(maxsize=4)
def load_market(
    data_dir: Path, checkpoint: Path | None, written: tuple[int, ...]
) -> tuple[Market, pd.DatetimeIndex, dict]:  # fmt: skip
    """Load a folder's market, index and footer, with a checkpoint's reducer; anew if `written` differs."""
    frame, footer = getData.load_prices(data_dir)
    prices, times = price_arrays(frame, footer["symbols"], DELISTING_LOSS), frame.index.as_unit("ms").asi8
    market = Market(*prices, times, getData.members_of(frame, footer["symbols"]))
    if checkpoint:
        saved, device = feature_reducer.load_encoder(checkpoint), torch.device("cpu")
        market.windows, features = feature_reducer.load_windows(data_dir, saved["window_bars"], device, saved)
        feature_reducer.check_market(saved, features)
        footer["splits"] = features["splits"]  # from the first whole window on
        market.reducer = feature_reducer.reducer_from_checkpoint(saved, device)
        if market.windows.present is not None:
            market.present = market.windows.present.numpy()
    return market, frame.index, footer


@functools.lru_cache(maxsize=4)
def encode_rows(market: Market, first: int, last: int) -> np.ndarray:
    """Return the latents [R, L], float32, of all decisions from one row to another."""
    market.windows.rows((market.times[first], market.times[last] + 1))  # they are there
    rows = torch.arange(first, last + 1)
    parts = tqdm(rows.split(512), desc="encode", unit="batch", disable=None, leave=False)
    with torch.no_grad():
        latents = [market.reducer.encoder(market.windows(part), market.windows.there(part)) for part in parts]
        return torch.cat(latents).numpy()


class PortfolioEnv(gymnasium.Env):
    """One portfolio as a gymnasium environment; the accounting of VectorPortfolioEnv, up to rounding.

    Observation: Box, float32: what `observation` names, then the weights held now [A].
        "returns": close-to-close log returns of the last `look_back` bars [look_back * N], oldest first, all
        coins of a bar together, clipped to +-10. "windows": the normalised window [D] of feature_reducer.py.
        "latents": its code [L]; all are encoded when the first environment of a process is made.
    Action: Box. "weights": [A] non-negative numbers, which are divided by their sum. (The box starts slightly
        above 0, so that a library that clips into it never sends all zeros. Single zeros are accepted.)
        "logits": [N] one per coin; the weights are their softmax with the cash logit at 0.
    Reward: log growth of the value net of costs, minus that of the benchmark if `reward` is "excess".
    Episode end: terminated when the value falls under `ruin`, truncated after `steps` decisions.
    info: row and time (close of the bar of the next decision, ms since 1970, UTC) as int64; value,
        benchmark_value, turnover, cost_paid of the last step, and weights [A], in float64.

    Args:
        open_prices, close_prices: [T, N], and `times` [T] of the closes, ms, or since the first bar, and
            `present` [T, N], the coins that may be asked for, if these are not all; or else the `split`
            ("train", "validation", "test", "all") of `data_dir`, shared within a process.
        cost: fraction per side.  fill: "next_open" or "close".  reward: "excess" or "growth".
        limits: (max_weight, min_cash, no_trade_band), by `constrain`.
        data_dir, cost, fill, limits: if None, as the constants of this script say.
        steps: decisions of an episode.  hold_bars: from one to the next, without an order in between.
        look_back: bars of "returns".  random_weights: start from random weights instead of cash.
        checkpoint: of "latents" and "windows": feature_reducer.pt, or one of train.py's, such as best.pt; in
            data_dir/checkpoints, or a path.

    Raises:
        ValueError: an argument is wrong, or prices are missing, not positive, or too few. UserError: data_dir
        has no complete data, or no reducer that fits them.
    """

    def __init__(
        self, open_prices: np.ndarray | None = None, close_prices: np.ndarray | None = None, *,
        times: np.ndarray | None = None, present: np.ndarray | None = None,
        data_dir: str | Path | None = None, split: str = "train",
        cost: float | None = None, fill: str | None = None, reward: str = "excess", ruin: float = 0.1,
        steps: int = 288, hold_bars: int = 1, look_back: int = 48, random_weights: bool = False,
        action: str = "weights", observation: str = "returns", checkpoint: str = "feature_reducer.pt",
        limits: Limits | None = None,
    ) -> None:  # fmt: skip
        self.cost = FEE_RATE + SLIPPAGE_RATE if cost is None else cost
        self.fill, self.reward, self.ruin = fill or FILL, reward, ruin
        self.steps, self.hold_bars = steps, hold_bars
        self.random_weights, self.action = random_weights, action
        self.limits = Limits(*((MAX_WEIGHT, MIN_CASH, NO_TRADE_BAND) if limits is None else limits))
        check_cost(self.cost)
        check_choice("fill", self.fill, ("next_open", "close"))
        check_choice("reward", reward, ("excess", "growth"))
        check_choice("action", action, ("weights", "logits"))
        check_choice("observation", observation, ("returns", "latents", "windows"))
        if open_prices is None or close_prices is None:
            folder = Path(data_dir or DATA_DIR).absolute()
            path = None if observation == "returns" else feature_reducer.checkpoint_path(folder, checkpoint)
            files = [folder / "features" / "prices.parquet", *([path] if path else [])]
            written = tuple(file.stat().st_mtime_ns for file in files if file.exists())
            self.market, index, footer = load_market(folder, path, written)
            rows = split_rows(index, footer, split, self.fill)
        elif observation != "returns":
            raise ValueError("arrays of prices have neither windows nor latents: give data_dir instead")
        else:
            rows = 0, len(close_prices)
            times = getData.BAR_MS * np.arange(len(close_prices)) if times is None else times
            self.market = Market(open_prices, close_prices, np.asarray(times, np.int64), present)
        opens, self._close_prices = self.market.open_prices, self.market.close_prices
        self._fill_prices = opens[1:] if self.fill == "next_open" else self._close_prices
        self._benchmark = EqualWeight(self._fill_prices, self.market.present)
        self.first_row, self.last_row = self._starts(*rows, look_back, observation == "returns")
        self.observe_market = self._observer(observation, look_back)

        self.assets = 1 + self._close_prices.shape[1]
        bound = 10.0 if observation == "returns" else np.inf
        high = np.full(len(self.observe_market(self.first_row)) + self.assets, bound, np.float32)
        high[-self.assets :] = 1
        self.observation_space = gymnasium.spaces.Box(np.where(high > 1, -high, 0), high, dtype=np.float32)
        box = (1e-8, 1.0, (self.assets,)) if action == "weights" else (-10.0, 10.0, (self.assets - 1,))
        self.action_space = gymnasium.spaces.Box(*box, dtype=np.float32)
        self._over = True

    def _starts(self, first: int, stop: int, look_back: int, returns: bool) -> tuple[int, int]:
        """Return the first and the last row at which an episode from `first` on, before `stop`, can start."""
        before, bars = look_back if returns else 0, self.steps * self.hold_bars
        first_row, last_row = max(first, before), min(stop, len(self._fill_prices) - 1) - bars
        if min(self.steps, self.hold_bars, look_back) < 1 or last_row < first_row:
            text = f"look_back {look_back} and {self.steps} steps of {self.hold_bars} bars must be at least 1"
            raise ValueError(f"{text} and fit into {stop - first} rows")
        used = slice(first_row - before, last_row + bars + 1)
        if not (np.isfinite(self._fill_prices[used]).all() and np.isfinite(self._close_prices[used]).all()):
            raise ValueError("prices are missing: start after the last coin's listing")
        return first_row, last_row

    def _observer(self, observation: str, look_back: int) -> Callable[[Any], np.ndarray]:
        """Return the function from a row, or rows [B], to what is seen of the market then: [D] or [B, D]."""
        first, last = self.first_row, self.last_row + self.steps * self.hold_bars
        if observation == "returns":
            returns = self.market.log_returns  # [T-1, N]
            coins = returns.shape[1]
            view = np.lib.stride_tricks.sliding_window_view(returns.ravel(), look_back * coins)[::coins]
            return lambda rows: view[rows - look_back]
        if observation == "latents":
            latents = encode_rows(self.market, first, last)
            return lambda rows: latents[rows - first]
        windows = self.market.windows
        windows.rows(self.market.times[[first, last]])  # they are complete
        return lambda rows: windows(torch.as_tensor(rows).view(-1)).numpy().reshape(*np.shape(rows), -1)

    def draw(
        self, rng: np.random.Generator, size: tuple[int, ...], options: dict | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Draw rows to start at [*size] and weights held there [*size, A], or take those of `options`."""
        options = options or {}
        if unknown := options.keys() - {"start", "weights"}:
            raise ValueError(f'reset options are "start" and "weights"; got {min(unknown)!r}')
        start = rng.integers(self.first_row, self.last_row + 1, size)
        cash = np.tile(np.eye(self.assets)[0], (*size, 1))
        weights = rng.dirichlet(np.ones(self.assets), size) if self.random_weights else cash
        start = np.array(np.broadcast_to(options.get("start", start), size), np.int64)
        if not ((start >= self.first_row) & (start <= self.last_row)).all():
            raise ValueError(f"start must be a row from {self.first_row} to {self.last_row}; got {start}")
        weights = np.asarray(options.get("weights", weights), np.float64)
        return start, project(weights, (*size, self.assets))

    def tradable(self, rows: Any) -> np.ndarray | None:
        """Return whether each asset, cash first, may be asked for at `rows` [...]; None: all always."""
        present = self.market.present
        return None if present is None else with_cash(present[rows])

    def weights_of(self, action: Any, size: tuple[int, ...]) -> np.ndarray:
        """Return the weights [*size, A] that an action asks for, not projected yet."""
        action = np.asarray(action, np.float64)
        if self.action == "weights":
            return action
        shape = *size, self.assets - 1
        if action.shape != shape or not np.isfinite(action).all():
            raise WrongWeights(f"logits must be finite, of shape {shape}, without cash; got {action.shape}")
        return weights_from_logits(torch.from_numpy(action)).numpy()

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        """Start an episode at row options["start"], else a random one, holding options["weights"] [A]."""
        super().reset(seed=seed)
        start, weights_seen = self.draw(self.np_random, (), options)
        self._start = self._row = row = int(start)
        gap = np.append(1.0, self._fill_prices[row] / self._close_prices[row])
        self._account = Account(drift(weights_seen, gap)[0], weights_seen, self.cost, self.limits)
        self._value = self._benchmark_value = 1.0
        self._over = False
        return self._state(0.0, 0.0)

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        """Trade into the weights of `action`, and hold them for `hold_bars` bars; as gymnasium.Env.step."""
        if self._over:
            raise RuntimeError("the episode is over: call reset")
        mu, turnover = self._account.trade(self.weights_of(action, ()), self.tradable(self._row))
        price = self._fill_prices[self._row]
        self._row += self.hold_bars
        hold, mark = self._fill_prices[self._row] / price, self._close_prices[self._row] / price
        growth = self._account.hold(np.append(1.0, hold), np.append(1.0, mark))
        self._value *= mu * growth
        old_benchmark_value = self._benchmark_value
        self._benchmark_value = float(self._benchmark(*map(torch.tensor, (self._row, self._start))))
        reward = float(np.log(mu * growth))
        if self.reward == "excess":
            reward -= float(np.log(self._benchmark_value / old_benchmark_value))
        terminated = bool(self._value < self.ruin)
        truncated = self._row - self._start == self.steps * self.hold_bars and not terminated
        self._over = terminated or truncated
        observation, info = self._state(turnover, 1 - mu)
        return observation, reward, terminated, truncated, info

    def _state(self, turnover: float, cost_paid: float) -> tuple[np.ndarray, dict[str, Any]]:
        """Return observation and info at the close of the current bar."""
        numbers = {"value": self._value, "benchmark_value": self._benchmark_value}
        numbers |= {"turnover": turnover, "cost_paid": cost_paid}
        info = {name: np.float64(number) for name, number in numbers.items()}
        info |= {"row": np.int64(self._row), "time": self.market.times[self._row]}
        info |= {"tradable": self.tradable(self._row)} if self.market.present is not None else {}
        weights = self._account.weights_seen.copy()
        observation = np.append(self.observe_market(self._row), weights.astype(np.float32))
        return observation, info | {"weights": weights}


class GymVectorEnv(gymnasium.vector.VectorEnv):
    """E portfolios as one gymnasium vector environment, stepped at once by VectorPortfolioEnv.

    It does what gymnasium's SyncVectorEnv of PortfolioEnvs of these `options` does, to rounding, in each
    `autoreset_mode`. TorchRL takes "SameStep" and "Disabled", some wrappers of gymnasium only "NextStep".
    Only the random starts differ, since one generator draws them all.
    """

    def __init__(
        self, num_envs: int = 1, autoreset_mode: str | AutoresetMode = "SameStep", **options: Any
    ) -> None:
        self._one = one = PortfolioEnv(**options)  # spaces, starts and observations
        self.num_envs = num_envs
        self.autoreset_mode = AutoresetMode(autoreset_mode)  # where TorchRL looks
        self.metadata = one.metadata | {"autoreset_mode": self.autoreset_mode}
        self.single_observation_space, self.single_action_space = one.observation_space, one.action_space
        self.observation_space = gymnasium.vector.utils.batch_space(one.observation_space, num_envs)
        self.action_space = gymnasium.vector.utils.batch_space(one.action_space, num_envs)
        prices = torch.from_numpy(one.market.open_prices), torch.from_numpy(one.market.close_prices)
        present = None if one.market.present is None else torch.from_numpy(one.market.present)
        names = "cost", "fill", "reward", "ruin", "hold_bars", "limits"
        same = {name: getattr(one, name) for name in names}
        self._portfolios = VectorPortfolioEnv(*prices, present=present, **same)
        self._weights = np.empty((num_envs, one.assets))
        self._over = np.ones(num_envs, bool)  # whether no episode has started since the last one ended

    @torch.no_grad()
    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        """Start an episode in each, or in those of options["reset_mask"] [E]; as `PortfolioEnv.reset`."""
        super().reset(seed=seed)
        options = dict(options or {})
        mask = np.asarray(options.pop("reset_mask", np.ones(self.num_envs)), bool)
        self._start(mask, options)
        self._over = self._over & ~mask
        return self._observe(), self._info(mask)

    @torch.no_grad()
    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict]:
        """Step all by `actions`, weights [E, A] or logits [E, N]; what has ended follows `autoreset_mode`."""
        late = self._over  # start in this step instead
        if late.any() and self.autoreset_mode is not AutoresetMode.NEXT_STEP:
            raise RuntimeError("an episode is over, or none has started: call reset")
        target = self._one.weights_of(actions, (self.num_envs,))
        if late.any():
            self._start(late)  # so that all can be stepped, and once more below
            target = np.where(late[:, None], np.eye(self._one.assets)[0], target)
        weights, *results = self._portfolios.step(torch.from_numpy(target))
        self._weights = weights.numpy()
        reward, terminated, truncated = (part.numpy().copy() for part in results)
        if late.any():
            self._start(late)
            reward[late], terminated[late], truncated[late] = 0, False, False
        self._over, final = terminated | truncated, {}
        if self.autoreset_mode is AutoresetMode.SAME_STEP and self._over.any():
            (ended,) = self._over.nonzero()
            final_obs = np.full(self.num_envs, None, dtype=object)
            final_obs[ended] = list(self._observe()[ended])
            final = {"final_obs": final_obs, "final_info": self._info(self._over)}
            final |= {f"_{name}": self._over.copy() for name in final}
            self._start(self._over)
            self._over = np.zeros(self.num_envs, bool)
        info = self._info(np.ones(self.num_envs, bool)) | final
        return self._observe(), reward, terminated, truncated, info

    def _start(self, where: np.ndarray, options: dict | None = None) -> None:
        """Start episodes in the portfolios `where` [E]."""
        (places,) = where.nonzero()
        start, weights = map(torch.from_numpy, self._one.draw(self.np_random, places.shape, options))
        some = None if where.all() else torch.from_numpy(places)
        self._weights[places] = self._portfolios.reset(start, self._one.steps, weights, some)

    def _observe(self) -> np.ndarray:
        """Return the observations [E, D] at the closes of the current bars."""
        market = self._one.observe_market(self._portfolios.row.numpy())
        return np.concatenate([market, self._weights], axis=1, dtype=np.float32, casting="same_kind")

    def _info(self, present: np.ndarray) -> dict[str, np.ndarray]:
        """Return the infos [E] of the current bars, and who has them: `present` [E]; all are copies."""
        names = "row", "value", "benchmark_value", "turnover", "cost_paid"
        info = {name: getattr(self._portfolios, name).numpy().copy() for name in names}
        info |= {"time": self._one.market.times[info["row"]], "weights": self._weights.copy()}
        if self._one.market.present is not None:
            info["tradable"] = self._one.tradable(info["row"])
        return info | {f"_{name}": present.copy() for name in info}


gymnasium.register(
    "CryptoPortfolio-v0", "portfolio_env:PortfolioEnv", vector_entry_point="portfolio_env:GymVectorEnv"
)


# --- backtest and metrics -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Backtest:
    """The results of one policy over S consecutive decisions; value and benchmark are taken at the fills."""

    rows: np.ndarray  # [S] decision rows
    weights: np.ndarray  # [S, A] after the trade
    value: np.ndarray  # [S+1] 1 at the first fill, before its trade
    benchmark: np.ndarray  # [S+1] `EqualWeight`
    turnover: np.ndarray  # [S] fraction of the value at the fill
    cost_paid: np.ndarray  # [S] fraction of the value at the fill
    before: np.ndarray  # [S, A] weights at the fill, before the trade; the same where there is no order
    gains: np.ndarray  # [S, N] of each coin until the next fill, fraction of the value after the trade
    weights_seen: np.ndarray  # [A] of the next decision, at the close of the bar after the last one's


_LONGEST_HOLDING = 7 * BARS_PER_DAY  # of HOLDS in train.py


def backtest(
    policy: Policy, open_prices: np.ndarray, close_prices: np.ndarray, start: int, stop: int, *,
    cost: float, fill: str = "next_open", present: np.ndarray | None = None, limits: Limits = NO_LIMITS,
) -> Backtest:  # fmt: skip
    """Run `policy` from all cash over the decisions start ... stop-1 on prices [T, N], at a cost per side.

    The policy gets t and the weights seen [A], and returns a target [A], which is projected onto what is
    `present` [T, N] then, and within the `limits`, or None for no order. A target equal to the weights seen
    is one: they have moved by the time of the fill. A week into a hole in all coins, by when what was held is
    sold and no account moves any more, its bars cease to be part of the results, until a coin is back.
    Rows outside the prices, missing or impossible prices and impossible weights are ValueErrors.
    """
    check_cost(cost)
    fill_prices, _, hold, mark = align_prices(open_prices, close_prices, fill)
    if not 0 <= start < stop <= len(hold):
        raise ValueError(f"decisions must lie within rows 0 to {len(hold) - 1}; got {start} to {stop - 1}")
    hold, mark = with_cash(hold[start:stop]), with_cash(mark[start:stop])  # [S, A]
    if not (np.isfinite(hold).all() and np.isfinite(mark).all()):
        raise ValueError(f"prices are missing between rows {start} and {stop}")
    steps, assets = hold.shape
    weights, before, value = np.empty((steps, assets)), np.empty((steps, assets)), np.ones(steps + 1)
    turnover, cost_paid = np.empty(steps), np.empty(steps)
    account = Account(np.eye(assets)[0], np.eye(assets)[0], cost, limits)
    tradable = [None] * steps if present is None else with_cash(present[start:stop])
    for step in range(steps):
        before[step] = account.weights
        target = policy(start + step, account.weights_seen)
        mu, turnover[step] = (1.0, 0.0) if target is None else account.trade(target, tradable[step])
        cost_paid[step] = 1 - mu
        weights[step] = account.weights
        value[step + 1] = value[step] * mu * account.hold(hold[step], mark[step])
    equal_weight = EqualWeight(fill_prices, present)
    benchmark = equal_weight(torch.arange(start, stop + 1), torch.tensor(start)).numpy()
    gains, rest = weights[:, 1:] * (hold[:, 1:] - 1), slice(None)
    if present is not None:
        number = np.arange(len(present))
        since = number - np.maximum.accumulate(np.where(present.any(1), number, 0))  # a coin was there
        rest = since[start:stop] <= _LONGEST_HOLDING
    value, benchmark = (np.append(1.0, part[1:][rest]) for part in (value, benchmark))
    others = (part[rest] for part in (turnover, cost_paid, before, gains))
    rows = np.arange(start, stop)[rest]
    return Backtest(rows, weights[rest], value, benchmark, *others, account.weights_seen)


def metrics(result: Backtest) -> dict[str, float]:
    """Compute the figures that _NOTES["results"] defines, as fractions; a ratio with denominator 0 is 0."""
    returns = result.value[1:] / result.value[:-1] - 1  # [S]
    bars = len(returns)
    days = bars / BARS_PER_DAY
    growth, benchmark_growth = np.log(result.value[-1]), np.log(result.benchmark[-1])
    downside = np.sqrt(np.mean(np.minimum(returns, 0) ** 2))  # deviation from 0
    drawdown = np.max(1 - result.value / np.maximum.accumulate(result.value))
    annual_return = np.expm1(min(growth / bars * BARS_PER_YEAR, 600.0))  # e^709 is the largest in float64
    numbers = {
        "days": days,
        "total_return": result.value[-1] - 1,
        "growth": growth,
        "growth_bp_day": 1e4 * growth / days,
        "excess_bp_day": 1e4 * (growth - benchmark_growth) / days,
        "sharpe": _ratio(returns.mean(), deviation_of(returns)) * BARS_PER_YEAR**0.5,
        "sortino": _ratio(returns.mean(), downside) * BARS_PER_YEAR**0.5,
        "max_drawdown": drawdown,
        "calmar": _ratio(annual_return, drawdown),
        "turnover_day": result.turnover.mean() * BARS_PER_DAY,
        "cost_paid": result.cost_paid.sum(),
        "hit_rate": np.mean(excess_returns(result) > 1e-12),  # by more than rounding
    }
    return {name: float(number) for name, number in numbers.items()}


def _ratio(numerator: float, denominator: float) -> float:
    """Divide two numbers; 0 if the denominator is not positive."""
    return numerator / denominator if denominator > 0 else 0.0


def deviation_of(returns: np.ndarray) -> float:
    """Return the standard deviation of `returns` [S]; 0 of one alone, or if they vary by rounding only."""
    deviation = returns.std(ddof=1) if len(returns) > 1 else 0.0
    return float(deviation) if deviation > 1e-12 * max(1.0, np.abs(returns).max()) else 0.0


def bp_per_day(log_return: Any) -> Any:
    """Convert a log return per bar, in whatever holds numbers, to basis points per day."""
    return 1e4 * BARS_PER_DAY * log_return


# --- how sure, and at what cost -----------------------------------------------------------------------------

_HOUR = BARS_PER_DAY // 24


def excess_returns(result: Backtest, over: np.ndarray | None = None) -> np.ndarray:
    """Return the log growth of each bar [S] over that of the benchmark, or of another account [S+1]."""
    return np.diff(np.log(result.value / (result.benchmark if over is None else over)))


def block_length(returns: np.ndarray) -> float:
    """Choose the mean block of `bootstrap_interval`, in bars, for returns [S].

    Three days, since positions are held for days, or longer by the rule for the *hourly* sums of Politis and
    White, "Automatic block-length selection for the dependent bootstrap", Econometric Reviews 23 (2004),
    corrected by Patton, Politis and White, Econometric Reviews 28 (2009). On 5-minute bars it sees less than
    a day of lags; on daily sums of a few weeks it is so noisy that simulated 95 % intervals covered 68 to
    87 %, as blocks of one day did where the excess drifts with a half-life of 12 hours.
    """
    hours = len(returns) // _HOUR
    length = 3.0 * BARS_PER_DAY
    if hours >= 48:
        length = max(length, _HOUR * _optimal_block(returns[: hours * _HOUR].reshape(hours, _HOUR).sum(1)))
    return max(float(BARS_PER_DAY), min(length, len(returns) / 5))


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
) -> tuple[Any, Any]:
    """Estimate a confidence interval of the mean of `returns` [S] or [S, G] by the stationary bootstrap.

    Politis and Romano, "The stationary bootstrap", Journal of the American Statistical Association 89 (1994):
    blocks of geometric length with mean `block` bars, from random places of the series, which is closed to a
    circle; the sum of one is a difference of running sums. The interval is widened as for m = S / block
    independent observations, by sqrt(m / (m - 1)) and Student's t over the normal quantile, since intervals
    of few blocks are too narrow; with m < 4 it is NaN.
    """
    if len(returns) / block < 4:
        return np.nan * returns[0], np.nan * returns[0]
    mean = returns.mean(0)
    means = resampled_means(returns, block, resamples, seed)
    quantiles = np.quantile(means, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return tuple(mean + _few_blocks(level, len(returns) / block) * (quantiles - mean))


def resampled_means(returns: np.ndarray, block: float, resamples: int, seed: int) -> np.ndarray:
    """Return the means [R, ...] of so many stationary bootstrap samples of `returns` [S, ...]."""
    count, rng = len(returns), np.random.default_rng(seed)
    sums = np.concatenate([np.zeros_like(returns[:1]), returns, returns]).cumsum(0)  # two rounds of it
    means = np.empty((resamples, *returns.shape[1:]))
    for resample in range(resamples):
        breaks = np.flatnonzero(rng.random(count, dtype=np.float32) < 1 / block)
        lengths = np.diff(breaks[breaks > 0], prepend=0, append=count)
        starts = rng.integers(count, size=len(lengths))
        means[resample] = (sums[starts + lengths] - sums[starts]).sum(0) / count
    return means


def above_chance(
    returns: np.ndarray, block: float, *, level: float = 0.95, resamples: int = 2_000, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return which of many series [S, K] have a mean above 0, their p-values, and lower ends of the means.

    By the studentised maximum over all in the same resampled blocks (White, "A reality check for data
    snooping", Econometrica 68, 2000), to which a series far below 0 adds nothing (Hansen, "A test for
    superior predictive ability", Journal of Business & Economic Statistics 23, 2005), step by step without
    those above it (Romano and Wolf, "Stepwise multiple testing as formalized data snooping", Econometrica 73,
    2005). One-sided, and as much stricter as `bootstrap_interval` is wider; NaN under 4 blocks. A p-value is
    that of the best of all by chance; with probability `level` no mean is below a lower end above 0.
    """
    count, above = len(returns), np.zeros(returns.shape[1], dtype=bool)
    if count / block < 4:
        return above, np.full(above.shape, np.nan), np.full(above.shape, np.nan)
    means, mean = resampled_means(returns, block, resamples, seed), returns.mean(0)  # [R, K], [K]
    deviation = means.std(0)
    alike = deviation < 1e-12  # of an agent that holds what the benchmark holds
    deviation[alike], mean[alike] = 1.0, 0.0
    scores = (means - mean) / deviation
    scores[:, mean / deviation < -math.sqrt(2 * math.log(math.log(count)))] = 0.0
    wider = _few_blocks(2 * level - 1, count / block)
    score = mean / deviation / wider
    highest = scores.max(1).clip(min=0)  # [R]
    p_values = (1 + (highest[:, None] >= score.clip(min=0)).sum(0)) / (1 + resamples)
    low = mean - np.quantile(highest, level) * wider * deviation
    while not above.all():
        new = ~above & (score > max(0.0, np.quantile(scores[:, ~above].max(1), level)))
        if not new.any():
            break
        above |= new
    return above, p_values, low


def _few_blocks(level: float, blocks: float) -> float:
    """Return how much wider than the bootstrap's an interval of so few blocks must be.

    By the bias of its deviation, and Student's quantile over the normal one (Abramowitz and Stegun, 26.7.5).
    """
    freedom, z = blocks - 1, NormalDist().inv_cdf((1 + level) / 2)
    terms = (z**2 + 1) / 4, (5 * z**4 + 16 * z**2 + 3) / 96, (3 * z**6 + 19 * z**4 + 17 * z**2 - 15) / 384
    student = 1 + sum(term / freedom**power for power, term in enumerate(terms, start=1))
    return float(np.sqrt(blocks / (blocks - 1)) * student)


def sharpe_per_bar(returns: np.ndarray) -> float:
    """Return mean over standard deviation of `returns` [S], not annualised; NaN if they do not vary."""
    deviation = deviation_of(returns)
    return float(returns.mean() / deviation) if deviation else np.nan


def probabilistic_sharpe(returns: np.ndarray, threshold: float = 0.0) -> float:
    """Estimate the probability that the true Sharpe ratio per bar is above `threshold`, given `returns` [S].

    Bailey and Lopez de Prado, "The Sharpe ratio efficient frontier", Journal of Risk 15 (2012):
    Phi((SR - SR*) sqrt(S - 1) / sqrt(1 - skewness SR + (kurtosis - 1) / 4 SR^2)). NaN if they do not vary.
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

    Bailey and Lopez de Prado, "The deflated Sharpe ratio", Journal of Portfolio Management 40 (2014). A trial
    without a result (NaN) counts in the number. With fewer than two results the standard deviation is that
    of a ratio without skill over so many bars (Lo, "The statistics of Sharpe ratios", 2002).
    """
    trials = len(trial_sharpes)
    if trials <= 1:
        return 0.0
    results = np.array([sharpe for sharpe in trial_sharpes if np.isfinite(sharpe)])
    deviation = results.std(ddof=1) if len(results) > 1 else 1 / np.sqrt(max(bars - 1, 1))
    quantiles = (NormalDist().inv_cdf(1 - share / trials) for share in (1, np.exp(-1)))
    return float(deviation * np.dot((1 - np.euler_gamma, np.euler_gamma), list(quantiles)))


def break_even_cost(result: Backtest) -> float:
    """Find the cost per side at which the same trades would grow as the benchmark, by bisection.

    NaN if they grow less even without costs; infinity if they grow more and nothing is ever traded. A
    portfolio that only buys at the start also has a break-even cost, but it says nothing about trading.
    """
    traded = result.turnover > 0
    before, weights = torch.from_numpy(result.before[traded]), torch.from_numpy(result.weights[traded])
    free = np.log(result.value[-1] / result.benchmark[-1]) - np.log1p(-result.cost_paid).sum()
    if not free > 0:
        return np.nan
    if not traded.any():
        return np.inf
    low, high = 0.0, 1.0
    for _ in range(48):
        cost = (low + high) / 2
        growth = free + float(rebalance(before, weights, cost).log().sum())  # over the benchmark
        low, high = (cost, high) if growth > 0 else (low, cost)
    return cost


def excess_figures(result: Backtest, over: np.ndarray | None = None) -> dict[str, float]:
    """Compute the mean of `excess_returns`, log growth in bp per day, with its 95 % interval.

    detectable_bp_day: the true mean whose interval, two-sided as it is, would lie above zero in 80 % of such
    stretches: 1.96 + 0.84 of the bootstrap's deviations of the mean, of which half an interval has 1.96.
    """
    returns = excess_returns(result, over)
    block = block_length(returns)
    low, high = bootstrap_interval(returns, block)
    numbers = {"excess": float(returns.mean()), "excess_low": low, "excess_high": high}
    numbers["detectable"] = (1 + 0.84 / 1.96) * (high - low) / 2
    bp_day = {f"{name}_bp_day": bp_per_day(number) for name, number in numbers.items()}
    return bp_day | {"block_days": block / BARS_PER_DAY}


def skill(result: Backtest, trial_sharpes: Sequence[float]) -> dict[str, Any]:
    """Compute how sure the growth over the benchmark is, and the cost at which there is none.

    `trial_sharpes` are those per bar of all trials that this one was chosen from, itself included.
    """
    returns = excess_returns(result)
    expected_best = expected_best_sharpe(trial_sharpes, len(returns))
    return {
        **excess_figures(result),
        "sharpe_excess_bar": sharpe_per_bar(returns),
        "probabilistic_sharpe": probabilistic_sharpe(returns),
        "trials": len(trial_sharpes),
        "expected_best_sharpe_bar": expected_best,
        "deflated_sharpe": probabilistic_sharpe(returns, expected_best),
        "break_even_cost": break_even_cost(result),
    }


def profit_per_coin(result: Backtest) -> np.ndarray:
    """Return what each coin made [N] and the costs took (last): together the last value - 1."""
    value = result.value[:-1]
    return np.append((value * (1 - result.cost_paid)) @ result.gains, -(value * result.cost_paid).sum())


# --- baselines ----------------------------------------------------------------------------------------------

_HINDSIGHT = "hindsight optimum"  # the only one that knows the future
_TREND = 14 * BARS_PER_DAY  # look-back of the trends, bars
_RISK = 28 * BARS_PER_DAY  # look-back of covariances, bars
_TARGET_VOLATILITY = 0.4  # yearly


def baselines(
    open_prices: np.ndarray, close_prices: np.ndarray, start: int, stop: int, *, cost: float,
    fill: str = "next_open", symbols: Sequence[str] = ("first coin",), present: np.ndarray | None = None,
    limits: Limits = NO_LIMITS, **periods: int,
) -> dict[str, Backtest]:  # fmt: skip
    """Run `baseline_policies`, and the hindsight optimum, which has no limits; the rest as `backtest`."""
    market = open_prices, close_prices, start, stop
    trading = {"cost": cost, "fill": fill, "present": present}
    policies = baseline_policies(close_prices, start, symbols=symbols, present=present, **periods)
    results = {name: backtest(policy, *market, **trading, limits=limits) for name, policy in policies.items()}
    return results | {_HINDSIGHT: backtest(hindsight(*market, **trading), *market, **trading)}


def baseline_policies(
    close_prices: np.ndarray, start: int, *, rebalance_every: int, look_back: int,
    symbols: Sequence[str] = ("first coin",), present: np.ndarray | None = None,
) -> dict[str, Policy]:  # fmt: skip
    """Return the causal baselines, which trade at `start`, then never or every so many bars.

    Where coins are `present` [T, N] at some bars alone, each sees those, and trades when they change, too.
    """
    coins = close_prices.shape[1]
    present = np.ones(close_prices.shape, bool) if present is None else present
    changes = np.diff(present, axis=0, prepend=present[:1]).any(1)  # [T]
    equal = np.append(0.0, np.full(coins, 1 / coins))
    bitcoin = next((k for k, symbol in enumerate(symbols) if symbol.startswith("BTC")), 0)  # or the first

    def due(t: int, every: int = rebalance_every) -> bool:
        return changes[t] or (t - start) % every == 0

    def hold(target: np.ndarray, every: int = len(close_prices)) -> Policy:
        return lambda t, weights_seen: target if due(t, every) else None

    # `decide` makes weights, of any sum, of the closes [bars + 1, N] up to the decision
    def rule(decide: Callable, bars: int, *market: int, every: int = rebalance_every) -> Policy:
        def policy(t: int, weights_seen: np.ndarray) -> np.ndarray | None:
            if not due(t, every):
                return None
            (here,), target = present[t].nonzero(), np.eye(coins + 1)[0]
            if len(here):
                # the first coin stands in for one that is not there
                index = [int((here == coin).argmax()) for coin in market]
                target[np.append(0, 1 + here)] = decide(close_prices[max(t - bars, 0) : t + 1, here], *index)
            return target

        return policy

    def reversion(move: Callable, window: int) -> Policy:
        portfolio = np.ones(coins)

        def policy(t: int, weights_seen: np.ndarray) -> np.ndarray | None:
            if not due(t):
                return None
            (here,), rows = present[t].nonzero(), t - rebalance_every * np.arange(window)
            own = portfolio[here] if portfolio[here].any() else np.ones(len(here))
            portfolio[:] = 0
            if len(here):
                own, closes = own / own.sum(), close_prices[rows.clip(0)][:, here]
                portfolio[here] = move(own, closes) if rows[-1] >= 0 and np.isfinite(closes).all() else own
            return np.append(float(not len(here)), portfolio)

        return policy

    return {
        "cash": lambda t, weights_seen: None,
        f"{symbols[0]} hold": hold(np.eye(coins + 1)[1]),
        "equal-weight hold": hold(equal),
        "equal-weight rebalanced": hold(equal, rebalance_every),
        "inverse volatility": rule(inverse_volatility, look_back),
        "minimum variance": rule(minimum_variance, _RISK),
        "volatility target": rule(volatility_target, _RISK),
        "trend to cash": rule(trend_to_cash, _TREND),
        "cross-sectional momentum": rule(momentum, _TREND, every=3 * BARS_PER_DAY),
        "lowest beta": rule(lowest_beta, _RISK, bitcoin, every=7 * BARS_PER_DAY),
        "OLMAR": reversion(olmar, 5),
        "PAMR": reversion(pamr, 2),
    }


def inverse_volatility(closes: np.ndarray) -> np.ndarray:
    """Weight coins by 1 / standard deviation of their log returns; flat coins get nothing."""
    returns = np.diff(np.log(closes), axis=0)
    deviation = returns.std(0) if len(returns) else np.zeros(returns.shape[1])
    inverse = np.divide(1.0, deviation, out=np.zeros(len(deviation)), where=deviation > 0)
    return np.append(0.0, inverse if inverse.any() else np.ones(len(inverse)))


def trend_to_cash(closes: np.ndarray) -> np.ndarray:
    """Hold 1/N in each coin that rose and the rest in cash.

    The long side, unscaled, of Moskowitz, Ooi and Pedersen, Journal of Financial Economics 104 (2012).
    """
    coins = (closes[-1] > closes[0]) / closes.shape[1]
    return np.append(1 - coins.sum(), coins)


def hourly_covariance(closes: np.ndarray) -> np.ndarray:
    """Return the covariance [N, N] of the hourly log returns; NaN without prices."""
    returns = np.diff(np.log(closes[np.arange(len(closes) - 1, -1, -_HOUR)]), axis=0)
    centred = returns - returns.sum(0) / max(len(returns), 1)
    return centred.T @ centred / max(len(returns) - 1, 1)


def minimum_variance(closes: np.ndarray) -> np.ndarray:
    """Hold the coins with the least variance together: Markowitz, Journal of Finance 7 (1952), long only.

    Up to their sum the weights solve x >= 0, y = covariance x - 1 >= 0, x y = 0, exactly by block principal
    pivoting: Judice and Pires, Computers & Operations Research 21 (1994).
    """
    covariance = hourly_covariance(closes)
    here = np.isfinite(np.diag(covariance))
    here |= not here.any()
    covariance = np.nan_to_num(covariance)
    matrix = covariance / (np.trace(covariance) or 1.0) + 1e-6 * np.eye(len(here))  # one solution
    free, fewest = here.copy(), len(here) + 1
    while True:
        x = np.zeros(len(here))
        x[free] = np.linalg.solve(matrix[np.ix_(free, free)], np.ones(free.sum()))
        (wrong,) = np.where(free, x < 0, here & (matrix @ x < 1 - 1e-9)).nonzero()
        if not len(wrong):
            return np.append(0.0, x)
        if len(wrong) < fewest:
            fewest = len(wrong)
        else:
            wrong = wrong[-1:]  # one at a time cannot go round in circles (Murty 1974)
        free[wrong] ^= True


def volatility_target(closes: np.ndarray) -> np.ndarray:
    """Hold all coins alike, and cash as far as their volatility was over _TARGET_VOLATILITY.

    Harvey et al., "The impact of volatility targeting", Journal of Portfolio Management 45 (2018), unlevered.
    """
    covariance = hourly_covariance(closes)
    here = np.isfinite(np.diag(covariance))
    coins = here / max(here.sum(), 1)
    volatility = (coins @ np.nan_to_num(covariance) @ coins * BARS_PER_YEAR / _HOUR) ** 0.5
    coins *= min(1.0, _ratio(_TARGET_VOLATILITY, volatility) or 1.0)
    return np.append(1 - coins.sum(), coins)


def momentum(closes: np.ndarray) -> np.ndarray:
    """Hold the third of the coins that rose most.

    The long side of Jegadeesh and Titman, "Returns to buying winners ...", Journal of Finance 48 (1993).
    """
    return highest_third(closes[-1] / closes[0])


def lowest_beta(closes: np.ndarray, market: int) -> np.ndarray:
    """Hold the third of the coins with the lowest beta, and so covariance, to coin `market`.

    The long side of Frazzini and Pedersen, "Betting against beta", J. of Financial Economics 111 (2014).
    """
    return highest_third(-hourly_covariance(closes)[market])


def highest_third(scores: np.ndarray) -> np.ndarray:
    """Hold the third of the coins with the highest scores [N] alike, and what equals the last of them."""
    scores = np.nan_to_num(scores, nan=-np.inf)
    return np.append(0.0, scores >= np.sort(scores)[-max(1, len(scores) // 3)])


def olmar(portfolio: np.ndarray, closes: np.ndarray, epsilon: float = 10.0) -> np.ndarray:
    """Apply on-line moving average reversion (OLMAR-1) to a portfolio [N], on closes [5, N], latest first.

    Li and Hoi, ICML 2012; the predicted next price is the mean of the closes.
    """
    predicted = closes.mean(0) / closes[0]
    return _shifted(portfolio, predicted, epsilon - portfolio @ predicted)


def pamr(portfolio: np.ndarray, closes: np.ndarray, epsilon: float = 0.5) -> np.ndarray:
    """Apply passive aggressive mean reversion (PAMR-0) to a portfolio [N], on closes [2, N], latest first.

    Li, Zhao, Hoi and Gopalkrishnan, Machine Learning 87 (2012).
    """
    relatives = closes[0] / closes[1]
    return _shifted(portfolio, -relatives, portfolio @ relatives - epsilon)


def _shifted(portfolio: np.ndarray, scores: np.ndarray, loss: float) -> np.ndarray:
    """Move a portfolio [N] towards high scores as far as a loss takes, and project it onto the simplex."""
    spread = scores - scores.mean()
    return nearest_on_simplex(portfolio + _ratio(max(0.0, loss), spread @ spread) * spread)


def nearest_on_simplex(point: np.ndarray) -> np.ndarray:
    """Project a point [N] to the nearest non-negative numbers of sum 1: Duchi et al., ICML 2008."""
    ordered = np.sort(point)[::-1]
    excess = (np.cumsum(ordered) - 1) / np.arange(1, len(point) + 1)
    return np.maximum(point - excess[ordered > excess][-1], 0)


def hindsight(
    open_prices: np.ndarray, close_prices: np.ndarray, start: int, stop: int, *, cost: float, fill: str,
    present: np.ndarray | None = None,
) -> Policy:  # fmt: skip
    """Return the exact optimum net of costs for known future prices, as a policy to replay."""
    relatives = with_cash(align_prices(open_prices, close_prices, fill)[2][start:stop])
    if present is not None:
        relatives[:, 1:][~present[start:stop]] = 0.0  # nobody would hold it
    path, _ = hindsight_path(relatives, cost)
    assets = np.eye(relatives.shape[1])
    changes = np.diff(path, prepend=0) != 0  # from all cash
    return lambda t, weights_seen: assets[path[t - start]] if changes[t - start] else None


def hindsight_path(relatives: np.ndarray, cost: float) -> tuple[np.ndarray, float]:
    """Find the asset to hold in each step [S] for the largest final value, from cash, and its log growth.

    Final value is linear in the amounts held, since each can be traded regardless of the others, so holding a
    single asset is always optimal. J[i], the log of the final value of one unit in asset i before the trade,
    is the larger of that of keeping it and that of selling it to buy the best asset to enter. `relatives` are
    those of prices [S, A], cash first.
    """
    steps, assets = relatives.shape
    with np.errstate(divide="ignore"):
        gains = np.log(relatives)
    side = np.full(assets, np.log1p(-cost))  # of selling or buying an asset
    side[0] = 0.0
    entry = np.empty(steps, dtype=np.int64)
    stays = np.empty((steps, assets), dtype=bool)
    future = np.zeros(assets)  # J
    for step in reversed(range(steps)):
        keep = gains[step] + future
        enter = side + keep
        entry[step] = enter.argmax()
        move = side + enter[entry[step]]
        stays[step] = keep >= move
        future = np.maximum(keep, move)
    path = np.empty(steps, dtype=np.int64)
    asset = 0
    for step in range(steps):
        asset = asset if stays[step, asset] else entry[step]
        path[step] = asset
    return path, float(future[0])


# --- report: one page that opens offline, and the same numbers as files -------------------------------------

REFITTED = "This is refit.pt, trained on all bars as far as best.pt came: it has no test of its own"
TO_REFIT = "These are the figures of best.pt; refit.pt, trained as far on all bars, has no test of its own"
ABSTAINS = "nothing that was learnt is above chance: the best agent holds equal weights, cash included"
_TRAINED_ON, _CHOSEN_ON = "IN SAMPLE: trained on these days", "chosen on these days, so not out of sample"
_COLUMNS = {  # of the headline table, on the page and on the console: heading -> metric, format
    "total return": ("total_return", "+.1%"),
    "log bp/day": ("growth_bp_day", "+.1f"),
    "over benchmark": ("excess_bp_day", "+.1f"),
    "Sharpe": ("sharpe", "+.2f"),
    "Sortino": ("sortino", "+.2f"),
    "drawdown": ("max_drawdown", ".1%"),
    "Calmar": ("calmar", "+.3g"),
    "turnover/day": ("turnover_day", ".4f"),
    "cost paid": ("cost_paid", ".2%"),
    "hit rate": ("hit_rate", ".1%"),
}
_PANELS = {  # of the training curves: title -> columns of metrics.csv
    "log growth, bp/day": ("growth_bp_day", "reward", "rolling_reward", "validation_bp_day"),
    "reconstruction, mse": ("reconstruction_loss",),
    "reconstruction, share within 0.1 std": ("accuracy",),
    "critic loss": ("critic_loss",),
    "explained variance of the returns": ("explained_variance",),
    "variance taken by the replicas' mean": ("baseline_share",),
    "KL of an update": ("approx_kl",),
    "clip fraction": ("clip_fraction",),
    "entropy, nats": ("entropy",),
    "gradient norms": ("policy_grad_norm", "encoder_grad_norm"),
    "learning rates": ("policy_rate", "encoder_rate"),
}
_NOTES = {  # below the tables and charts of a section of the page
    "results": """\
Log bp/day: log growth per day in basis points; over benchmark: the same, less the benchmark's.
Sharpe, Sortino: yearly; mean of the simple returns per bar / their standard (Sortino: downside) deviation, \
risk-free rate 0. Calmar: compound annual return / largest drawdown. Beyond 1,000 the size says nothing.
Turnover: coins sold + cash spent on coins, fraction of the value. Cost paid: of all decisions together. Hit \
rate: share of bars with more growth than the benchmark.""",
    "statistics": """\
95 % interval: by the stationary bootstrap (Politis and Romano 1994) of the 5-minute log growth over the \
benchmark; mean block three days, or longer by the rule of Politis and White on hourly sums, at most a fifth \
of the split; none under four days. If it includes zero, no skill is shown. Told from chance: the true \
growth over the benchmark with which the interval, two-sided, would lie above zero in 80 % of cases.
Probabilistic Sharpe: probability that the true ratio is above zero, given length, skewness and tails \
(Bailey and Lopez de Prado 2012). It assumes independent bars; where the interval disagrees, rely on that.
Deflated Sharpe: the same above the ratio that the best of so many trials without skill would show (Bailey \
and Lopez de Prado 2014); the trials are the rows of data/runs/trials.csv and this run. It needs trials that \
differ: where all have nearly the same ratio, it is the probabilistic one.
Break-even cost: where the same trades would only grow as the benchmark does; a dash where the agent stays \
behind the benchmark even at no cost, or is ahead without any trade.""",
    "curves": """\
reward: growth over the benchmark. Rollouts explore, and exploring pays fees: on the same bars it is below \
that of the deterministic policy, which validation, test and all other parts of this page use. KL, clip \
fraction: how far an update moved the policy. Explained variance: 1 perfect, 0 no better than a constant.""",
    "power": """\
Found: best.pt does not abstain. Growth: of best.pt on the test split over the benchmark, log, in bp per day \
(encoders start at random; of each training, with intervals: trainings.csv). Rule: it knows the planted \
drift of the bar just closed, which an agent must estimate, and decides as often. It moves all into the coin \
of which most is still to come, or into cash, where that is more than what it holds has to come by 0.5, 1, \
2, 4 or 8 times the cost of two sides (what grew most on the training split, as may equal weights for good). \
Correlation: of that drift with the return of the next holding, both less the coins' mean. Strength 0: a \
placebo, the days in another order.""",
    "importance": """\
Decisions of the validation split again (the last 720 in the report of a training), with a part of the \
window of another moment there (blocks of up to a week change places). Lost without: growth that the agent \
loses where this part is wrong. Gained alone: growth beyond that of an agent to which all is wrong, where \
only this part is right. What several parts tell is lost with none of them, so neither adds up. Black: \
95 % intervals of each part by itself (of many some miss 0 by chance), on the split that chose this agent.
Explained variance of the normalised values: of the encoder trained with the policy; change: since the \
reducer that it started from.""",
}
_OFTEN = 0.8  # share of trainings which must find a drift before one may say that it would be found
_OWED = {"lost": "lost without it", "alone": "gained with it alone"}  # of what an agent sees
_LOG_TICKS = """
// 1, 2 and 5 of each decade; where these are many, the 1 alone; where they are few, equal steps
const {start, end} = cb_data, marks = []
for (let power = -12; power < 13; power++) marks.push(...[1, 2, 5].map((digit) => digit * 10 ** power))
const ticks = marks.filter((mark) => start <= mark && mark <= end)
if (ticks.length > 8) return ticks.filter((mark) => marks.indexOf(mark) % 3 == 0)
if (ticks.length > 3) return ticks
const step = marks.find((mark) => mark >= (end - start) / 6), first = Math.ceil(start / step)
return Array.from({length: Math.floor(end / step) - first + 1}, (_, k) => (first + k) * step)
"""
_HEAD = """\
<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{{ title }}</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1060px; margin: 2em auto; padding: 0 16px; }
h1 { font-size: 1.6em; } h2 { font-size: 1.2em; margin: 2em 0 .5em; border-bottom: 1px solid #ccc; }
div.verdict { background: #f4f4f0; border-left: 4px solid #888; padding: .2em 1em; }
table { border-collapse: collapse; font-size: .87em; font-variant-numeric: tabular-nums; }
th, td { padding: .25em .5em; text-align: right; border-bottom: 1px solid #e5e5e5; }
tbody th { font-weight: normal; text-align: left; vertical-align: top; padding-left: 0; }
table.results tbody tr:nth-child(-n+{{ agents|default(0) }}) * { font-weight: 600; }
td { white-space: nowrap; } table.text td { text-align: left; white-space: normal; overflow-wrap: anywhere; }
p.note, figcaption, summary { color: #555; font-size: .87em; } p.note { white-space: pre-line; }
details { margin: .5em 0; } figure { margin: 1em 0; }
/* a shadow at the side where a table that is wider than the window goes on */
div.table { margin: .5em 0; overflow-x: auto; background: linear-gradient(to right, #fff 2em, #fff0) local,
linear-gradient(to left, #fff 2em, #fff0) right / 4em 100% no-repeat local,
linear-gradient(to right, #0005, #0000) 0 / 1em calc(100% - 2px) no-repeat,
linear-gradient(to left, #0005, #0000) right / 1em calc(100% - 2px) no-repeat; }
div.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(300px, 1fr)); gap: 0 1em; }
@media print {
body { max-width: none; margin: 0; font-size: 11px; print-color-adjust: exact; }
figure, table { break-inside: avoid; } h2, h3, summary { break-after: avoid; }
figure { width: var(--width); zoom: var(--zoom); } div.table { overflow-x: visible; }
}
</style>
<script>
/* in print, charts keep their layout and are shrunk to the width of a sheet */
addEventListener("beforeprint", () => {
  const width = document.body.clientWidth - 32
  document.body.style.setProperty("--width", `${width}px`)
  document.body.style.setProperty("--zoom", 680 / width)
})
</script>
{% if charts %}<script>{{ library }}</script>{% endif %}
</head><body>
<h1>{{ title }}</h1>
"""
_PAGE = """\
{% macro picture(name, caption, style="") %}
<figure><div class="{{ style }}">{{ charts[name] }}</div><figcaption>{{ caption }}</figcaption></figure>
{% endmacro %}
{% macro meaning(name) %}
<details><summary>What the numbers mean</summary><p class="note">{{ notes[name] }}</p></details>
{% endmacro %}
{% macro importance() %}
<h2>What it looks at</h2>
{{ picture("importance", "Growth (validation split) that it owes to a part of what it sees.", "panels") }}
{{ meaning("importance") }}
{% endmacro %}
<p class="note">{{ report.facts() }}</p>
<div class="verdict">
{% for text in verdicts %}<p>{{ text }}</p>{% endfor %}
<p id="power"></p>
<p class="note">One stretch of one market. Fills at a fixed cost per side: no market impact, no outage. The \
benchmark is an equal-weight hold of the coins without costs; where it falls, cash beats it too.</p></div>
{% if not charts %}
<p>Charts and statistics need a day. What was traded so far is in trades.csv.</p>
{% else %}
<noscript><p>The charts need JavaScript; the tables do not.</p></noscript>
{{ picture("value", "A click in a legend switches a curve off; drag to zoom. The hindsight optimum would be "
~ "off the scale and is left out, and so are all baselines but the five that end highest.") }}
{% endif %}
{% set detail = "coin" in (report.importance.kind.values if report.importance is not none else ()) %}
{% if detail %}{{ importance() }}{% endif %}
<h2>Results</h2>
{{ table(results, "results") }}
{{ meaning("results") }}
{% if report.runs %}
<h2>All runs</h2>
{{ table(runs) }}
<p class="note">Log growth over the benchmark, bp per day: on the validation split, which chose, and on \
this one, which chose nothing. An ensemble decides by the mean of its seeds' logits; its validation is the \
mean of theirs. A fold is its days in the account of the agent.</p>
{% endif %}
{% if report.agents and charts %}
<h2>How sure, and at what cost</h2>
{{ table(statistics) }}
{{ meaning("statistics") }}
<h2>Over time</h2>
{{ picture("trading", "A point of the first chart is the mean of the days before it.") }}
<h2>Weights</h2>
{% for name in report.agents %}{{ picture("weights of " ~ name, name) }}{% endfor %}
<h2>Profits</h2>
{{ picture("profits", "What each coin made: with the costs, the profit.") }}
{% endif %}
{% if "importance" in charts and not detail %}{{ importance() }}{% endif %}
{% if report.curves %}
<h2>Training</h2>
{% for name in report.curves %}{{ picture("curves of " ~ name, name, "panels") }}{% endfor %}
{{ meaning("curves") }}
{% endif %}
{% if report.reconstruction %}
<h2>Reconstruction</h2>
{{ table(reconstruction) }}
<p class="note">Of normalised windows. Accuracy: share of values within 0.1 standard deviation.</p>
{% endif %}
<h2>What was run</h2>
{{ table(report.heading(), "text") }}
{% if report.constants %}
<h3>Constants that differ from the scripts'</h3>
{{ table(report.constants, "text") }}
{% endif %}
"""
_TRIALS = """\
<div class="verdict"><p>{{ text }}</p></div>
<p>In bp per day over the benchmark. A click on a heading sorts by its column, another one backwards.</p>
{{ table(trials, index=False) }}
<script>
const body = document.querySelector("tbody")
for (const head of document.querySelectorAll("thead th")) head.onclick = () => {
  const up = head.dataset.up = head.dataset.up == 1 ? -1 : 1
  const text = (row) => row.cells[head.cellIndex].innerText
  const compare = (x, y) => up * (x - y || x.localeCompare(y))
  body.append(...[...body.rows].sort((a, b) => compare(text(a), text(b))))
}
</script>
"""
_POWER_PAGE = """\
<div class="verdict"><p>NOT REAL: drifts of known strengths were planted, to see which are found.</p>
<p>{{ text }}</p></div>
{{ charts["growth"] }}
{{ table(rungs) }}
<p class="note">{{ notes["power"] }}</p>
<h2>What was run</h2>
{{ table(constants, "text") }}
"""


def decides_every(hold_bars: int) -> str:
    """Return the time between decisions as a text."""
    return f"{hold_bars * getData.BAR_MS // 60_000} minutes"


@dataclass(frozen=True)
class RunResult:
    """One of several trainings that has ended, and how the agent of its seed did on the split of the page."""

    name: str  # its place among all: "HOLD=4/fold-1/seed-0"
    combination: str  # of a grid's constants: "HOLD=4"; "" without a grid
    seed: int
    validation: float  # bp per day over the benchmark; NaN where it abstains: that agent was not kept
    hold_bars: int = 0
    abstains: bool = False  # nothing that it learnt was above chance: it holds equal weights
    test_start: int = 0  # ms; those of one fold have the same
    result: Backtest | None = None  # in one account of all folds
    rungs: Sequence[float] = ()  # validations at the rungs of a search, which may have gone on without it


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
    limits: Limits = NO_LIMITS
    agents: dict[str, Backtest] = field(default_factory=dict)  # the first one is the headline
    trained_on: str = ""  # source of the bars on which the agents were trained
    relation: str = ""  # of these bars to the agents' training (`relation_to_training`)
    scale: str = ""
    seeds: Sequence[int] = ()
    hold_bars: int = 0  # between decisions
    probes: dict[str, float] = field(default_factory=dict)  # interval tried -> validation, bp per day
    refit: str = ""  # what is to be said of a refitted agent
    abstains: bool = False  # the headline holds equal weights, since nothing it learnt was above chance
    agent: str = ""  # of a paper account: its training
    checkpoint: str = ""  # of a paper account: SHA-256
    trial_sharpes: Sequence[float] = ()  # per bar, over the benchmark, of all trials; (): of this one alone
    curves: dict[str, pd.DataFrame] = field(default_factory=dict)  # metrics.csv of each training
    remarks: Sequence[str] = ()  # below the verdicts
    reconstruction: dict[str, dict[str, float]] = field(default_factory=dict)  # split -> its metrics
    constants: dict[str, object] = field(default_factory=dict)  # those that differ from the script's
    data: str = ""  # `data_sha256` of the features
    runs: Sequence[RunResult] = ()  # of several trainings, by combination
    ensembles: dict[str, Backtest] = field(default_factory=dict)  # combination -> that of its seeds
    best: str = ""  # the combination that validates best, whose agent is the headline
    choice: str = ""  # how probable such a best validation is by chance
    importance: pd.DataFrame | None = None  # what the headline loses without each part of what it sees

    def heading(self) -> dict[str, str]:
        """Return the lines that say what was run."""
        first, last = pd.to_datetime(self.times[[0, -1]], unit="ms").strftime("%Y-%m-%d %H:%M")
        combinations = len({run.combination for run in self.runs})
        limits = sorted(self.limits._asdict().items() - NO_LIMITS._asdict().items())
        limits = ", ".join(f"{name.upper()} {value:g}" for name, value in limits)
        lines = {
            "run": self.run,
            "market": self.market,
            "trained on": self.trained_on,
            "split": self.split,
            "decisions": f"{first} to {last} UTC, {len(self.times) / BARS_PER_DAY:.1f} days",
            "these bars are": self.relation,
            "cost per side": f"{self.cost:.3%}",
            "fill": self.fill,
            "limits": limits and f"{limits}, but for benchmark and hindsight optimum",
            "agent": self.agent and f"run {self.agent}",
            "checkpoint": self.checkpoint and f"SHA-256 {self.checkpoint}",
            "scale": self.scale,
            "seed": ", ".join(map(str, self.seeds)),
            "decides every": self.intervals(),
            "validation": self.abstention(),
            "chosen by validation": f"{self.best}, of {combinations} combinations" * (combinations > 1),
            "best validation": self.choice,
            "coins": ", ".join(self.symbols),
            "data": self.data and f"SHA-256 {self.data}",
        }
        return {name: text for name, text in lines.items() if text}

    def facts(self) -> str:
        """Return the lines that come before any figure, as one."""
        lines, names = self.heading(), ", ".join(self.symbols[:12]) + ", ..." * (len(self.symbols) > 12)
        trading = f"cost {lines['cost per side']} per side, fill {self.fill}", lines.get("limits")
        every = f"decides every {decides_every(self.hold_bars)}" * (self.hold_bars > 0)
        parts = self.market, lines["decisions"], f"{len(self.symbols)} coins: {names}", *trading, every
        return "; ".join(filter(None, parts))

    def abstention(self) -> str:
        """Return which trainings found nothing above chance on the validation split; "" where all did."""
        count, runs = sum(run.abstains for run in self.runs), len(self.runs)
        if self.abstains:
            equal = "the best agent holds equal weights, cash included"
            return f"none of {runs} runs found anything above chance: {equal}" if runs else ABSTAINS
        vote = f"{count} of {runs} runs found nothing above chance: they vote for equal weights"
        return vote if count else ""

    def marks(self) -> list[str]:
        """Return the sentences that come first: what is not real, and who found nothing."""
        texts = market_mark(self.market, self.trained_on), self.refit, self.abstention()
        return [f"{text[0].upper()}{text[1:]}." for text in texts if text]

    def intervals(self) -> str:
        """Return the time between decisions, with the intervals that were tried, or those of the runs."""
        runs = [run for run in self.runs if run.combination == self.best]
        detail = ""
        if self.probes:
            tried = ", ".join(f"{bars} bars {value:+.1f}" for bars, value in self.probes.items())
            tried = tried.replace("-inf", "diverged")
            detail = f" (chosen by validation in the first epochs, bp/day: {tried})"
        elif len({run.hold_bars for run in runs}) > 1:
            places = {run.name.removeprefix(f"{self.best}/"): decides_every(run.hold_bars) for run in runs}
            detail = f" ({', '.join(f'{place} {interval}' for place, interval in places.items())})"
        return decides_every(self.hold_bars) + detail if self.hold_bars else ""

    def rules(self) -> list[str]:
        """Return the baselines that do not know the future, the one that ends highest first."""
        ends = {name: -result.value[-1] for name, result in self.others.items() if name != _HINDSIGHT}
        return sorted(ends, key=ends.get)


def publish(folder: Path, report: Report, title: str = "") -> dict[str, Any]:
    """Write the page and the files beside it, print the figures, and return those of metrics.json."""
    own = report.agents | report.others
    first = next(iter(own.values()))
    nothing = np.zeros_like(first.turnover)
    benchmark = replace(first, value=first.benchmark, turnover=nothing, cost_paid=nothing)
    accounts = report.agents | {"benchmark": benchmark} | report.others
    trials = report.trial_sharpes or [sharpe_per_bar(excess_returns(first))]
    best = [name for name in report.rules() if name != "cash"][:1]
    others = {"cash": np.ones_like(first.value)} | {name: report.others[name].value for name in best}
    content = {
        **report.heading(),
        "abstains": report.abstains,
        "cost": report.cost,
        report.split: {name: metrics(result) for name, result in accounts.items()},
        "skill": {
            name: skill(result, trials)
            | {"over": {other: excess_figures(result, value) for other, value in others.items()}}
            for name, result in report.agents.items()
        },
        "reconstruction": report.reconstruction,
        "constants": {name: str(value) for name, value in report.constants.items()},
        **({"runs": run_figures(report)} if report.runs else {}),
    }
    if not report.agents:
        top = report.rules()[0]
        content["best baseline"] = {"name": top, **excess_figures(report.others[top])}
    if report.abstains:  # what the days could have told of equal weights says nothing about an agent
        content["skill"][next(iter(report.agents))]["detectable_bp_day"] = math.nan
    whole = len(report.times) >= BARS_PER_DAY  # less is too little for charts and statistics
    texts, results = verdicts(report, content), results_table(content[report.split])
    runs = runs_table(content["runs"]) if report.runs else None
    reconstruction = pd.DataFrame(report.reconstruction).T.map("{:.4f}".format)
    page = render(
        _PAGE, make_charts(report, accounts) if whole else {}, report=report, agents=len(report.agents),
        title=f"{report.run}: {'paper account' if report.split == 'paper' else f'{report.split} split'}",
        verdicts=[*report.marks(), *texts], results=results, runs=runs,
        statistics=statistics_table(content["skill"]),
        reconstruction=reconstruction.rename(columns=lambda name: name.replace("_", " ")),
    )  # fmt: skip
    replace_text(folder / "report.html", page)
    replace_text(folder / "metrics.json", json.dumps(without_nan(content), indent=1, allow_nan=False))
    series, trades = (
        pd.concat([table(report, *account) for account in own.items()], ignore_index=True)
        for table in (series_table, trades_table)
    )
    getData.write_parquet(folder / "series.parquet", series, report.heading())
    replace_text(folder / "trades.csv", trades.to_csv(index=False))
    print(f"{title}: {report.facts()}", *report.marks(), results.to_string(), sep="\n")
    if report.runs:
        print(runs.iloc[:, :4].to_string())
    (folder / "importance.csv").unlink(missing_ok=True)  # of an earlier agent
    if report.importance is not None:
        replace_text(folder / "importance.csv", report.importance.to_csv(index=False))
        largest = report.importance.eval("lost_bp_day + alone_bp_day").nlargest(10).index
        print("growth owed to parts of what it sees (validation split): lost without, gained with it alone")
        print(report.importance.loc[largest].iloc[:, :9].round(1).to_string(index=False))
    print(*texts, f"report: {folder / 'report.html'}", sep="\n")
    return content


def render(template: str, charts: dict[str, list], **values: object) -> str:
    """Return a page with `charts` {name: below each other}, and the library they need."""
    from bokeh.document import Document  # not at the top: the imports take a second
    from bokeh.embed import components
    from bokeh.resources import Resources

    document = Document()
    with document.models.freeze():  # otherwise each root that is added goes through all before it
        for chart in itertools.chain(*charts.values()):
            document.add_root(chart)
    script, places = components(document.roots) if charts else ("", ())
    places = iter(places)
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
    whole = _HEAD + template + "{{ script }}\n</body></html>\n"
    return environment.from_string(whole).render(
        table=html_table,
        notes=_NOTES,
        # the library has 1.3 MB; with it the page needs no network
        library=Markup(Resources(mode="inline", components=["bokeh"], minified=True).js_raw[0]),
        script=Markup(script),
        charts={name: Markup("".join(next(places) for _ in group)) for name, group in charts.items()},
        **values,
    )


def html_table(cells: pd.DataFrame | dict, style: str = "", **options: object) -> Markup:
    """Return a table of texts."""
    frame = cells if isinstance(cells, pd.DataFrame) else pd.Series(cells, dtype=object).to_frame()
    with pd.option_context("display.max_colwidth", None):
        html = frame.to_html(header=frame is cells, classes=style, border=0, na_rep="–", **options)
    return Markup(f'<div class="table">{html}</div>')


def publish_trials(data_dir: Path) -> int:
    """Write the page of all trials, print whether validation ranks them as the test does; return 0."""
    path, page = data_dir / "runs" / "trials.csv", data_dir / "reports" / "trials" / "index.html"
    if (trials := read_trials(path)).empty:
        raise UserError(f"there is no trial in {path}: train first, with python train.py")
    figures = ["validation_bp_day", "test_bp_day"]
    trials = trials.reindex(columns=["time", "run", "seed", *figures, "test_sharpe_bar", "market", "changed"])
    pairs = trials[figures].dropna()
    rank = "too few to rank" if len(pairs) < 5 else show(pairs.corr("spearman").iloc[0, 1], "+.2f")
    text = f"{len(trials)} trials; rank correlation (Spearman) of validation and test: {rank}"
    text += f", {len(pairs)} pairs"
    replace_text(page, render(_TRIALS, {}, title="All trials", text=text, trials=trials))
    print(f"{text}: {page}")
    return 0


def publish_power(folder: Path, run: str, trainings: pd.DataFrame, constants: dict) -> dict[str, Any]:
    """Write page and csv of `trainings` on planted bars, one in a row, print the figures and return them."""
    groups = trainings.groupby("strength")
    rungs = groups[["found", "growth", "rule", "correlation"]].mean().assign(trainings=groups.size())
    planted, false = rungs[rungs.index > 0], trainings["found"][trainings["strength"] == 0]
    enough = int((planted["found"][::-1] >= _OFTEN).cumprod().sum())  # rungs, from the strongest down
    rung = planted.iloc[-max(enough, 1)]
    also = ", as is any stronger one" * (enough > 0)
    text = (
        f"{'A' if enough else 'Not even a'} drift of {rung.name:g} (correlation {rung['correlation']:.3f} "
        f"with the next holding's return, {rung['rule']:+.1f} bp per day to the rule that knows it) is found "
        f"in at least {_OFTEN:.0%} of {rung['trainings']:.0f} trainings{also}; "
        f"of {len(false)} placebos, {false.sum()} showed something."
    )
    curves = trainings.pivot(index="strength", columns="seed", values="growth").add_prefix("agent, seed ")
    curves = rungs[["rule", "growth"]].set_axis(["rule", "agents"], axis=1).join(curves)
    looks = [{"color": color, "line_alpha": 1 - 0.6 * (k > 1)} for k, color in enumerate(Category20_20)]
    label = "log growth over the benchmark (test split), bp/day, by strength of the planted drift"
    chart = draw({label: curves}, looks[: curves.shape[1]], x_axis_type="linear", height=300)
    forms = {"found": ".0%", "correlation": ".3f", "trainings": ".0f"}
    table = rungs.apply(lambda x: x.map(lambda number: show(number, forms.get(x.name, "+.1f"))))
    title = f"{run}: would it have been found?"
    values = {"title": title, "text": text, "constants": constants, "rungs": table}
    replace_text(folder / "report.html", render(_POWER_PAGE, {"growth": chart}, **values))
    replace_text(folder / "trainings.csv", trainings.to_csv(index=False))
    print(title, table.to_string(), text, f"report: {folder / 'report.html'}", sep="\n")
    tells = bool(trainings["p_value"].notna().any())  # the days of validation are enough for that
    return {"weakest": rung.name if enough else None, "tells": tells, "text": text}


def show_power(folder: Path, power: dict[str, Any]) -> None:
    """Put what `publish_power` says of a run with the same bars and constants into its report."""
    content, page = json.loads((folder / "metrics.json").read_text("utf-8")), folder / "report.html"
    word = "undecidable" if power["weakest"] is None else f"nothing as strong as {power['weakest']:g}"
    word = word if content["abstains"] or not power["tells"] else "found"
    content["power"] = f"Power: {word}. {power['text']}"
    verdict = f'<p id="power">{escape(content["power"])}</p>'
    text = page.read_text("utf-8")
    replace_text(page, re.sub('<p id="power">.*?</p>', lambda _: verdict, text, count=1))
    replace_text(folder / "metrics.json", json.dumps(content, indent=1))
    print(f"{folder.name}: {content['power']}")


def series_table(report: Report, name: str, result: Backtest) -> pd.DataFrame:
    """Return what an account did at each decision [S rows], as README.md says."""
    when = pd.to_datetime(report.times, unit="ms", utc=True)
    numbers = {"name": name, "time": when, "turnover": result.turnover, "cost_paid": result.cost_paid}
    numbers |= {"value": result.value[1:], "benchmark": result.benchmark[1:]}
    for side, weights in (("before", result.before), ("after", result.weights)):
        columns = zip(("cash", *report.symbols), weights.astype(np.float32).T, strict=True)
        numbers |= {f"{side}.{asset}": column for asset, column in columns}
    return pd.DataFrame(numbers)


def trades_table(report: Report, name: str, result: Backtest) -> pd.DataFrame:
    """Return an account's purchases and sales; amount: worth of what changes hands, start value = 1."""
    moved = ((1 - result.cost_paid)[:, None] * result.weights - result.before)[:, 1:]  # [S, N] of value
    step, coin = np.nonzero((np.abs(moved) > 1e-12) & (result.turnover > 0)[:, None])
    moved = moved[step, coin]
    amount = np.abs(moved) * result.value[step]
    return pd.DataFrame({
        "name": name,
        "time": pd.to_datetime(report.times[step], unit="ms", utc=True),
        "coin": np.array(report.symbols)[coin],
        "side": np.where(moved < 0, "sell", "buy"),
        "amount": amount,
        # who sells for 1 gets 1 - c; who buys 1 pays 1 / (1 - c)
        "cost": amount * np.where(moved < 0, report.cost, report.cost / (1 - report.cost)),
        "before": result.before[step, coin + 1],
        "after": result.weights[step, coin + 1],
    })  # fmt: skip


def data_sha256(footer: dict) -> str:
    """Return a hash of the bars and splits that features were made of, from their footer."""
    text = json.dumps({name: footer[name] for name in ("inputs", "splits")}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def replace_text(path: Path, text: str) -> None:
    """Write a text in UTF-8 in one atomic step; errors as `getData.replacing`."""
    with getData.replacing(path) as file:
        file.write(text.encode())


def without_nan(value: object) -> object:
    """Replace numbers that do not exist, NaN and infinity, by None; JSON has neither."""
    if isinstance(value, dict):
        return {str(key): without_nan(part) for key, part in value.items()}
    if isinstance(value, list):
        return [without_nan(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_trials(path: Path) -> pd.DataFrame:
    """Return the list of all trainings that were tried here; errors as `read_table`."""
    if not path.exists():
        return pd.DataFrame(columns=["time", "run"])
    kinds = {"time": str, "run": str, "seed": str, "test_sharpe_bar": float}  # a run may be called NA
    trials = read_table(path, dtype=kinds, keep_default_na=False, na_values=[""])
    if not {"time", "run"} <= set(trials):
        raise UserError(f"{path} is damaged (it has no time or no run): move it away")
    return trials


def read_trial_sharpes(path: Path) -> list[float]:
    """Return each trial's Sharpe ratio per bar over the benchmark; NaN for a run without a test."""
    return read_trials(path).reindex(columns=["test_sharpe_bar"])["test_sharpe_bar"].tolist()


def append_trial(path: Path, trial: dict[str, Any], result: Backtest | None = None) -> dict[str, Any]:
    """Add a training, with its test where there is one, to the list of trials, or complete its row there."""
    if result is not None:
        trial = trial | {
            "test_bp_day": round(metrics(result)["excess_bp_day"], 3),
            "test_sharpe_bar": sharpe_per_bar(excess_returns(result)),
        }
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(".lock")):  # runs side by side write into the same list
        trials = read_trials(path)
        keys = [name for name in ("time", "run", "seed") if name in trials and name in trial]
        own = (trials[keys] == [str(trial[name]) for name in keys]).all(axis=1)
        for old in trials[own].to_dict("records"):  # a test stays where the run is ended once more
            trial = {name: value for name, value in old.items() if not pd.isna(value)} | trial
        replace_text(path, pd.DataFrame([*trials[~own].to_dict("records"), trial]).to_csv(index=False))
    return trial


def read_curves(folder: Path) -> dict[str, pd.DataFrame]:
    """Return the logs of a run that exist and hold a row: pretraining and online, of each fold and seed."""
    logs = {"pretraining, by epoch": "pretrain/metrics.csv", "online, by batch": "metrics.csv"}
    parts = sorted({path.parent for path in folder.rglob("metrics.csv") if path.parent.name != "pretrain"})
    tables = {}
    for part, (name, log) in itertools.product([folder, *parts], logs.items()):
        path = part / log
        if path.exists() and path.stat().st_size and len(table := read_table(path)):
            tables[", ".join([*part.relative_to(folder).parts, name])] = table
    return tables


def read_table(path: Path, **options: object) -> pd.DataFrame:
    """Read a csv or parquet file, or raise UserError if it is damaged."""
    try:
        return (pd.read_parquet if path.suffix == ".parquet" else pd.read_csv)(path, **options)
    except ValueError as error:  # from pandas, or from bytes that are not UTF-8
        raise UserError(f"{path} is damaged ({str(error).splitlines()[0].strip()}): move it away") from None


def market_mark(market: str, trained_on: str = "") -> str:
    """Return what stands before all figures on a market: what is not real in it or the agent's training."""
    marks = [getData.not_real(market)]
    if trained_on and not getData.same_market(market, trained_on):
        kind = trained_on.partition(":")[0] if getData.not_real(trained_on) else "real"
        marks.insert(0, f"TRAINED ON {kind.upper()} BARS, NOT ON THIS MARKET: {trained_on}")
    return ". ".join(filter(None, marks))


def agent_name(checkpoint: str, abstains: bool) -> str:
    """Return the name of an agent's account."""
    return f"agent ({checkpoint}{': equal weights' * abstains})"


def relation_to_training(
    splits: dict[str, list[int]], trained_on: str, market: str, first: int, last: int
) -> str:
    """Return how a market's bars from `first` to `last` (ms) relate to a training on `splits` (ms)."""
    if not getData.same_market(market, trained_on):
        return "of another market than those of the training"
    for name, meaning in (("train", _TRAINED_ON), ("validation", _CHOSEN_ON)):
        if first < splits[name][1] and last >= splits[name][0]:
            return meaning
    if first >= splits["validation"][1]:
        return "out of sample"
    before = last < splits["train"][0]
    return "before the training split" if before else "between training and validation split"


def remarks_on_members(
    report: Report, prices: tuple[np.ndarray, np.ndarray], present: np.ndarray | None, listed: np.ndarray
) -> list[str]:
    """Say what it meant to the headline, else to equal weights, that coins came and went; arrays [T, N]."""
    result = next(iter(report.agents.values()), report.others["equal-weight hold"])
    if present is None or not (there := present[result.rows]).any():
        return []
    start, stop, changes = int(result.rows[0]), int(result.rows[-1]) + 1, []
    for row in (there[1:] != there[:-1]).any(1).nonzero()[0]:
        signs = there[row + 1].astype(int) - there[row]
        names = [f"{'+' if sign > 0 else '-'}{report.symbols[k]}" for k, sign in enumerate(signs) if sign]
        changes.append(f"{getData.when(report.times[row + 1])[:10]} {' '.join(names)}")
    last = there[there.any(1).nonzero()[0][-1]]
    fill_prices = prices[0][1:] if report.fill == "next_open" else prices[1]
    held = EqualWeight(fill_prices, listed & last & present.any(1, keepdims=True))  # while others are
    survivors = float(held(torch.tensor(stop), torch.tensor(start)))
    gap = bp_per_day(math.log(survivors / result.benchmark[-1]) / len(there))
    remarks = [
        f"Members: {there[0].sum()} coins at first, {last.sum()} at the end; {'; '.join(changes[-40:])}",
        f"Survivors' gap: chosen with hindsight, an equal-weight hold of the coins that are there at the end "
        f"would have made {gap:+.1f} bp a day more than the benchmark, which holds those that were there.",
    ]
    ends = len(listed) - 1 - listed[::-1].argmax(0)  # last row of each coin [N]
    gone = [k for k, row in enumerate(ends) if start <= row < stop - 1]
    # the decision at whose fill its price is the last close
    at = np.searchsorted(result.rows, ends + (report.fill == "close"))
    loss = -bp_per_day(sum(math.log(1 - 0.5 * result.before[at[k], 1 + k]) for k in gone) / len(there))
    if gone and (prices[0][ends[gone] + 1, gone] == prices[1][ends[gone], gone]).all():  # no loss is taken
        ended = ", ".join(report.symbols[k] for k in gone)
        remarks.append(f"A DELISTING_LOSS of 0.5 would cost the account {loss:.1f} bp a day ({ended}).")
    return remarks


def verdicts(report: Report, content: dict) -> list[str]:
    """Return what the page shows and what not: a text per agent, or for the baselines, and the remarks."""
    table = content[report.split]
    if report.agents:
        agents = (verdict(name, table, content["skill"][name], report.relation) for name in report.agents)
        return [*agents, *report.remarks]
    best = content["best baseline"]
    told = told_from_chance(table["benchmark"]["days"], best)
    text = (
        "Baselines only: rules that learn nothing, as a yardstick for agents. Looking back, the best of them "
        f"on these bars was {best['name']} ({best['excess_bp_day']:+.1f} bp per day over the benchmark; "
        f"95 % interval, were it the only one, {show_interval(best)}).{told}"
    )
    return [text, *report.remarks]


def told_from_chance(days: float, numbers: dict[str, float]) -> str:
    """Return what so many days could have told from chance, and how many would do for what was found."""
    edge, excess = numbers["detectable_bp_day"], numbers["excess_bp_day"]
    if math.isnan(edge):
        return ""
    needed = days * (edge / max(excess, 1e-9)) ** 2
    end = f"; its own would take {needed:,.0f} days." if days < needed < 36_500 else "."
    told = f"could have told {edge:.1f} bp per day over the benchmark from chance"
    return f" These {days:.1f} days {told} in 80 % of cases{end}"


def verdict(name: str, table: dict[str, dict[str, float]], skill: dict, relation: str) -> str:
    """Return what an agent's figures show and what not, of a split's {name: metrics} and its `skill`."""
    own, benchmark = table[name], table["benchmark"]
    days = f"{own['days']:.1f} days" if own["days"] >= 1 else f"{24 * own['days']:.1f} hours"
    low, high = skill["excess_low_bp_day"], skill["excess_high_bp_day"]
    few, inside = math.isnan(low), relation.startswith((_TRAINED_ON, _CHOSEN_ON))
    if inside:
        text = f"It was {relation.removeprefix('IN SAMPLE: ')}: this says nothing about skill."
    elif few:
        text = "Nothing can be said about skill. The bars are too few for an interval."
    elif low > 0:
        text = "The interval over the benchmark lies above zero: chance alone is an unlikely explanation."
        if not skill["deflated_sharpe"] > 0.95:
            deflated = f"({show(skill['deflated_sharpe'], '.1%')}, {skill['trials']} trials)"
            text += f" But its deflated Sharpe ratio {deflated} leaves room for luck."
    elif high < 0:
        text = "The interval over the benchmark lies below zero: it does worse than holding the coins."
    else:
        text = "No skill shown: the interval over the benchmark includes zero."
    for other, numbers in skill["over"].items():
        if numbers["excess_bp_day"] < 0:
            rule = f"The baseline {other}"
            text += f" {'It lost money, so cash' if other == 'cash' else rule} did better."
    made = [
        show_metric(row, "total_return", "+.1%") + f" ({row['growth_bp_day']:+.1f} bp per day)" * (not few)
        for row in (own, benchmark)
    ]
    text = f"{name}: {text} In {days} it made {made[0]}, the benchmark {made[1]}, cash 0%."
    if few:  # growth per day would be no more than noise, too
        return text
    spans = [
        f"{numbers['excess_bp_day']:+.1f} over {other} ({show_interval(numbers)})"
        for other, numbers in {"the benchmark": skill, **skill["over"]}.items()
    ]
    best = ", looking back the best baseline" * (len(spans) > 2)
    told = "" if inside else told_from_chance(own["days"], skill)
    return f"{text} Log growth in bp per day (95 % interval): {', '.join(spans)}{best}.{told}"


def show(number: float | None, form: str) -> str:
    """Return a formatted number, or a dash where there is none."""
    return "–" if number is None or not math.isfinite(number) else f"{number:{form}}"


def show_interval(numbers: dict[str, float]) -> str:
    """Return the ends of the interval of `excess_figures`, bp per day."""
    return " to ".join(show(numbers[f"excess_{end}_bp_day"], "+.1f") for end in ("low", "high"))


def show_metric(numbers: dict[str, float], key: str, form: str) -> str:
    """Return one of `metrics` formatted; the size of a ratio beyond 1,000 says nothing and is left out."""
    number = numbers[key]
    if key in ("total_return", "sharpe", "sortino", "calmar") and abs(number) > 1_000:
        limit = "100,000%" if form[-1] == "%" else "1,000"
        return f"> {limit}" if number > 0 else f"< -{limit}"
    return show(number, form)


def results_table(rows: dict[str, dict[str, float]]) -> pd.DataFrame:
    """Return the headline table of {name: metrics}, as texts."""
    short = next(iter(rows.values()))["days"] < 1  # a day extrapolated from minutes would say nothing
    return pd.DataFrame({
        heading: {name: show_metric(numbers, key, form) for name, numbers in rows.items()}
        for heading, (key, form) in _COLUMNS.items()
        if not short or key in ("total_return", "max_drawdown", "cost_paid")
    })  # fmt: skip


def run_figures(report: Report) -> dict[str, dict[str, Any]]:
    """Return the figures of each seed and the ensemble of each combination, and of the best one's folds."""
    rows = {}
    for combination, group in itertools.groupby(report.runs, lambda run: run.combination):
        runs = list(group)
        accounts = {}  # name -> its trainings, its account
        for seed in dict.fromkeys(run.seed for run in runs):
            own = [run for run in runs if run.seed == seed]  # of all folds
            accounts[f"seed {seed}"] = own, own[0].result
        if combination in report.ensembles:
            accounts["ensemble"] = runs, report.ensembles[combination]
        starts = sorted({run.test_start for run in runs})
        if combination == report.best and len(starts) > 1:
            _, agent = [*accounts.values()][-1]
            edges = [*np.searchsorted(report.times, starts), len(report.times)]
            for fold, (first, stop) in enumerate(itertools.pairwise(edges)):
                own = [run for run in runs if run.test_start == starts[fold]]
                value, benchmark = (x[first : stop + 1] / x[first] for x in (agent.value, agent.benchmark))
                part = {"turnover": agent.turnover[first:stop], "cost_paid": agent.cost_paid[first:stop]}
                accounts[f"fold {fold + 1}"] = own, replace(agent, value=value, benchmark=benchmark, **part)
        for name, (own, result) in accounts.items():
            name += " (equal weights)" * all(run.abstains for run in own)
            if result:
                row = {**excess_figures(result), **metrics(result)}
            else:  # it comes after those that have one
                row = dict.fromkeys(next(iter(rows.values())), math.nan)
            row |= {"combination": combination, "run": name}
            row["rungs"] = [fmean(part) for part in zip(*(run.rungs for run in own), strict=False)]
            row["validation_bp_day"] = fmean(run.validation for run in own)
            rows[f"{combination} {name}".strip()] = row
    return rows


def runs_table(figures: dict[str, dict[str, Any]]) -> pd.DataFrame:
    """Return `run_figures` as texts, and under them median and range of the seeds of each combination."""
    columns = {"validation": "validation_bp_day", "this split": "excess_bp_day"}
    table = results_table(figures)[["Sharpe", "drawdown", "turnover/day"]]
    for place, (heading, key) in enumerate(columns.items()):
        table.insert(place, heading, [show(row[key], "+.1f") for row in figures.values()])
    table.insert(2, "95 % interval", [show_interval(row) for row in figures.values()])
    if any(paths := [row["rungs"] for row in figures.values()]):
        table.insert(0, "at its rungs", [", ".join(map("{:+.1f}".format, path)) for path in paths])
    seeds = pd.DataFrame([row for row in figures.values() if row["run"].startswith("seed")])
    for combination, rows in seeds.groupby("combination", sort=False):
        label = f"{combination} {{}} of {len(rows)} seeds".strip().format
        for heading, key in columns.items() if len(rows) > 1 else ():
            low, middle, high = (show(x, "+.1f") for x in rows[key].quantile([0, 0.5, 1]))
            table.loc[label("median"), heading] = middle
            table.loc[label("range"), heading] = f"{low} to {high}"
    return table.fillna("")


def statistics_table(skills: dict[str, dict]) -> pd.DataFrame:
    """Return the statistics beside the headline, one column per agent."""
    year = BARS_PER_YEAR**0.5
    columns = {}
    for name, s in skills.items():
        best = show(s["expected_best_sharpe_bar"] * year, "+.2f")
        columns[name] = {
            "log growth over the benchmark, bp/day": show(s["excess_bp_day"], "+.1f"),
            "95 % interval, bp/day": show_interval(s),
            "told from chance in 80 % of cases, bp/day": show(s["detectable_bp_day"], ".1f"),
            "Sharpe of returns over the benchmark, yearly": show(s["sharpe_excess_bar"] * year, "+.2f"),
            "probabilistic Sharpe, over the benchmark": show(s["probabilistic_sharpe"], ".1%"),
            "deflated Sharpe, over the benchmark": show(s["deflated_sharpe"], ".1%"),
            "trials it is deflated by": str(s["trials"]),
            "yearly Sharpe that the best of them would show without skill": best,
            "break-even cost, bp per side": show(1e4 * s["break_even_cost"], ".2f"),
            "mean block of the bootstrap, days": show(s["block_days"], ".1f"),
        }
    return pd.DataFrame(columns)


def thinned(value: np.ndarray, buckets: int) -> np.ndarray:
    """Return the positions [<= 2 x buckets + 2] of a curve's ends, and its extremes in equal buckets."""
    edges = np.linspace(0, len(value), min(buckets, len(value)) + 1).astype(int)
    groups = pd.Series(value).groupby(np.repeat(np.arange(len(edges) - 1), np.diff(edges)))
    return np.unique([0, *groups.idxmin(), *groups.idxmax(), len(value) - 1])


def new_chart(label: str, height: int = 210, **options: object) -> Any:
    """Return an empty chart as wide as its place on the page, over time unless `options` say otherwise."""
    from bokeh.models import HoverTool
    from bokeh.plotting import figure

    tools = {"tools": "box_zoom,pan,wheel_zoom,reset", "active_drag": "box_zoom", "toolbar_location": "above"}
    place = {"x_axis_type": "datetime", "sizing_mode": "stretch_width", "min_border_left": 45}
    chart = figure(height=height, title=label, **tools | place | options)  # beside the axis labels collide
    chart.toolbar.update(autohide=True, logo=None)
    chart.axis.minor_tick_line_color = None
    for axis in chart.axis:
        axis.ticker.update(**{"desired_num_ticks": 4} if hasattr(axis.ticker, "desired_num_ticks") else {})
    tips = "$name", "@x" if "x_axis_type" in options else "@x{%F %H:%M} UTC", "@y"
    chart.add_tools(HoverTool(tooltips=[("", tip) for tip in tips], formatters={"@x": "datetime"}))
    return chart


def add_legend(charts: Sequence[Any]) -> None:
    """Put one legend below charts of the same curves, which switches a curve off in all of them."""
    from bokeh.models import Legend

    items: dict[str, list] = {}
    for chart in charts:
        for glyph in reversed(chart.renderers):  # the last one drawn is on top
            items.setdefault(glyph.name, []).append(glyph)
    columns = max(1, 90 // (max(map(len, items)) + 10))  # for 400 pixels
    look = {"label_text_font_size": "7pt", "glyph_height": 14, "glyph_width": 14, "border_line_color": None}
    legend = Legend(items=list(items.items()), click_policy="hide", ncols=columns, location="center", **look)
    legend.update(padding=0, spacing=6)
    charts[-1].add_layout(legend, "below")
    charts[-1].height += 22 * -(-len(items) // columns)


def draw(panels: dict[str, pd.DataFrame], looks: Iterable[dict], **options: object) -> list:
    """Draw curves in charts below each other, with one x axis and one legend; NaN is left out.

    Args: panels: label of the y axis -> curves by name, over x. looks: of each; the first one is on top.
    """
    charts = []
    for label, curves in panels.items():
        chart = new_chart(label, **options)
        for name, look in reversed(list(zip(curves, looks, strict=True))):
            y = curves[name].dropna()
            y = y.iloc[thinned(y.to_numpy(), 600)] if len(y) else y
            source = {"x": y.index.to_numpy(float), "y": y.to_numpy(np.float32)}
            chart.line("x", "y", source=source, name=name, **{"line_width": 1.5} | look)
            if len(y) < 30:  # one point has no line
                chart.scatter("x", "y", source=source, name=name, color=look["color"], size=4)
        charts.append(chart)
        options["x_range"] = chart.x_range
    if len(curves.columns) > 1:
        add_legend(charts)
    return charts


def make_charts(report: Report, accounts: dict[str, Backtest]) -> dict[str, list]:
    """Return the charts of the page: {name: charts below each other}."""
    colors = itertools.cycle(Category10_10)
    agents = {name: {"color": next(colors), "line_width": 2} for name in report.agents}
    looks = agents | {"benchmark": {"color": "black", "line_dash": "dashed"}}
    faint = {"line_width": 1, "line_alpha": 0.5 if agents else 1}
    # more curves could not be told apart
    rules = {name: {"color": next(colors)} | faint for name in report.rules()[:5]}
    charts = {"value": value_charts(report, accounts, looks | rules)}
    if agents:
        charts["trading"] = trading_charts(report, agents)
        charts["profits"] = [profits_chart(report, agents)]
    charts |= {f"weights of {name}": [weights_chart(report, name)] for name in agents}
    if report.importance is not None:
        charts["importance"] = importance_charts(report.importance)
    return charts | {f"curves of {name}": training_charts(log) for name, log in report.curves.items()}


def value_charts(report: Report, accounts: dict[str, Backtest], looks: dict[str, dict]) -> list:
    """Draw value on a log scale, with the names of agents and benchmark at the ends, and drawdown."""
    from bokeh.models import CustomJSTicker, FixedTicker, LinearAxis, LogScale

    ends = {name: accounts[name].value[-1] for name in looks}
    paths = {}
    for name, end in ends.items():
        total = show_metric({"total_return": end - 1}, "total_return", "+.1%")
        paths[f"{name} {total.replace(' ', '')}"] = accounts[name].value
    paths = pd.DataFrame(paths)
    panels = {"value, log scale (start = 1)": paths, "drawdown, %": 100 * (paths / paths.cummax() - 1)}
    panels = {label: curves[1:].set_axis(report.times) for label, curves in panels.items()}
    charts = draw(panels, looks.values(), min_border_right=85)
    charts[0].update(height=340, y_scale=LogScale())
    charts[0].yaxis.ticker = CustomJSTicker(major_code=_LOG_TICKS)
    charts[0].x_range.range_padding = 0
    names, place, line = {}, 0.0, np.exp(max(np.ptp(np.log(paths.to_numpy())), 1e-6) / 18)
    for name in sorted([*report.agents, "benchmark"], key=ends.get):
        place = max(float(ends[name]), place * float(line))  # no name on another
        names[place] = name.partition(":")[0][:20]
    axis = LinearAxis(ticker=FixedTicker(ticks=list(names)), major_label_overrides=names)
    axis.update(axis_line_color=None, major_tick_line_color=None, major_label_text_font_size="7pt")
    charts[0].add_layout(axis, "right")
    return charts


def trading_charts(report: Report, looks: dict[str, dict]) -> list:
    """Draw growth over the benchmark over 30 days, or a quarter of fewer days, turnover and costs."""
    bars = min(30 * BARS_PER_DAY, max(len(report.times) // 4, 2))
    growth, turnover, paid = (
        pd.DataFrame({name: series(report.agents[name]) for name in looks}, report.times)
        for series in (excess_returns, lambda agent: agent.turnover, lambda agent: agent.cost_paid)
    )
    label = f"log bp/day over the benchmark, last {bars / BARS_PER_DAY:.3g} days"
    panels = {
        label: bp_per_day(growth).rolling(bars).mean(),
        "turnover of the last day, x value": turnover.rolling(BARS_PER_DAY).sum(),
        "costs so far, %": (100 * paid).cumsum(),
    }
    return draw(panels, looks.values())


def profits_chart(report: Report, looks: dict[str, dict]) -> Any:
    """Draw what each coin made, and what the costs took."""
    names = [*report.symbols, "costs"]
    chart = new_chart("profit, units of the first value", 300, x_axis_type="linear", y_range=names[::-1])
    height = 0.8 / len(looks)
    for position, (name, look) in enumerate(reversed(looks.items())):
        places = [(coin, (position + 0.5) * height - 0.4) for coin in names]
        source = {"place": places, "y": names, "x": profit_per_coin(report.agents[name])}
        chart.hbar("place", right="x", height=height, source=source, color=look["color"], name=name)
    add_legend([chart])
    return chart


def weights_chart(report: Report, agent: str) -> Any:
    """Draw the weights after each trade, stacked, cash at the bottom."""
    from bokeh.models import ColumnDataSource

    assets = ["cash", *report.symbols]
    rows = slice(None, None, max(1, len(report.times) // 1500))
    weights = report.agents[agent].weights[rows].T.astype(np.float32)
    columns = dict(zip(assets, weights, strict=True))
    source = ColumnDataSource(columns | {"x": report.times[rows].astype(float)})  # one for all areas
    colors = ["lightgrey", *(Category20_20[k % 20] for k in range(len(report.symbols)))]
    chart = new_chart("weight", height=240, y_range=(0, 1))
    chart.varea_stack(assets, x="x", color=colors, source=source)
    chart.hover.tooltips = "$name"
    add_legend([chart])
    return chart


def importance_charts(table: pd.DataFrame) -> list:
    """Draw what an agent owes to each channel, timeframe and coin as bars, to both together as heatmaps."""
    charts = []
    for kind, rows in table.groupby("kind", sort=False):
        if kind == "channel x timeframe":
            maps = {heading: rows[f"{what}_bp_day"] for what, heading in _OWED.items()}
            maps["explained variance"] = now = rows["explained_variance"]
            if "explained_variance_before" in rows:
                maps["its change since training began"] = now - rows["explained_variance_before"]
            charts += [heatmap(label, rows, values) for label, values in maps.items()]
            continue
        rows = rows.loc[rows.eval("lost_bp_day + alone_bp_day").sort_values().index]
        names = (rows["name"] + rows["timeframe"]).tolist()  # one of the two is empty
        chart = new_chart(f"{kind}, bp/day", 80 + 17 * len(rows), x_axis_type="linear", y_range=names)
        for (what, heading), offset, color in zip(_OWED.items(), (-0.2, 0.2), Category10_10, strict=False):
            source = {"place": [(name, offset) for name in names], "y": names, "x": rows[f"{what}_bp_day"]}
            source |= {end: rows[f"{what}_{end}_bp_day"] for end in ("low", "high")}
            chart.hbar("place", right="x", height=0.4, source=source, color=color, name=heading)
            chart.segment("low", "place", "high", "place", source=source, color="black", name=heading)
        add_legend([chart])
        charts.append(chart)
    return charts


def heatmap(label: str, rows: pd.DataFrame, values: pd.Series) -> Any:
    """Draw the values of rows of channels x timeframes: below 0 in blue, above it in red."""
    from bokeh.models import ColorBar
    from bokeh.transform import linear_cmap

    places = {"x_range": rows["timeframe"].unique().tolist(), "y_range": rows["name"].unique().tolist()[::-1]}
    chart = new_chart(label, 80 + 15 * len(places["y_range"]), x_axis_type="auto", **places)
    color = linear_cmap("z", RdBu11, -values.abs().max(), values.abs().max())
    source = {"x": rows["timeframe"], "y": rows["name"], "z": values}
    chart.rect("x", "y", 1, 1, source=source, fill_color=color, line_color=None)
    chart.add_layout(ColorBar(color_mapper=color.transform, width=8), "right")
    chart.hover.tooltips = "@y @x: @z"
    return chart


def training_charts(log: pd.DataFrame) -> list:
    """Draw the columns of a log in small panels."""
    log = log.set_index("step")
    rewards = [name for name in log if name.endswith("reward")]
    log[rewards] = bp_per_day(log[rewards])
    looks = [{"color": color} for color in Category10_10]
    charts = []
    for title, names in _PANELS.items():
        if names := [name for name in names if name in log]:
            charts += draw({title: log[names]}, looks[: len(names)], x_axis_type="linear")
    return charts


# --- a paper account: decisions that were booked before the bars that judge them existed --------------------


class PaperAccount:
    """The decisions of one agent in an SQLite file, to which rows are only ever added.

    The account is computed anew from decisions and bars (`paper_result`): there is no state that a kill could
    leave half changed, or that could drift. The close of bar t is the key, so a bar has one decision at most.

    Tables: agents (changed_ms by the exchange's clock, 0: the first; about: what the account is of from then
    on, as JSON); decisions (close_ms of bar t; booked_ms by the exchange's clock; weights [A] as JSON, cash
    first, or NULL for none; reason for none; call: the program that was then called, or ""); calls (close_ms,
    result of that program). A call without a result ended with the job, and is not repeated.

    Other programs may read the file at any time (WAL). While one has locked it, methods wait, and say so;
    `book` raises TryLater instead, since a decision that waits would be booked with a wrong time. Every
    method raises UserError where SQLite cannot do it: a full disk, a damaged file, a second decision.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.folder = path, path.with_suffix("")
        path.parent.mkdir(parents=True, exist_ok=True)
        # SQLite reads no WAL file from a folder where nothing can be written, unless it is told so
        place = path.absolute().as_uri() + "?immutable=1" * (not os.access(path.parent, os.W_OK))
        try:  # each statement is a transaction
            self._file = sqlite3.connect(place, timeout=0.1, isolation_level=None, uri=True)
        except sqlite3.Error as error:
            raise UserError(f"{path}: {error}") from None
        self._run("PRAGMA journal_mode = WAL")  # where the drive allows it
        self._run("PRAGMA wal_autocheckpoint = 1")  # so that a copy of the file alone holds everything
        self._run("PRAGMA synchronous = EXTRA")  # a booked decision survives a power failure
        for table in (
            "agents (changed_ms INTEGER NOT NULL, about TEXT NOT NULL)",
            "decisions (close_ms INTEGER PRIMARY KEY, booked_ms INTEGER NOT NULL, weights TEXT,"
            " reason TEXT NOT NULL, call TEXT NOT NULL, CHECK ((weights IS NULL) = (reason != '')))",
            "calls (close_ms INTEGER PRIMARY KEY REFERENCES decisions, result TEXT NOT NULL)",
        ):
            self._run(f"CREATE TABLE IF NOT EXISTS {table}")

    def _run(self, statement: str, values: Sequence[object] = (), wait: bool = True) -> list[tuple]:
        """Run a statement, which is on the disk when this returns, and return its rows."""
        busy = f"{self.path} is locked by another program"
        waits = False
        while True:
            try:
                return self._file.execute(statement, values).fetchall()
            except sqlite3.Error as error:
                if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY:
                    raise UserError(f"{self.path}: {error}: what was booked before is kept") from error
                if not wait:
                    raise getData.TryLater(busy) from None
                if not waits:
                    print(f"{busy}: this job waits", file=sys.stderr, flush=True)
            waits = True
            time.sleep(0.1)

    def about(self) -> dict[str, Any]:
        """Return what the account is of, with its newest agent; {} of a new one."""
        return next(reversed(self.agents().values()), {})

    def agents(self) -> dict[int, dict[str, Any]]:
        """Return {ms, from when on it decides: what the account is of then} of each agent."""
        rows = self._run("SELECT changed_ms, about FROM agents ORDER BY rowid")
        agents = {changed_ms: json.loads(about) for changed_ms, about in rows}
        if 0 not in agents and self._run("SELECT 1 FROM decisions LIMIT 1"):
            raise UserError(f"{self.path} is damaged, or of another version: begin a new account with --run")
        return agents

    def book_agent(self, changed_ms: int, about: dict[str, Any]) -> None:
        """Book that the account is of `about` from now on."""
        self._run("INSERT INTO agents VALUES (?, ?)", (changed_ms, json.dumps(about)))

    def book(
        self, close_ms: int, booked_ms: int, weights: Sequence[float] | None, reason: str = "", call: str = ""
    ) -> None:
        """Book a decision, or none with its reason."""
        text = None if weights is None else json.dumps(list(weights))
        values = close_ms, booked_ms, text, reason, call
        self._run("INSERT INTO decisions VALUES (?, ?, ?, ?, ?)", values, wait=False)

    def record_call(self, close_ms: int, result: str) -> None:
        """Book the result of the program that was called after a decision."""
        self._run("INSERT INTO calls VALUES (?, ?)", (close_ms, result))

    def decisions(self) -> pd.DataFrame:
        """Return the booked decisions by close_ms: booked_ms, weights ([A] or None), reason, call, result."""
        query = "SELECT decisions.*, result FROM decisions LEFT JOIN calls USING (close_ms) ORDER BY 1"
        columns = ["close_ms", "booked_ms", "weights", "reason", "call", "result"]
        table = pd.DataFrame(self._run(query), columns=columns, dtype=object).set_index("close_ms")
        table.index = table.index.astype(np.int64)
        weights = table["weights"].map(lambda text: np.array(json.loads(text)), na_action="ignore")
        return table.assign(weights=weights)


def to_newest(bars: dict[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    """Continue coins that end over an hour before the newest bar flat, as getData.fill_gaps fills a hole."""
    longer = dict(bars)
    for symbol, frame in bars.items():
        last = frame["close"].last_valid_index()
        if frame.index[-1] - last > pd.Timedelta(hours=1):
            flat = frame[frame.index > last].fillna(frame.at[last, "close"]).assign(volume=0.0, filled=True)
            longer[symbol] = pd.concat([frame[:last], flat])
    return longer


def paper_result(
    decisions: pd.DataFrame, bars: dict[str, pd.DataFrame], about: dict[str, Any]
) -> tuple[Backtest | None, np.ndarray, list[np.ndarray]]:
    """Return the account of decisions on bars of `to_newest`, from cash on, or None before a first bar.

    And close times [T], ms, with open and close prices [T+1, N]. The last row stands for the bar that is not
    closed yet: what is held is valued at the last close. After the last bar of a coin prices are its last
    close less the delisting loss, as in `price_arrays`.
    """
    table = getData.price_table(bars)
    over = [frame["filled"][::-1].cumprod()[::-1] for frame in bars.values()]
    left = 1 - about["delisting_loss"] * np.column_stack(over)[: len(table)]  # [T, N]
    opens, closes = (left * part for part in price_arrays(table, list(bars)))
    times = table.index.as_unit("ms").asi8
    prices = [np.vstack([part, closes[-1:]]) for part in (opens, closes)]
    if decisions.empty or decisions.index[0] >= times[-1]:
        return None, times, prices
    orders = decisions["weights"].to_dict()
    market = *prices, int(np.searchsorted(times, decisions.index[0])), len(times) - 1
    trading = {"cost": about["cost"], "limits": Limits(*about["limits"])}
    return backtest(lambda row, _: orders.get(int(times[row])), *market, **trading), times, prices


@dataclass
class PaperTrading:
    """A paper account at work: books the agent's decisions on the new bars of an exchange.

    All times are the exchange's: the clock of this machine decides nothing. Which decisions are due is told
    by the bars that have come, so that a clock of the exchange that jumps ahead skips none.

    A decision at the close of bar t sees bars up to t, and is booked at most `max_late` seconds after that
    close: then bar t+1, at whose open it is filled, has not closed, and no bar exists that judges it. What
    comes later is booked as none, and what is held drifts: "late" was decided too late, "missed" fell into a
    time without this job or the exchange, "no data" names coins without their bar. The first decision that is
    not late begins the account; the next are HOLD bars apart.

    A coin without a bar for an hour that the exchange does not list as traded is gone: what is held of it is
    sold at its last close less the delisting loss, and decisions are about the others.
    """

    account: PaperAccount
    identity: dict[str, Any]  # what the account is of: run, symbols, hold_bars, cost, exchange ...
    # bars of getData.load_bars, weights [A] held at their last close, coins that are gone -> target [A];
    # UserError: they give none
    decide: Callable[[dict[str, pd.DataFrame], np.ndarray, list[str]], np.ndarray]
    history_ms: int  # that `decide` sees
    poll: float  # seconds between two looks at the exchange's clock
    max_late: float  # seconds
    call: str  # program that gets each decision (`call_program`), or ""
    call_timeout: float  # seconds

    def __post_init__(self) -> None:
        before = self.account.about()
        same = "symbols", "hold_bars", "cost", "delisting_loss", "exchange", "base_url", "limits"
        for name in before and same:
            if before[name] != self.identity[name]:
                old = f"{self.account.path} is of {name} {before[name]}, not {self.identity[name]}"
                raise UserError(f"{old}: give this account a name of its own with --run")
        self.about = before | self.identity
        self.limits = Limits(*self.about["limits"])
        self.step = self.about["hold_bars"] * getData.BAR_MS  # between two decisions
        self.gone: list[str] = []
        self.listed_ms = 0  # the newest bar when the list of pairs was read for coins without bars

    def run(self) -> None:
        """Collect and decide, bar after bar, until a signal ends the process."""
        getData.set_damaged_aside(self.account.folder / "ohlcv", self.about["exchange"])
        decisions = self.account.decisions()
        for close in decisions.index[(decisions["call"] != "") & decisions["result"].isna()]:
            self.account.record_call(int(close), "unknown")
            self.warn(close, "CALL: unknown whether it was done, since this job ended; it is not repeated")
        for number in {signal.SIGTERM, signal.SIGHUP}:
            if signal.getsignal(number) != signal.SIG_IGN:  # as nohup leaves it
                signal.signal(number, lambda number, _: sys.exit(128 + number))
        account = f"{'' if self.account.about() else 'new '}paper account {self.account.path}"
        account += f": agent of run {self.about['run']}, {self.about['exchange']}, no order is sent"
        mark = market_mark(self.about["exchange"], self.about["trained on"])
        texts = mark, account, ABSTAINS * self.about["abstains"], REFITTED * self.about["refitted"]
        print(*filter(None, texts), sep="\n")
        asyncio.run(self.trade())

    def warn(self, close: int, text: str) -> None:
        """Print what went wrong at a close (ms)."""
        print(f"{getData.when(close)}  {text}", file=sys.stderr, flush=True)

    async def trade(self) -> None:
        """Collect and decide without end; what an account that has begun cannot have now, it waits for."""
        name, folder = self.about["exchange"], self.account.folder
        command = f"python getData.py --job bars --exchange {name}"
        self.stores = [getData.SymbolBars(symbol, folder, name, command) for symbol in self.about["symbols"]]
        rates = getData.RATE_SHARE, getData.TIMEOUT, 2  # few retries: this job tries again
        self.exchange = getData.Exchange(name, self.about["base_url"], *rates)
        self.exchange.quiet = bool(self.account.about())
        ready, newest, undecided, trouble = False, 0, "", ""
        try:
            while True:
                before = newest
                try:
                    if not ready:
                        await self.begin()
                        ready = self.exchange.quiet = True
                    # while a decision waits for a bar that is closed: at once
                    await self.exchange.wait_for_bar(newest - bool(undecided), self.poll)
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
            await self.exchange.client.close()

    async def begin(self) -> None:
        """Load the exchange's pairs, book another agent; begin a new account with what `decide` sees."""
        clock = await self.exchange.read_clock()
        self.exchange.warn_of_clock()
        before = self.account.about()
        absent = self.about["absent"] and not before
        await self.exchange.load_pairs(self.stores, absent=absent)
        if absent:  # a new account is of the coins that trade
            trade = [name for name, pair in self.exchange.pairs.items() if pair["active"] is not False]
            self.stores = [store for store in self.stores if store.symbol in trade]
            self.about["symbols"] = [store.symbol for store in self.stores]
            if not self.stores:
                raise UsageError(f"{self.about['exchange']} trades none of the agent's coins")
        if before and before["checkpoint"] != self.about["checkpoint"]:
            self.account.book_agent(clock, self.about)
            self.warn(clock, f"another agent from now on: SHA-256 {self.about['checkpoint']}")
        first = clock // getData.DAY_MS * getData.DAY_MS - self.history_ms
        if "first_ms" in self.about:  # another agent may look further back
            self.about["first_ms"] = min(first, self.about["first_ms"])
            return
        self.about["first_ms"] = first
        await self.collect()
        if error := next((store.error for store in self.stores if store.error), None):
            raise error
        bars = {store.symbol: store.bars for store in self.stores}
        getData.print_overview(bars, self.about["first_ms"], self.exchange.last_close)
        getData.check_times(bars, getData.TRUST_TIMES)
        self.decide(self.bars(), np.eye(len(self.stores) + 1)[0], [])
        self.account.book_agent(0, self.about)

    async def collect(self) -> int:
        """Bring all coins up to date, as far as they can be; return the close time of the newest bar, ms."""
        exchange, hour = self.exchange, getData.DAY_MS // 24
        for store in self.stores:
            store.error = None
        with tqdm(disable=True) as silent:  # gaps are kept
            listed = [store for store in self.stores if store.symbol in exchange.pairs]
            await exchange.update(listed, self.about["first_ms"], exchange.last_close, silent, 0, 0)
        newest = max(store.end() for store in self.stores)
        late = [store for store in self.stores if newest - store.end() > hour]
        if late and newest - self.listed_ms >= hour:
            self.listed_ms = newest
            try:
                await exchange.load_pairs(self.stores)
            except UserError as error:  # it ends no account: asked again in an hour
                self.warn(newest, str(error))
        old_gone, self.gone = self.gone, []
        for store in self.stores:
            if exchange.pairs.get(store.symbol, {"active": False})["active"] is False:
                store.error = None  # its advice is about --symbols
                self.gone += [store.symbol] if store in late else []
        if new := ", ".join(symbol for symbol in self.gone if symbol not in old_gone):
            self.warn(newest, f"{new}: traded no longer, so it is sold, less DELISTING_LOSS, and left out")
        return newest

    def bars(self) -> dict[str, pd.DataFrame]:
        """Return the collected bars as getData.load_bars does; coins that are gone reach to the newest."""
        return to_newest(getData.on_one_grid({store.symbol: store.frame() for store in self.stores}))

    async def book_due(self, newest: int) -> str:
        """Book the decisions due up to the newest close (ms); return why the last of them waits, or ""."""
        booked = self.account.decisions()
        due = range(int(booked.index[-1]) + self.step, newest + 1, self.step) if len(booked) else [newest]
        if not due:
            return ""
        clock = await self.exchange.read_clock()
        for close in due:
            if close < newest:
                self.book_none(close, clock, "missed")
        if due[-1] < newest:
            return ""
        here = [store for store in self.stores if store.symbol not in self.gone]
        if missing := [store.symbol for store in here if store.end() != newest]:
            reason = f"no data: {', '.join(missing)}"
            if clock - newest <= 1000 * self.max_late:
                return reason
        else:
            bars = self.bars()
            result, *_ = paper_result(booked, bars, self.about)
            held = result.weights_seen if result else np.eye(len(bars) + 1)[0]
            names = ["cash", *bars]
            target = project(self.decide(bars, held, self.gone), held.shape, ~np.isin(names, self.gone))
            clock = await self.exchange.read_clock()  # as late as can be
            if clock < newest:
                return f"the clock of {self.about['exchange']} is behind its bars"
            reason = "late" if clock - newest > 1000 * self.max_late else ""
        if not reason:
            self.account.book(newest, clock, target.tolist(), call=self.call)
            target = constrain(held, target, 0.0, self.limits)  # as of now; the account's is of the fill
            if self.call:  # before a print, which may fail: a booked decision is not handed over twice
                self.hand_over(newest, held, target)
            value, benchmark = (result.value[-1], result.benchmark[-1]) if result else (1.0, 1.0)
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
        message = {"trained_on": self.about["trained on"], "market": self.about["exchange"]}
        message |= {name: self.about[name] for name in ("run", "abstains", "refitted")}
        message |= {"close_time_ms": close, "next_decision_ms": close + self.step}
        for name, weights in (("weights", target), ("held", held)):
            message[name] = dict(zip(("cash", *self.about["symbols"]), weights.tolist(), strict=True))
        result = call_program(self.call, message, self.call_timeout)
        self.account.record_call(close, result)
        if result != "done":
            self.warn(close, f"CALL: {result}")


def can_be_called(command: str) -> bool:
    """Return whether a command line names a program that is there."""
    with suppress(ValueError, IndexError):  # a quotation that does not end, or no word
        return shutil.which(shlex.split(command)[0]) is not None
    return False


def call_program(command: str, message: dict[str, object], seconds: float) -> str:
    """Run a program with a decision as JSON on its standard input; return "done" or what went wrong.

    It is killed only after `seconds`, with what it started, also if this job ends: orders may be half sent.
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


def report_paper_account(data_dir: Path, name: str, **periods: int) -> None:
    """Publish the page of a paper account as it stands, beside the baselines on the same bars."""
    path = data_dir / "paper" / f"{name}.sqlite"
    if not path.exists():
        raise UserError(f"there is no {path}: begin it with python train.py --job paper")
    account = PaperAccount(path)
    about, agents, decisions = account.about(), account.agents(), account.decisions()
    if not about:
        raise UserError(f"{path} holds no decision yet: let python train.py --job paper run on")
    bars = to_newest(getData.load_bars(account.folder, about["symbols"]))
    result, times, prices = paper_result(decisions, bars, about)
    if result is None:
        raise UserError(f"no bar has closed since the first decision in {path}: try again later")
    first, stop = int(result.rows[0]), int(result.rows[-1]) + 1
    days, sources = (int(times[first]), int(times[stop - 1])), [one["trained on"] for one in agents.values()]
    trained_on = next(filter(getData.not_real, sources), sources[-1])  # of any agent that has decided
    abstains = all(one["abstains"] for one in agents.values())
    trading = {"cost": about["cost"], "fill": "next_open", "limits": Limits(*about["limits"])}
    page = Report(
        run=name, split="paper", times=times[first:stop], symbols=about["symbols"], **trading,
        market=about["exchange"] + (f" at {about['base_url']}" if about["base_url"] else ""),
        others=baselines(*prices, first, stop, symbols=about["symbols"], **trading, **periods),
        agents={agent_name("paper", abstains): result}, trained_on=trained_on, agent=about["run"],
        # what a later agent had seen was over before it decided
        relation=relation_to_training(agents[0]["splits"], trained_on, about["exchange"], *days),
        refit=REFITTED * about["refitted"], abstains=abstains,
        checkpoint=about["checkpoint"], hold_bars=about["hold_bars"],
        trial_sharpes=read_trial_sharpes(data_dir / "runs" / "trials.csv"),
        remarks=paper_remarks(decisions, bars, agents),
    )  # fmt: skip
    publish(data_dir / "reports" / f"paper-{name}", page, f"paper account {path}")


def paper_remarks(
    decisions: pd.DataFrame, bars: dict[str, pd.DataFrame], agents: dict[int, dict[str, Any]]
) -> list[str]:  # fmt: skip
    """Return what figures hide: decisions not taken, other agents, and bars after a coin's last one."""
    reasons = decisions.loc[decisions["weights"].isna(), "reason"].str.split(":").str[0].value_counts()
    text = f"Each decision was booked before the bar existed that judged it. Decisions: {len(decisions):,}"
    if len(reasons):
        text += f", of them none: {', '.join(f'{count} {reason}' for reason, count in reasons.items())}"
        text += "; what was held then drifted"
    calls = decisions.loc[decisions["call"] != "", "result"]
    if len(calls):
        text += f". Calls of the user's program: {len(calls):,}, done {(calls == 'done').sum():,}"
    remarks = [f"{text}."]
    for (_, before), (changed_ms, after) in itertools.pairwise(agents.items()):
        both = f"SHA-256 {after['checkpoint']}, in place of {before['checkpoint']}"
        remarks.append(f"From {getData.when(changed_ms)} on the agent of run {after['run']} decides: {both}.")
    for symbol, frame in bars.items():
        if frame["filled"].iloc[-1]:
            end = f"{symbol} has no bar after {frame.index[~frame['filled']][-1]:%Y-%m-%d %H:%M}"
            remarks.append(f"{end}: it stays, and can be sold, at its last close less DELISTING_LOSS.")
    return remarks


# --- the table of the data at hand --------------------------------------------------------------------------


def read_weights(path: Path, symbols: Sequence[str], times: np.ndarray) -> dict[int, np.ndarray]:
    """Return the orders of a user's file, {row of the close: target [A]}, cash being what the coins leave.

    It has a column `time` (of the close, UTC) and one of weights for each asset, or `asset` and `weight`.
    """
    if not path.is_file():
        raise UserError(f"there is no file {path}: give --weights a csv or parquet file")
    table = read_table(path)
    table = table.reset_index(drop="time" in table)
    if "time" not in table or len(table) == 0:
        raise UserError(f"{path} has no row, or no column time: each row is an order at that close, UTC")
    stamps = getData.to_milliseconds(str(path), table["time"])
    if not {"asset", "weight"} <= set(table):
        table = table.melt("time", var_name="asset", value_name="weight", ignore_index=False)
    line, assets = table.index.to_numpy(), ["CASH", *symbols]
    names, weights = table["asset"].fillna("").astype(str), pd.to_numeric(table["weight"], errors="coerce")
    rows = np.searchsorted(times, stamps[line]).clip(max=len(times) - 1)
    columns = np.array([(*assets, name).index(name) for name in names.map(getData.symbol_name)])
    span = " to ".join(map(getData.when, times[[0, -1]]))
    orders = np.zeros((len(times), len(assets) + 1))
    np.add.at(orders, (rows, columns), weights.fillna(0.0))
    for problem, wrong in {
        f"is no asset here: name cash, {', '.join(symbols)}": columns == len(assets),
        "is no weight: write a number of at least 0": ~(weights >= 0),
        f"is at no close of these bars: give times on 5 minutes, {span} UTC": times[rows] != stamps[line],
        "is there twice: leave one out": pd.Series(rows * len(orders.T) + columns).duplicated(),
        "is of an order over 1: leave some to cash": orders.sum(1)[rows] > 1 + 1e-6,
    }.items():
        if (wrong := np.asarray(wrong)).any():
            place = int(wrong.argmax())
            cell = f"row {line[place] + 1} ({table['time'].iloc[place]}), {names.iloc[place]}"
            raise UserError(f"{path}: {cell} = {table['weight'].iloc[place]} {problem}")
    orders[:, 0] = (1 - orders[:, 1:-1].sum(1)).clip(min=0)
    return {row: orders[row, :-1] for row in np.unique(rows).tolist()}


def main(argv: list[str] | None = None) -> int:
    """Print the table of the baselines and write their page, for each split."""
    given = getData.set_constants(globals(), argv)
    cost, limits = FEE_RATE + SLIPPAGE_RATE, Limits(MAX_WEIGHT, MIN_CASH, NO_TRADE_BAND)
    if cost >= 1:
        raise UsageError(f"FEE_RATE + SLIPPAGE_RATE must be under 1 per side, not {cost}")
    getData.ensure_data(DATA_DIR, getData.SEED)
    frame, footer = getData.load_prices(DATA_DIR)
    symbols = footer["symbols"]
    prices = price_arrays(frame, symbols, DELISTING_LOSS)
    present, times = getData.members_of(frame, symbols), frame.index.as_unit("ms").asi8
    file, trials = Path(WEIGHTS), DATA_DIR / "runs" / "trials.csv"
    orders = read_weights(file, symbols, times) if WEIGHTS else {}
    trading = {"cost": cost, "fill": FILL, "limits": limits}
    for split in footer["splits"] if SPLIT == "all" and not orders else [SPLIT]:
        start, stop = split_rows(frame.index, footer, split, FILL)
        agents, remarks = {}, []
        if orders:
            inside = [row for row in orders if start <= row < stop]
            if not inside:
                raise UserError(f"{file} has no order in the {split} split: use another --split")
            start, rest = inside[0], len(orders) - len(inside)
            remarks = [f"Orders: {len(inside):,}; before and after this split: {rest:,}."]
            market = *prices, start, stop
            agents[file.name] = backtest(lambda row, _: orders.get(row), *market, **trading, present=present)
            written = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(file.stat().st_mtime))
            trial = {"time": written, "run": file.name, "market": footer["source"]}
            trial |= {"data_sha256": data_sha256(footer), "changed": json.dumps(given, default=str)}
            append_trial(trials, trial, agents[file.name])
        periods = {"rebalance_every": REBALANCE_EVERY, "look_back": LOOK_BACK}
        others = baselines(*prices, start, stop, symbols=symbols, present=present, **trading, **periods)
        listed = frame[[f"{symbol}.close" for symbol in symbols]].notna().to_numpy()
        report = Report(
            run=file.name or "baselines", market=footer["source"], split=split, symbols=symbols, **trading,
            times=times[next(iter(others.values())).rows], agents=agents, others=others, constants=given,
            data=data_sha256(footer),
            trial_sharpes=read_trial_sharpes(trials) if orders else (),
        )  # fmt: skip
        report = replace(report, remarks=remarks + remarks_on_members(report, prices, present, listed))
        publish(DATA_DIR / "reports" / (file.name or f"baselines-{split}"), report, f"\n{split}")
    return 0


if __name__ == "__main__":
    getData.run_script(main)
