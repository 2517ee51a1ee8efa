# SPDX-License-Identifier: Apache-2.0
"""Metrics of one frame or one flow, each a pure function; docs/evaluation.md says how scores are made of them.

Images are (3, H, W) in [0, 1], masks (1, H, W) bool, flows (1, 2, H, W) in pixels of the image they start from.
"""

from __future__ import annotations

import numpy as np
import torch
from skimage.metrics import structural_similarity

from ..fields import backward_warp

MOST_DECIBELS = 100.0  # PSNR of identical images, so that a mean over images stays finite


def psnr(image: torch.Tensor, truth: torch.Tensor, where: torch.Tensor | None = None) -> float:
    """Peak signal-to-noise ratio in dB, 10 log₁₀(1 / MSE) over all pixels and channels, at most 100.

    Args:
        image: the image to judge, (3, H, W).
        truth: the true image, (3, H, W).
        where: the pixels that count, (1, H, W); by default all. If no pixel counts, the result is NaN.
    """
    errors = (image.double() - truth.double()).square()
    if where is not None:
        errors = errors[where.expand_as(errors)]
    error = float(errors.mean())
    return float(
        -10 * np.log10(max(error, 10 ** (-MOST_DECIBELS / 10)))
    )  # max returns a NaN that is its first argument


def ssim(image: torch.Tensor, truth: torch.Tensor) -> float:
    """Structural similarity in [−1, 1] by Wang et al. 2004, with a Gaussian window of σ = 1.5, as a mean over RGB."""
    return float(
        structural_similarity(
            image.double().numpy(),
            truth.double().numpy(),
            data_range=1.0,
            channel_axis=0,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
    )


def endpoint_errors(flow: torch.Tensor, truth: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    """Distance of the end of each pixel's flow vector from the end of the true one, in pixels.

    Args:
        flow: the flow to judge, (1, 2, H, W).
        truth: the true flow, (1, 2, H, W).
        where: which n pixels count, (1, H, W) bool.

    Returns:
        The distances, (n,).
    """
    return (flow - truth)[0].norm(dim=0)[where[0]]


def warping_error(
    first: torch.Tensor, second: torch.Tensor, flow: torch.Tensor, where: torch.Tensor | None = None
) -> float:
    """Mean |first(p) − second(p + flow(p))| over pixels and channels, in [0, 1]; the lookup is bilinear.

    Args:
        first: the image whose pixels are followed, (3, H, W).
        second: the image that they are looked up in, (3, H, W).
        flow: flow from `first` to `second`, (1, 2, H, W).
        where: the pixels of `first` that count, (1, H, W); by default all. If no pixel counts, the result is NaN.
    """
    errors = (first - backward_warp(second[None], flow)[0]).abs()
    return float(errors.mean() if where is None else errors[where.expand_as(errors)].mean())


def consistent(forward: torch.Tensor, backward: torch.Tensor) -> torch.Tensor:
    """Where forward and backward flow agree, as they do not at occlusions: |F + B|² < 0.01 (|F|² + |B|²) + 0.5.

    Source: Sundaram, Brox and Keutzer 2010, Eq. (5). A pixel whose flow leaves the frame counts as occluded.

    Args:
        forward: the flow F, (1, 2, H, W).
        backward: the flow B, (1, 2, H, W), which is looked up where F points.

    Returns:
        (1, H, W) bool, true where they agree.
    """
    back = backward_warp(torch.cat([backward, torch.ones_like(backward[:, :1])], 1), forward)
    back, inside = back[:, :2], back[:, 2] > 0.999
    gap = (forward + back).square().sum(1)
    length = forward.square().sum(1) + back.square().sum(1)
    return (gap < 0.01 * length + 0.5) & inside


def high_frequency_energy(image: torch.Tensor) -> float:
    """Sum of the Fourier amplitudes outside the centre of the shifted spectrum, as a mean over RGB.

    The centre is half the spectrum along each axis, and so a quarter of its area.

    Source: DreamMover (arXiv 2409.09605), Fig. 5.
    """
    amplitude = torch.fft.fft2(image.double()).abs()
    h, w = image.shape[-2:]
    low = (torch.fft.fftfreq(h).abs()[:, None] < 0.25) & (torch.fft.fftfreq(w).abs() < 0.25)
    return float(amplitude[:, ~low].sum() / len(image))
