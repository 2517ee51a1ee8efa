# SPDX-License-Identifier: Apache-2.0
"""Arguments of `DreamMoverPipeline` that belong together: `pipe(img0, img1, **PRESETS["fast"])`.

What each costs and gives away is measured: docs/performance.md.
"""

from __future__ import annotations

PRESETS: dict[str, dict[str, object]] = {
    # the defaults, by name
    "quality": {"num_inference_steps": 50, "inversion_steps": 30, "feature_step": 14, "lora_steps": 80},
    # the same depth of noise in steps two and a half times as long, and half the fit
    "fast": {"num_inference_steps": 20, "inversion_steps": 12, "feature_step": 6, "lora_steps": 40},
    # DreamMover as published, without what this project changed
    "paper": {"feature_block": 1, "distance_penalty": 0, "flow_smoothing": 0, "importance": "photometric"},
}
