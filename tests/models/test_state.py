"""State: the container itself; what layers do with it is tested with them.

Judge: the tensors that were put in.
"""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ssm import state as state_module
from ssm.state import State


def filled() -> State:
    return State({0: (torch.ones(2, 3), torch.ones(2, 4)), 5: (torch.ones(2, 1),)}, 2, 9, 7)


def test_reset_zeroes_in_place_and_counts_from_zero():
    state = filled()
    tensors = [t for layer in state.key_value_memory_dict.values() for t in layer]
    assert state.reset(max_seqlen=4, max_batch_size=2) is state
    assert all((t == 0).all() for t in tensors)
    assert (state.seqlen_offset, state.max_seqlen) == (0, 4)
    with pytest.raises(ValueError, match="State: max_batch_size must stay 2, got 3"):
        state.reset(max_batch_size=3)


def test_clone_keeps_the_counters_and_shares_nothing():
    state = filled()
    copy = state.clone()
    assert (copy.seqlen_offset, copy.max_batch_size, copy.max_seqlen) == (7, 2, 9)
    copy.key_value_memory_dict[0][0].zero_()
    copy.seqlen_offset = 1
    assert (state.key_value_memory_dict[0][0] == 1).all()
    assert state.seqlen_offset == 7


def test_detach_and_clone_treat_gradients_as_promised():
    leaf = torch.ones(2, 3, requires_grad=True)
    state = State({0: (leaf * 2,)}, 2)
    state.clone().key_value_memory_dict[0][0].sum().backward(retain_graph=True)
    assert (leaf.grad == 2).all()
    loss = state.key_value_memory_dict[0][0].square().sum()
    assert not state.detach().key_value_memory_dict[0][0].requires_grad
    pointer = state.key_value_memory_dict[0][0].data_ptr()
    state.detach().reset()
    assert state.key_value_memory_dict[0][0].data_ptr() == pointer
    leaf.grad = None
    loss.backward()  # what the graph holds has not been written to
    assert (leaf.grad == 8).all()


def test_to_casts_every_tensor():
    state = filled().to(torch.float64)
    dtypes = {t.dtype for layer in state.key_value_memory_dict.values() for t in layer}
    assert dtypes == {torch.float64}
    assert repr(state) == "State(layers=2, batch=2, seqlen_offset=7)"


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64])
def test_to_refuses_a_dtype_that_is_not_floating(dtype):
    state = filled()
    before = list(state.key_value_memory_dict.values())
    for given in (dtype, torch.empty(0, dtype=dtype)):
        with pytest.raises(ValueError, match=f"State: dtype must be floating point, got {dtype}"):
            state.to(given)
    held = state.key_value_memory_dict.values()
    assert all(a is b for a, b in zip(held, before, strict=True))


def counted(rows=3) -> State:
    """A state whose tensors say which row they are."""
    row = torch.arange(rows, dtype=torch.float64)
    cache = row[:, None, None, None, None].expand(rows, 2, 2, 1, 1).clone()
    lengths = torch.arange(rows)
    return State({0: (row[:, None].repeat(1, 4),), 2: (cache, lengths)}, rows, 9, 7)


def values(state: State) -> dict[int, list]:
    return {k: [t.tolist() for t in layer] for k, layer in state.key_value_memory_dict.items()}


def rows_of(state: State) -> list[int]:
    """The rows that a counted state is made of; all its tensors must agree."""
    row, (cache, lengths) = state.key_value_memory_dict[0][0], state.key_value_memory_dict[2]
    assert (row == row[:, :1]).all()
    assert (cache == row[:, 0, None, None, None, None]).all()
    assert lengths.tolist() == row[:, 0].tolist()
    assert len(state) == state.max_batch_size == len(row)
    return lengths.tolist()


@pytest.mark.parametrize("indices", [[2, 0, 0], torch.tensor([1], dtype=torch.int32), []])
def test_gather_takes_rows_in_any_order(indices):
    state = counted()
    taken = state.gather(indices)
    assert rows_of(taken) == list(indices)
    assert (taken.seqlen_offset, taken.max_seqlen) == (7, 9)
    taken.reset()
    assert rows_of(state) == [0, 1, 2]


def test_fork_repeats_every_row():
    state = counted()
    state.batch_size_offset = 4
    assert state.fork(1).batch_size_offset == 4
    fork = state.fork(2)
    assert rows_of(fork) == [0, 0, 1, 1, 2, 2]
    fork.key_value_memory_dict[2][0][0] = 5
    assert rows_of(state) == [0, 1, 2]
    assert len(state.fork(0)) == 0
    assert state.fork(0)


def test_update_writes_rows_in_place():
    state, other = counted(4), counted(2)
    other.seqlen_offset = 11
    before = [t.data_ptr() for layer in state.key_value_memory_dict.values() for t in layer]
    with torch.no_grad():
        assert state.update(torch.tensor([3, 1]), other) is state
    assert rows_of(state) == [0, 1, 2, 0]
    after = [t.data_ptr() for layer in state.key_value_memory_dict.values() for t in layer]
    assert after == before
    assert state.seqlen_offset == 11
    with torch.no_grad():  # one that has seen less does not turn the count back
        assert state.update([0, 1], counted(2)).seqlen_offset == 11
        state.update(torch.tensor([0, 1]), counted(2)).update([3, 1], other)
    with torch.no_grad():
        assert rows_of(state.update([1, 0, 2, 3], state)) == [1, 0, 2, 0]


def test_update_makes_room_in_a_cache():
    state, other = counted(2), counted(1)
    cache, lengths = other.key_value_memory_dict[2]
    longer = torch.cat([cache, cache + 9], 1)
    other.key_value_memory_dict[2] = (longer, lengths)
    cache = state.update([1], other).key_value_memory_dict[2][0]
    assert torch.equal(cache[1], longer[0])
    assert (cache[0] == 0).all()
    # And the other way round: a shorter one into a longer one.
    assert state.update([0], counted(1)).key_value_memory_dict[2][0].shape == (2, 4, 2, 1, 1)
    # Not more tokens than the state may hold.
    state = counted(2)
    state.max_seqlen = 3
    other.key_value_memory_dict[2] = (longer, torch.tensor([4]))
    before = values(state)
    with pytest.raises(ValueError, match="at most max_seqlen = 3 tokens, got 4"):
        state.update([1], other)
    assert values(state) == before
    other.key_value_memory_dict[2] = (longer, torch.tensor([3]))
    state.update([1], other)


def test_gradients_flow_through_fork_gather_and_update():
    leaf = torch.ones(2, 3, requires_grad=True)

    def gradient(state):
        (found,) = torch.autograd.grad(
            state.key_value_memory_dict[0][0].sum(), leaf, retain_graph=True
        )
        return found[:, 0].tolist()

    assert gradient(State({0: (leaf * 2,)}, 2).fork(3)) == [6, 6]
    assert gradient(State({0: (leaf * 2,)}, 2).gather([1, 1])) == [0, 4]
    fresh = State({0: (torch.zeros(2, 3),)}, 2)
    assert gradient(fresh.update([0], State({0: (leaf[1:] * 1,)}, 1))) == [0, 1]
    assert gradient(fresh.update([1], State({0: (leaf[:1] * 3,)}, 1))) == [3, 1]


def test_update_leaves_what_a_graph_holds_alone():
    leaf = torch.ones(2, 3, requires_grad=True)
    held = leaf * 2
    loss = (held * held).sum()
    state, other = State({0: (held,)}, 2), State({0: (torch.zeros(1, 3),)}, 1)
    with torch.no_grad():
        state.update([0], other)
    assert state.key_value_memory_dict[0][0][:, 0].tolist() == [0, 2]
    loss.backward()
    assert (leaf.grad == 8).all()


def test_lengths_of_the_protocol_go_with_their_rows():
    state = counted()
    state.lengths_per_sample = torch.tensor([5, 6, 7])
    assert state.gather([2, 1]).lengths_per_sample.tolist() == [7, 6]
    assert state.fork(2).lengths_per_sample.tolist() == [5, 5, 6, 6, 7, 7]
    assert state.clone().reset().lengths_per_sample.tolist() == [0, 0, 0]
    assert state.to(torch.bfloat16).lengths_per_sample.dtype == torch.int64


def test_lengths_of_the_protocol_are_no_tokens_of_a_cache():
    """Numbers beyond the limit, which only the caller reads, are put in like any."""
    state, other = counted(2), counted(1)
    for one in (state, other):
        one.lengths_per_sample = torch.full((len(one),), 100)
    with torch.no_grad():
        assert state.update([1], other).lengths_per_sample.tolist() == [100, 100]


def test_casts_leave_integers_exact():
    state = State({0: (torch.ones(2, 3), torch.tensor([1001, 1003]))}, 2).to(torch.bfloat16)
    assert state.key_value_memory_dict[0][0].dtype == torch.bfloat16
    assert state.key_value_memory_dict[0][1].tolist() == [1001, 1003]


@pytest.mark.parametrize("limit", [None, 9])
def test_save_and_load_are_bitwise(tmp_path, limit):
    path = tmp_path / "state"
    state = counted()
    state.max_seqlen = limit
    state.lengths_per_sample = torch.tensor([5, 6, 7])
    shared = state.key_value_memory_dict[0][0]
    # Two names for one storage, and a view: what the format itself refuses.
    state.key_value_memory_dict[5] = (shared, shared.t()[:3], torch.full((3, 2), torch.nan).half())
    state.save(path)
    loaded = State.load(path)
    assert len(loaded) == loaded.max_batch_size == 3
    assert (loaded.seqlen_offset, loaded.max_seqlen) == (7, limit)
    assert list(loaded.key_value_memory_dict) == list(state.key_value_memory_dict)
    for layer, tensors in state.key_value_memory_dict.items():
        for got, want in zip(loaded.key_value_memory_dict[layer], tensors, strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
    assert loaded.lengths_per_sample.tolist() == [5, 6, 7]
    assert [p.name for p in tmp_path.iterdir()] == ["state"]
    moved = State.load(path, device="meta")
    assert {t.device.type for held in moved.key_value_memory_dict.values() for t in held} == {
        "meta"
    }


def test_empty_states_can_be_saved(tmp_path):
    assert len(State(max_batch_size=2)) == 2
    for state in (State(max_batch_size=2), counted().fork(0)):
        state.save(tmp_path / "state")
        loaded = State.load(tmp_path / "state")
        assert values(loaded) == values(state)
        assert len(loaded) == len(state)


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "state"
    counted().save(path)

    def half(tensors, target, metadata):
        target.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(state_module, "save_file", half)
    with pytest.raises(OSError, match="disk full"):
        counted(4).save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["state"]
    assert rows_of(State.load(path)) == [0, 1, 2]


def test_a_loaded_state_does_not_follow_its_file(tmp_path):
    path = tmp_path / "state"
    counted().save(path)
    loaded = State.load(path)
    with open(path, "r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert rows_of(loaded) == [0, 1, 2]


def test_load_refuses_what_is_no_whole_state(tmp_path):
    path = tmp_path / "state"
    with pytest.raises(FileNotFoundError, match=r"^State: .*state must be a file that save wrote"):
        State.load(path)
    counted().save(path)
    whole = path.read_bytes()
    for end in (0, 7, 8, 100, len(whole) - 1):
        path.write_bytes(whole[:end])
        with pytest.raises(ValueError, match=rf"^State: {path} must be a whole state file, got "):
            State.load(path)
    path.write_bytes(b"something else altogether, and longer than a header")
    with pytest.raises(ValueError, match=r"must be a whole state file"):
        State.load(path)
    save_file({"weight": torch.ones(2)}, path)
    with pytest.raises(ValueError, match=r"must be a whole state file, got format None$"):
        State.load(path)
    path.write_bytes(whole)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file({"0.0": torch.ones(3, 4)}, path, metadata)
    with pytest.raises(ValueError, match=r"got tensors 0.0 float32 \(4,\) for 0.0 float64 \(4,\)"):
        State.load(path)
    later = {**metadata, "format": "ssm_state 2"}
    save_file({"0.0": torch.ones(3, 4, dtype=torch.float64)}, path, later)
    with pytest.raises(ValueError, match=r"whole state file, got format 'ssm_state 2'$"):
        State.load(path)
    save_file({"0.0": torch.ones(3, 4)}, path, {"format": metadata["format"]})
    with pytest.raises(ValueError, match=r"must be a whole state file, got 'seqlen_offset'$"):
        State.load(path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, value) for name in ("seqlen_offset", "rows") for value in ("-3", "null", "{}")),
        *(("max_seqlen", value) for value in ("-3", "{}", "true")),
        *(("layout", value) for value in ("null", "3")),
        ("rows", "2"),
    ],
)
def test_load_refuses_numbers_that_no_state_has(tmp_path, name, value):
    path = tmp_path / "state"
    counted().save(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    save_file(tensors, path, {**metadata, name: value})
    with pytest.raises(ValueError, match=r"^State: .* must be a whole state file, got "):
        State.load(path)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: s.gather([0, 3]), r"indices must lie in \[0, 3\), got 3"),
        (lambda s: s.gather([-1]), r"indices must lie in \[0, 3\), got -1"),
        (lambda s: s.gather([[0]]), r"indices must have shape \(R,\), got \(1, 1\)"),
        (lambda s: s.fork(-1), "n must not be negative, got -1"),
        (lambda s: s.update([0, 0], counted(2)), r"indices must all differ, got \[0, 0\]"),
        (lambda s: s.update([0], counted(2)), "other must hold 1 rows, got 2"),
        (lambda s: s.update([0], filled().gather([0])), "other must hold the layers of this"),
        (
            lambda s: s.update([0], counted(1).to(torch.half)),
            r".*got 0.0 float16 .* for 0.0",
        ),
    ],
)
def test_rejects_bad_rows(call, message):
    state = counted()
    with pytest.raises(ValueError, match=f"^State: {message}"):
        call(state)
    assert rows_of(state) == [0, 1, 2]


def test_rejects_indices_that_are_no_integers():
    with pytest.raises(TypeError, match=r"State: indices must hold integers, got torch\.bool"):
        counted().gather(torch.ones(3, dtype=torch.bool))
    for n in (1.5, True):
        with pytest.raises(TypeError, match=rf"State: n must be an int, got {n}"):
            counted().fork(n)
