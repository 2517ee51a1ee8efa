# SPDX-License-Identifier: Apache-2.0
"""LPIPS with random weights against loops in float64."""

import numpy as np
import pytest
import torch

from dreammover_pipeline.evaluation.lpips import Lpips


@pytest.fixture
def network():
    torch.manual_seed(0)
    network = Lpips()
    for head in network.heads:
        torch.nn.init.uniform_(head.weight)
    return network.requires_grad_(False)


@pytest.fixture
def images():
    return torch.rand(2, 2, 3, 41, 37, generator=torch.Generator().manual_seed(1))


def naive_convolution(x, weight, bias, stride, padding):
    """Convolution of (C, H, W) by one sum for each place, in numpy."""
    x, k = np.pad(x, ((0, 0), (padding, padding), (padding, padding))), weight.shape[-1]
    rows, columns = ((side - k) // stride + 1 for side in x.shape[1:])
    out = np.empty((len(weight), rows, columns))
    for i in range(rows):
        for j in range(columns):
            part = x[:, i * stride : i * stride + k, j * stride : j * stride + k]
            out[:, i, j] = np.tensordot(weight, part, 3) + bias
    return out


def naive_pool(x):
    rows, columns = ((side - 3) // 2 + 1 for side in x.shape[1:])
    cells = [[x[:, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3].max((1, 2)) for j in range(columns)] for i in range(rows)]
    return np.array(cells).transpose(2, 0, 1)


def naive_features(network, image):
    x = 2 * image.double().numpy() - 1
    x = (x - np.array([-0.030, -0.088, -0.188])[:, None, None]) / np.array([0.458, 0.448, 0.450])[:, None, None]
    found = []
    for index, (stride, padding) in enumerate([(4, 2), (1, 2), (1, 1), (1, 1), (1, 1)]):
        part = network.convolutions[index]
        x = naive_pool(x) if index in (1, 2) else x
        x = np.maximum(0, naive_convolution(x, part.weight.double().numpy(), part.bias.numpy(), stride, padding))
        found.append(x / (np.sqrt((x**2).sum(0)) + 1e-10))
    return found


def test_the_distance_is_what_loops_say(network, images):
    expected = []
    for first, second in zip(*images, strict=True):
        layers = zip(naive_features(network, first), naive_features(network, second), network.heads, strict=True)
        weighted = [(head.weight.double().numpy()[0] * (a - b) ** 2).sum(0).mean() for a, b, head in layers]
        expected.append(sum(weighted))
    assert min(expected) > 0.01
    torch.testing.assert_close(network(*images), torch.tensor(expected).float(), rtol=1e-4, atol=0)


def test_it_is_a_distance(network, images):
    assert network(images[0], images[0]).tolist() == [0, 0]
    assert torch.equal(network(*images), network(*images.flip(0)))
    assert torch.allclose(network(images[0][:1], images[1][:1]), network(*images)[:1])


def test_black_images_have_no_direction_and_no_distance(network):
    for part in network.convolutions:
        torch.nn.init.zeros_(part.weight)
        torch.nn.init.zeros_(part.bias)
    assert network(torch.zeros(1, 3, 31, 31), torch.ones(1, 3, 31, 31)).tolist() == [0]
