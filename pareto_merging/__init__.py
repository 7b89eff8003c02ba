"""Pareto Merging: one run, and the best merged model for any preference."""
