"""The ssd stages of ssm.ops on compiled kernels.

Judges: the reference, float64 NumPy loops, gradcheck; for all five, the whole.
"""

import pytest
import torch

from ssm import ops
from ssm.ops.compiled import ssd_stages as compiled
from ssm.ops.compiled.ssd_chunk_scan import ssd_chunk_scan
from ssm.ops.python import reference
from ssm.seq_meta import SeqMeta
from ssm.utils import dispatch
from tests import stages_gradient_judge
from tests.cases import CASES, SsdCase, StageCase
from tests.stages import compose
from tests.tensors import (
    FLOATS,
    arrays,
    gradcheck,
    gradients,
    leaves,
    make_tensors,
    poison,
    strided,
)
from tests.tolerances import TOLERANCES, assert_close
from tools import grid

STAGES = grid.operators_of("ssd_stages")
CALLS = [pytest.param(s, case, id=f"{s}-{case}") for s in STAGES for case in CASES[s]]


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def named(stage: str, name: str) -> StageCase:
    return next(case for case in CASES[stage] if case.name == name)


def outputs_of(found) -> tuple:
    return found if isinstance(found, tuple) else (found,)


def wide(arguments: dict) -> dict:
    return {
        k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v
        for k, v in arguments.items()
    }


def on_threads(function, *counts):
    before, results = torch.get_num_threads(), []
    try:
        for threads in counts:
            torch.set_num_threads(threads)
            results.append(outputs_of(function()))
    finally:
        torch.set_num_threads(before)
    return results


@pytest.mark.parametrize("stage", STAGES)
def test_dispatch_serves_the_kernels(stage):
    assert dispatch.why(stage) == f"{stage} on cpu: cpu, the cpu kernels are loaded"


@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
@pytest.mark.parametrize(("stage", "case"), CALLS)
def test_matches_reference(stage, case, dtype):
    arguments = make_tensors(case, dtype=dtype)
    found = outputs_of(getattr(ops, stage)(**arguments))
    want = outputs_of(getattr(reference, stage)(**wide(arguments)))
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    acc = dtype if stage == "ssd_chunk_output" else acc
    for i, (a, b) in enumerate(zip(found, want, strict=True)):
        assert a.dtype == acc
        assert_close(f"{stage} output {i}", a, b, TOLERANCES[stage, name_of(acc)])


@pytest.mark.parametrize("layout", ["", "seq_idx", "mask"])
@pytest.mark.parametrize("chunk_size", [1, 5, 16, 64])
def test_composed_equal_ssd_chunk_scan(layout, chunk_size):
    case = SsdCase("whole", 2, 39, 6, 5, 7, chunk_size, 3, 2, layout=layout)
    arguments = make_tensors(case)
    meta = arguments["seq_meta"]
    with dispatch.use_backend("python"):
        want = ops.ssd_chunk_scan(**arguments, return_final_states=True)
    del arguments["seq_meta"]
    ids = None if meta is None else meta.positions(2, 39)
    for a, b in zip(compose(ops, **arguments, seq_idx=ids), want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_composed_in_bfloat16_equal_ssd_chunk_scan():
    """The stages between are in float32, so that y is rounded once."""
    arguments = make_tensors(named_ssd("odd"), dtype=torch.bfloat16)
    del arguments["seq_meta"]
    y, states = compose(ops, **arguments)
    with dispatch.use_backend("python"):
        want = ops.ssd_chunk_scan(**wide(arguments), return_final_states=True)
    assert (y.dtype, states.dtype) == (torch.bfloat16, torch.float32)
    assert_close("y", y, want[0], TOLERANCES["ssd_chunk_scan", "bfloat16"])
    assert_close("states", states, want[1], TOLERANCES["ssd_chunk_scan", "float32"])


def named_ssd(name: str) -> SsdCase:
    return next(case for case in CASES["ssd_chunk_scan"] if case.name == name)


@pytest.mark.parametrize("stage", STAGES)
def test_noncontiguous(stage):
    arguments = make_tensors(named(stage, "groups"), dtype=torch.float32)
    want = outputs_of(getattr(ops, stage)(**arguments))
    for a, b in zip(outputs_of(getattr(ops, stage)(**strided(arguments))), want, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("stage", STAGES)
def test_threads_agree(stage):
    arguments = make_tensors(named(stage, "mamba2_130m"), dtype=torch.float32)
    first, *others = on_threads(lambda: getattr(ops, stage)(**arguments), 1, 2, 3, 8)
    for found in others:
        assert all(torch.equal(a, b) for a, b in zip(found, first, strict=True))


def judged_gradients(stage: str, arguments: dict) -> tuple[dict, dict]:
    """Return the compiled gradients and the judge's, by name, for one random weighting."""
    given = leaves(arguments)
    outputs = outputs_of(getattr(compiled, stage)(**given))
    generator = torch.Generator().manual_seed(3)
    weights = [torch.randn(o.shape, generator=generator).to(o.dtype) for o in outputs]
    wanted = {n: t for n, t in given.items() if torch.is_tensor(t) and t.requires_grad}
    got = torch.autograd.grad(outputs, list(wanted.values()), weights)
    want = getattr(stages_gradient_judge, stage)(
        *(w.double().numpy() for w in weights), **arrays(arguments)
    )
    return dict(zip(wanted, got, strict=True)), want


@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
@pytest.mark.parametrize(("stage", "case"), CALLS)
def test_gradients_match_judge(stage, case, dtype):
    got, want = judged_gradients(stage, make_tensors(case, 1, dtype))
    for name, gradient in got.items():
        assert gradient.dtype == dtype
        tolerance = TOLERANCES[f"{stage}_bwd", name_of(dtype)]
        assert_close(f"{stage} d{name}", gradient, want[name], tolerance)


@pytest.mark.parametrize("dtype", FLOATS[:2], ids=name_of)
@pytest.mark.parametrize(("stage", "case"), CALLS)
def test_gradients_match_reference(stage, case, dtype):
    arguments = make_tensors(case, 2, dtype)
    want = gradients(getattr(reference, stage), wide(arguments))
    for name, gradient in gradients(getattr(compiled, stage), arguments).items():
        wanted = torch.zeros_like(gradient) if want[name] is None else want[name]
        tolerance = TOLERANCES[f"{stage}_bwd", name_of(dtype)]
        assert_close(f"{stage} d{name}", gradient, wanted, tolerance)


GRADCHECKED = {
    "bare": {"given": "", "softplus": False},
    "all": {},
    "channel_skip": {"skip": "channel"},
    "sequences": {"layout": "seq_idx"},
    "groups": {"b_groups": 1, "c_groups": 2},
}


@pytest.mark.parametrize("options", GRADCHECKED)
@pytest.mark.parametrize("stage", STAGES)
def test_gradcheck(stage, options):
    case = StageCase(stage, options, 1, 7, 2, 1, 2, 3, **GRADCHECKED[options])
    gradcheck(getattr(compiled, stage), make_tensors(case, 4))


@pytest.mark.parametrize("limit", [(0.1, 0.5), (0.2, float("inf"))], ids=str)
def test_gradcheck_with_limits(limit):
    case = StageCase("ssd_chunk_cumsum", "limit", 2, 7, 2, 1, 1, 3)
    gradcheck(compiled.ssd_chunk_cumsum, {**make_tensors(case, 4), "dt_limit": limit})


@pytest.mark.parametrize("stage", ["ssd_chunk_cumsum", "ssd_state_passing"])
@pytest.mark.parametrize("unused", [0, 1])
def test_gradient_of_one_output(stage, unused):
    """Each output alone has the gradient that both have when the other's weight is zero."""
    arguments = make_tensors(named(stage, "odd"))

    def one(**given):
        return getattr(compiled, stage)(**given)[1 - unused]

    def both(**given):
        outputs = list(getattr(compiled, stage)(**given))
        used = outputs[1 - unused]
        outputs[unused] = outputs[unused] * 0.0
        return used, outputs[unused]

    want = gradients(both, arguments)
    for name, gradient in gradients(one, arguments).items():
        gradient = torch.zeros_like(want[name]) if gradient is None else gradient
        assert torch.equal(gradient, want[name]), name


@pytest.mark.parametrize("layout", ["", "seq_idx"])
@pytest.mark.parametrize("chunk_size", [1, 5, 64])
def test_composed_gradients_equal_those_of_the_whole(chunk_size, layout):
    """Kernels against kernels: the backwards of the stages and the one of ssd_chunk_scan."""
    case = SsdCase("whole", 2, 39, 6, 5, 7, chunk_size, 3, 2, skip="channel", layout=layout)
    arguments = make_tensors(case)
    meta = arguments.pop("seq_meta")
    ids = None if meta is None else meta.positions(2, 39)

    def whole(**given):
        meta = None if ids is None else SeqMeta(seq_idx=ids)
        return ssd_chunk_scan(**given, seq_meta=meta, return_final_states=True)

    for limit in ((0.0, float("inf")), (0.1, 0.5)):
        options = {**arguments, "dt_limit": limit}
        want = gradients(whole, options)
        found = gradients(lambda **given: compose(ops, **given, seq_idx=ids), options)
        assert found.keys() == want.keys()
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, want[name], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("stage", STAGES)
def test_gradients_noncontiguous(stage):
    arguments = make_tensors(named(stage, "groups"), dtype=torch.float32)
    want = gradients(getattr(ops, stage), arguments)
    for name, gradient in gradients(getattr(ops, stage), strided(arguments)).items():
        assert torch.equal(gradient, want[name]), name


@pytest.mark.parametrize("stage", STAGES)
def test_gradients_of_threads_agree(stage):
    arguments = make_tensors(named(stage, "mamba2_130m"), dtype=torch.float32)
    first, *others = on_threads(
        lambda: tuple(gradients(getattr(ops, stage), arguments).values()), 1, 2, 3, 8
    )
    for found in others:
        assert all(torch.equal(a, b) for a, b in zip(found, first, strict=True))


@pytest.mark.parametrize("stage", ["ssd_chunk_cumsum", "ssd_chunk_state", "ssd_chunk_output"])
def test_nan_in_skipped_steps_gives_no_gradient(stage):
    arguments = make_tensors(named(stage, "seq_idx"), 6)
    skipped = arguments["seq_idx"] < 0
    assert skipped.any()
    names = ("dt",) if stage == "ssd_chunk_cumsum" else ("x", "B", "C", "z")
    names = {name: 1 for name in names if name in arguments}
    want = gradients(getattr(ops, stage), arguments)
    for name, gradient in gradients(getattr(ops, stage), poison(arguments, names, skipped)).items():
        assert torch.equal(gradient, want[name]), name
        if name in names:
            assert not gradient[skipped].any(), name


@pytest.mark.parametrize("stage", STAGES)
def test_refuses_second_derivative(stage):
    given = leaves(make_tensors(named(stage, "odd")))
    leaf = next(t for t in given.values() if torch.is_tensor(t) and t.requires_grad)
    total = sum(o.sum() for o in outputs_of(getattr(compiled, stage)(**given)))
    (first,) = torch.autograd.grad(total, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match=rf"^{stage}: a second derivative must be taken"):
        first.sum().backward()


@pytest.mark.parametrize("stage", STAGES)
def test_inference_mode(stage):
    arguments = make_tensors(named(stage, "odd"), dtype=torch.float32)
    want = outputs_of(getattr(ops, stage)(**arguments))
    with torch.inference_mode():
        found = outputs_of(getattr(ops, stage)(**arguments))
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))


ORDERS = {
    "ssd_chunk_cumsum": ("dt", "A", "dt_bias", "seq_idx", "chunk_size", "softplus", "low", "high"),
    "ssd_chunk_state": ("x", "B", "dt", "dA_cumsum", "seq_idx"),
    "ssd_state_passing": ("states", "dA_cumsum", "initial_states", "seq_idx"),
    "ssd_bmm_chunk": ("C", "B", "chunk_size"),
    "ssd_chunk_output": ("CB", "x", "dt", "dA_cumsum", "C", "states_in", "D", "z", "seq_idx"),
}


@pytest.mark.parametrize("has_gradients", [False, True])
@pytest.mark.parametrize("name", ["odd", "seq_idx", "bare", "empty_seq"])
@pytest.mark.parametrize("stage", STAGES)
def test_opcheck(stage, name, has_gradients):
    arguments = make_tensors(named(stage, name), dtype=torch.float32)
    if has_gradients:
        arguments = leaves(arguments)
    arguments |= {"low": 0.0, "high": 1.0}
    op = getattr(torch.ops.ssm, f"{stage}_fwd").default
    torch.library.opcheck(op, [arguments[n] for n in ORDERS[stage]])


# Arguments of the backward operators: by name, or the number of an output.
BACKWARD = {
    "ssd_chunk_cumsum": ("dt", "A", "dt_bias", "seq_idx", 0, 1, "softplus", "low", "high"),
    "ssd_chunk_state": ("x", "B", "dt", "dA_cumsum", "seq_idx", 0),
    "ssd_state_passing": (0, "dA_cumsum", "seq_idx", 0, 1),
    "ssd_bmm_chunk": ("C", "B", 0),
    "ssd_chunk_output": (*ORDERS["ssd_chunk_output"], 0),
}


@pytest.mark.parametrize("name", ["odd", "seq_idx", "bare", "empty_batch"])
@pytest.mark.parametrize("stage", STAGES)
def test_opcheck_backward(stage, name):
    """On what the forward gave: it has the shapes of the gradients, and passes for one."""
    arguments = make_tensors(named(stage, name), dtype=torch.float32)
    outputs = outputs_of(getattr(compiled, stage)(**arguments))
    arguments |= {"low": 0.0, "high": 1.0}
    values = [outputs[n].clone() if isinstance(n, int) else arguments[n] for n in BACKWARD[stage]]
    torch.library.opcheck(getattr(torch.ops.ssm, f"{stage}_bwd").default, values)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic):
    torch._dynamo.reset()
    function = torch.compile(compose_ops, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for seqlen in (37, 21):
        arguments = make_tensors(SsdCase("compile", 2, seqlen, 4, 3, 5, 8, 2), 0, torch.float32)
        del arguments["seq_meta"]
        for a, b in zip(function(**arguments), compose_ops(**arguments), strict=True):
            assert torch.equal(a, b)


def compose_ops(**arguments):
    return compose(ops, **arguments)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("layout", ["", "seq_idx"])
def test_compile_with_gradients(layout, dynamic):
    torch._dynamo.reset()

    def function(ids, **given):
        return compose(ops, **given, seq_idx=ids)

    compiled_function = torch.compile(
        function, fullgraph=True, backend="aot_eager", dynamic=dynamic
    )
    for seqlen in (19, 9):
        arguments = make_tensors(SsdCase("compile", 2, seqlen, 2, 3, 2, 4, layout=layout))
        meta = arguments.pop("seq_meta")
        ids = None if meta is None else meta.positions(2, seqlen)
        want = gradients(lambda ids=ids, **given: function(ids, **given), arguments)
        found = gradients(lambda ids=ids, **given: compiled_function(ids, **given), arguments)
        for name, gradient in found.items():
            assert torch.equal(gradient, want[name]), name


def test_export():
    class Stages(torch.nn.Module):
        def forward(self, arguments):
            return compose_ops(**arguments)

    arguments = make_tensors(SsdCase("export", 2, 13, 2, 3, 5, 4), 0, torch.float32)
    del arguments["seq_meta"]
    program = torch.export.export(Stages(), (arguments,))
    names = {str(node.target) for node in program.graph.nodes}
    assert {f"ssm.{stage}_fwd.default" for stage in STAGES} <= names
    for a, b in zip(program.module()(arguments), compose_ops(**arguments), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("stage", STAGES)
def test_rejects_with_the_sentences_of_the_reference(stage):
    """Every shape made wrong in turn, every dtype: the same sentence from both."""
    arguments = make_tensors(
        StageCase(stage, "reject", 2, 6, 4, 3, 5, 4, 2, 2), dtype=torch.float32
    )
    wrong = []
    for key, value in arguments.items():
        if isinstance(value, torch.Tensor):
            wrong.append({key: value[:1].expand(7, *value.shape[1:])})
            wrong.append({key: value.to(torch.int32)})
            wrong.append({key: value[..., None]})
            wrong.append({key: value[0]})
            if value.ndim > 1:
                wrong.append({key: value[:, :1]})
        if key == "chunk_size":
            wrong += [{key: 0}, {key: -3}, {key: 2**40}, {key: 2**63}]
    if stage == "ssd_chunk_cumsum":
        wrong += [{"dt_limit": limit} for limit in ((1.0, 0.5), (0.0,), 3.0)]
    if stage != "ssd_bmm_chunk":
        wrong += [
            {"seq_idx": torch.zeros(2, 6)},
            {"seq_idx": torch.zeros(2, 4, dtype=torch.int32)},
            {"seq_idx": torch.full((2, 6), -2, dtype=torch.int32)},
        ]
    compared = 0
    for change in wrong:
        sentences = []
        for function in (getattr(reference, stage), getattr(compiled, stage)):
            try:
                function(**{**arguments, **change})
                sentences.append("no error")
            except ValueError as error:
                sentences.append(str(error))
        assert sentences[0] == sentences[1], change.keys()
        compared += sentences[0] != "no error"
    assert compared > len(wrong) // 2


@pytest.mark.parametrize("stage", STAGES)
def test_rejects_what_is_not_a_tensor(stage):
    arguments = make_tensors(named(stage, "tiny"), dtype=torch.float32)
    for name, value in arguments.items():
        if torch.is_tensor(value):
            with pytest.raises(TypeError, match=f"^{stage}: {name} must be a"):
                getattr(ops, stage)(**{**arguments, name: [1.0]})
