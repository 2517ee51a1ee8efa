# SPDX-License-Identifier: Apache-2.0
"""Any photo in, exact size out: what is read is what the file shows, and what cannot be read is refused in words."""

from __future__ import annotations

import importlib.util
import io
import os
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageCms

from dreammover_pipeline.framing import fit, fit_points, fit_to_output, plan_canvas, unfit, unfit_points
from dreammover_pipeline.images import MAX_PIXELS, decode_images, is_batch, load_images, load_masks, load_shrunk, rgb
from dreammover_pipeline.records import Canvas


def shrunk(picture, side, kind="PNG", most=10**6, formats=None):
    """What `load_shrunk` makes of a picture's file."""
    file = io.BytesIO()
    picture.save(file, kind)
    file.seek(0)
    return load_shrunk(file, "img0", side, most, formats)


@pytest.fixture
def photo():
    """Random 8-bit RGB, (5, 7, 3), in which no flip or rotation goes unnoticed."""
    return np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)


def load(source):
    (image,) = load_images(source, "img0")
    assert image.dtype == torch.float32
    assert image.is_contiguous()
    assert image.shape[0] == 3
    assert 0 <= image.min() <= image.max() <= 1
    return image


def to_8_bit(image):
    """(3, H, W) in [0, 1] to an array (H, W, 3)."""
    return (image * 255).round().to(torch.uint8).movedim(0, -1).numpy()


def on_white(rgba):
    """An 8-bit array (..., 4) composited on white, (3, ...) in float64."""
    values = rgba.astype(np.float64) / 255
    return torch.from_numpy(values[..., :3] * values[..., 3:] + 1 - values[..., 3:]).movedim(-1, 0)


def png(width, height, depth, colour_type, rows, transparency=b""):
    """PNG bytes written by hand, for what Pillow reads but cannot write."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0))
    transparent = chunk(b"tRNS", transparency) if transparency else b""
    data = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
    return b"\x89PNG\r\n\x1a\n" + header + transparent + data + chunk(b"IEND", b"")


def canvas_of(height, width, content=None, output=None):
    return Canvas(height, width, *(content or (height, width)), *(output or content or (height, width)))


class TestOneImage:
    @pytest.mark.parametrize(
        "convert",
        [
            lambda a, folder: a,
            lambda a, folder: np.asfortranarray(a),
            lambda a, folder: np.ascontiguousarray(a[::-1, ::-1])[::-1, ::-1],
            lambda a, folder: torch.from_numpy(a).movedim(-1, 0),
            lambda a, folder: Image.fromarray(a),
            lambda a, folder: save(Image.fromarray(a), folder / "a.png"),
            lambda a, folder: str(save(Image.fromarray(a), folder / "a.bmp")),
            lambda a, folder: save(Image.fromarray(a), folder / "a.tiff"),
            lambda a, folder: save(Image.fromarray(a), folder / "a.webp", lossless=True),
        ],
        ids=["numpy", "fortran", "negative-strides", "torch", "pil", "png-path", "bmp-str", "tiff", "webp"],
    )
    def test_8_bit_rgb_round_trips_exactly(self, photo, tmp_path, convert):
        assert np.array_equal(to_8_bit(load(convert(photo, tmp_path))), photo)

    def test_every_8_bit_value_round_trips_exactly(self):
        values = np.arange(256, dtype=np.uint8).reshape(16, 16)
        assert np.array_equal(to_8_bit(load(values))[..., 0], values)

    @pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f4"])
    def test_floats_are_taken_as_they_are(self, photo, dtype):
        values = (photo / 255).astype(dtype)
        assert torch.equal(load(values).movedim(0, -1), torch.from_numpy(values.astype(np.float32)))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    def test_torch_floats_are_taken_as_they_are(self, dtype):
        values = torch.rand(3, 4, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
        assert torch.equal(load(values), values.float())

    @pytest.mark.parametrize("shape", [(4, 6), (4, 6, 1)])
    def test_grey_numpy_becomes_rgb(self, shape):
        grey = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
        assert np.array_equal(to_8_bit(load(grey)), np.repeat(grey.reshape(4, 6, 1), 3, axis=2))

    @pytest.mark.parametrize("shape", [(4, 6), (1, 4, 6)])
    def test_grey_torch_becomes_rgb(self, shape):
        grey = torch.rand(shape, generator=torch.Generator().manual_seed(0))
        assert torch.equal(load(grey), grey.reshape(1, 4, 6).expand(3, -1, -1))

    def test_the_result_shares_no_memory_with_the_source(self):
        for source in (torch.full((3, 4, 4), 0.5), np.full((4, 4), 0.5, np.float32)):
            load(source).zero_()
            assert source.min() == 0.5

    def test_a_decoded_image_shares_no_memory_with_the_source(self):
        for source in (torch.full((3, 4, 4), 5, dtype=torch.uint8), np.full((4, 4), 5, np.uint8)):
            (values,) = decode_images(source, "img0")
            values.zero_()
            assert source.min() == 5

    def test_colours_of_a_decoded_image_are_in_memory_of_their_own(self):
        for values in (torch.full((3, 4, 4), 0.5), torch.full((4, 4, 3), 0.5).movedim(-1, 0)):
            rgb(values).zero_()
            assert values.min() == 0.5

    def test_a_tensor_that_requires_grad_is_detached(self):
        assert not load(torch.full((3, 4, 4), 0.5, requires_grad=True)).requires_grad

    def test_a_read_only_array_gives_no_warning(self, photo):
        photo.setflags(write=False)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            load(photo)

    def test_a_file_is_closed_and_only_its_first_frame_is_read(self, tmp_path):
        frames = [Image.new("RGB", (4, 3), colour) for colour in ("red", "blue")]
        path = save(frames[0], tmp_path / "a.gif", save_all=True, append_images=frames[1:])
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", ResourceWarning)
            assert np.array_equal(to_8_bit(load(path))[0, 0], [255, 0, 0])
        assert not caught


def save(image, path, **options):
    image.save(path, **options)
    return path


class TestPilModes:
    @pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "HSV", "RGBX"])
    def test_opaque_modes_look_as_pillow_shows_them(self, photo, mode):
        image = Image.fromarray(photo).convert(mode)
        assert np.array_equal(to_8_bit(load(image)), np.asarray(image.convert("RGB")))

    @pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "RGBa"])
    def test_alpha_is_composited_on_white(self, mode):
        rgba = np.random.default_rng(0).integers(0, 256, (4, 6, 4), dtype=np.uint8)
        image = Image.fromarray(rgba)
        image = image.convert("LA").convert(mode) if mode == "PA" else image.convert(mode)
        expected = on_white(np.asarray(image.convert("RGBA")))
        torch.testing.assert_close(load(image), expected.float(), rtol=0, atol=1e-6)

    @pytest.mark.parametrize("kind", ["numpy", "torch", "pil", "path"])
    def test_rgba_is_composited_on_white_wherever_it_comes_from(self, tmp_path, kind):
        rgba = np.random.default_rng(0).integers(0, 256, (4, 6, 4), dtype=np.uint8)
        rgba[0, :, 3], rgba[1, :, 3] = 0, 255
        source = {
            "numpy": lambda: rgba,
            "torch": lambda: torch.from_numpy(rgba).movedim(-1, 0),
            "pil": lambda: Image.fromarray(rgba),
            "path": lambda: save(Image.fromarray(rgba), tmp_path / "a.png"),
        }[kind]()
        image = load(source)
        torch.testing.assert_close(image, on_white(rgba).float(), rtol=0, atol=1e-6)
        assert (image[:, 0] == 1).all()
        assert np.array_equal(to_8_bit(image)[1], rgba[1, :, :3])

    def test_a_transparent_palette_entry_is_white(self, tmp_path):
        palette = Image.new("P", (2, 1))
        palette.putpalette([200, 0, 0, 0, 100, 0])
        palette.putpixel((1, 0), 1)
        path = save(palette, tmp_path / "a.png", transparency=0)
        assert to_8_bit(load(path)).tolist() == [[[255, 255, 255], [0, 100, 0]]]

    def test_a_palette_with_graded_alpha_is_composited(self, tmp_path):
        palette = Image.new("P", (2, 1))
        palette.putpalette([200, 0, 0, 0, 100, 0])
        palette.putpixel((1, 0), 1)
        path = save(palette, tmp_path / "a.png", transparency=bytes([51, 255]))
        assert to_8_bit(load(path)).tolist() == [[[244, 204, 204], [0, 100, 0]]]

    def test_a_transparent_colour_of_an_rgb_png_is_white(self, tmp_path):
        image = Image.fromarray(np.array([[[9, 8, 7], [6, 5, 4]]], dtype=np.uint8))
        path = save(image, tmp_path / "a.png", transparency=(9, 8, 7))
        assert to_8_bit(load(path)).tolist() == [[[255, 255, 255], [6, 5, 4]]]

    def test_a_pil_image_is_left_as_it_was(self, photo):
        exif = Image.Exif()
        exif[274] = 6
        buffer = io.BytesIO()
        Image.fromarray(photo).convert("P").save(buffer, "PNG", exif=exif, transparency=0)
        image = Image.open(buffer)
        image.load()
        before = image.mode, image.size, image.tobytes(), image.getexif()[274], dict(image.info)
        load(image)
        assert (image.mode, image.size, image.tobytes(), image.getexif()[274], dict(image.info)) == before

    @pytest.mark.parametrize("mode", ["F", "LAB", "La"])
    def test_other_modes_are_refused(self, mode):
        with pytest.raises(ValueError, match=rf"^img0 has PIL mode {mode}; allowed are .*RGB.*I;16"):
            load_images(Image.new(mode, (4, 4)), "img0")


class Test16Bit:
    @pytest.fixture
    def grey(self):
        return np.random.default_rng(0).integers(0, 65536, (5, 7), dtype=np.uint16)

    def test_precision_is_kept_from_arrays(self, grey):
        expected = torch.from_numpy(grey.astype(np.float64) / 65535).expand(3, -1, -1)
        for source in (grey, grey.astype(">u2"), torch.from_numpy(grey), Image.fromarray(grey)):
            torch.testing.assert_close(load(source).double(), expected, rtol=0, atol=1e-7)

    @pytest.mark.parametrize("suffix", ["png", "tiff"])
    def test_precision_is_kept_from_files(self, grey, tmp_path, suffix):
        image = load(save(Image.fromarray(grey), tmp_path / f"a.{suffix}"))
        assert np.array_equal((image[0] * 65535).round().numpy().astype(np.uint16), grey)

    @pytest.mark.parametrize("mode", ["I;16", "I;16L", "I;16B", "I;16N", "I"])
    def test_every_16_bit_mode(self, mode):
        image = Image.new(mode, (2, 1))
        image.putpixel((0, 0), 258)
        image.putpixel((1, 0), 65535)
        torch.testing.assert_close(load(image)[0, 0], torch.tensor([258 / 65535, 1.0]), rtol=0, atol=1e-7)

    def test_colour_keeps_its_precision_too(self):
        colour = np.random.default_rng(0).integers(0, 65536, (4, 5, 3), dtype=np.uint16)
        expected = torch.from_numpy(colour.astype(np.float64) / 65535).movedim(-1, 0)
        torch.testing.assert_close(load(colour).double(), expected, rtol=0, atol=1e-7)

    def test_a_transparent_grey_of_a_16_bit_png_is_white(self, tmp_path):
        path = tmp_path / "a.png"
        path.write_bytes(png(2, 1, 16, 0, [struct.pack(">HH", 1000, 1001)], struct.pack(">H", 1000)))
        torch.testing.assert_close(load(path)[0, 0], torch.tensor([1.0, 1001 / 65535]), rtol=0, atol=1e-7)

    @pytest.mark.parametrize("value", [-1, 65536])
    def test_integers_that_are_not_16_bit_are_refused(self, value):
        with pytest.raises(ValueError, match=rf"^img0 has values from .*{value}.*0 to 65535"):
            load_images(Image.fromarray(np.array([[0, value]], dtype=np.int32)), "img0")


# What undoes each EXIF orientation, on arrays: the tag says how the camera was held.
UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}


class TestExif:
    @pytest.mark.parametrize("orientation", UPRIGHT)
    @pytest.mark.parametrize("suffix", ["png", "tiff", "webp"])
    def test_a_file_is_turned_upright(self, photo, tmp_path, suffix, orientation):
        exif = Image.Exif()
        exif[274] = orientation
        path = save(Image.fromarray(photo), tmp_path / f"a.{suffix}", exif=exif, lossless=True)
        assert np.array_equal(to_8_bit(load(path)), UPRIGHT[orientation](photo))
        with Image.open(path) as image:
            assert np.array_equal(to_8_bit(load(image)), UPRIGHT[orientation](photo))

    def test_16_bit_files_too(self, tmp_path):
        grey = np.random.default_rng(0).integers(0, 65536, (5, 7), dtype=np.uint16)
        exif = Image.Exif()
        exif[274] = 6
        image = load(save(Image.fromarray(grey), tmp_path / "a.png", exif=exif))
        assert np.array_equal((image[0] * 65535).round().numpy().astype(np.uint16), np.rot90(grey, -1))

    def test_a_jpeg_as_phones_write_it(self, tmp_path):
        exif = Image.Exif()
        exif[274] = 6
        sky_left = np.zeros((16, 32, 3), np.uint8)
        sky_left[:, :16] = 255
        image = load(save(Image.fromarray(sky_left), tmp_path / "a.jpg", exif=exif, quality=95))
        assert image.shape == (3, 32, 16)
        assert image[:, :14].min() > 0.9  # what was left is up once the picture is turned clockwise
        assert image[:, 18:].max() < 0.1


class TestBatches:
    @pytest.mark.parametrize(
        ("source", "batch"),
        [
            ([], True),
            ((), True),
            (["a.png"], True),
            (np.zeros((1, 4, 4, 3)), True),
            (torch.zeros(2, 3, 4, 4), True),
            ("a.png", False),
            (Path("a.png"), False),
            (Image.new("RGB", (1, 1)), False),
            (np.zeros((4, 4, 3)), False),
            (torch.zeros(3, 4, 4), False),
            (torch.zeros(4, 4), False),
            (None, False),
        ],
    )
    def test_is_batch(self, source, batch):
        assert is_batch(source) is batch

    def test_a_mixed_list_keeps_order_and_sizes(self, photo, tmp_path):
        sources = [photo, torch.zeros(3, 2, 9), save(Image.new("RGB", (4, 6)), tmp_path / "a.png")]
        images = load_images(sources, "img0")
        assert [tuple(image.shape) for image in images] == [(3, 5, 7), (3, 2, 9), (3, 6, 4)]
        assert np.array_equal(to_8_bit(images[0]), photo)
        assert len(load_images(tuple(sources), "img0")) == 3

    def test_stacked_arrays(self, photo):
        stack = np.stack([photo, photo[::-1]])
        for source in (stack, torch.from_numpy(stack).movedim(-1, 1)):
            images = load_images(source, "img0")
            assert np.array_equal(np.stack([to_8_bit(image) for image in images]), stack)

    @pytest.mark.parametrize("source", [[], (), np.zeros((0, 4, 4, 3)), torch.zeros(0, 3, 4, 4)])
    def test_an_empty_batch_is_refused(self, source):
        with pytest.raises(ValueError, match=r"^img1 is an empty batch"):
            load_images(source, "img1")

    def test_errors_name_the_item(self, photo):
        with pytest.raises(TypeError, match=r"^img0\[2\] is a NoneType; allowed are paths, PIL images"):
            load_images([photo, photo, None], "img0")
        with pytest.raises(TypeError, match=r"^img0\[0\] is a list"):
            load_images([[photo]], "img0")
        with pytest.raises(ValueError, match=r"^img1\[1\] has values from 0 to 2"):
            load_images(torch.stack([torch.zeros(3, 4, 4), torch.full((3, 4, 4), 2.0).triu()]), "img1")
        with pytest.raises(ValueError, match=r"^img0\[0\] has shape \(1, 3, 4, 4\); one Tensor image is"):
            load_images([torch.zeros(1, 3, 4, 4)], "img0")


class TestBadArrays:
    @pytest.mark.parametrize("source", [None, 3, 0.5, {"a": 1}, b"a.png", object(), {1}, iter([])])
    def test_wrong_types(self, source):
        with pytest.raises(TypeError, match=rf"^img0 is a {type(source).__name__}; allowed are paths, PIL images"):
            load_images(source, "img0")

    @pytest.mark.parametrize("shape", [(), (5,), (4, 4, 2), (4, 4, 5), (3, 4, 4, 4, 3), (3, 8, 8), (4, 4, 0)])
    def test_wrong_numpy_shapes(self, shape):
        with pytest.raises(ValueError, match=r"^img0 has shape \(.*\); one ndarray image is \(H, W\) or \(H, W, C\)"):
            load_images(np.zeros(shape, np.float32), "img0")

    @pytest.mark.parametrize("shape", [(), (5,), (2, 4, 4), (5, 4, 4), (1, 2, 3, 4, 4), (8, 8, 3), (0, 4, 4)])
    def test_wrong_torch_shapes(self, shape):
        with pytest.raises(ValueError, match=r"^img0 has shape \(.*\); one Tensor image is \(H, W\) or \(C, H, W\)"):
            load_images(torch.zeros(shape), "img0")

    @pytest.mark.parametrize("dtype", [np.int8, np.int16, np.int32, np.int64, np.uint32, complex, object, "U1"])
    def test_wrong_numpy_dtypes(self, dtype):
        with pytest.raises(
            TypeError, match=r"^img0 has dtype \w+; allowed are bool, uint8, uint16, .* floats in \[0, 1\]"
        ):
            load_images(np.zeros((4, 4, 3), dtype), "img0")

    @pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.int64, torch.complex64])
    def test_wrong_torch_dtypes(self, dtype):
        with pytest.raises(TypeError, match=rf"^img0 has dtype {dtype}; allowed are bool, uint8, uint16"):
            load_images(torch.zeros(3, 4, 4, dtype=dtype), "img0")

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
    def test_nan_and_infinity(self, value):
        array = np.zeros((4, 4, 3))
        array[1, 2, 0] = value
        for source in (array, torch.from_numpy(array).movedim(-1, 0)):
            with pytest.raises(ValueError, match=r"^img0 has values from .*; floats must be finite and in \[0, 1\]"):
                load_images(source, "img0")

    @pytest.mark.parametrize(
        ("low", "high", "shown"),
        [(-1, 1, "-1 to 1"), (0, 255, "0 to 255"), (0, 1.01, "0 to 1.01"), (-0.25, 0.5, "-0.25 to 0.5")],
    )
    def test_floats_out_of_range_show_the_range(self, low, high, shown):
        values = torch.linspace(low, high, 12, dtype=torch.float64).reshape(1, 3, 4).expand(3, -1, -1)
        for source in (values, values.float(), values.movedim(0, -1).numpy()):
            with pytest.raises(ValueError, match=rf"^img0 has values from {shown}; floats must be .* in \[0, 1\]"):
                load_images(source, "img0")

    def test_alpha_out_of_range(self):
        rgba = np.ones((4, 4, 4), np.float32)
        rgba[..., 3] = 255
        with pytest.raises(ValueError, match=r"^img0 has values from 1 to 255"):
            load_images(rgba, "img0")

    @pytest.mark.parametrize("source", [np.zeros((0, 4, 3)), np.zeros((4, 0)), torch.zeros(3, 0, 4)])
    def test_zero_size(self, source):
        with pytest.raises(ValueError, match=r"^img0 is empty: \d×\d pixels"):
            load_images(source, "img0")

    @pytest.mark.parametrize("size", [(0, 5), (5, 0)])
    def test_zero_size_pil(self, size):
        with pytest.raises(ValueError, match=rf"^img0 is empty: {size[1]}×{size[0]} pixels \(height × width\)"):
            load_images(Image.new("RGB", size), "img0")

    def test_absurdly_large_arrays(self):
        side = 10**6  # 10¹² pixels that share one value's memory: reading them would fail otherwise
        for source in (np.broadcast_to(np.uint8(0), (side, side)), torch.zeros(1, 1, 1).expand(3, side, side)):
            with pytest.raises(
                ValueError, match=rf"^img0 is too large, at most {MAX_PIXELS} pixels .*1000000×1000000"
            ):
                load_images(source, "img0")


class TestMasks:
    def test_a_mask_of_another_size_is_refused_in_words(self):
        with pytest.raises(ValueError, match=r"^`mask` has 7×5 pixels \(width × height\), but img1 has 8×6; a mask"):
            load_masks([torch.zeros(4, 9), torch.zeros(5, 7)], [(4, 9), (6, 8)])


class TestBadFiles:
    def test_missing(self, tmp_path):
        for source in (tmp_path / "none.png", str(tmp_path / "none.png"), "none\0.png", "n" * 5000, "http://a/b.png"):
            with pytest.raises(ValueError, match=r"^img0 \(.*\) is no existing file; an image file is needed"):
                load_images(source, "img0")

    def test_folder(self, tmp_path):
        with pytest.raises(ValueError, match=r"^img1 \(.*\) is a folder; an image file is needed"):
            load_images(tmp_path, "img1")

    def test_device(self):
        with pytest.raises(ValueError, match=r"^img1 \(.*\) is a pipe, a socket or a device; an image file is needed"):
            load_images(os.devnull, "img1")

    @pytest.mark.parametrize("content", [b"", b"hello", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0" + bytes(50)])
    def test_no_image(self, tmp_path, content):
        path = tmp_path / "a.png"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"^img0 \(.*a\.png\) cannot be read as an image") as caught:
            load_images(path, "img0")
        assert caught.value.__cause__ is not None

    @pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "bmp", "tiff", "webp", "ppm", "tga"])
    @pytest.mark.parametrize("kept", [0.1, 0.5, 0.9])
    def test_truncated(self, tmp_path, suffix, kept):
        noise = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
        path = save(Image.fromarray(noise), tmp_path / f"a.{suffix}")
        data = path.read_bytes()
        path.write_bytes(data[: int(len(data) * kept)])
        with pytest.raises(ValueError, match=r"^img0\[1\] \(.*\) cannot be read as an image") as caught:
            load_images([noise, path], "img0")
        assert caught.value.__cause__ is not None

    @pytest.mark.filterwarnings("ignore::UserWarning")  # of Pillow's, on what it skips
    def test_corrupted_bytes_give_an_image_or_a_value_error(self, photo, tmp_path, monkeypatch):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)  # no time for what a damaged header promises
        rng = np.random.default_rng(0)
        exif = Image.Exif()
        exif[274] = 6
        for suffix in ("png", "jpg", "gif", "tiff", "webp"):
            path = save(Image.fromarray(photo), tmp_path / f"a.{suffix}", exif=exif)
            data = np.frombuffer(path.read_bytes(), np.uint8)
            for _ in range(40):
                damaged = data.copy()
                damaged[rng.integers(0, len(data), 4)] = rng.integers(0, 256, 4)
                path.write_bytes(damaged.tobytes())
                try:
                    load(path)
                except ValueError as error:
                    assert str(error).startswith("img0 (")  # noqa: PT017 -- either outcome is right

    def test_a_closed_pil_image(self, photo, tmp_path):
        with Image.open(save(Image.fromarray(photo), tmp_path / "a.png")) as image:
            pass
        with pytest.raises(ValueError, match=r"^img0 cannot be read as an image"):
            load_images(image, "img0")

    @pytest.mark.parametrize("side", [11_600, 30_000])
    def test_decompression_bombs_are_refused_from_the_header(self, tmp_path, side):
        # 11600² is more than MAX_PIXELS but Pillow only warns; 30000² Pillow refuses itself. Neither holds any pixels.
        path = tmp_path / "bomb.png"
        path.write_bytes(png(side, side, 8, 2, []))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(
                ValueError, match=rf"^img0 \(.*\) is too large, at most {MAX_PIXELS} pixels are allowed"
            ):
                load_images(path, "img0")

    def test_a_large_photo_gives_no_warning_of_pillows(self, tmp_path, monkeypatch):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # stands for 89 million, to keep the test small
        path = save(Image.new("RGB", (12, 12)), tmp_path / "a.png")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            load(path)

    def test_pillows_own_limit_is_honoured_in_our_words(self, tmp_path, monkeypatch):
        path = save(Image.new("RGB", (40, 40)), tmp_path / "a.png")
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
        with pytest.raises(ValueError, match=r"^img0 \(.*\) is too large, .*1600 pixels") as caught:
            load_images(path, "img0")
        assert isinstance(caught.value.__cause__, Image.DecompressionBombError)


class TestPlanCanvas:
    def test_a_native_square_needs_nothing(self):
        assert plan_canvas((512, 512), 512, 8, 64) == canvas_of(512, 512)

    @pytest.mark.parametrize("multiple", [8, 16, 64])
    @pytest.mark.parametrize("native", [96, 512, 768])
    @pytest.mark.parametrize(
        "size", [(3024, 4032), (4032, 3024), (1, 1), (7, 5), (1080, 1920), (333, 1000), (600, 601)]
    )
    def test_native_area_at_the_first_aspect_ratio(self, size, native, multiple):
        canvas = plan_canvas(size, native, multiple, 8)
        height, width = canvas.content_height, canvas.content_width
        assert (canvas.output_height, canvas.output_width) == size
        assert abs(height * width / native**2 - 1) < 0.02
        # of the side that follows, less than a pixel is lost or gained
        assert min(abs(width - height * size[1] / size[0]), abs(height - width * size[0] / size[1])) <= 0.5
        assert 0 <= canvas.height - height < multiple
        assert 0 <= canvas.width - width < multiple
        assert canvas.height % multiple == canvas.width % multiple == 0

    def test_size_asked_for(self):
        assert plan_canvas((3024, 4032), 512, 8, 64, 300, 500) == canvas_of(304, 504, (300, 500))

    @pytest.mark.parametrize(
        ("asked", "expected"),
        [({"height": 300}, (300, 400)), ({"width": 300}, (225, 300)), ({"width": 333}, (250, 333))],
    )
    def test_the_missing_side_follows_from_the_aspect_ratio(self, asked, expected):
        canvas = plan_canvas((3024, 4032), 512, 8, 64, **asked)
        assert (canvas.content_height, canvas.content_width) == expected
        assert (canvas.output_height, canvas.output_width) == expected

    @pytest.mark.parametrize("name", ["height", "width"])
    @pytest.mark.parametrize("value", [0, -8, MAX_PIXELS + 1, 10**400])
    def test_sides_that_cannot_be(self, name, value):
        with pytest.raises(ValueError, match=f"^`{name}` must be at .* not {value}$"):
            plan_canvas((64, 64), 64, 8, 8, **{name: value})

    @pytest.mark.parametrize("name", ["height", "width"])
    @pytest.mark.parametrize("value", [512.0, "512", True, [512]])
    def test_sides_that_are_no_ints(self, name, value):
        with pytest.raises(TypeError, match=rf"^`{name}` must be an integer, not .* of type {type(value).__name__}$"):
            plan_canvas((64, 64), 64, 8, 8, **{name: value})

    @pytest.mark.parametrize("size", [(10_000, 10), (10, 10_000), (MAX_PIXELS, 1), (1, MAX_PIXELS)])
    def test_strips_are_refused(self, size):
        came = f"first image of {size[0]}×{size[1]} pixels"
        with pytest.raises(ValueError, match=f"{came} .* working size of .* at least 64 pixels; .* up to about 64:1"):
            plan_canvas(size, 512, 8, 64)

    def test_a_strip_has_a_way_out(self):
        assert plan_canvas((10_000, 10), 512, 8, 64, 512, 512) == canvas_of(512, 512)

    @pytest.mark.parametrize("asked", [{"height": 32}, {"width": 32}, {"height": 56, "width": 512}])
    def test_sizes_too_small_for_the_models(self, asked):
        shown = ", ".join(f"{name}={asked.get(name)}" for name in ("height", "width"))
        with pytest.raises(ValueError, match=f"^{shown} .* each side must have at least 64 pixels"):
            plan_canvas((600, 400), 512, 8, 64, **asked)

    def test_a_strip_is_never_thinner_than_a_pixel(self):
        assert plan_canvas((1, 2_000_000), 512, 8, 8).content_height == 1
        assert plan_canvas((10, 1000), 64, 8, 8, width=20) == canvas_of(8, 24, (1, 20))
        assert plan_canvas((1000, 10), 64, 8, 8, height=20) == canvas_of(24, 8, (20, 1))

    def test_what_padding_makes_large_enough_is_large_enough(self):
        assert plan_canvas((600, 400), 512, 8, 64, 64, 64) == canvas_of(64, 64)
        assert plan_canvas((600, 400), 512, 8, 64, 57, 100) == canvas_of(64, 104, (57, 100))

    def test_a_square_is_always_allowed_in_words(self):
        with pytest.raises(ValueError, match=r"aspect ratios up to about 1:1 have that$"):
            plan_canvas((64, 64), 32, 8, 64)

    def test_as_many_pixels_as_may_be(self):
        assert plan_canvas((64, 64), 64, 1, 1, MAX_PIXELS, 1) == canvas_of(MAX_PIXELS, 1)

    @pytest.mark.parametrize("asked", [{"height": 20_000}, {"width": 20_000}, {"height": 20_000, "width": 20_000}])
    def test_absurd_sizes(self, asked):
        with pytest.raises(ValueError, match=rf"working size of 20000×20000, but at most {MAX_PIXELS} pixels"):
            plan_canvas((512, 512), 512, 8, 64, **asked)


def ramps(height, width):
    """(3, H, W) whose first two channels are the x and y of each pixel's centre, in pixels, scaled into [0, 1]."""
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    return torch.stack([x, y, torch.zeros_like(x)]) / max(height, width)


def smooth(height, width):
    """(3, H, W) of low frequencies, the same picture at every size."""
    y, x = torch.meshgrid((torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width, indexing="ij")
    return torch.stack([0.5 + 0.4 * torch.sin(3 * x + 2 * y), 0.5 + 0.4 * torch.cos(4 * y - x), 0.2 + 0.5 * x * y])


SIZES = [(64, 64), (480, 640), (640, 480), (33, 47), (1, 1), (3, 200), (200, 3), (97, 301), (512, 511)]
CANVASES = [
    canvas_of(64, 64),
    canvas_of(64, 88, (60, 85), (480, 680)),
    canvas_of(104, 56, (97, 55), (31, 17)),
    canvas_of(96, 96, (95, 96), (333, 335)),
]


class TestFit:
    @pytest.mark.parametrize("canvas", CANVASES)
    @pytest.mark.parametrize("size", SIZES)
    def test_shapes_ranges_and_padding_for_any_pair_of_sizes(self, size, canvas):
        image = torch.rand(3, *size, generator=torch.Generator().manual_seed(0)).round()  # hard edges overshoot most
        fitted = fit(image, canvas)
        assert fitted.shape == (3, canvas.height, canvas.width)
        assert 0 <= fitted.min() <= fitted.max() <= 1
        height, width = canvas.content_height, canvas.content_width
        assert torch.equal(fitted[:, height:], fitted[:, height - 1 : height].expand(-1, canvas.height - height, -1))
        assert torch.equal(fitted[:, :, width:], fitted[:, :, width - 1 : width].expand(-1, -1, canvas.width - width))
        end = fit_to_output(image, canvas)
        assert end.shape == (3, canvas.output_height, canvas.output_width)
        assert 0 <= end.min() <= end.max() <= 1

    def test_pixels_are_exact_without_scaling(self):
        image = torch.rand(3, 60, 85, generator=torch.Generator().manual_seed(0))
        canvas = canvas_of(64, 88, (60, 85))
        assert torch.equal(fit(image, canvas)[:, :60, :85], image)
        assert torch.equal(fit_to_output(image, canvas), image)
        assert torch.equal(unfit(fit(image, canvas)[None], canvas)[0], image)

    def test_an_end_in_8_bit_colours_is_the_photo_itself_and_any_other_is_in_float32(self):
        generator = torch.Generator().manual_seed(0)
        photo, canvas = torch.randint(0, 256, (4, 60, 85), dtype=torch.uint8, generator=generator), canvas_of(60, 85)
        colours = photo[:3]
        assert fit_to_output(colours, canvas) is colours
        for other in (photo, photo[:1], colours.to(torch.uint16), (colours / 255).half(), colours / 255):
            end = fit_to_output(other, canvas)
            assert (end.shape, end.dtype) == ((3, 60, 85), torch.float32)
            assert torch.equal(end, rgb(other))

    @pytest.mark.parametrize(("size", "top", "left"), [((60, 95), 0, 5), ((60, 96), 0, 5), ((71, 85), 5, 0)])
    def test_pixels_are_exact_when_only_cropped(self, size, top, left):
        image = torch.rand(3, *size, generator=torch.Generator().manual_seed(0))
        cropped = fit(image, canvas_of(64, 88, (60, 85)))[:, :60, :85]
        assert torch.equal(cropped, image[:, top : top + 60, left : left + 85])

    def test_the_ends_are_pixel_exact_at_the_first_images_own_size(self):
        image = torch.rand(3, 123, 77, generator=torch.Generator().manual_seed(0))
        assert torch.equal(fit_to_output(image, plan_canvas((123, 77), 64, 8, 8)), image)

    @pytest.mark.parametrize("size", [(480, 640), (640, 480), (100, 100), (101, 300), (300, 101), (40, 41)])
    @pytest.mark.parametrize("canvas", CANVASES)
    def test_scaling_is_equal_in_x_and_y_and_centred(self, size, canvas):
        height, width = canvas.content_height, canvas.content_width
        coordinates = fit(ramps(*size), canvas)[:2, :height, :width] * max(size)
        across, down = coordinates[0, height // 2], coordinates[1, :, width // 2]
        scale = min(size[0] / height, size[1] / width)  # source pixels per canvas pixel
        inner = slice(4, -4)  # the bicubic kernel leans inwards at the very edge
        for line, length, source in ((across, width, size[1]), (down, height, size[0])):
            steps = line[inner].diff()
            torch.testing.assert_close(steps, torch.full_like(steps, scale), rtol=0.05, atol=0)
            # Both ends of the resize are whole pixels: half a pixel of the length is all that may be off.
            assert steps.mean().item() == pytest.approx(scale, rel=0.6 / length)
            middle = (line[inner][0] + line[inner][-1]) / 2
            assert abs(middle - source / 2) <= 0.51 * max(scale, 1)

    @pytest.mark.parametrize("size", [(240, 400), (400, 240), (300, 300)])
    def test_a_circle_stays_a_circle(self, size):
        y, x = torch.meshgrid(torch.arange(size[0]) + 0.5, torch.arange(size[1]) + 0.5, indexing="ij")
        disc = (torch.hypot(x - size[1] / 2, y - size[0] / 2) < 60).float().expand(3, -1, -1)
        canvas = canvas_of(160, 200, (158, 199))
        spread = [(fit(disc, canvas)[0] > 0.5).any(axis).sum().item() for axis in (0, 1)]
        expected = 120 * max(158 / size[0], 199 / size[1])
        assert spread == pytest.approx([expected, expected], abs=2)

    @pytest.mark.parametrize("size", [(480, 640), (640, 480), (123, 300), (97, 61), (1000, 1414)])
    def test_the_first_image_loses_at_most_a_rounding_pixel(self, size):
        canvas = plan_canvas(size, 96, 8, 8)
        coordinates = fit(ramps(*size), canvas)[:2] * max(size)
        corner = coordinates[:, canvas.content_height - 1, canvas.content_width - 1]
        pixel = size[0] / canvas.content_height  # of the canvas, in source pixels
        assert coordinates[:, 0, 0].max() < 1.6 * max(pixel, 1)
        assert size[1] - corner[0] < 1.6 * max(pixel, 1)
        assert size[0] - corner[1] < 1.6 * max(pixel, 1)

    @pytest.mark.parametrize("upright", [False, True])
    def test_a_long_strip_is_not_blown_up_to_its_whole_length(self, upright):
        strip = torch.zeros(3, 2, 2_000_000)  # would be 512 million pixels long at this scale
        strip[:, :, 999_999:1_000_001] = 1
        fitted = fit(strip.mT if upright else strip, canvas_of(512, 512))
        assert fitted.shape == (3, 512, 512)
        torch.testing.assert_close(fitted, torch.ones(3, 512, 512))

    def test_downscaling_does_not_alias(self):
        stripes = (torch.arange(512) % 2).float().expand(3, 512, 512)
        assert (fit(stripes, canvas_of(64, 64)) - 0.5).abs().max() < 0.05


class TestPoints:
    @pytest.mark.parametrize("size", [(480, 640), (60, 85), (101, 300), (300, 101), (40, 41), (20, 900)])
    @pytest.mark.parametrize("canvas", CANVASES)
    def test_points_go_where_fit_puts_the_pixels(self, size, canvas):
        height, width = canvas.content_height, canvas.content_width
        shown = fit(ramps(*size), canvas)[:2, :height, :width] * max(size) - 0.5  # where each pixel is from
        y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        inner = slice(8, -8), slice(8, -8)  # the bicubic kernel leans inwards at the very edge
        places, expected = (part[:, *inner].flatten(1).T for part in (shown, torch.stack([x, y]).float()))
        torch.testing.assert_close(fit_points(places, size, canvas), expected, rtol=0, atol=0.05)

    def test_a_small_picture_is_enlarged_alike_in_x_and_y(self):
        corners = torch.tensor([[0.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
        for size, content in (((12, 1), (520, 50)), ((1, 12), (50, 520))):
            there = fit_points(corners, size, canvas_of(*content))
            torch.testing.assert_close(there[1] - there[0], torch.full((2,), 50.0, dtype=torch.float64))

    @pytest.mark.parametrize(("full", "side"), [(11, 49), (11, 98), (11, 109)])
    def test_nothing_is_cropped_where_the_scale_is_rounded(self, full, side):
        assert side / (side / full) > full  # as floats divide
        image = torch.rand(3, full, full, generator=torch.Generator().manual_seed(0))
        expected = F.interpolate(image[None], (side, side), mode="bicubic", antialias=True)[0].clamp(0, 1)
        assert torch.equal(fit(image, canvas_of(side, side)), expected)

    @pytest.mark.parametrize("size", [(480, 640), (101, 300), (300, 101), (3, 2000)])
    @pytest.mark.parametrize("canvas", CANVASES)
    def test_unfit_points_undo_fit_points(self, size, canvas):
        generator = torch.Generator().manual_seed(0)
        points = 2000 * torch.rand(50, 2, dtype=torch.float64, generator=generator) - 500
        for there, back in ((fit_points, unfit_points), (unfit_points, fit_points)):
            torch.testing.assert_close(back(there(points, size, canvas), size, canvas), points, rtol=0, atol=1e-8)


class TestUnfit:
    @pytest.mark.parametrize("size", [(480, 640), (301, 97), (33, 47), (64, 64), (5, 3)])
    def test_fitting_and_back_shows_the_same_smooth_picture(self, size):
        image = smooth(*size)
        canvas = plan_canvas(size, 96, 8, 8)
        back = unfit(fit(image, canvas)[None], canvas)
        assert back.shape == (1, 3, *size)
        # Without canvas: plain resizes to the content's size and back.
        content = (canvas.content_height, canvas.content_width)
        there = F.interpolate(image[None], content, mode="bicubic", antialias=True)
        expected = F.interpolate(there, size, mode="bicubic", antialias=True)
        torch.testing.assert_close(back, expected, rtol=0, atol=0.01)
        if min(size) > 30:
            torch.testing.assert_close(back[0], image, rtol=0, atol=0.02)

    @pytest.mark.parametrize("canvas", CANVASES)
    def test_shapes_and_range(self, canvas):
        frames = torch.randn(3, 3, canvas.height, canvas.width, generator=torch.Generator().manual_seed(0))
        out = unfit(frames, canvas)
        assert out.shape == (3, 3, canvas.output_height, canvas.output_width)
        assert 0 <= out.min() <= out.max() <= 1

    def test_the_padding_does_not_show(self):
        canvas = canvas_of(64, 88, (60, 85), (480, 680))
        frames = torch.full((2, 3, 64, 88), 0.25)
        frames[:, :, 60:] = 1
        frames[:, :, :, 85:] = 1
        torch.testing.assert_close(unfit(frames, canvas), torch.full((2, 3, 480, 680), 0.25))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_other_precisions_come_back_as_float32(self, dtype):
        canvas = canvas_of(64, 64, (60, 64), (33, 35))
        assert unfit(torch.rand(1, 3, 64, 64).to(dtype), canvas).dtype == torch.float32

    def test_frames_do_not_influence_each_other(self):
        canvas = canvas_of(64, 64, (60, 61), (120, 122))
        frames = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
        assert torch.equal(unfit(frames, canvas)[2:3], unfit(frames[2:3], canvas))


def grey_profile(gamma):
    """An ICC profile of grey whose light is a power of its values."""
    white = b"".join(struct.pack(">i", round(65536 * x)) for x in (0.9642, 1, 0.8249))  # D50, as ICC.1 asks for
    tags = {
        b"desc": b"desc" + bytes(4) + struct.pack(">I", 5) + b"grey\0" + bytes(78),
        b"cprt": b"text" + bytes(4) + b"none\0",
        b"wtpt": b"XYZ " + bytes(4) + white,
        b"kTRC": b"curv" + bytes(4) + struct.pack(">IH", 1, round(256 * gamma)),
    }
    table, content, place = struct.pack(">I", len(tags)), b"", 128 + 4 + 12 * len(tags)
    for name, tag in tags.items():
        table += name + struct.pack(">II", place + len(content), len(tag))
        content += tag + bytes(-len(tag) % 4)
    head = struct.pack(">I", place + len(content)) + bytes(4) + b"\2\x10\0\0mntrGRAYXYZ " + bytes(12) + b"acsp"
    return (head + bytes(28) + white).ljust(128, b"\0") + table + content


class TestWhatEveryViewerShows:
    """A photo is what viewers show, whatever else its file holds."""

    @pytest.fixture
    def swapped(self):
        """A profile in which the first channel is sRGB's green and the second sRGB's red."""
        icc = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
        icc = icc.replace(b"sRGB built-in", b"swapped colour")
        icc = icc.replace("sRGB built-in".encode("utf-16-be"), "other colours".encode("utf-16-be"))
        return icc.replace(b"rXYZ", b"????", 1).replace(b"gXYZ", b"rXYZ", 1).replace(b"????", b"gXYZ", 1)

    @pytest.fixture
    def srgb(self):
        return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()

    @pytest.mark.parametrize("suffix", ["png", "tiff", "webp"])
    def test_colours_are_those_of_the_profile(self, photo, tmp_path, swapped, suffix):
        path = save(Image.fromarray(photo), tmp_path / f"a.{suffix}", icc_profile=swapped, lossless=True)
        shown = to_8_bit(load(path)).astype(int)
        assert abs(shown - photo[..., [1, 0, 2]]).max() <= 3

    def test_a_pil_image_has_its_profile_too_and_keeps_its_alpha(self, swapped):
        rgba = np.random.default_rng(1).integers(0, 256, (6, 5, 4), dtype=np.uint8)
        image = Image.fromarray(rgba)
        image.info["icc_profile"] = swapped
        shown = load(image)
        torch.testing.assert_close(shown, on_white(rgba[..., [1, 0, 2, 3]]).float(), atol=3 / 255, rtol=0)

    def test_colours_of_srgb_stay_to_the_bit(self, photo, tmp_path, srgb):
        path = save(Image.fromarray(photo), tmp_path / "a.png", icc_profile=srgb)
        assert np.array_equal(to_8_bit(load(path)), photo)

    @pytest.mark.parametrize("mode", ["L", "CMYK", "I;16"])
    def test_a_profile_of_another_kind_of_image_is_ignored(self, swapped, mode):
        image = Image.new(mode, (3, 2), 90 if mode != "CMYK" else (10, 20, 30, 40))
        plain = load(image)
        image.info["icc_profile"] = swapped
        shown = load(image)
        if mode == "L":  # grey is grey, also where red and green change places
            torch.testing.assert_close(shown, plain, atol=3 / 255, rtol=0)
        else:
            assert torch.equal(shown, plain)

    def test_a_profile_of_grey_leaves_colours_their_colours(self, photo):
        image = Image.fromarray(photo)
        image.info["icc_profile"] = grey_profile(gamma=1.8)
        assert np.array_equal(to_8_bit(load(image)), photo)

    def test_a_profile_that_cannot_be_brought_to_srgb_is_ignored(self):
        image = Image.new("L", (3, 2), 90)
        image.info["icc_profile"] = grey_profile(gamma=1.8).replace(b"kTRC", b"none")
        assert (to_8_bit(load(image)) == 90).all()

    @pytest.mark.parametrize(("mode", "grey"), [("L", 90), ("LA", (90, 255))])
    def test_grey_is_that_of_its_profile(self, mode, grey):
        image = Image.new(mode, (3, 2), grey)
        image.info["icc_profile"] = grey_profile(gamma=1.0)
        assert to_8_bit(load(image))[0, 0, 0] > 130  # as much light needs a higher number in sRGB

    @pytest.mark.parametrize("icc", [b"no profile", b"\0" * 200])
    def test_a_broken_profile_is_ignored(self, photo, tmp_path, icc):
        path = save(Image.fromarray(photo), tmp_path / "a.png", icc_profile=icc)
        assert np.array_equal(to_8_bit(load(path)), photo)

    @pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
    def test_a_broken_exif_block_is_ignored(self, photo, tmp_path, suffix):
        plain = to_8_bit(load(save(Image.fromarray(photo), tmp_path / f"plain.{suffix}")))
        path = save(Image.fromarray(photo), tmp_path / f"a.{suffix}", exif=b"Exif\0\0nothing that is EXIF")
        assert np.array_equal(to_8_bit(load(path)), plain)

    @pytest.mark.parametrize("fault", ["long", "checksum", "compression"])
    def test_texts_that_cannot_be_read_are_ignored(self, photo, tmp_path, fault):
        data = save(Image.fromarray(photo), tmp_path / "a.png").read_bytes()
        text = {"long": zlib.compress(b"a" * 2**22), "checksum": zlib.compress(b"a"), "compression": b"nothing"}[fault]
        content = b"zTXtnote\0\0" + text
        check = zlib.crc32(content) ^ (fault == "checksum")
        chunk = struct.pack(">I", len(content) - 4) + content + struct.pack(">I", check)
        (tmp_path / "a.png").write_bytes(data[:33] + chunk + data[33:])
        assert np.array_equal(to_8_bit(load(tmp_path / "a.png")), photo)

    @pytest.mark.parametrize("kind", [b"tEXt", b"zTXt", b"iTXt"])
    def test_a_broken_text_of_any_kind_is_ignored_also_where_a_file_goes_on_after_its_end(self, photo, tmp_path, kind):
        data = save(Image.fromarray(photo), tmp_path / "a.png").read_bytes()
        chunk = struct.pack(">I", 9) + kind + b"note\0word" + bytes(4)  # with a wrong checksum
        for beyond in (b"", b"\0\0"):
            (tmp_path / "a.png").write_bytes(data[:33] + chunk + data[33:] + beyond)
            assert np.array_equal(to_8_bit(load(tmp_path / "a.png")), photo)

    def test_heic_is_read_where_pillow_heif_is_installed(self, tmp_path, monkeypatch):
        pytest.importorskip("pillow_heif").register_heif_opener()
        path = save(Image.new("RGB", (64, 48), (200, 60, 30)), tmp_path / "a.heic", quality=95)
        monkeypatch.setattr(Image, "ID", [kind for kind in Image.ID if kind != "HEIF"])  # as before a first one
        monkeypatch.delitem(Image.OPEN, "HEIF")
        shown = load(path)
        assert shown.shape == (3, 48, 64)
        assert abs(to_8_bit(shown).reshape(-1, 3).mean(0) - (200, 60, 30)).max() < 6

    @pytest.mark.skipif(importlib.util.find_spec("pillow_heif") is not None, reason="pillow-heif is installed")
    def test_heic_names_what_is_missing(self, tmp_path):
        path = tmp_path / "a.heic"
        path.write_bytes(struct.pack(">I", 24) + b"ftypheic" + bytes(12))
        with pytest.raises(ValueError, match=r"pip install 'dreammover-pipeline\[heic\]'"):
            load(path)

    @pytest.mark.parametrize("kind", ["numpy", "torch"])
    def test_boolean_arrays_are_black_and_white(self, kind):
        values = np.random.default_rng(2).random((5, 7)) < 0.5
        shown = load(values if kind == "numpy" else torch.from_numpy(values))
        assert torch.equal(shown[0], torch.from_numpy(values).float())


class TestLoadShrunk:
    @pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "I;16", "I"])
    def test_it_is_the_photo_in_small(self, mode):
        ramp = np.linspace(0, 255, 300).astype(np.uint8)[None].repeat(200, 0)
        grey = Image.fromarray(ramp)
        if mode in ("I;16", "I"):
            picture = Image.fromarray(ramp.astype(np.uint16) * 257).convert(mode)
        else:
            picture = grey.convert("RGB").quantize(16) if mode in ("P", "PA") else grey
            picture = picture.convert(mode)
        small, whole = shrunk(picture, 30, "TIFF" if mode in ("I", "PA") else "PNG"), load(picture)
        assert small.shape == (3, 20, 30)
        expected = F.interpolate(whole[None], (20, 30), mode="area")[0]
        assert (small - expected).abs().mean() < 0.03

    def test_a_smaller_photo_stays_as_it_is(self, photo):
        picture = Image.fromarray(photo)
        np.testing.assert_array_equal(to_8_bit(shrunk(picture, 7)), photo)

    def test_transparency_and_the_turn_of_the_camera_are_kept(self):
        exif = Image.Exif()
        exif[0x0112] = 6  # turned by 90°
        file = io.BytesIO()
        picture = Image.new("RGB", (200, 100), "red")
        picture.paste("blue", (100, 0, 200, 100))
        picture.save(file, "PNG", exif=exif, transparency=(255, 0, 0))
        file.seek(0)
        small = load_shrunk(file, "img0", 20, 10**6)
        assert small.shape == (3, 20, 10)
        assert (to_8_bit(small)[0, 5] == (255, 255, 255)).all()
        assert (to_8_bit(small)[19, 5] == (0, 0, 255)).all()

    @pytest.mark.parametrize("mode", ["L", "RGB", "P"])
    def test_what_is_transparent_does_not_mix_with_what_is_not(self, mode):
        stripes = np.where(np.arange(300) % 6 < 3, 0, 200).astype(np.uint8)[None].repeat(200, 0)
        picture, clear = Image.fromarray(stripes), 0
        if mode == "RGB":
            picture, clear = picture.convert("RGB"), (0, 0, 0)
        elif mode == "P":
            picture.putpalette([value for value in range(256) for _ in range(3)])
            clear = bytes([0])
        file = io.BytesIO()
        picture.save(file, "PNG", transparency=clear)
        file.seek(0)
        small = load_shrunk(file, "img0", 30, 10**6)
        expected = (1 + 200 / 255) / 2  # half of it is white, and half of it is grey
        torch.testing.assert_close(small, torch.full((3, 20, 30), expected), rtol=0, atol=0.03)

    @pytest.mark.parametrize("upright", [False, True])
    def test_the_longer_side_decides(self, upright):
        picture = Image.new("RGB", (10, 300) if upright else (300, 10))
        assert shrunk(picture, 30).shape == ((3, 30, 1) if upright else (3, 1, 30))

    def test_pillows_own_limit_is_honoured_in_our_words(self, monkeypatch):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
        with pytest.raises(ValueError, match=r"^img0 is too large, at most 500 pixels are allowed: .*1600 pixels"):
            shrunk(Image.new("RGB", (40, 40)), 10, most=500)

    def test_a_format_that_pillow_does_not_have_here_hides_no_other(self):
        assert shrunk(Image.new("RGB", (30, 20)), 10, formats=["NONE", "PNG"]).shape == (3, 7, 10)

    def test_white_of_16_bits_stays_white(self):
        picture = Image.fromarray(np.repeat([[0, 65535]], 50, 1).repeat(60, 0).astype(np.uint16))
        assert shrunk(picture, 16).max() == 1

    def test_what_is_larger_or_of_another_format_is_refused(self):
        picture = Image.new("RGB", (30, 20))
        assert shrunk(picture, 10, most=600, formats=["JPEG", "PNG"]).shape == (3, 7, 10)
        with pytest.raises(ValueError, match="img0 is too large, at most 599 pixels are allowed: 20×30"):
            shrunk(picture, 10, most=599)
        with pytest.raises(ValueError, match="img0 cannot be read as an image: it is none of JPEG, PNG"):
            shrunk(picture, 10, "BMP", formats=["JPEG", "PNG"])
