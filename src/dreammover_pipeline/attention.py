# SPDX-License-Identifier: Apache-2.0
"""Reference attention: in-between frames keep their queries and look at the keys and values of the two inputs.

The processors wrap the ones they replace. A stock self-attention that is handed the inputs' tokens as
`encoder_hidden_states` projects exactly K⁰⊕K¹ and V⁰⊕V¹, because projections act on every token alone; so LoRA
layers, sliced attention and whatever else the user installed go on working.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from diffusers.models.attention_processor import AttnProcessor2_0


def self_attention_names(unet: torch.nn.Module, block: int) -> list[str]:
    """Names, as in `unet.attn_processors`, of the self-attentions (`attn1`) of `unet.up_blocks[block]`."""
    prefix = f"up_blocks.{block}."
    return [name for name in unet.attn_processors if name.startswith(prefix) and name.endswith("attn1.processor")]


class References:
    """The two inputs' tokens at the current step, one tensor (G·2, L, C) a layer, for G groups of guidance."""

    def __init__(self, layers: Sequence[str]):
        self.layers = layers
        self.tokens: dict[str, torch.Tensor] = {}
        self.recording = False

    @contextmanager
    def record(self) -> Iterator[None]:
        """While it lasts, forwards carry the two inputs: they attend to themselves and their tokens are kept."""
        self.tokens.clear()  # else torch.compile would take the first recording and later ones for two cases
        self.recording = True
        try:
            yield
        finally:
            self.recording = False


class ReferenceAttnProcessor:
    """Self-attention of in-between frames on the two inputs: Q = Q^δ, K = K⁰⊕K¹, V = V⁰⊕V¹.

    The frames' own keys and values are replaced, not appended, and never computed.

    Source: DreamMover Eq. (9), §3.4 and DreamMover Eq. (10), §3.4.
    """

    def __init__(self, name: str, inner, references: References):
        self.name = name
        # A fused processor projects q, k and v of one sequence at once and cannot take another sequence for k and v;
        # the separate projections it was fused from are still there.
        self.inner = AttnProcessor2_0() if type(inner).__name__.startswith("Fused") else inner
        self.references = references

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        """Attend. Recording: `hidden_states` (G·2, L, C) are the inputs. Otherwise (G·F, L, C) are frames."""
        if self.references.recording:
            self.references.tokens[self.name] = hidden_states
            return self.inner(attn, hidden_states, attention_mask=attention_mask)
        tokens = self.references.tokens[self.name]
        groups, (batch, length, channels) = len(tokens) // 2, hidden_states.shape
        # All queries of a group form one long sequence, so the two inputs' K and V are projected once, not per frame.
        queries = hidden_states.reshape(groups, batch // groups * length, channels)
        tokens = tokens.reshape(groups, 2 * length, channels)
        attended = self.inner(attn, queries, encoder_hidden_states=tokens)
        return attended.reshape(batch, length, channels)


@contextmanager
def reference_attention(unet: torch.nn.Module, blocks: Sequence[int]) -> Iterator[References]:
    """Install reference attention in the self-attentions of some up blocks, and put everything back afterwards.

    At every step first run the two inputs through the UNet inside `references.record()`, then the frames, in as many
    pieces as fit. With guidance both batches are (unconditional, conditional), concatenated.

    Source: DreamMover §3.4. Official code differs: the last six of nine layers found by counting calls; here the
    blocks are named, `up_blocks.2` and `up_blocks.3` being the same six layers.

    Args:
        unet: a `UNet2DConditionModel`.
        blocks: indices into `unet.up_blocks`; a block without attention adds nothing.

    Yields:
        The references the processors share.
    """
    installed = dict(unet.attn_processors)
    references = References([name for block in blocks for name in self_attention_names(unet, block)])
    wrapped = {name: ReferenceAttnProcessor(name, installed[name], references) for name in references.layers}
    try:
        unet.set_attn_processor({**installed, **wrapped})
        yield references
    finally:
        unet.set_attn_processor(dict(installed))
        references.tokens.clear()
