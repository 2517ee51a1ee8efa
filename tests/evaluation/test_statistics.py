# SPDX-License-Identifier: Apache-2.0
"""Means with intervals, and paired differences."""

import numpy as np
import pytest

from dreammover_pipeline.evaluation.statistics import estimate, paired_difference


def test_an_estimate_is_the_mean_with_a_sane_interval():
    values = np.random.default_rng(1).normal(3, 2, 400)
    found = estimate(values)
    assert found.mean == pytest.approx(values.mean())
    half = 1.96 * values.std() / 20  # the normal approximation
    assert found.low == pytest.approx(found.mean - half, abs=0.1 * half)
    assert found.high == pytest.approx(found.mean + half, abs=0.1 * half)
    assert estimate(values) == found
    assert estimate([2.0] * 7).low == estimate([2.0] * 7).high == 2
    assert str(estimate([1.5])) == "1.500"
    with pytest.raises(ValueError, match="nothing"):
        estimate([])


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    rng = np.random.default_rng(0)
    covered = [found.low <= 0 <= found.high for found in (estimate(rng.normal(0, 1, 20)) for _ in range(200))]
    assert 0.88 < np.mean(covered) < 0.98


def test_a_known_difference_is_found_and_none_is_not():
    rng = np.random.default_rng(0)
    hard = rng.normal(20, 5, 30)  # pairs differ far more than methods do
    base = dict(enumerate(hard + rng.normal(0, 0.2, 30)))
    better = dict(enumerate(hard + 0.5 + rng.normal(0, 0.2, 30)))
    difference = paired_difference(better, base)
    assert difference.excludes_zero
    assert difference.low < 0.5 < difference.high
    assert difference.high - difference.low < 0.5
    nothing = paired_difference(dict(enumerate(hard + rng.normal(0, 0.2, 30))), base)
    assert nothing.low < 0 < nothing.high
    assert not nothing.excludes_zero


def test_only_shared_pairs_are_compared_and_few_prove_nothing():
    assert paired_difference({1: 5.0, 2: 7.0}, {2: 4.0, 3: 1.0}).mean == 3
    assert paired_difference({1: 5.0}, {2: 4.0}) is None
    few = paired_difference(dict.fromkeys(range(5), 2.0), dict.fromkeys(range(5), 1.0))
    assert few.low == 1
    assert not few.excludes_zero
    assert paired_difference(dict.fromkeys(range(6), 2.0), dict.fromkeys(range(6), 1.0)).excludes_zero
