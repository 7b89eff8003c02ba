"""The methods Pareto Merging is compared with: one file each, one interface.

``merge(pretrained, finetuned, …) -> nn.Module``: a new module of the pretrained class. What a method needs beyond the
weights (unlabelled tasks, a coefficient) are its keyword arguments.
"""
