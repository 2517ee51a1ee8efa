# SPDX-License-Identifier: Apache-2.0
"""Where frames stand, and how the ends of a video meet them."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from dreammover_pipeline.images import rgb
from dreammover_pipeline.inputs import frame_times
from dreammover_pipeline.records import BidirectionalFlow
from dreammover_pipeline.spacing import POOLED, even_times
from dreammover_pipeline.timing import CURVES, check_easing, eased_times
from dreammover_pipeline.tone import FADE, fade_weights, tone_difference, with_tone

SMALL = {"num_inference_steps": 6, "inversion_steps": 4, "feature_step": 2, "lora_steps": 0}


@pytest.fixture
def prepared(pipe, photos):
    return pipe.prepare(*photos, prompt="a fish", **SMALL)


# ── Easing ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("n", [1, 2, 7, 1000])
@pytest.mark.parametrize("name", CURVES)
def test_named_easings_keep_frames_apart_and_inside(name, n):
    times = eased_times(frame_times(n, None), name)
    assert len(times) == n
    assert bool((torch.tensor([0.0, *times, 1.0]).diff() > 0).all())  # as float32


def test_linear_moves_nothing_and_the_others_where_their_names_say():
    times = frame_times(9, None)
    assert eased_times(times, "linear") == times
    slow, fast, both = (eased_times(times, name) for name in ("ease-in", "ease-out", "ease-in-out"))
    assert all(a < t < b for a, t, b in zip(slow, times, fast, strict=True))
    assert slow == pytest.approx([1 - t for t in reversed(fast)])
    assert both == pytest.approx([1 - t for t in reversed(both)])
    assert both[0] < times[0]
    assert both[4] == 0.5


def test_a_callable_is_a_curve():
    times = frame_times(4, None)
    assert eased_times(times, lambda t: t**3) == pytest.approx([t**3 for t in times])
    assert eased_times(times, lambda t: torch.tensor(t)) == pytest.approx(times)  # whatever is a number
    assert eased_times(times, lambda t: (1 - math.cos(math.pi * t)) / 2)[1] < times[1]


@pytest.mark.parametrize(
    ("easing", "error", "reason"),
    [
        ("bounce", ValueError, "'ease-in-out'"),
        (0.5, TypeError, "a name or a callable, not 0.5"),
        (None, TypeError, "a name or a callable"),
        (lambda t: None, TypeError, "must give a number, not None"),
        (lambda t: 1 - t, ValueError, "not from 1 to 0"),
        (lambda t: t / 2, ValueError, "not from 0 to 0.5"),
        (lambda t: math.nan, ValueError, "from nan to nan"),
        (lambda t: float(t >= 0.5), ValueError, "must rise"),  # frames on the ends
        (lambda t: min(1.0, 2 * t), ValueError, r"f\(0\.5\) = 1 and f\(0\.75\) = 1"),
        (lambda t: t if t in (0, 1) else 0.5, ValueError, "must rise"),  # all in one place
        (lambda t: {0.25: 0.6, 0.5: 0.4}.get(t, t), ValueError, "must rise"),  # back
        (lambda t: {0.75: 1.5}.get(t, t), ValueError, "must rise"),  # outside
        (lambda t: math.nan if t == 0.5 else t, ValueError, "must rise"),
        (lambda t: {0.5: 0.25 + 1e-9}.get(t, t), ValueError, "must rise"),  # one place in float32
    ],
)
def test_easings_that_cannot_be_are_refused(easing, error, reason):
    with pytest.raises(error, match=reason):
        check_easing(3, None, easing)


@pytest.mark.parametrize("easing", ["ease-in", "even", math.sqrt])
def test_an_easing_has_nothing_to_move_where_times_are_given(easing):
    check_easing(3, [0.7, 0.2], "linear")
    with pytest.raises(ValueError, match="where `times` are given"):
        check_easing(3, [0.2, 0.7], easing)


def test_too_many_frames_for_a_curve_are_refused_rather_than_doubled():
    with pytest.raises(ValueError, match="'ease-out' must rise"):
        check_easing(20000, None, "ease-out")


# ── Even spacing ───────────────────────────────────────────────────────────────────────────────────────────────────


def travelling(positions):
    """Previews (P, 2, 4, 4) on a straight line through the latents, at these distances from its start."""
    direction = torch.ones(2, 4, 4, dtype=torch.float64)
    return torch.stack([position * direction for position in positions])


@pytest.mark.parametrize("n", [1, 5, 200])
def test_even_times_undo_the_speed_of_the_previews(n):
    moments = torch.linspace(0, 1, 1025, dtype=torch.float64)
    times = torch.tensor(even_times(n, travelling(moments**2)), dtype=torch.float64)
    assert torch.allclose(times**2, torch.tensor(frame_times(n, None), dtype=torch.float64), atol=1e-5)
    assert even_times(n, travelling(3 * moments)) == pytest.approx(frame_times(n, None))


def test_even_times_agree_with_a_plain_loop():
    previews = torch.randn(9, 3, 6, 4, generator=torch.Generator().manual_seed(0)).double()
    pooled = F.avg_pool2d(previews, POOLED)
    steps = [math.sqrt(((b - a) ** 2).mean()) for a, b in pairwise(pooled)]
    expected = []
    for i in range(1, 6):
        rest, k = sum(steps) * i / 6, 0
        while rest > steps[k]:
            rest, k = rest - steps[k], k + 1
        expected.append((k + rest / steps[k]) / 8)
    assert even_times(5, previews) == pytest.approx(expected)


def test_still_and_jumping_previews_leave_frames_apart():
    assert even_times(3, travelling([2, 2, 2])) == frame_times(3, None)
    for positions in ([0, 0, 0, 1, 1], [0, 1, 1, 1, 1], [0, 0, 0, 0, 1], [0, 0, 1, 1, 2]):
        times = torch.tensor([0.0, *even_times(1000, travelling(positions)), 1.0])
        assert bool((times.diff() > 0).all()), positions


def test_even_spacing_asks_no_model(pipe, prepared, monkeypatch):
    for module in (pipe.unet, pipe.vae, pipe.text_encoder):
        module.register_forward_pre_hook(lambda *_: pytest.fail("a model ran"))
    ways = torch.randn(prepared.flow.stacked().shape, generator=torch.Generator().manual_seed(0))
    moving = replace(prepared, flow=BidirectionalFlow.of(2 * ways))  # so that cells land on one place
    times = pipe.place_frames(moving, 7, easing="even")
    assert len(times) == 7
    assert times != frame_times(7, None)
    assert times != pipe.place_frames(moving, 7, easing="even", importance="photometric")


def test_previews_start_and_end_at_the_two_images(pipe, prepared):
    ends = pipe.preview(prepared, torch.tensor([0.0, 1.0]))
    assert torch.equal(ends, prepared.inversion.path[0])


def test_render_stands_where_it_says_it_does(pipe, prepared):
    for easing in ("even", "ease-in", math.sqrt):
        (times,) = pipe.render(prepared, n_frames=3, easing=easing, include_inputs=True, output_type="latent").times
        assert times == (0.0, *pipe.place_frames(prepared, 3, easing=easing), 1.0)
        assert times != (0.0, 0.25, 0.5, 0.75, 1.0)
    eased = pipe.render(prepared, n_frames=3, easing="ease-in", output_type="latent")
    given = pipe.render(prepared, times=[1 / 16, 1 / 4, 9 / 16], output_type="latent")
    assert torch.equal(eased.frames, given.frames)
    assert eased.times == given.times


def test_the_call_takes_easing_and_endpoints_for_every_pair(pipe, photos, fast):
    first, last = photos
    options = fast | {"n_frames": 2, "easing": "ease-in", "include_inputs": True, "endpoints": "reconstructed"}
    both = pipe([first, last], [last, first], **options)
    alone = pipe(last, first, **options)
    assert both.times == [(0.0, 1 / 9, 4 / 9, 1.0)] * 2
    assert torch.equal(both.frames[1], alone.frames[0])


# ── Ends ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_constant_offset_is_gone_at_the_ends_and_left_in_the_middle():
    photo = torch.rand(1, 3, 40, 61, generator=torch.Generator().manual_seed(0)) * 0.5 + 0.25
    offset = torch.tensor([0.1, -0.05, 0.02]).reshape(1, 3, 1, 1)
    tones = [tone_difference(photo, photo - offset), tone_difference(photo, photo + offset)]
    assert torch.allclose(with_tone(photo - offset, tones, 0.0), photo, atol=1e-5)
    assert torch.allclose(with_tone(photo + offset, tones, 1.0), photo, atol=1e-5)
    for time in (FADE, 0.5, 1 - FADE):
        assert torch.equal(with_tone(photo, tones, time), photo)
    assert torch.allclose(with_tone(photo, tones, FADE / 2), photo + offset / 2, atol=1e-5)


def test_detail_is_no_tone_and_no_difference_changes_nothing():
    photo = torch.full((1, 3, 64, 64), 0.5)
    detail = 0.2 * (-1.0) ** torch.arange(64) * torch.ones(1, 3, 64, 64)
    assert float(tone_difference(photo + detail, photo).abs().max()) < 1e-6
    zero = [tone_difference(photo, photo)] * 2
    for time in (0.0, 0.1, 0.5, 0.99):
        assert torch.equal(with_tone(photo, zero, time), photo)
    assert with_tone(torch.ones(1, 3, 64, 64), [torch.ones(1, 3, 8, 8)] * 2, 0.1).max() == 1


def test_tone_fades_evenly_from_the_ends():
    assert fade_weights(0.0) == (1.0, 0.0)
    assert fade_weights(1.0) == (0.0, 1.0)
    weights = [fade_weights(FADE * i / 4)[0] for i in range(6)]
    assert weights == pytest.approx([1, 0.75, 0.5, 0.25, 0, 0])


@pytest.mark.parametrize("size", [(3, 200), (64, 64), (7, 5), (1, 1)])
def test_tone_has_a_few_square_cells_whatever_the_shape(size):
    tone = tone_difference(torch.ones(1, 3, *size), torch.zeros(1, 3, *size))
    assert min(tone.shape[2:]) <= 8
    assert torch.equal(tone, torch.ones_like(tone))
    assert with_tone(torch.zeros(1, 3, *size), [tone, tone], 0.0).shape == (1, 3, *size)


def test_original_ends_stay_and_the_frames_beside_them_take_their_tone(pipe, prepared):
    times = [0.05, 0.5, 0.95]

    def rendered(detail="upsampled", **options):
        return pipe.render(prepared, times=times, detail=detail, output_type="pt", **options).frames[0]

    bare, original = rendered(), rendered(include_inputs=True)
    reconstructed = rendered(include_inputs=True, endpoints="reconstructed")
    assert torch.equal(original[[0, -1]], torch.stack([rgb(image) for image in prepared.images]))
    assert torch.equal(reconstructed[1:-1], bare)
    brought_back = pipe.decode_latents(prepared.inversion.path[0])
    assert torch.allclose(reconstructed[[0, -1]], brought_back, atol=1e-5)
    tones = [
        tone_difference(photo[None], back[None]) for photo, back in zip(original[[0, -1]], brought_back, strict=True)
    ]
    for made, plain, time in zip(original[1:-1], bare, times, strict=True):
        assert torch.allclose(made[None], with_tone(plain[None], tones, time), atol=1e-5)
    assert torch.equal(original[2], bare[1])
    assert not torch.allclose(original[1], bare[0], atol=1e-2)
    bare, original = rendered("photos"), rendered("photos", include_inputs=True)
    assert torch.equal(rendered("photos", include_inputs=True, endpoints="reconstructed")[1:-1], bare)
    assert torch.equal(original[2], bare[1])
    assert not torch.equal(original[1], bare[0])


def test_endpoints_are_of_two_kinds(pipe, prepared):
    with pytest.raises(ValueError, match="'original', 'reconstructed'"):
        pipe.render(prepared, endpoints="none")
