"""The HTTP interface: a FastAPI app around an :class:`Engine`."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

import python_multipart  # noqa: F401 - starlette finds out that it is missing in the first form
from fastapi import FastAPI, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel, Field

from pareto_merging.serving import queries
from pareto_merging.serving.admission import Admission, Gate
from pareto_merging.serving.batching import Batcher, Item, NotFinite
from pareto_merging.serving.engine import Engine
from pareto_merging.serving.limits import Limits


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


def create_app(engine: Engine, limits: Limits | None = None) -> FastAPI:
    """Make the server's app: ``uvicorn.run(create_app(Engine(path)))``, or any other ASGI server, with one event loop.

    The engine is warmed up when the app starts, unless :func:`.server.run` has done so.
    """
    return Service(engine, limits or Limits()).app


class Service:
    """One engine behind one app."""

    def __init__(self, engine: Engine, limits: Limits) -> None:
        self.engine, self.limits = engine, limits
        classes = {name: head.weight.shape[0] for name, head in engine.heads.items()}
        self.tasks = queries.Tasks(tuple(engine.task_names), classes)
        about = {key: value for key, value in engine.card.items() if key not in ("tasks", "device", "dtype")}
        self.card = ModelCard(
            tasks=[TaskCard(name=name, classes=classes.get(name)) for name in self.tasks.names],
            image_size=engine.image_size,
            device=str(engine.device),
            dtype=str(engine.dtype).removeprefix("torch."),
            limits=limits,
            # a header may hold NaN, which JSON cannot
            file=json.loads(json.dumps(about), parse_constant=str),
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
        app.get("/health", responses={503: {"model": Health}})(self.health)
        app.head("/health", include_in_schema=False)(self.health)
        app.get("/metrics", response_class=Response)(self.metrics)
        app.get("/model")(self.model)
        app.post("/classify", responses=PROBLEMS, openapi_extra=queries.request_body(queries.ClassifyFields))(
            self.classify
        )
        app.post("/embed", responses=PROBLEMS, openapi_extra=queries.request_body(queries.EmbedFields))(self.embed)

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
        """Say whether requests are taken: 200 ok, or 503."""
        status = "failing" if self.gate.phase == "ok" and self.batcher.failing else self.gate.phase
        response.status_code = 200 if status == "ok" else 503
        return Health(status=status)

    async def metrics(self) -> Response:
        """Give the metrics in Prometheus' text format."""
        return Response(generate_latest(self.gate.registry), media_type=CONTENT_TYPE_LATEST)

    async def model(self) -> ModelCard:
        """Give the model card: tasks, limits, and what the folded file says about itself."""
        return self.card

    async def classify(self, request: Request) -> Classification:
        """Classify an image among one task's classes by the merged model of the preference."""
        query, answer = await self._answer(request, queries.ClassifyFields)
        classes = [Class(index=index, probability=probability) for index, probability in answer]
        return Classification(task=str(query.task), preference=self._named(query), classes=classes)

    async def embed(self, request: Request) -> Embedding:
        """Give the features of an image by the merged encoder of the preference, not normalised."""
        query, answer = await self._answer(request, queries.EmbedFields)
        return Embedding(preference=self._named(query), embedding=answer)

    async def _answer(self, request: Request, fields: type[queries.EmbedFields]) -> tuple[queries.Query, Any]:
        if request.query_params:
            named = ", ".join(list(request.query_params)[:5])
            text = f"query: expected fields in the body, as JSON or a form, got {named} in the URL"
            raise queries.problem(422, text)
        body = await queries.read_body(request)
        item = await self.batcher.decode(self._read, body, fields)
        try:
            return item.query, await self.batcher(item)
        except NotFinite as error:
            raise queries.problem(500, error) from error
        except Exception as error:
            raise queries.problem(500, "model: expected an answer, got an error; it is logged") from error

    def _read(self, body: bytes | dict[str, Any], fields: type[queries.EmbedFields]) -> Item:
        query = queries.parse_query(body, fields, self.tasks, self.limits)
        image = self.engine.preprocess(queries.decode_image(query.image, self.limits))
        # the last batch is kept until the next one comes, and files are large
        return Item(image, query._replace(image=b""))

    def _named(self, query: queries.Query) -> dict[str, float]:
        # float32 to seven digits: 0.7 and not 0.699999988079071
        return {name: round(value, 7) for name, value in zip(self.tasks.names, query.preference.tolist(), strict=True)}
