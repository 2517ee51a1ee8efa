# SPDX-License-Identifier: Apache-2.0
"""Where in (0, 1) the frames of a video stand: eased, or spread so that neighbours differ equally.

Without easing, n frames stand at i/(n+1), i = 1 … n; an easing f moves each of them to f(i/(n+1)). Eased times ascend
strictly and stay inside (0, 1), also when they are rounded to float32, in which frames are computed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

from .inputs import as_float32, check_choice, frame_times

Easing = Callable[[float], float]

CURVES: dict[str, Easing] = {
    "linear": lambda t: t,
    "ease-in-out": lambda t: t * t * (3 - 2 * t),
    "ease-in": lambda t: t * t,
    "ease-out": lambda t: t * (2 - t),
}
EVEN = "even"  # not a curve: where the frames stand depends on the pair


def check_easing(n_frames: int, times: Sequence[float] | None, easing: str | Easing) -> None:
    """Raise TypeError or ValueError unless these arguments are allowed, each by itself and all of them together."""
    linear = frame_times(n_frames, times)
    if not callable(easing):
        if not isinstance(easing, str):
            raise TypeError(f"`easing` must be a name or a callable, not {easing!r} of type {type(easing).__name__}")
        check_choice("easing", easing, (*CURVES, EVEN))
    if times is None:
        if easing != EVEN:
            eased_times(linear, easing)
    elif easing != "linear":
        raise ValueError(f"`easing` moves the frames of `n_frames`; it cannot be {easing!r} where `times` are given")


def eased_times(times: Sequence[float], easing: str | Easing) -> tuple[float, ...]:
    """Move times by a curve f.

    Args:
        times: Times in (0, 1), strictly ascending.
        easing: The name of a curve in `CURVES`, or a function f that leads from f(0) = 0 to f(1) = 1 (within 1e-6) and
            rises from each of `times` to the next.

    Returns:
        The value of f at each time, strictly ascending and in (0, 1).

    Raises:
        TypeError: The curve's value is not a number.
        ValueError: The curve does not lead from 0 to 1, or the eased times do not ascend strictly inside (0, 1).
    """
    curve = easing if callable(easing) else CURVES[easing]
    name = "`easing`" if callable(easing) else f"`easing` {easing!r}"
    moved = [curve(time) for time in (0.0, *times, 1.0)]
    try:
        start, *values, end = map(float, moved)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must give a number, not {moved[0]!r}") from error
    if not (abs(start) <= 1e-6 and abs(end - 1) <= 1e-6):  # NaN fails this too
        raise ValueError(f"{name} must lead from f(0) = 0 to f(1) = 1, not from {start:.6g} to {end:.6g}")
    rounded = [as_float32(value) for value in (0.0, *values, 1.0)]
    stuck = [i for i, (before, after) in enumerate(pairwise(rounded)) if not after > before]
    if stuck:
        places = [0.0, *times, 1.0], [0.0, *values, 1.0]
        (t0, t1), (f0, f1) = (place[stuck[0] : stuck[0] + 2] for place in places)
        raise ValueError(
            f"{name} must rise between 0 and 1 from each of the {len(values)} frames to the next, "
            f"but f({t0:.6g}) = {f0:.9g} and f({t1:.6g}) = {f1:.9g}"
        )
    return tuple(values)
