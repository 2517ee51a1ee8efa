# SPDX-License-Identifier: Apache-2.0
"""Benchmark row "overhead": what the pipeline costs beside a replay of its own UNet and VAE calls, on any device."""

from __future__ import annotations

import copy
import dataclasses

import torch
import torch.nn.functional as F

from dreammover_pipeline.lora import LoraFit, fit_pair_lora, pair_lora

from .counting import attention_kernels
from .models import add_adapter, add_lora
from .profiles import Bench
from .record import Call, recorded, replay
from .report import Table, ratio, spread
from .timing import alternate, clock_name

BLOCKS = (2, 3)  # the pipeline's default `attention_blocks`
RANK, RATE = 16, 5e-4  # rank and learning rate of the LoRA fit


def tables(bench: Bench) -> list[Table]:
    """Tables of the overhead of inference and of the LoRA fit, and of the time to put a LoRA on and take it off."""
    profile, unit = bench.profile, clock_name(bench.device)
    seconds, fits = inference(bench), fit(bench)
    arms = [
        ("prepare (inversion), no LoRA", seconds["prepare"], seconds["prepare, bare"]),
        (f"render, {profile.frames} frames", seconds["render"], seconds["render, bare"]),
        (
            "prepare + render",
            [a + b for a, b in zip(seconds["prepare"], seconds["render"], strict=True)],
            [a + b for a, b in zip(seconds["prepare, bare"], seconds["render, bare"], strict=True)],
        ),
        (f"LoRA fit, {profile.lora_steps} steps", fits["fit"], fits["fit, bare"]),
    ]
    switched = lora_switch(bench)
    kernels = attention_kernels(lambda: bench.render(bench.prepare(steps=1), 1, 1, output_type="latent"))
    return [
        Table(
            f"Pipeline over its own bare calls, model {profile.model}, {profile.rounds} rounds",
            "measured",
            ("part", f"pipeline, {unit}", f"bare calls, {unit}", "ratio"),
            [(name, spread(a), spread(b), ratio(a, b)) for name, a, b in arms],
            f"Median (p10–p90) of rounds that take turns. T = {profile.steps}, {profile.chunk} frames a call, "
            f"attention: {', '.join(kernels)}. Bare calls of the fit: forward, loss, backward, AdamW.",
        ),
        Table(
            f"{profile.lora_steps} steps of the LoRA fit, model {profile.model}, {profile.rounds} rounds",
            "measured",
            (f"in the weights, {unit}", f"by an adapter of peft, {unit}", "ratio"),
            [
                (
                    *map(spread, (fits["fit, bare"], fits["fit, adapter"])),
                    ratio(fits["fit, adapter"], fits["fit, bare"]),
                )
            ],
            "Both are bare calls. An adapter computes what a LoRA adds beside what the layer itself computes.",
        ),
        Table(
            f"The pair's LoRA put on and taken off, model {profile.model}, {profile.few} rounds",
            "measured",
            (f"on and off, {unit}", f"render of {profile.frames} frames without, {unit}", "ratio"),
            [(*map(spread, switched.values()), ratio(*switched.values()))],
            "Between the two it is in the weights, and the UNet runs as it does without.",
        ),
    ]


def inference(bench: Bench) -> dict[str, list[float]]:
    """Seconds of `prepare` and of `render`, and of a replay of the model calls that each of them makes."""
    unet = bench.pipe.unet
    with recorded(bench.pipe) as preparing:
        pair = bench.prepare()
    with recorded(bench.pipe) as rendering:
        bench.render(pair)
    arms = {
        "prepare": bench.prepare,
        "prepare, bare": lambda: replay(unet, preparing),
        "render": lambda: bench.render(pair),
        "render, bare": lambda: replay(unet, rendering, BLOCKS),
    }
    return alternate(arms, bench.profile.rounds, bench.device)


def fit(bench: Bench) -> dict[str, list[float]]:
    """Seconds of the LoRA fit, and of its training steps alone on a UNet that has the LoRA, or an adapter, already."""
    pipe, pair, steps = bench.pipe, bench.prepare(steps=1), bench.profile.lora_steps
    clean, alphas = pair.inversion.path[0], pipe.scheduler.alphas_cumprod

    def pipeline():
        return fit_pair_lora(pipe.unet, clean, pair.prompt_embeds, alphas, LoraFit(steps, RANK, RATE), seed=0)

    with recorded(pipe) as calls:
        pipeline()
    arms = {"fit": pipeline, "fit, bare": BareFit(pipe.unet, calls), "fit, adapter": BareFit(pipe.unet, calls, True)}
    return alternate(arms, bench.profile.rounds, bench.device)


class BareFit:
    """Training steps on recorded inputs and nothing else, on a copy of the UNet with a LoRA, or with an adapter."""

    def __init__(self, unet: torch.nn.Module, calls: list[Call], adapter: bool = False):
        self.unet, self.calls = copy.deepcopy(unet), calls
        self.lora = None if adapter else add_lora(self.unet, RANK)
        parameters = add_adapter(self.unet, RANK) if adapter else self.lora.weights.values()
        self.optimizer = torch.optim.AdamW(parameters, lr=RATE, fused=True)

    def __call__(self) -> None:
        for call in self.calls:
            if self.lora is not None:
                self.lora.act()
            predicted = self.unet(*call.args, **call.kwargs)[0].float()
            loss = F.mse_loss(predicted, call.args[0].float())
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()


def lora_switch(bench: Bench) -> dict[str, list[float]]:
    """Seconds of putting the pair's LoRA on and off, as every render does once, and of a render without a LoRA."""
    unet, pair = bench.pipe.unet, bench.prepare(lora_steps=1)

    def switch():
        with torch.no_grad(), pair_lora(unet, pair.lora, pair.lora_scale):
            pass

    without = dataclasses.replace(pair, lora=None)
    arms = {"switch": switch, "render": lambda: bench.render(without)}
    return alternate(arms, bench.profile.few, bench.device)
