# SPDX-License-Identifier: Apache-2.0
"""Batches: manifests with odd rows, and finished batches of which a file is not what it was."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from random import Random

from dreammover_pipeline.batch.manifest import PARAMETERS
from dreammover_pipeline.media.texts import LONGEST_NUMBER

from .bench import SHORT, Bench, Case
from .commands import TEXTS, command
from .files import damaged
from .values import drawn, made, odd

PLACES = ("img0", "img1", "folder", "output", "seed", "fps", "unknown")


def case(bench: Bench, rng: Random) -> Case:
    """A manifest, or a finished batch."""
    return rng.choice([_rows, _rows, _text, _finished])(bench, rng)


def _rows(bench: Bench, rng: Random) -> Case:
    rows = [{"img0": "a.png", "img1": "b.png", "output": f"{k}.gif", **SHORT} for k in range(rng.randint(1, 2))]
    changed = rng.sample([*PARAMETERS, *PLACES], rng.randint(1, 2))
    texts = {key: drawn(PARAMETERS[key], rng, True) if key in PARAMETERS else _place(rng) for key in changed}
    rows[-1] |= {key: made(value) for key, value in texts.items()}
    ending = rng.choice([".jsonl", ".csv"])
    data = (_jsonl if ending == ".jsonl" else _csv)(rows, rng)
    text = f"{ending} {', '.join(f'{key}={value}' for key, value in texts.items())}"[:300]
    told = [str(rows[-1][key]) for key in changed]
    names = (*changed, *(text[:length] for text in told if len(text) > 2 for length in (LONGEST_NUMBER, 80)))
    # Where a line cannot be read, the error names what in it is no JSON.
    names = (*names, "the steps must nest", "NUL", "NaN", "Infinity")
    return _batch(bench, "rows", text, f"pairs{ending}", data, names)


def _place(rng: Random) -> str:
    return repr(rng.choice(TEXTS)) if rng.random() < 0.6 else odd(rng, textual=True)


def _jsonl(rows: list[dict], rng: Random) -> bytes:
    plain = rng.random() < 0.5
    lines = [json.dumps(row, ensure_ascii=plain) for row in rows]
    return rng.choice(["\n", "\r\n", "\n\n"]).join(lines).encode("utf-8", "surrogatepass")


def _csv(rows: list[dict], rng: Random) -> bytes:
    keys = list(dict.fromkeys(key for row in rows for key in row))
    file = io.StringIO()
    writer = csv.writer(file, lineterminator=rng.choice(["\n", "\r\n"]))
    writer.writerow(keys)
    for row in rows:
        cells = [row.get(key, "") for key in keys]
        writer.writerow([cell if isinstance(cell, str) else json.dumps(cell) for cell in cells])
    return file.getvalue().encode("utf-8", "surrogatepass")


def _text(bench: Bench, rng: Random) -> Case:
    row = {"img0": "a.png", "img1": "b.png", "output": "0.gif", **SHORT}
    ending = rng.choice([".jsonl", ".csv"])
    done, data = damaged((_jsonl if ending == ".jsonl" else _csv)([row], rng), rng)
    return _batch(bench, "damaged text", f"{ending} {done}", f"pairs{ending}", data, ())


def _batch(bench: Bench, kind: str, text: str, name: str, data: bytes, names: tuple[str, ...]) -> Case:
    Path(name).write_bytes(data)
    argv = ["batch", name, "-o", "out", "--model", str(bench.model), "--quiet"]
    return Case(kind, text, lambda: command(argv), _whole, names, writes=("out/*",), leaves=("out", "out/*"))


def _whole(said: str) -> list[str]:
    """The faults of a batch that says it is done: each video has its sidecar, and no record of a failure is there."""
    videos = [path.with_suffix("") for path in Path("out").rglob("*.json") if ".dreammover" not in path.parts]
    return [f"{str(video)!r} is no video" for video in videos if not video.exists() or video.suffix == ".error"]


def _finished(bench: Bench, rng: Random) -> Case:
    bench.put_batch()
    files = sorted(path for path in Path("made").rglob("*") if path.is_file() and path.stat().st_size)
    path, whole = rng.choice([*files, Path("made/out.gif.json")]), Path("made/out.gif").read_bytes()
    if path.suffix == ".json" and rng.random() < 0.6:
        done, data = _edited(json.loads(path.read_text()), rng)
    else:
        done, data = damaged(path.read_bytes(), rng)
    path.write_bytes(data)
    if rng.random() < 0.5:
        argv = ["batch", "pairs.jsonl", "-o", "made", "--model", str(bench.model), "--quiet"]

        def check(said: str) -> list[str]:
            same = Path("made/out.gif").read_bytes() == whole
            return [] if same else ["the video is not the one without the damage"]
    else:
        argv, check = ["again", "made/out.gif.json", "-o", "out", "--quiet"], lambda said: []
    text = f"{argv[0]} with {path}: {done}"
    leaves = ("made/*", "made", "out", "out/*")
    return Case("finished batch", text, lambda: command(argv), check, leaves=leaves)


def _edited(record: dict, rng: Random) -> tuple[str, bytes]:
    """JSON with an odd value in some place of it, or without that place."""
    holder, place = record, []
    while True:
        key = rng.choice(sorted(holder) if isinstance(holder, dict) else range(len(holder)))
        place.append(str(key))
        if not (isinstance(holder[key], (dict, list)) and holder[key] and rng.random() < 0.7):
            break
        holder = holder[key]
    if rng.random() < 0.3:
        del holder[key]
        return f"no {'.'.join(place)}", json.dumps(record).encode()
    value = odd(rng, textual=True)
    holder[key] = made(value)
    return f"{'.'.join(place)} = {value}", json.dumps(record).encode()
