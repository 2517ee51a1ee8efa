# SPDX-License-Identifier: Apache-2.0
"""Hooks for processes that play a machine without this package, or without a network."""


class Refuse:
    """An import hook for a machine without the package."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] == "dreammover_pipeline":
            raise ModuleNotFoundError(f"{name} is not installed in this process", name=name)


def stay_on_loopback(event: str, args: tuple) -> None:
    """An audit hook: no connection leaves this machine."""
    if event == "socket.getaddrinfo" and args[0] not in ("127.0.0.1", "localhost"):
        raise RuntimeError(f"asks for the address of {args[0]}")
    if event == "socket.connect" and isinstance(args[1], tuple) and args[1][0] != "127.0.0.1":
        raise RuntimeError(f"connects to {args[1][0]}")
