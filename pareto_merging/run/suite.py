"""The embedded suite as a user's configuration would name its files."""

from pathlib import Path

from pareto_merging.errors import UserError
from pareto_merging.run.config import EncoderConfig, TaskConfig, UnseenConfig


def digits_files(folder: Path, tasks: list[str] | None) -> tuple[EncoderConfig, dict[str, TaskConfig]]:
    """Return the encoder and the tasks of the suite in ``folder``, by default all eight."""
    # seconds to import, for those who have their own models
    from pareto_merging.data import digits

    chosen = list(digits.TASKS) if tasks is None else tasks
    unknown = [name for name in chosen if name not in digits.TASKS]
    if unknown:
        raise UserError(f"tasks: expected some of {', '.join(digits.TASKS)}; got {', '.join(unknown)}")
    encoder = EncoderConfig(
        architecture=str(folder / "encoder.json"), pretrained=folder / "pretrained.safetensors", quick_gelu=False
    )
    return encoder, {
        name: TaskConfig(
            checkpoint=folder / f"finetuned_{name}.safetensors",
            head=folder / "heads.safetensors",
            merging=f"digits:{name}/merging",
            evaluation=f"digits:{name}/evaluation",
            training=f"digits:{name}/training",
        )
        for name in chosen
    }


def unseen_digits_files(folder: Path, tasks: list[str]) -> dict[str, UnseenConfig]:
    """Return tasks of the suite in ``folder`` as tasks without a checkpoint."""
    _, known = digits_files(folder, tasks)
    return {
        name: UnseenConfig(head=task.head, merging=task.merging, evaluation=task.evaluation)  # type: ignore[arg-type]
        for name, task in known.items()
    }
