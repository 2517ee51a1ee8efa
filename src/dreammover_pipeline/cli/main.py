# SPDX-License-Identifier: Apache-2.0
"""The command `dreammover`.

torch and diffusers take seconds to import, so that happens after the arguments parsed.

Exit codes: 0 done, 1 failed while running, 2 bad input, 130 interrupted, 143 terminated (by SIGTERM, in a batch).
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence

from .. import __version__
from .batch import add_batch
from .evaluate import add_evaluation
from .export_hub import add_export
from .interpolate import add_interpolate
from .render import add_render
from .train import add_train
from .ui import add_ui


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; everything that goes wrong becomes one line on stderr.

    Args:
        argv: the arguments after the program's name; those of the process by default.

    Returns:
        The exit code.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # third parties' only: the pipeline's own go through logging
            args = _parser().parse_args(argv)
            args.run(args)
        return 0
    except (ValueError, TypeError) as error:
        return _fail(2, error)
    except KeyboardInterrupt:
        return _fail(130, "interrupted")
    except (RuntimeError, OSError) as error:
        return _fail(1, error)
    except Exception as error:  # not meant to be read by users, so its message alone may say nothing
        return _fail(1, f"{type(error).__name__}: {error}")


def _fail(code: int, reason: Exception | str) -> int:
    print("dreammover: error:", " ".join(str(reason).split()), file=sys.stderr)
    return code


class _Parser(argparse.ArgumentParser):
    def __init__(self, **settings):  # of the commands, too: they are made of their parent's class
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message: str):
        raise ValueError(f"{message}; see {self.prog} --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="dreammover", description="A short video out of two photos.")
    parser.add_argument("--version", action="version", version=f"dreammover {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    add_interpolate(commands)
    add_render(commands)
    add_batch(commands)
    add_evaluation(commands)
    add_export(commands)
    add_ui(commands)
    add_train(commands)
    return parser
