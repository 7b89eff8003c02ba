"""How good a model is: evaluation, indicators, comparisons, reports and figures."""
