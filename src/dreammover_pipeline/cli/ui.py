# SPDX-License-Identifier: Apache-2.0
"""The command `dreammover ui`.

torch, diffusers and gradio take seconds to import, so they are imported only once the arguments have been parsed.
"""

from __future__ import annotations

import argparse
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

from ..media.files import check_ffmpeg
from .loading import add_model_options, check_model, choose_device, load_pipeline

HOST, PORT, MAX_UPLOAD_MB = "127.0.0.1", 7860, 20.0


def add_ui(commands: argparse._SubParsersAction) -> None:
    """Register the command `ui`."""
    text = (
        "Serve a web page that makes videos, until Ctrl-C is pressed. Then all uploads and videos are removed. "
        "The command needs the extra 'demo' of the package."
    )
    parser = commands.add_parser("ui", help="make videos on a web page", description=text)
    parser.set_defaults(run=_ui)
    add = parser.add_argument
    add(
        "--host",
        default=HOST,
        metavar="ADDRESS",
        help="Address to listen on; 0.0.0.0 lets other machines in (default: %(default)s).",
    )
    add("--port", type=_port, default=PORT, metavar="N", help="Port to listen on (default: %(default)s).")
    add(
        "--max-upload-mb",
        type=_megabytes,
        default=MAX_UPLOAD_MB,
        metavar="X",
        help="Size in megabytes of the largest file that may be uploaded (default: %(default)g).",
    )
    add_model_options(parser, default="sd15")


def serve(
    model: str = "sd15",
    dtype: str | None = None,
    device: str | None = None,
    host: str = HOST,
    port: int = PORT,
    max_upload_mb: float = MAX_UPLOAD_MB,
    allow_pickle: bool = False,
) -> None:
    """Serve the page until the process is interrupted or terminated.

    Args:
        model: The model: "sd15", "tiny", a Hub id, a folder in diffusers layout, or a single file.
        dtype: The precision, "float32", "float16" or "bfloat16"; by default float16 on cuda and float32 elsewhere.
        device: The device that the model runs on; by default the first of cuda, mps and cpu that this machine has.
        host: The address to listen on.
        port: The port to listen on.
        max_upload_mb: How many megabytes an uploaded file may have.
        allow_pickle: Whether weights may come from other files than safetensors.

    Raises:
        ValueError: The model or the device does not exist, or the page cannot have this address.
        RuntimeError: Gradio is not installed, there is no ffmpeg for the videos, or the model cannot be loaded.
    """
    if find_spec("gradio") is None:
        raise RuntimeError("the web page needs gradio; install it with: pip install 'dreammover-pipeline[demo]'")
    check_ffmpeg()
    check_model(model, allow_pickle)
    check_address(host, port)
    pipe = load_pipeline(model, dtype, choose_device(device), allow_pickle)
    from ..ui.serving import TINY_DEFAULTS, serving

    defaults = TINY_DEFAULTS if model == "tiny" else {}
    with _until_stopped() as stopped, serving(pipe, host, port, max_upload_mb, defaults) as address:
        print(f"DreamMover is at {address} until Ctrl-C", flush=True)
        stopped.wait()


def check_address(host: str, port: int) -> None:
    """Refuse an address that the page cannot have, which it needs only after the model has been loaded.

    Raises:
        ValueError: This machine has no such address, or another program uses the port.
    """
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        socket.create_server(address[:2], family=family).close()
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"cannot serve at {host}, port {port}: {reason}; choose another --host or --port") from error


@contextmanager
def _until_stopped() -> Iterator[threading.Event]:
    """An event that Ctrl-C and SIGTERM set, since a server is ended by these two."""
    stopped = threading.Event()
    previous = {number: signal.signal(number, lambda *_: stopped.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopped
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _ui(args: argparse.Namespace) -> None:
    """Serve the page as the options of the command say."""
    serve(args.model, args.dtype, args.device, args.host, args.port, args.max_upload_mb, args.allow_pickle)


def _port(text: str) -> int:
    """A typed port."""
    if not text.isdecimal() or not 0 < int(text) < 2**16:
        raise argparse.ArgumentTypeError(f"'{text}' is no port; write a whole number from 1 to 65535")
    return int(text)


def _megabytes(text: str) -> float:
    """A typed number of megabytes."""
    try:
        megabytes = float(text)
    except ValueError:
        megabytes = 0
    if not 0 < megabytes < float("inf"):
        raise argparse.ArgumentTypeError(f"'{text}' is no size; write a number of megabytes above 0")
    return megabytes
