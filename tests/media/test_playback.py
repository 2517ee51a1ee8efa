# SPDX-License-Identifier: Apache-2.0
"""Frames as they are played: holds, there and back, lengths in seconds; and the commands' options for it."""

import math
from itertools import pairwise

import pytest
from PIL import Image
from support.pages import EXAMPLES

from dreammover_pipeline.cli.main import main
from dreammover_pipeline.media.files import check_still, write_video
from dreammover_pipeline.media.playback import frames_to_fill, play


def test_without_options_frames_are_played_as_they_are():
    assert play("abcd", 16) == list("abcd")


def test_a_hold_shows_either_end_for_so_many_seconds():
    assert "".join(play("abcd", 10, hold=0.3)) == "aaabcddd"
    assert "".join(play("abcd", 10, hold=0.04)) == "abcd"  # an end is shown once at least


def test_there_and_back_shows_neither_end_twice_when_repeated():
    assert "".join(play("abcd", 10, ping_pong=True)) == "abcdcb"
    assert "".join(play("abcd", 10, hold=0.2, ping_pong=True)) == "aabcddcb"
    repeated = play("abcd", 10, ping_pong=True) * 2
    assert all(a != b for a, b in pairwise(repeated))
    assert play("ab", 10, ping_pong=True) == list("ab")


@pytest.mark.parametrize("ping_pong", [False, True])
@pytest.mark.parametrize("hold", [0, 0.5])
@pytest.mark.parametrize(("duration", "fps"), [(2, 16), (3.3, 24), (2, 12.5)])
def test_a_duration_is_filled_to_a_frame(duration, fps, hold, ping_pong):
    between = frames_to_fill(duration, fps, hold, ping_pong)
    shown = play(range(between + 2), fps, hold, ping_pong)
    assert 0 <= round(duration * fps) - len(shown) <= ping_pong


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ((math.inf, 16), "seconds, not inf"),
        ((math.nan, 16), "seconds, not nan"),
        ((-1, 16), "seconds, not -1"),
        ((0.1, 16), r"the shortest is 0\.188 s"),
        ((1, 16, 0.5), r"the shortest is 1\.06 s"),
        ((0.4, 16, 0, False, 3), r"in each of the 3 gaps.*the shortest is 0\.438 s"),
        ((1, 16, -1), "0 to 86400 seconds, not -1"),
        ((1, 16, math.nan), "0 to 86400 seconds, not nan"),
    ],
)
def test_durations_that_cannot_be_are_refused(arguments, reason):
    with pytest.raises(ValueError, match=reason):
        frames_to_fill(*arguments)


def test_the_shortest_duration_is_just_long_enough():
    assert frames_to_fill(1.0625, 16, 0.5) == 1
    assert frames_to_fill(0.25, 16, 0, True) == 1
    assert frames_to_fill(0.4375, 16, gaps=3) == 5  # a frame in each gap, and the two photos between the gaps


def test_one_frame_is_nothing_to_play():
    with pytest.raises(ValueError, match="1 frames came"):
        play("a", 16)


PHOTOS = [str(EXAMPLES / "fish" / f"{i}.png") for i in (0, 1)]
TINY = ["--model=tiny", "--device=cpu", "--quiet"]
SHORT = ["--steps=10", "--inversion-steps=2", "--feature-step=2", "--lora-steps=0"]


def test_a_gif_lasts_as_long_as_asked_for(tmp_path, capsys, restored_logging):
    path = tmp_path / "out.gif"
    play_options = ["--duration=1", "--fps=10", "--hold=0.3", "--ping-pong", "--easing=ease-in"]
    assert main(["interpolate", *PHOTOS, *TINY, *SHORT, *play_options, "-o", str(path)]) == 0
    assert "10 frames in" in capsys.readouterr().out
    durations = []
    with Image.open(path) as gif:
        for index in range(gif.n_frames):
            gif.seek(index)
            durations.append(gif.info["duration"])
    assert durations == [300, 100, 100, 300, 100, 100]  # equal neighbours are one frame


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ("--duration 2 --frames 3", "leave one of them out"),
        ("--duration 0", "seconds, not 0.0"),
        ("--hold -1", "0 to 86400 seconds, not -1.0"),
        ("--easing bounce", "'ease-in-out'"),
        ("--endpoints none", "'original', 'reconstructed'"),
    ],
)
def test_bad_options_are_refused(tmp_path, capsys, restored_logging, options, reason):
    output = tmp_path / "out.mp4"
    assert main(["interpolate", *PHOTOS, *TINY, *options.split(), "-o", str(output)]) == 2
    assert reason in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", ["--output", "--compare"])
@pytest.mark.parametrize(("fps", "hold", "still"), [("1", "656", "656.0"), ("18", "655.5", "655.5")])
def test_a_gif_that_would_stand_still_for_too_long_is_refused(
    tmp_path, capsys, restored_logging, option, fps, hold, still
):
    paths = {"--output": "out.mp4", option: "out.gif"}
    options = [part for name, path in paths.items() for part in (name, str(tmp_path / path))]
    assert main(["interpolate", *PHOTOS, *TINY, *options, "--fps", fps, "--hold", hold]) == 2
    error = capsys.readouterr().err
    assert "a picture can stand still for 655.35 s at most in" in error
    assert f"not for {still} s" in error
    assert not list(tmp_path.iterdir())


def test_a_gif_stands_still_for_as_long_as_its_format_can_say(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    check_still(655, 1, tmp_path / "out.gif")
    write_video(play(frames, 1, hold=655), tmp_path / "out.gif", fps=1)
    with Image.open(tmp_path / "out.gif") as gif:
        assert (gif.n_frames, gif.info["duration"]) == (2, 655_000)
    with pytest.raises(ValueError, match=r"655\.35 s at most in '.*out\.gif', not for 656\.0 s"):
        check_still(656, 1, tmp_path / "out.gif")
    check_still(656, 1, tmp_path / "out.mp4")
    check_still(656, 1, tmp_path / "out")
