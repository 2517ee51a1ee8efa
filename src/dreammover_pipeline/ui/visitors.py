# SPDX-License-Identifier: Apache-2.0
"""Who may see which file: every visitor, known by a random cookie, has a folder that is served to no one else.

Gradio by itself serves every file in its folder to anybody who knows the path, and keeps equal uploads of different
people as one file. `Doorkeeper` handles requests before Gradio does: it moves every upload into the folder of its
visitor, and refuses a request for any file that the visitor may not see.
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
# The addresses of Gradio's interface that the page uses. All others are refused, since some of them fetch files from
# other servers, or keep the state of one visitor's session for other visitors.
ALLOWED = re.compile(
    rf"{API}/(file=.*|upload|upload_progress|queue/(join|data)|run/predict|cancel|reset/?|heartbeat/\w+|startup-events|info"
    r"|login_check/?|app_id/?|user/?|token/?|theme\.css)",
    re.DOTALL,
)
FORM_OVERHEAD = 2**14  # bytes that an upload may have beyond those of its file


class Visitors:
    """The folders of all visitors.

    Args:
        root: the folder from which Gradio serves files; the visitors' folders lie inside it.
    """

    def __init__(self, root: Path):
        self.root = root.resolve()
        self.folders = self.root / "visitors"
        self.folders.mkdir()

    def folder(self, cookie: str) -> Path:
        """The folder of the visitor with this cookie; the folder's name does not give the cookie away."""
        return self.folders / hashlib.sha256(cookie.encode()).hexdigest()[:32]

    def may_see(self, cookie: str | None, path: str | os.PathLike) -> bool:
        """Whether a file is the visitor's own, or one of the examples that everyone sees."""
        resolved = Path(os.path.abspath(path)).resolve()  # ".." is resolved before links are, as Gradio does
        if not resolved.is_relative_to(self.root):
            return False
        if not resolved.is_relative_to(self.folders):
            return True
        return cookie is not None and resolved.is_relative_to(self.folder(cookie))

    def remove_strays(self, present: Set[Path], age: float) -> None:
        """Remove the folders of visitors who have no session and have added nothing for some time.

        Args:
            present: the folders of the visitors who have a session.
            age: the number of seconds for which nothing was added.
        """
        for folder in self.folders.iterdir():
            with suppress(FileNotFoundError):  # another thread may have removed the folder
                if folder not in present and time.time() - folder.stat().st_mtime > age:
                    shutil.rmtree(folder, ignore_errors=True)

    def take(self, cookie: str, upload: str) -> str:
        """Move a file that Gradio has just stored into a new folder inside the visitor's folder.

        Args:
            cookie: the cookie of the visitor who uploaded the file.
            upload: the path at which Gradio has stored the file.

        Returns:
            The new path of the file.

        Raises:
            ValueError: the file is no image; it has been removed.
        """
        source = Path(upload)
        try:
            with Image.open(source):
                pass
        except Exception as error:  # which exception Pillow raises depends on how the file is broken
            source.unlink()
            raise ValueError(f"{source.name} cannot be read as an image.") from error
        target = self.folder(cookie) / "uploads" / secrets.token_hex(16) / source.name
        target.parent.mkdir(parents=True)
        os.replace(source, target)
        if not any(source.parent.iterdir()):
            source.parent.rmdir()
        return str(target)


def visitor_cookie(cookie_header: str | None) -> str | None:
    """The visitor's cookie in a request's `Cookie` header; None where the header does not hold one."""
    try:
        cookies = SimpleCookie(cookie_header or "")
    except CookieError:
        return None
    return cookies[COOKIE].value if COOKIE in cookies else None


class Doorkeeper:
    """ASGI middleware that gives every visitor a cookie, and lets the cookie decide who sees which upload.

    Args:
        app: the application that handles what is not refused.
        visitors: the folders of all visitors.
        max_upload: how many bytes an uploaded file may have.
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
        """The answer to a request that this visitor may not make; None where the request is allowed."""
        file = path.partition(f"{API}/file=")[2]
        if (path.startswith(API) and not ALLOWED.fullmatch(path)) or (
            file and not self.visitors.may_see(cookie, file)
        ):
            return PlainTextResponse("There is nothing here for you.", status_code=404)
        if path == f"{API}/upload":
            length = headers.get("content-length", "")
            if not length.isdecimal():
                return PlainTextResponse("An upload must say how long it is.", status_code=411)
            if int(length) > self.max_upload + FORM_OVERHEAD:
                return PlainTextResponse(f"The file is larger than {self.max_upload / 2**20:.3g} MB.", status_code=413)
        return None

    def _taking(self, send: Send, cookie: str) -> Send:
        """A `send` that moves the uploads named in Gradio's answer, and answers with their new paths instead."""
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
    """A `send` that adds the visitor's cookie to the answer."""
    # A Hugging Face Space is shown inside a page of another site, where browsers keep partitioned cookies only.
    rules = "Secure; SameSite=None; Partitioned" if secure else "SameSite=Strict"

    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            MutableHeaders(scope=message).append("set-cookie", f"{COOKIE}={cookie}; Path=/; HttpOnly; {rules}")
        await send(message)

    return sending
