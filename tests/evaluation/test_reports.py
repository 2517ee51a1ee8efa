# SPDX-License-Identifier: Apache-2.0
"""Reports, contact sheets and comparisons of runs."""

import numpy as np
import pytest
import torch

pytest.importorskip("skimage")
pytest.importorskip("cv2")

from support.evaluations import HEADER, TOOLS, evaluated, synthetic_run

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
from dreammover_pipeline.evaluation.run import RunFile, read_strip
from dreammover_pipeline.evaluation.statistics import estimate, values_by_pair
from dreammover_pipeline.evaluation.suites import world_suite


def test_two_runs_are_compared_pair_by_pair_in_each_suite(tmp_path):
    pairs = np.linspace(10, 30, 8)
    first = synthetic_run(tmp_path / "a", {"ours": pairs + 1, "other": pairs}, ("same", "relit"))
    second = synthetic_run(tmp_path / "b", {"ours": pairs[:7]}, ("relit", "recast"))
    assert values_by_pair(first.rows, "ours", "ssim") == {}
    lines = compare(first, second, "ours", "ours").splitlines()
    assert lines[0] == "| suite | pairs | PSNR ↑ |"
    assert lines[2:] == ["| relit | 7 | **1.000 [1.000, 1.000]** |"]
    assert "0.000 [0.000, 0.000] |" in compare(first, second, "other", "ours")
    with pytest.raises(ValueError, match=r"has no row of the method .other.; it has ours"):
        compare(first, second, "ours", "other")
    with pytest.raises(ValueError, match=r"share no pair"):
        compare(first, synthetic_run(tmp_path / "c", {"ours": pairs}, ("recast",)), "ours", "ours")


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


def test_a_figure_of_fewer_pairs_than_its_row_says_of_how_many(tmp_path):
    file = synthetic_run(tmp_path, {"ours": [1.0, 3.0, 5.0], "other": [1.0, None, 3.0]})
    names = ("model", "weights", "dtype", "device", "warping_flow")
    file.header |= dict.fromkeys(names, "x") | {"unavailable": {}}
    for row in file.rows:
        row["source"] = "abc"
    lines = markdown(file).splitlines()
    assert next(line for line in lines if line.startswith("| ours")).endswith("| 3.00 [1.000, 5.00] |")
    assert next(line for line in lines if line.startswith("| other")).endswith("| 2.00 [1.000, 3.00] (2) |")
    assert "| − other | 2 | 1.000 [0.000, 2.00] |" in lines


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
