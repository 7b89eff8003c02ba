"""Public checkpoints of CLIP vision transformers, read safely, tensor by tensor, in open_clip's names.

==============================  =======================================================================================
a file                          safetensors; what ``torch.save`` wrote (zip or legacy): a state dict, a training
                                checkpoint or a whole module, as in the task-vectors release; a TorchScript archive
a folder                        Hugging Face's (config.json), sharded or not, or open_clip's (open_clip_config.json)
``owner/name[@revision]``       either of them on the Hugging Face Hub, or in its cache
``open_clip:NAME/TAG``          one of open_clip's pretrained models
==============================  =======================================================================================

Names may be open_clip's or Hugging Face's, with the prefixes that programs put in front; a file is known by its
content, not by its name. :mod:`.formats`, :mod:`.folders` and :mod:`.names` have the tables of what is known, each with
``register``. No file can run code, and none is believed before its sizes have been compared.
"""

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pareto_merging.checkpoints import hub
from pareto_merging.checkpoints.architecture import Architecture, description_of, from_shapes
from pareto_merging.checkpoints.contents import WEIGHT_DTYPES, Contents, Description, check_preprocessing
from pareto_merging.checkpoints.folders import layout_of, open_folder
from pareto_merging.checkpoints.formats import open_file
from pareto_merging.checkpoints.modules import attention_heads, normalisation, uses_quick_gelu
from pareto_merging.checkpoints.names import Piece, Towers, find_towers, is_plain_vision, listed
from pareto_merging.checkpoints.open_clip import preprocessing_from_open_clip, text_is_not_clips
from pareto_merging.checkpoints.tensors import NamedTensors, TensorMapping
from pareto_merging.errors import UserError


class CheckpointTensors(TensorMapping):
    """Named tensors, each read from its file when asked for, and not kept.

    Attributes:
        source: what they were opened by. shapes, dtypes: by name, known without reading.
    """

    def __init__(self, source: str, tensors: NamedTensors, pieces: Mapping[str, Piece]) -> None:
        self.source = source
        self._tensors, self._pieces = tensors, dict(pieces)
        self.shapes = {name: self._shape(name) for name in self._pieces}
        self.dtypes = {name: tensors.dtypes[piece.sources[0]] for name, piece in self._pieces.items()}
        others = [
            f"{name} {tensors.dtypes[part]}"
            for name, piece in self._pieces.items()
            for part in piece.sources
            if tensors.dtypes[part] not in WEIGHT_DTYPES or tensors.dtypes[part] != self.dtypes[name]
        ]
        if others:
            raise UserError(f"{source}: expected floating-point tensors, got {listed(others)}")

    def _shape(self, name: str) -> list[int]:
        piece = self._pieces[name]
        shapes = [list(self._tensors.shapes[part]) for part in piece.sources]
        if len(shapes) > 1 and any(not shape or shape[1:] != shapes[0][1:] for shape in shapes):
            raise UserError(f"{self.source}: expected tensors that can be joined to {name}, got shapes {shapes}")
        if piece.transpose and len(shapes[0]) != 2:
            raise UserError(f"{self.source}: expected a matrix for {name}, got shape {shapes[0]}")
        if piece.transpose:
            return shapes[0][::-1]
        return [sum(shape[0] for shape in shapes), *shapes[0][1:]] if len(shapes) > 1 else shapes[0]

    def read(self, name: str) -> Tensor:
        """Read one tensor. Raises UserError: it cannot be read, or holds NaN or inf; KeyError: no such name."""
        piece = self._pieces[name]
        if len(piece.sources) == 1:
            tensor = self._tensors.read(piece.sources[0])
            tensor = tensor.t().contiguous() if piece.transpose else tensor
        else:
            tensor = torch.empty(self.shapes[name], dtype=self.dtypes[name])
            row = 0
            for part in piece.sources:
                rows = self._tensors.shapes[part][0]
                tensor[row : row + rows] = self._tensors.read(part)
                row += rows
        # no copy of the tensor, and a NaN comes through
        if tensor.numel() and not bool(torch.isfinite(torch.stack(torch.aminmax(tensor))).all()):
            raise UserError(f"{self.source}: expected finite numbers, got NaN or inf in {name}")
        return tensor


class Checkpoint(CheckpointTensors):
    """The vision encoder of a checkpoint, in the names of open_clip's ``visual`` tower.

    Attributes:
        format: what it was: safetensors, zip, legacy, torchscript, huggingface or open_clip.
        encoder: how to build the module (:func:`.encoders.build`); None where only ``names`` told what it
            is. ``quick_gelu`` in it is None where the checkpoint does not say.
        quick_gelu, heads: its activation and its attention heads; None where the checkpoint does not say.
        preprocessing: ``size``, ``mean`` and ``std`` of its images, or None.
        text: the rest of a whole CLIP in open_clip's names, empty where it has no text tower, or one that is not as
            CLIP's: then ``no_text`` says why.
        text_heads: attention heads of that, where a configuration says.
        path: the file or folder it was found in. weights: the files with its tensors. files: these and what else was
            read. origin: what a converted file says it was made from.
    """

    def __init__(self, source: str, contents: Contents, names: Collection[str] = ()) -> None:
        tensors, description = contents.tensors, contents.description
        own = {name: Piece((name,)) for name in tensors.shapes}
        towers = Towers(own, {}, "") if names and own.keys() == set(names) else find_towers(own)
        super().__init__(source, tensors, towers.vision)
        text = CheckpointTensors(source, tensors, towers.text)
        self.no_text = description.no_text if text else ""
        # it would be exported as what it is not
        self.text = CheckpointTensors(source, tensors, {}) if self.no_text else text
        self.format, self.path, self.text_heads = contents.kind, contents.path, description.text_heads
        self.weights, self.origin = list(tensors.files), dict(description.origin)
        self.files = [*self.weights, *contents.beside]
        self.architecture: Architecture | None = None
        self.encoder: dict[str, Any] | None = None
        root, self.quick_gelu, self.heads = description.root, description.quick_gelu, description.heads
        if self.quick_gelu is None:
            self.quick_gelu = uses_quick_gelu(root, towers.prefix, source)
        if self.heads is None:
            self.heads = attention_heads(root, towers.prefix, source)
        preprocessing = normalisation(root) if description.preprocessing is None else description.preprocessing
        self.preprocessing = None if preprocessing is None else check_preprocessing(preprocessing)
        nothing = Description(origin=description.origin, root=root, kind=description.kind)
        if names and (description == nothing or not is_plain_vision(towers.vision)):
            # its user describes it, and it may be an encoder of another kind
            return
        architecture = from_shapes(self.shapes, heads=self.heads, quick_gelu=self.quick_gelu)
        if description.check is not None:
            description.check(architecture)
        self.architecture = architecture
        self.encoder = {**description_of(architecture), "quick_gelu": self.quick_gelu}
        size, own_size = architecture.image_size, (self.preprocessing or {}).get("size", architecture.image_size)
        if size != own_size:
            raise UserError(f"{source}: expected images of {size} pixels as its positions have, got {own_size}")


def open_checkpoint(source: str | Path, names: Collection[str] = ()) -> Checkpoint:
    """Open a checkpoint by path, hub id or open_clip tag. Only headers, configurations and pickles are read.

    Args:
        names: of the tensors of an encoder that is no plain CLIP: a file with just these is taken as it is.

    Raises:
        UserError: nothing there; broken, hostile or contradictory; not a CLIP vision transformer. One line each.
        ForbiddenGlobal: a pickle that names what could run code.
    """
    text = str(source)
    try:
        path, settings = hub.locate(source)
        layout = layout_of(path)
        contents = open_file(path, text) if layout is None else open_folder(layout, path, text)
        if settings is None:
            return Checkpoint(text, contents, names)
        described = contents.description
        # open_clip's word comes after a configuration's, and before what the names of pickled modules tell
        quick_gelu = described.quick_gelu if described.root is None else None
        description = replace(
            described,
            heads=settings.heads if described.heads is None else described.heads,
            quick_gelu=settings.quick_gelu if quick_gelu is None else quick_gelu,
            no_text=described.no_text or text_is_not_clips(settings.text_cfg),
        )
        checkpoint = Checkpoint(text, contents._replace(description=description), names)
        if settings.preprocess_cfg and checkpoint.architecture is not None:
            size = checkpoint.architecture.image_size
            checkpoint.preprocessing = preprocessing_from_open_clip(settings.preprocess_cfg, size, text)
        return checkpoint
    except UserError as error:
        if str(error).startswith(text):
            raise
        raise UserError(f"{text}: {error}") from error
