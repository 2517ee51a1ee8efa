# SPDX-License-Identifier: Apache-2.0
"""Frames larger than the model's own size, refined tile by tile: its algebra, and what it leaves as it was."""

import copy
import re
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from support.pages import ROOT

from benchmarks.counting import cascade_samples
from dreammover_pipeline.cascade import (
    TILES_APART,
    Level,
    PairCascade,
    Spans,
    Tiles,
    cascade_steps,
    level_sizes,
    tile_size,
)
from dreammover_pipeline.denoiser import Denoiser
from dreammover_pipeline.detail import PairDetail, plan_detail, with_detail
from dreammover_pipeline.framing import fit, fit_to_output
from dreammover_pipeline.fusion import slerp
from dreammover_pipeline.paths import rigid_paths
from dreammover_pipeline.records import Canvas, Schedule
from dreammover_pipeline.sampling import denoise
from dreammover_pipeline.schedules import ddim_schedule

CELL, STEPS, TIME = 8, 2, 0.4


@pytest.fixture(scope="module")
def prepared(new_pipe, photos):
    """The models, and a pair that sits on 64×64 pixels and is returned at 133×133, for which there are two levels."""
    pipe = new_pipe()
    steps = {"num_inference_steps": 6, "inversion_steps": 1, "feature_step": 1}
    fit = {"lora_steps": 1, "lora_rank": 1, "lora_learning_rate": 0.1, "lora_scale": 0.5}
    pair = pipe.prepare(*photos, ("a fish", "a robot"), **steps, **fit)
    images = tuple(torch.rand(2, 3, 133, 133, generator=torch.Generator().manual_seed(0)))
    return pipe._models(), replace(pair, images=images, canvas=Canvas(64, 64, 64, 64, 133, 133))


@pytest.fixture
def parts(prepared):
    """The models, a pair, its detail, a frame on the canvas and its plan."""
    models, pair = prepared
    detail = detail_of(pair)
    frame = detail.small[:, :3].mean(0).flip(-1).repeat_interleave(2, -1).repeat_interleave(2, -2)
    with torch.no_grad():
        yield models, pair, detail, frame, plan_detail(detail, frame, TIME)


def detail_of(pair):
    working = torch.stack([fit(image, pair.canvas) for image in pair.images])
    return PairDetail.of(pair.images, working, working, pair.canvas, pair.flow, rigid_paths(pair.flow), True)


def returned_at(pair, side):
    """A pair with frames and photos of another size."""
    canvas = replace(pair.canvas, output_height=side, output_width=side)
    return replace(pair, canvas=canvas, images=tuple(fit_to_output(image, canvas) for image in pair.images))


def trusting(plan, taken):
    return replace(plan, taken=torch.full_like(plan.taken, taken))


@contextmanager
def counted(unet):
    """A list that gets the number of latents of every forward of a UNet."""
    batches = []
    handle = unet.register_forward_hook(lambda module, inputs, output: batches.append(len(inputs[0])))
    try:
        yield batches
    finally:
        handle.remove()


@pytest.mark.parametrize("parts", [1, 8])
@pytest.mark.parametrize(("count", "longest"), [(8, 8), (5, 8), (9, 8), (61, 8), (64, 64), (200, 64), (3, 1), (23, 5)])
def test_tiles_cover_every_place_once_in_all(count, longest, parts):
    spans = Spans.of(count, longest, parts)
    total = torch.zeros(count * parts)
    for start, weights in zip(spans.starts, spans.weights, strict=True):
        total[start : start + spans.length] += weights
        assert (weights > 0).all()
    torch.testing.assert_close(total, torch.ones(count * parts))
    assert spans.length == parts * min(count, longest)
    assert all(start % parts == 0 for start in spans.starts)
    distances = [later - start for start, later in pairwise(spans.starts)]
    assert all(0 < distance <= max(parts, TILES_APART * spans.length) for distance in distances)


def test_tiles_may_be_wider_than_high():
    tiles = Tiles.of((20, 30), (8, 12), 2)
    assert (tiles.rows.length, tiles.columns.length) == (16, 24)
    assert tiles.corner(len(tiles) - 1) == (2 * (20 - 8), 2 * (30 - 12))
    picture, total = torch.rand(1, 40, 60), torch.zeros(1, 40, 60)
    for tile in range(len(tiles)):
        tiles.add(total, tile, tiles.cut(picture, tile))
    torch.testing.assert_close(total, picture)


def test_what_is_free_lies_in_the_picture_where_it_lies_on_the_canvas(parts):
    """The picture fills the left half of the canvas, and its left half, 3 of 12 cells, is not taken from photos."""
    *_, plan = parts
    taken = torch.zeros(1, 8, 12)
    taken[..., 3:] = 1
    level = Level.of((128, 96), Canvas(64, 96, 64, 48, 128, 96), CELL, (8, 8), torch.device("cpu"))
    for tile in range(len(level.pixels)):
        top, left = level.pixels.corner(tile)
        free = level.free(replace(plan, taken=taken), tile)
        assert free.shape == (1, min(64, 128 - top), min(64, 96 - left))
        columns = left + torch.arange(free.shape[-1])
        assert torch.equal(free[0] > 0.5, (columns < 48).expand(free.shape[1:]))


def test_the_size_of_a_tile_is_the_height_and_the_width_of_the_unet(session_components):
    unet = copy.deepcopy(session_components["unet"])
    assert tile_size(unet) == (8, 8)
    unet.register_to_config(sample_size=[16, 24])
    assert tile_size(unet) == (16, 24)


def test_the_mean_of_some_tiles_is_theirs_wherever_they_are():
    level = Level.of((160, 96), Canvas(80, 48, 80, 48, 320, 192), CELL, (8, 8), torch.device("cpu"))
    assert (level.canvas.output_height, level.canvas.output_width) == (160, 96)
    chosen = [0, 3]
    mean = level.mean(chosen, torch.full((2, 1, 8, 8), 3.0).split(1))
    there = torch.zeros(20, 12, dtype=torch.bool)
    for tile in chosen:
        top, left = level.cells.corner(tile)
        there[top : top + 8, left : left + 8] = True
    assert not there.all()
    torch.testing.assert_close(mean[0, 0], 3.0 * there)


@pytest.mark.parametrize(
    ("output", "sizes"),
    [
        ((60, 45), []),
        ((66, 50), [(66, 50)]),
        ((120, 90), [(120, 90)]),
        ((120, 91), [(120, 91)]),
        ((125, 94), [(120, 90), (125, 94)]),
        ((480, 360), [(120, 90), (240, 180), (480, 360)]),
    ],
)
def test_levels_double_up_to_the_output(output, sizes):
    assert level_sizes(Canvas(64, 48, 60, 45, *output)) == sizes


def test_the_noise_is_about_the_same_in_every_schedule():
    alpha_bars = torch.linspace(1, 0.1, 41).tolist()
    fine = Schedule(tuple(range(1, 41)), tuple(alpha_bars))
    coarse = Schedule(tuple(range(2, 41, 2)), tuple(alpha_bars[::2]))
    assert abs(cascade_steps(fine) - 2 * cascade_steps(coarse)) <= 1


@pytest.mark.parametrize(
    ("alpha_bars", "steps"), [((1, 0.99, 0.95, 0.9), 2), ((0.98, 0.85), 1), ((1, 0.99, 0.96, 0.95), 3)]
)
def test_a_level_takes_at_least_one_step_and_at_most_all(alpha_bars, steps):
    assert cascade_steps(Schedule(tuple(range(1, len(alpha_bars))), alpha_bars)) == steps


def test_where_the_output_is_no_larger_the_frame_stays(parts):
    models, pair, detail, frame, plan = parts
    pair = returned_at(pair, 64)
    detail = detail_of(pair)
    refined = PairCascade.of(models, pair, detail, STEPS).refined(frame, plan, TIME)
    assert torch.equal(refined, with_detail(detail, frame, TIME, plan=plan))


def test_what_is_taken_from_the_photos_stays(parts):
    models, pair, detail, frame, plan = parts
    pair = returned_at(pair, 112)
    detail = detail_of(pair)
    cascade = PairCascade.of(models, pair, detail, STEPS)
    all_taken, half_taken = trusting(plan, 1.0), trusting(plan, 1.0)
    half_taken.taken[..., :16] = 0
    with counted(models.denoiser.unet) as batches:
        refined = cascade.refined(frame, all_taken, TIME)
    assert torch.equal(refined, with_detail(detail, frame, TIME, plan=all_taken))
    assert batches == []
    change = cascade.refined(frame, half_taken, TIME) - with_detail(detail, frame, TIME, plan=half_taken)
    changed = change.abs().amax((0, 1)) > 0
    assert changed[:56].all()
    assert not changed[60:].any()  # half a place more


def test_the_unet_is_called_as_often_as_is_said(parts):
    models, pair, detail, frame, plan = parts
    corner = trusting(plan, 1.0)
    corner.taken[..., :4, :4] = 0
    plans = trusting(plan, 0.0), corner, trusting(plan, 1.0)
    largest = tile_size(models.denoiser.unet)
    cascade = PairCascade.of(models, pair, detail, STEPS, largest_batch=5)
    said = [cascade_samples(pair.canvas, CELL, largest, STEPS, plan) for plan in plans]
    for plan, calls in zip(plans, said, strict=True):
        with counted(models.denoiser.unet) as batches:
            cascade.refined(frame, plan, TIME)
        assert sum(batches) == calls
        assert max(batches, default=0) <= 5
    assert said[0] == cascade_samples(pair.canvas, CELL, largest, STEPS)
    assert said[0] > said[1] > said[2] == 0
    nearly = [cascade_samples(pair.canvas, CELL, largest, STEPS, trusting(plan, taken)) for taken in (0.97, 0.99)]
    assert nearly == [said[0], 0]


def test_the_samples_of_stable_diffusion_are_those_of_the_page(pipe):
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    sizes, _, counts = (
        [int(cell) for cell in re.findall(r"\| (\d+)", line.replace("²", ""))]
        for line in re.search(r"\| size of the frames .*\n.*\n\| samples a frame .*", page).group().splitlines()
    )
    steps = cascade_steps(ddim_schedule(pipe.scheduler, 50, 30))
    canvases = [Canvas(512, 512, 512, 512, side, side) for side in sizes]
    assert [cascade_samples(canvas, 8, (64, 64), steps) for canvas in canvases] == counts
    assert counts[sizes.index(2048)] == 136  # as the meaning of `detail` says


@pytest.mark.parametrize(("side", "levels"), [(96, [96]), (133, [128, 133])])
def test_one_tile_is_the_whole(parts, side, levels):
    """The equations at the head of the module, without tiles, level by level."""
    models, pair, _, frame, plan = parts
    unet = copy.deepcopy(models.denoiser.unet)
    unet.register_to_config(sample_size=(24, 24))
    models = replace(models, denoiser=Denoiser(unet, models.denoiser.ddim, models.denoiser.device))
    pair, plan = returned_at(pair, side), trusting(plan, 0.25)
    refined = PairCascade.of(models, pair, detail_of(pair), STEPS).refined(frame, plan, TIME)
    text = slerp(*pair.prompt_embeds, torch.tensor([TIME]))

    def predict_noise(latents, timestep):
        return models.denoiser.predict_noise(latents, timestep, text)

    schedule, change = pair.inversion.schedule, torch.zeros(3, 1, 1)
    encode, decode = models.autoencoder.encode, models.autoencoder.decode
    with models.denoiser.with_lora(pair.lora, pair.lora_scale):
        for size in levels:
            base = with_detail(detail_of(returned_at(pair, size)), frame, TIME, plan=plan)
            change = F.interpolate(change[None], (size, size), mode="bicubic")[0]
            to_whole_cells = (0, -size % CELL, 0, -size % CELL)
            latents = encode(F.pad((base + change).clamp(0, 1)[None], to_whole_cells, mode="replicate"))
            clean = denoise(schedule.alpha_bars[STEPS] ** 0.5 * latents, predict_noise, schedule, STEPS)
            change = change + 0.75 * (decode(clean) - decode(latents))[0, :, :size, :size]
    assert change.abs().mean() > 0.01
    torch.testing.assert_close(refined, (base + change).clamp(0, 1), atol=1e-4, rtol=0)


def test_all_is_put_back_when_the_unet_fails(parts):
    models, pair, detail, frame, plan = parts
    unet, cascade = models.denoiser.unet, PairCascade.of(models, pair, detail, STEPS)
    weights = {name: weight.clone() for name, weight in unet.state_dict().items()}

    def fail(module, inputs):
        assert any(not torch.equal(weight, weights[name]) for name, weight in module.state_dict().items())
        raise RuntimeError("no")

    handle = unet.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="no"):
        cascade.refined(frame, trusting(plan, 0.0), TIME)
    assert all(torch.equal(weight, weights[name]) for name, weight in unet.state_dict().items())
    handle.remove()
    handle = unet.register_forward_hook(lambda module, inputs, output: tuple(part * torch.nan for part in output))
    with pytest.raises(RuntimeError, match=r"^the UNet overflowed in torch\.float32"):
        cascade.refined(frame, trusting(plan, 0.0), TIME)
    handle.remove()
    assert torch.isfinite(cascade.refined(frame, plan, TIME)).all()
