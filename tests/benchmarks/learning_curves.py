"""Validation of trainings against windows encoded and against time, in one picture.

    python tests/benchmarks/learning_curves.py PICTURE.png NAME=DATA_DIR [NAME=DATA_DIR ...]

Each folder's last run in runs/trials.csv: pretraining (dashed), then PPO, windows as often as they
were drawn (replicas share theirs), seconds since the run began, from TensorBoard's files.
"""

import json
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def validations(folder: Path, windows: int) -> np.ndarray:
    """Return rows of (windows encoded, time in seconds since 1970, bp per day) [R, 3] of one phase."""
    if not folder.exists():
        return np.empty((0, 3))
    events = EventAccumulator(str(folder)).Reload()
    if "validation_bp_day" not in events.Tags()["scalars"]:
        return np.empty((0, 3))
    rows = events.Scalars("validation_bp_day")
    return np.array([(windows * row.step, row.wall_time, row.value) for row in rows])


def curve(data_dir: Path) -> tuple[np.ndarray, int]:
    """Return (windows encoded, seconds, bp per day) [R, 3] of the last run, and its rows of pretraining."""
    trial = pd.read_csv(data_dir / "runs" / "trials.csv").iloc[-1]
    used = json.loads(trial["constants"])
    epoch = used["PRETRAIN_STEPS"] * used["PRETRAIN_SEGMENTS"] * (used["PRETRAIN_DECISIONS"] + 1)
    folder = data_dir / "runs" / trial["run"]
    first = validations(folder / "pretrain", epoch)
    second = validations(folder, used["NUM_ENVS"] * used["STEPS"])
    second[:, 0] += first[-1, 0] if len(first) else 0
    rows = np.concatenate([first, second])
    rows[:, 1] -= pd.Timestamp(trial["time"]).timestamp()
    return rows, len(first)


def main() -> None:
    """Draw the picture, and print each run's best validation and when it was reached."""
    _, axes = plt.subplots(1, 2, figsize=(11, 4), sharey=True, layout="constrained")
    for argument in sys.argv[2:]:
        name, folder = argument.split("=", 1)
        rows, pretrained = curve(Path(folder))
        best = rows[rows[:, 2].argmax()]
        print(f"{name}: best {best[2]:+.0f} bp/day after {best[0]:,.0f} windows and {best[1]:.0f} s")
        for column, axis in enumerate(axes):
            (line,) = axis.plot(*rows[max(pretrained - 1, 0) :, [column, 2]].T, ".-", label=name)
            axis.plot(*rows[:pretrained, [column, 2]].T, ".--", color=line.get_color())
    for axis, label in zip(axes, ("windows encoded", "seconds since the run began"), strict=True):
        axis.set_xlabel(label)
        axis.axhline(0, color="grey", lw=0.5)
    axes[0].set_ylabel("validation, bp per day over the benchmark")
    axes[0].legend()
    plt.savefig(sys.argv[1], dpi=110)


if __name__ == "__main__":
    main()
