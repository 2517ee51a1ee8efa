# SPDX-License-Identifier: Apache-2.0
"""The training of a ControlNet on drawn scenes and their true poses; `dreammover train-controlnet` runs it.

The ControlNet begins as a copy of a checkpoint's UNet, which itself stays as it is, and learns to bring the drawn pose
of a scene into its noise prediction. A training that was stopped or killed goes on where it was. The output folder
holds:

    controlnet.pt       everything that the training needs to go on, and the best weights so far
    controlnet.jsonl    one line for each evaluation, on scenes that are never trained on
    controlnet.png      curves of all evaluations
    sheets/             frames made at every evaluation, with what they are to be like
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from diffusers import ControlNetModel, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn

from ..ddim import recompose
from ..storage import fingerprint
from . import validation
from .latents import tokenized
from .models import build_scheduler, edit_json, initialised
from .recipes import Plan, drawn_moments, from_bytes, seed_of, to_bytes
from .skeletons import pose_pictures
from .stages import DROPPED, fast_on_cpu, generator_of, noise_error, noise_loss
from .trainer import Stage, Trainer, load_weights, read_state
from .world import World

# Channels of the network that shrinks poses to the latent grid, in diffusers' own ControlNet.
CHANNELS = (16, 32, 96, 256)
STEPS, DEPTH = 25, 15  # of the steps of an evaluation's sampling the last 15 are taken, from 60 % of the noise


@dataclass(frozen=True)
class ControlRecipe:
    """Everything that decides the training of a ControlNet, apart from the checkpoint that it is trained beside."""

    plan: Plan  # how it is trained
    pool: int  # images with poses that are drawn at once, a multiple of 256
    pool_steps: int  # training steps after which the pool is replaced
    held_out: int  # scenes that every evaluation measures on
    save_seconds: float  # longest time between two writings of the training's state
    second_sprite: float = field(default=0.1, kw_only=True)  # probability of a second sprite in a scene
    seed: int = field(default=0, kw_only=True)  # decides weights, images and noise


CONTROL_PRESETS = {
    # Takes seconds, for tests.
    "quick": ControlRecipe(Plan(4, 4, 2e-3, 1e-3, 0.6, 0.7, 2), 256, 4, 2, 0),
    # Takes half an hour on one core.
    "cpu": ControlRecipe(Plan(1_500, 16, 2e-3, 1e-3, 0.6, 0.996, 250), 512, 100, 16, 120),
}


class ControlStage(Stage):
    """The ControlNet's training, as `Trainer` takes it.

    Args:
        recipe: how to train.
        model: folder of the checkpoint whose UNet the ControlNet is for, in diffusers' layout.
        sheets: folder for the pictures of evaluations.
        device: the device to train on.
    """

    name = "controlnet"
    rule = "lowest noise error (mean of eps_mse_*) on held-out scenes"

    def __init__(self, recipe: ControlRecipe, model: Path, sheets: Path, device: torch.device):
        self.recipe, self.plan, self.sheets, self.device = recipe, recipe.plan, sheets, device
        pipeline = StableDiffusionPipeline.from_pretrained(model, safety_checker=None, feature_extractor=None)
        self.tokenizer, networks = pipeline.tokenizer, (pipeline.vae, pipeline.unet, pipeline.text_encoder)
        self.vae, self.unet, self.text_encoder = (network.to(device).requires_grad_(False) for network in networks)
        if device.type == "cpu":
            self.unet.set_attn_processor(fast_on_cpu(self.unet))
        self.alphas = build_scheduler().alphas_cumprod.to(device)
        self.no_prompt = tokenized(self.tokenizer, [""]).to(device)
        cell = 2 ** (len(self.vae.config.block_out_channels) - 1)
        self.world = World(size=cell * self.unet.config.sample_size, second_sprite=recipe.second_sprite)
        self.pool, self.pool_number = None, None
        self._draw_held_out()

    def identity(self) -> dict:
        """What decides the training: the recipe without its number of steps, and the checkpoint."""
        fixed = asdict(replace(self.recipe, plan=replace(self.plan, steps=0)))
        parts = {"vae": self.vae, "unet": self.unet, "text_encoder": self.text_encoder}
        return fixed | {"checkpoint": fingerprint(parts)}

    def build(self) -> nn.ModuleDict:
        """The untrained ControlNet, which changes nothing yet."""
        channels = CHANNELS[: len(self.vae.config.block_out_channels)]

        def copied() -> ControlNetModel:
            return ControlNetModel.from_unet(self.unet, conditioning_embedding_out_channels=channels)

        controlnet = initialised(copied, seed_of(self.recipe.seed, "controlnet")).requires_grad_(True)
        if self.device.type == "cpu":
            controlnet.set_attn_processor(fast_on_cpu(controlnet))
        return nn.ModuleDict({"controlnet": controlnet})

    def loss(self, model: nn.ModuleDict, step: int) -> Tensor:
        """Squared error of the noise that the UNet predicts with the poses, weighted as in the UNet's own training."""
        latents, tokens, poses = self._pool(step)
        generator, batch = generator_of(self.device, self.recipe.seed, "controlnet", step), self.plan.batch
        at = {"generator": generator, "device": self.device}
        chosen = torch.randint(len(latents), (batch,), **at)
        dropped = torch.rand(batch, 1, **at) < DROPPED
        embeds = self._embedded(torch.where(dropped, self.no_prompt, tokens[chosen]))
        predict = with_poses(self.unet, model["controlnet"], embeds, poses[chosen].float() / 255)
        return noise_loss(predict, latents[chosen], self.alphas, generator)

    @torch.no_grad()
    def measure(self, model: nn.ModuleDict, step: int) -> dict[str, float]:
        """Figures of an averaged model beside those of the UNet alone, "plain_…"; also writes a sheet of frames.

        The figures are the error of the predicted noise of held-out middle frames, and the PSNR, where a sprite is or
        was, of middle frames that are made from the mean of both ends, noised to 60 % of the steps.
        """
        predict = with_poses(self.unet, model["controlnet"], self.embeds, self.poses)
        figures = validation.noise_errors(predict, self.middle_latents, self.alphas)
        made = self._made(predict)
        figures["middle_psnr"] = validation.psnr(made, self.middle, self.touched)
        self.sheets.mkdir(exist_ok=True)
        rows = [self.middle / 2 + 0.5, self.poses, self.plain_made / 2 + 0.5, made / 2 + 0.5]
        validation.sheet_of(*rows).save(self.sheets / f"{step:06d}.png")
        return figures | self.plain

    @staticmethod
    def better(row: dict, kept: dict | None, history: list[dict]) -> bool:
        """Whether a model has at most the noise error of the one kept so far."""
        return kept is None or noise_error(row) <= noise_error(kept)

    @torch.no_grad()
    def _draw_held_out(self) -> None:
        """Draw the scenes that every evaluation measures on, and measure the UNet without a ControlNet."""
        scenes = self.world.sample(self.recipe.held_out, validation.HELD_OUT, device=self.device)
        first, self.middle, last = (scenes.frame(time) * 2 - 1 for time in (0.0, 0.5, 1.0))
        self.touched = scenes.foreground(0.0) | scenes.foreground(0.5) | scenes.foreground(1.0)
        self.poses = pose_pictures(scenes, 0.5)
        captions = [caption for caption, _ in scenes.captions]
        self.embeds = self._embedded(tokenized(self.tokenizer, captions).to(self.device))
        self.middle_latents = validation.encode(self.vae, self.middle)
        self.blended = (validation.encode(self.vae, first) + validation.encode(self.vae, last)) / 2

        def predict(noisy: Tensor, timesteps: Tensor) -> Tensor:
            return self.unet(noisy, timesteps, self.embeds).sample

        errors = validation.noise_errors(predict, self.middle_latents, self.alphas)
        self.plain_made = self._made(predict)
        errors["middle_psnr"] = validation.psnr(self.plain_made, self.middle, self.touched)
        self.plain = {f"plain_{name}": value for name, value in errors.items()}

    def _made(self, predict: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Frames (B, 3, H, W), about [-1, 1], made from the noised mean of the held-out ends.

        Args:
            predict: a function that predicts the noise in noisy latents at timesteps (B,).
        """
        scheduler = build_scheduler()
        scheduler.set_timesteps(STEPS)
        timesteps = scheduler.timesteps[-DEPTH:].to(self.device)
        count = len(self.blended)
        alphas = self.alphas[timesteps[:1].expand(count)]
        latents = recompose(self.blended, validation.noise_like(self.blended), alphas)
        for timestep in timesteps:
            noise = predict(latents, timestep.expand(count))
            latents = scheduler.step(noise, timestep, latents).prev_sample
        return self.vae.decode(latents / self.vae.config.scaling_factor).sample

    def _pool(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Scaled latents, tokens of the captions, and drawn poses (uint8) that the images of a step are taken from."""
        recipe = self.recipe
        if step // recipe.pool_steps != self.pool_number:
            self.pool_number = step // recipe.pool_steps
            latents, captions, poses = [], [], []
            seed = seed_of(recipe.seed, "controlnet images", self.pool_number)
            with torch.autocast(self.device.type, enabled=False):  # the training steps that ask are autocast
                for scenes, time in drawn_moments(self.world, recipe.pool, seed, self.device):
                    images = from_bytes(to_bytes(scenes.frame(time)))
                    latents.append(validation.encode(self.vae, images))
                    poses.append(to_bytes(pose_pictures(scenes, time)))
                    captions += [caption for caption, _ in scenes.captions]
            tokens = tokenized(self.tokenizer, captions).to(self.device)
            self.pool = torch.cat(latents), tokens, torch.cat(poses)
        return self.pool

    @torch.no_grad()
    def _embedded(self, tokens: Tensor) -> Tensor:
        """The embeddings (B, L, D) of tokens (B, L)."""
        return self.text_encoder(tokens.long())[0]


def with_poses(
    unet: UNet2DConditionModel, controlnet: ControlNetModel, embeds: Tensor, poses: Tensor
) -> Callable[[Tensor, Tensor], Tensor]:
    """A function that predicts the noise in noisy latents (B, C, h, w) at timesteps (B,), led by drawn poses.

    Args:
        unet: the noise predictor.
        controlnet: the ControlNet.
        embeds: embeddings of the captions, (B, L, D).
        poses: drawn poses, (B, 3, H, W) in [0, 1].
    """

    def predict(noisy: Tensor, timesteps: Tensor) -> Tensor:
        down, middle = controlnet(noisy, timesteps, embeds, poses, return_dict=False)
        return unet(
            noisy, timesteps, embeds, down_block_additional_residuals=down, mid_block_additional_residual=middle
        ).sample

    return predict


def train_controlnet(stage: ControlStage, folder: Path, deadline: float) -> bool:
    """Train a ControlNet to the end of its recipe, or until the time is up.

    Args:
        stage: what to train, how and on what.
        folder: the output folder; what it holds of this training is not done again.
        deadline: the reading of `time.monotonic` at which to save and stop.

    Returns:
        Whether the training is finished; otherwise the time was up.

    Raises:
        ValueError: the folder holds the training of another recipe or checkpoint.
    """
    state = read_state(folder, stage.name)
    return Trainer(stage, stage.identity(), folder, stage.device, state).run(deadline)


def export_controlnet(stage: ControlStage, folder: Path, target: Path) -> bool:
    """Write the best ControlNet so far in float16, as `ControlNetModel.from_pretrained` loads it.

    Args:
        stage: the stage of the training.
        folder: the output folder of the training.
        target: the folder to write to, which is made if it is missing.

    Returns:
        Whether there was one; otherwise the training was not evaluated yet.
    """
    state = read_state(folder, stage.name)
    if state is None or state["best"]["weights"] is None:
        return False
    model = stage.build()
    load_weights(model, state["best"]["weights"])
    model["controlnet"].half().save_pretrained(target)
    edit_json(target / "config.json", {})
    (target / "diffusion_pytorch_model.safetensors").chmod(0o644)
    return True
