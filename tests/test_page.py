"""The page in a browser, and every number as a file: series.parquet and trades.csv beside it."""

import html
import json
import re
import shutil
import subprocess
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import getData
import portfolio_env
from portfolio_env import Backtest, Report, backtest

COST = 0.004
DAY, HOUR = 86_400_000, 3_600_000
START = 1_700_006_400_000  # midnight, UTC
SYMBOLS = ["AAA", "BBB", "CCC"]
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def make_report(days: float, curves: int = 2, **changes) -> Report:
    """Two agents, which trade every day and every hour, and momentum rules, from midnight on."""
    rng = np.random.default_rng(0)
    bars = int(288 * days)
    closes = np.exp(np.cumsum(rng.normal(0, 0.002, (bars + 2, 3)), axis=0))
    targets = rng.dirichlet(np.ones(4), bars)
    momentum = portfolio_env.time_series_momentum(closes, 288)

    def follow(decide: Callable[[int], np.ndarray], every: int) -> Backtest:
        return backtest(lambda t, seen: None if t % every else decide(t), closes, closes, 0, bars, cost=COST)

    agents = {name: follow(targets.__getitem__, every) for name, every in (("daily", 288), ("hourly", 12))}
    rule = follow(momentum, 288)
    content = {
        "run": "demo", "market": "synthetic:seed=0", "split": "test", "symbols": SYMBOLS, "cost": COST,
        "times": START + 300_000 * np.arange(bars), "fill": "close", "agents": agents,
        "others": {f"momentum {k}": rule for k in range(curves - 2)},
    }  # fmt: skip
    return Report(**content | changes)


@pytest.fixture(scope="module")
def report() -> Report:
    return make_report(12.5, curves=3)


@pytest.fixture(scope="module")
def folder(report, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    portfolio_env.write_report(folder, report)
    return folder


# --- files --------------------------------------------------------------------------------------------------


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
        np.testing.assert_allclose(before, result.held, atol=1e-7)
        np.testing.assert_allclose(after, result.weights, atol=1e-7)
        np.testing.assert_allclose(after.sum(axis=1), 1, atol=1e-6)
        # the next value from this row alone: the cost, then what the coins did until their next weights
        kept = own["value"].shift(fill_value=1.0) * (1 - own["cost_paid"])
        cash = (after["after.cash"] / before["before.cash"].shift(-1))[:-1]
        held = after["after.cash"][:-1] > 1e-3
        np.testing.assert_allclose((own["value"] / kept)[:-1][held], cash[held], rtol=1e-3)
    assert getData.read_footer(folder / "series.parquet")["market"] == "synthetic:seed=0"


def test_trades_add_up_to_costs_and_turnover(report, folder):
    trades = pd.read_csv(folder / "trades.csv", parse_dates=["time"])
    for name, result in {**report.agents, **report.others}.items():
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


@pytest.fixture
def daily(folder) -> pd.DataFrame:
    """The returns of days of the headline and its benchmark, as the README reads them."""
    series = pd.read_parquet(folder / "series.parquet").set_index("time").tz_localize(None)
    agent = series[series["name"] == series["name"].iloc[0]]
    return agent[["value", "benchmark"]].resample("1D").last().pct_change().dropna()


def test_the_series_holds_the_daily_returns_of_the_headline(report, daily):
    value = report.agents["daily"].value
    ends = np.append(value[288::288], value[-1])  # of each day, and of the half one at the end
    np.testing.assert_allclose(daily["value"], ends[1:] / ends[:-1] - 1)


def test_quantstats_reads_the_series_as_the_readme_says(report, folder, daily):
    quantstats = pytest.importorskip("quantstats")
    value = report.agents["daily"].value
    assert quantstats.stats.comp(daily["value"]) == pytest.approx(value[-1] / value[288] - 1)
    expected = (
        pd.Series(value[288::288]).pct_change().dropna()
    )  # from the end of each day to that of the next
    ratio = expected.mean() / expected.std() * np.sqrt(365)
    assert quantstats.stats.sharpe(daily["value"][:-1], periods=365) == pytest.approx(ratio)
    sheet = folder / "tearsheet.html"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own
        quantstats.reports.html(daily["value"], daily["benchmark"], periods_per_year=365, output=str(sheet))
    assert f"{quantstats.stats.max_drawdown(daily['value']):.2%}" in sheet.read_text()


# --- the numbers on the page --------------------------------------------------------------------------------


def test_worst_drawdowns_by_hand():
    value = np.array([1, 1.2, 0.9, 1.2, 1.5, 1.35, 1.2, 1.6, 1.5, 1.52])
    falls = portfolio_env.worst_drawdowns(value, DAY * np.arange(10))
    np.testing.assert_allclose(falls["depth"], [0.25, 0.2, 0.0625])
    np.testing.assert_array_equal(falls["from"] / DAY, [1, 4, 7])
    np.testing.assert_array_equal(falls["lowest"] / DAY, [2, 6, 8])
    np.testing.assert_array_equal(falls["recovered"] / DAY, [3, 7, np.nan])
    assert len(portfolio_env.worst_drawdowns(value, DAY * np.arange(10), count=2)) == 2
    assert portfolio_env.worst_drawdowns(np.ones(5), np.arange(5)).empty


def test_the_worst_drawdown_is_the_metric(report):
    for result in report.agents.values():
        falls = portfolio_env.worst_drawdowns(result.value, np.arange(len(result.value)))
        assert falls["depth"][0] == pytest.approx(portfolio_env.metrics(result)["max_drawdown"])
        assert falls["depth"].is_monotonic_decreasing


def test_profits_of_coins_and_costs_add_up_to_the_profit(report):
    for result in report.agents.values():
        assert portfolio_env.profit_per_coin(result).sum() == pytest.approx(result.value[-1] - 1, rel=1e-9)
    # by hand: half in a coin that doubles, bought at 1 % cost, then sold
    closes = np.array([1.0, 2, 2, 2])[:, None]
    held = backtest(lambda t, seen: [[0.5, 0.5], [1, 0]][t] if t < 2 else None, closes, closes, 0, 2,
                    cost=0.01, fill="close")  # fmt: skip
    kept = 1 / (0.5 + 0.5 / 0.99)
    np.testing.assert_allclose(portfolio_env.profit_per_coin(held), [kept / 2, -(1 - kept) - 0.01 * kept])


def test_daily_returns_are_of_whole_days():
    """From 12:00 on: half a day, two whole days, a quarter of one."""
    times = START + 12 * HOUR + 300_000 * np.arange(144 + 2 * 288 + 72)
    value = np.append(1.0, np.exp(np.cumsum(np.repeat([0.1, 0.2, -0.3, 0.4], [144, 288, 288, 72]))))
    returns = portfolio_env.daily_returns(value, times)
    np.testing.assert_allclose(returns, np.expm1([288 * 0.2, -288 * 0.3]))
    assert returns.index.astype("datetime64[ms]").astype(np.int64).tolist() == [START + DAY, START + 2 * DAY]


def test_turnover_of_a_part_of_a_day_is_not_that_of_a_whole_one():
    times = START + 12 * HOUR + 300_000 * np.arange(144 + 288 + 72)
    edges, rate = portfolio_env.daily_turnover(np.repeat([0.01, 0.02, 0.03], [144, 288, 72]), times)
    np.testing.assert_allclose(rate, [2.88, 5.76, 8.64])  # 288 x per bar: as if all went on for a day
    hours = (edges.astype(np.int64) - START) / HOUR
    assert hours.tolist() == [12, 24, 48, 54]


def test_rolling_figures_by_second_formula(report):
    result = report.agents["hourly"]
    growth, sharpe = portfolio_env.rolling_excess(result, 288)
    returns = portfolio_env.excess_returns(result)
    for bar in (287, 1000, len(returns) - 1):
        last = returns[bar - 287 : bar + 1]
        assert growth[bar] == pytest.approx(1e4 * last.sum())
        assert sharpe[bar] == pytest.approx(last.mean() / last.std(ddof=1) * np.sqrt(105_120))
    assert np.isnan(growth[:287]).all()
    flat = backtest(lambda t, seen: None, np.ones((602, 1)), np.ones((602, 1)), 0, 600, cost=0.0)
    assert np.isnan(portfolio_env.rolling_excess(flat, 288)[1]).all()  # no ratio, rather than 0


def test_thinned_curves_keep_their_extremes():
    value = np.cumsum(np.random.default_rng(0).normal(size=30_000))
    at = portfolio_env.thinned(value, 600)
    assert len(at) <= 1_202
    assert {0, len(value) - 1, int(value.argmin()), int(value.argmax())} <= set(at.tolist())
    columns = value.reshape(600, 50)  # a pixel's
    kept = pd.Series(value[at]).groupby(at // 50)
    np.testing.assert_array_equal(kept.max(), columns.max(1))
    np.testing.assert_array_equal(kept.min(), columns.min(1))
    assert portfolio_env.thinned(value[:3], 600).tolist() == [0, 1, 2]


def test_the_hash_is_of_bars_and_splits():
    footer = {"inputs": {"A": "1", "B": "2"}, "splits": {"train": [0, 1]}, "source": "x"}
    known = portfolio_env.data_sha256(footer)
    assert portfolio_env.data_sha256(footer | {"source": "y", "inputs": {"B": "2", "A": "1"}}) == known
    assert portfolio_env.data_sha256(footer | {"inputs": {"A": "1", "B": "3"}}) != known
    assert portfolio_env.data_sha256(footer | {"splits": {"train": [0, 2]}}) != known


def test_changed_constants_and_the_hash_are_on_the_page(tmp_path):
    content = portfolio_env.write_report(tmp_path, make_report(2, constants={"HOLD": 12}, data="ab12"))
    page = (tmp_path / "report.html").read_text()
    assert re.search("Constants that differ.*<td>HOLD</td><td>12</td>", page, re.S)
    assert "<td>SHA-256 ab12</td>" in page
    assert content["constants"] == {"HOLD": "12"}
    portfolio_env.write_report(tmp_path, make_report(2))
    assert "Constants that differ" not in (tmp_path / "report.html").read_text()


def test_months_are_a_heat_map():
    assert portfolio_env.shade(0.3) == portfolio_env.shade(5.0) == "rgba(46, 160, 67, 0.60)"
    assert portfolio_env.shade(-0.075) == "rgba(218, 54, 51, 0.30)"  # a quarter: half as strong
    assert portfolio_env.shade(np.nan) == "transparent"


# --- in a browser -------------------------------------------------------------------------------------------


def browse(page: Path, *flags: str) -> str:
    """What chromium prints for a page."""
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=20000"]
    command += [f"--user-data-dir={page.parent / 'profile'}", *flags, page.as_uri()]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=240).stdout


def measured(folder: Path, width: int, script: str) -> dict:
    """The value of a script's `found` after the page was drawn in a frame of this width."""
    code = (
        "<script>addEventListener('load', () => setTimeout(() => { const found = {}; "
        f"{script}; parent.postMessage(JSON.stringify(found), '*') }}, 3000))</script></body>"
    )
    (folder / "inner.html").write_text((folder / "report.html").read_text().replace("</body>", code))
    outer = folder / "outer.html"
    outer.write_text(
        "<script>onmessage = (told) => { document.title = told.data }</script>"
        f"<iframe src='inner.html' width='{width}' height='900'></iframe>"
    )
    dom = browse(outer, "--window-size=1500,1000", "--dump-dom")
    return json.loads(html.unescape(re.search("<title>(.*?)</title>", dom, re.S)[1]))


needs_browser = pytest.mark.skipif(BROWSER is None, reason="no chromium here")


@needs_browser
@pytest.mark.parametrize("width", [400, 1280])
def test_the_chart_is_drawn_and_nothing_is_wider_than_the_window(folder, width):
    found = measured(folder, width, """
        const root = document.documentElement, models = [...Bokeh.documents[0].all_models]
        found.page = root.scrollWidth
        found.window = innerWidth
        found.plots = models.filter((model) => model.type == "Figure").length
        found.lines = models.filter((model) => model.type == "GlyphRenderer").length
        found.policy = models.find((model) => model.type == "Legend").click_policy
        const {width, height} = document.getElementById("chart").getBoundingClientRect()
        found.chart = [width, height]
        found.tables = [...document.querySelectorAll("div.table")].map((table) => table.clientWidth)
        const parts = performance.getEntriesByType("resource")
        found.loaded = parts.filter((part) => !part.name.startsWith("data:"))
    """)  # fmt: skip
    assert found["page"] <= found["window"] == width
    assert found["plots"] == 2
    assert found["lines"] == 2 * 4  # two agents, the benchmark and a rule: value and drawdown
    assert 0.9 * min(width - 30, 1060) < found["chart"][0] <= width
    assert found["chart"][1] > 500
    assert found["policy"] == "hide"
    assert max(found["tables"]) <= width
    assert found["loaded"] == []


@needs_browser
def test_the_legend_switches_a_curve_off_in_both_panels(folder):
    found = measured(folder, 800, """
        const items = []
        const walk = (node) => node.querySelectorAll("*").forEach((part) => {
          if (part.classList.contains("bk-item")) items.push(part)
          if (part.shadowRoot) walk(part.shadowRoot)
        })
        walk(document)
        found.names = items.map((item) => item.textContent)
        items[1].dispatchEvent(new PointerEvent("pointerdown"))
        const lines = [...Bokeh.documents[0].all_models].filter((model) => model.type == "GlyphRenderer")
        found.hidden = lines.filter((line) => !line.visible).map((line) => [line.name, line.glyph.y.field])
    """)  # fmt: skip
    assert [name.rpartition(" ")[0] for name in found["names"]] == [
        "daily",
        "hourly",
        "benchmark",
        "momentum 0",
    ]
    assert sorted(found["hidden"]) == [["hourly", "drawdown"], ["hourly", "value"]]


@needs_browser
def test_the_log_axis_has_ticks_where_the_curves_are(folder):
    ranges = [[0.4, 12], [0.97, 1.06], [0.0005, 2e4], [0.9, 1.9]]
    found = measured(folder, 800, f"""
        const ticker = [...Bokeh.documents[0].all_models].find((model) => model.type == "CustomJSTicker")
        found.ticks = {ranges}.map(([low, high]) => ticker.get_ticks(low, high, null, 0).major)
    """)["ticks"]  # fmt: skip
    np.testing.assert_allclose(found[0], [0.5, 1, 2, 5, 10])
    np.testing.assert_allclose(found[1], [0.98, 1, 1.02, 1.04, 1.06])
    np.testing.assert_allclose(found[2], 10.0 ** np.arange(-3, 5))
    np.testing.assert_allclose(found[3], [1, 1.2, 1.4, 1.6, 1.8])


def test_the_page_stays_small(tmp_path):
    """A dozen curves of a hundred days, and the logs of two phases of three seeds."""
    rng = np.random.default_rng(0)
    names = [name for columns in portfolio_env._PANELS.values() for name in columns]
    log = pd.DataFrame({name: rng.normal(size=400).cumsum() for name in names}).assign(step=np.arange(400))
    logs = {f"seed {seed}, {phase}": log for seed in range(3) for phase in ("pretraining", "online")}
    portfolio_env.write_report(tmp_path, replace(make_report(100, curves=12), curves=logs))
    assert (tmp_path / "report.html").stat().st_size < 3_000_000


@needs_browser
def test_in_print_a_picture_stands_for_the_chart_and_headings_stay_with_their_tables(folder):
    pymupdf = pytest.importorskip("pymupdf")
    browse(folder / "report.html", f"--print-to-pdf={folder / 'page.pdf'}", "--no-pdf-header-footer")
    with pymupdf.open(folder / "page.pdf") as document:
        texts = [page.get_text() for page in document]
        assert len(document[0].get_images()) == 1
    assert "switches a curve off" not in "".join(texts)
    for heading, below in (("Worst drawdowns", "recovered"), ("Returns by month", "month (UTC)"),
                           ("Results", "Sharpe"), ("What was run", "synthetic:seed=0")):  # fmt: skip
        (text,) = [text for text in texts if f"{heading}\n" in text]
        assert below in text.partition(f"{heading}\n")[2]
