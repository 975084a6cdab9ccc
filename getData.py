"""Collect 5-minute bars and compute the 34 indicator channels of every coin at five timeframes.

reads   an exchange through ccxt, or a folder of recorded bars; a synthetic market needs only its seed
writes  data/ohlcv/SYMBOL.parquet                 raw closed bars, as the source gave them
        data/features/{5m,15m,1h,4h,1d}.parquet   34 channels per coin, indexed by bar CLOSE time
        data/features/prices.parquet              open and close on the 5-minute grid

    python getData.py                             ten pairs since 2021 from Binance; again: what is new
    python getData.py --exchange okx --symbols BTC/USDT,ETH/USDT --start 2024-01-01 --end 2025-01-01
    python getData.py --source synthetic --seed 0 --days 730 --signal 1.0
    python getData.py --source FOLDER --symbols BTCUSDT,ETHUSDT
    python getData.py --source data/ohlcv --plant 0.3 --data-dir data-planted    would that be found?
    python getData.py --job causality             after a change to the channels

T bars, N coins, K = 34 channels. Times are UTC; a bar is stored under its OPEN time, used from its CLOSE on.

README.md says which bars are refused; price jumps and idle days are reported. Gaps are stored as gaps, filled
forward when read, never backwards.

Of an exchange only bars closed by its clock are kept. Doubtful answers are asked again until two agree, and
gaps until they are a week old. Revised bars replace stored ones, damaged files are renamed to .corrupt and
fetched again, a killed run goes on. A symbol that fails does not stop the others. kraken serves 720 bars.

Exit codes: 0 whole; 1 another mistake, in one line; 2 wrong flag, unknown exchange or symbol; 3 no answer, a
blocked country, a long ban, or another run at work (what came is saved: run again); 4 data refused, or a
channel sees the future; 130 interrupted; 141 nobody reads the output any more.
"""

import argparse
import ast
import asyncio
import csv
import difflib
import gzip
import hashlib
import io
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import shlex
import signal
import sys
import threading
import time
import unicodedata
import warnings
import zipfile
import zlib
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Annotated, BinaryIO, Literal, NamedTuple, NoReturn, get_args, get_origin, get_type_hints

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import ta
from filelock import FileLock, Timeout
from pydantic import AfterValidator, Field, HttpUrl, TypeAdapter, ValidationError
from tqdm import tqdm

# Types of constants
Whole = Annotated[int, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Number = Annotated[float, Field(allow_inf_nan=False)]
NonNegative = Annotated[Number, Field(ge=0)]
Positive = Annotated[Number, Field(gt=0)]
Share = Annotated[Number, Field(ge=0, le=1)]
Fraction = Annotated[Number, Field(ge=0, lt=1)]
Strength = Annotated[Number, Field(ge=0, le=10)]  # of a planted drift
WebAddress = Annotated[HttpUrl, AfterValidator(lambda url: str(url).rstrip("/"))] | Literal[""]

# Each annotated constant is a flag. The comment line above a group names it. Brackets there list the values
# of JOB that take its flags (all, or no brackets: every job), and say how a training treats them:
#     free     a resumed run may have another value; in a grid it is the same in all runs
#     common   a resumed run must have the same value, and so must all runs of a grid
#     neither  a resumed run must have the same value; a grid may vary it

# Job and files [all]
JOB: Literal["collect", "bars", "features", "causality"] = "collect"  # collect: bars, then features
DATA_DIR: Path = Path("data")  # holds everything that the scripts read and write; here ohlcv/ and features/
SYMBOLS: tuple[str, ...] = tuple(  # one pair each, as the source calls it
    f"{coin}USDT" for coin in ("BTC", "ETH", "SOL", "XRP", "ADA", "DOGE", "AVAX", "LINK", "LTC", "TRX")
)

# Source [collect bars]
SOURCE: str = "exchange"  # "exchange", "synthetic", or a folder with one file of recorded bars per symbol
REPLACE: bool = False  # may recorded bars of another source in data/ohlcv be replaced?
PLANT: Literal["placebo"] | Strength = 0.0  # as SIGNAL, in recorded bars; placebo: days mixed; 0 = off

# Synthetic market [collect bars causality]
DAYS: Count = 730  # length of the synthetic market
SIGNAL: NonNegative = 1.0  # strength of the synthetic market's planted drift; 0 = a martingale
BIRTHS_AND_DEATHS: bool = False  # of its coins: listed late and delisted at random, some by a crash
SEED: Seed = 0  # of the synthetic market, a planted drift, and the moments at which causality is checked

# Exchange [collect bars]
EXCHANGE: str = "binance"  # any of ccxt with 5-minute spot bars: binance, okx, bybit, coinbase, kraken ...
START: str = "2021-01-01"  # first bar, ISO date, UTC; a coin that was listed later begins then
END: str = ""  # first bar that is not wanted, ISO date, UTC; "" = now
BASE_URL: WebAddress = ""  # a mirror, proxy or test server in place of the exchange, as http://127.0.0.1:8080
RATE_SHARE: Share = 0.8  # share of the exchange's rate limit to use; 0 = no limit (a mirror of your own)
TIMEOUT: Annotated[Number, Field(ge=0.001)] = 20.0  # seconds for one request (ccxt takes 0 for no limit)

# Coins that come and go [collect bars features causality]
ABSENT: Literal["refuse", "allow"] = "refuse"  # allow: a coin is absent outside its bars and in long holes
UNIVERSE: Whole = 0  # coins that are members, by volume, chosen anew each month; 0 = all that are there
MEMBER_DAYS: Whole = 81  # that a coin is there before it may be held: 30 of warm-up, the longest window
MAX_GAP: Whole = 288  # bars missing in a row; with more a coin is refused, or absent; 0 = any gap is filled
MAX_MISSING: Share = 0.02  # share of all bars; with more, over MAX_GAP, a coin is refused; not with "allow"

# Quote currency [collect bars features]
QUOTE: str = ""  # of all coins; "" = as the exchange says, or for files the ends of the symbols say

# Times [collect bars causality]
TRUST_TIMES: bool = False  # let in coins whose moves fit those of the others at another time only?

# Splits [collect features]
SPLITS: tuple[Positive, ...] = (0.70, 0.15, 0.15)  # shares of train, validation, test
PURGE_DAYS: Whole = 7  # dropped between two splits: the longest holding, of HOLDS in train.py

# What follows describes the file format. It is no setting: without a type a name makes no flag.
TIMEFRAMES = {"5m": 300_000, "15m": 900_000, "1h": 3_600_000, "4h": 14_400_000, "1d": 86_400_000}  # ms
BAR_MS, DAY_MS = TIMEFRAMES["5m"], TIMEFRAMES["1d"]
BARS_PER_DAY = DAY_MS // BAR_MS
BARS_PER_YEAR = 365 * BARS_PER_DAY
CHANNELS = [
    "ret", "range", "upwick", "lowick", "relvol",  # the bar itself
    "adx14", "vortex14", "aroonup25", "aroondn25", "ppo", "ppoh", "mass", "dpo20", "ichdiff", "stc",  # trend
    "rsi14", "srsi", "uo", "stoch9", "roc3", "roc12", "roc24",  # momentum
    "atr14", "volratio", "bbkc", "bbp", "ulcer14",  # volatility
    "cmf20", "mfi14", "pvo", "pvoh", "obv14", "eom10", "fi8",  # volume
]  # fmt: skip
_SCHEMA = 1
_SOURCE = Path(__file__).read_text("utf-8")  # what runs here, even if the file is edited meanwhile
_CAUSALITY_CUTS = 6  # random moments per coin at which causality is checked; half of them at midnight
_WARM_UP = 30  # rows before every channel's window is full
_MEMORY = 200  # rows after which it no longer matters where an exponential average began
_FOOTER_KEY = b"trading_pipeline"
_PRICES = ["open", "high", "low", "close"]
_OPEN_TIMES = ("open_time", "open time", "opentime", "start_time", "start time", "starttime", "start_at")
_TIMES = (*_OPEN_TIMES, "timestamp", "date", "datetime", "time", "unix", "ts")
_RECORDED = re.compile(  # names of recorded files; CryptoDataDownload puts the exchange first
    r"(?!\.)(?:(?:binance|bitfinex|bitstamp|bybit|coinbase|gemini|kraken|kucoin|okx|poloniex)_)?(?P<pair>.+?)"
    r"(?P<part>[-_]\d{4}-\d\d(?:-\d\d)?)?\.(?:parquet|feather|(?:csv|json)(?:\.gz)?|(?:csv\.)?zip)",
    re.IGNORECASE,
)
Damage = (  # what the readers of files raise at damaged ones
    *(ValueError, TypeError, LookupError, ArithmeticError, RuntimeError, EOFError, OSError, MemoryError),
    *(pd.errors.ParserWarning, zlib.error, zipfile.BadZipFile),
)
_QUOTES = "USDT|USDC|FDUSD|TUSD|BUSD|PYUSD|USD|DAI|EUR|GBP|AUD|TRY|BRL|JPY|KRW|BTC|ETH|BNB"
_SYNTHETIC_NOISE = 13e-4  # root mean square return of a synthetic coin per bar, without its drift
_DRIFT_HALF_LIFE = 144  # bars, of a planted drift
_SAME_STEPS = 24  # bars in a row that are equally far apart: a timeframe
_CERTAIN = 7  # standard deviations by which a correlation is no chance
_MAX_DECIMALS = 10  # of prices that are multiples of a tick
_CONCURRENCY = 8  # symbols that are fetched at a time
_MAX_RETRIES = 8  # of one request
_BACKOFF_BASE = 1.0  # seconds to wait before the first retry; doubles with each
_BACKOFF_MAX = 60.0  # seconds to wait at most
_MAX_BAN = 300.0  # seconds: a longer pause that the exchange orders (Retry-After) ends the run
_CONFIRM_DELAY = 1.0  # seconds before a doubtful page is asked again
_SETTLE = 2000  # ms after its close from which a bar is taken as final
_RECHECK = 7 * DAY_MS  # ms; younger gaps are asked again on each run
_PATIENCE = 600  # seconds after which a request that fails is not tried again
_ASKS = 5  # times a doubtful page is asked
_REJOIN_PAGES = 5  # pages to go back behind revised bars
_FLUSH_PAGES = 20  # pages of a symbol between two saves
_WEIGHT_LIMITS = {"binance": 6000, "binanceus": 1200}  # request weight that is granted per minute
Market = dict[str, np.ndarray]  # symbol -> bars [n, 6]: time in ms, open, high, low, close, volume
_CLIP = {
    "ret": 1, "relvol": 8, "vortex14": 2, "ppo": 50, "ppoh": 50, "mass": 0.3, "dpo20": 0.5, "ichdiff": 0.5,
    "uo": 1, "roc3": 100, "roc12": 100, "roc24": 100, "volratio": 3, "bbkc": 4, "bbp": 3, "cmf20": 1,
    "pvo": 2, "pvoh": 2, "obv14": 1, "eom10": 1, "fi8": 1,
}  # fmt: skip


# --- helpers that all scripts share -------------------------------------------------------------------------


class UserError(Exception):
    """A user's mistake: one line that names the next action."""

    code = 1


class UsageError(UserError):
    """A wrong flag."""

    code = 2


class TryLater(UserError):
    """The exchange did not answer, or another run is active. Bars received so far are saved."""

    code = 3


class DataRefused(UserError):
    """The exchange's answers break a rule."""

    code = 4


class _FlagParser(argparse.ArgumentParser):
    """An argument parser whose complaint is one line."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; --help lists the flags")


class Alias(str):
    """Annotates a constant with another flag for it."""


class Scaled(NamedTuple):
    """A constant's values at SCALE = "full" and "small"; an edited line may have one value for both."""

    full: object
    small: object


class Mark(NamedTuple):
    """What the brackets above a constant's group say of it."""

    jobs: tuple[str, ...]  # which take its flag; empty: all
    mark: Literal["free", "common", ""]

    def has_job(self, job: str) -> bool:
        """Return whether the job takes the constant's flag."""
        return not self.jobs or job in self.jobs


def set_constants(constants: dict[str, object], argv: list[str] | None) -> dict[str, object]:
    """Make a flag of each annotated UPPERCASE constant of a script, set those given, check all, return those.

    `constants` are the script's globals(); without `argv` the arguments are those of the process.
    UsageError: a wrong name, type or range, or a flag that the job does not use.
    """
    kinds, script = _kinds(constants), Path(constants["__file__"]).name
    parser = _FlagParser(
        usage=f"python {script} [flags]",
        description=constants["__doc__"],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    for title, mark, comments in _groups(constants):
        jobs = f" (--job {', '.join(mark.jobs)})" if mark.jobs else ""
        group = parser.add_argument_group(title + jobs)
        for name, comment in comments.items():
            options = _flag_options(constants, name, kinds[name], comment)
            aliases = [part for part in get_args(kinds[name]) if isinstance(part, Alias)]
            flags = group.add_mutually_exclusive_group()
            for flag in (_flag(name), *aliases):
                flags.add_argument(flag, dest=name, **options)
                options["help"] = f"the same as {_flag(name)}"
    given = vars(parser.parse_args(argv))
    assign_constants(constants, {name: constants[name] for name in kinds} | given)
    marks, job = constant_marks(constants), constants.get("JOB", "")
    for name in given:
        if not marks[name].has_job(job):
            raise UsageError(f"{_flag(name)} does nothing in --job {job}: leave it out")
    return given


def constant_marks(constants: dict[str, object]) -> dict[str, Mark]:
    """Return {NAME: what the brackets above its group say} of the constants in a script's globals()."""
    return {name: mark for _, mark, comments in _groups(constants) for name in comments}


def _groups(constants: dict[str, object]) -> list[tuple[str, Mark, dict[str, str]]]:
    """Return the title, mark and {NAME: comment} of each group of constants, from the script's source."""
    kinds, groups = _kinds(constants), [("Constants", Mark((), ""), {})]
    for line in Path(constants["__file__"]).read_text("utf-8").splitlines():
        header = re.fullmatch(r"# (.*?)(?: \[([a-z ]+)(?:; (free|common))?\])?", line)
        constant = re.match(r"(\w+): .*?(?:  # (.*))?$", line)
        if header:
            title, jobs, mark = header.groups("")
            groups.append((title, Mark(tuple(jobs.replace("all", "").split()), mark), {}))
        elif constant and constant[1] in kinds:
            groups[-1][2][constant[1]] = constant[2] or ""
    return [group for group in groups if group[2]]


def assign_constants(constants: dict[str, object], values: dict[str, object]) -> None:
    """Set constants in a script's globals(), or raise UsageError: one is unknown or does not fit its type."""
    constants.update({name: constant_value(constants, name, value) for name, value in values.items()})


def choose_scale(constants: dict[str, object], scale: Literal["full", "small"]) -> None:
    """Set each constant of a script's globals() that is `Scaled` to its value at a scale."""
    scaled = {name: value for name, value in constants.items() if isinstance(value, Scaled)}
    constants.update({name: getattr(value, scale) for name, value in scaled.items()})


def _kinds(constants: dict[str, object]) -> dict[str, object]:
    """Return the annotations of a script's constants."""
    script = ModuleType("script")  # since Python 3.14 globals() alone do not hold the annotations
    vars(script).update(constants)
    hints = get_type_hints(script, include_extras=True)
    return {name: kind for name, kind in hints.items() if re.fullmatch("[A-Z][A-Z0-9_]*", name)}


def constant_value(constants: dict[str, object], name: str, value: object, strict: bool = True) -> object:
    """Return a value that fits a constant, or raise UsageError; unless strict, a flag's text is converted."""
    if isinstance(value, Scaled):
        return Scaled(*(constant_value(constants, name, part) for part in value))
    if name not in (kinds := _kinds(constants)):
        raise UsageError(f"{name} is no constant of {Path(constants['__file__']).name}")
    kind, parts = kinds[name], value
    if get_origin(get_args(kind)[0] if get_origin(kind) is Annotated else kind) is tuple:
        kind = Annotated[kind, Field(min_length=1)]
        parts = value if strict else [part.strip() for part in value.split(",")]
    try:
        return TypeAdapter(kind).validate_python(parts, strict=strict)
    except ValidationError as error:
        raise UsageError(f"{name} = {value!r}: {error.errors()[0]['msg']}") from None


def _flag_options(constants: dict[str, object], name: str, kind: object, comment: str) -> dict[str, object]:
    """Return what argparse must know of a constant's flag."""
    default = constants[name]
    shown = "; small: ".join(map(plain_text, default if isinstance(default, Scaled) else [default]))
    options = {"help": f"{comment} (default: {shown})".strip().replace("%", "%%")}
    if kind is bool:
        return options | {"action": argparse.BooleanOptionalAction}
    if get_origin(kind) is Literal:
        return options | {"choices": get_args(kind)}
    return options | {"type": partial(constant_value, constants, name, strict=False)}


def _flag(name: str) -> str:
    return "--" + name.lower().replace("_", "-")


def flag_text(name: str, value: object) -> str:
    """Return the argument that gives a constant this value."""
    if isinstance(value, bool):
        return _flag(name) if value else _flag(f"no_{name}")
    return f"{_flag(name)}={plain_text(value)}"


def plain_text(value: object) -> str:
    """Return a constant's value as a flag's text has it."""
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def run_script(main: Callable[[], int]) -> NoReturn:
    """Run main and exit with its code; errors of the user or the system end in one line, not a traceback."""
    sys.stdout.reconfigure(errors="backslashreplace")  # as stderr: a path may be in another encoding
    try:
        try:
            code = main()
            print(end="", flush=True)  # here, so that a failure is still caught
        finally:  # from here on Python would end with a traceback
            for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
                if callable(signal.getsignal(number)):
                    signal.signal(number, signal.SIG_DFL)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = error.code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    except (MemoryError, RuntimeError) as error:  # torch has no class of its own for the CPU
        kinds = "MemoryError", "OutOfMemoryError"
        if type(error).__name__ not in kinds and "tried to allocate" not in str(error).lower():
            raise
        problem = f"out of memory ({one_line(error)})"
        print(f"error: {problem}: use --scale small, or smaller batches (constants)", file=sys.stderr)
        code = 1
    except BrokenPipeError:
        code = 141  # as a shell reports it when the reader is gone: `python getData.py | head`
    except OSError as error:
        if error.errno is None:
            raise
        place = f" ({error.filename})" if error.filename else ""
        print(f"error: {os.strerror(error.errno)}{place}: files written before are intact", file=sys.stderr)
        code = 1
    try:
        print(end="", flush=True)
    except OSError:  # otherwise Python would try again at exit and print a traceback
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a new file that replaces `path` in one atomic step at the end of the `with` block.

    Until then, and after an error or a crash, `path` is the old file or absent, never half written.
    OSError: the write failed (full disk, no permission); `filename` is set, no temporary file left.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp")  # always the same name: overwrites what a killed run left
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        error.filename = error.filename or str(path)  # a failed write names none
        raise
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
    with suppress(OSError):  # some network drives cannot sync a folder
        descriptor = os.open(path.parent, os.O_RDONLY)  # so that a power failure cannot undo the rename
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_parquet(path: Path, frame: pd.DataFrame, footer: dict) -> None:
    """Write a table and its footer in one atomic step; errors as `replacing`."""
    table = pa.Table.from_pandas(frame)
    table = table.cast(with_footer(table.schema, footer))
    with replacing(path) as file:  # without a dictionary, since hardly any value repeats
        pq.write_table(table, file, compression="zstd", use_dictionary=False, write_page_checksum=True)


def with_footer(schema: pa.Schema, footer: dict) -> pa.Schema:
    """Return the schema of a table with the footer that `read_footer` reads."""
    return schema.with_metadata({**(schema.metadata or {}), _FOOTER_KEY: json.dumps(footer).encode()})


def read_footer(path: Path, *needed: str) -> dict:
    """Return the footer that write_parquet stored; without the needed keys the file is damaged."""
    with open(path, "rb") as file, _readable(path, make_again):
        metadata = pq.read_schema(file).metadata or {}
        if _FOOTER_KEY not in metadata:
            raise UserError(f"{path} was not written by getData.py: {make_again(path, 'move it away and ')}")
        footer = json.loads(metadata[_FOOTER_KEY])
        if not isinstance(footer, dict) or any(key not in footer for key in needed):
            raise ValueError(f"its footer lacks {' or '.join(needed)}")
        return footer


def read_frame(path: Path) -> pd.DataFrame:
    """Return the table that write_parquet stored, its checksums verified."""
    with _readable(path, make_again):
        return pd.read_parquet(open_file(path), page_checksum_verification=True)


def open_file(path: Path) -> pa.BufferReader:
    """Return a file for pyarrow to read, in its own memory."""
    # Its threads may end after the interpreter; one that then gives Python's memory back aborts the process.
    with open(path, "rb") as file:  # pyarrow knows no path in another encoding
        buffer = pa.allocate_buffer(os.fstat(file.fileno()).st_size)
        file.readinto(buffer)
    return pa.BufferReader(buffer)


@contextmanager
def _readable(path: Path, advise: Callable[[Path], str], problem: str = "is damaged") -> Iterator[None]:
    """Report a damaged file, and what to do, as a one-line UserError."""
    try:
        yield
    except Damage as error:
        if getattr(error, "errno", None):  # from the operating system: no permission, no such file
            raise
        raise UserError(f"{path} {problem} ({one_line(error)}): {advise(path)}") from error


def one_line(error: Exception) -> str:
    """Return an error's class and text on one line: no URLs, no markup, 160 characters at most."""
    error = error.__cause__ or error  # ccxt's own error holds only the URL; aiohttp's says what happened
    words = re.sub(r"https?://[^ ]+|<[^>]*>", " ", str(error)).split()
    return " ".join([type(error).__name__, *words])[:160]


def owner_of(path: Path) -> Path | None:
    """Return the data folder whose `checkpoints/` holds the path; None for a path in none."""
    return next((folder.parent for folder in path.parents if folder.name == "checkpoints"), None)


def stored_symbols(data_dir: Path) -> list[str]:
    """Return the coins whose bars are in a data folder, by name."""
    return sorted(path.stem for path in data_dir.glob("ohlcv/[!.]*.parquet"))


def make_again(path: Path, first: str = "delete it and ") -> str:
    """Return what to do, after `first`, to have a data folder's file again: the command in its bars."""
    data_dir = path.parent.parent
    owner = owner_of(data_dir)
    if owner and ".market-" in data_dir.name:  # what a training made to go on with while new bars come
        return f"remove {data_dir}: --resume then works where the bars in {owner} are still the same"
    facts = {}  # of each kind the first one that a file holds
    for other in sorted(data_dir.glob("*/[!.]*.parquet")):
        with suppress(*Damage), open(other, "rb") as file:
            facts = json.loads(pq.read_schema(file).metadata[_FOOTER_KEY]) | facts
    bars = stored_symbols(data_dir)
    symbols, command = facts.get("symbols", bars), facts.get("command", "")
    if path.parent.name == "features" and bars:
        command = "python getData.py --job features"
        if facts.get("absent"):
            command += f" --absent allow --max-gap {facts['max_gap']} --universe {facts['universe']}"
    elif bars and not command:
        return f"{first}run again the getData.py that made {data_dir}"
    symbols = f" --symbols {','.join(symbols)}" if symbols else ""
    return f"{first}run {command or 'python getData.py'} --data-dir {shlex.quote(str(data_dir))}{symbols}"


def load_features(data_dir: Path) -> tuple[dict[str, pd.DataFrame], dict]:
    """Load timeframe -> features [T, N*K] float32 by bar CLOSE time (columns SYMBOL.channel), and the footer.

    Rows before the youngest coin's warm-up hold NaN for that coin; everything later is finite.
    UserError: files are missing, of different runs, or older than the bars.
    """
    footer = _check_features(data_dir)
    columns = [f"{symbol}.{channel}" for symbol in footer["symbols"] for channel in footer["channels"]]
    frames = {}
    for name, period in footer["timeframes"].items():
        frames[name] = _read_table(data_dir / "features" / f"{name}.parquet", columns, "float32", period)
    return frames, footer


def load_prices(data_dir: Path) -> tuple[pd.DataFrame, dict]:
    """Load SYMBOL.open and SYMBOL.close, float64, indexed as the 5m features; errors as load_features.

    Where coins may be absent, also SYMBOL.member, 0 or 1; the prices of an absent one are NaN.
    """
    footer = _check_features(data_dir)
    path = data_dir / "features" / "prices.parquet"
    names = ["open", "close", *["member"] * footer["absent"]]
    columns = [f"{symbol}.{name}" for symbol in footer["symbols"] for name in names]
    prices = _read_table(path, columns, "float64", BAR_MS)
    if wrong := [name for name in columns if not name.endswith(".member") and (prices[name] <= 0).any()]:
        raise UserError(f"{path} holds a price of {wrong[0]} that is not above 0: {make_again(path)}")
    return prices, footer


def members_of(frame: pd.DataFrame, symbols: list[str]) -> np.ndarray | None:
    """Return which coins may be held after each bar [T, N], of load_prices' frame; None: all always."""
    names = [f"{symbol}.member" for symbol in symbols]
    return frame[names].to_numpy() > 0 if names[0] in frame else None


def _read_table(path: Path, columns: list[str], dtype: str, period: int) -> pd.DataFrame:
    """Return a table, or refuse other columns than its footer has, or rows that are not `period` ms apart."""
    frame = read_frame(path)
    times = frame.index.as_unit("ms").asi8 if isinstance(frame.index, pd.DatetimeIndex) else np.zeros(2)
    if frame.columns.tolist() != columns or (frame.dtypes != dtype).any() or (np.diff(times) != period).any():
        raise UserError(f"{path} is not the table that its footer describes: {make_again(path)}")
    return frame


def _check_features(data_dir: Path) -> dict:
    """Return the footer that all feature files share; errors as `load_features`."""
    paths = [data_dir / "features" / f"{name}.parquet" for name in [*TIMEFRAMES, "prices"]]
    again = make_again(paths[0], first="")
    other = "restore getData.py, or start anew" if ".market-" in data_dir.name else again
    if missing := [path.name for path in paths if not path.exists()]:
        raise UserError(f"no {missing[0]} in {paths[0].parent}: {again}")
    footers = [read_footer(path) for path in paths]
    if footers[0].get("formulas_sha256") != formulas_sha256():
        raise UserError(f"the features in {paths[0].parent} are of other formulas than getData.py's: {other}")
    if any(footer != footers[0] for footer in footers):
        raise UserError(f"the files in {paths[0].parent} are of different runs: {again}")
    for symbol, values_sha256 in footers[0]["inputs"].items():
        bars = data_dir / "ohlcv" / f"{symbol}.parquet"
        # Features without bars are accepted (copied from another machine, say): nothing can be stale.
        if bars.exists() and read_footer(bars).get("values_sha256") != values_sha256:
            raise UserError(f"features are older than the bars ({symbol}): {again}")
    return footers[0]


def ensure_data(data_dir: Path, seed: int) -> None:
    """Make the synthetic market of this file's constants if data_dir has neither bars nor features."""
    if any(any((data_dir / folder).glob("[!.]*.parquet")) for folder in ("ohlcv", "features")):
        return
    print(f"*** NO DATA in {data_dir}: making the SYNTHETIC market (seed {seed}), NOT REAL ***")
    set_constants(globals(), [])  # checks them: another script has checked only its own
    symbols = check_constants()
    command = f"python getData.py --source synthetic --seed {seed} --days {DAYS} --signal {SIGNAL}"
    with locked(data_dir):
        market = synthetic_market(symbols, DAYS, seed, SIGNAL)
        store_market(data_dir, market, synthetic_source(seed, SIGNAL), command)
        build_features(data_dir, symbols)


# --- bars: validation, store, loading -----------------------------------------------------------------------


def symbol_name(text: str) -> str:
    """Return the plain symbol: BTC/USDT, btc-usdt, BTC_USDT-5m and BTC_USDT_USDT-5m-futures are BTCUSDT."""
    text = re.sub(r"[-_]5M(IN)?(-FUTURES)?$", "", unicodedata.normalize("NFC", text).upper())
    text = re.sub(r"(?<=[-_/])(\w+)[_:]\1$", r"\1", text)  # a future's second USDT: what it settles in
    # Letters and digits of every alphabet are kept, so that two coins have two names.
    return "".join(sign for sign in text if sign.isalnum() or unicodedata.category(sign)[0] == "M")


def names_meant(text: str, names: Iterable[str]) -> list[str]:
    """Return those of the names that are spelled as a symbol; failing these, those in any other spelling."""
    meant = [name for name in names if symbol_name(name) == symbol_name(text)]
    return [name for name in meant if text in (name, name.replace("/", ""))] or meant


def check_quotes(quotes: dict[str, str], quote: str) -> None:
    """Refuse coins of different quote currencies: those told, where "" `quote`, or else the symbols' ends."""
    ends = {symbol: re.search(f"(?<=.)({_QUOTES})$|$", symbol)[0] for symbol in quotes}  # the longest, or ""
    quotes = {symbol: fact or quote or ends[symbol] for symbol, fact in quotes.items()}
    first, expected = ("--quote", quote) if quote else next(iter(quotes.items()))
    if wrong := [symbol for symbol in quotes if quotes[symbol] != expected]:
        other = quotes[wrong[0]] or "another currency"
        names = f"{wrong[0]} is quoted in {other}, {first} in {expected or 'another'}"
        raise UserError(f"{names}: leave one out of --symbols, or where names do not tell use --quote")


def to_milliseconds(symbol: str, times: pd.Series) -> np.ndarray:
    """Return times as int64 ms since 1970; takes datetimes, ISO strings (naive = UTC), and numbers."""
    numbers = times if pd.api.types.is_datetime64_any_dtype(times) else pd.to_numeric(times, errors="coerce")
    if pd.api.types.is_numeric_dtype(times) or numbers.notna().all():  # Bybit sends them as text
        values = numbers.to_numpy(dtype="float64", na_value=np.nan)
        # all seconds, all ms, all microseconds or all nanoseconds, which lie apart from 1973 to 5138
        unit = next((unit for unit in (1e-3, 1, 1e3, 1e6) if 1e11 < values[0] / unit < 1e14), 1)
        values = np.rint(values / unit)
    else:
        parsed = pd.to_datetime(times, utc=True, errors="coerce", format="ISO8601")
        values = parsed.dt.as_unit("ms").astype("int64").to_numpy()
    wrong = ~((values > 1e11) & (values < 1e14))
    if wrong.any():
        row = int(wrong.argmax())
        raise UserError(f"{symbol}: bar {row} ({times.iloc[row]}): timestamp is neither ms nor ISO: mend it")
    return values.astype("int64")


def broken_rule(times: np.ndarray, values: np.ndarray) -> str:
    """Name the first bar (times [T], ms, values [T, 5]) that breaks a rule, and the rule; "" if none does."""
    prices, step = values[:, :4], np.diff(times, prepend=times[:1] - BAR_MS)
    rules = {
        "unsorted": step < 0,
        "duplicate": step == 0,
        "off the 5-minute grid": times % BAR_MS != 0,
        "non-finite": ~np.isfinite(values).all(axis=1),
        "price <= 0": (prices <= 0).any(axis=1),
        "volume < 0": values[:, 4] < 0,
        "high/low inconsistent": (prices.max(axis=1) > prices[:, 1]) | (prices.min(axis=1) < prices[:, 2]),
    }
    for rule, broken in rules.items():
        if broken.any():
            row = int(broken.argmax())
            return f"bar {row} ({pd.Timestamp(times[row], unit='ms').isoformat()}): {rule}"
    if len(times) > _SAME_STEPS:  # neither random gaps nor bars without trades repeat themselves so often
        steps = np.lib.stride_tricks.sliding_window_view(np.diff(times), _SAME_STEPS)
        wrong = (steps == steps[:, :1]).all(axis=1) & (steps[:, 0] != BAR_MS)
        if wrong.any():
            row = int(wrong.argmax())
            return f"bars are {steps[row, 0] / 60_000:g} minutes apart from {when(times[row])} on"
    return ""


def validate_bars(symbol: str, raw: pd.DataFrame) -> pd.DataFrame:
    """Return raw bars as [timestamp, open, high, low, close, volume], or refuse them; nothing is repaired."""
    if raw.empty:
        raise UserError(f"{symbol}: no bars: give a file with bars or leave the symbol out")
    if missing := [name for name in ["timestamp", *_PRICES, "volume"] if name not in raw]:
        raise UserError(f"{symbol}: no column {missing[0]!r} among {', '.join(map(str, raw))}: rename it")
    times = to_milliseconds(symbol, raw["timestamp"])
    bars = raw[[*_PRICES, "volume"]].apply(pd.to_numeric, errors="coerce").astype("float64")
    if broken := broken_rule(times, bars.to_numpy()):
        raise UserError(f"{symbol}: {broken}: repair what breaks this rule, or give other bars of 5 minutes")
    bars.insert(0, "timestamp", pd.to_datetime(times, unit="ms", utc=True).as_unit("ms"))
    return bars.reset_index(drop=True)


def values_sha256(bars: pd.DataFrame) -> str:
    """Return a hash of times and values, which does not depend on file encoding or library versions."""
    digest = hashlib.sha256(bars["timestamp"].astype("int64").to_numpy().tobytes())
    digest.update(bars[[*_PRICES, "volume"]].to_numpy(dtype="float64").tobytes())
    return digest.hexdigest()


def store_bars(
    data_dir: Path, symbol: str, bars: pd.DataFrame, source: str, command: str, **more: object
) -> None:
    """Write validated bars with their footer, and `more` in it, unless the same are stored already."""
    times = bars["timestamp"].astype("int64")
    footer = {
        "schema": _SCHEMA,
        "source": source,
        "timeframe": "5m",
        "first": int(times.iloc[0]),
        "last": int(times.iloc[-1]),
        "rows": len(times),
        "gaps": find_gaps(bar_array(bars)).tolist(),
        "listed_from": int(times.iloc[0]),
        "values_sha256": values_sha256(bars),
    } | more
    path = data_dir / "ohlcv" / f"{symbol}.parquet"
    if not path.exists() or not footer.items() <= read_footer(path).items():
        # the command makes them again from their source, once --data-dir and --symbols are added
        write_parquet(path, bars, footer | {"command": command})


def fill_gaps(bars: pd.DataFrame, grid: pd.DatetimeIndex, limit: int = 0) -> pd.DataFrame:
    """Put one coin's bars (by open time) on the grid, causally.

    A missing bar becomes open=high=low=close=previous close, volume 0, filled=True. Rows before the first
    real bar and after the last one stay NaN with filled=False. With a `limit` so many missing bars in a row
    are filled, after the last one too, since nobody knows then how long it will last; the others stay NaN.
    """
    inside = (grid >= bars.index[0]) & ((grid <= bars.index[-1]) | (limit > 0))
    bars = bars.reindex(grid)
    previous_close = bars["close"].ffill(limit=limit or None)
    missing = inside & bars["close"].isna().to_numpy() & previous_close.notna().to_numpy()
    for name in _PRICES:
        bars[name] = bars[name].where(~missing, previous_close)
    bars["volume"] = bars["volume"].where(~missing, 0.0)
    return bars.assign(filled=missing)


def load_bars(data_dir: Path, symbols: list[str], limit: int = 0) -> dict[str, pd.DataFrame]:
    """Load stored bars of all symbols on one 5-minute UTC grid, by OPEN time; gaps as in fill_gaps."""
    stored = stored_symbols(data_dir)
    if unknown := [symbol for symbol in symbols if symbol not in stored]:
        have = f"--symbols {','.join(stored)}" if stored else "python getData.py --source synthetic"
        raise UserError(f"no bars of {unknown[0]} in {data_dir / 'ohlcv'}: collect them, or use {have}")
    raw = {symbol: read_frame(data_dir / "ohlcv" / f"{symbol}.parquet") for symbol in symbols}
    return on_one_grid({symbol: bars.set_index("timestamp") for symbol, bars in raw.items()}, limit)


def on_one_grid(raw: dict[str, pd.DataFrame], limit: int = 0) -> dict[str, pd.DataFrame]:
    """Put the bars of all symbols (by OPEN time) on one 5-minute UTC grid; gaps as in fill_gaps."""
    first, last = min(bars.index[0] for bars in raw.values()), max(bars.index[-1] for bars in raw.values())
    grid = pd.date_range(first, last, freq="5min", unit="ms")
    return {symbol: fill_gaps(bars, grid, limit) for symbol, bars in raw.items()}


# --- judging: the same rules for the bars of every source ---------------------------------------------------


def find_gaps(bars: np.ndarray) -> np.ndarray:
    """Return first missing time in ms and number of missing bars of every gap in bars [n, 6]: [k, 2]."""
    times = bars[:, 0].astype(np.int64)
    holes = np.flatnonzero(np.diff(times) > BAR_MS)
    return np.column_stack([times[holes] + BAR_MS, np.diff(times)[holes] // BAR_MS - 1]).reshape(-1, 2)


def price_jumps(bars: np.ndarray) -> int:
    """Count bars that open 1.5 times above or below the previous close, or with a high over 3 x the low."""
    steps = np.abs(np.log(bars[1:, 1] / bars[:-1, 4]))
    return int((steps > math.log(1.5)).sum() + (bars[:, 2] > 3 * bars[:, 3]).sum())


def when(time_ms: float) -> str:
    """Return a time in ms as text in UTC, to the minute."""
    return f"{datetime.fromtimestamp(time_ms / 1000, UTC):%Y-%m-%d %H:%M}"


def bar_array(bars: pd.DataFrame) -> np.ndarray:
    """Return validated bars as [n, 6]: time in ms, open, high, low, close, volume."""
    return bars.assign(timestamp=bars["timestamp"].astype("int64")).to_numpy(dtype=np.float64)


def check_coverage(
    symbol: str, bars: np.ndarray, start: int, stop: int, max_gap: int, max_missing: float
) -> None:
    """Refuse bars [n, 6] of which there are none in [start, stop), or more missing there than allowed."""
    bars = bars[slice(*np.searchsorted(bars[:, 0], [start, stop]))]
    if not len(bars):
        raise DataRefused(f"{symbol}: no bars from {when(start)} to {when(stop)}: leave it out of --symbols")
    if not max_gap:
        return
    gaps, after = find_gaps(bars), int(stop - bars[-1, 0]) // BAR_MS - 1
    missing = int(gaps[:, 1].sum())
    share = missing / (missing + len(bars))
    if len(gaps) and gaps[:, 1].max() > max_gap:
        first, count = gaps[gaps[:, 1].argmax()]
        problem, flag = f"{count} bars are missing from {when(first)} on", f"--max-gap {count}"
    elif missing > max_gap and share > max_missing:
        problem = f"{missing} of {missing + len(bars)} bars are missing"
        flag = f"--max-missing {math.ceil(share * 1000) / 1000}"
    elif after > max_gap:
        problem, flag = f"the bars end at {when(bars[-1, 0])}, delisted or halted", f"--max-gap {after}"
    else:
        return
    raise DataRefused(f"{symbol}: {problem}: leave it out of --symbols, or use {flag} or --absent allow")


def find_shifts(market: Market) -> dict[str, tuple[float, int, int, int] | None]:
    """Find the shift in time at which the bars [n, 6] of each coin move most like those of the others.

    In windows of 2, 7 and 30 days that overlap by half the signs of its 5-minute returns (a few large moves
    would decide otherwise) are multiplied by the sum of the others' signs, at every shift. The score of a
    shift is the sum of products over the root of that of their squares, over the scores' root mean square
    where moves last. One that is _CERTAIN above the score of no shift is no chance: unrelated coins stay
    below 6 for years. 3 days are enough where coins correlate by 0.4, a week where by 0.25.

    Returns symbol -> (how much above, ms by which the bars are too late, first and end of the window in ms)
    of the most certain shift, of none if none is certain, or None for an unrelated coin.
    """
    start = min(int(bars[0, 0]) for bars in market.values())
    last = max(int(bars[-1, 0]) for bars in market.values())
    signs = np.zeros((len(market), (last - start) // BAR_MS + 1), dtype=np.float32)
    for row, bars in zip(signs, market.values(), strict=True):
        adjacent = np.flatnonzero(np.diff(bars[:, 0]) == BAR_MS) + 1
        moves = np.sign(bars[adjacent, 4] - bars[adjacent - 1, 4])
        row[(bars[adjacent, 0].astype(np.int64) - start) // BAR_MS] = moves
    total, count = signs.sum(axis=0), signs.shape[1]
    shifts = dict.fromkeys(market)
    for length in {min(days * BARS_PER_DAY, count) for days in (2, 7, 30)}:
        begins = np.append(np.arange(0, count - length, max(length // 2, 1)), count - length)
        size = 2 * length  # no shift wraps around
        for symbol, row in zip(market, signs, strict=True):
            rows = np.stack([row, total - row])
            windows = np.lib.stride_tricks.sliding_window_view(rows, length, axis=1)[:, begins]
            waves = np.fft.rfft([windows, windows**2], size)
            sums, squares = np.fft.irfft(waves[:, 0] * waves[:, 1].conj(), size)  # [windows, size]
            scores = sums / np.sqrt(squares.clip(min=1))
            scores /= np.sqrt((scores**2).mean(axis=1, keepdims=True)).clip(min=1)
            top = scores.max(axis=1)
            lead = top - scores[:, 0].clip(min=0)
            window = int((lead if lead.max() > _CERTAIN else top).argmax())
            if top[window] > _CERTAIN:
                best = int(scores[window].argmax()) if lead[window] > _CERTAIN else 0
                shift = ((best + length) % size - length) * BAR_MS
                first = start + int(begins[window]) * BAR_MS
                new = float(lead[window]), shift, first, first + length * BAR_MS
                shifts[symbol] = max(new, shifts[symbol] or new)
    return shifts


def check_times(market: dict[str, np.ndarray], trust: bool = False) -> list[str]:
    """Refuse bars that are certainly shifted in time, or with `trust` print that; return those unchecked."""
    shifts = find_shifts(market)
    shifted = {symbol: shift for symbol, shift in shifts.items() if shift and shift[1]}
    for symbol in sorted(shifted, key=shifted.get, reverse=True):
        _, shift, first, stop = shifted[symbol]
        off = f"{abs(shift) // 60_000} minutes too {'late' if shift > 0 else 'early'}"
        problem = f"{symbol}: its bars from {when(first)} to {when(stop)} are {off} for those of the others"
        if not trust:
            advice = "give all open times in UTC, leave it out of --symbols, or let it in with TRUST_TIMES"
            raise DataRefused(f"{problem}: {advice} (getData.py --trust-times)")
        print(f"{problem}: let in by TRUST_TIMES")
    if unchecked := [symbol for symbol, shift in shifts.items() if shift is None]:
        print(f"times not checked, since they hardly move with the others: {','.join(unchecked)}")
    return unchecked


def print_overview(market: Market, start: int, stop: int, limit: int = 0, notes: Iterable[str] = ()) -> None:
    """Print a line per symbol: its bars [n, 6] from `start` to `stop` (ms), holes over `limit`, its note."""
    print(f"{'symbol':<10}{'rows':>9}  {'first':<16}  {'last':<16}  missing  longest gap  zero volume  notes")
    for (symbol, bars), note in itertools.zip_longest(market.items(), notes, fillvalue=""):
        if not len(bars):
            print(f"{symbol:<10}{0:>9}")
            continue
        first, last, (holes, gaps) = bars[0, 0], bars[-1, 0], find_gaps(bars).T
        remarks = [f"listed {when(first)}"] if first > start else []
        remarks += [f"ended {when(last)}"] if stop - last > DAY_MS // 24 else []
        trades = np.flatnonzero(np.concatenate([[True], bars[:, 5] > 0, [True]]))  # and the edges
        longest = int(np.diff(trades).argmax())
        idle = int(trades[longest + 1] - trades[longest] - 1)
        if idle * BAR_MS > DAY_MS:
            remarks.append(f"no trades in {idle:,} bars from {when(bars[trades[longest], 0])} on")
        if jumps := price_jumps(bars):
            remarks.append(f"{jumps} price jump{'s' * (jumps > 1)}")
        absent = zip(holes[gaps > limit], gaps[gaps > limit], strict=True) if limit else ()
        remarks += [f"absent {when(hole)} to {when(hole + count * BAR_MS)}" for hole, count in absent]
        remarks += [note] if note else []
        print(
            f"{symbol:<10}{len(bars):>9,}  {when(first):<16}  {when(last):<16}  {gaps.sum():>7,}  "
            f"{gaps.max(initial=0):>11,}  {(bars[:, 5] == 0).sum():>11,}  {'; '.join(remarks)}".rstrip()
        )


# --- sources: each returns raw bars per symbol, which then go through validate_bars and store_bars ----------


def mean_reverting(rng: np.random.Generator, bars: int, half_life: float) -> np.ndarray:
    """Return a stationary Gaussian AR(1) of unit variance whose memory halves every half_life bars."""
    decay = 0.5 ** (1 / half_life)
    shocks = rng.standard_normal(bars)
    shocks[1:] *= math.sqrt((1 + decay) / (1 - decay))
    return pd.Series(shocks).ewm(alpha=1 - decay, adjust=False).mean().to_numpy()


def predictable_drift(rng: np.random.Generator, bars: int, strength: float) -> np.ndarray:
    """Return a drift per bar that only past bars show: deviation 3 bp times strength, half-life 12 h."""
    return 3e-4 * strength * mean_reverting(rng, bars, _DRIFT_HALF_LIFE)


def synthetic_market(symbols: list[str], days: int, seed: int, signal: float) -> dict[str, pd.DataFrame]:
    """Make a market from 2024-01-01 on: noise of about 13 bp per bar plus each coin's `predictable_drift`.

    All else is independent of the future, so with signal = 0 opens and closes together are a martingale. A
    coin's bars depend only on the seed and its own name, not on the other coins.
    """
    n = days * DAY_MS // BAR_MS
    times = pd.Timestamp("2024-01-01", tz="UTC").value // 1_000_000 + BAR_MS * np.arange(n)
    season = np.exp(0.35 * np.cos(2 * np.pi * (times % DAY_MS / DAY_MS - 15 / 24)))  # busiest at 15:00 UTC
    season /= math.sqrt(np.mean(season**2))
    shared = np.random.default_rng(seed)
    shared_shock = shared.standard_t(5, n) / math.sqrt(5 / 3)  # fat tails, of unit variance
    shared_activity = mean_reverting(shared, n, half_life=576)
    market = {}
    for symbol in symbols:
        rng = np.random.default_rng([seed, zlib.crc32(symbol.encode())])
        activity = 0.35 * shared_activity + 0.20 * mean_reverting(rng, n, half_life=144)  # log volatility
        usual = _SYNTHETIC_NOISE * rng.uniform(0.85, 1.15)
        volatility = usual * season * np.exp(activity - 0.35**2 - 0.20**2)  # of mean square usual**2
        own_shock = rng.standard_t(5, n) / math.sqrt(5 / 3)
        shock = np.clip(0.7 * shared_shock + math.sqrt(1 - 0.7**2) * own_shock, -15, 15)
        drift = predictable_drift(rng, n, signal)
        body = np.log1p(np.maximum(drift + volatility * shock, -0.9))  # open to close: symmetric returns
        gap = np.log1p(0.02 * volatility * rng.standard_normal(n))  # previous close to open
        log_close = math.log(10 ** rng.uniform(-1, 4)) + np.cumsum(body + gap)
        # The extremes of a Brownian bridge between open and close.
        reach = [np.sqrt(body**2 - 2 * volatility**2 * np.log1p(-rng.random(n))) for _ in range(2)]
        bars = pd.DataFrame({"timestamp": times, "open": np.exp(log_close - body)})
        bars["high"] = np.exp(log_close + (reach[0] - body) / 2)
        bars["low"] = np.exp(log_close - (reach[1] + body) / 2)
        bars["close"] = np.exp(log_close)
        bars["high"] = bars[_PRICES].max(axis=1)  # correct rounding errors
        bars["low"] = bars[_PRICES].min(axis=1)
        turnover = activity + np.log(season) + 0.3 * np.abs(shock) + 0.4 * mean_reverting(rng, n, 12)
        bars["volume"] = 1e6 * np.exp(turnover + 0.3 * rng.standard_normal(n)) / bars["close"]
        market[symbol] = bars
    return market


def with_lives(market: dict[str, pd.DataFrame], seed: int) -> dict[str, pd.DataFrame]:
    """Cut the bars of each coin to a life of its own, of three quarters of the time on average."""
    lives = {}
    for symbol, bars in market.items():
        rng = np.random.default_rng([seed, zlib.crc32(symbol.encode()), 1])
        birth, death = (len(bars) * np.array([rng.uniform(-0.5, 0.5), rng.uniform(0.5, 1.5)])).astype(int)
        bars = bars.iloc[max(birth, 0) : death].reset_index(drop=True)
        if rng.random() < 0.5 and death < len(market[symbol]):  # loses nine tenths in its last day
            fall = np.exp(np.linspace(0, math.log(0.1), BARS_PER_DAY + 1))
            factors = np.stack([fall[:-1], fall[:-1], fall[1:], fall[1:]], axis=1)  # of _PRICES
            bars.loc[bars.index[-BARS_PER_DAY:], _PRICES] *= factors
        lives[symbol] = bars
    return lives


def follows(bars: pd.DataFrame) -> pd.Series:
    """Return which bars come after a day without bars at most [T]; the others begin a piece of history."""
    return bars["timestamp"].diff() <= pd.Timedelta(DAY_MS + BAR_MS, "ms")


def planted_log_drift(symbol: str, bars: pd.DataFrame, strength: float, seed: int) -> np.ndarray:
    """Return the drift [T] of the log price from open to close that plant_drift adds to validated bars.

    It is that of the synthetic market times the coin's usual volatility (root mean square of the log returns
    before each bar, half-life 30 days; 0 on the first day) over that of the synthetic coins, so that a
    strength is as visible here as there. A bar whose price does not move has none, nor has a hole's return.
    """
    times = bars["timestamp"].astype("int64").to_numpy()
    slots = (times - times[0]) // BAR_MS
    rng = np.random.default_rng([seed, zlib.crc32(symbol.encode()), times[0] // BAR_MS])
    drift = predictable_drift(rng, slots[-1] + 1, strength)[slots]
    squares = np.log(bars["close"]).diff().where(follows(bars)) ** 2
    variance = squares.ewm(halflife=30 * BARS_PER_DAY, min_periods=BARS_PER_DAY).mean().shift()
    drift *= np.sqrt(variance.fillna(0.0).to_numpy()) / _SYNTHETIC_NOISE
    return np.where(bars["high"] > bars["low"], drift, 0.0)


def plant_drift(symbol: str, bars: pd.DataFrame, strength: float, seed: int) -> pd.DataFrame:
    """Return validated bars with planted_log_drift added: NOT REAL, a known drift in real noise.

    A bar's drift acts from its open to its close: it must not show in the gap between two bars, nor in wicks
    or volumes. Prices are multiples of a tick, and often stay the same: a drift alone would turn these zero
    returns into exactly the drift, to be read off however weak it is. So new prices are rounded to the tick,
    which grows with them in powers of two.
    """
    after = np.cumsum(planted_log_drift(symbol, bars, strength, seed))
    before = np.append(0.0, after[:-1])
    unit = 2.0 ** np.round(before / math.log(2))
    open_, high, low, close = bars[_PRICES].to_numpy().T
    new_open, new_close = open_ * (np.exp(before) / unit), close * (np.exp(after) / unit)
    new_high = np.maximum(new_open, new_close) * (high / np.maximum(open_, close))
    new_low = np.minimum(new_open, new_close) * (low / np.minimum(open_, close))
    prices = np.stack([new_open, new_high, new_low, new_close], axis=1)
    old, decimals = bars[_PRICES].to_numpy(), np.full(len(bars), _MAX_DECIMALS + 1)  # of the tick so far
    for count in range(_MAX_DECIMALS, -1, -1):
        decimals[(np.round(old, count) == old).all(axis=1)] = count
    decimals = np.maximum.accumulate(decimals)
    ticks = 10.0 ** np.minimum(decimals, _MAX_DECIMALS)[:, None]  # per unit of price
    prices = np.where(decimals[:, None] <= _MAX_DECIMALS, np.rint(prices * ticks) / ticks, prices)
    return bars.assign(**dict(zip(_PRICES, (prices * unit[:, None]).T, strict=True)))


def drift_to_come(symbol: str, bars: pd.DataFrame, strength: float, seed: int) -> pd.Series:
    """Return how much planted_log_drift is expected to add after each bar, by its close: it fades."""
    drift = planted_log_drift(symbol, bars, strength, seed)
    close = bars["timestamp"] + pd.Timedelta(BAR_MS, "ms")
    latest = pd.Series(np.where(drift, drift, np.nan), pd.DatetimeIndex(close)).ffill().fillna(0.0)
    decay = 0.5 ** (1 / _DRIFT_HALF_LIFE)
    return latest * decay / (1 - decay)


def mix_days(market: dict[str, pd.DataFrame], seed: int) -> dict[str, pd.DataFrame]:
    """Return validated bars with their days (UTC) in another order: NOT REAL, a market to find nothing in.

    A day moves as a whole, of all coins together, to the place of one with as many bars of each coin. Its
    prices are multiplied: log returns stay, of its first bar over the close before, or its open after a hole.
    """
    days = {symbol: bars["timestamp"].astype("int64") // DAY_MS for symbol, bars in market.items()}
    counts = pd.DataFrame({symbol: day.value_counts() for symbol, day in days.items()}).fillna(0)
    places, rng = pd.Series(counts.index, counts.index), np.random.default_rng([seed, len(counts)])
    for _, alike in counts.sort_index().groupby(list(counts)):
        places[alike.index] = rng.permutation(alike.index)
    mixed = {}
    for symbol, bars in market.items():
        day, place = days[symbol].to_numpy(), places[days[symbol]].to_numpy()
        before = bars["close"].shift().where(follows(bars), bars["open"]).to_numpy()  # close before each bar
        order = np.argsort(place, kind="stable")
        first = np.flatnonzero(np.diff(place[order], prepend=-1))  # bar of each day
        last = np.append(first[1:], len(bars)) - 1
        moves = np.log(bars["close"].to_numpy()[order][last] / before[order][first])
        level = np.log(before[0]) + np.cumsum(moves) - moves  # close before each day, in the new order
        factors = np.repeat(np.exp(level) / before[order][first], last - first + 1)
        moved = bars.iloc[order].reset_index(drop=True)
        moved["timestamp"] += pd.to_timedelta(((place - day) * DAY_MS)[order], "ms")
        moved[_PRICES] = moved[_PRICES].mul(factors, axis=0)
        mixed[symbol] = moved
    return mixed


def not_real(source: str) -> str:
    """Return what must be said beside all results on synthetic or planted bars; "" of real ones."""
    if source.startswith("planted:strength=placebo,"):
        return "NOT REAL: recorded bars, their days in another order"
    if planted := re.match(r"planted:strength=([^,]+),", source):
        return f"NOT REAL: a drift of strength {planted[1]} was planted into recorded bars"
    synthetic = source.startswith("synthetic:")
    return "SYNTHETIC, NOT REAL: what can be predicted in this market was planted" * synthetic


def same_market(source: str, other: str) -> bool:
    """Return whether bars of two sources are of one market, so that their dates can be compared."""
    return source == other or not (not_real(source) or not_real(other))


def read_csv(data: bytes) -> pd.DataFrame:
    """Read bars from CSV: any separator, with or without a header, perhaps after a line of remarks."""
    lines = data[:100_000].decode("utf-8-sig", errors="replace").splitlines()
    skipped = next((row for row, line in enumerate(lines) if len(re.split("[,;\t]", line)) > 5), 0)
    first = lines[skipped] if lines else ""
    separator = max(",;\t", key=first.count)
    names = next(csv.reader([first], delimiter=separator), [])
    bare = any(re.fullmatch(r"[\d.,]+", name) for name in names)  # no header: as Binance publishes them
    with warnings.catch_warnings():
        warnings.simplefilter("error", pd.errors.ParserWarning)  # rows with more values than names
        return pd.read_csv(
            io.BytesIO(data),
            sep=separator,
            skiprows=skipped,
            header=None if bare else 0,
            names=bare_columns(len(names)) if bare else [name.strip().lower() for name in names],
            index_col=False,  # otherwise a row with more values than names would be shifted
            decimal="," if separator == ";" and "," in lines[-1] else ".",
            low_memory=False,
            encoding="utf-8-sig",
        )


def bare_columns(count: int) -> list[str]:
    """Return the names of columns that have none; of eight the volume is Kraken's seventh, others' sixth."""
    if count == 8:
        raise ValueError("8 values a row do not tell which is the volume: give the columns names")
    return ["open_time", *_PRICES, "volume", *map(str, range(6, count))][:count]


def read_json(data: bytes) -> pd.DataFrame:
    """Read bars from JSON: a list of lists, as of freqtrade or exchanges, or a list of objects."""
    rows = json.loads(data)
    if not isinstance(rows, list) or not all(isinstance(row, (list, dict)) for row in rows[:1]):
        raise ValueError("it holds no list of bars [[ms, open, high, low, close, volume], ...]")
    if not rows or isinstance(rows[0], dict):
        return pd.DataFrame(rows)
    if len({len(row) for row in rows}) > 1:
        raise ValueError("its bars differ in length")
    return pd.DataFrame(rows, columns=bare_columns(len(rows[0])))


def read_recorded(path: Path, symbol: str) -> pd.DataFrame:
    """Read a file of recorded bars: timestamp (ms), open, high, low, close, volume; oldest first."""
    with _readable(path, lambda _: "replace the file", "cannot be read"):
        data, kind = path.read_bytes(), path.suffix.lower()[1:]
        if data and kind == "zip":
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                other = re.compile(r"__MACOSX/|.*/$|(.*/)?\.")  # a folder, or what macOS adds
                names = [name for name in archive.namelist() if not other.match(name)]
                if len(names) > 1:
                    raise ValueError(f"it holds {len(names)} files instead of one")
                data, kind = archive.read(names[0]) if names else b"", "csv"
        elif kind == "gz":
            data, kind = gzip.decompress(data), path.name.lower().split(".")[-2]
        if not data or data.isspace():
            return pd.DataFrame()
        if b'"planted:' in data:  # in the footer of a file of ours; read as recorded it would lose its mark
            raise UserError(f"{path} holds planted bars, which are NOT REAL: give --source the real ones")
        readers = {"csv": read_csv, "json": read_json, "parquet": pd.read_parquet, "feather": pd.read_feather}
        frame = readers[kind](data if kind in ("csv", "json") else open_file(path))
        if isinstance(frame.index, pd.DatetimeIndex) or any(frame.index.names):
            names = [name or "timestamp" for name in frame.index.names]
            frame = frame.reset_index(names=names, allow_duplicates=True)
        frame.columns = [str(name).strip().lower() for name in frame.columns]
        return chosen_columns(path, symbol, frame)


def chosen_columns(path: Path, symbol: str, frame: pd.DataFrame) -> pd.DataFrame:
    """Return the columns of the bars' open times (as timestamp, ms), prices and volume, oldest first."""
    volumes = [name for name in frame if name[:7] == "volume " and symbol.startswith(name[7:].upper())]
    if "volume" not in frame and volumes:  # CryptoDataDownload: volume btc, in coins; volume usdt, in money
        frame = frame.rename(columns={volumes[0]: "volume"})
    twice = frame.columns[frame.columns.duplicated()].intersection([*_TIMES, *_PRICES, "volume"])
    if len(twice):
        raise UserError(f"{path}: two columns are called {twice[0]!r}: remove or rename one")
    times = [name for name in _TIMES if name in frame]
    if not times or not len(frame):
        return frame
    if times[0] in _OPEN_TIMES:  # says what it is: other columns may hold when bars were fetched
        times = times[:1]
    first, *others = (to_milliseconds(f"{path}, column {name}", frame[name]) for name in times)
    for name, other in zip(times[1:], others, strict=True):
        if (first != other).any():
            raise UserError(f"{path}: {times[0]!r} and {name!r} hold different times: which is open_time?")
    frame = frame.drop(columns=times).assign(timestamp=first)
    return frame[::-1] if (np.diff(first) < 0).all() else frame


def recorded_bars(folder: Path, symbols: list[str]) -> dict[str, pd.DataFrame]:
    """Read, join and validate the symbols' files: BTCUSDT.parquet, BTC_USDT-5m.feather, BTC-USDT.csv, ..."""
    if not folder.is_dir():
        raise UserError(f"no folder {folder}: --source takes synthetic or a folder of recorded bars")
    files: dict[str, dict[str, list[Path]]] = {}  # symbol -> name without month and day -> its files
    for path in sorted(folder.iterdir()):
        if match := _RECORDED.fullmatch(path.name):
            series = match["pair"] if match["part"] else path.name
            files.setdefault(symbol_name(match["pair"]), {}).setdefault(series, []).append(path)
    advice = f"use --symbols with some of {','.join(files)}" if files else "give one per coin, as BTCUSDT.csv"
    for symbol in symbols:
        if symbol not in files:
            raise UserError(f"no file of {symbol} in {folder}: {advice}")
        if len(files[symbol]) > 1:
            names = ", ".join(sorted(path.name for paths in files[symbol].values() for path in paths))
            raise UserError(f"{symbol} has several files in {folder} ({names}): keep one")
    market = {}
    for symbol in tqdm(symbols, "reading", disable=None):
        (paths,) = files[symbol].values()
        parts = [validate_bars(str(path), read_recorded(path, symbol)) for path in paths]
        joined = pd.concat(parts).drop_duplicates().sort_values("timestamp")  # a month and its days overlap
        market[symbol] = validate_bars(f"{folder}, all files of {symbol}", joined)
    return market


# --- features -----------------------------------------------------------------------------------------------


def resample(bars: pd.DataFrame, milliseconds: int) -> pd.DataFrame:
    """Merge gapless 5-minute bars (by OPEN time) into completed longer bars, indexed by CLOSE time."""
    groups = bars.resample(f"{milliseconds // 60_000}min", closed="left", label="right")
    merged = groups.agg({"open": "first", "high": "max", "low": "min", "close": "last", "volume": "sum"})
    whole = groups["close"].count() == milliseconds // BAR_MS  # the first and last may be cut off
    return merged[whole.to_numpy()]


def wilder(values: np.ndarray, window: int) -> np.ndarray:
    """Return Wilder's moving average [T]: the mean of `window` values, then exponential with 1/window."""
    seeded = np.concatenate([[values[:window].mean()], values[window:]])
    average = pd.Series(seeded).ewm(alpha=1 / window, adjust=False).mean()
    return np.concatenate([np.full(window - 1, np.nan), average])


def trailing(values: np.ndarray, window: int, function: Callable[..., np.ndarray]) -> np.ndarray:
    """Apply function(windows [T, window], axis=1) to every trailing window; NaN before the first full one."""
    windows = np.lib.stride_tricks.sliding_window_view(values, window)
    return np.concatenate([np.full(window - 1, np.nan), function(windows, axis=1)])


def compute_channels(bars: pd.DataFrame) -> pd.DataFrame:
    """Compute the 34 channels [T, 34], float64, of one coin's bars at one timeframe, which have no gaps.

    The first 30 rows are NaN, all later ones finite; row t depends only on rows up to t. No channel depends
    on the coin's price or volume scale.
    """
    if len(bars) <= _WARM_UP:
        return pd.DataFrame(np.nan, index=bars.index, columns=CHANNELS)
    # Use a RangeIndex and fillna=False throughout: otherwise ta returns wrong values or sees the future.
    open_, high, low, close, volume = (
        bars[name].astype("float64").reset_index(drop=True) for name in [*_PRICES, "volume"]
    )
    with np.errstate(all="ignore"):  # 0/0 on flat prices or zero volume becomes neutral below
        channels = _raw_channels(open_, high, low, close, volume)
    if unknown := [name for name in CHANNELS if name not in channels]:
        raise UsageError(f"CHANNELS: {unknown[0]} has no formula in _raw_channels of getData.py: add one")
    # Where nothing moves, oscillators keep an old value or divide rounding errors: make them neutral there.
    still7, still14 = (high.rolling(window).max() == low.rolling(window).min() for window in (7, 14))
    idle14, idle20 = (volume.rolling(window).max() == 0 for window in (14, 20))
    oscillators = ("rsi14", "srsi", "stc", "mass", "adx14", "vortex14", "aroonup25", "aroondn25")
    neutral = dict.fromkeys(oscillators, still14)
    neutral |= {"uo": still7, "cmf20": idle20, "mfi14": idle14, "obv14": idle14}
    result = np.empty((len(bars), len(CHANNELS)))
    for column, name in enumerate(CHANNELS):
        values, limit = np.asarray(channels[name], dtype="float64"), _CLIP.get(name, np.inf)
        useless = ~np.isfinite(values) | neutral.get(name, False)
        result[:, column] = np.clip(np.where(useless, 0.0, values), -limit, limit)
    result[:_WARM_UP] = np.nan
    return pd.DataFrame(result, index=bars.index, columns=CHANNELS)


def _raw_channels(
    open_: pd.Series, high: pd.Series, low: pd.Series, close: pd.Series, volume: pd.Series
) -> dict[str, pd.Series | np.ndarray]:
    """Return the channels [T] before clipping, with NaN and inf where they are undefined."""

    def log(share: pd.Series | np.ndarray) -> pd.Series | np.ndarray:
        return np.log(np.maximum(share, 0) + 1e-4)  # floor of 1 bp

    spread = high - low
    usual_volume = volume.rolling(20).median()
    relative_volume = (volume / usual_volume).where(usual_volume > 0, 1.0).where(usual_volume.notna())
    relative_volume = relative_volume.clip(0.05, 20)
    log_high, log_low, log_close = np.log(high), np.log(low), np.log(close)
    ppo = ta.momentum.PercentagePriceOscillator(close, 21, 9, 7)
    pvo = ta.momentum.PercentageVolumeOscillator(volume, 21, 9, 7)
    ichimoku = ta.trend.IchimokuIndicator(high, low, 9, 26, 52)
    bollinger = ta.volatility.BollingerBands(close, 20)
    keltner5, keltner20 = (
        ta.volatility.KeltnerChannel(high, low, close, window).keltner_channel_wband() for window in (5, 20)
    )
    # ta would add the volume of a bar whose close is unchanged.
    moving_volume = volume.where(close.diff() != 0, 0.0)
    balance = ta.volume.OnBalanceVolumeIndicator(close, moving_volume).on_balance_volume()
    # A return times a range: its signed root is comparable between timeframes. ta's is 1e8 times as large.
    ease = ta.volume.EaseOfMovementIndicator(log_high, log_low, relative_volume, 10)
    ease = ease.sma_ease_of_movement() / 1e8

    # The same numbers as ta's ADX, Aroon, ATR, Ulcer and MFI, whose Python loops take most of the time.
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
        "volratio": log(keltner5 / 400) - log(keltner20 / 400),
        "bbkc": log(bollinger.bollinger_wband() / 100) - log(keltner20 / 100),
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


@cache  # every reading of features asks, and parsing takes 0.2 s
def formulas_sha256() -> str:
    """Return a hash of ta's version and of all code here that decides what is stored as features."""
    script, definitions = ast.parse(_SOURCE), {}
    for node in ast.walk(script):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node):
            del node.body[0]
    for part in script.body:
        nodes = [node for node in ast.walk(part) if isinstance(node, ast.Name)]
        names = [node.id for node in nodes if isinstance(node.ctx, ast.Store)]
        for name in [part.name] if hasattr(part, "name") else names:
            definitions.setdefault(name, []).append(part)
    code = {"ta": version("ta")}
    names = ["on_one_grid", "compute_features", "price_table", "split_times", "members_over_time"]
    while names:  # and all that is named in these functions, all that is named there, and so on
        name = names.pop()
        for part in definitions.pop(name, []):
            names += [node.id for node in ast.walk(part) if isinstance(node, ast.Name)]
            code[name] = code.get(name, "") + ast.unparse(part)
    return hashlib.sha256(json.dumps(code, sort_keys=True).encode()).hexdigest()


def last_close(bars: dict[str, pd.DataFrame], absent: bool = False) -> pd.Timestamp:
    """Return the close time of the last bar that every coin has; where some may be absent, that any has."""
    last = [frame["close"].last_valid_index() for frame in bars.values()]
    return (max if absent else min)(last) + pd.Timedelta(BAR_MS, "ms")


def coin_features(bars: pd.DataFrame, start: pd.Timestamp, end: pd.Timestamp) -> dict[str, pd.DataFrame]:
    """Compute timeframe -> one coin's channels [T, K] float32, from `start` (an open) to `end` (a close)."""
    bars = bars.loc[: end - pd.Timedelta(BAR_MS, "ms")]
    absent = bars["close"].isna()
    lives, features = bars[~absent].groupby(absent.cumsum()), {}  # nothing reaches from one into the next
    for name, period in TIMEFRAMES.items():
        step = pd.Timedelta(period, "ms")
        times = pd.date_range(start.ceil(step) + step, end.floor(step), freq=step, unit="ms")
        channels = pd.concat([compute_channels(resample(life, period)) for _, life in lives])
        features[name] = channels.astype(np.float32).reindex(times)
    return features


def map_coins(title: str, function: Callable, bars: dict[str, pd.DataFrame], *arguments: Iterable) -> dict:
    """Return symbol -> function(its bars, *its arguments), computed in one process per core."""
    interrupts = []
    with ProcessPoolExecutor(min(len(bars), os.cpu_count() or 1), initializer=_end_with_parent) as pool:
        handler = signal.signal(signal.SIGINT, lambda *_: interrupts.append(True))
        parts = pool.map(function, bars.values(), *arguments)  # a start that is cut short would hang at exit
        signal.signal(signal.SIGINT, handler)
        try:
            if interrupts:
                raise KeyboardInterrupt
            return dict(zip(bars, tqdm(parts, title, len(bars), disable=None), strict=True))
        except BrokenProcessPool as error:
            raise UserError(f"{title}: a process was killed (memory full?): use fewer --symbols") from error
        finally:
            pool.shutdown(cancel_futures=True)


def _end_with_parent() -> None:
    """Leave Ctrl-C to the parent, and end with it: this worker would wait for its next task for ever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def compute_features(bars: dict[str, pd.DataFrame], absent: bool = False) -> dict[str, pd.DataFrame]:
    """Compute timeframe -> channels [T, N*K], float32, by CLOSE time up to `last_close`; NaN in warm-ups."""
    limits = next(iter(bars.values())).index[0], last_close(bars, absent)
    coins = map_coins("features", coin_features, bars, *(itertools.repeat(limit) for limit in limits))
    frames = {}
    for name in TIMEFRAMES:
        parts = [coins[symbol][name].add_prefix(f"{symbol}.") for symbol in bars]
        frames[name] = pd.concat(parts, axis=1).rename_axis("close_time")
    return frames


def newest_features(bars: dict[str, pd.DataFrame], rows: Sequence[int]) -> dict[str, pd.DataFrame]:
    """Compute the last `rows[k]` rows of each timeframe k of `compute_features` alone, in this process.

    Exponential averages begin _MEMORY bars of their timeframe earlier instead of at the listing, which
    changes values by less than 1e-4 standard deviations. Where history is shorter there are fewer rows.
    """
    last = last_close(bars)
    frames = {}
    for (name, period), count in zip(TIMEFRAMES.items(), rows, strict=True):
        step = pd.Timedelta(period, "ms")
        first, end = last.floor(step) - (count + _MEMORY) * step, last - pd.Timedelta(BAR_MS, "ms")
        parts = []
        for symbol, frame in bars.items():
            listed = frame.loc[max(first, frame["close"].first_valid_index()) : end]
            channels = compute_channels(resample(listed, period)).astype(np.float32)
            parts.append(channels.iloc[-count:].add_prefix(f"{symbol}."))
        frames[name] = pd.concat(parts, axis=1).rename_axis("close_time")
    return frames


def look_back_ms(rows: Sequence[int]) -> int:
    """Return how much history `newest_features` uses for so many rows of each timeframe, in ms."""
    counts = zip(rows, TIMEFRAMES.values(), strict=True)
    return max((count + _MEMORY + 1) * period for count, period in counts)


def coin_leaks(
    bars: pd.DataFrame, start: pd.Timestamp, end: pd.Timestamp, rows: Iterable[int], seed: int
) -> dict[tuple[str, str], int]:
    """Find one coin's features that change before a row when the bars from there on do.

    They are cut off there, or two days of them have other prices and volumes. Returns (timeframe, channel) ->
    the most bars (of the timeframe) by which a value changed too early.
    """
    rng = np.random.default_rng(seed)
    truth = coin_features(bars, start, end)
    leaks: dict[tuple[str, str], int] = {}
    for row in rows:
        longer = bars.iloc[: row + 2 * DAY_MS // BAR_MS].copy()
        factors = np.exp(rng.normal(0, 0.5, (2, len(longer) - row, 1)))  # of all prices, and of the volumes
        longer.iloc[row:, :5] *= np.concatenate([*[factors[0]] * 4, factors[1]], axis=1)
        for changed in (bars.iloc[:row], longer):
            last = min(end, changed.index[-1] + pd.Timedelta(BAR_MS, "ms"))
            for name, features in coin_features(changed, start, last).items():
                before = truth[name].loc[: bars.index[row]]  # the close of the last unchanged bar
                after = features.reindex(before.index)
                bits, changed_bits = (np.ascontiguousarray(frame).view(np.int32) for frame in (before, after))
                differs = (bits != changed_bits) & ~(before.isna() & after.isna()).to_numpy()
                for column in np.flatnonzero(differs.any(axis=0)):
                    reach = len(before) - int(differs[:, column].argmax())
                    leaks[name, CHANNELS[column]] = max(leaks.get((name, CHANNELS[column]), 0), reach)
    return leaks


def find_leaks(
    bars: dict[str, pd.DataFrame], cuts: int, seed: int, absent: bool = False
) -> dict[tuple[str, str, str], int]:
    """Find the `coin_leaks`, by symbol too, at `cuts` random moments of each coin, half of them midnights."""
    start, ends = next(iter(bars.values())).index[0], []
    rng = np.random.default_rng(seed)
    rows = []
    for symbol, frame in bars.items():
        ends.append(last_close({symbol: frame} if absent else bars))
        warm = frame["close"].first_valid_index().ceil("1D") + pd.Timedelta(days=_WARM_UP + 2)
        first, stop = frame.index.searchsorted(warm), frame.index.searchsorted(ends[-1])
        if first >= stop:
            if not absent:
                raise UserError(f"{symbol}: too little history to check: {_WARM_UP + 3} days needed")
            print(f"{symbol}: not checked, its history is shorter than {_WARM_UP + 3} days")
            rows.append([])
            continue
        moments = frame.index[rng.integers(first, stop, cuts)]
        # At midnight a bar of every timeframe ends: what sees only 5 minutes ahead shows only there.
        rows.append(frame.index.get_indexer([*moments[::2], *moments[1::2].floor("1D")]).tolist())
    coins = map_coins("checking", coin_leaks, bars, [start] * len(bars), ends, rows, itertools.count(seed))
    return {(symbol, *column): reach for symbol, leaks in coins.items() for column, reach in leaks.items()}


def price_table(bars: dict[str, pd.DataFrame], members: pd.DataFrame | None = None) -> pd.DataFrame:
    """Return SYMBOL.open and SYMBOL.close, float64, by CLOSE time, up to `last_close`.

    With `members` [T, N] also SYMBOL.member; a coin has no price after its last real bar, nor in a hole.
    """
    table = {}
    for symbol, frame in bars.items():
        if members is not None:
            real = frame["close"].notna() & ~frame["filled"]
            last = real.cumsum()  # real bar
            over = frame["close"].isna().groupby(last).transform("any") | (last == last.iloc[-1])
            frame = frame.where(real | ~over)
        table |= {f"{symbol}.{name}": frame[name] for name in ("open", "close")}
        table |= {} if members is None else {f"{symbol}.member": members[symbol].astype(np.float64)}
    prices = pd.DataFrame(table)
    prices.index = (prices.index + pd.Timedelta(BAR_MS, "ms")).rename("close_time")
    return prices[: last_close(bars, members is not None)]


def members_over_time(bars: dict[str, pd.DataFrame], universe: int, days: int) -> pd.DataFrame:
    """Return which coins may be held after each bar [T, N]: those that have been there for so many `days`.

    With a `universe` from the first of each month on only so many of them, those with the largest median
    daily quote volume over the 30 days before.
    """
    there = pd.DataFrame({symbol: frame["close"].notna() for symbol, frame in bars.items()})
    number = np.arange(len(there))[:, None]
    last_absent = np.maximum.accumulate(np.where(there, -1, number))
    old = (number - last_absent >= days * BARS_PER_DAY) & there
    if not universe:
        return old
    volume = pd.DataFrame({symbol: frame["close"] * frame["volume"] for symbol, frame in bars.items()})
    median = volume.resample("1D").sum().rolling(30).median().shift()  # of the days before
    first = there.index[(there.index.day == 1) & (there.index == there.index.normalize())]
    chosen = pd.DataFrame(False, first, there.columns)
    for month in first:
        chosen.loc[month, median.loc[month][old.loc[month]].nlargest(universe).index] = True
    return there & chosen.reindex(there.index, method="ffill").eq(True)


def split_times(
    bars: dict[str, pd.DataFrame], shares: tuple[float, ...], purge_days: int,
    members: pd.DataFrame | None = None,
) -> dict[str, list[int]]:  # fmt: skip
    """Cut the usable decision times into train, validation and test: name -> [first, end) in ms.

    Usable times run from the close at which the youngest coin's daily channels are finite to the last common
    bar. The purge is dropped from the start of validation and test: no outcome crosses, and what is decided
    there may look back. With `members` [T, N], where coins may be absent, only bars with a member count.
    """
    listed = {symbol: frame["close"].first_valid_index() for symbol, frame in bars.items()}
    youngest = (max if members is None else min)(listed, key=listed.get)
    end = last_close(bars, members is not None)
    history = end - listed[youngest]
    warm = listed[youngest].ceil("1D") + pd.Timedelta(days=_WARM_UP + 1)
    needed = warm + pd.Timedelta(days=math.ceil((purge_days + 1) / min(shares))) - listed[youngest]
    if history <= pd.Timedelta(0):
        oldest = min(bars, key=lambda symbol: bars[symbol]["close"].last_valid_index())
        begins = f"{youngest} begins on {listed[youngest]:%Y-%m-%d}: leave one of them out of --symbols"
        raise UserError(f"no common history: {oldest} ends on {end:%Y-%m-%d}, before {begins}")
    if history < needed:
        days = f"{needed.ceil('1D').days} days needed, {history / pd.Timedelta(days=1):.1f} found"
        advice = "collect more days, or leave that symbol out"
        raise UserError(f"too little history: {days} ({youngest} has the fewest): {advice}")
    starts = [warm + (end - warm) * share for share in (0.0, shares[0], shares[0] + shares[1])]
    if members is not None:
        usable = members.index[members.any(axis=1) & (members.index >= warm)]
        if len(usable) < (needed + listed[youngest] - warm) // pd.Timedelta(BAR_MS, "ms"):
            raise UserError(f"too little history: {len(usable)} bars with a member: collect more days")
        starts = [usable[int(len(usable) * share)] for share in (0.0, shares[0], shares[0] + shares[1])]
    first, second, third = (int(start.timestamp() * 1000) // BAR_MS * BAR_MS for start in starts)
    # The last decision is taken at the close of the last bar, so the (exclusive) end is one bar later.
    stop, purge = int(end.timestamp() * 1000) + BAR_MS, purge_days * DAY_MS
    return {"train": [first, second], "validation": [second + purge, third], "test": [third + purge, stop]}


def walk_forward_splits(prices: pd.DataFrame, footer: dict, folds: int) -> list[dict[str, list[int]]]:
    """Cut the decision times of load_prices' table into the splits of each walk-forward fold, in order.

    The test splits are the second half of the times at which a coin may be held, in parts of as many. What is
    before, but for the purge, is for training and validation in proportion. UserError: a split under a day.
    """
    shares, purge, members = footer["split_shares"], footer["purge_ms"], members_of(prices, footer["symbols"])
    first, end = footer["splits"]["train"][0], footer["splits"]["test"][1]
    usable = prices.index.as_unit("ms").asi8[slice(None) if members is None else members.any(1)]
    usable = usable[(usable >= first) & (usable < end)]
    edges = [int(usable[len(usable) * k // (2 * folds)]) for k in range(folds, 2 * folds)]
    cut = []
    for test, stop in itertools.pairwise([*edges, end]):
        before = usable[: usable.searchsorted(test - 2 * purge)]  # of training and validation together
        second = int([*before, test][round(len(before) * shares[0] / (shares[0] + shares[1]))])
        fold = {"train": [first, second], "validation": [second + purge, test - purge], "test": [test, stop]}
        cut.append(fold)
        bars = {name: np.diff(usable.searchsorted(times))[0] for name, times in fold.items()}
        days, name = min((count / BARS_PER_DAY, name) for name, count in bars.items())
        if days < 1:
            only = f"one has only {days:.1f} days of {name}"
            raise UserError(f"too little history for {folds} folds: {only}: use fewer or collect more days")
    return cut


# --- collecting from an exchange: one sequential pager per symbol, a few symbols at a time ------------------


class CarefulClient:
    """Mixin for a ccxt class: raise where ccxt ignores a fault; make all workers wait when told to."""

    rate_share: float  # this and the next as the constants of these names
    base_url: str
    paused_until = 0.0  # monotonic seconds; no worker sends earlier, since a ban is for the whole machine
    ahead = 0  # ms by which the exchange's clock is ahead of this machine's

    def describe(self) -> dict:
        """Extend ccxt's description: a share of the rate limit, only spot pairs, base_url as the host."""
        description = super().describe()
        description["rateLimit"] /= self.rate_share or 1e9  # ms per unit of cost
        # Allows bursts; ccxt's default limiter spaces requests and gives no credit for idle time.
        description["rateLimiterAlgorithm"] = "rollingWindow"
        if self.base_url:
            hosts = re.compile(r'(?<=")https?://[^/"]+')
            urls = hosts.sub(lambda _: self.base_url, json.dumps(description["urls"]["api"]))
            description["urls"]["api"] = json.loads(urls)
        options = description.get("options", {}).get("fetchMarkets")
        if isinstance(options, dict) and isinstance(options.get("types"), list):
            options["types"] = ["spot"]  # otherwise ccxt also sends requests to the futures and options hosts
        return description

    def milliseconds(self) -> int:
        """Return the exchange's time in ms; on okx ccxt chooses the endpoint (recent or older bars) by it."""
        return super().milliseconds() + self.ahead

    def pause(self, seconds: float) -> None:
        """Make all workers wait."""
        self.paused_until = max(self.paused_until, time.monotonic() + seconds)

    def handle_errors(self, status, reason, url, method, headers, body, response, *request) -> None:
        """Handle what ccxt ignores: Retry-After, the weight used, and blocked countries (TryLater)."""
        headers = {name.lower(): value for name, value in headers.items()}
        if status in (418, 429, 503) and "retry-after" in headers:
            number = re.fullmatch(r"\s*\d+(\.\d+)?\s*", headers["retry-after"])
            seconds = min(float(number[0]), 366 * 86_400) if number else 60  # in place of a date
            self.pause(seconds + random.uniform(0, 0.5))
        weight = float(headers.get("x-mbx-used-weight-1m") or 0)
        if weight > self.rate_share * _WEIGHT_LIMITS.get(self.id, 0) > 0:
            self.pause(60 - time.time() % 60)
        if status == 451 or "restricted location" in body or (status == 403 and "country" in body):
            raise TryLater(f"{self.id} does not serve this country: try --exchange binanceus, kraken or okx")
        super().handle_errors(status, reason, url, method, headers, body, response, *request)

    async def fetch(self, *request) -> list | dict:
        """Send when no pause is left; return the answer, kept for parse_ohlcvs before another worker runs."""
        while (seconds := self.paused_until - time.monotonic()) > 0:
            if seconds > _MAX_BAN:
                until = when(1000 * (time.time() + seconds))
                raise TryLater(f"{self.id} accepts no requests before {until} UTC: run again then")
            await asyncio.sleep(seconds)
        self.answer = await super().fetch(*request)
        if not isinstance(self.answer, (list, dict)):
            raise ValueError(f"not JSON: {str(self.answer)[:40]!r}")
        return self.answer

    def parse_ohlcvs(self, rows, market=None, *_: object, **__: object) -> list[list]:
        """Return all rows unsorted and unfiltered, since the checks must see what ccxt would drop."""
        if not isinstance(rows, list) or not all(isinstance(row, (list, dict)) for row in rows):
            raise ValueError("not a list of bars")
        if not rows and not holds_empty_list(self.answer):  # ccxt replaces a missing list by an empty one
            raise ValueError(f"no list of bars: {str(self.answer)[:40]}")
        return [self.parse_ohlcv(row, market) for row in rows]


def holds_empty_list(answer: object) -> bool:
    """Return whether an answer holds an empty list anywhere, other than its list of errors."""
    if isinstance(answer, dict):
        return any(holds_empty_list(part) for name, part in answer.items() if name not in ("error", "errors"))
    return isinstance(answer, list) and (not answer or any(map(holds_empty_list, answer)))


def near_names(name: str, names: Iterable[str]) -> str:
    """Return a hint for a misspelt name, or "" if no name is similar."""
    near = difflib.get_close_matches(name, list(names), n=4, cutoff=0.5)
    return f": did you mean {' or '.join(near)}?" if near else ""


class SymbolBars:
    """The bars of one symbol while they are collected: those of its source in its file, and later ones."""

    def __init__(self, text: str, data_dir: Path, source: str, command: str) -> None:
        self.text, self.symbol = text, symbol_name(text)
        self.data_dir, self.source, self.command = data_dir, source, command
        self.path = data_dir / "ohlcv" / f"{self.symbol}.parquet"
        self.bars = np.empty((0, 6))  # time in ms, open, high, low, close, volume; sorted by time
        self.spans = []  # sorted disjoint [start, stop) in ms; all the exchange's bars there are in `bars`
        self.revisions = 0  # stored bars that the exchange has replaced by others
        self.unsaved_pages = 0
        self.quote = ""  # the currency in which prices are, where it is clear
        self.error: UserError | None = None
        if re.search(r"[-_/](\w+)[_:]\1\b", text.upper()):  # symbol_name drops what a future settles in
            raise UsageError(f"{source} has no spot pair {text}, which names a future: leave its end out")
        if self.path.exists() and read_footer(self.path, "source")["source"] == source:
            self.bars = bar_array(read_frame(self.path))
            footer = read_footer(self.path, "spans", "revisions")
            self.spans, self.revisions = footer["spans"], footer["revisions"]
            self.quote = footer.get("quote", "")

    def frame(self) -> pd.DataFrame:
        """Return the bars as `on_one_grid` takes them."""
        times = pd.to_datetime(self.bars[:, 0].astype(np.int64), unit="ms", utc=True).as_unit("ms")
        return pd.DataFrame(self.bars[:, 1:], index=times, columns=[*_PRICES, "volume"])

    def end(self) -> int:
        """Return the close time of the last bar in ms, 0 if there is none."""
        return int(self.bars[-1, 0]) + BAR_MS if len(self.bars) else 0

    def last_before(self, time_ms: int) -> np.ndarray | None:
        """Return the last bar [6] before a time in ms, or None."""
        row = int(np.searchsorted(self.bars[:, 0], time_ms))
        return self.bars[row - 1] if row else None

    def overlapping(self, page: np.ndarray) -> slice:
        """Return which of the stored bars are from the first to the last time of a page [n, 6]."""
        edges = [page[0, 0], page[-1, 0] + 1] if len(page) else [0, 0]
        return slice(*np.searchsorted(self.bars[:, 0], edges))

    def merge(self, page: np.ndarray, start: int, stop: int) -> None:
        """Put a confirmed page [n, 6] in place of the bars of its time, and add [start, stop) to spans."""
        old = self.overlapping(page)
        self.revisions += int((~rows_in(self.bars[old], page)).sum())
        self.bars = np.concatenate([self.bars[: old.start], page, self.bars[old.stop :]])
        self.spans = with_interval(self.spans, start, stop)
        self.unsaved_pages += 1
        if self.unsaved_pages >= _FLUSH_PAGES:
            self.save()

    def save(self) -> None:
        """Write the file if bars were received since it was last written."""
        if self.unsaved_pages and len(self.bars):
            bars = validate_bars(self.symbol, self.frame().reset_index(names="timestamp"))
            more = {"spans": self.spans, "revisions": self.revisions, "quote": self.quote}
            store_bars(self.data_dir, self.symbol, bars, self.source, self.command, **more)
        self.unsaved_pages = 0

    def missing_spans(self, start: int, stop: int, settled: int) -> list[list[int]]:
        """Return the intervals to be fetched, in ms: of [start, stop), between that and the stored spans,
        and gaps younger than `settled`, which may have been filled since."""
        if spans := self.spans:
            start, stop = min(start, spans[0][1]), max(stop, spans[-1][0])
        for first, count in find_gaps(self.bars).tolist():
            if first + count * BAR_MS > settled:
                spans = without_interval(spans, first, first + count * BAR_MS)
        missing = [[start, stop]]
        for span in spans:
            missing = without_interval(missing, *span)
        return missing


def with_interval(intervals: list[list[int]], start: int, stop: int) -> list[list[int]]:
    """Return sorted disjoint intervals joined with [start, stop)."""
    apart = [[a, b] for a, b in intervals if b < start or a > stop]
    touching = [[a, b] for a, b in intervals if b >= start and a <= stop]
    return sorted([*apart, [min([start, *(a for a, _ in touching)]), max([stop, *(b for _, b in touching)])]])


def without_interval(intervals: list[list[int]], start: int, stop: int) -> list[list[int]]:
    """Return sorted disjoint intervals with [start, stop) cut out."""
    pieces = [piece for a, b in intervals for piece in ([a, min(b, start)], [max(a, stop), b])]
    return [[a, b] for a, b in pieces if a < b]


def rows_in(rows: np.ndarray, page: np.ndarray) -> np.ndarray:
    """Return for each of rows [m, 6] whether the sorted page [n, 6] holds an identical bar: [m] bool."""
    if not len(page):
        return np.zeros(len(rows), bool)
    places = np.searchsorted(page[:, 0], rows[:, 0]).clip(max=len(page) - 1)
    return (page[places] == rows).all(axis=1)


def clean_page(rows: np.ndarray, since: int, last_close: int) -> tuple[np.ndarray, str]:
    """Return a page's closed bars from `since` on, sorted, without duplicates; and the first fault, or ""."""
    usual = (rows[:, 0] > 1e11) & (rows[:, 0] < 1e14)
    if not usual.all():
        return rows[:0], f"timestamp {rows[int(usual.argmin()), 0]:.0f} is not in milliseconds"
    rows = rows[(rows[:, 0] >= since) & (rows[:, 0] + BAR_MS <= last_close)]
    rows = np.unique(rows, axis=0)
    return rows, broken_rule(rows[:, 0].astype(np.int64), rows[:, 1:])


class Exchange:
    """An exchange of ccxt: requests that are sent again, its clock, and its pairs. It needs no API key."""

    def __init__(self, name: str, base_url: str, rate_share: float, timeout: float, retries: int) -> None:
        import ccxt.async_support as ccxt  # takes a second; other sources do not need it

        if name not in ccxt.exchanges:
            raise UsageError(f"ccxt has no exchange {name!r}{near_names(name, ccxt.exchanges)}")
        settings = {"rate_share": rate_share, "base_url": base_url}
        client = type("Client", (CarefulClient, getattr(ccxt, name)), settings)
        self.client: CarefulClient = client({"timeout": round(timeout * 1000)})
        bars = ((self.client.features or {}).get("spot") or {}).get("fetchOHLCV")
        has = self.client.has
        if not bars or not has["fetchOHLCV"] or "5m" not in self.client.timeframes or has["spot"] is False:
            raise UsageError(f"{name} has no 5-minute spot bars: try --exchange binance, okx or bybit")
        self.name, self.retries = name, retries
        self.quiet = False  # are requests sent again without a word?
        self.page_size = int(bars.get("limit") or 500)  # bars in one answer, at most
        self.last_close = 0  # ms; bars that end by then are closed, by the exchange's clock when last read
        self.pairs: dict[str, dict] = {}  # symbol -> ccxt's description of its pair, where loaded

    async def request(self, what: str, send: Callable[[], Awaitable[object]]) -> object:
        """Return the answer that `send` waits for; after a failure wait, ever longer, and send again."""
        from ccxt.base import errors

        # all but the first: an answer of unexpected structure
        failures = errors.BaseError, LookupError, TypeError, ValueError, AttributeError
        reason, too_fast, began = "", False, time.monotonic()
        for attempt in range(self.retries + 1):
            if attempt:
                pause = min(_BACKOFF_MAX, _BACKOFF_BASE * 2 ** (attempt - 1)) * random.uniform(0.5, 1)
                if too_fast:
                    self.client.pause(pause)
                    pause = self.client.paused_until - time.monotonic()
                if not self.quiet:
                    retry = f"retry {attempt} of {self.retries} in {pause:.0f} s"
                    tqdm.write(f"{what}: no answer ({reason}), {retry}", file=sys.stderr)
                if not too_fast:
                    await asyncio.sleep(pause)
            try:
                return await send()
            except (errors.BadRequest, errors.AuthenticationError, errors.NotSupported) as error:
                raise DataRefused(f"{what}: {self.name} rejects the request ({one_line(error)})") from error
            except failures as error:
                reason = one_line(error)
                too_fast = isinstance(error, (errors.RateLimitExceeded, errors.DDoSProtection))
            if time.monotonic() - began > _PATIENCE:
                break
        blocked = "a firewall or a blocked country? try another --exchange"
        advice = blocked if " 403 " in reason else "run again to continue"
        problem = f"{what}: no answer in {attempt + 1} tries ({reason})"
        raise TryLater(f"{problem}: bars received so far are saved; {advice}")

    async def read_clock(self) -> int:
        """Return the exchange's time in ms, or this machine's if it tells none, and set last_close by it."""

        async def send() -> int:
            clock = await self.client.fetch_time()
            if not isinstance(clock, (int, float)) or not 1e12 < clock < 1e13:
                raise ValueError(f"clock says {clock!r}")
            return int(clock)

        if self.client.has["fetchTime"]:
            clock = await self.request("clock", send)
            self.client.ahead += clock - self.client.milliseconds()
        else:
            clock = self.client.milliseconds()
        self.last_close = (clock - _SETTLE) // BAR_MS * BAR_MS
        return clock

    def warn_of_clock(self) -> None:
        """Print by how much this machine's clock differs from the exchange's, if that is much."""
        if abs(self.client.ahead) > 30_000:
            apart = f"{-self.client.ahead / 1000:+,.0f} s"
            print(f"this machine's clock is {apart} from {self.name}'s, which is used", file=sys.stderr)

    async def wait_for_bar(self, after: int, poll: float) -> None:
        """Wait until bars later than `after` (ms) have closed by the exchange's clock. Since that may jump,
        it is read every `poll` seconds, or when the bar should have closed if that is sooner."""
        while True:
            clock = await self.read_clock()
            if self.last_close > after:
                return
            left = (after + BAR_MS + _SETTLE - clock) / 1000
            await asyncio.sleep(min(poll, max(left, 1.0)))

    async def load_pairs(self, stores: list[SymbolBars], quote: str = "", absent: bool = False) -> None:
        """Load the one spot pair of each symbol, all in `quote` or one currency, or raise UserError; a stored
        symbol without a pair gets its error, and others may be `absent`."""

        async def send() -> dict[str, list[dict]]:
            await self.client.load_markets(reload=True)
            # by symbol ccxt keeps the last of several pairs
            pairs = [pair for pairs in self.client.markets_by_id.values() for pair in pairs if pair["spot"]]
            spot = {(pair["symbol"], pair["id"]): pair for pair in pairs}
            if not spot:
                raise ValueError("no pairs")  # as ccxt reads a damaged answer
            names = {name for name, _ in spot}
            meant = {store.symbol: names_meant(store.text, names) for store in stores}
            return {coin: [spot[key] for key in spot if key[0] in meant[coin]] for coin in meant}

        candidates = await self.request("pairs", send)
        if not all(candidates.values()):  # the list may have been cut off
            candidates = await self.request("pairs", send)
        self.pairs = {symbol: pairs[0] for symbol, pairs in candidates.items() if pairs}
        for store in stores:
            names = sorted({pair["symbol"] for pair in candidates[store.symbol]})
            if len(names) > 1:
                raise UsageError(f"{store.text} may be {' or '.join(names)}: write it so in --symbols")
            if len(ids := sorted(pair["id"] for pair in candidates[store.symbol])) > 1:
                raise UsageError(f"{store.text} may be {' or '.join(ids)} on {self.name}: leave it out")
            if names:
                store.quote = self.pairs[store.symbol]["quote"]
            elif len(store.bars):
                advice = "leave it out of --symbols, or use --absent allow"
                store.error = DataRefused(f"{store.symbol} is listed no longer: {advice}")
            elif not absent:
                near = near_names(store.symbol, (symbol_name(name) for name in self.client.symbols))
                raise UsageError(f"{self.name} has no spot pair {store.symbol}{near}")
        check_quotes({store.symbol: store.quote for store in stores}, quote)

    async def update(
        self, stores: list[SymbolBars], start: int, stop: int, pages: tqdm, max_gap: int, max_missing: float
    ) -> None:
        """Bring the bars of [start, stop), in ms, up to date; a symbol that fails gets its error."""
        workers = asyncio.Semaphore(_CONCURRENCY)

        async def collect(store: SymbolBars) -> None:
            async with workers:
                try:
                    for span in store.missing_spans(start, stop, self.last_close - _RECHECK):
                        await Pager(self, store).fill(*span, pages)
                    check_coverage(store.symbol, store.bars, start, stop, max_gap, max_missing)
                except UserError as error:
                    store.error = error
                finally:
                    store.save()  # a failure, too, keeps what was received

        healthy = [store for store in stores if not store.error]
        outcomes = await asyncio.gather(*map(collect, healthy), return_exceptions=True)
        if errors := [error for error in outcomes if error]:  # a full disk, say: all others have saved, too
            raise errors[0]


class Pager:
    """Fetch the bars of one symbol page by page, each page [n, 6] overlapping the stored bars by one."""

    def __init__(self, exchange: Exchange, store: SymbolBars) -> None:
        self.exchange, self.store, self.size = exchange, store, exchange.page_size
        self.latest = 0  # ms; the exchange's latest bar, where it was fetched

    async def fill(self, start: int, stop: int, pages: tqdm) -> None:
        """Fetch the bars of [start, stop)."""
        store = self.store
        rejoined, looked_before = 0, set()
        next_bar = store.bars[store.bars[:, 0] == stop]  # [1, 6], or [0, 6] if none is stored there
        if len(next_bar) and stop - start >= self.size * BAR_MS:
            # find a contradiction now, not after years of pages
            page = await self.fetch(stop, stop + BAR_MS, next_bar[0])
            page = await self.extend_until_agreed(page[:1], stop)
            store.merge(page, stop, int(page[-1, 0]) + BAR_MS)
        while start < stop:
            overlap = store.last_before(start)
            if overlap is not None and start - overlap[0] >= self.size * BAR_MS:
                overlap = None
            since = start if overlap is None else int(overlap[0])
            page = await self.fetch(since, stop, overlap)
            await self.refuse_recent_only(page, since)
            if overlap is not None and not (len(page) and (page[0] == overlap).all()):
                rejoined += 1
                start = await self.rejoin(overlap, rejoined)
                continue
            new = page[(page[:, 0] >= start) & (page[:, 0] < stop)]
            if overlap is None and len(new) and new[0, 0] not in looked_before:
                looked_before.add(new[0, 0])  # once per bar: contradictory answers could make it endless
                earlier = await self.earlier_start(start, new[0])
                if earlier < new[0, 0]:
                    start = earlier
                    continue
            covered = await self.covered_until(page, start, since, stop)
            if covered is None:
                return
            page = page[page[:, 0] < stop + len(next_bar) * BAR_MS]
            if len(next_bar) and covered == stop:
                page = await self.extend_until_agreed(page, stop)
            store.merge(page, start, covered)
            start = covered
            pages.update()

    async def fetch(self, since: int | None, stop: int, overlap: np.ndarray | None) -> np.ndarray:
        """Fetch one page of closed bars from `since` on (None: the latest); it may reach beyond `stop`."""
        exchange, store = self.exchange, self.store
        count = 0 if since is None else min(self.size, (stop - since) // BAR_MS)
        fault, previous = "", None

        async def send() -> np.ndarray:
            pair, limit = exchange.pairs[store.symbol]["symbol"], min(self.size, count + 2)
            rows = await exchange.client.fetch_ohlcv(pair, "5m", since, limit)
            return np.array(rows, dtype=np.float64).reshape(-1, 6)

        for attempt in range(_ASKS):
            if attempt:
                await asyncio.sleep(_CONFIRM_DELAY)
            rows = await exchange.request(store.symbol, send)
            page, fault = clean_page(rows, since or 0, exchange.last_close)
            if not fault:
                trusted = (
                    overlap is not None
                    and len(page) >= count
                    and page[count - 1, 0] == since + (count - 1) * BAR_MS
                    and (page[0] == overlap).all()
                    and rows_in(store.bars[store.overlapping(page)], page).all()
                    and not price_jumps(page)
                )
                if trusted or previous is not None and np.array_equal(page, previous):  # two in a row
                    return page
            previous = None if fault else page
        fault = fault or f"the answers from {when(since)} on differ from one another"
        raise DataRefused(f"{store.symbol}: {exchange.name} sends bad bars, asked {_ASKS} times: {fault}")

    async def earlier_start(self, start: int, bar: np.ndarray) -> int:
        """Return the time, ms, of the first `bar` [6] of a page that overlaps nothing; or, if bars are in the
        page before it, the start of that page: from `start` to there are none."""
        store, first, previous = self.store, int(bar[0]), self.store.last_before(bar[0])
        lowest = [start, *(a for a, _ in store.spans)] if previous is None else [int(previous[0]) + BAR_MS]
        since = max(min(lowest), first - (self.size - 1) * BAR_MS)
        page = await self.fetch(since, first + BAR_MS, None) if since < first else bar[None]
        if not len(page) or page[0, 0] >= first:
            return first
        if start < since:
            store.merge(np.empty((0, 6)), start, since)
        return since

    async def covered_until(self, page: np.ndarray, start: int, since: int, stop: int) -> int | None:
        """Return up to which time, ms, a page from `since` on answers for [start, stop); None: the end."""
        store, exchange = self.store, self.exchange
        if len(page) and page[-1, 0] >= start:
            return min(int(page[-1, 0]) + BAR_MS, stop)
        if not (store.bars[:, 0] == stop).any():
            if self.latest < start:
                latest = await self.fetch(None, 0, None)
                self.latest = int(latest[-1, 0]) if len(latest) else 0
            if self.latest < start:
                # Delisted, or late. Times younger than a week stay open, so that the next run asks again.
                if start < (settled := min(stop, exchange.last_close - _RECHECK)):
                    store.merge(page, start, settled)
                return None
        # Some exchanges answer with a fixed window of time instead of the next bars: go on to the next one.
        created = int(exchange.pairs[store.symbol].get("created") or 0) // BAR_MS * BAR_MS
        return min(stop, max(since + self.size * BAR_MS, 0 if len(store.bars) else created))

    async def rejoin(self, overlap: np.ndarray, back: int) -> int:
        """Replace revised bars from `back` pages before `overlap` [6] on; return where to go on, ms."""
        store, last = self.store, int(overlap[0])
        first = max(0, int(np.searchsorted(store.bars[:, 0], last)) - back * (self.size - 1))
        anchor = store.bars[first]
        page = await self.fetch(int(anchor[0]), last + BAR_MS, anchor)
        agrees = len(page) and (page[0] == anchor).all()
        if back > _REJOIN_PAGES or (first == 0 and not agrees):
            raise self.history_error(page, f"up to {when(last)}")
        if not agrees:
            return last + BAR_MS
        page = page[page[:, 0] <= last]
        store.merge(page, int(anchor[0]), int(page[-1, 0]) + BAR_MS)
        return int(page[-1, 0]) + BAR_MS

    async def extend_until_agreed(self, page: np.ndarray, stored_from: int) -> np.ndarray:
        """Extend a page past revised bars, until its last bar is stored, at `stored_from` (ms) or later."""
        more = page
        for _ in range(_REJOIN_PAGES + 1):
            if rows_in(page[-1:], self.store.bars[self.store.bars[:, 0] >= stored_from]).any():
                return page
            if not len(page):
                break
            since = int(page[-1, 0])
            more = await self.fetch(since, since + self.size * BAR_MS, page[-1])
            if not len(more) or (more[0] != page[-1]).any():
                break
            page = np.concatenate([page, more[1:]])
        raise self.history_error(more, f"from {when(stored_from)} on")

    def history_error(self, page: np.ndarray, where: str) -> UserError:
        """Return the error for a page, empty or not, that the exchange sends in place of the stored bars."""
        symbol, name = self.store.symbol, self.exchange.name
        if not len(page):
            return TryLater(f"{symbol}: {name} returns none of the bars stored {where}: run again later")
        advice = f"move {self.store.path} away to collect them again"
        return DataRefused(f"{symbol}: {name} no longer returns the bars stored {where}: {advice}")

    async def refuse_recent_only(self, page: np.ndarray, since: int) -> None:
        """Refuse an exchange that serves only its most recent bars, whatever time is requested."""
        recent = self.exchange.last_close - (self.size + 2) * BAR_MS
        if len(page) < self.size - 1 or page[0, 0] <= since or page[0, 0] < recent:
            return
        few = await self.fetch(since, since + BAR_MS, None)
        if 0 < len(few) < len(page) and (few[0] == page[0]).all():
            return  # a shorter page starts there too: a late listing, not the latest bars
        served = f"only its last {self.size} bars, now from {when(page[0, 0])} on, not from {when(since)}"
        advice = "use another --exchange, or a later --start with an empty --data-dir"
        raise DataRefused(f"{self.store.symbol}: {self.exchange.name} serves {served}: {advice}")


async def collect_from_exchange(command: str) -> int:
    """Bring the stored bars of all SYMBOLS up to date, and return the exit code: 0, 3 or 4."""
    start, end = parse_date(START), parse_date(END) if END else None
    stores = [SymbolBars(text, DATA_DIR, EXCHANGE, command) for text in SYMBOLS]
    exchange = Exchange(EXCHANGE, BASE_URL, RATE_SHARE, TIMEOUT, _MAX_RETRIES)
    max_gap = MAX_GAP * (ABSENT == "refuse")
    try:
        clock = await exchange.read_clock()
        exchange.warn_of_clock()
        if (wait := _SETTLE - clock % BAR_MS) > 0 and not END:  # the last trades of a bar that just closed
            await asyncio.sleep(wait / 1000)
            exchange.last_close += BAR_MS
        stop = min(end, exchange.last_close) if END else exchange.last_close
        if start >= stop:
            raise UsageError(f"no closed bars from {when(start)} to {when(stop)}: give an earlier --start")
        spans = {store: store.missing_spans(start, stop, exchange.last_close - _RECHECK) for store in stores}
        if behind := [store for store in stores if spans[store]]:
            await exchange.load_pairs(behind, QUOTE)
        ended = [store for store in behind if store.error] if ABSENT == "allow" else []
        length = BAR_MS * (exchange.page_size - 1)  # of a page, which overlaps the one before
        pages = sum(math.ceil((b - a) / length) for a, b in itertools.chain(*spans.values()))
        with tqdm(total=pages, desc=f"bars from {EXCHANGE}", unit="page", disable=not pages or None) as bar:
            await exchange.update(stores, start, stop, bar, max_gap, MAX_MISSING)
        for store in ended:  # its bars stay
            store.error = None
    finally:
        await exchange.client.close()
    market, notes = {store.symbol: store.bars for store in stores}, []
    for count, error in ((store.revisions, store.error) for store in stores):
        revised = f"{count} bar{'s' * (count > 1)} revised by the exchange" * bool(count)
        notes.append("; ".join(filter(None, (revised, "incomplete" * bool(error)))))
    print_overview(market, start, stop, MAX_GAP - max_gap, notes)
    errors = [store.error for store in stores if store.error]
    for error in errors:
        print(f"error: {error}", file=sys.stderr)
    if not errors:
        check_times(market, TRUST_TIMES)
    return max((error.code for error in errors), default=0)


def parse_date(text: str) -> int:
    """Return an ISO date (UTC unless it names a zone) in ms, rounded down to the start of its bar."""
    try:
        date = datetime.fromisoformat(text)
        date = (date if date.tzinfo else date.replace(tzinfo=UTC)).astimezone(UTC)
    except (ValueError, OverflowError) as error:
        raise UsageError(f"{text!r} is not an ISO date, as 2024-01-31 or 2024-01-31T12:00") from error
    return int(date.timestamp() * 1000) // BAR_MS * BAR_MS


def set_damaged_aside(folder: Path, source: str) -> None:
    """Rename damaged files, so that they are fetched again, unless others are of another source."""
    damaged, sources = {}, set()
    for path in sorted(folder.glob("[!.]*.parquet")):
        try:
            footer = read_footer(path, "source", "values_sha256")
            sources.add(footer["source"])
            if values_sha256(read_frame(path)) != footer["values_sha256"]:
                raise ValueError("the values do not match their checksum")
        except (UserError, ValueError, LookupError, TypeError, AttributeError) as error:
            damaged[path] = one_line(error)
    for path, reason in damaged.items() if sources <= {source} else ():
        os.replace(path, path.with_name(path.name + ".corrupt"))
        print(f"{path} is damaged ({reason}): renamed to .corrupt and fetched again", file=sys.stderr)
    for path in folder.glob("*.tmp"):
        path.unlink()


@contextmanager
def locked(folder: Path, script: str = "getData.py") -> Iterator[None]:
    """Keep others out of a folder (TryLater: one is there) until this process ends, or even is killed."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(folder / ".lock", timeout=0).acquire()  # which forked workers close
    except Timeout as error:
        raise TryLater(f"another {script} is at work in {folder}: run again when it is done") from error
    with lock:
        yield


def features_lock(data_dir: Path) -> FileLock:
    """Return the lock to hold while features are written, or loaded by a training; others wait for it."""
    return FileLock(data_dir / ".features.lock")


# --- the script's own steps ---------------------------------------------------------------------------------


def check_constants() -> list[str]:
    """Refuse constants that make no sense, and return the symbols in plain spelling."""
    symbols = [symbol_name(text) for text in SYMBOLS]
    if not all(symbols) or len(set(symbols)) < len(symbols):
        raise UsageError(f"SYMBOLS must name each coin once, not {','.join(SYMBOLS)}")
    if len(SPLITS) != 3 or abs(sum(SPLITS) - 1) > 1e-9:
        raise UsageError(f"SPLITS must be three positive shares of sum 1, not {','.join(map(str, SPLITS))}")
    for name, value in {"UNIVERSE": UNIVERSE, "BIRTHS_AND_DEATHS": BIRTHS_AND_DEATHS}.items():
        if value and ABSENT == "refuse":
            raise UsageError(f"{name} is of coins that come and go: give --absent allow too")
    if PLANT and SOURCE in ("exchange", "synthetic"):
        instead = "use --signal here" if SOURCE == "synthetic" else "give their folder as --source"
        raise UsageError(f"PLANT adds a drift to recorded bars: {instead}")
    return symbols


def collect_bars(symbols: list[str], command: str) -> int:
    """Fetch, validate and store the bars of all symbols from SOURCE, and return the exit code."""
    sources = {"exchange": EXCHANGE, "synthetic": synthetic_source(SEED, SIGNAL, BIRTHS_AND_DEATHS)}
    source = sources.get(SOURCE) or f"recorded:{Path(SOURCE).resolve()}"
    folder = DATA_DIR / "ohlcv"
    if PLANT:
        source = f"planted:strength={PLANT},seed={SEED} on {source}"
        source += f" ({not_real(source)})"
        for path in sorted(folder.glob("[!.]*.parquet")) + sorted(DATA_DIR.glob("features/[!.]*.parquet")):
            if not (other := read_footer(path, "source")["source"]).startswith("planted:"):
                raise UserError(f"{path} is of {other}, no planted bars: use --data-dir {DATA_DIR}-planted")
    if SOURCE == "exchange":
        set_damaged_aside(folder, EXCHANGE)
    stored = {path: read_footer(path, "source")["source"] for path in sorted(folder.glob("[!.]*.parquet"))}
    foreign = {path: other for path, other in stored.items() if other != source}
    recorded = [other for other in foreign.values() if not other.startswith("synthetic:")]
    if recorded and not REPLACE:
        raise UserError(f"{folder} holds bars of {recorded[0]}: use another --data-dir, or --replace them")
    if SOURCE == "exchange":
        if code := asyncio.run(collect_from_exchange(command)):
            return code
    elif SOURCE == "synthetic":
        market = synthetic_market(symbols, DAYS, SEED, SIGNAL)
        store_market(DATA_DIR, with_lives(market, SEED) if BIRTHS_AND_DEATHS else market, source, command)
    else:
        market = recorded_bars(Path(SOURCE), symbols)
        if PLANT == "placebo":
            market = mix_days(market, SEED)
        elif PLANT:
            market = {symbol: plant_drift(symbol, bars, PLANT, SEED) for symbol, bars in market.items()}
        if PLANT:
            print(not_real(source))
        store_market(DATA_DIR, market, source, command)
    for path, other in foreign.items():
        print(f"{path.stem}: bars of {other} {'replaced' if path.stem in symbols else 'removed'}")
        if path.stem not in symbols:
            path.unlink()
    return 0


def synthetic_source(seed: int, signal: float, lives: bool = False) -> str:
    """Return the name under which the bars of a synthetic market are stored."""
    return f"synthetic:seed={seed}:signal={float(signal)}{':births-and-deaths' * lives}"


def store_market(data_dir: Path, market: dict[str, pd.DataFrame], source: str, command: str) -> None:
    """Validate and judge the raw bars of all symbols, and only then store them; arguments as `store_bars`."""
    market = {symbol: validate_bars(symbol, raw) for symbol, raw in market.items()}
    arrays = {symbol: bar_array(bars) for symbol, bars in market.items()}
    start = min(int(bars[0, 0]) for bars in arrays.values())
    stop = max(int(bars[-1, 0]) for bars in arrays.values()) + BAR_MS
    limit = MAX_GAP * (ABSENT == "allow")
    print_overview(arrays, start, stop, limit)
    check_quotes(dict.fromkeys(market, ""), QUOTE)
    for symbol, bars in arrays.items():
        check_coverage(symbol, bars, start, stop, MAX_GAP - limit, MAX_MISSING)
    check_times(arrays, TRUST_TIMES)
    for symbol, bars in market.items():
        store_bars(data_dir, symbol, bars, source, command, quote=QUOTE)


def build_features(data_dir: Path, symbols: list[str]) -> None:
    """Compute and write all features and prices, unless the stored ones were made from the same inputs."""
    absent = ABSENT == "allow"
    bars = load_bars(data_dir, symbols, MAX_GAP * absent)
    needed, ohlcv = ("source", "values_sha256", "command"), data_dir / "ohlcv"
    footers = {symbol: read_footer(ohlcv / f"{symbol}.parquet", *needed) for symbol in symbols}
    sources = {footer["source"]: symbol for symbol, footer in footers.items()}
    if len(sources) > 1:
        mixed = ", ".join(f"{symbol} of {source}" for source, symbol in sources.items())
        raise UserError(f"the bars in {data_dir} mix sources ({mixed}): collect all with one --source")
    check_quotes({symbol: footer.get("quote", "") for symbol, footer in footers.items()}, QUOTE)
    footer = {
        "schema": _SCHEMA,
        "formulas_sha256": formulas_sha256(),
        "symbols": symbols,
        "channels": CHANNELS,
        "timeframes": TIMEFRAMES,
        "split_shares": list(SPLITS),
        "purge_ms": PURGE_DAYS * DAY_MS,
        "absent": absent,
        "max_gap": MAX_GAP * absent,
        "universe": UNIVERSE,
        "member_days": MEMBER_DAYS * absent,
        "inputs": {symbol: footers[symbol]["values_sha256"] for symbol in symbols},
        "source": next(iter(sources)),
    }
    folder = data_dir / "features"
    paths = {name: folder / f"{name}.parquet" for name in [*TIMEFRAMES, "prices"]}
    if all(path.exists() and footer.items() <= read_footer(path).items() for path in paths.values()):
        print(f"features: up to date in {folder}")
        return
    members = members_over_time(bars, UNIVERSE, MEMBER_DAYS) if absent else None
    splits, command = split_times(bars, SPLITS, PURGE_DAYS, members), footers[symbols[0]]["command"]
    footer |= {"splits": splits, "command": command}
    frames = compute_features(bars, absent) | {"prices": price_table(bars, members)}
    with features_lock(data_dir):
        for name, frame in tqdm(frames.items(), "writing", disable=None):
            write_parquet(paths[name], frame, footer)
    for name, frame in frames.items():
        print(f"{name}: {len(frame):,} x {frame.shape[1]}")
    for name, (first, stop) in footer["splits"].items():
        print(f"{name}: {when(first)} to {when(stop)} ({(stop - first) / DAY_MS:.1f} days)")
    print(f"source: {footer['source']}\nfeatures: {folder}")


def check_causality(symbols: list[str]) -> None:
    """Print that no feature of the stored bars sees the future, or refuse and print which ones do."""
    ensure_data(DATA_DIR, SEED)
    bars = load_bars(DATA_DIR, symbols, MAX_GAP * (ABSENT == "allow"))
    features, footer = load_features(DATA_DIR) if any(DATA_DIR.glob("features/[!.]*")) else ({}, {})
    stored = {symbol: read_frame(DATA_DIR / "ohlcv" / f"{symbol}.parquet") for symbol in symbols}
    check_times({symbol: bar_array(frame) for symbol, frame in stored.items()}, TRUST_TIMES)
    leaks = find_leaks(bars, _CAUSALITY_CUTS, SEED, ABSENT == "allow")
    if UNIVERSE:
        members = members_over_time(bars, UNIVERSE, MEMBER_DAYS)
        for cut in np.random.default_rng(SEED).integers(BARS_PER_DAY, len(members), _CAUSALITY_CUTS):
            earlier = {symbol: frame.iloc[:cut] for symbol, frame in bars.items()}
            if not members_over_time(earlier, UNIVERSE, MEMBER_DAYS).equals(members.iloc[:cut]):
                raise DataRefused(f"UNIVERSE sees the future: members before row {cut} depend on later bars")
    columns = f"{len(symbols) * len(CHANNELS) * len(TIMEFRAMES):,} columns"
    if not leaks:
        bars = load_bars(DATA_DIR, footer["symbols"], footer["max_gap"]) if features else {}
        formulas = compute_features(bars, footer["absent"]) if features else {}
        for name, frame in features.items():
            if other := [column for column in frame if not frame[column].equals(formulas[name][column])]:
                path = DATA_DIR / "features" / f"{name}.parquet"
                raise DataRefused(f"{path}: {other[0]} is not what the formulas give: {make_again(path)}")
        moments = f"random moments: {len(symbols) * _CAUSALITY_CUTS}"
        print(f"causal: no value of {columns} changes when only later bars change ({moments})")
        print("features: " + ("those that are stored are the formulas'" if features else "none are stored"))
        return
    channels: dict[tuple[str, str, int], list[str]] = {}
    for (symbol, timeframe, channel), reach in leaks.items():
        channels.setdefault((symbol, timeframe, reach), []).append(channel)
    for (symbol, timeframe, reach), names in channels.items():
        print(f"{symbol} @ {timeframe} sees up to {reach} bar{'s' * (reach > 1)} ahead: {','.join(names)}")
    raise DataRefused(f"{len(leaks):,} of {columns} see the future: no value may depend on later bars")


def main(argv: list[str] | None = None) -> int:
    """Do the job: collect bars, compute features, or check that these are causal."""
    flags = set_constants(globals(), argv)
    symbols = check_constants()
    if JOB == "causality":
        check_causality(symbols)
        return 0
    flags = {name: flags[name] for name in flags if name not in ("JOB", "DATA_DIR", "SYMBOLS", "REPLACE")}
    if SOURCE not in ("exchange", "synthetic"):
        flags["SOURCE"] = Path(SOURCE).resolve()
    command = shlex.join(["python", "getData.py", *(flag_text(name, flags[name]) for name in flags)])
    with locked(DATA_DIR):
        code = 0 if JOB == "features" else collect_bars(symbols, command)
        if code:
            print("no features were made, since bars are missing", file=sys.stderr)
        elif JOB != "bars":
            build_features(DATA_DIR, symbols)
    return code


if __name__ == "__main__":
    import getData  # by this name worker processes find their functions, where a profiler is __main__ as well

    # A background job of a shell script ignores Ctrl-C; asyncio stops for it alone, not for SIGTERM.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    getData.run_script(getData.main)
