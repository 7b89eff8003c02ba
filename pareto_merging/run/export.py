"""What a run becomes: plain models in three formats, or a folded file."""

import contextlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor, nn

from pareto_merging.checkpoints import encoders, hub
from pareto_merging.checkpoints.cards import Source, model_card
from pareto_merging.checkpoints.checkpoint import Checkpoint, open_checkpoint
from pareto_merging.checkpoints.export import export_hugging_face, export_open_clip
from pareto_merging.checkpoints.safetensors import write_tensors
from pareto_merging.errors import UserError, user_errors
from pareto_merging.learn.checkpoint import CHECKPOINT_NAME
from pareto_merging.model.files import SET_FORMAT, read_header, save_folded
from pareto_merging.model.fold import merge
from pareto_merging.model.learned import learned_parameters
from pareto_merging.model.state import pareto_state
from pareto_merging.preferences import format_preference, parse_preferences
from pareto_merging.run.folder import CONFIG_NAME, SET_NAME, check_new, open_run
from pareto_merging.run.workspace import Workspace
from pareto_merging.system.files import new_folder, read_json, write_json, write_text
from pareto_merging.system.progress import progress_bar
from pareto_merging.version import VERSION

Format = Literal["safetensors", "open_clip", "huggingface"]
LIST_NAME = "preferences.json"
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json")
_TOKENIZER_BYTES = 2**24


def export_folded(run: Path, target: Path, *, overwrite: bool = False) -> Path:
    """Write every preference as one file for a server. UserError: as :func:`export_merged`."""
    check_file(target, overwrite)
    workspace, model = open_run(run)
    _check_not_an_input(run, workspace, target)
    heads = {name: workspace.head(name) for name, task in workspace.task_configs.items() if task.head is not None}
    save_folded(
        model,
        target,
        heads={name: (head.weight, head.logit_scale) for name, head in heads.items()},
        encoder=workspace.encoder_description,
        preprocessing=workspace.preprocessing,
    )
    return target


def export_merged(
    run: Path,
    preferences: str,
    target: Path | None = None,
    *,
    format: Format = "safetensors",
    text_from: str | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> list[Path]:
    """Write a plain merged model with a card for each preference. Returns what was written, in order.

    Args:
        run: a finished run's folder. preferences: one or several, as :func:`parse_preferences` reads them.
        target: of one preference, the file (``safetensors``) or folder to write; of several, a folder that gets one
            entry each, named 01, 02, …, and ``preferences.json`` that says which is which. None: in the run.
        format: ``safetensors`` (the vision encoder, one file), or a folder that ``open_clip`` or transformers
            (``huggingface``) loads by itself.
        text_from: the checkpoint whose text tower makes it a whole CLIP; default: the pretrained one's, if it has one.

    Raises:
        UserError: no finished run; a target that exists (without ``overwrite``) or that the run is made of; a text
            tower that does not fit.
    """
    if format == "safetensors" and text_from is not None:
        raise UserError("text_from: expected none for safetensors (the vision encoder alone), got one")
    if not (run / SET_NAME).is_file():
        # its own error says what is missing
        open_run(run)
    # before the models are loaded: mistakes are said at once
    names = read_header(run / SET_NAME, SET_FORMAT, {"task_names": list})["task_names"]
    with user_errors():
        gammas = parse_preferences(preferences, names)
    if target is None:
        name = "merged" if format == "safetensors" else f"merged_{format}"
        target = run / (f"{name}.safetensors" if format == "safetensors" and len(gammas) == 1 else name)
    if len(gammas) > 1:
        _check_list(target, overwrite)
    else:
        _check_single(target, format, overwrite)
    workspace, model = open_run(run)
    text = _text(workspace, text_from) if format != "safetensors" else None
    _check_not_an_input(run, workspace, target, text)
    exporter = _Exporter(format, workspace, model, text)
    if len(gammas) > 1:
        return exporter.write_list(gammas, target, progress)
    exporter.write(gammas[0], target, overwrite)
    return [target]


@dataclass(frozen=True)
class _Exporter:
    """What all preferences share: the format, the run, its model, and perhaps a text tower."""

    format: Format
    workspace: Workspace
    model: nn.Module
    text: Checkpoint | None

    def write_list(self, gammas: Sequence[Tensor], target: Path, progress: bool) -> list[Path]:
        """Write a folder with a model for each preference and their list, or nothing."""
        width = max(2, len(str(len(gammas))))
        suffix = ".safetensors" if self.format == "safetensors" else ""
        names = [f"{number:0{width}d}{suffix}" for number in range(1, len(gammas) + 1)]
        # a list that is half an older one would lie
        with (
            new_folder(Path(os.path.realpath(target))) as folder,
            progress_bar("exporting", len(gammas), 0, progress) as bar,
        ):
            for number, (name, gamma) in enumerate(zip(names, gammas, strict=True), start=1):
                self.write(gamma, folder / name, overwrite=False)
                bar(number, format_preference(gamma.tolist()))
            write_json(folder / LIST_NAME, dict(zip(names, map(self._named, gammas), strict=True)))
        return [target / name for name in names]

    def write(self, gamma: Tensor, target: Path, overwrite: bool) -> None:
        """Write the merged model of one preference with its card."""
        tensors = merge(self.model, gamma).state_dict()
        card = self._card(gamma, target.name)
        encoder, preprocessing = self.workspace.encoder_description, self.workspace.preprocessing
        if self.format == "safetensors":
            metadata = {"format": "pt", "preference": self._named(gamma), "encoder": encoder}
            metadata |= {"preprocessing": preprocessing, "package_version": VERSION}
            write_tensors(target, tensors, metadata)
            write_text(target.with_suffix(".md"), card)
            return
        tokenizer: dict[str, bytes] = {}
        if self.text is not None:
            files = hub.beside(self.text.source, self.text.path, _TOKENIZER)
            tokenizer = {f.name: f.read_bytes() for f in files if f.stat().st_size <= _TOKENIZER_BYTES}
        if self.text is not None and not tokenizer and self.format == "huggingface":
            # its processor and pipelines want one, and this checkpoint brought none
            card += "\n## Tokenizer\n\n"
            card += "None is in this folder; a CLIP of 49,408 tokens has `openai/clip-vit-base-patch32`'s.\n"
        write: Callable[..., Path] = export_hugging_face if self.format == "huggingface" else export_open_clip
        write(
            tensors,
            target,
            encoder=encoder,
            preprocessing=preprocessing,
            text=None if self.text is None else self.text.text,
            text_heads=None if self.text is None else self.text.text_heads,
            card=card,
            extra_files=tokenizer,
            overwrite=overwrite,
        )

    def _named(self, gamma: Tensor) -> dict[str, float]:
        rounded = (round(value, 6) for value in gamma.tolist())
        return dict(zip(self.workspace.task_names, rounded, strict=True))

    def _card(self, gamma: Tensor, file_name: str) -> str:
        """Return the model card of one preference."""
        method, preference = self.workspace.method, self._named(gamma)
        has_low_rank = any(name.startswith("B.") for name in learned_parameters(self.model))
        rank = method.rank if method.core == "tensor" else len(preference)
        steps = method.steps_for(len(preference))
        digests = pareto_state(self.model).digests
        sources = [
            Source(
                name,
                origin="/".join(Path(source).parts[-2:]) if hub.remote(source) is None else str(source),
                digest=digests.get(name, "")[:16],
                hub_id=hub.hub_id(source),
            )
            for name, source in self.workspace.sources().items()
        ]
        return model_card(
            "transformers" if self.format == "huggingface" else self.format,
            encoder=self.workspace.encoder_description,
            has_text=self.text is not None,
            title="Merged " + " + ".join(preference),
            preference=preference,
            method=f"preset {method.preset}, objective {method.objective}, {steps} steps",
            rank=rank if has_low_rank else None,
            lambda_grouping=method.granularity if method.learn_lambda else "",
            sources=sources,
            version=VERSION,
            preprocessing=self.workspace.preprocessing,
            file_name=file_name,
        )


def _text(workspace: Workspace, text_from: str | None) -> Checkpoint | None:
    if text_from is None:
        pretrained = workspace.checkpoint(workspace.encoder_config.pretrained)
        return pretrained if pretrained.text else None
    checkpoint = open_checkpoint(text_from)
    if not checkpoint.text:
        why = f" ({checkpoint.no_text})" if checkpoint.no_text else ""
        raise UserError(f"{text_from}: expected a whole CLIP, got one without a text tower{why}")
    ours = encoders.has_quick_gelu(workspace.encoder_description)
    if checkpoint.quick_gelu is not None and checkpoint.quick_gelu != ours:
        # both libraries have one activation for the two towers
        expected, got = (("QuickGELU" if gelu else "GELU") for gelu in (ours, checkpoint.quick_gelu))
        raise UserError(f"{text_from}: expected a text tower with {expected} as the encoder has, got {got}")
    return checkpoint


def check_file(target: Path, overwrite: bool) -> None:
    """Raise UserError unless ``target`` is the name of a .safetensors file that may be written."""
    if target.suffix != ".safetensors":
        raise UserError(f"{target}: expected a name that ends in .safetensors")
    if target.is_dir() or not overwrite:
        check_new(target)
    if target.is_dir():
        raise UserError(f"{target}: expected a file, got a folder")


def _check_single(target: Path, format: Format, overwrite: bool) -> None:
    """Raise UserError unless a model of the format may be written to ``target``. So may its card beside it."""
    if format != "safetensors":
        if target.suffix == ".safetensors":
            raise UserError(f"{target}: expected a folder for {format}, got the name of a file")
        if not overwrite:
            check_new(target)
        return
    check_file(target, overwrite)
    card = target.with_suffix(".md")
    if not card.exists() and not card.is_symlink():
        return
    with contextlib.suppress(OSError, UnicodeDecodeError):
        if overwrite and "\n- pareto-merging\n" in card.read_text(encoding="utf-8")[:2000]:
            return
    what = f"expected a name whose model card {card.name} does not exist yet, got another file there"
    raise UserError(f"{target}: {what}")


def _check_list(target: Path, overwrite: bool) -> None:
    """Raise UserError unless ``target`` is new, or with ``overwrite`` an earlier list of exports."""
    if target.suffix == ".safetensors":
        raise UserError(f"{target}: expected a folder for several preferences, got the name of a file")
    if not target.exists() or not overwrite:
        check_new(target)
        return
    entries = {entry.name for entry in target.iterdir()} if target.is_dir() else set()
    listed = read_json(target / LIST_NAME).keys() if LIST_NAME in entries else set()
    allowed = {LIST_NAME, *listed, *(str(Path(name).with_suffix(".md")) for name in listed)}
    if not target.is_dir() or (entries and (not listed or entries - allowed)):
        raise UserError(f"{target}: expected a folder of exports to replace, got another one")


def _check_not_an_input(run: Path, workspace: Workspace, target: Path, text: Checkpoint | None = None) -> None:
    """Raise UserError if writing to ``target`` would replace anything that the run reads."""
    paths = [run / SET_NAME, run / CHECKPOINT_NAME, run / CONFIG_NAME, *workspace.files()]
    paths += [checkpoint.path for checkpoint in workspace.checkpoints()]
    paths += [] if text is None else [text.path, *text.files]
    place = target.resolve()
    for path in {path.resolve() for path in paths}:
        if path == place or place in path.parents:
            raise UserError(f"{target}: expected a place to write to, got one that the run is made of ({path.name})")
