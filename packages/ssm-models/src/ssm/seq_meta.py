"""SeqMeta: which steps of a batch belong to which sequence, and which are skipped."""

from dataclasses import dataclass, field
from itertools import pairwise

import torch

_INTEGERS = (torch.int32, torch.int64)


def _fail(argument: str, rule: str, got: object) -> None:
    raise ValueError(f"seq_meta: {argument} must {rule}, got {got}")


def _check_kind(name: str, tensor: object, ndim: int, letters: str, dtypes: tuple) -> None:
    """Check the Python type, rank and dtype of one field, in that order."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"seq_meta: {name} must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.ndim != ndim:
        _fail(name, f"have shape {letters}", tuple(tensor.shape))
    if tensor.dtype not in dtypes:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        _fail(name, f"have dtype {names}", str(tensor.dtype).removeprefix("torch."))


def _where(wrong: torch.Tensor) -> tuple:
    """Return the index of the first true element, as plain integers."""
    return tuple(wrong.nonzero()[0].tolist())


@dataclass(frozen=True, eq=False)
class SeqMeta:
    """Sequence layout of a batch: packed sequences, padding, or both.

    The operators give the same result for packed, padded and separate sequences. A skipped step
    leaves the state untouched, has output 0 and gradient 0, and its content does not matter (not
    even NaN). Skipped steps may lie anywhere, also inside a sequence.

    The state rule. With ``cu_seqlens`` every sequence has a state of its own: S states enter, S
    leave, and an empty sequence passes its state on. Without it every row has one: the state that
    enters is that of the row's first sequence, the state that leaves is the one after the last step
    that is not skipped, and a sequence that starts later in the row starts from zero.

    Where two fields are given they must agree: ``seq_idx`` and ``cu_seqlens`` must describe the
    same sequences; what lies behind the last one is padding, with -1 in ``seq_idx`` or with ids
    that ``cu_seqlens`` has no sequence for. ``mask`` may skip further steps but must be False
    wherever the other field has padding.

    The fields must not be modified after construction: their values are checked once.

    Args:
        seq_idx: (B, L), int32 | int64. Equal neighbours in a row belong to one sequence; -1 is
            padding. A new sequence starts where the id differs from the id of the last step of the
            row that was not skipped.
        cu_seqlens: (S + 1,), int32 | int64. Sequence boundaries over the row-major flattened
            B * L steps: starts at 0, does not decrease, ends at or before B * L (the rest is
            padding). No sequence crosses a row. An empty sequence is allowed.
        mask: (B, L), bool. False skips the step.

    Raises:
        TypeError: a field is not a tensor.
        ValueError: a rank, dtype, device or value breaks the contract; the message names the
            field. Values are not looked at inside ``torch.compile``.

    Source:
        The layout of ``cu_seqlens`` follows Dao et al. 2022 (arXiv:2205.14135), variable-length
        attention; the state rule is this project's.

    Example:
        >>> meta = SeqMeta(cu_seqlens=torch.tensor([0, 3, 8]))
        >>> meta.positions(1, 8)
        tensor([[0, 0, 0, 1, 1, 1, 1, 1]], dtype=torch.int32)
    """

    seq_idx: torch.Tensor | None = None
    cu_seqlens: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    _cache: dict = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.seq_idx is not None:
            _check_kind("seq_idx", self.seq_idx, 2, "(B, L)", _INTEGERS)
        if self.cu_seqlens is not None:
            _check_kind("cu_seqlens", self.cu_seqlens, 1, "(S + 1,)", _INTEGERS)
            if self.cu_seqlens.shape[0] == 0:
                _fail("cu_seqlens", "have at least 1 element", 0)
        if self.mask is not None:
            _check_kind("mask", self.mask, 2, "(B, L)", (torch.bool,))
        given = {
            n: t for n in ("seq_idx", "cu_seqlens", "mask") if (t := getattr(self, n)) is not None
        }
        if not given:
            _fail("seq_idx", "be given when cu_seqlens and mask are not", None)
        first = next(iter(given.values()))
        for name, tensor in given.items():
            if tensor.device != first.device:
                _fail(name, f"be on {first.device}", tensor.device)
        if (
            self.seq_idx is not None
            and self.mask is not None
            and self.mask.shape != self.seq_idx.shape
        ):
            want = f"have shape (B, L) = {tuple(self.seq_idx.shape)}"
            _fail("mask", want, tuple(self.mask.shape))
        if not torch.compiler.is_compiling() and not first.is_meta:
            self._check_values()

    @property
    def state_per_sequence(self) -> bool:
        """True if states are (S, ...), one per sequence of ``cu_seqlens``; False: (B, ...)."""
        return self.cu_seqlens is not None

    @property
    def num_sequences(self) -> int | None:
        """Number S of sequences in ``cu_seqlens``; None if not given (then S is the batch size)."""
        return None if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    def positions(
        self, batch: int, seqlen: int, device: torch.device | str | None = None
    ) -> torch.Tensor:
        """Return the canonical sequence ids: the only form that operators look at.

        Args:
            batch: B of the activations.
            seqlen: L of the activations.
            device: where the result shall lie; default: where the fields lie.

        Returns:
            (B, L), int32. The sequence of each step, -1 where the step is skipped. From
            ``cu_seqlens`` it is the sequence number, from ``seq_idx`` that value, from ``mask``
            alone 0. The tensor is cached and must not be modified.

        Raises:
            ValueError: the fields do not fit (B, L), or a sequence crosses a row.

        Source:
            The state rule in the class docstring.
        """
        if torch.compiler.is_compiling():
            return self._positions(batch, seqlen, device)
        for name, size in (("batch", batch), ("seqlen", seqlen)):
            if not isinstance(size, (int, torch.SymInt)):
                raise TypeError(f"seq_meta: {name} must be an int, got {size!r}")
        # What is made in inference mode cannot be saved for a backward outside it.
        key = (batch, seqlen, device, torch.is_inference_mode_enabled())
        if key not in self._cache:
            if self.cu_seqlens is not None and not self.cu_seqlens.is_meta:
                self._check_bounds(batch, seqlen)
            self._cache[key] = self._positions(batch, seqlen, device)
        return self._cache[key]

    def _positions(self, batch: int, seqlen: int, device) -> torch.Tensor:
        for name in ("seq_idx", "mask"):
            tensor = getattr(self, name)
            if tensor is not None and tuple(tensor.shape) != (batch, seqlen):
                _fail(name, f"have shape (B, L) = {(batch, seqlen)}", tuple(tensor.shape))
        if self.cu_seqlens is not None:
            ids = self._from_cu_seqlens(batch, seqlen)
        elif self.seq_idx is not None:
            ids = self.seq_idx.to(torch.int32)
        else:
            ids = torch.zeros_like(self.mask, dtype=torch.int32)
        if self.mask is not None:
            ids = torch.where(self.mask, ids, -1)
        return ids if device is None else ids.to(device)

    def _from_cu_seqlens(self, batch: int, seqlen: int) -> torch.Tensor:
        """Number the steps (B, L): count the sequences that ended at or before each of them."""
        step = torch.arange(
            batch * seqlen, device=self.cu_seqlens.device, dtype=self.cu_seqlens.dtype
        )
        ids = torch.searchsorted(self.cu_seqlens[1:].contiguous(), step, right=True, out_int32=True)
        return torch.where(ids < self.num_sequences, ids, -1).view(batch, seqlen)

    def _check_values(self) -> None:
        """Check what does not depend on (B, L), then that the fields agree."""
        if self.seq_idx is not None and self.seq_idx.numel():
            low, high = torch.stack(torch.aminmax(self.seq_idx)).tolist()
            if low < -1:
                _fail("seq_idx", "be at least -1", low)
            if high > torch.iinfo(torch.int32).max:
                _fail("seq_idx", "fit in int32", high)
        if self.cu_seqlens is not None:
            ends = self.cu_seqlens.tolist()
            if ends[0] != 0:
                _fail("cu_seqlens", "start at 0", ends[0])
            for before, after in pairwise(ends):
                if after < before:
                    _fail("cu_seqlens", "not decrease", f"{before} then {after}")
        if self.seq_idx is not None and self.cu_seqlens is not None:
            self._check_agreement(*self.seq_idx.shape)
        if self.mask is not None and (self.seq_idx is not None or self.cu_seqlens is not None):
            # Without the mask: the mask would hide the very steps that this looks for.
            batch, seqlen = self.mask.shape
            if self.seq_idx is not None:
                name, ids = "seq_idx", self.seq_idx
            else:
                self._check_bounds(batch, seqlen)
                name, ids = "cu_seqlens", self._from_cu_seqlens(batch, seqlen)
            wrong = self.mask & (ids < 0)
            if wrong.any():
                _fail("mask", f"be False where {name} has padding", f"True at {_where(wrong)}")

    def _check_agreement(self, batch: int, seqlen: int) -> None:
        """Check that ``seq_idx`` and ``cu_seqlens`` describe the same sequences."""
        self._check_bounds(batch, seqlen)
        numbers, ids = self._from_cu_seqlens(batch, seqlen), self.seq_idx
        wrong = (numbers >= 0) & (ids < 0)
        # Sequences of cu_seqlens are contiguous and the padding comes last, so neighbours suffice.
        same_number = numbers[:, 1:] == numbers[:, :-1]
        behind_a_sequence = numbers[:, :-1] >= 0
        wrong[:, 1:] |= behind_a_sequence & (same_number != (ids[:, 1:] == ids[:, :-1]))
        if wrong.any():
            at = _where(wrong)
            _fail("seq_idx", "agree with cu_seqlens", f"{ids[at].item()} at {at}")

    def _check_bounds(self, batch: int, seqlen: int) -> None:
        """Check ``cu_seqlens`` against the size of the activations."""
        ends = self.cu_seqlens.tolist()
        if ends[-1] > batch * seqlen:
            _fail("cu_seqlens", f"end at or before B * L = {batch * seqlen}", ends[-1])
        for begin, end in pairwise(ends):
            if begin < end and begin // seqlen != (end - 1) // seqlen:
                _fail(
                    "cu_seqlens", f"not cross a row of length {seqlen}", f"sequence {begin}:{end}"
                )
