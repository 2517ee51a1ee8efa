# SPDX-License-Identifier: Apache-2.0
"""The modules that ship as a custom pipeline, read as text."""

import ast
from functools import cache
from pathlib import Path

import dreammover_pipeline

FOLDER = Path(dreammover_pipeline.__file__).parent


@cache
def tree(name):
    return ast.parse((FOLDER / f"{name}.py").read_text(encoding="utf-8"))


def siblings(name):
    """Modules of this folder that a module imports, anywhere in it."""
    relative = [node for node in ast.walk(tree(name)) if isinstance(node, ast.ImportFrom) and node.level]
    return {name for node in relative for name in ([node.module] if node.module else [a.name for a in node.names])}


SHIPPED = sorted(siblings("pipeline") | {"pipeline"})  # what the custom-pipeline loader copies from a folder
