# SPDX-License-Identifier: Apache-2.0
"""Where the photos of a job are."""

import pytest
from support.batches import plan

from dreammover_pipeline.batch.jobs import find_photos


def test_a_folder_has_one_photo_of_each_end(album):
    (job,) = plan(album, {"folder": "pair"})
    folder = album / "pair"
    with pytest.raises(ValueError, match="cannot be read"):
        find_photos(job)
    folder.mkdir()
    for name in ("0.jpg", "1.webp", "0.250.png", "1.txt", "10.png"):
        (folder / name).touch()
    assert find_photos(job) == (folder / "0.jpg", folder / "1.webp")
    (folder / "1.PNG").touch()
    with pytest.raises(ValueError, match=r"one photo '1\.\*', but it holds 1\.PNG and 1\.webp"):
        find_photos(job)
