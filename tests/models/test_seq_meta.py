"""SeqMeta: canonical positions and refusals.  Judge: plain loops of tests.judge."""

import numpy as np
import pytest
import torch

from ssm.ops.python.layout import layout_of
from ssm.seq_meta import SeqMeta
from tests import judge
from tests.cases import CASES, make
from tests.tensors import tensors

PACKED = [c for c in CASES["selective_scan"] if c.layout]


def ints(*values):
    return torch.tensor(values)


@pytest.mark.parametrize("case", PACKED, ids=str)
def test_positions_match_judge(case):
    seq_meta = make(case)["seq_meta"]
    meta = tensors({"seq_meta": seq_meta})["seq_meta"]
    want, per_sequence, nstates = judge.positions(seq_meta, case.batch, case.seqlen)
    ids = meta.positions(case.batch, case.seqlen, "cpu")
    assert ids.dtype == torch.int32
    assert np.array_equal(ids.numpy(), want)
    assert meta.state_per_sequence == per_sequence
    assert meta.num_sequences == (nstates if per_sequence else None)


@pytest.mark.parametrize("case", PACKED, ids=str)
def test_layout_matches_judge(case):
    """The vectorised layout says the same as the sequences cut out one by one."""
    seq_meta = make(case)["seq_meta"]
    batch, seqlen = case.batch, case.seqlen
    layout = layout_of(tensors({"seq_meta": seq_meta})["seq_meta"], batch, seqlen, "cpu")
    keep, resets = np.zeros((batch, seqlen), bool), np.zeros((batch, seqlen), bool)
    previous = np.full((batch, seqlen), -1)
    for row, steps, start, _ in judge.runs(seq_meta, batch, seqlen):
        keep[row, steps] = True
        resets[row, steps[0]] = layout.per_sequence or start is None
        previous[row, steps[1:]] = steps[:-1]
    assert np.array_equal(layout.keep.numpy(), keep)
    assert np.array_equal(layout.resets.numpy(), resets)
    inside = keep & (previous >= 0)
    assert np.array_equal(layout.previous.numpy()[inside], previous[inside])


@pytest.mark.parametrize(
    ("cu_seqlens", "batch", "seqlen", "want"),
    [
        ((0, 3, 8), 1, 8, [[0, 0, 0, 1, 1, 1, 1, 1]]),
        ((0, 0, 2, 2, 3), 1, 4, [[1, 1, 3, -1]]),
        ((0, 2, 3, 5), 2, 3, [[0, 0, 1], [2, 2, -1]]),
        ((0,), 2, 2, [[-1, -1], [-1, -1]]),
        ((0, 0), 1, 2, [[-1, -1]]),
        ((0, 0, 0), 2, 0, [[], []]),
        ((0, 0), 0, 4, []),
    ],
)
def test_positions_of_cu_seqlens(cu_seqlens, batch, seqlen, want):
    for dtype in (torch.int32, torch.int64):
        meta = SeqMeta(cu_seqlens=ints(*cu_seqlens).to(dtype))
        ids = meta.positions(batch, seqlen)
        assert ids.shape == (batch, seqlen)
        assert ids.tolist() == want
        assert meta.num_sequences == len(cu_seqlens) - 1


def test_mask_skips_in_every_form():
    mask = torch.tensor([[True, False, True, False]])
    assert SeqMeta(mask=mask).positions(1, 4).tolist() == [[0, -1, 0, -1]]
    meta = SeqMeta(seq_idx=ints([5, 5, 2, -1]), mask=mask)
    assert meta.positions(1, 4).tolist() == [[5, -1, 2, -1]]
    meta = SeqMeta(cu_seqlens=ints(0, 2, 3), mask=mask)
    assert meta.positions(1, 4).tolist() == [[0, -1, 1, -1]]


def test_seq_idx_and_cu_seqlens_may_agree():
    meta = SeqMeta(seq_idx=ints([7, 7, 3, -1]), cu_seqlens=ints(0, 2, 3))
    assert meta.state_per_sequence
    assert meta.positions(1, 4).tolist() == [[0, 0, 1, -1]]


def test_ids_without_a_sequence_in_cu_seqlens_are_padding():
    meta = SeqMeta(seq_idx=ints([0, 0, 1, 2, 2, 3]), cu_seqlens=ints(0, 2, 3, 3))
    assert meta.num_sequences == 3
    assert meta.positions(1, 6).tolist() == [[0, 0, 1, -1, -1, -1]]
    meta = SeqMeta(seq_idx=ints([0, 0], [0, 0]), cu_seqlens=ints(0, 2))
    assert meta.positions(2, 2).tolist() == [[0, 0], [-1, -1]]


def test_positions_are_made_once():
    meta = SeqMeta(cu_seqlens=ints(0, 3))
    assert meta.positions(1, 4) is meta.positions(1, 4)
    assert meta.positions(2, 3).shape == (2, 3)


def test_positions_made_in_inference_mode_stay_there():
    meta = SeqMeta(cu_seqlens=ints(0, 3))
    with torch.inference_mode():
        assert meta.positions(1, 4).is_inference()
    assert not meta.positions(1, 4).is_inference()


def test_positions_go_to_the_device():
    assert SeqMeta(mask=torch.ones(1, 2, dtype=torch.bool)).positions(1, 2, "meta").is_meta


def test_is_frozen():
    meta = SeqMeta(cu_seqlens=ints(0, 3))
    with pytest.raises(AttributeError):
        meta.cu_seqlens = None


def test_compiles_with_tensors_as_arguments():
    def positions(cu_seqlens, mask):
        return SeqMeta(cu_seqlens=cu_seqlens, mask=mask).positions(2, 3)

    cu_seqlens, mask = ints(0, 2, 3, 5), torch.tensor([[True, True, True], [False, True, False]])
    compiled = torch.compile(positions, fullgraph=True, backend="eager")
    assert compiled(cu_seqlens, mask).tolist() == positions(cu_seqlens, mask).tolist()


MASK = torch.ones(1, 4, dtype=torch.bool)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "seq_idx must be given when cu_seqlens and mask are not, got None"),
        ({"seq_idx": ints(0, 1)}, "seq_idx must have shape (B, L), got (2,)"),
        ({"cu_seqlens": ints([0, 1])}, "cu_seqlens must have shape (S + 1,), got (1, 2)"),
        ({"mask": MASK[0]}, "mask must have shape (B, L), got (4,)"),
        ({"seq_idx": ints([0.0])}, "seq_idx must have dtype int32 or int64, got float32"),
        ({"cu_seqlens": ints(0.0)}, "cu_seqlens must have dtype int32 or int64, got float32"),
        ({"mask": ints([1])}, "mask must have dtype bool, got int64"),
        ({"cu_seqlens": ints(0)[:0]}, "cu_seqlens must have at least 1 element, got 0"),
        ({"cu_seqlens": ints(3, 4)}, "cu_seqlens must start at 0, got 3"),
        ({"cu_seqlens": ints(0, 4, 2)}, "cu_seqlens must not decrease, got 4 then 2"),
        ({"cu_seqlens": ints(0, -4)}, "cu_seqlens must not decrease, got 0 then -4"),
        ({"seq_idx": ints([0, -2])}, "seq_idx must be at least -1, got -2"),
        ({"seq_idx": ints([0, 2**31])}, "seq_idx must fit in int32, got 2147483648"),
        (
            {"seq_idx": ints([0, 0, 1]), "mask": MASK},
            "mask must have shape (B, L) = (1, 3), got (1, 4)",
        ),
        (
            {"seq_idx": ints([0, 0, 1, -1]), "mask": MASK},
            "mask must be False where seq_idx has padding, got True at (0, 3)",
        ),
        (
            {"cu_seqlens": ints(0, 2), "mask": MASK},
            "mask must be False where cu_seqlens has padding, got True at (0, 2)",
        ),
        (
            {"seq_idx": ints([0, 1, 1, 1]), "cu_seqlens": ints(0, 2, 4)},
            "seq_idx must agree with cu_seqlens, got 1 at (0, 1)",
        ),
        (
            {"seq_idx": ints([0, 0, 0, 0]), "cu_seqlens": ints(0, 2, 4)},
            "seq_idx must agree with cu_seqlens, got 0 at (0, 2)",
        ),
        (
            {"seq_idx": ints([0, 0, -1, -1]), "cu_seqlens": ints(0, 2, 4)},
            "seq_idx must agree with cu_seqlens, got -1 at (0, 2)",
        ),
        (
            {"seq_idx": ints([0, 0, 0, 1]), "cu_seqlens": ints(0, 2)},
            "seq_idx must agree with cu_seqlens, got 0 at (0, 2)",
        ),
        (
            {"seq_idx": ints([0, 0, 1, 1]), "cu_seqlens": ints(0, 2, 5)},
            "cu_seqlens must end at or before B * L = 4, got 5",
        ),
        (
            {"seq_idx": ints([0, 0]), "cu_seqlens": ints(0, 2).to("meta")},
            "cu_seqlens must be on cpu, got meta",
        ),
    ],
)
def test_rejects_fields(fields, message):
    with pytest.raises(ValueError) as error:
        SeqMeta(**fields)
    assert str(error.value) == f"seq_meta: {message}"


@pytest.mark.parametrize("name", ["seq_idx", "cu_seqlens", "mask"])
def test_rejects_type(name):
    with pytest.raises(TypeError, match=f"^seq_meta: {name} must be a torch.Tensor, got list$"):
        SeqMeta(**{name: [0, 1]})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"seq_idx": ints([0, 1])}, "seq_idx must have shape (B, L) = (2, 3), got (1, 2)"),
        ({"mask": MASK}, "mask must have shape (B, L) = (2, 3), got (1, 4)"),
        ({"cu_seqlens": ints(0, 3, 7)}, "cu_seqlens must end at or before B * L = 6, got 7"),
        (
            {"cu_seqlens": ints(0, 2, 5)},
            "cu_seqlens must not cross a row of length 3, got sequence 2:5",
        ),
    ],
)
def test_rejects_size(fields, message):
    meta = SeqMeta(**fields)
    for _ in range(2):
        with pytest.raises(ValueError) as error:
            meta.positions(2, 3)
        assert str(error.value) == f"seq_meta: {message}"
