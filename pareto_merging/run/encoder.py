"""What a run's checkpoints and its configuration say of the encoder, made one description."""

from collections.abc import Iterable
from typing import Any

from pareto_merging.checkpoints import encoders
from pareto_merging.checkpoints.checkpoint import Checkpoint
from pareto_merging.errors import UserError
from pareto_merging.run.config import EncoderConfig


def first_stated(checkpoints: Iterable[Checkpoint], what: str) -> tuple[Any, str]:
    """Return what the checkpoints say of themselves, and which said it; None where none does.

    Raises:
        UserError: two differ.
    """
    first: tuple[Any, str] = None, ""
    for checkpoint in checkpoints:
        value = getattr(checkpoint, what)
        if value is None:
            continue
        if first[0] is not None and value != first[0]:
            raise UserError(f"{checkpoint.source}: expected {what} {first[0]} as {first[1]} says, got {value}")
        first = first if first[0] is not None else (value, checkpoint.source)
    return first


def describe_encoder(
    architecture: dict[str, Any], config: EncoderConfig, checkpoints: Iterable[Checkpoint]
) -> dict[str, Any]:
    """Return how to build the plain encoder: the architecture with QuickGELU as the checkpoints say.

    Raises:
        UserError: the architecture, the configuration and the checkpoints do not agree.
    """
    checkpoints = list(checkpoints)
    stated, source = first_stated(checkpoints, "heads")
    heads = architecture.get("arguments", {}).get("heads")
    if None not in (heads, stated) and heads != stated:
        raise UserError(f"encoder: expected {stated} attention heads as {source} says, got {heads}")
    stated, source = first_stated(checkpoints, "quick_gelu")
    named = config.architecture is not None and encoders.has_quick_gelu(architecture)
    for key, value in (("quick_gelu", config.quick_gelu), ("architecture", named or None)):
        if None not in (stated, value) and stated != value:
            expected, got = (("QuickGELU" if gelu else "GELU") for gelu in (stated, value))
            raise UserError(f"encoder.{key}: expected {expected} as {source} says, got {got}")
    chosen = config.quick_gelu
    if named and chosen is False:
        raise UserError("encoder.quick_gelu: expected true as the architecture has it, got false")
    return {**architecture, "quick_gelu": bool(stated if chosen is None else chosen) or named}
