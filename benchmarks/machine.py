# SPDX-License-Identifier: Apache-2.0
"""The machine that figures were measured on."""

from __future__ import annotations

import datetime
import os
import platform
from importlib.metadata import version

import torch

from dreammover_pipeline import __version__

PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate")


def describe(device: torch.device) -> dict:
    """The device, how busy the machine is, and the versions of packages; nothing that names a host or a person."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "system": platform.system(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "dreammover-pipeline": __version__,
        **{name: version(name) for name in PACKAGES},
    }
