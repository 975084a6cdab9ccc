"""How often the 95 % interval of the growth over the benchmark covers the truth, on series without any skill.

    python tests/benchmarks/interval_coverage.py [--series 300] [--days 10 22 50 100]

clusters: noise whose volatility wanders, with a half-life of a day.  drift: besides, a mean that reverts to
zero with a half-life of 12 hours, standard deviation 3 bp under 13 bp of noise, as of an agent that bets on
trends that are none. One line for each length in days: the share of series whose interval holds zero.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))
import getData
import portfolio_env

RESAMPLES = 400


def series(days: int, drift: bool, seed: int) -> np.ndarray:
    """Log growth over the benchmark per 5-minute bar [S], of mean 0."""
    rng = np.random.default_rng([seed, days, drift])
    volatility = np.exp(np.repeat(getData.mean_reverting(rng, days * 24, 24), 12) / 2)
    noise = 13e-4 * rng.standard_normal(days * 288) * volatility
    return noise + (3e-4 * getData.mean_reverting(rng, days * 288, 144) if drift else 0.0)


def main() -> None:
    """Both kinds, all lengths."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--series", type=int, default=300)
    parser.add_argument("--days", type=int, nargs="+", default=[10, 22, 50, 100])
    args = parser.parse_args()
    for name, drift in (("clusters", False), ("drift", True)):
        for days in args.days:
            covered = 0
            for seed in range(args.series):
                returns = series(days, drift, seed)
                block = portfolio_env.block_length(returns)
                low, high = portfolio_env.bootstrap_interval(returns, block, resamples=RESAMPLES, seed=seed)
                covered += low <= 0 <= high
            print(
                f"{name:9} {days:4} days  {covered / args.series:.0%} of {args.series} intervals hold zero",
                flush=True,
            )


if __name__ == "__main__":
    main()
