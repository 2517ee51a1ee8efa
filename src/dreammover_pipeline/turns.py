# SPDX-License-Identifier: Apache-2.0
"""Turns at models that callers share: one call at a time works with them, and Ctrl-C never stops a clean-up.

While a call works, its models are not what they were: the pair's LoRA is in the UNet's weights, its attention looks at
the photos, the VAE may be in another precision. So calls from other threads wait for their turn. A Ctrl-C is let
through only where everything that was changed is sure to be put back, which is inside `interruptible`: while a model
computes, and in the caller's own functions. At any other moment it waits for the next such place, at the latest for
the end of the call, when all has been put back.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterable
from contextlib import ExitStack
from weakref import WeakKeyDictionary

import torch

from .adapters import unwrapped

POLL_SECONDS = 0.1  # how often a call that waits for its turn looks whether Ctrl-C was pressed


class _Seat:
    """What threads take in turns: the lock of one model, and whether a whole call works with it."""

    def __init__(self):
        self.lock = threading.RLock()
        self.at_work = False


_seats: WeakKeyDictionary[torch.nn.Module, _Seat] = WeakKeyDictionary()
_seats_lock = threading.Lock()


def _seat(model: torch.nn.Module) -> _Seat:
    with _seats_lock:
        return _seats.setdefault(unwrapped(model), _Seat())


def is_at_work(unet: torch.nn.Module) -> bool:
    """Whether a whole call works with a UNet."""
    return _seat(unet).at_work


class Turn:
    """A context in which one thread has models for itself; a thread that comes later waits until they are free.

    Inside it autograd is off, and so is the caller's inference mode, so that no tensor that stays on a model after the
    call is an inference tensor, which autograd refuses for good.

    Args:
        models: All models that the work changes for a while.
        unet: The UNet among them, if it must be as it was loaded when the turn begins: a turn for the same UNet inside
            this one, such as that of a call from a step callback, is then refused. None for work that does not mind.
    """

    def __init__(self, models: Iterable[torch.nn.Module], unet: torch.nn.Module | None = None):
        # In one order for all threads, so that no two of them can wait for each other.
        self._seats = sorted(map(_seat, models), key=id)
        self._own = None if unet is None else _seat(unet)
        self._stack = ExitStack()

    def __enter__(self) -> None:
        """Wait for the models, and take them.

        Raises:
            RuntimeError: The calling thread has a turn with this UNet already.
        """
        self._interrupts = _Interrupts.begin()
        try:
            for seat in self._seats:
                while not seat.lock.acquire(timeout=POLL_SECONDS):
                    with interruptible():
                        pass
                self._stack.callback(seat.lock.release)
            if self._own is not None:
                if self._own.at_work:
                    raise RuntimeError(
                        "the UNet is at work for another call, from whose callback this call came; "
                        "wait until that call has returned, or use a pipeline with a UNet of its own"
                    )
                self._own.at_work = True
                self._stack.callback(setattr, self._own, "at_work", False)
            self._stack.enter_context(torch.inference_mode(False))
            self._stack.enter_context(torch.no_grad())
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *exception: object) -> None:
        """Leave the models to others, and let a Ctrl-C through that came too late to stop the work."""
        self._stack.close()
        if self._interrupts is not None:
            self._interrupts.end()


class _Interrupts:
    """What becomes of Ctrl-C while a call works in the main thread, the only one that Ctrl-C can stop.

    `open` says whether a Ctrl-C goes through to the handler that was there before; one that does not is noted. One
    that went through closes the way behind it, so that a second Ctrl-C cannot stop the clean-up after the first.
    """

    current: _Interrupts | None = None

    def __init__(self, handler):
        self.handler, self.open, self.noted, self.outer = handler, False, False, []

    @classmethod
    def begin(cls) -> _Interrupts | None:
        """Close the way for Ctrl-C; None where Ctrl-C cannot stop the work anyway."""
        if threading.current_thread() is not threading.main_thread():
            return None
        if cls.current is None:
            handler = signal.getsignal(signal.SIGINT)
            if not callable(handler):
                return None
            new = cls(handler)
            signal.signal(signal.SIGINT, new.handle)
            cls.current = new
        before, cls.current.open = cls.current.open, False
        cls.current.outer.append(before)
        return cls.current

    def end(self) -> None:
        """Put the way back as it was at `begin`, and let through what was noted if that is open."""
        was_open = self.outer.pop()
        if not self.outer:
            was_open = True
            _Interrupts.current = None
            if signal.getsignal(signal.SIGINT) == self.handle:
                signal.signal(signal.SIGINT, self.handler)
        self.open = was_open
        self.let_through()

    def handle(self, number: int, frame) -> None:
        """Handle the signal of Ctrl-C, in the place of the handler that was there before."""
        if not self.open:
            self.noted = True
            return
        self.open = self.noted = False
        self.handler(number, frame)
        self.open = True  # where the handler has not raised

    def let_through(self) -> None:
        """Handle a Ctrl-C that was noted; where the way is still closed, it stays noted."""
        if self.noted:
            self.handle(signal.SIGINT, None)


class interruptible:  # noqa: N801, a context manager to be used like a function
    """A context that Ctrl-C may leave at any moment: whatever was changed before it is sure to be put back.

    Nothing that has to be put back may be changed inside it. Outside of a `Turn`, and in other threads than the main
    one, it does nothing.
    """

    def __enter__(self) -> None:
        main = threading.current_thread() is threading.main_thread()
        self._interrupts = _Interrupts.current if main else None
        if self._interrupts is not None:
            self._was_open, self._interrupts.open = self._interrupts.open, True
            self._interrupts.let_through()

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if self._interrupts is not None:
            self._interrupts.open = self._was_open and kind is None
