# SPDX-License-Identifier: Apache-2.0
"""Row 4, a and b: the schedule of the authors' released code, on our modules, as the other arm.

Only what is done how often is theirs (docs/method.md says where it differs); none of their code is here.
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

from .counting import Job
from .counts import DEFAULT, counted_units
from .overhead import BLOCKS, BareFit
from .profiles import Bench, Profile
from .record import recorded
from .report import Table, ratio, spread
from .timing import alternate, clock_name

FEATURE_STEP = 14
BATCHES = 2


def tables(bench: Bench) -> list[Table]:
    """Schedule counted and timed, LoRA latents counted and timed; never merged into one figure."""
    return [schedule_counted(bench.profile), schedule_timed(bench), latents(bench)]


def released_samples(job: Job, feature_step: int, inputs_per_batch: bool) -> tuple[int, int]:
    """UNet samples outside the fit: of the pair, and of the frames.

    Three inversions (to the feature step, with one call for the features, and twice to step T); then the inputs are
    denoised along, and noise is predicted once more, on the mix that they start from.
    """
    inversions = 2 * (feature_step + 1 + 2 * job.steps)
    inputs = 2 * (job.steps + 1) * (BATCHES if inputs_per_batch else 1)
    return inversions + inputs, job.frames * (job.steps + 1)


def schedule_counted(profile: Profile) -> Table:
    """UNet samples and FLOPs at equal precision, without any fit."""
    units = counted_units(profile.counted, profile.counted_sides[0])
    job = dataclasses.replace(DEFAULT, chunk=DEFAULT.frames // BATCHES)
    vae = 2 * units.encode + job.frames * units.decode + units.text
    schedules = {
        "ours": (2 * job.pair_calls, job.frames * job.steps),
        "released": released_samples(job, FEATURE_STEP, False),
        "released, if every batch holds the inputs": released_samples(job, FEATURE_STEP, True),
    }
    rows = []
    for name, (pair, frames) in schedules.items():
        steps = frames // job.frames
        flops = pair * units.sample + steps * units.frames(job.frames, BATCHES) + vae
        rows.append((name, pair, frames, pair + frames, flops / 1e12, flops / units.inference(job)))
    return Table(
        f"Schedule, {job.frames} frames in {BATCHES} batches, model {profile.counted}, no LoRA",
        "counted",
        ("schedule", "samples of the pair", "samples of frames", "in all", "TFLOP", "over ours"),
        rows,
    )


def schedule_timed(bench: Bench) -> Table:
    """Both schedules from images to frames, on the same modules."""
    profile, unit = bench.profile, clock_name(bench.device)
    pair = bench.prepare()
    arms = {"ours": lambda: bench.render(bench.prepare()), "released": lambda: released_schedule(bench, pair)}
    seconds = alternate(arms, profile.few, bench.device)
    job = Job(profile.frames, profile.steps, -(-profile.frames // BATCHES))
    ours, released = 2 * job.pair_calls + job.frames * job.steps, released_samples(job, _feature_step(profile), False)
    return Table(
        f"Schedule, {profile.frames} frames, model {profile.model}, {profile.few} rounds",
        "measured",
        (f"released, {unit}", f"ours, {unit}", "ratio", "ratio of UNet samples"),
        [(spread(seconds["released"]), spread(seconds["ours"]), _over(seconds), sum(released) / ours)],
        "One precision, one matching, one decoder in both arms; the inputs are denoised once a step.",
    )


def _over(seconds: dict[str, list[float]]):
    return ratio(seconds["released"], seconds["ours"])


def _feature_step(profile: Profile) -> int:
    return min(FEATURE_STEP, profile.steps)


@torch.no_grad()
def released_schedule(bench: Bench, pair: PreparedPair) -> torch.Tensor:
    """Frames by the released code's order of work; `pair` gives the schedule, the text and the canvas only.

    Returns:
        (F, 3, H, W) in [0, 1].
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
        path, eps = _climb(clean, predict, schedule, steps)
    pair = dataclasses.replace(pair, inversion=Inversion(path, eps, schedule), flow=flow)

    times = torch.arange(1, profile.frames + 1) / (profile.frames + 1)
    with reference_attention(pipe.unet, BLOCKS) as references:

        def predict_batches(latents: torch.Tensor, timestep: int) -> torch.Tensor:
            with references.record():
                parts = [pipe.predict_noise(latents[:2], timestep, text)]
            for frames in latents[2:].chunk(BATCHES):
                parts.append(pipe.predict_noise(frames, timestep, text[:1].expand(len(frames), -1, -1)))
            return torch.cat(parts)

        def predict_mix(mixed: torch.Tensor, timestep: int) -> torch.Tensor:
            return predict_batches(torch.cat([path[-1], mixed]), timestep)[2:]

        fused = pipe.fuse(pair, times, fusion="two_level_unwarped", predict_noise=predict_mix)
        latents = denoise(torch.cat([path[-1], fused.latents]), predict_batches, schedule, steps)
    return torch.cat([pipe.decode_latents(latent) for latent in latents[2:].split(1)])


def _climb(clean: torch.Tensor, predict, schedule: Schedule, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inversion by `steps` calls: the path, and the last noise that was predicted."""
    path = [clean]
    for k in range(1, steps + 1):
        eps = predict(path[-1], schedule.timestep(k))
        predicted = predict_clean(path[-1], eps, schedule.alpha_bars[k - 1])
        path.append(recompose(predicted, eps, schedule.alpha_bars[k]))
    return torch.stack(path), eps


def latents(bench: Bench) -> Table:
    """A step of the LoRA fit with latents encoded once, and with both images encoded in it."""
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
