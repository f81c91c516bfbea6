"""What upstream's goldens hold: one table for the tool that writes them and the tests that read.

``OPERATORS``, ``MODULES`` and ``MODELS`` list calls of state-spaces/mamba and of causal-conv1d. The
tool tools/refresh_goldens.py runs each of them in upstream's own code; the tests run ours. The
``repr`` of an entry is in the manifest, so that goldens of another table are found out.
"""

from dataclasses import dataclass, field

import numpy as np

from tests.cases import (
    ConvCase,
    ConvStepCase,
    GatedNormCase,
    NormCase,
    ScanCase,
    SsdCase,
    StageCase,
    StepCase,
    make,
)


@dataclass(frozen=True)
class OperatorGolden:
    """A call of an upstream function that one operator of ours must reproduce.

    Args:
        function: `<file>.<name>` of upstream's reference; on a GPU its kernel runs in its place.
        op: our operator.
        case: sizes of the call.
        flags: arguments beyond those that the case makes, by our names.
        cuda: whether upstream's kernel takes the call; its reference takes all of them.
    """

    function: str
    op: str
    case: object
    flags: dict = field(default_factory=dict)
    cuda: bool = True

    def __str__(self) -> str:
        return f"ops/{self.op}/{self.function.split('.')[1]}-{self.case}"


@dataclass(frozen=True)
class ModuleGolden:
    """A module of upstream: whole passes with gradients, and the same tokens from a state.

    Args:
        name: of the file.
        kind: upstream's class; Block is a block of a language model around one of the others.
        config: its arguments; for Block those of a MambaConfig.
        batch: rows.
        seqlen: tokens in a row.
        prompt: tokens that a pass with a state reads at once; those behind it are read one by one.
            0 leaves the state out.
    """

    name: str
    kind: str
    config: dict
    batch: int = 2
    seqlen: int = 11
    prompt: int = 0

    def __str__(self) -> str:
        return f"modules/{self.name}"


@dataclass(frozen=True)
class ModelGolden:
    """A language model: logits with gradients, and greedy tokens behind a prompt.

    Args:
        name: of the file.
        config: of a MambaConfig.
        stepwise: decode from a state; else by a pass over the whole text for every token.
        batch: prompts.
        prompt: tokens in a prompt.
        new_tokens: that are decoded.
    """

    name: str
    config: dict
    stepwise: bool = True
    batch: int = 2
    prompt: int = 5
    new_tokens: int = 12

    def __str__(self) -> str:
        return f"models/{self.name}"


_SCAN = "selective_scan_interface.selective_scan_ref"
_UPDATE = "selective_state_update.selective_state_update_ref"
_COMBINED = "ssd_combined.ssd_chunk_scan_combined_ref"
_SSD_SCAN = "ssd_combined.ssd_selective_scan"
_MINIMAL = "ssd_minimal.ssd_minimal_discrete"
_CONV = "causal_conv1d_interface.causal_conv1d_ref"
_CONV_UPDATE = "causal_conv1d_interface.causal_conv1d_update_ref"
_LAYER_NORM = "layer_norm.layer_norm_ref"
_RMS_NORM = "layer_norm.rms_norm_ref"
_GATED = "layernorm_gated.rms_norm_ref"
_ALL = "D z dt_bias"


def _scan(*args, given=_ALL, **kwargs) -> OperatorGolden:
    return OperatorGolden(_SCAN, "selective_scan", ScanCase(*args, given=given, **kwargs))


def _update(*args, cuda=True, **kwargs) -> OperatorGolden:
    return OperatorGolden(_UPDATE, "selective_state_step", StepCase(*args, **kwargs), cuda=cuda)


def _ssd(function, *args, given=_ALL, flags=None, **kwargs) -> OperatorGolden:
    case = SsdCase(*args, given=given, **kwargs)
    return OperatorGolden(function, "ssd_chunk_scan", case, flags or {})


def _stage(function, *args, **kwargs) -> OperatorGolden:
    case = StageCase(*args, **kwargs)
    return OperatorGolden(function, case.stage, case)


def _conv(*args, **kwargs) -> OperatorGolden:
    return OperatorGolden(_CONV, "dw_causal_conv", ConvCase(*args, **kwargs))


def _conv_update(*args, **kwargs) -> OperatorGolden:
    return OperatorGolden(_CONV_UPDATE, "dw_causal_conv_step", ConvStepCase(*args, **kwargs))


def _norm(function, *args, **kwargs) -> OperatorGolden:
    return OperatorGolden(function, "fused_layer_norm", NormCase(*args, **kwargs))


def _gated(*args, **kwargs) -> OperatorGolden:
    return OperatorGolden(_GATED, "gated_norm", GatedNormCase(*args, **kwargs))


OPERATORS = (
    _scan("tiny", 1, 2, 3, 2),
    _scan("bare", 2, 3, 7, 4, given="", softplus=False),
    _scan("odd", 3, 13, 19, 5),
    _scan("no_gate", 2, 6, 17, 16, given="D dt_bias"),
    _scan("groups", 2, 12, 18, 8, "grouped", "grouped", 3),
    _scan("constant_bc", 2, 9, 15, 16, "constant", "constant"),
    _scan("mixed_bc", 2, 8, 13, 16, "grouped", "constant", 2),
    _scan("one_step", 3, 17, 1, 16),
    _scan("long", 1, 3, 200, 16),
    _update("tiny", 1, 2, 0, 2),
    _update("odd", 3, 13, 0, 5),
    # The launch of upstream's kernel unpacks the strides of D and dt_bias, given or not.
    _update("bare", 2, 5, 0, 4, given="", softplus=False, cuda=False),
    _update("no_gate", 2, 5, 0, 4, given="D dt_bias"),
    _update("heads", 2, 6, 5, 7, ngroups=2),
    _update("heads_untied", 2, 4, 8, 16, ngroups=1, tied=False),
    _ssd(_COMBINED, "tiny", 1, 16, 2, 2, 2, 16),
    _ssd(_COMBINED, "bare", 2, 32, 2, 3, 4, 16, given="", softplus=False),
    _ssd(_COMBINED, "odd", 2, 48, 3, 5, 7, 16),
    _ssd(_COMBINED, "groups", 2, 32, 6, 4, 5, 16, 3, 3, skip="channel"),
    _ssd(_COMBINED, "no_gate", 1, 64, 2, 8, 8, 32, given="D dt_bias"),
    _ssd(_SSD_SCAN, "ragged", 2, 37, 3, 5, 7, 8),
    _ssd(_SSD_SCAN, "groups", 2, 21, 6, 4, 5, 8, 2, 2, skip="channel"),
    _ssd(_SSD_SCAN, "dt_limit", 2, 29, 4, 3, 4, 8, flags={"dt_limit": (0.1, 0.6)}),
    _ssd(_SSD_SCAN, "long", 1, 200, 2, 4, 8, 64),
    _ssd(_MINIMAL, "states", 2, 32, 3, 5, 7, 8, given="initial_states", softplus=False),
    _ssd(_MINIMAL, "groups", 1, 24, 6, 4, 5, 8, 3, 2, given="initial_states", softplus=False),
    _stage("ssd_chunk_state.chunk_state_ref", "ssd_chunk_state", "odd", 2, 29, 3, 5, 7, 16),
    _stage("ssd_chunk_state.chunk_state_ref", "ssd_chunk_state", "groups", 1, 32, 6, 4, 5, 16, 3),
    _stage("ssd_state_passing.state_passing_ref", "ssd_state_passing", "odd", 2, 61, 3, 5, 7, 16),
    _stage("ssd_chunk_scan.chunk_scan_ref", "ssd_chunk_output", "odd", 2, 48, 3, 5, 7, 16),
    _stage(
        "ssd_chunk_scan.chunk_scan_ref", "ssd_chunk_output", "groups",
        1, 32, 6, 4, 5, 16, 3, 3, skip="channel",
    ),
    _conv("tiny", 1, 8, 3),
    _conv("bare", 2, 8, 9, activation=None, given=""),
    _conv("odd", 3, 13, 19, 3, given="bias"),
    _conv("states", 2, 16, 12),
    _conv("width_2", 2, 8, 10, 2, None),
    _conv("shorter_than_width", 2, 8, 2),
    _conv_update("tiny", 1, 2, 3),
    _conv_update("odd", 3, 13, 5, 3),
    _conv_update("bare", 2, 5, 4, activation=None, given=""),
    _conv_update("tokens", 2, 7, 6, ntokens=3),
    _conv_update("circular", 3, 5, 4, circular=True),
    _conv_update("circular_tokens", 3, 5, 6, ntokens=4, circular=True),
    _norm(_LAYER_NORM, "odd", (3, 5, 13), is_rms=False),
    _norm(_LAYER_NORM, "bare", (4, 17), is_rms=False, given=""),
    _norm(_RMS_NORM, "odd", (3, 5, 13)),
    _norm(_RMS_NORM, "no_bias", (2, 7, 24), given="residual"),
    _norm(_RMS_NORM, "bare", (4, 17), given=""),
    _gated("odd", (3, 5, 13)),
    _gated("bare", (4, 17), given=""),
    _gated("gate_first", (4, 21), norm_before_gate=False),
    _gated("groups", (2, 3, 36), group_size=12),
    _gated("groups_gate_first", (5, 34), True, "z", 17, False),
)  # fmt: skip

_MAMBA2 = {"d_model": 16, "d_state": 8, "headdim": 8, "chunk_size": 4}
_LAYER2 = {"layer": "Mamba2", "d_state": 8, "headdim": 8, "chunk_size": 8}
_ATTENTION = {"num_heads": 4, "num_heads_kv": 2, "head_dim": 6, "causal": True}
_BLOCK = {"d_model": 16, "n_layer": 2, "vocab_size": 24, "attn_layer_idx": [0]}

# States of attention are compared behind the prompt alone: without flash-attn upstream masks a
# single query as if it stood at position 0. With d_conv they are not compared at all: upstream
# keeps outputs of the convolution where its inputs are needed.
MODULES = (
    ModuleGolden("mamba", "Mamba", {"d_model": 12, "d_state": 8}, prompt=6),
    ModuleGolden(
        "mamba_options",
        "Mamba",
        {
            "d_model": 8,
            "d_state": 5,
            "d_conv": 3,
            "expand": 3,
            "dt_rank": 2,
            "bias": True,
            "conv_bias": False,
        },
        batch=3,
        prompt=1,
    ),
    ModuleGolden("mamba2", "Mamba2", _MAMBA2, prompt=6),
    ModuleGolden("mamba2_groups", "Mamba2", {**_MAMBA2, "ngroups": 2, "bias": True}, prompt=2),
    ModuleGolden(
        "mamba2_mlp", "Mamba2", {**_MAMBA2, "d_ssm": 16, "norm_before_gate": True}, prompt=7
    ),
    ModuleGolden(
        "mamba2_no_norm", "Mamba2", {**_MAMBA2, "rmsnorm": False, "conv_bias": False}, prompt=6
    ),
    # Upstream's step knows neither.
    ModuleGolden(
        "mamba2_channels", "Mamba2", {**_MAMBA2, "D_has_hdim": True, "dt_limit": (0.02, 0.09)}
    ),
    ModuleGolden("mha", "MHA", {"embed_dim": 16, **_ATTENTION}, prompt=11),
    ModuleGolden(
        "mha_conv_mlp", "MHA", {"embed_dim": 8, **_ATTENTION, "d_conv": 4, "mlp_dim": 100}
    ),
    ModuleGolden(
        "mha_not_causal",
        "MHA",
        {"embed_dim": 16, "num_heads": 2, "softmax_scale": 0.3, "qkv_proj_bias": False},
    ),
    ModuleGolden(
        "block_attention_mlp", "Block", {**_BLOCK, "attn_cfg": _ATTENTION, "d_intermediate": 100}
    ),
    ModuleGolden(
        "block_mamba2",
        "Block",
        {
            **_BLOCK,
            "attn_layer_idx": [],
            "ssm_cfg": _LAYER2,
            "rms_norm": False,
            "fused_add_norm": False,
            "residual_in_fp32": False,
        },
    ),
    ModuleGolden(
        "block_mamba",
        "Block",
        {**_BLOCK, "attn_layer_idx": [], "ssm_cfg": {"d_state": 4}, "fused_add_norm": False},
    ),
)

MODELS = (
    ModelGolden(
        "mamba",
        {
            "d_model": 16,
            "n_layer": 2,
            "vocab_size": 29,
            "ssm_cfg": {"d_state": 6},
            "tie_embeddings": False,
        },
    ),
    ModelGolden(
        "mamba2",
        {
            "d_model": 16,
            "n_layer": 2,
            "vocab_size": 32,
            "rms_norm": False,
            "tie_embeddings": False,
            "ssm_cfg": _LAYER2,
        },
    ),
    ModelGolden(
        "hybrid",
        {
            "d_model": 16,
            "n_layer": 2,
            "vocab_size": 31,
            "d_intermediate": 40,
            "attn_layer_idx": [1],
            "attn_cfg": {**_ATTENTION, "d_conv": 4},
            "residual_in_fp32": False,
            "ssm_cfg": {**_LAYER2, "ngroups": 2},
        },
        stepwise=False,
    ),
)

ALL = (*OPERATORS, *MODULES, *MODELS)


def arguments(golden: OperatorGolden, seed: int) -> dict:
    """Return the arguments of a call by our names, as arrays and flags.

    Args:
        golden: an entry of OPERATORS.
        seed: of the random numbers.

    Returns:
        Name -> array, flag or None. chunk_scan_ref takes B where our stage takes the product CB.
    """
    found = {**make(golden.case, seed), **golden.flags}
    if golden.function == "ssd_chunk_scan.chunk_scan_ref":
        rng = np.random.default_rng(seed + 1)
        found = {"B": rng.standard_normal(found["C"].shape), **found}
        del found["CB"]
    return {n: a for n, a in found.items() if n not in ("seq_meta", "seq_idx", "state_indices")}
