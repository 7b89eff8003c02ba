"""What a training step costs at the least on each GPU."""

from benchmarks.common.towers import BATCH, TOWERS, Tower
from benchmarks.limits import predictions
from benchmarks.limits.layers import db_bytes
from benchmarks.limits.predictions import TASKS
from benchmarks.limits.words import GOAL_TASKS, figure, table

# optimiser steps of the published runs
STEPS = {2: 2000, 8: 4000}


def device_models(gpu: str, title: str) -> list[str]:
    lines = []
    for tower in TOWERS:
        rows = []
        for tasks in TASKS:
            step = predictions.step(tower, tasks, gpu)
            steps = STEPS.get(tasks)
            run = f"{steps} steps: *{figure(steps * step.predicted['cached'].seconds)} s*" if steps else "–"
            rows.append(
                [
                    str(tasks),
                    figure(step.operations / 1e12),
                    figure(step.limit * 1e3),
                    figure(step.bound * 1e3),
                    f"{step.bound / step.limit:.3f}×",
                    f"*{figure(step.predicted_limit.seconds * 1e3)}*",
                    *(f"*{figure(way.seconds * 1e3)}*" for way in step.predicted.values()),
                    *(f"*{step.ratio(way):.2f}×*" for way in ("cached", "all at once")),
                    run,
                ]
            )
        columns = ["K", "TFLOP", "limit", "bound", "bound ÷ limit", "*limit*", "*cached*", "*all at once*"]
        columns += ["*streamed*", "*fused*", "*cached ÷ limit*", "*all at once ÷ limit*", "*run, cached*"]
        lines += [f"### {title}: a training step of {tower.name}, ms", *table(columns, rows, 0)]
        lines += _parts(tower, gpu, title)
    return lines


def _parts(tower: Tower, gpu: str, title: str) -> list[str]:
    """Return where the milliseconds of a predicted step go."""
    kernels = [
        list(predictions.limit_kernels(tower, GOAL_TASKS, gpu)),
        *(list(predictions.step_kernels(tower, GOAL_TASKS, gpu, way)) for way in ("cached", "all at once")),
        list(predictions.once_kernels(tower, GOAL_TASKS, gpu)),
    ]
    ways = [predictions.prediction(each, gpu) for each in kernels]
    full = [predictions.prediction(predictions.at_full_rate(each), gpu).seconds for each in kernels]
    rows = [
        [part, *(f"*{figure(way.parts[part] * 1e3)}*" if part in way.parts else "–" for way in ways)]
        for part in predictions.PARTS
        if any(part in way.parts for way in ways)
    ]
    limit = ways[0]
    rows += [
        ["**all**", *(f"*{figure(way.seconds * 1e3)}*" for way in ways)],
        ["÷ limit", *(f"*{way.seconds / limit.seconds:.3f}×*" for way in ways)],
        [
            "÷ limit, products and attention alone",
            *(f"*{way.counted_alone / limit.counted_alone:.3f}×*" for way in ways),
        ],
        ["÷ limit, all at the memory's full rate", *(f"*{seconds / full[0]:.3f}×*" for seconds in full)],
        ["launches", *(f"{way.launches:,}" for way in ways)],
    ]
    columns = [
        f"{title}, {tower.name}, K = {GOAL_TASKS}, ms",
        "*limit*",
        "*cached*",
        "*all at once*",
        "*merged once, autograd*",
    ]
    return ["Of which:", *table(columns, rows)]


def models() -> list[str]:
    rows = [
        [tower.name, str(tasks), f"{tower.parameters / 1e6:.1f}", *(f"{held / 1e9:.2f}" for held in bytes_.values())]
        for tower in TOWERS
        for tasks in TASKS
        for bytes_ in [predictions.memory(tower, tasks)]
    ]
    introduction = f"""\
## Whole models: what is counted

A training step is the forward and backward of K tasks, {BATCH} images each, one task after the other.

- **Products with a merged weight**: the patch embedding (one row per patch, D = 3·patch²; no dx, as nothing before it
  learns), four projections per block (in 3E×E, out E×E, fc 4E×E, proj E×4E) and the final projection of the class
  token ({BATCH} rows). Each has a forward, a dx and a weight gradient.
- **Attention itself**: QKᵀ and AV are 2·M·tokens·E operations each, twice that backward (recomputed scores are not
  counted). Bytes are those of flash attention: Q, K, V and the output, with their gradients backward.
- **The rest of the network**, in predictions alone and the same in the limit and in ours: two normalisations, one
  activation, two residual sums of a block, their backwards, and the gradients of q, k and v joined.
- **Ours besides**: W(γ) merged once a step; of every weight gradient the reduction of dW against τ, A and B, its
  partial sums written and read again, and **db, which reads dy once more** ({db_bytes(TOWERS[1]) / 1e6:.1f} MB a block
  and task of {TOWERS[1].name}); the gradients of the normalisations' own weights and biases, which the limit has not.
- **Not counted**: embeddings, the first and last normalisation, heads, entropies, all biases and norms merged and their
  dλ (a launch a step, two a task), the tensor norm, a task's gradient put into one row, the optimiser, images, Python.
- **limit**: the same network with weights merged beforehand and frozen, plus a full weight-gradient product per layer,
  in one graph: the sum of bounds of products and attention; *in italics* what is predicted of it, launches and the
  rest of the network with it.
- **bound**: ours at the least, products and attention alone. W(γ) is assembled once per step and kept, and every task's
  weight gradient reads K task vectors where the limit writes one dW.
- ***cached***, ***streamed***, ***fused***: predicted. *cached* assembles once per step, *streamed* for every forward
  and dx, *fused* inside every product. The first two take the weight gradient that `auto` takes, *fused* its own.
- ***all at once***: as *cached*, with `tasks_at_once: all`: products of K times the rows and one weight gradient for
  all tasks, which reads the task vectors once, at the activations of K tasks. The limit stays that of task by task.
- ***merged once, autograd***: the baseline of two more models of memory. One product of λ with all τ merges, every
  task's dW is added in place, one product reduces them.
- ***run, cached***: a learning run of as many steps as were published for so many tasks: what a step counts, alone.

Memory of weights during a step, in GB (10⁹ bytes). Activations, the learned parameters and the optimiser's state come
on top."""
    return [introduction, *table(["model", "K", "million parameters", "cached", "streamed", "fused"], rows)]
