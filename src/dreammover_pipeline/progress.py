# SPDX-License-Identifier: Apache-2.0
"""Progress reported to a listener, which may also end the work; `DreamMoverPipeline.listening` takes one."""

from __future__ import annotations

from collections.abc import Callable

ProgressListener = Callable[[str, int, int], None]
"""Called as (stage name, steps done, steps in all) when a stage begins and after each of its steps.

A stage that has to begin anew, since memory ran out, is reported from 0 steps on again. Whatever the listener raises
ends the work at that step and passes on to the caller, with the models as they were, which is how a job is cancelled.
"""


class ReportedStage:
    """One stage of the work, whose steps are reported to a listener instead of being drawn as a bar.

    Args:
        listener: what is called at the beginning of the stage and after each step.
        stage: the stage's name, like "Denoising".
        total: how many steps the stage has.
    """

    def __init__(self, listener: ProgressListener, stage: str, total: int):
        self.listener, self.stage, self.total = listener, stage, total
        self.done = 0

    def __enter__(self) -> ReportedStage:
        self.listener(self.stage, 0, self.total)
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, steps: int = 1) -> None:
        """Report that this many more steps are done."""
        self.done += steps
        self.listener(self.stage, self.done, self.total)
