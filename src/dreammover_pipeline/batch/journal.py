# SPDX-License-Identifier: Apache-2.0
"""What all processes together have done so far, kept in a file and shown as a progress bar."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from tqdm.auto import tqdm


class Journal:
    """A file with a line for each pair that some process made or failed to make.

    People and progress bars read it. Nothing else depends on it: whether a video is done is decided by its sidecar.

    Args:
        path: The file. Its folder is made where it does not exist, and so is the file with its first line.
    """

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._read = path.stat().st_size if path.is_file() else 0

    def append(self, record: Mapping[str, object]) -> None:
        """Add a line. It is written at one stroke, so that the lines of several processes do not mix."""
        line = json.dumps({"time": datetime.now(UTC).isoformat(timespec="milliseconds"), **record}) + "\n"
        file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            os.write(file, line.encode())
        finally:
            os.close(file)

    def news(self) -> list[dict]:
        """The whole lines that were added since the previous call, or since the journal was opened.

        Lines that are damaged, as a full disk or a power cut may leave them, are left out.
        """
        records = []
        if self.path.is_file():
            with self.path.open("rb") as file:
                file.seek(self._read)
                content = file.read()
            content = content[: content.rfind(b"\n") + 1]
            self._read += len(content)
            for line in content.splitlines():
                with suppress(ValueError, RecursionError):
                    record = json.loads(line)
                    if isinstance(record, dict) and isinstance(record.get("name"), str):
                        records.append(record)
        return records


class ProgressBar:
    """How many of all jobs have ended, in whichever process, and how long the rest will take.

    Args:
        names: The names of all jobs.
        ended: The names of those jobs that need no work.
        journal: The journal, which tells what other processes have done.
        hidden: Whether the bar is not shown.
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
        """Show the progress of this moment; what other processes have done is read from the journal.

        Args:
            ended: The names of all jobs that this process knows to have ended.
            failed: How many of these failed.
        """
        ended = self._ended.union(ended, self._names & {record["name"] for record in self._journal.news()})
        self._bar.set_postfix(failed=failed, refresh=False)
        self._bar.update(len(ended) - len(self._ended))
        self._ended = ended
