# SPDX-License-Identifier: Apache-2.0
"""The commands `dreammover evaluate`, `dreammover compare` and `dreammover correspondence`.

Measuring libraries, torch and diffusers take seconds to import, so that happens after the arguments parsed.
"""

from __future__ import annotations

import argparse
import ast
import json
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from ..arguments import arguments_of
from ..inputs import check_choice, check_integer
from ..media.files import make_folder
from ..media.texts import write_text
from ..settings import PrepareSettings, RenderSettings, VideoSettings
from .claims import claimed
from .loading import add_component_options, add_model_options, check_model, load_chosen, pipeline_class
from .options import add_output_folder, folder_path

FULL = {"pairs": 32, "frames": 7}  # sizes of a suite without --quick
# Sizes of a suite with --quick, which takes about six minutes on two cores with the embedded checkpoint.
QUICK = {"pairs": 2, "frames": 1}
DIFFICULTIES = ("same", "relit", "recast")
SIDES = (64, 1024)  # smallest and largest side of the scenes that the world can draw, in pixels
# Settings of the method that a line of text can hold; which frames are made is decided by the suites.
SETTINGS = {
    name
    for name, declared in arguments_of(PrepareSettings, RenderSettings).items()
    if declared.values.in_files and name not in arguments_of(VideoSettings)
}


def add_evaluation(commands: argparse._SubParsersAction) -> None:
    """Register the three commands."""
    _add_evaluate(commands)
    _add_compare(commands)
    _add_correspondence(commands)


def _add_evaluate(commands: argparse._SubParsersAction) -> None:
    text = (
        "Run methods on pairs, measure what can be measured, and write a report. After a kill, the same command "
        "goes on where the last one was."
    )
    parser = commands.add_parser("evaluate", help="measure the method, its parts and its rivals", description=text)
    parser.set_defaults(run=_evaluate)
    add = parser.add_argument
    add_output_folder(add, "for run.jsonl, report.md, sheets and frames")
    add(
        "--quick",
        action="store_true",
        help=f"{QUICK['pairs']} pairs of each suite, {QUICK['frames']} frame of each pair",
    )
    add(
        "--suites",
        nargs="+",
        metavar="NAME",
        help="default: same relit recast; also clips, and folders of pairs",
    )
    add("--pairs", type=int, metavar="N", help=f"largest number of pairs of each suite (default: {FULL['pairs']})")
    add(
        "--frames",
        type=int,
        metavar="N",
        help=f"frames of a pair, unless a folder holds true ones (default: {FULL['frames']})",
    )
    add(
        "--methods",
        nargs="+",
        metavar="NAME",
        help="default: all whose weights are there; the error for an unknown name lists all names",
    )
    sides = "side of drawn scenes in pixels, {} to {} (default: the native size)".format(*SIDES)
    add("--size", type=int, metavar="N", help=sides)
    add("--set", action="append", default=[], metavar="NAME=VALUE", help="set a parameter of the pipeline; repeatable")
    add("--flow", default="dis", metavar="NAME", help="dis (the default) or raft, for warping errors without truth")
    add("--seed", type=int, default=0, metavar="N", help="decides drawn scenes and LoRAs (default: %(default)s)")
    add("--quiet", action="store_true", help="show no progress bar")
    add_model_options(parser, default="tiny")
    add_component_options(parser)


def _add_compare(commands: argparse._SubParsersAction) -> None:
    text = "Print how a method of one evaluation differs from a method of another, pair by pair, with intervals."
    parser = commands.add_parser("compare", help="compare two evaluations", description=text)
    parser.set_defaults(run=_compare)
    parser.add_argument("first", type=folder_path, metavar="FOLDER", help="the output folder of an evaluation")
    parser.add_argument(
        "second",
        type=folder_path,
        metavar="OTHER",
        help="the output folder of the evaluation that is subtracted; it may be the same",
    )
    parser.add_argument("--method", default="ours", metavar="NAME", help="the method of FOLDER (default: %(default)s)")
    parser.add_argument("--other-method", metavar="NAME", help="the method of OTHER; default: the value of --method")


def _add_correspondence(commands: argparse._SubParsersAction) -> None:
    text = "Measure the flow of features of all up blocks but the first, at several noise steps, smoothed or not."
    parser = commands.add_parser("correspondence", help="measure the flow of all features", description=text)
    parser.set_defaults(run=_correspondence)
    add = parser.add_argument
    add_output_folder(add, "for correspondence.jsonl and correspondence.md")
    add(
        "--suites",
        nargs="+",
        metavar="NAME",
        default=DIFFICULTIES,
        help="some of same, relit and recast; default: all",
    )
    add("--pairs", type=int, default=16, metavar="N", help="number of pairs of each suite (default: %(default)s)")
    add(
        "--steps",
        type=int,
        nargs="+",
        default=(1, 6, 14, 22, 30),
        metavar="N",
        help="noise steps of 50; default: 1 6 14 22 30",
    )
    add("--seed", type=int, default=0, metavar="N", help="decides the drawn scenes (default: %(default)s)")
    add("--quiet", action="store_true", help="show no progress bar")
    add_model_options(parser, default="tiny")


def _evaluate(args: argparse.Namespace) -> None:
    start = time.perf_counter()
    _require_libraries()
    check_model(args.model, args.allow_pickle)
    settings = dict(_setting(text) for text in args.set)
    chosen = QUICK if args.quick else FULL
    pairs = chosen["pairs"] if args.pairs is None else args.pairs
    frames = chosen["frames"] if args.frames is None else args.frames
    check_integer("--pairs", pairs, 1)
    check_integer("--frames", frames, 1)
    check_integer("--seed", args.seed, 0)
    if args.size is not None:
        check_integer("--size", args.size, *SIDES)
    pipeline_class()  # first, since it hushes third parties before they are imported
    from ..evaluation.methods import METHODS, methods_left_out

    for method in args.methods or ():
        check_choice("--methods", method, tuple(METHODS))
        METHODS[method].require_weights()
    missing = methods_left_out([name for name in ("controlnet", "clip") if getattr(args, name) is not None])
    for method in args.methods or ():
        if method in missing:
            raise ValueError(f"the method {method} cannot be evaluated: {missing[method]}")
    left_out = {} if args.methods else missing
    methods = [method for method in dict.fromkeys(args.methods or METHODS) if method not in left_out]
    from ..evaluation.networks import FLOWS, find_tools

    check_choice("--flow", args.flow, tuple(FLOWS))
    from ..evaluation.report import check_report_place, write_report
    from ..evaluation.run import RunFile, header, run
    from ..evaluation.suites import find_suites

    names = args.suites or DIFFICULTIES
    find_suites(names, pairs, frames, 64)  # only to refuse bad names before a model is loaded
    _check_apart(args.output, names)
    for group in (PrepareSettings, RenderSettings):
        group.of(settings)  # the same for values that no model takes
    is_new = not args.output.exists()
    make_folder(args.output, "--output: the folder")
    check_report_place(args.output)
    with claimed(args.output, "evaluating", temporary=is_new):
        tools = find_tools(args.flow)
        pipe = load_chosen(args)
        pipe.set_progress_bar_config(disable=True)
        pipe.check_inputs(**settings)
        suites = find_suites(names, pairs, frames, args.size or native_size(pipe), args.seed)
        file = RunFile.start(args.output, header(pipe, args.model, suites, args.seed, settings, args.flow, tools))
        run(pipe, suites, methods, file, tools, args.quiet)
        report = write_report(file, tools, left_out)
    for method, reason in left_out.items():
        print(f"the method {method} is left out: {reason}")
    print(f"{report}: {len(file.rows)} rows in {time.perf_counter() - start:.0f} s")


def _check_apart(output: Path, suites: Sequence[str]) -> None:
    """Raise ValueError if what is written would lie among the pairs of a suite, and be taken for pairs later."""
    from ..evaluation.run import FRAMES, SHEETS
    from ..evaluation.suites import folder_of

    for suite in suites:
        folder = folder_of(suite)
        if folder is None:
            continue
        place, pairs = output.resolve(), folder.resolve()
        if place.is_relative_to(pairs) or any(pairs.is_relative_to(place / name) for name in (FRAMES, SHEETS)):
            raise ValueError(
                f"--output: what is written to '{output}' would lie among the pairs of the suite '{suite}'; "
                "choose another folder"
            )


def _correspondence(args: argparse.Namespace) -> None:
    start = time.perf_counter()
    _require_libraries()
    check_model(args.model, args.allow_pickle)
    check_integer("--pairs", args.pairs, 1)
    check_integer("--seed", args.seed, 0)
    for name in args.suites:
        check_choice("--suites", name, DIFFICULTIES)
    pipeline_class()  # first, since it hushes third parties before they are imported
    from ..evaluation.correspondence import check_places, study, table
    from ..evaluation.suites import find_suites

    rows_file, report = (args.output / f"correspondence.{ending}" for ending in ("jsonl", "md"))
    make_folder(args.output, "--output: the folder")
    check_places(rows_file, report)
    pipe = load_chosen(args)
    pipe.set_progress_bar_config(disable=True)
    pipe.check_inputs(inversion_steps=max(args.steps), feature_step=min(args.steps))
    suites = find_suites(args.suites, args.pairs, 1, native_size(pipe), args.seed)
    rows = study(pipe, suites, args.steps, args.quiet)
    tables = "\n".join(f"## {suite.name}\n\n{table(rows, suite.name)}" for suite in suites)
    for path, text in ((rows_file, "".join(json.dumps(row) + "\n" for row in rows)), (report, tables)):
        write_text(path, text)
    print(f"{report}: {len(rows)} rows in {time.perf_counter() - start:.0f} s")


def native_size(pipe) -> int:
    """Side in pixels of the images that a model was trained for, within what the world can draw."""
    sample = pipe.unet.config.sample_size
    side = sample if isinstance(sample, int) else min(sample)
    smallest, largest = SIDES
    return min(largest, max(smallest, side * pipe.vae_scale_factor))


def _compare(args: argparse.Namespace) -> None:
    _require_libraries()
    pipeline_class()  # first, since it hushes third parties before they are imported
    from ..evaluation.report import compare
    from ..evaluation.run import RunFile

    first, second = RunFile.read(args.first), RunFile.read(args.second)
    print(compare(first, second, args.method, args.other_method or args.method), end="")


def _require_libraries() -> None:
    missing = [name for name in ("skimage", "cv2") if find_spec(name) is None]
    if missing:
        raise RuntimeError(
            f"evaluation needs {' and '.join(missing)}; install them with: pip install 'dreammover-pipeline[eval]'"
        )


def _setting(text: str) -> tuple[str, object]:
    """Read NAME=VALUE, where NAME is a parameter of `prepare` or `render`.

    VALUE is read as a Python literal; if it is none, it is taken as a string.

    Raises:
        ValueError: there is no such parameter, or it cannot be set in this way.
    """
    name, equals, value = text.partition("=")
    if not equals or name not in SETTINGS:
        raise ValueError(f"--set takes NAME=VALUE with a name of {', '.join(sorted(SETTINGS))}; not '{text}'")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value
