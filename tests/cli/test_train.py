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
