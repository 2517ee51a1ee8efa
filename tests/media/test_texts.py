# SPDX-License-Identifier: Apache-2.0
"""Text files are written whole or not at all."""

import pytest
from support.disks import no_room

from dreammover_pipeline.media.texts import read_text, write_text


def test_a_text_comes_back_as_it_was_written(tmp_path):
    text = "Größe\nδ = ½\n"
    write_text(tmp_path / "a.md", "before")
    write_text(tmp_path / "a.md", text)
    assert (tmp_path / "a.md").read_bytes() == text.encode()
    assert read_text(tmp_path / "a.md") == text
    assert [path.name for path in tmp_path.iterdir()] == ["a.md"]


def test_a_text_that_finds_no_room_leaves_the_one_before(tmp_path):
    path = tmp_path / "a.md"
    write_text(path, "before")
    with no_room(1000), pytest.raises(OSError, match="File too large"):
        write_text(path, "x" * 2000)
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]
