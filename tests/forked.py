"""Runs the scripts in forks of a process that has imported their libraries: to start Python with torch and
all others takes 5 seconds, a fork 0.2.
"""

import fcntl
import io
import multiprocessing
import os
import signal
import subprocess
import sys
import termios
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib.machinery import SourceFileLoader
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload([
    "torch", "torch._dynamo", "transformers.optimization", "pandas", "pyarrow.parquet",
    "ta", "gymnasium", "pydantic", "tqdm", "jinja2", "filelock", "bokeh.plotting", "bokeh.layouts",
    "bokeh.embed", "bokeh.resources", "getData", "feature_reducer",
])  # fmt: skip


class Output(io.TextIOWrapper):
    """What a script writes to, unbuffered; with a line that begins with `stop_at` it gets the signal `sent`,
    so that the place of a stop depends on nobody's speed."""

    def __init__(self, buffer: object, stop_at: str = "\0", sent: signal.Signals = signal.SIGKILL) -> None:
        super().__init__(buffer, "utf-8", "backslashreplace", write_through=True)
        self.stop_at, self.sent = stop_at, sent

    def write(self, text: str) -> int:
        super().write(text)
        if text.startswith(self.stop_at):
            signal.raise_signal(self.sent)
        return len(text)


class Script:
    """`python script.py flag ...` as a process, with what tests need of subprocess.Popen; output is text.
    `log` is a file to which both go instead; at a terminal the script leads its session. With a line that
    begins with `stop_at` it gets the signal `sent`; with a temporary file of that name it is killed.
    """

    def __init__(
        self, command: list[object], environment: Mapping[str, str] | None = None, log: Path | None = None,
        stop_at: str = "\0", sent: signal.Signals = signal.SIGKILL,
    ) -> None:  # fmt: skip
        if log:
            writers = [os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOCTTY) for _ in range(2)]
            self.stdout = self.stderr = None
        else:
            readers, writers = zip(os.pipe(), os.pipe(), strict=True)
            self.stdout, self.stderr = map(os.fdopen, readers)
        ends = [Connection(writer, readable=False) for writer in writers]
        arguments = [str(part) for part in command], dict(environment or os.environ), os.getcwd()
        self._process = _SERVER.Process(target=_run, args=(*arguments, *ends, stop_at, sent))
        self._process.start()
        self.pid = self._process.pid
        for end in ends:
            end.close()

    def __enter__(self) -> "Script":
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if error:
            self.kill()
        for stream in filter(None, (self.stdout, self.stderr)):
            stream.close()  # what is written from now on ends it, as with Popen
        self._process.join()

    @property
    def returncode(self) -> int | None:
        """The exit code, or minus the signal that ended it; None while it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, seconds: float) -> int:
        self._process.join(seconds)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("the script", seconds)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            with suppress(ProcessLookupError):  # it has just ended
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float = 60) -> tuple[str, str]:
        """Return the rest of output and errors when it has ended; it is killed after so many seconds."""
        with ThreadPoolExecutor(2) as pool:
            texts = [pool.submit(stream.read) for stream in (self.stdout, self.stderr)]
            try:
                self.wait(timeout)
            except BaseException:  # Ctrl-C as well: the pool waits for the ends of the pipes
                self.kill()
                raise
            return tuple(text.result() for text in texts)


def _run(
    command: list[str], environment: dict[str, str], folder: str, out: Connection, err: Connection,
    stop_at: str, sent: signal.Signals,
) -> None:  # fmt: skip
    """Run a script in this process, as Python would."""
    for stream, writer in enumerate((out, err), 1):
        os.dup2(writer.fileno(), stream)
        writer.close()
    if os.isatty(1):
        os.setsid()
        fcntl.ioctl(1, termios.TIOCSCTTY, 0)
    sys.stdout, sys.stderr = (
        Output(io.FileIO(stream, "w", closefd=False), stop_at, sent) for stream in (1, 2)
    )

    def die_half_way(event: str, arguments: tuple) -> None:
        """Leave the temporary file `stop_at` as a process does that is killed while it writes it."""
        if event == "os.rename" and Path(arguments[0]).name == stop_at:
            os.truncate(arguments[0], os.path.getsize(arguments[0]) // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    if stop_at.endswith(".tmp"):
        sys.addaudithook(die_half_way)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    multiprocessing.set_start_method(None, force=True)  # the script's own processes start as it says
    sys.argv = command
    folder = Path(command[0]).resolve().parent
    sys.path.insert(0, str(folder))
    for name in ("getData", "feature_reducer"):  # those of this folder, which may hold edited copies
        if Path(sys.modules[name].__file__).parent != folder:
            del sys.modules[name]
    module = sys.modules["__main__"] = ModuleType("__main__")
    module.__file__ = command[0]
    exec(SourceFileLoader("__main__", command[0]).get_code("__main__"), vars(module))
