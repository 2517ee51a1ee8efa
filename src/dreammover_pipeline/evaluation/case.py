# SPDX-License-Identifier: Apache-2.0
"""A pair that is evaluated, the pipeline that makes its frames, and what several methods need of both."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

import torch

from ..arguments import taken
from ..fields import flow_at_cell_centres
from ..finishing import finish_frames
from ..framing import fit, fit_to_output, unfit
from ..paths import MotionPaths
from ..pipeline import DreamMoverPipeline
from ..progress import reported_stage
from ..prompts import NegativeText
from ..records import BidirectionalFlow, Canvas, PreparedPair
from ..rendering import FramesAsked, render_latents
from ..settings import PREPARING, RENDERING, RenderSettings, arguments
from .suites import Pair

UNREPORTED = partial(reported_stage, lambda stage, done, total: None)  # stages of whose progress nobody is told

# The frames of a method, (F, 3, H, W) in [0, 1] on the CPU, and the flow that they were made with; None without flow.
Result = tuple[torch.Tensor, BidirectionalFlow | None]


@dataclass
class EvaluationCase:
    """One pair to interpolate and the pipeline to do it with; what several methods need is made once and kept."""

    pipe: DreamMoverPipeline
    pair: Pair
    seed: int  # decides the noise of the LoRA fit and of interpolation in noise
    settings: Mapping[str, object] = field(default_factory=dict)  # arguments of `prepare` and `render`, by name
    preparing_seconds: float = 0.0  # time that `prepared` has taken so far
    _prepared: dict[tuple, PreparedPair] = field(default_factory=dict)  # by the changes that `prepared` was given

    @cached_property
    def canvas(self) -> Canvas:
        """The canvas that the pair is fitted to for the models."""
        return self.pipe.canvas(self.pair.images[0])

    @cached_property
    def ends(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The two images at the size of the frames, (3, H, W) in [0, 1] each."""
        first, last = (fit_to_output(image, self.canvas) for image in self.pair.images)
        return first, last

    @cached_property
    def working_images(self) -> torch.Tensor:
        """The two images on the canvas, (2, 3, H, W) in [0, 1]."""
        return torch.stack([fit(image, self.canvas) for image in self.pair.images])

    @property
    def times(self) -> torch.Tensor:
        """The times δ of the frames, (F,)."""
        return torch.tensor(self.pair.times)

    def setting(self, name: str):
        """The value that the pipeline's argument `name` has in this case."""
        return self.settings.get(name, arguments()[name].default)

    def prepared(self, **changes) -> PreparedPair:
        """The prepared pair, with `changes` to the settings.

        Its LoRA is fitted once, with the settings of the case, and shared unless `lora_steps` is among the changes.
        """
        key = tuple(sorted(changes.items()))
        if key not in self._prepared:
            lora = None if not changes or "lora_steps" in changes else self.prepared().lora
            start = time.perf_counter()
            settings = taken(self.settings, *PREPARING) | changes
            generator = torch.Generator().manual_seed(self.seed)
            self._prepared[key] = self.pipe.prepare(
                *self.pair.images, self.pair.prompt, **settings, lora=lora, generator=generator
            )
            self.preparing_seconds += time.perf_counter() - start
        return self._prepared[key]

    def with_flow(self, forward: torch.Tensor, backward: torch.Tensor) -> PreparedPair:
        """The prepared pair with another flow.

        Args:
            forward: The flow from the first image to the second, (1, 2, H, W), in pixels of a picture of any size that
                fills the canvas.
            backward: The flow from the second image to the first, (1, 2, H, W), in pixels of the same picture.
        """
        pair = self.prepared()
        size = pair.flow.forward.shape[-2:]
        cells = (flow_at_cell_centres(field, size).to(pair.flow.forward) for field in (forward, backward))
        return replace(pair, flow=BidirectionalFlow(*cells))

    @property
    def importance(self) -> str:
        """The value of `importance` in this case."""
        return self.setting("importance")

    def render(self, prepared: PreparedPair, **changes) -> Result:
        """Frames of a prepared pair, with `changes` to the settings, and the pair's flow."""
        settings = taken(self.settings, *RENDERING) | changes
        generator = torch.Generator().manual_seed(self.seed)
        output = self.pipe.render(prepared, times=self.pair.times, output_type="pt", generator=generator, **settings)
        return output.frames[0].float().cpu(), prepared.flow

    def render_along(self, prepared: PreparedPair, paths: MotionPaths) -> Result:
        """Frames of a prepared pair along paths that need not be those of its flow, and the pair's flow."""
        models = self.pipe._models(self.setting("cross_attention_kwargs"))
        settings = RenderSettings.of({**self.settings, "times": self.pair.times})
        negative = NegativeText(self.setting("negative_prompt"), self.setting("negative_prompt_embeds"))
        frames = render_latents(models, prepared, FramesAsked(settings, negative), UNREPORTED, paths=paths)
        frames = replace(frames, paths=paths)
        made = finish_frames(models, frames, settings, "pt", self.pipe.run_safety_checker, UNREPORTED)
        return made.frames[0].float(), prepared.flow

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Decode clean latents (F, C, h, w) into pictures at the size of the frames."""
        pictures = torch.cat([self.pipe.decode_latents(latent[None]).cpu() for latent in latents])
        return unfit(pictures, self.canvas)
