"""A Pareto model: its layers, what they are made of, and how they are computed."""

# they register themselves with pareto_merging.model.convert
from pareto_merging.model import attention as attention
from pareto_merging.model import linear as linear
