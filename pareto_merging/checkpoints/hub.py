"""Where a checkpoint is: a path, a Hugging Face Hub id, or an open_clip model by name and pretrained tag.

Downloads are huggingface_hub's and open_clip's own, into their caches; HF_HUB_OFFLINE is respected.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pareto_merging.errors import UserError

# in the order in which transformers looks for them
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
OPEN_CLIP_WEIGHTS = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pt",
)
CONFIG, OPEN_CLIP_CONFIG = "config.json", "open_clip_config.json"
# the second is all that transformers 5 writes for a whole CLIP
PREPROCESSORS = ("preprocessor_config.json", "processor_config.json")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}(@[\w./-]{1,100})?", re.ASCII)
_FILE_SUFFIXES = (".pt", ".pth", ".bin", ".safetensors", ".ckpt", ".json", ".pkl", ".yaml", ".yml")
_OPEN_CLIP = "open_clip:"


@dataclass(frozen=True)
class Located:
    """A checkpoint on this machine.

    Attributes:
        path: a file or folder. settings: what open_clip says of a pretrained tag: ``quick_gelu``, ``heads``, ``mean``,
            ``std``; empty otherwise.
    """

    path: Path
    settings: dict[str, Any] = field(default_factory=dict)


def is_remote(source: str | Path) -> bool:
    """Whether ``source`` is a hub id or an open_clip tag, rather than a path: it looks like one, and is no path."""
    text = str(source)
    if text.startswith(_OPEN_CLIP):
        return True
    return bool(_HUB_ID.fullmatch(text)) and not text.endswith(_FILE_SUFFIXES) and not Path(source).exists()


def locate(source: str | Path) -> Located:
    """The checkpoint's place on this machine, downloaded first where it has to be.

    Args:
        source: a file, a folder, ``owner/name`` or ``owner/name@revision`` on the Hugging Face Hub, or
            ``open_clip:NAME/TAG``.

    Raises:
        UserError: nothing there, or it cannot be had (offline, private, unknown).
    """
    text = str(source)
    if not text.startswith(_OPEN_CLIP) and Path(source).exists():
        return Located(Path(source))
    if text.startswith(_OPEN_CLIP):
        return _open_clip(text)
    if is_remote(source):
        return Located(_hub(text))
    raise UserError(
        f"{text[:200]}: expected a file, a folder, a hub id (owner/name) or open_clip:NAME/TAG, got no such thing"
    )


def _hub(source: str) -> Path:
    """The snapshot folder of a hub repository, with its configuration and weights."""
    repository, _, revision = source.partition("@")
    first = _download(repository, CONFIG, revision or None) or _download(repository, OPEN_CLIP_CONFIG, revision or None)
    if first is None:
        raise UserError(f"{source}: expected {CONFIG} or {OPEN_CLIP_CONFIG} on the hub or in its cache, got neither")
    folder = first.parent
    # the rest from the very same commit
    commit = folder.name
    if first.name == CONFIG:
        # some repositories have both; what transformers loads comes first
        _download(repository, OPEN_CLIP_CONFIG, commit)
    for name in PREPROCESSORS:
        _download(repository, name, commit)
    for name in (*WEIGHTS, *OPEN_CLIP_WEIGHTS):
        found = _download(repository, name, commit)
        if found is None:
            continue
        if name.endswith(".index.json"):
            from pareto_merging.checkpoints.readers import shard_names

            for shard in shard_names(found):
                if _download(repository, shard, commit) is None:
                    raise UserError(f"{source}: expected {shard} as {name} says, got none on the hub or in its cache")
        return folder
    raise UserError(f"{source}: expected weights ({', '.join(WEIGHTS)}) on the hub or in its cache, got none")


def _download(repository: str, name: str, revision: str | None) -> Path | None:
    """One file of a repository through the hub's cache; None if the repository (or, offline, the cache) has none."""
    from huggingface_hub import hf_hub_download, is_offline_mode
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
    )

    try:
        return Path(hf_hub_download(repository, name, revision=revision))
    except LocalEntryNotFoundError as error:
        # offline the cache is all there is; but a hub that does not answer may have the file
        if is_offline_mode():
            return None
        raise UserError(
            f"{repository}: expected {name} from the hub, got no answer (HF_HUB_OFFLINE=1 uses the cache as it is)"
        ) from error
    except EntryNotFoundError:
        return None
    except HFValidationError as error:
        raise UserError(f"{repository}: expected a hub id (owner/name), got {_line(error)}") from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise _unreachable(repository, error) from error


def _unreachable(repository: str, error: Exception) -> UserError:
    return UserError(f"{repository}: expected a repository on the hub or in its cache, got {_line(error)}")


def _line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return " ".join((text or [type(error).__name__])[0].split())[:200]


def _open_clip(source: str) -> Located:
    import open_clip
    from open_clip.pretrained import download_pretrained, get_pretrained_cfg

    name, _, tag = source.removeprefix(_OPEN_CLIP).rpartition("/")
    config = open_clip.get_model_config(name) if name in open_clip.list_models() else None
    if config is None:
        near = ", ".join(difflib.get_close_matches(name or tag, open_clip.list_models(), n=3, cutoff=0.3))
        raise UserError(
            f"{source[:200]}: expected open_clip:NAME/TAG with one of open_clip's models, got {(name or tag)[:80]!r}"
            + (f"; near: {near}" if near else "")
        )
    pretrained = get_pretrained_cfg(name, tag)
    if not pretrained:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
        raise UserError(f"{source[:200]}: expected a pretrained tag of {name} ({tags}), got {tag[:80]!r}")
    try:
        path = Path(download_pretrained(pretrained))
    except Exception as error:
        # open_clip has no error class of its own: whatever its downloader met
        raise UserError(f"{source}: expected weights that open_clip can download, got {_line(error)}") from error
    vision = config.get("vision_cfg", {})
    settings = {"quick_gelu": bool(pretrained.get("quick_gelu", config.get("quick_gelu", False)))}
    if isinstance(vision.get("width"), int) and isinstance(vision.get("layers"), int):
        settings["heads"] = vision["width"] // vision.get("head_width", 64)
    settings |= {key: pretrained[key] for key in ("mean", "std") if pretrained.get(key) is not None}
    return Located(path, settings)
