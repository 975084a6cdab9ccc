"""`portfolio_env.backtest` against vectorbt, an independent simulator of orders, shares and cash.

    pip install vectorbt==1.2.0            (in a virtual environment of its own, beside requirements.txt)
    PYTHONPATH=. python tests/benchmarks/crosscheck_backtest.py [DATA_DIR]

Without a DATA_DIR (getData.py's) a random market is used; with one, its test split.

First table, same convention: vectorbt gets orders in *shares* and keeps its own cash. Here a purchase worth x
takes x / (1 - c) of cash, there x (1 + fee), so buying pays the fee c / (1 - c) and selling c. If the value
kept after a rebalancing were wrong anywhere, vectorbt's cash would come out wrong, or an order be cut short.
Second table, vectorbt's own convention: target percentages of the value *before* fees, fee c on both sides.
All in is then cut to what the cash allows; anything less leaves the fee missing from the cash.

vectorbt rounds cash and orders away below about 1e-9 of what they are taken from. Such crumbs stay while a
policy that trades itself poor shrinks, so its relative difference grows: 1e-9 for the hourly random one.
"""

import sys
from pathlib import Path

import numpy as np
import vectorbt as vbt

import getData
import portfolio_env

COST = 0.001
REBALANCE_EVERY = 288  # bars
CASH = 1e9  # at the start: vectorbt ignores cash and orders under about 1e-8


def random_market(bars: int, coins: int) -> tuple[np.ndarray, np.ndarray]:
    """Open and close [T, N]; the open is not the close before it."""
    rng = np.random.default_rng(0)
    closes = 100 * np.exp(np.cumsum(0.002 * rng.standard_t(4, (bars, coins)), axis=0))
    return np.vstack([closes[:1], closes[:-1]]) * np.exp(rng.normal(0, 0.0002, (bars, coins))), closes


def simulate(prices: np.ndarray, **orders: object) -> np.ndarray:
    """Value [S] after the orders at each of the prices [S, N], as a multiple of the cash at the start."""
    portfolio = vbt.Portfolio.from_orders(
        prices, price=prices, init_cash=CASH, cash_sharing=True, group_by=True, call_seq="auto", **orders
    )
    return portfolio.value().to_numpy() / CASH


def main() -> None:
    start, stop = 2_016, 2_016 + 14_000
    open_prices, close_prices = random_market(stop + 2, 10)
    if len(sys.argv) > 1:
        frame, footer = getData.load_prices(Path(sys.argv[1]))
        open_prices, close_prices = portfolio_env.price_arrays(frame, footer["symbols"])
        start, stop = portfolio_env.split_rows(frame.index, footer, "test", "next_open")
    rng = np.random.default_rng(1)
    random_targets = rng.dirichlet(np.full(open_prices.shape[1] + 1, 0.3), len(open_prices))
    periods = {"rebalance_every": REBALANCE_EVERY, "look_back": portfolio_env.LOOK_BACK}
    policies = portfolio_env.baseline_policies(close_prices, start, **periods)
    policies["hindsight optimum"] = portfolio_env.hindsight(
        open_prices, close_prices, start, stop, cost=COST, fill="next_open"
    )
    policies["random, hourly"] = lambda t, weights_seen: random_targets[t] if t % 12 == 0 else None
    policies["random, 4 hourly"] = lambda t, weights_seen: random_targets[t] if t % 48 == 0 else None
    prices = open_prices[start + 1 : stop + 1]  # [S, N] of the fills

    print(f"{stop - start:,} bars, {prices.shape[1]} coins, cost {COST} per side\n")
    print(f"{'':26s}{'log growth':>12s}{'same convention':>18s}{'own convention':>18s}{'difference':>12s}")
    for name, policy in policies.items():
        result = portfolio_env.backtest(policy, open_prices, close_prices, start, stop, cost=COST)
        traded = result.turnover > 0
        kept = result.value[:-1] * (1 - result.cost_paid)  # [S] after the trade
        shares = result.weights[:, 1:] * kept[:, None] * CASH / prices
        change = np.diff(shares, axis=0, prepend=0.0)
        fees = np.where(change > 0, COST / (1 - COST), COST)
        exact = simulate(
            prices, size=np.where(traded[:, None], change, np.nan), size_type="amount", fees=fees
        )
        percent = np.where(traded[:, None], result.weights[:, 1:], np.nan)
        own = simulate(prices, size=percent, size_type="targetpercent", fees=COST)
        error = np.abs(exact / kept - 1).max()
        growth = np.log([kept[-1], own[-1]])
        print(f"{name:26s}{growth[0]:12.6f}{error:18.1e}{growth[1]:18.6f}{growth[1] - growth[0]:12.6f}")
    print("\nsame convention: largest relative difference of the value; own convention: its log growth")


if __name__ == "__main__":
    main()
