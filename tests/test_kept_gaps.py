# SPDX-License-Identifier: Apache-2.0
"""Sequences whose finished gaps are kept in a folder: what is taken from it, and what is made again."""

import re
import shutil
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel
from PIL import Image
from support.sequences import FEW_STEPS, three_photos, through

from dreammover_pipeline.given_flow import GivenFlow
from dreammover_pipeline.kept_gaps import FILE_NAMES, GapFolder, KeptGaps, gap_key, kept_gaps, lora_key
from dreammover_pipeline.pairs import PairInput
from dreammover_pipeline.prompts import NegativeText, PairText
from dreammover_pipeline.records import BidirectionalFlow, Canvas
from dreammover_pipeline.rendering import DenoisedFrames
from dreammover_pipeline.settings import FitSettings, PrepareSettings, RenderSettings
from dreammover_pipeline.steering import Steering
from dreammover_pipeline.storage import write_tensors

LORAS = pytest.mark.parametrize("lora", ["gap", "shared"])


@pytest.fixture(scope="module")
def album(photos):
    return three_photos(photos)


@pytest.fixture
def fast(fast, tmp_path):
    """Short arguments with a LoRA of one step and the features' flow, and with a folder for the gaps."""
    return {**fast, **FEW_STEPS, "n_frames": 1, "lora_steps": 1, "flow": "features", "keep": tmp_path / "kept"}


def watched(pipe, album, fast, **arguments):
    """The output of a sequence, and how often each stage began."""
    begun = Counter()

    def listen(stage, done, total):
        begun[stage] += done == 0

    with pipe.listening(listen):
        output = through(pipe, album, fast, **arguments)
    return output, begun


def made_afresh(pipe, album, fast, **arguments):
    """The frames of a call that keeps nothing."""
    return through(pipe, album, {**fast, "keep": None}, **arguments).frames


def kept_files(fast, kind):
    return sorted(fast["keep"].glob(f"{kind}_*"))


@pytest.fixture(scope="module")
def finished():
    """By `lora`, the folder that the short call fills, and its frames, both made when they are first asked for."""
    return {}


@pytest.fixture
def short_call(pipe, album, fast, finished, tmp_path_factory):
    """The folder that the short call fills and its frames; to be asked for while the pipeline is as it was loaded."""
    arguments = dict(fast)

    def short_call(lora):
        if lora not in finished:
            arguments.update(lora=lora, keep=tmp_path_factory.mktemp("finished") / "kept")
            frames = through(pipe, album, arguments).frames
            assert torch.equal(frames, made_afresh(pipe, album, arguments))
            finished[lora] = arguments["keep"], frames
        return finished[lora]

    return short_call


@pytest.fixture
def begin(short_call, fast):
    """Begin with the folder that the short call fills."""
    return lambda lora="gap": shutil.copytree(short_call(lora)[0], fast["keep"])


# Whole calls


@pytest.mark.parametrize("include_inputs", [True, False])
@pytest.mark.parametrize("output_type", ["pt", "pil"])
@LORAS
def test_the_same_call_again_runs_no_unet_and_gives_the_same_bits(
    pipe, album, fast, lora, output_type, include_inputs
):
    fast |= {"lora": lora, "output_type": output_type, "include_inputs": include_inputs}
    runs = []
    pipe.unet.register_forward_pre_hook(lambda module, inputs: runs.append(module))
    first = through(pipe, album, fast)
    assert runs  # so runs of the UNet are seen
    runs.clear()
    second = through(pipe, album, fast)
    assert runs == []
    assert len(second.frames[0]) == (5 if include_inputs else 2)
    for one, other in zip(first.frames[0], second.frames[0], strict=True):
        np.testing.assert_array_equal(one, other)
    assert second.times == first.times
    for one, other in zip(first.flow, second.flow, strict=True):
        assert torch.equal(one.forward, other.forward)
        assert torch.equal(one.backward, other.backward)


@LORAS
def test_after_an_error_in_the_second_gap_only_that_gap_is_made(pipe, album, fast, short_call, lora):
    _, whole = short_call(lora)
    steps = []

    def fail(stage, done, total):
        steps.extend([done] * (stage == "Denoising" and done > 0))
        if len(steps) > fast["inversion_steps"]:
            raise RuntimeError("in the second gap")

    fast["lora"] = lora
    with pytest.raises(RuntimeError, match="in the second gap") as caught, pipe.listening(fail):
        through(pipe, album, fast)
    assert caught.value.gap == 1
    assert len(kept_files(fast, "gap")) == 1
    output, begun = watched(pipe, album, fast)
    assert (begun["Fitting LoRA"], begun["Inverting"], begun["Denoising"]) == (0, 1, 1)
    assert torch.equal(output.frames, whole)
    assert len(kept_files(fast, "gap")) == 2


def test_a_gap_that_was_interrupted_is_not_kept(pipe, album, fast, short_call):
    _, whole = short_call("gap")

    def interrupt(stage, done, total):
        if (stage, done) == ("Denoising", 1):
            pipe._interrupt = True

    with pipe.listening(interrupt):
        through(pipe, album, fast)
    assert kept_files(fast, "gap") == []
    output, begun = watched(pipe, album, fast)
    assert (begun["Fitting LoRA"], begun["Denoising"]) == (1, 2)
    assert torch.equal(output.frames, whole)


def test_a_function_as_flow_is_refused_since_what_it_finds_could_not_be_known_again(pipe, album, fast):
    for flow in (lambda first, second: None, ["features", lambda first, second: None]):
        with pytest.raises(ValueError, match="`keep` and a `flow` that is a function exclude each other"):
            through(pipe, album, fast, flow=flow)
    assert not fast["keep"].exists()


@pytest.mark.parametrize(
    ("argument", "what"),
    [
        ({"control_images": (Image.new("RGB", (64, 64)),) * 2}, "`control_images`"),
        ({"method": "noise", "rank_by": lambda picture: 0.0}, "a `rank_by` that is a function"),
    ],
)
def test_what_no_key_can_hold_is_refused(pipe, album, fast, argument, what):
    if "control_images" in argument:
        pipe.register_modules(controlnet=ControlNetModel.from_unet(pipe.unet))
    with pytest.raises(ValueError, match=f"`keep` and {what} exclude each other"):
        through(pipe, album, fast, **argument)
    assert not fast["keep"].exists()


def test_a_step_callback_is_refused_since_its_changes_could_not_be_known_again(pipe, album, fast):
    with pytest.raises(ValueError, match="`keep` and `callback_on_step_end` exclude each other"):
        through(pipe, album, fast, callback_on_step_end=lambda *step: {})
    assert not fast["keep"].exists()


@pytest.mark.parametrize("name", ["unet", "vae", "text_encoder"])
def test_models_in_another_precision_are_not_answered_from_the_folder(pipe, album, fast, begin, name):
    begin()
    assert watched(pipe, album, fast)[1]["Denoising"] == 0
    getattr(pipe, name).to(torch.float64)
    _, begun = watched(pipe, album, fast)
    assert begun["Denoising"] == 2


@pytest.mark.parametrize(
    ("arguments", "fits", "denoises"),
    [
        ({"prompt": "a cat"}, 2, 2),
        ({"prompt": ["a fish", "a fish", "a cat"]}, 1, 1),
        ({"generator": torch.Generator().manual_seed(4)}, 2, 2),
        ({"height": 96, "width": 96}, 2, 2),
        ({"lora_rank": 2}, 2, 2),
        ({"n_frames": 2}, 0, 2),
        ({"n_frames": [1, 2]}, 0, 1),
        ({"times": [0.25]}, 0, 2),
        ({"mask": [None, Image.fromarray(np.uint8(255 * (np.mgrid[:64, :64][1] < 32)))]}, 0, 1),
        ({"points": [[((20, 24), (44, 36))], None]}, 0, 1),
        ({"fusion": "direct"}, 0, 2),
        ({"guidance_scale": 2.0, "negative_prompt": "fog"}, 0, 2),
        ({"lora_scale": 0.5}, 0, 2),
        ({"frame_batch_size": 1}, 0, 0),
        ({"output_type": "latent"}, 0, 0),
    ],
)
def test_what_decides_a_gap_or_its_lora_makes_it_anew_and_the_rest_does_not(
    pipe, album, fast, begin, arguments, fits, denoises
):
    begin()
    output, begun = watched(pipe, album, fast, **arguments)
    assert (begun["Fitting LoRA"], begun["Denoising"]) == (fits, denoises)
    if "generator" in arguments:
        arguments = {"generator": arguments["generator"].manual_seed(4)}
    assert torch.equal(output.frames, made_afresh(pipe, album, fast, **arguments))
    assert watched(pipe, album, fast)[1]["Denoising"] == 0  # what was kept before is there still


@LORAS
@pytest.mark.parametrize("model", ["unet", "vae", "text_encoder"])
def test_a_weight_that_changed_makes_all_anew(pipe, album, fast, begin, model, lora):
    fast |= {"lora": lora, "include_inputs": False, "output_type": "latent"}
    begin(lora)
    assert watched(pipe, album, fast)[1]["Denoising"] == 0
    with torch.no_grad():
        next(getattr(pipe, model).parameters()).mul_(1.5)
    output, begun = watched(pipe, album, fast)
    assert (begun["Fitting LoRA"], begun["Denoising"]) == (1 if lora == "shared" else 2, 2)
    assert torch.equal(output.frames, made_afresh(pipe, album, fast))


def test_without_a_lora_the_seed_decides_nothing(pipe, album, fast):
    fast["lora_steps"] = 0
    through(pipe, album, fast)
    _, begun = watched(pipe, album, fast, generator=torch.Generator().manual_seed(4))
    assert begun["Denoising"] == 0
    assert kept_files(fast, "lora") == []


@LORAS
def test_a_change_of_one_photo_spares_the_gap_that_it_is_not_in(pipe, album, fast, begin, lora):
    begin(lora)
    assert watched(pipe, album, fast, lora=lora)[1]["Denoising"] == 0
    images = [*album[:2], album[2].transpose(Image.Transpose.FLIP_TOP_BOTTOM)]
    output, begun = watched(pipe, images, fast, lora=lora)
    # A LoRA that all photos share depends on each of them.
    assert (begun["Fitting LoRA"], begun["Denoising"]) == ((1, 2) if lora == "shared" else (1, 1))
    assert torch.equal(output.frames, made_afresh(pipe, images, fast, lora=lora))


@LORAS
@pytest.mark.parametrize("length", [0, 7, -1])
def test_a_file_cut_short_is_made_again(pipe, album, fast, short_call, begin, lora, length):
    fast["lora"] = lora
    _, whole = short_call(lora)
    begin(lora)
    files = kept_files(fast, "gap") + kept_files(fast, "lora")
    contents = [file.read_bytes() for file in files]
    for file, content in zip(files, contents, strict=True):
        file.write_bytes(content[:length])
    output, begun = watched(pipe, album, fast)
    assert (begun["Fitting LoRA"], begun["Denoising"]) == (1 if lora == "shared" else 2, 2)
    assert torch.equal(output.frames, whole)
    assert [file.read_bytes() for file in files] == contents
    assert sorted(fast["keep"].iterdir()) == sorted(files)


def test_pairs_that_are_alike_share_a_lora(pipe, album, fast):
    images = [album[0], album[1], album[0], album[1]]
    output, begun = watched(pipe, images, fast)
    assert (begun["Fitting LoRA"], begun["Denoising"]) == (2, 3)
    assert torch.equal(output.frames, made_afresh(pipe, images, fast))


@pytest.mark.parametrize(
    "arguments",
    [
        {"n_frames": np.int64(2)},
        {"times": np.array([0.25, 0.5])},
        {"times": torch.tensor([0.25, 0.5])},
        {"attention_blocks": range(2, 4)},
        {"lora_learning_rate": np.float32(1e-3)},
        {"height": np.int64(64), "width": np.int64(64)},
    ],
)
def test_numbers_of_numpy_and_torch_are_kept_as_well(pipe, album, fast, arguments):
    expected = made_afresh(pipe, album, fast, **arguments)
    for denoises in (2, 0):
        output, begun = watched(pipe, album, fast, **arguments)
        assert begun["Denoising"] == denoises
        assert torch.equal(output.frames, expected)


# The folder by itself


def random_gap(**changes):
    generator = torch.Generator().manual_seed(0)
    photos = tuple(torch.rand(2, 3, 64, 64, generator=generator))
    canvas = Canvas(64, 64, 64, 64, 64, 64)
    gap = PairInput(photos, canvas, PairText(("a", "b")), NegativeText(), None, "features", seed=7)
    return replace(gap, **changes)


def random_frames(gap, count=2):
    generator = torch.Generator().manual_seed(1)
    latents, ends = (torch.randn(n, 4, 8, 8, generator=generator) for n in (count, 2))
    flow = BidirectionalFlow(*torch.randn(2, 1, 2, 8, 8, generator=generator))
    times = tuple((i + 1) / (count + 1) for i in range(count))
    return DenoisedFrames(latents, times, ends, gap.ends(), gap.canvas, flow)


def same(one, other):
    assert one.times == other.times
    assert one.canvas == other.canvas
    for name in ("latents", "clean_ends"):
        assert torch.equal(getattr(one, name), getattr(other, name))
    for name in ("forward", "backward"):
        assert torch.equal(getattr(one.flow, name), getattr(other.flow, name))
    assert all(torch.equal(*both) for both in zip(one.images, other.images, strict=True))


def test_a_place_that_is_no_path_is_refused(pipe, album, fast):
    with pytest.raises(TypeError, match=r"`keep` must be the path of a folder, not \[True\] of type list"):
        through(pipe, album, {**fast, "keep": [True]})


def test_a_file_is_no_folder(pipe, album, fast, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"`keep` must be the path of a folder, but '.*file' is a file"):
        through(pipe, album, {**fast, "keep": tmp_path / "file"})


def test_the_base_class_keeps_nothing():
    kept, gap = KeptGaps(), random_gap()
    kept.keep_frames(0, random_frames(gap))
    kept.keep_lora(0, {"weight": torch.ones(2)})
    assert kept.frames(0, gap) is None
    assert kept.lora(0) is None


def test_a_folder_gives_back_what_it_was_given_under_the_same_keys_only(tmp_path):
    folder, cpu, gap = tmp_path / "deep" / "kept", torch.device("cpu"), random_gap()
    keys = ["a" * 64, "b" * 64]
    kept = GapFolder(folder, keys, keys, cpu)
    frames, weights = random_frames(gap), {"weight": torch.randn(3, 5).T}
    kept.keep_frames(0, frames)
    kept.keep_lora(0, weights)
    kept.keep_lora(1, None)
    assert kept.frames(1, gap) is None
    assert kept.lora(1) is None
    again = GapFolder(folder, keys, keys, cpu)
    same(again.frames(0, gap), frames)
    assert list(again.lora(0)) == ["weight"]
    assert torch.equal(again.lora(0)["weight"], weights["weight"])
    others = GapFolder(folder, keys[1:], keys[1:], cpu)
    assert others.frames(0, gap) is None
    assert others.lora(0) is None
    names = [path.name for path in folder.iterdir()]
    assert len(names) == 2
    assert all(re.fullmatch(FILE_NAMES, name) for name in names)


def test_a_file_that_holds_other_tensors_is_not_taken_for_a_gap(tmp_path):
    gap, keys = random_gap(), ["a" * 64]
    kept = GapFolder(tmp_path, keys, keys, torch.device("cpu"))
    kept.keep_frames(0, random_frames(gap))
    (path,) = tmp_path.iterdir()
    write_tensors(path, {"latents": torch.zeros(2)})
    assert kept.frames(0, gap) is None


def test_what_is_kept_later_replaces_what_was_kept(tmp_path):
    gap, keys = random_gap(), ["a" * 64]
    kept = GapFolder(tmp_path, keys, keys, torch.device("cpu"))
    for count in (3, 1):
        kept.keep_frames(0, random_frames(gap, count))
    same(kept.frames(0, gap), random_frames(gap, 1))
    assert len(list(tmp_path.iterdir())) == 1


def test_the_keys_of_a_folder(tmp_path):
    gaps = [random_gap(), random_gap(text=PairText(("b", "c")))]
    preparing, rendering, cpu = PrepareSettings(), [RenderSettings()] * 2, torch.device("cpu")
    own, shared = (kept_gaps(tmp_path, gaps, preparing, rendering, both, "f", "m", cpu) for both in (False, True))
    assert own.lora_keys == [lora_key([gap], preparing, "m") for gap in gaps]
    assert shared.lora_keys == [lora_key(gaps, preparing, "m")] * 2
    keys = {*own.gap_keys, *shared.gap_keys, *own.lora_keys, *shared.lora_keys}
    assert len(keys) == 2 + 2 + 2 + 1


GIVEN = GivenFlow(BidirectionalFlow(*torch.rand(2, 1, 2, 8, 8)), torch.ones(2, 1, 8, 8, dtype=torch.bool))
STEERING = Steering(torch.tensor([[[1.0, 1.0], [2.0, 2.0]]]), torch.ones(2, 1, 8, 8, dtype=torch.bool))


def test_the_key_of_a_gap():
    gap, preparing, rendering = random_gap(), PrepareSettings(), RenderSettings()

    def key(gap=gap, preparing=preparing, rendering=rendering, model="m"):
        return gap_key(gap, preparing, rendering, model)

    embeds, half = torch.zeros(2, 4, 8), tuple(photo.half() for photo in gap.photos)
    others = [
        key(random_gap(photos=gap.photos[::-1])),
        key(random_gap(photos=half)),
        key(random_gap(canvas=Canvas(64, 64, 64, 64, 96, 96))),
        key(random_gap(text=PairText(("a", "c")))),
        key(random_gap(text=PairText(embeds=embeds))),
        key(random_gap(text=PairText(embeds=embeds + 1))),
        key(random_gap(negative=NegativeText("fog"))),
        key(random_gap(negative=NegativeText(embeds=embeds[:1]))),
        key(random_gap(flow="features+photos")),
        key(random_gap(flow=GIVEN)),
        key(random_gap(flow=replace(GIVEN, known=~GIVEN.known))),
        key(random_gap(flow=replace(GIVEN, flow=GIVEN.flow.reversed()))),
        key(random_gap(steering=STEERING)),
        key(random_gap(steering=replace(STEERING, moves=~STEERING.moves))),
        key(random_gap(seed=8)),
        key(preparing=PrepareSettings(lora_scale=0.5)),
        key(preparing=PrepareSettings(flow_smoothing=0)),
        key(rendering=RenderSettings(n_frames=3)),
        key(rendering=RenderSettings(times=[0.5])),
        key(rendering=RenderSettings(easing="ease-in")),
        key(rendering=RenderSettings(easing=lambda delta: delta**2)),
        key(rendering=RenderSettings(cross_attention_kwargs={"scale": 0.5})),
        key(model="n"),
    ]
    assert len({key(), *others}) == 1 + len(others)
    assert key() == key(random_gap(), PrepareSettings(), RenderSettings(frame_batch_size=3))
    after = RenderSettings(detail="upsampled", include_inputs=True, endpoints="reconstructed")
    assert key() == key(rendering=after)  # which decide what is made of the latents
    one, another = ({number(0.5): 0} for number in (float, np.float32))
    assert key(rendering=RenderSettings(choices=one)) == key(rendering=RenderSettings(choices=another))
    # A function counts by the times it gives.
    assert key(rendering=RenderSettings(easing=lambda delta: delta * delta)) == key(
        rendering=RenderSettings(easing=lambda delta: delta * delta)
    )


def test_the_key_of_a_lora_depends_on_what_it_is_fitted_to_and_on_nothing_else():
    gap, fit = random_gap(), FitSettings()
    others = [
        lora_key([gap, gap], fit, "m"),
        lora_key([random_gap(photos=gap.photos[::-1])], fit, "m"),
        lora_key([random_gap(text=PairText(("a", "c")))], fit, "m"),
        lora_key([random_gap(seed=8)], fit, "m"),
        lora_key([gap], FitSettings(lora_steps=3), "m"),
        lora_key([gap], FitSettings(lora_rank=3), "m"),
        lora_key([gap], FitSettings(lora_learning_rate=1e-3), "m"),
        lora_key([gap], FitSettings(clip_skip=1), "m"),
        lora_key([gap], fit, "n"),
    ]
    assert len({lora_key([gap], fit, "m"), *others}) == 1 + len(others)
    steered = random_gap(steering=STEERING, negative=NegativeText("fog"))
    assert lora_key([steered], PrepareSettings(inversion_steps=20), "m") == lora_key([gap], fit, "m")
