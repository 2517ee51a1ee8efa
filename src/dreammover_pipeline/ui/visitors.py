# SPDX-License-Identifier: Apache-2.0
"""Who may see which file: every visitor, known by a random cookie, has a folder that is served to no one else.

Gradio serves whatever lies in its folder to whoever knows the path, and puts equal uploads of different people in one
place. `Doorkeeper` stands before it: it moves each upload into its visitor's folder and refuses all other files.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Set
from contextlib import suppress
from http.cookies import CookieError, SimpleCookie
from pathlib import Path

from PIL import Image
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

COOKIE = "dreammover_visitor"
API = "/gradio_api"
# What this page has use for, of what Gradio offers. The rest fetches from other servers, or keeps states for others.
OPEN = re.compile(
    rf"{API}/(file=.*|upload|upload_progress|queue/(join|data)|run/predict|cancel|reset/?|heartbeat/\w+|startup-events|info"
    r"|login_check/?|app_id/?|user/?|token/?|theme\.css)",
    re.DOTALL,
)
FORM_OVERHEAD = 2**14  # bytes of an upload that are not the file's


class Visitors:
    """The visitors' folders, all inside `root`, which is the folder that Gradio serves files from."""

    def __init__(self, root: Path):
        self.root = root.resolve()
        self.folders = self.root / "visitors"
        self.folders.mkdir()

    def folder(self, cookie: str) -> Path:
        """The folder of whoever brings this cookie; its name does not give the cookie away."""
        return self.folders / hashlib.sha256(cookie.encode()).hexdigest()[:32]

    def may_see(self, cookie: str | None, path: str | os.PathLike) -> bool:
        """Whether a file is the visitor's own, or one of the examples that everyone sees."""
        resolved = Path(os.path.abspath(path)).resolve()  # dots first, as Gradio does it
        if not resolved.is_relative_to(self.root):
            return False
        if not resolved.is_relative_to(self.folders):
            return True
        return cookie is not None and resolved.is_relative_to(self.folder(cookie))

    def remove_strays(self, present: Set[Path], age: float) -> None:
        """Remove the folders of visitors who are not present and have added nothing for `age` seconds."""
        for folder in self.folders.iterdir():
            with suppress(FileNotFoundError):  # removed by another thread
                if folder not in present and time.time() - folder.stat().st_mtime > age:
                    shutil.rmtree(folder, ignore_errors=True)

    def take(self, cookie: str, upload: str) -> str:
        """Move a file that Gradio has just stored to a place of its own in the visitor's folder.

        Returns:
            Its new path.

        Raises:
            ValueError: it is no image; then it is gone.
        """
        source = Path(upload)
        try:
            with Image.open(source):
                pass
        except Exception as error:  # Pillow raises nearly anything on a broken file
            source.unlink()
            raise ValueError(f"{source.name} cannot be read as an image.") from error
        target = self.folder(cookie) / "uploads" / secrets.token_hex(16) / source.name
        target.parent.mkdir(parents=True)
        os.replace(source, target)
        if not any(source.parent.iterdir()):
            source.parent.rmdir()
        return str(target)


def visitor_cookie(cookie_header: str | None) -> str | None:
    """The visitor's cookie of a request's `Cookie` header."""
    try:
        cookies = SimpleCookie(cookie_header or "")
    except CookieError:
        return None
    return cookies[COOKIE].value if COOKIE in cookies else None


class Doorkeeper:
    """ASGI middleware that gives every visitor a cookie, files uploads under it and serves files by it.

    Args:
        app: what comes after it.
        visitors: their folders.
        max_upload: bytes an uploaded file may have.
    """

    def __init__(self, app: ASGIApp, visitors: Visitors, max_upload: int):
        self.app, self.visitors, self.max_upload = app, visitors, max_upload

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers, path = Headers(scope=scope), scope["path"]
        cookie = visitor_cookie(headers.get("cookie"))
        if cookie is None:
            cookie = secrets.token_urlsafe(32)
            secure = "https" in (scope["scheme"], headers.get("x-forwarded-proto"))
            send = _with_cookie(send, cookie, secure)
        if refusal := self._refusal(path, headers, cookie):
            return await refusal(scope, receive, send)
        if path == f"{API}/upload":
            send = self._taking(send, cookie)
        return await self.app(scope, receive, send)

    def _refusal(self, path: str, headers: Headers, cookie: str) -> PlainTextResponse | None:
        file = path.partition(f"{API}/file=")[2]
        if (path.startswith(API) and not OPEN.fullmatch(path)) or (file and not self.visitors.may_see(cookie, file)):
            return PlainTextResponse("There is nothing here for you.", status_code=404)
        if path == f"{API}/upload":
            length = headers.get("content-length", "")
            if not length.isdecimal():
                return PlainTextResponse("An upload must say how long it is.", status_code=411)
            if int(length) > self.max_upload + FORM_OVERHEAD:
                return PlainTextResponse(f"The file is larger than {self.max_upload / 2**20:.3g} MB.", status_code=413)
        return None

    def _taking(self, send: Send, cookie: str) -> Send:
        """Replace the paths in the answer to an upload by those in the visitor's folder."""
        start, body = {}, b""

        async def taking(message: Message) -> None:
            nonlocal start, body
            if message["type"] == "http.response.start":
                start = message
                return
            body += message.get("body", b"")
            if message.get("more_body"):
                return
            if start["status"] == 200:
                try:
                    body = json.dumps([self.visitors.take(cookie, upload) for upload in json.loads(body)]).encode()
                except ValueError as error:
                    body, start["status"] = str(error).encode(), 415
                MutableHeaders(scope=start)["content-length"] = str(len(body))
            await send(start)
            await send({"type": "http.response.body", "body": body})

        return taking


def _with_cookie(send: Send, cookie: str, secure: bool) -> Send:
    # A Hugging Face Space is a frame in another site's page, where only a cookie that says so is kept.
    rules = "Secure; SameSite=None; Partitioned" if secure else "SameSite=Strict"

    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            MutableHeaders(scope=message).append("set-cookie", f"{COOKIE}={cookie}; Path=/; HttpOnly; {rules}")
        await send(message)

    return sending
