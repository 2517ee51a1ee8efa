# SPDX-License-Identifier: Apache-2.0
"""The models' calls of a run, recorded, and the same calls again with nothing around them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch

from dreammover_pipeline import DreamMoverPipeline
from dreammover_pipeline.attention import reference_attention


@dataclass(frozen=True)
class Call:
    """One call of a model. `references` says that its tokens are what later calls attend to."""

    function: Callable
    args: tuple
    kwargs: dict
    references: bool


@contextmanager
def recorded(pipe: DreamMoverPipeline) -> Iterator[list[Call]]:
    """Collect the calls of the UNet and of the VAE's two halves while the context lasts."""
    calls: list[Call] = []
    unet, vae = pipe.unet, pipe.vae
    tapped = [(unet, "forward", unet), (vae, "encode", vae.encode), (vae, "decode", vae.decode)]

    def tap(original: Callable, replayed: Callable) -> Callable:
        def call(*args, **kwargs):
            calls.append(Call(replayed, args, kwargs, original == forward and _recording_references(unet)))
            return original(*args, **kwargs)

        return call

    forward = unet.forward
    try:
        for module, name, replayed in tapped:
            setattr(module, name, tap(getattr(module, name), replayed))
        yield calls
    finally:
        for module, name, _ in tapped:
            delattr(module, name)  # the class's own shows again


def _recording_references(unet: torch.nn.Module) -> bool:
    shared = [getattr(processor, "references", None) for processor in unet.attn_processors.values()]
    return any(references is not None and references.recording for references in shared)


@torch.no_grad()
def replay(unet: torch.nn.Module, calls: Sequence[Call], blocks: Sequence[int] = ()) -> None:
    """Make recorded calls again, their results thrown away.

    Args:
        unet: the UNet they were made on.
        calls: as `recorded` collected them.
        blocks: up blocks whose self-attention looked at the references.
    """
    with reference_attention(unet, blocks) as references:
        for call in calls:
            with references.record() if call.references else nullcontext():
                call.function(*call.args, **call.kwargs)


def latents_of(call: Call) -> torch.Tensor:
    """What a UNet call was asked about, (B, C, h, w)."""
    return call.args[0]
