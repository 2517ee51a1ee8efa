# SPDX-License-Identifier: Apache-2.0
"""Joins the pipeline's modules into a single file, for a Hub repository or for diffusers' examples/community.

The modules' texts are joined as they are, so comments and layout stay. In a single file every module sees the names of
all other modules, so a name that two modules use for different things is an error.
"""

from __future__ import annotations

import ast
import builtins
import symtable
import sys
import textwrap
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from graphlib import TopologicalSorter
from pathlib import Path

WIDTH = 119
# The module that a name comes from, the name, and its alias: `import torch` is (None, "torch", None).
Import = tuple[str | None, str, str | None]
# A logger is named after its module, and all modules become one, so this definition is the only one that several of
# them may have.
LOGGER = "logger = logging.get_logger(__name__)"


def read_core(folder: Path) -> dict[str, str]:
    """Read `pipeline.py` and every module that it needs, however indirectly.

    Args:
        folder: the folder that holds the modules.

    Returns:
        The texts by the modules' names. A module comes after all modules that it imports, so `pipeline` comes last.
    """
    texts, arrows, waiting = {}, {}, ["pipeline"]
    while waiting:
        name = waiting.pop()
        if name not in texts:
            texts[name] = (folder / f"{name}.py").read_text(encoding="utf-8")
            arrows[name] = sorted({node.module for node in _relative_imports(ast.parse(texts[name]))})
            waiting += arrows[name]
    return {name: texts[name] for name in TopologicalSorter(dict(sorted(arrows.items()))).static_order()}


def join_modules(texts: Mapping[str, str]) -> str:
    """Join modules that import names from each other into one module.

    Args:
        texts: the modules' texts by their names; every module must come after all modules that it imports. The
            docstring of the last module becomes that of the whole. The docstrings of all other modules become comments
            at the head of their sections.

    Returns:
        The docstring, all imports merged and sorted, then the rest of every module under a head of its own, without
        any licence line.

    Raises:
        RuntimeError: a module imports another one in a way that cannot be joined, or a name would mean two things.
    """
    trees = {module: ast.parse(text) for module, text in texts.items()}
    for module, tree in trees.items():
        _check_relative_imports(module, tree)
    imports = {module: _absolute_imports(tree) for module, tree in trees.items()}
    _check_names({module: _meanings(module, text, imports[module]) for module, text in texts.items()})
    *_, last = texts
    docstring = ast.get_source_segment(texts[last], trees[last].body[0])
    head = f"{docstring}\n\n{_merged(imports.values())}"
    if any(LOGGER in text.splitlines() for text in texts.values()):
        head += f"\n{LOGGER}\n"
    sections = []
    for module, text in texts.items():
        about = "" if module == last else ast.get_docstring(trees[module]) or ""
        sections.append(f"{_section_head(module, about)}\n\n\n{_body(text, trees[module])}\n")
    return "\n\n".join([head, *sections])


def _relative_imports(tree: ast.Module) -> list[ast.ImportFrom]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level]


def _check_relative_imports(module: str, tree: ast.Module) -> None:
    for node in _relative_imports(tree):
        plain = node.level == 1 and node.module and not any(alias.asname for alias in node.names)
        if node not in tree.body or not plain:
            raise RuntimeError(
                f"{module}.py:{node.lineno} cannot be part of a single file: `{ast.unparse(node)}` must be "
                "`from .module import name`, outside of functions and blocks, and without `as`"
            )


def _at_top(tree: ast.Module) -> Iterator[ast.stmt]:
    """The statements at a module's top; those that only type checkers see are at its top in one file too."""
    for node in tree.body:
        if _is_for_type_checkers(node):
            yield from node.body
        yield node


def _is_for_type_checkers(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def _absolute_imports(tree: ast.Module) -> list[Import]:
    """What a module imports at its top level from outside the package, name by name."""
    found = []
    for node in _at_top(tree):
        if isinstance(node, ast.Import):
            found += [(None, alias.name, alias.asname) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found += [(node.module, alias.name, alias.asname) for alias in node.names]
    return [one for one in found if one[:2] != ("typing", "TYPE_CHECKING")]  # its blocks are gone


def _meanings(module: str, text: str, imports: Iterable[Import]) -> dict[str, str]:
    """What every name means that a module binds at its top level.

    Two modules may bind the same name only if its meanings, as texts, are equal.
    """
    table = symtable.symtable(text, f"{module}.py", "exec")
    siblings = {alias.name for node in _relative_imports(ast.parse(text)) for alias in node.names}
    bound = {symbol.get_name() for symbol in table.get_symbols() if symbol.is_assigned() or symbol.is_imported()}
    meanings = dict.fromkeys(bound - siblings, f"{module}.py")
    for source, name, other in imports:
        if source is None and other is None:  # `import a.b` binds the name a
            name = name.partition(".")[0]
        meanings[other or name] = f"{source}.{name}" if source else name
    if LOGGER in text.splitlines():
        meanings["logger"] = LOGGER
    return meanings


def _check_names(meanings: Mapping[str, Mapping[str, str]]) -> None:
    first = {}
    for module, names in meanings.items():
        for name, meaning in names.items():
            if name in vars(builtins):
                raise RuntimeError(
                    f"{module}.py hides Python's own `{name}`, which in a single file no module could use; rename it"
                )
            other, known = first.setdefault(name, (module, meaning))
            if known != meaning:
                raise RuntimeError(
                    f"`{name}` means one thing in {other}.py and another in {module}.py; rename it in one of them"
                )


def _merged(imports: Iterable[list[Import]]) -> str:
    """All imports, each once, in isort's order: `__future__`, then the standard library, then other packages."""
    plain, named = set(), defaultdict(set)
    for source, name, other in (entry for entries in imports for entry in entries):
        alias = f"{name} as {other}" if other else name
        if source is None:
            plain.add(alias)
        else:
            named[source].add(alias)
    groups = defaultdict(list)
    for alias in sorted(plain, key=str.lower):
        groups[_group(alias)].append(f"import {alias}")
    for source in sorted(named, key=str.lower):
        groups[_group(source)].append(_import_from(source, named[source]))
    return "\n".join("\n".join(groups[group]) + "\n" for group in sorted(groups))


def _group(module: str) -> int:
    package = module.partition(" ")[0].partition(".")[0]
    return 0 if package == "__future__" else 1 if package in sys.stdlib_module_names else 2


def _import_from(source: str, aliases: Iterable[str]) -> str:
    # isort puts constants first, then classes, then all other names
    ordered = sorted(aliases, key=lambda a: (0 if a.split()[0].isupper() else 1 if a[0].isupper() else 2, a.lower()))
    line = f"from {source} import {', '.join(ordered)}"
    if len(line) <= WIDTH:
        return line
    return "\n".join([f"from {source} import (", *(f"    {alias}," for alias in ordered), ")"])


def _section_head(module: str, about: str) -> str:
    rule = "# " + "-" * (WIDTH - 2)
    lines = [f"# {module}"]
    for paragraph in about.split("\n\n") if about else []:
        kept = paragraph.splitlines()
        if any(len(line) > WIDTH - 2 for line in kept):
            kept = textwrap.wrap(" ".join(kept), WIDTH - 2)
        lines += ["#", *(f"# {line}".rstrip() for line in kept)]
    return "\n".join([rule, *lines, rule])


def _body(text: str, tree: ast.Module) -> str:
    """A module's text without its licence line, docstring, imports and logger, which the single file has only once."""
    lines = text.split("\n")
    gone = {0} if lines[0].startswith("# SPDX") else set()
    for node in tree.body:
        docstring = node is tree.body[0] and ast.get_docstring(tree) is not None
        imports = isinstance(node, (ast.Import, ast.ImportFrom)) or _is_for_type_checkers(node)
        if docstring or imports or lines[node.lineno - 1] == LOGGER:
            gone |= set(range(node.lineno - 1, node.end_lineno))
    return "\n".join(line for i, line in enumerate(lines) if i not in gone).strip("\n")
