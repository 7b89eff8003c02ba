"""Checkpoints damaged at random, and readers that have to give an error or the right answer."""
