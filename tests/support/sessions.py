# SPDX-License-Identifier: Apache-2.0
"""What tests of the page's sessions have them do, and a listener to watch them by."""

RENDERING = {"n_frames": 2, "easing": "linear", "endpoints": "original"}
PREPARING = {
    "prompt": "a fish",
    "lora_steps": 2,
    "num_inference_steps": 4,
    "inversion_steps": 2,
    "feature_step": 1,
    "spots": [],
    "seed": 0,
}
STAGES = ["Fitting LoRA", "Inverting", "Denoising", "Decoding"]


class Stages:
    """Keeps the stages it hears of, and does something after the first step of a certain one."""

    def __init__(self, stage=None, act=None):
        self.stages, self.stage, self.act = [], stage, act

    def __call__(self, stage, done, total):
        assert 0 <= done <= total
        if stage not in self.stages:
            self.stages.append(stage)
        if (stage, done) == (self.stage, 1):
            self.act()
