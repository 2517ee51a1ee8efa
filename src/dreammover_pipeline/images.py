# SPDX-License-Identifier: Apache-2.0
"""Decoding of photos: files, PIL images, arrays and tensors of many kinds are checked and become tensors."""

from __future__ import annotations

import importlib
import io
import os
import struct
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from .inputs import check_input_file

Photo = str | os.PathLike | Image.Image | np.ndarray | torch.Tensor
Size = tuple[int, int]

# Large enough for a 108-megapixel photo, which takes 1.3 GB as float32 RGB; a larger file is more likely an attack.
MAX_PIXELS = 2**27

_DTYPES = ("bool", "uint8", "uint16", "float16", "bfloat16", "float32", "float64")
_MODES_8_BIT = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr", "HSV")
_MODES_16_BIT = ("I;16", "I;16L", "I;16B", "I;16N", "I")
# The mode that an image must have for a profile of a colour space to be about it.
_MODES_OF_PROFILES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}
_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_TEXTS = (b"tEXt", b"zTXt", b"iTXt")
_HEIC_BRANDS = (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1")


def is_batch(source: Photo | Sequence[Photo]) -> bool:
    """Whether `source` is several images: a list, a tuple or a 4-dimensional array or tensor."""
    return isinstance(source, list | tuple) or (isinstance(source, np.ndarray | torch.Tensor) and source.ndim == 4)


def decode_images(source: Photo | Sequence[Photo], name: str) -> list[torch.Tensor]:
    """Reads one image, or a batch of images, as every viewer shows it: upright by its EXIF, its colours in sRGB.

    Colours of an image with an ICC profile are brought to sRGB, except those of 16-bit grey. EXIF blocks, profiles and
    texts that cannot be read are ignored.

    Args:
        source: One image: a path, a PIL image, a numpy array (H, W) or (H, W, C), or a torch tensor (H, W) or
            (C, H, W), with C = 1, 3 or 4; bool, uint8, uint16 or floats in [0, 1]. Or a batch: a list or tuple of
            images, a numpy array (B, H, W, C), or a torch tensor (B, C, H, W).
        name: What error messages call the image or the batch.

    Returns:
        One CPU tensor (C, H, W) for each image, C = 1, 3 or 4, in the image's own dtype, bool as uint8 of 0 and 255.
        `rgb` makes colours of it.

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


def load_shrunk(
    file: BinaryIO, name: str, max_side: int, max_pixels: int, formats: Sequence[str] | None = None
) -> torch.Tensor:
    """Reads a photo no larger than it is needed, in little memory: it is shrunk in the few bytes it is decoded to.

    Args:
        file: The photo's file, open for reading at its beginning.
        name: What error messages call the photo.
        max_side: Pixels that the longer side of the photo may have; a larger photo is shrunk to them.
        max_pixels: Pixels that the photo may have in its file. A larger one is refused before it is decoded.
        formats: Names of the formats, as Pillow has them, that the photo may have; None for any that Pillow reads.

    Returns:
        The photo (3, H, W), as `load_images` returns it.

    Raises:
        ValueError: The photo cannot be read, is larger than it may be, or is of another format.
    """
    with _pillow_errors(name, max_pixels):
        opened = _opened(file, formats)
    with opened as image:
        _check_size(image.height, image.width, name, max_pixels)
        with _pillow_errors(name):
            small = _shrunk(image, max_side)
        return rgb(_from_pil(small, name))


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
    check_input_file(path, name, "an image file")
    with ExitStack() as stack:
        with _pillow_errors(name):
            file = stack.enter_context(Path(path).open("rb"))
            image = stack.enter_context(_opened(file))
        return _from_pil(image, name)


def _opened(file: BinaryIO, formats: Sequence[str] | None = None) -> Image.Image:
    """Open an image file with Pillow, also where texts in it are broken, and HEIC where pillow-heif is installed.

    Raises:
        ValueError: The file is HEIC, and pillow-heif is not installed, or it is of none of the `formats`.
        Exception: Pillow cannot read the file.
    """
    start = file.read(12)  # Pillow begins at the beginning by itself
    if start[4:8] == b"ftyp" and start[8:] in _HEIC_BRANDS:
        try:
            importlib.import_module("pillow_heif").register_heif_opener()
        except ImportError:
            raise ValueError(
                "it is a HEIC photo, for which the package pillow-heif is needed; install it with "
                "pip install 'dreammover-pipeline[heic]', or save the photo as JPEG"
            ) from None
    Image.init()
    known = formats and [kind for kind in formats if kind in Image.OPEN]
    try:
        return Image.open(file, formats=known)
    except (ValueError, UnidentifiedImageError):
        if start[:8] == _PNG:
            file.seek(0)
            return Image.open(io.BytesIO(_without_texts(file.read())), formats=known)
        if formats:
            raise ValueError(f"it is none of {', '.join(formats)}") from None
        raise


def _shrunk(image: Image.Image, max_side: int) -> Image.Image:
    """An image of at most `max_side` pixels a side, in the bits per pixel that it has."""
    if max(image.size) <= max_side:
        return image
    if image.mode in _MODES_16_BIT:
        image = image.convert("I")  # the only mode of 16-bit grey that Pillow shrinks in all versions
    elif image.mode in ("1", "P", "PA") or (image.mode in ("L", "RGB") and image.has_transparency_data):
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")  # neither indices nor keys mix
    # Hamming's window makes no value brighter than white, which 16-bit grey in 32 bits could become.
    image.thumbnail((max_side, max_side), Image.Resampling.HAMMING if image.mode == "I" else Image.Resampling.LANCZOS)
    return image


def _without_texts(png: bytes) -> bytes:
    """A PNG file without the texts in it, which no viewer needs and which may be broken or too long for Pillow."""
    kept, at = [png[:8]], 8
    while at < len(png):
        length = struct.unpack(">I", png[at : at + 4])[0] if at + 8 <= len(png) else 0
        end = at + 12 + length
        if png[at + 4 : at + 8] not in _PNG_TEXTS:
            kept.append(png[at:end])
        at = end
    return b"".join(kept)


def _from_pil(image: Image.Image, name: str) -> torch.Tensor:
    _check_size(image.height, image.width, name)  # the file's header tells the size, before anything is decoded
    with _pillow_errors(name):
        upright = _upright(image)
        upright = _in_srgb(upright, image.info.get("icc_profile"))
    if upright.mode in _MODES_16_BIT:
        return _from_array(_grey_16_bit(upright, name), name)
    if upright.mode not in _MODES_8_BIT:
        raise ValueError(f"{name} has PIL mode {upright.mode}; allowed are {', '.join(_MODES_8_BIT + _MODES_16_BIT)}")
    return _from_array(np.asarray(upright.convert("RGBA" if upright.has_transparency_data else "RGB")), name)


def _upright(image: Image.Image) -> Image.Image:
    """An image turned as its EXIF block says; as it is stored where there is none, or a broken one."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # Pillow raises nearly anything on a broken block, and on broken pixels once more in `copy`
        return image.copy()


def _in_srgb(image: Image.Image, icc: bytes | None) -> Image.Image:
    """An image with its colours brought from those of an ICC profile to sRGB.

    An image without a profile, or with one that cannot be read or is about another kind of image, stays as it is.
    """
    if not icc or image.mode in _MODES_16_BIT:
        return image
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(icc))
        mode = _MODES_OF_PROFILES.get(profile.profile.xcolor_space.strip())
        if mode is None or (mode == "CMYK") != (image.mode == "CMYK"):
            return image
        if mode == "L" and image.mode not in ("1", "L", "LA"):
            return image  # colours would become grey
        if ImageCms.getProfileName(profile).startswith("sRGB"):
            return image  # to the bit
        transparent = image.has_transparency_data
        alpha = image.convert("RGBA").getchannel("A") if transparent else None
        colours = ImageCms.profileToProfile(
            image.convert(mode), profile, ImageCms.createProfile("sRGB"), outputMode="RGB"
        )
    except (ImageCms.PyCMSError, OSError):
        return image
    if alpha is not None:
        colours.putalpha(alpha)
    return colours


@contextmanager
def _pillow_errors(name: str, max_pixels: int = MAX_PIXELS) -> Iterator[None]:
    """Turns errors of Pillow into ValueErrors, and silences its warning about sizes, which `_check_size` judges."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            yield
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name} is too large, at most {max_pixels} pixels are allowed: {error}") from error
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
    if dtype.removeprefix("torch.") == "bool":
        array = array.astype(np.uint8) * 255 if isinstance(array, np.ndarray) else array.to(torch.uint8) * 255
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


def _check_size(height: int, width: int, name: str, max_pixels: int = MAX_PIXELS) -> None:
    if height == 0 or width == 0:
        raise ValueError(f"{name} is empty: {height}×{width} pixels (height × width)")
    if height * width > max_pixels:
        raise ValueError(f"{name} is too large, at most {max_pixels} pixels are allowed: {height}×{width}")
