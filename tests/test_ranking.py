# SPDX-License-Identifier: Apache-2.0
"""Candidates for a frame: which of them is kept, and what follows from it."""

import numpy as np
import PIL.Image
import pytest
import torch
from support.ranking import tiny_clip

from dreammover_pipeline import DreamMoverPipeline
from dreammover_pipeline.ranking import Chooser, clip_judge

NOISE = {
    "method": "noise",
    "num_inference_steps": 6,
    "inversion_steps": 4,
    "feature_step": 2,
    "lora_steps": 0,
    "detail": "upsampled",
}


def grey(level):
    return PIL.Image.new("RGB", (8, 8), (level,) * 3)


def brightness(picture):
    return int(np.asarray(picture.convert("L"), dtype=int).sum())


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_the_best_is_chosen_and_the_first_of_equals():
    chooser = Chooser(brightness, {})
    assert chooser.choose(0.5, [grey(10), grey(90), grey(90)]) == 1
    assert chooser.choose(0.25, [grey(10), grey(10)]) == 0
    assert chooser.chosen == {0.5: 1, 0.25: 0}
    assert [brightness(picture) for picture in chooser.seen[0.25]] == [640, 640]


def test_a_choice_by_hand_prevails_and_what_is_no_number_is_the_worst():
    assert Chooser(brightness, {0.5: 0}).choose(0.5, [grey(10), grey(90)]) == 0
    nan_then_one = iter([float("nan"), 1.0])
    assert Chooser(lambda picture: next(nan_then_one), {}).choose(0.5, [grey(1), grey(2)]) == 1
    with pytest.raises(TypeError, match="`rank_by` must give a number"):
        Chooser(lambda picture: "good", {}).choose(0.5, [grey(1)])


def test_frames_are_the_best_of_their_candidates(pipe, photos):
    def frames(**more):
        return pipe(*photos, **NOISE, n_frames=3, output_type="pil", generator=seeded(), **more)

    one = frames()
    assert one.candidates is None
    three = frames(candidates=3, rank_by=brightness)
    (chooser,) = three.candidates
    assert set(chooser.seen) == set(three.times[0]) == {0.25, 0.5, 0.75}
    for time, pictures in chooser.seen.items():
        marks = [brightness(picture) for picture in pictures]
        assert len(pictures) == 3
        assert marks[chooser.chosen[time]] == max(marks)
    middle = three.times[0].index(0.5)
    assert brightness(three.frames[0][middle]) == brightness(chooser.seen[0.5][chooser.chosen[0.5]])
    # the first candidate of the middle frame is the one that is made without candidates
    assert chooser.seen[0.5][0].tobytes() == one.frames[0][middle].tobytes()


def test_a_choice_changes_what_is_made_of_it_and_nothing_else(pipe, photos):
    def latents(**choices):
        made = pipe(
            *photos,
            **NOISE,
            n_frames=7,
            output_type="latent",
            candidates=2,
            rank_by=lambda picture: 0.0,
            generator=seeded(),
            **choices,
        )
        return dict(zip(made.times[0], made.frames[0], strict=True))

    plain, other = latents(), latents(choices={0.25: 1})
    changed = {time for time in plain if not torch.equal(plain[time], other[time])}
    assert changed == {0.125, 0.25, 0.375}


@pytest.fixture
def clip(pipe):
    return tiny_clip(pipe.tokenizer)


def test_clip_judges_by_the_difference_of_two_similarities(clip):
    texts, device = ("a fish", "a robot"), torch.device("cpu")
    with torch.no_grad():
        there, back = (clip_judge(*clip, order, device)(grey(200)) for order in (texts, texts[::-1]))
        other = clip_judge(*clip, texts, device)(grey(20))
    assert there == pytest.approx(-back, abs=1e-6)
    assert there != 0
    assert other != there


def test_a_pipeline_ranks_by_its_clip_and_saves_it(pipe, photos, clip, tmp_path):
    ranking = DreamMoverPipeline(
        **{**pipe.components, "clip": clip[0], "clip_processor": clip[1]}, requires_safety_checker=False
    )
    ranking.set_progress_bar_config(disable=True)
    settings = {**NOISE, "n_frames": 1, "candidates": 2, "output_type": "latent"}
    made = ranking(*photos, **settings, generator=seeded())
    (chooser,) = made.candidates
    with torch.no_grad():
        judge = clip_judge(*clip, ("high quality, detailed", "blurry, distorted"), torch.device("cpu"))
        marks = [judge(picture) for picture in chooser.seen[0.5]]
    assert chooser.chosen[0.5] == marks.index(max(marks))
    ranking.save_pretrained(tmp_path / "saved")
    again = DreamMoverPipeline.from_pretrained(tmp_path / "saved", requires_safety_checker=False)
    again.set_progress_bar_config(disable=True)
    assert torch.allclose(again(*photos, **settings, generator=seeded()).frames, made.frames, atol=1e-4)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"method": "flow", "candidates": 2}, ValueError, "nothing but the LoRA fit is random"),
        ({"candidates": 2}, ValueError, "ranked by CLIP, which this pipeline lacks"),
        ({"candidates": 0}, ValueError, "`candidates` must be at least 1"),
        ({"candidates": 2, "rank_by": "sharp"}, TypeError, "`rank_by` must be two texts or a function"),
        ({"choices": {0.5: 1}}, ValueError, "`choices` must name candidates from 0 to 0"),
        ({"choices": [0]}, TypeError, "`choices` must be a dictionary"),
        ({"n_frames": 2, "choices": {0.33: 0}}, ValueError, "`choices` names δ = 0.33, where .* nearest is at 0.3333"),
    ],
)
def test_what_makes_no_sense_is_refused_before_a_model_runs(pipe, photos, wrong, error, message):
    pipe.vae.encoder.register_forward_pre_hook(lambda *call: pytest.fail("a model ran"))
    with pytest.raises(error, match=message):
        pipe(*photos, **NOISE | wrong)
