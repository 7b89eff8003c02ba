"""Requests of several users in one batch: nothing mixed up, and only the item to blame fails."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from support.servers import (
    Controlled,
    Running,
    encoded,
    merged_features,
    near,
    running,
)
from torch import Tensor

from pareto_merging.model.files import load_heads
from pareto_merging.serving import Engine, inputs, queries
from pareto_merging.serving.limits import Limits


def test_users_in_one_batch_get_their_own_models(folded: Path) -> None:
    gammas = [[k / 10, 1 - k / 10, 0.0] for k in range(11)]
    with running(folded) as server, ThreadPoolExecutor(11) as pool:
        server.engine.go.clear()
        first = pool.submit(server.post, "/embed")
        server.wait_for_pending(1)
        futures = [
            pool.submit(server.post, "/embed", image=encoded(k), preference=gamma) for k, gamma in enumerate(gammas[:5])
        ] + [
            pool.submit(server.post, "/classify", task="DTD", image=encoded(k), preference=gammas[k], top=5)
            for k in range(5, 10)
        ]
        server.wait_for_pending(11)
        server.engine.go.set()
        assert first.result().status_code == 200
        answers = [future.result().json() for future in futures]
        assert max(server.engine.batches) > 1
    head = load_heads(folded)["DTD"]
    for k, answer in enumerate(answers):
        expected = merged_features(folded, gammas[k], k)
        if k < 5:
            assert near(answer["embedding"], expected)
        else:
            chances = head(expected[None])[0].softmax(-1)
            assert near([entry["probability"] for entry in answer["classes"]], chances.sort(descending=True).values)


def test_only_the_item_to_blame_fails(folded: Path) -> None:
    def blame(gammas: Tensor) -> None:
        if bool((gammas[:, 0] == 1).any()):
            raise RuntimeError("secret")

    with running(folded) as server, ThreadPoolExecutor(5) as pool:
        server.engine.before = blame
        server.engine.go.clear()
        futures = [pool.submit(server.post, "/embed", preference=f"MNIST={value}") for value in (0, 0.5, 1, 0.7, 0.2)]
        server.wait_for_pending(5)
        server.engine.go.set()
        answers = [future.result() for future in futures]
        assert [answer.status_code for answer in answers] == [200, 200, 500, 200, 200]
        assert "secret" not in answers[2].text and answers[2].json()["detail"].startswith("model: expected")
        assert near(answers[1].json()["embedding"], merged_features(folded, [0.5, 0.25, 0.25]))
        assert server.post("/embed", preference="MNIST=1").status_code == 500
        assert server.client.get("/health").json() == {"status": "failing"}
        assert server.post("/embed").status_code == 200
        assert server.client.get("/health").status_code == 200


@pytest.mark.parametrize("path", ["/embed", "/classify"])
def test_numbers_that_are_not_finite(folded: Path, path: str) -> None:
    def spoil(gammas: Tensor, features: Tensor) -> Tensor:
        return torch.where(gammas[:, :1] == 1, torch.nan, features)

    task = {"task": "MNIST"} if path == "/classify" else {}
    with running(folded) as server, ThreadPoolExecutor(3) as pool:
        server.engine.after = spoil
        server.engine.go.clear()
        futures = [pool.submit(server.post, path, preference=f"MNIST={value}", **task) for value in (0, 1, 0.5)]
        server.wait_for_pending(3)
        server.engine.go.set()
        answers = [future.result() for future in futures]
    assert [answer.status_code for answer in answers] == [200, 500, 200]
    assert answers[1].json()["detail"] == "model: expected finite numbers, got NaN or inf"


def test_a_model_that_takes_one_preference_at_a_time(folded: Path) -> None:
    class Single(Controlled):
        per_item = False

        def features(self, images: Tensor, gamma: Tensor) -> Tensor:
            assert gamma.ndim == 1
            return super().features(images, gamma)

    server = Running(Single(Engine(folded, "cpu")), Limits())
    try:
        with ThreadPoolExecutor(5) as pool:
            server.engine.go.clear()
            values = (0, 0.5, 1, 0.5, 0.2)
            futures = [pool.submit(server.post, "/embed", preference=f"MNIST={value}") for value in values]
            server.wait_for_pending(5)
            server.engine.go.set()
            answers = [future.result().json() for future in futures]
    finally:
        server.stop()
    for value, answer in zip(values, answers, strict=True):
        assert near(answer["embedding"], merged_features(folded, [value, (1 - value) / 2, (1 - value) / 2]))


def test_a_preference_is_looked_at_once_where_it_comes_in(folded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []
    with running(folded) as server:
        for module in (inputs, queries):
            check = module.check_preference
            monkeypatch.setattr(module, "check_preference", lambda *a, _c=check, **b: seen.append(a) or _c(*a, **b))
        assert server.post("/embed", preference=[0.2, 0.3, 0.5]).status_code == 200
    assert len(seen) == 1
