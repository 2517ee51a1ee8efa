# SPDX-License-Identifier: Apache-2.0
"""Two-level fusion: what is averaged, what never is, and what happens in holes."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from support import naive

from dreammover_pipeline import fusion
from dreammover_pipeline.fusion import (
    agreement_importance,
    photometric_error,
    photometric_importance,
    select_unwarped,
    slerp,
)
from dreammover_pipeline.paths import straight_paths
from dreammover_pipeline.records import BidirectionalFlow


def straight(fuse):
    """A fusion along the straight paths of a flow, which are what the paper's equations are written for."""

    @functools.wraps(fuse)
    def fused(pair, flow, metric, times):
        return fuse(pair, straight_paths(flow), metric, times)

    return fused


fuse_high_level = straight(fusion.fuse_high_level)
fuse_low_level = straight(fusion.fuse_low_level)
fuse_direct = straight(fusion.fuse_direct)

TIMES = [0.1, 0.25, 0.5, 0.625, 0.9]
FUSIONS = [fuse_high_level, fuse_direct, fuse_low_level]


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def flow_of(h, w, spread=2.0, dtype=torch.float64):
    return BidirectionalFlow(
        spread * randn(1, 2, h, w, seed=1, dtype=dtype), spread * randn(1, 2, h, w, seed=2, dtype=dtype)
    )


def no_flow(h, w):
    return BidirectionalFlow(*torch.zeros(2, 1, 2, h, w, dtype=torch.float64))


def times_of(*values):
    return torch.tensor(values or TIMES, dtype=torch.float64)


def numbered(h, w):
    """A pair in which every channel of a cell tells which cell of which image it is: (2, 2, h, w)."""
    index = torch.arange(1.0, 2 * h * w + 1, dtype=torch.float64).reshape(2, 1, h, w)
    return torch.cat([index, index + 1000], 1)


def frames_of(fused):
    """What a fusion makes of the pair, without the coverage that some return beside it."""
    return fused[0] if isinstance(fused, tuple) else fused


def assert_exact(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.fixture(params=[(5, 6), (4, 3), (1, 5)], ids=str)
def case(request):
    """A pair (2, 3, h, w), a flow that leaves holes, and a metric in [−10, 0]."""
    h, w = request.param
    return randn(2, 3, h, w), flow_of(h, w), -10 * randn(2, 1, h, w, seed=3).abs().clamp(max=1)


class TestImportance:
    """M = clip(−α · mean_c |x − backwarp(x', F)|, −limit, limit)."""

    def test_is_the_loop(self):
        pair, flow = 0.7 * randn(2, 3, 5, 6), flow_of(5, 6)
        expected = naive.importance(pair, flow.forward, flow.backward)
        assert (expected > -10).any()
        assert (expected == -10).any()
        assert_exact(photometric_importance(pair, flow), expected)
        assert_exact(photometric_error(pair, flow), naive.photometric_error(pair, flow.forward, flow.backward))

    def test_is_zero_where_the_images_agree(self):
        pair = randn(1, 3, 4, 5).expand(2, -1, -1, -1)
        assert photometric_importance(pair, no_flow(4, 5)).abs().max() < 1e-12

    def test_of_a_constant_difference(self):
        pair = torch.stack([torch.full((3, 4, 5), 0.25), torch.full((3, 4, 5), -0.25)]).double()
        metric = photometric_importance(pair, no_flow(4, 5))
        assert metric.shape == (2, 1, 4, 5)
        assert_exact(metric, torch.full((2, 1, 4, 5), -5.0, dtype=torch.float64))
        assert_exact(photometric_importance(pair, no_flow(4, 5), alpha=4), metric * 0.4)
        assert_exact(photometric_importance(pair, no_flow(4, 5), limit=3), metric.clamp(-3, 3))
        assert_exact(photometric_importance(3 * pair, no_flow(4, 5)), torch.full_like(metric, -10))

    def test_outside_the_other_image_there_is_nothing(self):
        pair = torch.full((2, 3, 4, 5), 0.5, dtype=torch.float64)
        away = BidirectionalFlow(*torch.full((2, 1, 2, 4, 5), 99.0, dtype=torch.float64))
        assert_exact(photometric_importance(pair, away), torch.full((2, 1, 4, 5), -5.0, dtype=torch.float64))

    def test_stays_in_its_range(self):
        metric = photometric_importance(100 * randn(2, 3, 5, 6), flow_of(5, 6))
        assert -10 <= metric.min() <= metric.max() <= 0


class TestAgreementImportance:
    """M = −min(|F + F'∘F|, limit)."""

    def test_is_the_loop(self):
        flow = flow_of(5, 6)
        errors = [naive.round_trip_error(a, b) for a, b in zip(*both_ways(flow), strict=True)]
        expected = -torch.cat(errors).clip(max=10)
        assert (expected == -10).any()
        assert (expected > -10).any()
        assert_exact(agreement_importance(flow), expected)
        assert_exact(agreement_importance(flow, limit=2), expected.clip(min=-2))

    def test_a_moving_object_is_not_outweighed_by_a_resting_background(self):
        """Where both land on one place, brightness constancy lets the background win, agreement lets neither."""
        h, w = 4, 6
        clean = torch.zeros(2, 1, h, w, dtype=torch.float64)
        clean[0, :, 1, 1], clean[1, :, 1, 4] = 1.0, 1.4  # moved three cells to the right, and changed a little
        forward, backward = (torch.zeros(1, 2, h, w, dtype=torch.float64) for _ in range(2))
        forward[0, 0, 1, 1], backward[0, 0, 1, 4] = 3, -3
        backward[0, 0, 1, 1] = 3  # what the object hid, and hides now, is matched anywhere
        flow = BidirectionalFlow(forward, backward)
        photometric, agreement = photometric_importance(clean, flow), agreement_importance(flow)
        assert photometric[0, 0, 1, 1] < photometric[0, 0, 1, 2]
        assert agreement[0, 0, 1, 1] == agreement[0, 0, 1, 2] == 0
        assert agreement[0, 0, 1, 4] == -3  # hidden background: its match does not lead back


def both_ways(flow):
    return (flow.forward, flow.backward), (flow.backward, flow.forward)


@pytest.mark.parametrize("fuse", [fuse_high_level, fuse_direct])
def test_averaging_fusion_is_the_loop(case, fuse):
    pair, flow, metric = case
    frames, coverage = fuse(pair, flow, metric, times_of())
    for i, delta in enumerate(TIMES):
        expected, expected_coverage = naive.high_level(pair, flow.forward, flow.backward, metric, delta)
        assert_exact(frames[i], expected)
        assert torch.equal(coverage[i], expected_coverage)


def test_low_level_is_the_loop(case):
    eps, flow, metric = case
    frames = fuse_low_level(eps, flow, metric, times_of())
    for i, delta in enumerate(TIMES):
        assert torch.equal(frames[i], naive.low_level(eps, flow.forward, flow.backward, metric, delta))


def test_select_unwarped_is_the_loop(case):
    latents, flow, _ = case
    latents = 0.2 * latents  # whose errors are about those at which weights differ
    frames = select_unwarped(latents, flow, times_of())
    for i, delta in enumerate(TIMES):
        expected = naive.select_unwarped(latents, flow.forward, flow.backward, delta)
        assert torch.equal(frames[i], expected)


def test_select_unwarped_by_hand():
    # Errors of 0.125 make weights of 0.175, one beyond 0.3 makes 0.001, and time decides between equal ones.
    latents = torch.tensor([[[[0.0, 1.0]]], [[[0.125, 1.125]]]], dtype=torch.float64)
    flow = BidirectionalFlow(torch.zeros(1, 2, 1, 2), torch.tensor([[[[0.0, -1.0]], [[0.0, 0.0]]]]))
    # cell 0: |0 − 0.125| against |0.125 − 0|; cell 1: |1 − 1.125| against |1.125 − 0|
    frames = select_unwarped(latents, flow, times_of(0.4, 0.6, 0.99, 0.999))
    assert frames[:, 0, 0].tolist() == [[0, 1], [0.125, 1], [0.125, 1], [0.125, 1.125]]


@pytest.mark.parametrize("fuse", FUSIONS)
@pytest.mark.parametrize("end", [0, 1])
def test_a_frame_next_to_an_image_is_that_image(fuse, end):
    pair, flow = randn(2, 3, 5, 6), flow_of(5, 6)
    metric = -randn(2, 1, 5, 6, seed=3).abs().clamp(max=1)
    frame = frames_of(fuse(pair, flow, metric, times_of(abs(end - 1e-6))))
    torch.testing.assert_close(frame, pair[end : end + 1], rtol=0, atol=1e-4)
    if fuse is fuse_low_level:
        assert torch.equal(frame, pair[end : end + 1])


@pytest.mark.parametrize("fuse", FUSIONS)
def test_swapping_the_images_and_turning_time_round_is_the_same(case, fuse):
    pair, flow, metric = case
    times = times_of(0.125, 0.25, 0.625, 0.75)  # their 1 − δ are exact; at ½ the second image fills double holes
    there = fuse(pair, flow, metric, times)
    back = fuse(pair.flip(0), flow.reversed(), metric.flip(0), 1 - times)
    if fuse is fuse_low_level:
        assert torch.equal(back, there)
    else:
        assert_exact(back[0], there[0])
        assert torch.equal(back[1], there[1])


def test_without_flow_layout_is_a_cross_fade_and_detail_a_choice():
    pair, metric = randn(2, 3, 4, 5), -randn(2, 1, 4, 5, seed=3).abs()
    delta = times_of().reshape(-1, 1, 1, 1)
    frames, coverage = fuse_high_level(pair, no_flow(4, 5), metric, times_of())
    assert_exact(frames, (1 - delta) * pair[0] + delta * pair[1])
    assert (coverage == 2).all()
    chosen = fuse_low_level(pair, no_flow(4, 5), metric, times_of())
    assert torch.equal(chosen, torch.where((1 - delta) * metric[0].exp() >= delta * metric[1].exp(), pair[0], pair[1]))


def test_detail_is_never_averaged(case):
    _, flow, metric = case
    eps = numbered(*metric.shape[-2:])
    frames = fuse_low_level(eps, flow, metric, times_of())
    known = eps.movedim(1, -1).flatten(0, 2).tolist()
    assert all(value in known for value in frames.movedim(1, -1).flatten(0, 2).tolist())


def test_detail_keeps_the_statistics_of_noise_that_averaging_loses():
    eps, metric = randn(2, 4, 16, 16), torch.zeros(2, 1, 16, 16)
    flow = flow_of(16, 16, spread=3.0)
    assert fuse_low_level(eps, flow, metric, times_of(0.5)).std() > 0.95
    assert fuse_direct(eps, flow, metric, times_of(0.5))[0].std() < 0.8


@pytest.mark.parametrize("delta", [0.25, 0.5, 0.75])
class TestHoles:
    """One row of four cells: both images arrive at cell 0, one each at cells 1 and 2, none at cell 3."""

    @pytest.fixture
    def row(self, delta):
        first = torch.tensor([0, 1, 0, 1]) - torch.arange(4)
        second = torch.tensor([0, 2, 2, 0]) - torch.arange(4)
        flow = torch.zeros(2, 1, 2, 1, 4, dtype=torch.float64)
        flow[0, 0, 0, 0], flow[1, 0, 0, 0] = first.double() / delta, second.double() / (1 - delta)
        pair = torch.tensor([[[[1.0, 2.0, 3.0, 4.0]]], [[[10.0, 20.0, 30.0, 40.0]]]], dtype=torch.float64)
        return pair, BidirectionalFlow(*flow)

    @pytest.mark.parametrize("fuse", [fuse_high_level, fuse_direct])
    def test_layout(self, row, delta, fuse):
        metric = torch.zeros(2, 1, 1, 4, dtype=torch.float64)
        (frame,), (coverage,) = fuse(*row, metric, times_of(delta))
        both = (1 - delta) * (1 + 3) / 2 + delta * (10 + 40) / 2
        neither = (1 - delta) * 4 + delta * 40
        assert_exact(frame.flatten(), torch.tensor([both, (2 + 4) / 2, (20 + 30) / 2, neither]).double())
        assert coverage.flatten().tolist() == [2, 1, 1, 0]

    @pytest.mark.parametrize("favoured", [0, 1])
    def test_detail(self, row, delta, favoured):
        # The last source that lands on a cell is the heavier one, and one of the images weighs more than time does.
        metric = torch.tensor([[[[-1.0, -1.0, 0.0, 0.0]]], [[[-1.0, -1.0, 0.0, 0.0]]]], dtype=torch.float64)
        metric[1 - favoured] -= 5
        (frame,) = fuse_low_level(*row, metric, times_of(delta))
        assert frame.flatten().tolist() == [(3, 40)[favoured], 4, 30, 4 if delta < 0.5 else 40]


def test_time_decides_between_equally_important_details():
    eps, metric = numbered(4, 5), torch.full((2, 1, 4, 5), -3.0, dtype=torch.float64)
    frames = fuse_low_level(eps, no_flow(4, 5), metric, times_of(0.49, 0.5, 0.51))
    assert torch.equal(frames, eps[[0, 0, 1]])


@pytest.mark.parametrize("fuse", [*FUSIONS, select_unwarped])
class TestEveryFusion:
    """What all of them have in common."""

    def arguments(self, fuse, dtype=torch.float64):
        pair, flow = randn(2, 4, 6, 7).to(dtype), flow_of(6, 7)
        flow = BidirectionalFlow(flow.forward.to(dtype), flow.backward.to(dtype))
        if fuse is select_unwarped:
            return 0.2 * pair, flow
        return pair, flow, -randn(2, 1, 6, 7, seed=3).abs().to(dtype)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_frames_do_not_depend_on_each_other(self, fuse, dtype):
        times, arguments = torch.tensor(TIMES, dtype=torch.float32), self.arguments(fuse, dtype)
        whole = fuse(*arguments, times)
        for cut in ([1] * len(TIMES), [2, 3]):
            pieces = [fuse(*arguments, piece) for piece in times.split(cut)]
            if isinstance(whole, tuple):
                assert all(map(torch.equal, map(torch.cat, zip(*pieces, strict=True)), whole))
            else:
                assert torch.equal(torch.cat(pieces), whole)

    @pytest.mark.parametrize(
        ("given", "kept"),
        [(torch.float16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
    )
    def test_works_in_float32_at_least(self, fuse, given, kept):
        arguments = self.arguments(fuse, given)
        frames = frames_of(fuse(*arguments, torch.tensor(TIMES)))
        assert frames.shape == (len(TIMES), 4, 6, 7)
        assert frames.isfinite().all()
        # a choice between latents may keep their dtype; everything else is computed
        assert frames.dtype == (given if fuse is select_unwarped else kept)

    def test_leaves_its_inputs_alone(self, fuse):
        arguments, times = self.arguments(fuse), times_of()

        def tensors():
            flat = [*arguments, times]
            return [
                t
                for item in flat
                for t in ([item] if isinstance(item, torch.Tensor) else [item.forward, item.backward])
            ]

        before = [tensor.clone() for tensor in tensors()]
        fuse(*arguments, times)
        assert all(map(torch.equal, tensors(), before))


class TestSlerp:
    """Spherical interpolation of text embeddings."""

    @pytest.fixture
    def units(self):
        a, b = randn(2, 5, 8)
        return a / a.norm(dim=-1, keepdim=True), b / b.norm(dim=-1, keepdim=True)

    @pytest.mark.parametrize("apart", [0.01, 0.2, 5.0])
    def test_closed_form(self, apart):
        a = randn(3, 4)
        b = a + apart * randn(3, 4, seed=1)
        result = slerp(a, b, times_of())
        assert result.shape == (len(TIMES), 3, 4)
        for i, delta in enumerate(TIMES):
            for row in range(3):
                angle = math.acos(float(a[row] @ b[row] / (a[row].norm() * b[row].norm())))
                expected = math.sin((1 - delta) * angle) * a[row] + math.sin(delta * angle) * b[row]
                torch.testing.assert_close(result[i, row], expected / math.sin(angle), rtol=1e-10, atol=1e-10)

    def test_ends(self, units):
        assert_exact(slerp(*units, times_of(0.0, 1.0)), torch.stack(units))

    def test_unit_vectors_stay_unit_vectors_and_turn_at_constant_speed(self, units):
        result = slerp(*units, times_of())
        assert_exact(result.norm(dim=-1), torch.ones(len(TIMES), 5, dtype=torch.float64))
        angle = (units[0] * units[1]).sum(-1).acos()
        assert_exact((result * units[0]).sum(-1).acos(), times_of()[:, None] * angle)

    def test_halfway_between_perpendicular_vectors(self):
        a, b = torch.eye(2, dtype=torch.float64)
        assert_exact(slerp(a, b, times_of(0.5)), torch.full((1, 2), 0.5**0.5, dtype=torch.float64))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_equal_vectors_come_back_bit_for_bit(self, dtype):
        a = randn(77, 768, dtype=dtype)
        assert torch.equal(slerp(a, a.clone(), times_of()), a.expand(len(TIMES), -1, -1))

    def test_all_but_parallel_vectors_are_interpolated_linearly(self):
        a = randn(3, 8)
        b = 2 * a * (1 + 1e-9 * randn(3, 8, seed=1))
        delta = times_of().reshape(-1, 1, 1)
        assert_exact(slerp(a, b, times_of()), (1 - delta) * a + delta * b)

    def test_opposite_vectors_do_not_grow(self):
        a = randn(3, 8)
        b = -a * (1 + 1e-7 * randn(3, 8, seed=1))
        made = slerp(a, b, times_of())
        assert (made.norm(dim=-1) <= (1 + 1e-5) * a.norm(dim=-1)).all()

    def test_half_precision_is_computed_in_float32(self, units):
        a, b = (unit.half() for unit in units)
        assert torch.equal(slerp(a, b, torch.tensor(TIMES)), slerp(a.float(), b.float(), torch.tensor(TIMES)))
