# SPDX-License-Identifier: Apache-2.0
"""Runs that are killed and go on, statistics, reports, and the two commands."""

import json
import subprocess
import sys
from dataclasses import replace
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("skimage")
pytest.importorskip("cv2")

from dreammover_pipeline.cli import evaluate
from dreammover_pipeline.cli.main import main
from dreammover_pipeline.evaluation.networks import Tools, dis_flow
from dreammover_pipeline.evaluation.report import (
    CAPTION,
    LABEL,
    compare,
    markdown,
    pair_sheet,
    suite_fid,
    write_report,
)
from dreammover_pipeline.evaluation.run import ROWS, RunFile, header, read_strip, run, write_strip
from dreammover_pipeline.evaluation.statistics import estimate, paired_difference, values_by_pair
from dreammover_pipeline.evaluation.suites import world_suite

TOOLS = Tools(dis_flow, None, None, {"lpips": "no weights", "fid": "no weights"})
CHEAP = ["crossfade", "vae_of_truth"]
FISH = Path(__file__).parents[2] / "examples" / "fish"
HEADER = {"suites": {"same": {}}, "seed": 0, "settings": {}}


def evaluated(pipe, folder, suites, methods=CHEAP, seed=0):
    file = RunFile.start(folder, header(pipe, "random", suites, seed, {}, "dis", TOOLS))
    run(pipe, suites, methods, file, TOOLS, quiet=True)
    return file


def keys(rows):
    return [(row["suite"], row["pair"], row["method"]) for row in rows]


def synthetic_run(folder, values, suites=("same",)):
    """A run whose PSNR of a method is what `values` says, one for each pair."""
    file = RunFile.start(folder, HEADER | {"suites": {name: {} for name in suites}})
    for suite in suites:
        for method, numbers in values.items():
            for index, number in enumerate(numbers):
                metrics = {"psnr": number, "ssim": None}
                file.append({"suite": suite, "pair": str(index), "method": method, "metrics": metrics})
    return file


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
    evaluated(pipe, tmp_path / "cut", [suite], [*CHEAP, "branching_slerp"])  # later, another method
    assert keys(RunFile.read(tmp_path / "cut").rows)[6:] == [("same", pair, "branching_slerp") for pair in suite.pairs]


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


def test_an_estimate_is_the_mean_with_a_sane_interval():
    values = np.random.default_rng(1).normal(3, 2, 400)
    found = estimate(values)
    assert found.mean == pytest.approx(values.mean())
    half = 1.96 * values.std() / 20  # the normal approximation
    assert found.low == pytest.approx(found.mean - half, abs=0.1 * half)
    assert found.high == pytest.approx(found.mean + half, abs=0.1 * half)
    assert estimate(values) == found
    assert estimate([2.0] * 7).low == estimate([2.0] * 7).high == 2
    assert str(estimate([1.5])) == "1.500"
    with pytest.raises(ValueError, match="nothing"):
        estimate([])


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    rng = np.random.default_rng(0)
    covered = [found.low <= 0 <= found.high for found in (estimate(rng.normal(0, 1, 20)) for _ in range(200))]
    assert 0.88 < np.mean(covered) < 0.98


def test_a_known_difference_is_found_and_none_is_not():
    rng = np.random.default_rng(0)
    hard = rng.normal(20, 5, 30)  # pairs differ far more than methods do
    base = dict(enumerate(hard + rng.normal(0, 0.2, 30)))
    better = dict(enumerate(hard + 0.5 + rng.normal(0, 0.2, 30)))
    difference = paired_difference(better, base)
    assert difference.excludes_zero
    assert difference.low < 0.5 < difference.high
    assert difference.high - difference.low < 0.5
    nothing = paired_difference(dict(enumerate(hard + rng.normal(0, 0.2, 30))), base)
    assert nothing.low < 0 < nothing.high
    assert not nothing.excludes_zero


def test_only_shared_pairs_are_compared_and_few_prove_nothing():
    assert paired_difference({1: 5.0, 2: 7.0}, {2: 4.0, 3: 1.0}).mean == 3
    assert paired_difference({1: 5.0}, {2: 4.0}) is None
    few = paired_difference(dict.fromkeys(range(5), 2.0), dict.fromkeys(range(5), 1.0))
    assert few.low == 1
    assert not few.excludes_zero
    assert paired_difference(dict.fromkeys(range(6), 2.0), dict.fromkeys(range(6), 1.0)).excludes_zero


def test_two_runs_are_compared_pair_by_pair_in_each_suite(tmp_path):
    pairs = np.linspace(10, 30, 8)
    first = synthetic_run(tmp_path / "a", {"ours": pairs + 1, "other": pairs}, ("same", "relit"))
    second = synthetic_run(tmp_path / "b", {"ours": pairs[:7]}, ("relit", "recast"))
    assert values_by_pair(first.rows, "ours", "ssim") == {}
    lines = compare(first, second, "ours", "ours").splitlines()
    assert lines[0] == "| suite | pairs | PSNR ↑ |"
    assert lines[2:] == ["| relit | 7 | **1.000 [1.000, 1.000]** |"]
    assert "0.000 [0.000, 0.000] |" in compare(first, second, "other", "ours")
    with pytest.raises(ValueError, match="share no pair"):
        compare(first, second, "ours", "other")


def test_suites_of_other_frames_or_size_are_not_compared(tmp_path):
    first, second = (synthetic_run(tmp_path / name, {"ours": [1.0, 2.0]}) for name in "ab")
    second.header["suites"]["same"] = {"frames": 7, "pairs": ["0"]}
    with pytest.raises(ValueError, match=r"the suite 'same' has \{\} in .* but \{'frames': 7\}"):
        compare(first, second, "ours", "ours")
    first.header["suites"]["same"] = {"frames": 7, "pairs": ["0", "1"]}
    assert "| same | 2 |" in compare(first, second, "ours", "ours")


def test_a_report_renders_with_sheets(pipe, tmp_path):
    suites = [world_suite("same", 2, 2, 64), world_suite("relit", 1, 2, 64)]
    file = evaluated(pipe, tmp_path, suites)
    text = write_report(file, TOOLS).read_text(encoding="utf-8")
    for part in ("## same", "## relit", "| crossfade | 2 |", "| vae_of_truth | 1 |", "| − vae_of_truth | 2 |"):
        assert part in text
    assert "- lpips is not available: no weights" in text
    assert "LPIPS" not in text  # no column without numbers
    assert "nan" not in text
    tables = [line.count("|") for line in text.splitlines() if line.startswith("|")]
    assert len(set(tables)) == 1
    psnr = values_by_pair([row for row in file.rows if row["suite"] == "same"], "crossfade", "psnr")
    assert str(estimate(list(psnr.values()))) in text
    assert sorted(path.name for path in (tmp_path / "sheets" / "same").iterdir()) == [
        f"{pair}.png" for pair in suites[0].pairs
    ]


def test_a_sheet_has_the_truth_on_top_and_a_column_for_each_time(pipe, tmp_path):
    suite = world_suite("same", 1, 2, 64)
    file = evaluated(pipe, tmp_path, [suite])
    pair = suite.load(suite.pairs[0])
    sheet = np.asarray(pair_sheet(file, "same", pair.name)).astype(float) / 255
    cell = 64 + 8
    assert sheet.shape == (CAPTION + 3 * cell, LABEL + 4 * cell, 3)

    def tile(row, column):
        y, x = CAPTION + row * cell, LABEL + column * cell
        return torch.from_numpy(sheet[y : y + 64, x : x + 64]).movedim(-1, 0)

    for row in range(3):
        assert (tile(row, 0) - pair.images[0]).abs().max() <= 0.501 / 255
        assert (tile(row, 3) - pair.images[1]).abs().max() <= 0.501 / 255
    assert (tile(0, 2) - pair.truth[1]).abs().max() <= 0.501 / 255
    kept = read_strip(file.strip("same", pair.name, "crossfade"), 2)
    assert (tile(1, 2) - kept[1]).abs().max() < 1e-6
    assert (tile(1, 1) - tile(1, 2)).abs().max() > 0.1


def test_fid_is_of_all_frames_of_a_suite_to_all_its_inputs(pipe, tmp_path):
    file = evaluated(pipe, tmp_path, [world_suite("same", 2, 3, 64)])
    counted = suite_fid(file, Tools(dis_flow, None, lambda frames, inputs: 100 * len(frames) + len(inputs), {}))
    assert counted == {("same", "crossfade"): 604, ("same", "vae_of_truth"): 604}
    assert suite_fid(file, TOOLS) is None
    assert "| FID ↓ |" in markdown(file, counted)
    assert "| 604.0 |" in markdown(file, counted)


def test_rows_of_changed_code_are_reported(tmp_path):
    file = RunFile.start(tmp_path, HEADER | {"model": "m", "weights": "w", "dtype": "d", "device": "cpu"})
    file.header |= {"unavailable": {}, "warping_flow": "dis"}
    for pair, source in (("1", "abc"), ("2", "abc")):
        file.append({"suite": "same", "pair": pair, "method": "ours", "source": source, "metrics": {"psnr": 1.0}})
    assert "code changed" not in markdown(file)
    file.append({"suite": "same", "pair": "3", "method": "ours", "source": "def", "metrics": {"psnr": 1.0}})
    assert "code changed" in markdown(file)


def test_the_command_evaluates_reports_and_compares(tmp_path, capsys):
    out, pairs = tmp_path / "run", tmp_path / "mine"
    (pairs / "fish").mkdir(parents=True)
    for index in (0, 1):
        Image.open(FISH / f"{index}.png").save(pairs / "fish" / f"{index}.png")
    methods = ["--methods", "crossfade", "latent_splat", "--set", "lora_steps=0", "--set", "inversion_steps=15"]
    command = ["evaluate", "-o", str(out), "--suites", "same", str(pairs), "--pairs=1", "--frames=1", *methods]
    assert main([*command, "--device=cpu", "--quiet"]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith(f"{out / 'report.md'}: 4 rows in ")
    assert captured.err == ""
    file = RunFile.read(out)
    assert file.header["settings"] == {"lora_steps": 0, "inversion_steps": 15}
    assert [row["suite"] for row in file.rows] == ["same", "same", "mine", "mine"]
    assert file.rows[0]["metrics"]["psnr"] is not None
    assert file.rows[2]["metrics"]["psnr"] is None
    assert file.rows[2]["metrics"]["we"] is not None
    assert (out / "sheets" / "mine" / "fish.png").is_file()
    assert json.loads((out / ROWS).read_text(encoding="utf-8").splitlines()[0])["model"] == "tiny"

    assert main(["compare", str(out), str(out), "--method", "latent_splat", "--other-method", "crossfade"]) == 0
    table = capsys.readouterr().out
    assert "| same | 1 |" in table
    assert "| mine | 1 |" in table
    assert main(["compare", str(out), str(out)]) == 2
    assert "share no pair" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ("--suites nowhere", "'nowhere' is neither same, relit, recast nor a folder"),
        ("--methods best", "'ours', 'paper'"),
        ("--pairs 0", "--pairs"),
        ("--frames 0", "--frames"),
        ("--seed -1", "--seed"),
        ("--flow sintel", "'dis', 'raft'"),
        ("--set lora_steps", "--set takes NAME=VALUE with a name of attention_blocks"),
        ("--set n_frames=3", "not 'n_frames=3'"),
        ("--set lora_steps=-1", "lora_steps"),
        ("--set fusion=best", "'two_level'"),
        ("--model nowhere", "'nowhere' is no file or folder here"),
    ],
)
def test_bad_options_are_refused_before_anything_is_made(tmp_path, monkeypatch, capsys, options, reason):
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", "-o", "out", *options.split()]) == 2
    assert reason in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_missing_libraries_are_named_with_the_extra_that_has_them(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(evaluate, "find_spec", lambda name: None if name == "cv2" else find_spec(name))
    assert main(["evaluate", "-o", str(tmp_path / "out")]) == 1
    assert "evaluation needs cv2" in (error := capsys.readouterr().err)
    assert "dreammover-pipeline[eval]" in error


def test_the_command_line_starts_without_measuring_libraries_and_the_pipeline_runs_without_evaluation():
    check = (
        "import sys, dreammover_pipeline.cli.main as cli; cli._parser();"
        "assert not {'torch', 'cv2', 'skimage', 'tqdm'} & set(sys.modules), 'slow to start';"
        "import dreammover_pipeline.pipeline;"
        "loaded = {name for name in sys.modules if name.startswith('dreammover_pipeline.evaluation')};"
        "assert not loaded, loaded"
    )
    subprocess.run([sys.executable, "-c", check], check=True)
