"""``python -m benchmarks.tables``: write the README's tables from the newest committed results."""

from __future__ import annotations

import json
import re
from pathlib import Path

from benchmarks import digits
from benchmarks.run import RESULTS

README = Path(__file__).parent.parent / "README.md"


def newest(suite: str) -> Path:
    """The newest committed result of a suite; FileNotFoundError if there is none."""
    found = sorted(RESULTS.glob(f"{suite}-*.json"))
    if not found:
        raise FileNotFoundError(f"{RESULTS}: expected a result of suite {suite}, got none")
    return found[-1]


def updated(readme: str) -> str:
    """``readme`` with everything between ``<!-- results:SUITE -->`` and ``<!-- end -->`` made anew."""

    def block(match: re.Match[str]) -> str:
        path = newest(match.group(1))
        report = json.loads(path.read_text())
        where = report["environment"]
        source = (
            f"From [`{path.name}`](benchmarks/results/{path.name}) (`{report['command']}`, {where['cpu']}, "
            f"torch {where['torch']}).\n"
        )
        return f"<!-- results:{match.group(1)} -->\n{digits.markdown(report)}\n{source}<!-- end -->"

    return re.sub(r"<!-- results:(\w+) -->.*?<!-- end -->", block, readme, flags=re.DOTALL)


if __name__ == "__main__":
    README.write_text(updated(README.read_text()))
    print(README)
