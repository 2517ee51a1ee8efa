# SPDX-License-Identifier: Apache-2.0
"""Values of arguments, drawn from what the declarations in `settings.py` say of them, and values that nobody expects.

An argument that is declared anew is drawn without a line here: its kind of values, or its annotation, decides. Values
are drawn as the Python that makes them, so that a report shows what can be typed; `made` makes them.
"""

from __future__ import annotations

import math
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from random import Random

import numpy as np
import torch

from dreammover_pipeline.arguments import Argument, Blocks, Choice, Numbers, Text, WholeNumbers

# What nobody expects: what JSON and so a file can hold, and what only Python can.
TEXTUAL = r"""None | True | False | -1 | 0 | 1 | 3 | 1.5 | -0.0 | 10**9 | 2**63 | -2**64 | 10**400 | math.nan
 | math.inf | -math.inf | 1e-320 | 1e308 | "" | " " | "x" | "0" | "1e3" | "nan" | "None" | "\n" | "猫" | "\x00"
 | "\udcff" | "linear" | "a" * 5000 | "<unk> ((:1.5))" | "../x" | [] | [None] | [[]] | [1, 2] | [0.5, "x"] | [True]
 | [-1] | ["a", "b"] | ["a", "b", "c"] | {} | {"a": 1} | [[[1, 2], [3, 4]]] | [[[[1, 2], [3, 4]]]]"""
PYTHONIC = r"""b"x" | () | (1, 2) | {1, 2} | range(2) | iter([0.5]) | object() | int | 1j | Decimal("NaN")
 | Fraction(1, 3) | Path("nowhere") | np.float32(0.5) | np.int64(1) | np.bool_(True) | np.str_("linear")
 | np.array([1, 2]) | np.array(["two_level", "direct"]) | np.array([]) | np.datetime64("NaT")
 | np.zeros((2, 2), object) | torch.tensor(1) | torch.tensor([0.25, 0.5]) | torch.tensor([])
 | torch.empty(2, 3, device="meta") | torch.Generator()"""
PICTURES = r"""smooth(64, 64) | smooth(48, 80) | smooth(1, 1) | smooth(1, 400) | smooth(0, 5) | smooth(64, 64)[..., 0]
 | smooth(64, 64) > 99 | smooth(64, 64) * np.uint16(257) | smooth(64, 64) / 255 | smooth(64, 64) / 100
 | smooth(64, 64) * np.nan | smooth(64, 64).astype(int) | smooth(64, 64) * 1j | smooth(64, 64)[None]
 | smooth(64, 64)[..., [0] * 7] | smooth(64, 64)[None, ..., None] | smooth(64, 64).astype(object)
 | smooth(64, 64)[::-1, ::-1] | torch.zeros(3, 64, 64, device="meta") | torch.rand(3, 64, 64)
 | torch.rand(4, 64, 48, dtype=torch.float64) | torch.rand(64, 64, requires_grad=True)
 | torch.rand(3, 64, 64).to_sparse() | [smooth(64, 64)] | [smooth(64, 64), smooth(64, 64)] | [[smooth(64, 64)]]
 | "nowhere.png" | "" | "." | "a\0b.png" | Path("a.png")"""
# What may be right, or nearly, for an argument of which the declaration says no more than its annotation.
BY_ANNOTATION = {
    "Callable": r"""lambda *a: {} | lambda *a: None | lambda *a: a[0] | lambda *a: {"latents": "x"}
 | lambda *a: {"noise": 1} | lambda *a: math.nan | lambda *a: 1 / 0""",
    "float": "[0.5] | [0.25, 0.75] | [0.75, 0.25] | [0, 1] | [1e-9, 0.5]",
    "str": '"ease-in" | "even" | ["latents"] | ["prompt_embeds", "noise"]',
    "int": "1 | 8 | 31 | 32 | 40 | 64 | 72 | 10_000_000",
    "bool": "True | False",
    "dict": '{"scale": 0.5} | {"scale": math.nan} | {"scale": "x"} | {"gain": 1}',
    "Generator": "torch.Generator().manual_seed(1) | [torch.Generator().manual_seed(1)]",
    "Tensor": r"""torch.zeros(1, 77, 64) | torch.full((2, 77, 64), math.nan) | torch.randn(1, 5, 64)
 | torch.randn(77, 64) | torch.randn(3, 77, 64) | torch.zeros(1, 0, 64) | torch.zeros(1, 77, 64).int()
 | torch.zeros(1, 77, 64) * 1j""",
    "Sequence": "[((8, 8), (20, 20))] | [((8, 8), (900, 2))] | [((math.nan, 1), (2, 2))]",
    "object": PICTURES,
}
ONLY_PYTHON = ("Callable", "Generator", "Tensor", "object")


def one_of(values: str, rng: Random) -> str:
    """One of the values of a list such as those above."""
    return rng.choice(values.split(" | ")).strip()


def odd(rng: Random, textual: bool) -> str:
    """A value that nobody expects; with `textual` one that a text file can hold."""
    return one_of(TEXTUAL if textual else f"{TEXTUAL} | {PYTHONIC}", rng)


def drawn(declared: Argument, rng: Random, textual: bool = False) -> str:
    """A value for an argument: one that may be right, one at a bound or just beyond it, or one that nobody expects."""
    fate, values = rng.random(), declared.values
    if fate < 0.3:
        return odd(rng, textual)
    if fate < 0.4:
        return repr(declared.default)
    if isinstance(values, WholeNumbers):  # much more than the least would be right too, but who could wait for it?
        beyond = [values.least - 1, values.largest + 1, float(values.least), str(values.least)]
        return repr(rng.choice([*(values.least + more for more in range(4)), *beyond]))
    if isinstance(values, Numbers):
        least, largest = float(values.least), float(values.largest)
        beyond = [math.nextafter(least, -math.inf), math.nextafter(largest, math.inf), str(largest)]
        within = [least, math.nextafter(least, math.inf), largest, int(largest), rng.uniform(0, 2), rng.uniform(0, 2)]
        return repr(rng.choice([*within, *beyond]))
    if isinstance(values, Choice):
        name = rng.choice(values.names)
        return repr(rng.choice([name, name, name, name.upper(), f"{name} ", [name], name[:-1]]))
    if isinstance(values, Blocks):
        return one_of('0 | [0] | [3] | (1, 2) | [2, 2] | [4] | [-1] | [0, 1, 2, 3] | [1.0] | ["1"] | [10**9]', rng)
    if isinstance(values, Text):
        return one_of(
            '"a cat" | "a " * 500 | ["a cat", "a dog"] | ("a", "b") | [["a", "b"]] | ["a", None] | "猫"', rng
        )
    kinds = [kind for kind in BY_ANNOTATION if kind in declared.annotation and not (textual and kind in ONLY_PYTHON)]
    return one_of(" | ".join(BY_ANNOTATION[kind] for kind in kinds), rng) if kinds else odd(rng, textual)


def smooth(height: int, width: int) -> np.ndarray:
    """A picture without edges."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 255 // max(width - 1, 1), y * 255 // max(height - 1, 1), (x + y) % 256], -1).astype(np.uint8)


NAMES = {
    "math": math,
    "np": np,
    "torch": torch,
    "smooth": smooth,
    "Decimal": Decimal,
    "Fraction": Fraction,
    "Path": Path,
}


def made(value: str) -> object:
    """The value that a text in Python stands for, made of the names that this module has."""
    return eval(value, globals())
