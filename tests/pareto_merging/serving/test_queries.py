"""Requests that are wrong: what is wrong is said in one line."""

import json
from typing import Any

import pytest
from support.servers import (
    Running,
    encoded,
    png,
)


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
