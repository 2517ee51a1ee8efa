# SPDX-License-Identifier: Apache-2.0
"""Options of the method that several commands share.

They carry no defaults: what is not typed is not forwarded, and help reads the defaults off
`DreamMoverPipeline.__call__`.
"""

from __future__ import annotations

import argparse
import inspect
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from ..settings import PRESETS
from .loading import pipeline_class

# The options of the method that a pair prepared before still takes.
RENDERING = (
    "--frames",
    "--easing",
    "--attention-blocks",
    "--fusion",
    "--importance",
    "--guidance-scale",
    "--negative-prompt",
    "--frame-batch-size",
    "--endpoints",
)


# What only makes sense for one pair.
STEERING = ("--points", "--mask")


class SignatureDefaults(argparse.HelpFormatter):
    """Help that shows the defaults of `__call__`'s signature."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        parameter = call_parameters().get(action.dest)
        if parameter is None or parameter.default in (None, inspect.Parameter.empty):
            return action.help
        default = parameter.default
        shown = " ".join(map(str, default)) if isinstance(default, tuple) else str(default) or "empty"
        return f"{action.help} (default: {shown})"


def call_parameters() -> Mapping[str, inspect.Parameter]:
    """The parameters of `DreamMoverPipeline.__call__`, by name."""
    return inspect.signature(pipeline_class().__call__).parameters


def add_method_options(
    parser: argparse.ArgumentParser, rendering_only: bool = False, steering: bool = True, gaps: bool = False
) -> None:
    """Add the options that become arguments of the pipeline; the last group to be added.

    Args:
        parser: of a command.
        rendering_only: only those of `render`.
        steering: also those that are about one pair's photos.
        gaps: there may be more than two photos, and so several gaps between them.
    """
    group = parser.add_argument_group("method", argument_default=argparse.SUPPRESS)

    def add(option: str, **settings) -> None:
        if (not rendering_only or option in RENDERING) and (steering or option not in STEERING):
            group.add_argument(option, **settings)

    add("--prompt", action="append", metavar="TEXT", help="what the photos show; twice: one for each photo")
    add("--preset", choices=PRESETS, help="options that belong together; others beside it prevail")
    frames = "number of frames between the photos" + "; with commas, between A and B, B and C, ..." * gaps
    add(
        "--frames",
        dest="n_frames",
        type=for_each_gap(int) if gaps else int,
        metavar="N[,N...]" if gaps else "N",
        help=frames,
    )
    add("--easing", metavar="NAME", help="how they are spread: linear, ease-in-out, ease-in, ease-out or even")
    add("--steps", dest="num_inference_steps", type=int, metavar="N", help="steps of the whole diffusion schedule")
    add("--inversion-steps", type=int, metavar="N", help="how many of them are inverted; fewer keep closer to photos")
    add("--feature-step", type=int, metavar="N", help="the step whose features are matched")
    add("--feature-block", type=int, nargs="+", metavar="N", help="the UNet's up blocks whose features are matched")
    add("--distance-penalty", type=float, metavar="X", help="how much nearer places are preferred; 0 for the paper's")
    add("--flow-smoothing", type=int, metavar="N", help="passes that smooth the flow; 0 for the paper's")
    add("--points", metavar="JSON|FILE", help="places that belong together, [[[x0,y0],[x1,y1]],...] in pixels")
    add("--mask", action="append", metavar="PATH", help="a picture, bright what may move; twice: one for each photo")
    add("--attention-blocks", type=int, nargs="*", metavar="N", help="up blocks whose attention looks at the photos")
    add("--fusion", metavar="NAME", help="two_level, two_level_unwarped or direct")
    add("--importance", metavar="NAME", help="what wins where two cells land: agreement or photometric (the paper's)")
    add("--guidance-scale", type=float, metavar="X", help="above 1: follow the prompt more, at twice the cost")
    add("--negative-prompt", metavar="TEXT", help="what guidance leads away from")
    add("--lora-steps", type=int, metavar="N", help="training steps on the two photos; 0 skips the fit")
    add("--lora-rank", type=int, metavar="N", help="rank of the LoRA")
    add("--lora-learning-rate", type=float, metavar="X", help="its learning rate")
    add("--lora-scale", type=float, metavar="X", help="its weight")
    add("--frame-batch-size", type=int, metavar="N", help="frames denoised at once; default: what fits in memory")
    add("--endpoints", metavar="NAME", help="the ends: original photos, or reconstructed as all other frames are")
    parser.formatter_class = SignatureDefaults  # last: newer Pythons format each help once when it is added


def call_arguments(args: argparse.Namespace) -> dict[str, object]:
    """The arguments of the pipeline that were typed; before them, those of the preset.

    `args.size`, where given, becomes `width` and `height`.
    """
    parameters = call_parameters()
    call = {name: value for name, value in vars(args).items() if name in parameters}
    call = PRESETS.get(getattr(args, "preset", None), {}) | call
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
        ValueError: there is no such file, or what it holds is no JSON.
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

    parse.__name__ = number.__name__  # which argparse calls it by
    return parse


def size(text: str) -> tuple[int, int]:
    """(width, height) in pixels of a typed size, like 768x512."""
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"'{text}' is no size; write width x height in pixels, like 768x512")
    return int(match[1]), int(match[2])


def seed(text: str) -> int:
    """A typed seed that `torch.Generator` takes."""
    if not text.isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"'{text}' is no seed; write a whole number from 0 to 2^63 - 1")
    return int(text)
