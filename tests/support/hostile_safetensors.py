"""Hostile safetensors files."""

import json
import struct
from collections.abc import Iterator
from typing import Any

from support.hostile_legacy import FLOATS
from support.hostile_zip import torch_zip
from support.opcodes import call, pickled
from support.payloads import ANYTHING, TERABYTE


def safetensors(header: Any, data: bytes = FLOATS, length: int | None = None) -> bytes:
    """A safetensors file with this header: a value for JSON, or its text."""
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(content) if length is None else length) + content + data


def part(start: int = 0, end: int = 16, shape: Any = (4,), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape) if isinstance(shape, tuple) else shape, "data_offsets": [start, end]}


def safetensors_files() -> Iterator[tuple[str, bytes, str | bool | None, bool]]:
    """As :func:`zip_files`."""
    good = {"w": part()}
    text_of = json.dumps(good).encode()
    yield "empty", b"", ANYTHING, False
    yield "eight-bytes", b"\0" * 8, ANYTHING, False
    yield "length-2e63", safetensors(good, length=2**63), ANYTHING, True
    yield "length-2e64", safetensors(good, length=2**64 - 1), ANYTHING, True
    yield "length-100mb", safetensors(good, length=100_000_000), ANYTHING, True
    yield "length-short", safetensors(good, length=20), ANYTHING, False
    yield "length-one-more", safetensors(good, length=len(text_of) + 1), ANYTHING, False
    yield "length-all", safetensors(good, length=len(text_of) + 16), ANYTHING, False
    yield "no-data", safetensors(good, b""), ANYTHING, False
    yield "short-data", safetensors(good, FLOATS[:-1]), ANYTHING, False
    yield "trailing-data", safetensors(good, FLOATS + b"x"), ANYTHING, False
    yield "claims-1tb", safetensors({"w": part(0, TERABYTE, (TERABYTE // 4,))}), ANYTHING, True
    yield "shape-1tb", safetensors({"w": part(0, 16, (TERABYTE // 4,))}), ANYTHING, True
    yield "shape-overflow", safetensors({"w": part(0, 16, (2**32, 2**32))}), ANYTHING, True
    yield "shape-overflow-to-fit", safetensors({"w": part(0, 16, (2**62, 4, 2**62 + 1))}), ANYTHING, True
    yield "shape-zero-and-huge", safetensors({"w": part(0, 0, (2**63, 0)), "v": part()}), False, True
    yield "overlapping", safetensors({"w": part(0, 16), "v": part(8, 16, (2,))}), ANYTHING, False
    yield "same-place", safetensors({"w": part(), "v": part()}), ANYTHING, False
    yield "hole", safetensors({"w": part(0, 4, (1,)), "v": part(8, 16, (2,))}), ANYTHING, False
    yield "unsorted", safetensors({"w": part(8, 16, (2,)), "v": part(0, 8, (2,))}), False, False
    yield "reversed", safetensors({"w": part(16, 0)}), ANYTHING, False
    yield "offset-negative", safetensors({"w": part(-16, 0)}), ANYTHING, False
    yield "offset-float", safetensors(text_of.replace(b"16", b"16.0")), ANYTHING, False
    yield "offset-huge", safetensors({"w": part(2**64 - 16, 2**64)}), ANYTHING, False
    yield "shape-negative", safetensors({"w": part(shape=(-4,))}), ANYTHING, False
    yield "shape-text", safetensors({"w": part(shape=["4"])}), ANYTHING, False
    yield "shape-null", safetensors({"w": {"dtype": "F32", "shape": None, "data_offsets": [0, 16]}}), ANYTHING, False
    yield "shape-million", safetensors({"w": part(0, 16, (4, *(1,) * 10**6))}), False, True
    yield "dtype-unknown", safetensors({"w": part(dtype="F33")}), ANYTHING, False
    yield "dtype-number", safetensors({"w": part(dtype=32)}), ANYTHING, False
    yield "dtype-f4", safetensors({"w": part(shape=(32,), dtype="F4")}), False, False
    yield "dtype-f6", safetensors({"w": part(0, 3, (4,), "F6_E2M3"), "v": part(3, 16, (13,), "U8")}), False, False
    yield "dtype-e8m0", safetensors({"w": part(shape=(16,), dtype="F8_E8M0")}), False, False
    twice = text_of[:-1] + b", " + text_of[1:]
    yield "key-twice", safetensors(twice), ANYTHING, False
    other = text_of.replace(b"[4]", b"[2, 2]")
    yield "key-twice-other", safetensors(text_of[:-1] + b", " + other[1:]), ANYTHING, False
    yield "field-twice", safetensors(text_of.replace(b'"shape"', b'"shape": [1], "shape"')), ANYTHING, False
    yield "field-unknown", safetensors({"w": {**part(), "code": "import os"}}), False, False
    yield "nan", safetensors(text_of.replace(b"[4]", b"[NaN]")), ANYTHING, False
    yield "nan-metadata", safetensors(text_of[:-1] + b', "__metadata__": {"a": NaN}}'), ANYTHING, False
    yield "metadata-number", safetensors({**good, "__metadata__": {"a": 1}}), ANYTHING, False
    yield "metadata-list", safetensors({**good, "__metadata__": []}), ANYTHING, False
    yield "metadata-huge", safetensors({**good, "__metadata__": {"a": "x" * 50_000_000}}), False, True
    yield "metadata-many", safetensors({**good, "__metadata__": {str(k): "" for k in range(300_000)}}), False, True
    yield "nested", safetensors(b'{"w":' + b"[" * 100_000), ANYTHING, True
    yield "nested-closed", safetensors(b'{"w":' + b"[" * 100_000 + b"]" * 100_000 + b"}"), ANYTHING, True
    yield (
        "nested-metadata",
        safetensors(b'{"__metadata__":' + b'{"a":' * 100_000 + b"1" + b"}" * 100_001),
        ANYTHING,
        True,
    )
    yield "header-list", safetensors([1, 2]), ANYTHING, False
    yield "header-number", safetensors(1), ANYTHING, False
    yield "header-text", safetensors(b"import os"), ANYTHING, False
    yield "header-not-utf8", safetensors(b'{"\xff": 1}'), ANYTHING, False
    yield "header-bom", safetensors(b"\xef\xbb\xbf" + text_of), ANYTHING, False
    yield "header-space", safetensors(b" " + text_of), False, False
    yield "header-null", safetensors(text_of + b"\0"), False, False
    yield "header-empty", safetensors({}, b""), False, False
    yield "name-surrogate", safetensors(text_of.replace(b'"w"', b'"\\ud800"')), ANYTHING, False
    yield "name-newline", safetensors({"a\nb\x1b[2J": part(shape=(5,))}), ANYTHING, False
    yield "name-long", safetensors({"n" * 1_000_000: part(shape=(5,))}), ANYTHING, False
    yield "name-empty", safetensors({"": part()}), False, False
    yield "many-tensors", safetensors({str(k): part(0, 0, (0,)) for k in range(20_000)}, b""), False, True
    yield "a-pickle", pickled(call("os:system", "x")), ANYTHING, False
    yield "a-zip", torch_zip(), False, False
