# SPDX-License-Identifier: Apache-2.0
"""Forward warping: softmax splat and winner splat."""

from __future__ import annotations

import math

import pytest
import torch
from support import naive

from dreammover_pipeline.fields import cell_grid
from dreammover_pipeline.splatting import softmax_splat, winner_splat

GRIDS = [(5, 7), (6, 4), (1, 6), (6, 1), (1, 1)]


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def constant_flow(b, h, w, dx, dy):
    return torch.tensor([dx, dy], dtype=torch.float64).reshape(1, 2, 1, 1).repeat(b, 1, h, w)


def flow_to(rows, columns):
    """Flow (1, 2, h, w) that takes every cell to the row and the column given for it."""
    target = torch.stack([columns, rows])[None].double()
    return target - cell_grid(*rows.shape, target)


def numbered(b, h, w):
    """Every channel of a cell tells which cell it is: (b, 2, h, w)."""
    index = torch.arange(1.0, b * h * w + 1, dtype=torch.float64).reshape(b, 1, h, w)
    return torch.cat([index, index + 1000], 1)


def assert_exact(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("h", "w"), GRIDS)
@pytest.mark.parametrize("spread", [0.4, 2.0])
def test_softmax_splat_is_the_loop(h, w, spread):
    x, flow, metric = randn(3, 2, h, w), spread * randn(3, 2, h, w, seed=1), 3 * randn(3, 1, h, w, seed=2)
    for actual, expected in zip(softmax_splat(x, flow, metric), naive.splat(x, flow, metric), strict=True):
        assert_exact(actual, expected)


@pytest.mark.parametrize(("h", "w"), GRIDS)
def test_without_flow_nothing_moves(h, w):
    x, metric = randn(2, 3, h, w), randn(2, 1, h, w, seed=1)
    splatted, weight = softmax_splat(x, torch.zeros(2, 2, h, w), metric)
    assert_exact(splatted, x)
    assert_exact(weight, metric.exp())
    won, weight = winner_splat(x, torch.zeros(2, 2, h, w), metric.exp())
    assert torch.equal(won, x)
    assert torch.equal(weight, metric.exp())


@pytest.mark.parametrize(("dx", "dy"), [(1, 0), (0, 1), (2, -1), (-3, 2)])
def test_whole_cells_move_whole_and_leave_holes_behind(dx, dy):
    h, w = 5, 7
    x, metric, flow = randn(1, 3, h, w), randn(1, 1, h, w, seed=1), constant_flow(1, h, w, dx, dy)
    padded = torch.nn.functional.pad(torch.cat([x, metric.exp()], 1), (9, 9, 9, 9))
    expected = padded[..., 9 - dy : 9 - dy + h, 9 - dx : 9 - dx + w]  # out(p) = in(p − flow)
    assert_exact(torch.cat(softmax_splat(x, flow, metric), 1), expected)
    assert torch.equal(torch.cat(winner_splat(x, flow, metric.exp()), 1), expected)


def test_mass_is_conserved_while_nothing_leaves_the_grid():
    h, w = 6, 8
    x, metric = randn(2, 3, h, w), 2 * randn(2, 1, h, w, seed=1)
    place = torch.rand(2, 2, h, w, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    flow = place * torch.tensor([w - 1, h - 1]).reshape(1, 2, 1, 1) - cell_grid(h, w, place)
    splatted, weight = softmax_splat(x, flow, metric)
    assert_exact(weight.sum((2, 3)), metric.exp().sum((2, 3)))
    assert_exact((splatted * weight).sum((2, 3)), (x * metric.exp()).sum((2, 3)))


@pytest.mark.parametrize("shift", [-40.0, 3.0, 40.0])
def test_adding_a_constant_to_the_metric_changes_nothing_but_the_weight(shift):
    x, flow, metric = randn(2, 3, 5, 6), 2 * randn(2, 2, 5, 6, seed=1), randn(2, 1, 5, 6, seed=2)
    splatted, weight = softmax_splat(x, flow, metric)
    shifted, shifted_weight = softmax_splat(x, flow, metric + shift)
    assert_exact(shifted, splatted)
    torch.testing.assert_close(shifted_weight, weight * torch.tensor(shift).double().exp(), rtol=1e-12, atol=0)


def test_a_constant_stays_constant_wherever_it_arrives():
    flow, metric = 2 * randn(2, 2, 5, 6), 5 * randn(2, 1, 5, 6, seed=1)
    splatted, weight = softmax_splat(torch.full((2, 1, 5, 6), 0.7, dtype=torch.float64), flow, metric)
    assert 0 < (weight == 0).sum() < weight.numel()
    assert_exact(splatted, 0.7 * (weight > 0).double())


def test_everything_on_one_cell_is_the_softmax_mean():
    x, metric = randn(1, 3, 4, 5), randn(1, 1, 4, 5, seed=1)
    flow = flow_to(torch.full((4, 5), 2), torch.full((4, 5), 3))
    splatted, weight = softmax_splat(x, flow, metric)
    assert_exact(splatted[0, :, 2, 3], (x[0] * metric[0].flatten().softmax(0).reshape(1, 4, 5)).sum((1, 2)))
    assert_exact(weight[0, 0, 2, 3], metric.exp().sum())
    won, won_weight = winner_splat(x, flow, metric.exp())
    assert torch.equal(won[0, :, 2, 3], x[0].flatten(1)[:, metric.argmax()])
    for out, reached in ((splatted, weight), (won, won_weight)):
        assert (reached > 0).sum() == 1
        assert out.flatten(2).count_nonzero() == 3


def test_the_heavier_cell_occludes():
    x = torch.tensor([[[[1.0, 2.0, 3.0]]]], dtype=torch.float64)
    flow = flow_to(torch.zeros(1, 3), torch.tensor([[1, 1, 1]]))
    metric = torch.tensor([[[[0.0, -40.0, -50.0]]]], dtype=torch.float64)
    assert_exact(softmax_splat(x, flow, metric)[0], torch.tensor([[[[0.0, 1.0, 0.0]]]], dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_huge_metrics_neither_overflow_nor_make_holes(dtype):
    x, flow = randn(2, 3, 6, 7, dtype=dtype), 1.5 * randn(2, 2, 6, 7, seed=1, dtype=dtype)
    plain, weight = softmax_splat(x, flow, torch.zeros(2, 1, 6, 7))
    for level in (-1e4, 1e4):
        splatted, level_weight = softmax_splat(x, flow, torch.full((2, 1, 6, 7), level))
        assert torch.equal(splatted, plain)
        assert torch.equal(level_weight > 0, weight > 0)
    metric = torch.where(randn(2, 1, 6, 7, seed=2) > 0, 1e4, -1e4)
    splatted, mixed_weight = softmax_splat(x, flow, metric)
    assert splatted.isfinite().all()
    assert torch.equal(mixed_weight > 0, weight > 0)
    assert not mixed_weight.isnan().any()
    # where a heavy cell arrives, the light ones count for nothing; elsewhere they are as good as any
    # (a flow far outside takes the others away)
    away = torch.full_like(flow, 1e6)
    heavy, heavy_weight = softmax_splat(x, torch.where(metric > 0, flow, away), torch.zeros_like(metric))
    light, _ = softmax_splat(x, torch.where(metric < 0, flow, away), torch.zeros_like(metric))
    torch.testing.assert_close(splatted, torch.where(heavy_weight > 0, heavy, light))


@pytest.mark.parametrize("far", [9.0, -9.0, 1e6, 1e30])
def test_when_everything_leaves_there_are_only_holes(far):
    x, flow, metric = randn(2, 3, 4, 5), torch.full((2, 2, 4, 5), far), randn(2, 1, 4, 5, seed=1)
    for out, weight in (softmax_splat(x, flow, metric), winner_splat(x, flow, metric.exp())):
        assert torch.equal(out, torch.zeros_like(x))
        assert torch.equal(weight, torch.zeros_like(metric))


@pytest.mark.parametrize(("h", "w"), GRIDS)
@pytest.mark.parametrize("spread", [0.4, 2.0])
def test_winner_splat_is_the_loop(h, w, spread):
    x, flow, weight = randn(3, 2, h, w), spread * randn(3, 2, h, w, seed=1), randn(3, 1, h, w, seed=2).exp()
    assert all(map(torch.equal, winner_splat(x, flow, weight), naive.winner_splat(x, flow, weight)))


@pytest.mark.parametrize("levels", [1, 2])
def test_winner_splat_gives_draws_to_the_lowest_source(levels):
    generator = torch.Generator().manual_seed(0)
    x = numbered(3, 6, 7)
    flow = torch.randint(-2, 3, (3, 2, 6, 7), generator=generator).double()
    weight = torch.randint(1, levels + 1, (3, 1, 6, 7), generator=generator).double()
    assert all(map(torch.equal, winner_splat(x, flow, weight), naive.winner_splat(x, flow, weight)))
    together = flow_to(torch.full((6, 7), 4), torch.full((6, 7), 4)).repeat(3, 1, 1, 1)
    won, _ = winner_splat(x, together, torch.ones(3, 1, 6, 7))
    assert torch.equal(won[:, :, 4, 4], x[:, :, 0, 0])


def test_winner_splat_never_mixes():
    x = numbered(1, 6, 7)
    won, weight = winner_splat(x, 2 * randn(1, 2, 6, 7), randn(1, 1, 6, 7, seed=1).exp())
    arrived = won.movedim(1, -1)[(weight > 0)[:, 0]].tolist()
    assert len(arrived) > 10
    assert all(value in x.movedim(1, -1).flatten(0, 2).tolist() for value in arrived)
    assert torch.equal(won.count_nonzero(1) > 0, (weight > 0)[:, 0])


@pytest.mark.parametrize(
    ("dx", "dy"), [(0.5, 0), (-0.5, 0), (0, 0.5), (0, -0.5), (0.5, -0.5), (1.5, 2.5), (-2.5, -1.5)]
)
def test_halves_go_right_and_down_so_that_a_translation_leaves_no_inner_holes(dx, dy):
    h, w = 6, 7
    x = numbered(1, h, w)
    won, weight = winner_splat(x, constant_flow(1, h, w, dx, dy), torch.ones(1, 1, h, w))
    whole = math.floor(dx + 0.5), math.floor(dy + 0.5)
    expected = winner_splat(x, constant_flow(1, h, w, *whole), torch.ones(1, 1, h, w))
    assert torch.equal(won, expected[0])
    assert torch.equal(weight, expected[1])
    assert (weight > 0).sum() == (h - abs(whole[1])) * (w - abs(whole[0]))


@pytest.mark.parametrize("splat", [softmax_splat, winner_splat])
class TestBoth:
    """What the two splats have in common."""

    @pytest.fixture
    def case(self):
        return randn(4, 3, 9, 11), 2 * randn(4, 2, 9, 11, seed=1), randn(4, 1, 9, 11, seed=2).exp()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_same_bits_on_every_run_and_however_the_batch_is_cut(self, splat, case, dtype):
        case = [tensor.to(dtype) for tensor in case]
        whole = splat(*case)
        assert all(map(torch.equal, splat(*case), whole))
        for cut in ([1, 1, 1, 1], [3, 1]):
            pieces = [splat(*piece) for piece in zip(*(tensor.split(cut) for tensor in case), strict=True)]
            assert all(map(torch.equal, map(torch.cat, zip(*pieces, strict=True)), whole))

    @pytest.mark.parametrize(
        ("given", "kept"),
        [(torch.float16, torch.float32), (torch.bfloat16, torch.float32), (torch.float64, torch.float64)],
    )
    def test_works_in_float32_at_least(self, splat, case, given, kept):
        x, flow, metric = (tensor.to(given) for tensor in case)
        results = splat(x, flow, metric)
        assert all(result.dtype == kept and result.isfinite().all() for result in results)
        assert all(map(torch.equal, results, splat(x.to(kept), flow.to(kept), metric.to(kept))))

    def test_expanded_and_transposed_inputs_are_as_good_as_any(self, splat, case):
        x, flow, metric = (tensor[:1].expand(3, -1, -1, -1) for tensor in case)
        assert all(map(torch.equal, splat(x, flow, metric), splat(*(t.contiguous() for t in (x, flow, metric)))))
        strided = [tensor.transpose(2, 3).contiguous().transpose(2, 3) for tensor in case]
        assert all(map(torch.equal, splat(*strided), splat(*case)))

    def test_leaves_its_inputs_alone(self, splat, case):
        before = [tensor.clone() for tensor in case]
        splat(*case)
        assert all(map(torch.equal, case, before))
