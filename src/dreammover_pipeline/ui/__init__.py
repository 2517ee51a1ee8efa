# SPDX-License-Identifier: Apache-2.0
"""The web page: `dreammover ui`. It needs the extra `demo` (Gradio); nothing else in the package imports from here."""
