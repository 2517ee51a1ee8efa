# SPDX-License-Identifier: Apache-2.0
"""A rival on the same models: DiffMorpher, which interpolates everything between two photos and has no flow.

Written from the paper's description (arXiv 2312.07409). What is here: a LoRA for each photo and their interpolation,
full DDIM inversion with the photo's own LoRA, spherically interpolated latents with AdaIN, linearly interpolated
texts, and interpolated keys and values of self-attention in the first part of denoising. What is not here: the
rescheduling of frames for even perceptual steps, since an evaluation asks for frames at given δ. Paper and these
lines may differ in what the description leaves open: here keys and values are interpolated in the up blocks, each LoRA
is fitted with the settings of ours, and frames are not guided.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from ..adapters import unwrapped
from ..attention import self_attention_names
from ..fusion import slerp
from ..pipeline import DreamMoverPipeline
from ..preparing import fit_lora
from ..progress import Stages
from ..sampling import denoise, invert
from ..schedules import ddim_schedule
from ..settings import PrepareSettings

ATTENTION_SHARE = 0.6  # λ, the share of the denoising steps in which keys and values are interpolated


def diffmorpher(
    pipe: DreamMoverPipeline,
    images: torch.Tensor,
    prompt: Sequence[str],
    times: torch.Tensor,
    settings: PrepareSettings,
    seed: int,
    stages: Stages,
) -> torch.Tensor:
    """Clean latents of the frames between two images, without any flow.

    Source: DiffMorpher (arXiv 2312.07409); the module says which of its parts are left out.

    Args:
        pipe: The pipeline whose models are used.
        images: The two images, (2, 3, H, W) in [0, 1], at the size that the models work at.
        prompt: What each of the two images shows.
        times: The time δ of each frame, (F,), in [0, 1].
        settings: How each of the two LoRAs is fitted and how strongly it acts, and the number N of steps of the
            schedule, all of which are inverted.
        seed: What decides the LoRA fits.
        stages: What is told of the progress of the LoRA fits.

    Returns:
        Clean latents, (F, C, h, w), in the order of `times`. At δ = 0 and at δ = 1 they are those that the two images'
        own inversions are denoised to.
    """
    denoiser = pipe._models(settings.cross_attention_kwargs).denoiser
    clean = pipe.encode_images(images)
    texts, _ = pipe.encode_prompt(list(prompt), clean.device, clip_skip=settings.clip_skip)
    loras = [None, None]
    if settings.lora_steps:
        # A fit takes two images or more, and so sees this one twice at every step, with different noise.
        loras = [fit_lora(denoiser, clean[[i, i]], texts[[i, i]], settings, seed, stages) for i in (0, 1)]

    def predict_at(delta: float, latents: torch.Tensor, timestep: int) -> torch.Tensor:
        """ε of one frame (1, C, h, w), with the LoRA and the text of its δ."""
        with denoiser.with_lora(interpolated_lora(*loras, delta), settings.lora_scale):
            return denoiser.predict_noise(latents, timestep, torch.lerp(texts[:1], texts[1:], delta))

    def predict_photos(latents: torch.Tensor, timestep: int) -> torch.Tensor:
        return torch.cat([predict_at(float(i), latents[i : i + 1], timestep) for i in (0, 1)])

    steps = settings.num_inference_steps
    schedule = ddim_schedule(pipe.scheduler, steps, steps)
    early = schedule.timesteps[steps - round(ATTENTION_SHARE * steps) :]
    noisy = invert(clean, predict_photos, schedule, steps).path[-1]
    with interpolated_attention(pipe.unet) as attention:

        def predict_all(latents: torch.Tensor, timestep: int) -> torch.Tensor:
            """ε of the two photos, which leave their keys and values behind, and then of the frames."""
            eps = []
            for i in (0, 1):
                with attention.recorded(i):
                    eps.append(predict_at(float(i), latents[i : i + 1], timestep))
            for delta, frame in zip(times.tolist(), latents[2:].split(1), strict=True):
                with attention.replaced(delta if timestep in early else None):
                    eps.append(predict_at(delta, frame, timestep))
            return torch.cat(eps)

        return denoise(torch.cat([noisy, interpolated_noise(noisy, times)]), predict_all, schedule, steps)[2:]


def interpolated_lora(
    first: dict[str, torch.Tensor] | None, last: dict[str, torch.Tensor] | None, delta: float
) -> dict[str, torch.Tensor] | None:
    """The LoRA whose change of every weight is (1−δ) B⁰A⁰ + δ B¹A¹.

    It is the change that is interpolated, and not A and B each by itself; so the rank is that of both together.

    Args:
        first: The LoRA of the first photo, by diffusers' names; None for none.
        last: The LoRA of the last photo, with the same names; None for none.
        delta: The time δ of the frame, in [0, 1].
    """
    if first is None or last is None:
        return None
    return {
        name: torch.cat([weight, last[name]])
        if "lora_A" in name
        else torch.cat([(1 - delta) * weight, delta * last[name]], 1)
        for name, weight in first.items()
    }


def interpolated_noise(noisy: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
    """Noisy latents between two: spherically interpolated, with linearly interpolated statistics (AdaIN).

    The mean and the standard deviation of every channel over its cells are those of the photos, interpolated.

    Args:
        noisy: The noisy latents of the two photos, (2, C, h, w).
        times: The time δ of each frame, (F,).

    Returns:
        The noisy latents of the frames, (F, C, h, w).
    """
    mixed = slerp(*noisy.flatten(1), times).unflatten(1, noisy.shape[1:])
    mean, spread = noisy.mean((2, 3), keepdim=True), noisy.std((2, 3), keepdim=True)
    delta = times.to(mixed).reshape(-1, 1, 1, 1)
    mean, spread = torch.lerp(mean[:1], mean[1:], delta), torch.lerp(spread[:1], spread[1:], delta)
    centred = mixed - mixed.mean((2, 3), keepdim=True)
    return centred / mixed.std((2, 3), keepdim=True) * spread + mean


class InterpolatedAttention:
    """The keys and values of two photos at a denoising step, and what is done with them.

    `of_photos` holds, for each photo, the outputs of the projections to keys and to values by the projections' names.
    """

    def __init__(self):
        self.of_photos: tuple[dict[str, torch.Tensor], ...] = ({}, {})
        # From a projection's name and its output to what replaces the output; None for nothing.
        self.act: Callable[[str, torch.Tensor], torch.Tensor | None] = lambda name, output: None

    @contextmanager
    def recorded(self, photo: int) -> Iterator[None]:
        """Keep the keys and values of the first photo (0) or the last (1), which the UNet is run on meanwhile."""
        with self._acting(lambda name, output: self.of_photos[photo].update({name: output})):
            yield

    @contextmanager
    def replaced(self, delta: float | None) -> Iterator[None]:
        """Put (1−δ) K⁰ + δ K¹ and (1−δ) V⁰ + δ V¹ in the place of keys and values; None leaves them as they are."""
        first, last = self.of_photos
        with self._acting(
            lambda name, output: None if delta is None else torch.lerp(first[name], last[name], delta),
        ):
            yield

    @contextmanager
    def _acting(self, act: Callable[[str, torch.Tensor], torch.Tensor | None]) -> Iterator[None]:
        before, self.act = self.act, act
        try:
            yield
        finally:
            self.act = before


@contextmanager
def interpolated_attention(unet: torch.nn.Module) -> Iterator[InterpolatedAttention]:
    """Watch the keys and values of self-attention in all up blocks, and let them be replaced, while the context lasts.

    Forward hooks on the projections do it, so that attention processors and adapters stay what they are. Projections
    that are fused into one (`fuse_qkv_projections`) are not seen.

    Args:
        unet: A `UNet2DConditionModel`, compiled or not.
    """
    model, attention = unwrapped(unet), InterpolatedAttention()
    layers = [name for block in range(len(model.up_blocks)) for name in self_attention_names(model, block)]
    projections = [name.removesuffix("processor") + part for name in layers for part in ("to_k", "to_v")]
    handles = []
    try:
        for name in projections:
            hook = model.get_submodule(name).register_forward_hook(
                lambda module, inputs, output, name=name: attention.act(name, output)
            )
            handles.append(hook)
        # A hook that is registered after torch.compile has compiled a forward never fires, so forwards run eagerly.
        with torch.compiler.set_stance("force_eager"):
            yield attention
    finally:
        for handle in handles:
            handle.remove()
