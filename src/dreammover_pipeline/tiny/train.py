# SPDX-License-Identifier: Apache-2.0
"""Train the embedded checkpoint from nothing: `python -m dreammover_pipeline.tiny.train --out DIR --export DIR`.

Three stages, one after the other: the autoencoder, its latents of all training images, then the UNet with its text
encoder. The same command again goes on where the last one stopped or was killed, and a run in pieces ends with the
weights of a run in one. In the output folder:

    vae.pt, unet.pt         everything a stage needs to go on, and the best weights so far
    vae.jsonl, unet.jsonl   one line an evaluation, on scenes nobody trains on
    vae.png, unet.png       the same as curves
    sheets/                 prompted samples of every evaluation, below the images whose captions they were asked for
    latents/                made again where they are missing; leave them behind when copying a run
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path

import diffusers
import torch
import transformers
from torch import nn

from .latents import LatentShards
from .models import WORDS, build_text_encoder, build_tokenizer, build_unet, build_vae, save_checkpoint
from .recipes import PRESETS, Recipe
from .stages import UnetStage, VaeStage
from .trainer import Trainer, load_weights, read_state

STAGES = (VaeStage, UnetStage)
SUMMARY = "Train the embedded checkpoint from nothing; the same command again goes on where the last one stopped."


def identity_of(recipe: Recipe) -> dict:
    """What of a recipe may not change once training has begun: all but the numbers of steps, which may be extended."""
    fixed = asdict(recipe)
    for stage in STAGES:
        del fixed[stage.name]["steps"]
    return fixed


def best_vae(recipe: Recipe, folder: Path):
    """The autoencoder kept so far."""
    vae = build_vae(recipe.sizes, recipe.world.size)
    load_weights(nn.ModuleDict({"vae": vae}), read_state(folder, "vae")["best"]["weights"])
    return vae.eval().requires_grad_(False)


def train(recipe: Recipe, folder: Path, device: torch.device, deadline: float) -> bool:
    """Run all stages that are not finished.

    Args:
        recipe: what to train.
        folder: of the states.
        device: to train on.
        deadline: on the clock of `time.monotonic`.

    Returns:
        Whether all are finished now; if not, the time was up.

    Raises:
        ValueError: the states do not belong to the recipe, or not to each other.
    """
    identity = identity_of(recipe)
    if not _is_finished(folder, recipe, "vae"):
        trainer = Trainer(VaeStage(recipe, device), identity, folder, device)
        if not trainer.run(deadline):
            return False
    check_autoencoder(folder)
    if _is_finished(folder, recipe, "unet"):
        return True
    vae_step = read_state(folder, "vae")["step"]
    shards = LatentShards(recipe, folder / "latents", best_vae(recipe, folder).to(device), vae_step)
    if not shards.make(deadline):
        return False
    stage = UnetStage(recipe, shards, folder / "sheets", device)
    return Trainer(stage, identity | {"vae_step": vae_step}, folder, device).run(deadline)


def check_autoencoder(folder: Path) -> None:
    """Refuse, by a ValueError, a UNet whose autoencoder was trained on after it had begun to learn the latents."""
    vae, unet = (read_state(folder, stage.name) for stage in STAGES)
    if unet is not None and unet["identity"]["vae_step"] != vae["step"]:
        raise ValueError(f"the UNet in {folder} was trained on another autoencoder; delete unet.pt and train it anew")


def _is_finished(folder: Path, recipe: Recipe, name: str) -> bool:
    state = read_state(folder, name)
    return state is not None and state["step"] >= getattr(recipe, name).steps


def export(recipe: Recipe, folder: Path, target: Path, device: torch.device) -> None:
    """Write the best models so far as a float16 checkpoint, and card.json with all there is to know of their making.

    Args:
        recipe: what was trained.
        folder: of the states.
        target: folder of the checkpoint.
        device: trained on, for the card.

    Raises:
        ValueError: the autoencoder was trained on after the UNet had begun to learn its latents.
    """
    check_autoencoder(folder)
    states = {stage.name: read_state(folder, stage.name) for stage in STAGES}
    tokenizer = build_tokenizer(WORDS, recipe.sizes.tokens)
    models = nn.ModuleDict(
        {
            "vae": build_vae(recipe.sizes, recipe.world.size),
            "unet": build_unet(recipe.sizes, recipe.world.size),
            "text_encoder": build_text_encoder(recipe.sizes, tokenizer),
        }
    )
    load_weights(models, states["vae"]["best"]["weights"] | states["unet"]["best"]["weights"])
    parameters = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
    save_checkpoint(target, **models, tokenizer=tokenizer)
    card = {
        "recipe": asdict(recipe),
        "parameters": parameters,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "versions": {module.__name__: module.__version__ for module in (torch, diffusers, transformers)},
        "date": datetime.now(UTC).date().isoformat(),
        "stages": {
            stage.name: {
                "steps": states[stage.name]["step"],
                "seconds": round(states[stage.name]["seconds"]),
                "kept_by": stage.rule,
                "kept": states[stage.name]["best"]["row"],
                "evaluations": states[stage.name]["history"],
            }
            for stage in STAGES
        },
    }
    (target / "card.json").write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")


def positive(text: str) -> int:
    """A number of at least 1, from the command line."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {number}")
    return number


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m dreammover_pipeline.tiny.train", description=SUMMARY)
    parser.add_argument("--out", type=Path, required=True, help="folder of states, logs and sheets; go on from there")
    parser.add_argument("--preset", choices=PRESETS, default="cpu", help="sizes and budgets (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="decides weights, images and noise")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="save and stop after so long")
    parser.add_argument("--vae-steps", type=positive, help="instead of the preset's")
    parser.add_argument("--unet-steps", type=positive, help="instead of the preset's")
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=positive, help="CPU threads (default: what torch takes)")
    parser.add_argument("--export", type=Path, help="in the end write the best so far there, in diffusers' layout")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    options = parse_arguments(arguments)
    deadline = time.monotonic() + 60 * options.minutes
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True
    recipe = replace(PRESETS[options.preset], seed=options.seed)
    for name in ("vae", "unet"):
        if steps := getattr(options, f"{name}_steps"):
            recipe = replace(recipe, **{name: replace(getattr(recipe, name), steps=steps)})
    finished = train(recipe, options.out, options.device, deadline)
    if not finished:
        print("The time is up and all is saved; the same command goes on from here.")
    if options.export:
        state = read_state(options.out, "unet")
        if state is None or state["best"]["weights"] is None:
            print("Nothing to export yet: the UNet was not evaluated.")
        else:
            export(recipe, options.out, options.export, options.device)


if __name__ == "__main__":
    main()
