"""Send the orders of a paper account's decisions to the sandbox of an exchange: test money alone.

python train.py --job paper --call "python tests/examples/broker.py"

Reads one decision as JSON from standard input, and moves the spot account by market orders, sales first, to
its weights. Environment: API_KEY and API_SECRET of the sandbox, EXCHANGE (of ccxt; default binance), BASE_URL
(of a test server). What is under the exchange's lot size or minimum is left out; other coins are left alone.
The exit code is not 0 where an order fails, and the paper account books that.
"""

import json
import os
import re
import sys

import ccxt

RESERVE = 0.002  # share of the cash that stays for fees and for prices that move meanwhile


def main() -> None:
    decision = json.load(sys.stdin)
    login = {"apiKey": os.environ["API_KEY"], "secret": os.environ["API_SECRET"]}
    exchange = getattr(ccxt, os.environ.get("EXCHANGE", "binance"))(login)
    exchange.options["fetchMarkets"] = {"types": ["spot"]}
    exchange.set_sandbox_mode(True)  # delete this line, and it is real money
    if host := os.environ.get("BASE_URL"):
        exchange.urls["api"] = json.loads(re.sub(r"https?://[^/\"]+", host, json.dumps(exchange.urls["api"])))
    if exchange.fetch_time() >= decision["next_decision_ms"]:
        sys.exit("the decision is over: no orders")
    markets = exchange.load_markets().values()
    markets = {m["base"] + m["quote"]: m for m in markets if m["spot"] and m["active"] is not False}
    names = [name for name in decision["weights"] if name in markets]
    for name in decision["weights"].keys() - {"cash", *names}:
        print(f"{name} is not traded", flush=True)
    pairs, cash = [markets[name]["symbol"] for name in names], markets[names[0]]["quote"]
    prices = {name: exchange.fetch_ticker(pair)["last"] for name, pair in zip(names, pairs, strict=True)}
    balance = exchange.fetch_balance()["total"]
    held = {name: balance.get(markets[name]["base"], 0.0) * prices[name] for name in names}
    value = balance.get(cash, 0.0) + sum(held.values())
    moves = {name: decision["weights"][name] * value - held[name] for name in names}

    def order(name: str, worth: float, side: str) -> None:
        market, amount = markets[name], worth / prices[name]
        least = max(market["precision"]["amount"] or 0.0, market["limits"]["amount"]["min"] or 0.0)
        if amount >= least and worth >= (market["limits"]["cost"]["min"] or 0.0):
            amount = exchange.amount_to_precision(market["symbol"], amount)
            exchange.create_order(market["symbol"], "market", side, float(amount))
            print(f"{side} {amount} {name}", flush=True)

    for name in names:
        order(name, -moves[name], "sell")
    bought = {name: move for name, move in moves.items() if move > 0}
    free = (1 - RESERVE) * exchange.fetch_balance()["free"].get(cash, 0.0)
    for name, move in bought.items():
        order(name, move * min(1.0, free / sum(bought.values())), "buy")


if __name__ == "__main__":
    try:
        main()
    except ccxt.BaseError as error:
        sys.exit(f"error: {error}")
