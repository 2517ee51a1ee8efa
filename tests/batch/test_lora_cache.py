# SPDX-License-Identifier: Apache-2.0
"""Fitted LoRAs, kept under what decides them."""

import shutil

import torch
from PIL import Image
from support.batches import pair, plan, work

from dreammover_pipeline.batch.lora_cache import LoraCache, cache_key
from dreammover_pipeline.batch.sidecar import digest, read_sidecar, sidecar_path, stack_of


def loras(pipe, jobs):
    work(pipe, jobs)
    return [read_sidecar(sidecar_path(job.output))["lora"] for job in jobs]


def test_a_lora_is_kept_by_what_decides_it_and_not_by_a_name(pipe, album):
    shutil.copy(album / "a0.png", album / "d0.png")
    Image.open(album / "a1.png").save(album / "d1.png", compress_level=0)  # the same pixels in other bytes
    base = {"lora_steps": 1, "seed": 1}
    rows = [
        pair("a", **base),
        pair("b", **base),
        pair("a", **base, height=96, output="size"),
        pair("d", **base),
        pair("a", **base, n_frames=1, output="frames"),
        pair("a", **{**base, "lora_steps": 0}, output="none"),
    ]
    assert loras(pipe, plan(album, *rows)) == ["fitted", "fitted", "fitted", "cached", "cached", None]
    with torch.no_grad():
        pipe.unet.conv_out.bias += 0.1
    assert loras(pipe, plan(album, rows[0])) == ["fitted"]


def test_a_kept_lora_gives_the_same_bytes_and_a_damaged_one_is_not_there(pipe, album):
    (job,) = plan(album, pair("a", lora_steps=2))
    work(pipe, [job])
    before = digest(job.output)
    folder = album.parent / "out" / ".dreammover" / "lora"
    (file,) = folder.iterdir()
    content = file.read_bytes()
    for damage, source in ((content, "cached"), (content[:-1], "fitted"), (content[:5], "fitted"), (b"", "fitted")):
        file.write_bytes(damage)
        shutil.rmtree(job.output)
        assert loras(pipe, [job]) == [source]
        assert digest(job.output) == before
        assert list(folder.iterdir()) == [file]
        assert file.read_bytes() == content


def test_a_kept_lora_is_loaded_to_where_torch_itself_would_put_it(tmp_path):
    """That is, to multiples of 64, whatever the length of the file's header and the sizes of the weights in it."""
    cache = LoraCache(tmp_path)
    for length in range(64):
        weights = {"a" * (1 + length): torch.randn(3, 7), "b.lora_B.weight": torch.randn(5, 3)}
        cache.save("key", weights)
        loaded = cache.load("key")
        assert all(torch.equal(loaded[name], weight) for name, weight in weights.items())
        assert {weight.data_ptr() % 64 for weight in loaded.values()} == {0}


def test_the_key_of_a_lora(pipe, album):
    pixels, stack = torch.zeros(2, 3, 8, 8), stack_of(pipe)

    def key(pixels=pixels, fingerprint="f", stack=stack, **settings):
        (job,) = plan(album, pair("a", **settings))
        return cache_key(job, pixels, fingerprint, stack)

    others = [
        key(prompt="a blob"),
        key(seed=2),
        key(lora_steps=2),
        key(lora_rank=2),
        key(lora_learning_rate=0.1),
        key(clip_skip=1),
        key(pixels=pixels + 1e-7),
        key(pixels=pixels.reshape(2, 3, 4, 16)),
        key(fingerprint="g"),
        key(stack={**stack, "dtype": "float16"}),
    ]
    assert len({key(), *others}) == 1 + len(others)
    assert key() == key(lora_scale=0.5, n_frames=9, fusion="direct", inversion_steps=3, output="other", fps=1)
    assert LoraCache(album / "cache").load(key()) is None
