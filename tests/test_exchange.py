"""Collecting from an exchange: the unmodified ccxt classes against a loopback server that lies, stalls and
bans."""

import contextlib
import os
import random
import re
import resource
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import ccxt.async_support as ccxt
import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, put_back
from exchange_server import (
    BAR_MS,
    BODY_FAULTS,
    FAULTS,
    STATUS_FAULTS,
    ExchangeServer,
    make_bars,
    milliseconds,
)
from forked import Script
from hypothesis import given
from hypothesis import strategies as st

import getData

START = "2024-01-01"
PAIRS = ("BTCUSDT", "ETHUSDT", "DOGEUSDT")
FLAGS = ["--timeout=10", "--rate-share=0", "--job=bars"]
WAITS = {"max_retries": 3, "backoff_base": 0.01, "backoff_max": 0.05, "confirm_delay": 0.01, "concurrency": 8}
IMPATIENT = "--timeout=1"  # where the server lets a request hang
# end at once, with this exit code; what else fails is tried again
FATAL = {"451": 3, "403 country": 3, "418 for hours": 3, "429 for ever": 3, "code -1121": 4}
PAUSES = ("429", "418", "418 for hours", "429 for ever")  # concern all symbols
HARMLESS = ("duplicate", "shuffled", "descending")  # repaired without asking
# Told every time, these lies cannot be told from the truth: missing bars are a gap, a spike is a crash, and
# half a page is little at a time.
BELIEVED = ("missing", "first missing", "spike", "short")
LATER = ("revised last",)  # seen only when the next page overlaps it
UNIT, OHLC = "not in milliseconds", "high/low inconsistent"
RULES = {  # what is said of bars that stay bad
    "conflicting": "duplicate", "off grid": "off the 5-minute grid", "microseconds": UNIT, "seconds": UNIT,
    "nan": "non-finite", "null value": "non-finite", "high below low": OHLC, "low above open": OHLC,
    "zero price": "price <= 0", "negative volume": "volume < 0",
}  # fmt: skip


@dataclass
class Outcome:
    """What a run printed."""

    out: str
    err: str


def arguments(server: ExchangeServer, data_dir: Path, *flags: object) -> list[str]:
    """The flags that collect all of a server's pairs, and those given."""
    own = ["--base-url", server.url, "--data-dir", data_dir, "--start", START]
    return [str(part) for part in (*own, "--symbols", ",".join(server.bars), *FLAGS, *flags)]


@pytest.fixture
def run(tmp_path, capfd, monkeypatch):
    """Runs getData's main against a server, looks at its exit code, and returns its output."""

    def run(
        server: ExchangeServer, *flags: object, exchange: str = "binance", code: int = 0, **waits: float
    ) -> Outcome:
        for name, value in (WAITS | waits).items():
            monkeypatch.setattr(getData, f"_{name.upper()}", value)
        argv = arguments(server, tmp_path, "--exchange", exchange, *flags)
        with put_back(getData), pytest.raises(SystemExit) as ending:
            getData.run_script(lambda: getData.main(argv))
        outcome = Outcome(*capfd.readouterr())
        assert ending.value.code == code, outcome.err
        assert "Traceback" not in outcome.err
        assert any(line.startswith("error: ") for line in outcome.err.splitlines()) == bool(code)
        return outcome

    return run


def stored(data_dir: Path, symbol: str) -> np.ndarray:
    """The bars on disk [n, 6], as the server counts them; none if there is no file."""
    path = data_dir / "ohlcv" / f"{symbol}.parquet"
    if not path.exists():
        return np.empty((0, 6))
    frame = pd.read_parquet(path)
    assert getData.read_footer(path)["values_sha256"] == getData.values_sha256(frame)
    return getData.bar_array(frame)


def assert_whole(data_dir: Path, server: ExchangeServer, *symbols: str) -> None:
    """All that is on disk of these symbols, or of all, is the truth, and all of it."""
    for symbol in symbols or server.bars:
        np.testing.assert_array_equal(stored(data_dir, symbol), server.closed(symbol), err_msg=symbol)


def assert_prefix(data_dir: Path, server: ExchangeServer) -> int:
    """All that is on disk is the truth from the first bar on, as far as it goes; returns how much that is."""
    parts = {symbol: stored(data_dir, symbol) for symbol in server.bars}
    for symbol, bars in parts.items():
        np.testing.assert_array_equal(bars, server.closed(symbol)[: len(bars)], err_msg=symbol)
    return sum(map(len, parts.values()))


def revise(server: ExchangeServer, symbol: str, rows: slice) -> None:
    """Let the server serve other volumes in these rows."""
    bars = server.bars[symbol].copy()
    bars[rows, 5] += 1
    server.set_bars(symbol, bars)


def bar_time(row: int) -> str:
    return getData.when(milliseconds(START) + row * BAR_MS)


# ---- what comes, and how often it is asked for -------------------------------------------------------------


@pytest.mark.parametrize(("exchange", "pages"), [("binance", 3), ("okx", 9)])
def test_whole_market_page_by_page_and_nothing_the_second_time(run, tmp_path, exchange, pages):
    with ExchangeServer(PAIRS[:2], START, 2500) as server:
        run(server, exchange=exchange)
        assert_whole(tmp_path, server)
        assert server.count() == 2 * (pages + 1)  # the first page has nothing to join on to: asked twice
        assert {request.exchange for request in server.requests} == {exchange}
        assert not (tmp_path / "features").exists()
        paths = sorted((tmp_path / "ohlcv").iterdir())
        before = [(path.stat().st_mtime_ns, path.stat().st_ino) for path in paths]
        server.forget()
        run(server, exchange=exchange)
        assert server.count("bars") == server.count("markets") == 0
        assert [(path.stat().st_mtime_ns, path.stat().st_ino) for path in paths] == before


@pytest.mark.parametrize("exchange", ["binance", "okx"])
def test_update_asks_once_per_symbol_and_never_stores_the_open_bar(run, tmp_path, exchange):
    with ExchangeServer(PAIRS, START, 1000) as server:
        server.clock -= 500 * BAR_MS
        run(server, exchange=exchange)
        assert all(len(stored(tmp_path, symbol)) == 500 for symbol in PAIRS)
        for bars in (1, 3):
            server.forget()
            server.clock += bars * BAR_MS
            run(server, exchange=exchange)
            assert server.count() == len(PAIRS)
            assert all(request.limit <= bars + 3 for request in server.requests if request.endpoint == "bars")
            assert_whole(tmp_path, server)


def test_bar_counts_as_closed_two_seconds_after_its_end(run, tmp_path):
    with ExchangeServer(PAIRS[:1], START, 600) as server:
        server.clock = milliseconds(START) + 500 * BAR_MS + 1_900  # the run waits for a tenth of a second
        run(server)
        assert len(stored(tmp_path, "BTCUSDT")) == 500
        server.clock = milliseconds(START) + 510 * BAR_MS - 1
        run(server)
        assert len(stored(tmp_path, "BTCUSDT")) == 509


def test_start_and_end_are_half_open_utc_and_other_ranges_are_joined_on(run, tmp_path):
    with ExchangeServer(PAIRS[:1], START, 9000) as server:

        def days(first: float, stop: float) -> None:
            np.testing.assert_array_equal(
                stored(tmp_path, "BTCUSDT"), server.closed("BTCUSDT")[round(first * 288) : round(stop * 288)]
            )

        run(server, "--start", "2024-01-08", "--end", "2024-01-09")
        days(7, 8)
        server.forget()
        run(server, "--start", "2024-01-01T12:03", "--end", "2024-01-09T12:00+02:00")
        days(0.5, 8 + 10 / 24)
        # the bar to join on to; two pages before, the first twice; one after
        assert server.count() == 1 + 2 + 1 + 1
        run(server, "--start", "2024-01-20")  # apart from what is stored
        days(0.5, 100)
        assert len(getData.read_footer(tmp_path / "ohlcv" / "BTCUSDT.parquet")["spans"]) == 1
        run(server)
        assert_whole(tmp_path, server)


def test_symbols_in_any_spelling_and_the_default_start(run, tmp_path):
    with ExchangeServer(("BTCUSDT", "ETHUSDT", "币安BTCUSDT", "币安人生USDT"), "2020-12-30", 2000) as server:
        server.drop_bars("ETHUSDT", 0, 1500)  # listed in January
        flags = "--symbols", "btc/usdt,ETH-USDT", "--start", getData.START
        assert "listed 2021-01-04 05:00" in run(server, *flags).out
        assert sorted(path.stem for path in (tmp_path / "ohlcv").iterdir()) == ["BTCUSDT", "ETHUSDT"]
        assert stored(tmp_path, "BTCUSDT")[0, 0] == milliseconds("2021-01-01")
        assert_whole(tmp_path, server, "ETHUSDT")
        run(server, "--start", "2020-12-30")  # names that differ in another alphabet are other coins
        assert_whole(tmp_path, server)
    with ExchangeServer(("A.CUSDT", "A-CUSDT"), START, 300) as server:
        assert "ACUSDT may be A-C/USDT or A.C/USDT" in run(server, "--symbols", "ACUSDT", code=2).err
        run(server, "--symbols", "A.C/USDT", "--end", "2024-01-01T12:00")
        said = run(server, "--symbols", "A-C/USDT", code=4).err
        assert "ACUSDT: binance no longer returns the bars stored" in said


@pytest.mark.parametrize(
    ("listed", "symbols", "code", "said"),
    [("BTCUSDT ETHUSDT", "BTC/USDT:USDT", 2, "binance has no spot pair BTC/USDT:USDT"),
     ("BTCUSDT ETHUSDT", "btc_usdt_usdt-5m-futures", 2, "binance has no spot pair btc_usdt_usdt-5m-futures"),
     ("kPEPEUSDT KPEPEUSDT", "KPEPEUSDT", 2, "KPEPEUSDT may be KPEPEUSDT or kPEPEUSDT on binance"),
     ("XBTUSDT BTCUSDT", "BTC/USDT", 2, "BTC/USDT may be BTCUSDT or XBTUSDT on binance"),
     ("BTCUSDT ETHUSDC", "BTCUSDT,ETHUSDC", 1, "ETHUSDC is quoted in USDC, BTCUSDT in USDT: .* --quote"),
     ("BTCUSDT ETHUSDC", "BTCUSDT --quote USDC", 1, "BTCUSDT is quoted in USDT, --quote in USDC: ")],
)  # fmt: skip
def test_pairs_that_are_not_the_one_meant_are_refused_by_name(run, tmp_path, listed, symbols, code, said):
    with ExchangeServer(listed.split(), START, 300) as server:
        errors = run(server, "--symbols", *symbols.split(), code=code).err
        assert re.search(f"error: {said}", errors)
        assert not list(tmp_path.glob("ohlcv/*"))


def test_coins_of_an_account_have_the_quote_currency_that_the_exchange_names(run, tmp_path):
    """What was collected coin by coin is refused before features are made."""
    with ExchangeServer(("BTCUSDT", "ETHUSDC"), START, 300) as server:
        for symbol, quote in (("BTCUSDT", "USDT"), ("ETHUSDC", "USDC")):
            run(server, "--symbols", symbol)
            assert getData.read_footer(tmp_path / "ohlcv" / f"{symbol}.parquet")["quote"] == quote
    argv = ["--job", "features", "--symbols", "BTCUSDT,ETHUSDC", "--data-dir", str(tmp_path)]
    with put_back(getData), pytest.raises(getData.UserError, match="ETHUSDC is quoted in USDC, BTCUSDT in"):
        getData.main(argv)


# ---- faults ------------------------------------------------------------------------------------------------


def pair_of(kind: str) -> str:
    """A pair named after a fault, so that a failure names it."""
    return re.sub("[^A-Z0-9]", "", kind.upper()) + "USDT"


@pytest.mark.parametrize(("exchange", "skip"), [("binance", 0), ("binance", 2), ("binance", 3), ("okx", 2)])
def test_faults_that_pass(run, tmp_path, exchange, skip):
    """Every fault once, each on a pair of its own: in its first page, in the middle, and in its last page."""
    kinds = [kind for kind in FAULTS if kind not in (*FATAL, *LATER)]
    with ExchangeServer(tuple(map(pair_of, kinds)), START, 2500) as server:
        faults = [server.fault(kind, symbol=pair_of(kind), skip=skip) for kind in kinds]
        assert "revised" not in run(server, IMPATIENT, exchange=exchange).out
        assert all(fault.hits == 1 for fault in faults)
        assert_whole(tmp_path, server)


def test_faults_that_stay(run, tmp_path):
    """Every fault for ever, from the second page of its own pair on: that one fails, the others are whole."""
    kinds = [kind for kind in FAULTS if kind not in (*BELIEVED, *LATER, *PAUSES, *FATAL)]
    with ExchangeServer((*map(pair_of, kinds), "BTCUSDT"), START, 2500) as server:
        for kind in kinds:
            server.fault(kind, symbol=pair_of(kind), skip=2, times=-1)
        lines = run(server, IMPATIENT, max_retries=1, code=4).err.splitlines()
        assert_prefix(tmp_path, server)
        for kind in kinds:
            failed = [line for line in lines if line.startswith(f"error: {pair_of(kind)}: ")]
            assert len(failed) == (kind not in HARMLESS), lines
            if kind in (*STATUS_FAULTS, *BODY_FAULTS):
                assert "no answer in 2 tries" in failed[0]  # not taken for an empty page
            if kind in RULES:
                assert failed[0].endswith(RULES[kind])
                assert "milliseconds" in RULES[kind] or re.search(r"bar \d+ \(2024-01-04T", failed[0])
            assert (len(stored(tmp_path, pair_of(kind))) == 2500) == (kind in HARMLESS)
        assert_whole(tmp_path, server, "BTCUSDT")
        server.forget()
        run(server)
        assert_whole(tmp_path, server)


@pytest.mark.parametrize("kind", FATAL)
def test_fault_that_ends_at_once(run, tmp_path, kind):
    with ExchangeServer(PAIRS, START, 2500) as server:
        server.fault(kind, symbol="ETHUSDT", skip=2)
        assert "no features" in run(server, code=FATAL[kind]).err
        assert_prefix(tmp_path, server)
        run(server)
        assert_whole(tmp_path, server)


def test_lies_that_are_told_every_time_are_kept_only_as_far_as_they_can_be_true(run, tmp_path):
    with ExchangeServer(tuple(map(pair_of, BELIEVED)), START, 2500) as server:
        for kind in BELIEVED:
            server.fault(kind, symbol=pair_of(kind), skip=2, times=-1)
        argv = arguments(server, tmp_path, "--exchange=binance")
        with put_back(getData), contextlib.suppress(getData.UserError):
            getData.main(argv)
        for kind in BELIEVED:
            bars, truth = stored(tmp_path, pair_of(kind)), server.closed(pair_of(kind))
            assert len(bars) > 999
            if kind != "spike":
                np.testing.assert_array_equal(bars, truth[np.isin(truth[:, 0], bars[:, 0])])


def test_faults_in_pairs_and_clock(run, tmp_path):
    """One after the other: each is tried again, and none is taken for an answer."""
    with ExchangeServer(PAIRS[:1], START, 300) as server:
        for kind in (*STATUS_FAULTS, *BODY_FAULTS):
            if kind not in FATAL:
                server.fault(kind, endpoint="time")
                server.fault(kind, endpoint="markets")
        run(server, IMPATIENT, max_retries=40)
        assert_whole(tmp_path, server)


def test_faults_that_are_told_twice(run, tmp_path):
    """Two answers in a row that agree are believed, as far as the bars before and after agree with them."""
    kinds = [kind for kind in FAULTS if kind not in FATAL]
    with ExchangeServer(tuple(map(pair_of, kinds)), START, 4500) as server:
        faults = [server.fault(kind, symbol=pair_of(kind), skip=3, times=2) for kind in kinds]
        outcome = run(server, IMPATIENT)
        assert all(fault.hits == 2 or fault.kind in HARMLESS for fault in faults)
        for kind in kinds:
            bars, truth = stored(tmp_path, pair_of(kind)), server.closed(pair_of(kind))
            assert len(bars) == len(truth) - {"missing": 3}.get(kind, 0), kind
            differing = (~getData.rows_in(bars, truth)).sum()
            assert differing == (kind == "spike"), kind  # as a real crash would be
        assert outcome.out.count("price jump") == 1


@pytest.mark.parametrize("skip", [0, 2])
def test_object_without_bars_is_not_taken_for_an_empty_page(run, tmp_path, skip):
    """Told twice, it would be believed."""
    kinds = ("unexpected object", "object of null", "null", "html", "empty body")
    with ExchangeServer(tuple(map(pair_of, kinds)), START, 2500) as server:
        for kind in kinds:
            server.fault(kind, symbol=pair_of(kind), skip=skip, times=2)
        outcome = run(server, exchange="okx")
        assert all(fault.hits == 2 for fault in server.faults)
        assert_whole(tmp_path, server)
        assert len(re.findall("retry 2 of 3", outcome.err)) == len(kinds)  # what is doubted is no retry


def test_nobody_asks_while_the_exchange_wants_a_pause(run, tmp_path):
    with ExchangeServer(tuple(f"{coin}USDT" for coin in "ABCD"), START, 5000, latency=0.02) as server:
        fault = server.fault("429", skip=12)
        run(server)
        assert_whole(tmp_path, server)
        times = [request.when for request in server.requests]
        # Retry-After is 1 second. What is on its way comes still: one request of each of the other workers.
        assert sum(fault.when < t < fault.when + 1 for t in times) < len(server.bars)
        assert server.count() == 4 * 7 + 1


def test_retries_are_said_and_the_pauses_between_them_grow(run):
    with ExchangeServer(PAIRS[:1], START, 100) as server:
        server.fault("500", times=3)
        server.fault("429")
        lines = run(server, max_retries=5, backoff_base=0.1, backoff_max=10, confirm_delay=0.3).err
        rules = ["500 .*retry 1 of 5 in 0", "500 .*retry 2", "500 .*retry 3", "429 .*retry 4 of 5 in [12]"]
        lines = [line for line in lines.splitlines() if "retry" in line]
        for line, rule in zip(lines, rules, strict=True):
            assert re.match(rf"BTCUSDT: no answer \(.*{rule}", line)
        times = [request.when for request in server.requests if request.endpoint == "bars"]
        # half the base at least, doubled twice; Retry-After; the second look
        assert (np.diff(times) >= [0.05, 0.1, 0.2, 1, 0.3]).all()


def test_pauses_and_patience_have_limits(run, monkeypatch):
    with ExchangeServer(PAIRS[:1], START, 100) as server:
        server.fault("500", times=3)
        run(server, backoff_base=1e6, backoff_max=0.01)  # else it would last for days
        monkeypatch.setattr(getData, "_PATIENCE", 0.3)
        server.clock += BAR_MS
        server.forget()
        server.fault("500", times=-1)
        errors = run(server, max_retries=1000, backoff_base=0.1, backoff_max=0.1, code=3).err
        assert 2 <= server.count() <= 8  # the pauses are 0.05 to 0.1 s
        assert f"no answer in {server.count()} tries" in errors


@pytest.mark.parametrize(
    ("kind", "endpoint", "requests", "said"),
    [
        ("418 for hours", "bars", 2 + 8, "accepts no requests before"),  # clock, pairs, and all workers
        ("451", "", 1, "does not serve this country"),
        ("403 country", "", 1, "--exchange"),
        ("403", "", 4, "a firewall or a blocked country? try another --exchange"),  # tried again
    ],
)
def test_refusal_ends_the_run_with_advice(run, kind, endpoint, requests, said):
    with ExchangeServer(tuple(f"{coin}USDT" for coin in "ABCDEFGHIJKL"), START, 5000) as server:
        server.fault(kind, endpoint=endpoint, times=-1)
        assert said in run(server, code=3).err
        assert len(server.requests) <= requests


@pytest.mark.parametrize(
    ("exchange", "days", "apart"), [("binance", -99, r"\+"), ("okx", 5, "-"), ("okx", 0, "")]
)
def test_machine_whose_clock_is_wrong_goes_by_the_clock_of_the_exchange(run, tmp_path, exchange, days, apart):
    """That is so many days ahead; where both agree nothing is said."""
    stop = (time.time() // 300 + days * 288) * BAR_MS
    with ExchangeServer(PAIRS[:1], getData.when(stop - 3000 * BAR_MS), 3000) as server:
        server.clock = stop + time.time() * 1000 % BAR_MS
        errors = run(server, "--start", getData.when(stop - 3000 * BAR_MS), exchange=exchange).err
        assert re.fullmatch(f"this machine's clock is {apart}.*\n" if apart else "", errors)
        assert_whole(tmp_path, server)


def test_clock_that_stays_wrong_ends_the_run(run, tmp_path):
    with ExchangeServer(PAIRS[:1], START, 300) as server:
        whole = server.clock
        for wrong in (0, 1_704_067_200, 1_704_067_200_000_000, None, "noon"):
            server.clock = wrong
            *retries, error = run(server, code=3).err.splitlines()[:4]
            assert [f"retry {retry} of 3" in line for retry, line in enumerate(retries, 1)] == [True] * 3
            assert error.startswith("error: clock: no answer in 4 tries")
        assert server.count() == 0
        assert not list(tmp_path.glob("ohlcv/*"))
        server.clock = whole
        run(server)
        assert_whole(tmp_path, server)
        server.url = "http://127.0.0.1:9"  # nobody listens
        assert "run again" in run(server, code=3).err


# ---- gaps, listings, revisions -----------------------------------------------------------------------------


def without(first: int, last: int) -> Callable[[ExchangeServer], None]:
    """ETHUSDT has no bars in these rows."""
    return lambda server: server.drop_bars("ETHUSDT", first, last)


def altered(rows: slice, columns: slice, factor: float) -> Callable[[ExchangeServer], None]:
    """ETHUSDT has other numbers in these rows and columns."""

    def change(server: ExchangeServer) -> None:
        bars = server.bars["ETHUSDT"].copy()
        bars[rows, columns] *= factor
        server.set_bars("ETHUSDT", bars)

    return change


@pytest.mark.parametrize(
    ("change", "exchange", "flags", "code", "said"),
    [(without(1000, 1042), "binance", "", 0, r"ETHUSDT.* 42 +42 +0\n"),  # missing, longest, without volume
     (altered(slice(100, 117), slice(5, 6), 0), "binance", "", 0, r"ETHUSDT.* 0 +0 +17\n"),
     (without(700, 1700), "binance", "", 4, "ETHUSDT: 1000 bars .* from 2024-01-03 10:20 .* --max-gap 1000"),
     (without(700, 1700), "okx", "--max-gap 1000", 0, ""),  # more than three pages of okx
     (without(700, 1700), "okx", "--start 2024-01-07", 0, ""),
     (without(0, 1234), "okx", "", 0, "listed 2024-01-05 06:50"),
     *((without(0, 3000 + row), "binance", "", 0, "listed 2024-01-11 ") for row in (-1, 0, 1)),  # a page ago
     (without(0, 2000), "binance", "--end 2024-01-04", 4, "no bars from 2024-01-01 00:00 to 2024-01-04 00"),
     (without(3900, 4001), "binance", "", 0, "ended 2024-01-14 12:55"),
     (without(1500, 4001), "okx", "", 4, "the bars end at 2024-01-06 04:55"),
     (altered(slice(1200, None), slice(1, 5), 0.25), "binance", "", 0, "1 price jump")],  # a crash
)  # fmt: skip
def test_gaps_listings_and_crashes_are_kept_and_said(run, tmp_path, change, exchange, flags, code, said):
    with ExchangeServer(PAIRS[:2], START, 4000) as server:
        change(server)
        outcome = run(server, *flags.split(), exchange=exchange, code=code)
        assert re.search(said, outcome.out + outcome.err)
        for symbol in server.bars:
            bars, truth = stored(tmp_path, symbol), server.closed(symbol)
            first, last = truth[0, 0], truth[-1, 0]
            first = milliseconds("2024-01-07") if "start" in flags else first
            last = milliseconds("2024-01-04") - BAR_MS if "end" in flags else last
            np.testing.assert_array_equal(bars, truth[(truth[:, 0] >= first) & (truth[:, 0] <= last)])
        server.forget()
        run(server, *flags.split(), exchange=exchange, code=code)
        assert server.count() == 0 or "end" in said + flags  # it may have come back


def test_young_gap_is_asked_again_until_it_is_filled_an_old_one_is_not(run, tmp_path):
    with ExchangeServer(PAIRS[:2], START, 9000) as server:
        whole = server.bars["BTCUSDT"]
        server.drop_bars("BTCUSDT", 2500, 2510)  # in the week before the end, and long before the present
        server.drop_bars("ETHUSDT", 2800, 9001)  # delisted
        for _ in range(2):
            asked = server.count()
            run(server, "--end", "2024-01-11")
        assert server.count() == asked
        server.set_bars("BTCUSDT", whole)
        server.drop_bars("BTCUSDT", 8900, 8910)
        flags = "--symbols", "BTCUSDT", "--start", "2024-01-20", "--data-dir", tmp_path / "young"
        run(server, *flags)
        server.set_bars("BTCUSDT", whole)
        server.forget()
        run(server, *flags)
        assert server.count() == 1
        first = (milliseconds("2024-01-20") - milliseconds(START)) // BAR_MS
        np.testing.assert_array_equal(stored(tmp_path / "young", "BTCUSDT"), server.closed("BTCUSDT")[first:])


@pytest.mark.parametrize(
    ("exchange", "kind"), [("binance", "empty page"), ("okx", "empty page"), ("okx", "first missing")]
)
def test_lie_about_the_first_bars_is_found_out_by_the_later_ones(run, tmp_path, exchange, kind):
    with ExchangeServer(PAIRS[:2], START, 4000) as server:
        # as often as is believed where nothing speaks against it
        fault = server.fault(kind, symbol="ETHUSDT", times=2)
        assert "listed" not in run(server, exchange=exchange).out
        assert fault.hits == 2
        assert_whole(tmp_path, server)


def test_windows_that_seem_empty_are_asked_twice_each_and_again_from_their_end(run, tmp_path):
    with ExchangeServer(PAIRS[:1], START, 6000) as server:
        server.drop_bars("BTCUSDT", 1000, 4000)  # ten windows of okx
        run(server, "--max-gap", "0", exchange="okx")
        assert_whole(tmp_path, server)
        asked = Counter(request.since for request in server.requests if request.endpoint == "bars")
        assert max(asked.values()) == asked.pop(None) == 2  # whether there are later bars is asked once
        assert sum(1000 < (since - milliseconds(START)) // BAR_MS < 4000 for since in asked) == 10 + 1


def test_stored_pair_that_is_listed_no_longer_fails_alone(run, tmp_path):
    """A list of pairs that comes in part once is asked for again."""
    with ExchangeServer(PAIRS, START, 3000) as server:
        server.clock -= 100 * BAR_MS
        server.fault("last pair missing", endpoint="markets")
        run(server)
        assert_whole(tmp_path, server)
        server.clock += 100 * BAR_MS
        server.fault("last pair missing", endpoint="markets", times=-1)
        lines = run(server, code=4).err.splitlines()
        (error,) = [line for line in lines if line.startswith("error")]
        assert error.startswith("error: DOGEUSDT is listed no longer")
        np.testing.assert_array_equal(stored(tmp_path, "DOGEUSDT"), server.closed("DOGEUSDT")[:2900])
        assert_whole(tmp_path, server, *PAIRS[:2])
        run(server, "--end", "2024-01-11")  # nothing more is wanted of it
        said = run(server, "--absent", "allow")  # it has ended
        assert "ended" in next(line for line in said.out.splitlines() if line.startswith("DOGEUSDT"))
        assert "error" not in said.err


def test_bars_of_another_timeframe_and_shifted_ones_are_refused(run, tmp_path):
    with ExchangeServer(PAIRS, START, 5000) as server:
        returns = server.bars["BTCUSDT"][:, 4] / 100  # the other coins move as this one does
        for symbol, hours in (("ETHUSDT", 0), ("DOGEUSDT", 1)):
            bars = server.bars[symbol].copy()
            bars[:, 1:5] = np.roll(7 * returns, 12 * hours)[:, None]
            server.set_bars(symbol, bars)
        said = run(server, code=4).err
        assert re.search("DOGEUSDT: its bars from .* are 60 minutes too late", said)
        run(server, "--symbols", "BTCUSDT,ETHUSDT")
        server.set_bars("ETHUSDT", np.delete(server.bars["ETHUSDT"], range(1, 4990, 2), axis=0))
        there = "--data-dir", tmp_path / "longer"
        errors = run(server, "--max-gap", "0", *there, "--symbols", "BTCUSDT,ETHUSDT", code=4).err
        assert "bars are 10 minutes apart from 2024-01-01 00:00 on" in errors
        assert len(stored(tmp_path / "longer", "BTCUSDT")) == 5000
        assert len(stored(tmp_path / "longer", "ETHUSDT")) == 0


@pytest.mark.parametrize("revised", [10, 999, 4990])
def test_revised_bars_replace_the_stored_ones_over_several_pages_too(run, tmp_path, revised):
    with ExchangeServer(PAIRS[:1], START, 9000) as server:
        server.clock -= 1000 * BAR_MS
        run(server)
        revise(server, "BTCUSDT", slice(8000 - revised, 8000))
        server.clock += 1000 * BAR_MS
        assert f"{revised} bars revised" in run(server).out
        assert_whole(tmp_path, server)


def test_bar_that_came_wrong_is_put_right_by_the_next_overlap(run, tmp_path):
    with ExchangeServer(PAIRS[:2], START, 2500) as server:
        # two bars of the second page, which the third overlaps; the last closed bar, which the next run does
        server.fault("revised last", symbol="BTCUSDT", skip=2)
        server.fault("revised last", symbol="ETHUSDT", skip=3)
        server.clock -= BAR_MS
        assert "2 bars revised" in run(server).out
        assert_whole(tmp_path, server, "BTCUSDT")
        assert (stored(tmp_path, "ETHUSDT") != server.closed("ETHUSDT")).sum() == 1
        server.clock += BAR_MS
        run(server)
        assert_whole(tmp_path, server)


def test_bars_before_the_stored_ones_must_join_on_to_them(run, tmp_path):
    with ExchangeServer(PAIRS[:1], START, 2500) as server:
        run(server, "--start", bar_time(1500))
        server.forget()
        server.fault("revised last", skip=3)  # in the page that reaches the stored bars
        assert "revised" not in run(server).out
        assert_whole(tmp_path, server)
        assert server.count() == 5  # the first stored bar, then each of the two pages twice


@pytest.mark.parametrize("before", [999, 1000, 2500])
def test_bars_before_rewritten_ones_are_refused_and_the_file_left_alone(run, tmp_path, before):
    """A page that ends just before the stored bars, one that reaches them, and several pages."""
    with ExchangeServer(PAIRS[:1], START, 4000) as server:
        run(server, "--start", bar_time(before))
        old = stored(tmp_path, "BTCUSDT")
        revise(server, "BTCUSDT", slice(before, None))
        for _ in range(2):
            errors = run(server, code=4).err
            assert f"no longer returns the bars stored from {bar_time(before)} on" in errors
            np.testing.assert_array_equal(stored(tmp_path, "BTCUSDT"), old)


@pytest.mark.parametrize(
    ("exchange", "before", "revised", "code"),
    [("binance", 200, 1, 0), ("binance", 1000, 2500, 0), ("okx", 2500, 600, 0), ("okx", 200, 2500, 4)],
)
def test_bars_before_revised_ones_are_joined_on_where_both_agree(
    run, tmp_path, exchange, before, revised, code
):
    """Within five pages: those of okx are shorter."""
    with ExchangeServer(PAIRS[:1], START, 9000) as server:
        run(server, "--start", bar_time(before), exchange=exchange)
        revise(server, "BTCUSDT", slice(before, before + revised))
        outcome = run(server, exchange=exchange, code=code)
        if code:
            assert len(stored(tmp_path, "BTCUSDT")) == 9000 - before
        else:
            assert f"{revised} bar{'s' * (revised > 1)} revised" in outcome.out
            assert_whole(tmp_path, server)


def test_update_that_finds_nothing_is_to_be_tried_again(run, tmp_path):
    """No bars at all are no other bars."""
    with ExchangeServer(PAIRS[:2], START, 3000) as server:
        server.clock -= 20 * BAR_MS
        run(server, "--start", "2024-01-02")
        before = stored(tmp_path, "ETHUSDT")
        server.clock += 20 * BAR_MS
        server.fault("empty page", symbol="ETHUSDT", times=-1)
        for start in ("2024-01-02", START):  # after the stored bars, and also before them
            errors = run(server, "--start", start, code=3).err
            assert "returns none of the bars stored" in errors
            assert "move" not in errors
            np.testing.assert_array_equal(stored(tmp_path, "ETHUSDT"), before)
        server.forget()
        run(server)
        assert_whole(tmp_path, server)


def test_rewritten_history_is_refused_and_the_file_left_alone(run, tmp_path):
    with ExchangeServer(PAIRS[:1], START, 8000) as server:
        server.clock -= 500 * BAR_MS
        run(server)
        before = stored(tmp_path, "BTCUSDT")
        revise(server, "BTCUSDT", slice(None))
        server.clock += 500 * BAR_MS
        assert "no longer returns the bars stored" in run(server, code=4).err
        np.testing.assert_array_equal(stored(tmp_path, "BTCUSDT"), before)


def test_exchange_that_serves_only_its_last_bars(run, tmp_path):
    with ExchangeServer(("BTCUSDT", "DOGEUSDT"), START, 2100) as server:
        server.recent = 1000
        server.clock -= 100 * BAR_MS
        server.drop_bars("DOGEUSDT", 0, 1600)  # listed late, within what is served
        first = bar_time(2000 - 1000)
        errors = run(server, code=4).err
        assert f"BTCUSDT: binance serves only its last 1000 bars, now from {first} on" in errors
        assert not stored(tmp_path, "BTCUSDT").size
        assert_whole(tmp_path, server, "DOGEUSDT")
        flags = ["--symbols", "BTCUSDT", "--start", first]
        for bars in (1000, 1100):  # again: all that was stored is kept
            run(server, *flags)
            np.testing.assert_array_equal(stored(tmp_path, "BTCUSDT"), server.closed("BTCUSDT")[-bars:])
            server.forget()
            server.clock += 100 * BAR_MS


# ---- files -------------------------------------------------------------------------------------------------


def test_damaged_files_are_set_aside_and_fetched_again(run, tmp_path):
    with ExchangeServer(PAIRS, START, 1500) as server:
        run(server)
        folder = tmp_path / "ohlcv"
        (folder / "BTCUSDT.parquet.tmp").write_bytes(b"half a file")
        path = folder / "ETHUSDT.parquet"
        footer, frame = getData.read_footer(path), pd.read_parquet(path)
        frame.loc[700, "volume"] += 1
        getData.write_parquet(path, frame, footer)
        (folder / "DOGEUSDT.parquet").write_bytes((folder / "DOGEUSDT.parquet").read_bytes()[:-900])
        errors = run(server).err
        assert_whole(tmp_path, server)
        for symbol in ("ETHUSDT", "DOGEUSDT"):
            assert f"{symbol}.parquet is damaged" in errors
            assert (folder / f"{symbol}.parquet.corrupt").exists()
        assert len(list(folder.iterdir())) == 3 + 2


def test_disk_that_fills_up_leaves_what_was_saved(run, tmp_path):
    """A limit on the size of files stands for the disk; no worker adds an error of its own."""
    with ExchangeServer(PAIRS, START, 9000, latency=0.01) as server:
        server.clock -= 8000 * BAR_MS
        run(server)
        before = {path.name: path.read_bytes() for path in (tmp_path / "ohlcv").iterdir()}
        server.clock += 8000 * BAR_MS
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (max(map(len, before.values())), limits[1]))
        try:
            errors = run(server, code=1).err
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert re.match(r"error: File too large \(.*USDT.parquet\): ", errors.splitlines()[-1])
        assert {path.name: path.read_bytes() for path in (tmp_path / "ohlcv").iterdir()} == before
        run(server)
        assert_whole(tmp_path, server)


def test_output_that_nobody_reads_or_cannot_be_written(tmp_path):
    with ExchangeServer(PAIRS[:1], START, 300) as server:
        command = shlex.join([sys.executable, str(ROOT / "getData.py"), *arguments(server, tmp_path)])
        piped = f"{command} 2>&1 | true; exit ${{PIPESTATUS[0]}}"
        ended = subprocess.run(["bash", "-c", piped], capture_output=True, text=True, timeout=60)
        assert (ended.returncode, ended.stderr) == (141, "")
        full = ["bash", "-c", f"{command} > /dev/full"]
        ended = subprocess.run(full, stderr=subprocess.PIPE, text=True, timeout=60)
        assert ended.returncode == 1
        assert ended.stderr.splitlines()[-1].startswith("error: No space left on device: ")
        assert "Traceback" not in ended.stderr


# ---- flags -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "said"),
    [("--exchange binanze", "did you mean binance"), ("--symbols BTCUSDT,ETHUSD", "did you mean ETHUSDT"),
     ("--start yesterday", "ISO date"), ("--start 9999-12-31T23:59-14:00", "ISO date"),
     ("--start 0001-01-01T00:00+14:00", "ISO date"), ("--base-url foo", "BASE_URL"),
     ("--base-url 127.0.0.1:8080", "BASE_URL"), ("--base-url http://", "BASE_URL"),
     ("--base-url http://[::1", "BASE_URL"), ("--base-url http://127.0.0.1:99999", "BASE_URL"),
     ("--timeout 0", "TIMEOUT"), ("--max-gap -1", "MAX_GAP"),
     ("--start 2131-01-01", "no closed bars from 2131-01-01 00:00"),
     ("--start 2024-01-02 --end 2024-01-02", "give an earlier --start")],
)  # fmt: skip
def test_wrong_flags_are_named(run, tmp_path, flags, said):
    with ExchangeServer(PAIRS, START, 300) as server:
        errors = run(server, *flags.split(), code=2).err
        assert said in errors
        assert len([line for line in errors.splitlines() if "this machine's clock" not in line]) == 1
        assert not list(tmp_path.glob("ohlcv/*"))


def test_every_exchange_of_ccxt_opens_or_is_refused():
    """Only their descriptions: nothing is asked."""
    opened = {}
    for name in ccxt.exchanges:
        with contextlib.suppress(getData.UsageError):
            opened[name] = getData.Exchange(name, "", 0.8, 20.0, 0).page_size
    assert len(opened) > 50
    assert min(opened.values()) > 2
    assert opened["binance"] == opened["bybit"] == 1000
    assert opened["okx"] == 300
    assert "binanceusdm" not in opened  # futures alone


def test_rate_share_and_base_url_hold_for_every_kind_of_class():
    """The weight that others at this address use counts, too: 80 % of 6000 and of 1200 may be used."""
    for exchange, most in (("binance", 4800), ("binanceus", 960)):
        client = getData.Exchange(exchange, "", 0.8, 20.0, 0).client
        for weight, waits in ((most, False), (most + 1, True)):
            headers = {"X-MBX-USED-WEIGHT-1M": str(weight)}
            client.handle_errors(200, "OK", "", "GET", headers, "[]", [], {}, None)
            assert (client.paused_until > time.monotonic()) == waits
    for name in ("binance", "okx", "kraken", "coinbase"):
        client, plain = getData.Exchange(name, "http://x:80", 0.5, 20.0, 0).client, getattr(ccxt, name)()
        limit, rate = client.throttler.config, plain.rateLimit
        if plain.rollingWindowSize:
            assert limit["maxWeight"] == pytest.approx(0.5 * plain.rollingWindowSize / rate)
        else:
            assert limit["refillRate"] == pytest.approx(0.5 / rate)  # units of cost per ms
        hosts = re.findall("https?://[^/']+", str(client.urls["api"]))
        assert set(hosts) == {"http://x:80"}


# ---- features ----------------------------------------------------------------------------------------------


def test_new_bars_extend_the_features_and_change_nothing_before(run, tmp_path):
    with ExchangeServer(PAIRS[:2], START, 101 * 288) as server:
        server.clock -= 3 * BAR_MS
        run(server, "--job=collect")
        before, (prices, _) = getData.load_features(tmp_path)[0], getData.load_prices(tmp_path)
        server.clock += 3 * BAR_MS
        run(server, "--job=collect")
        after, (later, footer) = getData.load_features(tmp_path)[0], getData.load_prices(tmp_path)
        assert footer["source"] == "binance"
        assert len(later) == len(prices) + 3
        for new, old in zip([*after.values(), later], [*before.values(), prices], strict=True):
            pd.testing.assert_frame_equal(new.iloc[: len(old)], old, check_exact=True, check_freq=False)
        assert "features: up to date" in run(server, "--job=collect").out


# ---- processes ---------------------------------------------------------------------------------------------


def wait_for_requests(server: ExchangeServer, process: Script | subprocess.Popen, count: int) -> None:
    """Return when so many requests for bars have come."""
    while server.count() < count:
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)


def test_killed_at_any_moment_it_goes_on_where_it_was(tmp_path):
    """Nothing that was saved is lost, nothing is wrong, and the next run asks for little twice.
    A background job ignores Ctrl-C, and still ends on SIGTERM. Local time does not matter.
    """
    moments = random.Random(0)
    with ExchangeServer(PAIRS[:2], START, 60_000, latency=0.01) as server:
        command = [sys.executable, str(ROOT / "getData.py"), *arguments(server, tmp_path)]
        ignore = partial(signal.signal, signal.SIGINT, signal.SIG_IGN)
        background = {"preexec_fn": ignore, "env": {**os.environ, "TZ": "Asia/Kolkata"}}
        rows = 0
        for kill in (signal.SIGKILL, signal.SIGTERM):
            server.forget()
            with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, **background) as process:
                wait_for_requests(server, process, moments.randrange(10, 30))
                process.send_signal(kill)
                _, err = process.communicate(timeout=60)
            assert process.returncode == (-9 if kill == signal.SIGKILL else 130)
            assert "Traceback" not in err
            assert rows <= (rows := assert_prefix(tmp_path, server))
        assert err.splitlines()[-1] == "interrupted"
        assert rows >= 999 * (server.count() - 2 * 2 - 4)  # all but what was doubted or on its way
        server.forget()
        with Script(command[1:]) as process:
            wait_for_requests(server, process, 1)
            process.send_signal(signal.SIGSTOP)  # or it may be done before the second one has even started
            with Script(command[1:]) as second:
                _, err = second.communicate()
            process.send_signal(signal.SIGCONT)
            assert second.returncode == 3
            assert len(err.splitlines()) == 1
            assert "another getData.py is at work" in err
            _, err = process.communicate()
        assert process.returncode == 0, err
        assert_whole(tmp_path, server)


def test_progress_over_all_pages_with_the_time_left_is_for_terminals(run, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "120")
    with ExchangeServer(PAIRS, START, 8000, latency=0.05) as server:
        shown = run(server).err
        total = len(PAIRS) * 9  # 8000 bars by 999
        assert re.search(rf"bars from binance: 100%\|█+\| {total}/{total} \[", shown)
        middle = re.findall(rf"\| (\d+)/{total} \[\d\d:\d\d<(\d\d:\d\d|\?)", shown)
        assert any(0 < int(pages) < total and left != "?" for pages, left in middle)


# ---- intervals ---------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 30), st.integers(1, 12)), max_size=12))
def test_intervals_equal_sets_of_slots(steps):
    intervals, slots = [], set()
    for add, first, length in steps:
        change = getData.with_interval if add else getData.without_interval
        intervals = change(intervals, first, first + length)
        span = set(range(first, first + length))
        slots = slots | span if add else slots - span
        assert {slot for a, b in intervals for slot in range(a, b)} == slots
        assert intervals == sorted(intervals)
        assert all(a < b for a, b in intervals)


def test_missing_spans_are_what_was_not_fetched(tmp_path):
    store = getData.SymbolBars("BTCUSDT", tmp_path, "binance", "")
    store.bars = make_bars("BTCUSDT", milliseconds(START), 10)
    store.spans = [[10, 20], [30, 40]]
    assert store.missing_spans(0, 50, BAR_MS) == [[0, 10], [20, 30], [40, 50]]
    assert store.missing_spans(12, 35, BAR_MS) == [[20, 30]]
    store.spans = [[10, 30]]
    assert store.missing_spans(10, 20, BAR_MS) == []
    assert store.missing_spans(45, 60, BAR_MS) == [[30, 60]]  # so that no hole is left
    assert store.missing_spans(0, 5, BAR_MS) == [[0, 10]]
