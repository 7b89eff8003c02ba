"""Pareto Merging and the methods it is compared with: one file each, one interface.

``merge(pretrained, finetuned, …) -> Merged``: the weights as :func:`pareto_merging.parametrize` takes them; what a
method needs beyond them (``tasks``: unlabelled images and heads, ``training``: labelled ones, hyper-parameters) are
keyword arguments of the same names everywhere. ``merged.model(gamma)`` is a plain module of the pretrained class.

Each file ends in its ``METHOD`` (or ``VARIANTS``): the name, what it needs, what there is to choose. ``FILES`` lists
all, and :mod:`pareto_merging.methods.registry` loads them, where another can be added from outside.
"""

# the file of each method by its name, in the order of tables; help names them all and must not wait for PyTorch
FILES = {
    "individual": "individual",
    "multitask": "multitask",
    "pretrained": "pretrained",
    "weight-averaging": "weight_averaging",
    "fisher": "fisher",
    "regmean": "regmean",
    "task-arithmetic": "task_arithmetic",
    "ties": "ties",
    "dare": "dare",
    "adamerging-task-wise": "adamerging",
    "adamerging": "adamerging",
    "adamerging-fusionbench": "adamerging",
    "adamerging++": "adamerging",
    "adamerging-expert": "adamerging",
    "task-arithmetic-preference": "task_arithmetic_preference",
    "adamerging-preference": "adamerging_preference",
    "pareto-data-free": "data_free",
    "pareto": "pareto",
    "pareto++": "pareto",
    "pareto-closed-form": "expert",
    "pareto-expert": "expert",
    "outer-product-1": "outer_product",
    "outer-product-2": "outer_product",
}
