# SPDX-License-Identifier: Apache-2.0
"""How the checkpoint is trained: Muon for the weight matrices, AdamW for the rest, and a moving average of both."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor, nn

ENDS = ("conv_in", "conv_out", "quant_conv", "post_quant_conv")
"""Convolutions to and from pixels or latents; their few channels are what they are, not directions to even out."""
MOMENTUM = 0.95
WARM_UP = 20  # steps


def orthogonalise(matrices: Tensor) -> Tensor:
    """Push all singular values of each matrix towards 1, by five Newton–Schulz iterations in bfloat16.

    X ← aX + b(XXᵀ)X + c(XXᵀ)²X, whose steep polynomial brings every singular value into about [0.7, 1.2].

    Source: Muon, https://kellerjordan.github.io/posts/muon.

    Args:
        matrices: (n, rows, columns), none of them zero.

    Returns:
        (n, rows, columns) bfloat16.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)
    x = (x.mT if tall else x).bfloat16()  # the smaller Gram matrix of the two
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


def split_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Which parameters Muon trains and which AdamW does.

    AdamW has vectors (norms, biases), embeddings, and the convolutions named in `ENDS`; Muon every other matrix or
    convolution.

    Returns:
        (those of Muon, those of AdamW).
    """
    muon, adamw = [], []
    for path, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            is_end = path.rpartition(".")[2] in ENDS
            hidden = parameter.ndim > 1 and not is_end and not isinstance(module, nn.Embedding)
            (muon if hidden else adamw).append(parameter)
    return muon, adamw


class MuonAdamW:
    """Both optimizers as one. Matrices of equal shape take their step together, in few large products.

    Args:
        model: whose parameters are trained.
        muon_rate: peak learning rate of Muon; a step changes a weight by about 0.2 of it, root mean square.
        adamw_rate: peak learning rate of AdamW.
    """

    def __init__(self, model: nn.Module, muon_rate: float, adamw_rate: float):
        muon, adamw = split_parameters(model)
        by_shape = defaultdict(list)
        for parameter in muon:
            by_shape[parameter.flatten(1).shape].append(parameter)
        self.groups = list(by_shape.values())
        # Half the size in bfloat16, which the iterations below use anyway.
        self.momenta = [torch.zeros_like(_stack(group), dtype=torch.bfloat16) for group in self.groups]
        self.muon_rate, self.adamw_rate = muon_rate, adamw_rate
        self.adamw = torch.optim.AdamW(adamw, lr=adamw_rate, betas=(0.9, 0.99), weight_decay=0.0)

    @torch.no_grad()
    def step(self, factor: float) -> None:
        """Take one step along the gradients and clear them.

        Args:
            factor: of the peak learning rates, in [0, 1].
        """
        for group, momentum in zip(self.groups, self.momenta, strict=True):
            gradient = torch.stack([parameter.grad.flatten(1) for parameter in group])
            running = momentum.float().lerp_(gradient, 1 - MOMENTUM)
            momentum.copy_(running)
            update = orthogonalise(gradient.lerp_(running, MOMENTUM))  # Nesterov
            rate = factor * self.muon_rate * 0.2 * max(update.shape[1:]) ** 0.5
            for parameter, change in zip(group, update, strict=True):
                parameter.sub_(rate * change.float().view_as(parameter))
                parameter.grad = None
        self.adamw.param_groups[0]["lr"] = factor * self.adamw_rate
        self.adamw.step()
        self.adamw.zero_grad()

    def state_dict(self) -> dict:
        """All that steps depend on apart from the parameters."""
        return {"momenta": self.momenta, "adamw": self.adamw.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        """Go on from what `state_dict` returned, on any device."""
        for momentum, saved in zip(self.momenta, state["momenta"], strict=True):
            momentum.copy_(saved)
        self.adamw.load_state_dict(state["adamw"])


def _stack(parameters: list[nn.Parameter]) -> Tensor:
    """(n, rows, columns): weights of one shape, kernels flattened to (out, in·k·k)."""
    return torch.stack([parameter.detach().flatten(1) for parameter in parameters])


def rate_factor(step: int, steps: int, decay: float) -> float:
    """Share of the peak learning rate: a short warm-up, a plateau, a linear way down to zero.

    Args:
        step: of the step about to be taken, from 0.
        steps: in all.
        decay: share of the steps on the way down, in (0, 1].
    """
    return min(1.0, (step + 1) / WARM_UP, (steps - step) / (decay * steps))


class Average:
    """Exponential moving average of a model's parameters, in float32.

    Args:
        model: whose parameters are followed.
        decay: of the weights per step, once enough steps are behind for that to make sense.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.sources = dict(model.named_parameters())
        self.weights = {name: parameter.detach().clone() for name, parameter in self.sources.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Follow the parameters after step number `step`."""
        decay = min(self.decay, (1 + step) / (10 + step))  # early weights are forgotten fast
        torch._foreach_lerp_(list(self.weights.values()), list(self.sources.values()), 1 - decay)
