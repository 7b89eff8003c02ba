"""The HTTP server on loopback: right answers, clear refusals, nothing mixed up, nothing lost when it stops."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from fastapi import FastAPI
from fastapi.testclient import TestClient
from helpers import noisy_copy, randomize
from PIL import Image
from torch import Tensor

from pareto_merging.checkpoints import encoders
from pareto_merging.cli.app import main
from pareto_merging.model.files import load_folded, load_heads, save_folded
from pareto_merging.model.parametrize import merge, parametrize
from pareto_merging.serving import Engine
from pareto_merging.serving.http import Server, Service, _bind
from pareto_merging.serving.limits import Limits

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


@pytest.fixture(scope="module")
def folded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folded(tmp_path_factory.mktemp("http") / "folded.safetensors")


def picture(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8))


def file(seed: int = 0) -> bytes:
    buffer = io.BytesIO()
    picture(seed).save(buffer, "PNG")
    return buffer.getvalue()


def encoded(seed: int = 0) -> str:
    return base64.b64encode(file(seed)).decode()


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

    def __call__(self, images: Tensor, preferences: Any) -> Tensor:
        assert self.go.wait(WAIT)
        self.batches.append(len(images))
        self.before(preferences)
        return self.after(preferences, self._engine(images, preferences))


class Running:
    """A server in a thread of this process."""

    def __init__(self, engine: Any, limits: Limits) -> None:
        self.engine, self.service = engine, Service(engine, limits)
        ready = threading.Event()
        self.listener = _bind("127.0.0.1", 0)
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


@pytest.fixture(scope="module")
def shared(folded: Path) -> Iterator[Running]:
    with running(folded) as server:
        yield server


def merged_features(folded: Path, gamma: list[float], seed: int = 0) -> Tensor:
    with torch.no_grad():
        return merge(load_folded(folded), gamma)(Engine(folded, "cpu").preprocess(picture(seed))[None])[0]


def near(answer: list[float], expected: Tensor) -> bool:
    return torch.allclose(torch.tensor(answer), expected, rtol=1e-4, atol=1e-5)


PREFERENCES = [
    ([0.2, 0.3, 0.5], [0.2, 0.3, 0.5]),
    ({"größe": 0.6}, [0.2, 0.2, 0.6]),
    ("DTD=1", [0.0, 1.0, 0.0]),
    ("0.2, 0.3, 0.5", [0.2, 0.3, 0.5]),
    ("[0.2, 0.3, 0.5]", [0.2, 0.3, 0.5]),
    ("equal", [1 / 3] * 3),
    (None, [1 / 3] * 3),
    ([1, 0, 0], [1.0, 0.0, 0.0]),
]


@pytest.mark.parametrize(("preference", "gamma"), PREFERENCES)
def test_embed(shared: Running, folded: Path, preference: Any, gamma: list[float]) -> None:
    answer = shared.post("/embed", preference=preference)
    assert answer.status_code == 200, answer.text
    assert near(answer.json()["embedding"], merged_features(folded, gamma))
    assert answer.json()["preference"] == pytest.approx(dict(zip(TASKS, gamma, strict=True)), abs=1e-6)
    fields = {} if preference is None else {"preference": preference}
    fields = {name: value if isinstance(value, str) else json.dumps(value) for name, value in fields.items()}
    form = shared.client.post("/embed", data=fields, files={"image": file()})
    assert form.status_code == 200, form.text
    assert form.json()["preference"] == answer.json()["preference"]
    assert near(form.json()["embedding"], torch.tensor(answer.json()["embedding"]))


def test_classify(shared: Running, folded: Path) -> None:
    gamma = [0.7, 0.1, 0.2]
    chances = load_heads(folded)["DTD"](merged_features(folded, gamma)[None])[0].softmax(-1)
    for top, count in ((2, 2), (5, 5), (100, 5)):
        answer = shared.post("/classify", task="DTD", preference=gamma, top=top)
        assert answer.status_code == 200, answer.text
        assert answer.json()["task"] == "DTD"
        classes = answer.json()["classes"]
        assert [entry["index"] for entry in classes] == chances.argsort(descending=True)[:count].tolist()
        assert near([entry["probability"] for entry in classes], chances.sort(descending=True).values[:count])
    form = shared.client.post("/classify", data={"task": "DTD", "top": "1", "preference": ""}, files={"image": file()})
    assert len(form.json()["classes"]) == 1


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"image": None}, "image: expected an image, got none"),
        ({"image": 3}, "image: expected a file's bytes as base64, got int"),
        ({"image": "a\nb="}, "image: expected base64 without line breaks"),
        ({"image": "größe"}, "image: expected base64"),
        (
            {"image": "aGVsbG8="},
            "image: expected one of PNG, JPEG, WEBP, BMP, PPM, got a file that begins with b'hello'",
        ),
        (
            {"preference": [0.5, 0.5]},
            "preference: expected 3 numbers, one for each of MNIST, DTD, größe; got 2 of them",
        ),
        ({"preference": [True, False, False]}, "preference: expected numbers, got True"),
        ({"preference": ["0.2", "0.3", "0.5"]}, "preference: expected numbers, got '0.2'"),
        ({"preference": [[0.2, 0.3, 0.5]]}, "preference: expected 3 numbers"),
        ({"preference": [0.5, 0.4, 0.2]}, "preference: expected a sum of 1, got 1.1"),
        ({"preference": [1.5, -0.5, 0]}, "preference: expected non-negative numbers"),
        ({"preference": [10**400, 0, 0]}, "preference: expected finite numbers"),
        ({"preference": {"MNIST": 0.7, "DTD": 0.7}}, "preference: expected a sum of at most 1"),
        ({"preference": {"DTB": 0.7}}, "preference: expected a task among DTD, MNIST, größe; got 'DTB'"),
        ({"preference": "DTB=0.7"}, "preference: expected a task among DTD, MNIST, größe; got 'DTB'"),
        ({"preference": {"\ud800": 1}}, "preference: expected a task among"),
        ({"preference": "MNIST=0.1,MNIST=0.2"}, "preference: expected each task once"),
        ({"preference": "{"}, "preference: expected numbers such as"),
        ({"preference": "x" * 10_000}, "preference: expected"),
        ({"preference": 0.5}, "preference: expected 3 numbers"),
        ({"extra": 1}, "extra: expected only image, preference, task, top"),
        ({"task": None}, "task: expected a valid string, got None"),
        ({"task": "größte"}, "task: expected a task among größe, MNIST, DTD; got 'größte'"),
        ({"task": "größe"}, "task: expected one with a zero-shot head (MNIST, DTD), got größe"),
        (
            {"top": 0, "task": 5},
            "task: expected a valid string, got 5; top: expected greater than or equal to 1, got 0",
        ),
        ({"top": True}, "top: expected a valid integer, got True"),
        ({"top": 2.0}, "top: expected a valid integer, got 2.0"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(shared: Running, values: dict[str, Any], expected: str) -> None:
    values = {"image": encoded(), "task": "MNIST", **values}
    answer = shared.client.post("/classify", content=json.dumps(values), headers={"content-type": "application/json"})
    assert answer.status_code == 422
    assert list(answer.json()) == ["detail"]
    detail = answer.json()["detail"]
    assert detail.startswith(expected)
    assert "\n" not in detail and len(detail) < 700


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b"", "body: expected a JSON object"),
        (b"[1]", "body: expected a JSON object, got list"),
        (b"\xff", "body: expected a JSON object"),
        (b'{"preference": [NaN, 1, 0]}', "expected finite numbers, got NaN"),
        (b'{"preference": {"MNIST": 0.1, "MNIST": 0.2}}', "expected each key once, got 'MNIST' twice"),
        (b'{"preference": [1' + b"0" * 5000 + b", 0, 0]}", "body: expected a JSON object"),
        (b"[" * 100_000, "body: expected a JSON object"),
        (b'{"preference": ' + b"[" * 900 + b"]" * 900 + b"}", "preference: expected 3 numbers"),
    ],
)
def test_what_is_not_the_json_expected(shared: Running, body: bytes, expected: str) -> None:
    answer = shared.client.post("/embed", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 422
    assert expected in answer.json()["detail"]


def test_forms_that_are_wrong(shared: Running) -> None:
    def detail(status: int = 422, **request: Any) -> str:
        answer = shared.client.post("/embed", **request)
        assert answer.status_code == status, answer.text
        return str(answer.json()["detail"])

    form = {"content-type": "multipart/form-data; boundary=x"}
    assert detail(data={"preference": "equal"}, files={"other": b"1"}).startswith(
        "other: expected the file in the field"
    )
    assert detail(files={"image": (None, "text")}).startswith("image: expected a file (curl: -F image=@photo.jpg), got")
    assert detail(files={"image": file()}, params={"preference": "MNIST=1"}) == (
        "query: expected fields in the body, as JSON or a form, got preference in the URL"
    )
    assert "twice" in detail(data={"preference": ["equal", "equal"]}, files={"image": file()})
    assert "Too many files" in detail(files=[("image", file()), ("image", file())])
    assert "extra: expected only" in detail(data={"extra": "1"}, files={"image": file()})
    assert "boundary" in detail(content=b"abc", headers={"content-type": "multipart/form-data"})
    assert detail(content=b"abc", headers=form).startswith("body: expected multipart/form-data")
    cut = b'--x\r\ncontent-disposition: form-data; name="image"; filename="a"\r\n\r\n' + file()[:20]
    assert detail(content=cut, headers=form).startswith(("body: expected", "image: expected"))
    assert "got 'text/plain'" in detail(415, content=b"abc", headers={"content-type": "text/plain"})
    assert "got none" in detail(415, content=b"abc")


def test_pages(shared: Running) -> None:
    assert shared.client.get("/health").json() == {"status": "ok"}
    assert shared.client.head("/health").status_code == 200
    assert shared.client.get("/redoc").status_code == 404
    card = shared.client.get("/model").json()
    assert [(task["name"], task["classes"]) for task in card["tasks"]] == [("MNIST", 4), ("DTD", 5), ("größe", None)]
    assert card["limits"]["queue"] == 256 and card["image_size"] == SIZE
    assert card["file"]["rank"] == 4
    assert shared.client.get("/docs").status_code == 200
    paths = shared.client.get("/openapi.json").json()["paths"]
    for path in ("/classify", "/embed"):
        content = paths[path]["post"]["requestBody"]["content"]
        assert content["multipart/form-data"]["schema"]["properties"]["image"]["format"] == "binary"
        assert "image" in content["application/json"]["schema"]["required"]
        assert {"200", "408", "413", "415", "422", "500", "503"} <= set(paths[path]["post"]["responses"])
    assert shared.client.get("/classify").status_code == 405
    assert shared.client.post("/nothing", content=b"x").status_code == 404


def test_metrics(folded: Path) -> None:
    with running(folded) as server:
        assert server.post("/embed").status_code == 200
        assert server.post("/embed", preference=[1]).status_code == 422
        server.client.get("/../../etc/passwd")
        text = server.client.get("/metrics").text
    assert 'pareto_merging_requests_total{path="/embed",status="200"} 1.0' in text
    assert 'pareto_merging_requests_total{path="/embed",status="422"} 1.0' in text
    assert 'path="other",status="404"' in text
    assert "pareto_merging_batch_size_count 1.0" in text
    assert "pareto_merging_pending_requests 0.0" in text


@pytest.mark.parametrize("chunked", [False, True])
def test_too_large_a_request(folded: Path, chunked: bool) -> None:
    with running(folded, request_bytes=4096, image_bytes=1024) as server:
        headers = {"content-type": "application/json"}
        for size, status in ((4096, 422), (4097, 413), (3_000_000, 413)):
            content: Any = b" " * size
            answer = server.client.post("/embed", content=iter([content]) if chunked else content, headers=headers)
            assert answer.status_code == status
        assert answer.json()["detail"].startswith("body: expected at most 4,096 bytes, got")
        answer = server.client.post("/embed", json={"image": "a" * 1400})
        assert answer.status_code == 413 and answer.json()["detail"].startswith("image: expected at most 1,024 bytes")
        answer = server.client.post("/embed", files={"image": bytes(1025)})
        assert answer.status_code == 413 and answer.json()["detail"] == "image: expected at most 1,024 bytes, got 1,025"
        assert server.post("/embed").status_code == 200


def test_an_answer_arrives_although_the_body_was_not_read(folded: Path) -> None:
    # the connection is closed after the answer, which must not be overtaken by a reset
    fields = b"".join(b'--x\r\ncontent-disposition: form-data; name="a%d"\r\n\r\n1\r\n' % n for n in range(50_000))
    with running(folded) as server:
        for headers, body, status in (
            ("content-type: multipart/form-data; boundary=x", fields, b"422"),
            ("content-type: text/plain", bytes(3_000_000), b"415"),
        ):
            with server.connect() as client:
                head = f"POST /embed HTTP/1.1\r\nhost: x\r\nconnection: close\r\n{headers}\r\n"
                client.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
                assert client.makefile("rb").read()[9:12] == status


def test_a_slow_upload(folded: Path) -> None:
    with running(folded, upload=0.3) as server, server.connect() as client:
        client.sendall(
            b"POST /embed HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 99\r\n\r\n{"
        )
        answer = client.makefile("rb").read()
        assert answer.startswith(b"HTTP/1.1 408") and b"expected all of it within 0.3 s, got 1 bytes" in answer
        assert server.service.gate.pending == 0


def test_silent_connections_are_closed(folded: Path) -> None:
    with running(folded, idle=0.1) as server, server.connect() as nothing, server.connect() as half:
        half.sendall(b"GET /health HTTP/1.1\r\nhost:")
        assert nothing.recv(1) == b"" and half.recv(1) == b""
        assert server.client.get("/health").status_code == 200


def test_a_full_queue_is_said_at_once(folded: Path) -> None:
    with running(folded, queue=3) as server, ThreadPoolExecutor(3) as pool:
        server.engine.go.clear()
        accepted = [pool.submit(server.post, "/embed", preference="MNIST=1") for _ in range(3)]
        server.wait_for_pending(3)
        answer = server.post("/embed")
        assert answer.status_code == 503 and answer.headers["retry-after"] == "1"
        assert answer.json()["detail"].startswith("queue: expected fewer than 3 unanswered requests, got 3")
        # refused before its body is sent
        with server.connect() as client:
            client.sendall(b"POST /embed HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\n")
            assert client.recv(12) == b"HTTP/1.1 503"
        assert server.client.get("/health").status_code == 200
        assert "pareto_merging_pending_requests 3.0" in server.client.get("/metrics").text
        server.engine.go.set()
        assert [future.result().status_code for future in accepted] == [200] * 3
        assert server.post("/embed").status_code == 200


def test_limits_hold_below_a_prefix(folded: Path) -> None:
    service = Service(Engine(folded, "cpu"), Limits(queue=1))
    outer = FastAPI(lifespan=lambda app: service.app.router.lifespan_context(service.app))
    outer.mount("/v1", service.app)
    with TestClient(outer) as client:
        assert client.get("/v1/health").status_code == 200
        assert client.post("/v1/embed", json={"image": encoded()}).status_code == 200
        service.gate.pending = 1
        assert client.post("/v1/embed", json={"image": encoded()}).status_code == 503
        service.gate.pending = 0
        text = client.get("/v1/metrics").text
    assert 'pareto_merging_requests_total{path="/embed",status="503"} 1.0' in text


def test_users_in_one_batch_get_their_own_models(folded: Path) -> None:
    gammas = [[k / 10, 1 - k / 10, 0.0] for k in range(11)]
    with running(folded) as server, ThreadPoolExecutor(11) as pool:
        server.engine.go.clear()
        first = pool.submit(server.post, "/embed")
        server.wait_for_pending(1)
        futures = [
            pool.submit(server.post, "/embed", image=encoded(k), preference=gamma) for k, gamma in enumerate(gammas[:5])
        ] + [
            pool.submit(server.post, "/classify", task="DTD", image=encoded(k), preference=gammas[k], top=5)
            for k in range(5, 10)
        ]
        server.wait_for_pending(11)
        server.engine.go.set()
        assert first.result().status_code == 200
        answers = [future.result().json() for future in futures]
        assert max(server.engine.batches) > 1
    head = load_heads(folded)["DTD"]
    for k, answer in enumerate(answers):
        expected = merged_features(folded, gammas[k], k)
        if k < 5:
            assert near(answer["embedding"], expected)
        else:
            chances = head(expected[None])[0].softmax(-1)
            assert near([entry["probability"] for entry in answer["classes"]], chances.sort(descending=True).values)


def test_only_the_item_to_blame_fails(folded: Path) -> None:
    def blame(gammas: Tensor) -> None:
        if bool((gammas[:, 0] == 1).any()):
            raise RuntimeError("secret")

    with running(folded) as server, ThreadPoolExecutor(5) as pool:
        server.engine.before = blame
        server.engine.go.clear()
        futures = [pool.submit(server.post, "/embed", preference=f"MNIST={value}") for value in (0, 0.5, 1, 0.7, 0.2)]
        server.wait_for_pending(5)
        server.engine.go.set()
        answers = [future.result() for future in futures]
        assert [answer.status_code for answer in answers] == [200, 200, 500, 200, 200]
        assert "secret" not in answers[2].text and answers[2].json()["detail"].startswith("model: expected")
        assert near(answers[1].json()["embedding"], merged_features(folded, [0.5, 0.25, 0.25]))
        assert server.post("/embed", preference="MNIST=1").status_code == 500
        assert server.client.get("/health").json() == {"status": "failing"}
        assert server.post("/embed").status_code == 200
        assert server.client.get("/health").status_code == 200


@pytest.mark.parametrize("path", ["/embed", "/classify"])
def test_numbers_that_are_not_finite(folded: Path, path: str) -> None:
    def spoil(gammas: Tensor, features: Tensor) -> Tensor:
        return torch.where(gammas[:, :1] == 1, torch.nan, features)

    task = {"task": "MNIST"} if path == "/classify" else {}
    with running(folded) as server, ThreadPoolExecutor(3) as pool:
        server.engine.after = spoil
        server.engine.go.clear()
        futures = [pool.submit(server.post, path, preference=f"MNIST={value}", **task) for value in (0, 1, 0.5)]
        server.wait_for_pending(3)
        server.engine.go.set()
        answers = [future.result() for future in futures]
    assert [answer.status_code for answer in answers] == [200, 500, 200]
    assert answers[1].json()["detail"] == "model: expected finite numbers, got NaN or inf"


def test_a_model_that_takes_one_preference_at_a_time(folded: Path) -> None:
    class Single(Controlled):
        per_item = False

        def __call__(self, images: Tensor, preferences: Any) -> Tensor:
            assert preferences.ndim == 1
            return super().__call__(images, preferences)

    server = Running(Single(Engine(folded, "cpu")), Limits())
    try:
        with ThreadPoolExecutor(5) as pool:
            server.engine.go.clear()
            values = (0, 0.5, 1, 0.5, 0.2)
            futures = [pool.submit(server.post, "/embed", preference=f"MNIST={value}") for value in values]
            server.wait_for_pending(5)
            server.engine.go.set()
            answers = [future.result().json() for future in futures]
    finally:
        server.stop()
    for value, answer in zip(values, answers, strict=True):
        assert near(answer["embedding"], merged_features(folded, [value, (1 - value) / 2, (1 - value) / 2]))


def test_clients_that_go_away(folded: Path) -> None:
    whole = json.dumps({"image": encoded()}).encode()
    head = f"POST /embed HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(whole)}\r\n\r\n"
    with running(folded) as server:
        # in the middle of the body; after it; with only their sending side
        for body, leave in (
            (whole[:9], lambda client: client.close()),
            (whole, lambda client: client.close()),
            (whole, lambda client: client.shutdown(socket.SHUT_WR)),
        ):
            server.engine.go.clear()
            client = server.connect()
            client.sendall(head.encode() + body)
            server.wait_for_pending(1)
            leave(client)
            server.engine.go.set()
            server.wait_for_pending(0)
            client.close()
        assert server.post("/embed").status_code == 200


def test_stopping_answers_what_was_accepted(folded: Path) -> None:
    server = Running(Controlled(Engine(folded, "cpu")), Limits())
    values = (0, 0.1, 0.5, 0.9)
    with ThreadPoolExecutor(4) as pool, server.connect() as kept:
        server.engine.go.clear()
        kept.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
        assert kept.recv(12) == b"HTTP/1.1 200"
        futures = [pool.submit(server.post, "/embed", preference=f"MNIST={value}") for value in values]
        server.wait_for_pending(4)
        server.server.handle_exit(signal.SIGTERM, None)
        kept.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
        rest = kept.makefile("rb").read()
        assert b"HTTP/1.1 503" in rest and b'{"status":"stopping"}' in rest
        # the connection that was open is closed now, and no other one is taken
        with pytest.raises(ConnectionRefusedError):
            server.connect()
        assert server.service.gate.pending == 4 and server.thread.is_alive()
        server.engine.go.set()
        answers = [future.result() for future in futures]
        server.thread.join(WAIT)
    assert not server.thread.is_alive()
    assert server.service.gate.answered == 4 and server.service.gate.cut_off == 0
    for value, answer in zip(values, answers, strict=True):
        assert answer.status_code == 200
        assert near(answer.json()["embedding"], merged_features(folded, [value, (1 - value) / 2, (1 - value) / 2]))
    server.client.close()


def test_stopping_does_not_wait_for_ever(folded: Path) -> None:
    server = Running(Controlled(Engine(folded, "cpu")), Limits(shutdown=1))
    with ThreadPoolExecutor(1) as pool:
        server.engine.go.clear()
        future = pool.submit(server.post, "/embed")
        server.wait_for_pending(1)
        server.server.handle_exit(signal.SIGTERM, None)
        answer = future.result()
        assert answer.status_code == 503
        assert answer.json()["detail"] == "server: expected to answer in time, but it is stopping"
        server.engine.go.set()
        server.thread.join(WAIT)
    assert not server.thread.is_alive()
    assert server.service.gate.cut_off == 1
    server.client.close()


def serve(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stop:
        main(["serve", *map(str, arguments)])
    return int(stop.value.code or 0)


def test_mistakes_are_one_line(folded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    foreign = tmp_path / "foreign.safetensors"
    foreign.write_bytes(b"hello")
    with _bind("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        for arguments, expected in (
            ((folded, "--port", port), f"--port: expected a free port, got {port}, which is in use on 127.0.0.1"),
            ((folded, "--host", "192.0.2.1"), "--host: expected a name or address of this machine, got '192.0.2.1'"),
            ((folded, "--host", "no such host"), "--host: expected a name or address of this machine"),
            ((tmp_path / "none.safetensors", "--port", 0), "none.safetensors: expected"),
            ((foreign, "--port", 0), "foreign.safetensors: expected"),
            ((folded, "--port", 0, "--device", "cuda:99"), "device: expected one that is here, got cuda:99"),
            ((folded, "--port", 0, "--dtype", "int8"), "dtype: expected one of float32"),
            ((folded, "--formats", "PNG,EPS"), "formats: expected formats of PNG"),
            ((folded, "--wait", 0), "wait: expected a value greater than or equal to 0.1, got 0.0"),
        ):
            assert serve(*arguments) == 2
            error = capsys.readouterr().err
            assert expected in error and error.count("\n") == 1


def test_other_machines_are_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert serve(tmp_path / "none", "--host", "0.0.0.0", "--port", 0) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and "warning: 0.0.0.0 can be reached from other machines" in lines[0]


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    assert serve("--help") == 0
    text = capsys.readouterr().out
    for limit in Limits.model_fields:
        assert f"--{limit.replace('_', '-')}" in text


def test_without_the_extra_it_says_so(folded: Path) -> None:
    hidden = "import sys; sys.modules['fastapi'] = None; from pareto_merging.cli.app import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", hidden, "serve", str(folded)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2
    assert done.stderr == (
        "pareto-merging: serve: expected the serve extra (pip install 'pareto-merging[serve]'), got no module named "
        "fastapi\n"
    )


def test_an_interrupt_while_warming_up_is_one_line(folded: Path) -> None:
    endless = (
        "import threading, pareto_merging.serving.engine as engine\n"
        "def warm_up(self, progress):\n    print('warming', flush=True)\n    threading.Event().wait()\n"
        "engine.Engine.warm_up = warm_up\n"
        "from pareto_merging.cli.app import main; main()"
    )
    command = [sys.executable, "-c", endless, "serve", str(folded), "--port", "0", "--device", "cpu"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == "warming\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(WAIT) == 130
        assert process.stderr.read() == "pareto-merging: interrupted\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_end_the_process_with_nothing_lost(folded: Path, number: signal.Signals) -> None:
    command = [sys.executable, "-m", "pareto_merging", "serve", str(folded), "--port", "0", "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    with process:
        line = process.stdout.readline()
        assert line.endswith("  (docs: /docs)\n")
        url = line.split()[0]
        answered = 0
        with httpx.Client(base_url=url, trust_env=False, timeout=WAIT) as client:
            for _ in range(5):
                answered += client.post("/embed", json={"image": encoded()}).status_code == 200
            process.send_signal(number)
            # a client that goes on: refusals only, until there is nobody to ask
            with contextlib.suppress(httpx.TransportError):
                while True:
                    answered += client.post("/embed", json={"image": encoded()}).status_code == 200
        assert process.wait(WAIT) == 0
        assert process.stderr is not None
        error = process.stderr.read()
    assert f"stopped; {answered} requests answered" in error and "Traceback" not in error
