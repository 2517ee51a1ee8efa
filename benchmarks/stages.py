# SPDX-License-Identifier: Apache-2.0
"""Benchmark rows "stages" and "precision": seconds of every stage of a run, and of a UNet call in two precisions.

The figures are of interest on GPUs, but both rows run on any device.
"""

from __future__ import annotations

import torch

from dreammover_pipeline.flow import match_features

from .counting import BareCalls
from .matching import random_features
from .models import load_pipeline
from .profiles import Bench
from .report import Table, ratio, spread
from .timing import alternate, clock_name


def tables(bench: Bench) -> list[Table]:
    """A table of the seconds that each stage of a run takes."""
    profile, pipe = bench.profile, bench.pipe
    pair = bench.prepare()
    images, clean = torch.stack(pair.images), pair.inversion.path[0]
    side = clean.shape[-1]
    features = random_features(pipe.unet.up_blocks[1].resnets[-1].out_channels, side // 2, bench.device)
    times = torch.arange(1, profile.frames + 1) / (profile.frames + 1)
    no_grad = torch.no_grad()
    arms = {
        "text": no_grad(lambda: pipe.encode_prompt([""], bench.device)),
        "encode 2 images": no_grad(lambda: pipe.encode_images(images)),
        "prepare, no LoRA": bench.prepare,
        f"prepare, {profile.lora_steps} LoRA steps": lambda: bench.prepare(profile.lora_steps),
        "match": lambda: match_features(features, (side, side)),
        "fuse": lambda: pipe.fuse(pair, times),
        f"fuse and denoise {profile.frames} frames": lambda: bench.render(pair, output_type="latent"),
        "decode a frame": no_grad(lambda: pipe.decode_latents(clean[:1])),
        f"render {profile.frames} frames": lambda: bench.render(pair),
    }
    seconds = alternate(arms, profile.few, bench.device)
    return [
        Table(
            f"Stages, model {profile.model}, {profile.dtype}, T = {profile.steps}, {profile.few} rounds",
            "measured",
            ("stage", clock_name(bench.device)),
            [(name, spread(values)) for name, values in seconds.items()],
        )
    ]


def precision(bench: Bench) -> list[Table]:
    """A table of the seconds of one UNet call on a batch of frames, in both precisions of the profile."""
    profile, unit = bench.profile, clock_name(bench.device)
    cells = bench.prepare(steps=1).inversion.path.shape[-1]
    arms = {}
    for dtype in (profile.dtype, profile.other_dtype):
        pipe = bench.pipe if dtype == profile.dtype else load_pipeline(profile.model, bench.device, dtype)
        calls = BareCalls(pipe.unet, pipe.vae, pipe.text_encoder, cells * pipe.vae_scale_factor)
        arms[str(dtype)] = torch.no_grad()(lambda calls=calls: calls.call_unet(profile.chunk))
    seconds = alternate(arms, profile.rounds, bench.device)
    first, second = seconds.values()
    return [
        Table(
            f"Precision, one UNet call on {profile.chunk} frames, model {profile.model}, {profile.rounds} rounds",
            "measured",
            (*(f"{name}, {unit}" for name in arms), "second / first"),
            [(spread(first), spread(second), ratio(second, first))],
        )
    ]
