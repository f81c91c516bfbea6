"""Several processes give what one gives: tensor, context and data parallelism, on gloo.

Judge: one process on all tokens, heads and rows. The cases stand in tests/*_parallel_cases.py, and
run in processes that are started once for each number of ranks.
"""

from functools import cache

import pytest

from tests.ranks import cases_of, run_cases

pytest.importorskip("torch.distributed")
MODULES = [f"tests.{kind}_parallel_cases" for kind in ("tensor", "context", "data")]


@cache
def results(ranks: int) -> dict[str, str]:
    return run_cases(MODULES, ranks)


def wanted(ranks: int):
    return [pytest.param(ranks, name, id=f"{name}-{ranks}") for name in cases_of(MODULES, ranks)]


@pytest.mark.parametrize(("ranks", "name"), [*wanted(2), *wanted(3), *wanted(4)])
def test_ranks_equal_one_process(ranks, name):
    message = results(ranks)[name]
    assert not message, message
