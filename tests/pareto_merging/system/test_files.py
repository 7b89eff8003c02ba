"""Files are written whole or not at all."""

import json
from pathlib import Path

import pytest

from pareto_merging.system import files


def test_atomic_writes_leave_the_old_file_or_none(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file.json"
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.write_json(path, {"a": float("nan")})
    assert not path.exists()
    files.write_json(path, {"a": 1})
    before = path.read_text()

    def fail_halfway() -> None:
        with files.atomic_path(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError("halfway")

    with pytest.raises(RuntimeError, match="halfway"):
        fail_halfway()
    assert path.read_text() == before
    assert [p.name for p in path.parent.iterdir()] == ["file.json"]
    assert json.loads(before) == {"a": 1}
    assert path.stat().st_mode & 0o044
