# SPDX-License-Identifier: Apache-2.0
"""The commands `dreammover evaluate` and `dreammover compare`."""

import json
import subprocess
import sys
from importlib.util import find_spec

import pytest
from PIL import Image

pytest.importorskip("skimage")
pytest.importorskip("cv2")

from support.pages import EXAMPLES

from dreammover_pipeline.cli import evaluate
from dreammover_pipeline.cli.main import main
from dreammover_pipeline.evaluation.report import check_report_place
from dreammover_pipeline.evaluation.run import ROWS, RunFile


def test_the_command_evaluates_reports_and_compares(tmp_path, capsys):
    out, pairs = tmp_path / "run", tmp_path / "mine"
    (pairs / "fish").mkdir(parents=True)
    for index in (0, 1):
        Image.open(EXAMPLES / "fish" / f"{index}.png").save(pairs / "fish" / f"{index}.png")
    methods = ["--methods", "crossfade", "latent_splat", "--set", "lora_steps=0", "--set", "inversion_steps=15"]
    command = ["evaluate", "-o", str(out), "--suites", "same", str(pairs), "--pairs=1", "--frames=1", *methods]
    assert main([*command, "--device=cpu", "--quiet"]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith(f"{out / 'report.md'}: 4 rows in ")
    assert captured.err == ""
    check_report_place(out)  # for the next time
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
    assert "has no row of the method 'ours'; it has crossfade, latent_splat" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ("--suites nowhere", "'nowhere' is neither same, relit, recast, clips nor a folder"),
        ("--methods best", "'ours', 'paper'"),
        ("--pairs 0", "--pairs"),
        ("--frames 0", "--frames"),
        ("--seed -1", "--seed"),
        ("--flow sintel", "'dis', 'raft'"),
        ("--set lora_steps", "--set takes NAME=VALUE with a name of affine, attention_blocks"),
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


def test_an_output_that_is_no_folder_is_refused_before_a_model_is_loaded(tmp_path, capsys):
    (tmp_path / "taken").touch()
    command = ["evaluate", "-o", str(tmp_path / "taken"), "--device=cpu", "--model", str(tmp_path)]  # holds no model
    assert main(command) == 2
    assert f"--output: the folder '{tmp_path / 'taken'}' cannot be made: File exists" in capsys.readouterr().err


def test_a_report_that_is_another_text_is_left_as_it_is(tmp_path, capsys):
    report = tmp_path / "report.md"
    report.write_text("# My report\n")
    assert main(["evaluate", "-o", str(tmp_path), "--device=cpu", "--model", str(tmp_path)]) == 2
    assert f"the report to '{report}': this program did not write the file that is there" in capsys.readouterr().err
    assert [path.read_text() for path in tmp_path.iterdir()] == ["# My report\n"]


@pytest.mark.parametrize("out", [".", "pair/out", "out", "..", "../elsewhere"])
def test_an_output_among_the_pairs_is_refused_before_anything_is_made(tmp_path, monkeypatch, capsys, out):
    suite = tmp_path / "frames"  # which is also the name of the folder for frames
    (suite / "pair").mkdir(parents=True)
    for index in (0, 1):
        Image.new("RGB", (64, 64)).save(suite / "pair" / f"{index}.png")
    monkeypatch.chdir(suite)
    before = set(tmp_path.rglob("*"))
    command = ["evaluate", "-o", out, "--suites", "../frames", "--device=cpu", "--model", str(tmp_path)]
    assert main(command) != 0  # elsewhere there is room, but the folder holds no model
    among = "would lie among the pairs of the suite '../frames'; choose another folder"
    assert (among in capsys.readouterr().err) == (out != "../elsewhere")
    assert set(tmp_path.rglob("*")) == before


def test_a_method_whose_weights_are_missing_is_refused_if_it_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path / "hub"))
    assert main(["evaluate", "-o", str(tmp_path / "out"), "--methods", "crossfade", "rife"]) == 1
    assert "get them with: dreammover fetch-weights rife" in capsys.readouterr().err
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
