# SPDX-License-Identifier: Apache-2.0
"""Any photo in, exact size out.

An image is (3, H, W) in [0, 1], sizes are (height, width) in pixels. Pictures are scaled alike in both directions;
what overhangs is cropped half on either side, what is missing is padded at the right and bottom.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

from .inputs import check_integer
from .records import Canvas

Photo = str | os.PathLike | Image.Image | np.ndarray | torch.Tensor
Size = tuple[int, int]

# Room for a 108-megapixel photo, which is 1.3 GB as float32 RGB; beyond that a file is more likely an attack.
MAX_PIXELS = 2**27

_DTYPES = ("uint8", "uint16", "float16", "bfloat16", "float32", "float64")
_MODES_8_BIT = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr", "HSV")
_MODES_16_BIT = ("I;16", "I;16L", "I;16B", "I;16N", "I")


def is_batch(source: Photo | Sequence[Photo]) -> bool:
    """Whether `source` is several images: a list, a tuple or a 4-dimensional array or tensor."""
    return isinstance(source, list | tuple) or (isinstance(source, np.ndarray | torch.Tensor) and source.ndim == 4)


def decode_images(source: Photo | Sequence[Photo], name: str) -> list[torch.Tensor]:
    """Reads one image or a batch of them as it is stored, with its EXIF orientation applied.

    Args:
        source: One image: a path, a PIL image, a numpy array (H, W) or (H, W, C), a torch tensor (H, W) or (C, H, W),
            with C = 1, 3 or 4; uint8, uint16 or floats in [0, 1]. Or a batch: a list or tuple of these, a numpy array
            (B, H, W, C), a torch tensor (B, C, H, W).
        name: The argument's name, for error messages.

    Returns:
        One CPU tensor (C, H, W) for each image, C = 1, 3 or 4, in the image's own dtype, for `rgb`.

    Raises:
        TypeError: Something that is no image, or a dtype that is not allowed.
        ValueError: A file, PIL mode, shape, size or range of values that is not allowed, or an empty batch.
    """
    if not is_batch(source):
        return [_decode_image(source, name)]
    if len(source) == 0:
        raise ValueError(f"{name} is an empty batch; it needs at least one image")
    return [_decode_image(image, f"{name}[{index}]") for index, image in enumerate(source)]


def load_images(source: Photo | Sequence[Photo], name: str) -> list[torch.Tensor]:
    """Reads one image or a batch of them as `decode_images` does, and makes each what `rgb` makes of it.

    Returns:
        One float32 CPU tensor (3, H, W) in [0, 1] for each image, sharing no memory with `source`.

    Raises:
        TypeError, ValueError: What `decode_images` raises.
    """
    return [rgb(values) for values in decode_images(source, name)]


def rgb(values: torch.Tensor) -> torch.Tensor:
    """A decoded image in red, green and blue: grey three times over, alpha composited on white.

    Args:
        values: (C, H, W) as `decode_images` returns it.

    Returns:
        (3, H, W), float32 in [0, 1], in memory of its own.
    """
    pixels = values.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    if not values.is_floating_point():
        pixels /= torch.iinfo(values.dtype).max
    if len(pixels) == 4:
        pixels = pixels[:3] * pixels[3:] + (1 - pixels[3:])
    return pixels.expand(3, -1, -1).contiguous()


def load_masks(
    source: Photo | Sequence[Photo] | None, sizes: Sequence[Size], name: str = "mask"
) -> list[torch.Tensor] | None:
    """Reads the mask of a pair of photos, or the two masks.

    Args:
        source: One image of the first photo's size, or two, each of its photo's size; None for none.
        sizes: (H, W) of the two photos.
        name: The argument's name, for error messages.

    Returns:
        One or two float32 CPU tensors (3, H, W) in [0, 1]; None for none.

    Raises:
        TypeError, ValueError: An image cannot be had or has another size, or there are more than two.
    """
    if source is None:
        return None
    return [rgb(mask) for mask in check_mask_sizes(decode_images(source, name), sizes, name)]


def check_mask_sizes(masks: list[torch.Tensor], sizes: Sequence[Size], name: str = "mask") -> list[torch.Tensor]:
    """The masks as they came; raises ValueError unless they are one or two, each of its photo's size.

    Args:
        masks: (C, H, W) each.
        sizes: (H, W) of the two photos.
        name: The argument's name, for error messages.
    """
    if len(masks) > 2:
        raise ValueError(f"`{name}` must be one image, or two, one for each photo; {len(masks)} came")
    for i, (mask, (height, width)) in enumerate(zip(masks, sizes, strict=False)):
        if tuple(mask.shape[1:]) != (height, width):
            raise ValueError(
                f"`{name}` has {mask.shape[2]}×{mask.shape[1]} pixels (width × height), but img{i} has "
                f"{width}×{height}; a mask must be of its photo's size"
            )
    return masks


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


def _decode_image(source: Photo, name: str) -> torch.Tensor:
    if isinstance(source, str | os.PathLike):
        return _from_file(source, f"{name} ({os.fspath(source)})")
    if isinstance(source, Image.Image):
        return _from_pil(source, name)
    if isinstance(source, np.ndarray | torch.Tensor):
        return _from_array(source, name)
    allowed = "paths, PIL images, numpy arrays and torch tensors, or one batch of them"
    raise TypeError(f"{name} is a {type(source).__name__}; allowed are {allowed}")


def _from_file(path: str | os.PathLike, name: str) -> torch.Tensor:
    if not os.path.isfile(path):
        fault = "is a folder" if os.path.isdir(path) else "is no existing file"
        raise ValueError(f"{name} {fault}; an image file is needed")
    with _pillow_errors(name):
        opened = Image.open(path)
    with opened:
        return _from_pil(opened, name)


def _from_pil(image: Image.Image, name: str) -> torch.Tensor:
    _check_size(image.height, image.width, name)  # known from the header, before anything is decoded
    with _pillow_errors(name):
        upright = ImageOps.exif_transpose(image)
    if upright.mode in _MODES_16_BIT:
        return _from_array(_grey_16_bit(upright, name), name)
    if upright.mode not in _MODES_8_BIT:
        raise ValueError(f"{name} has PIL mode {upright.mode}; allowed are {', '.join(_MODES_8_BIT + _MODES_16_BIT)}")
    return _from_array(np.asarray(upright.convert("RGBA" if upright.has_transparency_data else "RGB")), name)


@contextmanager
def _pillow_errors(name: str) -> Iterator[None]:
    """Turns what Pillow raises into a ValueError, and leaves the judging of sizes to `_check_size`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            yield
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name} is too large, at most {MAX_PIXELS} pixels are allowed: {error}") from error
    except Exception as error:  # Pillow's decoders raise nearly anything on a broken file
        raise ValueError(f"{name} cannot be read as an image: {error}") from error


def _grey_16_bit(image: Image.Image, name: str) -> np.ndarray:
    values = np.asarray(image)
    low, high = values.min(), values.max()
    if low < 0 or high > 65535:
        raise ValueError(f"{name} has values from {low} to {high}; 16-bit grey has 0 to 65535")
    # A PNG may declare one grey value transparent; Pillow's own way to composite it would cut the image to 8 bits.
    return np.where(values == image.info.get("transparency"), 65535, values).astype(np.uint16)


def _from_array(array: np.ndarray | torch.Tensor, name: str) -> torch.Tensor:
    if isinstance(array, np.ndarray):
        layout, size, channels, dtype = "(H, W, C)", array.shape[:2], array.shape[2:], array.dtype.name
    else:
        layout, size, channels, dtype = "(C, H, W)", array.shape[-2:], array.shape[:-2], str(array.dtype)
    if len(size) != 2 or tuple(channels) not in ((), (1,), (3,), (4,)):
        allowed = f"one {type(array).__name__} image is (H, W) or {layout} with C = 1, 3 or 4"
        raise ValueError(f"{name} has shape {tuple(array.shape)}; {allowed}")
    if dtype.removeprefix("torch.") not in _DTYPES:
        raise TypeError(f"{name} has dtype {dtype}; allowed are {', '.join(_DTYPES)}, floats in [0, 1]")
    _check_size(*size, name)
    if isinstance(array, torch.Tensor):
        return _check_range(array.detach().to("cpu", copy=True).reshape(-1, *size), name)
    # A plain copy: torch takes neither foreign byte orders nor negative strides, and warns about read-only memory.
    native = np.array(array, dtype=array.dtype.newbyteorder("="), order="C")
    return _check_range(torch.from_numpy(native).reshape(*size, -1).movedim(-1, 0), name)


def _check_range(values: torch.Tensor, name: str) -> torch.Tensor:
    if values.is_floating_point():
        low, high = (bound.item() for bound in values.to(torch.float32).aminmax())
        if not 0 <= low <= high <= 1:  # NaN fails this too
            raise ValueError(f"{name} has values from {low:.6g} to {high:.6g}; floats must be finite and in [0, 1]")
    return values


def _check_size(height: int, width: int, name: str) -> None:
    if height == 0 or width == 0:
        raise ValueError(f"{name} is empty: {height}×{width} pixels (height × width)")
    if height * width > MAX_PIXELS:
        raise ValueError(f"{name} is too large, at most {MAX_PIXELS} pixels are allowed: {height}×{width}")


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
