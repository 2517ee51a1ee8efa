# SPDX-License-Identifier: Apache-2.0
"""Colours for directions, for confidence and for sources, and the legends that explain them."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from .pictures import CAPTION, FONT

LEGEND_EDGE = 120  # pixels: either side of the square that explains the colours
# Five colours along matplotlib's colour map of this name, for values from 0 to 1.
VIRIDIS = np.array([(68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)])
# The first and the last photo: orange and violet, which the colour-blind tell apart too, and from what is mixed.
PHOTO_COLOURS = np.array([(230, 97, 1), (94, 60, 153)])


def flow_colours(field: np.ndarray, full: float) -> np.ndarray:
    """Colour a field of vectors: the hue says the direction, the saturation the length.

    Args:
        field: vectors (dx, dy) as an array (2, h, w); dx points to the right, dy downwards.
        full: the length from which on a colour is fully saturated; 0 is allowed where all vectors are zero.

    Returns:
        RGB colours (h, w, 3) of 8 bits. A zero vector is white and one to the right red; as a vector turns clockwise,
        its colour runs through yellow, green and blue.
    """
    angle = np.arctan2(field[1], field[0]) / (2 * np.pi) % 1
    length = np.minimum(np.hypot(*field) / (full or 1), 1)
    hsv = np.stack([angle * 255, length * 255, np.full_like(length, 255)], axis=-1)  # [h,w,3]
    return np.asarray(Image.fromarray(hsv.round().astype(np.uint8), mode="HSV").convert("RGB"))


def colour_wheel() -> Image.Image:
    """The legend of `flow_colours`: a disc in which every colour lies in the direction that it stands for."""
    axis = np.linspace(-1, 1, LEGEND_EDGE)
    field = np.stack(np.meshgrid(axis, axis))  # [2,LEGEND_EDGE,LEGEND_EDGE]
    field[:, np.hypot(*field) > 1] = 0
    return Image.fromarray(flow_colours(field, 1))


def confidence_colours(values: np.ndarray) -> np.ndarray:
    """Colour values: dark violet at 0, green at 0.5, yellow at 1.

    Args:
        values: an array of any shape, in [0, 1].

    Returns:
        RGB colours of 8 bits, in the shape of `values` with one more axis at its end.
    """
    places = np.linspace(0, 1, len(VIRIDIS))
    return np.stack([np.interp(values, places, channel) for channel in VIRIDIS.T], -1).round().astype(np.uint8)


def colour_scale() -> Image.Image:
    """The legend of `confidence_colours`: a bar from 1 at the top to 0 at the bottom, with words beside it."""
    bar = Image.new("RGB", (LEGEND_EDGE, LEGEND_EDGE), "white")
    column = Image.fromarray(confidence_colours(np.linspace(1, 0, LEGEND_EDGE))[:, None])
    width = LEGEND_EDGE // 5
    bar.paste(column.resize((width, LEGEND_EDGE)), (0, 0))
    draw = ImageDraw.Draw(bar)
    for place, text in ((0, "1: sure"), (0.5, "0.5"), (1, "0: no match")):
        draw.text((width + 6, place * (LEGEND_EDGE - 14)), text, font=FONT, fill="black")
    return bar


def source_colours(shares: np.ndarray, taken: np.ndarray) -> np.ndarray:
    """Colour places by the photos that they come from: orange the first, violet the last; white is neither.

    Args:
        shares: the shares of the first and of the last photo, an array (2, ...) that sums to 1 along its first axis.
        taken: how far the photos are taken at all, in [0, 1], in the shape of one of the shares.

    Returns:
        RGB colours of 8 bits, in the shape of `taken` with one more axis at its end.
    """
    colours = np.tensordot(shares, PHOTO_COLOURS, (0, 0))
    return (255 + taken[..., None] * (colours - 255)).round().astype(np.uint8)


def source_legend() -> Image.Image:
    """The legend of `source_colours`: from the first photo to the last one, and downwards the less far taken."""
    last, missing = np.meshgrid(np.linspace(0, 1, LEGEND_EDGE), np.linspace(0, 1, LEGEND_EDGE))
    square = Image.fromarray(source_colours(np.stack([1 - last, last]), 1 - missing))
    legend = Image.new("RGB", (2 * LEGEND_EDGE, LEGEND_EDGE + CAPTION), "white")
    legend.paste(square, (0, CAPTION))
    draw = ImageDraw.Draw(legend)
    for place, text in ((0, "first"), (0.5, "both"), (1, "last")):
        draw.text((place * (LEGEND_EDGE - FONT.getlength(text)), 2), text, font=FONT, fill="black")
    for place, text in ((0, "M = 1: the photos"), (1, "M = 0: diffusion")):
        draw.text((LEGEND_EDGE + 6, CAPTION + place * (LEGEND_EDGE - 14)), text, font=FONT, fill="black")
    return legend
