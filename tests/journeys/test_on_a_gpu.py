# SPDX-License-Identifier: Apache-2.0
"""What takes a CUDA GPU to see: whole jobs of the embedded checkpoint, stage by stage."""

import pytest
import torch
from PIL import Image
from support.pages import EXAMPLES

from dreammover_pipeline import DreamMoverPipeline, finishing
from dreammover_pipeline.captured import RecordedCall
from dreammover_pipeline.tiny import CHECKPOINT

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
UNSEEN = pytest.mark.xfail(
    strict=False, reason="two jobs differed on an H200; what may mend it was not tried on a GPU"
)
DTYPES = [pytest.param(torch.float32, marks=UNSEEN), torch.float16, torch.bfloat16]
FIT = {"lora_steps": 10}


@pytest.fixture(scope="module")
def photos():
    return [Image.open(EXAMPLES / "robot" / f"{i}.png").convert("RGB") for i in (0, 1)]


def loaded(device, dtype):
    pipe = DreamMoverPipeline.from_pretrained(CHECKPOINT).to(device, dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded():
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_fit_repeats_its_bits(photos, dtype):
    pipe = loaded("cuda", dtype)
    first, second = (pipe.prepare(*photos, generator=seeded(), **FIT).lora for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("dtype", DTYPES)
def test_preparing_repeats_its_bits(photos, dtype):
    pipe = loaded("cuda", dtype)
    first, second = (pipe.prepare(*photos, lora_steps=0) for _ in range(2))
    assert torch.equal(first.inversion.path, second.inversion.path)
    assert torch.equal(first.flow.stacked(), second.flow.stacked())


@pytest.mark.parametrize("detail", ["upsampled", "photos"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_frames_of_a_prepared_pair_repeat_their_bits(photos, dtype, detail):
    pipe = loaded("cuda", dtype)
    pair = pipe.prepare(*photos, **FIT, generator=seeded())
    first, second = (pipe.render(pair, n_frames=4, detail=detail, output_type="pt").frames[0] for _ in range(2))
    assert torch.equal(first, second)


def test_pictures_are_recorded_and_are_those_made_one_by_one(photos, monkeypatch, caplog):
    pipe = loaded("cuda", torch.float16)
    pair, calls = pipe.prepare(*photos, lora_steps=0), []

    def call(*args, **kwargs):
        calls.append(RecordedCall(*args, **kwargs))
        return calls[-1]

    monkeypatch.setattr(finishing, "RecordedCall", call)
    recorded = pipe.render(pair, n_frames=4, output_type="pt").frames[0]
    assert "not recorded" not in caplog.text
    assert [call._replay is not None for call in calls] == [True]
    monkeypatch.setattr(finishing.FrameMaker, "_records", lambda *args: False)
    one_by_one = pipe.render(pair, n_frames=4, output_type="pt").frames[0]
    assert (recorded - one_by_one).abs().quantile(0.99) < 1e-4


def test_frames_are_those_of_the_cpu(photos):
    on_cpu, on_gpu = (
        loaded(device, torch.float32)(
            *photos, n_frames=4, detail="upsampled", output_type="pt", generator=seeded(), **FIT
        ).frames[0]
        for device in ("cpu", "cuda")
    )
    apart = (on_gpu.float().cpu() - on_cpu).square().mean((1, 2, 3))
    assert (-10 * apart.log10() > 50).all()  # dB; 69 to 82 were seen
