# SPDX-License-Identifier: Apache-2.0
"""Records refuse what does not fit together, in words."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from dreammover_pipeline.records import (
    BidirectionalFlow,
    Canvas,
    FusedFrames,
    Inversion,
    PreparedPair,
    Schedule,
)

SCHEDULE = Schedule((1, 501), (0.999, 0.99, 0.2))


def canvas(**changed):
    sizes = {
        "height": 64,
        "width": 96,
        "content_height": 60,
        "content_width": 96,
        "output_height": 30,
        "output_width": 48,
    }
    return Canvas(**{**sizes, **changed})


def inversion(path=(3, 2, 4, 8, 12), eps=(2, 4, 8, 12)):
    return Inversion(torch.zeros(path), torch.zeros(eps), SCHEDULE)


def flow(forward=(1, 2, 8, 12), backward=(1, 2, 8, 12)):
    return BidirectionalFlow(torch.zeros(forward), torch.ones(backward))


def fused(latents=(3, 4, 8, 12), coverage=(3, 1, 8, 12), times=(0.25, 0.5, 0.75)):
    return FusedFrames(torch.zeros(latents), None, None, torch.zeros(coverage), torch.tensor(times))


def prepared(**changed):
    image = torch.zeros(3, 30, 48)
    parts = {
        "images": (image, image),
        "canvas": canvas(),
        "inversion": inversion(),
        "flow": flow(),
        "prompt_embeds": torch.zeros(2, 77, 32),
        "lora": None,
        "lora_scale": 1.0,
    }
    return PreparedPair(**{**parts, **changed})


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (canvas, {"content_height": 65}, "64×96 cannot hold 65×96"),
        (canvas, {"content_width": 97}, "64×96 cannot hold 60×97"),
        (canvas, {"content_height": 0}, "cannot hold 0×96"),
        (canvas, {"content_width": -1}, "cannot hold 60×-1"),
        (canvas, {"output_height": 0}, "at least one pixel"),
        (canvas, {"output_width": 0}, "at least one pixel"),
        (inversion, {"path": (3, 2, 8, 12)}, r"`path` must be \(T\+1, 2, C, h, w\), not \(3, 2, 8, 12\)"),
        (inversion, {"path": (3, 1, 4, 8, 12)}, r"`path` must be .* not \(3, 1, 4, 8, 12\)"),
        (inversion, {"eps": (2, 4, 8, 8)}, r"`eps` must be \(2, 4, 8, 12\) as in `path`, not \(2, 4, 8, 8\)"),
        (inversion, {"path": (4, 2, 4, 8, 12)}, "`path` has 3 steps, but its `schedule` has only 2"),
        (flow, {"forward": (2, 8, 12)}, r"`forward` must be \(1, 2, h, w\), not \(2, 8, 12\)"),
        (flow, {"forward": (2, 2, 8, 12)}, r"`forward` must be .* not \(2, 2, 8, 12\)"),
        (flow, {"forward": (1, 3, 8, 12)}, r"`forward` must be .* not \(1, 3, 8, 12\)"),
        (
            flow,
            {"backward": (1, 2, 12, 8)},
            r"`backward` must be \(1, 2, 8, 12\) as `forward` is, not \(1, 2, 12, 8\)",
        ),
        (fused, {"coverage": (3, 8, 12)}, r"`coverage` must be \(3, 1, 8, 12\), not \(3, 8, 12\)"),
        (fused, {"coverage": (2, 1, 8, 12)}, r"`coverage` must be .* not \(2, 1, 8, 12\)"),
        (fused, {"times": (0.5, 0.75)}, r"`times` must be \(3,\), not \(2,\)"),
        (fused, {"times": (0.0, 0.5, 0.75)}, r"`times` must lie in \(0, 1\)"),
        (fused, {"times": (0.25, 0.5, 1.0)}, r"`times` must lie in \(0, 1\)"),
        (fused, {"times": (0.25, float("nan"), 0.5)}, r"`times` must lie in \(0, 1\)"),
        (
            prepared,
            {"prompt_embeds": torch.zeros(1, 77, 32)},
            r"`prompt_embeds` must be \(2, L, D\), not \(1, 77, 32\)",
        ),
        (prepared, {"prompt_embeds": torch.zeros(2, 32)}, r"`prompt_embeds` must be \(2, L, D\), not \(2, 32\)"),
        (
            prepared,
            {"flow": flow((1, 2, 8, 8), (1, 2, 8, 8))},
            r"\(8, 8\) cells does not fit the `inversion`, .* \(8, 12\)",
        ),
    ],
)
def test_refuses_what_does_not_fit(make, arguments, message):
    make()
    with pytest.raises(ValueError, match=message):
        make(**arguments)


@pytest.mark.parametrize(
    ("timesteps", "alpha_bars", "message"),
    [
        ((1, 501), (0.999, 0.99), "one value more than the 2 `timesteps`, not 2"),
        ((501, 1), (0.999, 0.2, 0.99), "ascend"),
        ((1, 1), (0.999, 0.99, 0.99), "ascend"),
    ],
)
def test_schedule_refuses_what_is_no_schedule(timesteps, alpha_bars, message):
    with pytest.raises(ValueError, match=message):
        Schedule(timesteps, alpha_bars)


def test_schedule_counts_steps_from_one():
    assert [SCHEDULE.timestep(step) for step in (1, 2)] == [1, 501]


def test_inversion_knows_its_depth():
    for steps in (0, 1, 2):
        shallow = inversion(path=(steps + 1, 2, 4, 8, 12))
        assert shallow.steps == steps
        assert shallow.alpha_bar == SCHEDULE.alpha_bars[steps]
    path = torch.arange(3.0).reshape(3, 1, 1, 1, 1).expand(3, 2, 4, 8, 12)
    deep = Inversion(path, torch.zeros(2, 4, 8, 12), SCHEDULE)
    assert (deep.at(1) == 1).all()
    assert (deep.at(501) == 2).all()
    with pytest.raises(ValueError, match="not in"):
        deep.at(2)


def test_flow_turns_round_and_stacks():
    there = flow()
    back = there.reversed()
    assert back.forward is there.backward
    assert back.backward is there.forward
    assert torch.equal(there.stacked(), torch.cat([there.forward, there.backward]))


@pytest.mark.parametrize("record", [canvas(), SCHEDULE, inversion(), flow(), fused(), prepared()])
def test_records_are_frozen(record):
    name = dataclasses.fields(record)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(record, name, None)
