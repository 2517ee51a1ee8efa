# SPDX-License-Identifier: Apache-2.0
"""All metrics of the frames that one method made of one pair."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch

from ..fields import pixel_flow
from ..records import BidirectionalFlow, Canvas
from .metrics import (
    consistent,
    endpoint_errors,
    high_frequency_energy,
    psnr,
    ssim,
    warping_error,
)
from .networks import Tools
from .suites import Pair

# For each metric, in the order of the report's columns, which values are better. `fid` belongs to a whole suite.
BETTER = {
    "psnr": "higher",
    "psnr_mid": "higher",
    "psnr_fg": "higher",
    "psnr_fg_mid": "higher",
    "ssim": "higher",
    "ssim_mid": "higher",
    "lpips": "lower",
    "lpips_mid": "lower",
    "epe": "lower",
    "pck05": "higher",
    "pck10": "higher",
    "we_true": "lower",
    "we_true_mid": "lower",
    "fid": "lower",
    "lpips_inputs": "lower",
    "we": "lower",
    "we_mid": "lower",
    "high_frequency": "nearer 1",
}


def score(
    pair: Pair,
    ends: Sequence[torch.Tensor],
    frames: torch.Tensor,
    flow: BidirectionalFlow | None,
    canvas: Canvas,
    tools: Tools,
) -> dict[str, float | None]:
    """Every metric that the pair and the tools allow.

    Args:
        pair: the pair that was interpolated, with its truth where that is known.
        ends: the two images at the size of the frames, (3, H, W) each.
        frames: the frames at `pair.times`, (F, 3, H, W).
        flow: the flow that the frames were made with, if they were made with one.
        canvas: the canvas that the pair was fitted to for the models.
        tools: the optical flow and the networks to measure with.

    Returns:
        A value for each name in `BETTER` except `fid`; None for a metric that does not apply or is not available.
    """
    found = {
        **_against_truth(pair, frames, tools),
        **_flow_errors(pair, flow, canvas),
        **_true_warping(pair, ends, frames),
        **_without_truth(pair, ends, frames, tools),
    }
    return {name: _number(found.get(name)) for name in BETTER if name != "fid"}


def middle(times: Sequence[float]) -> int:
    """Index of the frame whose time is nearest to 0.5; if two are as near, the earlier one."""
    return min(range(len(times)), key=lambda i: (abs(times[i] - 0.5), i))


def _number(value: float | None) -> float | None:
    """A value as it is written to a run: None if it is missing or not finite."""
    return None if value is None or not math.isfinite(value) else value


def _mean(values: Sequence[float]) -> float:
    """The mean of all finite values; NaN if there are none."""
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan


def _all_and_mid(name: str, values: Sequence[float], times: Sequence[float]) -> dict[str, float]:
    """A metric as a mean over all frames and for the middle frame alone."""
    return {name: _mean(values), f"{name}_mid": values[middle(times)]}


def _against_truth(pair: Pair, frames: torch.Tensor, tools: Tools) -> dict[str, float]:
    if pair.truth is None:
        return {}
    couples = list(zip(frames, pair.truth, strict=True))
    found = {
        **_all_and_mid("psnr", [psnr(*couple) for couple in couples], pair.times),
        **_all_and_mid("ssim", [ssim(*couple) for couple in couples], pair.times),
    }
    if tools.lpips is not None:
        found |= _all_and_mid("lpips", tools.lpips(frames, pair.truth).tolist(), pair.times)
    if pair.motion is not None:
        masks = [pair.motion.foreground(time)[0] for time in pair.times]
        inside = [psnr(*couple, mask) for couple, mask in zip(couples, masks, strict=True)]
        found |= _all_and_mid("psnr_fg", inside, pair.times)
    return found


def _flow_errors(pair: Pair, flow: BidirectionalFlow | None, canvas: Canvas) -> dict[str, float]:
    if pair.motion is None or flow is None:
        return {}
    errors = []
    for field, (source, target) in zip(pixel_flow(flow, canvas), ((0, 1), (1, 0)), strict=True):
        where = pair.motion.foreground(source)[0] & pair.motion.visible(source, target)[0]
        errors.append(endpoint_errors(field.cpu(), pair.motion.flow(source, target), where))
    errors = torch.cat(errors)
    side = max(canvas.output_height, canvas.output_width)
    shares = {f"pck{percent:02d}": float((errors <= percent / 100 * side).float().mean()) for percent in (5, 10)}
    return {"epe": float(errors.mean()), **shares}


def _steps(pair: Pair, ends: Sequence[torch.Tensor], frames: torch.Tensor) -> tuple[list, list]:
    """The pairs of (time, image) that warping errors compare.

    Returns:
        All pairs of neighbours in time, the two inputs included; and the middle frame with each of the two inputs.
    """
    moments = [(0.0, ends[0]), *zip(pair.times, frames, strict=True), (1.0, ends[1])]
    centre = moments[1 + middle(pair.times)]
    return list(pairwise(moments)), [(centre, moments[0]), (centre, moments[-1])]


def _true_warping(pair: Pair, ends: Sequence[torch.Tensor], frames: torch.Tensor) -> dict[str, float]:
    if pair.motion is None:
        return {}

    def error(first, second):
        (source, image), (target, other) = first, second
        return warping_error(image, other, pair.motion.flow(source, target), pair.motion.visible(source, target)[0])

    neighbours, mid = _steps(pair, ends, frames)
    return {
        "we_true": _mean([error(*step) for step in neighbours]),
        "we_true_mid": _mean([error(*step) for step in mid]),
    }


def _without_truth(pair: Pair, ends: Sequence[torch.Tensor], frames: torch.Tensor, tools: Tools) -> dict[str, float]:
    def error(first, second):
        (_, image), (_, other) = first, second
        forward, backward = tools.flow(image, other), tools.flow(other, image)
        return warping_error(image, other, forward, consistent(forward, backward))

    neighbours, mid = _steps(pair, ends, frames)
    energy = [high_frequency_energy(end) for end in ends]
    found = {
        "we": _mean([error(*step) for step in neighbours]),
        "we_mid": _mean([error(*step) for step in mid]),
        "high_frequency": _mean(
            [
                high_frequency_energy(frame) / max((1 - time) * energy[0] + time * energy[1], 1e-9)
                for time, frame in zip(pair.times, frames, strict=True)
            ]
        ),
    }
    if tools.lpips is not None:
        distances = torch.cat([tools.lpips(frames, end.expand_as(frames)) for end in ends])
        found["lpips_inputs"] = float(distances.mean())
    return found
