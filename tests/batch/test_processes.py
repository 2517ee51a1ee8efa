# SPDX-License-Identifier: Apache-2.0
"""The commands `dreammover batch` and `dreammover again`, as processes where these are killed or launched together."""

import json
import shlex
import time
from pathlib import Path

import pytest
from accelerate import PartialState
from accelerate.commands import launch
from support.forked import Forked
from support.pages import EXAMPLES, printed, smaller

from dreammover_pipeline.batch.manifest import read_manifest
from dreammover_pipeline.batch.sidecar import digest
from dreammover_pipeline.cli.loading import MODELS
from dreammover_pipeline.cli.main import main

SHORT = ["--frames=2", "--steps=4", "--inversion-steps=2", "--feature-step=1", "--lora-steps=2"]
OPTIONS = ["--model=tiny", "--device=cpu", *SHORT]
SMALL = "--size=64x64"  # as large as the photos, which takes a third of the time

pytestmark = pytest.mark.usefixtures("restored_logging")


@pytest.fixture(autouse=True)
def _no_process_state():
    yield
    PartialState._reset_state()


@pytest.fixture
def manifest(tmp_path, photos):
    """Five pairs of 64 pixels, the fourth of which cannot be read."""
    for i, photo in enumerate(photos):
        photo.save(tmp_path / f"{i}.png")
    (tmp_path / "bad.png").write_bytes(b"no picture")
    rows = [{"img0": "0.png", "img1": "1.png", "output": f"v{i}.mp4", "seed": i} for i in range(5)]
    rows[3]["img1"] = "bad.png"
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def start(manifest):
    """Starts a worker with more options; at the end, none is left."""
    workers = []

    def started(*options):
        command = ["batch", str(manifest), "-o", str(manifest.parent / "out"), *OPTIONS, *options]
        workers.append(Forked(lambda: main(command), manifest.parent / f"worker_{len(workers)}"))
        return workers[-1]

    yield started
    for worker in workers:
        worker.kill()
        worker.communicate()


def sidecars(out):
    return {path.name: path.read_text() for path in out.glob("*.mp4.json")}


def wait_for(condition, worker):
    while not condition():
        assert worker.poll() is None
        time.sleep(0.05)


def check_all_done_once(out):
    """Every pair that can be made is there, whole, and was committed by one process once; nothing else is left."""
    done = sidecars(out)
    assert sorted(done) == [f"v{i}.mp4.json" for i in (0, 1, 2, 4)]
    for text in done.values():
        record = json.loads(text)
        assert digest(out / record["output"]["name"]) == record["output"]["sha256"]
    lines = [json.loads(line) for line in (out / ".dreammover" / "journal.jsonl").read_text().splitlines()]
    made = [line["request"] for line in lines if line["status"] == "done"]
    assert len(made) == len(set(made))
    assert set(made) <= {json.loads(text)["request"] for text in done.values()}
    assert sorted(path.name for path in out.iterdir() if path.name != ".dreammover") == sorted(
        [*done, *(name.removesuffix(".json") for name in done), "v3.mp4.error.json"]
    )
    work = out / ".dreammover" / "work"
    assert {path.name for folder in work.iterdir() for path in folder.iterdir()} == {"lock"}


def test_killed_workers_lose_nothing_and_make_nothing_twice(manifest, start):
    out = manifest.parent / "out"
    workers = [start() for _ in range(2)]
    wait_for(lambda: sidecars(out), workers[0])
    for worker in workers:
        worker.kill()
        worker.communicate()
    before = sidecars(out)
    assert 1 <= len(before) <= 3
    (out / ".dreammover" / "work" / "v4.mp4").mkdir(exist_ok=True)
    (out / ".dreammover" / "work" / "v4.mp4" / "making-left").mkdir()
    worker = start("--quiet")
    table, errors = worker.communicate()
    assert worker.returncode == 1, errors
    assert "1 of 5 pairs failed" in errors
    assert len(errors.splitlines()) == 1
    assert len(table.splitlines()) == 1 + 5 + 1
    after = sidecars(out)
    assert {name: after[name] for name in before} == before
    check_all_done_once(out)


def test_a_terminated_worker_abandons_its_pair(manifest, start):
    out = manifest.parent / "out"
    worker = start()
    wait_for(lambda: list(out.glob(".dreammover/work/*/making-*")), worker)
    worker.terminate()
    _, errors = worker.communicate()
    assert worker.returncode == 143
    assert "Traceback" not in errors
    assert not list(out.glob(".dreammover/work/*/making-*"))
    assert {path.suffix for path in out.iterdir() if path.is_file()} <= {".mp4", ".json"}


def test_accelerate_spreads_the_pairs(manifest):
    out = manifest.parent / "out"
    command = ["--multi_gpu", "--num_processes=2", "--main_process_port=0"]
    command += ["-m", "dreammover_pipeline", "batch", str(manifest), "-o", str(out), *OPTIONS, SMALL]
    arguments = launch.launch_command_parser().parse_args(command)
    launcher = Forked(lambda: launch.launch_command(arguments), manifest.parent / "launcher")
    table, errors = launcher.communicate()
    assert launcher.returncode == 1, errors
    table = table.splitlines()
    assert table[-1].startswith("5 pairs: 4 done, 0 skipped, 1 failed"), errors
    assert len(table) == 1 + 5 + 1  # of the main process alone
    check_all_done_once(out)
    assert len({json.loads(text)["process"]["pid"] for text in sidecars(out).values()}) == 2


def test_the_videos_are_those_of_interpolate_and_a_sidecar_makes_them_again(manifest, capsys):
    folder = manifest.parent
    photos = [str(folder / "0.png"), str(folder / "1.png")]
    row = {"img0": "0.png", "img1": "1.png", "prompt": "a fish", "seed": 7, "fusion": "direct"}
    manifest.write_text("".join(json.dumps({**row, "output": name}) + "\n" for name in ("v.mp4", "v")))
    one, many, again = folder / "one", folder / "many", folder / "again"
    one.mkdir()
    options = [*OPTIONS, SMALL]
    typed = [*options, "--prompt", "a fish", "--seed=7", "--fusion=direct", "--quiet"]
    for name in ("v.mp4", "v"):
        assert main(["interpolate", *photos, "-o", str(one / name), *typed]) == 0
    assert main(["batch", str(manifest), "-o", str(many), *options, "--fusion=two_level"]) == 0
    captured = capsys.readouterr()
    assert "2 pairs: 2 done, 0 skipped, 0 failed" in captured.out
    assert "Pairs: 100%" in captured.err
    for bar in ("Fitting", "Denoising"):
        assert bar not in captured.err
    assert main(["again", str(many / "v.mp4.json"), str(many / "v.json"), "-o", str(again), "--quiet"]) == 0
    assert capsys.readouterr().err == ""
    for name in ("v.mp4", "v"):
        assert digest(one / name) == digest(many / name) == digest(again / name)


def test_what_is_refused_is_one_line_before_the_model_is_looked_for(manifest, capsys):
    # The default model cannot be had here, so getting as far as loading it would end with another exit code.
    out = str(manifest.parent / "out")
    sidecar = manifest.parent / "v.json"
    for arguments, reason in [
        (["batch", str(manifest.parent / "missing.csv"), "-o", out], "cannot be read"),
        (["batch", str(manifest), "-o", out, "--fps=0"], "line 1 and all others: `fps`"),
        (["batch", str(manifest), "-o", out, "--device=quantum"], "cannot be used here"),
        (
            ["batch", str(manifest), "-o", str(manifest)],
            f"line 1 and all others: the folder '{manifest}' cannot be made: File exists",
        ),
        (
            ["batch", str(manifest), "-o", out, "--lora-cache", str(manifest)],
            f"--lora-cache: the folder '{manifest}' cannot be made: File exists",
        ),
        (["batch", str(manifest)], "-o/--output"),
        (["again", str(sidecar), "-o", out], "is no existing file"),
    ]:
        assert main(arguments) == 2, arguments
        captured = capsys.readouterr()
        assert captured.out == ""
        (line,) = captured.err.splitlines()
        assert reason in line
    assert main(["batch", str(manifest), "-o", out, *OPTIONS, "--attention-blocks=9"]) == 2
    assert "line 1 and all others: `attention_blocks`" in capsys.readouterr().err
    assert not sidecars(Path(out))


@pytest.mark.parametrize("command", ["batch", "again"])
def test_help(capsys, command):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    text = capsys.readouterr().out
    assert "--lora-cache" in text
    assert ("--lora-steps" in text and "(default: 80)" in text) is (command == "batch")


def test_the_page_runs_as_printed(tmp_path, monkeypatch, capsys):
    (lines,), (table,), (commands,) = (printed("docs/batch.md", kind) for kind in ("jsonl", "csv", "bash"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(MODELS, "tiny", str(smaller(tmp_path / "model")))
    Path("examples").symlink_to(EXAMPLES)
    Path("pairs.jsonl").write_text(lines)
    for command in commands.splitlines():
        program, *arguments = shlex.split(command)
        assert program == "dreammover"
        shorter = SHORT if arguments[0] == "batch" else []
        assert main([*arguments, *shorter, "--quiet"]) == 0, capsys.readouterr().err
    for name in ("videos/fish.mp4", "videos/fish.mp4.json", "videos/cats/cat.gif", "videos/.dreammover/journal.jsonl"):
        assert Path(name).is_file()
    assert digest(Path("videos/fish.mp4")) == digest(Path("again/fish.mp4"))
    Path("pairs.csv").write_text(table)
    jobs = read_manifest("pairs.csv", Path("videos"), {"seed": 0, "fps": 16})
    assert [(job.name, job.settings["times"], job.settings["seed"]) for job in jobs] == [
        ("beach.mp4", [0.25, 0.5, 0.75], 7),
        ("lion", None, 0),
    ]
