"""A portfolio of cash and coins on 5-minute bars: exact trading costs, environments, backtest, baselines, metrics.

reads   data/features/prices.parquet       (getData.py; without any data a synthetic market is made first)
writes  nothing

    python portfolio_env.py                          table of baselines on each split of the data at hand
    python portfolio_env.py --fee-rate 0.0005        the same with another fee
    gymnasium.make("CryptoPortfolio-v0", data_dir="data", split="train")     (after `import portfolio_env`)

Weights are [cash, coin 1 ... coin N], not negative, sum 1. A decision t is taken at the close of bar t, on weights
valued at that close. It is filled at f[t], the open of bar t+1 (FILL "next_open") or that same close ("close",
optimistic), and held to f[t+1]. Value and benchmark are 1 at the first fill, before its trade.

Returns, costs and turnover are fractions: cost per side of the money that changes hands, turnover of the value at the
fill (coins sold + cash spent on coins, so cost paid = cost x turnover).
Letters in shape comments: T bars, N coins, A = N + 1 assets, E environments, S steps, B any batch.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import NormalDist
from typing import Any, Literal

import gymnasium
import numpy as np
import pandas as pd
import torch
from torch import Tensor

import getData
from getData import BARS_PER_DAY, BARS_PER_YEAR, Count, Fraction, Seed, UsageError

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

Policy = Callable[[int, np.ndarray], np.ndarray | None]  # (row, weights seen [A]) -> target [A], or None: no order


# --- accounting ---------------------------------------------------------------------------------------------------


def rebalance(weights: Tensor, target: Tensor, cost: float) -> Tensor:
    """Value kept, mu [B], when `weights` [B, A] are traded into `target` [B, A] at `cost` per side.

    mu is the root of  w0 + (1-c) sum max(w_i - mu a_i, 0) - sum max(mu a_i - w_i, 0) / (1-c) = mu a0  (i over coins),
    as in Ormos and Urban (2013) and Jiang, Xu and Liang (2017, arXiv:1706.10059). Once it is known which coins are
    sold the equation is linear and mu a quotient, so each Newton step is that quotient and the search ends, exactly,
    when the set of sold coins stays the same. The last quotient, taken with gradient, carries the implicit gradient of
    the root in both arguments (at a kink: one of the two one-sided ones).
    """
    check_cost(cost)
    with torch.no_grad():
        sold = weights > target  # mu = 1
        for _ in range(2 * weights.shape[-1]):  # a few rounds; the bound is for coins within rounding of a kink
            mu = _value_kept(weights, target, sold, cost)
            old_sold, sold = sold, weights > mu[..., None] * target
            if torch.equal(sold, old_sold):
                break
    return _value_kept(weights, target, sold, cost)


def _value_kept(weights: Tensor, target: Tensor, sold: Tensor, cost: float) -> Tensor:
    """Root of the cost equation when exactly the coins in `sold` [B, A] are sold."""
    price = torch.full_like(weights, 1 / (1 - cost)).masked_fill(sold, 1 - cost)  # cash per unit of each asset
    price[..., 0] = 1
    return (price * weights).sum(-1) / (price * target).sum(-1)


def rebalance_one(weights: np.ndarray, target: np.ndarray, cost: float) -> tuple[float, float]:
    """The same for one portfolio [A] in numpy: value kept, and turnover."""
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
    """Weights [..., A] after prices moved by `relatives` [..., A] (cash 1), and the growth [...] of the whole."""
    grown = weights * relatives
    growth = grown.sum(-1)
    return grown / growth[..., None], growth


def turnover_of(weights: Any, target: Any, mu: Any, cost: float) -> Any:
    """Coins sold + cash spent on coins, as a fraction of the value before the trade; torch or numpy, mu [..., 1]."""
    moved = (weights - mu * target)[..., 1:]
    return (moved.clip(min=0) - moved.clip(max=0) / (1 - cost)).sum(-1)


def project(target: Any, shape: tuple[int, ...]) -> Any:
    """Any non-negative numbers of that shape, divided by their sum; torch or numpy.

    Raises ValueError for another shape, NaN, infinity, a negative number, or all zero.
    """
    if tuple(target.shape) != shape:
        raise ValueError(f"weights must have the shape {shape}, cash first; got {tuple(target.shape)}")
    total = target.sum(-1)[..., None]
    if not bool((target >= 0).all() & (total > 0).all() & (total < np.inf).all()):
        raise ValueError("weights must be finite, not negative, and not all zero")
    return target / total


def check_reward(reward: str) -> None:
    """Raises ValueError for an unknown reward."""
    if reward not in ("excess", "growth"):
        raise ValueError(f'reward must be "excess" or "growth"; got {reward!r}')


def check_cost(cost: float) -> None:
    """Raises ValueError unless `cost` is a fraction per side."""
    if not 0 <= cost < 1:
        raise ValueError(f"cost must be a fraction per side, at least 0 and under 1; got {cost}")


def align_prices(open_prices: Any, close_prices: Any, fill: str, hold_bars: int = 1) -> tuple[Any, Any, Any, Any]:
    """What decision t meets, from prices [T, N] (numpy or torch); R rows on which a decision can be filled and held.

    Returns:
        fill_prices f [R+h, N]; gap [R, N] from the close of bar t to f[t]; hold [R, N] from f[t] to f[t+h];
        mark [R, N] from f[t] to the close of bar t+h; h is `hold_bars`.
    """
    if fill not in ("next_open", "close"):
        raise ValueError(f'fill must be "next_open" or "close"; got {fill!r}')
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
    """[R, N] of the coins -> [R, A] with cash, which is always 1, in front."""
    return np.concatenate([np.ones((len(relatives), 1)), relatives], axis=1)


# --- environments -------------------------------------------------------------------------------------------------


class VectorPortfolioEnv:
    """E portfolios at once in torch, float64, on the device of the prices; autograd flows through all of it.

    `hold_bars` h is the number of bars from one decision to the next: with more than 1 there is no order in between.
    `rows` decision rows have prices to be filled and held at. After reset and each step: `value`, `benchmark_value`
    (both 1 at the start), `turnover`, `cost_paid` (of this step, fractions of the value), `row`; all [E].
    The benchmark is the drifted equal-weight buy-and-hold of the coins from the first fill on, without costs.
    A portfolio whose value falls under `ruin` is terminated and stays as it is, with reward 0, to the end.
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
        check_reward(reward)
        prices = open_prices.to(torch.float64), close_prices.to(torch.float64)
        self._fill_prices, gap, hold, mark = align_prices(*prices, fill, hold_bars)
        relatives = (torch.nn.functional.pad(part, (1, 0), value=1.0) for part in (gap, hold, mark))  # cash: 1
        self._gap, self._hold, self._mark = relatives  # [R, A]
        usable = torch.isfinite(self._gap * self._hold * self._mark).all(-1)
        self._unusable_before = torch.nn.functional.pad((~usable).cumsum(0), (1, 0))  # [R+1]
        self.cost, self.reward, self.ruin, self.hold_bars = cost, reward, ruin, hold_bars
        self.rows, self.assets = self._hold.shape

    def reset(self, start: Tensor, steps: int, weights: Tensor | None = None) -> Tensor:
        """Starts segments of `steps` decisions at rows `start` [E] with `weights` [E, A] (all cash); weights seen."""
        after = start + (steps - 1) * self.hold_bars + 1  # the row after the last decision
        if steps < 1 or int(start.min()) < 0 or int(after.max()) > self.rows:
            raise ValueError(f"segments of {steps} steps must lie within the {self.rows} rows that can be traded")
        if bool((self._unusable_before[after] > self._unusable_before[start]).any()):
            raise ValueError("a segment has missing prices: start after the last coin's listing")
        if weights is None:
            weights = torch.zeros(len(start), self.assets, dtype=torch.float64, device=self._hold.device)
            weights[:, 0] = 1
        weights = project(weights.to(torch.float64), (len(start), self.assets))
        self.row, self._steps_left = start, steps
        self._weights = drift(weights, self._gap[start])[0]  # at the fill, before the trade
        self._first_prices = self._fill_prices[start]  # [E, N]
        self.value = torch.ones_like(weights[:, 0])
        self.benchmark_value = torch.ones_like(self.value)
        self.turnover = self.cost_paid = torch.zeros_like(self.value)
        self._terminated = torch.zeros_like(start, dtype=torch.bool)
        return weights

    def step(self, target: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Trades into `target` [E, A] (projected by its sum) and holds it until the next decision.

        Returns:
            weights seen at the next decision [E, A], reward [E], terminated [E], truncated [E].
        """
        if self._steps_left == 0:
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
        self._steps_left -= 1
        self._terminated = self.value < self.ruin
        truncated = ~self._terminated if self._steps_left == 0 else torch.zeros_like(self._terminated)
        return weights_seen, reward, self._terminated, truncated


class PortfolioEnv(gymnasium.Env):
    """One portfolio as a gymnasium environment; the same accounting as VectorPortfolioEnv, to rounding.

    Observation: Box [look_back * N + A], float32: log returns close to close of the last `look_back` bars, oldest
    first, all coins of a bar together, clipped to +-10; then the weights held now.
    Action: Box [A], any non-negative numbers, divided by their sum. (The box starts a hair above 0, so that a library
    which clips into it never sends all zeros, the one action without a direction. Single zeros are welcome.)
    info: row, value, benchmark_value, turnover, cost_paid, and weights, in float64.

    Args:
        open_prices, close_prices: [T, N]; without them the `split` ("train", ...) of the prices in `data_dir`.
        cost: fraction per side.  fill: "next_open" or "close".  reward: "excess" (over the benchmark) or "growth".
        ruin: value under which the episode is terminated.  steps: decisions until it is truncated.
        look_back: bars.  random_weights: start from random weights, not from cash.

    reset's options: {"start": row} of the first decision, {"weights": [A]} held at its close.
    """

    metadata = {"render_modes": []}

    def __init__(
        self,
        open_prices: np.ndarray | None = None,
        close_prices: np.ndarray | None = None,
        *,
        data_dir: str | Path = "data",
        split: str = "train",
        cost: float = 0.001,
        fill: str = "next_open",
        reward: str = "excess",
        ruin: float = 0.1,
        steps: int = 288,
        look_back: int = 48,
        random_weights: bool = False,
    ) -> None:
        check_cost(cost)
        check_reward(reward)
        first, stop = 0, None
        if open_prices is None or close_prices is None:
            frame, footer = getData.load_prices(Path(data_dir))
            open_prices, close_prices = price_arrays(frame, footer["symbols"])
            first, stop = split_rows(frame.index, footer, split, fill)
        open_prices, close_prices = np.asarray(open_prices, np.float64), np.asarray(close_prices, np.float64)
        self._fill_prices, *relatives = align_prices(open_prices, close_prices, fill)
        self._gap, self._hold, self._mark = (with_cash(part) for part in relatives)  # [R, A]
        self._log_returns = np.diff(np.log(close_prices), axis=0)  # [T-1, N], row t: from bar t to t+1
        self.cost, self.reward, self.ruin, self.steps = cost, reward, ruin, steps
        self.look_back, self.random_weights = look_back, random_weights
        rows, self.assets = self._hold.shape
        self.first_row = max(first, look_back)
        self.last_row = (rows if stop is None else stop) - steps  # last one to start at
        if steps < 1 or look_back < 1 or self.last_row < self.first_row:
            raise ValueError(f"look_back {look_back} and {steps} steps must be at least 1 and fit into {rows} rows")
        used = slice(self.first_row - look_back, self.last_row + steps)
        if not np.isfinite(self._gap[used] * self._hold[used] * self._mark[used]).all():
            raise ValueError("prices are missing: start after the last coin's listing")
        high = np.append(np.full(look_back * (self.assets - 1), 10.0), np.ones(self.assets)).astype(np.float32)
        low = np.where(high > 1, -high, 0)
        self.observation_space = gymnasium.spaces.Box(low, high, dtype=np.float32)
        self.action_space = gymnasium.spaces.Box(1e-8, 1.0, (self.assets,), dtype=np.float32)
        self._over = True

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        options = options or {}
        start = int(self.np_random.integers(self.first_row, self.last_row + 1))
        weights = self.np_random.dirichlet(np.ones(self.assets)) if self.random_weights else np.eye(self.assets)[0]
        start, weights = options.get("start", start), options.get("weights", weights)
        if not self.first_row <= start <= self.last_row:
            raise ValueError(f"start must be a row from {self.first_row} to {self.last_row}; got {start}")
        self._weights_seen = project(np.asarray(weights, np.float64), (self.assets,))
        self._weights, _ = drift(self._weights_seen, self._gap[start])  # at the fill, before the trade
        self._start = self._row = start
        self._value = self._benchmark_value = 1.0
        self._over = False
        return self._observe(), self._info(0.0, 0.0)

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        if self._over:
            raise RuntimeError("the episode is over: call reset")
        target = project(np.asarray(action, np.float64), (self.assets,))
        mu, turnover = rebalance_one(self._weights, target, self.cost)
        self._weights, growth = drift(target, self._hold[self._row])
        self._weights_seen, _ = drift(target, self._mark[self._row])
        self._row += 1
        self._value *= mu * growth
        old_benchmark_value = self._benchmark_value
        self._benchmark_value = float((self._fill_prices[self._row] / self._fill_prices[self._start]).mean())
        reward = float(np.log(mu * growth))
        if self.reward == "excess":
            reward -= float(np.log(self._benchmark_value / old_benchmark_value))
        terminated = bool(self._value < self.ruin)
        truncated = self._row - self._start == self.steps and not terminated
        self._over = terminated or truncated
        return self._observe(), reward, terminated, truncated, self._info(turnover, 1 - mu)

    def _observe(self) -> np.ndarray:
        returns = self._log_returns[self._row - self.look_back : self._row].clip(-10, 10)
        return np.append(returns, self._weights_seen).astype(np.float32)

    def _info(self, turnover: float, cost_paid: float) -> dict[str, Any]:
        return {
            "row": self._row,
            "value": float(self._value),
            "benchmark_value": self._benchmark_value,
            "turnover": turnover,
            "cost_paid": cost_paid,
            "weights": self._weights_seen.copy(),
        }


gymnasium.register(id="CryptoPortfolio-v0", entry_point="portfolio_env:PortfolioEnv")


# --- backtest and metrics -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Backtest:
    """One policy over S consecutive decisions. Value and benchmark are taken at the fills."""

    rows: np.ndarray  # [S] decision rows
    weights: np.ndarray  # [S, A] after the trade
    value: np.ndarray  # [S+1] 1 at the first fill, before its trade
    benchmark: np.ndarray  # [S+1] equal-weight buy-and-hold of the coins, no costs
    turnover: np.ndarray  # [S] fraction of the value at the fill
    cost_paid: np.ndarray  # [S] fraction of the value at the fill
    held: np.ndarray  # [S, A] at the fill, before the trade; equal to weights where there is no order


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
    """Runs `policy` from all cash over the decisions start ... stop-1 on prices [T, N].

    `policy(t, weights_seen)` gives a target [A], which is projected by its sum, or None: no order, what is held
    drifts on. (To ask for the weights seen is not the same: they have moved again by the fill.)
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
    weights, weights_before, value = np.empty((steps, assets)), np.empty((steps, assets)), np.ones(steps + 1)
    turnover, cost_paid = np.zeros(steps), np.zeros(steps)
    held, weights_seen = np.eye(assets)[0], np.eye(assets)[0]
    for step in range(steps):
        weights_before[step] = held
        target = policy(start + step, weights_seen)
        mu = 1.0
        if target is not None:
            target = project(np.asarray(target, np.float64), (assets,))
            mu, turnover[step] = rebalance_one(held, target, cost)
            cost_paid[step] = 1 - mu
            held = target
        weights[step] = held
        weights_seen, _ = drift(held, mark[step])
        held, growth = drift(held, hold[step])
        value[step + 1] = value[step] * mu * growth
    benchmark = (fill_prices[start : stop + 1] / fill_prices[start]).mean(1)
    return Backtest(np.arange(start, stop), weights, value, benchmark, turnover, cost_paid, weights_before)


def metrics(result: Backtest) -> dict[str, float]:
    """The usual numbers, none of them a percentage; a ratio whose denominator is 0 is reported as 0.

    growth: log of the last value; growth_bp_day, growth_year: the same per day in basis points, and per year.
    sharpe, sortino: mean of the *simple* returns per bar over their standard deviation (downside deviation from 0),
    times sqrt(bars per year), risk-free rate 0. max_drawdown: largest fall from a peak, as a fraction.
    calmar: compound annual return / max_drawdown. turnover_day: mean per day, both sides counted. cost_paid: sum over
    steps of fractions of the value. hit_rate: share of bars with more growth than the benchmark.
    excess_bp_day: log growth over the benchmark per day.
    """
    returns = result.value[1:] / result.value[:-1] - 1  # [S]
    bars = len(returns)
    days = bars / BARS_PER_DAY
    growth, benchmark_growth = np.log(result.value[-1]), np.log(result.benchmark[-1])
    deviation = returns.std(ddof=1) if bars > 1 else 0.0
    downside = np.sqrt(np.mean(np.minimum(returns, 0) ** 2))
    drawdown = np.max(1 - result.value / np.maximum.accumulate(result.value))
    annual_return = np.expm1(min(growth / bars * BARS_PER_YEAR, 600.0))  # e^709 is the edge of float64
    beaten = np.diff(np.log(result.value)) - np.diff(np.log(result.benchmark)) > 1e-12  # not by rounding alone
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
    return numerator / denominator if denominator > 0 else 0.0


def format_table(results: dict[str, dict[str, float]]) -> str:
    """One aligned line for each entry of {name: metrics}."""
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
        cells = (f"{numbers[key]:{form}}".rjust(len(heading) + 3) for heading, (key, form) in columns.items())
        lines.append(f"{name:{first}}" + "".join(cells))
    return "\n".join(lines)


# --- how sure, and at what cost -----------------------------------------------------------------------------------


def excess_returns(result: Backtest) -> np.ndarray:
    """Log growth over the benchmark of each bar [S]: the returns of which all statistics below are taken."""
    return np.diff(np.log(result.value)) - np.diff(np.log(result.benchmark))


def block_length(returns: np.ndarray) -> float:
    """Mean block for `bootstrap_interval`, in bars: three days, since positions are held for days, or the optimal block
    of the *hourly* sums where that is longer; at most a fifth of the series, at least a day.

    Optimal: Politis and White, "Automatic block-length selection for the dependent bootstrap", Econometric Reviews 23
    (2004), corrected by Patton, Politis and White, Econometric Reviews 28 (2009). Their rule looks sqrt(S) lags back,
    on 5-minute bars less than a day. On daily sums of a few weeks it is so noisy that simulated 95 % intervals covered
    68 to 87 %; blocks of one day covered 78 to 87 % where the excess drifts with a half-life of 12 hours.
    """
    hour = BARS_PER_DAY // 24
    hours = len(returns) // hour
    optimal = hour * _optimal_block(returns[: hours * hour].reshape(hours, hour).sum(1)) if hours >= 48 else 0.0
    return max(float(BARS_PER_DAY), min(max(3.0 * BARS_PER_DAY, optimal), len(returns) / 5))


def _optimal_block(series: np.ndarray) -> float:
    """Politis and White's mean block for the stationary bootstrap of the mean of `series` [n], n >= 20."""
    n = len(series)
    centred = series - series.mean()
    run = max(5, int(np.log10(n)))  # so many autocorrelations in a row must be insignificant
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
    """Confidence interval of the mean of `returns` [S]: percentiles of the stationary bootstrap's means.

    Politis and Romano, "The stationary bootstrap", Journal of the American Statistical Association 89 (1994): blocks
    from random places of the series, closed to a circle, of geometric length with mean `block`. The sum of a block is a
    difference of running sums, so a resample costs no copy of the data. The deviations from the mean are widened by
    sqrt(m / (m - 1)) and Student's t over the normal quantile, as for m = S / block independent observations; without
    that, intervals of few blocks are too narrow. NaN where m < 4: too short to tell.
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
    low, high = mean + (tails - mean) * np.sqrt(blocks / (blocks - 1)) * _student_over_normal(level, blocks - 1)
    return float(low), float(high)


def _student_over_normal(level: float, freedom: float) -> float:
    """Two-sided quantile of Student's t over that of the normal: Abramowitz and Stegun (1964), 26.7.5."""
    z = NormalDist().inv_cdf((1 + level) / 2)
    terms = (
        (z**2 + 1) / 4,
        (5 * z**4 + 16 * z**2 + 3) / 96,
        (3 * z**6 + 19 * z**4 + 17 * z**2 - 15) / 384,
    )
    return 1 + sum(term / freedom**power for power, term in enumerate(terms, start=1))


def sharpe_per_bar(returns: np.ndarray) -> float:
    """Mean over standard deviation of `returns` [S], not annualised; NaN where they do not vary."""
    deviation = returns.std(ddof=1) if len(returns) > 1 else 0.0
    return float(returns.mean() / deviation) if deviation > 0 else np.nan


def probabilistic_sharpe(returns: np.ndarray, threshold: float = 0.0) -> float:
    """Probability that the true Sharpe ratio per bar is above `threshold`, given `returns` [S]; NaN if undefined.

    Bailey and Lopez de Prado, "The Sharpe ratio efficient frontier", Journal of Risk 15 (2012):
    Phi((SR - SR*) sqrt(S - 1) / sqrt(1 - skewness SR + (kurtosis - 1) / 4 SR^2)). It takes the returns of the bars as
    independent; where they are not, believe the bootstrap interval.
    """
    sharpe = sharpe_per_bar(returns)
    if not np.isfinite(sharpe):
        return np.nan
    centred = returns - returns.mean()
    variance = np.mean(centred**2)
    skewness, kurtosis = np.mean(centred**3) / variance**1.5, np.mean(centred**4) / variance**2
    error = np.sqrt((1 - skewness * sharpe + (kurtosis - 1) / 4 * sharpe**2) / (len(returns) - 1))
    return NormalDist().cdf((sharpe - threshold) / error)


def expected_best_sharpe(trial_sharpes: Sequence[float]) -> float:
    """The largest Sharpe ratio that as many trials without any skill would be expected to show.

    Bailey and Lopez de Prado, "The deflated Sharpe ratio", Journal of Portfolio Management 40 (2014), from the number
    of trials and the variance of their ratios. A trial without a result (NaN) counts in the number. One trial: 0.
    NaN where several trials have fewer than two results, so no variance.
    """
    trials = len(trial_sharpes)
    if trials <= 1:
        return 0.0
    known = np.array([sharpe for sharpe in trial_sharpes if np.isfinite(sharpe)])
    if len(known) < 2:
        return np.nan
    quantiles = (NormalDist().inv_cdf(1 - share / trials) for share in (1, np.exp(-1)))
    return float(known.std(ddof=1) * np.dot((1 - np.euler_gamma, np.euler_gamma), list(quantiles)))


def replay(result: Backtest, cost: float) -> Backtest:
    """The same trades at another `cost` per side. Weights, seen or held, do not depend on costs, so this is what the
    same policy would have done there, step by step (unless it knows the cost, as the hindsight optimum does)."""
    held, weights = torch.from_numpy(result.held), torch.from_numpy(result.weights)
    mu = rebalance(held, weights, cost)  # [S], 1 where there is no order
    turnover = turnover_of(held, weights, mu[:, None], cost).numpy()
    factors = result.value[1:] / result.value[:-1] / (1 - result.cost_paid) * mu.numpy()
    value = np.append(1.0, np.cumprod(factors))
    return replace(result, value=value, turnover=turnover, cost_paid=1 - mu.numpy())


def cost_sweep(result: Backtest, costs: Sequence[float]) -> dict[float, float]:
    """Log growth over the benchmark, bp per day, of the same trades at each cost per side."""
    return {cost: metrics(replay(result, cost))["excess_bp_day"] for cost in costs}


def break_even_cost(result: Backtest) -> float:
    """Cost per side at which the same trades would grow as the benchmark does.

    NaN where they stay behind it even at no cost; infinity where they are ahead and nothing is ever traded. A portfolio
    that only buys at the start has one too, the cost of that one trade, which says nothing about trading.
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
    """How sure the growth over the benchmark is, and what becomes of it at other costs.

    All ratios are of `excess_returns`, but for probabilistic_sharpe_plain, which is of the portfolio's own returns.
    `trial_sharpes`: per bar, of all trials that this one was chosen from, itself included. excess_low and excess_high
    are the ends of the 95 % interval; costs of the sweep are per side.
    """
    returns = excess_returns(result)
    block = block_length(returns)
    low, high = bootstrap_interval(returns, block)
    expected_best = expected_best_sharpe(trial_sharpes)
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


def monthly_returns(value: np.ndarray, times: np.ndarray) -> pd.Series:
    """Simple return of each calendar month (UTC, index "2024-01"), from values [S+1] and decision times [S] in ms."""
    months = pd.to_datetime(times, unit="ms").strftime("%Y-%m")
    growth = pd.Series(np.diff(np.log(value))).groupby(np.asarray(months)).sum()
    return np.expm1(growth)


# --- baselines ----------------------------------------------------------------------------------------------------


def baselines(
    open_prices: np.ndarray,
    close_prices: np.ndarray,
    start: int,
    stop: int,
    *,
    cost: float,
    fill: str = "next_open",
    rebalance_every: int = 288,
    look_back: int = 2_016,
) -> dict[str, Backtest]:
    """Every baseline over the decisions start ... stop-1, and the hindsight optimum, which no policy can beat."""
    policies = baseline_policies(close_prices, start, rebalance_every=rebalance_every, look_back=look_back)
    policies["hindsight optimum"] = hindsight(open_prices, close_prices, start, stop, cost=cost, fill=fill)
    return {
        name: backtest(policy, open_prices, close_prices, start, stop, cost=cost, fill=fill)
        for name, policy in policies.items()
    }


def baseline_policies(
    close_prices: np.ndarray, start: int, *, rebalance_every: int = 288, look_back: int = 2_016
) -> dict[str, Policy]:
    """The causal baselines: a decision t looks at closes up to row t alone.

    The first two never sell; the others trade at `start` and every `rebalance_every` bars after it.
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
    """Coins in proportion to 1 / standard deviation of their last `look_back` log returns; flat coins get nothing."""

    def decide(t: int) -> np.ndarray:
        deviation = np.diff(np.log(close_prices[max(t - look_back, 0) : t + 1]), axis=0).std(0) if t > 0 else 0.0
        deviation = np.broadcast_to(deviation, close_prices.shape[1])
        inverse = np.divide(1.0, deviation, out=np.zeros(len(deviation)), where=deviation > 0)
        return np.append(0.0, inverse if inverse.any() else np.ones(len(inverse)))

    return decide


def time_series_momentum(close_prices: np.ndarray, look_back: int) -> Callable[[int], np.ndarray]:
    """1/N in each coin that rose over `look_back` bars, the rest in cash: the long side, unscaled, of Moskowitz, Ooi
    and Pedersen, "Time series momentum", Journal of Financial Economics 104 (2012)."""

    def decide(t: int) -> np.ndarray:
        coins = (close_prices[t] > close_prices[max(t - look_back, 0)]) / close_prices.shape[1]
        return np.append(1 - coins.sum(), coins)

    return decide


def olmar(close_prices: np.ndarray, period: int, window: int = 5, epsilon: float = 10.0) -> Callable[[int], np.ndarray]:
    """On-line moving average reversion, OLMAR-1: Li and Hoi, "On-Line Portfolio Selection with Moving Average
    Reversion", ICML 2012; periods of `period` bars, the mean of `window` closes as the next price."""
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
    """Passive aggressive mean reversion, PAMR-0: Li, Zhao, Hoi and Gopalkrishnan, "PAMR: Passive aggressive mean
    reversion strategy for portfolio selection", Machine Learning 87 (2012); periods of `period` bars."""
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
    """Euclidean projection to non-negative numbers of sum 1: Duchi et al., ICML 2008."""
    ordered = np.sort(point)[::-1]
    excess = (np.cumsum(ordered) - 1) / np.arange(1, len(point) + 1)
    return np.maximum(point - excess[ordered > excess][-1], 0)


def hindsight(
    open_prices: np.ndarray, close_prices: np.ndarray, start: int, stop: int, *, cost: float, fill: str
) -> Policy:
    """The best policy of all for those who know the future: the exact optimum net of costs, as a policy to replay."""
    _, _, hold, _ = align_prices(open_prices, close_prices, fill)
    path, _ = hindsight_path(with_cash(hold[start:stop]), cost)
    assets = np.eye(hold.shape[1] + 1)
    changes = np.diff(path, prepend=0) != 0  # from all cash

    def policy(t: int, weights_seen: np.ndarray) -> np.ndarray | None:
        return assets[path[t - start]] if changes[t - start] else None

    return policy


def hindsight_path(relatives: np.ndarray, cost: float) -> tuple[np.ndarray, float]:
    """Asset to hold in each of S steps [S] for the largest final value, from cash, and its log growth.

    Final value is linear in what is held of each asset, since each can be traded on without regard to the others; so
    some single asset is always best. J[i], the log of the final value of one unit in asset i before the trade, is
    either that of staying or that of selling i and buying the best entry j.
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


# --- the table of the data at hand --------------------------------------------------------------------------------


def price_arrays(frame: pd.DataFrame, symbols: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Open and close prices [T, N], float64, of the frame that getData.load_prices gives."""
    opens, closes = (frame[[f"{symbol}.{name}" for symbol in symbols]] for name in ("open", "close"))
    return opens.to_numpy(np.float64), closes.to_numpy(np.float64)


def split_rows(index: pd.DatetimeIndex, footer: dict, split: str, fill: str) -> tuple[int, int]:
    """First decision row and the one after the last of a split; decisions that could not be held are left out."""
    if split not in footer["splits"]:
        raise ValueError(f"split must be one of {', '.join(footer['splits'])}; got {split!r}")
    first, stop = index.searchsorted(pd.to_datetime(footer["splits"][split], unit="ms", utc=True))
    last_rows = 2 if fill == "next_open" else 1  # a fill and a price to hold to lie ahead
    return int(first), int(min(stop, len(index) - last_rows))


def main(argv: list[str] | None = None) -> int:
    getData.set_constants(sys.modules[__name__], argv)
    check_constants()
    cost = FEE_RATE + SLIPPAGE_RATE
    getData.ensure_data(DATA_DIR, SEED)
    frame, footer = getData.load_prices(DATA_DIR)
    open_prices, close_prices = price_arrays(frame, footer["symbols"])
    for split in footer["splits"] if SPLIT == "all" else [SPLIT]:
        start, stop = split_rows(frame.index, footer, split, FILL)
        periods = {"rebalance_every": REBALANCE_EVERY, "look_back": LOOK_BACK}
        results = baselines(open_prices, close_prices, start, stop, cost=cost, fill=FILL, **periods)
        first_day, last_day = (frame.index[row].date() for row in (start, stop - 1))
        print(f"\n{split}: {first_day} to {last_day}, {stop - start:,} bars, cost {cost:.3%} per side, fill {FILL}")
        print(format_table({name: metrics(result) for name, result in results.items()}))
    print(f"\nfirst coin: {footer['symbols'][0]}; data: {footer['source']}")
    return 0


def check_constants() -> None:
    """Raises UsageError, with the constant, for one that cannot be."""
    if FEE_RATE + SLIPPAGE_RATE >= 1:
        raise UsageError(f"FEE_RATE + SLIPPAGE_RATE must be under 1 per side, not {FEE_RATE + SLIPPAGE_RATE}")


if __name__ == "__main__":
    getData.run_script(main)
