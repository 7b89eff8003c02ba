"""The command line starts at once: importing it, or asking for help, loads nothing that computes."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = ("torch", "triton", "numpy", "scipy", "sklearn", "matplotlib", "pymoo", "moocore", "open_clip", "fastapi")
COMMANDS = ["", "demo", "train", "evaluate", "convert", "export", "plan", "serve"]


def measured(arguments: list[str]) -> tuple[set[str], float]:
    """Return the heavy modules that a fresh process loads, and its seconds of CPU time."""
    code = (
        "import json, os, sys\n"
        "import pareto_merging.cli\n"
        "sys.argv = ['pareto-merging', *sys.argv[1:]]\n"
        "try:\n    len(sys.argv) == 1 or pareto_merging.cli.main()\n"
        "except SystemExit as stop:\n    assert not stop.code, stop.code\n"
        "print(json.dumps([[*sys.modules], sum(os.times()[:2])]), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    modules, seconds = json.loads(done.stderr)
    return set(HEAVY) & set(modules), seconds


def test_importing_it_loads_nothing_that_computes() -> None:
    assert measured([])[0] == set()


@pytest.mark.parametrize("command", COMMANDS)
def test_help_answers_at_once(command: str) -> None:
    heavy, seconds = measured([*filter(None, [command]), "--help"])
    assert heavy == set()
    # 0.3 on an idle machine; PyTorch alone takes two
    assert seconds < 1
