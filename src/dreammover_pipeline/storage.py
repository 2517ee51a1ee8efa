# SPDX-License-Identifier: Apache-2.0
"""Prepared pairs in files, and fingerprints that tell whether a pair belongs to the loaded models.

A pair is one safetensors file. It holds the pair's tensors unchanged, and everything else as JSON in the header entry
`dreammover_pair`. It is written completely or not at all.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import diffusers
import torch
import torch.nn.functional as F
from diffusers.utils import logging
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from .adapters import acting_tensors
from .inputs import check_file_place, file_fault
from .records import BidirectionalFlow, Canvas, Inversion, PosePair, PreparedPair, Schedule
from .scratch import replacing

logger = logging.get_logger(__name__)

FORMAT_VERSION = 3  # version that is written; it may hold poses, a fitted negative embedding, and photos in 8 bits
READABLE_VERSIONS = (1, 2, 3)
HEADER = "dreammover_pair"
DIGEST = "dreammover_digest"  # the header entry with the digest of all that a file holds besides
LORA = "lora."  # prefix, in the file, of the names of the pair's LoRA weights

# Odd constants of splitmix64, as signed integers: 0x9E3779B97F4A7C15 and 0xBF58476D1CE4E5B9.
GOLDEN, MIX = -7046029254386353131, -4658895280553007687
PIECE = 2**18  # elements in a piece of a checksum: few enough for a processor's cache, and even, for pairs of float32


@torch.no_grad()
def fingerprint(modules: Mapping[str, torch.nn.Module]) -> str:
    """A digest of what models compute with: it is equal for equal names, shapes and values of all their weights.

    Where and how the weights are held does not matter: neither the device, nor offloading, nor torch.compile, nor the
    precision as long as no value is rounded, so that a checkpoint stored in float16 has the same fingerprint in
    float16 and in float32. An adapter counts while it acts (see `acting_tensors`). Values in float64 are rounded to
    float32.

    Args:
        modules: The models, by the names under which they enter the fingerprint.

    Returns:
        The fingerprint, 64 hexadecimal digits.

    Raises:
        ValueError: A model's weights are on disk, or cannot be found.
    """
    lines = [
        f"{part}.{name} {tuple(tensor.shape)} {_checksum(tensor)} {weight}"
        for part, module in modules.items()
        for name, tensor, weight in acting_tensors(module)
    ]
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def fingerprints(modules: Mapping[str, torch.nn.Module]) -> dict[str, str]:
    """The fingerprint of each model alone, by the model's name."""
    return {name: fingerprint({name: module}) for name, module in modules.items()}


def _checksum(tensor: torch.Tensor) -> int:
    """A 64-bit sum over the values, each mixed with its position, computed on the tensor's device.

    Integer sums wrap around and are never rounded, so every device and every order of summation give the same result.
    """
    total, position = torch.zeros((), dtype=torch.int64, device=tensor.device), 0
    for piece in tensor.reshape(-1).split(PIECE):
        words = _words(piece)
        mixed = torch.arange(position, position + len(words), device=words.device).mul_(GOLDEN).add_(words)
        mixed.bitwise_xor_(mixed >> 32).mul_(MIX)
        mixed.bitwise_xor_(mixed >> 29)
        total += mixed.sum()
        position += len(words)
    return int(total)


def _words(values: torch.Tensor) -> torch.Tensor:
    """Values (n,) as int64: an integer becomes one word; two floats, as float32, become one word of their bits."""
    if not values.is_floating_point():
        return values.long()
    return F.pad(values.float(), (0, len(values) % 2)).view(torch.int64)


def digest_of(content: object) -> str:
    """The sha256 digest, in hexadecimal, of a value that JSON can hold."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def digest_of_tensors(tensors: Iterable[torch.Tensor]) -> str:
    """The sha256 digest, in hexadecimal, of the values, shapes and dtypes of tensors."""
    total = hashlib.sha256()
    for tensor in tensors:
        total.update(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
        total.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return total.hexdigest()


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], header: Mapping[str, str] | None = None) -> None:
    """Write tensors to a safetensors file completely or not at all; a file that exists at the path is replaced.

    Args:
        path: The file to write.
        tensors: The tensors, by the names that they have in the file.
        header: Further text for the file's header, by name.
    """
    # Tensors are copied, because safetensors does not take tensors that share memory or are not contiguous.
    copies = {name: tensor.to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    header = dict(header or {})
    write_whole(path, save(copies, {**header, DIGEST: _digest(copies, header)}))


def read_tensors(path: Path) -> dict[str, torch.Tensor] | None:
    """The tensors of a safetensors file, on the CPU; None if the file is missing, cut off, damaged or altered.

    A file that holds no digest, which other programs and earlier versions write, is taken as it is.
    """
    if file_fault(path):
        return None
    try:
        _, tensors = _unpacked(path)
    except (OSError, SafetensorError, ValueError):
        return None
    return {name: _own(tensor, "cpu") for name, tensor in tensors.items()}


def _unpacked(path: str | os.PathLike) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    """The header's texts and the tensors of a safetensors file.

    Raises:
        OSError, SafetensorError: The file is missing, cut off or of another kind.
        ValueError: The file holds a digest, and it is not that of the content.
    """
    with safe_open(os.fspath(path), framework="pt", device="cpu") as file:
        header = dict(file.metadata() or {})
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    digest = header.pop(DIGEST, None)
    if digest is not None and digest != _digest(tensors, header):
        raise ValueError("its content is not what was written")
    return header, tensors


def _digest(tensors: Mapping[str, torch.Tensor], header: Mapping[str, str]) -> str:
    """The digest of the names and values of tensors and of a header's texts."""
    names = sorted(tensors)
    return digest_of([names, digest_of_tensors(tensors[name] for name in names), dict(header)])


def _own(tensor: torch.Tensor, device: str | torch.device) -> torch.Tensor:
    """A copy of a tensor of a safetensors file, in memory of its own.

    In the file a tensor may lie at any address, and processors may round differently where data is not aligned. The
    copy is aligned as computed tensors are, so a loaded pair gives the same bits as the pair that was saved.
    """
    return tensor.to(device, copy=True)


def write_pair(pair: PreparedPair, path: str | os.PathLike, fingerprints: Mapping[str, str]) -> None:
    """Write a prepared pair to a file; a file that exists there is replaced once the new one is complete.

    Args:
        pair: A pair that `DreamMoverPipeline.prepare` returned.
        path: The file to write.
        fingerprints: The fingerprints of the models that the pair belongs to, by the models' names.
    """
    tensors = {
        "images.0": pair.images[0],
        "images.1": pair.images[1],
        "inversion.path": pair.inversion.path,
        "inversion.eps": pair.inversion.eps,
        "flow.forward": pair.flow.forward,
        "flow.backward": pair.flow.backward,
        "prompt_embeds": pair.prompt_embeds,
        **{f"{LORA}{name}": weight for name, weight in (pair.lora or {}).items()},
    }
    if pair.negative_embeds is not None:
        tensors["negative_embeds"] = pair.negative_embeds
    if pair.poses is not None:
        tensors |= {"poses.places": pair.poses.places, "poses.confidence": pair.poses.confidence}
    header = {
        "version": FORMAT_VERSION,
        "canvas": asdict(pair.canvas),
        "schedule": asdict(pair.inversion.schedule),
        "lora_scale": float(pair.lora_scale),
        "fingerprints": dict(fingerprints),
        "versions": _versions(),
    }
    write_tensors(Path(path), tensors, {HEADER: json.dumps(header)})


def read_pair(path: str | os.PathLike, device: str | torch.device) -> tuple[PreparedPair, dict[str, str]]:
    """Read a prepared pair from a file.

    Args:
        path: The file that `write_pair` wrote.
        device: The device to put the pair's tensors on; its images stay on the CPU, where `prepare` leaves them.

    Returns:
        The pair, and the fingerprints of the models that it belongs to, by the models' names.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The path is that of a folder, a pipe or a device, or the file is cut off, damaged, altered, of
            another kind or of an unknown format version.
    """
    fault = file_fault(path)
    if fault and os.path.exists(path):
        raise ValueError(f"'{path}' is {fault}; a prepared pair is one file")
    try:
        texts, tensors = _unpacked(path)
    except SafetensorError as error:
        raise ValueError(f"'{path}' is no whole safetensors file ({error})") from error
    except ValueError as error:
        raise ValueError(f"'{path}' is damaged: {error}; prepare the pair anew") from error
    text = texts.get(HEADER)
    if text is None:
        raise ValueError(f"'{path}' is a safetensors file, but holds no prepared pair")
    header = _checked_header(text, path)
    try:
        return _assembled(header, tensors, device), dict(header["fingerprints"])
    except KeyError as error:
        raise ValueError(f"'{path}' is damaged: it lacks {error}") from error
    except (ValueError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"'{path}' is damaged: {error}") from error


def _checked_header(text: str, path: str | os.PathLike) -> dict:
    """The header entry of a prepared pair; raises ValueError unless it is JSON of the known format version."""
    try:
        header = json.loads(text)
        found = header["version"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"'{path}' holds no prepared pair: its header cannot be read") from error
    if found not in READABLE_VERSIONS:
        raise ValueError(
            f"'{path}' holds a prepared pair of format version {found}, but only versions up to {FORMAT_VERSION} are "
            "known here; use the release of dreammover-pipeline that wrote it, or prepare the pair anew"
        )
    return header


def check_same_models(path: str | os.PathLike, saved: Mapping[str, str], present: Mapping[str, str]) -> None:
    """Refuse a pair that belongs to another UNet or VAE, and warn of one that belongs to another text encoder.

    Only negative prompts still need the text encoder when a prepared pair is rendered.

    Args:
        path: The pair's file, for the message.
        saved: The fingerprints saved in the pair's file, by the models' names.
        present: The fingerprints of the models that are to render the pair, by the models' names.

    Raises:
        ValueError: The UNet or the VAE differs; the message names which.
    """
    differing = [name for name, digest in present.items() if saved.get(name) != digest]
    decisive = [name for name in differing if name != "text_encoder"]
    if decisive:
        raise ValueError(
            f"'{path}' was prepared with another {' and '.join(decisive)}: load the checkpoint it was saved with, "
            "in the same precision and with the same LoRAs active, or prepare the pair anew"
        )
    if differing:
        logger.warning(f"'{path}' was saved with another text encoder; negative prompts will be read by this one.")


def _assembled(header: dict, tensors: dict[str, torch.Tensor], device: str | torch.device) -> PreparedPair:
    def placed(name: str, where: str | torch.device = device) -> torch.Tensor:
        return _own(tensors[name], where)

    schedule = Schedule(*(tuple(header["schedule"][name]) for name in ("timesteps", "alpha_bars")))
    return PreparedPair(
        images=(placed("images.0", "cpu"), placed("images.1", "cpu")),
        canvas=Canvas(**header["canvas"]),
        inversion=Inversion(placed("inversion.path"), placed("inversion.eps"), schedule),
        flow=BidirectionalFlow(placed("flow.forward"), placed("flow.backward")),
        prompt_embeds=placed("prompt_embeds"),
        lora={name.removeprefix(LORA): placed(name) for name in tensors if name.startswith(LORA)} or None,
        lora_scale=float(header["lora_scale"]),
        negative_embeds=placed("negative_embeds") if "negative_embeds" in tensors else None,
        poses=PosePair(placed("poses.places", "cpu"), placed("poses.confidence", "cpu"))
        if "poses.places" in tensors
        else None,
    )


def _versions() -> dict[str, str]:
    """The versions of the libraries, saved for people who look into the file; the program does not read them."""
    found = {"torch": torch.__version__, "diffusers": diffusers.__version__}
    with suppress(PackageNotFoundError):  # as a custom pipeline of diffusers, this package is not installed
        found["dreammover-pipeline"] = version("dreammover-pipeline")
    return found


def write_whole(path: Path, content: bytes) -> None:
    """Write a file completely or not at all; a file that exists at the path is replaced.

    Raises:
        FileNotFoundError: There is no folder to write the file in.
        ValueError: There is anything but a file at the path.
    """
    check_file_place(path)
    folder = path.resolve().parent
    if not folder.is_dir():
        raise FileNotFoundError(f"cannot write the file '{path}': there is no folder '{folder}'")
    with replacing(path) as temporary, open(temporary, "xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())  # a power cut could otherwise leave zeros of full length
