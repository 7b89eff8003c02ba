"""Pareto set files and folded files: what is in them, round trips, and files that do not belong."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import noisy_copy, randomize
from safetensors.torch import load_file, save_file
from torch import nn

import pareto_merging
from pareto_merging.checkpoints import safetensors
from pareto_merging.errors import UserError
from pareto_merging.model.files import (
    SET_FORMAT,
    load_folded,
    load_pareto_set,
    read_header,
    save_folded,
    save_pareto_set,
)
from pareto_merging.model.fold import fold
from pareto_merging.model.parametrize import parametrize
from pareto_merging.model.state import set_preference

Copies = Callable[[nn.Module, int], dict[str, nn.Module]]
IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
GAMMA = [0.2, 0.8]


@pytest.fixture
def saved(tiny_vit: nn.Module, copies: Copies, tmp_path: Path) -> tuple[Path, nn.Module, dict[str, nn.Module]]:
    finetuned = copies(tiny_vit, 2)
    model = randomize(parametrize(tiny_vit, finetuned, rank=3, granularity="block", seed=5))
    set_preference(model, GAMMA)
    path = tmp_path / "set.safetensors"
    save_pareto_set(model, path, preset="icml2025", training={"steps": 7})
    return path, model, finetuned


def test_header(saved: tuple[Path, nn.Module, dict[str, nn.Module]]) -> None:
    header = read_header(saved[0], SET_FORMAT)
    assert header["format_version"] == 1
    assert header["task_names"] == ["t0", "t1"]
    assert (header["tasks"], header["rank"], header["seed"]) == (2, 3, 5)
    assert header["lambda_grouping"] == "block"
    assert header["preset"] == "icml2025"
    assert header["package_version"]
    assert header["initial_scale"].startswith("kaiming-uniform")
    assert header["training"] == {"steps": 7}
    assert set(header["digests"]) == {"pretrained", "t0", "t1"}
    assert all(len(digest) == 64 for digest in header["digests"].values())
    attention = header["layers"]["transformer.resblocks.0.attn"]
    assert attention == {"merged": ["in_proj_weight", "in_proj_bias"], "low_rank": ["in_proj_weight"]}


def test_it_holds_everything_but_the_frozen_weights(
    saved: tuple[Path, nn.Module, dict[str, nn.Module]], tiny_vit: nn.Module
) -> None:
    path, model, finetuned = saved
    names = set(load_file(path))
    assert all(name.split(".")[0] in ("lam", "A", "G", "B") for name in names)
    loaded = load_pareto_set(path, tiny_vit, finetuned)
    set_preference(loaded, GAMMA)
    assert torch.equal(loaded(IMAGES), model(IMAGES))
    # a sequence, tasks in another order, more tasks than needed, half-precision storage of the same values
    assert load_pareto_set(path, tiny_vit, list(finetuned.values())) is not None
    more = {"other": tiny_vit, **dict(reversed(finetuned.items()))}
    again = load_pareto_set(path, tiny_vit, more)
    set_preference(again, {"t1": 0.8})
    torch.testing.assert_close(again(IMAGES), model(IMAGES))


def test_half_precision_files_have_the_digest_of_their_values(tiny_vit: nn.Module, tmp_path: Path) -> None:
    half = {k: {n: v.half() for n, v in m.state_dict().items()} for k, m in (("a", noisy_copy(tiny_vit, 1)),)}
    full = {k: {n: v.float() for n, v in weights.items()} for k, weights in half.items()}
    pretrained = tiny_vit.half().float()
    model = parametrize(pretrained, half, rank=2)
    save_pareto_set(model, tmp_path / "set.safetensors")
    load_pareto_set(tmp_path / "set.safetensors", pretrained, full)


def test_wrong_checkpoints_are_named(saved: tuple[Path, nn.Module, dict[str, nn.Module]], tiny_vit: nn.Module) -> None:
    path, _, finetuned = saved
    with torch.no_grad():
        other = {**finetuned, "t1": noisy_copy(tiny_vit, 9)}
        with pytest.raises(UserError, match=r"belongs to other weights; digest of t1 has \w{12}…, expected \w{12}…$"):
            load_pareto_set(path, tiny_vit, other)
        swapped = {"t0": finetuned["t1"], "t1": finetuned["t0"]}
        with pytest.raises(UserError, match=r"digest of t0 has .*; t1 has"):
            load_pareto_set(path, tiny_vit, swapped)
        # one bit of one weight
        changed = noisy_copy(tiny_vit, 1, scale=0.0)
        changed.proj[0, 0] = torch.nextafter(changed.proj[0, 0], torch.tensor(10.0))
        with pytest.raises(UserError, match="digest of pretrained has"):
            load_pareto_set(path, changed, finetuned)
    with pytest.raises(UserError, match="got none named t1"):
        load_pareto_set(path, tiny_vit, {"t0": finetuned["t0"]})
    with pytest.raises(UserError, match=r"expected 2 copies \(t0, t1\), got 1"):
        load_pareto_set(path, tiny_vit, [finetuned["t0"]])


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor], dict[str, str]], None]) -> None:
    tensors, metadata = load_file(path), safetensors.read_metadata(path)
    # who changes a file on purpose leaves none that do not fit
    del metadata[safetensors.CHECKSUMS]
    change(tensors, metadata)
    save_file(tensors, path, metadata=metadata)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, m: m.update(format_version="4"), "expected format version 3 or older, got 4"),
        (lambda t, m: m.update(preprocess="prune"), "expected preprocess none, ties, dare, function in the header"),
        (lambda t, m: m.update(core="cross"), "expected core tensor, outer-product, outer-vector in the header"),
        (lambda t, m: m.update(density="0"), r"expected density in \(0, 1\] in the header, got 0"),
        (lambda t, m: m.update(format="else"), "expected a pareto-set file, got else"),
        (lambda t, m: m.clear(), "expected a pareto-set file, got another safetensors file"),
        (lambda t, m: t.pop(next(iter(t))), "does not fit the model: lacks "),
        (lambda t, m: t.update(extra=torch.zeros(1)), "has an unknown extra"),
        (lambda t, m: t[next(iter(t))].fill_(torch.nan), "has NaN or inf in "),
        (lambda t, m: t.update({next(iter(t)): torch.zeros(3, 3)}), r"\[3, 3\], expected"),
    ],
)
def test_files_that_do_not_belong(
    saved: tuple[Path, nn.Module, dict[str, nn.Module]],
    tiny_vit: nn.Module,
    change: Callable[[dict[str, torch.Tensor], dict[str, str]], None],
    message: str,
) -> None:
    path, _, finetuned = saved
    rewrite(path, change)
    with pytest.raises(UserError, match=message):
        load_pareto_set(path, tiny_vit, finetuned)


def test_a_damaged_file_is_noticed(saved: tuple[Path, nn.Module, dict[str, nn.Module]], tiny_vit: nn.Module) -> None:
    path, _, finetuned = saved
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"expected .* as it was written, got another checksum"):
        load_pareto_set(path, tiny_vit, finetuned)


def test_a_header_that_claims_a_large_rank(
    saved: tuple[Path, nn.Module, dict[str, nn.Module]], tiny_vit: nn.Module
) -> None:
    path, _, finetuned = saved
    rewrite(path, lambda tensors, metadata: metadata.update(rank="100000000"))
    with pytest.raises(UserError, match=r"expected rank \d+ as its A has, got 100000000"):
        load_pareto_set(path, tiny_vit, finetuned)


def test_a_custom_choice_of_low_rank_layers_round_trips(tiny_vit: nn.Module, copies: Copies, tmp_path: Path) -> None:
    finetuned = copies(tiny_vit, 2)
    model = randomize(parametrize(tiny_vit, finetuned, rank=2, low_rank=lambda name, module: "c_fc" in name))
    save_pareto_set(model, tmp_path / "set.safetensors")
    loaded = load_pareto_set(tmp_path / "set.safetensors", tiny_vit, finetuned)
    torch.testing.assert_close(loaded(IMAGES), model(IMAGES))


def test_folded_file_is_self_sufficient(
    saved: tuple[Path, nn.Module, dict[str, nn.Module]], tiny_vit: nn.Module, tmp_path: Path
) -> None:
    _, model, _ = saved
    path = tmp_path / "folded.safetensors"
    head = torch.randn(5, 8)
    save_folded(model, path, heads={"t0": (head, 20.0)}, encoder={"architecture": "x"})
    header = read_header(path, "pareto-folded")
    assert header["encoder"] == {"architecture": "x"}
    assert header["logit_scales"] == {"t0": 20.0}
    assert torch.equal(load_file(path)["head.t0"], head)
    blank = noisy_copy(tiny_vit, 77)
    folded = load_folded(path, blank)
    for gamma in (GAMMA, [1.0, 0.0], torch.tensor([[0.2, 0.8]] * 4)):
        set_preference(folded, gamma)
        set_preference(model, gamma)
        torch.testing.assert_close(folded(IMAGES), model(IMAGES), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(pareto_merging.merge(folded, GAMMA)(IMAGES), pareto_merging.merge(model, GAMMA)(IMAGES))
    save_folded(fold(folded), tmp_path / "again.safetensors")
    with pytest.raises(UserError, match="expected a model with a module transformer"):
        load_folded(path, nn.Linear(2, 2))
    unsigned = parametrize(tiny_vit, [noisy_copy(tiny_vit, 1)], digests=False)
    with pytest.raises(ValueError, match="expected one made with digests=True"):
        save_pareto_set(unsigned, tmp_path / "no.safetensors")
    with pytest.raises(ValueError, match="got a folded one"):
        save_pareto_set(folded, tmp_path / "no.safetensors")
