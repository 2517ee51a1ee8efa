# SPDX-License-Identifier: Apache-2.0
"""The command `dreammover`.

Options carry no defaults of the method: what is not typed is not forwarded, and help reads the defaults off
`DreamMoverPipeline.__call__`. torch and diffusers take seconds to import, so that happens after the arguments parsed.

Exit codes: 0 done, 1 failed while running, 2 bad input, 130 interrupted.
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from itertools import permutations, product
from pathlib import Path
from typing import TYPE_CHECKING

from . import __version__
from .evaluation.command import add_evaluation
from .figures import contact_sheet, flow_picture
from .loading import add_model_options, check_model, choose_device, load_pipeline, pipeline_class
from .media import check_fps, check_picture_path, check_video_path, write_picture, write_video

if TYPE_CHECKING:
    from .pipeline import DreamMoverPipeline, DreamMoverPipelineOutput


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; everything that goes wrong becomes one line on stderr.

    Args:
        argv: the arguments after the program's name; those of the process by default.

    Returns:
        The exit code.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # third parties' only: the pipeline's own go through logging
            args = _parser().parse_args(argv)
            args.run(args)
        return 0
    except (ValueError, TypeError) as error:
        return _fail(2, error)
    except KeyboardInterrupt:
        return _fail(130, "interrupted")
    except (RuntimeError, OSError) as error:
        return _fail(1, error)
    except Exception as error:  # not meant to be read by users, so its message alone may say nothing
        return _fail(1, f"{type(error).__name__}: {error}")


def _fail(code: int, reason: Exception | str) -> int:
    print("dreammover: error:", " ".join(str(reason).split()), file=sys.stderr)
    return code


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise ValueError(f"{message}; see {self.prog} --help")


class _SignatureDefaults(argparse.HelpFormatter):
    """Help that shows the defaults of `__call__`'s signature."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        parameter = _call_parameters().get(action.dest)
        if parameter is None or parameter.default in (None, inspect.Parameter.empty):
            return action.help
        default = parameter.default
        shown = " ".join(map(str, default)) if isinstance(default, tuple) else str(default) or "empty"
        return f"{action.help} (default: {shown})"


def _call_parameters() -> Mapping[str, inspect.Parameter]:
    return inspect.signature(pipeline_class().__call__).parameters


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="dreammover", description="A short video out of two photos.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"dreammover {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_interpolate(commands)
    add_evaluation(commands)
    return parser


def _add_interpolate(commands: argparse._SubParsersAction) -> None:
    text = "Make the frames between two photos of one scene, with the two photos at the ends."
    parser = commands.add_parser("interpolate", help="make a video out of two photos", description=text)
    parser.allow_abbrev = False
    parser.set_defaults(run=_interpolate)
    add = parser.add_argument
    add("img0", metavar="A", help="the first photo; its shape is the video's")
    add("img1", metavar="B", help="the last photo")
    add("-o", "--output", metavar="PATH", required=True, help="video.mp4, video.gif, or a folder for PNGs")
    add("--fps", type=float, default=16, metavar="N", help="frames per second (default: %(default)s)")
    add("--size", type=_size, metavar="WxH", help="of the video; default: the first photo's, made at the model's own")
    add("--sheet", metavar="PATH", help="also write a contact sheet of all frames, .png or .jpg")
    add("--flow", metavar="PATH", help="also write a picture of the flow between the photos, .png or .jpg")
    add("--seed", type=_seed, default=0, metavar="N", help="same seed, same video (default: %(default)s)")
    add("--quiet", action="store_true", help="show no progress bars")

    add_model_options(parser, default="sd15")

    add = parser.add_argument_group("method", argument_default=argparse.SUPPRESS).add_argument
    add("--prompt", action="append", metavar="TEXT", help="what the photos show; twice: one for each photo")
    add("--frames", dest="n_frames", type=int, metavar="N", help="number of frames between the photos")
    add("--steps", dest="num_inference_steps", type=int, metavar="N", help="steps of the whole diffusion schedule")
    add("--inversion-steps", type=int, metavar="N", help="how many of them are inverted; fewer keep closer to photos")
    add("--feature-step", type=int, metavar="N", help="the step whose features are matched")
    add("--feature-block", type=int, metavar="N", help="the UNet's up block whose features are matched")
    add("--attention-blocks", type=int, nargs="*", metavar="N", help="up blocks whose attention looks at the photos")
    add("--fusion", metavar="NAME", help="two_level, two_level_unwarped or direct")
    add("--guidance-scale", type=float, metavar="X", help="above 1: follow the prompt more, at twice the cost")
    add("--negative-prompt", metavar="TEXT", help="what guidance leads away from")
    add("--lora-steps", type=int, metavar="N", help="training steps on the two photos; 0 skips the fit")
    add("--lora-rank", type=int, metavar="N", help="rank of the LoRA")
    add("--lora-learning-rate", type=float, metavar="X", help="its learning rate")
    add("--lora-scale", type=float, metavar="X", help="its weight")
    add("--frame-batch-size", type=int, metavar="N", help="frames denoised at once; default: what fits in memory")
    parser.formatter_class = _SignatureDefaults  # last: newer Pythons format each help once when it is added


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"'{text}' is no size; write width x height in pixels, like 768x512")
    return int(match[1]), int(match[2])


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"'{text}' is no seed; write a whole number from 0 to 2^63 - 1")
    return int(text)


def _interpolate(args: argparse.Namespace) -> None:
    start = time.perf_counter()
    _check_paths(args)
    check_model(args.model)
    _check_photos(args)
    pipe = load_pipeline(args.model, args.dtype, choose_device(args.device))
    pipe.set_progress_bar_config(disable=args.quiet)
    output = _run(pipe, args)
    frames = output.frames[0]
    write_video(frames, args.output, args.fps)
    if args.sheet:
        write_picture(contact_sheet(frames, [i / (len(frames) - 1) for i in range(len(frames))]), args.sheet)
    if args.flow:
        write_picture(flow_picture(output.flow[0]), args.flow)
    print(f"{args.output}: {len(frames)} frames in {time.perf_counter() - start:.1f} s")


def _check_paths(args: argparse.Namespace) -> None:
    """Refuse outputs that cannot be written or would replace another output or a photo.

    Raises:
        ValueError: with the reason.
    """
    check_video_path(args.output)
    check_fps(args.fps, args.output)
    outputs = [args.output]
    for path in filter(None, (args.sheet, args.flow)):
        check_picture_path(path)
        outputs.append(path)
    for output, other in [*permutations(outputs, 2), *product(outputs, (args.img0, args.img1))]:
        if Path(other).resolve().is_relative_to(Path(output).resolve()):  # the same place, or in the folder of frames
            raise ValueError(f"writing '{output}' would replace '{other}'; choose another path")


def _check_photos(args: argparse.Namespace) -> None:
    from .images import load_images

    load_images(args.img0, "photo A")
    load_images(args.img1, "photo B")


def _run(pipe: DreamMoverPipeline, args: argparse.Namespace) -> DreamMoverPipelineOutput:
    import torch

    parameters = _call_parameters()
    call = {name: value for name, value in vars(args).items() if name in parameters}
    if "prompt" in call and len(call["prompt"]) == 1:
        (call["prompt"],) = call["prompt"]
    if args.size:
        call["width"], call["height"] = args.size
    generator = torch.Generator("cpu").manual_seed(args.seed)
    try:
        output = pipe(**call, include_inputs=True, generator=generator)
    except torch.OutOfMemoryError as error:
        raise RuntimeError(f"{error} Try --frame-batch-size 1, a smaller --size or --dtype float16") from error
    flagged = sum(output.nsfw_content_detected[0]) if output.nsfw_content_detected else 0
    if flagged:
        print(f"dreammover: warning: the safety checker blacked out {flagged} frames", file=sys.stderr)
    return output
