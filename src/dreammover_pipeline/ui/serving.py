# SPDX-License-Identifier: Apache-2.0
"""The page put together, and served until the server is stopped."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import gradio as gr
from starlette.middleware import Middleware

from ..evaluation.examples import write_examples
from ..pipeline import DreamMoverPipeline
from ..settings import arguments
from .doorkeeper import Doorkeeper
from .events import EventHandlers, connect
from .page import CSS, build_components
from .studio import Studio
from .visitors import Visitors

MAX_WAITING = 20  # events in the queue, beyond which newcomers are turned away
# The embedded checkpoint is so small that it redraws too freely when it is inverted deeply.
TINY_DEFAULTS = {"n_frames": 14, "inversion_steps": 10}


def build_page(studio: Studio, examples: Path, defaults: Mapping[str, object]) -> gr.Blocks:
    """Build the page with all its events.

    Args:
        studio: the studio that does the work.
        examples: a folder of example pairs, each a folder with `0.png` and `1.png`, or `0.jpg` and `1.jpg`, and with
            `prompt.txt`.
        defaults: values for arguments of the pipeline that the page begins with; an argument that is not among them
            begins with the pipeline's own default.
    """
    defaults = {**{name: declared.default for name, declared in arguments().items()}, **defaults}
    with gr.Blocks(title="DreamMover", analytics_enabled=False) as page:
        components = build_components(examples, defaults)
        connect(page, components, EventHandlers(studio, components, defaults))
    return page.queue(max_size=MAX_WAITING, api_open=False)


@contextmanager
def serving(
    pipe: DreamMoverPipeline, host: str, port: int, max_upload_mb: float, defaults: Mapping[str, object]
) -> Iterator[str]:
    """Serve the page while the block runs; all files of visitors are removed when it ends.

    Args:
        pipe: the pipeline that makes the videos.
        host: the address to listen on.
        port: the port to listen on.
        max_upload_mb: how many megabytes an uploaded file may have.
        defaults: values for arguments of the pipeline that the page begins with, as for `build_page`.

    Yields:
        The page's address.

    Raises:
        OSError: another program uses the port.
    """
    max_upload = round(max_upload_mb * 2**20)
    with TemporaryDirectory(prefix="dreammover-ui-") as root, _gradio_folder(root):
        visitors = Visitors(Path(root))
        write_examples(visitors.examples)
        studio = Studio(pipe, visitors)
        page = build_page(studio, visitors.examples, defaults)
        events = {number: len(event.inputs) for number, event in page.fns.items() if event.fn}
        doorkeeper = Middleware(Doorkeeper, visitors=visitors, max_upload=max_upload, events=events)
        try:
            _, address, _ = page.launch(
                server_name=host,
                server_port=port,
                max_file_size=max_upload,
                share=False,
                quiet=True,
                prevent_thread_lock=True,
                ssr_mode=False,
                run_history=False,
                enable_monitoring=False,
                footer_links=[],
                css=CSS,
                app_kwargs={"middleware": [doorkeeper]},
            )
            yield address
        finally:
            studio.close_all()
            page.close(verbose=False)


@contextmanager
def _gradio_folder(folder: str) -> Iterator[None]:
    """Have Gradio keep its files in a folder of this choice while the block runs."""
    before = os.environ.get("GRADIO_TEMP_DIR")
    os.environ["GRADIO_TEMP_DIR"] = folder
    try:
        yield
    finally:
        if before is None:
            del os.environ["GRADIO_TEMP_DIR"]
        else:
            os.environ["GRADIO_TEMP_DIR"] = before
