# SPDX-License-Identifier: Apache-2.0
"""How many frames go through the UNet at once."""

from __future__ import annotations

import pytest
import torch

from dreammover_pipeline.memory import (
    CPU_FRAMES,
    LARGEST_BATCH,
    affordable_frames,
    free_memory,
    split_evenly,
)

MIB = 2**20
SD15 = {"cells": 64 * 64, "channels": 320}


@pytest.mark.parametrize("count", [1, 2, 7, 32, 33, 100])
@pytest.mark.parametrize("largest", [1, 2, 8, 20, 32, 1000])
def test_batches_are_the_fewest_and_as_equal_as_can_be(count, largest):
    sizes = split_evenly(count, largest)
    assert sum(sizes) == count
    assert max(sizes) <= largest
    assert len(sizes) == (count + largest - 1) // largest
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)


def test_32_by_20_is_two_halves():
    assert split_evenly(32, 20) == [16, 16]
    assert split_evenly(10, 4) == [4, 3, 3]


def test_a_cpu_takes_a_fixed_number():
    cpu = torch.device("cpu")
    assert free_memory(cpu) is None
    assert affordable_frames(cpu, **SD15, dtype=torch.float32) == CPU_FRAMES >= 1


@pytest.fixture
def gpu(monkeypatch):
    """A function that says what the driver of a card reports, whether there is a card or not."""

    def report(free, reserved=0, allocated=0):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 10**12))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: reserved)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: allocated)
        return torch.device("cuda")

    return report


def test_memory_that_torch_holds_without_using_it_is_free(gpu):
    assert free_memory(gpu(free=1000, reserved=500, allocated=200)) == 1300


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_frames_fit_in_the_free_memory_and_leave_some(gpu, dtype):
    # 65 MiB a frame of 512² in float16, as measured, and twice that in float32
    frame = 65 * MIB * dtype.itemsize / 2
    for frames in (2, 10, 40):
        device = gpu(free=int(frames * frame))
        assert 0.75 * frames - 1 < affordable_frames(device, **SD15, dtype=dtype) <= 0.85 * frames


def test_at_least_one_frame_and_never_too_many(gpu):
    assert affordable_frames(gpu(free=0), **SD15, dtype=torch.float16) == 1
    assert affordable_frames(gpu(free=10**12), **SD15, dtype=torch.float16) == LARGEST_BATCH


def test_twice_the_cells_allow_half_the_frames(gpu):
    device = gpu(free=2000 * MIB)
    single = affordable_frames(device, 64 * 64, 320, torch.float16)
    assert affordable_frames(device, 2 * 64 * 64, 320, torch.float16) == single // 2
