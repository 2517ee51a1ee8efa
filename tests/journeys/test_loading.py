# SPDX-License-Identifier: Apache-2.0
"""Every way a diffusers user gets a pipeline, each in a fresh process of its own, each ending in frames.

The functions above the tests run in those processes (`in_fresh_process` starts this file as a program); with
`installed=False` the package cannot be imported there, as on the machine of somebody who has diffusers alone. torch is
there from the start, but with `preloaded=False`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import numpy as np
import pytest
from support import forked
from support.hub_stand_in import Repository, folder_repository, serve
from support.offline import Refuse, stay_on_loopback

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "dreammover_pipeline"
CODE_ID = "user/dreammover"  # on the Hub: the code alone
MODEL_ID = "user/tiny"  # and a checkpoint alone
BOTH_ID = "user/both"  # a checkpoint whose weights are there as they are, and once more as the variant "fp16"
HALF_ID = "user/half"  # a checkpoint with this variant alone
MODELS = ("unet", "vae", "text_encoder")
UNEXPECTED = "not expected"  # of what diffusers logs where an __init__ does not take what the checkpoint lists


# What the processes do.


def frames_of(pipe) -> np.ndarray:
    """What the whole method makes, LoRA included: (2, 64, 64, 3)."""
    return output_of(pipe, lora_steps=1).frames[0]


def output_of(pipe, lora_steps: int = 0):
    """A short call, with pictures of half the embedded checkpoint's own size, which take a third of the time."""
    import torch

    pipe.set_progress_bar_config(disable=True)
    short = {"num_inference_steps": 6, "inversion_steps": 3, "feature_step": 2}
    short |= {"n_frames": 2, "height": 64, "width": 64}
    images = [str(ROOT / "examples" / "fish" / name) for name in ("0.png", "1.png")]
    generator = torch.Generator().manual_seed(0)
    output = pipe(*images, prompt="a fish", **short, lora_steps=lora_steps, generator=generator, output_type="np")
    assert output.frames.shape == (1, 2, 64, 64, 3)
    assert np.isfinite(output.frames).all()
    return output


def check_frames(pipe, expected: str) -> None:
    import torch

    canvas = pipe.canvas(torch.zeros(3, 300, 300))
    assert (canvas.height, canvas.width) == (128, 128)  # the checkpoint's own size has come along
    np.testing.assert_allclose(frames_of(pipe), np.load(expected), atol=1e-4)


def halved(weights: bytes) -> bytes:
    """Weights of a safetensors file, for one in float16."""
    import safetensors.torch

    tensors = {name: tensor.half() for name, tensor in safetensors.torch.load(weights).items()}
    return safetensors.torch.save(tensors, {"format": "pt", "variant": "fp16"})


def dtypes_of(pipe) -> set:
    return {x.dtype for name in MODELS for x in getattr(pipe, name).state_dict().values() if x.is_floating_point()}


def weights_of(pipe) -> dict:
    return {
        f"{name}.{key.removeprefix('text_model.')}": value.clone()
        for name in MODELS
        for key, value in getattr(pipe, name).state_dict().items()
    }


def check_same_tensors(first: dict, second: dict) -> None:
    import torch

    assert first.keys() == second.keys()
    assert [key for key in first if not torch.equal(first[key], second[key])] == []


def check_optional_parts(load, guarded: str, files_missing: str, keys_missing: str) -> None:
    """The safety checker and its feature extractor: loaded, passed, declined, not there; `load(folder, **parts)`."""
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPImageProcessor

    pipe = load(guarded)
    assert isinstance(pipe.safety_checker, StableDiffusionSafetyChecker)
    assert isinstance(pipe.feature_extractor, CLIPImageProcessor)
    assert pipe.config.requires_safety_checker is True
    output = output_of(pipe)
    assert output.nsfw_content_detected == [[True, True]]  # this one flags whatever it sees
    assert not output.frames.any()

    lenient = StableDiffusionSafetyChecker.from_pretrained(guarded, subfolder="safety_checker")
    lenient.concept_embeds_weights.data.fill_(2)  # no similarity reaches 2
    lenient.special_care_embeds_weights.data.fill_(2)
    extractor = CLIPImageProcessor.from_pretrained(guarded, subfolder="feature_extractor")
    for folder in (guarded, files_missing, keys_missing):
        pipe = load(folder, safety_checker=lenient, feature_extractor=extractor)
        assert pipe.safety_checker is lenient
        assert pipe.feature_extractor is extractor
    output = output_of(pipe)
    assert output.nsfw_content_detected == [[False, False]]
    assert output.frames.any()

    pipe = load(guarded, safety_checker=None)
    assert pipe.safety_checker is None
    assert isinstance(pipe.feature_extractor, CLIPImageProcessor)
    for folder in (guarded, files_missing):
        pipe = load(folder, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
        assert pipe.safety_checker is None
        assert pipe.feature_extractor is None
        assert pipe.config.requires_safety_checker is False
    assert output_of(pipe).nsfw_content_detected is None

    pipe = load(keys_missing)
    assert pipe.safety_checker is None
    assert pipe.feature_extractor is None
    assert output_of(pipe).nsfw_content_detected is None


def check_scheduler_honoured(load, checkpoint: str) -> None:
    """The noise schedule of a scheduler that is passed is the pipeline's, and the scheduler is left alone."""
    from diffusers import EulerDiscreteScheduler

    euler = EulerDiscreteScheduler(beta_start=0.001, beta_end=0.01, beta_schedule="linear")
    before = dict(euler.config)
    pipe = load(checkpoint, scheduler=euler)
    assert (pipe.scheduler.config.beta_start, pipe.scheduler.config.beta_end) == (0.001, 0.01)
    assert pipe.scheduler.config.beta_schedule == "linear"
    assert dict(euler.config) == before
    output_of(pipe)


def by_installed_class(checkpoint: str, guarded: str, files_missing: str, keys_missing: str, expected: str) -> None:
    import torch

    from dreammover_pipeline import DreamMoverPipeline

    pipe = DreamMoverPipeline.from_pretrained(checkpoint)
    assert dtypes_of(pipe) == {torch.float32}
    assert pipe.dtype == torch.float32
    assert pipe.safety_checker is None
    check_frames(pipe, expected)

    half = DreamMoverPipeline.from_pretrained(checkpoint, dtype=torch.float16)
    assert dtypes_of(half) == {torch.float16}
    assert half.dtype == torch.float16
    half = DreamMoverPipeline.from_pretrained(checkpoint, dtype=torch.bfloat16)  # many processors are slow in float16
    frames = frames_of(half)
    assert dtypes_of(half) == {torch.bfloat16}
    # The flow's refinement decides cell by cell, and on rounded features a few cells decide otherwise.
    assert np.abs(frames - np.load(expected)).mean() < 0.03  # as in the test of half precision

    pipe = DreamMoverPipeline.from_pretrained(MODEL_ID, safety_checker=None)
    assert pipe.safety_checker is None
    check_frames(pipe, expected)

    check_optional_parts(DreamMoverPipeline.from_pretrained, guarded, files_missing, keys_missing)
    check_scheduler_honoured(DreamMoverPipeline.from_pretrained, checkpoint)


def by_commands() -> None:
    """As commands load models from the Hub; what was downloaded before serves again, in whatever precision."""
    import torch

    from dreammover_pipeline.cli.loading import load_pipeline

    halves = ((BOTH_ID, "float16"), (BOTH_ID, "float16"), (HALF_ID, "float32"))
    wholes = ((MODEL_ID, "float32"), (MODEL_ID, "float16"), (BOTH_ID, "float32"))
    for model, dtype in halves + wholes:
        assert dtypes_of(load_pipeline(model, dtype, "cpu")) == {getattr(torch, dtype)}


def by_wheel(folder: str, expected: str) -> None:
    sys.path.insert(0, folder)
    import dreammover_pipeline
    from dreammover_pipeline import DreamMoverPipeline
    from dreammover_pipeline.tiny import CHECKPOINT

    assert Path(dreammover_pipeline.__file__).is_relative_to(folder)
    assert CHECKPOINT.is_relative_to(folder)
    check_frames(DreamMoverPipeline.from_pretrained(CHECKPOINT), expected)

    from dreammover_pipeline.export.hub import write_hub_folder

    assert {"README.md", "LICENSE", "pipeline.py"} <= set(write_hub_folder(Path(folder, "hub"), None))


def custom_loader(code: str):
    """Load as `DiffusionPipeline` does with code from a folder or a Hub repository."""
    from diffusers import DiffusionPipeline

    def load(model: str, **kwargs):
        pipe = DiffusionPipeline.from_pretrained(model, custom_pipeline=code, trust_remote_code=True, **kwargs)
        assert type(pipe).__name__ == "DreamMoverPipeline"
        assert type(pipe).__module__.startswith("diffusers_modules.local")
        return pipe

    return load


def by_folder(code: str, saved: str, checkpoint: str, expected: str) -> None:
    import torch

    load = custom_loader(code)
    pipe = load(checkpoint)
    assert dtypes_of(pipe) == {torch.float32}
    assert pipe.safety_checker is None
    check_frames(pipe, expected)

    pipe.save_pretrained(saved)
    again = load(saved)
    assert type(again) is type(pipe)  # so that both take turns at what they share
    check_same_tensors(weights_of(again), weights_of(load(checkpoint)))
    check_frames(again, expected)
    assert load(checkpoint, safety_checker=None).safety_checker is None
    assert dtypes_of(load(checkpoint, dtype=torch.float16)) == {torch.float16}

    from diffusers import DiffusionPipeline, StableDiffusionPipeline

    donor = StableDiffusionPipeline.from_pretrained(checkpoint)
    pipe = DiffusionPipeline.from_pipe(donor, custom_pipeline=code, trust_remote_code=True)
    assert pipe.unet is donor.unet
    check_frames(pipe, expected)


def by_source_folder(
    code: str, checkpoint: str, guarded: str, files_missing: str, keys_missing: str, expected: str
) -> None:
    load = custom_loader(code)
    check_frames(load(checkpoint), expected)
    check_optional_parts(load, guarded, files_missing, keys_missing)
    check_scheduler_honoured(load, checkpoint)


def by_hub(commit: str, checkpoint: str, expected: str) -> None:
    for model in (checkpoint, MODEL_ID):
        pipe = custom_loader(CODE_ID)(model, safety_checker=None)
        repository = f"diffusers_modules.local.{CODE_ID.replace('/', '--')}.{commit}"
        assert type(pipe).__module__ == f"{repository}.dreammover_code"
        assert pipe.safety_checker is None
        check_frames(pipe, expected)


def by_pipe(checkpoint: str, guarded: str, expected: str) -> None:
    import torch
    from diffusers import PNDMScheduler, StableDiffusionPipeline

    from dreammover_pipeline import DreamMoverPipeline

    def picture(pipe):
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        return pipe("a fish", num_inference_steps=3, generator=generator, output_type="np").images

    pndm = PNDMScheduler.from_pretrained(checkpoint, subfolder="scheduler", skip_prk_steps=True)
    donor = StableDiffusionPipeline.from_pretrained(checkpoint, scheduler=pndm)
    before = picture(donor)
    weights, config = weights_of(donor), dict(pndm.config)
    processors, timesteps = dict(donor.unet.attn_processors), pndm.timesteps.clone()
    flags = [(parameter, parameter.requires_grad) for parameter in donor.unet.parameters()]

    pipe = DreamMoverPipeline.from_pipe(donor)
    for name in (*MODELS, "tokenizer"):
        assert getattr(pipe, name) is getattr(donor, name), name
    assert pipe.safety_checker is None
    check_frames(pipe, expected)

    assert donor.scheduler is pndm
    assert pipe.scheduler is not pndm
    assert dict(pndm.config) == config
    assert torch.equal(pndm.timesteps, timesteps)
    check_same_tensors(weights_of(donor), weights)
    assert donor.unet.attn_processors == processors
    assert [parameter for parameter, flag in flags if parameter.requires_grad != flag] == []
    assert not donor.unet.training
    assert not getattr(donor.unet, "peft_config", {})
    assert np.array_equal(picture(donor), before)
    # and the way back
    again = StableDiffusionPipeline.from_pipe(pipe)
    assert again.unet is donor.unet
    assert np.isfinite(picture(again)).all()

    donor = StableDiffusionPipeline.from_pretrained(guarded, dtype=torch.float16)
    pipe = DreamMoverPipeline.from_pipe(donor, dtype=donor.dtype)
    assert pipe.safety_checker is donor.safety_checker is not None
    assert pipe.feature_extractor is donor.feature_extractor is not None
    assert dtypes_of(pipe) == {torch.float16}
    pipe = DreamMoverPipeline.from_pipe(donor, dtype=donor.dtype, safety_checker=None)
    assert pipe.safety_checker is None
    assert donor.safety_checker is not None


def by_single_file(file: str, checkpoint: str, guarded: str, expected: str) -> None:
    import torch
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker

    from dreammover_pipeline import DreamMoverPipeline

    whole = weights_of(DreamMoverPipeline.from_pretrained(checkpoint))
    pipe = DreamMoverPipeline.from_single_file(file, config=checkpoint)
    assert dtypes_of(pipe) == {torch.float32}
    assert pipe.safety_checker is None
    assert pipe.feature_extractor is None
    check_same_tensors(weights_of(pipe), whole)
    check_frames(pipe, expected)
    half = DreamMoverPipeline.from_single_file(file, config=checkpoint, dtype=torch.float16)
    assert dtypes_of(half) == {torch.float16}

    # as Stable Diffusion 1.5's configuration does, this one lists a checker, which no single file holds
    pipe = DreamMoverPipeline.from_single_file(file, config=guarded)
    assert pipe.safety_checker is None
    checker = StableDiffusionSafetyChecker.from_pretrained(guarded, subfolder="safety_checker")
    pipe = DreamMoverPipeline.from_single_file(file, config=guarded, safety_checker=checker)
    assert pipe.safety_checker is checker
    assert output_of(pipe).nsfw_content_detected == [[True, True]]


def saving(folder: str, folder_with_parts: str, checkpoint: str, guarded: str, expected: str) -> None:
    from diffusers import StableDiffusionPipeline
    from safetensors.torch import load_file

    from dreammover_pipeline import DreamMoverPipeline

    pipe = DreamMoverPipeline.from_pretrained(checkpoint)
    weights = weights_of(pipe)
    check_frames(pipe, expected)
    pipe.save_pretrained(folder)
    saved = {  # transformers writes the prefix it read, and its models in memory have none
        f"{name}.{key.removeprefix('text_model.')}": value
        for name in MODELS
        for file in Path(folder, name).glob("*.safetensors")
        for key, value in load_file(file).items()
    }
    check_same_tensors(saved, weights)
    index = json.loads(Path(folder, "model_index.json").read_text())
    assert index["_class_name"] == "DreamMoverPipeline"
    assert index["scheduler"] == ["diffusers", "DDIMScheduler"]
    assert index["requires_safety_checker"] is False

    again = DreamMoverPipeline.from_pretrained(folder)
    check_same_tensors(weights_of(again), weights)
    assert again.safety_checker is None
    check_frames(again, expected)
    plain = StableDiffusionPipeline.from_pretrained(folder)
    check_same_tensors(weights_of(plain), weights)
    plain.set_progress_bar_config(disable=True)
    assert np.isfinite(plain("a fish", num_inference_steps=2, output_type="np").images).all()

    DreamMoverPipeline.from_pretrained(guarded).save_pretrained(folder_with_parts)
    again = DreamMoverPipeline.from_pretrained(folder_with_parts)
    assert again.config.requires_safety_checker is True
    assert output_of(again).nsfw_content_detected == [[True, True]]
    assert StableDiffusionPipeline.from_pretrained(folder_with_parts).safety_checker is not None


# How the processes are started.


def in_fresh_process(
    function, *args, home: Path, installed: bool = True, hub: str | None = None, preloaded: bool = True
) -> str:
    """Run one of the functions above, with caches of its own below `home` and no network; return what it logs."""
    private = re.compile("(HF_|HUGGING|TRANSFORMERS_|DIFFUSERS_|PYTHON)|.*_proxy$", re.IGNORECASE)
    environment = {name: value for name, value in os.environ.items() if not private.match(name)}
    environment |= {"HF_HOME": str(home / "hf"), "HF_MODULES_CACHE": str(home / "modules"), "DO_NOT_TRACK": "1"}
    environment["PYTHONPATH"] = str(ROOT / "tests")  # for this file's own imports
    environment["OMP_NUM_THREADS"] = "1"  # these models are too small to share; threads would wait for each other
    environment |= {"HF_ENDPOINT": hub, "HF_HUB_DISABLE_XET": "1"} if hub else {"HF_HUB_OFFLINE": "1"}
    arguments = [function.__name__, str(int(installed)), *map(str, args)]
    if preloaded:
        process = forked.program(__file__, arguments, environment, ROOT, home / "log")
        _, log = process.communicate(timeout=300)
    else:
        command = [sys.executable, __file__, *arguments]
        process = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300)
        log = process.stderr
    assert process.returncode == 0, log[-4000:]
    return log


def main(name: str, installed: str, *args: str) -> None:
    sys.addaudithook(stay_on_loopback)
    if not int(installed):
        sys.meta_path.insert(0, Refuse)
        with pytest.raises(ModuleNotFoundError):
            import dreammover_pipeline  # noqa: F401
    globals()[name](*args)
    assert int(installed) or "dreammover_pipeline" not in sys.modules


# What they are given.


@pytest.fixture(scope="session")
def checkpoint() -> Path:
    from dreammover_pipeline.tiny import CHECKPOINT

    return CHECKPOINT


@pytest.fixture(scope="session")
def expected(checkpoint, tmp_path_factory) -> Path:
    """The frames every route must come to."""
    import torch

    from dreammover_pipeline import DreamMoverPipeline

    file = tmp_path_factory.mktemp("expected") / "frames.npy"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the processes
    np.save(file, frames_of(DreamMoverPipeline.from_pretrained(checkpoint)))
    torch.set_num_threads(threads)
    return file


@pytest.fixture(scope="session")
def hub_folder(tmp_path_factory) -> Path:
    """The repository that `dreammover export-hub` writes."""
    from dreammover_pipeline.export.hub import write_hub_folder

    folder = tmp_path_factory.mktemp("code") / "hub"
    write_hub_folder(folder, CODE_ID)
    return folder


@pytest.fixture(scope="session")
def with_parts(checkpoint, tmp_path_factory) -> tuple[Path, Path, Path]:
    """Checkpoints with a safety checker that flags everything, with it listed but absent, and with no word of it."""
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPConfig, CLIPImageProcessor

    tower = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    vision = {**tower, "image_size": 16, "patch_size": 8, "projection_dim": 4}
    checker = StableDiffusionSafetyChecker(CLIPConfig(vision_config=vision, text_config=tower, projection_dim=4))
    checker.concept_embeds_weights.data.fill_(-2)  # every similarity exceeds -2
    folders = [tmp_path_factory.mktemp("parts") / name for name in ("guarded", "files_missing", "keys_missing")]
    for folder in folders:
        shutil.copytree(checkpoint, folder)
    guarded, files_missing, keys_missing = folders
    checker.save_pretrained(guarded / "safety_checker")
    CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16).save_pretrained(guarded / "feature_extractor")

    index = json.loads((checkpoint / "model_index.json").read_text())
    for name in ("safety_checker", "feature_extractor", "image_encoder", "requires_safety_checker"):
        del index[name]
    (keys_missing / "model_index.json").write_text(json.dumps(index))
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    index["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
    index["requires_safety_checker"] = True
    for folder in (guarded, files_missing):
        (folder / "model_index.json").write_text(json.dumps(index))
    return guarded, files_missing, keys_missing


# A checkpoint in the format of the first Stable Diffusion releases ("LDM"). diffusers reads that format and does not
# write it; these tables are the inverse of its reader for the layouts of Stable Diffusion 1.x. First match wins.

RESNET_NAMES = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
OUTER_NAMES = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
VAE_NAMES = (
    (r"(encoder|decoder)\.conv_norm_out\.", r"\1.norm_out."),
    (r"mid_block\.resnets\.0\.", "mid.block_1."),
    (r"mid_block\.resnets\.1\.", "mid.block_2."),
    (r"down_blocks\.(\d+)\.resnets\.(\d+)\.", r"down.\1.block.\2."),
    (r"down_blocks\.(\d+)\.downsamplers\.0\.", r"down.\1.downsample."),
    (r"up_blocks\.(\d+)\.resnets\.(\d+)\.", r"up.\1.block.\2."),
    (r"up_blocks\.(\d+)\.upsamplers\.0\.", r"up.\1.upsample."),
)


def ldm_unet_key(key: str, layers_per_block: int, attentive_up_blocks: set[int]) -> str:
    """LDM numbers the UNet's layers through, a downsampler being a layer of its own and an upsampler part of one."""
    for old, new in OUTER_NAMES.items():
        if key.startswith(f"{old}."):
            return key.replace(old, new, 1)
    where, block, kind, layer, rest = re.fullmatch(
        r"(down|mid|up)_block(?:s\.(\d+))?\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)", key
    ).groups()
    layer, first = int(layer), int(block or 0) * (layers_per_block + 1)
    if kind == "resnets":
        name, _, parameter = rest.rpartition(".")
        rest = f"{RESNET_NAMES[name]}.{parameter}"
    part = 1 if kind == "attentions" else 0
    if where == "mid":
        return f"middle_block.{2 * layer + part}.{rest}"
    if kind == "downsamplers":
        return f"input_blocks.{1 + first + layers_per_block}.0.{rest.replace('conv', 'op')}"
    if kind == "upsamplers":
        return f"output_blocks.{first + layers_per_block}.{2 if int(block) in attentive_up_blocks else 1}.{rest}"
    return (
        f"{'input_blocks' if where == 'down' else 'output_blocks'}.{first + layer + (where == 'down')}.{part}.{rest}"
    )


def ldm_vae_key(key: str, up_blocks: int) -> str:
    for pattern, replacement in VAE_NAMES:
        key = re.sub(pattern, replacement, key)
    key = re.sub(r"decoder\.up\.(\d+)\.", lambda match: f"decoder.up.{up_blocks - 1 - int(match[1])}.", key)
    return key.replace("conv_shortcut", "nin_shortcut")


@pytest.fixture(scope="session")
def single_file(checkpoint, tmp_path_factory) -> Path:
    """The embedded checkpoint's weights in one LDM file, in the precision they have."""
    from safetensors.torch import load_file, save_file

    def weights(name: str) -> dict:
        (file,) = (checkpoint / name).glob("*.safetensors")
        return load_file(file)

    unet = json.loads((checkpoint / "unet" / "config.json").read_text())
    vae = json.loads((checkpoint / "vae" / "config.json").read_text())
    attentive = {block for block, kind in enumerate(unet["up_block_types"]) if kind.startswith("CrossAttn")}
    tensors = {
        **{
            f"model.diffusion_model.{ldm_unet_key(key, unet['layers_per_block'], attentive)}": value
            for key, value in weights("unet").items()
        },
        **{
            f"first_stage_model.{ldm_vae_key(key, len(vae['up_block_types']))}": value
            for key, value in weights("vae").items()
        },
        **{
            f"cond_stage_model.transformer.text_model.{key.removeprefix('text_model.')}": value
            for key, value in weights("text_encoder").items()
        },
    }
    file = tmp_path_factory.mktemp("single") / "checkpoint.safetensors"
    save_file(tensors, file)
    return file


# The routes.


def test_the_installed_class(checkpoint, with_parts, expected, tmp_path):
    arguments = (by_installed_class, checkpoint, *with_parts, expected)
    with serve(folder_repository(MODEL_ID, with_parts[0])) as hub:
        log = in_fresh_process(*arguments, home=tmp_path, hub=hub.endpoint)
    assert UNEXPECTED not in log
    assert f"{MODEL_ID}/unet/diffusion_pytorch_model.safetensors" in hub.downloads
    assert not [file for file in hub.downloads if "/safety_checker/" in file]  # declined


def test_commands_download_half_as_much_in_float16(checkpoint, tmp_path):
    plain = folder_repository(MODEL_ID, checkpoint)
    weights = {path: content for path, content in plain.files.items() if path.endswith(".safetensors")}
    half = {path.replace(".safetensors", ".fp16.safetensors"): halved(content) for path, content in weights.items()}
    rest = {path: content for path, content in plain.files.items() if path not in weights}
    with serve(plain, Repository(BOTH_ID, plain.files | half), Repository(HALF_ID, rest | half)) as hub:
        in_fresh_process(by_commands, home=tmp_path, hub=hub.endpoint)
    downloads = [file for file in hub.downloads if file.endswith(".safetensors")]
    assert len(downloads) == 4 * len(weights)  # each only once
    stages = [set(downloads[start : start + len(weights)]) for start in range(0, len(downloads), len(weights))]
    expected = ((BOTH_ID, half), (HALF_ID, half), (MODEL_ID, weights), (BOTH_ID, weights))
    assert stages == [{f"{model}/{path}" for path in files} for model, files in expected]


def test_a_folder_of_code_needs_no_installation(hub_folder, checkpoint, expected, tmp_path):
    arguments = (by_folder, hub_folder, tmp_path / "saved", checkpoint, expected)
    log = in_fresh_process(*arguments, home=tmp_path, installed=False)
    assert UNEXPECTED not in log


def test_the_source_folder_honours_the_parts_passed_to_it(checkpoint, with_parts, expected, tmp_path):
    code = "src/dreammover_pipeline/"  # relative and with a slash, as from a clone
    arguments = (by_source_folder, code, checkpoint, *with_parts, expected)
    log = in_fresh_process(*arguments, home=tmp_path, installed=False)
    assert UNEXPECTED not in log


def test_a_code_only_hub_repository(hub_folder, checkpoint, with_parts, expected, tmp_path):
    code = folder_repository(CODE_ID, hub_folder)
    arguments = (by_hub, code.commit, checkpoint, expected)
    with serve(code, folder_repository(MODEL_ID, with_parts[0])) as hub:
        log = in_fresh_process(*arguments, home=tmp_path, installed=False, hub=hub.endpoint)
    assert UNEXPECTED not in log
    downloads = [file for file in hub.downloads if file.startswith(CODE_ID)]
    assert downloads == [f"{CODE_ID}/pipeline.py", f"{CODE_ID}/dreammover_code.py"]  # each only once


def test_a_stable_diffusion_pipeline_lends_its_parts_and_keeps_its_own(checkpoint, with_parts, expected, tmp_path):
    in_fresh_process(by_pipe, checkpoint, with_parts[0], expected, home=tmp_path)


def test_a_single_file(single_file, checkpoint, with_parts, expected, tmp_path):
    in_fresh_process(by_single_file, single_file, checkpoint, with_parts[0], expected, home=tmp_path)


def test_what_is_saved_comes_back(checkpoint, with_parts, expected, tmp_path):
    saved, saved_with_parts = tmp_path / "saved", tmp_path / "saved_with_parts"
    in_fresh_process(saving, saved, saved_with_parts, checkpoint, with_parts[0], expected, home=tmp_path)


def test_the_wheel_holds_what_it_must_and_no_more(checkpoint, expected, tmp_path):
    build = [sys.executable, "-m", "pip", "wheel", str(ROOT), "--no-deps", "--quiet", "-w", str(tmp_path)]
    process = subprocess.run(build, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr[-4000:]
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "unpacked")
    unpacked = tmp_path / "unpacked"
    packed = {file.relative_to(unpacked).as_posix() for file in unpacked.rglob("*") if file.is_file()}
    ours = {name for name in packed if ".dist-info/" not in name}
    source = [file for file in PACKAGE.rglob("*") if file.is_file() and "__pycache__" not in file.parts]
    wheel_targets = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    shared = wheel_targets["force-include"]  # file of the project's → its place in the wheel
    assert ours == {file.relative_to(PACKAGE.parent).as_posix() for file in source} | set(shared.values())
    for file in checkpoint.rglob("*"):
        if file.is_file():
            packed_file = unpacked / "dreammover_pipeline" / "tiny" / "checkpoint" / file.relative_to(checkpoint)
            assert packed_file.read_bytes() == file.read_bytes(), file
    (license_file,) = unpacked.glob("*.dist-info/licenses/LICENSE")
    assert license_file.read_bytes() == (ROOT / "LICENSE").read_bytes()
    (entry_points,) = unpacked.glob("*.dist-info/entry_points.txt")
    assert "dreammover = dreammover_pipeline.cli.main:main" in entry_points.read_text()
    in_fresh_process(by_wheel, unpacked, expected, home=tmp_path, preloaded=False)


if __name__ == "__main__":
    main(*sys.argv[1:])
