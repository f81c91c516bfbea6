"""The depthwise causal convolution, specified in PyTorch."""

import torch

from ssm.ops.python import arithmetic, check
from ssm.ops.python.layout import last_kept, layout_of, select_steps


def dw_causal_conv(
    x,
    weight,
    bias=None,
    activation="silu",
    *,
    initial_state=None,
    return_final_state=False,
    seq_meta=None,
):
    """Convolve every channel with its own short causal filter.

    Computes ``y[t] = act(bias + sum_k weight[k] x[t - (W - 1) + k])``. What lies before the first
    step is the initial state.

    Args:
        x: (B, D, L), float64 | float32 | bfloat16 | float16, any strides. Input.
        weight: (D, W) | (D, 1, W), W at least 1; any of these dtypes, like every tensor below.
        bias: (D,).
        activation: "silu" | "swish" (the same) | "identity" | None (the same).
        initial_state: (S, D, W - 1). The W - 1 inputs before the first step, oldest first; zeros
            if not given. S is the number of sequences of ``seq_meta.cu_seqlens`` if given, else B.
        return_final_state: also return the last W - 1 inputs.
        seq_meta: SeqMeta. Packed sequences and skipped steps; the filter sees the last W - 1
            inputs of the same sequence that were not skipped.

    Returns:
        y: (B, D, L), dtype of x. Output; 0 where the step is skipped.
        final_state: (S, D, W - 1), dtype of x. Only if ``return_final_state``. The inputs an
            ``initial_state`` of a continued call must have; the rule of :func:`selective_scan`.

    Raises:
        TypeError: an argument is not a tensor, or seq_meta not a SeqMeta.
        ValueError: a shape, dtype, device or value breaks the contract above; the message names the
            argument.

    Source:
        Gu & Dao 2023 (arXiv:2312.00752), section 3.4: the convolution of the Mamba block.

    Example:
        >>> y = dw_causal_conv(x, weight, bias)
    """
    check.dw_causal_conv(x, weight, bias, activation, initial_state, seq_meta)
    (batch, dim, seqlen), width, acc = x.shape, weight.shape[-1], arithmetic.acc_dtype(x)
    layout = layout_of(seq_meta, batch, seqlen, x.device)
    taps = weight.to(acc).reshape(dim, width)

    # One line of memory: a zero, the S initial windows, then the B * L inputs, each (D,).
    memory = width - 1
    window = torch.zeros(layout.nstates, dim, memory, dtype=acc, device=x.device)
    if initial_state is not None:
        window = initial_state.to(acc)
    inputs = select_steps(layout, x.to(acc), 2)
    line = [t.transpose(1, 2).flatten(0, 1) for t in (window, inputs)]
    line = torch.cat([inputs.new_zeros(1, dim), *line])

    # before[i] is the place of the input before place i in its sequence; the zero precedes itself.
    first = 1 + layout.nstates * memory  # place of the first input
    place = torch.arange(first, first + batch * seqlen, device=x.device).view(batch, seqlen)
    newest = memory * (1 + layout.state.clamp(max=layout.nstates - 1))
    begins = layout.resets | (layout.previous < 0)
    start = newest if layout.per_sequence else torch.where(layout.resets, 0, newest)
    before_input = torch.where(begins, start, place[:, :1] + layout.previous)
    windows = torch.arange(first, device=x.device) - 1
    oldest = windows % max(memory, 1) == 0
    before = torch.cat([torch.where(oldest, 0, windows).clamp(min=0), before_input.flatten()])

    at, y = place.flatten(), 0.0
    for k in reversed(range(width)):
        y = y + taps[:, k] * line[at]
        at = before[at]
    if bias is not None:
        y = y + bias.to(acc)
    y = y if activation in (None, "identity") else arithmetic.silu(y)
    y = y.view(batch, seqlen, dim).transpose(1, 2)
    y = select_steps(layout, y, 2).to(x.dtype)
    if not return_final_state:
        return y
    last = last_kept(layout)
    newest = memory * torch.arange(1, layout.nstates + 1, device=x.device)
    at = torch.where(last >= 0, first + last, newest)
    final = []
    for _ in range(memory):
        final.append(line[at])
        at = before[at]
    if not final:
        return y, x.new_zeros(layout.nstates, dim, 0)
    return y, torch.stack(final[::-1], 2).to(x.dtype)
