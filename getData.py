"""Collect 5-minute bars and compute the 34 indicator channels of every coin at five timeframes.

reads   a folder of recorded bars, or nothing: the synthetic market is computed from its seed
writes  data/ohlcv/SYMBOL.parquet                 raw closed bars, as the source gave them
        data/features/{5m,15m,1h,4h,1d}.parquet   34 channels per coin, indexed by bar CLOSE time
        data/features/prices.parquet              open and close on the 5-minute grid

    python getData.py --source synthetic --seed 0 --days 240 --signal 1.0
    python getData.py --source FOLDER --symbols BTCUSDT,ETHUSDT
    python getData.py --features-only

T bars, N coins, K = 34 channels. Times are UTC; a bar is stored under its OPEN time and used from its CLOSE time on.
"""

import argparse
import errno
import hashlib
import itertools
import json
import math
import os
import re
import signal
import sys
import zlib
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NoReturn

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import ta
from tqdm import tqdm

# files
DATA_DIR = Path("data")  # holds ohlcv/ and features/

# data
SOURCE = "synthetic"  # "synthetic", or a folder with one file of recorded bars per symbol
SYMBOLS = tuple(f"{coin}USDT" for coin in ("BTC", "ETH", "SOL", "XRP", "ADA", "DOGE", "AVAX", "LINK", "LTC", "TRX"))
DAYS = 240  # length of the synthetic market
SIGNAL = 1.0  # strength of the synthetic market's planted drift; 0 = a martingale
REPLACE = False  # may recorded bars of another source in data/ohlcv be replaced?
FEATURES_ONLY = False  # recompute the features from the bars that are there

# splits
SPLITS = (0.70, 0.15, 0.15)  # shares of train, validation, test
PURGE_DAYS = 8  # days dropped at each split's start: 7 daily bars and the unfinished day, the longest look-back

# system
SEED = 0  # of the synthetic market

# What follows describes the file format. It is no setting: a list, a dict or an underscore makes no flag.
TIMEFRAMES = {"5m": 300_000, "15m": 900_000, "1h": 3_600_000, "4h": 14_400_000, "1d": 86_400_000}  # ms
# fmt: off
CHANNELS = [
    "ret", "range", "upwick", "lowick", "relvol",  # the bar itself
    "adx14", "vortex14", "aroonup25", "aroondn25", "ppo", "ppoh", "mass", "dpo20", "ichdiff", "stc",  # trend
    "rsi14", "srsi", "uo", "stoch9", "roc3", "roc12", "roc24",  # momentum
    "atr14", "volratio", "bbkc", "bbp", "ulcer14",  # volatility
    "cmf20", "mfi14", "pvo", "pvoh", "obv14", "eom10", "fi8",  # volume
]
# fmt: on
_SCHEMA = 1
_FEATURES_VERSION = 1  # raise it whenever a channel's numbers change: stored features are then recomputed
_WARM_UP = 30  # rows before every channel's window is full
_FOOTER_KEY = b"trading_pipeline"
_BAR = TIMEFRAMES["5m"]
_DAY = TIMEFRAMES["1d"]
_PRICES = ["open", "high", "low", "close"]
_CLIP = {"ret": 1, "relvol": 8, "vortex14": 2, "ppo": 50, "ppoh": 50, "mass": 0.3, "dpo20": 0.5, "ichdiff": 0.5}
_CLIP |= {"uo": 1, "roc3": 100, "roc12": 100, "roc24": 100, "volratio": 3, "bbkc": 4, "bbp": 3}
_CLIP |= {"cmf20": 1, "pvo": 2, "pvoh": 2, "obv14": 1, "eom10": 1, "fi8": 1}


# ---------------------------------------------------------------------------------------------------------------------
# helpers that all scripts share


class UserError(Exception):
    """A user's mistake: one line that names the next action."""

    code = 1


def parse_flags(constants: dict, argv: list[str] | None) -> dict[str, object]:
    """Read command-line flags, one per UPPERCASE constant of a script.

    Args:
        constants: the script's globals(); int, float, str, bool, tuple and Path values become flags.
        argv: the arguments, or None for those of the process.

    Returns:
        {NAME: value} of the flags that were given, and of no others.
    """
    source = Path(constants["__file__"]).read_text("utf-8") if "__file__" in constants else ""
    comments = dict(re.findall(r"^([A-Z][A-Z0-9_]*)\b[^#\n]*=.*?  # (.+)$", source, re.M))
    parser = argparse.ArgumentParser(
        prog=Path(constants.get("__file__", "script")).name,
        description=(constants.get("__doc__") or "").replace("%", "%%"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    for name, default in constants.items():
        if not re.fullmatch("[A-Z][A-Z0-9_]*", name) or not isinstance(default, (bool, int, float, str, tuple, Path)):
            continue
        shown = ",".join(map(str, default)) if isinstance(default, tuple) else default
        options = {"dest": name, "help": f"{comments.get(name, '')} (default: {shown})".strip().replace("%", "%%")}
        if isinstance(default, bool):
            options["action"] = argparse.BooleanOptionalAction
        else:
            kind = "path" if isinstance(default, Path) else type(default).__name__
            options |= {"type": _flag_type(default), "metavar": kind.upper()}
        parser.add_argument("--" + name.lower().replace("_", "-"), **options)
    return vars(parser.parse_args(argv))


def _flag_type(default: object) -> Callable[[str], object]:
    """Return what turns a flag's text into the type of the constant's default."""
    if isinstance(default, tuple):
        element = _flag_type(default[0] if default else "")

        def convert(text: str) -> tuple:
            return tuple(element(part.strip()) for part in text.split(","))
    elif isinstance(default, (int, float)):

        def convert(text: str) -> float:
            value = type(default)(text)
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError
            return value
    else:
        return Path if isinstance(default, Path) else str
    convert.__name__ = type(default).__name__  # for argparse's "invalid float value"
    return convert


def run_script(main: Callable[[], int]) -> NoReturn:
    """Run main and exit with what it returns; a user's mistake or an interrupt ends in one line, not in a traceback."""
    try:
        sys.exit(main())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.code)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS):
            raise
        place = f" ({error.filename})" if error.filename else ""
        print(f"error: {os.strerror(error.errno)}{place}: files written before are intact", file=sys.stderr)
        sys.exit(1)


def write_parquet(path: Path, frame: pd.DataFrame, footer: dict) -> None:
    """Write frame and footer in one atomic step: a crash leaves the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pandas(frame)
    table = table.replace_schema_metadata({**table.schema.metadata, _FOOTER_KEY: json.dumps(footer).encode()})
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            pq.write_table(table, file, compression="zstd", use_dictionary=False)  # hardly any value repeats
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_footer(path: Path) -> dict:
    """Return the footer that write_parquet stored."""
    try:
        metadata = pq.read_schema(path).metadata or {}
    except pa.ArrowInvalid as error:
        raise UserError(f"{path} is not a readable parquet file: delete it and run python getData.py") from error
    if _FOOTER_KEY not in metadata:
        raise UserError(f"{path} was not written by getData.py: move it away and run python getData.py")
    return json.loads(metadata[_FOOTER_KEY])


def load_features(data_dir: Path) -> tuple[dict[str, pd.DataFrame], dict]:
    """Load the features: timeframe -> [T, N*K] float32 by bar CLOSE time (columns SYMBOL.channel), and the footer.

    Rows before the youngest coin's warm-up hold NaN for that coin; everything later is finite.

    Raises:
        UserError: files are missing, of different runs, or older than the bars.
    """
    footer = _check_features(data_dir)
    return {name: pd.read_parquet(data_dir / "features" / f"{name}.parquet") for name in footer["timeframes"]}, footer


def load_prices(data_dir: Path) -> tuple[pd.DataFrame, dict]:
    """Load SYMBOL.open and SYMBOL.close, float64, on the index of the 5m features; errors as load_features."""
    footer = _check_features(data_dir)
    return pd.read_parquet(data_dir / "features" / "prices.parquet"), footer


def _check_features(data_dir: Path) -> dict:
    paths = [data_dir / "features" / f"{name}.parquet" for name in [*TIMEFRAMES, "prices"]]
    if missing := [path.name for path in paths if not path.exists()]:
        raise UserError(f"no {missing[0]} in {paths[0].parent}: run python getData.py --data-dir {data_dir}")
    footers = [read_footer(path) for path in paths]
    again = f"run python getData.py --features-only --data-dir {data_dir}"
    if any(footer != footers[0] for footer in footers):
        raise UserError(f"the files in {paths[0].parent} are of different runs: {again}")
    for symbol, values_sha256 in footers[0]["inputs"].items():
        bars = data_dir / "ohlcv" / f"{symbol}.parquet"
        # Features alone are a complete input (copied to another machine, say): without bars nothing can be stale.
        if bars.exists() and read_footer(bars)["values_sha256"] != values_sha256:
            raise UserError(f"features are older than the bars ({symbol}): {again}")
    return footers[0]


def ensure_data(data_dir: Path, seed: int) -> None:
    """Make the synthetic market and its features if data_dir has neither bars nor features; else do nothing."""
    if any(any((data_dir / folder).glob("*.parquet")) for folder in ("ohlcv", "features")):
        return
    print(f"*** NO DATA in {data_dir}: making the SYNTHETIC market (seed {seed}). Profits on it are not real. ***")
    main(["--source", "synthetic", "--data-dir", str(data_dir), "--seed", str(seed), "--no-features-only"])


# ---------------------------------------------------------------------------------------------------------------------
# bars: validation, store, loading


def symbol_name(text: str) -> str:
    """Return the plain symbol: BTC/USDT, btc-usdt and BTC_USDT-5m are all BTCUSDT."""
    return re.sub(r"[^A-Z0-9]", "", re.sub(r"[-_]5M$", "", text.upper()))


def to_milliseconds(symbol: str, times: pd.Series) -> np.ndarray:
    """Return times as int64 milliseconds since 1970; takes ms integers, datetimes, ISO strings (naive = UTC)."""
    if pd.api.types.is_numeric_dtype(times):
        values = times.to_numpy(dtype="float64", na_value=np.nan)
        wrong = ~((values > 1e11) & (values < 1e14))  # 1973 to 5138: seconds and microseconds lie outside
    else:
        parsed = pd.to_datetime(times, utc=True, errors="coerce", format="ISO8601")
        wrong = parsed.isna().to_numpy()
        values = parsed.dt.as_unit("ms").astype("int64").to_numpy()
    if wrong.any():
        row = int(wrong.argmax())
        raise UserError(
            f"{symbol}: bar {row} ({times.iloc[row]}): timestamp is neither milliseconds nor ISO: repair it"
        )
    return values.astype("int64")


def validate_bars(symbol: str, raw: pd.DataFrame) -> pd.DataFrame:
    """Return raw bars as [timestamp, open, high, low, close, volume], or refuse the first bar that breaks a rule.

    Raises:
        UserError: names the symbol, the bar and the rule. Nothing is repaired or dropped silently.
    """
    if missing := [name for name in ["timestamp", *_PRICES, "volume"] if name not in raw]:
        raise UserError(f"{symbol}: no column {missing[0]!r} among {', '.join(map(str, raw.columns))}: rename it")
    if raw.empty:
        raise UserError(f"{symbol}: no bars: give a file with bars or leave the symbol out")
    times = to_milliseconds(symbol, raw["timestamp"])
    bars = raw[[*_PRICES, "volume"]].apply(pd.to_numeric, errors="coerce").astype("float64").reset_index(drop=True)
    values, prices = bars.to_numpy(), bars[_PRICES].to_numpy()
    step = np.diff(times, prepend=times[0] - _BAR)
    rules = {
        "unsorted": step < 0,
        "duplicate": step == 0,
        "off the 5-minute grid": times % _BAR != 0,
        "non-finite": ~np.isfinite(values).all(axis=1),
        "price <= 0": (prices <= 0).any(axis=1),
        "volume < 0": bars["volume"].to_numpy() < 0,
        "high/low inconsistent": (prices.max(axis=1) > prices[:, 1]) | (prices.min(axis=1) < prices[:, 2]),
    }
    for rule, broken in rules.items():
        if broken.any():
            row = int(broken.argmax())
            when = pd.Timestamp(times[row], unit="ms").isoformat()
            raise UserError(f"{symbol}: bar {row} ({when}): {rule}: repair the bar or remove it")
    bars.insert(0, "timestamp", pd.to_datetime(times, unit="ms", utc=True).as_unit("ms"))
    return bars


def values_sha256(bars: pd.DataFrame) -> str:
    """Return the hash of times and values alone: independent of file encoding and library versions."""
    digest = hashlib.sha256(bars["timestamp"].astype("int64").to_numpy().tobytes())
    digest.update(bars[[*_PRICES, "volume"]].to_numpy(dtype="float64").tobytes())
    return digest.hexdigest()


def store_bars(data_dir: Path, symbol: str, bars: pd.DataFrame, source: str, extra: dict | None = None) -> dict:
    """Write validated bars with their footer (extra is merged into it), unless the very same are stored already."""
    times = bars["timestamp"].astype("int64").to_numpy()
    step = np.diff(times)
    footer = {
        "schema": _SCHEMA,
        "source": source,
        "timeframe": "5m",
        "first": int(times[0]),
        "last": int(times[-1]),
        "rows": len(times),
        "gaps": [[int(times[i] + _BAR), int(step[i] // _BAR - 1)] for i in np.flatnonzero(step > _BAR)],
        "listed_from": int(times[0]),
        "values_sha256": values_sha256(bars),
    } | (extra or {})
    path = data_dir / "ohlcv" / f"{symbol}.parquet"
    if not path.exists() or read_footer(path) != footer:
        write_parquet(path, bars, footer)
    return footer


def fill_gaps(bars: pd.DataFrame, grid: pd.DatetimeIndex) -> pd.DataFrame:
    """Put one coin's bars (by open time) on the grid, causally.

    A missing bar becomes open=high=low=close=previous close, volume 0, filled=True. Rows before the first real bar and
    after the last one stay NaN with filled=False.
    """
    inside = (grid >= bars.index[0]) & (grid <= bars.index[-1])
    bars = bars.reindex(grid)
    missing = inside & bars["close"].isna().to_numpy()
    previous_close = bars["close"].ffill()
    for name in _PRICES:
        bars[name] = bars[name].where(~missing, previous_close)
    bars["volume"] = bars["volume"].where(~missing, 0.0)
    return bars.assign(filled=missing)


def load_bars(data_dir: Path, symbols: list[str]) -> dict[str, pd.DataFrame]:
    """Load stored bars of all symbols on one 5-minute UTC grid, indexed by OPEN time; gaps as in fill_gaps."""
    stored = sorted(path.stem for path in (data_dir / "ohlcv").glob("*.parquet"))
    if unknown := [symbol for symbol in symbols if symbol not in stored]:
        have = f"--symbols {','.join(stored)}" if stored else "python getData.py --source synthetic"
        raise UserError(f"no bars of {unknown[0]} in {data_dir / 'ohlcv'}: collect them, or use {have}")
    raw = {symbol: pd.read_parquet(data_dir / "ohlcv" / f"{symbol}.parquet") for symbol in symbols}
    raw = {symbol: bars.set_index("timestamp") for symbol, bars in raw.items()}
    first, last = min(bars.index[0] for bars in raw.values()), max(bars.index[-1] for bars in raw.values())
    grid = pd.date_range(first, last, freq="5min", unit="ms")
    return {symbol: fill_gaps(bars, grid) for symbol, bars in raw.items()}


# ---------------------------------------------------------------------------------------------------------------------
# sources: each returns raw bars per symbol, which then go through validate_bars and store_bars


def mean_reverting(rng: np.random.Generator, bars: int, half_life: float) -> np.ndarray:
    """Return a stationary Gaussian AR(1) of unit variance whose memory halves every half_life bars."""
    decay = 0.5 ** (1 / half_life)
    shocks = rng.standard_normal(bars)
    shocks[1:] *= math.sqrt((1 + decay) / (1 - decay))
    return pd.Series(shocks).ewm(alpha=1 - decay, adjust=False).mean().to_numpy()


def fat_tailed(rng: np.random.Generator, bars: int) -> np.ndarray:
    """Return Student-t noise (5 degrees of freedom) of unit variance."""
    return rng.standard_t(5, bars) / math.sqrt(5 / 3)


def synthetic_market(symbols: list[str], days: int, seed: int, signal: float) -> dict[str, pd.DataFrame]:
    """Make a market from 2024-01-01 on: noise of about 13 bp per bar plus, times signal, a planted drift.

    The drift of each coin has a standard deviation of 3 bp per bar and a half-life of 12 h; only past bars show it. All
    else is independent of the future, so with signal = 0 opens and closes together are a martingale. A coin's bars
    depend on seed and on its own name: they are the same whatever other coins there are.
    """
    n = days * _DAY // _BAR
    times = pd.Timestamp("2024-01-01", tz="UTC").value // 1_000_000 + _BAR * np.arange(n)
    season = np.exp(0.35 * np.cos(2 * np.pi * (times % _DAY / _DAY - 15 / 24)))  # busiest at 15:00 UTC
    season /= math.sqrt(np.mean(season**2))
    shared = np.random.default_rng(seed)
    shared_shock, shared_activity = fat_tailed(shared, n), mean_reverting(shared, n, half_life=576)
    market = {}
    for symbol in symbols:
        rng = np.random.default_rng([seed, zlib.crc32(symbol.encode())])
        activity = 0.35 * shared_activity + 0.20 * mean_reverting(rng, n, half_life=144)  # log volatility
        volatility = 13e-4 * rng.uniform(0.85, 1.15) * season * np.exp(activity - 0.35**2 - 0.20**2)  # mean square kept
        shock = np.clip(0.7 * shared_shock + math.sqrt(1 - 0.7**2) * fat_tailed(rng, n), -15, 15)
        drift = 3e-4 * signal * mean_reverting(rng, n, half_life=144)
        body = np.log1p(np.maximum(drift + volatility * shock, -0.9))  # close to open; simple returns are symmetric
        gap = np.log1p(0.02 * volatility * rng.standard_normal(n))  # open to the close before
        log_close = math.log(10 ** rng.uniform(-1, 4)) + np.cumsum(body + gap)
        # The extremes of a Brownian bridge between open and close.
        reach = [np.sqrt(body**2 - 2 * volatility**2 * np.log1p(-rng.random(n))) for _ in range(2)]
        bars = pd.DataFrame({"timestamp": times, "open": np.exp(log_close - body)})
        bars["high"] = np.exp(log_close + (reach[0] - body) / 2)
        bars["low"] = np.exp(log_close - (reach[1] + body) / 2)
        bars["close"] = np.exp(log_close)
        bars["high"] = bars[_PRICES].max(axis=1)  # rounding of the last bit
        bars["low"] = bars[_PRICES].min(axis=1)
        turnover = activity + np.log(season) + 0.3 * np.abs(shock) + 0.4 * mean_reverting(rng, n, half_life=12)
        bars["volume"] = 1e6 * np.exp(turnover + 0.3 * rng.standard_normal(n)) / bars["close"]
        market[symbol] = bars
    return market


def read_recorded(path: Path) -> pd.DataFrame:
    """Read one file of recorded bars; its time column (timestamp, date, time, ...) is renamed timestamp."""
    readers = {".parquet": pd.read_parquet, ".feather": pd.read_feather, ".csv": pd.read_csv}
    try:
        if path.suffix == ".json":  # freqtrade: [[ms, open, high, low, close, volume], ...]
            return pd.DataFrame(json.loads(path.read_text()), columns=["timestamp", *_PRICES, "volume"])
        frame = readers[path.suffix](path)
    except ValueError as error:  # the parsers' own errors are all kinds of ValueError
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{path} cannot be read as {path.suffix[1:]} ({reason}): replace the file") from error
    if isinstance(frame.index, pd.DatetimeIndex):
        frame = frame.rename_axis("timestamp").reset_index()
    frame.columns = [str(name).strip().lower() for name in frame.columns]
    aliases = ("timestamp", "date", "datetime", "time", "open_time", "open time")
    return frame.rename(columns={next((name for name in aliases if name in frame), "timestamp"): "timestamp"})


def recorded_bars(folder: Path, symbols: list[str]) -> dict[str, pd.DataFrame]:
    """Read the files of the symbols from a folder: BTCUSDT.parquet, BTC_USDT-5m.feather, BTC-USDT.csv, ...

    Raises:
        UserError: no such folder, no files, a symbol without a file or with several.
    """
    if not folder.is_dir():
        raise UserError(f"no folder {folder}: --source takes synthetic or a folder of recorded bars")
    paths: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix in (".parquet", ".feather", ".csv", ".json"):
            paths.setdefault(symbol_name(path.stem), []).append(path)
    if not paths:
        raise UserError(f"no parquet, feather, csv or json files in {folder}: name one per symbol, as BTCUSDT.parquet")
    for symbol in symbols:
        if symbol not in paths:
            raise UserError(f"no file of {symbol} in {folder}: use --symbols with some of {','.join(paths)}")
        if len(paths[symbol]) > 1:
            names = ", ".join(path.name for path in paths[symbol])
            raise UserError(f"{symbol} has several files in {folder} ({names}): keep one")
    return {symbol: read_recorded(paths[symbol][0]) for symbol in tqdm(symbols, "reading", disable=None)}


# ---------------------------------------------------------------------------------------------------------------------
# features


def resample(bars: pd.DataFrame, milliseconds: int) -> pd.DataFrame:
    """Merge gapless 5-minute bars (by OPEN time) into completed longer bars, indexed by CLOSE time."""
    groups = bars.resample(f"{milliseconds // 60_000}min", closed="left", label="right")
    merged = groups.agg({"open": "first", "high": "max", "low": "min", "close": "last", "volume": "sum"})
    return merged[
        (groups["close"].count() == milliseconds // _BAR).to_numpy()
    ]  # a bar cut off at either end is dropped


def wilder(values: np.ndarray, window: int) -> np.ndarray:
    """Return Wilder's average: the mean of the first window values, then 1/window of each new one."""
    seeded = np.concatenate([[values[:window].mean()], values[window:]])
    average = pd.Series(seeded).ewm(alpha=1 / window, adjust=False).mean()
    return np.concatenate([np.full(window - 1, np.nan), average])


def trailing(values: np.ndarray, window: int, function: Callable[..., np.ndarray]) -> np.ndarray:
    """Apply function(windows [T, window], axis=1) to every trailing window; NaN before the first full one."""
    windows = np.lib.stride_tricks.sliding_window_view(values, window)
    return np.concatenate([np.full(window - 1, np.nan), function(windows, axis=1)])


def compute_channels(bars: pd.DataFrame) -> pd.DataFrame:
    """Compute the 34 channels of one coin at one timeframe.

    Args:
        bars: open, high, low, close, volume of consecutive bars without gaps, oldest first.

    Returns:
        [T, 34] float64 on the index of bars. The first 30 rows are NaN, all later ones finite; row t depends on rows up
        to t alone. Every channel is free of the coin's price and volume scale.
    """
    if len(bars) <= _WARM_UP:
        return pd.DataFrame(np.nan, index=bars.index, columns=CHANNELS)
    # A RangeIndex and fillna=False throughout: with anything else ta is wrong or sees the future.
    open_, high, low, close, volume = (
        bars[name].astype("float64").reset_index(drop=True) for name in [*_PRICES, "volume"]
    )
    with np.errstate(all="ignore"):  # 0/0 on flat prices and zero volume is set to neutral below
        channels = _raw_channels(open_, high, low, close, volume)
    # Oscillators remember, or divide rounding errors, where nothing moves: there they are neutral.
    still = {window: (high.rolling(window).max() == low.rolling(window).min()).to_numpy() for window in (7, 14)}
    idle = {window: (volume.rolling(window).max() == 0).to_numpy() for window in (14, 20)}
    oscillators = ("rsi14", "srsi", "stc", "mass", "adx14", "vortex14", "aroonup25", "aroondn25")
    neutral = dict.fromkeys(oscillators, still[14])
    neutral |= {"uo": still[7], "cmf20": idle[20], "mfi14": idle[14], "obv14": idle[14]}
    result = np.empty((len(bars), len(CHANNELS)))
    for column, name in enumerate(CHANNELS):
        values = np.asarray(channels[name], dtype="float64")
        usable = np.isfinite(values) & ~neutral.get(name, False)
        result[:, column] = np.clip(np.where(usable, values, 0.0), -_CLIP.get(name, np.inf), _CLIP.get(name, np.inf))
    result[:_WARM_UP] = np.nan
    return pd.DataFrame(result, index=bars.index, columns=CHANNELS)


def _raw_channels(
    open_: pd.Series, high: pd.Series, low: pd.Series, close: pd.Series, volume: pd.Series
) -> dict[str, pd.Series | np.ndarray]:
    """Return the channels before clipping, with NaN and inf where they are undefined."""

    def log(share: pd.Series | np.ndarray) -> pd.Series | np.ndarray:
        return np.log(np.maximum(share, 0) + 1e-4)  # floor of 1 bp

    spread = high - low
    usual_volume = volume.rolling(20).median()
    relative_volume = (volume / usual_volume).where(usual_volume > 0, 1.0).where(usual_volume.notna()).clip(0.05, 20)
    log_high, log_low, log_close = np.log(high), np.log(low), np.log(close)
    ppo = ta.momentum.PercentagePriceOscillator(close, 21, 9, 7)
    pvo = ta.momentum.PercentageVolumeOscillator(volume, 21, 9, 7)
    ichimoku = ta.trend.IchimokuIndicator(high, low, 9, 26, 52)
    bollinger, keltner = ta.volatility.BollingerBands(close, 20), ta.volatility.KeltnerChannel(high, low, close, 20)
    keltner5 = ta.volatility.KeltnerChannel(high, low, close, 5)
    # ta adds the volume of an unchanged close.
    balance = ta.volume.OnBalanceVolumeIndicator(close, volume.where(close.diff() != 0, 0.0)).on_balance_volume()
    # Ease is a return times a range: its signed root is comparable at all timeframes. ta multiplies by 1e8.
    ease = ta.volume.EaseOfMovementIndicator(log_high, log_low, relative_volume, 10).sma_ease_of_movement() / 1e8

    # ta's own ADX, Aroon, ATR, Ulcer and MFI loop over bars in Python, nearly all of the time: same numbers.
    h, low_, c, v = high.to_numpy(), low.to_numpy(), close.to_numpy(), volume.to_numpy()
    true_range = np.maximum(h[1:], c[:-1]) - np.minimum(low_[1:], c[:-1])
    rise, fall = np.diff(h), -np.diff(low_)
    up = wilder(np.where((rise > fall) & (rise > 0), rise, 0.0), 14) / wilder(true_range, 14)
    down = wilder(np.where((fall > rise) & (fall > 0), fall, 0.0), 14) / wilder(true_range, 14)
    directional = np.nan_to_num(np.abs(up - down) / (up + down))[13:]
    drawdown = c / pd.Series(c).rolling(14, min_periods=1).max().to_numpy() - 1
    typical = (h + low_ + c) / 3
    flow = np.append(0.0, np.sign(np.diff(typical))) * typical * v
    inflow, outflow = trailing(np.maximum(flow, 0), 14, np.sum), trailing(np.maximum(-flow, 0), 14, np.sum)

    return {
        "ret": log_close.diff(),
        "range": log(spread / close),
        "upwick": (high - np.maximum(open_, close)) / spread,
        "lowick": (np.minimum(open_, close) - low) / spread,
        "relvol": np.log((volume + 1e-12) / (usual_volume + 1e-12)),
        "adx14": np.concatenate([np.full(14, np.nan), wilder(directional, 14)]) * 2 - 1,
        "vortex14": ta.trend.VortexIndicator(high, low, close, 14).vortex_indicator_diff(),
        "aroonup25": trailing(h, 26, np.argmax) / 25 * 2 - 1,
        "aroondn25": trailing(low_, 26, np.argmin) / 25 * 2 - 1,
        "ppo": ppo.ppo(),
        "ppoh": ppo.ppo_hist(),
        "mass": ta.trend.MassIndex(high, low, 7, 15).mass_index() / 15 - 1,
        "dpo20": ta.trend.DPOIndicator(close, 20).dpo() / close,
        "ichdiff": (ichimoku.ichimoku_conversion_line() - ichimoku.ichimoku_base_line()) / close,
        "stc": ta.trend.STCIndicator(close, 18, 8, 5, 2, 2).stc() / 50 - 1,
        "rsi14": ta.momentum.RSIIndicator(close, 14).rsi() / 50 - 1,
        "srsi": ta.momentum.StochRSIIndicator(close, 14, 3, 3).stochrsi() * 2 - 1,
        "uo": ta.momentum.UltimateOscillator(high, low, close, 7, 14, 28).ultimate_oscillator() / 50 - 1,
        "stoch9": ta.momentum.StochasticOscillator(high, low, close, 9, 3).stoch() / 50 - 1,
        "roc3": ta.momentum.ROCIndicator(close, 3).roc(),
        "roc12": ta.momentum.ROCIndicator(close, 12).roc(),
        "roc24": ta.momentum.ROCIndicator(close, 24).roc(),
        "atr14": log(wilder(np.append(h[0] - low_[0], true_range), 14) / c),
        "volratio": log(keltner5.keltner_channel_wband() / 400) - log(keltner.keltner_channel_wband() / 400),
        "bbkc": log(bollinger.bollinger_wband() / 100) - log(keltner.keltner_channel_wband() / 100),
        "bbp": bollinger.bollinger_pband() * 2 - 1,
        "ulcer14": log(np.sqrt(trailing(drawdown**2, 14, np.mean))),
        "cmf20": ta.volume.ChaikinMoneyFlowIndicator(high, low, close, volume, 20).chaikin_money_flow(),
        "mfi14": 2 * inflow / (inflow + outflow) - 1,
        "pvo": pvo.pvo() / 100,
        "pvoh": pvo.pvo_hist() / 100,
        "obv14": balance.diff(14) / volume.rolling(14).sum(),
        "eom10": np.sign(ease) * np.sqrt(ease.abs()),
        "fi8": ta.volume.ForceIndexIndicator(log_close, relative_volume, 8).force_index(),
    }


def last_common_close(bars: dict[str, pd.DataFrame]) -> pd.Timestamp:
    """Return the close time of the last bar that every coin has."""
    return min(frame["close"].last_valid_index() for frame in bars.values()) + pd.Timedelta(_BAR, "ms")


def coin_features(bars: pd.DataFrame, first_open: pd.Timestamp, last_close: pd.Timestamp) -> dict[str, pd.DataFrame]:
    """Compute one coin's channels at every timeframe, on the rows that all coins share: timeframe -> [T, K] float32."""
    listed = bars.loc[bars["close"].first_valid_index() : last_close - pd.Timedelta(_BAR, "ms")]
    features = {}
    for name, period in TIMEFRAMES.items():
        step = pd.Timedelta(period, "ms")
        times = pd.date_range(first_open.ceil(step) + step, last_close.floor(step), freq=step, unit="ms")
        features[name] = compute_channels(resample(listed, period)).astype(np.float32).reindex(times)
    return features


def compute_features(bars: dict[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    """Compute every coin's channels at every timeframe, one process per core.

    Args:
        bars: what load_bars returns.

    Returns:
        timeframe -> [T, N*K] float32 by CLOSE time up to the last common bar, columns SYMBOL.channel; NaN before a
        coin's listing and warm-up.
    """
    limits = next(iter(bars.values())).index[0], last_common_close(bars)
    workers = min(len(bars), os.cpu_count() or 1)
    # An interrupt is the parent's to handle.
    with ProcessPoolExecutor(workers, initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN)) as pool:
        parts = pool.map(coin_features, bars.values(), *(itertools.repeat(limit) for limit in limits))
        coins = dict(zip(bars, tqdm(parts, "features", len(bars), disable=None), strict=True))
    return {
        name: pd.concat([coins[symbol][name].add_prefix(f"{symbol}.") for symbol in bars], axis=1).rename_axis(
            "close_time"
        )
        for name in TIMEFRAMES
    }


def price_table(bars: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """Return SYMBOL.open and SYMBOL.close of every 5-minute bar by CLOSE time, float64, up to the last common bar."""
    table = {f"{symbol}.{name}": frame[name] for symbol, frame in bars.items() for name in ("open", "close")}
    prices = pd.DataFrame(table)
    prices.index = (prices.index + pd.Timedelta(_BAR, "ms")).rename("close_time")
    return prices[: last_common_close(bars)]


def split_times(bars: dict[str, pd.DataFrame], shares: tuple[float, ...], purge_days: int) -> dict[str, list[int]]:
    """Cut the usable decision times into train, validation and test: name -> [first, end) in ms.

    Usable is from the close at which the youngest coin's daily channels are finite, plus the purge, to the last common
    bar. The purge is also taken off the start of validation and test.

    Raises:
        UserError: a split would be shorter than a day.
    """
    listed = {symbol: frame["close"].first_valid_index() for symbol, frame in bars.items()}
    youngest = max(listed, key=listed.get)
    end = last_common_close(bars)
    warm = listed[youngest].ceil("1D") + pd.Timedelta(days=_WARM_UP + 1 + purge_days)
    needed = warm + pd.Timedelta(days=math.ceil((purge_days + 1) / min(shares))) - listed[youngest]
    if end - listed[youngest] < needed:
        found = (end - listed[youngest]) / pd.Timedelta(days=1)
        raise UserError(
            f"too little history: {needed.ceil('1D').days} days needed, {found:.1f} found ({youngest} has the fewest):"
            " collect more days, or leave that symbol out"
        )
    starts = [warm + (end - warm) * share for share in (0.0, shares[0], shares[0] + shares[1])]
    first, second, third = (int(start.timestamp() * 1000) // _BAR * _BAR for start in starts)
    # The decision at the very close of the last bar is the last one, so the end is one bar later.
    stop, purge = int(end.timestamp() * 1000) + _BAR, purge_days * _DAY
    return {"train": [first, second], "validation": [second + purge, third], "test": [third + purge, stop]}


# ---------------------------------------------------------------------------------------------------------------------
# the script's own steps


def check_constants() -> list[str]:
    """Refuse constants that make no sense, and return the symbols in plain spelling."""
    symbols = [symbol_name(text) for text in SYMBOLS]
    wrong = {
        "SYMBOLS must name at least one coin, each once": not all(symbols) or len(set(symbols)) < max(1, len(symbols)),
        "DAYS must be at least 1": DAYS < 1,
        "SIGNAL must not be negative": SIGNAL < 0,
        "SEED must not be negative": SEED < 0,
        "PURGE_DAYS must not be negative": PURGE_DAYS < 0,
        "SPLITS must be three positive shares of sum 1": len(SPLITS) != 3
        or min(SPLITS) <= 0
        or abs(sum(SPLITS) - 1) > 1e-9,
    }
    for message, is_wrong in wrong.items():
        if is_wrong:
            raise UserError(f"{message}: change it in getData.py or by its flag")
    return symbols


def collect_bars(symbols: list[str]) -> None:
    """Fetch all symbols from SOURCE, validate them all, and only then store them; bars of other sources leave."""
    synthetic = SOURCE == "synthetic"
    source = f"synthetic:seed={SEED}:signal={float(SIGNAL)}" if synthetic else f"recorded:{Path(SOURCE).resolve()}"
    folder = DATA_DIR / "ohlcv"
    stored = {path.stem: read_footer(path)["source"] for path in sorted(folder.glob("*.parquet"))}
    foreign = {symbol: label for symbol, label in stored.items() if label != source}
    precious = [label for label in foreign.values() if not label.startswith("synthetic:")]
    if precious and not REPLACE:
        raise UserError(f"{folder} holds bars of {precious[0]}: use another --data-dir, or --replace to give them up")
    market = synthetic_market(symbols, DAYS, SEED, SIGNAL) if synthetic else recorded_bars(Path(SOURCE), symbols)
    market = {symbol: validate_bars(symbol, raw) for symbol, raw in market.items()}
    for symbol, bars in market.items():
        footer = store_bars(DATA_DIR, symbol, bars, source)
        span = " - ".join(f"{bars['timestamp'].iloc[row]:%Y-%m-%d %H:%M}" for row in (0, -1))
        missing = sum(count for _, count in footer["gaps"])
        print(f"{symbol:<10} {footer['rows']:>9,} bars  {span}  {missing} missing")
    for symbol, label in foreign.items():
        print(f"{symbol}: bars of {label} {'replaced' if symbol in market else 'removed'}")
        if symbol not in market:
            (folder / f"{symbol}.parquet").unlink()


def build_features(symbols: list[str]) -> None:
    """Compute and write all feature files and the prices, unless what is stored was made from the same inputs."""
    bars = load_bars(DATA_DIR, symbols)
    footers = {symbol: read_footer(DATA_DIR / "ohlcv" / f"{symbol}.parquet") for symbol in symbols}
    sources = {footer["source"]: symbol for symbol, footer in footers.items()}
    if len(sources) > 1:
        mixed = ", ".join(f"{symbol} of {source}" for source, symbol in sources.items())
        raise UserError(f"{DATA_DIR / 'ohlcv'} mixes sources ({mixed}): collect all symbols again with one --source")
    footer = {
        "schema": _SCHEMA,
        "features_version": _FEATURES_VERSION,
        "symbols": symbols,
        "channels": CHANNELS,
        "timeframes": TIMEFRAMES,
        "split_shares": list(SPLITS),
        "purge_ms": PURGE_DAYS * _DAY,
        "inputs": {symbol: footers[symbol]["values_sha256"] for symbol in symbols},
        "source": next(iter(sources)),
    }
    folder = DATA_DIR / "features"
    paths = {name: folder / f"{name}.parquet" for name in [*TIMEFRAMES, "prices"]}
    if all(path.exists() and footer.items() <= read_footer(path).items() for path in paths.values()):
        print(f"features: up to date in {folder}")
        return
    footer["splits"] = split_times(bars, SPLITS, PURGE_DAYS)
    frames = compute_features(bars) | {"prices": price_table(bars)}
    for name, frame in tqdm(frames.items(), "writing", disable=None):
        write_parquet(paths[name], frame, footer)
    print_summary(footer, frames)


def print_summary(footer: dict, frames: dict[str, pd.DataFrame]) -> None:
    """Print the block of key: value lines that ends a run."""
    for name, frame in frames.items():
        print(f"{name}: {len(frame):,} x {frame.shape[1]}")
    for name, (first, stop) in footer["splits"].items():
        first, stop = pd.Timestamp(first, unit="ms"), pd.Timestamp(stop, unit="ms")
        days = (stop - first) / pd.Timedelta(days=1)
        print(f"{name}: {first:%Y-%m-%d %H:%M} to {stop:%Y-%m-%d %H:%M} ({days:.1f} days)")
    print(f"source: {footer['source']}")
    print(f"features: {DATA_DIR / 'features'}")


def main(argv: list[str] | None = None) -> int:
    """Collect the bars, then compute the features."""
    globals().update(parse_flags(globals(), argv))
    symbols = check_constants()
    if not FEATURES_ONLY:
        collect_bars(symbols)
    build_features(symbols)
    return 0


if __name__ == "__main__":
    run_script(main)
