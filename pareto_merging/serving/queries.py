"""What a request asks for: JSON or multipart/form-data, read into a checked :class:`Query`; its image."""

import base64
import difflib
import io
import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, NamedTuple

from PIL import Image, UnidentifiedImageError
from pydantic import BaseModel, ConfigDict, Field, ValidationError, WithJsonSchema
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request
from torch import Tensor

from pareto_merging.preferences import check_preference, equal_preference, parse_preference
from pareto_merging.serving.limits import Limits

JSON, MULTIPART = "application/json", "multipart/form-data"
PREFERENCE_HELP = (
    'One weight per task, in the order of /model: `[0.2, 0.8]`; or by task name: `{"MNIST": 0.7}` or `MNIST=0.7` (the '
    "rest is shared out); or `equal`, which is the default. Weights are at least 0 and sum to 1."
)
PREFERENCE_SCHEMA = {
    "anyOf": [
        {"type": "array", "items": {"type": "number"}},
        {"type": "object", "additionalProperties": {"type": "number"}},
        {"type": "string"},
        {"type": "null"},
    ]
}
# others have more than 8 bits per channel, which Pillow would cut off and not scale
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")
# a field of a form is a name or a preference
MAX_FIELD_BYTES = 2**18
MAX_MESSAGE = 600


class EmbedFields(BaseModel):
    """What /embed takes beside the image."""

    model_config = ConfigDict(extra="forbid")

    preference: Annotated[Any, WithJsonSchema(PREFERENCE_SCHEMA)] = Field(None, description=PREFERENCE_HELP)


class ClassifyFields(EmbedFields):
    """What /classify takes beside the image."""

    task: str = Field(description="The task whose classes are wanted: a name from /model.")
    top: int = Field(5, ge=1, le=100_000, description="How many classes to return, most probable first.")


def request_body(fields: type[EmbedFields]) -> dict[str, Any]:
    """Describe a POST for OpenAPI: JSON, or a form with a file."""
    schema = fields.model_json_schema()
    properties, required = schema["properties"], ["image", *schema.get("required", ())]
    file = {"type": "string", "format": "binary", "description": "The image file."}
    encoded = {"type": "string", "format": "byte", "description": "The image file as base64, without line breaks."}
    text = {**properties["preference"], "type": "string"}
    text.pop("anyOf")
    bodies = {MULTIPART: {"image": file, **properties, "preference": text}, JSON: {"image": encoded, **properties}}
    content = {
        kind: {"schema": {"type": "object", "properties": body, "required": required, "additionalProperties": False}}
        for kind, body in bodies.items()
    }
    return {"requestBody": {"required": True, "content": content}}


class Tasks(NamedTuple):
    """The names of all tasks in γ's order, and the number of classes by head."""

    names: tuple[str, ...]
    classes: Mapping[str, int]


class Query(NamedTuple):
    """One request, read and checked but for the image. γ is [K]; task and number of classes are of /classify."""

    image: bytes
    preference: Tensor
    task: str | None = None
    top: int = 0


def one_line(text: object) -> str:
    """Return ``text`` as one line for JSON: no line breaks, no lone surrogates, not endless."""
    line = " ".join(str(text).split()).encode("utf-8", "replace").decode("utf-8")
    return line if len(line) <= MAX_MESSAGE else f"{line[:MAX_MESSAGE]}…"


def problem(status: int, text: object, **headers: str) -> HTTPException:
    """Return the exception that becomes the answer ``status`` with ``{"detail": text}``."""
    return HTTPException(status, one_line(text), headers or None)


async def read_body(request: Request) -> bytes | dict[str, Any]:
    """Read the whole body, without touching the disk. JSON stays bytes; of a form come the fields, its image as bytes.

    HTTPException: 415 for another content type, 422 for a form that cannot be read.
    """
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type == JSON:
        return await request.body()
    if content_type != MULTIPART:
        got = repr(content_type[:80]) if content_type else "none"
        raise problem(415, f"content-type: expected {JSON} or {MULTIPART}, got {got}")
    try:
        sizes = {"max_files": 1, "max_fields": 8, "max_part_size": MAX_FIELD_BYTES}
        form = await _FormInMemory(request.headers, request.stream(), **sizes).parse()
    except MultiPartException as error:
        raise problem(422, f"body: expected {MULTIPART} with one file named image, got: {error.message}") from error
    fields: dict[str, Any] = {}
    for name, value in form.multi_items():
        if name in fields:
            raise problem(422, f"{name}: expected it once, got it twice")
        if isinstance(value, UploadFile):
            if name != "image":
                raise problem(422, f"{name}: expected the file in the field image, got it in {name}")
            fields[name] = await value.read()
        elif name == "image":
            raise problem(422, "image: expected a file (curl: -F image=@photo.jpg), got text")
        elif value:
            # a field that a browser's form leaves empty was not given
            fields[name] = value
    await form.close()
    return fields


class _FormInMemory(MultiPartParser):
    # the request's size is limited already
    spool_max_size = 2**62


def parse_query(body: bytes | Mapping[str, Any], fields: type[EmbedFields], tasks: Tasks, limits: Limits) -> Query:
    """Check everything about a body but the image itself. A long one takes a while: this is not for the event loop.

    HTTPException: 422 naming the field, what was expected and what came; 413 for too long an image.
    """
    values = _load_json(body) if isinstance(body, bytes) else dict(body)
    given = values.pop("image", None)
    try:
        read = fields.model_validate(values, strict=isinstance(body, bytes))
    except ValidationError as error:
        raise problem(422, _flatten(error, ("image", *fields.model_fields))) from error
    try:
        preference = read_preference(read.preference, tasks.names)
    except ValueError as error:
        raise problem(422, error) from error
    task, top = None, 0
    if isinstance(read, ClassifyFields):
        task, top = read.task, read.top
        if task not in tasks.names:
            raise problem(422, f"task: {unknown_name(task, tasks.names)}")
        if task not in tasks.classes:
            named = ", ".join(tasks.classes) or "none: the file has no heads, use /embed"
            raise problem(422, f"task: expected one with a zero-shot head ({named}), got {task}")
    image = _image_bytes(given, limits)
    if len(image) > limits.image_bytes:
        raise problem(413, f"image: expected at most {limits.image_bytes:,} bytes, got {len(image):,}")
    return Query(image, preference, task, top)


def _load_json(body: bytes) -> dict[str, Any]:
    def refuse(constant: str) -> float:
        raise ValueError(f"expected finite numbers, got {constant}")

    try:
        values = json.loads(body, object_pairs_hook=_unique, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise problem(422, f"body: expected a JSON object, got a text that is not: {error}") from error
    if not isinstance(values, dict):
        raise problem(422, f"body: expected a JSON object, got {type(values).__name__}")
    return values


def _image_bytes(given: object, limits: Limits) -> bytes:
    if isinstance(given, bytes):
        return given
    if given is None:
        raise problem(422, "image: expected an image, got none")
    if not isinstance(given, str):
        raise problem(422, f"image: expected a file's bytes as base64, got {type(given).__name__}")
    if len(given) > 4 * (limits.image_bytes // 3 + 1):
        raise problem(413, f"image: expected at most {limits.image_bytes:,} bytes, got about {len(given) // 4 * 3:,}")
    try:
        return base64.b64decode(given, validate=True)
    except ValueError as error:
        shown = one_line(given[:24])
        raise problem(422, f"image: expected base64 without line breaks, got {shown!r}: {error}") from error


def decode_image(data: bytes, limits: Limits) -> Image.Image:
    """Decode the first frame as an RGB image. Limits are checked from the header before a pixel is decoded.

    It is converted as training does it: alpha is dropped, EXIF orientation not applied. HTTPException: 422.
    """
    accepted = f"one of {', '.join(limits.formats)}"
    if not data:
        raise problem(422, f"image: expected {accepted}, got an empty file")
    try:
        image = Image.open(io.BytesIO(data), formats=limits.formats)
    except Image.DecompressionBombError as error:
        # Pillow's own limit, 179 million pixels, is above ours or the stricter one
        raise problem(422, f"image: expected at most {limits.pixels:,} pixels, got far more") from error
    except MemoryError:
        raise
    except UnidentifiedImageError as error:
        raise problem(422, f"image: expected {accepted}, got a file that begins with {data[:8]!r}") from error
    except Exception as error:
        # a broken file can fail anywhere inside its decoder
        raise problem(422, f"image: expected {accepted}, got a broken one: {error}") from error
    with image:
        _check_size(image.width, image.height, limits)
        if image.mode not in MODES:
            raise problem(422, f"image: expected at most 8 bits per channel, got mode {image.mode}")
        try:
            return image.convert("RGB")
        except MemoryError:
            raise
        except Exception as error:
            raise problem(422, f"image: expected a whole {image.format} file, got a broken one: {error}") from error


def _check_size(width: int, height: int, limits: Limits) -> None:
    got = f"got {width} x {height}"
    if min(width, height) < 1:
        raise problem(422, f"image: expected at least 1 x 1 pixel, {got}")
    if width * height > limits.pixels:
        raise problem(422, f"image: expected at most {limits.pixels:,} pixels, {got}")
    if max(width, height) > limits.side:
        raise problem(422, f"image: expected sides of at most {limits.side:,} pixels, {got}")
    if max(width, height) > limits.aspect * min(width, height):
        raise problem(422, f"image: expected a side at most {limits.aspect:g} times as long as the other, {got}")


def read_preference(given: object, names: Sequence[str]) -> Tensor:
    """Read γ, float32 [K], from numbers, numbers by task name, either as text, or none. Raises ValueError."""
    if given is None:
        return equal_preference(len(names))
    if isinstance(given, str):
        text = given.strip()
        if not text.startswith(("[", "{")):
            _known([part.partition("=")[0].strip() for part in text.split(",") if "=" in part], names)
            return parse_preference(text, names)
        try:
            given = json.loads(text, object_pairs_hook=_unique)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"preference: expected numbers such as [0.2, 0.8], got {text[:80]!r}: {error}") from error
    if isinstance(given, dict):
        _known(given, names)
        return check_preference({name: _number(value) for name, value in given.items()}, names, per_item=False)
    if not isinstance(given, list) or len(given) != len(names):
        got = f"{len(given)} of them" if isinstance(given, list) else _shown(given)
        raise ValueError(f"preference: expected {len(names)} numbers, one for each of {', '.join(names)}; got {got}")
    return check_preference([_number(value) for value in given], names, per_item=False)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in pairs:
        if name in values:
            raise ValueError(f"expected each key once, got {name[:80]!r} twice")
        values[name] = value
    return values


def _shown(value: object) -> str:
    """Name what came in short: a nested value's repr is as long as the request."""
    return type(value).__name__ if isinstance(value, list | dict) else f"{value!r:.80}"


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"preference: expected numbers, got {_shown(value)}")
    try:
        return float(value)
    except OverflowError as error:
        raise ValueError("preference: expected finite numbers, got a whole number of over 300 digits") from error


def _known(given: Sequence[str] | Mapping[str, Any], names: Sequence[str]) -> None:
    unknown = next((name for name in given if name not in names), None)
    if unknown is not None:
        raise ValueError(f"preference: {unknown_name(unknown, names)}")


def unknown_name(name: str, names: Sequence[str]) -> str:
    """Say ``expected a task among A, B, C; got X``, names like the one given first."""
    close = difflib.get_close_matches(name[:100], names, n=len(names), cutoff=0.4)
    ordered = [*close, *(other for other in names if other not in close)]
    return f"expected a task among {', '.join(ordered)}; got {name[:80]!r}"


def _flatten(error: ValidationError, allowed: Sequence[str]) -> str:
    """Pydantic's errors as one line: ``top: expected …, got …; task: …``."""
    parts = []
    for entry in error.errors(include_url=False)[:5]:
        name = ".".join(str(part)[:80] for part in entry["loc"])
        if entry["type"] == "extra_forbidden":
            parts.append(f"{name}: expected only {', '.join(allowed)}")
        elif entry["type"] == "missing":
            parts.append(f"{name}: expected a value, got none")
        else:
            expected = entry["msg"].removeprefix("Input should be ")
            parts.append(f"{name}: expected {expected}, got {_shown(entry['input'])}")
    return "; ".join(parts)
