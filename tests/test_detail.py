# SPDX-License-Identifier: Apache-2.0
"""Detail of the photos in frames: its algebra, and a reference that makes every pixel by itself."""

import math
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from support import naive

from dreammover_pipeline import detail
from dreammover_pipeline.arguments import taken
from dreammover_pipeline.detail import (
    FAINT,
    SAMPLES,
    Axis,
    Candidates,
    PairDetail,
    Sources,
    _costs,
    drawn_at_once,
    frame_sources,
    lookup_flow,
    plan_detail,
    with_detail,
)
from dreammover_pipeline.flow import agreement
from dreammover_pipeline.framing import fit, unfit
from dreammover_pipeline.paths import rigid_paths, straight_paths
from dreammover_pipeline.records import BidirectionalFlow, Canvas
from dreammover_pipeline.settings import PREPARING
from dreammover_pipeline.tiny.world import World

CELL = 4  # pixels a side of a cell on the canvas of these tests


def picture(height, width, seed=0, smooth=8):
    """A picture (3, height, width) that is smooth over some pixels and has fine detail besides."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, height // smooth + 2, width // smooth + 2, generator=generator)
    fine = torch.rand(3, height, width, generator=generator)
    return 0.8 * F.interpolate(coarse, (height, width), mode="bicubic")[0].clamp(0, 1) + 0.2 * fine


def still(h, w):
    return BidirectionalFlow(torch.zeros(1, 2, h, w), torch.zeros(1, 2, h, w))


def pair_of(first, last, canvas, flow, paths=rigid_paths, error=0.0, moved=False):
    working = torch.stack([fit(image, canvas) for image in (first, last)])
    return PairDetail.of((first, last), working, (working + error).clamp(0, 1), canvas, flow, paths(flow), moved)


def canvas_of(height, width, content_height=None, content_width=None, scale=4):
    content = content_height or height, content_width or width
    return Canvas(height, width, *content, round(scale * content[0]), round(scale * content[1]))


CANVASES = [
    canvas_of(48, 64),
    canvas_of(48, 64, 45, 62, 3.3),
    canvas_of(40, 40, scale=0.7),
    canvas_of(40, 40, scale=1),
]


@pytest.mark.parametrize("canvas", CANVASES)
@pytest.mark.parametrize("time", [0.0, 0.3, 1.0])
def test_what_rests_comes_back_as_the_photo(canvas, time):
    photo = picture(canvas.output_height, canvas.output_width)
    pair = pair_of(photo, photo, canvas, still(canvas.height // CELL, canvas.width // CELL))
    frame = with_detail(pair, fit(photo, canvas), time)
    assert frame.shape == photo.shape
    off = (frame - photo).abs()
    assert off.mean() < 0.01
    # Beside what pads the canvas it is not any less so.
    assert off[..., -4:].mean() < 0.01
    assert off[..., -4:, :].mean() < 0.01
    assert off.mean() < 0.5 * (unfit(fit(photo, canvas)[None], canvas)[0] - photo).abs().mean() + 1e-3


@pytest.mark.parametrize("canvas", CANVASES)
def test_strips_are_the_whole_to_the_bit(canvas):
    first, last = (picture(canvas.output_height, canvas.output_width, seed) for seed in (1, 2))
    h, w = canvas.height // CELL, canvas.width // CELL
    flow = BidirectionalFlow.of(2 * torch.randn(2, 2, h, w, generator=torch.Generator().manual_seed(3)))
    pair = pair_of(first, last, canvas, flow)
    base = fit(picture(canvas.output_height, canvas.output_width, 4), canvas)
    whole = with_detail(pair, base, 0.4, strip_pixels=10**9)
    for columns in (1, 7, 16):
        assert torch.equal(with_detail(pair, base, 0.4, strip_pixels=columns * canvas.output_height), whole)


def test_a_frame_that_is_drawn_at_once_is_that_of_strips(monkeypatch):
    canvas, time = CANVASES[1], 0.25
    first, last, base = (picture(canvas.output_height, canvas.output_width, seed) for seed in (1, 2, 4))
    flow = still(canvas.height // CELL, canvas.width // CELL)
    pair, base = pair_of(first, last, canvas, flow), fit(base, canvas)
    monkeypatch.setattr(detail, "STRIP_PIXELS", 7 * canvas.output_height)
    drawn = drawn_at_once(pair, base, torch.tensor(time))
    # Powers of a tensor are rounded in another way than those of a number.
    assert (drawn - with_detail(pair, base, time)).abs().quantile(0.99) < 1e-6


def test_candidates_may_be_compared_a_few_at_a_time(monkeypatch):
    canvas = CANVASES[0]
    first, last, base = (picture(canvas.output_height, canvas.output_width, seed) for seed in (1, 2, 4))
    h, w = canvas.height // CELL, canvas.width // CELL
    flow = BidirectionalFlow.of(2 * torch.randn(2, 2, h, w, generator=torch.Generator().manual_seed(3)))
    pair, base = pair_of(first, last, canvas, flow), fit(base, canvas)
    together = with_detail(pair, base, 0.4)
    monkeypatch.setattr(detail, "PLACES_AT_ONCE", 3 * pair.small[0, 0].numel())
    assert torch.equal(with_detail(pair, base, 0.4), together)


@pytest.mark.parametrize("paths", [rigid_paths, straight_paths])
def test_what_is_shifted_is_found_between(paths):
    canvas = canvas_of(64, 64)
    wide = picture(256, 256 + 32, seed=5)
    at = [wide[:, :, start : start + 256] for start in (0, 16, 32)]  # which moves the picture by 2 cells of 16 pixels
    ways = torch.zeros(2, 2, 16, 16)
    ways[0, 0], ways[1, 0] = -2, 2
    pair = pair_of(at[0], at[2], canvas, BidirectionalFlow.of(ways), paths)
    frame = with_detail(pair, fit(at[1], canvas), 0.5)
    inner = (..., slice(16, -16), slice(48, -48))
    assert (frame - at[1])[inner].abs().mean() < 0.01


def test_where_the_photos_contradict_the_frame_the_frame_stays():
    canvas = canvas_of(48, 48)
    photo = picture(192, 192)
    pair = pair_of(photo, photo, canvas, still(12, 12))
    other = fit(picture(192, 192, 9).flip(0) ** 4, canvas)
    far = (F.interpolate(other[None] - pair.small[:1, :3], scale_factor=4).abs().mean(1) > 0.4)[0]
    frame, enlarged = with_detail(pair, other, 0.5), unfit(other[None], canvas)[0]
    assert far.any()
    assert (frame - enlarged).abs().mean(0)[far].mean() < 0.1 * (frame - photo).abs().mean(0)[far].mean()


def test_what_both_photos_show_alike_is_taken_also_where_diffusion_has_drawn_something_faint_upon_it():
    canvas = canvas_of(48, 48)
    first = picture(192, 192)
    last = first.clone()
    last[..., 96:] = picture(192, 96, 9)
    mixed = fit((first + last) / 2, canvas)
    drawn = mixed.clone()
    drawn[:, 20:28] += torch.where(drawn[:, 20:28] < 0.5, 0.25, -0.25)
    resting, moved = (
        plan_detail(pair_of(first, last, canvas, still(12, 12), moved=moved), drawn, 0.5).taken[0, 20:28]
        for moved in (False, True)
    )
    assert resting.mean() < 0.3
    assert moved[:, :20].mean() > 0.8
    assert (moved - resting)[:, 28:].abs().mean() < 0.02  # where the photos differ, the frame decides as before
    undisturbed = plan_detail(pair_of(first, last, canvas, still(12, 12), moved=True), mixed, 0.5)
    assert undisturbed.taken[0, :, :20].min() > 0.95


def test_a_thing_whose_way_was_not_found_stays_before_a_ground_that_both_photos_show():
    canvas = canvas_of(48, 48)
    ground = torch.full((3, 192, 192), 0.8)
    drawn = fit(ground, canvas)
    drawn[:, 16:32, 16:32] = 0.2
    plan = plan_detail(pair_of(ground, ground, canvas, still(12, 12), moved=True), drawn, 0.5)
    assert plan.taken[0, 20:28, 20:28].max() < 0.05
    assert plan.taken[0, :8].min() > 0.99


def test_where_the_vae_cannot_be_trusted_the_photos_are():
    canvas = canvas_of(48, 48)
    photo = picture(192, 192)
    blank = torch.full((3, 48, 48), 0.5)
    stays, goes = (
        with_detail(pair_of(photo, photo, canvas, still(12, 12), error=error), blank, 0.5)
        for error in (0.0, torch.randn(2, 3, 1, 1) + 0.3 * torch.randn(48, 48))
    )
    assert (goes - photo).abs().mean() < 0.5 * (stays - photo).abs().mean()


def test_an_error_that_a_tenth_of_the_pair_exceeds_is_assumed_everywhere():
    canvas = canvas_of(48, 48)
    photo = picture(192, 192)
    for side, everywhere in ((20, True), (4, False)):
        error = torch.zeros(48, 48)
        error[:side, :side] = 0.4  # at a corner; the error around it is blurred
        assumed = pair_of(photo, photo, canvas, still(12, 12), error=error).small[:, 3]
        assert (assumed.min() > 0.01) == everywhere
        assert (assumed.min() < 1e-6) != everywhere
        assert assumed[:, 0, 0].min() > 0.1


def test_light_is_that_of_the_frame_unless_the_vae_tints():
    canvas = canvas_of(48, 48)
    photo = picture(192, 192) * 0.8
    tinted = fit(photo, canvas) + 0.025
    trusted, doubted = (
        plan_detail(pair_of(photo, photo, canvas, still(12, 12), error=error), tinted, 0.5) for error in (0.0, 0.1)
    )
    assert trusted.added.mean() > 0.01
    assert trusted.taken.mean() > 0.99  # what is light is no difference of content, which would make it 0.97
    assert doubted.added.abs().max() < 0.001


def test_light_changes_evenly():
    canvas = canvas_of(64, 64)
    photo = 0.2 + 0.3 * picture(256, 256)
    pair = pair_of(photo, 2 * photo, canvas, still(16, 16))
    for time in (0.25, 0.5):
        truth = photo * 2**time
        assert (with_detail(pair, fit(truth, canvas), time) - truth).abs().mean() < 0.01


def test_every_pixel_is_that_of_the_equation():
    """The equation at the head of the module, pixel by pixel in float64, from what `plan_detail` decides."""
    canvas, time = canvas_of(40, 48, 38, 45, 2.5), 0.3
    first, last = (picture(canvas.output_height, canvas.output_width, seed, 4).double() for seed in (1, 2))
    h, w = canvas.height // CELL, canvas.width // CELL
    ways = torch.randn(2, 2, h, w, generator=torch.Generator().manual_seed(3)).double()
    pair = pair_of(first, last, canvas, BidirectionalFlow.of(ways))
    base = fit(0.5 * (first + last), canvas)
    plan, frame = plan_detail(pair, base, time), with_detail(pair, base, time)
    enlarged = unfit(base[None], canvas)[0].double()
    first_share, last_share = plan.sources.shares(time)
    key = 3 * plan.sources.index + plan.sources.shown

    def between(field, y, x):  # bilinear between the middles of places
        i, j = math.floor(y - 0.5), math.floor(x - 0.5)
        total = 0
        for a, b in ((0, 0), (0, 1), (1, 0), (1, 1)):
            part = (1 - abs(y - 0.5 - i - a)) * (1 - abs(x - 0.5 - j - b))
            at = min(max(i + a, 0), field.shape[-2] - 1), min(max(j + b, 0), field.shape[-1] - 1)
            total = total + part * field[(..., *at)]
        return total

    def looked_up(photo, source):
        gx = (source[0] + 0.5) * 2 * canvas.width / w / canvas.content_width - 1
        gy = (source[1] + 0.5) * 2 * canvas.height / h / canvas.content_height - 1
        value = F.grid_sample(
            photo[None],
            torch.stack([gx, gy]).reshape(1, 1, 1, 2),
            mode="bicubic",
            padding_mode="border",
            align_corners=False,
        )
        return value.reshape(3), float(abs(gx) < 1 and abs(gy) < 1)

    places = SAMPLES * canvas.content_height / canvas.height * h, SAMPLES * canvas.content_width / canvas.width * w
    generator = torch.Generator().manual_seed(4)
    for _ in range(60):
        row, column = (int(torch.randint(n, (), generator=generator)) for n in frame.shape[1:])
        y = (row + 0.5) * places[0] / canvas.output_height
        x = (column + 0.5) * places[1] / canvas.output_width
        at = math.floor(y), math.floor(x)
        z = torch.tensor([x / SAMPLES - 0.5, y / SAMPLES - 0.5], dtype=torch.float64)
        sums, total = [torch.zeros(3).double(), torch.zeros(3).double()], 0
        for k in range(len(key)):
            here = (k, *at)
            weight = between(((key == key[here]) * plan.sources.weight).sum(0), y, x)
            found = [
                looked_up(photo, source.reshape(2))
                for photo, source in zip(
                    (first, last),
                    plan.candidates.sources(plan.sources.index[here].reshape(1, 1, 1), z.reshape(2, 1, 1)),
                    strict=True,
                )
            ]
            shares = [float(share[here]) * on for share, (_, on) in zip((first_share, last_share), found, strict=True)]
            if sum(shares) < FAINT:
                continue
            for i in (0, 1):
                sums[i] += weight * shares[i] / sum(shares) * found[i][0]
            total += weight
        light = between(plan.light, y, x)
        taken = between(plan.taken, y, x)
        expected = (1 - taken) * enlarged[:, row, column] + between(plan.taken * plan.added, y, x)
        for i in (0, 1):
            expected = expected + between(plan.taken * plan.light, y, x)[i] * sums[i] / max(float(total), FAINT)
        assert light.shape == (2, 3)
        torch.testing.assert_close(frame[:, row, column].double(), expected.clamp(0, 1), atol=2e-5, rtol=0)


def sources_of(pair, frame, time):
    return frame_sources(pair, plan_detail(pair, frame, time), time)


@pytest.mark.parametrize("time", [0.2, 0.5, 1.0])
def test_what_rests_comes_from_both_photos_by_time(time):
    canvas = canvas_of(48, 48)
    photo = picture(192, 192)
    made = sources_of(pair_of(photo, photo, canvas, still(12, 12)), fit(photo, canvas), time)
    assert made.time == time
    expected = torch.tensor([1 - time, time]).reshape(2, 1, 1).expand_as(made.shares)
    torch.testing.assert_close(made.shares, expected, atol=1e-3, rtol=0)
    assert made.taken.min() > 0.95
    contradicted = sources_of(pair_of(photo, photo, canvas, still(12, 12)), 1 - fit(photo, canvas).round(), time)
    assert contradicted.taken.mean() < 0.1


def test_what_leaves_the_picture_comes_from_the_photo_that_it_is_in():
    canvas = canvas_of(48, 48)
    photos = [picture(192, 192, seed) for seed in (1, 2)]
    pair = pair_of(*photos, canvas, BidirectionalFlow.of(torch.full((2, 2, 12, 12), 30.0)))
    for image in (0, 1):
        shares = sources_of(pair, fit(photos[image], canvas), float(image)).shares
        torch.testing.assert_close(shares[image], torch.ones(48, 48))
        assert not shares[1 - image].any()


def test_a_candidate_costs_what_the_loop_says():
    """Places, colours and costs one by one, in complex numbers, for candidates of both photos and for rest."""
    canvas, time, (h, w) = canvas_of(24, 32, 22, 29), 0.3, (6, 8)
    generator = torch.Generator().manual_seed(3)
    photos = [picture(canvas.output_height, canvas.output_width, seed).double() for seed in (1, 2)]
    ways = 2 * torch.randn(2, 2, h, w, generator=generator).double()
    flow = BidirectionalFlow.of(ways)
    pair, sure = pair_of(*photos, canvas, flow), agreement(flow)
    lit = torch.rand(2, 4, SAMPLES * h, SAMPLES * w, generator=generator).double()
    lit[:, 3] /= 20  # the VAE's error
    frame = torch.rand(3, SAMPLES * h, SAMPLES * w, generator=generator).double()
    index = torch.randint(3 * h * w, (2, SAMPLES * h, SAMPLES * w), generator=generator)
    made = _costs(pair, Candidates.at(pair, time), index, lit, frame, time)

    def mean_off(first, second):
        return min(0.3, sum(abs(a - b) for a, b in zip(first, second, strict=True)) / 3)

    for k, row, column in product(range(2), range(0, 24, 3), range(0, 32, 5)):
        z = complex((column + 0.5) / SAMPLES - 0.5, (row + 0.5) / SAMPLES - 0.5)
        image, cell = divmod(int(index[k, row, column]), h * w)
        y, x = divmod(cell, w)

        def at_cell(field, y=y, x=x):
            return complex(*field[:, y, x].tolist())

        landing, sources, doubt = complex(x, y), [z, z], 1.0  # at rest
        if image < 2:
            gone = torch.tensor([time, 1 - time])[image]
            landing += at_cell(pair.paths.displacements(image, gone)[0])
            back, on = (at_cell(pair.paths.factor(image, gone, end)) for end in (0, 1))
            sources[image] = complex(x, y) + back * (z - landing)
            sources[1 - image] = complex(x, y) + at_cell(ways[image]) + on * (z - landing)
            doubt = 1 - float(sure[image, 0, y, x])
        seen = [0 < s.real + 0.5 < 29 / 4 and 0 < s.imag + 0.5 < 22 / 4 for s in sources]
        (first, last), errors = (
            [naive.colour_at(part, s, (h, w)) for part, s in zip(lit[:, some], sources, strict=True)]
            for some in (slice(3), slice(1, 4))
        )
        error = sum(e[2] * on for e, on in zip(errors, seen, strict=True)) / max(1, sum(seen))
        trust, here = 1 / (1 + (error / 0.02) ** 2), frame[:, row, column].tolist()
        mixed = [(1 - time) * a + time * b for a, b in zip(first, last, strict=True)]
        expected = [
            0.5 * mean_off(first, last) + trust * mean_off(mixed, here) + 0.5 * (not all(seen)),
            0.04 + trust * mean_off(first, here) + 0.5 * (not seen[0]),
            0.04 + trust * mean_off(last, here) + 0.5 * (not seen[1]),
        ]
        expected = [cost + 0.004 * abs(z - landing) + 0.01 * doubt for cost in expected]
        assert made[:, k, row, column].tolist() == pytest.approx(expected, abs=1e-5)


def test_a_photo_has_its_share_by_time_where_it_is_seen():
    sources = Sources(torch.zeros(3, 1, 1).long(), torch.arange(3).reshape(3, 1, 1), torch.full((3, 1, 1), 1 / 3))
    first, last = (share.flatten().tolist() for share in sources.shares(0.3))
    assert first == pytest.approx([0.7, 0.7, 0], abs=2 * FAINT)
    assert last == pytest.approx([0.3, 0, 0.3], abs=2 * FAINT)


def test_the_flow_is_aligned_with_what_the_photos_have_of_finer_detail():
    wide = picture(256, 256 + 32, seed=5, smooth=16)
    photos = wide[..., 32:], wide[..., :-32]  # moved by 2 cells of 16 pixels
    truth = torch.zeros(2, 2, 16, 16)
    truth[0, 0], truth[1, 0] = 2, -2
    rough = BidirectionalFlow.of(truth + 0.3)
    made = lookup_flow(rough, photos, canvas_of(64, 64)).stacked()
    inner = (..., slice(3, -3), slice(4, -4))
    assert (made - truth)[inner].abs().mean() < 0.05
    canvas = canvas_of(64, 64, scale=1)
    assert torch.equal(lookup_flow(rough, [fit(p, canvas) for p in photos], canvas).stacked(), rough.stacked())


def test_in_eight_bits_colours_are_rounded():
    canvas = canvas_of(24, 32)
    photos = [picture(canvas.output_height, canvas.output_width, seed) for seed in (1, 2)]
    pair, base = pair_of(*photos, canvas, still(6, 8)), fit(photos[0], canvas)
    expected = (255 * with_detail(pair, base, 0.4)).round()
    assert torch.equal(with_detail(pair, base, 0.4, torch.uint8), expected.to(torch.uint8))


def test_equal_candidates_are_taken_together():
    index = torch.tensor([5, 7, 5, 5]).reshape(4, 1, 1)
    shown = torch.tensor([0, 0, 0, 1]).reshape(4, 1, 1)
    weight = torch.tensor([0.1, 0.3, 0.35, 0.25]).reshape(4, 1, 1)
    kept = Sources(index, shown, weight).kept(3)
    assert kept.index.flatten().tolist() == [5, 7, 5]
    assert kept.shown.flatten().tolist() == [0, 0, 1]
    torch.testing.assert_close(kept.weight.flatten(), torch.tensor([0.45, 0.3, 0.25]))
    torch.testing.assert_close(Sources(index, shown, weight).kept(2).weight.sum(0), torch.ones(1, 1))


@pytest.mark.parametrize(("pixels", "count"), [(100, 10), (7, 10), (10, 10)])
def test_values_between_places_are_interpolated(pixels, count):
    axis = Axis.of(pixels, count, count, torch.zeros(1).double())
    assert torch.allclose(axis.weights.sum(0), torch.ones(pixels).double())
    middle = (torch.arange(pixels) + 0.5) * count / pixels - 0.5
    spread = axis.spread(torch.arange(count).double(), -1)
    torch.testing.assert_close(spread, middle.clamp(0, count - 1).double())


def test_frames_of_the_drawn_world_are_nearer_to_the_truth():
    scene = World(size=256).sample(1, 77, "same")
    first, truth, last = (scene.frame(time)[0] for time in (0.0, 0.5, 1.0))
    canvas = canvas_of(64, 64)
    ways = torch.cat([scene.flow(*way)[..., 8::16, 8::16] / 16 for way in ((0, 1), (1, 0))])
    pair = pair_of(first, last, canvas, BidirectionalFlow.of(ways))
    base = fit(truth, canvas)
    frame, enlarged = with_detail(pair, base, 0.5), unfit(base[None], canvas)[0]
    assert (frame - truth).square().mean() < 0.7 * (enlarged - truth).square().mean()


def test_it_is_the_default_and_the_paper_has_none(pipe, photos, fast):
    detailed = pipe(*photos, **{name: value for name, value in fast.items() if name != "detail"}).frames
    assert torch.equal(detailed, pipe(*photos, **fast | {"detail": "photos"}).frames)
    assert not torch.equal(detailed, pipe(*photos, **fast).frames)


def test_sources_are_kept_only_where_they_are_asked_for(pipe, photos, fast):
    pair = pipe.prepare(*photos, **taken(fast, *PREPARING))
    made = {"times": [0.7, 0.2], "include_inputs": True, "endpoints": "reconstructed", "output_type": "pt"}
    with pipe.keeping_sources() as outer:
        with pipe.keeping_sources() as sources:
            frames = pipe.render(pair, **made).frames
        pipe.render(pair, times=[0.5], detail="upsampled")
        pipe.render(pair, times=[0.5], output_type="latent")
    assert torch.equal(frames, pipe.render(pair, **made).frames)
    assert outer == []
    assert [kept.time for kept in sources] == [0.7, 0.2]  # and not those of the ends
    for kept in sources:
        assert kept.shares.shape == (2, 8 * SAMPLES, 8 * SAMPLES)
        assert kept.taken.shape == (1, 8 * SAMPLES, 8 * SAMPLES)
        torch.testing.assert_close(kept.shares.sum(0), torch.ones(8 * SAMPLES, 8 * SAMPLES))
        assert ((kept.taken >= 0) & (kept.taken <= 1)).all()


def test_both_ends_are_made_as_frames_are(pipe, photos, fast):
    made = fast | {"detail": "photos", "include_inputs": True}
    original = pipe(*photos, **made).frames[0]
    rebuilt = pipe(*photos, **made, endpoints="reconstructed").frames[0]
    enlarged = pipe(*photos, **made | {"detail": "upsampled"}, endpoints="reconstructed").frames[0]
    for end in (0, -1):  # this VAE is untrained and cannot be trusted, so that the photos are
        assert (rebuilt[end] - original[end]).abs().mean() < (enlarged[end] - original[end]).abs().mean()


def test_ground_that_is_hidden_in_one_photo_comes_from_the_other_whatever_its_flow():
    """A dark patch hides ground in the first photo only; the flow of both, there, is a wrong one."""
    canvas = canvas_of(64, 64)
    last = 0.3 + 0.7 * picture(256, 256)
    first = last.clone()
    first[:, 80:176, 80:176] = 0
    flow = 3 * torch.randn(2, 2, 16, 16, generator=torch.Generator().manual_seed(0))
    inside = torch.zeros(16, 16, dtype=torch.bool)
    inside[4:12, 4:12] = True
    flow = BidirectionalFlow.of(flow * inside)
    made = with_detail(pair_of(first, last, canvas, flow, straight_paths), fit(last, canvas), 0.5)
    assert (made - last)[:, 96:160, 96:160].abs().mean() < 0.01
