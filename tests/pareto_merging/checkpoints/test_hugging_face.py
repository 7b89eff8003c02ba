"""Hugging Face's config.json against transformers' own."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from pareto_merging.checkpoints import hugging_face
from pareto_merging.checkpoints.architecture import (
    Architecture,
    from_description,
)
from pareto_merging.checkpoints.hugging_face import (
    check_hugging_face_config,
    from_hugging_face_config,
    from_hugging_face_text_config,
)
from pareto_merging.errors import UserError

SMALL = Architecture(12, 4, 32, 2, 4, 49, 8, True)


def test_a_config_without_values_has_those_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.CLIPVisionConfig()
    assert {key: getattr(theirs, key) for key in hugging_face._VISION_DEFAULTS} == hugging_face._VISION_DEFAULTS
    theirs = transformers.CLIPTextConfig()
    assert {key: getattr(theirs, key) for key in hugging_face._TEXT_DEFAULTS} == hugging_face._TEXT_DEFAULTS
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
    config = hugging_face.hugging_face_vision_config(SMALL, torch.float32)
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
