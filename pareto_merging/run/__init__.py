"""A configuration carried out: planned, trained, exported, in one run folder."""
