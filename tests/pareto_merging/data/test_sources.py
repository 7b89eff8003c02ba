"""Images from tensors, files and folders; batches that a resumed run sees again."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from pareto_merging.data.sources import BatchStream, TensorImages, batch_indices, labelled_batches, open_images
from pareto_merging.data.tasks import ZeroShotHead, read_head
from pareto_merging.errors import UserError


def clip_like(size: int) -> dict[str, object]:
    """Preprocessing of images of ``size`` pixels that is not CLIP's own."""
    return {"size": size, "mean": [0.5, 0.25, 0.75], "std": [0.5, 0.25, 0.125]}


@pytest.mark.parametrize(("size", "batch"), [(10, 3), (3, 10), (7, 7), (1, 4)])
def test_batches_are_permutations_and_depend_on_the_step_alone(size: int, batch: int) -> None:
    steps = 4 * size + 6
    stream = [i for step in range(steps) for i in batch_indices(size, batch, step, (0, 1))]
    for epoch in range(len(stream) // size):
        assert sorted(stream[epoch * size : (epoch + 1) * size]) == list(range(size))
    assert batch_indices(size, batch, 5, (0, 1)) == stream[5 * batch : 6 * batch]
    if size > 3:
        assert stream[:size] != stream[size : 2 * size]
        assert batch_indices(size, batch, 0, (0, 2)) != batch_indices(size, batch, 0, (0, 1))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stream_from_the_middle_is_the_rest_of_the_whole(workers: int) -> None:
    data = TensorImages(torch.arange(20.0).view(10, 2))
    whole = list(BatchStream(data, 4, 0, 6, (3,), workers))
    rest = list(BatchStream(data, 4, 4, 6, (3,), workers))
    assert len(whole) == 6
    assert all(torch.equal(a, b) for a, b in zip(whole[4:], rest, strict=True))


class Plain(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """A dataset of a user's own: images only."""

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.full((2,), float(index))


def test_datasets_of_images_only() -> None:
    (batch,) = BatchStream(Plain(), 5, 0, 1, (0,))
    assert sorted(batch[:, 0].tolist()) == [0, 1, 2, 3, 4]
    images, labels = next(labelled_batches(Plain(), 5))
    assert images.shape == (5, 2)
    assert labels.tolist() == [-1] * 5


def test_folder_of_images(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for label, name in enumerate(("cat", "dog")):
        (tmp_path / name).mkdir()
        for index in range(2 + label):
            pixels = rng.integers(0, 255, (20, 30, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{index}.png")
    data = open_images(str(tmp_path), clip_like(16))
    plain = open_images(str(tmp_path), {"size": 16, "mean": [0.0] * 3, "std": [1.0] * 3})
    shift, scale = torch.tensor([0.5, 0.25, 0.75])[:, None, None], torch.tensor([0.5, 0.25, 0.125])[:, None, None]
    torch.testing.assert_close(data[0][0], (plain[0][0] - shift) / scale)
    assert len(data) == 5  # type: ignore[arg-type]
    image, label = data[4]
    assert image.shape == (3, 16, 16)
    assert label == 1
    images, labels = next(labelled_batches(data, 8))
    assert images.shape == (5, 3, 16, 16)
    assert labels.tolist() == [0, 0, 1, 1, 1]
    (tmp_path / "cat" / "0.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"0.png: expected an image"):
        data[0]


def test_safetensors_images_and_errors(tmp_path: Path) -> None:
    path = tmp_path / "images.safetensors"
    save_file({"images": torch.zeros(4, 3, 2, 2), "labels": torch.tensor([0, 1, 2, 1])}, path)
    images, labels = next(labelled_batches(open_images(str(path), clip_like(2)), 8))
    assert images.shape == (4, 3, 2, 2)
    assert labels.tolist() == [0, 1, 2, 1]
    save_file({"pixels": torch.zeros(1)}, path)
    with pytest.raises(UserError, match="expected a tensor named images, got pixels"):
        open_images(str(path), clip_like(2))
    save_file({"images": torch.zeros(4, 3, 2, 2), "labels": torch.tensor([0])}, path)
    with pytest.raises(UserError, match=r"labels: expected shape \[4\], got \[1\]"):
        open_images(str(path), clip_like(2))
    with pytest.raises(UserError, match="got nothing there"):
        open_images(str(tmp_path / "none"), clip_like(2))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="expected images"):
        open_images(str(tmp_path / "empty"), clip_like(2))
    for source in ("digits:sideways/merging", "digits:upright/holiday"):
        with pytest.raises(UserError, match=source):
            open_images(source, clip_like(8))


def test_heads(tmp_path: Path) -> None:
    path = tmp_path / "head.safetensors"
    weight = 3 * torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    save_file({"weight": weight}, path, metadata={"logit_scale": "25"})
    head = read_head(path)
    torch.testing.assert_close(head.weight.norm(dim=1), torch.ones(5))
    features = torch.randn(2, 8)
    expected = 25 * torch.cosine_similarity(features[:, None], weight[None], dim=-1)
    torch.testing.assert_close(head(features), expected)
    save_file({"a": weight, "b": -weight}, path)
    torch.testing.assert_close(read_head(path, "b").weight, -head.weight)
    assert read_head(path, "b").logit_scale == 100
    with pytest.raises(UserError, match="expected a tensor named weight or c, got a, b"):
        read_head(path, "c")
    save_file({"weight": weight * torch.nan}, path)
    with pytest.raises(UserError, match="weight: expected finite numbers"):
        read_head(path)
    with pytest.raises(ValueError, match=r"weight: expected shape \[classes, dim\], got \[3\]"):
        ZeroShotHead(torch.zeros(3))
