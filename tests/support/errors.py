# SPDX-License-Identifier: Apache-2.0
"""What errors must say."""

import pytest


def refuses(error, name, function, *arguments, **keywords):
    """`function` raises `error`, and its message names the argument."""
    with pytest.raises(error, match=f"`{name}"):
        function(*arguments, **keywords)
