# SPDX-License-Identifier: Apache-2.0
"""Writes the frames of a pipeline to files, for the commands that make one video, and checks their options.

torch and diffusers take seconds to import, so they are imported only after the arguments have been parsed.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import permutations, product
from pathlib import Path
from typing import TYPE_CHECKING

from ..media.correspondences import flow_picture, matches_picture
from ..media.files import (
    check_fps,
    check_picture_path,
    check_still,
    check_video_path,
    video_size,
    write_picture,
    write_video,
    write_video_or_keep,
)
from ..media.pictures import ContactSheet, comparison, crossfade, picture_of
from ..media.playback import frames_to_fill, frames_to_hold, play
from ..media.sources import sources_picture
from ..scratch import put_in_order
from ..settings import RenderSettings
from .loading import load_chosen
from .options import file_path, for_each_gap

if TYPE_CHECKING:
    from PIL import Image

    from ..finishing import LazyFrames
    from ..pipeline import DreamMoverPipeline, DreamMoverPipelineOutput
    from ..records import Canvas, PreparedPair


def add_output_options(parser: argparse.ArgumentParser, gaps: bool = False) -> None:
    """Add the options that say what files to write and how the video is played.

    Args:
        parser: The parser of a command.
        gaps: Whether the command takes more than two photos, and so has several gaps between photos.
    """
    add = parser.add_argument
    add(
        "-o",
        "--output",
        metavar="PATH",
        required=True,
        help="The video: an .mp4 file, a .gif file, or a folder for PNG files. What is too large for many players is "
        "scaled down in an .mp4.",
    )
    add("--fps", type=float, default=16, metavar="N", help="Frames per second (default: %(default)s).")
    seconds = for_each_gap(float) if gaps else float
    length = "Length of the whole video, instead of --frames."
    if gaps:
        length += " Several numbers between commas are the lengths from A to B, from B to C and so on."
    add("--duration", type=seconds, metavar="SECONDS", help=length)
    add(
        "--hold",
        type=float,
        default=0,
        metavar="SECONDS",
        help="How long the first and the last photo stand still (default: %(default)s).",
    )
    add(
        "--ping-pong",
        action="store_true",
        help="Let the video run back to the first photo, so that it can be repeated.",
    )
    add(
        "--sheet",
        type=file_path,
        metavar="PATH",
        help="Also write a contact sheet of all frames to this .png or .jpg file.",
    )
    add(
        "--flow",
        dest="flow_picture",  # the pipeline has an argument of the option's name
        type=file_path,
        metavar="PATH",
        help="Also write a picture of the flow between the photos to this .png or .jpg file.",
    )
    add(
        "--matches",
        type=file_path,
        metavar="PATH",
        help="Also write a picture of the matches and how sure they are to this .png or .jpg file.",
    )
    add(
        "--sources",
        type=file_path,
        metavar="PATH",
        help="Also write a picture of which photo the detail of some frames comes from to this .png or .jpg file.",
    )
    add(
        "--compare",
        type=file_path,
        metavar="PATH",
        help="Also write the video beside a cross-fade, as --output takes it.",
    )
    add("--quiet", action="store_true", help="Show no progress bars.")


def check_output_paths(args: argparse.Namespace, inputs: Sequence[str], others: Sequence[str] = ()) -> None:
    """Refuse outputs that cannot be written or would replace another output or an input.

    What killed processes left beside the videos is removed, and a folder that one was about to replace is put back.

    Args:
        args: The options that `add_output_options` adds, and the model's name.
        inputs: The paths that are read, but for the model's.
        others: The paths that are written besides those that the options name.

    Raises:
        ValueError: An output is refused.
    """
    videos = [path for path in (args.output, args.compare) if path is not None]
    for path in videos:
        put_in_order(Path(path).resolve().parent)
        check_video_path(path)
        check_fps(args.fps, path)
    pictures = [path for path in (args.sheet, args.flow_picture, args.matches, args.sources) if path]
    for path in pictures:
        check_picture_path(path)
    model = [args.model] if args.model is not None and Path(args.model).is_file() else []
    check_replaces_nothing([*videos, *pictures, *others], [*inputs, *model])


def check_replaces_nothing(outputs: Sequence[str | Path], inputs: Sequence[str | Path]) -> None:
    """Refuse outputs that would replace another output or an input.

    Args:
        outputs: The paths that are written.
        inputs: The paths that are read.

    Raises:
        ValueError: An output is refused.
    """
    for output, other in [*permutations(outputs, 2), *product(outputs, inputs)]:
        if Path(other).resolve().is_relative_to(Path(output).resolve()):  # an output may be a folder of frames
            raise ValueError(f"writing '{output}' would replace '{other}'; choose another path")


def check_length(args: argparse.Namespace) -> None:
    """Refuse a hold that cannot be, and a duration beside a number of frames.

    Args:
        args: The options that `add_output_options` and `add_method_options` add, with a frame rate that was checked.

    Raises:
        ValueError: An option is refused.
    """
    held = frames_to_hold(args.hold, args.fps)
    for path in (args.output, args.compare):
        if path is not None:
            check_still(held, args.fps, path)
    if args.duration is not None and hasattr(args, "n_frames"):
        raise ValueError("--duration decides the number of frames, and so does --frames; leave one of them out")


def settle_length(args: argparse.Namespace, gaps: int = 1) -> None:
    """Do what `check_length` does, and where a duration was typed put the number of frames into `args.n_frames`.

    Args:
        args: The options that `add_output_options` and `add_method_options` add, with a frame rate that was checked.
        gaps: How many gaps the video leads through.

    Raises:
        ValueError: An option is refused.
    """
    check_length(args)
    if args.duration is not None:
        args.n_frames = frames_to_fill(args.duration, args.fps, args.hold, args.ping_pong, gaps)


def check_sources(args: argparse.Namespace, call: Mapping[str, object]) -> None:
    """Refuse a picture of what frames take from the photos where they take nothing.

    Args:
        args: The options that `add_output_options` adds.
        call: The arguments of the pipeline; those that are left out have their defaults.

    Raises:
        ValueError: The picture is refused.
    """
    detail = RenderSettings.of(call).detail
    if args.sources and detail == "upsampled":
        raise ValueError(
            f"--sources shows which photo the frames' detail comes from, but with '{detail}' detail it comes from no "
            "photo; leave --sources out, or choose --detail photos"
        )


def say_if_scaled(args: argparse.Namespace, canvas: Canvas) -> None:
    """Print a note if the video will be smaller than its frames; it is best printed before the frames are made.

    Args:
        args: The options that `add_output_options` adds.
        canvas: The canvas that the frames are made on.
    """
    size = canvas.output_width, canvas.output_height
    width, height = video_size(size, args.output, args.fps)
    if width < size[0] or height < size[1]:
        print(
            f"dreammover: note: '{args.output}' will have {width}x{height} pixels instead of {size[0]}x{size[1]}, "
            "since many players refuse larger mp4 files; name a .gif or a folder to keep the size",
            file=sys.stderr,
        )


def make_video(
    args: argparse.Namespace,
    call: Mapping[str, object],
    make: Callable[[DreamMoverPipeline], tuple[PreparedPair, DreamMoverPipelineOutput]],
) -> None:
    """Load the model, make the video of one pair with it, and write what was asked for.

    Args:
        args: The options that `add_output_options` and `add_model_options` add.
        call: The arguments of the pipeline; those that are left out have their defaults.
        make: Function from the pipeline to the prepared pair and its output: lazy frames with the photos at the ends.

    Raises:
        RuntimeError: The model cannot be loaded, or memory does not suffice.
    """
    start = time.perf_counter()
    pipe = load_chosen(args)
    pipe.set_progress_bar_config(disable=args.quiet)
    import torch

    try:
        with pipe.keeping_sources() if args.sources else nullcontext() as sources:
            pair, output = make(pipe)
        times, photos = output.times[0], [picture_of(image) for image in pair.images]
        length = write_frames(args, output, times, lambda index: crossfade(*photos, [times[index]])[0])
    except torch.OutOfMemoryError as error:
        raise RuntimeError(f"{error} Try --frame-batch-size 1, --dtype float16 or a smaller size") from error
    if args.flow_picture:
        write_picture(flow_picture(pair.flow, pair.canvas), args.flow_picture)
    if args.matches:
        motion = RenderSettings.of(call).motion
        write_picture(matches_picture(*photos, pair.flow, pair.canvas, motion), args.matches)
    if args.sources:
        write_picture(sources_picture(output.frames[0][1:-1], sources, pair.canvas), args.sources)
    print(f"{args.output}: {length} frames in {time.perf_counter() - start:.1f} s")


def write_frames(
    args: argparse.Namespace,
    output: DreamMoverPipelineOutput,
    times: Sequence[float],
    fade: Callable[[int], Image.Image],
) -> int:
    """Write the video, and where they were asked for a contact sheet and a comparison with a cross-fade.

    Frames are made one at a time while they are written. Where the safety checker blacks some out, a warning is
    printed at last.

    Args:
        args: The options that `add_output_options` adds.
        output: Output of the pipeline: lazy frames, with the photos in their places.
        times: The times that the contact sheet shows, one for each frame.
        fade: Function that makes the frame of the cross-fade that belongs to the frame of an index.

    Returns:
        How many frames the video has as it is played.

    Raises:
        OSError, RuntimeError: A file could not be written. The video is written first, and the message of the error
            says where its frames are.
    """
    (frames,) = output.frames
    order = play(range(len(frames)), args.fps, args.hold, args.ping_pong)
    sheet = ContactSheet(times) if args.sheet else None
    write_video_or_keep(_Shown(frames, order, sheet), args.output, args.fps)
    if output.blacked_out:
        print(f"dreammover: warning: the safety checker blacked out {output.blacked_out} frames", file=sys.stderr)
    if args.sheet:
        write_picture(sheet.picture, args.sheet)
    if args.compare:
        try:
            write_video(_compared(frames, fade, order), args.compare, args.fps)
        except (OSError, RuntimeError) as error:
            raise RuntimeError(
                f"'{args.compare}' could not be written: {error}; the video itself is in '{args.output}'"
            ) from error
    return len(order)


@dataclass(frozen=True)
class _Shown:
    """Frames in the order in which they are shown, which are put on a sheet as they pass by, if there is one."""

    frames: LazyFrames
    order: Sequence[int]
    sheet: ContactSheet | None

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[Image.Image]:
        for index, frame in zip(self.order, self.frames.arranged(self.order), strict=True):
            if self.sheet is not None:
                self.sheet.put(index, frame)
            yield frame


def _compared(frames: LazyFrames, fade: Callable[[int], Image.Image], order: Sequence[int]) -> Iterator[Image.Image]:
    """The frames beside those of a cross-fade, one at a time, since all at once could fill the memory.

    Args:
        frames: The frames, with the photos in their places.
        fade: Function that makes the frame of the cross-fade that belongs to the frame of an index.
        order: The indices of the frames in the order in which they are shown.
    """
    before = None
    for index, frame in zip(order, frames.arranged(order), strict=True):
        if index != before:
            (beside,) = comparison({"DreamMover": [frame], "cross-fade": [fade(index)]})
        before = index
        yield beside
