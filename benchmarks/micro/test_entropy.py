"""softmax_entropy of a batch of logits, alone and with the gradient of the logits."""

import functools

import pmkernels
from benchmarks.micro import cases
from benchmarks.micro.cases import Case, LogitsPoint, Measure, offers
from pmkernels import reference
from pmkernels.costs import Bound


@offers("auto", "fused", "eager")
def test_entropy(measure: Measure, logits_point: LogitsPoint) -> None:
    point = logits_point
    logits = point.make(cases.Source(point.device))
    measure(
        Case(
            "softmax entropy",
            point.name,
            run=lambda: [pmkernels.softmax_entropy(logits, strategy=point.strategy)],
            plain=lambda: [reference.softmax_entropy(logits)],
            truth=lambda: [reference.softmax_entropy(logits.double())],
            least=Bound(0.0, logits.numel() * logits.element_size()),
            dtype=point.dtype,
            choice=cases.one_kernel(point.strategy, {"logits": logits}),
        )
    )


@offers("auto", "fused", "eager")
def test_entropy_and_gradient(measure: Measure, logits_point: LogitsPoint) -> None:
    point, source = logits_point, cases.Source(logits_point.device)
    values = {"logits": point.make(source)}
    logits, grad = values["logits"], source.normal(point.rows)
    ours = functools.partial(pmkernels.softmax_entropy, strategy=point.strategy)
    theirs = functools.partial(cases.forward_and_backward, reference.softmax_entropy)
    measure(
        Case(
            "softmax entropy and gradient",
            point.name,
            run=lambda: cases.forward_and_backward(ours, values, ["logits"], grad),
            plain=lambda: theirs(values, ["logits"], grad),
            truth=lambda: theirs(cases.exactly(values), ["logits"], grad),
            # read forward and backward, written once
            least=Bound(0.0, 3.0 * logits.numel() * logits.element_size()),
            dtype=point.dtype,
            choice=cases.one_kernel(point.strategy, values),
        )
    )
