"""Collecting from an exchange: the unmodified ccxt classes against a loopback server that lies, stalls and
bans."""

import asyncio
import contextlib
import os
import pty
import random
import re
import resource
import shlex
import signal
import subprocess
import sys
import termios
import time
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import ccxt.async_support as ccxt
import numpy as np
import pandas as pd
import pytest
from exchange_server import (
    BAR_MS,
    BODY_FAULTS,
    FAULTS,
    ROW_FAULTS,
    STATUS_FAULTS,
    ExchangeServer,
    make_bars,
    milliseconds,
)
from hypothesis import given
from hypothesis import strategies as st

import getData

START = "2024-01-01"
PAIRS = ("BTCUSDT", "ETHUSDT", "DOGEUSDT")
QUICK = [
    "--timeout=10",
    "--max-retries=3",
    "--backoff-base=0.01",
    "--backoff-max=0.05",
    "--confirm-delay=0.01",
]
QUICK += ["--rate-share=0", "--job=bars"]
FATAL = {
    "451": 3,
    "403 country": 3,
    "418 for hours": 3,
    "429 for ever": 3,
    "code -1121": 4,
}  # end at once; what else fails is tried again
PAUSES = ("429", "418", "418 for hours", "429 for ever")  # concern all symbols
HARMLESS = ("duplicate", "shuffled", "descending")  # repaired without asking
# Told every time, these lies cannot be told from the truth: missing bars are a gap, a spike is a crash, and
# half a page is little at a time.
IMPATIENT = "--timeout=1"  # where the server lets a request hang
BELIEVED = ("missing", "first missing", "spike", "short")
LATER = ("revised last",)  # seen only when the next page overlaps it


RULES = {  # what is said of bars that stay bad
    "conflicting": "duplicate",
    "off grid": "off the 5-minute grid",
    "microseconds": "not in milliseconds",
    "seconds": "not in milliseconds",
    "nan": "non-finite",
    "null value": "non-finite",
    "high below low": "high/low inconsistent",
    "low above open": "high/low inconsistent",
    "zero price": "price <= 0",
    "negative volume": "volume < 0",
}


@dataclass
class Outcome:
    """How a run ended."""

    code: int
    out: str
    err: str


@pytest.fixture
def run(tmp_path, capfd, monkeypatch):
    """Runs getData's main against a server, with its exit code and output, and restores the flags."""
    defaults = {
        name: value for name, value in vars(getData).items() if name.isupper() and not name.startswith("_")
    }

    def run(server: ExchangeServer, *flags: str, exchange: str = "binance") -> Outcome:
        for name, value in defaults.items():
            monkeypatch.setattr(getData, name, value)
        argv = [
            "--exchange",
            exchange,
            "--base-url",
            server.url,
            "--data-dir",
            str(tmp_path),
            "--start",
            START,
        ]
        argv += ["--symbols", ",".join(server.bars), *QUICK, *flags]
        with pytest.raises(SystemExit) as ending:
            getData.run_script(lambda: getData.main(argv))
        outcome = Outcome(ending.value.code, *capfd.readouterr())
        assert "Traceback" not in outcome.err
        if outcome.code:
            assert any(line.startswith("error: ") for line in outcome.err.splitlines())
        return outcome

    return run


def stored(data_dir: Path, symbol: str) -> np.ndarray:
    """The bars on disk [n, 6], as the server counts them; none if there is no file."""
    path = data_dir / "ohlcv" / f"{symbol}.parquet"
    if not path.exists():
        return np.empty((0, 6))
    frame = pd.read_parquet(path)
    assert getData.read_footer(path)["values_sha256"] == getData.values_sha256(frame)
    return frame.assign(timestamp=frame["timestamp"].astype("int64")).to_numpy(dtype=np.float64)


def assert_whole(data_dir: Path, server: ExchangeServer) -> None:
    """All that is on disk is the truth, and all of it."""
    for symbol in server.bars:
        np.testing.assert_array_equal(stored(data_dir, symbol), server.closed(symbol), err_msg=symbol)


def assert_prefix(data_dir: Path, server: ExchangeServer, symbol: str) -> None:
    """What is on disk is the truth from the first bar on, as far as it goes."""
    bars = stored(data_dir, symbol)
    np.testing.assert_array_equal(bars, server.closed(symbol)[: len(bars)], err_msg=symbol)


# ---- what comes, and how often it is asked for -------------------------------------------------------------


@pytest.mark.parametrize(("exchange", "pages"), [("binance", 3), ("bybit", 3), ("okx", 9)])
def test_whole_market_page_by_page(run, tmp_path, exchange, pages):
    with ExchangeServer(PAIRS[:2], START, 2500) as server:
        outcome = run(server, exchange=exchange)
        assert outcome.code == 0, outcome.err
        assert_whole(tmp_path, server)
        assert server.count() == 2 * (pages + 1)  # the first page has nothing to join on to: asked twice
        assert {request.exchange for request in server.requests} == {exchange}
        assert not (tmp_path / "features").exists()


def test_second_run_asks_for_no_bars_and_touches_no_file(run, tmp_path):
    with ExchangeServer(PAIRS, START, 1500) as server:
        run(server)
        paths = sorted((tmp_path / "ohlcv").iterdir())
        before = [(path.stat().st_mtime_ns, path.stat().st_ino, path.read_bytes()) for path in paths]
        server.forget()
        assert run(server).code == 0
        assert server.count("bars") == server.count("markets") == 0
        assert [(path.stat().st_mtime_ns, path.stat().st_ino, path.read_bytes()) for path in paths] == before


@pytest.mark.parametrize("exchange", ["binance", "bybit", "okx"])
def test_update_asks_once_per_symbol_and_never_stores_the_open_bar(run, tmp_path, exchange):
    with ExchangeServer(PAIRS, START, 1000) as server:
        server.clock -= 500 * BAR_MS
        run(server, exchange=exchange)
        assert all(len(stored(tmp_path, symbol)) == 500 for symbol in PAIRS)
        for bars in (1, 3):
            server.forget()
            server.clock += bars * BAR_MS
            assert run(server, exchange=exchange).code == 0
            assert server.count() == len(PAIRS)
            assert all(request.limit <= bars + 3 for request in server.requests if request.endpoint == "bars")
            assert_whole(tmp_path, server)


def test_bar_counts_as_closed_two_seconds_after_its_end(run, tmp_path):
    with ExchangeServer(PAIRS[:1], START, 600) as server:
        server.clock = (
            milliseconds(START) + 500 * BAR_MS + 1_900
        )  # so that the run waits for a tenth of a second
        run(server)
        assert len(stored(tmp_path, "BTCUSDT")) == 500
        server.clock = milliseconds(START) + 510 * BAR_MS - 1
        run(server)
        assert len(stored(tmp_path, "BTCUSDT")) == 509


def test_start_and_end_are_half_open_utc_and_an_earlier_start_is_joined_on(run, tmp_path):
    with ExchangeServer(PAIRS[:1], START, 4000) as server:
        run(server, "--start", "2024-01-08", "--end", "2024-01-09")
        day = slice(7 * 288, 8 * 288)
        np.testing.assert_array_equal(stored(tmp_path, "BTCUSDT"), server.closed("BTCUSDT")[day])
        server.forget()
        assert run(server, "--start", "2024-01-01T12:03", "--end", "2024-01-09T12:00+02:00").code == 0
        np.testing.assert_array_equal(
            stored(tmp_path, "BTCUSDT"), server.closed("BTCUSDT")[144 : 8 * 288 + 120]
        )
        assert (
            server.count() == 1 + 2 + 1 + 1
        )  # the bar to join on to; two pages before, the first twice; one after
        assert run(server).code == 0
        assert_whole(tmp_path, server)


def test_ranges_that_are_apart_are_joined(run, tmp_path):
    with ExchangeServer(PAIRS[:1], START, 9000) as server:
        run(server, "--start", "2024-01-10", "--end", "2024-01-11")
        assert run(server, "--start", "2024-01-20").code == 0
        np.testing.assert_array_equal(stored(tmp_path, "BTCUSDT"), server.closed("BTCUSDT")[9 * 288 :])
        assert run(server, "--start", "2024-01-02", "--end", "2024-01-03").code == 0
        np.testing.assert_array_equal(stored(tmp_path, "BTCUSDT"), server.closed("BTCUSDT")[288:])
        assert len(getData.read_footer(tmp_path / "ohlcv" / "BTCUSDT.parquet")["asked"]) == 1


def test_symbols_in_any_spelling_and_the_default_start(run, tmp_path):
    with ExchangeServer(PAIRS, "2020-12-30", 2000) as server:
        server.drop_bars("ETHUSDT", 0, 1500)  # listed in January
        outcome = run(server, "--symbols", "btc/usdt,ETH-USDT", "--start", getData.START)
        assert outcome.code == 0
        assert sorted(path.stem for path in (tmp_path / "ohlcv").iterdir()) == ["BTCUSDT", "ETHUSDT"]
        assert stored(tmp_path, "BTCUSDT")[0, 0] == milliseconds("2021-01-01")
        assert "listed 2021-01-04 05:00" in outcome.out
        np.testing.assert_array_equal(stored(tmp_path, "ETHUSDT"), server.closed("ETHUSDT"))


def test_coins_whose_names_differ_in_another_alphabet_are_two(run, tmp_path):
    pairs = ("BTCUSDT", "币安BTCUSDT", "币安人生USDT", "老子USDT")
    with ExchangeServer(pairs, START, 300) as server:
        assert run(server).code == 0
        assert_whole(tmp_path, server)


def test_a_spelling_that_may_be_two_pairs_is_refused(run, tmp_path):
    with ExchangeServer(("A-BUSDT", "ABUSDT", "A.CUSDT", "A-CUSDT"), START, 300) as server:
        outcome = run(server, "--symbols", "ACUSDT")
        assert outcome.code == 2
        assert "binance: ACUSDT may be A.C/USDT or A-C/USDT: write it so in --symbols" in outcome.err
        assert server.count() == 0
        for text, pair in (("abusdt", ""), ("ABUSDT", "ABUSDT"), ("A-C/USDT", "A-CUSDT")):
            outcome = run(server, "--symbols", text)
            assert outcome.code == (0 if pair else 2)
            if pair:
                np.testing.assert_array_equal(
                    stored(tmp_path, getData.symbol_name(text)), server.closed(pair)
                )


# ---- faults ------------------------------------------------------------------------------------------------


def pair_of(kind: str) -> str:
    """A pair named after a fault, so that a failure names it."""
    return re.sub("[^A-Z0-9]", "", kind.upper()) + "USDT"


@pytest.mark.parametrize("skip", [0, 2, 3])
def test_faults_that_pass(run, tmp_path, skip):
    """Every fault once, each on a pair of its own: in its first page, in the middle, and in its last page."""
    kinds = [kind for kind in FAULTS if kind not in (*FATAL, *LATER)]
    with ExchangeServer(tuple(map(pair_of, kinds)), START, 2500) as server:
        faults = [server.fault(kind, symbol=pair_of(kind), skip=skip) for kind in kinds]
        outcome = run(server, IMPATIENT)
        assert outcome.code == 0, outcome.err
        assert all(fault.hits == 1 for fault in faults)
        assert_whole(tmp_path, server)
        assert "revised" not in outcome.out


def test_faults_that_stay(run, tmp_path):
    """Every fault for ever, from the second page of its own pair on: that one fails, the others are whole."""
    kinds = [kind for kind in FAULTS if kind not in (*BELIEVED, *LATER, *PAUSES, *FATAL)]
    with ExchangeServer((*map(pair_of, kinds), "BTCUSDT"), START, 2500) as server:
        for kind in kinds:
            server.fault(kind, symbol=pair_of(kind), skip=2, times=-1)
        outcome = run(server, IMPATIENT, "--max-retries", "1")
        assert outcome.code == 4
        for kind in kinds:
            assert_prefix(tmp_path, server, pair_of(kind))
            failed = [
                line for line in outcome.err.splitlines() if line.startswith(f"error: {pair_of(kind)}: ")
            ]
            assert len(failed) == (kind not in HARMLESS), outcome.err
            if kind in (*STATUS_FAULTS, *BODY_FAULTS):
                assert "no answer in 2 tries" in failed[0]  # not taken for an empty page
            if kind in RULES:
                assert failed[0].endswith(RULES[kind])
                assert "milliseconds" in RULES[kind] or re.search(r"bar \d+ \(2024-01-04T", failed[0])
            whole = len(stored(tmp_path, pair_of(kind))) == 2500
            assert whole == (kind in HARMLESS)
        np.testing.assert_array_equal(stored(tmp_path, "BTCUSDT"), server.closed("BTCUSDT"))
        server.forget()
        assert run(server).code == 0
        assert_whole(tmp_path, server)


@pytest.mark.parametrize("kind", FATAL)
def test_fault_that_ends_at_once(run, tmp_path, kind):
    with ExchangeServer(PAIRS, START, 2500) as server:
        server.fault(kind, symbol="ETHUSDT", skip=2)
        outcome = run(server)
        assert outcome.code == FATAL[kind], outcome.err
        assert "no features" in outcome.err
        for symbol in PAIRS:
            assert_prefix(tmp_path, server, symbol)
        assert run(server).code == 0
        assert_whole(tmp_path, server)


@pytest.mark.parametrize("kind", BELIEVED)
def test_lie_that_is_told_every_time_is_kept_only_as_far_as_it_can_be_true(run, tmp_path, kind):
    with ExchangeServer(PAIRS[:2], START, 2500) as server:
        server.fault(kind, symbol="ETHUSDT", skip=2, times=-1)
        run(server)
        bars, truth = stored(tmp_path, "ETHUSDT"), server.closed("ETHUSDT")
        assert len(bars) > 999
        if kind != "spike":
            np.testing.assert_array_equal(bars, truth[np.isin(truth[:, 0], bars[:, 0])])


def test_faults_in_markets_and_clock(run, tmp_path):
    """One after the other: each is tried again, and none is taken for an answer."""
    kinds = [*STATUS_FAULTS, "cut", "malformed", "timeout", "drip", "reset before", "reset inside"]
    with ExchangeServer(PAIRS[:1], START, 300) as server:
        for kind in kinds:
            if kind not in FATAL:
                server.fault(kind, endpoint="time")
                server.fault(kind, endpoint="markets")
        outcome = run(server, IMPATIENT, "--max-retries", "40")
        assert outcome.code == 0, outcome.err
        assert_whole(tmp_path, server)


def test_faults_that_are_told_twice(run, tmp_path):
    """Two answers in a row that agree are believed, as far as the bars before and after agree with them."""
    kinds = [kind for kind in FAULTS if kind not in FATAL]
    with ExchangeServer(tuple(map(pair_of, kinds)), START, 4500) as server:
        faults = [server.fault(kind, symbol=pair_of(kind), skip=3, times=2) for kind in kinds]
        outcome = run(server, IMPATIENT)
        assert outcome.code == 0, outcome.err
        assert all(fault.hits == 2 or fault.kind in HARMLESS for fault in faults)
        for kind in kinds:
            bars, truth = stored(tmp_path, pair_of(kind)), server.closed(pair_of(kind))
            lost = {"missing": 3}.get(kind, 0)
            assert len(bars) == len(truth) - lost, kind
            differing = (~getData.rows_in(bars, truth)).sum()
            assert differing == (kind == "spike"), kind  # as a real crash would be
        assert outcome.out.count("price jump") == 1


@pytest.mark.parametrize("exchange", ["okx", "bybit"])
def test_faults_on_exchanges_with_other_paging(run, tmp_path, exchange):
    kinds = [kind for kind in ROW_FAULTS if kind not in LATER]
    kinds += ["cut", "html", "null", "empty body", "unexpected object", "reset inside", "other pair", "500"]
    with ExchangeServer(PAIRS[:2], START, 2 * len(kinds) * (300 if exchange == "okx" else 1000)) as server:
        server.set_bars("BTCUSDT", server.bars["BTCUSDT"][:2000])
        for place, kind in enumerate(kinds):
            server.fault(kind, symbol="ETHUSDT", skip=2 * place)
        outcome = run(server, "--max-gap", "0", exchange=exchange)
        assert outcome.code == 0, outcome.err
        assert all(fault.hits == 1 for fault in server.faults)
        assert_whole(tmp_path, server)


@pytest.mark.parametrize(
    ("exchange", "skip"), [("okx", 0), ("okx", 2), ("bybit", 0), ("bybit", 2), ("kraken", 0)]
)
def test_object_without_bars_is_not_taken_for_an_empty_page(run, tmp_path, exchange, skip):
    """Told twice, it would be believed."""
    kinds = ("unexpected object", "object of null", "null", "html", "empty body")
    with ExchangeServer(tuple(map(pair_of, kinds)), START, 600 if exchange == "kraken" else 2500) as server:
        for kind in kinds:
            server.fault(kind, symbol=pair_of(kind), skip=skip, times=2)
        outcome = run(server, exchange=exchange)
        assert outcome.code == 0, outcome.err
        assert all(fault.hits == 2 for fault in server.faults)
        assert_whole(tmp_path, server)
        assert outcome.out.count("  2 retries") == len(kinds)  # retries, not doubts


def test_nobody_asks_while_the_exchange_wants_a_pause(run, tmp_path):
    with ExchangeServer(tuple(f"{coin}USDT" for coin in "ABCD"), START, 5000, latency=0.02) as server:
        fault = server.fault("429", skip=12)
        assert run(server).code == 0
        assert_whole(tmp_path, server)
        times = [request.when for request in server.requests]
        # Retry-After is 1 second. What is on its way comes still: one request of each of the other workers.
        assert sum(fault.when < t < fault.when + 1 for t in times) < len(server.bars)
        assert server.count() == 4 * 7 + 1


def test_a_pause_that_begins_while_a_request_connects_holds_it_back():
    async def ask(server: ExchangeServer) -> tuple[list[float], float]:
        client = getData.open_exchange("binance")
        client.urls["api"] = getData.move_hosts(client.urls["api"], server.url)
        try:
            for _ in range(2):  # over a new connection, then over the one that was kept
                asked = asyncio.create_task(client.public_get_time())
                await asyncio.sleep(0)
                while not asked.done() and client.session is None:
                    await asyncio.sleep(0)
                client.pause(0.3)
                ends = client.paused_until
                await asked
                assert server.requests[-1].when >= ends
        finally:
            await client.close()

    with ExchangeServer(PAIRS[:1], START, 10) as server:
        asyncio.run(ask(server))
        assert len(server.requests) == 2


def test_retries_are_said(run):
    with ExchangeServer(PAIRS[:1], START, 100) as server:
        server.fault("500", times=2)
        server.fault("429")
        outcome = run(server, "--max-retries", "5", "--backoff-base", "0.4")
        said = [line for line in outcome.err.splitlines() if "retry" in line]
        expected = ["500 .*retry 1 of 5 in 0 s", "500 .*retry 2 of 5 in 0 s", "429 .*retry 3 of 5 in [12] s"]
        assert len(said) == 3
        for line, rule in zip(said, expected, strict=True):
            assert re.match(rf"BTCUSDT: no answer \(.*{rule}$", line)


def test_long_ban_ends_the_run_at_once(run, tmp_path):
    with ExchangeServer(tuple(f"{coin}USDT" for coin in "ABCDEF"), START, 5000) as server:
        server.fault("418 for hours", skip=10, times=-1)
        outcome = run(server)
        assert outcome.code == 3
        assert "accepts no requests before" in outcome.err
        assert server.count() <= 10 + getData.CONCURRENCY
        for symbol in server.bars:
            assert_prefix(tmp_path, server, symbol)


def test_blocked_country_is_said_plainly_and_not_asked_again(run):
    with ExchangeServer(PAIRS, START, 100) as server:
        for kind in ("451", "403 country"):
            server.forget()
            server.fault(kind, endpoint="", times=-1)
            outcome = run(server)
            assert outcome.code == 3
            assert "does not serve this country" in outcome.err
            assert "--exchange" in outcome.err
            assert len(server.requests) == 1


def test_firewall_is_tried_again_and_then_named(run):
    with ExchangeServer(PAIRS, START, 100) as server:
        server.fault("403", endpoint="", times=-1)
        outcome = run(server)
        assert outcome.code == 3
        assert "try another --exchange" in outcome.err
        assert len(server.requests) == 4


def test_pauses_grow_from_the_base_and_confirmations_wait(run):
    with ExchangeServer(PAIRS[:1], START, 100) as server:
        server.fault("500", times=3)
        assert run(server, "--backoff-base", "0.1", "--backoff-max", "10", "--confirm-delay", "0.3").code == 0
        times = [request.when for request in server.requests if request.endpoint == "bars"]
        assert (
            np.diff(times) >= [0.05, 0.1, 0.2, 0.3]
        ).all()  # half the base at least, doubled twice; the second look


def test_pauses_grow_no_further_than_the_limit(run):
    with ExchangeServer(PAIRS[:1], START, 100) as server:
        server.fault("500", times=3)
        assert (
            run(server, "--backoff-base", "1e6", "--backoff-max", "0.01").code == 0
        )  # else it would last for days


def test_patience_ends_before_the_tries_do(run, monkeypatch):
    monkeypatch.setattr(getData, "_PATIENCE", 0.3)
    with ExchangeServer(PAIRS[:1], START, 100) as server:
        server.fault("500", times=-1)
        outcome = run(server, "--max-retries", "1000", "--backoff-base", "0.1", "--backoff-max", "0.1")
        assert outcome.code == 3
        assert 4 <= server.count() <= 8  # the pauses are 0.05 to 0.1 s
        assert f"no answer in {server.count()} tries" in outcome.err


@pytest.mark.parametrize("concurrency", [1, 2, 3])
def test_so_many_symbols_are_fetched_at_a_time(run, tmp_path, concurrency):
    with ExchangeServer(tuple(f"{coin}USDT" for coin in "ABCDE"), START, 5000, latency=0.01) as server:
        assert run(server, "--concurrency", str(concurrency)).code == 0
        assert_whole(tmp_path, server)
        asked = [request.symbol for request in server.requests if request.endpoint == "bars"]
        spans = [(asked.index(symbol), len(asked) - asked[::-1].index(symbol)) for symbol in server.bars]
        assert max(sum(a <= place < b for a, b in spans) for place in range(len(asked))) == concurrency


@pytest.mark.parametrize(("start", "behind"), [("2024-01-01", "+"), ("five days ago", "-")])
@pytest.mark.parametrize("exchange", ["binance", "okx"])
def test_machine_whose_clock_is_wrong_goes_by_the_clock_of_the_exchange(
    run, tmp_path, exchange, start, behind
):
    if start == "five days ago":  # ten days of bars: the exchange is five days ahead
        start = getData.when((time.time() // 300 - 5 * 288) * BAR_MS)
    with ExchangeServer(PAIRS[:1], start, 3000) as server:
        outcome = run(server, "--start", start, exchange=exchange)
        assert outcome.code == 0, outcome.err
        assert f"this machine's clock is {behind}" in outcome.err
        assert_whole(tmp_path, server)


def test_machine_whose_clock_is_right_is_not_told(run, tmp_path):
    start = int(time.time() * 1000) // BAR_MS * BAR_MS - 300 * BAR_MS
    with ExchangeServer(PAIRS[:1], getData.when(start), 300) as server:
        server.clock = int(time.time() * 1000)
        outcome = run(server, "--start", getData.when(start))
        assert outcome.code == 0
        assert outcome.err == ""
        assert_whole(tmp_path, server)


@pytest.mark.parametrize("wrong", [0, -1, 1_704_067_200, 1_704_067_200_000_000, None, "noon"])
def test_clock_that_stays_wrong_ends_the_run(run, tmp_path, wrong):
    with ExchangeServer(PAIRS[:1], START, 300) as server:
        server.clock, whole = wrong, server.clock
        outcome = run(server)
        assert outcome.code == 3
        *retries, error = outcome.err.splitlines()[:4]
        assert [f"retry {retry} of 3" in line for retry, line in enumerate(retries, 1)] == [True] * 3
        assert error.startswith("error: clock: no answer in 4 tries")
        assert server.count() == 0
        assert not list(tmp_path.glob("ohlcv/*"))
        server.clock = whole
        assert run(server).code == 0
        assert_whole(tmp_path, server)


def test_nobody_listens(run, tmp_path):
    with ExchangeServer(PAIRS, START, 100) as server:
        server.url = "http://127.0.0.1:9"
        outcome = run(server)
        assert outcome.code == 3
        assert "run again" in outcome.err


# ---- gaps, listings, revisions -----------------------------------------------------------------------------


def test_outage_is_kept_as_a_gap_and_reported(run, tmp_path):
    with ExchangeServer(PAIRS[:2], START, 5000) as server:
        server.drop_bars("ETHUSDT", 1000, 1042)
        server.drop_bars("ETHUSDT", 2000, 2003)
        outcome = run(server)
        assert outcome.code == 0
        assert_whole(tmp_path, server)
        footer = getData.read_footer(tmp_path / "ohlcv" / "ETHUSDT.parquet")
        assert footer["gaps"] == [
            [milliseconds(START) + 1000 * BAR_MS, 42],
            [milliseconds(START) + 2042 * BAR_MS, 3],  # the second was cut after the first
        ]
        line = next(line for line in outcome.out.splitlines() if line.startswith("ETHUSDT"))
        assert line.split()[6:8] == ["45", "42"]
        server.forget()
        assert run(server).code == 0
        assert server.count() == 0


@pytest.mark.parametrize("exchange", ["binance", "okx"])
def test_gap_above_the_limit_is_refused_but_what_came_is_kept(run, tmp_path, exchange):
    with ExchangeServer(PAIRS[:2], START, 4000) as server:
        server.drop_bars("ETHUSDT", 700, 1700)  # more than three pages of okx
        outcome = run(server, exchange=exchange)
        assert outcome.code == 4
        assert "ETHUSDT: 1000 bars are missing from 2024-01-03 10:20 on, more than 288" in outcome.err
        assert_whole(tmp_path, server)
        server.forget()
        assert run(server, exchange=exchange).code == 4
        assert server.count() == 0
        assert run(server, "--max-gap", "1000", exchange=exchange).code == 0
        assert run(server, "--start", "2024-01-07", exchange=exchange).code == 0  # after the gap
        assert server.count() == 0


def test_many_short_gaps_are_refused_above_their_share(run, tmp_path):
    with ExchangeServer(PAIRS[:1], START, 4000) as server:
        server.set_bars(
            "BTCUSDT", np.delete(server.bars["BTCUSDT"], slice(100, 1900, 20), axis=0)
        )  # 90 bars, one each
        assert run(server).code == 0  # fewer than --max-gap 288
        outcome = run(server, "--max-gap", "50")
        assert outcome.code == 4
        assert "BTCUSDT: 90 of 4000 bars are missing" in outcome.err
        assert run(server, "--max-gap", "50", "--max-missing", "0.0226").code == 0
        assert run(server, "--max-gap", "50", "--max-missing", "0.0224").code == 4
        assert run(server, "--max-gap", "0").code == 0
        assert_whole(tmp_path, server)


def test_young_gap_is_asked_again_until_it_is_filled(run, tmp_path):
    with ExchangeServer(PAIRS[:1], START, 4000) as server:
        whole = server.bars["BTCUSDT"]
        server.drop_bars("BTCUSDT", 3900, 3910)
        assert run(server).code == 0
        server.set_bars("BTCUSDT", whole)
        server.forget()
        assert run(server).code == 0
        assert server.count() == 1
        assert_whole(tmp_path, server)


def test_gap_of_an_old_range_is_not_asked_again(run):
    with ExchangeServer(PAIRS[:2], START, 9000) as server:
        server.drop_bars("BTCUSDT", 2500, 2510)  # in the week before the end, and long before the present
        server.drop_bars("ETHUSDT", 2800, 9001)  # delisted
        for _ in range(2):
            asked = server.count()
            assert run(server, "--end", "2024-01-11").code == 0
        assert server.count() == asked


@pytest.mark.parametrize("kind", ["empty page", "first missing"])
@pytest.mark.parametrize("exchange", ["binance", "okx", "bybit"])
def test_lie_about_the_first_bars_is_found_out_by_the_later_ones(run, tmp_path, exchange, kind):
    with ExchangeServer(PAIRS[:2], START, 4000) as server:
        fault = server.fault(
            kind, symbol="ETHUSDT", times=2
        )  # as often as is believed where nothing speaks against it
        outcome = run(server, exchange=exchange)
        assert outcome.code == 0, outcome.err
        assert fault.hits == 2
        assert_whole(tmp_path, server)
        assert "listed" not in outcome.out


def test_windows_that_seem_empty_are_asked_twice_each_and_again_from_their_end(run, tmp_path):
    with ExchangeServer(PAIRS[:1], START, 6000) as server:
        server.drop_bars("BTCUSDT", 1000, 4000)  # ten windows of okx
        assert run(server, "--max-gap", "0", exchange="okx").code == 0
        assert_whole(tmp_path, server)
        asked = Counter(request.since for request in server.requests if request.endpoint == "bars")
        assert max(asked.values()) == asked.pop(None) == 2  # whether there are later bars is asked once
        assert sum(1000 < (since - milliseconds(START)) // BAR_MS < 4000 for since in asked) == 10 + 1


@pytest.mark.parametrize("exchange", ["binance", "okx", "bybit"])
def test_late_listing(run, tmp_path, exchange):
    with ExchangeServer(PAIRS[:2], START, 3000) as server:
        server.drop_bars("ETHUSDT", 0, 1234)
        outcome = run(server, exchange=exchange)
        assert outcome.code == 0, outcome.err
        assert_whole(tmp_path, server)
        assert "listed 2024-01-05 06:50" in outcome.out
        server.forget()
        assert run(server, exchange=exchange).code == 0
        assert server.count() == 0


@pytest.mark.parametrize("exchange", ["binance", "okx", "bybit"])
def test_list_of_pairs_that_comes_in_part_is_asked_again(run, tmp_path, exchange):
    with ExchangeServer(PAIRS, START, 300) as server:
        server.fault("last pair missing", endpoint="markets")
        assert run(server, exchange=exchange).code == 0
        assert_whole(tmp_path, server)


def test_stored_pair_that_is_listed_no_longer_fails_alone(run, tmp_path):
    with ExchangeServer(PAIRS, START, 3000) as server:
        server.clock -= 100 * BAR_MS
        run(server)
        server.clock += 100 * BAR_MS
        server.fault("last pair missing", endpoint="markets", times=-1)
        outcome = run(server)
        assert outcome.code == 4
        errors = [line for line in outcome.err.splitlines() if line.startswith("error")]
        assert errors == ["error: DOGEUSDT: binance no longer lists it: leave it out of --symbols"]
        np.testing.assert_array_equal(stored(tmp_path, "DOGEUSDT"), server.closed("DOGEUSDT")[:2900])
        for symbol in PAIRS[:2]:
            np.testing.assert_array_equal(stored(tmp_path, symbol), server.closed(symbol))
        assert run(server, "--end", "2024-01-11").code == 0  # nothing more is wanted of it


def test_not_yet_listed(run, tmp_path):
    with ExchangeServer(PAIRS[:2], START, 3000) as server:
        server.drop_bars("ETHUSDT", 0, 2000)
        outcome = run(server, "--end", "2024-01-04")
        assert outcome.code == 4
        assert "ETHUSDT: no bars from 2024-01-01 00:00 to 2024-01-04 00:00" in outcome.err
        assert not stored(tmp_path, "ETHUSDT").size


@pytest.mark.parametrize(("missing", "code"), [(100, 0), (1500, 4)])
@pytest.mark.parametrize("exchange", ["binance", "okx"])
def test_delisted(run, tmp_path, exchange, missing, code):
    with ExchangeServer(PAIRS[:2], START, 3000) as server:
        server.drop_bars("ETHUSDT", 3000 - missing, 3001)
        outcome = run(server, exchange=exchange)
        assert outcome.code == code
        assert_whole(tmp_path, server)
        end = getData.when(milliseconds(START) + (2999 - missing) * BAR_MS)
        assert f"ended {end}" in outcome.out if code == 0 else f"the bars end at {end}" in outcome.err


def test_late_listing_as_long_ago_as_a_page_is_long(run, tmp_path):
    with ExchangeServer(PAIRS, START, 3000) as server:
        for symbol, bars in zip(PAIRS, (999, 1000, 1001), strict=True):
            server.drop_bars(symbol, 0, 3000 - bars)
        outcome = run(server)
        assert outcome.code == 0, outcome.err
        assert_whole(tmp_path, server)
        assert outcome.out.count("listed") == 3


def test_day_without_trades_is_reported(run, tmp_path):
    with ExchangeServer(PAIRS, START, 1500) as server:
        for symbol, count in zip(PAIRS, (288, 289, 800), strict=True):
            bars = server.bars[symbol].copy()
            bars[700 : 700 + count, 5] = 0
            bars[100:105, 5] = 0
            server.set_bars(symbol, bars)
        outcome = run(server)
        assert outcome.code == 0
        assert_whole(tmp_path, server)
        notes = [line.split("no trades in ")[1:] for line in outcome.out.splitlines()[1:4]]
        first = "from 2024-01-03 10:20 on"
        assert notes == [[], [f"289 bars {first}"], [f"800 bars {first}"]]


@pytest.mark.parametrize("idle", ["", "0", "1", "0110", "1000", "00010011", "11101"])
def test_longest_run_without_volume(idle):
    bars = np.zeros((len(idle), 6))
    bars[:, 5] = [1 - int(digit) for digit in idle]
    row, length = getData.longest_idle(bars)
    assert length == max(map(len, idle.split("0")))
    assert idle[row : row + length] == "1" * length


def test_zero_volume_is_kept_and_counted(run, tmp_path):
    with ExchangeServer(PAIRS[:1], START, 1500) as server:
        bars = server.bars["BTCUSDT"].copy()
        bars[100:117, 5] = 0
        bars[100:117, 1:5] = bars[99, 4]
        bars[117, 3] = min(bars[117, 3], bars[117, 1])
        server.set_bars("BTCUSDT", bars)
        outcome = run(server)
        assert outcome.code == 0
        assert_whole(tmp_path, server)
        assert (
            next(line for line in outcome.out.splitlines() if line.startswith("BTCUSDT")).split()[8] == "17"
        )


def test_bars_of_another_timeframe_are_refused(run, tmp_path):
    with ExchangeServer(PAIRS[:2], START, 5000) as server:
        server.set_bars("ETHUSDT", np.delete(server.bars["ETHUSDT"], range(1, 4990, 2), axis=0))
        outcome = run(server, "--max-gap", "0")
        assert outcome.code == 4
        assert "bars are 10 minutes apart from 2024-01-01 00:00 on" in outcome.err
        assert len(stored(tmp_path, "BTCUSDT")) == 5000
        assert len(stored(tmp_path, "ETHUSDT")) == 0


def test_bars_shifted_in_time_are_refused(run, tmp_path):
    with ExchangeServer(PAIRS, START, 1500) as server:
        returns = server.bars["BTCUSDT"][:, 4] / 100  # the other coins move as this one does
        for symbol, hours in (("ETHUSDT", 0), ("DOGEUSDT", 1)):
            bars = server.bars[symbol].copy()
            bars[:, 1:5] = np.roll(7 * returns, 12 * hours)[:, None]
            server.set_bars(symbol, bars)
        outcome = run(server)
        assert outcome.code == 4
        assert "DOGEUSDT: its bars of 2024-01 are 60 minutes too late" in outcome.err
        assert run(server, "--symbols", "BTCUSDT,ETHUSDT").code == 0


def test_real_crash_is_believed_the_second_time(run, tmp_path):
    with ExchangeServer(PAIRS[:1], START, 1500) as server:
        bars = server.bars["BTCUSDT"].copy()
        bars[1200:, 1:5] *= 0.25
        server.set_bars("BTCUSDT", bars)
        outcome = run(server)
        assert outcome.code == 0
        assert_whole(tmp_path, server)
        assert "1 price jump" in outcome.out
        assert server.count() == 4


def test_revised_bars_replace_the_stored_ones(run, tmp_path):
    with ExchangeServer(PAIRS[:1], START, 4000) as server:
        server.clock -= 1000 * BAR_MS
        run(server)
        bars = server.bars["BTCUSDT"].copy()
        bars[2990:3000, 5] += 1
        server.set_bars("BTCUSDT", bars)
        server.clock += 1000 * BAR_MS
        outcome = run(server)
        assert outcome.code == 0, outcome.err
        assert_whole(tmp_path, server)
        assert "10 bars revised" in outcome.out


def test_bar_that_came_wrong_is_put_right_by_the_next_overlap(run, tmp_path):
    with ExchangeServer(PAIRS[:2], START, 2500) as server:
        server.fault(
            "revised last", symbol="BTCUSDT", skip=2
        )  # two bars of the second page: the third overlaps it
        server.fault(
            "revised last", symbol="ETHUSDT", skip=3
        )  # the last closed bar: the next run overlaps it
        server.clock -= BAR_MS
        outcome = run(server)
        assert outcome.code == 0
        assert "2 bars revised" in outcome.out
        np.testing.assert_array_equal(stored(tmp_path, "BTCUSDT"), server.closed("BTCUSDT"))
        assert (stored(tmp_path, "ETHUSDT") != server.closed("ETHUSDT")).sum() == 1
        server.clock += BAR_MS
        assert run(server).code == 0
        assert_whole(tmp_path, server)


def test_bars_before_the_stored_ones_must_join_on_to_them(run, tmp_path):
    with ExchangeServer(PAIRS[:1], START, 2500) as server:
        run(server, "--start", "2024-01-06T05:00")  # bar 1500
        server.forget()
        server.fault("revised last", skip=3)  # in the page that reaches the stored bars
        assert "revised" not in run(server).out
        assert_whole(tmp_path, server)
        assert server.count() == 5  # the first stored bar, then each of the two pages twice


@pytest.mark.parametrize("before", [200, 999, 1000, 1001, 2500])
def test_bars_before_rewritten_ones_are_refused_and_the_file_left_alone(run, tmp_path, before):
    """One page, a page that ends just before the stored bars, and several pages."""
    with ExchangeServer(PAIRS[:1], START, 4000) as server:
        late = getData.when(milliseconds(START) + before * BAR_MS)
        run(server, "--start", late)
        old, bars = stored(tmp_path, "BTCUSDT"), server.bars["BTCUSDT"].copy()
        bars[before:, 5] += 1
        server.set_bars("BTCUSDT", bars)
        for _ in range(2):
            outcome = run(server)
            assert outcome.code == 4
            assert f"no longer returns the bars stored from {late} on" in outcome.err
            np.testing.assert_array_equal(stored(tmp_path, "BTCUSDT"), old)


@pytest.mark.parametrize("exchange", ["binance", "okx"])
@pytest.mark.parametrize("revised", [1, 600, 2500])
@pytest.mark.parametrize("before", [200, 1000, 2500])
def test_bars_before_revised_ones_are_joined_on_where_both_agree(run, tmp_path, before, revised, exchange):
    with ExchangeServer(PAIRS[:1], START, 9000) as server:
        run(server, "--start", getData.when(milliseconds(START) + before * BAR_MS), exchange=exchange)
        bars = server.bars["BTCUSDT"].copy()
        bars[before : before + revised, 5] += 1
        server.set_bars("BTCUSDT", bars)
        outcome = run(server, exchange=exchange)
        if exchange == "okx" and revised == 2500:  # more than five of its pages
            assert outcome.code == 4
            assert len(stored(tmp_path, "BTCUSDT")) == 9000 - before
        else:
            assert outcome.code == 0, outcome.err
            assert f"{revised} bar{'s' * (revised > 1)} revised" in outcome.out
            assert_whole(tmp_path, server)


@pytest.mark.parametrize("revised", [999, 2500, 4990])
def test_bars_revised_over_several_pages_are_replaced(run, tmp_path, revised):
    with ExchangeServer(PAIRS[:1], START, 9000) as server:
        server.clock -= 1000 * BAR_MS
        run(server)
        bars = server.bars["BTCUSDT"].copy()
        bars[8000 - revised : 8000, 5] += 1
        server.set_bars("BTCUSDT", bars)
        server.clock += 1000 * BAR_MS
        outcome = run(server)
        assert outcome.code == 0, outcome.err
        assert f"{revised} bars revised" in outcome.out
        assert_whole(tmp_path, server)


@pytest.mark.parametrize("exchange", ["binance", "okx"])
def test_update_that_finds_nothing_is_to_be_tried_again(run, tmp_path, exchange):
    """No bars at all are no other bars."""
    with ExchangeServer(PAIRS[:2], START, 3000) as server:
        server.clock -= 20 * BAR_MS
        run(server, "--start", "2024-01-02", exchange=exchange)
        before = stored(tmp_path, "ETHUSDT")
        server.clock += 20 * BAR_MS
        server.fault("empty page", symbol="ETHUSDT", times=-1)
        for start in ("2024-01-02", START):  # after the stored bars, and also before them
            outcome = run(server, "--start", start, exchange=exchange)
            assert outcome.code == 3
            assert "returns none of the bars stored" in outcome.err
            assert "move" not in outcome.err
            np.testing.assert_array_equal(stored(tmp_path, "ETHUSDT"), before)
        server.forget()
        assert run(server, exchange=exchange).code == 0
        assert_whole(tmp_path, server)


def test_rewritten_history_is_refused_and_the_file_left_alone(run, tmp_path):
    with ExchangeServer(PAIRS[:1], START, 8000) as server:
        server.clock -= 500 * BAR_MS
        run(server)
        before = stored(tmp_path, "BTCUSDT")
        bars = server.bars["BTCUSDT"].copy()
        bars[:, 5] += 1
        server.set_bars("BTCUSDT", bars)
        server.clock += 500 * BAR_MS
        outcome = run(server)
        assert outcome.code == 4
        assert "no longer returns the bars stored" in outcome.err
        np.testing.assert_array_equal(stored(tmp_path, "BTCUSDT"), before)


def test_exchange_that_serves_only_its_last_bars(run, tmp_path):
    with ExchangeServer(("BTCUSDT", "DOGEUSDT"), START, 2100) as server:
        server.clock -= 100 * BAR_MS
        server.drop_bars("DOGEUSDT", 0, 1600)  # listed late, within what kraken serves
        outcome = run(server, exchange="kraken")
        assert outcome.code == 4
        first = "2024-01-05 10:40"  # 2000 - 720 bars after the start
        assert f"BTCUSDT: kraken serves only its last 720 bars, now from {first} on" in outcome.err
        assert not stored(tmp_path, "BTCUSDT").size
        np.testing.assert_array_equal(stored(tmp_path, "DOGEUSDT"), server.closed("DOGEUSDT"))
        flags = ["--symbols", "BTCUSDT", "--start", first]
        assert run(server, *flags, exchange="kraken").code == 0
        np.testing.assert_array_equal(stored(tmp_path, "BTCUSDT"), server.closed("BTCUSDT")[-720:])
        server.forget()
        server.clock += 100 * BAR_MS
        assert run(server, *flags, exchange="kraken").code == 0
        assert server.count() == 1
        np.testing.assert_array_equal(stored(tmp_path, "BTCUSDT"), server.closed("BTCUSDT")[-820:])


# ---- files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["cut", "garbage", "empty", "changed value"])
def test_damaged_file_is_set_aside_and_fetched_again(run, tmp_path, damage):
    with ExchangeServer(PAIRS[:2], START, 1500) as server:
        run(server)
        path = tmp_path / "ohlcv" / "ETHUSDT.parquet"
        (tmp_path / "ohlcv" / "BTCUSDT.parquet.tmp").write_bytes(b"half a file")
        whole = path.read_bytes()
        if damage == "changed value":
            footer, frame = getData.read_footer(path), pd.read_parquet(path)
            frame.loc[700, "volume"] += 1
            getData.write_parquet(path, frame, footer)
        else:
            path.write_bytes(
                {"cut": whole[:-900], "garbage": whole[:3000] + b"x" * 5000, "empty": b""}[damage]
            )
        outcome = run(server)
        assert outcome.code == 0
        assert "ETHUSDT.parquet is damaged" in outcome.err
        assert_whole(tmp_path, server)
        names = ["BTCUSDT.parquet", "ETHUSDT.parquet", "ETHUSDT.parquet.corrupt"]
        assert sorted(path.name for path in (tmp_path / "ohlcv").iterdir()) == names


def test_bars_of_another_source_are_not_overwritten(run, tmp_path):
    with ExchangeServer(PAIRS[:2], START, 400) as server:
        assert run(server, exchange="bybit").code == 0
        outcome = run(server)
        assert outcome.code == 1
        assert "holds bars of bybit" in outcome.err
        assert run(server, "--replace").code == 0
        assert getData.read_footer(tmp_path / "ohlcv" / "BTCUSDT.parquet")["source"] == "binance"
        assert_whole(tmp_path, server)


def test_disk_that_fills_up_leaves_what_was_saved(tmp_path):
    with ExchangeServer(PAIRS, START, 9000) as server:
        server.clock -= 8000 * BAR_MS
        process = start_process(server, tmp_path)
        assert process.wait(60) == 0, process.communicate()
        before = {path.name: path.read_bytes() for path in (tmp_path / "ohlcv").iterdir()}
        assert len(before) == len(PAIRS)
        server.clock += 8000 * BAR_MS
        most = max(map(len, before.values()))
        limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (most, most))
        process = start_process(server, tmp_path, preexec_fn=limit)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 1
        assert re.fullmatch(
            r"error: File too large \(.*USDT.parquet\): files written before are intact", err.splitlines()[-1]
        )
        assert "Traceback" not in err
        assert {path.name: path.read_bytes() for path in (tmp_path / "ohlcv").iterdir()} == before
        process = start_process(server, tmp_path)
        assert process.wait(60) == 0, process.communicate()
        assert_whole(tmp_path, server)


@pytest.mark.parametrize("redirection", ["", "2>&1"])
def test_pipe_that_nobody_reads_ends_the_run_without_a_word(tmp_path, redirection):
    with ExchangeServer(PAIRS[:1], START, 300) as server:
        command = f"{shlex.join(arguments(server, tmp_path))} {redirection} | true; exit ${{PIPESTATUS[0]}}"
        ended = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
        assert ended.returncode == 141
        assert [line for line in ended.stderr.splitlines() if "this machine's clock" not in line] == []


def test_output_that_cannot_be_written_is_said_in_one_line(tmp_path):
    with ExchangeServer(PAIRS[:1], START, 300) as server, open("/dev/full", "w") as full:
        process = start_process(server, tmp_path, stdout=full)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 1
        assert err.splitlines()[-1] == "error: No space left on device: files written before are intact"
        assert "Traceback" not in err


def test_folder_that_is_a_file_is_named(tmp_path):
    with ExchangeServer(PAIRS[:1], START, 300) as server:
        (tmp_path / "file").touch()
        for place in (
            tmp_path / "file",
            tmp_path / "file" / "below",
            tmp_path / ("file" * 75),
        ):  # a name too long
            process = start_process(server, place)
            _, err = process.communicate(timeout=60)
            assert process.returncode == 1
            assert err.startswith("error: ")
            assert err.count("\n") == 1
            assert "file" in err


# ---- flags -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--exchange", "binanze"], "did you mean binance"),
        (["--symbols", "BTCUSDT,ETHUSD"], "no spot pair ETHUSD: did you mean ETHUSDT"),
        (["--start", "yesterday"], "is not an ISO date"),
        (["--start", "9999-12-31T23:59-14:00"], "is not an ISO date"),
        (["--start", "0001-01-01T00:00+14:00"], "is not an ISO date"),
        *(
            (["--base-url", url], "BASE_URL must begin with http://")
            for url in (
                "foo",
                "127.0.0.1:8080",
                "http://",
                "ftp://x",
                "http://[::1",
                "http://127.0.0.1:99999",
            )
        ),
        (["--start", "2131-01-01"], "START lies in the future (2131-01-01 00:00): give an earlier date"),
        (["--end", "2131-01-01"], "END lies in the future"),
        (["--start", "2024-01-02", "--end", "2024-01-02"], "give an earlier --start"),
        (["--concurrency", "0"], "CONCURRENCY"),
        (["--timeout", "0"], "TIMEOUT"),
        (["--max-gap", "-1"], "MAX_GAP = '-1': Input should be greater than or equal to 0"),
    ],
)
def test_wrong_flags_are_named(run, tmp_path, flags, message):
    with ExchangeServer(PAIRS, START, 300) as server:
        outcome = run(server, *flags)
        assert outcome.code == 2
        assert message in outcome.err
        assert not list(tmp_path.glob("ohlcv/*"))
        assert not server.requests or "in the future" not in message  # refused before it is asked


def test_every_exchange_of_ccxt_opens_or_is_refused(run):
    """Only their descriptions: nothing is asked."""
    opened = {}
    for name in ccxt.exchanges:
        with contextlib.suppress(getData.UsageError):
            opened[name] = getData.open_exchange(name).page_size
    assert len(opened) > 50
    assert min(opened.values()) > 2
    assert opened["binance"] == opened["bybit"] == 1000
    assert opened["okx"] == 300
    assert "binanceusdm" not in opened  # futures alone


def test_weight_used_by_others_at_this_address_is_counted(run):
    for exchange, most in (("binance", 4800), ("binanceus", 960)):  # 80 % of 6000 and 1200
        client = getData.open_exchange(exchange)
        for weight, waits in ((most, False), (most + 1, True)):
            client.handle_errors(
                200, "OK", "", "GET", {"X-MBX-USED-WEIGHT-1M": str(weight)}, "[]", [], {}, None
            )
            assert (client.paused_until > time.monotonic()) == waits


def test_base_url_replaces_every_host_of_every_kind_of_class(run):
    with ExchangeServer(PAIRS[:1], START, 300) as server:
        run(server, "--rate-share", "0.5")  # sets the constants
        for name in (
            "binance",
            "binanceus",
            "okx",
            "bybit",
            "kraken",
            "coinbase",
            "kucoin",
            "gate",
            "bitget",
            "mexc",
        ):
            client = getData.open_exchange(name)
            plain = getattr(ccxt, name)()
            limit = client.throttler.config
            if plain.rollingWindowSize:
                assert limit["maxWeight"] == pytest.approx(0.5 * plain.rollingWindowSize / plain.rateLimit)
            else:
                assert limit["refillRate"] == pytest.approx(0.5 / plain.rateLimit)  # units of cost per ms
            pending = [client.urls["api"]]
            while pending:
                urls = pending.pop()
                if isinstance(urls, dict):
                    pending += urls.values()
                else:
                    assert urls.startswith(server.url + "/") or urls == server.url


# ---- features ----------------------------------------------------------------------------------------------


def test_new_bars_extend_the_features_and_change_nothing_before(run, tmp_path):
    with ExchangeServer(PAIRS[:2], START, 101 * 288) as server:
        server.clock -= 3 * BAR_MS
        assert run(server, "--job=collect").code == 0
        before, _ = getData.load_features(tmp_path)
        prices, _ = getData.load_prices(tmp_path)
        server.clock += 3 * BAR_MS
        assert run(server, "--job=collect").code == 0
        after, footer = getData.load_features(tmp_path)
        assert footer["source"] == "binance"
        assert len(after["5m"]) == len(before["5m"]) + 3
        for name, frame in before.items():
            pd.testing.assert_frame_equal(
                after[name].iloc[: len(frame)], frame, check_exact=True, check_freq=False
            )
        later, _ = getData.load_prices(tmp_path)
        pd.testing.assert_frame_equal(later.iloc[: len(prices)], prices, check_exact=True, check_freq=False)
        times = [path.stat().st_mtime_ns for path in sorted((tmp_path / "features").iterdir())]
        assert run(server, "--job=collect").code == 0
        assert [path.stat().st_mtime_ns for path in sorted((tmp_path / "features").iterdir())] == times
        server.forget()
        assert (
            getData.main(["--job=features", f"--data-dir={tmp_path}", "--symbols", ",".join(server.bars)])
            == 0
        )
        assert not server.requests


# ---- processes ---------------------------------------------------------------------------------------------


def arguments(server: ExchangeServer, data_dir: Path, *flags: str) -> list[str]:
    """The command line of getData.py."""
    argv = [
        sys.executable,
        getData.__file__,
        "--base-url",
        server.url,
        "--data-dir",
        str(data_dir),
        "--start",
        START,
    ]
    return [*argv, "--symbols", ",".join(server.bars), *QUICK, *flags]


def start_process(server: ExchangeServer, data_dir: Path, *flags: str, **options: object) -> subprocess.Popen:
    """getData.py in a process of its own, with other options of Popen."""
    pipe = subprocess.PIPE
    argv = arguments(server, data_dir, *flags)
    return subprocess.Popen(argv, **{"stdout": pipe, "stderr": pipe, "text": True, **options})


def wait_for_requests(server: ExchangeServer, process: subprocess.Popen, count: int) -> None:
    """Return when so many requests for bars have come."""
    while server.count() < count:
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)


def test_background_job_that_ignores_ctrl_c_still_ends_on_sigterm(tmp_path):
    with ExchangeServer(PAIRS[:1], START, 30_000, latency=0.01) as server:
        ignore = partial(signal.signal, signal.SIGINT, signal.SIG_IGN)
        process = start_process(server, tmp_path, preexec_fn=ignore)
        wait_for_requests(server, process, 5)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 130
        assert err.splitlines()[-1] == "interrupted"
        assert_prefix(tmp_path, server, "BTCUSDT")
        assert stored(tmp_path, "BTCUSDT").size


def test_killed_at_any_moment_it_goes_on_where_it_was(tmp_path):
    """Nothing that was saved is lost, nothing is wrong, and the next run asks for little twice."""
    moments = random.Random(0)
    kills = [signal.SIGKILL, signal.SIGTERM, signal.SIGKILL, signal.SIGINT]
    with ExchangeServer(PAIRS[:2], START, 60_000, latency=0.01) as server:
        rows = 0
        for kill in kills:
            server.forget()
            process = start_process(server, tmp_path)
            wait_for_requests(server, process, moments.randrange(1, 20))
            process.send_signal(kill)
            _, err = process.communicate(timeout=60)
            assert process.returncode == (-9 if kill == signal.SIGKILL else 130)
            assert "Traceback" not in err
            for symbol in server.bars:
                assert_prefix(tmp_path, server, symbol)
            assert rows <= (rows := sum(len(stored(tmp_path, symbol)) for symbol in server.bars))
            if kill != signal.SIGKILL:
                assert err.splitlines()[-1] == "interrupted"
                assert rows >= 999 * (server.count() - 2 * 2 - 4)  # all but what was doubted or on its way
        server.forget()
        process = start_process(
            server, tmp_path, env={**os.environ, "TZ": "Asia/Kolkata"}
        )  # local time must not matter
        wait_for_requests(server, process, 1)
        process.send_signal(signal.SIGSTOP)  # or it may be done before the second one has even started
        second = start_process(server, tmp_path)
        _, err = second.communicate(timeout=60)
        process.send_signal(signal.SIGCONT)
        assert second.returncode == 3
        assert "another getData.py is at work" in err
        assert len(err.splitlines()) == 1
        _, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
        assert_whole(tmp_path, server)


def test_killed_while_features_are_made_it_makes_them_the_next_time(run, tmp_path):
    moments = random.Random(0)
    kills = [signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGKILL]
    with ExchangeServer(PAIRS[:2], START, 101 * 288) as server:
        server.clock -= len(kills) * BAR_MS
        assert run(server).code == 0
        for kill in kills:
            server.clock += BAR_MS
            process = start_process(server, tmp_path, "--job=collect")
            while not Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text():
                assert process.poll() is None, process.communicate()
                time.sleep(0.005)
            time.sleep(moments.uniform(0, 0.6))  # about as long as it takes
            process.send_signal(kill)
            _, err = process.communicate(timeout=60)
            assert process.returncode in (0, 130, -kill)  # the last also where Python itself was ending
            assert "Traceback" not in err
            assert_whole(tmp_path, server)
            with contextlib.suppress(getData.UserError):  # in one line: none yet, or of different runs
                getData.load_features(tmp_path)
        assert run(server, "--job=collect").code == 0
        assert run(server, "--job=collect", "--data-dir", str(tmp_path / "anew")).code == 0
        frames, fresh = getData.load_features(tmp_path)[0], getData.load_features(tmp_path / "anew")[0]
        for name, frame in frames.items():
            pd.testing.assert_frame_equal(frame, fresh[name], check_exact=True)


def test_progress_over_all_pages_with_the_time_left_is_for_terminals(tmp_path):
    with ExchangeServer(PAIRS, START, 8000, latency=0.05) as server:
        reader, terminal = pty.openpty()
        termios.tcsetwinsize(terminal, (24, 120))
        process = start_process(server, tmp_path, stderr=terminal, text=False)
        os.close(terminal)
        shown = b""
        with contextlib.suppress(OSError):  # what Linux says at the end of a terminal
            while piece := os.read(reader, 65536):
                shown += piece
        os.close(reader)
        assert process.wait(60) == 0
        shown = shown.decode()
        total = len(PAIRS) * 9  # 8000 bars by 999
        assert re.search(rf"bars from binance: 100%\|█+\| {total}/{total} \[", shown)
        middle = re.findall(rf"\| (\d+)/{total} \[\d\d:\d\d<(\d\d:\d\d|\?)", shown)
        assert any(0 < int(pages) < total and left != "?" for pages, left in middle)
        assert b"rows" in process.stdout.read()  # the table is no part of it
        server.clock += BAR_MS
        process = start_process(server, tmp_path)  # into a pipe
        _, err = process.communicate(timeout=60)
        assert process.returncode == 0
        assert "page" not in err


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


def test_spans_are_what_was_not_asked(tmp_path, monkeypatch):
    monkeypatch.setattr(getData, "DATA_DIR", tmp_path)
    store = getData.SymbolBars("BTCUSDT")
    store.bars = make_bars("BTCUSDT", milliseconds(START), 10)
    store.asked = [[10, 20], [30, 40]]
    assert store.spans(0, 50, BAR_MS) == [(0, 10), (20, 30), (40, 50)]
    assert store.spans(12, 35, BAR_MS) == [(20, 30)]
    store.asked = [[10, 30]]
    assert store.spans(10, 20, BAR_MS) == []
    assert store.spans(45, 60, BAR_MS) == [(30, 60)]  # so that no hole is left
    assert store.spans(0, 5, BAR_MS) == [(0, 10)]


def test_retry_after_as_number_and_as_date():
    assert getData.retry_after_seconds("17") == 17
    assert getData.retry_after_seconds("Wed, 21 Oct 2015 07:28:00 GMT") == 0
    assert getData.retry_after_seconds("soon") == 60
    assert getData.retry_after_seconds("9" * 400) == 366 * 86_400
