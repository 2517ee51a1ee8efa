# SPDX-License-Identifier: Apache-2.0
"""What a kill leaves where something was being made, and what becomes of it."""

import os
import subprocess
import sys
import time

import pytest
from support.kills import was_killed

from dreammover_pipeline.scratch import put_in_order, replacing

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")

REPLACE = """
with scratch.replacing(sys.argv[3]) as new:
    new.mkdir()
    for name in ("0", "1"):
        (new / name).write_text("new")
"""
HOLD = """
import sys
from dreammover_pipeline.scratch import replacing

with replacing(sys.argv[1]) as new:
    new.write_text("theirs")
    print(flush=True)
    input()
"""


def texts(folder):
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_a_kill_at_any_moment_leaves_the_old_folder_or_the_new_one(tmp_path):
    old, new, ends = ({"0": "old", "1": "old", "2": "old"}, {"0": "new", "1": "new"}, [])
    for moment in range(1000):
        place = tmp_path / str(moment)
        (place / "out").mkdir(parents=True)
        for name, text in old.items():
            (place / "out" / name).write_text(text)
        killed = was_killed(REPLACE, moment, place / "out")
        ends.append(texts(place / "out") if (place / "out").exists() else None)
        put_in_order(place)
        assert os.listdir(place) == ["out"]
        assert texts(place / "out") == (new if ends[-1] == new else old)
        if not killed:
            break
    assert [end for n, end in enumerate(ends) if n == 0 or end != ends[n - 1]] == [old, None, new]
    assert ends.count(new) > 2  # so kills while the old folder was being removed are among them


def test_an_old_folder_does_not_come_back_once_it_was_replaced(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "0").write_text("old")
    assert was_killed(REPLACE, 0, tmp_path / "out", events="shutil.rmtree")  # after both renames
    (tmp_path / "out").rename(tmp_path / "elsewhere")
    put_in_order(tmp_path)
    assert os.listdir(tmp_path) == ["elsewhere"]


@pytest.fixture
def another(tmp_path):
    """Another process that is making the file `theirs`."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "theirs")], **pipes)
    process.stdout.readline()
    yield process
    process.kill()
    process.communicate()


def test_what_another_process_is_making_is_left_to_it(tmp_path, another):
    for name in ("ours", "theirs"):
        with replacing(tmp_path / name) as new:
            new.write_text("ours")
    assert texts(tmp_path / another_folder(tmp_path)) == {"lock": "", "new": "theirs"}
    another.communicate(b"\n")
    assert another.returncode == 0
    assert texts(tmp_path) == {"ours": "ours", "theirs": "theirs"}


def test_what_a_killed_process_was_making_is_removed_by_the_next_one(tmp_path, another):
    another.kill()
    another.wait()
    assert another_folder(tmp_path)
    with replacing(tmp_path / "ours") as new:
        new.write_text("ours")
    assert texts(tmp_path) == {"ours": "ours"}


def another_folder(place):
    (name,) = (name for name in os.listdir(place) if name.startswith(".dreammover-"))
    return name


ENCODE = """
from PIL import Image
from dreammover_pipeline.media.files import write_video

write_video([Image.new("RGB", (8, 8))] * 2, sys.argv[3], fps=8)
"""
# Goes on when its parent has died, opens its file once more when it is told to, and tells when it ended.
SLOW = """
case "$*" in *-encoders*) echo libx264; exit;; esac
for file; do :; done
echo begun > "$file"; touch {0}/begun
while [ ! -e {0}/told ]; do sleep 0.02; done
echo late > "$file"; touch {0}/ended
"""


def test_an_encoder_that_outlives_its_killed_parent_leaves_nothing(tmp_path, program):
    place, signs = tmp_path / "place", tmp_path / "signs"
    for folder in (place, signs):
        folder.mkdir()
    program(SLOW.format(signs))
    code = f"import sys\n{ENCODE}"
    parent = subprocess.Popen([sys.executable, "-c", code, "", "", str(place / "out.mp4")])
    wait_for(signs / "begun")
    parent.kill()
    parent.wait()
    put_in_order(place)
    (signs / "told").touch()
    wait_for(signs / "ended")
    assert os.listdir(place) == []


def wait_for(sign):
    deadline = time.monotonic() + 60
    while not sign.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
