# SPDX-License-Identifier: Apache-2.0
"""Options of the method that several commands share, made from the declarations in `settings.py`.

They carry no defaults: what is not typed is not forwarded, and the help shows the pipeline's own defaults.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path

from ..arguments import ASK_PYTHON, Argument, Blocks, Numbers, Pictures, Text, WholeNumbers, arguments_of, taken
from ..settings import GROUPS, PRESETS, RENDERING, arguments

# Arguments that only make sense for one pair.
STEERING = ("points", "mask")
# How the value of an option is called in the help, where that does not follow from its values.
METAVARS = {"points": "JSON|FILE", "easing": "NAME"}


class PipelineDefaults(argparse.HelpFormatter):
    """Help that shows the pipeline's own defaults."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        declared = arguments().get(action.dest)
        if declared is None or declared.default is None:
            return action.help
        default = declared.default
        shown = " ".join(map(str, default)) if isinstance(default, tuple) else str(default) or "empty"
        return f"{action.help} (default: {shown})"


def add_method_options(
    parser: argparse.ArgumentParser, rendering_only: bool = False, steering: bool = True, gaps: bool = False
) -> None:
    """Add the options that become arguments of the pipeline; this group must be the last one to be added.

    Args:
        parser: Of a command.
        rendering_only: Whether only those of `render` are wanted.
        steering: Whether those that are about one pair's photos are wanted too.
        gaps: Whether there may be more than two photos, and so several gaps between them.
    """
    group = parser.add_argument_group("method", argument_default=argparse.SUPPRESS)
    if not rendering_only:
        text = "Options that belong together; others beside it prevail."
        group.add_argument("--preset", choices=PRESETS, help=text)
    for name, declared in arguments_of(*(RENDERING if rendering_only else GROUPS)).items():
        if declared.option is not ASK_PYTHON and (steering or name not in STEERING):
            group.add_argument(declared.option, dest=name, **_parsing(declared, gaps))
    parser.formatter_class = PipelineDefaults  # last: newer Pythons format each help once when it is added


def _parsing(declared: Argument, gaps: bool) -> dict[str, object]:
    """How argparse reads and describes the option of an argument."""
    text = declared.about.replace("`", "").replace("%", "%%")
    values = declared.values
    if gaps and declared.name == "n_frames":
        several = " With commas it is one number for each gap between two photos."
        return {"type": for_each_gap(int), "metavar": "N[,N...]", "help": text + several}
    if isinstance(values, WholeNumbers):
        return {"type": int, "metavar": "N", "help": text}
    if isinstance(values, Numbers):
        return {"type": float, "metavar": "X", "help": text}
    if isinstance(values, Blocks):
        return {"type": int, "nargs": "+" if values.least else "*", "metavar": "N", "help": text}
    if isinstance(values, Pictures) or (isinstance(values, Text) and values.of_each_photo):
        metavar = "PATH" if isinstance(values, Pictures) else "TEXT"
        return {"action": "append", "metavar": metavar, "help": f"{text} Given twice it is one for each photo."}
    return {"metavar": METAVARS.get(declared.name, "TEXT" if isinstance(values, Text) else "NAME"), "help": text}


def call_arguments(args: argparse.Namespace) -> dict[str, object]:
    """The arguments of the pipeline that were typed, and those of a preset that were not.

    `args.size`, where given, becomes `width` and `height`.
    """
    call = PRESETS.get(getattr(args, "preset", None), {}) | taken(vars(args), *GROUPS)
    for name in ("prompt", "mask"):
        if name in call and len(call[name]) == 1:
            (call[name],) = call[name]
    if "points" in call:
        call["points"] = read_points(call["points"])
    if getattr(args, "size", None):
        call["width"], call["height"] = args.size
    return call


def steering_files(args: argparse.Namespace) -> list[str]:
    """The files that typed `--points` and `--mask` read."""
    points = getattr(args, "points", "[")
    return [*([] if _is_json(points) else [points]), *getattr(args, "mask", [])]


def read_points(text: str) -> object:
    """The points of `--points`: JSON itself, or the path of a file that holds it.

    Raises:
        ValueError: There is no such file, or what it holds is no JSON.
    """
    source = "--points" if _is_json(text) else f"'{text}', the file of --points,"
    form = "write [[[x0, y0], [x1, y1]], ...] in pixels of the two photos, or the path of a file that holds this"
    if not _is_json(text):
        try:
            text = Path(text).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(
                f"{source} cannot be read: {getattr(error, 'strerror', None) or error}; {form}"
            ) from error
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{source} holds no JSON: {error}; {form}") from error


def _is_json(text: str) -> bool:
    return text.lstrip().startswith("[")


def for_each_gap(number: type) -> Callable[[str], object]:
    """A type of options: a number, or several between commas, which become a list."""

    def parse(text: str) -> object:
        values = [number(part) for part in text.split(",")]
        return values if len(values) > 1 else values[0]

    parse.__name__ = number.__name__  # by which argparse calls it
    return parse


def size(text: str) -> tuple[int, int]:
    """(width, height) in pixels of a typed size, such as 768x512."""
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"'{text}' is no size; write width x height in pixels, like 768x512")
    return int(match[1]), int(match[2])


def seed(text: str) -> int:
    """A typed seed that `torch.Generator` takes."""
    if not text.isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"'{text}' is no seed; write a whole number from 0 to 2^63 - 1")
    return int(text)
