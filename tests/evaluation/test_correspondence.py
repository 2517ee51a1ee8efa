# SPDX-License-Identifier: Apache-2.0
"""The study of features and flows."""

from __future__ import annotations

import json
from itertools import product

import pytest
import torch

from dreammover_pipeline import DreamMoverPipeline
from dreammover_pipeline.cli.main import main
from dreammover_pipeline.evaluation.case import EvaluationCase
from dreammover_pipeline.evaluation.correspondence import (
    METRICS,
    PASSES,
    PENALTIES,
    PairTruth,
    Variant,
    check_places,
    study,
    table,
)
from dreammover_pipeline.evaluation.suites import find_suites
from dreammover_pipeline.fields import flow_at_cell_centres
from dreammover_pipeline.records import BidirectionalFlow
from dreammover_pipeline.tiny import CHECKPOINT


@pytest.fixture(scope="module")
def suites():
    return find_suites(["same"], 2, 1, 64)


def half_size():
    """The embedded checkpoint for pictures of 64 px, since each of the 72 flows of a pair is judged by a picture."""
    pipe = DreamMoverPipeline.from_pretrained(CHECKPOINT)
    pipe.set_progress_bar_config(disable=True)
    pipe.unet.register_to_config(sample_size=pipe.unet.config.sample_size // 2)
    return pipe


@pytest.fixture(scope="module")
def rows(suites):
    return study(half_size(), suites, [2, 3], quiet=True)


def test_every_variant_is_measured_on_every_pair(rows, suites):
    variants = {tuple(row[name] for name in Variant.__dataclass_fields__) for row in rows}
    assert len(rows) == len(variants) * len(suites[0].pairs)
    features = {row["features"] for row in rows}
    assert features == {"up1", "up2", "up3", "up1+up2", "3×3 latents"}
    assert {row["features"] for row in rows if row["grid"] == "own"} == {"up1"}  # alone coarser than the latents
    assert {(row["penalty"], row["passes"]) for row in rows} == set(product(PENALTIES, PASSES))
    assert all(row["metrics"].keys() == METRICS.keys() for row in rows)


def test_a_variant_is_the_pipelines_own_flow(suites, rows):
    pair = suites[0].load(suites[0].pairs[0])
    settings = {"inversion_steps": 3, "feature_step": 2, "feature_block": 1, "lora_steps": 0}
    settings |= {"flow_fit": "mean", "flow_smoothing": 3, "rest_tolerance": 0, "photo_tolerance": 0}
    case = EvaluationCase(half_size(), pair, 0, settings)
    expected = pytest.approx(PairTruth(case).measured(case.prepared().flow))
    alike = [row for row in rows if row["pair"] == pair.name and row["metrics"] == expected]
    variant = Variant(features="up1", step=2, grid="latent", penalty=0.1, passes=3)
    assert [Variant(*(row[name] for name in Variant.__dataclass_fields__)) for row in alike] == [variant]


def test_true_flow_has_no_error(tiny_pipe, suites):
    case = EvaluationCase(
        tiny_pipe, suites[0].load(suites[0].pairs[0]), 0, {"inversion_steps": 2, "feature_step": 1, "lora_steps": 0}
    )
    size = case.prepared().flow.forward.shape[-2:]
    motion = case.pair.motion
    exact = BidirectionalFlow(*(flow_at_cell_centres(motion.flow(*way), size) for way in ((0, 1), (1, 0))))
    still = BidirectionalFlow(*torch.zeros(2, 1, 2, *size))
    exact, still = map(PairTruth(case).measured, (exact, still))
    assert exact["epe"] < 4 < still["epe"]  # pixels; within a cell the flow varies
    assert exact["pck10"] > 0.95
    assert still["epe_rest"] == 0
    assert exact["splat"] > still["splat"]


def test_the_table_puts_the_best_first(rows):
    lines = table(rows, "same").splitlines()
    assert lines[0].startswith("| features | step | grid | penalty | passes | PCK@.05")
    means = [float(line.split("|")[-2].split("[")[0]) for line in lines[2:]]
    assert means == sorted(means, reverse=True)
    assert len(means) == len(rows) // 2


def test_the_command_writes_rows_and_tables(pipe, tmp_path, capsys):
    out, model = tmp_path / "out", tmp_path / "model"
    pipe.save_pretrained(model)
    arguments = ["--suites", "recast", "--pairs", "1", "--steps", "1", "--quiet", "--device", "cpu"]
    arguments += ["--model", str(model)]
    assert main(["correspondence", "-o", str(out), *arguments]) == 0
    written = [json.loads(line) for line in (out / "correspondence.jsonl").read_text().splitlines()]
    assert {row["suite"] for row in written} == {"recast"}
    assert (out / "correspondence.md").read_text().startswith("## recast")
    assert f"{len(written)} rows" in capsys.readouterr().out
    check_places(out / "correspondence.jsonl", out / "correspondence.md")  # for the next time
    assert main(["correspondence", "-o", str(out), "--suites", "fish"]) == 2
    assert "--suites" in capsys.readouterr().err


def test_an_output_that_cannot_be_written_is_refused_before_a_model_is_loaded(tmp_path, capsys):
    arguments = ["--device", "cpu", "--model", str(tmp_path)]  # which holds no model
    (tmp_path / "a.png").touch()
    assert main(["correspondence", "-o", str(tmp_path / "a.png"), *arguments]) == 2
    assert f"--output: the folder '{tmp_path / 'a.png'}' cannot be made: File exists" in capsys.readouterr().err
    (tmp_path / "correspondence.md").mkdir()
    assert main(["correspondence", "-o", str(tmp_path), *arguments]) == 2
    assert "correspondence.md': there is a folder of that name" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("correspondence.jsonl", b'{"my": "rows"}\n'),
        ("correspondence.jsonl", b"\xff notes"),
        ("correspondence.md", b"# Letters\n"),
        ("correspondence.md", b"## same\n\nmy notes\n"),
    ],
)
def test_files_of_others_are_left_as_they_are(tmp_path, capsys, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    assert main(["correspondence", "-o", str(tmp_path), "--device", "cpu", "--model", str(tmp_path)]) == 2
    assert f"to '{path}': this program did not write the file that is there" in capsys.readouterr().err
    assert path.read_bytes() == content
