# SPDX-License-Identifier: Apache-2.0
"""A model in a folder, for commands."""

import pytest

from dreammover_pipeline import DreamMoverPipeline


@pytest.fixture(scope="module")
def model(session_components, tmp_path_factory):
    """The folder of a random model, in diffusers' layout."""
    folder = tmp_path_factory.mktemp("model")
    DreamMoverPipeline(**session_components, requires_safety_checker=False).save_pretrained(folder)
    return str(folder)
