"""The reference of the ssd stages.  Judges: float64 NumPy loops; for all five, the whole scan."""

import numpy as np
import pytest
import torch

import ssm.ops
from ssm.ops.python import reference
from ssm.seq_meta import SeqMeta
from ssm.utils import dispatch
from tests import judge, stages_judge
from tests.cases import CASES, SsdCase, StageCase, make
from tests.stages import compose
from tests.tensors import FLOATS, arrays, gradcheck, gradients, make_tensors, poison, strided
from tests.tolerances import TOLERANCES, Tolerance, assert_close
from tools import grid

STAGES = grid.operators_of("ssd_stages")
CALLS = [
    pytest.param(stage, case, id=f"{stage}-{case}") for stage in STAGES for case in CASES[stage]
]
WHOLE = Tolerance(1e-10, 1e-10, "five stages in float64: rounding of sums and of their differences")


def outputs_of(found) -> tuple:
    return found if isinstance(found, tuple) else (found,)


def named(stage: str, name: str):
    return next(c for c in CASES[stage] if str(c) == name)


def assert_outputs(stage, found, want, dtypes) -> None:
    found, want = outputs_of(found), outputs_of(want)
    for i, (a, b) in enumerate(zip(found, want, strict=True)):
        assert_close(f"{stage} output {i}", a, b, TOLERANCES[stage, dtypes[i]])


def test_both_lists_name_the_same_stages():
    assert dict.fromkeys(STAGES, "ssd_stages") == dispatch.FILES
    assert {n for ops in grid.SEVERAL.values() for n in ops} <= set(ssm.ops.__all__)


@pytest.mark.parametrize(("stage", "case"), CALLS)
def test_matches_judge(stage, case):
    found = getattr(reference, stage)(**make_tensors(case, 1))
    want = getattr(stages_judge, stage)(**make(case, 1))
    assert_outputs(stage, found, want, ["float64", "float64"])


@pytest.mark.parametrize("dtype", FLOATS[1:], ids=str)
@pytest.mark.parametrize(("stage", "case"), CALLS)
def test_low_precision_matches_judge(stage, case, dtype):
    arguments = make_tensors(case, 2, dtype)
    found = outputs_of(getattr(reference, stage)(**arguments))
    want = getattr(stages_judge, stage)(**arrays(arguments))
    acc = dtype if stage == "ssd_chunk_output" else torch.float32
    assert {t.dtype for t in found} == {acc}
    assert_outputs(stage, found, want, [str(acc).removeprefix("torch.")] * 2)


@pytest.mark.parametrize("case", CASES["ssd_chunk_scan"], ids=str)
@pytest.mark.parametrize("chunk_size", [None, 1, 3, 64])
def test_composed_equal_the_whole(case, chunk_size):
    """All options of ssd_chunk_scan but one state per sequence, which the stages do not have."""
    arguments, options = make(case, 3), make_tensors(case, 3)
    if str(case) in ("long", "mamba2_130m") and chunk_size is not None:
        pytest.skip("the small cases have every option")
    if chunk_size is not None:
        options["chunk_size"] = chunk_size
    meta = options.pop("seq_meta")
    if meta is not None:
        if meta.state_per_sequence:
            options["initial_states"] = arguments["initial_states"] = None
        ids = meta.positions(case.batch, case.seqlen)
        arguments["seq_meta"], options["seq_idx"] = {"seq_idx": ids.numpy()}, ids
    for limit in ((0.0, float("inf")), (0.1, 0.4)):
        y, states = compose(reference, **options, dt_limit=limit)
        want_y, want_states = judge.ssd_chunk_scan(**arguments, dt_limit=limit)
        assert_close("y", y, want_y, WHOLE)
        assert_close("final_states", states, want_states, WHOLE)


def test_composed_judges_equal_the_whole():
    case = SsdCase("judges", 2, 19, 2, 3, 2, 4, 2, layout="seq_idx mask")
    arguments = make(case, 4)
    ids, _, _ = judge.positions(arguments["seq_meta"], 2, 19)
    want = judge.ssd_chunk_scan(**arguments)
    del arguments["seq_meta"]
    for got, value in zip(compose(stages_judge, **arguments, seq_idx=ids), want, strict=True):
        assert_close("composed judges", got, value, WHOLE)


def test_composed_gradients_equal_those_of_the_whole():
    case = SsdCase("gradients", 2, 11, 2, 3, 2, 4, 2, skip="channel", layout="seq_idx")
    arguments = make_tensors(case, 5)
    ids = arguments.pop("seq_meta").positions(2, 11)

    def whole(**given):
        meta = SeqMeta(seq_idx=ids)
        return reference.ssd_chunk_scan(**given, seq_meta=meta, return_final_states=True)

    want = gradients(whole, arguments)
    found = gradients(lambda **given: compose(reference, **given, seq_idx=ids), arguments)
    for name, gradient in found.items():
        assert_close(f"gradient of {name}", gradient, want[name], WHOLE)


@pytest.mark.parametrize("name", ["tiny", "seq_idx"])
@pytest.mark.parametrize("stage", STAGES)
def test_gradcheck(stage, name):
    case = named(stage, name)
    if name == "seq_idx":
        case = StageCase(stage, "ids", 1, 9, 1, 1, 1, 4, layout="seq_idx")
    gradcheck(getattr(reference, stage), make_tensors(case))


TIME_AXES = {"x": 1, "B": 1, "C": 1, "z": 1}


@pytest.mark.parametrize("stage", ["ssd_chunk_cumsum", "ssd_chunk_state", "ssd_chunk_output"])
def test_nan_in_skipped_steps_changes_nothing(stage):
    function, arguments = getattr(reference, stage), make_tensors(named(stage, "seq_idx"), 6)
    skipped = arguments["seq_idx"] < 0
    assert skipped.any()
    axes = {"dt": 1} if stage == "ssd_chunk_cumsum" else TIME_AXES
    axes = {name: axis for name, axis in axes.items() if name in arguments}
    poisoned = poison(arguments, axes, skipped)
    if stage != "ssd_chunk_cumsum":
        poisoned["dt"] = arguments["dt"].clone()
        flat = poisoned["dt"].flatten(2)[..., : skipped.shape[1]]
        flat[:] = torch.where(skipped[:, None], torch.nan, flat)
        poisoned["dt"] = poisoned["dt"].flatten(2)
        poisoned["dt"][..., : skipped.shape[1]] = flat
        poisoned["dt"] = poisoned["dt"].reshape(arguments["dt"].shape)
        assert poisoned["dt"].isnan().any()
    if stage == "ssd_chunk_output":
        # CB of a skipped step, as ssd_bmm_chunk makes it from NaN.
        lines = torch.nn.functional.pad(skipped, (0, -skipped.shape[1] % 8)).unflatten(1, (-1, 8))
        bad = (lines[..., None] | lines[:, :, None])[:, :, None]
        poisoned["CB"] = arguments["CB"].masked_fill(bad, torch.nan)
    found, want = (outputs_of(function(**a)) for a in (poisoned, arguments))
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))
    for name, gradient in gradients(function, poisoned).items():
        assert not gradient.isnan().any(), name


def test_what_another_sequence_leaves_does_not_enter():
    """A state that is not a number stays in its sequence."""
    ids = torch.tensor([[0, 0, 1, 1, 1, 1]], dtype=torch.int32)
    states = torch.ones(1, 3, 1, 1, 1, dtype=torch.float64)
    states[0, 0] = torch.nan
    decay = torch.zeros(1, 1, 3, 2, dtype=torch.float64)
    states_in, final = reference.ssd_state_passing(states, decay, seq_idx=ids)
    assert states_in[0, :, 0, 0, 0].isnan().tolist() == [False, True, False]
    assert final.item() == 2.0
    one = torch.ones(1, 6, 1, 1, dtype=torch.float64)
    products = reference.ssd_bmm_chunk(one, one, 2)
    y = reference.ssd_chunk_output(products, one, decay + 1, decay, one, states_in, seq_idx=ids)
    assert y.flatten().tolist() == [1.0, 2.0, 1.0, 2.0, 2.0, 3.0]


def test_decays_are_summed_in_float64():
    """dA_cumsum in float32 is the exact sum rounded once, however long the chunk is."""
    step = torch.rand(1, 4096, 1)
    dt, decay = reference.ssd_chunk_cumsum(step, torch.tensor([-3.3]), 4096)
    exact = (dt.double() * torch.tensor([-3.3]).double()).cumsum(3)
    assert torch.equal(decay, exact.float())


def test_precision_of_large_decays_is_what_the_page_says():
    """The exponent is off by at most one unit in the last place of dA_cumsum."""
    torch.manual_seed(0)
    dt = torch.rand(1, 64, 1)
    for scale in (1.0, 10.0, 100.0):
        A = torch.tensor([-scale])
        step, decay = reference.ssd_chunk_cumsum(dt, A, 64)
        exact = (step.double() * A.double()).cumsum(3)[0, 0, 0]
        error = (decay[0, 0, 0] - decay[0, 0, 0, :, None]).double() - (exact - exact[:, None])
        assert error.abs().max() <= 2.0**-23 * exact.abs().max()


@pytest.mark.parametrize("stage", STAGES)
def test_noncontiguous(stage):
    arguments = make_tensors(named(stage, "groups"), 7)
    found = getattr(reference, stage)(**strided(arguments))
    assert_outputs(stage, found, getattr(reference, stage)(**arguments), ["float64"] * 2)


@pytest.mark.parametrize("name", ["tiny", "empty_seq"])
@pytest.mark.parametrize("stage", STAGES)
def test_leaves_inputs_alone(stage, name):
    arguments = make_tensors(named(stage, name))
    before = {n: t.clone() for n, t in arguments.items() if torch.is_tensor(t)}
    for output in outputs_of(getattr(reference, stage)(**arguments)):
        output.fill_(9.0)
    assert all(torch.equal(arguments[n], t) for n, t in before.items())


IDS = torch.zeros(2, 6, dtype=torch.int32)
REJECTED = [
    ("ssd_chunk_cumsum", "dt", lambda t: t[0], "dt must have shape (B, L, H), got (6, 4)"),
    ("ssd_chunk_cumsum", "A", lambda t: t[:3], "A must have shape (H,) = (4,), got (3,)"),
    ("ssd_chunk_cumsum", "chunk_size", lambda _: 0, "chunk_size must be at least 1, got 0"),
    (
        "ssd_chunk_cumsum",
        "chunk_size",
        lambda _: 2**63,
        f"chunk_size must be below 2**31, got {2**63}",
    ),
    (
        "ssd_chunk_cumsum",
        "dt_bias",
        lambda t: t[None],
        "dt_bias must have shape (H,) = (4,), got (1, 4)",
    ),
    (
        "ssd_chunk_cumsum",
        "dt_limit",
        lambda _: (1.0, 0.0),
        "dt_limit must be (low, high), got (1.0, 0.0)",
    ),
    (
        "ssd_chunk_cumsum",
        "seq_idx",
        lambda _: IDS[:, :5],
        "seq_idx must have shape (B, L) = (2, 6), got (2, 5)",
    ),
    (
        "ssd_chunk_cumsum",
        "seq_idx",
        lambda _: IDS - 2,
        "seq_idx must be -1 or a sequence number, got -2",
    ),
    (
        "ssd_chunk_cumsum",
        "seq_idx",
        lambda _: IDS.long(),
        "seq_idx must have dtype int32, got int64",
    ),
    ("ssd_chunk_state", "x", lambda t: t[0], "x must have shape (B, L, H, P), got (6, 4, 3)"),
    (
        "ssd_chunk_state",
        "B",
        lambda t: t[:, :, 0],
        "B must have shape (B, L, G, N) = (2, 6, 1, N), got (2, 6, 5)",
    ),
    (
        "ssd_chunk_state",
        "B",
        lambda t: t[:, :, :1].expand(-1, -1, 3, -1),
        "B must have a group count that divides H = 4, got 3",
    ),
    (
        "ssd_chunk_state",
        "dt",
        lambda t: t[:, :3],
        "dt must have shape (B, H, C, Q) = (2, 4, 2, 4), got (2, 3, 2, 4)",
    ),
    (
        "ssd_chunk_state",
        "dt",
        lambda t: t[:, :, :1],
        "dt must have ceil(L / Q) chunks for L = 6 and Q = 4, got 1",
    ),
    (
        "ssd_chunk_state",
        "dt",
        lambda t: t[..., :0],
        "dt must have at least 1 step per chunk, got 0",
    ),
    (
        "ssd_chunk_state",
        "dA_cumsum",
        lambda t: t[..., :3],
        "dA_cumsum must have shape (B, H, C, Q) = (2, 4, 2, 4), got (2, 4, 2, 3)",
    ),
    (
        "ssd_chunk_state",
        "seq_idx",
        lambda _: IDS[:1],
        "seq_idx must have shape (B, L) = (2, 6), got (1, 6)",
    ),
    (
        "ssd_state_passing",
        "states",
        lambda t: t[0],
        "states must have shape (B, C, H, P, N), got (2, 4, 3, 5)",
    ),
    (
        "ssd_state_passing",
        "dA_cumsum",
        lambda t: t[:, :, :1],
        "dA_cumsum must have shape (B, H, C, Q) = (2, 4, 2, 4), got (2, 4, 1, 4)",
    ),
    (
        "ssd_state_passing",
        "dA_cumsum",
        lambda t: t[..., :0],
        "dA_cumsum must have at least 1 step per chunk, got 0",
    ),
    (
        "ssd_state_passing",
        "initial_states",
        lambda t: t[:1],
        "initial_states must have shape (B, H, P, N) = (2, 4, 3, 5), got (1, 4, 3, 5)",
    ),
    (
        "ssd_state_passing",
        "seq_idx",
        lambda _: IDS[:, :4],
        "seq_idx must have the steps of 2 chunks of 4, got 4",
    ),
    ("ssd_bmm_chunk", "C", lambda t: t[0], "C must have shape (B, L, G, N), got (6, 2, 5)"),
    ("ssd_bmm_chunk", "C", lambda t: t[:, :, :0], "C must have at least 1 group, got 0"),
    ("ssd_bmm_chunk", "B", lambda t: t[:, :, :0], "B must have at least 1 group, got 0"),
    (
        "ssd_bmm_chunk",
        "B",
        lambda t: t[..., :4],
        "B must have shape (B, L, G, N) = (2, 6, 2, 5), got (2, 6, 2, 4)",
    ),
    ("ssd_bmm_chunk", "chunk_size", lambda _: -1, "chunk_size must be at least 1, got -1"),
    (
        "ssd_bmm_chunk",
        "chunk_size",
        lambda _: 2**31,
        f"chunk_size must be below 2**31, got {2**31}",
    ),
    (
        "ssd_chunk_output",
        "CB",
        lambda t: t[..., :3],
        "CB must have shape (B, C, G, Q, Q) = (2, 2, 2, 4, 4), got (2, 2, 2, 4, 3)",
    ),
    (
        "ssd_chunk_output",
        "CB",
        lambda t: t[:, :, :1].expand(-1, -1, 3, -1, -1),
        "CB must have a group count that divides H = 4, got 3",
    ),
    ("ssd_chunk_output", "x", lambda t: t[0], "x must have shape (B, L, H, P), got (6, 4, 3)"),
    (
        "ssd_chunk_output",
        "C",
        lambda t: t[:, :, :0],
        "C must have a group count that divides H = 4, got 0",
    ),
    (
        "ssd_chunk_output",
        "states_in",
        lambda t: t[..., :4],
        "states_in must have shape (B, C, H, P, N) = (2, 2, 4, 3, 5), got (2, 2, 4, 3, 4)",
    ),
    ("ssd_chunk_output", "D", lambda t: t[:3], "D must have shape (H,) = (4,), got (3,)"),
    (
        "ssd_chunk_output",
        "z",
        lambda t: t[:1],
        "z must have shape (B, L, H, P) = (2, 6, 4, 3), got (1, 6, 4, 3)",
    ),
]


def reject_case(stage: str) -> dict:
    return make_tensors(StageCase(stage, "reject", 2, 6, 4, 3, 5, 4, 2, 2))


@pytest.mark.parametrize(("stage", "name", "change", "message"), REJECTED)
def test_rejects_value(stage, name, change, message):
    arguments = reject_case(stage)
    arguments[name] = change(arguments.get(name))
    with pytest.raises(ValueError) as error:
        getattr(reference, stage)(**arguments)
    assert str(error.value) == f"{stage}: {message}"


MAIN = {"ssd_chunk_cumsum": "dt", "ssd_state_passing": "states", "ssd_bmm_chunk": "C"}


@pytest.mark.parametrize(
    ("stage", "name"),
    [
        (stage, name)
        for stage in STAGES
        for name, tensor in reject_case(stage).items()
        if torch.is_tensor(tensor)
    ],
)
def test_rejects_dtype_device_and_type(stage, name):
    function, arguments = getattr(reference, stage), reject_case(stage)
    floats = "float64, float32, bfloat16 or float16"
    with pytest.raises(ValueError, match=f"^{stage}: {name} must have dtype {floats}, got int64$"):
        function(**{**arguments, name: arguments[name].long()})
    if name != MAIN.get(stage, "x"):
        with pytest.raises(ValueError, match=f"^{stage}: {name} must be on cpu, got meta$"):
            function(**{**arguments, name: arguments[name].to("meta")})
    with pytest.raises(TypeError, match=f"^{stage}: {name} must be a torch.Tensor, got list$"):
        function(**{**arguments, name: [1.0]})


def test_rejects_chunk_size_that_is_no_int():
    for stage in ("ssd_chunk_cumsum", "ssd_bmm_chunk"):
        with pytest.raises(TypeError, match=f"^{stage}: chunk_size must be an int, got float$"):
            getattr(reference, stage)(**{**reject_case(stage), "chunk_size": 4.0})


def test_all_of_a_row_may_be_skipped():
    ids = torch.full((1, 5), -1, dtype=torch.int32)
    case = SsdCase("skipped", 1, 5, 2, 3, 2, 2)
    arguments = make_tensors(case)
    del arguments["seq_meta"]
    y, states = compose(reference, **arguments, seq_idx=ids)
    assert not y.any()
    assert np.array_equal(states, arguments["initial_states"])
