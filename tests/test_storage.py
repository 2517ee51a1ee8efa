# SPDX-License-Identifier: Apache-2.0
"""Prepared pairs in files, and fingerprints of the models they belong to."""

import copy
import hashlib
import json
import logging
import multiprocessing
import os
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from diffusers import DDIMScheduler, EulerDiscreteScheduler
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dreammover_pipeline import DreamMoverPipeline
from dreammover_pipeline.lora import check_pair_lora
from dreammover_pipeline.records import PosePair, PreparedPair
from dreammover_pipeline.storage import (
    PIECE,
    digest_of,
    digest_of_tensors,
    fingerprint,
    read_pair,
    read_tensors,
    write_pair,
    write_tensors,
    write_whole,
)
from dreammover_pipeline.tiny import CHECKPOINT

CPU = torch.device("cpu")
LORA = {"lora_steps": 2, "lora_rank": 2}
LORA_WEIGHT = "lora.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight"


@pytest.fixture
def preparing(fast):
    """Arguments of `prepare` that keep it short."""
    return {name: value for name, value in fast.items() if name not in ("n_frames", "detail", "output_type")}


@pytest.fixture(scope="module")
def prepared(new_pipe, photos, tmp_path_factory):
    """A pair with a LoRA, and the bytes of its file; prepared once, by models equal to those of `pipe`."""
    pipe = new_pipe()
    steps = {"num_inference_steps": 5, "inversion_steps": 3, "feature_step": 2}
    pair = pipe.prepare(*photos, prompt="a fish", **steps, **LORA, generator=torch.Generator().manual_seed(0))
    path = tmp_path_factory.mktemp("prepared") / "pair.safetensors"
    pipe.save_pair(pair, path)
    return pair, path.read_bytes()


@pytest.fixture
def pair(prepared):
    return prepared[0]


@pytest.fixture
def file(prepared, tmp_path):
    path = tmp_path / "pair.safetensors"
    path.write_bytes(prepared[1])
    return path


def frames(pipe, pair, **arguments):
    return pipe.render(pair, **{"n_frames": 2, "output_type": "pt", **arguments}).frames


def tensors_of(pair):
    return {
        "first": pair.images[0],
        "last": pair.images[1],
        "path": pair.inversion.path,
        "eps": pair.inversion.eps,
        "forward": pair.flow.forward,
        "backward": pair.flow.backward,
        "prompt_embeds": pair.prompt_embeds,
        **(pair.lora or {}),
    }


def assert_same_pair(found, expected):
    assert isinstance(found, PreparedPair)
    for name, tensor in tensors_of(expected).items():
        other = tensors_of(found)[name]
        assert (other.dtype, other.device) == (tensor.dtype, tensor.device), name
        assert torch.equal(other, tensor), name
    assert tensors_of(found).keys() == tensors_of(expected).keys()
    assert (found.lora is None) == (expected.lora is None)
    assert found.canvas == expected.canvas
    assert found.inversion.schedule == expected.inversion.schedule
    assert found.lora_scale == expected.lora_scale


# ── There and back ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {**LORA, "lora_scale": 0.7},
        {"prompt": ["a fish", "another fish"], "height": 48, "width": 88},  # a canvas with padding
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loaded_pair_renders_bit_equal_frames(pipe, photos, preparing, tmp_path, arguments, dtype):
    pipe.to(dtype)
    pair = pipe.prepare(*photos, **{**preparing, **arguments})
    pipe.save_pair(pair, tmp_path / "pair.safetensors")
    loaded = pipe.load_pair(tmp_path / "pair.safetensors")
    assert_same_pair(loaded, pair)
    for rendering in ({"include_inputs": True}, {"guidance_scale": 2.0, "negative_prompt": "blur"}):
        assert torch.equal(frames(pipe, loaded, **rendering), frames(pipe, pair, **rendering))


def test_another_load_of_the_checkpoint_renders_the_same(components, pipe, pair, file):
    other = DreamMoverPipeline(**copy.deepcopy(components), requires_safety_checker=False)
    assert torch.equal(frames(other, other.load_pair(file)), frames(pipe, pair))


def test_a_pair_prepared_in_float16_renders_in_float32(tiny_pipe, photos, preparing, tmp_path):
    """The embedded checkpoint is stored in float16, so both hold the same weights."""
    half = DreamMoverPipeline.from_pretrained(CHECKPOINT, dtype=torch.float16)
    pair = half.prepare(*photos, **preparing, height=32, width=32)  # many processors are slow in float16
    half.save_pair(pair, tmp_path / "pair.safetensors")
    loaded = tiny_pipe.load_pair(tmp_path / "pair.safetensors")
    assert loaded.prompt_embeds.dtype == torch.float32
    assert torch.equal(loaded.prompt_embeds, pair.prompt_embeds.float())
    assert (frames(tiny_pipe, loaded) - frames(half, pair)).abs().mean() < 0.01


def test_the_file_is_plain_safetensors(file, pair):
    tensors = load_file(file)
    assert sorted(name for name in tensors if not name.startswith("lora.")) == [
        *("flow.backward", "flow.forward", "images.0", "images.1", "inversion.eps", "inversion.path", "prompt_embeds")
    ]
    assert torch.equal(tensors["inversion.path"], pair.inversion.path)
    assert {name.removeprefix("lora.") for name in tensors if name.startswith("lora.")} == set(pair.lora)
    with safe_open(file, framework="pt") as opened:
        header = json.loads(opened.metadata()["dreammover_pair"])
    assert header["version"] == 3
    assert header["canvas"] == asdict(pair.canvas)
    assert header["schedule"]["timesteps"] == list(pair.inversion.schedule.timesteps)
    assert header["lora_scale"] == 1.0
    assert sorted(header["fingerprints"]) == ["text_encoder", "unet", "vae"]
    assert header["versions"]["torch"] == torch.__version__


def test_tensors_go_to_the_device_and_images_stay_on_the_cpu(file):
    pair, _ = read_pair(file, torch.device("meta"))
    tensors = tensors_of(pair)
    assert tensors.pop("first").device == tensors.pop("last").device == CPU
    assert {tensor.device.type for tensor in tensors.values()} == {"meta"}


def test_a_loaded_pair_does_not_depend_on_its_file(pipe, pair, file):
    loaded = pipe.load_pair(file)
    file.write_bytes(bytes(file.stat().st_size))  # in place
    assert_same_pair(loaded, pair)


def test_what_only_some_pairs_have_is_kept_too(pair, tmp_path):
    generator = torch.Generator().manual_seed(0)
    poses = PosePair(torch.rand(2, 3, 18, 2, generator=generator), torch.rand(2, 3, 18, generator=generator))
    negative = torch.randn(pair.prompt_embeds[:1].shape, generator=generator)
    some = replace(pair, lora=None, lora_scale=np.float32(0.5), negative_embeds=negative, poses=poses)
    write_pair(some, tmp_path / "file", {})
    found, _ = read_pair(tmp_path / "file", CPU)
    assert_same_pair(found, some)
    assert torch.equal(found.negative_embeds, negative)
    assert torch.equal(found.poses.places, poses.places)
    assert torch.equal(found.poses.confidence, poses.confidence)
    elsewhere, _ = read_pair(tmp_path / "file", torch.device("meta"))
    assert elsewhere.negative_embeds.is_meta
    assert elsewhere.poses.places.device == elsewhere.poses.confidence.device == CPU  # where they are drawn


# ── Writing ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_pair_replaces_a_file_and_leaves_nothing_else(pipe, pair, tmp_path):
    path = tmp_path / "pair.safetensors"
    path.write_bytes(b"something else")
    link = tmp_path / "link.safetensors"
    link.symlink_to(path)
    pipe.save_pair(pair, str(link))
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["link.safetensors", "pair.safetensors"]
    assert link.is_symlink()
    assert_same_pair(pipe.load_pair(path), pair)


def test_a_full_disk_leaves_the_old_file(pipe, pair, file):
    """As far as the writing goes: the system refuses to let a file grow beyond 10 kB."""
    resource = pytest.importorskip("resource")
    old = file.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            pipe.save_pair(pair, file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert file.read_bytes() == old
    assert list(file.parent.iterdir()) == [file]


def test_a_missing_folder_is_an_error(pipe, pair, tmp_path):
    path = tmp_path / "missing" / "pair.safetensors"
    with pytest.raises(FileNotFoundError) as error:
        pipe.save_pair(pair, path)
    assert str(error.value) == f"cannot write the file '{path}': there is no folder '{path.parent}'"


def test_the_folder_that_is_missing_is_the_one_that_a_link_leads_to(tmp_path):
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "missing" / "file")
    with pytest.raises(FileNotFoundError, match=f"there is no folder '{tmp_path / 'missing'}'"):
        write_whole(link, b"content")


def test_the_whole_content_is_on_the_disk_before_the_file_takes_its_place(tmp_path, monkeypatch):
    path, seen, synced = tmp_path / "file", [], os.fsync
    path.write_bytes(b"old")

    def watched(descriptor):
        synced(descriptor)
        seen.append((os.fstat(descriptor).st_size, path.read_bytes()))

    monkeypatch.setattr(os, "fsync", watched)
    write_whole(path, b"new content")
    assert (len(b"new content"), b"old") in seen
    assert path.read_bytes() == b"new content"


def test_tensors_that_share_memory_or_lie_in_another_order_are_written_as_they_read(tmp_path):
    x = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    tensors = {"x": x, "again": x, "part": x[:, 1], "turned": x.mT, "last": x.to(memory_format=torch.channels_last)}
    write_tensors(tmp_path / "file", tensors)
    found = read_tensors(tmp_path / "file")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    (tmp_path / "file").write_bytes(bytes((tmp_path / "file").stat().st_size))  # in place
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


# ── What is refused ────────────────────────────────────────────────────────────────────────────────────────────────


def rewritten(file, change=lambda header: None, drop=(), metadata=None, **replaced):
    """The file with another header or other tensors."""
    tensors = {name: tensor for name, tensor in load_file(file).items() if name not in drop}
    with safe_open(file, framework="pt") as opened:
        header = json.loads(opened.metadata()["dreammover_pair"])
    change(header)
    save_file({**tensors, **replaced}, file, {"dreammover_pair": json.dumps(header)} if metadata is None else metadata)
    return file


def test_a_file_cut_off_anywhere_is_refused(pipe, file):
    whole = file.read_bytes()
    for length in [0, 1, 8, 9, *np.linspace(10, len(whole) - 1, 12, dtype=int)]:
        file.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"pair\.safetensors' is no whole safetensors file"):
            pipe.load_pair(file)


def test_other_files_are_refused(pipe, tmp_path):
    for content in (b"a line of text\n" * 20, b"\x89PNG\r\n\x1a\n" + bytes(100), bytes(100)):
        (tmp_path / "other").write_bytes(content)
        with pytest.raises(ValueError, match="other' is no whole safetensors file"):
            pipe.load_pair(tmp_path / "other")
    with pytest.raises(ValueError, match="holds no prepared pair"):
        pipe.load_pair(CHECKPOINT / "unet" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ValueError, match="is a folder"):
        pipe.load_pair(tmp_path)
    with pytest.raises(ValueError, match="is a pipe, a socket or a device"):
        pipe.load_pair(os.devnull)
    assert read_tensors(Path(os.devnull)) is None
    with pytest.raises(ValueError, match="there is a folder of that name"):
        write_tensors(tmp_path, {})
    with pytest.raises(FileNotFoundError):
        pipe.load_pair(tmp_path / "missing.safetensors")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '"version"'])
def test_an_unreadable_header_is_refused(pipe, file, text):
    with pytest.raises(ValueError, match="holds no prepared pair"):
        pipe.load_pair(rewritten(file, metadata={"dreammover_pair": text}))


@pytest.mark.parametrize("version", [0, 4, "1", None])
def test_another_format_version_is_refused(pipe, file, version):
    with pytest.raises(ValueError, match=f"format version {version}, but only versions up to 3"):
        pipe.load_pair(rewritten(file, lambda header: header.update(version=version)))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"drop": ["inversion.eps"]}, "it lacks 'inversion.eps'"),
        ({"change": lambda header: header.pop("canvas")}, "it lacks 'canvas'"),
        ({"change": lambda header: header["canvas"].pop("height")}, "height"),
        ({"change": lambda header: header["schedule"].pop("timesteps")}, "it lacks 'timesteps'"),
        ({"change": lambda header: header["schedule"]["timesteps"].reverse()}, "`timesteps` must ascend"),
        ({"change": lambda header: header["canvas"].update(content_width=5e-324)}, "`content_width` of a canvas must"),
        ({"change": lambda header: header.update(lora_scale=None)}, "float"),
        ({"change": lambda header: header.update(lora_scale=10**400)}, "too large"),
        ({"change": lambda header: header.update(lora_scale="nan")}, "`lora_scale` must be finite"),
        ({"change": lambda header: header.update(fingerprints=None)}, "not iterable"),
        ({"inversion.eps": torch.zeros(2, 4, 8, 7)}, "`eps` must be"),
        ({"flow.forward": torch.zeros(1, 2, 9, 8)}, "`backward` must be"),
        ({"prompt_embeds": torch.zeros(3, 24, 32)}, "`prompt_embeds` must be"),
        ({LORA_WEIGHT: torch.zeros(3, 3)}, "`lora` does not fit this UNet: .*to_q.lora_A"),
        ({"drop": [LORA_WEIGHT]}, "`lora` does not fit this UNet: it lacks"),
    ],
)
def test_a_damaged_pair_is_refused(pipe, file, changes, reason):
    with pytest.raises(ValueError, match=rf"is damaged: .*{reason}"):
        pipe.load_pair(rewritten(file, **changes))


@pytest.mark.parametrize("name", ["flow.forward", "inversion.path", "images.1", "prompt_embeds"])
def test_a_pair_with_a_single_altered_value_is_refused(pipe, file, name):
    tensors, header = load_file(file), safe_open(file, "pt").metadata()
    tensors[name].view(-1)[3] += 1
    save_file(tensors, file, header)
    with pytest.raises(ValueError, match="is damaged: its content is not what was written; prepare the pair anew"):
        pipe.load_pair(file)


@pytest.mark.parametrize("version", [1, 2])
def test_a_pair_of_an_earlier_version_which_has_no_digest_and_no_photos_of_8_bits_is_read(pipe, file, version):
    frames = pipe.render(pipe.load_pair(file), n_frames=1, include_inputs=True, output_type="pt").frames
    photos = {name: load_file(file)[name] / 255 for name in ("images.0", "images.1")}
    pair = pipe.load_pair(rewritten(file, lambda header: header.update(version=version), **photos))
    assert torch.equal(pair.images[0], photos["images.0"])
    assert torch.equal(pipe.render(pair, n_frames=1, include_inputs=True, output_type="pt").frames, frames)


def test_altered_tensors_count_as_missing(tmp_path):
    write_tensors(tmp_path / "a", {"x": torch.arange(4.0), "y": torch.ones(())}, {"about": "numbers"})
    assert read_tensors(tmp_path / "a").keys() == {"x", "y"}
    tensors, header = load_file(tmp_path / "a"), safe_open(tmp_path / "a", "pt").metadata()
    renamed = {"x": tensors["x"], "z": tensors["y"]}
    others = {**header, "about": "others"}
    for changed, texts in (({**tensors, "x": tensors["x"] + 1}, header), (renamed, header), (tensors, others)):
        save_file(changed, tmp_path / "b", texts)
        assert read_tensors(tmp_path / "b") is None


def test_tensors_of_a_file_that_is_cut_off_or_no_file_count_as_missing(tmp_path):
    path = tmp_path / "file"
    write_tensors(path, {"x": torch.arange(4.0)})
    whole = path.read_bytes()
    for length in [0, 1, 8, 9, len(whole) // 2, len(whole) - 1]:
        path.write_bytes(whole[:length])
        assert read_tensors(path) is None
    assert read_tensors(tmp_path) is None
    assert read_tensors(tmp_path / "missing") is None


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="needs a file that cannot be mapped into memory")
def test_tensors_of_a_file_that_cannot_be_read_count_as_missing():
    assert read_tensors(Path("/proc/self/maps")) is None


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
def test_nothing_waits_for_a_pipe_that_nobody_writes_to(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    # A process, since a thread that waits for a pipe inside safetensors would stop all others.
    reader = multiprocessing.get_context("fork").Process(
        target=lambda: os._exit(0 if read_tensors(tmp_path / "pipe") is None else 1)
    )
    reader.start()
    reader.join(10)
    code = reader.exitcode
    reader.kill()
    assert code == 0


@pytest.mark.parametrize("header", [None, {"format": "pt"}])
def test_tensors_that_another_program_wrote_are_taken_as_they_are(tmp_path, header):
    save_file({"x": torch.arange(4.0)}, tmp_path / "file", header)
    assert torch.equal(read_tensors(tmp_path / "file")["x"], torch.arange(4.0))


@pytest.mark.parametrize("changed", [("unet",), ("vae",), ("unet", "vae")])
def test_a_pair_of_another_checkpoint_is_refused_by_the_part_that_differs(pipe, file, changed):
    for name in changed:
        next(getattr(pipe, name).parameters()).data.view(-1)[0] += 1e-3
    with pytest.raises(ValueError, match=f"was prepared with another {' and '.join(changed)}:"):
        pipe.load_pair(file)


def test_a_pair_that_does_not_say_which_unet_it_belongs_to_is_refused(pipe, file):
    with pytest.raises(ValueError, match="was prepared with another unet:"):
        pipe.load_pair(rewritten(file, lambda header: header["fingerprints"].pop("unet")))


def test_another_text_encoder_is_a_warning(pipe, pair, file, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    monkeypatch.setattr(logging.getLogger("dreammover_pipeline"), "propagate", True)
    pipe.load_pair(file)
    assert not caplog.records
    next(pipe.text_encoder.parameters()).data.view(-1)[0] += 1
    expected = frames(pipe, pair)
    assert torch.equal(frames(pipe, pipe.load_pair(file)), expected)
    (record,) = caplog.records
    assert "another text encoder" in record.getMessage()
    pipe.register_modules(text_encoder=None)  # nothing to read negative prompts with, so nothing to warn of
    pipe.load_pair(file)
    assert len(caplog.records) == 1


def test_a_pair_is_refused_while_a_lora_acts_that_did_not(pipe, pair, file):
    add_lora(pipe.unet)
    with pytest.raises(ValueError, match="another unet"):
        pipe.load_pair(file)
    pipe.unet.disable_adapters()
    assert_same_pair(pipe.load_pair(file), pair)


# ── Weights instead of a fit ───────────────────────────────────────────────────────────────────────────────────────


def test_kept_weights_give_the_pair_their_fit_gave(pipe, pair, photos, preparing):
    generator = torch.Generator().manual_seed(3)
    state = generator.get_state()
    again = pipe.prepare(*photos, **preparing, lora=pair.lora, generator=generator)
    assert_same_pair(again, pair)
    assert torch.equal(generator.get_state(), state)
    ignored = pipe.prepare(*photos, **{**preparing, "lora_steps": 500, "lora_rank": 7}, lora=pair.lora)
    assert_same_pair(ignored, pair)


def test_weights_of_fit_lora_may_be_given_and_others_adapters_are_in_nobodys_way(pipe, photos, preparing):
    add_lora(pipe.unet)
    direct = pipe.prepare(*photos, **{**preparing, **LORA}, generator=torch.Generator().manual_seed(0))
    settings = {"prompt": preparing["prompt"], **LORA}
    weights = pipe.fit_lora(*photos, **settings, generator=torch.Generator().manual_seed(0))
    pipe.delete_adapters("dreammover")
    pipe.unet.set_adapters("style")
    assert_same_pair(pipe.prepare(*photos, **preparing, lora=weights), direct)


def test_weights_fit_a_compiled_unet_too(pipe, pair):
    check_pair_lora(torch.compile(pipe.unet, backend="eager"), pair.lora)


@pytest.mark.parametrize(
    ("change", "error", "reason"),
    [
        (lambda lora: {}, ValueError, "lacks '"),
        (lambda lora: dict(list(lora.items())[1:]), ValueError, "lacks '"),
        (lambda lora: {**lora, "mid.lora_A.weight": torch.zeros(2, 2)}, ValueError, "unknown 'mid.lora_A.weight'"),
        (lambda lora: {f"unet.{name}": weight for name, weight in lora.items()}, ValueError, "lacks '"),
        (lambda lora: {name: weight[:1] for name, weight in lora.items()}, ValueError, "must be"),
        (lambda lora: {name: weight.flatten() for name, weight in lora.items()}, ValueError, "must be"),
        (lambda lora: {name: weight[:0] for name, weight in lora.items()}, ValueError, "must be"),
        (lambda lora: {name: weight.tolist() for name, weight in lora.items()}, TypeError, "floating point"),
        (lambda lora: {name: weight.long() for name, weight in lora.items()}, TypeError, "floating point"),
        (lambda lora: list(lora), TypeError, "must be a dict of tensors, not list"),
    ],
)
def test_weights_that_do_not_fit_are_refused_before_any_model_runs(
    pipe, pair, photos, preparing, change, error, reason
):
    def ran(*_):
        raise AssertionError("a model ran")

    for model in (pipe.unet, pipe.vae.encoder, pipe.text_encoder):
        model.register_forward_pre_hook(ran)
    with pytest.raises(error, match=f"`lora` .*{reason}"):
        pipe.prepare(*photos, **preparing, lora=change(pair.lora))


def test_the_rank_must_be_one(pipe, pair, photos, preparing):
    name = next(reversed(pair.lora))
    side = pair.lora[name].shape[0]
    with pytest.raises(ValueError, match=r"must be \(\d+, 2\), not \(\d+, 3\)"):
        pipe.prepare(*photos, **preparing, lora={**pair.lora, name: torch.zeros(side, 3)})


# ── Fingerprints ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_digests_of_tensors_tell_values_shapes_and_types_apart_and_not_how_they_lie_in_memory():
    x = torch.arange(1.0, 7.0)
    different = [[x], [x.flip(0)], [x.reshape(2, 3)], [x.reshape(3, 2)], [x.double()], [x.view(torch.int32)], [x, x]]
    assert len({digest_of_tensors(tensors) for tensors in different}) == len(different)
    for same in (x.clone(), torch.stack([x, -x], 1)[:, 0], torch.nn.Parameter(x)):
        assert digest_of_tensors([same]) == digest_of_tensors([x])
    image = x.reshape(1, 2, 3, 1).expand(1, 2, 3, 4)
    for layout in (torch.contiguous_format, torch.channels_last):
        assert digest_of_tensors([image.contiguous(memory_format=layout)]) == digest_of_tensors([image])


def test_the_order_of_names_does_not_count_in_a_digest():
    assert digest_of({"a": 1, "b": [{"c": 2, "d": 3}]}) == digest_of({"b": [{"d": 3, "c": 2}], "a": 1})
    assert digest_of({"a": 1, "b": 2}) != digest_of({"a": 2, "b": 1})


class Weights(torch.nn.Module):
    """Anything that has parameters and buffers."""

    def __init__(self, buffers=(), **parameters):
        super().__init__()
        for name, tensor in parameters.items():
            self.register_parameter(name, torch.nn.Parameter(tensor))
        for name, tensor in dict(buffers).items():
            self.register_buffer(name, tensor)


def of(*args, **parameters):
    return fingerprint({"model": Weights(*args, **parameters)})


def add_lora(model, name="style", seed=1, targets=("to_q", "to_v")):
    """An adapter that acts: its weights are not at their start."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = LoraConfig(r=2, lora_alpha=2, target_modules=list(targets), init_lora_weights=False)
        model.add_adapter(config, adapter_name=name)


def naive_checksum(tensor):
    """Word by word, in Python's integers."""
    values = tensor.detach().flatten()
    if values.is_floating_point():
        bits = [int(x) for x in values.float().numpy().view(np.uint32)]
        bits += [0] * (len(bits) % 2)
        words = [low + (high << 32) for low, high in zip(bits[::2], bits[1::2], strict=True)]
    else:
        words = [int(x) for x in values]

    def shift(word, by):  # arithmetic, as int64 does it
        signed = word - 2**64 if word >= 2**63 else word
        return (signed >> by) % 2**64

    total = 0
    for position, word in enumerate(words):
        word = (word + 0x9E3779B97F4A7C15 * position) % 2**64
        word = (word ^ shift(word, 32)) * 0xBF58476D1CE4E5B9 % 2**64
        total += word ^ shift(word, 29)
    total %= 2**64
    return total - 2**64 if total >= 2**63 else total


def test_the_fingerprint_is_what_it_was_when_files_were_written(monkeypatch):
    """A naive computation, in pieces and in one; and one value of it, since files and caches hold such values."""
    generator = torch.Generator().manual_seed(0)
    tensors = {"odd": torch.randn(3, 5, generator=generator), "halves": torch.randn(8, generator=generator).half()}
    tensors["whole"], tensors["empty"] = torch.arange(-3, 4), torch.zeros(0, 2)
    lines = [f"model.{name} {tuple(tensor.shape)} {naive_checksum(tensor)} 1.0" for name, tensor in tensors.items()]
    expected = hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()
    for piece in (2, 4, 2**20):
        monkeypatch.setattr("dreammover_pipeline.storage.PIECE", piece)
        assert fingerprint({"model": Weights(buffers=tensors)}) == expected
    assert (
        of(weight=torch.tensor([-1, -0.5, 0, 0.5, 1]))
        == "02c841f523247e41a0fb810cf4db6d4bebe128535ad0e09febf20c4578621829"
    )


def test_the_pieces_that_a_fingerprint_is_computed_in_do_not_show(monkeypatch):
    weight = torch.randn(2 * PIECE + 3, generator=torch.Generator().manual_seed(0))
    found = of(weight=weight)
    monkeypatch.setattr("dreammover_pipeline.storage.PIECE", 4 * PIECE)
    assert of(weight=weight) == found


def test_what_changes_a_fingerprint():
    a, b = torch.linspace(-1, 1, 6).reshape(2, 3), torch.linspace(3, 4, 6).reshape(2, 3)
    step = a.clone()
    step[1, 1] = torch.nextafter(step[1, 1], torch.tensor(9.0))
    fingerprints = [
        of(a=a, b=b),
        of(a=b, b=a),  # two tensors swapped
        of(a=step, b=b),  # one value by its last bit
        of(a=a.flip(0), b=b),
        of(a=a.flip(1), b=b),
        of(a=a[:, [1, 0, 2]], b=b),
        of(a=a.reshape(3, 2), b=b),
        of(a=a.t(), b=b),
        of(a=a),
        of(a=a, c=b),
        of(a=a, b=b, buffers={"count": torch.tensor(0)}),
        of(a=a, b=b, buffers={"count": torch.tensor(1)}),
        fingerprint({"other": Weights(a=a, b=b)}),
        fingerprint({"model": Weights(a=a), "other": Weights(b=b)}),
        fingerprint({}),
    ]
    assert len(set(fingerprints)) == len(fingerprints)


def test_no_permutation_keeps_the_fingerprint():
    """Among 64 values, all swaps of two; and rotations of three, which a sum weighted by position alone may miss."""
    values = torch.arange(64.0)
    seen = {of(weight=values)}
    swaps = [(i, j) for i in range(64) for j in range(i)]
    for order in swaps + [(i, i + 1, i + 2) for i in range(62)]:
        permuted = values.clone()
        permuted[list(order)] = values[list(order[1:] + order[:1])]
        seen.add(of(weight=permuted))
    assert len(seen) == 1 + len(swaps) + 62


def test_what_does_not_change_a_fingerprint():
    images = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0)).half()
    expected = of(weight=images)
    assert of(weight=images.float()) == expected
    assert of(weight=images.double()) == expected
    assert of(weight=images.to(memory_format=torch.channels_last)) == expected
    assert of(weight=torch.cat([images, images])[4:]) == expected  # a view
    assert of(weight=torch.cat([images.flatten(), images.flatten()[:1]])[1:].roll(1).view(images.shape)) == expected
    assert of(weight=images.bfloat16()) != expected  # which rounds
    module = Weights(weight=images)
    module.register_buffer("workspace", torch.zeros(3), persistent=False)  # no part of a checkpoint
    assert fingerprint({"model": module}) == expected


def test_two_loads_of_a_checkpoint_agree_in_every_precision_that_holds_it(tiny_pipe):
    expected = tiny_pipe.fingerprint()
    assert len(expected) == 64
    assert DreamMoverPipeline.from_pretrained(CHECKPOINT).fingerprint() == expected
    assert DreamMoverPipeline.from_pretrained(CHECKPOINT, dtype=torch.float16).fingerprint() == expected
    assert DreamMoverPipeline.from_pretrained(CHECKPOINT, dtype=torch.bfloat16).fingerprint() != expected


@pytest.mark.parametrize("name", ["unet", "vae", "text_encoder"])
def test_every_model_counts(pipe, name):
    before = pipe.fingerprint()
    next(getattr(pipe, name).parameters()).data.view(-1)[-1] += 1e-3
    changed = pipe.fingerprint()
    assert changed != before
    pipe.register_modules(**{name: None})
    assert pipe.fingerprint() not in (before, changed)


def test_the_noise_schedule_counts_and_the_sampler_does_not(pipe):
    before = pipe.fingerprint()
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    assert pipe.fingerprint() == before
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, beta_end=0.02)
    assert pipe.fingerprint() != before


def test_offloading_and_compiling_do_not_matter(pipe):
    before = pipe.fingerprint()
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    pipe.vae.decoder = torch.compile(pipe.vae.decoder, backend="eager")
    cpu_offload_with_hook(pipe.text_encoder, CPU)
    assert pipe.fingerprint() == before


def test_weights_offloaded_layer_by_layer_are_found(pipe):
    before = pipe.fingerprint()
    for model in (pipe.unet, pipe.vae, pipe.text_encoder):
        cpu_offload(model, CPU, offload_buffers=True)
    assert next(pipe.unet.parameters()).is_meta
    assert pipe.fingerprint() == before


@pytest.mark.parametrize("kind", [{"offload_type": "leaf_level"}, {"num_blocks_per_group": 1}])
def test_group_offloading_does_not_matter_in_memory_and_is_refused_on_disk(pipe, tmp_path, kind):
    before = pipe.fingerprint()
    settings = {"onload_device": CPU, "offload_device": CPU, "offload_type": "block_level", **kind}
    pipe.vae.enable_group_offload(**settings)
    assert pipe.fingerprint() == before
    pipe.unet.enable_group_offload(**settings, offload_to_disk_path=str(tmp_path))
    with pytest.raises(ValueError, match="UNet2DConditionModel are offloaded to disk"):
        pipe.fingerprint()


def test_weights_that_are_nowhere_are_an_error(pipe):
    pipe.unet.to("meta")
    with pytest.raises(ValueError, match="UNet2DConditionModel has no weights"):
        pipe.fingerprint()


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_an_adapter_counts_as_far_as_it_acts(pipe, part):
    model = getattr(pipe, part)
    add = {"unet": add_lora, "text_encoder": lambda *a, **k: add_lora(*a, **k, targets=["q_proj", "fc1"])}[part]
    before = pipe.fingerprint()
    add(model)
    active = pipe.fingerprint()
    assert active != before
    layers = [module for module in model.modules() if hasattr(module, "set_scale")]
    for layer in layers:
        layer.set_scale("style", 0.5)
    assert pipe.fingerprint() not in (before, active)
    for layer in layers:
        layer.set_scale("style", 1)
    assert pipe.fingerprint() == active
    model.disable_adapters()
    assert pipe.fingerprint() == before
    model.enable_adapters()
    add(model, name="other", seed=2)
    model.set_adapter("other")
    other = pipe.fingerprint()
    assert other not in (before, active)
    model.set_adapter(["other", "style"])
    assert pipe.fingerprint() not in (before, active, other)
    model.set_adapter("style")
    assert pipe.fingerprint() == active


def test_an_adapters_name_does_not_count(pipe):
    add_lora(pipe.unet, "one")
    first = pipe.fingerprint()
    pipe.unet.delete_adapters("one")
    add_lora(pipe.unet, "two")
    assert pipe.fingerprint() == first


def test_a_fused_adapter_counts_as_the_weights_it_is_fused_into(pipe):
    before = pipe.fingerprint()
    add_lora(pipe.unet)
    active = pipe.fingerprint()
    pipe.fuse_lora(components=["unet"])
    fused = pipe.fingerprint()
    assert fused not in (before, active)
    pipe.unload_lora_weights()
    assert pipe.fingerprint() == fused


def test_the_pairs_own_lora_leaves_no_mark(pipe, pair, photos, preparing):
    before = pipe.fingerprint()
    frames(pipe, pair)
    pipe.prepare(*photos, **{**preparing, **LORA})
    assert pipe.fingerprint() == before
    pipe.fit_lora(*photos, **LORA)
    assert pipe.fingerprint() != before


def test_read_and_write_need_no_pipeline(pair, tmp_path):
    write_pair(pair, tmp_path / "pair", {"unet": "abc"})
    found, fingerprints = read_pair(tmp_path / "pair", CPU)
    assert_same_pair(found, pair)
    assert fingerprints == {"unet": "abc"}
