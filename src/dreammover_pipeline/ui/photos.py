# SPDX-License-Identifier: Apache-2.0
"""The photos of the page: taken in, decoded once for a session, shown for clicking, and what clicks on them mean."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from PIL import Image, ImageDraw, ImageOps

from ..images import load_shrunk
from ..media.pictures import picture_of

WHICH = ("first", "last")
MAX_SIDE = (
    1280  # pixels of a photo's longer side; larger photos are shrunk, since frames come back at the photo's size
)
MAX_PIXELS = 2**26  # pixels that an upload's file may have: 67 million, more than nearly any camera takes
FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "HEIF", "GIF", "BMP", "TIFF")  # Pillow's names of what an upload may be
CLICK_SIDE = 640  # pixels that the longer side of a photo has, about, where it is shown for clicking
SPOT_COLOUR = (214, 39, 40)

Spot = tuple[int, int]  # (x, y) in pixels of a photo as `marked_photo` shows it


class DecodedPhotos:
    """The photos of one session as pictures, of which each file is decoded only once.

    A picture is kept by its file and by whether that is the first or the last photo. The file alone tells pictures
    apart, since an upload has a path of its own and is never written again.
    """

    def __init__(self) -> None:
        self._pictures: dict[tuple[str, Path], Image.Image] = {}
        self._lock = threading.Lock()  # two clicks at the same time must not decode a photo twice

    def get(self, paths: Sequence[Path | None]) -> list[Image.Image | None]:
        """The pictures of a first and a last photo; pictures of any other file are forgotten.

        Args:
            paths: the files of the first and of the last photo; None for a photo that is not chosen yet.

        Returns:
            Both pictures, as `load_photo` returns them; None for a photo that is not chosen yet.

        Raises:
            ValueError: a photo cannot be read.
        """
        photos = list(zip(WHICH, paths, strict=True))
        with self._lock:
            self._pictures = {photo: picture for photo, picture in self._pictures.items() if photo in photos}
            for which, path in photos:
                if path is not None and (which, path) not in self._pictures:
                    self._pictures[which, path] = load_photo(path, which)
            return [self._pictures.get(photo) for photo in photos]


def load_photo(path: Path, which: str) -> Image.Image:
    """Read a photo of the session, upright, in RGB, with at most `MAX_SIDE` pixels a side.

    Args:
        path: the photo's file. Errors quote its name, but not the folder where it lies.
        which: "first" or "last", for errors.

    Raises:
        ValueError: the photo cannot be read.
    """
    with path.open("rb") as file:
        return read_photo(file, f"the {which} photo ({path.name})")


def read_photo(file: BinaryIO, name: str) -> Image.Image:
    """Read a photo, upright, in RGB, with at most `MAX_SIDE` pixels a side.

    Args:
        file: the photo's file, open for reading at its beginning.
        name: what errors call the photo.

    Raises:
        ValueError: the photo cannot be read, is of none of the `FORMATS`, or has more than `MAX_PIXELS`.
    """
    return picture_of(load_shrunk(file, name, MAX_SIDE, MAX_PIXELS, FORMATS))


def marked_photo(photo: Image.Image, spots: Sequence[Spot]) -> Image.Image:
    """A photo enlarged for clicking, with a numbered dot on every spot that was clicked."""
    marked = ImageOps.scale(photo, _enlargement(photo))
    draw = ImageDraw.Draw(marked)
    radius = min(marked.size) / 24
    for number, (x, y) in enumerate(spots, 1):
        draw.ellipse([x - radius, y - radius, x + radius, y + radius], fill=SPOT_COLOUR, outline="white", width=2)
        draw.text((x, y), str(number), fill="white", anchor="mm", font_size=1.4 * radius)
    return marked


def points_of_spots(spots: Sequence[tuple[Spot, Spot]], photos: Sequence[Image.Image]) -> list | None:
    """What the pipeline takes as `points`, in pixels of the photos, for spots clicked on the enlarged photos.

    Args:
        spots: a spot of the first photo and the spot of the last photo that belongs to it, for each pair of spots.
        photos: the first and the last photo.
    """
    scales = [_enlargement(photo) for photo in photos]
    return [
        tuple(tuple((place + 0.5) / scale - 0.5 for place in spot) for spot, scale in zip(pair, scales, strict=True))
        for pair in spots
    ] or None


def _enlargement(photo: Image.Image) -> int:
    """How many times larger a photo is shown for clicking.

    Gradio locates clicks correctly on a picture that the browser shrinks, but not on one that it enlarges.
    """
    return max(1, round(CLICK_SIDE / max(photo.size)))
