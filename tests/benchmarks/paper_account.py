"""A paper account over three days on a loopback exchange whose clock is 300 times as fast, in 15 minutes.

    python tests/benchmarks/paper_account.py --folder FOLDER [--days 3] [--speed 300] [--signal 1]

Makes a synthetic market of three coins in FOLDER, trains an agent on its first part (it decides every hour),
and lets `train.py --job paper` follow that agent on the rest, which the server reveals bar by bar. Meanwhile
the job is killed (SIGKILL) and started again ten times, the exchange is away six times for up to three hours
of its time, and its clock is wrong three times for a while. At the end stands the page of the account, whose
value is compared with one in coins and cash.
"""

import argparse
import json
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from conftest import load  # noqa: E402
from exchange_server import BAR_MS, ExchangeServer  # noqa: E402
from test_paper import Job, assert_honest, value_by_hand  # noqa: E402

import getData  # noqa: E402

SYMBOLS = ("BTCUSDT", "ETHUSDT", "SOLUSDT")
TRAINED = 400  # days that the agent has seen, its test split included
HOLD = 12  # bars


class Rehearsal(Job):
    """The job as a user starts it."""

    def start(self) -> None:
        with open(self.log, "a") as log:
            self.process = subprocess.Popen(self.command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--days", type=float, default=3)
    parser.add_argument("--speed", type=float, default=300)
    parser.add_argument("--signal", type=float, default=1)
    arguments = parser.parse_args()
    market = getData.synthetic_market(list(SYMBOLS), TRAINED + int(arguments.days) + 3, 0, arguments.signal)
    data_dir = arguments.folder / "data"
    if not (data_dir / "checkpoints" / "best.pt").exists():
        (arguments.folder / "bars").mkdir(parents=True)
        for symbol, bars in market.items():
            bars[: TRAINED * 288].to_parquet(arguments.folder / "bars" / f"{symbol}.parquet")
        source = ["--source", str(arguments.folder / "bars"), "--symbols", ",".join(SYMBOLS)]
        training = ["--scale", "small", "--hold", str(HOLD), "--batches", "0", "--run", "rehearsal"]
        for script, *flags in (["getData.py", *source], ["train.py", *training]):
            subprocess.run([sys.executable, ROOT / script, "--data-dir", data_dir, *flags], check=True)

    server = ExchangeServer(SYMBOLS, "2024-01-01", 1)
    for symbol, bars in market.items():
        server.set_bars(symbol, getData.bar_array(getData.validate_bars(symbol, bars)))
    first = int(server.bars[SYMBOLS[0]][TRAINED * 288, 0])
    server.clock = first + 30_000
    with server:
        job = Rehearsal(server, data_dir, "--run", "rehearsal", "--max-late", "299", "--call", "cat")
        try:
            job.wait_for(1)
            events = disturb(server, job, arguments.days, arguments.speed)
            last = first + (server.clock - first) // (HOLD * BAR_MS) * HOLD * BAR_MS
            job.wait(lambda: job.rows()[-1][0] == last)
        finally:
            job.stop()
        rows = job.rows()
        requests = {kind: server.count(kind) for kind in ("bars", "time", "markets")}
        command = [sys.executable, ROOT / "train.py", "--data-dir", data_dir, "--job", "paper", "--report"]
        subprocess.run([*command, "--run", "rehearsal"], check=True)
        report = data_dir / "reports" / "paper-rehearsal" / "metrics.json"
        growth = json.loads(report.read_text())["paper"]["agent (paper)"]["growth"]
        stored = getData.load_bars(data_dir / "paper" / "rehearsal", list(SYMBOLS))
        end = int(getData.last_close(stored).timestamp() * 1000)
        by_hand = np.log(value_by_hand(server, rows, end)[0])
    assert_honest(rows, first, HOLD * BAR_MS, 299)
    assert load(data_dir / "checkpoints" / "best.pt")["hold_bars"] == HOLD
    assert abs(growth - by_hand) < 1e-9, (growth, by_hand)
    late = sorted((row[1] - row[0]) / 1000 for row in rows if row[2])
    called = [row[5] for row in rows if row[4]]
    print(f"\nevents: {events}")
    print(f"decisions: {len(rows)}, of them none: {len(rows) - len(late)}")
    print(f"seconds of the exchange from close to booking: median {np.median(late):.0f}, most {late[-1]:.0f}")
    print(f"calls: {len(called)}, done {called.count('done')}, unknown {called.count('unknown')}")
    print(f"requests: {requests}")
    print(f"log growth: {growth:+.6f}, in coins and cash {by_hand:+.6f}")


def disturb(server: ExchangeServer, job: Job, days: float, speed: float) -> dict[str, int]:
    """Let the clock run for so many days with kills, outages and wrong clocks; return how many of each."""
    chance = random.Random(0)
    events = ["kill"] * 10 + ["outage"] * 6 + ["clock"] * 3
    chance.shuffle(events)
    seconds = days * 86_400 / speed
    moments = sorted(chance.uniform(0, seconds) for _ in events)
    server.run_clock(speed)
    begun = time.monotonic()
    for event, moment in zip(events, moments, strict=True):
        time.sleep(max(0.0, begun + moment - time.monotonic()))
        if event == "kill":
            job.stop()
            job.start()
        elif event == "outage":
            server.fault("503", endpoint="", times=-1)
            time.sleep(chance.uniform(600, 3 * 3600) / speed)
            server.faults = []
        else:
            server.clock_error = chance.choice((-1, 1)) * chance.randint(60, 7200) * 1000
            time.sleep(chance.uniform(600, 3600) / speed)
            server.clock_error = 0
    time.sleep(max(0.0, begun + seconds - time.monotonic()))
    server.run_clock(0)
    return {name: events.count(name) for name in ("kill", "outage", "clock")}


if __name__ == "__main__":
    main()
