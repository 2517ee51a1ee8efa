# SPDX-License-Identifier: Apache-2.0
"""What a session of the page does, without the page and without Gradio."""

import threading
import time

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from PIL import Image
from support.disks import no_room
from support.programs import LATE_FAILURE
from support.sessions import PREPARING, RENDERING, STAGES, Stages
from support.snapshot import snapshot

from dreammover_pipeline import DreamMoverPipeline
from dreammover_pipeline.ui.session import Session, StoppedError


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


def test_frames_that_cannot_be_written_are_kept_for_the_next_attempt(session, files):
    preparing, other = {**PREPARING, "lora_steps": 0}, {**RENDERING, "detail": "upsampled"}
    expected = contents(session.make(files, preparing, NOISE, fps=8).rendered)
    session.make(files, preparing, other, fps=8)

    def fail():
        with no_room(1000), pytest.raises(RuntimeError, match=r"^the frames could not be written: .* they are kept"):
            session.make(files, preparing, NOISE, fps=8)

    fail()
    report = Stages()
    finished = session.make(files, preparing, NOISE, fps=8, report=report)
    assert finished.work == ("written",)
    assert report.stages == ["Starting"]
    assert contents(finished.rendered) == expected

    session.make(files, preparing, other, fps=8)
    fail()
    session.make(files, preparing, {**other, "easing": "ease-in"}, fps=8)  # by which they are given up
    assert session.make(files, preparing, NOISE, fps=8).work == ("rendered", "written")


def test_frames_that_cannot_be_written_leave_nothing_and_the_photos_are_known(session, files, monkeypatch):
    monkeypatch.setattr("dreammover_pipeline.ui.session.KEPT_BYTES", 0)  # else they are kept, as above
    preparing = {**PREPARING, "lora_steps": 0}
    first = session.make(files, preparing, RENDERING, fps=8)
    before, others = all_files(session.folder), {**preparing, "prompt": "a cat"}
    with no_room(1000), pytest.raises(RuntimeError, match=r"^the frames could not be written: File too large; the ph"):
        session.make(files, others, RENDERING, fps=8)
    with no_room(1000), pytest.raises(RuntimeError, match=r"^the picture could not be written: File too large; try"):
        session.moment(0.5, Stages())
    assert session.finished is first
    assert set(session.folder.rglob("*")) == before | {path.parent for path in before}
    assert session.make(files, others, RENDERING, fps=8).work == ("rendered", "written")


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


NOISE = {**RENDERING, "n_frames": 3, "method": "noise", "detail": "upsampled", "candidates": 2}


def contents(rendered):
    """What the files of rendered frames hold: the frames in their order, and the candidates by δ."""
    candidates = {time: [path.read_bytes() for path in paths] for time, paths in rendered.candidates.items()}
    return [path.read_bytes() for path in rendered.files], candidates


def test_a_chosen_candidate_takes_the_place_of_the_first(session, files):
    preparing = {**PREPARING, "lora_steps": 0}
    first = session.make(files, preparing, NOISE, fps=8).rendered
    frames, candidates = contents(first)
    assert list(candidates) == [0.5, 0.25, 0.75]  # as they are made
    assert frames[1:-1] == [candidates[time][0] for time in (0.25, 0.5, 0.75)]

    report = Stages()
    finished = session.make(files, preparing, NOISE, fps=8, report=report, choices={0.25: 1})
    assert finished.work == ("rendered", "written")
    assert "Inverting" not in report.stages
    after, _ = contents(finished.rendered)
    assert after == [frames[0], candidates[0.25][1], *frames[2:]]

    rendered = session.make(files, preparing, NOISE, fps=8, choices={0.5: 1}).rendered
    after, others = contents(rendered)
    assert rendered.chosen == {0.5: 1, 0.25: 1, 0.75: 0}
    assert after[1:-1] == [others[0.25][1], candidates[0.5][1], others[0.75][0]]
    assert others[0.75] != candidates[0.75]  # which are made of the frame in the middle
    assert set(rendered.folder.rglob("*.png")) == {
        *rendered.files,
        *rendered.pictures.values(),
        *(path for paths in rendered.candidates.values() for path in paths),
    }
    assert not first.folder.exists()


def test_choices_are_kept_until_photos_or_settings_change(session, files):
    preparing, rendering = {**PREPARING, "lora_steps": 0}, {**NOISE, "n_frames": 1}
    with pytest.raises(ValueError, match="no longer those of these candidates"):
        session.make(files, preparing, rendering, fps=8, choices={0.5: 1})
    session.make(files, preparing, rendering, fps=8)
    finished = session.make(files, preparing, rendering, fps=8, choices={0.5: 1})
    with pytest.raises(ValueError, match="must name candidates from 0 to 1"):
        session.make(files, preparing, rendering, fps=8, choices={0.5: 2})
    report, three, two = Stages(), {**rendering, "candidates": 3}, {**rendering, "n_frames": 2}
    for changed in ((files[::-1], preparing, rendering), (files, preparing, three), (files, preparing, two)):
        with pytest.raises(ValueError, match="no longer those of these candidates"):
            session.make(*changed, fps=8, report=report, choices={0.5: 1})
    assert report.stages == ["Starting"]
    faster = session.make(files, preparing, rendering, fps=16)
    assert faster.work == ("written",)
    assert faster.rendered is finished.rendered
    for settings in (three, rendering):
        assert session.make(files, preparing, settings, fps=8).rendered.chosen == {0.5: 0}


def test_candidates_that_the_safety_checker_flags_are_black(components, safety_checker, files, tmp_path):
    checker, extractor = safety_checker
    checker.concept_embeds_weights.data.fill_(-2.0)  # cosines lie within ±1
    pipe = DreamMoverPipeline(**components | {"safety_checker": checker, "feature_extractor": extractor})
    session = Session(pipe, threading.Lock(), tmp_path / "session")
    rendered = session.make(files, {**PREPARING, "lora_steps": 0}, {**NOISE, "n_frames": 1}, fps=8).rendered
    for path in (rendered.files[1], *rendered.candidates[0.5]):
        assert Image.open(path).getextrema() == ((0, 0),) * 3


def test_a_moment_of_the_finished_video(session, files, pipe):
    with pytest.raises(ValueError, match="make a video first"):
        session.moment(0.5, Stages())
    finished = session.make(files, PREPARING, RENDERING, fps=8)
    first = session.moment(1 / 3, Stages())
    alone, among_others = (np.asarray(Image.open(path)) for path in (first, finished.rendered.files[1]))
    np.testing.assert_allclose(alone, among_others, atol=1)  # frames of any batch size are the same up to rounding
    second = session.moment(0.9, Stages())
    assert second.is_file()
    assert not first.exists()


def test_a_moment_is_made_as_the_frames_of_the_video_are(session, files):
    finished = session.make(files, {**PREPARING, "lora_steps": 0}, NOISE, fps=8)
    alone, among_others = (
        np.asarray(Image.open(path)) for path in (session.moment(0.5, Stages()), finished.rendered.files[2])
    )
    np.testing.assert_allclose(alone, among_others, atol=1)


def test_after_a_cancelled_video_moments_and_changes_are_of_the_finished_one(session, files):
    preparing, others = {**PREPARING, "lora_steps": 0}, files[::-1]
    finished = session.make(files, preparing, RENDERING, fps=8)
    before = session.moment(0.3, Stages()).read_bytes()
    with pytest.raises(StoppedError):
        session.make(others, preparing, RENDERING, fps=8, report=Stages("Denoising", session.cancel))
    assert session.finished is finished
    assert session.moment(0.3, Stages()).read_bytes() == before
    assert session.has_prepared(files, preparing)
    assert session.make(files, preparing, RENDERING, fps=24).work == ("written",)
    assert session.make(files, preparing, {**RENDERING, "n_frames": 1}, fps=24).work == ("rendered", "written")
    # what the cancelled job prepared is kept too
    assert session.make(others, preparing, RENDERING, fps=8).work == ("rendered", "written")
    assert not session.has_prepared(files, preparing)


def test_frames_of_the_finished_video_are_kept_where_another_cannot_be_written(session, files, program, monkeypatch):
    preparing, others = {**PREPARING, "lora_steps": 0}, files[::-1]
    session.make(files, preparing, RENDERING, fps=8)
    program(LATE_FAILURE)
    with pytest.raises(RuntimeError, match="its frames are kept"):
        session.make(others, preparing, RENDERING, fps=8)
    monkeypatch.delenv("IMAGEIO_FFMPEG_EXE")
    assert session.make(files, preparing, RENDERING, fps=24).work == ("written",)
    last = session.make(others, preparing, RENDERING, fps=24)
    assert last.work == ("written",)
    assert all_files(session.folder) == {
        last.video,
        last.comparison,
        *last.rendered.files,
        *last.rendered.pictures.values(),
    }


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


def test_cancelling_also_stops_a_job_that_waits_for_one_that_was_cancelled(session, files):
    def make(report):
        with pytest.raises(StoppedError):
            session.make(files, {**PREPARING, "lora_steps": 0}, RENDERING, fps=8, report=report)

    waiting = Stages()
    second = threading.Thread(target=make, args=(waiting,))

    def cancel():
        second.start()
        for _ in range(10_000):  # ten seconds at most
            if len(session._cancels) == 2:
                break
            time.sleep(0.001)
        session.cancel()

    make(Stages("Inverting", cancel))
    second.join(timeout=60)
    assert waiting.stages == []
    assert session.finished is None


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
        session.moment(1.5, Stages())
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
