# SPDX-License-Identifier: Apache-2.0
"""From a pipeline's frames to files, for the commands that make one video: its options, its checks, its pictures.

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

from ..media.correspondences import flow_picture, matches_picture
from ..media.files import check_fps, check_picture_path, check_video_path, write_picture, write_video
from ..media.pictures import comparison, contact_sheet, crossfade, picture_of
from ..media.playback import check_hold, frames_to_fill, play
from .loading import load_chosen
from .options import for_each_gap

if TYPE_CHECKING:
    from PIL import Image

    from ..pipeline import DreamMoverPipeline, DreamMoverPipelineOutput
    from ..records import PreparedPair


def add_output_options(parser: argparse.ArgumentParser, gaps: bool = False) -> None:
    """Add the options that say what files to write; with `gaps`, of what may be more than two photos."""
    add = parser.add_argument
    add("-o", "--output", metavar="PATH", required=True, help="video.mp4, video.gif, or a folder for PNGs")
    add("--fps", type=float, default=16, metavar="N", help="frames per second (default: %(default)s)")
    seconds = for_each_gap(float) if gaps else float
    length = "length of the whole video, instead of --frames" + "; with commas, from A to B, B to C, ..." * gaps
    add("--duration", type=seconds, metavar="SECONDS", help=length)
    add("--hold", type=float, default=0, metavar="SECONDS", help="how long the photos stand still at the ends")
    add("--ping-pong", action="store_true", help="run back to the first photo too, for a video that is repeated")
    add("--sheet", metavar="PATH", help="also write a contact sheet of all frames, .png or .jpg")
    add("--flow", metavar="PATH", help="also write a picture of the flow between the photos, .png or .jpg")
    add("--matches", metavar="PATH", help="also write what was matched with what and how surely, .png or .jpg")
    add("--compare", metavar="PATH", help="also write the video beside a cross-fade: .mp4, .gif, or a folder for PNGs")
    add("--quiet", action="store_true", help="show no progress bars")


def check_output_paths(args: argparse.Namespace, inputs: Sequence[str], others: Sequence[str] = ()) -> None:
    """Refuse outputs that cannot be written or would replace another output or an input.

    Args:
        args: with the options of `add_output_options`.
        inputs: paths that are read.
        others: further paths that are written.

    Raises:
        ValueError: with the reason.
    """
    videos = [path for path in (args.output, args.compare) if path is not None]
    for path in videos:
        check_video_path(path)
        check_fps(args.fps, path)
    pictures = [path for path in (args.sheet, args.flow, args.matches) if path]
    for path in pictures:
        check_picture_path(path)
    outputs = [*videos, *pictures, *others]
    for output, other in [*permutations(outputs, 2), *product(outputs, inputs)]:
        if Path(other).resolve().is_relative_to(Path(output).resolve()):  # the same place, or in the folder of frames
            raise ValueError(f"writing '{output}' would replace '{other}'; choose another path")


def check_length(args: argparse.Namespace) -> None:
    """Check how the video is to be played.

    Args:
        args: with the options of `add_output_options` and `add_method_options`.

    Raises:
        ValueError: with the reason.
    """
    check_hold(args.hold)
    if args.duration is not None and hasattr(args, "n_frames"):
        raise ValueError("--duration decides the number of frames, and so does --frames; leave one of them out")


def settle_length(args: argparse.Namespace) -> None:
    """`check_length`, and make `n_frames` of a duration; the frame rate is checked already."""
    check_length(args)
    if args.duration is not None:
        args.n_frames = frames_to_fill(args.duration, args.fps, args.hold, args.ping_pong)


def make_video(
    args: argparse.Namespace,
    make: Callable[[DreamMoverPipeline], tuple[PreparedPair, DreamMoverPipelineOutput]],
) -> None:
    """Load the model, have it make the output, and write what was asked for.

    Args:
        args: with the options of `add_output_options` and `add_model_options`.
        make: from the pipeline to one prepared pair and its output, with the photos at the ends.
    """
    start = time.perf_counter()
    pipe = load_chosen(args)
    pipe.set_progress_bar_config(disable=args.quiet)
    import torch

    try:
        pair, output = make(pipe)
    except torch.OutOfMemoryError as error:
        raise RuntimeError(f"{error} Try --frame-batch-size 1, --dtype float16 or a smaller size") from error
    flagged = sum(output.nsfw_content_detected[0]) if output.nsfw_content_detected else 0
    frames, times = output.frames[0], output.times[0]
    photos = [picture_of(image) for image in pair.images]
    length = write_frames(args, frames, times, flagged, lambda: crossfade(*photos, times))
    if args.flow:
        write_picture(flow_picture(pair.flow, pair.canvas), args.flow)
    if args.matches:
        write_picture(matches_picture(*photos, pair.flow, pair.canvas), args.matches)
    print(f"{args.output}: {length} frames in {time.perf_counter() - start:.1f} s")


def write_frames(
    args: argparse.Namespace,
    frames: Sequence[Image.Image],
    times: Sequence[float],
    flagged: int,
    fade: Callable[[], list[Image.Image]],
) -> int:
    """Write what is made of frames alone: the video, and where asked for the contact sheet and the comparison.

    Args:
        args: with the options of `add_output_options`.
        frames: the photos among them.
        times: of each, for the sheet.
        flagged: how many of them the safety checker blacked out, to warn of them.
        fade: makes the cross-fade that they are compared with.

    Returns:
        How many frames the video has.
    """
    if flagged:
        print(f"dreammover: warning: the safety checker blacked out {flagged} frames", file=sys.stderr)
    shown = _played(frames, args)
    write_video(shown, args.output, args.fps)
    if args.sheet:
        write_picture(contact_sheet(frames, times), args.sheet)
    if args.compare:
        videos = {"DreamMover": frames, "cross-fade": fade()}
        write_video(_played(comparison(videos), args), args.compare, args.fps)
    return len(shown)


def _played(frames: Sequence[Image.Image], args: argparse.Namespace) -> list[Image.Image]:
    return play(frames, args.fps, args.hold, args.ping_pong)
