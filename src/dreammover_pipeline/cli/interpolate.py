# SPDX-License-Identifier: Apache-2.0
"""The command `dreammover interpolate`: a video between two photos, or one that leads through several photos.

torch and diffusers take seconds to import, so they are imported only after the arguments have been parsed.
"""

from __future__ import annotations

import argparse
import re
import shutil
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from ..arguments import taken
from ..inputs import check_input_file, file_fault
from ..media.files import check_file_path, check_name_length
from ..media.pictures import crossfade, picture_of
from ..media.playback import check_duration
from ..scratch import put_in_order
from ..settings import PREPARING, RENDERING, arguments
from .claims import claimed
from .loading import add_component_options, add_model_options, check_model, load_chosen, pipeline_class
from .options import add_method_options, call_arguments, file_path, seed, size, steering_files
from .writing import (
    add_output_options,
    check_length,
    check_output_paths,
    check_sources,
    make_video,
    say_if_scaled,
    settle_length,
    write_frames,
)

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from ..pipeline import DreamMoverPipeline, DreamMoverPipelineOutput
    from ..records import Canvas, PreparedPair

# The options that only make sense for a single pair of photos, by the names of their attributes.
PAIR_OPTIONS = {
    "flow_picture": "--flow",
    "matches": "--matches",
    "sources": "--sources",
    "save_pair": "--save-pair",
    "points": "--points",
    "mask": "--mask",
    "poses": "--poses",
}


def add_interpolate(commands: argparse._SubParsersAction) -> None:
    """Register the command `interpolate`."""
    text = (
        "Make a video between two photos of one scene, or one that leads through more photos, each in its place. With "
        "more than two, finished gaps between photos are kept, and after a kill the same command goes on from there."
    )
    parser = commands.add_parser("interpolate", help="make a video out of two photos or more", description=text)
    parser.set_defaults(run=_interpolate)
    add = parser.add_argument
    add("img0", metavar="A", help="The first photo. Its size and its aspect ratio decide those of the video.")
    add("img1", metavar="B", help="The second photo.")
    add("more", metavar="C", nargs="*", help="Further photos that the video leads through, in their order.")
    add_output_options(parser, gaps=True)
    add(
        "--size",
        type=size,
        metavar="WxH",
        help="Size to work at and to return. By default the model's own is worked at and the first photo's returned.",
    )
    add(
        "--seed",
        type=seed,
        default=0,
        metavar="N",
        help="Seed of all that is random; equal seeds give equal videos (default: %(default)s).",
    )
    add(
        "--save-pair",
        type=file_path,
        metavar="PATH",
        help="Also write the prepared pair to this .safetensors file, for dreammover render.",
    )
    add("--one-lora", action="store_true", help="Fit one LoRA to all photos, instead of one for every two neighbours.")
    add_model_options(parser, default="sd15")
    add_component_options(parser)
    add_method_options(parser, gaps=True)


def _interpolate(args: argparse.Namespace) -> None:
    """Make the video of two photos or of more."""
    _check_numbers_of_gaps(args, 1 + len(args.more))
    if args.more:
        _make_sequence(args, [args.img0, args.img1, *args.more])
    else:
        _make_pair(args)


def _make_pair(args: argparse.Namespace) -> None:
    """Make the video between two photos, and write what was asked for.

    Raises:
        ValueError: An argument is not what it may be; raised before any model runs.
    """
    pairs = [args.save_pair] if args.save_pair else []
    check_output_paths(args, [args.img0, args.img1, *steering_files(args)], pairs)
    settle_length(args)
    for path in pairs:
        check_file_path(path, [".safetensors"])
    check_model(args.model, args.allow_pickle)
    for name, path in (("photo A", args.img0), ("photo B", args.img1)):
        check_input_file(path, f"{name} ({path})", "an image file")  # before torch, whose import takes seconds
    photos, call = _decoded(args)
    check_sources(args, call)

    def make(pipe: DreamMoverPipeline) -> tuple[PreparedPair, DreamMoverPipelineOutput]:
        pipe.check_inputs(**call)
        say_if_scaled(args, pipe.canvas(photos[0], call.get("height"), call.get("width")))
        pair = pipe.prepare(*photos, **taken(call, *PREPARING))
        if args.save_pair:
            pipe.save_pair(pair, args.save_pair)
        import torch

        generator = torch.Generator("cpu").manual_seed(args.seed)
        return pair, pipe.render(pair, **taken(call, *RENDERING), output_type="lazy", generator=generator)

    make_video(args, call, make)


def _decoded(args: argparse.Namespace) -> tuple[list[torch.Tensor], dict[str, object]]:
    """The two photos, and the arguments of the pipeline, all of them with pictures as `decode_images` gives them.

    Raises:
        ValueError: A photo or a mask cannot be read, or points or masks do not fit the photos.
    """
    import torch

    from ..images import check_mask_sizes, decode_images
    from ..poses import people_of_photos
    from ..steering import check_points_inside, point_pairs

    photos = [*decode_images(args.img0, "photo A"), *decode_images(args.img1, "photo B")]
    sizes, call = [photo.shape[-2:] for photo in photos], call_arguments(args)
    check_points_inside(point_pairs(call.get("points")), sizes)
    if "poses" in call:
        if args.controlnet is None:
            raise ValueError("--poses needs a ControlNet that was trained on OpenPose poses; name it by --controlnet")
        people_of_photos(call["poses"], sizes)
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
    for name, option in PAIR_OPTIONS.items():
        if getattr(args, name, None):
            raise ValueError(f"{option} is about one pair of photos, but {len(photos)} came; leave {option} out")
    output = Path(args.output).resolve()
    parts = output.with_name(f"{output.name}.parts")
    check_output_paths(args, photos, [parts])
    check_name_length(parts)
    counts = _frames_of_gaps(args, len(photos) - 1)
    check_model(args.model, args.allow_pickle)
    for i, photo in enumerate(photos):
        check_input_file(photo, f"photo {i + 1} ({photo})", "an image file")
    pipeline_class()  # this comes first, since it switches off log lines that third parties write when imported
    import torch

    from ..images import decode_images
    from ..sequence import texts_of_gaps

    decoded = [decode_images(photo, f"photo {i + 1}")[0] for i, photo in enumerate(photos)]
    call = call_arguments(args)
    texts_of_gaps(call.get("prompt", ""), None, len(photos), 0)  # refuses bad prompts before a model is loaded
    _check_parts(parts)
    pipe = load_chosen(args)
    pipe.set_progress_bar_config(disable=args.quiet)
    canvas = pipe.canvas(decoded[0], call.get("height"), call.get("width"))
    say_if_scaled(args, canvas)
    with claimed(parts, "making the same video", temporary=True):
        put_in_order(parts)
        made = _gaps(pipe, args, decoded, photos, {**call, "n_frames": counts, "output_type": "lazy"}, parts)
        moments = [k + moment for k, gap in enumerate(made.times) for moment in gap]
        try:
            length = write_frames(args, made, moments, _crossfades(decoded, canvas, made.times))
        except torch.OutOfMemoryError as error:
            raise RuntimeError(
                f"{error} All gaps are kept in '{parts}', and the same command goes on from there"
            ) from error
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
    """The video through all photos.

    Args:
        pipe: The pipeline.
        args: The options of the command.
        decoded: The photos as `decode_images` gives them.
        photos: The names of the photos, for error messages.
        call: The arguments of the pipeline.
        parts: The folder in which finished gaps are kept.

    Raises:
        RuntimeError: A gap could not be made.
    """
    import torch

    generator = torch.Generator("cpu").manual_seed(args.seed)
    lora = "shared" if args.one_lora else "gap"
    try:
        return pipe.interpolate_sequence(list(decoded), lora=lora, keep=parts, generator=generator, **call)
    except Exception as error:
        if not hasattr(error, "gap"):  # then no gap was begun, and the message is not about one
            raise
        first, last = photos[error.gap : error.gap + 2]
        raise RuntimeError(
            f"gap {error.gap + 1} ('{first}' to '{last}') failed ({type(error).__name__}: {error}); the gaps that are "
            f"done are kept in '{parts}', and the same command goes on from there"
        ) from error


def _crossfades(
    decoded: Sequence[torch.Tensor], canvas: Canvas, times: Sequence[Sequence[float]]
) -> Callable[[int], Image.Image]:
    """Makes the frames, by their index, of a video in which every gap is a cross-fade between its two photos.

    Args:
        decoded: The photos as `decode_images` gives them.
        canvas: The canvas that all photos are put on.
        times: The δ of the frames of each gap.
    """
    from ..framing import fit_to_output

    ends = [picture_of(fit_to_output(photo, canvas)) for photo in decoded]
    places = [(both, [time]) for both, gap in zip(pairwise(ends), times, strict=True) for time in gap]

    def frame(index: int) -> Image.Image:
        both, time = places[index]
        return crossfade(*both, time)[0]

    return frame


def _check_numbers_of_gaps(args: argparse.Namespace, gaps: int) -> None:
    """Raise ValueError if an option lists several numbers, but not one for each gap."""
    for option, values in (("--frames", getattr(args, "n_frames", None)), ("--duration", args.duration)):
        if isinstance(values, list) and len(values) != gaps:
            raise ValueError(
                f"{option} has {len(values)} numbers, but {gaps + 1} photos have {gaps} gap{'s' * (gaps > 1)}; "
                "give one number for all gaps, or one for each"
            )


def _frames_of_gaps(args: argparse.Namespace, gaps: int) -> list[int]:
    """The number of frames of every gap, as `--frames` or `--duration` decide it.

    Raises:
        ValueError: The duration does not suffice for a frame in every gap, or both options are given.
    """
    if not isinstance(args.duration, list):
        settle_length(args, gaps)
        if args.duration is None:
            frames = getattr(args, "n_frames", arguments()["n_frames"].default)
            return frames if isinstance(frames, list) else [frames] * gaps
        made = args.n_frames - (gaps - 1)  # the photos between the gaps are frames of the video too
        return [made // gaps + (k < made % gaps) for k in range(gaps)]
    check_length(args)
    for duration in args.duration:
        check_duration(duration)
        if round(duration * args.fps) < 2:
            raise ValueError(
                f"a gap cannot last {duration:g} s; at {args.fps:g} frames per second the shortest with a frame "
                f"between its photos is {2 / args.fps:.3g} s"
            )
    return [round(duration * args.fps) - 1 for duration in args.duration]


def _check_parts(parts: Path) -> None:
    """Raise ValueError unless the place for finished gaps, removed in the end, is free or a folder of them alone."""
    from ..kept_gaps import FILE_NAMES

    if parts.is_symlink() or (parts.exists() and not parts.is_dir()):
        fault = "a symbolic link" if parts.is_symlink() else file_fault(parts) or "a file"
        raise ValueError(
            f"finished gaps are kept in a folder '{parts}', but there is {fault} of that name; move it away"
        )
    own = re.compile(rf"{FILE_NAMES}|\.dreammover.*")
    others = [entry.name for entry in parts.glob("*") if not own.fullmatch(entry.name)]
    if others:
        raise ValueError(
            f"finished gaps are kept in '{parts}' for a while, but that folder holds something else, '{min(others)}'; "
            "move it away"
        )
