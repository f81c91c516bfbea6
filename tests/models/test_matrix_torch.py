"""What PyTorch users rely on, for every module and model: threads, batches, TBPTT, compile, export.

Judge: the same call with one thread, one row, the whole text, or without the compiler.
"""

import math

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from ssm.state import State
from ssm.utils.dispatch import implementation
from tests.matrix import SUBJECTS, VOCAB, Subject, read_state
from tests.tolerances import TOLERANCES, assert_close

EXACT = TOLERANCES["matrix", "float64"]
subjects = pytest.mark.parametrize("subject", SUBJECTS, ids=str)
PRECISIONS = [(s, torch.float32) for s in SUBJECTS]
PRECISIONS += [(s, torch.bfloat16) for s in SUBJECTS if not s.tokens]
COMPILED = [s for s in SUBJECTS if s.name in ("mamba1", "mamba2", "mha_options", "lm_hybrid")]
models = pytest.mark.parametrize("subject", [s for s in SUBJECTS if s.tokens], ids=str)


@pytest.fixture(autouse=True)
def threads():
    """Start with one thread, which is faster for so little work, and leave things as they were."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class TokenByToken(torch.autograd.Function):
    """x W^T, one matrix-vector product per token, by one thread: sums of one order."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return each(weight, x)

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        dweight = torch.zeros_like(weight)
        for a, b in zip(dy.flatten(0, -2), x.flatten(0, -2), strict=True):
            dweight += torch.outer(a, b)
        return each(weight.t().contiguous(), dy), dweight


def each(weight, x):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    y = [weight @ row for row in x.reshape(-1, x.shape[-1]).contiguous()]
    torch.set_num_threads(before)
    return torch.stack(y).view(*x.shape[:-1], -1) if y else x.new_zeros(*x.shape[:-1], len(weight))


class Projection(nn.Module):
    """Stands in for a linear: a GEMM of torch may round differently with the number of rows."""

    def __init__(self, linear):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x):
        y = TokenByToken.apply(x, self.weight)
        return y if self.bias is None else y + self.bias


def without_gemm(module) -> nn.Module:
    """Replace every linear, so that what is left is ours."""
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, Projection(child))
        else:
            without_gemm(child)
    return module


def gradients(subject, module, x, y, state=None) -> list:
    total = y.square().sum()
    for row in [] if state is None else read_state(state):
        total = total + sum(t.square().sum() for t in row if t.is_floating_point())
    leaves = [*([] if subject.tokens else [x]), *module.parameters()]
    return list(torch.autograd.grad(total, leaves, allow_unused=True))


def same(first, second) -> list[int]:
    """Return the numbers of the tensors that differ in a bit."""
    return [
        i
        for i, (a, b) in enumerate(zip(first, second, strict=True))
        if not (a is None and b is None) and not torch.equal(a, b)
    ]


@pytest.mark.parametrize(("subject", "dtype"), PRECISIONS, ids=str)
def test_threads_agree(subject, dtype):
    module = without_gemm(subject.make(dtype))
    x = subject.inputs(3, 70, dtype=dtype)

    def run():
        state = module.allocate_state(3)
        y = subject.call(module, x, state=state)
        states = [t for row in read_state(state) for t in row]
        return [y, *states, *gradients(subject, module, x, y, state)]

    want = run()
    for threads in (2, 3, 8):
        torch.set_num_threads(threads)
        assert not same(run(), want), threads


@pytest.mark.parametrize(("subject", "dtype"), PRECISIONS, ids=str)
def test_row_does_not_depend_on_the_batch(subject, dtype):
    module = without_gemm(subject.make(dtype))
    x = subject.inputs(8, 9, dtype=dtype)
    state = module.allocate_state(8)
    y = subject.call(module, x, state=state)
    with torch.no_grad():
        later = subject.call(module, x[:, :1], state=state)
    for row in (0, 5):
        own = module.allocate_state(1)
        alone = x[row : row + 1]
        assert torch.equal(subject.call(module, alone, state=own)[0], y[row])
        with torch.no_grad():
            assert torch.equal(subject.call(module, alone[:, :1], state=own)[0], later[row])
        assert not same(read_state(own)[0], read_state(state)[row])


@subjects
@pytest.mark.parametrize("how", ["cu_seqlens", "seq_idx"])
def test_packed_neighbour_does_not_matter(subject, how):
    """Not one bit of a sequence changes with the content of the one before or behind it."""
    module, x = subject.make(torch.float32), subject.inputs(1, 12, dtype=torch.float32)
    x, other = x.detach().clone(), subject.inputs(1, 12, 9, torch.float32).detach()
    numbers = {
        "cu_seqlens": torch.tensor([0, 4, 9, 12]),
        "seq_idx": torch.tensor([[0] * 4 + [1] * 5 + [2] * 3]),
    }
    want = subject.call(module, x, **{how: numbers[how]})
    x[:, :4], x[:, 9:] = other[:, :4], other[:, 9:]
    got = subject.call(module, x, **{how: numbers[how]})
    assert torch.equal(got[:, 4:9], want[:, 4:9])
    assert not torch.equal(got[:, :4], want[:, :4])


@subjects
def test_truncated_backpropagation(subject):
    """``detach`` between segments gives the gradients of each segment from a constant state."""
    module, x = subject.make(), subject.inputs(2, 6)
    parts = x.split(2, dim=1)

    def loss(detach):
        state, total = module.allocate_state(2), 0
        for part in parts:
            total = total + subject.call(module, part, state=state).square().sum()
            if detach:
                state.detach()
        return total

    def own(number):
        state = module.allocate_state(2)
        with torch.no_grad():
            for part in parts[:number]:
                subject.call(module, part, state=state)
        return subject.call(module, parts[number], state=state).square().sum()

    def grads(total):
        found = torch.autograd.grad(total, list(module.parameters()), allow_unused=True)
        return [torch.zeros(()) if g is None else g for g in found]

    whole = grads(subject.call(module, x).square().sum())
    segments = [grads(own(number)) for number in range(3)]
    for full, carried, cut, *single in zip(
        whole, grads(loss(False)), grads(loss(True)), *segments, strict=True
    ):
        assert_close("carried", carried, full, EXACT)
        assert_close("truncated", cut, sum(single), EXACT)
    assert any((a - b).abs().max() > 1e-3 for a, b in zip(whole, grads(loss(True)), strict=True))


def needs_kernel(subject) -> None:
    """Skip where the reference serves Mamba-2: its loop over chunks is unrolled by a tracer."""
    if "mamba2" in subject.name or "hybrid" in subject.name:
        origin = implementation("ssd_chunk_scan", torch.zeros(1)).__module__
        if origin.startswith("ssm.ops.python"):
            pytest.skip("ssd_chunk_scan has no kernel here")


@pytest.mark.parametrize("subject", COMPILED, ids=str)
def test_compiles_once_for_every_length(subject):
    """fullgraph, forward and backward, from a state and with padding."""
    needs_kernel(subject)
    module = subject.make()
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def call(x, mask):
        state = module.allocate_state(2)
        y = subject.call(module, x, state=state, attention_mask=mask)
        return y.masked_fill(~mask[..., None], 0), state.key_value_memory_dict

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend=counter)
    for length in (7, 12, 5):
        x = subject.inputs(2, length)
        mask = (torch.arange(length) != 2).expand(2, length)
        results = []
        for function in (call, compiled):
            y, states = function(x, mask)
            # Without a look at the mask, the compiler makes room for more than is used.
            held = [t for row in read_state(State(states, 2)) for t in row]
            results.append([y, *held, *gradients(subject, module, x, y)])
        for a, b in zip(*results, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                assert_close("compiled", b, a, EXACT)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("subject", COMPILED, ids=str)
def test_compiles_with_a_state_of_any_rows(subject):
    """A state that comes from outside has a symbolic size of its own."""
    needs_kernel(subject)
    module = subject.make()
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="eager")
    with torch.no_grad():
        for rows in (2, 3):
            x, states = subject.inputs(rows, 5), [module.allocate_state(rows) for _ in range(2)]
            for part in x.split([4, 1], dim=1):
                got, want = (
                    subject.call(function, part, state=state)
                    for function, state in zip((compiled, module), states, strict=True)
                )
                assert_close("compiled", got, want, EXACT)


class Called(nn.Module):
    """A subject as one module, called as its rows of the matrix call it."""

    def __init__(self, subject, module):
        super().__init__()
        self.subject, self.inner = subject, module

    def forward(self, x):
        return self.subject.call(self.inner, x)


@subjects
def test_exports_with_any_length(subject):
    needs_kernel(subject)
    module, x = subject.make(torch.float32), subject.inputs(2, 7, dtype=torch.float32).detach()

    seqlen = torch.export.Dim("seqlen", min=2, max=512)
    with torch.no_grad():
        program = torch.export.export(
            Called(subject, module), (x,), dynamic_shapes=({1: seqlen},)
        ).module()
        for length in (7, 3, 11):
            x = subject.inputs(2, length, length, torch.float32).detach()
            torch.testing.assert_close(program(x), subject.call(module, x))
    constants = [a for node in program.graph.nodes for a in node.args if isinstance(a, float)]
    # torch's ahead-of-time compiler writes others as what its loader cannot read.
    assert all(map(math.isfinite, constants))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@subjects
def test_traces(subject):
    """torch.jit.trace of an inference, its own check included."""
    needs_kernel(subject)
    module, x = subject.make(torch.float32), subject.inputs(2, 7, dtype=torch.float32).detach()
    with torch.no_grad():
        traced = torch.jit.trace(Called(subject, module), (x,))
        x = subject.inputs(2, 7, 1, torch.float32).detach()
        torch.testing.assert_close(traced(x), subject.call(module, x))


@pytest.mark.parametrize("sample", [7, 200])
@pytest.mark.parametrize("subject", [s for s in COMPILED if s.name != "mha_options"], ids=str)
def test_exports_with_gradients_for_any_length(subject, sample):
    """Where the operators save states for a backward, their number bounds no length."""
    needs_kernel(subject)
    module = subject.make(torch.float32)

    def inputs(length):
        return subject.inputs(2, length, length, torch.float32).detach()

    seqlen = torch.export.Dim("seqlen", min=2, max=4096)
    shapes = ({1: seqlen},)
    program = torch.export.export(
        Called(subject, module), (inputs(sample),), dynamic_shapes=shapes
    ).module()
    for length in (2, 32, 33, 97, 300):
        x = inputs(length)
        torch.testing.assert_close(program(x), subject.call(module, x))


@models
@pytest.mark.parametrize("side", ["left", "right"])
def test_ragged_prompts_generate_what_each_row_does_alone(subject: Subject, side):
    module, new = subject.make(), 6
    rows = [subject.inputs(1, n, n)[0] for n in (1, 3, 6)]
    ids, mask = torch.full((3, 7), VOCAB), torch.zeros(3, 7, dtype=torch.long)
    for i, row in enumerate(rows):
        at = slice(7 - len(row), 7) if side == "left" else slice(len(row))
        ids[i, at], mask[i, at] = row, 1
    got = module.generate(ids, max_new_tokens=new, attention_mask=mask)[:, 7:]
    alone = [module.generate(row[None], max_new_tokens=new)[0, len(row) :] for row in rows]
    assert got.tolist() == [row.tolist() for row in alone]
    # And without any state: the argmax of whole forward passes.
    for row, tail in zip(rows, alone, strict=True):
        text = torch.cat([row, tail])[None]
        with torch.no_grad():
            logits = module(text[:, :-1]).logits[0, len(row) - 1 :, :VOCAB]
        assert logits.argmax(-1).tolist() == tail.tolist()
