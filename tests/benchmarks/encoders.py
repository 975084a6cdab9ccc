"""Does it matter that encoder and policy learn together? Five encoders, the same budget, planted markets.

    python tests/benchmarks/encoders.py [--seeds 0 1 2] [--epochs 5] [--folder /tmp/encoders]

joint: from a random start, with the policy.  joint-pca: the same from feature_reducer.py's, the linear
optimum.  frozen: one that learnt to reconstruct.  pca: the linear optimum.  random: as it starts.
The last three stay as they are while the policy learns. Growth over the benchmark on the test split, bp per
day: one line for each run, then median and range over the seeds.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
VARIANTS = {  # name: (run of feature_reducer.py before, flags of train.py)
    "joint": (None, ("--reducer", "random")),
    "random": (None, ("--reducer", "random", "--no-train-encoder")),
    "frozen": (("--init", "random", "--epochs", "10", "--learning-rate", "0.0003"), ("--no-train-encoder",)),
    "pca": (("--epochs", "0"), ("--no-train-encoder",)),
    "joint-pca": (None, ()),  # the same checkpoint
}


def run(script: str, *flags: str) -> None:
    """Run one of the scripts, quietly; its error ends this."""
    subprocess.run([sys.executable, str(ROOT / script), *flags], check=True, stdout=subprocess.DEVNULL)


def main() -> None:
    """All variants on all seeds."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=5, help="of pretraining; no online batches")
    parser.add_argument(
        "--folder", type=Path, help="where to keep everything (a temporary one that is deleted)"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        results: dict[str, list[float]] = {name: [] for name in VARIANTS}
        for seed in args.seeds:
            data_dir = (args.folder or Path(temporary)) / f"seed-{seed}"
            common = ("--data-dir", str(data_dir), "--seed", str(seed))
            run("getData.py", *common, "--source", "synthetic")
            for name, (reducer, flags) in VARIANTS.items():
                if reducer is not None:
                    run("feature_reducer.py", *common, "--scale", "small", *reducer)
                budget = ("--pretrain-epochs", str(args.epochs), "--batches", "0", "--hold", "12")
                run("train.py", *common, *budget, "--scale", "small", "--run", name, *flags)
                table = json.loads((data_dir / "reports" / name / "metrics.json").read_text())["test"]
                results[name].append(next(iter(table.values()))["excess_bp_day"])
                print(f"seed {seed}  {name:10}{results[name][-1]:+9.1f}", flush=True)
        for name, values in results.items():
            print(
                f"{name:10} median {statistics.median(values):+.1f}, {min(values):+.1f} to {max(values):+.1f}"
            )


if __name__ == "__main__":
    main()
