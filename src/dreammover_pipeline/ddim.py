# SPDX-License-Identifier: Apache-2.0
"""The algebra of deterministic DDIM, and nothing else: no models, no schedulers, no loops.

Conventions: everything is computed and returned in the precision of its input, but at least in float32. `alpha_bar` is
ᾱ, the cumulative product of 1 − β: a float, or a tensor (B,) with one value per sample. k is a step of the schedule.
"""

from __future__ import annotations

import torch


def working_dtype(tensor: torch.Tensor) -> torch.dtype:
    """float32 for half-precision tensors, the tensor's own dtype otherwise."""
    return torch.promote_types(tensor.dtype, torch.float32)


def _signal_and_noise_rates(alpha_bar, like: torch.Tensor):
    """The rates √ᾱ of the signal and √(1−ᾱ) of the noise, shaped to multiply the tensor `like` (B, C, h, w)."""
    if not isinstance(alpha_bar, torch.Tensor):
        return alpha_bar**0.5, (1 - alpha_bar) ** 0.5
    alpha_bar = alpha_bar.to(like.device, working_dtype(like)).reshape(-1, 1, 1, 1)
    return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()


def predict_clean(latents: torch.Tensor, eps: torch.Tensor, alpha_bar: float | torch.Tensor) -> torch.Tensor:
    """One-step prediction of the clean latent: z_{k→0} = (z_k − √(1−ᾱ_k) ε) / √ᾱ_k.

    Source: DreamMover Eq. (3), §3.1.

    Args:
        latents: The noisy latents z_k, (B, C, h, w).
        eps: The noise ε predicted in the noisy latents, (B, C, h, w).
        alpha_bar: ᾱ_k in (0, 1].

    Returns:
        The predicted clean latents z_{k→0}, (B, C, h, w).
    """
    signal, noise = _signal_and_noise_rates(alpha_bar, latents)
    dtype = working_dtype(latents)
    return (latents.to(dtype) - noise * eps.to(dtype)) / signal


def recompose(clean: torch.Tensor, eps: torch.Tensor, alpha_bar: float | torch.Tensor) -> torch.Tensor:
    """The noisy latent composed of a clean latent and noise: z_k = √ᾱ_k z_0 + √(1−ᾱ_k) ε.

    With the clean latent and the noise predicted at one step, and the ᾱ of the step before or after it, this is a step
    of DDIM in that direction.

    Source: DreamMover Eq. (2), §3.1 and DreamMover Eq. (8), §3.3.

    Args:
        clean: The clean latents z_0, (B, C, h, w).
        eps: The noise ε, (B, C, h, w).
        alpha_bar: ᾱ_k in [0, 1].

    Returns:
        The noisy latents z_k, (B, C, h, w).
    """
    signal, noise = _signal_and_noise_rates(alpha_bar, clean)
    dtype = working_dtype(clean)
    return signal * clean.to(dtype) + noise * eps.to(dtype)


def eps_from_v(v: torch.Tensor, latents: torch.Tensor, alpha_bar: float | torch.Tensor) -> torch.Tensor:
    """The noise that a v-prediction stands for: ε = √ᾱ_k v + √(1−ᾱ_k) z_k.

    ᾱ_k is that of the timestep given to the network, which in inversion is not the timestep that the latents are at.

    Source: progressive distillation (arXiv 2202.00512), appendix D.

    Args:
        v: The network's output v, (B, C, h, w).
        latents: The network's input z_k, (B, C, h, w).
        alpha_bar: ᾱ_k at the timestep given to the network, in [0, 1].

    Returns:
        The noise ε, (B, C, h, w).
    """
    signal, noise = _signal_and_noise_rates(alpha_bar, latents)
    dtype = working_dtype(latents)
    return signal * v.to(dtype) + noise * latents.to(dtype)


def v_from_eps(clean: torch.Tensor, eps: torch.Tensor, alpha_bar: float | torch.Tensor) -> torch.Tensor:
    """What a v-prediction network should predict: v = √ᾱ_k ε − √(1−ᾱ_k) z_0. It is the target of such a LoRA fit.

    Source: progressive distillation (arXiv 2202.00512), appendix D.

    Args:
        clean: The clean latents z_0, (B, C, h, w).
        eps: The noise ε added to the clean latents, (B, C, h, w).
        alpha_bar: ᾱ_k in [0, 1].

    Returns:
        The target v, (B, C, h, w).
    """
    signal, noise = _signal_and_noise_rates(alpha_bar, clean)
    dtype = working_dtype(clean)
    return signal * eps.to(dtype) - noise * clean.to(dtype)
