# SPDX-License-Identifier: Apache-2.0
"""A flow that the user brings: it arrives on the latent grid as it was meant, and nothing else is taken for one."""

import math

import numpy as np
import pytest
import torch
from support.sequences import three_photos

from dreammover_pipeline.fields import cell_grid
from dreammover_pipeline.flow import agreement, neighbourhood_mean
from dreammover_pipeline.framing import fit_points, unfit_points
from dreammover_pipeline.given_flow import LONGEST_WAY, GivenFlow, called_flow, given_flow, smoothed_flow
from dreammover_pipeline.records import BidirectionalFlow, Canvas
from dreammover_pipeline.rigid import similarity_flow
from dreammover_pipeline.steering import Steering

CELL = 8
CANVAS = Canvas(height=64, width=96, content_height=60, content_width=90, output_height=120, output_width=180)
SIZES = (120, 180), (200, 100)  # of the second photo much is cropped: it is upright, and the canvas is not
GRID = (8, 12)
TURN = 1.1 * np.exp(0.2j)  # of the similarity on the canvas: turned and enlarged
SHIFT = 3 - 2j  # pixels of the canvas


def places_of(size):
    """The place of every pixel of a picture of this size, (H·W, 2), float64."""
    return cell_grid(*size, torch.zeros(0, dtype=torch.float64))[0].flatten(1).T


def turned(points, back=False):
    """Where a similarity about the middle of the canvas leads points (k, 2) of the canvas, or leads them back."""
    z, middle = torch.view_as_complex(points.contiguous()), 47.5 + 31.5j
    moved = (z - middle - SHIFT) / TURN + middle if back else (z - middle) * TURN + middle + SHIFT
    return torch.view_as_real(moved)


def arrays():
    """The similarity as flow in the pixels of two photos of other sizes than the canvas, float64."""
    both = []
    for own, other, back in ((*SIZES, False), (*SIZES[::-1], True)):
        places = places_of(own)
        ends = unfit_points(turned(fit_points(places, own, CANVAS), back), other, CANVAS)
        both.append((ends - places).T.unflatten(1, own))
    return both


def expected():
    """The similarity on the latent grid, (2, 2, h, w) in cells."""
    centres = (places_of(GRID) + 0.5) * CELL - 0.5
    return torch.stack([((turned(centres, b) - centres) / CELL).T.unflatten(1, GRID) for b in (False, True)])


def shown(field):
    """The part of a field on the latent grid that lies on the picture wholly, and not on padding."""
    return field[..., : CANVAS.content_height // CELL, : CANVAS.content_width // CELL]


def same(a, b, tolerance=1e-3):
    return torch.allclose(a.double(), b.double(), atol=tolerance, rtol=0)


def stacked(pair, sizes=SIZES):
    return given_flow(pair, sizes, CANVAS, CELL).flow.stacked()


def hidden(field, *, known):
    """A field with NaN everywhere but where it is known."""
    return torch.where(known, field, torch.nan)


# ── Onto the grid ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("size", [(64, 96), (13, 400), (3000, 17), (1, 1)])
def test_points_come_back_from_the_canvas(size):
    places = places_of(GRID) * 1.7 - 2
    assert same(fit_points(unfit_points(places, size, CANVAS), size, CANVAS), places, 1e-9)


def test_a_similarity_between_photos_of_two_sizes_arrives_as_it_is():
    given = given_flow(arrays(), SIZES, CANVAS, CELL)
    assert given.known.all()
    assert given.flow.forward.dtype == torch.float32
    assert same(shown(given.flow.stacked()), shown(expected()))


@pytest.mark.parametrize("dtype", [np.float32, np.dtype(">f8"), np.float16])
def test_arrays_and_tensors_of_any_kind_are_the_same_flow(dtype):
    pair = arrays()
    as_arrays = tuple(field.numpy().astype(dtype)[:, ::-1].copy()[:, ::-1] for field in pair)  # rows from the last on
    assert same(stacked(as_arrays), stacked(pair), 0.1 if dtype is np.float16 else 1e-4)
    whole = [torch.full((2, *size), 4) for size in SIZES]
    flow = stacked([field.double().requires_grad_() for field in whole])
    assert not flow.requires_grad
    assert torch.equal(stacked(whole), flow)
    for integer in (np.uint8, np.int16):
        assert torch.equal(stacked([field.numpy().astype(integer) for field in whole]), flow)


def test_it_goes_to_another_device_with_what_is_known_of_it():
    moved = given_flow(GOOD, SIZES, CANVAS, CELL).to(torch.device("meta"))
    assert {tensor.device.type for tensor in (moved.flow.forward, moved.flow.backward, moved.known)} == {"meta"}


def test_rest_on_the_canvas_is_rest():
    """Each place of one photo leads to where the other photo is put over it."""
    pair = []
    for own, other in (SIZES, SIZES[::-1]):
        places = places_of(own)
        ends = unfit_points(fit_points(places, own, CANVAS), other, CANVAS)
        pair.append((ends - places).T.unflatten(1, own))
    assert same(stacked(pair), torch.zeros(2, 2, *GRID), 1e-4)


def test_cells_beyond_the_middles_of_a_photos_outer_pixels_move_like_these():
    """A photo of 2×3 pixels whose pixels lead to those of the same number in a photo of 4×6."""
    size = (CANVAS.height, CANVAS.width)
    sizes = (2, 3), (4, 6)  # a pixel is 4 cells wide in one and 2 in the other
    still = [torch.zeros(2, *photo) for photo in sizes]
    flow = given_flow(still, sizes, Canvas(*size, *size, *size), CELL).flow
    column = ((torch.arange(12) + 0.5) / 4 - 0.5).clamp(0, 2)
    row = ((torch.arange(8) + 0.5) / 4 - 0.5).clamp(0, 1)
    expected = torch.stack([(-2 * (column + 0.5)).expand(8, 12), (-2 * (row + 0.5))[:, None].expand(8, 12)])
    assert same(flow.forward[0], expected)


def test_a_function_gives_what_its_arrays_give():
    size = (CANVAS.height, CANVAS.width)
    photos = torch.rand(2, 3, *size)
    whole = Canvas(*size, *size, *size)
    pair = torch.randn(2, 2, *size)
    seen = []

    def function(first, second):
        seen.extend([first, second])
        return pair[0].numpy(), pair[1]

    found = called_flow(function, photos, CANVAS, CELL)
    assert torch.equal(torch.stack(seen), photos)
    assert torch.equal(found.flow.stacked(), given_flow(list(pair), (size, size), whole, CELL).flow.stacked())


def test_what_was_given_is_left_as_it_was():
    pair = arrays()
    pair[0][0, 3:50] = torch.nan
    before = [field.clone() for field in pair]
    given_flow(pair, SIZES, CANVAS, CELL)
    for field, copy in zip(pair, before, strict=True):
        assert torch.equal(field.nan_to_num(99), copy.nan_to_num(99))


# ── What is unknown ────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_single_track_in_a_cell_is_its_flow():
    """Of every cell one pixel is known, and of each only by its own track."""
    pair = arrays()
    tracks = []
    for field, size in zip(pair, SIZES, strict=True):
        cells = (fit_points(places_of(size), size, CANVAS) + 0.5).div(CELL).floor().T.unflatten(1, size)
        first = torch.zeros(size, dtype=torch.bool)
        for x in range(GRID[1]):
            for y in range(GRID[0]):
                inside = ((cells[0] == x) & (cells[1] == y)).nonzero()
                if len(inside):
                    first[tuple(inside[len(inside) // 2])] = True
        tracks.append(hidden(field, known=first))
    given = given_flow(tracks, SIZES, CANVAS, CELL)
    assert shown(given.known).all()
    assert same(shown(given.flow.stacked()), shown(expected()), 0.25)  # a pixel of a cell moves nearly as its centre


def test_one_pixel_in_the_first_and_one_in_the_last_cell_are_known_there():
    size = (CANVAS.height, CANVAS.width)
    field = torch.full((2, *size), torch.nan)
    field[:, 0, 0], field[:, -1, -1] = 4.0, -4.0
    given = given_flow([field, field], (size, size), Canvas(*size, *size, *size), CELL)
    assert given.known.nonzero().tolist() == [[way, 0, *cell] for way in (0, 1) for cell in ((0, 0), (7, 11))]
    for way in (given.flow.forward, given.flow.backward):
        assert same(way[0, :, 0, 0], torch.full((2,), 0.5))
        assert same(way[0, :, -1, -1], torch.full((2,), -0.5))


def test_what_is_filled_in_lies_between_the_middles_of_blocks():
    """Columns 0 and 1 rest, column 3 moves by 8 cells: the middles of their blocks lie at columns 0.5 and 2.5."""
    field = torch.zeros(2, 16, 32)
    field[0, :, 16:24], field[0, :, 24:] = torch.nan, 64.0
    given = given_flow([field, field], ((16, 32), (16, 32)), Canvas(16, 32, 16, 32, 16, 32), CELL)
    expected = torch.tensor([0.0, 0, 6, 8]).expand(2, 4)
    assert same(given.flow.stacked(), torch.stack([expected, torch.zeros(2, 4)]).expand(2, 2, 2, 4))


def test_a_component_that_is_unknown_makes_the_other_one_unknown():
    pair = arrays()
    pair[1][1, :, 40:] = torch.nan
    both = [pair[0], hidden(pair[1], known=~pair[1].isnan().any(0))]
    given, same_given = (given_flow(each, SIZES, CANVAS, CELL) for each in (pair, both))
    assert torch.equal(given.known, same_given.known)
    assert torch.equal(given.flow.stacked(), same_given.flow.stacked())
    assert given.known[0].all()
    assert not given.known[1].all()


@pytest.mark.parametrize("passes", [0, 1, 3])
@pytest.mark.parametrize("regulariser", [neighbourhood_mean, similarity_flow])
def test_a_shift_that_is_known_in_one_corner_is_the_shift_everywhere(passes, regulariser):
    size = (CANVAS.height, CANVAS.width)
    whole = Canvas(*size, *size, *size)
    pair = [torch.full((2, *size), way) for way in (8.0, -8.0)]
    for field in pair:
        field[:, 16:] = field[:, :, 20:] = torch.nan
    given = given_flow(pair, (size, size), whole, CELL)
    assert given.known.sum() == 2 * 2 * 3
    flow = smoothed_flow(given, passes, regulariser, None)
    assert same(flow.forward, torch.ones(1, 2, *GRID))
    assert same(flow.backward, -torch.ones(1, 2, *GRID))


def test_smoothing_keeps_a_similarity_and_outvotes_what_is_filled_in():
    pair = arrays()
    pair[0][:, 16:80, 32:112] = torch.nan  # four by five cells
    given = given_flow(pair, SIZES, CANVAS, CELL)
    assert not given.known.all()
    before, after = (smoothed_flow(given, passes, similarity_flow, None).stacked() for passes in (0, 1))
    hole = (0, slice(None), slice(1, 5), slice(2, 7))
    errors = [(flow - expected())[hole].abs().max() for flow in (before, after)]
    assert errors[1] < 0.01 < 0.1 < errors[0]
    nothing_said = Steering(torch.zeros(0, 2, 2), torch.ones(2, 1, *GRID, dtype=torch.bool))
    assert torch.equal(smoothed_flow(given, 1, similarity_flow, nothing_said).stacked(), after)
    assert same(shown(after), shown(expected()), 0.1)


def test_what_is_filled_in_has_the_least_weight_and_the_rest_that_of_its_agreement():
    generator = torch.Generator().manual_seed(0)
    flow = BidirectionalFlow.of(torch.randn(2, 2, *GRID, generator=generator))
    known = torch.rand(2, 1, *GRID, generator=generator) < 0.5
    expected = neighbourhood_mean(flow.stacked(), torch.where(known, agreement(flow), 1e-3))
    for steering in (None, Steering(torch.zeros(0, 2, 2), torch.ones(2, 1, *GRID, dtype=torch.bool))):
        found = smoothed_flow(GivenFlow(flow, known), 1, neighbourhood_mean, steering).stacked()
        assert same(found, expected, 1e-5)


def test_points_and_mask_hold_in_a_flow_of_the_users_own():
    moves = torch.ones(2, 1, *GRID, dtype=torch.bool)
    moves[:, :, :, 8:] = False
    steering = Steering(torch.tensor([[[3.0, 4.0], [5.0, 5.0]]]), moves)
    flow = smoothed_flow(given_flow(arrays(), SIZES, CANVAS, CELL), 2, similarity_flow, steering)
    assert flow.forward[0, :, 4, 3].tolist() == [2, 1]
    assert flow.backward[0, :, 5, 5].tolist() == [-2, -1]
    assert (flow.stacked()[..., 8:] == 0).all()
    assert (flow.forward[0, 0, :, :8] != 0).all()


# ── Refusals ───────────────────────────────────────────────────────────────────────────────────────────────────────


def zeros(size, dtype=np.float32):
    return np.zeros((2, *size), dtype)


GOOD = zeros(SIZES[0]), zeros(SIZES[1])


@pytest.mark.parametrize(
    ("pair", "error", "fault"),
    [
        (GOOD[:1], TypeError, "`flow` must be a pair of arrays, .*, not 1 entries"),
        ((*GOOD, None), TypeError, "`flow` must be a pair of arrays, .*, not 3 entries"),
        (torch.zeros(2, 2, *SIZES[0]), TypeError, "`flow` must be a pair of arrays, .*, not a Tensor"),
        (GOOD[::-1], ValueError, r"the forward part of `flow` must be \(2, 120, 180\), .* not \(2, 200, 100\)"),
        ((GOOD[0], np.moveaxis(GOOD[1], 0, -1)), ValueError, r"the backward part .* not \(200, 100, 2\)"),
        ((GOOD[0], GOOD[1][None]), ValueError, r"the backward part .* not \(1, 2, 200, 100\)"),
        ((GOOD[0], GOOD[1][..., None]), ValueError, r"the backward part .* not \(2, 200, 100, 1\)"),
        ((GOOD[0], GOOD[1].tolist()), TypeError, "the backward part .* a numpy array or a torch tensor, not a list"),
        ((zeros(SIZES[0], complex), GOOD[1]), TypeError, "the forward part .* must hold real numbers, not complex128"),
        ((zeros(SIZES[0], bool), GOOD[1]), TypeError, "must hold real numbers, not bool"),
        ((zeros(SIZES[0], object), GOOD[1]), TypeError, "must hold real numbers, not object"),
        ((torch.zeros(2, *SIZES[0]) * 1j, GOOD[1]), TypeError, "must hold real numbers, not torch.complex64"),
        ((torch.zeros(2, *SIZES[0]) > 0, GOOD[1]), TypeError, r"must hold real numbers, not torch\.bool"),
        ((torch.zeros(2, *SIZES[0]).to_sparse(), GOOD[1]), TypeError, r"must be dense, not torch\.sparse_coo"),
        ((np.stack([GOOD[0][0] + math.nan, GOOD[0][1] - math.inf]), GOOD[1]), ValueError, r"at most .*, not inf"),
        ((GOOD[0] + math.inf, GOOD[1]), ValueError, f"at most {LONGEST_WAY} pixels, and NaN where .*, not inf"),
        ((GOOD[0].astype(float) - 1e300, GOOD[1]), ValueError, f"at most {LONGEST_WAY} pixels"),
        ((GOOD[0] + 2e6, GOOD[1]), ValueError, f"at most {LONGEST_WAY} pixels, .* not 2e\\+06"),
        ((GOOD[0], GOOD[1] * math.nan), ValueError, "the backward part of `flow` must be known somewhere"),
    ],
)
def test_what_is_no_flow_is_refused(pair, error, fault):
    with pytest.raises(error, match=fault):
        given_flow(pair, SIZES, CANVAS, CELL)


def test_a_displacement_of_a_million_pixels_is_the_longest():
    for way in (1_000_000, -1_000_000):
        assert given_flow((GOOD[0] + way, GOOD[1]), SIZES, CANVAS, CELL).known.all()
        with pytest.raises(ValueError, match=r"at most 1000000 pixels"):
            given_flow((GOOD[0] + way * 1.00001, GOOD[1]), SIZES, CANVAS, CELL)


def test_a_flow_that_is_known_only_where_the_photo_is_cropped_is_refused():
    for size in (SIZES[1], (100, 400)):  # of 200 rows the middle 66 are shown, of 400 columns the middle 150
        for known in (slice(60), slice(-60, None)):
            field = np.full((2, *size), math.nan)
            if size == SIZES[1]:
                field[:, known] = 0
            else:
                field[:, :, known] = 0
            with pytest.raises(ValueError, match=r"the backward part of `flow` must be known somewhere"):
                given_flow((GOOD[0], field), (SIZES[0], size), CANVAS, CELL)


# ── The pipeline ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def fast(fast):
    """Arguments of `prepare`."""
    return {name: value for name, value in fast.items() if name not in ("n_frames", "detail", "output_type")}


def same_flow(one, other):
    return torch.equal(one.stacked(), other.stacked())


def test_the_names_are_with_and_without_the_refinement(pipe, photos, fast):
    plain = pipe.prepare(*photos, **fast).flow
    features = pipe.prepare(*photos, **fast, flow="features").flow
    assert same_flow(pipe.prepare(*photos, **fast, flow="features+photos").flow, plain)
    assert same_flow(pipe.prepare(*photos, **fast, photo_tolerance=0).flow, features)
    assert not same_flow(features, plain)


def test_a_flow_of_the_users_own_is_that_of_the_pair(pipe, photos, fast):
    """Nothing is matched and nothing refined, and a batch takes one of each kind."""
    pair = [
        np.full((2, photo.height, photo.width), way, np.float32) for photo, way in zip(photos, (8, -8), strict=True)
    ]
    flow = pipe.prepare(*photos, **fast, flow=pair).flow
    assert same(flow.forward, torch.ones(1, 2, 8, 8))
    assert same(flow.backward, -torch.ones(1, 2, 8, 8))
    seen = []

    def function(first, second):
        seen.extend([first, second])
        return pair

    flows = pipe(
        [photos[0]] * 3, [photos[1]] * 3, **fast, n_frames=1, output_type="latent", flow=[function, pair, "features"]
    ).flow
    assert same_flow(flows[0], flow)
    assert same_flow(flows[1], flow)
    assert same_flow(flows[2], pipe.prepare(*photos, **fast, flow="features").flow)
    assert [(image.shape, image.dtype) for image in seen] == [((3, 64, 64), torch.float32)] * 2


def test_what_is_no_flow_is_refused_before_any_model_runs(pipe, photos, fast):
    runs = []
    for model in (pipe.unet, pipe.vae.encoder, pipe.text_encoder):
        model.register_forward_pre_hook(lambda module, inputs: runs.append(module))
    for refused, error, fault in (
        ("raft", ValueError, "^`flow` must be one of 'features\\+photos', 'features', not 'raft'"),
        (None, TypeError, "^`flow` must be 'features\\+photos' or 'features', a function .*, not a NoneType"),
        (np.zeros((2, 2, 64, 64)), TypeError, "^`flow` must be .* a pair of arrays.*, not a ndarray"),
        ([np.zeros((2, 64, 64)), np.zeros((2, 8, 8))], ValueError, "^the backward part of `flow` must be"),
    ):
        for method in (pipe, pipe.prepare):
            with pytest.raises(error, match=fault):
                method(*photos, **fast, flow=refused)
    batch = [photos[0]] * 2, [photos[1]] * 2
    for refused, error, fault in (
        (["features"], ValueError, "^`flow` has 1 entries for 2 pairs of images"),
        (["features", "raft"], ValueError, r"^`flow\[1\]` must be one of"),
        (["features", None], TypeError, r"^`flow\[1\]` must be"),
        ({}, TypeError, "^`flow` must be a list here, with one entry for each pair of images, not a dict"),
    ):
        with pytest.raises(error, match=fault):
            pipe(*batch, **fast, flow=refused)
    with pytest.raises(ValueError, match=r"^`flow` has 1 entries for 2 pairs"):
        pipe.interpolate_sequence(three_photos(photos), **fast, flow=["features"])
    assert runs == []


def test_a_function_that_returns_no_flow_is_told_so_before_the_unet_runs(pipe, photos, fast):
    runs = []
    pipe.unet.register_forward_pre_hook(lambda module, inputs: runs.append(module))
    with pytest.raises(TypeError, match=r"^what `flow` returned must be a pair of arrays, .*, not a Tensor"):
        pipe.prepare(*photos, **fast, flow=lambda first, second: first)
    with pytest.raises(ValueError, match=r"^the forward part of what `flow` returned must be \(2, 64, 64\)"):
        pipe.prepare(*photos, **fast, flow=lambda first, second: (first, second))
    assert runs == []
