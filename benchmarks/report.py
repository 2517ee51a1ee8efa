# SPDX-License-Identifier: Apache-2.0
"""Tables of results, each of which says whether its figures were counted, measured or derived."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np


@dataclass(frozen=True)
class Spread:
    """A figure that was measured in several rounds: its median, and the range that holds four fifths of the rounds."""

    median: float
    p10: float
    p90: float
    rounds: int

    def __str__(self) -> str:
        return f"{self.median:.4g} ({self.p10:.4g}–{self.p90:.4g})"


def spread(values: Sequence[float]) -> Spread:
    """The median and the 10th and 90th percentile of values."""
    p10, median, p90 = np.percentile(values, (10, 50, 90)).tolist()
    return Spread(median, p10, p90, len(values))


def ratio(upper: Sequence[float], lower: Sequence[float]) -> Spread:
    """The spread of the ratio of two things measured by turns, taken round by round.

    A slow moment of the machine then affects both.
    """
    return spread([a / b for a, b in zip(upper, lower, strict=True)])


@dataclass(frozen=True)
class Table:
    """A table of results."""

    title: str
    basis: Literal["counted", "measured", "derived"]  # how the figures came about
    columns: tuple[str, ...]  # names of the columns, with units
    rows: list[tuple]  # in each row a value for each column
    note: str = ""  # how to read the table

    def markdown(self) -> str:
        """The table as GitHub's Markdown."""
        lines = [f"### {self.title} ({self.basis})"]
        lines += ["| " + " | ".join(map(_cell, row)) + " |" for row in (self.columns, *self.rows)]
        lines.insert(2, "|" + "---|" * len(self.columns))
        return "\n".join([*lines, *([f"\n{self.note}"] if self.note else []), ""])

    def as_json(self) -> dict:
        """The table as a dictionary, whose rows hold values by the names of the columns."""
        rows = [dict(zip(self.columns, map(_plain, row), strict=True)) for row in self.rows]
        return {"title": self.title, "basis": self.basis, "note": self.note, "rows": rows}


def _cell(value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "–" if value is None else str(value)


def _plain(value):
    return dataclasses.asdict(value) if isinstance(value, Spread) else value


def write_json(file: Path, content: dict) -> None:
    """Write strict JSON so that the file holds either the old content or the whole new one."""
    part = file.with_name(file.name + ".part")
    part.write_text(json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(part, file)
