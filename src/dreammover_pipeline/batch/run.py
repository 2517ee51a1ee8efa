# SPDX-License-Identifier: Apache-2.0
"""Makes every video of a batch exactly once, however many processes take part and whatever happens to them.

A process claims a job by a lock that the kernel drops when the process dies. It makes the video in a folder that
belongs to this job alone, renames the video into its place, and commits it by renaming the sidecar into its place.
"""

from __future__ import annotations

import errno
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from accelerate.utils import release_memory

from ..scratch import discard
from .claims import claimed
from .jobs import Job
from .journal import ProgressBar
from .sidecar import failure_path, forget_failure, read_failures, sidecar_path
from .worker import Worker

POLL_SECONDS = 0.5
FULL_DISK = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class Outcome:
    """How a job ended.

    `status` is "done" for a video that was made in this run, "skipped" for one that was there before, or "failed";
    `seconds` is how long the job took, None where this process does not know; `note` is what the table says of the
    job, such as its error; `record` is the path of the sidecar, or of the record of the failure.
    """

    job: Job
    status: str
    seconds: float | None
    note: str
    record: Path


def run(
    worker: Worker,
    jobs: Sequence[Job],
    failures: Mapping[str, Mapping],
    process: int,
    processes: int,
    quiet: bool = False,
) -> list[Outcome]:
    """Make the videos that are neither there nor being made by another process.

    Each process begins at another place in the list. The first one stays until every job has ended, and takes over the
    jobs of processes that die. The others leave when every job that is left is claimed by somebody.

    Args:
        worker: The worker that makes the videos.
        jobs: All jobs, including those that other processes will do.
        failures: What `read_failures` gave when this run began. These jobs are tried again; a job with a newer record
            failed in this run, and is not tried again.
        process: The number of this process among those that were launched together, from 0.
        processes: How many processes were launched together.
        quiet: Whether no progress bar is shown. Only the first process ever shows one.

    Returns:
        How the jobs ended, in the order of `jobs`. The first process knows it of all jobs, the others of some.

    Raises:
        RuntimeError: A disk is full, so that no further job could succeed.
    """
    outcomes = _skipped(worker, jobs)
    waiting = [job for job in jobs if job.name not in outcomes]
    offset = len(waiting) * process // processes
    waiting = waiting[offset:] + waiting[:offset]
    names = [job.name for job in jobs]
    with ProgressBar(names, outcomes, worker.journal, quiet or process > 0) as bar:
        while waiting:
            claimed_elsewhere = []
            for job in waiting:
                outcome = _attempt_or_stop(worker, job, failures.get(job.name))
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


def _skipped(worker: Worker, jobs: Sequence[Job]) -> dict[str, Outcome]:
    """The outcomes of those jobs that are done already, by their names."""
    outcomes = {}
    for job in jobs:
        if worker.finished_record(job):
            outcomes[job.name] = Outcome(job, "skipped", None, "", sidecar_path(job.output))
            with claimed(job):  # claiming removes what is left of a process that was killed after the commit
                forget_failure(job.output)
    return outcomes


def _attempt_or_stop(worker: Worker, job: Job, known_failure: Mapping | None) -> Outcome | None:
    """Do what `_attempt` does, but stop the whole run when a disk is full.

    Raises:
        RuntimeError: A disk is full. The message says which job was being made and where to make room.
    """
    try:
        return _attempt(worker, job, known_failure)
    except Exception as error:
        if not _disk_is_full(error):
            raise
        raise RuntimeError(_full_disk(job, error)) from error


def _attempt(worker: Worker, job: Job, known_failure: Mapping | None) -> Outcome | None:
    """Claim a job and make its video, or record why that failed.

    Args:
        worker: The worker that makes the video.
        job: The job.
        known_failure: The record of a failure that was there before this run began; None without one.

    Returns:
        How the job ended; None if another process has claimed it.
    """
    with claimed(job) as work:
        if work is None:
            return None
        record = worker.finished_record(job)  # another process may have made the video before this one claimed it
        if record:
            return _success(job, record)
        failure = read_failures([job]).get(job.name)
        if failure is not None and failure != known_failure:
            error = failure["error"]
            return Outcome(job, "failed", None, f"{error['class']}: {error['message']}", failure_path(job.output))
        start = time.perf_counter()
        try:
            record = worker.make(job, work)
        except Exception as error:
            outcome = _failure(worker, job, error, time.perf_counter() - start, work)
        else:
            forget_failure(job.output)
            outcome = _success(job, record)
        if outcome.status == "failed":
            release_memory()  # only now, since the error's traceback kept tensors in memory until here
        entry = {
            "run": worker.process["run"],
            "name": job.name,
            "status": outcome.status,
            "request": record["request"] if record else None,
            "seconds": round(outcome.seconds, 3),
        }
        worker.journal.append(entry)
        return outcome


def _success(job: Job, record: Mapping) -> Outcome:
    """The outcome of a job that is done, by its sidecar."""
    notes, output = [], record["output"]
    frame_size = output.get("frame_size", [0, 0])  # earlier versions did not scale, and did not record it
    if output["width"] < frame_size[0] or output["height"] < frame_size[1]:
        notes.append("scaled from {}x{} to {}x{}".format(*frame_size, output["width"], output["height"]))
    if output["blacked_out"]:
        notes.append(f"the safety checker blacked out {output['blacked_out']} frames")
    if job.recorded and job.recorded["output"]["sha256"] != output["sha256"]:
        same = job.recorded["stack"] == record["stack"]
        stack = "and versions are the same" if same else "or versions differ"
        notes.append(f"not the recorded bytes; precision, device {stack}")
    seconds = sum(record["seconds"].values())
    return Outcome(job, "done", seconds, "; ".join(notes), sidecar_path(job.output))


def _failure(worker: Worker, job: Job, error: Exception, seconds: float, work: Path) -> Outcome:
    """Record that a job failed.

    Args:
        worker: The worker that made the attempt.
        job: The job.
        error: Why it failed.
        seconds: How long the attempt took.
        work: The folder in which the video was being made.

    Raises:
        Exception: The error itself, if it says that a disk is full.
    """
    discard(work, job.output.parent)  # on a full disk this makes room for the record
    work.mkdir(exist_ok=True)
    if _disk_is_full(error):
        with suppress(OSError):
            worker.record_failure(job, error, work)
        raise error
    worker.record_failure(job, error, work)
    note = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return Outcome(job, "failed", seconds, note, failure_path(job.output))


def _full_disk(job: Job, error: Exception) -> str:
    """What the user is told when a disk is full."""
    return (
        f"no space left on a disk while making '{job.name}' ({error}); nothing half-written is left. Free some space "
        f"on the disk of '{job.output.parent}', of '{tempfile.gettempdir()}' or of the LoRA cache, and give the "
        "command again"
    )


def _disk_is_full(error: BaseException | None) -> bool:
    """Whether an error, or one of the errors that caused it, says that a disk is full.

    The words of the message are looked at, since the errors of the video encoder and of safetensors have no `errno`.
    """
    words = [os.strerror(code) for code in FULL_DISK]
    while error is not None:
        if any(text in str(error) for text in words):
            return True
        error = error.__cause__ or error.__context__
    return False


def table(outcomes: Sequence[Outcome], seconds: float) -> str:
    """A table of how every job ended, with a line for each, and a summary in the last line.

    Args:
        outcomes: How the jobs ended.
        seconds: How long the whole run took.
    """
    width = max(len(outcome.job.name) for outcome in outcomes)
    lines = [f"{'output':{width}}  {'status':7}  {'seconds':>8}  note"]
    for outcome in outcomes:
        took = "" if outcome.seconds is None else f"{outcome.seconds:.1f}"
        lines.append(f"{outcome.job.name:{width}}  {outcome.status:7}  {took:>8}  {outcome.note}".rstrip())
    counts = {status: sum(o.status == status for o in outcomes) for status in ("done", "skipped", "failed")}
    summary = ", ".join(f"{count} {status}" for status, count in counts.items())
    return "\n".join([*lines, f"{len(outcomes)} pairs: {summary}, in {seconds:.1f} s"])
