# SPDX-License-Identifier: Apache-2.0
"""What `dreammover export-hub` writes, read by people and loaded by diffusers in a process without the package."""

import ast
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from diffusers.utils.dynamic_modules_utils import get_relative_imports
from PIL import Image
from support import forked
from support.core import FOLDER, SHIPPED
from support.hub_stand_in import folder_repository, serve
from support.pages import EXAMPLES, printed

from dreammover_pipeline import __version__
from dreammover_pipeline.cli.main import main
from dreammover_pipeline.export.single_file import join_modules, read_core

ROOT = Path(__file__).parents[2]
REPOSITORY = "you/dreammover"  # as docs/sharing.md calls it
SHORT = {"n_frames": 2, "num_inference_steps": 6, "inversion_steps": 3, "feature_step": 2, "lora_steps": 1}


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Path:
    """A folder in which the commands of docs/sharing.md were typed."""
    folder = tmp_path_factory.mktemp("shared")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for command in "".join(printed("docs/sharing.md", "bash")).splitlines():
            program, *arguments = shlex.split(command)
            assert program == "dreammover"
            assert main(arguments) == 0
    return folder


def refusal(capsys, *arguments) -> str:
    code = main(["export-hub", *map(str, arguments)])
    captured = capsys.readouterr()
    assert (code, captured.out) == (2, "")
    return captured.err


def test_the_repository_holds_the_code_the_card_and_the_licence(shared):
    hub = shared / "hub"
    written = {path.relative_to(hub).as_posix() for path in hub.rglob("*") if path.is_file()}
    card = (hub / "README.md").read_text()
    links = set(re.findall(r"\]\((?!https?:)([^)]+)\)", card))
    assert {path for path in links if path.endswith(".png")}
    assert written == {"pipeline.py", "dreammover_code.py", "README.md", "LICENSE"} | links
    assert (hub / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
    assert card == (ROOT / "model_card.md").read_text().replace("OWNER/NAME", REPOSITORY)
    assert card.count(REPOSITORY) == 1


def test_the_card_has_a_head_that_the_hub_reads():
    _, head, body = (ROOT / "model_card.md").read_text().split("---\n", 2)
    data = yaml.safe_load(head)
    assert (data["license"], data["library_name"], data["pipeline_tag"]) == (
        "apache-2.0",
        "diffusers",
        "image-to-video",
    )
    assert {"stable-diffusion", "custom-pipeline"} <= set(data["tags"])
    headings = re.findall(r"^## (.+)$", body, re.MULTILINE)
    expected = ("How to use", "What is trained", "Uses", "Limits", "Bias", "What it costs", "Licences", "Citation")
    assert [part for part in expected if not any(heading.startswith(part) for heading in headings)] == []
    assert "2409.09605" in body
    for picture in re.findall(r"!\[[^]]+\]\(([^)]+)\)", body):
        assert (ROOT / picture).stat().st_size <= 150_000


def test_the_card_has_the_figures_of_the_training():
    card = (ROOT / "model_card.md").read_text()
    record = json.loads((FOLDER / "tiny" / "checkpoint" / "card.json").read_text())
    for stage in record["stages"].values():
        assert f"{stage['steps']} steps" in card
    assert f"{record['seconds']} s" in card


def test_a_folder_in_use_is_left_alone(tmp_path, capsys):
    kept = tmp_path / "kept.txt"
    kept.write_text("kept")
    assert "is not empty" in refusal(capsys, tmp_path)
    assert "is not empty" in refusal(capsys, kept)
    assert [path.name for path in tmp_path.iterdir()] == ["kept.txt"]
    kept.unlink()
    (tmp_path / ".git").mkdir()  # a fresh clone
    assert main(["export-hub", str(tmp_path)]) == 0
    assert "OWNER/NAME" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "either DIR or --single-file"),
        (["hub", "--single-file", "dreammover.py"], "either DIR or --single-file"),
        (["hub", "--repo", "dreammover"], "OWNER/NAME, not 'dreammover'"),
        (["--single-file", "dreammover.py", "--repo", "you/dreammover"], "--repo is for DIR"),
        (["--single-file", "dreammover"], "allowed are .py"),
        (["--single-file", "dream-mover.py"], "cannot be imported"),
        (["--single-file", "nowhere/dreammover.py"], "there is no folder"),
        (["--single-file", FOLDER / "pipeline.py"], "in this program's own folder"),
    ],
)
def test_what_cannot_be_written_is_refused(arguments, reason, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert reason in refusal(capsys, *arguments)
    assert list(tmp_path.iterdir()) == []


def test_a_foreign_module_is_not_replaced(tmp_path, capsys):
    mine = tmp_path / "app.py"
    mine.write_text("print(1)")
    assert main(["export-hub", "--single-file", str(mine)]) == 2
    assert f"the module to '{mine}': this program did not write the file" in capsys.readouterr().err
    assert mine.read_text() == "print(1)"
    for _ in range(2):
        assert main(["export-hub", "--single-file", str(tmp_path / "mod.py")]) == 0


def test_a_foreign_readme_is_not_replaced_by_the_section(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    section = tmp_path / "mod_README.md"
    section.write_text("my own notes")
    error = refusal(capsys, "--single-file", "mod.py")
    assert "the README section of 'mod.py' to 'mod_README.md': this program did not write the file" in error
    assert section.read_text() == "my own notes"
    assert list(tmp_path.iterdir()) == [section]
    section.unlink()
    section.mkdir()
    assert "there is a folder of that name" in refusal(capsys, "--single-file", "mod.py")
    section.rmdir()
    for _ in range(2):  # its own section is replaced
        assert main(["export-hub", "--single-file", "mod.py"]) == 0


def test_the_single_file_is_complete_and_readable(shared):
    file = shared / "dreammover.py"
    text = file.read_text()
    tree = ast.parse(text)
    assert text.startswith("# SPDX-License-Identifier: Apache-2.0\n")
    assert f"dreammover-pipeline {__version__}" in text
    assert get_relative_imports(file) == []
    assert "dreammover_pipeline" not in re.findall(r"^(?:from|import) (\w+)", text, re.MULTILINE)
    assert 'custom_pipeline="dreammover"' in text  # in the docstring's example
    defined = [node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    expected = [
        node.name
        for name in SHIPPED
        for node in ast.parse((FOLDER / f"{name}.py").read_text()).body
        if isinstance(node, (ast.FunctionDef, ast.ClassDef))
    ]
    assert sorted(defined) == sorted(expected)
    heads = re.findall(r"^# -{50,}\n# (\w+)\n", text, re.MULTILINE)
    assert sorted(heads) == SHIPPED
    assert heads[-1] == "pipeline"
    # no comment of the modules is lost but those on import lines
    comments = [line for name in SHIPPED for line in (FOLDER / f"{name}.py").read_text().splitlines()[1:]]
    comments = [line for line in comments if line.lstrip().startswith("# ")]
    assert [line for line in comments if line not in text] == []


def test_the_repository_holds_the_code_of_the_single_file(shared):
    """All that differs is the docstring's example, which says how its own module is loaded."""
    both = [(shared / name).read_text().splitlines() for name in ("hub/dreammover_code.py", "dreammover.py")]
    ((from_hub, from_file),) = [(a, b) for a, b in zip(*both, strict=True) if a != b]
    assert f'custom_pipeline="{REPOSITORY}", trust_remote_code=True, dtype' in from_hub
    assert 'custom_pipeline="dreammover", dtype' in from_file


def test_the_single_file_is_as_tidy_as_the_modules(shared):
    # RUF009 is off for settings.py too, whose fields are declared by a function.
    for command in (["check", "--ignore", "RUF009"], ["format", "--check"]):
        ruff = [sys.executable, "-m", "ruff", *command, "--config", ROOT / "pyproject.toml", shared / "dreammover.py"]
        done = subprocess.run(ruff, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


def test_joined_modules_do_what_they_did():
    texts = {
        "base": (
            '# SPDX-License-Identifier: Apache-2.0\n"""Base.\n\nMore.\n"""\n\nfrom __future__ import annotations\n\n'
            "import math\nfrom os import path, sep\n\nlogger = logging.get_logger(__name__)\n\nTWO = 2  # kept\n\n\n"
            "def double(x):\n    return TWO * x\n"
        ),
        "top": (
            '"""The whole."""\n\nfrom __future__ import annotations\n\nimport os.path\n'
            "from os import (\n    sep,\n)\n\nfrom diffusers.utils import logging\n\n"
            "from .base import (\n    double,\n)\n\n"
            "logger = logging.get_logger(__name__)\n\nFOUR = double(2)\n"
        ),
    }
    text = join_modules(texts)
    assert text.startswith(
        '"""The whole."""\n\nfrom __future__ import annotations\n\nimport math\nimport os.path\n'
        "from os import path, sep\n\nfrom diffusers.utils import logging\n\n"
        "logger = logging.get_logger(__name__)\n\n\n# ---"
    )
    assert "# base\n#\n# Base.\n#\n# More.\n# ---" in text
    assert text.count("get_logger") == text.count("def double") == 1
    assert "TWO = 2  # kept\n" in text
    names = {"__name__": "joined"}
    exec(compile(text, "joined.py", "exec"), names)
    assert names["FOUR"] == 4


@pytest.mark.parametrize(
    ("first", "second", "named"),
    [
        ("def _size(): ...", "def _size(): ...", "`_size` means one thing in first.py and another in second.py"),
        ("SIZE = 1", "class SIZE: ...", "`SIZE` means one thing"),
        ("if True:\n    SIZE = 1", "SIZE = 1", "`SIZE` means one thing"),
        ("import logging", "from diffusers.utils import logging", "`logging` means one thing"),
        ("import numpy as F", "import torch.nn.functional as F", "`F` means one thing"),
        ("from PIL import Image", "class Image: ...", "`Image` means one thing"),
        ("logger = 1", "logger = logging.get_logger(__name__)", "`logger` means one thing"),
        ("def open(): ...", "", "hides Python's own `open`"),
        ("x = 1", "from .first import x as y", "without `as`"),
        ("x = 1", "def f():\n    from .first import x", "outside of functions"),
        ("x = 1", "from . import first", "`from . import first` must be"),
    ],
)
def test_a_name_that_would_mean_two_things_is_refused(first, second, named):
    texts = {"first": f'"""A."""\n{first}\n', "second": f'"""B."""\n{second}\n'}
    with pytest.raises(RuntimeError, match=re.escape(named)):
        join_modules(texts)


def test_the_core_comes_in_an_order_in_which_it_can_be_read():
    core = read_core(FOLDER)
    assert sorted(core) == SHIPPED
    seen = set()
    for name in core:
        assert set(get_relative_imports(FOLDER / f"{name}.py")) <= seen
        seen.add(name)


PROCESS = """
import sys

import numpy as np
import pytest
import torch
from support.offline import Refuse, stay_on_loopback

sys.addaudithook(stay_on_loopback)
sys.meta_path.insert(0, Refuse)
short = {short!r}
frames = {{}}
for name, code in {snippets!r}.items():
    session = {{"short": short, "generator": torch.Generator().manual_seed(0)}}
    exec(compile(code, name, "exec"), session)
    frames[name] = np.stack([np.asarray(frame) for frame in session["frames"]])
    assert type(session["pipe"]).__module__.startswith("diffusers_modules.local.")
np.savez("frames.npz", **frames)

from diffusers import DiffusionPipeline

for code in ("hub", "dreammover.py", {repository!r}):
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        DiffusionPipeline.from_pretrained({model!r}, custom_pipeline=code)
assert "dreammover_pipeline" not in sys.modules
"""


def test_both_are_loaded_by_diffusers_as_their_own_pages_say(shared, pipe, tmp_path):
    """The card's example from the Hub and the README section's from a file, in a process without the package."""
    model = tmp_path / "model"
    pipe.save_pretrained(model)
    for i in (0, 1):
        Image.open(EXAMPLES / "fish" / f"{i}.png").resize((64, 64)).save(shared / f"lion_{i}.png")
    expected = pipe(
        *(str(shared / f"lion_{i}.png") for i in (0, 1)),
        prompt="a photo of a lion",
        include_inputs=True,
        generator=torch.Generator().manual_seed(0),
        **SHORT,
    ).frames[0]

    (card,) = printed(shared / "hub" / "README.md", "python")
    (section,) = printed(shared / "dreammover_README.md", "python")
    (page,) = printed("docs/sharing.md", "python")
    assert f'custom_pipeline="{REPOSITORY}"' in card
    assert f'custom_pipeline="{REPOSITORY}"' in page
    trusted = 'custom_pipeline="dreammover.py", trust_remote_code=True'  # it is not in diffusers' collection
    section = section.replace('custom_pipeline="dreammover"', trusted)
    snippets = {"hub": card, "single": section}
    for name, code in snippets.items():
        for old, new in (
            ("stable-diffusion-v1-5/stable-diffusion-v1-5", str(model)),
            ('"cuda"', '"cpu"'),
            ("torch.float16", "torch.float32"),
            ('variant="fp16"', "variant=None"),  # which the embedded checkpoint does not have
            ("n_frames=32, include_inputs=True", "include_inputs=True, generator=generator, **short"),
        ):
            assert old in code
            code = code.replace(old, new)
        snippets[name] = code

    script = tmp_path / "process.py"
    script.write_text(PROCESS.format(short=SHORT, snippets=snippets, repository=REPOSITORY, model=str(model)))
    private = re.compile("(HF_|HUGGING|TRANSFORMERS_|DIFFUSERS_|PYTHON)|.*_proxy$", re.IGNORECASE)
    environment = {name: value for name, value in os.environ.items() if not private.match(name)}
    environment |= {"HF_HOME": str(tmp_path / "hf"), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    environment |= {"HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "tests")}
    with serve(folder_repository(REPOSITORY, shared / "hub")) as hub:
        process = forked.program(script, [], environment | {"HF_ENDPOINT": hub.endpoint}, shared, tmp_path / "log")
        _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-4000:]
    assert hub.downloads == [f"{REPOSITORY}/{name}.py" for name in ("pipeline", "dreammover_code")]
    frames = np.load(shared / "frames.npz")
    for name in snippets:
        np.testing.assert_allclose(frames[name].astype(int), np.stack(expected).astype(int), atol=1)
    assert (shared / "lion.mp4").stat().st_size > 1000
