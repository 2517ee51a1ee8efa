# SPDX-License-Identifier: Apache-2.0
"""Writes the pipeline's code for people who have only diffusers: the work of the command `dreammover export-hub`.

The result is a folder or a single file. The folder is a Hub repository without weights: `pipeline.py`, the module that
it imports, the model card and the licence. The file is a community pipeline like those in diffusers'
examples/community, with the section that it needs in the README there. Both hold the whole code in one module. Of a
repository of many modules, diffusers would ask the Hub for each one again on every path of imports that leads to it,
which comes to thousands of requests.
"""

from __future__ import annotations

import re
from pathlib import Path

from .. import __version__
from ..media.files import check_file_path, check_replaceable
from ..media.texts import write_text
from .single_file import join_modules, read_core

PACKAGE = Path(__file__).parent.parent
CARD, LICENCE = "model_card.md", "LICENSE"
CARD_LINK = re.compile(r"\]\((?!https?:|#)([^)]+)\)")  # a link of the model card to a file beside it
REPOSITORY = "OWNER/NAME"  # stands in the model card for the name of its repository

HEAD = """\
# SPDX-License-Identifier: Apache-2.0
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0. Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
#
# Joined from the modules of dreammover-pipeline {version} by `dreammover export-hub`.
"""
WRITTEN_BY = b"by `dreammover export-hub`."  # by which a joined module is known as one
# The docstring of `DreamMoverPipeline.__call__` has an example for the installed package. In the joined module these
# parts of the example are replaced, so that it loads that module.
EXAMPLE = {
    "from dreammover_pipeline import DreamMoverPipeline": "from diffusers import DiffusionPipeline",
    "DreamMoverPipeline.from_pretrained(": "DiffusionPipeline.from_pretrained(",
    '"stable-diffusion-v1-5/stable-diffusion-v1-5", dtype': (
        '"stable-diffusion-v1-5/stable-diffusion-v1-5",\n        ...     {code}, dtype'
    ),
}
# What diffusers loads from the Hub repository. It runs this file again for every pipeline that it loads, and what the
# file imports only once.
ENTRY = """\
# SPDX-License-Identifier: Apache-2.0
\"\"\"`DreamMoverPipeline`, of the module beside this one, which has all the code.

diffusers runs this file again for every pipeline that it loads, but the other one only once. So all pipelines have the
same classes, and calls of several pipelines take turns at models that these share.
\"\"\"

from .dreammover_code import DreamMoverPipeline  # noqa: F401, found by diffusers
"""
SECTION = """\
<!-- For the table at the top of examples/community/README.md: -->
| DreamMover | Frames between two photos of one scene with large motion between them, out of Stable Diffusion alone \
([paper](https://arxiv.org/abs/2409.09605)) | [DreamMover](#dreammover) | - | \
[Liao Shen et al.](https://arxiv.org/abs/2409.09605) (method) |

<!-- For its end: -->
### DreamMover

Two photos of one scene in, the frames between them out, also where much moves: *DreamMover: Leveraging the Prior of \
Diffusion Models for Image Interpolation with Large Motion* (ECCV 2024, [paper](https://arxiv.org/abs/2409.09605)). \
Both photos are inverted; their dense correspondence is read off the UNet's features; latents and noise are warped \
along it and fused; the frames are denoised with attention to both photos. A LoRA fitted to the pair keeps identity. \
It takes any Stable Diffusion 1.x or 2.x checkpoint.

```python
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import export_to_video

pipe = DiffusionPipeline.from_pretrained(
    "stable-diffusion-v1-5/stable-diffusion-v1-5",
    custom_pipeline="{name}",
    dtype=torch.float16,
    variant="fp16",
).to("cuda")
frames = pipe("lion_0.png", "lion_1.png", prompt="a photo of a lion", n_frames=32, include_inputs=True).frames[0]
export_to_video(frames, "lion.mp4", fps=16)
```

`pair = pipe.prepare(img0, img1, prompt=...)` does what does not depend on the frames, once; `pipe.render(pair, \
n_frames=8)` or `pipe.render(pair, times=[0.1, 0.5, 0.9])` makes frames of it. Every argument is described in the \
docstring of `DreamMoverPipeline.__call__`.
"""


def write_hub_folder(folder: Path, repository: str | None) -> list[str]:
    """Write the Hub repository to a folder.

    Args:
        folder: a folder that is not there yet, or that holds hidden files only.
        repository: the repository's name on the Hub, "owner/name", for the examples in the model card and in the
            pipeline's docstring; None leaves a placeholder there.

    Returns:
        The paths of the files written, relative to the folder.

    Raises:
        ValueError: there are files in the folder, or `repository` is no name of a repository.
        RuntimeError: the modules cannot be joined into one.
        OSError: a file cannot be written.
    """
    if repository is not None and not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", repository):
        raise ValueError(f"--repo takes OWNER/NAME, not '{repository}'")
    if folder.exists() and (not folder.is_dir() or any(not path.name.startswith(".") for path in folder.iterdir())):
        raise ValueError(
            f"'{folder}' is not empty, and what it holds might not be meant to be replaced; choose a new folder"
        )
    repository = repository or REPOSITORY
    card = project_file(CARD).read_text(encoding="utf-8")
    files = {link: project_file(link).read_bytes() for link in CARD_LINK.findall(card)}
    files[LICENCE] = project_file(LICENCE).read_bytes()
    files["README.md"] = card.replace(REPOSITORY, repository).encode()
    files["dreammover_code.py"] = _joined(f'custom_pipeline="{repository}", trust_remote_code=True').encode()
    files["pipeline.py"] = ENTRY.encode()
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return sorted(files)


def write_single_file(path: Path) -> Path:
    """Write the pipeline as a single file, and beside it the section for the README of diffusers' examples/community.

    Args:
        path: the file to write, `name.py`; users of diffusers will load it by `custom_pipeline="name"`.

    Returns:
        The path of the section, `name_README.md`.

    Raises:
        ValueError: the path is not that of a Python module, or lies inside this package, or in the place of either
            file is something that this function did not write.
        RuntimeError: the modules cannot be joined into one.
        OSError: a file cannot be written.
    """
    check_file_path(path, [".py"])
    if not path.stem.isidentifier():
        raise ValueError(f"'{path.name}' cannot be imported; a module's name may have letters, digits and _ only")
    if path.resolve().is_relative_to(PACKAGE):
        raise ValueError(f"'{path}' is in this program's own folder; choose another folder")
    section = path.with_name(f"{path.stem}_README.md")
    check_file_path(section, [".md"])
    mark = SECTION.splitlines()[0].encode()
    check_replaceable(section, lambda content: content.startswith(mark), f"the README section of '{path}'", "name")
    check_replaceable(path, lambda content: WRITTEN_BY in content, "the module", "name")
    write_text(path, _joined(f'custom_pipeline="{path.stem}"'))
    write_text(section, SECTION.format(name=path.stem))
    return section


def _joined(code: str) -> str:
    """The whole code as one module with its licence; the example in it loads it by `code`, written as arguments.

    Raises:
        RuntimeError: the example in the pipeline's docstring lacks a part that is to be replaced, or a name of the
            modules would mean two things.
    """
    texts = read_core(PACKAGE)
    for old, new in EXAMPLE.items():
        if texts["pipeline"].count(old) != 1:
            raise RuntimeError(f"the example in pipeline.py should hold `{old}` exactly once")
        texts["pipeline"] = texts["pipeline"].replace(old, new.format(code=code))
    return HEAD.format(version=__version__) + join_modules(texts)


def project_file(name: str) -> Path:
    """The path of a file that is no code: in a checkout below its root, in an installed package below `share`.

    Args:
        name: the file's path relative to the root of the project.
    """
    shared = PACKAGE / "share"
    return (shared if shared.is_dir() else PACKAGE.parent.parent) / name
