# SPDX-License-Identifier: Apache-2.0
"""Attention whose gradients are the same bits every time on a GPU.

The fused attentions of a GPU add the gradients of keys and values in whatever order its blocks finish, so that two
LoRA fits with one seed differ. Their forward pass does repeat. So here the forward pass is theirs, and the backward
pass is written out in matrix products, for a few queries at a time, so that it takes no more memory than theirs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

WEIGHTS_AT_ONCE = 2**24  # attention weights that the backward pass holds at once, which are 64 MiB in float32


class RepeatableAttention(torch.autograd.Function):
    """softmax(s Q Kᵀ) V, whose backward pass adds in one order."""

    @staticmethod
    def forward(ctx, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None) -> torch.Tensor:
        """Attend with the fused attention.

        Args:
            ctx: Holds what the backward pass needs.
            query: (…, L, E).
            key: (…, S, E).
            value: (…, S, Eᵥ).
            scale: s; None for 1/√E.

        Returns:
            (…, L, Eᵥ).
        """
        attended = F.scaled_dot_product_attention(query, key, value, scale=scale)
        ctx.save_for_backward(query, key, value, attended)
        ctx.scale = query.shape[-1] ** -0.5 if scale is None else scale
        return attended

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The gradients of query, key and value; with P the weights and dO the gradient of the result O:

        dV = Pᵀ dO, dS = P ∘ (dO Vᵀ − rowsum(dO ∘ O)), dQ = s dS K, dK = s dSᵀ Q.
        """
        query, key, value, attended = (saved.detach() for saved in ctx.saved_tensors)
        rows = query.shape[:-2].numel() * key.shape[-2]
        piece = max(WEIGHTS_AT_ONCE // rows, 1)
        wide = torch.promote_types(key.dtype, torch.float32)
        of_query, of_key, of_value = [], torch.zeros_like(key, dtype=wide), torch.zeros_like(value, dtype=wide)
        for q, out, grad in zip(*(tensor.split(piece, dim=-2) for tensor in (query, attended, gradient)), strict=True):
            weights = torch.softmax((ctx.scale * q) @ key.mT, dim=-1, dtype=wide)
            of_value += weights.to(grad.dtype).mT @ grad
            inner = (grad * out).sum(-1, keepdim=True, dtype=wide)
            scores = (weights * (grad @ value.mT - inner)).to(q.dtype)
            of_query.append(ctx.scale * (scores @ key))
            of_key += scores.mT @ (ctx.scale * q)
        return torch.cat(of_query, dim=-2), of_key.to(key.dtype), of_value.to(value.dtype), None


class _Repeatable(TorchFunctionMode):
    """A context in which plain attention is `RepeatableAttention`; attention with a mask or dropout stays as it is."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        options = {name: value for name, value in kwargs.items() if value is not None and value is not False}
        plain = len(args) == 3 and (options.keys() <= {"scale", "dropout_p"}) and not options.get("dropout_p")
        if func is F.scaled_dot_product_attention and plain:
            return RepeatableAttention.apply(*args, options.get("scale"))
        return func(*args, **kwargs)


class RepeatableProcessor:
    """An attention processor that attends as another one does, with gradients that repeat their bits.

    Args:
        inner: The other one.
    """

    def __init__(self, inner):
        self.inner = inner

    def __call__(self, attn, *args, **kwargs):
        """Attend. A backward pass may call this in a thread of its own, so the context is entered here."""
        with _Repeatable():
            return self.inner(attn, *args, **kwargs)


@contextmanager
def repeatable_attention(unet: torch.nn.Module) -> Iterator[None]:
    """Have the gradients of a UNet's attentions repeat their bits while the context lasts, on a GPU.

    Processors that attend by other means than torch's fused attention, such as xFormers', stay as they are.

    Args:
        unet: A `UNet2DConditionModel`.
    """
    installed = dict(unet.attn_processors)
    try:
        unet.set_attn_processor({name: RepeatableProcessor(processor) for name, processor in installed.items()})
        yield
    finally:
        unet.set_attn_processor(installed)
