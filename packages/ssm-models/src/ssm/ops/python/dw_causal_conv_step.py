"""One token, or a few, of the depthwise causal convolution, specified in PyTorch."""

import torch

from ssm.ops.python import arithmetic, check
from ssm.ops.python.layout import read_rows, rows_or_zero, write_rows


def dw_causal_conv_step(
    x,
    conv_state,
    weight,
    bias=None,
    activation="silu",
    *,
    cache_seqlens=None,
    state_indices=None,
):
    """Advance :func:`dw_causal_conv` by one token, or a few, updating its window in place.

    Args:
        x: (B, D) | (B, D, T), float64 | float32 | bfloat16 | float16. Input.
        conv_state: (R, D, K), K at least W - 1; any of these dtypes, like every tensor below but
            the indices. The last K inputs, updated in place; no other argument may
            lie in their memory. Oldest first without ``cache_seqlens``.
        weight: (D, W) | (D, 1, W).
        bias: (D,).
        activation: "silu" | "swish" | "identity" | None.
        cache_seqlens: (B,), int32. Number of tokens that each row has seen, not negative. With it
            the window is a circular buffer: token t of the call is stored at
            ``(cache_seqlens + t) mod K``.
        state_indices: (B,), int32. Row of ``conv_state`` that each batch row uses; -1 skips the
            batch row: its y is 0 and no window changes. Without it R must be B.

    Returns:
        y: as x. Output.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: a shape, dtype, device or value breaks the contract above, or an index names a
            row twice; the message names the argument.

    Source:
        Gu & Dao 2023 (arXiv:2312.00752), section 3.4.

    Example:
        >>> y = dw_causal_conv_step(x, conv_state, weight, bias)
    """
    check.dw_causal_conv_step(x, conv_state, weight, bias, activation, cache_seqlens, state_indices)
    acc, memory, width = arithmetic.acc_dtype(x), conv_state.shape[2], weight.shape[-1]
    tokens = x[:, :, None] if x.ndim == 2 else x
    batch, dim, ntokens = tokens.shape
    taps = weight.to(acc).reshape(dim, width)

    keep, stored = read_rows(conv_state, state_indices, batch)
    offset = torch.arange(memory, device=x.device).expand(batch, dim, memory)
    if cache_seqlens is None or not memory:
        oldest_first = stored
    else:
        # The slot that is written next holds the oldest input.
        seen = cache_seqlens.long()[:, None, None]
        oldest_first = stored.gather(2, (seen + offset) % memory)
    line = torch.cat([oldest_first.to(acc), rows_or_zero(keep, tokens.to(acc))], 2)  # (B, D, K + T)

    y = torch.zeros(batch, dim, ntokens, dtype=acc, device=x.device)
    for k in range(width):
        y = y + taps[:, k, None] * line.narrow(2, memory - (width - 1) + k, ntokens)
    if bias is not None:
        y = y + bias.to(acc)[:, None]
    y = y if activation in (None, "identity") else arithmetic.silu(y)

    line = line.narrow(2, ntokens, memory)
    if cache_seqlens is not None and memory:
        line = torch.zeros_like(line).scatter(2, (seen + ntokens + offset) % memory, line)
    write_rows(conv_state, state_indices, line)
    return rows_or_zero(keep, y.reshape(x.shape)).to(x.dtype)
