# SPDX-License-Identifier: Apache-2.0
"""Sessions of the page, without the page and without Gradio."""

import pytest


@pytest.fixture
def studio(pipe, tmp_path):
    pytest.importorskip("starlette", reason="the extra 'demo' is not installed")
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
