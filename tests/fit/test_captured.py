# SPDX-License-Identifier: Apache-2.0
"""Steps of the fit that are recorded and replayed. Only what a record relies on can be tested without a GPU."""

from contextlib import contextmanager

import pytest
import torch

from dreammover_pipeline import captured, noise_training
from dreammover_pipeline.captured import RecordedCall, TrainingStep, only_kernels, repeats, replayed, same_result
from dreammover_pipeline.lora import LoraFit, fit_pair_lora
from dreammover_pipeline.noise_training import NoiseTraining, StepInputs

FIT = LoraFit(4, 4, 1e-3)
ON_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.fixture(params=[torch.float32, torch.float16])
def step(request):
    """A step of a small model on inputs of its own."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(3, 5, generator=generator))
    inputs = torch.randn(7, 5, generator=generator)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=request.param == torch.float16)
    optimizer = torch.optim.AdamW([weight], lr=1e-2, fused=True)
    return TrainingStep(lambda: (inputs @ weight.T).square().mean(), [weight], optimizer, scaler)


def test_a_step_that_was_taken_back_leaves_nothing(step):
    def three():
        for _ in range(3):
            step()
        return step.moved()

    first = three()
    step.reset()
    assert not step.moved().any()
    assert torch.equal(three(), first)


def test_a_replay_is_compared_with_the_step(step):
    assert repeats(step, step)
    assert not step.moved().any()
    assert not repeats(step, lambda: None)
    assert not repeats(step, lambda: (step(), step()))


def test_inputs_keep_their_places(pair):
    inputs = StepInputs.like(pair[0])
    places = [tensor.data_ptr() for tensor in vars(inputs).values()]
    generator, seen, timesteps = torch.Generator().manual_seed(0), set(), set()
    for _ in range(12):
        inputs.draw(3, 6, generator)
        seen |= set(inputs.drawn.tolist())
        timesteps |= set(inputs.timesteps.tolist())
        assert len(set(inputs.drawn.tolist())) == 2
    assert [tensor.data_ptr() for tensor in vars(inputs).values()] == places
    assert seen == {0, 1, 2}
    assert timesteps == set(range(6))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_loss_is_that_of_the_drawn_images_with_each_of_the_texts(unet, pair, alphas_cumprod, prediction_type):
    generator = torch.Generator().manual_seed(1)
    clean, texts = torch.randn(3, 4, 16, 16, generator=generator), [pair[1], pair[1].flip(1)]
    training, inputs = NoiseTraining(unet, clean, alphas_cumprod, prediction_type, False), StepInputs.like(clean)
    inputs.draw(3, 1000, generator)
    inputs.drawn.copy_(torch.tensor([2, 0]))
    errors = []
    for i, image in enumerate((2, 0)):
        alpha_bar, noise = float(alphas_cumprod[inputs.timesteps[i]]), inputs.noise[i]
        signal, rest = alpha_bar**0.5, (1 - alpha_bar) ** 0.5
        wanted = noise if prediction_type == "epsilon" else signal * noise - rest * clean[image]
        noisy = (signal * clean[image] + rest * noise)[None]
        with torch.no_grad():
            errors += [unet(noisy, inputs.timesteps[i], text[i : i + 1]).sample[0] - wanted for text in texts]
    with torch.no_grad():
        loss = training._loss(inputs, texts)
    torch.testing.assert_close(loss, torch.stack(errors).square().mean(), rtol=1e-4, atol=0)


def test_results_are_compared_by_their_length():
    result = torch.randn(50, generator=torch.Generator().manual_seed(0))
    assert same_result(result + 1e-3, result)
    assert not same_result(result.flip(0), result)
    assert not same_result(torch.full_like(result, torch.nan), result)


def test_only_a_model_without_hooks_and_with_known_attention_is_recorded(unet):
    assert only_kernels(unet)
    handle = unet.up_blocks[0].register_forward_hook(lambda *call: None)
    assert not only_kernels(unet)
    handle.remove()
    forward = unet.conv_in.forward
    unet.conv_in.forward = lambda x: forward(x)
    assert not only_kernels(unet)
    del unet.conv_in.forward
    assert only_kernels(unet)
    unet.set_attn_processor(Attention())
    assert not only_kernels(unet)


class Stream:
    """A stream of a device that has none."""

    def wait_stream(self, other):
        pass


@pytest.fixture
def breaking(monkeypatch):
    """A device whose records break off at their end and leave their stream in effect, as torch's do.

    Yields the streams in effect and the records that were begun.
    """
    streams, begun = [Stream()], []

    @contextmanager
    def in_effect(stream):
        before = list(streams)
        streams.append(stream)
        try:
            yield
        finally:
            streams[:] = before

    class Record:
        def __init__(self, graph, stream, capture_error_mode):
            self.stream = stream

        def __enter__(self):
            streams.append(self.stream)
            begun.append(self)

        def __exit__(self, *error):
            raise RuntimeError("what was recorded waited for the device")

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: streams[-1])
    monkeypatch.setattr(torch.cuda, "stream", in_effect)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", Record)
    monkeypatch.setattr(captured, "_broken", set())
    yield streams, begun
    captured._aside.cache_clear()


def test_where_a_record_broke_off_nothing_is_recorded_any_more(breaking, step, caplog):
    streams, begun = breaking
    first, second = (RecordedCall(lambda x: 2 * x, name) for name in ("Products", "Others"))
    x = torch.arange(3.0)
    assert all(torch.equal(call(x), 2 * x) for call in (first, first, second, second))
    assert replayed(step, torch.float32) is step
    assert (len(begun), len(streams)) == (1, 1)
    assert caplog.text.count("not recorded as a CUDA graph") == caplog.text.count("Products") == 1


def test_a_step_whose_record_breaks_off_is_as_new(breaking, step):
    streams, begun = breaking
    assert replayed(step, torch.float32) is step
    assert (len(begun), len(streams)) == (1, 1)
    assert not step.moved().any()


class Attention:
    """A user's own attention."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        return hidden_states


@ON_GPU
@pytest.mark.parametrize("before", [0, 1])
def test_a_recorded_call_computes_what_the_function_does_and_keeps_its_results(before):
    weight = torch.randn(8, 8, device="cuda")
    call = RecordedCall(lambda x: (x @ weight).relu(), "Products", before)
    inputs = [torch.randn(4, 8, device="cuda") for _ in range(4)]
    results = [call(x) for x in inputs]
    for x, result in zip(inputs, results, strict=True):
        torch.testing.assert_close(result, (x @ weight).relu())


@ON_GPU
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_recorded_fit_is_the_fit(unet, pair, alphas_cumprod, dtype, monkeypatch):
    unet = unet.to("cuda", dtype)
    pair = [tensor.cuda() for tensor in pair]
    recorded = fit_pair_lora(unet, *pair, alphas_cumprod, FIT, seed=0)
    monkeypatch.setattr(noise_training, "only_kernels", lambda *args: False)
    stepwise = fit_pair_lora(unet, *pair, alphas_cumprod, FIT, seed=0)
    for name, weight in stepwise.items():
        torch.testing.assert_close(recorded[name], weight, rtol=0.02, atol=1e-4)


class Waiting(torch.nn.Module):
    """An activation that waits for the GPU, which no record can."""

    def forward(self, x):
        return x if x.sum().item() > 0 else -x


# These two break off a record, so they are the last ones: torch may keep a part of it.
@ON_GPU
def test_a_call_that_cannot_be_recorded_goes_on_being_called(caplog, monkeypatch):
    monkeypatch.setattr(captured, "_broken", set())
    call = RecordedCall(Waiting().cuda(), "Activations")
    for x in torch.randn(3, 5, device="cuda"):
        torch.testing.assert_close(call(x), Waiting()(x))
    assert caplog.text.count("Activations are not recorded") == 1
    assert torch.cuda.current_stream() == torch.cuda.default_stream()


@ON_GPU
def test_a_model_that_cannot_be_recorded_is_fitted_step_by_step(unet, pair, alphas_cumprod, caplog, monkeypatch):
    monkeypatch.setattr(captured, "_broken", set())
    unet = unet.to("cuda")
    unet.conv_act = Waiting()
    weights = fit_pair_lora(unet, *(tensor.cuda() for tensor in pair), alphas_cumprod, FIT, seed=0)
    assert all(weight.isfinite().all() for weight in weights.values())
    assert "not recorded" in caplog.text
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
