# SPDX-License-Identifier: Apache-2.0
"""Many pairs, one video each: claimed, made, committed and recorded so that a kill at any moment loses nothing."""
