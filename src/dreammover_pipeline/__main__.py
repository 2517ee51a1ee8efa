# SPDX-License-Identifier: Apache-2.0
"""`python -m dreammover_pipeline`, the same as the command `dreammover`."""

import sys

from .cli.main import main

sys.exit(main())
