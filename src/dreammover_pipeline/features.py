# SPDX-License-Identifier: Apache-2.0
"""Features of the UNet's up blocks, read by a forward hook that is removed afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch


@contextmanager
def captured_up_block(unet: torch.nn.Module, block: int) -> Iterator[list[torch.Tensor]]:
    """Collect the outputs of `unet.up_blocks[block]` while the context lasts.

    Args:
        unet: A `UNet2DConditionModel`.
        block: Index into `unet.up_blocks`. (Official code counts the mid block as 0, so that its 2 is 1 here.)

    Yields:
        A list to which every forward pass appends one tensor (B, C', h', w').
    """
    outputs: list[torch.Tensor] = []
    handle = unet.up_blocks[block].register_forward_hook(lambda module, args, output: outputs.append(output))
    try:
        # A hook that is registered after torch.compile has compiled a forward never fires, so forwards run eagerly.
        with torch.compiler.set_stance("force_eager"):
            yield outputs
    finally:
        handle.remove()


def up_block_features(
    unet: torch.nn.Module, blocks: Sequence[int], forward: Callable[[], object]
) -> list[torch.Tensor]:
    """Features of some up blocks during one forward pass of the UNet.

    Source: DreamMover §3.2: the second up block at step 14 of the inversion.

    Args:
        unet: A `UNet2DConditionModel`.
        blocks: Indices into `unet.up_blocks`.
        forward: Function that runs the UNet once.

    Returns:
        One tensor (B, C', h', w') for each block, in the UNet's dtype.
    """
    with ExitStack() as stack:
        outputs = [stack.enter_context(captured_up_block(unet, block)) for block in blocks]
        forward()
    return [output[-1] for output in outputs]
