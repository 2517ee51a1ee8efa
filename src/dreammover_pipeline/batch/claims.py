# SPDX-License-Identifier: Apache-2.0
"""Claims of jobs by locks, which the kernel drops when a process dies, and what killed processes left of them."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from ..scratch import discard
from .jobs import Job
from .sidecar import work_path

LEFT = "making-*"  # the folders in which videos are made, one of which a killed process leaves behind


@contextmanager
def claimed(job: Job) -> Iterator[Path | None]:
    """Claim a job while the context lasts. What killed processes left of it is removed first.

    Yields:
        An empty folder to make the video in; None if another process has claimed the job.
    """
    work = work_path(job.output)
    work.mkdir(parents=True, exist_ok=True)
    lock = FileLock(work / "lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        yield None
        return
    try:
        for left in work.glob(LEFT):
            discard(left, job.output.parent)
        # The name is new, so an encoder that outlives its killed parent process cannot write into this folder.
        folder = work / f"{LEFT.removesuffix('*')}{secrets.token_hex(8)}"
        try:
            folder.mkdir(mode=0o700)  # in here, since a signal may end the process as soon as the folder is there
            yield folder
        finally:
            discard(folder, job.output.parent)
    finally:
        lock.release()


def put_back(job: Job) -> None:
    """If a process was killed while it replaced the job's folder of frames, give the old folder its name again."""
    work = work_path(job.output)
    # These two functions take names that are too long for the disk, too, which are refused later.
    if not os.path.lexists(job.output) and os.path.isdir(work) and any(work.glob(LEFT)):
        with claimed(job):  # which puts back all that was put aside
            pass
