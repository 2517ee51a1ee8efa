# SPDX-License-Identifier: Apache-2.0
"""`torch.compile` of the UNet, by counting graphs and their runs: nothing is compiled twice, nothing falls back."""

import pytest
import torch
from diffusers import UNet2DConditionModel

from dreammover_pipeline import DreamMoverPipeline

STEPS = 2


class Backend:
    """Runs graphs as they are; counts them and their runs."""

    def __init__(self):
        self.graphs = self.runs = 0

    def __call__(self, module, inputs):
        self.graphs += 1

        def run(*args):
            self.runs += 1
            return module(*args)

        return run


@pytest.fixture
def pipe(components):
    """With a UNet of one level, because tracing takes seconds."""
    torch.manual_seed(0)
    components["unet"] = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8,),
        down_block_types=("CrossAttnDownBlock2D",),
        mid_block_type=None,
        up_block_types=("CrossAttnUpBlock2D",),
        layers_per_block=1,
        cross_attention_dim=32,
        attention_head_dim=2,
        norm_num_groups=4,
    ).eval()
    pipe = DreamMoverPipeline(**components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    yield pipe
    torch._dynamo.reset()


@pytest.fixture
def call(pipe, photos, fast):
    def call(**arguments):
        settings = fast | {"num_inference_steps": 3, "inversion_steps": STEPS, "feature_step": 1}
        settings |= {"feature_block": 0, "attention_blocks": (0,), "output_type": "latent"} | arguments
        return pipe(*photos, **settings, generator=torch.Generator().manual_seed(0)).frames

    return call


@pytest.fixture(scope="module")
def uncompiled():
    """The frames of every call with the UNet as it is, once they have been made."""
    return []


@pytest.mark.parametrize("way", ["in place", "wrapped"])
def test_three_graphs_serve_every_call_but_the_odd_one(pipe, call, uncompiled, way):
    calls = [  # arguments, batches a step, graphs compiled by then
        ({"n_frames": 3}, 1, 2),  # the two inputs, and frames that they lead
        ({"n_frames": 7, "frame_batch_size": 4}, 2, 3),  # frames without them
        ({"n_frames": 3, "lora_steps": 2, "lora_learning_rate": 1e-2}, 1, 3),
        ({"n_frames": 9, "frame_batch_size": 3, "lora_steps": 1}, 3, 3),
        ({"n_frames": 2, "prompt": ("a fish", "a robot")}, 1, 3),
        ({"n_frames": 1}, 1, 4),  # torch makes a case of its own of it
        ({"n_frames": 3}, 1, 4),
    ]
    if not uncompiled:
        uncompiled.extend(call(**arguments) for arguments, *_ in calls)
    backend = Backend()
    if way == "in place":
        pipe.unet.compile(backend=backend)
    else:
        pipe.unet = torch.compile(pipe.unet, backend=backend)
    for (arguments, batches, graphs), frames in zip(calls, uncompiled, strict=True):
        before = backend.runs
        assert torch.allclose(call(**arguments), frames, atol=1e-5)
        # the inversion and ε at its end, the frames; neither the fit nor the features
        assert backend.runs - before == (STEPS + 1) + STEPS * batches, "the UNet ran uncompiled"
        assert backend.graphs == graphs
