"""Goals, tables and pictures of the serving suite."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.serving import layers, layers_summary
from benchmarks.serving.names import COPIES, ENGINE, GRAPH, LIMIT, LIMIT_LINEAR, LOOP, OP, PEFT, REMERGE


def _batches(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [row for row in report["rows"] if row["op"] == OP]


def _layers(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [row for row in report["rows"] if row["op"] == layers.OP]


def _row(report: Mapping[str, Any], model: str, batch: int, count: int, *variants: str) -> dict[str, Any]:
    """The fastest of ``variants``; a row without figures if none was measured, with the reason of one."""
    rows = [
        row
        for row in _batches(report)
        if (row["model"], row["batch"], row["preferences"]) == (model, batch, count) and row["variant"] in variants
    ]
    timed = [row for row in rows if row["ms"] and row["matched"]]
    empty = {"ms": None, "to_limit": None, "models": None, "reason": next((row["reason"] for row in rows), None)}
    return min(timed, key=lambda row: row["ms"], default=empty)


def goals(report: Mapping[str, Any]) -> list[dict[str, str]]:
    """What was aimed at on the device of the report, ``cuda`` or ``cpu`` (without one: on both): where, goal, measured,
    and ``met``, ``not met`` or ``not measured``."""
    found: list[dict[str, str]] = []

    def add(where: str, goal: str, measured: str | None, met: bool, reason: str | None = None) -> None:
        status = "not measured" if measured is None else "met" if met else "not met"
        found.append({"where": where, "goal": goal, "measured": measured or reason or "", "status": status})

    device = report.get("device")
    if device in (None, "cuda"):
        model, where = "ViT-L/14", "GPU, ViT-L/14, batch 32, 32 preferences"
        ours = _row(report, model, 32, 32, ENGINE)
        ratio = ours["to_limit"]
        text = None if ratio is None else f"{ratio:.3f}×"
        add(where, "at most 1.03× the plain merged model", text, (ratio or 0) <= 1.03, ours["reason"])
        again = _row(report, model, 32, 32, REMERGE, f"{REMERGE}{GRAPH}")
        faster = again["ms"] / ours["ms"] if again["ms"] and ours["ms"] else None
        text = None if faster is None else f"{faster:.1f}×"
        add(where, "10× as fast as merging again for each request", text, (faster or 0) >= 10, again["reason"])
        held = ours["models"]
        text = None if held is None else f"{held:.4f} models"
        add(where, "at most 1.01 models of memory for weights", text, (held or 0) <= 1.01, ours["reason"])
    if device in (None, "cpu"):
        ours = _row(report, "ViT-B/32", 32, 32, ENGINE)
        ratio = ours["to_limit"]
        text = None if ratio is None else f"{ratio:.3f}×"
        where = "CPU, ViT-B/32, batch 32, 32 preferences"
        add(where, "at most 1.15× the plain merged model", text, (ratio or 0) <= 1.15, ours["reason"])
    return found


def goals_markdown(report: Mapping[str, Any]) -> str:
    """The table of the goals."""
    lines = ["| where | goal | measured | |", "|---|---|---|---|"]
    lines += [f"| {g['where']} | {g['goal']} | {g['measured']} | {g['status']} |" for g in goals(report)]
    return "\n".join(lines) + "\n"


def markdown(report: Mapping[str, Any]) -> str:
    """The goals, a table for each tower and batch, and the layers."""
    effort = report["effort"]
    lines = ["A rehearsal: these figures measure nothing.", ""] if report["quick"] else []
    fewest = f"at least {effort['fewest']} calls of each variant, in turn"
    few = (
        " (fewer than a hundred: the 99th percentile is then about the slowest call)" if effort["fewest"] < 100 else ""
    )
    lines += [
        f"One batch of images, {report['dtype']}, K = {report['tasks']}, r = {report['rank']}; {fewest}{few}. Item i "
        "has preference i mod P, and every call brings new preferences, except where a variant can only know them "
        "beforehand: merged copies, PEFT's adapters. The limit is the faster of the plain models of the same rows. "
        "Memory is that of weights, in plain models"
        + (", and all of it at the peak of a call." if report["device"] == "cuda" else ".")
        + (f" PEFT {report['peft']}." if report["peft"] else " PEFT was not installed."),
        "",
    ]
    if report["left_out"]:
        lines += [f"Left out on the CPU: {'; '.join(report['left_out'])}.", ""]
    lines += [goals_markdown(report).rstrip()]
    rows = _batches(report)
    columns = ["preferences", "variant", "ms", "p20–p80", "p99", "images/s", "to the limit", "models"]
    columns += ["models at the peak"] if report["device"] == "cuda" else []
    for model, batch in dict.fromkeys((row["model"], row["batch"]) for row in rows):
        lines += ["", f"**{model}, batch {batch}**", "", f"| {' | '.join(columns)} |"]
        lines.append("|---:|---|" + "---:|" * (len(columns) - 2))
        own = [row for row in rows if (row["model"], row["batch"]) == (model, batch)]
        lines += [f"| {row['preferences']} | {row['variant']} | {_cells(row, len(columns) - 2)} |" for row in own]
    of_layers = _layers(report)
    if of_layers:
        lines += ["", "**One projection, a preference per image**", "", layers_summary.markdown(of_layers).rstrip()]
    return "\n".join(lines) + "\n"


def summary_markdown(report: Mapping[str, Any]) -> str:
    """A line for each tower, batch and number of preferences: the time of the plain merged model, and over it those of
    the engine and of the others; of what was also captured as a CUDA graph, the faster. And the memory of copies."""
    shown = {
        "engine": (ENGINE,),
        "merging again": (REMERGE, f"{REMERGE}{GRAPH}"),
        "merged copies": (COPIES, f"{COPIES}{GRAPH}"),
        "a loop": (LOOP, f"{LOOP}{GRAPH}"),
        "PEFT": (PEFT,),
    }
    limits = [name + graph for name in (LIMIT, LIMIT_LINEAR) for graph in ("", GRAPH)]
    lines = [
        f"| | preferences | plain model, ms | {' | '.join(shown)} | memory: engine | merged copies |",
        f"|---|{'---:|' * (4 + len(shown))}",
    ]
    for model, batch, count in dict.fromkeys((r["model"], r["batch"], r["preferences"]) for r in _batches(report)):
        plain = _row(report, model, batch, count, *limits)["ms"]
        found = [_row(report, model, batch, count, *variants) for variants in shown.values()]
        cells = ["–" if plain is None else f"{plain:.1f}"]
        cells += ["–" if row["to_limit"] is None else f"{row['to_limit']:.2f}×" for row in found]
        cells += ["–" if row["models"] is None else f"{row['models']:.2f} models" for row in (found[0], found[2])]
        lines.append(f"| {model}, batch {batch} | {count} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cells(row: Mapping[str, Any], number: int) -> str:
    if row["ms"] is None:
        why = row["reason"] or "not measured"
        why = why if row["matched"] else f"wrong ({why}): error {row['error']:.1e}, PyTorch {row['plain_error']:.1e}"
        return " | ".join([why.replace("|", "\\|"), *[""] * (number - 1)])
    cells = [
        f"{row['ms']:.2f}",
        f"{row['p20']:.2f}–{row['p80']:.2f}",
        f"{row['p99']:.2f}",
        f"{row['images_per_second']:.4g}",
        f"{row['to_limit']:.2f}×" if row["to_limit"] else "",
        *("" if row[name] is None else f"{row[name]:.3f}" for name in ("models", "peak_models")),
    ]
    return " | ".join(cells[:number])


def draw(report: Mapping[str, Any], folder: Path) -> list[Path]:
    """A picture for each tower, time over distinct preferences with a panel per batch, and one of layers at one image
    with a cold and a warm cache."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullLocator

    folder.mkdir(parents=True, exist_ok=True)
    rows = [row for row in _batches(report) if row["ms"]]
    markers, styles, written = "osD^vPX*<>", ("-", "--", ":"), []
    names = list(dict.fromkeys(row["variant"] for row in rows))
    for model in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == model]
        batches = list(dict.fromkeys(row["batch"] for row in own))
        if len({(row["batch"], row["preferences"]) for row in own}) < 2:
            # one point makes no curve
            continue
        with matplotlib.rc_context({"font.size": 7.5, "axes.spines.top": False, "axes.spines.right": False}):
            figure = Figure(figsize=(max(4.5, 2.4 * len(batches)), 3.6), dpi=200, layout="constrained")
            panels = figure.subplots(1, len(batches), squeeze=False).flatten()
            handles = {}
            for panel, batch in zip(panels, batches, strict=True):
                here = [row for row in own if row["batch"] == batch]
                for number, name in enumerate(names):
                    line = sorted((row for row in here if row["variant"] == name), key=lambda row: row["preferences"])
                    style: dict[str, Any] = {"marker": markers[number % len(markers)], "markersize": 4, "linewidth": 1}
                    style |= {"linestyle": styles[number % len(styles)], "color": f"C{number % 10}"}
                    if line:
                        times = [row["ms"] for row in line]
                        (handles[name],) = panel.plot([row["preferences"] for row in line], times, **style)
                counts = sorted({row["preferences"] for row in here})
                panel.set(xscale="log", yscale="log", title=f"batch {batch}", xlabel="distinct preferences")
                panel.set_xticks(counts, [str(count) for count in counts])
                panel.xaxis.set_minor_locator(NullLocator())
                # milliseconds as numbers, not as powers of ten
                for of in (panel.yaxis.set_major_formatter, panel.yaxis.set_minor_formatter):
                    of(FuncFormatter(lambda value, _: f"{value:g}"))
                panel.grid(alpha=0.3, linewidth=0.6)
            panels[0].set_ylabel("ms")
            figure.suptitle(f"{model}, {report['dtype']}, on the {'GPU' if report['device'] == 'cuda' else 'CPU'}")
            figure.legend(handles.values(), handles, loc="outside lower center", ncols=3, frameon=False)
            path = folder / f"serving-{report['device']}-{model.lower().replace('/', '-').replace(' ', '-')}.png"
            figure.savefig(path)
        written.append(path)
    return written + layers_summary.draw(_layers(report), folder / f"serving-{report['device']}-layers.png")
