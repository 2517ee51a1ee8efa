# SPDX-License-Identifier: Apache-2.0
"""Writes frames and pictures to files; no function of this module needs a model.

Every file is written in a temporary folder beside its place, and gets its own name when it is complete. So a finished
file of that name stays as it was, whatever goes wrong.
"""

from __future__ import annotations

import math
import os
import re
import secrets
import subprocess
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from fractions import Fraction
from functools import cache
from itertools import chain
from pathlib import Path

import imageio_ffmpeg
import numpy as np
from PIL import Image, PngImagePlugin

from ..inputs import check_file_place, file_fault
from ..scratch import replacing

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg")
FRAME_NAME = "frame_{:04d}.png"  # how frames in a folder are called, by their index
FRAME_PATTERN = re.compile(r"frame_\d{4,}\.png")  # the names that `FRAME_NAME` makes
SOFTWARE = (
    "DreamMover"  # what the text `Software` in a frame's file says, by which a folder of frames is known as ours
)
# Files that systems put into any folder that somebody looks at.
LITTER = {".DS_Store", "Thumbs.db", "desktop.ini"}
PROBE_SECONDS = 30  # that ffmpeg may take to say what it can encode

FPS_RANGE = (0.01, 1000)
# Browsers play a gif of more than 50 frames per second, whose delays are under 20 ms, at 10 frames per second.
GIF_FPS_RANGE = (0.01, 50)
GIF_LONGEST_DELAY = 65_535  # hundredths of a second for which a picture of a gif can stand still

# Many players refuse H.264 above level 5.2. These are that level's limits (ITU-T H.264, table A-1).
MACROBLOCK = 16  # pixels along a side of the squares that H.264 divides a frame into
MP4_MACROBLOCKS = 36_864  # of a frame
MP4_MACROBLOCKS_PER_SECOND = 2_073_600
MP4_SIDE = 8_688  # pixels: eight times the macroblocks of a frame are at least the square of those along a side


def write_video(frames: Iterable[Image.Image], path: str | os.PathLike, fps: float) -> None:
    """Write frames as an H.264 mp4, a looping gif, or a folder of `frame_0000.png`, `frame_0001.png`, …

    The ending of the path decides which: `.mp4`, `.gif`, or a folder where the path has no ending or ends in a slash.
    An mp4 needs an even width and height, so frames of odd size get their last column or row twice. In an mp4 frames
    that are too large for many players are scaled down to the size that `video_size` tells. Each frame of a gif has a
    palette of its own and lasts 1/fps seconds, rounded to 10 ms; equal neighbours become one longer frame, which can
    last 655.35 s at most.

    Args:
        frames: at least one picture, all of one size; they are taken one at a time.
        path: the file or folder to write; a file or folder of that name is replaced once the new one is complete.
        fps: frames per second; a folder of PNGs ignores it.

    Raises:
        ValueError: `check_video_path` refuses the path or `check_fps` the rate, or there are no frames, or the frames
            differ in size.
        RuntimeError: ffmpeg failed; the message quotes what ffmpeg wrote.
    """
    check_video_path(path)
    check_fps(fps, path)
    with replacing(path) as temporary:
        VIDEO_WRITERS[_video_suffix(path)](_checked(frames), temporary, fps)
        check_video_path(path)  # once more, since frames that are made one at a time take a while


def video_size(size: tuple[int, int], path: str | os.PathLike, fps: float) -> tuple[int, int]:
    """The width and height, in pixels, of the video that `write_video` makes of frames.

    A gif and a folder of PNGs have the size of the frames. An mp4 has it too, up to even numbers. But where that would
    need a level of H.264 above 5.2, it has the largest size in the shape of the frames that does not: one of at most
    about 9.4 megapixels, 8688 pixels along a side and 530 megapixels per second.

    Args:
        size: width and height of the frames, in pixels.
        path: the file or folder of the video, which need not exist.
        fps: frames per second, as `check_fps` allows it.
    """
    if _video_suffix(path) != ".mp4":
        return size
    even = [side + side % 2 for side in size]
    most = min(MP4_MACROBLOCKS, MP4_MACROBLOCKS_PER_SECOND / fps)
    longer_sides = range(min(max(even), MP4_SIDE), 0, -2)
    sizes = ([max(2, 2 * round(side * longer / max(even) / 2)) for side in even] for longer in longer_sides)
    return next((w, h) for w, h in sizes if math.ceil(w / MACROBLOCK) * math.ceil(h / MACROBLOCK) <= most)


def write_video_or_keep(
    frames: Collection[Image.Image], path: str | os.PathLike, fps: float, beside: str | os.PathLike | None = None
) -> None:
    """`write_video`; if it fails for whatever reason, the frames are kept as PNGs, since they have cost the most.

    An error that the frames themselves raise, where they are made one at a time, is passed on as it is.

    Args:
        frames: at least one picture, all of one size; they are taken one at a time, once more if they are to be kept.
        path: the file or folder to write, as `write_video` takes it.
        fps: frames per second.
        beside: the file or folder that frames are kept beside; by default `path`.

    Raises:
        RuntimeError: the video could not be written; the message says why, and where the frames are.
    """
    unmade = None

    def taken() -> Iterator[Image.Image]:
        nonlocal unmade
        try:
            yield from frames
        except Exception as error:
            unmade = error
            raise

    try:
        write_video(taken(), path, fps)
    except Exception as error:
        if error is unmade:
            raise
        kept = _kept(frames, Path(path if beside is None else beside))
        where = f"the {len(frames)} frames are kept in '{kept}'" if kept else "nor could the frames be kept anywhere"
        raise RuntimeError(f"'{path}' could not be written: {error}; {where}") from error


def _kept(frames: Iterable[Image.Image], path: Path) -> Path | None:
    """A new folder with the frames beside a path, among temporary files or in the current folder.

    None is returned if none of these has room.
    """
    name = f"dreammover-frames-{secrets.token_hex(4)}"
    for place in (lambda: path.parent, tempfile.gettempdir, Path.cwd):
        with suppress(OSError):  # the place is missing, read-only or full
            folder = Path(place(), name).resolve()
            with replacing(folder) as temporary:
                _write_folder(iter(frames), temporary, fps=1)
            return folder
    return None


def write_picture(picture: Image.Image, path: str | os.PathLike) -> None:
    """Write one picture as png or jpeg, whichever the ending of the path says.

    Raises:
        ValueError: `check_picture_path` refuses the path.
    """
    check_picture_path(path)
    with replacing(path) as temporary:
        picture.save(temporary, quality=95)  # the quality is for jpeg; Pillow ignores it for png


def check_video_path(path: str | os.PathLike) -> None:
    """Refuse a path that `write_video` could not write, or where it would destroy something else than a video.

    Raises:
        ValueError: the ending is unknown, the parent folder is missing or read-only, a folder, a pipe or a device is
            where a file should go or a file where a folder should go, the folder holds anything but the frames of an
            earlier run, or the name is too long.
        RuntimeError: an mp4 is asked for, and there is no ffmpeg that can encode H.264.
    """
    suffix = _video_suffix(path)
    if suffix not in VIDEO_WRITERS:
        raise ValueError(f"'{path}' ends in '{suffix}'; allowed are .mp4, .gif, or no ending for a folder of PNGs")
    _check_parent(path)
    if suffix:
        check_file_place(path)
    else:
        _check_replaceable_folder(path)
    if suffix == ".mp4":
        check_ffmpeg()


def check_picture_path(path: str | os.PathLike) -> None:
    """Refuse a path that `write_picture` could not write.

    Raises:
        ValueError: the ending is not that of a picture, the parent folder is missing or read-only, or what has that
            name is no file.
    """
    check_file_path(path, PICTURE_SUFFIXES)


def check_file_path(path: str | os.PathLike, suffixes: Sequence[str]) -> None:
    """Refuse a path where no file with one of these endings can be written.

    Raises:
        ValueError: the path has another ending, the parent folder is missing or read-only, or what has that name is
            no file.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in suffixes:
        raise ValueError(f"'{path}' ends in '{suffix}'; allowed are {', '.join(suffixes)}")
    _check_parent(path)
    check_file_place(path)


def check_replaceable(
    path: str | os.PathLike, is_ours: Callable[[bytes], bool], what: str, instead: str = "folder"
) -> None:
    """Refuse to replace a file that this program did not write.

    Args:
        path: the place that is written to, where there need not be a file.
        is_ours: a function that tells from the content of a file whether this program wrote it.
        what: what is written, for the error.
        instead: what the user can choose another one of, for the error.

    Raises:
        ValueError: there is a file that this program did not write, or anything but a file.
    """
    check_file_place(path)
    if os.path.exists(path) and not is_ours(Path(path).read_bytes()):
        raise ValueError(
            f"cannot write {what} to '{path}': this program did not write the file that is there; move it away, or "
            f"choose another {instead}"
        )


def make_folder(folder: str | os.PathLike, name: str = "the folder", writable: bool = True) -> None:
    """Make a folder for what is to be written, and those it lies in, unless it is there.

    Args:
        folder: the folder.
        name: what error messages call it, such as the option that it was given by.
        writable: whether it has to be writable, too.

    Raises:
        ValueError: it cannot be made, or has to be writable and is not.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{name} '{folder}' cannot be made: {error.strerror}") from error
    if writable and not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"{name} '{folder}' is read-only")


def check_fps(fps: float, path: str | os.PathLike) -> None:
    """Refuse a frame rate that the kind of video at `path` cannot have.

    Raises:
        ValueError: the rate is not a number, or out of the range of this kind of video.
    """
    low, high = GIF_FPS_RANGE if _video_suffix(path) == ".gif" else FPS_RANGE
    if not low <= fps <= high:  # NaN fails both comparisons
        raise ValueError(f"fps must be between {low} and {high} for '{path}', got {fps}")


def check_still(count: int, fps: float, path: str | os.PathLike) -> None:
    """Refuse a number of equal neighbours that the kind of video at `path` cannot show.

    Raises:
        ValueError: they would stand still for longer than a gif can say.
    """
    delay = _gif_time(count, fps)
    if _video_suffix(path) == ".gif" and delay > GIF_LONGEST_DELAY:
        raise ValueError(
            f"a picture can stand still for {GIF_LONGEST_DELAY / 100} s at most in '{path}', not for {delay / 100} s; "
            "name an .mp4 file or a folder, or let the ends stand still for a shorter time"
        )


def _ffmpeg() -> str:
    """The program ffmpeg that encodes videos: the one that IMAGEIO_FFMPEG_EXE names, or that imageio-ffmpeg brings.

    Raises:
        RuntimeError: there is none.
    """
    try:
        return imageio_ffmpeg.get_ffmpeg_exe()
    except RuntimeError as error:
        raise RuntimeError(
            f"no ffmpeg to write an mp4 with: {error}; write a .gif or a folder of PNGs instead"
        ) from None


def check_ffmpeg() -> None:
    """Refuse to go on without an ffmpeg that can encode H.264.

    Raises:
        RuntimeError: there is none, or it does not work.
    """
    _check_encodes(_ffmpeg())


@cache
def _check_encodes(program: str) -> None:
    """Refuse a program that cannot encode H.264, by asking it once.

    Raises:
        RuntimeError: the program cannot be run, fails, does not answer, or knows no encoder libx264.
    """
    remedy = "set IMAGEIO_FFMPEG_EXE to another ffmpeg, or write a .gif or a folder of PNGs instead"
    try:
        answer = subprocess.run(
            [program, "-hide_banner", "-encoders"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=PROBE_SECONDS,
            check=True,
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise RuntimeError(f"'{program}' does not work as ffmpeg: {error}; {remedy}") from None
    if "libx264" not in answer.stdout:
        raise RuntimeError(f"'{program}' has no encoder libx264 for mp4; {remedy}")


def _video_suffix(path: str | os.PathLike) -> str:
    return "" if os.fspath(path).endswith(("/", os.sep)) else Path(path).suffix.lower()


def check_name_length(path: str | os.PathLike) -> None:
    """Refuse a path whose last part is longer than the disk allows.

    Raises:
        ValueError: the name is too long.
    """
    parent, name = Path(path).resolve().parent, Path(path).name
    longest = os.pathconf(parent, "PC_NAME_MAX") if hasattr(os, "pathconf") and parent.is_dir() else 255
    if len(os.fsencode(name)) > longest:
        raise ValueError(
            f"cannot write '{path}': its name has {len(os.fsencode(name))} bytes, and at most {longest} are allowed"
        )


def _check_parent(path: str | os.PathLike) -> None:
    check_name_length(path)
    parent = Path(path).resolve().parent
    if not parent.is_dir():
        raise ValueError(f"cannot write '{path}': there is no folder '{parent}'")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise ValueError(f"cannot write '{path}': the folder '{parent}' is read-only")


def _check_replaceable_folder(path: str | os.PathLike) -> None:
    target = Path(path).resolve()
    if target == Path.cwd():
        raise ValueError(f"cannot write frames to '{path}': the current folder cannot be replaced; name one inside it")
    if target.exists() and not target.is_dir():
        raise ValueError(f"cannot write the folder '{path}': there is {file_fault(target) or 'a file'} of that name")
    entries = [entry for entry in target.glob("*") if entry.name not in LITTER]
    others = [entry.name for entry in entries if not FRAME_PATTERN.fullmatch(entry.name)]
    if others:
        raise ValueError(f"cannot replace the folder '{path}': besides frames it holds '{min(others)}'")
    foreign = [entry.name for entry in entries if not _is_ours(entry)]
    if foreign:
        raise ValueError(
            f"cannot replace the folder '{path}': '{min(foreign)}' in it was not written by this program; "
            "name another folder, or remove this one"
        )


def _is_ours(frame: Path) -> bool:
    """Whether a file is a frame that `write_video` wrote."""
    if file_fault(frame):
        return False
    try:
        with Image.open(frame) as picture:
            return picture.info.get("Software") == SOFTWARE
    except Exception:  # Pillow raises nearly anything on a file that is no picture
        return False


def _checked(frames: Iterable[Image.Image]) -> Iterator[Image.Image]:
    """The frames in RGB; a ValueError where there are none, or where they differ in size."""
    size = None
    for index, frame in enumerate(frames):
        size = size or frame.size
        if frame.size != size:
            raise ValueError(f"frames must have one size, but frame 0 has {size} and frame {index} has {frame.size}")
        yield frame if frame.mode == "RGB" else frame.convert("RGB")
    if size is None:
        raise ValueError("a video needs at least one frame")


def _write_mp4(frames: Iterator[Image.Image], path: Path, fps: float) -> None:
    first = next(frames)
    even = (first.width + first.width % 2, first.height + first.height % 2)
    command = [_ffmpeg(), "-v", "error", "-y", "-f", "rawvideo", "-pix_fmt", "rgb24"]
    command += ["-s", f"{even[0]}x{even[1]}", "-r", str(Fraction(fps).limit_denominator(1001)), "-i", "-"]
    # Frames are sRGB, and their colours are brought to the matrix of BT.709. All of this is noted in the file, since
    # players that have to guess shift the colours.
    tags = "color_primaries=bt709:color_trc=iec61966-2-1:colorspace=bt709"
    width, height = video_size(first.size, path, fps)
    scale = "flags=accurate_rnd"
    if (width, height) != even:
        scale = f"w={width}:h={height}:flags=lanczos+accurate_rnd,setsar=1"  # rounding must not make pixels oblong
    command += ["-vf", f"scale=out_color_matrix=bt709:{scale},setparams={tags}"]
    command += ["-color_primaries", "bt709", "-color_trc", "iec61966-2-1", "-colorspace", "bt709"]
    command += ["-c:v", "libx264", "-crf", "14", "-pix_fmt", "yuv420p"]
    command += ["-movflags", "+faststart", "-f", "mp4", str(path)]
    with tempfile.TemporaryFile() as messages:
        ffmpeg = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=messages)
        try:
            for frame in chain([first], frames):
                ffmpeg.stdin.write(_padded_to_even(np.asarray(frame)).data)
            ffmpeg.stdin.close()
            taken = True
        except BrokenPipeError:
            taken = False  # it gave up, and says why below
        except BaseException:
            ffmpeg.kill()
            raise
        finally:
            status = ffmpeg.wait()
        messages.seek(0)
        said = messages.read().decode(errors="replace").strip()
    if status or not taken:
        raise RuntimeError(f"ffmpeg could not write the video: {said or f'exit status {status}'}")


def _padded_to_even(pixels: np.ndarray) -> np.ndarray:
    height, width, _ = pixels.shape
    if height % 2 == width % 2 == 0:
        return pixels
    return np.pad(pixels, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")


def _write_gif(frames: Iterator[Image.Image], path: Path, fps: float) -> None:
    # Pillow dithers only with a palette that it is given, and without dithering smooth shades would show bands.
    paletted = (_timed(frame.quantize(palette=frame.quantize()), index, fps) for index, frame in enumerate(frames))
    next(paletted).save(path, save_all=True, append_images=paletted, loop=0)


def _timed(picture: Image.Image, index: int, fps: float) -> Image.Image:
    """A picture that is told, in the way that Pillow takes it, how many thousandths of a second it lasts in a gif."""
    picture.info["duration"] = 10 * (_gif_time(index + 1, fps) - _gif_time(index, fps))
    return picture


def _gif_time(count: int, fps: float) -> int:
    """The hundredths of a second, in which a gif counts, that its first pictures last together."""
    return round(100 * count / fps)


def _write_folder(frames: Iterator[Image.Image], path: Path, fps: float) -> None:
    path.mkdir()
    mark = PngImagePlugin.PngInfo()
    mark.add_text("Software", SOFTWARE)
    for index, frame in enumerate(frames):
        frame.save(path / FRAME_NAME.format(index), pnginfo=mark)


VIDEO_WRITERS: dict[str, Callable[[Iterator[Image.Image], Path, float], None]] = {
    ".mp4": _write_mp4,
    ".gif": _write_gif,
    "": _write_folder,
}
