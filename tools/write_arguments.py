# SPDX-License-Identifier: Apache-2.0
"""Write what is written of the pipeline's arguments in other places than `settings.py`, from their declarations there.

That is, in `pipeline.py` and `stages.py`, the type and the default of every declared argument in a signature, what the
docstring of `DreamMoverPipeline.__call__` says of it, and README's table. Run `python tools/write_arguments.py` after
a change of `settings.py`; a test fails until that is done.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import textwrap
from pathlib import Path

from dreammover_pipeline.arguments import ASK_PYTHON, Argument, arguments_of
from dreammover_pipeline.settings import (
    GROUPS,
    PREPARING,
    RENDERING,
    FitSettings,
    PrepareSettings,
    RenderSettings,
    arguments,
)

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "dreammover_pipeline"
WIDTH = 119
# The methods whose declared arguments are written, and the groups that a new argument is put into a method from.
TAKEN = {"__call__": GROUPS, "prepare": PREPARING, "render": RENDERING, "fit_lora": (FitSettings,)}
TAKEN |= {"fit_shared_lora": (FitSettings,), "place_frames": (), "preview": (), "fuse": ()}
TABLE = re.compile(r"(<!-- arguments -->\n).*?(<!-- /arguments -->)", re.DOTALL)


def parameter(declared: Argument) -> str:
    """An argument as it stands in a signature."""
    return f"{declared.name}: {declared.annotation} = {literal(declared.default)}"


def literal(value: object) -> str:
    """A default as Python and the formatter write it."""
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, float) and 0 < value < 1e-3:
        return f"{value:.0e}".replace("e-0", "e-")
    return repr(value)


def with_signatures(source: str) -> str:
    """A module's text with the declared arguments in its methods' signatures as they are declared."""
    declared = arguments()
    edits = []  # (start, end, text) in the source
    for method in (method for method in _methods(source) if method.name in TAKEN):
        known = [argument.arg for argument in method.args.args if argument.arg in declared]
        start = len(method.args.args) - len(method.args.defaults)
        for argument, default in zip(method.args.args[start:], method.args.defaults, strict=True):
            if argument.arg in declared:
                place = (_offset(source, argument.lineno, argument.col_offset), _offset(source, *_end(default)))
                edits.append((*place, parameter(declared[argument.arg])))
        before = None
        for name in arguments_of(*TAKEN[method.name]):
            if name in known:
                before = next(edit for edit in edits[::-1] if edit[2].startswith(f"{name}:"))
            elif before is not None:
                edits.append((before[1], before[1], f",\n        {parameter(declared[name])}"))
    for begin, end, text in sorted(edits, reverse=True):
        source = source[:begin] + text + source[end:]
    return source


def with_docstring(source: str) -> str:
    """`pipeline.py`'s text with what `__call__`'s docstring says of every declared argument as it is declared."""
    (call,) = (method for method in _methods(source) if method.name == "__call__")
    begin = _offset(source, call.body[0].lineno, 0)
    before, rest = source[begin:].split("        Args:\n", 1)
    lines, after = rest.split("\n        Returns:\n", 1)
    entries = re.findall(r"^ {12}(\w+): (.*?)(?=\n {12}\w|\n*\Z)", lines, re.MULTILINE | re.DOTALL)
    own = {name: " ".join(text.split()) for name, text in entries}
    written = {name: declared.about for name, declared in arguments().items()}
    names = [argument.arg for argument in call.args.args if argument.arg != "self"]
    body = "".join(_entry(name, written.get(name) or own[name]) for name in names)
    return f"{source[:begin]}{before}        Args:\n{body}\n        Returns:\n{after}"


def with_table(text: str) -> str:
    """README's text with the table of what can be turned as it is declared."""
    rows = ["| argument | default | meaning |", "|---|---|---|"]
    for name, declared in arguments_of(RenderSettings, PrepareSettings).items():
        if declared.option is not ASK_PYTHON:
            rows.append(f"| `{name}` | `{literal(declared.default)}` | {declared.about} |")
    return TABLE.sub(lambda found: found[1] + "\n".join(rows) + "\n" + found[2], text)


def written() -> dict[Path, str]:
    """The files that hold something of the declarations, with the text that they should have."""
    pipeline, stages, readme = PACKAGE / "pipeline.py", PACKAGE / "stages.py", ROOT / "README.md"
    return {
        pipeline: _formatted(with_docstring(with_signatures(pipeline.read_text(encoding="utf-8")))),
        stages: _formatted(with_signatures(stages.read_text(encoding="utf-8"))),
        readme: with_table(readme.read_text(encoding="utf-8")),
    }


def _methods(source: str) -> list[ast.FunctionDef]:
    classes = [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)]
    return [node for owner in classes for node in owner.body if isinstance(node, ast.FunctionDef)]


def _end(node: ast.expr) -> tuple[int, int]:
    return node.end_lineno, node.end_col_offset


def _offset(source: str, line: int, column: int) -> int:
    """The place in the text of a line, counted from 1, and a column, counted in bytes."""
    lines = source.splitlines(keepends=True)
    return sum(map(len, lines[: line - 1])) + len(lines[line - 1].encode()[:column].decode())


def _entry(name: str, about: str) -> str:
    indent = " " * 12
    return textwrap.fill(f"{name}: {about}", WIDTH, initial_indent=indent, subsequent_indent=indent + "    ") + "\n"


def _formatted(source: str) -> str:
    command = [sys.executable, "-m", "ruff", "format", "--stdin-filename", str(PACKAGE / "pipeline.py"), "-"]
    return subprocess.run(command, input=source, capture_output=True, text=True, check=True, cwd=ROOT).stdout


if __name__ == "__main__":
    for path, text in written().items():
        if path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
            print(path.relative_to(ROOT))
