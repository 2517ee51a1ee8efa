# SPDX-License-Identifier: Apache-2.0
"""Frames as people watch them: files, the order they are played in, and pictures of what was matched."""
