# SPDX-License-Identifier: Apache-2.0
"""The command `dreammover`: one file a command, and everything in the package that parses a command line."""
