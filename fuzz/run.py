# SPDX-License-Identifier: Apache-2.0
"""Try odd inputs and see whether the promises of docs/reliability.md hold: `python -m fuzz.run --seed 0`."""

from __future__ import annotations

import argparse
import io
import json
import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from random import Random

import torch
from tqdm import tqdm

from . import calls, commands, files, manifests
from .bench import Bench, Verdict

SURFACES = {"calls": calls.case, "commands": commands.case, "files": files.case, "manifests": manifests.case}
EVERY = 20  # cases between two comparisons of all weights, and of the frames of a good call
ADDRESSES = 12 * 2**30  # bytes of addresses that the process may have; the libraries alone take three
STATUSES = ("done", "refused", "failed", "broken")


def parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = argparse.ArgumentParser(prog="python -m fuzz.run", description=__doc__)
    add = parser.add_argument
    add("--seed", type=int, default=0, help="what the cases are drawn from (default: %(default)s)")
    add("--cases", type=int, default=400, help="how many, over all surfaces (default: %(default)s)")
    add("--surface", choices=SURFACES, help="only this surface")
    add("--only", metavar="SURFACE:NUMBER", help="only this case")
    add("--limit", type=float, default=60, metavar="SECONDS", help="how long a case may take (default: %(default)s)")
    add("-o", "--output", type=Path, metavar="FILE.json", help="write what became of every case to this file")
    return parser


def numbers(arguments: argparse.Namespace) -> list[tuple[str, int]]:
    """The surface and the number of every case that was asked for."""
    if arguments.only:
        surface, _, number = arguments.only.partition(":")
        if surface not in SURFACES or not number.isdecimal():
            sys.exit(f"--only takes a surface and a number, such as files:17; the surfaces are {', '.join(SURFACES)}")
        return [(surface, int(number))]
    chosen = [arguments.surface] if arguments.surface else list(SURFACES)
    shares = [arguments.cases // len(chosen) + (k < arguments.cases % len(chosen)) for k in range(len(chosen))]
    return [(surface, number) for surface, share in zip(chosen, shares, strict=True) for number in range(share)]


def judged(bench: Bench, seed: int, surface: str, number: int, thorough: bool) -> Verdict:
    """Run one case. Nothing that it prints is shown."""
    rng = Random(f"{seed} {surface} {number}")
    torch.manual_seed(number)
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        return bench.judge(partial(SURFACES[surface], bench, rng), thorough)


def table(counts: Counter, seconds: float) -> str:
    """A table of how many cases of every surface ended how, and of how many broke a promise."""
    columns = (*STATUSES, "faults")
    surfaces = [surface for surface in SURFACES if any(counts[surface, column] for column in columns)]
    rows = [(surface, *(counts[surface, column] for column in columns)) for surface in surfaces]
    rows.append(("all", *(sum(row[k] for row in rows) for k in range(1, 1 + len(columns)))))
    lines = [f"{name:10}" + "".join(f"{cell:>9}" for cell in cells) for name, *cells in [("surface", *columns), *rows]]
    return "\n".join([*lines, f"{sum(rows[-1][1:-1])} cases in {seconds:.0f} s"])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the cases, print a table, and return 1 if a promise was broken."""
    arguments = parser().parse_args(argv)
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESSES, resource.getrlimit(resource.RLIMIT_AS)[1]))
    start, records, counts = time.perf_counter(), [], Counter()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        bench, wanted = Bench(Path(folder), arguments.limit), numbers(arguments)
        bar = tqdm(wanted, unit="case")
        for k, (surface, number) in enumerate(bar):
            bar.set_description(f"{surface}:{number}")
            verdict = judged(bench, arguments.seed, surface, number, k % EVERY == EVERY - 1 or k == len(wanted) - 1)
            counts[surface, verdict.status] += 1
            counts[surface, "faults"] += bool(verdict.broken)
            records.append({"surface": surface, "number": number, **verdict.as_json()})
            if verdict.broken or arguments.only:
                again = f"python -m fuzz.run --seed {arguments.seed} --only {surface}:{number}"
                lines = [
                    again,
                    verdict.case.text,
                    f"{verdict.status}: {verdict.message}",
                    *(f"BROKEN: {fault}" for fault in verdict.broken),
                ]
                bar.write("\n    ".join(lines))
    seconds = time.perf_counter() - start
    print(table(counts, seconds))
    if arguments.output:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        report = {"seed": arguments.seed, "seconds": round(seconds, 1), "peak_mb": peak, "cases": records}
        arguments.output.write_text(json.dumps(report, indent=1) + "\n")
    return int(any(record["broken"] for record in records))


if __name__ == "__main__":
    sys.exit(main())
