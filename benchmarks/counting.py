# SPDX-License-Identifier: Apache-2.0
"""Exact counts of calls, of FLOPs (a multiply-add is 2) and of peak bytes of live tensors. Nothing here is timed."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from dreammover_pipeline.attention import reference_attention
from dreammover_pipeline.cascade import Level, level_sizes
from dreammover_pipeline.detail import FrameDetail
from dreammover_pipeline.images import Size
from dreammover_pipeline.lora import TrainedLora
from dreammover_pipeline.records import Canvas

aten = torch.ops.aten
# FLOPs of the CPU's fused attention, which torch does not count; it counts that of other devices.
CPU_ATTENTION = {
    aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v)
    ),
}


@dataclass(frozen=True)
class Workload:
    """How much a run of the pipeline has to do, and the number of UNet calls that this takes by docs/method.md §8."""

    frames: int  # F, in-between frames
    steps: int  # T, inversion steps
    chunk: int  # largest number of frames in one UNet call
    lora_steps: int = 0  # L, steps of the LoRA fit

    @property
    def chunks(self) -> int:
        """Number of UNet calls that a step takes for all frames."""
        return -(-self.frames // self.chunk)

    @property
    def pair_calls(self) -> int:
        """Number of UNet calls on the two inputs alone, outside the LoRA fit.

        They are T for the inversion, one for ε at its end, and one for the features. At every denoising step the two
        inputs are once more in a batch, ahead of frames.
        """
        return self.steps + 1 + 1

    @property
    def pair_samples(self) -> int:
        """Number of samples of the two inputs that the UNet processes outside the LoRA fit."""
        return 2 * (self.pair_calls + self.steps)

    @property
    def unet_calls(self) -> int:
        """Number of all UNet calls, whatever their batch size."""
        return self.lora_steps + self.pair_calls + self.steps * self.chunks

    @property
    def unet_samples(self) -> int:
        """Number of samples that the UNet processes: 2L + 2(T+1) + 2 + 2T + F·T."""
        return 2 * self.lora_steps + self.pair_samples + self.frames * self.steps


@dataclass(frozen=True)
class Units:
    """FLOPs of bare calls of the models, of which the FLOPs of any workload are made up."""

    sample: int  # one UNet call on one sample
    frame: int  # one more in-between frame in a UNet call with reference attention
    frames_call: int  # keys and values of the references, projected once for all frames of a UNet call
    encode: int  # one image encoded by the VAE
    decode: int  # one image decoded by the VAE
    text: int  # one prompt encoded
    lora_step: int  # forward and backward pass of both inputs, with gradients for the LoRA alone

    def inference(self, workload: Workload) -> int:
        """FLOPs of a workload without its LoRA fit."""
        unet = workload.pair_samples * self.sample + workload.steps * self.frames(workload.frames, workload.chunks)
        return unet + 2 * self.encode + workload.frames * self.decode + self.text

    def frames(self, frames: int, calls: int) -> int:
        """FLOPs of one step of so many frames in so many UNet calls."""
        return frames * self.frame + calls * self.frames_call

    def whole(self, workload: Workload) -> int:
        """FLOPs of a workload with its LoRA fit."""
        return self.inference(workload) + workload.lora_steps * self.lora_step


def cascade_samples(canvas: Canvas, cell: int, largest: Size, steps: int, plan: FrameDetail | None = None) -> int:
    """How many samples the UNet processes to refine a frame, tile by tile.

    Args:
        canvas: Where the photos sit.
        cell: Pixels a side of a latent cell.
        largest: Size of a tile in latent cells.
        steps: Number of steps that every level takes.
        plan: What `plan_detail` decided for the frame; None for a frame that takes nothing from the photos, whose
            number no other exceeds.
    """
    levels = [Level.of(size, canvas, cell, largest, torch.device("cpu")) for size in level_sizes(canvas)]
    return steps * sum(len(level.cells if plan is None else level.needed(plan)) for level in levels)


def count_flops(run: Callable[[], object]) -> int:
    """FLOPs of the matrix products, convolutions and attention that `run` computes."""
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        run()
    return counter.get_total_flops()


def attention_kernels(run: Callable[[], object]) -> list[str]:
    """Names of the fused attention kernels that `run` uses."""
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        run()
    return sorted(str(op) for op in counter.get_flop_counts()["Global"] if "attention" in str(op))


class BareCalls:
    """Calls of the models alone, on random inputs of one size; the models' tensors may be real or fake.

    Args:
        unet: the noise predictor.
        vae: the autoencoder.
        text_encoder: the encoder of prompts.
        side: side of the images in pixels.
        lora: a LoRA on the UNet, with which `fit_step` is a step of its fit.
    """

    def __init__(self, unet, vae, text_encoder, side: int, lora: TrainedLora | None = None):
        self.unet, self.vae, self.text_encoder, self.side, self.lora = unet, vae, text_encoder, side, lora
        self.tokens = text_encoder.config.max_position_embeddings
        self.cells = side // 2 ** (len(vae.config.block_out_channels) - 1)

    def _random(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=self.unet.dtype, device=self.unet.device)

    def latents(self, batch: int) -> torch.Tensor:
        """Random latents, (B, C, h, w)."""
        return self._random(batch, self.unet.config.in_channels, self.cells, self.cells)

    def call_unet(self, batch: int) -> torch.Tensor:
        """Call the UNet once, on random latents and a random prompt."""
        text = self._random(batch, self.tokens, self.unet.config.cross_attention_dim)
        timesteps = torch.full((batch,), 500, device=self.unet.device)
        return self.unet(self.latents(batch), timesteps, text, return_dict=False)[0]

    @contextmanager
    def referring(self, blocks: tuple[int, ...] = (2, 3)) -> Iterator[None]:
        """While the context lasts, samples of UNet calls attend to two recorded inputs, as in-between frames do."""
        with reference_attention(self.unet, blocks) as references:
            with references.led_by_inputs():
                self.call_unet(2)
            yield

    def encode(self):
        """Encode one random image."""
        return self.vae.encode(self._random(1, 3, self.side, self.side))

    def decode(self):
        """Decode one random latent."""
        return self.vae.decode(self.latents(1))

    def embed(self):
        """Encode one prompt."""
        return self.text_encoder(torch.zeros(1, self.tokens, dtype=torch.long, device=self.unet.device))

    def fit_step(self) -> None:
        """One forward and backward pass, as in the LoRA fit."""
        with torch.enable_grad():
            self.lora.act()
            self.call_unet(2).float().square().mean().backward()


@torch.no_grad()
def count_units(bare: BareCalls, fitted: BareCalls, blocks: tuple[int, ...] = (2, 3)) -> Units:
    """Count the FLOPs of every bare call.

    Args:
        bare: calls of the models as they are.
        fitted: calls of the same models, with a LoRA on the UNet.
        blocks: indices of the up blocks in which frames attend to the inputs.
    """
    sample = count_flops(lambda: bare.call_unet(1))
    with bare.referring(blocks):
        one, two = (count_flops(lambda n=n: bare.call_unet(n)) for n in (1, 2))
    encode, decode, text = map(count_flops, (bare.encode, bare.decode, bare.embed))
    return Units(sample, two - one, 2 * one - two, encode, decode, text, count_flops(fitted.fit_step))


class PeakBytes(TorchDispatchMode):
    """A context that measures the peak of the bytes of all live tensors that are made inside.

    Memory that kernels use for themselves is not counted.
    """

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def ignore(self, module: torch.nn.Module) -> PeakBytes:
        """Leave out the weights of a model, of which calls make views."""
        self._known |= {parameter.untyped_storage()._cdata for parameter in module.parameters()}
        return self

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._add(leaf.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def count_peak(module: torch.nn.Module, run: Callable[[], object]) -> int:
    """Peak bytes of the tensors that `run` makes, without the weights of `module`."""
    with PeakBytes().ignore(module) as peak:
        run()
    return peak.peak
