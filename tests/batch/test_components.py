# SPDX-License-Identifier: Apache-2.0
"""Models that a batch loads beside the checkpoint."""

import json

import numpy as np
import pytest
import torch
from accelerate import PartialState
from PIL import Image
from support.batches import SHORT
from support.ranking import tiny_clip
from transformers import CLIPModel, CLIPProcessor

from dreammover_pipeline import DreamMoverPipeline
from dreammover_pipeline.batch.jobs import OF_POSES
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


def test_a_sidecar_of_before_there_were_clips_makes_its_video_again(folder, capsys):
    row = json.loads((folder / "pairs.jsonl").read_text())
    (folder / "pairs.jsonl").write_text(json.dumps(row | {"candidates": 1}))
    assert main(BATCH) == 0
    sidecar = folder / "out" / "video.json"
    record = json.loads(sidecar.read_text())
    assert record["model"].pop("clip") is None
    assert record["settings"].keys() >= set(OF_POSES)
    sidecar.write_text(json.dumps(record))
    assert main(AGAIN) == 0
    assert digest(folder / "again" / "video") == digest(folder / "out" / "video")


@pytest.mark.parametrize("name", OF_POSES)
def test_a_batch_does_not_take_what_acts_only_on_poses(folder, capsys, name):
    assert main([*BATCH, f"--{name.replace('_', '-')}=0.5"]) == 2
    assert "unrecognized arguments" in capsys.readouterr().err
    (folder / "pairs.jsonl").write_text(json.dumps({"folder": ".", name: 0.5}))
    assert main(BATCH) == 2
    assert f"it has the unknown key '{name}'" in capsys.readouterr().err
