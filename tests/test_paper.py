"""The paper account: processes on a loopback exchange whose clock is moved, wrong, or 300 times as fast."""

import json
import random
import resource
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import AGENT, COINS, ROOT, WINDOW, copy_market, load, metrics_of, put_back, run
from exchange_server import BAR_MS, ExchangeServer
from forked import Script

import feature_reducer
import getData
import portfolio_env
import train

HOLD = 2  # bars between decisions
STEP = HOLD * BAR_MS
COST = 0.001
CLOSED, LATER = 203 * 288, 200  # bars: a window's look-back with the agent of WINDOW, and what comes after
PROGRAM = """\
import json, pathlib, sys, time
message = json.load(sys.stdin)
with open(sys.argv[1], "a") as file:
    file.write(json.dumps(message) + "\\n")
if pathlib.Path(sys.argv[1] + ".wait").exists():
    time.sleep(600)
"""


@pytest.fixture(scope="module")
def agent_dir(market_dir, tmp_path_factory) -> Path:
    """A data folder with a tiny agent that decides every HOLD bars. Read only."""
    data_dir = copy_market(market_dir, tmp_path_factory.mktemp("paper") / "data")
    flags = (*WINDOW, "--hidden-dim", "34", "--latent-dim", "16", *AGENT, "--hold", str(HOLD))
    run("train.py", data_dir, *flags, "--batches", "0", "--no-test")
    return data_dir


@pytest.fixture
def data_dir(agent_dir, tmp_path) -> Path:
    """A data folder with its checkpoint alone: a paper account needs no other files."""
    (tmp_path / "data" / "checkpoints").mkdir(parents=True)
    path = tmp_path / "data" / "checkpoints" / "best.pt"
    path.write_bytes((agent_dir / "checkpoints" / "best.pt").read_bytes())
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
        self.command = [sys.executable, "-u", str(ROOT / "train.py"), "--job", "paper"]
        self.command += ["--data-dir", str(data_dir), "--base-url", server.url, "--poll", "0.05", *flags]
        name = flags[flags.index("--run") + 1] if "--run" in flags else "tiny"
        self.file = data_dir / "paper" / f"{name}.sqlite"
        self.log = data_dir / "log"
        self.start()

    def start(self) -> None:
        """Start it; what it says is added to the log."""
        self.process = Script(self.command[2:], log=self.log)

    def stop(self, number: signal.Signals = signal.SIGKILL) -> int:
        """Send it a signal and return its exit code."""
        self.process.send_signal(number)
        return self.process.wait(60)

    def rows(self) -> list[tuple]:
        """What is booked: close_ms, booked_ms, weights, reason, call, result."""
        return booked(self.file)

    def wait(self, condition: Callable[[], bool]) -> None:
        """Wait until a condition holds."""
        for _ in range(1200):
            if condition():
                return
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.05)
        raise AssertionError(self.log.read_text())

    def wait_for(self, count: int, reason: str = "") -> None:
        """Wait until so many decisions are booked, the last for that reason."""
        self.wait(lambda: len(self.rows()) >= count)
        assert len(self.rows()) == count
        assert self.rows()[-1][3] == reason, self.log.read_text()


def booked(file: Path) -> list[tuple]:
    """The rows of an account, read without this project's code."""
    query = "SELECT d.*, c.result FROM decisions d LEFT JOIN calls c USING (close_ms) ORDER BY close_ms"
    if not file.exists():
        return []
    with closing(sqlite3.connect(file, timeout=30)) as connection:
        tables = {
            name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
        }
        return connection.execute(query).fetchall() if {"decisions", "calls"} <= tables else []


@contextmanager
def paper_job(server: ExchangeServer, data_dir: Path, *flags: str) -> Iterator[Job]:
    """A job that has booked its first decision; killed at the end."""
    job = Job(server, data_dir, *flags)
    try:
        job.wait_for(1)
        yield job
    finally:
        job.stop()


def advance(server: ExchangeServer, bars: int, seconds: int = 10) -> None:
    """Move the clock to some seconds after the close of the bar that many bars later."""
    server.clock = (server.clock // BAR_MS + bars) * BAR_MS + 1000 * seconds


def prices_of(server: ExchangeServer, stop: int) -> tuple[list[int], np.ndarray, np.ndarray]:
    """The exchange's own bars up to the close `stop`, gaps filled: close times, open and close [T, N]."""
    times = np.arange(min(bars[0, 0] for bars in server.bars.values()), stop, BAR_MS)
    parts = []
    for bars in server.bars.values():
        frame = pd.DataFrame(bars[:, [1, 4]], index=bars[:, 0], columns=["open", "close"]).reindex(times)
        close = frame["close"].ffill()
        parts.append((frame["open"].fillna(close.shift()), close))
    opens, closes = (np.column_stack([part[side] for part in parts]) for side in (0, 1))
    return (times.astype(int) + BAR_MS).tolist(), opens, closes


def value_by_hand(server: ExchangeServer, rows: list[tuple], stop: int) -> tuple[float, np.ndarray]:
    """Value and weights at the close `stop` of an account that trades each booked decision at the next open.

    In amounts of coins and cash, with the cost of a trade found by bisection of the money that is left.
    """
    times, opens, closes = prices_of(server, stop)
    first = times.index(rows[0][0])
    orders = {row[0]: json.loads(row[2]) for row in rows if row[2]}
    cash, coins = 1.0, np.zeros(opens.shape[1])
    for bar in range(first + 1, len(times)):
        if times[bar - 1] not in orders:
            continue
        target, price = np.array(orders[times[bar - 1]]), opens[bar]
        low, high = 0.0, cash + coins @ price
        for _ in range(200):
            value = (low + high) / 2
            wanted = value * target[1:] / price
            sold, bought = np.maximum(coins - wanted, 0) @ price, np.maximum(wanted - coins, 0) @ price
            left = cash + (1 - COST) * sold - bought / (1 - COST)
            low, high = (value, high) if left > value * target[0] else (low, value)
        cash, coins = value * target[0], wanted
    held = np.append(cash, coins * closes[-1])
    return held.sum(), held / held.sum()


def assert_honest(rows: list[tuple], first: int, step: int, max_late: int) -> None:
    """Every due bar has one row, and what is a decision was booked before the bar that judges it closed."""
    assert [row[0] for row in rows] == list(range(first, rows[-1][0] + 1, step))
    for close, booked_ms, weights, reason, *_ in rows:
        assert (weights is None) == bool(reason)
        assert weights is None or 0 <= booked_ms - close <= 1000 * max_late < BAR_MS
        assert weights is None or abs(sum(json.loads(weights)) - 1) < 1e-12


def wanted_by_full_features(data_dir: Path, close: int, held: np.ndarray) -> np.ndarray:
    """The agent's weights at a close, of features over the whole history, in the way of training."""
    saved = load(data_dir / "checkpoints" / "best.pt")
    bars = getData.load_bars(data_dir / "paper" / "tiny", saved["market"]["symbols"])
    frames = getData.compute_features(
        {
            symbol: frame[frame.index < pd.Timestamp(close, unit="ms", tz="UTC")]
            for symbol, frame in bars.items()
        }
    )
    windows = feature_reducer.FeatureWindows(frames, saved["window_bars"], "cpu", saved["normalisation"])
    assert windows.times[-1] == close
    reducer = feature_reducer.reducer_from_checkpoint(saved, "cpu")
    policy = train.ActorCritic(reducer.latent_dim, **saved["policy_shape"])
    policy.load_state_dict(saved["policy"])
    tokens = train.encode(policy, reducer, windows, torch.tensor([len(windows.times) - 1]), 1)
    return train.decide(policy, tokens, torch.from_numpy(held[None]))[0].numpy()


def refused(data_dir: Path, *flags: str) -> getData.UserError:
    """The one line with which --job paper refuses to begin."""
    with put_back(train), put_back(getData), pytest.raises(getData.UserError) as error:
        train.main(["--job", "paper", "--data-dir", str(data_dir), *flags])
    assert "\n" not in str(error.value)
    return error.value


def make_page(data_dir: Path, capsys: pytest.CaptureFixture) -> str:
    """Write the page of the account and return what is printed."""
    with put_back(train):
        assert train.main(["--job", "paper", "--data-dir", str(data_dir), "--report"]) == 0
    return capsys.readouterr().out


def test_an_account_through_kills_outages_and_wrong_clocks(data_dir, server, tmp_path, capsys):
    """Bar by bar: what is booked, and why not; then its page, against the account in coins and cash."""
    program, messages = tmp_path / "program.py", tmp_path / "messages"
    program.write_text(PROGRAM)
    call = f"{sys.executable} {program} {messages}"
    first = server.clock // BAR_MS * BAR_MS
    with paper_job(server, data_dir, "--call", call) as job:
        advance(server, HOLD)
        job.wait_for(2)
        job.wait(lambda: job.rows()[-1][5] == "done")

        job.stop()  # killed between two decisions
        job.start()
        advance(server, HOLD)
        job.wait_for(3)
        assert "Decisions: 3. Calls of the user's program: 3" in make_page(data_dir, capsys)

        server.fault("503", endpoint="", times=-1)  # away during two decisions
        advance(server, 2 * HOLD + 1)
        job.wait(lambda: "no answer" in job.log.read_text())
        job.stop()
        job.start()
        job.wait(lambda: job.log.read_text().count("no answer") > 1)  # an account that has begun waits for it
        server.forget()
        job.wait_for(5, "missed")

        bar = int(np.searchsorted(server.bars["ETHUSDT"][:, 0], server.clock - BAR_MS, "right"))
        server.drop_bars("ETHUSDT", bar, bar + 1)
        advance(server, 1)
        job.wait(lambda: "tries again: no data: ETHUSDT" in job.log.read_text())
        server.clock += 60_000
        job.wait_for(6, "no data: ETHUSDT")

        truth = dict(server.bars)  # bars that come late
        for symbol, bars in truth.items():
            server.set_bars(symbol, bars[bars[:, 0] < server.clock])
        advance(server, HOLD, seconds=100)
        requests = server.count("time")
        job.wait(lambda: server.count("time") > requests + 1)
        away = job.log.read_text().count("no answer")  # they come all at once
        server.fault("503", endpoint="", times=-1)
        job.wait(lambda: job.log.read_text().count("no answer") > away)
        for symbol, bars in truth.items():
            server.set_bars(symbol, bars)
        server.forget()
        job.wait_for(7, "late")

        for error in (2 * 3_600_000, -3_600_000):  # clocks that jump, and back
            server.clock_error, requests = error, server.count("time")
            job.wait(lambda: server.count("time") > requests + 1)  # noqa: B023
            server.clock_error = 0
            advance(server, HOLD)
            job.wait_for(8 if error > 0 else 9)

        second = refused(data_dir)
        assert second.code == 3
        assert "another paper job is at work" in str(second)

        (tmp_path / "messages.wait").touch()  # killed during a call, which is not made again
        advance(server, HOLD)
        job.wait_for(10)
        job.wait(lambda: messages.read_text().count("\n") == 6)
        job.stop()
        (tmp_path / "messages.wait").unlink()
        job.start()
        advance(server, HOLD)
        job.wait_for(11)
        job.wait(lambda: job.rows()[-1][5] == "done")

        printed = make_page(data_dir, capsys)  # beside the running job
        assert job.stop(signal.SIGTERM) == 143

    rows, content = job.rows(), metrics_of(data_dir, "paper-tiny")
    assert_honest(rows, first, STEP, 60)
    reasons = ["", "", "", "missed", "missed", "no data: ETHUSDT", "late", "", "", "", ""]
    assert [row[3] for row in rows] == reasons
    assert [row[5] for row in rows if not row[3]] == ["done"] * 5 + ["unknown", "done"]
    said = [json.loads(line) for line in messages.read_text().splitlines()]
    assert [message["close_time_ms"] for message in said] == [row[0] for row in rows if not row[3]]
    assert [list(message["weights"].values()) for message in said] == [
        json.loads(row[2]) for row in rows if not row[3]
    ]
    for message in said:
        before = [row for row in rows if row[0] < message["close_time_ms"]]
        held = value_by_hand(server, before, message["close_time_ms"])[1] if before else np.eye(4)[0]
        np.testing.assert_allclose(list(message["held"].values()), held, rtol=1e-9)
        assert message["next_decision_ms"] == message["close_time_ms"] + STEP
    for message in said[1], said[-1]:
        held = np.array(list(message["held"].values()))
        expected = wanted_by_full_features(data_dir, message["close_time_ms"], held)
        np.testing.assert_allclose(list(message["weights"].values()), expected, atol=1e-3)

    stop = rows[-1][0]
    value, _ = value_by_hand(server, rows, stop)
    figures = content["paper"]["agent (paper)"]
    assert figures["growth"] == pytest.approx(np.log(value), rel=1e-9)
    times, opens, closes = prices_of(server, stop)
    bought = opens[times.index(first) + 1]
    assert content["paper"]["equal-weight hold"]["growth"] == pytest.approx(
        np.log((closes[-1] / bought).mean() * (1 - COST)), rel=1e-9
    )
    assert content["these bars are"].startswith("out of sample; the agent was trained on synthetic:seed=0")
    page = (data_dir / "reports" / "paper-tiny" / "report.html").read_text()
    gaps = "Decisions: 11, of them none: 2 missed, 1 no data, 1 late; what was held then drifted."
    assert "Calls of the user&#39;s program: 7, done 6." in page
    assert gaps in printed
    assert gaps in page
    assert "says nothing yet: it would take" in page
    assert "Nothing can be said about skill" in printed
    stored = getData.load_bars(data_dir / "paper" / "tiny", list(server.bars))
    for symbol, frame in stored.items():  # also what a wrong clock took for closed
        real = frame[~frame["filled"]]
        expected = server.closed(symbol)[-len(real) :]
        np.testing.assert_array_equal(real[["open", "high", "low", "close", "volume"]], expected[:, 1:])


def test_a_short_outage_between_bars_and_decision_costs_none(data_dir, server):
    """The exchange stops answering when the new bars were asked for, and answers again."""
    with paper_job(server, data_dir) as job:
        server.latency, asked = 0.5, server.count()
        advance(server, HOLD)
        job.wait(lambda: server.count() > asked)
        server.fault("503", endpoint="time", times=3)
        job.wait(lambda: "tries again: clock: no answer in 3 tries" in job.log.read_text())
        server.latency = 0.0
        job.wait_for(2)


def test_a_fast_clock_and_kills_at_random_moments(data_dir, server, capsys):
    """300 times as fast, a bar a second: no bar has two decisions, none is left out or booked too late."""
    moments = random.Random(0)
    first = server.clock // BAR_MS * BAR_MS
    with paper_job(server, data_dir, "--max-late", "299") as job:
        server.run_clock(300)
        for _ in range(2):
            time.sleep(moments.uniform(1, 3))
            job.stop()
            job.start()
        time.sleep(8)
        server.run_clock(0)
        last = (
            server.clock // STEP * STEP
            if first % STEP == 0
            else (server.clock - BAR_MS) // STEP * STEP + BAR_MS
        )
        job.wait(lambda: job.rows()[-1][0] == last)
        assert job.stop(signal.SIGINT) == 130
    rows = job.rows()
    assert_honest(rows, first, STEP, 299)
    assert "Traceback" not in job.log.read_text()
    printed = make_page(data_dir, capsys)
    growth = metrics_of(data_dir, "paper-tiny")["paper"]["agent (paper)"]["growth"]
    stored = getData.load_bars(data_dir / "paper" / "tiny", list(server.bars))
    stop = int(getData.last_common_close(stored).timestamp() * 1000)
    assert growth == pytest.approx(np.log(value_by_hand(server, rows, stop)[0]), rel=1e-9)
    assert "Each decision was booked before the bar existed that judged it." in printed


def test_an_account_is_of_one_agent_and_one_way_to_trade(data_dir, server):
    with paper_job(server, data_dir) as job:
        job.stop()
    here = ("--base-url", server.url)
    advice = "give this account a name of its own with --run"
    said = f"{job.file} is of cost 0.001, not 0.002: {advice}"
    assert str(refused(data_dir, *here, "--fee-rate", "0.002")) == said
    assert "is of exchange binance, not okx" in str(refused(data_dir, *here, "--exchange", "okx"))
    assert "is of base_url http" in str(refused(data_dir))
    assert "no bar has closed since the first decision" in str(refused(data_dir, "--report"))
    assert "begin it with python train.py" in str(refused(data_dir, "--report", "--run", "other"))
    path = data_dir / "checkpoints" / "best.pt"
    kept, saved = data_dir / "paper" / "tiny" / "agent.pt", load(path)
    saved["policy"]["actor.weight"] += 1
    feature_reducer.save_checkpoint(path, saved)  # as more batches leave it
    assert f"the account's agent, in {kept}, is not that of" in str(
        refused(data_dir, *here, "--checkpoint", str(path))
    )
    with paper_job(server, data_dir) as job:  # goes on with the agent that it began with
        job.stop()
    assert not torch.equal(load(kept)["policy"]["actor.weight"], saved["policy"]["actor.weight"])
    feature_reducer.save_checkpoint(path, saved | {"run": "later"})
    message = f"is of run later, and the accounts in {data_dir / 'paper'} are tiny: name one with --run"
    assert message in str(refused(data_dir, *here))
    assert len(job.rows()) == 1
    server.fault("503", endpoint="", times=-1)  # an account that is new does not wait
    result = subprocess.run([*job.command, "--run", "new"], capture_output=True, text=True, timeout=60)
    assert result.returncode == 3
    assert result.stderr.splitlines()[-1].startswith("error: clock: no answer in 3 tries")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--report", "--poll", "3"], "POLL does nothing with --report in --job paper"),
        (["--look-back", "3"], "LOOK_BACK does nothing without --report in --job paper"),
        (["--call", "no-such-program"], "CALL must be a program and its arguments, not 'no-such-program'"),
        (["--call", "'sh"], "CALL must be a program"),
        (["--max-late", "300"], "MAX_LATE = '300'"),
        (["--base-url", "nowhere"], "BASE_URL must begin with http:// or https://"),
        (["--seed", "1"], "--seed does nothing in --job paper"),
        (["--fill", "close"], "--fill does nothing in --job paper"),
    ],
)
def test_flags_of_a_paper_account_are_checked_before_anything_is_read(tmp_path, flags, said):
    error = refused(tmp_path, *flags)
    assert error.code == 2
    assert said in str(error)
    assert not list(tmp_path.iterdir())


def test_the_value_of_an_account_worked_out_by_hand(tmp_path):
    """Cash, into the one coin at 100, out of it at 120, with 1 % per side: 0.99 x 1.2 x 0.99."""
    account = portfolio_env.PaperAccount(tmp_path / "account.sqlite")
    begun = pd.date_range("2025-01-01", periods=7, freq="5min", tz="UTC", unit="ms")
    opens, closes = [90, 95, 100, 110, 115, 120, 50], [95, 100, 110, 115, 120, 50, 40]
    bars = {"COIN": pd.DataFrame({"open": opens, "close": closes}, index=begun, dtype=float)}
    times, *prices = portfolio_env.paper_prices(bars)
    assert times[0] == begun[0].timestamp() * 1000 + BAR_MS
    result = portfolio_env.paper_result(account.decisions(), times, *prices, 0.01)
    assert result is None
    account.book(int(times[1]), int(times[1]) + 5, [0.0, 1.0])
    account.book(int(times[2]), int(times[2]) + 5, None, "late")
    for stop, value in ((3, 0.99 * 1.1), (4, 0.99 * 1.15)):  # at the closes of the bars in between
        early = portfolio_env.paper_prices({"COIN": bars["COIN"][:stop]})
        result = portfolio_env.paper_result(account.decisions(), *early, 0.01)
        assert result.value[-1] == pytest.approx(value)
        np.testing.assert_allclose(portfolio_env.weights_seen(result, *early[1:], "next_open"), [[0, 1]])
    account.book(int(times[4]), int(times[4]) + 5, [1.0, 0.0], call="x")
    result = portfolio_env.paper_result(account.decisions(), times, *prices, 0.01)
    assert result.value[-1] == pytest.approx(0.99 * 1.2 * 0.99)
    assert result.benchmark[-1] == pytest.approx(40 / 100)
    account.record_call(int(times[4]), "exit code 2")
    assert account.decisions()["result"].tolist() == [None, None, "exit code 2"]
    with pytest.raises(getData.UserError, match="UNIQUE"):  # never twice
        account.book(int(times[4]), int(times[4]) + 9, [0.5, 0.5])
    assert len(account.decisions()) == 3
    account.close()


def test_a_full_disk_and_a_damaged_file_are_one_line(tmp_path):
    """A limit on the size of files stands for the disk; what was booked before stays."""
    path = tmp_path / "account.sqlite"
    code = (
        "import sys, pathlib, getData, portfolio_env\n"
        "def main():\n"
        "    account = portfolio_env.PaperAccount(pathlib.Path(sys.argv[1]))\n"
        "    for close in range(10_000):\n"
        "        account.book(close, close, [1 / 3] * 11)\n"
        "        print(close, flush=True)\n"
        "getData.run_script(main)"
    )
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (40_000, 40_000))
    command = [sys.executable, "-c", code, str(path)]
    result = subprocess.run(command, capture_output=True, text=True, preexec_fn=limit, cwd=ROOT)
    assert result.returncode == 1
    assert result.stderr.startswith(f"error: {path}: ")
    assert result.stderr.endswith("what was booked before is kept\n")
    assert result.stderr.count("\n") == 1
    account = portfolio_env.PaperAccount(path)
    assert account.decisions().index.tolist() == [int(line) for line in result.stdout.split()]
    account.book(20_000, 20_000, None, "late")
    account.close()
    path.write_bytes(b"no account" * 1000)
    with pytest.raises(getData.UserError, match="file is not a database"):
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
