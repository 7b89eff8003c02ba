"""The version is said in one place, installed or not."""

import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import yaml

import pareto_merging
from pareto_merging.version import VERSION

ROOT = Path(__file__).parent.parent.parent


def test_what_is_installed_says_the_same() -> None:
    assert pareto_merging.__version__ == VERSION == version("pareto-merging")


def test_a_source_tree_that_is_not_installed_knows_it(tmp_path: Path) -> None:
    shutil.copytree(
        ROOT / "pareto_merging",
        tmp_path / "pareto_merging",
        ignore=lambda folder, names: [name for name in names if name not in ("__init__.py", "version.py")],
    )
    # -S: without site-packages
    command = [sys.executable, "-S", "-c", "import pareto_merging; print(pareto_merging.__version__)"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == f"{VERSION}\n"


def test_setup_reads_it() -> None:
    done = subprocess.run(
        [sys.executable, "setup.py", "--version"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == VERSION


def test_how_to_cite_says_it() -> None:
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == VERSION
