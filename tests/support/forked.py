# SPDX-License-Identifier: Apache-2.0
"""Processes that need not import everything anew, which takes seconds each time: forked, and not started."""

import multiprocessing
import os
import runpy
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import pytest

# What takes half of the time that diffusers takes to import, and knows neither of it nor of the Hub and its variables.
PRELOADED = ["torch", "torch._dynamo", "torch.distributed.fsdp", "scipy.stats", "scipy.optimize"]
OTHERS = {"diffusers", "transformers", "huggingface_hub", "accelerate", "peft", "dreammover_pipeline"}


class Forked:
    """A process that does some work, with the names that `subprocess.Popen` has; what it prints goes to files.

    It has all that this process has, or with the method "forkserver" no more than `PRELOADED`.
    """

    def __init__(self, work: Callable[[], int | None], folder: Path, method: str = "fork"):
        folder.mkdir()
        self._logs = folder / "stdout", folder / "stderr"
        context = multiprocessing.get_context(method)
        context.set_forkserver_preload(PRELOADED)
        self._process = context.Process(target=_run, args=(work, self._logs))
        self._process.start()

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    poll = returncode.fget

    def send_signal(self, number: int) -> None:
        os.kill(self._process.pid, number)

    def kill(self) -> None:
        self._process.kill()

    def terminate(self) -> None:
        self._process.terminate()

    def printed(self) -> tuple[str, str]:
        """What it has printed so far, and its errors."""
        out, errors = (log.read_text() if log.exists() else "" for log in self._logs)
        return out, errors

    def communicate(self, timeout: float = 300) -> tuple[str, str]:
        """Wait for its end, for so many seconds at most; what it has printed, and its errors."""
        self._process.join(timeout)
        if self.returncode is None:
            self.kill()
            pytest.fail(f"a process took longer than {timeout} s")
        return self.printed()


def program(name: Path | str, arguments: Sequence[str], environment: Mapping[str, str], folder: Path, log: Path):
    """A process that runs a Python file or module in a folder, as a new interpreter does but for `PRELOADED`."""
    return Forked(partial(_program, str(name), list(arguments), dict(environment), folder), log, "forkserver")


def _program(name: str, arguments: list[str], environment: dict[str, str], folder: Path) -> None:
    assert not {module.partition(".")[0] for module in sys.modules} & OTHERS
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = [name, *arguments]
    if name.endswith(".py"):
        sys.path.insert(0, str(Path(name).parent))
        runpy.run_path(name, run_name="__main__")
    else:
        runpy.run_module(name, run_name="__main__", alter_sys=True)


def _run(work: Callable[[], int | None], logs: tuple[Path, Path]) -> None:
    for number, log in zip((1, 2), logs, strict=True):
        with log.open("wb") as file:
            os.dup2(file.fileno(), number)  # by number, for the processes that it starts, too
    with open(1, "w", closefd=False) as sys.stdout, open(2, "w", buffering=1, closefd=False) as sys.stderr:
        sys.exit(work())
