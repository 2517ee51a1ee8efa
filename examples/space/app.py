# SPDX-License-Identifier: Apache-2.0
"""The web page as a Hugging Face Space; README.md beside this says what else the Space needs."""

import os

from dreammover_pipeline.cli.ui import serve

if __name__ == "__main__":
    serve(
        model=os.environ.get("DREAMMOVER_MODEL", "sd15"),
        host="0.0.0.0",
        port=int(os.environ.get("GRADIO_SERVER_PORT", "7860")),
    )
