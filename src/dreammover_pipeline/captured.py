# SPDX-License-Identifier: Apache-2.0
"""Training steps that a GPU repeats by itself, as it has recorded one.

A step of the LoRA fit is thousands of small kernels, and a GPU waits for the host to launch each of them. As a CUDA
graph it launches them all at once: the step is recorded with the tensors it works on, which must therefore keep their
places in memory, and every later step fills them anew and replays the record.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from diffusers.utils import logging

from .memory import free_cache, is_out_of_memory

logger = logging.get_logger(__name__)

WARM_UP_STEPS = 3  # before the record, in which kernels are chosen and buffers made
REPLAY_TOLERANCE = 0.05  # by how much a replayed step may differ from the step itself, as a share of its length

_trusted: set[tuple[torch.device, torch.dtype]] = set()  # where a replay has been compared with a step in this process


@dataclass(eq=False)
class TrainingStep:
    """A step of an optimizer that can be taken back, on tensors that keep their places.

    Args:
        loss: Computes the loss of the inputs as they are.
        parameters: What is trained.
        optimizer: Of these parameters, newly made.
        scaler: Of the loss; one that is not enabled does nothing.
    """

    loss: Callable[[], torch.Tensor]
    parameters: list[torch.nn.Parameter]
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    _start: list[torch.Tensor] = field(init=False)
    _scale: dict = field(init=False)

    def __post_init__(self):
        self._start = [parameter.detach().clone() for parameter in self.parameters]
        self._scale = self.scaler.state_dict()

    def __call__(self) -> None:
        """Take a step."""
        self.optimizer.zero_grad()
        self.scaler.scale(self.loss()).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def reset(self) -> None:
        """Put parameters, optimizer and scaler back to what they were before the first step."""
        with torch.no_grad():
            for parameter, value in zip(self.parameters, self._start, strict=True):
                parameter.copy_(value)
            for state in self.optimizer.state.values():
                for value in state.values():
                    value.zero_()
        self.scaler.load_state_dict(self._scale)

    def moved(self) -> torch.Tensor:
        """How far all parameters are from where they started, in one vector."""
        return torch.cat(
            [(now - start).flatten() for now, start in zip(self.parameters, self._start, strict=True)]
        ).detach()


def replayed(step: TrainingStep, dtype: torch.dtype) -> Callable[[], None]:
    """What takes a step as a CUDA graph; the step itself where it cannot be recorded or does something else replayed.

    Args:
        step: Not taken yet, with inputs that it can be tried on; it is as new afterwards.
        dtype: Of the model that is trained, which decides the kernels.
    """
    device = step.parameters[0].device
    try:
        replay = _recorded(step, device)
        if (device, dtype) not in _trusted:
            if not repeats(step, replay):
                raise RuntimeError("what was replayed is not what the step does")
            _trusted.add((device, dtype))
        return replay
    except RuntimeError as error:
        if not is_out_of_memory(error):
            logger.warning(f"The steps of the LoRA fit are not recorded as a CUDA graph, and take longer: {error}")
    # After the `except` block the error is gone, and with it the tensors that it held.
    step.optimizer.zero_grad()
    free_cache(device)
    step.reset()
    return step


def _recorded(step: TrainingStep, device: torch.device) -> Callable[[], None]:
    """The replay of a step that is recorded on a GPU."""
    aside = torch.cuda.Stream(device)
    aside.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(aside):  # as torch asks for, so that nothing of the record hangs on the default stream
        for _ in range(WARM_UP_STEPS):
            step()
    torch.cuda.current_stream(device).wait_stream(aside)
    step.optimizer.zero_grad()  # so that gradients are made among the memory of the record
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    step.reset()
    return graph.replay


def repeats(step: TrainingStep, replay: Callable[[], None]) -> bool:
    """Whether a replay does what the step does; both begin anew, and the step is as new afterwards.

    The difference is measured against the length of the step. It is not zero, since kernels may add in another order.
    """
    step.reset()
    replay()
    made = step.moved()
    step.reset()
    step()
    expected = step.moved()
    step.reset()
    return bool((made - expected).norm() <= REPLAY_TOLERANCE * expected.norm())
