# SPDX-License-Identifier: Apache-2.0
"""Hidden folders in which files are made before they get their names, so that a kill at any moment loses nothing.

Such a folder lies beside the files that are made in it. The process that makes them holds a lock in the folder, which
the system releases when the process dies. So whoever writes to the same place next can tell what a killed process left
there from what another process is making at this moment, and removes only the former.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

SCRATCH_PREFIX = ".dreammover-"
SCRATCH_DIGITS = 8  # number of hexadecimal digits after the prefix in a scratch folder's name
SCRATCH_LOCK = "lock"
SCRATCH_ATTEMPTS = 10
ASIDE = ".aside"  # what is added to a new folder's name for the place where the folder that it replaces waits


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary path for a new file or folder, which takes the place of `path` if the block succeeds.

    Until then a file or folder of that name stays as it was, whatever goes wrong. What killed processes left in the
    same place is removed first.
    """
    target = Path(path).resolve()  # of a symbolic link, the file that it points to is replaced and the link stays
    put_in_order(target.parent)
    folder, lock = _held_folder(target.parent)
    try:
        made = folder / f"new{Path(path).suffix}"
        yield made
        move_over(made, target)
    finally:
        _end(folder, lock)


def put_in_order(place: Path) -> None:
    """Remove what killed processes left in a folder, and put back a folder that one of them was about to replace."""
    for folder in place.glob(SCRATCH_PREFIX + "[0-9a-f]" * SCRATCH_DIGITS):
        lock = FileLock(folder / SCRATCH_LOCK)
        # Another process may hold the lock, or may remove the folder at this moment, or it may not be ours to remove.
        with suppress(OSError, NotImplementedError):
            lock.acquire(timeout=0)
            _end(folder, lock)


def move_over(source: Path, target: Path) -> None:
    """Move a file or folder to a path on the same disk, and replace a file or a folder of that name.

    Renaming cannot replace a folder that is not empty. So the old folder is first put aside, beside the source; a kill
    before the new one has its name leaves it there, and whoever calls `discard` on that place puts it back.
    """
    if not (source.is_dir() and target.is_dir()):
        os.replace(source, target)
        return
    aside = source.with_name(f"{source.name}{ASIDE}")
    aside.mkdir()
    os.replace(target, aside / target.name)
    try:
        os.replace(source, target)
    except BaseException:
        _put_back(source.parent, target.parent)
        raise


def discard(folder: Path, place: Path) -> None:
    """Remove a folder in which something was made, and put back what was put aside in it and not replaced.

    Args:
        folder: The folder that held the source of a `move_over`.
        place: The folder that the source was to be moved to.
    """
    _put_back(folder, place)
    shutil.rmtree(folder, ignore_errors=True)  # an encoder that outlives its killed parent may be writing there


def _put_back(folder: Path, place: Path) -> None:
    for aside in folder.glob(f"*{ASIDE}"):
        made = aside.with_name(aside.name.removesuffix(ASIDE))
        if made.exists():  # else it has replaced the old folder
            for old in aside.iterdir():
                if not os.path.lexists(place / old.name):
                    os.replace(old, place / old.name)


def _held_folder(place: Path) -> tuple[Path, FileLock]:
    """A new folder in a place, and the lock by which this process holds it."""
    for _ in range(SCRATCH_ATTEMPTS):
        folder = place / f"{SCRATCH_PREFIX}{secrets.token_hex(SCRATCH_DIGITS // 2)}"
        folder.mkdir()
        lock = FileLock(folder / SCRATCH_LOCK)
        try:
            lock.acquire(timeout=0)
        except (Timeout, FileNotFoundError):
            continue  # a process that puts the place in order came first, and removes the folder
        except (OSError, NotImplementedError):
            return folder, lock  # the disk has no locks, so no other process can take the folder for one that was left
        if folder.is_dir():
            return folder, lock
    raise OSError(f"cannot hold a lock in '{place}': other processes took it {SCRATCH_ATTEMPTS} times")


def _end(folder: Path, lock: FileLock) -> None:
    try:
        discard(folder, folder.parent)
    finally:
        lock.release()
    with suppress(OSError):  # Windows removes a lock only once it is released; elsewhere nothing is left
        folder.rmdir()
