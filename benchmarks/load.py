"""Load of many users on a running server, with every answer checked. Each is compared with the user's own merged model.

    pareto-merging serve folded.safetensors --port 8000
    python -m benchmarks.load http://127.0.0.1:8000 folded.safetensors

Three phases. *Sustainable*: a few users, each sending the next request when the last is answered. *Overload*: requests
at ten times that rate, sent on time whether or not earlier ones are answered; the server is to refuse with a 503 what
it has no room for. *Recovery*: the few users again. The answers are compared with ``merge(model, γ)``, plain merged
models computed here from the same file, without the server's engine. Nothing may be lost: every request gets a 200 or
a 503.
"""

import argparse
import asyncio
import base64
import io
import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from pareto_merging.errors import UserError
from pareto_merging.model.files import load_folded, load_heads
from pareto_merging.model.fold import merge
from pareto_merging.preferences import dirichlet, one_hot_preferences
from pareto_merging.serving import Engine
from pareto_merging.system.tables import print_table

SECONDS_TO_ANSWER = 60.0
# open at a time from one process: more would wait in the system's buffers, and some be reset there
CONNECTIONS = 512


@dataclass(frozen=True)
class Case:
    """A prepared request, and what its own merged model answers: features [dim] or probabilities [classes]."""

    path: str
    body: bytes
    expected: NDArray[np.float32]


@dataclass
class Phase:
    """What came of the requests of one phase. Latencies in seconds, of the answers with status 200.

    ``held_back``: requests that were due and not sent, because every connection waited for an answer.
    """

    name: str
    wanted_rate: float = 0.0
    seconds: float = 0.0
    statuses: Counter[str] = field(default_factory=Counter)
    mixed_up: int = 0
    held_back: int = 0
    worst_error: float = 0.0
    latencies: list[float] = field(default_factory=list)

    @property
    def sent(self) -> int:
        return sum(self.statuses.values())

    @property
    def lost(self) -> int:
        """Return requests that got neither an answer nor a refusal."""
        return self.sent - self.statuses["200"] - self.statuses["503"]

    @property
    def rate(self) -> float:
        """Return requests sent per second."""
        return self.sent / self.seconds if self.seconds else 0.0

    @property
    def answered_rate(self) -> float:
        return self.statuses["200"] / self.seconds if self.seconds else 0.0

    def percentile(self, percent: float) -> float:
        """Return a percentile of the latencies, in milliseconds; 0 without any."""
        return float(np.percentile(self.latencies, percent)) * 1000 if self.latencies else 0.0

    def add(self, other: "Phase") -> None:
        """Count another client's share of the same phase."""
        self.seconds = max(self.seconds, other.seconds)
        self.statuses += other.statuses
        self.mixed_up += other.mixed_up
        self.held_back += other.held_back
        self.worst_error = max(self.worst_error, other.worst_error)
        self.latencies += other.latencies

    def to_json(self) -> dict[str, Any]:
        values = {**vars(self), "statuses": dict(self.statuses)}
        del values["latencies"]
        derived = {name: getattr(self, name) for name in ("sent", "lost", "rate", "answered_rate")}
        return {**values, **derived, **{f"p{p}_ms": round(self.percentile(p), 2) for p in (50, 95, 99)}}


def prepare(
    folded: Path, *, preferences: int = 12, images: int = 4, seed: int = 0, tolerance: float = 1e-3
) -> list[Case]:
    """Prepare requests of random images and preferences. Each task alone comes first; half of them are to classify.

    Of preferences whose features are too alike for ``tolerance`` one is taken. ValueError: fewer than two are left.
    """
    model, heads = load_folded(folded), load_heads(folded)
    # only how an image becomes a tensor; what becomes of the tensor is computed below
    engine = Engine(folded, device="cpu")
    names, tasks = list(heads), len(engine.task_names)
    rng = np.random.default_rng(seed)
    shape = (engine.image_size, engine.image_size, 3)
    pictures = [Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)) for _ in range(images)]
    batch = torch.stack([engine.preprocess(picture) for picture in pictures])
    gammas = [*one_hot_preferences(tasks), *dirichlet(tasks, preferences, seed=seed)][:preferences]
    embeddings: list[Case] = []
    classifications = []
    for number, gamma in enumerate(gammas):
        with torch.inference_mode():
            features = merge(model, gamma)(batch).float()
        for row, picture in zip(features, pictures, strict=True):
            expected = row.numpy()
            if any(_error(expected, case.expected) <= 2 * tolerance for case in embeddings):
                continue
            buffer = io.BytesIO()
            picture.save(buffer, "PNG")
            encoded = base64.b64encode(buffer.getvalue()).decode()
            request: dict[str, Any] = {"image": encoded, "preference": gamma.tolist()}
            embeddings.append(Case("/embed", json.dumps(request).encode(), expected))
            if names:
                task = names[number % len(names)]
                request |= {"task": task, "top": heads[task].weight.shape[0]}
                chances = heads[task](row[None])[0].softmax(dim=-1)
                classifications.append(Case("/classify", json.dumps(request).encode(), chances.detach().numpy()))
    if len(embeddings) < 2:
        raise ValueError(f"tolerance: expected one that tells two preferences apart, got {tolerance}")
    return embeddings + classifications


def _error(answer: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    """Return the largest difference, relative to the largest expected number. Inf for another length or a NaN."""
    if answer.shape != expected.shape:
        return float("inf")
    error = float(np.abs(answer - expected).max() / np.abs(expected).max())
    return error if error == error else float("inf")


def _numbers(answer: dict[str, Any], classes: int) -> NDArray[np.float32]:
    if "embedding" in answer:
        return np.array(answer["embedding"], dtype=np.float32)
    values = np.full(classes, np.nan, dtype=np.float32)
    for entry in answer["classes"]:
        values[entry["index"]] = entry["probability"]
    return values


class Client:
    """Open connections to one server, used again when free. UserError for anything but http://HOST:PORT.

    It can send thousands a second; general clients spend milliseconds a request once hundreds are under way.
    """

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme != "http" or not parts.hostname or parts.path not in ("", "/"):
            raise UserError(f"url: expected http://HOST:PORT, got {url}")
        self._host, self._port = parts.hostname or "127.0.0.1", parts.port or 80
        self._free: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def post(self, path: str, body: bytes) -> tuple[int, bytes]:
        """Status and body of the answer to a JSON request. Raises OSError, EOFError or TimeoutError without one."""
        async with asyncio.timeout(SECONDS_TO_ANSWER):
            reader, writer = self._free.pop() if self._free else await asyncio.open_connection(self._host, self._port)
            try:
                head = f"POST {path} HTTP/1.1\r\nhost: {self._host}\r\ncontent-type: application/json\r\n"
                writer.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
                answer = (await reader.readuntil(b"\r\n\r\n")).lower()
                length = answer.partition(b"content-length:")[2].partition(b"\r\n")[0]
                content = await reader.readexactly(int(length))
            except BaseException:
                writer.close()
                raise
        if b"connection: close" in answer:
            writer.close()
        else:
            self._free.append((reader, writer))
        return int(answer[9:12]), content

    def close(self) -> None:
        """Close the connections that are free."""
        for _, writer in self._free:
            writer.close()


async def send(client: Client, case: Case, phase: Phase, tolerance: float) -> None:
    """Send one request and count what comes of it in ``phase``."""
    start = time.perf_counter()
    try:
        status, content = await client.post(case.path, case.body)
    except (OSError, EOFError, TimeoutError) as error:
        phase.statuses[type(error).__name__] += 1
        return
    phase.statuses[str(status)] += 1
    if status == 200:
        phase.latencies.append(time.perf_counter() - start)
        difference = _error(_numbers(json.loads(content), len(case.expected)), case.expected)
        phase.worst_error = max(phase.worst_error, difference)
        phase.mixed_up += difference > tolerance


async def _closed_loop(
    url: str, cases: Sequence[Case], phase: Phase, users: int, seconds: float, tolerance: float
) -> None:
    """Let ``users`` each send their next request when the last is answered."""
    client = Client(url)

    async def user(rng: np.random.Generator) -> None:
        while time.perf_counter() < start + seconds:
            await send(client, cases[int(rng.integers(len(cases)))], phase, tolerance)

    start = time.perf_counter()
    await asyncio.gather(*(user(np.random.default_rng(number)) for number in range(users)))
    phase.seconds = time.perf_counter() - start
    client.close()


async def _open_loop(
    url: str, cases: Sequence[Case], phase: Phase, seconds: float, tolerance: float, seed: int
) -> None:
    client, rng = Client(url), np.random.default_rng(seed)
    start = time.perf_counter()
    open_requests: set[asyncio.Task[None]] = set()
    number = 0
    # a client that cannot keep up sends fewer, which the table shows
    while (now := time.perf_counter() - start) < seconds:
        await asyncio.sleep(max(0.0, number / phase.wanted_rate - now))
        number += 1
        if len(open_requests) >= CONNECTIONS:
            phase.held_back += 1
            continue
        task = asyncio.create_task(send(client, cases[int(rng.integers(len(cases)))], phase, tolerance))
        open_requests.add(task)
        task.add_done_callback(open_requests.discard)
    phase.seconds = time.perf_counter() - start
    await asyncio.gather(*open_requests)
    client.close()


def open_loop(url: str, cases: Sequence[Case], rate: float, seconds: float, tolerance: float, seed: int = 0) -> Phase:
    """Send ``rate`` requests a second, on time whatever becomes of the earlier ones."""
    phase = Phase("overload", wanted_rate=rate)
    asyncio.run(_open_loop(url, cases, phase, seconds, tolerance, seed))
    return phase


def run_load(
    url: str,
    cases: Sequence[Case],
    *,
    users: int = 8,
    seconds: float = 5.0,
    factor: float = 10.0,
    clients: int = 1,
    tolerance: float = 1e-3,
) -> list[Phase]:
    """Run the three phases, the overload at ``factor`` times the sustainable rate. UserError: nothing was answered."""
    calm, storm, after = Phase("sustainable"), Phase("overload"), Phase("recovery")
    asyncio.run(_closed_loop(url, cases, calm, users, seconds, tolerance))
    if not calm.statuses["200"]:
        got = ", ".join(f"{count} × {kind}" for kind, count in calm.statuses.items()) or "nothing"
        raise UserError(f"{url}: expected a server of that file to answer, got {got}")
    storm.wanted_rate = factor * calm.answered_rate
    arguments = (url, cases, storm.wanted_rate / clients, seconds, tolerance)
    if clients == 1:
        storm = open_loop(*arguments)
    else:
        # where one process cannot send so many
        with ProcessPoolExecutor(clients, mp_context=get_context("spawn")) as pool:
            for share in [pool.submit(open_loop, *arguments, seed) for seed in range(clients)]:
                storm.add(share.result())
    asyncio.run(_closed_loop(url, cases, after, users, seconds, tolerance))
    return [calm, storm, after]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a table; 0 if nothing was lost or mixed up, 1 otherwise."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", help="a running server: http://127.0.0.1:8000")
    parser.add_argument("folded", type=Path, help="the file it serves")
    parser.add_argument("--users", type=int, default=8, help="that send one request after the other")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each phase")
    parser.add_argument("--factor", type=float, default=10.0, help="overload, in sustainable rates")
    parser.add_argument("--clients", type=int, default=1, help="processes that overload")
    parser.add_argument("--preferences", type=int, default=12, help="different ones to ask for")
    parser.add_argument(
        "--tolerance", type=float, default=1e-3, help="relative error of an answer; 0.05 for a server in bfloat16"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args(arguments)
    try:
        cases = prepare(options.folded, preferences=options.preferences, tolerance=options.tolerance)
        phases = run_load(
            options.url,
            cases,
            users=options.users,
            seconds=options.seconds,
            factor=options.factor,
            clients=options.clients,
            tolerance=options.tolerance,
        )
    except (UserError, ValueError) as error:
        print(f"load: {error}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps([phase.to_json() for phase in phases]))
    else:
        head = ["phase", "sent", "per second", "200", "503", "lost", "mixed up", "p50 ms", "p95 ms", "p99 ms", "error"]
        head.append("held back")
        rows = [
            [
                *(phase.name, str(phase.sent), f"{phase.rate:.1f}"),
                *(str(phase.statuses["200"]), str(phase.statuses["503"]), str(phase.lost), str(phase.mixed_up)),
                *(f"{phase.percentile(p):.1f}" for p in (50, 95, 99)),
                *(f"{phase.worst_error:.1e}", str(phase.held_back)),
            ]
            for phase in phases
        ]
        print_table(f"{options.url}: {len(cases)} different requests", head, rows)
        for phase in phases:
            kinds = {kind: count for kind, count in phase.statuses.items() if kind not in ("200", "503")}
            if kinds:
                print(f"{phase.name}: lost: {', '.join(f'{count} × {kind}' for kind, count in kinds.items())}")
    return int(any(phase.lost or phase.mixed_up for phase in phases))


if __name__ == "__main__":
    sys.exit(main())
