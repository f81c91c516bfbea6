"""One answer however a text is cut, packed or padded: every module and model, at every point.

Judge: every row fed alone and whole (``tests.matrix``); its own judge is the module's test file.
"""

import functools

import pytest
import torch

from tests import matrix
from tests.matrix import SUBJECTS, Problem, Subject, alone
from tests.tolerances import TOLERANCES, assert_close

LENGTH = 6
EXACT = TOLERANCES["matrix", "float64"]
subjects = pytest.mark.parametrize("subject", SUBJECTS, ids=str)
cuts = pytest.mark.parametrize("cut", range(LENGTH + 1))


@pytest.fixture(autouse=True)
def one_thread():
    """So little work is slower on two threads, and much slower where others use the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def gradients(problem: Problem, result) -> list:
    # The part of a layer that only a later token needs has no gradient where there is none.
    found = torch.autograd.grad(result.weighted(), problem.leaves(), allow_unused=True)
    return [
        torch.zeros_like(leaf) if grad is None else grad
        for leaf, grad in zip(problem.leaves(), found, strict=True)
    ]


@functools.cache
def judged(subject: Subject, lengths: tuple[int, ...], fresh: bool = False):
    """The problem, the judge's result and its gradients."""
    problem = Problem.make(subject, lengths, fresh=fresh)
    result = alone(problem)
    return problem, result, gradients(problem, result)


def compare(got, want, tolerance=EXACT) -> None:
    for row, (a, b) in enumerate(zip(got.outputs, want.outputs, strict=True)):
        assert_close(f"output of row {row}", a, b, tolerance)
    for row, (ours, theirs) in enumerate(zip(got.states, want.states, strict=True)):
        for number, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            assert_close(f"state {number} of row {row}", a, b, tolerance)


def check(subject: Subject, lengths, path, fresh: bool = False) -> None:
    """Compare a path with the judge: with gradients, and in place without them."""
    problem, want, want_gradients = judged(subject, tuple(lengths), fresh)
    got = path(problem)
    compare(got, want)
    for number, (a, b) in enumerate(zip(gradients(problem, got), want_gradients, strict=True)):
        assert_close(f"gradient {number}", a, b, EXACT)
    with torch.no_grad():
        compare(path(problem), want)


@subjects
@cuts
def test_chunked_equals_whole(subject, cut):
    check(subject, (LENGTH, LENGTH), matrix.chunked(cut, LENGTH - cut))


@subjects
def test_step_equals_whole(subject):
    check(subject, (LENGTH, LENGTH), matrix.stepped)
    check(subject, (LENGTH, LENGTH), matrix.whole)


@subjects
@cuts
def test_packed_equals_separate(subject, cut):
    check(subject, (cut, LENGTH - cut), matrix.packed())


@subjects
@cuts
def test_packed_in_several_rows_equals_separate(subject, cut):
    check(subject, (cut, LENGTH - cut, LENGTH - 1), matrix.packed((2, 1), ids=True))


@subjects
@cuts
@pytest.mark.parametrize("where", ["left", "right", "holes"])
def test_padded_equals_separate(subject, where, cut):
    check(subject, (cut, LENGTH - cut), matrix.padded(where))
