"""Runs on models of one's own: checkpoints of every format in one file, what they say followed, mistakes refused."""

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from command_line import one_line, run
from helpers import noisy_copy
from safetensors.torch import load_file, save_file
from support import clip, hf_files, open_clip_files, pickled_modules
from support.checkpoint_cases import assert_bits
from torch import Tensor, nn

import pareto_merging as pm
from pareto_merging.checkpoints import checkpoint
from pareto_merging.checkpoints.checkpoint import open_checkpoint
from pareto_merging.data.tasks import read_head
from pareto_merging.measure.evaluation import evaluate_model
from pareto_merging.model.files import read_header
from pareto_merging.run.config import RunConfig, read_config
from pareto_merging.run.folder import open_run
from pareto_merging.run.workspace import Workspace

pytest.importorskip("open_clip")
pytest.importorskip("transformers")

NO_IMAGES = {"objective": "weight-distance", "steps": 2, "rank": 2, "learning_rate": 0.1}
GAMMAS = ([0.5, 0.5], [0.9, 0.1], [0.0, 1.0])


def write_config(path: Path, pretrained: object, tasks: Mapping[str, Any], **more: Any) -> Path:
    """A configuration; a task may be the path of its checkpoint alone."""
    encoder = {"pretrained": str(pretrained), **more.pop("encoder", {})}
    entries = {name: task if isinstance(task, dict) else {"checkpoint": str(task)} for name, task in tasks.items()}
    config = {"encoder": encoder, "tasks": entries, "method": more.pop("method", NO_IMAGES), **more}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path


def refused(config: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What ``train`` says when it refuses: one line, exit code 2, nothing left behind."""
    capsys.readouterr()
    before = sorted(config.parent.rglob("*"))
    assert run("train", config, "--out", config.parent / "runs" / "refused", "--quiet") == 2
    assert sorted(config.parent.rglob("*")) == before
    return one_line(capsys)


def trained(config: Path, name: str = "run") -> Path:
    assert run("train", config, "--out", config.parent / name, "--quiet") == 0
    return config.parent / name


def write_images(folder: Path, count: int, seed: int, size: tuple[int, int] = (clip.IMAGE, clip.IMAGE)) -> np.ndarray:
    """PNG files of noise; returns their bytes [count, H, W, 3]."""
    from PIL import Image

    folder.mkdir(parents=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (count, *size, 3), dtype=np.uint8)
    for index, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{index}.png")
    return pixels


def normalised(pixels: np.ndarray, mean: Any = clip.MEAN, std: Any = clip.STD) -> Tensor:
    """As the definition says: bytes / 255, minus the mean, by the standard deviation of each channel."""
    return torch.from_numpy(((pixels / 255.0 - np.array(mean)) / np.array(std)).transpose(0, 3, 1, 2)).float()


def features(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(clip.images())


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder with checkpoints of many formats, which tests only read."""
    folder = tmp_path_factory.mktemp("files")
    for seed in range(4):
        hf_files.huggingface_folder(folder / f"clip{seed}", seed, kind="clip")
        hf_files.huggingface_folder(folder / f"vision{seed}", seed)
        open_clip_files.open_clip_folder(folder / f"folder{seed}", seed)
        pickled_modules.task_vectors_encoder(folder / f"encoder{seed}.pt", seed)
        open_clip_files.open_clip_file(folder / f"clip{seed}.pt", seed)
        open_clip_files.open_clip_file(folder / f"visual{seed}.safetensors", seed, part="visual")
        pickled_modules.task_vectors_head(folder / f"head_{seed}.pt", seed)
    hf_files.huggingface_folder(folder / "gelu", 1, False, kind="clip")
    open_clip_files.open_clip_folder(folder / "folder_gelu", 1, False)
    open_clip_files.torchscript_archive(folder / "ViT-B-32.pt", 0)
    write_images(folder / "merging", 6, 0)
    for label in range(5):
        write_images(folder / "test" / str(label), 2, 10 + label)
    return folder


@pytest.fixture
def offline(tmp_path: Path, files: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A cache with owner/name (seed 0) and owner/name@tuned (seed 1), and no network."""
    from huggingface_hub import constants

    hf_files.hub_cache(tmp_path / "hub", "owner/name", files / "clip0")
    hf_files.hub_cache(tmp_path / "hub", "owner/name", files / "clip1", revision="tuned", commit="f" * 40)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return


# QuickGELU and normalisation follow the checkpoint


@pytest.mark.parametrize("quick_gelu", [True, False])
@pytest.mark.parametrize("pretrained", ["clip0", "folder0", "encoder0.pt"])
def test_the_checkpoint_says_how_images_and_activations_are(
    pretrained: str, quick_gelu: bool, files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A configuration with ``pretrained`` alone: the figures of ``evaluate`` are those of the checkpoint's own way.

    The images are as large as the encoder wants them, so that only normalisation is done to them.
    """
    if not quick_gelu:
        writers: dict[str, Callable[[Path], Path]] = {
            "clip0": lambda path: hf_files.huggingface_folder(path, 0, False, kind="clip"),
            "folder0": lambda path: open_clip_files.open_clip_folder(path, 0, False),
            "encoder0.pt": lambda path: pickled_modules.task_vectors_encoder(path, 0, False),
        }
        source = writers[pretrained](tmp_path / pretrained)
    else:
        source = files / pretrained
    # a scale at which the entropy is not zero
    head = pickled_modules.task_vectors_head(tmp_path / "head.pt", 1, logit_scale=6.0)
    task = {
        "checkpoint": str(files / "visual1.safetensors"),
        "head": str(head),
        "merging": str(files / "merging"),
        "evaluation": str(files / "test"),
    }
    config = write_config(
        tmp_path / "run.yaml", source, {"only": task}, method={"steps": 1, "rank": 2, "batch_size": 2}
    )
    folder = trained(config)
    capsys.readouterr()
    assert run("evaluate", folder, "--preferences", "1", "--json") == 0
    found = json.loads(capsys.readouterr().out)["results"][0]
    workspace, model = open_run(folder)
    assert workspace.encoder_description["quick_gelu"] is quick_gelu
    assert workspace.preprocessing == {"size": clip.IMAGE, "mean": list(clip.MEAN), "std": list(clip.STD)}

    plain = clip.tower(0, quick_gelu)
    plain.load_state_dict(pm.merge(model, [1.0]).state_dict())
    pixels = np.concatenate(
        [np.random.default_rng(10 + label).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8) for label in range(5)]
    )
    labels = torch.arange(5).repeat_interleave(2)

    def entropy(images: Tensor, encoder: nn.Module) -> tuple[float, float]:
        with torch.no_grad():
            logits = read_head(head)(encoder(images))
        log = logits.log_softmax(-1)
        accuracy = (logits.argmax(-1) == labels).double().mean() * 100
        return float(-(log.exp() * log).sum(-1).mean()), float(accuracy)

    expected, accuracy = entropy(normalised(pixels), plain)
    assert found["entropy"]["only"] == pytest.approx(expected, abs=1e-4)
    assert found["accuracy"]["only"] == pytest.approx(accuracy, abs=1e-3)
    # another normalisation or activation is further away than that
    usual = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    assert abs(entropy(normalised(pixels, *usual), plain)[0] - expected) > 1e-3
    other = clip.tower(0, not quick_gelu)
    other.load_state_dict(plain.state_dict())
    assert abs(entropy(normalised(pixels), other)[0] - expected) > 1e-3


@pytest.mark.parametrize(("name", "said"), [("clip1", True), ("gelu", False), ("folder1", True), ("ViT-B-32.pt", True)])
def test_an_activation_that_contradicts_the_checkpoint(
    name: str, said: bool, files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks = {"a": files / "visual2.safetensors", "b": files / "visual3.safetensors"}
    config = write_config(tmp_path / "run.yaml", files / name, tasks, encoder={"quick_gelu": not said})
    message = refused(config, capsys)
    assert "quick_gelu" in message and str(files / name) in message
    # said rightly it is the same as not said
    config = write_config(tmp_path / "run.yaml", files / name, tasks, encoder={"quick_gelu": said})
    assert Workspace(read_config(config)).encoder_description["quick_gelu"] is said
    config = write_config(tmp_path / "run.yaml", files / name, tasks)
    assert Workspace(read_config(config)).encoder_description["quick_gelu"] is said


@pytest.mark.parametrize("kind", ["hf", "open_clip", "task vectors"])
@pytest.mark.parametrize("what", ["quick_gelu", "preprocessing"])
def test_a_fine_tuned_checkpoint_that_says_otherwise(
    what: str, kind: str, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    if what == "preprocessing":
        # each has the number by its own name
        for writer in (hf_files, open_clip_files, pickled_modules):
            monkeypatch.setattr(writer, "MEAN", (0.5, 0.5, 0.5))
    write: dict[str, Callable[..., Path]] = {
        "hf": hf_files.huggingface_folder,
        "open_clip": open_clip_files.open_clip_folder,
        "task vectors": pickled_modules.task_vectors_encoder,
    }
    path = write[kind](tmp_path / "tuned", 1, what != "quick_gelu")
    config = write_config(tmp_path / "run.yaml", files / "clip0", {"a": files / "clip2", "b": path})
    message = refused(config, capsys)
    assert str(path) in message and what in message


def test_an_activation_that_only_the_fine_tuned_checkpoint_says(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The pretrained state dict is silent, the fine-tuned models say QuickGELU: followed or refused, never GELU."""
    config = write_config(tmp_path / "run.yaml", files / "clip0.pt", {"a": files / "clip1", "b": files / "folder2"})
    if run("train", config, "--out", tmp_path / "run", "--quiet") == 2:
        assert "quick_gelu" in capsys.readouterr().err
        return
    workspace, model = open_run(tmp_path / "run")
    assert workspace.encoder_description["quick_gelu"] is True
    expected = clip.tower(0, True)
    expected.load_state_dict(pm.merge(model, GAMMAS[0]).state_dict())
    assert torch.equal(features(pm.merge(model, GAMMAS[0])), features(expected))


def test_an_explicit_activation_that_a_fine_tuned_checkpoint_contradicts(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The pretrained state dict is silent; the configuration says one, the fine-tuned checkpoint the other."""
    for said, name in ((False, "clip1"), (True, "gelu")):
        tasks = {"a": files / name, "b": files / "visual2.safetensors"}
        config = write_config(tmp_path / "run.yaml", files / "clip0.pt", tasks, encoder={"quick_gelu": said})
        assert str(files / name) in refused(config, capsys)


def test_a_normalisation_that_only_the_fine_tuned_checkpoint_says(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Followed or refused, never CLIP's own in its place."""
    config = write_config(
        tmp_path / "run.yaml",
        files / "clip0.pt",
        {"a": files / "clip1", "b": files / "folder2"},
        encoder={"quick_gelu": True},
    )
    if run("train", config, "--out", tmp_path / "run", "--quiet") == 2:
        assert "preprocessing" in capsys.readouterr().err
        return
    assert Workspace(read_config(config)).preprocessing["mean"] == list(clip.MEAN)


def test_fine_tuned_checkpoints_that_contradict_each_other(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever the pretrained one is silent about."""
    tasks = {"a": files / "clip2", "b": files / "gelu"}
    message = refused(write_config(tmp_path / "run.yaml", files / "clip0.pt", tasks), capsys)
    assert str(files / "gelu") in message or str(files / "clip2") in message


def test_heads_that_contradict_the_checkpoint(files: Path, tmp_path: Path, capsys: Any) -> None:
    """No shape shows the number of attention heads, but config.json says two."""
    arguments = {"image_size": 32, "patch_size": 16, "width": 128, "layers": 2, "mlp_ratio": 4.0, "output_dim": 24}
    tasks = {"a": files / "clip1", "b": files / "clip2"}
    for heads, code in ((2, 0), (4, 2)):
        (tmp_path / "encoder.json").write_text(json.dumps({**arguments, "heads": heads}))
        config = write_config(
            tmp_path / "run.yaml", files / "clip0", tasks, encoder={"architecture": "encoder.json", "quick_gelu": True}
        )
        capsys.readouterr()
        assert run("train", config, "--out", tmp_path / f"run{heads}", "--quiet") == code
    assert "heads" in one_line(capsys)
    assert not (tmp_path / "run4").exists()


# separate q, k, v and the fused in-projection


@pytest.mark.parametrize("method", [{"rank": 2}, {"rank": 2, "granularity": "block", "low_rank": "in-projection"}])
def test_separate_and_fused_files_learn_the_same_set(method: dict[str, Any], files: Path, tmp_path: Path) -> None:
    """Exactly equal, bit for bit, between Hugging Face's folders (q, k, v apart) and open_clip's (in_proj joined):

    the tensors of the pretrained and of each fine-tuned model, their digests, every λ, A, G and B learned from the
    same images, and so the merged state dict and its features at any preference.
    """
    sets, models = [], []
    for kind in ("clip{}", "folder{}", "encoder{}.pt"):
        tasks = {
            name: {
                "checkpoint": str(files / kind.format(seed)),
                "head": str(files / f"head_{seed}.pt"),
                "merging": str(files / "merging"),
            }
            for seed, name in ((1, "a"), (2, "b"))
        }
        path = tmp_path / kind.format("") / "run.yaml"
        settings = {"steps": 2, "batch_size": 2, "learning_rate": 0.1, **method}
        folder = trained(write_config(path, files / kind.format(0), tasks, method=settings))
        sets.append(
            (load_file(folder / "pareto_set.safetensors"), read_header(folder / "pareto_set.safetensors", "pareto-set"))
        )
        models.append(open_run(folder)[1])
    for (tensors, header), model in zip(sets[1:], models[1:], strict=True):
        assert_bits(tensors, sets[0][0])
        assert header["digests"] == sets[0][1]["digests"]
        for gamma in GAMMAS:
            assert_bits(pm.merge(model, gamma).state_dict(), pm.merge(models[0], gamma).state_dict())
            assert torch.equal(features(pm.merge(model, gamma)), features(pm.merge(models[0], gamma)))
    # it has learned something that depends on the preference
    assert any(bool(tensor.any()) for name, tensor in sets[0][0].items() if name.startswith("G."))


def to_open_clip(name: str) -> str:
    """transformers' name of a vision tensor -> open_clip's; q, k and v all go to the in-projection."""
    top = {
        "visual_projection.weight": "proj",
        "vision_model.embeddings.class_embedding": "class_embedding",
        "vision_model.embeddings.patch_embedding.weight": "conv1.weight",
        "vision_model.embeddings.position_embedding.weight": "positional_embedding",
        "vision_model.pre_layrnorm.weight": "ln_pre.weight",
        "vision_model.pre_layrnorm.bias": "ln_pre.bias",
        "vision_model.post_layernorm.weight": "ln_post.weight",
        "vision_model.post_layernorm.bias": "ln_post.bias",
    }
    if name in top:
        return top[name]
    layer, _, rest = name.removeprefix("vision_model.encoder.layers.").partition(".")
    part, _, kind = rest.rpartition(".")
    inner = {
        "layer_norm1": "ln_1.",
        "layer_norm2": "ln_2.",
        "self_attn.out_proj": "attn.out_proj.",
        "mlp.fc1": "mlp.c_fc.",
        "mlp.fc2": "mlp.c_proj.",
        **dict.fromkeys(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "attn.in_proj_"),
    }[part]
    return f"transformer.resblocks.{layer}.{inner}{kind}"


@pytest.fixture(scope="module")
def apart_and_fused() -> tuple[nn.Module, nn.Module]:
    """Two Pareto models of the same three models: transformers' CLIPVisionModelWithProjection, open_clip's tower.

    The same λ for corresponding tensors (different for each), A of the in-projection that of q, k, v stacked, and B
    and G of q, k, v that of the in-projection.
    """
    plain = hf_files.huggingface_model(0)
    copies = {name: noisy_copy(plain, seed) for seed, name in ((1, "a"), (2, "b"))}

    def fused(model: nn.Module) -> nn.Module:
        state: dict[str, list[Tensor]] = {}
        for name, tensor in model.state_dict().items():
            if name.endswith("position_ids"):
                continue
            state.setdefault(to_open_clip(name), []).append((tensor, name))  # type: ignore[arg-type]
        tower = clip.tower(0)
        order = {"q_proj": 0, "k_proj": 1, "v_proj": 2}
        joined = {}
        for name, parts in state.items():
            parts.sort(key=lambda part: next((n for letter, n in order.items() if letter in part[1]), 0))  # type: ignore[index]
            joined[name] = torch.cat([part[0] for part in parts]) if parts[1:] else parts[0][0]  # type: ignore[index]
        joined["proj"] = joined["proj"].T.contiguous()
        tower.load_state_dict(joined)
        return tower

    apart = pm.parametrize(plain, copies, rank=3, low_rank="attention")
    joined = pm.parametrize(fused(plain), {name: fused(copy) for name, copy in copies.items()}, rank=3)
    rng = torch.Generator().manual_seed(7)
    ours, theirs = pm.learned_parameters(joined), pm.learned_parameters(apart)
    with torch.no_grad():
        for parameter in ours.values():
            parameter.copy_(torch.randn(parameter.shape, generator=rng) * 0.3)
        for name, parameter in theirs.items():
            kind, _, tensor = name.partition(".")
            source = ours[f"{kind}.{to_open_clip(tensor)}"]
            if kind == "A" and "in_proj" in to_open_clip(tensor):
                source = source.chunk(3)[["q_proj" in tensor, "k_proj" in tensor, "v_proj" in tensor].index(True)]
            parameter.copy_(source)
    # nothing is left at its start: every learned tensor of ours has one or three of theirs
    assert {f"{name.partition('.')[0]}.{to_open_clip(name.partition('.')[2])}" for name in theirs} == set(ours)
    return apart, joined


@pytest.mark.parametrize("gamma", [[0.5, 0.5], [0.9, 0.1], [1.0, 0.0], [0.123, 0.877]])
def test_separate_and_fused_modules_merge_to_the_same_model(
    gamma: list[float], apart_and_fused: tuple[nn.Module, nn.Module]
) -> None:
    """The same λ per tensor (q, k and v that of the in-projection), A stacked, B and G shared, at any γ:

    - every tensor without a low-rank term is equal bit for bit, the in-projection's bias (q, k, v stacked) and the
      projection (transposed) among them;
    - the tensors with one (in- and out-projections of the attention) are equal up to the rounding of the low-rank
      product, at most 1e-6 of the largest entry; with G = 0 they too are equal bit for bit;
    - the features of the merged models are equal to 1e-5, though the two libraries compute attention differently.
    """
    apart, joined = apart_and_fused
    compared = compare_merged(apart, joined, gamma)
    exact = {name for name, (error, _) in compared.items() if error == 0}
    has_term = {name for name in compared if "attn" in name and name.endswith("weight")}
    assert has_term and set(compared) - has_term <= exact
    for name in has_term:
        error, largest = compared[name]
        assert error <= 1e-6 * largest, name
    first, second = pm.merge(apart, gamma).eval(), pm.merge(joined, gamma).eval()
    with torch.no_grad():
        torch.testing.assert_close(first(clip.images()).image_embeds, second(clip.images()), atol=1e-5, rtol=0)
        # and before merging, by the Pareto models themselves
        with pm.preference(apart, gamma), pm.preference(joined, gamma):
            torch.testing.assert_close(apart(clip.images()).image_embeds, second(clip.images()), atol=1e-5, rtol=0)
            torch.testing.assert_close(joined(clip.images()), second(clip.images()), atol=1e-5, rtol=0)
    # the low-rank terms matter
    cores = {name: p for name, p in [*pm.learned_parameters(apart).items(), *_prefixed(joined)] if "G." in name}
    kept = {name: parameter.detach().clone() for name, parameter in cores.items()}
    with torch.no_grad():
        for parameter in cores.values():
            parameter.zero_()
        try:
            without = compare_merged(apart, joined, gamma)
            assert all(error == 0 for error, _ in without.values())
            changed = pm.merge(joined, gamma).eval()
            assert (features(changed) - features(second)).abs().max() > 1e-3
        finally:
            for name, parameter in cores.items():
                parameter.copy_(kept[name])


def _prefixed(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(f"fused {name}", parameter) for name, parameter in pm.learned_parameters(model).items()]


def compare_merged(apart: nn.Module, joined: nn.Module, gamma: list[float]) -> dict[str, tuple[float, float]]:
    """open_clip's name -> (largest difference, largest entry) of the merged tensors."""
    found: dict[str, list[Tensor]] = {}
    for name, tensor in pm.merge(apart, gamma).state_dict().items():
        if not name.endswith("position_ids"):
            found.setdefault(to_open_clip(name), []).append(tensor)
    result = {}
    for name, tensor in pm.merge(joined, gamma).state_dict().items():
        # state_dict has k, v and q in transformers' order of definition
        parts = found.pop(name)
        if parts[1:]:
            order = [key for key in pm.merge(apart, gamma).state_dict() if to_open_clip(key) == name]
            parts = [parts[order.index(key)] for letter in "qkv" for key in order if f".{letter}_proj." in key]
        other = torch.cat(parts) if parts[1:] else parts[0]
        other = other.T if name == "proj" else other
        result[name] = (float((tensor - other).abs().max()), float(tensor.abs().max()))
    assert not found
    return result


def test_the_settings_of_lambda_are_comparable(apart_and_fused: tuple[nn.Module, nn.Module]) -> None:
    """get_lambda and set_lambda: q, k and v have a λ each, weight and bias; the in-projection has one for all three."""
    apart, joined = apart_and_fused
    ours = dict(zip(pm.lambda_names(joined), pm.get_lambda(joined), strict=True))
    for name, row in zip(pm.lambda_names(apart), pm.get_lambda(apart), strict=True):
        assert torch.equal(row, ours[to_open_clip(name)]), name
    assert len(pm.lambda_names(apart)) - len(ours) == 4 * clip.LAYERS
    assert len({tuple(row.tolist()) for row in ours.values()}) == len(ours)
    before = pm.get_lambda(joined)
    pm.set_lambda(joined, before * 2)
    try:
        assert compare_merged(apart, joined, [0.5, 0.5])["ln_pre.weight"][0] > 0
    finally:
        pm.set_lambda(joined, before)


# mixed formats


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """OpenAI's archive, a Hugging Face folder without a projection, a pickle of the task-vectors release, its heads.

    Their normalisation is CLIP's own, as of those that were published.
    """
    from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

    folder = tmp_path_factory.mktemp("mixed")
    open_clip_files.torchscript_archive(folder / "ViT-B-32.pt", 0)
    with pytest.MonkeyPatch.context() as patch:
        for writer in (hf_files, pickled_modules):
            patch.setattr(writer, "MEAN", OPENAI_DATASET_MEAN)
            patch.setattr(writer, "STD", OPENAI_DATASET_STD)
        hf_files.huggingface_folder(folder / "hf", 1)
        pickled_modules.task_vectors_encoder(folder / "finetuned.pt", 2)
    for seed, name in ((1, "hf"), (2, "pickle")):
        pickled_modules.task_vectors_head(folder / f"head_{name}.pt", seed)
    write_images(folder / "merging", 6, 0, (40, 50))
    for label in range(5):
        write_images(folder / "test" / str(label), 2, 10 + label, (40, 50))
    common = {"merging": "merging", "evaluation": "test"}
    tasks = {
        "hf": {"checkpoint": "hf", "head": "head_hf.pt", **common},
        "pickle": {"checkpoint": "finetuned.pt", "head": "head_pickle.pt", **common},
    }
    method = {"steps": 2, "rank": 2, "batch_size": 2, "learning_rate": 0.1, "checkpoint_every": 1}
    trained(write_config(folder / "run.yaml", "ViT-B-32.pt", tasks, method=method))
    return folder


def test_mixed_formats_make_one_model(mixed: Path) -> None:
    """W0 + Σ λ_k τ_k of the tensors that were put into the files; the projection is the pretrained one's for hf."""
    config = read_config(mixed / "run.yaml")
    workspace = Workspace(config)
    base = {name: tensor.float() for name, tensor in open_checkpoint(mixed / "ViT-B-32.pt").items()}
    model = workspace.pareto_model()
    pm.set_lambda(model, torch.tensor([0.25, 0.5]))
    found = pm.merge(model, [0.5, 0.5]).state_dict()
    states = [clip.tower(1).state_dict(), clip.tower(2).state_dict()]
    states[0]["proj"] = base["proj"]
    assert found.keys() == base.keys()
    for name, tensor in found.items():
        expected = base[name] + 0.25 * (states[0][name] - base[name]) + 0.5 * (states[1][name] - base[name])
        torch.testing.assert_close(tensor, expected, atol=1e-6, rtol=1e-5)
    assert workspace.encoder_description["quick_gelu"] is True


def test_mixed_formats_are_evaluated_and_exported(mixed: Path, tmp_path: Path, capsys: Any) -> None:
    shutil.copytree(mixed / "run", tmp_path / "run")
    assert run("evaluate", tmp_path / "run", "--preferences", "0.5,0.5;hf=0.9", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    workspace, model = open_run(mixed / "run")
    scores = evaluate_model(pm.merge(model, [0.9, 0.1]), workspace.evaluation_tasks())
    assert report["results"][1]["accuracy"] == pytest.approx(scores.accuracy, abs=1e-3)
    for format in ("safetensors", "open_clip", "huggingface"):
        out = tmp_path / (f"{format}.safetensors" if format == "safetensors" else format)
        assert run("export", tmp_path / "run", "--preference", "hf=0.9", "--format", format, "--out", out) == 0
        found = open_checkpoint(out)
        assert_bits(found, pm.merge(model, [0.9, 0.1]).state_dict())
        assert found.quick_gelu is True
        # OpenAI's archive is a whole CLIP
        assert bool(found.text) is (format != "safetensors")
    assert run("export", tmp_path / "run", "--folded") == 0
    folded = pm.load_folded(tmp_path / "run" / "folded.safetensors")
    with pm.preference(folded, [0.9, 0.1]):
        torch.testing.assert_close(features(folded), features(pm.merge(model, [0.9, 0.1])), atol=1e-4, rtol=1e-4)
    heads = pm.load_heads(tmp_path / "run" / "folded.safetensors")
    assert torch.equal(heads["hf"].weight, read_head(mixed / "head_hf.pt").weight)


def test_mixed_formats_resume_to_the_same_bits(
    mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from pareto_merging.data import sources

    count, original = 0, sources.FolderImages.__getitem__

    def interrupt(self: Any, index: int) -> Any:
        nonlocal count
        count += 1
        if count == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, index)

    with monkeypatch.context() as patch:
        patch.setattr(sources.FolderImages, "__getitem__", interrupt)
        assert run("train", mixed / "run.yaml", "--out", tmp_path / "run", "--quiet") == 130
    assert not (tmp_path / "run" / "pareto_set.safetensors").exists()
    assert "--resume" in capsys.readouterr().err
    assert run("train", mixed / "run.yaml", "--out", tmp_path / "run", "--resume", "--quiet") == 0
    assert "1 of them before" in capsys.readouterr().out
    name = "pareto_set.safetensors"
    assert (tmp_path / "run" / name).read_bytes() == (mixed / "run" / name).read_bytes()


def test_models_without_a_projection(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A fine-tuned one takes the pretrained one's; none anywhere is fine; one that nothing pretrained has is not."""
    config = write_config(tmp_path / "a.yaml", files / "clip0", {"a": files / "vision1", "b": files / "clip2"})
    _, model = open_run(trained(config, "a"))
    base, other = clip.tower(0).proj.detach(), clip.tower(2).proj.detach()
    lam = dict(zip(pm.lambda_names(model), pm.get_lambda(model), strict=True))["proj"]
    found = pm.merge(model, [0.5, 0.5]).proj
    torch.testing.assert_close(found, base + lam[1] * (other - base), atol=1e-6, rtol=1e-5)
    config = write_config(tmp_path / "b.yaml", files / "clip0", {"a": files / "vision1", "b": files / "vision2"})
    _, model = open_run(trained(config, "b"))
    assert torch.equal(pm.merge(model, [0.5, 0.5]).proj, base)
    config = write_config(tmp_path / "c.yaml", files / "vision0", {"a": files / "vision1", "b": files / "vision2"})
    _, model = open_run(trained(config, "c"))
    assert features(pm.merge(model, [0.5, 0.5])).shape == (3, clip.WIDTH)
    config = write_config(tmp_path / "d.yaml", files / "vision0", {"a": files / "vision1", "b": files / "clip2"})
    assert "expected a projection, as" in refused(config, capsys)


# the same in Python


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_models_loaded_in_python_are_those_of_a_run(dtype: str, mixed: Path) -> None:
    sources = {"hf": str(mixed / "hf"), "pickle": mixed / "finetuned.pt"}
    pretrained, finetuned = pm.load_models(mixed / "ViT-B-32.pt", sources, dtype=dtype)
    config = read_config(mixed / "run.yaml").model_copy(update={"dtype": dtype})
    workspace = Workspace(config)
    expected = pm.parametrize(workspace.pretrained(), workspace.finetuned(), rank=2)
    model = pm.parametrize(pretrained, finetuned, rank=2, copy=False)
    assert model is pretrained
    assert {parameter.dtype for parameter in pm.merge(model, GAMMAS[0]).parameters()} == {getattr(torch, dtype)}
    for gamma in GAMMAS:
        assert_bits(pm.merge(model, gamma).state_dict(), pm.merge(expected, gamma).state_dict())
    # with the archive's activation
    plain = clip.tower(0, True).to(getattr(torch, dtype))
    plain.load_state_dict(pm.merge(model, GAMMAS[0]).state_dict())
    images = clip.images().to(getattr(torch, dtype))
    assert torch.equal(pm.merge(model, GAMMAS[0])(images), plain(images))


def test_models_that_cannot_be_loaded_in_python(
    offline: None, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    good = files / "clip1"
    assert_bits(pm.load_models("owner/name", {"a": good})[0].state_dict(), clip.tower(0).state_dict())
    for pretrained, finetuned, message in (
        ("missing.pt", {"a": good}, r"missing\.pt"),
        (files / "clip0", {"a": tmp_path / "missing"}, r"missing"),
        (files / "clip0", {"a": files / "gelu"}, r"gelu.*quick_gelu"),
        (files / "clip0", {"a": good, "b": good}, r"a, b"),
        (files / "clip0", {"a": files / "head_1.pt"}, r"head_1\.pt"),
        (files / "clip0", {}, r"tasks"),
        (files / "clip0", {"equal": good}, r"equal"),
    ):
        with pytest.raises(pm.UserError, match=message) as raised:
            pm.load_models(pretrained, finetuned)
        assert "\n" not in str(raised.value)
        # nothing of how settings are checked inside
        assert "pydantic" not in str(raised.value), str(raised.value)


# names and places


def test_a_name_on_the_hub(offline: None, tmp_path: Path, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As pretrained and as a fine-tuned checkpoint, and again when the run is evaluated from another folder."""
    tasks = {"a": "owner/name@tuned", "b": str(files / "folder2")}
    folder = trained(write_config(tmp_path / "here" / "run.yaml", "owner/name", tasks))
    monkeypatch.chdir(tmp_path)
    workspace, _ = open_run(folder)
    assert_bits(workspace.pretrained().state_dict(), clip.tower(0).state_dict())
    assert_bits(dict(workspace.finetuned()["a"]), dict(clip.tower(1).state_dict()))


def test_a_folder_beside_the_configuration_comes_before_the_hub(offline: None, tmp_path: Path, files: Path) -> None:
    shutil.copytree(files / "clip3", tmp_path / "here" / "owner" / "name")
    config = write_config(tmp_path / "here" / "run.yaml", "owner/name", {"a": files / "clip1", "b": files / "clip2"})
    assert_bits(Workspace(read_config(config)).pretrained().state_dict(), clip.tower(3).state_dict())
    workspace, _ = open_run(trained(config))
    assert_bits(workspace.pretrained().state_dict(), clip.tower(3).state_dict())


def test_a_folder_where_one_stands_does_not_come_before_the_hub(
    offline: None, tmp_path: Path, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Paths in a configuration are relative to it: what is in the working folder does not change what it means."""
    config = write_config(tmp_path / "here" / "run.yaml", "owner/name", {"a": files / "clip1", "b": files / "clip2"})
    shutil.copytree(files / "clip3", tmp_path / "there" / "owner" / "name")
    monkeypatch.chdir(tmp_path / "there")
    assert_bits(Workspace(read_config(config)).pretrained().state_dict(), clip.tower(0).state_dict())


def test_a_path_that_says_it_is_one_is_not_looked_up_on_the_hub(
    offline: None, tmp_path: Path, files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A mistyped ``./owner/name`` is a missing folder, and not whatever somebody has put on the hub."""
    with pytest.raises(pm.UserError, match=r"owner/name"):
        pm.load_models("./owner/name", {"a": files / "clip1"})
    for source in ("./owner/name", "../here/owner/name"):
        config = write_config(tmp_path / "here" / "run.yaml", source, {"a": files / "clip1", "b": files / "clip2"})
        assert "owner/name" in refused(config, capsys)


def test_a_name_of_open_clip(offline: None, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As ``pretrained``, from the cache, with what open_clip says of it, and again when the run is opened."""
    from open_clip import factory, pretrained

    open_clip_files.open_clip_file(tmp_path / "weights" / "open_clip_model.safetensors", 0)
    hf_files.hub_cache(tmp_path / "hub", "owner/tiny", tmp_path / "weights")
    tags = {"openai": pretrained._pcfg(hf_hub="owner/tiny/", quick_gelu=True, mean=clip.MEAN, std=clip.STD)}
    monkeypatch.setitem(factory._MODEL_CONFIGS, "tiny", clip.MODEL_CONFIG)
    monkeypatch.setitem(pretrained._PRETRAINED, "tiny", tags)
    config = write_config(tmp_path / "run.yaml", "open_clip:tiny/openai", {"a": files / "clip1.pt"})
    workspace, _ = open_run(trained(config))
    assert workspace.encoder_description["quick_gelu"] is True
    assert workspace.preprocessing["mean"] == list(clip.MEAN)
    assert_bits(workspace.pretrained().state_dict(), clip.tower(0).state_dict())
    assert torch.equal(features(workspace.pretrained()), features(clip.tower(0)))


@pytest.mark.parametrize("kind", ["the same", "a link", "a folder and its file", "another way there", "two revisions"])
def test_two_tasks_with_one_checkpoint(kind: str, offline: None, tmp_path: Path, files: Path, capsys: Any) -> None:
    (tmp_path / "link.pt").symlink_to(files / "clip1.pt")
    pairs = {
        "the same": (files / "clip1.pt", files / "clip1.pt"),
        "a link": (files / "clip1.pt", tmp_path / "link.pt"),
        "a folder and its file": (files / "clip1", files / "clip1" / "model.safetensors"),
        "another way there": (files / "clip1.pt", files / "clip1" / ".." / "clip1.pt"),
        "two revisions": ("owner/name@tuned", f"owner/name@{'f' * 40}"),
    }
    config = write_config(tmp_path / "run.yaml", files / "clip0", dict(zip("ab", pairs[kind], strict=True)))
    assert "a, b" in refused(config, capsys)


@pytest.mark.parametrize(
    ("first", "second"),
    [("clip1", "folder1"), ("clip1.pt", "visual1.safetensors"), ("encoder1.pt", "clip1")],
)
def test_the_same_weights_under_two_names(first: str, second: str, files: Path, tmp_path: Path, capsys: Any) -> None:
    tasks = {"a": files / first, "b": files / second}
    config = write_config(tmp_path / "run.yaml", files / "folder0", tasks)
    message = refused(config, capsys)
    assert "same weights for a, b" in message


def test_two_files_of_one_folder_are_two_checkpoints(files: Path, tmp_path: Path) -> None:
    """open_clip's folders may have several of the names it looks for, and each may be asked for."""
    shutil.copytree(files / "folder1", tmp_path / "model")
    open_clip_files.open_clip_file(tmp_path / "model" / "open_clip_pytorch_model.bin", 2)
    tasks = {"a": "model/open_clip_model.safetensors", "b": "model/open_clip_pytorch_model.bin"}
    workspace = Workspace(read_config(write_config(tmp_path / "run.yaml", files / "clip0", tasks)))
    workspace.check_files()
    for seed, name in ((1, "a"), (2, "b")):
        assert_bits(dict(workspace.finetuned()[name]), dict(clip.tower(seed).state_dict()))


@pytest.mark.parametrize(
    "name", ["clip0", "vision0", "folder0", "encoder0.pt", "clip0.pt", "visual0.safetensors", "hub"]
)
def test_a_plan_reads_no_weight(
    name: str, offline: None, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def refuse(self: Any, key: str) -> Tensor:
        raise AssertionError(f"read {key}")

    monkeypatch.setattr(checkpoint.CheckpointTensors, "read", refuse)
    source = "owner/name" if name == "hub" else files / name
    config = write_config(tmp_path / "run.yaml", source, {"a": files / "clip1", "b": files / "encoder2.pt"})
    assert run("plan", config, "--json") == 0
    rows = {row["kind"]: row for row in json.loads(capsys.readouterr().out)}
    state = clip.tower(0).state_dict()
    count = sum(tensor.numel() for key, tensor in state.items() if key != "proj" or name != "vision0")
    assert rows["frozen weights W0"]["parameters"] == count
    assert rows["task vectors τ"]["parameters"] == 2 * count


@pytest.mark.parametrize("which", ["pretrained", "a"])
def test_a_checkpoint_replaced_after_training(which: str, files: Path, tmp_path: Path, capsys: Any) -> None:
    for seed, name in ((0, "pretrained"), (1, "a"), (2, "b")):
        shutil.copytree(files / f"clip{seed}", tmp_path / name)
    folder = trained(write_config(tmp_path / "run.yaml", "pretrained", {"a": "a", "b": "b"}))
    assert open_run(folder)
    shutil.copy(files / "clip3" / "model.safetensors", tmp_path / which / "model.safetensors")
    capsys.readouterr()
    out = tmp_path / "out.safetensors"
    for command in (["evaluate", folder], ["export", folder, "--preference", "equal", "--out", out]):
        assert run(*command) == 2
        assert f"digest of {which}" in one_line(capsys)
    assert not out.exists()


def test_a_run_is_the_same_after_its_checkpoints_were_converted(files: Path, tmp_path: Path) -> None:
    """Digests are of the weights and not of files: a run goes on with converted checkpoints."""
    folder = trained(write_config(tmp_path / "run.yaml", files / "clip0", {"a": files / "clip1", "b": files / "clip2"}))
    text = (folder / "config.yaml").read_text()
    for seed in range(3):
        target = tmp_path / f"{seed}.safetensors"
        assert run("convert", files / f"clip{seed}", target, "--quiet") == 0
        text = text.replace(f"{files / f'clip{seed}'}\n", f"{target}\n")
    expected = pm.merge(open_run(folder)[1], GAMMAS[1])
    (folder / "config.yaml").write_text(text)
    assert str(files) not in text
    workspace, model = open_run(folder)
    assert_bits(pm.merge(model, GAMMAS[1]).state_dict(), expected.state_dict())
    assert workspace.preprocessing["mean"] == list(clip.MEAN)
    assert torch.equal(features(pm.merge(model, GAMMAS[1])), features(expected))


def test_a_task_that_is_called_pretrained(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Refused, or kept apart from the pretrained model: no false warning, and a replaced checkpoint is noticed."""
    shutil.copy(files / "visual0.safetensors", tmp_path / "base.safetensors")
    tasks = {"pretrained": files / "visual1.safetensors", "b": files / "visual2.safetensors"}
    config = write_config(tmp_path / "run.yaml", "base.safetensors", tasks)
    capsys.readouterr()
    code = run("train", config, "--out", tmp_path / "run", "--quiet")
    if code:
        assert code == 2 and "pretrained" in one_line(capsys)
        return
    assert "equals the pretrained one" not in capsys.readouterr().err
    shutil.copy(files / "visual3.safetensors", tmp_path / "base.safetensors")
    assert run("export", tmp_path / "run", "--preference", "equal") == 2
    assert "digest" in one_line(capsys)


def test_a_checkpoint_removed_after_training(files: Path, tmp_path: Path, capsys: Any) -> None:
    shutil.copy(files / "clip1.pt", tmp_path / "a.pt")
    folder = trained(write_config(tmp_path / "run.yaml", files / "clip0", {"a": "a.pt", "b": files / "clip2"}))
    (tmp_path / "a.pt").unlink()
    capsys.readouterr()
    assert run("evaluate", folder) == 2
    assert str(tmp_path / "a.pt") in one_line(capsys)


def test_a_checkpoint_replaced_before_a_resume(
    mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was learned on other weights is not learned on: the second half would be of another model."""
    from pareto_merging.data import sources

    for name in ("run.yaml", "ViT-B-32.pt", "finetuned.pt", "head_hf.pt", "head_pickle.pt"):
        shutil.copy(mixed / name, tmp_path / name)
    for name in ("hf", "merging", "test"):
        shutil.copytree(mixed / name, tmp_path / name)
    count, original = 0, sources.FolderImages.__getitem__

    def interrupt(self: Any, index: int) -> Any:
        nonlocal count
        count += 1
        if count == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, index)

    with monkeypatch.context() as patch:
        patch.setattr(sources.FolderImages, "__getitem__", interrupt)
        assert run("train", tmp_path / "run.yaml", "--out", tmp_path / "run", "--quiet") == 130
    state = load_file(tmp_path / "hf" / "model.safetensors")
    save_file({name: tensor * 1.5 for name, tensor in state.items()}, tmp_path / "hf" / "model.safetensors")
    before = (tmp_path / "run" / "checkpoint.safetensors").read_bytes()
    capsys.readouterr()
    assert run("train", tmp_path / "run.yaml", "--out", tmp_path / "run", "--resume", "--quiet") == 2
    assert "hf" in one_line(capsys)
    assert (tmp_path / "run" / "checkpoint.safetensors").read_bytes() == before


# mistakes


def spoil(kind: str, folder: Path) -> str:
    """A checkpoint that cannot be merged; returns its name in ``folder``."""
    state = dict(clip.clip(3).state_dict())
    name = "bad.pt"
    if kind in ("NaN", "inf"):
        state["visual.transformer.resblocks.1.attn.in_proj_weight"][5, 7] = float(kind)
    elif kind == "wider":
        import open_clip

        config = {**clip.MODEL_CONFIG, "vision_cfg": {**clip.MODEL_CONFIG["vision_cfg"], "width": 192}}
        state = dict(open_clip.CLIP(**config).state_dict())
    elif kind == "ResNet":
        state = {"visual.conv1.weight": torch.ones(8, 3, 3, 3), "visual.layer1.0.conv1.weight": torch.ones(8, 8, 1, 1)}
    elif kind == "BERT":
        state = {"bert.encoder.layer.0.attention.self.query.weight": torch.ones(8, 8)}
    elif kind == "a head":
        pickled_modules.task_vectors_head(folder / name)
        return name
    elif kind == "missing":
        return name
    elif kind == "empty":
        (folder / name).write_bytes(b"")
        return name
    elif kind == "an empty folder":
        (folder / "bad").mkdir()
        return "bad"
    elif kind == "damaged":
        open_clip_files.open_clip_file(folder / "good.pt", 3)
        assert run("convert", folder / "good.pt", folder / "bad.safetensors", "--quiet") == 0
        data = bytearray((folder / "bad.safetensors").read_bytes())
        data[-1] ^= 1
        (folder / "bad.safetensors").write_bytes(data)
        return "bad.safetensors"
    elif kind == "NaN in a folder":
        hf_files.huggingface_folder(folder / "bad", 3, kind="clip")
        tensors = load_file(folder / "bad" / "model.safetensors")
        tensors["vision_model.encoder.layers.0.self_attn.k_proj.bias"][0] = float("nan")
        save_file(tensors, folder / "bad" / "model.safetensors")
        return "bad"
    elif kind == "code":
        state["x"] = os.system  # type: ignore[assignment]
    torch.save(state, folder / name)
    if kind == "truncated":
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) * 2 // 3])
    return name


@pytest.mark.parametrize("place", ["pretrained", "task"])
@pytest.mark.parametrize(
    "kind",
    [
        *("missing", "empty", "an empty folder", "truncated", "damaged", "NaN", "inf", "NaN in a folder"),
        *("wider", "ResNet", "BERT", "a head", "code"),
    ],
)
def test_a_checkpoint_that_cannot_be_merged(kind: str, place: str, files: Path, tmp_path: Path, capsys: Any) -> None:
    """One line that names the file (or, of two that do not fit, one of them), exit code 2, no run folder."""
    name = spoil(kind, tmp_path)
    bad = tmp_path / name
    if place == "pretrained":
        config = write_config(tmp_path / "run.yaml", name, {"a": files / "clip1", "b": files / "clip2"})
    else:
        config = write_config(tmp_path / "run.yaml", files / "clip0", {"a": files / "clip1", "b": name})
    message = refused(config, capsys)
    named = [bad] if kind != "wider" or place == "task" else [bad, files / "clip1"]
    assert any(str(path) in message for path in named), message
    assert len(message) < 1000


@pytest.mark.parametrize("place", ["pretrained", "task"])
def test_numbers_that_the_dtype_of_the_run_does_not_hold(place: str, files: Path, tmp_path: Path, capsys: Any) -> None:
    """70000 is inf in float16."""
    state = dict(clip.tower(3).state_dict())
    state["ln_pre.weight"][3] = 70000.0
    save_file(state, tmp_path / "large.safetensors")
    paths = {"pretrained": files / "clip0", "task": files / "clip1", place: tmp_path / "large.safetensors"}
    tasks = {"a": paths["task"], "b": files / "clip2"}
    message = refused(write_config(tmp_path / "run.yaml", paths["pretrained"], tasks, dtype="float16"), capsys)
    assert "large.safetensors" in message or "pretrained" in message or " a" in message


def test_a_plan_of_what_is_not_there(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("missing.pt", "missing"):
        config = write_config(tmp_path / "run.yaml", name, {"a": files / "clip1"})
        assert run("plan", config) == 2
        assert str(tmp_path / name) in one_line(capsys)


def test_an_architecture_with_quick_gelu_in_its_name(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The name decides where the checkpoint is silent; saying the opposite beside it is refused."""
    from open_clip import factory

    monkeypatch.setitem(factory._MODEL_CONFIGS, "tiny-quickgelu", {**clip.MODEL_CONFIG, "quick_gelu": True})
    tasks = {"a": files / "visual1.safetensors", "b": files / "clip2.pt"}
    config = write_config(tmp_path / "run.yaml", files / "clip0.pt", tasks, encoder={"architecture": "tiny-quickgelu"})
    folder = trained(config)
    _, model = open_run(folder)
    merged = pm.merge(model, [0.5, 0.5])
    plain = clip.tower(0, True)
    plain.load_state_dict(merged.state_dict())
    assert torch.equal(features(merged), features(plain))
    for format in ("safetensors", "open_clip", "huggingface"):
        out = tmp_path / (f"{format}.safetensors" if format == "safetensors" else format)
        assert run("export", folder, "--preference", "equal", "--format", format, "--out", out, "--quiet") == 0
        assert open_checkpoint(out).quick_gelu is True
    config = write_config(
        tmp_path / "other.yaml",
        files / "clip0.pt",
        tasks,
        encoder={"architecture": "tiny-quickgelu", "quick_gelu": False},
    )
    assert "quick_gelu" in refused(config, capsys)


@pytest.mark.parametrize("kind", ["NaN", "missing", "wrong width", "an encoder", "NaN pickle"])
def test_a_head_that_does_not_fit(kind: str, files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = tmp_path / "head_bad.pt"
    if kind == "NaN pickle":
        with pickled_modules.task_vectors_code():
            torch.save(pickled_modules.ClassificationHead(True, torch.full((5, clip.EMBED), float("nan"))), bad)
    elif kind == "NaN":
        bad = bad.with_suffix(".safetensors")
        save_file({"weight": torch.full((5, clip.EMBED), float("nan"))}, bad)
    elif kind == "wrong width":
        with pickled_modules.task_vectors_code():
            torch.save(pickled_modules.ClassificationHead(True, torch.eye(7)), bad)
    elif kind == "an encoder":
        pickled_modules.task_vectors_encoder(bad)
    tasks = {
        name: {"checkpoint": str(files / f"clip{seed}"), "head": str(head), "merging": str(files / "merging")}
        for seed, name, head in ((1, "a", files / "head_1.pt"), (2, "b", bad))
    }
    config = write_config(tmp_path / "run.yaml", files / "clip0", tasks, method={"steps": 1, "rank": 2})
    assert str(bad) in refused(config, capsys)


def test_a_name_that_the_hub_does_not_have(offline: None, files: Path, tmp_path: Path, capsys: Any) -> None:
    for source in ("owner/none", "owner/name@none", "models/my_run"):
        config = write_config(tmp_path / "run.yaml", files / "clip0", {"a": files / "clip1", "b": source})
        assert source.partition("@")[0] in refused(config, capsys)


def test_unseen_tasks_are_not_the_merged_ones() -> None:
    with pytest.raises(pm.UserError, match="unseen: expected tasks that are not merged, got rotated"):
        Workspace(RunConfig.model_validate({"suite": "digits", "unseen": ["rotated"]}))
