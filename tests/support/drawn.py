# SPDX-License-Identifier: Apache-2.0
"""What tests of the drawn world share: a seed, the form of a caption, and masks without their borders."""

import re

import torch.nn.functional as F

from dreammover_pipeline.tiny.contents import BACKGROUNDS, COLOURS, TEXTURES
from dreammover_pipeline.tiny.sprites import KINDS

SEED = 7
ONE = rf"a ({'|'.join(TEXTURES)}) ({'|'.join(COLOURS)}) and ({'|'.join(COLOURS)}) ({'|'.join(KINDS)})"
CAPTION = re.compile(rf"{ONE}(?: and {ONE})? over a ({'|'.join(BACKGROUNDS)}) ({'|'.join(COLOURS)}) background")


def eroded(mask, margin=2):
    """Pixels whose whole neighbourhood is in the mask; what is outside the frame is not in the mask."""
    inside = F.pad(mask.float(), [margin] * 4)
    return -F.max_pool2d(-inside, 2 * margin + 1, 1) > 0.5
