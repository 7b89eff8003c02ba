"""Pareto Merging and the methods it is compared with: one file each, one interface.

``merge(pretrained, finetuned, …) -> Merged``: the weights as :func:`pareto_merging.parametrize` takes them; what a
method needs beyond them (``tasks``: unlabelled images and heads, ``training``: labelled ones, hyper-parameters) are
keyword arguments of the same names everywhere. ``merged.model(gamma)`` is a plain module of the pretrained class.

Each file ends in its ``METHOD`` (or ``VARIANTS``): the name, what it needs, what there is to choose. The table of all
is :mod:`pareto_merging.methods.registry`, where another can be added from outside.
"""
