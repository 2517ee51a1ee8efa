# SPDX-License-Identifier: Apache-2.0
"""The command `dreammover export-hub`."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..export.hub import REPOSITORY, write_hub_folder, write_single_file
from .options import folder_path


def add_export(commands: argparse._SubParsersAction) -> None:
    """Register the command."""
    text = "Write the pipeline's code so that others load it by `custom_pipeline=` without installing anything."
    parser = commands.add_parser("export-hub", help="write the code for the Hub or for diffusers", description=text)
    parser.set_defaults(run=_export)
    add = parser.add_argument
    add(
        "folder",
        type=folder_path,
        metavar="DIR",
        nargs="?",
        help="A new folder for the Hub repository: the code in one file and the model card, no weights.",
    )
    add(
        "--single-file",
        metavar="PATH",
        help="A file NAME.py for examples/community; NAME_README.md is written beside it.",
    )
    add("--repo", metavar=REPOSITORY, help="The Hub repository that DIR is for; the examples name it.")


def _export(args: argparse.Namespace) -> None:
    """Write the folder or the single file.

    Raises:
        ValueError: The arguments do not name exactly one of both, or `--repo` is given for a single file.
    """
    if (args.folder is None) == (args.single_file is None):
        raise ValueError("give either DIR or --single-file PATH; see dreammover export-hub --help")
    if args.single_file is not None:
        if args.repo is not None:
            raise ValueError("--repo is for DIR, since a single file has no model card; leave --repo out")
        section = write_single_file(Path(args.single_file))
        print(f"{args.single_file}: the pipeline in one file; {section}: its README section")
        return
    files = write_hub_folder(args.folder, args.repo)
    print(f"{args.folder}: {len(files)} files")
