# SPDX-License-Identifier: Apache-2.0
"""Every wrong argument is refused by name, and every right one understood."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch

from dreammover_pipeline.inputs import (
    check_attention_blocks,
    check_choice,
    check_generator,
    check_integer,
    check_number,
    check_steps,
    draw_seed,
    frame_times,
    pair_embeds,
    pair_generators,
    pair_negatives,
    pair_prompts,
    pair_texts,
)

NAN, INFINITE = float("nan"), float("inf")


def refuses(error, name, function, *arguments, **keywords):
    """`function` raises `error`, and its message names the argument."""
    with pytest.raises(error, match=f"`{name}"):
        function(*arguments, **keywords)


@pytest.mark.parametrize("value", [True, 1.0, "1", None, [1]])
def test_check_integer_refuses_other_types(value):
    refuses(TypeError, "n", check_integer, "n", value, 0)


@pytest.mark.parametrize(("value", "minimum"), [(0, 1), (-1, 0)])
def test_check_integer_refuses_less_than_the_minimum(value, minimum):
    refuses(ValueError, "n", check_integer, "n", value, minimum)
    check_integer("n", minimum, minimum)


@pytest.mark.parametrize("value", [True, "1", None, [1.0], 1j])
def test_check_number_refuses_other_types(value):
    refuses(TypeError, "x", check_number, "x", value, 0)


@pytest.mark.parametrize("value", [-0.1, -1, NAN, INFINITE, -INFINITE])
def test_check_number_refuses_what_is_out_of_range(value):
    refuses(ValueError, "x", check_number, "x", value, 0)


def test_check_number_may_leave_its_minimum_out():
    check_number("x", 0, 0)
    check_number("x", 1e-9, 0, inclusive=False)
    refuses(ValueError, "x", check_number, "x", 0, 0, inclusive=False)
    refuses(ValueError, "x", check_number, "x", 0.0, 0, inclusive=False)


@pytest.mark.parametrize("value", ["c", "A", "", None, 1])
def test_check_choice_says_what_is_allowed(value):
    check_choice("kind", "a", ("a", "b"))
    with pytest.raises(ValueError, match="`kind` must be one of 'a', 'b', not"):
        check_choice("kind", value, ("a", "b"))


@pytest.mark.parametrize("steps", [(50, 30, 14), (50, 50, 50), (1, 1, 1), (1000, 1, 1)])
def test_check_steps_lets_nested_steps_pass(steps):
    check_steps(*steps, 1000)


@pytest.mark.parametrize(
    ("steps", "error", "name"),
    [
        ((0, 30, 14), ValueError, "num_inference_steps"),
        ((50, 0, 14), ValueError, "inversion_steps"),
        ((50, 30, 0), ValueError, "feature_step"),
        ((50.0, 30, 14), TypeError, "num_inference_steps"),
        ((50, None, 14), TypeError, "inversion_steps"),
        ((50, 30, True), TypeError, "feature_step"),
        ((1001, 30, 14), ValueError, "num_inference_steps"),
        ((50, 51, 14), ValueError, "feature_step"),
        ((50, 30, 31), ValueError, "feature_step"),
    ],
)
def test_check_steps_refuses_the_rest(steps, error, name):
    refuses(error, name, check_steps, *steps, 1000)


@pytest.mark.parametrize("n", [1, 2, 3, 32])
def test_frames_are_evenly_spaced_between_the_images(n):
    assert frame_times(n, None) == tuple(float(Fraction(i, n + 1)) for i in range(1, n + 1))


@pytest.mark.parametrize(
    "times", [[0.5], (0.1, 0.9), np.linspace(0.1, 0.9, 5), torch.tensor([0.25, 0.75]), [0.9, 0.1]]
)
def test_times_are_taken_as_they_come(times):
    result = frame_times(None, times)
    assert result == tuple(float(time) for time in times)
    assert all(type(time) is float for time in result)


@pytest.mark.parametrize(
    ("n_frames", "times", "error", "name"),
    [
        (0, None, ValueError, "n_frames"),
        (-1, None, ValueError, "n_frames"),
        (3.0, None, TypeError, "n_frames"),
        (True, None, TypeError, "n_frames"),
        (None, None, TypeError, "n_frames"),
        (3, [], ValueError, "times"),
        (3, [0.0, 0.5], ValueError, "times"),
        (3, [0.5, 1.0], ValueError, "times"),
        (3, [-0.1], ValueError, "times"),
        (3, [1.5], ValueError, "times"),
        (3, [NAN], ValueError, "times"),
        (3, [INFINITE], ValueError, "times"),
        (3, 0.5, TypeError, "times"),
        (3, ["a"], TypeError, "times"),
        (3, [None], TypeError, "times"),
        # strictly inside for a float, but an end in the float32 that frames are made in
        (3, [1 - 1e-9], ValueError, "times"),
        (3, [1e-60], ValueError, "times"),
    ],
)
def test_frame_times_refuses_the_rest(n_frames, times, error, name):
    refuses(error, name, frame_times, n_frames, times)


@pytest.mark.parametrize("blocks", [(2, 3), [3], (), (1, 2), (0, 1), range(1, 3)])
def test_attention_blocks_that_exist_pass(blocks):
    check_attention_blocks(blocks, [0, 3, 3, 3])


@pytest.mark.parametrize(
    ("blocks", "error"),
    [
        ("23", TypeError),
        (2, TypeError),
        (None, TypeError),
        (2.0, TypeError),
        ((2.0,), TypeError),
        ((True,), TypeError),
        (("2",), TypeError),
        ((4,), ValueError),
        ((2, -1), ValueError),
        ((0,), ValueError),
    ],
)
def test_attention_blocks_that_do_not_exist_are_refused(blocks, error):
    refuses(error, "attention_blocks", check_attention_blocks, blocks, [0, 3, 3, 3])


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
    assert pair_texts(prompt, None, pairs, batched, 8) == [{"prompt": texts} for texts in expected]


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
    ],
)
def test_prompts_that_are_none_are_refused(prompt, pairs, batched, error):
    refuses(error, "prompt", pair_prompts, prompt, pairs, batched)


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
    assert [text["prompt"] for text in texts] == [None] * 3
    assert all(torch.equal(text["prompt_embeds"], embeds[2 * i : 2 * i + 2]) for i, text in enumerate(texts))


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
    ],
)
def test_embeddings_that_do_not_fit_are_refused(embeds, error):
    refuses(error, "prompt_embeds", pair_embeds, "prompt_embeds", embeds, 3)


def test_a_prompt_and_embeddings_exclude_each_other():
    embeds = torch.zeros(1, 5, 8)
    refuses(ValueError, "prompt", pair_texts, "a", embeds, 1, False, 8)
    refuses(ValueError, "prompt_embeds", pair_texts, None, embeds, 1, False, 16)
    refuses(ValueError, "negative_prompt", pair_negatives, "a", embeds, 1, 8)
    refuses(ValueError, "negative_prompt_embeds", pair_negatives, None, embeds, 1, 16)


def test_negatives_of_every_pair():
    assert pair_negatives(None, None, 2, 8) == [{"negative_prompt": None}] * 2
    assert pair_negatives("a", None, 2, 8) == [{"negative_prompt": "a"}] * 2
    assert pair_negatives(["a", None], None, 2, 8) == [{"negative_prompt": "a"}, {"negative_prompt": None}]
    embeds = torch.randn(2, 5, 8)
    for i, negative in enumerate(pair_negatives(None, embeds, 2, 8)):
        assert torch.equal(negative["negative_prompt_embeds"], embeds[i : i + 1])


@pytest.mark.parametrize(
    ("prompt", "embeds", "error", "name"),
    [
        (3, None, TypeError, "negative_prompt"),
        (["a", 3], None, TypeError, "negative_prompt"),
        (["a"], None, ValueError, "negative_prompt"),
        (["a", "b", "c"], None, ValueError, "negative_prompt"),
        (None, torch.zeros(4, 5, 8), ValueError, "negative_prompt_embeds"),
        (None, torch.zeros(1, 5, 8), ValueError, "negative_prompt_embeds"),
        (None, "a", TypeError, "negative_prompt_embeds"),
    ],
)
def test_negatives_that_do_not_fit_are_refused(prompt, embeds, error, name):
    refuses(error, name, pair_negatives, prompt, embeds, 2, 8)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_every_pair_draws_the_same_however_many_there_are():
    (alone,) = pair_generators(seeded(), 1)
    drawn = draw_seed(alone)
    assert [draw_seed(generator) for generator in pair_generators(seeded(), 3)] == [drawn] * 3
    assert drawn == draw_seed(seeded())


def test_copies_are_independent_and_the_original_moves_on_by_one_draw():
    generator, expected = seeded(), seeded()
    draw_seed(expected)
    copies = pair_generators(generator, 3)
    assert torch.equal(generator.get_state(), expected.get_state())
    draw_seed(copies[0])
    assert torch.equal(generator.get_state(), expected.get_state())
    assert torch.equal(copies[1].get_state(), seeded().get_state())
    # so that the next call differs
    assert draw_seed(pair_generators(generator, 1)[0]) != draw_seed(seeded())


def test_a_list_of_generators_is_kept():
    generators = [seeded(1), seeded(2)]
    states = [generator.get_state() for generator in generators]
    kept = pair_generators(generators, 2)
    assert all(a is b for a, b in zip(kept, generators, strict=True))
    assert all(torch.equal(g.get_state(), state) for g, state in zip(generators, states, strict=True))


def test_without_a_generator_the_global_one_decides_and_moves_on():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        first, second = draw_seed(None), draw_seed(None)
        assert first != second
        torch.manual_seed(0)
        assert draw_seed(pair_generators(None, 2)[1]) == first
        assert draw_seed(None) == second
    assert draw_seed(seeded()) == first


def test_seeds_use_many_bits():
    generator = seeded()
    seeds = [draw_seed(generator) for _ in range(50)]
    assert len(set(seeds)) == 50
    assert all(type(seed) is int and 0 <= seed < 2**62 for seed in seeds)
    assert max(seeds) > 2**60


@pytest.mark.parametrize(
    ("generator", "pairs"), [(None, 3), (seeded(), 3), ([seeded()], 1), ((seeded(), seeded()), 2)]
)
def test_generators_that_fit_pass(generator, pairs):
    check_generator(generator, pairs)


@pytest.mark.parametrize(
    ("generator", "error"),
    [
        (0, TypeError),
        ("cpu", TypeError),
        ([0, 1], TypeError),
        ([seeded(), None], TypeError),
        ([], ValueError),
        ([seeded()], ValueError),
        ([seeded()] * 3, ValueError),
    ],
)
def test_generators_that_do_not_fit_are_refused(generator, error):
    refuses(error, "generator", check_generator, generator, 2)
