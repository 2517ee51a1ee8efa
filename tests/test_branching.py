# SPDX-License-Identifier: Apache-2.0
"""Interpolation in noise: who is made of whom, with how much noise, and what follows for the frames."""

from contextlib import nullcontext
from itertools import pairwise

import pytest
import torch

from dreammover_pipeline import paths
from dreammover_pipeline.branching import (
    Branch,
    generations,
    interpolate_in_noise,
    mixed_in_noise,
    noises,
    steps_of_generations,
)
from dreammover_pipeline.records import Schedule

NOISE = {"method": "noise", "lora_steps": 0, "detail": "upsampled", "output_type": "latent"}
SCHEDULE = Schedule(tuple(range(1, 200, 10)), tuple(0.85**k for k in range(21)))


def latents(seed=0, count=2):
    return torch.randn(count, 4, 6, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_order_goes_from_the_middle_outwards():
    assert generations((0.25, 0.5, 0.75)) == [
        [Branch(0.5, (0.0, 1.0))],
        [Branch(0.25, (0.0, 0.5)), Branch(0.75, (0.5, 1.0))],
    ]
    branches = generations(tuple(i / 8 for i in range(1, 8)))
    assert [len(generation) for generation in branches] == [1, 2, 4]


@pytest.mark.parametrize("times", [(0.5,), (0.01, 0.02, 0.9), tuple(i / 14 for i in range(1, 14))])
def test_every_frame_is_made_once_and_from_what_is_there(times):
    made = {0.0, 1.0}
    for generation in generations(times):
        for branch in generation:
            first, last = branch.parents
            assert {first, last} <= made
            assert first < branch.time < last
            assert not [other for other in made if first < other < last]
            assert first + branch.way * (last - first) == pytest.approx(branch.time)
        made |= {branch.time for branch in generation}
    assert made == {0.0, *times, 1.0}


def test_later_generations_get_less_noise():
    assert steps_of_generations(3, (0.25, 0.65), 200) == [130, 90, 50]
    assert steps_of_generations(1, (0.25, 0.65), 200) == [130]
    assert steps_of_generations(2, (0.001, 1.0), 10) == [10, 1]


def test_parents_share_their_noise_and_mix_as_whole_vectors():
    parents, noise = latents(), latents(1, 1)[0]
    ends = [mixed_in_noise(parents, noise, 0.4, way) for way in (0.0, 1.0)]
    for end, parent in zip(ends, parents, strict=True):
        assert torch.allclose(end, 0.4**0.5 * parent + 0.6**0.5 * noise)
    same = parents[:1].expand(2, -1, -1, -1)
    assert torch.allclose(mixed_in_noise(same, noise, 0.4, 0.3), mixed_in_noise(same, noise, 0.4, 0.9))
    first, last = (end / end.norm() * 7 for end in ends)  # of one length, which a sphere keeps
    between = mixed_in_noise(torch.stack([first, last]), torch.zeros_like(noise), 1.0, 0.3)
    assert between.norm() == pytest.approx(7)


def test_every_pair_of_parents_gets_noise_of_its_own_and_the_seed_decides_it():
    first, second = (next(source) for source in [noises(latents()[0], 3)] * 2)
    assert not torch.allclose(first, second)
    assert torch.equal(next(noises(latents()[0], 3)), first)
    assert not torch.equal(next(noises(latents()[0], 4)), first)


def ideal(clean):
    """The noise that a model would predict that knows what the frames are."""

    def at_work(frames, steps):
        def predict(x, timestep):
            alpha_bar = SCHEDULE.alpha_bars[SCHEDULE.timesteps.index(timestep) + 1]
            return (x - alpha_bar**0.5 * clean[frames]) / (1 - alpha_bar) ** 0.5

        return nullcontext((predict, lambda i, timestep, x: x))

    return at_work


def test_frames_come_back_in_the_order_of_their_times():
    wanted, times = latents(5, 4), (0.1, 0.35, 0.6, 0.9)
    made = interpolate_in_noise(latents(), times, ideal(wanted), SCHEDULE, (0.2, 0.6), seed=0)
    assert torch.allclose(made, wanted)


def test_two_equal_pictures_have_equal_frames_between_them_where_the_model_finds_them():
    same = latents()[:1].expand(2, -1, -1, -1)
    made = interpolate_in_noise(
        same, (0.25, 0.5, 0.75), ideal(same[:1].expand(3, -1, -1, -1)), SCHEDULE, (0.2, 0.6), 0
    )
    assert torch.allclose(made, made[:1].expand_as(made), atol=1e-9)


def test_a_frame_is_mixed_at_its_own_place_between_its_parents():
    clean, times, begun = latents(), (0.2, 0.5), []

    def at_work(frames, steps):
        begun.append(None)

        def predict(x, timestep):
            begun[-1] = x if begun[-1] is None else begun[-1]
            return x.tanh()

        return nullcontext((predict, lambda i, timestep, x: x))

    made = interpolate_in_noise(clean, times, at_work, SCHEDULE, (0.2, 0.6), seed=3)
    source, steps = noises(clean[0], 3), steps_of_generations(2, (0.2, 0.6), 20)
    ways = ((clean, 0.5), (torch.stack([clean[0], made[1]]), 0.4))
    for (parents, way), count, x in zip(ways, steps, begun, strict=True):
        expected = mixed_in_noise(parents, next(source), SCHEDULE.alpha_bars[count], way)
        torch.testing.assert_close(x[0], expected)


def test_candidates_have_noise_of_their_own_and_the_first_is_what_it_is_without_the_others():
    def at_work(frames, steps):
        return nullcontext((lambda x, timestep: x.tanh(), lambda i, timestep, x: x))

    arguments, seen = (latents(), (0.25, 0.5, 0.75), at_work, SCHEDULE, (0.2, 0.6), 3), []
    alone = interpolate_in_noise(*arguments)
    made = interpolate_in_noise(*arguments, candidates=3, choose=lambda time, some: seen.append(some) or 0)
    assert torch.allclose(made, alone)
    for some in seen:
        assert not torch.allclose(some[0], some[1], atol=1e-2)
        assert not torch.allclose(some[1], some[2], atol=1e-2)
    other = interpolate_in_noise(*arguments, candidates=3, choose=lambda time, some: 2)
    assert not torch.allclose(other, made, atol=1e-2)


def test_what_is_interrupted_is_mixed_of_its_parents():
    clean = latents()
    made = interpolate_in_noise(
        clean, (0.25, 0.5), ideal(clean), SCHEDULE, (0.2, 0.6), seed=0, interrupted=lambda: True
    )
    assert torch.allclose(made, torch.stack([0.75 * clean[0] + 0.25 * clean[1], clean.mean(0)]))


# ── In the pipeline ──────────────────────────────────────────────────────────────────────────────────────────────────


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_the_noise_sinks_from_generation_to_generation(pipe, photos, fast):
    timesteps, steps = [], []
    hook = pipe.unet.register_forward_pre_hook(lambda module, inputs: timesteps.append(int(inputs[1])))
    settings = fast | NOISE | {"num_inference_steps": 40, "n_frames": 7}
    pipe(
        *photos,
        **settings,
        generator=seeded(),
        callback_on_step_end=lambda pipeline, i, timestep, tensors: steps.append((i, pipeline.num_timesteps)) or {},
    )
    hook.remove()
    timesteps = timesteps[fast["inversion_steps"] + 2 :]  # after the inversion, ε at its end, and the features
    starts = [timestep for before, timestep in pairwise([-1, *timesteps]) if timestep > before]
    assert starts == [626, 426, 226]  # steps 26, 18 and 10 of 40
    assert steps == [(i, 26 + 18 + 10) for i in range(26 + 18 + 10)]


def test_the_seed_decides_and_the_batch_does_not(pipe, photos, fast):
    settings = fast | NOISE | {"n_frames": 5}
    frames = pipe(*photos, **settings, generator=seeded()).frames
    assert torch.equal(pipe(*photos, **settings, generator=seeded()).frames, frames)
    assert torch.allclose(pipe(*photos, **settings, frame_batch_size=1, generator=seeded()).frames, frames, atol=1e-4)
    assert not torch.allclose(pipe(*photos, **settings, generator=seeded(1)).frames, frames, atol=1e-2)
    guided = pipe(*photos, **settings, guidance_scale=3.0, negative_prompt="a robot", generator=seeded()).frames
    assert not torch.allclose(guided, frames, atol=1e-2)


def test_a_prepared_pair_gives_the_frames_of_a_whole_call(pipe, photos, fast):
    settings = fast | NOISE
    frames = pipe(*photos, **settings, generator=seeded()).frames
    preparing = ("prompt", "num_inference_steps", "inversion_steps", "feature_step", "lora_steps")
    pair = pipe.prepare(*photos, **{name: settings[name] for name in preparing})
    rendered = pipe.render(pair, n_frames=settings["n_frames"], **NOISE_OF_RENDER, generator=seeded()).frames
    assert torch.equal(rendered, frames)


NOISE_OF_RENDER = {name: value for name, value in NOISE.items() if name != "lora_steps"}


def test_it_goes_on_through_a_sequence_and_is_kept(pipe, photos, fast, tmp_path):
    settings = {name: value for name, value in (fast | NOISE).items() if name != "n_frames"}
    images = [*photos, photos[0]]

    def sequence(seed, **more):
        generators = [seeded(seed), seeded(seed + 1)]
        return pipe.interpolate_sequence(images, **settings, n_frames=2, generator=generators, **more).frames

    made = sequence(0, keep=tmp_path / "kept")
    assert torch.equal(sequence(0, keep=tmp_path / "kept"), made)
    assert torch.equal(sequence(0), made)
    assert not torch.equal(sequence(5, keep=tmp_path / "kept"), made)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"method": "morph"}, ValueError, "`method` must be"),
        ({"noise_levels": 0.5}, TypeError, "`noise_levels` must be two numbers"),
        ({"noise_levels": (0.6, 0.3)}, ValueError, "from the smaller to the larger"),
        ({"noise_levels": (0, 0.3)}, ValueError, "`noise_levels` must be finite and above 0"),
        ({"noise_levels": (0.3, 1.2)}, ValueError, "`noise_levels` must be at most 1"),
        ({"embedding_steps": -1}, ValueError, "`embedding_steps` must be at least 0"),
    ],
)
def test_what_makes_no_sense_is_refused_before_a_model_runs(pipe, photos, fast, wrong, error, message):
    pipe.unet.register_forward_pre_hook(lambda *call: pytest.fail("a model ran"))
    with pytest.raises(error, match=message):
        pipe(*photos, **fast | wrong)


def test_the_ways_of_things_are_found_out_only_where_they_are_needed(pipe, photos, monkeypatch):
    steps = {"num_inference_steps": 6, "inversion_steps": 4, "feature_step": 2}
    sought = []

    def straight(flow):
        sought.append(flow)
        return paths.straight_paths(flow)

    monkeypatch.setattr(paths, "rigid_paths", straight)
    pipe(*photos, **steps, **NOISE, n_frames=1)
    assert not sought
    pipe(*photos, **steps, **NOISE, n_frames=1, easing="even")
    assert len(sought) == 1
    pipe(*photos, **steps, **NOISE | {"method": "flow"}, n_frames=1, easing="even")
    assert len(sought) == 2
