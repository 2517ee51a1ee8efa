# SPDX-License-Identifier: Apache-2.0
"""The DDIM algebra: its identities, its values at known points, and the precision it keeps."""

from __future__ import annotations

import pytest
import torch
from support.elsewhere import DEVICE, elsewhere

from dreammover_pipeline.ddim import eps_from_v, predict_clean, recompose, v_from_eps, working_dtype

FUNCTIONS = [predict_clean, recompose, eps_from_v, v_from_eps]
ALPHA_BARS = [
    1.0,
    0.9991,
    0.5,
    0.0047,
    torch.tensor(0.3, dtype=torch.float64),
    torch.tensor([0.99, 0.4, 0.01], dtype=torch.float64),
]
alpha_bars = pytest.mark.parametrize("alpha_bar", ALPHA_BARS, ids=lambda value: str(getattr(value, "shape", value)))


@pytest.fixture
def two():
    """A latent and a noise, (3, 4, 5, 6) in float64."""
    return torch.randn(2, 3, 4, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def assert_exact(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@alpha_bars
def test_predict_clean_undoes_recompose(two, alpha_bar):
    clean, eps = two
    assert_exact(predict_clean(recompose(clean, eps, alpha_bar), eps, alpha_bar), clean)


@alpha_bars
def test_recompose_undoes_predict_clean(two, alpha_bar):
    latents, eps = two
    assert_exact(recompose(predict_clean(latents, eps, alpha_bar), eps, alpha_bar), latents)


@alpha_bars
def test_v_stands_for_the_noise_and_the_clean_latent(two, alpha_bar):
    clean, eps = two
    latents, v = recompose(clean, eps, alpha_bar), v_from_eps(clean, eps, alpha_bar)
    assert_exact(eps_from_v(v, latents, alpha_bar), eps)
    assert_exact(predict_clean(latents, eps_from_v(v, latents, alpha_bar), alpha_bar), clean)
    # (z, v) is (z0, ε) turned by an angle
    assert_exact(latents**2 + v**2, clean**2 + eps**2)


def test_values_at_signal_0_8_and_noise_0_6():
    one, two = torch.ones(1, 1, 1, 1, dtype=torch.float64), torch.full((1, 1, 1, 1), 2.0, dtype=torch.float64)
    assert_exact(recompose(one, two, 0.64), 2 * one)  # 0.8·1 + 0.6·2
    assert_exact(v_from_eps(one, two, 0.64), one)  # 0.8·2 − 0.6·1
    assert_exact(eps_from_v(one, two, 0.64), 2 * one)  # 0.8·1 + 0.6·2
    assert_exact(predict_clean(two, two, 0.64), one)  # (2 − 0.6·2) / 0.8


def test_ends_of_the_schedule_are_exact(two):
    clean, eps = two
    assert torch.equal(recompose(clean, eps, 1.0), clean)
    assert torch.equal(recompose(clean, eps, 0.0), eps)
    assert torch.equal(predict_clean(clean, eps, 1.0), clean)
    assert torch.equal(v_from_eps(clean, eps, 1.0), eps)
    assert torch.equal(v_from_eps(clean, eps, 0.0), -clean)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_one_alpha_bar_a_sample_is_a_loop_over_samples(two, function):
    a, b = two
    each = [0.99, 0.4, 0.01]
    loop = torch.cat([function(a[i : i + 1], b[i : i + 1], alpha_bar) for i, alpha_bar in enumerate(each)])
    assert_exact(function(a, b, torch.tensor(each, dtype=torch.float64)), loop)
    assert_exact(function(a, b, torch.tensor(0.4, dtype=torch.float64)), function(a, b, 0.4))


@pytest.mark.parametrize(
    "alpha_bar",
    [0.4, torch.tensor(0.4), torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.4, 0.5, 0.6], dtype=torch.float64)],
    ids=["float", "0-d", "B", "B-float64"],
)
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_computes_in_its_inputs_precision_and_at_least_float32(two, function, dtype, alpha_bar):
    a, b = two.to(dtype)
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert working_dtype(a) == expected
    result = function(a, b, alpha_bar)
    assert result.dtype == expected
    assert torch.equal(result, function(a.to(expected), b.to(expected), alpha_bar))


@pytest.mark.parametrize("alpha_bar", [torch.tensor(0.4), torch.tensor([0.4, 0.5, 0.6])], ids=["0-d", "B"])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_alpha_bars_may_lie_on_the_cpu_and_the_latents_on_a_device(two, function, alpha_bar):
    a, b = two.float()
    with elsewhere():
        result = function(a.to(DEVICE), b.to(DEVICE), alpha_bar).held
    torch.testing.assert_close(result, function(a, b, alpha_bar), rtol=1e-6, atol=1e-6)


def test_half_noise_does_not_drag_float32_latents_down(two):
    latents, eps = two[0].float(), two[1].half()
    assert torch.equal(predict_clean(latents, eps, 0.4), predict_clean(latents, eps.float(), 0.4))


@pytest.mark.parametrize("function", FUNCTIONS)
def test_leaves_its_inputs_alone(two, function):
    before, alpha_bar = two.clone(), torch.tensor([0.99, 0.4, 0.01])
    function(*two, alpha_bar)
    assert torch.equal(two, before)
    assert torch.equal(alpha_bar, torch.tensor([0.99, 0.4, 0.01]))
