# SPDX-License-Identifier: Apache-2.0
"""The journal that several processes write and read."""

from dreammover_pipeline.batch.journal import Journal


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
