"""Pareto set files and folded files: what is in them, round trips, and files that do not belong."""

import copy
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
from pareto_merging.model.base import base_tensors, set_base
from pareto_merging.model.files import (
    SET_FORMAT,
    load_folded,
    load_pareto_set,
    read_header,
    save_folded,
    save_pareto_set,
)
from pareto_merging.model.fold import fold
from pareto_merging.model.learned import get_lambda
from pareto_merging.model.parametrize import parametrize
from pareto_merging.model.state import pareto_state, set_preference

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


def written(model: nn.Module, path: Path) -> int:
    save_pareto_set(model, path)
    return read_header(path, SET_FORMAT)["format_version"]


def test_the_oldest_version_that_has_what_a_model_uses(tiny_vit: nn.Module, copies: Copies, tmp_path: Path) -> None:
    finetuned, path = copies(tiny_vit, 2), tmp_path / "set.safetensors"
    for version, how in (
        (1, {}),
        (1, {"constant_rank": 0}),
        (2, {"preprocess": "ties"}),
        (2, {"core": "outer-product"}),
        (3, {"constant_rank": 2}),
        (3, {"constant_rank": 2, "core": "outer-vector", "preprocess": "ties"}),
    ):
        model = randomize(parametrize(tiny_vit, finetuned, rank=2, **how))
        assert written(model, path) == version, how
        header = read_header(path, SET_FORMAT)
        # a reader of before would not know the key
        assert ("constant_rank" in header) == (version == 3) and "start" not in header
        again = load_pareto_set(path, tiny_vit, finetuned)
        for gamma in (GAMMA, [1.0, 0.0]):
            for one in (model, again):
                set_preference(one, gamma)
            assert torch.equal(model(IMAGES), again(IMAGES)), how
        folded = tmp_path / "folded.safetensors"
        save_folded(model, folded)
        assert read_header(folded, "pareto-folded")["format_version"] == (2 if "core" in how else 1)
        assert not any("_c" in key.rpartition(".")[2] for key in load_file(folded))
        loaded = load_folded(folded, noisy_copy(tiny_vit, 77))
        set_preference(loaded, [1.0, 0.0])
        torch.testing.assert_close(loaded(IMAGES), model(IMAGES), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_another_base_goes_with_the_file(
    tiny_vit: nn.Module, copies: Copies, tmp_path: Path, dtype: torch.dtype
) -> None:
    net, path = tiny_vit.to(dtype), tmp_path / "set.safetensors"
    finetuned, images = copies(net, 2), IMAGES.to(dtype)
    model = parametrize(net, finetuned, rank=2, constant_rank=2)
    set_base(model, dict(noisy_copy(net, 9).named_parameters()), "regmean")
    randomize(model)
    assert written(model, path) == 3
    header = read_header(path, SET_FORMAT)
    assert header["start"] == "regmean" and header["base_digest"] == pareto_state(model).base_digest
    names = {name for name in load_file(path) if name.startswith("base.")}
    assert names == {f"base.{name}" for name, _ in net.named_parameters()}
    for source in (finetuned, list(finetuned.values()), {k: m.state_dict() for k, m in finetuned.items()}):
        again = load_pareto_set(path, net, source)
        state = pareto_state(again)
        assert (state.start, state.base_digest) == ("regmean", header["base_digest"])
        assert torch.equal(get_lambda(again), get_lambda(model))
        set_preference(again, GAMMA)
        set_preference(model, GAMMA)
        assert torch.equal(again(images), model(images))
    save_pareto_set(again, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()
    # a wider module holds the same numbers; a narrower one does not
    wide = load_pareto_set(
        path, copy.deepcopy(net).float(), {k: copy.deepcopy(m).float() for k, m in finetuned.items()}
    )
    assert torch.equal(base_tensors(wide)["proj"], base_tensors(model)["proj"].float())
    if dtype == torch.float32:
        half = copy.deepcopy(net).half()
        before = {name: value.clone() for name, value in half.state_dict().items()}
        for own in (True, False):
            with pytest.raises(UserError, match=r"expected a base of digest \w{12}…, got one in another precision or"):
                load_pareto_set(path, remembered(half, net), finetuned, copy=own)
            # the caller's own is as it was
            assert all(torch.equal(value, before[name]) for name, value in half.state_dict().items())


def remembered(half: nn.Module, net: nn.Module) -> nn.Module:
    """A module in 16 bits that says what it was made of."""
    pareto_merging.remember_stored(half, net.state_dict())
    return half


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, m: m.update(constant_rank="-1"), "expected a constant_rank of at least 0 in the header, got -1"),
        (lambda t, m: m.update(constant_rank="true"), "expected a constant_rank of at least 0 in the header, got True"),
        (lambda t, m: m.update(constant_rank='"2"'), "expected a constant_rank of at least 0 in the header, got 2"),
        (lambda t, m: m.update(constant_rank="1"), r"does not fit the model: has A_c"),
        (lambda t, m: m.update(constant_rank="0"), "does not fit the model: has an unknown A_c"),
        (lambda t, m: m.update(constant_rank="99999999999"), "does not fit the model: has A_c"),
        (lambda t, m: m.pop("constant_rank"), "does not fit the model: has an unknown A_c"),
        (lambda t, m: t.pop("base.proj"), "expected a base with every parameter, got none named proj"),
        (lambda t, m: t["base.proj"].fill_(torch.nan), "finite numbers in proj"),
        (lambda t, m: t.update({"base.proj": torch.zeros(3)}), r"expected a parameter of shape .*, got proj \[3\]"),
        (lambda t, m: t.update({"base.extra": torch.zeros(3)}), "expected a parameter of the model, got extra"),
        (lambda t, m: t["base.proj"].add_(1), "expected a base of digest"),
        (lambda t, m: m.update(base_digest="5"), "expected a base of digest 5…, got"),
        (lambda t, m: m.update(base_digest="[1]"), "expected a base of digest"),
        (lambda t, m: m.pop("base_digest"), "expected a base of digest"),
        (lambda t, m: m.pop("start"), "expected no tensors of a base for start 'pretrained', got "),
        (lambda t, m: m.update(start="pretrained"), "expected no tensors of a base for start 'pretrained', got "),
        (lambda t, m: [t.pop(n) for n in list(t) if n.startswith("base.")], "expected a base with every parameter"),
    ],
)
def test_hostile_bases_and_constant_ranks(
    tiny_vit: nn.Module,
    copies: Copies,
    tmp_path: Path,
    change: Callable[[dict[str, torch.Tensor], dict[str, str]], None],
    message: str,
) -> None:
    path, finetuned = tmp_path / "set.safetensors", copies(tiny_vit, 2)
    model = parametrize(tiny_vit, finetuned, rank=2, constant_rank=2)
    set_base(model, {}, "regmean")
    save_pareto_set(model, path)
    rewrite(path, change)
    plain = copy.deepcopy(tiny_vit)
    with pytest.raises(UserError, match=message):
        load_pareto_set(path, plain, finetuned, copy=False)
