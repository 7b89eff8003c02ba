"""Names of a CLIP's tensors, by a table of naming schemes. No file is opened here.

Hugging Face's are known in both directions: in_proj is its q_proj, k_proj and v_proj joined along dimension 0, and what
projects to the common space is transposed.
"""

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import NamedTuple

from torch import Tensor

from pareto_merging.errors import UserError
from pareto_merging.system.register import add_member


class Piece(NamedTuple):
    """How one open_clip tensor is made of a file's tensors.

    Attributes:
        sources: the names in the file; several (q, k, v) are joined along dimension 0, in this order.
        transpose: the (single) source is a matrix that is transposed.
    """

    sources: tuple[str, ...]
    transpose: bool = False


class Towers(NamedTuple):
    """The two towers of a CLIP in open_clip's names, as pieces of a file's tensors.

    Attributes:
        vision: without ``visual.``. text: empty where there is no whole text tower as CLIP's. prefix: what stands
            before the vision tower's names in the file.
    """

    vision: dict[str, Piece]
    text: dict[str, Piece]
    prefix: str


class Naming(NamedTuple):
    """One naming scheme. ``towers`` makes towers of a file's names, or None if they are others'."""

    name: str
    towers: Callable[[Collection[str]], Towers | None]


_KINDS = ("weight", "bias")


def _both(layers: Mapping[str, str]) -> dict[str, str]:
    return {f"{ours}.{kind}": f"{theirs}.{kind}" for ours, theirs in layers.items() for kind in _KINDS}


_NORMS = {"ln_1": "layer_norm1", "ln_2": "layer_norm2"}
_BLOCK = _both({**_NORMS, "attn.out_proj": "self_attn.out_proj", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"})
_JOINED = {f"attn.in_proj_{kind}": tuple(f"self_attn.{letter}_proj.{kind}" for letter in "qkv") for kind in _KINDS}
# what one transformer block holds, in open_clip's names
BLOCK_NAMES = frozenset({*_BLOCK, *_JOINED})


class Side(NamedTuple):
    """One side of a CLIP. Maps open_clip's names to Hugging Face's, behind ``prefix`` (``top``) or outside of it."""

    prefix: str
    top: dict[str, str]
    outside: dict[str, str]


VISION = Side(
    "vision_model.",
    {
        "class_embedding": "embeddings.class_embedding",
        "positional_embedding": "embeddings.position_embedding.weight",
        "conv1.weight": "embeddings.patch_embedding.weight",
        **_both({"ln_pre": "pre_layrnorm", "ln_post": "post_layernorm"}),
    },
    {"proj": "visual_projection.weight"},
)
TEXT = Side(
    "text_model.",
    {
        "token_embedding.weight": "embeddings.token_embedding.weight",
        "positional_embedding": "embeddings.position_embedding.weight",
        **_both({"ln_final": "final_layer_norm"}),
    },
    {"text_projection": "text_projection.weight", "logit_scale": "logit_scale"},
)
# versions of transformers before 4.31 saved it
_BUFFER = "embeddings.position_ids"

_TOP_NAMES = frozenset({*VISION.top, "proj"})
_OPEN_CLIP_TEXT = ("token_embedding.weight", "positional_embedding", "ln_final.weight", "text_projection")
_NO_WEIGHTS = ("attn_mask", "input_resolution", "context_length", "vocab_size")

# at most four digits: a name from a file must not make anything large, here or later
_OPEN_CLIP_BLOCK = re.compile(r"transformer\.resblocks\.(0|[1-9][0-9]{0,3})\.(.+)", re.DOTALL)
_HUGGING_FACE_BLOCK = re.compile(r"encoder\.layers\.(0|[1-9][0-9]{0,3})\.(.+)", re.DOTALL)


def block_and_rest(name: str) -> tuple[int, str] | None:
    """Split ``transformer.resblocks.7.ln_1.bias`` into (7, ``ln_1.bias``). None stands for every other name."""
    match = _OPEN_CLIP_BLOCK.fullmatch(name)
    return (int(match[1]), match[2]) if match else None


def listed(names: Iterable[str]) -> str:
    """Return the first five names on one line, and how many more there are. Names may hold anything."""
    ordered = sorted(names)
    shown = ", ".join((ascii(name)[1:-1] if name else "''")[:80] for name in ordered[:5])
    return shown + (f" and {len(ordered) - 5} more" if len(ordered) > 5 else "")


def vision_pieces(names: Collection[str]) -> dict[str, Piece]:
    """Return open_clip's vision names -> pieces of a Hugging Face CLIP's tensors.

    Args:
        names: all names in the file(s): a CLIPModel, a CLIPVisionModelWithProjection, or a CLIPVisionModel with or
            without ``vision_model.`` (transformers 4 and 5). Names of the text side are passed over.

    Returns:
        A piece for every vision tensor that is there (whether all are, the shapes tell). Empty if the names are not
        those of a Hugging Face vision model.

    Raises:
        UserError: a name that CLIP does not have, or a layer without one of q, k and v.
    """
    prefix = VISION.prefix if any(name.startswith(VISION.prefix) for name in names) else ""
    # without a prefix, encoder.layers alone could be a text model's
    own = {VISION.top[name] for name in ("class_embedding", "conv1.weight", "ln_pre.weight", "ln_pre.bias")}
    if not prefix and own.isdisjoint(names):
        return {}
    pieces, unknown = _pieces(names, prefix, VISION.top)
    unknown -= {*VISION.outside.values(), *TEXT.outside.values()}
    unknown = {name for name in unknown if not name.startswith(TEXT.prefix)}
    if unknown:
        raise UserError(f"checkpoint: expected the tensors of Hugging Face's CLIP, got also {listed(unknown)}")
    return pieces | _outside_pieces(names, VISION)


def text_pieces(names: Collection[str]) -> dict[str, Piece]:
    """Return the text side of a Hugging Face CLIP, as :func:`vision_pieces`. It is empty where there is none.

    ``text_projection`` and ``logit_scale`` are there where the file has them.
    """
    own = [name for name in names if name.startswith(TEXT.prefix)]
    if not own:
        return {}
    pieces, unknown = _pieces(own, TEXT.prefix, TEXT.top)
    if unknown:
        raise UserError(f"checkpoint: expected the text tensors of Hugging Face's CLIP, got also {listed(unknown)}")
    return pieces | _outside_pieces(names, TEXT)


def _outside_pieces(names: Collection[str], side: Side) -> dict[str, Piece]:
    present = [(ours, theirs) for ours, theirs in side.outside.items() if theirs in names]
    return {ours: Piece((theirs,), transpose=ours != "logit_scale") for ours, theirs in present}


def _pieces(names: Collection[str], prefix: str, top: Mapping[str, str]) -> tuple[dict[str, Piece], set[str]]:
    """Return the pieces behind ``prefix``, and the names that are none."""
    top_of = {f"{prefix}{theirs}": ours for ours, theirs in top.items()}
    block_of = {theirs: ours for ours, theirs in _BLOCK.items()}
    joined_of = {theirs: ours for ours, parts in _JOINED.items() for theirs in parts}
    pieces: dict[str, Piece] = {}
    unknown: set[str] = set()
    for name in names:
        if name == f"{prefix}{_BUFFER}":
            continue
        match = _HUGGING_FACE_BLOCK.fullmatch(name.removeprefix(prefix)) if name.startswith(prefix) else None
        if name in top_of:
            pieces[top_of[name]] = Piece((name,))
        elif match and match[2] in block_of:
            pieces[f"transformer.resblocks.{match[1]}.{block_of[match[2]]}"] = Piece((name,))
        elif match and match[2] in joined_of:
            joined = joined_of[match[2]]
            sources = tuple(f"{prefix}encoder.layers.{match[1]}.{part}" for part in _JOINED[joined])
            pieces[f"transformer.resblocks.{match[1]}.{joined}"] = Piece(sources)
        else:
            unknown.add(name)
    present = set(names)
    missing = [source for piece in pieces.values() for source in piece.sources if source not in present]
    if missing:
        raise UserError(f"checkpoint: expected q, k and v of every layer, got none named {listed(missing)}")
    return pieces, unknown


def hugging_face_tensors(side: Side, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield one tensor of a side, named as open_clip does without ``visual.``, as Hugging Face's. All are views.

    ``attn.in_proj_*`` ([3·width, …]) becomes three; a projection [width, dim] becomes [dim, width]; ``logit_scale`` has
    no dimension there (some of open_clip's have one). Raises UserError for a name that a plain CLIP does not have.
    """
    block = block_and_rest(name)
    if name in side.outside:
        yield side.outside[name], tensor.reshape(()) if name == "logit_scale" else tensor.t()
    elif name in side.top:
        yield f"{side.prefix}{side.top[name]}", tensor
    elif block and block[1] in _BLOCK:
        yield f"{side.prefix}encoder.layers.{block[0]}.{_BLOCK[block[1]]}", tensor
    elif block and block[1] in _JOINED:
        if tensor.dim() == 0 or tensor.shape[0] % 3:
            raise UserError(f"{listed([name])}: expected q, k and v along dimension 0, got {list(tensor.shape)}")
        for part, theirs in zip(tensor.chunk(3), _JOINED[block[1]], strict=True):
            yield f"{side.prefix}encoder.layers.{block[0]}.{theirs}", part
    else:
        raise UserError(f"checkpoint: expected the tensors of a plain CLIP, got also {listed([name])}")


def is_plain_vision(names: Collection[str]) -> bool:
    """Return whether these are open_clip's names of a plain vision transformer, whatever their shapes."""
    blocks = [block_and_rest(name) for name in names if name not in _TOP_NAMES]
    return all(block is not None and block[1] in BLOCK_NAMES for block in blocks) and {"proj", *names} >= _TOP_NAMES


def _open_clip_towers(names: Collection[str]) -> Towers | None:
    """Find open_clip's towers, or OpenAI's, behind any prefix. Two tensors tell a vision tower."""
    mark, other = "class_embedding", "conv1.weight"
    ends = [name.removesuffix(mark) for name in names if name == mark or name.endswith(f".{mark}")]
    present = set(names)
    prefixes = [prefix for prefix in ends if f"{prefix}{other}" in present]
    if len(prefixes) > 1:
        raise UserError(f"expected one vision transformer, got {len(prefixes)}: {listed(prefixes)}")
    if not prefixes:
        return None
    prefix = prefixes[0]
    vision = {name.removeprefix(prefix): Piece((name,)) for name in names if name.startswith(prefix)}
    return Towers(vision, _open_clip_text(names, prefix), prefix)


def _open_clip_text(names: Collection[str], vision_prefix: str) -> dict[str, Piece]:
    """Find the text tower beside the vision tower. It is empty if it is not whole, as in the task-vectors release."""
    if not f".{vision_prefix}".endswith(".visual."):
        return {}
    outer = vision_prefix.removesuffix("visual.")
    text: dict[str, Piece] = {}
    for name in names:
        if not name.startswith(outer) or name.startswith(vision_prefix):
            continue
        # open_clip's CustomTextCLIP has one more level
        inner = name.removeprefix(outer).removeprefix("text.")
        if inner in (*_OPEN_CLIP_TEXT, "ln_final.bias", "logit_scale") or inner.startswith("transformer.resblocks."):
            text[inner] = Piece((name,))
        elif inner not in _NO_WEIGHTS:
            # a text tower of another kind
            return {}
    whole = all(name in text for name in _OPEN_CLIP_TEXT) and any(name.startswith("transformer.") for name in text)
    return text if whole else {}


def _hugging_face_towers(names: Collection[str]) -> Towers | None:
    # what programs put before Hugging Face's names
    for prefix in ("", "module.", "model."):
        inner = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
        vision = vision_pieces(inner)
        if vision:
            return Towers(_behind(vision, prefix), _behind(text_pieces(inner), prefix), prefix)
    return None


def _behind(pieces: Mapping[str, Piece], prefix: str) -> dict[str, Piece]:
    sources = {name: tuple(f"{prefix}{source}" for source in piece.sources) for name, piece in pieces.items()}
    return {name: Piece(sources[name], piece.transpose) for name, piece in pieces.items()}


NAMINGS: dict[str, Naming] = {}


def register(naming: Naming, *, replace: bool = False) -> Naming:
    """Add a scheme, asked before those that are there. Raises ValueError as :func:`.register.add_member`."""
    return add_member(NAMINGS, "naming", naming.name, naming, replace=replace)


register(Naming("huggingface", _hugging_face_towers))
register(Naming("open_clip", _open_clip_towers))


def find_towers(names: Collection[str]) -> Towers:
    """Return the towers that the first naming scheme to know these names finds. UserError: none does, or not whole."""
    for naming in reversed(NAMINGS.values()):
        towers = naming.towers(names)
        if towers is not None:
            return towers
    expected = "a CLIP vision transformer (class_embedding, conv1.weight, transformer.resblocks…; or vision_model…)"
    raise UserError(f"expected {expected}, got {listed(names)}")
