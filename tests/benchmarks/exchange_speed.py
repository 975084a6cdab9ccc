"""How fast getData.py collects, beside a plain ccxt loop: ten symbols x one year from a loopback server.

    python tests/benchmarks/exchange_speed.py [--days 365] [--latency 0.06] [--only collect|loop]

The server runs in a process of its own and answers after the latency; both sides are the unmodified ccxt
binance class with its own rate limiter (getData.py: at 80 % of the limit). getData.py writes the files as
well, the loop keeps the bars in memory, and neither computes features. Both must end with the same bars.
"""

import argparse
import multiprocessing
import re
import resource
import subprocess
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

import ccxt
import pandas as pd

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))
from exchange_server import BAR_MS, ExchangeServer, milliseconds  # noqa: E402

SYMBOLS = tuple(
    f"{coin}USDT" for coin in ("BTC", "ETH", "SOL", "XRP", "ADA", "DOGE", "AVAX", "LINK", "LTC", "TRX")
)
START = "2021-01-01"  # getData.py's own


def serve(pipe: Connection, days: int, latency: float) -> None:
    """The server's process: sends its address, then for each word that it gets the requests since."""
    with ExchangeServer(SYMBOLS, START, days * 288, latency) as server:
        pipe.send(server.url)
        while pipe.recv() != "end":
            pipe.send(server.count())
            server.forget()


def plain_loop(url: str, days: int) -> dict[str, list]:
    """What tutorials show: one symbol after the other, one page after the other."""
    exchange = ccxt.binance({"options": {"fetchMarkets": {"types": ["spot"]}}})
    exchange.urls["api"] = {
        name: re.sub(r"^https?://[^/]+", url, path) for name, path in exchange.urls["api"].items()
    }
    exchange.load_markets()
    stop = milliseconds(START) + days * 288 * BAR_MS
    market = {}
    for symbol in SYMBOLS:
        bars, since = [], milliseconds(START)
        while since < stop:
            bars += exchange.fetch_ohlcv(f"{symbol[:-4]}/USDT", "5m", since, 1000)
            since = bars[-1][0] + BAR_MS
        market[symbol] = [bar for bar in bars if bar[0] < stop]
    return market


def main() -> None:
    """Run both and print seconds, requests and the ratio."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--days", type=int, default=365)
    parser.add_argument("--latency", type=float, default=0.06)
    parser.add_argument("--only", choices=["collect", "loop"])
    args = parser.parse_args()
    pipe, other = multiprocessing.get_context("spawn").Pipe()
    server = multiprocessing.get_context("spawn").Process(target=serve, args=(other, args.days, args.latency))
    server.start()
    url, seconds, market = pipe.recv(), {}, {}
    with tempfile.TemporaryDirectory() as folder:
        if args.only != "loop":
            command = [sys.executable, str(ROOT / "getData.py"), "--base-url", url, "--data-dir", folder]
            command += ["--job", "bars"]
            started = time.perf_counter()
            subprocess.run(command, check=True)
            seconds["getData.py"] = time.perf_counter() - started
            usage = resource.getrusage(resource.RUSAGE_CHILDREN)
            pipe.send("count")
            print(
                f"getData.py: {seconds['getData.py']:.1f} s (CPU {usage.ru_utime + usage.ru_stime:.1f} s), "
                f"{pipe.recv()} pages, imports and files included"
            )
        if args.only != "collect":
            started, busy = time.perf_counter(), time.process_time()
            market = plain_loop(url, args.days)
            seconds["loop"], busy = time.perf_counter() - started, time.process_time() - busy
            pipe.send("count")
            print(f"plain loop: {seconds['loop']:.1f} s (CPU {busy:.1f} s), {pipe.recv()} pages")
        if len(seconds) == 2:
            for symbol, bars in market.items():
                frame = pd.read_parquet(Path(folder) / "ohlcv" / f"{symbol}.parquet")
                frame["timestamp"] = frame["timestamp"].astype("int64")
                assert (frame.to_numpy(float) == pd.DataFrame(bars).to_numpy(float)).all(), symbol
            print(f"ratio: {seconds['loop'] / seconds['getData.py']:.2f}")
    pipe.send("end")
    server.join()


if __name__ == "__main__":
    main()
