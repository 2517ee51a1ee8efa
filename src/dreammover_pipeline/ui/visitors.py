# SPDX-License-Identifier: Apache-2.0
"""Who may see which file: every visitor, known by a random cookie, has a folder that is served to no one else."""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import time
from collections.abc import Set
from contextlib import suppress
from http.cookies import CookieError, SimpleCookie
from pathlib import Path
from typing import BinaryIO

from ..media.files import write_picture
from .photos import read_photo

COOKIE = "dreammover_visitor"
MAX_UPLOADS = 20  # photos that a visitor may have here; the one uploaded first makes room for another
MAX_STORED = 4 * 2**30  # bytes that the files of all visitors may have before no more are taken
MIN_FREE = 2**28  # bytes of the disk that must be free; most videos with all that belongs to them take less


class FullError(RuntimeError):
    """The files of all visitors take all the room that they may take, or that the disk has."""


class Visitors:
    """The folders of all visitors.

    Args:
        root: the folder from which Gradio serves files; the folders of the visitors and of the examples lie inside it.
    """

    def __init__(self, root: Path):
        self.root = root.resolve()
        self.folders, self.examples = self.root / "visitors", self.root / "examples"
        self.folders.mkdir()

    def folder(self, cookie: str) -> Path:
        """The folder of the visitor with this cookie; the folder's name does not give the cookie away."""
        return self.folders / hashlib.sha256(cookie.encode()).hexdigest()[:32]

    def may_see(self, cookie: str | None, path: str | os.PathLike) -> bool:
        """Whether a file is the visitor's own, or one of the examples that everyone sees."""
        try:
            resolved = Path(os.path.abspath(path)).resolve()  # ".." is resolved before links are, as Gradio does
        except ValueError:  # no file can have this path, such as one with a NUL
            return False
        if resolved.is_relative_to(self.examples):
            return True
        return cookie is not None and resolved.is_relative_to(self.folder(cookie))

    def remove_strays(self, present: Set[Path], age: float) -> None:
        """Remove what belongs to no session and was not added to for some time, whoever has put it into the root.

        Args:
            present: the folders of the visitors who have a session.
            age: the number of seconds for which nothing was added.
        """
        for stray in [*self.folders.iterdir(), *self.root.iterdir()]:
            with suppress(FileNotFoundError):  # another thread may have removed it
                if stray in {*present, self.folders, self.examples} or time.time() - stray.stat().st_mtime <= age:
                    continue
                if stray.is_dir():
                    shutil.rmtree(stray, ignore_errors=True)
                else:
                    stray.unlink()

    def check_room(self) -> None:
        """Check that more files may be stored.

        Raises:
            FullError: the files of all visitors have `MAX_STORED` bytes or more, or the disk has no `MIN_FREE` left.
        """
        stored = 0
        for folder, _, names in os.walk(self.folders):
            for name in names:
                with suppress(FileNotFoundError):
                    stored += os.stat(os.path.join(folder, name)).st_size
        if stored >= MAX_STORED or shutil.disk_usage(self.folders).free < MIN_FREE:
            raise FullError("There is no room for more files here at the moment; try again later.")

    def take(self, cookie: str, file: BinaryIO, name: str) -> Path:
        """Store an uploaded photo in the visitor's folder: only its picture, in a form that every browser shows.

        Args:
            cookie: the cookie of the visitor who uploaded the photo.
            file: the uploaded file, open for reading at its beginning.
            name: what errors call the photo.

        Returns:
            The path of a PNG of the photo, as `read_photo` reads it.

        Raises:
            FullError: there is no room for more files.
            OSError: the picture cannot be written; nothing is left of it.
            ValueError: the photo cannot be read.
        """
        self.check_room()
        photo = read_photo(file, name)
        uploads = self.folder(cookie) / "uploads"
        target = uploads / secrets.token_hex(16) / "photo.png"
        try:
            target.parent.mkdir(parents=True)
            write_picture(photo, target)
        except BaseException:
            shutil.rmtree(target.parent, ignore_errors=True)
            raise
        for old in sorted(uploads.iterdir(), key=lambda upload: upload.stat().st_mtime_ns)[:-MAX_UPLOADS]:
            shutil.rmtree(old, ignore_errors=True)
        return target


def visitor_cookie(cookie_header: str | None) -> str | None:
    """The visitor's cookie in a request's `Cookie` header; None where the header does not hold one."""
    try:
        cookies = SimpleCookie(cookie_header or "")
    except CookieError:
        return None
    return cookies[COOKIE].value if COOKIE in cookies else None
