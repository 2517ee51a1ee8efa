# SPDX-License-Identifier: Apache-2.0
"""What several tests share and that is no fixture."""
