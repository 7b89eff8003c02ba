"""A server in a thread of the test process around an engine that can be held up."""

import base64
import contextlib
import io
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
from helpers import noisy_copy, randomize
from PIL import Image
from torch import Tensor

from pareto_merging.checkpoints import encoders
from pareto_merging.model.files import load_folded, save_folded
from pareto_merging.model.fold import merge
from pareto_merging.model.parametrize import parametrize
from pareto_merging.serving import Engine
from pareto_merging.serving.http import Service
from pareto_merging.serving.limits import Limits
from pareto_merging.serving.server import Server, bind

TASKS = ("MNIST", "DTD", "größe")
SIZE = 8
WAIT = 30


def make_folded(path: Path, **arguments: Any) -> Path:
    """A folded file of three tasks; the last one has no head."""
    arguments = {"image_size": SIZE, "patch_size": 4, "width": 32, "layers": 2, "heads": 2, **arguments}
    description = {"arguments": {"mlp_ratio": 2.0, "output_dim": 8, **arguments}}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = encoders.build(description)
        heads = {name: (torch.randn(4 + number, 8), 10.0) for number, name in enumerate(TASKS[:2])}
    copies = {name: noisy_copy(model, seed=number + 1, scale=0.2) for number, name in enumerate(TASKS)}
    save_folded(randomize(parametrize(model, copies, rank=4)), path, heads=heads, encoder=description)
    return path


def picture(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8))


def png(seed: int = 0) -> bytes:
    buffer = io.BytesIO()
    picture(seed).save(buffer, "PNG")
    return buffer.getvalue()


def encoded(seed: int = 0) -> str:
    return base64.b64encode(png(seed)).decode()


class Controlled:
    """An engine that can be held up and made to fail."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.go, self.batches = threading.Event(), []
        self.go.set()
        self.before: Callable[[Tensor], None] = lambda gammas: None
        self.after: Callable[[Tensor, Tensor], Tensor] = lambda gammas, features: features

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def features(self, images: Tensor, gamma: Tensor) -> Tensor:
        assert self.go.wait(WAIT)
        self.batches.append(len(images))
        self.before(gamma)
        return self.after(gamma, self._engine.features(images, gamma))


class Running:
    """A server in a thread of this process."""

    def __init__(self, engine: Any, limits: Limits) -> None:
        self.engine, self.service = engine, Service(engine, limits)
        ready = threading.Event()
        self.listener = bind("127.0.0.1", 0)
        self.address = self.listener.getsockname()
        self.server = Server(self.service, ready.set)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.listener]})
        self.thread.start()
        assert ready.wait(WAIT)
        self.client = httpx.Client(base_url=self.url, trust_env=False, timeout=WAIT)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.address[1]}"

    def post(self, path: str, **values: Any) -> httpx.Response:
        return self.client.post(path, json={"image": encoded(), **values})

    def connect(self) -> socket.socket:
        return socket.create_connection(self.address, timeout=WAIT)

    def wait_for_pending(self, count: int) -> None:
        tick = threading.Event()
        for _ in range(WAIT * 100):
            if self.service.gate.pending == count:
                return
            tick.wait(0.01)
        raise AssertionError(f"expected {count} pending requests, got {self.service.gate.pending}")

    def stop(self) -> None:
        self.engine.go.set()
        self.client.close()
        self.server.handle_exit(signal.SIGTERM, None)
        self.thread.join(WAIT)
        assert not self.thread.is_alive()


@contextlib.contextmanager
def running(folded: Path, **limits: Any) -> Iterator[Running]:
    server = Running(Controlled(Engine(folded, "cpu")), Limits(**limits))
    try:
        yield server
    finally:
        server.stop()


def merged_features(folded: Path, gamma: list[float], seed: int = 0) -> Tensor:
    with torch.no_grad():
        return merge(load_folded(folded), gamma)(Engine(folded, "cpu").preprocess(picture(seed))[None])[0]


def near(answer: list[float], expected: Tensor) -> bool:
    return torch.allclose(torch.tensor(answer), expected, rtol=1e-4, atol=1e-5)
