# SPDX-License-Identifier: Apache-2.0
"""The command `dreammover`.

torch and diffusers take seconds to import, so they are imported only after the arguments have been parsed.

Exit codes: 0 done; 1 failed while running; 2 bad input; 130 interrupted; 143 terminated by SIGTERM, which `batch` and
`again` catch.
"""

from __future__ import annotations

import argparse
import io
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from .. import __version__
from ..batch.jobs import RefusedRowsError
from .batch import add_batch
from .evaluate import add_evaluation
from .export_hub import add_export
from .fetch_weights import add_fetch_weights
from .interpolate import add_interpolate
from .poses import add_poses
from .render import add_render
from .train import add_train
from .ui import add_ui


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Everything that goes wrong becomes one line on stderr; each row that is refused has its own.

    Args:
        argv: The arguments after the program's name; by default they are those of the process.

    Returns:
        The exit code.
    """
    try:
        with _printing_any_name(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # only third parties warn in this way; the pipeline uses logging
            _check_no_nulls(sys.argv[1:] if argv is None else argv)
            args = _parser().parse_args(argv)
            args.run(args)
        return 0
    except RefusedRowsError as error:
        return max(_fail(2, reason) for reason in error.reasons)
    except (ValueError, TypeError) as error:
        return _fail(2, error)
    except KeyboardInterrupt:
        return _fail(130, "interrupted")
    except (RuntimeError, OSError) as error:
        return _fail(1, error)
    except Exception as error:  # this was not written for users, so its message may say little without its class
        return _fail(1, f"{type(error).__name__}: {error}")


def _check_no_nulls(argv: Sequence[str]) -> None:
    """Raise ValueError if an argument holds a null character, which only a program that calls `main` can pass."""
    for before, argument in zip(["", *argv], argv, strict=False):
        if "\0" in argument:
            raise ValueError(f"{before} {argument!r}: an argument cannot hold a null character")


@contextmanager
def _printing_any_name() -> Iterator[None]:
    """While the context lasts, print characters that the terminal cannot show as escapes such as `\\u732b`.

    A video whose name the terminal cannot show is made all the same, and nothing has failed then.
    """
    if not isinstance(sys.stdout, io.TextIOWrapper):
        yield  # a program that calls `main` has put something else there, which decides by itself
        return
    stdout, errors = sys.stdout, sys.stdout.errors
    stdout.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        stdout.reconfigure(errors=errors)


def _fail(code: int, reason: Exception | str) -> int:
    """Print one line that says why the command failed, and return the exit code."""
    print("dreammover: error:", " ".join(str(reason).split()), file=sys.stderr)
    return code


class _Parser(argparse.ArgumentParser):
    """A parser that raises ValueError instead of ending the process. argparse also uses it for the commands."""

    def __init__(self, **settings):
        super().__init__(allow_abbrev=False, **settings)
        # What begins with a dash is a number also with an exponent, which argparse has not taken for one.
        self._negative_number_matcher = re.compile(r"-(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$")

    def error(self, message: str):
        raise ValueError(f"{message}; see {self.prog} --help")


def _parser() -> argparse.ArgumentParser:
    """The parser of the program and of all its commands."""
    parser = _Parser(prog="dreammover", description="A short video out of two photos.")
    parser.add_argument("--version", action="version", version=f"dreammover {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    add_interpolate(commands)
    add_render(commands)
    add_poses(commands)
    add_batch(commands)
    add_evaluation(commands)
    add_fetch_weights(commands)
    add_export(commands)
    add_ui(commands)
    add_train(commands)
    return parser
