# SPDX-License-Identifier: Apache-2.0
"""How often Pillow decodes the pixels of files."""

from collections import Counter
from pathlib import Path

from PIL import ImageFile


def count_decodes(monkeypatch):
    """From now on, how often each file's pixels are decoded, by the file's name."""
    decodes, load = Counter(), ImageFile.ImageFile.load

    def counted(image):
        if image.tile:  # what is still to be decoded
            decodes[Path(image.filename or image.fp.name).name] += 1
        return load(image)

    monkeypatch.setattr(ImageFile.ImageFile, "load", counted)
    return decodes
