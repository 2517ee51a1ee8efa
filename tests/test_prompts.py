# SPDX-License-Identifier: Apache-2.0
"""Prompts and embeddings of one pair and of many."""

import math

import numpy as np
import pytest
import torch
from support.errors import refuses

from dreammover_pipeline.prompts import pair_embeds, pair_negatives, pair_prompts, pair_texts


@pytest.mark.parametrize(
    ("prompt", "pairs", "batched", "expected"),
    [
        ("a", 1, False, [("a", "a")]),
        ("", 1, False, [("", "")]),
        (("a", "b"), 1, False, [("a", "b")]),
        (["a", "b"], 1, False, [("a", "b")]),
        ("a", 3, True, [("a", "a")] * 3),
        (("a", "b"), 3, True, [("a", "b")] * 3),
        (["a", "b"], 2, True, [("a", "a"), ("b", "b")]),
        (["a"], 1, True, [("a", "a")]),
        (["a", ("b", "c"), ["d", "e"]], 3, True, [("a", "a"), ("b", "c"), ("d", "e")]),
    ],
)
def test_prompts_of_every_pair(prompt, pairs, batched, expected):
    assert pair_prompts(prompt, pairs, batched) == expected
    assert [text.prompts for text in pair_texts(prompt, None, pairs, batched, 8)] == expected


@pytest.mark.parametrize(
    ("prompt", "pairs", "batched", "error"),
    [
        (None, 1, False, TypeError),
        (3, 1, False, TypeError),
        (("a", "b", "c"), 1, False, TypeError),
        (("a",), 1, False, TypeError),
        (("a", None), 1, False, TypeError),
        (["a", 3], 1, False, TypeError),
        (["a", "b", "c"], 1, False, ValueError),
        ([], 1, False, ValueError),
        (["a", "b", "c"], 2, True, ValueError),
        (["a", 3], 2, True, TypeError),
        (["a", ("b", "c", "d")], 2, True, TypeError),
        ({"a": "b"}, 1, False, TypeError),
        ({"a", "b"}, 1, False, TypeError),
    ],
)
def test_prompts_that_are_none_are_refused(prompt, pairs, batched, error):
    refuses(error, "prompt", pair_prompts, prompt, pairs, batched)


def test_the_prompt_that_is_none_is_named():
    with pytest.raises(TypeError, match=r"^`prompt` must be a string, or two strings, one per image; not 3$"):
        pair_prompts(3, 1, False)
    with pytest.raises(TypeError, match=r"^`prompt` must be .*; not \('a',\)$"):
        pair_prompts(("a",), 2, True)
    with pytest.raises(TypeError, match=r"^`prompt\[1\]` must be a string, or two strings, one per image; not 3$"):
        pair_prompts(["a", 3, "b"], 3, True)


def test_embeddings_of_every_pair():
    embeds = torch.randn(3, 5, 8)
    for i, pair in enumerate(pair_embeds("prompt_embeds", embeds, 3)):
        assert torch.equal(pair, embeds[[i, i]])
    embeds = torch.randn(6, 5, 8)
    for i, pair in enumerate(pair_embeds("prompt_embeds", embeds, 3)):
        assert torch.equal(pair, embeds[2 * i : 2 * i + 2])
    (pair,) = pair_embeds("prompt_embeds", torch.ones(2, 5, 8, dtype=torch.float16), 1)
    assert pair.shape == (2, 5, 8)
    assert pair.dtype == torch.float16
    texts = pair_texts("", embeds, 3, True, 8)
    assert [text.prompts for text in texts] == [None] * 3
    assert all(torch.equal(text.embeds, embeds[2 * i : 2 * i + 2]) for i, text in enumerate(texts))


@pytest.mark.parametrize(
    ("embeds", "error"),
    [
        (torch.zeros(1, 5, 8), ValueError),
        (torch.zeros(5, 5, 8), ValueError),
        (torch.zeros(3, 8), ValueError),
        (torch.zeros(3, 1, 5, 8), ValueError),
        (torch.zeros(3, 5, 8, dtype=torch.long), TypeError),
        (np.zeros((3, 5, 8)), TypeError),
        ([[0.0]], TypeError),
        (torch.tensor([0.0, math.nan]).repeat(3, 5, 4), ValueError),
        (torch.tensor([0.0, math.inf]).repeat(3, 5, 4), ValueError),
        (torch.tensor([0.0, -math.inf]).repeat(3, 5, 4), ValueError),
    ],
)
def test_embeddings_that_do_not_fit_are_refused(embeds, error):
    refuses(error, "prompt_embeds`", pair_embeds, "prompt_embeds", embeds, 3)
    refuses(error, "prompt_embeds`", pair_texts, None, embeds, 3, True, 8)


def test_the_shapes_that_embeddings_may_have_are_said():
    forms = r"\(3, L, D\), one embedding per pair, or \(6, L, D\), one per image; not \(5, 7, 8\)$"
    with pytest.raises(ValueError, match=f"^`prompt_embeds` must be {forms}"):
        pair_embeds("prompt_embeds", torch.zeros(5, 7, 8), 3)
    for width in (7, 9):
        with pytest.raises(ValueError, match=rf"must be \(B, L, {width}\) for this UNet, not \(3, 7, 8\)$"):
            pair_texts(None, torch.zeros(3, 7, 8), 3, True, width)


def test_a_prompt_and_embeddings_exclude_each_other():
    embeds = torch.zeros(1, 5, 8)
    refuses(ValueError, "prompt", pair_texts, ["a"], embeds, 1, True, 8)
    refuses(ValueError, "prompt", pair_texts, "a", embeds, 1, False, 8)
    refuses(ValueError, "prompt_embeds", pair_texts, None, embeds, 1, False, 16)
    for negative in ("a", ""):  # no negative prompt is None, and an empty one is a negative prompt
        refuses(ValueError, "negative_prompt", pair_negatives, negative, embeds, 1, 8)
    refuses(ValueError, "negative_prompt_embeds", pair_negatives, None, embeds, 1, 16)


def test_negatives_of_every_pair():
    for given, expected in (
        (None, [None, None]),
        ("a", ["a", "a"]),
        (["a", None], ["a", None]),
        (("a", "b"), ["a", "b"]),
    ):
        assert [negative.prompt for negative in pair_negatives(given, None, 2, 8)] == expected
    embeds = torch.randn(2, 5, 8)
    for i, negative in enumerate(pair_negatives(None, embeds, 2, 8)):
        assert torch.equal(negative.embeds, embeds[i : i + 1])


@pytest.mark.parametrize(
    ("prompt", "embeds", "error", "name"),
    [
        (3, None, TypeError, "negative_prompt"),
        (["a", 3], None, TypeError, "negative_prompt"),
        (["a"], None, ValueError, "negative_prompt` has 1 entries for 2 pairs of images; "),
        ([], None, ValueError, "negative_prompt` has 0 entries"),
        (0, None, TypeError, "negative_prompt"),
        (["a", "b", "c"], None, ValueError, "negative_prompt"),
        (None, torch.zeros(4, 5, 8), ValueError, "negative_prompt_embeds"),
        (None, torch.zeros(1, 5, 8), ValueError, "negative_prompt_embeds"),
        (None, "a", TypeError, "negative_prompt_embeds"),
    ],
)
def test_negatives_that_do_not_fit_are_refused(prompt, embeds, error, name):
    refuses(error, name, pair_negatives, prompt, embeds, 2, 8)
