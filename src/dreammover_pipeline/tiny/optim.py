# SPDX-License-Identifier: Apache-2.0
"""Optimizers of the training: Muon for weight matrices, AdamW for all else, and a moving average of the weights."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor, nn

ENDS = ("conv_in", "conv_out", "quant_conv", "post_quant_conv")
"""Convolutions to and from pixels or latents. Muon, which evens out directions, does not suit their few channels."""
MOMENTUM = 0.95
WARM_UP = 20  # steps over which the learning rate rises


def orthogonalise(matrices: Tensor) -> Tensor:
    """Push all singular values of each matrix towards 1, by five Newton–Schulz iterations in bfloat16.

    X ← aX + b(XXᵀ)X + c(XXᵀ)²X, a steep polynomial that brings every singular value into about [0.7, 1.2].

    Source: Muon, https://kellerjordan.github.io/posts/muon.

    Args:
        matrices: n matrices (n, rows, columns), none of which is zero.

    Returns:
        (n, rows, columns) bfloat16.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)
    x = (x.mT if tall else x).bfloat16()  # so that the smaller of the two Gram matrices is computed
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


def split_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Split a model's parameters between the two optimizers.

    AdamW trains vectors (norms and biases), embeddings, and the convolutions named in `ENDS`. Muon trains every other
    matrix or convolution.

    Returns:
        The parameters that Muon trains, and the parameters that AdamW trains.
    """
    muon, adamw = [], []
    for path, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            is_end = path.rpartition(".")[2] in ENDS
            hidden = parameter.ndim > 1 and not is_end and not isinstance(module, nn.Embedding)
            (muon if hidden else adamw).append(parameter)
    return muon, adamw


class MuonAdamW:
    """Muon and AdamW as one optimizer. Muon treats matrices of equal shape together, in few large products.

    Args:
        model: the model whose parameters are trained.
        muon_rate: peak learning rate of Muon; a step changes weights by about 0.2 of the rate, as a root mean square.
        adamw_rate: peak learning rate of AdamW.
    """

    def __init__(self, model: nn.Module, muon_rate: float, adamw_rate: float):
        muon, adamw = split_parameters(model)
        by_shape = defaultdict(list)
        for parameter in muon:
            by_shape[parameter.flatten(1).shape].append(parameter)
        self.groups = list(by_shape.values())
        # bfloat16 takes half the memory of float32, and `orthogonalise` computes in it anyway.
        self.momenta = [torch.zeros_like(_stack(group), dtype=torch.bfloat16) for group in self.groups]
        self.muon_rate, self.adamw_rate = muon_rate, adamw_rate
        self.adamw = torch.optim.AdamW(adamw, lr=adamw_rate, betas=(0.9, 0.99), weight_decay=0.0)

    @torch.no_grad()
    def step(self, factor: float) -> None:
        """Change the parameters by one step against their gradients, and clear the gradients.

        Args:
            factor: the learning rates as a share of their peaks, in [0, 1].
        """
        for group, momentum in zip(self.groups, self.momenta, strict=True):
            gradient = torch.stack([parameter.grad.flatten(1) for parameter in group])
            running = momentum.float().lerp_(gradient, 1 - MOMENTUM)
            momentum.copy_(running)
            update = orthogonalise(gradient.lerp_(running, MOMENTUM))  # Nesterov momentum
            rate = factor * self.muon_rate * 0.2 * max(update.shape[1:]) ** 0.5
            for parameter, change in zip(group, update, strict=True):
                parameter.sub_(rate * change.float().view_as(parameter))
                parameter.grad = None
        self.adamw.param_groups[0]["lr"] = factor * self.adamw_rate
        self.adamw.step()
        self.adamw.zero_grad()

    def state_dict(self) -> dict:
        """Everything apart from the parameters that later steps depend on."""
        return {"momenta": self.momenta, "adamw": self.adamw.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        """Go on from what `state_dict` returned, on whatever device that was."""
        for momentum, saved in zip(self.momenta, state["momenta"], strict=True):
            momentum.copy_(saved)
        self.adamw.load_state_dict(state["adamw"])


def _stack(parameters: list[nn.Parameter]) -> Tensor:
    """Weights of equal shape as (n, rows, columns); kernels of convolutions are flattened to (out, in·k·k)."""
    return torch.stack([parameter.detach().flatten(1) for parameter in parameters])


def rate_factor(step: int, steps: int, decay: float) -> float:
    """The learning rate of a step as a share of its peak: a short warm-up, a plateau, then a linear fall to zero.

    Args:
        step: number of the step, from 0.
        steps: number of steps in all.
        decay: share of the steps over which the rate falls, in (0, 1].
    """
    return min(1.0, (step + 1) / WARM_UP, (steps - step) / (decay * steps))


class Average:
    """Exponential moving average of a model's parameters, in float32.

    Args:
        model: the model whose parameters are averaged.
        decay: share of the average that each step keeps; early steps keep less, so that first weights do not linger.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.sources = dict(model.named_parameters())
        self.weights = {name: parameter.detach().clone() for name, parameter in self.sources.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take the parameters into the average after step number `step`, counted from 0."""
        decay = min(self.decay, (1 + step) / (10 + step))  # smaller in early steps
        torch._foreach_lerp_(list(self.weights.values()), list(self.sources.values()), 1 - decay)
