"""Configurations on trial, and configuration files in use, instead of those of the library."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from pmkernels import dispatch
from pmkernels.configs import Asked, Config, Entry


@contextmanager
def trial(op: str, config: Config | None) -> Iterator[None]:
    """Launch ``op`` with ``config``; None: as configured."""
    before = dispatch.in_force()

    def forced(asked: Asked, entry: Entry) -> Config:
        if config is not None and asked.op == op:
            return config
        return entry.config if before.launch is None else before.launch(asked, entry)

    with dispatch.using(replace(before, launch=forced)):
        yield


@contextmanager
def active(name: str, text: str | None = None) -> Iterator[None]:
    """Use the configuration file ``name`` on every device; with ``text``, that is what it says."""
    files = {**dispatch.in_force().files, **({} if text is None else {name: text})}
    with dispatch.using(replace(dispatch.in_force(), files=files, file=name)):
        yield
