"""Settings for every test: where the packages are found, the seeds, and --run-goldens."""

import importlib.util
import os
import random
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent
BUILD = ROOT / "build/packages/ssm-kernels/python"
SEED = 20240531

# Behind PYTHONPATH, before site-packages: `meson test` names its own build tree, and a bare
# `pytest` should test this checkout and not an installed package.
_named = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p in sys.path]
_first = max((sys.path.index(p) for p in _named), default=-1) + 1
for _folder in (ROOT / "packages/ssm-models/src", BUILD):
    if str(_folder) not in sys.path:
        sys.path.insert(_first, str(_folder))
        _named.append(str(_folder))
os.environ["PYTHONPATH"] = os.pathsep.join(_named)  # for the processes that tests start


def _is_built() -> bool:
    spec = importlib.util.find_spec("ssm_kernels")
    folders = spec.submodule_search_locations if spec else ()
    return any(path for folder in folders for path in Path(folder).glob("_cpu*.so"))


def pytest_addoption(parser: pytest.Parser) -> None:
    """Register --run-goldens and the clones that it can refresh from."""
    parser.addoption(
        "--run-goldens",
        action="store_true",
        help="also run the tests marked `goldens`: all backends against upstream's tensors",
    )
    for name in ("mamba", "conv", "rotary"):
        parser.addoption(
            f"--{name}-repo",
            metavar="CLONE",
            help="with --run-goldens, also refresh upstream's goldens elsewhere and compare",
        )


def pytest_configure(config: pytest.Config) -> None:
    """Register the markers."""
    config.addinivalue_line("markers", "goldens: comparison with upstream; --run-goldens")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip the tests marked `goldens` unless they were asked for."""
    if not config.getoption("--run-goldens"):
        for item in items:
            if "goldens" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs --run-goldens"))


def pytest_report_header() -> list[str]:
    """Say so when the library was not built yet."""
    if _is_built():
        return []
    return [f"ssm_kernels is not built (looked in {BUILD}): run `python3 tools/dev.py build` first"]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Repeat it where a failed run is read: at the end."""
    red = any(terminalreporter.stats.get(outcome) for outcome in ("error", "failed"))
    if red and not _is_built():
        terminalreporter.write_line(pytest_report_header()[0], red=True, bold=True)


@pytest.fixture(autouse=True)
def _seeds() -> None:
    """Start every test from the same random numbers, whatever ran before it."""
    random.seed(SEED)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(SEED)
    # tests/kernels must stay free of torch, so this only follows a test module that imported it.
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(SEED)
