"""Tasks: their images, their heads, and the embedded suite."""
