# SPDX-License-Identifier: Apache-2.0
"""From what callers may pass to checked pairs, before any model runs.

Photos and masks are decoded once; prompts, embeddings, points, masks and generators are dealt out to the pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from .framing import fit, fit_points, fit_to_output, plan_canvas
from .given_flow import GivenFlow, given_flow
from .images import Photo, decode_images, is_batch, load_masks, rgb
from .inputs import check_choice, check_one_for_each_pair
from .poses import PosePair, pose_pair
from .prompts import NegativeText, PairText, pair_negatives, pair_texts
from .records import Canvas
from .settings import FLOWS, Content, NegativeContent
from .steering import Steering, cells_of, cells_that_move, check_points_inside, point_pairs


@dataclass(frozen=True)
class ModelSizes:
    """What of the models decides the form that photos and texts are brought into.

    `native_side` is the side in pixels of the square the checkpoint was trained on, `cell` the pixels a side of a
    latent cell, `text_width` the length of a token's embedding.
    """

    native_side: float
    cell: int
    text_width: int

    def canvas(self, image: torch.Tensor, height: int | None, width: int | None) -> Canvas:
        """The working size and the output size for a first photo (C, H, W) and the size asked for, if any.

        Raises:
            TypeError, ValueError: `height` or `width` is not allowed, or the working size is too small or too large.
        """
        return plan_canvas(
            tuple(image.shape[-2:]),
            native_side=self.native_side,
            multiple=math.lcm(8, self.cell),
            min_side=4 * self.cell,
            height=height,
            width=width,
        )


@dataclass(frozen=True, eq=False)
class PairInput:
    """One pair of a call, checked, in the form that the stages take.

    `photos` are the two as `decode_images` returns them; `canvas` is where both are put; `steering` is what the user
    says of the match, None where that is nothing; `flow` is what the flow comes from, one of `FLOWS`, a function of
    the two photos or the user's own flow; `poses` are those of the people in both, None for none; `seed` decides what
    is random, None where nothing is.
    """

    photos: tuple[torch.Tensor, torch.Tensor]
    canvas: Canvas
    text: PairText
    negative: NegativeText
    steering: Steering | None
    flow: str | Callable | GivenFlow
    poses: PosePair | None = None
    seed: int | None = None

    def fitted(self) -> torch.Tensor:
        """The two photos on their canvas, (2, 3, H, W) in [0, 1]."""
        return fitted_photos(self.photos, self.canvas)

    def ends(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The two photos as they stand at the ends of the video, as `fit_to_output` gives them."""
        first, last = (fit_to_output(photo, self.canvas) for photo in self.photos)
        return first, last


def fitted_photos(photos: Sequence[torch.Tensor], canvas: Canvas) -> torch.Tensor:
    """Photos of one pair as the models see them: on their canvas, (2, 3, H, W) in [0, 1].

    Args:
        photos: The two photos as `decode_images` returns them.
        canvas: Where both are put.
    """
    return torch.stack([fit(rgb(photo), canvas) for photo in photos])


def checked_pairs(
    img0: Photo, img1: Photo, content: Content, negative: NegativeContent, sizes: ModelSizes
) -> list[PairInput]:
    """The pairs of a call, as yet without seeds.

    Args:
        img0: The first photo, or a batch of first photos.
        img1: The last photo, or a batch of last photos.
        content: The other arguments that may differ from pair to pair.
        negative: What guidance leads away from.
        sizes: What of the models decides the form of photos and texts.

    Raises:
        TypeError, ValueError: A photo cannot be had, or an argument is not what it may be.
    """
    firsts, lasts = load_pairs(img0, img1)
    pairs, batched = len(firsts), is_batch(img0)
    check_generator(content.generator, pairs)
    canvases = [sizes.canvas(first, content.height, content.width) for first in firsts]
    texts = pair_texts(content.prompt, content.prompt_embeds, pairs, batched, sizes.text_width)
    negatives = pair_negatives(negative.negative_prompt, negative.negative_prompt_embeds, pairs, sizes.text_width)
    photos = list(zip(firsts, lasts, strict=True))
    steerings = steering_of_pairs(content, photos, canvases, sizes.cell, batched)
    flows = flows_of_pairs(content, photos, canvases, sizes.cell, batched)
    poses = poses_of_pairs(content, photos, canvases, batched)
    columns = zip(photos, canvases, texts, negatives, steerings, flows, poses, strict=True)
    return [PairInput(*column) for column in columns]


def checked_pair(
    img0: Photo, img1: Photo, content: Content, sizes: ModelSizes, canvas: Canvas | None = None
) -> PairInput:
    """The pair of a call that takes one only, as yet without a seed.

    Args:
        img0: The first photo.
        img1: The last photo.
        content: The other arguments that may differ from pair to pair.
        sizes: What of the models decides the form of photos and texts.
        canvas: Where both photos are put; by default what the first photo and the size asked for decide.

    Raises:
        TypeError, ValueError: A photo cannot be had, or an argument is not what it may be.
    """
    firsts, lasts = load_pairs(img0, img1)
    if len(firsts) != 1:
        raise ValueError(f"this takes one pair of images, not {len(firsts)}; call it once for each")
    check_generator(content.generator, 1)
    (text,) = pair_texts(content.prompt, content.prompt_embeds, 1, is_batch(img0), sizes.text_width)
    if canvas is None:
        canvas = sizes.canvas(firsts[0], content.height, content.width)
    else:
        check_canvas(canvas, content.height, content.width)
    photos = (firsts[0], lasts[0])
    steering = steering_of(content.points, content.mask, photos, canvas, sizes.cell)
    flow = flow_of(content.flow, photos, canvas, sizes.cell)
    (poses,) = poses_of_pairs(content, [photos], [canvas], False)
    return PairInput(photos, canvas, text, NegativeText(), steering, flow, poses)


def check_canvas(canvas: object, height: int | None, width: int | None) -> None:
    """Raise TypeError or ValueError unless this is a canvas and nothing else decides the size."""
    if not isinstance(canvas, Canvas):
        raise TypeError(f"`canvas` must be a Canvas, as the method `canvas` returns it, not {canvas!r}")
    if height is not None or width is not None:
        raise ValueError("`canvas` decides the size, and so do `height` and `width`; leave one of them out")


def check_stackable(pairs: Sequence[PairInput], output_type: str) -> None:
    """Raise ValueError if frames of several sizes were to be stacked into one array."""
    sizes = {(c.output_height, c.output_width, c.height, c.width) for c in (pair.canvas for pair in pairs)}
    if output_type not in ("pil", "lazy") and len(sizes) > 1:
        raise ValueError(
            f"`output_type` {output_type!r} stacks the pairs, but their first images have different sizes; "
            "pass `height` and `width`, or use 'pil'"
        )


def load_pairs(img0: Photo, img1: Photo) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The first and the last photos of all pairs, decoded.

    Raises:
        TypeError, ValueError: A photo cannot be had, or there are not as many last as first ones.
    """
    firsts, lasts = decode_images(img0, "img0"), decode_images(img1, "img1")
    if is_batch(img0) != is_batch(img1) or len(firsts) != len(lasts):
        raise ValueError(
            f"`img0` and `img1` must be two images or two batches of one length; {len(firsts)} and {len(lasts)} came"
        )
    return firsts, lasts


def steering_of_pairs(
    content: Content,
    photos: Sequence[tuple[torch.Tensor, torch.Tensor]],
    canvases: Sequence[Canvas],
    cell: int,
    batched: bool,
) -> list[Steering | None]:
    """What the user says of the match of each pair, on its latent grid.

    Raises:
        TypeError, ValueError: Points or a mask are not what they may be; the error names the pair of a batch.
    """
    points = pair_entries("points", content.points, len(photos), batched)
    masks = pair_entries("mask", content.mask, len(photos), batched)
    return [
        steering_of(points[i], masks[i], photos[i], canvases[i], cell, f"[{i}]" if batched else "")
        for i in range(len(photos))
    ]


def steering_of(
    points: Sequence | None,
    mask: Photo | Sequence[Photo] | None,
    photos: tuple[torch.Tensor, torch.Tensor],
    canvas: Canvas,
    cell: int,
    place: str = "",
) -> Steering | None:
    """What the user says of the match of one pair, on its latent grid; None where that is nothing.

    Args:
        points: The `points` argument of the pair.
        mask: The `mask` argument of the pair.
        photos: The two photos of the pair, (C, H, W) each.
        canvas: Where the photos are put.
        cell: Pixels a side of a latent cell.
        place: The pair's index as error messages write it, such as "[2]".

    Raises:
        TypeError, ValueError: Points or mask are not what they may be.
    """
    photo_sizes = [tuple(photo.shape[-2:]) for photo in photos]
    masks = load_masks(mask, photo_sizes, f"mask{place}")
    name = f"points{place}"
    pairs = point_pairs(points, name)
    if masks is None and not len(pairs):
        return None
    check_points_inside(pairs, photo_sizes, name)
    content = (canvas.content_height, canvas.content_width)
    fitted = torch.stack([fit_points(pairs[:, i], photo_sizes[i], canvas) for i in (0, 1)], 1)
    cells = cells_of(fitted, content, cell, name)
    if masks is None:
        moves = fitted.new_ones(2, 1, canvas.height // cell, canvas.width // cell, dtype=torch.bool)
    else:
        on_canvas = torch.stack([fit(part, canvas) for part in masks]).expand(2, -1, -1, -1)
        moves = cells_that_move(on_canvas, content, cell, f"mask{place}")
    return Steering(cells, moves)


def poses_of_pairs(
    content: Content,
    photos: Sequence[tuple[torch.Tensor, torch.Tensor]],
    canvases: Sequence[Canvas],
    batched: bool,
) -> list[PosePair | None]:
    """The poses of the people in each pair, on its canvas.

    Raises:
        TypeError, ValueError: The argument is not what it may be; the error names the pair of a batch.
    """
    entries = pair_entries("poses", content.poses, len(photos), batched)
    return [
        None
        if entry is None
        else pose_pair(
            entry,
            [tuple(photo.shape[-2:]) for photo in photos[i]],
            canvases[i],
            f"poses[{i}]" if batched else "poses",
        )
        for i, entry in enumerate(entries)
    ]


def flows_of_pairs(
    content: Content,
    photos: Sequence[tuple[torch.Tensor, torch.Tensor]],
    canvases: Sequence[Canvas],
    cell: int,
    batched: bool,
) -> list[str | Callable | GivenFlow]:
    """What the flow of each pair comes from; a name or a function holds for all pairs of a batch.

    Raises:
        TypeError, ValueError: The argument is not what it may be; the error names the pair of a batch.
    """
    shared = isinstance(content.flow, str) or callable(content.flow)
    flows = [content.flow] * len(photos) if shared else pair_entries("flow", content.flow, len(photos), batched)
    return [
        flow_of(flow, photos[i], canvases[i], cell, f"[{i}]" if batched and not shared else "")
        for i, flow in enumerate(flows)
    ]


def flow_of(
    flow: object, photos: tuple[torch.Tensor, torch.Tensor], canvas: Canvas, cell: int, place: str = ""
) -> str | Callable | GivenFlow:
    """What the flow of one pair comes from, arrays already on its latent grid.

    Args:
        flow: The `flow` argument of the pair.
        photos: The two photos of the pair, (C, H, W) each.
        canvas: Where the photos are put.
        cell: Pixels a side of a latent cell.
        place: The pair's index as error messages write it, such as "[2]".

    Raises:
        TypeError, ValueError: The argument is not what it may be.
    """
    if isinstance(flow, str):
        check_choice(f"flow{place}", flow, FLOWS)
        return flow
    if callable(flow):
        return flow
    if not isinstance(flow, list | tuple):
        names = " or ".join(map(repr, FLOWS))
        raise TypeError(
            f"`flow{place}` must be {names}, a function of the two photos, or a pair of arrays, forward and backward, "
            f"not a {type(flow).__name__}"
        )
    first, last = (tuple(photo.shape[-2:]) for photo in photos)
    return given_flow(flow, (first, last), canvas, cell, f"`flow{place}`")


def pair_entries(name: str, value: object, pairs: int, batched: bool) -> list:
    """Every pair's entry of an argument that is a list for several pairs; None is the entry of a pair without one.

    Args:
        name: The name of the argument.
        value: The argument.
        pairs: Number of pairs.
        batched: Whether the argument must be a list, as for a batch and for the gaps of a sequence.

    Raises:
        TypeError, ValueError: The argument should be a list and is none, or has not one entry for each pair.
    """
    if value is None or not batched:
        return [value] * pairs
    if not isinstance(value, (list, tuple)):
        kind = type(value).__name__
        raise TypeError(f"`{name}` must be a list here, with one entry for each pair of images, not a {kind}")
    check_one_for_each_pair(name, value, pairs)
    return list(value)


def with_seeds(
    pairs: Sequence[PairInput], generator: torch.Generator | Sequence[torch.Generator] | None
) -> list[PairInput]:
    """The pairs of a call, each with a seed from `pair_seeds`; a single seed is that of all pairs.

    They are drawn when all else has been checked, since a call that is refused must not move a generator on.
    """
    seeds = pair_seeds(generator, len(pairs))
    seeds = seeds * len(pairs) if len(seeds) == 1 else seeds
    return [replace(pair, seed=seed) for pair, seed in zip(pairs, seeds, strict=True)]


def pair_seeds(generator: torch.Generator | Sequence[torch.Generator] | None, pairs: int) -> list[int]:
    """A seed for each pair.

    A list holds one generator for each pair. Of a single generator, which moves on by one draw, every pair has the
    same seed, so that a pair's result does not depend on what else is in the batch. None stands for torch's global
    generator.
    """
    if isinstance(generator, (list, tuple)):
        return [draw_seed(own) for own in generator]
    return [draw_seed(generator)] * pairs


def draw_seed(generator: torch.Generator | None) -> int:
    """A seed drawn from a generator, which moves on by one draw. None stands for torch's global generator."""
    generator = generator or torch.default_generator
    return int(torch.randint(2**62, (1,), generator=generator, device=generator.device))


def check_generator(generator, pairs: int) -> None:
    """Raise unless `generator` is None, a `torch.Generator`, or a list of one per pair."""
    listed = isinstance(generator, (list, tuple))
    items = generator if listed else [generator]
    if not (generator is None or all(isinstance(item, torch.Generator) for item in items)):
        raise TypeError(f"`generator` must be a torch.Generator or a list of them, not {generator!r}")
    if listed:
        check_one_for_each_pair("generator", generator, pairs)
