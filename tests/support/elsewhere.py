# SPDX-License-Identifier: Apache-2.0
"""A device that no machine has: its tensors lie in main memory, but have to be used as those of a GPU have.

It refuses with a RuntimeError what GPUs and Apple's MPS refuse: an operation on tensors of two devices, unless those
of the CPU are single numbers or indices, and float64, which MPS lacks. And it counts how often the host waits for it.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("meta")  # a name that torch knows and that no code under test has a case for
LACKING = (torch.float64, torch.complex128)
ATEN = torch.ops.aten
AUTOCAST = torch.autocast
INDEXING = (ATEN.index, ATEN.index_put, ATEN.index_put_)
SENDING = (ATEN._to_copy, ATEN.copy_)
# Operations whose results, or the sizes of whose results, the host has to know before it goes on.
ANSWERS = (
    ATEN._local_scalar_dense,
    ATEN.nonzero,
    ATEN.equal,
    ATEN.masked_select,
    ATEN._unique2,
    ATEN.repeat_interleave,
)

# How often the host waited for the device, by the operation. It also waits where it sends the values of a tensor.
waits: Counter[str] = Counter()


class Elsewhere(torch.Tensor):
    """A tensor on the device; `held` are its values."""

    is_meta = False  # since it has values

    @staticmethod
    def __new__(cls, held: torch.Tensor):
        if held.dtype in LACKING:
            raise RuntimeError(f"the device has no {held.dtype}")
        layout = held.shape, held.stride(), held.storage_offset()
        tensor = torch.Tensor._make_wrapper_subclass(cls, *layout, dtype=held.dtype, device=DEVICE)
        tensor.held = held
        return tensor

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _result(func, args, kwargs or {})

    def __repr__(self):
        return f"Elsewhere({self.held!r})"


def _result(func, args, kwargs):
    """What an operation gives: on the device if it is told so, and else if anything that it works on is there."""
    tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
    there = [tensor for tensor in tensors if isinstance(tensor, Elsewhere)]
    here = [tensor for tensor in tensors if not isinstance(tensor, Elsewhere)]
    kind, told = func.overloadpacket, kwargs.get("device")
    to_device = bool(there) if told is None else told == DEVICE
    if kind is ATEN.copy_:
        to_device = isinstance(args[0], Elsewhere)
    elif kind in INDEXING:
        indices = [tensor for tensor in here if any(tensor is index for index in args[1])]
        if indices and there:
            waits[str(kind)] += 1
        here = [tensor for tensor in here if not any(tensor is index for index in indices)]
    if kind not in (ATEN._to_copy, ATEN.copy_) and there and any(tensor.dim() for tensor in here):
        raise RuntimeError(f"{func} was given tensors of two devices")
    generator = kwargs.get("generator")
    if to_device and generator is not None and generator.device != DEVICE:
        raise RuntimeError(f"{func} was to draw on the device by a generator of another one")
    asked = there and (kind in ANSWERS or not to_device or _chooses(kind, args))
    if asked or (here and to_device and kind in SENDING):
        waits[str(kind)] += 1

    def held(value):
        return value.held if isinstance(value, Elsewhere) else value

    if told is not None:
        kwargs = kwargs | {"device": torch.device("cpu")}
    result = func(*tree_map(held, args), **tree_map(held, kwargs))
    known = {id(tensor.held): tensor for tensor in there}  # an operation in place gives back what it was given

    def placed(value):
        if not isinstance(value, torch.Tensor) or not to_device:
            return value
        return known[id(value)] if id(value) in known else Elsewhere(value)

    return tree_map(placed, result)


def _chooses(kind, args) -> bool:
    """Whether an operation picks by true and false, so that the size of its result depends on values."""
    return kind in INDEXING and any(index is not None and index.dtype == torch.bool for index in args[1])


class _Factories(TorchDispatchMode):
    """Operations without a tensor of the device, among them those that make the first one."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _result(func, args, kwargs or {})


class _Numbers(TorchFunctionMode):
    """What torch does without asking a tensor's class: lists as indices, tensors of Python's numbers, the way back."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.Tensor.__getitem__ and isinstance(args[1], list):
            waits["index"] += 1
            return args[0][torch.tensor(args[1], device="cpu")]
        if func is torch.Tensor.tolist and isinstance(args[0], Elsewhere):
            waits["tolist"] += 1
            return args[0].held.tolist()
        like = args[0] if func is torch.Tensor.new_tensor else None
        told = kwargs.get("device", None if like is None else like.device)
        known = func in (torch.tensor, torch.Tensor.new_tensor) or (
            func is torch.as_tensor and not isinstance(args[0], torch.Tensor)
        )
        if not known or told is None or torch.device(told) != DEVICE:
            return func(*args, **kwargs)
        waits["tensor"] += 1
        dtype = kwargs.get("dtype", None if like is None else like.dtype)
        return Elsewhere(torch.tensor(args[-1], dtype=dtype, device="cpu"))


def _autocast(device_type: str, *args, **kwargs):
    """Torch's autocast; the device has none, so there is none to switch off either."""
    return nullcontext() if device_type == DEVICE.type else AUTOCAST(device_type, *args, **kwargs)


@contextmanager
def elsewhere(*models: torch.nn.Module) -> Iterator[None]:
    """Have models on the device, and the device at hand, while the context lasts.

    Args:
        models: What else than the caller's own tensors is to be there; afterwards they are where they were.
    """
    with ExitStack() as stack:
        for module in (module for model in models for module in model.modules()):
            for tensors in (module._parameters, module._buffers):
                stack.callback(tensors.update, dict(tensors))
                for name, tensor in tensors.items():
                    if isinstance(tensor, torch.nn.Parameter):
                        tensors[name] = torch.nn.Parameter(Elsewhere(tensor.detach()), requires_grad=False)
                    elif tensor is not None:
                        tensors[name] = Elsewhere(tensor)
        stack.enter_context(mock.patch.object(torch, "autocast", _autocast))
        stack.enter_context(_Factories())
        stack.enter_context(_Numbers())
        yield
