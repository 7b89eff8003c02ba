"""Images from untrusted bytes: every limit is checked from the header before a pixel is decoded."""

from __future__ import annotations

import io
import warnings

from PIL import Image, UnidentifiedImageError

from pareto_merging.serving.limits import Limits

# others have more than 8 bits per channel, which Pillow would cut off and not scale
MODES = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV")


class ImageError(ValueError):
    """The bytes are not an image that the server takes; the message says what was expected and what came."""


def decode_image(data: bytes, limits: Limits) -> Image.Image:
    """The first frame as an RGB image, converted as training does it: alpha is dropped, EXIF orientation not applied.

    Raises:
        ImageError: another format, a broken file, too many pixels, too long a side, more than 8 bits per channel.
    """
    accepted = f"one of {', '.join(limits.formats)}"
    if not data:
        raise ImageError(f"image: expected {accepted}, got an empty file")
    try:
        with warnings.catch_warnings():
            # our own limits decide; Pillow warns from 89 million pixels on and raises from 179 million on
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=limits.formats)
    except Image.DecompressionBombError as error:
        raise ImageError(f"image: expected at most {limits.pixels:,} pixels, got far more") from error
    except MemoryError:
        raise
    except UnidentifiedImageError as error:
        raise ImageError(f"image: expected {accepted}, got {_signature(data)}") from error
    except Exception as error:
        # a broken file can fail anywhere inside its decoder
        raise ImageError(f"image: expected {accepted}, got a broken one: {error}") from error
    with image:
        _check_size(image.width, image.height, limits)
        if image.mode not in MODES:
            raise ImageError(f"image: expected at most 8 bits per channel, got mode {image.mode}")
        try:
            return image.convert("RGB")
        except MemoryError:
            raise
        except Exception as error:
            raise ImageError(f"image: expected a whole {image.format} file, got a broken one: {error}") from error


def _check_size(width: int, height: int, limits: Limits) -> None:
    got = f"got {width} x {height}"
    if min(width, height) < 1:
        raise ImageError(f"image: expected at least 1 x 1 pixel, {got}")
    if width * height > limits.pixels:
        raise ImageError(f"image: expected at most {limits.pixels:,} pixels, {got}")
    if max(width, height) > limits.side:
        raise ImageError(f"image: expected sides of at most {limits.side:,} pixels, {got}")
    if max(width, height) > limits.aspect * min(width, height):
        raise ImageError(f"image: expected a side at most {limits.aspect:g} times as long as the other, {got}")


def _signature(data: bytes) -> str:
    return f"a file that begins with {data[:8]!r}"
