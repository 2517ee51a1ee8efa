# SPDX-License-Identifier: Apache-2.0
"""What callers may pass becomes checked pairs: photos decoded once, generators dealt out."""

import pytest
import torch
from support.errors import refuses

from dreammover_pipeline.pairs import check_generator, draw_seed, pair_seeds


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_every_pair_has_the_same_seed_however_many_there_are():
    (alone,) = pair_seeds(seeded(), 1)
    assert pair_seeds(seeded(), 3) == [alone] * 3
    assert alone == draw_seed(seeded())


def test_a_generator_moves_on_by_one_draw_so_that_the_next_call_differs():
    generator, expected = seeded(), seeded()
    draw_seed(expected)
    seeds = pair_seeds(generator, 3)
    assert torch.equal(generator.get_state(), expected.get_state())
    assert pair_seeds(generator, 1)[0] != seeds[0]


def test_of_a_list_every_generator_gives_the_seed_of_its_pair():
    generators = [seeded(1), seeded(2)]
    assert pair_seeds(generators, 2) == [draw_seed(seeded(1)), draw_seed(seeded(2))]


def test_without_a_generator_the_global_one_decides_and_moves_on():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        first, second = draw_seed(None), draw_seed(None)
        assert first != second
        torch.manual_seed(0)
        assert pair_seeds(None, 2) == [first, first]
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
