# SPDX-License-Identifier: Apache-2.0
"""Decoding of photos: files, PIL images, arrays and tensors of many kinds are checked and become tensors."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from PIL import Image, ImageOps

Photo = str | os.PathLike | Image.Image | np.ndarray | torch.Tensor
Size = tuple[int, int]

# Large enough for a 108-megapixel photo, which takes 1.3 GB as float32 RGB; a larger file is more likely an attack.
MAX_PIXELS = 2**27

_DTYPES = ("uint8", "uint16", "float16", "bfloat16", "float32", "float64")
_MODES_8_BIT = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr", "HSV")
_MODES_16_BIT = ("I;16", "I;16L", "I;16B", "I;16N", "I")


def is_batch(source: Photo | Sequence[Photo]) -> bool:
    """Whether `source` is several images: a list, a tuple or a 4-dimensional array or tensor."""
    return isinstance(source, list | tuple) or (isinstance(source, np.ndarray | torch.Tensor) and source.ndim == 4)


def decode_images(source: Photo | Sequence[Photo], name: str) -> list[torch.Tensor]:
    """Reads one image, or a batch of images, with the values as they are stored and EXIF orientation applied.

    Args:
        source: One image: a path, a PIL image, a numpy array (H, W) or (H, W, C), or a torch tensor (H, W) or
            (C, H, W), with C = 1, 3 or 4; uint8, uint16 or floats in [0, 1]. Or a batch: a list or tuple of images, a
            numpy array (B, H, W, C), or a torch tensor (B, C, H, W).
        name: What error messages call the image or the batch.

    Returns:
        One CPU tensor (C, H, W) for each image, C = 1, 3 or 4, in the image's own dtype. `rgb` makes colours of it.

    Raises:
        TypeError: An image is of a type or of a dtype that is not allowed.
        ValueError: A file cannot be read, a PIL mode, shape, size or range of values is not allowed, or the batch is
            empty.
    """
    if not is_batch(source):
        return [_decode_image(source, name)]
    if len(source) == 0:
        raise ValueError(f"{name} is an empty batch; it needs at least one image")
    return [_decode_image(image, f"{name}[{index}]") for index, image in enumerate(source)]


def load_images(source: Photo | Sequence[Photo], name: str) -> list[torch.Tensor]:
    """Reads one image, or a batch of images, in red, green and blue.

    Args:
        source: One image or a batch of images, in any form that `decode_images` takes.
        name: What error messages call the image or the batch.

    Returns:
        One float32 CPU tensor (3, H, W) in [0, 1] for each image, sharing no memory with `source`.

    Raises:
        TypeError, ValueError: `decode_images` cannot read an image.
    """
    return [rgb(values) for values in decode_images(source, name)]


def rgb(values: torch.Tensor) -> torch.Tensor:
    """A decoded image in red, green and blue: grey is repeated in all three, and alpha is composited on white.

    Args:
        values: An image (C, H, W), as `decode_images` returns it.

    Returns:
        The image (3, H, W), float32 in [0, 1], in memory of its own.
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
        source: One mask of the first photo's size, or two masks, each of its own photo's size; None for no mask.
        sizes: Size (H, W) of each of the two photos, in pixels.
        name: Name of the argument that holds the masks, for error messages.

    Returns:
        One or two float32 CPU tensors (3, H, W) in [0, 1]; None for no mask.

    Raises:
        TypeError, ValueError: A mask cannot be read or differs in size from its photo, or there are more than two.
    """
    if source is None:
        return None
    return [rgb(mask) for mask in check_mask_sizes(decode_images(source, name), sizes, name)]


def check_mask_sizes(masks: list[torch.Tensor], sizes: Sequence[Size], name: str = "mask") -> list[torch.Tensor]:
    """Checks the number and the sizes of masks, and returns the masks unchanged.

    Args:
        masks: The decoded masks, (C, H, W) each.
        sizes: Size (H, W) of each of the two photos, in pixels.
        name: Name of the argument that holds the masks, for error messages.

    Raises:
        ValueError: There are more than two masks, or one differs in size from its photo.
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
    _check_size(image.height, image.width, name)  # the file's header tells the size, before anything is decoded
    with _pillow_errors(name):
        upright = ImageOps.exif_transpose(image)
    if upright.mode in _MODES_16_BIT:
        return _from_array(_grey_16_bit(upright, name), name)
    if upright.mode not in _MODES_8_BIT:
        raise ValueError(f"{name} has PIL mode {upright.mode}; allowed are {', '.join(_MODES_8_BIT + _MODES_16_BIT)}")
    return _from_array(np.asarray(upright.convert("RGBA" if upright.has_transparency_data else "RGB")), name)


@contextmanager
def _pillow_errors(name: str) -> Iterator[None]:
    """Turns errors of Pillow into ValueErrors, and silences its warning about sizes, which `_check_size` judges."""
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
    # A PNG may declare one grey value transparent, which becomes white. Pillow could do so only in 8 bits.
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
    # Copied, because torch takes neither foreign byte orders nor negative strides, and warns about read-only memory.
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
