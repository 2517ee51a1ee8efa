# SPDX-License-Identifier: Apache-2.0
"""One pair: its video and its sidecar."""

import json

import torch
from PIL import Image
from support.batches import SHORT, held, leftovers, pair, plan, statuses, work

from dreammover_pipeline.batch.jobs import find_photos
from dreammover_pipeline.batch.manifest import PARAMETERS
from dreammover_pipeline.batch.sidecar import digest, stack_of


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
        "frame_size": [64, 64],
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
