"""``python -m ssm`` is ``ssm-models``."""

import sys

from ssm.cli import main

if __name__ == "__main__":
    sys.exit(main())
