# SPDX-License-Identifier: Apache-2.0
"""Checks of the arguments that are not pictures, made before any model runs.

Every error names the argument, says what came and what is allowed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from numbers import Integral, Real

import torch

FUSIONS = ("two_level", "two_level_unwarped", "direct")
IMPORTANCES = ("agreement", "photometric")
ENDPOINTS = ("original", "reconstructed")
OUTPUT_TYPES = ("pil", "np", "pt", "latent")


def check_integer(name: str, value, minimum: int) -> None:
    """Raise unless `value` is an integer of at least `minimum`."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"`{name}` must be an integer, not {value!r} of type {type(value).__name__}")
    if value < minimum:
        raise ValueError(f"`{name}` must be at least {minimum}, not {value}")


def check_number(name: str, value, minimum: float, inclusive: bool = True) -> None:
    """Raise unless `value` is a finite real number of at least (or, not inclusive, above) `minimum`."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"`{name}` must be a number, not {value!r} of type {type(value).__name__}")
    if not math.isfinite(value) or value < minimum or (value == minimum and not inclusive):
        bound = "at least" if inclusive else "above"
        raise ValueError(f"`{name}` must be finite and {bound} {minimum}, not {value}")


def check_choice(name: str, value, allowed: Sequence[str]) -> None:
    """Raise unless `value` is one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, allowed))}, not {value!r}")


def check_steps(num_inference_steps, inversion_steps, feature_step, num_train_timesteps: int) -> None:
    """Raise unless 1 ≤ feature_step ≤ inversion_steps ≤ num_inference_steps ≤ num_train_timesteps."""
    for name, value in (
        ("num_inference_steps", num_inference_steps),
        ("inversion_steps", inversion_steps),
        ("feature_step", feature_step),
    ):
        check_integer(name, value, 1)
    if num_inference_steps > num_train_timesteps:
        raise ValueError(
            f"`num_inference_steps` must be at most the {num_train_timesteps} timesteps the model was trained with, "
            f"not {num_inference_steps}"
        )
    if not feature_step <= inversion_steps <= num_inference_steps:
        raise ValueError(
            "the steps must nest, `feature_step` ≤ `inversion_steps` ≤ `num_inference_steps`, "
            f"but {feature_step}, {inversion_steps}, {num_inference_steps} came"
        )


def frame_times(n_frames, times) -> tuple[float, ...]:
    """The δ of the frames asked for: `times` where given, else δ_i = i/(n+1), i = 1 … n.

    Source: DreamMover §3.2, the positions of the in-between frames.

    Raises:
        TypeError, ValueError: `n_frames` is not an integer of at least 1, or `times` is empty or leaves (0, 1).
    """
    if times is None:
        check_integer("n_frames", n_frames, 1)
        return tuple(i / (n_frames + 1) for i in range(1, n_frames + 1))
    try:
        values = tuple(float(time) for time in times)
    except (TypeError, ValueError) as error:
        raise TypeError(f"`times` must be a sequence of numbers, not {times!r}") from error
    if not values:
        raise ValueError("`times` must hold at least one number, but it is empty")
    outside = [value for value in values if not 0 < torch.tensor(value).item() < 1]  # as float32, like the rest
    if outside:
        raise ValueError(f"`times` must lie strictly between 0 and 1, but {outside[0]} is among them")
    return values


def feature_blocks(blocks) -> tuple[int, ...]:
    """The `feature_block` argument, one index or several, as a tuple."""
    return (blocks,) if isinstance(blocks, Integral) else tuple(blocks)


def check_feature_blocks(blocks, up_blocks: int) -> None:
    """Raise unless `blocks` is the index of one of the UNet's `up_blocks`, or several different ones."""
    if isinstance(blocks, bool) or not isinstance(blocks, (Integral, Sequence)) or isinstance(blocks, str):
        raise TypeError(
            f"`feature_block` must be an integer or several, not {blocks!r} of type {type(blocks).__name__}"
        )
    indices = feature_blocks(blocks)
    for index in indices:
        check_integer("feature_block", index, 0)
        if index >= up_blocks:
            raise ValueError(f"`feature_block` {index} does not exist; the UNet has up blocks 0 … {up_blocks - 1}")
    if not indices or len(set(indices)) < len(indices):
        raise ValueError(f"`feature_block` must be one block or several different ones, not {blocks!r}")


def check_attention_blocks(blocks, self_attentions: Sequence[int]) -> None:
    """Raise unless every block exists and, if there are any, at least one has self-attention.

    Args:
        blocks: the `attention_blocks` argument.
        self_attentions: the number of self-attentions in each up block of the UNet.
    """
    if isinstance(blocks, str) or not isinstance(blocks, Iterable) or not all(type(block) is int for block in blocks):
        raise TypeError(f"`attention_blocks` must be a sequence of integers, not {blocks!r}")
    for block in blocks:
        if not 0 <= block < len(self_attentions):
            raise ValueError(
                f"`attention_blocks` names up block {block}, but the UNet has 0 … {len(self_attentions) - 1}"
            )
    if blocks and not any(self_attentions[block] for block in blocks):
        able = [block for block, count in enumerate(self_attentions) if count]
        raise ValueError(f"`attention_blocks` {tuple(blocks)} have no self-attention in this UNet; {able} have")


def pair_prompts(prompt, pairs: int, batched: bool) -> list[tuple[str, str]]:
    """Every pair's two prompts.

    One pair: a string, or two strings, one per image. A batch: a string or a tuple of two for all pairs, or a list
    with a string or two per pair.

    Raises:
        TypeError, ValueError: anything else.
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
    """Every pair's two embeddings (2, L, D), from (pairs, L, D), or from (2·pairs, L, D) with one per image.

    Raises:
        TypeError, ValueError: not a float tensor of one of those shapes.
    """
    if not isinstance(embeds, torch.Tensor) or not embeds.is_floating_point():
        raise TypeError(f"`{name}` must be a floating point tensor, not {type(embeds).__name__}")
    if embeds.ndim != 3 or embeds.shape[0] not in (pairs, 2 * pairs):
        raise ValueError(
            f"`{name}` must be ({pairs}, L, D), or ({2 * pairs}, L, D) with one per image; not {tuple(embeds.shape)}"
        )
    return list(embeds.repeat_interleave(2 * pairs // embeds.shape[0], dim=0).unflatten(0, (pairs, 2)))


def pair_texts(prompt, prompt_embeds, pairs: int, batched: bool, width: int) -> list[dict]:
    """For every pair, what its images show: {"prompt": two strings} or {"prompt_embeds": (2, L, width)}.

    Raises:
        TypeError, ValueError: neither, both, or not what they may be.
    """
    if prompt_embeds is None:
        return [{"prompt": texts} for texts in pair_prompts(prompt, pairs, batched)]
    if prompt:
        raise ValueError("pass `prompt` or `prompt_embeds`, not both")
    embeds = pair_embeds("prompt_embeds", prompt_embeds, pairs)
    _check_width("prompt_embeds", prompt_embeds, width)
    return [{"prompt": None, "prompt_embeds": item} for item in embeds]


def pair_negatives(negative_prompt, negative_prompt_embeds, pairs: int, width: int) -> list[dict]:
    """For every pair, what guidance leads away from: {"negative_prompt": …} or {"negative_prompt_embeds": …}.

    Raises:
        TypeError, ValueError: both, or not what they may be.
    """
    if negative_prompt_embeds is None:
        single = negative_prompt is None or isinstance(negative_prompt, str)
        texts = [negative_prompt] * pairs if single else negative_prompt
        if not isinstance(texts, list) or not all(text is None or isinstance(text, str) for text in texts):
            raise TypeError(f"`negative_prompt` must be a string or a list of them, not {negative_prompt!r}")
        if len(texts) != pairs:
            raise ValueError(f"`negative_prompt` has {len(texts)} entries for {pairs} pair{'s' * (pairs != 1)}")
        return [{"negative_prompt": text} for text in texts]
    if negative_prompt is not None:
        raise ValueError("pass `negative_prompt` or `negative_prompt_embeds`, not both")
    pair_embeds("negative_prompt_embeds", negative_prompt_embeds, pairs)
    _check_width("negative_prompt_embeds", negative_prompt_embeds, width)
    if len(negative_prompt_embeds) != pairs:
        raise ValueError(
            f"`negative_prompt_embeds` must hold one per pair, {pairs}, not {len(negative_prompt_embeds)}"
        )
    return [{"negative_prompt_embeds": item} for item in negative_prompt_embeds.split(1)]


def pair_entries(name: str, value, pairs: int, batched: bool) -> list:
    """Every pair's entry of an argument that a batch gives as a list, None for a pair without.

    Raises:
        TypeError, ValueError: a batch's is no list, or has not one entry per pair.
    """
    if value is None or not batched:
        return [value] * pairs
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"`{name}` of a batch must be a list, one entry per pair, not a {type(value).__name__}")
    if len(value) != pairs:
        raise ValueError(f"`{name}` has {len(value)} entries for {pairs} pair{'s' * (pairs != 1)} of images")
    return list(value)


def point_pairs(points, name: str = "points") -> torch.Tensor:
    """The `points` argument of one pair as (k, 2, 2): k correspondences, in the first and the last image, x and y.

    Raises:
        TypeError, ValueError: it is not a sequence of ((x0, y0), (x1, y1)), or a number is not finite.
    """
    if points is None or (isinstance(points, (list, tuple)) and not points):
        return torch.zeros(0, 2, 2)
    form = f"`{name}` must be a sequence of ((x0, y0), (x1, y1)), a place in each photo"
    try:
        values = torch.as_tensor(points, dtype=torch.float32, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{form}, not {points!r}") from error
    if values.ndim != 3 or values.shape[1:] != (2, 2):
        raise ValueError(f"{form}; this is of shape {tuple(values.shape)}, not (k, 2, 2)")
    if not values.isfinite().all():
        raise ValueError(f"`{name}` must be finite, but hold {values[~values.isfinite()][0]}")
    return values


def check_points_inside(points: torch.Tensor, sizes: Sequence[tuple[int, int]], name: str = "points") -> None:
    """Raise unless every one of the points (k, 2, 2) lies in its photo, of sizes (H, W)."""
    for i, correspondence in enumerate(points.tolist()):
        for photo, ((x, y), (height, width)) in enumerate(zip(correspondence, sizes, strict=True)):
            if not (-0.5 <= x <= width - 0.5 and -0.5 <= y <= height - 0.5):
                raise ValueError(
                    f"`{name}[{i}]` is at ({x:g}, {y:g}) in img{photo}, which has {width}×{height} pixels "
                    "(width × height)"
                )


def _check_width(name: str, embeds: torch.Tensor, width: int) -> None:
    if embeds.shape[-1] != width:
        raise ValueError(f"`{name}` must be (B, L, {width}) for this UNet, not {tuple(embeds.shape)}")


def pair_generators(generator, pairs: int) -> list[torch.Generator]:
    """A generator for each pair; a list holds one per pair already.

    Of a single generator (None: the global one) every pair gets a copy in its present state, so that a pair's result
    does not depend on what else is in the batch; the original moves on by one draw, so that the next call differs.
    """
    if isinstance(generator, (list, tuple)):
        return list(generator)
    generator = generator or torch.default_generator
    copies = [generator.clone_state() for _ in range(pairs)]
    draw_seed(generator)
    return copies


def draw_seed(generator: torch.Generator | None) -> int:
    """A seed drawn from the generator (None: the global one), which moves on by one draw."""
    generator = generator or torch.default_generator
    return int(torch.randint(2**62, (1,), generator=generator, device=generator.device))


def check_generator(generator, pairs: int) -> None:
    """Raise unless `generator` is None, a `torch.Generator`, or a list of one per pair."""
    items = generator if isinstance(generator, (list, tuple)) else [generator]
    if not (generator is None or all(isinstance(item, torch.Generator) for item in items)):
        raise TypeError(f"`generator` must be a torch.Generator or a list of them, not {generator!r}")
    if isinstance(generator, (list, tuple)) and len(generator) != pairs:
        raise ValueError(f"`generator` has {len(generator)} entries for {pairs} pair{'s' * (pairs != 1)} of images")
