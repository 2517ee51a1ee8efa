# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from support.snapshot import snapshot

from dreammover_pipeline.features import captured_up_block, up_block_features


@pytest.fixture
def unet(components):
    return components["unet"]


def forward(unet, latents):
    with torch.no_grad():
        return unet(latents, torch.tensor(261), torch.zeros(len(latents), 24, 32)).sample


@pytest.mark.parametrize("block", range(4))
def test_features_are_what_the_block_puts_out(unet, block):
    expected = []
    handle = unet.up_blocks[block].register_forward_hook(lambda module, args, output: expected.append(output))
    latents = torch.randn(2, 4, 8, 8)
    (features,) = up_block_features(unet, [block], lambda: forward(unet, latents))
    handle.remove()
    assert torch.equal(features, expected[0])
    assert features.shape[0] == 2


def test_the_paper_block_is_half_as_fine_as_the_latents(unet):
    """At 512² up_blocks[1] gives 1280 channels on 32×32: half the latent grid."""
    (features,) = up_block_features(unet, [1], lambda: forward(unet, torch.randn(2, 4, 8, 8)))
    assert features.shape == (2, 16, 4, 4)


def test_several_blocks_are_read_off_one_forward(unet):
    latents, calls = torch.randn(2, 4, 8, 8), []

    def run():
        calls.append(forward(unet, latents))

    both = up_block_features(unet, [2, 1], run)
    assert len(calls) == 1
    for block, features in zip([2, 1], both, strict=True):
        (alone,) = up_block_features(unet, [block], run)
        assert torch.equal(features, alone)


def test_the_hook_is_gone_afterwards_also_after_an_exception(unet):
    before = snapshot(unet)
    up_block_features(unet, [1, 2], lambda: forward(unet, torch.randn(2, 4, 8, 8)))
    assert snapshot(unet) == before
    with pytest.raises(RuntimeError, match="stop"), captured_up_block(unet, 1):
        raise RuntimeError("stop")
    assert snapshot(unet) == before


def test_features_are_read_off_a_compiled_unet_too(unet):
    """A hook registered after the first compiled call would silently never fire."""
    latents = torch.randn(2, 4, 8, 8)
    (expected,) = up_block_features(unet, [1], lambda: forward(unet, latents))
    compiled = torch.compile(unet, backend="eager")
    forward(compiled, latents)
    (features,) = up_block_features(compiled, [1], lambda: forward(compiled, latents))
    assert torch.allclose(features, expected, atol=1e-5)
