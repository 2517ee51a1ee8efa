# SPDX-License-Identifier: Apache-2.0
"""The commands `dreammover evaluate`, `dreammover compare` and `dreammover correspondence`.

Measuring libraries, torch and diffusers take seconds to import, so that happens after the arguments parsed.
"""

from __future__ import annotations

import argparse
import ast
import json
import time
from importlib.util import find_spec
from pathlib import Path

from ..arguments import arguments_of
from ..settings import PrepareSettings, RenderSettings, VideoSettings
from .loading import add_model_options, check_model, load_chosen, pipeline_class

FULL = {"pairs": 32, "frames": 7}
DIFFICULTIES = ("same", "relit", "recast")
QUICK = {"pairs": 2, "frames": 1}  # about six minutes on two cores with the embedded checkpoint
# Settings of the method that a line of text can hold; which frames are made is decided by the suites.
SETTINGS = {
    name
    for name, declared in arguments_of(PrepareSettings, RenderSettings).items()
    if declared.values.in_files and name not in arguments_of(VideoSettings)
}


def add_evaluation(commands: argparse._SubParsersAction) -> None:
    """Register the three commands."""
    text = "Run methods on pairs, measure what can be measured, write a report. Killed, it goes on where it was."
    parser = commands.add_parser("evaluate", help="measure the method, its parts and rivals", description=text)
    parser.set_defaults(run=_evaluate)
    add = parser.add_argument
    add("-o", "--output", metavar="FOLDER", required=True, help="run.jsonl, report.md, sheets and frames go there")
    add("--quick", action="store_true", help=f"{QUICK['pairs']} pairs a suite, {QUICK['frames']} frames each")
    add("--suites", nargs="+", metavar="NAME", help="same, relit, recast, or folders of pairs; default: these three")
    add("--pairs", type=int, metavar="N", help=f"pairs of each suite, at most (default: {FULL['pairs']})")
    add("--frames", type=int, metavar="N", help=f"frames where no truth says which (default: {FULL['frames']})")
    add("--methods", nargs="+", metavar="NAME", help="default: all; an unknown one gets you the list")
    add("--set", action="append", default=[], metavar="NAME=VALUE", help="a parameter of the pipeline's; repeatable")
    add("--flow", default="dis", metavar="NAME", help="for warping errors without truth: dis or raft (default: dis)")
    add("--seed", type=int, default=0, metavar="N", help="of the world's scenes and the LoRAs (default: %(default)s)")
    add("--quiet", action="store_true", help="show no progress bar")
    add_model_options(parser, default="tiny")

    text = "The difference between two runs, or two methods of them, pair by pair, with intervals."
    parser = commands.add_parser("compare", help="compare two evaluations", description=text)
    parser.set_defaults(run=_compare)
    parser.add_argument("first", metavar="FOLDER", help="the output of evaluate")
    parser.add_argument("second", metavar="OTHER", help="what is subtracted; may be the same folder")
    parser.add_argument("--method", default="ours", metavar="NAME", help="of the first (default: %(default)s)")
    parser.add_argument("--other-method", metavar="NAME", help="of the other; default: the same")

    text = "Which features find which way: every up block, several noise steps, matched on either grid, smoothed."
    parser = commands.add_parser("correspondence", help="measure the flow of all features", description=text)
    parser.set_defaults(run=_correspondence)
    add = parser.add_argument
    add("-o", "--output", metavar="FOLDER", required=True, help="correspondence.jsonl and .md go there")
    add("--suites", nargs="+", metavar="NAME", default=DIFFICULTIES, help="of same, relit, recast; default: all")
    add("--pairs", type=int, default=16, metavar="N", help="of each suite (default: %(default)s)")
    add("--steps", type=int, nargs="+", default=(1, 6, 14, 22, 30), metavar="N", help="of 50; default: 1 6 14 22 30")
    add("--seed", type=int, default=0, metavar="N", help="of the world's scenes (default: %(default)s)")
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
    from ..inputs import check_choice, check_integer

    check_integer("--pairs", pairs, 1)
    check_integer("--frames", frames, 1)
    check_integer("--seed", args.seed, 0)
    pipeline_class()  # first, since it hushes third parties before they are imported
    from ..evaluation.methods import METHODS

    methods = list(dict.fromkeys(args.methods or METHODS))
    for method in methods:
        check_choice("--methods", method, tuple(METHODS))
    from ..evaluation.networks import FLOWS, find_tools

    check_choice("--flow", args.flow, tuple(FLOWS))
    from ..evaluation.report import write_report
    from ..evaluation.run import RunFile, header, run
    from ..evaluation.suites import find_suites

    names = args.suites or DIFFICULTIES
    find_suites(names, pairs, frames, 64)  # for its complaints, before a model is loaded that decides the real size
    tools = find_tools(args.flow)
    pipe = load_chosen(args)
    pipe.set_progress_bar_config(disable=True)
    pipe.check_inputs(**settings)
    suites = find_suites(names, pairs, frames, native_size(pipe), args.seed)
    file = RunFile.start(args.output, header(pipe, args.model, suites, args.seed, settings, args.flow, tools))
    run(pipe, suites, methods, file, tools, args.quiet)
    report = write_report(file, tools)
    print(f"{report}: {len(file.rows)} rows in {time.perf_counter() - start:.0f} s")


def _correspondence(args: argparse.Namespace) -> None:
    start = time.perf_counter()
    _require_libraries()
    check_model(args.model, args.allow_pickle)
    from ..inputs import check_choice, check_integer

    check_integer("--pairs", args.pairs, 1)
    check_integer("--seed", args.seed, 0)
    for name in args.suites:
        check_choice("--suites", name, DIFFICULTIES)
    pipeline_class()  # first, since it hushes third parties before they are imported
    from ..evaluation.correspondence import study, table
    from ..evaluation.suites import find_suites

    pipe = load_chosen(args)
    pipe.set_progress_bar_config(disable=True)
    pipe.check_inputs(inversion_steps=max(args.steps), feature_step=min(args.steps))
    suites = find_suites(args.suites, args.pairs, 1, native_size(pipe), args.seed)
    rows = study(pipe, suites, args.steps, args.quiet)
    folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "correspondence.jsonl").write_text(lines, encoding="utf-8")
    report = folder / "correspondence.md"
    report.write_text("\n".join(f"## {suite.name}\n\n{table(rows, suite.name)}" for suite in suites), encoding="utf-8")
    print(f"{report}: {len(rows)} rows in {time.perf_counter() - start:.0f} s")


def native_size(pipe) -> int:
    """Pixels a side that a checkpoint was made for, within what the world can draw."""
    sample = pipe.unet.config.sample_size
    side = sample if isinstance(sample, int) else min(sample)
    return min(512, max(64, side * pipe.vae_scale_factor))


def _compare(args: argparse.Namespace) -> None:
    _require_libraries()
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
    """NAME=VALUE of a parameter that `prepare` or `render` has; the value as Python writes it, or else a string."""
    name, equals, value = text.partition("=")
    if not equals or name not in SETTINGS:
        raise ValueError(f"--set takes NAME=VALUE with a name of {', '.join(sorted(SETTINGS))}; not '{text}'")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value
