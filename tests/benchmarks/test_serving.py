"""The serving suite on a tiny tower, and on made-up times."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import pmkernels
from benchmarks import results, run, tables
from benchmarks.common import errors, timing, towers
from benchmarks.common.goals import Goal
from benchmarks.serving import cells, folded, layers, layers_summary, memory, suite, summary, variants
from benchmarks.serving import names as variant_names
from pareto_merging import merge

CPU = torch.device("cpu")
ITEMS, COUNT = 4, 2


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def build(folder: Path, dtype: torch.dtype) -> folded.Case:
    return folded.build_case(towers.TINY.name, suite.TINY_ENCODER, folder, dtype, CPU)


@pytest.fixture(scope="module")
def exact_case(tmp_path_factory: pytest.TempPathFactory) -> folded.Case:
    return build(tmp_path_factory.mktemp("exact"), torch.float64)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> folded.Case:
    return build(tmp_path_factory.mktemp("single"), torch.float32)


def images(dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(ITEMS, 3, 8, 8, generator=torch.Generator().manual_seed(seed)).to(dtype)


@functools.cache
def drawn() -> Tensor:
    return folded.preferences(COUNT)


def request(number: int, count: int = COUNT) -> folded.Request:
    return folded.Request.make(drawn()[number][:count], ITEMS, CPU)


def one_by_one(case: folded.Case, x: Tensor, of: folded.Request) -> Tensor:
    return torch.cat([merge(case.folded, gamma)(item[None]) for item, gamma in zip(x, of.each, strict=True)])


def makers(count: int) -> list[Any]:
    return [
        pytest.param(
            name, marks=[] if name != variant_names.PEFT or variants.peft_version() else pytest.mark.skip("PEFT")
        )
        for name in variants.VARIANTS
        if name != variant_names.ENGINE_DEVICE and (count == 1 or name != variant_names.ENGINE_AGAIN)
    ]


@pytest.mark.parametrize("name", makers(COUNT))
def test_each_variant_is_the_plain_model_of_each_items_own_preference(name: str, exact_case: folded.Case) -> None:
    variant = variants.VARIANTS[name](exact_case, request(0))
    assert variant.name == name
    # made for one request, it answers another, unless it says that it cannot
    for number in (0,) if variant.set_up else (0, 1, 0):
        x, asked = images(torch.float64, number), request(number)
        expected = one_by_one(exact_case, x, replace(asked, each=asked.each[:1].expand(ITEMS, -1)))
        if not variant.single:
            other, expected = expected, one_by_one(exact_case, x, asked)
            # what is asked for can be told from what is not
            assert (other[1] - expected[1]).norm() > 1e-3 * expected[1].norm()
        assert errors.item_error(variant.run(x, asked), expected) < 1e-12


def test_an_engine_that_is_asked_for_the_same_again_is_right_and_holds_more(exact_case: folded.Case) -> None:
    again = variants.engine_again(exact_case, request(0, 1))
    before = again.weight_bytes()
    for _ in range(3):
        found = again.run(images(torch.float64), request(0, 1))
    assert errors.item_error(found, one_by_one(exact_case, images(torch.float64), request(0, 1))) < 1e-12
    merged = sum(part.weight.nbytes for part in projections(exact_case))
    assert again.weight_bytes() - before == pytest.approx(merged, rel=0.1)
    truth = cells.Truth.of(exact_case, images(torch.float64), drawn()[0], (1,))
    cell = cells.Cell.make(exact_case, images(torch.float64), drawn(), truth, 1)
    cell.add(variant_names.ENGINE_AGAIN, lambda: variants.engine_again(exact_case, request(0, 1)))
    cell.measure(suite.QUICK_EFFORT)
    assert cell.rows[variant_names.ENGINE_AGAIN].weight_bytes == again.weight_bytes()
    with pytest.raises(variants.Unavailable):
        variants.engine_again(exact_case, request(0))


def projections(case: folded.Case) -> list[folded.Projection]:
    found: list[folded.Projection] = []
    folded.tower(case.folded, lambda part: found.append(part) or torch.nn.Identity())  # type: ignore[func-returns-value]
    return found


def test_bytes_of_weights_are_those_that_a_variant_needs(exact_case: folded.Case) -> None:
    parts = projections(exact_case)
    weights = sum(part.weight.nbytes for part in parts)
    low_rank = sum(t.nbytes for part in parts for t in (part.A, part.G, part.B))
    held = {
        name: variants.VARIANTS[name](exact_case, request(0)).weight_bytes()
        for name in (variant_names.LIMIT, variant_names.REMERGE, variant_names.COPIES, variant_names.LOOP)
    }
    plain = held[variant_names.LIMIT]
    assert plain == sum(p.nbytes for p in merge(exact_case.folded, drawn()[0, 0]).parameters())
    assert held[variant_names.REMERGE] == plain + low_rank + weights
    assert held[variant_names.COPIES] == plain + (COUNT - 1) * weights
    assert held[variant_names.LOOP] == pytest.approx(plain + low_rank, rel=0.02)


def test_bytes_are_found_wherever_they_are_held_and_counted_once() -> None:
    a, b, c, d = (torch.zeros(n) for n in (1, 10, 100, 1000))

    def closure() -> Tensor:
        return b

    held = {"views": [a, a.view(1, 1)], "function": closure, "partial": functools.partial(torch.add, c)}
    module = torch.nn.Module()
    module.register_buffer("d", d)
    assert memory.tensor_bytes(held, module, d) == 4 * 1111


def test_merged_copies_that_do_not_fit_are_said_not_to(case: folded.Case, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = COUNT * sum(part.weight.nbytes for part in projections(case))
    for free, fits in ((needed / 0.79, True), (needed / 0.81, False)):
        monkeypatch.setattr(variants, "unused_memory", lambda device, free=free: free)
        cell = a_cell(case)
        cell.add(variant_names.COPIES, lambda: variants.merged_copies(case, request(0)))
        row = cell.rows[variant_names.COPIES]
        assert (variant_names.COPIES in cell.ready) == fits and row.matched
        assert fits or (row.reason is not None and row.reason.startswith("2 merged copies take"))


def test_a_graph_reads_what_every_call_gives_it(exact_case: folded.Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU the graph is played by one that computes again from the tensors that were captured."""

    class Graph:
        def __init__(self, function: Callable[[], Tensor]) -> None:
            self.function, self.found = function, function()

        def replay(self) -> None:
            self.found.copy_(self.function())

    def capture(function: Callable[[], Tensor], device: torch.device) -> tuple[Graph, Tensor]:
        graph = Graph(function)
        return graph, graph.found

    monkeypatch.setattr(variants, "warm_up", lambda function, device: function())
    monkeypatch.setattr(variants, "capture", capture)
    for name in (variant_names.REMERGE, variant_names.LOOP):
        of = variants.VARIANTS[name](exact_case, request(0))
        variant = variants.graphed(of, images(torch.float64), request(0))
        assert variant.name == f"{name}, CUDA graph" and variant.weight_bytes() == of.weight_bytes()
        for number in (1, 0):
            x = images(torch.float64, number)
            expected = one_by_one(exact_case, x, request(number))
            assert errors.item_error(variant.run(x, request(number)), expected) < 1e-12

    def refuse(function: Callable[[], Tensor], device: torch.device) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(variants, "capture", refuse)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    with pytest.raises(variants.Unavailable, match="no CUDA graph of it: operation not permitted"):
        variants.graphed(of, images(torch.float64), request(0))


def a_cell(case: folded.Case) -> cells.Cell:
    truth = cells.Truth.of(case, images(), drawn()[0], (1, COUNT))
    return cells.Cell.make(case, images(), drawn(), truth, COUNT)


def test_only_what_is_right_from_first_to_last_has_a_time(case: folded.Case) -> None:
    cell = a_cell(case)
    calls: dict[str, int] = {}

    def spoilt(name: str, spoil: Callable[[Tensor, int], Tensor]) -> Callable[[], variants.Variant]:
        def make() -> variants.Variant:
            right = variants.looped(case, request(0))

            def answer(x: Tensor, asked: folded.Request) -> Tensor:
                calls[name] = calls.get(name, 0) + 1
                return spoil(right.run(x, asked), calls[name])

            return replace(right, name=name, run=answer)

        return make

    one_item = torch.tensor([1.0, 1.0, 1.0001, 1.0])[:, None]
    spoil: dict[str, Callable[[Tensor, int], Tensor]] = {
        "right": lambda y, call: y,
        "one item a little off": lambda y, call: y * one_item,
        "mixed up between users": lambda y, call: y[[1, 0, 2, 3]],
        "an item too few": lambda y, call: y[:-1],
        "no number": lambda y, call: y / 0 * 0,
        # the first call is judged before, the second in the first round
        "wrong once it is timed": lambda y, call: y if call == 1 else 2 * y,
    }
    for name, function in spoil.items():
        cell.add(name, spoilt(name, function))
    cell.add("fails", lambda: 1 / 0)  # type: ignore[arg-type, return-value]
    cell.measure(suite.QUICK_EFFORT)
    rows = cell.rows
    assert {name for name, row in rows.items() if row.matched} == {"right"}
    assert {name for name, row in rows.items() if row.ms is not None} == {"right"}
    assert rows["one item a little off"].error == pytest.approx(1e-4, rel=0.1)
    assert rows["fails"].reason == "ZeroDivisionError: division by zero"
    assert calls["mixed up between users"] == 1 and calls["wrong once it is timed"] > 1
    found = summary.markdown(report_of(*map(asdict, rows.values())))
    assert "| mixed up between users | wrong (wrong features): error" in found


def test_the_truth_of_fewer_items_and_of_fewer_preferences(case: folded.Case) -> None:
    many = folded.preferences(8)[0]
    truth = cells.Truth.of(case, images(), many, (1, 2, 8))
    assert 1e-9 < truth.plain_error < 1e-5
    for items, count in ((1, 1), (2, 2), (4, 4), (3, 2)):
        asked = folded.Request.make(many[:count], items, CPU)
        x = images()[:items]
        found = torch.cat([merge(case.folded, gamma)(item[None]) for item, gamma in zip(x, asked.each, strict=True)])
        assert truth.error(found, items, count) <= 2 * truth.plain_error
        assert count == 1 or truth.error(found, items, 1) > 100 * truth.plain_error


def test_variants_take_turns_and_stop_when_there_is_enough() -> None:
    order: list[tuple[str, int]] = []
    seen: list[tuple[str, int, Any]] = []

    def function(name: str) -> Callable[[int], str]:
        return lambda number: order.append((name, number)) or f"{name}{number}"  # type: ignore[func-returns-value]

    functions = {name: function(name) for name in "abc"}
    effort = timing.Effort(fewest=3, most=3, seconds=0.0)
    times = timing.in_turn(functions, effort, CPU, lambda *what: seen.append(what))
    assert "".join(name for name, _ in order) == "abcbcacab"
    assert seen == [(name, number, f"{name}{number}") for name, number in order]
    assert {name: len(found) for name, found in times.items()} == {"a": 3, "b": 3, "c": 3}
    effort = timing.Effort(fewest=2, most=9, seconds=0.010)
    assert [effort.suffices(found) for found in ([20.0], [4.0, 5.0], [5.0, 5.0], [0.1] * 9)] == [
        False,
        False,
        True,
        True,
    ]


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("quick") / "report.json"
    assert run.main(["--suite", "serving", "--quick", "--out", str(out)]) == 0
    report: dict[str, Any] = json.loads(out.read_text())
    return report


def test_a_rehearsal_runs_everything_and_claims_nothing(quick: dict[str, Any], tmp_path: Path) -> None:
    on_gpu = torch.cuda.is_available()
    report = quick["suites"]["serving"] if on_gpu else quick
    assert quick["quick"] and quick["environment"]["torch"]
    assert on_gpu or (quick["suite"] == "serving" and report["device"] == "cpu" and report["dtype"] == "float32")
    rows = [row for row in report["rows"] if row["op"] == variant_names.OP]
    cells = {(row["batch"], row["preferences"]) for row in rows}
    assert cells == {(1, 1), (4, 1), (4, 4)}
    for cell in cells:
        names = [row["variant"] for row in rows if (row["batch"], row["preferences"]) == cell]
        left_out = {variant_names.ENGINE_AGAIN} if cell[1] > 1 else set()
        left_out |= set() if on_gpu else {variant_names.ENGINE_DEVICE}
        assert [name for name in names if not name.endswith(variant_names.GRAPH)] == [
            name for name in variants.VARIANTS if name not in left_out
        ]
    unmeasured = {row["variant"] for row in rows if row["ms"] is None and variant_names.GRAPH not in row["variant"]}
    assert unmeasured == (set() if variants.peft_version() else {variant_names.PEFT})
    for row in rows:
        if row["ms"] is not None:
            assert row["matched"] and 0 < row["p20"] <= row["ms"] <= row["p80"] <= row["p99"]
            assert row["images_per_second"] == pytest.approx(1e3 * row["batch"] / row["ms"], rel=1e-3)
            assert row["models"] > 0 and row["calls"] == 2
        else:
            assert row["reason"] and row["matched"]
    for cell in cells:
        limits = [
            row["to_limit"]
            for row in rows
            if (row["batch"], row["preferences"]) == cell and row["variant"].startswith("limit")
        ]
        assert min(limits) == 1.0
    of_layers = [row for row in report["rows"] if row["op"] == layers.OP]
    assert {(row["projection"], row["items"], row["cache"]) for row in of_layers} == {
        (name, items, cache)
        for name in ("in-projection", "out-projection")
        for items in (1, 8)
        for cache in ("cold", "warm")
    }
    assert {layers.LIMIT, "auto"} <= {row["variant"] for row in of_layers}
    text = summary.markdown(report)
    assert text.startswith("A rehearsal") and {goal.status for goal in summary.goals(report)} == {"not measured"}
    names = [path.name for path in summary.draw(report, tmp_path)]
    device = report["device"]
    assert names == [f"serving-{device}-tiny-vit.png", f"serving-{device}-layers.png"]


def test_a_rehearsal_does_not_land_among_the_results() -> None:
    for quick, there in ((True, False), (False, True)):
        report = {"suite": "serving", "quick": quick, "date": "2026-01-02"}
        assert (run._default_path(report).parent == results.RESULTS) == there


def test_a_wrong_layer_has_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    correct = pmkernels.preference_linear

    def wrong(*arguments: Any, **options: Any) -> Tensor:
        y = correct(*arguments, **options)
        y[-1, -1] *= 1.01
        return y

    layer = next(layer for _, layer in layers.projections(quick=True))
    for function, right in ((correct, True), (wrong, False)):
        monkeypatch.setattr(pmkernels, "preference_linear", function)
        rates = {"float32": 1e12, "copy": 1e9}
        rows = list(layers.layer_rows("tiny ViT", layer, torch.float32, CPU, suite.QUICK_EFFORT, rates))
        assert {row.matched for row in rows if row.variant == "auto"} == {right}
        assert all((row.ms is not None) == row.matched for row in rows)
    assert "wrong: error" in layers_summary.markdown([asdict(row) for row in rows])


def test_the_bound_of_a_layer_follows_from_the_rates() -> None:
    _, layer = next(found for found in layers.projections(quick=False) if found[1].items == 32)
    rows, n, d = 32 * 50, 2304, 768
    assert (layer.items * layer.tokens, layer.n, layer.d) == (rows, n, d)
    operations = 2 * rows * (n * d + 16 * (n + d))
    fast = {"bfloat16": 1e12, "copy": 1e30}
    assert layers.bound_ms(layer, fast, torch.bfloat16) == pytest.approx(1e3 * operations / 1e12, rel=1e-3)
    slow = {"bfloat16": 1e30, "copy": 1e12}
    least = 2 * (rows * (n + d) + n * d)
    assert least < layers.bound_ms(layer, slow, torch.bfloat16) * 1e9 < 1.3 * least  # type: ignore[operator]
    assert layers.bound_ms(layer, None, torch.float32) is None


def made_up(variant: str, ms: float | None, model: str = "ViT-L/14", **figures: Any) -> dict[str, Any]:
    title = f"{model}, batch 32"
    row = cells.CellRow(op=variant_names.OP, layer=title, dtype="bfloat16", variant=variant, model=model)
    row.plain_error, row.batch, row.preferences = 1e-2, 32, 32
    row.ms = row.p20 = row.p80 = row.p99 = ms
    row.calls, row.images_per_second, row.weight_bytes = 100, 1.0, 100
    return {**asdict(row), **figures}


def made_up_layer(ms: float, projection: str = "in-projection", **figures: Any) -> dict[str, Any]:
    row = layers.ServedRow(
        op=layers.OP,
        layer=f"ViT-L/14 {projection}",
        dtype="bfloat16",
        variant="auto",
        plain_error=1e-2,
        model="ViT-L/14",
        projection=projection,
        items=32,
        rows=8224,
        cache="cold",
    )
    row.ms = row.p20 = row.p80 = ms
    row.bound_ms, row.chosen = 1.0, "streamed"
    return {**asdict(row), **figures}


def report_of(*rows: dict[str, Any], device: str = "cuda") -> dict[str, Any]:
    about = {"quick": False, "device": device, "dtype": "bfloat16", "tasks": 8, "rank": 16, "peft": None}
    return {**about, "effort": asdict(suite.GPU_EFFORT), "left_out": [], "ceilings": None, "rows": list(rows)}


def gpu_rows(ms: float = 10.3, held: float = 1.01, again: float = 103.0) -> list[dict[str, Any]]:
    ours = made_up(variant_names.ENGINE, ms, to_limit=ms / 10, models=held, peak_models=1.5)
    return [
        made_up(variant_names.LIMIT, 10.0, to_limit=1.0, models=1.0, peak_models=1.2),
        ours,
        made_up(variant_names.REMERGE, 2 * again, to_limit=2 * again / 10),
        made_up(f"{variant_names.REMERGE}{variant_names.GRAPH}", again, to_limit=again / 10),
        made_up(variant_names.COPIES, None, reason="32 merged copies take 6.4 GB of 1.0 GB that are free"),
        # no layer by itself is part of a goal
        made_up_layer(9.0, "out-projection"),
    ]


def test_goals_are_met_or_not_or_not_measured() -> None:
    found = summary.goals(report_of(*gpu_rows()))
    assert [(goal.measured, goal.status) for goal in found] == [
        ("1.030×", "met"),
        ("10.0×", "met"),
        ("1.0100 models", "met"),
    ]
    nothing = summary.goals({"rows": []})
    assert len(nothing) == 4 and {goal.status for goal in nothing} == {"not measured"}
    cpu = report_of(made_up(variant_names.ENGINE, 11.6, "ViT-B/32", to_limit=1.16), device="cpu")
    assert [(goal.measured, goal.status) for goal in summary.goals(cpu)] == [("1.160×", "not met")]
    wrong = {**made_up(variant_names.ENGINE, 1.0, to_limit=0.1), "matched": False, "reason": "wrong features"}
    assert summary.goals(report_of(wrong))[0] == Goal(
        goal="at most 1.03× the plain merged model",
        measured="wrong features",
        status="not measured",
        where="GPU, ViT-L/14, batch 32, 32 preferences",
    )


@pytest.mark.parametrize(
    ("worse", "goals"),
    [({"ms": 10.31}, {0, 1}), ({"again": 102.0}, {1}), ({"held": 1.0101}, {2})],
)
def test_a_goal_is_missed_by_a_little(worse: dict[str, float], goals: set[int]) -> None:
    found = summary.goals(report_of(*gpu_rows(**worse)))
    assert {index for index, goal in enumerate(found) if goal.status == "not met"} == goals


def test_tables_and_pictures_of_a_report(tmp_path: Path) -> None:
    report = report_of(*gpu_rows(), made_up(variant_names.ENGINE, 9.0, to_limit=0.9, preferences=4))
    text = summary.markdown(report)
    assert summary.goals_markdown(report) in text
    assert "| 32 | engine | 10.30 | 10.30–10.30 | 10.30 | 1 | 1.03× | 1.010 | 1.500 |" in text
    assert "| 32 | batched product over merged copies | 32 merged copies take 6.4 GB of 1.0 GB" in text
    tables_of = [line for line in text.splitlines() if line.startswith(("| 32 |", "| 4 |", "| preferences"))]
    assert len({line.count("|") for line in tables_of}) == 1
    shown = [made_up_layer(1.0, items=1, cache=cache) for cache in ("cold", "warm")]
    names = [path.name for path in summary.draw({**report, "rows": [*report["rows"], *shown]}, tmp_path)]
    assert names == ["serving-cuda-vit-l-14.png", "serving-cuda-layers.png"]
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in names)


def test_documents_show_the_gpu_and_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    found = tables.block("serving_goals")
    assert "Times on a GPU: **not measured** yet" in found and found.count("| not measured |") == 3
    about = {"command": "c", "quick": False, "environment": {"gpu": "a GPU", "cpu": "a CPU", "torch": "2"}}
    cpu = report_of(made_up(variant_names.ENGINE, 11.0, "ViT-B/32", to_limit=1.1), device="cpu")
    results.write(tmp_path / "serving-2026-01-02.json", {**about, **cpu, "suite": "serving", "date": "2026-01-02"})
    found = tables.block("serving_goals")
    assert "Times on a GPU: **not measured** yet" in found and "| 1.100× | met |" in found and "a CPU" in found
    gpu = {"suites": {"serving": report_of(*gpu_rows())}, "date": "2026-01-01"}
    results.write(tmp_path / "a-gpu-2026-01-01.json", {**about, **gpu})
    found = tables.block("serving_goals")
    # an older result of a GPU is not hidden by a newer one of the CPU
    assert "| 1.030× | met |" in found and "| 1.100× | met |" in found and "**not measured**" not in found
    assert tables.newest("serving") == tmp_path / "serving-2026-01-02.json"
    assert tables.newest("serving", on_gpu=True) == tmp_path / "a-gpu-2026-01-01.json"


def test_what_the_cpu_leaves_out_is_said() -> None:
    assert suite.left_out(suite.CPU_BATCHES) == ["ViT-B/32, batch 128", "ViT-L/14, batch 8, 32, 128"]
    assert suite.left_out(suite.GPU_BATCHES) == []
    assert [cells.counts_for(batch, suite.PREFERENCES) for batch in (1, 8, 32, 128)] == [
        [1],
        [1, 4, 8],
        [1, 4, 32],
        [1, 4, 32],
    ]
    report = {**report_of(device="cpu"), "left_out": ["ViT-B/32, batch 128"]}
    assert "Left out on the CPU: ViT-B/32, batch 128." in summary.markdown(report)
