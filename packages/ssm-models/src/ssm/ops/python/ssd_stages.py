"""The stages of the state-space dual scan, one operator each, specified in PyTorch.

Chunks lie side by side: C = ceil(L / Q) of them with Q steps each, the last one filled up. What the
steps beyond L hold is never used.
"""

import math

import torch

from ssm.ops.python import arithmetic, check
from ssm.ops.python.layout import layout_of_ids, select_steps


def ssd_chunk_cumsum(
    dt,
    A,
    chunk_size,
    *,
    dt_bias=None,
    softplus=False,
    dt_limit=(0.0, float("inf")),
    seq_idx=None,
):
    """Compute the step sizes and the logarithmic decays of the state-space dual scan, by chunk.

    Computes ``dt_out = clamp(softplus(dt + dt_bias), *dt_limit)`` (softplus only if asked for) and
    within each chunk ``dA_cumsum[i] = sum of dt_out[k] A over k <= i``.

    Args:
        dt: (B, L, H), float64 | float32 | bfloat16 | float16. Step size.
        A: (H,), any of these dtypes, like every tensor below but ``seq_idx``. Continuous decay.
        chunk_size: steps Q per chunk, at least 1 and below 2**31; it need not divide L.
        dt_bias: (H,). Added to dt.
        softplus: apply softplus to the step size.
        dt_limit: (low, high), to which the step size is clamped last.
        seq_idx: (B, L), int32. Only -1 matters here: the step is skipped, its size is 0.

    Returns:
        dt_out: (B, H, C, Q), float64 if dt is, else float32. 0 beyond L.
        dA_cumsum: (B, H, C, Q), the same dtype. Summed in float64 and rounded once.

    Raises:
        TypeError: an argument is not a tensor, or chunk_size not an int.
        ValueError: a shape, dtype, device or value breaks the contract above; the message names the
            argument.

    Source:
        Dao & Gu 2024 (arXiv:2405.21060), listing 1; docs/ops/ssd_stages.md.
    """
    check.ssd_chunk_cumsum(dt, A, chunk_size, dt_bias, dt_limit, seq_idx)
    acc, layout = arithmetic.acc_dtype(dt), _layout(seq_idx, *dt.shape[:2], dt.device)
    step = select_steps(layout, dt.to(acc))
    if dt_bias is not None:
        step = step + dt_bias.to(acc)
    if softplus:
        step = arithmetic.softplus(step)
    step = select_steps(layout, step.clamp(*map(float, dt_limit)))
    step = _chunks(step, chunk_size).permute(0, 3, 1, 2).contiguous()
    rate = A.to(acc).double()[:, None, None]
    return step, (step.double() * rate).cumsum(3).to(acc)


@arithmetic.without_autocast
def ssd_chunk_state(x, B, dt, dA_cumsum, *, seq_idx=None):
    """Compute the state that each chunk of the state-space dual scan adds.

    Computes per chunk ``sum of exp(dA_cumsum[last] - dA_cumsum[t]) dt[t] x[t] B[t]^T`` over the
    steps of the sequence that is open at the chunk's end.

    Args:
        x: (B, L, H, P), float64 | float32 | bfloat16 | float16. Input.
        B: (B, L, G, N), any of these dtypes, like every tensor below but ``seq_idx``; G divides H.
        dt: (B, H, C, Q), C = ceil(L / Q). Step size, as :func:`ssd_chunk_cumsum` gives it.
        dA_cumsum: (B, H, C, Q). As :func:`ssd_chunk_cumsum` gives it.
        seq_idx: (B, L), int32. Equal neighbours belong to one sequence, -1 skips the step.

    Returns:
        states: (B, C, H, P, N), float64 if x is, else float32.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: a shape, dtype, device or value breaks the contract above; the message names the
            argument.

    Source:
        Dao & Gu 2024 (arXiv:2405.21060), section 6; docs/ops/ssd_stages.md.
    """
    check.ssd_chunk_state(x, B, dt, dA_cumsum, seq_idx)
    (_, seqlen, nheads, _), chunk, acc = x.shape, dt.shape[3], arithmetic.acc_dtype(x)
    layout = _layout(seq_idx, x.shape[0], seqlen, x.device)
    number, keep = _chunks(_numbers(layout), chunk), _chunks(layout.keep, chunk)
    # A step of the last sequence hands its drive on to the end of the chunk.
    hands_on = (keep & (number == _at_end(number, seqlen)[..., None]))[:, None]  # (B, 1, C, Q)
    decay = dA_cumsum.to(acc)
    decay = torch.exp(torch.where(hands_on, decay[..., -1:] - decay, -torch.inf))
    weight = decay * torch.where(hands_on, dt.to(acc), 0.0)
    drive = _chunks(select_steps(layout, x.to(acc)), chunk)
    matrix = _per_head(_chunks(select_steps(layout, B.to(acc)), chunk), nheads)
    return torch.einsum("bhcq,bcqhp,bcqhn->bchpn", weight, drive, matrix)


def ssd_state_passing(states, dA_cumsum, *, initial_states=None, seq_idx=None):
    """Pass the state from chunk to chunk of the state-space dual scan.

    Computes ``h = exp(dA_cumsum[last]) h + states[c]`` over the chunks, starting from the initial
    state; where another sequence is open at the end of a chunk than at its start, ``h`` is what the
    chunk adds alone.

    Args:
        states: (B, C, H, P, N), float64 | float32 | bfloat16 | float16. What each chunk adds.
        dA_cumsum: (B, H, C, Q), any of these dtypes. As :func:`ssd_chunk_cumsum` gives it.
        initial_states: (B, H, P, N), any of these dtypes. State before the first step; zeros if not
            given.
        seq_idx: (B, L), int32, C = ceil(L / Q). As in :func:`ssd_chunk_state`.

    Returns:
        states_in: (B, C, H, P, N), float64 if states is, else float32. The state that enters each
            chunk.
        final_states: (B, H, P, N), the same dtype. The state after the last chunk.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: a shape, dtype, device or value breaks the contract above; the message names the
            argument.

    Source:
        Dao & Gu 2024 (arXiv:2405.21060), section 6; docs/ops/ssd_stages.md.
    """
    check.ssd_state_passing(states, dA_cumsum, initial_states, seq_idx)
    (batch, nchunks), acc = states.shape[:2], arithmetic.acc_dtype(states)
    if initial_states is None:
        initial_states = states.new_zeros(batch, *states.shape[2:])
    state = initial_states.to(acc)
    if seq_idx is None:
        goes_on = torch.ones(batch, nchunks, dtype=torch.bool, device=states.device)
    else:
        seqlen = seq_idx.shape[1]
        number = _chunks(_numbers(layout_of_ids(seq_idx)), dA_cumsum.shape[3])
        goes_on = _at_end(number, seqlen) == _at_start(number)
    decay = torch.exp(torch.where(goes_on[:, None], dA_cumsum[..., -1].to(acc), -torch.inf))
    entering = []
    for added, factor, on in zip(
        states.to(acc).unbind(1), decay.unbind(2), goes_on.unbind(1), strict=True
    ):
        entering.append(state)
        state = torch.where(on[:, None, None, None], state, 0.0)
        state = factor[..., None, None] * state + added
    if not entering:
        return states.to(acc).clone(), state.clone()
    return torch.stack(entering, 1), state


@arithmetic.without_autocast
def ssd_bmm_chunk(C, B, chunk_size):
    """Multiply the output with the input matrices of all pairs of steps of a chunk.

    Computes ``CB[i, j] = C[i] . B[j]`` for all i and j of each chunk, not only for j <= i.

    Args:
        C: (B, L, G, N), float64 | float32 | bfloat16 | float16. Output matrix.
        B: (B, L, G, N), any of these dtypes, with a group count of its own. Input matrix.
        chunk_size: steps Q per chunk, at least 1 and below 2**31; it need not divide L.

    Returns:
        CB: (B, C, G, Q, Q), float64 if C is, else float32, G the least common multiple of the two
            group counts. 0 where i or j is beyond L.

    Raises:
        TypeError: an argument is not a tensor, or chunk_size not an int.
        ValueError: a shape, dtype, device or value breaks the contract above; the message names the
            argument.

    Source:
        Dao & Gu 2024 (arXiv:2405.21060), section 6; docs/ops/ssd_stages.md.
    """
    check.ssd_bmm_chunk(C, B, chunk_size)
    acc, ngroups = arithmetic.acc_dtype(C), math.lcm(C.shape[2], B.shape[2])
    C, B = (_per_head(_chunks(m.to(acc), chunk_size), ngroups) for m in (C, B))
    return torch.einsum("bcign,bcjgn->bcgij", C, B)


@arithmetic.without_autocast
def ssd_chunk_output(CB, x, dt, dA_cumsum, C, states_in, *, D=None, z=None, seq_idx=None):
    """Compute the outputs of the state-space dual scan from what the other stages gave.

    Computes ``y[i] = sum of CB[i, j] exp(dA_cumsum[i] - dA_cumsum[j]) dt[j] x[j]`` over the steps
    j <= i of the chunk that belong to the sequence of i, plus ``exp(dA_cumsum[i]) states_in C[i]``
    if the state entered in the sequence of i, plus ``D x[i]``; and, with a gate, that times
    ``silu(z[i])``.

    Args:
        CB: (B, C, G, Q, Q), float64 | float32 | bfloat16 | float16; G divides H. Read for j <= i.
        x: (B, L, H, P), any of these dtypes, like every tensor below but ``seq_idx``. Input.
        dt: (B, H, C, Q), C = ceil(L / Q). Step size, as :func:`ssd_chunk_cumsum` gives it.
        dA_cumsum: (B, H, C, Q). As :func:`ssd_chunk_cumsum` gives it.
        C: (B, L, G, N), with a group count of its own. Output matrix.
        states_in: (B, C, H, P, N). As :func:`ssd_state_passing` gives it.
        D: (H,) | (H, P). Skip weight.
        z: (B, L, H, P). Gate.
        seq_idx: (B, L), int32. As in :func:`ssd_chunk_state`.

    Returns:
        y: (B, L, H, P), dtype of x; computed in float64 if x is, else in float32. 0 where the step
            is skipped.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: a shape, dtype, device or value breaks the contract above; the message names the
            argument.

    Source:
        Dao & Gu 2024 (arXiv:2405.21060), section 6; docs/ops/ssd_stages.md.
    """
    check.ssd_chunk_output(CB, x, dt, dA_cumsum, C, states_in, D, z, seq_idx)
    (batch, seqlen, nheads, _), chunk, acc = x.shape, dt.shape[3], arithmetic.acc_dtype(x)
    layout = _layout(seq_idx, batch, seqlen, x.device)
    number, keep = _chunks(_numbers(layout), chunk), _chunks(layout.keep, chunk)
    x = select_steps(layout, x)
    drive = _chunks(x.to(acc), chunk)
    dt, decay = dt.to(acc), dA_cumsum.to(acc)

    # together[i, j]: j comes before i, or is i, in the same sequence.
    together = (number[..., None] == number[:, :, None]) & keep[..., None] & keep[:, :, None]
    together = together.tril()[:, None]  # (B, 1, C, Q, Q)
    weight = decay[..., None] - decay[..., None, :]  # (B, H, C, Q, Q)
    weight = torch.exp(torch.where(together, weight, -torch.inf))
    weight = weight * torch.where(keep[:, None], dt, 0.0)[..., None, :]
    products = _per_head(CB.to(acc), nheads, 2).transpose(1, 2)
    y = torch.einsum("bhcij,bcjhp->bcihp", torch.where(together, products, 0.0) * weight, drive)

    enters = keep & (number == _at_start(number)[..., None])  # (B, C, Q)
    carry = torch.exp(torch.where(enters[:, None], decay, -torch.inf)).permute(0, 2, 3, 1)
    C = _per_head(_chunks(select_steps(layout, C.to(acc)), chunk), nheads)
    entering = torch.einsum("bcihn,bchpn->bcihp", C * carry[..., None], states_in.to(acc))
    y = y + torch.where(enters[..., None, None], entering, 0.0)

    y = y.flatten(1, 2)[:, :seqlen]
    if D is not None:
        y = y + (D.to(acc) if D.ndim == 2 else D.to(acc)[:, None]) * x.to(acc)
    if z is not None:
        y = y * arithmetic.silu(select_steps(layout, z.to(acc)))
    return select_steps(layout, y).to(x.dtype)


def _layout(seq_idx, batch, seqlen, device):
    """Return the layout of a batch; without ``seq_idx`` each row is one sequence."""
    if seq_idx is None:
        seq_idx = torch.zeros(batch, seqlen, dtype=torch.int32, device=device)
    return layout_of_ids(seq_idx)


def _numbers(layout):
    """Return (B, L): steps with equal numbers belong together; 0 takes what entered the row."""
    return layout.resets.long().cumsum(1)


def _chunks(t, chunk):
    """Return t (B, L, ...) as (B, C, Q, ...), the last chunk filled up with 0."""
    seqlen = t.shape[1]
    nchunks = -(-seqlen // chunk)
    fill = t.new_zeros(t.shape[0], nchunks * chunk - seqlen, *t.shape[2:])
    return torch.cat([t, fill], 1).reshape(t.shape[0], nchunks, chunk, *t.shape[2:])


def _at_end(number, seqlen):
    """Return (B, C): the number (B, C, Q) of the last step of each chunk before L."""
    batch, nchunks, chunk = number.shape
    last = (torch.arange(1, nchunks + 1, device=number.device) * chunk).clamp(max=seqlen) - 1
    return number.reshape(batch, nchunks * chunk)[:, last]


def _at_start(number):
    """Return (B, C): the number of the last step before each chunk, 0 before the first."""
    return torch.nn.functional.pad(number[:, :-1, -1], (1, 0))[:, : number.shape[1]]


def _per_head(t, nheads, axis=3):
    """Spread the group axis of t, by default (B, C, Q, G, N), over the heads."""
    return t.repeat_interleave(nheads // t.shape[axis], axis)
