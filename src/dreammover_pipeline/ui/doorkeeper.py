# SPDX-License-Identifier: Apache-2.0
"""What a request may ask of the server, decided before Gradio hears of it.

Gradio by itself serves every file in its folder to anybody who knows the path, stores uploads there as they are, and
downloads the files that an event names by an address. `Doorkeeper` takes uploads itself, so that they are never
anywhere but in the folder of their visitor, and refuses a request that names a file that its visitor may not see, an
address, or an event that the page does not have.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterator, Mapping

from anyio import CapacityLimiter, to_thread
from starlette.datastructures import Headers, MutableHeaders, UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .visitors import COOKIE, FullError, Visitors, visitor_cookie

API = "/gradio_api"
UPLOAD, UPLOAD_PROGRESS = f"{API}/upload", f"{API}/upload_progress"
EVENTS = (f"{API}/queue/join", f"{API}/run/predict")
# The addresses of Gradio's interface that the page uses. All others are refused, since some of them fetch files from
# other servers, or keep the state of one visitor's session for other visitors.
ALLOWED = re.compile(
    rf"{API}/(file=.*|upload|upload_progress|queue/(join|data)|run/predict|cancel|reset/?|heartbeat/\w+|startup-events|info"
    r"|login_check/?|app_id/?|user/?|token/?|theme\.css)",
    re.DOTALL,
)
FORM_OVERHEAD = 2**14  # bytes that an upload may have beyond those of its file
MAX_EVENT = 2**20  # bytes of any other request, a hundred times what the page sends


class Doorkeeper:
    """ASGI middleware that gives every visitor a cookie, takes uploads, and refuses what no page asks for.

    Args:
        app: the application that handles what is not refused.
        visitors: the folders of all visitors.
        max_upload: how many bytes an uploaded file may have.
        events: the number of values that each of the page's events sends, by the number that Gradio gives the event.
    """

    def __init__(self, app: ASGIApp, visitors: Visitors, max_upload: int, events: Mapping[int, int]):
        self.app, self.visitors, self.max_upload, self.events = app, visitors, max_upload, events
        self._one_at_a_time = CapacityLimiter(1)  # decoding takes up to 15 MB a megapixel

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers, path = Headers(scope=scope), scope["path"]
        cookie = visitor_cookie(headers.get("cookie"))
        if cookie is None:
            cookie = secrets.token_urlsafe(32)
            secure = "https" in (scope["scheme"], headers.get("x-forwarded-proto"))
            send = _with_cookie(send, cookie, secure)
        answer = self._refusal(scope["method"], path, headers, cookie)
        try:
            if answer is None and path == UPLOAD:
                answer = await self._upload(Request(scope, receive), cookie)
            elif answer is None and path in EVENTS:
                body = await Request(scope, receive).body()
                answer, receive = self._refused_event(body, cookie), _again(body, receive)
        except ClientDisconnect:
            return None
        if answer is None and path == UPLOAD_PROGRESS:  # Gradio knows nothing of the uploads that are taken here
            answer = PlainTextResponse('data: {"msg": "done"}\n\n', media_type="text/event-stream")
        return await (answer or self.app)(scope, receive, send)

    def _refusal(self, method: str, path: str, headers: Headers, cookie: str) -> Response | None:
        """The answer to a request that this visitor may not make; None where the request is allowed."""
        file = path.partition(f"{API}/file=")[2]
        if (
            not _possible(path)
            or (path.startswith(API) and not ALLOWED.fullmatch(path))
            or (file and not self.visitors.may_see(cookie, file))
        ):
            return PlainTextResponse("There is nothing here for you.", status_code=404)
        if method in ("GET", "HEAD", "OPTIONS"):
            return None
        length = headers.get("content-length", "")
        if not length.isdecimal():
            return PlainTextResponse("A request must say how long it is.", status_code=411)
        if path == UPLOAD and int(length) > self.max_upload + FORM_OVERHEAD:
            return PlainTextResponse(f"The file is larger than {self.max_upload / 2**20:.3g} MB.", status_code=413)
        if path != UPLOAD and int(length) > MAX_EVENT:
            return PlainTextResponse("The request is too long.", status_code=413)
        return None

    async def _upload(self, request: Request, cookie: str) -> Response:
        """Store the photo of an upload, and answer with its path as Gradio would."""
        if request.method != "POST":
            return PlainTextResponse("There is nothing here for you.", status_code=404)
        try:
            async with request.form(max_files=1, max_fields=0) as form:
                file = form.get("files")
                if not isinstance(file, UploadFile):
                    return PlainTextResponse("An upload must be one photo.", status_code=400)
                if file.size > self.max_upload:
                    limit = f"{self.max_upload / 2**20:.3g} MB"
                    return PlainTextResponse(f"The file is larger than {limit}.", status_code=413)
                path = await to_thread.run_sync(
                    self.visitors.take, cookie, file.file, _printable(file.filename), limiter=self._one_at_a_time
                )
        except HTTPException as error:  # the request is no form, or has more than one file in it
            return PlainTextResponse(f"An upload must be one photo: {error.detail}", status_code=400)
        except FullError as error:
            return PlainTextResponse(str(error), status_code=507)
        except OSError as error:  # the disk is full, for the picture or already for the file that comes in
            return PlainTextResponse(f"The photo could not be stored: {error.strerror or error}.", status_code=507)
        except ValueError as error:
            return PlainTextResponse(f"{str(error).rstrip('.')}.", status_code=415)
        return JSONResponse([str(path)])

    def _refused_event(self, body: bytes, cookie: str) -> Response | None:
        """The answer to an event that the page would not send; None where the page could have sent it."""
        try:
            event = json.loads(body)
            number, values = event["fn_index"], event["data"]
            expected = self.events.get(number)
            files = list(_files(event))
        except (ValueError, TypeError, KeyError, RecursionError):  # no JSON, or not of an event's form
            return JSONResponse({"detail": "This is no event of the page."}, status_code=400)
        if expected is None or not isinstance(values, list) or len(values) < expected:
            return JSONResponse({"detail": "The page has no such event; load the page again."}, status_code=404)
        for path, address in files:
            if not isinstance(path, str) or not self.visitors.may_see(cookie, path):
                detail = "A photo is no longer there; upload the photo again."
                return JSONResponse({"detail": detail}, status_code=404)
            if isinstance(address, str) and address.startswith("data:"):
                return JSONResponse({"detail": "A photo must be uploaded before it is used."}, status_code=400)
        return None


def _files(event: object) -> Iterator[tuple[object, object]]:
    """The (path, address) of every file that an event names, however deep inside its values."""
    waiting = [event]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            if "path" in value or "url" in value:
                yield value.get("path"), value.get("url")
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value


def _possible(path: str) -> bool:
    """Whether a file can have this path; the server's functions for files fail on any other."""
    return "\0" not in path and len(path) < 1024 and all(len(part.encode()) < 256 for part in path.split("/"))


def _printable(name: str | None) -> str:
    """The name of an uploaded file, as a message may quote it."""
    last = (name or "").rpartition("/")[2]
    return "".join(letter for letter in last if letter.isprintable())[-100:] or "The upload"


def _again(body: bytes, receive: Receive) -> Receive:
    """A `receive` that hands out a body that was received already, and then what comes after it."""
    messages = [{"type": "http.request", "body": body}]

    async def receiving() -> Message:
        return messages.pop() if messages else await receive()

    return receiving


def _with_cookie(send: Send, cookie: str, secure: bool) -> Send:
    """A `send` that adds the visitor's cookie to the answer."""
    # A Hugging Face Space is shown inside a page of another site, where browsers keep partitioned cookies only.
    rules = "Secure; SameSite=None; Partitioned" if secure else "SameSite=Lax"

    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            MutableHeaders(scope=message).append("set-cookie", f"{COOKIE}={cookie}; Path=/; HttpOnly; {rules}")
        await send(message)

    return sending
