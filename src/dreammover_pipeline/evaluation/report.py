# SPDX-License-Identifier: Apache-2.0
"""Reports: a run as Markdown and contact sheets, and the difference between two runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from ..media.files import check_replaceable, write_picture
from ..media.pictures import CAPTION, FONT, MARGIN, picture_of
from ..media.texts import write_text
from .networks import Tools
from .run import SHEETS, RunFile, read_strip
from .scoring import BETTER
from .statistics import FEWEST_PAIRS, Estimate, estimate, paired_difference, values_by_pair

TITLES = {
    "psnr": "PSNR",
    "psnr_mid": "PSNR mid",
    "psnr_fg": "PSNR fg",
    "psnr_fg_mid": "PSNR fg mid",
    "ssim": "SSIM",
    "ssim_mid": "SSIM mid",
    "lpips": "LPIPS",
    "lpips_mid": "LPIPS mid",
    "epe": "EPE px",
    "pck05": "PCK@.05",
    "pck10": "PCK@.1",
    "we_true": "WE true",
    "we_true_mid": "WE true mid",
    "fid": "FID",
    "lpips_inputs": "LPIPS to inputs",
    "we": "WE",
    "we_mid": "WE mid",
    "high_frequency": "HF ratio",
}
REPORT = "report.md"
HEAD = "# Evaluation\n\nModel "  # how every report begins
ARROWS = {"higher": "↑", "lower": "↓", "nearer 1": "→1"}
LABEL = 110  # width in pixels of the column of method names on a sheet


def check_report_place(folder: Path) -> None:
    """Raise ValueError if the place of a run's report holds anything but a report."""
    check_replaceable(folder / REPORT, lambda content: content.startswith(HEAD.encode()), "the report")


def write_report(file: RunFile, tools: Tools, left_out: Mapping[str, str] | None = None) -> Path:
    """Write `report.md` and `sheets/` into the folder of a run.

    Args:
        file: the run, finished or not.
        tools: the measuring tools; FID, where it is available, is measured for whole suites.
        left_out: methods that were left out, each with the reason; None if there are none.

    Returns:
        The path of the report.
    """
    folder = file.path.parent
    report = folder / REPORT
    write_text(report, markdown(file, suite_fid(file, tools), left_out))
    for suite, pair in sorted({(row["suite"], row["pair"]) for row in file.rows}):
        path = folder / SHEETS / suite / f"{pair}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_picture(pair_sheet(file, suite, pair), path)
    return report


def markdown(
    file: RunFile, fid: dict[tuple[str, str], float] | None = None, left_out: Mapping[str, str] | None = None
) -> str:
    """The text of a report: for each suite a table of all methods, and one of the first method minus each other.

    Args:
        file: the run, finished or not.
        fid: FID by suite and method, where it could be measured.
        left_out: methods that were left out, each with the reason; None if there are none.
    """
    header = file.header
    sources = sorted({row["source"] for row in file.rows})
    lines = [
        f"{HEAD}{header['model']} (weights {header['weights']}), {header['dtype']} on {header['device']}, "
        f"seed {header['seed']}, settings {header['settings'] or 'the defaults'}, source {', '.join(sources)}.",
        "",
        "Means over pairs with 95 % bootstrap intervals; where fewer pairs than the row's have a value, their number "
        "follows in parentheses. Warping errors without truth by "
        f"{header['warping_flow'].upper()} flow.",
        "",
    ]
    if len(sources) > 1:
        lines += ["**The code changed while this run was made: its rows are not all of one version.**", ""]
    lines += [f"- {name} is not available: {reason}" for name, reason in header["unavailable"].items()]
    lines += [f"- the method {name} is left out: {reason}" for name, reason in (left_out or {}).items()]
    for suite in header["suites"]:
        rows = _of_suite(file, suite)
        if rows:
            lines += _suite_lines(suite, rows, fid or {})
    return "\n".join(lines) + "\n"


def compare(first: RunFile, second: RunFile, method: str, other_method: str) -> str:
    """A Markdown table, one row for each suite, of a method of one run minus a method of another run, pair by pair.

    Args:
        first: the run with `method`.
        second: the run with `other_method`; it may be the same run.
        method: the method whose values count positive.
        other_method: the method whose values are subtracted.

    Raises:
        ValueError: a run has no rows of its method, or the runs share no pair, or a suite of one name has pairs of
            another size or number of frames.
    """
    for file, name in ((first, method), (second, other_method)):
        methods = dict.fromkeys(row["method"] for row in file.rows)
        if name not in methods:
            raise ValueError(f"'{file.path}' has no row of the method '{name}'; it has {', '.join(methods) or 'none'}")
    table = {}
    for suite in first.header["suites"]:
        if suite not in second.header["suites"]:
            continue
        _require_same_scenes(suite, first, second)
        values = [
            {metric: values_by_pair(_of_suite(file, suite), name, metric) for metric in BETTER}
            for file, name in ((first, method), (second, other_method))
        ]
        differences = {metric: paired_difference(values[0][metric], values[1][metric]) for metric in BETTER}
        table[suite] = {metric: difference for metric, difference in differences.items() if difference}
    columns = [metric for metric in BETTER if any(metric in differences for differences in table.values())]
    if not columns:
        raise ValueError(f"'{first.path}' and '{second.path}' share no pair with '{method}' and '{other_method}'")
    lines = _head(["suite", "pairs"], columns)
    for suite, differences in table.items():
        if differences:
            count = max(difference.count for difference in differences.values())
            lines.append(_line([suite, str(count)], [_marked(differences.get(metric), count) for metric in columns]))
    return "\n".join(lines) + "\n"


def suite_fid(file: RunFile, tools: Tools) -> dict[tuple[str, str], float] | None:
    """FID between a method's frames and the inputs of a whole suite, by suite and method; None if there is no FID."""
    if tools.fid is None:
        return None
    groups: dict[tuple[str, str], list[dict]] = {}
    for row in file.rows:
        groups.setdefault((row["suite"], row["method"]), []).append(row)
    return {
        group: tools.fid(
            [frame for row in rows for frame in _strip(file, row, row["method"], len(row["times"]))],
            [image for row in rows for image in _strip(file, row, "inputs", 2)],
        )
        for group, rows in groups.items()
        if sum(len(row["times"]) for row in rows) > 1  # the covariance of a single image is not defined
    }


def pair_sheet(file: RunFile, suite: str, pair: str) -> Image.Image:
    """A picture of one pair: the truth, where it is known, and the frames of each method as rows, times as columns."""
    rows = [row for row in file.rows if (row["suite"], row["pair"]) == (suite, pair)]
    times = rows[0]["times"]
    first, last = _strip(file, rows[0], "inputs", 2)
    strips = {row["method"]: _strip(file, row, row["method"], len(times)) for row in rows}
    if file.strip(suite, pair, "truth").is_file():
        strips = {"truth": _strip(file, rows[0], "truth", len(times)), **strips}
    height, width = first.shape[-2:]
    cell = width + MARGIN, height + MARGIN

    sheet = Image.new("RGB", (LABEL + (len(times) + 2) * cell[0], CAPTION + len(strips) * cell[1]), "white")
    draw = ImageDraw.Draw(sheet)
    for column, time in enumerate((0, *times, 1)):
        draw.text((LABEL + column * cell[0], 2), f"{time:.3g}", font=FONT, fill="black")
    for index, (name, frames) in enumerate(strips.items()):
        y = CAPTION + index * cell[1]
        draw.text((MARGIN, y + height // 2), name, font=FONT, fill="black")
        for column, frame in enumerate((first, *frames, last)):
            sheet.paste(picture_of(frame), (LABEL + column * cell[0], y))
    return sheet


def _of_suite(file: RunFile, suite: str) -> list[dict]:
    return [row for row in file.rows if row["suite"] == suite]


def _require_same_scenes(suite: str, first: RunFile, second: RunFile) -> None:
    """Raise unless a suite has the same frames and size in both runs; how many pairs it has may differ."""
    one, other = (
        {name: value for name, value in file.header["suites"][suite].items() if name != "pairs"}
        for file in (first, second)
    )
    if one != other:
        raise ValueError(f"the suite '{suite}' has {one} in '{first.path}' but {other} in '{second.path}'")


def _suite_lines(suite: str, rows: Sequence[dict], fid: dict[tuple[str, str], float]) -> list[str]:
    """The part of a report that is about one suite."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    values = {(m, metric): list(values_by_pair(rows, m, metric).values()) for m in methods for metric in BETTER}
    columns = [metric for metric in BETTER if any(values[m, metric] or (metric == "fid" and fid) for m in methods)]
    lines = ["", f"## {suite}", "", *_head(["method", "pairs"], columns)]
    for method in methods:
        count = sum(row["method"] == method for row in rows)
        cells = [
            _fid_cell(fid.get((suite, method))) if metric == "fid" else _mean_cell(values[method, metric], count)
            for metric in columns
        ]
        lines.append(_line([method, str(count)], cells))
    base, *others = methods
    columns = [metric for metric in columns if metric != "fid"]
    if others:
        lines += [
            "",
            f"{base} minus the others, pair by pair; bold where the interval excludes zero and there are "
            f"at least {FEWEST_PAIRS} pairs:",
            "",
        ]
        lines += _head(["", ""], columns)
    for method in others:
        differences = [
            paired_difference(values_by_pair(rows, base, metric), values_by_pair(rows, method, metric))
            for metric in columns
        ]
        count = max((difference.count for difference in differences if difference), default=0)
        lines.append(_line([f"− {method}", str(count)], [_marked(difference, count) for difference in differences]))
    return lines


def _head(labels: list[str], metrics: Sequence[str]) -> list[str]:
    titles = [f"{TITLES[metric]} {ARROWS[BETTER[metric]]}" for metric in metrics]
    return [_line(labels, titles), _line(["---"] * len(labels), ["---"] * len(titles))]


def _line(labels: list[str], cells: list[str]) -> str:
    return "| " + " | ".join([*labels, *cells]) + " |"


def _mean_cell(values: Sequence[float], count: int) -> str:
    return f"{estimate(values)}{_of_fewer(len(values), count)}" if values else "–"


def _of_fewer(number: int, count: int) -> str:
    """The number of pairs that a figure is of, where that is smaller than the number that its row is of."""
    return f" ({number})" if number < count else ""


def _fid_cell(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def _marked(difference: Estimate | None, count: int) -> str:
    if difference is None:
        return "–"
    text = f"**{difference}**" if difference.excludes_zero else str(difference)
    return f"{text}{_of_fewer(difference.count, count)}"


def _strip(file: RunFile, row: dict, name: str, count: int) -> torch.Tensor:
    return read_strip(file.strip(row["suite"], row["pair"], name), count)
