# SPDX-License-Identifier: Apache-2.0
"""The example pairs with their true in-between frames: `python -m dreammover_pipeline.tiny.examples FOLDER`."""

from __future__ import annotations

import sys
from pathlib import Path

from ..media.pictures import picture_of
from .world import World

# Seeds of scenes; training seeds are hashes below 2⁵³, the evaluation's begin at a million.
SCENES = {"fish": 7_000_013, "robot": 7_000_009, "cat": 7_000_014, "bird": 7_000_016}
TIMES = {"0": 0.0, "0.250": 0.25, "0.500": 0.5, "0.750": 0.75, "1": 1.0}


def write_examples(folder: Path) -> None:
    """Write `name/0.png`, `name/1.png`, the true frames between and `name/prompt.txt` for each of `SCENES`."""
    for name, seed in SCENES.items():
        scene = World().sample(1, seed)
        target = folder / name
        target.mkdir(parents=True, exist_ok=True)
        for stem, time in TIMES.items():
            picture_of(scene.frame(time)[0]).save(target / f"{stem}.png")
        (target / "prompt.txt").write_text(scene.captions[0][0] + "\n", encoding="utf-8")


if __name__ == "__main__":
    write_examples(Path(sys.argv[1]))
