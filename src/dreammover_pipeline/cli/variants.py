# SPDX-License-Identifier: Apache-2.0
"""Chooses among several files of the same weights, which diffusers calls variants and tells apart by their names.

`diffusion_pytorch_model.safetensors` has the weights of a model in float32, `diffusion_pytorch_model.fp16.safetensors`
has them in float16 and is half as large.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch

WEIGHTS_FILE = re.compile(r"diffusion_pytorch_model(?:\.([a-zA-Z]\w*))?(?:-\d+-of-\d+)?\.(safetensors|bin)")
HUB_PATIENCE = 10  # seconds that the Hub may take to say which files a repository has


def choose_variant(source: str, subfolder: str, dtype: torch.dtype, safe: bool) -> str | None:
    """The variant of a model's weights to load.

    In float16 it is "fp16" where a Hub repository has that and its other files were not downloaded before, so that
    half as much is downloaded. Otherwise it is none, which stands for the weights as they were trained, or the variant
    that there is where there are no others.

    Args:
        source: A folder in diffusers layout, or a Hub id.
        subfolder: Where in it the model is whose files decide; "" for the source itself.
        dtype: The precision in which the model will be loaded.
        safe: Whether only safetensors files are loaded.

    Returns:
        The `variant` that `from_pretrained` takes; None also where nothing is known of the model, because it does not
        exist or cannot be reached.

    Raises:
        ValueError: The source is no folder, and no repository can have its name.
    """
    import torch

    if Path(source).is_dir():
        return _needed(_variants((path.name for path in Path(source, subfolder).glob("*")), safe))
    cached = _variants(_cached_names(source, subfolder), safe)
    if None in cached:
        return None
    half = dtype == torch.float16
    found = cached if half and "fp16" in cached else _variants(_hub_names(source, subfolder), safe) or cached
    return "fp16" if half and "fp16" in found else _needed(found)


def _variants(names: Iterable[str], safe: bool) -> set[str | None]:
    """The variants that files of these names hold; None stands for weights without one."""
    matches = [match for name in names if (match := WEIGHTS_FILE.fullmatch(name))]
    return {match[1] for match in matches if match[2] == "safetensors" or not safe}


def _needed(variants: set[str | None]) -> str | None:
    """None if there are weights without a variant or none at all; otherwise the first variant by name."""
    return None if None in variants else min(variants, default=None)


def _cached_names(source: str, subfolder: str) -> list[str]:
    """The names of the files of a repository's subfolder that were downloaded before."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(source, f"{subfolder}/config.json".removeprefix("/"))
    return [path.name for path in Path(config).parent.iterdir()] if isinstance(config, str) else []


def _hub_names(source: str, subfolder: str) -> list[str]:
    """The names of the files in a repository's subfolder; none where the Hub does not say."""
    from huggingface_hub import model_info

    try:
        files = model_info(source, timeout=HUB_PATIENCE).siblings or []
    except Exception:  # what is wrong is said when the model is loaded, with what else can be tried
        return []
    paths = [Path(file.rfilename) for file in files]
    return [path.name for path in paths if path.parent == Path(subfolder)]
