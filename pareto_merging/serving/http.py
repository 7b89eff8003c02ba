"""The HTTP server: a FastAPI app around an :class:`Engine`, and how uvicorn runs it until it is told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import json
import logging
import math
import os
import socket
import sys
import time
import warnings
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import python_multipart  # noqa: F401 - starlette finds out that it is missing in the first form
import torch
import uvicorn
from fastapi import FastAPI, Request, Response
from PIL import Image
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel, Field

from pareto_merging.errors import UserError, user_errors
from pareto_merging.serving.admission import Admission, Gate
from pareto_merging.serving.batching import Batcher, Item, NotFinite
from pareto_merging.serving.images import ImageError, decode_image
from pareto_merging.serving.limits import Limits
from pareto_merging.serving.queries import (
    JSON,
    MULTIPART,
    ClassifyFields,
    EmbedFields,
    Query,
    Tasks,
    parse_query,
    problem,
    read_body,
)

if TYPE_CHECKING:
    from pareto_merging.serving.engine import Engine

# connections that stay open are told that the server stops before they are closed
DRAIN_SECONDS = 0.2
MAX_FILES = 2**16


class Problem(BaseModel):
    """Every answer that is not a success."""

    detail: str = Field(description="One line: what was expected and what came.")


class Health(BaseModel):
    status: str = Field(description="ok; or starting, stopping, failing (the last batch failed), with a 503.")


class TaskCard(BaseModel):
    name: str
    classes: int | None = Field(description="How many classes its zero-shot head has; null: no head, only /embed.")


class ModelCard(BaseModel):
    tasks: list[TaskCard] = Field(description="In the order of a preference's weights.")
    image_size: int = Field(description="Side in pixels that images are resized and cropped to.")
    device: str
    dtype: str
    limits: Limits
    file: dict[str, Any] = Field(description="What the folded file says about itself.")


class Class(BaseModel):
    index: int = Field(description="The row of the task's zero-shot head, from 0.")
    probability: float


class Classification(BaseModel):
    task: str
    preference: dict[str, float] = Field(description="The preference used, by task name.")
    classes: list[Class] = Field(description="Most probable first.")


class Embedding(BaseModel):
    preference: dict[str, float] = Field(description="The preference used, by task name.")
    embedding: list[float] = Field(description="The merged encoder's features; their length is not normalised.")


PROBLEMS: dict[int | str, dict[str, Any]] = {
    code: {"model": Problem, "description": text}
    for code, text in {
        408: "The body took too long to arrive.",
        413: "The request or the image has too many bytes.",
        415: "Neither JSON nor a form.",
        422: "A field, the preference, the task or the image is not what was expected.",
        500: "The model failed on this image.",
        503: "The queue is full or the server is stopping: try again after `Retry-After` seconds.",
    }.items()
}


def _request_body(fields: type[EmbedFields]) -> dict[str, Any]:
    """OpenAPI's description of a POST: JSON, or a form with a file."""
    schema = fields.model_json_schema()
    properties, required = schema["properties"], ["image", *schema.get("required", ())]
    file = {"type": "string", "format": "binary", "description": "The image file."}
    encoded = {"type": "string", "format": "byte", "description": "The image file as base64, without line breaks."}
    text = {**properties["preference"], "type": "string"}
    text.pop("anyOf")
    bodies = {
        MULTIPART: {"image": file, **properties, "preference": text},
        JSON: {"image": encoded, **properties},
    }
    content = {
        kind: {
            "schema": {"type": "object", "properties": body, "required": required, "additionalProperties": False},
        }
        for kind, body in bodies.items()
    }
    return {"requestBody": {"required": True, "content": content}}


def create_app(engine: Engine, limits: Limits | None = None) -> FastAPI:
    """The server's app: ``uvicorn.run(create_app(Engine(path)))``, or under any other ASGI server.

    The engine is warmed up when the app starts, unless :func:`run` has done so. The app belongs to one event loop.
    """
    return Service(engine, limits or Limits()).app


class Service:
    """One engine behind one app."""

    def __init__(self, engine: Engine, limits: Limits) -> None:
        self.engine, self.limits = engine, limits
        self.tasks = Tasks(
            tuple(engine.task_names), {name: head.weight.shape[0] for name, head in engine.heads.items()}
        )
        said = {key: value for key, value in engine.card.items() if key not in ("tasks", "device", "dtype")}
        self.card = ModelCard(
            tasks=[TaskCard(name=name, classes=self.tasks.classes.get(name)) for name in self.tasks.names],
            image_size=engine.image_size,
            device=str(engine.device),
            dtype=str(engine.dtype).removeprefix("torch."),
            limits=limits,
            # a header may hold NaN, which JSON cannot
            file=json.loads(json.dumps(said), parse_constant=str),
        )
        self.gate = Gate(limits, ["/classify", "/embed"], ["/health", "/metrics", "/model", "/docs", "/openapi.json"])
        self.batcher = Batcher(engine, limits, self.gate.registry)
        self.app = app = FastAPI(
            title="Pareto Merging",
            description="A merged model for any preference over its tasks, chosen request by request.",
            lifespan=self._lifespan,
            redoc_url=None,
        )
        app.add_middleware(Admission, gate=self.gate)
        app.get("/health", response_model=Health, responses={503: {"model": Health}})(self.health)
        app.head("/health", include_in_schema=False)(self.health)
        app.get("/metrics", response_class=Response)(self.metrics)
        app.get("/model", response_model=ModelCard)(self.model)
        app.post(
            "/classify",
            response_model=Classification,
            responses=PROBLEMS,
            openapi_extra=_request_body(ClassifyFields),
        )(self.classify)
        app.post("/embed", response_model=Embedding, responses=PROBLEMS, openapi_extra=_request_body(EmbedFields))(
            self.embed
        )

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        await asyncio.wrap_future(self.batcher.warm_up())
        if self.gate.phase == "starting":
            self.gate.phase = "ok"
        try:
            yield
        finally:
            self.gate.phase = "stopping"
            self.batcher.close()

    async def health(self, response: Response) -> Health:
        """Whether requests are taken: 200 ok, or 503."""
        status = "failing" if self.gate.phase == "ok" and self.batcher.failing else self.gate.phase
        response.status_code = 200 if status == "ok" else 503
        return Health(status=status)

    async def metrics(self) -> Response:
        """Prometheus' text format."""
        return Response(generate_latest(self.gate.registry), media_type=CONTENT_TYPE_LATEST)

    async def model(self) -> ModelCard:
        """The model card: tasks, limits, and what the folded file says about itself."""
        return self.card

    async def classify(self, request: Request) -> Classification:
        """The most probable classes of one task for an image, by the merged model of the preference."""
        query, answer = await self._answer(request, ClassifyFields)
        classes = [Class(index=index, probability=probability) for index, probability in answer]
        return Classification(task=str(query.task), preference=self._named(query), classes=classes)

    async def embed(self, request: Request) -> Embedding:
        """The features of an image by the merged encoder of the preference, not normalised."""
        query, answer = await self._answer(request, EmbedFields)
        return Embedding(preference=self._named(query), embedding=answer)

    async def _answer(self, request: Request, fields: type[EmbedFields]) -> tuple[Query, Any]:
        if request.query_params:
            named = ", ".join(list(request.query_params)[:5])
            raise problem(422, f"query: expected fields in the body, as JSON or a form, got {named} in the URL")
        body = await read_body(request)
        query, image = await self.batcher.decode(self._read, body, fields)
        try:
            return query, await self.batcher(Item(image, query.preference, query.task, query.top))
        except NotFinite as error:
            raise problem(500, error) from error
        except Exception as error:
            raise problem(500, "model: expected an answer, got an error; it is logged") from error

    def _read(self, body: bytes | dict[str, Any], fields: type[EmbedFields]) -> tuple[Query, torch.Tensor]:
        query = parse_query(body, fields, self.tasks, self.limits)
        try:
            image = decode_image(query.image, self.limits)
        except ImageError as error:
            raise problem(422, error) from error
        return query, self.engine.preprocess(image)

    def _named(self, query: Query) -> dict[str, float]:
        # float32 to seven digits: 0.7 and not 0.699999988079071
        return {name: round(value, 7) for name, value in zip(self.tasks.names, query.preference.tolist(), strict=True)}


class Server(uvicorn.Server):
    """uvicorn, which says when it is ready, tells clients that it stops, and closes connections that stay silent."""

    def __init__(self, service: Service, on_ready: Callable[[], None]) -> None:
        limits = service.limits
        config = uvicorn.Config(
            service.app,
            # unlike httptools it limits how long headers may be
            http="h11",
            ws="none",
            lifespan="on",
            log_config=None,
            log_level="error",
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=math.ceil(limits.idle),
            timeout_graceful_shutdown=limits.shutdown,
        )
        super().__init__(config)
        self._gate, self._on_ready = service.gate, on_ready
        # connection -> (its last request, since when it has been silent)
        self._silent: WeakKeyDictionary[Any, tuple[Any, float]] = WeakKeyDictionary()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # uvicorn raises the signal again when all is done, which would spoil the exit code
        self._gate.phase = "stopping"
        self.force_exit = self.should_exit
        self.should_exit = True

    async def on_tick(self, counter: int) -> bool:
        if counter % 10 == 0:
            self._close_silent()
        return await super().on_tick(counter)

    def _close_silent(self) -> None:
        # uvicorn has no limit on how long a client takes for its first request or for a request's headers
        now = time.monotonic()
        for connection in list(self.server_state.connections):
            cycle: Any = getattr(connection, "cycle", None)
            if cycle is not None and not cycle.response_complete:
                self._silent.pop(connection, None)
                continue
            last, since = self._silent.setdefault(connection, (cycle, now))
            if last is not cycle:
                self._silent[connection] = (cycle, now)
            elif now - since > self._gate.limits.idle:
                connection.shutdown()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        print(f"pareto-merging: stopping, {self._gate.pending} requests in hand", file=sys.stderr, flush=True)
        # what is cut off is counted and said at the end
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        for server in self.servers:
            server.close()
        # open connections are answered 503 for a moment, so that no client writes into one that is being closed
        await asyncio.sleep(DRAIN_SECONDS)
        await super().shutdown(sockets)


def run(
    file: Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    device: str = "auto",
    dtype: str | None = None,
    limits: Limits | None = None,
    threads: int | None = None,
    keep_merged: bool = True,
    progress: bool = True,
    on_warning: Callable[[str], None] = warnings.warn,
) -> int:
    """Serve a folded file until SIGTERM or Ctrl-C; how many accepted requests it had no time to answer, usually 0.

    Args:
        port: 0 takes a free one. device, dtype, keep_merged: as for :class:`Engine`. threads: CPU threads of the
            model.

    Raises:
        UserError: a port in use, a host that is not here, and what :class:`Engine` raises.
    """
    from pareto_merging.serving.engine import Engine

    limits = limits or Limits()
    listener = _bind(host, port)
    with listener:
        bound = listener.getsockname()
        if not ipaddress.ip_address(bound[0]).is_loopback:
            on_warning(f"{host} can be reached from other machines, and there is no authentication")
        if threads is not None:
            torch.set_num_threads(threads)
        # what a client sends is answered, not logged; limits.pixels decides how large an image may be
        logging.getLogger("python_multipart").setLevel(logging.ERROR)
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        with user_errors():
            engine = Engine(file, device, dtype, max_batch=limits.max_batch, keep_merged=keep_merged)
        service = Service(engine, limits)
        try:
            service.batcher.warm_up(progress).result()
        except KeyboardInterrupt:
            # the interpreter would wait for the thread, which cannot be interrupted; there is nothing to keep
            print("pareto-merging: interrupted", file=sys.stderr, flush=True)
            os._exit(130)
        shown = f"[{bound[0]}]" if ":" in bound[0] else bound[0]
        _raise_file_limit()
        server = Server(service, lambda: print(f"http://{shown}:{bound[1]}  (docs: /docs)", flush=True))
        server.run(sockets=[listener])
    gate = service.gate
    print(f"pareto-merging: stopped; {gate.answered} requests answered", file=sys.stderr)
    return gate.cut_off


def _bind(host: str, port: int) -> socket.socket:
    """A socket that holds host and port, and listens only when the server is ready."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except (OSError, UnicodeError) as error:
        raise UserError(f"--host: expected a name or address of this machine, got {host!r}") from error
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise UserError(f"--port: expected a free port, got {port}, which is in use on {host}") from error
        if error.errno == errno.EADDRNOTAVAIL:
            raise UserError(f"--host: expected a name or address of this machine, got {host!r}") from error
        raise UserError(f"--port: expected a port that may be bound, got {port}: {error.strerror}") from error
    return listener


def _raise_file_limit() -> None:
    """As many open connections as the system allows: the usual soft limit is 1024."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, MAX_FILES), hard))
