# SPDX-License-Identifier: Apache-2.0
"""Which of several files of the same weights are loaded, where the Hub is out of reach."""

from pathlib import Path

import huggingface_hub
import pytest
import torch

from dreammover_pipeline.cli.variants import choose_variant

PLAIN = "diffusion_pytorch_model.safetensors"
HALF = "diffusion_pytorch_model.fp16.safetensors"
OTHER = "diffusion_pytorch_model.non_ema.safetensors"
PICKLE = "diffusion_pytorch_model.bin"
SHARD = "diffusion_pytorch_model-00001-of-00002.safetensors"
HALF_SHARD = "diffusion_pytorch_model.fp16-00001-of-00002.safetensors"


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """A function that puts files into the Hub's cache, and returns the name of their repository."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))

    def put(subfolder: str, *names: str) -> str:
        repository = tmp_path / "models--user--model"
        folder = repository / "snapshots" / "0" / subfolder
        folder.mkdir(parents=True)
        for name in ("config.json", *names):
            (folder / name).touch()
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("0")
        return "user/model"

    return put


CASES = [  # files, and the variant of the cache in float16 and float32
    ([PLAIN], None, None),
    ([HALF], "fp16", "fp16"),
    ([PLAIN, HALF], None, None),
    ([OTHER, HALF], "fp16", "fp16"),
    ([OTHER], "non_ema", "non_ema"),
    ([SHARD, HALF], None, None),
    ([HALF_SHARD], "fp16", "fp16"),
    ([PICKLE, HALF], "fp16", "fp16"),
    ([], None, None),
]


@pytest.mark.parametrize("subfolder", ["unet", ""])
@pytest.mark.parametrize(("names", "half", "full"), CASES)
def test_what_was_downloaded_before_is_used_without_a_network(cached, subfolder, names, half, full):
    source = cached(subfolder, *names)
    assert choose_variant(source, subfolder, torch.float16, safe=True) == half
    assert choose_variant(source, subfolder, torch.float32, safe=True) == full


@pytest.mark.parametrize(("names", "half", "full"), CASES)
def test_a_folder_is_read_as_it_is_in_any_precision(tmp_path, names, half, full):
    (tmp_path / "unet").mkdir()
    for name in names:
        (tmp_path / "unet" / name).touch()
    for dtype in (torch.float16, torch.float32):
        assert choose_variant(str(tmp_path), "unet", dtype, safe=True) == full


@pytest.mark.parametrize(
    ("names", "dtype"), [([PLAIN], torch.float32), ([PLAIN, HALF], torch.float16), ([HALF], torch.float16)]
)
def test_the_hub_is_not_asked_where_what_is_wanted_was_downloaded_before(cached, monkeypatch, names, dtype):
    monkeypatch.setattr(huggingface_hub, "model_info", lambda *_, **__: pytest.fail("the Hub was asked"))
    choose_variant(cached("unet", *names), "unet", dtype, safe=True)


def test_pickles_count_where_they_may_be_loaded(cached):
    source = cached("unet", PICKLE, HALF)
    assert choose_variant(source, "unet", torch.float16, safe=False) is None


@pytest.mark.parametrize("source", ["user/unknown", str(Path(__file__).parent)])
def test_of_what_is_not_there_no_variant_is_asked_for(cached, source):
    assert choose_variant(source, "unet", torch.float16, safe=True) is None
