# SPDX-License-Identifier: Apache-2.0
"""A stand-in for the Hugging Face Hub: a few small model repositories, served on loopback out of memory.

Speaks what `huggingface_hub` asks of a repository: its commit and files (GET /api/models/<id>, …/revision/<rev>,
…/tree/<rev>) and the files themselves (HEAD and GET /<id>/resolve/<rev>/<file>). Whatever else is asked is a 404, as
on the Hub.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

LIFETIME = 300  # seconds after which it stops by itself, whatever its user does
SILENCE = 10  # seconds a connection may stay open without a word


@dataclass(frozen=True)
class Repository:
    """A model repository with one commit.

    Args:
        name: "owner/name".
        files: path in the repository → content.
    """

    name: str
    files: Mapping[str, bytes]

    @cached_property
    def commit(self) -> str:
        return _sha("".join(path + _sha(content) for path, content in sorted(self.files.items())).encode())

    def answer(self, path: str) -> bytes | None:
        """What a URL's path holds; None where there is nothing."""
        api = f"/api/models/{self.name}"
        if path == api:
            return self._info()
        for revision in ("main", self.commit):
            if path == f"{api}/revision/{revision}":
                return self._info()
            if path == f"{api}/tree/{revision}":
                return self._tree()
            if path.startswith(f"/{self.name}/resolve/{revision}/"):
                return self.files.get(path.removeprefix(f"/{self.name}/resolve/{revision}/"))
        return None

    def _info(self) -> bytes:
        siblings = [{"rfilename": path} for path in sorted(self.files)]
        info = {"id": self.name, "modelId": self.name, "sha": self.commit, "private": False, "siblings": siblings}
        return json.dumps(info).encode()

    def _tree(self) -> bytes:
        files = [
            {"type": "file", "path": path, "size": len(content), "oid": _sha(content)}
            for path, content in sorted(self.files.items())
        ]
        return json.dumps(files).encode()


@dataclass
class Hub:
    """Where it is, for HF_ENDPOINT, and the "owner/name/file" that were downloaded from it."""

    endpoint: str
    downloads: list[str] = field(default_factory=list)


def folder_repository(name: str, *paths: Path) -> Repository:
    """A repository of files, and of what folders hold, at its root."""
    files = {}
    for path in paths:
        found = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
        base = path.parent if path.is_file() else path
        files |= {file.relative_to(base).as_posix(): file.read_bytes() for file in found}
    return Repository(name, files)


@contextmanager
def serve(*repositories: Repository) -> Iterator[Hub]:
    """Serve repositories while the context lasts, `LIFETIME` seconds at most."""

    class Handler(BaseHTTPRequestHandler):
        timeout = SILENCE

        def do_GET(self):
            self.reply(with_content=True)

        def do_HEAD(self):
            self.reply(with_content=False)

        def reply(self, with_content: bool) -> None:
            path = unquote(urlsplit(self.path).path)
            for repository in repositories:
                content = repository.answer(path)
                if content is not None:
                    break
            else:
                self.send_response(404)
                self.send_header("X-Error-Code", "EntryNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(200)
            self.send_header("ETag", f'"{_sha(content)}"')
            self.send_header("X-Repo-Commit", repository.commit)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if with_content:
                if "/resolve/" in path:
                    file = path.partition("/resolve/")[2].partition("/")[2]
                    hub.downloads.append(f"{repository.name}/{file}")
                self.wfile.write(content)

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        hub = Hub(f"http://127.0.0.1:{server.server_port}")
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        limit = threading.Timer(LIFETIME, server.shutdown)
        limit.daemon = True
        limit.start()
        try:
            yield hub
        finally:
            limit.cancel()
            server.shutdown()
            thread.join()


def _sha(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
