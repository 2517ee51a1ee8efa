# SPDX-License-Identifier: Apache-2.0
"""What visitors of the page's server ask of it over plain HTTP."""

import http.client
import io
from pathlib import Path

from PIL import Image

FILE, UPLOAD = "/gradio_api/file=", "/gradio_api/upload"
COOKIE = "dreammover_visitor"
UPLOADED = Image.new("RGB", (8, 8), "red")


def encoded(picture, kind="PNG", **options):
    """The bytes of a picture's file."""
    data = io.BytesIO()
    picture.save(data, kind, **options)
    return data.getvalue()


def png(colour="red"):
    """The file of a small picture, `UPLOADED` if it is red."""
    return encoded(Image.new("RGB", (8, 8), colour))


def upload(client, data, name="photo.png"):
    """The server's answer to an upload."""
    return client.post(UPLOAD, files={"files": (name, data)})


def shown(answer):
    """The picture in an answer of the server."""
    return Image.open(io.BytesIO(answer.content)).convert("RGB")


def root_of(path):
    """The server's folder, by the path of an upload."""
    return Path(path).parents[4]


def raw_status(client, path):
    """What the server says to a path as it is; httpx would take its dots and percent signs away."""
    connection = http.client.HTTPConnection(client.base_url.host, client.base_url.port)
    connection.request("GET", path, headers={"Cookie": f"{COOKIE}={client.cookies[COOKIE]}"})
    try:
        return connection.getresponse().status
    finally:
        connection.close()
