"""The YAML configuration: defaults, paths, and errors that name the key."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from pareto_merging.errors import UserError
from pareto_merging.run.config import dump_config, read_config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("suite: digits\nmethd: {}\n", "unknown key methd"),
        ("suite: digits\nmethod: {ranks: 4}\n", "unknown key method.ranks"),
        ("suite: digits\nmethod: {rank: 0}\n", "method.rank: .* got 0"),
        ("suite: digits\nmethod: {preset: icml}\n", "method.preset: .* got 'icml'"),
        ("suite: digits\nmethod: {mu: -1}\n", "method.mu"),
        ("suite: digits\nmethod: {betas: [0.9, 1.5]}\n", "method.betas"),
        ("suite: digits\nmethod: {steps: many}\n", "method.steps: .* got 'many'"),
        (
            "suite: digits\nmethod: {objective: entropie}\n",
            "method.objective: expected one of entropy, weight-distance, got 'entropie'",
        ),
        (
            "suite: digits\nmethod: {scalarization: sum}\n",
            "method.scalarization: expected one of smooth-tchebycheff, tchebycheff, linear, got 'sum'",
        ),
        ("suite: mnist\n", "suite: .* got 'mnist'"),
        ("method: {}\n", "expected suite: digits, or encoder and tasks"),
        ("suite: digits\ntasks: [a, a]\n", "tasks: expected each task once"),
        ("suite: digits\ntasks: []\n", "tasks: expected at least one"),
        ("encoder: {architecture: ViT-B-32, pretrained: a}\n", "tasks: expected a mapping"),
        (
            "encoder: {architecture: ViT-B-32, pretrained: a}\ntasks: {m: {head: b, merging: c}}\n",
            "tasks.m.checkpoint: Field required",
        ),
        ("suite: digits\nunseen: {a: {head: b, merging: c, evaluation: d}}\n", "unseen: expected a list"),
        ("suite: digits\ntasks: [a]\nunseen: [a]\n", "unseen: expected tasks that are not merged, got a"),
        ("suite: digits\nunseen: ['b,c']\n", "expected names that preferences can be given by, got 'b,c'"),
        ("suite: digits\nunseen: [priority]\n", "expected names that preferences can be given by, got 'priority'"),
        (
            "encoder: {architecture: x, pretrained: a}\ntasks: {m: {checkpoint: b}}\nunseen: [c]\n",
            "unseen: expected .* a mapping where there is no suite",
        ),
        (
            "encoder: {architecture: x, pretrained: a}\ntasks: {m: {checkpoint: b}}\nunseen: {c: {head: d}}\n",
            "unseen.c.merging: Field required.*unseen.c.evaluation: Field required",
        ),
        ("suite: digits\nmethod: {gamma: [1, 0]}\n", "gamma: expected one with preference: fixed"),
        ("suite: digits\nmethod: {preference: fixed}\n", "gamma: expected one with preference: fixed"),
        ("- 1\n", "expected a mapping of settings, got list"),
        ("a: [\n", "expected YAML"),
        ("", "expected a mapping of settings, got NoneType"),
    ],
)
def test_errors_name_the_key(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        read_config(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file"):
        read_config(tmp_path / "none.yaml")
    with pytest.raises(UserError, match="Is a directory"):
        read_config(tmp_path)
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(UserError, match="expected"):
        read_config(tmp_path / "bytes.yaml")


def test_paths_are_relative_to_the_file_and_survive_a_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "sub" / "run.yaml"
    path.parent.mkdir()
    path.write_text(
        yaml.safe_dump(
            {
                "encoder": {"architecture": "small.json", "pretrained": "pre.safetensors"},
                "tasks": {
                    "m": {
                        "checkpoint": "m.safetensors",
                        "head": "../h.safetensors",
                        "merging": "images",
                        "training": "train.safetensors",
                    }
                },
                "unseen": {"u": {"head": "u.safetensors", "merging": "more", "evaluation": "../labelled"}},
                "method": {"preset": "arxiv-v1", "rank": 4, "preference": "fixed", "gamma": [1]},
            }
        )
    )
    config = read_config(path)
    assert config.encoder is not None
    assert config.encoder.pretrained == path.parent / "pre.safetensors"
    assert config.encoder.architecture == str(path.parent / "small.json")
    assert isinstance(config.tasks, dict)
    assert config.tasks["m"].merging == str(path.parent / "images")
    assert config.tasks["m"].training == str(path.parent / "train.safetensors")
    assert isinstance(config.unseen, dict)
    assert config.unseen["u"].head == path.parent / "u.safetensors"
    assert config.unseen["u"].merging == str(path.parent / "more")
    assert config.unseen["u"].evaluation == str(path.parent / "../labelled")
    assert config.method.gamma == (1.0,)
    assert config.method.cosine == 0.1
    again = tmp_path / "copy.yaml"
    again.write_text(dump_config(config))
    assert read_config(again) == config
