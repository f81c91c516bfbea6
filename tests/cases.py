"""The shapes: one table per operator, used by kernel tests (NumPy), operator tests and benches.

``CASES[op]`` is a tuple of frozen dataclasses that print as their name, so
``@pytest.mark.parametrize("case", CASES["selective_scan"], ids=str)`` gives readable test ids.
``make(case, seed)`` gives the arguments of the operator by name: float64 arrays, int32 and bool
arrays, flags; what the case leaves out is None. A layout of packed or padded sequences is
``seq_meta``: a dict with some of seq_idx, cu_seqlens and mask, the fields of ``ssm.seq_meta``;
``tests.judge.positions`` makes its canonical form.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class ScanCase:
    """A call of selective_scan. B and C are constant, shared or grouped: (D, N) to (B, G, N, L)."""

    name: str
    batch: int
    dim: int
    seqlen: int
    dstate: int
    b_form: str = "shared"
    c_form: str = "shared"
    ngroups: int = 1
    given: str = "D z dt_bias initial_state"  # the optional tensors
    softplus: bool = True
    layout: str = ""  # the fields of seq_meta

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class StepCase:
    """A call of selective_state_step. headdim 0 is Mamba-1; ntokens 0 is a call without T."""

    name: str
    batch: int
    nheads: int
    headdim: int
    dstate: int
    ntokens: int = 0
    ngroups: int = 0  # 0: B and C have no group axis
    tied: bool = True  # Mamba-2: dt, A, D, dt_bias are per head, not per channel
    given: str = "D z dt_bias"
    softplus: bool = True
    nrows: int = 0  # rows of the state if there are state_indices

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class SsdCase:
    """A call of ssd_chunk_scan. skip is the shape of D: per head or per channel."""

    name: str
    batch: int
    seqlen: int
    nheads: int
    headdim: int
    dstate: int
    chunk_size: int
    b_groups: int = 1
    c_groups: int = 1
    given: str = "D z dt_bias initial_states"
    skip: str = "head"
    softplus: bool = True
    layout: str = ""

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class StageCase:
    """A call of one stage of the state-space dual scan; it looks at what it has use for."""

    stage: str
    name: str
    batch: int
    seqlen: int
    nheads: int
    headdim: int
    dstate: int
    chunk_size: int
    b_groups: int = 1
    c_groups: int = 1
    given: str = "D z dt_bias initial_states"
    skip: str = "head"
    softplus: bool = True
    layout: str = ""  # "seq_idx" or nothing

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class ConvCase:
    """A call of dw_causal_conv."""

    name: str
    batch: int
    dim: int
    seqlen: int
    width: int = 4
    activation: str | None = "silu"
    given: str = "bias initial_state"
    layout: str = ""

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class ConvStepCase:
    """A call of dw_causal_conv_step. memory is K; ntokens 0 is a call without T."""

    name: str
    batch: int
    dim: int
    memory: int
    width: int = 4
    ntokens: int = 0
    activation: str | None = "silu"
    given: str = "bias"
    circular: bool = False
    nrows: int = 0  # rows of the state if there are state_indices

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class NormCase:
    """A call of fused_layer_norm."""

    name: str
    shape: tuple[int, ...]
    is_rms: bool = True
    given: str = "bias residual"

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class GatedNormCase:
    """A call of gated_norm."""

    name: str
    shape: tuple[int, ...]
    is_rms: bool = True
    given: str = "bias z"
    group_size: int | None = None
    norm_before_gate: bool = True

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class SwigluCase:
    """A call of swiglu. shape is that of gate."""

    name: str
    shape: tuple[int, ...]
    given: str = "up"

    def __str__(self) -> str:
        return self.name


_STAGES = {
    "ssd_chunk_cumsum": ("dt", "A", "chunk_size", "dt_bias", "softplus", "seq_idx"),
    "ssd_chunk_state": ("x", "B", "dt", "dA_cumsum", "seq_idx"),
    "ssd_state_passing": ("states", "dA_cumsum", "initial_states", "seq_idx"),
    "ssd_bmm_chunk": ("C", "B", "chunk_size"),
    "ssd_chunk_output": ("CB", "x", "dt", "dA_cumsum", "C", "states_in", "D", "z", "seq_idx"),
}


def _stage_cases(stage: str) -> tuple[StageCase, ...]:
    return (
        StageCase(stage, "tiny", 1, 3, 2, 2, 2, 2),
        StageCase(stage, "bare", 2, 9, 2, 3, 4, 4, given="", softplus=False),
        StageCase(stage, "odd", 2, 29, 3, 5, 7, 8),
        StageCase(stage, "groups", 1, 21, 6, 3, 4, 8, 3, 2, skip="channel"),
        StageCase(stage, "chunk_one", 2, 5, 2, 3, 4, 1),
        StageCase(stage, "chunk_beyond", 2, 11, 2, 3, 4, 64),
        StageCase(stage, "one", 1, 1, 1, 1, 1, 1),
        StageCase(stage, "mamba2_130m", 1, 80, 24, 64, 128, 64),
        StageCase(stage, "seq_idx", 2, 33, 2, 3, 5, 8, layout="seq_idx"),
        StageCase(stage, "empty_batch", 0, 5, 2, 3, 4, 4),
        StageCase(stage, "empty_seq", 2, 0, 2, 3, 4, 4),
        StageCase(stage, "empty_state", 2, 5, 2, 3, 0, 4),
    )


CASES = {
    **{stage: _stage_cases(stage) for stage in _STAGES},
    "selective_scan": (
        ScanCase("tiny", 1, 2, 3, 2),
        ScanCase("bare", 2, 3, 7, 4, given="", softplus=False),
        ScanCase("odd", 3, 13, 37, 5),
        ScanCase("groups", 2, 12, 33, 8, "grouped", "grouped", 3),
        ScanCase("constant_bc", 2, 9, 21, 16, "constant", "constant"),
        ScanCase("mixed_bc", 2, 8, 19, 16, "grouped", "constant", 2),
        ScanCase("one", 1, 1, 1, 1),
        ScanCase("one_step", 3, 17, 1, 16),
        ScanCase("wide_state", 1, 5, 18, 67),
        ScanCase("long", 1, 3, 1031, 16),
        ScanCase("mamba130m", 1, 1536, 96, 16),
        ScanCase("packed", 2, 20, 41, 16, layout="cu_seqlens"),
        ScanCase("packed_bare", 1, 7, 50, 3, given="", layout="cu_seqlens"),
        ScanCase("packed_holes", 2, 6, 40, 5, "grouped", "shared", 2, layout="cu_seqlens mask"),
        ScanCase("seq_idx", 3, 18, 43, 16, layout="seq_idx"),
        ScanCase("seq_idx_holes", 2, 5, 39, 4, "constant", "shared", layout="seq_idx mask"),
        ScanCase("padded", 3, 11, 35, 8, layout="mask"),
        ScanCase("empty_batch", 0, 4, 5, 3),
        ScanCase("empty_seq", 2, 4, 0, 3),
        ScanCase("empty_dim", 2, 0, 5, 3),
        ScanCase("empty_state", 2, 4, 5, 0),
    ),
    "selective_state_step": (
        StepCase("tiny", 1, 2, 0, 2),
        StepCase("bare", 2, 5, 0, 4, given="", softplus=False),
        StepCase("odd", 3, 13, 0, 5),
        StepCase("groups", 2, 12, 0, 8, ngroups=3),
        StepCase("mamba130m", 1, 1536, 0, 16),
        StepCase("one", 1, 1, 0, 1),
        StepCase("tokens", 2, 19, 0, 16, ntokens=4),
        StepCase("tokens_groups", 2, 6, 0, 3, ntokens=3, ngroups=2),
        StepCase("indices", 4, 7, 0, 5, nrows=6),
        StepCase("tokens_indices", 3, 7, 0, 16, ntokens=2, nrows=5),
        StepCase("heads", 2, 6, 5, 7, ngroups=2),
        StepCase("heads_untied", 2, 4, 8, 16, ngroups=1, tied=False),
        StepCase("heads_no_group_axis", 3, 4, 3, 9),
        StepCase("heads_tokens", 2, 4, 6, 8, ntokens=3, ngroups=4),
        StepCase("heads_indices", 4, 4, 6, 8, ngroups=2, nrows=5),
        StepCase("mamba2_130m", 1, 24, 64, 128, ngroups=1),
        StepCase("empty_batch", 0, 3, 0, 4),
        StepCase("empty_batch_indices", 0, 3, 0, 4, nrows=2),
        StepCase("no_tokens", 2, 3, 0, 4, ntokens=-1),
    ),
    "ssd_chunk_scan": (
        SsdCase("tiny", 1, 3, 2, 2, 2, 2),
        SsdCase("bare", 2, 9, 2, 3, 4, 4, given="", softplus=False),
        SsdCase("odd", 3, 37, 3, 5, 7, 8),
        SsdCase("groups", 2, 21, 6, 4, 5, 8, 3, 2, skip="channel"),
        SsdCase("chunk_one", 2, 11, 2, 3, 4, 1),
        SsdCase("chunk_beyond", 2, 11, 2, 3, 4, 64),
        SsdCase("one", 1, 1, 1, 1, 1, 1),
        SsdCase("long", 1, 1031, 2, 4, 8, 64),
        SsdCase("mamba2_130m", 1, 80, 24, 64, 128, 64),
        SsdCase("packed", 2, 41, 4, 3, 5, 8, 2, layout="cu_seqlens"),
        SsdCase("packed_holes", 2, 40, 2, 3, 5, 16, layout="cu_seqlens mask"),
        SsdCase("seq_idx", 3, 43, 2, 3, 5, 8, layout="seq_idx"),
        SsdCase("seq_idx_holes", 2, 39, 2, 3, 5, 7, layout="seq_idx mask"),
        SsdCase("padded", 3, 35, 2, 3, 5, 8, layout="mask"),
        SsdCase("empty_batch", 0, 5, 2, 3, 4, 4),
        SsdCase("empty_seq", 2, 0, 2, 3, 4, 4),
    ),
    "dw_causal_conv": (
        ConvCase("tiny", 1, 2, 3),
        ConvCase("bare", 2, 3, 9, activation=None, given=""),
        ConvCase("odd", 3, 13, 37, 3, "swish"),
        ConvCase("width_1", 2, 5, 6, 1),
        ConvCase("width_2", 2, 17, 20, 2, "identity"),
        ConvCase("width_5", 2, 9, 21, 5),
        ConvCase("width_8", 1, 6, 19, 8),
        ConvCase("width_11", 2, 3, 40, 11),
        ConvCase("shorter_than_width", 2, 4, 2, 6),
        ConvCase("one", 1, 1, 1),
        ConvCase("one_step", 3, 18, 1),
        ConvCase("long", 1, 2, 1031),
        ConvCase("mamba130m", 1, 1536, 96),
        ConvCase("packed", 2, 20, 41, layout="cu_seqlens"),
        ConvCase("packed_bare", 1, 7, 50, 3, None, given="", layout="cu_seqlens"),
        ConvCase("packed_holes", 2, 6, 40, layout="cu_seqlens mask"),
        ConvCase("seq_idx", 3, 18, 43, layout="seq_idx"),
        ConvCase("seq_idx_holes", 2, 5, 39, 5, layout="seq_idx mask"),
        ConvCase("padded", 3, 11, 35, layout="mask"),
        ConvCase("padded_width_1", 2, 3, 9, 1, layout="mask"),
        ConvCase("empty_batch", 0, 4, 5),
        ConvCase("empty_seq", 2, 4, 0),
        ConvCase("empty_dim", 2, 0, 5),
    ),
    "dw_causal_conv_step": (
        ConvStepCase("tiny", 1, 2, 3),
        ConvStepCase("bare", 2, 5, 4, activation=None, given=""),
        ConvStepCase("odd", 3, 13, 5, 3, activation="swish"),
        ConvStepCase("width_1_no_memory", 2, 5, 0, 1),
        ConvStepCase("width_8", 2, 6, 9, 8),
        ConvStepCase("mamba130m", 1, 1536, 4),
        ConvStepCase("one", 1, 1, 1, 2),
        ConvStepCase("tokens", 2, 7, 3, ntokens=3),
        ConvStepCase("tokens_beyond_memory", 2, 7, 4, ntokens=9),
        ConvStepCase("indices", 4, 5, 4, nrows=6),
        ConvStepCase("circular", 3, 5, 4, circular=True),
        ConvStepCase("circular_short", 3, 5, 3, circular=True),
        ConvStepCase("circular_tokens", 3, 5, 6, ntokens=4, circular=True),
        ConvStepCase("circular_tokens_beyond", 2, 5, 3, ntokens=7, circular=True),
        ConvStepCase("circular_indices", 4, 5, 5, ntokens=2, circular=True, nrows=5),
        ConvStepCase("empty_batch", 0, 3, 4),
        ConvStepCase("no_tokens", 2, 3, 4, ntokens=-1),
    ),
    "fused_layer_norm": (
        NormCase("tiny", (2, 3)),
        NormCase("bare", (2, 5), given=""),
        NormCase("odd", (3, 5, 13), is_rms=False),
        NormCase("layer_norm_bare", (4, 17), is_rms=False, given=""),
        NormCase("no_batch", (33,), is_rms=False),
        NormCase("one", (1, 1)),
        NormCase("mamba130m", (1, 16, 768), given="residual"),
        NormCase("wide", (3, 5001), is_rms=False, given="residual"),
        NormCase("empty_batch", (0, 7), is_rms=False),
        NormCase("empty_dim", (3, 0)),
    ),
    "gated_norm": (
        GatedNormCase("tiny", (2, 3)),
        GatedNormCase("bare", (2, 5), given=""),
        GatedNormCase("odd", (3, 5, 13), is_rms=False),
        GatedNormCase("gate_first", (4, 21), norm_before_gate=False),
        GatedNormCase("gate_first_layer_norm", (2, 3, 19), False, norm_before_gate=False),
        GatedNormCase("layer_norm_bare", (4, 17), is_rms=False, given=""),
        GatedNormCase("groups", (2, 3, 36), group_size=12),
        GatedNormCase("groups_gate_first", (5, 34), False, "bias z", 17, False),
        GatedNormCase("groups_bare", (3, 10), given="", group_size=5),
        GatedNormCase("group_one", (3, 5), group_size=1),
        GatedNormCase("no_batch", (33,), is_rms=False),
        GatedNormCase("one", (1, 1)),
        GatedNormCase("mamba2_130m", (1, 16, 1536), given="z", norm_before_gate=False),
        GatedNormCase("wide", (3, 5001), is_rms=False, given="z"),
        GatedNormCase("empty_batch", (0, 7), is_rms=False),
        GatedNormCase("empty_dim", (3, 0)),
    ),
    "swiglu": (
        SwigluCase("tiny", (2, 3)),
        SwigluCase("packed", (2, 10), given=""),
        SwigluCase("odd", (3, 5, 13)),
        SwigluCase("packed_odd", (3, 5, 38), given=""),
        SwigluCase("no_batch", (33,)),
        SwigluCase("one", (1, 1)),
        SwigluCase("mamba2_130m", (1, 16, 1536)),
        SwigluCase("empty_batch", (0, 7)),
        SwigluCase("empty_dim", (3, 0), given=""),
    ),
}


def make(case, seed: int = 0) -> dict:
    """Return the arguments of a case's operator by name; the same seed gives the same values."""
    return _MAKERS[type(case)](case, np.random.default_rng(seed))


def _given(case, rng, **shapes) -> dict:
    """Draw the optional tensors that a case gives; the others are None."""
    names = case.given.split()
    return {n: rng.standard_normal(s) if n in names else None for n, s in shapes.items()}


def _seq_meta(case, rng) -> tuple[dict | None, int]:
    """Draw a layout; also return S, the number of states."""
    if not case.layout:
        return None, case.batch
    meta, batch, seqlen = {}, case.batch, case.seqlen
    kept = np.ones((batch, seqlen), bool)
    if "cu_seqlens" in case.layout:
        # An empty first sequence, cuts anywhere, one sequence of length 1, padding at the end.
        ends = [0, 0]
        for row in range(batch):
            last = row == batch - 1
            stop = seqlen - seqlen // 8 if last else seqlen
            cuts = {1, stop, *rng.integers(1, stop, 3).tolist()}
            ends += [row * seqlen + cut for cut in sorted(cuts)]
        meta["cu_seqlens"] = np.array([*ends, ends[-1]], np.int32)
        kept.reshape(-1)[ends[-1] :] = False
    if "seq_idx" in case.layout:
        # Ids that come back, a row that starts with padding, padding between sequences.
        ids = rng.integers(0, 3, (batch, seqlen // 5 + 1)).repeat(5, 1)[:, :seqlen]
        ids[-1, : seqlen // 4] = -1
        ids[0, seqlen // 2 : seqlen // 2 + 3] = -1
        meta["seq_idx"] = ids.astype(np.int32)
        kept &= ids >= 0
    if "mask" in case.layout:
        # Padding on the left, holes anywhere, and a row that is skipped as a whole.
        mask = rng.random((batch, seqlen)) < 0.7
        mask[0, : seqlen // 5] = False
        mask[1 % batch] &= batch < 3
        meta["mask"] = mask & kept
    return meta, len(meta["cu_seqlens"]) - 1 if "cu_seqlens" in meta else batch


def _step_size(rng, shape, softplus: bool) -> np.ndarray:
    """Draw step sizes: of either sign before softplus, else positive and small."""
    return rng.normal(-1.0, 1.5, shape) if softplus else rng.uniform(0.01, 0.5, shape)


def _make_scan(case: ScanCase, rng) -> dict:
    batch, dim, seqlen, dstate = case.batch, case.dim, case.seqlen, case.dstate
    forms = {
        "constant": (dim, dstate),
        "shared": (batch, dstate, seqlen),
        "grouped": (batch, case.ngroups, dstate, seqlen),
    }
    seq_meta, nstates = _seq_meta(case, rng)
    arguments = {
        "u": rng.standard_normal((batch, dim, seqlen)),
        "delta": _step_size(rng, (batch, dim, seqlen), case.softplus),
        "A": -np.exp(rng.uniform(-1.0, 2.0, (dim, dstate))),
        "B": rng.standard_normal(forms[case.b_form]),
        "C": rng.standard_normal(forms[case.c_form]),
        **_given(
            case,
            rng,
            D=(dim,),
            z=(batch, dim, seqlen),
            dt_bias=(dim,),
            initial_state=(nstates, dim, dstate),
        ),
        "softplus": case.softplus,
        "seq_meta": seq_meta,
    }
    if not case.softplus and arguments["dt_bias"] is not None:
        arguments["dt_bias"] = abs(arguments["dt_bias"])  # under negative steps states would grow
    return arguments


def _indices(case, rng) -> np.ndarray | None:
    """Draw distinct rows of the state, the second one skipped."""
    if not case.nrows:
        return None
    indices = rng.permutation(case.nrows)[: case.batch].astype(np.int32)
    indices[1:2] = -1
    return indices


def _make_step(case: StepCase, rng) -> dict:
    tokens = (max(case.ntokens, 0),) if case.ntokens else ()
    lead, heads = (case.batch, *tokens), case.nheads
    channels = (heads, case.headdim) if case.headdim else (heads,)
    per_head = (heads,) if case.headdim and case.tied else channels
    rate = (heads,) if case.headdim and case.tied else (*channels, case.dstate)
    groups = (case.ngroups,) if case.ngroups else ()
    return {
        "state": rng.standard_normal((case.nrows or case.batch, *channels, case.dstate)),
        "x": rng.standard_normal((*lead, *channels)),
        "dt": _step_size(rng, (*lead, *per_head), case.softplus),
        "A": -np.exp(rng.uniform(-1.0, 2.0, rate)),
        "B": rng.standard_normal((*lead, *groups, case.dstate)),
        "C": rng.standard_normal((*lead, *groups, case.dstate)),
        **_given(case, rng, D=per_head, z=(*lead, *channels), dt_bias=per_head),
        "softplus": case.softplus,
        "state_indices": _indices(case, rng),
    }


def _make_ssd(case: SsdCase, rng) -> dict:
    batch, seqlen, heads, dstate = case.batch, case.seqlen, case.nheads, case.dstate
    seq_meta, nstates = _seq_meta(case, rng)
    return {
        "X": rng.standard_normal((batch, seqlen, heads, case.headdim)),
        "dt": _step_size(rng, (batch, seqlen, heads), case.softplus),
        "A": -np.exp(rng.uniform(-1.0, 2.0, heads)),
        "B": rng.standard_normal((batch, seqlen, case.b_groups, dstate)),
        "C": rng.standard_normal((batch, seqlen, case.c_groups, dstate)),
        "chunk_size": case.chunk_size,
        **_given(
            case,
            rng,
            D=(heads,) if case.skip == "head" else (heads, case.headdim),
            z=(batch, seqlen, heads, case.headdim),
            dt_bias=(heads,),
            initial_states=(nstates, heads, case.headdim, dstate),
        ),
        "softplus": case.softplus,
        "seq_meta": seq_meta,
    }


def _make_stage(case: StageCase, rng) -> dict:
    batch, seqlen, heads, chunk = case.batch, case.seqlen, case.nheads, case.chunk_size
    nchunks = -(-seqlen // chunk)
    state = (heads, case.headdim, case.dstate)
    seq_meta, _ = _seq_meta(case, rng)
    seq_idx = None if seq_meta is None else seq_meta["seq_idx"]
    rate = -np.exp(rng.uniform(-1.0, 2.0, heads))
    found = {"A": rate, "chunk_size": chunk, "softplus": case.softplus, "seq_idx": seq_idx}
    if case.stage == "ssd_chunk_cumsum":
        found["dt"] = _step_size(rng, (batch, seqlen, heads), case.softplus)
    else:
        step = rng.uniform(0.01, 0.5, (batch, heads, nchunks * chunk))
        step[..., seqlen:] = 0.0
        if seq_idx is not None:
            step[..., :seqlen] *= seq_idx[:, None] >= 0
        found["dt"] = step.reshape(batch, heads, nchunks, chunk)
        found["dA_cumsum"] = (found["dt"] * rate[:, None, None]).cumsum(3)
    found |= {
        "x": rng.standard_normal((batch, seqlen, heads, case.headdim)),
        "B": rng.standard_normal((batch, seqlen, case.b_groups, case.dstate)),
        "C": rng.standard_normal((batch, seqlen, case.c_groups, case.dstate)),
        "CB": rng.standard_normal((batch, nchunks, case.b_groups, chunk, chunk)),
        "states": rng.standard_normal((batch, nchunks, *state)),
        "states_in": rng.standard_normal((batch, nchunks, *state)),
        **_given(
            case,
            rng,
            D=(heads,) if case.skip == "head" else (heads, case.headdim),
            z=(batch, seqlen, heads, case.headdim),
            dt_bias=(heads,),
            initial_states=(batch, *state),
        ),
    }
    return {name: found[name] for name in _STAGES[case.stage]}


def _make_conv(case: ConvCase, rng) -> dict:
    seq_meta, nstates = _seq_meta(case, rng)
    return {
        "x": rng.standard_normal((case.batch, case.dim, case.seqlen)),
        "weight": rng.standard_normal((case.dim, case.width)),
        **_given(case, rng, bias=(case.dim,), initial_state=(nstates, case.dim, case.width - 1)),
        "activation": case.activation,
        "seq_meta": seq_meta,
    }


def _make_conv_step(case: ConvStepCase, rng) -> dict:
    tokens = (max(case.ntokens, 0),) if case.ntokens else ()
    rows = case.nrows or case.batch
    return {
        "x": rng.standard_normal((case.batch, case.dim, *tokens)),
        "conv_state": rng.standard_normal((rows, case.dim, case.memory)),
        "weight": rng.standard_normal((case.dim, case.width)),
        **_given(case, rng, bias=(case.dim,)),
        "activation": case.activation,
        "cache_seqlens": rng.integers(0, 20, case.batch).astype(np.int32)
        if case.circular
        else None,
        "state_indices": _indices(case, rng),
    }


def _make_norm(case: NormCase, rng) -> dict:
    dim = case.shape[-1]
    return {
        "x": rng.standard_normal(case.shape),
        "weight": rng.standard_normal(dim),
        **_given(case, rng, bias=(dim,), residual=case.shape),
        "is_rms": case.is_rms,
    }


def _make_gated_norm(case: GatedNormCase, rng) -> dict:
    dim = case.shape[-1]
    return {
        "x": rng.standard_normal(case.shape),
        "weight": rng.standard_normal(dim),
        **_given(case, rng, bias=(dim,), z=case.shape),
        "is_rms": case.is_rms,
        "group_size": case.group_size,
        "norm_before_gate": case.norm_before_gate,
    }


def _make_swiglu(case: SwigluCase, rng) -> dict:
    return {"gate": rng.standard_normal(case.shape), **_given(case, rng, up=case.shape)}


_MAKERS = {
    ScanCase: _make_scan,
    StepCase: _make_step,
    SsdCase: _make_ssd,
    StageCase: _make_stage,
    ConvCase: _make_conv,
    ConvStepCase: _make_conv_step,
    NormCase: _make_norm,
    GatedNormCase: _make_gated_norm,
    SwigluCase: _make_swiglu,
}
