# SPDX-License-Identifier: Apache-2.0
"""Ours, ours with one part exchanged or left out, and baselines on the same checkpoint.

A method takes a `Job` and returns its frames, (F, 3, H, W) in [0, 1] on the CPU, and the flow it used, if any.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
import torch.nn.functional as F

from ..fields import flow_at_cell_centres, upsampled_flow
from ..framing import fit, fit_to_output, unfit
from ..fusion import agreement_importance, fuse_high_level, photometric_importance
from ..pipeline import DreamMoverPipeline
from ..records import BidirectionalFlow, Canvas, PreparedPair
from ..settings import PRESETS
from .branching import branching_slerp
from .networks import dis_flow
from .suites import Pair

Result = tuple[torch.Tensor, BidirectionalFlow | None]


@dataclass
class Job:
    """One pair and one pipeline; what several methods need of them is made once.

    `settings` are arguments of `DreamMoverPipeline.prepare` and `.render` that differ from their defaults.
    """

    pipe: DreamMoverPipeline
    pair: Pair
    seed: int
    settings: Mapping[str, object] = field(default_factory=dict)
    preparing_seconds: float = 0.0  # spent so far in `prepared`
    _prepared: dict[tuple, PreparedPair] = field(default_factory=dict)

    @cached_property
    def canvas(self) -> Canvas:
        """Where the pair sits while the models see it."""
        return self.pipe.canvas(self.pair.images[0])

    @cached_property
    def ends(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The two inputs at the size of the frames, (3, H, W) in [0, 1]."""
        first, last = (fit_to_output(image, self.canvas) for image in self.pair.images)
        return first, last

    @cached_property
    def working_images(self) -> torch.Tensor:
        """The two inputs on their canvas, (2, 3, H, W) in [0, 1]."""
        return torch.stack([fit(image, self.canvas) for image in self.pair.images])

    @property
    def times(self) -> torch.Tensor:
        """δ of the frames, (F,)."""
        return torch.tensor(self.pair.times)

    def setting(self, function: Callable, name: str):
        """The value that an argument of `prepare` or `render` has in this job."""
        return self.settings.get(name, inspect.signature(function).parameters[name].default)

    def prepared(self, **changes) -> PreparedPair:
        """The pair prepared, some settings changed. The LoRA is fitted once, for all that have one."""
        key = tuple(sorted(changes.items()))
        if key not in self._prepared:
            lora = None if not changes or "lora_steps" in changes else self.prepared().lora
            start = time.perf_counter()
            settings = accepted(self.pipe.prepare, self.settings) | changes
            generator = torch.Generator().manual_seed(self.seed)
            self._prepared[key] = self.pipe.prepare(
                *self.pair.images, self.pair.prompt, **settings, lora=lora, generator=generator
            )
            self.preparing_seconds += time.perf_counter() - start
        return self._prepared[key]

    @property
    def importance(self) -> str:
        """The splat metric that the settings ask for."""
        return self.setting(self.pipe.render, "importance")

    def render(self, prepared: PreparedPair, **changes) -> Result:
        """Frames of a prepared pair, some settings changed."""
        settings = accepted(self.pipe.render, self.settings) | changes
        output = self.pipe.render(prepared, times=self.pair.times, output_type="pt", **settings)
        return output.frames[0].float().cpu(), prepared.flow

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Pictures of clean latents (F, C, h, w), at the size of the frames."""
        pictures = torch.cat([self.pipe.decode_latents(latent[None]).cpu() for latent in latents])
        return unfit(pictures, self.canvas)


def accepted(function: Callable, settings: Mapping[str, object]) -> dict[str, object]:
    """Those of the settings that a function has parameters for."""
    parameters = inspect.signature(function).parameters
    return {name: value for name, value in settings.items() if name in parameters}


def ours(job: Job) -> Result:
    """The pipeline as its settings say."""
    return job.render(job.prepared())


def paper(job: Job) -> Result:
    """What the paper says: features of one block, the bare argmax, importance by brightness constancy."""
    settings = PRESETS["paper"]
    return job.render(job.prepared(**accepted(job.pipe.prepare, settings)), **accepted(job.pipe.render, settings))


def no_penalty(job: Job) -> Result:
    """Ours with matches as far away as features say."""
    return job.render(job.prepared(distance_penalty=0))


def no_smoothing(job: Job) -> Result:
    """Ours with the bare argmax for its flow."""
    return job.render(job.prepared(flow_smoothing=0))


def photometric(job: Job) -> Result:
    """Ours with importance by brightness constancy."""
    return job.render(job.prepared(), importance="photometric")


def one_block(job: Job) -> Result:
    """Ours with the features of the paper's up block alone."""
    return job.render(job.prepared(feature_block=1))


def shallow(job: Job) -> Result:
    """Ours inverted a third as deep."""
    steps, step = (job.setting(job.pipe.prepare, name) for name in ("inversion_steps", "feature_step"))
    steps = max(1, steps // 3)
    return job.render(job.prepared(inversion_steps=steps, feature_step=min(step, steps)))


def true_flow(job: Job) -> Result:
    """Ours with the world's flow instead of the matched one: what perfect correspondence would give."""
    forward, backward = job.pair.motion.flow(0, 1), job.pair.motion.flow(1, 0)
    return job.render(_with_flow(job, forward, backward))


def dis(job: Job) -> Result:
    """Ours with OpenCV's DIS flow between the two images instead of the matched one."""
    first, last = job.working_images
    return job.render(_with_flow(job, dis_flow(first, last), dis_flow(last, first)))


def direct(job: Job) -> Result:
    """Ours with the noisy latents splatted and averaged: no two levels."""
    return job.render(job.prepared(), fusion="direct")


def released_fusion(job: Job) -> Result:
    """Ours with the released code's selection of noise."""
    return job.render(job.prepared(), fusion="two_level_unwarped")


def no_attention(job: Job) -> Result:
    """Ours without reference attention."""
    return job.render(job.prepared(), attention_blocks=())


def no_lora(job: Job) -> Result:
    """Ours without the pair's LoRA, from inversion on."""
    return job.render(job.prepared(lora_steps=0))


def crossfade(job: Job) -> Result:
    """The two inputs averaged by time."""
    delta = job.times.reshape(-1, 1, 1, 1)
    return torch.lerp(job.ends[0], job.ends[1], delta), None


def latent_splat(job: Job) -> Result:
    """The clean latents splatted and averaged like the layout, then decoded: no diffusion."""
    pair = job.prepared()
    return job.decode(job.pipe.preview(pair, job.times, job.importance)), pair.flow


def pixel_splat(job: Job) -> Result:
    """The same with pixels, in [−1, 1], flow and agreement upsampled bilinearly: no VAE either."""
    flow = job.prepared().flow
    pixels = 2 * job.working_images - 1
    size = pixels.shape[-2:]
    fine = BidirectionalFlow(*(upsampled_flow(part.cpu(), size) for part in (flow.forward, flow.backward)))
    if job.importance == "agreement":
        metric = F.interpolate(agreement_importance(flow).cpu(), size=size, mode="bilinear", align_corners=False)
    else:
        metric = photometric_importance(pixels, fine)
    frames, _ = fuse_high_level(pixels, fine, metric, job.times)
    return unfit((frames / 2 + 0.5).clamp(0, 1), job.canvas), flow


def branching(job: Job) -> Result:
    """Wang and Golland's interpolation in noise: no flow, no LoRA, no inversion."""
    steps = job.setting(job.pipe.prepare, "num_inference_steps")
    latents = branching_slerp(job.pipe, job.working_images, job.pair.prompt, job.pair.times, steps, job.seed)
    return job.decode(latents), None


def vae_of_truth(job: Job) -> Result:
    """The true frames through the VAE: the most that any method on latents can reach."""
    truth = torch.stack([fit(frame, job.canvas) for frame in job.pair.truth])
    return job.decode(job.pipe.encode_images(truth)), None


@dataclass(frozen=True)
class Method:
    """A method, and what of a pair it needs besides the images: "", "truth" or "motion"."""

    make: Callable[[Job], Result]
    needs: str = ""

    @torch.no_grad()
    def __call__(self, job: Job) -> Result:
        """The method's frames of the job's pair, and its flow."""
        return self.make(job)

    def suits(self, pair: Pair) -> bool:
        """Whether the pair has what the method needs."""
        return not self.needs or getattr(pair, self.needs) is not None


METHODS = {
    "ours": Method(ours),
    "paper": Method(paper),
    "no_penalty": Method(no_penalty),
    "no_smoothing": Method(no_smoothing),
    "photometric": Method(photometric),
    "one_block": Method(one_block),
    "shallow": Method(shallow),
    "true_flow": Method(true_flow, "motion"),
    "dis_flow": Method(dis),
    "direct_fusion": Method(direct),
    "released_fusion": Method(released_fusion),
    "no_attention": Method(no_attention),
    "no_lora": Method(no_lora),
    "latent_splat": Method(latent_splat),
    "pixel_splat": Method(pixel_splat),
    "branching_slerp": Method(branching),
    "crossfade": Method(crossfade),
    "vae_of_truth": Method(vae_of_truth, "truth"),
}


def _with_flow(job: Job, forward: torch.Tensor, backward: torch.Tensor) -> PreparedPair:
    """The prepared pair with another flow, (1, 2, H, W) each, in pixels of the frames."""
    pair = job.prepared()
    size = pair.flow.forward.shape[-2:]
    cells = (flow_at_cell_centres(field, size).to(pair.flow.forward) for field in (forward, backward))
    return replace(pair, flow=BidirectionalFlow(*cells))
