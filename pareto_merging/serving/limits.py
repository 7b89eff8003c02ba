"""What the server accepts: every limit with its meaning and default."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from pareto_merging.errors import UserError

# Pillow's names; each has a plain decoder that is in every build
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "PPM")


class Limits(BaseModel):
    """What the server accepts. Sizes are bytes, sides pixels, times seconds but for ``wait``.

    At worst ``queue`` · ``request_bytes`` are held in memory, and 8 · ``pixels`` bytes by each decoder.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_batch: int = Field(default=128, ge=1, le=4096, description="images computed together")
    wait: float = Field(default=2.0, ge=0.1, le=1000, description="milliseconds that a batch waits for more images")
    queue: int = Field(
        default=256, ge=1, le=100_000, description="requests accepted and not yet answered; beyond it 503"
    )
    request_bytes: int = Field(default=12 * 2**20, ge=1024, description="bytes of a request's body; beyond it 413")
    image_bytes: int = Field(default=8 * 2**20, ge=64, description="bytes of an image file; beyond it 413")
    pixels: int = Field(default=25_000_000, ge=1, description="pixels of an image, read from its header; beyond it 422")
    side: int = Field(default=10_000, ge=1, description="pixels of an image's longer side; beyond it 422")
    aspect: float = Field(
        default=100.0,
        ge=1,
        description="longer side over shorter side: the shorter is resized to the model's, so this bounds the memory; "
        "beyond it 422",
    )
    formats: tuple[str, ...] = Field(
        default=FORMATS, min_length=1, description=f"image formats, of {', '.join(FORMATS)}"
    )
    decoders: int = Field(default=4, ge=1, le=256, description="threads that decode images")
    upload: float = Field(default=20.0, gt=0, le=3600, description="seconds to send a request's body; beyond it 408")
    idle: float = Field(
        default=75.0, gt=0, le=86400, description="seconds that a connection may be silent between requests"
    )
    shutdown: int = Field(
        default=30, ge=1, le=3600, description="seconds to answer what was accepted, when told to stop"
    )

    @field_validator("formats")
    @classmethod
    def _known_formats(cls, formats: tuple[str, ...]) -> tuple[str, ...]:
        formats = tuple(dict.fromkeys(name.strip().upper() for name in formats))
        unknown = [name for name in formats if name not in FORMATS]
        if unknown:
            raise ValueError(f"expected formats of {', '.join(FORMATS)}, got {', '.join(unknown)}")
        return formats


def make_limits(values: dict[str, Any]) -> Limits:
    """Make ``Limits(**values)``; UserError names the limit that is wrong."""
    try:
        return Limits(**values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        message = first["msg"].removeprefix("Value error, ").replace("Input should be", "expected a value")
        name = ".".join(map(str, first["loc"]))
        raise UserError(f"{name}: {message}, got {str(first['input'])[:40]}") from error
