"""Rows of tools/bench.py from a clone of upstream: its own functions in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tools.goldens import clone
from tools.goldens.files import Fault
from tools.gpu_peers import per_channel
from tools.workload import Peer, whole_chunks

_MODULES = (
    "ops.selective_scan_interface",
    "ops.triton.selective_state_update",
    "modules.ssd_minimal",
)
# The user of a chunked implementation chooses; the fastest of the rows is what counts.
CHUNKS = (32, 64, 128)


def load(folder: Path) -> dict[str, tuple[Peer, ...]]:
    """Import upstream's functions.

    Args:
        folder: root of a clone of state-spaces/mamba.

    Returns:
        Operator -> its rows; each takes the arguments of the operator's workloads.

    Raises:
        Fault: a module lacks its function, or imports what is not installed.
    """
    files = clone.modules(clone.MAMBA, folder, _MODULES, "cpu")
    try:
        scan = files["selective_scan_interface"].selective_scan_ref
        step = files["selective_state_update"].selective_state_update_ref
        minimal = files["ssd_minimal"].ssd_minimal_discrete
    except AttributeError as error:
        raise Fault(f"--mamba-repo must have what is timed, got {error}") from None
    return {
        # Every step slices whole tensors: the backward is quadratic in the length.
        "selective_scan": (Peer("mamba_ssm ref", scan, slow_backward=True),),
        "selective_state_step": (Peer("mamba_ssm ref", _step(step)),),
        "ssd_chunk_scan": tuple(
            Peer(f"mamba_ssm minimal {size}", _chunked(minimal, size)) for size in CHUNKS
        ),
    }


def _step(function: Callable) -> Callable:
    return lambda *args: function(*per_channel(*args))


def _chunked(function: Callable, size: int) -> Callable:
    """Return upstream's chunks for our arguments: whole chunks, and B and C of every head."""

    def call(X, dt, A, B, C, chunk_size, D):
        seqlen, nheads = X.shape[1:3]
        B, C = (m.repeat_interleave(nheads // m.shape[2], 2) for m in (B, C))
        y, _ = function(*(whole_chunks(t, size) for t in (X * dt[..., None], A * dt, B, C)), size)
        return y[:, :seqlen] + D[:, None] * X

    return call
