# SPDX-License-Identifier: Apache-2.0
"""The pipeline's code in the forms in which diffusers loads code from elsewhere."""
