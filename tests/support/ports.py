# SPDX-License-Identifier: Apache-2.0
"""Places for servers under test."""

import socket


def free_port() -> int:
    """A port of the loopback interface on which nothing listens at the moment."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]
