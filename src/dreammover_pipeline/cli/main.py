# SPDX-License-Identifier: Apache-2.0
"""The command `dreammover`.

torch and diffusers take seconds to import, so that happens after the arguments parsed.

Exit codes: 0 done, 1 failed while running, 2 bad input, 130 interrupted, 143 terminated (by SIGTERM, in a batch).
"""

from __future__ import annotations

import argparse
import inspect
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from .. import __version__
from ..export.hub import add_export
from ..media.files import check_file_path
from .batch import add_batch
from .evaluate import add_evaluation, check_settings
from .loading import add_model_options, check_model
from .options import add_method_options, call_arguments, seed, size, steering_files
from .render import add_output_options, add_render, check_outputs, make_video, settle_length
from .sequence import check_gaps, make_sequence
from .train import add_train
from .ui import add_ui

if TYPE_CHECKING:
    from ..pipeline import DreamMoverPipeline, DreamMoverPipelineOutput
    from ..records import PreparedPair


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
    def __init__(self, **settings):  # of the commands, too: they are made of their parent's class
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message: str):
        raise ValueError(f"{message}; see {self.prog} --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="dreammover", description="A short video out of two photos.")
    parser.add_argument("--version", action="version", version=f"dreammover {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_interpolate(commands)
    add_render(commands)
    add_batch(commands)
    add_evaluation(commands)
    add_train(commands)
    add_export(commands)
    add_ui(commands)
    return parser


def _add_interpolate(commands: argparse._SubParsersAction) -> None:
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
    check_gaps(args, 1 + len(args.more))
    if args.more:
        make_sequence(args, [args.img0, args.img1, *args.more])
        return
    pairs = [args.save_pair] if args.save_pair else []
    check_outputs(args, [args.img0, args.img1, *steering_files(args)], pairs)
    settle_length(args)
    for path in pairs:
        check_file_path(path, [".safetensors"])
    check_model(args.model, args.allow_pickle)
    _check_photos(args)
    make_video(args, lambda pipe: _made(pipe, args))


def _check_photos(args: argparse.Namespace) -> None:
    from ..images import load_images, load_masks
    from ..inputs import check_points_inside, point_pairs

    photos = load_images(args.img0, "photo A") + load_images(args.img1, "photo B")
    sizes, call = [photo.shape[-2:] for photo in photos], call_arguments(args)
    check_points_inside(point_pairs(call.get("points")), sizes)
    load_masks(call.get("mask"), sizes)


def _made(pipe: DreamMoverPipeline, args: argparse.Namespace) -> tuple[PreparedPair, DreamMoverPipelineOutput]:
    import torch

    call = {**call_arguments(args), "generator": torch.Generator("cpu").manual_seed(args.seed), "include_inputs": True}
    check_settings(pipe, call)

    def taken_by(stage: Callable) -> dict[str, object]:
        return {name: call[name] for name in inspect.signature(stage).parameters if name in call}

    pair = pipe.prepare(**taken_by(pipe.prepare))
    if args.save_pair:
        pipe.save_pair(pair, args.save_pair)
    return pair, pipe.render(pair, **taken_by(pipe.render))
