"""``pareto-merging plan``."""

import json

from pareto_merging.cli import options


def plan(config: options.ConfigFile, as_json: options.AsJson = False) -> None:
    """Count parameters and bytes by kind, before anything is loaded.

    It says in which dtype every checkpoint is stored, and what rounding
    the task vectors to the dtype of the run costs: the relative error of
    Σλτ. For that a 16-bit run's checkpoints are read, tensor by tensor;
    otherwise headers are.
    """
    from pareto_merging.run.config import read_config
    from pareto_merging.run.folder import SET_NAME
    from pareto_merging.run.plan import plan_run
    from pareto_merging.run.workspace import Workspace
    from pareto_merging.system.tables import print_table

    workspace = Workspace(read_config(config, learned=(config.parent / SET_NAME).exists()))
    rows = plan_run(workspace, progress=not as_json)
    if as_json:
        print(json.dumps([{key: value for key, value in vars(row).items() if value is not None} for row in rows]))
        return
    steps = workspace.config.method.steps_for(len(workspace.task_names))
    title = f"{config}: {len(workspace.task_names)} tasks, {steps} steps, {workspace.device}"
    counted = [[row.kind, f"{row.parameters:,}", f"{row.bytes / 2**20:,.2f}", row.note] for row in rows]
    print_table(title, ["kind", "numbers", "MiB", "note"], counted, left=(0, 3))
