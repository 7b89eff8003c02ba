"""open_clip's model configuration against open_clip itself."""

from dataclasses import replace

import pytest
import torch

from pareto_merging.checkpoints import architecture as arch
from pareto_merging.checkpoints import hugging_face
from pareto_merging.checkpoints import open_clip as open_clip_files
from pareto_merging.checkpoints.architecture import (
    Architecture,
    from_shapes,
    text_from_shapes,
)
from pareto_merging.errors import UserError

open_clip = pytest.importorskip("open_clip")


SMALL = Architecture(12, 4, 32, 2, 4, 49, 8, True)


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
        again = open_clip.model.CLIP(**open_clip_files.open_clip_model_config(vision, text))
    assert {k: list(t.shape) for k, t in again.state_dict().items()} == shapes
    assert again.visual.transformer.resblocks[0].attn.num_heads == vision.heads


def test_towers_that_do_not_meet_are_refused() -> None:
    text = arch.TextArchitecture(7, 50, 24, 1, 3, 40, 9)
    with pytest.raises(UserError, match="expected a projection to 8 features as the images', got 9"):
        open_clip_files.open_clip_model_config(SMALL, text)
    with pytest.raises(UserError, match="expected a projection to 8 features as the images', got 9"):
        hugging_face.hugging_face_clip_config(SMALL, text, torch.float32)
    with pytest.raises(UserError, match="expected a projection for open_clip"):
        open_clip_files.open_clip_model_config(replace(SMALL, output_dim=None))
