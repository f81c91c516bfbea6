"""Reading a draft and keeping a part of it: what speculative decoding asks of a model."""

from __future__ import annotations

import operator

import torch
from torch import Tensor

from ssm.state import State


class Verification:
    """What a model says to a draft, and the choice how much of the draft the state takes in.

    Made by ``model.verify(draft, state)``. The state stays where it is until ``keep``.

    Args:
        model: that read the draft.
        draft: (B, T) int.
        state: before the draft.
        ahead: a copy of it, behind the draft.
        logits: (B, T, V); ``logits[:, t]`` predicts what follows ``draft[:, t]``.
    """

    def __init__(self, model, draft: Tensor, state: State, ahead: State, logits: Tensor) -> None:
        self.logits = logits
        self._model = model
        self._draft = draft
        self._state = state
        self._offset = state.seqlen_offset
        self._held = _held(state)
        self._ahead: State | None = ahead

    def agreed(self) -> Tensor:
        """Count the leading draft tokens that greedy decoding would have produced.

        The first token is taken as given: it is the one that was chosen before the draft was made.

        Returns:
            (B,) int64, in [1, T], or 0 where T is 0: an argument for ``keep``. The token that
            follows row b is then ``logits[b, agreed[b] - 1].argmax()`` over the vocabulary.
        """
        batch, length = self._draft.shape
        if length == 0:
            return torch.zeros(batch, dtype=torch.int64, device=self._draft.device)
        chosen = self.logits[:, :-1, : self._model.config.vocab_size].argmax(dim=-1)
        agrees = (chosen == self._draft[:, 1:]).long()
        return 1 + agrees.cumprod(dim=1).sum(dim=1)

    def keep(self, k: int | Tensor) -> State:
        """Move the state behind the first k tokens of each row, as if only they had been fed.

        To keep less than the draft, the kept tokens are read again from the state as it was: every
        other way would have to store the states between all tokens. ``seqlen_offset`` grows by the
        largest k, as a call with the other rows padded on the right has it.

        Args:
            k: one number for all rows, or (B,) int; each in [0, T].

        Returns:
            The state, changed in place.

        Raises:
            TypeError: k is not made of integers.
            ValueError: k is out of range, the state has moved since ``verify``, or ``keep`` was
                called before; nothing is changed then.
        """
        if self._ahead is None:
            raise ValueError("Verification: keep must be called once, got a second call")
        if self._state.seqlen_offset != self._offset:
            raise ValueError(
                f"Verification: state must stay at seqlen_offset {self._offset} until keep, "
                f"got {self._state.seqlen_offset}"
            )
        if not _same(_held(self._state), self._held):
            raise ValueError(
                "Verification: state must stay as verify found it until keep, got another"
            )
        counts = self._counts(k)
        length = self._draft.shape[1]
        most, least = max(counts, default=0), min(counts, default=0)
        if least == length:
            self._state._become(self._ahead)
        elif most:
            mask = None
            if least != most:
                columns = torch.arange(most, device=self._draft.device)
                limits = torch.tensor(counts, device=self._draft.device)
                mask = columns < limits[:, None]
            # One column of logits is the least that the model can be asked for.
            self._model(
                self._draft[:, :most], state=self._state, attention_mask=mask, num_last_tokens=1
            )
        self._ahead = None
        return self._state

    def _counts(self, k) -> list[int]:
        """Return k as one checked number per row."""
        batch, length = self._draft.shape
        if isinstance(k, Tensor) and k.dim():
            if k.is_floating_point() or k.is_complex() or k.dtype == torch.bool:
                raise TypeError(f"Verification: k must hold integers, got {k.dtype}")
            if k.shape != (batch,):
                raise ValueError(
                    f"Verification: k must have shape (B,) = {(batch,)}, got {tuple(k.shape)}"
                )
            counts = k.tolist()
        else:
            try:
                counts = [operator.index(k)] * batch
                if isinstance(k, bool):
                    raise TypeError
            except TypeError:
                raise TypeError(
                    f"Verification: k must be an int or a tensor (B,), got {k!r}"
                ) from None
        for count in counts:
            if not 0 <= count <= length:
                raise ValueError(f"Verification: k must lie in [0, {length}], got {count}")
        return counts


def _held(state: State) -> list[tuple[Tensor, int | None]]:
    """Return the tensors of a state, and how often each was written; inference does not count."""
    tensors = state._tensors().values()
    return [(t, None if t.is_inference() else t._version) for t in tensors]


def _same(held: list, before: list) -> bool:
    return len(held) == len(before) and all(
        a is b and version == number for (a, version), (b, number) in zip(held, before, strict=True)
    )


def verify(model, draft: Tensor, state: State) -> Verification:
    """Read a draft from a copy of a state.

    Args:
        model: callable as ``model(ids, state=state).logits``, with ``config``.
        draft: (B, T) int, tokens that may follow what the state has seen; T may be 0.
        state: left as it is until ``keep``.

    Returns:
        A Verification. Its logits are those of ``model(draft, state=state)``.

    Raises:
        ValueError: the draft or the state does not fit the model.
        TypeError: state is no State.

    Source:
        Leviathan et al. 2023 (arXiv:2211.17192), speculative decoding.
    """
    if not isinstance(state, State):
        raise TypeError(f"verify: state must be a State, got {type(state).__name__}")
    ahead = state.clone()
    return Verification(model, draft, state, ahead, model(draft, state=ahead).logits)
