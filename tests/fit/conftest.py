# SPDX-License-Identifier: Apache-2.0
"""A small UNet, a pair of latents with their texts, and a quick fit to them."""

import pytest
from support.fitting import ALPHAS_CUMPROD, random_pair

from dreammover_pipeline.lora import LoraFit, fit_pair_lora


@pytest.fixture
def unet(components):
    return components["unet"]


@pytest.fixture
def pair():
    return random_pair()


@pytest.fixture
def alphas_cumprod():
    return ALPHAS_CUMPROD


@pytest.fixture
def fitted(unet, pair, alphas_cumprod):
    return fit_pair_lora(unet, *pair, alphas_cumprod, LoraFit(3, 4, 1e-2), seed=0)
