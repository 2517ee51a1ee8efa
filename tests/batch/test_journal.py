# SPDX-License-Identifier: Apache-2.0
"""The journal that several processes write and read."""

import pytest

from dreammover_pipeline.batch.journal import Journal, ProgressBar


def test_the_journal_gives_whole_lines_once(tmp_path):
    path = tmp_path / "journal.jsonl"
    early = Journal(path)
    early.append({"name": "a"})
    late = Journal(path)
    early.append({"name": "b"})
    with path.open("a") as file:
        file.write('{"name": "cut')
    assert [record["name"] for record in early.news()] == ["a", "b"]
    assert [record["name"] for record in late.news()] == ["b"]
    late.append({"name": "c"})  # spoilt by the line that was cut off
    late.append({"name": "d"})
    assert [record["name"] for record in early.news()] == ["d"]
    assert early.news() == []


@pytest.mark.parametrize(
    "line", [b"3", b"[]", b"{}", b"null", b'{"name": []}', b"\0\0\0", b'{"name": "\xff"}', b"[" * 100_000]
)
def test_damaged_lines_are_left_out(tmp_path, line):
    path = tmp_path / "journal.jsonl"
    journal, shown = Journal(path), Journal(path)
    path.write_bytes(line + b"\n")
    journal.append({"name": "a"})
    with ProgressBar(["a", "b"], [], shown, hidden=True) as bar:
        bar.update([], 0)
    assert [record["name"] for record in journal.news()] == ["a"]
