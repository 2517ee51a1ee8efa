# SPDX-License-Identifier: Apache-2.0
"""Videos of many pairs, one each: claimed, made, committed and recorded so that a kill at any moment loses nothing."""
