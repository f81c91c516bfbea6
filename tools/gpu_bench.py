"""What tools/gpu_check.py times: ceilings of a GPU, its kernels, and peers on the same tensors."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ssm.utils import dispatch
from tools import bench, gpu_peers
from tools.workload import Case

# Rows of a training batch of a large model, and decoding at the batch sizes of servers.
SCAN = {"batch": 8, "dim": 5120, "seqlen": 2048}
CONV = {**SCAN, "dim": 5376, "width": 4}
ROWS = {"rows": 8 * 2048, "dim": 5120}
HEADS = {"nheads": 80, "headdim": 64, "dstate": 128}
NARROW = {"dtype": torch.bfloat16}
WORKLOADS = {
    "selective_scan": (
        Case("b8_l2k_d5120", {**SCAN, "dstate": 16}),
        Case("b8_l2k_d5120_channel_last", {**SCAN, "dstate": 16}, {"channel_last": True}),
        Case("b1_l2k_d5120", {**SCAN, "batch": 1, "dstate": 16}),
    ),
    "selective_state_step": (
        Case("mamba_b64", {"batch": 64, "nheads": 5120, "headdim": 0, "dstate": 16}),
        Case("mamba2_b64", {"batch": 64, "nheads": 80, "headdim": 64, "dstate": 128}),
        Case("mamba2_b512", {"batch": 512, "nheads": 80, "headdim": 64, "dstate": 128}),
    ),
    "dw_causal_conv": (
        Case("b8_l2k_d5376", {**SCAN, "dim": 5376, "width": 4}),
        Case(
            "b8_l2k_d5376_channel_last", {**SCAN, "dim": 5376, "width": 4}, {"channel_last": True}
        ),
    ),
    "dw_causal_conv_step": (Case("b64", {"batch": 64, "dim": 5376, "memory": 4, "width": 4}),),
    "ssd_chunk_scan": (
        Case("b8_l2k_h80", {"batch": 8, "seqlen": 2048, **HEADS}, NARROW),
        Case("b1_l1k_h80", {"batch": 1, "seqlen": 1024, **HEADS}, NARROW),
        Case("b1_l64k_h80", {"batch": 1, "seqlen": 1 << 16, **HEADS}, NARROW),
    ),
    gpu_peers.BLOCK: (
        Case("b8_l2k_h80", {"batch": 8, "seqlen": 2048, **HEADS}),
        Case("b1_l1k_h80", {"batch": 1, "seqlen": 1024, **HEADS}),
    ),
    "fused_layer_norm": (Case("rms_b8_l2k_d5120", ROWS, {"is_rms": True}),),
    "gated_norm": (Case("rms_b8_l2k_d5120", ROWS, {"order": "norm first"}),),
    "swiglu": (Case("b8_l2k_d5120", ROWS, {"layout": "separate"}),),
    **{
        op: (Case("b8_l2k_h80", {"batch": 8, "seqlen": 2048, **HEADS}, operator=op),)
        for op in dispatch.FILES
    },
}
LIMITS = {"batch": 2, "dim": 64, "seqlen": 64, "rows": 64, "nheads": 8}
# Parameters and steps stay in float32, as in mixed-precision training; activations are narrow.
ACTIVATION_AXES = 2
WIDE = {  # the places of what stays in float32 besides: A, and what one stage hands to another
    "selective_scan": {2},
    "selective_state_step": {3},
    "ssd_chunk_cumsum": {0},
    "ssd_chunk_state": {2, 3},
    "ssd_state_passing": {0, 1},
    "ssd_chunk_output": {0, 2, 3, 5},
}
EAGER_CALLS = 20


def milliseconds(function, device: str, iters: int = 50, warm_up: int = 20) -> float:
    """Return the median time of a call; on a GPU replayed from a graph, with a cold L2 cache."""
    if device == "cpu":
        times = []
        for _ in range(3):
            started = time.perf_counter()
            function()
            times.append((time.perf_counter() - started) * 1e3)
        return statistics.median(times)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        kept = function()  # noqa: F841 - its memory is the graph's while that is replayed
    flush = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")
    times = []
    for i in range(warm_up + iters):
        flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        if i >= warm_up:
            times.append(begin.elapsed_time(end))
    return statistics.median(times)


def eager_milliseconds(function, device: str) -> float:
    """Return the mean time of calls in a row as a user makes them, launches and Python included."""
    calls = 1 if device == "cpu" else EAGER_CALLS
    function()
    wait(device)
    started = time.perf_counter()
    for _ in range(calls):
        function()
    wait(device)
    return (time.perf_counter() - started) * 1e3 / calls


def wait(device: str) -> None:
    """Wait until the device has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def copy_rate(device: str) -> float:
    """Return bytes per second, read plus written, of a large copy."""
    source = torch.empty(1 << (22 if device == "cpu" else 31), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / milliseconds(lambda: target.copy_(source), device) * 1e3


def measure_ceilings(report, device: str) -> None:
    """Measure what bounds the kernels."""

    def product() -> dict:
        size = 256 if device == "cpu" else 8192
        a = torch.randn(size, size, device=device, dtype=torch.bfloat16)
        out = torch.empty_like(a)
        took = milliseconds(lambda: torch.mm(a, a, out=out), device)
        return {"tflops": 2 * size**3 / took / 1e9}

    report.run("ceilings/copy", lambda: {"gb_per_s": copy_rate(device) / 1e9})
    report.run("ceilings/bfloat16_product", product)


@dataclass(frozen=True)
class Workload:
    """A case with its tensors.

    Attributes:
        function: what is timed.
        args: its positional arguments, activations in bfloat16.
        options: its keyword arguments.
        mutated: index in ``args`` of the tensor that a call updates in place, or None.
    """

    function: Callable
    args: tuple
    options: dict
    mutated: int | None = None

    @property
    def moved(self) -> int:
        """Bytes of all tensors that go in, and of the one that is written in place."""
        held = [*self.args, *self.options.values()]
        held += [] if self.mutated is None else [self.args[self.mutated]]
        return sum(a.numel() * a.element_size() for a in held if hasattr(a, "numel"))

    def call(self, function: Callable | None = None) -> tuple:
        """Call the function, or another one of the same arguments; return a tuple of outputs."""
        result = (function or self.function)(*self.args, **self.options)
        return result if isinstance(result, tuple) else (result,)

    def differentiate(self, function: Callable | None = None) -> Callable:
        """Return a function that computes the first output and the gradients of all inputs."""
        held = [*self.args, *self.options.values()]
        wanted = [a for a in held if hasattr(a, "is_floating_point") and a.is_floating_point()]
        for tensor in wanted:
            tensor.requires_grad_()
        with torch.no_grad():
            weight = torch.ones_like(self.call(function)[0])

        def both():
            y = self.call(function)[0]
            return torch.autograd.grad(y, wanted, weight, allow_unused=True)

        return both


def workload_of(op: str, case: Case, device: str) -> Workload:
    """Return a workload of an operator, or of the block of several."""
    import ssm.ops

    case = case.reduced(**LIMITS) if device == "cpu" else case
    if op == gpu_peers.BLOCK:
        from ssm.compat.mamba_ssm import mamba_split_conv1d_scan_combined

        args, options = gpu_peers.block_arguments(case, torch.device(device))
        return Workload(mamba_split_conv1d_scan_combined, args, options)
    problem = bench.workloads_of(dispatch.FILES.get(op, op)).setup(case, torch.device(device))

    def narrowed(index, value):
        is_activation = hasattr(value, "ndim") and value.ndim >= ACTIVATION_AXES
        is_state = index == problem.mutated
        if not is_activation or is_state or index in WIDE.get(op, ()):
            return value
        return value.to(torch.bfloat16)

    args = tuple(narrowed(i, value) for i, value in enumerate(problem.args))
    return Workload(getattr(ssm.ops, op), args, problem.options, problem.mutated)


def measure(report, operators: list[str], device: str) -> None:
    """Time every workload, forward and with its backward, and the peers that are installed."""
    copy = report.items.get("ceilings/copy", {}).get("gb_per_s")
    blocks = [gpu_peers.BLOCK] if "ssd_chunk_scan" in operators else []
    for op in [*operators, *blocks]:
        for case in WORKLOADS.get(op, ()):
            name = f"bench/{op}/{case.name}"
            report.run(name, time_forward, op, case, device, copy)
            if not op.endswith("_step"):
                report.run(f"{name}/backward", time_both, op, case, device)
            for peer, function in gpu_peers.peers_of(op).items():
                report.run(f"{name}/{peer}", time_peer, op, case, device, function)
                if not op.endswith("_step"):
                    report.run(
                        f"{name}/{peer}/backward", time_peer, op, case, device, function, True
                    )


def time_forward(op: str, case: Case, device: str, copy: float | None) -> dict:
    """Return the time of a forward, and that of moving its tensors once."""
    work = workload_of(op, case, device)
    with torch.no_grad():
        moved = work.moved + sum(o.numel() * o.element_size() for o in work.call())
        found = {
            "ms": milliseconds(work.call, device),
            "eager_ms": eager_milliseconds(work.call, device),
            "bytes": moved,
        }
    if copy:
        found["copy_ms"] = moved / copy / 1e6
        found["of_copy"] = found["copy_ms"] / found["ms"]
    return found


def time_both(op: str, case: Case, device: str) -> dict:
    """Return the time of a forward and a backward together."""
    both = workload_of(op, case, device).differentiate()
    return {"ms": milliseconds(both, device), "eager_ms": eager_milliseconds(both, device)}


def time_peer(op: str, case: Case, device: str, function: Callable, backward: bool = False) -> dict:
    """Return the time of a peer on the tensors of a workload, and how far its result is from ours.

    `ms` is missing where it cannot be captured in a graph.
    """
    work = workload_of(op, case, device)
    found = {}
    try:
        if work.mutated is None and not backward:
            with torch.no_grad():
                found["difference"] = gpu_peers.difference(work.call(function)[0], work.call()[0])
            if found["difference"] > gpu_peers.SAME:
                return {"skipped": f"the peer computes something else: {found}"}
        if backward:
            run = work.differentiate(function)
        else:
            run = torch.no_grad()(lambda: work.call(function))
        found["eager_ms"] = eager_milliseconds(run, device)
    except Exception as error:  # whatever another package raises, ours is not at fault
        return {"skipped": f"the peer refuses: {type(error).__name__}: {str(error)[:200]}"}
    try:
        found["ms"] = milliseconds(run, device)
    except RuntimeError as error:
        found["without_graph"] = str(error)[:200]
    return found
