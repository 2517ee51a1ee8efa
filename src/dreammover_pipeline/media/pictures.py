# SPDX-License-Identifier: Apache-2.0
"""Pictures that show what came of a pair: its frames, its flow, what was matched with what and how surely.

Flow is in cells of the padded canvas; given the pair's `canvas` (`PreparedPair.canvas`) the padding is left out, and
cells lie on the pixels they stand for. Without it the photos are taken to fill the grid, which is wrong by less than
a cell.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    import torch

    from ..records import BidirectionalFlow, Canvas

SHEET_EDGE, TILE_MIN, PANEL_EDGE, WHEEL = 2000, 64, 384, 120  # pixels
CAPTION, MARGIN = 20, 8  # pixels: height of a line of text, space around panels
FONT = ImageFont.load_default(12)
LINES = 40
R2 = (0.7548776662466927, 0.5698402909980532)  # multiples of it, modulo 1, fill the square evenly, never in rows
MATCHED = 1.5  # cells; a whole-cell flow and its way back, each off by half a cell in both axes, differ by √2
FINER = 4  # lines are drawn this much larger and then shrunk, for smooth edges
VIRIDIS = np.array([(68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)])
ORANGE = (255, 110, 0)


def picture_of(image: torch.Tensor) -> Image.Image:
    """An image (3, H, W) in [0, 1], clipped to that, as an 8-bit picture, rounded."""
    pixels = (image.detach().clamp(0, 1) * 255).round().byte()
    return Image.fromarray(pixels.movedim(0, -1).contiguous().cpu().numpy())


def contact_sheet(frames: Sequence[Image.Image], times: Sequence[float]) -> Image.Image:
    """Lay frames out in rows, each with its time under it.

    Tiles are shrunk until the sheet's longer side is about 2000 pixels, but never below a readable width.

    Args:
        frames: pictures of one size, in order.
        times: each frame's δ in [0, 1], and k + δ in gap k of a sequence; whole numbers are the inputs.

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
    font = _font_under(tile[1])
    cell = max(tile[0], TILE_MIN) + MARGIN, tile[1] + _line_height(font)

    sheet = Image.new("RGB", (columns * cell[0] + MARGIN, rows * cell[1] + MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    for index, (frame, time) in enumerate(zip(frames, times, strict=True)):
        x, y = MARGIN + index % columns * cell[0], MARGIN + index // columns * cell[1]
        sheet.paste(frame.convert("RGB").resize(tile, Image.Resampling.LANCZOS), (x, y))
        draw.text((x, y + tile[1] + 2), _caption(time), font=font, fill="black")
    return sheet


def flow_picture(flow: BidirectionalFlow, canvas: Canvas | None = None) -> Image.Image:
    """Show the forward and the backward flow side by side, and a wheel that says how to read them.

    A colour's hue is the direction in which a latent cell moves, its saturation how far: white stays, a full colour
    moves at least as far as all but a twentieth of the cells do, whose few outliers would else make the rest pale. In
    the wheel a colour lies where it points to.

    Args:
        flow: of the pair.
        canvas: of the pair, to leave out the padding.
    """
    fields = [np.asarray(field[0].detach().double().cpu()) for field in (flow.forward, flow.backward)]  # [2,h,w]
    lengths = np.concatenate([np.hypot(*field).ravel() for field in fields])
    full = float(np.percentile(lengths, 95)) or float(lengths.max())
    size = _cell_panel_size(flow, canvas)
    panels = [_map_panel(flow_colours(field, full), size, _extent(flow, canvas)) for field in fields]
    titles = ["first photo", "last photo", f"full: {full / _extent(flow, canvas)[0]:.0%} of width"]
    headline = (
        "Where each spot goes in the other photo: the wheel's colour gives the direction; the paler, the less far."
    )
    return _row([*panels, _wheel()], titles, headline)


def correspondence_lines(
    first: Image.Image, last: Image.Image, flow: BidirectionalFlow, lines: int = LINES, canvas: Canvas | None = None
) -> Image.Image:
    """Join points of the first photo with the points of the last one that the flow takes them to.

    The points are spread evenly over the first photo, whatever it shows, and coloured by where they lie around its
    centre. A ring marks a point without a line: its match does not match back (`occlusion_picture` shows all such
    cells), or is outside.

    Args:
        first: the first photo as it stands at the video's start, of any size.
        last: the last photo as it stands at the video's end, of the same size.
        flow: of the pair.
        lines: how many points, 1 … ; fewer on a grid too coarse to hold them.
        canvas: of the pair.

    Raises:
        ValueError: the two differ in size, or `lines` is less than 1.
    """
    if first.size != last.size:
        raise ValueError(
            f"`first` and `last` must have the video's size, both of them, not {first.size} and {last.size}"
        )
    if lines < 1:
        raise ValueError(f"`lines` must be at least 1, not {lines}")
    panels = [_photo_panel(photo) for photo in (first, last)]
    starts, ends, matched = _sampled_matches(flow, lines, _extent(flow, canvas))
    headline = f"Each line joins what is taken for the same spot: {matched.sum()} of {len(matched)} points"
    headline += "." if matched.all() else "; a ring has no match."
    titles = ["first photo", "last photo"]
    picture = _row(panels, titles, headline)
    edges = np.array(panels[0].size)
    left, right = (np.array([x, picture.height - MARGIN - edges[1]]) for x in _lefts(panels, titles)[:2])
    overlay = Image.new("RGBA", (picture.width * FINER, picture.height * FINER))
    draw = ImageDraw.Draw(overlay)
    radius = 3.5 * FINER
    for start, end, found in zip(starts, ends, matched, strict=True):
        a, b = (left + start * edges) * FINER, (right + end * edges) * FINER
        colour = _position_colour(start)
        if not found:
            draw.ellipse([*(a - radius), *(a + radius)], outline="black", width=3 * FINER)
            draw.ellipse([*(a - radius + FINER), *(a + radius - FINER)], outline="white", width=FINER)
            continue
        draw.line([*a, *b], fill=(0, 0, 0, 110), width=3 * FINER)  # an edge, so that lines show on any photo
        draw.line([*a, *b], fill=colour, width=round(1.5 * FINER))
        for point in (a, b):
            draw.ellipse([*(point - radius), *(point + radius)], fill=colour, outline="black", width=FINER)
    overlay = overlay.resize(picture.size, Image.Resampling.LANCZOS)
    return Image.alpha_composite(picture.convert("RGBA"), overlay).convert("RGB")


def confidence_picture(
    flow: BidirectionalFlow,
    photos: tuple[Image.Image, Image.Image] | None = None,
    canvas: Canvas | None = None,
) -> Image.Image:
    """Show how surely each cell of either photo is matched: by e^(−e²/2), e its round-trip error in cells.

    1 says that a cell's match has the cell as its own match, 0 that it has another one far away. A match less than
    half a cell beyond the border counts as on it.

    Args:
        flow: of the pair.
        photos: the two as they stand at the video's ends, to show through in grey.
        canvas: of the pair.
    """
    agreement = np.exp(-(_round_trip_errors(flow) ** 2) / 2)  # [2,h,w]
    panels = _map_panels(_viridis(agreement), flow, photos, canvas)
    titles = ["first photo", "last photo", "how sure"]
    return _row([*panels, _scale_bar()], titles, "How well the matches of both photos agree with each other.")


def occlusion_picture(
    flow: BidirectionalFlow,
    photos: tuple[Image.Image, Image.Image] | None = None,
    canvas: Canvas | None = None,
) -> Image.Image:
    """Show which cells of either photo have no match that matches back, by more than 1.5 cells.

    What is visible in one photo only is among them, and so is what was matched wrongly.

    Args:
        flow: of the pair.
        photos: the two as they stand at the video's ends, to show through in grey.
        canvas: of the pair.
    """
    unmatched = _round_trip_errors(flow) > MATCHED  # [2,h,w]
    colours = np.where(unmatched[..., None], ORANGE, 255).astype(np.uint8)
    panels = _map_panels(colours, flow, photos, canvas)
    return _row(panels, ["first photo", "last photo"], "Orange: hidden in the other photo, or not found there.")


def matches_picture(
    first: Image.Image, last: Image.Image, flow: BidirectionalFlow, canvas: Canvas | None = None
) -> Image.Image:
    """`correspondence_lines`, `confidence_picture` and `occlusion_picture` of a pair, one below the other.

    Args are those of `correspondence_lines`.

    Raises:
        ValueError: the two photos differ in size.
    """
    rows = [
        correspondence_lines(first, last, flow, canvas=canvas),
        confidence_picture(flow, (first, last), canvas),
        occlusion_picture(flow, (first, last), canvas),
    ]
    picture = Image.new("RGB", (max(row.width for row in rows), sum(row.height for row in rows)), "white")
    top = 0
    for row in rows:
        picture.paste(row, (0, top))
        top += row.height
    return picture


def crossfade(first: Image.Image, last: Image.Image, times: Sequence[float]) -> list[Image.Image]:
    """One photo faded into the other, for contrast: what a video without any motion looks like.

    Args:
        first: shown alone at time 0.
        last: shown alone at time 1, of the same size.
        times: of the frames, each in [0, 1].

    Raises:
        ValueError: the two differ in size, or a time is out of range.
    """
    if first.size != last.size:
        raise ValueError(f"`first` and `last` must have one size, not {first.size} and {last.size}")
    if not all(0 <= time <= 1 for time in times):  # NaN fails this too
        raise ValueError(f"`times` must lie in [0, 1], not {list(times)}")
    first, last = first.convert("RGB"), last.convert("RGB")
    return [Image.blend(first, last, time) for time in times]


def comparison(videos: Mapping[str, Sequence[Image.Image]]) -> list[Image.Image]:
    """Put videos side by side, each under its title, to be played at once; frames keep their size.

    Args:
        videos: by title, in the order wanted; as many frames in each, all of one size.

    Returns:
        The frames of one video.

    Raises:
        ValueError: no videos, unequal numbers of frames, or unequal sizes.
    """
    counts = {title: len(frames) for title, frames in videos.items()}
    if len(set(counts.values())) != 1:
        raise ValueError(f"a comparison needs at least one video and as many frames in each, got {counts}")
    sizes = {frame.size for frames in videos.values() for frame in frames}
    if len(sizes) > 1:
        raise ValueError(f"a comparison needs frames of one size, got {sorted(sizes)}")
    titles, rows = list(videos), list(zip(*videos.values(), strict=True))
    font = _font_under(rows[0][0].height) if rows else FONT
    return [_row([frame.convert("RGB") for frame in frames], titles, font=font) for frames in rows]


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


def _font_under(height: int) -> ImageFont.FreeTypeFont:
    """For the captions of pictures of this height."""
    return ImageFont.load_default(max(FONT.size, height // 28))


def _line_height(font: ImageFont.FreeTypeFont) -> int:
    return round(CAPTION * font.size / FONT.size)


def _wheel() -> Image.Image:
    axis = np.linspace(-1, 1, WHEEL)
    field = np.stack(np.meshgrid(axis, axis))  # [2,WHEEL,WHEEL]
    field[:, np.hypot(*field) > 1] = 0
    return Image.fromarray(flow_colours(field, 1))


def _lefts(panels: Sequence[Image.Image], titles: Sequence[str], font: ImageFont.FreeTypeFont = FONT) -> list[int]:
    """Where each panel of a row begins, and where the row ends."""
    lefts = [MARGIN]
    for panel, title in zip(panels, titles, strict=True):
        lefts.append(lefts[-1] + max(panel.width, math.ceil(font.getlength(title))) + MARGIN)
    return lefts


def _row(
    panels: Sequence[Image.Image], titles: Sequence[str], headline: str = "", font: ImageFont.FreeTypeFont = FONT
) -> Image.Image:
    """Panels side by side under their titles, and a line of text above all."""
    lefts, caption = _lefts(panels, titles, font), _line_height(font)
    top = MARGIN + caption * (2 if headline else 1)
    width = max(lefts[-1], math.ceil(font.getlength(headline)) + 2 * MARGIN)
    picture = Image.new("RGB", (width, top + max(panel.height for panel in panels) + MARGIN), "white")
    draw = ImageDraw.Draw(picture)
    draw.text((MARGIN, MARGIN), headline, font=font, fill="black")
    for panel, title, left in zip(panels, titles, lefts[:-1], strict=True):
        draw.text((left, top - caption), title, font=font, fill="black")
        picture.paste(panel, (left, top))
    return picture


def _photo_panel(photo: Image.Image) -> Image.Image:
    scale = PANEL_EDGE / max(photo.size)
    size = [max(1, round(side * scale)) for side in photo.size]
    return photo.convert("RGB").resize(size, Image.Resampling.LANCZOS)


def _extent(flow: BidirectionalFlow, canvas: Canvas | None) -> tuple[float, float]:
    """(width, height) in cells, possibly fractions, of the photo, which fills the grid's top left."""
    h, w = flow.forward.shape[-2:]
    if canvas is None:
        return w, h
    return w * canvas.content_width / canvas.width, h * canvas.content_height / canvas.height


def _cell_panel_size(flow: BidirectionalFlow, canvas: Canvas | None) -> tuple[int, int]:
    """(width, height) in pixels at which cells are squares of whole pixels."""
    extent = _extent(flow, canvas)
    factor = max(1, PANEL_EDGE // math.ceil(max(extent)))
    return max(1, round(extent[0] * factor)), max(1, round(extent[1] * factor))


def _map_panel(colours: np.ndarray, size: tuple[int, int], extent: tuple[float, float]) -> Image.Image:
    """Colours (h,w,3) of cells, as far as the photo goes, at a size (width, height) in pixels."""
    return Image.fromarray(colours).resize(size, Image.Resampling.NEAREST, box=(0, 0, *extent))


def _map_panels(
    colours: np.ndarray,
    flow: BidirectionalFlow,
    photos: tuple[Image.Image, Image.Image] | None,
    canvas: Canvas | None,
) -> list[Image.Image]:
    """Colours (2,h,w,3) of both photos' cells, over the photos in grey where there are any."""
    extent = _extent(flow, canvas)
    if photos is None:
        return [_map_panel(part, _cell_panel_size(flow, canvas), extent) for part in colours]
    greys = [_photo_panel(photo).convert("L").convert("RGB") for photo in photos]
    return [
        Image.blend(grey, _map_panel(part, grey.size, extent), 0.6) for grey, part in zip(greys, colours, strict=True)
    ]


def _round_trip_errors(flow: BidirectionalFlow) -> np.ndarray:
    """(2,h,w) in cells, of the cells of the first and of the last photo."""
    from ..flow import round_trip_error  # here, since torch takes seconds to import
    from ..records import BidirectionalFlow

    fields = [field.detach().double().cpu() for field in (flow.forward, flow.backward)]
    return round_trip_error(BidirectionalFlow(*map(_held_inside, fields)))[:, 0].numpy()


def _held_inside(field: torch.Tensor) -> torch.Tensor:
    """Flow (1,2,h,w) that ends less than half a cell beyond the outermost centres, ended there: cells reach so far."""
    from ..fields import cell_grid

    cells = cell_grid(*field.shape[-2:], field)
    target = cells + field
    held = target.clamp(min=0).minimum(cells[..., -1:, -1:])
    return (held - cells).where((target - held).abs().amax(1, keepdim=True) <= 0.5, field)


def _sampled_matches(
    flow: BidirectionalFlow, lines: int, extent: tuple[float, float]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Points of the first photo and where they go in the last, (n,2) as parts of its sides, and which are matched."""
    spread = np.arange(1, lines + 1)[:, None] * R2 % 1
    counts = np.floor(np.array(extent) + 0.5)  # of the cells whose centre is on the photo
    x, y = np.unique((spread * counts).astype(int), axis=0).T
    cells = np.stack([x, y], -1) + 0.5  # centres
    moved = cells + flow.forward[0].detach().double().cpu().numpy()[:, y, x].T
    inside = ((moved >= 0) & (moved <= extent)).all(-1)
    matched = (_round_trip_errors(flow)[0, y, x] <= MATCHED) & inside
    return cells / extent, moved / extent, matched


def _position_colour(point: np.ndarray) -> tuple[int, int, int]:
    """A colour for a point of a photo, by its direction from the centre; its sides go from 0 to 1."""
    hue = math.atan2(point[1] - 0.5, point[0] - 0.5) / (2 * math.pi) % 1
    return tuple(round(255 * part) for part in colorsys.hsv_to_rgb(hue, 0.9, 1))


def _viridis(values: np.ndarray) -> np.ndarray:
    """Values in [0, 1] to colours, (…,3) uint8."""
    places = np.linspace(0, 1, len(VIRIDIS))
    return np.stack([np.interp(values, places, channel) for channel in VIRIDIS.T], -1).round().astype(np.uint8)


def _scale_bar() -> Image.Image:
    bar = Image.new("RGB", (WHEEL, WHEEL), "white")
    bar.paste(Image.fromarray(_viridis(np.linspace(1, 0, WHEEL))[:, None]).resize((WHEEL // 5, WHEEL)), (0, 0))
    draw = ImageDraw.Draw(bar)
    for place, text in ((0, "1: sure"), (0.5, "0.5"), (1, "0: no match")):
        draw.text((WHEEL // 5 + 6, place * (WHEEL - 14)), text, font=FONT, fill="black")
    return bar


def _caption(time: float) -> str:
    return f"in {time:.0f}" if time == round(time) else f"delta {time:.3f}"  # Pillow's own font has no δ
