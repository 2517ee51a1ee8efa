# SPDX-License-Identifier: Apache-2.0
"""What tests of sequences share: three photos, and a short call that leads through them."""

import torch
from PIL import Image

FEW_STEPS = {"num_inference_steps": 3, "inversion_steps": 2, "feature_step": 1}


def three_photos(photos):
    """Three photos of one size, of two that there are."""
    return [*photos, photos[0].transpose(Image.Transpose.ROTATE_180)]


def seeded():
    return torch.Generator().manual_seed(3)


def through(pipe, images, fast, **arguments):
    """The output of a sequence with short arguments, but for those that are named."""
    return pipe.interpolate_sequence(images, **{**fast, "generator": seeded(), **arguments})


def without_frames(fast):
    """Of short arguments, those that `prepare` takes."""
    return {name: value for name, value in fast.items() if name not in ("n_frames", "detail", "output_type")}
