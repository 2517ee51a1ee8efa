# SPDX-License-Identifier: Apache-2.0
"""Pictures that show what came of a pair: the contact sheet of its frames, and its flow in colours."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    import torch

    from .records import BidirectionalFlow

SHEET_EDGE, TILE_MIN, FLOW_EDGE, WHEEL = 2000, 64, 384, 120  # pixels
CAPTION, MARGIN = 20, 8  # pixels: height of a line of text, space around panels
FONT = ImageFont.load_default(12)


def picture_of(image: torch.Tensor) -> Image.Image:
    """An image (3, H, W) in [0, 1], clipped to that, as an 8-bit picture, rounded."""
    pixels = (image.detach().clamp(0, 1) * 255).round().byte()
    return Image.fromarray(pixels.movedim(0, -1).contiguous().cpu().numpy())


def contact_sheet(frames: Sequence[Image.Image], times: Sequence[float]) -> Image.Image:
    """Lay frames out in rows, each with its time under it.

    Tiles are shrunk until the sheet's longer side is about 2000 pixels, but never below a readable width.

    Args:
        frames: pictures of one size, in order.
        times: each frame's δ in [0, 1]; 0 and 1 are the two inputs.

    Raises:
        ValueError: no frames, or not as many times as frames.
    """
    if not frames or len(frames) != len(times):
        raise ValueError(f"a sheet needs a time for each of at least one frame, got {len(frames)} and {len(times)}")
    width, height = frames[0].size
    columns = min(len(frames), math.ceil(math.sqrt(len(frames) * height / width)))  # about a square in all
    rows = math.ceil(len(frames) / columns)
    scale = min(1, SHEET_EDGE / (columns * width), SHEET_EDGE / (rows * height))
    scale = min(1, max(scale, TILE_MIN / width))
    tile = max(1, round(width * scale)), max(1, round(height * scale))
    cell = max(tile[0], TILE_MIN) + MARGIN, tile[1] + CAPTION

    sheet = Image.new("RGB", (columns * cell[0] + MARGIN, rows * cell[1] + MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    for index, (frame, time) in enumerate(zip(frames, times, strict=True)):
        x, y = MARGIN + index % columns * cell[0], MARGIN + index // columns * cell[1]
        sheet.paste(frame.convert("RGB").resize(tile, Image.Resampling.LANCZOS), (x, y))
        draw.text((x, y + tile[1] + 2), _caption(time), font=FONT, fill="black")
    return sheet


def flow_picture(flow: BidirectionalFlow) -> Image.Image:
    """Show the forward and the backward flow side by side, and a wheel that says how to read them.

    A colour's hue is the direction in which a latent cell moves, its saturation how far: white stays, a full colour
    moves at least as far as all but a twentieth of the cells do, whose few outliers would else make the rest pale. In
    the wheel a colour lies where it points to.
    """
    fields = [np.asarray(field[0].detach().double().cpu()) for field in (flow.forward, flow.backward)]  # [2,h,w]
    lengths = np.concatenate([np.hypot(*field).ravel() for field in fields])
    full = float(np.percentile(lengths, 95)) or float(lengths.max())
    panels = [_enlarged(Image.fromarray(flow_colours(field, full))) for field in fields]
    panels.append(_wheel())
    titles = ["forward, 0 to 1", "backward, 1 to 0", f"full: {full:.3g} cells"]

    lefts = [MARGIN]
    for panel in panels:
        lefts.append(lefts[-1] + max(panel.width, WHEEL) + MARGIN)  # room for the title above a narrow panel
    height = max(panel.height for panel in panels)
    picture = Image.new("RGB", (lefts[-1], height + CAPTION + 2 * MARGIN), "white")
    draw = ImageDraw.Draw(picture)
    for panel, title, left in zip(panels, titles, lefts[:-1], strict=True):
        draw.text((left, MARGIN), title, font=FONT, fill="black")
        picture.paste(panel, (left, MARGIN + CAPTION))
    return picture


def flow_colours(field: np.ndarray, full: float) -> np.ndarray:
    """Colour a field of vectors: hue is direction, saturation is length.

    Args:
        field: (2,h,w) vectors (dx, dy), rightwards and downwards.
        full: the length from which on a colour is full; 0 only for a field of zeros.

    Returns:
        (h,w,3) uint8 RGB: white where the vector is zero, red to the right, hues turning clockwise as seen.
    """
    angle = np.arctan2(field[1], field[0]) / (2 * np.pi) % 1
    length = np.minimum(np.hypot(*field) / (full or 1), 1)
    hsv = np.stack([angle * 255, length * 255, np.full_like(length, 255)], axis=-1)  # [h,w,3]
    return np.asarray(Image.fromarray(hsv.round().astype(np.uint8), mode="HSV").convert("RGB"))


def _wheel() -> Image.Image:
    axis = np.linspace(-1, 1, WHEEL)
    field = np.stack(np.meshgrid(axis, axis))  # [2,WHEEL,WHEEL]
    field[:, np.hypot(*field) > 1] = 0
    return Image.fromarray(flow_colours(field, 1))


def _enlarged(picture: Image.Image) -> Image.Image:
    factor = max(1, FLOW_EDGE // max(picture.size))
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)


def _caption(time: float) -> str:
    return {0: "in 0", 1: "in 1"}.get(time, f"delta {time:.3f}")  # Pillow's own font has no δ
