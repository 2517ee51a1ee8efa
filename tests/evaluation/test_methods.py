# SPDX-License-Identifier: Apache-2.0
"""The suites and the methods, on real pipelines."""

import shutil

import pytest
import torch
from PIL import ExifTags, Image

pytest.importorskip("skimage")
pytest.importorskip("cv2")

from dreammover_pipeline.evaluation.case import EvaluationCase
from dreammover_pipeline.evaluation.methods import METHODS, _looked_up
from dreammover_pipeline.evaluation.networks import Tools, dis_flow
from dreammover_pipeline.evaluation.scoring import score
from dreammover_pipeline.evaluation.suites import CLIPS, Pair, find_suites, folder_suite, world_suite
from dreammover_pipeline.images import load_images
from dreammover_pipeline.settings import PRESETS

# The methods that need no weights but the pipeline's; those that do have their own tests.
OWN = {name: method for name, method in METHODS.items() if not (method.weights or method.component)}
SHORT = {"num_inference_steps": 6, "inversion_steps": 4, "feature_step": 2, "lora_steps": 1}
SHORTEST = {"num_inference_steps": 2, "inversion_steps": 1, "feature_step": 1, "lora_steps": 1}
MATCHED = {"ours", "photometric", "direct_fusion", "released_fusion", "no_attention", "latent_splat", "pixel_splat"}
MATCHED |= {"straight", "no_hold", "upsampled", "diffusion"}
# With random weights no match is doubtful and nothing turns, so these are told apart on the embedded checkpoint.
ALIKE_WITH_RANDOM_WEIGHTS = {"no_rest", "straight"}


def world_pair(size=64, n_frames=3, difficulty="same", seed=0):
    suite = world_suite(difficulty, 1, n_frames, size, seed)
    return suite.load(suite.pairs[0])


@pytest.fixture(scope="module", autouse=True)
def few_steps_of_embeddings():
    """The method "noise_embeddings" fits as many steps whatever the settings are, and would take longest of all."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dreammover_pipeline.evaluation.methods.FITTED_EMBEDDING_STEPS", 5)
        yield


@pytest.fixture
def case(pipe):
    return EvaluationCase(pipe, world_pair(), 0, SHORT)


@pytest.fixture(scope="module")
def made(new_pipe, few_steps_of_embeddings):
    """A case, and the frames and the flow that every method made of it."""
    pipe = new_pipe()
    case = EvaluationCase(pipe, world_pair(), 0, SHORT)
    return case, {name: method(case) for name, method in OWN.items()}


@pytest.fixture
def folder(tmp_path, photos):
    """Two pairs, one of them with truth and a prompt for each image."""
    for name in ("bare", "full"):
        (tmp_path / name).mkdir()
        for index, photo in enumerate(photos):
            photo.save(tmp_path / name / f"{index}.png")
    for stem in ("0.750", "0.250"):
        photos[0].point(lambda value, stem=stem: int(value * float(stem))).save(tmp_path / "full" / f"{stem}.png")
    (tmp_path / "full" / "prompt.txt").write_text("a fish\n\na cat\n", encoding="utf-8")
    return tmp_path


def test_every_method_makes_frames_of_one_pair(made):
    case, results = made
    frames = {}
    for name, method in OWN.items():
        assert method.suits(case.pair)
        frames[name], flow = results[name]
        assert frames[name].shape == (3, 3, 64, 64), name
        assert frames[name].dtype == torch.float32
        assert not frames[name].requires_grad
        assert 0 <= frames[name].min() <= frames[name].max() <= 1
        without = {"noise", "noise_embeddings", "noise_lora", "diffmorpher", "crossfade", "dis_warp", "vae_of_truth"}
        assert (flow is None) == (name in without)
        assert (flow is case.prepared().flow) == (name in MATCHED)
    assert torch.equal(frames.pop("diffusion"), frames["ours"])  # there is nothing to refine at the model's own size
    names = [name for name in frames if name not in ALIKE_WITH_RANDOM_WEIGHTS]
    for i, name in enumerate(names):
        for other in names[:i]:
            assert not torch.allclose(frames[name], frames[other], atol=1e-4), f"{name} is {other}"


def test_what_needs_real_features_to_make_a_difference_makes_one(tiny_pipe):
    settings = {"num_inference_steps": 3, "inversion_steps": 2, "feature_step": 2, "lora_steps": 0}
    case = EvaluationCase(tiny_pipe, world_pair(128, 1, "relit", 3), 0, settings)
    frames, _ = METHODS["ours"](case)
    for name in ALIKE_WITH_RANDOM_WEIGHTS:
        assert not torch.allclose(METHODS[name](case)[0], frames, atol=1e-2), name


def test_every_method_repeats_itself_and_knows_the_time(made):
    case, results = made
    again = EvaluationCase(case.pipe, case.pair, 0, SHORT)
    for name, method in OWN.items():
        frames, _ = results[name]
        assert torch.equal(frames, method(again)[0]), name
        assert not torch.equal(frames[0], frames[2]), name


def test_the_pair_is_prepared_once_and_its_time_is_told(case):
    METHODS["ours"](case)
    first, seconds = case.prepared(), case.preparing_seconds
    METHODS["direct_fusion"](case)
    assert case.prepared() is first
    assert case.preparing_seconds == seconds > 0
    METHODS["no_lora"](case)
    assert case.preparing_seconds > seconds
    assert case.prepared().lora is not None
    assert case.prepared(lora_steps=0).lora is None


def test_preparations_that_differ_share_one_lora(case):
    METHODS["paper"](case)
    METHODS["shallow"](case)
    prepared = case._prepared.values()
    assert len(prepared) == 3
    lora = case.prepared().lora
    assert all(torch.equal(pair.lora[name], lora[name]) for pair in prepared for name in lora)
    assert case.prepared(inversion_steps=1, feature_step=1).inversion.steps == 1


def test_the_paper_row_is_the_pipeline_with_the_papers_settings(pipe, case):
    settings = SHORT | PRESETS["paper"]
    frames, _ = METHODS["paper"](case)
    assert torch.equal(frames, METHODS["ours"](EvaluationCase(pipe, case.pair, 0, settings))[0])
    for splat in ("latent_splat", "pixel_splat"):
        assert not torch.equal(
            METHODS[splat](case)[0], METHODS[splat](EvaluationCase(pipe, case.pair, 0, settings))[0]
        )


def test_settings_reach_the_pipeline(pipe):
    pair = world_pair()
    shallow = EvaluationCase(pipe, pair, 0, SHORT | {"inversion_steps": 2})
    assert shallow.prepared().inversion.steps == 2
    direct = EvaluationCase(pipe, pair, 0, SHORT | {"fusion": "direct"})
    assert torch.equal(METHODS["ours"](direct)[0], METHODS["direct_fusion"](direct)[0])


def test_true_flow_is_the_worlds(tiny_pipe):
    """At the centres of cells exactly; so over all pixels nearly."""
    pair = world_pair(size=128)
    settings = {"num_inference_steps": 6, "inversion_steps": 2, "feature_step": 2, "lora_steps": 0}
    case = EvaluationCase(tiny_pipe, pair, 0, settings)
    frames, flow = METHODS["true_flow"](case)
    assert torch.equal(4 * flow.forward, pair.motion.flow(0, 1)[..., 2::4, 2::4])
    found = score(pair, case.ends, frames, flow, case.canvas, Tools(dis_flow, None, None, {}))
    assert found["epe"] < 2
    assert found["pck05"] > 0.9
    _, dis = METHODS["dis_flow"](case)
    assert torch.equal(4 * dis.backward, dis_flow(*case.working_images.flip(0))[..., 2::4, 2::4])


def test_a_crossfade_is_a_weighted_mean(case):
    frames, _ = METHODS["crossfade"](case)
    first, last = case.pair.images
    torch.testing.assert_close(frames, torch.stack([(1 - t) * first + t * last for t in (0.25, 0.5, 0.75)]))


def test_dis_warp_follows_a_motion_and_goes_on_with_edges(pipe):
    noise = torch.rand(1, 3, 20, 20, generator=torch.Generator().manual_seed(0)).mean(1, keepdim=True)
    picture = torch.nn.functional.interpolate(noise, (80, 80), mode="bicubic").clamp(0, 1)[0].expand(3, -1, -1)
    first, middle, last = (picture[:, 8:72, x : x + 64] for x in (8, 10, 12))
    case = EvaluationCase(pipe, Pair("shift", (first, last), ("", ""), (0.5,)), 0, SHORT)
    frames, _ = METHODS["dis_warp"](case)
    assert (frames[0] - middle)[:, 8:-8, 8:-8].abs().mean() < 0.01
    assert (METHODS["crossfade"](case)[0][0] - middle)[:, 8:-8, 8:-8].abs().mean() > 0.02
    white = Pair("white", (torch.ones(3, 64, 64), torch.ones(3, 64, 64)), ("", ""), (0.5,))
    assert METHODS["dis_warp"](EvaluationCase(pipe, white, 0, SHORT))[0].min() == 1
    assert (
        _looked_up(first, torch.full((1, 2, 64, 64), 1000.0)).unique().tolist() == first[:, -1, -1].unique().tolist()
    )


def test_splats_of_a_pair_that_rests_show_it(tiny_pipe):
    """Identical images match themselves, so pixels come back as they are and latents as their decoding."""
    pair = world_pair(size=128)
    still = Pair("still", (pair.images[0], pair.images[0]), ("", ""), (0.3, 0.5), torch.stack([pair.images[0]] * 2))
    case = EvaluationCase(
        tiny_pipe, still, 0, {"num_inference_steps": 6, "inversion_steps": 2, "feature_step": 2, "lora_steps": 0}
    )
    assert not case.prepared().flow.stacked().any()
    torch.testing.assert_close(METHODS["pixel_splat"](case)[0], still.truth, atol=1e-5, rtol=0)
    torch.testing.assert_close(METHODS["latent_splat"](case)[0], METHODS["vae_of_truth"](case)[0], atol=1e-4, rtol=0)


def test_photos_of_any_shape_are_fitted(pipe, photos):
    first, last = (load_images(photo, "photo")[0] for photo in photos)
    pair = Pair("odd", (first[:, :40, :50], last), ("", ""), (0.5,))
    case = EvaluationCase(pipe, pair, 0, SHORTEST)
    for name, method in OWN.items():
        if method.suits(pair):
            assert method(case)[0].shape == (1, 3, 40, 50), name


def test_methods_that_need_truth_say_so(folder):
    bare, full = (folder_suite(folder, 3).load(name) for name in ("bare", "full"))
    need_motion = {"true_flow", "true_flow_straight", "true_path", "true_visibility", "true_splat"} | {
        "poses",
        "noise_poses",
    }
    assert {name for name, method in METHODS.items() if not method.suits(bare)} == need_motion | {"vae_of_truth"}
    assert {name for name, method in METHODS.items() if not method.suits(full)} == need_motion


@pytest.mark.parametrize("difficulty", ["same", "relit", "recast"])
def test_a_world_suite_knows_the_truth(difficulty):
    suite = world_suite(difficulty, 3, 2, 64)
    pairs = [suite.load(name) for name in suite.pairs]
    assert len({pair.name for pair in pairs}) == 3
    for pair in pairs:
        assert pair.times == (1 / 3, 2 / 3)
        assert torch.equal(pair.truth[0], pair.motion.frame(1 / 3)[0])
        assert torch.equal(pair.images[1], pair.motion.frame(1)[0])
    assert not torch.equal(pairs[0].images[0], pairs[1].images[0])
    assert (pairs[0].prompt[0] != pairs[0].prompt[1]) == (difficulty == "recast")
    other = world_suite(difficulty, 3, 2, 64, seed=1)
    assert not set(other.pairs) & set(suite.pairs)


def test_a_folder_suite_with_and_without_truth(folder, photos):
    suite = folder_suite(folder, 3)
    assert suite.pairs == ("bare", "full")
    bare, full = map(suite.load, suite.pairs)
    assert (bare.truth, bare.motion, bare.prompt, bare.times) == (None, None, ("", ""), (0.25, 0.5, 0.75))
    assert (full.prompt, full.times) == (("a fish", "a cat"), (0.25, 0.75))
    assert full.truth.shape == (2, 3, 64, 64)
    assert full.truth[0].mean() < full.truth[1].mean()  # in the order of time
    assert torch.equal(full.images[1], load_images(photos[1], "photo")[0])
    assert folder_suite(folder, 3, pairs=1).pairs == ("bare",)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda folder: (folder / "bare" / "1.png").unlink(), "lacks '1.png'"),
        (lambda folder: (folder / "full" / "0.png").write_text("no picture"), "0.png' is no picture"),
        (lambda folder: (folder / "full" / "0.250.png").rename(folder / "full" / "0.000.png"), "are of the same time"),
        (lambda folder: shutil.copy(folder / "bare" / "1.png", folder / "bare" / "1.JPG"), "are of the same time"),
        (lambda folder: Image.new("RGB", (8, 8)).save(folder / "full" / "0.250.png"), "has not the size 64x64"),
        (lambda folder: (folder / "bare" / "prompt.txt").write_text("a\nb\nc"), "one or two lines"),
        (lambda folder: (folder / "bare" / "prompt.txt").write_text("\n"), "one or two lines"),
    ],
)
def test_a_folder_laid_out_wrongly_is_refused_by_name(folder, spoil, reason):
    spoil(folder)
    with pytest.raises(ValueError, match=reason):
        folder_suite(folder, 3)


def test_pictures_of_a_folder_may_be_jpegs_and_turned(folder, photos):
    turned = Image.Exif()
    turned[ExifTags.Base.Orientation] = 6
    wide = photos[0].resize((64, 48))
    for name in ("0.png", "1.png", "0.250.png", "0.750.png"):
        (folder / "full" / name).unlink()
    wide.save(folder / "full" / "0.jpg")
    wide.save(folder / "full" / "0.5.jpeg")
    wide.transpose(Image.Transpose.ROTATE_90).save(folder / "full" / "0.75.JPG", exif=turned)
    photos[1].save(folder / "full" / "1.png")
    pair = folder_suite(folder, 3).load("full")
    assert pair.times == (0.5, 0.75)
    assert pair.truth.shape == (2, 3, 48, 64)
    assert (pair.truth - pair.images[0]).abs().mean() < 0.05
    wide.save(folder / "full" / "0.75.JPG", exif=turned)
    with pytest.raises(ValueError, match=r"0.75.JPG' has not the size 64x48 of its pair's '0.jpg'"):
        folder_suite(folder, 3)


def test_the_clips_are_photos_with_their_true_frames(pipe):
    (suite,) = find_suites(["clips"], 9, 7, 64)
    pairs = [suite.load(name) for name in suite.pairs]
    assert [pair.name for pair in pairs if pair.truth is None] == ["cup_44_16"]
    readme = (CLIPS / "README.md").read_text(encoding="utf-8")
    for pair in pairs:
        assert f"| `{pair.name}` |" in readme
        assert pair.prompt[0] == pair.prompt[1] != ""
        assert pair.images[0].shape == pair.images[1].shape == (3, 480, 640)
        if pair.truth is not None:
            assert pair.times == (0.25, 0.5, 0.75)
            ends = [[(frame - end).abs().mean() for end in pair.images] for frame in pair.truth]
            assert ends[0][0] < ends[0][1]  # the frames are in the order of time
            assert ends[2][0] > ends[2][1]


def test_clips_are_scored_at_the_size_of_the_photos(pipe):
    pair = find_suites(["clips"], 1, 7, 64)[0].load("box_176_48")
    case = EvaluationCase(pipe, pair, 0, SHORT)
    scores = []
    for name in ("crossfade", "dis_warp", "latent_splat"):
        frames, flow = METHODS[name](case)
        assert frames.shape == pair.truth.shape
        scores.append(score(pair, case.ends, frames, flow, case.canvas, Tools(dis_flow, None, None, {})))
    assert all(found["psnr"] and found["ssim"] and found["we"] for found in scores)
    assert scores[1]["psnr"] > scores[0]["psnr"] + 1
    assert scores[2]["epe"] is scores[2]["we_true"] is None  # the true motion is not known


def test_suites_are_found_by_name(folder, tmp_path):
    assert [suite.name for suite in find_suites(["relit", str(folder)], 2, 3, 64)] == ["relit", folder.name]
    with pytest.raises(ValueError, match="neither same, relit, recast, clips nor a folder"):
        find_suites(["sme"], 2, 3, 64)
    with pytest.raises(ValueError, match="two suites"):
        find_suites(["same", "same"], 2, 3, 64)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match="holds no folders"):
        find_suites([str(empty)], 2, 3, 64)
