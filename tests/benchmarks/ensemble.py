"""Is the mean of several agents better than each of them? The planted markets of detection_limit.py.

    python tests/benchmarks/ensemble.py --folder /tmp/detection-limit [--signals 1 0.3] [--market-seeds 0 1 2]
        [--seeds 0 1 2] [-- FLAGS OF train.py]

On each market one run of several seeds: growth over the benchmark on the test split in bp per day (95 %
interval) of each seed and of their ensemble, and what the rule of momentum_rule.py makes there, tuned on the
training split. The markets are those of detection_limit.py, if it had the same folder. A run whose report is
there is not run again, one that was stopped goes on.
"""

import argparse
import hashlib
import json
import statistics
from pathlib import Path

from detection_limit import make_market, run


def result_of(folder: Path, signal: float, market_seed: int, seeds: list[int], flags: list[str]) -> dict:
    """Train the seeds on one market unless their report is there; return all figures and the rule's."""
    market = make_market(folder, signal, market_seed)
    name = "-".join(["seeds", *map(str, seeds), hashlib.sha256(" ".join(flags).encode()).hexdigest()[:8]])
    report = market / "reports" / name / "metrics.json"
    if not report.exists():
        fixed = (
            "--scale",
            "small",
            "--reducer",
            "random",
            "--run",
            name,
            "--seeds",
            ",".join(map(str, seeds)),
        )
        begun = (market / "checkpoints" / name).exists()
        run("train.py", "--data-dir", str(market), *fixed, *flags, *["--resume"] * begun)
    rule = json.loads((market / "rule.json").read_text())["test"]
    content = json.loads(report.read_text())
    runs = {name.partition(" (")[0]: row for name, row in content["runs"].items()}  # "(holds all alike)"
    return {"signal": signal, "market": market_seed, "rule": rule, "runs": runs}


def print_table(results: list[dict]) -> None:
    """Print one line per market as Markdown, and how often the ensemble beats the median of its seeds."""
    names = list(results[0]["runs"])
    print(f"\n| signal | market | {' | '.join(names)} | median of the seeds | rule |")
    print("|---" * (len(names) + 4) + "|")
    better = 0
    for row in results:
        found = {name: row["runs"][name]["excess_bp_day"] for name in names}
        median = statistics.median(value for name, value in found.items() if name != "ensemble")
        better += found["ensemble"] > median
        cells = []
        for name in names:
            low, high = (row["runs"][name][f"excess_{end}_bp_day"] for end in ("low", "high"))
            cells.append(f"{found[name]:+.0f} ({low:+.0f} to {high:+.0f})")
        shown = f"{' | '.join(cells)} | {median:+.0f} | {row['rule']:+.0f}"
        print(f"| {row['signal']:g} | {row['market']} | {shown} |")
    print(f"the ensemble is above the median of its seeds on {better} of {len(results)} markets")


def main() -> None:
    """All markets, one after another."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True, help="where markets and agents are kept")
    parser.add_argument("--signals", type=float, nargs="+", default=[1, 0.3, 0.2, 0.15, 0.1, 0])
    parser.add_argument("--market-seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the agents")
    args, flags = parser.parse_known_args()
    args.folder = args.folder.resolve()
    args.folder.mkdir(parents=True, exist_ok=True)
    flags = [flag for flag in flags if flag != "--"]
    results = []
    for signal in args.signals:
        for market_seed in args.market_seeds:
            results.append(result_of(args.folder, signal, market_seed, args.seeds, flags))
            figures = {name: round(row["excess_bp_day"], 1) for name, row in results[-1]["runs"].items()}
            print(signal, market_seed, figures, flush=True)
    print_table(results)


if __name__ == "__main__":
    main()
