"""Compiled selective state space kernels on arrays of any framework with DLPack.

Two faces. The kernels ``<op>_fwd`` and ``<op>_bwd`` write into arrays that the caller made: every
output is an argument. The functions ``<op>`` make the outputs, in the framework of their main
input (NumPy, PyTorch, JAX, or any with an array API namespace). No array library is needed to
import this package, and none is imported by it.

Two environment variables are read: SSM_ISA (auto, baseline, avx2, avx512), once, at the first call;
and OpenMP's own for the number of threads. A forked child may not use OpenMP after its parent has:
start processes with the ``spawn`` or ``forkserver`` method.
"""

from __future__ import annotations

import os

from ._cpu import (
    active_isa,
    available_isas,
    dw_causal_conv_bwd,
    dw_causal_conv_bwd_workspace,
    dw_causal_conv_fwd,
    dw_causal_conv_step_fwd,
    fused_layer_norm_bwd,
    fused_layer_norm_bwd_workspace,
    fused_layer_norm_fwd,
    gated_norm_bwd,
    gated_norm_bwd_workspace,
    gated_norm_fwd,
    get_num_threads,
    selective_scan_bwd,
    selective_scan_bwd_workspace,
    selective_scan_fwd,
    selective_scan_fwd_workspace,
    selective_state_step_fwd,
    set_num_threads,
    ssd_bmm_chunk_bwd,
    ssd_bmm_chunk_fwd,
    ssd_chunk_cumsum_bwd,
    ssd_chunk_cumsum_bwd_workspace,
    ssd_chunk_cumsum_fwd,
    ssd_chunk_output_bwd,
    ssd_chunk_output_bwd_workspace,
    ssd_chunk_output_fwd,
    ssd_chunk_scan_bwd,
    ssd_chunk_scan_bwd_workspace,
    ssd_chunk_scan_fwd,
    ssd_chunk_scan_fwd_workspace,
    ssd_chunk_state_bwd,
    ssd_chunk_state_fwd,
    ssd_state_passing_bwd,
    ssd_state_passing_bwd_workspace,
    ssd_state_passing_fwd,
    swiglu_bwd,
    swiglu_fwd,
    version,
)
from .operators import (
    dw_causal_conv,
    dw_causal_conv_step,
    fused_layer_norm,
    gated_norm,
    selective_scan,
    selective_state_step,
    swiglu,
)
from .ssd_operators import (
    ssd_bmm_chunk,
    ssd_chunk_cumsum,
    ssd_chunk_output,
    ssd_chunk_scan,
    ssd_chunk_state,
    ssd_state_passing,
)

__all__ = [
    "active_isa",
    "available_isas",
    "dw_causal_conv",
    "dw_causal_conv_bwd",
    "dw_causal_conv_bwd_workspace",
    "dw_causal_conv_fwd",
    "dw_causal_conv_step",
    "dw_causal_conv_step_fwd",
    "fused_layer_norm",
    "fused_layer_norm_bwd",
    "fused_layer_norm_bwd_workspace",
    "fused_layer_norm_fwd",
    "gated_norm",
    "gated_norm_bwd",
    "gated_norm_bwd_workspace",
    "gated_norm_fwd",
    "get_include",
    "get_num_threads",
    "info",
    "selective_scan",
    "selective_scan_bwd",
    "selective_scan_bwd_workspace",
    "selective_scan_fwd",
    "selective_scan_fwd_workspace",
    "selective_state_step",
    "selective_state_step_fwd",
    "set_num_threads",
    "ssd_bmm_chunk",
    "ssd_bmm_chunk_bwd",
    "ssd_bmm_chunk_fwd",
    "ssd_chunk_cumsum",
    "ssd_chunk_cumsum_bwd",
    "ssd_chunk_cumsum_bwd_workspace",
    "ssd_chunk_cumsum_fwd",
    "ssd_chunk_output",
    "ssd_chunk_output_bwd",
    "ssd_chunk_output_bwd_workspace",
    "ssd_chunk_output_fwd",
    "ssd_chunk_scan",
    "ssd_chunk_scan_bwd",
    "ssd_chunk_scan_bwd_workspace",
    "ssd_chunk_scan_fwd",
    "ssd_chunk_scan_fwd_workspace",
    "ssd_chunk_state",
    "ssd_chunk_state_bwd",
    "ssd_chunk_state_fwd",
    "ssd_state_passing",
    "ssd_state_passing_bwd",
    "ssd_state_passing_bwd_workspace",
    "ssd_state_passing_fwd",
    "swiglu",
    "swiglu_bwd",
    "swiglu_fwd",
    "version",
]

__version__ = version()


def get_include() -> str:
    """Return the folder of the C++ headers, for `-I`.

    Returns:
        Path of the folder that holds `ssm/`.
    """
    return os.path.join(os.path.dirname(__file__), "include")


def info() -> dict:
    """Collect what a bug report needs.

    Returns:
        Names and values, all of them fit for JSON.

    Raises:
        RuntimeError: SSM_ISA names no instruction set, or one that this processor lacks.
    """
    import importlib.util
    import platform

    from . import _build

    cuda = _build.CUDA
    if cuda.startswith("built") and importlib.util.find_spec(f"{__name__}._cuda") is None:
        # A build tree where only the CPU's part was asked for, as the demo does without a GPU.
        cuda = "not built: `python3 tools/dev.py build` compiles it"
    return {
        "version": __version__,
        "isa": active_isa(),
        "available_isas": list(available_isas()),
        "num_threads": get_num_threads(),
        "operators": _build.OPERATORS,
        "openmp": _build.OPENMP,
        "cuda": cuda,
        "cutlass": _build.CUTLASS,
        "compiler": _build.COMPILER,
        "buildtype": _build.BUILDTYPE,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "location": os.path.dirname(__file__),
    }
