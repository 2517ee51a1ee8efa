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


def table(records: Sequence[dict], seconds: float) -> str:
    """A table of how many cases of every surface ended how, and of how many broke a promise."""
    lines = ["".join(f"{cell:>10}" for cell in ("surface", *STATUSES, "faults"))]
    for name in (*SURFACES, "all"):
        own = [record for record in records if name in ("all", record["surface"])]
        counts = [sum(record["status"] == status for record in own) for status in STATUSES]
        if own:
            lines.append("".join(f"{cell:>10}" for cell in (name, *counts, sum(bool(one["broken"]) for one in own))))
    return "\n".join([*lines, f"{len(records)} cases in {seconds:.0f} s"])


def tried(bench: Bench, seed: int, wanted: Sequence[tuple[str, int]], say_all: bool = False) -> list[dict]:
    """Run cases, and say of each that broke a promise, or of each, what happened and how to repeat it alone."""
    records, bar = [], tqdm(wanted, unit="case")
    for k, (surface, number) in enumerate(bar, start=1):
        bar.set_description(f"{surface}:{number}")
        verdict = judged(bench, seed, surface, number, thorough=k % EVERY == 0 or k == len(wanted))
        records.append({"surface": surface, "number": number, **verdict.as_json()})
        if verdict.broken or say_all:
            happened = [verdict.case.text, f"{verdict.status}: {verdict.message}"]
            broken = [f"BROKEN: {fault}" for fault in verdict.broken]
            again = f"python -m fuzz.run --seed {seed} --only {surface}:{number}"
            bar.write("\n    ".join([again, *happened, *broken]))
    return records


def main(argv: Sequence[str] | None = None) -> int:
    """Run the cases, print a table, and return 1 if a promise was broken."""
    arguments = parser().parse_args(argv)
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESSES, resource.getrlimit(resource.RLIMIT_AS)[1]))
    start, wanted = time.perf_counter(), numbers(arguments)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        records = tried(Bench(Path(folder), arguments.limit), arguments.seed, wanted, bool(arguments.only))
    seconds = time.perf_counter() - start
    print(table(records, seconds))
    if arguments.output:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        report = {"seed": arguments.seed, "seconds": round(seconds, 1), "peak_mb": peak, "cases": records}
        arguments.output.write_text(json.dumps(report, indent=1) + "\n")
    return int(any(record["broken"] for record in records))


if __name__ == "__main__":
    sys.exit(main())
