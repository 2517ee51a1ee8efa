# SPDX-License-Identifier: Apache-2.0
"""The embedded checkpoint's models, untrained, in any size, and the writing of a checkpoint in diffusers' layout."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from .world import World

SCALING_FACTOR = 0.18215  # the factor of Stable Diffusion 1.5's latents
GROUPS = 8  # number of groups in every group norm
_ALL = World()
WORDS = ("a", "and", "over", "background", *_ALL.kinds, *_ALL.textures, *_ALL.colours, *_ALL.backgrounds)
"""Every word of the world's captions. Each becomes one token; any other word is split into letters."""
END_OF_WORD = "</w>"


@dataclass(frozen=True)
class Sizes:
    """How large the models are."""

    vae_channels: tuple[int, ...] = (16, 32, 64)  # three levels, so that a latent cell is 4 × 4 pixels
    unet_channels: tuple[int, int, int, int] = (
        32,
        64,
        128,
        128,
    )  # channels at the latent grid, at half, a quarter and an eighth of it
    heads: tuple[int, int, int, int] = (2, 4, 4, 4)  # attention heads at each level
    text_width: int = 64
    text_layers: int = 2
    tokens: int = 24  # longest prompt, its start token and end token included


def build_vae(sizes: Sizes, pixels: int) -> AutoencoderKL:
    """An untrained autoencoder for images of `pixels` a side: 4 latent channels, no attention."""
    levels = len(sizes.vae_channels)
    return AutoencoderKL(
        sample_size=pixels,
        block_out_channels=sizes.vae_channels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        norm_num_groups=GROUPS,
        mid_block_add_attention=False,
        scaling_factor=SCALING_FACTOR,
    )


def build_unet(sizes: Sizes, pixels: int) -> UNet2DConditionModel:
    """An untrained UNet with Stable Diffusion 1.5's block types.

    It has attention at the latent grid, at half and at a quarter of its resolution, and in the middle block at an
    eighth, for images of `pixels` a side.
    """
    return UNet2DConditionModel(
        sample_size=pixels // 2 ** (len(sizes.vae_channels) - 1),
        block_out_channels=sizes.unet_channels,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        layers_per_block=1,
        cross_attention_dim=sizes.text_width,
        attention_head_dim=sizes.heads,  # diffusers takes this as the number of heads
        norm_num_groups=GROUPS,
    )


def build_text_encoder(sizes: Sizes, tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """An untrained CLIP text encoder for the tokens of `tokenizer`."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=sizes.text_width,
            intermediate_size=4 * sizes.text_width,
            num_hidden_layers=sizes.text_layers,
            num_attention_heads=4,
            projection_dim=sizes.text_width,
            max_position_embeddings=sizes.tokens,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_scheduler() -> DDIMScheduler:
    """A DDIM scheduler with Stable Diffusion 1.5's noise schedule."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def build_tokenizer(words: Iterable[str], tokens: int) -> CLIPTokenizer:
    """A CLIP tokenizer for which each of the words is one token.

    Args:
        words: words of lower-case ASCII letters.
        tokens: length of the longest prompt, its start token and end token included.
    """
    vocabulary, merges = _vocabulary(words)
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=tokens)


def _vocabulary(words: Iterable[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The number of each token, and the byte-pair merges that make words out of letters."""
    merges = _merges(words)
    characters = "!',-.0123456789?abcdefghijklmnopqrstuvwxyz"
    singles = [*characters, *(character + END_OF_WORD for character in characters)]
    joined = dict.fromkeys(left + right for left, right in merges)
    return {token: i for i, token in enumerate([*singles, *joined, "<|startoftext|>", "<|endoftext|>"])}, merges


def _merges(words: Iterable[str]) -> list[tuple[str, str]]:
    """Byte-pair merges, each of the most frequent pair at that point, until every word is one token."""
    pieces = [[*word[:-1], word[-1] + END_OF_WORD] for word in sorted(set(words))]
    merges = []
    while pairs := Counter(pair for word in pieces for pair in itertools.pairwise(word)):
        pair = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(pair)
        for word in pieces:
            for i in reversed(range(len(word) - 1)):
                if (word[i], word[i + 1]) == pair:
                    word[i : i + 2] = [pair[0] + pair[1]]
    return merges


@torch.no_grad()
def normalise_latents(vae: AutoencoderKL, images: Tensor) -> None:
    """Give each channel of the scaled latents mean 0 and variance 1, by changing the quant convolutions.

    Reconstructions of images stay the same.

    Args:
        vae: the autoencoder, which is changed in place.
        images: the images whose latents are measured, (B, 3, H, W) in [-1, 1].
    """
    channels = vae.config.latent_channels
    means = torch.cat([vae.encode(part).latent_dist.mean for part in images.split(32)])
    shift, spread = means.mean((0, 2, 3)), means.std((0, 2, 3)) * vae.config.scaling_factor
    quant, post = vae.quant_conv, vae.post_quant_conv
    quant.weight[:channels] /= spread[:, None, None, None]
    quant.bias[:channels] = (quant.bias[:channels] - shift) / spread
    quant.bias[channels:] -= 2 * spread.log()  # the second half of the channels holds log variances
    post.bias += post.weight[:, :, 0, 0] @ shift
    post.weight *= spread[:, None, None]


def initialised(build, seed: int) -> nn.Module:
    """What `build()` returns if random weights come from `seed`; torch's global random state stays as it is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


def save_checkpoint(folder: Path, vae: nn.Module, unet: nn.Module, text_encoder: nn.Module, tokenizer) -> None:
    """Write a float16 checkpoint that `StableDiffusionPipeline.from_pretrained` loads.

    Args:
        folder: the folder to write to, which is made if it is missing.
        vae: the autoencoder, which is converted to float16 in place.
        unet: the noise predictor, which is converted to float16 in place.
        text_encoder: the encoder of prompts, which is converted to float16 in place.
        tokenizer: the tokenizer that goes with the text encoder.
    """
    pipeline = StableDiffusionPipeline(
        vae.half(),
        text_encoder.half(),
        tokenizer,
        unet.half(),
        build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    # transformers writes tokenizer.json alone; other readers of CLIP tokenizers need vocab.json and merges.txt
    model = json.loads((folder / "tokenizer" / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    merges = ["#version: 0.2", *(pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"])]
    (folder / "tokenizer" / "vocab.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
    (folder / "tokenizer" / "merges.txt").write_text("\n".join(merges) + "\n", encoding="utf-8")
    _restore_weight_names(folder / "text_encoder" / "model.safetensors")
    # transformers loads in the dtype written in this file, diffusers in float32; without `dtype=` they must agree
    edit_json(folder / "text_encoder" / "config.json", {"dtype": "float32"})
    for part in ("vae", "unet", "scheduler"):
        for file in (folder / part).glob("*config.json"):
            edit_json(file, {})
    edit_json(folder / "model_index.json", {})
    for file in folder.glob("*/*.safetensors"):
        file.chmod(0o644)  # some are written readable by their owner alone, and would be installed so


def _restore_weight_names(file: Path) -> None:
    """Put back the prefix of weight names that transformers 5.23 leaves out.

    Where the prefix is missing, transformers 5.5 silently uses random weights.
    """
    weights = {f"text_model.{name.removeprefix('text_model.')}": weight for name, weight in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})


def edit_json(file: Path, changes: dict) -> None:
    """Set some keys of a JSON configuration, and remove the path that the model was loaded from."""
    config = json.loads(file.read_text(encoding="utf-8")) | changes
    config.pop("_name_or_path", None)
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
