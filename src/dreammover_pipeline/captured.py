# SPDX-License-Identifier: Apache-2.0
"""What a GPU repeats by itself, as it has recorded it: steps of the fit, calls of the UNet, and the detail of frames.

A step of the LoRA fit is thousands of small kernels, and a GPU waits for the host to launch each of them. So it does
in a call of the UNet on a few samples, and for the detail of a frame. As a CUDA graph they are launched all at once:
what is done is recorded with the tensors it works on, which must therefore keep their places in memory, and every
later time these are filled anew and the record is replayed.

A record lasts as long as the stage that it is for: the fit, the inversion, or the pictures of a video. A longer life
would save a fraction of a second for each pair, hold as much memory as the stage takes, and need to know of every
change to the model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from threading import Lock

import torch
from diffusers.utils import logging

from .adapters import unwrapped
from .memory import free_cache, is_out_of_memory

logger = logging.get_logger(__name__)

REPLAY_TOLERANCE = 0.05  # how far what is replayed may be from what was recorded, as a share of the length of that

# Devices and precisions for which a training step of this process was compared with its replay. That takes as long as
# two steps, so later fits there are not compared.
_trusted: set[tuple[torch.device, torch.dtype]] = set()
# Devices on which recording broke off. Torch may keep memory of such a record and some of its state for as long as the
# process lasts, so nothing is recorded there any more.
_broken: set[torch.device] = set()
# A lock that is held while the stream for records is in use, since a record takes in all that is done on its stream.
_recording = Lock()


@dataclass(eq=False)
class TrainingStep:
    """A step of an optimizer that can be taken back, on tensors that keep their places.

    Args:
        loss: Function that computes the loss of the inputs as they are.
        parameters: What is trained.
        optimizer: The optimizer of the parameters, newly made.
        scaler: The scaler of the loss; one that is not enabled does nothing.
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
        step: The step, not taken yet, with inputs that it can be tried on; it is as new afterwards.
        dtype: The dtype of the model that is trained, which decides the kernels.
    """
    device = step.parameters[0].device
    if device in _broken:
        return step
    try:
        replay = _recorded_step(step, device)
        if (device, dtype) not in _trusted:
            if not repeats(step, replay):
                raise RuntimeError("what was replayed is not what the step does")
            _trusted.add((device, dtype))
        return replay
    except RuntimeError as error:
        if not is_out_of_memory(error):
            logger.warning(f"The steps of a fit are not recorded as a CUDA graph, and take longer: {error}")
    # After the `except` block the error is gone, and with it the tensors that it held.
    step.optimizer.zero_grad()
    _free_what_was_recorded(device)
    step.reset()
    return step


def _recorded_step(step: TrainingStep, device: torch.device) -> Callable[[], None]:
    """The replay of a step that is recorded on a GPU."""
    _warm_up(step, device)  # in which kernels are chosen, and what the optimizer keeps is made
    step.optimizer.zero_grad()  # so that gradients are made among the memory of the record
    replay, _ = _recorded(step, device)
    step.reset()
    return replay


@cache
def _aside(device: torch.device) -> torch.cuda.Stream:
    """The stream on which all is recorded; torch keeps a workspace for every stream that there has ever been."""
    return torch.cuda.Stream(device)


def _warm_up(work: Callable[[], object], device: torch.device) -> object:
    """Do something beside the default stream, as torch asks for, so that nothing of a record hangs on that stream."""
    aside = _aside(device)
    with _recording:
        aside.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(aside):
            result = work()
        torch.cuda.current_stream(device).wait_stream(aside)
    return result


def _recorded(work: Callable[[], object], device: torch.device) -> tuple[Callable[[], None], object]:
    """The replay of some work on a GPU, and its result, which every replay fills anew."""
    graph, aside = torch.cuda.CUDAGraph(), _aside(device)
    try:
        # A record that breaks off stays on its stream, so that stream is entered, and left, by a context of its own.
        # By default a record forbids all threads, such as those of other pipelines, what only this one must not do.
        with (
            _recording,
            torch.cuda.stream(aside),
            torch.cuda.graph(graph, stream=aside, capture_error_mode="thread_local"),
        ):
            result = work()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            _broken.add(device)
        raise
    return graph.replay, result


def _free_what_was_recorded(device: torch.device) -> None:
    """Free the memory of a record that is not used; that of one that broke off cannot be freed."""
    if device not in _broken:
        free_cache(device)


def repeats(step: TrainingStep, replay: Callable[[], None]) -> bool:
    """Whether a replay does what the step does; both begin anew, and the step is as new afterwards.

    The difference is measured against the length of the step.
    """
    step.reset()
    replay()
    made = step.moved()
    step.reset()
    step()
    expected = step.moved()
    step.reset()
    return same_result(made, expected)


class RecordedCall:
    """A function of tensors that a GPU repeats by itself once it has recorded it.

    The call that is recorded computes the result first, and then the record, whose replay is compared with that
    result. Where the two differ, or where recording fails, the function goes on being called. Where recording broke
    off, as it does where the function waits for the GPU, nothing is recorded on that device any more.

    Args:
        function: Function from tensors to one tensor, without gradients. It must do nothing but launch kernels, the
            same ones for all tensors that it is called with.
        name: What a warning calls the calls of the function, in the plural.
        before: Number of calls before the one that is recorded, for a function that is often called no more than once.
    """

    def __init__(self, function: Callable[..., torch.Tensor], name: str, before: int = 0):
        self.function, self.name, self._before = function, name, before
        self._inputs: list[torch.Tensor] = []
        self._output: torch.Tensor | None = None
        self._replay: Callable[[], None] | None = None
        self._failed = False

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        """The function's result, a tensor of its own; all calls must have inputs of the same shapes and dtypes."""
        if self._before:
            self._before -= 1
        elif self._replay is not None:
            for place, value in zip(self._inputs, inputs, strict=True):
                place.copy_(value)
            self._replay()
            return self._output.clone()
        elif not self._failed and inputs[0].device not in _broken:
            return self._recorded_call(inputs)
        return self.function(*inputs)

    def _recorded_call(self, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        device = inputs[0].device
        self._inputs = [value.clone() for value in inputs]
        result = _warm_up(lambda: self.function(*self._inputs), device)
        try:
            self._replay, self._output = _recorded(lambda: self.function(*self._inputs), device)
            self._replay()
            if not same_result(self._output, result):
                raise RuntimeError("what was replayed is not what the call computes")
            return result
        except RuntimeError as error:
            if not is_out_of_memory(error):
                logger.warning(f"{self.name} are not recorded as a CUDA graph, and take longer: {error}")
        self._failed, self._replay, self._output, self._inputs = True, None, None, []
        _free_what_was_recorded(device)
        return result


def same_result(made: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether two results are one but for rounding, since kernels may add in another order; never if not finite."""
    made, expected = made.float(), expected.float()
    return bool((made - expected).norm() <= REPLAY_TOLERANCE * expected.norm())


def only_kernels(model: torch.nn.Module) -> bool:
    """Whether a model does nothing but launch kernels, so that a record repeats all that it does.

    Hooks, forwards that were put in the place of a module's own (as offloading and caching do it), and attention
    processors that are not diffusers' may do something on the host too, or something else every time.
    """
    model = unwrapped(model)
    hooked = any(
        module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module) for module in model.modules()
    )
    processors = getattr(model, "attn_processors", {}).values()
    return not hooked and all(type(processor).__module__.startswith("diffusers.") for processor in processors)
