# SPDX-License-Identifier: Apache-2.0
"""The example pairs of the folder `examples`: drawn ones with their true in-between frames, and photos."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from ..media.pictures import picture_of
from ..tiny.world import World
from .suites import CLIPS

# Seeds of the scenes. Training seeds are hashes below 2⁵³, and the evaluation's seeds begin at a million.
SCENES = {"fish": 7_000_013, "robot": 7_000_009, "cat": 7_000_014, "bird": 7_000_016}
TIMES = {"0": 0.0, "0.250": 0.25, "0.500": 0.5, "0.750": 0.75, "1": 1.0}
PHOTOS = {"box": "box_340_16", "cup": "cup_120_32"}  # pairs of the evaluation's clips, whose page names their source
JPEG_QUALITY = 90  # a photo of `PHOTOS` then has at most 60 kB


def photo_pair(name: str) -> tuple[Image.Image, Image.Image, str]:
    """The first and the last photo of one of `PHOTOS`, and what they show."""
    folder = CLIPS / PHOTOS[name]
    caption = (folder / "prompt.txt").read_text(encoding="utf-8").strip()
    return Image.open(folder / "0.jpg"), Image.open(folder / "1.jpg"), caption


def write_examples(folder: Path) -> None:
    """Write a folder for each example, with its pictures by their time, and `prompt.txt`, which says what they show.

    A pair of `SCENES` has the pictures of all `TIMES`, as `0.250.png`; one of `PHOTOS` has `0.jpg` and `1.jpg`.
    """
    for name, seed in SCENES.items():
        scene = World().sample(1, seed)
        target = folder / name
        target.mkdir(parents=True, exist_ok=True)
        for stem, time in TIMES.items():
            picture_of(scene.frame(time)[0]).save(target / f"{stem}.png")
        _write_caption(target, scene.captions[0][0])
    for name in PHOTOS:
        *photos, caption = photo_pair(name)
        target = folder / name
        target.mkdir(parents=True, exist_ok=True)
        for end, photo in enumerate(photos):
            photo.save(target / f"{end}.jpg", quality=JPEG_QUALITY, optimize=True)
        _write_caption(target, caption)


def _write_caption(folder: Path, caption: str) -> None:
    (folder / "prompt.txt").write_text(caption + "\n", encoding="utf-8")
