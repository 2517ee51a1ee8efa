# SPDX-License-Identifier: Apache-2.0
"""Pairs to evaluate on: pairs of the drawn world, whose truth is known, real clips, and folders of pictures."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from PIL import ExifTags, Image

from ..images import load_images
from ..inputs import check_input_file, frame_times
from ..media.texts import read_text
from ..tiny.world import DIFFICULTIES, World

# File names of the pictures of a pair, with their time, such as 0.png, 0.250.jpg and 1.png.
PICTURE = re.compile(r"(0|0\.\d+|1)\.(png|jpg|jpeg)", re.IGNORECASE)
CLIPS = Path(__file__).parent / "clips"  # the folder of the suite of real clips
BUILT_IN = (*DIFFICULTIES, CLIPS.name)  # the names of suites that are no folder of the user's
# Scenes are seeded from here, far from the small numbers that a training is likely to be seeded with.
WORLD_SEED = 1_000_000


class Motion(Protocol):
    """The true motion of one scene, at times in [0, 1]; `Scenes` of a single scene is one."""

    def flow(self, source: float, target: float) -> torch.Tensor:
        """Flow from the image at `source` to the image at `target`, (1, 2, H, W) in pixels."""

    def visible(self, source: float, target: float) -> torch.Tensor:
        """Which pixels of the image at `source` are visible at `target`, (1, 1, H, W) bool."""

    def foreground(self, time: float) -> torch.Tensor:
        """Which pixels show something that moves, (1, 1, H, W) bool."""


@dataclass(frozen=True, eq=False)
class Pair:
    """Two images to interpolate, and what is known of them."""

    name: str
    images: tuple[torch.Tensor, torch.Tensor]  # (3, H, W) in [0, 1] each
    prompt: tuple[str, str]  # what the first and the last image show
    times: tuple[float, ...]  # δ of the frames that are asked for
    truth: torch.Tensor | None = None  # the true frames at these times, (F, 3, H, W); None if they are not known
    motion: Motion | None = None  # how everything moves; None if that is not known


@dataclass(frozen=True)
class Suite:
    """Named pairs, each of which is made when it is asked for."""

    name: str
    pairs: tuple[str, ...]  # the names of the pairs
    load: Callable[[str], Pair]  # makes the pair of a name
    parameters: Mapping[str, object] = field(default_factory=dict)  # what decides a pair apart from its name


def world_suite(difficulty: str, pairs: int, n_frames: int, size: int, seed: int = 0) -> Suite:
    """A suite of pairs of the drawn world, with their truth.

    Args:
        difficulty: one of the world's `DIFFICULTIES`.
        pairs: number of pairs.
        n_frames: number of frames between the two images, at times i / (n_frames + 1).
        size: side of the images in pixels.
        seed: what decides the scenes; different seeds give different scenes.
    """
    world, times = World(size=size), frame_times(n_frames, None)

    def load(name: str) -> Pair:
        scene = world.sample(1, int(name), difficulty)
        first, *truth, last = (scene.frame(time)[0] for time in (0.0, *times, 1.0))
        return Pair(name, (first, last), scene.captions[0], times, torch.stack(truth), scene)

    start = WORLD_SEED * (seed + 1)
    return Suite(difficulty, tuple(str(start + i) for i in range(pairs)), load, {"frames": n_frames, "size": size})


def folder_suite(folder: str | Path, n_frames: int, pairs: int | None = None) -> Suite:
    """A suite of the pairs in a folder, each in a folder of its own, as `name/0.png` and `name/1.png`.

    In-between frames beside them, named by their time as in `0.250.png`, are the truth; where there are such frames,
    exactly their times are asked for. Each of these pictures may also be a JPEG, as in `0.jpg`. `name/prompt.txt` says
    what the images show, in one line for both or in two lines, one for each.

    Args:
        folder: the folder that holds the folders of the pairs.
        n_frames: number of frames asked for of pairs without truth, at times i / (n_frames + 1).
        pairs: largest number of pairs to take, in the order of their names; None takes all.

    Raises:
        ValueError: the folder holds no pair, or a pair is not laid out in this way.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"the suite '{folder}' is neither {', '.join(BUILT_IN)} nor a folder")
    names = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not names:
        raise ValueError(f"the folder '{folder}' holds no folders of pairs, like '{folder / 'name' / '0.png'}'")
    names = names[:pairs]
    for name in names:
        _check_pair(folder / name)
    times = frame_times(n_frames, None)
    parameters = {"frames": n_frames, "content": _digest(folder, names)}
    return Suite(folder.resolve().name, tuple(names), lambda name: _load_pair(folder / name, times), parameters)


def folder_of(name: str) -> Path | None:
    """The folder that holds the pairs of the suite of a name; None for a suite that is drawn."""
    if name in DIFFICULTIES:
        return None
    return CLIPS if name == CLIPS.name else Path(name)


def find_suites(names: Sequence[str], pairs: int, n_frames: int, size: int, seed: int = 0) -> list[Suite]:
    """The suites of these names, each one of `BUILT_IN` or the path of a folder of pairs.

    Raises:
        ValueError: a name is neither built in nor a folder of pairs, or two suites have the same name.
    """
    suites = [
        world_suite(name, pairs, n_frames, size, seed)
        if (folder := folder_of(name)) is None
        else folder_suite(folder, n_frames, pairs)
        for name in names
    ]
    for suite in suites:
        if sum(other.name == suite.name for other in suites) > 1:
            raise ValueError(f"two suites have the name '{suite.name}'; results could not be told apart")
    return suites


def _pictures(folder: Path) -> dict[float, Path]:
    """The pictures of a pair by their time, in the order of time.

    Raises:
        ValueError: the first or the last picture is missing, or two pictures are of the same time.
    """
    found: dict[float, Path] = {}
    for path in sorted(folder.iterdir()):
        if named := PICTURE.fullmatch(path.name):
            time = float(named[1])
            if time in found:
                raise ValueError(f"'{found[time]}' and '{path.name}' are of the same time; remove one of them")
            found[time] = path
    for time in (0, 1):
        if time not in found:
            raise ValueError(f"the pair '{folder}' lacks '{time}.png'")
    return dict(sorted(found.items()))


def _digest(folder: Path, names: Sequence[str]) -> str:
    """A digest of the pictures and prompts of pairs in a folder, so that a run says of which photos it is."""
    digest = hashlib.sha256()
    for name in names:
        prompt = folder / name / "prompt.txt"
        for path in (*_pictures(folder / name).values(), *([prompt] if prompt.is_file() else [])):
            digest.update(f"{name}/{path.name} {path.stat().st_size}\n".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _check_pair(folder: Path) -> None:
    first, *truth, last = _pictures(folder).values()
    size = _size(first)
    _size(last)  # which may be another one, but has to be had
    for path in truth:
        if _size(path) != size:
            raise ValueError(f"'{path}' has not the size {size[0]}x{size[1]} of its pair's '{first.name}'")
    prompt = folder / "prompt.txt"
    if prompt.is_file() and not 1 <= len(_lines(prompt)) <= 2:
        raise ValueError(f"'{prompt}' must hold one or two lines")


def _size(path: Path) -> tuple[int, int]:
    """Width and height of a picture as it is to be seen, in pixels."""
    check_input_file(path, f"'{path}'", "a picture")
    try:
        with Image.open(path) as image:
            turned = image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
            return image.size[::-1] if turned else image.size
    except OSError as error:
        raise ValueError(f"'{path}' is no picture that can be read") from error


def _lines(path: Path) -> list[str]:
    try:
        text = read_text(path)
    except ValueError as error:
        raise ValueError(f"'{path}' cannot be read: {error}") from error
    return [line.strip() for line in text.splitlines() if line.strip()]


def _load_pair(folder: Path, times: tuple[float, ...]) -> Pair:
    pictures = _pictures(folder)
    first, *truth, last = (load_images(path, "the picture")[0] for path in pictures.values())
    prompt = _lines(folder / "prompt.txt") if (folder / "prompt.txt").is_file() else [""]
    return Pair(
        folder.name,
        (first, last),
        (prompt[0], prompt[-1]),
        tuple(pictures)[1:-1] or times,
        torch.stack(truth) if truth else None,
    )
