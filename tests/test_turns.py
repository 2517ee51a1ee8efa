# SPDX-License-Identifier: Apache-2.0
"""Calls that share models take turns, and Ctrl-C leaves nothing behind wherever it comes."""

import copy
import signal
import sys
import threading

import pytest
import torch
from support.snapshot import snapshot

from dreammover_pipeline import DreamMoverPipeline
from dreammover_pipeline.turns import Turn

FIT = {"lora_steps": 1, "lora_learning_rate": 1e-2}
STEPS = {"num_inference_steps": 6, "inversion_steps": 4, "feature_step": 2}


def another_pipe(pipe, **components):
    """A second pipeline on the components of a first one, less those that are named."""
    other = DreamMoverPipeline(**{**pipe.components, **components}, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    return other


# ── Threads ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def prepared(pipe, photos):
    return pipe.prepare(*photos, **STEPS, **FIT, generator=torch.Generator().manual_seed(0))


def rendered_meanwhile(pipe, other, prepared):
    """Frames of two calls, the second of which another thread begins in the middle of the first, and how it fared."""
    found, threads = {}, []

    def render_other():
        found["other"] = other.render(prepared, n_frames=2, output_type="pt").frames

    def callback(pipe, i, timestep, tensors):
        if i == 1:
            threads.append(threading.Thread(target=render_other))
            threads[0].start()
            threads[0].join(0.3)
            found["waited"] = threads[0].is_alive()
        return {}

    found["first"] = pipe.render(prepared, n_frames=2, output_type="pt", callback_on_step_end=callback).frames
    threads[0].join()
    return found


def same_pipe(pipe):
    return pipe


def a_pipe_on_the_same_models(pipe):
    return another_pipe(pipe)


@pytest.mark.parametrize("other", [same_pipe, a_pipe_on_the_same_models])
def test_threads_take_turns_at_a_unet(pipe, prepared, other):
    before = snapshot(pipe.unet)
    expected = pipe.render(prepared, n_frames=2, output_type="pt").frames
    found = rendered_meanwhile(pipe, other(pipe), prepared)
    assert found["waited"]
    assert torch.equal(found["first"], expected)
    assert torch.equal(found["other"], expected)
    assert snapshot(pipe.unet) == before


def test_a_compiled_unet_has_the_turn_of_the_unet_inside(components):
    unet = components["unet"]
    compiled = torch.compile(unet, backend="eager")
    with Turn([unet], unet), pytest.raises(RuntimeError, match="at work"), Turn([compiled], compiled):
        pass


def test_calls_that_start_together_make_the_right_frames(pipe, prepared):
    before, fingerprint = snapshot(pipe.unet), pipe.fingerprint()
    expected = pipe.render(prepared, n_frames=2, output_type="pt").frames
    start, frames, fingerprints = threading.Barrier(4), [], []

    def render():
        start.wait()
        frames.append(pipe.render(prepared, n_frames=2, output_type="pt").frames)
        fingerprints.append(pipe.fingerprint())

    threads = [threading.Thread(target=render) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(frames) == 4
    assert all(torch.equal(each, expected) for each in frames)
    assert fingerprints == [fingerprint] * 4
    assert snapshot(pipe.unet) == before


def test_a_listener_hears_of_the_calls_of_its_own_thread_alone(pipe, prepared):
    heard = {"here": [], "there": []}

    def render():
        with pipe.listening(lambda stage, done, total: heard["there"].append(stage)):
            pipe.decode_latents(torch.zeros(1, 4, 8, 8))
        pipe.render(prepared, n_frames=1, output_type="latent")

    with pipe.listening(lambda stage, done, total: heard["here"].append(stage)):
        thread = threading.Thread(target=render)
        thread.start()
        thread.join()
    assert heard == {"here": [], "there": []}


# ── Calls from callbacks ───────────────────────────────────────────────────────────────────────────────────────────


def test_a_whole_call_inside_a_call_is_refused_and_steps_of_the_vae_are_not(pipe, photos, prepared, fast, tmp_path):
    before, calls = snapshot(pipe.unet), []
    whole = {
        "call": lambda: pipe(*photos, **fast),
        "prepare": lambda: pipe.prepare(*photos, **STEPS, lora_steps=0),
        "render": lambda: pipe.render(prepared, n_frames=1),
        "sequence": lambda: pipe.interpolate_sequence(photos, **fast),
        "fit": lambda: pipe.fit_lora(*photos, lora_steps=1),
        "shared fit": lambda: pipe.fit_shared_lora(photos, lora_steps=1),
        "fingerprint": pipe.fingerprint,
        "save": lambda: pipe.save_pair(prepared, tmp_path / "pair.safetensors"),
    }

    def callback(pipe, i, timestep, tensors):
        for name, call in whole.items():
            with pytest.raises(RuntimeError, match="callback"):
                call()
            calls.append(name)
        assert pipe.decode_latents(tensors["latents"]).shape == (1, 3, 64, 64)
        assert pipe.encode_prompt("a fish", torch.device("cpu"))[0].shape[0] == 1
        return {}

    expected = pipe.render(prepared, n_frames=1, output_type="pt").frames
    frames = pipe.render(prepared, n_frames=1, output_type="pt", callback_on_step_end=callback).frames
    assert calls == [*whole] * 4
    assert torch.equal(frames, expected)
    assert snapshot(pipe.unet) == before
    assert all(call() is not None for call in (whole["render"], whole["fingerprint"]))


def test_a_call_with_a_unet_of_its_own_works_inside_a_call(pipe, prepared):
    other = another_pipe(pipe, unet=copy.deepcopy(pipe.unet))
    expected = pipe.render(prepared, n_frames=1, output_type="pt").frames
    inside = []

    def callback(pipe, i, timestep, tensors):
        inside.append(other.render(prepared, n_frames=1, output_type="pt").frames)
        return {}

    frames = pipe.render(prepared, n_frames=1, output_type="pt", callback_on_step_end=callback).frames
    assert all(torch.equal(each, expected) for each in [frames, *inside])


# ── Ctrl-C ─────────────────────────────────────────────────────────────────────────────────────────────────────────


pytestmark = pytest.mark.usefixtures("interruptible")


class CtrlC:
    """Presses Ctrl-C at the n-th call of a Python function after `armed`; counts those calls."""

    def __init__(self, at):
        self.at, self.calls, self.armed = at, 0, False

    def __call__(self, frame, event, argument):
        if self.armed and event == "call":
            self.calls += 1
            if self.calls == self.at:
                signal.raise_signal(signal.SIGINT)


def interrupted_twice(work, stage, second):
    """Do the work, press Ctrl-C in a stage, and once more `second` calls of functions later; how many there were."""
    press = CtrlC(second)

    def listener(name, done, total):
        if name == stage and done == 1 and not press.armed:
            press.armed = True
            signal.raise_signal(signal.SIGINT)

    sys.setprofile(press)
    try:
        with pytest.raises(KeyboardInterrupt):
            work(listener)
    finally:
        sys.setprofile(None)
    return press.calls


@pytest.mark.parametrize("stage", ["Fitting LoRA", "Denoising"])
def test_a_second_ctrl_c_cannot_stop_the_clean_up_after_the_first(pipe, photos, fast, stage):
    handler = signal.getsignal(signal.SIGINT)
    before = snapshot(pipe.unet)

    def work(listener):
        with pipe.listening(listener):
            pipe(*photos, **fast | FIT | {"n_frames": 1})

    calls = interrupted_twice(work, stage, None)
    assert calls > 10
    for second in {1, 2, 5, *range(10, calls, max(1, calls // 3))}:
        interrupted_twice(work, stage, second)
        assert snapshot(pipe.unet) == before, f"Ctrl-C at call {second} of {calls}"
        assert torch.is_grad_enabled(), f"Ctrl-C at call {second} of {calls}"
        assert signal.getsignal(signal.SIGINT) is handler


def test_one_ctrl_c_anywhere_leaves_the_models_as_they_were(pipe, prepared):
    """Where it comes while something is being changed or put back, it waits until that is done."""
    before, expected = snapshot(pipe.unet), pipe.render(prepared, n_frames=1, output_type="pt").frames

    def interrupted(at):
        press = CtrlC(at)
        press.armed = True
        sys.setprofile(press)
        try:
            pipe.render(prepared, n_frames=1, output_type="pt")
        except KeyboardInterrupt:
            return press.calls
        finally:
            sys.setprofile(None)
        return press.calls if at is None else None

    calls = interrupted(None)
    for at in [*range(1, calls, calls // 12), *range(calls - 20, calls, 3)]:
        assert interrupted(at), f"Ctrl-C at call {at} of {calls} was lost"
        assert snapshot(pipe.unet) == before, f"Ctrl-C at call {at} of {calls}"
        assert torch.is_grad_enabled(), f"Ctrl-C at call {at} of {calls}"
    assert torch.equal(pipe.render(prepared, n_frames=1, output_type="pt").frames, expected)


def test_ctrl_c_stops_a_call_that_waits_for_its_turn(pipe, prepared):
    release, begun, threads = threading.Event(), threading.Event(), []

    def hold(pipe, i, timestep, tensors):
        begun.set()
        release.wait(60)
        return {}

    def render():
        pipe.render(prepared, n_frames=1, output_type="latent", callback_on_step_end=hold)

    threads.append(threading.Thread(target=render))
    threads[0].start()
    begun.wait(60)
    timer = threading.Timer(0.3, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        pipe.render(prepared, n_frames=1)
    release.set()
    threads[0].join()
    timer.join()
    assert pipe.render(prepared, n_frames=1, output_type="latent").frames.isfinite().all()


def test_a_program_that_handles_ctrl_c_itself_goes_on_doing_so(pipe, prepared):
    came = []
    before = signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
    try:

        def callback(pipe, i, timestep, tensors):
            signal.raise_signal(signal.SIGINT)
            return {}

        pipe.render(prepared, n_frames=1, output_type="latent", callback_on_step_end=callback)
    finally:
        signal.signal(signal.SIGINT, before)
    assert came == [signal.SIGINT] * 4
