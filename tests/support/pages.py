# SPDX-License-Identifier: Apache-2.0
"""The snippets of the documentation, as they are printed."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


def printed(page: str, language: str) -> list[str]:
    """The blocks of code of a page, named relative to the project, in one language and in their order."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
