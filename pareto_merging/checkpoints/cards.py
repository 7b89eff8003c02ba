"""Model cards for the Hugging Face Hub, with code that loads the model."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import yaml

from pareto_merging.checkpoints import architecture as shapes
from pareto_merging.checkpoints import encoders

Library = Literal["transformers", "open_clip", "safetensors"]
_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,95}/[A-Za-z0-9_][A-Za-z0-9_.-]{0,95}")


@dataclass(frozen=True)
class Source:
    """One checkpoint that was merged.

    Attributes:
        name: for people. origin: a path or a Hub id. digest: of its weights, hexadecimal. hub_id: ``owner/name``.
    """

    name: str
    origin: str = ""
    digest: str = ""
    hub_id: str = ""


def model_card(
    library: Library,
    *,
    encoder: Mapping[str, Any],
    has_text: bool,
    title: str = "Merged CLIP",
    preference: Mapping[str, float] | None = None,
    method: str = "",
    rank: int | None = None,
    lambda_grouping: str = "",
    sources: Sequence[Source] = (),
    version: str = "",
    preprocessing: Mapping[str, Any] | None = None,
    file_name: str = "",
) -> str:
    """Return a README.md for the Hub. It says what a model is, what it was made of and how it is loaded.

    Args:
        library: what loads it; ``safetensors``: one file of the vision tower, called ``file_name``, whose images are
            made as ``preprocessing`` says.
        encoder: as :mod:`.checkpoints.encoders` describes it. has_text: it is a whole CLIP.
        preference: task -> weight. method: how it was merged, in words. rank: of the low-rank part.
        lambda_grouping: for what there is a learned λ each (tensor, block, …). version: of this package.

    Names may hold anything: they are escaped.
    """
    what = "A CLIP whose vision encoder was" if has_text else "The vision encoder of a CLIP,"
    made_by = "[Pareto Merging](https://arxiv.org/abs/2408.12105)"
    base_models = [source.hub_id for source in sources if _HUB_ID.fullmatch(source.hub_id)]
    front = {
        "library_name": "open_clip" if library == "safetensors" else library,
        "pipeline_tag": "zero-shot-image-classification" if has_text else "image-feature-extraction",
        "tags": ["merge", "pareto-merging", "clip"],
        **({"base_model": list(dict.fromkeys(base_models)), "base_model_relation": "merge"} if base_models else {}),
    }
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=False)}---\n",
        f"# {_escaped(title)}\n",
        f"{what} merged from fine-tuned copies for one preference over their tasks, with {made_by}.\n",
    ]
    if preference:
        rows = [f"| {_escaped(task)} | {weight:.6g} |" for task, weight in preference.items()]
        parts.append("\n".join(["## Preference\n", "| task | weight |", "|---|---:|", *rows]) + "\n")
    facts = [f"Method: {_escaped(method)}."] if method else []
    facts += [f"λ learned for each {_escaped(lambda_grouping)}."] if lambda_grouping else []
    facts += [f"Low-rank part of rank {rank}."] if rank is not None else []
    facts += [f"Written by pareto-merging {_escaped(version)}."] if version else []
    if facts:
        parts.append("## How it was merged\n\n" + " ".join(facts) + "\n")
    if sources:
        rows = [f"| {_escaped(s.name)} | {_escaped(s.origin or s.hub_id)} | {_escaped(s.digest)} |" for s in sources]
        header = ["## Source checkpoints\n", "| | from | digest of the weights |", "|---|---|---|"]
        parts.append("\n".join([*header, *rows]) + "\n")
    if library == "safetensors":
        code = _code_for_one_file(encoder, preprocessing or encoders.default_preprocessing(encoder), file_name)
    else:
        code = (_code_for_transformers if library == "transformers" else _code_for_open_clip)(encoder, has_text)
    parts.append(f"## Loading it\n\n```python\n{code}```\n")
    parts.append("## Licence\n\nThat of the checkpoints it was merged from: see theirs.\n")
    return "\n".join(parts)


def _code_for_one_file(encoder: Mapping[str, Any], preprocessing: Mapping[str, Any], file_name: str) -> str:
    ours, build = "from pareto_merging import encoders\n", f"encoders.build({dict(encoder)!r})"
    if "architecture" in encoder:
        ours, quick_gelu = "", shapes.from_description(encoder).quick_gelu
        build = f"open_clip.create_model({str(encoder['architecture'])!r}, force_quick_gelu={quick_gelu}).visual"
    size, mean, std = (preprocessing[key] for key in ("size", "mean", "std"))
    return f"""\
import open_clip
{ours}from PIL import Image
from safetensors.torch import load_file

encoder = {build}
encoder.load_state_dict(load_file({file_name!r}))
preprocess = open_clip.image_transform(
    {size}, is_train=False, mean={tuple(mean)}, std={tuple(std)}
)
features = encoder.eval()(preprocess(Image.open("photo.jpg"))[None])
"""


def _code_for_transformers(encoder: Mapping[str, Any], has_text: bool) -> str:
    if has_text:
        # get_image_features returns one thing in transformers 4 and another in 5
        kind, features = "CLIPModel", "model.visual_projection(model.vision_model(**inputs).pooler_output)"
    elif shapes.from_description(encoder).output_dim is None:
        kind, features = "CLIPVisionModel", "model(**inputs).pooler_output"
    else:
        kind, features = "CLIPVisionModelWithProjection", "model(**inputs).image_embeds"
    return f"""\
from PIL import Image
from transformers import CLIPImageProcessor, {kind}

folder = "."  # where this file is, or its name on the Hub
model = {kind}.from_pretrained(folder)
processor = CLIPImageProcessor.from_pretrained(folder)
inputs = processor(images=Image.open("photo.jpg"), return_tensors="pt")
features = {features}
"""


_OPEN_CLIP = """\
import open_clip
from PIL import Image

folder = "."  # where this file is
{load}
features = model.eval().encode_image(preprocess(Image.open("photo.jpg"))[None])
"""
_WHOLE = 'model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")'
_TOWER = """\
# every model of open_clip has a text tower: this one is small and random, and no part of what was merged
model, _, preprocess = open_clip.create_model_and_transforms(
    f"local-dir:{folder}", load_weights=False, pretrained_image_path=f"{folder}/visual.safetensors"
)"""
_INSIDE = """
# or inside a whole CLIP of the same kind, whose text tower it then has: give its tag or file
model = open_clip.create_model(
    {name!r},
    pretrained="openai",
    force_quick_gelu={quick_gelu},
    pretrained_image_path=f"{{folder}}/visual.safetensors",
)
"""


def _code_for_open_clip(encoder: Mapping[str, Any], has_text: bool) -> str:
    code = _OPEN_CLIP.format(load=_WHOLE if has_text else _TOWER)
    if has_text or "architecture" not in encoder:
        return code
    quick_gelu = shapes.from_description(encoder).quick_gelu
    return code + _INSIDE.format(name=str(encoder["architecture"]), quick_gelu=quick_gelu)


def _escaped(value: str) -> str:
    """Text that Markdown shows as it is, on one line and inside a table."""
    visible = "".join(letter if letter.isprintable() else " " for letter in value[:500])
    return re.sub(r"([\\`*_{}\[\]()<>#+!|~$&:])", r"\\\1", " ".join(visible.split()))
