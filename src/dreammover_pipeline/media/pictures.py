# SPDX-License-Identifier: Apache-2.0
"""Sheets of frames, cross-fades, and videos or pictures side by side under their titles."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    import torch

SHEET_EDGE = 2000  # pixels that the longer side of a contact sheet has, about
TILE_MIN = 64  # pixels: the least width of a contact sheet's tile, so that its caption has room
CAPTION = 20  # pixels: the height of a line of text
PANEL_EDGE = 384  # pixels: the longer side of a photo, a frame or a map in a picture that explains
MARGIN = 8  # pixels of white around every picture in a row or on a sheet
FONT = ImageFont.load_default(12)


def picture_of(image: torch.Tensor) -> Image.Image:
    """An image (3, H, W) as a picture of 8 bits; floats are clipped to [0, 1] and rounded, uint8 stays as it is."""
    pixels = (image.detach().clamp(0, 1) * 255).round().byte() if image.is_floating_point() else image
    return Image.fromarray(pixels.movedim(0, -1).contiguous().cpu().numpy())


def contact_sheet(frames: Sequence[Image.Image], times: Sequence[float]) -> Image.Image:
    """Lay frames out in rows, each with its time under it.

    Frames are shrunk until the sheet's longer side is about 2000 pixels, but never below 64 pixels of width.

    Args:
        frames: pictures of one size, in order.
        times: the δ of each frame, in [0, 1]; of a sequence's frames k + δ, with k the number of the gap, from 0 on.
            A frame whose time is a whole number is captioned as an input photo.

    Raises:
        ValueError: there are no frames, or not as many times as frames.
    """
    if not frames or len(frames) != len(times):
        raise ValueError(
            f"a contact sheet needs at least one frame and a time for each frame; {len(frames)} frames and "
            f"{len(times)} times came"
        )
    sheet = ContactSheet(times)
    for index, frame in enumerate(frames):
        sheet.put(index, frame)
    return sheet.picture


class ContactSheet:
    """The sheet of `contact_sheet`, filled frame by frame, since all large frames at once could fill the memory.

    Args:
        times: the time of each frame, as `contact_sheet` takes them.
    """

    def __init__(self, times: Sequence[float]):
        self.picture: Image.Image | None = None  # before the first frame, whose size decides the sheet's
        self._times = times

    def put(self, index: int, frame: Image.Image) -> None:
        """Put a frame in its place.

        Args:
            index: which of the times is the frame's.
            frame: a picture of the same size as all others.
        """
        if self.picture is None:
            self._lay_out(*frame.size)
        x, y = MARGIN + index % self._columns * self._cell[0], MARGIN + index // self._columns * self._cell[1]
        self.picture.paste(frame.convert("RGB").resize(self._tile, Image.Resampling.LANCZOS), (x, y))
        caption = time_caption(self._times[index])
        ImageDraw.Draw(self.picture).text((x, y + self._tile[1] + 2), caption, font=self._font, fill="black")

    def _lay_out(self, width: int, height: int) -> None:
        """Make an empty sheet for frames of this size."""
        count = len(self._times)
        self._columns = min(count, math.ceil(math.sqrt(count * height / width)))  # the sheet is about a square
        rows = math.ceil(count / self._columns)
        scale = min(1, SHEET_EDGE / (self._columns * width), SHEET_EDGE / (rows * height))
        scale = min(1, max(scale, TILE_MIN / width))
        self._tile = max(1, round(width * scale)), max(1, round(height * scale))
        self._font = _font_under(self._tile[1])
        self._cell = max(self._tile[0], TILE_MIN) + MARGIN, self._tile[1] + _line_height(self._font)
        size = self._columns * self._cell[0] + MARGIN, rows * self._cell[1] + MARGIN
        self.picture = Image.new("RGB", size, "white")


def crossfade(first: Image.Image, last: Image.Image, times: Sequence[float]) -> list[Image.Image]:
    """Frames in which one photo fades into another: what a video without any motion looks like.

    Args:
        first: the photo shown alone at time 0.
        last: the photo shown alone at time 1; it must have the size of `first`.
        times: the time of each frame, in [0, 1].

    Raises:
        ValueError: the photos differ in size, or a time is outside [0, 1].
    """
    if first.size != last.size:
        raise ValueError(f"`first` and `last` must have one size, not {first.size} and {last.size}")
    if not all(0 <= time <= 1 for time in times):  # NaN fails every comparison
        raise ValueError(f"`times` must lie in [0, 1], not {list(times)}")
    first, last = first.convert("RGB"), last.convert("RGB")
    return [Image.blend(first, last, time) for time in times]


def comparison(videos: Mapping[str, Sequence[Image.Image]]) -> list[Image.Image]:
    """Put videos side by side, each under its title, so that they play at the same time; frames keep their size.

    Args:
        videos: the frames of each video by its title, from left to right. All videos must have as many frames as the
            first one, and all frames one size.

    Returns:
        The frames of a single video that shows all of them.

    Raises:
        ValueError: there are no videos, or they differ in the number or the size of their frames.
    """
    counts = {title: len(frames) for title, frames in videos.items()}
    if len(set(counts.values())) != 1:
        raise ValueError(f"a comparison needs at least one video and equally many frames in every video, got {counts}")
    sizes = {frame.size for frames in videos.values() for frame in frames}
    if len(sizes) > 1:
        raise ValueError(f"a comparison needs videos whose frames have one size, got {sorted(sizes)}")
    titles, rows = list(videos), list(zip(*videos.values(), strict=True))
    font = _font_under(rows[0][0].height) if rows else FONT
    return [panel_row([frame.convert("RGB") for frame in frames], titles, font=font) for frames in rows]


def _font_under(height: int) -> ImageFont.FreeTypeFont:
    """The font for a caption of a picture of this height in pixels; it grows with large pictures."""
    return ImageFont.load_default(max(FONT.size, height // 28))


def _line_height(font: ImageFont.FreeTypeFont) -> int:
    """Pixels that a line of text in this font takes."""
    return round(CAPTION * font.size / FONT.size)


def as_panel(picture: Image.Image) -> Image.Image:
    """A picture scaled until its longer side has `PANEL_EDGE` pixels."""
    scale = PANEL_EDGE / max(picture.size)
    size = [max(1, round(side * scale)) for side in picture.size]
    return picture.convert("RGB").resize(size, Image.Resampling.LANCZOS)


def stacked(rows: Sequence[Image.Image]) -> Image.Image:
    """Put rows of pictures one below the other on white."""
    picture = Image.new("RGB", (max(row.width for row in rows), sum(row.height for row in rows)), "white")
    top = 0
    for row in rows:
        picture.paste(row, (0, top))
        top += row.height
    return picture


def panel_lefts(
    panels: Sequence[Image.Image], titles: Sequence[str], font: ImageFont.FreeTypeFont = FONT
) -> list[int]:
    """The x, in pixels, at which each picture of a `panel_row` begins, and at last the x at which the row ends."""
    lefts = [MARGIN]
    for panel, title in zip(panels, titles, strict=True):
        lefts.append(lefts[-1] + max(panel.width, math.ceil(font.getlength(title))) + MARGIN)
    return lefts


def panel_row(
    panels: Sequence[Image.Image], titles: Sequence[str], headline: str = "", font: ImageFont.FreeTypeFont = FONT
) -> Image.Image:
    """Put pictures side by side on white, each under its title.

    Args:
        panels: the pictures, from left to right.
        titles: one title for each picture.
        headline: a line of text above everything; the empty text leaves no room for a line.
        font: the font of titles and headline.
    """
    lefts, caption = panel_lefts(panels, titles, font), _line_height(font)
    top = MARGIN + caption * (2 if headline else 1)
    width = max(lefts[-1], math.ceil(font.getlength(headline)) + 2 * MARGIN)
    picture = Image.new("RGB", (width, top + max(panel.height for panel in panels) + MARGIN), "white")
    draw = ImageDraw.Draw(picture)
    draw.text((MARGIN, MARGIN), headline, font=font, fill="black")
    for panel, title, left in zip(panels, titles, lefts[:-1], strict=True):
        draw.text((left, top - caption), title, font=font, fill="black")
        picture.paste(panel, (left, top))
    return picture


def time_caption(time: float) -> str:
    """What is written beside a frame of this time."""
    return f"in {time:.0f}" if time == round(time) else f"delta {time:.3f}"  # Pillow's own font has no δ
