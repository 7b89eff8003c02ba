"""The table of goals: aims, measurements of the same run, and whether they are met."""

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.common.pages import Goal, at_most, ratio, status_of, times
from benchmarks.serving.names import ENGINE, REMERGE
from benchmarks.training.names import ADAMERGING, ALL, AUTO, ONCE
from benchmarks.training.names import LIMIT_GRAPH as STEP_LIMIT

Row = Mapping[str, Any]
GIB = 2**30
MODELS = ("ViT-L/14", "ViT-B/32")


class Rows:
    """The rows of a record that are right and timed, by unit and by variant."""

    def __init__(self, rows: Sequence[Row], quick: bool = False) -> None:
        # a rehearsal's figures are nobody's
        self.all = [] if quick else list(rows)
        self.timed = [row for row in self.all if row.get("matched") and row.get("ms")]

    def of(self, unit: str, *variants: str) -> Row | None:
        """Return the fastest row of ``variants`` (all, if none is named) of a unit. Units below it count as well."""
        rows = [
            row
            for row in self.timed
            if (row["unit"] == unit or row["unit"].startswith(f"{unit}/"))
            and (not variants or row["variant"] in variants)
        ]
        return min(rows, key=lambda row: row["ms"], default=None)

    def ms(self, unit: str, *variants: str) -> float | None:
        """Return its milliseconds."""
        row = self.of(unit, *variants)
        return None if row is None else float(row["ms"])

    def limit_ms(self, unit: str, ending: str = "") -> float | None:
        """Return the milliseconds of the fastest limit whose name ends so."""
        own = (row for row in self.timed if row["unit"] == unit and row["variant"].startswith("limit"))
        return min((float(row["ms"]) for row in own if row["variant"].endswith(ending)), default=None)

    def why(self, unit: str) -> str:
        """Say why a unit has no time, if that is known."""
        whole_group = f"{unit.partition('/')[0]}/all"
        for row in self.all:
            own = row["unit"] in (unit, whole_group) or row["unit"].startswith(f"{unit}/")
            if own and row.get("ms") is None and row.get("reason"):
                return str(row["reason"])
        return ""


def _step(model: str) -> str:
    return f"{'training-L14' if model == 'ViT-L/14' else 'training-B32'}/{model}, batch 32"


def _judged(
    goal: str, against: str, to_reach: str, value: str | None, met: bool, why: str = "", bound: str = ""
) -> Goal:
    of_bound = "" if value is None else bound
    return Goal(goal, why if value is None else value, status_of(value, met), "", against, to_reach, of_bound)


def _no_more(goal: str, against: str, most: str, value: float | None, why: str, bound: str = "") -> Goal:
    """Judge a ratio that is to be at most that."""
    return _judged(goal, against, f"≤ {most}×", times(value), at_most(value, float(most)), why, bound)


def _of_bound(row: Row | None) -> str:
    return "" if row is None or not row.get("bound_ms") else f"{row['ms'] / row['bound_ms']:.2f}×"


def _serving(rows: Rows) -> list[Goal]:
    unit = "serving/ViT-L/14, batch 32"
    ours, why = rows.of(unit, ENGINE), rows.why(unit)
    over = ratio(rows.ms(unit, ENGINE), rows.limit_ms(unit, "CUDA graph") or rows.limit_ms(unit))
    goal = "serving ViT-L/14, 32 preferences, as a user calls it"
    lines = [_no_more(goal, "one plain merged model under a CUDA graph", "1.03", over, why)]
    again = ratio(rows.ms(unit, REMERGE, f"{REMERGE}, CUDA graph"), rows.ms(unit, ENGINE))
    lines.append(_judged("the same", "merging again per request", "≥ 10×", times(again, 1), (again or 0) >= 10, why))
    held = None if ours is None or not ours.get("models") else float(ours["models"])
    text = None if held is None else f"{held:.4f} models"
    lines.append(_judged("the same", "memory of weights", "≤ 1.01 models", text, at_most(held, 1.01), why))
    unit = "served-layers/block"
    for cache in ("cold", "warm"):
        over = ratio(rows.ms(unit, f"a served block, {cache}"), rows.ms(unit, f"the plain block, {cache}"))
        lines.append(_no_more(f"a served block, {cache} cache", "the plain block", "1.05", over, rows.why(unit)))
    return lines


def _training(rows: Rows) -> list[Goal]:
    lines = []
    for model, most in (("ViT-L/14", "1.05"), ("ViT-B/32", "1.15")):
        unit = _step(model)
        limit, why = rows.ms(unit, STEP_LIMIT), rows.why(unit)
        against, title = "frozen merged linears + full dW products, one graph", f"training step {model}"
        over, bound = ratio(rows.ms(unit, AUTO), limit), _of_bound(rows.of(unit, AUTO))
        lines.append(_no_more(title, against, most, over, why, bound))
        if model == "ViT-B/32":
            over = ratio(rows.ms(unit, ALL), limit)
            lines.append(_no_more(f"{title}, all tasks at once", against, "0.9", over, why))
    for model in MODELS:
        ours, once = rows.of(_step(model), AUTO), rows.of(_step(model), ONCE)
        text, met, why = None, False, ""
        if ours is not None and once is not None:
            over, share = ours["ms"] / once["ms"], _extra_memory(ours, once)
            if share is None:
                why = f"{over:.3f}×, memory not measured"
            else:
                text, met = f"{over:.3f}× at {share:.2f} of its extra memory", over < 1 and share < 0.6
        against = "merge once a step with autograd"
        lines.append(_judged(f"training step {model}", against, "faster, < 0.6 of its extra memory", text, met, why))
    return [*lines, *(goal for model in MODELS for goal in _layer_wise(rows, model))]


def _extra_memory(ours: Row, other: Row) -> float | None:
    """Divide peak bytes beyond what is held between steps, ours by the other's."""
    if not all(row.get("peak_bytes") and row.get("resident_bytes") for row in (ours, other)):
        return None
    extra = [row["peak_bytes"] - row["resident_bytes"] for row in (ours, other)]
    return float(extra[0] / extra[1]) if extra[1] > 0 else None


def _layer_wise(rows: Rows, model: str) -> list[Goal]:
    unit = _step(model)
    ours, same = rows.of(unit, AUTO), rows.of(unit, ADAMERGING)
    text, met, why = None, False, rows.why(f"{unit}/{ADAMERGING}")
    if ours is not None and same is not None:
        over = ours["ms"] / same["ms"]
        if ours.get("peak_bytes") and same.get("peak_bytes"):
            share = ours["peak_bytes"] / same["peak_bytes"]
            text, met = f"{over:.3f}× at {share:.2f} of the memory", over <= 1.05 and share <= 1 / 3
        else:
            why = f"{over:.3f}×, memory not measured"
    title, against = f"training step {model}", "layer-wise AdaMerging computation, bfloat16"
    lines = [_judged(title, against, "≤ 1.05× at ≤ 1/3 of the memory", text, met, why)]
    against, text, met, whys = f"{against.rpartition(',')[0]}, its own float32", None, False, []
    for batch in (32, 16, 8):
        key = f"float32/{model}, batch {batch}"
        in_float32 = f"{key}/{ADAMERGING}, float32"
        wide, mine = rows.of(in_float32), ours if batch == 32 else rows.of(f"{key}/{AUTO}")
        if wide is not None and mine is not None:
            over = wide["ms"] / mine["ms"]
            text, met = f"{over:.1f}× at {batch} images", over >= 3
            break
        if rows.why(in_float32):
            whys.append(f"{batch} images: {rows.why(in_float32)}")
    if text is not None and whys:
        text += f" ({'; '.join(whys)})"
    return [*lines, _judged(title, against, "≥ 3× as fast", text, met, "; ".join(whys))]


def _reductions(rows: Rows) -> list[Goal]:
    ceilings = (row for row in rows.all if row["unit"].startswith("ceilings/") and row["variant"] == "copy")
    copy = next((row["value"] for row in ceilings), None)
    layers = dict.fromkeys(row["layer"] for row in rows.timed if row["unit"].startswith("reductions/"))
    shares, gradients = dict[str, float](), dict[str, tuple[float, str]]()
    for layer in layers:
        unit = f"reductions/{layer}"
        reduction = rows.of(unit, "reduction of dW")
        if reduction is None or not copy:
            continue
        shares[layer] = reduction["bytes"] / copy / (reduction["ms"] * 1e-3)
        library, ours = rows.of(unit, "the library's dW"), rows.of(unit, "weight gradient, auto")
        if library is not None and ours is not None:
            # of the K + 1 weights that the reduction reads, dW is not counted here
            task_vectors = reduction["bytes"] * reduction["tasks"] / (reduction["tasks"] + 1)
            least = library["ms"] + 1e3 * task_vectors / copy
            gradients[layer] = ours["ms"] / least, _of_bound(ours)
    worst = min(shares, key=lambda layer: shares[layer], default=None)
    text = None if worst is None else f"{shares[worst]:.0%} ({worst}; {len(shares)} layers)"
    met = worst is not None and shares[worst] >= 0.8
    bound = "" if worst is None else f"{1 / shares[worst]:.2f}×"
    goal = "reduction of dW"
    lines = [_judged(goal, "bytes over measured bandwidth", "≥ 80 %", text, met, rows.why("reductions"), bound)]
    slowest = max(gradients, key=lambda layer: gradients[layer][0], default=None)
    text = None if slowest is None else f"{gradients[slowest][0]:.2f}× ({slowest}; {len(gradients)} layers)"
    met = slowest is not None and gradients[slowest][0] <= 1.15
    bound = "" if slowest is None else gradients[slowest][1]
    against = "(library's dW measured) + τ bytes / bandwidth"
    return [*lines, _judged("weight gradient of a layer", against, "≤ 1.15×", text, met, "", bound)]


def _few_bytes(rows: Rows) -> list[Goal]:
    unit, lines = _step("ViT-L/14"), []
    unlimited = rows.ms(unit, AUTO)
    candidates = [row for key in (unit, "rest/ViT-L/14, batch 32") for row in rows.timed if row["unit"].startswith(key)]
    candidates = [row for row in candidates if row["variant"] in (AUTO, "streamed", "fused") and row.get("peak_bytes")]
    for gib, most in ((6.0, 1.10), (3.5, 1.45)):
        fitting = [row for row in candidates if row["peak_bytes"] <= gib * GIB]
        text, met = None, False
        if unlimited and fitting:
            best = min(fitting, key=lambda row: row["ms"])
            over = best["ms"] / unlimited
            text, met = f"{over:.2f}× ({best['variant']}, {best['peak_bytes'] / GIB:.1f} GiB)", over <= most
        elif unlimited and candidates:
            least = min(candidates, key=lambda row: row["peak_bytes"])
            text = f"the least is {least['peak_bytes'] / GIB:.1f} GiB ({least['variant']})"
        goal = f"ViT-L/14 under {gib:g} GiB"
        lines.append(_judged(goal, "its unlimited step", f"≤ {most:.2f}×", text, met))
    return lines


def _runs(rows: Rows) -> list[Goal]:
    lines = []
    for model, seconds, to_reach in (("ViT-B/32", 90.0, "≤ 90 s"), ("ViT-L/14", 1500.0, "≤ 25 min")):
        ours = rows.of(_step(model), AUTO, ALL) or {}
        taken = ours.get("run_seconds")
        text = None if taken is None else f"{taken:.0f} s, computed from the step ({ours['variant']})"
        lines.append(_judged(f"4000 steps, 8 tasks, {model}", "–", to_reach, text, at_most(taken, seconds)))
    free = rows.of("rest/ViT-B/32/data-free run") or {}
    taken, how = free.get("run_seconds"), "measured" if free.get("run_measured") else "computed from the step"
    text = None if taken is None else f"{taken:.1f} s, {how}"
    return [*lines, _judged("data-free run, 8 tasks, ViT-B/32", "–", "≤ 10 s", text, at_most(taken, 10.0))]


def _grid(rows: Rows) -> list[Goal]:
    points: dict[str, dict[str, float]] = {}
    for row in rows.timed:
        if row["unit"].startswith("rest/layer grid/"):
            points.setdefault(row["unit"], {})[row["variant"]] = row["ms"]
    ratios = {
        unit.removeprefix("rest/layer grid/"): ms["auto"] / min(ms["fused"], ms["streamed"])
        for unit, ms in points.items()
        if {"auto", "fused", "streamed"} <= set(ms)
    }
    worst = max(ratios, key=lambda name: ratios[name], default=None)
    text = None if worst is None else f"{ratios[worst]:.2f}× ({worst}; {len(ratios)} points)"
    met = worst is not None and ratios[worst] <= 1.15
    return [_judged("`auto` on the layer grid", "best strategy", "≤ 1.15× everywhere", text, met)]


def _one_image(rows: Rows) -> list[Goal]:
    unit = "serving/ViT-L/14, batch 1"
    over = ratio(rows.ms(unit, ENGINE), rows.limit_ms(unit))
    return [_no_more("one image, 257 rows, unseen preference", "plain model", "1.10", over, rows.why(unit))]


SECTIONS = (_serving, _training, _reductions, _few_bytes, _runs, _grid, _one_image)


def goals(report: Mapping[str, Any]) -> list[Goal]:
    """Judge every goal by the rows of a record; a rehearsal's are not measured."""
    rows = Rows(report.get("rows", ()), bool(report.get("quick")))
    return [goal for section in SECTIONS for goal in section(rows)]


COLUMNS = ("goal", "measured against", "to reach", "measured", "over the bound", "")


def _cells(goal: Goal) -> tuple[str, ...]:
    return goal.goal, goal.against, goal.to_reach, goal.measured, goal.of_bound, goal.status


def markdown(report: Mapping[str, Any]) -> str:
    """Return the table of goals, and what was wrong."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|---|---|---|---|---|---|"]
    lines += [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in _cells(goal))} |" for goal in goals(report)]
    return "\n".join(lines) + "\n"


# all there is to show is goals
goals_markdown = markdown


def text(report: Mapping[str, Any]) -> str:
    """Return the table of goals for a terminal: columns of equal width."""
    lines = [COLUMNS, *map(_cells, goals(report))]
    widths = [max(len(line[i]) for line in lines) for i in range(len(COLUMNS))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)
