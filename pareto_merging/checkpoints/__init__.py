"""Others' weights are read as data and written here. No model is known in this room."""
