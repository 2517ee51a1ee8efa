# SPDX-License-Identifier: Apache-2.0
"""The training of the embedded checkpoint, on a recipe of seconds."""

from __future__ import annotations

import json
import math
import multiprocessing
import shutil
import time
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file
from transformers import CLIPTokenizer

from dreammover_pipeline import DreamMoverPipeline
from dreammover_pipeline.ddim import recompose
from dreammover_pipeline.fields import cell_grid
from dreammover_pipeline.tiny import models, optim, recipes, stages, validation
from dreammover_pipeline.tiny.train import main
from dreammover_pipeline.tiny.trainer import read_state
from dreammover_pipeline.tiny.world import World

QUICK = recipes.PRESETS["quick"]
CPU = torch.device("cpu")


def command(folder, *more):
    return ["--preset", "quick", "--device", "cpu", "--out", str(folder), *more]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folder of a whole training, exported to its folder `export`."""
    folder = tmp_path_factory.mktemp("trained")
    main(command(folder, "--export", str(folder / "export")))
    return folder


@pytest.fixture(scope="module")
def tokenizer():
    return models.build_tokenizer(models.WORDS, QUICK.sizes.tokens)


def evaluations(folder, name):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


# --- optimizers


@pytest.mark.parametrize("shape", [(3, 16, 40), (2, 40, 16), (1, 24, 24)])
def test_orthogonalised_matrices_keep_their_directions_and_lose_their_scales(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, _, vt = torch.linalg.svd(matrices, full_matrices=False)
    strengths = u.mT @ optim.orthogonalise(matrices).float() @ vt.mT  # diagonal if the singular vectors are kept
    values = strengths.diagonal(dim1=1, dim2=2)
    assert values.min() > 0.6
    assert values.max() < 1.3
    assert (strengths - torch.diag_embed(values)).abs().max() < 0.05


def build_all(tokenizer):
    size = QUICK.world.size
    return {
        "vae": models.build_vae(QUICK.sizes, size),
        "unet": models.build_unet(QUICK.sizes, size),
        "text_encoder": models.build_text_encoder(QUICK.sizes, tokenizer),
    }


def test_every_parameter_is_trained_by_one_optimizer(tokenizer):
    model = torch.nn.ModuleDict(build_all(tokenizer))
    muon, adamw = optim.split_parameters(model)
    assert sorted(map(id, muon + adamw)) == sorted(map(id, model.parameters()))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    by_muon, by_adamw = ({names[id(parameter)] for parameter in part} for part in (muon, adamw))
    assert {
        "vae.encoder.conv_in.weight",
        "vae.decoder.conv_out.weight",
        "vae.quant_conv.weight",
        "vae.post_quant_conv.weight",
        "unet.conv_in.weight",
        "unet.conv_out.weight",
        "text_encoder.embeddings.token_embedding.weight",
        "text_encoder.embeddings.position_embedding.weight",
    } <= by_adamw
    assert {
        "vae.encoder.down_blocks.0.resnets.0.conv1.weight",
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight",
        "unet.time_embedding.linear_1.weight",
    } <= by_muon
    assert all(parameter.ndim > 1 for parameter in muon)


def test_a_muon_step_changes_weights_by_a_fifth_of_its_rate():
    layer = torch.nn.Conv2d(16, 48, 3)
    before = layer.weight.detach().clone()
    optimizer = optim.MuonAdamW(torch.nn.Sequential(layer), 0.01, 0.001)
    layer(torch.randn(2, 16, 8, 8)).square().mean().backward()
    optimizer.step(0.5)
    change = (layer.weight - before).square().mean().sqrt().item()
    # a wide orthogonal matrix has 48 singular values of about 1 on 48 × 144 entries
    assert change == pytest.approx(0.5 * 0.01 * 0.2, rel=0.25)
    assert layer.weight.grad is None
    assert layer.bias.grad is None


def test_learning_rates_warm_up_stay_and_fall_to_zero():
    factors = [optim.rate_factor(step, 1000, 0.6) for step in range(1000)]
    assert factors[0] == 1 / optim.WARM_UP
    assert factors[optim.WARM_UP : 400] == [1] * (400 - optim.WARM_UP)
    assert all(later < earlier for earlier, later in pairwise(factors[400:]))
    assert factors[700] == pytest.approx(0.5)
    assert 0 < factors[-1] < 0.002


def test_the_average_of_constant_weights_is_them_and_it_follows_changes():
    model = torch.nn.Linear(3, 2)
    average = optim.Average(model, 0.9)
    torch.nn.init.constant_(model.bias, 5.0)
    for step in range(200):
        average.update(step)
    torch.testing.assert_close(average.weights["bias"], model.bias.detach())
    torch.nn.init.constant_(model.bias, 6.0)
    average.update(200)
    torch.testing.assert_close(average.weights["bias"], torch.full((2,), 5.1))


# --- models


def test_every_word_of_the_world_is_one_token(tokenizer):
    for word in models.WORDS:
        ids = tokenizer(word).input_ids
        assert len(ids) == 3, word
        assert tokenizer.decode(ids, skip_special_tokens=True).strip() == word
    assert len({tokenizer(word).input_ids[1] for word in models.WORDS}) == len(models.WORDS)


def test_captions_survive_the_tokenizer_and_fit_its_limit(tokenizer):
    scenes = World(size=64, second_sprite=0.5).sample(200, 0, "recast")
    captions = {caption for ends in scenes.captions for caption in ends}
    assert max(len(caption.split()) for caption in captions) > 12  # some have two sprites
    for caption in captions:
        ids = tokenizer(caption).input_ids
        assert len(ids) == len(caption.split()) + 2 <= tokenizer.model_max_length
        assert tokenizer.decode(ids, skip_special_tokens=True).strip() == caption
    other = tokenizer("a zebra's photo").input_ids
    assert tokenizer.unk_token_id not in other[1:-1]  # unknown words are spelt


def test_attention_stands_at_the_latent_grid_half_and_a_quarter_of_it():
    unet = models.build_unet(QUICK.sizes, QUICK.world.size)
    lengths = {}
    for name, module in unet.named_modules():
        if name.endswith("attn1"):
            module.register_forward_hook(
                lambda module, args, kwargs, output, name=name: lengths.update({name: output.shape[1]}),
                with_kwargs=True,
            )
    unet(torch.randn(1, 4, 16, 16), 5, torch.randn(1, 24, QUICK.sizes.text_width))
    up = {int(name.split(".")[1]): length for name, length in lengths.items() if name.startswith("up_blocks")}
    assert up == {1: 4 * 4, 2: 8 * 8, 3: 16 * 16}


def test_normalised_latents_have_unit_variance_and_images_stay_the_same():
    vae = models.initialised(lambda: models.build_vae(QUICK.sizes, 64), 0)
    images = recipes.from_bytes(recipes.draw_images(QUICK.world, 256, 1, CPU)[0][::8])
    with torch.no_grad():
        before = vae.encode(images).latent_dist
        decoded = vae.decode(before.mean).sample
        models.normalise_latents(vae, images)
        after = vae.encode(images).latent_dist
        latents = after.mean * vae.config.scaling_factor
        torch.testing.assert_close(vae.decode(after.mean).sample, decoded, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(latents.std((0, 2, 3)), torch.ones(4), atol=1e-4, rtol=0)
    # the noise of the posterior shrinks along with its mean
    shrunk = after.mean.std((0, 2, 3)) / before.mean.std((0, 2, 3))
    torch.testing.assert_close((after.std / before.std).mean((0, 2, 3)), shrunk, atol=1e-4, rtol=1e-3)


# --- validation


@pytest.fixture(scope="module")
def pairs():
    return validation.held_out_pairs(World(size=64), "same", 12, CPU)


def test_perfect_features_have_full_pck(pairs):
    cells = cell_grid(64, 64, pairs.flow)[..., 2::4, 2::4]  # pixels
    first = cells + pairs.flow[0][..., 2::4, 2::4]  # where each cell of the first image is in the last one
    first = torch.where(pairs.seen[0][..., 2::4, 2::4], first, -1000.0)
    forward_only = replace(pairs, seen=torch.stack([pairs.seen[0], torch.zeros_like(pairs.seen[1])]))
    frequencies = torch.randn(256, 2, generator=torch.Generator().manual_seed(0)) / 8
    places = torch.cat([first, cells.expand_as(first)])  # (2n, 2, h, w)
    phases = torch.einsum("fc,nchw->nfhw", frequencies, places)
    assert validation.pck(torch.cat([phases.cos(), phases.sin()], 1), forward_only, 16) == {".1": 100, ".05": 100}


def test_features_of_noise_have_the_pck_of_chance(pairs):
    noise = torch.randn(24, 32, 16, 16, generator=torch.Generator().manual_seed(0))
    found = validation.pck(noise, pairs, 16)
    # a disc's share of the frame: a little less, since some discs are cut off, or more on a coarse grid
    assert found[".1"] == pytest.approx(100 * math.pi * 0.1**2, abs=2)
    assert found[".05"] == pytest.approx(100 * math.pi * 0.05**2, abs=1)


def test_psnr_is_that_of_the_mask():
    truth = torch.zeros(2, 3, 8, 8)
    images = truth.clone()
    images[:, :, :4] = 0.2  # 0.1 on the scale of [0, 1]
    mask = torch.zeros(2, 1, 8, 8, dtype=torch.bool)
    mask[0, :, :4] = True
    assert validation.psnr(images, truth, mask) == pytest.approx(20, abs=1e-3)  # the second image does not count
    assert validation.psnr(images, truth, torch.ones_like(mask)) == pytest.approx(20 + 10 * math.log10(2), abs=1e-3)


def test_noise_is_added_as_diffusers_does():
    scheduler = models.build_scheduler()
    latents, noise = torch.randn(2, 3, 4, 8, 8).unbind()
    timesteps = torch.tensor([0, 500, 999])
    ours = recompose(latents, noise, scheduler.alphas_cumprod[timesteps])
    torch.testing.assert_close(ours, scheduler.add_noise(latents, noise, timesteps))


def test_correspondence_decides_only_among_networks_of_low_noise_error():
    def row(error, share):
        return {f"eps_mse_{t}": error for t in validation.NOISE_STEPS} | {"recast_up1_pck.1": share}

    history, kept = [], None
    for new, is_kept in (
        (row(1.00, 50), True),
        (row(0.50, 40), True),  # the one kept is far above the lowest error now
        (row(0.49, 30), False),
        (row(0.52, 45), True),  # within a tenth
        (row(0.60, 90), False),  # not within
    ):
        history.append(new)
        assert stages.UnetStage.better(new, kept, history) == is_kept
        kept = new if is_kept else kept


# --- the whole


def test_losses_fall_and_figures_improve(trained):
    vae, unet = evaluations(trained, "vae"), evaluations(trained, "unet")
    assert [row["step"] for row in vae] == [row["step"] for row in unet] == [0, 6, 12]
    assert vae[2]["loss"] < vae[1]["loss"]
    assert vae[2]["psnr"] > vae[0]["psnr"] + 0.5
    assert unet[2]["loss"] < unet[1]["loss"]
    for timestep in validation.NOISE_STEPS:
        assert unet[2][f"eps_mse_{timestep}"] < unet[0][f"eps_mse_{timestep}"]
    assert vae[2]["latent_std"] == pytest.approx(1, abs=0.1)
    latents = torch.cat([torch.load(file)["latents"] for file in (trained / "latents").iterdir()])
    assert latents.float().std((0, 2, 3)).tolist() == pytest.approx([1] * 4, abs=0.1)
    assert sorted(file.name for file in (trained / "sheets").iterdir()) == ["000000.png", "000006.png", "000012.png"]
    assert (trained / "unet.png").stat().st_size > 1000


def same(left, right):
    """Whether two states agree to the bit in all but the time taken."""
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left if key != "seconds")
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    return torch.equal(left, right) if isinstance(left, torch.Tensor) else left == right


def kill_during(folder, name):
    """Train in another process and kill it in the midst of a stage."""
    process = multiprocessing.get_context("fork").Process(target=main, args=(command(folder),))
    process.start()
    while (state := read_state(folder, name)) is None or state["step"] < 3:
        assert process.is_alive()
        time.sleep(0.03)
    process.kill()
    process.join()
    assert read_state(folder, name)["step"] < getattr(QUICK, name).steps


def test_a_killed_run_goes_on_as_if_nothing_had_happened(trained, tmp_path):
    kill_during(tmp_path, "vae")
    kill_during(tmp_path, "unet")
    (tmp_path / "latents" / "0001.pt").unlink()
    main(command(tmp_path))
    for name in ("vae", "latents/0000", "latents/0001", "unet"):
        assert same(read_state(trained, name), read_state(tmp_path, name)), name
    assert (trained / "sheets" / "000012.png").read_bytes() == (tmp_path / "sheets" / "000012.png").read_bytes()


def test_no_minutes_save_and_stop(tmp_path, capsys):
    main(command(tmp_path, "--minutes", "0", "--export", str(tmp_path / "export")))
    assert read_state(tmp_path, "vae")["step"] == 0
    assert not (tmp_path / "export").exists()
    said = capsys.readouterr().out
    assert "goes on from here" in said
    assert "Nothing to export" in said


def test_a_state_of_another_seed_is_refused(trained):
    with pytest.raises(ValueError, match="another recipe, seed"):
        main(command(trained, "--seed", "1", "--vae-steps", "14"))


def test_an_autoencoder_trained_on_is_not_exported_with_the_unet_of_before(trained, tmp_path):
    for name in ("vae.pt", "unet.pt"):
        shutil.copy(trained / name, tmp_path / name)
    longer = QUICK.vae.steps + 1
    with pytest.raises(ValueError, match="on another autoencoder"):
        main(command(tmp_path, "--vae-steps", str(longer)))
    assert read_state(tmp_path, "vae")["step"] == longer
    with pytest.raises(ValueError, match="trained on another autoencoder"):
        main(command(tmp_path, "--vae-steps", str(longer + 1), "--minutes", "0", "--export", str(tmp_path / "export")))


def test_the_export_is_a_plain_stable_diffusion_checkpoint(trained):
    folder = trained / "export"
    files = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}
    assert {"model_index.json", "card.json", "tokenizer/vocab.json", "tokenizer/merges.txt"} <= files
    assert all("_name_or_path" not in json.loads((folder / name).read_text()) for name in files if ".json" in name)
    pipe = StableDiffusionPipeline.from_pretrained(folder)  # without dtype= everything is float32
    assert {part.dtype for part in (pipe.unet, pipe.vae, pipe.text_encoder)} == {torch.float32}
    pipe.set_progress_bar_config(disable=True)
    image = pipe("a striped red and white fish", num_inference_steps=2, output_type="pt").images
    assert image.shape == (1, 3, 64, 64)
    kept = read_state(trained, "unet")["best"]["weights"]
    torch.testing.assert_close(pipe.unet.conv_in.weight, kept["unet.conv_in.weight"].float(), atol=0, rtol=0)
    words = kept["text_encoder.embeddings.token_embedding.weight"].float()
    torch.testing.assert_close(pipe.text_encoder.get_input_embeddings().weight.detach(), words, atol=0, rtol=0)
    stored = load_file(folder / "text_encoder" / "model.safetensors")
    assert all(name.startswith("text_model.") for name in stored)  # which older transformers know, too


def test_dreammover_runs_on_the_export_in_either_precision(trained, photos, fast):
    for dtype in (None, torch.float16):
        pipe = DreamMoverPipeline.from_pretrained(trained / "export", dtype=dtype)
        pipe.set_progress_bar_config(disable=True)
        frames = pipe(*photos, **fast).frames
        assert frames.shape == (1, 3, 3, 64, 64)
        assert frames.isfinite().all()
        assert pipe.unet.dtype == (dtype or torch.float32)


def test_both_spellings_of_the_exported_tokenizer_agree(trained, tokenizer):
    folder = trained / "export" / "tokenizer"
    caption = "a dotted blue and orange cat over a cloudy green background, hm?"
    merges = [tuple(line.split()) for line in (folder / "merges.txt").read_text().splitlines()[1:]]
    spelt = CLIPTokenizer(vocab=json.loads((folder / "vocab.json").read_text()), merges=merges)
    assert spelt(caption).input_ids == tokenizer(caption).input_ids
    loaded = CLIPTokenizer.from_pretrained(folder)
    assert loaded(caption).input_ids == tokenizer(caption).input_ids
    assert loaded.model_max_length == QUICK.sizes.tokens


def test_the_card_says_how_the_export_came_about(trained):
    card = json.loads((trained / "export" / "card.json").read_text())
    assert card["recipe"]["seed"] == 0
    assert card["recipe"]["world"]["size"] == 64
    assert card["stages"]["unet"]["steps"] == QUICK.unet.steps
    assert card["stages"]["unet"]["evaluations"] == evaluations(trained, "unet")
    assert card["stages"]["vae"]["kept"] in card["stages"]["vae"]["evaluations"]
    assert card["stages"]["vae"]["seconds"] > 0


@pytest.mark.parametrize("name", ["cpu", "gpu"])
def test_the_real_recipes_fit_the_package(name, tokenizer):
    recipe = recipes.PRESETS[name]
    parts = (
        models.build_vae(recipe.sizes, recipe.world.size),
        models.build_unet(recipe.sizes, recipe.world.size),
        models.build_text_encoder(recipe.sizes, tokenizer),
    )
    assert 2 * sum(parameter.numel() for part in parts for parameter in part.parameters()) < 20e6 - 0.1e6
    assert recipe.images % recipe.shard == recipe.shard % 256 == recipe.pool % 256 == 0
    assert recipe.world.size == 128
