# SPDX-License-Identifier: Apache-2.0
"""Correspondence, and its smoothing."""

from __future__ import annotations

import math
import threading

import pytest
import torch
import torch.nn.functional as F
from support import naive

from dreammover_pipeline import flow as flow_module
from dreammover_pipeline.fields import backward_warp, cell_grid
from dreammover_pipeline.flow import (
    REST_WEIGHT,
    agreement,
    distance_bias,
    exact_matmul,
    join_features,
    match_features,
    neighbourhood_mean,
    regularise,
    resting_cells,
    round_trip_error,
    smooth_flow,
)
from dreammover_pipeline.records import BidirectionalFlow


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def constant_flow(h, w, dx, dy):
    return torch.tensor([dx, dy], dtype=torch.float64).reshape(1, 2, 1, 1).expand(1, 2, h, w)


def assert_same_flow(actual, expected):
    assert torch.equal(actual.forward, expected.forward)
    assert torch.equal(actual.backward, expected.backward)


@pytest.mark.parametrize(("dx", "dy"), [(0, 0), (1, 0), (0, 1), (3, -2), (-2, 1)])
def test_features_moved_by_whole_cells_give_that_flow(dx, dy):
    h, w = 7, 9
    first = randn(32, h, w)
    flow = match_features(torch.stack([first, first.roll((dy, dx), (1, 2))]), (h, w))
    x, y = cell_grid(h, w, first)[0]
    stays = (x + dx >= 0) & (x + dx < w) & (y + dy >= 0) & (y + dy < h)  # elsewhere roll wraps around
    assert (flow.forward[0, 0] == dx)[stays].all()
    assert (flow.forward[0, 1] == dy)[stays].all()
    assert torch.equal(flow.forward[0, 0], (x + dx) % w - x)
    assert torch.equal(flow.forward[0, 1], (y + dy) % h - y)
    # backward undoes forward
    assert torch.equal(flow.backward[0, 0], (x - dx) % w - x)
    assert torch.equal(flow.backward[0, 1], (y - dy) % h - y)


@pytest.mark.parametrize("size", [(4, 5), (5, 3), (1, 6), (6, 1), (1, 1)])
def test_matches_like_the_loop(size):
    features = randn(2, 3, *size)
    flow = match_features(features, size)
    assert torch.equal(flow.forward, naive.match(features[0], features[1]))
    assert torch.equal(flow.backward, naive.match(features[1], features[0]))


def test_cosine_ignores_how_long_a_feature_is():
    features = randn(2, 8, 4, 5)
    lengths = randn(2, 1, 4, 5, seed=1).exp()
    assert_same_flow(match_features(features * lengths, (4, 5)), match_features(features, (4, 5)))


@pytest.mark.parametrize("size", [(8, 10), (7, 9), (4, 5), (16, 5)])
def test_upsamples_bilinearly_to_the_latent_grid(size):
    features = randn(2, 8, 4, 5)
    upsampled = F.interpolate(features, size=size, mode="bilinear", align_corners=False)
    flow = match_features(features, size)
    assert flow.forward.shape == flow.backward.shape == (1, 2, *size)
    assert torch.equal(flow.forward, naive.match(upsampled[0], upsampled[1]))
    assert torch.equal(flow.backward, naive.match(upsampled[1], upsampled[0]))


@pytest.mark.parametrize("rows", [1, 2, 5, 7, 1024])
def test_ties_go_to_the_lowest_index_both_ways_in_blocks_of_any_size(rows, monkeypatch):
    monkeypatch.setattr(flow_module, "MATCH_ROWS", rows)
    # Few distinct features of length 2: every product is exact, and every cell has several equal matches.
    kinds = torch.tensor([[1, 1, 1, 1], [1, 1, -1, -1], [1, -1, 1, -1]], dtype=torch.float32)
    picks = torch.randint(3, (2, 3, 5), generator=torch.Generator().manual_seed(0))
    features = kinds[picks].movedim(-1, 1)
    flow = match_features(features, (3, 5))
    assert torch.equal(flow.forward.double(), naive.match(features[0], features[1]))
    assert torch.equal(flow.backward.double(), naive.match(features[1], features[0]))

    flat = match_features(torch.ones(2, 4, 3, 5), (3, 5))
    for flow in (flat.forward, flat.backward):
        assert torch.equal(flow + cell_grid(3, 5, flow), torch.zeros_like(flow))


def test_a_penalty_takes_what_it_says_for_the_distance():
    bias = distance_bias((3, 5), 0.6, torch.zeros(1, dtype=torch.float64))
    for p, q in ((0, 0), (7, 7), (0, 4), (2, 14), (14, 2), (6, 11)):
        distance = math.hypot(q % 5 - p % 5, q // 5 - p // 5)
        assert float(bias(slice(p, p + 1))[0, q]) == pytest.approx(-0.6 * distance / 3, abs=1e-12)
    assert distance_bias((3, 5), 0, torch.zeros(1)) is None


def test_of_what_looks_alike_the_nearer_is_matched_and_what_looks_better_still_wins():
    features = torch.ones(2, 4, 6, 9)
    flow = match_features(features, (6, 9), distance_bias((6, 9), 0.01, features))
    assert not flow.stacked().any()
    moved = randn(1, 16, 6, 9, dtype=torch.float32)
    features = torch.cat([moved, moved.roll((1, 3), (2, 3))])
    penalised = match_features(features, (6, 9), distance_bias((6, 9), 0.1, features))
    assert_same_flow(penalised, match_features(features, (6, 9)))


@pytest.mark.parametrize("rows", [1, 13, 64, 100])
def test_the_size_of_a_block_does_not_matter(rows, monkeypatch):
    features = randn(2, 16, 8, 8, dtype=torch.float32)
    bias = distance_bias((8, 8), 0.5, features)
    whole = match_features(features, (8, 8), bias)
    monkeypatch.setattr(flow_module, "MATCH_ROWS", rows)
    assert_same_flow(match_features(features, (8, 8), bias), whole)


def test_swapped_images_give_the_reversed_flow():
    features = randn(2, 16, 6, 5)
    assert_same_flow(match_features(features.flip(0), (6, 5)), match_features(features, (6, 5)).reversed())


@pytest.mark.parametrize(
    ("given", "kept"),
    [(torch.float16, torch.float32), (torch.bfloat16, torch.float32), (torch.float64, torch.float64)],
)
def test_works_in_float32_at_least(given, kept):
    features = randn(2, 16, 6, 5).to(given)
    flow = match_features(features, (6, 5))
    assert flow.forward.dtype == flow.backward.dtype == kept
    assert_same_flow(flow, match_features(features.to(kept), (6, 5)))


@pytest.fixture
def close_features():
    """Features so much alike that half-precision products would match them otherwise."""
    features = 1 + 0.05 * randn(2, 64, 12, 12, dtype=torch.float32)
    exact = match_features(features.double(), (12, 12))
    return features, exact


def assert_close_features_match(close_features):
    features, exact = close_features
    flow = match_features(features, (12, 12))
    assert torch.equal(flow.forward.double(), exact.forward)
    assert torch.equal(flow.backward.double(), exact.backward)


def test_autocast_of_the_caller_changes_nothing(close_features):
    with torch.autocast("cpu", torch.bfloat16):
        assert_close_features_match(close_features)
        assert torch.is_autocast_enabled("cpu")


@pytest.fixture
def default_precision():
    """Whatever the test sets, later tests find the default."""
    yield
    if hasattr(torch.backends.mkldnn, "matmul"):
        torch.backends.mkldnn.matmul.fp32_precision = torch.backends.cuda.matmul.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("precision", ["medium", "high"])
def test_matmul_precision_of_the_caller_changes_nothing(close_features, precision, default_precision):
    torch.set_float32_matmul_precision(precision)
    assert_close_features_match(close_features)
    assert torch.get_float32_matmul_precision() == precision


@pytest.mark.skipif(not hasattr(torch.backends.mkldnn, "matmul"), reason="this torch has no precision per backend")
@pytest.mark.parametrize(("backend", "precision"), [("mkldnn", "bf16"), ("mkldnn", "tf32"), ("cuda", "tf32")])
def test_matmul_precision_of_one_backend_changes_nothing(close_features, backend, precision, default_precision):
    matmul = getattr(torch.backends, backend).matmul
    matmul.fp32_precision = precision
    assert_close_features_match(close_features)
    assert matmul.fp32_precision == precision


def test_matmul_precision_is_restored_after_a_failure(monkeypatch, default_precision):
    torch.set_float32_matmul_precision("medium")
    monkeypatch.setattr(flow_module, "MATCH_ROWS", 0)  # makes the product itself fail
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(ValueError, match="zero"):
            match_features(randn(2, 4, 3, 3), (3, 3))
        assert torch.is_autocast_enabled("cpu")
    assert torch.get_float32_matmul_precision() == "medium"


def test_matched_cells_look_each_other_up():
    first = randn(32, 6, 7)
    pair = torch.stack([first, first.roll((1, -2), (1, 2))])
    flow = match_features(pair, (6, 7))
    torch.testing.assert_close(backward_warp(pair.flip(0), flow.stacked()), pair, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("h", "w"), [(5, 7), (1, 6), (6, 1), (1, 1)])
def test_round_trip_error_is_the_loop(h, w):
    flow = BidirectionalFlow(*(2 * randn(2, 1, 2, h, w)))
    expected = [
        naive.round_trip_error(*ends) for ends in ((flow.forward, flow.backward), (flow.backward, flow.forward))
    ]
    torch.testing.assert_close(round_trip_error(flow), torch.cat(expected), rtol=0, atol=1e-12)


def test_round_trip_error_of_a_shift_and_its_way_back_is_zero_inside_and_infinite_outside():
    there = constant_flow(5, 6, 2, -1)
    error = round_trip_error(BidirectionalFlow(there, -there))
    inside = torch.zeros(5, 6, dtype=torch.bool)
    inside[1:, :4] = True
    assert error[0, 0][inside].max() < 1e-12
    assert (error[0, 0][~inside] == torch.inf).all()


@pytest.mark.parametrize(("h", "w"), [(5, 7), (1, 6), (2, 2), (1, 1)])
def test_a_pass_of_smoothing_is_the_loop(h, w):
    flow = BidirectionalFlow(*(2 * randn(2, 1, 2, h, w)))
    smooth = smooth_flow(flow, 1)
    expected = naive.smooth_flow(flow.forward, flow.backward), naive.smooth_flow(flow.backward, flow.forward)
    torch.testing.assert_close(smooth.forward, expected[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(smooth.backward, expected[1], rtol=0, atol=1e-12)


def test_smoothing_is_repeated_and_may_be_left_out():
    flow = BidirectionalFlow(*randn(2, 1, 2, 6, 5))
    assert_same_flow(smooth_flow(flow, 0), flow)
    assert_same_flow(smooth_flow(flow, 3), smooth_flow(smooth_flow(smooth_flow(flow, 1), 1), 1))
    assert_same_flow(smooth_flow(flow.reversed(), 2), smooth_flow(flow, 2).reversed())


def test_smoothing_keeps_a_uniform_flow_and_carries_it_into_a_mismatch():
    there = constant_flow(7, 8, 1, 0).clone()
    flow = BidirectionalFlow(there, -there)
    torch.testing.assert_close(smooth_flow(flow, 2).forward, there, rtol=0, atol=1e-12)
    wrong = there.clone()
    wrong[0, :, 3, 3] = torch.tensor([-3.0, 3.0])  # no match leads back from there
    smooth = smooth_flow(BidirectionalFlow(wrong, -there), 1)
    torch.testing.assert_close(smooth.forward, there, rtol=0, atol=0.02)


def test_joined_features_average_the_cosines():
    blocks = randn(2, 6, 4, 5), randn(2, 3, 2, 3, seed=1)
    joined = join_features(blocks, (4, 5))
    assert joined.shape == (2, 9, 4, 5)

    def cosines(features):
        first, second = F.normalize(features.flatten(2), dim=1)
        return first.T @ second

    fine = F.interpolate(blocks[1], size=(4, 5), mode="bilinear", align_corners=False)
    mean = (cosines(blocks[0]) + cosines(fine)) / 2
    torch.testing.assert_close(cosines(joined), mean, rtol=0, atol=1e-12)


def test_leaves_its_inputs_alone():
    features = randn(2, 4, 5, 6)
    before = features.clone()
    match_features(features, (5, 6))
    assert torch.equal(features, before)


# What rests


def test_a_doubtful_cell_rests_where_it_looks_as_well_like_itself():
    """Two images of one ground with a thing on it that moves; the ground's features differ by noise alone."""
    h = w = 12
    generator = torch.Generator().manual_seed(0)
    ground = torch.ones(1, 8, 1, 1, dtype=torch.float64).expand(2, 8, h, w)
    features = ground + 0.05 * torch.randn(2, 8, h, w, dtype=torch.float64, generator=generator)
    thing = torch.randn(8, 3, 3, dtype=torch.float64, generator=generator)
    features[0, :, 2:5, 2:5] = features[1, :, 7:10, 7:10] = 4 * thing
    flow = match_features(features, (h, w))
    rests = resting_cells(features, flow, 0.15)
    assert not rests[0, 0, 2:5, 2:5].any()
    assert not rests[1, 0, 7:10, 7:10].any()
    sure = round_trip_error(flow) <= 1.5
    assert not (rests & sure).any()
    on_the_ground = torch.ones(2, 1, h, w, dtype=torch.bool)
    on_the_ground[:, :, 2:5, 2:5] = on_the_ground[:, :, 7:10, 7:10] = False
    assert torch.equal(rests & on_the_ground, ~sure & on_the_ground)
    assert resting_cells(features, flow, 0) is None
    regular = regularise(flow, 0, neighbourhood_mean, rests)
    assert not regular.stacked()[rests.expand(2, 2, h, w)].any()


def test_what_rests_is_the_loop():
    h, w, tolerance = 5, 7, 0.6
    features = randn(2, 6, h, w)
    flow = match_features(features, (h, w))
    rests, error, found = resting_cells(features, flow, tolerance), round_trip_error(flow), 0
    for image, way in enumerate((flow.forward[0], flow.backward[0])):
        for row in range(h):
            for column in range(w):
                dx, dy = way[:, row, column].int().tolist()
                own, other = features[image, :, row, column], features[1 - image]
                there = F.cosine_similarity(own, other[:, row + dy, column + dx], dim=0)
                better = there - F.cosine_similarity(own, other[:, row, column], dim=0) >= tolerance
                expected = bool(error[image, 0, row, column] > 1.5 and not better)
                assert bool(rests[image, 0, row, column]) == expected
                found += expected
    assert 0 < found < int((error > 1.5).sum())


def test_what_rests_is_trusted_in_the_first_pass_more_than_its_match():
    flow, rests = BidirectionalFlow.of(2 * randn(2, 2, 6, 7)), randn(2, 1, 6, 7, seed=1) > 0
    begun = torch.where(rests, 0, flow.stacked())
    weight = agreement(BidirectionalFlow.of(begun))
    assert (weight[rests] < REST_WEIGHT).any()
    once = neighbourhood_mean(begun, torch.where(rests, weight.clamp(min=REST_WEIGHT), weight))
    twice = neighbourhood_mean(once, agreement(BidirectionalFlow.of(once)))
    for passes, expected in enumerate((begun, once, twice)):
        torch.testing.assert_close(regularise(flow, passes, neighbourhood_mean, rests).stacked(), expected)


def test_regularising_by_means_is_smoothing():
    flow = BidirectionalFlow(2 * randn(1, 2, 6, 7, seed=1), 2 * randn(1, 2, 6, 7, seed=2))
    assert_same_flow(regularise(flow, 2, neighbourhood_mean), smooth_flow(flow, 2))


def test_threads_that_ask_for_exact_products_leave_the_settings_as_they_were():
    backend = torch.backends.cuda.matmul
    name, lower = ("fp32_precision", "tf32") if hasattr(backend, "fp32_precision") else ("allow_tf32", True)
    before = getattr(backend, name)
    first_in, second_in, first_out = threading.Event(), threading.Event(), threading.Event()

    def first():
        with exact_matmul("cpu"):
            first_in.set()
            second_in.wait(0.2)  # which does not come, as the second waits for its turn
        first_out.set()

    def second():
        first_in.wait()
        with exact_matmul("cpu"):
            second_in.set()
            first_out.wait(0.2)

    setattr(backend, name, lower)
    try:
        threads = [threading.Thread(target=work) for work in (first, second)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert getattr(backend, name) == lower
    finally:
        setattr(backend, name, before)
