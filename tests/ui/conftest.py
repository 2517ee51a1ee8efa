# SPDX-License-Identifier: Apache-2.0
"""Sessions of the page, without the page and without Gradio; and the page's server with two visitors."""

import pytest
from support.ports import free_port


@pytest.fixture
def studio(pipe, tmp_path):
    from dreammover_pipeline.ui.studio import Studio
    from dreammover_pipeline.ui.visitors import Visitors

    return Studio(pipe, Visitors(tmp_path))


@pytest.fixture
def session(studio):
    return studio.session("cookie", "tab")


@pytest.fixture
def files(photos, tmp_path_factory):
    """Two photos as files."""
    folder = tmp_path_factory.mktemp("photos")
    paths = [folder / "0.png", folder / "1.png"]
    for photo, path in zip(photos, paths, strict=True):
        photo.save(path)
    return paths


@pytest.fixture(scope="module")
def address(session_components):
    """A server that takes uploads of 0.05 MB."""
    pytest.importorskip("gradio", reason="the extra 'demo' is not installed")
    from dreammover_pipeline import DreamMoverPipeline
    from dreammover_pipeline.ui.serving import serving

    pipe = DreamMoverPipeline(**session_components, requires_safety_checker=False)
    with serving(pipe, "127.0.0.1", free_port(), 0.05, {}) as address:
        yield address


@pytest.fixture
def visitor(address):
    yield from arrived(address)


@pytest.fixture
def another(address):
    yield from arrived(address)


def arrived(address):
    import httpx

    with httpx.Client(base_url=address, trust_env=False) as client:
        client.get("/")
        yield client
