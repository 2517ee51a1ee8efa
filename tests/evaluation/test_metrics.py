# SPDX-License-Identifier: Apache-2.0
"""Metrics against closed forms, other implementations, and a world whose truth is known."""

import math

import numpy as np
import pytest
import torch

pytest.importorskip("skimage")
pytest.importorskip("cv2")

from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from dreammover_pipeline.evaluation.metrics import (
    consistent,
    endpoint_errors,
    high_frequency_energy,
    psnr,
    ssim,
    warping_error,
)
from dreammover_pipeline.evaluation.networks import FLOWS, Tools, dis_flow, find_tools
from dreammover_pipeline.evaluation.scoring import BETTER, middle, score
from dreammover_pipeline.evaluation.suites import Pair, world_suite
from dreammover_pipeline.records import BidirectionalFlow, Canvas

TOOLS = Tools(dis_flow, None, None, {})
SQUARE = Canvas(64, 64, 64, 64, 64, 64)


def texture(seed=0, size=64):
    """A smooth random picture (3, size, size) that optical flow can follow."""
    noise = torch.rand(3, 3, size // 4, size // 4, generator=torch.Generator().manual_seed(seed)).mean(0)
    return torch.nn.functional.interpolate(noise[None], (size, size), mode="bicubic").clamp(0, 1)[0]


def constant_flow(dx, dy, size=64):
    return torch.tensor([float(dx), float(dy)]).reshape(1, 2, 1, 1).expand(1, 2, size, size)


def world_pair(n_frames=3, difficulty="same", seed=0):
    suite = world_suite(difficulty, 1, n_frames, 64, seed)
    return suite.load(suite.pairs[0])


def test_psnr_of_a_known_offset_and_of_identical_images():
    image = torch.full((3, 8, 8), 0.25)
    assert psnr(image, image + 0.1) == pytest.approx(20, abs=1e-4)
    assert psnr(image, image) == 100
    half = torch.zeros(1, 8, 8, dtype=torch.bool)
    half[:, :4] = True
    assert psnr(image, image + 0.1 * half, half) == pytest.approx(20, abs=1e-4)
    assert psnr(image, image + 0.1 * half) == pytest.approx(20 + 10 * math.log10(2), abs=1e-4)
    assert psnr(image, image + 0.1 * half, ~half) == 100
    assert math.isnan(psnr(image, image, torch.zeros_like(half)))


def test_psnr_of_noise_and_ssim_agree_with_scikit_image():
    image = texture()
    noisy = (image + 0.1 * torch.randn(image.shape, generator=torch.Generator().manual_seed(1))).clamp(0, 1)
    a, b = image.double().numpy(), noisy.double().numpy()
    assert psnr(noisy, image) == pytest.approx(peak_signal_noise_ratio(a, b, data_range=1))
    each = [
        structural_similarity(x, y, data_range=1, gaussian_weights=True, use_sample_covariance=False)
        for x, y in zip(a, b, strict=True)
    ]
    assert ssim(noisy, image) == pytest.approx(np.mean(each))
    assert ssim(image, image) == 1
    assert ssim(noisy, image) < 0.9


def test_endpoint_errors_of_a_known_offset():
    where = torch.zeros(1, 64, 64, dtype=torch.bool)
    where[:, :, :10] = True
    flow = constant_flow(5, -2) + torch.where(where, 0, 100)
    assert endpoint_errors(flow, constant_flow(2, 2), where).tolist() == [5.0] * 640


def test_warping_error_is_zero_for_a_true_warp_and_known_for_a_false_one():
    image = texture(size=70)
    first, second = image[:, :64, 3:67], image[:, :64, :64]  # what is at p in the first is at p + (3, 0) in the second
    inside = torch.zeros(1, 64, 64, dtype=torch.bool)
    inside[:, :, :61] = True
    assert warping_error(first, second, constant_flow(3, 0), inside) < 1e-6
    assert warping_error(first, second, constant_flow(0, 0)) == pytest.approx(float((first - second).abs().mean()))
    assert warping_error(first + 0.25, second, constant_flow(3, 0), inside) == pytest.approx(0.25, abs=1e-6)


def test_flows_that_disagree_or_leave_are_occluded():
    there, back = constant_flow(4, 0), constant_flow(-4, 0)
    seen = consistent(there, back)
    assert seen[:, :, :60].all()
    assert not seen[:, :, 60:].any()  # they leave
    assert not consistent(there, constant_flow(-2, 0)).any()
    assert not consistent(constant_flow(0.5, 0), constant_flow(-0.5, 0))[:, :, 63:].any()  # however little


def test_dis_finds_a_translation():
    image = texture(size=70)
    flow = dis_flow(image[:, :64, 3:67], image[:, :64, :64])
    assert flow.shape == (1, 2, 64, 64)
    centre = flow[0, :, 16:48, 16:48].flatten(1).median(1).values
    assert torch.allclose(centre, torch.tensor([3.0, 0.0]), atol=0.3)


def test_high_frequencies_by_a_naive_transform_and_for_single_waves():
    n = 16
    x = torch.arange(n, dtype=torch.float64)

    def wave(frequency):
        return (0.5 + 0.5 * torch.cos(2 * math.pi * frequency * x / n)).expand(3, n, n)

    # amplitude of a cosine of ½: two lines of n²/4 each
    assert high_frequency_energy(wave(3)) == pytest.approx(0, abs=1e-9)
    assert high_frequency_energy(wave(5)) == pytest.approx(n * n / 2)
    assert high_frequency_energy(wave(5).mT) == pytest.approx(n * n / 2)
    image = texture(size=n).double()
    grid = torch.exp(-2j * math.pi * torch.outer(x, x) / n)
    spectrum = torch.roll((grid @ image.to(grid.dtype) @ grid).abs(), (n // 2, n // 2), (1, 2))
    centre = spectrum[:, n // 4 + 1 : 3 * n // 4, n // 4 + 1 : 3 * n // 4]
    assert high_frequency_energy(image) == pytest.approx(float((spectrum.sum() - centre.sum()) / 3))


@pytest.mark.parametrize(
    ("times", "index"), [((0.5,), 0), ((0.25, 0.5, 0.75), 1), ((0.2, 0.4, 0.6, 0.8), 1), ((0.1, 0.9, 0.55), 2)]
)
def test_the_middle_frame(times, index):
    assert middle(times) == index


def test_the_truth_scores_perfectly():
    pair = world_pair()
    found = score(pair, pair.images, pair.truth, None, SQUARE, TOOLS)
    assert list(found) == [name for name in BETTER if name != "fid"]
    assert {found[name] for name in ("psnr", "psnr_mid", "psnr_fg", "psnr_fg_mid")} == {100}
    assert found["ssim"] == found["ssim_mid"] == 1
    assert found["we_true"] < 0.02  # bilinear lookups at edges
    assert found["lpips"] is found["lpips_inputs"] is found["epe"] is found["pck05"] is None
    assert 0.8 < found["high_frequency"] < 1.25


def test_true_flow_scores_perfectly_and_an_offset_by_its_length():
    pair = world_pair()
    forward, backward = pair.motion.flow(0, 1), pair.motion.flow(1, 0)
    frames = pair.truth

    def flow_scores(offset):
        shift = constant_flow(offset, 0)
        found = score(pair, pair.images, frames, BidirectionalFlow(forward + shift, backward + shift), SQUARE, TOOLS)
        return found["epe"], found["pck05"], found["pck10"]

    assert flow_scores(0) == (0, 1, 1)
    assert flow_scores(3) == (pytest.approx(3, abs=1e-4), 1, 1)
    assert flow_scores(5) == (pytest.approx(5, abs=1e-4), 0, 1)  # 5 % of 64 are 3.2, 10 % are 6.4
    assert flow_scores(7) == (pytest.approx(7, abs=1e-4), 0, 0)


def test_only_the_visible_foreground_counts_for_flow_and_only_the_foreground_for_its_psnr():
    pair = world_pair()
    foreground, visible = pair.motion.foreground(0), pair.motion.visible(0, 1)
    assert (foreground & ~visible).any()
    forward = pair.motion.flow(0, 1) + 50 * ~(foreground & visible)
    found = score(pair, pair.images, pair.truth, BidirectionalFlow(forward, pair.motion.flow(1, 0)), SQUARE, TOOLS)
    assert found["epe"] == 0
    spoilt = torch.stack(
        [
            torch.where(pair.motion.foreground(time)[0], frame, 1 - frame)
            for time, frame in zip(pair.times, pair.truth, strict=True)
        ]
    )
    found = score(pair, pair.images, spoilt, None, SQUARE, TOOLS)
    assert found["psnr_fg"] == 100
    assert found["psnr"] < 15


def test_mid_and_all_frames_are_told_apart():
    pair = world_pair()
    spoilt = pair.truth.clone()
    spoilt[0] += 0.1
    found = score(pair, pair.images, spoilt, None, SQUARE, TOOLS)
    assert found["psnr_mid"] == 100
    assert found["psnr"] == pytest.approx((20 + 100 + 100) / 3, abs=1e-3)
    assert found["we_true_mid"] == score(pair, pair.images, pair.truth, None, SQUARE, TOOLS)["we_true_mid"]
    assert found["we_true"] > 0.03


def test_warping_errors_go_from_the_earlier_to_the_later_and_from_the_middle_outwards():
    pair, motion = world_pair(), world_pair().motion
    delta = torch.tensor(pair.times).reshape(-1, 1, 1, 1)
    faded = torch.lerp(*pair.images, delta)
    found = score(pair, pair.images, faded, None, SQUARE, TOOLS)
    images = dict(zip((0.0, *pair.times, 1.0), (pair.images[0], *faded, pair.images[1]), strict=True))

    def mean_error(*steps):
        flows = [(s, t, motion.flow(s, t), motion.visible(s, t)[0]) for s, t in steps]
        return np.mean([warping_error(images[s], images[t], *rest) for s, t, *rest in flows])

    assert found["we_true"] == pytest.approx(mean_error((0, 0.25), (0.25, 0.5), (0.5, 0.75), (0.75, 1)), rel=1e-6)
    assert found["we_true_mid"] == pytest.approx(mean_error((0.5, 0), (0.5, 1)), rel=1e-6)


def test_a_crossfade_ghosts_under_the_true_flow():
    pair = world_pair()
    delta = torch.tensor(pair.times).reshape(-1, 1, 1, 1)
    faded = score(pair, pair.images, torch.lerp(*pair.images, delta), None, SQUARE, TOOLS)
    true = score(pair, pair.images, pair.truth, None, SQUARE, TOOLS)
    for name in ("we_true", "we_true_mid"):
        assert faded[name] > 2 * true[name]


def test_high_frequency_ratio_is_one_for_the_inputs_themselves_and_less_for_a_blur():
    image = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))
    pair = Pair("still", (image, image), ("", ""), (0.25, 0.5))
    same = score(pair, pair.images, torch.stack([image, image]), None, SQUARE, TOOLS)
    assert same["high_frequency"] == pytest.approx(1)
    assert same["we"] == same["we_mid"] == pytest.approx(0, abs=1e-6)
    assert same["psnr"] is same["we_true"] is None
    blurred = torch.nn.functional.avg_pool2d(image[None], 3, 1, 1, count_include_pad=False).expand(2, -1, -1, -1)
    assert score(pair, pair.images, blurred, None, SQUARE, TOOLS)["high_frequency"] < 0.5


def test_lpips_is_taken_to_the_truth_and_to_both_inputs():
    def distance(images, others):
        return (images - others).abs().flatten(1).mean(1)

    first, last = torch.zeros(3, 64, 64), torch.ones(3, 64, 64)
    times = (0.25, 0.5, 0.75)
    frames = torch.stack([torch.full((3, 64, 64), value) for value in (0.2, 0.4, 0.6)])
    truth = torch.stack([torch.full((3, 64, 64), value) for value in times])
    pair = Pair("fade", (first, last), ("", ""), times, truth)
    found = score(pair, pair.images, frames, None, SQUARE, Tools(dis_flow, distance, None, {}))
    assert found["lpips"] == pytest.approx((0.05 + 0.1 + 0.15) / 3)
    assert found["lpips_mid"] == pytest.approx(0.1)
    assert found["lpips_inputs"] == pytest.approx(0.5)


def test_tools_without_weights_are_missing_with_a_reason(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    tools = find_tools()
    assert tools.flow is dis_flow
    assert tools.lpips is tools.fid is None
    assert set(tools.unavailable) == {"lpips", "fid"}
    assert all(tools.unavailable.values())
    assert set(FLOWS) == {"dis", "raft"}
    with pytest.raises(RuntimeError, match="'raft' is not available"):
        find_tools("raft")
