"""What is known of a checkpoint before its weights are read."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pareto_merging.checkpoints.architecture import Architecture, checked_size
from pareto_merging.checkpoints.tensors import NamedTensors
from pareto_merging.errors import UserError

WEIGHT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# of a folder's weights, in the order in which transformers looks for them
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Description:
    """What a configuration, a header or a pickle's records say beside the tensors.

    Attributes:
        heads, quick_gelu, preprocessing: of the vision tower, as :class:`.checkpoint.Checkpoint` has them; None where
            nothing says it. check: raises UserError for an architecture that is not the one described.
        text_heads: attention heads of the text tower. no_text: why that is not as CLIP's; empty where it is.
        origin: what a converted file was made from. root: a pickle's records. kind: a narrower name than the format's.
    """

    heads: int | None = None
    quick_gelu: bool | None = None
    preprocessing: Mapping[str, Any] | None = None
    check: Callable[[Architecture], None] | None = None
    text_heads: int | None = None
    no_text: str = ""
    origin: Mapping[str, str] = field(default_factory=dict)
    root: Any = None
    kind: str = ""


class Contents(NamedTuple):
    """A checkpoint as its format or folder layout opened it.

    Attributes:
        kind: what it was, by name. path: the file or folder it was found in. tensors, description: what it holds.
        beside: configurations that were read, or could have been.
    """

    kind: str
    path: Path
    tensors: NamedTensors
    description: Description
    beside: Sequence[Path] = ()


@dataclass(frozen=True)
class Format:
    """A container of tensors in one file.

    Attributes:
        name: for :attr:`.checkpoint.Checkpoint.format`. recognises: whether a file is one, by its path and its first
            bytes. open: reads what is known without the tensors; its ``metadata``, if it has any, may say a head's
            ``logit_scale``. describe: what it says of them, from what ``open`` returned and the name of the source for
            messages.
    """

    name: str
    recognises: Callable[[Path, bytes], bool]
    open: Callable[[Path], NamedTensors]
    describe: Callable[[Any, str], Description] = lambda tensors, source: Description()


@dataclass(frozen=True)
class Layout:
    """A folder of files of weights whose configuration describes them.

    Attributes:
        name: for :attr:`.checkpoint.Checkpoint.format`. configurations: names of its files beside the weights.
        weights: names of files of weights, in the order in which they are looked for. recognises: whether a folder is
            one. holds: whether a file of weights is described by the folder around it. describe: what a folder says,
            from the folder and the name of the source for messages.
    """

    name: str
    configurations: tuple[str, ...]
    weights: tuple[str, ...]
    recognises: Callable[[Path], bool]
    holds: Callable[[Path], bool]
    describe: Callable[[Path, str], Description]


def check_preprocessing(preprocessing: Mapping[str, Any], source: str = "preprocessing") -> dict[str, Any]:
    """Return ``size``, ``mean`` and ``std`` and nothing else. Raises UserError if ``preprocessing`` is not ours."""
    checked: dict[str, Any] = {"size": checked_size(preprocessing.get("size"), f"{source}: size")}
    for key in ("mean", "std"):
        given = preprocessing.get(key)
        values = list(given) if isinstance(given, list | tuple) else []
        numbers = [value for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
        in_range = all(abs(number) < 1e6 and (key == "mean" or number > 0) for number in numbers)
        if not len(values) == len(numbers) == 3 or not in_range:
            kind = "positive number" if key == "std" else "number"
            raise UserError(f"{source}: {key}: expected a {kind} for each of three channels, got {str(given)[:80]}")
        checked[key] = [float(number) for number in numbers]
    return checked
