# SPDX-License-Identifier: Apache-2.0
"""An attention processor of a user's own."""

from diffusers.models.attention_processor import AttnProcessor2_0


class Louder(AttnProcessor2_0):
    """Multiplies what is attended to by a keyword argument of its own, and keeps what that was in every call.

    diffusers hands a processor only those of the user's keyword arguments that its `__call__` names.
    """

    def __init__(self):
        super().__init__()
        self.given = []

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, gain=1.0):
        self.given.append(gain)
        return gain * super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask)
