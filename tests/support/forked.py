# SPDX-License-Identifier: Apache-2.0
"""Commands in processes of their own that need not import again what this one has, which takes seconds each time."""

import multiprocessing
import os
import sys
from collections.abc import Callable
from pathlib import Path


class Forked:
    """A process that does some work, with the names that `subprocess.Popen` has; what it prints goes to files."""

    def __init__(self, work: Callable[[], int], folder: Path):
        folder.mkdir()
        self._logs = folder / "stdout", folder / "stderr"
        self._process = multiprocessing.get_context("fork").Process(target=_run, args=(work, self._logs))
        self._process.start()

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    poll = returncode.fget

    def kill(self) -> None:
        self._process.kill()

    def terminate(self) -> None:
        self._process.terminate()

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for its end; what it has printed."""
        self._process.join(timeout)
        assert self.returncode is not None
        out, errors = (log.read_text() for log in self._logs)
        return out, errors


def _run(work: Callable[[], int], logs: tuple[Path, Path]) -> None:
    for stream, log in zip(("stdout", "stderr"), logs, strict=True):
        number = {"stdout": 1, "stderr": 2}[stream]
        with log.open("wb") as file:
            os.dup2(file.fileno(), number)  # for the processes that it starts
        setattr(sys, stream, open(number, "w", buffering=1, closefd=False))
    sys.exit(work())
