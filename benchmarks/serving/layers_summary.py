"""Tables and pictures of served layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.timing import COLD, WARM
from benchmarks.serving.layers import ADDED, CHOICES, LIMIT


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line per layer and cache: µs of the limit, and of each variant with its ratio to the limit and the bound."""
    names = [name for name in (ADDED, *CHOICES) if any(row["variant"] == name for row in rows)]
    bounded = any(row["bound_ms"] is not None for row in rows)
    columns = ["layer", "cache", "limit µs", *(["bound µs"] if bounded else [])]
    columns += [f"{name} µs (to limit{', bound' if bounded else ''})" for name in names]
    lines = [f"| {' | '.join(columns)} |", "|---|---|" + "---:|" * (len(columns) - 2)]
    groups: dict[tuple[str, str], dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["layer"], row["cache"]), {})[row["variant"]] = row
    for (layer, cache), group in groups.items():
        limit = group.get(LIMIT, {"ms": None})["ms"]
        cells = [layer, cache, f"{1e3 * limit:.1f}" if limit else "–"]
        cells += [f"{1e3 * next(iter(group.values()))['bound_ms']:.1f}"] if bounded else []
        cells += [_cell(group.get(name), limit) for name in names]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(row: Mapping[str, Any] | None, limit: float | None) -> str:
    if row is None:
        return ""
    if row["ms"] is None:
        return f"wrong: error {row['error']:.1e}, PyTorch {row['plain_error']:.1e}"
    about = [row["chosen"]] if row["variant"] == "auto" else []
    about += [f"{row['ms'] / other:.2f}×" for other in (limit, row["bound_ms"]) if other]
    return f"{1e3 * row['ms']:.1f} ({', '.join(about)})"


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> list[Path]:
    """One image, cold beside warm: a bar per variant and projection, the bound as a line across it."""
    import matplotlib
    from matplotlib.figure import Figure

    shown = [row for row in rows if row["items"] == 1 and row["ms"]]
    if not shown:
        return []
    layers = list(dict.fromkeys((row["model"], row["projection"]) for row in shown))
    names = list(dict.fromkeys(row["variant"] for row in shown))
    with matplotlib.rc_context({"font.size": 7.5, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(max(4.0, 1.9 * len(layers)), 2.9), dpi=200, layout="constrained")
        panels = figure.subplots(1, len(layers), squeeze=False).flatten()
        for panel, (model, projection) in zip(panels, layers, strict=True):
            own = [row for row in shown if (row["model"], row["projection"]) == (model, projection)]
            for number, name in enumerate(names):
                for place, cache in enumerate((COLD, WARM)):
                    for row in own:
                        if (row["variant"], row["cache"]) == (name, cache):
                            at = place + (number - (len(names) - 1) / 2) * 0.8 / len(names)
                            error = [[1e3 * (row["ms"] - row["p20"])], [1e3 * (row["p80"] - row["ms"])]]
                            style: dict[str, Any] = {"color": f"C{number}", "width": 0.8 / len(names)}
                            style["label"] = name if place == 0 else None
                            panel.bar(at, 1e3 * row["ms"], yerr=error, error_kw={"linewidth": 0.6}, **style)
            if own[0]["bound_ms"]:
                panel.axhline(1e3 * own[0]["bound_ms"], color="black", linewidth=0.8, linestyle="--", label="bound")
            panel.set(title=f"{model}\n{projection}", xticks=[0, 1], xticklabels=[COLD, WARM])
        panels[0].set_ylabel("one image (µs)")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
        figure.savefig(path)
    return [path]
