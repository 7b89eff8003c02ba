"""What training steps cost at the least on each GPU, and the goals, predicted."""

import itertools

from benchmarks.common.towers import BATCH, TOWERS, Tower
from benchmarks.limits import predictions
from benchmarks.limits.layers import db_bytes
from benchmarks.limits.predictions import GOAL_TASKS, TASKS, UNCERTAINTY, figure, over_text, ratio_text, table

# optimiser steps of the published runs
STEPS = {2: 2000, 8: 4000}
GOAL_DEVICES = ("nvidia-h200", "nvidia-h100-80gb-hbm3")


def goal_lines(gpu: str) -> list[list[str]]:
    """Return each goal, what is to be reached, what is predicted, and what that counts."""
    small, large = TOWERS
    steps = {tower: predictions.step(tower, GOAL_TASKS, gpu) for tower in TOWERS}
    in_a_step = (
        "products, attention, the rest of the network, merge, reduction, partial sums, db, own gradients of norms"
    )
    forward = "products, widening, attention and the rest of the network; no copies of images, no host"
    whole, block = (
        over_text(*predictions.served_and_plain(kernels, large, BATCH, gpu), 3)
        for kernels in (predictions.forward_kernels, predictions.block_kernels)
    )
    lines = [
        [f"serving {large.name}, {BATCH} preferences ÷ one plain merged model", "≤ 1.03×", whole, forward],
        [f"a served block of {large.name} ÷ the plain block", "≤ 1.05×", block, "the same of one block"],
    ]
    for tower, way, more, aim in (
        (large, "cached", "", "≤ 1.05×"),
        (small, "cached", "", "≤ 1.15×"),
        (small, "all at once", ", all tasks at once", "≤ 0.9×"),
        (large, "all at once", ", all tasks at once", "–"),
    ):
        ratio = over_text(steps[tower].predicted[way], steps[tower].predicted_limit)
        lines.append([f"training step {tower.name}{more} ÷ limit", aim, ratio, in_a_step])
    for tower in (large, small):
        once = predictions.prediction(predictions.once_kernels(tower, GOAL_TASKS, gpu), gpu)
        ratio = over_text(steps[tower].predicted["cached"], once)
        counted = "as above; that one adds up K dW and reduces once, in PyTorch's own kernels; no host"
        lines.append([f"training step {tower.name} ÷ merged once with autograd", "< 1×", ratio, counted])
    for tower in (large, small):
        shares = [predictions.reduction_share(one, GOAL_TASKS, gpu) for one in tower.block_layers(BATCH)]
        least, most = min(shares), max(shares)
        off = f"{least / (1 + UNCERTAINTY):.0%}–{most / (1 - UNCERTAINTY):.0%}"
        text, title = f"*{least:.0%}–{most:.0%} ({off})*", f"reduction of dW, layers of {tower.name}"
        counted = "dW and every τ once over bandwidth, over the reduction and its partial sums"
        lines.append([title, "≥ 80 %", text, f"{counted}, smallest and largest layer"])
    for tower, bias in itertools.product((large, small), (False, True)):
        layers = tower.block_layers(BATCH)
        ratios = [predictions.weight_gradient_ratio(one, GOAL_TASKS, gpu, bias=bias) for one in layers]
        text = " to ".join(ratio_text(r, UNCERTAINTY * abs(r - 1)) for r in (min(ratios), max(ratios)))
        counted = "dW, reduction, partial sums" + (" and db" if bias else "") + ", over dW and the bytes of τ"
        title = f"weight gradient, layers of {tower.name}{', with db' if bias else ''}"
        lines.append([title, "≤ 1.15×", text, counted])
    for tower, aim in ((small, "≤ 90 s"), (large, "≤ 1500 s")):
        seconds = STEPS[GOAL_TASKS] * steps[tower].predicted["cached"].seconds
        about = f"{figure(seconds * (1 - UNCERTAINTY))}–{figure(seconds * (1 + UNCERTAINTY))}"
        text = f"*{figure(seconds)} s ({about})*"
        lines.append([f"{STEPS[GOAL_TASKS]} steps, {tower.name}", aim, text, "as a step; no images read, no host"])
    ratio = over_text(*predictions.served_and_plain(predictions.forward_kernels, large, 1, gpu))
    return [*lines, [f"one image of {large.name}, unseen preference ÷ plain model", "≤ 1.10×", ratio, forward]]


def device_goals(gpu: str, title: str) -> list[str]:
    introduction = f"""\
### {title}: the goals, predicted

K = {GOAL_TASKS}, {BATCH} images unless said. Each figure in italics is **predicted** from counted kernels for this GPU
alone, none is measured. It is ±{UNCERTAINTY:.0%}, in brackets: of a ratio, ±{UNCERTAINTY:.0%} of what the parts of the
two differ by, because what is alike in both is off alike. Not predicted are the steps under 6 and 3.5 GiB, the
layer-wise AdaMerging computation, data-free runs, and how well `auto` chooses: they hang on what is not counted."""
    return [introduction, *table(["goal", "to reach", "*predicted*", "counted"], goal_lines(gpu), 4)]


def device_models(gpu: str, title: str) -> list[str]:
    lines = []
    for tower in TOWERS:
        rows = []
        for tasks in TASKS:
            step = predictions.step(tower, tasks, gpu)
            seconds = STEPS.get(tasks, 0) * step.predicted["cached"].seconds
            run = f"{STEPS[tasks]} steps: *{figure(seconds)} s*" if tasks in STEPS else "–"
            row = [str(tasks), *map(figure, (step.operations / 1e12, step.limit * 1e3, step.bound * 1e3))]
            row.append(f"{step.bound / step.limit:.3f}×")
            row += [f"*{figure(way.seconds * 1e3)}*" for way in (step.predicted_limit, *step.predicted.values())]
            rows.append([*row, *(f"*{step.ratio(way):.2f}×*" for way in ("cached", "all at once")), run])
        columns = ["K", "TFLOP", "limit", "bound", "bound ÷ limit", "*limit*"]
        columns += [
            *(f"*{way}*" for way in step.predicted),
            "*cached ÷ limit*",
            "*all at once ÷ limit*",
            "*run, cached*",
        ]
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
    alone = [way.counted_alone for way in ways]
    rows += [
        ["**all**", *(f"*{figure(way.seconds * 1e3)}*" for way in ways)],
        ["÷ limit", *(f"*{way.seconds / ways[0].seconds:.3f}×*" for way in ways)],
        ["÷ limit, products and attention alone", *(f"*{one / alone[0]:.3f}×*" for one in alone)],
        ["÷ limit, all at the memory's full rate", *(f"*{seconds / full[0]:.3f}×*" for seconds in full)],
        ["launches", *(f"{way.launches:,}" for way in ways)],
    ]
    titles = ("*limit*", "*cached*", "*all at once*", "*merged once, autograd*")
    return ["Of which:", *table([f"{title}, {tower.name}, K = {GOAL_TASKS}, ms", *titles], rows)]


def models() -> list[str]:
    rows = []
    for tower, tasks in itertools.product(TOWERS, TASKS):
        held = [f"{count / 1e9:.2f}" for count in predictions.memory(tower, tasks).values()]
        rows.append([tower.name, str(tasks), f"{tower.parameters / 1e6:.1f}", *held])
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
- ***expert-guided***: as *cached*, with the preset `expert`: a constant term of rank 32 on every matrix, merged and
  reduced with it, and the term of γ row by row, because every image has a preference of its own; the logits of the
  fine-tuned models are kept, so they cost nothing here.
- ***merged once, autograd***: the baseline of two more models of memory. One product of λ with all τ merges, every
  task's dW is added in place, one product reduces them.
- ***run, cached***: a learning run of as many steps as were published for so many tasks: what a step counts, alone.

Memory of weights during a step, in GB (10⁹ bytes). Activations, the learned parameters and the optimiser's state come
on top."""
    return [introduction, *table(["model", "K", "million parameters", "cached", "streamed", "fused"], rows)]
