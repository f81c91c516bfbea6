"""MHA with a state: one attention however the sequence is cut, packed or padded.

Judge: the same module over each sequence alone and whole, which tests/models/test_attention.py
judges by the formula.
"""

import itertools

import pytest
import torch

from ssm.seq_meta import SeqMeta
from ssm.state import State
from tests.attention import (
    LENGTH,
    RAGGED,
    assert_same_row,
    assert_same_state,
    close,
    compiled,
    each_variant,
    inputs,
    mha,
    some_variants,
)


@each_variant
@pytest.mark.parametrize("with_grad", [False, True])
@pytest.mark.parametrize("max_seqlen", [None, LENGTH])
def test_chunked_equals_whole(variant, with_grad, max_seqlen):
    m, x = mha(variant), inputs()
    whole = m.allocate_state(2, max_seqlen=max_seqlen)
    with torch.set_grad_enabled(with_grad):
        want = m(x, state=whole)
        close(want, m(x))
        for cut in range(LENGTH + 1):
            state = m.allocate_state(2, max_seqlen=max_seqlen)
            parts = [m(part, state=state) for part in x.split([cut, LENGTH - cut], dim=1)]
            close(torch.cat(parts, 1), want)
            assert_same_state(state, whole)


@each_variant
def test_three_chunks_equal_whole(variant):
    m, x = mha(variant), inputs()
    with torch.no_grad():
        want = m(x)
        for a, b in itertools.combinations(range(LENGTH + 1), 2):
            state = m.allocate_state(2)
            parts = [m(part, state=state) for part in x.split([a, b - a, LENGTH - b], dim=1)]
            close(torch.cat(parts, 1), want)


@each_variant
@pytest.mark.parametrize("with_grad", [False, True])
def test_step_equals_whole(variant, with_grad):
    m, x = mha(variant), inputs()
    states = m.allocate_inference_cache(2, LENGTH)
    state = m.allocate_state(2)
    want = m(x, state=state)
    with torch.set_grad_enabled(with_grad):
        for t in range(LENGTH):
            y, *same = m.step(x[:, t : t + 1], *states)
            close(y, want[:, t : t + 1])
            assert all(a is b for a, b in zip(same, states, strict=True))
    assert not any(s.requires_grad for s in states)
    assert_same_state(State({0: states}), state)


def test_decoding_reads_the_window_before_the_convolution():
    """Upstream keeps the outputs of the convolution, which spoils the next d_conv - 1 tokens."""
    m, x = mha("conv"), inputs()
    state = m.allocate_state(2)
    with torch.no_grad():
        m(x[:, :4], state=state)
        window = state.key_value_memory_dict[0][1]
        close(window, m.in_proj(x[:, :4]).transpose(1, 2)[..., 1:])


def test_decoding_copies_no_cache():
    m, x = mha(), inputs(length=20)
    for limit in (None, 20):
        state = m.allocate_state(2, max_seqlen=limit)
        moves, last = 0, None
        with torch.no_grad():
            for t in range(20):
                m(x[:, t : t + 1], state=state)
                pointer = state.key_value_memory_dict[0][0].data_ptr()
                moves += pointer != last
                last = pointer
        # 1, 2, 4, ... 32 slots if it grows.
        assert moves == (1 if limit else 6)


def test_cache_grows_by_doubling_up_to_its_limit():
    m, x = mha(), inputs(length=1)
    state, slots = m.allocate_state(2), []
    assert state.key_value_memory_dict[0][0].shape[1] == 0
    with torch.no_grad():
        m(inputs(length=3), state=state)
        for _ in range(4):
            slots.append(state.key_value_memory_dict[0][0].shape[1])
            m(x, state=state)
    assert slots == [3, 6, 6, 6]
    state = State(max_batch_size=2, max_seqlen=5)
    with torch.no_grad():
        m(inputs(length=5), state=state)
        assert state.key_value_memory_dict[0][0].shape == (2, 5, 2, 2, 6)


def test_a_full_cache_is_refused_and_nothing_changed():
    m, x = mha(), inputs(length=4)
    state = m.allocate_state(2, max_seqlen=6)
    with torch.no_grad():
        m(x, state=state)
        before = state.clone()
        with pytest.raises(ValueError, match="MHA: state must have room for 8 tokens per row, got"):
            m(x, state=state)
    for a, b in zip(state.key_value_memory_dict[0], before.key_value_memory_dict[0], strict=True):
        assert torch.equal(a, b)
    # Padding needs no room.
    mask = torch.tensor([[0, 0, 1, 1], [1, 0, 0, 1]])
    with torch.no_grad():
        m(x, state=state, attention_mask=mask)
    assert state.key_value_memory_dict[0][-1].tolist() == [6, 6]
    states = state.key_value_memory_dict[0]
    with pytest.raises(ValueError, match="MHA: state must have room for 7 tokens per row, got 6"):
        m.step(x[:, :1], *states)


def test_gradients_flow_through_the_state():
    m, x = mha(), inputs()
    x.requires_grad_()
    wanted = [x, *m.parameters()]
    want = torch.autograd.grad(m(x).square().sum(), wanted)
    for lengths in ([3, 1, 3], [1] * LENGTH, [0, 7], [6, 0, 1]):
        for limit in (None, 9):
            state, loss = m.allocate_state(2, max_seqlen=limit), 0
            for part in x.split(lengths, dim=1):
                loss = loss + m(part, state=state).square().sum()
            for got, expected in zip(torch.autograd.grad(loss, wanted), want, strict=True):
                close(got, expected)
    assert state.key_value_memory_dict[0][0].requires_grad
    assert not state.detach().key_value_memory_dict[0][0].requires_grad


def test_gradients_flow_through_ragged_and_packed_states():
    m, x = mha(), inputs()
    x.requires_grad_()
    wanted = [x, *m.parameters()]
    keep = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 0, 1, 1, 0, 1, 1]])
    loss = sum(m(row[k.bool()][None]).square().sum() for row, k in zip(x, keep, strict=True))
    want = torch.autograd.grad(loss, wanted)
    state, loss = m.allocate_state(2), 0
    for part, mask in zip(x.split([4, 1, 2], 1), keep.split([4, 1, 2], 1), strict=True):
        y = m(part, state=state, attention_mask=mask)
        loss = loss + y[mask.bool()].square().sum()
    for got, expected in zip(torch.autograd.grad(loss, wanted), want, strict=True):
        close(got, expected)


def test_states_of_a_graph_survive_what_follows():
    m, x = mha(), inputs()
    state = m.allocate_state(2)
    loss = m(x, state=state).square().sum() + m(x, state=state).square().sum()
    with torch.no_grad():
        m(x[:, :1], state=state)
        m(x, state=state)
    assert not state.key_value_memory_dict[0][0].requires_grad
    loss = loss + m(x, state=state).square().sum()
    state.reset()
    loss.backward()
    assert m.in_proj.weight.grad.abs().sum() > 0


@each_variant
def test_packed_equals_separate(variant):
    m, lengths = mha(variant), [1, 4, 2]
    x = inputs(1, 8)
    alone = torch.cat([m(part) for part in x[:, :7].split(lengths, dim=1)], 1)
    seq_idx = torch.tensor([[0, 1, 1, 1, 1, 0, 0, -1]])  # the last is a new sequence
    skipped = m.out_proj(torch.zeros_like(m.out_proj.weight[0]))
    for kwargs in (
        {"cu_seqlens": torch.tensor([0, 1, 5, 7])},
        {"cu_seqlens": torch.tensor([0, 0, 1, 5, 5, 7, 7])},
        {"seq_idx": seq_idx},
        {"seq_meta": SeqMeta(seq_idx=seq_idx)},
        {"seq_idx": seq_idx, "state": m.allocate_state(1)},
        {"cu_seqlens": torch.tensor([0, 1, 1, 5, 7]), "state": m.allocate_state(4)},
    ):
        x[0, 7] = torch.nan
        y = m(x, **kwargs)
        close(y[:, :7], alone)
        assert torch.equal(y[0, 7], skipped)


@some_variants
@pytest.mark.parametrize("with_grad", [False, True])
def test_the_first_packed_sequence_continues_and_the_last_remains(variant, with_grad):
    m, head, x = mha(variant), inputs(2, 3), inputs(2, 6)
    seq_idx = torch.tensor([[4, 4, -1, 4, 4, 4], [2, 5, 5, -1, 7, 7]])
    keep = torch.tensor([[0, 1, 1], [1, 1, 1]])  # the state holds 2 and 3 tokens
    with torch.set_grad_enabled(with_grad):
        state = m.allocate_state(2)
        m(head, state=state, attention_mask=keep)
        y = m(x, state=state, seq_idx=seq_idx)
        after = m(head, state=state)
        for row, cuts in enumerate(([[0, 1, 3, 4, 5]], [[0], [1, 2], [4, 5]])):
            alone = m.allocate_state(1)
            m(head[row, keep[row].bool()][None], state=alone)
            for cut in cuts:
                close(y[row, cut], m(x[row : row + 1, cut], state=alone)[0])
                kept, alone = alone, m.allocate_state(1)
            close(after[row], m(head[row : row + 1], state=kept)[0])


@some_variants
def test_cu_seqlens_without_a_token(variant):
    """Sequences that are all empty, in front of padding: nothing is read, nothing changes."""
    m = mha(variant)
    state = m.allocate_state(2)
    meta = SeqMeta(cu_seqlens=torch.tensor([0, 0, 0]))
    with torch.no_grad():
        y = m(inputs(batch=1), state=state, seq_meta=meta)
        assert y.shape == inputs(batch=1).shape
        assert y.isfinite().all()
        assert m(inputs(batch=1), seq_meta=meta).shape == y.shape
        x = inputs(batch=2)
        close(m(x, state=state), m(x))


@some_variants
@pytest.mark.parametrize("with_grad", [False, True])
def test_cu_seqlens_have_a_state_each(variant, with_grad):
    m, x = mha(variant), inputs(2, 5)
    state = m.allocate_state(4)
    calls = [
        ([0, 2, 5, 9, 9], None),
        ([0, 5, 5, 5, 6], None),
        ([0, 0, 5, 6, 8], [[1, 0, 1, 1, 0], [1, 1, 0, 1, 1]]),
    ]
    alone = [m.allocate_state(1) for _ in range(4)]
    with torch.set_grad_enabled(with_grad):
        for ends, mask in calls:
            keep = torch.ones(2, 5) if mask is None else torch.tensor(mask)
            given = {"cu_seqlens": torch.tensor(ends), "mask": keep.bool()}
            given["mask"][1, ends[-1] - 5 :] = False
            meta = SeqMeta(**given)
            y = m(x, state=state, seq_meta=meta).flatten(0, 1)
            flat, keep = x.flatten(0, 1), given["mask"].flatten()
            for row, (begin, end) in enumerate(itertools.pairwise(ends)):
                chosen = torch.arange(begin, end)[keep[begin:end]]
                close(y[chosen], m(flat[chosen][None], state=alone[row])[0])
    for row in range(4):
        assert_same_row(state, row, alone[row])


@some_variants
@pytest.mark.parametrize("with_grad", [False, True])
def test_cu_seqlens_of_very_unequal_lengths_have_a_state_each(variant, with_grad):
    """One long sequence among short ones: each is attended to by itself, none is padded."""
    m, ends = mha(variant), [0, 1, 2, 3, 14, 14, 15]
    state = m.allocate_state(6)
    alone = [m.allocate_state(1) for _ in range(6)]
    with torch.set_grad_enabled(with_grad):
        for _ in range(2):
            x = inputs(1, 15)
            y = m(x, state=state, cu_seqlens=torch.tensor(ends))
            for row, (begin, end) in enumerate(itertools.pairwise(ends)):
                close(y[:, begin:end], m(x[:, begin:end], state=alone[row]))
    for row in range(6):
        assert_same_row(state, row, alone[row])


@each_variant
@pytest.mark.parametrize("mask", ["0011111", "1111100", "1011011", "0000000"])
def test_padding_is_skipped(variant, mask):
    keep = torch.tensor([[c == "1" for c in mask], [True] * LENGTH])
    m, x = mha(variant), inputs()
    x[~keep] = torch.nan
    state = m.allocate_state(2)
    y = m(x, state=state, attention_mask=keep.long())
    close(m(x, attention_mask=keep.long()), y)
    skipped = m.out_proj(torch.zeros_like(m.out_proj.weight[0]))
    assert (y[~keep] == skipped).all()
    with torch.no_grad():
        quiet = m.allocate_state(2)
        close(m(x, state=quiet, attention_mask=keep), y)
        assert_same_state(quiet, state)
    for row in range(2):
        alone = m.allocate_state(1)
        close(y[row, keep[row]], m(x[row, keep[row]][None], state=alone)[0])
        assert_same_row(state, row, alone)
    y.sum().backward()
    for name, parameter in m.named_parameters():
        assert parameter.grad.isfinite().all(), name


@some_variants
def test_ragged_rows_decode_as_alone(variant):
    m, x, more = mha(variant), inputs(3), inputs(3, 5)
    keep = torch.ones(3, LENGTH)
    keep[0, :4] = keep[1, 2:4] = 0
    state = m.allocate_state(3)
    with torch.no_grad():
        m(x, state=state, attention_mask=keep)
        y = [m(more[:, :2], state=state)]  # a chunk, then steps
        y += [m(more[:, t : t + 1], state=state) for t in range(2, 5)]
        y = torch.cat(y, 1)
        for row in range(3):
            alone = torch.cat([x[row, keep[row].bool()], more[row]])[None]
            close(y[row], m(alone)[0, -5:])
    assert state.key_value_memory_dict[0][-1].tolist() == [8, 10, 12]


@some_variants
@pytest.mark.parametrize("limit", [None, LENGTH])
def test_masked_step_leaves_the_state_alone(variant, limit):
    m = mha(variant)
    state = m.allocate_state(2, max_seqlen=limit)
    with torch.no_grad():
        keep = torch.tensor([[1] * 6 + [0], [1] * 7])
        m(inputs(), state=state, attention_mask=keep)  # the second row is full
        before = state.clone()
        x = inputs(length=1)
        x[1] = torch.nan
        y = m(x, state=state, attention_mask=torch.tensor([[1], [0]]))
    assert torch.equal(y[1, 0], m.out_proj(torch.zeros_like(m.out_proj.weight[0])))
    for after, old in zip(
        state.key_value_memory_dict[0], before.key_value_memory_dict[0], strict=True
    ):
        if after.dim() == 5:  # the cache may have grown
            after = after[:, : old.shape[1]]
        assert torch.equal(after[1], old[1])
        assert not torch.equal(after[0], old[0])


class InferenceParams:
    """What mamba_ssm hands to its modules."""

    def __init__(self, max_seqlen=LENGTH, batch=2):
        self.max_seqlen, self.max_batch_size, self.seqlen_offset = max_seqlen, batch, 0
        self.batch_size_offset, self.lengths_per_sample = 0, None
        self.key_value_memory_dict = {}


def test_inference_params_of_mamba_ssm():
    m, x = mha(layer_idx=3), inputs()
    want, params = m(x), InferenceParams()
    with torch.no_grad():
        for _ in range(2):  # offset 0 starts from nothing, whatever the memory holds
            params.seqlen_offset = 0
            parts = [m(x[:, :3], inference_params=params)]
            for t in range(3, LENGTH):
                params.seqlen_offset = t
                parts.append(m(x[:, t : t + 1], params))
            close(torch.cat(parts, 1), want)
        params.seqlen_offset = 7
        with pytest.raises(ValueError, match="room for 8 tokens per row, got 7"):
            m(x[:, :1], params)
    assert list(params.key_value_memory_dict) == [3]
    assert [tuple(t.shape) for t in params.key_value_memory_dict[3]] == [
        (2, LENGTH, 2, 2, 6),
        (2, 48, 4),
        (2,),
    ]


def test_a_smaller_offset_forgets_the_last_tokens():
    m, x = mha("rotary", layer_idx=0), inputs()
    params = InferenceParams()
    with torch.no_grad():
        m(inputs(), params)
        params.seqlen_offset = 0
        m(x[:, :5], params)
        params.seqlen_offset = 3
        close(m(x[:, 3:], params), m(x)[:, 3:])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_lengths_per_sample_say_what_each_row_holds(dtype):
    m, x = mha("rotary", layer_idx=0), inputs()
    params = InferenceParams(max_seqlen=10)
    with torch.no_grad():
        m(x, params)
        params.seqlen_offset, params.lengths_per_sample = 5, torch.tensor([2, 5], dtype=dtype)
        y = m(x[:, 6:], params)
        for row, length in enumerate((2, 5)):
            alone = torch.cat([x[row, :length], x[row, 6:]])[None]
            close(y[row, 0], m(alone)[0, -1])
        assert params.lengths_per_sample.tolist() == [2, 5]  # the caller counts
        assert params.key_value_memory_dict[0][-1].tolist() == [3, 6]
        params.lengths_per_sample = torch.tensor([2, 5, 1])
        with pytest.raises(ValueError, match=r"lengths_per_sample must have shape \(2,\), got"):
            m(x[:, 6:], params)
        params.seqlen_offset, params.lengths_per_sample = 0, torch.tensor([2, 5])
        close(m(x, params), m(x))  # a start from nothing, whatever the lengths say
        params.seqlen_offset, params.lengths_per_sample = 5, torch.tensor([2, -1])
        with pytest.raises(ValueError, match="lengths_per_sample must not be negative, got -1"):
            m(x[:, 6:], params)
        params.lengths_per_sample = [2, 5]
        with pytest.raises(
            TypeError, match=r"lengths_per_sample must be a torch\.Tensor, got list"
        ):
            m(x[:, 6:], params)
        params.lengths_per_sample = torch.tensor([2.0, 5])
        with pytest.raises(ValueError, match="lengths_per_sample must hold integers, got"):
            m(x[:, 6:], params)


def test_gradcheck():
    m, x = mha("all", mlp_dim=0), inputs(1, 3).requires_grad_()
    cache, conv_state, lengths = m.allocate_inference_cache(1, 4)
    with torch.no_grad():
        m.step(inputs(1, 1), cache, conv_state, lengths)
    cache.requires_grad_()
    conv_state.requires_grad_()

    def run(x, cache, conv_state):
        state = State({0: (cache, conv_state, lengths)}, 1, 4)
        y = m(x, state=state)
        return y, *state.key_value_memory_dict[0][:2]

    assert torch.autograd.gradcheck(run, (x, cache, conv_state))


def test_cache_of_another_dtype():
    m, x = mha(dtype=torch.float32), inputs(dtype=torch.float32)
    state = m.allocate_state(2, dtype=torch.bfloat16)
    with torch.no_grad():
        parts = [m(part, state=state) for part in x.split([4, 1, 2], dim=1)]
    assert state.key_value_memory_dict[0][0].dtype == torch.bfloat16
    got = torch.cat(parts, 1)
    assert got.dtype == torch.float32
    want = m(x)
    # Keys, values and the window are rounded once to 8 bits.
    assert (got - want).abs().max() < 3 * 2**-8 * want.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    ("rows", "layout"),
    [
        (2, {"seq_idx": torch.tensor([[0, 0, 1, 1, 1, 2, 2], [0, 0, 0, 0, 1, 1, 1]])}),
        (2, {"cu_seqlens": torch.tensor([0, 7, 14])}),
        # One long sequence among short ones: each is attended to by itself.
        (6, {"cu_seqlens": torch.tensor([0, 1, 2, 7, 12, 13, 14])}),
        (8, {"cu_seqlens": torch.tensor([0, 0, 0, 0, 0, 0, 0, 7, 8])}),
    ],
)
def test_packed_sequences_in_a_cache_of_another_dtype(rows, layout, dtype):
    m, x = mha(dtype=torch.float32), inputs(dtype=torch.float32)
    state = m.allocate_state(rows, dtype=dtype)
    with torch.no_grad():
        got = m(x, state=state, **layout)
        want = m(x, state=m.allocate_state(rows), **layout)
    assert state.key_value_memory_dict[0][0].dtype == dtype
    assert got.dtype == torch.float32
    # Keys, values and the window are rounded once to 8 bits.
    assert (got - want).abs().max() < 3 * 2**-8 * want.abs().max()


def test_state_clone_is_independent():
    m = mha()
    state = m.allocate_state(2)
    with torch.no_grad():
        m(inputs(), state=state)
        fork = state.clone()
        x = inputs(length=2)
        want = m(x, state=state)
        close(m(x, state=fork), want)
        assert (state.reset().key_value_memory_dict[0][-1] == 0).all()
        close(m(x, state=state), m(x))
    assert fork.key_value_memory_dict[0][-1].tolist() == [9, 9]


@pytest.mark.parametrize("mask", [None, RAGGED])
@pytest.mark.parametrize("limit", [None, 12])
@pytest.mark.parametrize("with_grad", [False, True])
def test_compiles_with_a_state(mask, limit, with_grad):
    m, x, cuts = mha(), inputs(), [4, 1, 2]
    fast, state, parts = compiled(m), m.allocate_state(2, max_seqlen=limit), []
    masks = [None] * 3 if mask is None else mask.split(cuts, 1)
    with torch.set_grad_enabled(with_grad):
        for part, part_mask in zip(x.split(cuts, 1), masks, strict=True):
            parts.append(fast(part, state=state, attention_mask=part_mask))
        close(torch.cat(parts, 1), m(x, attention_mask=mask))
        eager = m.allocate_state(2)
        m(x, state=eager, attention_mask=mask)
    assert_same_state(state, eager)


def test_compiles_packed_sequences():
    m, x = mha(), inputs(1, 5)
    ends = torch.tensor([0, 2, 5])
    fast = compiled(m)
    close(fast(x, cu_seqlens=ends), m(x, cu_seqlens=ends))
    state, plain = m.allocate_state(2), m.allocate_state(2)
    with torch.no_grad():
        for _ in range(2):
            close(fast(x, state=state, cu_seqlens=ends), m(x, state=plain, cu_seqlens=ends))
    assert_same_state(state, plain)
