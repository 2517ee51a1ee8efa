# SPDX-License-Identifier: Apache-2.0
"""Measuring tools that somebody else trained or wrote: optical flow, LPIPS, FID.

Nothing is downloaded. Where a library or its weights are missing, a tool is None and `Tools.unavailable` says why.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F

from ..media.pictures import picture_of

ALEXNET = "alexnet-owt-7be5be79.pth"  # torchvision's, in torch.hub's folder of checkpoints, like the others
RAFT = "raft_large_C_T_SKHT_V2-ff5fadd5.pth"  # torchvision's
INCEPTION = "weights-inception-2015-12-05-6726825d.pth"  # torch-fidelity's

MISSING = (ImportError, OSError, RuntimeError)  # no library; no weights; a library built for another torch


@dataclass(frozen=True)
class Tools:
    """What metrics measure with.

    `flow` is dense flow from one image (3, H, W) to another, (1, 2, H, W) in pixels; `lpips` is the distance of images
    (B, 3, H, W) in [0, 1], two by two, (B,); `fid` is the Fréchet distance of two sets of images (3, H, W) in [0, 1];
    `unavailable` maps the tools that are None to the reasons.
    """

    flow: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    lpips: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None
    fid: Callable[[Sequence[torch.Tensor], Sequence[torch.Tensor]], float] | None
    unavailable: Mapping[str, str]


def find_tools(flow: str = "dis") -> Tools:
    """The tools that can be had here without a network.

    Args:
        flow: one of `FLOWS`, which warping errors are measured by.

    Raises:
        RuntimeError: this flow cannot be had.
    """
    found, unavailable = {}, {}
    for name, load in (("lpips", load_lpips), ("fid", load_fid)):
        try:
            found[name] = load()
        except MISSING as error:
            found[name] = None
            unavailable[name] = " ".join(str(error).split())
    try:
        return Tools(FLOWS[flow](), **found, unavailable=unavailable)
    except MISSING as error:
        raise RuntimeError(f"the optical flow '{flow}' is not available: {error}") from error


def dis_flow(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """OpenCV's DIS optical flow (medium preset, on 8-bit grey) from one image to another.

    Args:
        first: (3, H, W) in [0, 1].
        second: (3, H, W) in [0, 1].

    Returns:
        (1, 2, H, W) in pixels.
    """
    grey = [cv2.cvtColor(np.asarray(picture_of(image)), cv2.COLOR_RGB2GRAY) for image in (first, second)]
    flow = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM).calc(*grey, None)  # [H,W,2]
    return torch.from_numpy(flow).movedim(-1, 0)[None]


def load_raft() -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """RAFT (large, torchvision's `C_T_SKHT_V2` weights), on images resized to multiples of 8 of at least 128 pixels.

    Raises:
        ImportError: torchvision is missing.
        OSError: the weights are.
    """
    from torchvision.models.optical_flow import raft_large

    network = raft_large().eval()
    network.load_state_dict(_weights(RAFT))

    @torch.no_grad()
    def flow(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        h, w = first.shape[-2:]
        height, width = (max(128, math.ceil(side / 8) * 8) for side in (h, w))
        images = F.interpolate(torch.stack([first, second]), (height, width), mode="bilinear", align_corners=False)
        field = network(*(2 * images - 1).split(1))[-1]
        field = F.interpolate(field, (h, w), mode="bilinear", align_corners=False)
        return field * torch.tensor([w / width, h / height]).reshape(1, 2, 1, 1)

    return flow


def load_lpips() -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """LPIPS 0.1 with AlexNet, by torchmetrics.

    Raises:
        ImportError: torchmetrics or torchvision is missing.
        OSError: the weights are.
    """
    import torchvision  # noqa: F401, torchmetrics' own complaint names another package
    from torchmetrics.functional.image.lpips import _LPIPS

    _weights(ALEXNET)
    network = _LPIPS(net="alex").eval()

    @torch.no_grad()
    def lpips(images: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        return network(images, others, normalize=True).flatten()

    return lpips


def load_fid() -> Callable[[Sequence[torch.Tensor], Sequence[torch.Tensor]], float]:
    """FID on the 2048 features of the Inception network of 2015, by torchmetrics and torch-fidelity.

    Raises:
        ImportError: a library is missing.
        OSError: the weights are.
    """
    import torch_fidelity  # noqa: F401
    from torchmetrics.image.fid import FrechetInceptionDistance

    _weights(INCEPTION)

    def fid(images: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> float:
        metric = FrechetInceptionDistance(feature=2048, normalize=True)
        for image in images:
            metric.update(image[None], real=False)
        for image in others:
            metric.update(image[None], real=True)
        return float(metric.compute())

    return fid


def _weights(name: str) -> dict[str, torch.Tensor]:
    """Weights out of torch.hub's folder, where the libraries look for them before they download."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / name
    if not path.is_file():
        raise OSError(f"the weights '{name}' are not in torch.hub's folder of checkpoints, and nothing is downloaded")
    return torch.load(path, map_location="cpu", weights_only=True)


FLOWS = {"dis": lambda: dis_flow, "raft": load_raft}
