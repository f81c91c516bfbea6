"""Verification: a draft read ahead, and any part of it kept.

Judge: the same model fed exactly the kept tokens, row by row and one by one.
"""

import pytest
import torch

from ssm.models.config import MambaConfig
from ssm.models.lm import MambaLMHeadModel
from ssm.utils.generation import generate
from tests.matrix import read_state

VOCAB, BATCH, SEEN, DRAFT = 13, 3, 4, 5


MODELS = {
    "mamba1": {"ssm_cfg": {"d_state": 3}},
    "mamba2": {"ssm_cfg": {"layer": "Mamba2", "d_state": 3, "headdim": 4, "chunk_size": 4}},
    "hybrid": {
        "ssm_cfg": {"d_state": 3},
        "attn_layer_idx": [1],
        "attn_cfg": {"num_heads": 2, "causal": True, "rotary_emb_dim": 4, "d_conv": 3},
    },
}


@pytest.fixture(params=MODELS)
def model(request):
    config = MambaConfig(
        d_model=8, n_layer=2, vocab_size=VOCAB, tie_embeddings=False, **MODELS[request.param]
    )
    m = MambaLMHeadModel(config, {"initializer_range": 1.0}, dtype=torch.float64)
    with torch.no_grad():
        m.lm_head.weight *= 8
    return m


def tokens(batch=BATCH, length=DRAFT):
    return torch.randint(0, VOCAB, (batch, length))


def close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def tensors(state):
    return [t for layer in state.key_value_memory_dict.values() for t in layer]


def assert_same_state(got, want):
    """Compare all that a later token reads."""
    for ours, theirs in zip(read_state(got), read_state(want), strict=True):
        for a, b in zip(ours, theirs, strict=True):
            close(a, b)


def prefilled(m):
    state = m.allocate_state(BATCH)
    with torch.no_grad():
        m(tokens(length=SEEN), state=state)
    return state


def test_logits_are_those_of_the_draft_and_the_state_stays(model):
    state, draft = prefilled(model), tokens()
    before = [t.clone() for t in tensors(state)]
    with torch.no_grad():
        want = model(draft, state=state.clone()).logits
        one = state.clone()
        alone = [model(draft[:, t : t + 1], state=one).logits for t in range(DRAFT)]
        verification = model.verify(draft, state)
    assert torch.equal(verification.logits, want)
    close(verification.logits, torch.cat(alone, 1))
    assert all(torch.equal(a, b) for a, b in zip(tensors(state), before, strict=True))
    assert state.seqlen_offset == SEEN


@pytest.mark.parametrize("k", range(DRAFT + 1))
@pytest.mark.parametrize("with_grad", [False, True])
def test_keep_is_as_if_only_that_had_been_fed(model, k, with_grad):
    state, draft = prefilled(model), tokens()
    want, later = state.clone(), tokens(length=2)
    with torch.set_grad_enabled(with_grad):
        model(draft[:, :k], state=want)
        verification = model.verify(draft, state)
        assert verification.keep(k) is state
        for ours, theirs in zip(read_state(state), read_state(want), strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
        assert state.seqlen_offset == want.seqlen_offset == SEEN + k
        close(model(later, state=state).logits, model(later, state=want).logits)


@pytest.mark.parametrize("counts", [[0, 2, 5], [5, 5, 5], [0, 0, 0], [1, 0, 1], [4, 3, 1]])
def test_rows_keep_different_numbers(model, counts):
    state, draft = prefilled(model), tokens()
    alone = [state.gather([row]) for row in range(BATCH)]
    later = tokens(length=2)
    with torch.no_grad():
        model.verify(draft, state).keep(torch.tensor(counts))
        assert state.seqlen_offset == SEEN + max(counts)
        for row, count in enumerate(counts):
            for t in range(count):
                model(draft[row : row + 1, t : t + 1], state=alone[row])
            assert_same_state(state.gather([row]), alone[row])
        logits = model(later, state=state).logits
        for row in range(BATCH):
            close(logits[row], model(later[row : row + 1], state=alone[row]).logits[0])


def test_states_keep_their_storage_without_gradients(model):
    state = model.allocate_state(BATCH, max_seqlen=30)
    before = [t.data_ptr() for t in tensors(state)]
    with torch.no_grad():
        for k in (DRAFT, 2, torch.tensor([0, 1, 2])):
            model.verify(tokens(), state).keep(k)
    assert [t.data_ptr() for t in tensors(state)] == before


@pytest.mark.parametrize("k", [3, DRAFT])
def test_gradients_flow_through_what_is_kept(model, k):
    ids, draft = tokens(length=SEEN), tokens()

    def loss(verified):
        state = model.allocate_state(BATCH)
        model(ids, state=state)
        if verified:
            model.verify(draft, state).keep(k)
        else:
            model(draft[:, :k], state=state)
        return sum(t.square().sum() for row in read_state(state) for t in row)

    # The head and the last norm are not on the way to a state.
    got, want = (
        torch.autograd.grad(loss(verified), model.parameters(), allow_unused=True)
        for verified in (True, False)
    )
    assert sum(g is not None for g in want) > 8
    for a, b in zip(got, want, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            close(a, b)


def test_agreed_counts_what_greedy_would_have_said(model):
    ids = tokens(length=SEEN)
    greedy = generate(model, ids, max_new_tokens=DRAFT + 1)[:, SEEN:]
    for wrong_at in range(1, DRAFT + 1):
        draft = greedy[:, :DRAFT].clone()
        draft[:, wrong_at:] = (draft[:, wrong_at:] + 1) % VOCAB
        state = model.allocate_state(BATCH)
        with torch.no_grad():
            model(ids, state=state)
            verification = model.verify(draft, state)
        agreed = verification.agreed()
        assert agreed.tolist() == [wrong_at] * BATCH
        last = verification.logits[torch.arange(BATCH), agreed - 1, :VOCAB]
        assert torch.equal(last.argmax(-1), greedy[:, wrong_at])
        verification.keep(agreed)
    assert model.verify(draft[:, :0], state).agreed().tolist() == [0] * BATCH


def test_speculative_decoding_equals_greedy(model):
    """A draft model that is often wrong changes the cost, never the text."""
    ids, new = tokens(length=SEEN), 12
    want = generate(model, ids, max_new_tokens=new)
    state, texts = model.allocate_state(BATCH), [row.tolist() for row in ids]
    with torch.no_grad():
        model(ids[:, :-1], state=state)
        while min(map(len, texts)) < SEEN + new:
            draft = tokens(length=4)
            draft[:, 0] = torch.tensor([text[-1] for text in texts])
            # A draft whose second token is right, and the rest is chance.
            draft[:, 1] = model.verify(draft[:, :1], state).logits[:, 0, :VOCAB].argmax(-1)
            verification = model.verify(draft, state)
            agreed = verification.agreed()
            assert agreed.min() >= 2
            verification.keep(agreed)
            for row, count in enumerate(agreed.tolist()):
                texts[row] += draft[row, 1:count].tolist()
                texts[row].append(int(verification.logits[row, count - 1, :VOCAB].argmax()))
    assert [text[: SEEN + new] for text in texts] == want.tolist()


def test_empty_drafts_and_batches(model):
    state = prefilled(model)
    before = [t.clone() for t in tensors(state)]
    verification = model.verify(tokens(length=0), state)
    assert verification.logits.shape == (BATCH, 0, 16)
    verification.keep(0)
    assert all(torch.equal(a, b) for a, b in zip(tensors(state), before, strict=True))
    empty = model.allocate_state(0)
    model.verify(tokens(0), empty).keep(torch.zeros(0, dtype=torch.int32))
    assert empty.seqlen_offset == 0


def test_keep_can_be_called_once(model):
    state = prefilled(model)
    with torch.no_grad():
        verification = model.verify(tokens(), state)
        verification.keep(2)
        with pytest.raises(ValueError, match="Verification: keep must be called once, got a secon"):
            verification.keep(2)
        moved = model.verify(tokens(), state)
        model(tokens(length=1), state=state)
        with pytest.raises(
            ValueError, match="state must stay at seqlen_offset 6 until keep, got 7"
        ):
            moved.keep(1)


@pytest.mark.parametrize("k", [2, DRAFT])
@pytest.mark.parametrize("change", ["update", "to", "reset"])
def test_keep_refuses_a_state_that_changed(model, change, k):
    state = prefilled(model)
    with torch.no_grad():
        verification = model.verify(tokens(), state)
        if change == "update":
            state.update([0], prefilled(model).gather([1]))
        elif change == "to":
            state.to(torch.float32)
        else:
            offset = state.seqlen_offset
            state.reset().seqlen_offset = offset
        before = [t.clone() for t in tensors(state)]
        with pytest.raises(ValueError, match="state must stay as verify found it until keep"):
            verification.keep(k)
        for got, want in zip(tensors(state), before, strict=True):
            assert torch.equal(got, want)
            assert got.dtype == want.dtype


@pytest.mark.parametrize("k", [2, DRAFT])
def test_keep_refuses_tensors_that_were_replaced(model, k):
    state = model.allocate_state(BATCH)
    verification = model.verify(tokens(), state)
    # With gradients enabled rows are replaced, not overwritten: nothing wrote to the new tensors.
    state.update([0], model.allocate_state(1))
    with pytest.raises(ValueError, match="state must stay as verify found it until keep"):
        verification.keep(k)


def test_keep_does_not_overwrite_what_a_graph_holds(model):
    state = model.allocate_state(BATCH)
    model(tokens(length=SEEN), state=state)
    loss = sum(t.square().sum() for t in tensors(state) if t.requires_grad)
    with torch.no_grad():
        model.verify(tokens(), state).keep(DRAFT)
    loss.backward()


@pytest.mark.parametrize(
    ("k", "error", "message"),
    [
        (-1, ValueError, r"k must lie in \[0, 5\], got -1"),
        (6, ValueError, r"k must lie in \[0, 5\], got 6"),
        (torch.tensor([0, 6, 1]), ValueError, r"k must lie in \[0, 5\], got 6"),
        (torch.tensor([0, 1]), ValueError, r"k must have shape \(B,\) = \(3,\), got \(2,\)"),
        (torch.tensor([0.0, 1, 1]), TypeError, r"k must hold integers, got torch\.float32"),
        (1.5, TypeError, r"k must be an int or a tensor \(B,\), got 1\.5"),
        (True, TypeError, r"k must be an int or a tensor \(B,\), got True"),
    ],
)
def test_rejects_a_bad_number(model, k, error, message):
    state = prefilled(model)
    before = [t.clone() for t in tensors(state)]
    with torch.no_grad():
        verification = model.verify(tokens(), state)
        with pytest.raises(error, match=f"^Verification: {message}$"):
            verification.keep(k)
        assert all(torch.equal(a, b) for a, b in zip(tensors(state), before, strict=True))
        verification.keep(1)


def test_rejects_a_bad_state_or_draft(model):
    with pytest.raises(TypeError, match="verify: state must be a State, got dict"):
        model.verify(tokens(), {})
    with pytest.raises(ValueError, match="state must hold 3 rows, got 2"):
        model.verify(tokens(), model.allocate_state(2))
    with pytest.raises(ValueError, match=r"input_ids must have shape \(B, L\), got \(5,\)"):
        model.verify(tokens()[0], model.allocate_state(BATCH))
