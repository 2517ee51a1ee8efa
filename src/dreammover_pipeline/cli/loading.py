# SPDX-License-Identifier: Apache-2.0
"""Loads the model that a command names, as a pipeline on a device.

torch and diffusers take seconds to import, so they are imported when a function needs them.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ..inputs import file_fault
from ..tiny import CHECKPOINT
from .variants import choose_variant

if TYPE_CHECKING:
    import torch

    from ..pipeline import DreamMoverPipeline

MODELS = {"sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5", "tiny": str(CHECKPOINT)}
MODEL_FILES = (".safetensors", ".ckpt")
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
# The optional models that options name, by the names of the options and of the pipeline's components.
COMPONENTS = {
    "controlnet": "A ControlNet, which frames with poses follow: a Hub id or a folder.",
    "clip": "A CLIP, which ranks candidates: a Hub id or a folder.",
}
DTYPES = ("float32", "float16", "bfloat16")


def add_model_options(parser: argparse.ArgumentParser, default: str) -> None:
    """Add the options that say which model to load, in which precision and on which device.

    Args:
        parser: The parser of a command.
        default: The name of the model that is loaded by default.
    """
    models = f"sd15 ({MODELS['sd15']}), tiny (comes with the program), a Hub id, a folder or a .safetensors file"
    add = parser.add_argument_group("model").add_argument
    add("--model", default=default, metavar="NAME", help=f"Model: {models} (default: %(default)s).")
    add("--dtype", choices=DTYPES, help="Precision. By default it is float16 on cuda and float32 elsewhere.")
    add_device_options(add)


def add_component_options(parser: argparse.ArgumentParser, otherwise: str = "") -> None:
    """Add the options that name optional models, which are loaded with the model of a command.

    Args:
        parser: The parser of a command.
        otherwise: What the help says of an option that is not typed.
    """
    for name, text in COMPONENTS.items():
        parser.add_argument(f"--{name}", metavar="NAME", help=text + otherwise)


def chosen_components(args: argparse.Namespace) -> dict[str, str | None]:
    """The names that were typed for the options of `add_component_options`; None where the command has them not."""
    return {name: getattr(args, name, None) for name in COMPONENTS}


def add_device_options(add: Callable[..., object]) -> None:
    """Add the options that say how a model is loaded, whichever it is.

    Args:
        add: The `add_argument` of a parser or of a group of options.
    """
    add(
        "--device",
        metavar="NAME",
        help="Device, such as cuda, mps or cpu. By default it is the first of these three that exists here.",
    )
    add("--allow-pickle", action="store_true", help="Also read weights from .bin and .ckpt files, which can run code.")


def pipeline_class() -> type[DreamMoverPipeline]:
    """The class of the pipeline, imported with third parties' log lines and loading bars switched off.

    Bars of downloads are still shown.
    """
    import diffusers.utils.logging as diffusers_logging
    import transformers.utils.logging as transformers_logging

    for logging in (diffusers_logging, transformers_logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    from ..pipeline import DreamMoverPipeline

    return DreamMoverPipeline


def check_model(model: str, allow_pickle: bool = False) -> None:
    """Refuse a model before anything is imported to load it.

    Args:
        model: The name: one of `MODELS`, a Hub id, a folder in diffusers layout, or a single file.
        allow_pickle: Whether files are allowed that can run code.

    Raises:
        ValueError: The name can be no model, or it has weights in files that can run code and this is not allowed.
    """
    source = Path(MODELS.get(model, model))
    is_model_file = source.suffix.lower() in MODEL_FILES
    if source.is_file() and not is_model_file:
        raise ValueError(f"the model '{model}' is a file, but no {' or '.join(MODEL_FILES)} file")
    if source.is_file() and source.suffix.lower() == ".ckpt" and not allow_pickle:
        raise ValueError(
            f"the model '{model}' is a pickle, which can run code while it is loaded; take a .safetensors file, "
            "or add --allow-pickle if you trust where this one comes from"
        )
    if source.exists() and not source.is_file() and not source.is_dir():
        raise ValueError(f"the model '{model}' is {file_fault(source)}; a file or a folder is needed")
    unet = source / "unet"
    if not allow_pickle and any(unet.glob("*.bin")) and not any(unet.glob("*.safetensors")):
        raise ValueError(
            f"the model '{model}' has its weights in .bin files, which are pickles and can run code while they are "
            "loaded; add --allow-pickle if you trust where they come from"
        )
    if not source.exists() and (is_model_file or not HUB_ID.fullmatch(str(source))):
        known = " or ".join(MODELS)
        raise ValueError(f"the model '{model}' is no file or folder here; it may also be {known} or an owner/name")


def check_component(name: str, source: str | None) -> None:
    """Refuse an optional component before anything is imported to load it.

    Args:
        name: Which of `COMPONENTS` it is.
        source: A Hub id or a folder; None for no such component.

    Raises:
        ValueError: There is no such folder, and no repository can have the name.
    """
    if source is not None and not Path(source).is_dir() and not HUB_ID.fullmatch(source):
        raise ValueError(f"--{name}: '{source}' is no folder here, and no owner/name of a model on the Hub")


def choose_device(name: str | None) -> str:
    """The name of the device to use.

    Args:
        name: The device asked for; by default it is the first of cuda, mps and cpu that exists here.

    Raises:
        ValueError: The device cannot be used here.
    """
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except Exception as error:  # the class of the error depends on the device and on the build of torch
        raise ValueError(f"the device '{name}' cannot be used here: {error}") from error
    return name


def load_pipeline(
    model: str,
    dtype: str | None,
    device: str,
    allow_pickle: bool = False,
    controlnet: str | None = None,
    clip: str | None = None,
) -> DreamMoverPipeline:
    """Load a model and put it on a device.

    Args:
        model: The name: one of `MODELS`, a Hub id, a folder in diffusers layout, or a single file.
        dtype: The precision, one of `DTYPES`; by default it is float16 on cuda and float32 elsewhere.
        device: The name of the device, as `choose_device` returns it.
        allow_pickle: Whether a folder or a Hub repository may hold weights in other files than safetensors.
        controlnet: The name of a ControlNet, a Hub id or a folder; None for none.
        clip: The name of a CLIP, a Hub id or a folder; None for none.

    Raises:
        ValueError: The ControlNet or the CLIP is no folder here, and no repository can have its name.
        RuntimeError: The model cannot be downloaded or read; the message says what else to try.
    """
    check_component("controlnet", controlnet)
    check_component("clip", clip)
    import torch

    pipeline = pipeline_class()
    source = MODELS.get(model, model)
    settings = {"dtype": getattr(torch, dtype or ("float16" if device.startswith("cuda") else "float32"))}
    safe = None if allow_pickle else True
    settings |= _components(controlnet, clip, settings["dtype"], safe)
    try:
        if Path(source).is_file():
            pipe = pipeline.from_single_file(source, **settings)
        else:
            variant = choose_variant(source, "unet", settings["dtype"], not allow_pickle)
            pipe = pipeline.from_pretrained(source, use_safetensors=safe, variant=variant, **settings)
    except Exception as error:  # diffusers raises errors of many classes if it cannot download or read a checkpoint
        raise RuntimeError(_loading_failed(source, error)) from error
    return pipe.to(device)


def load_chosen(args: argparse.Namespace) -> DreamMoverPipeline:
    """Load the model that the options of `add_model_options` name, and put it on the device that they name.

    The models of `add_component_options` are loaded with it where the command has those options.
    """
    device = choose_device(args.device)
    return load_pipeline(args.model, args.dtype, device, args.allow_pickle, **chosen_components(args))


def _components(controlnet: str | None, clip: str | None, dtype: torch.dtype, safe: bool | None) -> dict[str, object]:
    """The optional components of the pipeline that are named, from safetensors only if `safe` is True.

    Raises:
        RuntimeError: One of them cannot be downloaded or read.
    """
    from diffusers import ControlNetModel
    from transformers import CLIPModel, CLIPProcessor

    found = {}
    if controlnet is not None:
        with _blaming("--controlnet", controlnet):
            variant = choose_variant(controlnet, "", dtype, safe is True)
            found["controlnet"] = ControlNetModel.from_pretrained(
                controlnet, torch_dtype=dtype, use_safetensors=safe, variant=variant
            )
    if clip is not None:
        with _blaming("--clip", clip):
            found["clip"] = CLIPModel.from_pretrained(clip, dtype=dtype, use_safetensors=safe)
            found["clip_processor"] = CLIPProcessor.from_pretrained(clip)
    return found


@contextmanager
def _blaming(option: str, model: str) -> Iterator[None]:
    """Have an error inside the context say which option named the model that cannot be loaded."""
    try:
        yield
    except Exception as error:  # diffusers and transformers raise errors of many classes
        raise RuntimeError(f"{option}: cannot load the model '{model}' ({_in_short(error)})") from error


def _loading_failed(source: str, error: Exception) -> str:
    """What the user is told when a model cannot be loaded.

    Args:
        source: The path or the Hub id of the model.
        error: What diffusers raised.
    """
    if Path(source).exists():
        return f"cannot load the model '{source}' ({_in_short(error)})"
    # The error that diffusers raises only points to a traceback; what happened is said by the error that caused it.
    return (
        f"cannot get the model '{source}' from the Hugging Face Hub ({_in_short(error.__cause__ or error)}); "
        "try --model tiny, which needs no network, or --model with a local folder in diffusers layout"
    )


def _in_short(error: BaseException) -> str:
    """The class of an error and the first line of its message."""
    first_line = (str(error).strip() or "no reason given").splitlines()[0]
    return f"{type(error).__name__}: {first_line}"
