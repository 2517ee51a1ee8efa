# SPDX-License-Identifier: Apache-2.0
"""Profiles: what is measured how often, minutes on one core, eight on one GPU, or seconds as a test."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from PIL import Image

from dreammover_pipeline import DreamMoverPipeline
from dreammover_pipeline.records import PreparedPair

from .counting import Workload
from .models import load_pipeline

ROOT = Path(__file__).resolve().parent.parent
PHOTOS = ROOT / "examples" / "robot"
PROMPT = "a robot"


@dataclass(frozen=True)
class Profile:
    """What `run.py` measures and counts."""

    model: str  # name of the model that is run and measured
    device: str  # device that it is run on
    dtype: torch.dtype  # precision that it is run in
    other_dtype: torch.dtype  # precision that the row "precision" compares with
    rows: tuple[str, ...]  # names of the rows that are run by default
    rounds: int  # rounds of the rows "overhead" and "precision"
    few: int  # rounds of all other timings
    frames: int  # in-between frames of a run
    chunk: int  # largest number of frames in one UNet call
    steps: int  # inversion steps T, of a schedule of 50
    lora_steps: int  # steps of the LoRA fit, but in the row "job"
    job_lora_steps: int  # steps of the LoRA fit in the row "job"
    counted: str  # name of the model that is only counted, on fake tensors
    counted_sides: tuple[int, ...]  # sides in pixels at which it is counted
    counted_workloads: tuple[Workload, ...]  # workloads that are run and counted on `model`
    scaling_frames: tuple[int, ...]  # numbers of frames of the row "scaling"
    scaling_sides: tuple[int, ...]  # sides in pixels of the row "scaling"
    scaling_steps: int  # inversion steps T of the row "scaling"
    memory_frames: tuple[int, ...]  # numbers of frames of the row "memory", ascending, in chunks of `memory_chunks[0]`
    memory_chunks: tuple[int, ...]  # numbers of frames at once of the row "memory", ascending
    memory_side: int  # side in pixels of the row "memory"
    cards: tuple[int, ...]  # row "cards": GB of memory of the cards
    loop_cells: int  # number of cells that the row "matching" times in a Python loop
    matching: tuple[int, int, int]  # row "matching": number of channels, side of the features, side of the grid
    photo_points: tuple[tuple[int, int], ...]  # row "photos": (side in pixels, number of frames), from small to large
    compiler: str  # backend of torch.compile in the row "compile"
    compiled_chunks: tuple[int, ...]  # largest numbers of frames in one UNet call at which the row "compile" is timed


ROWS = (
    "counts",
    "job",
    "overhead",
    "recording",
    "kernels",
    "channels_last",
    "stages",
    "released",
    "matching",
    "precision",
    "memory",
    "cards",
    "scaling",
    "shares",
    "photos",
    "compile",
)
FOR_GPUS = ("job", "recording", "kernels", "channels_last", "stages", "precision", "cards")
ON_CPU = tuple(name for name in ROWS if name not in FOR_GPUS)
# Other rows are run by name; these are meant to take eight minutes.
ON_GPU = ("job", "recording", "kernels", "channels_last", "cards", "overhead", "memory", "compile")

PROFILES = {
    "cpu": Profile(
        model="tiny",
        device="cpu",
        dtype=torch.float32,
        other_dtype=torch.bfloat16,
        rows=ON_CPU,
        rounds=15,
        few=3,
        frames=8,  # few frames and few steps, so that what a run does only once weighs as much as it ever does
        chunk=8,
        steps=10,
        lora_steps=10,
        job_lora_steps=80,
        counted="sd15",
        counted_sides=(512, 768, 1024),
        counted_workloads=(Workload(32, 6, 8), Workload(8, 12, 8), Workload(5, 6, 2), Workload(8, 6, 8, 10)),
        scaling_frames=(8, 16, 32, 64),
        scaling_sides=(128, 192, 256),
        scaling_steps=5,
        memory_frames=(4, 16, 48),
        memory_chunks=(4, 8, 16, 32),
        memory_side=256,
        cards=(4, 6, 8, 12, 16),
        loop_cells=64,
        matching=(1280, 32, 64),
        photo_points=((1024, 2), (2048, 2), (2048, 8), (4096, 2), (4096, 4), (8192, 2), (8192, 4)),
        compiler="eager",
        compiled_chunks=(8,),
    ),
    "gpu": Profile(
        model="sd15",
        device="cuda",
        dtype=torch.float16,
        other_dtype=torch.float32,
        rows=ON_GPU,
        rounds=2,
        few=2,
        frames=32,
        chunk=16,
        steps=30,
        lora_steps=20,
        job_lora_steps=80,
        counted="sd15",
        counted_sides=(512, 768, 1024),
        counted_workloads=(),
        scaling_frames=(8, 16, 32, 64),
        scaling_sides=(512, 768, 1024),
        scaling_steps=30,
        memory_frames=(1, 8, 32, 64),
        memory_chunks=(1, 2, 4, 8, 16, 32),
        memory_side=512,
        cards=(4, 6, 8, 12, 16),
        loop_cells=64,
        matching=(1280, 32, 64),
        photo_points=((1024, 2), (2048, 2), (2048, 8), (4096, 2), (4096, 8)),
        compiler="inductor",
        compiled_chunks=(32, 16),
    ),
    "smoke": Profile(
        model="micro",
        device="cpu",
        dtype=torch.float32,
        other_dtype=torch.bfloat16,
        # The row "compile" would take a minute, and torch's profiler takes seconds to add up a CPU's operations.
        rows=tuple(name for name in ROWS if name not in ("compile", "kernels")),
        rounds=1,
        few=1,
        frames=3,
        chunk=2,
        steps=1,
        lora_steps=1,
        job_lora_steps=2,
        counted="micro",
        counted_sides=(64,),
        counted_workloads=(Workload(3, 1, 2, 1),),
        scaling_frames=(1, 3),
        scaling_sides=(64,),
        scaling_steps=1,
        memory_frames=(2, 4),
        memory_chunks=(2, 8),
        memory_side=64,
        cards=(4,),
        loop_cells=4,
        matching=(16, 4, 8),
        photo_points=((128, 2),),  # since every point takes two processes
        compiler="eager",
        compiled_chunks=(2,),
    ),
}
# Runs as long as the pipeline's defaults make them, since what is done only once weighs too much in the runs of "cpu".
PROFILES["whole"] = replace(PROFILES["cpu"], rows=("overhead",), rounds=3, frames=32, steps=30, lora_steps=40)


@dataclass(frozen=True)
class Bench:
    """A profile with its pipeline, which is loaded when it is first needed."""

    name: str  # the profile's name in PROFILES

    @property
    def profile(self) -> Profile:
        """The profile of this name."""
        return PROFILES[self.name]

    @property
    def device(self) -> torch.device:
        """The device that everything runs on."""
        return torch.device(self.profile.device)

    @cached_property
    def pipe(self) -> DreamMoverPipeline:
        """The pipeline of the profile's model."""
        return load_pipeline(self.profile.model, self.device, self.profile.dtype)

    @cached_property
    def images(self) -> list[Image.Image]:
        """The example pair, at the size that the model was made for."""
        side = self.pipe.unet.config.sample_size * self.pipe.vae_scale_factor
        return [Image.open(PHOTOS / f"{i}.png").convert("RGB").resize((side, side)) for i in (0, 1)]

    def prepare(self, lora_steps: int = 0, side: int | None = None, steps: int | None = None) -> PreparedPair:
        """Prepare the example pair.

        Args:
            lora_steps: steps of the LoRA fit; 0 fits none.
            side: side of the images in pixels; None takes the size that the model was made for.
            steps: inversion steps; None takes the profile's.
        """
        steps = steps or self.profile.steps
        return self.pipe.prepare(
            *self.images,
            prompt=PROMPT,
            height=side,
            width=side,
            inversion_steps=steps,
            feature_step=min(14, steps),
            lora_steps=lora_steps,
            generator=torch.Generator().manual_seed(0),
        )

    def render(self, pair: PreparedPair, frames: int | None = None, chunk: int | None = None, **options):
        """Render frames of a prepared pair.

        Args:
            pair: the prepared pair.
            frames: number of frames; None takes the profile's.
            chunk: largest number of frames in one UNet call; None takes the profile's.
            options: other arguments of the pipeline's `render`. By default frames are a tensor and upsampled, since
                diffusion is what is measured.
        """
        return self.pipe.render(
            pair,
            n_frames=frames or self.profile.frames,
            frame_batch_size=chunk or self.profile.chunk,
            **{"output_type": "pt", "detail": "upsampled"} | options,
        ).frames[0]
