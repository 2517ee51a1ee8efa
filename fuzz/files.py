# SPDX-License-Identifier: Apache-2.0
"""Damaged and foreign files: photos of every format that Pillow writes, prepared pairs, kept gaps, masks, points."""

from __future__ import annotations

import io
import json
from functools import cache, partial
from pathlib import Path
from random import Random

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load

from dreammover_pipeline.storage import HEADER, write_tensors

from .bench import SHORT, Bench, Case, frame_faults
from .commands import STEPS, command, video_faults
from .values import made, odd, smooth


def damaged(data: bytes, rng: Random) -> tuple[str, bytes]:
    """What was done to bytes, and the bytes then."""
    at, length = rng.randrange(len(data)), rng.choice([1, 4, 50, 1000])
    noise = rng.randbytes(length)
    start = rng.randrange(min(len(data), 64))
    fates = {
        "cut": lambda: data[:at],
        "nearly whole": lambda: data[: -rng.randint(1, 9)],
        "empty": lambda: b"",
        "noise": lambda: data[:at] + noise + data[at + length :],
        "noise in its header": lambda: data[:start] + noise[:4] + data[start + 4 :],
        "huge number in its header": lambda: data[:start] + b"\x7f\xff\xff\xff" + data[start + 4 :],
        "zeros": lambda: data[:at] + bytes(length) + data[at + length :],
        "a part twice": lambda: data[:at] + data[at : at + length] + data[at:],
        "a part missing": lambda: data[:at] + data[at + length :],
        "more at its end": lambda: data + noise,
        "a bit": lambda: data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :],
        "other content": lambda: b"not yours",
    }
    fate = rng.choice(list(fates))
    return f"{fate} at {start if 'header' in fate else at} of {len(data)}", fates[fate]()


@cache
def photo_files() -> dict[str, bytes]:
    """A picture in every format that Pillow writes and reads."""
    Image.init()
    found, picture, exif = {}, Image.fromarray(smooth(64, 64)), Image.Exif()
    exif[0x0112] = 6  # the picture lies on its side
    for name in sorted(Image.SAVE):
        for mode in ("RGB", "RGBA", "P", "L", "1", "I;16", "CMYK"):
            try:
                file = io.BytesIO()
                picture.convert("L" if mode == "I;16" else mode).convert(mode).save(file, name, exif=exif.tobytes())
                Image.open(file).load()
            except Exception:  # the format does not hold such a picture
                continue
            found[f"{name} {mode}"] = file.getvalue()
    return found


def case(bench: Bench, rng: Random) -> Case:
    """A file that is not what it was."""
    return rng.choice([_photo, _photo, _photo, _pair, _pair, _foreign_pair, _gap, _mask, _points])(bench, rng)


def _photo(bench: Bench, rng: Random) -> Case:
    form = rng.choice(list(photo_files()))
    done, data = damaged(photo_files()[form], rng)
    ending = rng.choice([form.split()[0].lower(), "png", "jpg"])
    path = Path(f"photo.{ending}")
    path.write_bytes(data)
    give = rng.choice([str, Path, lambda path: [path], Image.open])

    def run():
        return bench.pipe(give(path), give(Path("b.png")), output_type="np", **SHORT).frames[0]

    late = give is Image.open  # Pillow's own error then
    names = () if late else ("img0",)
    return Case("photo", f"{form}: {done}", run, lambda frames: frame_faults(frames, 2, None), names)


def _pair(bench: Bench, rng: Random) -> Case:
    done, data = damaged(bench.pair_file, rng)
    Path("pair.safetensors").write_bytes(data)

    def run():
        return _rendered(bench, bench.pipe.load_pair("pair.safetensors"))

    def check(frames: np.ndarray) -> list[str]:
        same = np.array_equal(frames, _rendered(bench, bench.pair))
        return [] if same else ["a damaged pair was taken and made other frames"]

    return Case("prepared pair", done, run, check, ("pair.safetensors",))


def _rendered(bench: Bench, pair) -> np.ndarray:
    return bench.pipe.render(pair, n_frames=2, output_type="np").frames[0]


def _foreign_pair(bench: Bench, rng: Random) -> Case:
    """A pair whose digest is right, as of a program that writes such files in its own way."""
    tensors = load(bench.pair_file)
    length = int.from_bytes(bench.pair_file[:8], "little")
    header = json.loads(json.loads(bench.pair_file[8 : 8 + length])["__metadata__"][HEADER])
    if rng.random() < 0.5:
        name, change = rng.choice(sorted(tensors)), rng.choice(list(CHANGES))
        done, value = f"{name} {change}", CHANGES[change](tensors.pop(name))
        tensors |= {} if value is None else {name: value}
    else:
        name, value = rng.choice(sorted(header)), odd(rng, textual=True)
        inner = sorted(header[name]) if isinstance(header[name], dict) and rng.random() < 0.8 else []
        holder, key = (header[name], rng.choice(inner)) if inner else (header, name)
        holder[key] = made(value)
        done = f"{value} as {name}, {key}"
    write_tensors(Path("pair.safetensors"), tensors, {HEADER: json.dumps(header)})

    def run():
        return _rendered(bench, bench.pipe.load_pair("pair.safetensors"))

    return Case("foreign pair", done, run, lambda frames: frame_faults(frames, 2, None))


CHANGES = {
    "half": lambda tensor: tensor[: len(tensor) // 2],
    "flat": torch.flatten,
    "of NaNs": lambda tensor: torch.full_like(tensor, torch.nan),
    "of integers": torch.Tensor.long,
    "empty": lambda tensor: tensor[:0],
    "gone": lambda tensor: None,
    "twice as wide": lambda tensor: torch.cat([tensor, tensor], -1),
}


def _gap(bench: Bench, rng: Random) -> Case:
    kept, frames = bench.kept_gaps
    name = rng.choice(sorted(kept))
    done, data = damaged(kept[name], rng)
    Path("keep").mkdir()
    for other, content in kept.items():
        (Path("keep") / other).write_bytes(data if other == name else content)

    def check(again: np.ndarray) -> list[str]:
        return [] if np.array_equal(again, frames) else ["the frames are not those without the damage"]

    run = partial(bench.sequence, "keep")
    return Case("kept gap", f"{name.split('_')[0]}: {done}", run, check, ("keep",), leaves=("keep/*",))


def _mask(bench: Bench, rng: Random) -> Case:
    form = rng.choice(list(photo_files()))
    done, data = damaged(photo_files()[form], rng)
    Path("mask.png").write_bytes(data)
    return _steered(bench, "mask", f"{form}: {done}", ["--mask", "mask.png"])


def _points(bench: Bench, rng: Random) -> Case:
    whole = json.dumps([[[8, 8], [20, 20]], [[40.5, 12], [41, 13]]]).encode()
    value = odd(rng, textual=True)
    done, data = damaged(whole, rng) if rng.random() < 0.5 else (value, json.dumps(made(value)).encode())
    Path("points.json").write_bytes(data)
    return _steered(bench, "points", f"{done}: {data[:60]!r}", ["--points", "points.json"])


def _steered(bench: Bench, kind: str, text: str, words: list[str]) -> Case:
    argv = ["interpolate", "a.png", "b.png", *STEPS, "--frames", "2", "-o", "out.gif", "--quiet"]
    argv += ["--model", str(bench.model), *words]
    check = partial(video_faults, "out.gif")
    return Case(kind, text, lambda: command(argv), check, (kind, f"--{kind}"), writes=["out.gif"])
