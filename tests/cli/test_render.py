# SPDX-License-Identifier: Apache-2.0
"""`dreammover interpolate --save-pair` and `dreammover render`, in process, on the embedded checkpoint."""

import argparse
import inspect
import json
import os
from pathlib import Path

import pytest
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.pages import EXAMPLES

from dreammover_pipeline import DreamMoverPipeline
from dreammover_pipeline.cli.main import main
from dreammover_pipeline.cli.options import add_method_options
from dreammover_pipeline.media.correspondences import matches_picture
from dreammover_pipeline.media.pictures import picture_of
from dreammover_pipeline.storage import read_pair
from dreammover_pipeline.tiny import CHECKPOINT

pytestmark = pytest.mark.usefixtures("restored_logging")

PHOTOS = [str(EXAMPLES / "fish" / f"{i}.png") for i in (0, 1)]
TINY = ["--model", "tiny", "--device", "cpu", "--quiet"]
RENDERING = ["--frames=3", "--fusion=two_level_unwarped", "--attention-blocks", "2"]
PREPARING = ["--steps=10", "--inversion-steps=4", "--feature-step=3", "--lora-steps=1", "--prompt=a fish"]


@pytest.fixture(scope="module")
def prepared(restored_logging, tmp_path_factory):
    """A folder with a prepared pair and the frames that were made along with it."""
    folder = tmp_path_factory.mktemp("prepared")
    outputs = ["-o", str(folder / "frames"), "--save-pair", str(folder / "pair.safetensors")]
    assert main(["interpolate", *PHOTOS, *TINY, *PREPARING, *RENDERING, *outputs]) == 0
    assert sorted(path.name for path in folder.iterdir()) == ["frames", "pair.safetensors"]
    return folder


@pytest.fixture
def pair(prepared):
    return str(prepared / "pair.safetensors")


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def refused(capsys, *arguments):
    """Run bad input; what is said about it."""
    assert main(list(arguments)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    return line


def test_keeping_the_pair_changes_no_frame(prepared, tmp_path):
    assert main(["interpolate", *PHOTOS, *TINY, *PREPARING, *RENDERING, "-o", str(tmp_path / "frames")]) == 0
    assert contents(tmp_path / "frames") == contents(prepared / "frames")


def test_a_kept_pair_gives_the_same_frames_again(prepared, pair, tmp_path, capsys):
    assert main(["render", pair, *TINY, *RENDERING, "-o", str(tmp_path / "frames")]) == 0
    assert contents(tmp_path / "frames") == contents(prepared / "frames")
    assert capsys.readouterr().err == ""


def test_a_kept_pair_gives_other_videos(pair, tmp_path, capsys):
    names = ["compare.gif", "flow.png", "matches.png", "out.gif", "sheet.png", "sources.jpg"]
    compare, flow, matches, out, sheet, sources = [str(tmp_path / name) for name in names]
    options = ["--frames=1", "--fps=20", "--sheet", sheet, "--flow", flow, "--matches", matches, "--compare", compare]
    options += ["--sources", sources]
    guidance = ["--guidance-scale=2", "--negative-prompt=a cat"]
    assert main(["render", pair, *TINY, *options, *guidance, "-o", out]) == 0
    assert capsys.readouterr().out.startswith(f"{out}: 3 frames in ")
    for path, size in ((out, (128, 128)), (compare, (280, 164))):
        with Image.open(path) as gif:
            assert (gif.size, gif.n_frames, gif.info["duration"]) == (size, 3, 50)
    assert sorted(path.name for path in tmp_path.iterdir()) == names


@pytest.mark.parametrize("motion", ["rigid", "straight"])
def test_the_matches_show_the_way_that_the_frames_take(pair, tmp_path, motion):
    out, matches = str(tmp_path / "out.gif"), str(tmp_path / "matches.png")
    assert main(["render", pair, *TINY, "--frames=1", "--motion", motion, "--matches", matches, "-o", out]) == 0
    read, _ = read_pair(pair, "cpu")
    photos = [picture_of(image) for image in read.images]
    expected = matches_picture(*photos, read.flow, read.canvas, motion)
    with Image.open(matches) as picture:
        assert picture.tobytes() == expected.tobytes()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ("--save-pair pair.pt", "'pair.pt' ends in '.pt'; allowed are .safetensors"),
        ("--save-pair missing/pair.safetensors", "there is no folder"),
        ("--save-pair taken.safetensors", "there is a folder of that name"),
        ("--save-pair out/pair.safetensors", "would replace"),
        ("--save-pair pair.safetensors --fusion none", "'two_level'"),
        ("--save-pair pair.safetensors --frames 0", "n_frames"),
        ("--save-pair pair.safetensors --lora-rank 0", "lora_rank"),
    ],
)
def test_what_cannot_be_kept_or_rendered_is_refused_before_preparing(tmp_path, monkeypatch, capsys, options, reason):
    monkeypatch.chdir(tmp_path)
    Path("taken.safetensors").mkdir()
    Path("out").mkdir()
    assert reason in refused(capsys, "interpolate", *PHOTOS, *TINY, "-o", "out", *options.split())
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["out", "taken.safetensors"]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ("--steps 10", "unrecognized arguments: --steps 10"),
        ("--lora-steps 0", "unrecognized arguments: --lora-steps 0"),
        ("--prompt fish", "unrecognized arguments: --prompt fish"),
        ("--size 64x64", "unrecognized arguments: --size 64x64"),
        ("--seed x", "is no seed"),
        ("--frames 0", "n_frames"),
        ("--fusion none", "'two_level'"),
        ("--sheet {pair}", "allowed are .png"),
        ("--fps 0", "fps must be between"),
        ("--model nowhere", "'nowhere' is no file or folder here"),
    ],
)
def test_options_that_do_not_apply_are_refused(pair, tmp_path, capsys, options, reason):
    output = ["-o", str(tmp_path / "out.mp4")]
    assert reason in refused(capsys, "render", pair, *TINY, *output, *options.format(pair=pair).split())
    assert not list(tmp_path.iterdir())


def test_a_pair_is_not_replaced_by_what_is_made_of_it(pair, tmp_path, capsys):
    copy = tmp_path / "copy.png"
    copy.write_bytes(Path(pair).read_bytes())
    outputs = ["-o", str(tmp_path / "out.mp4"), "--sheet", str(copy)]
    assert "would replace" in refused(capsys, "render", str(copy), *TINY, *outputs)
    assert copy.read_bytes() == Path(pair).read_bytes()


def test_files_that_are_no_pair_are_refused_before_the_model_is_loaded(pair, tmp_path, capsys):
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(Path(pair).read_bytes()[:-1])
    weights = CHECKPOINT / "vae" / "diffusion_pytorch_model.safetensors"
    output = ["-o", str(tmp_path / "out.mp4")]  # and the default model, which cannot be had here
    assert "cut.safetensors' is no whole safetensors file" in refused(capsys, "render", str(cut), *output)
    assert "holds no prepared pair" in refused(capsys, "render", str(weights), *output)
    assert "is a pipe, a socket or a device" in refused(capsys, "render", os.devnull, *output)
    assert "is no existing file" in refused(capsys, "render", str(tmp_path / "missing.safetensors"), *output)


def test_a_pair_of_another_model_is_refused(pair, tmp_path, capsys):
    other = tmp_path / "other.safetensors"
    with safe_open(pair, framework="pt") as file:
        header = json.loads(file.metadata()["dreammover_pair"])
    header["fingerprints"]["vae"] = "0" * 64
    save_file(load_file(pair), other, {"dreammover_pair": json.dumps(header)})
    reason = refused(capsys, "render", str(other), *TINY, "-o", str(tmp_path / "out.mp4"))
    assert "was prepared with another vae" in reason


def test_render_has_the_options_of_its_stage():
    parser = argparse.ArgumentParser()
    add_method_options(parser, rendering_only=True)
    offered = {action.dest for action in parser._actions if action.dest != "help"}
    everything = argparse.ArgumentParser()
    add_method_options(everything)
    stage = inspect.signature(DreamMoverPipeline.render).parameters
    assert offered == {action.dest for action in everything._actions if action.dest in stage}
