# SPDX-License-Identifier: Apache-2.0
"""Calls that share models take turns, and Ctrl-C leaves nothing behind wherever it comes."""

import copy
import signal
import sys
import threading
import weakref
from contextlib import contextmanager

import pytest
import torch
from support.snapshot import snapshot

from dreammover_pipeline import DreamMoverPipeline, turns
from dreammover_pipeline.turns import Turn, interruptible, is_at_work

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


# ── A turn by itself ───────────────────────────────────────────────────────────────────────────────────────────────


def in_a_thread(work, *args):
    """Whether another thread can do the work in a few seconds."""
    thread = threading.Thread(target=work, args=args, daemon=True)
    thread.start()
    thread.join(5)
    return not thread.is_alive()


def take(*models):
    """Have a turn at models, and end it."""
    with Turn(models):
        pass


def press():
    signal.raise_signal(signal.SIGINT)


@contextmanager
def stopped():
    """A context that Ctrl-C has to stop."""
    try:
        yield
    except KeyboardInterrupt:
        return
    pytest.fail("Ctrl-C stopped nothing")


@pytest.fixture
def models():
    return [torch.nn.Identity() for _ in range(3)]


def test_threads_that_name_models_in_other_orders_do_not_wait_for_each_other_for_good(models):
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # threads change so often that each is often stopped between one model and the next

    def work(models):
        for _ in range(500):
            take(*models)

    try:
        threads = [threading.Thread(target=work, args=(order,), daemon=True) for order in (models, models[::-1])]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
    finally:
        sys.setswitchinterval(interval)
    assert not any(thread.is_alive() for thread in threads)


def test_a_model_that_had_a_turn_is_let_go():
    model = torch.nn.Identity()
    take(model)
    seen = weakref.ref(model)
    del model
    assert seen() is None


def test_autograd_and_inference_mode_are_off_inside_and_as_they_were_afterwards(models):
    with torch.inference_mode():
        with Turn(models):
            assert not torch.is_inference_mode_enabled()
            assert not torch.is_grad_enabled()
            assert not torch.ones(1).is_inference()
        assert torch.is_inference_mode_enabled()
    with Turn(models):
        assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled()


def test_a_refused_turn_keeps_no_model(models):
    unet, *others = models
    with Turn([unet], unet):
        with pytest.raises(RuntimeError, match="at work"), Turn(models, unet):
            pass
        assert is_at_work(unet)
        assert in_a_thread(take, *others)
    assert not is_at_work(unet)
    assert in_a_thread(take, *models)


def test_a_turn_that_fails_keeps_no_model(models):
    with pytest.raises(ZeroDivisionError), Turn(models, models[0]):
        raise ZeroDivisionError
    assert not is_at_work(models[0])
    assert in_a_thread(take, *models)


@pytest.mark.parametrize("held", range(3))
def test_ctrl_c_while_a_turn_waits_for_one_model_gives_back_the_others(models, held):
    """Models are taken in an order of the turn's own, so each is once the one that is waited for."""
    taken, release = threading.Event(), threading.Event()

    def hold():
        with Turn([models[held]]):
            taken.set()
            release.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    taken.wait(60)
    timer = threading.Timer(0.2, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT))
    try:
        with stopped():
            timer.start()
            take(*models)
        assert in_a_thread(take, *(model for model in models if model is not models[held]))
    finally:
        release.set()
        thread.join()
        timer.join()


def test_ctrl_c_waits_for_the_end_of_the_turn_which_gives_everything_back_first(models):
    reached, handler = [], signal.getsignal(signal.SIGINT)
    with stopped(), Turn(models, models[0]):
        press()
        reached.append("the end")
    assert reached
    assert not is_at_work(models[0])
    assert in_a_thread(take, *models)
    assert signal.getsignal(signal.SIGINT) is handler
    take(*models)  # nothing is left over from the first


def test_ctrl_c_goes_through_where_it_is_let_through_and_what_was_noted_does_so_too(models):
    passed = []
    with Turn(models):
        with stopped(), interruptible():
            press()
            passed.append("beyond the first")
        press()
        with stopped(), interruptible():
            passed.append("beyond the second")
    assert not passed


def test_the_way_is_closed_behind_a_failure_and_open_behind_what_went_well(models):
    reached = []
    with Turn(models), stopped(), interruptible():
        with pytest.raises(ZeroDivisionError), interruptible():
            raise ZeroDivisionError
        press()
        reached.append("the clean-up")
        with interruptible():
            reached.append("beyond it")
    with Turn(models), stopped(), interruptible():
        with interruptible():
            pass
        press()
        reached.append("beyond what went well")
    assert reached == ["the clean-up"]


def test_the_way_is_closed_behind_a_noted_ctrl_c_that_has_gone_through(models):
    reached = []
    with stopped(), Turn(models):
        press()
        with stopped(), interruptible():
            pass
        press()
        reached.append("the clean-up")
    assert reached


def test_a_turn_inside_an_open_way_closes_it_and_opens_it_again(models):
    reached = []
    with Turn(models[:1]), interruptible(), stopped():
        with Turn(models[1:]):
            press()
            reached.append("the end of the turn inside")
        reached.append("beyond it")
    with Turn(models[:1]), interruptible(), stopped():
        take(*models[1:])
        press()
        reached.append("beyond the second")
    assert reached == ["the end of the turn inside"]


def test_a_turn_inside_a_closed_way_leaves_it_closed(models):
    reached = []
    with stopped(), Turn(models[:1]):
        with Turn(models[1:]):
            press()
        reached.append("the way on")
    assert reached


def test_another_thread_lets_no_ctrl_c_through_to_a_turn_of_the_main_one(models):
    entered, leave, reached = threading.Event(), threading.Event(), []

    def elsewhere():
        with Turn(models[1:]), interruptible():
            entered.set()
            leave.wait(60)

    thread = threading.Thread(target=elsewhere)
    with stopped(), Turn(models[:1]):
        thread.start()
        entered.wait(60)
        try:
            press()
            reached.append("the clean-up")
        finally:
            leave.set()
            thread.join()
    assert reached


def test_where_ctrl_c_is_ignored_it_stays_so(models):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Turn(models), interruptible():
            press()
            assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_handler_that_was_set_during_a_turn_stays(models):
    def mine(number, frame):
        pass

    before = signal.getsignal(signal.SIGINT)
    try:
        with Turn(models):
            signal.signal(signal.SIGINT, mine)
        assert signal.getsignal(signal.SIGINT) is mine
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_handler_that_does_not_stop_the_work_hears_of_every_ctrl_c(models):
    came = []
    before = signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
    try:
        with Turn(models):
            with interruptible():
                press()
                press()
            press()
            assert len(came) == 2
            with interruptible():
                assert len(came) == 3
    finally:
        signal.signal(signal.SIGINT, before)
    assert came == [signal.SIGINT] * 3


def test_one_ctrl_c_at_any_line_of_a_turn_is_heard_and_leaves_nothing_behind(models):
    handler, tracing = signal.getsignal(signal.SIGINT), sys.gettrace()

    def interrupted(at):
        """Have a turn, and press Ctrl-C at a line of the module; how many lines there were, and whether it stopped."""
        lines, turn = 0, Turn(models, models[0])

        def trace(frame, event, argument):
            nonlocal lines
            if frame.f_code.co_filename != turns.__file__:
                return None
            if event == "line":
                lines += 1
                if lines == at:
                    press()
            return trace

        sys.settrace(trace)
        try:
            with turn, interruptible():
                pass
        except KeyboardInterrupt:
            return lines, True
        finally:
            sys.settrace(tracing)
        return lines, False

    whole, _ = interrupted(None)
    assert whole > 30
    for at in range(1, whole + 1):
        assert interrupted(at)[1], f"Ctrl-C at line {at} of {whole} was lost"
        assert signal.getsignal(signal.SIGINT) == handler, f"Ctrl-C at line {at} of {whole}"
        assert not is_at_work(models[0]), f"Ctrl-C at line {at} of {whole}"
        assert in_a_thread(take, *models), f"Ctrl-C at line {at} of {whole}"
    assert interrupted(None) == (whole, False)
