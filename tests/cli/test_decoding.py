# SPDX-License-Identifier: Apache-2.0
"""Commands decode each photo and each mask once, since a large one takes seconds."""

import json
import shutil

import pytest
from accelerate import PartialState
from PIL import Image
from support.decoding import count_decodes

from dreammover_pipeline.cli.main import main

pytestmark = pytest.mark.usefixtures("restored_logging")

SHORT = ["--frames=1", "--steps=2", "--inversion-steps=1", "--feature-step=1", "--device=cpu", "--quiet"]


@pytest.fixture
def run(model, tmp_path, monkeypatch):
    """Runs a command in a folder that has `a.png`, `b.png` and `c.png`, and gives how often each file is decoded."""
    monkeypatch.chdir(tmp_path)
    for name, colour in (("a", "red"), ("b", "cyan"), ("c", "yellow")):
        Image.new("RGB", (64, 64), colour).save(f"{name}.png")
    decodes = count_decodes(monkeypatch)

    def decodes_of(*command):
        assert main([*command, "--model", model, *SHORT]) == 0
        return decodes

    yield decodes_of
    PartialState._reset_state()


def test_a_pair_of_large_photos(run):
    Image.new("RGB", (2000, 2000), "red").save("large.png", compress_level=1)
    shutil.copy("large.png", "copy.png")
    command = ["interpolate", "large.png", "copy.png", "-o", "out", "--size=64x64", "--lora-steps=1"]
    assert run(*command, "--sheet=sheet.png", "--compare=beside") == {"large.png": 1, "copy.png": 1}


def test_a_pair_with_a_mask_for_each_photo(run):
    masks = ["--mask", "b.png", "--mask", "c.png"]
    Image.new("RGB", (64, 64), "white").save("d.png")
    decodes = run("interpolate", "a.png", "d.png", "-o", "out", *masks, "--lora-steps=0")
    assert decodes == {f"{name}.png": 1 for name in "abcd"}


@pytest.mark.parametrize("options", [[], ["--one-lora"]])
def test_a_sequence(run, options):
    command = ["interpolate", "a.png", "b.png", "c.png", "-o", "out", "--lora-steps=1", "--compare=beside"]
    assert run(*command, *options) == {"a.png": 1, "b.png": 1, "c.png": 1}


@pytest.mark.parametrize("lora_steps", [0, 1])
def test_a_batch_of_one_pair(run, tmp_path, lora_steps):
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"img0": "a.png", "img1": "b.png", "output": "video"}))
    assert run("batch", "pairs.jsonl", "-o", "out", f"--lora-steps={lora_steps}") == {"a.png": 1, "b.png": 1}
