# SPDX-License-Identifier: Apache-2.0
"""The texts of a call, checked and dealt out to its pairs: prompts, or their embeddings instead."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class PairText:
    """What the two photos of a pair show: two prompts, or instead of them their embeddings (2, L, D)."""

    prompts: tuple[str, str] | None = None
    embeds: torch.Tensor | None = None


@dataclass(frozen=True, eq=False)
class NegativeText:
    """What guidance leads a pair's frames away from: a prompt (None for the empty one), or embeddings (1, L, D)."""

    prompt: str | None = None
    embeds: torch.Tensor | None = None


def pair_texts(prompt, prompt_embeds, pairs: int, batched: bool, width: int) -> list[PairText]:
    """What the photos of every pair show.

    Args:
        prompt: The `prompt` argument.
        prompt_embeds: The `prompt_embeds` argument.
        pairs: How many pairs there are.
        batched: Whether they came as a batch.
        width: The length of a token's embedding.

    Raises:
        TypeError, ValueError: Neither prompts nor embeddings came, or both, or they are not what they may be.
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

    For one pair the argument is a string, or two strings, one for each image. For a batch it is a string or a tuple of
    two strings for all pairs, or a list that holds a string or two strings for each pair.

    Raises:
        TypeError, ValueError: The argument has another form.
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
        return [both(prompt, "`prompt`")]  # raises, in words
    if len(prompt) != pairs:
        raise ValueError(f"`prompt` has {len(prompt)} entries for {pairs} pair{'s' * (pairs != 1)} of images")
    return [both(item, f"`prompt[{i}]`") for i, item in enumerate(prompt)]


def pair_embeds(name: str, embeds, pairs: int) -> list[torch.Tensor]:
    """The two embeddings (2, L, D) of every pair, from (pairs, L, D), or from (2·pairs, L, D) with one per image.

    Raises:
        TypeError, ValueError: The argument is no floating point tensor, or has another shape.
    """
    if not isinstance(embeds, torch.Tensor) or not embeds.is_floating_point():
        raise TypeError(f"`{name}` must be a floating point tensor, not {type(embeds).__name__}")
    if embeds.ndim != 3 or embeds.shape[0] not in (pairs, 2 * pairs):
        raise ValueError(
            f"`{name}` must be ({pairs}, L, D), or ({2 * pairs}, L, D) with one per image; not {tuple(embeds.shape)}"
        )
    return list(embeds.repeat_interleave(2 * pairs // embeds.shape[0], dim=0).unflatten(0, (pairs, 2)))


def pair_negatives(negative_prompt, negative_prompt_embeds, pairs: int, width: int) -> list[NegativeText]:
    """What guidance leads the frames of every pair away from.

    Args:
        negative_prompt: The `negative_prompt` argument.
        negative_prompt_embeds: The `negative_prompt_embeds` argument.
        pairs: How many pairs there are.
        width: The length of a token's embedding.

    Raises:
        TypeError, ValueError: Both a prompt and embeddings came, or they are not what they may be.
    """
    if negative_prompt_embeds is None:
        single = negative_prompt is None or isinstance(negative_prompt, str)
        texts = [negative_prompt] * pairs if single else negative_prompt
        if not isinstance(texts, list) or not all(text is None or isinstance(text, str) for text in texts):
            raise TypeError(f"`negative_prompt` must be a string or a list of them, not {negative_prompt!r}")
        if len(texts) != pairs:
            raise ValueError(f"`negative_prompt` has {len(texts)} entries for {pairs} pair{'s' * (pairs != 1)}")
        return [NegativeText(text) for text in texts]
    if negative_prompt is not None:
        raise ValueError("pass `negative_prompt` or `negative_prompt_embeds`, not both")
    pair_embeds("negative_prompt_embeds", negative_prompt_embeds, pairs)
    _check_width("negative_prompt_embeds", negative_prompt_embeds, width)
    if len(negative_prompt_embeds) != pairs:
        raise ValueError(
            f"`negative_prompt_embeds` must hold one per pair, {pairs}, not {len(negative_prompt_embeds)}"
        )
    return [NegativeText(embeds=item) for item in negative_prompt_embeds.split(1)]


def _check_width(name: str, embeds: torch.Tensor, width: int) -> None:
    if embeds.shape[-1] != width:
        raise ValueError(f"`{name}` must be (B, L, {width}) for this UNet, not {tuple(embeds.shape)}")
