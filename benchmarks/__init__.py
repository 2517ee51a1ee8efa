# SPDX-License-Identifier: Apache-2.0
"""What a run of the pipeline costs, as tables that `python benchmarks/run.py` prints.

Costs are counted, measured beside bare calls of the models, or derived from both.
"""

from dreammover_pipeline.cli.loading import pipeline_class

pipeline_class()  # before anything else is imported, because it silences third parties
