# SPDX-License-Identifier: Apache-2.0
"""A listener hears of every stage and step, and what it raises ends the work and leaves the models as they were."""

import pytest
import torch
from support.snapshot import snapshot

FIT = {"lora_steps": 2, "lora_rank": 2}
STAGES = ["Fitting LoRA", "Inverting", "Denoising", "Decoding"]


class CancelledError(Exception):
    """Raised by a listener."""


class Listener:
    """Keeps what it hears, and raises after the first step of a certain stage."""

    def __init__(self, end_in=None):
        self.heard, self.end_in = [], end_in

    def __call__(self, stage, done, total):
        self.heard.append((stage, done, total))
        if (stage, done) == (self.end_in, 1):
            raise CancelledError(stage)


def whole(stage, total):
    """What is heard of a stage that nothing ends."""
    return [(stage, done, total) for done in range(total + 1)]


FITTING, INVERTING, DENOISING = whole("Fitting LoRA", 2), whole("Inverting", 4), whole("Denoising", 3)


def preparing(fast):
    return {name: value for name, value in fast.items() if name not in ("n_frames", "detail", "output_type")} | FIT


def prepare(pipe, photos, fast):
    return pipe.prepare(*photos, **preparing(fast))


def render(pipe, photos, fast):
    return pipe.render(pipe.prepare(*photos, **preparing(fast)), n_frames=3, output_type="pt")


def call(pipe, photos, fast):
    return pipe(*photos, **fast | FIT)


def sequence(pipe, photos, fast):
    return pipe.interpolate_sequence([*photos, photos[0]], **fast | FIT | {"n_frames": 1})


def fit_lora(pipe, photos, fast):
    return pipe.fit_lora(*photos, "a fish", **FIT)


@pytest.mark.parametrize(
    ("work", "expected"),
    [
        (prepare, FITTING + INVERTING),
        (render, FITTING + INVERTING + DENOISING + whole("Decoding", 3 + 2)),  # the photos too, for their detail
        (call, FITTING + INVERTING + DENOISING + whole("Decoding", 3)),
        (sequence, (FITTING + INVERTING + DENOISING + whole("Decoding", 3)) * 2),
        (fit_lora, FITTING),
    ],
)
def test_stages_and_steps_are_told_in_their_order_instead_of_bars(pipe, photos, fast, capfd, work, expected):
    pipe.set_progress_bar_config(disable=False)
    listener = Listener()
    with pipe.listening(listener):
        work(pipe, photos, fast)
    assert listener.heard == expected
    assert capfd.readouterr().err == ""


def test_the_frames_are_those_without_a_listener(pipe, photos, fast):
    def frames():
        return pipe(*photos, **fast | FIT, generator=torch.Generator().manual_seed(0)).frames

    expected = frames()
    with pipe.listening(Listener()):
        assert torch.equal(frames(), expected)


@pytest.mark.parametrize(
    ("work", "stage"),
    [
        *((call, stage) for stage in STAGES),
        (prepare, "Fitting LoRA"),
        (prepare, "Inverting"),
        (render, "Denoising"),
        (render, "Decoding"),
        (sequence, "Denoising"),
        (fit_lora, "Fitting LoRA"),
    ],
)
def test_what_a_listener_raises_ends_the_work_at_that_step_and_leaves_nothing_behind(pipe, photos, fast, work, stage):
    before, listener = snapshot(pipe.unet), Listener(end_in=stage)
    with pytest.raises(CancelledError, match=stage), pipe.listening(listener):
        work(pipe, photos, fast)
    assert listener.heard[-1][:2] == (stage, 1)
    assert snapshot(pipe.unet) == before
    heard = len(listener.heard)
    pipe(*photos, **fast)
    assert len(listener.heard) == heard


def test_an_inner_context_gives_its_place_back_to_the_outer_listener(pipe, photos, fast):
    outer, inner = Listener(), Listener(end_in="Inverting")
    with pipe.listening(outer):
        with pytest.raises(CancelledError), pipe.listening(inner):
            prepare(pipe, photos, fast)
        assert outer.heard == []
        prepare(pipe, photos, fast)
    assert inner.heard == FITTING + INVERTING[:2]
    assert outer.heard == FITTING + INVERTING


def test_without_a_listener_bars_are_drawn(pipe, photos, fast, capfd):
    pipe.set_progress_bar_config(disable=False)
    with pipe.listening(Listener()):
        pass
    prepare(pipe, photos, fast)
    assert "Inverting" in capfd.readouterr().err
