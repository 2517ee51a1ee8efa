# SPDX-License-Identifier: Apache-2.0
"""Reference attention: in-between frames keep their own queries and attend to the keys and values of the two inputs.

Each attention processor wraps the one that it replaces. The wrapped one gets the inputs' tokens as
`encoder_hidden_states` and projects them to exactly K⁰⊕K¹ and V⁰⊕V¹, because projections act on every token by itself.
So LoRA layers, sliced attention and whatever else the user installed go on working, with the keyword arguments that
the user passes to them.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache

import torch
from diffusers.models.attention_processor import AttnProcessor2_0


def self_attention_names(unet: torch.nn.Module, block: int) -> list[str]:
    """Names, as in `unet.attn_processors`, of the self-attentions (`attn1`) of `unet.up_blocks[block]`."""
    # `unet.attn_processors` would go through all blocks to name those of one.
    names = [name for name, module in unet.up_blocks[block].named_modules() if hasattr(module, "get_processor")]
    return [f"up_blocks.{block}.{name}.processor" for name in names if name.endswith("attn1")]


class References:
    """What the self-attentions that look at the two inputs share.

    Args:
        layers: Names of the self-attention layers, as in `unet.attn_processors`.
    """

    def __init__(self, layers: Sequence[str]):
        self.layers = layers
        self.processors: list[ReferenceAttnProcessor] = []
        self.led_groups = 0

    def forget(self) -> None:
        """Forget the inputs' tokens of the step before."""
        for processor in self.processors:
            processor.tokens = None

    @contextmanager
    def led_by_inputs(self, groups: int = 1) -> Iterator[None]:
        """Expect the two inputs at the head of each group of a batch while the context lasts.

        They attend to themselves and are recorded. The frames that follow them in their group, if any, attend to them
        at once; so the first batch of a step needs no call of the UNet before it.

        Args:
            groups: The number G of groups in the batch: 2 with classifier-free guidance (unconditional, conditional),
                otherwise 1.
        """
        self.forget()  # with tokens left over, torch.compile would compile a second case for later recordings
        self.led_groups = groups
        try:
            yield
        finally:
            self.led_groups = 0


class ReferenceAttnProcessor:
    """Self-attention of in-between frames on the two inputs: Q = Q^δ, K = K⁰⊕K¹, V = V⁰⊕V¹.

    These keys and values replace the frames' own, which are never computed.

    Source: DreamMover Eq. (9), §3.4 and DreamMover Eq. (10), §3.4.
    """

    def __init__(self, inner, references: References):
        # A fused processor projects q, k and v of one sequence at once and cannot take k and v from another sequence.
        self.inner = _separate(inner)
        self.references = references
        self.tokens: torch.Tensor | None = None  # of the inputs at the current denoising step, (G·2, L, C)

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **kwargs):
        """Attend from `hidden_states`: frames (G·F, L, C), or groups that the inputs lead (G·(2 + F), L, C)."""
        groups = self.references.led_groups
        if not groups:
            return self._attend_to_inputs(attn, hidden_states, kwargs)
        of_groups = hidden_states.unflatten(0, (groups, -1))
        # A copy, since a part of the batch would keep the whole batch in memory until the next step.
        inputs = self.tokens = of_groups[:, :2].flatten(0, 1).clone()
        attended = self.inner(attn, inputs, attention_mask=attention_mask, **kwargs)
        frames = of_groups[:, 2:].flatten(0, 1)
        if not len(frames):
            return attended
        parts = [attended, self._attend_to_inputs(attn, frames, kwargs)]
        return torch.cat([part.unflatten(0, (groups, -1)) for part in parts], dim=1).flatten(0, 1)

    def _attend_to_inputs(self, attn, hidden_states: torch.Tensor, kwargs: dict) -> torch.Tensor:
        """Attend from frames (G·F, L, C) to the inputs that were recorded last."""
        tokens = self.tokens
        if tokens is None:
            raise RuntimeError("frames cannot attend to the inputs before these led a batch, in `led_by_inputs`")
        groups, (batch, length, channels) = len(tokens) // 2, hidden_states.shape
        # All queries of a group form one long sequence, so that the inputs' K and V are projected once for all frames.
        queries = hidden_states.reshape(groups, batch // groups * length, channels)
        tokens = tokens.reshape(groups, 2 * length, channels)
        attended = self.inner(attn, queries, encoder_hidden_states=tokens, **kwargs)
        return attended.reshape(batch, length, channels)


@lru_cache(maxsize=64)
def naming_arguments_of(inner: type, wrapper: type) -> type:
    """A kind of the wrapper whose `__call__` names the arguments of the processor that it wraps.

    diffusers hands a processor only those of the user's keyword arguments that its `__call__` names.

    Args:
        inner: The class of an attention processor.
        wrapper: The class of processors that wrap it, and hand on what they are given.
    """

    def call(self, *args, **kwargs):
        return wrapper.__call__(self, *args, **kwargs)

    call.__signature__ = inspect.signature(inner.__call__)
    return type(wrapper.__name__, (wrapper,), {"__call__": call, "__module__": wrapper.__module__})


def _separate(processor):
    """A processor like this one that uses the separate projections, which `fuse_qkv_projections` leaves in a layer."""
    return AttnProcessor2_0() if type(processor).__name__.startswith("Fused") else processor


@contextmanager
def separate_projections(unet: torch.nn.Module) -> Iterator[None]:
    """Have q, k and v projected apart while the context lasts, also after `fuse_qkv_projections`.

    A LoRA on `to_q`, `to_k` and `to_v` can neither be fitted nor act where one fused projection computes instead.

    Args:
        unet: A `UNet2DConditionModel`.
    """
    installed = dict(unet.attn_processors)
    separate = {name: _separate(processor) for name, processor in installed.items()}
    if all(separate[name] is installed[name] for name in installed):
        yield
        return
    try:
        unet.set_attn_processor(separate)
        yield
    finally:
        unet.set_attn_processor(installed)


@contextmanager
def reference_attention(unet: torch.nn.Module, blocks: Sequence[int]) -> Iterator[References]:
    """Install reference attention in the self-attentions of some up blocks, and put everything back afterwards.

    At every step the caller first runs the two inputs through the UNet, and as many frames behind them as it likes,
    inside `references.led_by_inputs()`; then the other frames, in any number of pieces. With guidance, every batch
    is (unconditional, conditional), concatenated, and the inputs lead both groups.

    Source: DreamMover §3.4. Official code differs: the last six of nine layers found by counting calls; here the
    blocks are named, `up_blocks.2` and `up_blocks.3` being the same six layers.

    Args:
        unet: A `UNet2DConditionModel`.
        blocks: Indices into `unet.up_blocks`; a block without self-attention changes nothing.

    Yields:
        The `References` that all installed processors share.
    """
    installed = dict(unet.attn_processors)
    references = References([name for block in blocks for name in self_attention_names(unet, block)])
    wrapped = {
        name: naming_arguments_of(type(installed[name]), ReferenceAttnProcessor)(installed[name], references)
        for name in references.layers
    }
    references.processors.extend(wrapped.values())
    try:
        unet.set_attn_processor({**installed, **wrapped})
        yield references
    finally:
        unet.set_attn_processor(dict(installed))
        references.forget()
