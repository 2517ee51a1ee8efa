# SPDX-License-Identifier: Apache-2.0
"""How many frames go through the UNet at once, and how an exhausted memory is recognised."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from dreammover_pipeline.memory import (
    CPU_FRAMES,
    LARGEST_BATCH,
    Batches,
    advice_on_out_of_memory,
    affordable_frames,
    affords_fit,
    free_memory,
    is_out_of_memory,
    split_evenly,
)

DOCUMENT = Path(__file__).parent.parent / "docs" / "memory.md"
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
    # 65 MiB a frame of 512² in float16, as counted, and twice that in float32
    frame = 65 * MIB * dtype.itemsize / 2
    for frames in (2, 10, 40):
        device = gpu(free=int(frames * frame))
        # beside the two photos, which go first
        assert max(0.75 * frames - 3, 0) < affordable_frames(device, **SD15, dtype=dtype) <= max(0.85 * frames - 2, 1)


def test_at_least_one_frame_and_never_too_many(gpu):
    assert affordable_frames(gpu(free=0), **SD15, dtype=torch.float16) == 1
    assert affordable_frames(gpu(free=10**12), **SD15, dtype=torch.float16) == LARGEST_BATCH


def test_twice_the_cells_allow_half_the_frames(gpu):
    device = gpu(free=2000 * MIB)
    single = affordable_frames(device, 64 * 64, 320, torch.float16)
    assert affordable_frames(device, 2 * 64 * 64, 320, torch.float16) == (single + 2) // 2 - 2


def test_weights_that_will_be_moved_in_are_not_free(gpu):
    weights = 1640 * MIB
    left = affordable_frames(gpu(free=3000 * MIB - weights), **SD15, dtype=torch.float16)
    device = gpu(free=3000 * MIB)
    assert affordable_frames(device, **SD15, dtype=torch.float16, weights_to_come=weights) == left
    assert affordable_frames(device, **SD15, dtype=torch.float16, weights_to_come=4000 * MIB) == 1


def test_a_fit_keeps_its_activations_where_they_fit(gpu):
    # 1749 MiB at 512² in float16, as counted
    assert affords_fit(torch.device("cpu"), **SD15, dtype=torch.float32)
    assert affords_fit(gpu(free=2200 * MIB), **SD15, dtype=torch.float16)
    assert not affords_fit(gpu(free=2150 * MIB), **SD15, dtype=torch.float16)
    assert not affords_fit(gpu(free=2200 * MIB), **SD15, dtype=torch.float16, weights_to_come=100 * MIB)
    assert not affords_fit(gpu(free=2200 * MIB), 2 * 64 * 64, 320, torch.float16)
    assert not affords_fit(gpu(free=2200 * MIB), **SD15, dtype=torch.float32)


def documented(table):
    """Rows (GB of a card, entries for 512², 768² and 1024²) of a table in docs/memory.md."""
    text = DOCUMENT.read_text(encoding="utf-8").partition(f"<!-- table: {table} -->")[2].partition("\n\n")[0]
    rows = re.findall(r"^\| (\d+) GB \| (.+?) \| (.+?) \| (.+?) \|$", text, re.MULTILINE)
    assert [row[0] for row in rows] == ["4", "6", "8", "12", "16"]
    return [(int(card) * 1024, dict(zip((64, 96, 128), entries, strict=True))) for card, *entries in rows]


def test_the_documented_frames_are_what_is_chosen(gpu):
    for card, entries in documented("frames"):
        for side, entry in entries.items():
            sizes = [
                affordable_frames(gpu(free=(card - 512 - resident) * MIB), side * side, 320, torch.float16, to_come)
                for resident, to_come in ((2034 + 178, 0), (0, 1639 * MIB))
            ]
            assert entry == f"{sizes[0]} / {sizes[1]}"


def test_the_documented_fits_are_what_is_chosen(gpu):
    counted = {64: 439, 96: 991, 128: 1762}  # with gradient checkpointing, in that page's first table
    for card, entries in documented("fit"):
        for side, entry in entries.items():
            free = card - 512 - 2034
            kept = affords_fit(gpu(free=free * MIB), side * side, 320, torch.float16)
            assert entry == ("kept" if kept else "again" if counted[side] < free else "too large")


# ── Out of memory ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_what_this_cpu_raises_is_recognised():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    assert is_out_of_memory(caught.value)


@pytest.mark.parametrize(
    ("error", "exhausted"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 8.89 GB, max allowed: 9.07 GB)."), True),
        (RuntimeError("Invalid buffer size: 16.00 GiB"), True),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."), True),  # Windows
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"), False),
        (ValueError("MPS backend out of memory"), False),
        (KeyboardInterrupt(), False),
    ],
    ids=str,
)
def test_out_of_memory_is_told_from_other_errors(error, exhausted):
    assert is_out_of_memory(error) == exhausted


def test_advice_goes_with_the_error_and_with_no_other():
    with (
        pytest.raises(
            torch.OutOfMemoryError, match=r"out of memory in the test; try .*height.*enable_model_cpu_offload"
        ),
        advice_on_out_of_memory("in the test"),
    ):
        torch.empty(2**60)
    other = RuntimeError("no")
    with pytest.raises(RuntimeError) as caught, advice_on_out_of_memory("in the test"):
        raise other
    assert caught.value is other


class Fitting:
    """Doubles numbers, of which only so many fit at once; keeps what it was called with."""

    def __init__(self, fits: int):
        self.fits, self.sizes = fits, []

    def __call__(self, x, y):
        self.sizes.append(len(x))
        if len(x) > self.fits:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return 2 * x if y is None else x + y


@pytest.mark.parametrize("second", ["none", "same"])
@pytest.mark.parametrize(
    ("frames", "largest", "fits", "sizes"),
    [
        (8, 8, 8, [8]),
        (8, 8, 3, [8, 4, 2, 2, 2, 2]),
        (10, 64, 4, [10, 5, 3, 3, 2, 2]),
        (7, 3, 1, [3, 2, 1, 1, 1, 1, 1, 1, 1]),
    ],
)
def test_batches_are_halved_until_they_fit(frames, largest, fits, sizes, second):
    x = torch.arange(frames)
    double, batches = Fitting(fits), Batches(largest)
    assert torch.equal(batches.map(double, x, x if second == "same" else None), 2 * x)
    assert double.sizes == sizes
    assert batches.largest <= max(fits, largest)
    double.sizes.clear()
    batches.map(double, x, x)
    assert double.sizes == split_evenly(frames, batches.largest)


def test_where_one_is_too_many_the_error_passes():
    with pytest.raises(torch.OutOfMemoryError):
        Batches(4).map(Fitting(0), torch.arange(4), None)
