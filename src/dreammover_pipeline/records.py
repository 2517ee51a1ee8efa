# SPDX-License-Identifier: Apache-2.0
"""Small frozen records that pass between the stages. They check their own shapes, so no stage checks them again.

Shapes: `h, w` count latent cells, and `H, W` pixels. An axis of length 2 that leads a pair's tensors is (first image,
second image).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from numbers import Integral

import torch

POSE_POINTS = 18  # number of points in OpenPose's COCO order, as `poses.py` names them


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise ValueError(message)


@dataclass(frozen=True)
class Canvas:
    """Where a picture sits while the models see it.

    All sizes are in pixels. `height, width` is the working size, which the models see. The picture fills the top left
    `content_height, content_width` of it; the rest is padding. Frames are returned at `output_height, output_width`.
    """

    height: int
    width: int
    content_height: int
    content_width: int
    output_height: int
    output_width: int

    def __post_init__(self):
        for name, side in vars(self).items():
            _require(isinstance(side, Integral), f"`{name}` of a canvas must be a whole number, not {side!r}")
        _require(
            0 < self.content_height <= self.height and 0 < self.content_width <= self.width,
            f"a canvas of {self.height}×{self.width} cannot hold {self.content_height}×{self.content_width}",
        )
        _require(self.output_height > 0 and self.output_width > 0, "a canvas needs an output of at least one pixel")

    @property
    def content(self) -> tuple:
        """The index of the picture in pictures (…, height, width) of the whole canvas."""
        return ..., slice(self.content_height), slice(self.content_width)

    def content_on(self, h: int, w: int) -> tuple[float, float]:
        """Width and height, in cells of a grid (h, w) of the whole canvas, of the part that the picture fills."""
        return w * self.content_width / self.width, h * self.content_height / self.height

    def last_on(self, h: int, w: int) -> tuple[int, int]:
        """The last row and the last column of a grid (h, w) of the whole canvas whose middles lie on the picture."""
        across, down = self.content_on(h, w)
        return max(0, math.ceil(down - 0.5) - 1), max(0, math.ceil(across - 0.5) - 1)


@dataclass(frozen=True)
class Schedule:
    """The N steps of a deterministic DDIM schedule, counted from the clean end.

    Step k (1 … N) is at the trained timestep `timesteps[k - 1]`, where ᾱ is `alpha_bars[k]`; `alpha_bars[0]` is the ᾱ
    of the clean end.
    """

    timesteps: tuple[int, ...]
    alpha_bars: tuple[float, ...]

    def __post_init__(self):
        _require(
            len(self.alpha_bars) == len(self.timesteps) + 1,
            f"`alpha_bars` must hold one value more than the {len(self.timesteps)} `timesteps`, "
            f"not {len(self.alpha_bars)} values",
        )
        _require(list(self.timesteps) == sorted(set(self.timesteps)), "`timesteps` must ascend strictly")

    def timestep(self, step: int) -> int:
        """The trained timestep τ of a step, which counts 1 … N from the clean end."""
        return self.timesteps[step - 1]

    def has_signal(self, steps: int) -> bool:
        """Whether something of a picture is left, ᾱ > 0, at each of the first steps."""
        return min(self.alpha_bars[: steps + 1]) > 0


@dataclass(frozen=True, eq=False)
class Inversion:
    """The DDIM inversion of a pair.

    `path` (T+1, 2, C, h, w) holds the latents from the clean ones to those at step T; `eps` (2, C, h, w) is the noise
    predicted at step T; `schedule` says at which timesteps the steps are.
    """

    path: torch.Tensor
    eps: torch.Tensor
    schedule: Schedule

    def __post_init__(self):
        _require(
            self.path.ndim == 5 and self.path.shape[1] == 2,
            f"`path` must be (T+1, 2, C, h, w), not {tuple(self.path.shape)}",
        )
        _require(
            self.eps.shape == self.path.shape[1:],
            f"`eps` must be {tuple(self.path.shape[1:])} as in `path`, not {tuple(self.eps.shape)}",
        )
        _require(
            self.steps <= len(self.schedule.timesteps),
            f"`path` has {self.steps} steps, but its `schedule` has only {len(self.schedule.timesteps)}",
        )

    @property
    def steps(self) -> int:
        """The depth T of the inversion."""
        return self.path.shape[0] - 1

    @property
    def alpha_bar(self) -> float:
        """The ᾱ of the schedule at step T, the end of the inversion."""
        return self.schedule.alpha_bars[self.steps]

    def at(self, timestep: int) -> torch.Tensor:
        """The pair's latents (2, C, h, w) at a trained timestep τ, which must be that of one of the T steps."""
        return self.path[self.schedule.timesteps.index(timestep) + 1]


@dataclass(frozen=True, eq=False)
class BidirectionalFlow:
    """Dense flow between the two images, (1, 2, h, w) each way, in latent cells; channel 0 is dx, channel 1 dy.

    The value at a cell is the displacement of that cell: `forward` holds the displacement from each cell of the first
    image to the second image, `backward` that from each cell of the second image to the first.
    """

    forward: torch.Tensor
    backward: torch.Tensor

    def __post_init__(self):
        shape = tuple(self.forward.shape)
        _require(len(shape) == 4 and shape[:2] == (1, 2), f"`forward` must be (1, 2, h, w), not {shape}")
        _require(
            tuple(self.backward.shape) == shape,
            f"`backward` must be {shape} as `forward` is, not {tuple(self.backward.shape)}",
        )

    @classmethod
    def of(cls, stacked: torch.Tensor) -> BidirectionalFlow:
        """The flow whose two directions are stacked in one tensor (2, 2, h, w)."""
        return cls(stacked[:1], stacked[1:])

    def reversed(self) -> BidirectionalFlow:
        """The same flow with the roles of the two images swapped."""
        return BidirectionalFlow(self.backward, self.forward)

    def stacked(self) -> torch.Tensor:
        """Both directions in one tensor (2, 2, h, w): first `forward`, then `backward`."""
        return torch.cat([self.forward, self.backward])


@dataclass(frozen=True, eq=False)
class FusedFrames:
    """In-between frames at step T: `latents` (F, C, h, w), ready to denoise.

    `clean` (F, C, h, w) and `eps` (F, C, h, w) are the two levels that `latents` were recomposed from, both None if
    the fusion has no levels; `coverage` (F, 1, h, w) is the number of images (0, 1 or 2) that reach a cell; `times`
    (F,) holds the time δ of each frame.
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
            f"`coverage` must be {(frames, 1, h, w)}, not {tuple(self.coverage.shape)}",
        )
        _require(self.times.shape == (frames,), f"`times` must be ({frames},), not {tuple(self.times.shape)}")
        _require(bool(((self.times > 0) & (self.times < 1)).all()), "`times` must lie in (0, 1)")


@dataclass(frozen=True, eq=False)
class FrameSources:
    """Which photo every place of a frame at `time` takes its detail from.

    The fields lie on the padded canvas, on a grid of several places a cell. `shares` (2, h', w') are those of the
    first and of the last photo, which sum to 1, and are 0 where a place is in neither; `taken` (1, h', w') is M, how
    far the photos take the place of what diffusion made: 1 entirely, 0 not at all. In the padding it is that of the
    nearest place of the picture.
    """

    time: float
    shares: torch.Tensor
    taken: torch.Tensor

    def __post_init__(self):
        shape = tuple(self.taken.shape)
        _require(len(shape) == 3 and shape[0] == 1, f"`taken` must be (1, h', w'), not {shape}")
        _require(
            tuple(self.shares.shape) == (2, *shape[1:]),
            f"`shares` must be {(2, *shape[1:])} beside `taken`, not {tuple(self.shares.shape)}",
        )


@dataclass(frozen=True, eq=False)
class PosePair:
    """The poses of P people in both photos of a pair, on its canvas.

    `places` (2, P, 18, 2) are the points (x, y) in pixels of the canvas; `confidence` (2, P, 18) in [0, 1] is 0 where
    a point is not seen.
    """

    places: torch.Tensor
    confidence: torch.Tensor

    def __post_init__(self):
        shape, places = tuple(self.confidence.shape), tuple(self.places.shape)
        form = len(shape) == 3 and (shape[0], shape[2]) == (2, POSE_POINTS)
        _require(form, f"`confidence` must be (2, P, {POSE_POINTS}), not {shape}")
        _require(places == (*shape, 2), f"`places` must be {(*shape, 2)} beside `confidence`, not {places}")

    @property
    def seen(self) -> torch.Tensor:
        """Which points are seen in both photos, (P, 18) bool."""
        return (self.confidence > 0).all(0)

    def at(self, time: float) -> tuple[torch.Tensor, torch.Tensor]:
        """The poses at a time δ in [0, 1].

        Returns:
            The places (P, 18, 2) in pixels of the canvas, and which of them there are, (P, 18) bool: a point that is
            not seen in both photos is absent at every time.
        """
        return torch.lerp(self.places[0], self.places[1], time), self.seen


@dataclass(frozen=True, eq=False)
class PreparedPair:
    """Everything about a pair that does not depend on the frames asked for; `DreamMoverPipeline.render` takes it.

    `images` are the two inputs at the output size, (3, H, W) each: float32 in [0, 1], or uint8 where a photo of 8 bits
    needs no scaling, since large photos would fill the memory otherwise. `canvas` is where both sit for the models;
    `inversion` and `flow` are those of the pair; `prompt_embeds` (2, L, D) holds the embedded prompt of each image;
    `lora` holds the weights of the pair's LoRA, None if none was fitted; `lora_scale` multiplies its effect.
    `negative_embeds` (1, L, D) is what guidance leads away from where no negative prompt is given, None unless it was
    fitted; `prompt_embeds` are then fitted, too. `poses` are those of the people in both photos, None for none.
    """

    images: tuple[torch.Tensor, torch.Tensor]
    canvas: Canvas
    inversion: Inversion
    flow: BidirectionalFlow
    prompt_embeds: torch.Tensor
    lora: dict[str, torch.Tensor] | None
    lora_scale: float
    negative_embeds: torch.Tensor | None = None
    poses: PosePair | None = None

    def __post_init__(self):
        _require(
            math.isfinite(self.lora_scale) and self.lora_scale >= 0,
            f"`lora_scale` must be finite and at least 0, not {self.lora_scale}",
        )
        _require(
            self.prompt_embeds.ndim == 3 and self.prompt_embeds.shape[0] == 2,
            f"`prompt_embeds` must be (2, L, D), not {tuple(self.prompt_embeds.shape)}",
        )
        if self.negative_embeds is not None:
            _require(
                self.negative_embeds.shape == self.prompt_embeds[:1].shape,
                f"`negative_embeds` must be {tuple(self.prompt_embeds[:1].shape)} as `prompt_embeds` are, "
                f"not {tuple(self.negative_embeds.shape)}",
            )
        _require(
            self.flow.forward.shape[-2:] == self.inversion.path.shape[-2:],
            f"`flow` on {tuple(self.flow.forward.shape[-2:])} cells does not fit the `inversion`, whose latents have "
            f"{tuple(self.inversion.path.shape[-2:])} cells",
        )

    def in_precision(self, dtype: torch.dtype) -> PreparedPair:
        """The pair for a UNet of another precision than the one it was prepared with; only the embeddings differ."""
        negative = None if self.negative_embeds is None else self.negative_embeds.to(dtype)
        return replace(self, prompt_embeds=self.prompt_embeds.to(dtype), negative_embeds=negative)


def check_prepared(pair: object) -> None:
    """Raise TypeError unless `pair` is a prepared pair, also one of another copy of this code."""
    if not all(hasattr(pair, field.name) for field in fields(PreparedPair)):
        raise TypeError(f"`pair` must be what `prepare` or `load_pair` returned, not {type(pair).__name__}")
