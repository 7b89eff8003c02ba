"""A finished run that the tests of all commands share."""

from pathlib import Path

import pytest
from command_line import run
from support.run_folders import write_config


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    config = write_config(folder / "run.yaml")
    assert run("train", config, "--out", folder / "run", "--quiet") == 0
    return folder / "run"
