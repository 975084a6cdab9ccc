"""Would it have been found: planted strengths, placebos, the rule that knows the drift, and the verdicts."""

import json

import numpy as np
import pandas as pd
import pytest
from conftest import ALONE, copy_market, metrics_of, refusal, run

import getData
import portfolio_env
import train

SMALL = ALONE[:-1]  # with a report
DAY = getData.BARS_PER_DAY


def daily(bars: pd.DataFrame, first: float) -> tuple[np.ndarray, np.ndarray]:
    """Log move of each day over the close before it, and volume, of one coin whose
    bars begin at the price `first`."""
    close = np.log(bars["close"].to_numpy())
    days = bars["timestamp"].astype("int64").to_numpy() // getData.DAY_MS
    ends = np.flatnonzero(np.diff(days, append=-1))
    moves = np.diff(close[ends], prepend=np.log(first))
    return moves, np.add.reduceat(bars["volume"].to_numpy(), np.append(0, ends[:-1] + 1))


@pytest.mark.parametrize("seed", [0, 1])
def test_a_placebo_has_the_same_days_in_another_order(seed):
    """In all coins the same order; a day with fewer bars in one of them stays; times and rules are kept."""
    market = getData.synthetic_market(["AAA", "BBB"], 40, 3, 0.0)
    market["BBB"] = market["BBB"].drop(index=range(10 * DAY + 5, 10 * DAY + 9))
    market = {symbol: getData.validate_bars(symbol, bars) for symbol, bars in market.items()}
    mixed = getData.mix_days(market, seed)
    orders = []
    for symbol, bars in market.items():
        again = getData.validate_bars(symbol, mixed[symbol])  # all rules of bars
        assert set(again["timestamp"]) == set(bars["timestamp"])
        first = bars["open"].iloc[0]
        (moves, volumes), (moves_before, volumes_before) = daily(again, first), daily(bars, first)
        orders.append([int(np.abs(volumes_before - volume).argmin()) for volume in volumes])
        assert sorted(orders[-1]) == list(range(40))
        np.testing.assert_allclose(moves, moves_before[orders[-1]], atol=1e-9)
        np.testing.assert_allclose(again["close"].iloc[-1], bars["close"].iloc[-1])
        # within a day each bar keeps its own returns
        day = orders[-1].index(7)
        (one, other) = (x.iloc[slice(k * DAY, k * DAY + 9)] for x, k in ((bars, 7), (mixed["AAA"], day)))
        if symbol == "AAA":
            np.testing.assert_allclose(other["high"] / other["open"], one["high"] / one["open"])
    assert orders[0] == orders[1] != list(range(40))
    assert orders[0][10] == 10
    assert not getData.mix_days(market, seed + 2)["AAA"].equals(mixed["AAA"])


def test_a_placebo_has_no_return_of_a_hole():
    """Two pieces, a year apart, at five times the price: no day of the placebo has that return."""
    bars = getData.validate_bars("AAA", getData.synthetic_market(["AAA"], 20, 3, 0.0)["AAA"])
    later = bars.assign(timestamp=bars["timestamp"] + pd.Timedelta(days=365))
    later[["open", "high", "low", "close"]] *= 5
    both = pd.concat([bars, later], ignore_index=True)
    mixed = getData.mix_days({"AAA": both}, 0)["AAA"]
    moves = np.log(mixed["close"]).diff().abs()
    assert moves.max() < np.log(1.5) < np.log(both["close"]).diff().abs().max()


def test_the_rule_that_knows_the_drift_is_what_it_says():
    """Its growth by a second formula: a portfolio of one asset keeps 1 - c at each side."""
    rng, cost, every = np.random.default_rng(0), 0.001, 5
    close = np.exp(np.cumsum(rng.normal(0, 0.004, (400, 3)), 0))
    opens = close * np.exp(rng.normal(0, 1e-4, close.shape))
    to_come = rng.normal(0, 0.01, close.shape)
    start, stop, threshold = 20, 380, 0.008
    rule = train.informed_rule(to_come, start, every, threshold)
    account = portfolio_env.backtest(rule, opens, close, start, stop, cost=cost)

    held, value = None, 1.0  # 0: cash; None: equal weights, in all of which it begins
    amounts = np.full(3, (1 - cost) / 3)
    for row in range(start, stop):
        if (row - start) % every == 0:
            scores = [0.0, *to_come[row]]
            # what it holds when it decides, at the close of the bar
            shares = amounts * close[row] / opens[row] if row > start and held is None else amounts
            own = scores[held] if held is not None else float(shares @ to_come[row] / shares.sum())
            own = 0.0 if row == start else own  # all cash, before its first trade
            best = int(np.argmax(scores))
            if scores[best] - own > threshold:
                if row == start:
                    value = 1 - cost * (best > 0)
                elif held is None:
                    # coins other than the one that it goes into are sold
                    sold = amounts.sum() - (amounts[best - 1] if best else 0.0)
                    value = amounts.sum() - sold + sold * (1 - cost) ** (2 if best else 1)
                else:
                    value *= (1 - cost) ** ((held > 0) + (best > 0))
                held = best
        growth = opens[row + 2] / opens[row + 1]
        amounts = amounts * growth
        value = amounts.sum() if held is None else value * (growth[held - 1] if held else 1.0)
    np.testing.assert_allclose(account.value[-1], value, rtol=1e-9)
    trades = (account.turnover > 0).sum()
    assert 5 < trades < 72  # it does trade, and not at each of its decisions
    late = train.informed_rule(to_come + 0 * rng.normal(), start, every, np.inf)
    still = portfolio_env.backtest(late, opens, close, start, stop, cost=cost)
    present = np.ones((400, 3), bool)
    present[:, 2] = False  # one that is absent changes nothing
    pair = train.informed_rule(to_come[:, :2], start, every, threshold)
    trio = train.informed_rule(np.where(present, to_come, -1.0), start, every, threshold)
    of_pair = portfolio_env.backtest(pair, opens[:, :2], close[:, :2], start, stop, cost=cost)
    of_trio = portfolio_env.backtest(trio, opens, close, start, stop, cost=cost, present=present)
    np.testing.assert_allclose(of_trio.value, of_pair.value, rtol=1e-9)
    assert (still.turnover > 0).sum() == 1  # equal weights for good
    np.testing.assert_allclose(still.weights[0], [0, *[1 / 3] * 3])


@pytest.mark.parametrize(
    ("found", "abstains", "p_value", "word"),
    [
        ({0: "01000", 0.1: "00000", 0.2: "11110", 0.3: "11111"}, True, 0.5, "nothing as strong as 0.2."),
        ({0: "00000", 0.1: "11111", 0.2: "11100", 0.3: "11111"}, True, 0.5, "nothing as strong as 0.3."),
        ({0: "00000", 0.1: "11111", 0.2: "11111", 0.3: "11100"}, True, 0.5, "undecidable."),
        ({0: "0", 0.1: "1"}, True, 0.5, "nothing as strong as 0.1."),
        ({0: "01000", 0.1: "00000", 0.2: "11110", 0.3: "11111"}, False, 0.5, "found."),
        ({0: "10", 0.1: "00"}, False, 0.5, "found."),
        ({0: "00", 0.1: "00"}, False, np.nan, "undecidable."),  # too few days to tell anything
    ],
)
def test_the_verdict_is_one_of_three(found, abstains, p_value, word, tmp_path):
    """At least four of five, at this strength and at all stronger ones; the run's page and numbers say it."""
    figures = {"validation": 1.0, "growth": 2.0, "low": None, "high": None, "rule": 3.0}
    trainings = pd.DataFrame(
        [
            {
                "strength": strength,
                "seed": seed,
                "found": sign == "1",
                "correlation": strength or np.nan,
                "p_value": p_value,
                **figures,
            }
            for strength, signs in found.items()
            for seed, sign in enumerate(signs)
        ]
    )
    power = portfolio_env.publish_power(tmp_path / "power", "x", trainings, {"HOLD": 12})
    (tmp_path / "metrics.json").write_text(json.dumps({"abstains": abstains}))
    page = '<p>above</p><p id="power">an earlier one</p><p>below</p>'
    (tmp_path / "report.html").write_text(page)
    for _ in range(2):  # once more changes nothing
        portfolio_env.show_power(tmp_path, power)
        text = json.loads((tmp_path / "metrics.json").read_text())["power"]
        assert text.startswith(f"Power: {word} ")
        assert f"of {len(found[0])} placebos, {found[0].count('1')} showed" in text
        text = page.replace("an earlier one", text.replace("'", "&#39;"))
        assert (tmp_path / "report.html").read_text() == text
    table = pd.read_csv(tmp_path / "power" / "trainings.csv")
    assert table["found"].tolist() == trainings["found"].tolist()


def test_a_power_job_that_is_stopped_goes_on_and_the_run_gets_its_verdict(martingale_dir, tmp_path):
    """Trained by the run's constants alone, apart from the real bars; what has ended stays as it is. The run
    is one of several."""
    data_dir = copy_market(martingale_dir, tmp_path / "data")
    few = ("--pretrain-epochs", "1", "--batches", "1")
    name = "tiny/fold-1"
    run("train.py", data_dir, *SMALL, *few, "--run", name)
    trials = (data_dir / "runs" / "trials.csv").read_bytes()
    job = ("--job", "power", "--run", name, "--strengths", "2", "--seeds", "3")
    stopped = run("train.py", data_dir, *job, code=143, stop_at="run 1/2")
    folder = data_dir / "power" / name
    assert stopped.stdout.splitlines()[-1] == "the same command goes on"
    first = folder / "0-3" / "checkpoints" / name / "best.pt"
    before = first.resolve().read_bytes()
    assert not (data_dir / "reports" / f"{name}-power").exists()
    assert "power" not in metrics_of(data_dir, name)
    for flags, fault in ((("--hold", "6"), "HOLD=12"), (("--batches", "2"), "BATCHES=1")):
        assert fault in refusal("train.py", data_dir, *job, *flags)
    printed = run("train.py", data_dir, *job).stdout
    assert "runs: 1 of 2 " in printed
    assert first.resolve().read_bytes() == before

    table = pd.read_csv(data_dir / "reports" / f"{name}-power" / "trainings.csv").set_index("strength")
    assert table["seed"].tolist() == [3, 3]
    assert table.loc[2, "rule"] > max(100, table.loc[2, "growth"])  # which knows 6 bp per bar
    assert table.loc[2, "correlation"] > 0.3
    assert table.loc[0, ["correlation"]].isna().all()
    assert -30 < table.loc[0, "rule"] < 0  # equal weights, less the costs of buying them
    assert metrics_of(data_dir, name)["power"] in (
        data_dir / "reports" / name / "report.html"
    ).read_text().replace("&#39;", "'")
    assert metrics_of(data_dir, name)["power"].startswith("Power: ")
    _, footer = getData.load_prices(data_dir)
    for part, mark in (("0-3", "strength=placebo"), ("2-3", "strength=2.0")):
        content, (_, planted) = metrics_of(folder / part, name), getData.load_prices(folder / part)
        assert content["market"].startswith(
            f"planted:{mark},seed=3 on recorded:{data_dir / 'ohlcv'} (NOT REAL"
        )
        assert {key: planted[key] for key in ("splits", "symbols")} == {
            key: footer[key] for key in ("splits", "symbols")
        }
        saved = train.feature_reducer.load_checkpoint(
            folder / part / "checkpoints" / name / "last.pt", train.AgentState
        )
        real = train.feature_reducer.load_checkpoint(
            data_dir / "checkpoints" / name / "last.pt", train.AgentState
        )
        assert saved["fixed"] == real["fixed"] | {"SEEDS": (3,)}
        assert saved["progress"].batch == 1
    assert (data_dir / "runs" / "trials.csv").read_bytes() == trials
    assert sorted(path.name for path in (data_dir / "checkpoints").iterdir() if path.is_dir()) == ["tiny"]


def test_what_cannot_be_planted_into_is_one_line(market_dir, martingale_dir, tmp_path):
    power = ("--job", "power", "--run", "x")
    assert str(tmp_path / "none") in refusal("train.py", tmp_path / "none", *power)  # and makes no market
    assert not list((tmp_path / "none").rglob("*.parquet"))
    assert f"{market_dir} has a drift" in refusal("train.py", market_dir, *power)
    planted = tmp_path / "planted"
    own = ("--symbols", "BTCUSDT", "--source")
    run("getData.py", planted, "--job", "bars", *own, martingale_dir / "ohlcv", "--plant", "placebo")
    again = (*own, planted / "ohlcv", "--plant", "placebo")
    assert str(planted) in refusal("getData.py", tmp_path / "again", *again)
    data_dir = copy_market(martingale_dir, tmp_path / "data")
    for flags, code, fault in (
        (("--grid", "HOLD=6,12"), 2, "--run"),
        (("--walk-forward", "2"), 2, "--run"),
        (("--resume",), 2, "--resume"),
        (("--strengths", "0"), 2, "STRENGTHS"),
        (("--strengths", "11"), 2, "STRENGTHS"),
    ):
        assert fault in refusal("train.py", data_dir, *power, *flags, code=code)
    (data_dir / "power" / "x").mkdir(parents=True)
    (data_dir / "power" / "x" / "power.json").write_text("of others")
    assert str(data_dir / "power" / "x") in refusal("train.py", data_dir, *power)
