"""How weak a signal does the agent find? Planted markets of falling strength, beside what can be found there.

    python tests/benchmarks/detection_limit.py --folder /tmp/detection-limit [--signals 1 0.3] [--seeds 0 1 2]
        [--days 730] [--workers 2] [-- FLAGS OF train.py]

For each market: growth over the benchmark on the test split in bp per day (95 % interval), its share of what
the filter of planted_rules.py makes there at the same interval between decisions, that of the filter at every
bar and of the momentum rule, the interval that validation chose, and the costs paid. A run whose report is
there, with the same flags, is not run again.
"""

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run(script: str, *flags: str) -> None:
    """Run one of the scripts with one thread, quietly; its error ends this."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / script), *flags]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    if result.returncode:
        sys.exit(f"{' '.join(command)}\n{result.stderr}")


def make_market(folder: Path, days: int, signal: float, seed: int) -> Path:
    """Make one market and tune the rules on it, unless they are there; return its data folder."""
    data_dir = folder / f"signal-{signal:g}-seed-{seed}-days-{days}"
    if not (data_dir / "features" / "prices.parquet").exists():
        source = (
            "--source",
            "synthetic",
            "--signal",
            f"{signal:g}",
            "--seed",
            str(seed),
            "--days",
            str(days),
        )
        run("getData.py", "--data-dir", str(data_dir), *source)
    if not (data_dir / "rules.json").exists():
        run("tests/benchmarks/planted_rules.py", "--data-dir", str(data_dir), "--json")
    return data_dir


def result_of(folder: Path, days: int, signal: float, seed: int, flags: list[str]) -> dict[str, object]:
    """Train one agent unless its report is there; return its figures and those of the rules."""
    market = make_market(folder, days, signal, seed)
    other = hashlib.sha256(" ".join(flags).encode()).hexdigest()[:8]
    data_dir = folder / f"{market.name}-{other}"  # checkpoints of its own
    data_dir.mkdir(exist_ok=True)
    for part in ("ohlcv", "features"):
        if not (data_dir / part).exists():
            (data_dir / part).symlink_to(market / part)
    report = data_dir / "reports" / "agent" / "metrics.json"
    if not report.exists():
        fixed = ("--seed", str(seed), "--scale", "small", "--reducer", "random", "--run", "agent")
        run("train.py", "--data-dir", str(data_dir), *fixed, *flags)
    content = json.loads(report.read_text())
    (best, agent), *_ = content["test"].items()
    rules = json.loads((market / "rules.json").read_text())
    minutes = int(content["decides every"].split()[0])
    return {
        "signal": signal, "seed": seed, "rule": rules["rule"]["test"], "limit": rules["filter"]["1"]["test"],
        "filter": rules["filter"][str(minutes // 5)]["test"],
        "costs": 1e4 * agent["cost_paid"] / agent["days"],
        "decides": content["decides every"].split(" (")[0], **content["skill"][best],
    }  # fmt: skip


def print_table(results: list[dict[str, object]]) -> None:
    """Print one line per run as Markdown, and the medians of the seeds."""
    print(
        "\n| signal | seed | rule | filter, every bar | as often | agent (interval) | share | every | cost |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for row in results:
        low, high = row["excess_low_bp_day"], row["excess_high_bp_day"]
        share = f"{row['excess_bp_day'] / row['filter']:.0%}" if row["signal"] and row["filter"] > 0 else ""
        print(
            f"| {row['signal']:g} | {row['seed']} "
            f"| {row['rule']:+.0f} | {row['limit']:+.0f} | {row['filter']:+.0f} "
            f"| {row['excess_bp_day']:+.0f} ({low:+.0f} to {high:+.0f}) "
            f"| {share} | {row['decides']} | {row['costs']:.1f} |"
        )
    for signal in dict.fromkeys(row["signal"] for row in results):
        group = [row for row in results if row["signal"] == signal]
        names = "excess_bp_day", "filter", "rule"
        agent, best, rule = (statistics.median(row[name] for row in group) for name in names)
        print(f"signal {signal:g}: median {agent:+.0f}, filter as often {best:+.0f}, rule {rule:+.0f}")


def main() -> None:
    """All markets and seeds, a few at a time."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True, help="where markets and agents are kept")
    parser.add_argument("--signals", type=float, nargs="+", default=[1, 0.3, 0.2, 0.15, 0.1, 0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--days", type=int, default=730, help="length of the markets")
    parser.add_argument("--workers", type=int, default=2, help="trainings side by side")
    args, flags = parser.parse_known_args()
    args.folder = args.folder.resolve()
    args.folder.mkdir(parents=True, exist_ok=True)
    markets = [(args.days, signal, seed) for signal in args.signals for seed in args.seeds]
    with ThreadPoolExecutor(args.workers) as pool:
        list(pool.map(lambda market: make_market(args.folder, *market), markets))
        runs = [
            pool.submit(result_of, args.folder, *market, [flag for flag in flags if flag != "--"])
            for market in markets
        ]
        results = []
        for future in runs:
            results.append(future.result())
            print(json.dumps(results[-1]), flush=True)
    print_table(results)


if __name__ == "__main__":
    main()
