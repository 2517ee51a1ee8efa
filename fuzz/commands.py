# SPDX-License-Identifier: Apache-2.0
"""The command line, with options that are drawn from what its own parsers say of them."""

from __future__ import annotations

import argparse
import io
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from glob import escape
from pathlib import Path
from random import Random

import imageio_ffmpeg
from PIL import Image

from dreammover_pipeline.cli.batch import add_batch
from dreammover_pipeline.cli.interpolate import add_interpolate
from dreammover_pipeline.cli.main import main
from dreammover_pipeline.cli.render import add_render
from dreammover_pipeline.settings import arguments

from .bench import Bench, Case, Ended
from .values import drawn, made

ERROR = "dreammover: error:"
STATUS = {0: "done", 1: "failed", 2: "refused"}
COMMANDS = ("interpolate", "interpolate", "interpolate", "render", "batch", "again")
PROCESS_SHARE = 1 / 25  # of the cases that run as a process of their own, which takes seconds to start
STEPS = ["--steps", "3", "--inversion-steps", "2", "--feature-step", "1", "--lora-steps", "0"]
TEXTS = """-1 0 1 2 0.5 nan inf 1e400 ９ 1_0 0x10 猫 -- - 64x64 1x1 1000000x1000000 64x 2,2 2, , [ [[[8,8],[20,20]]]
a.png theirs theirs.gif theirs/letter.txt nowhere/out.gif theirs.gif/out.gif . out.mp4 out.gif out out.png cpu meta
float16 tiny fast out.safetensors""".split()  # noqa: SIM905, as a list it would be as many lines
TEXTS += ["", " ", "9" * 400, "x" * 300, "\udcff", "a\0b", "a\nb.gif"]
# Options that name what a command writes: it may replace that, since the user said so.
OUTPUTS = ("output", "compare", "sheet", "flow_picture", "matches", "save_pair", "lora_cache")


def command(argv: list[str], as_process: bool = False) -> Ended:
    """Run the command line, and see that it ends as it should: with a known code, and with one line if it failed."""
    if as_process:
        ran = subprocess.run([sys.executable, "-m", "dreammover_pipeline", *argv], capture_output=True, check=False)
        code, out, said = ran.returncode, *(part.decode(errors="replace") for part in (ran.stdout, ran.stderr))
    else:
        streams = io.StringIO(), io.StringIO()
        with redirect_stdout(streams[0]), redirect_stderr(streams[1]):
            try:
                code = main(argv)
            except SystemExit as stop:  # argparse's --help and --version
                code = stop.code or 0
        out, said = (stream.getvalue() for stream in streams)
    lines = [line for line in said.splitlines() if line.startswith(ERROR)]
    faults = [] if code in STATUS else [f"the exit code was {code}"]
    if len(lines) != (code != 0) or (code and not said.splitlines()[-1].startswith(ERROR)):
        faults.append(f"{len(lines)} lines of error came with the exit code {code}")
    if "Traceback (most recent call last)" in said:
        faults.append("a traceback was printed")
    return Ended(STATUS.get(code, "broken"), lines[0] if lines else said[-200:], out, faults)


def options_of(name: str) -> list[argparse.Action]:
    """The options of a command, as its parser declares them."""
    commands = argparse.ArgumentParser().add_subparsers()
    for add in (add_interpolate, add_render, add_batch):
        add(commands)
    return [one for one in commands.choices[name]._actions if one.option_strings and one.dest != "help"]


def words_of(option: argparse.Action, rng: Random) -> list[str]:
    """An option with a value, as they are typed."""
    typed = option.option_strings[-1]
    if option.nargs == 0:
        return [typed]
    declared = arguments().get(option.dest)
    value = rng.choice(TEXTS)
    if declared is not None and rng.random() < 0.7:
        value = made(drawn(declared, rng, textual=True))
    elif option.choices and rng.random() < 0.6:
        value = rng.choice(list(option.choices))
    values = value if isinstance(value, (list, tuple)) and option.nargs in ("+", "*") else [value]
    return [typed, *map(_typed, values)]


def _typed(value: object) -> str:
    return f"1{'0' * 400}" if value == 10**400 else str(value)


def case(bench: Bench, rng: Random) -> Case:
    """A command with one to three odd options."""
    name = rng.choice(COMMANDS)
    photos = ["a.png", "b.png", "a.png"] if rng.random() < 0.2 else ["a.png", "b.png"]
    if name == "render":
        Path("pair.safetensors").write_bytes(bench.pair_file)
    if name in ("batch", "again"):
        bench.put_batch()
    read = {"render": ["pair.safetensors"], "batch": ["pairs.jsonl"], "again": ["made/out.gif.json"]}.get(name, photos)
    if rng.random() < 0.1:
        read = [rng.choice(TEXTS), *read[1:]]
    output = "out" if name in ("batch", "again") else rng.choice(["out.gif", "out.mp4", "out"])
    few = {"render": ["--frames", "2"], "interpolate": [*STEPS, "--frames", "2"]}.get(name, [])
    chosen = {option: words_of(option, rng) for option in rng.sample(options_of(name), rng.randint(1, 3))}
    words = [word for typed in chosen.values() for word in typed]
    model = [] if name == "again" else ["--model", str(bench.model)]
    argv = [name, *read, *few, "-o", output, "--quiet", *model, *words]
    as_process = rng.random() < PROCESS_SHARE and not any("\0" in word for word in argv)
    outputs = {option.dest: typed[-1] for option, typed in chosen.items() if option.dest in OUTPUTS}
    output = outputs.get("output", output)
    places = [place for path in outputs.values() for place in (escape(path), f"{escape(path)}/*")]
    names = {word for option in chosen for word in (*option.option_strings, option.dest)} | {"the steps must nest"}
    names |= {quoted for word in (read[0], *words) for quoted in (f"'{word}'", f"({word})")}  # a value is named, too
    names |= {word for word in words if len(word) > 2}
    names |= {"required"} if "--" in (read[0], *words) else set()  # it makes photos of the options that follow it
    return Case(
        kind=name,
        text=" ".join(map(ascii, [name, read[0], *words]))[:300] + " (as a process)" * as_process,
        run=lambda: command(argv, as_process),
        check=lambda said: video_faults(output, said),
        names=sorted(names),
        writes=["out*", *places],
        leaves=["out", "out/*", *places] if name in ("batch", "again") else ["*.parts", "*.parts/*"],
    )


def video_faults(name: str, said: str) -> list[str]:
    """The faults of a video that a command says it made, which must be whole."""
    path = Path(name)
    if f"{name}: " not in said:
        return []
    number = int(said.rpartition(f"{name}: ")[2].split()[0])
    try:
        if path.is_dir():
            counted = len([Image.open(frame).load() for frame in path.glob("frame_*.png")])
        elif path.suffix == ".gif":
            counted = number if Image.open(path).n_frames <= number else -1  # equal neighbours are one frame
        else:
            counted = imageio_ffmpeg.count_frames_and_secs(str(path))[0]
    except Exception as error:
        return [f"the video cannot be read: {error}"]
    return [] if counted == number else [f"{number} frames were made, and the video holds {counted}"]
