# SPDX-License-Identifier: Apache-2.0
"""The training of the embedded checkpoint from nothing, and its export; `dreammover train` runs it.

Three stages follow one another: the autoencoder is trained, it encodes all training images into latents, and the UNet
is trained with its text encoder. A training that was stopped or killed goes on where it was, and one in pieces ends
with the weights of one without a break. The output folder holds:

    vae.pt, unet.pt         everything that a network's training needs to go on, and the best weights so far
    vae.jsonl, unet.jsonl   one line for each evaluation, on scenes that are never trained on
    vae.png, unet.png       curves of all evaluations
    sheets/                 prompted samples of every evaluation, each below the image whose caption was the prompt
    latents/                latents of all training images; what is missing is made again, so copies can leave it out
"""

from __future__ import annotations

import json
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL
from torch import nn

from .latents import LatentShards
from .models import WORDS, build_text_encoder, build_tokenizer, build_unet, build_vae, save_checkpoint
from .recipes import Plan, Recipe
from .stages import UnetStage, VaeStage
from .trainer import Trainer, check_identity, load_weights, read_state

STAGES = (VaeStage, UnetStage)


def identity_of(recipe: Recipe) -> dict:
    """The part of a recipe that may not change once training has begun: all but the numbers of training steps."""
    fixed = asdict(recipe)
    for stage in STAGES:
        del fixed[stage.name]["steps"]
    return fixed


def train(recipe: Recipe, folder: Path, device: torch.device, deadline: float) -> bool:
    """Train both networks to the end of their recipe, or until the time is up.

    Args:
        recipe: what to train on what, and for how long.
        folder: the output folder; what it holds of this training is not done again.
        device: the device to train on.
        deadline: the reading of `time.monotonic` at which to save and stop.

    Returns:
        Whether the training is finished; otherwise the time was up.

    Raises:
        ValueError: the folder holds the training of another recipe, or files that are no states, or a UNet that does
            not match the autoencoder as it is to be. All of this is found before any training.
    """
    identity = identity_of(recipe)
    states = {stage.name: read_state(folder, stage.name) for stage in STAGES}
    _check_states(recipe, folder, identity, states)
    if not _is_finished(states["vae"], recipe.vae):
        trainer = Trainer(VaeStage(recipe, device), identity, folder, device, states.pop("vae"))
        if not trainer.run(deadline):
            return False
        states["vae"] = trainer.state()
    if _is_finished(states["unet"], recipe.unet):
        return True
    identity |= {"vae_step": states["vae"]["step"]}
    # The state goes with this line, since it takes several times the memory of the network.
    vae = best_vae(recipe, states.pop("vae")).to(device)
    shards = LatentShards(recipe, folder / "latents", vae, identity["vae_step"])
    if not shards.make(deadline):
        return False
    stage = UnetStage(recipe, shards, folder / "sheets", device)
    return Trainer(stage, identity, folder, device, states.pop("unet")).run(deadline)


def best_vae(recipe: Recipe, state: dict) -> AutoencoderKL:
    """The best autoencoder so far, for inference.

    Args:
        recipe: the recipe that it is trained by.
        state: the state of its stage.
    """
    vae = build_vae(recipe.sizes, recipe.world.size)
    load_weights(nn.ModuleDict({"vae": vae}), state["best"]["weights"])
    return vae.eval().requires_grad_(False)


def _check_states(recipe: Recipe, folder: Path, identity: dict, states: dict[str, dict | None]) -> None:
    """Raise ValueError if the states of a folder, by their stages' names, cannot be gone on with, as `train` says."""
    vae, unet = (states[stage.name] for stage in STAGES)
    if vae is not None:
        check_identity(folder / "vae.pt", vae["identity"], identity)
    if unet is not None:
        check_identity(folder / "unet.pt", unet["identity"], identity | {"vae_step": unet["identity"].get("vae_step")})
        before, after = unet["identity"]["vae_step"], max(recipe.vae.steps, 0 if vae is None else vae["step"])
        if before != after:
            raise ValueError(
                f"the UNet in {folder} was trained on another autoencoder, of {before} steps instead of {after}; "
                "repeat the --vae-steps of before, or delete unet.pt and train it anew"
            )


def _is_finished(state: dict | None, plan: Plan) -> bool:
    """Whether the state of a stage is that of its end."""
    return state is not None and state["step"] >= plan.steps


def export(recipe: Recipe, folder: Path, target: Path, device: torch.device) -> bool:
    """Write the best models so far as a float16 checkpoint, and `card.json`, which says how they were trained.

    Args:
        recipe: the recipe of the training.
        folder: the output folder of the training.
        target: the folder of the checkpoint, which is made if it is missing.
        device: the device that was trained on, for the card.

    Returns:
        Whether there were any; otherwise the UNet was not evaluated yet.

    Raises:
        ValueError: the autoencoder is not the one whose latents the UNet has learnt.
    """
    states = {stage.name: read_state(folder, stage.name) for stage in STAGES}
    unet = states["unet"]
    if unet is None or unet["best"]["weights"] is None:
        return False
    if unet["identity"]["vae_step"] != states["vae"]["step"]:
        raise ValueError(f"the UNet in {folder} was trained on another autoencoder; delete unet.pt and train it anew")
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
    card = _card(recipe, states, parameters, device)
    (target / "card.json").write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
    return True


def _card(recipe: Recipe, states: dict[str, dict], parameters: dict[str, int], device: torch.device) -> dict:
    """How a checkpoint was trained.

    Args:
        recipe: the recipe of the training.
        states: the saved state of each stage, by the stage's name.
        parameters: the number of parameters of each model, by the model's name.
        device: the device that was trained on.
    """
    return {
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
