# SPDX-License-Identifier: Apache-2.0
"""The evaluation suite: pairs with and without truth, metrics, methods, runs and reports; see docs/evaluation.md.

The pipeline never imports this package, which needs the extra `eval`.
"""
