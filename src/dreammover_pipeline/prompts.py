# SPDX-License-Identifier: Apache-2.0
"""The texts of a call, checked and assigned to its pairs: prompts, or embeddings instead of prompts."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .inputs import check_one_for_each_pair


@dataclass(frozen=True, eq=False)
class PairText:
    """What the two photos of a pair show: either two prompts, or two embeddings (2, L, D) instead of them."""

    prompts: tuple[str, str] | None = None
    embeds: torch.Tensor | None = None


@dataclass(frozen=True, eq=False)
class NegativeText:
    """What guidance leads a pair's frames away from: a prompt (None is the empty prompt), or embeddings (1, L, D)."""

    prompt: str | None = None
    embeds: torch.Tensor | None = None


def pair_texts(prompt, prompt_embeds, pairs: int, batched: bool, width: int) -> list[PairText]:
    """What the photos of every pair show, from the `prompt` or the `prompt_embeds` argument.

    Args:
        prompt: The `prompt` argument of the call.
        prompt_embeds: The `prompt_embeds` argument of the call.
        pairs: Number of pairs in the call.
        batched: Whether the photos came as a batch.
        width: Length of a token's embedding.

    Raises:
        TypeError, ValueError: Neither prompts nor embeddings were given, or both were, or their form is not allowed.
    """
    if prompt_embeds is None:
        return [PairText(prompts) for prompts in pair_prompts(prompt, pairs, batched)]
    if prompt:
        raise ValueError("pass `prompt` or `prompt_embeds`, not both")
    embeds = pair_embeds("prompt_embeds", prompt_embeds, pairs)
    _check_width("prompt_embeds", prompt_embeds, width)
    return [PairText(embeds=item) for item in embeds]


def pair_prompts(prompt, pairs: int, batched: bool) -> list[tuple[str, str]]:
    """The two prompts of every pair.

    For one pair, `prompt` is a string, or two strings, one for each image. For a batch, it is a string or a tuple of
    two strings for all pairs, or a list that holds a string or two strings for each pair.

    Args:
        prompt: The `prompt` argument of the call.
        pairs: Number of pairs in the call.
        batched: Whether the photos came as a batch.

    Raises:
        TypeError, ValueError: `prompt` has a form that is not allowed.
    """

    def both(item, where: str) -> tuple[str, str]:
        if isinstance(item, str):
            return item, item
        if isinstance(item, (list, tuple)) and len(item) == 2 and all(isinstance(text, str) for text in item):
            return tuple(item)
        raise TypeError(f"{where} must be a string, or two strings, one per image; not {item!r}")

    if isinstance(prompt, (str, tuple)) or (not batched and isinstance(prompt, list) and len(prompt) == 2):
        return [both(prompt, "`prompt`")] * pairs
    if not isinstance(prompt, list):
        return [both(prompt, "`prompt`")]  # always raises, with a message that says which forms are allowed
    check_one_for_each_pair("prompt", prompt, pairs)
    return [both(item, f"`prompt[{i}]`") for i, item in enumerate(prompt)]


def pair_embeds(name: str, embeds, pairs: int) -> list[torch.Tensor]:
    """The two embeddings (2, L, D) of every pair, from a tensor of embeddings for all pairs of a call.

    Args:
        name: Name of the argument, for error messages.
        embeds: Embeddings (pairs, L, D), each for both images of a pair, or (2·pairs, L, D), each for one image.
        pairs: Number of pairs in the call.

    Raises:
        TypeError, ValueError: `embeds` is not a floating point tensor, its shape is not allowed, or a number in it is
            not finite.
    """
    check_embeds(name, embeds)
    if embeds.ndim != 3 or embeds.shape[0] not in (pairs, 2 * pairs):
        raise ValueError(
            f"`{name}` must be ({pairs}, L, D), one embedding per pair, or ({2 * pairs}, L, D), one per image; "
            f"not {tuple(embeds.shape)}"
        )
    return list(embeds.repeat_interleave(2 * pairs // embeds.shape[0], dim=0).unflatten(0, (pairs, 2)))


def check_embeds(name: str, embeds: object) -> None:
    """Raise TypeError or ValueError unless `embeds` is a tensor of finite floating point numbers."""
    if not isinstance(embeds, torch.Tensor) or not embeds.is_floating_point():
        raise TypeError(f"`{name}` must be a floating point tensor, not {type(embeds).__name__}")
    if not embeds.isfinite().all():
        raise ValueError(f"`{name}` must hold finite numbers only")


def pair_negatives(negative_prompt, negative_prompt_embeds, pairs: int, width: int) -> list[NegativeText]:
    """What guidance leads the frames of every pair away from.

    Args:
        negative_prompt: The `negative_prompt` argument of the call.
        negative_prompt_embeds: The `negative_prompt_embeds` argument of the call.
        pairs: Number of pairs in the call.
        width: Length of a token's embedding.

    Raises:
        TypeError, ValueError: Both negative prompts and negative embeddings were given, or their form is not allowed.
    """
    if negative_prompt_embeds is None:
        single = negative_prompt is None or isinstance(negative_prompt, str)
        texts = [negative_prompt] * pairs if single else negative_prompt
        if not isinstance(texts, list | tuple) or not all(text is None or isinstance(text, str) for text in texts):
            raise TypeError(f"`negative_prompt` must be a string or a list of them, not {negative_prompt!r}")
        if len(texts) != pairs:
            raise ValueError(
                f"`negative_prompt` has {len(texts)} entries for {pairs} pair{'s' * (pairs != 1)} of images; "
                "give one text for all"
            )
        return [NegativeText(text) for text in texts]
    if negative_prompt is not None:
        raise ValueError("pass `negative_prompt` or `negative_prompt_embeds`, not both")
    pair_embeds("negative_prompt_embeds", negative_prompt_embeds, pairs)
    _check_width("negative_prompt_embeds", negative_prompt_embeds, width)
    if len(negative_prompt_embeds) != pairs:
        raise ValueError(
            f"`negative_prompt_embeds` must hold one embedding per pair, {pairs}, not {len(negative_prompt_embeds)}"
        )
    return [NegativeText(embeds=item) for item in negative_prompt_embeds.split(1)]


def _check_width(name: str, embeds: torch.Tensor, width: int) -> None:
    if embeds.shape[-1] != width:
        raise ValueError(f"`{name}` must be (B, L, {width}) for this UNet, not {tuple(embeds.shape)}")
