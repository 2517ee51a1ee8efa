# SPDX-License-Identifier: Apache-2.0
"""Frames larger than the model's own size, made finer by the model itself, tile by tile.

Where the photos' detail cannot be trusted, `detail.py` leaves a frame enlarged and blurred. Here the model goes over
it, at twice its own size first, then at four times, and so on up to the output size. At every level the latents of the
frame are taken for those of one of the lowest steps of the schedule, and denoised from there, in overlapping tiles of
the size that the UNet was trained on:

    frame = D + R,   R = R↑ + (1 − M) · (decode(denoised) − decode(encoded))

D is the frame with the photos' detail at the level's size, R what diffusion adds, R↑ that of the level before made as
large, and M how far the photos are taken. So what comes from the photos stays as it is, and what the VAE alone would
blur is not blurred. The tiles' predictions of noise are averaged at every step, so that no seams arise. Tiles in which
the photos are taken throughout are left out. Pictures are encoded and decoded in the same tiles, so that beside the
frame itself memory does not grow with its size.

Source: the averaged predictions are those of MultiDiffusion (arXiv 2302.08113), the rest is ours. No noise is put in:
blur itself is what the model takes for noise. Noise, random or that of the photos' inversion moved along, stayed in
part as speckles; reference attention to the tiles of the photos that a tile comes from took three times the work and
made frames worse, as the model is only asked where the photos do not fit.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from .detail import Axis, FrameDetail, PairDetail, with_detail
from .framing import fit_to_output
from .images import Size
from .memory import Batches, affordable_frames
from .models import Models, require_finite
from .prompts import NegativeText
from .records import Canvas, PreparedPair, Schedule
from .sampling import denoise
from .turns import interruptible

CASCADE_SIGNAL = 0.94  # ᾱ, about, of the step that latents are taken for: step 4 of 50 of Stable Diffusion's schedule
TILES_APART = 0.75  # largest distance between where neighbouring tiles begin, as a share of a tile's side
UNSEEN_SHARE = 0.02  # share of what diffusion adds that may be left out, since it is hardly a step of 8-bit colours


# ── Tiles ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, eq=False)
class Spans:
    """Overlapping spans of one length that cover one side of a picture.

    `starts` are where they begin. `weights` (k, length) is how much each of the k spans counts at each of its places:
    less towards its ends, and at every place of the side the spans that cover it sum to 1.
    """

    starts: tuple[int, ...]
    weights: torch.Tensor

    @classmethod
    def of(cls, count: int, longest: int, parts: int = 1) -> Spans:
        """Spans of at most `longest` cells along `count` cells, in units of which a cell has `parts`."""
        length = min(longest, count)
        steps = math.ceil((count - length) / max(1, int(TILES_APART * length)))
        starts = tuple(parts * round(i * (count - length) / max(1, steps)) for i in range(steps + 1))
        length *= parts
        middles = torch.arange(length, dtype=torch.float32, device="cpu") + 0.5
        ramp = torch.minimum(middles, length - middles)
        total = torch.zeros(parts * count, dtype=torch.float32, device="cpu")
        for start in starts:
            total[start : start + length] += ramp
        return cls(starts, torch.stack([ramp / total[start : start + length] for start in starts]))

    @property
    def length(self) -> int:
        """How long each span is."""
        return self.weights.shape[1]


@dataclass(frozen=True, eq=False)
class Tiles:
    """Overlapping tiles that cover a picture: every span of `rows` with every span of `columns`, row by row."""

    rows: Spans
    columns: Spans

    @classmethod
    def of(cls, size: Size, largest: Size, parts: int = 1) -> Tiles:
        """Tiles of at most `largest` cells on a grid of `size` cells, in units of which a cell's side has `parts`."""
        return cls(*(Spans.of(count, longest, parts) for count, longest in zip(size, largest, strict=True)))

    def on(self, device: torch.device) -> Tiles:
        """The same tiles with their weights on a device, so that adding to pictures there waits for no copy."""
        return Tiles(*(replace(spans, weights=spans.weights.to(device)) for spans in (self.rows, self.columns)))

    def __len__(self) -> int:
        return len(self.rows.starts) * len(self.columns.starts)

    def corner(self, tile: int) -> tuple[int, int]:
        """Where a tile begins, (top, left)."""
        row, column = divmod(tile, len(self.columns.starts))
        return self.rows.starts[row], self.columns.starts[column]

    def cut(self, picture: torch.Tensor, tile: int) -> torch.Tensor:
        """What of a picture (…, H, W) is in a tile; beyond the picture, its edge."""
        row, column = (
            torch.arange(start, start + spans.length, device=picture.device).clamp(max=side - 1)
            for start, spans, side in zip(
                self.corner(tile), (self.rows, self.columns), picture.shape[-2:], strict=True
            )
        )
        return picture[..., row[:, None], column]

    def add(self, picture: torch.Tensor, tile: int, values: torch.Tensor) -> None:
        """Add values (…, th, tw) of a tile to a picture (…, H, W) by their weights; what lies beyond it is dropped."""
        row, column = divmod(tile, len(self.columns.starts))
        top, left = self.corner(tile)
        part = picture[..., top : top + self.rows.length, left : left + self.columns.length]
        h, w = part.shape[-2:]
        weights = self.rows.weights[row, :h, None] * self.columns.weights[column, :w]
        part += weights.to(picture) * values[..., :h, :w].to(picture)


# ── Levels ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def cascade_steps(schedule: Schedule) -> int:
    """How many of a schedule's lowest steps a level takes: up to the one whose ᾱ is nearest to `CASCADE_SIGNAL`."""
    return min(range(1, len(schedule.timesteps) + 1), key=lambda step: abs(schedule.alpha_bars[step] - CASCADE_SIGNAL))


def level_sizes(canvas: Canvas) -> list[Size]:
    """The sizes of the levels in pixels: twice the picture's on the canvas, and so on up to the output's.

    There are none where the output is no larger than the picture on the canvas.
    """
    height, width = canvas.content_height, canvas.content_width
    scale = min(canvas.output_height / height, canvas.output_width / width)
    if scale <= 1:
        return []
    doublings = math.ceil(math.log2(scale)) - 1
    sizes = [(2**level * height, 2**level * width) for level in range(1, doublings + 1)]
    return [*sizes, (canvas.output_height, canvas.output_width)]


@dataclass(frozen=True, eq=False)
class Level:
    """One size that frames are refined at: `canvas` returns frames at it; `cells` and `pixels` are the same tiles."""

    canvas: Canvas
    grid: Size
    cells: Tiles
    pixels: Tiles

    @classmethod
    def of(cls, size: Size, canvas: Canvas, cell: int, largest: Size, device: torch.device) -> Level:
        """The level of a size in pixels, for what sits on a canvas.

        Args:
            size: Size (H, W) of the level, in pixels.
            canvas: Where the photos sit.
            cell: Pixels a side of a latent cell.
            largest: Size of a tile in latent cells.
            device: Where the latents are; pictures are on the CPU.
        """
        grid = tuple(math.ceil(side / cell) for side in size)
        canvas = replace(canvas, output_height=size[0], output_width=size[1])
        return cls(canvas, grid, Tiles.of(grid, largest).on(device), Tiles.of(grid, largest, cell))

    def mean(self, chosen: Sequence[int], tiles: Iterable[torch.Tensor]) -> torch.Tensor:
        """The weighted mean (1, C, h, w) of the latents (1, C, th, tw) of some tiles; 0 where none of them is.

        Args:
            chosen: The indices of the tiles, at least one.
            tiles: The latents of each of these tiles, (1, C, th, tw).
        """
        total = None
        for tile, values in zip(chosen, tiles, strict=True):
            if total is None:
                total = values.new_zeros(1, values.shape[1] + 1, *self.grid)
            self.cells.add(total, tile, torch.cat([values, torch.ones_like(values[:, :1])], 1))
        return total[:, :-1] / total[:, -1:].clamp(min=torch.finfo(total.dtype).tiny)

    def needed(self, plan: FrameDetail) -> list[int]:
        """The tiles in which a frame does not take everything from the photos."""
        most = torch.stack([self.free(plan, tile).max() for tile in range(len(self.pixels))])
        return [tile for tile, share in enumerate(most.tolist()) if share > UNSEEN_SHARE]

    def free(self, plan: FrameDetail, tile: int) -> torch.Tensor:
        """How far the pixels of a tile, as far as it is on the frame, are not taken from the photos, (1, th, tw)."""
        free = 1 - plan.taken
        h, w = free.shape[-2:]
        across, down = self.canvas.content_on(h, w)
        (top, left), height, width = self.pixels.corner(tile), self.canvas.output_height, self.canvas.output_width
        rows = Axis.of(height, down, h, free).part(top, top + self.pixels.rows.length)
        columns = Axis.of(width, across, w, free).part(left, left + self.pixels.columns.length)
        return rows.spread(columns.spread(free, -1), -2)


# ── A pair's frames ──────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, eq=False)
class PairCascade:
    """What refines the frames of a pair.

    `detail` is what they take from the photos at the output size; `levels` are those that they go through, each with
    what they take from the photos there; `steps` are taken at every level; `batches` are those that tiles go through
    the UNet in.
    """

    models: Models
    pair: PreparedPair
    detail: PairDetail
    levels: tuple[tuple[Level, PairDetail], ...]
    steps: int
    batches: Batches

    @classmethod
    def of(
        cls,
        models: Models,
        pair: PreparedPair,
        detail: PairDetail,
        steps: int | None = None,
        largest_batch: int | None = None,
    ) -> PairCascade:
        """What can be known once for all frames of a pair; no model runs.

        Args:
            models: The models that refine the frames.
            pair: What `prepare_pair` returned.
            detail: What the frames of the pair take their detail from.
            steps: Number of steps of the pair's schedule that every level takes; None for that of `cascade_steps`.
            largest_batch: Largest number of tiles in a batch for the UNet; None for what fits the free memory.
        """
        denoiser, canvas = models.denoiser, detail.canvas
        if steps is None:
            steps = cascade_steps(pair.inversion.schedule)
        largest, cell = tile_size(denoiser.unet), canvas.height // pair.flow.forward.shape[-2]
        levels = []
        for size in level_sizes(canvas):
            level, there = Level.of(size, canvas, cell, largest, denoiser.device), detail
            if level.canvas != canvas:
                photos = tuple(fit_to_output(photo, level.canvas) for photo in detail.photos)
                there = replace(detail, canvas=level.canvas, photos=photos)
            levels.append((level, there))
        if largest_batch is None:
            tile = torch.empty(0, *largest, device="cpu")
            largest_batch = affordable_frames(*denoiser.footprint(tile))
        return cls(models, pair, detail, tuple(levels), steps, Batches(largest_batch))

    def refined(self, frame: torch.Tensor, plan: FrameDetail, time: float) -> torch.Tensor:
        """A frame at the output size with the detail of the photos, refined where it takes none from them.

        Args:
            frame: The frame as diffusion made it, on the canvas, (3, canvas.height, canvas.width) in [0, 1].
            plan: What `plan_detail` decided for the frame.
            time: The δ of the frame, in [0, 1].

        Returns:
            (3, H, W) in [0, 1], float32, on the CPU.
        """
        if not self.levels:
            return self._base(self.detail, frame, plan, time)
        change = None
        with self.models.denoiser.with_lora(self.pair.lora, self.pair.lora_scale):
            for level, detail in self.levels:
                base = self._base(detail, frame, plan, time)
                if change is None:
                    change = torch.zeros_like(base)
                else:
                    change = F.interpolate(change[None], base.shape[-2:], mode="bicubic")[0]
                self._refine(level, base, change, plan, time)
        return base.add_(change).clamp_(0, 1)

    def _base(self, detail: PairDetail, frame: torch.Tensor, plan: FrameDetail, time: float) -> torch.Tensor:
        with interruptible():
            return with_detail(detail, frame, time, plan=plan)

    def _refine(self, level: Level, base: torch.Tensor, change: torch.Tensor, plan: FrameDetail, time: float) -> None:
        """Add to `change`, which holds what diffusion added at the levels before, what it adds at this one."""
        models, schedule = self.models, self.pair.inversion.schedule
        cells, pixels, chosen = level.cells, level.pixels, level.needed(plan)
        if not chosen:
            return

        def encoded(tile: int) -> torch.Tensor:
            picture = pixels.cut(base, tile) + pixels.cut(change, tile)
            return models.autoencoder.encode(picture.clamp(0, 1)[None])

        latents = level.mean(chosen, map(encoded, chosen))
        when = torch.tensor([time], dtype=torch.float32, device="cpu")
        embeds = models.conditioner.frames(self.pair.prompt_embeds, when, False, NegativeText()).prompt_embeds

        def predict_noise(noisy: torch.Tensor, timestep: int) -> torch.Tensor:
            eps = self.batches.map(
                lambda tiles: models.denoiser.predict_noise(tiles, timestep, embeds.expand(len(tiles), -1, -1)),
                torch.cat([cells.cut(noisy, tile) for tile in chosen]),
            )
            return level.mean(chosen, eps.split(1))

        start = schedule.alpha_bars[self.steps] ** 0.5 * latents
        clean = denoise(start, predict_noise, schedule, self.steps)
        require_finite(clean, models.denoiser.dtype)
        with models.autoencoder.decoder() as decode:
            for tile in chosen:
                gained = (decode(cells.cut(clean, tile)) - decode(cells.cut(latents, tile)))[0].to(change)
                free = level.free(plan, tile).to(change)
                pixels.add(change, tile, free * gained[:, : free.shape[-2], : free.shape[-1]])


def tile_size(unet: torch.nn.Module) -> Size:
    """The size in latent cells that a UNet was trained on."""
    side = unet.config.sample_size
    return (side, side) if isinstance(side, int) else tuple(side)
