"""One model in one format: what was measured, and which promises it broke."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MIB = 2**20
LIMIT_MIB = 24 * 1024
# objects and code, pieces of a megabyte, and what the C library keeps of freed memory
SLACK_MIB = 8
# of the largest feature: other libraries round in another order
TOLERANCE = 1e-4


@dataclass
class Row:
    """One model in one format. Memory in MiB, times in seconds, None where it did not come to that.

    ``files_bytes``: of all K + 1 checkpoints. ``build_peak_mib``: the rise while the Pareto model was built;
    ``build_models``: that, in models of the storage dtype. ``tensor_mib``: the largest tensor as its file has it; where
    that is another dtype, of W0 and of one copy, and what rounding changed. ``bound_mib``: K + 1 models and one such
    tensor; ``within``: whether the rise less ``learned_mib``, the learned parameters, is at most that and
    :data:`SLACK_MIB`.
    ``step_peak_mib``, ``export_peak_mib``, ``peak_mib``: of the whole process. ``bit_equal``: all three exports as this
    library reads them. ``features``: the largest of the merged module's; ``…_error``: the largest difference from them.
    """

    model: str
    format: str
    dtype: str
    tasks: int
    status: str = "failed"
    error: str | None = None
    text_tower: bool | None = None
    files_bytes: int | None = None
    write_seconds: float | None = None
    build_seconds: float | None = None
    build_peak_mib: float | None = None
    build_models: float | None = None
    tensor_mib: float | None = None
    bound_mib: float | None = None
    learned_mib: float | None = None
    within: bool | None = None
    step_seconds: float | None = None
    step_peak_mib: float | None = None
    export_seconds: float | None = None
    export_peak_mib: float | None = None
    peak_mib: float | None = None
    bit_equal: bool | None = None
    features: float | None = None
    open_clip_error: float | None = None
    transformers_error: float | None = None

    def problem(self, text_tower: bool) -> str | None:
        """Return which promise a finished row broke, or None. ``text_tower``: whether its format has one."""
        if self.text_tower != text_tower:
            return f"expected {'a' if text_tower else 'no'} text tower, got {'one' if self.text_tower else 'none'}"
        if not self.within:
            return f"building took {self.build_peak_mib} MiB, bound {self.bound_mib} and {self.learned_mib} learned"
        if self.peak_mib is None or self.peak_mib >= LIMIT_MIB:
            return f"peak of {self.peak_mib} MiB, limit {LIMIT_MIB}"
        if not self.bit_equal:
            return "an export is read as other numbers"
        for name in ("open_clip", "transformers"):
            error = getattr(self, f"{name}_error")
            if not error <= TOLERANCE * (self.features or 0.0):
                return f"features of the export in {name} are off by {error}"
        return None


# model -> K
MODELS = {"ViT-B-32": 8, "ViT-L-14": 2}
TINY, TINY_TASKS = "tiny", 2
# model -> the format that is also stored in another dtype than its files'
ALSO_BFLOAT16 = {"ViT-B-32": "huggingface"}


def planned(models: Sequence[str], formats: Sequence[str]) -> list[Row]:
    """Return the rows to measure, in order."""
    rows = []
    for model in models:
        tasks = MODELS.get(model, TINY_TASKS)
        rows += [Row(model, name, "float32", tasks) for name in formats]
        rows += [Row(model, name, "bfloat16", tasks) for name in formats if name == ALSO_BFLOAT16.get(model)]
    return rows


def markdown(report: Mapping[str, Any]) -> str:
    """Return the rows as a table for the documents."""
    lines = [
        "Random weights at full size. Peak: the rise of the process's resident memory while the Pareto model is built; "
        f"bound: K + 1 models and one tensor, to which come the learned parameters and up to {SLACK_MIB} MiB of "
        "everything else. Step: one on one CPU core, two images of each task. Most of all: the whole process at its "
        "worst. Open_clip, transformers: the largest difference of their features, of the exported model, from the "
        "merged module's.",
        "",
        "| " + " | ".join(HEAD) + " |",
        "| --- | --- |" + " ---: |" * (len(HEAD) - 2),
        *("| " + " | ".join(cells(Row(**row))) + " |" for row in report["rows"]),
    ]
    return "\n".join(lines) + "\n"


HEAD = ["model", "format", "K", "files, GB", "build, s", "peak, models", "peak, MiB", "bound, MiB", "step, s"]
HEAD += ["most of all, GiB", "export, s", "read again", "open_clip", "transformers", ""]


def cells(row: Row) -> list[str]:
    def shown(value: float | None, form: str, unit: float = 1.0) -> str:
        return "–" if value is None else format(value / unit, form)

    name = row.format if row.dtype == "float32" else f"{row.format}, {row.dtype}"
    built = [shown(row.build_seconds, ".1f"), shown(row.build_models, ".3f"), shown(row.build_peak_mib, ".0f")]
    learned = [shown(row.bound_mib, ".0f"), shown(row.step_seconds, ".1f"), shown(row.peak_mib, ".1f", 1024)]
    read = {True: "same bits", False: "OTHER BITS", None: "–"}[row.bit_equal]
    exported = [shown(row.export_seconds, ".1f"), read]
    exported += [shown(row.open_clip_error, ".1e"), shown(row.transformers_error, ".1e")]
    end = "done" if row.error is None else f"{row.status}: {row.error}"
    return [row.model, name, str(row.tasks), shown(row.files_bytes, ".2f", 1e9), *built, *learned, *exported, end]
