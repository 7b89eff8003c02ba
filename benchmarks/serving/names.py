"""Names of what the serving suite measures."""

from __future__ import annotations

OP = "serving"
LIMIT = "limit: plain merged model"
LIMIT_LINEAR = "limit: plain merged model, linear layers"
ENGINE = "engine"
ENGINE_AGAIN = "engine, the same preference again"
ENGINE_DEVICE = "engine, preferences on the device"
REMERGE = "merge again for each request"
COPIES = "batched product over merged copies"
LOOP = "loop over distinct preferences"
PEFT = "PEFT's mixed batch"
GRAPH = ", CUDA graph"
