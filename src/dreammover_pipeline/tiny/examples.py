# SPDX-License-Identifier: Apache-2.0
"""The example pairs of the folder `examples`, with their true in-between frames."""

from __future__ import annotations

from pathlib import Path

from ..media.pictures import picture_of
from .world import World

# Seeds of the scenes. Training seeds are hashes below 2⁵³, and the evaluation's seeds begin at a million.
SCENES = {"fish": 7_000_013, "robot": 7_000_009, "cat": 7_000_014, "bird": 7_000_016}
TIMES = {"0": 0.0, "0.250": 0.25, "0.500": 0.5, "0.750": 0.75, "1": 1.0}


def write_examples(folder: Path) -> None:
    """Write a folder for each of `SCENES`, with the pictures of all `TIMES` and the caption, `prompt.txt`."""
    for name, seed in SCENES.items():
        scene = World().sample(1, seed)
        target = folder / name
        target.mkdir(parents=True, exist_ok=True)
        for stem, time in TIMES.items():
            picture_of(scene.frame(time)[0]).save(target / f"{stem}.png")
        (target / "prompt.txt").write_text(scene.captions[0][0] + "\n", encoding="utf-8")
