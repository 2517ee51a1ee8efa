# SPDX-License-Identifier: Apache-2.0
"""Benchmark row "shares": the shares of a run that the parts of matching and that fusing (all splatting) take."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from dreammover_pipeline.flow import match_features, regularise
from dreammover_pipeline.images import load_images
from dreammover_pipeline.records import BidirectionalFlow, Inversion, PreparedPair
from dreammover_pipeline.refinement import refined_flow
from dreammover_pipeline.rigid import similarity_flow

from .counts import DEFAULT, counted_units
from .matching import random_features
from .profiles import Bench
from .report import Table, spread
from .timing import alternate, clock_name


def tables(bench: Bench) -> list[Table]:
    """Tables of the shares measured on the profile's model, and of upper bounds for the counted model."""
    return [measured(bench), bounded(bench)]


def _times(frames: int) -> torch.Tensor:
    """The times δ of so many evenly spread frames."""
    return torch.arange(1, frames + 1) / (frames + 1)


def measured(bench: Bench) -> Table:
    """A table of the shares of matching and of fusing in a run from images to frames, without a LoRA."""
    profile, unit = bench.profile, clock_name(bench.device)
    pair = bench.prepare()
    side = pair.inversion.path.shape[-1]
    channels = bench.pipe.unet.up_blocks[1].resnets[-1].out_channels
    features = random_features(channels, side // 2, bench.device)
    arms = {
        **_matching_arms(bench, features, pair.flow),
        "fuse": lambda: bench.pipe.fuse(pair, _times(profile.frames)),
        "job": lambda: bench.render(bench.prepare()),
    }
    return _table(
        f"Matching and fusing in a job, model {profile.model}, {profile.frames} frames, no LoRA, {profile.few} rounds",
        "measured",
        unit,
        alternate(arms, profile.few, bench.device),
    )


def bounded(bench: Bench) -> Table:
    """A table of upper bounds of both shares, at the counted model's size.

    A run cannot be faster than its FLOPs at the rate of a large matrix product.
    """
    profile, unit = bench.profile, clock_name(bench.device)
    channels, coarse, side = profile.matching
    features = random_features(channels, coarse, bench.device)
    flow = match_features(features, (side, side))
    pair = _sized(bench.prepare(steps=1), flow, side)
    factor = torch.randn(1024, 1024, device=bench.device)
    arms = {
        **_matching_arms(bench, features, flow),
        "fuse": lambda: bench.pipe.fuse(pair, _times(DEFAULT.frames)),
        "product": lambda: factor @ factor,
    }
    seconds = alternate(arms, profile.few, bench.device)
    flops = counted_units(profile.counted, profile.counted_sides[0]).inference(DEFAULT)
    seconds["job"] = [flops * s / (2 * 1024**3) for s in seconds.pop("product")]
    return _table(
        f"Matching and fusing in a job, model {profile.counted}, {DEFAULT.frames} frames, no LoRA",
        "derived",
        unit,
        seconds,
        "Matching and fusing measured at this size; the job's seconds are its counted FLOPs at the measured rate of a "
        "1024³ float32 product, which it cannot beat, so the shares are upper bounds.",
    )


def _matching_arms(bench: Bench, features: torch.Tensor, flow: BidirectionalFlow) -> dict[str, Callable[[], object]]:
    """The three parts of matching on the grid of a flow.

    How long the refinement takes depends on the photos and on the flow: it steps only where colours differ.
    """
    h, w = flow.forward.shape[-2:]
    photos = torch.stack([load_images(image, "a photo")[0] for image in bench.images]).to(features.device)
    return {
        "match": lambda: match_features(features, (h, w)),
        "fit": lambda: regularise(flow, 1, similarity_flow),
        "refine": lambda: refined_flow(flow, photos, 0.1),
    }


def _sized(pair: PreparedPair, flow, side: int) -> PreparedPair:
    """The prepared pair with random latents on a grid of another size, and with a flow on that grid."""
    path, eps = pair.inversion.path, pair.inversion.eps
    path = torch.randn(*path.shape[:-2], side, side, device=path.device)
    eps = torch.randn(*eps.shape[:-2], side, side, device=eps.device)
    return dataclasses.replace(pair, inversion=Inversion(path, eps, pair.inversion.schedule), flow=flow)


def _table(title: str, basis: str, unit: str, seconds: dict[str, list[float]], note: str = "") -> Table:
    rows = []
    for part in ("match", "fit", "refine", "fuse"):
        shares = spread([100 * a / b for a, b in zip(seconds[part], seconds["job"], strict=True)])
        rows.append((part, spread(seconds[part]), spread(seconds["job"]), shares))
    return Table(title, basis, ("part", unit, f"job, {unit}", "share, %"), rows, note)
