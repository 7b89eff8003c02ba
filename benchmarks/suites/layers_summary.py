"""Tables and pictures of the layer grid."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.common.layer_case import CHOICES, LIMIT, OPERATIONS
from benchmarks.suites.layers import GOAL, VARIANTS, by_point


def ratios(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """``auto`` over the better strategy at every point that has all three times, worst first."""
    chosen = {
        (row["op"], row["layer"], row["tasks"], row["rows"]): row["chosen"]
        for row in report["rows"]
        if row["variant"] == "auto"
    }
    found = []
    for (op, layer, tasks), at in by_point(report["rows"]).items():
        for rows, ms in at.items():
            if {*CHOICES, "auto"} <= set(ms):
                best = min(CHOICES, key=lambda name: ms[name])
                entry = {"op": op, "layer": layer, "tasks": tasks, "rows": rows, "best": best}
                found.append({**entry, "chosen": chosen[op, layer, tasks, rows], "ratio": ms["auto"] / ms[best]})
    return sorted(found, key=lambda entry: -entry["ratio"])


def _times(ms: Mapping[str, float], variant: str) -> str:
    if variant not in ms:
        return "–"
    if LIMIT not in ms:
        return f"{ms[variant] * 1e3:.1f}"
    return f"{ms[variant] / ms[LIMIT]:.2f}×"


def markdown(report: Mapping[str, Any]) -> str:
    """The worst of ``auto``, the crossovers, and a few rows of each layer; the results file has all of them."""
    if not report["rows"]:
        return "No point of the grid fits in this GPU's memory.\n"
    dtype, found = report["rows"][0]["dtype"], ratios(report)
    wrong = sum(not row["matched"] for row in report["rows"])
    direct = sum(row["ms"] is not None and not row["graph"] for row in report["rows"])
    lines = [
        f"One layer, {dtype}, r = {report['rank']} (MLP: no low-rank term); median of one run, cold L2 cache. "
        f"{len(found)} points have every strategy"
        + (f", {len(report['skipped'])} do not fit in memory" if report["skipped"] else "")
        + (f", {wrong} outputs were wrong and have no time" if wrong else "")
        + (f"; {direct} times include launches from Python" if direct else "")
        + (
            f"; launching a graph, {1e3 * report['launch_ms']:.1f} µs, is in every time"
            if report.get("launch_ms")
            else ""
        )
        + ".",
        "",
        f"**`auto` over the better strategy** (goal: at most {GOAL} everywhere)",
        "",
        "| operation | points | within the goal | worst | where | `auto` took | best |",
        "|---|---:|---:|---:|---|---|---|",
    ]
    for op in OPERATIONS:
        of_op = [entry for entry in found if entry["op"] == op]
        if of_op:
            worst, within = of_op[0], sum(entry["ratio"] <= GOAL for entry in of_op)
            lines.append(
                f"| {op} | {len(of_op)} | {within} | {worst['ratio']:.2f}× | {worst['layer']}, K = {worst['tasks']}, "
                f"M = {worst['rows']} | {worst['chosen']} | {worst['best']} |"
            )
    lines += [
        "",
        "**Rows from which on `streamed` is faster than `fused`**: measured (predicted)",
        "",
        f"| layer | K | {' | '.join(OPERATIONS)} |",
        f"|---|---:|{'---:|' * len(OPERATIONS)}",
    ]
    at = {(e["layer"], e["tasks"], e["op"]): e for e in report["crossovers"]}
    for layer, tasks in dict.fromkeys((e["layer"], e["tasks"]) for e in report["crossovers"]):
        cells = []
        for op in OPERATIONS:
            entry = at[layer, tasks, op]
            predicted = (entry["predicted"] or "never") if report["rates"] else "–"
            cells.append(f"{entry['measured'] or 'never'} ({predicted})")
        lines.append(f"| {layer} | {tasks} | {' | '.join(cells)} |")
    times = by_point(report["rows"])
    for op in OPERATIONS:
        variants = [name for name in VARIANTS[1:] if op != "weight gradient" or name != "cached"]
        lines += [
            "",
            f"**{op}**: time over the limit"
            + (" (dW alone)" if op == "weight gradient" else " (the library's product on a weight merged beforehand)"),
            "",
            f"| layer | K | rows | limit µs | {' | '.join(variants)} |",
            f"|---|---:|---:|---:|{'---:|' * len(variants)}",
        ]
        for (name, layer, tasks), by_rows in times.items():
            for rows in _shown(by_rows) if name == op else ():
                ms = by_rows[rows]
                limit = f"{ms[LIMIT] * 1e3:.1f}" if LIMIT in ms else "–"
                cells = [_times(ms, variant) for variant in variants]
                lines.append(f"| {layer} | {tasks} | {rows} | {limit} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _shown(rows: Mapping[int, Any]) -> list[int]:
    """Of a layer's rows: 1, 64, 512, and the model's own number or else the most."""
    own = [m for m in rows if m & (m - 1)]
    return sorted({m for m in (1, 64, 512, *(own or [max(rows)])) if m in rows})


def draw(report: Mapping[str, Any], folder: Path) -> list[Path]:
    """A picture per operation: time over the limit against rows, a panel per layer, a line per strategy and K."""
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    times = by_point(report["rows"])
    colours = {"fused": "#0072B2", "streamed": "#E69F00", "cached": "#009E73", "auto": "#111111"}
    written = []
    for op in OPERATIONS:
        layers = list(dict.fromkeys(layer for name, layer, _ in times if name == op))
        if not layers:
            continue
        across = min(len(layers), 3)
        down = -(-len(layers) // across)
        figure = Figure(figsize=(4.2 * across, 2.9 * down + 0.7), layout="constrained")
        panels = figure.subplots(down, across, squeeze=False, sharex=True, sharey=True).flatten()
        all_tasks = sorted({tasks for name, _, tasks in times if name == op})
        for panel, layer in zip(panels, layers, strict=False):
            panel.set(xscale="log", yscale="log", title=layer, xlabel="rows")
            panel.label_outer()
            panel.axhline(1.0, color="grey", linewidth=0.8)
            panel.grid(alpha=0.3)
            for tasks in all_tasks:
                style = "-" if tasks == all_tasks[-1] else ":"
                by_rows = times.get((op, layer, tasks), {})
                for variant, colour in colours.items():
                    line = {m: ms[variant] / ms[LIMIT] for m, ms in by_rows.items() if {variant, LIMIT} <= set(ms)}
                    if line:
                        panel.plot(
                            list(line),
                            list(line.values()),
                            style,
                            color=colour,
                            linewidth=0.9 if variant == "auto" else 1.8,
                            marker="." if variant == "auto" else None,
                            label=f"{variant}, K = {tasks}",
                        )
        for panel in panels[len(layers) :]:
            panel.set_visible(False)
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
        figure.suptitle(f"{op}: time over the limit (= 1)")
        path = folder / f"layers-{op.replace(' ', '-')}.png"
        figure.savefig(path, dpi=110)
        written.append(path)
    return written
