# SPDX-License-Identifier: Apache-2.0
"""The benchmarks count what they say they count, and run. How long anything takes is nobody's business here."""

import copy
import json

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks import run
from benchmarks.counting import BareCalls, PeakBytes, Workload, count_flops, count_units
from benchmarks.counts import DEFAULT
from benchmarks.kernel_kinds import OTHER, kind_of, profiled
from benchmarks.matching import match_by_loop
from benchmarks.models import add_lora, fake_models
from benchmarks.profiles import PROFILES, ROWS, Bench
from benchmarks.record import recorded, replay
from benchmarks.released import released_samples, released_schedule, schedule_counted
from benchmarks.report import Table, ratio, spread
from benchmarks.timing import fit_line
from dreammover_pipeline.flow import match_features
from dreammover_pipeline.lora import LoraFit, fit_pair_lora

SMOKE = PROFILES["smoke"]
MODELS = ("unet", "vae", "text_encoder")


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench("smoke")


def bare_and_fitted(unet, vae, text_encoder, side) -> tuple[BareCalls, BareCalls]:
    fitted = copy.deepcopy(unet)
    return BareCalls(unet, vae, text_encoder, side), BareCalls(fitted, vae, text_encoder, side, add_lora(fitted))


def run_workload(pipe, photos, workload: Workload, **options):
    steps = {
        "num_inference_steps": 6,
        "inversion_steps": workload.steps,
        "feature_step": 1,
        "lora_steps": workload.lora_steps,
        "detail": "upsampled",  # which the formula is of
        **options,
    }
    return pipe(
        *photos, **steps, flow_smoothing=2, n_frames=workload.frames, frame_batch_size=workload.chunk, output_type="pt"
    )


@pytest.mark.parametrize("workload", [Workload(5, 3, 2, 2), Workload(4, 2, 4), Workload(1, 1, 1)])
def test_calls_are_those_of_the_formula(pipe, photos, workload):
    with recorded(pipe) as calls:
        run_workload(pipe, photos, workload)
    sizes = [len(call.args[0]) for call in calls if call.function is pipe.unet]
    assert (len(sizes), sum(sizes)) == (workload.unet_calls, workload.unet_samples)
    assert [len(call.args[0]) for call in calls if call.function == pipe.vae.encode] == [2]
    assert [len(call.args[0]) for call in calls if call.function == pipe.vae.decode] == [1] * workload.frames


@pytest.mark.parametrize("workload", [Workload(5, 3, 2), Workload(2, 1, 2)])
def test_flops_are_those_of_the_formula_and_of_matching(pipe, photos, workload):
    units = count_units(*bare_and_fitted(pipe.unet, pipe.vae, pipe.text_encoder, 64))
    features = torch.randn(2, 16 + 16 + 16, 8, 8)  # of the second up block, twice, and the third, joined
    matching = count_flops(lambda: match_features(features, (8, 8)))
    assert matching == 2 * 64 * 64 * 48
    # Without the refinement, whose FLOPs depend on where the photos differ.
    made = count_flops(lambda: run_workload(pipe, photos, workload, flow="features"))
    assert made == units.inference(workload) + matching


def test_flops_of_the_fit_are_those_of_its_steps(pipe):
    bare, fitted = bare_and_fitted(pipe.unet, pipe.vae, pipe.text_encoder, 64)
    text, alphas = torch.randn(2, bare.tokens, 32), pipe.scheduler.alphas_cumprod
    clean, settings = bare.latents(2), LoraFit(3, 16, 1e-3)
    counted = count_flops(lambda: fit_pair_lora(pipe.unet, clean, text, alphas, settings, seed=0))
    assert counted == 3 * count_flops(fitted.fit_step)


def test_a_frame_pays_for_twice_the_attention_and_not_for_keys_of_its_own(pipe):
    """By hand: QK and AV cost 2·L²·C multiply-adds with own keys, 4·L²·C with the inputs'; K and V cost 2·L·C²."""
    units = count_units(*bare_and_fitted(pipe.unet, pipe.vae, pipe.text_encoder, 64))
    layers = [(8 * 8, 8)] * 2 + [(4 * 4, 16)] * 2  # tokens, channels: two self-attentions in each of blocks 3 and 2
    assert units.frame - units.sample == sum(2 * (2 * n * n * c - 2 * n * c * c) for n, c in layers)
    assert units.frames_call == sum(2 * 2 * (2 * n) * c * c for n, c in layers)


def test_fake_models_count_like_real_ones(bench):
    side, mode = 64, FakeTensorMode()
    real = count_units(*bare_and_fitted(*(bench.pipe.components[name] for name in MODELS), side))
    fake, fitted = (fake_models("micro", torch.float32, mode) for _ in range(2))
    with mode:
        assert count_units(BareCalls(*fake, side), BareCalls(*fitted, side, add_lora(fitted[0]))) == real


def test_the_peak_is_that_of_tensors_alive_at_once():
    layer = torch.nn.Linear(256, 256, bias=False)
    with torch.no_grad(), PeakBytes().ignore(layer) as peak:
        x = layer(torch.ones(1, 256))  # two tensors alive
        y = x.view(16, 16).T  # views cost nothing, nor do weights
        del x
        assert (peak.live, peak.peak) == (1024, 2048)
        del y
        torch.ones(128)
    assert (peak.live, peak.peak) == (0, 2048)


def outputs_of(unet, function) -> list[torch.Tensor]:
    outputs = []
    handle = unet.register_forward_hook(lambda module, args, output: outputs.append(output[0]))
    function()
    handle.remove()
    return outputs


def test_a_replay_makes_the_same_calls_with_the_same_results(bench):
    unet, processors = bench.pipe.unet, dict(bench.pipe.unet.attn_processors)
    pair = bench.prepare()
    with recorded(bench.pipe) as calls:
        expected = outputs_of(unet, lambda: bench.render(pair))
    assert sum(call.led_groups for call in calls) == SMOKE.steps
    repeated = outputs_of(unet, lambda: replay(unet, calls, blocks=(2, 3)))
    assert len(expected) == len(repeated)
    assert all(torch.equal(a, b) for a, b in zip(expected, repeated, strict=True))
    unreferred = outputs_of(unet, lambda: replay(unet, calls))
    assert not all(torch.equal(a, b) for a, b in zip(expected, unreferred, strict=True))
    assert unet.attn_processors == processors
    assert not {"forward", "encode", "decode"} & (vars(unet).keys() | vars(bench.pipe.vae).keys())


def test_the_released_schedule_makes_the_calls_it_is_said_to_make(bench):
    pair = bench.prepare()
    with recorded(bench.pipe) as calls:
        frames = released_schedule(bench, pair)
    sizes = [len(call.args[0]) for call in calls if call.function is bench.pipe.unet]
    workload = Workload(SMOKE.frames, SMOKE.steps, SMOKE.chunk)
    assert sum(sizes) == sum(released_samples(workload, SMOKE.steps, inputs_per_batch=False))
    assert frames.shape == (SMOKE.frames, 3, 64, 64)


def test_schedules_are_compared_with_what_ours_takes():
    (ours, released, again) = schedule_counted(SMOKE).rows
    assert ours[0] == "ours"
    assert ours[3] == DEFAULT.unet_samples - 2 * DEFAULT.lora_steps
    assert ours[5] == pytest.approx(1, rel=1e-6)
    assert 1 < released[5] < again[5]


def test_the_loop_over_cells_finds_what_one_product_finds():
    features = torch.randn(2, 24, 5, 6, generator=torch.Generator().manual_seed(3))
    flow = match_features(features, (5, 6))
    cells = [(i, j) for i in range(5) for j in range(6)]
    for (source, target), field in ((features, flow.forward), (features.flip(0), flow.backward)):
        moved = [(i + int(field[0, 1, i, j]), j + int(field[0, 0, i, j])) for i, j in cells]
        assert match_by_loop(source, target, cells) == moved


def test_spreads_and_lines():
    values = spread([4.0, 1.0, 2.0, 3.0, 5.0])
    assert (values.median, values.rounds) == (3.0, 5)
    assert values.p10 == pytest.approx(1.4)
    assert ratio([2.0, 9.0], [1.0, 3.0]).median == 2.5
    assert fit_line([1, 2, 4], [5.0, 7.0, 11.0]) == pytest.approx((3, 2, 1))
    table = Table("t", "counted", ("a", "b"), [(1, 0.123456), ("x", values)], "note")
    assert table.markdown().splitlines()[1:5] == ["| a | b |", "|---|---|", "| 1 | 0.1235 |", "| x | 3 (1.4–4.6) |"]
    assert table.as_json()["rows"][1] == {"a": "x", "b": {"median": 3.0, "p10": 1.4, "p90": 4.6, "rounds": 5}}


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("fmha_cutlassF_f16_aligned_64x64_rf_sm80(PyTorchMemEffAttention::…)", "attention"),
        ("fmha_cutlassB_f16_aligned_64x64_k64_sm80(PyTorchMemEffAttention::…)", "attention"),
        ("void <unnamed>::softmax_warp_backward<c10::Half, c10::Half, float, (int)9, (bool)1, (bool)0>", "attention"),
        ("sm90_xmma_fprop_implicit_gemm_f16f16_f16f32_f32_nhwckrsc_nhwc", "convolution"),
        ("sm90_xmma_dgrad_implicit_gemm_indexed_f16f16_f16f32_f32_nhwckrsc_nhwc", "convolution"),
        ("void cudnn::ops::nchwToNhwcKernel<__half, __half, float, false, true, …>", "change of layout"),
        ("nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_TNT", "matrix product"),
        ("ampere_fp16_s16816gemm_fp16_128x64_ldg8_f2f_stages_64x4_tn", "matrix product"),
        ("void cutlass::Kernel2<cutlass_80_tensorop_s16816gemm_f16_128x64_32x6_nn_align8>", "matrix product"),
        ("void at::native::(anonymous namespace)::RowwiseMomentsCUDAKernel<c10::Half>", "normalisation"),
        ("void at::native::(anonymous namespace)::ComputeInternalGradientsCUDAKernel<c10::Half>", "normalisation"),
        ("void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda(…)>", "copy"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<c10::Half>>", "elementwise"),
        ("void at::native::(anonymous namespace)::multi_tensor_apply_kernel<…FusedAdamMathFunctor…>", "optimizer"),
        ("void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, …sum…>>", "sum or sort"),
        ("void at::native::sbtopk::gatherTopK<float, unsigned int, 2, false>", "sum or sort"),
        ("void gemv2T_kernel_val<int, int, __half, __half, __half, float, 128, 16, 4, 4, false, …>", "matrix product"),
        ("void at::native::grid_sampler_2d_kernel<float, int>", "lookup or resizing"),
        ("void at::native::upsample_bilinear2d_out_frame<float>", "lookup or resizing"),
        ("void at::native::tril_indices_kernel<long>", OTHER),
    ],
)
def test_kernels_are_told_apart_by_their_names(kernel, kind):
    assert kind_of(kernel) == kind


def test_what_a_device_is_busy_with_is_added_up_by_kinds(bench):
    first, second = torch.randn(64, 64), torch.randn(64, 64)

    def work():
        for _ in range(3):
            torch.mm(first, second)

    table = profiled(bench, "three products", work)
    (total, product), rest = table.rows[:2], table.rows[2:]
    assert (total[0], product[:2], product[4]) == ("all", ("matrix product", 3), "aten::mm")
    assert total[1] == 3 + sum(row[1] for row in rest)
    assert total[2] == pytest.approx(product[2] + sum(row[2] for row in rest))


def test_every_row_runs_and_what_is_written_is_strict_json(tmp_path, capsys):
    written, plot = tmp_path / "smoke.json", tmp_path / "scaling.png"
    run.main(["--profile", "smoke", "-o", str(written), "--plot", str(plot)])

    def refuse(constant):
        raise ValueError(constant)

    result = json.loads(written.read_text(encoding="utf-8"), parse_constant=refuse)
    assert {table["row"] for table in result["tables"]} == set(SMOKE.rows) == set(ROWS) - {"compile", "kernels"}
    assert all(table["rows"] for table in result["tables"])
    assert torch.__version__.startswith(result["machine"]["torch"])  # which a build may follow, such as +cu130
    printed = capsys.readouterr().out
    assert all(f"### {table['title']} ({table['basis']})" in printed for table in result["tables"])
    assert plot.stat().st_size > 1000
