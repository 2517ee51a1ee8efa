# SPDX-License-Identifier: Apache-2.0
"""The command `dreammover render`, and what it shares with `dreammover interpolate`: from a pipeline to files.

torch and diffusers take seconds to import, so that happens after the arguments parsed.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from itertools import permutations, product
from pathlib import Path
from typing import TYPE_CHECKING

from .figures import contact_sheet, flow_picture
from .loading import add_model_options, check_model, choose_device, load_pipeline, pipeline_class
from .media import check_fps, check_picture_path, check_video_path, write_picture, write_video
from .options import add_method_options, call_arguments

if TYPE_CHECKING:
    from .pipeline import DreamMoverPipeline, DreamMoverPipelineOutput


def add_render(commands: argparse._SubParsersAction) -> None:
    """Register the command."""
    text = "Make a video of a pair that `interpolate --save-pair` prepared: other frames without the work before them."
    parser = commands.add_parser("render", help="make another video of a prepared pair", description=text)
    parser.allow_abbrev = False
    parser.set_defaults(run=_render)
    parser.add_argument("pair", metavar="PAIR", help="the .safetensors file, prepared with the same model")
    add_output_options(parser)
    add_model_options(parser, default="sd15")
    add_method_options(parser, rendering_only=True)


def add_output_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say what files to write."""
    add = parser.add_argument
    add("-o", "--output", metavar="PATH", required=True, help="video.mp4, video.gif, or a folder for PNGs")
    add("--fps", type=float, default=16, metavar="N", help="frames per second (default: %(default)s)")
    add("--sheet", metavar="PATH", help="also write a contact sheet of all frames, .png or .jpg")
    add("--flow", metavar="PATH", help="also write a picture of the flow between the photos, .png or .jpg")
    add("--quiet", action="store_true", help="show no progress bars")


def check_outputs(args: argparse.Namespace, inputs: Sequence[str], others: Sequence[str] = ()) -> None:
    """Refuse outputs that cannot be written or would replace another output or an input.

    Args:
        args: with the options of `add_output_options`.
        inputs: paths that are read.
        others: further paths that are written.

    Raises:
        ValueError: with the reason.
    """
    check_video_path(args.output)
    check_fps(args.fps, args.output)
    pictures = [path for path in (args.sheet, args.flow) if path]
    for path in pictures:
        check_picture_path(path)
    outputs = [args.output, *pictures, *others]
    for output, other in [*permutations(outputs, 2), *product(outputs, inputs)]:
        if Path(other).resolve().is_relative_to(Path(output).resolve()):  # the same place, or in the folder of frames
            raise ValueError(f"writing '{output}' would replace '{other}'; choose another path")


def make_video(args: argparse.Namespace, make: Callable[[DreamMoverPipeline], DreamMoverPipelineOutput]) -> None:
    """Load the model, have it make the output, and write what was asked for.

    Args:
        args: with the options of `add_output_options` and `add_model_options`.
        make: from the pipeline to the output of one pair, with the photos at the ends.
    """
    start = time.perf_counter()
    pipe = load_pipeline(args.model, args.dtype, choose_device(args.device))
    pipe.set_progress_bar_config(disable=args.quiet)
    import torch

    try:
        output = make(pipe)
    except torch.OutOfMemoryError as error:
        raise RuntimeError(f"{error} Try --frame-batch-size 1, --dtype float16 or a smaller size") from error
    flagged = sum(output.nsfw_content_detected[0]) if output.nsfw_content_detected else 0
    if flagged:
        print(f"dreammover: warning: the safety checker blacked out {flagged} frames", file=sys.stderr)
    frames = output.frames[0]
    write_video(frames, args.output, args.fps)
    if args.sheet:
        write_picture(contact_sheet(frames, [i / (len(frames) - 1) for i in range(len(frames))]), args.sheet)
    if args.flow:
        write_picture(flow_picture(output.flow[0]), args.flow)
    print(f"{args.output}: {len(frames)} frames in {time.perf_counter() - start:.1f} s")


def _render(args: argparse.Namespace) -> None:
    check_outputs(args, [args.pair])
    check_model(args.model)
    if not Path(args.pair).is_file():
        raise ValueError(f"there is no file '{args.pair}'")
    pipeline_class()  # first, since it hushes third parties before they are imported
    from .storage import read_pair

    read_pair(args.pair, "cpu")  # for its complaints, before a model is loaded that decides whether it fits
    call = call_arguments(args)
    make_video(args, lambda pipe: pipe.render(pipe.load_pair(args.pair), **call, include_inputs=True))
