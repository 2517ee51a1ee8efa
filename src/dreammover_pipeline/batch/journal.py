# SPDX-License-Identifier: Apache-2.0
"""What all processes together have done so far: in a file, and as a bar."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from tqdm.auto import tqdm


class Journal:
    """A file to which every process adds a line for each pair it made or failed at; for people and progress bars."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._read = path.stat().st_size if path.is_file() else 0

    def append(self, record: Mapping[str, object]) -> None:
        """Add a line, by one write, so that lines of several processes do not mix."""
        line = json.dumps({"time": datetime.now(UTC).isoformat(timespec="milliseconds"), **record}) + "\n"
        file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            os.write(file, line.encode())
        finally:
            os.close(file)

    def news(self) -> list[dict]:
        """The whole lines that came since this was last asked, or since the journal was opened."""
        records = []
        if self.path.is_file():
            with self.path.open("rb") as file:
                file.seek(self._read)
                content = file.read()
            content = content[: content.rfind(b"\n") + 1]
            self._read += len(content)
            for line in content.splitlines():
                with suppress(ValueError):  # what a full disk cut off
                    records.append(json.loads(line))
        return records


class ProgressBar:
    """Progress over the whole set, whichever process makes it, with the time left.

    Args:
        names: of all jobs.
        ended: of those that need no work.
        journal: says what ends elsewhere.
        hidden: show nothing.
    """

    def __init__(self, names: Iterable[str], ended: Iterable[str], journal: Journal, hidden: bool):
        self._names, self._ended = set(names), set(ended)
        self._journal = journal
        self._bar = tqdm(
            total=len(self._names), initial=len(self._ended), desc="Pairs", unit="pair", smoothing=0, disable=hidden
        )

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def update(self, ended: Iterable[str], failed: int) -> None:
        """Count what ended here, so many of it failed, and what the journal says ended elsewhere."""
        ended = self._ended.union(ended, self._names & {record["name"] for record in self._journal.news()})
        self._bar.set_postfix(failed=failed, refresh=False)
        self._bar.update(len(ended) - len(self._ended))
        self._ended = ended
