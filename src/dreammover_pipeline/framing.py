# SPDX-License-Identifier: Apache-2.0
"""Framing: photos of any size are put on the canvas that the models see, and frames are taken off it again.

An image is (3, H, W) in [0, 1], sizes are (height, width) in pixels. Pictures are scaled by the same factor in both
directions. What is too long is cropped, half on either side; what is missing is padded at the right and at the bottom.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from .images import MAX_PIXELS, Size, rgb
from .inputs import check_integer
from .records import Canvas


def plan_canvas(
    size: Size, native_side: float, multiple: int, min_side: int, height: int | None = None, width: int | None = None
) -> Canvas:
    """Decides the size that the models work at and the size that frames are returned at.

    With neither `height` nor `width`, the picture takes an area of about native_side² at the first image's aspect
    ratio, and frames are returned at the first image's own size. Otherwise the picture and the returned frames have
    the size asked for, and a side that is not given follows from the first image's aspect ratio. The canvas is the
    picture's size rounded up to multiples of `multiple`.

    Args:
        size: Size (H, W) of the first image, in pixels.
        native_side: Side of the square that the checkpoint was trained on, in pixels.
        multiple: Number that both sides of the canvas are multiples of, in pixels.
        min_side: Shortest side of a canvas that the models can process, in pixels.
        height: Height of the frames asked for, in pixels; None if it is not given.
        width: Width of the frames asked for, in pixels; None if it is not given.

    Raises:
        TypeError: `height` or `width` is not an integer.
        ValueError: `height` or `width` is not positive, or the canvas is too small or has more than `MAX_PIXELS`.
    """
    for side, name in ((height, "height"), (width, "width")):
        if side is not None:
            check_integer(name, side, 1)
            if side > MAX_PIXELS:
                raise ValueError(f"`{name}` must be at most {MAX_PIXELS} pixels, not {side}")
    content = _content_size(size, native_side, height, width)
    canvas = tuple(math.ceil(side / multiple) * multiple for side in content)
    asked = f"height={height}, width={width} and a first image of {size[0]}×{size[1]} pixels (height × width)"
    fault = f"{asked} make a working size of {canvas[0]}×{canvas[1]}"
    if min(canvas) < min_side:
        ratio = max(1.0, (native_side / min_side) ** 2)
        allowed = f"without height and width, aspect ratios up to about {ratio:.3g}:1 have that"
        raise ValueError(f"{fault}, but each side must have at least {min_side} pixels; {allowed}")
    if canvas[0] * canvas[1] > MAX_PIXELS:
        raise ValueError(f"{fault}, but at most {MAX_PIXELS} pixels are allowed")
    # Sides of numpy's integers, which are allowed, could not be written into a file.
    return Canvas(*map(int, (*canvas, *content, *(size if height is None and width is None else content))))


def fit(image: torch.Tensor, canvas: Canvas) -> torch.Tensor:
    """Puts an image (3, H, W) on the canvas: it covers the content box, and the box's edge is repeated as padding.

    Returns:
        The canvas (3, canvas.height, canvas.width) in [0, 1]. An image that needs no scaling keeps its pixel values.
    """
    content = _cover(image, canvas.content_height, canvas.content_width)
    padding = (0, canvas.width - canvas.content_width, 0, canvas.height - canvas.content_height)
    return F.pad(content, padding, mode="replicate")


def fit_points(points: torch.Tensor, size: Size, canvas: Canvas) -> torch.Tensor:
    """Where `fit` puts points of an image; a point that is cropped lies outside the content box of the canvas.

    Args:
        points: Points (k, 2), x and y in pixels of the image, where (0, 0) is the centre of the top left pixel.
        size: Size (H, W) of the image, in pixels.
        canvas: The canvas that the image is put on.

    Returns:
        The points (k, 2), x and y in pixels of the canvas, where (0, 0) is the centre of the top left pixel.
    """
    cropping = _cropping(size, canvas.content_height, canvas.content_width)
    part, scaled, before, after = (points.new_tensor(pair[::-1]) for pair in cropping)
    return (points + 0.5 - before) * scaled / part - 0.5 - after


def unfit_points(points: torch.Tensor, size: Size, canvas: Canvas) -> torch.Tensor:
    """Which places of an image of size (H, W) `fit` puts at points (k, 2) of the canvas; the inverse of `fit_points`.

    Returns:
        The places (k, 2), x and y in pixels of the image; what lies beyond the image is what pads the canvas.
    """
    cropping = _cropping(size, canvas.content_height, canvas.content_width)
    part, scaled, before, after = (points.new_tensor(pair[::-1]) for pair in cropping)
    return (points + 0.5 + after) * part / scaled - 0.5 + before


def fit_to_output(photo: torch.Tensor, canvas: Canvas) -> torch.Tensor:
    """A photo at the output size, as it stands at an end of the video.

    Args:
        photo: A photo (C, H, W), as `decode_images` returns it.
        canvas: The canvas that the photo is put on.

    Returns:
        The photo (3, canvas.output_height, canvas.output_width). A photo of 8-bit colours that has this size already
        is returned as it is; any other is float32 in [0, 1], and keeps its pixel values if it has this size.
    """
    size = canvas.output_height, canvas.output_width
    if photo.dtype == torch.uint8 and tuple(photo.shape) == (3, *size):
        return photo
    return _cover(rgb(photo), *size)


def unfit(frames: torch.Tensor, canvas: Canvas) -> torch.Tensor:
    """Takes frames (F, 3, canvas.height, canvas.width) off the canvas: padding is cut away, and the rest is resized.

    Returns:
        The frames (F, 3, canvas.output_height, canvas.output_width), float32, clamped to [0, 1].
    """
    content = frames[canvas.content].to(torch.float32)
    return _resize(content, canvas.output_height, canvas.output_width)


def _content_size(size: Size, native_side: int, height: int | None, width: int | None) -> Size:
    if height is None and width is None:  # round the shorter side, and let the longer follow, to keep the aspect ratio
        short = max(1, round(native_side * math.sqrt(min(size) / max(size))))
        height, width = (short, None) if size[0] <= size[1] else (None, short)
    if height is None:
        height = max(1, round(width * size[0] / size[1]))
    elif width is None:
        width = max(1, round(height * size[1] / size[0]))
    return height, width


def _cropping(size: Size, height: int, width: int) -> tuple[Size, Size, Size, Size]:
    """How an image of size (H, W) is made to cover (height, width): a part of it is scaled, and the middle is kept.

    Returns:
        The size of the part; its size when scaled; what is cropped at the top and at the left before scaling, in
        pixels of the image; and what is cropped there after scaling, in scaled pixels.
    """
    scale = max(height / size[0], width / size[1])
    # Most is cropped before scaling, since otherwise a long strip would first be enlarged to its whole length.
    before = tuple(
        max(0, full - math.ceil(side / scale)) // 2 for full, side in zip(size, (height, width), strict=True)
    )
    part = (size[0] - 2 * before[0], size[1] - 2 * before[1])
    scaled = (round(part[0] * scale), round(part[1] * scale))
    return part, scaled, before, ((scaled[0] - height) // 2, (scaled[1] - width) // 2)


def _cover(image: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Scales an image (3, H, W) until it covers (height, width), and crops what is too long, half on either side."""
    part, scaled, (top, left), (lower, further) = _cropping(tuple(image.shape[1:]), height, width)
    picture = _resize(image[None, :, top : top + part[0], left : left + part[1]], *scaled)[0]
    return picture[:, lower : lower + height, further : further + width]


def _resize(images: torch.Tensor, height: int, width: int) -> torch.Tensor:
    if images.shape[-2:] != (height, width):
        images = F.interpolate(images, (height, width), mode="bicubic", antialias=True)
    return images.clamp(0, 1)  # bicubic interpolation and the VAE's decoder both overshoot at edges
