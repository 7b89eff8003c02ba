"""The serving suite: requests with preferences of their own, answered from one folded model."""
