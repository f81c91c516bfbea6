"""Input checks of the reference operators: one sentence per rule, the sentences of the kernels."""

from numbers import Real

import torch

from ssm.seq_meta import SeqMeta

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def _either(words: list[str]) -> str:
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " or " + words[-1]


def _tuple(sizes) -> str:
    text = ", ".join(str(size) for size in sizes)
    return f"({text},)" if "," not in text and text else f"({text})"


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_value(op: str, name: str, is_right: bool, rule: str, got: object) -> None:
    """Raise ValueError in the project's error grammar unless ``is_right``."""
    if not is_right:
        raise ValueError(f"{op}: {name} must {rule}, got {got}")


def check_shape(op: str, name: str, tensor: torch.Tensor, forms: dict[str, tuple]) -> None:
    """Check the rank and shape of a tensor.

    Args:
        op: operator, the first word of the sentence.
        name: argument.
        tensor: its value.
        forms: permitted shapes: letters -> sizes. A size is an int, or a letter where it is free.

    Raises:
        ValueError: no form has the tensor's shape.
    """
    got = tuple(tensor.shape)
    same_rank = {letters: sizes for letters, sizes in forms.items() if len(sizes) == len(got)}
    for sizes in same_rank.values():
        if all(
            isinstance(want, str) or want == have for want, have in zip(sizes, got, strict=True)
        ):
            return
    # Where no form has the rank, the last one, which is the most general, is shown.
    letters, sizes = list((same_rank or forms).items())[-1]
    if any(isinstance(size, int) for size in sizes):
        # A free size stands as what was got, else as its letter; the least group count is 1.
        free = got if same_rank else [1 if w == "G" else w for w in sizes]
        sizes = (h if isinstance(w, str) else w for w, h in zip(sizes, free, strict=True))
        letters = f"{letters}) = {_tuple(sizes)[:-1]}"
    raise ValueError(f"{op}: {name} must have shape ({letters}), got {_tuple(got)}")


def check_tensor(op, name, tensor, forms, device=None, dtypes=FLOATS, optional=False) -> None:
    """Check the Python type, rank, shape, dtype and device of one argument, in that order.

    Args:
        op: operator, the first word of the sentence.
        name: argument.
        tensor: its value.
        forms: permitted shapes, as in :func:`check_shape`.
        device: device of the main input; None for the main input itself.
        dtypes: permitted dtypes.
        optional: None is permitted.

    Raises:
        TypeError: not a tensor.
        ValueError: layout, rank, shape, dtype or device.
    """
    if tensor is None and optional:
        return
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.layout != torch.strided or tensor.is_nested:
        got = "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")
        raise ValueError(f"{op}: {name} must be dense, got {got}")
    check_shape(op, name, tensor, forms)
    if tensor.dtype not in dtypes:
        wanted = _either([_dtype(dtype) for dtype in dtypes])
        raise ValueError(f"{op}: {name} must have dtype {wanted}, got {_dtype(tensor.dtype)}")
    if device is not None and tensor.device != device:
        raise ValueError(f"{op}: {name} must be on {device}, got {tensor.device}")


def check_groups(op: str, name: str, ngroups: int, letter: str, size: int) -> None:
    """Check that a group count divides the channels (or heads) that share it."""
    is_right = ngroups > 0 and size % ngroups == 0
    check_value(op, name, is_right, f"have a group count that divides {letter} = {size}", ngroups)


def check_int(op: str, name: str, value: object, low: int) -> None:
    """Check that a scalar argument is an int of at least ``low``."""
    if not isinstance(value, (int, torch.SymInt)) or isinstance(value, bool):
        raise TypeError(f"{op}: {name} must be an int, got {type(value).__name__}")
    check_value(op, name, value >= low, f"be at least {low}", value)


def check_chunk_size(op: str, value: object) -> None:
    """Check the steps of a chunk, which the outputs of a stage have as an axis."""
    check_int(op, "chunk_size", value, 1)
    check_value(op, "chunk_size", value < 2**31, "be below 2**31", value)


def check_positive(op: str, name: str, value: object) -> None:
    """Check that a scalar argument is a number above 0."""
    if not isinstance(value, (float, int, torch.SymFloat)):
        raise TypeError(f"{op}: {name} must be a float, got {type(value).__name__}")
    check_value(op, name, value > 0, "be positive", value)


def check_writable(op: str, name: str, tensor: torch.Tensor) -> None:
    """Check that no two elements along an axis of a tensor updated in place are the same."""
    if not tensor.numel():
        return
    for axis, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        got = f"stride 0 along axis {axis}"
        check_value(op, name, size < 2 or stride != 0, "not overlap itself", got)


def check_seq_meta(op: str, seq_meta: object, batch: int) -> int:
    """Check the type of ``seq_meta`` and return the number S of states that it asks for."""
    if seq_meta is None:
        return batch
    if not isinstance(seq_meta, SeqMeta):
        raise TypeError(f"{op}: seq_meta must be a SeqMeta, got {type(seq_meta).__name__}")
    return seq_meta.num_sequences if seq_meta.state_per_sequence else batch


def check_ids(op: str, seq_idx, batch: int, seqlen: int | str, device) -> None:
    """Check ``seq_idx`` where it is given: (B, L), int32, -1 or a sequence number.

    Values are not looked at inside ``torch.compile``.
    """
    check_tensor(
        op, "seq_idx", seq_idx, {"B, L": (batch, seqlen)}, device, (torch.int32,), optional=True
    )
    if seq_idx is None or torch.compiler.is_compiling() or seq_idx.is_meta or not seq_idx.numel():
        return
    low = seq_idx.min().item()
    check_value(op, "seq_idx", low >= -1, "be -1 or a sequence number", low)


def check_limit(op: str, dt_limit: object) -> None:
    """Check that ``dt_limit`` is a pair of which the first is not above the second."""
    is_pair = isinstance(dt_limit, (tuple, list)) and len(dt_limit) == 2
    is_pair = is_pair and all(isinstance(bound, Real) for bound in dt_limit)
    check_value(op, "dt_limit", is_pair and dt_limit[0] <= dt_limit[1], "be (low, high)", dt_limit)
    try:
        tuple(map(float, dt_limit))
    except OverflowError:
        check_value(op, "dt_limit", False, "fit in float64", "an int beyond it")


def check_rows(op: str, state_indices, nrows: int, batch: int, device, state: str) -> None:
    """Check ``state_indices``: (B,), int32, -1 or a row of ``state``, no row twice.

    Without it, the state must have one row per batch row. Values are not looked at inside
    ``torch.compile``.
    """
    if state_indices is None:
        check_value(
            op, state, nrows == batch, f"have B = {batch} rows without state_indices", nrows
        )
        return
    check_tensor(op, "state_indices", state_indices, {"B,": (batch,)}, device, (torch.int32,))
    if torch.compiler.is_compiling() or state_indices.is_meta:
        return
    rows = state_indices.tolist()
    for row in rows:
        check_value(op, "state_indices", -1 <= row < nrows, f"lie in -1..{nrows - 1}", row)
    used = [row for row in rows if row >= 0]
    twice = next((row for row in used if used.count(row) > 1), None)
    check_value(op, "state_indices", twice is None, "not name a row twice", twice)


def selective_scan(u, delta, A, B, C, D, z, dt_bias, initial_state, seq_meta) -> None:
    """Check the arguments of ``reference.selective_scan``."""
    op = "selective_scan"
    check_tensor(op, "u", u, {"B, D, L": ("B", "D", "L")})
    batch, dim, seqlen = u.shape
    check_tensor(op, "delta", delta, {"B, D, L": (batch, dim, seqlen)}, u.device)
    check_tensor(op, "A", A, {"D, N": (dim, "N")}, u.device)
    dstate = A.shape[1]
    forms = {
        "D, N": (dim, dstate),
        "B, N, L": (batch, dstate, seqlen),
        "B, G, N, L": (batch, "G", dstate, seqlen),
    }
    for name, matrix in (("B", B), ("C", C)):
        check_tensor(op, name, matrix, forms, u.device)
        if matrix.ndim == 4:
            check_groups(op, name, matrix.shape[1], "D", dim)
    check_tensor(op, "D", D, {"D,": (dim,)}, u.device, optional=True)
    check_tensor(op, "z", z, {"B, D, L": (batch, dim, seqlen)}, u.device, optional=True)
    check_tensor(op, "dt_bias", dt_bias, {"D,": (dim,)}, u.device, optional=True)
    form = {"S, D, N": (check_seq_meta(op, seq_meta, batch), dim, dstate)}
    check_tensor(op, "initial_state", initial_state, form, u.device, optional=True)


def selective_state_step(state, x, dt, A, B, C, D, z, dt_bias, state_indices) -> None:
    """Check the arguments of ``reference.selective_state_step``."""
    op = "selective_state_step"
    check_tensor(
        op, "state", state, {"R, D, N": ("R", "D", "N"), "R, H, P, N": ("R", "H", "P", "N")}
    )
    check_writable(op, "state", state)
    nrows, *channels, dstate = state.shape
    names = "H, P" if len(channels) == 2 else "D"
    forms = {f"B, {names}": ("B", *channels), f"B, T, {names}": ("B", "T", *channels)}
    check_tensor(op, "x", x, forms, state.device)
    lead = tuple(x.shape[: x.ndim - len(channels)])  # (B,) or (B, T)
    letters = "B, T" if len(lead) == 2 else "B"
    heads = channels[0]
    if len(channels) == 2:
        steps = {f"{letters}, H": (*lead, heads), f"{letters}, H, P": (*lead, *channels)}
        rates = {"H,": (heads,), "H, P, N": (*channels, dstate)}
        weights = {"H,": (heads,), "H, P": tuple(channels)}
    else:
        steps = {f"{letters}, D": (*lead, heads)}
        rates, weights = {"D, N": (heads, dstate)}, {"D,": (heads,)}
    check_tensor(op, "dt", dt, steps, state.device)
    check_tensor(op, "A", A, rates, state.device)
    forms = {f"{letters}, N": (*lead, dstate), f"{letters}, G, N": (*lead, "G", dstate)}
    for name, matrix in (("B", B), ("C", C)):
        check_tensor(op, name, matrix, forms, state.device)
        if matrix.ndim == len(lead) + 2:
            check_groups(op, name, matrix.shape[-2], names[0], heads)
    check_tensor(op, "D", D, weights, state.device, optional=True)
    form = {f"{letters}, {names}": tuple(x.shape)}
    check_tensor(op, "z", z, form, state.device, optional=True)
    check_tensor(op, "dt_bias", dt_bias, weights, state.device, optional=True)
    check_rows(op, state_indices, nrows, x.shape[0], state.device, "state")


def ssd_chunk_scan(
    X, dt, A, B, C, chunk_size, D, z, seq_meta, initial_states, dt_bias, dt_limit
) -> None:
    """Check the arguments of ``reference.ssd_chunk_scan``."""
    op = "ssd_chunk_scan"
    check_tensor(op, "X", X, {"B, L, H, P": ("B", "L", "H", "P")})
    batch, seqlen, nheads, headdim = X.shape
    check_tensor(op, "dt", dt, {"B, L, H": (batch, seqlen, nheads)}, X.device)
    check_tensor(op, "A", A, {"H,": (nheads,)}, X.device)
    check_tensor(op, "B", B, {"B, L, G, N": (batch, seqlen, "G", "N")}, X.device)
    check_groups(op, "B", B.shape[2], "H", nheads)
    dstate = B.shape[3]
    check_tensor(op, "C", C, {"B, L, G, N": (batch, seqlen, "G", dstate)}, X.device)
    check_groups(op, "C", C.shape[2], "H", nheads)
    check_int(op, "chunk_size", chunk_size, 1)
    forms = {"H,": (nheads,), "H, P": (nheads, headdim)}
    check_tensor(op, "D", D, forms, X.device, optional=True)
    check_tensor(op, "z", z, {"B, L, H, P": tuple(X.shape)}, X.device, optional=True)
    form = {"S, H, P, N": (check_seq_meta(op, seq_meta, batch), nheads, headdim, dstate)}
    check_tensor(op, "initial_states", initial_states, form, X.device, optional=True)
    check_tensor(op, "dt_bias", dt_bias, {"H,": (nheads,)}, X.device, optional=True)
    check_limit(op, dt_limit)


def ssd_chunk_cumsum(dt, A, chunk_size, dt_bias, dt_limit, seq_idx) -> None:
    """Check the arguments of ``reference.ssd_chunk_cumsum``."""
    op = "ssd_chunk_cumsum"
    check_tensor(op, "dt", dt, {"B, L, H": ("B", "L", "H")})
    check_tensor(op, "A", A, {"H,": (dt.shape[2],)}, dt.device)
    check_chunk_size(op, chunk_size)
    check_tensor(op, "dt_bias", dt_bias, {"H,": (dt.shape[2],)}, dt.device, optional=True)
    check_limit(op, dt_limit)
    check_ids(op, seq_idx, *dt.shape[:2], dt.device)


def ssd_chunk_state(x, B, dt, dA_cumsum, seq_idx) -> None:
    """Check the arguments of ``reference.ssd_chunk_state``."""
    op = "ssd_chunk_state"
    check_tensor(op, "x", x, {"B, L, H, P": ("B", "L", "H", "P")})
    batch, seqlen, nheads, _ = x.shape
    check_tensor(op, "B", B, {"B, L, G, N": (batch, seqlen, "G", "N")}, x.device)
    check_groups(op, "B", B.shape[2], "H", nheads)
    _in_chunks(op, x, dt, dA_cumsum)
    check_ids(op, seq_idx, batch, seqlen, x.device)


def ssd_state_passing(states, dA_cumsum, initial_states, seq_idx) -> None:
    """Check the arguments of ``reference.ssd_state_passing``."""
    op = "ssd_state_passing"
    check_tensor(op, "states", states, {"B, C, H, P, N": ("B", "C", "H", "P", "N")})
    batch, nchunks, nheads, headdim, dstate = states.shape
    form = {"B, H, C, Q": (batch, nheads, nchunks, "Q")}
    check_tensor(op, "dA_cumsum", dA_cumsum, form, states.device)
    chunk = dA_cumsum.shape[3]
    check_value(op, "dA_cumsum", chunk >= 1, "have at least 1 step per chunk", chunk)
    form = {"B, H, P, N": (batch, nheads, headdim, dstate)}
    check_tensor(op, "initial_states", initial_states, form, states.device, optional=True)
    check_ids(op, seq_idx, batch, "L", states.device)
    if seq_idx is not None:
        seqlen = seq_idx.shape[1]
        rule = f"have the steps of {nchunks} chunks of {chunk}"
        check_value(op, "seq_idx", -(-seqlen // chunk) == nchunks, rule, seqlen)


def ssd_bmm_chunk(C, B, chunk_size) -> None:
    """Check the arguments of ``reference.ssd_bmm_chunk``."""
    op = "ssd_bmm_chunk"
    check_tensor(op, "C", C, {"B, L, G, N": ("B", "L", "G", "N")})
    check_value(op, "C", C.shape[2] >= 1, "have at least 1 group", C.shape[2])
    batch, seqlen, _, dstate = C.shape
    check_tensor(op, "B", B, {"B, L, G, N": (batch, seqlen, "G", dstate)}, C.device)
    check_value(op, "B", B.shape[2] >= 1, "have at least 1 group", B.shape[2])
    check_chunk_size(op, chunk_size)


def ssd_chunk_output(CB, x, dt, dA_cumsum, C, states_in, D, z, seq_idx) -> None:
    """Check the arguments of ``reference.ssd_chunk_output``."""
    op = "ssd_chunk_output"
    check_tensor(op, "x", x, {"B, L, H, P": ("B", "L", "H", "P")})
    batch, seqlen, nheads, headdim = x.shape
    _in_chunks(op, x, dt, dA_cumsum)
    nchunks, chunk = dt.shape[2:]
    form = {"B, C, G, Q, Q": (batch, nchunks, "G", chunk, chunk)}
    check_tensor(op, "CB", CB, form, x.device)
    check_groups(op, "CB", CB.shape[2], "H", nheads)
    check_tensor(op, "C", C, {"B, L, G, N": (batch, seqlen, "G", "N")}, x.device)
    check_groups(op, "C", C.shape[2], "H", nheads)
    form = {"B, C, H, P, N": (batch, nchunks, nheads, headdim, C.shape[3])}
    check_tensor(op, "states_in", states_in, form, x.device)
    forms = {"H,": (nheads,), "H, P": (nheads, headdim)}
    check_tensor(op, "D", D, forms, x.device, optional=True)
    check_tensor(op, "z", z, {"B, L, H, P": tuple(x.shape)}, x.device, optional=True)
    check_ids(op, seq_idx, batch, seqlen, x.device)


def _in_chunks(op: str, x, dt, dA_cumsum) -> None:
    """Check dt and dA_cumsum, (B, H, C, Q), against x (B, L, H, P)."""
    batch, seqlen, nheads, _ = x.shape
    check_tensor(op, "dt", dt, {"B, H, C, Q": (batch, nheads, "C", "Q")}, x.device)
    nchunks, chunk = dt.shape[2:]
    check_value(op, "dt", chunk >= 1, "have at least 1 step per chunk", chunk)
    rule = f"have ceil(L / Q) chunks for L = {seqlen} and Q = {chunk}"
    check_value(op, "dt", nchunks == -(-seqlen // chunk), rule, nchunks)
    form = {"B, H, C, Q": (batch, nheads, nchunks, chunk)}
    check_tensor(op, "dA_cumsum", dA_cumsum, form, x.device)


def _filter(op: str, x, weight, bias, activation) -> int:
    """Check what both convolutions share; return the width W."""
    dim, device = x.shape[1], x.device
    check_tensor(op, "weight", weight, {"D, W": (dim, "W"), "D, 1, W": (dim, 1, "W")}, device)
    width = weight.shape[-1]
    check_value(op, "weight", width >= 1, "have a width of at least 1", width)
    check_tensor(op, "bias", bias, {"D,": (dim,)}, device, optional=True)
    rule = "be 'silu', 'swish', 'identity' or None"
    is_known = activation is None or activation in ("silu", "swish", "identity")
    check_value(op, "activation", is_known, rule, repr(activation))
    return width


def dw_causal_conv(x, weight, bias, activation, initial_state, seq_meta) -> None:
    """Check the arguments of ``reference.dw_causal_conv``."""
    op = "dw_causal_conv"
    check_tensor(op, "x", x, {"B, D, L": ("B", "D", "L")})
    width = _filter(op, x, weight, bias, activation)
    nstates = check_seq_meta(op, seq_meta, x.shape[0])
    form = {"S, D, W - 1": (nstates, x.shape[1], width - 1)}
    check_tensor(op, "initial_state", initial_state, form, x.device, optional=True)


def dw_causal_conv_step(
    x, conv_state, weight, bias, activation, cache_seqlens, state_indices
) -> None:
    """Check the arguments of ``reference.dw_causal_conv_step``."""
    op = "dw_causal_conv_step"
    check_tensor(op, "x", x, {"B, D": ("B", "D"), "B, D, T": ("B", "D", "T")})
    batch, dim = x.shape[:2]
    check_tensor(op, "conv_state", conv_state, {"R, D, K": ("R", dim, "K")}, x.device)
    check_writable(op, "conv_state", conv_state)
    width, memory = _filter(op, x, weight, bias, activation), conv_state.shape[2]
    is_enough = memory >= width - 1
    check_value(op, "conv_state", is_enough, f"hold at least W - 1 = {width - 1} inputs", memory)
    if cache_seqlens is not None:
        check_tensor(op, "cache_seqlens", cache_seqlens, {"B,": (batch,)}, x.device, (torch.int32,))
        if batch and not torch.compiler.is_compiling() and not cache_seqlens.is_meta:
            low = cache_seqlens.min().item()
            check_value(op, "cache_seqlens", low >= 0, "not be negative", low)
    check_rows(op, state_indices, conv_state.shape[0], batch, x.device, "conv_state")


def _rows(op: str, name: str, tensor) -> None:
    """Check a main input of any rank but 0."""
    if isinstance(tensor, torch.Tensor) and not tensor.is_nested and tensor.ndim == 0:
        raise ValueError(f"{op}: {name} must have shape (..., D), got ()")
    is_dense = isinstance(tensor, torch.Tensor) and not tensor.is_nested
    shape = tuple(tensor.shape) if is_dense else ()
    check_tensor(op, name, tensor, {"..., D": shape})


def fused_layer_norm(x, weight, bias, residual, eps) -> None:
    """Check the arguments of ``reference.fused_layer_norm``."""
    op = "fused_layer_norm"
    _rows(op, "x", x)
    dim = x.shape[-1]
    check_tensor(op, "weight", weight, {"D,": (dim,)}, x.device)
    check_tensor(op, "bias", bias, {"D,": (dim,)}, x.device, optional=True)
    check_tensor(op, "residual", residual, {"..., D": tuple(x.shape)}, x.device, optional=True)
    check_positive(op, "eps", eps)


def gated_norm(x, weight, bias, z, eps, group_size) -> None:
    """Check the arguments of ``reference.gated_norm``."""
    op = "gated_norm"
    _rows(op, "x", x)
    dim = x.shape[-1]
    check_tensor(op, "weight", weight, {"D,": (dim,)}, x.device)
    check_tensor(op, "bias", bias, {"D,": (dim,)}, x.device, optional=True)
    check_tensor(op, "z", z, {"..., D": tuple(x.shape)}, x.device, optional=True)
    check_positive(op, "eps", eps)
    if group_size is not None:
        check_int(op, "group_size", group_size, 1)
        check_value(op, "group_size", dim % group_size == 0, f"divide D = {dim}", group_size)


def swiglu(gate, up) -> None:
    """Check the arguments of ``reference.swiglu``."""
    op = "swiglu"
    _rows(op, "gate", gate)
    if up is None:
        width = gate.shape[-1]
        check_value(op, "gate", width % 2 == 0, "have an even last axis without up", width)
    check_tensor(op, "up", up, {"..., D": tuple(gate.shape)}, gate.device, optional=True)
