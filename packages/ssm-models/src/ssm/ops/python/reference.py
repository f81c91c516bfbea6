"""The specification: every operator of ``ssm.ops`` in plain PyTorch, differentiable by autograd.

Each function says what *correct* means; the compiled operators are judged by it. It favours the
formula over speed, but it is linear in the sequence length, forward and backward: time axes are
unbound once and outputs stacked once, because autograd of ``x[:, :, t]`` in a loop is quadratic.

Computation is in float64 if the main input is float64, else in float32 ("acc" below). Skipped
steps are selected away before they are used, never multiplied by zero, so that a NaN in padding
reaches neither values nor gradients.
"""

from ssm.ops.python.dw_causal_conv import dw_causal_conv
from ssm.ops.python.dw_causal_conv_step import dw_causal_conv_step
from ssm.ops.python.fused_layer_norm import fused_layer_norm
from ssm.ops.python.gated_norm import gated_norm
from ssm.ops.python.selective_scan import selective_scan
from ssm.ops.python.selective_state_step import selective_state_step
from ssm.ops.python.ssd_chunk_scan import ssd_chunk_scan
from ssm.ops.python.ssd_stages import (
    ssd_bmm_chunk,
    ssd_chunk_cumsum,
    ssd_chunk_output,
    ssd_chunk_state,
    ssd_state_passing,
)
from ssm.ops.python.swiglu import swiglu

__all__ = [
    "dw_causal_conv",
    "dw_causal_conv_step",
    "fused_layer_norm",
    "gated_norm",
    "selective_scan",
    "selective_state_step",
    "ssd_bmm_chunk",
    "ssd_chunk_cumsum",
    "ssd_chunk_output",
    "ssd_chunk_scan",
    "ssd_chunk_state",
    "ssd_state_passing",
    "swiglu",
]
