# SPDX-License-Identifier: Apache-2.0
"""`dreammover interpolate` of more than two photos, in process."""

import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.sequences import FEW_STEPS, three_photos, through

from dreammover_pipeline import DreamMoverPipeline
from dreammover_pipeline.cli.main import main

SHORT = ["--steps=3", "--inversion-steps=2", "--feature-step=1", "--lora-steps=2", "--device=cpu", "--seed=3"]


@pytest.fixture(scope="module")
def album(photos):
    return three_photos(photos)


@pytest.fixture
def fast(fast):
    return {**fast, **FEW_STEPS, "detail": "photos"}


@pytest.fixture
def loaded(model):
    """The pipeline that the command loads.

    It is not `pipe`, which has the same weights: from a safetensors file they lie at other addresses, and on some
    processors the products with a matrix that is not aligned are rounded otherwise.
    """
    pipe = DreamMoverPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def chain(model, album, tmp_path, monkeypatch, restored_logging):
    """In a folder with three photos: what `interpolate` is to be given."""
    monkeypatch.chdir(tmp_path)
    names = [f"{name}.png" for name in "abc"]
    for photo, name in zip(album, names, strict=True):
        photo.save(name)
    return ["interpolate", *names, "--model", model, "--prompt", "a fish", *SHORT]


def frames_in(folder):
    return [np.asarray(Image.open(path)) for path in sorted(Path(folder).iterdir())]


def expected(pipe, album, fast, **arguments):
    return through(pipe, album, {**fast, "lora_steps": 2, "output_type": "pil"}, **arguments).frames[0]


def test_the_command_makes_what_python_makes(chain, loaded, album, fast, capsys):
    assert main([*chain, "--duration", "0.5,0.25", "--fps", "8", "-o", "out", "--sheet", "sheet.png", "--quiet"]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("out: 7 frames in ")
    assert captured.err == ""
    np.testing.assert_array_equal(frames_in("out"), expected(loaded, album, fast, n_frames=[3, 1]))
    assert sorted(os.listdir()) == ["a.png", "b.png", "c.png", "out", "sheet.png"]


def test_one_lora_a_size_and_a_length(chain, loaded, album, fast):
    options = ["--one-lora", "--size", "64x48", "--duration", "1", "--fps", "7", "--compare", "beside"]
    assert main([*chain, *options, "-o", "out", "--quiet"]) == 0
    frames = expected(loaded, album, fast, lora="shared", width=64, height=48, n_frames=[2, 2])
    np.testing.assert_array_equal(frames_in("out"), frames)
    assert len(frames_in("beside")) == 7


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize(("other", "lora", "missing"), [([], "gap", 1), (["--one-lora"], "shared", 2)])
def test_after_a_kill_the_command_makes_what_is_missing(chain, loaded, album, fast, capsys, other, lora, missing):

    def kill():
        deadline = time.monotonic() + 60
        while not list(Path("out.parts").glob("gap_0001_*")) and time.monotonic() < deadline:
            time.sleep(0.005)
        os.kill(os.getpid(), signal.SIGINT)

    watcher = threading.Thread(target=kill)
    watcher.start()
    command = [*chain, "--frames", "3", "-o", "out"]
    assert main(command) == 130
    watcher.join()
    assert not Path("out").exists()
    assert not list(Path("out.parts").glob("gap_0002_*"))
    capsys.readouterr()
    assert main([*command, *other]) == 0
    assert capsys.readouterr().err.count("Denoising:   0%") == missing  # 100% may be drawn twice
    np.testing.assert_array_equal(frames_in("out"), expected(loaded, album, fast, lora=lora))
    assert not Path("out.parts").exists()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ("--frames 3,4,5", "--frames has 3 numbers, but 3 photos have 2 gaps"),
        ("--frames 3,many", "invalid int value: '3,many'"),
        ("--duration 1,0.05", "a gap cannot last 0.05 s"),
        ("--duration 1,nan", "a duration must be above 0 and at most 86400 seconds, not nan"),
        ("--duration 1e308,1 --fps 1000", "a duration must be above 0 and at most 86400 seconds, not 1e+308"),
        ("--duration 1,1 --frames 3", "leave one of them out"),
        ("--duration 0.25", "too short for a frame in each of the 2 gaps"),
        ("--duration 1 --frames 3", "leave one of them out"),
        ("--prompt another", "2 entries for 3 photos"),
        ("--flow flow.png", "--flow is about one pair of photos, but 3 came"),
        ("--sources sources.png", "--sources is about one pair of photos, but 3 came"),
        ("--points [[[1,2],[3,4]]]", "--points is about one pair"),
        ("--save-pair pair.safetensors", "--save-pair is about one pair"),
        ("missing.png", "photo 4"),
        ("--frames 3,0,1 c.png", "`n_frames[1]` must be at least 1"),
        ("--fusion none", "two_level"),
        ("--size 8x8", "each side must have"),
    ],
)
def test_what_a_sequence_cannot_have_is_refused_and_nothing_is_left(chain, capsys, options, reason):
    before = sorted(os.listdir())
    photos, rest = chain[:4], chain[4:]
    extra = [part for part in options.split() if part.endswith(".png") and part not in ("flow.png", "sources.png")]
    options = [part for part in options.split() if part not in extra]
    assert main([*photos, *extra, *rest, *options, "-o", "out.mp4"]) == 2
    assert reason in capsys.readouterr().err
    assert sorted(os.listdir()) == before


def test_a_name_that_leaves_no_room_for_the_gaps_is_refused(chain, capsys):
    assert main([*chain, "-o", "o" * 250]) == 2
    assert "its name has 256 bytes, and at most" in capsys.readouterr().err


def test_gaps_are_not_kept_where_something_else_is(chain, capsys):
    Path("out.mp4.parts").mkdir()
    Path("out.mp4.parts", "diary.txt").write_text("mine")
    assert main([*chain, "-o", "out.mp4"]) == 2
    assert "holds something else, 'diary.txt'" in capsys.readouterr().err
    assert os.listdir("out.mp4.parts") == ["diary.txt"]


def test_gaps_are_not_kept_behind_a_link(chain, capsys):
    Path("elsewhere").mkdir()
    Path("out.mp4.parts").symlink_to("elsewhere")
    assert main([*chain, "-o", "out.mp4"]) == 2
    assert "there is a symbolic link of that name; move it away" in capsys.readouterr().err
    assert Path("out.mp4.parts").is_symlink()
    assert os.listdir("elsewhere") == []


def test_two_photos_have_one_gap(chain, capsys):
    assert main([*chain[:3], *chain[4:], "--frames", "3,4", "-o", "out"]) == 2
    assert "--frames has 2 numbers, but 2 photos have 1 gap;" in capsys.readouterr().err
