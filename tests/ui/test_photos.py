# SPDX-License-Identifier: Apache-2.0
"""The photos of a session: each decoded once, and no larger than frames should become."""

import pytest
from PIL import Image
from support.sessions import PREPARING, RENDERING

from dreammover_pipeline.ui import photos as ui_photos
from dreammover_pipeline.ui.photos import MAX_SIDE, DecodedPhotos, load_photo


@pytest.fixture
def decoded(monkeypatch):
    """The names of the files that were decoded, in their order."""
    names, read_photo = [], ui_photos.read_photo

    def counted(file, name):
        names.append(file.name.rpartition("/")[2])
        return read_photo(file, name)

    monkeypatch.setattr(ui_photos, "read_photo", counted)
    return names


def test_large_photos_are_shrunk(tmp_path):
    Image.new("L", (3000, 40)).save(tmp_path / "long.png")
    photo = load_photo(tmp_path / "long.png", "first")
    assert (photo.mode, max(photo.size)) == ("RGB", MAX_SIDE)


def test_a_session_decodes_each_photo_once(session, files, decoded):
    session.mark([files[0], None], [[], []])
    for spots in ([], [(30, 40)], [(30, 40), (50, 60)]):
        session.mark(files, [spots, spots])
    preparing = {**PREPARING, "lora_steps": 0, "spots": [((30, 40), (30, 40))]}
    for seed in (0, 1):
        session.make(files, {**preparing, "seed": seed}, RENDERING, fps=8)
    session.moment(0.5, lambda stage, done, total: None)
    session.mark(files, [[], []])
    assert decoded == ["0.png", "1.png"]


def test_another_photo_takes_the_place_of_the_one_before(files, decoded):
    photos = DecodedPhotos()
    first, last = files
    before = photos.get([first, last])
    after = photos.get([last, last])
    assert decoded == ["0.png", "1.png", "1.png"]
    assert after[1] is before[1]
    assert photos.get([None, last]) == [None, before[1]]
    photos.get([first, last])
    assert decoded == ["0.png", "1.png", "1.png", "0.png"]


def test_a_photo_that_cannot_be_read_does_not_cost_the_other_one(files, decoded):
    photos = DecodedPhotos()
    good = files[1].read_bytes()
    files[1].write_bytes(good[:60])
    with pytest.raises(ValueError, match="the last photo"):
        photos.get(files)
    files[1].write_bytes(good)
    photos.get(files)
    assert decoded == ["0.png", "1.png", "1.png"]


def test_decoded_photos_are_not_changed_by_marking_and_preparing(session, files):
    before = [photo.tobytes() for photo in session._photos.get(files)]
    session.mark(files, [[(30, 40)], [(50, 60)]])
    session.make(files, {**PREPARING, "lora_steps": 0}, RENDERING, fps=8)
    assert [photo.tobytes() for photo in session._photos.get(files)] == before
