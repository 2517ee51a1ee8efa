# SPDX-License-Identifier: Apache-2.0
"""Tiny real models with Stable Diffusion 1.5's topology, built offline from fixed seeds."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Models this small gain nothing from threads, and on a busy machine threads that wait for each other lose a lot.
os.environ["OMP_NUM_THREADS"] = "1"  # of commands run as processes, too

import copy
import gc
import signal

import diffusers.utils.logging as diffusers_logging
import numpy as np
import pytest
import torch
import transformers.utils.logging as transformers_logging
from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from PIL import Image
from support.copies import copied_model
from tqdm import tqdm
from transformers import CLIPConfig, CLIPImageProcessor, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from dreammover_pipeline import DreamMoverPipeline
from dreammover_pipeline.tiny import CHECKPOINT

torch.set_num_threads(1)
# Without the thread that watches progress bars, which may hold their lock at the moment when a test forks a process.
tqdm.monitor_interval = 0


def pytest_collection_finish():
    """Keep collections of garbage from going through all that imports have made, which takes half of their time."""
    gc.collect()
    gc.freeze()


def build_components() -> dict:
    """Four-level UNet with attention in up blocks 1, 2 and 3, f8 VAE, two-layer CLIP: the SD 1.5 layout, 64 px."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16, 16, 16),
        layers_per_block=1,
        cross_attention_dim=32,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    torch.manual_seed(0)
    vae = AutoencoderKL(
        sample_size=64,
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
        scaling_factor=0.18215,
    )
    tokenizer = CLIPTokenizer.from_pretrained(CHECKPOINT / "tokenizer")
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    # CLIP's own initialisation changes between transformers versions
    generator = torch.Generator().manual_seed(0)
    for parameter in text_encoder.parameters():
        if parameter.ndim > 1:
            parameter.data = torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5
    # what SD 1.5 ships with: not a DDIM, and its configuration says nothing of clipping
    scheduler = PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1
    )
    return {
        "vae": vae.eval(),
        "text_encoder": text_encoder.eval(),
        "tokenizer": tokenizer,
        "unet": unet.eval(),
        "scheduler": scheduler,
        "safety_checker": None,
        "feature_extractor": None,
    }


@pytest.fixture(scope="session")
def session_components() -> dict:
    return build_components()


def copied(components: dict) -> dict:
    """Components equal to these, which share nothing with them."""
    return {
        name: copied_model(part) if isinstance(part, torch.nn.Module) else copy.deepcopy(part)
        for name, part in components.items()
    }


@pytest.fixture(scope="session")
def new_pipe(session_components):
    """A function that makes quiet pipelines, for fixtures of whole modules, of models equal to those of `pipe`."""

    def new_pipe() -> DreamMoverPipeline:
        pipe = DreamMoverPipeline(**copied(session_components), requires_safety_checker=False)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return new_pipe


@pytest.fixture
def components(session_components) -> dict:
    """Components of this test's own."""
    return copied(session_components)


@pytest.fixture
def pipe(components) -> DreamMoverPipeline:
    """A quiet pipeline on them; 64 px, latents 8×8, random weights."""
    pipe = DreamMoverPipeline(**components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def safety_checker() -> tuple[StableDiffusionSafetyChecker, CLIPImageProcessor]:
    """A safety checker of random weights, and what prepares pictures for it."""
    torch.manual_seed(0)
    vision = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
    }
    checker = StableDiffusionSafetyChecker(CLIPConfig(vision_config=vision, projection_dim=16)).eval()
    extractor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    return checker, extractor


@pytest.fixture
def tiny_pipe() -> DreamMoverPipeline:
    """The embedded checkpoint: 128 px, latents 32×32, trained weights."""
    pipe = DreamMoverPipeline.from_pretrained(CHECKPOINT)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def photos() -> tuple[Image.Image, Image.Image]:
    """Two smooth 64×64 pictures: a blob that moves."""
    y, x = np.mgrid[:64, :64]

    def picture(cx, cy):
        blob = np.exp(-((x - cx) ** 2 + (y - cy) ** 2) / 150)
        return Image.fromarray(np.stack([255 * blob, x * 3, 200 - y * 2], -1).astype(np.uint8))

    return picture(20, 24), picture(44, 36)


@pytest.fixture
def fast() -> dict:
    """Arguments that keep a call short, and its frames those of diffusion: 3 of them, 3 of 5 steps, no LoRA."""
    return {
        "prompt": "a fish",
        "n_frames": 3,
        "num_inference_steps": 5,
        "inversion_steps": 3,
        "feature_step": 2,
        "lora_steps": 0,
        "detail": "upsampled",
        "output_type": "pt",
    }


@pytest.fixture(scope="module")
def restored_logging():
    """For tests that run commands in process: those hush third parties."""
    levels = diffusers_logging.get_verbosity(), transformers_logging.get_verbosity()
    yield
    for logging, level in zip((diffusers_logging, transformers_logging), levels, strict=True):
        logging.set_verbosity(level)
        logging.enable_progress_bar()


@pytest.fixture
def interruptible():
    """Ctrl-C as a terminal has it: background jobs of a shell are started with it ignored, and pass that on."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


@pytest.fixture
def program(tmp_path_factory, monkeypatch):
    """Puts a shell script in ffmpeg's place."""
    if os.name != "posix":
        pytest.skip("needs shell scripts")

    def put(script):
        path = tmp_path_factory.mktemp("bin") / "ffmpeg"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(path))

    return put
