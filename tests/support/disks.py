# SPDX-License-Identifier: Apache-2.0
"""A disk without room, as a process meets it that may write no larger files."""

from contextlib import contextmanager

import pytest


@contextmanager
def no_room(size):
    """While the context lasts, this process and its children cannot write files of more than so many bytes."""
    resource = pytest.importorskip("resource", reason="this system has no limits for files")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
