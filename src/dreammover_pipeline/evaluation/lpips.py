# SPDX-License-Identifier: Apache-2.0
"""LPIPS, a distance of images by the features of AlexNet."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

# Mean and deviation of colours in [−1, 1] that LPIPS brings images to before AlexNet sees them.
SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)
POOLED = (1, 2)  # the convolutions that a 3×3 maximum with a stride of 2 comes before


class Lpips(nn.Module):
    """LPIPS with AlexNet, as a distance of images.

    With y and y' the features of two images after one of AlexNet's first five rectified convolutions, scaled to unit
    length over the channels in every cell, and w ≥ 0 one weight for each of the channels,

        d = Σ over the five convolutions of the mean over cells of Σ over channels of w · (y − y')²

    Source: Zhang et al. 2018 (arXiv 1801.03924), Eq. (1); the weights are applied to the squared differences, as in
    the authors' code.
    """

    def __init__(self):
        super().__init__()
        self.convolutions = nn.ModuleList(
            [
                nn.Conv2d(3, 64, 11, stride=4, padding=2),
                nn.Conv2d(64, 192, 5, padding=2),
                nn.Conv2d(192, 384, 3, padding=1),
                nn.Conv2d(384, 256, 3, padding=1),
                nn.Conv2d(256, 256, 3, padding=1),
            ]
        )
        self.heads = nn.ModuleList(nn.Conv2d(part.out_channels, 1, 1, bias=False) for part in self.convolutions)
        self.register_buffer("shift", torch.tensor(SHIFT).reshape(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(SCALE).reshape(1, 3, 1, 1), persistent=False)

    def forward(self, images: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        """The distance of each image from the image at the same place in another batch.

        Args:
            images: a batch of images, (B, 3, H, W) in [0, 1], with sides of at least 31 pixels.
            others: as many images of the same size.

        Returns:
            The distances, (B,), 0 for identical images.
        """
        both = zip(self.features(images), self.features(others), self.heads, strict=True)
        return sum(head((first - second).square()).mean((1, 2, 3)) for first, second, head in both)

    def features(self, images: torch.Tensor) -> list[torch.Tensor]:
        """The features of unit length after each of the five convolutions, (B, C, h, w) each, of images in [0, 1]."""
        x = (2 * images - 1 - self.shift) / self.scale
        found = []
        for index, convolution in enumerate(self.convolutions):
            if index in POOLED:
                x = F.max_pool2d(x, 3, stride=2)
            x = F.relu(convolution(x))
            found.append(F.normalize(x, dim=1, eps=1e-10))
        return found
