"""What is predicted of the goals."""

from benchmarks.common.towers import BATCH, TOWERS
from benchmarks.limits import predictions
from benchmarks.limits.models import STEPS
from benchmarks.limits.words import (
    GOAL_TASKS,
    UNCERTAINTY,
    extremes,
    over_text,
    ratio_text,
    seconds_text,
    share_text,
    table,
)

GOAL_DEVICES = ("nvidia-h200", "nvidia-h100-80gb-hbm3")


def goal_lines(gpu: str) -> list[list[str]]:
    """Return each goal, what is to be reached, what is predicted, and what that counts."""
    small, large = TOWERS
    steps = {tower.name: predictions.step(tower, GOAL_TASKS, gpu) for tower in TOWERS}
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
    for tower, way, aim in (
        (large, "cached", "≤ 1.05×"),
        (small, "cached", "≤ 1.15×"),
        (small, "all at once", "≤ 0.9×"),
        (large, "all at once", "–"),
    ):
        name = f"training step {tower.name}{', all tasks at once' if way != 'cached' else ''} ÷ limit"
        lines.append(
            [name, aim, over_text(steps[tower.name].predicted[way], steps[tower.name].predicted_limit), in_a_step]
        )
    for tower in (large, small):
        once = predictions.prediction(predictions.once_kernels(tower, GOAL_TASKS, gpu), gpu)
        ratio = over_text(steps[tower.name].predicted["cached"], once)
        counted = "as above; that one adds up K dW and reduces once, in PyTorch's own kernels; no host"
        lines.append([f"training step {tower.name} ÷ merged once with autograd", "< 1×", ratio, counted])
    for tower in (large, small):
        shares = extremes(predictions.reduction_share(one, GOAL_TASKS, gpu) for one in tower.block_layers(BATCH))
        counted = (
            "dW and every τ once over bandwidth, over the reduction and its partial sums, smallest and largest layer"
        )
        lines.append([f"reduction of dW, layers of {tower.name}", "≥ 80 %", share_text(*shares), counted])
    for tower in (large, small):
        for bias in (False, True):
            layers = tower.block_layers(BATCH)
            ratios = extremes(predictions.weight_gradient_ratio(one, GOAL_TASKS, gpu, bias=bias) for one in layers)
            text = " to ".join(ratio_text(value, UNCERTAINTY * abs(value - 1)) for value in ratios)
            counted = "dW, reduction, partial sums" + (" and db" if bias else "") + ", over dW and the bytes of τ"
            lines.append(
                [f"weight gradient, layers of {tower.name}{', with db' if bias else ''}", "≤ 1.15×", text, counted]
            )
    for tower, aim in ((small, "≤ 90 s"), (large, "≤ 1500 s")):
        seconds = STEPS[GOAL_TASKS] * steps[tower.name].predicted["cached"].seconds
        lines.append(
            [
                f"{STEPS[GOAL_TASKS]} steps, {tower.name}",
                aim,
                seconds_text(seconds),
                "as a step; no images read, no host",
            ]
        )
    ratio = over_text(*predictions.served_and_plain(predictions.forward_kernels, large, 1, gpu))
    lines.append([f"one image of {large.name}, unseen preference ÷ plain model", "≤ 1.10×", ratio, forward])
    return lines


def device_goals(gpu: str, title: str) -> list[str]:
    introduction = f"""\
### {title}: the goals, predicted

K = {GOAL_TASKS}, {BATCH} images unless said. Each figure in italics is **predicted** from counted kernels for this GPU
alone, none is measured. It is ±{UNCERTAINTY:.0%}, in brackets: of a ratio, ±{UNCERTAINTY:.0%} of what the parts of the
two differ by, because what is alike in both is off alike. Not predicted are the steps under 6 and 3.5 GiB, the
layer-wise AdaMerging computation, data-free runs, and how well `auto` chooses: they hang on what is not counted."""
    return [introduction, *table(["goal", "to reach", "*predicted*", "counted"], goal_lines(gpu), 4)]
