# SPDX-License-Identifier: Apache-2.0
"""Where the photos of a job are."""

import os

import pytest
from support.batches import pair, plan

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


def test_a_photo_is_a_regular_file(album):
    (album / "device.png").symlink_to(os.devnull)
    for name, fault in {
        "device.png": "a pipe, a socket or a device",
        ".": "a folder",
        "x.png": "no existing file",
    }.items():
        (job,) = plan(album, pair("a", img1=name))
        with pytest.raises(ValueError, match=rf"^img1 \(.*\) is {fault}; an image file is needed"):
            find_photos(job)
