"""Names of what the training suite measures."""

from __future__ import annotations

STEP, DATA_FREE = "optimiser step", "data-free step"
AUTO = "auto"
WITHOUT_GRAPHS = "cached, no CUDA graphs"
ONCE = "merged once per step, autograd"
ADAMERGING = "layer-wise AdaMerging's computation"
LIMIT = "limit: merged beforehand, dW of the linear weights"
LIMIT_GRAPH = f"{LIMIT}, CUDA graph"
ALL = "auto, all tasks at once"
