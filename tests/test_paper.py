"""The paper account: processes on a loopback exchange whose clock is moved, wrong, or 300 times as fast."""

import html
import itertools
import json
import os
import random
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import COINS, ROOT, load, metrics_of, put_back
from exchange_server import BAR_MS, ExchangeServer, make_bars, milliseconds
from forked import Script
from test_feature_reducer import full_disk

import feature_reducer
import getData
import portfolio_env
import train

HOLD = 2  # bars between decisions
STEP = HOLD * BAR_MS
COST = 0.001
SPLITS = {"train": [0, 1], "validation": [2, 3], "test": [4, 5]}
CLOSED, LATER = 203 * 288, 200  # bars: a window's look-back with the agent of WINDOW, and what comes after


@pytest.fixture
def data_dir(trained, tmp_path) -> Path:
    """A data folder with a tiny agent's checkpoint alone: a paper account needs no other files."""
    saved, path = load(trained[0] / "checkpoints" / "best.pt"), tmp_path / "data" / "checkpoints" / "best.pt"
    torch.manual_seed(0)
    saved["policy"]["actor.weight"] = torch.randn(saved["policy"]["actor.weight"].shape)
    path.parent.mkdir(parents=True)
    feature_reducer.save_checkpoint(path, saved | {"hold_bars": HOLD})
    return tmp_path / "data"


@pytest.fixture
def server() -> Iterator[ExchangeServer]:
    """The exchange, 30 seconds after the close of its CLOSED-th bar; its clock stands still."""
    exchange = ExchangeServer(tuple(COINS.split(",")), "2025-06-01", CLOSED + LATER)
    exchange.clock -= LATER * BAR_MS
    with exchange:
        yield exchange


class Job:
    """`train.py --job paper` as a process that can be killed and started again."""

    def __init__(self, server: ExchangeServer, data_dir: Path, *flags: str) -> None:
        self.command = [ROOT / "train.py", "--job", "paper", "--data-dir", data_dir]
        self.command += ["--base-url", server.url, "--poll", "0.05", *flags]
        name = flags[flags.index("--run") + 1] if "--run" in flags else "tiny"
        self.file, self.log = data_dir / "paper" / f"{name}.sqlite", data_dir / "log"
        self.start()

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start it; what it says is added to the log."""
        self.process = Script(self.command, log=self.log)

    def stop(self, number: signal.Signals = signal.SIGKILL) -> int:
        """Send it a signal and return its exit code."""
        self.process.send_signal(number)
        return self.process.wait(60)

    def restart(self) -> None:
        self.stop()
        self.start()

    def rows(self) -> list[tuple]:
        """What SQLite itself reads: close_ms, booked_ms, weights, reason, call, result."""
        query = "SELECT d.*, c.result FROM decisions d LEFT JOIN calls c USING (close_ms) ORDER BY close_ms"
        source = f"file:{self.file}?mode=ro"
        with suppress(sqlite3.OperationalError), closing(sqlite3.connect(source, 30, uri=True)) as file:
            return file.execute(query).fetchall()
        return []  # no file or no table yet

    def wait(self, condition: Callable[[], bool]) -> None:
        """Wait until a condition holds."""
        end = time.monotonic() + 180
        while not condition():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < end, self.log.read_text()
            time.sleep(0.05)

    def wait_for_word(self, word: str, count: int = 1) -> None:
        self.wait(lambda: self.log.read_text().count(word) >= count)

    def wait_for(self, count: int, reason: str = "") -> None:
        """Wait until so many decisions are booked, the last for that reason."""
        self.wait(lambda: len(self.rows()) >= count)
        assert len(self.rows()) == count
        assert self.rows()[-1][3] == reason, self.log.read_text()


def advance(server: ExchangeServer, bars: int, seconds: int = 10) -> None:
    """Move the clock to some seconds after the close of the bar that many bars later."""
    server.clock = (server.clock // BAR_MS + bars) * BAR_MS + 1000 * seconds


def value_by_hand(
    server: ExchangeServer, rows: list[tuple], stop: int, loss: float = 0.0
) -> tuple[float, np.ndarray, float]:
    """Value and weights at the close `stop` of an account that trades each decision at the next open, and the
    value of an equal-weight hold since then: in amounts, with costs by bisection of what is left. After its
    last bar a coin is worth less by `loss`."""
    times = np.arange(min(bars[0, 0] for bars in server.bars.values()), stop, BAR_MS)
    frames = [pd.DataFrame(bars[:, [1, 4]], bars[:, 0]).reindex(times) for bars in server.bars.values()]
    closes = np.column_stack([frame[1].ffill() for frame in frames])  # a gap is flat
    opens = np.column_stack([frame[0].fillna(frame[1].ffill().shift()) for frame in frames])
    for coin, bars in enumerate(server.bars.values()):
        for prices in (opens, closes):
            prices[times > bars[-1, 0], coin] *= 1 - loss
    cash, coins = 1.0, np.zeros(len(frames))
    for close, _, weights, *_ in rows:
        if not weights or close >= stop:
            continue
        target, price = np.array(json.loads(weights)), opens[np.searchsorted(times, close)]
        low, high = 0.0, cash + coins @ price
        for _ in range(200):
            value = (low + high) / 2
            amounts = value * target[1:] / price
            sold, bought = np.maximum(coins - amounts, 0) @ price, np.maximum(amounts - coins, 0) @ price
            left = cash + (1 - COST) * sold - bought / (1 - COST)
            low, high = (value, high) if left > value * target[0] else (low, value)
        cash, coins = value * target[0], amounts
    held = np.append(cash, coins * closes[-1])
    hold = (closes[-1] / opens[np.searchsorted(times, rows[0][0])]).mean() * (1 - COST)
    return held.sum(), held / held.sum(), hold


def assert_honest(rows: list[tuple], first: int, step: int, max_late: int) -> None:
    """Every due bar has one row, and what is a decision was booked before the bar that judges it closed."""
    assert [row[0] for row in rows] == list(range(first, rows[-1][0] + 1, step))
    for close, booked_ms, weights, reason, *_ in rows:
        assert (weights is None) == bool(reason)
        if weights:
            assert 0 <= booked_ms - close <= 1000 * max_late < BAR_MS
            assert abs(sum(json.loads(weights)) - 1) < 1e-12


def target_by_full_features(data_dir: Path, close: int, held: np.ndarray, gone: str = "") -> np.ndarray:
    """The agent's weights at a close, of features over the whole history, in the way of training; a coin that
    is gone is absent."""
    saved, end = load(data_dir / "checkpoints" / "best.pt"), pd.Timestamp(close - 1, unit="ms", tz="UTC")
    bars = getData.load_bars(data_dir / "paper" / "tiny", saved["market"]["symbols"])
    for symbol, frame in bars.items():
        last = frame["close"].ffill()
        flat = {name: frame[name].fillna(last) for name in ("open", "high", "low", "close")}
        bars[symbol] = frame.assign(volume=frame["volume"].fillna(0.0), **flat)
    frames = getData.compute_features({symbol: frame[:end] for symbol, frame in bars.items()})
    here = np.tile([symbol != gone for symbol in bars], (len(next(iter(frames.values()))), 1))
    own = saved["window_bars"], "cpu", saved["normalisation"]
    windows = feature_reducer.FeatureWindows(frames, *own, members=here if gone else None)
    assert windows.times[-1] == close
    policy, reducer = train.modules_of(saved, torch.device("cpu"))
    return train.newest_target(policy, reducer, windows, held, False)


def refused(data_dir: Path, *flags: str) -> getData.UserError:
    """The one line with which --job paper refuses to begin."""
    with put_back(train), put_back(getData), pytest.raises(getData.UserError) as error:
        train.main(["--job", "paper", "--data-dir", str(data_dir), *flags])
    assert "\n" not in str(error.value)
    return error.value


def make_page(data_dir: Path) -> str:
    """Write the page of the account and return its text."""
    with put_back(train):
        assert train.main(["--job", "paper", "--data-dir", str(data_dir), "--report"]) == 0
    return html.unescape((data_dir / "reports" / "paper-tiny" / "report.html").read_text())


def test_an_account_through_kills_outages_and_wrong_clocks(data_dir, server, tmp_path):
    """Bar by bar: what is booked, and why not; then its page, against the account in coins and cash."""
    first, messages, block = server.clock // BAR_MS * BAR_MS, tmp_path / "messages", tmp_path / "block"
    program = f"sh -c 'cat >> {messages}; while test -e {block}; do sleep 0.1; done'"
    with Job(server, data_dir, "--call", program) as job:

        def wait_for_looks() -> None:  # at the clock, two of them
            requests = server.count("time")
            job.wait(lambda: server.count("time") > requests + 1)

        job.wait_for(1)
        advance(server, HOLD)
        job.wait_for(2)
        job.wait(lambda: job.rows()[-1][5] == "done")

        job.restart()  # between two decisions
        advance(server, HOLD)
        job.wait_for(3)
        assert "Decisions: 3. Calls of the user's program: 3" in make_page(data_dir)

        server.fault("503", endpoint="", times=-1)  # away during two decisions
        advance(server, 2 * HOLD + 1)
        job.wait_for_word("no answer")
        job.restart()
        job.wait_for_word("no answer", 2)  # an account that has begun waits for it
        server.forget()
        job.wait_for(5, "missed")

        bar = int(np.searchsorted(server.bars["ETHUSDT"][:, 0], server.clock - BAR_MS, "right"))
        server.drop_bars("ETHUSDT", bar, bar + 1)
        advance(server, 1)
        job.wait_for_word("tries again: no data: ETHUSDT")
        server.clock += 60_000
        job.wait_for(6, "no data: ETHUSDT")

        truth = dict(server.bars)  # bars that come late
        for symbol, bars in truth.items():
            server.set_bars(symbol, bars[bars[:, 0] < server.clock])
        advance(server, HOLD, seconds=100)
        wait_for_looks()
        server.fault("503", endpoint="", times=-1)  # they come all at once
        job.wait_for_word("no answer", 3)
        for symbol, bars in truth.items():
            server.set_bars(symbol, bars)
        server.forget()
        job.wait_for(7, "late")

        server.latency, requests = 0.5, server.count()  # away between the bars and the decision
        advance(server, HOLD)
        job.wait(lambda: server.count() > requests)
        server.fault("503", endpoint="time", times=3)
        job.wait_for_word("no answer", 4)
        server.latency = 0.0
        job.wait_for(8)

        for count, error in ((9, 2 * 3_600_000), (10, -3_600_000)):  # clocks that jump, and back
            server.clock_error = error
            wait_for_looks()
            server.clock_error = 0
            advance(server, HOLD)
            job.wait_for(count)

        assert refused(data_dir).code == 3  # another job is at work

        job.wait(lambda: job.rows()[-1][5] == "done")
        block.touch()  # killed during a call, which is not made again
        advance(server, HOLD)
        job.wait_for(11)
        job.wait(lambda: messages.read_text().count("\n") == 7)
        job.stop()
        block.unlink()
        job.start()
        advance(server, HOLD)
        job.wait_for(12)
        job.wait(lambda: job.rows()[-1][5] == "done")

        page = make_page(data_dir)  # beside the running job
        assert job.stop(signal.SIGTERM) == 143

    rows, content = job.rows(), metrics_of(data_dir, "paper-tiny")
    assert_honest(rows, first, STEP, 60)
    assert [row[3] for row in rows] == [*[""] * 3, "missed", "missed", "no data: ETHUSDT", "late", *[""] * 5]
    decisions = [row for row in rows if not row[3]]
    assert [row[5] for row in decisions] == ["done"] * 6 + ["unknown", "done"]
    calls = [json.loads(line) for line in messages.read_text().splitlines()]
    for call, (close, _, weights, *_) in zip(calls, decisions, strict=True):
        assert (call["close_time_ms"], call["next_decision_ms"]) == (close, close + STEP)
        assert list(call["weights"].values()) == json.loads(weights)
        before = [row for row in rows if row[0] < close]
        held = value_by_hand(server, before, close)[1] if before else np.eye(4)[0]
        np.testing.assert_allclose(list(call["held"].values()), held, rtol=1e-9)
        if close in (decisions[1][0], decisions[-1][0]):
            expected = target_by_full_features(data_dir, close, held)
            np.testing.assert_allclose(json.loads(weights), expected, atol=1e-3)

    value, _, hold = value_by_hand(server, rows, rows[-1][0])
    figures = content["paper"]
    assert figures["agent (paper)"]["growth"] == pytest.approx(np.log(value), rel=1e-9)
    assert figures["equal-weight hold"]["growth"] == pytest.approx(np.log(hold), rel=1e-9)
    assert content["trained on"].startswith("synthetic:seed=0")
    assert "Decisions: 12, of them none: 2 missed, 1 no data, 1 late; what was held then drifted." in page
    assert "Calls of the user's program: 8, done 7." in page
    stored = getData.load_bars(data_dir / "paper" / "tiny", list(server.bars))
    for symbol, frame in stored.items():  # also what a wrong clock took for closed
        real = frame[~frame["filled"]]
        expected = server.closed(symbol)[-len(real) :]
        np.testing.assert_array_equal(real[["open", "high", "low", "close", "volume"]], expected[:, 1:])


def test_a_delisted_coin_is_sold_at_its_last_close_less_the_loss_and_the_rest_goes_on(data_dir, server):
    """The exchange's list tells it from an outage; also after a restart. The page and the log name it."""
    first = server.clock // BAR_MS * BAR_MS
    with Job(server, data_dir, "--delisting-loss", "0.25") as job:
        job.wait_for(1)
        advance(server, HOLD)
        job.wait_for(2)
        bars = server.bars["SOLUSDT"]
        server.set_bars("SOLUSDT", bars[bars[:, 0] < first + STEP])
        advance(server, 14)
        job.wait_for_word("no data: SOLUSDT")
        server.clock += 60_000
        job.wait_for(9, "no data: SOLUSDT")  # it is listed: an outage
        assert "traded" not in job.log.read_text()
        server.halted = {"SOLUSDT"}
        advance(server, 14)
        job.wait_for(16)
        server.fault("last pair missing", endpoint="markets", times=-1)
        job.restart()
        advance(server, HOLD)
        job.wait_for(17)
        job.stop()
    rows, log, page = job.rows(), job.log.read_text(), make_page(data_dir)
    assert_honest(rows, first, STEP, 60)
    weights = [json.loads(row[2]) for row in (*rows[:2], *rows[-2:])]
    assert [weight[3] > 0 for weight in weights] == [True, True, False, False]
    close = rows[-1][0]
    held = value_by_hand(server, rows[:-1], close, 0.25)[1]
    expected = target_by_full_features(data_dir, close, held, "SOLUSDT")
    np.testing.assert_allclose(weights[-1], expected, atol=1e-3)
    value, _, hold = value_by_hand(server, rows, close, 0.25)
    figures = metrics_of(data_dir, "paper-tiny")["paper"]
    assert figures["agent (paper)"]["growth"] == pytest.approx(np.log(value), rel=1e-9)
    assert figures["equal-weight hold"]["growth"] == pytest.approx(np.log(hold), rel=1e-9)
    assert f"SOLUSDT has no bar after {getData.when(first + STEP - BAR_MS)}" in page
    lines = [line for line in log.splitlines() if "traded" in line]
    assert len(lines) == 2  # of both processes
    assert all("SOLUSDT: traded no longer" in line for line in lines)
    assert "--" not in log


def test_an_agent_of_coins_that_come_and_go_begins_with_those_that_trade(data_dir, server):
    """One coin of its market has no pair, one is not traded; of the others one is its universe."""
    path = data_dir / "checkpoints" / "best.pt"
    saved = load(path)
    saved["market"] |= {"absent": True, "universe": 1, "member_days": 40}
    saved["market"]["symbols"] = ["GONEUSDT", *saved["market"]["symbols"]]
    feature_reducer.save_checkpoint(path, saved)
    server.halted = {"SOLUSDT"}
    with Job(server, data_dir) as job:
        job.wait_for(1)
        job.restart()
        advance(server, HOLD)
        job.wait_for(2)
    volumes = {}
    month = milliseconds(pd.Timestamp(server.clock, unit="ms", tz="UTC").strftime("%Y-%m-01"))
    for symbol in ("BTCUSDT", "ETHUSDT"):
        bars = server.bars[symbol]
        days = bars[(bars[:, 0] >= month - 30 * 288 * BAR_MS) & (bars[:, 0] < month)].reshape(30, 288, 6)
        volumes[symbol] = np.median((days[..., 4] * days[..., 5]).sum(1))
    member = max(volumes, key=volumes.get)
    for row in job.rows():
        assert [weight > 0 for weight in json.loads(row[2])] == [True, *(name == member for name in volumes)]
    assert portfolio_env.PaperAccount(job.file).about()["symbols"] == ["BTCUSDT", "ETHUSDT"]
    server.halted = {*server.bars}
    assert "trades none" in str(refused(data_dir, "--base-url", server.url, "--run", "other"))


def test_a_file_that_other_programs_use_is_waited_for(data_dir, server):
    """A reader disturbs nothing. Who holds the write lock makes decisions late, and one line says why."""
    file = data_dir / "paper" / "tiny.sqlite"
    file.parent.mkdir()
    with closing(sqlite3.connect(file, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")  # of a file that is not in WAL mode yet
        with Job(server, data_dir) as job, closing(sqlite3.connect(file, isolation_level=None)) as reader:
            job.wait_for_word(f"{file} is locked by another program")
            other.execute("COMMIT")
            job.wait_for(1)
            reader.execute("BEGIN")
            assert reader.execute("SELECT COUNT(*) FROM decisions").fetchone() == (1,)
            advance(server, HOLD)
            job.wait_for(2)
            assert job.log.read_text().count("locked") == 1
            other.execute("BEGIN IMMEDIATE")
            advance(server, HOLD)
            job.wait_for_word("locked", 2)
            page = make_page(data_dir)
            server.clock += 60_000
            other.execute("ROLLBACK")
            job.wait_for(3, "late")
            job.wait_for_word("all is well again")
            other.execute("BEGIN IMMEDIATE")
            job.restart()
            advance(server, HOLD)
            job.wait_for_word("locked", 3)
            advance(server, HOLD)
            looks = server.count("time")
            job.wait(lambda: server.count("time") > looks + 1)
            other.execute("ROLLBACK")
            job.wait_for(5)
            assert job.stop(signal.SIGTERM) == 143
    assert "Decisions: 2." in page
    assert [row[3] for row in job.rows()] == ["", "", "late", "missed", ""]
    assert job.log.read_text().count("locked") == 3


def test_a_fast_clock_and_kills_at_random_moments(data_dir, server):
    """300 times as fast, a bar a second: no bar has two decisions, none is left out or booked too late."""
    moments, first = random.Random(0), server.clock // BAR_MS * BAR_MS
    with Job(server, data_dir, "--max-late", "299") as job:
        job.wait_for(1)
        server.run_clock(300)
        for _ in range(2):
            time.sleep(moments.uniform(1, 3))
            job.restart()
        time.sleep(8)
        server.run_clock(0)
        last = first + (server.clock - first) // STEP * STEP
        job.wait(lambda: job.rows()[-1][0] == last)
        assert job.stop(signal.SIGINT) == 130
    rows = job.rows()
    assert_honest(rows, first, STEP, 299)
    assert "Traceback" not in job.log.read_text()
    assert "Each decision was booked before the bar existed that judged it." in make_page(data_dir)
    growth = metrics_of(data_dir, "paper-tiny")["paper"]["agent (paper)"]["growth"]
    stored = getData.load_bars(data_dir / "paper" / "tiny", list(server.bars))
    stop = int(getData.last_close(stored).timestamp() * 1000)
    assert growth == pytest.approx(np.log(value_by_hand(server, rows, stop)[0]), rel=1e-9)


def test_an_account_is_of_one_agent_and_one_way_to_trade(data_dir, server):
    with Job(server, data_dir) as job:
        job.wait_for(1)
    here, other = ("--base-url", server.url), data_dir / "paper" / "other.sqlite"
    for flags, name in (
        ((*here, "--fee-rate", "0.002"), f"{job.file} is of cost 0.001, not 0.002"),
        ((*here, "--exchange", "okx"), f"{job.file} is of exchange binance, not okx"),
        ((*here, "--min-cash", "0.1"), f"{job.file} is of limits [1.0, 0.0, 0.0], not [1.0, 0.1, 0.0]"),
        ((*here, "--delisting-loss", "0.5"), f"{job.file} is of delisting_loss 0.0, not 0.5"),
        ((), f"{job.file} is of base_url {server.url}, not "),
        (("--report",), f"first decision in {job.file}"),  # no bar has closed since
        (("--report", "--run", "other"), str(other)),
    ):
        assert name in str(refused(data_dir, *flags))
    assert not other.exists()
    path = data_dir / "checkpoints" / "best.pt"
    saved = load(path)
    feature_reducer.save_checkpoint(path, saved | {"run": "later"})
    assert "--run later" in str(refused(data_dir, *here))  # a newer agent begins no account by itself
    assert len(job.rows()) == 1
    server.fault("503", endpoint="", times=-1)  # an account that is new does not wait
    new = Job(server, data_dir, "--run", "new")
    assert new.process.wait(60) == 3
    assert new.log.read_text().splitlines()[-1].startswith("error: clock: no answer in 3 tries")


def test_another_agent_is_a_row_of_the_account(data_dir, server):
    """It is booked once the exchange answers, and stays also where best.pt is replaced; the page names it."""
    best, other = data_dir / "checkpoints" / "best.pt", data_dir / "checkpoints" / "refit.pt"
    saved = load(best)
    with Job(server, data_dir) as job:
        job.wait_for(1)
        advance(server, HOLD)
        saved["policy"]["actor.weight"] *= -1
        feature_reducer.save_checkpoint(best, saved)  # as more batches leave it
        feature_reducer.save_checkpoint(other, saved | {"refit": True, "hold_bars": 3})
        job.restart()  # with the agent that it began with
        job.wait_for(2)
        job.stop()
        account = portfolio_env.PaperAccount(job.file)
        assert "of hold_bars 2, not 3" in str(
            refused(data_dir, "--base-url", server.url, "--checkpoint", "refit.pt")
        )
        feature_reducer.save_checkpoint(other, saved | {"refit": True})
        job.command += ["--checkpoint", "refit.pt"]
        server.fault("503", endpoint="", times=-1)
        job.start()
        job.wait_for_word("no answer")
        assert len(account.agents()) == 1
        server.forget()
        job.wait_for_word("another agent from now on")
        changed_ms = server.clock
        advance(server, HOLD)
        job.wait_for(3)
        job.stop()
        job.command = job.command[:-2]
        advance(server, HOLD)
        job.start()
        job.wait_for(4)
        advance(server, 1)
        page = make_page(data_dir)
    first, second = account.agents().values()
    with closing(sqlite3.connect(job.file)) as file:
        assert file.execute("SELECT changed_ms FROM agents").fetchall() == [(0,), (changed_ms,)]
    assert f"SHA-256 {second['checkpoint']}, in place of {first['checkpoint']}" in page
    assert portfolio_env.REFITTED in page
    rows = job.rows()
    for close, same in zip([row[0] for row in rows], [False, False, True, True], strict=True):
        before = [row for row in rows if row[0] < close]
        held = value_by_hand(server, before, close)[1] if before else np.eye(4)[0]
        weights = json.loads(rows[len(before)][2])
        assert np.allclose(weights, target_by_full_features(data_dir, close, held), atol=1e-3) == same


def test_flags_of_a_paper_account_are_checked_before_anything_is_read(tmp_path):
    for line in ("--report --poll 3", "--call no-such-program", "--call 'sh", "--base-url nowhere"):
        flags = line.split()
        error = refused(tmp_path, *flags)
        assert error.code == 2
        assert str(error).startswith(flags[-2][2:].upper().replace("-", "_"))
    assert not list(tmp_path.iterdir())


def test_the_value_of_an_account_worked_out_by_hand(tmp_path):
    """Cash, into the one coin at 100, out of it at 120, with 1 % per side: 0.99 x 1.2 x 0.99."""
    account = portfolio_env.PaperAccount(tmp_path / "account.sqlite")
    begun = pd.date_range("2025-01-01", periods=7, freq="5min", tz="UTC", unit="ms")
    opens, closes = [90, 95, 100, 110, 115, 120, 50], [95, 100, 110, 115, 120, 50, 40]
    frame = pd.DataFrame({"open": opens, "close": closes}, index=begun, dtype=float).assign(filled=False)
    about = {"cost": 0.01, "delisting_loss": 0.5, "limits": portfolio_env.NO_LIMITS}

    def result_of(bars: int = 7, **changes: object) -> portfolio_env.Backtest | None:
        frames = {"COIN": frame[:bars]}
        return portfolio_env.paper_result(account.decisions(), frames, about | changes)[0]

    times = begun.as_unit("ms").asi8 + BAR_MS
    assert result_of() is None
    account.book(int(times[1]), int(times[1]) + 5, [0.0, 1.0])
    account.book(int(times[2]), int(times[2]) + 5, None, "late")
    for bars, value in ((3, 0.99 * 1.1), (4, 0.99 * 1.15)):  # at the closes of the bars in between
        assert result_of(bars).value[-1] == pytest.approx(value)
    half = result_of(4, limits=portfolio_env.Limits(min_cash=0.5))  # mu = 1 / (0.5 + 0.5 / 0.99)
    assert half.value[-1] == pytest.approx((0.5 + 0.5 * 1.15) / (0.5 + 0.5 / 0.99))
    account.book(int(times[4]), int(times[4]) + 5, [1.0, 0.0], call="x")
    assert result_of().value[-1] == pytest.approx(0.99 * 1.2 * 0.99)
    assert result_of().benchmark[-1] == pytest.approx(40 / 100)
    with pytest.raises(getData.UserError, match="UNIQUE"):  # never twice
        account.book(int(times[4]), int(times[4]) + 9, [0.5, 0.5])
    assert len(account.decisions()) == 3


def test_what_is_held_of_a_coin_that_ends_loses_the_delisting_loss_by_hand():
    """Half is bought of each at 1 %. A ends at 20, a quarter of which is lost, and is sold at 15 at the next
    decision's fill, into B: 0.99 / 2 of each grows by 1.5 and 2, and A's part pays 1 % twice more."""
    times = pd.date_range("2025-01-01", periods=20, freq="5min", tz="UTC", unit="ms")
    ends = [10.0, 10.0, 20.0, *[np.nan] * 17]
    bars = {"A": ends, "B": [10.0, 10.0, *[20.0] * 18]}
    frames = {
        name: pd.DataFrame({"open": prices, "close": prices}, times).assign(filled=False, volume=1.0)
        for name, prices in bars.items()
    }
    weights = [np.array([0, 0.5, 0.5]), np.array([0.0, 0, 1])]
    decisions = pd.DataFrame({"weights": weights}, times.as_unit("ms").asi8[[0, 18]] + BAR_MS)
    about = {"cost": 0.01, "delisting_loss": 0.25, "limits": portfolio_env.NO_LIMITS}
    result, _, (_, closes) = portfolio_env.paper_result(decisions, portfolio_env.to_newest(frames), about)
    np.testing.assert_array_equal(closes.T, [[10, 10, 20, *[15] * 18], [10, 10, *[20] * 19]])
    bought = 0.99 / 2
    np.testing.assert_allclose(result.value[1:3], [2 * 2 * bought, bought * (1.5 + 2)], rtol=1e-12)
    assert result.value[-1] == pytest.approx(bought * (1.5 * 0.99**2 + 2), rel=1e-12)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("bars", [1, 3, 144, 425, 426])
def test_until_a_day_is_full_the_page_is_short(tmp_path, bars):
    """An account in cash has no drawdown."""
    start, before = milliseconds("2025-06-01T00:00"), 150
    folder, close = tmp_path / "paper" / "tiny", start + before * BAR_MS
    truth = {symbol: make_bars(symbol, start, before + bars) for symbol in COINS.split(",")}
    for symbol, rows in truth.items():
        frame = pd.DataFrame(rows, columns=["timestamp", "open", "high", "low", "close", "volume"])
        getData.store_bars(tmp_path / "paper" / "tiny", symbol, getData.validate_bars(symbol, frame), "", "")
    account = portfolio_env.PaperAccount(folder.with_suffix(".sqlite"))
    account.book_agent(0, {
        "run": "tiny", "checkpoint": "", "abstains": False, "trained on": "binance", "splits": SPLITS,
        "symbols": list(truth), "hold_bars": 12, "cost": COST, "exchange": "binance", "base_url": "",
        "limits": [1.0, 0.0, 0.0], "refitted": False, "delisting_loss": 0.0,
    })  # fmt: skip
    short, (coin, *_) = bars < 288, truth.values()
    account.book(close, close + 5, [0.0, 1.0, 0.0, 0.0] if short else [1.0, 0.0, 0.0, 0.0])
    value = (1 - COST) * coin[-1, 4] / coin[before, 1] if short else 1.0
    portfolio_env.report_paper_account(tmp_path, "tiny", rebalance_every=288, look_back=288)
    page = html.unescape((tmp_path / "reports" / "paper-tiny" / "report.html").read_text())
    assert metrics_of(tmp_path, "paper-tiny")["paper"]["agent (paper)"]["growth"] == pytest.approx(
        np.log(value)
    )
    assert ("Bokeh" in page, "trades.csv" in page) == (not short, short)
    assert f"it made {value - 1:+.1%}" in page
    assert not re.search(r"\b1 days|beyond inf|\bnan\b", page.rpartition("<h1>")[2].partition("<script")[0])


def test_a_full_disk_and_a_damaged_file_are_one_line(tmp_path):
    """What was booked before stays."""
    path, closes = tmp_path / "account.sqlite", itertools.count()
    account = portfolio_env.PaperAccount(path)

    def book_on() -> None:
        for close in closes:
            account.book(close, 0, [1 / 3] * 11)

    with full_disk(40_000), pytest.raises(getData.UserError, match=rf"^{path}: .*\Z"):
        book_on()
    booked = list(range(next(closes) - 1))  # but for the last one
    assert len(booked) > 50
    account = portfolio_env.PaperAccount(path)
    assert account.decisions().index.tolist() == booked
    account.book(20_000, 20_000, None, "late")
    with pytest.raises(getData.UserError, match=rf"^{path} .*version.*\Z"):
        account.about()  # there are decisions, but no agent
    path.write_bytes(b"no account" * 1000)
    with pytest.raises(getData.UserError, match=str(path)):
        portfolio_env.PaperAccount(path)


def test_a_program_that_fails_or_hangs_stops_nothing(tmp_path):
    assert portfolio_env.call_program("cat", {"weights": {}}, 60) == "done"
    assert portfolio_env.call_program("sh -c 'exit 3'", {}, 60) == "exit code 3"
    assert portfolio_env.call_program("true", {"long": "x" * 10**6}, 60) == "done"  # though it reads nothing
    assert portfolio_env.call_program(str(tmp_path), {}, 60) == "not started: Permission denied"
    marker = tmp_path / "alive"
    hangs = f"sh -c '(while true; do touch {marker}; sleep 0.01; done) & sleep 600'"
    assert portfolio_env.call_program(hangs, {}, 0.5) == "stopped after 0.5 s"
    marker.unlink(missing_ok=True)  # what it had started is gone, too
    time.sleep(0.2)
    assert not marker.exists()


def test_the_broker_of_the_examples_trades_at_the_exchange(server):
    """Sales first, in lots, nothing under the minimum, other coins left alone; then nothing is left to do."""
    server.balances = {"BTC": 8.0, "ETH": 0.0312, "DOGE": 7.0, "USDT": 40.0}
    command = [sys.executable, ROOT / "tests" / "examples" / "broker.py"]
    place = {"API_KEY": "key", "API_SECRET": "secret", "BASE_URL": server.url}
    prices = {coin: server.price(f"{coin}USDT") for coin in ("BTC", "ETH", "SOL")}
    names = ["cash", *(f"{coin}USDT" for coin in prices)]

    def trade(weights: list[float], late_ms: int = 0) -> subprocess.CompletedProcess:
        decision = {"weights": dict(zip(names, weights, strict=True)), "next_decision_ms": server.clock + 1}
        decision["next_decision_ms"] -= late_ms
        return subprocess.run(
            command, input=json.dumps(decision), env=os.environ | place, capture_output=True, text=True
        )

    assert trade([0.0, 0.3, 0.4, 0.3], late_ms=1).returncode == 1
    assert server.orders == []
    worth = 40 + 8 * prices["BTC"] + 0.0312 * prices["ETH"]
    done = trade([0.0, 0.3, 0.4, 0.3])
    assert done.returncode == 0, done.stderr
    assert [(order["symbol"], order["side"]) for order in server.orders] == [
        ("BTCUSDT", "SELL"), ("ETHUSDT", "BUY"), ("SOLUSDT", "BUY"),
    ]  # fmt: skip
    weights = [server.balances[coin] * prices[coin] / worth for coin in prices]
    np.testing.assert_allclose(weights, [0.3, 0.4, 0.3], atol=0.004)
    assert server.balances["DOGE"] == 7.0
    assert trade([0.003, *weights]).returncode == 0  # under the minimum
    assert len(server.orders) == 3
    place["API_KEY"] = ""  # whatever fails is told by the exit code
    assert trade([1.0, 0.0, 0.0, 0.0]).returncode != 0
