"""The ssd stages of ssm.ops on compiled kernels.  Judge: the reference; for all five, the whole."""

import pytest
import torch

from ssm import ops
from ssm.ops.compiled import ssd_stages as compiled
from ssm.ops.python import reference
from ssm.seq_meta import SeqMeta
from ssm.utils import dispatch
from tests.cases import CASES, SsdCase, StageCase
from tests.stages import compose
from tests.tensors import FLOATS, gradients, make_tensors, strided
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


@pytest.mark.parametrize("stage", STAGES)
def test_gradients_come_from_the_reference(stage):
    arguments = make_tensors(named(stage, "groups"))
    want = gradients(getattr(reference, stage), arguments)
    found = gradients(getattr(compiled, stage), arguments)
    assert found.keys() == want.keys()
    for name, gradient in found.items():
        assert torch.equal(gradient, want[name]), name
    leaf = {
        k: v.requires_grad_() if torch.is_tensor(v) and v.is_floating_point() else v
        for k, v in make_tensors(named(stage, "groups")).items()
    }
    with torch.no_grad():
        assert not any(t.requires_grad for t in outputs_of(getattr(compiled, stage)(**leaf)))


def test_composed_gradients_equal_those_of_the_whole():
    arguments = make_tensors(SsdCase("whole", 1, 11, 2, 3, 2, 4, layout="seq_idx"))
    ids = arguments.pop("seq_meta").positions(1, 11)

    def whole(**given):
        return reference.ssd_chunk_scan(
            **given, seq_meta=SeqMeta(seq_idx=ids), return_final_states=True
        )

    want = gradients(whole, arguments)
    found = gradients(lambda **given: compose(ops, **given, seq_idx=ids), arguments)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, want[name], rtol=1e-10, atol=1e-10)


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


@pytest.mark.parametrize("name", ["odd", "seq_idx", "bare", "empty_seq"])
@pytest.mark.parametrize("stage", STAGES)
def test_opcheck(stage, name):
    arguments = make_tensors(named(stage, name), dtype=torch.float32)
    arguments |= {"low": 0.0, "high": 1.0}
    op = getattr(torch.ops.ssm, stage).default
    torch.library.opcheck(op, [arguments[n] for n in ORDERS[stage]])


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


def test_compile_with_gradients():
    torch._dynamo.reset()
    arguments = make_tensors(SsdCase("compile", 1, 9, 2, 3, 2, 4, layout="seq_idx"))
    ids = arguments.pop("seq_meta").positions(1, 9)

    def function(**given):
        return compose(ops, **given, seq_idx=ids)

    want = gradients(function, arguments)
    found = gradients(torch.compile(function, fullgraph=True, backend="aot_eager"), arguments)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, want[name], rtol=1e-10, atol=1e-10)


def test_export():
    class Stages(torch.nn.Module):
        def forward(self, arguments):
            return compose_ops(**arguments)

    arguments = make_tensors(SsdCase("export", 2, 13, 2, 3, 5, 4), 0, torch.float32)
    del arguments["seq_meta"]
    program = torch.export.export(Stages(), (arguments,))
    names = {str(node.target) for node in program.graph.nodes}
    assert {f"ssm.{stage}.default" for stage in STAGES} <= names
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
            wrong += [{key: 0}, {key: -3}]
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
