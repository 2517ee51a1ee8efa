# SPDX-License-Identifier: Apache-2.0
"""The training of the embedded checkpoint by its command, on a recipe of seconds."""

import json
import multiprocessing
import shutil
import time
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file
from transformers import CLIPTokenizer

from dreammover_pipeline import DreamMoverPipeline
from dreammover_pipeline.cli.main import main
from dreammover_pipeline.tiny import models, recipes, validation
from dreammover_pipeline.tiny.latents import LatentShards
from dreammover_pipeline.tiny.trainer import read_state

QUICK = recipes.PRESETS["quick"]


def command(folder, *more):
    return ["train", "--preset", "quick", "--device", "cpu", "--out", str(folder), *more]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folder of a whole training, exported to its folder `export`."""
    folder = tmp_path_factory.mktemp("trained")
    assert main(command(folder, "--export", str(folder / "export"))) == 0
    return folder


def evaluations(folder, name):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


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
    assert main(command(tmp_path)) == 0
    for name in ("vae.pt", "latents/0000.pt", "latents/0001.pt", "unet.pt"):
        assert same(torch.load(trained / name), torch.load(tmp_path / name)), name
    assert (trained / "sheets" / "000012.png").read_bytes() == (tmp_path / "sheets" / "000012.png").read_bytes()


def test_every_state_is_read_once_to_go_on_and_once_to_export(trained, tmp_path, monkeypatch):
    for name in ("vae.pt", "unet.pt", "latents"):
        copy = shutil.copytree if name == "latents" else shutil.copy
        copy(trained / name, tmp_path / name)
    opened, load = [], torch.load

    def counted(file, *args, **kwargs):
        opened.append(Path(file.name).stem)
        return load(file, *args, **kwargs)

    def states_read():
        names = sorted(name for name in opened if name in ("vae", "unet"))  # the others are shards
        opened.clear()
        return names

    monkeypatch.setattr(torch, "load", counted)
    assert main(command(tmp_path)) == 0
    assert states_read() == ["unet", "vae"]
    longer = ["--unet-steps", str(QUICK.unet.steps + 1), "--export", str(tmp_path / "export")]
    assert main(command(tmp_path, *longer)) == 0
    assert states_read() == ["unet", "unet", "vae", "vae"]


def test_no_minutes_save_and_stop(tmp_path, capsys):
    assert main(command(tmp_path, "--minutes", "0", "--export", str(tmp_path / "export"))) == 0
    assert read_state(tmp_path, "vae")["step"] == 0
    assert not (tmp_path / "export").exists()
    printed = capsys.readouterr().out
    assert "goes on from here" in printed
    assert "Nothing to export" in printed


def test_a_state_of_another_seed_is_refused(trained, tmp_path, capsys):
    assert main(command(trained, "--seed", "1", "--vae-steps", "14")) == 2
    assert "another recipe, seed" in capsys.readouterr().err
    shutil.copy(trained / "unet.pt", tmp_path / "unet.pt")  # also where the autoencoder is yet to be trained
    assert main(command(tmp_path, "--seed", "1")) == 2
    assert "unet.pt was trained by another recipe, seed" in capsys.readouterr().err


def test_an_autoencoder_is_not_trained_on_once_a_unet_has_learnt_its_latents(trained, tmp_path, capsys):
    for name in ("vae.pt", "unet.pt"):
        shutil.copy(trained / name, tmp_path / name)
    assert main(command(tmp_path, "--vae-steps", str(QUICK.vae.steps + 2))) == 2
    assert "of 12 steps instead of 14; repeat the --vae-steps of before" in capsys.readouterr().err
    assert (tmp_path / "vae.pt").read_bytes() == (trained / "vae.pt").read_bytes()
    other = read_state(trained, "vae") | {"step": QUICK.vae.steps - 1}
    torch.save(other, tmp_path / "vae.pt")  # such as a copy of earlier, which can be gone on with
    assert main(command(tmp_path, "--minutes", "0", "--export", str(tmp_path / "export"))) == 2
    assert "trained on another autoencoder" in capsys.readouterr().err
    assert not (tmp_path / "export").exists()


@pytest.mark.parametrize("name", ["vae", "unet"])
@pytest.mark.parametrize("damage", ["cut", "flipped", "text", "of another program"])
def test_a_file_that_is_no_state_is_named_before_any_training(trained, tmp_path, capsys, name, damage):
    file = tmp_path / f"{name}.pt"
    whole = (trained / file.name).read_bytes()
    middle = len(whole) // 2
    flipped = bytes([whole[middle] ^ 1])
    torch.save({"weight": torch.zeros(3)}, file)
    content = {
        "cut": whole[:-10],
        "flipped": whole[:middle] + flipped + whole[middle + 1 :],
        "text": b"notes",
        "of another program": file.read_bytes(),
    }
    file.write_bytes(content[damage])
    assert main(command(tmp_path)) == 2
    assert f"'{file}' is damaged or not the state of a training; put a copy" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir() if path.suffix] == [file.name]
    assert file.read_bytes() == content[damage]


def test_a_damaged_shard_is_made_again(trained, tmp_path):
    recipe, whole = QUICK, trained / "latents" / "0000.pt"
    shards = LatentShards(recipe, tmp_path, None, recipe.vae.steps)
    content = whole.read_bytes()
    for damaged in (b"", b"notes", content[:-10], content[: len(content) // 2]):
        (tmp_path / whole.name).write_bytes(damaged)
        assert not shards._is_there(0)
    (tmp_path / whole.name).write_bytes(content)
    assert shards._is_there(0)


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
