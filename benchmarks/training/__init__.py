"""The training suite: one optimiser step of a vision transformer, beside other ways."""
