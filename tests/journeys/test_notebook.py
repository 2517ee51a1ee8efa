# SPDX-License-Identifier: Apache-2.0
"""The notebook for Colab: valid, true to the pipeline and its pages, and run from top to bottom."""

import ast
import inspect
import json
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from dreammover_pipeline import DreamMoverPipeline
from dreammover_pipeline.cli.loading import MODELS
from dreammover_pipeline.evaluation.examples import PHOTOS, SCENES
from dreammover_pipeline.timing import CURVES, EVEN

ROOT = Path(__file__).parents[2]
FIELD = re.compile(r"^(\w+) = (\S+)  # @param (\[.*?\]|\{.*?\})( \{.*\})?$", re.MULTILINE)


@pytest.fixture
def notebook():
    return nbformat.read(ROOT / "examples" / "colab.ipynb", as_version=4)


@pytest.fixture
def fields(notebook) -> dict[str, tuple[object, object]]:
    """Form fields: name → (value, choices or {"type": …})."""
    code = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    found = {name: (ast.literal_eval(value), kind) for name, value, kind, _ in FIELD.findall(code)}
    assert len(found) == code.count("@param")

    def parsed(kind):
        return json.loads(re.sub(r"(\w+):", r'"\1":', kind))

    return {name: (value, parsed(kind)) for name, (value, kind) in found.items()}


def test_it_is_valid_and_stored_without_outputs(notebook):
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell for cell in code if cell.outputs or cell.execution_count] == []
    assert notebook.metadata.accelerator == "GPU"
    assert all(cell.source.startswith("# @title ") for cell in code)


def test_its_fields_offer_what_there_is(fields):
    assert set(fields["model"][1]) == set(MODELS)
    assert set(fields["sample"][1]) == {*SCENES, *PHOTOS}
    assert set(fields["easing"][1]) == {*CURVES, EVEN}
    for value, kind in fields.values():
        if isinstance(kind, list):
            assert value in kind
        elif kind["type"] == "slider":
            assert kind["min"] <= value <= kind["max"]
            assert (value - kind["min"]) % kind["step"] == 0
    defaults = {name: p.default for name, p in inspect.signature(DreamMoverPipeline.__call__).parameters.items()}
    for field, parameter in (("steps", "num_inference_steps"), *((name, name) for name in fields if name in defaults)):
        if parameter not in ("prompt", "n_frames"):
            assert fields[field][0] == defaults[parameter], field


def test_its_advice_on_memory_is_that_of_the_page(notebook):
    page = (ROOT / "docs" / "memory.md").read_text()
    advice = notebook.cells[-1].source
    rows = re.findall(r"^\| \d+ GB .*$", advice, re.MULTILINE)
    assert len(rows) == 2
    assert [row for row in rows if row not in page] == []


def test_it_runs_from_top_to_bottom(notebook, tmp_path, monkeypatch):
    """With the embedded checkpoint, for which one variable is switched."""
    for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (settings,) = (cell for cell in notebook.cells if "@title Settings" in cell.source)
    settings.source, switched = re.subn(r'^model = "sd15"', 'model = "tiny"', settings.source, flags=re.MULTILINE)
    assert switched == 1
    work = tmp_path / "work"
    work.mkdir()
    client = NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(work)}})
    client.execute()
    outputs = {cell.source.partition("\n")[0]: cell.get("outputs", []) for cell in notebook.cells}
    (video,) = outputs["# @title Render"][-1:]
    assert "<video controls loop autoplay muted" in video.data["text/html"]
    assert "data:video/mp4;base64," in video.data["text/html"]
    assert [output.output_type for output in outputs["# @title Prepare"] if "image/png" in output.get("data", {})]
    printed = "".join(output.get("text", "") for output in outputs["# @title Download"])
    assert Path(printed.strip()) == (work / "dreammover.mp4").resolve()
    assert (work / "dreammover.mp4").stat().st_size > 1000
