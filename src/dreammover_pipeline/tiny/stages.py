# SPDX-License-Identifier: Apache-2.0
"""The two stages of the training: how each network is built, what it learns from, and which version is kept.

Both stages have the same attributes and methods, which `Trainer` uses: `name`, `plan`, `rule` (which version is kept,
in words), `build`, `loss`, `finish`, `measure` and `better`.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch import Tensor, nn

from ..ddim import recompose
from . import validation
from .latents import LatentShards, tokenized
from .models import (
    build_scheduler,
    build_text_encoder,
    build_unet,
    build_vae,
    initialised,
    normalise_latents,
)
from .recipes import Recipe, draw_images, from_bytes, seed_of
from .trainer import Stage

FULL_FRAMES = 0.2  # share of the VAE's steps, at the end, that see whole images
POOLED = 0.2  # share of the VAE's steps that decode latents pooled to half their size
WARPED = 0.3  # share of the VAE's steps that decode latents moved by an affine map
LATENT_NOISE = 0.05  # standard deviation of the noise on latents that the decoder must bear
KL, GRADIENT = 1.2e-3, 0.4  # weights of two terms in the VAE's loss
SNR = 5.0  # the limit of min-SNR weighting
DROPPED = 0.12  # share of the prompts that are left out, which classifier-free guidance needs
TOLERANCE = 0.1  # how far above the lowest noise error that of a kept UNet may be, as a share of it


def generator_of(device: torch.device, *parts: str | int) -> torch.Generator:
    """A generator on a device for one random purpose, which `parts` name."""
    return torch.Generator(device).manual_seed(seed_of(*parts))


class VaeStage(Stage):
    """The autoencoder's stage: it learns from crops of images that are drawn during the training.

    The method warps latents, so warped latents should decode to warped images. Some steps therefore move the latents
    by a random affine map, decode them, and compare with the image moved by the same map.
    """

    name = "vae"
    rule = "highest held-out PSNR"

    def __init__(self, recipe: Recipe, device: torch.device):
        self.recipe, self.device, self.plan = recipe, device, recipe.vae
        self.pairs = validation.held_out_pairs(recipe.world, "same", recipe.held_out, device)
        self.pool, self.pool_number = None, None

    def build(self) -> nn.ModuleDict:
        """The untrained autoencoder."""
        recipe = self.recipe
        return nn.ModuleDict(
            {"vae": initialised(lambda: build_vae(recipe.sizes, recipe.world.size), seed_of(recipe.seed, "vae"))}
        )

    def loss(self, model: nn.ModuleDict, step: int) -> Tensor:
        """L1 + 2·MSE + 0.4·gradients of the reconstructions + 0.0012·KL of the latents, for one step."""
        choices = random.Random(seed_of(self.recipe.seed, "vae choices", step))
        generator = generator_of(self.device, self.recipe.seed, "vae noise", step)
        images = self._crops(step, choices)
        posterior = model["vae"].encode(images).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator, device=self.device)
        latents = posterior.mean + (posterior.var + LATENT_NOISE**2).sqrt() * noise
        choice = choices.random()
        if choice < POOLED:
            latents, images = F.avg_pool2d(latents, 2), F.avg_pool2d(images, 2)
        elif choice < POOLED + WARPED:
            transform = _random_affine(choices).to(self.device)
            latents, images = _warped(latents, transform), _warped(images, transform)
        decoded = model["vae"].decode(latents).sample.float()
        return _reconstruction_loss(decoded, images) + KL * _kl(posterior)

    def _crops(self, step: int, choices: random.Random) -> Tensor:
        """The images of one step, (B, 3, crop, crop) in [-1, 1].

        Late steps see whole images instead of crops, and fewer of them, for about as many pixels.
        """
        recipe, size = self.recipe, self.recipe.world.size
        if step // recipe.pool_steps != self.pool_number:
            self.pool_number = step // recipe.pool_steps
            seed = seed_of(recipe.seed, "vae images", self.pool_number)
            self.pool, _ = draw_images(recipe.world, recipe.pool, seed, self.device)
        whole = step >= (1 - FULL_FRAMES) * self.plan.steps
        crop = size if whole else recipe.crop
        batch = max(1, self.plan.batch * recipe.crop**2 // size**2) if whole else self.plan.batch
        crops = []
        for _ in range(batch):
            i, y, x = choices.randrange(recipe.pool), choices.randint(0, size - crop), choices.randint(0, size - crop)
            crops.append(self.pool[i, :, y : y + crop, x : x + crop])
        return from_bytes(torch.stack(crops))

    def finish(self, model: nn.ModuleDict) -> nn.ModuleDict:
        """An averaged model with its latents brought to unit variance."""
        images, _ = draw_images(self.recipe.world, 256, seed_of("latent statistics"), self.device)
        normalise_latents(model["vae"], from_bytes(images))
        return model

    def measure(self, model: nn.ModuleDict, step: int) -> dict[str, float]:
        """Figures of an averaged model that `finish` has treated."""
        return validation.measure_vae(model["vae"], self.pairs)

    @staticmethod
    def better(row: dict, kept: dict | None, history: list[dict]) -> bool:
        """Whether a model has at least the PSNR of the one kept so far."""
        return kept is None or row["psnr"] >= kept["psnr"]


def _random_affine(choices: random.Random) -> Tensor:
    """A random affine map, (1, 2, 3): at most 60° of rotation, a scale of 1.3 and a shift by a quarter of the side."""
    angle, scale = choices.uniform(-1, 1) * math.pi / 3, 1.3 ** choices.uniform(-1, 1)
    cos, sin = scale * math.cos(angle), scale * math.sin(angle)
    x, y = choices.uniform(-0.5, 0.5), choices.uniform(-0.5, 0.5)
    return torch.tensor([[[cos, -sin, x], [sin, cos, y]]])


def _warped(x: Tensor, transform: Tensor) -> Tensor:
    """Images or latents (B, C, H, W), looked up at where an affine map sends each point."""
    grid = F.affine_grid(transform.expand(len(x), -1, -1), list(x.shape), align_corners=False)
    return F.grid_sample(x.float(), grid, padding_mode="reflection", align_corners=False)


def _reconstruction_loss(decoded: Tensor, images: Tensor) -> Tensor:
    """L1 + 2·MSE + 0.4·gradients of the difference between two batches of images."""
    error = decoded - images
    gradients = sum((error.diff(dim=dim)).abs().mean() for dim in (2, 3))
    return error.abs().mean() + 2 * error.square().mean() + GRADIENT * gradients


def _kl(posterior) -> Tensor:
    """Kullback–Leibler divergence of a posterior from a standard normal distribution, as a mean over its elements."""
    mean, logvar = posterior.mean.float(), posterior.logvar.float()
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()


class UnetStage(Stage):
    """The UNet's stage: with its text encoder, it learns to predict noise on the latents of the shards."""

    name = "unet"
    rule = (
        "highest PCK@.1 of up_blocks[1] on held-out recast pairs among evaluations whose noise error (mean of "
        f"eps_mse_*) is within {TOLERANCE:.0%} of the lowest so far; the one kept gives way once it is not"
    )

    def __init__(self, recipe: Recipe, shards: LatentShards, sheets: Path, device: torch.device):
        self.recipe, self.device, self.plan = recipe, device, recipe.unet
        self.vae, self.tokenizer, self.sheets = shards.vae, shards.tokenizer, sheets
        self.latents, self.tokens = shards.load(device)
        self.no_prompt = tokenized(self.tokenizer, [""]).to(device)
        self.scheduler = build_scheduler()
        self.alphas = self.scheduler.alphas_cumprod.to(device)
        self.held_out = {}
        for difficulty in validation.DIFFICULTIES:
            pairs = validation.held_out_pairs(recipe.world, difficulty, recipe.held_out, device)
            tokens = tokenized(self.tokenizer, pairs.captions).to(device)
            self.held_out[difficulty] = pairs, validation.encode(self.vae, pairs.images.flatten(0, 1)), tokens

    def build(self) -> nn.ModuleDict:
        """The untrained UNet and text encoder."""
        sizes, pixels, seed = self.recipe.sizes, self.recipe.world.size, self.recipe.seed
        unet = initialised(lambda: build_unet(sizes, pixels), seed_of(seed, "unet"))
        if self.device.type == "cpu":
            unet.set_attn_processor(fast_on_cpu(unet))
        return nn.ModuleDict(
            {
                "unet": unet,
                "text_encoder": initialised(lambda: build_text_encoder(sizes, self.tokenizer), seed_of(seed, "text")),
            }
        )

    def loss(self, model: nn.ModuleDict, step: int) -> Tensor:
        """Squared error of the predicted noise, with min-SNR weights, at timesteps spread evenly over the batch."""
        generator, batch = generator_of(self.device, self.recipe.seed, "unet", step), self.plan.batch
        at = {"generator": generator, "device": self.device}
        chosen = torch.randint(len(self.latents), (batch,), **at)
        dropped = torch.rand(batch, 1, **at) < DROPPED
        tokens = torch.where(dropped, self.no_prompt, self.tokens[chosen])
        embeds = model["text_encoder"](tokens.long())[0]
        latents = self.latents[chosen].float()

        def predict(noisy: Tensor, timesteps: Tensor) -> Tensor:
            return model["unet"](noisy, timesteps, embeds).sample

        return noise_loss(predict, latents, self.alphas, generator)

    def measure(self, model: nn.ModuleDict, step: int) -> dict[str, float]:
        """Figures of an averaged model; also writes a sheet of its samples."""
        figures = {}
        for difficulty, (pairs, latents, tokens) in self.held_out.items():
            with torch.no_grad():
                embeds = model["text_encoder"](tokens.long())[0]
            if difficulty == "same":
                figures |= validation.measure_noise(model["unet"], latents, embeds, self.alphas)
            found = validation.measure_correspondence(model["unet"], latents, embeds, self.alphas, pairs)
            figures |= {f"{difficulty}_{name}": value for name, value in found.items()}
        parts = self.vae, model["unet"], model["text_encoder"], self.tokenizer, self.scheduler
        sheet = validation.sample_sheet(*parts, self.held_out["same"][0], self.recipe.sheet)
        self.sheets.mkdir(exist_ok=True)
        sheet.save(self.sheets / f"{step:06d}.png")
        return figures

    @staticmethod
    def better(row: dict, kept: dict | None, history: list[dict]) -> bool:
        """Whether a model matches at least as well as the one kept so far, and its noise error is near the lowest."""
        limit = (1 + TOLERANCE) * min(map(noise_error, history))
        if kept is None or noise_error(kept) > limit:
            return True
        return noise_error(row) <= limit and row["recast_up1_pck.1"] >= kept["recast_up1_pck.1"]


def noise_loss(
    predict: Callable[[Tensor, Tensor], Tensor], latents: Tensor, alphas: Tensor, generator: torch.Generator
) -> Tensor:
    """Squared error of the predicted noise, with min-SNR weights, at timesteps spread evenly over the batch.

    Args:
        predict: a function that predicts the noise in noisy latents (B, C, h, w) at timesteps (B,).
        latents: scaled latents, (B, C, h, w).
        alphas: ᾱ of every timestep, (T,).
        generator: the generator that decides timesteps and noise.
    """
    batch, at = len(latents), {"generator": generator, "device": latents.device}
    share = (torch.arange(batch, device=latents.device) + torch.rand(batch, **at)) / batch
    timesteps = (share * len(alphas)).long().clamp_max(len(alphas) - 1)
    noise = torch.randn(latents.shape, **at)
    predicted = predict(recompose(latents, noise, alphas[timesteps]), timesteps).float()
    snr = alphas[timesteps] / (1 - alphas[timesteps])
    return ((predicted - noise).square().mean((1, 2, 3)) * (SNR / snr).clamp_max(1)).mean()


def fast_on_cpu(unet: nn.Module) -> dict:
    """Attention processors that make a training step on a CPU a fifth shorter.

    They are the fused ones for self-attention on the latent grid, and the plain ones everywhere else.
    """
    fused = re.compile(r"(down_blocks\.0|up_blocks\.3)\..*attn1")
    return {name: AttnProcessor2_0() if fused.match(name) else AttnProcessor() for name in unet.attn_processors}


def noise_error(row: dict) -> float:
    """The mean of the noise errors among the figures of an evaluation."""
    errors = [row[f"eps_mse_{timestep}"] for timestep in validation.NOISE_STEPS]
    return sum(errors) / len(errors)
