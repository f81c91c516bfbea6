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
    """
    given = [seq_idx, cu_seqlens, attention_mask]
    if seq_meta is not None:
        if any(argument is not None for argument in given):
            raise ValueError(
                f"{owner}: seq_meta must be the only sequence argument, got another beside it"
            )
        return seq_meta
    if all(argument is None for argument in given):
        return None
    mask = None
    if attention_mask is not None:
        shape = tuple(attention_mask.shape)
        if len(shape) != 2 or shape[0] != batch or shape[1] < seqlen:
            raise ValueError(
                f"{owner}: attention_mask must have shape (B, L) = {(batch, seqlen)}, got {shape}"
            )
        mask = attention_mask[:, shape[1] - seqlen :].bool()
    return SeqMeta(seq_idx=seq_idx, cu_seqlens=cu_seqlens, mask=mask)
