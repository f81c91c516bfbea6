"""What the test matrix runs over: every module and model, and every way to feed it the same rows.

A problem is rows of unequal length and a state that has already seen a few tokens of each. The
judge feeds every row alone and whole. A path feeds the same rows in another way and must give the
same outputs, the same states behind them and, from the same weighting of both, the same gradients.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ssm.models.config import MambaConfig
from ssm.models.lm import MambaLMHeadModel
from ssm.modules.attention import MHA
from ssm.modules.mamba1 import Mamba1
from ssm.modules.mamba2 import Mamba2
from ssm.state import State

D_MODEL, VOCAB, SEEN = 8, 13, 2


@dataclass(frozen=True)
class Subject:
    """A module or model under test.

    Args:
        name: of the test.
        build: dtype -> module, its parameters random.
        tokens: whether it reads ids and not vectors.
    """

    name: str
    build: Callable[[torch.dtype], nn.Module]
    tokens: bool = False

    def __str__(self) -> str:
        return self.name

    def make(self, dtype: torch.dtype = torch.float64) -> nn.Module:
        """Return the module; the row of the embedding that stands for padding is NaN."""
        torch.manual_seed(3)
        module = self.build(dtype)
        if self.tokens:
            with torch.no_grad():
                module.backbone.embedding.weight[VOCAB] = torch.nan
        return module

    def inputs(self, batch: int, length: int, seed: int = 0, dtype=torch.float64) -> Tensor:
        """Return ids (B, L) or vectors (B, L, d_model) that want a gradient."""
        generator = torch.Generator().manual_seed(seed)
        if self.tokens:
            return torch.randint(0, VOCAB, (batch, length), generator=generator)
        x = torch.randn(batch, length, D_MODEL, generator=generator, dtype=torch.float64)
        return x.to(dtype).requires_grad_()

    def padding(self, count: int, like: Tensor) -> Tensor:
        """Return (count, ...) steps whose content must not matter."""
        if self.tokens:
            return torch.full((count,), VOCAB)
        return torch.full((count, D_MODEL), torch.nan, dtype=like.dtype)

    def call(self, module, x: Tensor, **kwargs) -> Tensor:
        """Return vectors or logits, (B, L, ...)."""
        y = module(x, **kwargs)
        return y.logits if self.tokens else y


def language_model(**kwargs) -> Callable[[torch.dtype], nn.Module]:
    """Return a builder of small models whose layers all matter to the logits."""
    settings = {"d_model": D_MODEL, "n_layer": 2, "vocab_size": VOCAB, "tie_embeddings": False}
    config = MambaConfig(**{**settings, **kwargs})

    def build(dtype):
        return MambaLMHeadModel(config, {"initializer_range": 1.0}, dtype=dtype)

    return build


MAMBA2 = {"d_state": 3, "headdim": 4, "chunk_size": 4}
SUBJECTS = [
    Subject("mamba1", lambda dtype: Mamba1(D_MODEL, d_state=3, dtype=dtype)),
    Subject(
        "mamba1_options",
        lambda dtype: Mamba1(
            D_MODEL, d_state=2, d_conv=2, expand=1, bias=True, conv_bias=False, dtype=dtype
        ),
    ),
    Subject("mamba2", lambda dtype: Mamba2(D_MODEL, **MAMBA2, ngroups=2, dtype=dtype)),
    Subject(
        "mamba2_options",
        lambda dtype: Mamba2(
            D_MODEL,
            **MAMBA2,
            d_conv=3,
            d_ssm=8,
            bias=True,
            D_has_hdim=True,
            rmsnorm=False,
            dt_limit=(0.01, 0.5),
            dtype=dtype,
        ),
    ),
    Subject("mha", lambda dtype: MHA(D_MODEL, 2, causal=True, layer_idx=0, dtype=dtype)),
    Subject(
        "mha_options",
        lambda dtype: MHA(
            D_MODEL,
            4,
            num_heads_kv=2,
            head_dim=6,
            mlp_dim=256,
            causal=True,
            d_conv=3,
            rotary_emb_dim=4,
            dtype=dtype,
        ),
    ),
    Subject("lm_mamba1", language_model(ssm_cfg={"d_state": 3}), tokens=True),
    Subject("lm_mamba2", language_model(ssm_cfg={"layer": "Mamba2", **MAMBA2}), tokens=True),
    Subject(
        "lm_hybrid",
        language_model(
            n_layer=3,
            ssm_cfg={"layer": "Mamba2", **MAMBA2},
            attn_layer_idx=[1],
            attn_cfg={"num_heads": 2, "causal": True, "rotary_emb_dim": 4, "d_conv": 3},
            d_intermediate=12,
        ),
        tokens=True,
    ),
]


@dataclass
class Problem:
    """Rows to feed behind a state.

    Args:
        subject: what is fed.
        module: built by it.
        seen: (R, SEEN, ...), what the state has seen of each row.
        rows: one (L_r, ...) per row.
    """

    subject: Subject
    module: nn.Module
    seen: Tensor
    rows: list[Tensor]

    @classmethod
    def make(cls, subject, lengths, dtype=torch.float64) -> Problem:
        """Build rows of the lengths given."""
        module = subject.make(dtype)
        seen = subject.inputs(len(lengths), SEEN, 1, dtype)
        rows = [subject.inputs(1, n, 2 + i, dtype)[0] for i, n in enumerate(lengths)]
        rows = [r if subject.tokens else r.detach().requires_grad_() for r in rows]
        return cls(subject, module, seen, rows)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row."""
        return [len(row) for row in self.rows]

    def state(self) -> State:
        """Return the state before the rows; gradients flow through it."""
        state = self.module.allocate_state(len(self.rows))
        self.call(self.seen, state=state)
        return state

    def call(self, x, **kwargs) -> Tensor:
        """Run the module."""
        return self.subject.call(self.module, x, **kwargs)

    def double(self) -> Problem:
        """Return the same problem in float64, from the same rounded numbers."""

        def widen(x):
            return x if self.subject.tokens else x.detach().double().requires_grad_()

        module = copy.deepcopy(self.module).double()
        return Problem(self.subject, module, widen(self.seen), [widen(row) for row in self.rows])

    def leaves(self) -> list[Tensor]:
        """Return what gradients are compared for."""
        inputs = [t for t in (self.seen, *self.rows) if t.requires_grad]
        return [*self.module.parameters(), *inputs]


@dataclass
class Result:
    """Outputs and states, row by row, in a form that does not depend on the path."""

    outputs: list[Tensor]
    states: list[list[Tensor]]

    def weighted(self) -> Tensor:
        """Return one number that every output and every state takes part in."""
        generator = torch.Generator().manual_seed(7)
        total = torch.zeros((), dtype=torch.float64)
        for tensor in [*self.outputs, *(t for row in self.states for t in row)]:
            if tensor.is_floating_point():
                weight = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
                total = total + (tensor.double() * weight).sum()
        return total


def read_state(state: State) -> list[list[Tensor]]:
    """Return, row by row, what a later token reads of every layer's state."""
    rows = []
    for row in range(len(state)):
        found = []
        for layer in state.key_value_memory_dict.values():
            if layer[0].dim() == 5:  # (kv_cache[, conv_state], lengths)
                cache, *convolutions, lengths = layer
                found += [cache[row, : lengths[row]], lengths[row]]
                found += [conv[row, :, 1:] for conv in convolutions]
            else:
                # The oldest input of a convolution is kept, and read by nobody.
                conv, ssm = layer
                found += [conv[row, :, 1:], ssm[row]]
        rows.append(found)
    return rows


def alone(problem: Problem) -> Result:
    """Feed every row whole and by itself: the judge."""
    state, outputs, states = problem.state(), [], []
    for i, row in enumerate(problem.rows):
        own = state.gather([i])
        outputs.append(problem.call(row[None], state=own)[0])
        states += read_state(own)
    return Result(outputs, states)


def whole(problem: Problem) -> Result:
    """Feed rows of one length as a batch."""
    state = problem.state()
    y = problem.call(torch.stack(problem.rows), state=state)
    return Result(list(y), read_state(state))


def chunked(*sizes: int) -> Callable[[Problem], Result]:
    """Return the path that feeds a batch in parts."""

    def path(problem: Problem) -> Result:
        state, x = problem.state(), torch.stack(problem.rows)
        parts = [problem.call(part, state=state) for part in x.split(sizes, dim=1)]
        return Result(list(torch.cat(parts, 1)), read_state(state))

    return path


def stepped(problem: Problem) -> Result:
    """Feed a batch token by token."""
    return chunked(*[1] * problem.lengths[0])(problem)


def packed(sizes: tuple[int, ...] = (), ids: bool = False) -> Callable[[Problem], Result]:
    """Return the path that feeds the rows behind each other, with padding at the end.

    Args:
        sizes: rows of the problem per row of the batch; () puts all into one.
        ids: say it by ``seq_idx`` too, which must agree.
    """

    def path(problem: Problem) -> Result:
        lengths, state = problem.lengths, problem.state()
        per_row = sizes or (len(lengths),)
        ends, begin = [], 0
        for count in per_row:
            ends.append(sum(lengths[begin : begin + count]))
            begin += count
        # Padding may only lie behind the last sequence, so the rows before it must be full.
        width = max(ends) if len(ends) > 1 else ends[0] + 2
        assert all(end == width for end in ends[:-1])
        steps = torch.cat(problem.rows)
        missing = len(ends) * width - sum(lengths)
        x = torch.cat([steps, problem.subject.padding(missing, steps)])
        x = x.view(len(ends), width, *x.shape[1:])
        boundaries = torch.tensor([0, *lengths]).cumsum(0)
        kwargs = {"cu_seqlens": boundaries}
        if ids:
            numbers = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
            numbers = torch.cat([numbers, torch.full((missing,), -1)])
            kwargs["seq_idx"] = numbers.view(len(ends), width)
        y = problem.call(x, state=state, **kwargs).flatten(0, 1)
        return Result(list(y[: sum(lengths)].split(lengths)), read_state(state))

    return path


def padded(where: str, steps_alone: bool = False) -> Callable[[Problem], Result]:
    """Return the path that feeds a batch of unequal rows with padding, of any content.

    Args:
        where: "left", "right" or "holes" (one before every token).
        steps_alone: one call per step, of which some rows or all are padding.
    """

    def path(problem: Problem) -> Result:
        longest = max(problem.lengths)
        width = 2 * longest + 1 if where == "holes" else longest + 1
        keep = torch.zeros(len(problem.rows), width, dtype=torch.bool)
        rows = []
        for i, row in enumerate(problem.rows):
            at = torch.arange(len(row))
            at = {"left": at + width - len(row), "right": at, "holes": 2 * at + 1}[where]
            keep[i, at] = True
            steps = problem.subject.padding(width, row)
            rows.append(steps.index_copy(0, at, row))
        state = problem.state()
        size = 1 if steps_alone else width
        y = torch.cat(
            [
                problem.call(x, state=state, attention_mask=mask.long())
                for x, mask in zip(
                    torch.stack(rows).split(size, 1), keep.split(size, 1), strict=True
                )
            ],
            dim=1,
        )
        return Result([y[i, keep[i]] for i in range(len(rows))], read_state(state))

    return path


def numbered(cut: int, groups: tuple[int, ...]) -> Callable[[Problem], Result]:
    """Return the path that feeds rows behind each other by ``seq_idx`` alone, cut in two.

    The state of the first row of a group enters, that of the last one leaves.

    Args:
        cut: tokens of the first call; it lies within a sequence, which the second call continues.
        groups: rows of the problem per row of the batch; all equally long.
    """

    def path(problem: Problem) -> Result:
        firsts = torch.tensor([0, *groups[:-1]]).cumsum(0)
        state, x, ids = problem.state().gather(firsts), [], []
        for first, count in zip(firsts.tolist(), groups, strict=True):
            rows = problem.rows[first : first + count]
            x.append(torch.cat(rows))
            ids.append(torch.cat([torch.full((len(r),), 5 * i) for i, r in enumerate(rows)]))
        x, ids = torch.stack(x), torch.stack(ids)
        y = [
            problem.call(x[:, part], state=state, seq_idx=ids[:, part])
            for part in (slice(cut), slice(cut, None))
        ]
        outputs = torch.cat(y, 1).flatten(0, 1).split(problem.lengths)
        return Result(list(outputs), read_state(state))

    return path


def alone_in_groups(groups: tuple[int, ...]) -> Callable[[Problem], Result]:
    """Return the judge of ``numbered``: rows alone, all but the first of a group from nothing."""

    def judge(problem: Problem) -> Result:
        state, outputs, states, i = problem.state(), [], [], 0
        for count in groups:
            for number in range(count):
                fresh = problem.module.allocate_state(1)
                own = fresh if number else state.gather([i])
                outputs.append(problem.call(problem.rows[i][None], state=own)[0])
                i += 1
            states += read_state(own)
        return Result(outputs, states)

    return judge
