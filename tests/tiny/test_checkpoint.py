# SPDX-License-Identifier: Apache-2.0
"""The embedded checkpoint, as a file set that any stack must read alike."""

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors import safe_open
from support.pages import EXAMPLES

from dreammover_pipeline.evaluation.examples import write_examples
from dreammover_pipeline.tiny import CHECKPOINT


def test_it_is_small():
    assert sum(path.stat().st_size for path in CHECKPOINT.rglob("*") if path.is_file()) < 20e6


def test_its_text_encoder_has_the_names_every_transformers_knows():
    """What transformers 5.23 saves as "encoder.…" 5.5 replaces by random weights; both read "text_model.…"."""
    with safe_open(CHECKPOINT / "text_encoder" / "model.safetensors", "pt") as file:
        assert all(name.startswith("text_model.") for name in file.keys())  # noqa: SIM118, a file is no mapping


def test_it_comes_up_whole_in_one_precision_in_diffusers_own_pipeline():
    pipe = StableDiffusionPipeline.from_pretrained(CHECKPOINT, safety_checker=None)
    assert {pipe.unet.dtype, pipe.vae.dtype, pipe.text_encoder.dtype} == {torch.float32}
    with safe_open(CHECKPOINT / "text_encoder" / "model.safetensors", "pt") as file:
        stored = file.get_tensor("text_model.embeddings.token_embedding.weight").float()
    loaded = pipe.text_encoder.get_input_embeddings().weight
    assert torch.equal(loaded, stored)


def test_the_examples_are_what_the_program_writes(tmp_path):
    write_examples(tmp_path)
    made = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*.*"))
    assert made == sorted(path.relative_to(EXAMPLES) for path in EXAMPLES.glob("*/*") if path.parent.name != "space")
    for path in made:
        if path.suffix == ".txt":
            assert (tmp_path / path).read_text() == (EXAMPLES / path).read_text()
        else:
            there, here = (np.array(Image.open(root / path)).astype(int) for root in (EXAMPLES, tmp_path))
            assert np.abs(there - here).max() <= (1 if path.suffix == ".png" else 8)  # machines round differently


def test_prompts_mean_something_to_it(tiny_pipe):
    """Noise predicted for a picture is better with its caption than with another's."""
    caption, other = (EXAMPLES / "fish" / "prompt.txt").read_text(), "a dotted white and green robot"
    prepared = tiny_pipe.prepare(EXAMPLES / "fish" / "0.png", EXAMPLES / "fish" / "1.png", lora_steps=0)
    clean = prepared.inversion.path[0]
    alpha_bar = float(tiny_pipe.scheduler.alphas_cumprod[601])
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    noisy = alpha_bar**0.5 * clean + (1 - alpha_bar) ** 0.5 * noise

    def error(text):
        with torch.no_grad():
            embeds, _ = tiny_pipe.encode_prompt([text] * 2, torch.device("cpu"))
            return float((tiny_pipe.predict_noise(noisy, 601, embeds) - noise).square().mean())

    assert error(caption) < error(other)
