"""``pareto-merging train``: a configuration's Pareto set, learned into a run folder."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from torch import nn

from pareto_merging.errors import UserError, user_errors
from pareto_merging.learn.checkpoint import CHECKPOINT_NAME
from pareto_merging.learn.log import LOG_NAME
from pareto_merging.learn.loop import TrainingResult
from pareto_merging.learn.objectives import OBJECTIVES
from pareto_merging.learn.settings import MethodSettings
from pareto_merging.learn.teachers import TEACHERS_NAME
from pareto_merging.methods.start import START_NAME, learn_from_start
from pareto_merging.model.files import save_pareto_set
from pareto_merging.model.state import pareto_state
from pareto_merging.model.stored import percent, summarize_dtypes
from pareto_merging.run.config import RunConfig, dump_config
from pareto_merging.run.folder import CONFIG_NAME, LOCK_NAME, SET_NAME, locked, start_run
from pareto_merging.run.workspace import Workspace
from pareto_merging.system.files import write_text


def train_run(
    config: RunConfig,
    folder: Path,
    *,
    resume: bool = False,
    progress: bool = True,
    on_warning: Callable[[str], None] | None = None,
) -> tuple[nn.Module, TrainingResult]:
    """Learn the Pareto set a configuration describes and write it into ``folder``.

    Everything the run needs is opened before the folder is made, so that a mistake leaves nothing behind.

    Raises:
        UserError: see :func:`start_run` and :class:`Workspace`. TrainingError, Interrupted: :func:`learn_pareto_set`.
    """
    folder = Path(folder)
    start_run(config, folder, resume)
    workspace = Workspace(config)
    workspace.check_files()
    if workspace.assumption and on_warning is not None:
        on_warning(workspace.assumption)
    if any(task.evaluation is not None for task in workspace.task_configs.values()):
        # folders that do not fit are said now, and not when it is learned
        workspace.evaluation_tasks()
    tasks = workspace.merging_tasks() if _needs_images(config.method) else None
    model = workspace.pareto_model()
    _check_task_vectors(model, on_warning)
    with locked(folder), _nothing_left_of_mistakes(folder):
        # on a resume too: how it is computed may differ from the first part
        write_text(folder / CONFIG_NAME, dump_config(config))
        with user_errors():
            is_plain = config.method.start == "pretrained"
            result = learn_from_start(
                model,
                # a start reads them beside the model; otherwise nobody asks for them
                model if is_plain else workspace.pretrained(),
                workspace.finetuned(),
                tasks,
                config.method,
                folder=folder,
                resume=resume,
                progress=progress,
                workers=config.workers,
                cuda_graphs=config.cuda_graphs,
                tasks_at_once=config.tasks_at_once,
                on_warning=on_warning,
            )
    training = {"steps": result.steps, "collapsed": result.collapsed, "method": config.method.model_dump(mode="json")}
    save_pareto_set(model, folder / SET_NAME, preset=config.method.preset, training=training)
    return model, result


def _needs_images(method: MethodSettings) -> bool:
    return OBJECTIVES[method.objective].needs != "weights" or method.start != "pretrained"


@contextlib.contextmanager
def _nothing_left_of_mistakes(folder: Path) -> Iterator[None]:
    """Leave nothing in a new folder where a UserError came before anything was learned."""
    is_new = not (folder / CONFIG_NAME).exists()
    try:
        yield
    except UserError:
        if is_new and not (folder / CHECKPOINT_NAME).exists():
            # so that nothing stands in the way of the next try
            for name in (CONFIG_NAME, LOG_NAME, LOCK_NAME, START_NAME, TEACHERS_NAME):
                (folder / name).unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


def describe_precision(model: nn.Module) -> str:
    """Say in one line how a model's weights are stored and what rounding changed."""
    state = pareto_state(model)
    finetuned = summarize_dtypes([state.stored_dtypes[name] for name in state.task_names])
    text = f"stored: pretrained {state.stored_dtypes['pretrained']}, fine-tuned {finetuned}"
    return f"{text}; rounding of τ: {percent(state.rounding_error)} of Σλτ" if state.rounding_error else text


def _check_task_vectors(model: nn.Module, on_warning: Callable[[str], None] | None) -> None:
    state = pareto_state(model)
    same = [name for name in state.task_names if state.digests[name] == state.digests["pretrained"]]
    if len(same) == len(state.task_names):
        raise UserError(f"tasks: expected fine-tuned checkpoints, got the pretrained one for {', '.join(same)}")
    for name in state.task_names:
        equal = [other for other in state.task_names if state.digests[other] == state.digests[name]]
        if len(equal) > 1 and name not in same:
            raise UserError(f"tasks: expected different checkpoints, got the same weights for {', '.join(equal)}")
    if same and on_warning is not None:
        on_warning(f"the checkpoint of {', '.join(same)} equals the pretrained one")
