# SPDX-License-Identifier: Apache-2.0
"""Claims of folders, so that two commands do not work in one at the same time."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

LOCK = ".dreammover-lock"


@contextmanager
def claimed(folder: Path, work: str, temporary: bool = False) -> Iterator[None]:
    """Keep other processes from the same work in a folder while the context lasts.

    Args:
        folder: The folder, which is made.
        work: What is done in it, for the error, such as "making the same video".
        temporary: Whether the folder is removed if it holds nothing afterwards but the lock.

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
        with suppress(OSError):  # the work may have removed the folder, and not every system removes a file in use
            # While the lock is held, so that nobody else has the folder by then.
            if temporary and [entry.name for entry in folder.iterdir()] == [LOCK]:
                shutil.rmtree(folder)
        lock.release()
