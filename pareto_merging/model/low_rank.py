"""Which matrices of a model have a low-rank term."""

import re
from collections.abc import Callable
from typing import Literal, TypeAlias

from torch import nn

LowRank: TypeAlias = Literal["attention", "in-projection", "all", "none"] | Callable[[str, nn.Module], bool]


_ATTENTION = re.compile(r"att(entio)?n", re.IGNORECASE)


_OUT_PROJECTION = re.compile(r"(^|\.)(out_proj|o_proj|proj|to_out(\.\d+)?|c_proj|dense|wo)$")


def wants_low_rank(model: nn.Module, name: str, low_rank: LowRank) -> bool:
    """Tell if the matrix ``name`` of ``model`` has a low-rank term under a setting."""
    if low_rank == "none":
        return False
    owner_name, _, attribute = name.rpartition(".")
    owner = model.get_submodule(owner_name)
    if callable(low_rank):
        return low_rank(name, owner)
    is_linear = isinstance(owner, nn.Linear) and attribute == "weight"
    if low_rank == "all" and (is_linear or isinstance(owner, nn.MultiheadAttention)):
        return attribute == "weight" or attribute.endswith("proj_weight")
    # attention by the names on the way to it (blocks.0.attn.qkv) or by the class that holds it (CLIPAttention's q_proj)
    parent = model.get_submodule(owner_name.rpartition(".")[0])
    in_attention = any(_ATTENTION.search(part) for part in owner_name.split(".")[-4:]) or any(
        _ATTENTION.search(type(module).__name__) and any(isinstance(child, nn.Linear) for child in module.children())
        for module in (owner, parent)
    )
    if isinstance(owner, nn.MultiheadAttention) or (_ATTENTION.search(type(owner).__name__) and not is_linear):
        in_attention = True
    if not in_attention or not (is_linear or attribute.endswith("proj_weight")):
        return False
    return low_rank in ("attention", "all") or not _OUT_PROJECTION.search(owner_name)
