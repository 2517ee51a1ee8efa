# SPDX-License-Identifier: Apache-2.0
"""The fuzzer keeps quiet where promises hold, and finds the faults that are planted here."""

from collections import Counter
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch

from dreammover_pipeline.settings import arguments
from fuzz import run
from fuzz.bench import Bench, Case
from fuzz.commands import options_of
from fuzz.values import drawn, made


@pytest.fixture(scope="module")
def bench(tmp_path_factory, restored_logging):
    bench = Bench(tmp_path_factory.mktemp("fuzz"), seconds=20)
    yield bench
    bench.close()


@pytest.mark.parametrize("surface", run.SURFACES)
def test_seeded_cases_hold(bench, surface):
    for number in range(3):
        verdict = run.judged(bench, 3, surface, number, thorough=surface == "calls" and number == 2)
        assert not verdict.broken, (verdict.case.text, verdict.message)


def late_refusal(bench):
    bench.pipe.vae.encoder(torch.zeros(1, 3, 16, 16))
    raise ValueError("`mask` is dark")


def nameless_refusal(bench):
    raise TypeError("an int has no len()")


def strange_error(bench):
    raise KeyError("mask")


def half_written(bench):
    Path("out.gif").write_bytes(b"GIF89a")
    raise RuntimeError("ffmpeg gave up")


def unfinished(bench):
    Path(".dreammover-12ab.gif").touch()


def overwritten(bench):
    Path("theirs/letter.txt").write_text("mine")


def temporary(bench):
    (bench.temporary / "left").touch()


def hooked(bench):
    bench.undo = bench.pipe.unet.mid_block.register_forward_hook(lambda *arguments: None).remove


def without_autograd(bench):
    bench.undo = lambda: torch.set_grad_enabled(True)
    torch.set_grad_enabled(False)


def other_weights(bench):
    weight = bench.pipe.vae.quant_conv.bias.data
    before = weight.clone()
    bench.undo = lambda: weight.copy_(before)
    weight += 1


FAULTS = {
    late_refusal: "refused after models had run",
    nameless_refusal: "names none of mask",
    strange_error: "raised KeyError",
    half_written: "'out.gif' was left",
    unfinished: "unfinished '.dreammover-12ab.gif'",
    overwritten: "'theirs/letter.txt' was changed",
    temporary: "the temporary 'left'",
    hooked: "the hooks of the pipeline",
    without_autograd: "the autograd of the pipeline",
    other_weights: "weights changed",
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_planted_fault_is_found(bench, fault):
    bench.undo = lambda: None
    case = Case("planted", fault.__name__, lambda: fault(bench), names=("mask",), writes=("out*", ".dreammover-*"))
    verdict = bench.judge(lambda: case, thorough=fault is other_weights)
    bench.undo()
    assert any(FAULTS[fault] in broken for broken in verdict.broken), verdict.broken
    assert bench.weights() == bench.good_weights


def test_a_case_that_does_not_end_is_stopped(bench):
    seconds, bench.seconds = bench.seconds, 0.1

    def endless():
        while True:
            pass

    verdict = bench.judge(lambda: Case("planted", "endless", endless))
    bench.seconds = seconds
    assert verdict.broken == ["it took longer than 0.1 s"]


def test_frames_are_looked_at(bench):
    frames = np.full((2, 64, 64, 3), np.nan)
    assert run.calls.frame_faults(frames, 3, (32, 64)) == [
        "2 frames came instead of 3",
        "frames are not finite",
        "frames are (64, 64) instead of (32, 64)",
    ]


def test_every_argument_is_drawn_and_so_is_every_option():
    for declared in arguments().values():
        values = Counter(drawn(declared, Random(seed)) for seed in range(40))
        assert len(values) > 5, declared.name
        assert all(made(value) is not NotImplemented for value in values)
    assert {option.dest for option in options_of("interpolate")} > {"fps", "layout_hold", "save_pair", "size"}


def test_a_failing_case_says_how_to_repeat_it(bench, monkeypatch, capsys):
    monkeypatch.setitem(run.SURFACES, "calls", lambda bench, rng: Case("planted", "1 / 0", lambda: 1 / 0))
    (record,) = run.tried(bench, 5, run.numbers(run.parser().parse_args(["--only", "calls:7"])))
    assert "python -m fuzz.run --seed 5 --only calls:7\n    1 / 0\n" in capsys.readouterr().out
    table = [line.split() for line in run.table([record], 2).splitlines()]
    assert table[0] == ["surface", "done", "refused", "failed", "broken", "faults"]
    assert table[1:3] == [["calls", "0", "0", "0", "1", "1"], ["all", "0", "0", "0", "1", "1"]]
