"""Requests that are wrong: what is wrong is said in one line. Image files from strangers: no file breaks anything."""

import contextlib
import io
import json
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image
from starlette.exceptions import HTTPException
from support.servers import Running, encoded, png

from pareto_merging.serving.limits import FORMATS, Limits
from pareto_merging.serving.queries import decode_image


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"image": None}, "image: expected an image, got none"),
        ({"image": 3}, "image: expected a file's bytes as base64, got int"),
        ({"image": "a\nb="}, "image: expected base64 without line breaks"),
        ({"image": "größe"}, "image: expected base64"),
        (
            {"image": "aGVsbG8="},
            "image: expected one of PNG, JPEG, WEBP, BMP, PPM, got a file that begins with b'hello'",
        ),
        (
            {"preference": [0.5, 0.5]},
            "preference: expected 3 numbers, one for each of MNIST, DTD, größe; got 2 of them",
        ),
        ({"preference": [True, False, False]}, "preference: expected numbers, got True"),
        ({"preference": ["0.2", "0.3", "0.5"]}, "preference: expected numbers, got '0.2'"),
        ({"preference": [[0.2, 0.3, 0.5]]}, "preference: expected 3 numbers"),
        ({"preference": [0.5, 0.4, 0.2]}, "preference: expected a sum of 1, got 1.1"),
        ({"preference": [1.5, -0.5, 0]}, "preference: expected non-negative numbers"),
        ({"preference": [10**400, 0, 0]}, "preference: expected finite numbers"),
        ({"preference": {"MNIST": 0.7, "DTD": 0.7}}, "preference: expected a sum of at most 1"),
        ({"preference": {"DTB": 0.7}}, "preference: expected a task among DTD, MNIST, größe; got 'DTB'"),
        ({"preference": "DTB=0.7"}, "preference: expected a task among DTD, MNIST, größe; got 'DTB'"),
        ({"preference": {"\ud800": 1}}, "preference: expected a task among"),
        ({"preference": "MNIST=0.1,MNIST=0.2"}, "preference: expected each task once"),
        ({"preference": "{"}, "preference: expected numbers such as"),
        ({"preference": "x" * 10_000}, "preference: expected"),
        ({"preference": 0.5}, "preference: expected 3 numbers"),
        ({"extra": 1}, "extra: expected only image, preference, task, top"),
        ({"task": None}, "task: expected a valid string, got None"),
        ({"task": "größte"}, "task: expected a task among größe, MNIST, DTD; got 'größte'"),
        ({"task": "größe"}, "task: expected one with a zero-shot head (MNIST, DTD), got größe"),
        (
            {"top": 0, "task": 5},
            "task: expected a valid string, got 5; top: expected greater than or equal to 1, got 0",
        ),
        ({"top": True}, "top: expected a valid integer, got True"),
        ({"top": 2.0}, "top: expected a valid integer, got 2.0"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(shared: Running, values: dict[str, Any], expected: str) -> None:
    values = {"image": encoded(), "task": "MNIST", **values}
    answer = shared.client.post("/classify", content=json.dumps(values), headers={"content-type": "application/json"})
    assert answer.status_code == 422
    assert list(answer.json()) == ["detail"]
    detail = answer.json()["detail"]
    assert detail.startswith(expected)
    assert "\n" not in detail and len(detail) < 700


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b"", "body: expected a JSON object"),
        (b"[1]", "body: expected a JSON object, got list"),
        (b"\xff", "body: expected a JSON object"),
        (b'{"preference": [NaN, 1, 0]}', "expected finite numbers, got NaN"),
        (b'{"preference": {"MNIST": 0.1, "MNIST": 0.2}}', "expected each key once, got 'MNIST' twice"),
        (b'{"preference": [1' + b"0" * 5000 + b", 0, 0]}", "body: expected a JSON object"),
        (b"[" * 100_000, "body: expected a JSON object"),
        (b'{"preference": ' + b"[" * 900 + b"]" * 900 + b"}", "preference: expected 3 numbers"),
    ],
)
def test_what_is_not_the_json_expected(shared: Running, body: bytes, expected: str) -> None:
    answer = shared.client.post("/embed", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 422
    assert expected in answer.json()["detail"]


def test_forms_that_are_wrong(shared: Running) -> None:
    def detail(status: int = 422, **request: Any) -> str:
        answer = shared.client.post("/embed", **request)
        assert answer.status_code == status, answer.text
        return str(answer.json()["detail"])

    form = {"content-type": "multipart/form-data; boundary=x"}
    assert detail(data={"preference": "equal"}, files={"other": b"1"}).startswith(
        "other: expected the file in the field"
    )
    assert detail(files={"image": (None, "text")}).startswith("image: expected a file (curl: -F image=@photo.jpg), got")
    assert detail(files={"image": png()}, params={"preference": "MNIST=1"}) == (
        "query: expected fields in the body, as JSON or a form, got preference in the URL"
    )
    assert "twice" in detail(data={"preference": ["equal", "equal"]}, files={"image": png()})
    assert "Too many files" in detail(files=[("image", png()), ("image", png())])
    assert "extra: expected only" in detail(data={"extra": "1"}, files={"image": png()})
    assert "boundary" in detail(content=b"abc", headers={"content-type": "multipart/form-data"})
    assert detail(content=b"abc", headers=form).startswith("body: expected multipart/form-data")
    cut = b'--x\r\ncontent-disposition: form-data; name="image"; filename="a"\r\n\r\n' + png()[:20]
    assert detail(content=cut, headers=form).startswith(("body: expected", "image: expected"))
    assert "got 'text/plain'" in detail(415, content=b"abc", headers={"content-type": "text/plain"})
    assert "got none" in detail(415, content=b"abc")


LIMITS = Limits()
PIXELS = np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8)


def encode(image: Image.Image, kind: str, **how: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **how)
    return buffer.getvalue()


def promising(width: int, height: int, depth: int = 8, colour: int = 2) -> bytes:
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
        (promising(20, 12), "expected a whole PNG file"),
        (promising(60_000, 60_000), "expected at most 25,000,000 pixels"),
        (promising(9_000, 9_000), "expected at most 25,000,000 pixels, got 9000 x 9000"),
        (promising(10_001, 200), "expected sides of at most 10,000 pixels, got 10001 x 200"),
        (promising(1, 101), "expected a side at most 100 times as long as the other, got 1 x 101"),
        (promising(0, 5), "expected"),
        (promising(4, 4, depth=16, colour=0), "expected at most 8 bits per channel, got mode I;16"),
    ],
)
def test_refused(data: bytes, expected: str) -> None:
    with pytest.raises(HTTPException) as error:
        decode_image(data, LIMITS)
    assert expected in str(error.value) and "\n" not in str(error.value)


def test_size_is_checked_before_anything_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*arguments: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load)
    with pytest.raises(HTTPException, match="pixels"):
        decode_image(promising(5_001, 5_000), LIMITS)
    with pytest.raises(HTTPException, match="broken one: decoded"):
        decode_image(promising(5_000, 5_000), LIMITS)


def test_limits_are_the_servers() -> None:
    data = encode(Image.fromarray(PIXELS), "PNG")
    with pytest.raises(HTTPException, match="at most 239 pixels, got 20 x 12"):
        decode_image(data, Limits(pixels=239))
    decode_image(data, Limits(pixels=240))
    with pytest.raises(HTTPException, match="expected one of JPEG, got"):
        decode_image(data, Limits(formats=("JPEG",)))


def test_damaged_files_raise_image_errors_only() -> None:
    rng = np.random.default_rng(1)
    for kind in FORMATS:
        whole = encode(Image.fromarray(PIXELS), kind)
        for _ in range(60):
            damaged = bytearray(whole)
            for place in rng.integers(0, len(whole), 4):
                damaged[place] = rng.integers(0, 256)
            with contextlib.suppress(HTTPException):
                assert decode_image(bytes(damaged), LIMITS).mode == "RGB"
