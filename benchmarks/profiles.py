# SPDX-License-Identifier: Apache-2.0
"""How much of what is measured: minutes on one core, ten minutes on one GPU, or seconds to see that it runs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from PIL import Image

from dreammover_pipeline import DreamMoverPipeline
from dreammover_pipeline.records import PreparedPair

from .counting import Job
from .models import load_pipeline

ROOT = Path(__file__).resolve().parent.parent
PHOTOS = ROOT / "examples" / "robot"
PROMPT = "a robot"


@dataclass(frozen=True)
class Profile:
    """What `run.py` does. `model` is measured; `counted` is only counted, on fake tensors."""

    model: str
    device: str
    dtype: torch.dtype
    other_dtype: torch.dtype  # the other arm of the precision row
    rows: tuple[str, ...]
    rounds: int  # of the overhead ratios
    few: int  # rounds of everything else
    frames: int
    chunk: int  # frames at once
    steps: int  # T, of a schedule of 50
    lora_steps: int
    counted: str
    counted_sides: tuple[int, ...]  # pixels
    counted_jobs: tuple[Job, ...]  # run and counted on `model`
    scaling_frames: tuple[int, ...]
    scaling_sides: tuple[int, ...]  # pixels
    scaling_steps: int  # T of the rows on scaling
    memory_frames: tuple[int, ...]  # ascending, at `memory_chunks[0]`
    memory_chunks: tuple[int, ...]  # ascending
    memory_side: int  # pixels
    loop_cells: int  # timed cells of the double loop
    matching: tuple[int, int, int]  # channels, side of the features, side of the grid
    compiler: str  # backend of torch.compile


ROWS = (
    "counts",
    "overhead",
    "stages",
    "released",
    "matching",
    "precision",
    "memory",
    "scaling",
    "shares",
    "compile",
)
ON_CPU = tuple(name for name in ROWS if name not in ("stages", "precision"))
ON_GPU = tuple(name for name in ROWS if name not in ("counts", "shares"))

PROFILES = {
    "cpu": Profile(
        model="tiny",
        device="cpu",
        dtype=torch.float32,
        other_dtype=torch.bfloat16,
        rows=ON_CPU,
        rounds=15,
        few=3,
        frames=8,  # few, and few steps: what a job does once is divided by the least work
        chunk=8,
        steps=10,
        lora_steps=10,
        counted="sd15",
        counted_sides=(512, 768, 1024),
        counted_jobs=(Job(32, 6, 8), Job(8, 12, 8), Job(5, 6, 2), Job(8, 6, 8, 10)),
        scaling_frames=(8, 16, 32, 64),
        scaling_sides=(128, 192, 256),
        scaling_steps=5,
        memory_frames=(4, 16, 48),
        memory_chunks=(4, 8, 16, 32),
        memory_side=256,
        loop_cells=64,
        matching=(1280, 32, 64),
        compiler="eager",
    ),
    "gpu": Profile(
        model="sd15",
        device="cuda",
        dtype=torch.float16,
        other_dtype=torch.float32,
        rows=ON_GPU,
        rounds=5,
        few=3,
        frames=32,
        chunk=16,
        steps=30,
        lora_steps=80,
        counted="sd15",
        counted_sides=(512, 768, 1024),
        counted_jobs=(),
        scaling_frames=(8, 16, 32, 64),
        scaling_sides=(512, 768, 1024),
        scaling_steps=30,
        memory_frames=(1, 8, 32, 64),
        memory_chunks=(1, 2, 4, 8, 16, 34),
        memory_side=512,
        loop_cells=64,
        matching=(1280, 32, 64),
        compiler="inductor",
    ),
    "smoke": Profile(
        model="micro",
        device="cpu",
        dtype=torch.float32,
        other_dtype=torch.bfloat16,
        rows=tuple(name for name in ROWS if name != "compile"),  # which takes a minute
        rounds=1,
        few=1,
        frames=3,
        chunk=2,
        steps=1,
        lora_steps=1,
        counted="micro",
        counted_sides=(64,),
        counted_jobs=(Job(3, 1, 2, 1),),
        scaling_frames=(1, 3),
        scaling_sides=(64,),
        scaling_steps=1,
        memory_frames=(2, 4),
        memory_chunks=(2, 8),
        memory_side=64,
        loop_cells=4,
        matching=(16, 4, 8),
        compiler="eager",
    ),
}
# a job as long as the defaults make it, for what the few frames and steps of "cpu" make too much of
PROFILES["whole"] = replace(PROFILES["cpu"], rows=("overhead",), rounds=3, frames=32, steps=30, lora_steps=40)


@dataclass(frozen=True)
class Bench:
    """A profile, and its pipeline, loaded when it is first needed."""

    name: str

    @property
    def profile(self) -> Profile:
        return PROFILES[self.name]

    @property
    def device(self) -> torch.device:
        return torch.device(self.profile.device)

    @cached_property
    def pipe(self) -> DreamMoverPipeline:
        return load_pipeline(self.profile.model, self.device, self.profile.dtype)

    @cached_property
    def images(self) -> list[Image.Image]:
        """The example pair at the model's own size."""
        side = self.pipe.unet.config.sample_size * self.pipe.vae_scale_factor
        return [Image.open(PHOTOS / f"{i}.png").convert("RGB").resize((side, side)) for i in (0, 1)]

    def prepare(self, lora_steps: int = 0, side: int | None = None, steps: int | None = None) -> PreparedPair:
        """The example pair, prepared; `side` in pixels, by default the model's own, `steps` the profile's."""
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
        """Its frames, as a tensor."""
        return self.pipe.render(
            pair,
            n_frames=frames or self.profile.frames,
            frame_batch_size=chunk or self.profile.chunk,
            **{"output_type": "pt"} | options,
        ).frames[0]
