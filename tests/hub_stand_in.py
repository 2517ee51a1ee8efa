# SPDX-License-Identifier: Apache-2.0
"""A stand-in for the Hugging Face Hub: one repository of small files, served on loopback out of memory.

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
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

LIFETIME = 300  # seconds after which it stops by itself, whatever its user does


@dataclass
class HubRepository:
    """A model repository with one commit, and which of its files were asked for.

    Args:
        name: "owner/name".
        files: path in the repository → content.
    """

    name: str
    files: Mapping[str, bytes]
    endpoint: str = ""
    downloads: list[str] = field(default_factory=list)

    @property
    def commit(self) -> str:
        return hashlib.sha1(b"".join(path.encode() + self.files[path] for path in sorted(self.files))).hexdigest()

    def info(self) -> dict:
        siblings = [{"rfilename": path} for path in sorted(self.files)]
        return {"id": self.name, "modelId": self.name, "sha": self.commit, "private": False, "siblings": siblings}

    def tree(self) -> list[dict]:
        return [
            {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            for path, content in sorted(self.files.items())
        ]

    def find(self, path: str) -> tuple[str, bytes] | None:
        """ETag and content of a URL's path; None where there is nothing."""
        api, resolve = f"/api/models/{self.name}", f"/{self.name}/resolve/"
        revisions = ("main", self.commit)
        if path in (api, *(f"{api}/revision/{revision}" for revision in revisions)):
            content = json.dumps(self.info()).encode()
        elif path in [f"{api}/tree/{revision}" for revision in revisions]:
            content = json.dumps(self.tree()).encode()
        elif path.startswith(resolve):
            revision, _, name = path.removeprefix(resolve).partition("/")
            if revision not in revisions or name not in self.files:
                return None
            content = self.files[name]
        else:
            return None
        return hashlib.sha1(content).hexdigest(), content


@contextmanager
def serve(name: str, files: Mapping[str, bytes]) -> Iterator[HubRepository]:
    """Serve a repository while the context lasts, `LIFETIME` seconds at most; its `endpoint` goes to HF_ENDPOINT."""
    repository = HubRepository(name, files)

    class Handler(BaseHTTPRequestHandler):
        timeout = 10  # seconds a connection may stay silent

        def do_GET(self):
            path = unquote(urlsplit(self.path).path)
            found = repository.find(path)
            if found is None:
                self.send_response(404)
                self.send_header("X-Error-Code", "EntryNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            etag, content = found
            self.send_response(200)
            self.send_header("ETag", f'"{etag}"')
            self.send_header("X-Repo-Commit", repository.commit)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)
                if "/resolve/" in path:
                    repository.downloads.append(path.rpartition("/")[2])

        do_HEAD = do_GET  # noqa: N815, likewise

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        repository.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        limit = threading.Timer(LIFETIME, server.shutdown)
        limit.daemon = True
        limit.start()
        try:
            yield repository
        finally:
            limit.cancel()
            server.shutdown()
            thread.join()
