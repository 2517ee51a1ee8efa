# SPDX-License-Identifier: Apache-2.0
"""Pictures of a pair's flow: where every spot goes, what was matched with what, and how surely.

Flow is in latent cells of the padded canvas. Given the pair's canvas (`PreparedPair.canvas`), a picture leaves the
padding out and puts cells on the pixels that they stand for. Without a canvas the photos are taken to fill the whole
grid, which is wrong by less than a cell.
"""

from __future__ import annotations

import colorsys
import math
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw

from .colours import colour_scale, colour_wheel, confidence_colours, flow_colours
from .pictures import MARGIN, PANEL_EDGE, as_panel, panel_lefts, panel_row, stacked

if TYPE_CHECKING:
    import torch

    from ..records import BidirectionalFlow, Canvas

LINES = 40  # how many points `correspondence_lines` shows by default
PIECES = 24  # of how many straight pieces a line is made that shows a way through time
# The multiples of this vector, modulo 1, fill the unit square evenly and never in rows: the R2 sequence.
R2 = (0.7548776662466927, 0.5698402909980532)
# Cells by which a round trip may end beside its start and still count as a match. A flow of whole cells is off by up
# to half a cell in both axes on either way, so the round trip of a right match is off by up to √2 cells.
MATCHED = 1.5
FINER = 4  # lines are drawn this many times larger and then shrunk, so that their edges are smooth
ORANGE = (255, 110, 0)


def flow_picture(flow: BidirectionalFlow, canvas: Canvas | None = None) -> Image.Image:
    """Show the forward and the backward flow side by side, and a wheel that says how to read them.

    The hue of a cell says in which direction it moves, the saturation how far: a white cell stays where it is, and a
    full colour means that at most a twentieth of the cells move farther. A scale up to the farthest cell would let a
    few outliers make all others pale. In the wheel every colour lies in the direction that it stands for.

    Args:
        flow: the pair's flow.
        canvas: the pair's canvas, so that the padding is left out.
    """
    fields = [np.asarray(field[0].detach().cpu().double()) for field in (flow.forward, flow.backward)]  # [2,h,w]
    lengths = np.concatenate([np.hypot(*field).ravel() for field in fields])
    full = float(np.percentile(lengths, 95)) or float(lengths.max())
    size = _cell_panel_size(flow, canvas)
    panels = [_map_panel(flow_colours(field, full), size, _extent(flow, canvas)) for field in fields]
    titles = ["first photo", "last photo", f"full: {full / _extent(flow, canvas)[0]:.0%} of width"]
    headline = (
        "Where each spot goes in the other photo: the wheel's colour gives the direction; the paler, the less far."
    )
    return panel_row([*panels, colour_wheel()], titles, headline)


def correspondence_lines(
    first: Image.Image,
    last: Image.Image,
    flow: BidirectionalFlow,
    lines: int = LINES,
    canvas: Canvas | None = None,
    motion: str = "rigid",
) -> Image.Image:
    """Join points of the first photo with the points of the last one that the flow takes them to.

    The points are spread evenly over the first photo, whatever it shows, and coloured by where they lie around its
    centre. A line shows the way that its point takes through the frames, while time runs from the one photo to the
    other: it is straight where things go straight and bent where they turn. A ring instead of a line marks a point
    whose match does not match back (`occlusion_picture` shows all such cells) or lies outside the photo.

    Args:
        first: the first photo as the video begins with it, of any size.
        last: the last photo as the video ends with it; it must have the size of `first`.
        flow: the pair's flow.
        lines: how many points to show, at least 1; a grid with fewer cells gets fewer points.
        canvas: the pair's canvas, so that the padding is left out.
        motion: the way that things take through time, as `DreamMoverPipeline.render` takes it.

    Raises:
        ValueError: the photos differ in size, or `lines` is less than 1.
    """
    if first.size != last.size:
        raise ValueError(f"`first` and `last` must both have the video's size, not {first.size} and {last.size}")
    if lines < 1:
        raise ValueError(f"`lines` must be at least 1, not {lines}")
    panels = [as_panel(photo) for photo in (first, last)]
    ways, matched = _sampled_ways(flow, lines, _extent(flow, canvas), motion)
    headline = f"Each line joins what is taken for the same spot: {matched.sum()} of {len(matched)} points"
    headline += "." if matched.all() else "; a ring has no match."
    titles = ["first photo", "last photo"]
    picture = panel_row(panels, titles, headline)
    edges = np.array(panels[0].size)
    left, right = (np.array([x, picture.height - MARGIN - edges[1]]) for x in panel_lefts(panels, titles)[:2])
    overlay = Image.new("RGBA", (picture.width * FINER, picture.height * FINER))
    draw = ImageDraw.Draw(overlay)
    radius = 3.5 * FINER
    passing = np.linspace(left, right, PIECES + 1)  # where the top left of the photo is drawn at every time
    for way, found in zip(ways, matched, strict=True):
        line = (passing + way * edges) * FINER
        a, b = line[0], line[-1]
        colour = _position_colour(way[0])
        if not found:
            draw.ellipse([*(a - radius), *(a + radius)], outline="black", width=3 * FINER)
            draw.ellipse([*(a - radius + FINER), *(a + radius - FINER)], outline="white", width=FINER)
            continue
        # A dark edge makes a line visible on any photo.
        draw.line([*line.ravel()], fill=(0, 0, 0, 110), width=3 * FINER, joint="curve")
        draw.line([*line.ravel()], fill=colour, width=round(1.5 * FINER), joint="curve")
        for point in (a, b):
            draw.ellipse([*(point - radius), *(point + radius)], fill=colour, outline="black", width=FINER)
    overlay = overlay.resize(picture.size, Image.Resampling.LANCZOS)
    return Image.alpha_composite(picture.convert("RGBA"), overlay).convert("RGB")


def confidence_picture(
    flow: BidirectionalFlow,
    photos: tuple[Image.Image, Image.Image] | None = None,
    canvas: Canvas | None = None,
) -> Image.Image:
    """Show how surely each cell of either photo is matched.

    The value shown is e^(−d²/2), where d is the distance in cells between a cell and the match of its match. A value
    of 1 says that the match of a cell is matched with that cell, a value near 0 that it is matched with a cell far
    from it. A match at most half a cell beyond the outermost cells' centres counts as on the border.

    Args:
        flow: the pair's flow.
        photos: the two photos as the video shows them at its ends, in grey under the colours; None for plain colours.
        canvas: the pair's canvas, so that the padding is left out.
    """
    agreement = np.exp(-(_round_trip_errors(flow) ** 2) / 2)  # [2,h,w]
    panels = _map_panels(confidence_colours(agreement), flow, photos, canvas)
    titles = ["first photo", "last photo", "how sure"]
    return panel_row([*panels, colour_scale()], titles, "How well the matches of both photos agree with each other.")


def occlusion_picture(
    flow: BidirectionalFlow,
    photos: tuple[Image.Image, Image.Image] | None = None,
    canvas: Canvas | None = None,
) -> Image.Image:
    """Show which cells of either photo lie more than 1.5 cells away from the match of their match.

    These are what is visible in one photo only, and what was matched wrongly.

    Args:
        flow: the pair's flow.
        photos: the two photos as the video shows them at its ends, in grey under the colours; None for plain colours.
        canvas: the pair's canvas, so that the padding is left out.
    """
    unmatched = _round_trip_errors(flow) > MATCHED  # [2,h,w]
    colours = np.where(unmatched[..., None], ORANGE, 255).astype(np.uint8)
    panels = _map_panels(colours, flow, photos, canvas)
    return panel_row(panels, ["first photo", "last photo"], "Orange: hidden in the other photo, or not found there.")


def matches_picture(
    first: Image.Image,
    last: Image.Image,
    flow: BidirectionalFlow,
    canvas: Canvas | None = None,
    motion: str = "rigid",
) -> Image.Image:
    """Show `correspondence_lines`, `confidence_picture` and `occlusion_picture` of a pair, one below the other.

    Args:
        first: the first photo as the video begins with it, of any size.
        last: the last photo as the video ends with it; it must have the size of `first`.
        flow: the pair's flow.
        canvas: the pair's canvas, so that the padding is left out.
        motion: the way that things take through time, as `DreamMoverPipeline.render` takes it.

    Raises:
        ValueError: the photos differ in size.
    """
    rows = [
        correspondence_lines(first, last, flow, canvas=canvas, motion=motion),
        confidence_picture(flow, (first, last), canvas),
        occlusion_picture(flow, (first, last), canvas),
    ]
    return stacked(rows)


def _position_colour(point: np.ndarray) -> tuple[int, int, int]:
    """The colour of a point (x, y) by its direction from the centre of the photo, whose sides go from 0 to 1."""
    hue = math.atan2(point[1] - 0.5, point[0] - 0.5) / (2 * math.pi) % 1
    return tuple(round(255 * part) for part in colorsys.hsv_to_rgb(hue, 0.9, 1))


def _extent(flow: BidirectionalFlow, canvas: Canvas | None) -> tuple[float, float]:
    """(width, height) in cells, possibly fractional, of the part of the grid at its top left that the photo fills."""
    h, w = flow.forward.shape[-2:]
    return (w, h) if canvas is None else canvas.content_on(h, w)


def _cell_panel_size(flow: BidirectionalFlow, canvas: Canvas | None) -> tuple[int, int]:
    """(width, height) in pixels of a map whose cells are squares of whole pixels."""
    extent = _extent(flow, canvas)
    factor = max(1, PANEL_EDGE // math.ceil(max(extent)))
    return max(1, round(extent[0] * factor)), max(1, round(extent[1] * factor))


def _map_panel(colours: np.ndarray, size: tuple[int, int], extent: tuple[float, float]) -> Image.Image:
    """A map from the colours (h, w, 3) of the cells, cut to the photo's extent in cells.

    Args:
        colours: the colour of every cell.
        size: width and height of the map in pixels.
        extent: width and height in cells of the part that the photo fills.
    """
    return Image.fromarray(colours).resize(size, Image.Resampling.NEAREST, box=(0, 0, *extent))


def _map_panels(
    colours: np.ndarray,
    flow: BidirectionalFlow,
    photos: tuple[Image.Image, Image.Image] | None,
    canvas: Canvas | None,
) -> list[Image.Image]:
    """The maps of the first and the last photo, from the colours (2, h, w, 3) of their cells.

    Given the photos, the colours lie half transparent over the photos in grey.
    """
    extent = _extent(flow, canvas)
    if photos is None:
        return [_map_panel(part, _cell_panel_size(flow, canvas), extent) for part in colours]
    greys = [as_panel(photo).convert("L").convert("RGB") for photo in photos]
    return [
        Image.blend(grey, _map_panel(part, grey.size, extent), 0.6) for grey, part in zip(greys, colours, strict=True)
    ]


def _sampled_ways(
    flow: BidirectionalFlow, lines: int, extent: tuple[float, float], motion: str
) -> tuple[np.ndarray, np.ndarray]:
    """The ways of points spread evenly over the first photo, and whether they are matched.

    Returns:
        Where each point is at `PIECES` + 1 even times from 0 to 1, (n, PIECES + 1, 2), with a photo's sides going from
        0 to 1; and whether each of them (n) is matched.
    """
    import torch  # not at the top of this file, since it takes seconds to import

    from ..paths import motion_paths
    from ..records import BidirectionalFlow

    spread = np.arange(1, lines + 1)[:, None] * R2 % 1
    counts = np.floor(np.array(extent) + 0.5)  # columns and rows of cells whose centre is on the photo
    x, y = np.unique((spread * counts).astype(int), axis=0).T
    cells = np.stack([x, y], -1) + 0.5  # a cell's centre is half a cell from its edges
    fields = [field.detach().cpu().double() for field in (flow.forward, flow.backward)]
    paths = motion_paths(BidirectionalFlow(*fields), motion)
    times = torch.linspace(0, 1, PIECES + 1, dtype=torch.float64)
    ways = cells[:, None] + paths.displacements(0, times).numpy()[:, :, y, x].transpose(2, 0, 1)
    ways[:, -1] = cells + fields[0][0].numpy()[:, y, x].T  # without the rounding of the path
    inside = ((ways[:, -1] >= 0) & (ways[:, -1] <= extent)).all(-1)
    matched = (_round_trip_errors(flow)[0, y, x] <= MATCHED) & inside
    return ways / extent, matched


def _round_trip_errors(flow: BidirectionalFlow) -> np.ndarray:
    """How many cells lie between a cell and the match of its match, (2, h, w), for the first and the last photo."""
    from ..flow import round_trip_error  # not at the top of this file, since torch takes seconds to import
    from ..records import BidirectionalFlow

    fields = [field.detach().cpu().double() for field in (flow.forward, flow.backward)]
    return round_trip_error(BidirectionalFlow(*map(_held_inside, fields)))[:, 0].numpy()


def _held_inside(field: torch.Tensor) -> torch.Tensor:
    """Flow (1, 2, h, w), shortened to the outermost cells' centres where it ends at most half a cell beyond them.

    The outermost cells reach half a cell beyond their centres, so such a match is still on the grid.
    """
    from ..fields import cell_grid

    cells = cell_grid(*field.shape[-2:], field)
    target = cells + field
    held = target.clamp(min=0).minimum(cells[..., -1:, -1:])
    return (held - cells).where((target - held).abs().amax(1, keepdim=True) <= 0.5, field)
