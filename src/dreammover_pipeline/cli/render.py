# SPDX-License-Identifier: Apache-2.0
"""The command `dreammover render`: a video of a pair that was prepared and kept in a file.

torch and diffusers take seconds to import, so they are imported only after the arguments have been parsed.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from ..inputs import check_input_file
from .loading import add_component_options, add_model_options, check_model, pipeline_class
from .options import add_method_options, call_arguments, seed
from .writing import add_output_options, check_output_paths, check_sources, make_video, say_if_scaled, settle_length

if TYPE_CHECKING:
    from ..pipeline import DreamMoverPipeline, DreamMoverPipelineOutput
    from ..records import PreparedPair


def add_render(commands: argparse._SubParsersAction) -> None:
    """Register the command `render`."""
    text = (
        "Make another video of a pair that dreammover interpolate --save-pair wrote, without preparing the pair again."
    )
    parser = commands.add_parser("render", help="make another video of a prepared pair", description=text)
    parser.set_defaults(run=_render)
    parser.add_argument(
        "pair", metavar="PAIR", help="The .safetensors file of the pair, prepared with the same model."
    )
    add_output_options(parser)
    parser.add_argument(
        "--seed",
        type=seed,
        default=0,
        metavar="N",
        help="Seed of the noise where --method is noise; equal seeds give equal videos (default: %(default)s).",
    )
    add_model_options(parser, default="sd15")
    add_component_options(parser)
    add_method_options(parser, rendering_only=True)


def _render(args: argparse.Namespace) -> None:
    """Make the video of a prepared pair, and write what was asked for.

    Raises:
        ValueError: An argument is not what it may be, or the file holds no pair of this model.
    """
    check_output_paths(args, [args.pair])
    settle_length(args)
    check_model(args.model, args.allow_pickle)
    check_input_file(args.pair, f"'{args.pair}'", "the file of a prepared pair")
    pipeline_class()  # this comes first, since it switches off log lines that third parties write when imported
    import torch

    from ..storage import read_pair

    call = call_arguments(args)
    check_sources(args, call)
    read_pair(args.pair, "cpu")  # refuses a file that holds no pair before a model is loaded

    def make(pipe: DreamMoverPipeline) -> tuple[PreparedPair, DreamMoverPipelineOutput]:
        pair = pipe.load_pair(args.pair)
        say_if_scaled(args, pair.canvas)
        generator = torch.Generator("cpu").manual_seed(args.seed)
        return pair, pipe.render(pair, **call, include_inputs=True, output_type="lazy", generator=generator)

    make_video(args, call, make)
