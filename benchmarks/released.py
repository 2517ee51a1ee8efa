# SPDX-License-Identifier: Apache-2.0
"""Benchmark row "released": the schedule of the authors' released code, compared with ours on our own modules.

Only the order and number of calls are theirs (docs/method.md says where they differ from ours); none of their code is
here.
"""

from __future__ import annotations

import dataclasses

import torch

from dreammover_pipeline.attention import reference_attention
from dreammover_pipeline.ddim import predict_clean, recompose
from dreammover_pipeline.features import captured_up_block
from dreammover_pipeline.flow import match_features
from dreammover_pipeline.records import Inversion, PreparedPair, Schedule
from dreammover_pipeline.sampling import denoise, invert

from .counting import Workload
from .counts import DEFAULT, counted_units
from .overhead import BLOCKS, BareFit
from .profiles import Bench, Profile
from .record import recorded
from .report import Spread, Table, ratio, spread
from .timing import alternate, clock_name

FEATURE_STEP = 14  # the step whose features the released code matches
BATCHES = 2  # number of batches that the released code splits the frames into


def tables(bench: Bench) -> list[Table]:
    """Tables of the schedule, counted and timed, and of the latents of the LoRA fit."""
    return [schedule_counted(bench.profile), schedule_timed(bench), latents(bench)]


def released_samples(workload: Workload, feature_step: int, inputs_per_batch: bool) -> tuple[int, int]:
    """Numbers of UNet samples of the released schedule outside the LoRA fit.

    It inverts three times: to the feature step, with one call for the features, and twice to step T. Then it denoises
    the inputs together with the frames, after one more prediction of noise, on the mix that the frames start from.

    Args:
        workload: the frames and steps.
        feature_step: the step whose features are matched.
        inputs_per_batch: whether each batch of frames holds the inputs, too, instead of only one batch.

    Returns:
        The number of samples of the pair, and the number of samples of frames.
    """
    inversions = 2 * (feature_step + 1 + 2 * workload.steps)
    inputs = 2 * (workload.steps + 1) * (BATCHES if inputs_per_batch else 1)
    return inversions + inputs, workload.frames * (workload.steps + 1)


def schedule_counted(profile: Profile) -> Table:
    """A table of the UNet samples and FLOPs of both schedules, without a LoRA."""
    units = counted_units(profile.counted, profile.counted_sides[0])
    workload = dataclasses.replace(DEFAULT, chunk=DEFAULT.frames // BATCHES)
    vae = 2 * units.encode + workload.frames * units.decode + units.text
    schedules = {
        "ours": (workload.pair_samples, workload.frames * workload.steps),
        "released": released_samples(workload, FEATURE_STEP, False),
        "released, if every batch holds the inputs": released_samples(workload, FEATURE_STEP, True),
    }
    rows = []
    for name, (pair, frames) in schedules.items():
        steps = frames // workload.frames
        flops = pair * units.sample + steps * units.frames(workload.frames, BATCHES) + vae
        rows.append((name, pair, frames, pair + frames, flops / 1e12, flops / units.inference(workload)))
    return Table(
        f"Schedule, {workload.frames} frames in {BATCHES} batches, model {profile.counted}, no LoRA",
        "counted",
        ("schedule", "samples of the pair", "samples of frames", "in all", "TFLOP", "over ours"),
        rows,
    )


def schedule_timed(bench: Bench) -> Table:
    """A table of the seconds of both schedules, from images to frames, on the same modules."""
    profile, unit = bench.profile, clock_name(bench.device)
    pair = bench.prepare()
    arms = {"ours": lambda: bench.render(bench.prepare()), "released": lambda: released_schedule(bench, pair)}
    seconds = alternate(arms, profile.few, bench.device)
    workload = Workload(profile.frames, profile.steps, -(-profile.frames // BATCHES))
    ours, released = workload.unet_samples, released_samples(workload, _feature_step(profile), False)
    return Table(
        f"Schedule, {profile.frames} frames, model {profile.model}, {profile.few} rounds",
        "measured",
        (f"released, {unit}", f"ours, {unit}", "ratio", "ratio of UNet samples"),
        [(spread(seconds["released"]), spread(seconds["ours"]), _over(seconds), sum(released) / ours)],
        "One precision, one matching, one decoder in both arms; the inputs are denoised once a step.",
    )


def _over(seconds: dict[str, list[float]]) -> Spread:
    """How many times as long the released schedule takes as ours."""
    return ratio(seconds["released"], seconds["ours"])


def _feature_step(profile: Profile) -> int:
    """The step whose features are matched, within the steps of the profile."""
    return min(FEATURE_STEP, profile.steps)


@torch.no_grad()
def released_schedule(bench: Bench, pair: PreparedPair) -> torch.Tensor:
    """Make frames by the released code's order of work.

    Args:
        bench: the pipeline and the profile.
        pair: a prepared pair, of which only the images, the noise schedule, the text and the canvas are used.

    Returns:
        The frames, (F, 3, H, W) in [0, 1].
    """
    pipe, profile = bench.pipe, bench.profile
    schedule, text = pair.inversion.schedule, pair.prompt_embeds
    steps, feature_step = profile.steps, _feature_step(profile)
    clean = pipe.encode_images(torch.stack(pair.images))

    def predict(latents: torch.Tensor, timestep: int) -> torch.Tensor:
        return pipe.predict_noise(latents, timestep, text)

    with captured_up_block(pipe.unet, 1) as outputs:
        invert(clean, predict, schedule, feature_step)  # its last call is at the feature step itself
    flow = match_features(outputs[-1], clean.shape[-2:])
    for _ in range(2):
        path, eps = _invert_step_by_step(clean, predict, schedule, steps)
    pair = dataclasses.replace(pair, inversion=Inversion(path, eps, schedule), flow=flow)

    times = torch.arange(1, profile.frames + 1) / (profile.frames + 1)
    with reference_attention(pipe.unet, BLOCKS) as references:

        def predict_batches(latents: torch.Tensor, timestep: int) -> torch.Tensor:
            with references.led_by_inputs():
                parts = [pipe.predict_noise(latents[:2], timestep, text)]
            for frames in latents[2:].chunk(BATCHES):
                parts.append(pipe.predict_noise(frames, timestep, text[:1].expand(len(frames), -1, -1)))
            return torch.cat(parts)

        def predict_mix(mixed: torch.Tensor, timestep: int) -> torch.Tensor:
            return predict_batches(torch.cat([path[-1], mixed]), timestep)[2:]

        fused = pipe.fuse(pair, times, fusion="two_level_unwarped", predict_noise=predict_mix)
        latents = denoise(torch.cat([path[-1], fused.latents]), predict_batches, schedule, steps)
    return torch.cat([pipe.decode_latents(latent) for latent in latents[2:].split(1)])


def _invert_step_by_step(
    clean: torch.Tensor, predict, schedule: Schedule, steps: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Invert with `steps` UNet calls, and return the latents of all steps and the last noise that was predicted."""
    path = [clean]
    for k in range(1, steps + 1):
        eps = predict(path[-1], schedule.timestep(k))
        predicted = predict_clean(path[-1], eps, schedule.alpha_bars[k - 1])
        path.append(recompose(predicted, eps, schedule.alpha_bars[k]))
    return torch.stack(path), eps


def latents(bench: Bench) -> Table:
    """A table of the LoRA fit's seconds, with images encoded once before it or again at every step."""
    profile, pipe, unit = bench.profile, bench.pipe, clock_name(bench.device)
    pair = bench.prepare(steps=1)
    images = torch.stack(pair.images)
    with recorded(pipe) as calls:
        bench.prepare(lora_steps=profile.lora_steps, steps=1)
    fit = [call for call in calls if call.function is pipe.unet][: profile.lora_steps]
    step = BareFit(pipe.unet, fit)

    def encoding_every_step():
        for call in fit:
            with torch.no_grad():
                pipe.encode_images(images)
            step.calls = [call]
            step()

    def encoding_once():
        step.calls = fit
        step()

    seconds = alternate({"every step": encoding_every_step, "once": encoding_once}, profile.few, bench.device)
    units = counted_units(profile.counted, profile.counted_sides[0])
    return Table(
        f"LoRA fit, latents encoded at every step or once, model {profile.model}, {profile.few} rounds",
        "measured",
        (f"every step, {unit}", f"once, {unit}", "ratio", f"counted ratio, {profile.counted}"),
        [
            (
                *(spread(seconds["every step"]), spread(seconds["once"]), ratio(*seconds.values())),
                1 + 2 * units.encode / units.lora_step,
            )
        ],
        f"{profile.lora_steps} steps; {profile.counted} at {profile.counted_sides[0]}²: "
        f"{2 * units.encode / 1e12:.4g} TFLOP a step saved.",
    )
