"""Goals, tables and pictures of the training suite."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import pages
from benchmarks.common.pages import Goal, at_most, fastest, judged, ratio, table, times
from benchmarks.common.rows import Json, why_not
from benchmarks.common.towers import TINY, TOWERS
from benchmarks.training.names import ADAMERGING, ALL, AUTO, DATA_FREE, LIMIT_GRAPH, STEP, WITHOUT_GRAPHS

GIB = 2**30
# a step over the limit under a CUDA graph, at most
STEP_GOALS = {"ViT-B/32": 1.15, "ViT-L/14": 1.05}


def _row(report: Json, model: str, variant: str, dtype: str = "bfloat16", op: str = STEP) -> Json:
    """Return the row of eight tasks that was asked for, or one without figures."""
    return fastest(report["rows"], variant, op=op, model=model, tasks=8, dtype=dtype, matched=True)


def goals(report: Json) -> list[Goal]:
    """Judge what was aimed at with eight tasks."""
    return [*(goal for model in STEP_GOALS for goal in _step_goals(report, model)), *_run_goals(report)]


def _step_goals(report: Json, model: str) -> Iterator[Goal]:
    ours, limit = _row(report, model, AUTO), _row(report, model, LIMIT_GRAPH)
    wide, same = _row(report, model, ADAMERGING, "float32"), _row(report, model, ADAMERGING)
    over, most = ratio(ours["ms"], limit["ms"]), STEP_GOALS[model]
    text, together = times(over, 2), times(ratio(_row(report, model, ALL)["ms"], limit["ms"]), 2)
    if text and together:
        text += f" ({together} with all tasks at once)"
    goal = f"a step within {most:.2f}× the limit under a CUDA graph"
    yield judged(model, goal, text, at_most(over, most), ours["reason"] or limit["reason"])
    over, share = ratio(ours["ms"], same["ms"]), ratio(ours["peak_bytes"], same["peak_bytes"])
    text = f"{over:.2f}× the time, {share:.2f} of the memory" if over and share else None
    goal = "within 1.05× the time of AdaMerging's computation in bfloat16, at a third of its peak memory"
    met = at_most(over, 1.05) and at_most(share, 1 / 3)
    yield judged(model, goal, text, met, ours["reason"] or same["reason"])
    faster = ratio(wide["ms"], ours["ms"])
    text, launched = times(faster, 1), times(ratio(wide["ms"], _row(report, model, WITHOUT_GRAPHS)["ms"]), 1)
    if text and launched:
        # some of the factor may be launches alone
        text += f" ({launched} without a CUDA graph)"
    goal = "3× as fast as AdaMerging's computation in float32"
    yield judged(model, goal, text, (faster or 0) >= 3, ours["reason"] or wide["reason"])


def _run_goals(report: Json) -> Iterator[Goal]:
    for model, within, seconds in (("ViT-B/32", "90 s", 90.0), ("ViT-L/14", "25 minutes", 1500.0)):
        ours = _row(report, model, AUTO)
        taken = ours["run_seconds"]
        text = None if taken is None else f"{taken:.0f} s, computed from the step"
        yield judged(model, f"8 tasks, 4000 steps in {within}", text, at_most(taken, seconds), ours["reason"])
    free = _row(report, "ViT-B/32", AUTO, op=DATA_FREE)
    taken, text = free["run_seconds"], None
    if taken is not None:
        text = f"{taken:.1f} s, {'measured' if free['run_measured'] else 'computed from the step'}"
    yield judged("ViT-B/32", "a data-free run of 8 tasks in 10 s", text, at_most(taken, 10), free["reason"])


def goals_markdown(report: Json) -> str:
    """Return the table of the goals."""
    return pages.goals_table("model", goals(report))


COLUMNS = (
    *("variant", "type", "ms", "p20–p80", "to the limit", "of the bound", "images/s", "host ms"),
    *("peak GiB", "resident GiB", "run s"),
)


def markdown(report: Json) -> str:
    """Return the goals, a table for each model and K, and profiles of missed goals."""
    rates = report["ceilings"]
    own = [row for row in report["rows"] if row["op"] in (STEP, DATA_FREE)]
    lines = [pages.REHEARSAL, ""] if report["quick"] else []
    sources = ", ".join(f"{model} from {source}" for model, source in report["sources"].items())
    lines += [
        f"One optimiser step, r = {report['rank']}, {report['batch']} images per task, {report['classes']} classes "
        f"({sources}). Median and 20th to 80th percentile of one run; the host's time is until the call returns, peak "
        "memory is all that was allocated, the run is computed from the step. AdaMerging's computation learns the "
        "low-rank term as well here, which the published code does not have, and runs without a CUDA graph. Ceilings "
        "measured in the same run: copy "
        f"{rates['copy'] / 1e12:.2f} TB/s, bfloat16 {rates['bfloat16'] / 1e12:.0f} TFLOP/s, float32 "
        f"{rates['float32'] / 1e12:.0f} TFLOP/s.",
        "",
        goals_markdown(report).rstrip(),
    ]
    for title in dict.fromkeys(row["layer"] for row in own):
        group = [row for row in own if row["layer"] == title]
        limits = [row["ms"] for row in group if row["variant"].startswith("limit") and row["ms"]]
        cells = [_cells(row, min(limits, default=None)) for row in group]
        lines += ["", f"**{title}**", "", *table(COLUMNS, cells, "llr")]
    for model, kernels in report.get("profiles", {}).items():
        names = [kernel["kernel"].replace("|", "\\|") for kernel in kernels]
        names = [name if len(name) <= 80 else f"{name[:79]}…" for name in names]
        cells = [
            [f"`{name}`", str(k["calls"]), f"{k['ms']:.3f}", f"{k['share']:.1%}"]
            for name, k in zip(names, kernels, strict=True)
        ]
        lines += ["", f"**Where a step of {model}, K = 8, spends the GPU's time**", ""]
        lines += table(["kernel", "calls", "ms", "share"], cells, "lr")
    return "\n".join(lines) + "\n"


def _cells(row: Json, limit: float | None) -> list[str]:
    step = row["op"] == STEP
    variant = row["variant"] if step else row["op"]
    if row["ms"] is None:
        return [variant, row["dtype"], why_not(row), *[""] * (len(COLUMNS) - 3)]
    variant += f" ({row['reason']})" if row["reason"] else ""
    return [
        variant,
        row["dtype"],
        f"{row['ms']:.2f}",
        f"{row['p20']:.2f}–{row['p80']:.2f}",
        f"{row['ms'] / limit:.2f}×" if limit and step else "",
        f"{row['bound_ms'] / row['ms']:.0%}" if row["bound_ms"] else "",
        f"{row['images_per_second']:.0f}" if row["images_per_second"] else "",
        f"{row['host_ms']:.2f}",
        *("" if row[name] is None else f"{row[name] / GIB:.2f}" for name in ("peak_bytes", "resident_bytes")),
        "" if row["run_seconds"] is None else f"{row['run_seconds']:.0f}",
    ]


def draw(report: Json, folder: Path) -> list[Path]:
    """Draw time of a step and peak memory over K, a picture for each model."""
    written = []
    for model in [TINY.name] if report["quick"] else [tower.name for tower in TOWERS]:
        rows = [row for row in report["rows"] if (row["op"], row.get("model")) == (STEP, model) and row["ms"]]
        if rows:
            written.append(folder / f"training-{pages.file_name(model)}.png")
            with pages.picture(written[-1], 7.0, 3.4, 2) as (figure, panels):
                _draw(rows, panels)
                figure.suptitle(f"{model}, {report['batch']} images per task")
                figure.legend(
                    *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False
                )
    return written


def _draw(rows: Sequence[Json], panels: Any) -> None:
    for number, (variant, dtype) in enumerate(dict.fromkeys((row["variant"], row["dtype"]) for row in rows)):
        line = [row for row in rows if (row["variant"], row["dtype"]) == (variant, dtype)]
        line.sort(key=lambda row: row["tasks"])
        look = {**pages.style(number), "label": f"{variant} ({dtype})"}
        panels[0].plot([row["tasks"] for row in line], [row["ms"] for row in line], **look)
        known = [row for row in line if row["peak_bytes"]]
        panels[1].plot([row["tasks"] for row in known], [row["peak_bytes"] / GIB for row in known], **look)
    for panel, title in zip(panels, ("time of a step (ms)", "peak memory (GiB)"), strict=True):
        panel.set(xlabel="tasks K", ylabel=title, yscale="log", xticks=sorted({row["tasks"] for row in rows}))
        panel.grid(alpha=0.3, linewidth=0.6)
