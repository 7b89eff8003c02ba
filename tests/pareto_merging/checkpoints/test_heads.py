"""Zero-shot heads of the release of task_vectors."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support import clip, pickled_modules
from support.checkpoint_cases import RELEASE

from pareto_merging.checkpoints.checkpoint import open_checkpoint
from pareto_merging.checkpoints.heads import open_head
from pareto_merging.errors import UserError

pytest.importorskip("open_clip")
pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("no_network")


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("scale", [100.0, 41.5])
def test_a_head_of_task_vectors(scale: float, legacy: bool, transposed: bool, tmp_path: Path) -> None:
    path = pickled_modules.task_vectors_head(
        tmp_path / "head.pt", 3, logit_scale=scale, legacy=legacy, transposed=transposed
    )
    weight, logit_scale = open_head(path)
    assert weight.dtype == torch.float32 and weight.shape == (5, clip.EMBED)
    torch.testing.assert_close(weight, clip.head_rows(3), atol=1e-6, rtol=0)
    torch.testing.assert_close(weight.norm(dim=-1), torch.ones(5), atol=1e-6, rtol=0)
    assert logit_scale == pytest.approx(scale, rel=1e-5)


@pytest.mark.parametrize("name", ["head_MNISTVal.pt", "head_DTDVal.pt"])
def test_the_heads_of_the_release(name: str) -> None:
    weight, logit_scale = open_head(str(RELEASE / name))
    torch.testing.assert_close(weight, load_file(RELEASE / "expected.safetensors")[name], atol=1e-6, rtol=0)
    assert logit_scale == pytest.approx(100.0, rel=1e-5)


def test_an_encoder_is_no_head_and_a_head_no_encoder() -> None:
    with pytest.raises(UserError, match=r"zeroshot\.pt") as raised:
        open_head(RELEASE / "zeroshot.pt")
    assert "\n" not in str(raised.value)
    with pytest.raises(UserError, match=r"head_DTDVal\.pt") as raised:
        open_checkpoint(RELEASE / "head_DTDVal.pt")
    assert "\n" not in str(raised.value)
