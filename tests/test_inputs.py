# SPDX-License-Identifier: Apache-2.0
"""Every wrong argument is refused by name, and every right one understood."""

from __future__ import annotations

import os
import socket
from fractions import Fraction

import numpy as np
import pytest
import torch
from support.errors import refuses

from dreammover_pipeline.inputs import (
    check_attention_blocks,
    check_attention_blocks_exist,
    check_choice,
    check_file_place,
    check_integer,
    check_number,
    check_steps,
    check_text,
    file_fault,
    frame_times,
)

NAN, INFINITE = float("nan"), float("inf")


@pytest.mark.parametrize("value", [True, 1.0, "1", None, [1]])
def test_check_integer_refuses_other_types(value):
    refuses(TypeError, "n", check_integer, "n", value, 0)


@pytest.mark.parametrize(("value", "minimum"), [(0, 1), (-1, 0)])
def test_check_integer_refuses_less_than_the_minimum(value, minimum):
    refuses(ValueError, "n", check_integer, "n", value, minimum)
    check_integer("n", minimum, minimum)


@pytest.mark.parametrize("value", [True, "1", None, [1.0], 1j])
def test_check_number_refuses_other_types(value):
    refuses(TypeError, "x", check_number, "x", value, 0)


@pytest.mark.parametrize("value", [-0.1, -1, NAN, INFINITE, -INFINITE])
def test_check_number_refuses_what_is_out_of_range(value):
    refuses(ValueError, "x", check_number, "x", value, 0)


@pytest.mark.parametrize("value", [10**400, 10**5000], ids=["400", "5000"])
def test_numbers_of_many_digits_are_refused_by_name(value):
    for limit in (10, INFINITE):
        with pytest.raises(ValueError, match=r"`x` must be at most .*, not a number of about \d+ digits"):
            check_number("x", value, 0, maximum=limit)
    with pytest.raises(ValueError, match=r"`n` must be at most 10, not a number of about \d+ digits"):
        check_integer("n", value, 0, 10)
    with pytest.raises(ValueError, match=r"`n` must be at least 0, not a number of about \d+ digits"):
        check_integer("n", -value, 0)
    refuses(ValueError, "times", frame_times, 1, [10**5000])


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("number", [np.float16(0.5), np.float32(0.5), np.float64(0.5), np.longdouble(0.5)])
def test_numbers_of_numpy_are_checked_without_a_warning(number):
    check_number("x", number, 0)
    with pytest.raises(ValueError, match=r"`x` must be at most 0.25, not 0.5"):
        check_number("x", number, 0, maximum=0.25)


def test_check_number_may_leave_its_minimum_out():
    check_number("x", 0, 0)
    check_number("x", 1e-9, 0, inclusive=False)
    refuses(ValueError, "x", check_number, "x", 0, 0, inclusive=False)
    refuses(ValueError, "x", check_number, "x", 0.0, 0, inclusive=False)


@pytest.mark.parametrize("value", ["c", "A", "", None, 1, ["a"], np.array(["a", "b"])], ids=repr)
def test_check_choice_says_what_is_allowed(value):
    check_choice("kind", "a", ("a", "b"))
    with pytest.raises(ValueError, match="`kind` must be one of 'a', 'b', not"):
        check_choice("kind", value, ("a", "b"))


@pytest.mark.parametrize("steps", [(50, 30, 14), (50, 50, 50), (1, 1, 1), (1000, 1, 1)])
def test_check_steps_lets_nested_steps_pass(steps):
    check_steps(*steps)


@pytest.mark.parametrize("steps", [(50, 51, 14), (50, 30, 31)])
def test_check_steps_refuses_the_rest(steps):
    with pytest.raises(ValueError, match="the steps must nest"):
        check_steps(*steps)


@pytest.mark.parametrize("n", [1, 2, 3, 32])
def test_frames_are_evenly_spaced_between_the_images(n):
    assert frame_times(n, None) == tuple(float(Fraction(i, n + 1)) for i in range(1, n + 1))


@pytest.mark.parametrize(
    "times", [[0.5], (0.1, 0.9), np.linspace(0.1, 0.9, 5), torch.tensor([0.25, 0.75]), [0.9, 0.1]]
)
def test_times_are_taken_as_they_come(times):
    result = frame_times(None, times)
    assert result == tuple(float(time) for time in times)
    assert all(type(time) is float for time in result)


@pytest.mark.parametrize(
    ("n_frames", "times", "error", "name"),
    [
        (0, None, ValueError, "n_frames"),
        (-1, None, ValueError, "n_frames"),
        (3.0, None, TypeError, "n_frames"),
        (True, None, TypeError, "n_frames"),
        (None, None, TypeError, "n_frames"),
        (3, [], ValueError, "times"),
        (3, [0.0, 0.5], ValueError, "times"),
        (3, [0.5, 1.0], ValueError, "times"),
        (3, [-0.1], ValueError, "times"),
        (3, [1.5], ValueError, "times"),
        (3, [NAN], ValueError, "times"),
        (3, [INFINITE], ValueError, "times"),
        (3, 0.5, TypeError, "times"),
        (3, ["a"], TypeError, "times"),
        (3, iter([0.5]), TypeError, "times"),
        (3, [None], TypeError, "times"),
        # strictly inside for a float, but an end in the float32 that frames are made in
        (3, [1 - 1e-9], ValueError, "times"),
        (3, [1e-60], ValueError, "times"),
    ],
)
def test_frame_times_refuses_the_rest(n_frames, times, error, name):
    refuses(error, name, frame_times, n_frames, times)


@pytest.mark.parametrize("blocks", [(2, 3), [3], (), (1, 2), (0, 1), range(1, 3), np.array([2, 3])])
def test_attention_blocks_that_exist_pass(blocks):
    check_attention_blocks(blocks)
    check_attention_blocks_exist(blocks, [0, 3, 3, 3])


@pytest.mark.parametrize(
    ("blocks", "error"),
    [
        ("23", TypeError),
        (2, TypeError),
        (None, TypeError),
        (2.0, TypeError),
        ((2.0,), TypeError),
        ((True,), TypeError),
        (("2",), TypeError),
        ((4,), ValueError),
        ((2, -1), ValueError),
        ((0,), ValueError),
    ],
)
def test_attention_blocks_that_do_not_exist_are_refused(blocks, error):
    def check(blocks):
        check_attention_blocks(blocks)
        check_attention_blocks_exist(blocks, [0, 3, 3, 3])

    refuses(error, "attention_blocks", check, blocks)


@pytest.mark.parametrize("value", ["\ud800", ["a", "\udcff"], [("a", "b"), ("a", "\ud800")]])
def test_texts_are_valid_unicode(value):
    refuses(ValueError, "prompt", check_text, "prompt", value)
    for other in ("", "猫\0", [None, "a"], ("a", ["b"]), None, 3, ["a", 3]):  # whose form is judged elsewhere
        check_text("prompt", other)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes with names")
def test_only_regular_files_are_files(tmp_path):
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "device").symlink_to(os.devnull)
    (tmp_path / "nowhere").symlink_to("missing")
    (tmp_path / "circle").symlink_to("circle")
    for name, fault in {
        "file": None,
        "": "a folder",
        "pipe": "a pipe, a socket or a device",
        "device": "a pipe, a socket or a device",
        "nowhere": "no existing file",
        "circle": "no existing file",
        "n" * 5000: "no existing file",
        "\ud800": "no existing file",
        "\0": "no existing file",
    }.items():
        path = tmp_path / name
        assert file_fault(path) == fault
        if fault in (None, "no existing file"):
            check_file_place(path)
        else:
            with pytest.raises(ValueError, match=f"there is {fault} of that name"):
                check_file_place(path)
    with socket.socket(socket.AF_UNIX) as end:
        end.bind(str(tmp_path / "s"))
        assert file_fault(tmp_path / "s") == "a pipe, a socket or a device"
