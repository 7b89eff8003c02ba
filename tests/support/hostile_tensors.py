"""Tensors that claim what is not in their file."""

from collections.abc import Iterator

from support.opcodes import DICT, SETITEM, call, named, pickled, storage, tensor, text, value
from support.payloads import ANYTHING, TERABYTE, Pickled


def tensors() -> Iterator[Pickled]:
    """State dicts of one storage "0" with 4 floats, and something wrong with a tensor of it."""
    huge = storage(numel=TERABYTE // 4)
    bad: dict[str, bytes] = {
        "size-1e12-stride-0": tensor(size=(10**12,), stride=(0,)),
        "size-1e6x1e6-stride-0": tensor(size=(10**6, 10**6), stride=(0, 0)),
        "size-2e63": tensor(size=(2**63,), stride=(0,)),
        "size-2e64": tensor(size=(2**64,), stride=(1,)),
        "size-overflow": tensor(size=(2**32, 2**32), stride=(0, 0)),
        "size-overflow-to-zero": tensor(size=(2**32, 2**32, 0), stride=(1, 1, 1), offset=2**62),
        "size-overflow-to-one": tensor(size=(2**63 + 1, 2), stride=(1, 1)),
        "size-negative": tensor(size=(-1,), stride=(1,)),
        "size-two-negatives": tensor(size=(-2, -2), stride=(1, 1)),
        "stride-negative": tensor(stride=(-1, 1)),
        "stride-beyond": tensor(stride=(3, 1)),
        "stride-huge": tensor(stride=(2**62, 2**62)),
        "stride-2e64": tensor(stride=(2**64, 1)),
        "offset-negative": tensor(offset=-1),
        "offset-beyond": tensor(offset=1),
        "offset-huge": tensor(offset=2**63 - 1),
        "offset-2e64": tensor(offset=2**64),
        "storage-1tb": tensor(huge, size=(TERABYTE // 4,), stride=(1,)),
        "storage-1tb-small": tensor(huge),
        "storage-more": tensor(storage(numel=5), size=(5,), stride=(1,)),
        "storage-none": tensor(storage(numel=0), size=(1,), stride=(1,)),
        "size-bool": tensor(size=(True, 2)),
        "size-float": tensor(size=(2.0, 2)),
        "size-text": tensor(size=("2", 2)),
        "size-none": tensor(size=None),
        "size-number": tensor(size=4),
        "stride-text": tensor(stride=("2", 1)),
        "stride-short": tensor(stride=(1,)),
        "stride-long": tensor(stride=(2, 1, 1)),
        "stride-none": tensor(stride=None),
        "offset-text": tensor(offset="0"),
        "offset-float": tensor(offset=0.0),
        "offset-none": tensor(offset=None),
        "storage-text": tensor(text("0")),
        "storage-tensor": tensor(tensor()),
        "storage-missing": tensor(storage(key="7")),
        "storage-doubles": tensor(storage("torch:DoubleStorage")),
        "storage-complex": tensor(storage("torch:ComplexDoubleStorage")),
        "storage-unknown": tensor(storage("torch:HyperStorage")),
        "storage-class": tensor(storage("torch:Tensor")),
        "storage-base": tensor(storage("torch.storage:TypedStorage")),
        "key-path": tensor(storage(key="../../../../../../etc/passwd")),
        "key-absolute": tensor(storage(key="/etc/passwd")),
        "key-dots": tensor(storage(key="..")),
        "key-other-record": tensor(storage("torch:ByteStorage", key="../data.pkl"), size=(2, 2)),
        "key-other-record-root": tensor(storage("torch:ByteStorage", key="../version"), size=(1, 1), stride=(1, 1)),
        "key-empty": tensor(storage(key="")),
        "key-null": tensor(storage(key="0\0")),
        "key-long": tensor(storage(key="9" * 100_000)),
        "key-space": tensor(storage(key=" 0")),
        "key-other-digits": tensor(storage(key="\u0660")),
        "numel-text": tensor(storage(numel="4")),
        "numel-negative": tensor(storage(numel=-4)),
    }
    for name, data in bad.items():
        yield Pickled(f"tensor-{name}", pickled(value({"w": data})), ANYTHING, "zl", heavy=True)
    million = 100_000
    for name, size in {"100000-ones": (1,) * million, "100000-zeros": (0,) * million, "many": (1,) * 65}.items():
        data = pickled(value({"w": tensor(size=size, stride=(1,) * len(size))}))
        yield Pickled(f"tensor-dimensions-{name}", data, ANYTHING, "zl" if len(size) > 100 else "", heavy=True)
    lots = {f"w{index}": tensor(size=(2**30,), stride=(0,)) for index in range(300)}
    yield Pickled("tensor-all-1tb", pickled(value(lots)), ANYTHING, "zl", heavy=True)
    # the same record as two types, and a state dict whose names clash once they are paths
    both = {"w": tensor(), "v": tensor(storage("torch:LongStorage", numel=4), size=(4,), stride=(1,))}
    yield Pickled("tensor-two-types", pickled(value(both)), ANYTHING, "zl", heavy=True)
    clash = {"a.b": tensor(), "a": {"b": tensor(size=(4,), stride=(1,))}}
    yield Pickled("tensor-names-clash", pickled(value(clash)), ANYTHING, "", heavy=True)
    again = DICT + text("w") + tensor() + SETITEM + text("w") + tensor(size=(4,), stride=(1,)) + SETITEM
    yield Pickled("tensor-name-twice", pickled(again), ANYTHING, "", heavy=True)
    for name, other in {
        "sparse": call("torch._utils:_rebuild_sparse_tensor", named("torch:sparse_coo"), (tensor(), tensor(), (2, 2))),
        "quantised": call("torch._utils:_rebuild_qtensor", storage("torch:QInt8Storage"), 0, (2,), (1,), (1, 1.0, 0)),
        "meta": call("torch._utils:_rebuild_meta_tensor_no_storage", named("torch:float32"), (10**12,), (1,), False),
        "subclass": call("torch._utils:_rebuild_wrapper_subclass", named("m:C"), named("torch:float32"), (10**12,)),
        "device": call("torch._utils:_rebuild_device_tensor_from_numpy", "x", named("torch:float32"), "cpu", False),
        "device-cpu": call("torch._utils:_rebuild_device_tensor_from_cpu_tensor", tensor(), "x", "cuda:9", False),
    }.items():
        yield Pickled(f"tensor-{name}", pickled(value({"w": other})), ANYTHING, "", heavy=True)
