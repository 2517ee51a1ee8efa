# SPDX-License-Identifier: Apache-2.0
"""How frames are played: with ends that stand still for a while, there and back again, or for some seconds in all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

Frame = TypeVar("Frame")

LONGEST = 86_400  # seconds; a day, longer than anybody watches


def play(frames: Sequence[Frame], fps: float, hold: float = 0.0, ping_pong: bool = False) -> list[Frame]:
    """Put frames into the order in which they are shown.

    Args:
        frames: at least two frames, which begin and end with the two photos.
        fps: frames per second.
        hold: seconds for which the first and the last frame stand still, to the nearest frame; each of the two is
            shown at least once.
        ping_pong: whether the video also runs back to its beginning. It then stops one frame short of the first one,
            so that a player that repeats the video does not show that frame twice.

    Returns:
        The same frames, some of them several times.

    Raises:
        ValueError: there are fewer than two frames, or `hold` is not from 0 to `LONGEST`.
    """
    if len(frames) < 2:
        raise ValueError(f"a video needs at least its first and its last frame, but {len(frames)} frames came")
    first, *between, last = frames
    shown = frames_to_hold(hold, fps)
    back = between[::-1] if ping_pong else []
    return [first] * shown + between + [last] * shown + back


def frames_to_fill(duration: float, fps: float, hold: float = 0.0, ping_pong: bool = False, gaps: int = 1) -> int:
    """How many frames between the first and the last one give a video of this length, when `play` orders them.

    Args:
        duration: seconds of the whole video, with the time that the ends stand still and the way back.
        fps: frames per second.
        hold: seconds for which the first and the last frame stand still.
        ping_pong: whether the video also runs back to its beginning. Every frame in between is then shown twice, so
            the video may come out one frame shorter than asked for.
        gaps: how many gaps the video leads through; the photos between two gaps are among the frames.

    Returns:
        The number of frames, which suffices for one in every gap.

    Raises:
        ValueError: `duration` is not above 0 and at most `LONGEST`, or too short for a frame in every gap, or `hold`
            is not from 0 to `LONGEST`.
    """
    ends = 2 * frames_to_hold(hold, fps)
    check_duration(duration)
    ways = 2 if ping_pong else 1
    between = (round(duration * fps) - ends) // ways
    fewest = 2 * gaps - 1  # a frame in every gap, and the photos between the gaps
    if between < fewest:
        where = "between the two photos" if gaps == 1 else f"in each of the {gaps} gaps"
        raise ValueError(
            f"a duration of {duration:g} s is too short for a frame {where}; at {fps:g} frames per second the "
            f"shortest is {(ends + ways * fewest) / fps:.3g} s"
        )
    return between


def check_duration(duration: float) -> None:
    """Raise ValueError unless `duration` is a number of seconds above 0 and at most `LONGEST`."""
    if not 0 < duration <= LONGEST:  # NaN fails every comparison
        raise ValueError(f"a duration must be above 0 and at most {LONGEST} seconds, not {duration}")


def check_hold(hold: float) -> None:
    """Raise ValueError unless `hold` is a number of seconds from 0 to `LONGEST`."""
    if not 0 <= hold <= LONGEST:  # NaN fails every comparison
        raise ValueError(f"the hold at the ends must last 0 to {LONGEST} seconds, not {hold}")


def frames_to_hold(hold: float, fps: float) -> int:
    """How many times the first and the last frame are shown to stand still for `hold` seconds.

    Raises:
        ValueError: `hold` is not from 0 to `LONGEST`.
    """
    check_hold(hold)
    return max(1, round(hold * fps))
