# SPDX-License-Identifier: Apache-2.0
"""What several tests of the drawn world and of the embedded checkpoint's training share."""

import pytest
from support.drawn import SEED

from dreammover_pipeline.tiny import models, recipes
from dreammover_pipeline.tiny.world import World


@pytest.fixture(scope="session")
def scenes():
    """Scenes at 96 px, four in ten with a second sprite; every kind, texture and background is among them."""
    return World(size=96, second_sprite=0.4).sample(20, SEED)


@pytest.fixture(scope="session")
def tokenizer():
    """The tokenizer of the recipe "quick", which is that of the other recipes, too."""
    return models.build_tokenizer(models.WORDS, recipes.PRESETS["quick"].sizes.tokens)
