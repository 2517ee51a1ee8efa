# SPDX-License-Identifier: Apache-2.0
"""Options of the method that several commands share, made from the declarations in `settings.py`.

These options have no defaults of their own: what is not typed is not passed on to the pipeline, and the help shows the
pipeline's defaults.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Collection
from pathlib import Path

from ..arguments import (
    ASK_PYTHON,
    Argument,
    Blocks,
    Levels,
    Motion,
    Numbers,
    Pictures,
    Poses,
    Ranking,
    Text,
    WholeNumbers,
    arguments_of,
    taken,
)
from ..media.texts import read_json, read_text
from ..settings import GROUPS, PRESETS, RENDERING, arguments

# What the help calls the value of an option, where that does not follow from the values that the argument takes.
METAVARS = {"points": "JSON|FILE", "easing": "NAME"}


class PipelineDefaults(argparse.HelpFormatter):
    """A formatter of help texts that shows the pipeline's defaults."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        declared = arguments().get(action.dest)
        if declared is None or declared.default is None:
            return action.help
        default = declared.default
        shown = " ".join(map(str, default)) if isinstance(default, tuple) else str(default) or "empty"
        return f"{action.help} (default: {shown})"


def add_method_options(
    parser: argparse.ArgumentParser, rendering_only: bool = False, without: Collection[str] = (), gaps: bool = False
) -> None:
    """Add the options that become arguments of the pipeline; this group must be the last one to be added.

    Args:
        parser: The parser of a command.
        rendering_only: Whether only the arguments of the pipeline's `render` are wanted.
        without: The arguments that are not wanted.
        gaps: Whether the command takes more than two photos, and so has several gaps between photos.
    """
    group = parser.add_argument_group("method", argument_default=argparse.SUPPRESS)
    if not rendering_only:
        text = "A set of values for some options; options that are typed beside it prevail."
        group.add_argument("--preset", choices=PRESETS, help=text)
    for name, declared in arguments_of(*(RENDERING if rendering_only else GROUPS)).items():
        if declared.option is not ASK_PYTHON and name not in without:
            group.add_argument(declared.option, dest=name, **_parsing(declared, gaps))
    parser.formatter_class = PipelineDefaults  # set last, since newer Pythons format each help when it is added


def _parsing(declared: Argument, gaps: bool) -> dict[str, object]:
    """How argparse reads and describes the option of an argument."""
    text = declared.about.replace("`", "").replace("%", "%%")
    values = declared.values
    if gaps and declared.name == "n_frames":
        several = " Several numbers between commas are one for each gap between two photos."
        return {"type": for_each_gap(int), "metavar": "N[,N...]", "help": text + several}
    if isinstance(values, WholeNumbers):
        return {"type": int, "metavar": "N", "help": text}
    if isinstance(values, Numbers):
        return {"type": float, "metavar": "X", "help": text}
    if isinstance(values, Levels):
        return {"type": float, "nargs": 2, "metavar": ("LOW", "HIGH"), "help": text}
    if isinstance(values, Motion):
        return {"type": float, "nargs": 4, "metavar": ("ZOOM", "DEGREES", "RIGHT", "DOWN"), "help": text}
    if isinstance(values, Ranking):
        return {"nargs": 2, "metavar": ("GOOD", "BAD"), "help": text}
    if isinstance(values, Poses):
        return {"nargs": 2, "metavar": ("JSON_A", "JSON_B"), "help": text}
    if isinstance(values, Blocks):
        return {"type": int, "nargs": "+" if values.least else "*", "metavar": "N", "help": text}
    if isinstance(values, Pictures) or (isinstance(values, Text) and values.of_each_photo):
        metavar = "PATH" if isinstance(values, Pictures) else "TEXT"
        return {
            "action": "append",
            "metavar": metavar,
            "help": f"{text} Given twice, the option is one for each photo.",
        }
    return {"metavar": METAVARS.get(declared.name, "TEXT" if isinstance(values, Text) else "NAME"), "help": text}


def call_arguments(args: argparse.Namespace) -> dict[str, object]:
    """The arguments of the pipeline that were typed, and those that a typed preset decides.

    `--size` becomes the arguments `width` and `height`.
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
    """The paths of the files that are read for the options `--points`, `--mask` and `--poses`."""
    points = getattr(args, "points", "[")
    return [*([] if _is_json(points) else [points]), *getattr(args, "mask", []), *getattr(args, "poses", [])]


def read_points(text: str) -> object:
    """The points that the option `--points` gives.

    Args:
        text: JSON, or the path of a file that holds JSON.

    Raises:
        ValueError: There is no such file, or what it holds is no JSON.
    """
    source = "--points" if _is_json(text) else f"'{text}', the file of --points,"
    form = (
        "write [[[x0, y0], [x1, y1]], ...] in pixels of the two photos, or the path of a file that holds such a list"
    )
    if not _is_json(text):
        try:
            text = read_text(text)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{source} cannot be read: {getattr(error, 'strerror', None) or error}; {form}"
            ) from error
    try:
        return read_json(text)
    except ValueError as error:
        raise ValueError(f"{source} holds no JSON that can be read: {error}; {form}") from error


def _is_json(text: str) -> bool:
    """Whether the value of `--points` is JSON itself rather than the path of a file."""
    return text.lstrip().startswith("[")


def for_each_gap(number: type) -> Callable[[str], object]:
    """A type for options that take one number, or several between commas, which become a list.

    Args:
        number: The type of the numbers.
    """

    def parse(text: str) -> object:
        values = [number(part) for part in text.split(",")]
        return values if len(values) > 1 else values[0]

    parse.__name__ = number.__name__  # argparse writes this name into its error messages
    return parse


def size(text: str) -> tuple[int, int]:
    """The width and the height, in pixels, of a typed size such as 768x512."""
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"'{text}' is no size; write width x height in pixels, like 768x512")
    return int(match[1]), int(match[2])


def folder_path(text: str) -> Path:
    """The path of a typed folder.

    An empty one, such as that of a shell's variable which is not set, is refused, since `Path` takes it for the
    current folder.
    """
    if not text:
        raise argparse.ArgumentTypeError("'' is no folder; write its path, which is . for the current folder")
    return Path(text)


def add_output_folder(add: Callable[..., argparse.Action], about: str) -> None:
    """Add the option of a folder that all output goes to.

    Args:
        add: The `add_argument` of a parser.
        about: What the folder is for.
    """
    add("-o", "--output", type=folder_path, metavar="FOLDER", required=True, help=about)


def file_path(text: str) -> str:
    """The path of a typed file. An empty one, such as that of a shell's variable which is not set, is refused."""
    if not text:
        raise argparse.ArgumentTypeError("'' is no file; write its path, or leave the option out")
    return text


def seed(text: str) -> int:
    """A typed seed that `torch.Generator` takes."""
    if not text.isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"'{text}' is no seed; write a whole number from 0 to 2^63 - 1")
    return int(text)
