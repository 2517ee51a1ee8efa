# SPDX-License-Identifier: Apache-2.0
"""How the stages tell of their progress, and how a listener ends the work."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from .turns import interruptible

# A function called as (stage, steps done, steps in all) when a stage begins and after each of its steps. Whatever it
# raises ends the work at that step and passes on to the caller, with the models as they were: so a job is cancelled.
ProgressListener = Callable[[str, int, int], None]

# A function from (stage, steps in all) to a context that lasts as long as the stage and gives a function to call at
# every step.
Stages = Callable[[str, int], AbstractContextManager[Callable[[], object]]]


@contextmanager
def reported_stage(listener: ProgressListener, stage: str, total: int) -> Iterator[Callable[[], None]]:
    """A stage whose progress a listener is told.

    Args:
        listener: Function called as (stage, steps done, steps in all), when the stage begins and after each of its
            steps.
        stage: The stage's name, such as "Denoising".
        total: How many steps the stage has.
    """
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        with interruptible():
            listener(stage, done, total)

    with interruptible():
        listener(stage, 0, total)
    yield step
