# SPDX-License-Identifier: Apache-2.0
"""Options of the method that several commands share.

They carry no defaults: what is not typed is not forwarded, and help reads the defaults off
`DreamMoverPipeline.__call__`.
"""

from __future__ import annotations

import argparse
import inspect
import re
from collections.abc import Mapping

from .loading import pipeline_class

# The options of the method that a pair prepared before still takes.
RENDERING = (
    "--frames",
    "--attention-blocks",
    "--fusion",
    "--importance",
    "--guidance-scale",
    "--negative-prompt",
    "--frame-batch-size",
)


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


def add_method_options(parser: argparse.ArgumentParser, rendering_only: bool = False) -> None:
    """Add the options that become arguments of the pipeline, all or those of `render`; the last group to be added."""
    group = parser.add_argument_group("method", argument_default=argparse.SUPPRESS)

    def add(option: str, **settings) -> None:
        if not rendering_only or option in RENDERING:
            group.add_argument(option, **settings)

    add("--prompt", action="append", metavar="TEXT", help="what the photos show; twice: one for each photo")
    add("--frames", dest="n_frames", type=int, metavar="N", help="number of frames between the photos")
    add("--steps", dest="num_inference_steps", type=int, metavar="N", help="steps of the whole diffusion schedule")
    add("--inversion-steps", type=int, metavar="N", help="how many of them are inverted; fewer keep closer to photos")
    add("--feature-step", type=int, metavar="N", help="the step whose features are matched")
    add("--feature-block", type=int, nargs="+", metavar="N", help="the UNet's up blocks whose features are matched")
    add("--flow-smoothing", type=int, metavar="N", help="passes that smooth the flow; 0 for the paper's")
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
    parser.formatter_class = SignatureDefaults  # last: newer Pythons format each help once when it is added


def call_arguments(args: argparse.Namespace) -> dict[str, object]:
    """The arguments of the pipeline that were typed; `args.size`, where given, becomes `width` and `height`."""
    parameters = call_parameters()
    call = {name: value for name, value in vars(args).items() if name in parameters}
    if "prompt" in call and len(call["prompt"]) == 1:
        (call["prompt"],) = call["prompt"]
    if getattr(args, "size", None):
        call["width"], call["height"] = args.size
    return call


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
