# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch
from support.processors import Louder
from support.snapshot import snapshot

from dreammover_pipeline.attention import reference_attention, self_attention_names


def explicit_attention(attn, queries, tokens):
    """softmax(Q Kᵀ / √d) V per head, in loops, from the layer's own projections."""
    q, k, v = attn.to_q(queries), attn.to_k(tokens), attn.to_v(tokens)
    width = q.shape[-1] // attn.heads
    heads = []
    for head in range(attn.heads):
        part = slice(head * width, (head + 1) * width)
        weights = (q[:, part] @ k[:, part].T / math.sqrt(width)).softmax(-1)
        heads.append(weights @ v[:, part])
    return attn.to_out[0](torch.cat(heads, -1))


@pytest.fixture
def unet(components):
    return components["unet"].double()


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return {"pair": draw(2, 4, 8, 8), "frames": draw(3, 4, 8, 8), "text": draw(1, 24, 32)}


def run(unet, latents, text):
    with torch.no_grad():
        return unet(latents, torch.tensor(101), text.expand(len(latents), -1, -1)).sample


def test_frames_attend_to_both_inputs_and_to_nothing_else(unet, inputs):
    """DreamMover Eqs. (9) and (10), layer by layer: Q^δ against K⁰⊕K¹ and V⁰⊕V¹."""
    seen = {}

    def keep(name):
        def hook(module, args, output):
            seen.setdefault(name, []).append((args[0].detach(), output.detach()))

        return hook

    with reference_attention(unet, (1, 2, 3)) as references:
        names = [name.removesuffix(".processor") for name in references.layers]
        for name in names:
            unet.get_submodule(name).register_forward_hook(keep(name))
        with references.led_by_inputs():
            run(unet, inputs["pair"], inputs["text"])
        run(unet, inputs["frames"], inputs["text"])
    assert len(names) == 6
    for name in names:
        (pair_tokens, _), (frame_tokens, attended) = seen[name]
        for frame, result in zip(frame_tokens, attended, strict=True):
            expected = explicit_attention(unet.get_submodule(name), frame, torch.cat(list(pair_tokens)))
            assert torch.allclose(result, expected, atol=1e-12)


def test_inputs_attend_to_themselves_exactly_as_without(unet, inputs):
    plain = run(unet, inputs["pair"], inputs["text"])
    with reference_attention(unet, (1, 2, 3)) as references, references.led_by_inputs():
        assert torch.equal(run(unet, inputs["pair"], inputs["text"]), plain)


def test_frames_do_not_see_each_other(unet, inputs):
    with reference_attention(unet, (2, 3)) as references:
        with references.led_by_inputs():
            run(unet, inputs["pair"], inputs["text"])
        together = run(unet, inputs["frames"], inputs["text"])
        apart = torch.cat([run(unet, frame, inputs["text"]) for frame in inputs["frames"].split(1)])
    assert torch.allclose(together, apart, atol=1e-12)


def test_guidance_groups_keep_to_themselves(unet, inputs):
    """(unconditional, conditional) batches, concatenated, equal two runs of their own."""
    text = torch.cat([inputs["text"], inputs["text"].flip(1)])

    def one_group(group):
        with reference_attention(unet, (2, 3)) as references:
            with references.led_by_inputs():
                run(unet, inputs["pair"], text[[group]])
            return run(unet, inputs["frames"], text[[group]])

    with reference_attention(unet, (2, 3)) as references:
        with references.led_by_inputs(groups=2), torch.no_grad():
            unet(inputs["pair"].repeat(2, 1, 1, 1), torch.tensor(101), text.repeat_interleave(2, 0))
        with torch.no_grad():
            both = unet(inputs["frames"].repeat(2, 1, 1, 1), torch.tensor(101), text.repeat_interleave(3, 0)).sample
    assert torch.allclose(both, torch.cat([one_group(0), one_group(1)]), atol=1e-12)


def test_a_frame_that_is_an_input_comes_out_as_with_doubled_context(unet, inputs):
    """Two equal inputs and a frame equal to them: keys occur twice, which softmax does not notice."""
    same = inputs["pair"][:1].expand(2, -1, -1, -1)
    with reference_attention(unet, (1, 2, 3)) as references:
        with references.led_by_inputs():
            expected = run(unet, same, inputs["text"])[:1]
        assert torch.allclose(run(unet, same[:1], inputs["text"]), expected, atol=1e-12)


@pytest.mark.parametrize("blocks", [(), (3,), (2, 3), (0, 1, 2, 3)])
def test_only_the_named_blocks_change_and_all_come_back(unet, blocks):
    before, processors = snapshot(unet), dict(unet.attn_processors)
    with reference_attention(unet, blocks) as references:
        changed = {name for name, processor in unet.attn_processors.items() if processor is not processors[name]}
        assert changed == set(references.layers)
        assert changed == {name for block in blocks for name in self_attention_names(unet, block)}
    assert snapshot(unet) == before


def test_processors_come_back_after_an_exception(unet, inputs):
    before = snapshot(unet)
    with pytest.raises(RuntimeError, match="`led_by_inputs`"), reference_attention(unet, (2, 3)):
        run(unet, inputs["frames"], inputs["text"])  # nothing recorded yet
    assert snapshot(unet) == before


def test_sd15_has_the_six_layers_of_the_released_code():
    """Official start_layer=10 is attn1 of up_blocks.2 and .3: six of nine layers in the up blocks."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    assert [len(self_attention_names(unet, block)) for block in range(4)] == [0, 3, 3, 3]


def test_a_users_processor_gets_its_keyword_arguments(unet, inputs):
    louder = Louder()
    unet.set_attn_processor(louder)
    text = inputs["text"].expand(5, -1, -1)
    both = torch.cat([inputs["pair"], inputs["frames"]])
    with torch.no_grad(), reference_attention(unet, (2, 3)) as references, references.led_by_inputs():
        unet(both, torch.tensor(101), text, cross_attention_kwargs={"gain": 0.5})
    assert set(louder.given) == {0.5}
    assert len(louder.given) == len(unet.attn_processors) + len(
        references.layers
    )  # once for the inputs, once for frames
