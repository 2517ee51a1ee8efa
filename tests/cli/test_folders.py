# SPDX-License-Identifier: Apache-2.0
"""Folders on the command line."""

import pytest

from dreammover_pipeline.cli.main import main


@pytest.mark.parametrize(
    "command",
    [
        "batch pairs.jsonl -o {}",
        "batch pairs.jsonl -o out --lora-cache {}",
        "again out/0.gif.json -o {}",
        "again out/0.gif.json -o out --lora-cache {}",
        "evaluate --quick -o {}",
        "compare {} out",
        "compare out {}",
        "correspondence -o {}",
        "train --out {}",
        "train --out out --export {}",
        "train-controlnet --out {}",
        "train-controlnet --out out --export {}",
        "train-controlnet --out out --model {}",
        "draw-examples {}",
        "fetch-weights --from {}",
        "export-hub {}",
    ],
)
def test_an_empty_path_is_not_taken_for_the_current_folder(tmp_path, monkeypatch, capsys, command):
    monkeypatch.chdir(tmp_path)
    assert main([word.format("") for word in command.split()]) == 2
    assert "'' is no folder; write its path" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", ["--sheet", "--flow", "--matches", "--sources", "--save-pair", "--compare"])
def test_an_empty_path_of_a_file_is_not_passed_over(tmp_path, monkeypatch, capsys, option):
    monkeypatch.chdir(tmp_path)
    assert main(["interpolate", "a.png", "b.png", "-o", "out.gif", option, ""]) == 2
    assert "'' is no file; write its path" in capsys.readouterr().err


def test_an_output_does_not_replace_the_model(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("a.png", "b.png", "model.safetensors"):
        (tmp_path / name).write_text("precious")
    pair = ["--model", "model.safetensors", "--save-pair", "model.safetensors"]
    assert main(["interpolate", "a.png", "b.png", "-o", "out.gif", *pair]) == 2
    assert "writing 'model.safetensors' would replace 'model.safetensors'" in capsys.readouterr().err
    assert (tmp_path / "model.safetensors").read_text() == "precious"
