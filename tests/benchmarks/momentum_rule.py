"""The best simple rule on a planted market, to judge the agent by: time-series momentum with hysteresis.

    python tests/benchmarks/momentum_rule.py --data-dir data

Holds the coin with the largest exponential average of its log returns, or cash where all are negative, and
switches only when another one is better by a threshold. Half-life and threshold are those that earn most on
the training split; then growth over the benchmark on each split, bp per day, and that of the hindsight
optimum on the test split.
"""

import argparse
import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).parents[2]))
import getData  # noqa: E402
import portfolio_env  # noqa: E402

HALF_LIVES = (12, 24, 48, 72, 100, 144, 288, 576)  # bars
THRESHOLDS = (0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 5.0)  # bp per bar
COST = 0.001


def momentum_rule(close_prices: np.ndarray, half_life: float, threshold: float) -> portfolio_env.Policy:
    """The rule as a policy; decision t looks at closes up to row t alone."""
    returns = pd.DataFrame(1e4 * np.diff(np.log(close_prices), axis=0, prepend=np.log(close_prices[:1])))
    average = returns.ewm(halflife=half_life, adjust=False).mean().to_numpy()
    score = np.concatenate([np.zeros((len(average), 1)), average], axis=1)  # [T, A], cash 0
    best, assets = score.argmax(1), np.eye(score.shape[1])
    held = 0

    def decide(t: int, _: np.ndarray) -> np.ndarray | None:
        nonlocal held
        if score[t, best[t]] - score[t, held] <= threshold:
            return None
        held = best[t]
        return assets[held]

    return decide


def tuned_growth(data_dir: Path) -> dict[str, object]:
    """Tune the rule on the training split; return its growth over the benchmark on each split, bp per day.

    Beside the splits: "rule", its half-life and threshold, "market", and "hindsight" on the test split.
    """
    frame, footer = getData.load_prices(data_dir)
    prices = portfolio_env.price_arrays(frame, footer["symbols"])
    spans = {
        name: portfolio_env.split_rows(frame.index, footer, name, "next_open") for name in footer["splits"]
    }

    def growth(policy: portfolio_env.Policy, split: str) -> float:
        result = portfolio_env.backtest(policy, *prices, *spans[split], cost=COST)
        return portfolio_env.metrics(result)["excess_bp_day"]

    grid = {
        pair: growth(momentum_rule(prices[1], *pair), "train")
        for pair in itertools.product(HALF_LIVES, THRESHOLDS)
    }
    best = max(grid, key=grid.get)
    optimum = portfolio_env.hindsight(*prices, *spans["test"], cost=COST, fill="next_open")
    return {split: growth(momentum_rule(prices[1], *best), split) for split in spans} | {
        "rule": best, "market": footer["source"], "hindsight": growth(optimum, "test"),
    }  # fmt: skip


def main() -> None:
    """Tune on the training split, then all splits."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    parser.add_argument("--json", action="store_true", help="write rule.json into the data folder as well")
    args = parser.parse_args()
    found = tuned_growth(args.data_dir)
    if args.json:
        (args.data_dir / "rule.json").write_text(json.dumps(found))
    half_life, threshold = found["rule"]
    print(f"{found['market']}: half-life {half_life} bars, threshold {threshold} bp per bar")
    for split in ("train", "validation", "test"):
        print(f"{split:10} {found[split]:+9.1f} bp/day over the benchmark")
    print(f"hindsight optimum, test {found['hindsight']:+9.1f}")


if __name__ == "__main__":
    main()
