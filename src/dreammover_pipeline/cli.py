# SPDX-License-Identifier: Apache-2.0
"""The command `dreammover`.

torch and diffusers take seconds to import, so that happens after the arguments parsed.

Exit codes: 0 done, 1 failed while running, 2 bad input, 130 interrupted.
"""

from __future__ import annotations

import argparse
import inspect
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from . import __version__
from .evaluation.command import add_evaluation, check_settings
from .loading import add_model_options, check_model
from .media import check_file_path
from .options import add_method_options, call_arguments, seed, size
from .render_command import add_output_options, add_render, check_outputs, make_video

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


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="dreammover", description="A short video out of two photos.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"dreammover {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_interpolate(commands)
    add_render(commands)
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
    add_output_options(parser)
    add("--size", type=size, metavar="WxH", help="of the video; default: the first photo's, made at the model's own")
    add("--seed", type=seed, default=0, metavar="N", help="same seed, same video (default: %(default)s)")
    add("--save-pair", metavar="PATH", help="also write the prepared pair, .safetensors, for dreammover render")
    add_model_options(parser, default="sd15")
    add_method_options(parser)


def _interpolate(args: argparse.Namespace) -> None:
    pairs = [args.save_pair] if args.save_pair else []
    check_outputs(args, [args.img0, args.img1], pairs)
    for path in pairs:
        check_file_path(path, [".safetensors"])
    check_model(args.model)
    _check_photos(args)
    make_video(args, lambda pipe: _made(pipe, args))


def _check_photos(args: argparse.Namespace) -> None:
    from .images import load_images

    load_images(args.img0, "photo A")
    load_images(args.img1, "photo B")


def _made(pipe: DreamMoverPipeline, args: argparse.Namespace) -> DreamMoverPipelineOutput:
    import torch

    call = {**call_arguments(args), "generator": torch.Generator("cpu").manual_seed(args.seed), "include_inputs": True}
    if not args.save_pair:
        return pipe(**call)
    check_settings(pipe, call)

    def taken_by(stage: Callable) -> dict[str, object]:
        return {name: call[name] for name in inspect.signature(stage).parameters if name in call}

    pair = pipe.prepare(**taken_by(pipe.prepare))
    pipe.save_pair(pair, args.save_pair)
    return pipe.render(pair, **taken_by(pipe.render))
