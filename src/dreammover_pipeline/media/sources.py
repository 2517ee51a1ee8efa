# SPDX-License-Identifier: Apache-2.0
"""Pictures of where the frames' detail comes from: which photo, and how far it is taken."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from .colours import source_colours, source_legend
from .pictures import as_panel, panel_row, stacked, time_caption

if TYPE_CHECKING:
    from ..records import Canvas, FrameSources

ROWS = 3  # how many frames `sources_picture` shows by default


def sources_map(sources: FrameSources, canvas: Canvas, size: tuple[int, int]) -> Image.Image:
    """Colour every place of a frame by the photo that it comes from.

    Orange is the first photo and violet the last one; what is seen in both has their mixture. The paler a place, the
    less far the photos are taken; a white place is what diffusion made.

    Args:
        sources: where the frame comes from.
        canvas: the pair's canvas, so that the padding is left out.
        size: width and height of the map in pixels.
    """
    shares, taken = (np.asarray(field.detach().cpu().double()) for field in (sources.shares, sources.taken[0]))
    # What pads the canvas comes from nowhere; it goes on as the picture's edge, whose colours are mixed with it.
    row, column = (
        np.minimum(np.arange(count), last)
        for count, last in zip(taken.shape, canvas.last_on(*taken.shape), strict=True)
    )
    picture = Image.fromarray(source_colours(shares[:, row[:, None], column], taken[row[:, None], column]))
    # Between the middles of the places the map is interpolated, as M is in the frame.
    return picture.resize(size, Image.Resampling.BILINEAR, box=(0, 0, *canvas.content_on(*taken.shape)))


def sources_picture(
    frames: Sequence[Image.Image], sources: Sequence[FrameSources], canvas: Canvas, rows: int = ROWS
) -> Image.Image:
    """Show frames, and beside each of them its `sources_map`, one below the other.

    Args:
        frames: the frames between the photos, of one size.
        sources: where each of the frames comes from, as `DreamMoverPipeline.keeping_sources` keeps it.
        canvas: the pair's canvas, so that the padding is left out.
        rows: how many of the frames to show at most, at least 1; they are spread evenly.

    Raises:
        ValueError: there are no frames, or not as many sources as frames, or `rows` is less than 1.
    """
    if not frames or len(frames) != len(sources):
        raise ValueError(
            f"a picture of sources needs at least one frame and the sources of each; {len(frames)} frames and sources "
            f"of {len(sources)} came"
        )
    if rows < 1:
        raise ValueError(f"`rows` must be at least 1, not {rows}")
    rows = min(rows, len(frames))
    drawn = []
    for index in ((2 * row + 1) * len(frames) // (2 * rows) for row in range(rows)):
        frame, legend = as_panel(frames[index]), [] if drawn else [source_legend()]
        panels = [frame, sources_map(sources[index], canvas, frame.size), *legend]
        titles = [time_caption(sources[index].time), "where it comes from", "which photo"][: len(panels)]
        headline = "" if drawn else "Which photo every place comes from. White: what diffusion made."
        drawn.append(panel_row(panels, titles, headline))
    return stacked(drawn)
