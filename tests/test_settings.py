# SPDX-License-Identifier: Apache-2.0
"""Presets, from Python and from the command line."""

import argparse
import inspect

import pytest

from dreammover_pipeline import PRESETS, DreamMoverPipeline
from dreammover_pipeline.cli.options import add_method_options, call_arguments

DEFAULTS = {name: p.default for name, p in inspect.signature(DreamMoverPipeline.__call__).parameters.items()}


def typed(*options):
    parser = argparse.ArgumentParser()
    add_method_options(parser)
    return call_arguments(parser.parse_args(options))


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_made_of_arguments_that_a_pipeline_takes(pipe, name):
    assert PRESETS[name].keys() <= DEFAULTS.keys()
    settings = DEFAULTS | PRESETS[name]
    pipe.check_inputs(**{key: settings[key] for key in inspect.signature(pipe.check_inputs).parameters})


def test_quality_is_what_one_gets_without_asking_and_fast_does_less():
    assert PRESETS["quality"] == {key: DEFAULTS[key] for key in PRESETS["quality"]}
    assert PRESETS["fast"].keys() == PRESETS["quality"].keys()
    assert all(PRESETS["fast"][key] < value for key, value in PRESETS["quality"].items())


def test_fast_inverts_as_deeply():
    for key in ("inversion_steps", "feature_step"):
        fast, quality = (PRESETS[name][key] / PRESETS[name]["num_inference_steps"] for name in ("fast", "quality"))
        assert fast == pytest.approx(quality, abs=0.03)


def test_what_is_typed_prevails_over_a_preset():
    assert typed("--preset", "fast") == PRESETS["fast"]
    assert typed("--preset", "fast", "--lora-steps", "7") == PRESETS["fast"] | {"lora_steps": 7}
    assert typed("--lora-steps", "7") == {"lora_steps": 7}
