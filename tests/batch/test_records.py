# SPDX-License-Identifier: Apache-2.0
"""Sidecars and records of failures on a disk where anything may lie: foreign files, and damaged ones of ours."""

import copy
import json
import os

import pytest
from support.batches import pair, plan, statuses, work
from support.kills import was_killed

from dreammover_pipeline.batch.manifest import read_sidecars
from dreammover_pipeline.batch.sidecar import (
    check_places_of_records,
    failure_path,
    forget_failure,
    read_failures,
    read_sidecar,
    sidecar_path,
    work_path,
)

RECORD = {
    "dreammover_batch": 1,
    "request": "r",
    "output": {"name": "a", "sha256": "s", "width": 8, "height": 8, "frame_size": [8, 8], "blacked_out": 0},
    "inputs": [{"path": "a0.png", "sha256": "0"}, {"path": "a1.png", "sha256": "1"}],
    "settings": {"seed": 0, "fps": 16},
    "model": {"name": "m", "clip": None, "fingerprint": "f"},
    "stack": {"dtype": "float32"},
    "seconds": {"prepare": 1.0, "render": 2, "write": 0.5},
}
FAILURE = {"dreammover_failure": 1, "name": "a", "error": {"class": "ValueError", "message": "no"}}


def cut(length):
    return lambda record: json.dumps(record, indent=2).encode()[:length]


def spoilt(old, new):
    """Bytes of the text replaced, as a bad sector or a careless editor does it."""
    return lambda record: json.dumps(record, indent=2).encode().replace(old, new, 1)


def changed(*keys):
    """A value gone, or one of another type."""

    def damage(record):
        record = copy.deepcopy(record)
        *way, key, value = keys
        inner = record
        for step in way:
            inner = inner[step]
        if value is KeyError:
            del inner[key]
        else:
            inner[key] = value
        return json.dumps(record).encode()

    return damage


ANY_RECORD = [
    *(cut(length) for length in (1, 5, 15, 40, -3)),
    spoilt(b'": ', b'": \0'),
    spoilt(b'": ', b'": \xff'),
    spoilt(b'": ', b'": ' + b"[" * 100_000),
    lambda record: bytes(len(json.dumps(record))),
]
DAMAGED_SIDECARS = [
    *ANY_RECORD,
    *(changed(key, value) for key in list(RECORD)[1:] for value in (KeyError, None, [], 3)),
    *(changed("output", key, value) for key in RECORD["output"] if key != "frame_size" for value in (KeyError, [])),
    changed("output", "frame_size", [8]),
    changed("seconds", "write", "x"),
    changed("seconds", "write", KeyError),
    changed("inputs", []),
    changed("inputs", 1, "path", 3),
    changed("model", "fingerprint", KeyError),
    changed("model", "clip", 3),
    *(changed("settings", key, value) for key in RECORD["settings"] for value in (KeyError, "x")),
    changed("stack", "dtype", None),
]
DAMAGED_FAILURES = [
    *ANY_RECORD,
    changed("error", KeyError),
    changed("error", "no"),
    changed("error", "class", KeyError),
    changed("error", "message", 3),
]


def test_whole_records_are_read(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(RECORD))
    assert read_sidecar(path) == RECORD
    path.write_text(json.dumps(RECORD), encoding="utf-8-sig")
    assert read_sidecar(path) == RECORD
    older = copy.deepcopy(RECORD)
    del older["output"]["frame_size"], older["model"]["clip"]
    path.write_text(json.dumps(older))
    assert read_sidecar(path) == older


@pytest.mark.parametrize("damage", DAMAGED_SIDECARS)
def test_a_damaged_sidecar_counts_as_absent_and_may_be_replaced(tmp_path, damage):
    path = sidecar_path(tmp_path / "a")
    path.write_bytes(damage(RECORD))
    assert read_sidecar(path) is None
    check_places_of_records(tmp_path / "a")
    with pytest.raises(ValueError, match=r"a\.json': the sidecar is damaged"):
        read_sidecars([path], tmp_path)


@pytest.mark.parametrize("damage", DAMAGED_FAILURES)
def test_a_damaged_record_of_a_failure_counts_as_absent_and_may_be_removed(album, damage):
    (job,) = plan(album, pair("a"))
    path = failure_path(job.output)
    path.write_text(json.dumps(FAILURE))
    assert read_failures([job]) == {"a": FAILURE}
    path.write_bytes(damage(FAILURE))
    assert read_failures([job]) == {}
    check_places_of_records(job.output)
    forget_failure(job.output)
    assert not path.exists()


def test_records_of_failures_of_earlier_versions_are_ours(album):
    (job,) = plan(album, pair("a"))
    older = {"name": "a", "where": "m.jsonl, line 1", "error": FAILURE["error"], "photos": []}
    failure_path(job.output).write_text(json.dumps(older))
    assert read_failures([job]) == {"a": older}
    check_places_of_records(job.output)


FOREIGN = [b"", b" ", b"a note", b"{}", b'{"title": "a"}', b'[{"dreammover_batch": 1}]', b"3", b"\xff\xfe\0"]


@pytest.mark.parametrize("place", [sidecar_path, failure_path])
@pytest.mark.parametrize("content", FOREIGN)
def test_a_foreign_file_where_a_record_would_go_is_refused_by_line(album, place, content):
    path = place(album.parent / "out" / "b.gif")
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"line 2: .* did not write; move it away") as one:
        plan(album, pair("a"), pair("b", output="b.gif"))
    assert f"'{path}'" in str(one.value)
    forget_failure(album.parent / "out" / "b.gif")
    assert path.read_bytes() == content
    for make in (os.mkdir, os.mkfifo):
        path.unlink() if path.is_file() else path.rmdir()
        make(path)
        with pytest.raises(ValueError, match=r"line 2: .* did not write; move it away"):
            plan(album, pair("a"), pair("b", output="b.gif"))


def test_a_foreign_file_that_comes_later_fails_its_row_alone_and_stays(pipe, album):
    jobs = plan(album, pair("a"), pair("b"), pair("c"))
    work(pipe, jobs[:1])
    (album / "a0.png").write_bytes((album / "c0.png").read_bytes())
    frames = {path: path.read_bytes() for path in jobs[0].output.iterdir()}
    foreign = [sidecar_path(jobs[0].output), failure_path(jobs[1].output)]
    for path in foreign:
        path.write_text("a note")
    outcomes = work(pipe, jobs)
    assert statuses(outcomes) == {"a": "failed", "b": "failed", "c": "done"}
    for name, path in zip("ab", foreign, strict=True):
        assert f"'{path}', but a file of that name is there" in outcomes[name].note
        assert path.read_text() == "a note"
    assert {path: path.read_bytes() for path in jobs[0].output.iterdir()} == frames


def test_a_batch_goes_on_after_its_records_were_damaged(pipe, album):
    (album / "broken.png").write_bytes(b"no picture")
    rows = [pair("a"), pair("b"), pair("c"), pair("a", output="d"), pair("a", img1="broken.png", output="e")]
    jobs = plan(album, *rows)
    work(pipe, jobs)
    for job, damage in zip(jobs, [changed("seconds", "x"), changed("output", []), cut(99)], strict=False):
        path = sidecar_path(job.output)
        path.write_bytes(damage(json.loads(path.read_text())))
    failure = failure_path(jobs[4].output)
    failure.write_bytes(spoilt(b'"error"', b'"\xff"')(json.loads(failure.read_text())))
    jobs = plan(album, *rows)
    # As of a process beside others: the record may have been damaged since this process began.
    outcomes = work(pipe, jobs, failures={})
    assert statuses(outcomes) == {"a": "done", "b": "done", "c": "done", "d": "skipped", "e": "failed"}
    assert "broken.png" in outcomes["e"].note
    assert list(read_failures(jobs)) == ["e"]
    assert set(statuses(work(pipe, jobs[:4])).values()) == {"skipped"}


MOVE = "scratch.move_over(Path(sys.argv[3]), Path(sys.argv[4]))"


def test_a_kill_between_the_renames_of_a_folder_leaves_the_pair_done(pipe, album):
    (job,) = plan(album, pair("a"))
    work(pipe, [job])
    new = work_path(job.output) / "making-left" / "video"
    new.mkdir(parents=True)
    assert was_killed(MOVE, 1, new, job.output, events="os.rename")
    assert not job.output.exists()
    with pytest.raises(ValueError, match="line 1: fps"):  # put back by a run that is refused, too
        plan(album, pair("b", fps=0.001), pair("a"))
    assert job.output.exists()
    assert statuses(work(pipe, plan(album, pair("a")))) == {"a": "skipped"}
    assert not new.parent.exists()
