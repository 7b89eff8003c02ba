"""Where only torch, triton and pytest are installed, the tests of whole models are left out."""

from __future__ import annotations

import importlib.util

collect_ignore = (
    []
    if importlib.util.find_spec("pydantic") and importlib.util.find_spec("pymoo")
    else ["test_models.py", "test_methods.py", "test_engine.py"]
)
