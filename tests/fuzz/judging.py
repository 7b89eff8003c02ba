"""What is wrong with an answer that a reader gave for a damaged file."""

import json
import math
from typing import Any

import torch
from fuzz.mutants import Mutant
from fuzz.readers import Answer
from fuzz.samples import Sample, sample
from torch import Tensor


def judge(reader: str, mutant: Mutant, answer: Answer) -> str | None:
    """What is wrong with an answer that a reader gave for a mutant; None if nothing is."""
    original = sample(reader)
    if mutant.forbidden is not None:
        return f"read, though its pickle calls {mutant.forbidden}"
    size = sum(map(len, mutant.files.values()))
    for name, tensor in answer.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor) or tensor.layout is not torch.strided:
            return f"{name!r:.60}: no tensor"
        # what is read is put into memory of its own: no more than the file has (a head becomes float32)
        if tensor.nbytes > 2 * size or not tensor.is_contiguous():
            return f"{name!r:.60}: {tensor.nbytes} bytes out of a file of {size}"
    if original.has_checksums and mutant.span is not None and mutant.span[1] - mutant.span[0] == 1:
        return _difference(answer, original.tensors)
    if original.container == "folder" and mutant.file == "model.safetensors.index.json":
        return _difference(answer, original.tensors)
    if original.container == "folder" and mutant.file == "config.json":
        return _difference(answer, original.tensors)
    if reader == "safetensors":
        return _difference(answer, reference_safetensors(mutant.files[mutant.file]))
    if original.container in ("legacy", "safetensors") and mutant.span is not None:
        return _compare_places(original, mutant, answer)
    return None


def _difference(answer: Answer, right: Answer) -> str | None:
    if answer.keys() != right.keys():
        return f"names {sorted(answer.keys() ^ right.keys())!r:.100} are in one of the answers only"
    for name, tensor in answer.items():
        other = right[name]
        if tensor.shape != other.shape or tensor.dtype != other.dtype or _raw(tensor) != _raw(other):
            return f"{name!r:.60}: {tensor.dtype} {list(tensor.shape)} differs from the right answer"
    return None


def _raw(tensor: Tensor) -> bytes:
    array: Any = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return array.tobytes()


def _compare_places(original: Sample, mutant: Mutant, answer: Answer) -> str | None:
    """Where only numbers of contiguous tensors changed: each tensor is what the bytes at its place say."""
    before, after = original.files[mutant.file], mutant.files[mutant.file]
    span = mutant.span
    assert span is not None
    places = {}
    for name, tensor in original.tensors.items():
        raw = _raw(tensor)
        start = before.find(raw)
        if raw and start >= 0 and before.count(raw) == 1 and len(raw) >= 8:
            places[name] = (start, start + len(raw))
    if not any(start <= span[0] and span[1] <= end for start, end in places.values()):
        return None
    if answer.keys() != original.tensors.keys():
        return "other names, though only numbers changed"
    for name, (start, end) in places.items():
        if _raw(answer[name]) != after[start:end]:
            return f"{name!r:.60}: not the bytes at its place"
    return None


_SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "BOOL": torch.bool,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
}


def reference_safetensors(data: bytes) -> Answer:
    """A safetensors file as its specification says, written a second time; raises where it is broken."""
    size = int.from_bytes(data[:8], "little")
    pairs: list[tuple[str, Any]] = json.loads(data[8 : 8 + size], object_pairs_hook=lambda pairs: pairs)
    found: Answer = {}
    for name, entry in pairs:
        if name == "__metadata__":
            continue
        assert name not in found, f"{name!r:.60} twice"
        assert len(dict(entry)) == len(entry), f"{name!r:.60}: a field twice"
        fields = dict(entry)
        dtype, shape = _SAFETENSORS_DTYPES[fields["dtype"]], fields["shape"]
        first, last = fields["data_offsets"]
        assert last - first == math.prod(shape) * dtype.itemsize, f"{name!r:.60}: offsets and shape differ"
        content = data[8 + size + first : 8 + size + last]
        assert len(content) == last - first, f"{name!r:.60}: beyond the end"
        found[name] = (
            torch.frombuffer(bytearray(content), dtype=dtype).reshape(shape)
            if content
            else torch.empty(shape, dtype=dtype)
        )
    return found
