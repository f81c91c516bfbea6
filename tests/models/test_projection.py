"""A projection is multiplied in another way only where nothing can tell, and gives the same.

Judge: the product in float64.
"""

import pytest
import torch
from torch import nn

from ssm.ops import projection
from tests.tolerances import Tolerance, assert_close

CLOSE = Tolerance(1e-5, 1e-5, "sums of 512 products in float32, in another order")


@pytest.fixture
def called(monkeypatch):
    """How often torch's own product was asked for, by a module or without one."""
    calls = []
    linear = nn.functional.linear
    monkeypatch.setattr(nn.functional, "linear", lambda *args: calls.append(1) or linear(*args))
    return calls


def layer(out=1024, bias=True):
    made = nn.Linear(512, out, bias=bias)
    return made.requires_grad_(False)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("out", [1024, 1022, 1021])
@pytest.mark.parametrize(
    "lead", [(1,), (1, 1), (2,), (4, 1), (2, 2), (5,), (3, 7)], ids=lambda lead: str(lead)
)
def test_equals_the_product(lead, out, bias, called):
    linear, x = layer(out, bias), torch.randn(*lead, 512)
    want = x.double() @ linear.weight.double().T
    want = want + linear.bias.double() if bias else want
    got = projection.project(linear, x)
    assert not called
    assert got.is_contiguous()
    assert_close("product", got, want, CLOSE)
    strided = torch.randn(*lead, 1024)[..., ::2]
    want = nn.functional.linear(strided, linear.weight, linear.bias)
    assert_close("strided", projection.project(linear, strided), want, CLOSE)


def test_rows_do_not_depend_on_the_way():
    linear, x = layer(), torch.randn(9, 512)
    whole = projection.project(linear, x)
    for rows in (1, 3, 5):
        assert_close("rows", projection.project(linear, x[:rows]), whole[:rows], CLOSE)


def small():
    return nn.Linear(512, 8).requires_grad_(False), torch.randn(1, 512)


def double():
    return layer().double(), torch.randn(1, 512, dtype=torch.float64)


def bfloat16():
    return layer().bfloat16(), torch.randn(1, 512, dtype=torch.bfloat16)


def strided():
    linear = layer()
    linear.weight.data = torch.randn(512, 1024).t()
    return linear, torch.randn(1, 512)


def empty():
    return layer(), torch.randn(0, 512)


@pytest.mark.parametrize(
    "make", [small, double, bfloat16, strided, empty], ids=lambda make: make.__name__
)
def test_left_to_torch(make, called):
    linear, x = make()
    got = projection.project(linear, x)
    assert called
    assert got.shape == (len(x), linear.out_features)


def test_left_to_torch_under_autocast(called):
    with torch.autocast("cpu", torch.bfloat16):
        assert projection.project(layer(), torch.randn(1, 512)).dtype == torch.bfloat16
    assert called


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def subclass(linear, run):
    doubled = Doubled(512, 1024, bias=False)
    doubled.load_state_dict(linear.state_dict())
    return doubled


def forward_hook(linear, run):
    linear.register_forward_hook(lambda module, args, result: 2 * result)
    return linear


def input_hook(linear, run):
    linear.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    return linear


def replaced_forward(linear, run):
    forward = linear.forward
    linear.forward = lambda x: 2 * forward(x)
    return linear


def global_hook(linear, run):
    run(torch.nn.modules.module.register_module_forward_hook(lambda module, args, y: 2 * y))
    return linear


@pytest.mark.parametrize(
    "change",
    [subclass, forward_hook, input_hook, replaced_forward, global_hook],
    ids=lambda change: change.__name__,
)
def test_whatever_is_more_than_a_product_is_called(change):
    linear, x = layer(bias=False), torch.randn(1, 512)
    want, handles = 2 * linear(x), []
    changed = change(linear, handles.append)
    try:
        with torch.no_grad():
            got = projection.project(changed, x)
    finally:
        for handle in handles:
            handle.remove()
    assert_close("doubled", got, want, CLOSE)


@pytest.mark.parametrize("of_all", [False, True])
@pytest.mark.parametrize("kind", ["full_backward_hook", "full_backward_pre_hook"])
def test_hooks_of_the_backward_fire(kind, of_all):
    linear, fired = nn.Linear(512, 1024), []
    place = torch.nn.modules.module if of_all else linear
    register = getattr(place, f"register_module_{kind}" if of_all else f"register_{kind}")
    handle = register(lambda module, *_: fired.append(module))
    try:
        projection.project(linear, torch.randn(1, 512, requires_grad=True)).sum().backward()
    finally:
        handle.remove()
    assert fired == [linear]


@pytest.mark.parametrize("wanted", [(1, 1, 1), (0, 1, 1), (1, 0, 0), (0, 0, 1)])
@pytest.mark.parametrize("lead", [(), (1,), (2, 3, 1), (2, 5)], ids=lambda lead: str(lead))
def test_gradients(lead, wanted, called):
    """First and second ones, against those of torch in float64."""
    linear = nn.Linear(512, 1024)
    x, dy = torch.randn(*lead, 512), torch.randn(*lead, 1024)
    inputs = (x, linear.weight, linear.bias)
    for tensor, want in zip(inputs, wanted, strict=True):
        tensor.requires_grad_(bool(want))
    doubles = [t.detach().double().requires_grad_(t.requires_grad) for t in inputs]
    results = []
    judge = (lambda x, weight, bias: x @ weight.T + bias, doubles)
    for function, tensors in ((projection.multiply, inputs), judge):
        leaves = [t for t in tensors if t.requires_grad]
        y = function(*tensors)
        assert y.requires_grad
        loss = (y.pow(2) * dy).sum()
        first = torch.autograd.grad(loss, leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.pow(2).sum() for g in first), leaves)
        results.append([y, *first, *second])
    assert not called
    for got, want in zip(*results, strict=True):
        scale = float(want.detach().abs().max())
        assert_close("gradient", got / scale, want / scale, CLOSE)


def test_projected_block(called):
    linear, x = layer(), torch.randn(1, 512)
    with torch.no_grad(), projection.projected(linear):
        got = linear(x)
    assert not called
    assert torch.equal(got, projection.project(linear, x))
    linear(x)
    assert called


def test_projected_block_ends_with_an_error():
    linear = layer()
    with pytest.raises(RuntimeError, match="shape"), projection.projected(linear):
        linear(torch.randn(1, 3))
    assert "forward" not in vars(linear)


def test_projected_block_leaves_what_is_more_than_a_product(called):
    linear = layer()
    linear.register_forward_hook(lambda module, args, result: 2 * result)
    with torch.no_grad(), projection.projected(linear):
        linear(torch.randn(1, 512))
    assert called


def test_projected_blocks_of_two_threads():
    linear, x = layer(), torch.randn(1, 512)
    with torch.no_grad(), projection.projected(linear):
        with projection.projected(linear):
            want = linear(x)
        vars(linear).pop("forward", None)  # the other thread is done
        assert_close("after the other thread", linear(x), want, CLOSE)
    assert "forward" not in vars(linear)
