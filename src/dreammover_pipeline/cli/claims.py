# SPDX-License-Identifier: Apache-2.0
"""Claims of folders, so that two commands do not work in one at the same time."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

LOCK = ".dreammover-lock"


@contextmanager
def claimed(folder: Path, work: str) -> Iterator[None]:
    """Keep other processes from the same work in a folder while the context lasts.

    Args:
        folder: The folder, which is made. If it holds nothing afterwards but the lock, it is removed.
        work: What is done in it, for the error, such as "making the same video".

    Raises:
        RuntimeError: Another process has claimed the folder.
    """
    from filelock import FileLock, Timeout

    folder.mkdir(exist_ok=True)
    lock = FileLock(folder / LOCK)  # the system releases it when the process dies
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise RuntimeError(f"another process is {work} and uses '{folder}'; wait until it ends") from error
    except NotImplementedError:
        pass  # the disk has no locks, so nobody can be kept away
    try:
        yield
    finally:
        lock.release()
        with suppress(OSError):  # another process may have removed the folder, or may use it by now
            if [entry.name for entry in folder.iterdir()] == [LOCK]:
                shutil.rmtree(folder)
