"""Hostile folders as Hugging Face lays them out, and hostile metadata of safetensors."""

import json
import math
import struct
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from support.hostile_safetensors import part, safetensors
from support.hostile_zip import torch_zip
from support.opcodes import call, pickled
from support.payloads import ANYTHING

CONFIG = {
    "model_type": "clip_vision_model",
    "architectures": ["CLIPVisionModelWithProjection"],
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
    "projection_dim": 4,
    "hidden_act": "quick_gelu",
}
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def clip_shapes() -> dict[str, tuple[int, ...]]:
    """The tensors of the encoder that :data:`CONFIG` describes, in Hugging Face's names."""
    block = {f"self_attn.{part}_proj": (8, 8) for part in ("q", "k", "v", "out")}
    block |= {"mlp.fc1": (16, 8), "mlp.fc2": (8, 16), "layer_norm1": (8,), "layer_norm2": (8,)}
    layers = {f"encoder.layers.0.{name}": shape for name, shape in block.items()}
    layers |= {"pre_layrnorm": (8,), "post_layernorm": (8,)}
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.class_embedding": (8,),
        "embeddings.patch_embedding.weight": (8, 3, 4, 4),
        "embeddings.position_embedding.weight": (5, 8),
    }
    shapes |= {f"{name}.weight": shape for name, shape in layers.items()}
    shapes |= {f"{name}.bias": shape[:1] for name, shape in layers.items()}
    return {"visual_projection.weight": (4, 8)} | {f"vision_model.{name}": shape for name, shape in shapes.items()}


def clip_file(names: Iterable[str] | None = None, metadata: Mapping[str, str] | None = None) -> bytes:
    """A safetensors file of these tensors (all of them by default), each with numbers of its own."""
    shapes, header, data = clip_shapes(), {}, b""
    for name in shapes if names is None else names:
        count = math.prod(shapes[name])
        header[name] = part(len(data), len(data) + 4 * count, shapes[name])
        data += struct.pack(f"<{count}f", *(len(data) + index / 1024 for index in range(count)))
    return safetensors({**header, **({} if metadata is None else {"__metadata__": dict(metadata)})}, data)


GOOD = clip_file()
NAMES = sorted(clip_shapes())
FIRST, SECOND = NAMES[0], NAMES[-1]
SHARDS = {"one": clip_file(NAMES[:9]), "two": clip_file(NAMES[9:])}
WEIGHT_MAP = {name: "one.safetensors" if name in NAMES[:9] else "two.safetensors" for name in NAMES}


def folders() -> Iterator[tuple[str, dict[str, bytes], str | bool | None, bool]]:
    """(name, file name -> content, expected error or False, whether it takes memory)."""
    config = json.dumps(CONFIG).encode()

    def changed(**values: Any) -> bytes:
        return json.dumps({**CONFIG, **values}).encode()

    # what the tensors are is in the weights: a reader may leave the configuration to those who build the model
    for name, content in {
        "hidden-1e9": changed(hidden_size=10**9),
        "layers-1e9": changed(num_hidden_layers=10**9),
        "image-1e9": changed(image_size=10**9),
        "patch-zero": changed(patch_size=0),
        "heads-zero": changed(num_attention_heads=0),
        "hidden-negative": changed(hidden_size=-8),
        "hidden-text": changed(hidden_size="8"),
        "hidden-float": changed(hidden_size=8.5),
        "hidden-bool": changed(hidden_size=True),
        "hidden-null": changed(hidden_size=None),
        "hidden-nan": config.replace(b'"hidden_size": 8', b'"hidden_size": NaN'),
        "hidden-digits": config.replace(b'"hidden_size": 8', b'"hidden_size": ' + b"9" * 100_000),
        "bert": changed(model_type="bert", architectures=["BertModel"]),
        "auto-map": changed(auto_map={"AutoModel": "modeling.Model"}),
        "vision-config-list": changed(vision_config=[1]),
        "list": b"[]",
        "number": b"7",
        "empty": b"",
        "text": b"import os",
        "twice": config[:-1] + b", " + config[1:],
        "not-utf8": b'{"\xff": 1}',
        "surrogate": changed(model_type="\ud800"),
        "escape": changed(model_type="\x1b[2J\nbert"),
        "nested": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
        "nested-list": b"[" * 1_000_000,
        "string-100mb": lambda: b'{"model_type": "' + b"x" * 100_000_000 + b'"}',
        "million-keys": json.dumps({str(key): 0 for key in range(500_000)}).encode(),
    }.items():
        heavy = name.startswith(("nested", "string", "million", "hidden-digits"))
        yield f"config-{name}", {"config.json": content, WEIGHTS: GOOD}, False, heavy
    yield "config-alone", {"config.json": config}, ANYTHING, False
    yield "nothing", {}, ANYTHING, False

    def sharded(weight_map: Any, **shards: bytes) -> dict[str, bytes]:
        index = weight_map if isinstance(weight_map, bytes) else json.dumps({"weight_map": weight_map}).encode()
        found = {f"{key}.safetensors": content for key, content in (shards or SHARDS).items()}
        return {"config.json": config, INDEX: index, **found}

    outside = "../outside.safetensors"
    for name, shard in {
        "outside": outside,
        "outside-dot": "./../outside.safetensors",
        "outside-folder": f"x/../{outside}",
        "absolute": "/etc/passwd",
        "backslash": "..\\outside.safetensors",
        "null": "one\0.safetensors",
        "empty": "",
        "dot": ".",
        "suffix-alone": ".safetensors",
        "device": "/dev/zero",
        "other-suffix": "config.json",
        "missing-shard": "three.safetensors",
        "wrong-shard": "two.safetensors",
        "number": 1,
        "none": None,
        "nested": {"v": "one.safetensors"},
        "long": "a" * 100_000 + ".safetensors",
        "newline": "a\nb\x1b[2J.safetensors",
        "surrogate": "\ud800.safetensors",
    }.items():
        files = {**sharded({**WEIGHT_MAP, FIRST: shard}), outside: clip_file([FIRST])}
        yield f"index-{name}", files, ANYTHING, name == "device"
    many = {f"w{k}": f"{k}.safetensors" for k in range(100_000)}
    yield "index-many", sharded({**WEIGHT_MAP, **many}), ANYTHING, True
    yield "index-good", sharded(WEIGHT_MAP), False, False
    yield "index-list", sharded(["one.safetensors"]), ANYTHING, False
    yield "index-null", sharded(None), ANYTHING, False
    yield "index-text", sharded("one.safetensors"), ANYTHING, False
    yield "index-no-tensors", sharded({}), ANYTHING, False
    yield "index-tensor-not-listed", sharded({k: v for k, v in WEIGHT_MAP.items() if k != FIRST}), ANYTHING, False
    two = clip_file([FIRST, *NAMES[9:]])
    yield "index-two-shards", sharded(WEIGHT_MAP, one=SHARDS["one"], two=two), ANYTHING, False
    twice = json.dumps({"weight_map": WEIGHT_MAP}).replace("{", '{"' + FIRST + '": "two.safetensors", ', 2).encode()
    yield "index-twice", sharded(twice), ANYTHING, False
    yield "index-deep", sharded(b'{"weight_map":' + b'{"a":' * 100_000 + b"1" + b"}" * 100_001), ANYTHING, True
    yield "index-not-json", sharded(b"import os"), ANYTHING, False
    yield "index-blank", sharded(b""), ANYTHING, False
    yield "index-is-a-list", sharded(b"[]"), ANYTHING, False
    yield "index-and-single", {**sharded(WEIGHT_MAP), WEIGHTS: clip_file([FIRST])}, False, False
    nan = bytearray(GOOD)
    nan[-4:] = struct.pack("<f", float("nan"))
    yield "nan", {"config.json": config, WEIGHTS: bytes(nan)}, ANYTHING, False
    nan[-4:] = struct.pack("<f", float("-inf"))
    yield "inf", {"config.json": config, WEIGHTS: bytes(nan)}, ANYTHING, False
    yield "good", {"config.json": config, WEIGHTS: GOOD}, False, False
    evil = torch_zip(pickled(call("os:system", "touch canary")))
    yield "pickle", {"config.json": config, "pytorch_model.bin": evil}, r"os\.system", False
    index = json.dumps({"weight_map": {"w": "pytorch_model-1.bin"}}).encode()
    files = {"config.json": config, "pytorch_model.bin.index.json": index, "pytorch_model-1.bin": evil}
    yield "pickle-sharded", files, r"os\.system", False
    yield "pickle-as-safetensors", {"config.json": config, WEIGHTS: evil}, f"os\\.system|{WEIGHTS}", False
    clip = {"model_cfg": {"embed_dim": 4, "vision_cfg": {"layers": 1, "width": 8, "patch_size": 4, "image_size": 8}}}
    for name, content in {
        "layers-1e9": json.dumps({"model_cfg": {**clip["model_cfg"], "vision_cfg": {"layers": 10**9}}}).encode(),
        "timm": json.dumps(
            {"model_cfg": {"vision_cfg": {"timm_model_name": "x", "timm_model_pretrained": True}}}
        ).encode(),
        "hf-text": json.dumps({"model_cfg": {"text_cfg": {"hf_model_name": "../../x"}}}).encode(),
        "list": b"[]",
        "nested": b'{"model_cfg":' * 100_000,
        "empty": b"",
    }.items():
        yield f"open-clip-{name}", {"open_clip_config.json": content, "open_clip_model.safetensors": GOOD}, False, False


def metadata_files() -> Iterator[tuple[str, bytes]]:
    """Safetensors files that look like ours, whose metadata asks for a model without end."""
    arguments = {"width": 8, "layers": 1, "heads": 2, "image_size": 8, "patch_size": 4, "output_dim": 4}
    for name, encoder in {
        "layers-1e9": {"arguments": {**arguments, "layers": 1e9}},
        "layers-int": {"arguments": {**arguments, "layers": 10**9}},
        "width-1e9": {"arguments": {**arguments, "width": 10**9}},
        "image-1e9": {"arguments": {**arguments, "image_size": 10**9}},
        "ratio-1e9": {"arguments": {**arguments, "mlp_ratio": 1e9}},
        "patch-zero": {"arguments": {**arguments, "patch_size": 0}},
        "unknown": {"arguments": {**arguments, "act_layer": "os.system"}},
        "name": {"architecture": "../../etc/passwd"},
        "list": {"arguments": []},
        "none": None,
        "number": 7,
        "deep": "[" * 50_000,
    }.items():
        for key in ("encoder", "preprocessing"):
            value_text = encoder if isinstance(encoder, str) else json.dumps(encoder)
            metadata = {
                "format": "pareto-folded",
                "format_version": "1",
                "task_names": '["a"]',
                "layers": "{}",
                "encoder": json.dumps({"arguments": arguments}),
                key: value_text,
            }
            yield f"{key}-{name}", clip_file(metadata=metadata)
            del metadata["format"]
            yield f"{key}-{name}-converted", clip_file(metadata=metadata)
