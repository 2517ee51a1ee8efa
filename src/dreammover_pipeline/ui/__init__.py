# SPDX-License-Identifier: Apache-2.0
"""The web page that `dreammover ui` serves. It needs the extra `demo`, which brings Gradio.

Outside this folder only the command `dreammover ui` imports it, so the rest of the package works without Gradio.
"""
