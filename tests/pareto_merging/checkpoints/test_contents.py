"""Preprocessing as Hugging Face's and open_clip's configurations write it."""

from typing import Any

import pytest

from pareto_merging.checkpoints import encoders
from pareto_merging.checkpoints.hugging_face import hugging_face_preprocessing, preprocessing_from_hugging_face
from pareto_merging.checkpoints.open_clip import open_clip_preprocessing, preprocessing_from_open_clip
from pareto_merging.errors import UserError

OURS = {"size": 12, "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}


def test_preprocessing_round_trips() -> None:
    assert preprocessing_from_hugging_face(hugging_face_preprocessing(OURS)) == OURS
    assert preprocessing_from_open_clip(open_clip_preprocessing(OURS), 12) == OURS


def test_preprocessing_defaults_are_clips() -> None:
    default = encoders.default_preprocessing({"architecture": "ViT-B-32"})
    assert preprocessing_from_hugging_face({}) == default
    assert preprocessing_from_open_clip({}, 224) == default
    assert preprocessing_from_open_clip({"mean": None, "size": 999}, 224) == default


def test_preprocessing_as_old_and_new_transformers_write_it() -> None:
    transformers = pytest.importorskip("transformers")
    old = {"feature_extractor_type": "CLIPFeatureExtractor", "size": 12, "crop_size": 12, "resample": 3}
    old |= {"do_center_crop": True, "do_normalize": True, "do_resize": True, "image_mean": OURS["mean"]}
    assert preprocessing_from_hugging_face({**old, "image_std": OURS["std"]}) == OURS
    processor = transformers.CLIPImageProcessor(
        size={"shortest_edge": 12}, crop_size=12, image_mean=OURS["mean"], image_std=OURS["std"]
    )
    written = processor.to_dict()
    assert preprocessing_from_hugging_face(written) == OURS
    assert preprocessing_from_hugging_face({"image_processor": written, "processor_class": "CLIPProcessor"}) == OURS


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
        preprocessing_from_hugging_face({**hugging_face_preprocessing(OURS), **change}, "p.json")
    assert str(caught.value).startswith(f"p.json: {message}")


@pytest.mark.parametrize(
    "change", [{"interpolation": "bilinear"}, {"resize_mode": "squash"}, {"mode": "L"}, {"mean": 0.5}, {"std": [1, 2]}]
)
def test_open_clip_preprocessing_that_is_not_clips_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(change))):
        preprocessing_from_open_clip({**open_clip_preprocessing(OURS), **change}, 12)
