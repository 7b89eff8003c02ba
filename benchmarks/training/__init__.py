"""The training suite: one optimiser step of a whole vision transformer, beside what else could be done."""
