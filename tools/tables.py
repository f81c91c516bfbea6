"""Prints the report of tools/bench.py."""

from __future__ import annotations


def milliseconds(value: float) -> str:
    """Return a time with four digits that count."""
    return f"{value:.2f}" if value >= 100 else f"{value:#.4g}"


def print_machine(report: dict, why_not: str) -> None:
    """Print the facts and the ceilings."""
    machine, versions = report["machine"], report["versions"]
    print(
        f"{machine['processor']}, {machine['cores']} cores, {report['threads']} threads, "
        f"{report['isa'] or 'no compiled library'}, torch {versions['torch']}, ssm-kernels "
        f"{versions['ssm_kernels']}, commit {(report['commit'] or 'unknown')[:12]}"
        f"{' and changes' if report['modified'] else ''}"
    )
    if report["mamba_ssm"]:
        print(f"mamba_ssm at {report['mamba_ssm'][:12]}")
    load = report["load_average"][0]
    if load > machine["cores"] / 2:
        print(f"the machine was busy: load average {load:.1f} at the start; times are too long")
    found = report["ceilings"]
    if found is None:
        print(why_not)
    else:
        print(
            f"ceilings: {found['fma_per_s'] / 1e9:.1f} G multiply-adds/s "
            f"({2 * found['fma_per_s'] / 1e9:.0f} GFLOPS), {found['exp_per_s'] / 1e9:.2f} G exp/s, "
            f"copy {found['copy_l2_bytes_per_s'] / 1e9:.0f} GB/s in L2, "
            f"{found['copy_bytes_per_s'] / 1e9:.1f} GB/s in memory "
            f"({found['copy_streamed_bytes_per_s'] / 1e9:.1f} GB/s with streaming stores)"
        )
    if report["noop_us"] is not None:
        print(f"empty compiled call with 8 torch tensors: {report['noop_us']:.2f} us")


def print_table(table: dict, device: str) -> None:
    """Print one workload."""
    title = [table["op"], table["workload"]]
    if table["direction"] != "forward":
        title.append(table["direction"])
    print(f"\n== {' :: '.join([*title, f'device={device}'])} ==")
    lines = [("backend", "time (ms)", "min - max", "vs python", "of bound", "notes")]
    for row in table["rows"]:
        if row["median_ms"] is None:
            lines.append((row["backend"], "n/a", "n/a", "n/a", "n/a", row["note"]))
            continue
        notes = [row["note"]] if row["note"] else []
        notes.append(f"{row['samples']} samples")
        if row["vs_forward"] is not None:
            notes.append(f"{row['vs_forward']:.2f}x its forward")
            notes.append(f"saves {row['saved_bytes'] / 1e6:.1f} MB")
        lines.append(
            (
                row["backend"],
                milliseconds(row["median_ms"]),
                f"{milliseconds(row['min_ms'])} - {milliseconds(row['max_ms'])}",
                f"{row['vs_python']:.2f}x",
                "n/a" if row["of_bound"] is None else f"{100 * row['of_bound']:.1f} %",
                ", ".join(notes),
            )
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    lines.insert(1, tuple("-" * width for width in widths))
    for i, line in enumerate(lines):
        cells = (text.ljust(width) for text, width in zip(line, widths, strict=True))
        print("|-" + "-|-".join(cells) + "-|" if i == 1 else "| " + " | ".join(cells) + " |")
    if table["bound"]:
        print(
            f"bound: {milliseconds(table['bound']['ms'])} ms by {table['bound']['limit']} "
            f"({table['moved_bytes'] / 1e6:.2f} MB moved, {table['fma'] / 1e6:.2f} M "
            f"multiply-adds, {table['exp'] / 1e6:.2f} M exp)"
        )


def print_first_calls(found: list[dict]) -> None:
    """Print how much longer a first call takes."""
    print("\nfirst call in a fresh process, through dispatch")
    for item in found:
        if "error" in item:
            print(f"  {item['op']} {item['workload']}: none, {item['error']}")
            continue
        print(
            f"  {item['op']} {item['workload']}: {milliseconds(item['first_ms'])} ms, "
            f"{item['ratio']:.2f}x the median call {milliseconds(item['median_ms'])} ms; "
            f"loading took {milliseconds(item['load_ms'])} ms before"
        )
