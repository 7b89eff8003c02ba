"""Images as map-style datasets from a folder, a safetensors file or an embedded suite."""

import contextlib
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pareto_merging.checkpoints.safetensors import read_tensors
from pareto_merging.errors import UserError, user_errors

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm")


class TensorImages(Dataset[tuple[Tensor, Tensor]]):
    """Images held in memory. They are [n, C, H, W] with labels int64 [n] (−1: unlabelled)."""

    def __init__(self, images: Tensor, labels: Tensor | None = None) -> None:
        if images.ndim < 2 or not len(images) or not images.is_floating_point():
            got = f"{list(images.shape)} {images.dtype}"
            raise ValueError(f"images: expected floating-point [n, …] with n at least 1, got {got}")
        self.images = images
        self.labels = torch.full((len(images),), -1) if labels is None else labels.long()
        if self.labels.shape != (len(images),):
            raise ValueError(f"labels: expected shape [{len(images)}], got {list(self.labels.shape)}")

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index], self.labels[index]

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        return self.images[indices], self.labels[indices]


class FolderImages(Dataset[tuple[Tensor, int]]):
    """Images under a folder, found recursively and sorted. Its direct sub-folders, if any, are the classes in order.

    Args:
        root: the folder. transform: PIL image -> tensor [C, H, W].
    """

    def __init__(self, root: Path, transform: Callable[[Any], Tensor]) -> None:
        self.root, self.transform = root, transform
        names = [entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith(".")]
        # classes 0 … 10 in the order of their numbers
        numbered = all(name.isdecimal() for name in names)
        self.classes = sorted(names, key=lambda name: (int(name) if numbered else 0, name))
        images = [path for path in root.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()]
        parts = {path: path.relative_to(root).parts for path in images}
        self.files = sorted(path for path in images if not any(part.startswith(".") for part in parts[path]))
        if not self.files:
            raise UserError(f"{root}: expected images ({', '.join(IMAGE_SUFFIXES)}), got none")
        index = {name: number for number, name in enumerate(self.classes)}
        self.labels = [index.get(parts[path][0], -1) for path in self.files]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        from PIL import Image

        path = self.files[index]
        try:
            with Image.open(path) as image:
                return self.transform(image.convert("RGB")), self.labels[index]
        except Exception as error:
            # a broken image can fail anywhere inside its decoder
            raise UserError(f"{path}: expected an image, got {' '.join(str(error).split())}") from error


def open_images(source: str, preprocessing: Mapping[str, Any]) -> Dataset[Any]:
    """Open the images that ``source`` names.

    ``digits:TASK/SPLIT`` is the embedded suite; a ``.safetensors`` file holds ``images`` [n, 3, H, W], normalised, and
    perhaps ``labels`` [n]; anything else is a folder of image files, resized, cropped and normalised.

    Args:
        preprocessing: ``size``, ``mean`` and ``std``: :func:`.encoders.default_preprocessing`.

    Raises:
        UserError: nothing there, or not what was expected.
    """
    if source.startswith("digits:"):
        import pareto_merging.data.digits as digits

        task, _, split = source.removeprefix("digits:").partition("/")
        with user_errors(source):
            return TensorImages(*digits.images(task, split))
    path, image_size = Path(source), int(preprocessing["size"])
    if path.suffix == ".safetensors":
        tensors = read_tensors(path)
        if "images" not in tensors:
            raise UserError(f"{path}: expected a tensor named images, got {', '.join(sorted(tensors)) or 'none'}")
        images, labels = tensors["images"], tensors.get("labels")
        if not images.is_floating_point() or images.shape[1:] != (3, image_size, image_size):
            expected = f"normalised floating-point images [n, 3, {image_size}, {image_size}]"
            raise UserError(f"{path}: expected {expected}, got {list(images.shape)} {images.dtype}")
        if labels is not None and (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool):
            raise UserError(f"{path}: expected whole numbers as labels, got {labels.dtype}")
        with user_errors(str(path)):
            return TensorImages(images.float(), labels)
    if not path.is_dir():
        got = "another file" if path.exists() else "nothing there"
        raise UserError(f"{path}: expected a folder of images or a .safetensors file, got {got}")
    from open_clip import image_transform

    mean, std = tuple(preprocessing["mean"]), tuple(preprocessing["std"])
    return FolderImages(path, image_transform(image_size, is_train=False, mean=mean, std=std))


def batch_indices(size: int, batch: int, step: int, seed: Sequence[int]) -> list[int]:
    """Return the indices of batch ``step``, from 0, of endless seeded permutations of ``size`` items.

    A function of its arguments alone, so that a resumed run sees the very batches it would have seen.
    """
    indices: list[int] = []
    position = step * batch
    while len(indices) < batch:
        epoch, offset = divmod(position + len(indices), size)
        order = np.random.default_rng([*seed, epoch]).permutation(size)
        indices += order[offset : offset + batch - len(indices)].tolist()
    return indices


class BatchStream:
    """The batches of one task from a given step on. ``next(stream)`` is a tensor of images [batch, …]."""

    def __init__(
        self, dataset: Dataset[Any], batch: int, first_step: int, last_step: int, seed: Sequence[int], workers: int = 0
    ) -> None:
        size: int = len(dataset)  # type: ignore[arg-type]
        order = (batch_indices(size, batch, step, seed) for step in range(first_step, last_step))
        self._iterator = iter(_loader(dataset, workers, batch_sampler=order, collate_fn=_images))

    def __iter__(self) -> Iterator[Tensor]:
        return self

    def __next__(self) -> Tensor:
        with _from_workers():
            return next(self._iterator)


def _loader(dataset: Dataset[Any], workers: int, **how: Any) -> DataLoader[Any]:
    # a generator of its own: a DataLoader draws a number from the caller's otherwise
    generator = torch.Generator()
    return DataLoader(dataset, num_workers=workers, generator=generator, worker_init_fn=_ignore_interrupts, **how)


def _ignore_interrupts(worker: int) -> None:
    # Ctrl-C goes to the whole process group, but the main process decides when to stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextlib.contextmanager
def _from_workers() -> Iterator[None]:
    """Shorten a worker's error to its last line. It comes with its traceback as text."""
    try:
        yield
    except UserError as error:
        text = str(error).strip()
        if not text.startswith("Caught UserError"):
            raise
        raise UserError(text.rpartition("UserError: ")[2]) from None


def _images(items: Any) -> Tensor:
    """Return the images of a fetched batch. Items are images or (image, label) pairs."""
    if isinstance(items, tuple):
        return items[0]
    return torch.stack([item[0] if isinstance(items[0], tuple | list) else item for item in items])


def images_in_order(dataset: Dataset[Any], batch: int, count: int | None = None) -> Iterator[Tensor]:
    """Yield the images of a dataset in order, [b, …]; the first ``count`` of them. Items are images, or pairs."""
    size: int = len(dataset)  # type: ignore[arg-type]
    indices = range(size if count is None else min(count, size))
    yield from _loader(dataset, 0, batch_sampler=[indices[i : i + batch] for i in indices[::batch]], collate_fn=_images)


def labelled_batches(dataset: Dataset[Any], batch: int, workers: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield all items in order as (images [b, …], labels int64 [b])."""
    with _from_workers():
        yield from _loader(dataset, workers, batch_size=batch, collate_fn=_labelled)


def labelled_stream(
    dataset: Dataset[Any], batch: int, steps: int, seed: Sequence[int]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the first ``steps`` batches of :func:`batch_indices`. Each is (images [batch, …], labels int64 [batch])."""
    size: int = len(dataset)  # type: ignore[arg-type]
    order = (batch_indices(size, batch, step, seed) for step in range(steps))
    with _from_workers():
        yield from _loader(dataset, 0, batch_sampler=order, collate_fn=_labelled)


def _labelled(items: Any) -> tuple[Tensor, Tensor]:
    if isinstance(items, tuple):
        return items[0], items[1]
    labels = [int(item[1]) if isinstance(item, tuple | list) else -1 for item in items]
    return _images(items), torch.tensor(labels)
