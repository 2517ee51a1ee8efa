# SPDX-License-Identifier: Apache-2.0
"""Measure what a run of the pipeline costs: `python benchmarks/run.py --profile cpu -o benchmarks.json`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks import (
    compiling,
    counts,
    footprint,
    gpu_rows,
    kernel_kinds,
    large_photos,
    machine,
    matching,
    overhead,
    released,
    scaling,
    shares,
    stages,
)
from benchmarks.profiles import PROFILES, ROWS, Bench
from benchmarks.report import write_json

SECTIONS = {
    "counts": counts.tables,
    "job": gpu_rows.job,
    "overhead": overhead.tables,
    "recording": gpu_rows.recording,
    "kernels": kernel_kinds.tables,
    "channels_last": gpu_rows.channels_last,
    "stages": stages.tables,
    "released": released.tables,
    "matching": matching.tables,
    "precision": stages.precision,
    "memory": footprint.tables,
    "cards": gpu_rows.cards,
    "scaling": scaling.tables,
    "shares": shares.tables,
    "photos": large_photos.tables,
    "compile": compiling.tables,
}


def parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--profile", choices=PROFILES, default="cpu", help="what is measured how often (default: %(default)s)")
    add(
        "--rows",
        nargs="+",
        choices=ROWS,
        metavar="ROW",
        help=f"some of: {', '.join(ROWS)}; default: the rows of the profile",
    )
    add("-o", "--output", type=Path, metavar="FILE.json", help="write all results to this file, after every table")
    add("--plot", type=Path, metavar="FILE.png", help="draw the results of the row scaling")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the rows one after the other, and print and write each as soon as it is done."""
    arguments = parser().parse_args(argv)
    bench = Bench(arguments.profile)
    if bench.device.type != "cpu" and not torch.accelerator.is_available():
        sys.exit(
            f"the profile {arguments.profile!r} needs the device {bench.profile.device!r}, which this machine lacks"
        )
    if bench.device.type == "cpu":
        torch.set_num_threads(1)
    rows = arguments.rows or bench.profile.rows
    on = machine.describe(bench.device)
    result = {"profile": arguments.profile, "rows": list(rows), "machine": on, "tables": []}
    for row in rows:
        options = {"plot": arguments.plot} if row == "scaling" else {}
        for table in SECTIONS[row](bench, **options):
            print(table.markdown(), flush=True)
            result["tables"].append({"row": row, **table.as_json()})
            if arguments.output:
                write_json(arguments.output, result)


if __name__ == "__main__":
    main()
