# SPDX-License-Identifier: Apache-2.0
"""Frames as people watch them: in files, in the order of playing, and in pictures of what was made and matched."""
