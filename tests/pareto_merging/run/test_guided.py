"""A run of the preset ``expert`` to its end: trained, exported, folded and served, beside the Pareto model itself."""

from pathlib import Path

import pytest
import torch
import yaml
from command_line import run
from safetensors import safe_open
from torch import Tensor, nn

import pareto_merging as pm
from pareto_merging.checkpoints import encoders
from pareto_merging.checkpoints.checkpoint import open_checkpoint
from pareto_merging.run.folder import open_run
from pareto_merging.serving import Engine

PREFERENCES = torch.tensor([[1.0, 0.0], [0.7, 0.3], [0.5, 0.5], [0.0, 1.0]])


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.fixture(scope="module")
def guided(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the preset ``expert`` on few images of the embedded suite; its constant term is not zero."""
    folder = tmp_path_factory.mktemp("guided")
    method = {"preset": "expert", "steps": 4, "start_images": 20, "batch_size": 8, "rank": 2, "constant_rank": 2}
    method |= {"learning_rate": 0.05, "few_images": "as-given", "warm_up": 0}
    config = {"suite": "digits", "tasks": ["upright", "mirrored"], "method": method}
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    assert run("train", folder / "run.yaml", "--out", folder / "run", "--quiet") == 0
    return folder / "run"


def of_guided(guided: Path, gammas: Tensor) -> tuple[nn.Module, Tensor, Tensor]:
    """The Pareto model, images, and their features [n, D] by the Pareto model itself, each at its own preference."""
    workspace, model = open_run(guided)
    images = torch.stack([workspace.merging_tasks()["upright"].images[at][0] for at in range(len(gammas))])
    rows = []
    for image, gamma in zip(images, gammas, strict=True):
        with torch.no_grad(), pm.preference(model, gamma):
            rows.append(model(image[None]))
    return model, images, torch.cat(rows)


def test_a_guided_run_has_something_to_lose(guided: Path) -> None:
    """Otherwise the tests below could not fail: the constant term, the base and the preference each change features."""
    model, images, expected = of_guided(guided, PREFERENCES[2:3].expand(4, -1))
    _, _, other = of_guided(guided, PREFERENCES[:1].expand(4, -1))
    assert (expected - other).abs().max() > 1e-3
    constant = [(name, p) for name, p in model.named_parameters() if name.endswith("A_c")]
    assert constant and all(p.abs().max() > 1e-3 for _, p in constant)
    with torch.no_grad():
        for _, p in constant:
            p.zero_()
        with pm.preference(model, [0.5, 0.5]):
            assert (model(images) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("at", range(4))
def test_a_guided_run_as_a_plain_model(at: int, guided: Path, tmp_path: Path) -> None:
    gamma, out = PREFERENCES[at], tmp_path / "out.safetensors"
    text = ",".join(str(float(share)) for share in gamma)
    assert run("export", guided, "--preference", text, "--out", out, "--quiet") == 0
    found = open_checkpoint(out)
    assert found.encoder is not None
    plain = encoders.build(found.encoder)
    plain.load_state_dict(dict(found))
    _, images, expected = of_guided(guided, gamma.expand(4, -1))
    with torch.no_grad():
        close(plain.eval()(images), expected)
    assert not any("A_c" in name or "B_c" in name for name in found)


def test_a_guided_run_served_with_a_preference_for_each_image(guided: Path, tmp_path: Path) -> None:
    out = tmp_path / "folded.safetensors"
    assert run("export", guided, "--folded", "--out", out, "--quiet") == 0
    with safe_open(out, "pt") as file:
        assert not [name for name in file.keys() if "A_c" in name or "B_c" in name]  # noqa: SIM118
    engine = Engine(out, "cpu", max_batch=4)
    _, images, expected = of_guided(guided, PREFERENCES)
    close(engine(images, PREFERENCES), expected)
    # one for all: first as it comes, then merged
    for gamma in PREFERENCES:
        _, _, shared = of_guided(guided, gamma.expand(4, -1))
        for _ in range(3):
            close(engine(images, gamma), shared)
    first = images[:1]
    swept = engine.sweep(first, PREFERENCES)[:, 0]
    close(swept, engine(first.expand(4, -1, -1, -1), PREFERENCES))
