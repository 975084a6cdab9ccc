"""Small synthetic markets, made once by the script itself."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")  # everything here is tiny: more threads only wait for each other
# a suite started in the background inherits "ignore Ctrl-C", and so would the scripts that the tests interrupt
signal.signal(signal.SIGINT, signal.default_int_handler)
settings.register_profile("patient", deadline=None)  # a busy machine is no failure
settings.load_profile("patient")

ROOT = Path(__file__).parents[1]
COINS = "BTCUSDT,ETHUSDT,SOLUSDT"


def make_market(data_dir: Path, *flags: str) -> Path:
    """Run getData.py into data_dir: 3 coins, 110 days, unless flags say otherwise."""
    command = [sys.executable, str(ROOT / "getData.py"), "--source", "synthetic", "--data-dir", str(data_dir)]
    subprocess.run([*command, "--symbols", COINS, "--days", "110", *flags], check=True, capture_output=True)
    return data_dir


@contextmanager
def put_back(script: ModuleType) -> Iterator[None]:
    """Give a script its constants back at the end: main sets those that are given as flags."""
    before = {name: value for name, value in vars(script).items() if name.isupper()}
    try:
        yield
    finally:
        vars(script).update(before)


@pytest.fixture(scope="session")
def market_dir(tmp_path_factory) -> Path:
    """Bars and features of 3 coins, 110 days, with the planted drift. Read only: copy it to change it."""
    return make_market(tmp_path_factory.mktemp("market"))


@pytest.fixture(scope="session")
def martingale_dir(tmp_path_factory) -> Path:
    """The same without any planted drift: nothing can be predicted. Read only."""
    return make_market(tmp_path_factory.mktemp("martingale"), "--signal", "0")
