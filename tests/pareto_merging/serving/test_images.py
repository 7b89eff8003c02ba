"""Image files from strangers: what is taken, what is refused before it is decoded, and that no file breaks anything."""

import contextlib
import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from pareto_merging.serving.images import ImageError, decode_image
from pareto_merging.serving.limits import FORMATS, Limits

LIMITS = Limits()
PIXELS = np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8)


def encode(image: Image.Image, kind: str, **how: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **how)
    return buffer.getvalue()


def png(width: int, height: int, depth: int = 8, colour: int = 2) -> bytes:
    """A small file whose header promises any size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    pieces = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(bytes(64))), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(pieces)


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format(kind: str) -> None:
    how = {"lossless": True} if kind == "WEBP" else {}
    decoded = decode_image(encode(Image.fromarray(PIXELS), kind, **how), LIMITS)
    assert decoded.mode == "RGB" and decoded.size == (20, 12)
    if kind != "JPEG":
        assert np.array_equal(np.asarray(decoded), PIXELS)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
def test_every_mode_becomes_rgb_as_in_training(mode: str) -> None:
    image = Image.fromarray(PIXELS).convert(mode)
    data = encode(image, "JPEG" if mode == "CMYK" else "PNG")
    with Image.open(io.BytesIO(data)) as opened:
        expected = np.asarray(opened.convert("RGB"))
    assert np.array_equal(np.asarray(decode_image(data, LIMITS)), expected)


def test_one_pixel() -> None:
    assert decode_image(encode(Image.new("RGB", (1, 1), (1, 2, 3)), "PNG"), LIMITS).getpixel((0, 0)) == (1, 2, 3)


def test_only_the_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    data = encode(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    assert decode_image(data, LIMITS).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "got an empty file"),
        (b"hello", "expected one of PNG, JPEG, WEBP, BMP, PPM, got a file that begins with b'hello'"),
        (encode(Image.fromarray(PIXELS), "GIF"), "begins with b'GIF"),
        (encode(Image.fromarray(PIXELS), "TIFF"), "expected one of PNG"),
        (encode(Image.fromarray(PIXELS), "PNG")[:-300], "expected a whole PNG file"),
        (encode(Image.fromarray(PIXELS), "JPEG")[:-100], "expected a whole JPEG file"),
        (png(20, 12), "expected a whole PNG file"),
        (png(60_000, 60_000), "expected at most 25,000,000 pixels"),
        (png(9_000, 9_000), "expected at most 25,000,000 pixels, got 9000 x 9000"),
        (png(10_001, 200), "expected sides of at most 10,000 pixels, got 10001 x 200"),
        (png(1, 101), "expected a side at most 100 times as long as the other, got 1 x 101"),
        (png(0, 5), "expected"),
        (png(4, 4, depth=16, colour=0), "expected at most 8 bits per channel, got mode I;16"),
    ],
)
def test_refused(data: bytes, expected: str) -> None:
    with pytest.raises(ImageError) as error:
        decode_image(data, LIMITS)
    assert expected in str(error.value) and "\n" not in str(error.value)


def test_size_is_checked_before_anything_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*arguments: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load)
    with pytest.raises(ImageError, match="pixels"):
        decode_image(png(5_001, 5_000), LIMITS)
    with pytest.raises(ImageError, match="broken one: decoded"):
        decode_image(png(5_000, 5_000), LIMITS)


def test_limits_are_the_servers() -> None:
    data = encode(Image.fromarray(PIXELS), "PNG")
    with pytest.raises(ImageError, match="at most 239 pixels, got 20 x 12"):
        decode_image(data, Limits(pixels=239))
    decode_image(data, Limits(pixels=240))
    with pytest.raises(ImageError, match="expected one of JPEG, got"):
        decode_image(data, Limits(formats=("JPEG",)))


def test_damaged_files_raise_image_errors_only() -> None:
    rng = np.random.default_rng(1)
    for kind in FORMATS:
        whole = encode(Image.fromarray(PIXELS), kind)
        for _ in range(60):
            damaged = bytearray(whole)
            for place in rng.integers(0, len(whole), 4):
                damaged[place] = rng.integers(0, 256)
            with contextlib.suppress(ImageError):
                assert decode_image(bytes(damaged), LIMITS).mode == "RGB"
