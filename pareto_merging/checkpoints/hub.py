"""Checkpoints are found by path, Hugging Face Hub id, or open_clip's model and tag.

Downloads are huggingface_hub's and open_clip's own, into their caches; HF_HUB_OFFLINE is respected.
"""

import contextlib
import difflib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pareto_merging.checkpoints.contents import WEIGHTS
from pareto_merging.checkpoints.hugging_face import CONFIG, PREPROCESSORS
from pareto_merging.checkpoints.open_clip import CONFIG as OPEN_CLIP_CONFIG
from pareto_merging.checkpoints.open_clip import WEIGHTS as OPEN_CLIP_WEIGHTS
from pareto_merging.checkpoints.tensors import shard_names
from pareto_merging.errors import UserError
from pareto_merging.system.files import read_json

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}(@[\w./-]{1,100})?", re.ASCII)
_FILE_SUFFIXES = (".pt", ".pth", ".bin", ".safetensors", ".ckpt", ".json", ".pkl", ".yaml", ".yml")
_ADDRESSES = ("https://huggingface.co/", "http://huggingface.co/", "huggingface.co/", "https://hf.co/", "hf://")
_OPEN_CLIP, _HUB = "open_clip:", "hf:"


class TagSettings(NamedTuple):
    """What open_clip says of a pretrained tag, in its own words."""

    heads: int | None
    quick_gelu: bool
    preprocess_cfg: dict[str, Any]
    text_cfg: dict[str, Any]


def remote(source: str | Path) -> str | None:
    """Return ``hf:owner/name`` or an open_clip tag, if ``source`` reads as one.

    No path of that name is looked for. A ``Path``, and a text that begins with ``.``, ``/`` or ``~``, is a path.
    """
    if isinstance(source, Path):
        return None
    for address in _ADDRESSES:
        if source.startswith(address):
            # as copied from a browser: …/owner/name/tree/main
            return _HUB + "/".join(source.removeprefix(address).split("/")[:2])
    if source.startswith((_OPEN_CLIP, _HUB)):
        return source
    is_id = _HUB_ID.fullmatch(source) is not None and not source.endswith(_FILE_SUFFIXES)
    return f"{_HUB}{source}" if is_id else None


def hub_id(source: str | Path) -> str:
    """Return ``owner/name`` of a source on the hub, or empty text for any other."""
    text = remote(source) or ""
    return text.removeprefix(_HUB).partition("@")[0] if text.startswith(_HUB) else ""


def locate(source: str | Path) -> tuple[Path, TagSettings | None]:
    """Find the file or folder on this machine, and open_clip's word on a tag. What is not here is downloaded first.

    Args:
        source: a file, a folder, ``owner/name`` or ``owner/name@revision`` on the Hugging Face Hub (``hf:owner/name``
            where a folder has that name), or ``open_clip:NAME/TAG``. A ``Path`` is never looked for elsewhere.

    Raises UserError: nothing there, or it cannot be had (offline, private, unknown).
    """
    text, elsewhere = str(source), remote(source)
    path = Path(os.path.expanduser(source))
    if (elsewhere is None or elsewhere != text) and path.exists():
        return path, None
    if elsewhere is not None:
        return _open_clip(text) if text.startswith(_OPEN_CLIP) else (_hub(elsewhere.removeprefix(_HUB)), None)
    if path.is_symlink():
        target = os.readlink(path)[:200]
        raise UserError(f"{text[:200]}: expected a checkpoint, got a link to {target}, which is missing")
    expected = "expected a file, a folder, a hub id (owner/name) or open_clip:NAME/TAG"
    raise UserError(f"{text[:200] or 'a checkpoint'}: {expected}, got no such thing")


def _hub(source: str) -> Path:
    """Return the snapshot folder of a hub repository, with its configuration and weights."""
    name, _, revision = source.partition("@")
    repository = _Repository(name)
    first = repository.file(CONFIG, revision or None) or repository.file(OPEN_CLIP_CONFIG, revision or None)
    if first is None:
        where = "in the hub's cache (HF_HUB_OFFLINE is set)" if repository.is_offline else "on the hub"
        raise UserError(f"{source}: expected {CONFIG} or {OPEN_CLIP_CONFIG} {where}, got neither; and no such folder")
    # the rest from the very same commit
    folder, commit = first.parent, first.parent.name
    is_hugging_face = first.name == CONFIG and "model_type" in read_json(first)
    preprocessors = [repository.file(optional, commit) for optional in PREPROCESSORS] if is_hugging_face else []
    if first.name == CONFIG and not any(preprocessors):
        repository.file(OPEN_CLIP_CONFIG, commit)
    for weights in (*WEIGHTS, *OPEN_CLIP_WEIGHTS) if is_hugging_face else (*OPEN_CLIP_WEIGHTS, *WEIGHTS):
        path = repository.file(weights, commit)
        if path is None:
            continue
        if weights in OPEN_CLIP_WEIGHTS:
            repository.file(OPEN_CLIP_CONFIG, commit)
        for shard in shard_names(path) if weights.endswith(".index.json") else ():
            if repository.file(shard, commit) is None:
                raise UserError(f"{source}: expected {shard} as {weights} says, got none on the hub or in its cache")
        return folder
    raise UserError(f"{source}: expected weights ({', '.join(WEIGHTS)}) on the hub or in its cache, got none")


def beside(source: str, folder: Path, names: Sequence[str]) -> list[Path]:
    """Return those small files of a checkpoint's folder that are there. The hub's are downloaded first."""
    name = hub_id(source)
    if name:
        repository = _Repository(name)
        for each in names:
            with contextlib.suppress(UserError):
                repository.file(each, folder.name)
    return [folder / each for each in names if (folder / each).is_file()] if folder.is_dir() else []


class _Repository:
    """A repository of the hub, read through its cache. Where the hub does not answer, that alone is read."""

    def __init__(self, name: str) -> None:
        from huggingface_hub import is_offline_mode

        self.name = name
        self.is_offline = is_offline_mode()
        # asked once: the hub's client tries again for half a minute at each file
        self.answers = not self.is_offline and _answers(name)

    def file(self, name: str, revision: str | None) -> Path | None:
        """Return one file, or None if the repository (or, offline, the cache) has none. UserError if nothing tells."""
        from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, try_to_load_from_cache
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        try:
            return Path(hf_hub_download(self.name, name, revision=revision, local_files_only=not self.answers))
        except LocalEntryNotFoundError as error:
            known = try_to_load_from_cache(self.name, name, revision=revision)
            if self.is_offline or known is _CACHED_NO_EXIST:
                return None
            raise self._no_answer(name) from error
        except EntryNotFoundError:
            return None
        except Exception as error:
            # what the hub says, and whatever its HTTP client and its downloader raise when a connection breaks
            what = f"expected a repository on the Hugging Face Hub (no folder has that name), got {_line(error)}"
            raise UserError(f"{self.name}: {what}") from error

    def _no_answer(self, name: str) -> UserError:
        expected = f"expected {name} from the Hugging Face Hub (no folder has that name)"
        return UserError(f"{self.name}: {expected}, got no answer (HF_HUB_OFFLINE=1 takes its cache as it is)")

    def cached(self, names: Sequence[str]) -> Path:
        """Return the first of some files that is in the cache. Raises UserError if none is."""
        from huggingface_hub import try_to_load_from_cache

        for path in (try_to_load_from_cache(self.name, name) for name in names):
            if isinstance(path, str):
                return Path(path)
        if self.is_offline:
            raise UserError(f"{self.name}: expected {names[0]} in the hub's cache (HF_HUB_OFFLINE is set), got none")
        raise self._no_answer(names[0])


def _answers(repository: str) -> bool:
    """Return whether the hub answers at all, whatever it says."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        get_hf_file_metadata(hf_hub_url(repository, CONFIG))
    except HfHubHTTPError:
        return True
    except HFValidationError as error:
        raise UserError(f"{repository}: expected a hub id (owner/name), got {_line(error)}") from error
    except Exception:
        # whatever its HTTP client raises without a network
        return False
    return True


def _line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return " ".join((text or [type(error).__name__])[0].split())[:200]


def _open_clip(source: str) -> tuple[Path, TagSettings]:
    import open_clip
    from open_clip.pretrained import download_pretrained, get_pretrained_cfg

    name, _, tag = source.removeprefix(_OPEN_CLIP).rpartition("/")
    models = open_clip.list_models()
    if not name and tag in models:
        name, tag = tag, ""
    config = open_clip.get_model_config(name) if name in models else None
    if config is None:
        close = difflib.get_close_matches(name or tag, models, n=3, cutoff=0.3)
        got = repr((name or tag)[:80]) + (f"; near: {', '.join(close)}" if close else "")
        raise UserError(f"{source[:200]}: expected open_clip:NAME/TAG with one of open_clip's models, got {got}")
    pretrained = get_pretrained_cfg(name, tag)
    if not pretrained:
        tags = open_clip.list_pretrained_tags_by_model(name)
        close = difflib.get_close_matches(tag, tags, n=3, cutoff=0.3) or tags[:5]
        got = repr(tag[:80]) + (f"; such as: {', '.join(close)}" if close else "")
        raise UserError(f"{source[:200]}: expected open_clip:{name}/TAG, one of its {len(tags)} tags, got {got}")
    hub_id, file_name = os.path.split(pretrained.get("hf_hub") or "")
    try:
        repository = _Repository(hub_id) if hub_id else None
        if repository is not None and not repository.answers:
            path = repository.cached([*OPEN_CLIP_WEIGHTS, file_name] if file_name else OPEN_CLIP_WEIGHTS)
        else:
            path = Path(download_pretrained(pretrained))
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    except Exception as error:
        # open_clip has no error class of its own: whatever its downloader met
        raise UserError(f"{source}: expected weights that open_clip can download, got {_line(error)}") from error
    vision = config.get("vision_cfg", {})
    heads = None
    if isinstance(vision.get("width"), int) and isinstance(vision.get("layers"), int):
        heads = vision["width"] // vision.get("head_width", 64)
    keys = ("mean", "std", "interpolation", "resize_mode")
    settings = TagSettings(
        heads,
        quick_gelu=bool(pretrained.get("quick_gelu", config.get("quick_gelu", False))),
        preprocess_cfg={key: pretrained[key] for key in keys if pretrained.get(key) is not None},
        text_cfg=config.get("text_cfg", {}),
    )
    return path, settings
