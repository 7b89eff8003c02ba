"""The groups of units in order of value, by their names in ``--only`` and keys."""

from dataclasses import dataclass

SUITE = "goals"


@dataclass(frozen=True)
class Group:
    """Units that are measured together, and the function that measures them.

    ``seconds``: about what all of it takes on an H100. ``function``: ``module:name``, imported when it is its turn,
    because a machine may lack what a later group needs.
    """

    name: str
    about: str
    seconds: float
    function: str


GROUPS = (
    Group("ceilings", "what this card does at best: a copy, an 8192³ product, L2, a launch", 15, "ceilings:measure"),
    Group("correctness", "the hot kernels against float64, in memory full of NaN", 25, "kernels:correctness"),
    Group("reductions", "reduction of dW and weight gradient of six layers", 45, "kernels:reductions"),
    Group("served-layers", "projections and a block with 32 preferences, cold and warm", 25, "served:layers"),
    Group("serving", "ViT-L/14, 32 images with 32 preferences, and one image", 50, "serving:engine"),
    Group("training-L14", "an optimiser step of ViT-L/14, K = 8", 70, "training:vit_l_14"),
    Group("training-B32", "an optimiser step of ViT-B/32, K = 8", 45, "training:vit_b_32"),
    Group("float32", "the layer-wise computation in its own float32, 32, 16 and 8 images", 60, "training:float32"),
    Group("rest", "few bytes, a data-free run, the layer grid", 150, "rest:measure"),
)
NAMES = tuple(group.name for group in GROUPS)
