"""What untrusted clients meet first: which requests are let in, how bodies are read."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Sequence
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pareto_merging.serving.limits import Limits
from pareto_merging.serving.queries import problem

logger = logging.getLogger(__name__)

LATENCY = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60)
# how long a refused client may go on sending before the connection is closed under it
LINGER_SECONDS = 2.0


class Gate:
    """Knows whether the server is starting, running or stopping, and counts requests.

    ``pending``: let in and not answered yet. ``answered``: since the start. ``cut_off``: let in and not answered,
    because the time to stop ran out.
    """

    def __init__(self, limits: Limits, paths: Sequence[str], open_paths: Sequence[str]) -> None:
        self.limits, self.paths = limits, frozenset(paths)
        self.phase: Literal["starting", "ok", "stopping"] = "starting"
        self.pending = self.answered = self.cut_off = 0
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.labels = {*paths, *open_paths}
        self.requests = Counter(
            "pareto_merging_requests", "Requests by path and status.", ("path", "status"), registry=registry
        )
        self.seconds = Histogram(
            "pareto_merging_request_seconds",
            "Seconds from an accepted request's headers to the end of its answer.",
            ("path",),
            buckets=LATENCY,
            registry=registry,
        )
        gauge = Gauge("pareto_merging_pending_requests", "Requests accepted and not yet answered.", registry=registry)
        gauge.set_function(lambda: self.pending)
        gauge = Gauge("pareto_merging_queue_limit", "Pending requests beyond which a 503 follows.", registry=registry)
        gauge.set(limits.queue)

    def refusal(self) -> str | None:
        """Say why a request cannot be let in now; None if it can."""
        if self.phase != "ok":
            return f"server: expected it to be running, got {self.phase}; try another one or later"
        if self.pending >= self.limits.queue:
            return f"queue: expected fewer than {self.limits.queue} unanswered requests, got {self.pending}; try later"
        return None


class Admission:
    """ASGI middleware that refuses before the body is read and closes politely.

    It counts the body while it is read. A client that is answered while it still sends may lose the answer when the
    connection is closed under it, so what it sends is read and thrown away for a moment first.
    """

    def __init__(self, app: ASGIApp, gate: Gate) -> None:
        self.app, self.gate = app, gate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        gate, start = self.gate, time.monotonic()
        # below a prefix, where the app is mounted or told of one
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        guarded = path in gate.paths and scope["method"] == "POST"
        exchange = _Exchange(scope, receive, send, gate)
        refused = gate.refusal() if guarded else None
        counted = guarded and refused is None
        gate.pending += counted
        try:
            if refused is not None:
                response = JSONResponse({"detail": refused}, 503, {"Retry-After": "1"})
                await response(scope, receive, exchange.send)
            else:
                await self.app(scope, exchange.receive, exchange.send)
        except ClientDisconnect:
            exchange.status = 499
        except asyncio.CancelledError:
            # the time to stop has run out
            gate.cut_off += counted
            if exchange.started:
                raise
            response = JSONResponse({"detail": "server: expected to answer in time, but it is stopping"}, 503)
            await response(scope, receive, exchange.send)
        except Exception:
            logger.exception("%s %s failed", scope["method"], scope["path"])
            if exchange.started:
                raise
            response = JSONResponse({"detail": "server: expected to answer, got an internal error; it is logged"}, 500)
            await response(scope, receive, exchange.send)
        finally:
            gate.pending -= counted
            gate.answered += counted and exchange.finished and exchange.status != 503
            label = path if path in gate.labels else "other"
            gate.requests.labels(label, str(exchange.status)).inc()
            if counted:
                gate.seconds.labels(label).observe(time.monotonic() - start)
        await exchange.linger()


class _Exchange:
    """One request and its answer, between uvicorn and the app."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, gate: Gate) -> None:
        self._receive, self._send, self._gate = receive, send, gate
        self._limits = limits = gate.limits
        headers = dict(scope["headers"])
        length = headers.get(b"content-length", b"")
        self._declared = int(length) if length.isdigit() else None
        has_body = self._declared != 0 and (length or b"transfer-encoding" in headers)
        self._unread = bool(has_body)
        # a client that waits to be told to send; uvicorn tells it when the body is first asked for
        self._waits = b"expect" in headers
        # uvicorn throws away what is left of a small body by itself, where the connection stays open
        stays = b"close" not in headers.get(b"connection", b"").lower() and scope["http_version"] != "1.0"
        self._small = stays and (self._declared or limits.request_bytes + 1) <= limits.request_bytes and not self._waits
        self._deadline = asyncio.get_running_loop().time() + limits.upload
        self._total = 0
        self._lingers = False
        self.status = 500
        self.started = self.finished = False

    async def receive(self) -> Message:
        """Read the next piece of the body. Raises HTTPException: 413 for too many bytes, 408 for too many seconds."""
        if not self._unread:
            return await self._receive()
        limit = self._limits.request_bytes
        if self._declared is not None and self._declared > limit:
            raise problem(413, f"body: expected at most {limit:,} bytes, got {self._declared:,}")
        self._waits = False
        try:
            async with asyncio.timeout_at(self._deadline):
                message = await self._receive()
        except TimeoutError as error:
            self._small = False
            text = f"body: expected all of it within {self._limits.upload:g} s, got {self._total:,} bytes"
            raise problem(408, text) from error
        if message["type"] == "http.request":
            self._total += len(message.get("body", b""))
            self._unread = message.get("more_body", False)
            if self._total > limit:
                self._small = False
                raise problem(413, f"body: expected at most {limit:,} bytes, got more")
        return message

    async def send(self, message: Message) -> None:
        """Pass the answer on, without its end where the client must be listened to first."""
        if message["type"] == "http.response.start":
            self.status, self.started = message["status"], True
            self._lingers = self._unread and (not self._small or self._gate.phase == "stopping")
            if self._lingers:
                message = {**message, "headers": [*message["headers"], (b"connection", b"close")]}
        elif not message.get("more_body", False):
            self.finished = True
            if self._lingers:
                message = {**message, "more_body": True}
        await self._send(message)

    async def linger(self) -> None:
        """Throw away what a client sends for a moment more, then close the connection."""
        if not self._lingers or not self.finished:
            return
        if not self._waits:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LINGER_SECONDS):
                    while (message := await self._receive())["type"] == "http.request" and message.get("more_body"):
                        pass
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})
