# SPDX-License-Identifier: Apache-2.0
"""Exact counts: calls, FLOPs (a multiply-add is 2) and peak bytes of live tensors. Nothing here is timed."""

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

aten = torch.ops.aten
# torch counts the fused attention of every device but the CPU.
CPU_ATTENTION = {
    aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v)
    ),
}


@dataclass(frozen=True)
class Job:
    """F frames over T steps, at most `chunk` at once, after L steps of the LoRA fit. Source: docs/method.md §7."""

    frames: int
    steps: int
    chunk: int
    lora_steps: int = 0

    @property
    def chunks(self) -> int:
        """UNet calls a step takes for the frames."""
        return -(-self.frames // self.chunk)

    @property
    def pair_calls(self) -> int:
        """UNet calls on the two inputs outside the fit: inversion and ε at its end, features, references."""
        return self.steps + 1 + 1 + self.steps

    @property
    def unet_calls(self) -> int:
        """UNet calls of any size."""
        return self.lora_steps + self.pair_calls + self.steps * self.chunks

    @property
    def unet_samples(self) -> int:
        """UNet forwards of one sample: 2L + 2(T+1) + 2 + 2T + F·T."""
        return 2 * self.lora_steps + 2 * self.pair_calls + self.frames * self.steps


@dataclass(frozen=True)
class Units:
    """FLOPs of bare calls of the models."""

    sample: int  # UNet, one sample
    frame: int  # UNet, one more in-between frame in a call, looking at the references
    frames_call: int  # the references' keys and values, projected once for all frames of a call
    encode: int
    decode: int
    text: int
    lora_step: int  # forward and backward of both inputs, the base frozen

    def inference(self, job: Job) -> int:
        """FLOPs of a job without its LoRA fit."""
        unet = 2 * job.pair_calls * self.sample + job.steps * self.frames(job.frames, job.chunks)
        return unet + 2 * self.encode + job.frames * self.decode + self.text

    def frames(self, frames: int, calls: int) -> int:
        """FLOPs of one step of the frames."""
        return frames * self.frame + calls * self.frames_call

    def whole(self, job: Job) -> int:
        """FLOPs of a job."""
        return self.inference(job) + job.lora_steps * self.lora_step


def count_flops(run: Callable[[], object]) -> int:
    """FLOPs of whatever `run` does: matrix products, convolutions and attention."""
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        run()
    return counter.get_total_flops()


def attention_kernels(run: Callable[[], object]) -> list[str]:
    """Names of the fused attention kernels that `run` uses."""
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        run()
    return sorted(str(op) for op in counter.get_flop_counts()["Global"] if "attention" in str(op))


class BareCalls:
    """The models alone, asked about random inputs of one size, on real or on fake tensors alike.

    Args:
        unet, vae, text_encoder: the models.
        side: pixels.
    """

    def __init__(self, unet, vae, text_encoder, side: int):
        self.unet, self.vae, self.text_encoder, self.side = unet, vae, text_encoder, side
        self.tokens = text_encoder.config.max_position_embeddings
        self.cells = side // 2 ** (len(vae.config.block_out_channels) - 1)

    def _random(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=self.unet.dtype, device=self.unet.device)

    def latents(self, batch: int) -> torch.Tensor:
        """(B, C, h, w)."""
        return self._random(batch, self.unet.config.in_channels, self.cells, self.cells)

    def call_unet(self, batch: int) -> torch.Tensor:
        """One UNet call."""
        text = self._random(batch, self.tokens, self.unet.config.cross_attention_dim)
        timesteps = torch.full((batch,), 500, device=self.unet.device)
        return self.unet(self.latents(batch), timesteps, text, return_dict=False)[0]

    @contextmanager
    def referring(self, blocks: tuple[int, ...] = (2, 3)) -> Iterator[None]:
        """Inside, UNet calls are of in-between frames that look at two inputs."""
        with reference_attention(self.unet, blocks) as references:
            with references.record():
                self.call_unet(2)
            yield

    def encode(self):
        """One image into latents."""
        return self.vae.encode(self._random(1, 3, self.side, self.side))

    def decode(self):
        """One frame out of latents."""
        return self.vae.decode(self.latents(1))

    def embed(self):
        """One text."""
        return self.text_encoder(torch.zeros(1, self.tokens, dtype=torch.long, device=self.unet.device))

    def fit_step(self) -> None:
        """Forward and backward of the LoRA fit; the UNet carries an adapter."""
        with torch.enable_grad():
            self.call_unet(2).float().square().mean().backward()


@torch.no_grad()
def count_units(bare: BareCalls, fitted: BareCalls, blocks: tuple[int, ...] = (2, 3)) -> Units:
    """Count every bare call.

    Args:
        bare: the models as they are.
        fitted: the same with an adapter to be fitted.
        blocks: up blocks in which frames look at the inputs.
    """
    sample = count_flops(lambda: bare.call_unet(1))
    with bare.referring(blocks):
        one, two = (count_flops(lambda n=n: bare.call_unet(n)) for n in (1, 2))
    encode, decode, text = map(count_flops, (bare.encode, bare.decode, bare.embed))
    return Units(sample, two - one, 2 * one - two, encode, decode, text, count_flops(fitted.fit_step))


class PeakBytes(TorchDispatchMode):
    """Largest sum of the bytes of all tensors alive at once that were made inside; scratch of kernels is not seen."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def ignore(self, module: torch.nn.Module) -> PeakBytes:
        """Leave a model's weights out, whose views calls make."""
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
    """Peak bytes of what `run` makes, a model's weights aside."""
    with PeakBytes().ignore(module) as peak:
        run()
    return peak.peak
