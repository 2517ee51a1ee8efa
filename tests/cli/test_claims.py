# SPDX-License-Identifier: Apache-2.0
"""Commands that work in one folder at the same time, and what they leave of the lock."""

import pytest
from filelock import FileLock

from dreammover_pipeline.cli.claims import LOCK, claimed
from dreammover_pipeline.cli.main import main


def test_a_folder_is_claimed_once_and_again_when_it_is_free(tmp_path):
    folder = tmp_path / "folder"
    refused = pytest.raises(RuntimeError, match=rf"another process is testing and uses '{folder}'; wait until it ends")
    with claimed(folder, "testing"):
        with refused, claimed(folder, "testing"):
            pytest.fail("two have the folder")
        (folder / "result").touch()
    with claimed(folder, "testing"):
        assert (folder / "result").is_file()


@pytest.mark.parametrize("temporary", [False, True])
def test_a_temporary_folder_that_stays_empty_is_removed(tmp_path, temporary):
    with pytest.raises(ValueError, match=r"nothing"), claimed(tmp_path / "folder", "testing", temporary):
        raise ValueError("nothing came of it")
    assert (tmp_path / "folder").exists() != temporary


@pytest.mark.parametrize(
    ("command", "work"),
    [
        ("train --preset quick --out", "training"),
        ("train-controlnet --preset quick --out", "training"),
        ("evaluate --quick --output", "evaluating"),
    ],
)
def test_a_command_leaves_a_folder_to_the_one_that_has_it(tmp_path, capsys, command, work):
    if work == "evaluating":
        pytest.importorskip("skimage")
        pytest.importorskip("cv2")
    with FileLock(tmp_path / LOCK):
        assert main([*command.split(), str(tmp_path), "--device", "cpu"]) == 1
    assert f"another process is {work} and uses '{tmp_path}'; wait until it ends" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir() if path.name != LOCK] == []
