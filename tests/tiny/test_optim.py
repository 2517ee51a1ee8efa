# SPDX-License-Identifier: Apache-2.0
"""The optimizers of the embedded checkpoint's training."""

from itertools import pairwise

import pytest
import torch

from dreammover_pipeline.tiny import models, optim, recipes

QUICK = recipes.PRESETS["quick"]


@pytest.mark.parametrize("shape", [(3, 16, 40), (2, 40, 16), (1, 24, 24)])
def test_orthogonalised_matrices_keep_their_directions_and_lose_their_scales(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, _, vt = torch.linalg.svd(matrices, full_matrices=False)
    strengths = u.mT @ optim.orthogonalise(matrices).float() @ vt.mT  # diagonal if the singular vectors are kept
    values = strengths.diagonal(dim1=1, dim2=2)
    assert values.min() > 0.6
    assert values.max() < 1.3
    assert (strengths - torch.diag_embed(values)).abs().max() < 0.05


def build_all(tokenizer):
    size = QUICK.world.size
    return {
        "vae": models.build_vae(QUICK.sizes, size),
        "unet": models.build_unet(QUICK.sizes, size),
        "text_encoder": models.build_text_encoder(QUICK.sizes, tokenizer),
    }


def test_every_parameter_is_trained_by_one_optimizer(tokenizer):
    model = torch.nn.ModuleDict(build_all(tokenizer))
    muon, adamw = optim.split_parameters(model)
    assert sorted(map(id, muon + adamw)) == sorted(map(id, model.parameters()))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    by_muon, by_adamw = ({names[id(parameter)] for parameter in part} for part in (muon, adamw))
    assert {
        "vae.encoder.conv_in.weight",
        "vae.decoder.conv_out.weight",
        "vae.quant_conv.weight",
        "vae.post_quant_conv.weight",
        "unet.conv_in.weight",
        "unet.conv_out.weight",
        "text_encoder.embeddings.token_embedding.weight",
        "text_encoder.embeddings.position_embedding.weight",
    } <= by_adamw
    assert {
        "vae.encoder.down_blocks.0.resnets.0.conv1.weight",
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight",
        "unet.time_embedding.linear_1.weight",
    } <= by_muon
    assert all(parameter.ndim > 1 for parameter in muon)


def test_a_muon_step_changes_weights_by_a_fifth_of_its_rate():
    layer = torch.nn.Conv2d(16, 48, 3)
    before = layer.weight.detach().clone()
    optimizer = optim.MuonAdamW(torch.nn.Sequential(layer), 0.01, 0.001)
    layer(torch.randn(2, 16, 8, 8)).square().mean().backward()
    optimizer.step(0.5)
    change = (layer.weight - before).square().mean().sqrt().item()
    # a wide orthogonal matrix has 48 singular values of about 1 on 48 × 144 entries
    assert change == pytest.approx(0.5 * 0.01 * 0.2, rel=0.25)
    assert layer.weight.grad is None
    assert layer.bias.grad is None


def test_learning_rates_warm_up_stay_and_fall_to_zero():
    factors = [optim.rate_factor(step, 1000, 0.6) for step in range(1000)]
    assert factors[0] == 1 / optim.WARM_UP
    assert factors[optim.WARM_UP : 400] == [1] * (400 - optim.WARM_UP)
    assert all(later < earlier for earlier, later in pairwise(factors[400:]))
    assert factors[700] == pytest.approx(0.5)
    assert 0 < factors[-1] < 0.002


def test_the_average_of_constant_weights_is_them_and_it_follows_changes():
    model = torch.nn.Linear(3, 2)
    average = optim.Average(model, 0.9)
    torch.nn.init.constant_(model.bias, 5.0)
    for step in range(200):
        average.update(step)
    torch.testing.assert_close(average.weights["bias"], model.bias.detach())
    torch.nn.init.constant_(model.bias, 6.0)
    average.update(200)
    torch.testing.assert_close(average.weights["bias"], torch.full((2,), 5.1))
