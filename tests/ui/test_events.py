# SPDX-License-Identifier: Apache-2.0
"""What the page's events do, called without a browser."""

from types import SimpleNamespace

import pytest
from PIL import Image

pytest.importorskip("gradio", reason="the extra 'demo' is not installed")
import gradio as gr

from dreammover_pipeline.settings import arguments
from dreammover_pipeline.ui import visitors as ui_visitors
from dreammover_pipeline.ui.events import CANCELLED, EventHandlers
from dreammover_pipeline.ui.page import MAX_PROMPT, PICTURES, build_components
from dreammover_pipeline.ui.visitors import COOKIE

CHEAP = {"n_frames": 2, "lora_steps": 0, "inversion_steps": 2, "feature_step": 1}
DEFAULTS = {name: declared.default for name, declared in arguments().items()} | CHEAP
REQUEST = SimpleNamespace(cookies={COOKIE: "cookie"}, session_hash="tab")

pytestmark = pytest.mark.filterwarnings("ignore::Warning:gradio")  # of its own making


@pytest.fixture
def handlers(studio, tmp_path):
    (tmp_path / "examples").mkdir()
    with gr.Blocks(analytics_enabled=False):
        return EventHandlers(studio, build_components(tmp_path / "examples", DEFAULTS), DEFAULTS)


@pytest.fixture
def uploads(studio, photos):
    folder = studio.visitors.folder("cookie") / "uploads"
    folder.mkdir(parents=True)
    paths = [str(folder / name) for name in ("0.png", "1.png")]
    for photo, path in zip(photos, paths, strict=True):
        photo.save(path)
    return paths


@pytest.fixture
def warnings(monkeypatch):
    """What is shown on the page as a warning."""
    texts = []
    monkeypatch.setattr(gr, "Warning", lambda text, *_, **__: texts.append(text))
    return texts


def values(handlers, uploads, **changed):
    """What Gradio passes: the values of the form's components."""
    form = {name: component.value for name, component in handlers.components.form.items()}
    form |= dict(zip(("first", "last"), uploads, strict=True)) | {"prompt": "a fish"} | changed
    return {handlers.components.form[name]: value for name, value in form.items()}


def progress(*_, **__):
    pass


def skipped(*answers):
    return all(answer == gr.skip() for answer in answers)


def click(x, y):
    return SimpleNamespace(index=[x, y])


def test_a_video_fills_every_result(handlers, uploads, warnings):
    status, video, beside, scrubber, frame, candidates_of, candidates, *pictures = handlers.make(
        values(handlers, uploads, n_frames=3, candidates=2), REQUEST, progress
    )
    assert "got to know the two photos, made 3 frames and wrote the video." in status
    assert video.is_file()
    assert beside.is_file()
    assert scrubber.maximum == 4
    assert frame.label == "Frame at δ = 0.000"
    assert candidates_of.choices == []
    assert candidates.value == []
    assert [path.stem for path in pictures] == list(PICTURES)
    assert len(handlers.components.results.changed_by_a_video) == 7 + len(PICTURES)
    assert handlers.scrub(1, REQUEST).label == "Frame at δ = 0.250"
    assert handlers.scrub(5, REQUEST) == gr.skip()
    text, frame = handlers.moment(0.7, REQUEST, progress)
    assert text == "Made a frame at δ = 0.7; the photos were known already."
    assert frame.label == "Frame at δ = 0.700"
    assert warnings == []


def captions(gallery):
    return [picture["caption"] for picture in gallery.value]


def test_a_click_on_a_candidate_makes_the_video_with_it(handlers, uploads, warnings):
    def chosen(delta, index, **changed):
        clicked = {handlers.components.results.candidates_of: delta}
        form = values(handlers, uploads, n_frames=3, method="noise", candidates=2, **changed)
        return handlers.choose(form | clicked, SimpleNamespace(index=index), REQUEST, progress)

    assert skipped(*chosen(0.5, 1))
    form = values(handlers, uploads, n_frames=3, method="noise", candidates=2)
    _, _, _, _, _, candidates_of, candidates, *_ = handlers.make(form, REQUEST, progress)
    assert candidates_of.choices == [("δ = 0.500", 0.5), ("δ = 0.250", 0.25), ("δ = 0.750", 0.75)]
    assert candidates_of.value == 0.5
    assert captions(candidates) == ["1, chosen", "2"]

    assert skipped(*chosen(0.25, 0))
    status, _, _, _, _, candidates_of, candidates, *_ = chosen(0.25, 1)
    assert status.endswith("made 3 frames and wrote the video. The photos were known already.")
    assert candidates_of.value == 0.25
    assert captions(candidates) == ["1", "2, chosen"]
    assert captions(handlers.look_at(0.5, REQUEST)) == ["1, chosen", "2"]
    assert handlers.look_at(0.3, REQUEST) == gr.skip()
    assert warnings == []

    text, _ = handlers.moment(0.5, REQUEST, progress)
    assert text == "Made a frame at δ = 0.5; the photos were known already."
    status, *others = chosen(0.5, 1, seed=1)
    assert status.startswith("The photos or the settings are no longer those of these candidates")
    assert skipped(*others)


def test_a_slider_makes_a_video_only_of_a_prepared_pair(handlers, uploads, warnings):
    nothing = handlers.make_again(values(handlers, [None, None]), REQUEST, progress)
    unprepared = handlers.make_again(values(handlers, uploads), REQUEST, progress)
    for answers in (nothing, unprepared):
        assert len(answers) == len(handlers.components.results.changed_by_a_video)
        assert skipped(*answers)
    assert handlers.scrub(0, REQUEST) == gr.skip()
    handlers.make(values(handlers, uploads), REQUEST, progress)
    status, *_ = handlers.make_again(values(handlers, uploads, fps=30), REQUEST, progress)
    assert status.endswith("wrote the video. The photos were known already.")
    assert skipped(*handlers.make_again(values(handlers, uploads, seed=1), REQUEST, progress))
    assert warnings == []


def test_what_goes_wrong_is_said_in_sentences(handlers, uploads, warnings, capsys, monkeypatch):
    status, *others = handlers.make(values(handlers, [None, None]), REQUEST, progress)
    assert status == "Choose two photos first, or one of the examples."
    assert skipped(*others)
    elsewhere = handlers.studio.visitors.folder("another") / "0.png"
    elsewhere.parent.mkdir()
    Image.new("RGB", (8, 8)).save(elsewhere)
    status, *_ = handlers.make(values(handlers, [str(elsewhere), uploads[1]]), REQUEST, progress)
    assert status == "A photo is no longer there; upload the photo again."
    status, *_ = handlers.make(values(handlers, uploads, prompt="a" * (MAX_PROMPT + 1)), REQUEST, progress)
    assert status == f"What the photos show may have {MAX_PROMPT} characters; {MAX_PROMPT + 1} came."
    status, *_ = handlers.make(values(handlers, uploads, seed=-1), REQUEST, progress)
    assert status == "`Seed` must be at least 0, not -1."
    with monkeypatch.context() as full:
        full.setattr(ui_visitors, "MAX_STORED", 0)
        status, *_ = handlers.make(values(handlers, uploads), REQUEST, progress)
    assert status == "There is no room for more files here at the moment; try again later."
    status, answer = handlers.moment(0.5, REQUEST, progress)
    assert status == "Make a video first; then single frames of it can be made at any time."
    assert skipped(answer)
    monkeypatch.setattr(handlers.studio, "session", lambda *_: 1 / 0)
    status, *_ = handlers.make(values(handlers, uploads), REQUEST, progress)
    assert status == "Something went wrong here; the server's log says what."
    assert "ZeroDivisionError" in capsys.readouterr().err
    assert len(warnings) == 7


def test_cancelling_leaves_the_results_as_they_are(handlers, uploads, warnings):
    def cancelling(steps, desc, unit):
        if desc == "Denoising":
            assert handlers.cancel(REQUEST) == CANCELLED

    status, *others = handlers.make(values(handlers, uploads), REQUEST, cancelling)
    assert status == CANCELLED
    assert skipped(*others)
    assert warnings == []


def test_spots_are_added_in_pairs_and_taken_back(handlers, uploads, warnings):
    spots, first, last = handlers.point_in_first([[], []], *uploads, click(1, 2), REQUEST)
    assert spots == [[(1, 2)], []]
    assert first.is_file()
    assert last.is_file()
    spots, *_ = handlers.point_in_first(spots, *uploads, click(3, 4), REQUEST)
    assert spots == [[(3, 4)], []]  # a spot without a partner is moved
    spots, *_ = handlers.point_in_last(spots, *uploads, click(5, 6), REQUEST)
    assert spots == [[(3, 4)], [(5, 6)]]
    assert skipped(*handlers.point_in_last(spots, *uploads, click(7, 8), REQUEST))
    assert warnings == ["Click a spot in the first photo before the same spot in the last one."]
    assert handlers.undo(spots, *uploads, REQUEST)[0] == [[], []]
    waiting = [[(3, 4), (9, 9)], [(5, 6)]]
    assert handlers.undo(waiting, *uploads, REQUEST)[0] == spots
    assert handlers.undo([[], []], *uploads, REQUEST)[0] == [[], []]
    assert handlers.new_photos(uploads[0], None, REQUEST)[::2] == ([[], []], None)


def test_leaving_closes_the_session(handlers, uploads):
    handlers.arrive(REQUEST)
    handlers.leave(REQUEST)
    assert not handlers.studio.visitors.folder("cookie").exists()


def test_a_visitor_without_a_cookie_is_told_so(handlers, uploads, warnings):
    handlers.arrive(SimpleNamespace(cookies={}, session_hash="tab"))
    assert len(warnings) == 1
    assert "cookie" in warnings[0]
