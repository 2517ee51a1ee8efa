# SPDX-License-Identifier: Apache-2.0
"""Small line plots drawn with Pillow."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT = 560, 400  # size of a panel in pixels
LEFT, RIGHT, TOP, BOTTOM = 76, 24, 48, 56  # margins of a panel in pixels
COLOURS = ("#1f4e79", "#c0504d", "#4f8a3c", "#7f6000")
FONT, TITLE = ImageFont.load_default(14), ImageFont.load_default(16)

Series = dict[str, list[tuple[float, float]]]


@dataclass(frozen=True)
class Panel:
    """Named points and named lines over one pair of axes, both of which start at 0."""

    title: str
    x: str  # label of the horizontal axis
    y: str  # label of the vertical axis
    points: Series
    lines: Series


def draw(file: Path, panels: list[Panel]) -> None:
    """Draw panels side by side and write them as a PNG."""
    canvas = Image.new("RGB", (WIDTH * len(panels), HEIGHT), "white")
    for i, panel in enumerate(panels):
        canvas.paste(_drawn(panel), (i * WIDTH, 0))
    canvas.save(file, optimize=True)


def _drawn(panel: Panel) -> Image.Image:
    picture = Image.new("RGB", (WIDTH, HEIGHT), "white")
    pen = ImageDraw.Draw(picture)
    values = [point for series in (panel.points, panel.lines) for line in series.values() for point in line]
    x_ticks, y_ticks = (_ticks(max(value[axis] for value in values)) for axis in (0, 1))
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT

    def place(point: tuple[float, float]) -> tuple[float, float]:
        x = LEFT + point[0] / x_ticks[-1] * (right - LEFT)
        return x, bottom - point[1] / y_ticks[-1] * (bottom - TOP)

    for tick in x_ticks:
        x, _ = place((tick, 0))
        pen.line((x, TOP, x, bottom), "#e4e4e4")
        pen.text((x, bottom + 6), f"{tick:g}", "black", FONT, anchor="ma")
    for tick in y_ticks:
        _, y = place((0, tick))
        pen.line((LEFT, y, right, y), "#e4e4e4")
        pen.text((LEFT - 8, y), f"{tick:g}", "black", FONT, anchor="rm")
    pen.line((LEFT, TOP, LEFT, bottom, right, bottom), "black")
    pen.text((LEFT, 12), panel.title, "black", TITLE)
    pen.text((LEFT - 8, TOP - 6), panel.y, "black", FONT, anchor="rb")
    pen.text(((LEFT + right) / 2, HEIGHT - 10), panel.x, "black", FONT, anchor="mb")

    for i, (name, line) in enumerate(panel.lines.items()):
        pen.line([place(point) for point in line], COLOURS[i], 3)
        _legend(pen, i, name, COLOURS[i])
    for i, (name, points) in enumerate(panel.points.items(), len(panel.lines)):
        for x, y in map(place, points):
            pen.ellipse((x - 5, y - 5, x + 5, y + 5), COLOURS[i])
        _legend(pen, i, name, COLOURS[i])
    return picture


def _legend(pen: ImageDraw.ImageDraw, row: int, name: str, colour: str) -> None:
    y = TOP + 16 + 20 * row
    pen.rectangle((LEFT + 14, y - 5, LEFT + 26, y + 5), colour)
    pen.text((LEFT + 34, y), name, "black", FONT, anchor="lm")


def _ticks(largest: float) -> list[float]:
    """About five round numbers, from 0 to at least `largest`."""
    raw = largest / 4
    power = 10 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw)
    return [i * step for i in range(math.ceil(largest / step) + 1)]
