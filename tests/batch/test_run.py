# SPDX-License-Identifier: Apache-2.0
"""Many pairs: what is skipped, what is made anew, what fails, and how several processes share the work."""

import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import imageio.v3 as iio
import pytest
import torch
from PIL import Image
from support.batches import DEFAULTS, Trouble, held, leftovers, pair, plan, statuses, work

from dreammover_pipeline.batch.manifest import check_job_outputs, read_manifest
from dreammover_pipeline.batch.run import Outcome, table
from dreammover_pipeline.batch.sidecar import (
    digest,
    failure_path,
    read_failures,
    read_sidecar,
    sidecar_path,
    work_path,
)
from dreammover_pipeline.media.files import write_video


def test_what_is_done_is_skipped_and_what_changed_is_made_anew(pipe, album):
    def again(jobs):
        before = {job.name: sidecar_path(job.output).read_bytes() for job in jobs}
        result = statuses(work(pipe, jobs))
        after = {job.name: sidecar_path(job.output).read_bytes() for job in jobs}
        assert {name for name in after if after[name] != before[name]} == {n for n in result if result[n] == "done"}
        return result

    rows = [pair("a"), pair("b", output="b.gif"), pair("c")]
    jobs = plan(album, *rows)
    assert set(statuses(work(pipe, jobs)).values()) == {"done"}
    assert set(again(jobs).values()) == {"skipped"}
    # another row's settings; a batch size, by which nothing changes; a sentence twice
    rows[0] |= {"n_frames": 1}
    jobs = plan(album, *rows, frame_batch_size=1)
    assert again(jobs) == {"a": "done", "b.gif": "skipped", "c": "skipped"}
    assert held(jobs[0].output) == ["frame_0000.png", "frame_0001.png", "frame_0002.png"]
    # a photo of other bytes under the same name; the same bytes under another name
    shutil.copy(album / "a0.png", album / "c1.png")
    shutil.copy(album / "b0.png", album / "copy.png")
    rows[1] |= {"img0": "copy.png"}
    jobs = plan(album, *rows)
    assert again(jobs) == {"a": "skipped", "b.gif": "skipped", "c": "done"}
    # videos that are damaged, incomplete or gone, and a sidecar that is cut off
    (jobs[0].output / "frame_0001.png").unlink()
    jobs[1].output.unlink()
    assert again(jobs) == {"a": "done", "b.gif": "done", "c": "skipped"}
    jobs[1].output.write_bytes(jobs[1].output.read_bytes()[:-1])
    sidecar = sidecar_path(jobs[2].output)
    os.truncate(sidecar, sidecar.stat().st_size // 2)
    assert again(jobs) == {"a": "skipped", "b.gif": "done", "c": "done"}
    # another checkpoint
    with torch.no_grad():
        pipe.unet.conv_out.bias += 0.1
    assert set(again(jobs).values()) == {"done"}


def test_what_a_kill_left_is_removed_with_its_pair_and_only_then(pipe, album):
    first, second = plan(album, pair("a"), pair("b"))
    left = [work_path(job.output) / "making-old" for job in (first, second)]
    for folder in left:
        folder.mkdir(parents=True)
        (folder / "video.mp4").write_bytes(b"half")
    write_video([Image.new("RGB", (4, 4))], second.output, fps=16)  # renamed into place, but not committed
    work(pipe, [first])
    assert [folder.exists() for folder in left] == [False, True]
    assert statuses(work(pipe, [second])) == {"b": "done"}
    assert not leftovers(album.parent)
    assert len(held(second.output)) == 4
    # a kill right after the commit
    left[0].mkdir()
    failure_path(first.output).write_text('{"dreammover_failure": 1}')
    assert statuses(work(pipe, [first])) == {"a": "skipped"}
    assert not leftovers(album.parent)
    assert not failure_path(first.output).exists()


def test_a_bad_pair_is_recorded_and_the_rest_go_on(pipe, album):
    (album / "cut.png").write_bytes((album / "a0.png").read_bytes()[:900])
    Image.new("RGB", (4000, 4)).save(album / "strip.png")
    (album / "pipe.png").symlink_to(os.devnull)
    memory = Trouble(pipe.unet.conv_in, torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate"), 16)
    jobs = plan(
        album,
        pair("a", img1="cut.png"),
        pair("a", img0="missing.png", output="missing"),
        pair("a", img0="strip.png", output="strip"),
        pair("a", height=128, output="memory"),
        pair("a", lora_steps=6, lora_learning_rate=1000.0, output="nan"),
        {"folder": ".", "output": "folder"},
        pair("a", img0="pipe.png", output="pipe"),
        pair("a", img1=".", output="no photo"),
        pair("b"),
    )
    out = album.parent / "out"
    outcomes = work(pipe, jobs)
    assert statuses(outcomes) == {job.name: "done" if job.name == "b" else "failed" for job in jobs}
    assert held(out) == sorted(["b", "b.json", *(f"{job.name}.error.json" for job in jobs[:-1])])
    assert not leftovers(out)
    assert "img1" in outcomes["a"].note
    assert "cut.png) cannot be read as an image" in outcomes["a"].note
    assert outcomes["memory"].note.startswith("OutOfMemoryError: ")
    assert "diverged" in outcomes["nan"].note
    record = json.loads(outcomes["memory"].record.read_text())
    assert record["error"]["class"] == "OutOfMemoryError"
    assert "\n" not in record["error"]["message"]
    assert any("raise self.error" in line for line in record["error"]["traceback"])
    assert (record["where"], record["settings"]["height"]) == ("manifest.jsonl, line 4", 128)
    assert pipe.unet._hf_peft_config_loaded is False

    # tried again, and forgotten once it works
    memory.height = None
    shutil.copy(album / "a1.png", album / "cut.png")
    outcomes = work(pipe, jobs)
    done = {job.name: "done" for job in jobs if job.name in ("a", "memory")}
    assert statuses(outcomes) == {**{job.name: "failed" for job in jobs}, "b": "skipped", **done}
    assert not failure_path(jobs[0].output).exists()


def test_a_failure_leaves_the_earlier_video_as_it_was(pipe, album):
    (job,) = plan(album, pair("a"))
    work(pipe, [job])
    before = {path: digest(path) for path in (job.output, sidecar_path(job.output))}
    (album / "a1.png").write_bytes(b"no picture")
    assert statuses(work(pipe, [job])) == {"a": "failed"}
    assert {path: digest(path) for path in before} == before


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interruption_abandons_the_pair_at_hand(pipe, album, error):
    jobs = plan(album, pair("a"), pair("b", height=128), pair("c"))
    trouble = Trouble(pipe.unet.conv_in, error(), 16)
    with pytest.raises(error):
        work(pipe, jobs)
    assert held(album.parent / "out") == ["a", "a.json"]
    assert not leftovers(album.parent)
    trouble.height = None
    assert statuses(work(pipe, jobs)) == {"a": "skipped", "b": "done", "c": "done"}


@pytest.fixture
def small_disk(tmp_path):
    """A disk of its own, of 256 KiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a disk needs privileges")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("ending", ["", ".gif", ".mp4"])
def test_a_full_disk_stops_the_run_and_leaves_nothing_half_written(pipe, album, small_disk, ending, monkeypatch):
    temporary = album.parent / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    manifest = album / "manifest.jsonl"
    noise = torch.randint(256, (2, 512, 512, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    for i in (0, 1):
        Image.fromarray(noise[i].numpy()).save(album / f"noise{i}.png")
    rows = [pair("a"), pair("noise", n_frames=1, output=f"big{ending}"), pair("c")]
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    jobs = read_manifest(manifest, small_disk, DEFAULTS)
    check_job_outputs(jobs)
    with pytest.raises(RuntimeError, match=f"no space left on a disk while making 'big{ending}'") as caught:
        work(pipe, jobs)
    (kept,) = temporary.iterdir()  # the frames have room there
    assert f"frames are kept in '{kept}'" in str(caught.value)
    assert {Image.open(frame).size for frame in kept.iterdir()} == {(512, 512)}
    assert held(small_disk) == ["a", "a.json", f"big{ending}.error.json"]
    assert not leftovers(small_disk)
    assert digest(jobs[0].output) == read_sidecar(sidecar_path(jobs[0].output))["output"]["sha256"]


def test_a_video_that_is_scaled_for_players_says_so(pipe, album):
    for i in (0, 1):
        Image.open(album / f"a{i}.png").resize((768, 768)).save(album / f"large{i}.png")
    (job,) = plan(album, pair("large", n_frames=1, fps=1000, output="large.mp4"))
    assert work(pipe, [job])["large.mp4"].note == "scaled from 768x768 to 720x720"
    recorded = read_sidecar(sidecar_path(job.output))["output"]
    assert (recorded["width"], recorded["height"], recorded["frame_size"]) == (720, 720, [768, 768])
    assert iio.imread(job.output).shape == (3, 720, 720, 3)


@pytest.mark.skipif(sys.platform != "linux", reason="needs names that are not UTF-8")
def test_names_that_are_not_utf8_are_recorded(pipe, album):
    (job,) = jobs = plan(album, pair("a", output=os.fsdecode(b"\xff")))
    assert set(statuses(work(pipe, jobs)).values()) == {"done"}
    assert read_sidecar(sidecar_path(job.output))["output"]["name"] == job.name
    assert set(statuses(work(pipe, jobs)).values()) == {"skipped"}


def holder(job):
    """Another process that has claimed a job."""
    work_path(job.output).mkdir(parents=True)
    code = "import filelock, sys; lock = filelock.FileLock(sys.argv[1]); lock.acquire(); print(flush=True); input()"
    command = [sys.executable, "-c", code, str(work_path(job.output) / "lock")]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    process.stdout.readline()
    return process


def test_processes_share_the_work_and_the_first_one_stays_to_the_end(pipe, album):
    jobs = plan(album, pair("a"), pair("b"), pair("c"))
    elsewhere = holder(jobs[1])
    # the second process begins further on, and leaves what another one has
    assert list(statuses(work(pipe, jobs, 1, 3))) == ["a", "c"]
    lines = (album.parent / "out" / ".dreammover" / "journal.jsonl").read_text().splitlines()
    assert [json.loads(line)["name"] for line in lines] == ["c", "a"]
    # its holder dies
    timer = threading.Timer(0.3, elsewhere.kill)
    timer.start()
    assert statuses(work(pipe, jobs)) == {"a": "skipped", "b": "done", "c": "skipped"}
    elsewhere.communicate()


def test_what_another_process_made_or_failed_at_meanwhile_is_not_tried_again(pipe, album):
    (album / "b1.png").write_bytes(b"no picture")
    jobs = plan(album, pair("a"), pair("b"))
    failures = read_failures(jobs)  # of the other process, which began at the same time
    first = work(pipe, jobs)
    record = failure_path(jobs[1].output).read_bytes()
    second = work(pipe, jobs, failures=failures)
    assert statuses(first) == {"a": "done", "b": "failed"}
    assert statuses(second) == {"a": "skipped", "b": "failed"}
    assert second["b"].note == first["b"].note
    assert failure_path(jobs[1].output).read_bytes() == record
    work(pipe, jobs)
    assert failure_path(jobs[1].output).read_bytes() != record


def test_the_table_has_every_pair_and_the_sum(album):
    jobs = plan(album, pair("a"), pair("b"))
    nowhere = Path()
    outcomes = [
        Outcome(jobs[0], "done", 1.23, "", nowhere),
        Outcome(jobs[1], "failed", None, "ValueError: x", nowhere),
    ]
    lines = table(outcomes, 2.0).splitlines()
    assert [line.split() for line in lines[1:3]] == [["a", "done", "1.2"], ["b", "failed", "ValueError:", "x"]]
    assert lines[3] == "2 pairs: 1 done, 0 skipped, 1 failed, in 2.0 s"
