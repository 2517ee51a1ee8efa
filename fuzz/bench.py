# SPDX-License-Identifier: Apache-2.0
"""Runs one case and says which promises it broke."""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import hashlib
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.autoencoders.vae import Decoder, Encoder
from PIL import Image
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import CLIPTextModel

from dreammover_pipeline import DreamMoverPipeline
from dreammover_pipeline.cli.main import main
from dreammover_pipeline.records import PreparedPair
from dreammover_pipeline.tiny import CHECKPOINT

REFUSED, FAILED = (TypeError, ValueError), (RuntimeError, OSError)
MODELS = (UNet2DConditionModel, Encoder, Decoder, CLIPTextModel)
NEVER_LEFT = re.compile(r"\.dreammover-|making-|\.part$")  # in the name of a file that somebody was still writing
SHORT = {"n_frames": 2, "num_inference_steps": 3, "inversion_steps": 2, "feature_step": 1, "lora_steps": 0}
SIDE = 64  # pixels of the photos, and of the native size of the model


class TookTooLongError(BaseException):
    """A case ran past its limit. No `except Exception` on the way may take it for an error of its own."""


@dataclass
class Ended:
    """How a case ended: "done", "refused" (the caller's mistake) or "failed" (anything else that may happen)."""

    status: str
    message: str = ""
    result: object = None
    faults: Sequence[str] = ()


@dataclass
class Case:
    """One odd input.

    `kind` is what the report counts it under and `text` what was drawn; `run` makes the call, and raises or returns
    its result, or an `Ended`; `check` gives the faults of a result. `names` are words of which a refusal must have
    one; without any the message is free. `late` allows a refusal after a model ran. `writes` are patterns of what a
    case may write when it is done, `leaves` of what it may leave whatever happens.
    """

    kind: str
    text: str
    run: Callable[[], object]
    check: Callable[[object], list[str]] = lambda result: []
    names: Sequence[str] = ()
    late: bool = False
    writes: Sequence[str] = ()
    leaves: Sequence[str] = ()


@dataclass
class Verdict:
    """What became of a case: how it ended, how long it took, and which promises it broke."""

    case: Case
    status: str
    message: str
    seconds: float
    broken: list[str]

    def as_json(self) -> dict[str, object]:
        """What a report says of the case."""
        case = {"kind": self.case.kind, "text": self.case.text, "status": self.status, "message": self.message}
        return case | {"seconds": round(self.seconds, 3), "broken": self.broken}


class Bench:
    """A pipeline, photos and a folder, which all cases share.

    Args:
        root: An empty folder.
        seconds: How long a case may take.
    """

    def __init__(self, root: Path, seconds: float = 60):
        self.root, self.seconds = root, seconds
        self.folder, self.temporary, self.model = root / "case", root / "tmp", root / "model"
        self.temporary.mkdir()
        shutil.copytree(CHECKPOINT, self.model)
        config = self.model / "unet" / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"sample_size": SIDE // 4}))
        self.pipe = DreamMoverPipeline.from_pretrained(self.model)
        self.pipe.set_progress_bar_config(disable=True)
        examples = Path(__file__).parent.parent / "examples" / "fish"
        self.photos = [Image.open(examples / f"{i}.png").convert("RGB").resize((SIDE, SIDE)) for i in (0, 1)]
        self.ran = 0
        self._counting = register_module_forward_pre_hook(self._count)
        self.good_frames = self.good_call()
        self.good_weights = self.weights()

    def close(self) -> None:
        """Stop counting the calls of models, of which torch tells the whole process."""
        self._counting.remove()

    def _count(self, module: torch.nn.Module, inputs: tuple) -> None:
        self.ran += isinstance(module, MODELS)

    def good_call(self) -> np.ndarray:
        """The frames of a call with nothing odd about it, with a LoRA."""
        seeded = torch.Generator().manual_seed(0)
        arguments = SHORT | {"lora_steps": 2, "prompt": "a fish", "generator": seeded, "output_type": "np"}
        return self.pipe(*self.photos, **arguments).frames

    @cached_property
    def pair(self) -> PreparedPair:
        """A prepared pair with a LoRA, made once."""
        arguments = {name: value for name, value in SHORT.items() if name != "n_frames"} | {"lora_steps": 2}
        seeded = torch.Generator().manual_seed(0)
        return self.pipe.prepare(*self.photos, prompt="a fish", generator=seeded, **arguments)

    @cached_property
    def pair_file(self) -> bytes:
        """The file of that pair."""
        path = self.root / "pair.safetensors"
        self.pipe.save_pair(self.pair, path)
        return path.read_bytes()

    def sequence(self, keep: Path | str) -> np.ndarray:
        """The frames of a video through three photos, whose gaps are kept in a folder."""
        seeded = torch.Generator().manual_seed(0)
        arguments = SHORT | {"lora_steps": 1, "generator": seeded, "output_type": "np"}
        return self.pipe.interpolate_sequence([*self.photos, self.photos[0]], keep=keep, **arguments).frames[0]

    @cached_property
    def kept_gaps(self) -> tuple[dict[str, bytes], np.ndarray]:
        """The files that such a sequence keeps, by their names, and its frames."""
        folder = self.root / "keep"
        frames = self.sequence(folder)
        return {path.name: path.read_bytes() for path in folder.iterdir()}, frames

    def put_batch(self) -> None:
        """Put a manifest, and the finished batch that it describes, into the current folder."""
        made = self.root / "batch" / "made"
        row = json.dumps({"img0": "a.png", "img1": "b.png", "output": "out.gif", **SHORT, "lora_steps": 1})
        Path("pairs.jsonl").write_text(row)
        if not made.exists():
            argv = ["batch", "pairs.jsonl", "-o", "made", "--model", str(self.model), "--quiet"]
            if main(argv):
                raise RuntimeError("the batch that is to be damaged could not be made")
            shutil.copytree("made", made)
        shutil.copytree(made, "made", dirs_exist_ok=True)

    def weights(self) -> str:
        """A digest of every weight of every model."""
        total = hashlib.sha256()
        for part in ("unet", "vae", "text_encoder"):
            for name, tensor in getattr(self.pipe, part).state_dict().items():
                total.update(name.encode() + tensor.numpy().tobytes())
        return total.hexdigest()

    def state(self) -> dict[str, object]:
        """What a call must leave as it was, but for the values of the weights: of the models, and of the process."""
        pipe, modules = self.pipe, []
        for part in ("unet", "vae", "text_encoder"):
            modules += [(part, name, module) for name, module in getattr(pipe, part).named_modules()]
        parameters = [*pipe.unet.parameters(), *pipe.vae.parameters()]
        return {
            "modules": [(part, name, id(module), module.training) for part, name, module in modules],
            "hooks": [_hooks(module) for *_, module in modules],
            "overridden methods": [sorted({"forward", "encode", "decode"} & vars(m).keys()) for *_, m in modules],
            "attention processors": {name: id(one) for name, one in pipe.unet.attn_processors.items()},
            "parameters": [(id(p), p.dtype, p.device, p.requires_grad, p.grad is None) for p in parameters],
            "some weights": [float(p.detach().double().sum()) for p in parameters[::40]],
            "adapters": sorted(getattr(pipe.unet, "peft_config", {})),
            "scheduler": (id(pipe.scheduler), dict(pipe.scheduler.config)),
            "progress bar": dict(getattr(pipe, "_progress_bar_config", {})),
            "listeners": len(pipe._listeners),
            "autograd": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
            "defaults of torch": (torch.get_default_dtype(), torch.get_default_device(), torch.get_num_threads()),
            "warnings": len(warnings.filters),
            "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
            "environment": dict(os.environ),
            "folder": os.getcwd(),
        }

    def fresh_folder(self) -> Path:
        """An empty folder for one case, with two photos in it and files of somebody else's."""
        shutil.rmtree(self.folder, ignore_errors=True)
        (self.folder / "theirs").mkdir(parents=True)
        for name, photo in zip(("a.png", "b.png"), self.photos, strict=True):
            photo.save(self.folder / name)
        for name in ("theirs/letter.txt", "theirs.gif", "theirs.safetensors"):
            (self.folder / name).write_text("not yours")
        return self.folder

    def judge(self, make: Callable[[], Case], thorough: bool = False) -> Verdict:
        """Run a case, and say which promises it broke.

        Args:
            make: Makes the case, which may put files into the folder of this case, where the case is run.
            thorough: Also compare every weight, and the frames of a good call.
        """
        self.fresh_folder()
        with self._surroundings():
            case = make()
            before, files = self.state(), contents(self.folder)
            self.ran, start = 0, time.perf_counter()
            try:
                with self._time_limit():
                    ended = case.run()
                    ended = ended if isinstance(ended, Ended) else Ended("done", result=ended)
                    faults = [*ended.faults, *(case.check(ended.result) if ended.status == "done" else [])]
            except TookTooLongError:
                ended, faults = Ended("broken"), [f"it took longer than {self.seconds:g} s"]
            except (*REFUSED, *FAILED) as error:
                status = "refused" if isinstance(error, REFUSED) else "failed"
                ended, faults = Ended(status, f"{type(error).__name__}: {error}"), []
            except Exception as error:
                ended = Ended("broken", f"{type(error).__name__}: {error}")
                faults = [f"it raised {type(error).__name__}, which is none of the errors that may come"]
            seconds = time.perf_counter() - start
            gc.collect()
            after = self.state()
        changed = [part for part in before if before[part] != after[part]]
        faults += self._late_or_nameless(case, ended) + self._left(case, ended.status, files)
        faults += [f"the {part} of the pipeline or the process changed" for part in changed]
        faults += self.compared() if thorough else []
        return Verdict(case, ended.status, ended.message[:400], seconds, faults)

    def compared(self) -> list[str]:
        """The faults of the shared pipeline: every weight and the frames of a good call are as at the beginning."""
        faults = [] if self.weights() == self.good_weights else ["weights changed"]
        same = np.array_equal(self.good_call(), self.good_frames)
        return faults + ([] if same else ["a good call afterwards makes other frames"])

    def _late_or_nameless(self, case: Case, ended: Ended) -> list[str]:
        if ended.status != "refused":
            return []
        faults = [f"it was refused after models had run {self.ran} times"] if self.ran and not case.late else []
        if case.names and not any(_is_word(name, ended.message) for name in case.names):
            faults.append(f"the error names none of {', '.join(case.names)}")
        return faults

    def _left(self, case: Case, status: str, before: dict[str, str]) -> list[str]:
        """The faults of what lies on the disk after a case, beside what lay there before."""
        now = contents(self.folder)
        allowed = [*case.leaves, *(case.writes if status == "done" else [])]
        touched = {path for path in before.keys() | now.keys() if before.get(path) != now.get(path)}
        strange = sorted(path for path in touched if not any(fnmatch(path, pattern) for pattern in allowed))
        fates = ["removed" if path not in now else "left" if path not in before else "changed" for path in strange]
        faults = [f"{path!r} was {fate}" for path, fate in zip(strange, fates, strict=True)]
        unfinished = [path for path in now if path not in before and NEVER_LEFT.search(path)]
        faults += [f"the unfinished {path!r} is left" for path in unfinished]
        faults += [f"the temporary {path.name!r} is left" for path in self.temporary.iterdir()]
        shutil.rmtree(self.temporary)
        self.temporary.mkdir()
        return faults

    @contextlib.contextmanager
    def _surroundings(self) -> Iterator[None]:
        """While the context lasts, the current folder is the case's, and temporary files have their own."""
        here, variable = os.getcwd(), os.environ.get("TMPDIR")
        os.chdir(self.folder)
        os.environ["TMPDIR"], tempfile.tempdir = str(self.temporary), None
        try:
            yield
        finally:
            os.chdir(here)
            tempfile.tempdir = None
            os.environ.pop("TMPDIR")
            if variable is not None:
                os.environ["TMPDIR"] = variable

    @contextlib.contextmanager
    def _time_limit(self) -> Iterator[None]:
        def ring(number, frame):
            raise TookTooLongError

        previous = signal.signal(signal.SIGALRM, ring)
        signal.setitimer(signal.ITIMER_REAL, self.seconds)
        # Where no Python runs no alarm is heard; then the process ends, and says where.
        faulthandler.dump_traceback_later(4 * self.seconds, exit=True, file=sys.__stderr__)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            faulthandler.cancel_dump_traceback_later()
            signal.signal(signal.SIGALRM, previous)


def _hooks(module: torch.nn.Module) -> int:
    """The number of hooks on a module, but for those that transformers leaves there once it was asked for all layers.

    They write down what a layer of a text encoder returns, and nothing where nobody asks. `clip_skip` asks.
    """
    kinds = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
    return sum(not hook.__module__.startswith("transformers.") for kind in kinds for hook in kind.values())


def _is_word(name: str, message: str) -> bool:
    """Whether a message has a name by itself; the command line prints any white space as one space."""
    return any(re.search(rf"(?<!\w){re.escape(one)}(?!\w)", message) for one in (name, " ".join(name.split())) if one)


def contents(folder: Path) -> dict[str, str]:
    """The digests of all files in a folder by their paths; of a folder in it the word "folder"."""
    return {
        str(path.relative_to(folder)): "folder" if path.is_dir() else hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
    }


def frame_faults(frames: object, number: int, size: tuple[int, int] | None) -> list[str]:
    """The faults of one pair's frames, of any `output_type`: their number, their (width, height), and NaNs."""
    faults = [] if len(frames) == number else [f"{len(frames)} frames came instead of {number}"]
    if isinstance(frames, torch.Tensor):
        shape, finite = (frames.shape[-1], frames.shape[-2]), bool(frames.isfinite().all())
    elif isinstance(frames, np.ndarray):
        shape, finite = (frames.shape[-2], frames.shape[-3]), bool(np.isfinite(frames).all())
    else:
        (shape, *others), finite = {frame.size for frame in frames}, True
        faults += ["the frames differ in size"] if others else []
    faults += [] if finite else ["frames are not finite"]
    return faults + ([] if size is None or tuple(shape) == size else [f"frames are {shape} instead of {size}"])
