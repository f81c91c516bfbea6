"""What upstream's goldens hold: one table for the tool that writes them and the tests that read.

``OPERATORS``, ``COMPAT``, ``MODULES`` and ``MODELS`` list calls of state-spaces/mamba and of what
it builds on. tools/refresh_goldens.py runs each of them in upstream's own code, the tests in ours.
The ``repr`` of an entry is in the manifest, so that goldens of another table are found out.
"""

from tests.golden_modules import MODELS, MODULES, ModelGolden, ModuleGolden
from tests.golden_operators import (
    COMPAT,
    OPERATORS,
    SIGNATURES,
    CompatGolden,
    OperatorGolden,
    arguments,
    compat_arguments,
)

ALL = (*OPERATORS, *COMPAT, *MODULES, *MODELS)

__all__ = [
    "ALL",
    "COMPAT",
    "MODELS",
    "MODULES",
    "OPERATORS",
    "SIGNATURES",
    "CompatGolden",
    "ModelGolden",
    "ModuleGolden",
    "OperatorGolden",
    "arguments",
    "compat_arguments",
]
