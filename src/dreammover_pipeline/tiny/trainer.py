# SPDX-License-Identifier: Apache-2.0
"""The training loop of a stage: steps, evaluations, the best weights, and saved states from which it goes on."""

from __future__ import annotations

import copy
import json
import os
import time
from abc import ABC, abstractmethod
from pathlib import Path
from zipfile import ZipFile

import torch
from torch import nn
from tqdm import tqdm

from ..inputs import check_file_place
from .optim import Average, MuonAdamW, rate_factor
from .recipes import Plan
from .validation import draw_curves

# What the saved state of a stage holds.
STATE = {"identity", "step", "seconds", "history", "best", "loss", "weights", "average", "optimizer"}


class Stage(ABC):
    """What a `Trainer` trains, and how it is judged.

    `name` is that of its files and `rule` says in words which weights are kept; `plan` is how it is trained, and
    `recipe.save_seconds` the longest time between two writings of its state.
    """

    name: str
    rule: str
    plan: Plan

    @abstractmethod
    def build(self) -> nn.Module:
        """The untrained model."""

    @abstractmethod
    def loss(self, model: nn.Module, step: int) -> torch.Tensor:
        """The loss of a training step, which the number of the step decides."""

    def finish(self, model: nn.Module) -> nn.Module:
        """An averaged model in the form that it is used in; by default it has that form already."""
        return model

    @abstractmethod
    def measure(self, model: nn.Module, step: int) -> dict[str, float]:
        """Figures of an averaged model that `finish` has treated."""

    @staticmethod
    @abstractmethod
    def better(row: dict, kept: dict | None, history: list[dict]) -> bool:
        """Whether a model is to be kept in place of the one kept so far.

        Args:
            row: the figures of the model.
            kept: the figures of the model kept so far; None before the first evaluation.
            history: the figures of all evaluations, which end with `row`.
        """


class Trainer:
    """Trains the network of one stage: takes steps, evaluates the averaged weights, keeps the best, and saves.

    Args:
        stage: what is trained and how it is judged.
        identity: what decides the training; a saved state is only continued if its identity is equal.
        folder: the folder that the state is saved in.
        device: the device to train on.
        state: what `read_state` gave for the folder, which is continued; None to begin.

    Raises:
        ValueError: the state has another identity.
    """

    def __init__(self, stage: Stage, identity: dict, folder: Path, device: torch.device, state: dict | None):
        self.stage, self.identity, self.folder, self.device = stage, identity, folder, device
        folder.mkdir(parents=True, exist_ok=True)
        self.model = stage.build().to(device, memory_format=torch.channels_last).train()
        self.optimizer = MuonAdamW(self.model, stage.plan.muon_rate, stage.plan.adamw_rate)
        self.average = Average(self.model, stage.plan.average)
        self.step, self.seconds, self.history, self.best = 0, 0.0, [], {"row": None, "weights": None}
        self.loss_sum = torch.zeros((), device=device)  # sum of the losses since the last evaluation
        self.loss_count = 0
        if state is not None:
            self._continue_from(state)
        self.started = self.saved = time.monotonic()

    def run(self, deadline: float) -> bool:
        """Train to the end, or save and stop when the time is up.

        Args:
            deadline: the reading of `time.monotonic` at which the time is up.

        Returns:
            Whether the stage is finished.
        """
        steps = self.stage.plan.steps
        with tqdm(total=steps, initial=self.step, desc=self.stage.name, unit="step") as bar:
            while self.step < steps:
                if time.monotonic() >= deadline:
                    self.save()
                    return False
                if not self.history:
                    self.evaluate()  # for a figure of the untrained network
                loss = self.advance()
                bar.update()
                if self.step % 20 == 0:
                    bar.set_postfix(loss=f"{loss.item():.4f}")
                if self.step % self.stage.plan.evaluate == 0 or self.step == steps:
                    self.evaluate()
                    self.save()
                elif time.monotonic() - self.saved >= self.stage.recipe.save_seconds:
                    self.save()
        return True

    def advance(self) -> torch.Tensor:
        """Take one training step, and return its loss."""
        with torch.autocast(self.device.type, torch.bfloat16):
            loss = self.stage.loss(self.model, self.step)
        loss.backward()
        plan = self.stage.plan
        self.optimizer.step(rate_factor(self.step, plan.steps, plan.decay))
        self.average.update(self.step)
        self.step += 1
        self.loss_sum += loss.detach()
        self.loss_count += 1
        return loss.detach()

    def evaluate(self) -> None:
        """Measure the averaged weights, note the figures, and keep the weights if they are the best so far."""
        model = copy.deepcopy(self.model).eval()
        load_weights(model, self.average.weights)
        model = self.stage.finish(model)
        loss = (self.loss_sum / self.loss_count).item() if self.loss_count else None
        row = {"step": self.step, "seconds": round(self._seconds()), "loss": loss}
        row |= self.stage.measure(model, self.step)
        self.history.append(row)
        if self.stage.better(row, self.best["row"], self.history):
            weights = {name: parameter.detach().half() for name, parameter in model.named_parameters()}
            self.best = {"row": row, "weights": weights}
        self.loss_sum.zero_()
        self.loss_count = 0
        self.report()

    def report(self) -> None:
        """Write all evaluations as lines of JSON and as curves."""
        lines = "".join(json.dumps(row) + "\n" for row in self.history)
        (self.folder / f"{self.stage.name}.jsonl").write_text(lines, encoding="utf-8")
        draw_curves(self.history, self.folder / f"{self.stage.name}.png")

    def save(self) -> None:
        """Write the training's state."""
        write_state(self.folder / f"{self.stage.name}.pt", self.state())
        self.saved = time.monotonic()

    def state(self) -> dict:
        """Everything that the training needs to go on from here, with tensors that training changes in place."""
        return {
            "identity": self.identity,
            "step": self.step,
            "seconds": self._seconds(),
            "history": self.history,
            "best": self.best,
            "loss": (self.loss_sum, self.loss_count),
            "weights": dict(self.model.named_parameters()),
            "average": self.average.weights,
            "optimizer": self.optimizer.state_dict(),
        }

    def _continue_from(self, state: dict) -> None:
        """Go on from a saved state."""
        check_identity(self.folder / f"{self.stage.name}.pt", state["identity"], self.identity)
        self.step, self.seconds = state["step"], state["seconds"]
        self.history, self.best = state["history"], state["best"]
        loss_sum, self.loss_count = state["loss"]
        self.loss_sum.copy_(loss_sum)
        load_weights(self.model, state["weights"])
        for name, weight in state["average"].items():
            self.average.weights[name].copy_(weight)
        self.optimizer.load_state_dict(state["optimizer"])

    def _seconds(self) -> float:
        """Seconds of training time that this stage has taken, earlier runs included."""
        return self.seconds + time.monotonic() - self.started


@torch.no_grad()
def load_weights(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Copy weights into the parameters of the same names, whatever the dtype and device of either."""
    for name, parameter in model.named_parameters():
        parameter.copy_(weights[name])


def check_identity(file: Path, identity: dict, wanted: dict) -> None:
    """Raise ValueError if the state in a file was trained by another recipe than is wanted."""
    if identity != wanted:
        raise ValueError(
            f"{file} was trained by another recipe, seed or autoencoder; "
            "take another --out, or the options it was begun with"
        )


def read_state(folder: Path, name: str) -> dict | None:
    """The saved state called `name` in a folder, on the CPU; None if there is no such state.

    Raises:
        ValueError: what has the name of the state is none.
    """
    file = folder / f"{name}.pt"
    check_file_place(file)
    if not file.exists():
        return None
    with file.open("rb") as opened:
        try:
            damaged = ZipFile(opened).testzip()  # torch itself does not look at the checksums
            opened.seek(0)
            state = None if damaged else torch.load(opened, map_location="cpu")
        except Exception as error:  # there are errors of many classes for a file that is not as torch writes them
            raise _no_state(file) from error
    if not isinstance(state, dict) or not state.keys() >= STATE:
        raise _no_state(file)
    return state


def _no_state(file: Path) -> ValueError:
    return ValueError(
        f"'{file}' is damaged or not the state of a training; put a copy of the state in its place, or move the file "
        "away, and its stage begins anew"
    )


def write_state(file: Path, state: object) -> None:
    """Write a state so that at every moment the file holds either the old state or the whole new one."""
    unfinished = file.with_suffix(".tmp")
    torch.save(state, unfinished)
    os.replace(unfinished, file)
