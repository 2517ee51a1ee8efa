# SPDX-License-Identifier: Apache-2.0
"""Odd inputs by the hundred, drawn from a seed, and the promises that hold whatever they are: docs/reliability.md.

`python -m fuzz.run --seed 0` runs them.
"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # a drawn name of a model is looked for nowhere
os.environ["OMP_NUM_THREADS"] = "1"  # of commands that are run as processes, too

from dreammover_pipeline.cli.loading import pipeline_class

pipeline_class()  # before anything else is imported, because it silences third parties
