# SPDX-License-Identifier: Apache-2.0
"""The commands `dreammover batch` and `dreammover again`.

torch and diffusers take seconds to import, so they are imported only after the arguments have been parsed.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from ..batch.jobs import Job
from ..media.files import make_folder
from .loading import (
    COMPONENTS,
    add_component_options,
    add_device_options,
    add_model_options,
    check_model,
    choose_device,
    chosen_components,
    load_pipeline,
    pipeline_class,
)
from .options import add_method_options, add_output_folder, call_arguments, folder_path, seed, size

WITHOUT = ("points", "mask", "poses")  # the arguments of one pair of photos, which a batch has in its rows


def add_batch(commands: argparse._SubParsersAction) -> None:
    """Register the commands `batch` and `again`."""
    text = (
        "Make one video for each row of a manifest. Videos that are done are skipped, so the same command goes on "
        "after a kill or with more rows. To use more devices, start it with accelerate launch or several times."
    )
    parser = commands.add_parser("batch", help="make many videos, one for each row of a manifest", description=text)
    parser.set_defaults(run=_batch)
    add = parser.add_argument
    add(
        "manifest",
        metavar="MANIFEST",
        help="A .jsonl or .csv file. Each row names two photos or a folder, and may decide settings.",
    )
    add(
        "--fps",
        type=float,
        default=16,
        metavar="N",
        help="Frames per second where a row names none (default: %(default)s).",
    )
    add(
        "--size",
        type=size,
        metavar="WxH",
        help="Size of the videos where a row names none. By default it is that of a pair's first photo.",
    )
    add(
        "--seed",
        type=seed,
        default=0,
        metavar="N",
        help="Seed where a row names none. Equal seeds give equal videos (default: %(default)s).",
    )
    _add_common(parser)
    add_model_options(parser, default="sd15")
    add_component_options(parser)
    add_method_options(parser, without=WITHOUT)

    text = "Make the videos of sidecars once more, from the photos and with the settings and the model they record."
    parser = commands.add_parser("again", help="make a video of a batch once more, from its sidecar", description=text)
    parser.set_defaults(run=_again)
    add = parser.add_argument
    add("sidecars", nargs="+", metavar="SIDECAR", help="The .json file beside a video that dreammover batch made.")
    add("--model", metavar="NAME", help="The model to load instead of the one that the sidecars name.")
    add_component_options(parser, otherwise=" By default it is the one that the sidecars name.")
    add_device_options(add)
    _add_common(parser)


def _add_common(parser: argparse.ArgumentParser) -> None:
    """Add the options that both commands have."""
    add = parser.add_argument
    add_output_folder(add, "The folder for the videos, each with a sidecar beside it.")
    add(
        "--lora-cache",
        type=folder_path,
        metavar="FOLDER",
        help="The folder for fitted LoRAs. By default it is inside the output folder.",
    )
    add("--quiet", action="store_true", help="Show no progress bar.")


def _batch(args: argparse.Namespace) -> None:
    """Make the videos of a manifest."""
    check_model(args.model, args.allow_pickle)
    pipeline_class()  # this comes first, since it switches off log lines that third parties write when imported
    from ..batch.manifest import read_manifest

    jobs = read_manifest(args.manifest, args.output, {**call_arguments(args), "seed": args.seed, "fps": args.fps})
    _work(jobs, args, args.model, chosen_components(args), args.dtype)


def _again(args: argparse.Namespace) -> None:
    """Make the videos of sidecars once more.

    Raises:
        ValueError: The sidecars record several models, ControlNets, CLIPs or precisions.
    """
    pipeline_class()
    from ..batch.manifest import read_sidecars

    jobs = read_sidecars(args.sidecars, args.output)
    recorded = [(job.recorded["model"], job.recorded["stack"]["dtype"]) for job in jobs]
    models = {(model["name"], *map(model.get, COMPONENTS), dtype) for model, dtype in recorded}
    if len(models) > 1:
        raise ValueError(
            f"the sidecars record several models, ControlNets, CLIPs or dtypes, {sorted(models, key=str)}; give one "
            "command for each of them"
        )
    ((model, *names, dtype),) = models
    model = args.model or model
    check_model(model, args.allow_pickle)
    typed = chosen_components(args)
    components = {name: typed[name] or before for name, before in zip(COMPONENTS, names, strict=True)}
    _work(jobs, args, model, components, dtype)


def _work(
    jobs: Sequence[Job],
    args: argparse.Namespace,
    model: str,
    components: Mapping[str, str | None],
    dtype: str | None,
) -> None:
    """Load the model once and do this process's part of the jobs. The main process prints how all jobs ended.

    Args:
        jobs: All jobs of the batch.
        args: The options that both commands have.
        model: The name of the model.
        components: The names of models beside it, as those of `COMPONENTS`; None without one.
        dtype: The precision of the model; by default it depends on the device.

    Raises:
        RuntimeError: Some pairs failed.
        ValueError: A job or the folder for LoRAs is refused, and no job was begun.
    """
    from accelerate import PartialState

    from ..batch.manifest import check_values
    from ..batch.run import run, table
    from ..batch.sidecar import read_failures
    from ..batch.worker import Worker

    start = time.perf_counter()
    if args.lora_cache is not None:
        make_folder(args.lora_cache, "--lora-cache: the folder", writable=False)  # one that has all LoRAs is only read
    with _terminable():
        failures = read_failures(jobs)  # before the processes meet, so that every one of them is of an earlier run
        device = choose_device(args.device)
        state = PartialState(cpu=device.startswith("cpu"))
        if state.num_processes > 1:
            device = state.device.type if state.device.type == "cpu" else str(state.device)
        pipe = load_pipeline(model, dtype, device, args.allow_pickle, **components)
        pipe.set_progress_bar_config(disable=True)
        worker = Worker(pipe, model, args.output, args.lora_cache, components)
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
    """While the context lasts, let SIGTERM end the process through every `finally`, with exit code 143."""
    previous = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
