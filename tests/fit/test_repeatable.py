# SPDX-License-Identifier: Apache-2.0
"""The written-out gradients of attention against autograd's; that they repeat their bits takes a GPU to see."""

from contextlib import ExitStack

import pytest
import torch
import torch.nn.functional as F
from support.processors import Louder
from support.snapshot import snapshot

from dreammover_pipeline import repeatable
from dreammover_pipeline.lora import LoraFit, fit_pair_lora
from dreammover_pipeline.repeatable import (
    EfficientAttention,
    WrittenAttention,
    attend,
    is_efficient,
    repeatable_attention,
    repeatable_convolutions,
)

ON_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.mark.parametrize("scale", [None, 0.7])
@pytest.mark.parametrize("at_once", [1, 2 * 3 * 5 * 2, 10**6])
def test_gradients_are_those_of_autograd(monkeypatch, scale, at_once):
    monkeypatch.setattr(repeatable, "WEIGHTS_AT_ONCE", at_once)
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 3, 7, 4), (2, 3, 5, 4), (2, 3, 5, 6))
    inputs = [torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes]
    weight = torch.randn(2, 3, 7, 6, generator=generator, dtype=torch.float64)
    made = WrittenAttention.apply(*inputs, scale)
    expected = F.scaled_dot_product_attention(*inputs, scale=scale)
    assert torch.allclose(made, expected)
    gradients = [torch.autograd.grad((result * weight).sum(), inputs) for result in (made, expected)]
    assert all(torch.allclose(*both) for both in zip(*gradients, strict=True))


def test_a_unet_has_the_same_gradients_and_its_processors_back(unet, pair):
    clean, texts = pair
    before = snapshot(unet)

    def gradient():
        latents = clean.clone().requires_grad_()
        unet(latents, torch.tensor(11), texts).sample.square().sum().backward()
        return latents.grad

    with torch.enable_grad():
        expected = gradient()
        with repeatable_attention(unet):
            assert all(type(p).__name__ == "RepeatableProcessor" for p in unet.attn_processors.values())
            assert torch.allclose(gradient(), expected, rtol=1e-3, atol=1e-5)
    unet.zero_grad()
    assert snapshot(unet) == before


def test_attention_of_another_kind_is_left_alone():
    query = torch.randn(1, 2, 4, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    mask = torch.ones(4, 4, dtype=torch.bool).tril()
    with repeatable._Repeatable():
        plain = F.scaled_dot_product_attention(query, query, query, attn_mask=None, dropout_p=0.0, is_causal=False)
        masked = F.scaled_dot_product_attention(query, query, query, attn_mask=mask)
        causal = F.scaled_dot_product_attention(query, query, query, is_causal=True)
    assert "WrittenAttention" in type(plain.grad_fn).__name__
    assert "WrittenAttention" not in type(masked.grad_fn).__name__
    assert torch.allclose(masked, causal)


def test_convolutions_repeat_until_the_last_of_several_fits_ends(monkeypatch):
    cudnn = torch.backends.cudnn
    monkeypatch.setattr(cudnn, "deterministic", False)
    monkeypatch.setattr(cudnn, "benchmark", True)
    first = ExitStack()
    first.enter_context(repeatable_convolutions())

    def fail_meanwhile():
        with repeatable_convolutions():
            first.close()
            assert (cudnn.deterministic, cudnn.benchmark) == (True, False)
            raise KeyboardInterrupt

    assert (cudnn.deterministic, cudnn.benchmark) == (True, False)
    with pytest.raises(KeyboardInterrupt):
        fail_meanwhile()
    assert (cudnn.deterministic, cudnn.benchmark) == (False, True)


def test_a_users_processor_gets_its_keyword_arguments(unet, pair):
    clean, texts = pair
    louder = Louder()
    unet.set_attn_processor(louder)
    with repeatable_attention(unet), torch.no_grad():
        unet(clean, torch.tensor(11), texts, cross_attention_kwargs={"gain": 0.5})
    assert louder.given == [0.5] * len(unet.attn_processors)


@ON_GPU
@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 1e-4), (torch.float16, 5e-3)])
@pytest.mark.parametrize(("queries", "keys"), [(1024, 1024), (1024, 77), (200, 200)])
@pytest.mark.parametrize("function", [EfficientAttention, WrittenAttention])
def test_gradients_on_a_gpu_are_those_of_autograd_and_repeat_their_bits(function, dtype, rounding, queries, keys):
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 8, queries, 40), (2, 8, keys, 40), (2, 8, keys, 40))
    wanted = [torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes]
    inputs = [value.detach().to("cuda", dtype).requires_grad_() for value in wanted]
    weight = torch.randn(shapes[0], generator=generator, dtype=torch.float64)
    assert is_efficient(*inputs)
    expected = torch.autograd.grad((F.scaled_dot_product_attention(*wanted) * weight).sum(), wanted)
    made, again = (
        torch.autograd.grad((function.apply(*inputs, None) * weight.to("cuda", dtype)).sum(), inputs) for _ in range(2)
    )
    for gradient, same, right in zip(made, again, expected, strict=True):
        assert torch.equal(gradient, same)
        assert (gradient.cpu().double() - right).norm() <= rounding * right.norm()
    assert "EfficientAttention" in type(attend(*inputs).grad_fn).__name__


@ON_GPU
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_two_fits_with_one_seed_are_the_same_bits_on_a_gpu(unet, pair, alphas_cumprod, dtype, checkpointed):
    unet = unet.to("cuda", dtype)
    pair = [tensor.cuda() for tensor in pair]
    first, second = (
        fit_pair_lora(unet, *pair, alphas_cumprod, LoraFit(4, 4, 1e-3), 0, gradient_checkpointing=checkpointed)
        for _ in range(2)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
