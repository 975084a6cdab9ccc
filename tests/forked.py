"""Runs the scripts in forks of a process that has imported their libraries: to start Python with torch and
all others takes 5 seconds, a fork 0.1. The scripts are read anew each time, as `python script.py` does.
"""

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TextIO

_LIBRARIES = (
    "torch", "torch._dynamo", "transformers.optimization", "pandas", "pyarrow.parquet",
    "ta", "gymnasium", "pydantic", "tqdm", "jinja2", "filelock", "matplotlib.figure",
    "matplotlib.backends.backend_agg", "bokeh.plotting", "bokeh.layouts", "bokeh.embed", "bokeh.resources",
)  # fmt: skip
_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(list(_LIBRARIES))


class Script:
    """`python script.py flag ...` as a process, with what tests need of subprocess.Popen; output is text.

    Args:
        log: a file to which output and errors are added; else they come through `stdout` and `stderr`.
    """

    def __init__(
        self, command: list[object], environment: Mapping[str, str] | None = None, log: Path | None = None
    ) -> None:
        if log:
            writers = [os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT) for _ in range(2)]
            self.stdout = self.stderr = None
        else:
            readers, writers = zip(os.pipe(), os.pipe(), strict=True)
            self.stdout, self.stderr = map(os.fdopen, readers)
        ends = [Connection(writer, readable=False) for writer in writers]
        arguments = [str(part) for part in command], dict(environment or os.environ), os.getcwd()
        self._process = _SERVER.Process(target=_run, args=(*arguments, *ends))
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
        """The same, as subprocess.Popen has it."""
        return self.returncode

    def wait(self, seconds: float) -> int:
        """Return the exit code when it has ended."""
        self._process.join(seconds)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("the script", seconds)
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send it a signal, unless it has ended."""
        if self.returncode is None:
            with suppress(ProcessLookupError):  # it has just ended
                os.kill(self.pid, number)

    def kill(self) -> None:
        """Send it SIGKILL."""
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
    command: list[str], environment: dict[str, str], folder: str, out: Connection, err: Connection
) -> None:
    """Run a script in this process, as Python would."""
    for stream, writer in enumerate((out, err), 1):
        os.dup2(writer.fileno(), stream)
    for writer in (out, err):
        writer.close()
    sys.stdout, sys.stderr = _text(1), _text(2)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    multiprocessing.set_start_method(None, force=True)  # the script's own processes start as it says
    sys.argv = command
    sys.path.insert(0, str(Path(command[0]).parent))
    runpy.run_path(command[0], run_name="__main__")


def _text(stream: int) -> TextIO:
    """Return a file object, flushed line by line, for standard output (1) or errors (2)."""
    return open(stream, "w", buffering=1, errors="backslashreplace", closefd=False)
