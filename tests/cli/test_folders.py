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
