# SPDX-License-Identifier: Apache-2.0
"""Runs that are killed and go on."""

import json
import re
from dataclasses import replace
from importlib import metadata

import pytest
import torch
from PIL import Image

pytest.importorskip("skimage")
pytest.importorskip("cv2")

from support.evaluations import CHEAP, HEADER, TOOLS, evaluated

from dreammover_pipeline.evaluation.run import ROWS, RunFile, header, read_strip, write_strip
from dreammover_pipeline.evaluation.suites import folder_suite, world_suite


def keys(rows):
    return [(row["suite"], row["pair"], row["method"]) for row in rows]


def test_a_file_cut_anywhere_keeps_its_whole_rows_and_goes_on(tmp_path):
    file = RunFile.start(tmp_path, HEADER)
    rows = [{"suite": "same", "pair": "1", "method": name, "metrics": {"psnr": 1.5}} for name in "αβγ"]
    for row in rows:
        file.append(row)
    content = file.path.read_bytes()
    for cut in range(len(content) + 1):
        file.path.write_bytes(content[:cut])
        again = RunFile.start(tmp_path, HEADER)
        whole = content[:cut].count(b"\n")
        assert again.rows == rows[: max(0, whole - 1)]
        for row in rows[len(again.rows) :]:
            again.append(row)
        assert file.path.read_bytes() == content


def test_a_run_of_something_else_is_not_gone_on_with(tmp_path):
    RunFile.start(tmp_path, HEADER)
    before = (tmp_path / ROWS).read_bytes()
    with pytest.raises(ValueError, match="holds a run with seed 0, not 1"):
        RunFile.start(tmp_path, HEADER | {"seed": 1})
    assert (tmp_path / ROWS).read_bytes() == before
    with pytest.raises(ValueError, match="holds no run"):
        RunFile.read(tmp_path / "elsewhere")


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"my own notes", 1),
        (b"my own notes\n", 1),
        (b'{"a": 1}\n{"a": 2', 1),
        (b"a,b\n1,2\n", 1),
        (b"[]\n", 1),
        (b"\xff\n", 1),
        (b"[" * 100_000 + b"\n", 1),
        (json.dumps(HEADER).encode() + b'\n{"a": 1}\n{"b', 2),
    ],
)
def test_a_file_that_is_no_run_is_named_and_left_as_it_is(tmp_path, content, line):
    path = tmp_path / ROWS
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{ROWS}' is not the file of an evaluation, as its line {line} shows"):
        RunFile.start(tmp_path, HEADER)
    assert path.read_bytes() == content
    with pytest.raises(ValueError, match=re.escape(str(tmp_path))):
        RunFile.read(tmp_path)


def test_a_run_that_is_refused_keeps_a_line_that_was_cut(tmp_path):
    content = RunFile.start(tmp_path, HEADER).path.read_bytes() + b'{"suite": "sa'
    (tmp_path / ROWS).write_bytes(content)
    with pytest.raises(ValueError, match="holds a run with seed 0, not 1"):
        RunFile.start(tmp_path, HEADER | {"seed": 1})
    assert (tmp_path / ROWS).read_bytes() == content


def test_a_killed_run_goes_on_where_it_was(pipe, tmp_path):
    suite = world_suite("same", 3, 2, 64)
    whole = evaluated(pipe, tmp_path / "whole", [suite])
    assert keys(whole.rows) == [("same", pair, method) for pair in suite.pairs for method in CHEAP]

    path = evaluated(pipe, tmp_path / "cut", [suite]).path
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:4]) + lines[4][:50])  # killed while it wrote its fourth row
    loaded = []

    def load(name):
        loaded.append(name)
        return suite.load(name)

    resumed = evaluated(pipe, tmp_path / "cut", [replace(suite, load=load)])
    assert loaded == list(suite.pairs[1:])  # the first pair was done
    assert path.read_bytes().startswith(b"".join(lines[:4]))
    assert keys(resumed.rows) == keys(whole.rows)
    assert [row["metrics"] for row in resumed.rows] == [row["metrics"] for row in whole.rows]
    assert RunFile.read(tmp_path / "cut").rows == resumed.rows

    size = path.stat().st_size
    evaluated(pipe, tmp_path / "cut", [suite])
    assert path.stat().st_size == size
    evaluated(pipe, tmp_path / "cut", [suite], [*CHEAP, "noise"])  # later, another method
    assert keys(RunFile.read(tmp_path / "cut").rows)[6:] == [("same", pair, "noise") for pair in suite.pairs]


def test_a_run_that_is_interrupted_keeps_what_it_has(pipe, tmp_path):
    suite = world_suite("relit", 2, 1, 64)

    def load(name):
        if name == suite.pairs[1]:
            raise KeyboardInterrupt
        return suite.load(name)

    with pytest.raises(KeyboardInterrupt):
        evaluated(pipe, tmp_path, [replace(suite, load=load)])
    assert len(RunFile.read(tmp_path).rows) == 2
    assert keys(evaluated(pipe, tmp_path, [suite]).rows) == [
        ("relit", pair, method) for pair in suite.pairs for method in CHEAP
    ]


def test_a_row_says_what_it_is_of(pipe, tmp_path):
    suite = world_suite("same", 1, 3, 64)
    file = evaluated(pipe, tmp_path, [suite])
    (crossfade, _) = file.rows
    assert crossfade["times"] == [0.25, 0.5, 0.75]
    assert crossfade["seconds"] >= 0
    pair = suite.load(suite.pairs[0])
    kept = read_strip(file.strip("same", pair.name, "crossfade"), 3)
    delta = torch.tensor(pair.times).reshape(-1, 1, 1, 1)
    assert (kept - torch.lerp(*pair.images, delta)).abs().max() <= 0.501 / 255
    expected = -10 * torch.log10((kept - pair.truth).double().square().flatten(1).mean(1)).mean()
    assert crossfade["metrics"]["psnr"] == pytest.approx(float(expected))
    assert file.header["versions"]["torch"] == metadata.version("torch")
    assert file.header["suites"] == {"same": {"pairs": list(suite.pairs), "frames": 3, "size": 64}}
    other = header(pipe, "random", [suite], 0, {}, "dis", TOOLS)
    assert other == file.header
    next(pipe.unet.parameters()).data += 1
    assert header(pipe, "random", [suite], 0, {}, "dis", TOOLS)["weights"] != other["weights"]


def test_strips_keep_frames_to_eight_bits(tmp_path):
    frames = torch.rand(3, 3, 5, 7)
    write_strip(frames, tmp_path / "a" / "b.png")
    assert (read_strip(tmp_path / "a" / "b.png", 3) - frames).abs().max() <= 0.501 / 255
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b.png"]


def test_a_run_of_ones_own_photos_says_which_they_are(tmp_path):
    def suite(first, words="a cat"):
        for name in ("a", "b"):
            (tmp_path / name).mkdir(exist_ok=True)
            for end, grey in ((0, first), (1, 200)):
                Image.new("RGB", (64, 64), (grey,) * 3).save(tmp_path / name / f"{end}.png")
            (tmp_path / name / "prompt.txt").write_text(words)
        return folder_suite(tmp_path, 1).parameters

    before = suite(10)
    assert suite(10) == before
    assert len({str(parameters) for parameters in (before, suite(11), suite(10, "a dog"))}) == 3
    (tmp_path / "b" / "1.png").write_text("broken")
    with pytest.raises(ValueError, match=r"1\.png' is no picture that can be read"):
        folder_suite(tmp_path, 1)
    suite(10)
    (tmp_path / "b" / "prompt.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"prompt\.txt' cannot be read"):
        folder_suite(tmp_path, 1)


def test_strips_may_be_longer_than_pictures_of_others(tmp_path, monkeypatch):
    frames = torch.rand(4, 3, 5, 6, generator=torch.Generator().manual_seed(0))
    write_strip(frames, tmp_path / "strip.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    torch.testing.assert_close(read_strip(tmp_path / "strip.png", 4), frames, rtol=0, atol=0.51 / 255)
