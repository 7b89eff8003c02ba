"""The version of the package, read from here by code, files and setup.py."""

VERSION = "0.1.0"
