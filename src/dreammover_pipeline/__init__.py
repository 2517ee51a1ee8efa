# SPDX-License-Identifier: Apache-2.0
"""DreamMover (ECCV 2024) as a diffusers pipeline: two photos in, the frames between them out."""

from .pipeline import DreamMoverPipeline, DreamMoverPipelineOutput

__version__ = "0.1.0"
__all__ = ["DreamMoverPipeline", "DreamMoverPipelineOutput"]
