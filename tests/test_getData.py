"""Flags, files, bars, the synthetic market and the features."""

import cProfile
import gzip
import importlib.util
import io
import json
import os
import pdb
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import ta
from conftest import COINS, put_back
from forked import Script
from hypothesis import given
from hypothesis import strategies as st

import getData
from getData import CHANNELS, TIMEFRAMES, UserError

ROOT = Path(__file__).parents[1]
REAL = Path(os.environ.get("REAL_MARKET", ROOT / ".." / "shared" / "market")) / "dev"
BAR, DAY = 300_000, 86_400_000
PRICES = ["open", "high", "low", "close"]
make, validate = getData.synthetic_market, getData.validate_bars
recorded_market = pytest.mark.skipif(not REAL.is_dir(), reason="no recorded market beside the repository")


@pytest.fixture
def get_data():
    """getData.main with flags, inside this process; the constants are put back after each call."""

    def call(*argv: object) -> int:
        with put_back(getData):
            return getData.main([str(argument) for argument in argv])

    return call


@pytest.fixture(scope="module")
def bars() -> dict[str, pd.DataFrame]:
    """Two coins on one grid, 45 days from 07:35 on, with gaps; the second is listed three days later."""
    raw = make(["AAA", "BBB"], 45, seed=3, signal=1.0)
    raw = {symbol: validate(symbol, frame).set_index("timestamp") for symbol, frame in raw.items()}
    grid = raw["AAA"].index[91:]
    keep = np.random.default_rng(0).random(len(grid)) > 0.02
    keep[[0, -1]] = True
    raw = {"AAA": raw["AAA"].loc[grid[keep]], "BBB": raw["BBB"].loc[grid[864:]]}
    return {symbol: getData.fill_gaps(frame, grid) for symbol, frame in raw.items()}


def refusal(call: Callable, *arguments: object, code: int = 1) -> str:
    """What a call refuses, in one line."""
    with pytest.raises(UserError) as error:
        call(*arguments)
    assert error.value.code == code
    assert "\n" not in str(error.value)
    return str(error.value)


def raw_bars(count: int = 12) -> pd.DataFrame:
    return make(["AAA"], 1, seed=0, signal=0.0)["AAA"].head(count).copy()


def keep(folder: Path, symbol: str, frame: pd.DataFrame, source: str = "recorded:x") -> None:
    """Store bars in a data folder."""
    bars = validate(symbol, frame)
    getData.store_bars(folder, symbol, bars, source, "python getData.py --source x")


def record(folder: Path, frames: dict[str, pd.DataFrame]) -> Path:
    """A folder of recorded bars."""
    folder.mkdir(exist_ok=True)
    for symbol, frame in frames.items():
        frame.to_csv(folder / f"{symbol}.csv", index=False)
    return folder


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*.parquet")}


def same_bits(a: pd.DataFrame, b: pd.DataFrame) -> bool:
    same = a.columns.equals(b.columns) and a.index.equals(b.index)
    return same and a.to_numpy().tobytes() == b.to_numpy().tobytes()


# ------------------------------------------------------------------------------------------- flags and errors


SCRIPT = """
from pathlib import Path
from typing import Annotated, Literal
from getData import Alias, Count, Fraction, Number, Scaled, Seed

# What the job is [all; free]
JOB: Literal["run", "stop"] = "run"
NAME: str = "a"

# Numbers [run; common]
RATE: Fraction = 0.1  # a share, not 100 %
COUNT: Count = 5
LATENT_DIM: Count = 7
SIZES: tuple[Count, ...] = (1, 2)  # of the layers
SEEDS: Annotated[tuple[Seed, ...], Alias("--seed")] = (0,)
WIDTHS: tuple[Count, ...] = Scaled((8, 4), small=(3, 2))

# Levels [stop]
LEVEL: Number = -2.0

# Other things
ON: bool = True
PLACE: Path = Path("data")

PLAIN = 1
_HIDDEN: int = 3
lower: int = 4
"""


@pytest.fixture
def script(tmp_path) -> ModuleType:
    """A module with constants of every kind."""
    path = tmp_path / "script.py"
    path.write_text(f'"""What it does, 100 %."""\n{SCRIPT}')
    spec = importlib.util.spec_from_file_location("script", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_flags_come_from_the_constants(script):
    before = dict(vars(script))
    assert getData.set_constants(vars(script), []) == {}
    assert vars(script) == before
    argv = "--rate 1e-3 --count 5_000 --name b --no-on --sizes 3,4,5 --place /x --latent-dim 128"
    expected = {
        "RATE": 1e-3, "COUNT": 5_000, "NAME": "b", "ON": False, "SIZES": (3, 4, 5), "PLACE": Path("/x"),
        "LATENT_DIM": 128,
    }  # fmt: skip
    assert getData.set_constants(vars(script), argv.split()) == expected
    assert {name: getattr(script, name) for name in expected} == expected
    assert all(type(getattr(script, name)) is type(before[name]) for name in expected)
    assert getData.set_constants(vars(script), ["--on"]) == {"ON": True}


def test_a_flag_may_have_another_name(script):
    for argv in (["--seeds", "4"], ["--seed", "4"]):
        assert getData.set_constants(vars(script), argv) == {"SEEDS": (4,)}
        assert script.SEEDS == (4,)
    for argv in (["--seed", "1", "--seeds", "1"], ["--seed", "-1"], ["--seed", "x"]):
        assert re.search("--seed|SEEDS", refusal(getData.set_constants, vars(script), argv, code=2))
    assert getData.flag_text("SEEDS", (1, 2)) == "--seeds=1,2"
    script.JOB = "stop"  # edited
    assert "--seeds does noth" in refusal(getData.set_constants, vars(script), ["--seed=3"], code=2)


def test_the_marks_of_constants_stand_above_their_group(script):
    marks = getData.constant_marks(vars(script))
    assert marks["JOB"] == marks["NAME"] == ((), "free")
    assert marks["RATE"] == marks["SEEDS"] == (("run",), "common")
    assert marks["LEVEL"] == (("stop",), "")
    assert marks["PLACE"] == ((), "")
    assert [name for name, mark in marks.items() if not mark.has_job("run")] == ["LEVEL"]
    assert len(marks) == 11


@pytest.mark.parametrize(
    "argv",
    ["--plain 1", "--hidden 1", "--lower 1", "--wrong 1", "--count 1.5", "--rate nan",
     "--rate x", "--cou 1", "--sizes 1,x", "--count", "stray", "--count 0", "--rate 1.0", "--sizes 1,0",
     "--job walk", "--level inf", "--on yes"],
)  # fmt: skip
def test_a_wrong_flag_is_a_usage_error(script, argv):
    before = dict(vars(script))
    refusal(getData.set_constants, vars(script), argv.split(), code=2)
    assert vars(script) == before


@pytest.mark.parametrize(
    ("name", "value"),
    [("COUNT", "3"), ("COUNT", True), ("COUNT", 3.0), ("COUNT", 0), ("RATE", 1), ("RATE", False),
     ("LEVEL", float("nan")), ("SIZES", [1, 2]), ("SIZES", ()), ("SIZES", (1, "2")),
     ("ON", 1), ("NAME", None), ("PLACE", "data"), ("JOB", "walk")],
)  # fmt: skip
def test_an_edited_constant_is_checked_too_and_all_are_assigned_or_none(script, name, value):
    before = dict(vars(script))
    said = refusal(getData.assign_constants, vars(script), {"COUNT": 9, name: value}, code=2)
    assert said.startswith(f"{name} = {value!r}: ")
    assert vars(script) == before
    setattr(script, name, value)
    assert refusal(getData.set_constants, vars(script), [], code=2) == said


def test_constants_are_known_and_whole_numbers_are_taken_for_fractions(script):
    said = refusal(getData.assign_constants, vars(script), {"COUNT": 9, "OTHER": 1}, code=2)
    assert said == "OTHER is no constant of script.py"
    getData.assign_constants(vars(script), {"COUNT": 9, "RATE": 0})
    assert (script.COUNT, script.RATE, type(script.RATE)) == (9, 0.0, float)


def test_help_shows_groups_choices_meanings_and_defaults(script, capsys):
    with pytest.raises(SystemExit) as stop:
        getData.set_constants(vars(script), ["--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    order = (
        "What it does, 100 %.", "--job {run,stop} (default: run)", " Numbers (--job run): ",
        "--rate RATE a share, not 100 % (default: 0.1)", "--sizes SIZES of the layers (default: 1,2)",
        "--seed SEEDS the same as --seeds", "--widths WIDTHS (default: 8,4; small: 3,2)",
        " Other things: ", "--on, --no-on (default: True)",
        "--place PLACE (default: data)",
    )  # fmt: skip
    places = [text.index(part) for part in order]
    assert places == sorted(places)
    assert not any(flag in text for flag in ("--plain", "--hidden", "--lower"))


@pytest.mark.parametrize(
    ("failure", "code", "said"),
    [(UserError("do this"), 1, "error: do this"), (KeyboardInterrupt(), 130, "interrupted"),
     (OSError(28, "No space left on device", "x"), 1, "error: No space left on device (x): "),
     (MemoryError(), 1, "error: out of memory (M"), (ZeroDivisionError(), 0, ""), (RuntimeError("x"), 0, ""),
     (RuntimeError("DefaultCPUAllocator: you tried to allocate 8 bytes."), 1, "error: out of memory (R")],
)  # fmt: skip
def test_expected_failures_end_in_one_line_others_keep_their_traceback(failure, code, said, capsys):
    def main() -> int:
        raise failure

    with pytest.raises(SystemExit if code else type(failure)) as stop:
        getData.run_script(main)
    if code:
        assert stop.value.code == code
        errors = capsys.readouterr().err
        assert errors.startswith(said)
        assert errors.count("\n") == 1


def test_a_signal_while_python_ends_is_no_traceback():
    code = """
import atexit, os, signal, getData
signal.signal(signal.SIGTERM, signal.default_int_handler)
atexit.register(os.kill, os.getpid(), signal.SIGTERM)
getData.run_script(lambda: 0)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (result.returncode, result.stderr) == (-signal.SIGTERM, "")


@pytest.mark.parametrize("script", ["getData.py", "feature_reducer.py", "portfolio_env.py", "train.py"])
def test_a_profiler_runs_every_script(script, tmp_path):
    with Script([cProfile.__file__, "-o", tmp_path / "profile", ROOT / script, "--help"]) as process:
        printed, errors = process.communicate()
    assert (process.returncode, errors) == (0, "")
    assert printed.startswith(f"usage: python {script} [flags]")
    assert (tmp_path / "profile").stat().st_size > 0


def test_a_profiler_and_a_debugger_follow_the_features_to_their_processes(get_data, tmp_path):
    flags = ["--data-dir", tmp_path, "--symbols", "AAA,BBB"]
    get_data(*flags, "--job=bars", "--source=synthetic", "--days=45")
    flags = [ROOT / "getData.py", *flags, "--job=features", "--purge-days=0"]
    steps = [part for step in ("b compute_features", "c", "where", "q") for part in ("-c", step)]
    with Script([pdb.__file__, *steps, *flags]) as process:
        printed, errors = process.communicate()
    assert errors == ""
    assert ")compute_features()\n" in printed
    assert not (tmp_path / "features").exists()
    with Script([cProfile.__file__, "-o", tmp_path / "profile", *flags]) as process:
        printed, errors = process.communicate()
    assert (process.returncode, errors) == (0, "")
    assert printed.splitlines()[-1] == f"features: {tmp_path / 'features'}"


def test_a_channel_without_a_formula_is_named(get_data, monkeypatch, tmp_path):
    monkeypatch.setattr(getData, "CHANNELS", [*CHANNELS, "rsi15"])
    flags = ["--source=synthetic", "--days=45", "--purge-days=0", "--symbols=AAA,BBB"]
    assert refusal(get_data, f"--data-dir={tmp_path}", *flags, code=2).startswith("CHANNELS: rsi15 has no")


# ------------------------------------------------------------------------------------------------------ files


def test_parquet_and_footer_come_back_and_files_of_others_are_named(tmp_path):
    index = pd.date_range("2024-01-01", periods=3, freq="5min", tz="UTC", unit="ms", name="close_time")
    frame = pd.DataFrame({"A.ret": np.float32([1, np.nan, 3]), "A.open": [1.0, 2.0, 3.0]}, index)
    path = tmp_path / "new" / "x.parquet"
    getData.write_parquet(path, frame, {"a": [1, {"b": None}]})
    pd.testing.assert_frame_equal(pd.read_parquet(path), frame, check_freq=False)
    assert getData.read_footer(path) == {"a": [1, {"b": None}]}
    assert list(path.parent.iterdir()) == [path]
    path.write_bytes(b"PAR1 cut short")
    assert re.search(r"x.parquet is damaged \(.*\): delete it", refusal(getData.read_footer, path))
    frame.to_parquet(path)
    assert "was not written by getData.py" in refusal(getData.read_footer, path)


def test_tables_are_read_from_memory_that_pyarrow_may_give_back_when_python_has_ended(tmp_path):
    (tmp_path / "x").write_bytes(data := bytes(range(256)) * 256)
    before = pa.total_allocated_bytes()
    reader = getData.open_file(tmp_path / "x")
    assert pa.total_allocated_bytes() - before >= len(data)
    assert reader.read() == data


def test_who_reads_a_file_that_is_replaced_keeps_the_old_one(tmp_path):
    path, many = tmp_path / "x.parquet", pd.DataFrame({"x": np.random.default_rng(0).random(200_000)})
    getData.write_parquet(path, pd.DataFrame({"x": [1.0]}), {"old": True})
    old = path.read_bytes()
    with open(path, "rb") as reader:
        getData.write_parquet(path, many, {"new": True})
        assert reader.read() == old  # replaced as a whole, never written over
    assert getData.read_footer(path) == {"new": True}


def test_a_new_file_is_on_the_disk_before_it_takes_the_place_of_the_old_one(tmp_path, monkeypatch):
    path, calls = tmp_path / "new" / "x", []
    fsync, replace = os.fsync, os.replace

    def note_fsync(descriptor: int) -> None:
        fsync(descriptor)
        calls.append(f"sync {os.path.basename(os.readlink(f'/proc/self/fd/{descriptor}'))}")

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", lambda old, new: [calls.append("replace"), replace(old, new)])
    with getData.replacing(path) as file:
        file.write(b"whole")
        assert not path.exists()
    assert calls == ["sync x.tmp", "replace", "sync new"]
    assert path.read_bytes() == b"whole"
    monkeypatch.setattr(os, "open", lambda *_: os.stat("nowhere"))  # as some network drives, for folders
    with getData.replacing(path) as file:
        file.write(b"new")
    assert path.read_bytes() == b"new"


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), KeyboardInterrupt(), ValueError("other")]
)
def test_an_error_on_the_way_keeps_the_old_file_and_leaves_no_other(tmp_path, error):
    path = tmp_path / "x"
    path.write_bytes(b"old")
    (tmp_path / "x.tmp").write_bytes(b"left by a kill")

    def save() -> None:
        with getData.replacing(path) as file:
            file.write(b"new")
            raise error

    with pytest.raises(type(error)) as raised:
        save()
    assert raised.value is error
    assert getattr(error, "filename", str(path)) == str(path)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["x"]


def test_a_lock_ends_with_its_process_though_its_workers_live_on(tmp_path):
    """A forked worker inherits all open files; the one of the lock must not be among them."""
    code = (
        "import os, sys, time, getData\n"
        "from pathlib import Path\n"
        "with getData.locked(Path(sys.argv[1])):\n"
        "    os.fork()\n"
        "    os.write(1, b'%d\\n' % os.getpid())\n"  # from both: the worker is past its start
        "    time.sleep(60)\n"
    )
    command = [sys.executable, "-c", code, tmp_path]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as process:
        (child,) = {int(process.stdout.readline()) for _ in range(2)} - {process.pid}
        try:
            refused = refusal(lambda: getData.locked(tmp_path).__enter__(), code=3)
            assert refused.startswith("another getData.py is at work in")
            process.kill()
            process.wait()
            os.kill(child, 0)  # it is alive
            with getData.locked(tmp_path):
                pass
        finally:
            os.kill(child, signal.SIGKILL)


# ------------------------------------------------------------------------------------------------- validation


def set_cell(row: int, column: str, value: float):
    def change(frame: pd.DataFrame) -> pd.DataFrame:
        frame.loc[row, column] = value
        return frame

    return change


@pytest.mark.parametrize(
    ("rule", "row", "change"),
    [
        ("non-finite", 5, set_cell(5, "open", np.nan)),
        ("non-finite", 6, set_cell(6, "volume", np.inf)),
        ("price <= 0", 4, set_cell(4, "low", 0.0)),
        ("price <= 0", 4, set_cell(4, "close", -1.0)),
        ("volume < 0", 3, set_cell(3, "volume", -1e-9)),
        ("high/low inconsistent", 7, lambda f: set_cell(7, "high", f["close"][7] * 0.9)(f)),
        ("high/low inconsistent", 8, lambda f: set_cell(8, "low", f["open"][8] * 1.1)(f)),
        ("off the 5-minute grid", 2, lambda f: f.assign(timestamp=f["timestamp"] + (f.index == 2) * 1_000)),
        ("duplicate", 4, lambda f: pd.concat([f[:4], f[3:]])),
        ("unsorted", 6, lambda f: pd.concat([f[:5], f[6:7], f[5:6], f[7:]])),
    ],
)
def test_each_broken_bar_is_refused_by_rule(rule, row, change):
    frame = change(raw_bars())
    when = pd.Timestamp(frame["timestamp"].iloc[row], unit="ms").isoformat()
    assert refusal(validate, "AAA", frame).startswith(f"AAA: bar {row} ({when}): {rule}: ")
    assert "AAA: no bars" in refusal(validate, "AAA", frame[:0])
    assert "AAA: no column 'close'" in refusal(validate, "AAA", frame.drop(columns="close"))


@pytest.mark.parametrize("wrong", [1_704_067_200, 1_704_067_200_000_000, "yesterday", None, float("nan")])
def test_timestamps_in_other_units_are_refused(wrong):
    frame = raw_bars()
    times = frame["timestamp"].astype(object)
    times[3] = wrong
    column = pd.Series(times.tolist()) if not isinstance(wrong, str) else times.astype(str)
    frame["timestamp"] = column
    assert re.match("AAA: bar [03] .*: timestamp is neither", refusal(validate, "AAA", frame))


@pytest.mark.parametrize(("bars", "minutes"), [(2, 10), (12, 60), (288, 1440)])
def test_bars_of_another_timeframe_are_refused_by_their_spacing(bars, minutes):
    frame = make(["AAA"], 30, seed=0, signal=0.0)["AAA"]
    mixed = pd.concat([frame[:288], frame[288::bars]])  # longer bars from the second day on
    for changed, since in ((frame[::bars], "2024-01-01 00:00"), (mixed, "2024-01-02 00:00")):
        said = f"AAA: bars are {minutes} minutes apart from {since} on: "
        assert refusal(validate, "AAA", changed).startswith(said)


@given(st.floats(0.02, 1), st.integers(0, 2**32 - 1))
def test_bars_that_are_missing_at_random_are_no_other_timeframe(share, seed):
    slots = np.flatnonzero(np.random.default_rng(seed).random(20_000) < share)
    assert getData.broken_rule(BAR * slots.astype(np.int64), np.ones((len(slots), 5))) == ""


# -------------------------------------------------------------------------------- one set of rules, and times


def correlated(count: int = 4, days: int = 60) -> dict[str, np.ndarray]:
    """Bars [n, 6] of synthetic coins from 2024-01-01 on."""
    market = make([f"C{coin}" for coin in range(count)], days, seed=1, signal=0.0)
    return {symbol: frame.to_numpy(float) for symbol, frame in market.items()}


def later(bars: np.ndarray, minutes: int, since: str = "2024-01-01", days: int = 999) -> np.ndarray:
    """The same bars, some days of them at other times; these take the place of bars that are there."""
    place = (bars[:, 0] - pd.Timestamp(since).value // 10**6) / DAY
    order = np.argsort((place < 0) | (place >= days), kind="stable")
    inside = ((place >= 0) & (place < days))[order]
    moved = bars[order] + np.outer(inside, [minutes * 60_000, 0, 0, 0, 0, 0])
    return moved[np.unique(moved[:, 0], return_index=True)[1]]


@pytest.mark.parametrize("minutes", [5, -5, 60, 330, -840, 1440])
@pytest.mark.parametrize("count", [3, 10])
def test_a_shift_in_time_is_found_to_the_minute(count, minutes, capsys):
    market = correlated(count)
    assert {shift[1] for shift in getData.find_shifts(market).values()} == {0}
    assert getData.check_times(market) == []
    market["C1"] = later(market["C1"], minutes)
    problem = f"C1: its bars from .* are {abs(minutes)} minutes too {'late' if minutes > 0 else 'early'} "
    assert re.match(f"{problem}.* --trust-times", refusal(getData.check_times, market, code=4))
    assert getData.check_times(market, True) == []
    assert re.match(problem, capsys.readouterr().out)


@pytest.mark.parametrize("minutes", [5, -60, 480])
@pytest.mark.parametrize(
    ("since", "days"),
    [("2024-01-01", 3), ("2024-01-10T19:35", 3), ("2024-02-27", 3), ("2024-01-20", 7), ("2024-02-11", 12)],
)
def test_a_shift_of_days_is_found_wherever_it_lies(since, days, minutes):
    market = correlated()
    market["C2"] = later(market["C2"], minutes, since, days)
    _, shift, first, stop = getData.find_shifts(market)["C2"]
    start = pd.Timestamp(since).value // 10**6
    assert shift == minutes * 60_000
    assert first < start + days * DAY
    assert stop > start


def test_shifts_of_some_months_of_two_coins_of_half_of_them_and_between_gaps_are_named():
    def said(market: dict[str, np.ndarray]) -> str:
        return refusal(getData.check_times, market, code=4)

    market = correlated(days=120)
    market["C2"] = later(market["C2"], -60, since="2024-03-31T01:00")
    month = "from 2024-0(3-31|4-..) .*to 2024-04-.*"
    assert re.match(f"C2: its bars {month} are 60 minutes too early", said(market))
    market = correlated(2)
    market["C1"] = later(market["C1"], 5)
    assert re.match("C0: .* 5 minutes too early|C1: .* 5 minutes too late", said(market))
    market = {symbol: later(bars, 60 * (int(symbol[1]) % 2)) for symbol, bars in correlated(6).items()}
    assert "60 minutes too" in said(market)
    market = correlated(4)
    market["C3"] = market["C3"][np.random.default_rng(2).random(len(market["C0"])) > 0.3]
    assert getData.check_times(market) == []
    market["C3"] = later(market["C3"], 15)
    assert re.match("C3: its bars .* are 15 minutes too late", said(market))


@pytest.mark.parametrize("seed", range(3))
def test_thin_coins_unrelated_ones_and_strong_drifts_are_not_called_shifted(seed):
    """Signs of moves last where a price moves on after rare trades, or by a drift of many bars."""
    rng, market = np.random.default_rng(seed), correlated(6)
    for symbol, share in zip(market, (0.02, 0.1, 0.5), strict=False):
        trades = rng.random(len(market[symbol])) < share
        last = np.maximum.accumulate(np.where(trades, np.arange(len(trades)), 0))
        market[symbol][:, 4] = market[symbol][last, 4]
    slow = rng.random(len(market["C3"])) < 0.4  # the price of five minutes ago
    market["C3"][slow, 4] = np.roll(market["C3"][:, 4], 1)[slow]
    market["ALONE"] = market["C4"].copy()
    market["ALONE"][:, 4] = np.exp(np.cumsum(rng.normal(0, 1e-3, len(slow))))
    getData.check_times(market)
    drifting = make([f"C{coin}" for coin in range(4)], 60, seed, signal=10.0)
    getData.check_times({symbol: frame.to_numpy(float) for symbol, frame in drifting.items()})


def test_coins_that_do_not_move_with_the_others_cannot_be_checked():
    market = correlated(3)
    alone = np.random.default_rng(5).normal(0, 1e-3, len(market["C0"]))
    market["ALONE"] = market["C0"].copy()
    market["ALONE"][:, 4] = 100 * np.exp(np.cumsum(alone))
    market["STILL"] = market["C0"].copy()
    market["STILL"][:, 1:5] = 1.0
    assert getData.check_times(market) == ["ALONE", "STILL"]
    assert getData.check_times({"C0": market["C0"]}) == ["C0"]  # there is nothing to compare it with


@recorded_market
@pytest.mark.parametrize("piece", ["early", "dev", "later"])
def test_recorded_coins_agree_in_time_and_a_shift_of_one_is_found(piece):
    frames = {path.stem: pd.read_parquet(path) for path in sorted((REAL.parent / piece).glob("*.parquet"))}
    market = {name: getData.bar_array(validate(name, raw)) for name, raw in frames.items()}
    assert getData.check_times(market) == []
    assert "SOLUSDT" in market
    first, last = (pd.Timestamp(market["BTCUSDT"][row, 0], unit="ms") for row in (0, -1))
    for symbol, since, days in (
        ("SOLUSDT", first, 12), ("SOLUSDT", last - pd.Timedelta(days=7), 7),
        ("BTCUSDT", first + pd.Timedelta("40D 7h"), 7), ("LTCUSDT", first + pd.Timedelta("71D"), 3),
    ):  # fmt: skip
        since, moment = str(since), since.value // 10**6
        part = {name: bars[abs(bars[:, 0] - moment) < 40 * DAY] for name, bars in market.items()}
        part[symbol] = later(part[symbol], -60, since, days)
        assert f"{symbol}: its bars from " in (said := refusal(getData.check_times, part, code=4))
        assert "are 60 minutes too early" in said


def test_recorded_bars_are_judged_as_those_of_an_exchange(tmp_path, get_data, capsys):
    frames = make(["AAA", "BBB", "CCC"], 40, 0, 0.0)
    flags = ["--data-dir", tmp_path / "data", "--symbols", "AAA,BBB,CCC", "--job", "bars"]
    flags += ["--source", tmp_path / "recorded"]

    def collect(symbol: str, frame: pd.DataFrame, *more: object) -> str:
        """What was refused, or "" if nothing was."""
        shutil.rmtree(tmp_path / "data", ignore_errors=True)
        record(tmp_path / "recorded", frames | {symbol: frame})
        refused = ""
        try:
            get_data(*flags, *more)
        except getData.DataRefused as error:
            refused = str(error)
        assert len(list((tmp_path / "data").glob("ohlcv/*"))) == (0 if refused else 3)  # all or none
        return refused

    bbb, ccc = frames["BBB"], frames["CCC"]
    hole = bbb.drop(range(1000, 1289))
    many = bbb.drop(range(10, 10_000, 10))  # 999 of 11,520: 8.67 %
    for bad, said, flag in (
        (hole, "289 bars are missing from 2024-01-04 11:20 on", "--max-gap 289"),
        (many, "999 of 11520 bars are missing", "--max-missing 0.087"),
        (bbb[: 39 * 288 - 1], "the bars end at 2024-02-08 23:50, delisted or halted", "--max-gap 289"),
    ):
        advice = f"leave it out of --symbols, or use {flag} or --absent allow"
        assert collect("BBB", bad) == f"BBB: {said}: {advice}"
        assert collect("BBB", bad, *flag.split()) == ""
    assert collect("BBB", bbb.drop(range(1000, 1288))) == ""
    assert collect("BBB", hole, "--max-gap", "0") == ""
    assert collect("BBB", many, "--max-missing", "0.0866") != ""
    assert collect("BBB", bbb[: 39 * 288]) == ""
    capsys.readouterr()
    redenominated = bbb.copy()
    redenominated.loc[500:, PRICES] *= 1000
    assert collect("BBB", redenominated) == ""
    idle = ccc.assign(volume=ccc["volume"].where(ccc.index > 300, 0.0))
    assert collect("CCC", idle[100:]) == ""
    lines = [line for line in capsys.readouterr().out.splitlines() if line.count("2024-02-09 23:55")]
    assert lines[1].endswith(" 1 price jump")
    assert lines[5].endswith("listed 2024-01-01 08:20")  # 201 bars without volume are less than a day
    split = idle.assign(volume=idle["volume"].where(idle.index != 11, 1.0))  # 11 and 289 are two rests
    for rests, said in ((idle, "301 bars from 2024-01-01 00:00"), (split, "289 bars from 2024-01-01 01:00")):
        assert collect("CCC", rests) == ""
        assert f"no trades in {said} on" in capsys.readouterr().out
    shifted = ccc.assign(timestamp=ccc["timestamp"] + BAR)
    assert re.match("CCC: its bars from .* are 5 minutes too late", collect("CCC", shifted))
    assert collect("CCC", shifted, "--trust-times") == ""


# --------------------------------------------------------------------------------------------- recorded files


def test_folders_and_files_that_do_not_fit_are_named(tmp_path):
    read = partial(getData.recorded_bars, tmp_path)
    assert re.match("no folder .*nowhere: ", refusal(getData.recorded_bars, tmp_path / "nowhere", ["AAA"]))
    assert re.match("no file of AAA .*: give one per coin", refusal(read, ["AAA"]))
    raw_bars().to_csv(tmp_path / "AAA.csv", index=False)
    (tmp_path / "README.md").write_text("not data")
    assert re.match("no file of BBB .*use --symbols with some of AAA", refusal(read, ["AAA", "BBB"]))
    raw_bars().to_parquet(tmp_path / "aaa-5m.parquet")
    assert re.match(r"AAA has several files .*\(AAA.csv, aaa-5m.parquet\)", refusal(read, ["AAA"]))
    for symbol in ("币安人生USDT", "老子USDT"):  # of other alphabets
        raw_bars().to_csv(tmp_path / f"{symbol}.csv", index=False)
    assert list(read(["老子USDT", "币安人生USDT"])) == ["老子USDT", "币安人生USDT"]


def archive_of(to: io.BytesIO, **files: bytes | str) -> None:
    """Write a zip archive of these files."""
    with zipfile.ZipFile(to, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)


def packed(name: str, data: bytes) -> bytes:
    """A zip archive that holds one file."""
    return written(lambda to: archive_of(to, **{name: data}))


def same_as(market: dict[str, pd.DataFrame], symbol: str, frame: pd.DataFrame) -> bool:
    expected = validate(symbol, frame)
    return getData.values_sha256(market[symbol]) == getData.values_sha256(expected)


def klines(frame: pd.DataFrame, unit: int = 1, header: bool = False) -> bytes:
    """Bars as Binance publishes them: 12 columns; times in ms divided by unit (1/1000: microseconds)."""
    table = frame.rename(columns={"timestamp": "open_time"}).assign(open_time=frame["timestamp"] * unit)
    table = table.assign(close_time=table["open_time"] + BAR * unit - 1, quote_volume=1.5, count=7)
    table = table.assign(taker_buy_volume=0.5, taker_buy_quote_volume=0.7, ignore=0)
    return table.to_csv(index=False, header=header).encode()


def test_files_of_binance_are_joined_over_their_units_months_and_days(tmp_path):
    """Spot as .zip, without a header; futures as .csv, with one; microseconds from 2025 on."""
    frame = make(["AAA"], 62, 0, 0.0)["AAA"]
    frame["timestamp"] += pd.Timestamp("2024-12-01").value // 10**6 - frame["timestamp"][0]
    first, second, last = 31 * 288, 61 * 288, 62 * 288
    name = "AAAUSDT-5m-2024-12"
    (tmp_path / f"{name}.zip").write_bytes(packed(f"{name}.csv", klines(frame[:first])))
    (tmp_path / f"{name}.zip.CHECKSUM").write_text("0  x\n")
    (tmp_path / "AAAUSDT-1h-2024-12.csv").write_text("another timeframe is another thing")
    (tmp_path / "AAAUSDT-5m-2025-01.zip").write_bytes(packed("x.csv", klines(frame[first:second], 1000)))
    (tmp_path / "AAAUSDT-5m-2025-01-30.csv").write_bytes(klines(frame[second - 288 : second], 1000))
    (tmp_path / "AAAUSDT-5m-2025-01-31.csv").write_bytes(klines(frame[second:last], 1000))
    (tmp_path / "BBBUSDT-5m-2024-12.csv").write_bytes(klines(frame[:first], header=True))
    market = getData.recorded_bars(tmp_path, ["AAAUSDT", "BBBUSDT"])
    assert same_as(market, "AAAUSDT", frame)
    assert same_as(market, "BBBUSDT", frame[:first])

    other = frame[second - 288 : second].assign(volume=1.0)  # a day whose bars are not those of its month
    (tmp_path / "AAAUSDT-5m-2025-01-30.csv").write_bytes(klines(other, 1000))
    said = refusal(getData.recorded_bars, tmp_path, ["AAAUSDT"])
    assert re.search(r"all files of AAAUSDT: bar \d+ \(2025-01-30T00:00:00\): duplicate", said)
    frame[:9].to_csv(tmp_path / "AAAUSDT.csv", index=False)
    assert "AAAUSDT has several files" in refusal(getData.recorded_bars, tmp_path, ["AAAUSDT"])


def cryptodatadownload(frame: pd.DataFrame) -> bytes:
    dates = dated(frame)["timestamp"].dt.strftime("%Y-%m-%d %H:%M:%S")
    table = pd.DataFrame({"Unix": frame["timestamp"] // 1000, "Date": dates, "Symbol": "AAA/USDT"})
    table = table.join(frame[PRICES].rename(columns=str.title))
    table["Volume USDT"], table["Volume AAA"] = 1.0, frame["volume"]
    newest_first = table[::-1].to_csv(index=False)
    return f"https://www.CryptoDataDownload.com\n{newest_first}".encode()


def as_index(frame: pd.DataFrame, name: str | None = None) -> pd.DataFrame:
    return frame.set_index(pd.to_datetime(frame["timestamp"], unit="ms").rename(name))


def dated(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.assign(timestamp=pd.to_datetime(frame["timestamp"], unit="ms"))


def written(write: Callable[[io.BytesIO], None]) -> bytes:
    stream = io.BytesIO()
    write(stream)
    return stream.getvalue()


def okx_rows(frame: pd.DataFrame) -> bytes:
    """Rows as OKX sends them, the newest first; the first seven values are as Bybit's. All is text."""
    rows = [[str(value) for value in (int(row[0]), *row[1:])] for row in frame[::-1].to_numpy().tolist()]
    return json.dumps([[*row, "1.5", "1.5", "1"] for row in rows]).encode()


def exported(frame: pd.DataFrame, name: str | None, unit: float) -> bytes:
    """CSV with another name for the time, or without names, and with the number of trades, as Kraken's."""
    times = (frame["timestamp"] * unit).astype("int64")
    table = frame.assign(timestamp=times, trades=7).rename(columns={"timestamp": name})
    return table.to_csv(index=False, header=name is not None).encode()


FORMATS = {
    "Binance_AAAUSDT_5m.csv": cryptodatadownload,
    "AAA_USDT_USDT-5m-futures.json": lambda frame: json.dumps(frame.to_numpy().tolist()).encode(),
    "AAA-USDT.CSV": lambda frame: frame.to_csv(index=False).encode(),
    "AAAUSDT.csv.gz": lambda frame: gzip.compress(frame.to_csv(index=False).encode()),
    "AAAUSDT.csv.zip": lambda frame: packed("a", frame.to_csv(index=False).encode()),
    "AAAUSDT.Json.GZ": lambda frame: gzip.compress(json.dumps(frame.to_numpy().tolist()).encode()),
    "AAAUSDT.json": lambda frame: json.dumps(frame.to_dict("records")).encode(),
    "aaausdt.csv": lambda frame: frame.to_csv(index=False, sep=";").encode("utf-8-sig"),
    "aaa_usdt.csv": lambda frame: frame.to_csv(index=False, sep=";", decimal=",").encode(),
    "AAA_USDT.csv": lambda frame: frame.to_csv(index=False, sep="\t").encode(),
    "AAA-USDT_5m.csv": lambda frame: dated(frame).assign(coin="é").to_csv(index=False, header=False).encode(),
    "AAAUSDT_5min.csv": lambda frame: frame.to_csv(index=False, header=False).encode(),
    "AAAUSDT.parquet": lambda frame: written(frame.to_parquet),
    "AAA-USDT-5m.json": lambda frame: okx_rows(frame),
    "AAA_USDT-5m.json": lambda frame: json.dumps([row[:7] for row in json.loads(okx_rows(frame))]).encode(),
    "aaa-usdt.csv": lambda frame: exported(frame, "ts", 1),
    "aaa-usdt_5m.csv": lambda frame: exported(frame, "startTime", 1),
    "AAAUSDT-5m.csv": lambda frame: exported(frame, None, 1 / 1000),
    "AAA-USDT.parquet": lambda frame: written(as_index(frame).drop(columns="timestamp").to_parquet),
    "AAA_USDT-5m.feather": lambda frame: written(dated(frame).rename(columns={"open": "Open"}).to_feather),
}


@pytest.mark.parametrize("name", FORMATS)
def test_formats_as_people_have_them(tmp_path, name):
    frame = raw_bars()
    (tmp_path / name).write_bytes(FORMATS[name](frame))
    (tmp_path / f"._{name}").write_bytes(b"what macOS adds on other disks")
    assert same_as(getData.recorded_bars(tmp_path, ["AAAUSDT"]), "AAAUSDT", frame)
    (tmp_path / name).write_bytes(b"\xff\xfe" if name.lower().endswith("csv") else b"[[1, 2], x")
    assert f"{name} cannot be read" in refusal(getData.recorded_bars, tmp_path, ["AAAUSDT"])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda f: f.assign(date=f["timestamp"] + 60_000), "'timestamp' and 'date' hold different times"),
        (lambda f: f.assign(date="00:05"), "column date: bar 0 (00:05): timestamp is neither"),
        (as_index, "two columns are called 'timestamp'"),
        (partial(as_index, name="timestamp"), "two columns are called 'timestamp'"),
        (lambda f: f.assign(Volume=1.0), "two columns are called 'volume'"),
        (lambda f: f.assign(**{" close ": 1.0}), "two columns are called 'close'"),
        (lambda f: f.drop(columns="timestamp"), "no column 'timestamp' among open, high, low, close, volume"),
    ],
)
def test_ambiguous_columns_are_refused_and_nothing_is_stored(tmp_path, get_data, change, said):
    (tmp_path / "recorded").mkdir()
    raw_bars().to_parquet(tmp_path / "recorded" / "AAA.parquet")
    change(raw_bars()).to_parquet(tmp_path / "recorded" / "BBB.parquet")
    flags = ["--data-dir", tmp_path / "data", "--source", tmp_path / "recorded", "--symbols", "AAA,BBB"]
    keep(tmp_path / "data", "AAA", raw_bars(9), f"recorded:{tmp_path / 'recorded'}")
    before = contents(tmp_path / "data")
    refused = refusal(get_data, *flags)
    assert said in refused
    assert "BBB.parquet" in refused
    assert contents(tmp_path / "data") == before


def test_names_that_are_twice_and_rows_that_are_too_long_in_a_csv_are_refused(tmp_path):
    header, path = "timestamp,open,high,low,close,volume", tmp_path / "AAA.csv"
    for name in ("Volume", "date", "open_time"):
        path.write_text(f"{header},{name},{name.lower()}\n1704067200000,1,1,1,1,1,1,1\n")
        assert "uplicate names" in refusal(getData.recorded_bars, tmp_path, ["AAA"])
    path.write_text(f"{header}\n0,1704067200000,1,1,1,1,1\n")
    assert "AAA.csv cannot be read" in refusal(getData.recorded_bars, tmp_path, ["AAA"])


def test_of_several_times_that_of_the_open_wins(tmp_path):
    frame = raw_bars()
    fetched = frame.assign(timestamp=frame["timestamp"] + 17_000, open_time=frame["timestamp"])
    fetched.to_csv(tmp_path / "AAA.csv", index=False)
    equal = frame.assign(date=pd.to_datetime(frame["timestamp"], unit="ms", utc=True), close_time=0)
    equal.to_parquet(tmp_path / "BBB.parquet")
    as_index(frame.assign(bar=1), "date").drop(columns="timestamp").to_parquet(tmp_path / "CCC.parquet")
    market = getData.recorded_bars(tmp_path, ["AAA", "BBB", "CCC"])
    assert all(same_as(market, symbol, frame) for symbol in market)


@pytest.mark.parametrize(
    ("text", "name"),
    [("BTC/USDT", "BTCUSDT"), ("btc-usdt", "BTCUSDT"), ("BTC_USDT-5m", "BTCUSDT"),
     ("BTC_USDT_USDT-5m-futures", "BTCUSDT"), ("BTC/USDT:USDT", "BTCUSDT"), ("币安人生USDT", "币安人生USDT"),
     ("币安BTC/USDT", "币安BTCUSDT"), ("цена_usdt", "ЦЕНАUSDT"), ("1000SATS/USDT", "1000SATSUSDT"),
     ("e\u0301/USDT", "\u00c9USDT"),  # composed and decomposed are the same letter
     ("हिन्दी/USDT", "हिन्दीUSDT"),  # vowel signs are no separators
     ("5m", "5M")],
)  # fmt: skip
def test_names_keep_the_letters_of_every_alphabet(text, name):
    assert getData.symbol_name(text) == name
    assert getData.symbol_name(name) == name


@pytest.mark.parametrize(
    ("symbols", "quote", "said"),
    [("BTCUSDT ETHUSDT TUSDUSDT", "", ""), ("BTCTUSD ETHTUSD", "", ""), ("AAA BBB BTC", "", ""),
     ("BTCUSDT ETHBTC", "", "ETHBTC is quoted in BTC, BTCUSDT in USDT"),
     ("BTCUSDT ETHUSD", "", "ETHUSD is quoted in USD, BTCUSDT in USDT"),
     ("BTCUSDT BTC", "", "BTC is quoted in another currency, BTCUSDT in USDT"),
     ("SOL WBTC", "", "WBTC is quoted in BTC, SOL in another"), ("SOL WBTC", "USDT", "")],
)  # fmt: skip
def test_recorded_coins_have_one_quote_currency(tmp_path, get_data, symbols, quote, said):
    frame = raw_bars()
    flags = ["--source", record(tmp_path / "recorded", dict.fromkeys(symbols.split(), frame))]
    flags += ["--data-dir", tmp_path / "data", "--symbols", symbols.replace(" ", ",")]
    if said:
        assert re.match(f"{said}: .* --quote", refusal(get_data, *flags))
        return
    assert get_data(*flags, "--job", "bars", "--quote", quote) == 0
    assert "too little history" in refusal(get_data, *flags[2:], "--job", "features")


def test_the_pair_as_it_is_spelled_is_preferred():
    names = ["kPEPE/USDC", "KPEPE/USDC", "BTC/USDT", "币安BTC/USDT", "ABC/DUSDT", "ABCD/USDT"]
    cases = {"kPEPE/USDC": names[:1], "KPEPEUSDC": names[1:2], "kpepe-usdc": names[:2], "btcusdt": names[2:3]}
    cases |= {"ABCD/USDT": names[5:], "ABCDUSDT": names[4:], "ETHUSDT": []}
    for text, meant in cases.items():
        assert getData.names_meant(text, names) == meant


EMPTY = raw_bars()[:0]
EMPTIES = {
    "0.csv": b"", "1.csv": EMPTY.to_csv(index=False).encode(), "2.csv": b"\n",
    "3.csv": klines(EMPTY, 1, True),
    "4.csv.gz": b"", "5.csv.gz": gzip.compress(b""), "6.zip": b"", "7.zip": packed("a.csv", b""),
    "8.zip": packed("a.csv", EMPTY.to_csv(index=False).encode()), "9.json": b"", "10.json": b"[]",
    "11.json.gz": gzip.compress(b"[]"), "12.parquet": b"", "13.parquet": written(EMPTY.to_parquet),
    "14.feather": b"", "15.feather": written(EMPTY.to_feather), "16.zip": written(archive_of),
}  # fmt: skip


@pytest.mark.parametrize("name", EMPTIES)
def test_empty_files_of_every_format_have_no_bars(tmp_path, name):
    (tmp_path / name).write_bytes(EMPTIES[name])
    said = refusal(getData.recorded_bars, tmp_path, [name.split(".")[0]])
    assert re.match(rf"{tmp_path / name}: no bars: ", said)


def test_what_macos_packs_is_no_second_file(tmp_path):
    text = raw_bars().to_csv(index=False)
    names = ("bars/", "bars/AAA.csv", "bars/.DS_Store", "__MACOSX/bars/._AAA.csv")
    data = written(lambda to: archive_of(to, **dict.fromkeys(names, text)))
    (tmp_path / "AAA.zip").write_bytes(data)
    assert same_as(getData.recorded_bars(tmp_path, ["AAA"]), "AAA", raw_bars())
    keep(tmp_path / "data", "AAA", raw_bars())
    (tmp_path / "data" / "ohlcv" / "._AAA.parquet").write_bytes(b"")
    assert getData.stored_symbols(tmp_path / "data") == ["AAA"]


def test_json_without_bars_archives_with_more_links_and_folders_are_named(tmp_path, capsys):
    kraken = [[int(row[0] / 1000), *row[1:5], row[4], row[5], 7] for row in raw_bars().to_numpy().tolist()]
    content = {
        "AAA.json": (json.dumps({"data": raw_bars().to_numpy().tolist()}).encode(), "no list of bars"),
        "BBB.json": (json.dumps(kraken).encode(), "8 values .* names"),
        "CCC.json": (b"[1, 2]", "no list of bars"),
        "DDD.json": (b"[" * 100_000, "recursion"),
        "EEE.zip": (written(lambda to: archive_of(to, a="", b="")), "it holds 2 files instead of one"),
        "FFF.csv": (b"\xff\xfe\x00\x01", "codec"),
        "III.csv": (pd.DataFrame(kraken).to_csv(index=False, header=False).encode(), "8 values .* names"),
    }
    for name, (data, said) in content.items():
        (tmp_path / name).write_bytes(data)
        refused = refusal(getData.recorded_bars, tmp_path, [name[:3]])
        assert re.search(rf"{name} cannot be read \(.*{said}.*\): replace the file", refused)
    (tmp_path / "GGG.csv").symlink_to(tmp_path / "nowhere.csv")
    (tmp_path / "HHH.parquet").mkdir()
    for symbol in ("GGG", "HHH"):
        with pytest.raises(SystemExit) as stop:
            getData.run_script(lambda symbol=symbol: getData.recorded_bars(tmp_path, [symbol]))
        assert stop.value.code == 1
        assert re.fullmatch(rf"error: .* \({tmp_path}/{symbol}\.\w+\): .*\n", capsys.readouterr().err)


def mutated(data: bytes, rng: np.random.Generator) -> bytes:
    """Data cut off, with bits flipped, or with a part taken out, put in or overwritten; often at an end."""
    low, high = [(0, 200), (len(data) - 2000, len(data)), (0, len(data))][rng.integers(3)]
    place, length = int(rng.integers(max(low, 0), min(high, len(data)))), int(rng.integers(1, 60))
    words = [b"nan", b"null", b"1e999", b"9" * 400, b"{}", b"[", b"\n", b";", b'"', b"-1", b"true"]
    flipped, word = bytes([data[place] ^ 1 << rng.integers(8)]), words[rng.integers(len(words))]
    part, gone = [(b"", len(data)), (flipped, 1), (b"", length), (rng.bytes(length), 0),
                  (bytes(length), length), (word, len(word))][rng.integers(6)]  # fmt: skip
    return data[:place] + part + data[place + gone :]


def test_mutated_files_are_read_or_refused_in_one_line(tmp_path):
    frame, rng = make(["AAA"], 1, 0, 0.0)["AAA"], np.random.default_rng(0)
    table, lists = frame.to_csv(index=False).encode(), json.dumps(frame.to_numpy().tolist()).encode()
    whole = [("AAA.parquet", written(part.to_parquet)) for part in (frame, frame.set_index("timestamp"))]
    whole += [("AAA.feather", written(frame.to_feather)), ("AAA.csv", table), ("AAA.json", lists)]
    whole += [("AAA.csv.gz", gzip.compress(table)), ("AAA.json.gz", gzip.compress(lists))]
    whole += [("AAA.zip", packed("AAA.csv", table))]
    whole += [("AAA.json", json.dumps(frame.head(50).to_dict("records")).encode())]
    refused = []
    for name, data in whole * 60:
        path = tmp_path / name
        path.write_bytes(mutated(data, rng))
        try:
            bars = getData.bar_array(getData.recorded_bars(tmp_path, ["AAA"])["AAA"])
            assert getData.broken_rule(bars[:, 0].astype(np.int64), bars[:, 1:]) == ""
        except UserError as error:
            refused.append((path, str(error)))
        path.unlink()
    assert all(re.fullmatch(rf"{path}.*: .*", said) for path, said in refused)
    assert 400 < len(refused) < 540  # some mutations leave bars that are as good as any


def test_mutated_files_of_ours_are_read_or_refused_in_one_line(market_dir, tmp_path):
    data_dir, rng = shutil.copytree(market_dir, tmp_path / "data"), np.random.default_rng(1)
    advice = r"(delete it and |: )run python getData.py --(job features|source=synthetic) .*--data-dir|not w"
    loads = (
        lambda: getData.load_features(data_dir),
        lambda: getData.load_prices(data_dir),
        lambda: getData.load_bars(data_dir, COINS.split(",")),
        lambda: getData.set_damaged_aside(data_dir / "ohlcv", "binance"),
    )
    refused = []
    for path in sorted(data_dir.glob("*/*.parquet")) * 4:
        data = path.read_bytes()
        path.write_bytes(mutated(data, rng))
        for load in loads:
            try:
                load()
            except UserError as error:
                refused.append(str(error))
        path.write_bytes(data)
    assert len(refused) > 30
    assert all(re.search(advice, said) and "\n" not in said for said in refused)
    assert not list(data_dir.rglob("*.corrupt"))  # what is of another source is not renamed


def test_a_damaged_file_is_made_again_by_the_command_that_made_its_folder(tmp_path, get_data):
    recorded = record(tmp_path / "my bars", make(["AAA", "BBB"], 2, 0, 0.0))
    flags = ["--data-dir", tmp_path / "data", "--symbols", "BBB,AAA"]
    get_data(*flags, "--source", recorded, "--plant", "0.3", "--job", "bars", "--max-gap", "7")
    path = tmp_path / "data" / "ohlcv" / "AAA.parquet"
    whole = path.read_bytes()
    path.write_bytes(b"x")
    said = refusal(getData.load_bars, tmp_path / "data", ["BBB", "AAA"])
    command = f"run python getData.py '--source={recorded}' --plant=0.3 --max-gap=7"
    where = f"--data-dir {tmp_path / 'data'} --symbols AAA,BBB"
    assert said.endswith(f": delete it and {command} {where}")
    path.unlink()
    words = said.split("getData.py ")[1].replace(f"'--source={recorded}'", "--source=my+bars").split()
    get_data(*(word.replace("my+bars", str(recorded)) for word in words), "--job", "bars")
    assert path.read_bytes() == whole
    for stored in path.parent.iterdir():  # nothing tells the source any more
        stored.write_bytes(b"x")
    assert "run again the getData.py that made" in refusal(getData.load_bars, tmp_path / "data", ["AAA"])


def test_a_folder_in_another_encoding_is_not_called_damaged(tmp_path):
    """A name that is no UTF-8, as an old disk has it; in a process, whose output is text in UTF-8."""
    folder = os.fsencode(tmp_path) + b"/d\xe4ten"
    recorded = record(Path(os.fsdecode(folder + b"-bars")), make(["AAA"], 99, 0, 0.0))
    command = [ROOT / "getData.py", "--data-dir", os.fsdecode(folder), "--symbols", "AAA"]
    for flags in (["--source", recorded], ["--job", "features"]):
        with Script([*command, *flags]) as process:
            printed, errors = process.communicate()
        assert process.returncode == 0, errors
    assert "features: up to date in " in printed


def test_coins_without_a_common_history_are_both_named(tmp_path, get_data):
    frames = make(["AAA", "BBB", "CCC"], 60, 0, 0.0)
    frames["AAA"], frames["CCC"] = frames["AAA"][: 20 * 288], frames["CCC"][30 * 288 :]
    flags = ["--data-dir", tmp_path / "data", "--symbols", "AAA,BBB,CCC", "--max-gap", "0"]
    said = "no common history: AAA ends on 2024-01-21, before CCC begins on 2024-01-31: "
    assert refusal(get_data, *flags, "--source", record(tmp_path / "recorded", frames)).startswith(said)


# ---------------------------------------------------------------------------------------- filling, resampling


def test_gaps_are_filled_from_the_past_alone():
    grid = pd.date_range("2024-01-01", periods=7, freq="5min", tz="UTC", unit="ms")
    first, second, nan = [10, 12, 9, 11, 5], [20, 21, 19, 20.5, 7], [np.nan] * 5
    filled = getData.fill_gaps(pd.DataFrame([first, second], grid[[1, 4]], [*PRICES, "volume"], float), grid)
    expected = [nan, first, [11, 11, 11, 11, 0], [11, 11, 11, 11, 0], second, nan, nan]
    np.testing.assert_array_equal(filled.iloc[:, :5].to_numpy(), np.array(expected))
    assert filled["filled"].tolist() == [False, False, True, True, False, False, False]
    assert filled["filled"].dtype == bool


def test_load_bars_puts_all_coins_on_one_grid(tmp_path):
    frame = raw_bars(12)
    for symbol, rows in {"AAA": [0, 1, 2, 5], "BBB": [3, 4, 7]}.items():
        keep(tmp_path, symbol, frame.iloc[rows])
    bars = getData.load_bars(tmp_path, ["BBB", "AAA"])
    assert list(bars) == ["BBB", "AAA"]
    times = (frame["timestamp"].iloc[:8]).tolist()
    assert all(coin.index.astype("int64").tolist() == times for coin in bars.values())
    assert bars["AAA"]["filled"].tolist() == [False] * 3 + [True] * 2 + [False] * 3
    assert bars["AAA"]["close"].notna().tolist() == [True] * 6 + [False] * 2
    assert bars["BBB"]["filled"].tolist() == [False] * 5 + [True] * 2 + [False]
    assert bars["BBB"]["close"].notna().tolist() == [False] * 3 + [True] * 5
    footer = getData.read_footer(tmp_path / "ohlcv" / "BBB.parquet")
    assert footer["gaps"] == [[times[5], 2]]
    assert (footer["first"], footer["last"], footer["rows"]) == (times[3], times[7], 3)
    assert "no bars of CCC in" in refusal(getData.load_bars, tmp_path, ["AAA", "CCC"])


@given(st.integers(0, 700), st.integers(1, 700), st.sampled_from([*TIMEFRAMES.values()]), st.integers(0, 999))
def test_longer_bars_are_merged_from_completed_ones_only(first, count, period, seed):
    """Any stretch of 5-minute bars at any timeframe: each bar from its own five-minute bars, one by one."""
    opens = BAR * np.arange(first, first + count)
    values = np.random.default_rng(seed).integers(1, 100, (count, 5)).astype(float)
    index = pd.to_datetime(opens, unit="ms", utc=True).as_unit("ms")
    frame = pd.DataFrame(values, index, [*PRICES, "volume"])
    expected = {}
    for close in range(period, int(opens[-1]) + BAR + 1, period):
        inside = [i for i, time in enumerate(opens) if close - period <= time < close]
        if len(inside) == period // BAR:
            part = values[inside]
            expected[close] = [part[0, 0], part[:, 1].max(), part[:, 2].min(), part[-1, 3], part[:, 4].sum()]
    merged = getData.resample(frame, period)
    times = merged.index.as_unit("ms").asi8.tolist()
    assert dict(zip(times, merged.to_numpy().tolist(), strict=True)) == expected


# -------------------------------------------------------------------------------------------------- causality


def test_changing_or_cutting_the_future_changes_no_earlier_bit(bars):
    before = getData.compute_features(bars)
    rng = np.random.default_rng(1)
    for cut in (12_500, 12_687, 12_868):
        changed = {}
        for symbol, frame in bars.items():
            noise = np.exp(rng.normal(0, 1, len(frame) - cut))
            changed[symbol] = frame.copy()
            for name in (*PRICES, "volume"):
                column = frame[name].to_numpy(copy=True)
                column[cut:] *= noise * (1 if name == "volume" else 10)
                changed[symbol][name] = column
        after = getData.compute_features(changed)
        short = getData.compute_features({symbol: frame.iloc[:cut] for symbol, frame in bars.items()})
        now = frame.index[cut]  # the close of the last unchanged bar
        for name in TIMEFRAMES:
            assert same_bits(before[name][:now], after[name][:now])
            assert same_bits(before[name][:now], short[name])
            assert short[name].index[-1] == now.floor(pd.Timedelta(TIMEFRAMES[name], "ms"))
            assert short[name].iloc[-1].notna().all()
        assert not same_bits(before["5m"], after["5m"])
    alone = getData.compute_features({"AAA": bars["AAA"]})  # no coin depends on the others
    assert all(same_bits(before[name].filter(like="AAA."), alone[name]) for name in TIMEFRAMES)


def test_the_newest_features_are_those_of_the_whole_history(bars):
    rows = dict(zip(TIMEFRAMES, (24, 12, 10, 6, 4), strict=True))
    whole = getData.compute_features(bars)
    for cut in (12_500, 12_687, 12_868):
        seen = {symbol: frame.iloc[:cut] for symbol, frame in bars.items()}
        newest = getData.newest_features(seen, list(rows.values()))
        for name, count in rows.items():
            expected = whole[name][: newest[name].index[-1]].iloc[-count:]
            pd.testing.assert_index_equal(newest[name].index, expected.index, check_names=False)
            assert newest[name].columns.tolist() == expected.columns.tolist()
            assert expected.index[-1] == bars["AAA"].index[cut].floor(pd.Timedelta(TIMEFRAMES[name], "ms"))
            difference = (newest[name] - expected).abs() / whole[name].std()
            assert difference.max().max() < 1e-4
    days = getData.look_back_ms(list(rows.values())) / DAY
    assert days == 4 + getData._MEMORY + 1  # of the daily bars, the longest


def centred(bars: pd.DataFrame, timeframe: str, name: str, change) -> pd.DataFrame:
    """The honest channels, but for one at one timeframe."""
    channels = honest_channels(bars)
    if len(bars) > 1 and bars.index[1] - bars.index[0] == pd.Timedelta(TIMEFRAMES[timeframe], "ms"):
        channels[name] = change(channels[name])
    return channels


honest_channels, honest_resample = getData.compute_channels, getData.resample
LEAKS = {
    "centred average": ("1h", "ppo", 2, lambda values: values.rolling(5, center=True).mean()),
    "back-fill": ("15m", "bbp", 1, lambda values: values.where(np.arange(len(values)) % 2 == 0).bfill()),
    "the next value": ("5m", "ret", 1, lambda values: values.shift(-1)),
    "the last bits": ("1d", "stc", None, lambda values: values * (1 + 1e-5 * values.mean())),
    "sign of zero": ("4h", "rsi14", None, lambda values: values * 0.0 + np.copysign(0.0, values.iloc[-1])),
}  # fmt: skip


@pytest.fixture(scope="module")
def causal_dir(tmp_path_factory) -> Path:
    """Bars of 2 coins, 40 days, the second listed later and with a gap, in a data_dir."""
    folder = tmp_path_factory.mktemp("causal")
    for symbol, frame in make(["AAA", "BBB"], 40, 0, 0.0).items():
        rows = frame.index if symbol == "AAA" else [*range(500, 9_900), *range(9_950, 11_500)]
        keep(folder, symbol, frame.loc[rows])
    return folder


@pytest.fixture
def check(causal_dir, get_data, capsys, monkeypatch):
    """The job causality on these coins: how many columns see the future, and the lines about them."""

    def call(symbols: str, cuts: int) -> tuple[int, list[str]]:
        monkeypatch.setattr(getData, "_CAUSALITY_CUTS", cuts)
        flags = ["--data-dir", causal_dir, "--symbols", symbols]
        said = refusal(get_data, "--job", "causality", *flags, code=4)
        lines = capsys.readouterr().out.splitlines()
        return int(said.split()[0]), [line for line in lines if "times not checked" not in line]

    return call


def test_honest_channels_pass_the_check(causal_dir, get_data, capsys):
    assert get_data("--job", "causality", "--data-dir", causal_dir, "--symbols", "AAA,BBB") == 0
    said = "causal: no value of 340 columns changes when only later bars change (random moments: 12)\n"
    assert capsys.readouterr().out == said + "features: none are stored\n"
    assert os.listdir(causal_dir) == ["ohlcv"]  # nothing is written


def test_what_is_stored_is_causal_only_where_it_is_what_the_formulas_give(
    causal_dir, tmp_path, get_data, capsys, monkeypatch
):
    data_dir = shutil.copytree(causal_dir, tmp_path / "data")
    job = ["--data-dir", data_dir, "--symbols", "AAA", "--job"]
    monkeypatch.setattr(getData, "_CAUSALITY_CUTS", 1)
    with monkeypatch.context() as patch:
        timeframe, name, _, change = LEAKS["back-fill"]
        patch.setattr(getData, "compute_channels", lambda bars: centred(bars, timeframe, name, change))
        get_data(*job, "features", "--purge-days", "0")
    said = refusal(get_data, *job, "causality", code=4)
    assert re.search(r"15m.parquet: AAA.bbp is not what .* --job features --data-dir", said)
    assert "causal: " not in capsys.readouterr().out
    shutil.rmtree(data_dir / "features")
    get_data(*job, "features", "--purge-days", "0")
    assert get_data(*job[:3], "AAA,BBB", "--job", "causality") == 0
    assert capsys.readouterr().out.endswith("features: those that are stored are the formulas'\n")


@pytest.mark.parametrize("kind", LEAKS)
def test_channel_that_sees_the_future_is_named(check, monkeypatch, kind):
    timeframe, name, ahead, change = LEAKS[kind]
    monkeypatch.setattr(getData, "compute_channels", lambda bars: centred(bars, timeframe, name, change))
    columns, lines = check("AAA,BBB", 2)
    assert columns == len(lines) == 2
    for symbol, line in zip(("AAA", "BBB"), lines, strict=True):
        bars = ahead or r"\d+"
        assert re.fullmatch(rf"{symbol} @ {timeframe} sees up to {bars} bars? ahead: {name}", line)


def test_only_what_sees_the_future_of_one_coin_is_named(check, monkeypatch):
    def leak(bars: pd.DataFrame) -> pd.DataFrame:
        channels, second = honest_channels(bars), bars.index[0] > pd.Timestamp("2024-01-02", tz="UTC")
        return channels.assign(uo=channels["uo"].shift(-3)) if second else channels

    monkeypatch.setattr(getData, "compute_channels", leak)
    assert check("AAA,BBB", 2) == (5, [f"BBB @ {name} sees up to 3 bars ahead: uo" for name in TIMEFRAMES])


@pytest.mark.parametrize(("label", "closed"), [("left", "left"), ("right", "right")])
def test_longer_bars_that_are_not_completed_are_named(check, monkeypatch, label, closed):
    def resample(bars: pd.DataFrame, milliseconds: int) -> pd.DataFrame:
        if milliseconds != TIMEFRAMES["4h"]:
            return honest_resample(bars, milliseconds)
        groups = bars.resample("4h", closed=closed, label=label)  # the second: one 5-minute bar too late
        return groups.agg({"open": "first", "high": "max", "low": "min", "close": "last", "volume": "sum"})

    monkeypatch.setattr(getData, "resample", resample)
    columns, (line,) = check("AAA", 4)
    start, _, names = line.partition(": ")
    assert start == "AAA @ 4h sees up to 1 bar ahead"
    assert len(names.split(",")) == columns > 20


def test_bars_that_are_shifted_few_or_missing_are_not_called_causal(tmp_path, get_data, capsys, monkeypatch):
    monkeypatch.setattr(getData, "_CAUSALITY_CUTS", 1)
    job = ["--job", "causality", "--data-dir", tmp_path / "data", "--symbols"]
    assert get_data(*job, "AAA", "--days", "99") == 0  # no data: the synthetic market
    lines = capsys.readouterr().out.splitlines()
    assert "NO DATA" in lines[0]
    assert lines[-3].endswith("hardly move with the others: AAA")
    assert lines[-2].startswith("causal: no value of 170 columns changes")
    for symbol, frame in make(["BBB", "CCC", "DDD"], 40, 0, 0.0).items():
        late = frame.assign(timestamp=frame["timestamp"] + 3_600_000)
        keep(tmp_path / "data", symbol, late if symbol == "CCC" else frame)
    assert re.match("CCC: its bars from .* are 60 m", refusal(get_data, *job, "BBB,CCC,DDD", code=4))
    assert get_data(*job, "BBB,CCC,DDD", "--trust-times") == 0
    keep(tmp_path / "data", "EEE", make(["EEE"], 32, 0, 0.0)["EEE"])
    assert "EEE: too little history to check: 33 days needed" in refusal(get_data, *job, "EEE")


# --------------------------------------------------------------------------------------------------- channels


def coin(count: int = 600, seed: int = 5) -> pd.DataFrame:
    return make(["AAA"], 10, seed, 0.0)["AAA"].head(count).drop(columns="timestamp")


def test_channels_are_nan_in_warm_up_and_finite_after(bars):
    channels = getData.compute_channels(coin())
    assert list(channels.columns) == CHANNELS
    assert len(CHANNELS) == len(set(CHANNELS)) == 34
    assert channels[:30].isna().all(axis=None)
    assert np.isfinite(channels[30:]).all(axis=None)
    for count in (0, 1, 13, 27, 30, 31):
        short = getData.compute_channels(coin(count))
        assert short.shape == (count, 34)
        assert short[:30].isna().all(axis=None)
        assert np.isfinite(short[30:]).all(axis=None)
    features = getData.compute_features(bars)
    for name, period in TIMEFRAMES.items():
        for symbol, frame in bars.items():
            own = features[name].filter(like=f"{symbol}.")
            listed = frame["close"].first_valid_index().ceil(pd.Timedelta(period, "ms"))
            first = listed + pd.Timedelta(31 * period, "ms")
            assert own[: first - pd.Timedelta(1, "ms")].isna().all(axis=None)
            assert np.isfinite(own[first:]).all(axis=None)
            assert len(own[first:]) > 0


def test_channels_worked_by_hand():
    bars = coin(60)
    row = getData.compute_channels(bars).iloc[-1]
    b = bars.iloc[-1]
    close = bars["close"].to_numpy()
    assert row["ret"] == pytest.approx(np.log(close[-1] / close[-2]))
    assert row["roc12"] == pytest.approx(100 * (close[-1] / close[-13] - 1))
    assert row["range"] == pytest.approx(np.log((b["high"] - b["low"]) / b["close"] + 1e-4))
    assert row["upwick"] == pytest.approx((b["high"] - max(b["open"], b["close"])) / (b["high"] - b["low"]))
    assert row["relvol"] == pytest.approx(np.log(b["volume"] / np.median(bars["volume"][-20:])))
    highs, lows = bars["high"].to_numpy()[-26:], bars["low"].to_numpy()[-9:]
    assert row["aroonup25"] == pytest.approx(highs.argmax() / 12.5 - 1)
    top, bottom = bars["high"].to_numpy()[-9:].max(), lows.min()
    assert row["stoch9"] == pytest.approx(2 * (close[-1] - bottom) / (top - bottom) - 1)
    mean, deviation = close[-20:].mean(), close[-20:].std()
    assert row["bbp"] == pytest.approx((close[-1] - mean) / (2 * deviation))
    signs = np.sign(np.diff(close))[-14:]
    assert row["obv14"] == pytest.approx((signs * bars["volume"][-14:]).sum() / bars["volume"][-14:].sum())


def test_a_rising_market_reads_as_one():
    price = 100 * 1.001 ** np.arange(80)
    bars = pd.DataFrame({"open": price, "high": price * 1.001, "low": price, "close": price * 1.001})
    row = getData.compute_channels(bars.assign(volume=1.0)).iloc[-1]
    ones = dict.fromkeys(("rsi14", "aroonup25", "adx14", "mfi14", "obv14"), 1)
    expected = ones | {"aroondn25": -1, "roc3": 100 * (1.001**3 - 1), "ulcer14": np.log(1e-4)}
    assert row[list(expected)].to_dict() == pytest.approx(expected)


def test_the_fast_formulas_equal_ta():
    bars = coin(1_500)
    high, low, close, volume = (bars[name] for name in ("high", "low", "close", "volume"))
    aroon = ta.trend.AroonIndicator(high, low, 25)
    true_range = ta.volatility.AverageTrueRange(high, low, close, 14).average_true_range()
    slow = {
        "adx14": ta.trend.ADXIndicator(high, low, close, 14).adx() / 50 - 1,
        "aroonup25": aroon.aroon_up() / 50 - 1,
        "aroondn25": aroon.aroon_down() / 50 - 1,
        "atr14": np.log(true_range / close + 1e-4),
        "ulcer14": np.log(ta.volatility.UlcerIndex(close, 14).ulcer_index() / 100 + 1e-4),
        "mfi14": ta.volume.MFIIndicator(high, low, close, volume, 14).money_flow_index() / 50 - 1,
    }
    channels = getData.compute_channels(bars)
    for name, expected in slow.items():
        np.testing.assert_allclose(channels[name][30:], expected[30:], atol=1e-9, err_msg=name)


def test_channels_do_not_know_the_scale_of_price_or_volume():
    bars = coin()
    scaled = bars * [1e-6, 1e-6, 1e-6, 1e-6, 1e5]
    # rolling sums of other numbers round differently: 1e-6 is far below any channel's spread
    np.testing.assert_allclose(getData.compute_channels(scaled), getData.compute_channels(bars), atol=1e-6)


@pytest.mark.parametrize("volume", [0.0, 7.0])
def test_flat_prices_are_neutral(volume):
    flat = pd.DataFrame({"open": 3.7, "high": 3.7, "low": 3.7, "close": 3.7, "volume": volume}, range(100))
    channels = getData.compute_channels(flat)[30:]
    assert np.isfinite(channels).all(axis=None)
    floor = {name: np.log(1e-4) for name in ("range", "atr14", "ulcer14")}
    for name in CHANNELS:
        np.testing.assert_allclose(channels[name], floor.get(name, 0.0), atol=1e-9, err_msg=name)


def test_an_outage_stays_finite_and_becomes_neutral():
    bars = coin(900)
    last = bars["close"].iloc[399]
    bars.iloc[400:500] = [last] * 4 + [0.0]
    channels = getData.compute_channels(bars)
    assert np.isfinite(channels[30:]).all(axis=None)
    dead = channels.iloc[460:500]
    for name in ("ret", "upwick", "adx14", "vortex14", "aroonup25", "stc", "rsi14", "srsi", "uo", "stoch9",
                 "roc24", "bbp", "cmf20", "mfi14", "obv14", "eom10"):  # fmt: skip
        assert (dead[name] == 0).all(), name
    assert np.isfinite(getData.compute_channels(bars.assign(volume=0.0))[30:]).all(axis=None)


@pytest.mark.parametrize("factor", [10.0, 0.1, 1e4, 1e-4])
def test_a_jump_stays_finite_and_bounded(factor):
    bars = coin()
    bars.iloc[300:] *= [factor] * 4 + [1]
    channels = getData.compute_channels(bars)[30:]
    assert np.isfinite(channels).all(axis=None)
    assert (channels.abs().max() <= 100).all()
    # twenty windows later the jump is all but forgotten (Wilder's averages remember it longest)
    np.testing.assert_allclose(channels[-5:], getData.compute_channels(coin())[-5:], atol=1e-2)


def test_no_channel_sits_at_its_limits(martingale_dir):
    features, footer = getData.load_features(martingale_dir)
    for name, frame in features.items():
        values = np.abs(frame[30:].to_numpy().reshape(-1, len(CHANNELS)))
        for channel, limit in getData._CLIP.items():
            assert (values[:, CHANNELS.index(channel)] >= limit).mean() < 0.02, (name, channel)


# ------------------------------------------------------------------------------------------- synthetic market


def test_the_synthetic_market_is_its_seed():
    first, again = make(["AAA", "BBB"], 3, 1, 1.0), make(["AAA", "BBB"], 3, 1, 1.0)
    assert all(same_bits(first[symbol], again[symbol]) for symbol in first)
    assert same_bits(first["BBB"], make(["BBB"], 3, 1, 1.0)["BBB"])
    assert not same_bits(first["AAA"], make(["AAA"], 3, 2, 1.0)["AAA"])
    assert not same_bits(first["AAA"], make(["AAA"], 3, 1, 0.0)["AAA"])


def test_the_synthetic_market_looks_like_one():
    market = make(["AAA", "BBB", "CCC"], 120, 0, 1.0)
    returns = {}
    for symbol, raw in market.items():
        bars = validate(symbol, raw)
        assert len(bars) == 120 * 288
        gap = bars["open"][1:].to_numpy() / bars["close"][:-1].to_numpy() - 1
        assert 0 < np.abs(gap).mean() < 1e-4
        body = np.log(bars["close"] / bars["open"])
        returns[symbol] = body
        size = body.abs()
        assert 9e-4 < body.std() < 18e-4
        assert body.kurt() > 3
        assert size.autocorr(1) > 0.1
        assert size.rank().corr(bars["volume"].rank()) > 0.3
        by_hour = size.groupby(bars["timestamp"].dt.hour).mean()
        assert by_hour.idxmax() in range(12, 19)
        assert by_hour.max() > 1.4 * by_hour.min()
    correlation = pd.DataFrame(returns).corr().to_numpy()[np.triu_indices(3, 1)]
    assert (correlation > 0.3).all()
    assert (correlation < 0.8).all()


def predictability(signal_strength: float, seed: int) -> dict[str, float]:
    """Correlation of what is known at a close with the return from the next open on, in standard errors."""
    market = make(["AAA", "BBB", "CCC"], 100, seed, signal_strength)
    known, later = [], []
    for bars in market.values():
        step = bars["close"].pct_change()
        facts = {"trend": step.ewm(halflife=60).mean(), "last return": step}
        facts |= {"volume": np.log(bars["volume"]).diff()}
        facts |= {"wick": (bars["high"] + bars["low"] - bars["open"] - bars["close"]) / bars["close"]}
        known.append(pd.DataFrame(facts)[300:-2])
        later.append((bars["open"].shift(-2) / bars["open"].shift(-1) - 1)[300:-2])
    later = pd.concat(later)
    return {name: column.corr(later) * np.sqrt(len(later)) for name, column in pd.concat(known).items()}


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_only_the_planted_market_can_be_predicted(seed):
    # 86,000 pairs: with a drift of 3 bp under 13 bp the best trend correlates by about 0.15, that is 45
    # standard errors
    assert predictability(1.0, seed)["trend"] > 25
    for name, statistic in predictability(0.0, seed).items():
        # shared shocks make three coins worth about two: 4.5 here is about 3.5 standard errors
        assert abs(statistic) < 4.5, name


def ticked(days: int = 30, decimals: int = 2) -> pd.DataFrame:
    """A coin at about 20 whose prices are multiples of a tick, with missing bars and bars without a trade."""
    raw = make(["AAA"], days, seed=5, signal=0.0)["AAA"]
    raw[PRICES] = np.round(raw[PRICES] * 20 / raw["close"][0], decimals)
    raw.loc[4_000:4_009, PRICES] = raw["close"][3_999]
    raw.loc[4_000:4_009, "volume"] = 0.0
    return validate("AAA", raw.drop(index=range(5_000, 5_050)))


def test_the_planted_drift_is_the_known_one():
    """The process step by step, the volatility as a weighted mean, and prices without a tick that show it."""
    bars = ticked(decimals=15)
    planted = getData.plant_drift("AAA", bars, 0.5, 7)
    times = bars["timestamp"].astype("int64").to_numpy()
    noise = np.random.default_rng([7, zlib.crc32(b"AAA"), times[0] // BAR]).standard_normal(30 * 288)
    decay, process = 0.5 ** (1 / 144), [noise[0]]
    for shock in noise[1:]:
        process.append(decay * process[-1] + np.sqrt(1 - decay**2) * shock)
    returns = np.diff(np.log(bars["close"]))
    bodies = [np.log(frame["close"] / frame["open"]).to_numpy() for frame in (bars, planted)]
    drift = bodies[1] - bodies[0]
    assert np.abs(drift[:289]).max() == 0  # the volatility of the first day is not known yet
    for row in (289, 300, 3_000, 4_020, 5_001, 8_000):
        weights = 0.5 ** (np.arange(row - 1)[::-1] / (30 * 288))
        volatility = np.sqrt((weights * returns[: row - 1] ** 2).sum() / weights.sum())
        known = 0.5 * 3 / 13 * volatility * process[(times[row] - times[0]) // BAR]
        assert drift[row] == pytest.approx(known, abs=1e-12)
        assert abs(known) > 1e-6
    gaps = [np.log(frame["open"][1:].array / frame["close"][:-1].array) for frame in (bars, planted)]
    np.testing.assert_allclose(*gaps, rtol=0, atol=1e-12)  # no drift between bars, over missing ones neither
    for wick in ("high", "low"):
        ends = [frame[["open", "close"]] for frame in (bars, planted)]
        ends = [end.max(axis=1) if wick == "high" else end.min(axis=1) for end in ends]
        np.testing.assert_allclose(planted[wick] / ends[1], bars[wick] / ends[0], rtol=1e-12)
    assert planted["volume"].equals(bars["volume"])
    assert planted["timestamp"].equals(bars["timestamp"])


def test_a_strength_is_relative_to_the_volatility_of_the_coin():
    """About 3 in 13, as in the synthetic market; a coin that moves three times as much drifts so, too."""
    bars = ticked(90, decimals=15)
    drift = getData.planted_log_drift("AAA", bars, 1.0, 0)
    assert drift[288:].std() / np.log(bars["close"]).diff().std() == pytest.approx(3 / 13, rel=0.2)
    wild = bars.assign(**{name: bars[name] ** 3 for name in PRICES})
    np.testing.assert_allclose(getData.planted_log_drift("AAA", wild, 1.0, 0), 3 * drift, rtol=1e-9)
    later = bars["timestamp"].where(bars.index < 60 * 288, bars["timestamp"] + pd.Timedelta(days=100))
    after = bars.assign(timestamp=later)  # the return of a hole is none of the coin's usual ones
    risen = after.assign(**{name: after[name] * np.where(bars.index < 60 * 288, 1, 5) for name in PRICES})
    both = [getData.planted_log_drift("AAA", piece, 1.0, 0) for piece in (after, risen)]
    np.testing.assert_allclose(*both, rtol=1e-9)
    others = [("BBB", bars, 1.0, 0), ("AAA", bars, 1.0, 1), ("AAA", bars.iloc[1:], 1.0, 0)]
    for other in others:  # another coin, seed or beginning
        assert abs(np.corrcoef(getData.planted_log_drift(*other)[-20_000:], drift[-20_000:])[0, 1]) < 0.5


@pytest.mark.parametrize("decimals", [2, 15])
@pytest.mark.parametrize("strength", [0.05, 1.0, 10.0])
def test_planted_bars_keep_every_rule(strength, decimals):
    bars = ticked(decimals=decimals)
    planted = getData.plant_drift("AAA", bars, strength, 0)
    times = bars["timestamp"].astype("int64").to_numpy()
    assert getData.broken_rule(times, planted.drop(columns="timestamp").to_numpy()) == ""
    flat = (bars["high"] == bars["low"]).to_numpy()
    assert flat.sum() >= 10
    assert (planted["high"] == planted["low"])[flat].all()
    assert planted.loc[4_000:4_009, ["open", "close"]].nunique().tolist() == [1, 1]
    assert abs(planted["close"][4_000] / planted["close"][3_999] - 1) < 0.001
    uppermost, lowest = (bars["high"] == bars["close"]) & ~flat, (bars["low"] == bars["open"]) & ~flat
    rising = planted["close"] >= planted["open"]
    assert (planted["high"] == planted["close"])[uppermost & rising].all()
    assert (planted["low"] == planted["open"])[lowest & rising].all()


def test_a_weak_drift_does_not_show_in_unchanged_prices():
    """Prices stay multiples of the tick, and one that stayed the same is moved no oftener than it must be."""
    bars = ticked()
    planted = getData.plant_drift("AAA", bars, 0.05, 0)
    assert np.abs(np.log(planted["close"] / bars["close"])).max() < np.log(2) / 2  # the tick is the old one
    np.testing.assert_array_equal(planted["close"], np.round(planted["close"], 2))
    drift = getData.planted_log_drift("AAA", bars, 0.05, 0)
    exact = bars["close"] * np.exp(np.cumsum(drift))
    np.testing.assert_allclose(planted["close"], exact, rtol=0, atol=0.0051)
    still = ((bars["open"] == bars["close"]) & (bars["high"] > bars["low"])).to_numpy()
    moved = (planted["open"] != planted["close"]).to_numpy()
    expected = np.abs(drift[still]).sum() * 20 / 0.01  # drift over tick
    assert moved[still].sum() == pytest.approx(expected, rel=0.5)
    assert moved[still].mean() < 0.05


def test_a_planted_bar_does_not_depend_on_later_bars():
    bars = ticked()
    planted = getData.plant_drift("AAA", bars, 1.0, 0).set_index("timestamp")
    for row in (1, 288, 4_005, 5_000, 8_000):
        changed = bars.copy()
        changed.loc[row:, PRICES] *= np.pi
        for other in (bars[:row], changed):
            again = getData.plant_drift("AAA", other, 1.0, 0).set_index("timestamp")
            assert same_bits(again[:row], planted[:row])
        assert not same_bits(again[row:], planted[row:])


def test_prices_without_signal_are_a_martingale():
    relatives = [
        frame["open"].iloc[288::288].to_numpy() / frame["open"].iloc[:-288:288].to_numpy() - 1
        for seed in range(4)
        for frame in make(["AAA"], 200, seed, 0.0).values()
    ]
    daily = np.concatenate(relatives)
    assert abs(daily.mean()) < 4 * daily.std() / np.sqrt(len(daily))


# ------------------------------------------------------------------------------------- the script's own steps


def test_the_script_writes_what_the_others_read(market_dir):
    features, footer = getData.load_features(market_dir)
    prices, prices_footer = getData.load_prices(market_dir)
    symbols = COINS.split(",")
    assert footer == prices_footer
    facts = {"symbols": symbols, "channels": CHANNELS, "timeframes": TIMEFRAMES}
    assert footer.items() >= (facts | {"source": "synthetic:seed=0:signal=1.0"}).items()
    assert list(features) == list(TIMEFRAMES)
    for name, period in TIMEFRAMES.items():
        frame = features[name]
        assert list(frame.columns) == [f"{symbol}.{channel}" for symbol in symbols for channel in CHANNELS]
        assert (frame.dtypes == np.float32).all()
        assert str(frame.index.dtype) == "datetime64[ms, UTC]"
        assert len(frame) == 110 * DAY // period
        assert (np.diff(frame.index.astype("int64")) == period).all()
        assert frame[:30].isna().all(axis=None)
        assert np.isfinite(frame[30:]).all(axis=None)
    assert prices.index.equals(features["5m"].index)
    assert list(prices.columns) == [f"{symbol}.{name}" for symbol in symbols for name in ("open", "close")]
    raw = pd.read_parquet(market_dir / "ohlcv" / "ETHUSDT.parquet")
    assert list(raw.columns) == ["timestamp", *PRICES, "volume"]
    assert (raw["timestamp"] + pd.Timedelta(BAR, "ms")).tolist() == prices.index.tolist()
    for name in ("open", "close"):
        np.testing.assert_array_equal(prices[f"ETHUSDT.{name}"], raw[name])
    returns = np.log(raw["close"]).diff().to_numpy()[30:]
    np.testing.assert_allclose(features["5m"]["ETHUSDT.ret"][30:], returns, rtol=1e-5, atol=1e-9)
    stored = getData.read_footer(market_dir / "ohlcv" / "ETHUSDT.parquet")
    assert footer["inputs"]["ETHUSDT"] == stored["values_sha256"] == getData.values_sha256(raw)
    assert stored["source"] == footer["source"]
    assert (stored["rows"], stored["gaps"], stored["timeframe"]) == (110 * 288, [], "5m")


def test_splits_follow_in_order_with_purges_between(market_dir):
    # 110 days: 31 daily bars until the channels are finite, 79 days to share
    start, bar = pd.Timestamp("2024-01-01").value // 10**6, BAR / DAY
    footer = getData.load_features(market_dir)[1]
    splits = {name: [(time - start) / DAY for time in times] for name, times in footer["splits"].items()}
    assert splits["train"] == pytest.approx([31, 31 + 0.7 * 79], abs=bar)
    assert splits["validation"] == pytest.approx([31 + 0.7 * 79 + 9, 31 + 0.85 * 79], abs=bar)
    assert splits["test"][0] == pytest.approx(31 + 0.85 * 79 + 9, abs=bar)
    assert splits["test"][1] == 110 + bar  # the close of the last bar is the last decision
    assert footer["purge_ms"] == 9 * DAY
    assert all(time % BAR == 0 for split in footer["splits"].values() for time in split)


def in_days(folds: list[dict[str, list[int]]]) -> list[dict[str, list[float]]]:
    return [{name: [time / DAY for time in times] for name, times in fold.items()} for fold in folds]


def test_walk_forward_splits_by_hand():
    """Twenty days, a purge of one, three quarters of what is learnt from for training.
    All tests together are the second half; what is learnt from ends a purge before each.
    """
    splits = {"train": [0, 11 * DAY], "validation": [12 * DAY, 15 * DAY], "test": [16 * DAY, 20 * DAY]}
    footer = {"splits": splits, "split_shares": (0.6, 0.2, 0.2), "purge_ms": DAY, "symbols": ["AAA"]}
    closes = pd.DataFrame({"AAA.close": 1.0}, pd.to_datetime(range(0, 20 * DAY, BAR), unit="ms", utc=True))
    folds = getData.walk_forward_splits(closes, footer, 2)
    assert in_days(folds) == [
        {"train": [0, 6], "validation": [7, 9], "test": [10, 15]},
        {"train": [0, 9.75], "validation": [10.75, 14], "test": [15, 20]},
    ]
    assert "0.5 days of test" in refusal(getData.walk_forward_splits, closes, footer, 20)

    # days 8 to 12 without a coin count for nothing: half of the 16 others are those from day 12 on
    there = (closes.index.day_of_year <= 8) | (closes.index.day_of_year > 12)
    folds = getData.walk_forward_splits(closes.assign(**{"AAA.member": 1.0 * there}), footer, 2)
    assert in_days(folds) == [
        {"train": [0, 6], "validation": [7, 11], "test": [12, 16]},
        {"train": [0, 7.5], "validation": [8.5, 15], "test": [16, 20]},
    ]


def times_of(data_dir: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in sorted((data_dir / "features").iterdir())}


def test_features_are_recomputed_when_and_only_when_inputs_change(tmp_path, get_data, capsys):
    frames, data_dir = make(["AAA", "BBB"], 40, 0, 0.0), tmp_path / "data"
    flags = ["--data-dir", data_dir, "--symbols", "AAA,BBB", "--purge-days", "0"]
    collect = [*flags, "--source", record(tmp_path / "recorded", frames)]
    assert get_data(*collect) == 0
    first = times_of(data_dir)
    before, _ = getData.load_features(data_dir)
    assert set(first) == {f"{name}.parquet" for name in (*TIMEFRAMES, "prices")}
    get_data(*collect)
    assert "features: up to date" in capsys.readouterr().out
    assert times_of(data_dir) == first

    frames["BBB"].loc[11_000, "volume"] *= 2  # one number of one bar
    keep(data_dir, "BBB", frames["BBB"], f"recorded:{tmp_path / 'recorded'}")
    for load in (getData.load_features, getData.load_prices):
        assert "features are older than the bars (BBB): run " in refusal(load, data_dir)
    get_data(*flags, "--job", "features")
    second = times_of(data_dir)
    assert all(second[name] != first[name] for name in first)
    after, _ = getData.load_features(data_dir)
    closed = pd.to_datetime(frames["BBB"]["timestamp"][11_000] + BAR - 1, unit="ms", utc=True)
    assert same_bits(before["5m"][:closed], after["5m"][:closed])
    assert not same_bits(before["5m"], after["5m"])

    get_data(*flags, "--job", "features", "--splits", "0.6,0.2,0.2")  # a constant that matters
    assert times_of(data_dir) != second


def test_features_are_those_of_the_formulas_at_hand(tmp_path, get_data, monkeypatch):
    """An edit of anything that decides a value counts, one of a comment or of another step does not."""
    source, first = getData._SOURCE, getData.formulas_sha256()
    monkeypatch.setattr(getData, "formulas_sha256", getData.formulas_sha256.__wrapped__)  # not cached
    code = "import getData; print(getData.formulas_sha256())"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT,
                           env=os.environ | {"PYTHONHASHSEED": "7"})  # fmt: skip
    assert other.stdout.strip() == first
    flags = ["--data-dir", tmp_path, "--symbols", "AAA", "--purge-days", "0"]
    get_data(*flags, "--source=synthetic", "--days=40")
    for old, new, counts in (
        ("    # ta would add the volume", "    # It would add the volume", False),
        ('"""Return Wilder\'s moving average', '"""Compute the moving average', False),
        ("_SAME_STEPS = 24", "_SAME_STEPS = 25", False),
        ('"ppo": 50,', '"ppo": 51,', True),
        ("alpha=1 / window", "alpha=2 / window", True),
        ('"high": "max"', '"high": "last"', True),
        ("BAR_MS, DAY_MS = ", "DAY_MS, BAR_MS = ", True),
    ):
        assert source.count(old) >= 1, old
        monkeypatch.setattr(getData, "_SOURCE", source.replace(old, new))
        assert (getData.formulas_sha256() != first) == counts, new
    said = refusal(getData.load_features, tmp_path)
    assert re.search("are of other formulas .*: run python getData.py --job features --data-dir", said)
    assert refusal(get_data, *flags[:4], "--job", "causality") == said
    before = times_of(tmp_path)
    get_data(*flags, "--job", "features")
    assert times_of(tmp_path) != before
    assert getData.load_features(tmp_path)[1]["formulas_sha256"] != first


@pytest.mark.parametrize(
    ("name", "damage", "said"),
    [("1h", lambda raw, _: raw[: len(raw) // 2], "is damaged"), ("5m", lambda *_: b"", "is damaged"),
     ("prices", lambda *_: b"hello" * 100, "is damaged"),
     ("4h", lambda raw, _: raw[:5_000] + bytes([raw[5_000] ^ 1]) + raw[5_001:], "is damaged"),
     ("15m", lambda _, frame: frame.iloc[:, ::-1], "is not the table"),
     ("5m", lambda _, frame: frame.astype("float64"), "is not the table"),
     ("1d", lambda _, frame: frame.drop(frame.index[40]), "is not the table"),
     ("prices", lambda _, frame: frame.reset_index(drop=True), "is not the table"),
     ("prices", lambda _, frame: frame * (np.arange(len(frame)) != 7)[:, None], "not above 0"),
     ("prices", lambda _, frame: -frame, "BTCUSDT.open that is not above 0")],
)  # fmt: skip
def test_damaged_features_are_refused_in_one_line(market_dir, tmp_path, name, damage, said):
    data_dir = shutil.copytree(market_dir, tmp_path / "data")
    path = data_dir / "features" / f"{name}.parquet"
    footer, frame = getData.read_footer(path), pd.read_parquet(path)
    result = damage(path.read_bytes(), frame)
    if isinstance(result, bytes):
        path.write_bytes(result)
    else:
        getData.write_parquet(path, result, footer)
    refused = refusal(getData.load_prices if name == "prices" else getData.load_features, data_dir)
    assert all(part in refused for part in (said, str(data_dir / "features"), "python getData.py"))


def test_features_of_different_runs_are_refused(tmp_path, market_dir, martingale_dir):
    assert "features: run python getData.py" in refusal(getData.load_features, tmp_path)
    shutil.copytree(market_dir / "features", tmp_path / "features")
    assert getData.load_features(tmp_path)[1]["symbols"]  # features alone are a complete input
    shutil.copy(martingale_dir / "features" / "1h.parquet", tmp_path / "features" / "1h.parquet")
    made = "run python getData.py --source=synthetic --days=110 --purge-days=9 --data-dir"
    assert f"are of different runs: {made}" in refusal(getData.load_prices, tmp_path)


def test_bars_of_another_source_are_never_mixed_in(tmp_path, get_data, capsys):
    data_dir, flags = tmp_path / "data", ["--data-dir", tmp_path / "data", "--purge-days", "0"]
    synthetic = [*flags, "--source", "synthetic", "--days", "40", "--symbols"]
    get_data(*synthetic, "AAA,BBB")
    frames = make(["AAA", "CCC"], 40, 9, 0.0)
    recorded = [*flags, "--source", record(tmp_path / "recorded", frames), "--symbols"]
    get_data(*recorded, "AAA,CCC")
    assert getData.stored_symbols(data_dir) == ["AAA", "CCC"]
    output = capsys.readouterr().out
    assert "AAA: bars of synthetic:seed=0:signal=1.0 replaced" in output
    assert "BBB: bars of synthetic:seed=0:signal=1.0 removed" in output
    get_data(*recorded, "CCC")  # the same source: nothing is removed, AAA just is not used
    assert getData.load_features(data_dir)[1]["symbols"] == ["CCC"]
    assert "holds bars of recorded:" in refusal(get_data, *synthetic, "AAA")
    assert getData.stored_symbols(data_dir) == ["AAA", "CCC"]

    keep(data_dir, "AAA", frames["AAA"], "elsewhere")
    mixed = [*flags, "--job", "features", "--symbols", "AAA,CCC"]
    assert "mix sources (AAA of elsewhere, CCC of recorded:" in refusal(get_data, *mixed)
    get_data(*synthetic, "AAA", "--replace")
    assert getData.stored_symbols(data_dir) == ["AAA"]


def test_planted_bars_live_apart_and_say_so(tmp_path, get_data, capsys):
    real, apart = tmp_path / "data", tmp_path / "data-planted"
    flags = ["--symbols", "AAA,BBB", "--purge-days", "0"]
    recorded = record(tmp_path / "recorded", make(["AAA", "BBB"], 40, 9, 0.0))
    get_data(*flags, "--source", recorded, "--data-dir", real)
    before = contents(real)
    plant = [*flags, "--source", real / "ohlcv", "--data-dir", apart, "--plant"]

    get_data(*plant, "0", "--data-dir", tmp_path / "same")  # off
    for symbol in ("AAA", "BBB"):
        paths = [folder / "ohlcv" / f"{symbol}.parquet" for folder in (real, tmp_path / "same")]
        pd.testing.assert_frame_equal(*map(pd.read_parquet, paths), check_exact=True)
    assert "NOT REAL" not in capsys.readouterr().out

    get_data(*plant, "0.3", "--seed", "4")
    mark = "NOT REAL: a drift of strength 0.3 was planted into recorded bars"
    name = f"planted:strength=0.3,seed=4 on recorded:{real / 'ohlcv'} ({mark})"
    lines = [line for line in capsys.readouterr().out.splitlines() if "NOT REAL" in line]
    assert lines == [mark, f"source: {name}"]
    kept = contents(apart)
    assert len(kept) == 2 + 6
    assert {getData.read_footer(path)["source"] for path in kept} == {name}
    bars = validate("AAA", pd.read_parquet(real / "ohlcv" / "AAA.parquet"))
    planted = pd.read_parquet(apart / "ohlcv" / "AAA.parquet")
    pd.testing.assert_frame_equal(planted, getData.plant_drift("AAA", bars, 0.3, 4), check_exact=True)
    get_data(*flags, "--data-dir", apart, "--job", "features")
    assert "features: up to date" in capsys.readouterr().out

    own = rf"is of recorded:.*: use --data-dir {real}-planted"
    for wrong, code, said in (
        ([*plant, "0.3", "--data-dir", real], 1, own),
        ([*plant, "0.3", "--data-dir", real, "--replace"], 1, own),
        ([*plant, "0.2", "--seed", "4"], 1, "holds bars of planted:strength=0.3"),
        ([*plant, "0"], 1, "holds bars of planted:strength=0.3"),
        ([*flags, "--source", "synthetic", "--data-dir", apart], 1, "holds bars of planted:"),
        ([*flags, "--source", apart / "ohlcv", "--data-dir", tmp_path / "x"], 1, "NOT REAL: give --source"),
        ([*plant, "0.3", "--source", apart / "ohlcv"], 1, "holds bars of planted:strength=0.3"),
        ([*flags, "--job", "features", "--data-dir", real, "--plant", "0.3"], 2, "--plant does nothing"),
        ([*flags, "--data-dir", real, "--plant", "0.3"], 2, "PLANT .* --source"),
        ([*flags, "--source", "synthetic", "--plant", "0.3"], 2, "PLANT .* --signal"),
        ([*plant, "-1"], 2, "PLANT"),
    ):
        assert re.search(said, refusal(get_data, *wrong, code=code))
    shutil.rmtree(real / "ohlcv")  # features alone are somebody's, too
    said = refusal(get_data, *flags, "--source", recorded, "--data-dir", real, "--plant", "0.3")
    assert "features/15m.parquet is of recorded:" in said
    assert contents(apart) == kept
    assert contents(real) == {path: data for path, data in before.items() if path.exists()}


@recorded_market
def test_a_drift_is_as_visible_in_recorded_bars_as_in_the_synthetic_market():
    """The correlation of the trend of closes, and of their signs, with the drift, strong and weak."""

    def visibility(close: pd.Series, drift: np.ndarray) -> list[float]:
        returns = np.log(close).diff().fillna(0.0)
        trends = [kind.ewm(halflife=72).mean()[3_000:] for kind in (returns, np.sign(returns))]
        return [np.corrcoef(trend, drift[3_000:])[0, 1] for trend in trends]

    for strength in (0.05, 0.3):
        with_drift, without = (make(["AAA"], 420, 0, signal)["AAA"] for signal in (strength, 0.0))
        drift = np.log(with_drift["close"] / with_drift["open"]) - np.log(without["close"] / without["open"])
        expected = visibility(with_drift["close"], drift.to_numpy())
        for symbol in ("AVAXUSDT", "TRXUSDT"):  # 10 to 20 % of whose closes are unchanged
            bars = validate(symbol, pd.read_parquet(REAL / f"{symbol}.parquet"))
            drift = getData.planted_log_drift(symbol, bars, strength, 0)
            planted = getData.plant_drift(symbol, bars, strength, 0)
            np.testing.assert_allclose(visibility(planted["close"], drift), expected, rtol=0, atol=0.1)


def test_a_late_listing_moves_the_splits_and_leaves_nan(tmp_path, get_data):
    frames = make(["AAA", "BBB"], 60, 0, 0.0)
    frames["BBB"] = frames["BBB"].iloc[10 * 288 + 100 : 50 * 288]  # from day 10 at 08:20 to the end of day 50
    flags = ["--data-dir", tmp_path / "data", "--symbols", "AAA,BBB", "--purge-days", "0"]
    collect = [*flags, "--source", record(tmp_path / "recorded", frames)]
    assert "BBB: the bars end at 2024-02-19 23:55" in refusal(get_data, *collect, code=4)
    get_data(*collect, "--max-gap", "0")
    features, footer = getData.load_features(tmp_path / "data")
    start = frames["AAA"]["timestamp"][0]
    # midnight after the listing, 31 daily bars
    assert footer["splits"]["train"][0] == start + (11 + 31) * DAY
    assert footer["splits"]["test"][1] == start + 50 * DAY + BAR
    assert features["5m"].index[-1] == pd.Timestamp(start + 50 * DAY, unit="ms", tz="UTC")
    first = pd.Timestamp(footer["splits"]["train"][0], unit="ms", tz="UTC")
    for frame in features.values():
        assert np.isfinite(frame[first:]).all(axis=None)
    assert features["1d"].filter(like="BBB.")[: first - pd.Timedelta(1, "ms")].isna().all(axis=None)
    assert np.isfinite(features["1d"].filter(like="AAA.")[30:]).all(axis=None)


@pytest.mark.parametrize(
    ("flags", "code", "said"),
    [("--source synthetic --days 80", 1, "too little history: 85 days needed, 80.0 found (BTCUSDT has"),
     ("--source nowhere", 1, "no folder nowhere"), ("--job features", 1, "no bars of BTCUSDT in "),
     ("--splits 0.5,0.5", 2, "SPLITS"), ("--days 0", 2, "DAYS"), ("--symbols X,x", 2, "SYMBOLS"),
     ("--features-only", 2, "unrecognized arguments: --features-only")],
)  # fmt: skip
def test_mistakes_end_in_one_line(tmp_path, get_data, flags, code, said):
    argv = ["--data-dir", tmp_path, "--symbols", "BTCUSDT", *flags.split()]
    assert refusal(get_data, *argv, code=code).startswith(said)
    if "90" in flags:  # exactly as many days as are needed are enough
        assert get_data(*argv, "--days", "99") == 0
        splits = getData.load_features(tmp_path)[1]["splits"]
        assert all(end - start >= DAY for start, end in splits.values())


def test_ensure_data_makes_a_market_only_where_there_is_none(tmp_path, monkeypatch, capsys, get_data):
    settings = {"JOB": "causality", "SYMBOLS": ("AAAUSDT", "BBBUSDT"), "DAYS": 100, "SOURCE": "nowhere"}
    settings |= {"DATA_DIR": tmp_path, "SEED": 0}
    for name, value in settings.items():
        monkeypatch.setattr(getData, name, value)
    getData.ensure_data(tmp_path, seed=4)
    assert "NO DATA" in capsys.readouterr().out
    assert getData.load_features(tmp_path)[1]["source"] == "synthetic:seed=4:signal=1.0"
    assert {name: getattr(getData, name) for name in settings} == settings
    before = times_of(tmp_path)
    flags = ("--source", "synthetic", "--symbols", "AAAUSDT,BBBUSDT", "--days", "100", "--seed", "4")
    assert get_data(*flags, "--job", "collect", "--data-dir", tmp_path) == 0  # the same market as by hand
    assert "features: up to date" in capsys.readouterr().out
    getData.ensure_data(tmp_path, seed=5)
    assert capsys.readouterr().out == ""
    assert times_of(tmp_path) == before


def test_workers_that_start_anew_compute_the_same(tmp_path, market_dir):
    """As on macOS, and on Linux from Python 3.14 on: there processes are not forked."""
    code = (
        "import multiprocessing, sys, getData\n"
        "from pathlib import Path\n"
        "if __name__ == '__main__':\n"
        "    multiprocessing.set_start_method('spawn')\n"
        "    bars = getData.load_bars(Path(sys.argv[1]), ['BTCUSDT', 'ETHUSDT'])\n"
        "    getData.compute_features(bars)['1h'].to_pickle(sys.argv[2])\n"
    )
    (tmp_path / "script.py").write_text(code)
    command = [sys.executable, tmp_path / "script.py", market_dir, tmp_path / "1h.pickle"]
    subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True)
    forked = getData.compute_features(getData.load_bars(market_dir, ["BTCUSDT", "ETHUSDT"]))["1h"]
    assert same_bits(pd.read_pickle(tmp_path / "1h.pickle"), forked)


def die(*_: object) -> None:
    """What a worker process does that is killed, for lack of memory say."""
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_dies_is_one_line(bars, monkeypatch):
    monkeypatch.setattr(getData, "coin_features", die)
    assert refusal(getData.compute_features, bars).startswith("features: a process was killed")


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGKILL])
def test_stopped_while_it_computes_it_leaves_the_old_features_and_no_process(tmp_path, market_dir, kind):
    """Ctrl-C reaches all processes of a terminal; the next run makes the features."""
    data_dir = shutil.copytree(market_dir, tmp_path / "data")
    before = contents(data_dir)
    command = [sys.executable, ROOT / "getData.py", "--data-dir", data_dir, "--symbols", COINS]
    command += ["--job", "features", "--splits", "0.6,0.2,0.2"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(list(map(str, command)), **pipes, start_new_session=True)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while not children.read_text():
        assert process.poll() is None
        time.sleep(0.002)
    os.kill(process.pid, kind) if kind == signal.SIGKILL else os.killpg(process.pid, kind)
    _, err = process.communicate(timeout=60)  # the workers hold the pipes too: it ends when none is left
    assert process.returncode == (-9 if kind == signal.SIGKILL else 130)
    assert err == ("" if kind == signal.SIGKILL else "interrupted\n")
    assert contents(data_dir) == before
    with Script(command[1:]) as process:
        _, err = process.communicate()
    assert process.returncode == 0, err
    assert getData.load_features(data_dir)[1]["split_shares"] == [0.6, 0.2, 0.2]


# ----------------------------------------------------------------------------------------------- real markets


@recorded_market
def test_recorded_market_end_to_end(tmp_path, get_data):
    symbols = ["BTCUSDT", "TRXUSDT"]
    get_data("--data-dir", tmp_path, "--source", REAL, "--symbols", ",".join(symbols))
    features, footer = getData.load_features(tmp_path)
    prices, _ = getData.load_prices(tmp_path)
    assert prices.notna().all(axis=None)
    for name, frame in features.items():
        assert np.isfinite(frame[30:]).all(axis=None)
        pooled = np.concatenate([frame[30:].filter(like=f"{symbol}.").to_numpy() for symbol in symbols])
        assert (pooled.std(axis=0) > 1e-4).all(), name  # none is constant
        correlation = np.abs(np.corrcoef(pooled.astype(np.float64), rowvar=False)) - np.eye(len(CHANNELS))
        assert correlation.max() < 0.97
    halt = pd.Timestamp("2023-03-24 13:40", tz="UTC")  # the exchange stood still around here
    assert prices["BTCUSDT.open"][halt] == prices["BTCUSDT.close"][halt]
    assert getData.read_footer(tmp_path / "ohlcv" / "BTCUSDT.parquet")["gaps"][0][1] == 16
    assert footer["source"].startswith("recorded:")


# ------------------------------------------------------------------------------- coins that come and go


def with_holes() -> dict[str, pd.DataFrame]:
    """Three coins over 95 days: one ends, one has a hole of five days, and all pause from day 45 to 48."""
    raw = make(["AAA", "BBB", "CCC"], 95, seed=4, signal=0.0)
    pause = slice(45 * 288, 48 * 288)
    raw = {symbol: frame.drop(frame.index[pause]) for symbol, frame in raw.items()}
    raw["BBB"] = raw["BBB"][: 40 * 288]
    raw["CCC"] = raw["CCC"].drop(range(5 * 288 + 7, 10 * 288))
    return raw


def test_a_hole_is_filled_as_long_as_nobody_knows_how_long_it_lasts():
    frames = {
        symbol: validate(symbol, frame).set_index("timestamp") for symbol, frame in with_holes().items()
    }
    bars = getData.on_one_grid(frames, limit=100)
    filled = {symbol: frame["filled"].to_numpy().nonzero()[0] for symbol, frame in bars.items()}
    absent = {symbol: frame["close"].isna().to_numpy().nonzero()[0] for symbol, frame in bars.items()}
    begins = {"AAA": [45 * 288], "BBB": [40 * 288], "CCC": [5 * 288 + 7, 45 * 288]}
    ends = {"AAA": [48 * 288], "BBB": [95 * 288], "CCC": [10 * 288, 48 * 288]}
    for symbol, first in begins.items():
        expected = np.concatenate([np.arange(start, start + 100) for start in first])
        assert filled[symbol].tolist() == expected.tolist()
        spans = [np.arange(a + 100, b) for a, b in zip(first, ends[symbol], strict=True)]
        assert absent[symbol].tolist() == np.concatenate(spans).tolist()
        for cut in (first[0] + 50, first[0] + 150):  # cut off there, nothing before is another
            shorter = {
                name: frame[: frames["AAA"].index[0] + cut * pd.Timedelta(BAR, "ms")]
                for name, frame in frames.items()
            }
            again = getData.on_one_grid(shorter, limit=100)[symbol]
            pd.testing.assert_frame_equal(again, bars[symbol].loc[again.index])


def test_features_of_a_life_are_those_of_a_coin_that_was_listed_then(tmp_path, get_data, capsys):
    """Bit for bit: no indicator reaches across a hole; prices and members say who is there."""
    source, limit = record(tmp_path / "bars", with_holes()), 288
    symbols = ("--symbols", "AAA,BBB,CCC")
    refused = refusal(get_data, "--source", source, *symbols, "--data-dir", tmp_path / "no", code=4)
    assert "--absent allow" in refused
    short = "--purge-days", 1, "--member-days", 31, "--source", source, "--data-dir", tmp_path
    get_data(*short, *symbols, "--absent", "allow")
    lines = {
        line.split()[0]: line
        for line in capsys.readouterr().out.splitlines()
        if line[:3] in ("AAA", "BBB", "CCC")
    }
    assert lines["CCC"].count("absent") == 2
    assert lines["AAA"].count("absent") == 1
    assert "ended" in lines["BBB"]
    frames, footer = getData.load_features(tmp_path)
    prices, _ = getData.load_prices(tmp_path)
    bars = getData.load_bars(tmp_path, ["AAA", "BBB", "CCC"], limit)
    there = ~bars["CCC"]["close"].isna()
    lives = (~there).cumsum()[there]
    assert lives.nunique() == 3
    for _, life in bars["CCC"][there].groupby(lives):
        for name, period in TIMEFRAMES.items():
            alone = getData.compute_channels(getData.resample(life, period)).astype(np.float32)
            stored = frames[name].loc[alone.index, [f"CCC.{channel}" for channel in CHANNELS]]
            assert stored.to_numpy().tobytes() == alone.to_numpy().tobytes()
    inside = frames["5m"].index - pd.Timedelta(BAR, "ms")
    assert frames["5m"].filter(like="CCC.")[~there[inside].to_numpy()].isna().all(axis=None)
    members = getData.members_of(prices, footer["symbols"])
    rows = np.arange(len(members))
    for coin, spans in ("AAA", [(0, 45), (48, 95)]), ("BBB", [(0, 40)]), ("CCC", [(10, 45), (48, 95)]):
        old = [(rows >= (31 + a) * 288 - 1) & (rows < b * 288 + limit) for a, b in spans]
        np.testing.assert_array_equal(members[:, "ABC".index(coin[0])], np.any(old, axis=0))
    assert prices["BBB.close"].last_valid_index() == bars["BBB"].index[40 * 288]  # its last real bar's close


def there_for(bars: dict[str, pd.DataFrame], days: int) -> pd.DataFrame:
    """Whether the last bar and all of so many days before it are there, by a rolling count."""
    there = pd.DataFrame({symbol: frame["close"].notna() for symbol, frame in bars.items()})
    return there.rolling(days * 288).sum() == days * 288


def test_the_universe_is_chosen_each_month_from_the_past_alone():
    index = pd.date_range("2024-01-01", "2024-04-10", freq="5min", unit="ms", tz="UTC", inclusive="left")
    days = (index - index[0]).days
    volumes = {"A": 3.0, "B": np.where(days < 45, 2.0, 4.0), "C": np.where(days % 20, 1.0, 1e9), "D": 5.0}
    frame = pd.DataFrame({"close": 1.0, "volume": 0.0}, index)
    bars = {symbol: frame.assign(volume=volume) for symbol, volume in volumes.items()}
    bars["D"][days < 40] = np.nan  # 20 days old in March, 51 in April
    bars["B"][days >= 95] = np.nan
    members = getData.members_over_time(bars, 2, 31)
    month = index.month.to_numpy()
    assert not members[month == 1].any(axis=None)  # nobody has been there for 31 days
    for number, names in {2: ["A", "B"], 3: ["A", "B"], 4: ["B", "D"]}.items():
        chosen = members[(month == number) & (days < 95)].all()
        assert chosen.index[chosen].tolist() == names
    assert not members["B"][days >= 95].any()
    assert getData.members_over_time(bars, 0, 31).equals(there_for(bars, 31))
    for cut in np.random.default_rng(0).integers(288, len(index), 5):
        again = getData.members_over_time({name: one.iloc[:cut] for name, one in bars.items()}, 2, 31)
        pd.testing.assert_frame_equal(again, members.iloc[:cut])


def test_births_and_deaths_leave_each_coin_a_part_of_its_bars():
    symbols = [f"C{number}" for number in range(40)]
    market = make(symbols, 30, seed=0, signal=1.0)
    lives = getData.with_lives(market, 0)
    assert 0.6 < sum(map(len, lives.values())) / sum(map(len, market.values())) < 0.9
    crashes = 0
    for symbol, frame in lives.items():
        whole = market[symbol].set_index("timestamp").loc[frame["timestamp"]]
        last = len(frame) - 288
        assert frame["close"].to_numpy()[:last].tolist() == whole["close"].to_numpy()[:last].tolist()
        validate(symbol, frame)
        crashes += frame["close"].iloc[-1] < 0.11 * whole["close"].iloc[-1]
    ended = sum(
        frame["timestamp"].iloc[-1] < market[symbol]["timestamp"].iloc[-1] for symbol, frame in lives.items()
    )
    assert 0 < crashes < ended < 40
