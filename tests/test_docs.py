# SPDX-License-Identifier: Apache-2.0
"""The documents say what the program does."""

import ast
import importlib
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from conftest import EXAMPLES
from PIL import Image

from dreammover_pipeline.cli import main
from dreammover_pipeline.tiny import CHECKPOINT

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "dreammover_pipeline"
ROW = re.compile(r"^\| Eq\. \((\d+)\), §[\d.]+ \|[^|]+\| `(\w+)\.(\w+)` \| `(\w+\.py)` \|$", re.MULTILINE)
TABLE = [(int(number), *rest) for number, *rest in ROW.findall((ROOT / "docs" / "method.md").read_text())]


def tagged_functions() -> set[tuple[int, str, str]]:
    """(equation, module, name) of every docstring in the package that says `Source: DreamMover Eq. (n)`."""
    tags = set()
    for path in SOURCE.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                docstring = ast.get_docstring(node) or ""
                source = docstring.partition("Source:")[2].partition("\n\n")[0]
                tags |= {(int(n), path.stem, node.name) for n in re.findall(r"DreamMover Eq\. \((\d+)\)", source)}
    return tags


def test_the_equation_table_covers_the_paper():
    assert {number for number, *_ in TABLE} == set(range(2, 11))


def test_the_equation_table_and_the_docstrings_agree():
    assert {row[:3] for row in TABLE} == tagged_functions()


@pytest.mark.parametrize(("number", "module", "name", "test"), TABLE)
def test_the_test_named_in_the_table_exercises_the_function(number, module, name, test):
    assert hasattr(importlib.import_module(f"dreammover_pipeline.{module}"), name)
    text = (ROOT / "tests" / test).read_text()
    user = {"ReferenceAttnProcessor": "reference_attention"}.get(name, name)
    assert f"{user}(" in text


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)


def test_readme_python_runs_as_printed(tmp_path, monkeypatch):
    """Every Python block, in order, in one session: the embedded checkpoint at 64 px, the CPU, small pictures."""
    monkeypatch.chdir(tmp_path)
    model = shutil.copytree(CHECKPOINT, tmp_path / "model")
    config = model / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"sample_size": 16}))  # a quarter of the work
    for i in (0, 1):
        Image.open(EXAMPLES / "fish" / f"{i}.png").save(tmp_path / f"lion_{i}.png")
    session = {}
    printed = blocks("README.md", "python")
    assert len(printed) >= 2
    for block in printed:
        block = block.replace("stable-diffusion-v1-5/stable-diffusion-v1-5", str(model))
        block = block.replace('"cuda"', '"cpu"').replace("torch.float16", "torch.float32")
        exec(compile(block, "README.md", "exec"), session)
    assert (tmp_path / "lion.mp4").stat().st_size > 1000
    assert (tmp_path / "lion_lora" / "pytorch_lora_weights.safetensors").exists()


def test_the_page_on_prepared_pairs_runs_as_printed(tmp_path, monkeypatch, restored_logging):
    """Its Python in one session, then its commands, in a folder that has the examples as a clone has."""
    monkeypatch.chdir(tmp_path)
    Path("examples").symlink_to(EXAMPLES)
    session = {}
    for block in blocks("docs/prepared.md", "python"):
        exec(compile(block, "prepared.md", "exec"), session)
    assert [len(session[name]) for name in ("preview", "middle", "frames")] == [1, 1, 1]
    Path("fish.safetensors").unlink()
    for command in "".join(blocks("docs/prepared.md", "bash")).splitlines():
        program, *arguments = shlex.split(command)
        assert program == "dreammover"
        assert main([*arguments, "--quiet"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("examples", "fish.gif", "fish.safetensors", "longer.gif")
    ]


def test_readme_commands_are_two():
    """The demo and the tests; CI takes its commands from here."""
    text = (ROOT / "README.md").read_text()
    assert re.findall(r"<!-- command: (\w+) -->\n```bash\n.+?\n```", text) == ["demo", "test"]


def test_readme_options_exist_with_the_defaults_it_names():
    """Rows `name` | default | consequence of the parameter table."""
    import inspect

    from dreammover_pipeline import DreamMoverPipeline

    parameters = inspect.signature(DreamMoverPipeline.__call__).parameters
    rows = re.findall(r"^\| `(\w+)` \| `([^`]+)` \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert len(rows) >= 10
    for name, default in rows:
        assert ast.literal_eval(default) == parameters[name].default, name


@pytest.mark.parametrize(
    "path", [path for path in ROOT.rglob("*.md") if not {".venv", ".git"} & set(path.parts)], ids=lambda p: p.name
)
def test_relative_links_lead_somewhere(path):
    for target in re.findall(r"\]\((?!https?:|#|mailto:)([^)#]+)", path.read_text()):
        assert (path.parent / target).exists(), target
