# SPDX-License-Identifier: Apache-2.0
"""DreamMover (ECCV 2024) as a diffusers pipeline: two photos in, the frames between them out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .settings import PRESETS

if TYPE_CHECKING:
    from .pipeline import DreamMoverPipeline, DreamMoverPipelineOutput

__version__ = "0.1.0"
__all__ = ["PRESETS", "DreamMoverPipeline", "DreamMoverPipelineOutput"]


def __getattr__(name: str):
    # Imported on first use, so that the command line answers `--version` and typos before torch has loaded.
    if name in __all__:
        from . import pipeline

        return getattr(pipeline, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
