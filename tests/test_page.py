"""The report: its page in a browser, what it says, and every number as a file beside it."""

import html
import json
import math
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import getData
import portfolio_env
from portfolio_env import Backtest, Report, RunResult, backtest

COST = 0.004
START = 1_700_006_400_000  # midnight, UTC
SYMBOLS = ["AAA", "B<b>", "CCC"]
SPLITS = {"train": [0, 10], "validation": [20, 30], "test": [40, 50]}
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def make_report(days: float, curves: int = 3, **changes) -> Report:
    """Two agents, which trade every day and every hour, and momentum rules, from midnight on."""
    rng = np.random.default_rng(0)
    bars = int(288 * days)
    closes = np.exp(np.cumsum(rng.normal(0, 0.002, (bars + 2, 3)), axis=0))
    targets = rng.dirichlet(np.ones(4), bars)

    def follow(decide: Callable[[int], np.ndarray], every: int) -> Backtest:
        return backtest(lambda t, seen: None if t % every else decide(t), closes, closes, 0, bars, cost=COST)

    agents = {name: follow(targets.__getitem__, every) for name, every in (("daily", 288), ("hourly<b>", 12))}
    rule = follow(lambda t: portfolio_env.trend_to_cash(closes[max(t - 288, 0) : t + 1]), 288)
    content = {
        "run": "demo", "market": "synthetic:seed=0", "split": "test", "symbols": SYMBOLS, "cost": COST,
        "times": START + 300_000 * np.arange(bars), "fill": "close", "agents": agents,
        "others": {f"momentum {k}": rule for k in range(curves - 2)},
    }  # fmt: skip
    return Report(**content | changes)


@pytest.fixture(scope="module")
def report() -> Report:
    """With all that a page can hold, and names that would break it if they were not escaped."""
    plain = make_report(12.5)
    log = pd.DataFrame({"step": [1, 2, 3], "reward": [0.1, np.nan, 0.2], "approx_kl": [0.1, 0.2, np.nan]})
    rising = np.exp(np.cumsum(np.tile([0.02, -0.01], 1801)))[:, None].repeat(3, axis=1)  # without a fall
    rising = backtest(lambda t, seen: np.eye(4)[1], rising, rising, 0, 3600, cost=0.001)
    runs = [
        RunResult(
            name=f"{name}/seed-{seed}", combination=name, seed=seed, hold_bars=12, validation=5.0,
            abstains=False, result=plain.agents["daily"], rungs=[1.0 + seed],
        )
        for name in ("HOLD=4", "H=<b>") for seed in (0, 3)
    ]  # fmt: skip
    runs.append(RunResult("H=9/seed-0", "H=9", 0, -np.inf, rungs=[-np.inf]))  # it has ended with an error
    return replace(
        plain, run="demo<b>", market="synthetic:<b>", relation="out of <b>sample", data="ab12", hold_bars=12,
        others={**plain.others, "rising<b>": rising}, constants={"HOLD<b>": "<b>"}, curves={"online<b>": log},
        reconstruction={"train<b>": {"m<b>se": 0.5}}, trial_sharpes=[-0.02, 0.0, 0.01], runs=runs,
        ensembles={"H=<b>": plain.agents["hourly<b>"]}, best="H=<b>",
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(report, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    portfolio_env.publish(folder, report)
    return folder


@pytest.fixture(scope="module")
def content(folder) -> dict:
    return json.loads((folder / "metrics.json").read_text())


def page_in(folder: Path) -> str:
    """The page without its scripts, which no name that is written into it can end."""
    page = (folder / "report.html").read_text(encoding="utf-8")
    scripts = re.findall("<script.*?</script>", page, re.S)
    assert page.count("<script") == page.count("</script>") == len(scripts) == 3
    assert "<b>" not in scripts[2]  # the charts
    return re.sub("<script.*?</script>", "", page, flags=re.S)


@pytest.fixture(scope="module")
def page(folder) -> str:
    return page_in(folder)


def cells(page: str, name: str) -> list[str]:
    """The cells of the first row of the page that has this name."""
    row = re.search(rf"<tr>\s*<th>{re.escape(html.escape(name, quote=False))}</th>(.*?)</tr>", page, re.S)[1]
    return [html.unescape(cell) for cell in re.findall("<td>(.*?)</td>", row)]


def test_series_hold_what_each_one_did_at_each_decision(report, folder):
    series = getData.read_frame(folder / "series.parquet")
    results = {**report.agents, **report.others}
    assert series["name"].unique().tolist() == list(results)
    assets = ["cash", *SYMBOLS]
    for name, result in results.items():
        own = series[series["name"] == name]
        assert (own["time"].astype("datetime64[ms, UTC]").astype(np.int64) == report.times).all()
        np.testing.assert_array_equal(own["value"], result.value[1:])
        np.testing.assert_array_equal(own["benchmark"], result.benchmark[1:])
        np.testing.assert_array_equal(own["cost_paid"], result.cost_paid)
        np.testing.assert_array_equal(own["turnover"], result.turnover)
        before, after = (own[[f"{side}.{asset}" for asset in assets]] for side in ("before", "after"))
        np.testing.assert_allclose(before, result.before, atol=1e-7)
        np.testing.assert_allclose(after, result.weights, atol=1e-7)
        np.testing.assert_allclose(after.sum(axis=1), 1, atol=1e-6)
        # the next value from this row alone: the cost, then what the coins did until their next weights
        left = own["value"].shift(fill_value=1.0) * (1 - own["cost_paid"])
        cash = (after["after.cash"] / before["before.cash"].shift(-1))[:-1]
        some = after["after.cash"][:-1] > 1e-3
        np.testing.assert_allclose((own["value"] / left)[:-1][some], cash[some], rtol=1e-3)
    assert getData.read_footer(folder / "series.parquet")["market"] == report.market


def test_trades_add_up_to_costs_and_turnover(report, folder):
    trades = pd.read_csv(folder / "trades.csv", parse_dates=["time"])
    for name, result in report.agents.items():
        own = trades[trades["name"] == name]
        assert own["cost"].sum() == pytest.approx((result.value[:-1] * result.cost_paid).sum(), rel=1e-9)
        spent = own["amount"] + own["cost"].where(own["side"] == "buy", 0.0)
        assert spent.sum() == pytest.approx((result.value[:-1] * result.turnover).sum(), rel=1e-9)
    # the first trade of all, from cash alone: what is bought of each coin is its share of what is left
    daily = report.agents["daily"]
    first = trades[(trades["name"] == "daily") & (trades["time"] == pd.Timestamp(START, unit="ms", tz="UTC"))]
    np.testing.assert_allclose(first["amount"], (1 - daily.cost_paid[0]) * daily.weights[0, 1:])
    assert first["side"].tolist() == ["buy"] * 3
    assert first["coin"].tolist() == SYMBOLS
    np.testing.assert_allclose(first["cost"], first["amount"] * COST / (1 - COST))


def test_the_hash_is_of_bars_and_splits():
    footer = {"inputs": {"A": "1", "B": "2"}, "splits": {"train": [0, 1]}, "source": "x"}
    first = portfolio_env.data_sha256(footer)
    assert portfolio_env.data_sha256(footer | {"source": "y", "inputs": {"B": "2", "A": "1"}}) == first
    assert portfolio_env.data_sha256(footer | {"inputs": {"A": "1", "B": "3"}}) != first
    assert portfolio_env.data_sha256(footer | {"splits": {"train": [0, 2]}}) != first


def test_logs_that_are_missing_empty_or_partly_blank(tmp_path):
    assert portfolio_env.read_curves(tmp_path) == {}
    (tmp_path / "pretrain").mkdir()
    (tmp_path / "pretrain" / "metrics.csv").write_text("")
    (tmp_path / "metrics.csv").write_text("step,reward,validation_bp_day,unknown\n")
    assert portfolio_env.read_curves(tmp_path) == {}
    (tmp_path / "metrics.csv").write_text("step,reward,validation_bp_day,unknown\n1,0.1,,3\n2,0.2,5.0,3\n")
    ((name, log),) = portfolio_env.read_curves(tmp_path).items()
    assert (name, len(log)) == ("online, by batch", 2)
    (chart,) = portfolio_env.training_charts(log)
    lines = {part.name: part.data_source.data for part in chart.renderers}
    np.testing.assert_allclose(lines["reward"]["y"], [288e3, 576e3])  # bp per day
    np.testing.assert_allclose(lines["validation_bp_day"]["x"], [2])


def test_profits_of_coins_and_costs_add_up_to_the_profit(report):
    for result in report.agents.values():
        assert portfolio_env.profit_per_coin(result).sum() == pytest.approx(result.value[-1] - 1, rel=1e-9)
    # by hand: half in a coin that doubles, bought at 1 % cost, then sold
    closes = np.array([1.0, 2, 2, 2])[:, None]
    once = backtest(lambda t, seen: [[0.5, 0.5], [1, 0]][t] if t < 2 else None, closes, closes, 0, 2,
                    cost=0.01, fill="close")  # fmt: skip
    left = 1 / (0.5 + 0.5 / 0.99)
    np.testing.assert_allclose(portfolio_env.profit_per_coin(once), [left / 2, -(1 - left) - 0.01 * left])


def test_rolling_growth_and_turnover_by_second_formula(report):
    result, looks = report.agents["hourly<b>"], {"hourly<b>": {"color": "red"}}
    chart, turnover, _ = portfolio_env.trading_charts(report, looks)
    last_day = turnover.renderers[0].data_source.data["y"][-1]
    assert last_day == pytest.approx(result.turnover[-288:].sum(), rel=1e-5)
    data = chart.renderers[0].data_source.data
    bars = 900  # a quarter of 12.5 days
    for time, growth in zip(data["x"][[0, 7, -1]], data["y"][[0, 7, -1]], strict=True):
        last = int((time - START) / 300_000) + 1  # the value after that decision
        over = np.log(result.value / result.benchmark)
        assert growth == pytest.approx(288e4 * (over[last] - over[last - bars]) / bars, rel=1e-5)
    assert data["x"][0] == report.times[bars - 1]


def test_thinned_curves_keep_their_extremes():
    value = np.cumsum(np.random.default_rng(0).normal(size=30_000))
    at = portfolio_env.thinned(value, 600)
    assert len(at) <= 1_202
    assert {0, len(value) - 1, int(value.argmin()), int(value.argmax())} <= set(at.tolist())
    pixels = value.reshape(600, 50)
    rest = pd.Series(value[at]).groupby(at // 50)
    np.testing.assert_array_equal(rest.max(), pixels.max(1))
    np.testing.assert_array_equal(rest.min(), pixels.min(1))
    assert portfolio_env.thinned(value[:3], 600).tolist() == [0, 1, 2]


def test_names_are_escaped_and_the_headline_comes_first(page):
    assert "<b>" not in page
    for name in ("demo", "synthetic:", "out of ", "HOLD", "rising", "hourly", "online", "train", "H=", "B"):
        assert f"{name}&lt;b&gt;" in page
    # the verdict, the value curve and the headline table come first
    body = page.partition("<body>")[2]
    verdict, figure, table = (body.index(mark) for mark in ("<p>daily: ", "<figure", "<table"))
    assert verdict < figure < table
    headline = body[table : body.index("</table>", table)]
    assert all(text in headline for text in ("Sharpe", "<th>daily</th>", "<th>benchmark</th>"))
    assert cells(page, "data") == ["SHA-256 ab12"]
    assert cells(page, "HOLD<b>") == ["<b>"]


def test_most_statistics_and_all_explanations_are_folded(report, page, content):
    """At most ten lines stand open beside the headline and their heading, and no number is lost."""
    section = page.partition("<h2>How sure")[2].partition("<h2>")[0]
    unfolded = re.sub("<details>.*?</details>", "", section, flags=re.S)
    assert 1 < unfolded.count("<tr") <= 11
    skill = content["skill"]["daily"]
    one = portfolio_env.skill(report.agents["daily"], [0.01])
    assert one["deflated_sharpe"] == one["probabilistic_sharpe"] == skill["probabilistic_sharpe"]
    assert skill["deflated_sharpe"] < one["deflated_sharpe"]  # there are more trials
    assert (one["trials"], skill["trials"]) == (1, 3)
    interval = f"{skill['excess_low_bp_day']:+.1f} to {skill['excess_high_bp_day']:+.1f}"
    for text in (interval, f"{skill['deflated_sharpe']:.1%}"):
        assert f"<td>{text}</td>" in unfolded


def test_a_ratio_that_says_nothing_is_capped_on_the_page_alone(page, content):
    numbers = content["test"]["rising<b>"]
    assert numbers["calmar"] > 1e9
    columns = list(portfolio_env._COLUMNS)
    assert cells(page, "rising<b>")[columns.index("Calmar")] == "> 1,000"
    for calmar, text in ((-2e9, "< -1,000"), (999.0, "+999"), (0.5, "+0.5")):
        changed = {"calmar": calmar, "growth_bp_day": 4062.8, "total_return": calmar}
        table = portfolio_env.results_table({"agent": numbers | changed})
        assert table.loc["agent", ["Calmar", "log bp/day"]].tolist() == [text, "+4062.8"]
    assert table.loc["agent", "total return"] == "+50.0%"


def test_runs_are_seeds_of_combinations_and_their_ensembles_or_one(report, page, content):
    names = ["HOLD=4 seed 0", "HOLD=4 seed 3", "H=<b> seed 0", "H=<b> seed 3", "H=<b> ensemble"]
    *rest, out = content["runs"].values()  # one that a search gave up
    assert list(content["runs"]) == [*names, "H=9 seed 0"]
    assert [row["rungs"] for row in rest] == [[1.0], [4.0], [1.0], [4.0], [2.5]]  # of an ensemble the means
    assert (out["rungs"], out["validation_bp_day"], out["growth"]) == ([None], None, None)
    assert content["runs"]["H=<b> ensemble"]["growth"] == content["test"]["hourly<b>"]["growth"]
    assert content["runs"]["H=<b> seed 3"]["growth"] == content["test"]["daily"]["growth"]
    assert content["chosen by validation"] == "H=<b>, of 3 combinations"
    assert "validation" not in content
    assert cells(page, "H=<b> median of 2 seeds")[1:3] == ["+5.0", cells(page, "H=<b> seed 3")[2]]
    assert cells(page, "H=<b> ensemble")[0] == "+2.5"

    one = replace(report.runs[2], combination="")
    folds = [replace(one, validation=0.0), replace(one, validation=4.0)]
    (row,) = portfolio_env.run_figures(replace(report, runs=folds, ensembles={}, best="")).values()
    assert row["validation_bp_day"] == 2.0
    # one run: what was tried, and whether it abstains
    heading = make_report(2, hold_bars=12, probes={"12": 1.0, "48": -math.inf}, abstains=True).heading()
    assert "12 bars +1.0, 48 bars diverged" in heading["decides every"]
    assert heading["validation"] == portfolio_env.ABSTAINS
    assert "decides every" not in make_report(2, split="paper", agent="demo").heading()


def test_a_number_that_does_not_exist_is_a_dash_and_null(tmp_path):
    """Three days are too few for an interval. Nor are there logs, baselines or reconstruction."""
    content = portfolio_env.publish(tmp_path, make_report(3, curves=2))
    assert math.isnan(content["skill"]["daily"]["excess_low_bp_day"])
    text = (tmp_path / "metrics.json").read_text()
    assert "NaN" not in text
    assert json.loads(text)["skill"]["daily"]["excess_low_bp_day"] is None
    page = page_in(tmp_path)
    assert "<td>– to –</td>" in page
    assert "Nothing can be said about skill." in page
    assert "nan" not in page.lower().partition("<body>")[2]
    for absent in ("Training", "Reconstruction", "Constants", "All runs"):
        assert f">{absent}" not in page


def span(excess: float, low: float, high: float) -> dict[str, float]:
    return {"excess_bp_day": excess, "excess_low_bp_day": low, "excess_high_bp_day": high}


def test_the_verdict_says_what_the_figures_show():
    numbers = {"total_return": 0.05, "growth_bp_day": 9.76, "days": 50.0}
    table = {"agent": numbers, "benchmark": {"total_return": -0.03, "growth_bp_day": -6.09}}
    whole = (
        "agent: No skill shown: the interval over the benchmark includes zero. The baseline momentum did "
        "better. In 50.0 days it made +5.0% (+9.8 bp per day), the benchmark -3.0% (-6.1 bp per day), cash "
        "0%. Log growth in bp per day (95 % interval): +4.0 over the benchmark (+0.0 to +9.0), +9.8 over "
        "cash (-8.0 to +30.0), -3.0 over momentum (-9.0 to +3.0), looking back the best baseline. These "
        "50.0 days could have told 5.6 bp per day over the benchmark from chance in 80 % of cases; its own "
        "would take 98 days."  # 50 x (5.6 / 4.0)^2
    )
    for low, high, deflated, cash, expected, absent in (
        (0.0, 9.0, 0.97, 9.8, whole, "above zero"),
        (2.0, 9.0, 0.99, 9.8, "lies above zero", "leaves room for luck"),
        (2.0, 9.0, 0.60, 9.8, "(60.0%, 5 trials) leaves room for luck", "o skill"),
        (2.0, 9.0, math.nan, 9.8, "(–, 5 trials) leaves room for luck", "o skill"),
        (-9.0, -1.0, 0.0, 9.8, "lies below zero", "o skill shown"),
        (2.0, 9.0, 0.99, -1.0, "It lost money, so cash did better", "o skill"),
        (math.nan, math.nan, 0.99, 9.8, "it made +5.0%, the benchmark -3.0%, cash 0%.", "bp per day"),
    ):  # fmt: skip
        skill = span(4.0, low, high) | {"deflated_sharpe": deflated, "trials": 5, "detectable_bp_day": 5.6}
        skill["over"] = {"cash": span(cash, -8.0, 30.0), "momentum": span(-3.0, -9.0, 3.0)}
        text = portfolio_env.verdict("agent", table, skill, "out of sample")
        assert expected in text
        assert absent not in text
        for first, last, start in (  # trained or chosen on these: no skill, whatever else
            (9, 9, "IN SAMPLE"), (5, 45, "IN SAMPLE"), (20, 45, "chosen on"), (30, 45, "out of sample"),
            (12, 18, "between training and"), (-9, -1, "before the training"),
        ):  # fmt: skip
            relation = portfolio_env.relation_to_training(SPLITS, "okx", "recorded:/bars", first, last)
            assert relation.startswith(start)
            text = portfolio_env.verdict("agent", table, skill, relation)
            inside = start in ("IN SAMPLE", "chosen on")
            assert inside == ("this says nothing about skill" in text)
            assert not (inside and any(claim in text for claim in ("lies above zero", "from chance")))


def test_growth_over_benchmark_cash_and_the_best_baseline(report, content):
    """That of the account that ended highest, cash and hindsight apart; the interval of the differences."""
    skill, daily = content["skill"]["daily"], report.agents["daily"]
    assert list(skill["over"]) == ["cash", "rising<b>"]
    accounts = {"cash": np.ones_like(daily.value), "rising<b>": report.others["rising<b>"].value}
    for name, value in accounts.items():
        returns = np.diff(np.log(daily.value)) - np.diff(np.log(value))
        ends = portfolio_env.bootstrap_interval(returns, portfolio_env.block_length(returns))
        numbers = skill["over"][name]
        assert numbers["excess_bp_day"] == pytest.approx(288e4 * returns.mean())
        actual = [numbers[f"excess_{end}_bp_day"] for end in ("low", "high")]
        np.testing.assert_allclose(actual, 288e4 * np.array(ends), rtol=1e-9)
    assert skill["over"]["cash"]["excess_bp_day"] == pytest.approx(content["test"]["daily"]["growth_bp_day"])


def test_the_edge_that_days_tell_from_chance(monkeypatch):
    """Independent returns: 2.80 deviations / sqrt(N), as much wider as the interval of 100 blocks is (1.7 %).
    An edge of that size has its interval above zero in 80 % of 100 cases, to two and a half deviations of it.
    """
    fewer = partial(portfolio_env.bootstrap_interval, resamples=150)
    monkeypatch.setattr(portfolio_env, "bootstrap_interval", fewer)
    rng = np.random.default_rng(0)

    def figures(returns: np.ndarray) -> dict[str, float]:
        value, nothing = np.exp(np.append(0.0, np.cumsum(returns))), np.zeros(len(returns))
        return portfolio_env.excess_figures(
            Backtest(nothing, nothing, value, np.ones(len(value)), *[nothing] * 5)
        )

    edges = [figures(rng.normal(0, 0.001, 300 * 288))["detectable_bp_day"] for _ in range(4)]
    assert np.mean(edges) == pytest.approx(2.80 * 10 * 288 / (300 * 288) ** 0.5 * 1.017, rel=0.1)
    edge, found = figures(rng.normal(0, 0.001, 60 * 288))["detectable_bp_day"], 0
    expected = 2.80 * 10 * 288 / (60 * 288) ** 0.5 * 1.09  # of 20 blocks
    assert edge == pytest.approx(expected, rel=0.25)
    for _ in range(100):
        found += figures(rng.normal(expected / 288e4, 0.001, 60 * 288))["excess_low_bp_day"] > 0
    assert 70 <= found <= 90


def test_what_the_days_could_have_told_is_said_of_what_was_learnt(tmp_path):
    """Of an agent and of the best baseline alone, but not of equal weights."""
    plain = make_report(12.5)
    for changes, count in (({}, 2), ({"abstains": True}, 1), ({"agents": {}}, 1)):
        content = portfolio_env.publish(tmp_path, replace(plain, **changes))
        page = page_in(tmp_path)
        assert page.count("These 12.5 days could have told") == count
        edges = [skill["detectable_bp_day"] for skill in content["skill"].values()]
        assert [math.isnan(edge) for edge in edges] == [bool(changes), False][: len(edges)]
    best = content["best baseline"]
    assert best["name"] == "momentum 0"
    assert f"{best['excess_bp_day']:+.1f} bp per day" in page


def test_the_folds_of_a_walk_forward_are_parts_of_its_account():
    """Of the ensemble's, in the combination that is reported; their growth adds up to that of all."""
    plain = make_report(12.5)
    daily, hourly = plain.agents.values()
    starts = START, START + 4 * 86_400_000, START + 9 * 86_400_000
    runs = [
        RunResult(
            name=f"fold-{fold}/seed-{seed}", combination="", seed=seed, hold_bars=12, validation=float(fold),
            abstains=fold == 2, test_start=start, result=daily,
        )
        for fold, start in enumerate(starts, 1) for seed in (0, 3)
    ]  # fmt: skip
    figures = portfolio_env.run_figures(replace(plain, runs=runs, ensembles={"": hourly}))
    folds = [figures[name] for name in ("fold 1", "fold 2 (equal weights)", "fold 3")]
    assert [fold["days"] for fold in folds] == [4, 5, 3.5]
    assert [fold["validation_bp_day"] for fold in folds] == [1, 2, 3]
    for name in ("excess_bp_day", "growth_bp_day", "turnover_day"):
        total = sum(fold["days"] * fold[name] for fold in folds)
        assert total == pytest.approx(12.5 * figures["ensemble"][name])
    assert list(portfolio_env.run_figures(replace(plain, runs=runs[:2], ensembles={"": hourly}))) == [
        "seed 0", "seed 3", "ensemble",
    ]  # fmt: skip
    assert "fold 3" in portfolio_env.runs_table(figures).index


def browse(page: Path, *flags: str) -> str:
    """What chromium prints for a page."""
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=20000"]
    command += [f"--user-data-dir={page.parent / 'profile'}", *flags, page.as_uri()]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=240).stdout


needs_browser = pytest.mark.skipif(BROWSER is None, reason="no chromium here")


@needs_browser
@pytest.mark.parametrize("width", [400, 1280])
def test_charts_are_drawn_and_nothing_is_wider_than_the_window(folder, width):
    """A click in the legend of the value chart switches a curve off there and in the drawdown."""
    ranges = [[0.4, 12], [0.97, 1.06], [0.0005, 2e4], [0.9, 1.9]]
    script = """
        <script>addEventListener("load", () => setTimeout(() => {
        const models = [...Bokeh.documents[0].all_models]
        const result = {page: document.documentElement.scrollWidth, window: innerWidth, canvases: 0}
        const items = []
        const walk = (node) => node.querySelectorAll("*").forEach((part) => {
          if (part.classList.contains("bk-item")) items.push(part)
          if (part.tagName == "CANVAS" && part.width > 200) result.canvases += 1
          if (part.shadowRoot) walk(part.shadowRoot)
        })
        walk(document)
        result.plots = models.filter((model) => model.type == "Figure").length
        const figures = [...document.querySelectorAll("figure")].map((part) => part.getBoundingClientRect())
        result.figures = figures.map(({width, height}) => [width, height])
        const tables = [...document.querySelectorAll("div.table")]
        result.tables = tables.map((table) => table.clientWidth)
        result.scrolled = tables.filter((table) => table.scrollWidth > table.clientWidth).length
        const pictures = tables.map((table) => getComputedStyle(table).backgroundImage)
        result.shadows = pictures.filter((picture) => picture.includes("gradient")).length
        const parts = performance.getEntriesByType("resource")
        result.loaded = parts.filter((part) => !part.name.startsWith("data:"))
        result.names = items.slice(0, 5).map((item) => item.textContent)
        items[1].dispatchEvent(new PointerEvent("pointerdown"))
        const lines = models.filter((model) => model.type == "GlyphRenderer" && !model.visible)
        result.hidden = lines.map((line) => line.name)
        const ticker = models.find((model) => model.type == "CustomJSTicker")
        result.ticks = %s.map(([low, high]) => ticker.get_ticks(low, high, null, 0).major)
        parent.postMessage(JSON.stringify(result), "*")
        }, 3000))</script></body>
    """
    page = (folder / "report.html").read_text().replace("</body>", script % ranges)
    (folder / "inner.html").write_text(page)
    outer = folder / "outer.html"
    outer.write_text(
        "<script>onmessage = (event) => { document.title = event.data }</script>"
        f"<iframe src='inner.html' width='{width}' height='900'></iframe>"
    )
    dom = browse(outer, "--window-size=1500,1000", "--dump-dom")
    result = json.loads(html.unescape(re.search("<title>(.*?)</title>", dom, re.S)[1]))
    assert result["page"] <= result["window"] == width
    assert result["plots"] == 3 + 3 * 2 + 1  # trading; value, weights, curves; profits
    assert result["canvases"] >= result["plots"]
    assert len(result["figures"]) == 1 + 1 + 2 + 1 + 1
    for chart, _ in result["figures"]:
        assert 0.9 * min(width - 30, 1060) < chart <= width
    assert result["figures"][0][1] > 500
    assert max(result["tables"]) <= width
    assert (result["scrolled"] > 0) == (width == 400)
    assert result["shadows"] == len(result["tables"])  # where a table goes on
    assert result["loaded"] == []
    names = [name.rpartition(" ")[0] for name in result["names"]]
    assert names == ["daily", "hourly<b>", "benchmark", "rising<b>", "momentum 0"]
    assert result["hidden"] == [result["names"][1]] * 2
    wide = 10.0 ** np.arange(-3, 5)
    expected = [[0.5, 1, 2, 5, 10], [0.98, 1, 1.02, 1.04, 1.06], wide, [1, 1.2, 1.4, 1.6, 1.8]]
    for ticks, marks in zip(result["ticks"], expected, strict=True):
        np.testing.assert_allclose(ticks, marks)


def test_agents_and_benchmark_are_named_at_the_ends_of_their_curves(report):
    """From the lowest on, never on each other; baselines are fainter than they."""
    accounts = report.agents | report.others | {"benchmark": report.agents["daily"]}
    chart = portfolio_env.make_charts(report, accounts)["value"][0]
    (axis,) = chart.right
    names = dict(sorted(axis.major_label_overrides.items()))
    ends = {name: result.value[-1] for name, result in report.agents.items()}
    ends["benchmark"] = ends["daily"]  # two that would collide
    assert set(names.values()) == set(ends)
    places = np.array(list(names))
    assert (places >= [ends[name] * (1 - 1e-9) for name in names.values()]).all()
    assert np.diff(np.log(places)).min() > 0.05 * np.log(report.others["rising<b>"].value[-1])
    alpha = {line.name.rpartition(" ")[0]: line.glyph.line_alpha for line in chart.renderers}
    assert alpha["daily"] == alpha["benchmark"] == 1 > alpha["rising<b>"]


def test_the_page_stays_small(tmp_path):
    """A dozen curves of a hundred days, and the logs of two phases of three seeds."""
    rng = np.random.default_rng(0)
    names = [name for columns in portfolio_env._PANELS.values() for name in columns]
    log = pd.DataFrame({name: rng.normal(size=400).cumsum() for name in names}).assign(step=np.arange(400))
    logs = {f"seed {seed}, {phase}": log for seed in range(3) for phase in ("pretraining", "online")}
    portfolio_env.publish(tmp_path, replace(make_report(100, curves=12), curves=logs))
    assert (tmp_path / "report.html").stat().st_size < 3_000_000


@needs_browser
@pytest.mark.parametrize("width", [400, 1280])
def test_charts_fit_a_sheet_and_headings_stay_with_what_is_below(folder, width):
    pymupdf = pytest.importorskip("pymupdf")
    sheet = folder / f"{width}.pdf"
    flags = (f"--print-to-pdf={sheet}", "--no-pdf-header-footer", f"--window-size={width},900")
    browse(folder / "report.html", *flags)
    with pymupdf.open(sheet) as document:
        texts = [page.get_text() for page in document]
        pictures = [
            (pymupdf.Rect(image["bbox"]), page.rect) for page in document for image in page.get_image_info()
        ]
    charts = [(box, sheet) for box, sheet in pictures if box.width > 100]
    assert len(charts) >= 10
    for box, page in charts:
        assert page.x0 <= box.x0 < box.x1 <= page.x1
        assert page.y0 <= box.y0 < box.y1 <= page.y1
    assert max(box.width for box, _ in charts) > 0.8 * charts[0][1].width
    for heading, below in (("Results", "Sharpe"),
                           ("What was run", "SHA-256")):  # fmt: skip
        (text,) = [text for text in texts if f"{heading}\n" in text]
        assert below in text.partition(f"{heading}\n")[2]
