# SPDX-License-Identifier: Apache-2.0
"""Files are read back with other code than wrote them, and a failure leaves what was there."""

import os
import re
import subprocess

import imageio.v3 as iio
import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image, ImageSequence
from support.programs import LATE_FAILURE

from dreammover_pipeline.media.files import (
    check_fps,
    check_picture_path,
    check_replaceable,
    check_video_path,
    video_size,
    write_picture,
    write_video,
    write_video_or_keep,
)

KINDS = ["out.mp4", "out.gif", "out"]


def make_frames(count=5, size=(48, 32)):
    """Smooth, colourful frames, all different: what a codec should keep."""
    x, y = np.meshgrid(np.linspace(0, 1, size[0]), np.linspace(0, 1, size[1]))
    levels = np.linspace(0, 1, count)
    return [Image.fromarray((np.stack([x, y, np.full_like(x, t)], -1) * 255).astype(np.uint8)) for t in levels]


def pixels(frames):
    return np.stack([np.asarray(frame.convert("RGB"), dtype=float) for frame in frames])


def snapshot(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("size", [(48, 32), (47, 32), (48, 31), (47, 31), (1, 1)])
def test_mp4_reads_back_and_odd_sizes_repeat_their_edge(tmp_path, size):
    frames = make_frames(size=size)
    write_video(frames, tmp_path / "out.mp4", fps=24)
    video = iio.imread(tmp_path / "out.mp4").astype(float)
    expected = np.pad(pixels(frames), ((0, 0), (0, size[1] % 2), (0, size[0] % 2), (0, 0)), mode="edge")
    assert video.shape == expected.shape
    assert np.abs(video - expected).mean() < 3
    metadata = iio.immeta(tmp_path / "out.mp4", plugin="FFMPEG")
    assert (metadata["codec"], metadata["fps"]) == ("h264", 24)
    assert metadata["pix_fmt"].startswith("yuv420p")


@pytest.mark.parametrize(
    ("size", "fps", "expected"),
    [
        ((48, 31), 16, (48, 32)),
        ((1, 1), 1000, (2, 2)),
        ((4096, 2304), 16, (4096, 2304)),  # the largest frames of level 5.2
        ((3840, 2160), 64, (3840, 2160)),
        ((8688, 64), 30, (8688, 64)),
        ((4000, 3000), 16, (3542, 2656)),
        ((3000, 4000), 16, (2656, 3542)),
        ((4000, 3000), 60, (3424, 2568)),
        ((16390, 300), 16, (8688, 160)),
    ],
)
def test_an_mp4_is_no_larger_than_many_players_take(size, fps, expected):
    assert video_size(size, "out.mp4", fps) == expected
    assert video_size(size, "out.gif", 10) == video_size(size, "out", fps) == size


@pytest.mark.parametrize(("size", "fps"), [((16390, 40), 16), ((1024, 768), 1000)])
def test_frames_that_are_too_large_are_scaled_in_an_mp4(tmp_path, size, fps):
    frames = make_frames(count=3, size=size)
    write_video(frames, tmp_path / "out.mp4", fps)
    video = iio.imread(tmp_path / "out.mp4").astype(float)
    width, height = video_size(size, "out.mp4", fps)
    assert width < size[0]
    assert video.shape == (3, height, width, 3)
    assert np.abs(video - pixels(frame.resize((width, height)) for frame in frames)).mean() < 3
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-i", str(tmp_path / "out.mp4")]
    command += ["-c", "copy", "-bsf:v", "trace_headers", "-f", "null", "-"]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    assert int(re.search(r"level_idc.* = (\d+)", told)[1]) <= 52
    assert "SAR" not in told or "SAR 1:1" in told


def test_mp4_keeps_flat_colours(tmp_path):
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (200, 120, 40), (255, 255, 255), (0, 0, 0)]
    write_video([Image.new("RGB", (32, 32), colour) for colour in colours], tmp_path / "out.mp4", fps=10)
    np.testing.assert_allclose(iio.imread(tmp_path / "out.mp4")[:, 16, 16], colours, atol=3)


@pytest.mark.parametrize("fps", [0.5, 23.976, 30, 120])
def test_mp4_has_the_frame_rate_asked_for(tmp_path, fps):
    write_video(make_frames(count=30), tmp_path / "out.mp4", fps)
    metadata = iio.immeta(tmp_path / "out.mp4", plugin="FFMPEG")
    assert metadata["fps"] == pytest.approx(fps, abs=0.01)
    assert metadata["duration"] == pytest.approx(30 / fps, abs=0.02)


@pytest.mark.parametrize(
    ("fps", "lengths"), [(16, {60, 70}), (30, {30, 40}), (40, {20, 30}), (50, {20}), (0.5, {2000})]
)
def test_gif_reads_back(tmp_path, fps, lengths):
    frames = make_frames(size=(47, 31))
    write_video(frames, tmp_path / "out.gif", fps)
    with Image.open(tmp_path / "out.gif") as gif:
        assert (gif.n_frames, gif.info["loop"]) == (len(frames), 0)
        shown, durations = [], []
        for frame in ImageSequence.Iterator(gif):
            shown.append(frame.convert("RGB"))
            durations.append(frame.info["duration"])
    assert set(durations) == lengths
    assert sum(durations) == pytest.approx(1000 * len(frames) / fps, abs=5)  # it counts in hundredths of a second
    assert np.abs(pixels(shown) - pixels(frames)).mean() < 6  # 256 dithered colours


def test_folder_holds_the_exact_frames(tmp_path):
    frames = make_frames(count=12)
    write_video(iter(frames), f"{tmp_path}/run.2/", fps=16)
    files = sorted((tmp_path / "run.2").iterdir())
    assert [path.name for path in files] == [f"frame_{index:04d}.png" for index in range(12)]
    np.testing.assert_array_equal(pixels(Image.open(path) for path in files), pixels(frames))


def test_a_new_folder_replaces_the_old_one_whole(tmp_path):
    write_video(make_frames(count=5), tmp_path / "out", fps=16)
    write_video(make_frames(count=3), tmp_path / "out", fps=16)
    assert sorted(snapshot(tmp_path)) == [
        (tmp_path / "out" / f"frame_{i:04d}.png").relative_to(tmp_path) for i in range(3)
    ]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("existing", [True, False])
def test_a_failure_half_way_leaves_what_was_there(tmp_path, kind, error, existing):
    if existing:
        write_video(make_frames(), tmp_path / kind, fps=16)
    before = snapshot(tmp_path)

    def failing():
        yield from make_frames(count=3)
        raise error

    with pytest.raises(error):
        write_video(failing(), tmp_path / kind, fps=16)
    assert snapshot(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == [kind] * existing


@pytest.mark.parametrize("kind", KINDS)
def test_frames_must_be_some_and_of_one_size(tmp_path, kind):
    with pytest.raises(ValueError, match="at least one frame"):
        write_video([], tmp_path / kind, fps=16)
    with pytest.raises(ValueError, match=r"frame 0 has \(48, 32\) and frame 1 has \(8, 8\)"):
        write_video([*make_frames(count=1), *make_frames(count=1, size=(8, 8))], tmp_path / kind, fps=16)
    assert not list(tmp_path.iterdir())


def test_a_failing_encoder_is_an_error_and_leaves_the_old_file(tmp_path, program):
    (tmp_path / "out.mp4").write_bytes(b"finished")
    program(LATE_FAILURE)
    with pytest.raises(RuntimeError, match="ffmpeg could not write the video: no more room"):
        write_video(make_frames(), tmp_path / "out.mp4", fps=16)
    assert snapshot(tmp_path) == {(tmp_path / "out.mp4").relative_to(tmp_path): b"finished"}


def test_an_encoder_that_stops_before_the_last_frame_is_an_error(tmp_path, program):
    program('case "$*" in *-encoders*) echo libx264;; *) for last; do :; done; echo part > "$last"; exit 0;; esac')
    with pytest.raises(RuntimeError, match="ffmpeg could not write the video"):
        write_video(make_frames(size=(400, 300)), tmp_path / "out.mp4", fps=16)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("script", "fault"),
    [
        ("exit 1", "does not work as ffmpeg"),
        ("echo other encoders", "has no encoder libx264"),
        ("echo \"Unknown encoder 'libx264'\" >&2; exit 1", "does not work as ffmpeg"),
    ],
)
def test_an_ffmpeg_that_cannot_encode_is_refused_before_there_are_frames(tmp_path, program, script, fault):
    program(script)
    with pytest.raises(RuntimeError, match=f"{fault}.*write a .gif or a folder of PNGs instead"):
        check_video_path(tmp_path / "out.mp4")
    check_video_path(tmp_path / "out.gif")
    check_video_path(tmp_path / "out")


def test_frames_are_kept_where_the_video_cannot_be_written(tmp_path, program):
    program(LATE_FAILURE)
    frames = make_frames()
    with pytest.raises(RuntimeError, match="no more room; the 5 frames are kept in '") as caught:
        write_video_or_keep(frames, tmp_path / "out.mp4", fps=16)
    (folder,) = tmp_path.iterdir()
    assert str(folder) in str(caught.value)
    kept = [Image.open(path) for path in sorted(folder.iterdir())]
    assert np.array_equal(pixels(kept), pixels(frames))


def test_frames_are_kept_elsewhere_where_there_is_no_place_beside_the_video(tmp_path, monkeypatch):
    temporary, current = tmp_path / "temporary", tmp_path / "current"
    for folder in (temporary, current):
        folder.mkdir()
    monkeypatch.chdir(current)
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    for place in (temporary, current):
        with pytest.raises(RuntimeError, match=re.escape(f"the 5 frames are kept in '{place}")):
            write_video_or_keep(make_frames(), tmp_path / "missing" / "a.gif", fps=16)
        assert len(list(place.glob("*/frame_*.png"))) == 5
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "missing"))


@pytest.mark.skipif(os.name != "posix", reason="the current folder can be removed only on POSIX")
def test_frames_that_cannot_be_kept_anywhere_are_said_to_be_lost(tmp_path, monkeypatch):
    (tmp_path / "current").mkdir()
    monkeypatch.chdir(tmp_path / "current")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "missing"))
    (tmp_path / "current").rmdir()
    with pytest.raises(RuntimeError, match="nor could the frames be kept anywhere"):
        write_video_or_keep(make_frames(), tmp_path / "missing" / "a.gif", fps=16)


def test_an_mp4_says_what_its_colours_are(tmp_path):
    write_video(make_frames(), tmp_path / "out.mp4", fps=16)
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-i", str(tmp_path / "out.mp4")]
    told = subprocess.run(command, capture_output=True, text=True, check=False).stderr
    assert "bt709/bt709/iec61966-2-1" in told


@pytest.mark.parametrize("kind", KINDS)
def test_a_name_that_is_too_long_is_refused(tmp_path, kind):
    with pytest.raises(ValueError, match=r"its name has 2\d\d bytes"):
        check_video_path(tmp_path / ("猫" * 90 + kind))


def test_a_folder_of_another_programs_frames_is_not_replaced(tmp_path):
    write_video(make_frames(), tmp_path / "out", fps=1)
    check_video_path(tmp_path / "out")
    make_frames()[0].save(tmp_path / "out" / "frame_0005.png")
    with pytest.raises(ValueError, match=r"'frame_0005.png' in it was not written by this program"):
        check_video_path(tmp_path / "out")
    (tmp_path / "out" / "frame_0005.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="was not written by this program"):
        check_video_path(tmp_path / "out")


@pytest.mark.parametrize("name", [".DS_Store", "Thumbs.db", "desktop.ini"])
def test_what_systems_leave_in_folders_makes_none_foreign(tmp_path, name):
    write_video(make_frames(), tmp_path / "out", fps=1)
    (tmp_path / "out" / name).write_bytes(b"")
    write_video(make_frames(2), tmp_path / "out", fps=1)
    assert len(list((tmp_path / "out").iterdir())) == 2


@pytest.mark.parametrize("name", ["a:b c%03d.mp4", "-v.mp4", "LOUD.MP4"])
def test_strange_names_are_only_names(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    write_video(make_frames(), name, fps=16)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert iio.imread(tmp_path / name, plugin="FFMPEG").shape == (5, 32, 48, 3)


def test_a_link_stays_and_its_target_is_replaced(tmp_path):
    (tmp_path / "real.gif").write_bytes(b"old")
    (tmp_path / "link.gif").symlink_to(tmp_path / "real.gif")
    write_video(make_frames(), tmp_path / "link.gif", fps=10)
    assert (tmp_path / "link.gif").is_symlink()
    assert Image.open(tmp_path / "real.gif").n_frames == 5


def test_files_have_the_permissions_of_ordinary_files(tmp_path):
    (tmp_path / "ordinary").touch()
    write_picture(Image.new("RGB", (4, 4)), tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_mode == (tmp_path / "ordinary").stat().st_mode


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.jpeg"])
def test_pictures_read_back(tmp_path, name):
    (frame,) = make_frames(count=1)
    write_picture(frame, tmp_path / name)
    assert np.abs(pixels([Image.open(tmp_path / name)]) - pixels([frame])).mean() < 3
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", ["out.avi", "out.mp4.part", "out.png"])
def test_unknown_video_endings(tmp_path, name):
    with pytest.raises(ValueError, match=r"allowed are \.mp4, \.gif, or no ending"):
        write_video(make_frames(), tmp_path / name, fps=16)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["sheet.gif", "sheet", "sheet.mp4"])
def test_unknown_picture_endings(tmp_path, name):
    with pytest.raises(ValueError, match=r"allowed are \.png, \.jpg, \.jpeg"):
        write_picture(Image.new("RGB", (4, 4)), tmp_path / name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", [*KINDS, "out/"])
def test_free_places_and_finished_outputs_are_accepted(tmp_path, kind):
    check_video_path(os.path.join(tmp_path, kind))
    write_video(make_frames(), os.path.join(tmp_path, kind), fps=16)
    check_video_path(os.path.join(tmp_path, kind))


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_parent_folder_is_named(tmp_path, kind):
    with pytest.raises(ValueError, match=r"there is no folder .*missing"):
        check_video_path(tmp_path / "missing" / kind)
    with pytest.raises(ValueError, match=r"there is no folder .*missing"):
        check_picture_path(tmp_path / "missing" / "sheet.png")


@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_parent_folder_is_named(tmp_path):
    tmp_path.chmod(0o555)
    with pytest.raises(ValueError, match="read-only"):
        check_video_path(tmp_path / "out.mp4")


def test_nothing_else_is_replaced(tmp_path, monkeypatch):
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "sheet.png").mkdir()
    (tmp_path / "file").write_text("text")
    (tmp_path / "mixed").mkdir()
    (tmp_path / "mixed" / "frame_0000.png").touch()
    (tmp_path / "mixed" / "notes.txt").write_text("precious")
    for name, reason in {"folder.mp4": "a folder", "file": "a file", "mixed": "holds 'notes.txt'"}.items():
        with pytest.raises(ValueError, match=reason):
            write_video(make_frames(), tmp_path / name, fps=16)
    with pytest.raises(ValueError, match="a folder of that name"):
        check_picture_path(tmp_path / "sheet.png")
    if hasattr(os, "mkfifo"):
        (tmp_path / "pipes").mkdir()
        for pipe in ("pipe", "pipe.mp4", "pipe.png", "pipes/frame_0000.png"):
            os.mkfifo(tmp_path / pipe)
        for name in ("pipe", "pipe.mp4"):
            with pytest.raises(ValueError, match="a pipe, a socket or a device of that name"):
                write_video(make_frames(), tmp_path / name, fps=16)
        with pytest.raises(ValueError, match="a pipe, a socket or a device of that name"):
            check_picture_path(tmp_path / "pipe.png")
        with pytest.raises(ValueError, match=r"'frame_0000\.png' in it was not written by this program"):
            check_video_path(tmp_path / "pipes")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises(ValueError, match="current folder"):
        check_video_path(".")
    assert (tmp_path / "mixed" / "notes.txt").read_text() == "precious"


def test_only_a_file_of_ours_may_be_replaced(tmp_path):
    path = tmp_path / "report.md"

    def check():
        check_replaceable(path, lambda content: content.startswith(b"# Ours"), "the report")

    check()
    path.write_text("# Ours\n")
    check()
    path.write_text("# Mine\n")
    with pytest.raises(ValueError, match=r"cannot write the report to '.*report\.md': this program did not write the"):
        check()
    path.unlink()
    path.mkdir()
    with pytest.raises(ValueError, match="there is a folder of that name"):
        check()


@pytest.mark.parametrize("fps", [0, -1, float("nan"), float("inf"), 1e-9, 1e9])
@pytest.mark.parametrize("kind", KINDS)
def test_impossible_frame_rates(tmp_path, kind, fps):
    with pytest.raises(ValueError, match="fps must be between"):
        write_video(make_frames(), tmp_path / kind, fps)
    assert not list(tmp_path.iterdir())


def test_a_gif_cannot_be_faster_than_browsers_play_it():
    check_fps(60, "out.mp4")
    with pytest.raises(ValueError, match=r"between 0\.01 and 50 for 'out\.gif', got 60"):
        check_fps(60, "out.gif")


def test_an_error_of_the_frames_themselves_is_passed_on(tmp_path):
    class Unmade(list):
        def __iter__(self):
            yield from list.__iter__(self)
            raise RuntimeError("the VAE overflowed")

    with pytest.raises(RuntimeError, match=r"^the VAE overflowed$"):
        write_video_or_keep(Unmade(make_frames()), tmp_path / "a.gif", fps=16)
    assert not list(tmp_path.iterdir())


def test_what_was_put_into_a_folder_of_frames_meanwhile_stays(tmp_path):
    out = tmp_path / "out"
    write_video(make_frames(count=2), out, fps=16)

    def frames():
        yield from make_frames(count=2)
        (out / "notes.txt").write_text("mine")

    with pytest.raises(ValueError, match=r"notes\.txt"):
        write_video(frames(), out, fps=16)
    assert (out / "notes.txt").read_text() == "mine"
    assert len(list(out.iterdir())) == 3
