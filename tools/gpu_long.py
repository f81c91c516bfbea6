"""What tools/gpu_check.py runs over a million tokens: right, in linear time, in constant memory."""

from __future__ import annotations

import time

LENGTH = 1 << 20
SIZES = {"heads": 80, "headdim": 64, "dstate": 128}
SMALLER = {"heads": 2, "headdim": 8, "dstate": 16}
CHUNK = 256
# Time per token may grow by this from half of the tokens to all. Memory that is neither input nor
# output may grow by granules of the allocator; in a backward also by this share of X, for the
# states between windows of tiles and the sums of every tile.
MORE_TIME, GRANULES, MORE_MEMORY = 1.15, 16 << 20, 0.1
# Bytes per token, head and channel of X, y and their gradients; what is free must be more.
FORWARD, BACKWARD = 4, 12
# How far gradients may be from those of the last part alone: both round to bfloat16.
SAME = 1e-2
REPEATS = 3


def check(report, device: str) -> None:
    """Scan LENGTH tokens in one row, forward and backward."""
    report.run("long/forward", forward, device)
    report.run("long/backward", backward, device)


def sizes_of(device: str, bytes_of_element: int) -> tuple[int, dict]:
    """Return the number of tokens and sizes that the device has room for."""
    import torch

    if device == "cpu":
        return LENGTH >> 9, SMALLER
    free = torch.cuda.mem_get_info()[0] * 0.8
    heads = min(SIZES["heads"], int(free / (LENGTH * SIZES["headdim"] * bytes_of_element)))
    if heads < 2:
        raise MemoryError(f"{LENGTH} tokens need more memory than {free / 1e9:.0f} GB")
    return LENGTH, {**SIZES, "heads": heads}


def arguments_of(length: int, sizes: dict, device: str) -> dict:
    """Return the arguments of a scan; the first head remembers some 50 thousand tokens."""
    import torch

    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int):
        return torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)

    heads, headdim, dstate = (sizes[name] for name in ("heads", "headdim", "dstate"))
    decays = torch.logspace(-3, 0, heads, device=device)
    return {
        "X": draw(1, length, heads, headdim),
        "dt": torch.nn.functional.softplus(draw(1, length, heads) - 4),
        "A": -decays,
        "B": draw(1, length, 1, dstate),
        "C": draw(1, length, 1, dstate),
        "chunk_size": CHUNK,
        "D": torch.ones(heads, device=device),
    }


def part_of(arguments: dict, length: int) -> dict:
    """Return the same problem cut to its first tokens."""
    return {n: v[:, :length] if n in ("X", "dt", "B", "C") else v for n, v in arguments.items()}


def forward(device: str) -> dict:
    """Return times and memory of a scan, or raise what is wrong with it."""
    import torch

    import ssm.ops

    length, sizes = sizes_of(device, FORWARD)
    arguments = arguments_of(length, sizes, device)
    with torch.no_grad():
        found = grows(lambda n: ssm.ops.ssd_chunk_scan(**part_of(arguments, n)), length, device)
        y, final_states = ssm.ops.ssd_chunk_scan(**arguments, return_final_states=True)
        for head in (0, sizes["heads"] - 1):
            one = slice(head, head + 1)
            got = {"y": y[:, :, one], "final_states": final_states[:, one]}
            compare(arguments, got, one, device)
    return {"tokens": length, "heads": sizes["heads"], **found}


def compare(arguments: dict, got: dict, one: slice, device: str) -> None:
    """Raise if the results of one head are not those of the reference in float64."""
    import torch

    from ssm.ops.python import reference
    from tests.tolerances import assert_close
    from tools.gpu_check import bounds_of

    narrow = {**arguments, "X": arguments["X"][:, :, one], "dt": arguments["dt"][:, :, one]}
    narrow |= {"A": arguments["A"][one], "D": arguments["D"][one]}
    wide = {n: v.double() if isinstance(v, torch.Tensor) else v for n, v in narrow.items()}
    results = reference.ssd_chunk_scan(**wide, return_final_states=True)
    want = {name: value.cpu() for name, value in zip(got, results, strict=True)}
    narrow = {n: v.cpu() if isinstance(v, torch.Tensor) else v for n, v in narrow.items()}
    bounds = bounds_of("ssd_chunk_scan", "bfloat16", narrow, want, device)
    for name, value in want.items():
        assert_close(f"{name} of head {one.start}", got[name], value, bounds[name])


def backward(device: str) -> dict:
    """Return times and memory of a scan and its backward, or raise what is wrong with it.

    Judge: the last quarter of the tokens alone, from the state that the others leave. What comes
    before them reaches their gradients through that state only.
    """
    import torch

    import ssm.ops
    from tools.gpu_peers import difference

    length, sizes = sizes_of(device, BACKWARD)
    arguments = arguments_of(length, sizes, device)
    names = ("X", "dt", "B", "C")

    def gradients(given: dict) -> tuple:
        """Return the gradients, and y behind them."""
        leaves = [given[name].detach().requires_grad_() for name in names]
        y = ssm.ops.ssd_chunk_scan(**{**given, **dict(zip(names, leaves, strict=True))})
        return *torch.autograd.grad(y, leaves, y.detach()), y.detach()

    found = grows(lambda n: gradients(part_of(arguments, n)), length, device, MORE_MEMORY)
    cut = length - length // 4
    last = {n: v[:, cut:] if n in names else v for n, v in arguments.items()}
    with torch.no_grad():
        before = part_of(arguments, cut)
        _, last["initial_states"] = ssm.ops.ssd_chunk_scan(**before, return_final_states=True)
    whole = [gradient[:, cut:].clone() for gradient in gradients(arguments)]
    for name, got, want in zip(
        (*map("d{}".format, names), "y"), whole, gradients(last), strict=True
    ):
        far = difference(got, want)
        if not far <= SAME:
            raise AssertionError(f"{name} is {far:.3g} from that of the last quarter alone")
    return {"tokens": length, "heads": sizes["heads"], **found}


def grows(run, length: int, device: str, share: float = 0.0) -> dict:
    """Return milliseconds and extra memory of run(tokens); raise if they grow too fast.

    Args:
        run: returns a tuple, or one tensor, the first of which is as large as X.
        length: tokens at most.
        device: where it runs.
        share: of the growth of X that other memory may grow by.
    """
    times, extra, large = {}, {}, {}
    for tokens in (length // 2, length):
        result = run(tokens)
        result = result[0] if isinstance(result, tuple) else result
        large[tokens] = result.numel() * result.element_size()
        del result
        times[tokens] = min(once(run, tokens, device) for _ in range(REPEATS))
        extra[tokens] = memory_of(run, tokens, device)
    ratio = times[length] / times[length // 2] / 2
    more = extra[length] - extra[length // 2]
    found = {"ms": times[length], "ratio": ratio, "extra_mb": extra[length] / 1e6}
    if device == "cpu":  # its clock and its caches say nothing about a GPU
        return found
    if ratio > MORE_TIME:
        raise AssertionError(f"time is not linear in the number of tokens: {found}")
    if more > GRANULES + share * (large[length] - large[length // 2]):
        raise AssertionError(f"memory grows with the number of tokens, by {more} bytes: {found}")
    return found


def once(run, tokens: int, device: str) -> float:
    """Return milliseconds of one call."""
    from tools.gpu_bench import wait

    wait(device)
    started = time.perf_counter()
    run(tokens)
    wait(device)
    return (time.perf_counter() - started) * 1e3


def memory_of(run, tokens: int, device: str) -> int:
    """Return the most bytes that a call held, less what it returned."""
    import torch

    if device == "cpu":
        return 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = run(tokens)
    held = torch.cuda.memory_allocated() - before
    del result
    return torch.cuda.max_memory_allocated() - before - held
