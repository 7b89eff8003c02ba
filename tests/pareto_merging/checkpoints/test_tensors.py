"""Shards that their index names, and those it must not."""

import json
from pathlib import Path

import pytest
from support import hf_files

from pareto_merging.checkpoints.checkpoint import open_checkpoint
from pareto_merging.errors import UserError

pytest.importorskip("open_clip")
pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("no_network")


@pytest.mark.parametrize("weights", ["safetensors", "bin"])
def test_a_shard_is_missing(weights: str, tmp_path: Path) -> None:
    folder = hf_files.huggingface_folder(tmp_path / "model", kind="clip", weights=weights, shards=True)
    shards = sorted(folder.glob(f"*-of-*.{weights}"))
    assert len(shards) > 2
    shards[1].unlink()
    with pytest.raises(UserError, match=rf"{shards[1].name}") as raised:
        dict(open_checkpoint(folder))
    assert "\n" not in str(raised.value)


def test_an_index_does_not_lead_out_of_its_folder(tmp_path: Path) -> None:
    folder = hf_files.huggingface_folder(tmp_path / "model", shards=True)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    shard = sorted(set(index["weight_map"].values()))[0]
    (folder / shard).rename(tmp_path / shard)
    index["weight_map"] = {k: f"../{v}" if v == shard else v for k, v in index["weight_map"].items()}
    path.write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"index\.json"):
        open_checkpoint(folder)
