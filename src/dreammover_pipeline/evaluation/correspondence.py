# SPDX-License-Identifier: Apache-2.0
"""A study of which features give the best flow.

It varies the UNet's up block, the noise step, the grid that is matched on, the penalty for distance and the smoothing.
No in-between frames are denoised, so a pair takes seconds. A flow is judged by its own error, and by the middle frame
that splatting the clean latents along it gives.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from ..features import up_block_features
from ..fields import pixel_flow, upsampled_flow
from ..flow import distance_bias, join_features, match_features, smooth_flow
from ..framing import unfit
from ..media.files import check_replaceable
from ..pipeline import DreamMoverPipeline
from ..records import BidirectionalFlow, Inversion
from .case import EvaluationCase
from .metrics import endpoint_errors, psnr
from .statistics import estimate
from .suites import Suite

PENALTIES = (0, 0.1)  # values of `distance_penalty`
PASSES = (0, 1, 3)  # values of `flow_smoothing`
PATCH = 3  # side in latent cells of the patches of latents that are matched for comparison
HEAD = "| features | step |"  # how every table begins
METRICS = {"pck05": "PCK@.05", "pck10": "PCK@.1", "epe": "EPE px", "epe_rest": "EPE rest", "splat": "splat PSNR"}


@dataclass(frozen=True)
class Variant:
    """One way to get a flow."""

    features: str  # name of what is matched: an up block, two of them joined, or patches of latents
    step: int  # the step of the inversion at which features are read
    grid: str  # "latent": features are upsampled, then matched; "own": they are matched, then the flow is upsampled
    penalty: float  # the value of `distance_penalty`
    passes: int  # the value of `flow_smoothing`


def study(pipe: DreamMoverPipeline, suites: Sequence[Suite], steps: Sequence[int], quiet: bool = False) -> list[dict]:
    """Measure every variant on every pair, without a LoRA.

    Args:
        pipe: a pipeline with any Stable Diffusion 1.x or 2.x model.
        suites: the suites whose pairs are measured; a pair whose motion is not known is left out.
        steps: the steps of the inversion at which features are matched.
        quiet: whether to hide the progress bar.

    Returns:
        A row for each suite, pair and variant, with the metrics of `METRICS`. Of these, `epe_rest` is the end-point
        error over visible pixels outside the foreground, and `splat` is the PSNR of the middle frame.
    """
    rows = []
    pairs = [(suite, name) for suite in suites for name in suite.pairs]
    for suite, name in tqdm(pairs, desc="Matching", disable=quiet):
        settings = {"inversion_steps": max(steps), "feature_step": 1, "lora_steps": 0}
        case = EvaluationCase(pipe, suite.load(name), 0, settings)
        if case.pair.motion is None:
            continue
        prepared = case.prepared()
        truth = PairTruth(case)
        for variant, flow in _flows(pipe, prepared.inversion, prepared.prompt_embeds, steps):
            rows.append({"suite": suite.name, "pair": name, **vars(variant), "metrics": truth.measured(flow)})
    return rows


def table(rows: Sequence[dict], suite: str) -> str:
    """A Markdown table of means over a suite's pairs with 95 % bootstrap intervals, by falling PSNR of the splat."""
    of_suite = [row for row in rows if row["suite"] == suite]
    by_variant: dict[Variant, list[dict]] = {}
    for row in of_suite:
        variant = Variant(*(row[name] for name in Variant.__dataclass_fields__))
        by_variant.setdefault(variant, []).append(row["metrics"])
    found = {
        variant: [estimate([metrics[name] for metrics in measured]) for name in METRICS]
        for variant, measured in by_variant.items()
    }
    lines = [
        f"{HEAD} grid | penalty | passes | {' | '.join(METRICS.values())} |",
        "|---|" + "--:|" * (4 + len(METRICS)),
    ]
    for variant, estimates in sorted(found.items(), key=lambda item: -item[1][-1].mean):
        cells = [variant.features, variant.step, variant.grid, variant.penalty, variant.passes, *estimates]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def check_places(rows: Path, report: Path) -> None:
    """Raise ValueError if the place of a study's rows or of its report holds anything but those of another study."""
    check_replaceable(rows, _is_row, "the rows")
    check_replaceable(report, _is_beginning, "the report")


def _is_row(content: bytes) -> bool:
    """Whether a file begins with a row of a study."""
    try:
        row = json.loads(content.partition(b"\n")[0])
    except (ValueError, RecursionError):
        return False
    return isinstance(row, dict) and row.keys() >= {"suite", "pair", "features", "metrics"}


def _is_beginning(content: bytes) -> bool:
    """Whether a file begins as a report does: with the name of a suite and its table."""
    return re.match(rf"## \w+\n\n{re.escape(HEAD)}".encode(), content) is not None


@torch.no_grad()
def _flows(
    pipe: DreamMoverPipeline, inversion: Inversion, prompt_embeds: torch.Tensor, steps: Sequence[int]
) -> Iterator[tuple[Variant, BidirectionalFlow]]:
    """Every variant, with the flow that it finds between the two inverted images."""
    size = inversion.path.shape[-2:]
    blocks = range(1, len(pipe.unet.up_blocks))
    for step in steps:
        timestep, latents = inversion.schedule.timestep(step), inversion.path[step]
        features = up_block_features(
            pipe.unet, blocks, lambda z=latents, t=timestep: pipe.predict_noise(z, t, prompt_embeds)
        )
        named = {f"up{block}": part for block, part in zip(blocks, features, strict=True)}
        named |= {"up1+up2": join_features(features[:2], size), f"{PATCH}×{PATCH} latents": _patches(latents)}
        for (name, part), grid, penalty in product(named.items(), ("latent", "own"), PENALTIES):
            own = part.shape[-2:]
            if grid == "own" and own == size:
                continue
            matched = size if grid == "latent" else own
            flow = match_features(part, matched, distance_bias(matched, penalty, part))
            if grid == "own":
                flow = BidirectionalFlow(*(upsampled_flow(way, size) for way in (flow.forward, flow.backward)))
            for passes in PASSES:
                yield Variant(name, step, grid, penalty, passes), smooth_flow(flow, passes)


def _patches(latents: torch.Tensor) -> torch.Tensor:
    """Patches of k × k latents as the features of the cells at their centres, (2, C·k², h, w)."""
    return F.unfold(latents, PATCH, padding=PATCH // 2).unflatten(2, latents.shape[-2:])


class PairTruth:
    """The true motion of a pair, found out once, which any number of flows are measured against.

    Args:
        case: the pair, whose motion is known, and the pipeline that decodes its middle frames.
    """

    def __init__(self, case: EvaluationCase):
        motion = case.pair.motion
        self._case = case
        # For the first and for the last image: the true flow, where that is visible, and where the foreground is.
        self._ways = [
            (motion.flow(*way), motion.visible(*way)[0], motion.foreground(way[0])[0]) for way in ((0, 1), (1, 0))
        ]
        self._middle = motion.frame(0.5)[0]

    @torch.no_grad()
    def measured(self, flow: BidirectionalFlow) -> dict[str, float]:
        """The value of each of `METRICS` for a flow between the images."""
        case = self._case
        sprites, rest = [], []
        for field, (true, seen, sprite) in zip(pixel_flow(flow, case.canvas), self._ways, strict=True):
            sprites.append(endpoint_errors(field.cpu(), true, seen & sprite))
            rest.append(endpoint_errors(field.cpu(), true, seen & ~sprite))
        errors, side = torch.cat(sprites), max(case.canvas.output_height, case.canvas.output_width)
        latents = case.pipe.preview(replace(case.prepared(), flow=flow), torch.tensor([0.5]))
        middle = unfit(case.pipe.decode_latents(latents).cpu(), case.canvas)[0]
        return {
            "pck05": float((errors <= 0.05 * side).float().mean()),
            "pck10": float((errors <= 0.1 * side).float().mean()),
            "epe": float(errors.mean()),
            "epe_rest": float(torch.cat(rest).mean()),
            "splat": psnr(middle, self._middle),
        }
