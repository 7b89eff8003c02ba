"""The shape of a CLIP from tensors' shapes and from configurations, against open_clip's and transformers' own."""

import time
from dataclasses import replace
from typing import Any

import pytest
import torch

from pareto_merging.checkpoints import architecture as arch
from pareto_merging.checkpoints import encoders
from pareto_merging.checkpoints.architecture import (
    Architecture,
    description_of,
    expected_shapes,
    from_description,
    from_shapes,
)
from pareto_merging.errors import UserError

open_clip = pytest.importorskip("open_clip")


SMALL = Architecture(12, 4, 32, 2, 4, 49, 8, True)
ARGUMENTS = description_of(SMALL)["arguments"]
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
    assert description_of(found) == {"architecture": name, "quick_gelu": True}
    config = open_clip.get_model_config(name)["vision_cfg"]
    assert found.heads == config["width"] // config.get("head_width", 64)
    assert from_description(description_of(found)) == found


def test_heads_of_a_known_width_and_depth_are_right_at_another_resolution_and_without_a_projection() -> None:
    large = from_shapes(real_shapes({"architecture": "ViT-H-14"}))
    assert large.heads == 16  # heads of 80, where most have 64
    assert from_shapes(expected_shapes(replace(large, image_size=336, output_dim=None))).heads == 16


@pytest.mark.parametrize("mlp_width", [31, 49, 64, 97, 128])
@pytest.mark.parametrize("output_dim", [8, 32])
def test_another_model_is_described_by_arguments_that_build_it(mlp_width: int, output_dim: int) -> None:
    small = replace(SMALL, mlp_width=mlp_width, output_dim=output_dim)
    description = description_of(small)
    assert "architecture" not in description
    assert real_shapes(description) == {name: list(shape) for name, shape in expected_shapes(small).items()}
    assert from_shapes(real_shapes(description), heads=4, quick_gelu=True) == small
    assert from_description(description) == small


def test_every_width_survives_the_ratio() -> None:
    for width in (48, 49, 768, 1664):
        for mlp_width in range(1, 400):
            assert int(width * arch.mlp_ratio_of(width, mlp_width)) == mlp_width


def test_one_difference_from_a_model_of_open_clip_is_no_longer_that_model() -> None:
    base = from_description({"architecture": "ViT-B-32"})
    assert description_of(base)["architecture"] == "ViT-B-32"
    changes: list[dict[str, Any]] = [
        *({"image_size": 320}, {"patch_size": 28}, {"layers": 11}, {"heads": 8}, {"mlp_width": 3071}),
        *({"output_dim": 511}, {"output_dim": None}),
    ]
    for change in changes:
        assert "arguments" in description_of(replace(base, **change)), change
    assert description_of(base)["quick_gelu"] is False
    assert description_of(replace(base, quick_gelu=None))["quick_gelu"] is False


def test_without_a_projection_the_description_says_so() -> None:
    bare = replace(SMALL, output_dim=None)
    assert "proj" not in expected_shapes(bare)
    assert from_shapes(expected_shapes(bare), heads=4, quick_gelu=True) == bare
    assert description_of(bare)["arguments"]["output_dim"] is None
    assert from_description(description_of(bare)) == bare


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
    # open_clip's import is not ours to time
    from_description({"architecture": "ViT-B-32"})
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
    description = description_of(SMALL)
    description["arguments"][setting] = value
    with pytest.raises(UserError, match=f"got {setting}="):
        from_description(description)


def test_settings_without_an_effect_on_features_are_passed_over() -> None:
    description = description_of(SMALL)
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
        ({"arguments": {**ARGUMENTS, "heads": 5}}, "heads"),
        (
            {"arguments": {**ARGUMENTS, "image_size": [12, 16]}},
            "image_size: expected a square",
        ),
        (
            {"arguments": {**ARGUMENTS, "width": "32"}},
            "width: expected a positive whole number",
        ),
        ({"arguments": {**ARGUMENTS, "mlp_ratio": float("nan")}}, "mlp_ratio"),
        ({"arguments": {**ARGUMENTS, "mlp_ratio": float("inf")}}, "mlp_ratio"),
        ({"arguments": {**ARGUMENTS, "layers": None}}, "layers"),
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
