# SPDX-License-Identifier: Apache-2.0
"""Reads text files that people, editors and spreadsheets write, and the JSON in them."""

from __future__ import annotations

import codecs
import io
import json
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from ..inputs import check_input_file
from ..scratch import replacing

UTF_16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
DEEPEST = 8  # levels of lists and objects in JSON; the points of a batch have 4, and no argument has more
TOO_DEEP = f"lists and objects are nested in more than {DEEPEST} levels"
LONGEST_NUMBER = 20  # characters of a number that error messages quote


def read_text(path: str | os.PathLike) -> str:
    """The text of a file in UTF-8 or UTF-16, with or without a byte order mark; every line in it ends in "\\n".

    Raises:
        ValueError: The path is not that of a regular file, or the file is in another encoding.
        OSError: The file cannot be read.
    """
    check_input_file(path, "it", "a text file")
    content = Path(path).read_bytes()
    try:
        text = content.decode(_encoding(content))
    except UnicodeDecodeError as error:
        raise ValueError(
            f"it is neither UTF-8 nor UTF-16 (byte {error.start} is {content[error.start]:#04x}); "
            'save it as UTF-8, which spreadsheets call "CSV UTF-8"'
        ) from error
    return io.StringIO(text, newline=None).read()


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a text in UTF-8; a file of that name is replaced when the new one is whole.

    Raises:
        OSError: the file cannot be written.
    """
    with replacing(path) as new:
        new.write_text(text, encoding="utf-8", newline="\n")


def _encoding(content: bytes) -> str:
    """The encoding of a text that is in UTF-8 or in UTF-16, by its first two bytes."""
    if content.startswith(UTF_16_MARKS):
        return "utf-16"
    if content[:1] == b"\0":  # the other half of an ASCII character, with which all our files begin
        return "utf-16-be"
    return "utf-16-le" if content[1:2] == b"\0" else "utf-8-sig"


def read_json(text: str) -> object:
    """What a text says as JSON, and strictly so: what Python's reader lets pass for its own use is refused.

    Raises:
        json.JSONDecodeError: The text is no JSON.
        ValueError: It has a number that is not finite or that no float holds, a key twice in one object, or more than
            `DEEPEST` levels.
    """
    try:
        value = json.loads(
            text, parse_int=_whole, parse_float=_finite, parse_constant=_finite, object_pairs_hook=_with_keys_once
        )
        level = [value]
        for _ in range(DEEPEST):
            level = [inner for item in level if isinstance(item, (list, dict)) for inner in _inside(item)]
    except RecursionError as error:
        raise ValueError(TOO_DEEP) from error
    if any(isinstance(item, (list, dict)) for item in level):
        raise ValueError(TOO_DEEP)
    return value


def _inside(item: list | dict) -> Iterable[object]:
    """What is directly inside a list or an object."""
    return item.values() if isinstance(item, dict) else item


def _finite(text: str) -> float:
    """The number that a text is."""
    number = float(text)
    if not math.isfinite(number):
        shown = text if len(text) <= LONGEST_NUMBER else f"{text[:LONGEST_NUMBER]}… of {len(text)} characters"
        raise ValueError(f"the number {shown} is not finite or too large")
    return number


def _whole(text: str) -> int:
    """The whole number that a text is; Python itself refuses to read one of too many digits."""
    _finite(text)
    return int(text)


def _with_keys_once(pairs: Sequence[tuple[str, object]]) -> dict[str, object]:
    """An object of the keys and values in JSON."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} is there twice")
    return found
