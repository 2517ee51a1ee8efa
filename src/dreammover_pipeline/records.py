# SPDX-License-Identifier: Apache-2.0
"""Small frozen records that pass between the stages. They check their own shapes, so no stage checks them again.

`h, w` are latent cells, `H, W` pixels. The leading 2 of a pair's tensors is (first image, second image).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise ValueError(message)


@dataclass(frozen=True)
class Canvas:
    """Where a picture sits while the models see it.

    `height, width` is the working size in pixels; the picture fills its top-left `content_height, content_width`
    and the rest is padding; frames come back at `output_height, output_width`.
    """

    height: int
    width: int
    content_height: int
    content_width: int
    output_height: int
    output_width: int

    def __post_init__(self):
        _require(
            0 < self.content_height <= self.height and 0 < self.content_width <= self.width,
            f"a canvas of {self.height}×{self.width} cannot hold {self.content_height}×{self.content_width}",
        )
        _require(self.output_height > 0 and self.output_width > 0, "a canvas needs an output of at least one pixel")


@dataclass(frozen=True)
class Schedule:
    """The N steps of a deterministic DDIM schedule, counted from the clean end.

    Step k (1 … N) is trained timestep `timesteps[k - 1]`; `alpha_bars[k]` is ᾱ there and `alpha_bars[0]` the final ᾱ.
    """

    timesteps: tuple[int, ...]
    alpha_bars: tuple[float, ...]

    def __post_init__(self):
        _require(
            len(self.alpha_bars) == len(self.timesteps) + 1,
            f"{len(self.timesteps)} timesteps need one more alpha_bars, not {len(self.alpha_bars)}",
        )
        _require(list(self.timesteps) == sorted(set(self.timesteps)), "timesteps must ascend")

    def timestep(self, step: int) -> int:
        """The trained timestep τ of step 1 … N."""
        return self.timesteps[step - 1]


@dataclass(frozen=True, eq=False)
class Inversion:
    """The DDIM inversion of a pair: `path` (T+1, 2, C, h, w) from clean to step T, `eps` (2, C, h, w) at step T."""

    path: torch.Tensor
    eps: torch.Tensor
    schedule: Schedule

    def __post_init__(self):
        _require(
            self.path.ndim == 5 and self.path.shape[1] == 2,
            f"path must be (T+1, 2, C, h, w), not {tuple(self.path.shape)}",
        )
        _require(
            self.eps.shape == self.path.shape[1:],
            f"eps must be {tuple(self.path.shape[1:])}, not {tuple(self.eps.shape)}",
        )
        _require(self.steps <= len(self.schedule.timesteps), "the path is longer than its schedule")

    @property
    def steps(self) -> int:
        """T, the depth of the inversion."""
        return self.path.shape[0] - 1

    @property
    def alpha_bar(self) -> float:
        """ᾱ at step T."""
        return self.schedule.alpha_bars[self.steps]

    def at(self, timestep: int) -> torch.Tensor:
        """The pair's latents (2, C, h, w) at trained timestep τ of one of its steps."""
        return self.path[self.schedule.timesteps.index(timestep) + 1]


@dataclass(frozen=True, eq=False)
class BidirectionalFlow:
    """Dense flow between the two images, (1, 2, h, w) each way, in latent cells; channel 0 is dx, channel 1 dy.

    The value at a cell says where that cell goes: `forward` at a cell of the first image, into the second.
    """

    forward: torch.Tensor
    backward: torch.Tensor

    def __post_init__(self):
        shape = tuple(self.forward.shape)
        _require(len(shape) == 4 and shape[:2] == (1, 2), f"forward must be (1, 2, h, w), not {shape}")
        _require(
            tuple(self.backward.shape) == shape, f"backward must be {shape} too, not {tuple(self.backward.shape)}"
        )

    def reversed(self) -> BidirectionalFlow:
        """The same flow with the two images' roles swapped."""
        return BidirectionalFlow(self.backward, self.forward)

    def stacked(self) -> torch.Tensor:
        """(2, 2, h, w): forward, backward."""
        return torch.cat([self.forward, self.backward])


@dataclass(frozen=True, eq=False)
class FusedFrames:
    """In-between frames at step T: `latents` (F, C, h, w), ready to denoise.

    `clean` (F, C, h, w) and `eps` (F, C, h, w) are the two levels they were recomposed from, None where the fusion
    has no levels; `coverage` (F, 1, h, w) counts the images (0, 1, 2) that reach a cell; `times` (F,) are the δ.
    """

    latents: torch.Tensor
    clean: torch.Tensor | None
    eps: torch.Tensor | None
    coverage: torch.Tensor
    times: torch.Tensor

    def __post_init__(self):
        frames, _, h, w = self.latents.shape
        _require(
            self.coverage.shape == (frames, 1, h, w),
            f"coverage must be {(frames, 1, h, w)}, not {tuple(self.coverage.shape)}",
        )
        _require(self.times.shape == (frames,), f"times must be ({frames},), not {tuple(self.times.shape)}")
        _require(bool(((self.times > 0) & (self.times < 1)).all()), "times must lie in (0, 1)")


@dataclass(frozen=True, eq=False)
class PreparedPair:
    """Everything about a pair that does not depend on the frames asked for; `DreamMoverPipeline.render` takes it.

    `images` are the two inputs at the output size, (3, H, W) in [0, 1]; `prompt_embeds` is (2, L, D), one per image;
    `lora` holds the pair's LoRA weights, or None where none was fitted.
    """

    images: tuple[torch.Tensor, torch.Tensor]
    canvas: Canvas
    inversion: Inversion
    flow: BidirectionalFlow
    prompt_embeds: torch.Tensor
    lora: dict[str, torch.Tensor] | None
    lora_scale: float

    def __post_init__(self):
        _require(
            self.prompt_embeds.ndim == 3 and self.prompt_embeds.shape[0] == 2,
            f"prompt_embeds must be (2, L, D), not {tuple(self.prompt_embeds.shape)}",
        )
        _require(
            self.flow.forward.shape[-2:] == self.inversion.path.shape[-2:],
            f"flow on {tuple(self.flow.forward.shape[-2:])} cells does not fit latents on "
            f"{tuple(self.inversion.path.shape[-2:])}",
        )
