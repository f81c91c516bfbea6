"""The arguments by which a module is told of packing and padding, made into one SeqMeta."""

from __future__ import annotations

from torch import Tensor

from ssm.seq_meta import SeqMeta


def sequence_meta(
    owner: str,
    batch: int,
    seqlen: int,
    seq_meta: SeqMeta | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    attention_mask: Tensor | None = None,
) -> SeqMeta | None:
    """Put the arguments together.

    Args:
        owner: class name for messages.
        batch: B.
        seqlen: L, steps of this call.
        seq_meta: everything in one object; excludes the others.
        seq_idx: (B, L) int, sequence id of every step, -1 = padding.
        cu_seqlens: (S + 1,) int, boundaries over the flattened B L steps.
        attention_mask: (B, L or more), nonzero = real token; the last L columns belong to this
            call, as the mask of transformers grows while decoding.

    Returns:
        What the arguments say together; None where all are None.

    Raises:
        ValueError: seq_meta beside another argument, or a mask of the wrong shape.
        TypeError: seq_meta is no SeqMeta, or the mask no tensor.
    """
    given = [seq_idx, cu_seqlens, attention_mask]
    if seq_meta is not None:
        if not isinstance(seq_meta, SeqMeta):
            got = type(seq_meta).__name__
            raise TypeError(f"{owner}: seq_meta must be a SeqMeta, got {got}")
        if any(argument is not None for argument in given):
            raise ValueError(
                f"{owner}: seq_meta must be the only sequence argument, got another beside it"
            )
        return seq_meta
    if all(argument is None for argument in given):
        return None
    mask = None
    if attention_mask is not None:
        _check_tensor(owner, "attention_mask", attention_mask)
        shape = tuple(attention_mask.shape)
        if len(shape) != 2 or shape[0] != batch or shape[1] < seqlen:
            raise ValueError(
                f"{owner}: attention_mask must have shape (B, L) = {(batch, seqlen)}, got {shape}"
            )
        mask = attention_mask[:, shape[1] - seqlen :].bool()
    return SeqMeta(seq_idx=seq_idx, cu_seqlens=cu_seqlens, mask=mask)


def check_input(owner: str, name: str, x: object, width: int | None = None) -> None:
    """Refuse the input of a module if it is no tensor of numbers, or not as wide as the module.

    Args:
        owner: class name for messages.
        name: of the input.
        x: its value.
        width: of its last axis; None is looked at elsewhere.

    Raises:
        TypeError: x is no tensor.
        ValueError: x is not floating point, or has another width.
    """
    _check_tensor(owner, name, x)
    if not x.is_floating_point():
        # A projection would cast integers, and the result, cast back, would be all zero.
        raise ValueError(f"{owner}: {name} must be floating point, got {x.dtype}")
    if width is not None and (x.dim() == 0 or x.shape[-1] != width):
        got = tuple(x.shape)
        raise ValueError(f"{owner}: {name} must have shape (..., {width}), got {got}")


def check_positions(owner: str, positions: object, batch: int, seqlen: int, device) -> None:
    """Refuse what is no position for every step.

    Args:
        owner: class name for messages.
        positions: value of position_ids; None is none.
        batch: B.
        seqlen: L.
        device: of the input.

    Raises:
        TypeError: no tensor.
        ValueError: not (B, L), complex, or on another device.
    """
    if positions is None:
        return
    _check_tensor(owner, "position_ids", positions)
    if tuple(positions.shape) != (batch, seqlen):
        raise ValueError(
            f"{owner}: position_ids must have shape (B, L) = {(batch, seqlen)}, "
            f"got {tuple(positions.shape)}"
        )
    if positions.is_complex():
        raise ValueError(f"{owner}: position_ids must not be complex, got {positions.dtype}")
    if positions.device != device:
        raise ValueError(f"{owner}: position_ids must be on {device}, got {positions.device}")


def _check_tensor(owner: str, name: str, x: object) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{owner}: {name} must be a torch.Tensor, got {type(x).__name__}")


def batch_and_seqlen(
    owner: str, name: str, x: Tensor, width: int, seqlen: int | None, parts: int = 1
) -> tuple[int, int]:
    """Read B and L off an input that may have both in one axis.

    Args:
        owner: class name for messages.
        name: of the input.
        x: (B / parts, L, width), or (B L / parts, width) with seqlen.
        width: of the last axis.
        seqlen: L, or None.
        parts: number of ranks that hold a part of axis 0 each.

    Returns:
        B and L over all parts.

    Raises:
        ValueError: x is not floating point, the shape does not fit, or seqlen is not positive.
        TypeError: x is no tensor, or seqlen no int.
    """
    check_input(owner, name, x)
    shape = tuple(x.shape)
    if seqlen is None:
        if len(shape) != 3 or shape[-1] != width:
            raise ValueError(f"{owner}: {name} must have shape (B, L, {width}), got {shape}")
        return shape[0] * parts, shape[1]
    if isinstance(seqlen, bool) or not isinstance(seqlen, int):
        raise TypeError(f"{owner}: seqlen must be an int, got {seqlen!r}")
    if seqlen < 1:
        raise ValueError(f"{owner}: seqlen must be positive, got {seqlen}")
    if len(shape) != 2 or shape[-1] != width or shape[0] * parts % seqlen:
        tokens = "B L" if parts == 1 else f"B L / {parts}"
        raise ValueError(
            f"{owner}: {name} must have shape ({tokens}, {width}) with L = {seqlen} "
            f"if seqlen is given, got {shape}"
        )
    return shape[0] * parts // seqlen, seqlen
