# SPDX-License-Identifier: Apache-2.0
"""What tests of batches share: rows of manifests, runs of their jobs, and what is there afterwards."""

import json

from dreammover_pipeline.batch.manifest import check_job_outputs, read_manifest
from dreammover_pipeline.batch.run import run
from dreammover_pipeline.batch.sidecar import read_failures
from dreammover_pipeline.batch.worker import Worker

SHORT = {"n_frames": 2, "num_inference_steps": 4, "inversion_steps": 2, "feature_step": 1, "lora_steps": 0}
DEFAULTS = {**SHORT, "seed": 0, "fps": 16}


def pair(letter, **settings):
    return {"img0": f"{letter}0.png", "img1": f"{letter}1.png", "output": f"{letter}", **settings}


def plan(album, *rows, **defaults):
    """The checked jobs of rows."""
    manifest = album / "manifest.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    jobs = read_manifest(manifest, album.parent / "out", {**DEFAULTS, **defaults})
    check_job_outputs(jobs)
    return jobs


def work(pipe, jobs, process=0, processes=1, failures=None):
    """A run of jobs that are in one folder of outputs; how each ended, by name."""
    worker = Worker(pipe, "random", jobs[0].output.parent)
    outcomes = run(worker, jobs, read_failures(jobs) if failures is None else failures, process, processes, quiet=True)
    return {outcome.job.name: outcome for outcome in outcomes}


def statuses(outcomes):
    return {name: outcome.status for name, outcome in outcomes.items()}


def held(folder):
    """What a folder of outputs holds for its user."""
    return sorted(path.name for path in folder.iterdir() if path.name != ".dreammover")


def leftovers(folder):
    return [path for path in folder.rglob("*") if "making-" in path.name or path.name.startswith(".dreammover-")]


class Trouble:
    """A hook on a layer that raises for inputs of one height."""

    def __init__(self, module, error, height):
        self.error, self.height = error, height
        module.register_forward_pre_hook(self)

    def __call__(self, module, inputs):
        if self.height is not None and inputs[0].shape[-2] == self.height:
            raise self.error
