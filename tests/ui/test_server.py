# SPDX-License-Identifier: Apache-2.0
"""The web page's server, asked over plain HTTP: whose files it gives to whom, what it takes, what it leaves behind."""

import os
import re
import shutil
import socket
import time
import tomllib
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from support import forked
from support.ports import free_port
from support.visits import FILE, UPLOADED, png, raw_status, root_of, shown, upload

pytest.importorskip("gradio", reason="the extra 'demo' is not installed")
import gradio
import httpx
import yaml

from dreammover_pipeline import DreamMoverPipeline
from dreammover_pipeline.cli.main import main
from dreammover_pipeline.ui.serving import serving
from dreammover_pipeline.ui.visitors import COOKIE

ROOT = Path(__file__).parents[2]
SPACE = ROOT / "examples" / "space"


def test_it_listens_on_loopback_only(address):
    assert urlsplit(address).hostname == "127.0.0.1"


def test_a_visitor_is_known_by_a_cookie_no_script_can_read(address):
    page = httpx.get(address, trust_env=False)
    cookie = page.headers["set-cookie"]
    assert re.match(rf"{COOKIE}=[\w-]{{43}}; Path=/; HttpOnly; SameSite=Lax$", cookie)
    assert page.cookies[COOKIE] != httpx.get(address, trust_env=False).cookies[COOKIE]
    forwarded = httpx.get(address, headers={"x-forwarded-proto": "https"}, trust_env=False).headers["set-cookie"]
    assert "Secure; SameSite=None; Partitioned" in forwarded


def test_an_upload_is_its_visitors_alone(visitor, another, address):
    (path,) = upload(visitor, png()).json()
    assert shown(visitor.get(FILE + path)) == UPLOADED
    assert another.get(FILE + path).status_code == 404
    assert httpx.get(f"{address.rstrip('/')}{FILE}{path}", trust_env=False).status_code == 404
    assert visitor.cookies[COOKIE] not in path


def test_equal_uploads_lie_apart(visitor, another):
    (mine,), (theirs,) = upload(visitor, png("blue")).json(), upload(another, png("blue")).json()
    assert mine != theirs
    assert visitor.get(FILE + theirs).status_code == 404
    assert another.get(FILE + theirs).status_code == 200


def test_no_path_escapes(visitor, another):
    (mine,), (theirs,) = upload(visitor, png()).json(), upload(another, png()).json()
    folder, visitors = Path(mine).parent, root_of(mine) / "visitors"
    upwards, inside = os.path.relpath(theirs, folder), Path(theirs).relative_to(visitors)
    assert raw_status(visitor, FILE + mine) == 200
    for path in (
        theirs,
        f"{folder}/{upwards}",
        f"{folder}/{upwards}".replace("..", "%2e%2e"),
        f"{folder}/{upwards}".replace("..", "%252e%252e"),
        f"{visitors}/%252f/../{inside}",  # what is decoded twice in one place and once in the other
        f"{visitors}/%2f/../{inside}",
        os.path.relpath(theirs),
        "/etc/passwd",
        "%00",
        f"{folder}/%00",
        "a" * 300,
        f"{folder}/{'a/' * 1000}",
        f"{folder}/../../../../../../etc/passwd",
        os.path.relpath("/etc/passwd"),
        f"{visitors}",
        "http://127.0.0.1:1/",
        "https://example.org/",
    ):
        assert raw_status(visitor, FILE + path) in (403, 404), path
        assert raw_status(visitor, f"/gradio_api/file/{path}") in (403, 404), path


def test_nothing_else_in_the_servers_folder_is_anyones(visitor):
    (mine,) = upload(visitor, png()).json()
    for name in ("stray.png", "examples.png", "visitors/stray.png"):
        path = root_of(mine) / name
        path.write_bytes(png())
        assert visitor.get(f"{FILE}{path}").status_code == 404


@pytest.mark.parametrize("path", ["/static/%00", "/assets/%00", f"/static/{'a' * 300}", f"/assets/{'a' * 300}"])
def test_names_that_no_file_can_have_are_not_looked_for(visitor, path):
    assert raw_status(visitor, path) == 404


def test_examples_are_everyones(visitor):
    (mine,) = upload(visitor, png()).json()
    for example in ("robot/0.png", "box/0.jpg"):
        assert visitor.get(f"{FILE}{root_of(mine)}/examples/{example}").status_code == 200


@pytest.mark.parametrize(
    "path", ["deep_link?session_hash=x", "proxy=https://huggingface.co/", "call/make", "api/make", "openapi.json"]
)
def test_what_the_page_does_not_need_is_closed(visitor, path):
    for answer in (visitor.get(f"/gradio_api/{path}"), visitor.post(f"/gradio_api/{path}")):
        assert answer.text == "There is nothing here for you."


def test_events_cannot_be_called_by_name(visitor):
    names = visitor.get("/gradio_api/info").json()["named_endpoints"]
    assert names == {}


def test_nothing_is_left_when_the_server_ends(session_components):
    pipe = DreamMoverPipeline(**session_components, requires_safety_checker=False)
    before = os.environ.get("GRADIO_TEMP_DIR")
    with serving(pipe, "127.0.0.1", free_port(), 1, {}) as address:
        with httpx.Client(base_url=address, trust_env=False) as client:
            client.get("/")
            (path,) = upload(client, png()).json()
        assert root_of(path).is_dir()
    assert not root_of(path).exists()
    assert os.environ.get("GRADIO_TEMP_DIR") == before
    with pytest.raises(httpx.ConnectError):
        httpx.get(address, trust_env=False)


def test_a_space_needs_what_the_package_needs():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = {*project["dependencies"], *project["optional-dependencies"]["demo"]}
    assert set((SPACE / "requirements.txt").read_text().split()) == needed
    card = yaml.safe_load((SPACE / "README.md").read_text().split("---")[1])
    assert (card["sdk"], card["app_file"], card["license"]) == ("gradio", "app.py", "apache-2.0")
    assert card["sdk_version"] == gradio.__version__
    assert len(card["short_description"]) <= 60


def test_a_space_put_together_as_its_card_says_serves_and_ends(tmp_path):
    space = tmp_path / "space"
    shutil.copytree(SPACE, space)
    shutil.copytree(ROOT / "src" / "dreammover_pipeline", space / "dreammover_pipeline")
    (tmp_path / "temporary").mkdir()
    port = free_port()
    settings = {"DREAMMOVER_MODEL": "tiny", "GRADIO_SERVER_PORT": str(port), "TMPDIR": str(tmp_path / "temporary")}
    process = forked.program(space / "app.py", [], {**os.environ, **settings}, space, tmp_path / "log")
    try:
        while "DreamMover is at" not in process.printed()[0]:
            assert process.poll() is None, process.printed()
            time.sleep(0.05)
        assert "DreamMover" in httpx.get(f"http://127.0.0.1:{port}/", trust_env=False).text
        assert len(list((tmp_path / "temporary").glob("dreammover-ui-*"))) == 1
        process.terminate()
        process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0
    assert not list((tmp_path / "temporary").glob("dreammover-ui-*"))


@pytest.mark.usefixtures("restored_logging")
@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ("--port 0", "'0' is no port"),
        ("--port many", "'many' is no port"),
        ("--max-upload-mb -1", "'-1' is no size"),
        ("--max-upload-mb nan", "'nan' is no size"),
        ("--model nowhere", "'nowhere' is no file or folder here"),
        ("--model tiny --host 192.0.2.1", "cannot serve at 192.0.2.1, port 7860"),  # an address of no machine
        ("--model tiny --host no.such.host.invalid", "choose another --host"),
        ("--share", "unrecognized arguments"),
    ],
)
def test_bad_options_are_one_line(capsys, options, reason):
    assert main(["ui", *options.split()]) == 2
    assert reason in capsys.readouterr().err


@pytest.mark.usefixtures("restored_logging")
def test_a_port_that_is_taken_is_found_before_the_model_is_loaded(capsys):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        # The model is a folder without one, which loading would complain of first.
        assert main(["ui", "--model", str(Path(__file__).parent), "--port", str(port)]) == 2
    assert f"cannot serve at 127.0.0.1, port {port}" in capsys.readouterr().err


@pytest.mark.usefixtures("restored_logging")
def test_without_an_ffmpeg_that_encodes_no_page_is_served(capsys, program):
    program("exit 1")
    assert main(["ui", "--model", "tiny"]) == 1
    assert "does not work as ffmpeg" in capsys.readouterr().err
