# SPDX-License-Identifier: Apache-2.0
"""Sessions that come and go, and share one pipeline."""

import io
import os
import threading

import pytest
from support.sessions import PREPARING, RENDERING, Stages
from support.visits import png

from dreammover_pipeline.ui import visitors as ui_visitors
from dreammover_pipeline.ui.session import StoppedError
from dreammover_pipeline.ui.studio import MAX_SESSIONS, STRAY


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


def test_no_job_begins_once_all_sessions_are_closed(studio):
    studio.session("cookie", "tab")
    studio.close_all()
    with pytest.raises(StoppedError):
        studio.session("another", "tab")
    assert not any(studio.visitors.folders.iterdir())


def test_a_visitor_has_so_many_sessions_and_no_more(studio, files):
    first = studio.session("cookie", "0")
    first.make(files, {**PREPARING, "lora_steps": 0}, RENDERING, fps=8)
    others = [studio.session("cookie", str(number)) for number in range(1, MAX_SESSIONS)]
    assert studio.session("cookie", "0") is first
    theirs = studio.session("another", "tab")
    studio.session("cookie", "one more")
    assert studio.session("another", "tab") is theirs
    assert first.folder.exists()
    with pytest.raises(StoppedError):
        others[0].mark(files, [[], []])
    others[1].mark(files, [[], []])


def test_a_visitor_has_so_many_uploads_and_no_more(studio, monkeypatch):
    monkeypatch.setattr(ui_visitors, "MAX_UPLOADS", 3)
    uploads = [studio.visitors.take("cookie", io.BytesIO(png()), "photo.png") for _ in range(5)]
    theirs = studio.visitors.take("another", io.BytesIO(png()), "photo.png")
    assert [path.is_file() for path in uploads] == [False, False, True, True, True]
    assert theirs.is_file()


def test_what_belongs_to_no_session_is_swept_away(studio):
    visitors = studio.visitors
    visitors.examples.mkdir()
    present = visitors.take("present", io.BytesIO(png()), "photo.png")
    studio.session("present", "tab")
    left = visitors.take("left", io.BytesIO(png()), "photo.png")
    file, folder = visitors.root / "stray.png", visitors.root / "strays"
    file.write_bytes(png())
    folder.mkdir()
    new = visitors.root / "new.png"
    new.write_bytes(png())
    for path in (visitors.folder("present"), visitors.folder("left"), visitors.examples, file, folder):
        time = path.stat().st_mtime - STRAY - 1
        os.utime(path, (time, time))
    studio.session("another", "tab")
    assert [path.exists() for path in (left, file, folder)] == [False] * 3
    assert present.is_file()
    assert set(visitors.root.iterdir()) == {visitors.folders, visitors.examples, new}
