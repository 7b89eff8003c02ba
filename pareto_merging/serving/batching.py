"""From requests to answers: batches formed by ``batched``.

Images are decoded in a few threads, and the model computes in a thread of its own.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import batched.aio  # type: ignore[import-untyped]
import torch
from prometheus_client import CollectorRegistry, Counter, Histogram
from torch import Tensor

from pareto_merging.serving.engine import Engine
from pareto_merging.serving.limits import Limits
from pareto_merging.serving.queries import Query

logger = logging.getLogger(__name__)

BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


class Item(NamedTuple):
    """One image [3, H, W], and what is asked of it."""

    image: Tensor
    query: Query


class NotFinite(ArithmeticError):
    """The model's features of one image are not finite numbers."""


# features [dim]; or the classes with their probabilities, most probable first
Answer = list[float] | list[tuple[int, float]]


class Batcher:
    """Runs items through the engine in batches. Made and used within one event loop.

    A batch that fails is computed again one by one, so that only the item to blame fails.
    """

    def __init__(self, engine: Engine, limits: Limits, registry: CollectorRegistry) -> None:
        self._engine = engine
        self._model = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._decoders = ThreadPoolExecutor(limits.decoders, thread_name_prefix="decode")
        self._warm: Future[None] | None = None
        size = min(limits.max_batch, engine.max_batch)
        self._submit = batched.aio.dynamically(self._compute, batch_size=size, timeout_ms=limits.wait)
        self._sizes = Histogram(
            "pareto_merging_batch_size", "Images in a batch.", buckets=BATCH_SIZES, registry=registry
        )
        self._seconds = Histogram("pareto_merging_batch_seconds", "Seconds to compute a batch.", registry=registry)
        self._failures = Counter("pareto_merging_failed_batches", "Batches computed one by one.", registry=registry)
        # the last batch failed entirely: after some CUDA errors no later one can succeed
        self.failing = False

    async def decode(self, function: Callable[..., Item], *arguments: object) -> Item:
        """Call ``function(*arguments)`` in one of the decoding threads."""
        return await asyncio.get_running_loop().run_in_executor(self._decoders, function, *arguments)

    async def __call__(self, item: Item) -> Answer:
        """Answer one item, computed together with others. Raises NotFinite, and what the engine raised for it."""
        answer: Answer | Exception = await self._submit(item)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def warm_up(self, progress: bool = False) -> Future[None]:
        """Warm the engine up in the thread that will use it, once."""
        if self._warm is None:
            self._warm = self._model.submit(self._engine.warm_up, progress=progress)
        return self._warm

    def close(self) -> None:
        """End the threads after what they have begun, without waiting: an engine may hang."""
        self._decoders.shutdown(wait=False, cancel_futures=True)
        self._model.shutdown(wait=False, cancel_futures=True)

    async def _compute(self, items: list[Item]) -> list[Answer | Exception]:
        return await asyncio.get_running_loop().run_in_executor(self._model, self._answers, items)

    def _answers(self, items: Sequence[Item]) -> list[Answer | Exception]:
        start = time.perf_counter()
        try:
            answers = self._answer_together(items)
            self.failing = False
        except Exception:
            self._failures.inc()
            logger.exception("a batch of %d failed; its items are computed one by one", len(items))
            answers = [self._answer_alone(item) for item in items]
            self.failing = all(isinstance(answer, Exception) for answer in answers)
        self._sizes.observe(len(items))
        self._seconds.observe(time.perf_counter() - start)
        return answers

    def _answer_alone(self, item: Item) -> Answer | Exception:
        try:
            return self._answer_together([item])[0]
        except Exception as error:
            return error

    def _answer_together(self, items: Sequence[Item]) -> list[Answer | Exception]:
        answers: list[Answer | Exception] = [NotFinite("model: expected finite numbers, got NaN or inf")] * len(items)
        with torch.inference_mode():
            features = self._features(items)
            for task in {item.query.task for item in items}:
                rows = [n for n, item in enumerate(items) if item.query.task == task]
                classes: list[list[int]] = [[]] * len(rows)
                if task is None:
                    values = features[rows].float()
                else:
                    most = max(items[n].query.top for n in rows)
                    values = self._engine.heads[task](features[rows]).softmax(dim=-1)
                    values, indices = values.topk(min(most, values.shape[-1]))
                    classes = indices.tolist()
                finite = values.isfinite().all(dim=-1).tolist()
                for n, good, row, best in zip(rows, finite, values.tolist(), classes, strict=True):
                    if good:
                        answers[n] = row if task is None else list(zip(best, row, strict=True))[: items[n].query.top]
        return answers

    def _features(self, items: Sequence[Item]) -> Tensor:
        """Compute features [n, dim], in one batch where the model takes a preference per item."""
        images = torch.stack([item.image for item in items])
        gammas = torch.stack([item.query.preference for item in items])
        if self._engine.per_item:
            return self._engine.features(images, gammas)
        features: list[Tensor] = [images] * len(items)
        for gamma in gammas.unique(dim=0):
            rows = (gammas == gamma).all(dim=1).nonzero()[:, 0]
            for n, row in zip(rows.tolist(), self._engine.features(images[rows], gamma), strict=True):
                features[n] = row
        return torch.stack(features)
