# SPDX-License-Identifier: Apache-2.0
"""What conditions frames besides their texts: a picture for each, which a ControlNet reads.

The pictures are drawn poses, interpolated between the two photos, or pictures of the user's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from diffusers import ControlNetModel

from .adapters import unwrapped
from .framing import fit
from .images import Photo, decode_images, rgb
from .poses import PosePair, draw_pose
from .records import Canvas

# A function from a time δ in [0, 1] to a picture (3, H, W) in [0, 1] on the canvas.
ControlPicture = Callable[[float], torch.Tensor]


@dataclass(frozen=True, eq=False)
class FrameControl:
    """What a ControlNet is given for the frames of one call.

    `pictures` (F, 3, H, W) in [0, 1] are those of the frames and `ends` (2, 3, H, W) those of the two photos. `scale`
    multiplies what the ControlNet adds. It adds from the share `start` of the denoising steps to the share `end`.
    """

    pictures: torch.Tensor
    ends: torch.Tensor
    scale: float
    start: float
    end: float

    def selected(self, frames: list[int]) -> FrameControl:
        """What the ControlNet is given for some of the frames, by the frames' indices."""
        return FrameControl(self.pictures[frames], self.ends, self.scale, self.start, self.end)

    def acts(self, step: int, steps: int) -> bool:
        """Whether the ControlNet adds anything at a denoising step, counted from 0, of so many."""
        return step / steps >= self.start and (step + 1) / steps <= self.end


def frame_control(
    picture: ControlPicture, times: Sequence[float], scale: float, window: tuple[float, float], like: torch.Tensor
) -> FrameControl:
    """What a ControlNet is given for frames at some times.

    Args:
        picture: Function from a time δ in [0, 1] to the picture at that time.
        times: The δ of the frames.
        scale: Factor of what the ControlNet adds.
        window: The shares of the denoising steps between which the ControlNet adds anything.
        like: A tensor on the device and of the dtype that the pictures are to have.
    """
    ends, frames = (torch.stack([picture(time).to(like) for time in some]) for some in ((0.0, 1.0), times))
    return FrameControl(frames, ends, scale, *window)


def control_picture(images: object, poses: PosePair | None, canvas: Canvas) -> ControlPicture | None:
    """What draws the pictures for a ControlNet; None where there are none.

    Args:
        images: The argument `control_images`: two images for a cross-fade, or a function of δ that returns an image;
            None for the poses.
        poses: The poses of the people in the pair; None for no poses.
        canvas: Where the pictures are put, as the photos are.

    Returns:
        What draws the pictures. Where `images` is a function, it is called once for each time, and its pictures are
        kept as long as what draws them; what it returns is checked then, and raises TypeError or ValueError.

    Raises:
        TypeError, ValueError: `images` is not what it may be, or comes beside poses.
    """
    if images is None:
        if poses is None:
            return None
        return lambda time: draw_pose(*poses.at(time), canvas.height, canvas.width)
    if poses is not None:
        raise ValueError("pass `poses` or `control_images`, not both, since a ControlNet takes one picture")

    def fitted(image: Photo, which: str) -> torch.Tensor:
        return fit(rgb(decode_images(image, which)[0]), canvas)

    if callable(images):
        return cache(lambda time: fitted(images(time), f"control_images({time:g})"))
    if not isinstance(images, list | tuple) or len(images) != 2:
        raise TypeError(
            f"`control_images` must be two images, or a function of δ that returns one, not {type(images).__name__}"
        )
    first, last = (fitted(image, f"control_images[{i}]") for i, image in enumerate(images))
    return lambda time: torch.lerp(first, last, time)


def check_controlnet(controlnet: object, unet: torch.nn.Module, cell: int) -> None:
    """Raise TypeError or ValueError unless this is a ControlNet for Stable Diffusion 1.x or 2.x that fits the models.

    Args:
        controlnet: What may be a ControlNet; it may be compiled.
        unet: The UNet, which may be compiled.
        cell: How many pixels a side of a latent cell has.
    """
    if not isinstance(unwrapped(controlnet), ControlNetModel):
        raise TypeError(f"`controlnet` must be a ControlNetModel, not {type(controlnet).__name__}")
    config = controlnet.config
    if config.addition_embed_type is not None or config.class_embed_type is not None:
        raise ValueError(
            "`controlnet` needs more than latents, a timestep, a text and a picture: ControlNets of SDXL and others "
            "beside Stable Diffusion 1.x and 2.x are not supported"
        )
    if config.conditioning_channels != 3:
        raise ValueError(
            f"`controlnet` must take pictures in colours, of 3 channels, not of {config.conditioning_channels}"
        )
    scale = 2 ** (len(config.conditioning_embedding_out_channels) - 1)
    if scale != cell:
        raise ValueError(
            f"`controlnet` was made for another VAE: its latent cells are {scale} pixels wide, and the VAE's {cell}"
        )
    for name in ("in_channels", "cross_attention_dim", "block_out_channels", "layers_per_block"):
        wanted, given = (_as_list(getattr(model.config, name)) for model in (unet, controlnet))
        if wanted != given:
            raise ValueError(
                f"`controlnet` was made for another UNet: its `{name}` is {given}, and that of the UNet is {wanted}"
            )


def _as_list(value: object) -> object:
    """A value of a configuration, in which a tuple is a list once it has been in a file."""
    return list(value) if isinstance(value, tuple) else value
