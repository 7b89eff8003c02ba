"""Tables and pictures of the layer grid."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.layer_case import CHOICES, LIMIT, OPERATIONS
from benchmarks.common.pages import table
from benchmarks.common.rows import Json
from benchmarks.suites.layers import GOAL, VARIANTS, by_point


def ratios(report: Json) -> list[dict[str, Any]]:
    """Return ``auto`` over the better strategy, worst first. Points without all three times are left out."""
    chosen = {
        (row["op"], row["layer"], row["tasks"], row["rows"]): row["chosen"]
        for row in report["rows"]
        if row["variant"] == "auto"
    }
    points = []
    for (op, layer, tasks), at in by_point(report["rows"]).items():
        for rows, ms in at.items():
            if {*CHOICES, "auto"} <= set(ms):
                best = min(CHOICES, key=lambda name: ms[name])
                entry = {"op": op, "layer": layer, "tasks": tasks, "rows": rows, "best": best}
                points.append({**entry, "chosen": chosen[op, layer, tasks, rows], "ratio": ms["auto"] / ms[best]})
    return sorted(points, key=lambda entry: -entry["ratio"])


def _times(ms: Mapping[str, float], variant: str) -> str:
    if variant not in ms:
        return "–"
    if LIMIT not in ms:
        return f"{ms[variant] * 1e3:.1f}"
    return f"{ms[variant] / ms[LIMIT]:.2f}×"


def markdown(report: Json) -> str:
    """Return the worst of ``auto``, the crossovers, and a few rows of each layer. The results file has all of them."""
    if not report["rows"]:
        return "No point of the grid fits in this GPU's memory.\n"
    points = ratios(report)
    lines = [_introduction(report, len(points)), ""]
    lines += [f"**`auto` over the better strategy** (goal: at most {GOAL} everywhere)", ""]
    columns = ["operation", "points", "within the goal", "worst", "where", "`auto` took", "best"]
    lines += table(columns, _worst(points), "lrrrl")
    lines += ["", "**Rows from which on `streamed` is faster than `fused`**: measured (predicted)", ""]
    lines += table(["layer", "K", *OPERATIONS], _crossovers(report), "lr")
    times = by_point(report["rows"])
    for op in OPERATIONS:
        variants = [name for name in VARIANTS[1:] if op != "weight gradient" or name != "cached"]
        over = "dW alone" if op == "weight gradient" else "the library's product on a weight merged beforehand"
        rows = [
            [layer, str(tasks), str(count), f"{ms[LIMIT] * 1e3:.1f}" if LIMIT in ms else "–"]
            + [_times(ms, variant) for variant in variants]
            for (name, layer, tasks), by_rows in times.items()
            for count in (_shown(by_rows) if name == op else ())
            for ms in [by_rows[count]]
        ]
        lines += ["", f"**{op}**: time over the limit ({over})", ""]
        lines += table(["layer", "K", "rows", "limit µs", *variants], rows, "lr")
    return "\n".join(lines) + "\n"


def _introduction(report: Json, points: int) -> str:
    rows = report["rows"]
    wrong = sum(not row["matched"] for row in rows)
    direct = sum(row["ms"] is not None and not row["graph"] for row in rows)
    parts = [
        f"One layer, {rows[0]['dtype']}, r = {report['rank']} (MLP: no low-rank term); median of one run, "
        f"cold L2 cache. {points} points have every strategy",
        f", {len(report['skipped'])} do not fit in memory" if report["skipped"] else "",
        f", {wrong} outputs were wrong and have no time" if wrong else "",
        f"; {direct} times include launches from Python" if direct else "",
    ]
    if report.get("launch_ms"):
        parts.append(f"; launching a graph, {1e3 * report['launch_ms']:.1f} µs, is in every time")
    return "".join(parts) + "."


def _worst(points: Sequence[Json]) -> Iterator[list[str]]:
    for op in OPERATIONS:
        of_op = [entry for entry in points if entry["op"] == op]
        if of_op:
            worst, within = of_op[0], sum(entry["ratio"] <= GOAL for entry in of_op)
            where = f"{worst['layer']}, K = {worst['tasks']}, M = {worst['rows']}"
            over = f"{worst['ratio']:.2f}×"
            yield [op, str(len(of_op)), str(within), over, where, worst["chosen"], worst["best"]]


def _crossovers(report: Json) -> Iterator[list[str]]:
    at = {(e["layer"], e["tasks"], e["op"]): e for e in report["crossovers"]}
    for layer, tasks in dict.fromkeys((e["layer"], e["tasks"]) for e in report["crossovers"]):
        cells = [layer, str(tasks)]
        for op in OPERATIONS:
            entry = at[layer, tasks, op]
            predicted = (entry["predicted"] or "never") if report["rates"] else "–"
            cells.append(f"{entry['measured'] or 'never'} ({predicted})")
        yield cells


def _shown(rows: Mapping[int, Any]) -> list[int]:
    """Return some of a layer's rows: 1, 64, 512, and the model's own or most."""
    own = [m for m in rows if m & (m - 1)]
    return sorted({m for m in (1, 64, 512, *(own or [max(rows)])) if m in rows})


def draw(report: Json, folder: Path) -> list[Path]:
    """Draw a picture per operation, of time over the limit against rows. It has a panel per layer."""
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
