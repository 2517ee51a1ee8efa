# SPDX-License-Identifier: Apache-2.0
"""What several tests of the embedded checkpoint's training share."""

import pytest

from dreammover_pipeline.tiny import models, recipes


@pytest.fixture(scope="session")
def tokenizer():
    """The tokenizer of the recipe "quick", which is that of the other recipes, too."""
    return models.build_tokenizer(models.WORDS, recipes.PRESETS["quick"].sizes.tokens)
