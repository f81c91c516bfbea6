"""What tools/gpu_check.py times: ceilings of a GPU, its kernels, and peers on the same tensors."""

from __future__ import annotations

import statistics
import time

from tools import bench
from tools.workload import Case

# Rows of a training batch of a large model, and decoding at the batch sizes of servers.
SCAN = {"batch": 8, "dim": 5120, "seqlen": 2048}
CONV = {**SCAN, "dim": 5376, "width": 4}
ROWS = {"rows": 8 * 2048, "dim": 5120}
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
    "fused_layer_norm": (Case("rms_b8_l2k_d5120", ROWS, {"is_rms": True}),),
    "gated_norm": (Case("rms_b8_l2k_d5120", ROWS, {"order": "norm first"}),),
    "swiglu": (Case("b8_l2k_d5120", ROWS, {"layout": "separate"}),),
}
LIMITS = {"batch": 2, "dim": 64, "seqlen": 64, "rows": 64, "nheads": 8}
# Parameters and steps stay in float32, as in mixed-precision training; activations are narrow.
ACTIVATION_AXES = 2
DECAY = {"selective_scan": 2, "selective_state_step": 3}  # the place of A


def milliseconds(function, device: str, iters: int = 50, warm_up: int = 20) -> float:
    """Return the median time of a call; on a GPU replayed from a graph, with a cold L2 cache."""
    import torch

    if device == "cpu":
        times = []
        for _ in range(3):
            started = time.perf_counter()
            function()
            times.append((time.perf_counter() - started) * 1e3)
        return statistics.median(times)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        function()
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


def copy_rate(device: str) -> float:
    """Return bytes per second, read plus written, of a large copy."""
    import torch

    source = torch.empty(1 << (22 if device == "cpu" else 31), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / milliseconds(lambda: target.copy_(source), device) * 1e3


def measure_ceilings(report, device: str) -> None:
    """Measure what bounds the kernels."""
    import torch

    def product() -> dict:
        size = 256 if device == "cpu" else 8192
        a = torch.randn(size, size, device=device, dtype=torch.bfloat16)
        out = torch.empty_like(a)
        took = milliseconds(lambda: torch.mm(a, a, out=out), device)
        return {"tflops": 2 * size**3 / took / 1e9}

    report.run("ceilings/copy", lambda: {"gb_per_s": copy_rate(device) / 1e9})
    report.run("ceilings/bfloat16_product", product)


def problem_of(op: str, case: Case, device: str):
    """Return the arguments of a workload with activations in bfloat16, and the bytes they are."""
    import torch

    case = case.reduced(**LIMITS) if device == "cpu" else case
    problem = bench.workloads_of(op).setup(case, torch.device(device))

    def narrowed(index, value):
        is_activation = hasattr(value, "ndim") and value.ndim >= ACTIVATION_AXES
        is_state = index == problem.mutated
        if not is_activation or is_state or index == DECAY.get(op):
            return value
        return value.to(torch.bfloat16)

    args = tuple(narrowed(i, value) for i, value in enumerate(problem.args))
    moved = sum(a.numel() * a.element_size() for a in args if hasattr(a, "numel"))
    if problem.mutated is not None:
        state = args[problem.mutated]
        moved += state.numel() * state.element_size()
    return args, problem.options, moved


def measure(report, operators: list[str], device: str) -> None:
    """Time every workload, forward and with its backward, and the peers that are installed."""
    copy = report.items.get("ceilings/copy", {}).get("gb_per_s")
    for op in operators:
        for case in WORKLOADS.get(op, ()):
            name = f"bench/{op}/{case.name}"
            report.run(name, time_forward, op, case, device, copy)
            if not op.endswith("_step"):
                report.run(f"{name}/backward", time_both, op, case, device)
            for peer, call in peers_of(op).items():
                report.run(f"{name}/{peer}", time_peer, op, case, device, call)


def outputs_of(result) -> tuple:
    """Return the outputs of a call as a tuple."""
    return result if isinstance(result, tuple) else (result,)


def time_forward(op: str, case: Case, device: str, copy: float | None) -> dict:
    """Return the time of a forward, and that of moving its tensors once."""
    import torch

    import ssm.ops

    args, options, moved = problem_of(op, case, device)
    function = getattr(ssm.ops, op)
    with torch.no_grad():
        moved += sum(o.numel() * o.element_size() for o in outputs_of(function(*args, **options)))
        found = {"ms": milliseconds(lambda: function(*args, **options), device), "bytes": moved}
    if copy:
        found["copy_ms"] = moved / copy / 1e6
        found["of_copy"] = found["copy_ms"] / found["ms"]
    return found


def time_both(op: str, case: Case, device: str) -> dict:
    """Return the time of a forward and a backward together."""
    import torch

    import ssm.ops

    args, options, _ = problem_of(op, case, device)
    leaves = [
        a.requires_grad_() if hasattr(a, "is_floating_point") and a.is_floating_point() else a
        for a in args
    ]
    wanted = [a for a in leaves if getattr(a, "requires_grad", False)]
    with torch.no_grad():
        weight = torch.ones_like(outputs_of(getattr(ssm.ops, op)(*args, **options))[0])

    def both():
        y = outputs_of(getattr(ssm.ops, op)(*leaves, **options))[0]
        return torch.autograd.grad(y, wanted, weight, allow_unused=True)

    return {"ms": milliseconds(both, device)}


def peers_of(op: str) -> dict:
    """Return name -> function(args) of what else is installed and computes the same."""
    found = {}
    try:
        if op == "selective_scan":
            from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

            found["mamba_ssm"] = lambda args: selective_scan_fn(*args)
        elif op == "selective_state_step":
            from mamba_ssm.ops.triton.selective_state_update import selective_state_update

            found["mamba_ssm"] = lambda args: selective_state_update(*args)
        elif op == "dw_causal_conv":
            from causal_conv1d import causal_conv1d_fn

            found["causal_conv1d"] = lambda args: causal_conv1d_fn(*args[:3], activation="silu")
    except ImportError:
        pass
    return found


def time_peer(op: str, case: Case, device: str, call) -> dict:
    """Return the time of a peer's forward on the tensors of a workload."""
    import torch

    args, _, _ = problem_of(op, case, device)
    try:
        with torch.no_grad():
            return {"ms": milliseconds(lambda: call(args), device)}
    except (RuntimeError, AssertionError, TypeError) as error:
        return {"skipped": f"the peer refuses: {str(error)[:200]}"}
