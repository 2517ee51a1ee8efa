# SPDX-License-Identifier: Apache-2.0
"""The commands `dreammover train`, `dreammover train-controlnet` and `dreammover draw-examples`.

torch and diffusers take seconds to import, so that happens after the arguments parsed.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..media.files import make_folder
from ..tiny import CHECKPOINT
from .claims import claimed
from .loading import choose_device, pipeline_class
from .options import folder_path

if TYPE_CHECKING:
    import torch

    from ..tiny.recipes import Recipe


def add_train(commands: argparse._SubParsersAction) -> None:
    """Register the three commands."""
    text = "Train the embedded checkpoint from nothing; the same command again goes on where the last one stopped."
    parser = commands.add_parser("train", help="train the embedded checkpoint", description=text)
    parser.set_defaults(run=_train)
    add = parser.add_argument
    add("--out", type=folder_path, metavar="FOLDER", required=True, help="states, logs and samples are kept there")
    add("--preset", default="cpu", metavar="NAME", help="sizes and budgets: quick, cpu or gpu (default: %(default)s)")
    add("--seed", type=int, default=0, metavar="N", help="decides weights, images and noise (default: %(default)s)")
    add("--minutes", type=float, default=float("inf"), metavar="N", help="save and stop after so long; default: never")
    add("--vae-steps", type=int, metavar="N", help="training steps of the autoencoder; default: the preset's")
    add("--unet-steps", type=int, metavar="N", help="training steps of the UNet; default: the preset's")
    _add_machine(parser)
    add(
        "--export",
        type=folder_path,
        metavar="FOLDER",
        help="at the end, write the best models so far in diffusers' layout",
    )

    text = "Train a ControlNet on drawn poses; the same command again goes on where the last one stopped."
    parser = commands.add_parser("train-controlnet", help="train a ControlNet on drawn poses", description=text)
    parser.set_defaults(run=_train_controlnet)
    add = parser.add_argument
    add("--out", type=folder_path, metavar="FOLDER", required=True, help="states, logs and sheets are kept there")
    add(
        "--model",
        type=folder_path,
        default=CHECKPOINT,
        metavar="FOLDER",
        help="checkpoint that the ControlNet is for; default: the one that comes with the program",
    )
    add("--preset", default="cpu", metavar="NAME", help="budgets: quick or cpu (default: %(default)s)")
    add("--seed", type=int, default=0, metavar="N", help="decides weights, images and noise (default: %(default)s)")
    add("--steps", type=int, metavar="N", help="training steps; default: the preset's")
    add("--minutes", type=float, default=float("inf"), metavar="N", help="save and stop after so long; default: never")
    _add_machine(parser)
    add(
        "--export",
        type=folder_path,
        metavar="FOLDER",
        help="at the end, write the best ControlNet so far for diffusers",
    )

    text = (
        "Write the example pairs of the repository's folder examples: drawn ones with their true in-between frames, "
        "and photos."
    )
    parser = commands.add_parser("draw-examples", help="write the example pairs", description=text)
    parser.set_defaults(run=_draw_examples)
    parser.add_argument("folder", type=folder_path, metavar="FOLDER", help="each pair becomes a folder in it")


def _add_machine(parser: argparse.ArgumentParser) -> None:
    """Add the options that say what to train on."""
    add = parser.add_argument
    add("--device", metavar="NAME", help="where to train; default: cuda if it is there, else cpu")
    add("--threads", type=int, metavar="N", help="number of CPU threads; default: what torch takes")


def _train(args: argparse.Namespace) -> None:
    pipeline_class()  # first, since it hushes third parties before they are imported
    from ..tiny.train import export, train

    recipe = _recipe(args)
    device = _prepare_device(args)
    deadline = _deadline(args)
    _make_folder(args)
    with claimed(args.out, "training"):
        if not train(recipe, args.out, device, deadline):
            print("The time is up and all is saved; the same command goes on from here.")
        if args.export and not export(recipe, args.out, args.export, device):
            print("Nothing to export yet: the UNet was not evaluated.")


def _deadline(args: argparse.Namespace) -> float:
    """The reading of `time.monotonic` at which to save and stop."""
    if not args.minutes >= 0:
        raise ValueError(f"--minutes must be at least 0, not {args.minutes}")
    return time.monotonic() + 60 * args.minutes


def _make_folder(args: argparse.Namespace) -> None:
    """Make the folder of a training, unless its models could not be exported to where they are to be.

    Raises:
        ValueError: The folder cannot be made, or what is in the place to export to may not be meant to be replaced.
    """
    place = args.export
    if place is not None and place.exists():
        if not place.is_dir():
            raise ValueError(f"--export: '{place}' is no folder; name a new one")
        if not any((place / name).is_file() for name in ("card.json", "config.json")) and any(place.iterdir()):
            raise ValueError(f"--export: the folder '{place}' holds files, but no exported model; name a new one")
    make_folder(args.out, "--out: the folder")


def _recipe(args: argparse.Namespace) -> Recipe:
    """The recipe of the preset, with the changes that were typed."""
    from ..inputs import check_choice, check_integer
    from ..tiny.recipes import PRESETS

    check_choice("--preset", args.preset, tuple(PRESETS))
    recipe = replace(PRESETS[args.preset], seed=args.seed)
    for name, steps in (("vae", args.vae_steps), ("unet", args.unet_steps)):
        if steps is not None:
            check_integer(f"--{name}-steps", steps, 1)
            recipe = replace(recipe, **{name: replace(getattr(recipe, name), steps=steps)})
    return recipe


def _train_controlnet(args: argparse.Namespace) -> None:
    pipeline_class()  # first, since it hushes third parties before they are imported
    from ..inputs import check_choice, check_integer
    from ..tiny.controlnet import CONTROL_PRESETS, ControlStage, export_controlnet, train_controlnet

    check_choice("--preset", args.preset, tuple(CONTROL_PRESETS))
    recipe = replace(CONTROL_PRESETS[args.preset], seed=args.seed)
    if args.steps is not None:
        check_integer("--steps", args.steps, 1)
        recipe = replace(recipe, plan=replace(recipe.plan, steps=args.steps))
    if not (args.model / "model_index.json").is_file():  # otherwise diffusers would look for it on the Hub
        raise ValueError(f"`--model` must be the folder of a checkpoint in diffusers' layout, not '{args.model}'")
    device = _prepare_device(args)
    deadline = _deadline(args)
    _make_folder(args)
    with claimed(args.out, "training"):
        stage = ControlStage(recipe, args.model, args.out / "sheets", device)
        if not train_controlnet(stage, args.out, deadline):
            print("The time is up and all is saved; the same command goes on from here.")
        if args.export and not export_controlnet(stage, args.out, args.export):
            print("Nothing to export yet: the ControlNet was not evaluated.")


def _prepare_device(args: argparse.Namespace) -> torch.device:
    """The device to train on, with torch set up to be fast there."""
    import torch

    from ..inputs import check_integer

    device = torch.device(choose_device(args.device or ("cuda" if torch.cuda.is_available() else "cpu")))
    if args.threads is not None:
        check_integer("--threads", args.threads, 1)
        torch.set_num_threads(args.threads)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True
    return device


def _draw_examples(args: argparse.Namespace) -> None:
    from ..evaluation.examples import write_examples

    with tempfile.TemporaryDirectory() as drawn:
        write_examples(Path(drawn))
        files = {path.relative_to(drawn): path.read_bytes() for path in Path(drawn).rglob("*") if path.is_file()}
    for name, content in files.items():
        there = args.folder / name
        if there.exists() and (not there.is_file() or there.read_bytes() != content):
            raise ValueError(f"'{there}' exists and is another picture or text; choose another folder, or remove it")
    for name, content in files.items():
        make_folder((args.folder / name).parent)
        (args.folder / name).write_bytes(content)
