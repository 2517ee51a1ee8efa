# SPDX-License-Identifier: Apache-2.0
"""What is measured during training, on scenes that are never trained on, whatever the seed of the training."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image, ImageDraw
from torch import Tensor

from ..ddim import recompose
from ..features import captured_up_block
from ..flow import match_features
from ..media.pictures import picture_of
from .world import World

NOISE_STEPS = (100, 300, 600)  # timesteps at which the noise prediction is measured
FEATURE_STEP = 101  # timestep at which features are matched
BLOCKS = (1, 2, 3)  # up blocks whose features are matched
DIFFICULTIES = ("same", "recast")
THRESHOLDS = {".1": 0.1, ".05": 0.05}  # largest errors that PCK counts as correct, as shares of the image's side
HELD_OUT = 2**52 + 1  # seed of the scenes that are measured on; training seeds are hashes
BATCH = 32  # images or latents that a network gets in one call


@dataclass(frozen=True, eq=False)
class Pairs:
    """n pairs of images with their captions and their true flow, as `held_out_pairs` draws them."""

    images: Tensor  # (2, n, 3, H, W) in [-1, 1], all first images, then all last images
    captions: list[str]  # 2·n captions, of all first images, then of all last images
    foreground: Tensor  # (2, n, 1, H, W) bool, where a sprite is
    flow: Tensor  # (2, n, 2, H, W) in pixels, from each image to the other image of its pair
    seen: Tensor  # (2, n, 1, H, W) bool, foreground that is visible in the other image, too


def held_out_pairs(world: World, difficulty: str, count: int, device: torch.device) -> Pairs:
    """Draw the pairs that every evaluation measures on."""
    scenes = world.sample(count, HELD_OUT, difficulty, device)
    ways = ((0.0, 1.0), (1.0, 0.0))
    foreground = torch.stack([scenes.foreground(time) for time, _ in ways])
    return Pairs(
        torch.stack([scenes.frame(time) for time, _ in ways]) * 2 - 1,
        [first for first, _ in scenes.captions] + [last for _, last in scenes.captions],
        foreground,
        torch.stack([scenes.flow(*way) for way in ways]),
        foreground & torch.stack([scenes.visible(*way) for way in ways]),
    )


def psnr(images: Tensor, truth: Tensor, mask: Tensor) -> float:
    """Peak signal-to-noise ratio inside a mask in dB, as a mean over images.

    Args:
        images: the images to judge, (B, 3, H, W); values outside [-1, 1] are clipped.
        truth: the true images, (B, 3, H, W) in [-1, 1].
        mask: which pixels count, (B, 1, H, W) bool; an image whose mask is empty does not count.
    """
    error = (images.clamp(-1, 1) - truth).div(2).square().mean(1, keepdim=True) * mask
    pixels = mask.sum((1, 2, 3))
    error = error.sum((1, 2, 3))[pixels > 0] / pixels[pixels > 0]
    return (-10 * error.clamp_min(1e-10).log10()).mean().item()


@torch.no_grad()
def encode(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Scaled means of the latents of images (B, 3, H, W) in [-1, 1]: (B, C, h, w), with a variance of about 1."""
    parts = [vae.encode(part).latent_dist.mean for part in images.split(BATCH)]
    return torch.cat(parts) * vae.config.scaling_factor


@torch.no_grad()
def measure_vae(vae: AutoencoderKL, pairs: Pairs) -> dict[str, float]:
    """PSNR of reconstructions, of whole images and of the foreground, and standard deviation of the scaled latents."""
    images, foreground = pairs.images.flatten(0, 1), pairs.foreground.flatten(0, 1)
    latents = encode(vae, images)
    decoded = torch.cat([vae.decode(z / vae.config.scaling_factor).sample for z in latents.split(BATCH)])
    return {
        "psnr": psnr(decoded, images, torch.ones_like(foreground)),
        "psnr_foreground": psnr(decoded, images, foreground),
        "latent_std": latents.std().item(),
    }


@torch.no_grad()
def measure_noise(unet: UNet2DConditionModel, latents: Tensor, embeds: Tensor, alphas: Tensor) -> dict[str, float]:
    """Mean squared error of the predicted noise at `NOISE_STEPS`.

    Args:
        unet: the noise predictor.
        latents: scaled latents, (B, C, h, w).
        embeds: embeddings of the captions, (B, L, D).
        alphas: ᾱ of every timestep, (T,).
    """

    def predict(noisy: Tensor, timesteps: Tensor) -> Tensor:
        parts = zip(noisy.split(BATCH), timesteps.split(BATCH), embeds.split(BATCH), strict=True)
        return torch.cat([unet(*part).sample for part in parts])

    return noise_errors(predict, latents, alphas)


@torch.no_grad()
def noise_errors(predict: Callable[[Tensor, Tensor], Tensor], latents: Tensor, alphas: Tensor) -> dict[str, float]:
    """Mean squared error of predicted noise at `NOISE_STEPS`.

    Args:
        predict: a function that predicts the noise in noisy latents (B, C, h, w) at timesteps (B,).
        latents: scaled latents, (B, C, h, w).
        alphas: ᾱ of every timestep, (T,).
    """
    errors = {}
    noise = noise_like(latents)
    for timestep in NOISE_STEPS:
        timesteps = torch.full((len(latents),), timestep, device=latents.device)
        predicted = predict(recompose(latents, noise, alphas[timesteps]), timesteps)
        errors[f"eps_mse_{timestep}"] = (predicted - noise).square().mean().item()
    return errors


@torch.no_grad()
def block_features(unet: UNet2DConditionModel, latents: Tensor, embeds: Tensor, alphas: Tensor) -> dict[int, Tensor]:
    """The output of each of `BLOCKS` for latents noised to `FEATURE_STEP`, (B, C', h', w') by the block's number."""
    timesteps = torch.full((len(latents),), FEATURE_STEP, device=latents.device)
    noisy = recompose(latents, noise_like(latents), alphas[timesteps])
    with ExitStack() as stack:
        outputs = {block: stack.enter_context(captured_up_block(unet, block)) for block in BLOCKS}
        for part in zip(noisy.split(BATCH), timesteps.split(BATCH), embeds.split(BATCH), strict=True):
            unet(*part)
    return {block: torch.cat(parts) for block, parts in outputs.items()}


def pck(features: Tensor, pairs: Pairs, cells: int) -> dict[str, float]:
    """PCK, the share of visible foreground cells whose match lies near the truth, in both directions of all pairs.

    Cells are matched as the pipeline matches them: on the latent grid, by cosine, with all cells of the other image.

    Args:
        features: the features of all first images, then of all last images, (2·n, C', h', w').
        pairs: the n pairs, with the true flow.
        cells: number of cells along a side of the latent grid.

    Returns:
        The share in per cent for each of `THRESHOLDS`, by the threshold's name.
    """
    size = pairs.images.shape[-1]
    pixels = size // cells
    at_cells = (..., slice(pixels // 2, None, pixels), slice(pixels // 2, None, pixels))  # the pixel at each centre
    flow, seen = pairs.flow[at_cells], pairs.seen[at_cells][:, :, 0]  # (2, n, 2, h, w), (2, n, h, w)
    errors = []
    for i, ends in enumerate(features.unflatten(0, (2, -1)).unbind(1)):
        matched = match_features(ends, (cells, cells))
        found = torch.cat([matched.forward, matched.backward]) * pixels
        errors.append((found - flow[:, i]).norm(dim=1)[seen[:, i]])
    errors = torch.cat(errors)
    return {name: 100 * (errors <= share * size).float().mean().item() for name, share in THRESHOLDS.items()}


def measure_correspondence(unet, latents: Tensor, embeds: Tensor, alphas: Tensor, pairs: Pairs) -> dict[str, float]:
    """PCK of the features of each of `BLOCKS`, in per cent, by names such as "up1_pck.1".

    Args:
        unet: the `UNet2DConditionModel` whose features are matched.
        latents: scaled latents of the pairs' images, (2·n, C, h, w).
        embeds: embeddings of the pairs' captions, (2·n, L, D).
        alphas: ᾱ of every timestep, (T,).
        pairs: the n pairs, with the true flow.
    """
    figures = {}
    for block, features in block_features(unet, latents, embeds, alphas).items():
        shares = pck(features, pairs, latents.shape[-1])
        figures |= {f"up{block}_pck{name}": share for name, share in shares.items()}
    return figures


def noise_like(latents: Tensor) -> Tensor:
    """Noise of the shape of `latents`, the same in every call; it is drawn on the CPU so that all devices agree."""
    return torch.randn(latents.shape, generator=torch.Generator().manual_seed(0)).to(latents)


def sample_sheet(
    vae, unet, text_encoder, tokenizer, scheduler: DDIMScheduler, pairs: Pairs, count: int
) -> Image.Image:
    """A picture of `count` samples made by guided DDIM, each below the image whose caption was the prompt."""
    captions = pairs.captions[:count]
    pipeline = StableDiffusionPipeline(
        vae, text_encoder, tokenizer, unet, scheduler, None, None, requires_safety_checker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    samples = pipeline(
        captions,
        num_inference_steps=25,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).images
    return sheet_of(pairs.images[0, :count] / 2 + 0.5, samples)


def sheet_of(*batches: Tensor, columns: int = 8) -> Image.Image:
    """Batches (B, 3, H, W) in [0, 1] of equal shape as one picture, whose rows are taken from them by turns."""
    rows = [part for parts in zip(*(batch.split(columns) for batch in batches), strict=True) for part in parts]
    count, _, height, width = batches[0].shape
    sheet = Image.new("RGB", (min(columns, count) * width, len(rows) * height))
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            sheet.paste(picture_of(image), (x * width, y * height))
    return sheet


def draw_curves(history: list[dict], file: Path) -> None:
    """Draw each figure of the evaluations over the training steps, in a panel of its own, and write a PNG.

    Args:
        history: one row for each evaluation, with "step", "seconds" and, in every row, the same figures.
        file: the path of the PNG.
    """
    names = [name for name in history[0] if name not in ("step", "seconds")]
    columns, width, height = 4, 300, 180
    canvas = Image.new("RGB", (columns * width, -(-len(names) // columns) * height), "white")
    draw = ImageDraw.Draw(canvas)
    last = max(row["step"] for row in history) or 1
    for i, name in enumerate(names):
        points = [(row["step"], row[name]) for row in history if row[name] is not None]
        values = [value for _, value in points] or [0.0]
        left, top = i % columns * width + 20, i // columns * height + 30
        low, high = min(values), max(values)
        scale = (height - 60) / ((high - low) or 1)
        line = [(left + step / last * (width - 40), top + (high - value) * scale) for step, value in points]
        draw.rectangle((left, top, left + width - 40, top + height - 60), outline="lightgrey")
        draw.line(line, fill="navy", width=2)
        draw.text((left, top - 22), f"{name}: {low:.4g} to {high:.4g}, at last {values[-1]:.4g}", "black")
    canvas.save(file)
