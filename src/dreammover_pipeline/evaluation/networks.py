# SPDX-License-Identifier: Apache-2.0
"""Measuring tools that other people trained or wrote: optical flow, LPIPS and FID.

Nothing is downloaded. A tool whose library or weights are missing is None, and `Tools.unavailable` says why.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch
import torch.nn.functional as F

from ..media.pictures import picture_of
from .lpips import Lpips
from .weights import checkpoints, lpips_weights

# Names of files in the folder `checkpoints`.
RAFT = "raft_large_C_T_SKHT_V2-ff5fadd5.pth"  # file of torchvision's weights of RAFT
INCEPTION = "weights-inception-2015-12-05-6726825d.pth"  # file of torch-fidelity's weights of Inception

# What is raised if a library is missing, if its weights are, or if it was built for another torch.
MISSING = (ImportError, OSError, RuntimeError)


@dataclass(frozen=True)
class Tools:
    """The tools that metrics measure with.

    `flow` finds the dense flow from one image (3, H, W) to another, (1, 2, H, W) in pixels. `lpips` is the distance of
    each image of a batch (B, 3, H, W) in [0, 1] from the image at the same place in another batch, (B,). `fid` is the
    Fréchet distance between two sets of images (3, H, W) in [0, 1]. `unavailable` says of each tool that is None why
    it is not available.
    """

    flow: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    lpips: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None
    fid: Callable[[Sequence[torch.Tensor], Sequence[torch.Tensor]], float] | None
    unavailable: Mapping[str, str]


def find_tools(flow: str = "dis") -> Tools:
    """The tools that are available on this machine, without any download.

    Args:
        flow: the name in `FLOWS` of the optical flow that warping errors are measured by.

    Raises:
        RuntimeError: this optical flow is not available.
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
        first: the image that the flow starts from, (3, H, W) in [0, 1].
        second: the image that the flow leads to, (3, H, W) in [0, 1].

    Returns:
        The flow in pixels, (1, 2, H, W).
    """
    grey = [cv2.cvtColor(np.asarray(picture_of(image)), cv2.COLOR_RGB2GRAY) for image in (first, second)]
    flow = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM).calc(*grey, None)  # [H,W,2]
    return torch.from_numpy(flow).movedim(-1, 0)[None]


def load_raft() -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Load RAFT (large, torchvision's weights `C_T_SKHT_V2`).

    It sees images resized so that their sides are multiples of 8 and at least 128 pixels.

    Raises:
        ImportError: torchvision is missing.
        OSError: the weights are missing.
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
    """Load LPIPS 0.1 with AlexNet.

    Raises:
        OSError: the weights are missing or damaged.
    """
    network = Lpips()
    network.load_state_dict(lpips_weights())

    @torch.no_grad()
    def lpips(images: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        return network(images, others)

    return lpips


def load_fid() -> Callable[[Sequence[torch.Tensor], Sequence[torch.Tensor]], float]:
    """Load FID on the 2048 features of the Inception network of 2015, by torchmetrics and torch-fidelity.

    Raises:
        ImportError: torchmetrics or torch-fidelity is missing.
        OSError: the weights are missing.
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
    """Weights from torch.hub's folder of checkpoints, where the libraries look before they download anything."""
    path = checkpoints() / name
    if not path.is_file():
        raise OSError(f"the weights '{name}' are not in torch.hub's folder of checkpoints, and nothing is downloaded")
    return torch.load(path, map_location="cpu", weights_only=True)


FLOWS = {"dis": lambda: dis_flow, "raft": load_raft}
