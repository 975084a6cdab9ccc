"""A loopback exchange: binance and okx REST candles on 127.0.0.1, with faults to order.

It speaks the exchanges' own formats, so that the unmodified ccxt classes can be pointed at it. The bars it
serves are the truth that a test compares with; its clock stands still unless a test moves it, or lets it run
(`run_clock`). Faults are ordered by `fault()`.
"""

import asyncio
import threading
import time
import zlib
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from operator import itemgetter

import numpy as np
import orjson  # comes with ccxt
from aiohttp import web

BAR_MS = 300_000
LOT, LEAST = "0.00100000", "5.00000000"  # of orders: step of the amount, value
Row = list  # [open time in ms, open, high, low, close, volume], all but the first as strings


def milliseconds(text: str) -> int:
    """Milliseconds since 1970 of an ISO date, read as UTC."""
    return round(datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp() * 1000)


def make_bars(symbol: str, start: int, count: int) -> np.ndarray:
    """A random walk of consistent bars, the same for the same arguments. Returns [count, 6]."""
    random = np.random.default_rng(zlib.crc32(symbol.encode()))
    closes = np.round(100 * np.exp(np.cumsum(random.normal(0, 0.002, count))), 4)
    opens = np.concatenate([[100.0], closes[:-1]])
    highs = np.round(np.maximum(opens, closes) * (1 + random.exponential(0.001, count)), 4)
    lows = np.round(np.minimum(opens, closes) * (1 - random.exponential(0.001, count)), 4)
    volumes = np.round(random.exponential(50, count) + 0.001, 5)
    times = start + BAR_MS * np.arange(count, dtype=np.int64)
    return np.column_stack([times, opens, np.maximum.reduce([highs, opens, closes]),
                            np.minimum.reduce([lows, opens, closes]), closes, volumes])  # fmt: skip


def as_rows(bars: np.ndarray) -> list[Row]:
    """Bars [n, 6] the way exchanges send them: integer time, numbers as strings."""
    return [[int(bar[0]), *(repr(value) for value in bar[1:])] for bar in bars.tolist()]


# ---- faults ------------------------------------------------------------------------------------------------


def edit(index: int, column: int, value: object) -> Callable[[list[Row]], list[Row]]:
    """A row edit: one cell of the page replaced."""

    def change(rows: list[Row]) -> list[Row]:
        rows = [list(row) for row in rows]
        for row in rows[min(index, len(rows) - 1) :][:1]:
            row[column] = value(row[column]) if callable(value) else value
        return rows

    return change


MIDDLE = 5  # the row of the page that most edits hit
ROW_FAULTS: dict[str, Callable[[list[Row]], list[Row]]] = {
    "empty page": lambda rows: [],
    "short": lambda rows: rows[: len(rows) // 2],
    "missing": lambda rows: rows[:MIDDLE] + rows[MIDDLE + 3 :],
    "first missing": lambda rows: rows[1:],
    "duplicate": lambda rows: rows[: MIDDLE + 1] + rows[MIDDLE:],
    "shuffled": lambda rows: rows[::2] + rows[1::2],
    "descending": lambda rows: rows[::-1],
    "conflicting": lambda rows: rows[: MIDDLE + 1] + edit(MIDDLE, 5, "777.5")(rows)[MIDDLE:],
    "off grid": edit(MIDDLE, 0, lambda stamp: stamp + 14_789),
    "microseconds": lambda rows: [[row[0] * 1000, *row[1:]] for row in rows],
    "seconds": lambda rows: [[row[0] // 1000, *row[1:]] for row in rows],
    "nan": edit(MIDDLE, 4, "NaN"),
    "null value": edit(MIDDLE, 4, None),
    "high below low": edit(MIDDLE, 2, "0.0001"),
    "low above open": edit(MIDDLE, 3, "1000000"),
    "zero price": edit(MIDDLE, 3, "0"),
    "negative volume": edit(MIDDLE, 5, "-1"),
    "spike": lambda rows: [[row[0], *(str(float(v) * 10) for v in row[1:5]), row[5]] if i == MIDDLE else row
                           for i, row in enumerate(rows)],
    "rows are numbers": lambda rows: [row[0] for row in rows],
    "rows are cut": lambda rows: [row[:3] for row in rows],
    "revised first": edit(0, 5, "123456.5"),
    "revised last": lambda rows: [*rows[:-2], *([*row[:5], "123456.5"] for row in rows[-2:])],
}  # fmt: skip
STATUS_FAULTS: dict[str, tuple[int, str, dict[str, str]]] = {
    "429": (429, '{"code":-1003,"msg":"Too many requests"}', {"Retry-After": "1"}),
    "429 for ever": (429, "", {"Retry-After": "9" * 400}),
    "418": (418, '{"code":-1003,"msg":"IP banned"}', {"Retry-After": "1"}),
    "418 for hours": (418, '{"code":-1003,"msg":"IP banned"}', {"Retry-After": "7200"}),
    "403": (403, "<html>Forbidden</html>", {}),
    "403 country": (403, "The distribution is configured to block access from your country.", {}),
    "451": (451, '{"code":0,"msg":"Service unavailable from a restricted location"}', {}),
    "500": (500, "Internal Server Error", {}),
    "502": (502, "<html>Bad Gateway</html>", {}),
    "503": (503, "", {}),
    "code -1000": (500, '{"code":-1000,"msg":"An unknown error occured while processing the request."}', {}),
    "code -1007": (408, '{"code":-1007,"msg":"Timeout waiting for response from backend server."}', {}),
    "code -1121": (400, '{"code":-1121,"msg":"Invalid symbol."}', {}),
    "html": (200, "<html><body>Please enable JavaScript</body></html>", {"Content-Type": "text/html"}),
    "empty body": (200, "", {}),
    "null": (200, "null", {}),
    "number": (200, "42", {}),
    "unexpected object": (200, '{"status":"ok"}', {}),
    "list of text": (200, '["a","b"]', {}),
    "object of null": (200, '{"result":null,"data":null,"symbols":null,"error":[],"code":"0"}', {}),
}
BODY_FAULTS = ("cut", "malformed", "timeout", "drip", "reset before", "reset inside")
FAULTS = (*ROW_FAULTS, *STATUS_FAULTS, *BODY_FAULTS, "other pair")
LIST_FAULTS = ("last pair missing",)  # of the endpoint markets


@dataclass
class Fault:
    """What to do to matching requests: the above `kind`, after `skip`, to the next `times` (-1: all)."""

    kind: str
    endpoint: str = "bars"  # bars, markets, time; "" = any
    symbol: str = ""  # "" = any
    skip: int = 0
    times: int = 1
    hits: int = 0
    when: float = 0.0  # of the last hit, monotonic seconds

    def strikes(self, endpoint: str, symbol: str) -> bool:
        """Whether this request is to be hit. Counts it."""
        if self.endpoint not in ("", endpoint) or self.symbol not in ("", symbol):
            return False
        if self.skip:
            self.skip -= 1
            return False
        if self.hits == self.times:
            return False
        self.hits += 1
        self.when = time.monotonic()
        return True


@dataclass
class Request:
    """One request: what for, when (monotonic seconds), and for bars which pair from when, how many."""

    exchange: str
    endpoint: str
    symbol: str = ""
    since: int | None = None
    limit: int | None = None
    when: float = field(default_factory=time.monotonic)


# ---- the exchanges' formats --------------------------------------------------------------------------------


class ExchangeServer:
    """The server, in a thread of its own; see the module's first lines."""

    def __init__(self, symbols: tuple[str, ...], start: str, bars: int, latency: float = 0.0) -> None:
        self.bars = {symbol: make_bars(symbol, milliseconds(start), bars + 1) for symbol in symbols}
        self._began, self._speed = time.monotonic(), 0.0
        self.clock = milliseconds(start) + bars * BAR_MS + 30_000  # they have closed, one is open since 30 s
        self.latency = latency  # seconds before each answer
        self.recent = 0  # serve only so many closed bars, the last, whatever is asked, as kraken does; 0: all
        self.faults: list[Fault] = []
        self.requests: list[Request] = []
        self.listed: list[str] = []  # the pairs of the last answer about markets
        self.halted: set[str] = set()  # pairs that are not traded, though they are listed
        self.balances: dict[str, float] = {}  # of the one account there is
        self.orders: list[dict[str, str]] = []  # all at the market, filled at once
        self.url = ""
        self._seen: dict[str, tuple[int, list[Row]]] = {}  # what has begun by which clock
        self._rows = {symbol: as_rows(bars) for symbol, bars in self.bars.items()}

    def __enter__(self) -> "ExchangeServer":
        self._loop = asyncio.new_event_loop()
        started = threading.Event()
        self._thread = threading.Thread(target=self._serve, args=(started,), daemon=True)
        self._thread.start()
        assert started.wait(30)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(30)

    def _serve(self, started: threading.Event) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._start())
        started.set()
        self._loop.run_forever()
        self._loop.run_until_complete(self._runner.cleanup())
        for task in asyncio.all_tasks(self._loop):  # requests that hang by order
            task.cancel()
        self._loop.run_until_complete(asyncio.sleep(0))
        self._loop.close()

    async def _start(self) -> None:
        app = web.Application()
        for path, exchange, endpoint in ROUTES:
            app.router.add_route("*", path, partial(self._answer, exchange, endpoint))
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}"

    # -- what tests use

    @property
    def clock(self) -> int:
        """The exchange's time in ms."""
        return self._clock + round(1000 * self._speed * (time.monotonic() - self._began))

    @clock.setter
    def clock(self, milliseconds: int) -> None:
        self._clock, self._began = milliseconds, time.monotonic()

    def run_clock(self, speed: float) -> None:
        """Let the clock run from now on, so many times as fast as time; 0 stops it."""
        self.clock, self._speed = self.clock, speed

    def fault(self, kind: str, **options: object) -> Fault:
        """Order a fault; see Fault."""
        assert kind in (*FAULTS, *LIST_FAULTS), kind
        self.faults.append(Fault(kind, **options))
        return self.faults[-1]

    def set_bars(self, symbol: str, bars: np.ndarray) -> None:
        """Replace the truth of one pair."""
        self.bars[symbol] = bars
        self._rows[symbol] = as_rows(bars)
        self._seen.pop(symbol, None)

    def drop_bars(self, symbol: str, first: int, last: int) -> None:
        """An outage: the bars first..last-1 (numbers of rows) do not exist."""
        self.set_bars(symbol, np.delete(self.bars[symbol], slice(first, last), axis=0))

    def count(self, endpoint: str = "bars", symbol: str = "") -> int:
        """How many requests of this kind arrived."""
        return sum(r.endpoint == endpoint and symbol in ("", r.symbol) for r in self.requests)

    def forget(self) -> None:
        """Start counting anew, with no faults."""
        self.requests, self.faults = [], []

    def closed(self, symbol: str) -> np.ndarray:
        """The truth: the bars of one pair that are closed by the server's clock [n, 6]."""
        return self.bars[symbol][self.bars[symbol][:, 0] + BAR_MS <= self.clock]

    def price(self, symbol: str) -> float:
        """The price at which the last bar began."""
        return float(self._visible(symbol)[-1][1])

    def _trade(self, order: dict[str, str]) -> dict:
        """Fill a binance order for a fee of 0.1 %, or refuse it."""
        symbol, amount, sign = order["symbol"], float(order["quantity"]), 1 if order["side"] == "BUY" else -1
        moves = {symbol[:-4]: sign * amount, symbol[-4:]: -sign * amount * self.price(symbol)}
        after = {coin: self.balances.get(coin, 0.0) + move for coin, move in moves.items()}
        lots, worth = amount / float(LOT), abs(moves[symbol[-4:]])
        if min(after.values()) < 0 or abs(lots - round(lots)) > 1e-6 or worth < float(LEAST):
            return {"code": -1013, "msg": "Filter failure or no balance."}
        self.balances |= {coin: after[coin] - 0.001 * max(moves[coin], 0) for coin in moves}
        self.orders.append(order)
        return {"symbol": symbol, "orderId": len(self.orders), "transactTime": self.clock, "status": "FILLED",
                "side": order["side"], "type": "MARKET", "executedQty": order["quantity"]}  # fmt: skip

    # -- answers

    def _visible(self, symbol: str) -> list[Row]:
        """All rows that have begun by the clock; the last is the open bar, whose numbers are not final."""
        clock = self.clock  # once: it may run
        if self._seen.get(symbol, (0,))[0] != clock:
            stamps = self.bars[symbol][:, 0]
            self._seen[symbol] = clock, self._rows[symbol][: int(np.searchsorted(stamps, clock, "right"))]
        rows = self._seen[symbol][1]
        if rows and rows[-1][0] + BAR_MS > clock:
            stamp, price = rows[-1][:2]
            rows[-1] = [stamp, *[price] * 4, str(len(self.requests))]  # it trades on between requests
        return rows

    async def _answer(self, exchange: str, endpoint: str, request: web.Request) -> web.StreamResponse:
        recent = request.path == "/api/v5/market/candles"
        find_page = okx_recent_page if recent else FORMATS[exchange].get("page")
        page = find_page(self, request.query) if endpoint == "bars" else None
        symbol = page.symbol if page else ""
        self.requests.append(Request(exchange, endpoint, symbol, page and page.since, page and page.limit))
        fault = next((fault for fault in self.faults if fault.strikes(endpoint, symbol)), None)
        kind = fault.kind if fault else ""
        if self.latency:
            await asyncio.sleep(self.latency)
        if kind in STATUS_FAULTS:
            status, body, headers = STATUS_FAULTS[kind]
            headers = {"Content-Type": "application/json", **headers}
            return web.Response(status=status, body=body.encode(), headers=headers)
        if endpoint == "order":
            answer = self._trade(dict(await request.post()))
            return web.json_response(answer, status=200 if "orderId" in answer else 400)
        if endpoint == "ticker":
            name = request.query["symbol"]
            body = orjson.dumps({"symbol": name, "lastPrice": str(self.price(name))})
        elif endpoint != "bars":
            self.listed = list(self.bars)[: -1 if kind in LIST_FAULTS else None]
            body = orjson.dumps(FORMATS[exchange][endpoint](self))
        elif symbol not in self.bars:
            return web.Response(status=400, body=STATUS_FAULTS["code -1121"][1].encode())
        else:
            served = next(name for name in self.bars if name != symbol) if kind == "other pair" else symbol
            visible = self._visible(served)
            rows = visible[-self.recent - 1 :] if self.recent else page.select(visible)
            rows = ROW_FAULTS.get(kind, lambda rows: rows)(rows)
            body = orjson.dumps(FORMATS[exchange]["bars"](page, rows))
        return await self._send(request, body, kind)

    async def _send(self, request: web.Request, data: bytes, kind: str) -> web.StreamResponse:
        """The body, whole or damaged."""
        headers = {"Content-Type": "application/json", "x-mbx-used-weight-1m": "2"}
        if kind == "timeout":
            await asyncio.sleep(60)
        if kind == "reset before":
            request.transport.abort()
        if kind not in ("drip", "reset inside"):
            bodies = {"cut": data[: len(data) // 2], "malformed": data.replace(b",", b";", 3)}
            return web.Response(body=bodies.get(kind, data), headers=headers)
        response = web.StreamResponse(headers={**headers, "Content-Length": str(len(data))})
        await response.prepare(request)
        if kind == "reset inside":
            await response.write(data[: len(data) // 2])
            await asyncio.sleep(0.05)
            request.transport.abort()
        for byte in data:
            if request.transport is None or request.transport.is_closing():
                break
            await response.write(bytes([byte]))
            await asyncio.sleep(0.2)
        return response


@dataclass
class Page:
    """One request for bars, in common terms."""

    symbol: str
    name: str  # the pair as the exchange calls it
    since: int | None
    limit: int
    select: Callable[[list[Row]], list[Row]]


def binance_page(server: ExchangeServer, query: dict[str, str]) -> Page:
    """binance: the first `limit` rows from `since` on; without since the last."""
    since = int(query["startTime"]) if "startTime" in query else None
    limit = min(int(query.get("limit", 500)), 1000)

    def select(rows: list[Row]) -> list[Row]:
        first = len(rows) - limit if since is None else bisect_left(rows, since, key=itemgetter(0))
        return rows[max(first, 0) :][:limit]

    return Page(query["symbol"], query["symbol"], since, limit, select)


def okx_page(server: ExchangeServer, query: dict[str, str]) -> Page:
    """okx: the newest `limit` rows of the open interval (before, after)."""
    before, after = int(query.get("before", 0)), int(query.get("after", 1 << 60))
    limit = min(int(query.get("limit", 100)), 300)
    since = before + 1 if before else None

    def select(rows: list[Row]) -> list[Row]:
        first, stop = (bisect_left(rows, edge, key=itemgetter(0)) for edge in (before + 1, after))
        return rows[max(first, stop - limit) : stop]

    return Page(query["instId"].replace("-", ""), query["instId"], since, limit, select)


def okx_recent_page(server: ExchangeServer, query: dict[str, str]) -> Page:
    """okx: of its recent candles there are 1440."""
    page = okx_page(server, query)
    select = page.select
    page.select = lambda rows: select(rows[-1440:])
    return page


def binance_markets(server: ExchangeServer) -> dict:
    symbols = [{"symbol": name, "status": "BREAK" if name in server.halted else "TRADING",
                "baseAsset": name[:-4], "quoteAsset": name[-4:], "isSpotTradingAllowed": True,
                "permissions": ["SPOT"], "orderTypes": ["LIMIT", "MARKET"], "filters": [
                    {"filterType": "LOT_SIZE", "minQty": LOT, "maxQty": "9000", "stepSize": LOT},
                    {"filterType": "NOTIONAL", "minNotional": LEAST}]}
               for name in server.listed]  # fmt: skip
    return {"timezone": "UTC", "serverTime": server.clock, "symbols": symbols}


def okx_markets(server: ExchangeServer) -> dict:
    pairs = [{"instId": f"{name[:-4]}-USDT", "instType": "SPOT", "baseCcy": name[:-4], "quoteCcy": "USDT",
              "state": "live", "listTime": str(int(server.bars[name][0, 0])), "lotSz": "0.0001",
              "minSz": "0.0001", "tickSz": "0.01", "settleCcy": "", "uly": ""}
             for name in server.listed]  # fmt: skip
    return {"code": "0", "msg": "", "data": pairs}


def binance_account(server: ExchangeServer) -> dict:
    balances = [
        {"asset": coin, "free": str(amount), "locked": "0"} for coin, amount in server.balances.items()
    ]
    return {"balances": balances, "updateTime": server.clock}


FORMATS: dict[str, dict[str, Callable]] = {
    "binance": {
        "page": binance_page,
        "markets": binance_markets,
        "time": lambda server: {"serverTime": server.clock},
        "account": binance_account,
        "bars": lambda page, rows: [
            [*row, row[0] + BAR_MS - 1, "0", 7, *"000"] if isinstance(row, list) else row for row in rows],
    },
    "okx": {
        "page": okx_page,
        "markets": okx_markets,
        "time": lambda server: {"code": "0", "msg": "", "data": [{"ts": str(server.clock)}]},
        "bars": lambda page, rows: {"code": "0", "msg": "", "data": [
            [str(row[0]), *row[1:], "0", "0", "1"] if isinstance(row, list) else row for row in rows[::-1]]},
    },
}  # fmt: skip
ROUTES = (
    ("/api/v3/exchangeInfo", "binance", "markets"),
    ("/api/v3/time", "binance", "time"),
    ("/api/v3/klines", "binance", "bars"),
    ("/api/v3/account", "binance", "account"),
    ("/api/v3/ticker/24hr", "binance", "ticker"),
    ("/api/v3/order", "binance", "order"),
    ("/api/v5/public/instruments", "okx", "markets"),
    ("/api/v5/public/time", "okx", "time"),
    ("/api/v5/market/candles", "okx", "bars"),
    ("/api/v5/market/history-candles", "okx", "bars"),
)
