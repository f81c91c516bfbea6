"""What tools/gpu_check.py compares with: other packages on the same tensors, where installed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from tools.workload import Case, Draw

# A peer further away than this, in the root mean square, computes something else.
SAME = 0.05
CHUNK = 256  # what mamba_ssm's own layers ask for
# What lies behind the in_proj of a Mamba-2 block, as one function of mamba_ssm.
BLOCK = "mamba2_block"
EPS = 1e-5


def peers_of(op: str) -> dict[str, Callable]:
    """Return name -> function(*arguments of a workload) of what is installed and does the same."""
    found = {}
    for peer, load in PEERS.get(op, {}).items():
        # An installation that does not load is none.
        with contextlib.suppress(Exception):
            found[peer] = load()
    return found


def selective_scan() -> Callable:
    """Return that of mamba_ssm."""
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    return selective_scan_fn


def selective_state_step() -> Callable:
    """Return that of mamba_ssm."""
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update

    return lambda *args: selective_state_update(*per_channel(*args))


def selective_state_step_of_flashinfer() -> Callable:
    """Return that of flashinfer."""
    from flashinfer.mamba import selective_state_update

    def step(*args):
        *tensors, D, z, dt_bias, softplus = per_channel(*args)
        return selective_state_update(*tensors, D=D, z=z, dt_bias=dt_bias, dt_softplus=softplus)

    return step


def dw_causal_conv() -> Callable:
    """Return that of causal_conv1d."""
    from causal_conv1d import causal_conv1d_fn

    return lambda *args: causal_conv1d_fn(*args[:3], activation="silu")


def ssd_chunk_scan() -> Callable:
    """Return that of mamba_ssm."""
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    return lambda *args: mamba_chunk_scan_combined(*args[:5], CHUNK, D=args[6])


def mamba2_block() -> Callable:
    """Return that of mamba_ssm."""
    from mamba_ssm.ops.triton.ssd_combined import mamba_split_conv1d_scan_combined

    return mamba_split_conv1d_scan_combined


# Operator -> name of a peer -> what loads its function.
PEERS = {
    "selective_scan": {"mamba_ssm": selective_scan},
    "selective_state_step": {
        "mamba_ssm": selective_state_step,
        "flashinfer": selective_state_step_of_flashinfer,
    },
    "dw_causal_conv": {"causal_conv1d": dw_causal_conv},
    "ssd_chunk_scan": {"mamba_ssm": ssd_chunk_scan},
    BLOCK: {"mamba_ssm": mamba2_block},
}


def per_channel(state, x, dt, A, B, C, D, z, dt_bias, softplus) -> tuple:
    """Give every channel of a head the step size and weights of the head, without copies."""
    if state.ndim == 4:
        headdim, dstate = state.shape[2:]
        dt, D, dt_bias = (t[..., None].expand(*t.shape, headdim) for t in (dt, D, dt_bias))
        A = A[:, None, None].expand(-1, headdim, dstate)
    return state, x, dt, A, B, C, D, z, dt_bias, softplus


def block_arguments(case: Case, device) -> tuple[tuple, dict]:
    """Return the arguments of mamba_split_conv1d_scan_combined for a block of a Mamba-2 model.

    Args:
        case: its sizes are batch, seqlen, nheads, headdim and dstate; one group, four taps, and a
            model half as wide as its heads.
        device: where the tensors lie.

    Returns:
        Tensors, activations and matrices in bfloat16; and keyword arguments.
    """
    import torch

    names = ("batch", "seqlen", "nheads", "headdim", "dstate")
    batch, seqlen, nheads, headdim, dstate = (case.sizes[n] for n in names)
    draw, dim = Draw(device), nheads * headdim
    channels, width = dim + 2 * dstate, 4

    def narrow(*shape: int, std: float = 1.0):
        return draw.normal(*shape, std=std).to(torch.bfloat16)

    arguments = (
        narrow(batch, seqlen, dim + channels + nheads),
        narrow(channels, width, std=0.5),
        narrow(channels),
        draw.normal(nheads, mean=-4.0),
        -draw.normal(nheads).exp(),
        draw.normal(nheads),
        CHUNK,
    )
    options = {
        "activation": "silu",
        "rmsnorm_weight": 1 + narrow(dim, std=0.1),
        "rmsnorm_eps": EPS,
        "outproj_weight": narrow(max(dim // 2, 1), dim, std=dim**-0.5),
        "headdim": headdim,
        "ngroups": 1,
        "norm_before_gate": False,
    }
    return arguments, options


def difference(got, want) -> float:
    """Return the root mean square of got - want over that of want, in float32."""
    got, want = got.float(), want.float()
    return float((got - want).norm() / want.norm().clamp(min=1e-30))
