"""The serving suite: a batch of requests, each with a preference of its own, from one folded model."""
