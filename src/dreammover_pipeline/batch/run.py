# SPDX-License-Identifier: Apache-2.0
"""Every pair once, by however many processes, whatever happens to any of them.

A pair is claimed by a lock that the kernel drops when its holder dies. Whoever holds it makes the video in a folder of
the pair's own, renames it into place, and commits by renaming its sidecar into place.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from accelerate.utils import release_memory
from filelock import FileLock, Timeout

from .jobs import Job
from .journal import ProgressBar
from .sidecar import failure_path, read_failures, sidecar_path, work_path
from .worker import Worker

POLL_SECONDS = 0.5
FULL_DISK = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class Outcome:
    """How a job ended: "done" in this run, "skipped" as done before it, or "failed".

    `seconds` it took, where known; `note` is the error, or what else there is to say; `record` the file that tells
    the whole.
    """

    job: Job
    status: str
    seconds: float | None
    note: str
    record: Path


def run(
    worker: Worker, jobs: Sequence[Job], failures: Mapping[str, str], process: int, processes: int, quiet: bool = False
) -> list[Outcome]:
    """Do a process's part of the jobs: whatever is neither done nor another's, beginning at a place of its own.

    The first process stays until every job has ended, and takes over those of processes that die; the others leave
    when nothing is left that is not claimed.

    Args:
        worker: Makes them.
        jobs: all of them.
        failures: as `read_failures` gave them when this run began; other failures are of this run and not tried again.
        process: which of the processes that were launched together this is, from 0.
        processes: how many these are.
        quiet: show no progress bar; only the first process has one.

    Returns:
        How jobs ended, in their order, as far as this process knows: all of them for the first one.

    Raises:
        RuntimeError: a disk is full, so that no further job could succeed.
    """
    outcomes = {}
    for job in jobs:
        if worker.finished(job):
            outcomes[job.name] = Outcome(job, "skipped", None, "", sidecar_path(job.output))
            with _claimed(job):  # which clears up, should a kill have come between the commit and that
                failure_path(job.output).unlink(missing_ok=True)
    waiting = [job for job in jobs if job.name not in outcomes]
    offset = len(waiting) * process // processes
    waiting = waiting[offset:] + waiting[:offset]
    names = [job.name for job in jobs]
    with ProgressBar(names, outcomes, worker.journal, quiet or process > 0) as bar:
        while waiting:
            claimed_elsewhere = []
            for job in waiting:
                try:
                    outcome = _attempt(worker, job, failures.get(job.name))
                except Exception as error:
                    if not _disk_is_full(error):
                        raise
                    raise RuntimeError(_full_disk(job, error)) from error
                if outcome is None:
                    claimed_elsewhere.append(job)
                else:
                    outcomes[job.name] = outcome
                bar.update(outcomes, sum(ended.status == "failed" for ended in outcomes.values()))
            if len(claimed_elsewhere) == len(waiting):
                if process > 0:
                    break
                time.sleep(POLL_SECONDS)
            waiting = claimed_elsewhere
    return [outcomes[job.name] for job in jobs if job.name in outcomes]


def _attempt(worker: Worker, job: Job, known_failure: str | None) -> Outcome | None:
    """Claim a job and see it to its end; None if another process has it."""
    with _claimed(job) as work:
        if work is None:
            return None
        record = worker.finished(job)  # by another process, before the claim
        if record:
            return _success(job, record)
        failure = read_failures([job]).get(job.name)
        if failure is not None and failure != known_failure:
            error = json.loads(failure)["error"]
            return Outcome(job, "failed", None, f"{error['class']}: {error['message']}", failure_path(job.output))
        start = time.perf_counter()
        try:
            record = worker.make(job, work)
        except Exception as error:
            outcome = _failure(worker, job, error, time.perf_counter() - start, work)
        else:
            failure_path(job.output).unlink(missing_ok=True)
            outcome = _success(job, record)
        if outcome.status == "failed":
            release_memory()  # the error held the tensors of its frames until here
        request = record["request"] if record else None
        worker.journal.append(
            {
                "run": worker.process["run"],
                "name": job.name,
                "status": outcome.status,
                "request": request,
                "seconds": round(outcome.seconds, 3),
            }
        )
        return outcome


@contextmanager
def _claimed(job: Job) -> Iterator[Path | None]:
    """Claim a job while the context lasts, with an empty folder to work in; None if another process has it."""
    work = work_path(job.output)
    work.mkdir(parents=True, exist_ok=True)
    lock = FileLock(work / "lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        yield None
        return
    try:
        for left in work.glob("making-*"):  # by a kill
            shutil.rmtree(left)
        # a new name, which an encoder that outlived its killed parent does not know
        folder = Path(tempfile.mkdtemp(prefix="making-", dir=work))
        try:
            yield folder
        finally:
            shutil.rmtree(folder)
    finally:
        lock.release()


def _success(job: Job, record: Mapping) -> Outcome:
    notes = []
    if record["output"]["blacked_out"]:
        notes.append(f"the safety checker blacked out {record['output']['blacked_out']} frames")
    if job.recorded and job.recorded["output"]["sha256"] != record["output"]["sha256"]:
        same = job.recorded["stack"] == record["stack"]
        notes.append(f"not the recorded bytes; the stack is {'the same' if same else 'another'}")
    seconds = sum(record["seconds"].values())
    return Outcome(job, "done", seconds, "; ".join(notes), sidecar_path(job.output))


def _failure(worker: Worker, job: Job, error: Exception, seconds: float, work: Path) -> Outcome:
    shutil.rmtree(work)  # on a full disk, to have room for the record
    work.mkdir()
    if _disk_is_full(error):
        with suppress(OSError):
            worker.record_failure(job, error, work)
        raise error
    worker.record_failure(job, error, work)
    note = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return Outcome(job, "failed", seconds, note, failure_path(job.output))


def _full_disk(job: Job, error: Exception) -> str:
    return (
        f"no space left on a disk while making '{job.name}' ({error}); nothing half-written is left. "
        f"Free some, of '{job.output.parent}', '{tempfile.gettempdir()}' or the LoRA cache, and give the command again"
    )


def _disk_is_full(error: BaseException | None) -> bool:
    """Whether an error, or one behind it, says so: in words, since an encoder and safetensors have no errno."""
    words = [os.strerror(code) for code in FULL_DISK]
    while error is not None:
        if any(text in str(error) for text in words):
            return True
        error = error.__cause__ or error.__context__
    return False


def table(outcomes: Sequence[Outcome], seconds: float) -> str:
    """How every job ended, one a line, and the sum of it."""
    width = max(len(outcome.job.name) for outcome in outcomes)
    lines = [f"{'output':{width}}  {'status':7}  {'seconds':>8}  note"]
    for outcome in outcomes:
        took = "" if outcome.seconds is None else f"{outcome.seconds:.1f}"
        lines.append(f"{outcome.job.name:{width}}  {outcome.status:7}  {took:>8}  {outcome.note}".rstrip())
    counts = {status: sum(o.status == status for o in outcomes) for status in ("done", "skipped", "failed")}
    summary = ", ".join(f"{count} {status}" for status, count in counts.items())
    return "\n".join([*lines, f"{len(outcomes)} pairs: {summary}, in {seconds:.1f} s"])
