"""Operators and modules under torch.autocast, on the CPU and, without data, with the rules of CUDA.

Judge: the same call without autocast, bit for bit; docs/numerics.md says what holds.
"""

import importlib
import inspect

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import ssm.ops
from ssm.models.config import MambaConfig
from ssm.models.lm import MambaLMHeadModel
from ssm.modules.mamba1 import Mamba1
from ssm.modules.mamba2 import Mamba2
from ssm.modules.precision import DeltaProjection
from ssm.ops.python import reference
from ssm.utils import dispatch
from tests.cases import CASES
from tests.tensors import leaves, make_tensors

IN_PLACE = {"selective_state_step": "state", "dw_causal_conv_step": "conv_state"}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BLOCKS = {
    "mamba1": lambda: Mamba1(16, d_state=4, layer_idx=0),
    "mamba2": lambda: Mamba2(16, d_state=8, headdim=8, layer_idx=0),
}


def case_of(op):
    """Return a case of the operator with as many arguments as any."""
    found = {str(case): case for case in CASES[op]}
    return next(found[name] for name in ("odd", "packed", "packed_holes") if name in found)


def outputs_of(op, function, arguments):
    """Return the outputs of a call, an updated state among them."""
    wanted = inspect.signature(function).parameters
    asked = {n: True for n in wanted if n.startswith("return_")}
    found = function(**{**arguments, **asked})
    found = found if isinstance(found, tuple) else (found,)
    return (*found, arguments[IN_PLACE[op]]) if op in IN_PLACE else found


def all_of(op, function, arguments):
    """Return outputs and gradients of a call."""
    if op in IN_PLACE:
        given = {n: t.clone() if torch.is_tensor(t) else t for n, t in arguments.items()}
        with torch.no_grad():
            return outputs_of(op, function, given)
    given = leaves(arguments)
    outputs = outputs_of(op, function, given)
    with torch.autocast("cpu", enabled=False):
        sum((o.float() * (1 + i)).sum() for i, o in enumerate(outputs)).backward()
    return *outputs, *(t.grad for t in given.values() if torch.is_tensor(t) and t.requires_grad)


@pytest.mark.parametrize("backend", ["python", "auto"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", dispatch.OPERATORS)
def test_operator_is_left_alone(op, dtype, backend):
    arguments = make_tensors(case_of(op), 0, DTYPES[dtype])
    function = getattr(ssm.ops, op)
    with dispatch.use_backend(backend):
        want = all_of(op, function, arguments)
        with torch.autocast("cpu", torch.bfloat16):
            got = all_of(op, function, arguments)
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


class Seen(TorchDispatchMode):
    """The dtypes of everything that is computed in its ``with`` block."""

    def __init__(self):
        super().__init__()
        self.dtypes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.dtypes |= {t.dtype for t in tree_leaves(result) if torch.is_tensor(t)}
        return result


@pytest.fixture
def rules_of_cuda():
    """Switch autocast on for CUDA; torch.autocast("cuda") switches itself off without a GPU."""
    enabled, dtype = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    yield
    torch.set_autocast_enabled("cuda", enabled)
    torch.set_autocast_dtype("cuda", dtype)


# References that make no tensor of their own, which torch without CUDA cannot do even without data.
FAKED = ("ssd_bmm_chunk", "fused_layer_norm", "gated_norm", "swiglu")
SERVED = [(op, "compiled") for op in dispatch.OPERATORS] + [(op, "python") for op in FAKED]


@pytest.mark.parametrize(("op", "backend"), SERVED)
def test_operator_is_left_alone_by_the_rules_of_cuda(op, backend, rules_of_cuda):
    """No data: what is cast before a kernel is called is decided by torch's dispatcher."""
    arguments = make_tensors(case_of(op), 0, torch.float32)
    arguments.pop("seq_meta", None)  # its values are looked at
    function = getattr(reference, op)
    if backend == "compiled":
        pytest.importorskip("ssm_kernels", reason="the compiled operators need the kernels")
        file = importlib.import_module(f"ssm.ops.compiled.{dispatch.FILES.get(op, op)}")
        function = getattr(file, op)
    with FakeTensorMode():
        there = {
            n: torch.empty(t.shape, dtype=t.dtype, device="cuda") if torch.is_tensor(t) else t
            for n, t in arguments.items()
        }
        square = torch.empty(4, 4, device="cuda")
        assert (square @ square).dtype == torch.bfloat16  # the rules are in force
        with Seen() as seen:
            outputs = outputs_of(op, function, there)
    assert torch.bfloat16 not in seen.dtypes
    assert all(o.dtype == torch.float32 and o.device.type == "cuda" for o in outputs)


@pytest.mark.parametrize("name", BLOCKS)
def test_projections_narrow_what_comes_in_and_states_stay(name, monkeypatch):
    block, x = BLOCKS[name](), torch.randn(2, 9, 16)
    seen = {}
    for op in ("dw_causal_conv", "selective_scan", "ssd_chunk_scan", "dw_causal_conv_step"):
        original = getattr(ssm.ops, op)

        def watched(*args, original=original, op=op, **kwargs):
            seen[op] = args[0].dtype
            return original(*args, **kwargs)

        monkeypatch.setattr(ssm.ops, op, watched)
    state = block.allocate_state(2)
    with torch.autocast("cpu", torch.bfloat16):
        y = block(x, state=state)
        y.float().square().sum().backward()
        with torch.no_grad():
            state.detach()
            one = block(x[:, :1], state=state)
    assert set(seen.values()) == {torch.bfloat16}
    assert {"dw_causal_conv", "dw_causal_conv_step"} < set(seen)
    assert y.dtype == one.dtype == torch.float32
    assert {t.dtype for t in state.key_value_memory_dict[0]} == {torch.float32}
    for parameter in block.parameters():
        assert parameter.grad.dtype == parameter.dtype == torch.float32
        assert torch.isfinite(parameter.grad).all()


@pytest.mark.parametrize("layer", ["Mamba1", "Mamba2"])
def test_steps_under_autocast_follow_the_scan(layer):
    """A state that were rounded with the activations would drift away over many steps."""
    sizes = {} if layer == "Mamba1" else {"d_state": 8, "headdim": 8}
    config = MambaConfig(16, n_layer=1, vocab_size=32, ssm_cfg={"layer": layer, **sizes})
    model, ids = MambaLMHeadModel(config).eval(), torch.randint(0, 32, (2, 60))
    state = model.allocate_state(2)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        whole = model(ids).logits
        steps = [model(ids[:, i : i + 1], state=state).logits for i in range(60)]
    # Both round projections to bfloat16, whose unit is 2^-8, but in other places.
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=2**-5, atol=2**-5)
    assert {t.dtype for t in state.key_value_memory_dict[0]} == {torch.float32}


def test_step_sizes_are_not_narrowed():
    projection = DeltaProjection(4, 8)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        projection.bias.copy_(torch.linspace(-5, 5, 8))
        got = projection(torch.zeros(3, 4))
    assert got.dtype == torch.float32
    assert torch.equal(got, projection.bias.expand(3, -1))
