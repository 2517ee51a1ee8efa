# SPDX-License-Identifier: Apache-2.0
"""Videos made once more from their sidecars."""

import json
import shutil

import pytest
from support.batches import pair, plan, statuses, work

from dreammover_pipeline.batch.manifest import check_job_outputs, check_values, read_sidecars
from dreammover_pipeline.batch.sidecar import digest, failure_path, read_sidecar, sidecar_path


def test_a_sidecar_makes_the_same_bytes_again(pipe, album):
    rows = [pair("a", lora_steps=2, seed=3), pair("b", output="b.mp4"), pair("c", output="c.gif")]
    jobs = plan(album, *rows)
    work(pipe, jobs)
    shutil.move(album.parent / "out", album.parent / "moved")  # not too deep: the way to the photos is relative
    sidecars = sorted((album.parent / "moved").glob("*.json"))
    again = read_sidecars(sidecars, album.parent / "again")
    check_job_outputs(again)
    check_values(pipe, pipe.fingerprint(), again)
    outcomes = work(pipe, again)
    assert statuses(outcomes) == {"a": "done", "b.mp4": "done", "c.gif": "done"}
    for sidecar, job in zip(sidecars, again, strict=True):
        assert outcomes[job.name].note == ""
        assert digest(job.output) == read_sidecar(sidecar)["output"]["sha256"] == digest(sidecar.with_suffix(""))


def test_a_sidecar_says_when_it_cannot_be_repeated(pipe, album):
    jobs = plan(album, pair("a"), pair("b"))
    work(pipe, jobs)
    sidecar, changed = (sidecar_path(job.output) for job in jobs)
    shutil.copy(album / "c0.png", album / "a0.png")
    record = read_sidecar(changed)
    record["settings"]["n_frames"] = 3
    record["stack"]["versions"]["torch"] = "1.0"
    changed.write_text(json.dumps(record))
    again = read_sidecars([sidecar, changed], album.parent / "again")
    check_job_outputs(again)
    outcomes = work(pipe, again)
    assert statuses(outcomes) == {"a": "failed", "b": "done"}
    assert "a0.png' is not the one of" in outcomes["a"].note
    assert outcomes["b"].note == "not the recorded bytes; precision, device or versions differ"
    with pytest.raises(ValueError, match="was made with another checkpoint, which was named 'random'"):
        check_values(pipe, "0" * 64, again)
    others = [album / "manifest.jsonl", failure_path(again[0].output)]
    with pytest.raises(ValueError, match=r"(?s)is no sidecar .*is no sidecar .*is no existing file") as refusal:
        read_sidecars([*others, album / "missing.json"], album.parent)
    assert len(refusal.value.reasons) == 3
    with pytest.raises(ValueError, match=r"^'': it is no existing file"):
        read_sidecars([""], album.parent)


def test_what_file_managers_leave_in_a_folder_of_frames_does_not_count(tmp_path):
    (tmp_path / "frame_0000.png").write_bytes(b"a frame")
    before = digest(tmp_path)
    (tmp_path / ".DS_Store").touch()
    assert digest(tmp_path) == before
    (tmp_path / "frame_0001.png").touch()
    assert digest(tmp_path) != before
