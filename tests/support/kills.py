# SPDX-License-Identifier: Apache-2.0
"""Programs without models that get SIGKILL at a chosen moment of their work on files."""

import signal
import subprocess
import sys

# Every change of the disk is announced to an audit hook before it happens, and the hook ends the process.
HEAD = """
import os, signal, sys
from pathlib import Path
from dreammover_pipeline import scratch

events, moment = sys.argv[1].split(","), int(sys.argv[2])

def count(event, arguments):
    global moment
    if event in events:
        if moment == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        moment -= 1

sys.addaudithook(count)
"""
CHANGES = "open,os.mkdir,os.rename,os.remove,os.rmdir"


def was_killed(program, moment, *arguments, events=CHANGES):
    """Run a program until some of these events have happened, and say whether it was killed before it ended.

    Args:
        program: Python that finds `arguments` in `sys.argv[3:]`.
        moment: how many events happen; the process is killed right before the next one.
    """
    command = [sys.executable, "-c", HEAD + program, events, str(moment), *map(str, arguments)]
    status = subprocess.run(command, check=False, timeout=60).returncode
    assert status in (0, -signal.SIGKILL)
    return status != 0
