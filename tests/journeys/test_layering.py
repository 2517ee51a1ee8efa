# SPDX-License-Identifier: Apache-2.0
"""What the core may import and contain, so that `pipeline.py` works as a custom pipeline from its own folder."""

from __future__ import annotations

import ast
import inspect
import re
import sys
from graphlib import TopologicalSorter

import pytest
from diffusers.utils.dynamic_modules_utils import find_pipeline_class, get_relative_imports
from support.core import FOLDER, SHIPPED, siblings, tree

import dreammover_pipeline.pipeline
from dreammover_pipeline import DreamMoverPipeline

# Tensors in, tensors out: no models, no diffusers.
MATHS = (
    "records",
    "ddim",
    "sampling",
    "fields",
    "flow",
    "splatting",
    "rigid",
    "paths",
    "fusion",
    "memory",
    "inputs",
    "timing",
    "tone",
    "steering",
)
# come with diffusers itself
REQUIRED = {"torch", "diffusers", "transformers", "numpy", "PIL", "safetensors", "filelock"}
OPTIONAL = {"peft"}  # only inside functions


def outsiders(nodes):
    """Top-level names of everything else that is imported."""
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module)
    return {name.split(".")[0] for name in names}


def arrows():
    """The sibling imports of every module that `pipeline.py` needs, however indirectly."""
    found, waiting = {}, ["pipeline"]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found[name] = siblings(name)
            waiting += found[name]
    return found


def public_definitions(name):
    """Public functions and classes of a module and public methods of the latter, as (qualified name, node)."""
    for node in tree(name).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            yield node.name, node
            for member in node.body if isinstance(node, ast.ClassDef) else ():
                if isinstance(member, ast.FunctionDef) and not member.name.startswith("_"):
                    yield f"{node.name}.{member.name}", member


def test_pipeline_names_every_module_it_needs_even_indirectly():
    assert sorted(arrows()) == SHIPPED
    assert set(MATHS) <= set(SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
def test_diffusers_sees_exactly_the_relative_imports_there_are(name):
    # The loader greps lines, docstrings included, and does not know `from . import x`.
    seen = get_relative_imports(FOLDER / f"{name}.py")
    assert set(seen) == siblings(name)
    assert all((FOLDER / f"{sibling}.py").is_file() for sibling in seen)


@pytest.mark.parametrize("name", SHIPPED)
def test_no_line_of_a_docstring_looks_like_an_import(name):
    nodes = [n for n in ast.walk(tree(name)) if isinstance(n, (ast.Module, ast.ClassDef, ast.FunctionDef))]
    texts = [ast.get_docstring(node, clean=False) or "" for node in nodes]
    assert not [line for text in texts for line in re.findall(r"^\s*(?:from|import)\s+\..*", text, re.MULTILINE)]


def test_the_root_is_the_custom_pipeline():
    """What the loader ships lies at the root of the package, and what it does not ship has a folder."""
    root = {path.stem for path in FOLDER.glob("*.py")} - {"__init__", "__main__"}
    assert sorted(root) == SHIPPED


def test_only_the_command_line_parses_arguments():
    users = [path for path in FOLDER.rglob("*.py") if re.search(r"\bargparse\b|sys\.argv", path.read_text("utf-8"))]
    assert {path.parent.name for path in users} == {"cli"}


def all_arrows():
    """The imports of every module of the package from the package, those for type checkers included."""
    modules = {}
    for path in FOLDER.rglob("*.py"):
        parts = path.relative_to(FOLDER).with_suffix("").parts
        modules[parts[:-1] if parts[-1] == "__init__" else parts] = path
    arrows = {}
    for module, path in modules.items():
        package = module if path.stem == "__init__" else module[:-1]
        arrows[module] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level:
                base = package[: len(package) - node.level + 1] + tuple(
                    (node.module or "").split(".") * bool(node.module)
                )
                found = {(*base, alias.name) for alias in node.names} & modules.keys()
                arrows[module] |= found or ({base} & modules.keys())
    return arrows


def test_the_package_has_no_import_circles():
    arrows = all_arrows()
    arrows[()] = set()  # the package itself imports the pipeline on first use only
    list(TopologicalSorter(arrows).static_order())  # which raises CycleError


def test_import_arrows_have_no_cycles():
    order = list(TopologicalSorter(arrows()).static_order())
    assert order[-1] == "pipeline"


@pytest.mark.parametrize("name", MATHS)
def test_maths_needs_torch_alone(name):
    assert outsiders(ast.walk(tree(name))) <= {"torch"} | sys.stdlib_module_names
    assert siblings(name) <= set(MATHS)


@pytest.mark.parametrize("name", SHIPPED)
def test_the_core_needs_nothing_beyond_diffusers(name):
    # the package itself is among the strangers: a copy in the loader's cache cannot import it
    assert outsiders(tree(name).body) <= REQUIRED | sys.stdlib_module_names
    assert outsiders(ast.walk(tree(name))) <= REQUIRED | OPTIONAL | sys.stdlib_module_names


@pytest.mark.parametrize("name", SHIPPED)
def test_the_core_is_quiet_safe_and_at_home_on_any_device(name):
    for node in ast.walk(tree(name)):
        assert not isinstance(node, ast.Assert), f"{name}.py:{node.lineno}: asserts vanish under -O"
        if isinstance(node, ast.Call):
            called = node.func
            if isinstance(called, ast.Name):
                assert called.id not in ("print", "eval", "exec"), f"{name}.py:{node.lineno}"
            if isinstance(called, ast.Attribute):
                assert called.attr != "cuda", f"{name}.py:{node.lineno}: use the device of the input"


def test_diffusers_finds_one_pipeline():
    assert find_pipeline_class(dreammover_pipeline.pipeline) is DreamMoverPipeline


@pytest.mark.parametrize("stage", ["prepare", "render", "fit_lora", "fit_shared_lora"])
def test_a_stage_has_the_defaults_of_the_whole(stage):
    whole = inspect.signature(DreamMoverPipeline.__call__).parameters
    parameters = inspect.signature(getattr(DreamMoverPipeline, stage)).parameters
    shared = [name for name in parameters if name in whole and name != "self"]
    assert len(shared) > 8
    assert {name: parameters[name].default for name in shared} == {name: whole[name].default for name in shared}
    # and their order, so that a positional call means the same
    assert shared == [name for name in whole if name in shared]


@pytest.mark.parametrize("name", SHIPPED)
def test_everything_public_is_documented(name):
    assert ast.get_docstring(tree(name))
    assert not [qualified for qualified, node in public_definitions(name) if not ast.get_docstring(node)]


@pytest.mark.parametrize("name", [name for name in MATHS if name != "inputs"])  # whose business is values of any type
def test_maths_is_fully_annotated(name):
    missing = []
    for qualified, node in public_definitions(name):
        if isinstance(node, ast.FunctionDef):
            arguments = [a for a in (*node.args.args, *node.args.kwonlyargs) if a.arg not in ("self", "cls")]
            if not node.returns or not all(argument.annotation for argument in arguments):
                missing.append(qualified)
    assert not missing


@pytest.mark.parametrize("name", SHIPPED)
def test_every_file_states_its_licence(name):
    first = (FOLDER / f"{name}.py").read_text(encoding="utf-8").splitlines()[0]
    assert first == "# SPDX-License-Identifier: Apache-2.0"
