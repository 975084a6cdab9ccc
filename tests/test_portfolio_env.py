"""Accounting by hand and by second formulas, the environments against each other, baselines and metrics."""

import html
import itertools
import json
import re
from functools import partial
from types import SimpleNamespace

import empyrical
import numpy as np
import pandas as pd
import pytest
import torch
from arch.bootstrap import SPA, StationaryBootstrap, StepM, optimal_block_length
from conftest import copy_market, put_back, refusal, run
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats

import getData
import portfolio_env
from portfolio_env import (
    Backtest,
    PortfolioEnv,
    VectorPortfolioEnv,
    backtest,
    metrics,
    rebalance,
    show_metric,
)

COST = 0.0125
FILLS = ("next_open", "close")


def random_market(bars: int, coins: int, seed: int = 0, sigma: float = 0.02) -> tuple[np.ndarray, np.ndarray]:
    """Open and close [T, N]; the open is not the close before it."""
    rng = np.random.default_rng(seed)
    closes = 100 * np.exp(np.cumsum(rng.normal(0, sigma, (bars, coins)), axis=0))
    opens = np.vstack([closes[:1], closes[:-1]]) * np.exp(rng.normal(0, sigma / 4, (bars, coins)))
    return opens, closes


def random_weights(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Weights [..., A], a third of them zero."""
    weights = rng.exponential(size=shape) * (rng.random(shape) > 1 / 3)
    weights[..., 0] += 1e-3
    return weights / weights.sum(-1, keepdims=True)


def lives(bars: int, coins: int) -> np.ndarray:
    """Whether coins may be held [T, N]: one is listed late, one has a hole, one ends; all pause."""
    present = np.ones((bars, coins), bool)
    present[: bars // 9, 0] = present[bars // 6 : bars // 4, 1] = present[bars // 5 :, 2] = False
    present[bars // 8 : bars // 8 + 9] = False
    return present


@pytest.fixture(scope="module")
def market() -> tuple[np.ndarray, np.ndarray]:
    return random_market(400, 4)


def test_value_kept_by_hand():
    for before, after, kept in (
        ([1, 0, 0], [0, 1, 0], 1 - COST),  # cash -> A
        ([0, 1, 0], [1, 0, 0], 1 - COST),  # A -> cash
        ([0, 1, 0], [0, 0, 1], (1 - COST) ** 2),  # A -> B
        ([0.2, 0.5, 0.3], [0.2, 0.5, 0.3], 1),  # no trade
        ([1, 0, 0], [1, 0, 0], 1),
        ([1, 0, 0], [0.5, 0.5, 0], 1 / (0.5 + 0.5 / (1 - COST))),  # 1 = mu/2 + (mu/2)/(1-c)
        ([0, 1, 0], [0.5, 0.5, 0], (1 - COST) / (0.5 + 0.5 * (1 - COST))),  # (1-c)(1 - mu/2) = mu/2
        ([0, 0.5, 0.5], [0, 1, 0], 0.5 * (1 - COST) ** 2 + 0.5),  # half of A -> B: (1-c)/2 = (mu - 1/2)/(1-c)
    ):
        weights, target = np.array(before, float), np.array(after, float)
        mu = rebalance(torch.tensor(weights)[None], torch.tensor(target)[None], COST)
        assert mu.item() == pytest.approx(kept, abs=1e-15)
        assert portfolio_env.rebalance_one(weights, target, COST)[0] == pytest.approx(kept, abs=1e-15)


def test_value_kept_equals_the_fixed_point():
    """By the iteration of Jiang et al. (2017)."""
    rng = np.random.default_rng(1)
    weights, target = random_weights(rng, 200, 6), random_weights(rng, 200, 6)
    fixed = np.ones(200)
    for _ in range(200):
        sold = np.maximum(weights[:, 1:] - fixed[:, None] * target[:, 1:], 0).sum(1)
        fixed = (1 - COST * weights[:, 0] - (2 * COST - COST**2) * sold) / (1 - COST * target[:, 0])
    mu = rebalance(torch.tensor(weights), torch.tensor(target), COST).numpy()
    np.testing.assert_allclose(mu, fixed, rtol=0, atol=1e-13)


@settings(max_examples=300)
@given(
    st.integers(0, 2**32 - 1), st.integers(1, 12), st.sampled_from([0.0, 0.001, 0.0125, 0.3, 0.9]),
    st.floats(0.01, 1),
)  # fmt: skip
def test_value_kept_has_rounds_for_all_kinks(seed, coins, cost, decay):
    """Kinks crowd ever closer to the root, as a Newton step that passes one at a time needs; the exact root
    is the one that belongs to its own set of sold coins, of the N + 1 sets there are along mu."""
    rng = np.random.default_rng(seed)
    target = np.append(rng.random() * rng.integers(2), rng.random(coins) ** (8 * rng.random()) + 1e-9)
    target /= target.sum()
    kinks = 1 - (1 - (1 - cost) ** 2) * rng.random() * decay ** np.arange(coins)
    weights = np.append(0.0, kinks * target[1:])
    weights[0] = max(0.0, 1 - weights.sum())
    weights /= weights.sum()
    rank = (weights[1:] / target[1:]).argsort().argsort()
    roots = []
    for bought in range(coins + 1):  # those whose kinks come first
        price = np.append(1.0, np.where(rank >= bought, 1 - cost, 1 / (1 - cost)))
        roots.append((price @ weights) / (price @ target))
    # the equation is concave, and each set's line lies over it: the root is the smallest
    mu = rebalance(torch.tensor(weights), torch.tensor(target), cost)
    assert float(mu) == pytest.approx(min(roots), abs=2e-15)


@settings(max_examples=100)
@given(st.integers(0, 2**32 - 1), st.integers(1, 12), st.floats(0, 0.3))
def test_value_kept_properties(seed, coins, cost):
    rng = np.random.default_rng(seed)
    weights, target = random_weights(rng, 8, coins + 1), random_weights(rng, 8, coins + 1)
    mu = rebalance(torch.tensor(weights), torch.tensor(target), cost).numpy()
    assert (mu <= 1 + 1e-15).all()
    assert (mu >= (1 - cost) ** 2 - 1e-15).all()
    order = np.concatenate([[0], 1 + rng.permutation(coins)])
    permuted = rebalance(torch.tensor(weights[:, order]), torch.tensor(target[:, order]), cost).numpy()
    np.testing.assert_allclose(permuted, mu, rtol=0, atol=1e-15)
    for row in range(8):
        # the cost equation: cash and what the sales bring, less what the purchases take, is the new cash
        sales = weights[row, 1:] - mu[row] * target[row, 1:]
        cash = weights[row, 0] + np.where(sales > 0, (1 - cost) * sales, sales / (1 - cost)).sum()
        assert cash == pytest.approx(mu[row] * target[row, 0], abs=1e-14)
        one, turnover = portfolio_env.rebalance_one(weights[row], target[row], cost)
        assert one == pytest.approx(mu[row], abs=1e-15)
        assert 1 - one == pytest.approx(cost * turnover, abs=1e-14)  # on the money that changes hands
    small = rebalance(torch.tensor(weights).float(), torch.tensor(target).float(), cost)
    np.testing.assert_allclose(small.numpy(), mu, rtol=0, atol=2e-6)


def test_impossible_cost_is_refused(market, tmp_path):
    for cost in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match="cost must be"):
            rebalance(torch.eye(2), torch.eye(2), cost)
        with pytest.raises(ValueError, match="cost must be"):
            backtest(lambda t, seen: None, *market, 0, 10, cost=cost)
    flags = ["--data-dir", str(tmp_path), "--fee-rate", "0.6", "--slippage-rate", "0.4"]
    with put_back(portfolio_env), pytest.raises(getData.UsageError, match="FEE_RATE . SLIPPAGE_RATE.*\\Z"):
        portfolio_env.main(flags)
    assert not list(tmp_path.iterdir())


# bars of one coin, for fills by hand
OPEN = np.array([[100.0], [110.0], [120.0], [150.0]])
CLOSE = np.array([[105.0], [115.0], [130.0], [160.0]])


def test_limits_by_hand():
    """Without costs; then of the free half 30 parts of 51 become cash, and 21 are left of coin 2."""
    half = 0.5 / 0.51
    for before, after, limits, expected in (
        ([1, 0, 0], [0, 0.7, 0.3], (0.4,), [0.3, 0.4, 0.3]),  # what is cut becomes cash
        ([1, 0, 0], [0, 0.6, 0.4], (1, 0.2), [0.2, 0.48, 0.32]),
        ([1, 0, 0], [0.1, 0.8, 0.1], (0.5, 0.45), [0.45, 0.55 * 5 / 6, 0.55 / 6]),
        ([0.2, 0.5, 0.3], [0.25, 0.49, 0.26], (1, 0, 0.05), [0.2, 0.5, 0.3]),  # no order
        ([0.2, 0.5, 0.3], [0.3, 0.49, 0.21], (1, 0, 0.05), [0.3 * half, 0.5, 0.21 * half]),
        ([0.2, 0.5, 0.3], [0, 0.49, 0.51], (1, 0, 0.05), [0, 0.5, 0.5]),
        ([0, 0.5, 0.5], [0, 0.52, 0.48], (1, 0, 0.05), [0, 0.5, 0.5]),  # nothing is free
        ([0.1, 0.55, 0.35], [0.05, 0.5, 0.45], (0.5, 0, 0.2), [0.15, 0.5, 0.35]),  # coin 1 weighs too much
        ([0.1, 0.02, 0.88], [0.1, 0, 0.9], (1, 0, 0.05), [0.12, 0, 0.88]),  # and here is asked to be 0
        ([0.1, 0.46, 0.44], [0.2, 0.45, 0.35], (1, 0.2, 0.05), [0.2, 0.46, 0.34]),  # cash of coin 2
        ([0.02, 0.49, 0.49], [0.2, 0.4, 0.4], (1, 0.2, 0.1), [0.2, 0.4, 0.4]),  # too little cash: some is
        ([0.1, 0.55, 0.35], [0.2, 0.44, 0.36], (1, 0.2, 0.2), [0.65 * 20 / 64, 0.65 * 44 / 64, 0.35]),  # sold
    ):
        pair, limits = (np.array(before, float), np.array(after, float)), portfolio_env.Limits(*limits)
        np.testing.assert_allclose(portfolio_env.constrain(*pair, 0.0, limits), expected, atol=1e-14)
        account = portfolio_env.Account(pair[0], pair[0], 0.0, limits)
        account.trade(pair[1])
        np.testing.assert_allclose(account.weights, expected, atol=1e-14)
        assert portfolio_env.constrain(*pair, 0.0, portfolio_env.NO_LIMITS) is pair[1]
    kept = (0.2 + 0.3 * (1 - COST)) / (0.3 * half + 0.21 * half * (1 - COST))
    account = portfolio_env.Account(np.array([0.2, 0.5, 0.3]), None, COST, portfolio_env.Limits(1, 0, 0.05))
    mu, turnover = account.trade([0.3, 0.49, 0.21])
    assert mu == pytest.approx(0.5 + 0.5 * kept, abs=1e-15)
    np.testing.assert_allclose(mu * account.weights, [kept * 0.3 * half, 0.5, kept * 0.21 * half], atol=1e-15)
    assert turnover == pytest.approx(0.3 - kept * 0.21 * half, abs=1e-15)


@settings(max_examples=200)
@given(
    st.integers(0, 2**32 - 1), st.integers(1, 6), st.sampled_from([0.0, 0.001, 0.05]),
    st.sampled_from([1.0, 0.5, 0.2]), st.sampled_from([0.0, 0.1, 0.6]), st.sampled_from([0.0, 0.03, 0.3]),
)  # fmt: skip
def test_limits_hold_after_every_trade(seed, coins, cost, most, least_cash, band):
    """A scalar second formula, by bisection of what is traded; no coin that stays is touched."""
    rng, limits = np.random.default_rng(seed), portfolio_env.Limits(most, least_cash, band)
    weights, asked = (random_weights(rng, 8, coins + 1) for _ in range(2))
    asked[4:] = 0.9 * weights[4:] + 0.1 * asked[4:]  # small moves
    targets = portfolio_env.constrain(*map(torch.tensor, (weights, asked)), cost, limits)
    kept = rebalance(torch.tensor(weights), targets, cost).numpy()

    def cut(amounts: list[float], least: float) -> list[float]:
        own = [min(amount, most) for amount in amounts[1:]]
        scale = min(1.0, (sum(amounts) - least) / sum(own)) if sum(own) else 1.0
        own = [scale * amount for amount in own]
        return [sum(amounts) - sum(own), *own]

    for before, wish, target, mu in zip(weights, asked, targets.numpy(), kept, strict=True):
        assert target.sum() == pytest.approx(1, abs=1e-14)
        assert target[1:].max() <= most + 1e-14
        assert target[0] >= least_cash - 1e-14
        wish, floor = cut(wish.tolist(), least_cash), (1 - cost) ** 2
        stays = [
            k for k in range(1, coins + 1)
            if abs(before[k] - wish[k]) < band and wish[k] > 0 and (most == 1 or before[k] <= most * floor)
        ]  # fmt: skip
        if (1 - sum(before[k] for k in stays)) * floor < least_cash:
            stays = [k for k in stays if before[k] < wish[k]]
        free = [k for k in range(coins + 1) if k not in stays]
        share = sum(before[k] for k in free)
        if not stays or share * floor < least_cash:
            np.testing.assert_allclose(target, wish, atol=1e-14)
            continue
        total = sum(wish[k] for k in free)
        parts = cut(
            [share * wish[k] / total if total else share * (k == 0) for k in free], least_cash / floor
        )
        low, high = 0.0, 1.0
        for _ in range(100):
            value = (low + high) / 2
            moves = [before[k] - value * part for k, part in zip(free, parts, strict=True)][1:]
            cash = before[0] + sum(move * (1 - cost) if move > 0 else move / (1 - cost) for move in moves)
            low, high = (value, high) if cash > value * parts[0] else (low, value)
        after = dict(zip(free, (value * part for part in parts), strict=True)) | {k: before[k] for k in stays}
        np.testing.assert_allclose(mu * target, [after[k] for k in range(coins + 1)], atol=1e-13)


def test_fills_by_hand():
    """Half is bought at the open 110, seen at 115 and drifted to 120, where all is sold; flat to 150."""
    seen = []

    def policy(t, weights_seen):
        seen.append(weights_seen)
        return [[1, 1], [1, 0]][t]

    result = backtest(policy, OPEN, CLOSE, 0, 2, cost=0.01)
    bought = 1 / (0.5 + 0.5 / 0.99)
    grown = 0.5 + 0.5 * 120 / 110
    coin_at_fill = 0.5 * 120 / 110 / grown
    coin_at_close = 0.5 * 115 / 110 / (0.5 + 0.5 * 115 / 110)
    np.testing.assert_allclose(seen, [[1, 0], [1 - coin_at_close, coin_at_close]], atol=1e-15)
    expected = [1, bought * grown, bought * grown * (1 - 0.01 * coin_at_fill)]
    np.testing.assert_allclose(result.value, expected, atol=1e-15)
    np.testing.assert_allclose(result.weights, [[0.5, 0.5], [1, 0]])
    np.testing.assert_allclose(result.benchmark, [1, 120 / 110, 150 / 110])
    np.testing.assert_allclose(result.cost_paid, [1 - bought, 0.01 * coin_at_fill])
    np.testing.assert_allclose(result.turnover, [(1 - bought) / 0.01, coin_at_fill])
    assert result.rows.tolist() == [0, 1]
    # and at the close
    result = backtest(lambda t, seen: [0, 1], OPEN, CLOSE, 0, 3, cost=0.01, fill="close")
    growth = np.array([1, 115 / 105, 130 / 105, 160 / 105])
    np.testing.assert_allclose(result.value, growth * [1, 0.99, 0.99, 0.99], atol=1e-15)
    np.testing.assert_allclose(result.benchmark, growth)
    # half a coin seen at the close 105 is 110 / 105 heavier at the fill; selling it costs c of that
    env = VectorPortfolioEnv(torch.tensor(OPEN), torch.tensor(CLOSE), cost=0.01, reward="growth")
    seen = env.reset(torch.tensor([0]), 1, torch.tensor([[0.5, 0.5]]))
    assert seen.tolist() == [[0.5, 0.5]]
    _, reward, _, truncated = env.step(torch.tensor([[1.0, 0.0]]))
    coin_at_fill = 110 / 105 / (1 + 110 / 105)
    assert reward.item() == pytest.approx(np.log(1 - 0.01 * coin_at_fill), abs=1e-15)
    assert env.turnover.item() == pytest.approx(coin_at_fill, abs=1e-15)
    assert truncated.item()


def test_a_coin_that_leaves_is_sold_by_hand():
    """A is halted for a bar and opens a fifth lower; B ends at 8, of which half is lost."""
    nan = np.nan
    columns = {
        "A.open": [10, 10, nan, 8, 8, 8],
        "A.close": [10, 10, nan, 8, 9, 9],
        "A.member": [1, 1, 0, 1, 1, 1],
    }
    columns |= {"B.open": [4, 4, 6, nan, nan, nan], "B.close": [4, 5, 8, nan, nan, nan]}
    frame = pd.DataFrame(columns | {"B.member": [1, 1, 1, 0, 0, 0]})
    opens, closes = portfolio_env.price_arrays(frame, ["A", "B"], delisting_loss=0.5)
    np.testing.assert_array_equal(opens.T, [[10, 10, 8, 8, 8, 8], [4, 4, 6, 4, 4, 4]])
    np.testing.assert_array_equal(closes.T, [[10, 10, 10, 8, 9, 9], [4, 5, 8, 4, 4, 4]])
    present = getData.members_of(frame, ["A", "B"])
    asked = [[0, 0.5, 0.5], None, [0, 0.5, 0.5], [0, 1, 1]]
    result = backtest(lambda t, seen: asked[t], opens, closes, 0, 4, cost=0.01, present=present)
    bought = 0.99 / 2  # of each
    first, second = bought * (0.8 + 1.5), bought * (0.8 + 1)
    third = bought * (0.8 * 0.99**2 + 1)  # all of A into B
    expected = [1, first, second, third, third * 0.99**2]
    np.testing.assert_allclose(result.value, expected, rtol=0, atol=1e-12)
    np.testing.assert_allclose(result.benchmark, [1, 1.15, 0.9, 0.9, 0.9], rtol=0, atol=1e-12)
    assert result.weights[2:].tolist() == [[0, 0, 1], [0, 1, 0]]


@pytest.mark.parametrize(("missing", "sale"), [((3, 5), 1.0), ((3, 6), 0.4), ((3, 8), 1.0)])
def test_what_is_held_of_a_halted_coin_is_sold_at_its_next_open(missing, sale):
    """Two missing bars are filled; after three it opens at 0.4, and what is held is sold at no earlier price,
    as nobody could; after a hole in all coins of three bars more it is sold at its last close."""
    index = pd.date_range("2025-01-01", periods=12, freq="5min", tz="UTC").as_unit("ms")
    price = np.where(np.arange(12) < missing[0], 1.0, 0.4)
    own = pd.DataFrame(dict.fromkeys(("open", "high", "low", "close", "volume"), price), index)
    other = own.assign(open=1.0, high=1.0, low=1.0, close=1.0)
    hole = range(4, 8) if missing[1] == 8 else ()
    raw = {"A": other.drop(index[list(hole)]), "B": own.drop(index[range(*missing)])}
    bars = getData.on_one_grid(raw, limit=2)
    table = getData.price_table(bars, getData.members_over_time(bars, 0, 0))
    opens, _ = portfolio_env.price_arrays(table, ["A", "B"])
    assert opens[missing[0] : missing[1], 1].tolist() == [sale] * (missing[1] - missing[0])
    assert (opens[: missing[0], 1] == 1).all()
    assert (opens[missing[1] :, 1] == 0.4).all()


def test_the_benchmark_is_formed_anew_at_each_change(market):
    """Against units held, one fill after another, from any start; where nothing is there, cash."""
    fills, present = market[0][1:], lives(400, 4)
    present[-1] = ~present[-1]  # a change after which nothing is filled
    benchmark = portfolio_env.EqualWeight(*map(torch.tensor, (fills, present)))
    for start in (0, 30, 52, 70, 99, 250):
        path, cash, units = [1.0], 1.0, np.zeros(4)
        for t in range(start, 398):
            if t == start or (present[t] != present[t - 1]).any():
                value, there = cash + units @ fills[t], present[t]
                units = value * there / max(there.sum(), 1) / fills[t]
                cash = 0.0 if there.any() else value
            path.append(cash + units @ fills[t + 1])
        result = benchmark(torch.arange(start, 399), torch.tensor(start))
        np.testing.assert_allclose(result, path, rtol=1e-12)


def test_the_survivors_gap_is_of_the_times_at_which_some_coin_is_there():
    """A doubles in a time without members: no gain of survivors. C halves, and ends: one."""
    prices = np.ones((100, 3))
    prices[50:, 0], prices[20:, 2] = 2.0, 0.5
    listed = np.ones((100, 3), bool)
    listed[40:48], listed[70:, 2] = False, False
    present = listed.copy()
    present[48:55] = False
    account = backtest(lambda *_: [0, 1, 1, 1], prices, prices, 10, 90, cost=0.0, present=present)
    own = {"agents": {}, "others": {"equal-weight hold": account}, "symbols": ["A", "B", "C"]}
    report = SimpleNamespace(**own, fill="next_open", times=np.arange(80))
    remarks = portfolio_env.remarks_on_members(report, (prices, prices), present, listed)
    days = len(account.rows) / 288
    assert f"would have made {1e4 * np.log(1 / (2.5 / 3)) / days:+.1f} bp a day more" in remarks[1]


def test_a_long_hole_in_all_coins_is_no_part_of_the_results(market, monkeypatch):
    """But for its first bars; the account is the same, and what it made is by the days with coins."""
    present, equal, results = np.ones((400, 4), bool), np.full(5, 0.2), []
    present[100:200] = False
    for longest in (1_000, 10):
        monkeypatch.setattr(portfolio_env, "_LONGEST_HOLDING", longest)
        results.append(backtest(lambda *_: equal, *market, 10, 390, cost=COST, present=present))
    whole, apart = results
    assert apart.rows.tolist() == [*range(10, 110), *range(200, 390)]
    steps = apart.rows - 10
    for name in ("value", "benchmark"):
        assert getattr(apart, name).tolist() == [1.0, *getattr(whole, name)[1 + steps]]
    for name in ("weights", "before", "turnover", "cost_paid", "gains"):
        np.testing.assert_array_equal(getattr(apart, name), getattr(whole, name)[steps])
    before, after = map(portfolio_env.metrics, results)
    assert after["excess_bp_day"] == pytest.approx(before["excess_bp_day"] * 380 / 290)
    assert after["cost_paid"] == pytest.approx(before["cost_paid"])


def test_coins_that_are_never_there_change_no_account(market):
    """Whatever is asked of them: accounts, baselines, benchmark and optimum are those of the others."""
    rng, alive = np.random.default_rng(5), [0, 2]
    present = np.zeros((400, 4), bool)
    present[:, alive] = lives(400, 4)[:, alive]
    targets = random_weights(rng, 400, 5)
    some = [0, *(1 + np.array(alive))]
    few = [part[:, alive] for part in market]
    few = {"all": (market, slice(None), present), "few": (few, some, present[:, alive])}
    results, rules = {}, {}
    for name, (prices, assets, there) in few.items():
        options = {"cost": COST, "fill": "next_open", "present": there}
        results[name] = backtest(lambda t, seen, which=assets: targets[t][which], *prices, 10, 390, **options)
        rules[name] = portfolio_env.baselines(*prices, 10, 390, **options, rebalance_every=5, look_back=20)
    for pair in (results, *({name: rules[name][rule] for name in rules} for rule in rules["all"])):
        for part in ("value", "benchmark", "turnover"):
            np.testing.assert_allclose(*(getattr(one, part) for one in pair.values()), rtol=1e-12)
        assert not pair["all"].weights[:, [2, 4]].any()


@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize(
    ("present", "limits"),
    [(None, ()), (lives(400, 4), ()), (None, (0.4, 0.1, 0.05)), (lives(400, 4), (1, 0, 0.2))],
    ids=["all", "absent", "limits", "band"],
)
@pytest.mark.parametrize(("reward", "hold_bars"), [("excess", 1), ("growth", 1), ("excess", 7)])
def test_scalar_env_equals_vector_env_equals_backtest(market, fill, reward, hold_bars, present, limits):
    """Decisions several bars apart are a backtest that gives no order in between."""
    rng = np.random.default_rng(3)
    starts, steps = np.array([20, 57, 300]), 60 // hold_bars
    targets = random_weights(rng, steps, 3, 5) * rng.uniform(0.5, 2, (steps, 3, 1))  # not normalised
    first_weights = random_weights(rng, 3, 5)
    first_weights[0] = [1, 0, 0, 0, 0]  # as the backtest starts
    options = {"cost": COST, "fill": fill, "reward": reward, "hold_bars": hold_bars}
    options["limits"] = portfolio_env.Limits(*limits)
    there = None if present is None else torch.tensor(present)
    many = VectorPortfolioEnv(*map(torch.tensor, market), **options, present=there)
    weights = [many.reset(torch.tensor(starts), steps, torch.tensor(first_weights))]
    names = ("value", "benchmark_value", "turnover", "cost_paid", "row")
    rows = []
    for step in range(steps):
        weights_seen, rewards, terminated, truncated = many.step(torch.tensor(targets[step]))
        weights.append(weights_seen)
        rows.append(np.array([rewards, *(getattr(many, name) for name in names)]))
        assert not terminated.any()
        assert truncated.all() == (step == steps - 1)
        np.testing.assert_allclose(weights_seen.sum(-1), 1, atol=1e-14)
    one = PortfolioEnv(*market, **options, steps=steps, look_back=8, present=present)
    for env in range(3):
        observation, info = one.reset(options={"start": starts[env], "weights": first_weights[env]})
        for step in range(steps):
            np.testing.assert_allclose(info["weights"], weights[step][env], rtol=0, atol=1e-12)
            np.testing.assert_allclose(observation[-5:], info["weights"], rtol=0, atol=1e-6)
            observation, reward_one, terminated, truncated, info = one.step(targets[step, env])
            numbers = [reward_one, *(info[key] for key in names)]
            np.testing.assert_allclose(numbers, rows[step][:, env], rtol=0, atol=1e-12)
            assert (terminated, truncated) == (False, step == steps - 1)
            assert info["time"] == 300_000 * info["row"] == 300_000 * (starts[env] + hold_bars * (step + 1))

    seen = {}

    def policy(row: int, weights_seen: np.ndarray) -> np.ndarray | None:
        seen[row] = weights_seen
        return None if (row - 20) % hold_bars else targets[(row - 20) // hold_bars, 0]

    trading = {"cost": COST, "fill": fill, "present": present, "limits": options["limits"]}
    result = backtest(policy, *market, 20, 20 + steps * hold_bars, **trading)
    value, benchmark, turnover = np.array(rows)[:, 1:4, 0].T
    np.testing.assert_allclose(result.value[hold_bars::hold_bars], value, rtol=0, atol=1e-12)
    np.testing.assert_allclose(result.benchmark[hold_bars::hold_bars], benchmark, rtol=0, atol=1e-12)
    np.testing.assert_allclose(result.turnover[::hold_bars], turnover, rtol=0, atol=1e-12)
    for step in range(steps):
        np.testing.assert_allclose(weights[step][0], seen[20 + step * hold_bars], rtol=0, atol=1e-12)
    last = many.rows - 1 - (steps - 1) * hold_bars  # the last start of decisions that can all be held
    many.reset(torch.tensor([last]), steps)
    with pytest.raises(ValueError, match="must lie within"):
        many.reset(torch.tensor([last + 1]), steps)
    with pytest.raises(ValueError, match="must lie within"):
        backtest(policy, *market, 380, many.rows + hold_bars, cost=COST, fill=fill)
    assert many.rows == 400 - hold_bars - (fill == "next_open")
    assert one.last_row == many.rows - (steps - 1) * hold_bars - 1


@pytest.mark.parametrize("fill", FILLS)
def test_excess_reward_is_growth_over_drifted_equal_weights(market, fill):
    """The benchmark by its weights, drifted bar by bar, against the environment's reward and its value."""
    opens, closes = market
    prices = opens[1:] if fill == "next_open" else closes
    make = partial(VectorPortfolioEnv, *map(torch.tensor, market), cost=COST, fill=fill)
    env, growth_env = make(), make(reward="growth")
    for each in (env, growth_env):
        each.reset(torch.tensor([5]), 50)
    b, total, rng = np.full(4, 0.25), 0.0, np.random.default_rng(4)
    for step in range(50):
        target = torch.tensor(random_weights(rng, 1, 5))
        _, reward, *_ = env.step(target)
        _, growth, *_ = growth_env.step(target)
        y = prices[5 + step + 1] / prices[5 + step]
        assert growth.item() - reward.item() == pytest.approx(np.log(b @ y), abs=1e-12)
        b = b * y / (b @ y)
        total += growth.item()
    assert env.value.item() == pytest.approx(np.exp(total), rel=1e-12)
    assert env.benchmark_value.item() == pytest.approx((prices[55] / prices[5]).mean(), rel=1e-12)


@pytest.mark.parametrize("limits", [(), (0.3, 0.15, 0.05)])
def test_gradient_flows_through_rewards_and_weights(market, limits):
    """By which the implicit gradient of the rebalancing is checked, too."""
    rng = np.random.default_rng(6)
    targets = torch.tensor(rng.dirichlet(np.ones(5), (3, 2)), requires_grad=True)
    options = {"cost": COST, "limits": portfolio_env.Limits(*limits)}
    env = VectorPortfolioEnv(*map(torch.tensor, market), **options)

    def episode(targets):
        env.reset(torch.tensor([10, 40]), 3, torch.full((2, 5), 0.2))
        rewards = []
        for target in targets:
            weights_seen, reward, *_ = env.step(target)
            rewards.append(reward)
        return torch.stack(rewards), weights_seen

    assert torch.autograd.gradcheck(episode, (targets,), atol=1e-7)


def test_ruin_terminates_and_the_end_truncates():
    """A fall to 5 %: the scalar episode is over; in the batch the other one goes on, this one is frozen."""
    closes = np.array([100.0, 100, 100, 5, 6, 7, 8])[:, None]
    prices = torch.tensor(closes)
    env = VectorPortfolioEnv(prices, prices, cost=0.0, fill="close", reward="growth")
    env.reset(torch.zeros(2, dtype=torch.long), 5)
    target = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    ends = []
    for _ in range(5):
        _, reward, *over = env.step(target)
        ends.append((*(part.tolist() for part in over), reward[0].item()))
    off, first = [False, False], [True, False]
    assert ends[1:3] == [(off, off, 0.0), (first, off, pytest.approx(np.log(0.05)))]
    assert ends[3:] == [(first, off, 0.0), (first, [False, True], 0.0)]
    assert env.value.tolist() == [pytest.approx(0.05), 1]
    with pytest.raises(RuntimeError, match="call reset"):
        env.step(target)

    one = PortfolioEnv(closes, closes, cost=0.0, fill="close", steps=5, look_back=1)
    one.reset(options={"start": 1})
    assert [one.step([0, 1])[2:4] for _ in range(2)] == [(False, False), (True, False)]
    with pytest.raises(RuntimeError, match="call reset"):
        one.step([0, 1])


def test_invalid_actions_and_missing_prices_are_refused():
    prices = random_market(50, 2)
    env = PortfolioEnv(*prices, steps=5, look_back=3)
    env.reset(seed=0)
    with pytest.raises(ValueError, match="weights must"):
        env.step(None)
    many = VectorPortfolioEnv(*map(torch.tensor, prices), cost=0.001)
    many.reset(torch.tensor([3]), 5)
    wrong = [[0.5, np.nan, 0.5], [1.5, -0.5, 0], [0, 0, 0], [np.inf, 0, 0], [0.5, 0.5], [[0.5, 0.5, 0]]]
    for action in wrong:
        with pytest.raises(ValueError, match="weights must"):
            env.step(action)
        with pytest.raises(ValueError, match="weights must"):
            many.step(torch.tensor([action], dtype=torch.float64))
        with pytest.raises(ValueError, match="weights must"):
            backtest(lambda t, seen, action=action: action, *prices, 0, 5, cost=0.001)
    # nor are missing prices taken where they are used
    opens, closes = random_market(60, 2)
    opens[:20, 1] = closes[:20, 1] = np.nan
    many = VectorPortfolioEnv(torch.tensor(opens), torch.tensor(closes), cost=0.001)
    many.reset(torch.tensor([20, 30]), 5)
    with pytest.raises(ValueError, match="missing prices"):
        many.reset(torch.tensor([19, 30]), 5)
    with pytest.raises(ValueError, match="prices are missing"):
        backtest(lambda t, seen: None, opens, closes, 15, 30, cost=0.001)
    with pytest.raises(ValueError, match="prices are missing"):
        PortfolioEnv(opens, closes, steps=5, look_back=3)
    for wrong, side in itertools.product((0, -3, np.inf), (0, 1)):  # nor such as no coin has, wherever
        wrong_prices = np.array(prices)
        wrong_prices[side, 41, 1] = wrong
        for use in (
            partial(PortfolioEnv, *wrong_prices, steps=5, look_back=3),
            partial(VectorPortfolioEnv, *torch.tensor(wrong_prices), cost=0.001),
            partial(backtest, lambda t, seen: None, *wrong_prices, 0, 5, cost=0.001),
        ):
            name = ("open", "close")[side]
            with pytest.raises(ValueError, match=f"^{name} price of row 41, column 1 is {wrong}: "):
                use()


def test_reset_is_seeded_and_shows_the_last_returns_and_the_weights(market):
    env = PortfolioEnv(*market, steps=5, look_back=6)
    observation, _ = env.reset(options={"start": 100, "weights": [2, 1, 1, 0, 0]})
    returns = np.log(market[1][95:101] / market[1][94:100])
    np.testing.assert_allclose(observation, [*returns.ravel(), 0.5, 0.25, 0.25, 0, 0], atol=1e-7)
    env = PortfolioEnv(*market, steps=10, random_weights=True)

    def draw(seed):
        observation, info = env.reset(seed=seed)
        return info["row"], *observation[-5:].tolist()

    assert draw(7) == draw(7)
    assert len({draw(seed) for seed in range(20)}) == 20
    assert env.reset(options={"start": 333})[1]["row"] == 333
    with pytest.raises(ValueError, match="start must be"):
        env.reset(options={"start": 395})


def test_metrics_by_hand(market):
    value, benchmark = np.array([1, 1.1, 0.88, 1.001]), np.array([1, 1.2, 0.9, 1.0])
    turnover, cost, zeros = np.array([1, 0, 0.5]), np.array([0.01, 0, 0.005]), np.zeros((3, 2))
    result = Backtest(np.arange(3), zeros, value, benchmark, turnover, cost, zeros, zeros[:, 1:], zeros[0])
    deviation = np.sqrt((0.0875**2 + 0.2125**2 + 0.125**2) / 2)  # of the returns 0.1, -0.2, 0.1375
    growth = np.log(1.001)
    assert metrics(result) == {name: pytest.approx(number) for name, number in {
        "days": 1 / 96,  # a quarter of an hour
        "total_return": 0.001, "growth": growth, "growth_bp_day": 96e4 * growth,
        "excess_bp_day": 96e4 * growth, "sharpe": 0.0125 / deviation * np.sqrt(105_120),
        "sortino": 0.0125 / np.sqrt(0.2**2 / 3) * np.sqrt(105_120), "max_drawdown": 0.2,
        "calmar": (1.001 ** (365 * 96) - 1) / 0.2, "turnover_day": 144.0, "cost_paid": 0.015,
        "hit_rate": 2 / 3,  # 0.1 < 0.2, -0.2 > -0.25, 0.1375 > 0.11
    }.items()}  # fmt: skip
    # those of cash are zero, not NaN
    numbers = metrics(backtest(lambda t, seen: None, *market, 0, 100, cost=COST))
    names = ("growth", "sharpe", "sortino", "max_drawdown", "calmar", "cost_paid")
    assert [numbers[name] for name in names] == [0] * 6
    assert np.isfinite(list(numbers.values())).all()


def autoregressive(rng: np.random.Generator, count: int, memory: float) -> np.ndarray:
    series = rng.normal(size=count)
    for step in range(1, count):
        series[step] += memory * series[step - 1]
    return series


def test_the_block_is_that_of_arch_but_at_least_three_days():
    for count, memory in itertools.product((20, 60, 500, 3_000), (0, 0.5, 0.95)):
        series = autoregressive(np.random.default_rng(count), count, memory)
        expected = optimal_block_length(series)["stationary"].item()
        assert portfolio_env._optimal_block(series) == pytest.approx(expected, rel=1e-9)
    rng = np.random.default_rng(0)
    assert portfolio_env.block_length(rng.normal(size=60 * 288)) == 3 * 288
    assert portfolio_env.block_length(np.zeros(60 * 288)) == 3 * 288
    assert portfolio_env.block_length(rng.normal(size=10 * 288)) == 2 * 288  # a fifth
    assert portfolio_env.block_length(rng.normal(size=100)) == 288
    hours = autoregressive(rng, 200 * 24, 0.99)
    expected = 12 * optimal_block_length(hours)["stationary"].item()
    assert expected > 3 * 288
    assert portfolio_env.block_length(np.repeat(hours, 12)) == pytest.approx(expected)


def test_interval_equals_arch():
    """The same percentiles as the library's bootstrap, widened as for 40 observations, to sampling error."""
    for freedom in (3, 5.5, 20, 1_000):
        widened = stats.t.ppf(0.975, freedom) / stats.norm.ppf(0.975)
        assert portfolio_env._few_blocks(0.95, freedom + 1) == pytest.approx(
            widened * np.sqrt((freedom + 1) / freedom), rel=0.01
        )
    rng = np.random.default_rng(1)
    returns = autoregressive(rng, 2_000, 0.3) * rng.exponential(size=2_000) + 0.05
    library = StationaryBootstrap(50, returns, seed=2).conf_int(np.mean, 10_000, method="percentile").ravel()
    widened = np.sqrt(40 / 39) * stats.t.ppf(0.975, 39) / stats.norm.ppf(0.975)
    expected = returns.mean() + (library - returns.mean()) * widened
    interval = portfolio_env.bootstrap_interval(returns, 50, resamples=10_000)
    np.testing.assert_allclose(interval, expected, atol=0.05 * (expected[1] - expected[0]))
    assert interval == portfolio_env.bootstrap_interval(returns, 50, resamples=10_000)
    assert interval != portfolio_env.bootstrap_interval(returns, 50, resamples=10_000, seed=1)


def test_the_best_of_many_equals_arch():
    """The library's p-values and step-down list, to sampling error and other estimates of variances."""
    rng = np.random.default_rng(0)
    for means in ([0.25, 0.1, -0.5, 0.2, 0, 0], [-0.2] * 6, *rng.normal(0, 0.03, (5, 6))):
        returns = 0.7 * rng.normal(size=(1_000, 1)) + rng.normal(size=(1_000, 6)) + means
        above, p_values, low = portfolio_env.above_chance(returns, 5, resamples=5_000)
        p_value = p_values.min()
        options = {"block_size": 5, "reps": 5_000, "bootstrap": "stationary", "studentize": True, "seed": 1}
        library = SPA(np.zeros(1_000), -returns, **options)
        library.compute()
        # where nothing is above 0 ours is 1
        assert (low.max() > 0) == (p_value <= 0.05)
        assert min(p_value, 0.5) == pytest.approx(min(library.pvalues["consistent"], 0.5), abs=0.06)
        steps = StepM(np.zeros(1_000), -returns, size=0.05, **options)
        steps.compute()
        assert np.flatnonzero(above).tolist() == list(steps.superior_models)
    assert np.isnan(portfolio_env.above_chance(returns, 300)[1:]).all()
    alone = portfolio_env.above_chance(returns[:, :1], 5)[2]  # a one-sided interval of one mean
    two_sided = portfolio_env.bootstrap_interval(returns[:, 0], 5, level=0.9)
    assert alone == pytest.approx(two_sided[:1], abs=0.02 * (two_sided[1] - two_sided[0]))


def test_the_best_of_many_without_skill_is_above_chance_as_often_as_it_says():
    """One in twenty; alone, each fourth of these would be: twenty series, half of them nearly alike."""
    rng, count, single = np.random.default_rng(1), 0, 0
    for _ in range(200):
        returns = rng.normal(size=(60, 20))
        returns[:, 10:] = returns[:, :1] + 0.3 * returns[:, 10:]
        above, *_ = portfolio_env.above_chance(returns, 3, resamples=200)
        count += above.any()
        single += (portfolio_env.bootstrap_interval(returns, 3, resamples=200)[0] > 0).any()
    assert 2 <= count <= 20
    assert single > 30


def test_interval_by_hand():
    """Equal returns have one mean; a block per bar is the ordinary bootstrap; under four there is none."""
    np.testing.assert_allclose(portfolio_env.bootstrap_interval(np.full(100, 0.01), 10), 0.01)
    returns = np.repeat([0.0, 1.0], 500)
    half_width = 1.96 * 0.5 / np.sqrt(1_000)  # of the mean of 1,000 fair coins
    interval = portfolio_env.bootstrap_interval(returns, 1, resamples=4_000)
    np.testing.assert_allclose(interval, [0.5 - half_width, 0.5 + half_width], atol=0.1 * half_width)
    assert np.isnan(portfolio_env.bootstrap_interval(returns, 251)).all()


def test_interval_covers_the_truth_as_often_as_it_says():
    """200 series of 30 days without any skill whose volatility comes in clusters of days."""
    covered = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        volatility = np.exp(np.repeat(autoregressive(rng, 30 * 24, 0.97), 12) / 8)
        returns = rng.normal(size=30 * 288) * volatility
        block = portfolio_env.block_length(returns)
        low, high = portfolio_env.bootstrap_interval(returns, block, resamples=400, seed=seed)
        covered += low <= 0 <= high
    assert 176 <= covered <= 200


@given(st.integers(0, 2**32 - 1), st.integers(2, 3_000), st.floats(-2e-4, 2e-4))
def test_ratios_are_those_of_an_independent_library(seed, bars, drift):
    rng = np.random.default_rng(seed)
    value = np.cumprod(np.append(1.0, 1 + drift + 0.002 * rng.standard_t(5, bars).clip(-50, 50)))
    nothing, weights, ones = np.zeros(bars), np.zeros((bars, 2)), np.ones(bars + 1)
    result = Backtest(nothing, weights, value, ones, nothing, nothing, weights, weights[:, 1:], nothing)
    ours, returns = metrics(result), pd.Series(value[1:] / value[:-1] - 1)
    year = {"annualization": 105_120}
    assert ours["sharpe"] == pytest.approx(empyrical.sharpe_ratio(returns, **year), rel=1e-6)
    assert ours["max_drawdown"] == pytest.approx(-empyrical.max_drawdown(returns), rel=1e-6, abs=1e-12)
    if (returns < 0).any():
        assert ours["sortino"] == pytest.approx(empyrical.sortino_ratio(returns, **year), rel=1e-6)
    yearly = empyrical.calmar_ratio(returns, **year)
    if np.isfinite(yearly) and abs(ours["growth"]) / bars * 105_120 < 600:  # beyond, the year is capped
        assert ours["calmar"] == pytest.approx(yearly, rel=1e-5)


def test_probabilistic_sharpe_by_second_formula():
    """With the moments of scipy; NaN without variation, but for rounding."""
    rng = np.random.default_rng(3)
    for returns in (rng.normal(0.02, 1, 400), rng.exponential(size=300) - 0.9, rng.standard_t(4, 500) - 0.1):
        ratio = returns.mean() / returns.std(ddof=1)
        for threshold in (0.0, 0.03):
            tails = (stats.kurtosis(returns, fisher=False) - 1) / 4
            spread = 1 - stats.skew(returns) * ratio + tails * ratio**2
            expected = stats.norm.cdf((ratio - threshold) * np.sqrt(len(returns) - 1) / np.sqrt(spread))
            assert portfolio_env.probabilistic_sharpe(returns, threshold) == pytest.approx(expected, rel=1e-9)
    for returns in (np.zeros(50), np.array([0.1]), np.full(500, 1e-4), np.diff(1e-4 * np.arange(500))):
        assert np.isnan(portfolio_env.sharpe_per_bar(returns))
        assert np.isnan(portfolio_env.probabilistic_sharpe(returns))
    assert portfolio_env.sharpe_per_bar(np.array([0.0, 0.02])) == pytest.approx(0.01 / np.sqrt(0.0002))


def test_deflated_sharpe_of_the_paper():
    """Bailey and Lopez de Prado (2014), numerical example: five years of daily returns, annual Sharpe 2.5,
    skewness -3, kurtosis 10; the best of 100 trials whose annual ratios have the variance 1/2 -> expected
    maximum 0.1132 per day, deflated Sharpe 0.9004; of 46 trials 0.9505."""
    spread = np.array([-1.0, 1.0]) * np.sqrt(0.5 / 250)  # half of the trials each: variance 1/2 a year
    for trials, expected in ((100, 0.9004), (46, 0.9505)):
        ratios = np.repeat(spread, trials // 2) * np.sqrt((trials - 1) / trials)
        threshold = portfolio_env.expected_best_sharpe(ratios, 1_250)
        if trials == 100:
            assert threshold == pytest.approx(0.1132, abs=5e-5)
        ratio = 2.5 / np.sqrt(250)
        error = np.sqrt((1 + 3 * ratio + 9 / 4 * ratio**2) / 1_249)
        assert stats.norm.cdf((ratio - threshold) / error) == pytest.approx(expected, abs=5e-5)


def test_deflated_sharpe_counts_trials_without_a_result():
    best = partial(portfolio_env.expected_best_sharpe, bars=401)
    assert best([]) == best([0.3]) == best([np.nan]) == 0
    # too few results for a variance: that of a ratio without skill over 401 bars, 1 / 400
    expected = np.euler_gamma * stats.norm.ppf(1 - 1 / (2 * np.e)) / 20
    assert best([0.3, np.nan]) == best([np.nan, np.nan]) == pytest.approx(expected, rel=1e-12)
    assert best([0.1, 0.2, 0.3, np.nan]) > best([0.1, 0.2, 0.3]) > 0
    # two trials: (1 - gamma) Phi^-1(1/2) + gamma Phi^-1(1 - 1 / 2e), times the deviation 0.1 / sqrt(2)
    expected = np.euler_gamma * stats.norm.ppf(1 - 1 / (2 * np.e)) * 0.1 / np.sqrt(2)
    assert best([0.2, 0.3]) == pytest.approx(expected, rel=1e-12)


def test_break_even_by_hand():
    """Flat coins bought at the start, one doubles: 2 (1 - c) = 1.5; sold in between: 2 (1 - c)^2 = 1.5."""
    prices = np.ones((6, 2))
    prices[3:, 0] = 2
    held = backtest(lambda t, seen: [0, 1, 0] if t == 0 else None, prices, prices, 0, 4, cost=0.01)
    assert portfolio_env.break_even_cost(held) == pytest.approx(0.25, abs=1e-12)
    sold = backtest(lambda t, seen: [[0, 1, 0], None, None, [1, 0, 0]][t], prices, prices, 0, 4, cost=0.01)
    assert portfolio_env.break_even_cost(sold) == pytest.approx(1 - np.sqrt(0.75), abs=1e-12)
    often = [[0, 1, 1], [0.1, 0.8, 0.1], [0, 1, 0], [0.1, 0, 0.9]]
    trade = partial(backtest, lambda t, seen: often[t], prices, prices, 0, 4)
    even = trade(cost=portfolio_env.break_even_cost(trade(cost=0.01)))
    assert even.value[-1] == pytest.approx(even.benchmark[-1], rel=1e-12)
    cash = backtest(lambda t, seen: None, prices, prices, 0, 4, cost=0.01)
    assert np.isnan(portfolio_env.break_even_cost(cash))  # behind at any cost
    falling = backtest(lambda t, seen: None, 1 / prices, 1 / prices, 0, 4, cost=0.01)
    assert portfolio_env.break_even_cost(falling) == np.inf  # ahead at any cost


def test_holds_and_rebalancing_by_second_formula(market):
    opens = market[0]
    periods = {"symbols": ["BTCUSDT"], "rebalance_every": 20, "look_back": 40}
    results = portfolio_env.baselines(*market, 100, 300, cost=COST, **periods)
    growth = opens[101:302] / opens[101]  # from the first fill on
    np.testing.assert_allclose(results["cash"].value, 1)
    np.testing.assert_allclose(results["BTCUSDT hold"].value[1:], (1 - COST) * growth[1:, 0])
    np.testing.assert_allclose(results["equal-weight hold"].value[1:], (1 - COST) * growth[1:].mean(1))
    np.testing.assert_allclose(results["equal-weight hold"].benchmark, growth.mean(1))
    for name in ("equal-weight rebalanced", "inverse volatility", "trend to cash", "OLMAR", "PAMR"):
        traded = np.flatnonzero(results[name].turnover)
        assert len(traded) > 1
        assert (traded % 20 == 0).all()
    for name, result in results.items():
        np.testing.assert_allclose(result.weights.sum(1), 1, atol=1e-13, err_msg=name)
        np.testing.assert_allclose(result.cost_paid, COST * result.turnover, atol=1e-14, err_msg=name)


def test_inverse_volatility_and_momentum_by_hand():
    """Log returns of +-1 % and +-3 %: three quarters go to the calm coin. Momentum takes what rose."""
    swings = np.tile([0.01, -0.01], 50)[:, None] * [1, 3]
    closes = np.exp(np.cumsum(np.vstack([[0, 0], swings]), axis=0))
    target = portfolio_env.inverse_volatility(closes[60:])
    np.testing.assert_allclose(target / target.sum(), [0, 0.75, 0.25])
    rising = np.column_stack([np.linspace(1, 2, 101), np.linspace(2, 1, 101)])
    np.testing.assert_allclose(portfolio_env.trend_to_cash(rising[60:]), [0.5, 0.5, 0])
    for bars in (6, 1):  # flat: equal weights; no history either
        assert portfolio_env.inverse_volatility(np.ones((bars, 2))).tolist() == [0, 1, 1]


def test_slow_rules_by_second_formula():
    """On the 672 hourly returns of 28 days: NumPy's moments, SciPy's non-negative least squares, slopes."""
    rng = np.random.default_rng(5)
    common, own = rng.normal(0, 0.002, (8_200, 1)), rng.normal(0, 0.002, (8_200, 6))
    closes = np.exp(np.cumsum(common * [1, 0.2, 0.5, 2, 0.8, 1.5] + own * [0.3, 1, 1, 1, 2, 1], axis=0))
    closes = closes[-28 * 288 - 1 :]
    returns = np.diff(np.log(closes[::12]), axis=0)
    root = np.linalg.cholesky(np.cov(returns.T)).T
    expected, _ = optimize.nnls(root, np.linalg.solve(root.T, np.ones(6)))
    weights = portfolio_env.minimum_variance(closes)
    assert 1 < (weights > 0).sum() < 6
    np.testing.assert_allclose(weights[1:] / weights.sum(), expected / expected.sum(), atol=1e-4)
    calm = np.exp(0.3 * np.log(closes))
    for prices, share in ((closes, 0.4 / (returns.mean(1).std(ddof=1) * 8_760**0.5)), (calm, 1)):
        assert 0 < share <= 1
        weights = portfolio_env.volatility_target(prices)
        np.testing.assert_allclose(weights, [1 - share, *[share / 6] * 6], atol=1e-12)
    slopes = [stats.linregress(returns[:, 3], coin).slope for coin in returns.T]
    lowest, most = portfolio_env.lowest_beta(closes, 3), portfolio_env.momentum(closes)
    assert set(np.flatnonzero(lowest) - 1) == set(np.argsort(slopes)[:2])
    assert set(np.flatnonzero(most) - 1) == set(np.argsort(closes[-1] / closes[0])[-2:])


def test_minimum_variance_by_hand():
    """Uncorrelated coins with the variances 1 and 3 are held as 3 to 1; one that moves with the first, but
    twice as much, is not held; one that never moves is all; of two alike each has half."""
    waves = np.tile([[1, 1], [-1, 1], [1, -1], [-1, -1]], (25, 1)) * [0.01, 0.01 * 3**0.5]
    for coins, expected in (
        (waves, [0.75, 0.25]), (waves @ [[1, 0, 2], [0, 1, 0.1]], [0.75, 0.25, 0]),
        (waves @ [[1, 0], [0, 0]], [0, 1]), (waves @ [[1, 1], [0, 0]], [0.5, 0.5]),
        (waves * [1, np.nan], [1, 0]), (waves * np.nan, [0.5, 0.5]), (waves[:0], [0.5, 0.5]),
    ):  # fmt: skip
        prices = np.exp(np.cumsum(np.vstack([np.zeros(coins.shape[1]), coins]), axis=0)).repeat(12, axis=0)
        weights = portfolio_env.minimum_variance(prices[-1_201:])
        np.testing.assert_allclose(weights / weights.sum(), [0, *expected], atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 30), st.sampled_from([3, 5, 50, 300]))
def test_minimum_variance_is_optimal(seed, coins, hours):
    """Along each coin that is held the variance grows alike, and along the others not less; few hours, a
    coin without a move and one that is there twice included."""
    rng = np.random.default_rng(seed)
    returns = rng.normal(size=(hours, 1)) * rng.uniform(0, 2, coins) + rng.normal(size=(hours, coins))
    returns[:, 1:2], returns[:, 2:3] = returns[:, :1], 0
    prices = np.exp(0.003 * np.cumsum(returns, axis=0)).repeat(12, axis=0)
    weights = portfolio_env.minimum_variance(prices)[1:]
    weights /= weights.sum()
    covariance = np.atleast_2d(np.cov(np.diff(np.log(prices[11::12]), axis=0).T))
    slope = covariance @ weights / (np.trace(covariance) or 1) + 1e-6 * weights
    assert weights.min() >= 0
    np.testing.assert_allclose(slope[weights > 0], slope.min(), atol=1e-8)


def test_highest_third_by_hand():
    """Two of six; what ties with the last of them is in; what has no score is out, but where none has one."""
    for scores, held in (
        ([1, 5, 2, 4, 3, 0], [1, 3]), ([1, 5, 4, 4, 3, 0], [1, 2, 3]), ([1.0, 2.0], [1]),
        ([np.nan, 1.0, 0.0], [1]), ([np.nan] * 3, [0, 1, 2]), ([0.0] * 4, [0, 1, 2, 3]),
    ):  # fmt: skip
        assert (np.flatnonzero(portfolio_env.highest_third(np.array(scores))) - 1).tolist() == held


def test_baselines_do_not_know_the_order_of_the_coins():
    """BTC is looked for by its name; without one it is the first coin."""
    opens, closes = random_market(2_600, 5, sigma=0.003)
    order, names = [3, 0, 4, 1, 2], ["AAA", "BTCUSDT", "CCC", "DDD", "EEE"]
    periods = {"rebalance_every": 96, "look_back": 300}
    results = [
        portfolio_env.baselines(
            opens[:, o], closes[:, o], 300, 2_500, cost=COST, symbols=np.take(names, o), **periods
        )
        for o in (range(5), order)
    ]
    for name, result in results[0].items():
        if name != "AAA hold":
            np.testing.assert_allclose(
                result.weights[:, [0, *np.add(order, 1)]], results[1][name].weights, atol=1e-6, err_msg=name
            )
    past = closes[:2_317]
    for coins, market in ({"symbols": names}, 1), ({}, 0):
        policies = portfolio_env.baseline_policies(closes, 300, **coins, **periods)
        expected = portfolio_env.lowest_beta(past, market)
        np.testing.assert_array_equal(policies["lowest beta"](2_316, None), expected)
    expected = portfolio_env.inverse_volatility(past[-301:])  # 300 returns
    np.testing.assert_allclose(policies["inverse volatility"](2_316, None), expected, rtol=1e-12)


def test_olmar_and_pamr_by_hand():
    """Two coins, the first just fell from 1 to 0.9: both methods buy it.
    OLMAR: predicted [(4 + 0.9) / 5 / 0.9, 1] = [1.0889, 1], so step = (10 - 1.0444) / (2 * 0.0444^2) goes far
    past the corner. PAMR: relatives [0.9, 1], portfolio @ relatives 0.95, step = 0.45 / (2 * 0.05^2) = 90,
    [5, -4], corner. With epsilon = 0.945 PAMR's step is 1: [0.5 + 0.05, 0.5 - 0.05].
    """
    closes = np.array([[1, 1], [1, 1], [1, 1], [1, 1], [0.9, 1]])
    half = np.full(2, 0.5)
    np.testing.assert_allclose(portfolio_env.pamr(half, closes[:2:-1], epsilon=0.945), [0.55, 0.45])
    unlisted = closes * np.where(np.arange(10).reshape(5, 2) == 1, np.nan, 1)
    for rule, prices, period, t, expected in (
        ("OLMAR", closes, 1, 4, [0, 1, 0]), ("PAMR", closes, 1, 4, [0, 1, 0]),
        ("OLMAR", closes, 1, 3, [0, 0.5, 0.5]),  # no history yet
        ("PAMR", np.ones((5, 2)), 1, 4, [0, 0.5, 0.5]),  # nothing moved
        ("OLMAR", unlisted, 1, 4, [0, 0.5, 0.5]), ("PAMR", unlisted, 4, 4, [0, 0.5, 0.5]),
    ):  # fmt: skip
        policies = portfolio_env.baseline_policies(prices, t, rebalance_every=period, look_back=1)
        assert policies[rule](t, None).tolist() == expected


@settings(max_examples=50)
@given(st.lists(st.floats(-5, 5), min_size=1, max_size=8))
def test_nearest_on_simplex(point):
    """Optimality: point - nearest is the same on the support, and not larger off it."""
    point = np.array(point)
    nearest = portfolio_env.nearest_on_simplex(point)
    assert nearest.min() >= 0
    assert nearest.sum() == pytest.approx(1)
    shift = (point - nearest)[nearest > 0]
    np.testing.assert_allclose(shift, shift[0], atol=1e-12)
    assert (point[nearest == 0] <= shift[0] + 1e-12).all()


@pytest.mark.parametrize("rebalance_every", [12, 288])
def test_baselines_do_not_see_the_future(rebalance_every):
    """Targets up to row `last` are the same, bit for bit, whatever comes after it."""
    start, last = 100, 100 + 21 * 288  # a decision of all, also of those each three or seven days
    closes = random_market(last + 100, 4, sigma=0.003)[1]

    def targets(closes):
        periods = {"rebalance_every": rebalance_every, "look_back": 40}
        policies = portfolio_env.baseline_policies(closes, start, **periods)
        return {name: [policy(t, None) for t in range(start, last + 1)] for name, policy in policies.items()}

    changed = closes.copy()
    changed[last + 1 :] *= np.random.default_rng(7).uniform(0.1, 10, changed[last + 1 :].shape)
    for name, expected in targets(closes).items():
        assert (expected[-1] is None) == (name == "cash" or name.endswith(" hold"))
        for old, new in zip(expected, targets(changed)[name], strict=True):
            np.testing.assert_array_equal(old, new, err_msg=name)


@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("seed", range(4))
def test_hindsight_equals_enumeration(fill, seed):
    opens, closes = random_market(9, 2, seed)
    steps, start = 5, 1
    prices = opens[1:] if fill == "next_open" else closes
    best = 0.0
    for path in itertools.product(range(3), repeat=steps):
        value = 1.0
        for step, (before, asset) in enumerate(itertools.pairwise((0, *path))):
            if asset != before:
                value *= (1 - COST) ** ((before > 0) + (asset > 0))
            if asset > 0:
                value *= prices[start + step + 1, asset - 1] / prices[start + step, asset - 1]
        best = max(best, value)
    policy = portfolio_env.hindsight(opens, closes, start, start + steps, cost=COST, fill=fill)
    result = backtest(policy, opens, closes, start, start + steps, cost=COST, fill=fill)
    assert result.value[-1] == pytest.approx(best, rel=1e-13)


@pytest.mark.parametrize("cost", [0.0, 0.001, COST])
def test_hindsight_bounds_every_policy(market, cost):
    results = portfolio_env.baselines(*market, 50, 350, cost=cost, rebalance_every=5, look_back=20)
    best = results.pop("hindsight optimum")
    relatives = portfolio_env.with_cash(market[0][52:352] / market[0][51:351])
    _, growth = portfolio_env.hindsight_path(relatives, cost)
    assert np.log(best.value[-1]) == pytest.approx(growth, abs=1e-11)
    assert all(best.value[-1] >= result.value[-1] for result in results.values())


def test_split_rows_stop_where_prices_do():
    index = pd.date_range("2024-01-01", periods=100, freq="5min", tz="UTC")
    times = index.as_unit("ms").asi8
    footer = {"splits": {"train": [times[10], times[50]], "test": [times[60], times[99] + 1]}}
    assert portfolio_env.split_rows(index, footer, "train", "next_open") == (10, 50)
    assert portfolio_env.split_rows(index, footer, "test", "next_open") == (60, 98)
    assert portfolio_env.split_rows(index, footer, "test", "close") == (60, 99)
    assert portfolio_env.split_rows(index, footer, "all", "close") == (10, 99)
    with pytest.raises(ValueError, match='split must be "train" or "test" or "all"'):
        portfolio_env.split_rows(index, footer, "validation", "close")


def test_the_script_writes_tables_and_pages_of_the_baselines(market_dir, tmp_path, capsys):
    folder = copy_market(market_dir, tmp_path / "data")
    flags = ["--fee-rate", "0.002", "--rebalance-every", "24", "--look-back", "48"]
    with put_back(portfolio_env):
        assert portfolio_env.main(["--data-dir", str(folder), *flags]) == 0
    printed = capsys.readouterr().out
    splits = [line.split(":")[0] for line in printed.splitlines() if "per side" in line]
    assert splits == ["train", "validation", "test"]
    files = {path.relative_to(folder / "reports").as_posix() for path in folder.glob("reports/*/*")}
    names = ("metrics.json", "report.html", "series.parquet", "trades.csv")
    assert files == {f"baselines-{split}/{name}" for split in splits for name in names}
    report = folder / "reports" / "baselines-test"
    page, content = (report / "report.html").read_text(), json.loads((report / "metrics.json").read_text())
    prices, footer = getData.load_prices(folder)
    arrays = portfolio_env.price_arrays(prices, footer["symbols"])
    rows = portfolio_env.split_rows(prices.index, footer, "test", "next_open")
    periods = {"symbols": footer["symbols"], "rebalance_every": 24, "look_back": 48}
    expected = portfolio_env.baselines(*arrays, *rows, cost=0.002, **periods)
    benchmark = content["test"].pop("benchmark")
    assert benchmark["growth"] == pytest.approx(np.log(expected["cash"].benchmark[-1]))
    assert content["test"] == {name: pytest.approx(metrics(result)) for name, result in expected.items()}
    assert f"{footer['symbols'][0]} hold" in content["test"]
    # the same rows on the page and on the console
    for name, row in {"benchmark": benchmark, **content["test"]}.items():
        figures = show_metric(row, "total_return", "+.1%"), f"{row['growth_bp_day']:+.1f}"
        cells = r"\s*".join(f"<td>{re.escape(html.escape(figure))}</td>" for figure in figures)
        assert re.search(rf"<th>{name}</th>\s*{cells}", page)
        assert re.search(rf"\n{name} +{' +'.join(map(re.escape, figures))} ", printed)
    days = (rows[1] - rows[0]) / 288
    facts = f"UTC, {days:.1f} days; 3 coins: {', '.join(footer['symbols'])}; cost 0.200% per side, fill next"
    assert facts in printed
    assert facts in page[page.index("<h1>") : page.index('class="verdict"')]
    assert max(map(len, printed.partition("test: ")[2].splitlines()[1:12])) <= 140
    # they claim nothing
    excess = {name: row["excess_bp_day"] for name, row in content["test"].items() if "hindsight" not in name}
    best = max(excess, key=excess.get)
    assert f"the best of them on these bars was {best} ({excess[best]:+.1f} bp per day" in page
    assert content["skill"] == {}
    body = page.rpartition("</script>")[0].rpartition("<body>")[2].partition("<script")[0]
    for absent in ("How sure", "Weights", "Trading", "these bars are", "skill"):
        assert absent not in body


def test_weights_of_a_file_are_an_account_a_page_and_a_trial(market_dir, tmp_path):
    """Equal weights each day are what the baseline is; wide or long, and either is a trial, once."""
    folder = copy_market(market_dir, tmp_path / "data")
    prices, footer = getData.load_prices(folder)
    start, stop = portfolio_env.split_rows(prices.index, footer, "test", "next_open")
    wide = pd.DataFrame(
        1 / 3, prices.index[start:stop:288].rename("time"), ["BTC/USDT", "eth-usdt", "SOLUSDT"]
    )
    wide.to_csv(tmp_path / "wide.csv")
    long = wide.rename_axis(columns="asset").stack().rename("weight").reset_index()
    long.assign(time=long["time"].dt.tz_localize(None)).to_parquet(tmp_path / "long.parquet")
    for name, trials in (("wide.csv", 1), ("long.parquet", 2), ("wide.csv", 2)):
        printed = run("portfolio_env.py", folder, "--weights", tmp_path / name, "--split", "test").stdout
        content = json.loads((folder / "reports" / name / "metrics.json").read_text())
        assert content["test"][name] == pytest.approx(content["test"]["equal-weight rebalanced"])
        assert content["skill"][name]["trials"] == trials
        assert f"Orders: {len(wide)}; before and after this split: 0." in printed
    table = pd.read_csv(folder / "runs" / "trials.csv")
    assert table["run"].tolist() == ["long.parquet", "wide.csv"]
    run("portfolio_env.py", folder, "--weights", tmp_path / "wide.csv", "--max-weight", "0.2")
    series = pd.read_parquet(folder / "reports" / "wide.csv" / "series.parquet")
    own = series[series["name"] == "wide.csv"]
    assert len(own) == stop - start  # from the first order on
    assert own.loc[own["turnover"] > 0, "after.BTCUSDT"].max() == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("time,BTCUSDT\n{0},0.5\n2020-01-01,1\n", ["row 2 (2020-01-01), BTCUSDT"]),  # outside of the bars
        ("time,BTCUSDT\n{0},0.5\n{2},1\n", ["row 2 (", "BTCUSDT", "5 minutes"]),
        ("time,BTCUSDT\n{0},0.5\n{0},1\n", ["row 2 (", "twice"]),
        ("time,BTCUSDT,ETHUSDT\n{0},0.5,-0.1\n", ["row 1 (", "ETHUSDT = -0.1"]),
        ("time,BTCUSDT,ETHUSDT\n{0},0.5,\n", ["row 1 (", "ETHUSDT = nan"]),
        ("time,BTCUSDT,ETHUSDT\n{0},0.5,much\n", ["row 1 (", "ETHUSDT = much"]),
        ("time,cash,ETHUSDT\n{0},0.5,0.5\n{1},0.6,0.5\n", ["row 2 ("]),
        ("time,BTCUSDT,XYZ\n{0},0.5,0.1\n", ["row 1 (", "XYZ", "SOLUSDT"]),
        ("time,asset,weight\n{0},BTCUSDT,0.5\n{0},BTC/USDT,0.1\n", ["row 2 (", "twice"]),
        ("time,BTCUSDT\nnoon,0.5\n", ["noon"]),
        ("time,BTCUSDT\n", ["no row"]), ("when,BTCUSDT\n{0},1\n", ["time"]), ("", ["damaged"]),
        (None, ["there is no file"]),
        ("time,BTCUSDT\n{3},0.5\n", ["no order in the test split"]),
    ],
)  # fmt: skip
def test_a_wrong_row_of_weights_is_one_line(market_dir, tmp_path, text, words):
    prices, footer = getData.load_prices(market_dir)
    row = portfolio_env.split_rows(prices.index, footer, "test", "next_open")[0]
    first, second, before = prices.index[[row, row + 9, row - 5_000]]
    if text is not None:
        off = first + pd.Timedelta(1, "min")
        (tmp_path / "my.csv").write_text(
            text.format(*(f"{time:%Y-%m-%d %H:%M}" for time in (first, second, off, before)))
        )
    line = refusal("portfolio_env.py", market_dir, "--weights", tmp_path / "my.csv", "--split", "test")
    assert str(tmp_path / "my.csv") in line
    for word in words:
        assert word in line
