# SPDX-License-Identifier: Apache-2.0
"""Models that a batch loads beside the checkpoint."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import PartialState
from diffusers import ControlNetModel
from PIL import Image
from support.batches import SHORT
from support.conditioning import POSES, random_controlnet
from support.ranking import tiny_clip
from transformers import CLIPModel, CLIPProcessor

from dreammover_pipeline import DreamMoverPipeline
from dreammover_pipeline.batch.sidecar import digest, read_sidecar
from dreammover_pipeline.cli.main import main

pytestmark = pytest.mark.usefixtures("restored_logging")

NOISE = {**SHORT, "n_frames": 1, "method": "noise", "candidates": 3, "rank_by": ["a fish", "a robot"]}


@pytest.fixture
def folder(album, pipe, monkeypatch):
    """The folder of the photos, with a `model`, a manifest, and two CLIPs that differ, `clip` and `other`."""
    pipe.save_pretrained(album / "model")
    for seed, name in enumerate(("clip", "other")):
        for part in tiny_clip(pipe.tokenizer, seed):
            part.save_pretrained(album / name)
    row = {"img0": "a0.png", "img1": "a1.png", "output": "video", **NOISE}
    (album / "pairs.jsonl").write_text(json.dumps(row))
    monkeypatch.chdir(album)
    yield album
    PartialState._reset_state()


BATCH = ["batch", "pairs.jsonl", "-o", "out", "--model=model", "--device=cpu", "--quiet"]
AGAIN = ["again", "out/video.json", "-o", "again", "--device=cpu", "--quiet"]


def test_a_clip_ranks_the_candidates_of_a_batch_and_is_recorded(folder, photos, capsys):
    assert main([*BATCH, "--clip", "clip"]) == 0
    ranking = {"clip": CLIPModel.from_pretrained("clip"), "clip_processor": CLIPProcessor.from_pretrained("clip")}
    pipe = DreamMoverPipeline.from_pretrained("model", **ranking)
    pipe.set_progress_bar_config(disable=True)
    output = pipe(*photos, **NOISE, generator=torch.Generator().manual_seed(0))
    np.testing.assert_array_equal(Image.open("out/video/frame_0001.png"), output.frames[0][0])
    assert read_sidecar(folder / "out" / "video.json")["model"]["clip"] == "clip"

    assert main(AGAIN) == 0
    assert digest(folder / "again" / "video") == digest(folder / "out" / "video")
    capsys.readouterr()
    assert main([*AGAIN, "--clip", "other"]) == 2
    assert "was named 'model' with the CLIP 'clip' and has other weights" in (error := capsys.readouterr().err)
    assert "give the right one by --model and --clip" in error


def test_candidates_without_a_clip_are_refused_in_words_for_the_command_line(folder, capsys):
    assert main(BATCH) == 2
    assert "on the command line by --clip" in capsys.readouterr().err


def test_a_sidecar_of_before_there_were_other_models_and_files_makes_its_video_again(folder, capsys):
    row = json.loads((folder / "pairs.jsonl").read_text())
    (folder / "pairs.jsonl").write_text(json.dumps(row | {"candidates": 1}))
    assert main(BATCH) == 0
    sidecar = folder / "out" / "video.json"
    record = json.loads(sidecar.read_text())
    assert (record["model"].pop("clip"), record["model"].pop("controlnet"), record.pop("files")) == (None, None, {})
    sidecar.write_text(json.dumps(record))
    assert main(AGAIN) == 0
    assert digest(folder / "again" / "video") == digest(folder / "out" / "video")
    capsys.readouterr()
    assert main(BATCH) == 0
    assert "1 pairs: 0 done, 1 skipped" in capsys.readouterr().out


# The frames as diffusion makes them, since the photos' detail covers much of what a random ControlNet does.
STEERED = {**SHORT, "n_frames": 1, "controlnet_conditioning_scale": 0.7, "detail": "upsampled"}


@pytest.fixture
def steered(folder, pipe):
    """A manifest whose row has a mask and poses, and a ControlNet, `controlnet`; the folder of the photos."""
    random_controlnet(pipe.unet).save_pretrained(folder / "controlnet")
    for i, points in enumerate(POSES):
        people = [{"pose_keypoints_2d": [number for point in points for number in point]}]
        (folder / f"pose_{i}.json").write_text(json.dumps({"people": people}))
    moving = np.zeros((64, 64), np.uint8)
    moving[8:40, 8:56] = 255
    Image.fromarray(moving).save(folder / "mask.png")
    row = {"img0": "a0.png", "img1": "a1.png", "output": "video", **STEERED}
    row |= {"mask": "mask.png", "poses": ["pose_0.json", "pose_1.json"]}
    (folder / "pairs.jsonl").write_text(json.dumps(row))
    return folder


def test_masks_and_poses_of_a_batch_are_followed_and_recorded(steered, photos):
    assert main([*BATCH, "--controlnet", "controlnet"]) == 0
    pipe = DreamMoverPipeline.from_pretrained("model", controlnet=ControlNetModel.from_pretrained("controlnet"))
    pipe.set_progress_bar_config(disable=True)
    steering = {"mask": "mask.png", "poses": POSES}
    made = np.asarray(Image.open("out/video/frame_0001.png"))
    np.testing.assert_array_equal(made, pipe(*photos, **STEERED, **steering).frames[0][0])
    for name in steering:
        assert (made != pipe(*photos, **STEERED, **steering | {name: None}).frames[0][0]).any(), name
    record = read_sidecar(steered / "out" / "video.json")
    assert (record["model"]["controlnet"], record["model"]["clip"]) == ("controlnet", None)
    files = {name: [file["path"] for file in files] for name, files in record["files"].items()}
    assert files == {"mask": ["../mask.png"], "poses": ["../pose_0.json", "../pose_1.json"]}
    assert main(AGAIN) == 0
    assert digest(steered / "again" / "video") == digest(steered / "out" / "video")


def _failure(folder):
    """Why the video of a folder was not made."""
    return json.loads(Path(folder, "video.error.json").read_text())["error"]["message"]


def test_another_pose_makes_a_video_anew_and_cannot_make_it_again(steered, capsys):
    batch = [*BATCH, "--controlnet=controlnet"]
    assert main(batch) == 0
    before = digest(steered / "out" / "video")
    (steered / "pose_1.json").write_bytes((steered / "pose_0.json").read_bytes())
    assert main(AGAIN) == 1
    assert "`poses`: '../pose_1.json' is not the one of" in _failure("again")
    capsys.readouterr()
    assert main(batch) == 0
    assert "1 pairs: 1 done, 0 skipped" in capsys.readouterr().out
    assert digest(steered / "out" / "video") != before
    (steered / "pose_1.json").unlink()
    assert main(batch) == 1
    assert "`poses` (pose_1.json) is no existing file; a file is needed" in _failure("out")


def test_a_sidecar_whose_files_are_damaged_is_none(steered, capsys):
    assert main([*BATCH, "--controlnet=controlnet"]) == 0
    sidecar = steered / "out" / "video.json"
    record = json.loads(sidecar.read_text())
    for files in ([], {"mask": 3}, {"mask": [{"path": "mask.png"}]}):
        sidecar.write_text(json.dumps(record | {"files": files}))
        assert read_sidecar(sidecar) is None
    sidecar.write_text(json.dumps(record | {"files": {"lens": record["files"]["mask"]}}))
    assert main(AGAIN) == 2
    assert "it records files for the unknown argument 'lens'" in capsys.readouterr().err
