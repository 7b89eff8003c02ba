"""``python -m benchmarks.training.operators``: operators that one optimiser step dispatches, and their bytes.

Each operator that is not a view is at least one kernel on a GPU, and each of them costs Python about ten microseconds
where a step is not captured as a CUDA graph. The count does not depend on the machine: it is of a vision transformer
with the number of blocks of ViT-L/14 and a width of 64, eight tasks, task by task, in plain PyTorch.
"""

import itertools
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.common.arguments import command_parser
from benchmarks.common.towers import Tower
from benchmarks.training.models import FineTuned
from pareto_merging import MethodSettings, Task
from pareto_merging.data.sources import TensorImages
from pareto_merging.data.tasks import ZeroShotHead
from pareto_merging.learn.gradient import Execution, TasksAtOnce
from pareto_merging.learn.learner import Learner
from pareto_merging.model.parametrize import parametrize
from pareto_merging.system.modes import eval_mode

# of no work: views, and memory that nothing is written to
FREE = ("detach", "alias", "empty", "new_empty", "empty_like", "empty_strided", "_unsafe_view")


class Count(TorchDispatchMode):
    """Operators that are dispatched, by name, and their bytes.

    Bytes: of the tensors that they are given and return. A view is counted by the numbers it shows; what a kernel keeps
    to itself, and what it reads twice, is not.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.partition("::")[2]
        if not func.is_view and name not in FREE:
            self.counts[name] += 1
            tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)]
            self.bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return result


def count(blocks: int, tasks: int, at_once: TasksAtOnce = "one", *, guided: bool = False) -> Count:
    """Count a third step. ``guided``: of the preset ``expert``, teachers' outputs kept."""
    from open_clip.transformer import VisionTransformer

    tower = Tower("", 64, blocks, heads=4, patch=4, output=32, image=8)
    model = VisionTransformer(**tower.arguments).eval()
    constant_rank = 4 if guided else 0
    copies = [FineTuned(model, k) for k in range(tasks)]
    pareto = parametrize(model, copies, rank=4, constant_rank=constant_rank)
    sets = {
        name: Task(TensorImages(torch.randn(8, 3, 8, 8)), ZeroShotHead(torch.randn(10, 32), 10.0), torch.randn(8, 10))
        for name in pareto.pareto.task_names  # type: ignore[union-attr]
    }
    preset = {"preset": "expert", "start": "pretrained", "constant_rank": constant_rank} if guided else {}
    settings = MethodSettings.model_validate({**preset, "steps": 10, "batch_size": 4, "rank": 4})
    learner = Learner(pareto, sets, settings, Execution(tasks_at_once=at_once))
    batches = learner.batches(0, 0)
    with eval_mode(pareto):
        for step in (1, 2):
            learner.step(step, next(batches))
        with Count() as counted:
            learner.step(3, next(batches))
    return counted


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = command_parser("benchmarks.training.operators", __doc__)
    parser.add_argument("--blocks", type=int, default=24, help="of the transformer (default: 24, as ViT-L/14)")
    parser.add_argument("--tasks", type=int, default=8, help="default: 8")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    modes: tuple[TasksAtOnce, ...] = ("one", "all")
    for guided, at_once in itertools.product((False, True), modes):
        counted = count(chosen.blocks, chosen.tasks, at_once, guided=guided)
        counts = counted.counts
        most = ", ".join(f"{name} {times}" for name, times in counts.most_common(6))
        preset = "expert" if guided else "icml2025"
        total = f"{counts.total()} operators in a step ({most}), {counted.bytes / 1e6:.1f} MB read and written"
        print(f"{preset}, tasks_at_once {at_once}: {total}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
