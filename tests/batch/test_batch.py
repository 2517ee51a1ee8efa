# SPDX-License-Identifier: Apache-2.0
"""Many pairs: manifests, what is made of them, and everything that may go wrong with one pair or all of them."""

import csv
import inspect
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from PIL import Image

from dreammover_pipeline import DreamMoverPipeline
from dreammover_pipeline.batch.jobs import find_photos
from dreammover_pipeline.batch.journal import Journal
from dreammover_pipeline.batch.lora_cache import LoraCache, lora_key
from dreammover_pipeline.batch.manifest import (
    PARAMETERS,
    check_job_outputs,
    check_values,
    read_manifest,
    read_sidecars,
)
from dreammover_pipeline.batch.run import Outcome, run, table
from dreammover_pipeline.batch.sidecar import (
    digest,
    failure_path,
    read_failures,
    read_sidecar,
    sidecar_path,
    stack_of,
    work_path,
)
from dreammover_pipeline.batch.worker import Worker

SHORT = {"n_frames": 2, "num_inference_steps": 4, "inversion_steps": 2, "feature_step": 1, "lora_steps": 0}
DEFAULTS = {**SHORT, "seed": 0, "fps": 16}


@pytest.fixture
def album(tmp_path, photos):
    """A folder with photos `a0.png`, `a1.png`, `b0.png`, …, the pictures of each letter in other colours."""
    folder = tmp_path / "album"
    folder.mkdir()
    for turn, letter in enumerate("abc"):
        for i, photo in enumerate(photos):
            channels = photo.split()
            Image.merge("RGB", channels[turn:] + channels[:turn]).save(folder / f"{letter}{i}.png")
    return folder


def pair(letter, **settings):
    return {"img0": f"{letter}0.png", "img1": f"{letter}1.png", "output": f"{letter}", **settings}


def plan(album, *rows, **defaults):
    """The checked jobs of rows."""
    manifest = album / "manifest.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    jobs = read_manifest(manifest, album.parent / "out", {**DEFAULTS, **defaults})
    check_job_outputs(jobs)
    return jobs


def work(pipe, jobs, process=0, processes=1, failures=None):
    """A run of jobs that are in one folder of outputs; how each ended, by name."""
    worker = Worker(pipe, "random", jobs[0].output.parent)
    outcomes = run(worker, jobs, read_failures(jobs) if failures is None else failures, process, processes, quiet=True)
    return {outcome.job.name: outcome for outcome in outcomes}


def statuses(outcomes):
    return {name: outcome.status for name, outcome in outcomes.items()}


def held(folder):
    """What a folder of outputs holds for its user."""
    return sorted(path.name for path in folder.iterdir() if path.name != ".dreammover")


def leftovers(folder):
    return [path for path in folder.rglob("*") if "making-" in path.name or path.name.startswith(".dreammover-")]


# Manifests


def test_jsonl_and_csv_say_the_same(album):
    rows = [
        pair("a", prompt="1984", n_frames=5, times=[0.25, 0.5], lora_learning_rate=1, include_inputs=False, seed=7),
        {"folder": "..", "fps": 12.5, "height": 64, "attention_blocks": []},
    ]
    jobs = plan(album, *rows)
    table = album / "manifest.csv"
    keys = list({key: None for row in rows for key in row})
    with table.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(keys)
        for row in rows:
            cells = [row.get(key, "") for key in keys]
            writer.writerow([cell if isinstance(cell, str) else json.dumps(cell) for cell in cells])
    others = read_manifest(table, album.parent / "out", DEFAULTS)
    assert [(j.photos, j.output, j.settings) for j in jobs] == [(j.photos, j.output, j.settings) for j in others]
    first, second = (job.settings for job in jobs)
    assert (first["prompt"], first["times"], first["include_inputs"]) == ("1984", [0.25, 0.5], False)
    assert type(first["lora_learning_rate"]) is float
    assert (second["n_frames"], second["include_inputs"], second["seed"]) == (2, True, 0)  # default, ours, default
    assert second["num_inference_steps"] == SHORT["num_inference_steps"]
    assert second["lora_rank"] == inspect.signature(DreamMoverPipeline.__call__).parameters["lora_rank"].default


def test_outputs_without_a_name_are_named_by_what_they_show(album):
    rows = [{"img0": "a0.png", "img1": "a1.png"}, {"folder": "."}, {"folder": str(album.parent)}]
    assert [job.name for job in plan(album, *rows)] == ["a0-a1.mp4", "album.mp4", f"{album.parent.name}.mp4"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "holds no pairs"),
        ("[1]", "line 1 must be an object"),
        ('{"img0": ', "line 1 is no JSON"),
        ('{"img0": "a0.png"}', "line 1 must name `img0` and `img1`, or `folder`"),
        ('{"img0": "a0.png", "img1": "a1.png", "folder": "."}', "line 1 must name"),
        ('{"folder": 3}', "`folder` must be a path, not 3"),
        ('\n{"folder": ".", "frames": 3}', "line 2 has the unknown key 'frames'; allowed are img0"),
        ('{"folder": ".", "generator": 3}', "unknown key 'generator'"),
        ('{"folder": ".", "output_type": "pt"}', "unknown key 'output_type'"),
        ('{"folder": "."}\n{"folder": "."}', "line 2: the output 'album.mp4' is manifest.jsonl, line 1's already"),
        ('{"folder": ".", "output": "x/../album.mp4"}\n{"folder": "."}', "is manifest.jsonl, line 1's already"),
        ('{"folder": ".", "output": "../a.mp4"}', "line 1: the output '../a.mp4' must be inside the output folder"),
        ('{"folder": ".", "output": "/a.mp4"}', "must be inside"),
        ('{"folder": ".", "output": "."}', "must be inside"),
        ('{"folder": ".", "output": "link/a.mp4"}', "must be inside"),
        ('{"folder": ".", "output": ".dreammover/lora"}', "not in '.dreammover'"),
        ('{"folder": ".", "output": "a"}\n{"folder": ".", "output": "a/b.mp4"}', "would replace the output"),
        ('{"folder": "../out/a", "output": "a"}', "would replace the photo"),
        ('{"img0": "../out/a/0.png", "img1": "a1.png", "output": "a"}', "would replace the photo"),
        ('{"folder": ".", "output": "a.avi"}', "line 1: '"),
        ('{"folder": ".", "output": "taken.mp4"}', "there is a folder of that name"),
        ('{"folder": ".", "seed": -1}', "line 1: `seed` must be at least 0, not -1"),
        ('{"folder": ".", "seed": 9223372036854775808}', "`seed` must be below 2^63"),
        ('{"folder": ".", "seed": "7"}', "`seed` must be an integer"),
        ('{"folder": ".", "fps": 0}', "`fps` must be finite and above 0"),
        ('{"folder": ".", "fps": 60, "output": "a.gif"}', "line 1: fps must be between"),
    ],
)
def test_bad_manifests_are_refused_by_line(album, text, reason):
    manifest = album / "manifest.jsonl"
    manifest.write_text(text)
    out = album.parent / "out"
    (out / "taken.mp4").mkdir(parents=True)
    (out / "link").symlink_to(album)
    with pytest.raises(ValueError, match=r"\w") as refusal:
        check_job_outputs(read_manifest(manifest, out, DEFAULTS))
    assert reason in str(refusal.value)
    assert not (album / "a.mp4").exists()


def test_bad_tables_and_files_are_refused(album):
    for name, content, reason in [
        ("m.csv", b"folder,seed\n.,1,2\n", "line 2 has more cells"),
        ("m.csv", b"folder,seed\n.,many\n", "`seed` must be an integer, not 'many'"),
        ("m.csv", b'folder\n"a"b\n', "is no CSV after line 1"),
        ("m.csv", b"folder\n\xff\n", "cannot be read"),
        ("m.json", b"[]", "ends in '.json'; allowed are .jsonl and .csv"),
        ("missing.jsonl", None, "cannot be read"),
    ]:
        if content is not None:
            (album / name).write_bytes(content)
        with pytest.raises(ValueError, match=r"\w") as refusal:
            read_manifest(album / name, album.parent, DEFAULTS)
        assert reason in str(refusal.value)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"n_frames": 0}, "n_frames"),
        ({"inversion_steps": 9}, "must nest"),
        ({"fusion": "none"}, "fusion"),
        ({"attention_blocks": [9]}, "attention_blocks"),
        ({"prompt": ["a", "b", "c"]}, "prompt"),
        ({"negative_prompt": 3}, "negative_prompt"),
        ({"guidance_scale": "high"}, "guidance_scale"),
        ({"height": 0.5}, "height"),
    ],
)
def test_what_the_pipeline_refuses_is_refused_for_all_before_any_is_made(pipe, album, settings, reason):
    jobs = plan(album, pair("a"), pair("b", **settings))
    with pytest.raises(ValueError, match=f"line 2: .*{reason}"):
        check_values(pipe, "", jobs)
    check_values(pipe, "", jobs[:1])


def test_every_plain_argument_of_the_pipeline_can_be_said_and_reaches_a_stage():
    parameters = inspect.signature(DreamMoverPipeline.__call__).parameters
    stages = [inspect.signature(stage).parameters for stage in (DreamMoverPipeline.prepare, DreamMoverPipeline.render)]
    assert set(PARAMETERS) <= {name for stage in stages for name in stage}
    images = {"self", "img0", "img1", "mask"}
    tensors = {"generator", "prompt_embeds", "negative_prompt_embeds", "cross_attention_kwargs"}
    forms = {"output_type", "return_dict", "callback_on_step_end", "callback_on_step_end_tensor_inputs"}
    assert set(parameters) - set(PARAMETERS) == images | tensors | forms


def test_a_folder_has_one_photo_of_each_end(album):
    (job,) = plan(album, {"folder": "pair"})
    folder = album / "pair"
    with pytest.raises(ValueError, match="cannot be read"):
        find_photos(job)
    folder.mkdir()
    for name in ("0.jpg", "1.webp", "0.250.png", "1.txt", "10.png"):
        (folder / name).touch()
    assert find_photos(job) == (folder / "0.jpg", folder / "1.webp")
    (folder / "1.PNG").touch()
    with pytest.raises(ValueError, match=r"one photo '1\.\*', but it holds 1\.PNG and 1\.webp"):
        find_photos(job)


# One pair


def test_a_video_its_sidecar_and_nothing_else(pipe, album):
    jobs = plan(album, pair("a", n_frames=3, output="deep/a.mp4", prompt=["one", "other"]), {**pair("b")})
    outcomes = work(pipe, [jobs[1]]) | work(pipe, [jobs[0]])
    assert statuses(outcomes) == {"deep/a.mp4": "done", "b": "done"}
    out = album.parent / "out"
    assert held(out) == ["b", "b.json", "deep"]
    assert held(out / "deep") == ["a.mp4", "a.mp4.json"]
    assert held(out / "b") == [f"frame_{i:04d}.png" for i in range(4)]
    assert not leftovers(out)
    record = json.loads((out / "deep" / "a.mp4.json").read_text())
    assert record["output"] == {
        "name": "deep/a.mp4",
        "sha256": digest(out / "deep" / "a.mp4"),
        "frames": 5,
        "times": [0.0, 0.25, 0.5, 0.75, 1.0],
        "width": 64,
        "height": 64,
        "blacked_out": 0,
    }
    assert [(out / "deep" / photo["path"]).resolve() for photo in record["inputs"]] == [
        album / "a0.png",
        album / "a1.png",
    ]
    assert [photo["sha256"] for photo in record["inputs"]] == [digest(album / "a0.png"), digest(album / "a1.png")]
    assert set(record["settings"]) == {*PARAMETERS, "seed", "fps"}
    assert record["settings"]["prompt"] == ["one", "other"]
    assert record["model"] == {"name": "random", "fingerprint": pipe.fingerprint()}
    assert set(record["seconds"]) == {"prepare", "render", "write"}
    assert record["stack"] == stack_of(pipe)
    assert record["lora"] is None


def test_frames_are_those_of_a_call_with_the_same_arguments(pipe, album):
    settings = {**SHORT, "lora_steps": 2, "n_frames": 3, "guidance_scale": 2.0, "negative_prompt": "fog", "width": 96}
    (job,) = plan(album, pair("a", **settings, seed=5, prompt="a blob"))
    work(pipe, [job])
    generator = torch.Generator().manual_seed(5)
    called = pipe(*find_photos(job), **settings, prompt="a blob", include_inputs=True, generator=generator)
    paths = sorted(job.output.iterdir())
    assert len(paths) == 5
    for path, frame in zip(paths, called.frames[0], strict=True):
        assert Image.open(path).tobytes() == frame.tobytes()


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
    assert outcomes["b"].note == "not the recorded bytes; the stack is another"
    with pytest.raises(ValueError, match="was made with another checkpoint, 'random' as it was then"):
        check_values(pipe, "0" * 64, again)
    for path in (album / "manifest.jsonl", failure_path(again[0].output), album / "missing.json"):
        with pytest.raises(ValueError, match="is no sidecar"):
            read_sidecars([path], album.parent)


# Going on


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
    second.output.mkdir()  # renamed into place, but not committed
    (second.output / "frame_0000.png").touch()
    work(pipe, [first])
    assert [folder.exists() for folder in left] == [False, True]
    assert statuses(work(pipe, [second])) == {"b": "done"}
    assert not leftovers(album.parent)
    assert len(held(second.output)) == 4
    # a kill right after the commit
    left[0].mkdir()
    failure_path(first.output).write_text("{}")
    assert statuses(work(pipe, [first])) == {"a": "skipped"}
    assert not leftovers(album.parent)
    assert not failure_path(first.output).exists()


# What fails


class Trouble:
    """A hook on a layer that raises for inputs of one height."""

    def __init__(self, module, error, height):
        self.error, self.height = error, height
        module.register_forward_pre_hook(self)

    def __call__(self, module, inputs):
        if self.height is not None and inputs[0].shape[-2] == self.height:
            raise self.error


def test_a_bad_pair_is_recorded_and_the_rest_go_on(pipe, album):
    (album / "cut.png").write_bytes((album / "a0.png").read_bytes()[:900])
    Image.new("RGB", (4000, 4)).save(album / "strip.png")
    memory = Trouble(pipe.unet.conv_in, torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate"), 16)
    jobs = plan(
        album,
        pair("a", img1="cut.png"),
        pair("a", img0="missing.png", output="missing"),
        pair("a", img0="strip.png", output="strip"),
        pair("a", height=128, output="memory"),
        pair("a", lora_steps=2, lora_learning_rate=1e30, output="nan"),
        {"folder": ".", "output": "folder"},
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
def test_a_full_disk_stops_the_run_and_leaves_nothing_half_written(pipe, album, small_disk, ending):
    manifest = album / "manifest.jsonl"
    noise = torch.randint(256, (2, 512, 512, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    for i in (0, 1):
        Image.fromarray(noise[i].numpy()).save(album / f"noise{i}.png")
    rows = [pair("a"), pair("noise", n_frames=1, output=f"big{ending}"), pair("c")]
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    jobs = read_manifest(manifest, small_disk, DEFAULTS)
    check_job_outputs(jobs)
    with pytest.raises(RuntimeError, match=f"no space left on a disk while making 'big{ending}'"):
        work(pipe, jobs)
    assert held(small_disk) == ["a", "a.json", f"big{ending}.error.json"]
    assert not leftovers(small_disk)
    assert digest(jobs[0].output) == read_sidecar(sidecar_path(jobs[0].output))["output"]["sha256"]


# Several processes


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


def test_the_journal_gives_whole_lines_once(tmp_path):
    path = tmp_path / "journal.jsonl"
    early = Journal(path)
    early.append({"name": "a"})
    late = Journal(path)
    early.append({"name": "b"})
    with path.open("a") as file:
        file.write('{"name": "cut')
    assert [record["name"] for record in early.news()] == ["a", "b"]
    assert [record["name"] for record in late.news()] == ["b"]
    late.append({"name": "c"})  # spoilt by the line that was cut off
    late.append({"name": "d"})
    assert [record["name"] for record in early.news()] == ["d"]
    assert early.news() == []


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


# LoRAs


def loras(pipe, jobs):
    work(pipe, jobs)
    return [read_sidecar(sidecar_path(job.output))["lora"] for job in jobs]


def test_a_lora_is_kept_by_what_decides_it_and_not_by_a_name(pipe, album):
    shutil.copy(album / "a0.png", album / "d0.png")
    Image.open(album / "a1.png").save(album / "d1.png", compress_level=0)  # the same pixels in other bytes
    base = {"lora_steps": 1, "seed": 1}
    rows = [
        pair("a", **base),
        pair("b", **base),
        pair("a", **base, height=96, output="size"),
        pair("d", **base),
        pair("a", **base, n_frames=1, output="frames"),
        pair("a", **{**base, "lora_steps": 0}, output="none"),
    ]
    assert loras(pipe, plan(album, *rows)) == ["fitted", "fitted", "fitted", "cached", "cached", None]
    with torch.no_grad():
        pipe.unet.conv_out.bias += 0.1
    assert loras(pipe, plan(album, rows[0])) == ["fitted"]


def test_a_kept_lora_gives_the_same_bytes_and_a_damaged_one_is_not_there(pipe, album):
    (job,) = plan(album, pair("a", lora_steps=2))
    work(pipe, [job])
    before = digest(job.output)
    folder = album.parent / "out" / ".dreammover" / "lora"
    (file,) = folder.iterdir()
    content = file.read_bytes()
    for damage, source in ((content, "cached"), (content[:-1], "fitted"), (content[:5], "fitted"), (b"", "fitted")):
        file.write_bytes(damage)
        shutil.rmtree(job.output)
        assert loras(pipe, [job]) == [source]
        assert digest(job.output) == before
        assert list(folder.iterdir()) == [file]
        assert file.read_bytes() == content


def test_a_kept_lora_is_loaded_to_where_torch_itself_would_put_it(tmp_path):
    """That is, to multiples of 64, whatever the length of the file's header and the sizes of the weights in it."""
    cache = LoraCache(tmp_path)
    for length in range(64):
        weights = {"a" * (1 + length): torch.randn(3, 7), "b.lora_B.weight": torch.randn(5, 3)}
        cache.save("key", weights, "owner")
        loaded = cache.load("key")
        assert all(torch.equal(loaded[name], weight) for name, weight in weights.items())
        assert {weight.data_ptr() % 64 for weight in loaded.values()} == {0}


def test_the_key_of_a_lora(pipe, album):
    pixels, stack = torch.zeros(2, 3, 8, 8), stack_of(pipe)

    def key(pixels=pixels, fingerprint="f", stack=stack, **settings):
        (job,) = plan(album, pair("a", **settings))
        return lora_key(job, pixels, fingerprint, stack)

    others = [
        key(prompt="a blob"),
        key(seed=2),
        key(lora_steps=2),
        key(lora_rank=2),
        key(lora_learning_rate=0.1),
        key(clip_skip=1),
        key(pixels=pixels + 1e-7),
        key(pixels=pixels.reshape(2, 3, 4, 16)),
        key(fingerprint="g"),
        key(stack={**stack, "dtype": "float16"}),
    ]
    assert len({key(), *others}) == 1 + len(others)
    assert key() == key(lora_scale=0.5, n_frames=9, fusion="direct", inversion_steps=3, output="other", fps=1)
    assert LoraCache(album / "cache").load(key()) is None
