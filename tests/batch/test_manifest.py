# SPDX-License-Identifier: Apache-2.0
"""Manifests as `.jsonl` and as `.csv`: what they mean and what is refused, by line."""

import csv
import inspect
import json

import pytest
from support.batches import DEFAULTS, SHORT, pair, plan

from dreammover_pipeline import DreamMoverPipeline
from dreammover_pipeline.batch.manifest import PARAMETERS, check_job_outputs, check_values, read_manifest


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
        ('{"img0": ', "line 1 is not valid JSON"),
        ('{"img0": "a0.png"}', "line 1 must name `img0` and `img1`, or `folder`"),
        ('{"img0": "a0.png", "img1": "a1.png", "folder": "."}', "line 1 must name"),
        ('{"folder": 3}', "`folder` must be a path, not 3"),
        ('\n{"folder": ".", "frames": 3}', "line 2 has the unknown key 'frames'; allowed are img0"),
        ('{"folder": ".", "generator": 3}', "unknown key 'generator'"),
        ('{"folder": ".", "output_type": "pt"}', "unknown key 'output_type'"),
        ('{"folder": "."}\n{"folder": "."}', "line 2: the output 'album.mp4' is already the one of manifest"),
        ('{"folder": ".", "output": "x/../album.mp4"}\n{"folder": "."}', "already the one of manifest.jsonl, line 1;"),
        ('{"folder": ".", "output": "../a.mp4"}', "line 1: the output '../a.mp4' must be inside the output folder"),
        ('{"folder": ".", "output": "/a.mp4"}', "must be inside"),
        ('{"folder": ".", "output": "."}', "must be inside"),
        ('{"folder": ".", "output": "link/a.mp4"}', "must be inside"),
        ('{"folder": ".", "output": ".dreammover/lora"}', "not in '.dreammover'"),
        ('{"folder": ".", "output": "a"}\n{"folder": ".", "output": "a/b.mp4"}', "would replace the output"),
        ('{"folder": "../out/a", "output": "a"}', "would replace the photo"),
        ('{"img0": "../out/a/0.png", "img1": "a1.png", "output": "a"}', "would replace the photo"),
        ('{"folder": ".", "output": "a.avi"}', "line 1: '"),
        (f'{{"folder": ".", "output": "{"猫" * 81}.gif"}}', "its name has 258 bytes, and at most"),
        (f'{{"folder": ".", "output": "{"n" * 300}"}}', "its name has 300 bytes, and at most"),
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
        ("m.csv", b'folder\n"a"b\n', "is not valid CSV after line 1"),
        ("m.csv", b"folder\n\xff\n", "cannot be read"),
        ("m.csv", b"folder;seed\n.;1\n", "separates its cells by semicolons; save it with commas"),
        ("m.csv", b"folder\tseed\n.\t1\n", "separates its cells by tabs; save it with commas"),
        ("m.csv", b"folder\n \n\n", "holds no pairs"),
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
        ({"flow": "raft"}, "`flow` must be one of 'features\\+photos', 'features'"),
        ({"flow": [[[0]], [[0]]]}, "flow"),
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


def test_rows_of_a_spreadsheet_that_hold_nothing_are_left_out(album):
    (album / "m.csv").write_text("folder,seed\n.,1\n,\n \n\n.,2\n,\n", encoding="utf-8-sig")
    assert [job.settings["seed"] for job in read_manifest(album / "m.csv", album, DEFAULTS)] == [1, 2]
