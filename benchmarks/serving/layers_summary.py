"""Tables and pictures of served layers."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.pages import picture, table
from benchmarks.common.rows import why_not
from benchmarks.common.timing import COLD, WARM
from benchmarks.serving.layers import ADDED, CHOICES, LIMIT


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return a line per layer and cache. It has µs, and ratios to the limit and the bound."""
    names = [name for name in (ADDED, *CHOICES) if any(row["variant"] == name for row in rows)]
    bounded = any(row["bound_ms"] is not None for row in rows)
    columns = ["layer", "cache", "limit µs", *(["bound µs"] if bounded else [])]
    columns += [f"{name} µs (to limit{', bound' if bounded else ''})" for name in names]
    lines = []
    groups: dict[tuple[str, str], dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["layer"], row["cache"]), {})[row["variant"]] = row
    for (layer, cache), group in groups.items():
        limit = group.get(LIMIT, {"ms": None})["ms"]
        cells = [layer, cache, f"{1e3 * limit:.1f}" if limit else "–"]
        cells += [f"{1e3 * next(iter(group.values()))['bound_ms']:.1f}"] if bounded else []
        cells += [_cell(group.get(name), limit) for name in names]
        lines.append(cells)
    return "\n".join(table(columns, lines, "llr")) + "\n"


def _cell(row: Mapping[str, Any] | None, limit: float | None) -> str:
    if row is None:
        return ""
    if row["ms"] is None:
        return why_not(row)
    about = [row["chosen"]] if row["variant"] == "auto" else []
    about += [f"{row['ms'] / other:.2f}×" for other in (limit, row["bound_ms"]) if other]
    return f"{1e3 * row['ms']:.1f} ({', '.join(about)})"


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> list[Path]:
    """Draw one image, cold beside warm. A bar per variant and projection, the bound as a line across it."""
    shown = [row for row in rows if row["items"] == 1 and row["ms"]]
    if not shown:
        return []
    layers = list(dict.fromkeys((row["model"], row["projection"]) for row in shown))
    names = list(dict.fromkeys(row["variant"] for row in shown))
    with picture(path, max(4.0, 1.9 * len(layers)), 2.9, len(layers)) as (figure, panels):
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
