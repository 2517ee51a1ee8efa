# SPDX-License-Identifier: Apache-2.0
"""Every argument is declared once, and all that is said of it elsewhere agrees."""

import argparse
import inspect
from dataclasses import fields

import pytest

from dreammover_pipeline import PRESETS, DreamMoverPipeline
from dreammover_pipeline.arguments import ASK_PYTHON, Choice, Numbers, Settings, WholeNumbers, arguments_of, taken
from dreammover_pipeline.batch.manifest import PARAMETERS
from dreammover_pipeline.cli.batch import WITHOUT
from dreammover_pipeline.cli.evaluate import SETTINGS
from dreammover_pipeline.cli.options import PipelineDefaults, add_method_options, call_arguments
from dreammover_pipeline.settings import (
    GROUPS,
    PREPARING,
    RENDERING,
    Content,
    Delivery,
    FitSettings,
    PrepareSettings,
    RenderSettings,
    VideoSettings,
    arguments,
)
from tools.write_arguments import written

DEFAULTS = {name: declared.default for name, declared in arguments().items()}
BOUNDED = [name for name, declared in arguments().items() if isinstance(declared.values, (WholeNumbers, Numbers))]
MATCH = {"flow", "points", "mask", "poses"}  # what of the content of a call has no part in the fit
CHOICES = [name for name, declared in arguments().items() if isinstance(declared.values, Choice)]


def parser_of(**kinds):
    parser = argparse.ArgumentParser()
    add_method_options(parser, **kinds)
    return parser


def typed(*options):
    return call_arguments(parser_of().parse_args(options))


def options_of(**kinds):
    """Option → attribute, of what `add_method_options` adds."""
    actions = parser_of(**kinds)._actions
    return {action.option_strings[0]: action.dest for action in actions if action.dest not in ("help", "preset")}


def group_of(name):
    return next(group for group in GROUPS if name in arguments_of(group))


def test_what_is_written_from_the_declarations_is_up_to_date():
    stale = [path.name for path, text in written().items() if path.read_text(encoding="utf-8") != text]
    assert not stale, "run `python tools/write_arguments.py`"


@pytest.mark.parametrize(
    ("method", "groups", "own", "without"),
    [
        ("__call__", GROUPS, {"self", "img0", "img1"}, set()),
        ("prepare", PREPARING, {"self", "img0", "img1", "lora", "canvas"}, set()),
        ("render", RENDERING, {"self", "pair", "generator"}, set()),
        ("fit_lora", (Content, FitSettings), {"self", "img0", "img1", "adapter_name"}, MATCH),
        ("fit_shared_lora", (Content, FitSettings), {"self", "images"}, MATCH),
    ],
)
def test_a_method_takes_the_arguments_of_its_groups(method, groups, own, without):
    taken_names = set(inspect.signature(getattr(DreamMoverPipeline, method)).parameters)
    assert taken_names == own | (set(arguments_of(*groups)) - without)


def test_an_argument_is_in_one_group():
    names = [declared.name for group in GROUPS for declared in fields(group)]
    assert sorted(set(names) - {"cross_attention_kwargs"}) == sorted(name for name in names if names.count(name) == 1)


@pytest.mark.parametrize("name", BOUNDED)
def test_a_bound_holds_and_the_error_names_the_argument(name):
    values, group = arguments()[name].values, group_of(name)
    allowed = values.least if isinstance(values, WholeNumbers) or values.inclusive else 1e-6
    values.check(name, allowed)
    for refused in (values.least - 1, "many", True, float("nan")):
        with pytest.raises((TypeError, ValueError), match=f"`{name}`"):
            group.of({name: refused})
    if DEFAULTS[name] is None:
        assert getattr(group.of({name: None}), name) is None
    else:
        with pytest.raises(TypeError, match=f"`{name}`"):
            group.of({name: None})


@pytest.mark.parametrize("name", CHOICES)
def test_a_choice_is_one_of_its_names(name):
    for choice in arguments()[name].values.names:
        assert getattr(group_of(name).of({name: choice}), name) == choice
    with pytest.raises(ValueError, match=f"`{name}` must be one of '{DEFAULTS[name]}', "):
        group_of(name).of({name: "another"})


def test_a_group_takes_what_is_its_own_and_leaves_the_rest():
    settings = PrepareSettings.of({"lora_steps": 3, "n_frames": 5, "spots": []})
    assert settings.lora_steps == 3
    assert settings == PrepareSettings(lora_steps=3)
    assert taken({"lora_steps": 3, "n_frames": 5, "spots": []}, *PREPARING) == {"lora_steps": 3}


def test_meanings_stand_alone():
    for name, declared in arguments().items():
        assert declared.about[0].isupper(), name
        assert declared.about[-1] == ".", name


# Presets


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_made_of_arguments_that_a_pipeline_takes(pipe, name):
    assert PRESETS[name].keys() <= DEFAULTS.keys()
    pipe.check_inputs(**PRESETS[name])


def test_a_custom_pipeline_brings_its_presets():
    assert DreamMoverPipeline.PRESETS is PRESETS


def test_quality_is_what_one_gets_without_asking_and_fast_does_less():
    assert PRESETS["quality"] == {key: DEFAULTS[key] for key in PRESETS["quality"]}
    assert PRESETS["fast"].keys() == PRESETS["quality"].keys()
    assert all(PRESETS["fast"][key] < value for key, value in PRESETS["quality"].items())


def test_fast_inverts_as_deeply():
    for key in ("inversion_steps", "feature_step"):
        fast, quality = (PRESETS[name][key] / PRESETS[name]["num_inference_steps"] for name in ("fast", "quality"))
        assert fast == pytest.approx(quality, abs=0.03)


def test_paper_is_what_differs_from_the_paper():
    assert PRESETS["paper"] == {
        "feature_block": 1,
        "distance_penalty": 0,
        "rest_tolerance": 0,
        "flow_smoothing": 0,
        "photo_tolerance": 0,
        "motion": "straight",
        "layout_hold": 0,
        "importance": "photometric",
        "detail": "upsampled",
    }


# The command line


def test_every_argument_has_an_option_unless_only_python_can_say_it():
    expected = {declared.option: name for name, declared in arguments().items() if declared.option is not ASK_PYTHON}
    assert options_of() == expected
    only_python = {
        "height", "width", "generator", "prompt_embeds", "negative_prompt_embeds", "cross_attention_kwargs", "times",
        "include_inputs", "output_type", "return_dict", "callback_on_step_end", "callback_on_step_end_tensor_inputs",
        "control_images", "choices",
    }  # fmt: skip
    assert set(arguments()) - set(expected.values()) == only_python


def test_a_prepared_pair_has_the_options_of_rendering_and_a_batch_those_it_has_a_use_for():
    rendering = {name for name in arguments_of(*RENDERING) if arguments()[name].option is not ASK_PYTHON}
    assert set(options_of(rendering_only=True).values()) == rendering
    assert set(options_of().values()) - set(options_of(without=WITHOUT).values()) == set(WITHOUT)


def test_the_help_shows_every_default():
    parser = parser_of()
    parser.formatter_class = PipelineDefaults
    text = "".join(parser.format_help().split())  # argparse breaks lines at hyphens too
    for name, declared in arguments().items():
        if declared.option is not ASK_PYTHON and declared.default is not None:
            default = declared.default
            shown = " ".join(map(str, default)) if isinstance(default, tuple) else str(default) or "empty"
            meaning = "".join(declared.about.replace("`", "").split())
            assert meaning in text, name
            assert f"(default:{''.join(shown.split())})" in text.partition(meaning)[2][:90], name


def test_what_is_typed_prevails_over_a_preset():
    assert typed("--preset", "fast") == PRESETS["fast"]
    assert typed("--preset", "fast", "--lora-steps", "7") == PRESETS["fast"] | {"lora_steps": 7}
    assert typed("--lora-steps", "7") == {"lora_steps": 7}
    assert typed("--preset", "paper", "--flow-from", "features") == PRESETS["paper"] | {"flow": "features"}


# What else is made from the declarations


def test_a_manifest_has_a_key_for_every_argument_that_json_can_hold():
    delivery = arguments_of(Delivery)
    expected = {name for name, declared in arguments().items() if declared.values.in_files and name not in delivery}
    assert set(PARAMETERS) == expected
    assert {"prompt", "height", "points", "times", "include_inputs", "frame_batch_size"} <= expected


def test_evaluation_sets_the_method_and_not_which_frames():
    assert {"inversion_steps", "fusion", "lora_scale"} <= SETTINGS
    assert not SETTINGS & {*arguments_of(VideoSettings), *arguments_of(Content), "cross_attention_kwargs"}
    assert set(arguments_of(PrepareSettings, RenderSettings)) >= SETTINGS


def test_only_the_batch_size_decides_nothing():
    assert [name for name, declared in arguments().items() if not declared.decides] == ["frame_batch_size"]


def test_sliders_hold_their_defaults():
    sliders = {name: declared for name, declared in arguments().items() if declared.slider}
    assert set(sliders) == {"n_frames", "lora_steps", "embedding_steps", "inversion_steps"}
    for declared in sliders.values():
        low, high = declared.slider
        assert low <= declared.default <= high
        declared.values.check(declared.name, low)


def test_groups_are_settings():
    assert all(issubclass(group, Settings) for group in GROUPS)


# Bounds


@pytest.mark.parametrize(
    ("group", "values", "fault"),
    [
        (VideoSettings, {"n_frames": 10**8}, "`n_frames` must be at most 100000, not 100000000"),
        (PrepareSettings, {"flow_smoothing": 10**9}, "`flow_smoothing` must be at most 1000"),
        (PrepareSettings, {"lora_steps": 10**6}, "`lora_steps` must be at most 100000"),
        (PrepareSettings, {"lora_scale": 1e30}, r"`lora_scale` must be at most 1000, not 1e\+30"),
        (RenderSettings, {"guidance_scale": 1e9}, "`guidance_scale` must be at most 1000"),
    ],
)
def test_values_that_would_fill_the_memory_or_never_end_are_refused(group, values, fault):
    with pytest.raises(ValueError, match=f"^{fault}"):
        group.of(values)
