# SPDX-License-Identifier: Apache-2.0
"""Photos for batches."""

import pytest
from PIL import Image


@pytest.fixture
def album(tmp_path, photos):
    """A folder with photos `a0.png`, `a1.png`, `b0.png`, …, the pictures of each letter in other colours."""
    folder = tmp_path / "album"
    folder.mkdir()
    for turn, letter in enumerate("abc"):
        for i, photo in enumerate(photos):
            channels = photo.split()
            Image.merge("RGB", channels[turn:] + channels[:turn]).save(folder / f"{letter}{i}.png")
    return folder
