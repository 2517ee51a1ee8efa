# SPDX-License-Identifier: Apache-2.0
"""The sessions of everyone who has the page open, and the pipeline that serves them one after the other."""

from __future__ import annotations

import secrets
import shutil
import threading
import time
from pathlib import Path

from ..pipeline import DreamMoverPipeline
from .session import Session, StoppedError
from .visitors import Visitors

MAX_SESSIONS = 10  # number of sessions that a visitor may have; each may keep up to three prepared pairs in memory
STRAY = 600  # seconds without an upload after which the files of a visitor who has no session are removed
IDLE = 12 * 3600  # seconds without a request after which a session is closed, although its page was never closed


class Studio:
    """The pipeline and everyone's sessions.

    Args:
        pipe: the pipeline that all sessions share; it does one job at a time.
        visitors: the visitors, inside whose folders the folders of their sessions lie.
    """

    def __init__(self, pipe: DreamMoverPipeline, visitors: Visitors):
        self.pipe, self.visitors = pipe, visitors
        self.pipeline_lock = threading.Lock()  # held by the session whose job the pipeline is doing
        self._sessions: dict[tuple[Path, str], Session] = {}  # by the visitor's folder and the session's name
        self._sessions_lock = threading.Lock()
        self._closed = False

    def session(self, cookie: str, name: str) -> Session:
        """The session of this name of the visitor with this cookie; a new one where there is none yet.

        Where the visitor has more than `MAX_SESSIONS` then, the one that was not used for the longest time is closed.

        Raises:
            StoppedError: the server is being stopped.
        """
        self._close_idle()
        visitor = self.visitors.folder(cookie)
        with self._sessions_lock:
            if self._closed:  # a job that was waiting would otherwise begin while the others are being stopped
                raise StoppedError
            new = Session(self.pipe, self.pipeline_lock, visitor / secrets.token_hex(16))
            session = self._sessions.setdefault((visitor, name), new)
            session.used = time.monotonic()
            used = {key: open_.used for key, open_ in self._sessions.items() if key[0] == visitor}
        for key in sorted(used, key=used.get)[:-MAX_SESSIONS]:
            self._close(key)
        return session

    def close(self, cookie: str, name: str) -> None:
        """End a session: its job stops and its files go. A visitor's uploads go with the visitor's last session."""
        self._close((self.visitors.folder(cookie), name))

    def close_all(self) -> None:
        """End all sessions, and let no other begin."""
        with self._sessions_lock:
            self._closed = True
        for session in list(self._sessions.values()):  # every job is stopped before the end of any is waited for
            session.leave()
        for key in list(self._sessions):
            self._close(key)

    def _close(self, key: tuple[Path, str]) -> None:
        with self._sessions_lock:
            session = self._sessions.pop(key, None)
        if session is not None:
            session.close()
        with self._sessions_lock:
            if all(visitor != key[0] for visitor, _ in self._sessions):
                shutil.rmtree(key[0], ignore_errors=True)

    def _close_idle(self) -> None:
        """End the sessions that were not used for `IDLE` seconds, and remove folders that no session needs."""
        now = time.monotonic()
        for key in [key for key, session in list(self._sessions.items()) if now - session.used > IDLE]:
            self._close(key)
        self.visitors.remove_strays({visitor for visitor, _ in list(self._sessions)}, STRAY)
