"""Goals, tables and pictures of the serving suite."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import pages
from benchmarks.common.pages import Goal, at_most, fastest, judged, ratio, table, times
from benchmarks.common.rows import Json, why_not
from benchmarks.common.timing import COLD, WARM
from benchmarks.serving import layers
from benchmarks.serving.names import COPIES, ENGINE, GRAPH, LIMIT, LIMIT_LINEAR, LOOP, OP, PEFT, REMERGE


def _of(op: str, report: Json) -> list[dict[str, Any]]:
    return [row for row in report["rows"] if row["op"] == op]


def _row(report: Json, model: str, batch: int, count: int, *variants: str) -> Json:
    """Return the fastest of ``variants``, or a row without figures and with a reason."""
    return fastest(_of(OP, report), *variants, model=model, batch=batch, preferences=count)


def goals(report: Json) -> list[Goal]:
    """Judge what was aimed at on the device of the report, ``cuda`` or ``cpu``. Without one: on both."""
    lines, device = [], report.get("device")
    if device in (None, "cuda"):
        where = "GPU, ViT-L/14, batch 32, 32 preferences"
        ours = _row(report, "ViT-L/14", 32, 32, ENGINE)
        over, held = ours["to_limit"], ours["models"]
        goal = "at most 1.03× the plain merged model"
        lines.append(judged(where, goal, times(over), at_most(over, 1.03), ours["reason"]))
        again = _row(report, "ViT-L/14", 32, 32, REMERGE, f"{REMERGE}{GRAPH}")
        faster = ratio(again["ms"], ours["ms"])
        goal = "10× as fast as merging again for each request"
        lines.append(judged(where, goal, times(faster, 1), (faster or 0) >= 10, again["reason"]))
        text = None if held is None else f"{held:.4f} models"
        goal = "at most 1.01 models of memory for weights"
        lines.append(judged(where, goal, text, at_most(held, 1.01), ours["reason"]))
    if device in (None, "cpu"):
        ours = _row(report, "ViT-B/32", 32, 32, ENGINE)
        where, goal = "CPU, ViT-B/32, batch 32, 32 preferences", "at most 1.15× the plain merged model"
        over = ours["to_limit"]
        lines.append(judged(where, goal, times(over), at_most(over, 1.15), ours["reason"]))
    return lines


def goals_markdown(report: Json) -> str:
    """Return the table of the goals."""
    return pages.goals_table("where", goals(report))


def markdown(report: Json) -> str:
    """Return the goals, a table for each tower and batch, and the layers."""
    fewest = report["effort"]["fewest"]
    lines = [pages.REHEARSAL, ""] if report["quick"] else []
    few = " (fewer than a hundred: the 99th percentile is then about the slowest call)" if fewest < 100 else ""
    lines += [
        f"One batch of images, {report['dtype']}, K = {report['tasks']}, r = {report['rank']}; at least {fewest} calls "
        f"of each variant, in turn{few}. Item i has preference i mod P, and every call brings new preferences, except "
        "where a variant can only know them beforehand: merged copies, PEFT's adapters. The limit is the faster of the "
        "plain models of the same rows. Memory is that of weights, in plain models"
        + (", and all of it at the peak of a call." if report["device"] == "cuda" else ".")
        + (f" PEFT {report['peft']}." if report["peft"] else " PEFT was not installed."),
        "",
    ]
    if report["left_out"]:
        lines += [f"Left out on the CPU: {'; '.join(report['left_out'])}.", ""]
    lines += [goals_markdown(report).rstrip()]
    rows = _of(OP, report)
    columns = ["preferences", "variant", "ms", "p20–p80", "p99", "images/s", "to the limit", "models"]
    columns += ["models at the peak"] if report["device"] == "cuda" else []
    for model, batch in dict.fromkeys((row["model"], row["batch"]) for row in rows):
        own = [row for row in rows if (row["model"], row["batch"]) == (model, batch)]
        cells = [_cells(row, len(columns)) for row in own]
        lines += ["", f"**{model}, batch {batch}**", "", *table(columns, cells, "rlr")]
    of_layers = _of(layers.OP, report)
    if of_layers:
        lines += ["", "**One projection, a preference per image**", "", layers_markdown(of_layers).rstrip()]
    return "\n".join(lines) + "\n"


def summary_markdown(report: Json) -> str:
    """Return a line for each tower, batch and number of preferences.

    The time of the plain merged model, and over it those of the engine and of the others; of what was also captured as
    a CUDA graph, the faster. And the memory of copies.
    """
    shown = {
        "engine": (ENGINE,),
        "merging again": (REMERGE, f"{REMERGE}{GRAPH}"),
        "merged copies": (COPIES, f"{COPIES}{GRAPH}"),
        "a loop": (LOOP, f"{LOOP}{GRAPH}"),
        "PEFT": (PEFT,),
    }
    limits = [name + graph for name in (LIMIT, LIMIT_LINEAR) for graph in ("", GRAPH)]
    columns = ["", "preferences", "plain model, ms", *shown, "memory: engine", "merged copies"]
    rows = []
    for model, batch, count in dict.fromkeys((r["model"], r["batch"], r["preferences"]) for r in _of(OP, report)):
        plain = _row(report, model, batch, count, *limits)["ms"]
        figures = [_row(report, model, batch, count, *variants) for variants in shown.values()]
        cells = [f"{model}, batch {batch}", str(count), "–" if plain is None else f"{plain:.1f}"]
        cells += [times(row["to_limit"], 2) or "–" for row in figures]
        cells += ["–" if row["models"] is None else f"{row['models']:.2f} models" for row in (figures[0], figures[2])]
        rows.append(cells)
    return "\n".join(table(columns, rows, "lr")) + "\n"


def _cells(row: Json, number: int) -> list[str]:
    first = [str(row["preferences"]), row["variant"]]
    if row["ms"] is None:
        return [*first, why_not(row), *[""] * (number - 3)]
    cells = [
        f"{row['ms']:.2f}",
        f"{row['p20']:.2f}–{row['p80']:.2f}",
        f"{row['p99']:.2f}",
        f"{row['images_per_second']:.4g}",
        f"{row['to_limit']:.2f}×" if row["to_limit"] else "",
        *("" if row[name] is None else f"{row[name]:.3f}" for name in ("models", "peak_models")),
    ]
    return [*first, *cells][:number]


def draw(report: Json, folder: Path) -> list[Path]:
    """Draw time over distinct preferences for each tower, and layers at one image."""
    rows, written = [row for row in _of(OP, report) if row["ms"]], []
    names = list(dict.fromkeys(row["variant"] for row in rows))
    for model in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == model]
        batches = list(dict.fromkeys(row["batch"] for row in own))
        if len({(row["batch"], row["preferences"]) for row in own}) < 2:
            # one point makes no curve
            continue
        written.append(folder / f"serving-{report['device']}-{pages.file_name(model)}.png")
        with pages.picture(written[-1], max(4.5, 2.4 * len(batches)), 3.6, len(batches)) as (figure, panels):
            handles: dict[str, Any] = {}
            for panel, batch in zip(panels, batches, strict=True):
                handles |= _draw([row for row in own if row["batch"] == batch], names, panel)
                panel.set_title(f"batch {batch}")
            panels[0].set_ylabel("ms")
            figure.suptitle(f"{model}, {report['dtype']}, on the {'GPU' if report['device'] == 'cuda' else 'CPU'}")
            figure.legend(handles.values(), handles, loc="outside lower center", ncols=3, frameon=False)
    return written + _draw_layers(_of(layers.OP, report), folder / f"serving-{report['device']}-layers.png")


def _draw(rows: Sequence[Json], names: Sequence[str], panel: Any) -> dict[str, Any]:
    """Draw a line per variant; return the lines by variant."""
    from matplotlib.ticker import FuncFormatter, NullLocator

    handles: dict[str, Any] = {}
    for number, name in enumerate(names):
        line = sorted((row for row in rows if row["variant"] == name), key=lambda row: row["preferences"])
        if line:
            counts, times_of = [row["preferences"] for row in line], [row["ms"] for row in line]
            (handles[name],) = panel.plot(counts, times_of, **pages.style(number))
    counts = sorted({row["preferences"] for row in rows})
    panel.set(xscale="log", yscale="log", xlabel="distinct preferences")
    panel.set_xticks(counts, [str(count) for count in counts])
    panel.xaxis.set_minor_locator(NullLocator())
    # milliseconds as numbers, not as powers of ten
    for of in (panel.yaxis.set_major_formatter, panel.yaxis.set_minor_formatter):
        of(FuncFormatter(lambda value, _: f"{value:g}"))
    panel.grid(alpha=0.3, linewidth=0.6)
    return handles


def layers_markdown(rows: Sequence[Json]) -> str:
    """Return a line per layer and cache. It has µs, and ratios to the limit and the bound."""
    names = [name for name in (layers.ADDED, *layers.CHOICES) if any(row["variant"] == name for row in rows)]
    bounded = any(row["bound_ms"] is not None for row in rows)
    columns = ["layer", "cache", "limit µs", *(["bound µs"] if bounded else [])]
    columns += [f"{name} µs (to limit{', bound' if bounded else ''})" for name in names]
    lines = []
    groups: dict[tuple[str, str], dict[str, Json]] = {}
    for row in rows:
        groups.setdefault((row["layer"], row["cache"]), {})[row["variant"]] = row
    for (layer, cache), group in groups.items():
        limit = group.get(layers.LIMIT, {"ms": None})["ms"]
        cells = [layer, cache, f"{1e3 * limit:.1f}" if limit else "–"]
        cells += [f"{1e3 * next(iter(group.values()))['bound_ms']:.1f}"] if bounded else []
        cells += [_layer_cell(group.get(name), limit) for name in names]
        lines.append(cells)
    return "\n".join(table(columns, lines, "llr")) + "\n"


def _layer_cell(row: Json | None, limit: float | None) -> str:
    if row is None:
        return ""
    if row["ms"] is None:
        return why_not(row)
    about = [row["chosen"]] if row["variant"] == "auto" else []
    about += [f"{row['ms'] / other:.2f}×" for other in (limit, row["bound_ms"]) if other]
    return f"{1e3 * row['ms']:.1f} ({', '.join(about)})"


def _draw_layers(rows: Sequence[Json], path: Path) -> list[Path]:
    """Draw one image, cold beside warm. A bar per variant and projection, the bound as a line across it."""
    shown = [row for row in rows if row["items"] == 1 and row["ms"]]
    if not shown:
        return []
    layers = list(dict.fromkeys((row["model"], row["projection"]) for row in shown))
    names = list(dict.fromkeys(row["variant"] for row in shown))
    with pages.picture(path, max(4.0, 1.9 * len(layers)), 2.9, len(layers)) as (figure, panels):
        for panel, (model, projection) in zip(panels, layers, strict=True):
            own = [row for row in shown if (row["model"], row["projection"]) == (model, projection)]
            for row in own:
                number, place = names.index(row["variant"]), (COLD, WARM).index(row["cache"])
                at = place + (number - (len(names) - 1) / 2) * 0.8 / len(names)
                error = [[1e3 * (row["ms"] - row["p20"])], [1e3 * (row["p80"] - row["ms"])]]
                look: dict[str, Any] = {"color": f"C{number}", "width": 0.8 / len(names)}
                look["label"] = row["variant"] if place == 0 else None
                panel.bar(at, 1e3 * row["ms"], yerr=error, error_kw={"linewidth": 0.6}, **look)
            if own[0]["bound_ms"]:
                panel.axhline(1e3 * own[0]["bound_ms"], color="black", linewidth=0.8, linestyle="--", label="bound")
            panel.set(title=f"{model}\n{projection}", xticks=[0, 1], xticklabels=[COLD, WARM])
        panels[0].set_ylabel("one image (µs)")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    return [path]
