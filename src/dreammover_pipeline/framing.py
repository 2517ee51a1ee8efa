# SPDX-License-Identifier: Apache-2.0
"""How photos of any size are put on the canvas that the models see, and how frames are taken off it again.

An image is (3, H, W) in [0, 1], sizes are (height, width) in pixels. Pictures are scaled alike in both directions;
what overhangs is cropped half on either side, what is missing is padded at the right and bottom.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from .images import MAX_PIXELS, Size
from .inputs import check_integer
from .records import Canvas


def plan_canvas(
    size: Size, native_side: float, multiple: int, min_side: int, height: int | None = None, width: int | None = None
) -> Canvas:
    """Decides the size the models work at and the size frames come back at.

    With neither `height` nor `width`, the picture takes an area of about native_side² at the first image's aspect
    ratio, and frames come back at the first image's own size. Otherwise both are the size asked for, a missing side
    following from the aspect ratio. The canvas is the picture's size rounded up to `multiple`.

    Args:
        size: (H, W) of the first image.
        native_side: Side of the square the checkpoint was trained on, in pixels.
        multiple: What the canvas sides are multiples of, in pixels.
        min_side: Shortest canvas side the models can process, in pixels.
        height, width: Size asked for, in pixels.

    Raises:
        TypeError: `height` or `width` is not an integer.
        ValueError: `height` or `width` is not positive, or the working size is too small or absurdly large.
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
    return Canvas(*canvas, *content, *(size if height is None and width is None else content))


def fit(image: torch.Tensor, canvas: Canvas) -> torch.Tensor:
    """Puts an image (3, H, W) on the canvas: it covers the content box, and the box's edge is repeated as padding.

    Returns:
        (3, canvas.height, canvas.width) in [0, 1]. Where no scaling is needed, the pixels are those of `image`.
    """
    content = _cover(image, canvas.content_height, canvas.content_width)
    padding = (0, canvas.width - canvas.content_width, 0, canvas.height - canvas.content_height)
    return F.pad(content, padding, mode="replicate")


def fit_points(points: torch.Tensor, size: Size, canvas: Canvas) -> torch.Tensor:
    """Where `fit` puts places of an image; what it cuts away lies outside the canvas' content box.

    Args:
        points: (k, 2), x and y in pixels of the image, (0, 0) the centre of the top left one.
        size: (H, W) of the image.
        canvas: that it is fitted to.

    Returns:
        (k, 2), in pixels of the canvas, likewise.
    """
    cropping = _cropping(size, canvas.content_height, canvas.content_width)
    part, scaled, before, after = (torch.tensor(pair[::-1]).to(points) for pair in cropping)
    return (points + 0.5 - before) * scaled / part - 0.5 - after


def fit_to_output(image: torch.Tensor, canvas: Canvas) -> torch.Tensor:
    """An image (3, H, W) as it stands at an end of the video.

    Returns:
        (3, canvas.output_height, canvas.output_width) in [0, 1]. If that is its size, it comes back as it is.
    """
    return _cover(image, canvas.output_height, canvas.output_width)


def unfit(frames: torch.Tensor, canvas: Canvas) -> torch.Tensor:
    """Takes frames (F, 3, canvas.height, canvas.width) off the canvas: padding cut away, then resized.

    Returns:
        (F, 3, canvas.output_height, canvas.output_width), float32, clamped to [0, 1].
    """
    content = frames[:, :, : canvas.content_height, : canvas.content_width].to(torch.float32)
    return _resize(content, canvas.output_height, canvas.output_width)


def _content_size(size: Size, native_side: int, height: int | None, width: int | None) -> Size:
    if height is None and width is None:  # fix the short side, so that rounding it leaves the aspect ratio alone
        short = max(1, round(native_side * math.sqrt(min(size) / max(size))))
        height, width = (short, None) if size[0] <= size[1] else (None, short)
    if height is None:
        height = max(1, round(width * size[0] / size[1]))
    elif width is None:
        width = max(1, round(height * size[1] / size[0]))
    return height, width


def _cropping(size: Size, height: int, width: int) -> tuple[Size, Size, Size, Size]:
    """How an image of a size comes to cover (height, width): a part of it is scaled, and its middle stays.

    Returns:
        The size of the part and of the part scaled, and how much is cut before and after at the top and the left.
    """
    scale = max(height / size[0], width / size[1])
    # Most of the overhang goes before scaling, or a long strip would be blown up to its whole length first.
    before = tuple(
        max(0, full - math.ceil(side / scale)) // 2 for full, side in zip(size, (height, width), strict=True)
    )
    part = (size[0] - 2 * before[0], size[1] - 2 * before[1])
    scaled = (max(height, round(part[0] * scale)), max(width, round(part[1] * scale)))
    return part, scaled, before, ((scaled[0] - height) // 2, (scaled[1] - width) // 2)


def _cover(image: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Scales (3, H, W) until it covers (height, width), and crops what overhangs, half on either side."""
    part, scaled, (top, left), (lower, further) = _cropping(tuple(image.shape[1:]), height, width)
    picture = _resize(image[None, :, top : top + part[0], left : left + part[1]], *scaled)[0]
    return picture[:, lower : lower + height, further : further + width]


def _resize(images: torch.Tensor, height: int, width: int) -> torch.Tensor:
    if images.shape[-2:] != (height, width):
        images = F.interpolate(images, (height, width), mode="bicubic", antialias=True)
    return images.clamp(0, 1)  # bicubic overshoots at edges, and so does a decoder
