# SPDX-License-Identifier: Apache-2.0
"""Whole jobs on a device that is not the CPU: nothing is left behind on the CPU, and nothing asks for float64."""

import pytest
import torch
from support.elsewhere import DEVICE, Elsewhere, elsewhere, waits

from dreammover_pipeline.detail import PairDetail, drawn_at_once
from dreammover_pipeline.paths import rigid_paths, straight_paths
from dreammover_pipeline.records import BidirectionalFlow, Canvas

# Few steps, since every operation there takes several times as long as on the CPU.
SMALL = {"num_inference_steps": 3, "inversion_steps": 2, "feature_step": 1, "lora_steps": 0, "height": 64, "width": 64}
QUICK = {**SMALL, "flow": "features"}
JOBS = {
    "defaults": {},
    "fits": {"lora_steps": 2, "embedding_steps": 1, "guidance_scale": 2.0},
    "steered": {"points": [[(16, 16), (40, 30)], [(20, 20), (44, 36)]], "easing": "even", "distance_penalty": 0.1},
    "paper": {"detail": "upsampled", "motion": "straight", "importance": "photometric", "flow_fit": "mean"},
    "unwarped": {"fusion": "two_level_unwarped", "flow": "features", "rest_tolerance": 0.3, "flow_smoothing": 1},
    "in noise": {"method": "noise", "candidates": 2, "rank_by": lambda picture: 0.0, "affine": (1.1, 5, 0.1, 0)},
    "at the photos' size": {"detail": "diffusion", "include_inputs": True, "endpoints": "reconstructed"},
}


def seeded():
    return torch.Generator().manual_seed(0)


@pytest.fixture
def there(tiny_pipe):
    """A context in which the embedded checkpoint is on the device."""
    return lambda: elsewhere(tiny_pipe.unet, tiny_pipe.vae, tiny_pipe.text_encoder)


@pytest.mark.parametrize("job", JOBS)
def test_frames_are_those_of_the_cpu(tiny_pipe, there, photos, job):
    arguments = {**SMALL, "n_frames": 2, "output_type": "pt", **JOBS[job]}
    photos = [photo.resize((96, 80)) for photo in photos]
    expected = tiny_pipe(*photos, generator=seeded(), **arguments).frames
    with there():
        made = tiny_pipe(*photos, generator=seeded(), **arguments)
        assert isinstance(made.flow[0].forward, Elsewhere)
    assert made.frames.shape == expected.shape
    # Operations round differently there, so a place may be taken from elsewhere where two are nearly as good.
    assert (made.frames - expected).abs().quantile(0.99) < 1e-4  # 6e-7 was seen


def test_what_was_kept_comes_back_to_the_device(tiny_pipe, there, photos, tmp_path):
    """A pair, and the gaps of a sequence."""
    with there():
        pair = tiny_pipe.prepare(*photos, **QUICK | {"lora_steps": 1}, generator=seeded())
        tiny_pipe.save_pair(pair, tmp_path / "pair")
        again = tiny_pipe.load_pair(tmp_path / "pair")
        assert isinstance(again.inversion.path, Elsewhere)
        first, second = (tiny_pipe.render(x, n_frames=1, output_type="latent").frames for x in (pair, again))
        assert torch.equal(first, second)
        album = [photos[0], photos[1], photos[0]]
        keep = {**QUICK, "n_frames": 1, "output_type": "latent", "keep": tmp_path / "gaps"}
        made = tiny_pipe.interpolate_sequence(album, **keep).frames
        assert len(list((tmp_path / "gaps").glob("gap*"))) == 2
        assert torch.equal(tiny_pipe.interpolate_sequence(album, **keep).frames, made)


def test_more_steps_wait_no_oftener(tiny_pipe, there, photos):
    """What waits for the device are checks of whole stages, and matching."""

    def waiting(**arguments):
        waits.clear()
        with there():
            tiny_pipe(*photos, n_frames=3, **{**QUICK, **arguments, "output_type": "latent"}, generator=seeded())
        return waits.total()

    few = waiting()
    assert few > 0
    assert waiting(num_inference_steps=6, inversion_steps=5) == few


@pytest.mark.parametrize("paths", [rigid_paths, straight_paths])
def test_the_detail_of_a_second_frame_can_be_recorded(paths, monkeypatch):
    """A record takes in nothing but kernels: no answer that the host waits for, and no values that it sends."""
    monkeypatch.setattr("dreammover_pipeline.detail.STRIP_PIXELS", 1000)
    canvas = Canvas(32, 48, 30, 48, 60, 96)
    with elsewhere():
        photos, working = torch.rand(2, 3, 60, 96).to(DEVICE), torch.rand(2, 3, 32, 48).to(DEVICE)
        flow = BidirectionalFlow.of(torch.randn(2, 2, 8, 12).to(DEVICE))
        pair = PairDetail.of(photos.unbind(), working, 0.9 * working, canvas, flow, paths(flow), True)
        drawn_at_once(pair, working[0], torch.full((), 0.3, device=DEVICE))
        waits.clear()
        drawn = drawn_at_once(pair, working[1], torch.full((), 0.6, device=DEVICE))
        assert drawn.shape == (3, 60, 96)
        assert not waits


@pytest.mark.parametrize(
    ("work", "fault"),
    [
        (lambda x: x + torch.ones(2), "two devices"),
        (lambda x: torch.stack([x, torch.ones(2)]), "two devices"),
        (lambda x: torch.randn(2, generator=torch.Generator(), device=x.device), "a generator of another one"),
        (lambda x: x.double(), "no torch.float64"),
        (lambda x: x.new_zeros(2, dtype=torch.float64), "no torch.float64"),
        (lambda x: torch.linspace(0, 1, 3, dtype=torch.float64, device=x.device), "no torch.float64"),
    ],
)
def test_the_device_refuses_what_others_refuse(work, fault):
    with elsewhere():
        x = torch.arange(2, device="meta").float()
        assert (x * torch.tensor(2.0))[[0, 1]].tolist() == [0, 2]
        waits.clear()
        assert x.cpu().double().sum() == 1
        assert torch.ones(3).to(DEVICE).shape == (3,)
        assert waits.total() == 2  # the values of one came back, and those of the other were sent
        with pytest.raises(RuntimeError, match=fault):
            work(x)
