"""Others' weights in and out: files read as data and written; no model is known here."""
