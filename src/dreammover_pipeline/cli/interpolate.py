# SPDX-License-Identifier: Apache-2.0
"""The command `dreammover interpolate`: a video out of two photos, or one that leads through more of them.

torch and diffusers take seconds to import, so that happens after the arguments parsed.
"""

from __future__ import annotations

import argparse
import math
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from ..arguments import taken
from ..media.files import check_file_path
from ..media.pictures import crossfade, picture_of
from ..settings import PREPARING, RENDERING, arguments
from .loading import add_model_options, check_model, load_chosen, pipeline_class
from .options import add_method_options, call_arguments, seed, size, steering_files
from .writing import add_output_options, check_length, check_output_paths, make_video, settle_length, write_frames

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from ..pipeline import DreamMoverPipeline, DreamMoverPipelineOutput
    from ..records import Canvas, PreparedPair

# Options that are about one pair of photos, by the names of their attributes.
OF_A_PAIR = ("flow", "matches", "save_pair", "points", "mask")


def add_interpolate(commands: argparse._SubParsersAction) -> None:
    """Register the command."""
    text = (
        "Make the frames between two photos of one scene, with the two photos at the ends, or lead through more. "
        "Of more than two, what is done is kept, and after a kill the same command goes on from there."
    )
    parser = commands.add_parser("interpolate", help="make a video out of two photos or more", description=text)
    parser.set_defaults(run=_interpolate)
    add = parser.add_argument
    add("img0", metavar="A", help="the first photo; its shape is the video's")
    add("img1", metavar="B", help="the last photo, or the next")
    add("more", metavar="C", nargs="*", help="further photos that the video leads to")
    add_output_options(parser, gaps=True)
    add("--size", type=size, metavar="WxH", help="of the video; default: the first photo's, made at the model's own")
    add("--seed", type=seed, default=0, metavar="N", help="same seed, same video (default: %(default)s)")
    add("--save-pair", metavar="PATH", help="also write the prepared pair, .safetensors, for dreammover render")
    add("--one-lora", action="store_true", help="fit one LoRA to all photos instead of one for each two neighbours")
    add_model_options(parser, default="sd15")
    add_method_options(parser, gaps=True)


def _interpolate(args: argparse.Namespace) -> None:
    _check_numbers_of_gaps(args, 1 + len(args.more))
    if args.more:
        _make_sequence(args, [args.img0, args.img1, *args.more])
    else:
        _make_pair(args)


def _make_pair(args: argparse.Namespace) -> None:
    pairs = [args.save_pair] if args.save_pair else []
    check_output_paths(args, [args.img0, args.img1, *steering_files(args)], pairs)
    settle_length(args)
    for path in pairs:
        check_file_path(path, [".safetensors"])
    check_model(args.model, args.allow_pickle)
    photos, call = _decoded(args)

    def make(pipe: DreamMoverPipeline) -> tuple[PreparedPair, DreamMoverPipelineOutput]:
        pipe.check_inputs(**call)
        pair = pipe.prepare(*photos, **taken(call, *PREPARING))
        if args.save_pair:
            pipe.save_pair(pair, args.save_pair)
        return pair, pipe.render(pair, **taken(call, *RENDERING))

    make_video(args, make)


def _decoded(args: argparse.Namespace) -> tuple[list[torch.Tensor], dict[str, object]]:
    """The two photos, and the arguments of the pipeline with masks decoded; checked before a model is loaded."""
    import torch

    from ..images import check_mask_sizes, decode_images
    from ..steering import check_points_inside, point_pairs

    photos = [*decode_images(args.img0, "photo A"), *decode_images(args.img1, "photo B")]
    sizes, call = [photo.shape[-2:] for photo in photos], call_arguments(args)
    check_points_inside(point_pairs(call.get("points")), sizes)
    if "mask" in call:
        call["mask"] = check_mask_sizes(decode_images(call["mask"], "mask"), sizes)
    return photos, {**call, "generator": torch.Generator("cpu").manual_seed(args.seed), "include_inputs": True}


def _make_sequence(args: argparse.Namespace, photos: Sequence[str]) -> None:
    """Make the video through more than two photos, and write what was asked for.

    Raises:
        ValueError: An argument is not what it may be; raised before any model runs.
        RuntimeError: A gap failed; the gaps before it are kept.
    """
    start = time.perf_counter()
    for name in OF_A_PAIR:
        if getattr(args, name, None):
            option = f"--{name.replace('_', '-')}"
            raise ValueError(f"{option} is about one pair of photos, but {len(photos)} came; leave it out")
    output = Path(args.output).resolve()
    parts = output.with_name(f"{output.name}.parts")
    check_output_paths(args, photos, [parts])
    counts = _frames_of_gaps(args, len(photos) - 1)
    check_model(args.model, args.allow_pickle)
    pipeline_class()  # first, since it hushes third parties before they are imported
    from ..images import decode_images
    from ..sequence import texts_of_gaps

    decoded = [decode_images(photo, f"photo {i + 1}")[0] for i, photo in enumerate(photos)]
    call = call_arguments(args)
    texts_of_gaps(call.get("prompt", ""), None, len(photos), 0)  # for its complaints, before a model is loaded
    _check_parts(parts)
    pipe = load_chosen(args)
    pipe.set_progress_bar_config(disable=args.quiet)
    with _claimed(parts):
        made = _gaps(pipe, args, decoded, photos, {**call, "n_frames": counts}, parts)
        frames, times = made.frames[0], made.times
        flagged = sum(made.nsfw_content_detected[0]) if made.nsfw_content_detected else 0
        canvas = pipe.canvas(decoded[0], call.get("height"), call.get("width"))
        moments = [k + moment for k, gap in enumerate(times) for moment in gap]
        length = write_frames(args, frames, moments, flagged, lambda: _crossfades(decoded, canvas, times))
    shutil.rmtree(parts)
    print(f"{args.output}: {length} frames in {time.perf_counter() - start:.1f} s")


def _gaps(
    pipe: DreamMoverPipeline,
    args: argparse.Namespace,
    decoded: Sequence[torch.Tensor],
    photos: Sequence[str],
    call: dict[str, object],
    parts: Path,
) -> DreamMoverPipelineOutput:
    """All gaps, of which those that are done are kept in `parts`."""
    import torch

    generator = torch.Generator("cpu").manual_seed(args.seed)
    lora = "shared" if args.one_lora else "gap"
    try:
        return pipe.interpolate_sequence(list(decoded), lora=lora, keep=parts, generator=generator, **call)
    except Exception as error:
        if not hasattr(error, "gap"):  # it is about the arguments, and no gap was begun
            raise
        first, last = photos[error.gap : error.gap + 2]
        raise RuntimeError(
            f"gap {error.gap + 1} ('{first}' to '{last}') failed ({type(error).__name__}: {error}); the gaps that are "
            f"done are kept in '{parts}', and the same command goes on from there"
        ) from error


def _crossfades(
    decoded: Sequence[torch.Tensor], canvas: Canvas, times: Sequence[Sequence[float]]
) -> list[Image.Image]:
    """What the video would be if each gap were a cross-fade, at the same times."""
    from ..framing import fit_to_output
    from ..images import rgb

    ends = [picture_of(fit_to_output(rgb(photo), canvas)) for photo in decoded]
    return [frame for both, gap in zip(pairwise(ends), times, strict=True) for frame in crossfade(*both, gap)]


def _check_numbers_of_gaps(args: argparse.Namespace, gaps: int) -> None:
    """Refuse lists of numbers that have not one for each gap.

    Raises:
        ValueError: With the option and how many gaps there are.
    """
    for option, values in (("--frames", getattr(args, "n_frames", None)), ("--duration", args.duration)):
        if isinstance(values, list) and len(values) != gaps:
            raise ValueError(
                f"{option} has {len(values)} numbers, but {gaps + 1} photos have {gaps} gap{'s' * (gaps > 1)}; "
                "give one for all, or one for each gap"
            )


def _frames_of_gaps(args: argparse.Namespace, gaps: int) -> list[int]:
    """How many frames every gap gets, by `--frames` or `--duration`."""
    if not isinstance(args.duration, list):
        settle_length(args)
        if args.duration is None:
            frames = getattr(args, "n_frames", arguments()["n_frames"].default)
            return frames if isinstance(frames, list) else [frames] * gaps
        made = args.n_frames - (gaps - 1)  # the photos between the gaps are frames too
        if made < gaps:
            raise ValueError(f"a duration of {args.duration:g} s leaves not a frame for each of the {gaps} gaps")
        return [made // gaps + (k < made % gaps) for k in range(gaps)]
    check_length(args)
    for duration in args.duration:
        if not 0 < duration < math.inf or round(duration * args.fps) < 2:
            raise ValueError(
                f"a gap cannot last {duration:g} s; at {args.fps:g} frames per second the shortest with a frame "
                f"between its photos is {2 / args.fps:.3g} s"
            )
    return [round(duration * args.fps) - 1 for duration in args.duration]


def _check_parts(parts: Path) -> None:
    """Refuse to keep unfinished gaps where something else is, since they are removed in the end."""
    from ..kept_gaps import FILE_NAMES

    if parts.exists() and not parts.is_dir():
        raise ValueError(f"unfinished gaps are kept in a folder '{parts}', but there is a file of that name")
    own = re.compile(rf"{FILE_NAMES}|\.dreammover.*")
    others = [entry.name for entry in parts.glob("*") if not own.fullmatch(entry.name)]
    if others:
        raise ValueError(
            f"unfinished gaps are kept in '{parts}', but besides such it holds '{min(others)}'; move it away"
        )


@contextmanager
def _claimed(parts: Path) -> Iterator[None]:
    """Keep others from making the same video while the context lasts; a folder that stays empty goes again."""
    from filelock import FileLock, Timeout

    parts.mkdir(exist_ok=True)
    place = parts / ".dreammover-lock"
    lock = FileLock(place)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise RuntimeError(f"another process works in '{parts}', on the same video") from error
    try:
        yield
    finally:
        lock.release()
        with suppress(OSError):  # which it is if gaps are kept in it
            if [entry.name for entry in parts.iterdir()] == [place.name]:
                shutil.rmtree(parts)
