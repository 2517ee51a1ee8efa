# SPDX-License-Identifier: Apache-2.0
"""Benchmark rows "job", "recording", "channels_last" and "cards", which are of interest on a GPU, but run anywhere.

"job" is a job as the defaults make it; "recording" is what is gained by recording kernels as CUDA graphs, and what it
costs that the bits of a fit repeat; "channels_last" is what is gained by the memory layout of that name, in which
cuDNN computes, and in which a user can put the models; "cards" is whether smaller cards suffice.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from unittest import mock

import torch

from dreammover_pipeline import denoiser, finishing, noise_training
from dreammover_pipeline.lora import LoraFit, fit_pair_lora
from dreammover_pipeline.memory import free_cache
from dreammover_pipeline.records import PreparedPair

from .overhead import RANK, RATE
from .profiles import PROMPT, Bench
from .report import Table, ratio, spread
from .timing import alternate, clock, clock_name

MIB = 2**20  # bytes
CARD_FRAMES, CARD_STEPS = 33, 2  # frames and steps of a job on a smaller card; memory does not depend on the steps
DRIVER = 512  # MiB of a card that torch does not get


def job(bench: Bench) -> list[Table]:
    """A table of the seconds of the parts of a job as the defaults make it, and of its peak memory."""
    profile, pipe = bench.profile, bench.pipe
    pair = bench.prepare(steps=1)
    fitted = bench.prepare(1)
    settings = {"inversion_steps": profile.steps, "feature_step": min(14, profile.steps), "prompt": PROMPT}
    arms = {
        f"LoRA fit, {profile.job_lora_steps} steps": lambda: fit(bench, pair, profile.job_lora_steps),
        "prepare, without the fit": bench.prepare,
        f"render {profile.frames} frames": lambda: pipe.render(fitted, n_frames=profile.frames),
        "the whole job": lambda: pipe(
            *bench.images, n_frames=profile.frames, lora_steps=profile.job_lora_steps, **settings
        ),
    }
    seconds = alternate(arms, profile.few, bench.device)
    rows = [(name, spread(values)) for name, values in seconds.items()]
    note = "Images are PIL images with the detail of the photos; batches are as large as the pipeline takes them."
    if bench.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        arms["the whole job"]()
        peaks = torch.cuda.max_memory_allocated() / MIB, torch.cuda.max_memory_reserved() / MIB
        note += f" Peak memory of the job: {peaks[0]:.0f} MiB allocated, {peaks[1]:.0f} MiB reserved."
    title = f"A default job, model {profile.model}, {profile.dtype}, T = {profile.steps}, {profile.few} rounds"
    return [Table(title, "measured", ("part", clock_name(bench.device)), rows, note)]


def recording(bench: Bench) -> list[Table]:
    """Tables of the fit, `prepare` and the pictures with and without records, and of the bits of a second fit."""
    profile, pair, unit = bench.profile, bench.prepare(steps=1), clock_name(bench.device)
    fits = {
        "recorded": lambda: fit(bench, pair, profile.lora_steps),
        "step by step": lambda: _without_records(lambda: fit(bench, pair, profile.lora_steps)),
        "recorded, with the fused attention's gradients": lambda: _with_fused_gradients(
            lambda: fit(bench, pair, profile.lora_steps)
        ),
    }

    def render() -> object:
        return bench.pipe.render(pair, n_frames=profile.frames)

    prepares = {"recorded": bench.prepare, "call by call": lambda: _without_records(bench.prepare)}
    results = {name: [] for name in fits}
    arms = {name: lambda name=name: results[name].append(fits[name]()) for name in fits}
    seconds = alternate(arms, profile.few, bench.device)
    rows = []
    for name, (first, *others) in results.items():
        same = all(torch.equal(first[key], other[key]) for other in others for key in first)
        rows.append((name, spread(seconds[name]), ratio(seconds[name], seconds["recorded"]), "yes" if same else "no"))
    preparing = alternate(prepares, profile.few, bench.device)
    renders = {"recorded": render, "one by one": lambda: _without_records(render)}
    rendering = alternate(renders, profile.few, bench.device)
    title = f"model {profile.model}, {profile.few} rounds"
    return [
        Table(
            f"LoRA fit of {profile.lora_steps} steps, {title}",
            "measured",
            ("fit", unit, "of the first", "bits repeat"),
            rows,
            "Recording is part of the time. On a CPU nothing is recorded.",
        ),
        Table(
            f"Prepare without a fit, T = {profile.steps}, {title}",
            "measured",
            ("inversion", unit, "of the first"),
            [(name, spread(values), ratio(values, preparing["recorded"])) for name, values in preparing.items()],
        ),
        Table(
            f"Render {profile.frames} frames in one step, {title}",
            "measured",
            ("the photos' detail", unit, "of the first"),
            [(name, spread(values), ratio(values, rendering["recorded"])) for name, values in rendering.items()],
            "One call of the UNet for every batch of frames, decoding, and the photos' detail.",
        ),
    ]


def channels_last(bench: Bench) -> list[Table]:
    """A table of the seconds of the parts of a job with the models' weights in either memory layout."""
    profile, unit = bench.profile, clock_name(bench.device)

    def put_into(layout: torch.memory_format) -> None:
        for model in (bench.pipe.unet, bench.pipe.vae):
            model.to(memory_format=layout)

    def in_layout(layout: torch.memory_format, work: Callable[[], object]) -> None:
        put_into(layout)
        work()

    layouts, rows = (torch.contiguous_format, torch.channels_last), []
    try:
        for name, work in parts_of_a_job(bench).items():
            arms = {str(layout): partial(in_layout, layout, work) for layout in layouts}
            as_it_is, other = alternate(arms, profile.few, bench.device).values()
            rows.append((name, spread(as_it_is), spread(other), ratio(as_it_is, other)))
    finally:
        put_into(torch.contiguous_format)
    return [
        Table(
            f"Memory layout of the models, model {profile.model}, {profile.dtype}, {profile.few} rounds",
            "measured",
            ("part", f"contiguous, {unit}", f"channels last, {unit}", "first / second"),
            rows,
            "Putting the models into a layout is part of the time.",
        )
    ]


def parts_of_a_job(bench: Bench) -> dict[str, Callable[[], object]]:
    """What does each part of a job by itself, by the names of the parts."""
    setup, pair = bench.profile, bench.prepare(steps=1)
    return {
        f"LoRA fit, {setup.lora_steps} steps": lambda: fit(bench, pair, setup.lora_steps),
        "prepare, without the fit": bench.prepare,
        f"render {setup.frames} frames in one step": lambda: bench.pipe.render(pair, n_frames=setup.frames),
    }


def fit(bench: Bench, pair: PreparedPair, steps: int) -> dict[str, torch.Tensor]:
    """Fit the LoRA of a prepared pair anew."""
    clean, alphas = pair.inversion.path[0], bench.pipe.scheduler.alphas_cumprod
    return fit_pair_lora(bench.pipe.unet, clean, pair.prompt_embeds, alphas, LoraFit(steps, RANK, RATE), seed=0)


def _without_records(work: Callable[[], object]) -> object:
    with (
        mock.patch.object(noise_training, "only_kernels", return_value=False),
        mock.patch.object(denoiser, "only_kernels", return_value=False),
        mock.patch.object(finishing.FrameMaker, "_records", return_value=False),
    ):
        return work()


def _with_fused_gradients(work: Callable[[], object]) -> object:
    with mock.patch.object(noise_training, "repeatable_attention", return_value=nullcontext()):
        return work()


def cards(bench: Bench) -> Iterator[Table]:
    """A table for every size, of jobs on smaller cards: torch is given as much memory of this one as they have."""
    profile, now = bench.profile, clock(bench.device)
    for side in profile.counted_sides:
        rows = []
        for card in profile.cards:
            start = now()
            with _limited_to(card * 1024 - DRIVER, bench.device), _warnings() as warnings:
                result = _made_on_a_card(bench, side)
            rows.append((f"{card} GB", result, now() - start, " ".join(warnings) or "–"))
        yield Table(
            f"{CARD_FRAMES} frames at {side}² on smaller cards, model {profile.model}, {profile.dtype}",
            "measured",
            ("card", "result", clock_name(bench.device), "fallbacks, in the pipeline's words"),
            rows,
            f"{DRIVER} MiB of each card are left to the driver. T = {CARD_STEPS}, a single step of the fit.",
        )


def _made_on_a_card(bench: Bench, side: int) -> str:
    """What comes of a job with so little memory."""
    try:
        bench.pipe(
            *bench.images,
            height=side,
            width=side,
            n_frames=CARD_FRAMES,
            inversion_steps=CARD_STEPS,
            feature_step=1,
            lora_steps=1,
            output_type="pt",
        )
        return "made"
    except torch.OutOfMemoryError as error:
        return str(error)


@contextmanager
def _limited_to(mebibytes: int, device: torch.device) -> Iterator[None]:
    """Have a GPU look as if it had so much memory while the context lasts; a CPU is left alone."""
    if device.type != "cuda":
        yield
        return
    free_cache(device)
    limit, total = mebibytes * MIB, torch.cuda.get_device_properties(device).total_memory

    def mem_get_info(device: torch.device | None = None) -> tuple[int, int]:
        return max(limit - torch.cuda.memory_reserved(device), 0), limit

    torch.cuda.set_per_process_memory_fraction(limit / total)
    try:
        with mock.patch.object(torch.cuda, "mem_get_info", mem_get_info):
            yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        free_cache(device)


@contextmanager
def _warnings() -> Iterator[list[str]]:
    """Collect what the pipeline warns of while the context lasts."""
    messages: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    logger, collector = logging.getLogger("dreammover_pipeline"), Collector(logging.WARNING)
    logger.addHandler(collector)
    try:
        yield messages
    finally:
        logger.removeHandler(collector)
