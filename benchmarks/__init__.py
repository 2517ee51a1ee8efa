# SPDX-License-Identifier: Apache-2.0
"""What a job costs: counted, measured against its own bare calls, derived. `python benchmarks/run.py` prints it."""

from dreammover_pipeline.cli.loading import pipeline_class

pipeline_class()  # before anything else is imported, because it silences third parties
