"""A server in a process of its own under ten times its load: nothing lost, nothing mixed up, and it recovers."""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.request import urlopen

import numpy as np
import pytest
import torch
from helpers import noisy_copy, randomize

from benchmarks import load
from pareto_merging.checkpoints import encoders
from pareto_merging.model.files import save_folded
from pareto_merging.model.parametrize import parametrize

TOLERANCE = 1e-3
TASKS = ("left", "right", "up")


@pytest.fixture(scope="module")
def folded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that takes a few milliseconds an image, so that one process can send ten times what it computes."""
    description = {
        "arguments": {
            "image_size": 32,
            "patch_size": 4,
            "width": 256,
            "layers": 6,
            "heads": 4,
            "mlp_ratio": 2.0,
            "output_dim": 32,
        }
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = encoders.build(description)
        heads = {name: (torch.randn(10, 32), 10.0) for name in TASKS}
    copies = {name: noisy_copy(model, seed=number) for number, name in enumerate(TASKS)}
    path = tmp_path_factory.mktemp("load") / "folded.safetensors"
    save_folded(randomize(parametrize(model, copies, rank=4)), path, heads=heads, encoder=description)
    return path


@pytest.fixture(scope="module")
def server(folded: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    command = [sys.executable, "-m", "pareto_merging", "serve", str(folded), "--port", "0", "--device", "cpu"]
    command += ["--queue", "16", "--max-batch", "8", "--threads", "1", "--quiet"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.stdout is not None
    try:
        yield process, process.stdout.readline().split()[0]
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def cases(folded: Path) -> list[load.Case]:
    return load.prepare(folded, preferences=6, images=2, tolerance=TOLERANCE)


@pytest.mark.slow
def test_overload_sheds_and_recovers(server: tuple[subprocess.Popen[str], str], cases: list[load.Case]) -> None:
    assert {case.path for case in cases} == {"/embed", "/classify"}
    calm, storm, after = load.run_load(server[1], cases, users=4, seconds=2.0, factor=10.0, tolerance=TOLERANCE)
    for phase in (calm, storm, after):
        assert phase.lost == 0, phase.statuses
        assert phase.mixed_up == 0 and phase.worst_error < TOLERANCE
        assert phase.statuses["200"] > 0
    # four users never fill a queue of sixteen
    assert calm.statuses["503"] == after.statuses["503"] == 0
    assert storm.statuses["503"] > 0
    assert storm.wanted_rate == pytest.approx(10 * calm.answered_rate)


@pytest.mark.slow
def test_the_command_line(
    server: tuple[subprocess.Popen[str], str], folded: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [server[1], str(folded), "--seconds", "0.5", "--preferences", "4", "--users", "2"]
    assert load.main([*arguments, "--json"]) == 0
    phases = json.loads(capsys.readouterr().out)
    assert [phase["name"] for phase in phases] == ["sustainable", "overload", "recovery"]
    assert all(phase["statuses"]["200"] > 0 and phase["lost"] == 0 for phase in phases)
    for url, message in (
        ("http://127.0.0.1:9", "expected a server of that file to answer, got"),
        ("https://example.org", "url: expected http://HOST:PORT, got https://example.org"),
    ):
        assert load.main([url, str(folded), "--seconds", "0.1"]) == 2
        assert message in capsys.readouterr().err
    assert load.main([server[1], str(folded.with_name("none.safetensors"))]) == 2
    assert "no such file" in capsys.readouterr().err


def test_a_client_holds_back_what_its_connections_cannot_take(monkeypatch: pytest.MonkeyPatch) -> None:
    case = load.Case("/embed", b"{}", np.ones(1, dtype=np.float32))

    async def silent() -> load.Phase:
        phase, done = load.Phase("overload", wanted_rate=200.0), asyncio.Event()

        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await done.wait()
            writer.close()

        async with await asyncio.start_server(answer, "127.0.0.1", 0) as listening:
            url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
            asyncio.get_running_loop().call_later(0.4, done.set)
            await load._open_loop(url, [case], phase, 0.3, TOLERANCE, 0)
        return phase

    monkeypatch.setattr(load, "CONNECTIONS", 3)
    phase = asyncio.run(silent())
    assert phase.sent == 3 and phase.held_back > 10


@pytest.mark.slow
def test_stopping_under_load_loses_nothing(server: tuple[subprocess.Popen[str], str], cases: list[load.Case]) -> None:
    process, url = server
    phase = load.Phase("stopping")

    async def until_it_is_gone() -> None:
        client = load.Client(url)
        stopped = asyncio.Event()

        async def user(seed: int) -> None:
            rng = np.random.default_rng(seed)
            # a few answers, then the signal in the middle of everything, then on until nobody listens
            while not phase.statuses["ConnectionRefusedError"]:
                await load.send(client, cases[int(rng.integers(len(cases)))], phase, TOLERANCE)
                if phase.statuses["200"] >= 20 and not stopped.is_set():
                    stopped.set()
                    process.send_signal(signal.SIGTERM)

        await asyncio.gather(*(user(seed) for seed in range(32)))
        client.close()

    before = _answered(url)
    asyncio.run(until_it_is_gone())
    assert process.stderr is not None
    error = process.stderr.read()
    assert process.wait(60) == 0
    # all that the server let in and answered has arrived, and is right
    answered = int(error.partition("stopped; ")[2].split()[0])
    assert phase.statuses["200"] == answered - before >= 20
    assert phase.mixed_up == 0
    assert set(phase.statuses) <= {
        "200",
        "503",
        "ConnectionRefusedError",
        "ConnectionResetError",
        "IncompleteReadError",
    }


def _answered(url: str) -> int:
    with urlopen(f"{url}/metrics") as page:
        lines = page.read().decode().splitlines()
    return sum(
        int(float(line.split()[-1])) for line in lines if line.startswith("pareto_merging_request_seconds_count")
    )


def test_the_check_can_fail(cases: list[load.Case]) -> None:
    embeddings = [case for case in cases if case.path == "/embed"]
    answer = {"embedding": embeddings[0].expected.tolist()}
    errors = [load._error(load._numbers(answer, 0), case.expected) for case in embeddings]
    assert errors[0] < TOLERANCE and min(errors[1:]) > 2 * TOLERANCE
    assert load._error(np.full(32, np.nan, dtype=np.float32), embeddings[0].expected) == np.inf


def test_what_cannot_be_told_apart_is_left_out(folded: Path, cases: list[load.Case]) -> None:
    fewer = load.prepare(folded, preferences=6, images=2, tolerance=0.1)
    assert 2 <= len(fewer) < len(cases)
    with pytest.raises(ValueError, match="tells two preferences apart, got 10"):
        load.prepare(folded, preferences=6, images=2, tolerance=10.0)


def test_a_server_that_mixes_users_up_is_found_out(cases: list[load.Case]) -> None:
    other = load.Case(cases[0].path, cases[0].body, cases[1].expected)

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        body = json.dumps({"embedding": cases[0].expected.tolist()}).encode()
        with contextlib.suppress(asyncio.IncompleteReadError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                await reader.readexactly(int(head.partition(b"content-length:")[2].split()[0]))
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body))
        writer.close()

    async def ask() -> load.Phase:
        phase = load.Phase("one")
        async with await asyncio.start_server(answer, "127.0.0.1", 0) as listening:
            client = load.Client(f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}")
            await load.send(client, cases[0], phase, TOLERANCE)
            assert phase.mixed_up == 0 and phase.statuses["200"] == 1
            await load.send(client, other, phase, TOLERANCE)
            client.close()
        return phase

    assert cases[0].path == cases[1].path == "/embed"
    phase = asyncio.run(ask())
    assert phase.mixed_up == 1 and phase.lost == 0
