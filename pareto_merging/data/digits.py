"""Eight small tasks made from real handwritten digits, and the encoders to merge for them.

What eight image data sets are to CLIP, eight *views* of scikit-learn's UCI digits (1,797 grey images of 8 x 8 pixels)
are here. A task is one view together with its own frozen zero-shot head: ten unit vectors, one per class, in the
encoder's output space. A sample is scored by ``LOGIT_SCALE * normalize(encoder(image)) @ head.T``.

How the tasks come to conflict: all tasks share ten random class vectors, and each adds an offset of its own, much as
each data set words its classes in its own way. The generalist (the "pretrained" encoder) has been taught only a
small part of the offsets, so it reads every view but knows no task's wording well. Fine-tuning on a task teaches that
task's full wording. One merged encoder must therefore tell the views apart and answer each in its own wording.

Run ``python -m pareto_merging.data.digits --out DIR --seed 0`` to train and write the whole suite (about a minute).
"""

import argparse
import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from open_clip.transformer import VisionTransformer
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from tqdm import tqdm

from pareto_merging.system.devices import one_thread
from pareto_merging.system.files import atomic_path, write_text

StateDict = dict[str, Tensor]
# images [n, 3, 8, 8], their labels [n], and class vectors [10, d] for all of them
_Part = tuple[Tensor, Tensor, Tensor]

CLASSES = 10
SIDE = 8
SPLITS = ("training", "merging", "evaluation")
SPLIT_SIZES = {"training": 797, "merging": 400, "evaluation": 600}

# Four patches of 4 x 4 pixels and the class token: five tokens keep a step on a CPU in the tens of milliseconds.
_BLOCKS = {"width": 96, "layers": 4, "heads": 3, "mlp_ratio": 4.0}
ENCODER: dict[str, Any] = {"image_size": SIDE, "patch_size": 4, **_BLOCKS, "output_dim": 16}
LOGIT_SCALE: float = 20.0

# Length of a task's own offset relative to the (unit) shared class vectors, in the heads and in pretraining. The wider
# the gap between the two, the weaker the generalist and the harder the tasks' conflict once their encoders are merged.
HEAD_OFFSET = 4.0
PRETRAINING_OFFSET = 1.0

PRETRAINING: dict[str, Any] = {"steps": 500, "batch": 128, "lr": 1e-3}
FINETUNING: dict[str, Any] = {"steps": 150, "batch": 64, "lr": 2e-4}
WEIGHT_DECAY = 0.05


def _shuffled(x: Tensor, block: int, seed: int) -> Tensor:
    """Put the ``block`` x ``block`` tiles of images [n, 8, 8] in another order. It is the same for every image."""
    per_row = SIDE // block
    order = torch.randperm(per_row**2, generator=torch.Generator().manual_seed(seed))
    tiles = x.reshape(-1, per_row, block, per_row, block).transpose(2, 3).flatten(1, 2)[:, order]
    return tiles.unflatten(1, (per_row, per_row)).transpose(2, 3).reshape(-1, SIDE, SIDE)


def _occluded(x: Tensor) -> Tensor:
    """Black out a 3 x 3 square near the middle of images [n, 8, 8]."""
    x = x.clone()
    x[:, 2:5, 2:5] = 0
    return x


# Each takes and gives grey images [n, 8, 8] with values in 0..1.
_VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "upright": lambda x: x,
    "rotated": lambda x: torch.rot90(x, 1, (1, 2)),
    "mirrored": lambda x: x.flip(2),
    "inverted": lambda x: 1 - x,
    "occluded": _occluded,
    "permuted": lambda x: _shuffled(x, 1, seed=7),
    "blocks": lambda x: _shuffled(x, 2, seed=7),
    "shifted": lambda x: torch.roll(x, (1, 2), (1, 2)),
}
TASKS: tuple[str, ...] = tuple(_VIEWS)


@cache
def _digits() -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Return grey images [1797, 8, 8] in 0..1, labels [1797], and each split's rows. Splits are stratified."""
    digits = load_digits()
    rows = np.arange(len(digits.target))
    training, rest = train_test_split(rows, train_size=SPLIT_SIZES["training"], stratify=digits.target, random_state=0)
    merging, evaluation = train_test_split(
        rest, train_size=SPLIT_SIZES["merging"], stratify=digits.target[rest], random_state=0
    )
    parts = {"training": training, "merging": merging, "evaluation": evaluation}
    images_ = torch.tensor(digits.images, dtype=torch.float32) / 16
    return images_, torch.tensor(digits.target, dtype=torch.int64), {k: torch.as_tensor(v) for k, v in parts.items()}


@cache
def images(task: str, split: str) -> tuple[Tensor, Tensor]:
    """Return one split of one task. Images are float32 [n, 3, 8, 8] (normalised) and labels int64 [n].

    Every task sees the same digits in a split, each through its own view; no digit is in two splits. The result is
    cached and shared between callers: do not write into it.
    """
    for kind, value, allowed in (("task", task, TASKS), ("split", split, SPLITS)):
        if value not in allowed:
            raise ValueError(f"unknown {kind} {value!r}; expected one of {', '.join(allowed)}")
    grey, labels, parts = _digits()
    mean, std = grey.mean(), grey.std()
    rows = parts[split]
    seen = (_VIEWS[task](grey[rows]) - mean) / std
    # open_clip's encoder wants three channels; the grey one is repeated.
    return seen.unsqueeze(1).repeat(1, 3, 1, 1), labels[rows]


def normalisation() -> tuple[float, float]:
    """Return mean and standard deviation of the grey values 0..1. :func:`images` subtracts and divides by them."""
    grey, _, _ = _digits()
    return float(grey.mean()), float(grey.std())


def _worded(seed: int, offset: float, encoder: Mapping[str, Any] = ENCODER) -> dict[str, Tensor]:
    """Return task -> unit class vectors [10, output_dim]. ``offset`` moves the shared ones along the task's own."""
    generator = torch.Generator().manual_seed(1000 + seed)
    shape = (CLASSES, encoder["output_dim"])
    shared = F.normalize(torch.randn(shape, generator=generator), dim=1)
    own = {task: F.normalize(torch.randn(shape, generator=generator), dim=1) for task in TASKS}
    return {task: F.normalize(shared + offset * own[task], dim=1) for task in TASKS}


def heads(seed: int = 0) -> dict[str, Tensor]:
    """Return task -> its frozen zero-shot head, float32 [10, output_dim] with unit rows."""
    return _worded(seed, HEAD_OFFSET)


def build_encoder(encoder: Mapping[str, Any] = ENCODER) -> VisionTransformer:
    """Build an encoder with random weights. It maps images [n, 3, 8, 8] to features [n, output_dim]."""
    return VisionTransformer(**encoder)


def _random_encoder(seed: int, encoder: Mapping[str, Any]) -> VisionTransformer:
    # Its weights are drawn from torch's global generator, so that is borrowed and given back as it was.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_encoder(encoder)


def _train(
    start: StateDict | None,
    parts: Sequence[_Part],
    how: dict[str, Any],
    seed: int,
    advance: Callable[[], object],
    encoder: VisionTransformer,
) -> StateDict:
    """Train all encoder weights by cross-entropy, as ``how`` says. ``advance`` is called after each step.

    Starts from ``start``, or from the weights of ``encoder``, which is trained. The result is rounded to float16 (and
    held as float32), so that what is measured or fine-tuned further is bit for bit what the files hold.
    """
    generator, steps = torch.Generator().manual_seed(seed), how["steps"]
    x, y = torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])
    class_vectors = torch.cat([vectors.expand(len(labels), -1, -1) for _, labels, vectors in parts])
    if start is not None:
        encoder.load_state_dict(start)
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=how["lr"], weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / (0.1 * steps)) * 0.5 * (1 + math.cos(math.pi * step / steps))
    )
    for _ in range(steps):
        rows = torch.randint(len(y), (how["batch"],), generator=generator)
        features = F.normalize(encoder(x[rows]), dim=-1)
        logits = LOGIT_SCALE * torch.einsum("nd,ncd->nc", features, class_vectors[rows])
        loss = F.cross_entropy(logits, y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        advance()
    return {name: value.half().float() for name, value in encoder.state_dict().items()}


@torch.no_grad()
def _accuracy(encoder: VisionTransformer, task: str, split: str, head: Tensor) -> float:
    """Return the share of a task's split that encoder and head classify rightly. The head is [10, output_dim]."""
    x, y = images(task, split)
    # The scale of the features and of the logits does not move the arg max.
    return ((encoder(x) @ head.T).argmax(1) == y).float().mean().item()


def _write(path: Path, state: StateDict, dtype: torch.dtype, metadata: dict[str, str] | None = None) -> None:
    with atomic_path(path) as temporary:
        save_file({name: value.to(dtype).contiguous() for name, value in state.items()}, temporary, metadata=metadata)


def make(out: Path, seed: int = 0, design: Mapping[str, Any] = ENCODER) -> None:
    """Train the generalist and the fine-tuned encoders, and write them with the heads into ``out``.

    ``design``: the encoder's arguments, as :data:`ENCODER` has them. Files: ``encoder.json`` (``design``),
    ``pretrained.safetensors`` and ``finetuned_<task>.safetensors`` (float16), ``heads.safetensors`` (float32
    [10, output_dim] per task, with ``logit_scale`` in the metadata). Accuracies are printed on the way.
    """
    task_heads, encoder = _worded(seed, HEAD_OFFSET, design), _random_encoder(seed, design)
    write_text(out / "encoder.json", json.dumps(dict(design), indent=2) + "\n")
    _write(out / "heads.safetensors", task_heads, torch.float32, {"logit_scale": str(LOGIT_SCALE)})

    def report(who: str, task: str, accuracies: Sequence[float]) -> Sequence[float]:
        training, evaluation = accuracies
        tqdm.write(f"{who:<10} {task:<10} training {training:6.1%}  evaluation {evaluation:6.1%}")
        return accuracies

    def measure(state: StateDict, who: str, task: str) -> Sequence[float]:
        encoder.load_state_dict(state)
        splits = ("training", "evaluation")
        return report(who, task, [_accuracy(encoder, task, split, task_heads[task]) for split in splits])

    def report_mean(who: str, scores: Sequence[Sequence[float]]) -> None:
        report(who, "average", [sum(column) / len(column) for column in zip(*scores, strict=True)])

    parts = {task: images(task, "training") for task in TASKS}
    # only a part of each task's offset makes a sound reader of every view and a weak zero-shot classifier
    vectors = _worded(seed, PRETRAINING_OFFSET, design)
    total = PRETRAINING["steps"] + len(TASKS) * FINETUNING["steps"]
    with one_thread(), tqdm(total=total, unit="step", disable=None) as bar:
        bar.set_description("generalist")
        every = [(*parts[task], vectors[task]) for task in TASKS]
        first = 100 * seed + 1
        pretrained = _train(None, every, PRETRAINING, first, bar.update, _random_encoder(first, design))
        _write(out / "pretrained.safetensors", pretrained, torch.float16)
        report_mean("generalist", [measure(pretrained, "generalist", task) for task in TASKS])
        scores = []
        for number, task in enumerate(TASKS):
            bar.set_description(task)
            own = [(*parts[task], task_heads[task])]
            at = 100 * seed + 10 + number
            finetuned = _train(pretrained, own, FINETUNING, at, bar.update, _random_encoder(at, design))
            _write(out / f"finetuned_{task}.safetensors", finetuned, torch.float16)
            scores.append(measure(finetuned, "individual", task))
        report_mean("individual", scores)


def run_file(preset: str = "expert") -> str:
    """Return a configuration for a suite's folder. It merges all its tasks with a preset."""
    lines = ["encoder: {architecture: encoder.json, pretrained: pretrained.safetensors, quick_gelu: false}", "tasks:"]
    for task in TASKS:
        images_ = ", ".join(f"{split}: digits:{task}/{split}" for split in ("merging", "evaluation", "training"))
        lines.append(f"  {task}: {{checkpoint: finetuned_{task}.safetensors, head: heads.safetensors, {images_}}}")
    return "\n".join([*lines, f"method: {{preset: {preset}}}", ""])


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line ``python -m pareto_merging.data.digits --out DIR --seed 0``."""
    parser = argparse.ArgumentParser(
        prog="python -m pareto_merging.data.digits",
        description="Train the digits suite (one generalist, eight fine-tuned encoders, eight heads) and write it. "
        "Beside it run.yaml, for `pareto-merging train` or `compare`.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    folder = Path(__file__).resolve().parent / "digits_suite"
    what = "folder to write the suite into; made if missing, files of an earlier run are replaced"
    parser.add_argument("--out", type=Path, default=folder, help=what)
    parser.add_argument("--seed", type=int, default=0, help="seed of the heads and of all training")
    arguments = parser.parse_args(argv)
    make(arguments.out, arguments.seed)
    if arguments.out != folder:
        write_text(arguments.out / "run.yaml", run_file())


if __name__ == "__main__":
    main()
