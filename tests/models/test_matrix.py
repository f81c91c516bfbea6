"""One answer however a text is cut, packed or padded: every module and model, at every point.

Judge: every row fed alone and whole (``tests.matrix``); its own judge is the module's test file.
"""

import functools

import pytest
import torch

from tests import matrix
from tests.matrix import SUBJECTS, Problem, Subject
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
def judged(subject: Subject, lengths: tuple[int, ...], groups: tuple[int, ...] = ()):
    """The problem, the judge's result and its gradients."""
    problem = Problem.make(subject, lengths)
    result = matrix.alone_in_groups(groups)(problem) if groups else matrix.alone(problem)
    return problem, result, gradients(problem, result)


def largest(tensor) -> float:
    """The largest number of a tensor, for errors in units of it; 1 where there is none."""
    found = float(tensor.detach().abs().max()) if tensor.numel() else 0.0
    return found or 1.0


def compare(got, want, tolerance=EXACT) -> None:
    """Compare outputs and states, every tensor in units of its largest number."""
    pairs = [
        (f"output of row {row}", a, b)
        for row, (a, b) in enumerate(zip(got.outputs, want.outputs, strict=True))
    ]
    pairs += [
        (f"state {number} of row {row}", a, b)
        for row, (ours, theirs) in enumerate(zip(got.states, want.states, strict=True))
        for number, (a, b) in enumerate(zip(ours, theirs, strict=True))
    ]
    for name, a, b in pairs:
        scale = largest(b)
        assert_close(name, a.double() / scale, b.double() / scale, tolerance)


def compare_gradients(problem, got, want, tolerance=EXACT) -> None:
    for leaf, a, b in zip(problem.leaves(), got, want, strict=True):
        assert a.dtype == leaf.dtype
        scale = largest(b)
        assert_close(f"gradient {tuple(leaf.shape)}", a / scale, b / scale, tolerance)


def check(subject: Subject, lengths, path, groups=()) -> None:
    """Compare a path with the judge: with gradients, and in place without them."""
    problem, want, want_gradients = judged(subject, tuple(lengths), groups)
    got = path(problem)
    compare(got, want)
    compare_gradients(problem, gradients(problem, got), want_gradients)
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
@pytest.mark.parametrize("cut", [0, 1, 2, 6, 7, 8])
def test_numbered_equals_separate(subject, cut):
    """Sequences by ``seq_idx`` alone; a cut at their boundary would join the two beside it."""
    groups = (3, 2)
    check(subject, (3, 1, 4, 5, 3), matrix.numbered(cut, groups), groups)


@subjects
@cuts
@pytest.mark.parametrize("where", ["left", "right", "holes"])
def test_padded_equals_separate(subject, where, cut):
    check(subject, (cut, LENGTH - cut), matrix.padded(where))


@subjects
@pytest.mark.parametrize("cut", [0, 2])
@pytest.mark.parametrize("where", ["left", "right", "holes"])
def test_padded_steps_equal_separate(subject, where, cut):
    """Token by token, as a batch of which some rows are finished is decoded."""
    check(subject, (cut, LENGTH - cut), matrix.padded(where, steps_alone=True))


PATHS = {
    "whole": ((5, 5), matrix.whole),
    "chunked": ((5, 5), matrix.chunked(2, 3)),
    "stepped": ((5, 5), matrix.stepped),
    "packed": ((2, 5), matrix.packed()),
    "padded": ((2, 5), matrix.padded("holes")),
}


@subjects
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_low_precision_is_near_float64(subject, path, dtype):
    """Judge: the rows alone in float64, from the same rounded parameters and inputs."""
    lengths, run = PATHS[path]
    problem = Problem.make(subject, lengths, getattr(torch, dtype))
    exact = problem.double()
    want, got = matrix.alone(exact), run(problem)
    compare(got, want, TOLERANCES["matrix", dtype])
    with torch.no_grad():
        compare(run(problem), want, TOLERANCES["matrix", dtype])
    tolerance = TOLERANCES["matrix_bwd", dtype]
    compare_gradients(problem, gradients(problem, got), gradients(exact, want), tolerance)
