# SPDX-License-Identifier: Apache-2.0
"""Attention and convolutions whose gradients are the same bits every time on a GPU.

The fused attentions of a GPU share the keys of an image among blocks, which add their parts of a gradient in whatever
order they finish, so that two LoRA fits with one seed differ. Torch's memory-efficient attention can leave all keys to
one block; then it repeats its bits, but has few blocks. So here it is given a few queries at a time as if they were
images of their own, and what each of these adds to the gradients of keys and values is summed in one order.

Where that attention does not work, the gradients are written out in matrix products.

cuDNN has algorithms for the gradients of convolutions that do not repeat their bits either. It can be told not to take
them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from .attention import naming_arguments_of

QUERY_PARTS = 32  # largest number of parts that an image's queries are divided into, so that all of a GPU has work
PART = 64  # number that the queries of a part are a multiple of, as the kernels divide them themselves
GRADIENTS_AT_ONCE = 2**26  # largest number of elements in what all parts of an image add to the gradient of its keys
WEIGHTS_AT_ONCE = 2**24  # attention weights that are held at once when written out, which are 64 MiB in float32

_cudnn_lock = Lock()
# What cuDNN's settings were, deterministic and benchmark, once for each context that makes convolutions repeat.
_found_by_contexts: list[tuple[bool, bool]] = []


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None = None) -> torch.Tensor:
    """softmax(s Q Kᵀ) V, whose gradients are the same bits every time.

    Args:
        query: The queries Q, (B, heads, L, E).
        key: The keys K, (B, heads, S, E).
        value: The values V, (B, heads, S, Eᵥ).
        scale: The factor s of the products of queries and keys; None for 1/√E.

    Returns:
        (B, heads, L, Eᵥ).
    """
    function = EfficientAttention if is_efficient(query, key, value) else WrittenAttention
    return function.apply(query, key, value, scale)


def is_efficient(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether torch's memory-efficient attention works on these tensors, with as many blocks as it is told."""
    cuda = torch.backends.cuda
    if not query.is_cuda or torch.version.hip or query.dim() != 4:
        return False
    return cuda.can_use_efficient_attention(cuda.SDPAParams(query, key, value, None, 0.0, False, False))


class EfficientAttention(torch.autograd.Function):
    """Attention by torch's memory-efficient kernels, with one block for all keys in the backward pass."""

    @staticmethod
    def forward(ctx, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None) -> torch.Tensor:
        """Attend, as `attend` describes it; `ctx` holds what the backward pass needs."""
        attended, logsumexp, *random = torch.ops.aten._scaled_dot_product_efficient_attention(
            query, key, value, None, True, scale=scale
        )
        ctx.save_for_backward(query, key, value, attended, logsumexp, *random)
        ctx.scale = scale
        return attended

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The gradients of query, key and value."""
        query, key, value, attended, logsumexp, *random = (saved.detach() for saved in ctx.saved_tensors)
        queries = query.shape[2]
        most = min(QUERY_PARTS, GRADIENTS_AT_ONCE // key[0].numel())
        parts = next((n for n in range(most, 1, -1) if queries % (n * PART) == 0), 1)

        def divided(x: torch.Tensor) -> torch.Tensor:
            """(heads, L, …) as parts, in the kernels' layout: (parts, L / parts, heads, …)."""
            return x.unflatten(1, (parts, -1)).movedim(0, 2)

        def repeated(x: torch.Tensor) -> torch.Tensor:
            return x.transpose(0, 1).expand(parts, -1, -1, -1)

        gradients = []
        for q, k, v, out, grad, lse in zip(query, key, value, attended, gradient, logsumexp, strict=True):
            of_query, *of_both, _ = torch.ops.aten._efficient_attention_backward(
                divided(grad),
                divided(q),
                repeated(k),
                repeated(v),
                None,
                divided(out),
                None,
                None,
                queries // parts,
                k.shape[1],
                divided(lse).transpose(1, 2).contiguous(),
                0.0,
                *random,
                0,
                False,
                scale=ctx.scale,
                num_splits_key=1,
            )
            gradients.append((of_query.flatten(0, 1), *(x.sum(0, dtype=torch.float32).to(x.dtype) for x in of_both)))
        return *(torch.stack(of).transpose(1, 2) for of in zip(*gradients, strict=True)), None


class WrittenAttention(torch.autograd.Function):
    """Attention whose backward pass is written out, for a few queries at a time, so that it takes little memory."""

    @staticmethod
    def forward(ctx, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None) -> torch.Tensor:
        """Attend, as `attend` describes it; `ctx` holds what the backward pass needs."""
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
    """A context in which plain attention is `attend`; attention with a mask or dropout stays as it is."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        options = {name: value for name, value in kwargs.items() if value is not None and value is not False}
        plain = len(args) == 3 and (options.keys() <= {"scale", "dropout_p"}) and not options.get("dropout_p")
        if func is F.scaled_dot_product_attention and plain:
            return attend(*args, options.get("scale"))
        return func(*args, **kwargs)


class RepeatableProcessor:
    """An attention processor that attends as another one does, with gradients that repeat their bits.

    Args:
        inner: The attention processor that does the work.
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
        unet.set_attn_processor(
            {
                name: naming_arguments_of(type(processor), RepeatableProcessor)(processor)
                for name, processor in installed.items()
            }
        )
        yield
    finally:
        unet.set_attn_processor(installed)


@contextmanager
def repeatable_convolutions() -> Iterator[None]:
    """Have cuDNN take only algorithms that repeat their bits while the context lasts.

    The setting is the whole process's. Of several contexts, in whatever threads, the first to begin makes it and the
    last to end undoes it.
    """
    cudnn = torch.backends.cudnn
    with _cudnn_lock:
        if not _found_by_contexts:
            found = cudnn.deterministic, cudnn.benchmark
            # What is fastest in a trial may be another algorithm every time.
            cudnn.deterministic, cudnn.benchmark = True, False
        else:
            found = _found_by_contexts[0]
        _found_by_contexts.append(found)
    try:
        yield
    finally:
        with _cudnn_lock:
            found = _found_by_contexts.pop()
            if not _found_by_contexts:
                cudnn.deterministic, cudnn.benchmark = found
