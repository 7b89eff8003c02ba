"""How images are made for an encoder: ``size``, ``mean`` and ``std``, checked."""

from collections.abc import Mapping
from typing import Any

from pareto_merging.checkpoints.architecture import checked_size
from pareto_merging.errors import UserError

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def check_preprocessing(preprocessing: Mapping[str, Any], source: str = "preprocessing") -> dict[str, Any]:
    """Return ``size``, ``mean`` and ``std`` and nothing else. Raises UserError if ``preprocessing`` is not ours."""
    checked: dict[str, Any] = {"size": checked_size(preprocessing.get("size"), f"{source}: size")}
    for key in ("mean", "std"):
        given = preprocessing.get(key)
        given = list(given) if isinstance(given, list | tuple) else []
        is_valid = len(given) == 3 and all(
            isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e6 for value in given
        )
        if not is_valid or (key == "std" and min(given) <= 0):
            raise UserError(
                f"{source}: {key}: expected a {'positive ' if key == 'std' else ''}number for each of three channels, "
                f"got {str(preprocessing.get(key))[:80]}"
            )
        checked[key] = [float(value) for value in given]
    return checked
