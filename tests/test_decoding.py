# SPDX-License-Identifier: Apache-2.0
"""Calls decode each photo and each mask once, since a large one takes seconds."""

import pytest
from PIL import Image
from support.decoding import count_decodes
from support.sequences import FEW_STEPS


@pytest.fixture
def files(tmp_path, monkeypatch):
    """The paths of four pictures and, from then on, how often each is decoded, by its name."""
    paths = [tmp_path / f"{name}.png" for name in "abcd"]
    for path, colour in zip(paths, ("red", "green", "white", "grey"), strict=True):
        Image.new("RGB", (64, 64), colour).save(path)
    return paths, count_decodes(monkeypatch)


@pytest.mark.parametrize("output_type", ["pil", "latent"])
def test_a_pair_with_a_mask_for_each_photo(pipe, files, fast, output_type):
    (first, last, *masks), decodes = files
    pipe(first, last, mask=masks, include_inputs=True, **{**fast, **FEW_STEPS, "output_type": output_type})
    assert decodes == {f"{name}.png": 1 for name in "abcd"}


def test_a_batch_of_pairs(pipe, files, fast):
    (first, last, *others), decodes = files
    pipe([first, others[0]], [last, others[1]], **{**fast, **FEW_STEPS, "lora_steps": 1})
    assert decodes == {f"{name}.png": 1 for name in "abcd"}


def test_a_pair_that_is_prepared_and_rendered_twice(pipe, files, fast):
    (first, last, *_), decodes = files
    pair = pipe.prepare(str(first), str(last), lora_steps=1, **FEW_STEPS)
    for _ in range(2):
        pipe.render(pair, n_frames=1, include_inputs=True)
    assert decodes == {"a.png": 1, "b.png": 1}


@pytest.mark.parametrize("lora", ["gap", "shared"])
def test_a_sequence_that_is_kept_and_made_again(pipe, files, fast, tmp_path, lora):
    paths, decodes = files
    for calls in (1, 2):
        pipe.interpolate_sequence(
            paths[:3], keep=tmp_path / "kept", lora=lora, **{**fast, **FEW_STEPS, "lora_steps": 1}
        )
        assert decodes == {f"{name}.png": calls for name in "abc"}
