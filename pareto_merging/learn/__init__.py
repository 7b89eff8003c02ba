"""How a Pareto set is learned: objectives, the exact gradient, the loop and its guards."""
