"""What the HTTP server's answers and requests look like, as pydantic models and OpenAPI's words."""

from typing import Any

from pydantic import BaseModel, Field

from pareto_merging.serving.limits import Limits
from pareto_merging.serving.queries import JSON, MULTIPART, EmbedFields


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


def request_body(fields: type[EmbedFields]) -> dict[str, Any]:
    """Describe a POST for OpenAPI: JSON, or a form with a file."""
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
