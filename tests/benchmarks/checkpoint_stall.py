"""What saving costs a training at full scale: seconds that a save adds to the steps around it.

    python tests/benchmarks/checkpoint_stall.py --scale full      (15 GB of memory, 8 GB of disk on a CPU)
    python tests/benchmarks/checkpoint_stall.py --scale small

Trains the reducer on random windows for STEPS steps three times: without saving, with a save in the
background after the first step (the second time: the host buffers exist by then), and with the same save
waited for.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
import feature_reducer

STEPS = 4
BATCH = 8
DIMS = {"full": (134_980, 3_222, 2_148), "small": (19_040, 456, 304)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--scale", choices=DIMS, default="small")
    dims = DIMS[parser.parse_args().scale]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    reducer = feature_reducer.FeatureReducer(*dims).to(device)
    optimizer = feature_reducer.make_adafactor(reducer, 1e-5)
    scaler = torch.amp.GradScaler(device.type, enabled=device.type == "cuda")
    writer = feature_reducer.CheckpointWriter()
    windows = torch.randn(BATCH, dims[0], device=device)

    def seconds(save: Callable[[], None]) -> float:
        """Of STEPS steps with a save after the first."""
        if device.type == "cuda":
            torch.cuda.synchronize()
        begun = time.perf_counter()
        for step in range(STEPS):
            with feature_reducer.half_precision(device, device.type == "cuda"):
                _, reconstruction = reducer(windows)
            loss = (reconstruction.float() - windows).square().mean()
            feature_reducer.clipped_step(loss, [reducer], [optimizer], scaler, 1.0)
            if step == 0:
                save()
        return time.perf_counter() - begun

    with tempfile.TemporaryDirectory(dir=".") as folder:
        path = Path(folder) / "reducer.pt"

        def content() -> dict:
            return {"reducer": reducer.state_dict(), "optimizer": optimizer.state_dict()}

        seconds(lambda: writer.write_now(path, content()))  # warm up: optimizer state and host buffers
        alone = seconds(lambda: None)
        background = seconds(lambda: writer.write(path, content()))
        writer.wait()
        waited = seconds(lambda: writer.write_now(path, content()))
        size = path.stat().st_size / 1e9
    print(f"device: {device}, checkpoint: {size:.2f} GB, {STEPS} steps alone: {alone:.2f} s")
    print(f"saved in the background: +{background - alone:.2f} s ({background / alone:.2f} x)")
    print(f"saved and waited for:    +{waited - alone:.2f} s ({waited / alone:.2f} x)")


if __name__ == "__main__":
    main()
