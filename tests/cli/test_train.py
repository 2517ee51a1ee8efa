# SPDX-License-Identifier: Apache-2.0
"""The command lines of the training and of the example pairs; tests/tiny says what they make."""

import subprocess
import sys

import pytest

from dreammover_pipeline.cli.main import main
from dreammover_pipeline.evaluation.examples import PHOTOS, SCENES


@pytest.mark.parametrize(
    ("command", "options", "reason"),
    [
        ("train", "--preset huge", "'quick', 'cpu', 'gpu'"),
        ("train", "--vae-steps 0", "`--vae-steps` must be at least 1"),
        ("train", "--unet-steps -3", "`--unet-steps` must be at least 1"),
        ("train", "--threads 0", "`--threads` must be at least 1"),
        ("train", "--device nowhere", "the device 'nowhere' cannot be used here"),
        ("train", "--minutes soon", "--minutes"),
        ("train", "--minutes nan", "--minutes must be at least 0, not nan"),
        ("train-controlnet", "--preset gpu", "'quick', 'cpu'"),
        ("train-controlnet", "--steps 0", "`--steps` must be at least 1"),
        ("train-controlnet", "--threads 0", "`--threads` must be at least 1"),
        ("train-controlnet", "--model nowhere", "`--model` must be the folder of a checkpoint"),
    ],
)
def test_bad_options_are_refused_before_anything_is_made(tmp_path, capsys, command, options, reason):
    assert main([command, "--out", str(tmp_path / "out"), *options.split()]) == 2
    assert reason in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_folders_that_a_training_cannot_use_are_refused_before_it(tmp_path, capsys):
    (tmp_path / "file").touch()
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "notes.txt").write_text("my own")
    out = str(tmp_path / "out")
    for options, reason in (
        (["--out", str(tmp_path / "file")], "--out: the folder"),
        (["--out", out, "--export", str(tmp_path / "file")], "file' is no folder; name a new one"),
        (["--out", out, "--export", str(mine)], "holds files, but no exported model"),
    ):
        assert main(["train", "--preset", "quick", *options]) == 2
        assert reason in capsys.readouterr().err
    assert [path.name for path in mine.iterdir()] == ["notes.txt"]


def test_examples_replace_no_pictures_of_others(tmp_path, capsys):
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "prompt.txt").write_text("my cat")
    assert main(["draw-examples", str(tmp_path)]) == 2
    assert "is another picture or text" in capsys.readouterr().err
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["prompt.txt"]
    (tmp_path / "cat" / "prompt.txt").unlink()
    for _ in range(2):
        assert main(["draw-examples", str(tmp_path)]) == 0


def test_the_help_needs_no_torch():
    check = (
        "import sys; from dreammover_pipeline.cli.main import main\n"
        "try: main(['train', '--help'])\n"
        "except SystemExit: assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", check], check=True, stdout=subprocess.DEVNULL)


def test_the_examples_are_written(tmp_path):
    assert main(["draw-examples", str(tmp_path / "pairs")]) == 0
    assert {path.name for path in (tmp_path / "pairs").iterdir()} == {*SCENES, *PHOTOS}
    assert (tmp_path / "pairs" / "fish" / "0.500.png").is_file()
