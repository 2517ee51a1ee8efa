# SPDX-License-Identifier: Apache-2.0
"""From the name of a model to a pipeline on a device, as every command needs it.

torch and diffusers take seconds to import, so they are imported when a function needs them.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ..tiny import CHECKPOINT

if TYPE_CHECKING:
    from ..pipeline import DreamMoverPipeline

MODELS = {"sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5", "tiny": str(CHECKPOINT)}
MODEL_FILES = (".safetensors", ".ckpt")
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
DTYPES = ("float32", "float16", "bfloat16")


def add_model_options(parser: argparse.ArgumentParser, default: str) -> None:
    """Add the options that say which model to load, in which precision, on which device."""
    models = f"sd15 ({MODELS['sd15']}), tiny (comes with the program), a Hub id, a folder, or a .safetensors file"
    add = parser.add_argument_group("model").add_argument
    add("--model", default=default, metavar="NAME", help=f"{models} (default: %(default)s)")
    add("--dtype", choices=DTYPES, help="default: float16 on cuda, float32 elsewhere")
    add_device_options(add)


def add_device_options(add: Callable[..., object]) -> None:
    """Add the options that do not say which model, by the `add_argument` of a parser or of a group."""
    add("--device", metavar="NAME", help="cuda, mps, cpu, ...; default: the first of these three that is there")
    add("--allow-pickle", action="store_true", help="also read .bin and .ckpt weights, which can run code")


def pipeline_class() -> type[DreamMoverPipeline]:
    """The pipeline, imported with the log lines and loading bars of third parties off; downloads still show theirs."""
    import diffusers.utils.logging as diffusers_logging
    import transformers.utils.logging as transformers_logging

    for logging in (diffusers_logging, transformers_logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    from ..pipeline import DreamMoverPipeline

    return DreamMoverPipeline


def check_model(model: str, allow_pickle: bool = False) -> None:
    """Refuse a name that is no known model, nothing on this machine and no Hub id either, and pickles.

    Raises:
        ValueError: the name, and what it may be.
    """
    source = Path(MODELS.get(model, model))
    is_model_file = source.suffix.lower() in MODEL_FILES
    if source.is_file() and not is_model_file:
        raise ValueError(f"the model '{model}' is no {' or '.join(MODEL_FILES)} file")
    if source.is_file() and source.suffix.lower() == ".ckpt" and not allow_pickle:
        raise ValueError(
            f"the model '{model}' is a pickle, which can run code as it loads; take a .safetensors file, "
            "or add --allow-pickle if you trust where it comes from"
        )
    if not source.exists() and (is_model_file or not HUB_ID.fullmatch(str(source))):
        known = " or ".join(MODELS)
        raise ValueError(f"the model '{model}' is no file or folder here; it may also be {known} or an owner/name")


def choose_device(name: str | None) -> str:
    """The device asked for, or without a wish the first of cuda, mps and cpu that is there.

    Raises:
        ValueError: the device does not exist here.
    """
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except Exception as error:  # which kind depends on the device and on the build of torch
        raise ValueError(f"the device '{name}' cannot be used here: {error}") from error
    return name


def load_pipeline(model: str, dtype: str | None, device: str, allow_pickle: bool = False) -> DreamMoverPipeline:
    """Load a model and put it on a device.

    Args:
        model: one of `MODELS`, a Hub id, a folder in diffusers layout, or a single file.
        dtype: one of `DTYPES`; None for float16 on cuda and float32 elsewhere.
        device: as `choose_device` returns it.
        allow_pickle: whether weights of a folder or of the Hub may be others than safetensors.

    Raises:
        RuntimeError: the model cannot be had or read; the message says what else to try.
    """
    import torch

    pipeline = pipeline_class()
    source = MODELS.get(model, model)
    if Path(source).is_file():
        load = pipeline.from_single_file
    else:
        load = partial(pipeline.from_pretrained, use_safetensors=None if allow_pickle else True)
    try:
        pipe = load(source, dtype=getattr(torch, dtype or ("float16" if device.startswith("cuda") else "float32")))
    except Exception as error:  # diffusers raises nearly anything on a checkpoint it cannot get or read
        raise RuntimeError(_loading_failed(source, error)) from error
    return pipe.to(device)


def load_chosen(args: argparse.Namespace) -> DreamMoverPipeline:
    """`load_pipeline` by the options of `add_model_options`."""
    return load_pipeline(args.model, args.dtype, choose_device(args.device), args.allow_pickle)


def _loading_failed(source: str, error: Exception) -> str:
    if Path(source).exists():
        return f"cannot load the model '{source}' ({_in_short(error)})"
    # diffusers wraps what happened in words that point to a traceback
    return (
        f"cannot get the model '{source}' from the Hugging Face Hub ({_in_short(error.__cause__ or error)}); "
        "try --model tiny, which needs no network, or --model with a local folder in diffusers layout"
    )


def _in_short(error: BaseException) -> str:
    first_line = (str(error).strip() or "no reason given").splitlines()[0]
    return f"{type(error).__name__}: {first_line}"
