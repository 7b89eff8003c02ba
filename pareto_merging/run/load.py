"""Models from checkpoints, for those who write their own programs."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import ValidationError
from torch import nn

from pareto_merging.errors import UserError
from pareto_merging.model.stored import StoredTensors
from pareto_merging.run.config import RunConfig, describe_validation
from pareto_merging.run.workspace import Workspace


def load_models(
    pretrained: str | Path,
    finetuned: Mapping[str, str | Path],
    *,
    quick_gelu: bool | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    device: str = "auto",
) -> tuple[nn.Module, dict[str, StoredTensors]]:
    """Load a pretrained encoder and its fine-tuned copies from checkpoints of any format.

    They are what :func:`parametrize` takes.

    Args:
        pretrained: a file, a folder, a hub id (``openai/clip-vit-base-patch32``) or ``open_clip:NAME/TAG``.
        finetuned: likewise, by task name.
        quick_gelu: for checkpoints that do not say it themselves, such as bare state dicts; default: GELU.
        dtype: of the module, and so of a model that is made of it. device: ``auto`` is a CUDA GPU where there is one.

    Returns:
        The module, and for each task a mapping that reads a tensor from its file, as it is stored there, when it is
        asked for it. The module's weights are rounded to ``dtype``, but it remembers where they are as stored, so that
        every task vector is rounded once (:mod:`pareto_merging.model.stored`). With ``parametrize(*load_models(…),
        copy=False)`` a Pareto model takes K + 1 models of memory and one tensor.

    Raises:
        UserError: a checkpoint cannot be read, or does not belong to the pretrained one.
    """
    if not isinstance(finetuned, Mapping):
        raise TypeError(f"finetuned: expected a mapping from task name to checkpoint, got {type(finetuned).__name__}")
    tasks = {name: {"checkpoint": source} for name, source in finetuned.items()}
    encoder = {"pretrained": pretrained, "quick_gelu": quick_gelu}
    try:
        settings = {"encoder": encoder, "tasks": tasks, "dtype": dtype, "device": device}
        workspace = Workspace(RunConfig.model_validate(settings))
    except ValidationError as error:
        raise UserError(describe_validation(error)) from error
    workspace.check_files()
    if workspace.assumption:
        warnings.warn(workspace.assumption, stacklevel=2)
    return workspace.pretrained(), workspace.finetuned()
