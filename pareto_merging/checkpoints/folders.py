"""Folders whose configuration describes their weights are known by a table of layouts.

A user's own is added with :func:`register`; nothing else lists the layouts.
"""

from pathlib import Path

from pareto_merging.checkpoints import hugging_face, open_clip
from pareto_merging.checkpoints.contents import Contents, Layout
from pareto_merging.checkpoints.formats import open_tensors
from pareto_merging.checkpoints.tensors import NamedTensors, Shards
from pareto_merging.errors import UserError
from pareto_merging.system.register import add_member

LAYOUTS: dict[str, Layout] = {}
_OTHER_FOLDERS = {
    "adapter_config.json": "a LoRA adapter (merge it into its base first: PEFT's merge_and_unload)",
    "model_index.json": "a diffusers pipeline (give the folder of its image encoder)",
    "pareto_set.safetensors": "a run of ours (pareto-merging export writes a model of it)",
}


def register(layout: Layout, *, replace: bool = False) -> Layout:
    """Add a layout, asked before those that are there. Raises ValueError as :func:`.register.add_member`."""
    return add_member(LAYOUTS, "layout", layout.name, layout, replace=replace)


register(open_clip.LAYOUT)
register(hugging_face.LAYOUT)


def layout_of(path: Path) -> Layout | None:
    """Return the layout of a folder, or of the folder that describes a file. None stands for a file by itself.

    Raises UserError: a folder without a configuration that is known, or with a broken one.
    """
    is_folder = path.is_dir()
    for layout in reversed(LAYOUTS.values()):
        if layout.recognises(path) if is_folder else layout.holds(path):
            return layout
    if not is_folder:
        return None
    expected = f"{path}: expected a folder with {hugging_face.CONFIG} or {open_clip.CONFIG}"
    for name, what in _OTHER_FOLDERS.items():
        if (path / name).is_file():
            raise UserError(f"{expected}, got {what}")
    raise UserError(f"{expected}, got neither (a file of weights can be given by itself)")


def open_folder(layout: Layout, path: Path, source: str) -> Contents:
    """Open a folder, or one file of its weights, by its layout. ``source`` is what messages call it.

    Raises UserError: no weights, broken ones, or a configuration that is not a CLIP's.
    """
    folder, names = (path, layout.weights) if path.is_dir() else (path.parent, (path.name,))
    description = layout.describe(folder, source)
    present = [folder / name for name in names if (folder / name).is_file()]
    if not present:
        raise UserError(f"{source}: expected weights ({', '.join(layout.weights)}), got none")
    is_index = present[0].name.endswith(".index.json")
    tensors: NamedTensors = Shards(present[0], open_tensors) if is_index else open_tensors(present[0])
    beside = [folder / name for known in LAYOUTS.values() for name in known.configurations]
    return Contents(layout.name, folder, tensors, description, [path for path in beside if path.is_file()])
