"""`python -m ssm_kernels` is the console script `ssm-kernels`."""

import sys

from .cli import main

sys.exit(main())
