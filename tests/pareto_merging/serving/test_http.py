"""The HTTP interface on loopback: right answers, the model card, metrics."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.servers import (
    SIZE,
    TASKS,
    Running,
    encoded,
    merged_features,
    near,
    png,
    running,
)

from pareto_merging.model.files import load_heads
from pareto_merging.serving.queries import EmbedFields

PREFERENCES = [
    ([0.2, 0.3, 0.5], [0.2, 0.3, 0.5]),
    ({"größe": 0.6}, [0.2, 0.2, 0.6]),
    ("DTD=1", [0.0, 1.0, 0.0]),
    ("0.2, 0.3, 0.5", [0.2, 0.3, 0.5]),
    ("[0.2, 0.3, 0.5]", [0.2, 0.3, 0.5]),
    ("equal", [1 / 3] * 3),
    (None, [1 / 3] * 3),
    ([1, 0, 0], [1.0, 0.0, 0.0]),
]


@pytest.mark.parametrize(("preference", "gamma"), PREFERENCES)
def test_embed(shared: Running, folded: Path, preference: Any, gamma: list[float]) -> None:
    answer = shared.post("/embed", preference=preference)
    assert answer.status_code == 200, answer.text
    assert near(answer.json()["embedding"], merged_features(folded, gamma))
    assert answer.json()["preference"] == pytest.approx(dict(zip(TASKS, gamma, strict=True)), abs=1e-6)
    fields = {} if preference is None else {"preference": preference}
    fields = {name: value if isinstance(value, str) else json.dumps(value) for name, value in fields.items()}
    form = shared.client.post("/embed", data=fields, files={"image": png()})
    assert form.status_code == 200, form.text
    assert form.json()["preference"] == answer.json()["preference"]
    assert near(form.json()["embedding"], torch.tensor(answer.json()["embedding"]))


def test_classify(shared: Running, folded: Path) -> None:
    gamma = [0.7, 0.1, 0.2]
    chances = load_heads(folded)["DTD"](merged_features(folded, gamma)[None])[0].softmax(-1)
    for top, count in ((2, 2), (5, 5), (100, 5)):
        answer = shared.post("/classify", task="DTD", preference=gamma, top=top)
        assert answer.status_code == 200, answer.text
        assert answer.json()["task"] == "DTD"
        classes = answer.json()["classes"]
        assert [entry["index"] for entry in classes] == chances.argsort(descending=True)[:count].tolist()
        assert near([entry["probability"] for entry in classes], chances.sort(descending=True).values[:count])
    form = shared.client.post("/classify", data={"task": "DTD", "top": "1", "preference": ""}, files={"image": png()})
    assert len(form.json()["classes"]) == 1


def test_pages(shared: Running) -> None:
    assert shared.client.get("/health").json() == {"status": "ok"}
    assert shared.client.head("/health").status_code == 200
    assert shared.client.get("/redoc").status_code == 404
    card = shared.client.get("/model").json()
    assert [(task["name"], task["classes"]) for task in card["tasks"]] == [("MNIST", 4), ("DTD", 5), ("größe", None)]
    assert card["limits"]["queue"] == 256 and card["image_size"] == SIZE
    assert card["file"]["rank"] == 4
    assert shared.client.get("/docs").status_code == 200
    paths = shared.client.get("/openapi.json").json()["paths"]
    for path in ("/classify", "/embed"):
        content = paths[path]["post"]["requestBody"]["content"]
        assert content["multipart/form-data"]["schema"]["properties"]["image"]["format"] == "binary"
        assert "image" in content["application/json"]["schema"]["required"]
        assert {"200", "408", "413", "415", "422", "500", "503"} <= set(paths[path]["post"]["responses"])
    assert shared.client.get("/classify").status_code == 405
    assert shared.client.post("/nothing", content=b"x").status_code == 404


def test_metrics(folded: Path) -> None:
    with running(folded) as server:
        assert server.post("/embed").status_code == 200
        assert server.post("/embed", preference=[1]).status_code == 422
        server.client.get("/../../etc/passwd")
        text = server.client.get("/metrics").text
    assert 'pareto_merging_requests_total{path="/embed",status="200"} 1.0' in text
    assert 'pareto_merging_requests_total{path="/embed",status="422"} 1.0' in text
    assert 'path="other",status="404"' in text
    assert "pareto_merging_batch_size_count 1.0" in text
    assert "pareto_merging_pending_requests 0.0" in text


def test_a_file_is_not_kept_beside_its_picture(shared: Running) -> None:
    """A server keeps its last batch until the next one comes."""
    item = shared.service._read({"image": encoded()}, EmbedFields)
    assert item.query.image == b"" and item.image.shape == (3, SIZE, SIZE)
