# SPDX-License-Identifier: Apache-2.0
"""Kill the workers of a batch at random moments and look for anything lost, made twice, or half-written.

    python tests/drills/kill_batch.py [--pairs 20] [--workers 2] [--kills 10] [--seed 0]

Takes minutes, so the test suite does not run it. Pairs are photos cut at random out of the examples. At each moment
one worker, or all of them, get SIGKILL and are started again. Then the whole is made once more by one worker that
nobody disturbs, and must have the same bytes.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import imageio.v3 as iio
from PIL import Image

from dreammover_pipeline.batch.sidecar import digest

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
OPTIONS = ["--model=tiny", "--device=cpu", "--frames=4", "--steps=20", "--inversion-steps=10", "--feature-step=5"]
OPTIONS += ["--lora-steps=10", "--quiet"]


def write_manifest(folder: Path, pairs: int, chance: random.Random) -> Path:
    """Pairs of all three kinds of output, whose last one cannot be read."""
    photos = [Image.open(EXAMPLES / kind / f"{i}.png") for kind in ("fish", "cat", "robot") for i in (0, 1)]
    rows = []
    for n in range(pairs):
        left, top = chance.randrange(32), chance.randrange(32)
        kind = chance.randrange(3)
        for i in (0, 1):
            photos[2 * kind + i].crop((left, top, left + 64, top + 64)).save(folder / f"{n}-{i}.png")
        output = f"{n:02d}{('.mp4', '.gif', '')[n % 3]}"
        rows.append({"img0": f"{n}-0.png", "img1": f"{n}-1.png", "seed": n, "output": output})
    (folder / f"{pairs - 1}-1.png").write_bytes(b"no picture")
    manifest = folder / "pairs.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return manifest


def start(manifest: Path, out: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "dreammover_pipeline", "batch", str(manifest), "-o", str(out), *OPTIONS]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def claims(out: Path) -> set[Path]:
    return set(out.glob(".dreammover/work/*/making-*"))


def committed(out: Path) -> dict[str, str]:
    """The sidecars' texts by name; every one of them has the video that it says."""
    texts = {path.name: path.read_text() for path in out.glob("*.json") if not path.name.endswith(".error.json")}
    for text in texts.values():
        record = json.loads(text)
        if digest(out / record["output"]["name"]) != record["output"]["sha256"]:
            raise SystemExit(f"FAILED: {record['output']['name']} is not the video of its sidecar")
    return texts


def check_nothing_changed(before: dict[str, str], after: dict[str, str]) -> None:
    changed = [name for name, text in before.items() if after.get(name) != text]
    if changed:
        raise SystemExit(f"FAILED: lost or made twice: {changed}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("pairs", 20), ("workers", 2), ("kills", 10), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    chance = random.Random(args.seed)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        manifest = write_manifest(Path(scratch), args.pairs, chance)
        out, calm = Path(scratch) / "out", Path(scratch) / "calm"
        workers = [start(manifest, out) for _ in range(args.workers)]
        seen = {}
        for kill in range(args.kills):
            stale = claims(out)
            while not claims(out) - stale and any(worker.poll() is None for worker in workers):
                time.sleep(0.01)
            time.sleep(chance.uniform(0, 4))
            victims = chance.choice([[n] for n in range(args.workers)] + [list(range(args.workers))])
            alive = [n for n in victims if workers[n].poll() is None]
            for n in alive:
                workers[n].kill()
                workers[n].wait()
            now = committed(out)
            check_nothing_changed(seen, now)
            seen = now
            print(
                f"kill {kill + 1}: workers {alive}, {len(seen)} done, {len(claims(out))} at hand or left", flush=True
            )
            for n in victims:
                workers[n] = start(manifest, out)
        codes = []
        for worker in workers:
            worker.communicate()
            codes.append(worker.returncode)
        done = committed(out)
        check_nothing_changed(seen, done)
        lines = [json.loads(line) for line in (out / ".dreammover" / "journal.jsonl").read_text().splitlines()]
        made = [line["request"] for line in lines if line["status"] == "done"]
        failed = sorted(path.name for path in out.glob("*.error.json"))
        left = [str(path) for path in out.rglob("*") if "making-" in path.name or path.name.startswith(".dreammover-")]
        print(f"exit codes {codes}; {len(done)} done, {failed} failed; {len(made)} journal lines of videos made,")
        print(f"{len(made) - len(set(made))} of them twice; left over: {left}")
        if codes != [1] * args.workers or len(done) != args.pairs - 1 or len(failed) != 1:
            raise SystemExit("FAILED: pairs are missing")
        if len(made) > len(set(made)) or left:
            raise SystemExit("FAILED: something was made twice or left over")
        calm_worker = start(manifest, calm)
        calm_worker.communicate()
        for text in committed(calm).values():
            output = json.loads(text)["output"]
            video = out / output["name"]
            frames = len(list(video.iterdir())) if video.is_dir() else len(iio.imread(video))
            if digest(video) != output["sha256"] or frames != 6:
                raise SystemExit(f"FAILED: '{video.name}' differs from the one that was made undisturbed")
        print(f"all {len(done)} have the bytes of an undisturbed run; {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
