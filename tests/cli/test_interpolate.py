# SPDX-License-Identifier: Apache-2.0
"""The command line on the embedded checkpoint: as a process where the process matters, in process for the rest."""

import io
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from support import forked
from support.programs import LATE_FAILURE

from dreammover_pipeline import __version__
from dreammover_pipeline.cli.loading import load_pipeline
from dreammover_pipeline.cli.main import main
from dreammover_pipeline.media.files import write_video
from dreammover_pipeline.tiny import CHECKPOINT

pytestmark = pytest.mark.usefixtures("restored_logging")

FISH = Path(__file__).parents[2] / "examples" / "fish"
PHOTOS = [str(FISH / "0.png"), str(FISH / "1.png")]
TINY = ["--model", "tiny", "--device", "cpu"]
FAST = [*TINY, "--frames=3", "--steps=4", "--inversion-steps=2", "--feature-step=1", "--lora-steps=2"]
PROCESS = [sys.executable, "-m", "dreammover_pipeline"]


def run_process(*arguments, **environment):
    return subprocess.run(
        [*PROCESS, *arguments], capture_output=True, text=True, env={**os.environ, **environment}, check=False
    )


def error_line(stderr):
    """The one line there is, without its head."""
    (line,) = stderr.splitlines()
    assert line.startswith("dreammover: error: ")
    return line.removeprefix("dreammover: error: ")


def refused(capsys, *arguments):
    """Run bad input in process; what is said about it."""
    assert main(["interpolate", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    return error_line(captured.err)


def read(path):
    return np.asarray(Image.open(path).convert("RGB"), dtype=float)


def test_video_and_pictures_as_a_process(tmp_path):
    names = ["compare", "flow.png", "matches.png", "out.mp4", "sheet.png", "sources.png"]
    compare, flow, matches, out, sheet, sources = [str(tmp_path / name) for name in names]
    pictures = ["--sheet", sheet, "--flow", flow, "--matches", matches, "--sources", sources, "--compare", compare]
    done = run_process("interpolate", *PHOTOS, *FAST, "--flow-from=features", "-o", out, *pictures)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(rf"{re.escape(out)}: 5 frames in \d+\.\d s\n", done.stdout)
    bars = [bar.strip() for bar in re.split(r"[\r\n]+", done.stderr.strip())]
    assert all(re.match(r"([\w ]+: +)?\d+%\|", bar) for bar in bars), done.stderr  # progress, and no noise
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    video = iio.imread(out).astype(float)
    assert video.shape == (5, 128, 128, 3)
    for frame, photo in zip(video[[0, -1]], PHOTOS, strict=True):
        assert np.abs(frame - read(photo)).mean() < 4
    sheet, flow, matches, sources = (Image.open(path) for path in (sheet, flow, matches, sources))
    assert sheet.width > 3 * 128
    assert flow.width > flow.height > 32
    assert matches.height > 3 * 384
    assert sources.height > 3 * 384
    compared = [read(path) for path in sorted(Path(compare).iterdir())]
    assert len(compared) == 5
    for frame, photo in zip((compared[0], compared[-1]), PHOTOS, strict=True):  # on both sides
        np.testing.assert_array_equal(frame[28:156, 8:136], read(photo))
        np.testing.assert_array_equal(frame[28:156, 144:272], read(photo))
    fade = (read(PHOTOS[0]) + read(PHOTOS[1])) / 2
    np.testing.assert_allclose(compared[2][28:156, 144:272], fade, atol=1)
    assert np.abs(compared[2][28:156, 8:136] - video[2]).mean() < 4


def test_the_comparison_is_played_as_the_video_is(tmp_path):
    out, beside = tmp_path / "out", tmp_path / "beside"
    played = ["--fps=10", "--hold=0.2", "--ping-pong", "--quiet"]
    assert main(["interpolate", *PHOTOS, *FAST, "--frames=2", *played, "-o", str(out), "--compare", str(beside)]) == 0
    alone, compared = ([read(path) for path in sorted(folder.iterdir())] for folder in (out, beside))
    assert len(alone) == len(compared) == 2 + 2 + 2 + 2
    fades = [(1 - share) * read(PHOTOS[0]) + share * read(PHOTOS[1]) for share in (0, 1 / 3, 2 / 3, 1)]
    for frame, both, step in zip(alone, compared, [0, 0, 1, 2, 3, 3, 2, 1], strict=True):
        np.testing.assert_array_equal(both[28:156, 8:136], frame)
        np.testing.assert_allclose(both[28:156, 144:272], fades[step], atol=1)


def test_a_comparison_that_cannot_be_written_leaves_the_video(tmp_path, capsys, program):
    program(LATE_FAILURE)
    out, beside = tmp_path / "out", tmp_path / "beside.mp4"
    options = [*FAST, "--frames=1", "--quiet", "-o", str(out), "--compare", str(beside)]
    assert main(["interpolate", *PHOTOS, *options]) == 1
    told = error_line(capsys.readouterr().err)
    assert told.endswith(f"no more room; the video itself is in '{out}'")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert len(list(out.iterdir())) == 3


def test_what_is_too_large_for_many_players_is_scaled_and_that_is_said(tmp_path, capsys):
    photos = [str(tmp_path / name) for name in ("0.png", "1.png")]
    for photo, wide in zip(PHOTOS, photos, strict=True):
        Image.open(photo).resize((8700, 290)).save(wide)
    out = tmp_path / "out.mp4"
    assert main(["interpolate", *photos, *FAST, "--frames=1", "--quiet", "-o", str(out)]) == 0
    note = f"dreammover: note: '{out}' will have 8688x290 pixels instead of 8700x290, since many players refuse larger"
    assert capsys.readouterr().err.startswith(note)
    assert iio.imread(out).shape == (3, 290, 8688, 3)


def test_the_same_seed_gives_the_same_bytes_and_a_folder_starts_and_ends_with_the_photos(tmp_path, capsys):
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        assert main(["interpolate", *PHOTOS, *FAST, "-o", str(folder), "--seed", "7", "--quiet"]) == 0
        assert capsys.readouterr().err == ""
    files = [sorted(folder.iterdir()) for folder in folders]
    assert [path.name for path in files[0]] == [f"frame_{index:04d}.png" for index in range(5)]
    assert [path.read_bytes() for path in files[0]] == [path.read_bytes() for path in files[1]]
    for frame, photo in zip((files[0][0], files[0][-1]), PHOTOS, strict=True):
        np.testing.assert_array_equal(read(frame), read(photo))


def test_what_is_typed_reaches_the_pipeline(tmp_path, capsys):
    method = ["--attention-blocks", "2", "--fusion=direct", "--guidance-scale=2", "--lora-steps=0"]
    prompts = ["--prompt", "a fish", "--prompt", "another fish", "--negative-prompt", "a cat"]
    output = tmp_path / "out.gif"
    options = [*FAST, *method, *prompts, "--size", "64x48", "--fps=20", "--frames=2", "--frame-batch-size=1"]
    assert main(["interpolate", *PHOTOS, *options, "-o", str(output)]) == 0
    captured = capsys.readouterr()
    assert "4 frames" in captured.out
    assert "Fitting" not in captured.err
    with Image.open(output) as gif:
        assert (gif.size, gif.n_frames, gif.info["duration"]) == ((64, 48), 4, 50)


@pytest.mark.parametrize(("encoding", "name"), [("ascii", "猫.gif"), ("utf-8", os.fsdecode(b"\xff.gif"))])
def test_a_name_that_the_terminal_cannot_show_is_no_failure(tmp_path, monkeypatch, encoding, name):
    shown = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr("sys.stdout", shown)
    monkeypatch.chdir(tmp_path)
    assert main(["interpolate", *PHOTOS, *FAST, "--frames=1", "--quiet", "-o", name]) == 0
    assert Path(name).is_file()
    shown.flush()
    escaped = name.encode(encoding, errors="backslashreplace")
    assert shown.buffer.getvalue().startswith(escaped + b": 3 frames in ")
    assert shown.errors == "strict"


def test_the_help_can_be_read_on_a_terminal_of_ascii(monkeypatch):
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    with pytest.raises(SystemExit) as stopped:
        main(["interpolate", "--help"])
    assert stopped.value.code == 0


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ("--size 96", "'96' is no size"),
        ("--size 0x96", "'0x96' is no size"),
        ("--frames many", "invalid int value: 'many'"),
        ("--seed -1", "'-1' is no seed"),
        ("--fps 0", "fps must be between"),
        ("--fps nan", "fps must be between"),
        ("--dtype float8", "invalid choice: 'float8'"),
        ("--device quantum", "the device 'quantum' cannot be used here"),
        ("--model nowhere", "'nowhere' is no file or folder here"),
        ("--model here/model.safetensors", "is no file or folder here"),
        ("--model {photo}", "is a file, but no .safetensors or .ckpt file"),
        ("--sheet sheet.gif", "allowed are .png"),
        ("--flow missing/flow.png", "there is no folder"),
        ("--sheet same.png --flow same.png", "would replace 'same.png'"),
        ("--matches matches.gif", "allowed are .png"),
        ("--matches same.png --flow same.png", "would replace 'same.png'"),
        ("--sources sources.gif", "allowed are .png"),
        ("--sources same.png --flow same.png", "would replace 'same.png'"),
        ("--sources sources.png --detail upsampled", "with 'upsampled' detail it comes from no photo"),
        ("--sources sources.png --preset paper", "with 'upsampled' detail it comes from no photo"),
        ("--compare compare.avi", "allowed are .mp4"),
        ("--compare out.mp4", "would replace 'out.mp4'"),
        ("--compare compare.gif --fps 60", "fps must be between 0.01 and 50 for 'compare.gif'"),
        ("--sheet {photo}", "would replace"),
        ("--surprise", "unrecognized arguments: --surprise"),
    ],
)
def test_bad_options_are_refused_before_the_model_is_looked_for(tmp_path, monkeypatch, capsys, options, reason):
    monkeypatch.chdir(tmp_path)
    Path("out.mp4").write_bytes(b"finished")
    photo = Path(PHOTOS[0]).read_bytes()
    # The default model cannot be had here, so getting as far as loading it would end with another exit code.
    assert reason in refused(capsys, *PHOTOS, "-o", "out.mp4", *options.format(photo=PHOTOS[0]).split())
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"out.mp4": b"finished"}
    assert Path(PHOTOS[0]).read_bytes() == photo


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ("--frames 0", "n_frames"),
        ("--steps 5", "must nest"),
        ("--lora-steps -1", "lora_steps"),
        ("--fusion none", "'two_level', 'two_level_unwarped', 'direct'"),
        ("--flow-from raft", "`flow` must be one of 'features+photos', 'features', not 'raft'"),
        ("--feature-block 9", "feature_block"),
        ("--attention-blocks 9", "attention_blocks"),
        ("--size 8x8", "each side must have at least"),
        ("--prompt a --prompt b --prompt c", "3 entries"),
    ],
)
def test_what_the_pipeline_refuses_is_bad_input_too(tmp_path, capsys, options, reason):
    output = tmp_path / "out.mp4"
    output.write_bytes(b"finished")
    assert reason in refused(capsys, *PHOTOS, "-o", str(output), *TINY, *options.split())
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"finished"]


@pytest.mark.parametrize("output", ["out.avi", "missing/out.mp4", "taken.mp4", "."])
def test_bad_outputs_are_refused(tmp_path, monkeypatch, capsys, output):
    monkeypatch.chdir(tmp_path)
    Path("taken.mp4").mkdir()
    assert f"'{output}'" in refused(capsys, *PHOTOS, "-o", output)


def test_bad_photos_are_refused_by_name(tmp_path, capsys):
    text, cut = tmp_path / "text.png", tmp_path / "cut.png"
    text.write_text("not a picture")
    cut.write_bytes(Path(PHOTOS[0]).read_bytes()[:2000])
    output = ["-o", str(tmp_path / "out.mp4")]
    for bad in (text, cut, tmp_path / "missing.png", tmp_path):
        assert str(bad) in refused(capsys, PHOTOS[0], str(bad), *output)
        assert refused(capsys, str(bad), PHOTOS[1], *output).startswith("photo A ")


def test_pickles_are_read_only_where_allowed(tmp_path, capsys):
    command = ["interpolate", *PHOTOS, *FAST[len(TINY) :], "--device=cpu", "-o", str(tmp_path / "out.gif")]
    single = tmp_path / "model.ckpt"
    single.write_bytes(b"no pickle at all")
    assert main([*command, "--model", str(single)]) == 2
    assert "is a pickle, which can run code" in error_line(capsys.readouterr().err)
    assert main([*command, "--model", str(single), "--allow-pickle"]) == 1
    assert "cannot load the model" in error_line(capsys.readouterr().err)

    folder = shutil.copytree(CHECKPOINT, tmp_path / "model")
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    assert main([*command, "--model", str(folder)]) == 2
    assert "--allow-pickle" in error_line(capsys.readouterr().err)
    assert main([*command, "--model", str(folder), "--allow-pickle"]) == 0


def test_a_folder_with_nothing_but_a_variant_is_loaded(tmp_path):
    folder = shutil.copytree(CHECKPOINT, tmp_path / "model")
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_name("diffusion_pytorch_model.fp16.safetensors"))
    pipe = load_pipeline(str(folder), "float32", "cpu")
    expected = load_pipeline(str(CHECKPOINT), "float32", "cpu")
    assert torch.equal(pipe.unet.conv_in.weight, expected.unet.conv_in.weight)
    assert torch.equal(pipe.vae.quant_conv.weight, expected.vae.quant_conv.weight)


def test_a_folder_of_frames_cannot_replace_the_photos_it_holds(tmp_path, capsys):
    frames = tmp_path / "run"
    write_video([Image.open(photo) for photo in PHOTOS], frames, fps=16)
    photos = [str(path) for path in sorted(frames.iterdir())]
    assert "would replace" in refused(capsys, *photos, "-o", str(frames))


def test_bad_input_as_a_process(tmp_path):
    done = run_process("interpolate", str(tmp_path / "missing.png"), PHOTOS[1], "-o", str(tmp_path / "out.mp4"))
    assert (done.returncode, done.stdout) == (2, "")
    assert "missing.png" in error_line(done.stderr)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("photos", [PHOTOS[:1], PHOTOS], ids=["pair", "sequence"])
def test_a_missing_photo_is_named_without_torch_whose_import_takes_seconds(tmp_path, photos):
    code = "import sys; from dreammover_pipeline.cli.main import main; code = main(sys.argv[1:])"
    code += "; assert 'torch' not in sys.modules; sys.exit(code)"
    command = ["interpolate", *photos, str(tmp_path / "missing.png"), "-o", str(tmp_path / "out.mp4")]
    done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "missing.png) is no existing file" in error_line(done.stderr)


def test_a_hub_out_of_reach_is_one_helpful_line(tmp_path):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    command = ["interpolate", *PHOTOS, "-o", str(tmp_path / "out.mp4")]
    process = forked.program("dreammover_pipeline", command, environment, tmp_path, tmp_path / "log")
    out, errors = process.communicate(timeout=300)
    assert (process.returncode, out) == (1, "")
    line = error_line(errors)
    assert "'stable-diffusion-v1-5/stable-diffusion-v1-5' from the Hugging Face Hub" in line
    assert "--model tiny" in line
    assert not (tmp_path / "out.mp4").exists()


def test_a_folder_that_holds_no_model_fails_in_one_line(tmp_path, capsys):
    assert main(["interpolate", *PHOTOS, "-o", str(tmp_path / "out.mp4"), "--model", str(tmp_path)]) == 1
    assert f"cannot load the model '{tmp_path}'" in error_line(capsys.readouterr().err)


@pytest.mark.skipif(sys.platform == "win32", reason="sends a POSIX signal")
def test_ctrl_c_ends_in_one_line_and_keeps_the_old_video(tmp_path, tmp_path_factory, interruptible):
    output = tmp_path / "out.mp4"
    output.write_bytes(b"finished")
    command = ["interpolate", *PHOTOS, *TINY, "--lora-steps", "9999", "-o", str(output)]
    process = forked.Forked(lambda: main(command), tmp_path_factory.mktemp("process") / "log")
    while process.printed()[1].count("Fitting LoRA") < 2:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert out == ""
    assert errors.splitlines()[-1] == "dreammover: error: interrupted"
    assert "Traceback" not in errors
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"finished"]


def test_version_and_a_missing_command(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"dreammover {__version__}\n"
    assert main([]) == 2
    assert "COMMAND" in error_line(capsys.readouterr().err)


@pytest.mark.parametrize("option", ["clip", "controlnet"])
def test_a_component_that_cannot_be_is_refused_by_its_option(option):
    with pytest.raises(ValueError, match=f"^--{option}: 'typo' is no folder here, and no owner/name"):
        load_pipeline("tiny", None, "cpu", **{option: "typo"})


def test_a_number_with_an_exponent_is_no_option(capsys):
    options = ["--affine", "1", "-1e-3", "0", "0", "--frames", "0"]
    assert main(["interpolate", *PHOTOS, "-o", "a.gif", "--model", "tiny", *options]) == 2
    assert "--affine: expected" not in capsys.readouterr().err
