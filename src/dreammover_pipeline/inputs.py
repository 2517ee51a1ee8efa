# SPDX-License-Identifier: Apache-2.0
"""Checks of single values, made before any model runs.

Every error names the argument and says what came and what is allowed. This module does not import torch.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Collection, Iterator, Sequence, Sized
from ctypes import c_float
from numbers import Integral, Real

LARGEST_COUNT = 100_000  # largest number of steps, frames and so on; nobody could wait for more


def check_integer(name: str, value, minimum: int, maximum: int | None = None) -> None:
    """Raise TypeError or ValueError unless `value` is an integer of at least `minimum`, and of at most `maximum`."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"`{name}` must be an integer, not {value!r} of type {type(value).__name__}")
    if value < minimum:
        raise ValueError(f"`{name}` must be at least {minimum}, not {_shown(value)}")
    if maximum is not None and value > maximum:
        raise ValueError(f"`{name}` must be at most {maximum}, not {_shown(value)}")


def check_number(name: str, value, minimum: float, inclusive: bool = True, maximum: float = math.inf) -> None:
    """Raise unless `value` is a finite real number of at least `minimum`, or above it if not `inclusive`.

    It must not be above `maximum` either.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"`{name}` must be a number, not {value!r} of type {type(value).__name__}")
    if value != value or abs(value) == math.inf or value < minimum or (value == minimum and not inclusive):
        bound = "at least" if inclusive else "above"
        raise ValueError(f"`{name}` must be finite and {bound} {minimum}, not {_shown(value)}")
    largest = min(maximum, sys.float_info.max)
    try:
        number = float(value)  # since numpy warns where a float32 is compared with so large a number
    except OverflowError:
        number = math.inf
    if number > largest:
        raise ValueError(f"`{name}` must be at most {largest:g}, not {_shown(value)}")


def _shown(value: Real) -> str:
    """A number as an error message shows it; of one with very many digits, how many these are, about."""
    if isinstance(value, Integral) and abs(value) >= 10**20:
        return f"a number of about {round(abs(int(value)).bit_length() * math.log10(2))} digits"
    return str(value)


def check_text(name: str, value: object) -> None:
    """Raise ValueError if a text, or one in a list of texts, is no valid Unicode; no other form is judged.

    Such are halves of surrogate pairs, as JSON can hold, and bytes of the command line that are not UTF-8.
    """
    for text in value if isinstance(value, (list, tuple)) else [value]:
        if isinstance(text, (list, tuple)):
            check_text(name, text)
        elif isinstance(text, str):
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise ValueError(f"`{name}` must be valid Unicode, but {text[error.start]!a} is in it") from None


def file_fault(path: str | os.PathLike) -> str | None:
    """What is at a path instead of a regular file, as error messages call it; None for a regular file.

    Only regular files are opened: reading from a pipe could wait for ever, and from a device it could go on without
    end.
    """
    if os.path.isfile(path):
        return None
    if os.path.isdir(path):
        return "a folder"
    return "a pipe, a socket or a device" if os.path.exists(path) else "no existing file"


def check_input_file(path: str | os.PathLike, name: str, needed: str) -> None:
    """Raise ValueError unless there is a regular file at a path that is to be read.

    Args:
        path: The path.
        name: What the message calls it, such as "photo A (a.png)".
        needed: What the message says is needed, such as "an image file".
    """
    fault = file_fault(path)
    if fault is not None:
        raise ValueError(f"{name} is {fault}; {needed} is needed")


def check_file_place(path: str | os.PathLike) -> None:
    """Raise ValueError if there is anything but a regular file at the place of a file that is to be written."""
    fault = file_fault(path)
    if fault is not None and os.path.exists(path):
        raise ValueError(f"cannot write the file '{path}': there is {fault} of that name")


def check_one_for_each_pair(name: str, entries: Sized, pairs: int) -> None:
    """Raise ValueError unless an argument that is a list has as many entries as there are pairs of images."""
    if len(entries) != pairs:
        raise ValueError(f"`{name}` has {len(entries)} entries for {pairs} pair{'s' * (pairs != 1)} of images")


def check_choice(name: str, value, allowed: Sequence[str]) -> None:
    """Raise ValueError unless `value` is one of `allowed`."""
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, allowed))}, not {value!r}")


def check_steps(num_inference_steps: int, inversion_steps: int, feature_step: int) -> None:
    """Raise ValueError unless feature_step ≤ inversion_steps ≤ num_inference_steps."""
    if not feature_step <= inversion_steps <= num_inference_steps:
        raise ValueError(
            "the steps must nest, `feature_step` ≤ `inversion_steps` ≤ `num_inference_steps`, "
            f"but {feature_step}, {inversion_steps}, {num_inference_steps} came"
        )


def as_float32(value: float) -> float:
    """The float32 nearest to a number, which the number becomes in the tensors that frames are computed with."""
    return c_float(value).value


def frame_times(n_frames, times) -> tuple[float, ...]:
    """The time δ of each frame asked for: `times` if they are given, else δ_i = i/(n+1), i = 1 … n.

    Source: DreamMover §3.2, the positions of the in-between frames.

    Raises:
        TypeError, ValueError: `n_frames` is not an integer of at least 1, or `times` is empty, holds something that is
            no number, or holds a number outside (0, 1).
    """
    if times is None:
        check_integer("n_frames", n_frames, 1)
        return tuple(i / (n_frames + 1) for i in range(1, n_frames + 1))
    if isinstance(times, Iterator):  # once it has been checked it has no numbers left
        raise TypeError(f"`times` must be a sequence of numbers, such as a list, not {times!r}")
    try:
        values = tuple(float(time) for time in times)
    except (TypeError, ValueError) as error:
        raise TypeError(f"`times` must be a sequence of numbers, not {times!r}") from error
    except OverflowError as error:
        raise ValueError("`times` must lie strictly between 0 and 1, but a far larger number is among them") from error
    if not values:
        raise ValueError("`times` must hold at least one number, but it is empty")
    if len(values) > LARGEST_COUNT:
        raise ValueError(f"`times` must hold at most {LARGEST_COUNT} numbers, not {len(values)}")
    outside = [value for value in values if not 0 < as_float32(value) < 1]
    if outside:
        raise ValueError(f"`times` must lie strictly between 0 and 1, but {outside[0]} is among them")
    return values


def feature_blocks(blocks: int | Sequence[int]) -> tuple[int, ...]:
    """The `feature_block` argument, one index or several, as a tuple."""
    return (blocks,) if isinstance(blocks, Integral) else tuple(blocks)


def check_feature_blocks(blocks: object) -> None:
    """Raise TypeError or ValueError unless `blocks` is an integer of at least 0, or a sequence of some."""
    if isinstance(blocks, bool) or not isinstance(blocks, (Integral, Sequence)) or isinstance(blocks, str):
        raise TypeError(
            "`feature_block` must be an integer or a sequence of integers, "
            f"not {blocks!r} of type {type(blocks).__name__}"
        )
    indices = feature_blocks(blocks)
    for index in indices:
        check_integer("feature_block", index, 0)
    if not indices:
        raise ValueError(f"`feature_block` must be one block or several, not {blocks!r}")


def check_feature_blocks_exist(blocks: int | Sequence[int], up_blocks: int) -> None:
    """Raise ValueError unless every block is an index into the UNet's up blocks, whose number is `up_blocks`."""
    for index in feature_blocks(blocks):
        if index >= up_blocks:
            raise ValueError(f"`feature_block` {index} does not exist; the UNet has up blocks 0 … {up_blocks - 1}")


def check_attention_blocks(blocks: object) -> None:
    """Raise TypeError or ValueError unless `blocks` is a collection of integers of at least 0."""
    if isinstance(blocks, str) or not isinstance(blocks, Collection):
        raise TypeError(f"`attention_blocks` must be a sequence of integers, not {blocks!r}")
    for block in blocks:
        check_integer("attention_blocks", block, 0)


def check_attention_blocks_exist(blocks: Sequence[int], self_attentions: Sequence[int]) -> None:
    """Raise ValueError unless every block exists and, if there are any, at least one of them has self-attention.

    Args:
        blocks: The `attention_blocks` argument.
        self_attentions: The number of self-attentions in each up block of the UNet.
    """
    for block in blocks:
        if not 0 <= block < len(self_attentions):
            raise ValueError(
                f"`attention_blocks` names up block {block}, but the UNet has 0 … {len(self_attentions) - 1}"
            )
    if len(blocks) and not any(self_attentions[block] for block in blocks):
        able = [block for block, count in enumerate(self_attentions) if count]
        raise ValueError(
            f"`attention_blocks` {tuple(blocks)} have no self-attention in this UNet; name at least one of {able}"
        )
