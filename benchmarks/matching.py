# SPDX-License-Identifier: Apache-2.0
"""Benchmark row "matching": a Python loop over cells, as in the authors' released code, against one matrix product."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from dreammover_pipeline.flow import match_features

from .profiles import Bench
from .report import Table, ratio, spread
from .timing import alternate, clock_name


def tables(bench: Bench) -> list[Table]:
    """A table of the time of both, and of how many matches agree; the loop's time is extrapolated from some cells."""
    profile, unit = bench.profile, clock_name(bench.device)
    channels, coarse, side = profile.matching
    features = random_features(channels, coarse, bench.device)
    upsampled = F.interpolate(features, size=(side, side), mode="bilinear", align_corners=False)
    generator = torch.Generator().manual_seed(1)
    cells = [divmod(i, side) for i in torch.randperm(side * side, generator=generator)[: profile.loop_cells].tolist()]
    flow = match_features(features, (side, side))
    loops = (match_by_loop(*upsampled, cells), match_by_loop(*upsampled.flip(0), cells))
    same = sum(
        (i + int(field[0, 1, i, j]), j + int(field[0, 0, i, j])) == match
        for field, matches in zip((flow.forward, flow.backward), loops, strict=True)
        for (i, j), match in zip(cells, matches, strict=True)
    )
    arms = {
        "loop": lambda: match_by_loop(*upsampled, cells),
        "product": lambda: match_features(features, (side, side)),
    }
    seconds = alternate(arms, profile.few, bench.device)
    product = seconds["product"]
    all_cells = 2 * side * side / profile.loop_cells
    loop = [all_cells * s for s in seconds["loop"]]
    return [
        Table(
            f"Matching {side}×{side} cells both ways, {channels} channels, {profile.few} rounds",
            "measured",
            (f"loop, extrapolated, {unit}", f"match_features, {unit}", "ratio", "same matches"),
            [(spread(loop), spread(product), ratio(loop, product), f"{same} of {2 * len(cells)}")],
            f"The loop is timed on {len(cells)} cells and multiplied to 2·{side}²; `match_features` is timed whole, "
            "upsampling and both directions included.",
        )
    ]


def random_features(channels: int, side: int, device: torch.device) -> torch.Tensor:
    """Random features, (2, C', h', w') float32; how long matching takes does not depend on their values."""
    return torch.randn(2, channels, side, side, generator=torch.Generator().manual_seed(0)).to(device)


def match_by_loop(source: torch.Tensor, target: torch.Tensor, cells: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Find the most similar target cell of some source cells, one after the other.

    Args:
        source: features of the cells to match, (C, h, w).
        target: features of the cells to match with, (C, h, w).
        cells: row and column in the source of each cell to match.

    Returns:
        Row and column in the target of each match.
    """
    width = target.shape[-1]
    matches = []
    for i, j in cells:
        similarity = F.cosine_similarity(source[:, i, j, None, None], target, dim=0)
        matches.append(divmod(similarity.argmax().item(), width))
    return matches
