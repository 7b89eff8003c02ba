"""Which requests are let in: sizes, slow and vanished clients, a full queue."""

import json
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from support.servers import (
    encoded,
    running,
)

from pareto_merging.serving import Engine
from pareto_merging.serving.http import Service
from pareto_merging.serving.limits import Limits


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
