# SPDX-License-Identifier: Apache-2.0
"""The documents say what the program does."""

import ast
import importlib
import re
import shlex
from pathlib import Path

import pytest
from PIL import Image
from support.pages import EXAMPLES, ROOT, printed, smaller

from dreammover_pipeline.cli.loading import MODELS
from dreammover_pipeline.cli.main import main

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


def calls(code: str, module: str, name: str) -> bool:
    """Whether Python code calls `name`, or `module.name`."""
    called = {ast.unparse(node.func) for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)}
    return not called.isdisjoint({name, f"{module}.{name}"})


def test_neither_comments_nor_longer_names_are_calls():
    assert calls("assert denoise(1) == 2", "sampling", "denoise")
    assert calls("sampling.denoise(1)", "sampling", "denoise")
    assert not calls("# denoise(1)\nre_denoise(1)\npipe.denoise(1)\n'denoise(1)'", "sampling", "denoise")


@pytest.mark.parametrize(("number", "module", "name", "test"), TABLE)
def test_the_test_named_in_the_table_exercises_the_function(number, module, name, test):
    assert hasattr(importlib.import_module(f"dreammover_pipeline.{module}"), name)
    text = (ROOT / "tests" / test).read_text()
    user = {"ReferenceAttnProcessor": "reference_attention"}.get(name, name)
    assert calls(text, module, user)


def test_readme_python_runs_as_printed(tmp_path, monkeypatch):
    """Every Python block, in order, in one session: the embedded checkpoint at 32 px, the CPU, fewer steps."""
    monkeypatch.chdir(tmp_path)
    model = smaller(tmp_path / "model")
    for i in (0, 1):
        Image.open(EXAMPLES / "fish" / f"{i}.png").save(tmp_path / f"lion_{i}.png")
    session = {}
    blocks = printed("README.md", "python")
    assert len(blocks) >= 2
    assert "".join(blocks).count('prompt="a photo of a lion"') == 2
    for block in blocks:
        block = block.replace("stable-diffusion-v1-5/stable-diffusion-v1-5", str(model))
        block = block.replace('"cuda"', '"cpu"').replace("torch.float16", "torch.float32")
        block = block.replace('variant="fp16"', "variant=None")  # which the embedded checkpoint does not have
        block = block.replace("n_frames=32", "n_frames=4")
        block = block.replace('prompt="a photo of a lion"', 'prompt="a photo of a lion", lora_steps=2')
        exec(compile(block, "README.md", "exec"), session)
    assert (tmp_path / "lion.mp4").stat().st_size > 1000
    assert len(session["frames"]) == 3


@pytest.fixture
def clone(tmp_path, monkeypatch, restored_logging):
    """A folder that has the examples as a clone has, to work in; the embedded checkpoint works at 32 px."""
    monkeypatch.chdir(tmp_path)
    model = smaller(tmp_path / "model")
    monkeypatch.setattr("dreammover_pipeline.tiny.CHECKPOINT", model)
    monkeypatch.setitem(MODELS, "tiny", str(model))
    Path("examples").symlink_to(EXAMPLES)
    return tmp_path


def run_python(page: str) -> dict:
    """Every Python block of a page, in order, in one session; its names."""
    session = {}
    for block in printed(page, "python"):
        exec(compile(block, page, "exec"), session)
    return session


def run_commands(page: str) -> None:
    """Every command of a page, in order."""
    for command in "".join(printed(page, "bash")).replace("\\\n", "").splitlines():
        program, *arguments = shlex.split(command)
        assert program == "dreammover"
        assert main([*arguments, "--quiet"]) == 0


def made_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name not in ("examples", "model"))


def test_the_page_on_prepared_pairs_runs_as_printed(clone):
    session = run_python("docs/prepared.md")
    assert [len(session[name]) for name in ("preview", "middle", "frames")] == [1, 1, 1]
    Path("fish.safetensors").unlink()
    run_commands("docs/prepared.md")
    assert made_in(clone) == ["fish.gif", "fish.safetensors", "longer.gif"]


def test_the_page_on_pictures_runs_as_printed(clone):
    run_commands("docs/pictures.md")
    run_python("docs/pictures.md")
    names = "confidence", "flow", "lines", "map", "matches", "occlusion", "sheet", "sources", "sources_of_two"
    pictures = [f"{name}.png" for name in names]
    assert made_in(clone) == sorted([*pictures, "cat.mp4", "cat.safetensors", "compare.mp4", "effects.mp4"])


def test_the_page_on_time_runs_as_printed(clone):
    session = run_python("docs/time.md")
    assert session["eased"].times[0] == pytest.approx([0, 7 / 27, 20 / 27, 1])
    assert [len(session[name]) for name in ("sine", "even", "small", "one_cast")] == [5, 4, 3, 4]
    run_commands("docs/time.md")
    for name, seconds in (("fish", 1.2), ("there-and-back", 1.0)):
        with Image.open(f"{name}.gif") as gif:
            durations = []
            for index in range(gif.n_frames):
                gif.seek(index)
                durations.append(gif.info["duration"])
        assert sum(durations) / 1000 == seconds


def test_the_page_on_photos_runs_as_printed(tmp_path, monkeypatch):
    """At the checkpoint's own size, which its figures are of."""
    monkeypatch.chdir(tmp_path)
    Path("examples").symlink_to(EXAMPLES)
    session = run_python("docs/photos.md")
    assert session["frames"][0].size == session["first"].size


def test_the_page_on_loras_runs_as_printed(clone):
    session = run_python("docs/lora.md")
    assert len(session["frames"]) == 1
    assert made_in(clone) == ["cat_lora"]


def test_the_page_on_sequences_runs_as_printed(clone):
    session = run_python("docs/sequences.md")
    assert session["output"].times == [pytest.approx((0, 1 / 3, 2 / 3, 1)), (0.5, 1)]
    assert len(session["frames"]) == 1
    run_commands("docs/sequences.md")
    assert made_in(clone) == ["chain.gif", "robot.mp4", "robot.png"]
    with Image.open("chain.gif") as gif:
        assert (gif.size, gif.n_frames) == ((128, 128), 7)


def test_readme_commands_are_two():
    """The demo and the tests; CI takes its commands from here."""
    text = (ROOT / "README.md").read_text()
    assert re.findall(r"<!-- command: (\w+) -->\n```bash\n.+?\n```", text) == ["demo", "test"]


@pytest.mark.parametrize(
    "path", [path for path in ROOT.rglob("*.md") if not {".venv", ".git"} & set(path.parts)], ids=lambda p: p.name
)
def test_relative_links_lead_somewhere(path):
    for target in re.findall(r"\]\((?!https?:|#|mailto:)([^)#]+)", path.read_text()):
        assert (path.parent / target).exists(), target


def test_the_page_on_different_photos_runs_as_printed(clone):
    session = run_python("docs/different_photos.md")
    assert len(session["frames"]) == 3
