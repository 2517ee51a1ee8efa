# SPDX-License-Identifier: Apache-2.0
"""The finished gaps of a sequence in a folder, so that after a kill the same call goes on from there.

A gap is kept as the clean latents of its frames, which are exact and small, under a digest of everything that decides
them; so a folder never gives a gap that is not the one asked for. Every file appears whole or not at all.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from .arguments import LATENTS, arguments_of
from .inputs import frame_times
from .pairs import PairInput
from .prompts import NegativeText, PairText
from .records import BidirectionalFlow
from .rendering import DenoisedFrames
from .settings import FitSettings, PrepareSettings, RenderSettings
from .storage import digest_of, digest_of_tensors, read_tensors, write_tensors
from .timing import eased_times

KEY_LENGTH = 16  # number of hexadecimal digits of a digest in a file's name
FILE_NAMES = rf"(gap_\d{{4,}}|lora)_[0-9a-f]{{{KEY_LENGTH}}}\.safetensors"
GAP_TENSORS = {"latents", "times", "ends", "flow.forward", "flow.backward"}


class KeptGaps:
    """What is kept of a sequence. This class itself keeps nothing, for a call that is to leave no files behind."""

    def frames(self, k: int, gap: PairInput) -> DenoisedFrames | None:
        """The frames of gap k; None if they are not kept."""
        return None

    def lora(self, k: int) -> dict[str, torch.Tensor] | None:
        """The LoRA of gap k; None if it is not kept."""
        return None

    def keep_frames(self, k: int, frames: DenoisedFrames) -> None:
        """Keep the frames of gap k."""

    def keep_lora(self, k: int, weights: dict[str, torch.Tensor] | None) -> None:
        """Keep the LoRA of gap k, if it has one."""


class GapFolder(KeptGaps):
    """The gaps of a sequence in a folder.

    Args:
        folder: The folder, which is made if it does not exist.
        gap_keys: A digest for each gap of what decides its frames, as `gap_key` gives it.
        lora_keys: A digest for each gap of what decides its LoRA, as `lora_key` gives it.
        device: The device that tensors are read to.
    """

    def __init__(self, folder: Path, gap_keys: Sequence[str], lora_keys: Sequence[str], device: torch.device):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.gap_keys, self.lora_keys, self.device = folder, gap_keys, lora_keys, device

    def frames(self, k: int, gap: PairInput) -> DenoisedFrames | None:
        """The frames of gap k; None if they are not kept whole."""
        found = read_tensors(self._gap_path(k))
        if found is None or not found.keys() >= GAP_TENSORS:
            return None
        times = tuple(found.pop("times").tolist())  # in float64, which MPS lacks
        found = self._placed(found)
        flow = BidirectionalFlow(found["flow.forward"], found["flow.backward"])
        return DenoisedFrames(found["latents"], times, found["ends"], gap.ends(), gap.canvas, flow)

    def lora(self, k: int) -> dict[str, torch.Tensor] | None:
        """The LoRA of gap k; None if it is not kept whole."""
        found = read_tensors(self._lora_path(k))
        return None if found is None else self._placed(found)

    def keep_frames(self, k: int, frames: DenoisedFrames) -> None:
        """Keep the frames of gap k."""
        tensors = {
            "latents": frames.latents,
            "times": torch.tensor(frames.times, dtype=torch.float64, device="cpu"),
            "ends": frames.clean_ends,
            "flow.forward": frames.flow.forward,
            "flow.backward": frames.flow.backward,
        }
        write_tensors(self._gap_path(k), tensors)

    def keep_lora(self, k: int, weights: dict[str, torch.Tensor] | None) -> None:
        """Keep the LoRA of gap k, if it has one."""
        if weights is not None:
            write_tensors(self._lora_path(k), weights)

    def _placed(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: tensor.to(self.device) for name, tensor in tensors.items()}

    def _gap_path(self, k: int) -> Path:
        return self.folder / f"gap_{k + 1:04d}_{self.gap_keys[k][:KEY_LENGTH]}.safetensors"

    def _lora_path(self, k: int) -> Path:
        return self.folder / f"lora_{self.lora_keys[k][:KEY_LENGTH]}.safetensors"


def check_can_keep(
    folder: str | os.PathLike, gaps: Sequence[PairInput], rendering: RenderSettings, control_images: object
) -> None:
    """Raise TypeError or ValueError unless a folder can keep the gaps of a sequence.

    What a function gives cannot be put into a key, and so kept gaps could not be told from others.

    Args:
        folder: The `keep` argument.
        gaps: The gaps of the sequence.
        rendering: How they are rendered.
        control_images: The `control_images` argument.
    """
    if not isinstance(folder, str | os.PathLike):
        raise TypeError(f"`keep` must be the path of a folder, not {folder!r} of type {type(folder).__name__}")
    if os.path.exists(folder) and not os.path.isdir(folder):
        raise ValueError(f"`keep` must be the path of a folder, but '{folder}' is a file")
    flow_is_found = any(callable(gap.flow) for gap in gaps)
    for given, what, remedy in (
        (flow_is_found, "a `flow` that is a function", "pass the flow of every gap as arrays"),
        (callable(rendering.rank_by), "a `rank_by` that is a function", "pass two texts"),
        (control_images is not None, "`control_images`", "pass `poses`"),
    ):
        if given:
            raise ValueError(
                f"`keep` and {what} exclude each other, since nobody can tell whether kept gaps were made with the "
                f"same; {remedy} instead, or make the sequence without `keep`"
            )


def kept_gaps(
    folder: str | os.PathLike,
    gaps: Sequence[PairInput],
    preparing: PrepareSettings,
    rendering: Sequence[RenderSettings],
    shared: bool,
    of_frames: str,
    of_pairs: str,
    device: torch.device,
) -> GapFolder:
    """The folder of a sequence's gaps.

    Args:
        folder: The folder that the gaps are kept in, which is made if it does not exist.
        gaps: The gaps, in their order.
        preparing: How all gaps are prepared.
        rendering: How each gap is rendered.
        shared: Whether one LoRA is fitted to all photos.
        of_frames: What stands for the models that decide frames, and for their precision.
        of_pairs: What stands for the models that decide a pair's LoRA, and for their precision.
        device: The device that tensors are read to.
    """
    fits = [gaps] * len(gaps) if shared else [[gap] for gap in gaps]
    lora_keys = [lora_key(fitted, preparing, of_pairs) for fitted in fits]
    gap_keys = [
        gap_key(gap, preparing, settings, f"{of_frames} {key}")
        for gap, settings, key in zip(gaps, rendering, lora_keys, strict=True)
    ]
    return GapFolder(Path(folder), gap_keys, lora_keys, device)


def gap_key(gap: PairInput, preparing: PrepareSettings, rendering: RenderSettings, model: str) -> str:
    """A digest of everything that decides the latents of a gap's frames, and nothing that acts only after them.

    Args:
        gap: The photos, their texts, what the user says of the match, and the seed.
        preparing: How the gap is prepared.
        rendering: Which frames are made, and how; an easing that is a function counts by the times it gives.
        model: What stands for the checkpoint and its precision.
    """
    decided = {
        name: getattr(settings, name)
        for settings in (preparing, rendering)
        for name, declared in arguments_of(type(settings)).items()
        if declared.decides == LATENTS
    }
    if callable(rendering.easing):
        decided["easing"] = eased_times(frame_times(rendering.n_frames, None), rendering.easing)
    steering = [] if gap.steering is None else [gap.steering.points, gap.steering.moves]
    name, given = (gap.flow, []) if isinstance(gap.flow, str) else (None, [gap.flow.flow.stacked(), gap.flow.known])
    poses = [] if gap.poses is None else [gap.poses.places, gap.poses.confidence]
    tensors = [*gap.photos, *steering, *given, *poses, *_embeds(gap.text), *_embeds(gap.negative)]
    words = [gap.text.prompts, gap.negative.prompt, vars(gap.canvas), gap.seed, name, len(poses)]
    return digest_of(_plain([digest_of_tensors(tensors), len(tensors), words, decided, model]))


def lora_key(gaps: Sequence[PairInput], settings: FitSettings, model: str) -> str:
    """A digest of what decides the LoRA of one gap or of several, but for the rounding of the machine it is fitted on.

    Args:
        gaps: The gaps whose photos the LoRA is fitted to.
        settings: How the LoRA is fitted.
        model: What stands for the checkpoint and its precision.
    """
    tensors = [tensor for gap in gaps for tensor in (gap.fitted(), *_embeds(gap.text))]
    words = [[gap.text.prompts, gap.seed] for gap in gaps]
    fit = {name: getattr(settings, name) for name in arguments_of(FitSettings)}
    return digest_of(_plain([digest_of_tensors(tensors), words, fit, model]))


def _embeds(text: PairText | NegativeText) -> list[torch.Tensor]:
    return [] if text.embeds is None else [text.embeds]


def _plain(value: object) -> object:
    """A value in the form that JSON holds: numbers and arrays of numpy and torch become numbers and lists."""
    if isinstance(value, np.generic | np.ndarray | torch.Tensor):
        return value.tolist()
    if isinstance(value, Mapping):
        return {_plain(name): _plain(entry) for name, entry in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, str):
        return [_plain(entry) for entry in value]
    return value
