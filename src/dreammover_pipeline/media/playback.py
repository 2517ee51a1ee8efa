# SPDX-License-Identifier: Apache-2.0
"""How made frames are played: ends that stand still for a while, there and back again, a length in seconds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

Frame = TypeVar("Frame")


def play(frames: Sequence[Frame], fps: float, hold: float = 0.0, ping_pong: bool = False) -> list[Frame]:
    """Frames in the order they are shown in.

    Args:
        frames: at least two, the two ends among them.
        fps: frames per second.
        hold: seconds for which either end stands still, to the nearest frame; each is shown once at least.
        ping_pong: run back to the first frame too. A player that repeats the video shows neither end twice.

    Returns:
        The same frames, some of them several times.

    Raises:
        ValueError: fewer than two frames, or `hold` is negative or not finite.
    """
    if len(frames) < 2:
        raise ValueError(f"a video to play needs at least its two ends, but {len(frames)} frames came")
    first, *between, last = frames
    shown = _shown(hold, fps)
    back = between[::-1] if ping_pong else []
    return [first] * shown + between + [last] * shown + back


def frames_to_fill(duration: float, fps: float, hold: float = 0.0, ping_pong: bool = False) -> int:
    """How many frames between the ends make a video as long as asked for, played as `play` does.

    Args:
        duration: seconds of the whole video, holds and way back included.
        fps: frames per second.
        hold: as in `play`, like the next.
        ping_pong: whether it runs back too; then every frame in between is shown twice, and the video may come out
            shorter by one.

    Returns:
        At least 1.

    Raises:
        ValueError: `duration` or `hold` is not finite or too small.
    """
    ends = 2 * _shown(hold, fps)
    if not 0 < duration < math.inf:
        raise ValueError(f"the duration must be a finite number of seconds above 0, not {duration}")
    ways = 2 if ping_pong else 1
    between = (round(duration * fps) - ends) // ways
    if between < 1:
        raise ValueError(
            f"a duration of {duration:g} s leaves no frame between the ends; at {fps:g} frames per second the "
            f"shortest is {(ends + ways) / fps:.3g} s"
        )
    return between


def check_hold(hold: float) -> None:
    """Raise ValueError unless this is a finite number of seconds, at least 0."""
    if not 0 <= hold < math.inf:  # NaN fails this too
        raise ValueError(f"the ends must be held for a finite number of seconds, at least 0, not {hold}")


def _shown(hold: float, fps: float) -> int:
    """How many times an end is shown."""
    check_hold(hold)
    return max(1, round(hold * fps))
