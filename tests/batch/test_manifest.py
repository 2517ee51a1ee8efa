# SPDX-License-Identifier: Apache-2.0
"""Manifests as `.jsonl` and as `.csv`: what they mean and what is refused, by line."""

import csv
import inspect
import json
import os
from dataclasses import replace

import pytest
from support.batches import DEFAULTS, SHORT, pair, plan

from dreammover_pipeline import DreamMoverPipeline
from dreammover_pipeline.batch.jobs import RefusedRowsError
from dreammover_pipeline.batch.manifest import KEYS, PARAMETERS, check_values, read_manifest, settings_of


def test_jsonl_and_csv_say_the_same(album):
    rows = [
        pair("a", prompt="1984", n_frames=5, times=[0.25, 0.5], lora_learning_rate=1, include_inputs=False, seed=7),
        {"folder": "..", "fps": 12.5, "height": 64, "attention_blocks": []},
        pair("b", prompt=["a cat", "a dog"], negative_prompt=["blurry"]),
        pair("c", prompt='["a cat", 3]', negative_prompt="[NaN]"),
        pair("a", output="steered", mask="a0.png", poses=["0.json", "[1].json"]),
        pair("a", output="masked", mask=["a0.png", "../a1.png"]),
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
    assert [replace(job, origin="") for job in jobs] == [replace(job, origin="") for job in others]
    first, second, two_texts, one_text = (job.settings for job in jobs[:4])
    assert [job.files for job in jobs[:4]] == [{}] * 4
    assert jobs[4].files == {"mask": (album / "a0.png",), "poses": (album / "0.json", album / "[1].json")}
    assert jobs[5].files == {"mask": (album / "a0.png", album / "../a1.png")}
    assert (two_texts["prompt"], two_texts["negative_prompt"]) == (["a cat", "a dog"], ["blurry"])
    assert (one_text["prompt"], one_text["negative_prompt"]) == ('["a cat", 3]', "[NaN]")
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
        ("[1]", "line 1: it must be an object"),
        ('{"img0": ', "line 1: it is not valid JSON"),
        ('{"img0": "a0.png"}', "line 1: it must name `img0` and `img1`, or `folder`"),
        ('{"img0": "a0.png", "img1": "a1.png", "folder": "."}', "line 1: it must name"),
        ('{"folder": 3}', "`folder` must be a path, not 3"),
        ('\n{"folder": ".", "frames": 3}', "line 2: it has the unknown key 'frames'; allowed are img0"),
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
        ('{"folder": ".", "mask": "../out/a/m.png", "output": "a"}', "would replace the mask"),
        ('{"folder": ".", "poses": ["../out/a.gif", "b"], "output": "a.gif"}', "would replace the poses"),
        (
            '{"folder": ".", "mask": 3}',
            "line 1: `mask` must be a path, or a list of two paths, one for each photo, not 3",
        ),
        ('{"folder": ".", "mask": ["a", "b", "c"]}', "`mask` must be a path, or a list of two paths"),
        (
            '{"folder": ".", "poses": "a.json"}',
            "`poses` must be a list of two paths, one for each photo, not 'a.json'",
        ),
        ('{"folder": ".", "poses": [[[1, 2, 1]], [[1, 2, 1]]]}', "`poses` must be a list of two paths"),
        ('{"folder": ".", "poses": ["a.json", ""]}', "`poses` must be a path, not ''"),
        ('{"folder": ".", "mask": "x\\u0000"}', r"`mask` must be a path, but '\x00' is in it"),
        ('{"folder": ".", "output": "a.avi"}', "line 1: '"),
        (f'{{"folder": ".", "output": "{"猫" * 81}.gif"}}', "its name has 258 bytes, and at most"),
        (f'{{"folder": ".", "output": "{"n" * 300}"}}', "its name has 300 bytes, and at most"),
        ('{"folder": ".", "output": "taken.mp4"}', "there is a folder of that name"),
        (
            '{"folder": ".", "output": "b.mp4"}',
            "b.mp4.json', but a file of that name is there",
        ),
        (
            '{"folder": ".", "output": "c.mp4"}',
            "c.mp4.error.json', but a file of that name is there",
        ),
        ('{"folder": ".", "output": "x\\u0000"}', r"`output` must be a path, but '\x00' is in it"),
        ('{"folder": "\\ud800"}', r"`folder` must be a path, but '\ud800' is in it"),
        ('{"folder": ".", "seed": -1}', "line 1: `seed` must be at least 0, not -1"),
        ('{"folder": ".", "seed": 9223372036854775808}', "`seed` must be below 2^63"),
        ('{"folder": ".", "seed": "7"}', "`seed` must be an integer"),
        (f'{{"folder": ".", "seed": {10**400}}}', f"the number {10**19}… of 401 characters is not finite"),
        ('{"folder": ".", "fps": 0}', "`fps` must be finite and above 0"),
        ('{"folder": ".", "fps": 60, "output": "a.gif"}', "line 1: fps must be between"),
    ],
)
def test_bad_manifests_are_refused_by_line(album, text, reason):
    manifest = album / "manifest.jsonl"
    manifest.write_text(text)
    out = album.parent / "out"
    for taken in ("taken.mp4", "b.mp4.json", "c.mp4.error.json"):
        (out / taken).mkdir(parents=True)
    (out / "link").symlink_to(album)
    with pytest.raises(ValueError, match=r"\w") as refusal:
        read_manifest(manifest, out, DEFAULTS)
    assert reason in str(refusal.value)
    assert not (album / "a.mp4").exists()


def test_bad_tables_and_files_are_refused(album):
    (album / "device.csv").symlink_to(os.devnull)
    for name, content, reason in [
        ("m.csv", b"folder,seed\n.,1,2\n", "line 2: the cell '2' is in a column that has no key in the first line"),
        ("m.csv", b"folder,seed\n.,many\n", "`seed` must be an integer, not 'many'"),
        ("m.csv", b"folder,fps\n.,1e400\n", "line 2: `fps` has a value that cannot be read: the number 1e400"),
        ("m.csv", b'folder\n"a"b\n', "is not valid CSV after line 2"),
        ("m.csv", b"folder\n\xff\n", "cannot be read: it is neither UTF-8 nor UTF-16 (byte 7 is 0xff)"),
        ("m.csv", b"folder,sed\n.,1\n", "m.csv: it has the unknown key 'sed'"),
        ("m.csv", b"folder,seed,Seed\n.,1,1\n", "m.csv: it has the key 'seed' twice"),
        ("m.csv", b"folder\n \n\n", "holds no pairs"),
        ("m.json", b"[]", "ends in '.json'; allowed are .jsonl and .csv"),
        ("device.csv", None, "cannot be read: it is a pipe, a socket or a device; a text file is needed"),
        ("missing.jsonl", None, "cannot be read: it is no existing file"),
    ]:
        if content is not None:
            (album / name).write_bytes(content)
        with pytest.raises(ValueError, match=r"\w") as refusal:
            read_manifest(album / name, album.parent / "out", DEFAULTS)
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
    with pytest.raises(ValueError, match=f"line 2: .*{reason}.*\n.*line 3: .*{reason}"):
        check_values(pipe, "", plan(album, pair("a"), pair("b", **settings), pair("c", **settings)))
    check_values(pipe, "", plan(album, pair("a")))


def test_poses_without_a_controlnet_are_refused_before_any_pair_is_made(pipe, album):
    with pytest.raises(ValueError, match=r"line 2: `poses` needs a ControlNet.* on the command line by --controlnet"):
        check_values(pipe, "", plan(album, pair("a"), pair("b", poses=["0.json", "1.json"])))


def test_every_plain_argument_of_the_pipeline_can_be_said_and_reaches_a_stage():
    parameters = inspect.signature(DreamMoverPipeline.__call__).parameters
    stages = [inspect.signature(stage).parameters for stage in (DreamMoverPipeline.prepare, DreamMoverPipeline.render)]
    assert set(PARAMETERS) <= {name for stage in stages for name in stage}
    images = {"self", "img0", "img1", "mask"}
    tensors = {"generator", "prompt_embeds", "negative_prompt_embeds", "cross_attention_kwargs"}
    forms = {"output_type", "return_dict", "callback_on_step_end", "callback_on_step_end_tensor_inputs"}
    conditions = {"poses", "control_images", "choices"}
    assert set(parameters) - set(PARAMETERS) == images | tensors | forms | conditions
    assert set(PARAMETERS) < set(KEYS)


def test_rows_of_a_spreadsheet_that_hold_nothing_are_left_out(album):
    (album / "m.csv").write_text("\n,\nfolder,output,seed\n.,a,1\n,\n \n\n.,b,2\n,\n")
    assert [job.settings["seed"] for job in read_manifest(album / "m.csv", album / "out", DEFAULTS)] == [1, 2]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r"])
def test_tables_of_every_spreadsheet_say_the_same(album, encoding, separator, ending):
    rows = [
        [" IMG0", "img1 ", "Prompt", "", "include_inputs", "times"],
        ["a0.png", "a1.png", f'"eine{ending}Möwe, 猫; hier"', "", "FALSE", '"[0.25, 0.5]"', "", " "],
        ["b0.png", "b1.png"],
    ]
    text = ending.join(separator.join(row) for row in rows)
    (album / "m.CSV").write_bytes(text.encode(encoding))
    first, second = (job.settings for job in read_manifest(album / "m.CSV", album / "out", DEFAULTS))
    assert first["prompt"] == "eine\nMöwe, 猫; hier"
    assert (first["include_inputs"], first["times"]) == (False, [0.25, 0.5])
    assert (second["prompt"], second["include_inputs"], second["times"]) == ("", True, None)


@pytest.mark.parametrize(
    "text", [r'"\ud800"', r'["\ud800", "a"]', "9" * 400, "9" * 5000, "1e400", "NaN", "[" * 9 + "]" * 9]
)
def test_no_value_of_any_key_stops_the_check_of_other_rows(album, text):
    keys = [key for key in KEYS if key not in ("img1", "folder")]
    lines = [f'{{"folder": ".", "{key}": {text}}}' for key in keys]
    (album / "m.jsonl").write_text("\n".join([*lines, '{"folder": "."}']))
    with pytest.raises(RefusedRowsError) as refusal:
        read_manifest(album / "m.jsonl", album / "out", DEFAULTS)
    reasons = refusal.value.reasons
    assert [reason.partition(":")[0] for reason in reasons] == [f"m.jsonl, line {i + 1}" for i in range(len(keys))]
    assert [
        key for key, said in zip(keys, reasons, strict=True) if f"`{key}`" not in said and "JSON" not in said
    ] == []
    assert max(map(len, reasons)) < 300


def test_a_key_is_there_once_and_nothing_is_nested_without_end(album):
    deep = "[" * 100_000
    (album / "m.jsonl").write_text(f'{{"folder": ".", "folder": "."}}\n{{"folder": ".", "points": {deep}')
    with pytest.raises(RefusedRowsError, match=r"line 1: .*key 'folder' .*twice\n.*line 2: .*nested in more than 8"):
        read_manifest(album / "m.jsonl", album / "out", DEFAULTS)


@pytest.mark.parametrize(
    ("one", "other"), [({"fps": 16}, {"fps": 16.0}), ({"noise_levels": [0.5, 1]}, {"noise_levels": [0.5, 1.0]})]
)
def test_a_number_makes_one_request_however_it_is_written(one, other):
    written = [json.dumps(settings_of(DEFAULTS, given), sort_keys=True) for given in (one, other)]
    assert written[0] == written[1]


def test_a_row_with_one_side_takes_no_other_from_the_command_line():
    size = {**DEFAULTS, "height": 64, "width": 128}
    assert [settings_of(size, {"height": 32})[side] for side in ("height", "width")] == [32, None]
    assert [settings_of(size, {})[side] for side in ("height", "width")] == [64, 128]
