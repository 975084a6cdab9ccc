"""What a planted market lets one earn, to judge agents by: a filter that knows the drift, a momentum rule.

    python tests/benchmarks/planted_rules.py --data-dir data [--json]

Both hold the coin with the highest score, or cash where all scores are negative, and switch only where
another one is better by a threshold. Their parameters are those that earn most on the training split;
printed is the growth over the benchmark on each split, in bp per day. The filter's score is the expected
drift, given all bars up to the close (`expected_drift`), which no agent can know better: it is about the
limit of what can be earned, at decisions every bar and every 12, 48 and 288 bars. The rule's score is an
exponential average of the log returns, at decisions every bar. Last, the hindsight optimum of the test split.
Where coins may be absent, only those that may be held are chosen, and the benchmark is that of the members.
"""

import argparse
import itertools
import json
import re
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
import getData  # noqa: E402
import portfolio_env  # noqa: E402

HALF_LIVES = (12, 24, 48, 72, 100, 144, 288, 576)  # bars, of the rule
THRESHOLDS = (0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 5.0)  # bp per bar, of the rule
FILTER_THRESHOLDS = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0, 1.3, 1.6, 2.0)  # bp per bar
HOLDS = (1, 12, 48, 288, 864, 2_016)  # bars from one decision of the filter to the next
COST = 0.001
UNSEEN = 1e6  # deviation, in bp per bar, of the noise in the return of a coin that is absent
DRIFT, HALF_LIFE = 3.0, 144.0  # of the planted drift at strength 1: deviation in bp per bar, and bars


def averages(close_prices: np.ndarray, half_life: float) -> np.ndarray:
    """Return exponential averages of the log returns up to each bar [T, N], bp per bar."""
    returns = 1e4 * np.diff(np.log(close_prices), axis=0, prepend=np.log(close_prices[:1]))
    return pd.DataFrame(returns).ewm(halflife=half_life, adjust=False).mean().to_numpy()


def kalman(
    returns: np.ndarray, volatility: np.ndarray, correlation: float, deviation: float, half_life: float
) -> np.ndarray:
    """Return E[m_t | r_1 ... r_t] [T, N] of the drifts m of N coins, given their returns r [T, N].

    The drift of each coin is a stationary AR(1) of its own with the given deviation and half-life in bars,

        m_t = phi m_(t-1) + e_t,    phi = 2^(-1 / half-life),    Var e = q = deviation^2 (1 - phi^2),

    and r_t = m_t + noise with the covariance R_t = D_t C D_t: D_t holds the volatilities [T, N], C is 1 on
    the diagonal and `correlation` beside it. With the prior mean phi m and covariance P' = phi^2 P + q I the
    gain is K = P' (P' + R_t)^-1, the mean phi m + K (r_t - phi m), the covariance P = P' - K P'
    (Kalman, Journal of Basic Engineering 82, 1960). The noise is taken as Gaussian, so this is the best
    linear estimate.
    """
    coins = returns.shape[1]
    phi = 0.5 ** (1 / half_life)
    unit, noise = np.eye(coins), correlation + (1 - correlation) * np.eye(coins)
    mean, covariance = np.zeros(coins), deviation**2 * unit
    means = np.empty_like(returns)
    for t, (observed, deviations) in enumerate(zip(returns, volatility, strict=True)):
        mean, prior = phi * mean, phi**2 * covariance + deviation**2 * (1 - phi**2) * unit
        gain = np.linalg.solve(prior + noise * np.outer(deviations, deviations), prior).T
        mean = mean + gain @ (observed - mean)
        covariance = prior - gain @ prior
        covariance = (covariance + covariance.T) / 2  # correct rounding errors
        means[t] = mean
    return means


def expected_drift(bars: dict[str, pd.DataFrame], strength: float, planted: bool) -> np.ndarray:
    """Return the drift that is to be expected after each bar [T, N], in bp per bar, from what is known then.

    The volatility of a bar is that of the ranges of the bars before it (Parkinson, Journal of Business 53,
    1980; half-life two hours), the correlation of the noise that of the first half of the bars. In planted
    bars the drift is as large as the coin's usual volatility over that of the synthetic coins makes it
    (`getData.planted_log_drift`), and the returns are divided by that.
    """

    def table(name: str) -> np.ndarray:
        return np.stack([frame[name].to_numpy() for frame in bars.values()], axis=1)

    returns = pd.DataFrame(np.log(table("close"))).diff()
    there = returns.notna().to_numpy()  # not at the first bar of a life, either
    returns = returns.fillna(0.0)
    ranges = pd.DataFrame(np.log(table("high") / table("low")) ** 2 / (4 * np.log(2)))
    volatility = np.sqrt(ranges.ewm(halflife=24, adjust=False, ignore_na=True).mean().shift().fillna(1e-6))
    usual = 1.0
    if planted:
        day = getData.BARS_PER_DAY
        squares = (returns**2).where(there)
        variance = squares.ewm(halflife=30 * day, min_periods=day, ignore_na=True).mean().shift()
        variance = variance.ffill().bfill()
        usual = np.sqrt(variance) / getData._SYNTHETIC_NOISE
    standard = (returns / volatility.clip(lower=1e-4)).clip(-5, 5).where(there)[: len(returns) // 2]
    pairs = standard.corr().to_numpy()[~np.eye(len(bars), dtype=bool)]
    correlation = float(np.nanmean(pairs)) if np.isfinite(pairs).any() else 0.0
    scaled, deviations = (np.asarray(1e4 * part / usual) for part in (returns, volatility.clip(lower=1e-5)))
    deviations = np.where(there, deviations, UNSEEN)
    return np.asarray(kalman(scaled, deviations, correlation, DRIFT * strength, HALF_LIFE) * usual)


def choices(score: np.ndarray, threshold: float) -> np.ndarray:
    """Return the asset held after each decision [D] with scores of the coins [D, N]; 0: cash."""
    score = np.concatenate([np.zeros((len(score), 1)), score], axis=1)
    path, held = np.empty(len(score), np.int64), 0
    for row, best in enumerate(score.argmax(1)):
        held = best if score[row, best] - score[row, held] > threshold else held
        path[row] = held
    return path


class Market:
    """Prices, splits, and what a path of assets makes."""

    def __init__(self, data_dir: Path) -> None:
        frame, self.footer = getData.load_prices(data_dir)
        self.prices = portfolio_env.price_arrays(frame, self.footer["symbols"])
        self.members = getData.members_of(frame, self.footer["symbols"])  # None: all coins, always
        self.spans = {
            name: portfolio_env.split_rows(frame.index, self.footer, name, "next_open")
            for name in self.footer["splits"]
        }

    def growth(self, score: np.ndarray, threshold: float, split: str, hold: int = 1) -> float:
        """Return the growth over the benchmark, bp per day, of `choices` that are `hold` bars apart."""
        start, stop = self.spans[split]
        if self.members is not None:
            score = np.where(self.members[: len(score)], score, -np.inf)
        path = np.repeat(choices(score[start:stop:hold], threshold), hold)[: stop - start]
        return self.path_growth(path, split)

    def path_growth(self, path: np.ndarray, split: str) -> float:
        """Return the same of the asset held in each bar [S] of a split.

        A portfolio of one asset needs no account: each sale and each purchase keeps 1 - c of its value.
        """
        start, stop = self.spans[split]
        fills, _, relatives, _ = portfolio_env.align_prices(*self.prices, "next_open")
        gains = np.log(portfolio_env.with_cash(relatives[start:stop]))
        growth = gains[np.arange(len(path)), path].sum()
        before = np.concatenate([[0], path[:-1]])
        sides = ((path != before) & (path > 0)).sum() + ((path != before) & (before > 0)).sum()
        rows = torch.tensor([stop, start])
        benchmark = float(portfolio_env.EqualWeight(fills, self.members)(rows[0], rows[1]).log())
        return 1e4 * (growth + sides * np.log(1 - COST) - benchmark) / (len(path) / getData.BARS_PER_DAY)

    def tuned(self, scores: dict[object, np.ndarray], thresholds: tuple[float, ...], hold: int = 1) -> dict:
        """Return the parameters that earn most on the training split, and the growth on each split."""
        pairs = itertools.product(scores, thresholds)
        grid = {pair: self.growth(scores[pair[0]], pair[1], "train", hold) for pair in pairs}
        name, threshold = max(grid, key=grid.get)
        splits = {split: self.growth(scores[name], threshold, split, hold) for split in self.spans}
        return {"parameters": [name, threshold]} | splits


def strength_of(source: str) -> float:
    """Return the strength of the drift in a market, from the name of its source; 1 where there is none."""
    strength = re.match(r"(?:synthetic:.*signal=|planted:strength=)([\d.]+)", source)
    return float(strength[1]) if strength and float(strength[1]) > 0 else 1.0


def yardsticks(data_dir: Path, holds: tuple[int, ...] = HOLDS) -> dict[str, object]:
    """Return the growth of the filter at each interval, the tuned rule, and the hindsight optimum."""
    market = Market(data_dir)
    source, symbols = market.footer["source"], market.footer["symbols"]
    bars = getData.load_bars(data_dir, symbols, market.footer["max_gap"])
    drift = expected_drift(bars, strength_of(source), source.startswith("planted:"))
    drift = drift[: len(market.prices[0])]
    _, _, relatives, _ = portfolio_env.align_prices(*market.prices, "next_open")
    test = slice(*market.spans["test"])
    relatives = portfolio_env.with_cash(relatives[test])
    if market.members is not None:
        relatives[:, 1:][~market.members[test]] = 0.0  # nobody would hold it
    optimum, _ = portfolio_env.hindsight_path(relatives, COST)
    return {
        "market": source,
        "filter": {hold: market.tuned({HALF_LIFE: drift}, FILTER_THRESHOLDS, hold) for hold in holds},
        "rule": market.tuned({life: averages(market.prices[1], life) for life in HALF_LIVES}, THRESHOLDS),
        "hindsight": market.path_growth(optimum, "test"),
    }


def main() -> None:
    """Tune on the training split, then print all splits."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    parser.add_argument("--json", action="store_true", help="write rules.json into the data folder as well")
    args = parser.parse_args()
    result = yardsticks(args.data_dir)
    if args.json:
        (args.data_dir / "rules.json").write_text(json.dumps(result))
    print(f"{result['market']}: growth over the benchmark, bp/day")
    rows = {f"filter, every {hold} bars": row for hold, row in result["filter"].items()}
    for name, row in (rows | {"momentum rule, every bar": result["rule"]}).items():
        splits = "  ".join(f"{split} {row[split]:+9.1f}" for split in ("train", "validation", "test"))
        half_life, threshold = row["parameters"]
        print(f"{name:24}  {splits}  half-life {half_life:g} bars, threshold {threshold:g} bp per bar")
    print(f"hindsight optimum, test {result['hindsight']:+9.1f}")


if __name__ == "__main__":
    main()
