# SPDX-License-Identifier: Apache-2.0
"""`dreammover poses`; tests/media/test_people.py says how points are mapped and drawn."""

from __future__ import annotations

import json
import shlex
import sys

import numpy as np
import pytest
from PIL import Image, ImageOps

from dreammover_pipeline.cli.main import main
from dreammover_pipeline.poses import people_of_photos


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """Two photos in the folder to work in, of nobody."""
    monkeypatch.chdir(tmp_path)
    for name in ("a.png", "b.png"):
        Image.new("RGB", (60, 40), "grey").save(name)
    return ["a.png", "b.png"]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_without_the_extra_it_says_how_to_install_it(photos, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "mediapipe.python.solutions.pose", None)
    assert main(["poses", *photos, "-o", "poses", "--picture", "found.png"]) == 1
    assert "pip install 'dreammover-pipeline[poses]'" in capsys.readouterr().err
    assert names(tmp_path) == photos


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ("a.png none.png -o poses", "photo B (none.png) is no existing file"),
        ("a.png b.png -o none/poses", "there is no folder"),
        ("a.png b.png -o taken.json", "there is a folder of that name"),
        ("a.png b.png -o poses --picture found.gif", "allowed are .png, .jpg, .jpeg"),
        ("a.png b.png -o poses --picture b.png", "writing 'b.png' would replace 'b.png'"),
        ("a.png poses_1.json -o poses", "writing 'poses_1.json' would replace 'poses_1.json'"),
        ("a.png b.png", "-o/--output"),
    ],
)
def test_bad_paths_are_refused_before_anything_is_found(photos, tmp_path, monkeypatch, capsys, options, reason):
    monkeypatch.setitem(sys.modules, "mediapipe.python.solutions.pose", None)  # which would be named in the error
    (tmp_path / "taken_1.json").mkdir()
    assert main(["poses", *options.split()]) == 2
    assert reason in capsys.readouterr().err
    assert names(tmp_path) == [*photos, "taken_1.json"]


@pytest.fixture
def astronaut():
    """A photo of a person down to the waist, where there is the detector to find her."""
    pytest.importorskip("mediapipe.python.solutions.pose", reason="the extra 'poses' is not installed")
    return Image.fromarray(pytest.importorskip("skimage.data").astronaut())


def test_poses_are_written_as_the_pipeline_takes_them(astronaut, photos, tmp_path, capsys):
    """The second photo is the first one's mirror image, stored on its side as phones do."""
    astronaut.save("a.png")
    turned = Image.Exif()
    turned[274] = 6
    ImageOps.mirror(astronaut).transpose(Image.Transpose.ROTATE_90).save("b.png", exif=turned)
    assert main(["poses", *photos, "-o", "my poses.json", "--picture", "found.png"]) == 0
    option, *files = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert (option, files) == ("--poses", ["my poses_0.json", "my poses_1.json"])
    assert names(tmp_path) == ["a.png", "b.png", "found.png", *files]
    first, last = people_of_photos(files, [(512, 512)] * 2)[:, 0].numpy()
    mirrored = last[[0, 1, *range(5, 8), *range(2, 5), *range(11, 14), *range(8, 11), 15, 14, 17, 16]]
    both = (first[:, 2] > 0) & (mirrored[:, 2] > 0)
    assert both.sum() >= 8, "the face, the neck and the shoulders at least"
    assert np.abs(511 - mirrored[both, 0] - first[both, 0]).max() < 25
    assert np.abs(mirrored[both, 1] - first[both, 1]).max() < 25
    assert json.loads((tmp_path / files[0]).read_text())["version"] == 1.3


def test_photos_of_nobody_are_named_and_nothing_is_written(astronaut, photos, tmp_path, capsys):
    astronaut.save("a.png")
    assert main(["poses", *photos, "-o", "poses", "--picture", "found.png"]) == 2
    assert "nobody was found in photo B ('b.png'), so nothing was written" in capsys.readouterr().err
    assert names(tmp_path) == photos
