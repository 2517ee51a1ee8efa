# SPDX-License-Identifier: Apache-2.0
"""Sessions that come and go, and share one pipeline."""

import threading

import pytest
from support.sessions import PREPARING, RENDERING, Stages

from dreammover_pipeline.ui.session import StoppedError


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
