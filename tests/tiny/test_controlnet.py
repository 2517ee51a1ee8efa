# SPDX-License-Identifier: Apache-2.0
"""The training of a ControlNet by its command, beside a checkpoint of seconds."""

import json
import math

import pytest
import torch
from diffusers import ControlNetModel

from dreammover_pipeline.cli.main import main
from dreammover_pipeline.tiny import models, recipes
from dreammover_pipeline.tiny.controlnet import CONTROL_PRESETS, ControlStage, train_controlnet
from dreammover_pipeline.tiny.trainer import Trainer, read_state

STEPS = CONTROL_PRESETS["quick"].plan.steps


def checkpoint_of(folder, tokenizer, seed):
    """An untrained checkpoint of the recipe "quick"."""
    sizes, pixels = recipes.PRESETS["quick"].sizes, recipes.PRESETS["quick"].world.size

    def build():
        return {
            "vae": models.build_vae(sizes, pixels),
            "unet": models.build_unet(sizes, pixels),
            "text_encoder": models.build_text_encoder(sizes, tokenizer),
        }

    models.save_checkpoint(folder, **models.initialised(build, seed), tokenizer=tokenizer)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tokenizer):
    return checkpoint_of(tmp_path_factory.mktemp("checkpoint"), tokenizer, seed=0)


def command(checkpoint, folder, *more):
    where = ["--model", str(checkpoint), "--device", "cpu", "--out", str(folder)]
    return ["train-controlnet", "--preset", "quick", *where, *more]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, checkpoint):
    """Folder of a whole training, exported to its folder `export`."""
    folder = tmp_path_factory.mktemp("trained")
    assert main(command(checkpoint, folder, "--export", str(folder / "export"))) == 0
    return folder


@pytest.fixture(scope="module")
def stage(checkpoint, tmp_path_factory):
    return ControlStage(CONTROL_PRESETS["quick"], checkpoint, tmp_path_factory.mktemp("sheets"), torch.device("cpu"))


def test_an_untrained_controlnet_changes_nothing_and_training_does(trained):
    rows = [json.loads(line) for line in (trained / "controlnet.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 2, STEPS]
    alone = {name.removeprefix("plain_"): value for name, value in rows[0].items() if name.startswith("plain_")}
    assert alone.keys() == {"eps_mse_100", "eps_mse_300", "eps_mse_600", "middle_psnr"}
    for name, value in alone.items():
        assert rows[0][name] == pytest.approx(value, rel=1e-6)
        assert rows[2][name] != value
    assert len(list((trained / "sheets").iterdir())) == 3
    assert (trained / "controlnet.png").stat().st_size > 1000


def test_the_checkpoint_itself_is_not_trained(stage):
    model = stage.build()
    stage.loss(model, 0).backward()
    assert all(weight.grad is not None for weight in model.parameters())
    for part in (stage.unet, stage.vae, stage.text_encoder):
        assert all(weight.grad is None for weight in part.parameters())


def test_a_training_in_pieces_ends_as_one_without_a_break(trained, stage, tmp_path):
    for _ in range(3):
        trainer = Trainer(stage, stage.identity(), tmp_path, stage.device, read_state(tmp_path, "controlnet"))
        if not trainer.history:
            trainer.evaluate()
        trainer.advance()
        trainer.save()
    assert train_controlnet(stage, tmp_path, math.inf)
    whole, pieces = (read_state(folder, "controlnet") for folder in (trained, tmp_path))
    assert whole["identity"] == pieces["identity"]
    for key in ("weights", "average"):
        for name, weight in whole[key].items():
            assert torch.equal(weight, pieces[key][name]), name


def test_no_minutes_save_and_stop(checkpoint, tmp_path, capsys):
    assert main(command(checkpoint, tmp_path, "--minutes", "0", "--export", str(tmp_path / "export"))) == 0
    printed = capsys.readouterr().out
    assert "goes on from here" in printed
    assert "Nothing to export" in printed
    assert not (tmp_path / "export").exists()


def test_a_state_of_another_checkpoint_is_refused(trained, tokenizer, tmp_path, capsys):
    other = checkpoint_of(tmp_path, tokenizer, seed=1)
    assert main(command(other, trained)) == 2
    assert "another recipe, seed" in capsys.readouterr().err


def test_diffusers_loads_the_export_beside_the_unet(trained):
    controlnet = ControlNetModel.from_pretrained(trained / "export")
    assert controlnet.dtype == torch.float32
    assert "_name_or_path" not in json.loads((trained / "export" / "config.json").read_text())
    kept = read_state(trained, "controlnet")["best"]["weights"]
    for name, weight in controlnet.named_parameters():
        assert torch.equal(weight.half(), kept[f"controlnet.{name}"]), name
    embeds = torch.zeros(1, 24, controlnet.config.cross_attention_dim)
    down, middle = controlnet(torch.zeros(1, 4, 16, 16), 10, embeds, torch.rand(1, 3, 64, 64), return_dict=False)
    assert middle.shape[-1] == 2
    assert all(part.isfinite().all() for part in (*down, middle))
