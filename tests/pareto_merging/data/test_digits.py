"""The embedded suite: real images, disjoint splits, seeded checkpoints, and what is committed."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from sklearn.datasets import load_digits

from pareto_merging.checkpoints.safetensors import read_metadata, read_shapes
from pareto_merging.data import digits
from pareto_merging.run.checks import check_tensors
from pareto_merging.run.config import read_config
from pareto_merging.run.workspace import Workspace

FOLDER = Path(digits.__file__).parent / "digits_suite"


def test_eight_tasks_of_real_images_in_three_disjoint_splits() -> None:
    assert len(digits.TASKS) == 8
    real = {row.tobytes() for row in load_digits().images.astype("float32")}
    seen: list[set[bytes]] = []
    for split in digits.SPLITS:
        images, labels = digits.images("upright", split)
        assert images.shape[1:] == (3, 8, 8)
        assert labels.bincount(minlength=10).min() >= 0.08 * len(labels)
        grey = images[:, 0]
        low, high = grey.min(), grey.max()
        pixels = ((grey - low) / (high - low) * 16).round().contiguous()
        keys = {row.numpy().tobytes() for row in pixels}
        assert keys <= real
        seen.append(keys)
    assert not seen[0] & seen[1]
    assert not seen[1] & seen[2]
    assert not seen[0] & seen[2]


def test_views_differ_and_keep_the_labels() -> None:
    first = {task: digits.images(task, "merging") for task in digits.TASKS}
    labels = first["upright"][1]
    for task, (images, own) in first.items():
        assert torch.equal(own, labels)
        for other, (others, _) in first.items():
            assert task == other or not torch.equal(images, others)


def test_heads_are_unit_and_seeded() -> None:
    heads = digits.heads(0)
    assert set(heads) == set(digits.TASKS)
    for weight in heads.values():
        assert weight.shape == (10, digits.ENCODER["output_dim"])
        torch.testing.assert_close(weight.norm(dim=1), torch.ones(10))
    assert torch.equal(heads["upright"], digits.heads(0)["upright"])
    assert not torch.equal(heads["upright"], digits.heads(1)["upright"])


def test_unknown_names_are_listed() -> None:
    with pytest.raises(ValueError, match="unknown task 'sideways'; expected one of upright"):
        digits.images("sideways", "merging")
    with pytest.raises(ValueError, match="unknown split 'test'; expected one of training, merging, evaluation"):
        digits.images("upright", "test")


def test_committed_suite_is_whole_and_small() -> None:
    files = sorted(FOLDER.iterdir())
    assert sum(path.stat().st_size for path in files) <= 12 * 2**20
    assert json.loads((FOLDER / "encoder.json").read_text()) == digits.ENCODER
    expected = {name: list(t.shape) for name, t in digits.build_encoder().state_dict().items()}
    for name in ("pretrained", *(f"finetuned_{task}" for task in digits.TASKS)):
        path = FOLDER / f"{name}.safetensors"
        shapes = read_shapes(path)
        check_tensors(path, {key: shape for key, (shape, _) in shapes.items()}, expected)
        assert {dtype for _, dtype in shapes.values()} == {"F16"}
    heads = load_file(FOLDER / "heads.safetensors")
    for task, weight in digits.heads(0).items():
        torch.testing.assert_close(heads[task], weight)
    assert float(read_metadata(FOLDER / "heads.safetensors")["logit_scale"]) == digits.LOGIT_SCALE


def test_committed_models_know_their_tasks() -> None:
    encoder = digits.build_encoder().eval()
    heads = load_file(FOLDER / "heads.safetensors")

    def accuracy(name: str, task: str) -> float:
        encoder.load_state_dict({key: value.float() for key, value in load_file(FOLDER / name).items()})
        images, labels = digits.images(task, "merging")
        with torch.no_grad():
            return float(((encoder(images) @ heads[task].T).argmax(dim=1) == labels).float().mean())

    individual = [accuracy(f"finetuned_{task}.safetensors", task) for task in digits.TASKS]
    generalist = [accuracy("pretrained.safetensors", task) for task in digits.TASKS]
    assert min(individual) > 0.85
    assert 0.5 < sum(generalist) / 8 < sum(individual) / 8 - 0.08


@pytest.mark.slow
def test_making_is_seeded_and_leaves_the_random_state_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(digits, "PRETRAINING", {**digits.PRETRAINING, "steps": 3})
    monkeypatch.setattr(digits, "FINETUNING", {**digits.FINETUNING, "steps": 2})
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    digits.main(["--out", str(tmp_path / "a"), "--seed", "1"])
    assert torch.equal(torch.rand(2), expected)
    digits.make(tmp_path / "b", seed=1)
    digits.make(tmp_path / "c", seed=2)
    workspace = Workspace(read_config(tmp_path / "a" / "run.yaml"))
    assert workspace.task_names == list(digits.TASKS) and workspace.config.method.preset == "expert"
    own = load_file(tmp_path / "a" / "finetuned_blocks.safetensors")
    assert torch.equal(workspace.finetuned()["blocks"]["proj"], own["proj"].float())
    assert torch.equal(workspace.merging_tasks()["blocks"].images[0][0], digits.images("blocks", "merging")[0][0])
    (tmp_path / "a" / "run.yaml").unlink()
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
    assert (tmp_path / "a" / "pretrained.safetensors").read_bytes() != (
        tmp_path / "c" / "pretrained.safetensors"
    ).read_bytes()
    assert "individual" in capsys.readouterr().out
