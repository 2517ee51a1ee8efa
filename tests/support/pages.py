# SPDX-License-Identifier: Apache-2.0
"""The snippets of the documentation, as they are printed."""

import json
import re
import shutil
from pathlib import Path

from dreammover_pipeline.tiny import CHECKPOINT

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


def printed(page: str, language: str) -> list[str]:
    """The blocks of code of a page, named relative to the project, in one language and in their order."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def smaller(folder: Path) -> Path:
    """The embedded checkpoint at 32 px, a quarter of the time."""
    shutil.copytree(CHECKPOINT, folder)
    config = folder / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"sample_size": 8}))
    return folder
