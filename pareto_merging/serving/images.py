"""Images from untrusted bytes: limits are checked from the header before a pixel is decoded."""

import io

from PIL import Image, UnidentifiedImageError

from pareto_merging.serving.limits import Limits

# others have more than 8 bits per channel, which Pillow would cut off and not scale
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")


class ImageError(ValueError):
    """The bytes are not an image that the server takes; the message says why."""


def decode_image(data: bytes, limits: Limits) -> Image.Image:
    """Decode the first frame as an RGB image.

    It is converted as training does it: alpha is dropped, EXIF orientation not applied.

    Raises:
        ImageError: another format, a broken file, too many pixels, too long a side, more than 8 bits per channel.
    """
    accepted = f"one of {', '.join(limits.formats)}"
    if not data:
        raise ImageError(f"image: expected {accepted}, got an empty file")
    try:
        image = Image.open(io.BytesIO(data), formats=limits.formats)
    except Image.DecompressionBombError as error:
        # Pillow's own limit, 179 million pixels, is above ours or the stricter one
        raise ImageError(f"image: expected at most {limits.pixels:,} pixels, got far more") from error
    except MemoryError:
        raise
    except UnidentifiedImageError as error:
        raise ImageError(f"image: expected {accepted}, got a file that begins with {data[:8]!r}") from error
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
