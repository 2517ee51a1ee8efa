# SPDX-License-Identifier: Apache-2.0
"""Ceilings: methods that are told something true of a pair, which shows what knowing it would be worth."""

from __future__ import annotations

from functools import cache

import torch

from ..fields import flow_at_cell_centres
from ..framing import fit
from ..fusion import fuse_high_level
from ..paths import MotionPaths, rigid_paths
from ..records import BidirectionalFlow, PreparedPair
from .case import EvaluationCase, Result


def with_true_flow(case: EvaluationCase) -> PreparedPair:
    """The prepared pair with the true flow between the two images."""
    return case.with_flow(case.pair.motion.flow(0, 1), case.pair.motion.flow(1, 0))


def true_paths(case: EvaluationCase, like: torch.Tensor, only_seen: bool = False) -> MotionPaths:
    """The true way of every cell of both images: the world's flow from an image to every time.

    Args:
        case: A case whose motion is known.
        like: A tensor (…, h, w) on the grid of cells that is asked about, with the dtype and the device wanted.
        only_seen: Whether a cell leaves the grid, and so is lost, at every time at which it cannot be seen.
    """
    motion = case.pair.motion

    def way(image: int, target: float) -> torch.Tensor:
        flow = motion.flow(image, target)
        if not only_seen:
            return flow
        return torch.where(motion.visible(image, target), flow, 2 * max(flow.shape[-2:]))

    def displacements(image: int, times: torch.Tensor) -> torch.Tensor:
        targets = times if image == 0 else 1 - times
        ways = torch.cat([way(image, target) for target in targets.tolist()])
        return flow_at_cell_centres(ways, like.shape[-2:]).to(like)

    @cache
    def turning() -> MotionPaths:
        ways = (flow_at_cell_centres(motion.flow(*way), like.shape[-2:]).to(like) for way in ((0, 1), (1, 0)))
        return rigid_paths(BidirectionalFlow(*ways))

    return MotionPaths(displacements, lambda image, start, end: turning().factor(image, start, end))


def true_flow(case: EvaluationCase) -> Result:
    """Ours with the true flow instead of the matched flow, which shows what perfect correspondence would give.

    Only the correspondence of the two images is true: between them things take the paths that `motion` makes of it,
    by default rigid ones. `true_path` knows the way, too.
    """
    return case.render(with_true_flow(case))


def true_flow_straight(case: EvaluationCase) -> Result:
    """Ours with the true flow along straight paths, which shows what the paper's paths cost."""
    return case.render(with_true_flow(case), motion="straight")


def true_path(case: EvaluationCase) -> Result:
    """Ours with the true flow and with the true way through time: F^{0→δ} and F^{1→δ} are the world's for every δ."""
    pair = with_true_flow(case)
    return case.render_along(pair, true_paths(case, pair.flow.forward))


def true_visibility(case: EvaluationCase) -> Result:
    """`true_path` with every cell left out of the frames that it cannot be seen in: fusion knows what is in front."""
    pair = with_true_flow(case)
    return case.render_along(pair, true_paths(case, pair.flow.forward, only_seen=True))


def true_splat(case: EvaluationCase) -> Result:
    """The pixels of the two images splatted along their true ways and averaged, which is the ceiling of splatting.

    Every pixel is left out of the frames that it cannot be seen in. The flow that is handed back is that of the latent
    cells.
    """
    images = torch.stack(case.ends)
    alike = torch.zeros_like(images[:, :1])
    frames, _ = fuse_high_level(images, true_paths(case, images, only_seen=True), alike, case.times)
    return frames.clamp(0, 1), with_true_flow(case).flow


def vae_of_truth(case: EvaluationCase) -> Result:
    """The true frames encoded and decoded by the VAE, which is the most that any method on latents can reach."""
    truth = torch.stack([fit(frame, case.canvas) for frame in case.pair.truth])
    return case.decode(case.pipe.encode_images(truth)), None
