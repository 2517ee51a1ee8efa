# SPDX-License-Identifier: Apache-2.0
"""What the web page does, without the page and without Gradio."""

import threading

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from PIL import Image
from support.snapshot import snapshot

pytest.importorskip("starlette", reason="the extra 'demo' is not installed")

from dreammover_pipeline.ui.studio import MAX_SIDE, StoppedError, Studio, load_photo
from dreammover_pipeline.ui.visitors import Visitors

RENDERING = {"n_frames": 2, "easing": "linear", "endpoints": "original"}
PREPARING = {
    "prompt": "a fish",
    "lora_steps": 2,
    "num_inference_steps": 4,
    "inversion_steps": 2,
    "feature_step": 1,
    "spots": [],
    "seed": 0,
}
STAGES = ["Fitting LoRA", "Inverting", "Denoising", "Decoding"]


class Stages:
    """A report that keeps the stages it hears of, and does something when it hears of a certain one."""

    def __init__(self, stage=None, act=None):
        self.stages, self.stage, self.act = [], stage, act

    def __call__(self, stage, done, total):
        assert 0 <= done <= total
        if stage not in self.stages:
            self.stages.append(stage)
        if (stage, done) == (self.stage, 1):
            self.act()


@pytest.fixture
def studio(pipe, tmp_path):
    return Studio(pipe, Visitors(tmp_path))


@pytest.fixture
def session(studio):
    return studio.session("cookie", "tab")


@pytest.fixture
def files(photos, tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    paths = [folder / "0.png", folder / "1.png"]
    for photo, path in zip(photos, paths, strict=True):
        photo.save(path)
    return paths


def all_files(folder):
    return {path for path in folder.rglob("*") if path.is_file()}


def test_only_what_changed_is_done_again(session, files):
    report = Stages()
    made = session.make(files, PREPARING, RENDERING, fps=8, report=report)
    assert made.did == ("prepared", "rendered", "written")
    assert [stage for stage in report.stages if stage in STAGES] == STAGES
    assert made.rendered.times == pytest.approx((0, 1 / 3, 2 / 3, 1))

    faster = session.make(files, PREPARING, RENDERING, fps=16, hold=0.5, ping_pong=True)
    assert faster.did == ("written",)
    assert faster.rendered is made.rendered
    assert len(iio.imread(faster.video)) == 8 + 2 + 8 + 2

    report = Stages()
    eased = session.make(files, PREPARING, {**RENDERING, "easing": "ease-in"}, fps=16, report=report)
    assert eased.did == ("rendered", "written")
    assert not {"Fitting LoRA", "Inverting"} & set(report.stages)
    # what is no longer shown is gone
    shown = {eased.video, eased.comparison, *eased.rendered.frames, *eased.rendered.pictures.values()}
    assert all_files(session.folder) == shown

    assert session.make(files, {**PREPARING, "seed": 1}, RENDERING, fps=16).did == ("prepared", "rendered", "written")
    assert session.make(files[::-1], {**PREPARING, "seed": 1}, RENDERING, fps=16).did[0] == "prepared"


def test_the_video_and_its_frames_are_those_of_the_pipeline(session, files, pipe):
    made = session.make(files, PREPARING, RENDERING, fps=8)
    arguments = {name: value for name, value in PREPARING.items() if name not in ("spots", "seed")}
    call = {**arguments, **RENDERING, "generator": torch.Generator().manual_seed(0), "include_inputs": True}
    (frames,) = pipe(*map(str, files), **call).frames
    for path, frame in zip(made.rendered.frames, frames, strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(path)), np.asarray(frame))
    assert iio.imread(made.video).shape == (4, 64, 64, 3)


def test_a_moment_of_the_prepared_pair(session, files, pipe):
    with pytest.raises(ValueError, match="make a video first"):
        session.moment(0.5, {}, Stages())
    made = session.make(files, PREPARING, RENDERING, fps=8)
    first = session.moment(1 / 3, {}, Stages())
    np.testing.assert_array_equal(np.asarray(Image.open(first)), np.asarray(Image.open(made.rendered.frames[1])))
    second = session.moment(0.9, {}, Stages())
    assert second.is_file()
    assert not first.exists()


@pytest.mark.parametrize("stage", STAGES)
def test_cancelling_stops_at_the_next_step_and_leaves_all_as_it_was(session, files, pipe, stage):
    made = session.make(files, {**PREPARING, "lora_steps": 0}, RENDERING, fps=8)
    before, kept = snapshot(pipe.unet), all_files(session.folder)
    report = Stages(stage, session.cancel)
    with pytest.raises(StoppedError):
        session.make(files, PREPARING, RENDERING, fps=8, report=report)
    assert report.stages[-1] == stage
    assert session.made is made
    assert all_files(session.folder) == kept
    assert snapshot(pipe.unet) == before
    assert pipe._listener is None
    assert not session.studio.machine.locked()
    assert session.make(files, PREPARING, RENDERING, fps=8).did[-2:] == ("rendered", "written")


def test_cancelling_nothing_does_not_cancel_what_comes(session, files):
    session.cancel()
    session.make(files, {**PREPARING, "lora_steps": 0}, RENDERING, fps=8)


def test_bad_settings_cost_nothing(session, files):
    preparing = {**PREPARING, "lora_steps": 0}
    made = session.make(files, preparing, RENDERING, fps=8)
    with pytest.raises(ValueError, match="n_frames"):
        session.make(files, PREPARING, {**RENDERING, "n_frames": 0}, fps=8)
    with pytest.raises(ValueError, match="must nest"):
        session.make(files, {**PREPARING, "inversion_steps": 60}, RENDERING, fps=8)
    with pytest.raises(ValueError, match="fps must be between"):
        session.make(files, PREPARING, RENDERING, fps=0)
    with pytest.raises(ValueError, match="the ends must be held"):
        session.make(files, PREPARING, RENDERING, fps=8, hold=-1)
    with pytest.raises(ValueError, match="times"):
        session.moment(1.5, {}, Stages())
    assert session.made is made
    assert session.has_prepared(files, preparing)


def test_a_bad_photo_is_named_without_the_servers_folders(session, files):
    files[1].write_bytes(files[1].read_bytes()[:60])
    with pytest.raises(ValueError, match=r"the last photo \(1\.png\) cannot be read") as raised:
        session.make(files, PREPARING, RENDERING, fps=8)
    assert str(files[1].parent) not in str(raised.value)


def test_large_photos_are_shrunk(tmp_path):
    Image.new("L", (3000, 40)).save(tmp_path / "long.png")
    photo = load_photo(tmp_path / "long.png", "first")
    assert (photo.mode, max(photo.size)) == ("RGB", MAX_SIDE)


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


def test_a_closed_session_leaves_nothing_even_in_the_middle_of_its_job(studio, files):
    session = studio.session("cookie", "tab")
    closing = threading.Thread(target=studio.close, args=("cookie", "tab"))

    def leave():
        closing.start()
        while not session._closed:
            pass

    report = Stages("Denoising", leave)
    with pytest.raises(StoppedError):
        session.make(files, PREPARING, RENDERING, fps=8, report=report)
    assert report.stages[-1] == "Denoising"
    closing.join(timeout=10)
    assert not closing.is_alive()
    assert not any(studio.visitors.folders.iterdir())
    with pytest.raises(StoppedError):
        session.make(files, PREPARING, RENDERING, fps=8)
    assert not any(studio.visitors.folders.iterdir())


def test_a_visitors_uploads_stay_until_the_last_tab_closes(studio):
    uploads = studio.visitors.folder("cookie") / "uploads"
    uploads.mkdir(parents=True)
    studio.session("cookie", "one")
    studio.session("cookie", "two")
    studio.close("cookie", "one")
    assert uploads.is_dir()
    studio.close("cookie", "two")
    assert not uploads.exists()


def test_sessions_that_never_said_goodbye_end_too(studio, files):
    old = studio.session("cookie", "tab")
    old.make(files, {**PREPARING, "lora_steps": 0}, RENDERING, fps=8)
    old.used -= 10**6
    studio.session("another", "tab")
    assert not old.folder.exists()
    assert studio.session("cookie", "tab") is not old


def test_visitors_have_sessions_of_their_own_by_whatever_name(studio):
    assert studio.session("a", "tab") is studio.session("a", "tab")
    assert studio.session("a", "tab") is not studio.session("b", "tab")


def test_one_job_at_a_time(studio, files):
    running, most = set(), []

    def visit(name):
        def report(stage, done, total):
            running.add(name)
            most.append(len(running))
            if stage == "Decoding" and done == total:
                running.discard(name)

        studio.session(name, "tab").make(files, {**PREPARING, "lora_steps": 0}, RENDERING, fps=8, report=report)

    visitors = [threading.Thread(target=visit, args=(name,)) for name in "ab"]
    for visitor in visitors:
        visitor.start()
    for visitor in visitors:
        visitor.join(timeout=60)
    assert max(most) == 1
