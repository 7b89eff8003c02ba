"""The shape of a CLIP from tensors' shapes and from configurations, against open_clip's and transformers' own."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest
import torch

from pareto_merging.checkpoints import architecture as arch
from pareto_merging.checkpoints import encoders
from pareto_merging.checkpoints.architecture import (
    Architecture,
    check_hugging_face_config,
    describe,
    expected_shapes,
    from_description,
    from_hugging_face_config,
    from_hugging_face_text_config,
    from_shapes,
    text_from_shapes,
)
from pareto_merging.errors import UserError

open_clip = pytest.importorskip("open_clip")

SMALL = Architecture(12, 4, 32, 2, 4, 49, 8, True)
CANONICAL = [
    *("ViT-B-32", "ViT-B-32-256", "ViT-B-16", "ViT-B-16-plus-240", "ViT-L-14", "ViT-L-14-336"),
    *("ViT-H-14", "ViT-H-14-378", "ViT-g-14", "ViT-bigG-14"),
]


def real_shapes(description: dict[str, Any]) -> dict[str, list[int]]:
    """Of open_clip's own module, without its memory."""
    with torch.device("meta"):
        model = encoders.build(description)
    return {name: list(tensor.shape) for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("name", CANONICAL)
def test_a_model_of_open_clip_is_found_by_its_shapes(name: str) -> None:
    found = from_shapes(real_shapes({"architecture": name}), quick_gelu=True)
    assert describe(found) == {"architecture": name, "quick_gelu": True}
    config = open_clip.get_model_config(name)["vision_cfg"]
    assert found.heads == config["width"] // config.get("head_width", 64)
    assert from_description(describe(found)) == found


def test_heads_of_a_known_width_and_depth_are_right_at_another_resolution_and_without_a_projection() -> None:
    large = from_shapes(real_shapes({"architecture": "ViT-H-14"}))
    assert large.heads == 16  # heads of 80, where most have 64
    assert from_shapes(expected_shapes(replace(large, image_size=336, output_dim=None))).heads == 16


@pytest.mark.parametrize("mlp_width", [31, 49, 64, 97, 128])
@pytest.mark.parametrize("output_dim", [8, 32])
def test_another_model_is_described_by_arguments_that_build_it(mlp_width: int, output_dim: int) -> None:
    small = replace(SMALL, mlp_width=mlp_width, output_dim=output_dim)
    description = describe(small)
    assert "architecture" not in description
    assert real_shapes(description) == {name: list(shape) for name, shape in expected_shapes(small).items()}
    assert from_shapes(real_shapes(description), heads=4, quick_gelu=True) == small
    assert from_description(description) == small


def test_every_width_survives_the_ratio() -> None:
    for width in (48, 49, 768, 1664):
        for mlp_width in range(1, 400):
            assert int(width * arch._mlp_ratio(width, mlp_width)) == mlp_width


def test_one_difference_from_a_model_of_open_clip_is_no_longer_that_model() -> None:
    base = from_description({"architecture": "ViT-B-32"})
    assert describe(base)["architecture"] == "ViT-B-32"
    changes: list[dict[str, Any]] = [
        *({"image_size": 320}, {"patch_size": 28}, {"layers": 11}, {"heads": 8}, {"mlp_width": 3071}),
        *({"output_dim": 511}, {"output_dim": None}),
    ]
    for change in changes:
        assert "arguments" in describe(replace(base, **change)), change
    assert describe(base)["quick_gelu"] is False
    assert describe(replace(base, quick_gelu=None))["quick_gelu"] is False


def test_without_a_projection_the_description_says_so() -> None:
    bare = replace(SMALL, output_dim=None)
    assert "proj" not in expected_shapes(bare)
    assert from_shapes(expected_shapes(bare), heads=4, quick_gelu=True) == bare
    assert describe(bare)["arguments"]["output_dim"] is None
    assert from_description(describe(bare)) == bare


def changed(**changes: Any) -> dict[str, Any]:
    return {**expected_shapes(SMALL), **{name.replace("__", "."): shape for name, shape in changes.items()}}


def test_missing_tensors_are_named() -> None:
    for name in expected_shapes(SMALL):
        if name != "proj":
            shapes = expected_shapes(SMALL)
            del shapes[name]
            with pytest.raises(UserError, match=f"none named {name}".replace(".", r"\.")):
                from_shapes(shapes, heads=4)
    shapes = {k.replace("resblocks.1", "resblocks.7"): v for k, v in expected_shapes(SMALL).items()}
    with pytest.raises(UserError, match=r"none named transformer\.resblocks\.1\."):
        from_shapes(shapes, heads=4)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({}, "conv1.weight"),
        (changed(extra=[3]), "got also extra"),
        (changed(conv1__weight=[32, 4, 4, 4]), "conv1.weight: expected shape [width, 3, patch, patch]"),
        (changed(conv1__weight=[32, 3, 4, 2]), "conv1.weight: expected shape [width, 3, patch, patch]"),
        (changed(conv1__weight=[32, 48]), "conv1.weight: expected 4 dimensions"),
        (changed(positional_embedding=[11, 32]), "square grid of patches, got 11 rows"),
        (changed(positional_embedding=[1, 32]), "square grid of patches, got 1 rows"),
        (changed(positional_embedding=[10, 31]), "positional_embedding: expected shape [10, 32], got [10, 31]"),
        (changed(class_embedding=[31]), "class_embedding: expected shape [32], got [31]"),
        (changed(proj=[31, 8]), "proj: expected shape [32, 8], got [31, 8]"),
        (changed(proj=[8]), "proj: expected 2 dimensions"),
        (changed(class_embedding=[0]), "class_embedding: expected a shape"),
        (changed(class_embedding=[True]), "class_embedding: expected a shape"),
        (changed(class_embedding=[32.0]), "class_embedding: expected a shape"),
        (changed(class_embedding=[-32]), "class_embedding: expected a shape"),
        (changed(class_embedding=[10**4000]), "class_embedding: expected a shape"),
        (changed(class_embedding=[1] * 100_000), "class_embedding: expected a shape"),
        (
            {**expected_shapes(SMALL), "transformer.resblocks.1.mlp.c_fc.bias": [48]},
            "transformer.resblocks.1.mlp.c_fc.bias: expected shape [49], got [48]",
        ),
        (
            {**expected_shapes(SMALL), "transformer.resblocks.1.attn.in_proj_weight": [32, 96]},
            "transformer.resblocks.1.attn.in_proj_weight: expected shape [96, 32], got [32, 96]",
        ),
    ],
)
def test_shapes_that_are_no_plain_clip_are_one_line(shapes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        from_shapes(shapes, heads=4)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize("heads", [0, -4, 5, 64, True, 10**30])
def test_heads_that_do_not_divide_the_width_are_an_error(heads: int) -> None:
    with pytest.raises(UserError, match="heads: expected"):
        from_shapes(expected_shapes(SMALL), heads=heads)


def test_heads_that_nothing_tells_are_asked_for() -> None:
    with pytest.raises(UserError, match="heads: expected the number of attention heads for a width of 32, got none"):
        from_shapes(expected_shapes(SMALL))
    assert from_shapes(expected_shapes(replace(SMALL, width=192))).heads == 3


def test_hostile_names_and_numbers_take_no_time() -> None:
    from_description({"architecture": "ViT-B-32"})  # open_clip's import is not ours to time
    arch._known()
    hostile = {f"transformer.resblocks.{i}.ln_1.weight": [2**31 - 1] for i in range(0, 9999, 2)}
    hostile |= {f"transformer.resblocks.{'9' * i}.ln_1.weight": [1] for i in range(5, 2000)}
    start = time.process_time()
    with pytest.raises(UserError):
        from_shapes({**expected_shapes(SMALL), **hostile}, heads=4)
    assert time.process_time() - start < 5


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        *[("pool_type", "avg"), ("pool_type", "none"), ("ls_init_value", 0.1), ("ls_init_value", 0)],
        *[("attentional_pool", True), ("no_ln_pre", True), ("qk_norm", True), ("block_type", "custom")],
        *[("scale_fc", True), ("norm_kwargs", {"eps": 1e-6}), ("act_kwargs", {"approximate": "tanh"})],
        *[("timm_model_name", "vit_base"), ("output_tokens", True), ("something_new", 3)],
    ],
)
def test_what_a_plain_clip_cannot_express_is_named(setting: str, value: object) -> None:
    description = describe(SMALL)
    description["arguments"][setting] = value
    with pytest.raises(UserError, match=f"got {setting}="):
        from_description(description)


def test_settings_without_an_effect_on_features_are_passed_over() -> None:
    description = describe(SMALL)
    description["arguments"] |= {"patch_dropout": 0.5, "final_ln_after_pool": True, "pool_type": "tok"}
    description["arguments"] |= {"block_type": "default", "attn_pooler_heads": 8, "ls_init_value": None}
    assert from_description(description) == SMALL


@pytest.mark.parametrize(
    "name", ["RN50", "ViT-B-16-SigLIP", "coca_ViT-B-32", "EVA02-B-16", "convnext_base", "ViT-M-16-alt"]
)
def test_models_of_open_clip_that_are_no_plain_clip_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=f"encoder {name}: "):
        from_description({"architecture": name})


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ({}, "expected architecture or arguments"),
        ({"architecture": 7}, "expected architecture or arguments"),
        ({"architecture": "ViT-B-23"}, "expected an open_clip model name"),
        ({"arguments": {**describe(SMALL)["arguments"], "heads": 5}}, "heads"),
        ({"arguments": {**describe(SMALL)["arguments"], "image_size": [12, 16]}}, "image_size: expected a square"),
        ({"arguments": {**describe(SMALL)["arguments"], "width": "32"}}, "width: expected a positive whole number"),
        ({"arguments": {**describe(SMALL)["arguments"], "mlp_ratio": float("nan")}}, "mlp_ratio"),
        ({"arguments": {**describe(SMALL)["arguments"], "mlp_ratio": float("inf")}}, "mlp_ratio"),
        ({"arguments": {**describe(SMALL)["arguments"], "layers": None}}, "layers"),
    ],
)
def test_bad_descriptions_are_named(description: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        from_description(description)
    assert message in str(caught.value)


def test_quickgelu_names_have_it() -> None:
    assert from_description({"architecture": "ViT-B-32-quickgelu"}).quick_gelu is True
    assert from_description({"architecture": "ViT-B-32", "quick_gelu": True}).quick_gelu is True
    assert from_description({"architecture": "ViT-B-32"}).quick_gelu is False


# --- Hugging Face's config.json


def test_a_config_without_values_has_those_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.CLIPVisionConfig()
    assert {key: getattr(theirs, key) for key in arch._VISION_DEFAULTS} == arch._VISION_DEFAULTS
    theirs = transformers.CLIPTextConfig()
    assert {key: getattr(theirs, key) for key in arch._TEXT_DEFAULTS} == arch._TEXT_DEFAULTS
    for config in ({"model_type": "clip"}, {"model_type": "clip_vision_model"}):
        assert from_hugging_face_config(config) == (12, True)
        check_hugging_face_config(config, from_description({"architecture": "ViT-B-32", "quick_gelu": True}), "c")
    assert from_hugging_face_text_config({"model_type": "clip"}) == (8, True)


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
def test_configs_that_transformers_writes(act: str) -> None:
    transformers = pytest.importorskip("transformers")
    found = replace(SMALL, quick_gelu=act == "quick_gelu")
    vision = {
        "hidden_size": 32,
        "intermediate_size": 49,
        "projection_dim": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 12,
        "patch_size": 4,
        "hidden_act": act,
    }
    text = {"hidden_size": 24, "num_attention_heads": 3, "hidden_act": act}
    flat = transformers.CLIPVisionConfig(**vision).to_dict()
    whole = transformers.CLIPConfig(
        vision_config={**vision, "projection_dim": 99}, text_config=text, projection_dim=8
    ).to_dict()
    for config in (flat, whole):
        assert from_hugging_face_config(config) == (4, found.quick_gelu)
        check_hugging_face_config(config, found, "config.json")
        with pytest.raises(UserError, match="hidden_act: expected"):
            check_hugging_face_config(config, replace(found, quick_gelu=not found.quick_gelu), "config.json")
    assert from_hugging_face_text_config(whole) == (3, found.quick_gelu)


def test_the_second_mapping_of_old_configs_wins_as_in_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    config = {
        "model_type": "clip",
        "vision_config": {"num_attention_heads": 6, "hidden_act": "gelu"},
        "vision_config_dict": {"num_attention_heads": 4, "hidden_size": 64},
    }
    theirs = transformers.CLIPConfig(
        vision_config=dict(config["vision_config"]), vision_config_dict=config["vision_config_dict"]
    )
    ours = from_hugging_face_config(config)
    assert ours == (theirs.vision_config.num_attention_heads, theirs.vision_config.hidden_act == "quick_gelu")


@pytest.mark.parametrize(
    ("key", "field"),
    [
        *[("hidden_size", "width"), ("intermediate_size", "mlp_width"), ("num_hidden_layers", "layers")],
        *[("num_attention_heads", "heads"), ("patch_size", "patch_size"), ("image_size", "image_size")],
        ("projection_dim", "output_dim"),
    ],
)
def test_a_claim_that_differs_from_the_tensors_is_named(key: str, field: str) -> None:
    config = arch.hugging_face_vision_config(SMALL, torch.float32)
    check_hugging_face_config(config, SMALL, "config.json")
    other = replace(SMALL, **{field: getattr(SMALL, field) * 2})
    with pytest.raises(UserError, match=rf"config.json: {key}: expected \d+ as the tensors have, got"):
        check_hugging_face_config(config, other, "config.json")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ([], "expected a mapping"),
        ({}, "expected model_type clip or clip_vision_model, got 'None'"),
        ({"model_type": "siglip"}, "got 'siglip'"),
        ({"model_type": {"a": 1}}, "expected model_type"),
        ({"model_type": "clip", "vision_config": 3}, "vision_config: expected a mapping"),
        ({"model_type": "clip_vision_model", "hidden_act": "gelu_new"}, "hidden_act: expected quick_gelu or gelu"),
        ({"model_type": "clip_vision_model", "hidden_act": ["gelu"]}, "hidden_act: expected quick_gelu or gelu"),
        ({"model_type": "clip_vision_model", "layer_norm_eps": 1e-6}, "layer_norm_eps: expected 1e-05"),
        ({"model_type": "clip_vision_model", "layer_norm_eps": "1e-5"}, "layer_norm_eps: expected 1e-05"),
        ({"model_type": "clip_vision_model", "layer_norm_eps": float("nan")}, "layer_norm_eps: expected 1e-05"),
        ({"model_type": "clip_vision_model", "num_attention_heads": "12"}, "num_attention_heads: expected a positive"),
        ({"model_type": "clip_vision_model", "num_attention_heads": True}, "num_attention_heads: expected a positive"),
        ({"model_type": "clip_vision_model", "num_attention_heads": 7}, "divides the width 768, got 7"),
        ({"model_type": "clip_vision_model", "num_channels": 1}, "num_channels: expected 3"),
    ],
)
def test_other_configs_are_refused(config: Any, message: str) -> None:
    with pytest.raises(UserError) as caught:
        from_hugging_face_config(config, "x/config.json")
    assert str(caught.value).startswith("x/config.json: ") or "divides" in message
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ({"hidden_act": "gelu"}, "one hidden_act for both towers"),
        ({"eos_token_id": 7}, "eos_token_id: expected 49407"),
        ({"layer_norm_eps": 1e-12}, "text_config: layer_norm_eps"),
    ],
)
def test_a_text_tower_that_open_clip_would_compute_otherwise_is_refused(text: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        from_hugging_face_text_config({"model_type": "clip", "text_config": text})


# --- the text side and open_clip's configuration


@pytest.mark.parametrize("name", ["ViT-B-32", "ViT-L-14", "ViT-bigG-14", "ViT-S-16-alt"])
def test_the_model_configuration_builds_the_same_model(name: str) -> None:
    config = open_clip.get_model_config(name)
    with torch.device("meta"):
        model = open_clip.model.CLIP(config["embed_dim"], config["vision_cfg"], config["text_cfg"])
    shapes = {k: list(t.shape) for k, t in model.state_dict().items()}
    vision = from_shapes({k.removeprefix("visual."): s for k, s in shapes.items() if k.startswith("visual.")})
    text = text_from_shapes({k: s for k, s in shapes.items() if not k.startswith("visual.")})
    assert text.heads == config["text_cfg"]["heads"]
    with torch.device("meta"):
        again = open_clip.model.CLIP(**arch.open_clip_model_config(vision, text))
    assert {k: list(t.shape) for k, t in again.state_dict().items()} == shapes
    assert again.visual.transformer.resblocks[0].attn.num_heads == vision.heads


def test_towers_that_do_not_meet_are_refused() -> None:
    text = arch.TextArchitecture(7, 50, 24, 1, 3, 40, 9)
    with pytest.raises(UserError, match="expected a projection to 8 features as the images', got 9"):
        arch.open_clip_model_config(SMALL, text)
    with pytest.raises(UserError, match="expected a projection to 8 features as the images', got 9"):
        arch.hugging_face_clip_config(SMALL, text, torch.float32)
    with pytest.raises(UserError, match="expected a projection for open_clip"):
        arch.open_clip_model_config(replace(SMALL, output_dim=None))


# --- preprocessing

OURS = {"size": 12, "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}


def test_preprocessing_round_trips() -> None:
    assert arch.preprocessing_from_hugging_face(arch.hugging_face_preprocessing(OURS)) == OURS
    assert arch.preprocessing_from_open_clip(arch.open_clip_preprocessing(OURS), 12) == OURS


def test_preprocessing_defaults_are_clips() -> None:
    default = encoders.default_preprocessing({"architecture": "ViT-B-32"})
    assert arch.preprocessing_from_hugging_face({}) == default
    assert arch.preprocessing_from_open_clip({}, 224) == default
    assert arch.preprocessing_from_open_clip({"mean": None, "size": 999}, 224) == default


def test_preprocessing_as_old_and_new_transformers_write_it() -> None:
    transformers = pytest.importorskip("transformers")
    old = {"feature_extractor_type": "CLIPFeatureExtractor", "size": 12, "crop_size": 12, "resample": 3}
    old |= {"do_center_crop": True, "do_normalize": True, "do_resize": True, "image_mean": OURS["mean"]}
    assert arch.preprocessing_from_hugging_face({**old, "image_std": OURS["std"]}) == OURS
    processor = transformers.CLIPImageProcessor(
        size={"shortest_edge": 12}, crop_size=12, image_mean=OURS["mean"], image_std=OURS["std"]
    )
    written = processor.to_dict()
    assert arch.preprocessing_from_hugging_face(written) == OURS
    assert (
        arch.preprocessing_from_hugging_face({"image_processor": written, "processor_class": "CLIPProcessor"}) == OURS
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"do_center_crop": False}, "do_center_crop: expected true"),
        ({"do_resize": False}, "do_resize: expected true"),
        ({"do_normalize": False}, "do_normalize: expected true"),
        ({"do_rescale": 0}, "do_rescale: expected true"),
        ({"resample": 2}, "resample: expected 3"),
        ({"rescale_factor": 1.0}, "rescale_factor: expected 1/255"),
        ({"crop_size": 11}, "crop_size: expected 12 as size has, got 11"),
        ({"crop_size": {"height": 12, "width": 11}}, "crop_size: expected a square"),
        ({"size": {"height": 12, "width": 12}}, "size: expected shortest_edge"),
        ({"size": {"shortest_edge": "12"}}, "size: expected a positive whole number"),
        ({"image_mean": [0.5, 0.5]}, "mean: expected a number for each of three channels"),
        ({"image_mean": [0.5, 0.5, float("nan")]}, "mean: expected a number"),
        ({"image_std": [0.5, 0.5, 0.0]}, "std: expected a positive number"),
        ({"image_std": "0.5"}, "std: expected a positive number"),
        ({"image_processor_type": "SiglipImageProcessor"}, "expected CLIP's image processor"),
    ],
)
def test_preprocessing_that_is_not_clips_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        arch.preprocessing_from_hugging_face({**arch.hugging_face_preprocessing(OURS), **change}, "p.json")
    assert str(caught.value).startswith(f"p.json: {message}")


@pytest.mark.parametrize(
    "change", [{"interpolation": "bilinear"}, {"resize_mode": "squash"}, {"mode": "L"}, {"mean": 0.5}, {"std": [1, 2]}]
)
def test_open_clip_preprocessing_that_is_not_clips_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(change))):
        arch.preprocessing_from_open_clip({**arch.open_clip_preprocessing(OURS), **change}, 12)
