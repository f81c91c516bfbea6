"""Calls of upstream's functions: the part of tests.golden_cases about operators and ssm.compat."""

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
class CompatGolden:
    """A call that upstream's function and ours of the same interface take in the same words.

    Args:
        function: `<file>.<name>` of upstream's reference; on a GPU the function that ``ours`` is
            named after runs in its place.
        ours: `<module>.<name>` in ssm.compat.
        name: of the file.
        shapes: argument -> shape; the values are random.
        flags: the other arguments; cu_seqlens becomes an int32 tensor.
    """

    function: str
    ours: str
    name: str
    shapes: dict
    flags: dict = field(default_factory=dict)

    def __str__(self) -> str:
        return f"compat/{self.ours.split('.')[1]}-{self.name}"


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

_INNER = {
    "xz": (2, 12, 9),
    "conv1d_weight": (6, 1, 4),
    "conv1d_bias": (6,),
    "x_proj_weight": (10, 6),
    "delta_proj_weight": (6, 2),
    "out_proj_weight": (5, 6),
    "out_proj_bias": (5,),
    "A": (6, 4),
    "D": (6,),
    "delta_bias": (6,),
}
_SPLIT = {"A": (3,), "dt_bias": (3,), "outproj_weight": (7, 15), "outproj_bias": (7,)}
_BRANCHES = {
    "x": (3, 4, 11),
    "x1": (3, 4, 11),
    "residual": (3, 4, 11),
    **dict.fromkeys(("weight", "bias", "weight1", "bias1"), (11,)),
}
# A norm of x alone would hardly depend on rowscale: its gradient would be rounding.
_SCALED = {
    "x": (3, 4, 11),
    "rowscale": (3, 4),
    "weight": (11,),
    "bias": (11,),
    "residual": (3, 4, 11),
}
_INNER_REF = ("selective_scan_interface.mamba_inner_ref", "mamba_ssm.mamba_inner_fn")
_SPLIT_REF = (
    "ssd_combined.mamba_split_conv1d_scan_ref",
    "mamba_ssm.mamba_split_conv1d_scan_combined",
)
_LAYER_NORM_FN = (_LAYER_NORM, "mamba_ssm.layer_norm_fn")
_RMS_NORM_FN = (_RMS_NORM, "mamba_ssm.rms_norm_fn")

COMPAT = (
    CompatGolden(*_INNER_REF, "projected", _INNER, {"delta_softplus": True}),
    CompatGolden(
        *_INNER_REF,
        "given_bc",
        {**_INNER, "B": (6, 4), "C": (2, 4, 9)},
        {"delta_softplus": True},
    ),
    CompatGolden(
        *_INNER_REF,
        "proj_bias",
        {**_INNER, "B_proj_bias": (4,), "C_proj_bias": (4,)},
        {"delta_softplus": True},
    ),
    CompatGolden(
        *_SPLIT_REF,
        "norm",
        {
            "zxbcdt": (2, 13, 41),
            "conv1d_weight": (23, 4),
            "conv1d_bias": (23,),
            **_SPLIT,
            "D": (3, 5),
            "rmsnorm_weight": (15,),
        },
        {"chunk_size": 4, "norm_before_gate": False},
    ),
    CompatGolden(
        *_SPLIT_REF,
        "groups",
        {
            "zxbcdt": (2, 13, 66),
            "conv1d_weight": (44, 3),
            "conv1d_bias": (44,),
            "A": (2,),
            "dt_bias": (2,),
            "D": (2,),
        },
        {"chunk_size": 8, "headdim": 10, "ngroups": 2, "dt_limit": (0.2, 0.9)},
    ),
    CompatGolden(*_LAYER_NORM_FN, "branches", _BRANCHES, {"prenorm": True, "eps": 1e-4}),
    CompatGolden(*_LAYER_NORM_FN, "rowscale", _SCALED, {"prenorm": True}),
    CompatGolden(*_RMS_NORM_FN, "branches", _BRANCHES, {"prenorm": True}),
    CompatGolden(*_RMS_NORM_FN, "rowscale", _SCALED),
    CompatGolden(
        "causal_conv1d_varlen.causal_conv1d_varlen_states_ref",
        "causal_conv1d.causal_conv1d_varlen_states",
        "ragged",
        {"x": (15, 6)},
        {"cu_seqlens": (0, 1, 8, 10, 15), "state_len": 4},
    ),
)

# Names of ssm.compat whose arguments must be upstream's, in its order -> upstream's file.
SIGNATURES = {
    "mamba_ssm": {
        "MHA": "mha",
        "Block": "block",
        "GatedMLP": "mlp",
        "InferenceParams": "generation",
        "Mamba": "mamba_simple",
        "Mamba2": "mamba2",
        "MambaConfig": "config_mamba",
        "MambaLMHeadModel": "mixer_seq_simple",
        "RMSNorm": "layer_norm",
        "layer_norm_fn": "layer_norm",
        "rms_norm_fn": "layer_norm",
        "layernorm_fn": "layernorm_gated",
        "rmsnorm_fn": "layernorm_gated",
        "mamba_chunk_scan_combined": "ssd_combined",
        "mamba_split_conv1d_scan_combined": "ssd_combined",
        "mamba_inner_fn": "selective_scan_interface",
        "selective_scan_fn": "selective_scan_interface",
        "selective_state_update": "selective_state_update",
    },
    "causal_conv1d": {
        "causal_conv1d_fn": "causal_conv1d_interface",
        "causal_conv1d_update": "causal_conv1d_interface",
        "causal_conv1d_varlen_states": "causal_conv1d_varlen",
    },
}


def arguments(golden: OperatorGolden, seed: int) -> dict:
    """Return the arguments of an operator's call by our names, as arrays and flags.

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


def compat_arguments(golden: CompatGolden, seed: int) -> dict:
    """Return the arguments of a call of the shared interface, as arrays and flags.

    Args:
        golden: an entry of COMPAT.
        seed: of the random numbers.

    Returns:
        Name -> array or flag. A is negative, as it is wherever upstream calls these functions.
        Numbers are small, so that no step size is beyond 20, where torch's softplus gives up the
        last digits.
    """
    rng = np.random.default_rng(seed)
    found = {name: 0.5 * rng.standard_normal(shape) for name, shape in golden.shapes.items()}
    if "A" in found:
        found["A"] = -np.exp(found["A"])
    flags = dict(golden.flags)
    if "cu_seqlens" in flags:
        flags["cu_seqlens"] = np.array(flags["cu_seqlens"], np.int32)
    return found | flags
