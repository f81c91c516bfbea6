"""State: the container itself; what layers do with it is tested with them.

Judge: the tensors that were put in.
"""

import pytest
import torch

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
    state.clone().key_value_memory_dict[0][0].sum().backward()
    assert (leaf.grad == 2).all()
    assert not state.detach().key_value_memory_dict[0][0].requires_grad


def test_to_casts_every_tensor():
    state = filled().to(torch.float64)
    dtypes = {t.dtype for layer in state.key_value_memory_dict.values() for t in layer}
    assert dtypes == {torch.float64}
    assert repr(state) == "State(layers=2, batch=2, seqlen_offset=7)"
