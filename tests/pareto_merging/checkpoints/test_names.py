"""Names of Hugging Face's CLIP and open_clip's: what real transformers saves computes the same in real open_clip."""

from collections.abc import Collection, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from pareto_merging.checkpoints import names as naming_schemes
from pareto_merging.checkpoints.names import (
    BLOCK_NAMES,
    NAMINGS,
    Naming,
    Piece,
    Towers,
    find_towers,
    hugging_face_tensors,
    register,
    text_pieces,
    vision_pieces,
)
from pareto_merging.errors import UserError

transformers = pytest.importorskip("transformers")
open_clip = pytest.importorskip("open_clip")

hugging_face_vision = partial(hugging_face_tensors, naming_schemes.VISION)
hugging_face_text = partial(hugging_face_tensors, naming_schemes.TEXT)

VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "projection_dim": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 12,
    "patch_size": 4,
}
TEXT = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "projection_dim": 8,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "vocab_size": 50,
    "max_position_embeddings": 7,
    "bos_token_id": 48,
    "eos_token_id": 49,
}
IMAGES = torch.randn(5, 3, 12, 12, generator=torch.Generator().manual_seed(1))
TOKENS = torch.tensor([[48, 3, 49, 0, 0, 0, 0], [48, 7, 9, 11, 13, 49, 0]])


def randomized(model: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter moved: fresh biases are zero and norms one, which hides a lost or swapped one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.eval()


def hugging_face(kind: str) -> Any:
    vision = transformers.CLIPVisionConfig(**VISION, hidden_act="gelu")
    if kind != "CLIPModel":
        return randomized(getattr(transformers, kind)(vision))
    text = transformers.CLIPTextConfig(**TEXT, hidden_act="gelu")
    config = transformers.CLIPConfig(
        vision_config=vision.to_dict(), text_config=text.to_dict(), projection_dim=VISION["projection_dim"]
    )
    return randomized(transformers.CLIPModel(config))


def plain_clip() -> Any:
    vision_cfg = {"image_size": 12, "patch_size": 4, "width": 32, "layers": 2, "head_width": 8, "mlp_ratio": 1.5}
    text_cfg = {"context_length": 7, "vocab_size": 50, "width": 24, "heads": 3, "layers": 3, "mlp_ratio": 40.5 / 24}
    return open_clip.model.CLIP(8, vision_cfg, text_cfg).eval()


def saved(model: Any, folder: Path) -> dict[str, Tensor]:
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def assembled(pieces: Mapping[str, Piece], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    result = {}
    for name, piece in pieces.items():
        tensor = torch.cat([tensors[source] for source in piece.sources]) if piece.sources[1:] else None
        tensor = tensors[piece.sources[0]] if tensor is None else tensor
        result[name] = tensor.t() if piece.transpose else tensor
    return result


def all_renamed(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in tensors.items():
        yield from hugging_face_vision(name, tensor)


@pytest.mark.parametrize("kind", ["CLIPModel", "CLIPVisionModelWithProjection", "CLIPVisionModel"])
def test_what_transformers_saves_computes_the_same_in_open_clip(kind: str, tmp_path: Path) -> None:
    model = hugging_face(kind)
    tensors = saved(model, tmp_path)
    state = assembled(vision_pieces(tensors.keys()), tensors)
    tower = plain_clip().visual
    if kind == "CLIPVisionModel":
        assert "proj" not in state
        tower.proj = None
    tower.load_state_dict(state)  # strict: nothing lost, nothing invented
    with torch.no_grad():
        if kind == "CLIPVisionModel":
            expected = model(IMAGES).pooler_output
        elif kind == "CLIPVisionModelWithProjection":
            expected = model(IMAGES).image_embeds
        else:
            expected = model.get_image_features(IMAGES).pooler_output
        torch.testing.assert_close(tower(IMAGES), expected, atol=1e-5, rtol=1e-4)


def test_the_text_side_computes_the_same_in_open_clip(tmp_path: Path) -> None:
    model = hugging_face("CLIPModel")
    tensors = saved(model, tmp_path)
    whole = assembled(text_pieces(tensors.keys()), tensors)
    vision = assembled(vision_pieces(tensors.keys()), tensors)
    clip = plain_clip()
    clip.load_state_dict({**whole, **{f"visual.{name}": tensor for name, tensor in vision.items()}})
    with torch.no_grad():
        expected = model.get_text_features(TOKENS).pooler_output
        torch.testing.assert_close(clip.encode_text(TOKENS), expected, atol=1e-5, rtol=1e-4)
    assert torch.equal(clip.logit_scale, model.logit_scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_there_and_back_gives_the_same_bits(dtype: torch.dtype) -> None:
    clip = randomized(plain_clip()).to(dtype)
    state = {name: tensor for name, tensor in clip.state_dict().items() if name != "logit_scale"}
    vision = {k.removeprefix("visual."): t for k, t in state.items() if k.startswith("visual.")}
    text = {k: t for k, t in state.items() if not k.startswith("visual.")}
    text["logit_scale"] = torch.tensor([4.6], dtype=dtype)  # some models of open_clip have a dimension here
    theirs = dict(all_renamed(vision))
    theirs.update(pair for name, tensor in text.items() for pair in hugging_face_text(name, tensor))
    back = assembled(vision_pieces(theirs.keys()), theirs)
    assert back.keys() == vision.keys()
    assert all(torch.equal(back[name], vision[name]) for name in vision)
    assert theirs["logit_scale"].shape == ()
    text["logit_scale"] = text["logit_scale"][0]
    back = assembled(text_pieces(theirs.keys()), theirs)
    assert back.keys() == text.keys()
    assert all(torch.equal(back[name], text[name]) for name in text)


def test_names_are_those_that_transformers_has_parameters_for() -> None:
    model = hugging_face("CLIPModel")
    clip = plain_clip().state_dict()
    theirs = {
        name
        for ours, tensor in clip.items()
        for name, _ in (
            hugging_face_vision(ours.removeprefix("visual."), tensor)
            if ours.startswith("visual.")
            else hugging_face_text(ours, tensor)
        )
    }
    assert theirs == set(model.state_dict())


def full_names() -> set[str]:
    return set(hugging_face("CLIPModel").state_dict())


def test_old_buffers_and_the_text_side_are_passed_over() -> None:
    names = full_names()
    old = {"vision_model.embeddings.position_ids", "text_model.embeddings.position_ids"}
    assert vision_pieces(names | old) == vision_pieces(names)
    assert text_pieces(names | old) == text_pieces(names)
    assert set(vision_pieces(names)).isdisjoint({"logit_scale", "token_embedding.weight"})


def test_names_of_other_models_are_not_recognised() -> None:
    for names in (
        [],
        list(plain_clip().state_dict()),
        ["embeddings.word_embeddings.weight", "encoder.layer.0.attention.self.query.weight"],
        ["embeddings.token_embedding.weight", "encoder.layers.0.self_attn.q_proj.weight"],  # a bare text model
    ):
        assert vision_pieces(names) == {}
        assert text_pieces(names) == {}


@pytest.mark.parametrize(
    "name",
    [
        "vision_model.encoder.layers.0.self_attn.q_norm.weight",
        "vision_model.embeddings.patch_embedding.bias",
        "vision_model.head.probe",
        "vision_model.encoder.layers.00.layer_norm1.weight",
        "vision_model.encoder.layers.99999999999999999999.layer_norm1.weight",
        "vision_model.encoder.layers.٣.layer_norm1.weight",
        "vision_model.pre_layrnorm.weight\n",
        "embeddings.class_embedding",
        "classifier.weight",
        "",
    ],
)
def test_a_name_that_clip_does_not_have_is_named_on_one_line(name: str) -> None:
    with pytest.raises(UserError, match="got also") as caught:
        vision_pieces(full_names() | {name})
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 250
    shown = name.encode("ascii", "backslashreplace").decode().replace("\n", "\\n")[:80]
    assert shown in str(caught.value)


def test_an_unknown_text_name_is_named_where_the_text_is_read() -> None:
    names = full_names() | {"text_model.head.weight"}
    assert vision_pieces(names)
    with pytest.raises(UserError, match=r"text_model\.head\.weight"):
        text_pieces(names)


@pytest.mark.parametrize("side", ["vision_model", "text_model"])
@pytest.mark.parametrize("letter", "qkv")
@pytest.mark.parametrize("kind", ["weight", "bias"])
def test_a_layer_without_one_of_q_k_and_v_is_named(side: str, letter: str, kind: str) -> None:
    gone = f"{side}.encoder.layers.1.self_attn.{letter}_proj.{kind}"
    read = vision_pieces if side == "vision_model" else text_pieces
    with pytest.raises(UserError, match="expected q, k and v") as caught:
        read(full_names() - {gone})
    assert str(caught.value).endswith(f"named {gone}")


def test_many_hostile_names_are_dealt_with_at_once() -> None:
    names = {f"vision_model.encoder.layers.{i}.x{'y' * 200}" for i in range(20_000)}
    with pytest.raises(UserError, match="and 19995 more") as caught:
        vision_pieces(names)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("name", ["head.weight", "transformer.resblocks.0.ls_1.gamma", "transformer.resblocks.x.ln_1"])
def test_an_open_clip_name_that_hugging_face_lacks_is_an_error(name: str) -> None:
    for rename in (hugging_face_vision, hugging_face_text):
        with pytest.raises(UserError, match="got also"):
            list(rename(name, torch.zeros(3)))


def test_a_joined_tensor_that_is_not_three_is_an_error() -> None:
    with pytest.raises(UserError, match="q, k and v along dimension 0"):
        list(hugging_face_vision("transformer.resblocks.0.attn.in_proj_bias", torch.zeros(8)))


def test_block_names_are_open_clips() -> None:
    prefix = "transformer.resblocks.0."
    state = plain_clip().visual.state_dict()
    assert {name.removeprefix(prefix) for name in state if name.startswith(prefix)} == BLOCK_NAMES


def test_a_naming_of_ones_own() -> None:
    """Registered, it is asked first; removed, its names are unknown again."""

    def towers(present: Collection[str]) -> Towers | None:
        vision = {name.removeprefix("eyes/"): Piece((name,)) for name in present if name.startswith("eyes/")}
        return Towers(vision, {}, "eyes/") if vision else None

    naming = Naming("own", towers)
    register(naming)
    try:
        assert find_towers(["eyes/proj", "other"]).vision == {"proj": Piece(("eyes/proj",))}
    finally:
        del NAMINGS[naming.name]
    with pytest.raises(UserError, match="expected a CLIP vision transformer"):
        find_towers(["eyes/proj", "other"])
