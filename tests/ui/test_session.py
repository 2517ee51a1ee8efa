# SPDX-License-Identifier: Apache-2.0
"""What a session of the page does, without the page and without Gradio."""

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from PIL import Image
from support.programs import LATE_FAILURE
from support.sessions import PREPARING, RENDERING, STAGES, Stages
from support.snapshot import snapshot

from dreammover_pipeline.ui.session import StoppedError


def all_files(folder):
    return {path for path in folder.rglob("*") if path.is_file()}


def test_only_what_changed_is_done_again(session, files):
    report = Stages()
    finished = session.make(files, PREPARING, RENDERING, fps=8, report=report)
    assert finished.work == ("prepared", "rendered", "written")
    assert [stage for stage in report.stages if stage in STAGES] == STAGES
    assert finished.rendered.times == pytest.approx((0, 1 / 3, 2 / 3, 1))

    faster = session.make(files, PREPARING, RENDERING, fps=16, hold=0.5, ping_pong=True)
    assert faster.work == ("written",)
    assert faster.rendered is finished.rendered
    assert len(iio.imread(faster.video)) == 8 + 2 + 8 + 2

    report = Stages()
    eased = session.make(files, PREPARING, {**RENDERING, "easing": "ease-in"}, fps=16, report=report)
    assert eased.work == ("rendered", "written")
    assert not {"Fitting LoRA", "Inverting"} & set(report.stages)
    # what is no longer shown is gone
    shown = {eased.video, eased.comparison, *eased.rendered.files, *eased.rendered.pictures.values()}
    assert all_files(session.folder) == shown

    assert session.make(files, {**PREPARING, "seed": 1}, RENDERING, fps=16).work == ("prepared", "rendered", "written")
    assert session.make(files[::-1], {**PREPARING, "seed": 1}, RENDERING, fps=16).work[0] == "prepared"


def test_the_video_and_its_frames_are_those_of_the_pipeline(session, files, pipe):
    finished = session.make(files, PREPARING, RENDERING, fps=8)
    arguments = {name: value for name, value in PREPARING.items() if name not in ("spots", "seed")}
    call = {**arguments, **RENDERING, "generator": torch.Generator().manual_seed(0), "include_inputs": True}
    (frames,) = pipe(*map(str, files), **call).frames
    for path, frame in zip(finished.rendered.files, frames, strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(path)), np.asarray(frame))
    assert iio.imread(finished.video).shape == (4, 64, 64, 3)


def test_frames_are_kept_where_the_video_cannot_be_written(session, files, program, monkeypatch):
    program(LATE_FAILURE)
    with pytest.raises(RuntimeError, match="no more room; its frames are kept, so another attempt only writes it"):
        session.make(files, PREPARING, RENDERING, fps=8)
    assert session.finished is None
    monkeypatch.delenv("IMAGEIO_FFMPEG_EXE")
    first = session.make(files, PREPARING, RENDERING, fps=8)
    assert first.work == ("written",)

    program(LATE_FAILURE)
    for easing in ("ease-in", "ease-out"):
        with pytest.raises(RuntimeError, match="its frames are kept"):
            session.make(files, PREPARING, {**RENDERING, "easing": easing}, fps=8)
        assert session.finished is first
        assert first.video.is_file()
    monkeypatch.delenv("IMAGEIO_FFMPEG_EXE")
    last = session.make(files, PREPARING, {**RENDERING, "easing": "ease-out"}, fps=8)
    assert last.work == ("written",)
    # of the frames that were never shown nothing is left
    assert all_files(session.folder) == {
        last.video,
        last.comparison,
        *last.rendered.files,
        *last.rendered.pictures.values(),
    }


def test_an_ffmpeg_that_cannot_encode_is_refused_before_any_model_runs(session, files, program):
    program("exit 1")
    report = Stages()
    with pytest.raises(RuntimeError, match="does not work as ffmpeg"):
        session.make(files, PREPARING, RENDERING, fps=8, report=report)
    assert not report.stages


def test_what_takes_nothing_from_the_photos_has_no_picture_of_what_it_takes(session, files):
    names = [
        set(session.make(files, PREPARING, {**RENDERING, "detail": detail}, fps=8).rendered.pictures)
        for detail in ("photos", "upsampled")
    ]
    assert names[0] - names[1] == {"sources"}
    assert "sheet" in names[1]


def test_a_moment_of_the_prepared_pair(session, files, pipe):
    with pytest.raises(ValueError, match="make a video first"):
        session.moment(0.5, {}, Stages())
    finished = session.make(files, PREPARING, RENDERING, fps=8)
    first = session.moment(1 / 3, {}, Stages())
    alone, among_others = (np.asarray(Image.open(path)) for path in (first, finished.rendered.files[1]))
    np.testing.assert_allclose(alone, among_others, atol=1)  # frames of any batch size are the same up to rounding
    second = session.moment(0.9, {}, Stages())
    assert second.is_file()
    assert not first.exists()


@pytest.mark.parametrize("stage", STAGES)
def test_cancelling_stops_at_the_next_step_and_leaves_all_as_it_was(session, files, pipe, stage):
    finished = session.make(files, {**PREPARING, "lora_steps": 0}, RENDERING, fps=8)
    before, kept = snapshot(pipe.unet), all_files(session.folder)
    report = Stages(stage, session.cancel)
    with pytest.raises(StoppedError):
        session.make(files, PREPARING, RENDERING, fps=8, report=report)
    assert report.stages[-1] == stage
    assert session.finished is finished
    assert all_files(session.folder) == kept
    assert snapshot(pipe.unet) == before
    assert not pipe._listeners
    assert not session._pipeline_lock.locked()
    assert session.make(files, PREPARING, RENDERING, fps=8).work[-2:] == ("rendered", "written")


def test_cancelling_nothing_does_not_cancel_what_comes(session, files):
    session.cancel()
    session.make(files, {**PREPARING, "lora_steps": 0}, RENDERING, fps=8)


def test_bad_settings_cost_nothing(session, files):
    preparing = {**PREPARING, "lora_steps": 0}
    finished = session.make(files, preparing, RENDERING, fps=8)
    with pytest.raises(ValueError, match="n_frames"):
        session.make(files, PREPARING, {**RENDERING, "n_frames": 0}, fps=8)
    with pytest.raises(ValueError, match="must nest"):
        session.make(files, {**PREPARING, "inversion_steps": 60}, RENDERING, fps=8)
    with pytest.raises(ValueError, match="fps must be between"):
        session.make(files, PREPARING, RENDERING, fps=0)
    with pytest.raises(ValueError, match="the hold at the ends must last"):
        session.make(files, PREPARING, RENDERING, fps=8, hold=-1)
    with pytest.raises(ValueError, match="times"):
        session.moment(1.5, {}, Stages())
    assert session.finished is finished
    assert session.has_prepared(files, preparing)


def test_a_bad_photo_is_named_without_the_servers_folders(session, files):
    files[1].write_bytes(files[1].read_bytes()[:60])
    with pytest.raises(ValueError, match=r"the last photo \(1\.png\) cannot be read") as raised:
        session.make(files, PREPARING, RENDERING, fps=8)
    assert str(files[1].parent) not in str(raised.value)


def test_spots_are_drawn_where_they_are_clicked_and_mean_pixels_of_the_photo(session, files, pipe):
    marked, nothing = session.mark([files[0], None], [[(105, 205)], []])
    assert nothing is None
    picture = Image.open(marked)
    assert picture.size == (640, 640)  # ten times as large
    assert picture.getpixel((90, 205)) != Image.open(files[0]).resize((640, 640)).getpixel((90, 205))
    preparing = {**PREPARING, "lora_steps": 0}
    session.make(files, {**preparing, "spots": [((105, 205), (305, 405))]}, RENDERING, fps=8)
    arguments = {name: value for name, value in preparing.items() if name not in ("spots", "seed")}
    pair = pipe.prepare(*map(str, files), **arguments, points=[((10.05, 20.05), (30.05, 40.05))])
    torch.testing.assert_close(session._prepared.pair.flow.forward, pair.flow.forward)
    assert not torch.equal(pair.flow.forward, pipe.prepare(*map(str, files), **arguments).flow.forward)
