# SPDX-License-Identifier: Apache-2.0
"""Choosing among candidates for a frame: by CLIP, by a function of the user's, or by hand.

Source: arXiv 2307.12560, §3, which ranks by CLIP similarity to a positive prompt less that to a negative one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import PIL.Image
import torch
from transformers import CLIPModel, CLIPProcessor

from .turns import interruptible

# A function from a picture to a number that is larger for a better one.
Judge = Callable[[PIL.Image.Image], float]


@dataclass(eq=False)
class Chooser:
    """Chooses one of several pictures for each time, and keeps all of them.

    `judge` finds the best; what `choices` has for a time prevails. `checked` makes of a picture what may be shown.
    `seen` has the pictures of every time so, in the order of the candidates, and `chosen` which of them was taken.
    """

    judge: Judge
    choices: Mapping[float, int]
    checked: Callable[[PIL.Image.Image], PIL.Image.Image] = lambda picture: picture
    seen: dict[float, list[PIL.Image.Image]] = field(default_factory=dict)
    chosen: dict[float, int] = field(default_factory=dict)

    def choose(self, time: float, pictures: Sequence[PIL.Image.Image]) -> int:
        """The index of the picture that is taken at a time; of equally good ones the first.

        Raises:
            TypeError: The judge did not give a number.
        """
        index = next((choice for at, choice in self.choices.items() if _is_same(at, time)), None)
        if index is None:
            with interruptible():
                marks = [_mark(self.judge, picture) for picture in pictures]
            index = marks.index(max(marks))
        self.seen[time], self.chosen[time] = [self.checked(picture) for picture in pictures], index
        return index


def check_choices(choices: Mapping[float, int], times: Sequence[float]) -> None:
    """Raise ValueError if a choice is for a δ at which there is no frame.

    Args:
        choices: The `choices` argument.
        times: The δ of all frames.
    """
    for at in choices:
        if not any(_is_same(at, time) for time in times):
            nearest = min(times, key=lambda time: abs(time - at))
            raise ValueError(f"`choices` names δ = {at}, where there is no frame; the nearest is at {nearest}")


def _is_same(first: float, second: float) -> bool:
    """Whether two δ, one of which may have been written down in fewer digits, are those of one frame."""
    return abs(first - second) < 1e-6


def _mark(judge: Judge, picture: PIL.Image.Image) -> float:
    mark = judge(picture)
    try:
        number = float(mark)
    except (TypeError, ValueError) as error:
        raise TypeError(f"`rank_by` must give a number for a picture, not {mark!r}") from error
    return number if number == number else float("-inf")


def clip_judge(model: CLIPModel, processor: CLIPProcessor, texts: Sequence[str], device: torch.device) -> Judge:
    """Judges a picture by how much more it is like one text than like another, by CLIP's cosine similarity.

    Args:
        model: The CLIP model.
        processor: The processor that belongs to the CLIP model.
        texts: What a good picture is like, and what a bad one is like.
        device: Where CLIP runs.
    """

    def judge(picture: PIL.Image.Image) -> float:
        inputs = processor(text=list(texts), images=picture, return_tensors="pt", padding=True, truncation=True)
        inputs = inputs.to(device)
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
        output = model(**inputs)
        similarity = torch.nn.functional.cosine_similarity(output.image_embeds, output.text_embeds)
        return float(similarity[0] - similarity[1])

    return judge
