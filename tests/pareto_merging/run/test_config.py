"""The YAML configuration: defaults, paths, and errors that name the key."""

import dataclasses
import json
from pathlib import Path

import pytest
import yaml
from helpers import noisy_copy
from safetensors.torch import save_file

from pareto_merging.cli.app import main
from pareto_merging.errors import UserError
from pareto_merging.model.strategy import strategy_names
from pareto_merging.run.config import RunConfig, dump_config, read_config
from pmkernels import strategies


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
            "method.objective: expected one of entropy, distillation, features, weight-distance, got 'entropie'",
        ),
        (
            "suite: digits\nmethod: {scalarization: sum}\n",
            "method.scalarization: expected one of smooth-tchebycheff, tchebycheff, linear, got 'sum'",
        ),
        ("suite: mnist\n", "suite: .* got 'mnist'"),
        ("suite: digits\nstrategy: swift\n", "strategy: expected one of auto, fused, .*cached, got 'swift'"),
        ("suite: digits\nstrategy: 3\n", "strategy: .* got 3"),
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


SUITE = "suite: digits\ntasks: [upright, mirrored]\n"


def read(folder: Path, text: str) -> RunConfig:
    path = folder / "run.yaml"
    path.write_text(SUITE + text + "\n")
    return read_config(path)


@pytest.mark.parametrize(
    ("text", "size"), [("6 GiB", 6 * 2**30), ("6.5 GB", 6_500_000_000), ("0", 0), ("4096", 4096), ("null", None)]
)
def test_memory_budget_in_yaml(tmp_path: Path, text: str, size: int | None) -> None:
    config = read(tmp_path, f"memory_budget: {text}")
    assert config.memory_budget == size
    again = tmp_path / "again.yaml"
    again.write_text(dump_config(config))
    assert read_config(again) == config


@pytest.mark.parametrize(
    "text",
    ["-1", "'-6 GiB'", "0.5", "true", ".nan", ".inf", "1e30", "5 parsecs", "[1]", "''", "inf GiB"],
)
def test_a_memory_budget_that_is_none(tmp_path: Path, text: str) -> None:
    with pytest.raises(UserError, match="memory_budget: ") as caught:
        read(tmp_path, f"memory_budget: {text}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", ["auto", "on", "off", "'on'", "'off'"])
def test_cuda_graphs_in_yaml(tmp_path: Path, value: str) -> None:
    """YAML 1.1 reads a bare ``on`` as true: the documented values must work as they are documented."""
    config = read(tmp_path, f"cuda_graphs: {value}")
    assert config.cuda_graphs == value.strip("'")
    again = tmp_path / "again.yaml"
    again.write_text(dump_config(config))
    assert read_config(again) == config


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("cuda_graphs: maybe", "cuda_graphs"),
        ("cuda_graphs: 'on'\ndevice: cpu", "cuda_graphs: expected auto or off without a CUDA GPU, got 'on'"),
        ("memory_budget: 1 KiB\nstrategy: cached", "memory_budget: expected at least"),
        ("memory_budget: 1 KiB\nstrategy: fused", "memory_budget: expected None for strategy 'fused'"),
        ("memory_budget: 1000 PiB", "memory_budget: expected at most"),
        ("strategy: quick", "strategy"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, said: str
) -> None:
    config = small_config(tmp_path)
    path = tmp_path / "run.yaml"
    path.write_text(config + text + "\n")
    with pytest.raises(SystemExit) as caught:
        main(["train", str(path), "--out", str(tmp_path / "out")])
    assert caught.value.code == 2
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.strip()]
    assert len(lines) == 1, captured.err
    assert said in lines[0]
    assert not (tmp_path / "out").exists()


def small_config(folder: Path) -> str:
    """The YAML of two tiny models on disk."""
    transformer = pytest.importorskip("open_clip.transformer")
    settings = {
        "image_size": 8, "patch_size": 4, "width": 8, "layers": 1, "heads": 2, "mlp_ratio": 2.0, "output_dim": 4
    }  # fmt: skip
    (folder / "tiny.json").write_text(json.dumps(settings))
    net = transformer.VisionTransformer(**settings)
    tasks = ""
    for name, module in {"base": net, "a": noisy_copy(net, 1), "b": noisy_copy(net, 2)}.items():
        save_file({k: v.contiguous() for k, v in module.state_dict().items()}, folder / f"{name}.safetensors")
        if name != "base":
            tasks += f"  {name}: {{checkpoint: {name}.safetensors}}\n"
    return (
        "encoder: {architecture: tiny.json, pretrained: base.safetensors}\n"
        f"tasks:\n{tasks}"
        "method: {objective: weight-distance, steps: 1, rank: 2}\n"
    )


def test_the_small_configuration_runs(tmp_path: Path) -> None:
    """So that the mistakes above are the only reason to stop."""
    path = tmp_path / "run.yaml"
    path.write_text(small_config(tmp_path) + "strategy: cached\nmemory_budget: 1 MiB\ncuda_graphs: 'off'\n")
    with pytest.raises(SystemExit) as caught:
        main(["train", str(path), "--out", str(tmp_path / "out")])
    assert caught.value.code == 0


def test_every_strategy_can_be_named_and_is_explained(tmp_path: Path) -> None:
    for name in strategy_names():
        assert read(tmp_path, f"strategy: {name}").strategy == name
        assert name in (RunConfig.model_fields["strategy"].description or "")


def test_a_strategy_of_ones_own_can_be_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"strategy: expected one of auto, .*, got 'mine'"):
        read(tmp_path, "strategy: mine")
    strategies.register(dataclasses.replace(strategies.TABLE["eager"], name="mine"))
    try:
        assert read(tmp_path, "strategy: mine").strategy == "mine"
    finally:
        strategies.unregister("mine")
