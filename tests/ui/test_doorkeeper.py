# SPDX-License-Identifier: Apache-2.0
"""What a request may ask of the page's server: which uploads it takes, and which events."""

import socket
import struct
import sys
import threading
import time
import zlib
from pathlib import Path

import pytest
from PIL import Image
from support.disks import no_room
from support.visits import FILE, UPLOAD, UPLOADED, encoded, png, root_of, shown, upload

pytest.importorskip("gradio", reason="the extra 'demo' is not installed")

from dreammover_pipeline.ui import visitors as ui_visitors
from dreammover_pipeline.ui.photos import MAX_PIXELS, MAX_SIDE

FORM = {"content-type": "multipart/form-data; boundary=x"}
PART = b'--x\r\nContent-Disposition: form-data; name="files"; filename="%s"\r\n\r\n%s\r\n'
JOIN, PREDICT = "/gradio_api/queue/join", "/gradio_api/run/predict"


def chunk(kind, data, check=None):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check or zlib.crc32(kind + data))


@pytest.fixture
def kept(visitor):
    """The files in the server's folder, as a function; the visitor has one upload."""
    (mine,) = upload(visitor, png()).json()
    root = root_of(mine)
    return lambda: {path for path in root.rglob("*") if path.is_file()}


class TestUploads:
    @pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
    def test_the_usual_formats_become_what_every_browser_shows(self, visitor, kind):
        (path,) = upload(visitor, encoded(UPLOADED, kind), f"photo.{kind.lower()}").json()
        answer = visitor.get(FILE + path)
        assert answer.headers["content-type"] == "image/png"
        assert shown(answer).size == UPLOADED.size

    @pytest.mark.parametrize("kind", ["EPS", "ICO", "PPM", "PDF"])
    def test_other_formats_are_not_opened(self, visitor, kept, kind):
        before = kept()
        answer = upload(visitor, encoded(UPLOADED, kind), "photo.png")
        assert answer.status_code == 415
        assert answer.text.startswith("photo.png cannot be read as an image: it is none of JPEG, PNG, ")
        assert kept() == before

    @pytest.mark.parametrize("data", [b"", b"<script>alert(1)</script>", b"<svg xmlns='http://www.w3.org/2000/svg'/>"])
    def test_what_is_no_image_is_not_kept(self, visitor, kept, data):
        before = kept()
        assert upload(visitor, data).status_code == 415
        assert kept() == before

    def test_only_the_picture_of_a_photo_is_kept(self, visitor):
        exif = Image.Exif()
        exif[0x0112], exif[0x010E] = 6, "a secret"  # turned by 90°
        photo = Image.new("RGB", (8, 4), "red")
        (path,) = upload(visitor, encoded(photo, "JPEG", exif=exif) + b"a secret").json()
        answer = visitor.get(FILE + path)
        assert shown(answer).size == (4, 8)
        assert b"a secret" not in answer.content

    def test_a_photo_with_broken_texts_is_taken(self, visitor):
        data = png()
        (path,) = upload(visitor, data[:33] + chunk(b"tEXt", b"a\0b", check=1) + data[33:]).json()
        assert shown(visitor.get(FILE + path)) == UPLOADED

    def test_heic_names_what_is_missing(self, visitor, monkeypatch):
        monkeypatch.setitem(sys.modules, "pillow_heif", None)
        answer = upload(visitor, struct.pack(">I", 24) + b"ftypheic" + bytes(12), "a.heic")
        assert answer.status_code == 415
        assert "pip install 'dreammover-pipeline[heic]'" in answer.text

    def test_heic_becomes_what_every_browser_shows(self, visitor):
        pytest.importorskip("pillow_heif").register_heif_opener()
        (path,) = upload(visitor, encoded(Image.new("RGB", (64, 48), "red"), "HEIF"), "a.heic").json()
        assert shown(visitor.get(FILE + path)).size == (64, 48)

    def test_large_photos_are_shrunk_and_larger_ones_refused_before_they_are_decoded(self, visitor):
        (path,) = upload(visitor, encoded(Image.new("L", (3 * MAX_SIDE, 30)))).json()
        assert shown(visitor.get(FILE + path)).size == (MAX_SIDE, 10)
        header = struct.pack(">IIBBBBB", 2**13 + 1, MAX_PIXELS // 2**13, 8, 2, 0, 0, 0)
        answer = upload(visitor, b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"never decoded"))
        assert answer.status_code == 415
        assert f"too large, at most {MAX_PIXELS} pixels are allowed" in answer.text

    def test_photos_are_decoded_one_at_a_time(self, visitor, monkeypatch):
        running, most, read_photo = set(), [], ui_visitors.read_photo

        def counted(file, name):
            running.add(name)
            most.append(len(running))
            try:
                time.sleep(0.02)  # a chance for the others to overlap
                return read_photo(file, name)
            finally:
                running.discard(name)

        monkeypatch.setattr(ui_visitors, "read_photo", counted)
        threads = [threading.Thread(target=upload, args=(visitor, png(), f"{number}.png")) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
        assert len(most) == 6
        assert max(most) == 1

    def test_their_size_is_limited(self, visitor):
        assert upload(visitor, b"0" * 100_000).status_code == 413
        assert "larger than 0.05 MB" in upload(visitor, b"0" * 60_000).text

        def endless():
            yield b"0"

        assert visitor.post(UPLOAD, content=endless(), headers=FORM).status_code == 411

    @pytest.mark.parametrize("order", [(b"none", png()), (png(), b"none"), (png(), png())])
    def test_several_in_one_request_are_refused_and_leave_nothing(self, visitor, kept, order):
        before = kept()
        files = [("files", (f"{number}.png", data)) for number, data in enumerate(order)]
        assert visitor.post(UPLOAD, files=files).status_code == 400
        assert kept() == before

    def test_one_that_breaks_off_leaves_nothing(self, visitor, kept):
        before = kept()
        head = f"POST {UPLOAD} HTTP/1.1\r\nHost: x\r\nContent-Length: 9000\r\nContent-Type: {FORM['content-type']}\r\n"
        with socket.create_connection((visitor.base_url.host, visitor.base_url.port)) as connection:
            connection.sendall(head.encode() + b"\r\n" + PART % (b"a.png", png()))
        assert upload(visitor, b"none").status_code == 415  # the server has gone on
        assert kept() == before

    @pytest.mark.parametrize(
        "name", [b"", b"..", b"a\0b.png", b"../../../../../tmp/escaped.png", b"a" * 3000 + b".png"]
    )
    def test_no_name_of_a_file_does_any_harm(self, visitor, name):
        (path,) = visitor.post(UPLOAD, content=PART % (name, png()) + b"--x--\r\n", headers=FORM).json()
        assert root_of(path).name.startswith("dreammover-ui-")
        assert shown(visitor.get(FILE + path)) == UPLOADED

    @pytest.mark.parametrize(
        "content", [b"", b"none", b"--x--\r\n", b'--x\r\nContent-Disposition: form-data; name="a"\r\n']
    )
    @pytest.mark.parametrize("headers", [FORM, {"content-type": "multipart/form-data"}, {}])
    def test_what_is_no_upload_is_refused(self, visitor, content, headers):
        assert visitor.post(UPLOAD, content=content, headers=headers).status_code == 400

    def test_their_progress_ends_at_once(self, visitor):
        answer = visitor.get("/gradio_api/upload_progress?upload_id=x")
        assert answer.text == 'data: {"msg": "done"}\n\n'

    @pytest.mark.parametrize(("limit", "value"), [("MAX_STORED", 0), ("MIN_FREE", 2**80)])
    def test_none_is_taken_where_there_is_no_room(self, visitor, kept, monkeypatch, limit, value):
        before = kept()
        monkeypatch.setattr(ui_visitors, limit, value)
        answer = upload(visitor, png())
        assert (answer.status_code, answer.text) == (
            507,
            "There is no room for more files here at the moment; try again later.",
        )
        assert kept() == before

    def test_one_that_cannot_be_written_is_refused_in_words_and_leaves_nothing(self, visitor, kept):
        (mine,) = upload(visitor, png()).json()
        before, uploads = kept(), Path(mine).parents[1]
        number = len(list(uploads.iterdir()))
        with no_room(10):
            answer = upload(visitor, png())
        assert (answer.status_code, answer.text) == (507, "The photo could not be stored: File too large.")
        assert kept() == before
        assert len(list(uploads.iterdir())) == number


class TestEvents:
    @pytest.fixture
    def marking(self, visitor):
        """The number of the event that shows two photos."""
        events = visitor.get("/config").json()["dependencies"]
        return next(event["id"] for event in events if event["targets"][0][1] == "change")

    def send(self, client, number, photo, **more):
        values = [photo and {"meta": {"_type": "gradio.FileData"}, **photo}, None]
        body = {"data": values, "fn_index": number, "session_hash": "tab", **more}
        return client.post(JOIN, json=body)

    def test_they_may_name_the_visitors_own_photos(self, visitor, marking):
        (mine,) = upload(visitor, png()).json()
        assert self.send(visitor, marking, {"path": mine, "url": f"{visitor.base_url}{FILE}{mine}"}).status_code == 200
        assert self.send(visitor, marking, None).status_code == 200

    @pytest.mark.parametrize("path", ["http://example.org/a.png", "/etc/passwd", "\0", "a" * 5000, "", None, 3])
    def test_they_may_not_name_other_files_and_addresses(self, visitor, marking, path):
        assert self.send(visitor, marking, {"path": path}).status_code == 404
        assert self.send(visitor, marking, None, event_data={"value": [{"path": path}]}).status_code == 404

    def test_they_may_not_name_photos_of_another_visitor(self, visitor, another, marking):
        (theirs,) = upload(another, png()).json()
        answer = self.send(visitor, marking, {"path": theirs})
        assert answer.json() == {"detail": "A photo is no longer there; upload the photo again."}

    def test_they_may_not_hold_photos(self, visitor, marking):
        (mine,) = upload(visitor, png()).json()
        assert self.send(visitor, marking, {"path": mine, "url": "data:image/png;base64,AAAA"}).status_code == 400

    @pytest.mark.parametrize("path", [JOIN, PREDICT])
    @pytest.mark.parametrize("number", [999, -1, "x", None])
    def test_unknown_ones_are_refused(self, visitor, path, number):
        assert visitor.post(path, json={"data": [], "fn_index": number}).status_code == 404

    @pytest.mark.parametrize("path", [JOIN, PREDICT])
    @pytest.mark.parametrize(
        "content",
        [b"", b"none", b"[]", b"{}", b'{"data": []}', b'{"data": [], "fn_index": []}', b"\xff", b"[" * 10**5],
    )
    def test_what_is_no_event_is_refused(self, visitor, path, content):
        headers = {"content-type": "application/json"}
        assert visitor.post(path, content=content, headers=headers).status_code == 400

    @pytest.mark.parametrize("path", [JOIN, PREDICT])
    def test_too_few_values_and_too_many_bytes_are_refused(self, visitor, marking, path):
        assert visitor.post(path, json={"data": [None], "fn_index": marking}).status_code == 404
        assert visitor.post(path, json={"data": ["a" * 2**20, None], "fn_index": marking}).status_code == 413
