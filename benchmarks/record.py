# SPDX-License-Identifier: Apache-2.0
"""Recording the model calls of a run, and making the same calls again with nothing around them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch

from dreammover_pipeline import DreamMoverPipeline
from dreammover_pipeline.attention import reference_attention


@dataclass(frozen=True)
class Call:
    """One call of a model."""

    function: Callable
    args: tuple
    kwargs: dict
    led_groups: int  # groups of its batch that the two inputs lead, to which other samples attend; else 0


@contextmanager
def recorded(pipe: DreamMoverPipeline) -> Iterator[list[Call]]:
    """While the context lasts, collect all calls of the UNet and of the VAE's encoder and decoder."""
    calls: list[Call] = []
    unet, vae = pipe.unet, pipe.vae
    tapped = [(unet, "forward", unet), (vae, "encode", vae.encode), (vae, "decode", vae.decode)]

    def tap(original: Callable, replayed: Callable) -> Callable:
        def call(*args, **kwargs):
            calls.append(Call(replayed, args, kwargs, _led_groups(unet) if original == forward else 0))
            return original(*args, **kwargs)

        return call

    forward = unet.forward
    try:
        for module, name, replayed in tapped:
            setattr(module, name, tap(getattr(module, name), replayed))
        yield calls
    finally:
        for module, name, _ in tapped:
            delattr(module, name)  # so that the method of the class is visible again


def _led_groups(unet: torch.nn.Module) -> int:
    """How many groups of the UNet's current batch are led by the two inputs of reference attention."""
    shared = [getattr(processor, "references", None) for processor in unet.attn_processors.values()]
    return max((references.led_groups for references in shared if references is not None), default=0)


@torch.no_grad()
def replay(unet: torch.nn.Module, calls: Sequence[Call], blocks: Sequence[int] = ()) -> None:
    """Make recorded calls again, and throw their results away.

    Args:
        unet: the UNet that the calls were made on.
        calls: the calls that `recorded` collected.
        blocks: indices of the up blocks whose self-attention looked at the references.
    """
    with reference_attention(unet, blocks) as references:
        for call in calls:
            with references.led_by_inputs(call.led_groups) if call.led_groups else nullcontext():
                call.function(*call.args, **call.kwargs)


def latents_of(call: Call) -> torch.Tensor:
    """The latents that a UNet call was given, (B, C, h, w)."""
    return call.args[0]
