# SPDX-License-Identifier: Apache-2.0
"""Evaluations for tests: real ones by two methods that are cheap, and made-up ones with given figures."""

from dreammover_pipeline.evaluation.networks import Tools, dis_flow
from dreammover_pipeline.evaluation.run import RunFile, header, run

TOOLS = Tools(dis_flow, None, None, {"lpips": "no weights", "fid": "no weights"})
CHEAP = ["crossfade", "vae_of_truth"]
HEADER = {"suites": {"same": {}}, "seed": 0, "settings": {}}


def evaluated(pipe, folder, suites, methods=CHEAP, seed=0):
    file = RunFile.start(folder, header(pipe, "random", suites, seed, {}, "dis", TOOLS))
    run(pipe, suites, methods, file, TOOLS, quiet=True)
    return file


def synthetic_run(folder, values, suites=("same",)):
    """A run in which each method has the PSNR that `values` says, one for each pair."""
    file = RunFile.start(folder, HEADER | {"suites": {name: {} for name in suites}})
    for suite in suites:
        for method, numbers in values.items():
            for index, number in enumerate(numbers):
                metrics = {"psnr": number, "ssim": None}
                file.append({"suite": suite, "pair": str(index), "method": method, "metrics": metrics})
    return file
