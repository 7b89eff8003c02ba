"""The version of the package, in one place: ``setup.py``, written files and ``__version__`` read it here."""

VERSION = "0.1.0"
