# SPDX-License-Identifier: Apache-2.0
"""The commands `dreammover batch` and `dreammover again`.

torch and diffusers take seconds to import, so that happens after the arguments parsed.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from .loading import add_device_options, add_model_options, check_model, choose_device, load_pipeline, pipeline_class
from .options import add_method_options, call_arguments, seed, size

if TYPE_CHECKING:
    from ..batch.jobs import Job


def add_batch(commands: argparse._SubParsersAction) -> None:
    """Register the two commands."""
    text = (
        "Make one video for each row of a manifest. Give the same command again, after a kill or with more rows, and "
        "it goes on: what is done is skipped. Start it with accelerate launch, or several times, to use more devices."
    )
    parser = commands.add_parser("batch", help="make many videos, one for each row of a manifest", description=text)
    parser.set_defaults(run=_batch)
    add = parser.add_argument
    add("manifest", metavar="MANIFEST", help=".jsonl or .csv: img0 and img1 or folder, and what else a row decides")
    add("--fps", type=float, default=16, metavar="N", help="frames per second (default: %(default)s)")
    add("--size", type=size, metavar="WxH", help="of the videos; default: each first photo's")
    add("--seed", type=seed, default=0, metavar="N", help="same seed, same video (default: %(default)s)")
    _add_common(parser)
    add_model_options(parser, default="sd15")
    add_method_options(parser, steering=False)

    text = "Make the videos of sidecars once more, from the same photos with every setting and model they record."
    parser = commands.add_parser("again", help="make a video of a batch once more, from its sidecar", description=text)
    parser.set_defaults(run=_again)
    add = parser.add_argument
    add("sidecars", nargs="+", metavar="SIDECAR", help="the .json beside a video of dreammover batch")
    add("--model", metavar="NAME", help="where the model is; default: as recorded")
    add_device_options(add)
    _add_common(parser)


def _add_common(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("-o", "--output", type=Path, metavar="FOLDER", required=True, help="videos go there, each with a sidecar")
    add("--lora-cache", type=Path, metavar="FOLDER", help="fitted LoRAs are kept there; default: inside the output's")
    add("--quiet", action="store_true", help="show no progress bar")


def _batch(args: argparse.Namespace) -> None:
    check_model(args.model, args.allow_pickle)
    pipeline_class()  # first, since it hushes third parties before they are imported
    from ..batch.manifest import read_manifest

    jobs = read_manifest(args.manifest, args.output, {**call_arguments(args), "seed": args.seed, "fps": args.fps})
    _work(jobs, args, args.model, args.dtype)


def _again(args: argparse.Namespace) -> None:
    pipeline_class()
    from ..batch.manifest import read_sidecars

    jobs = read_sidecars(args.sidecars, args.output)
    models = {(job.recorded["model"]["name"], job.recorded["stack"]["dtype"]) for job in jobs}
    if len(models) > 1:
        raise ValueError(f"the sidecars record different models or dtypes, {sorted(models)}; take one at a time")
    ((model, dtype),) = models
    model = args.model or model
    check_model(model, args.allow_pickle)
    _work(jobs, args, model, dtype)


def _work(jobs: Sequence[Job], args: argparse.Namespace, model: str, dtype: str | None) -> None:
    """Load the model once and do this process's part of the jobs; the main one says how all of them ended.

    Raises:
        RuntimeError: some pairs failed.
    """
    from accelerate import PartialState

    from ..batch.manifest import check_job_outputs, check_values
    from ..batch.run import run, table
    from ..batch.sidecar import read_failures
    from ..batch.worker import Worker

    start = time.perf_counter()
    check_job_outputs(jobs)
    with _terminable():
        failures = read_failures(jobs)  # before the processes meet, so that none of them has failed at anything yet
        device = choose_device(args.device)
        state = PartialState(cpu=device.startswith("cpu"))
        if state.num_processes > 1:
            device = state.device.type if state.device.type == "cpu" else str(state.device)
        pipe = load_pipeline(model, dtype, device, args.allow_pickle)
        pipe.set_progress_bar_config(disable=True)
        worker = Worker(pipe, model, args.output, args.lora_cache)
        check_values(pipe, worker.model["fingerprint"], jobs)
        outcomes = run(worker, jobs, failures, state.process_index, state.num_processes, args.quiet)
    if not state.is_main_process:
        return
    print(table(outcomes, time.perf_counter() - start))
    failed = [outcome for outcome in outcomes if outcome.status == "failed"]
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(jobs)} pairs failed; the rest are done. See {failed[0].record}")


@contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM end the process as Ctrl-C does, through every `finally`, with exit code 143."""
    previous = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
