"""The server's process: silent connections, mistakes in one line, and nothing lost when it stops."""

import contextlib
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from support.servers import (
    WAIT,
    Controlled,
    Running,
    encoded,
    merged_features,
    near,
    running,
)

from pareto_merging.cli.app import main
from pareto_merging.serving import Engine
from pareto_merging.serving.limits import Limits
from pareto_merging.serving.server import bind


def test_silent_connections_are_closed(folded: Path) -> None:
    with running(folded, idle=0.1) as server, server.connect() as nothing, server.connect() as half:
        half.sendall(b"GET /health HTTP/1.1\r\nhost:")
        assert nothing.recv(1) == b"" and half.recv(1) == b""
        assert server.client.get("/health").status_code == 200


def test_stopping_answers_what_was_accepted(folded: Path) -> None:
    server = Running(Controlled(Engine(folded, "cpu")), Limits())
    values = (0, 0.1, 0.5, 0.9)
    with ThreadPoolExecutor(4) as pool, server.connect() as kept:
        server.engine.go.clear()
        kept.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
        assert kept.recv(12) == b"HTTP/1.1 200"
        futures = [pool.submit(server.post, "/embed", preference=f"MNIST={value}") for value in values]
        server.wait_for_pending(4)
        server.server.handle_exit(signal.SIGTERM, None)
        kept.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
        rest = kept.makefile("rb").read()
        assert b"HTTP/1.1 503" in rest and b'{"status":"stopping"}' in rest
        # the connection that was open is closed now, and no other one is taken
        with pytest.raises(ConnectionRefusedError):
            server.connect()
        assert server.service.gate.pending == 4 and server.thread.is_alive()
        server.engine.go.set()
        answers = [future.result() for future in futures]
        server.thread.join(WAIT)
    assert not server.thread.is_alive()
    assert server.service.gate.answered == 4 and server.service.gate.cut_off == 0
    for value, answer in zip(values, answers, strict=True):
        assert answer.status_code == 200
        assert near(answer.json()["embedding"], merged_features(folded, [value, (1 - value) / 2, (1 - value) / 2]))
    server.client.close()


def test_stopping_does_not_wait_for_ever(folded: Path) -> None:
    server = Running(Controlled(Engine(folded, "cpu")), Limits(shutdown=1))
    with ThreadPoolExecutor(1) as pool:
        server.engine.go.clear()
        future = pool.submit(server.post, "/embed")
        server.wait_for_pending(1)
        server.server.handle_exit(signal.SIGTERM, None)
        answer = future.result()
        assert answer.status_code == 503
        assert answer.json()["detail"] == "server: expected to answer in time, but it is stopping"
        server.engine.go.set()
        server.thread.join(WAIT)
    assert not server.thread.is_alive()
    assert server.service.gate.cut_off == 1
    server.client.close()


def serve(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stop:
        main(["serve", *map(str, arguments)])
    return int(stop.value.code or 0)


def test_mistakes_are_one_line(folded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    foreign = tmp_path / "foreign.safetensors"
    foreign.write_bytes(b"hello")
    with bind("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        for arguments, expected in (
            ((folded, "--port", port), f"--port: expected a free port, got {port}, which is in use on 127.0.0.1"),
            ((folded, "--host", "192.0.2.1"), "--host: expected a name or address of this machine, got '192.0.2.1'"),
            ((folded, "--host", "no such host"), "--host: expected a name or address of this machine"),
            ((tmp_path / "none.safetensors", "--port", 0), "none.safetensors: expected"),
            ((foreign, "--port", 0), "foreign.safetensors: expected"),
            ((folded, "--port", 0, "--device", "cuda:99"), "device: expected one that is here, got cuda:99"),
            ((folded, "--port", 0, "--dtype", "int8"), "dtype: expected one of float32"),
            ((folded, "--formats", "PNG,EPS"), "formats: expected formats of PNG"),
            ((folded, "--wait", 0), "wait: expected a value greater than or equal to 0.1, got 0.0"),
        ):
            assert serve(*arguments) == 2
            error = capsys.readouterr().err
            assert expected in error and error.count("\n") == 1


def test_other_machines_are_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert serve(tmp_path / "none", "--host", "0.0.0.0", "--port", 0) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and "warning: 0.0.0.0 can be reached from other machines" in lines[0]


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    assert serve("--help") == 0
    text = capsys.readouterr().out
    for limit in Limits.model_fields:
        assert f"--{limit.replace('_', '-')}" in text


def test_without_the_extra_it_says_so(folded: Path) -> None:
    hidden = "import sys; sys.modules['fastapi'] = None; from pareto_merging.cli.app import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", hidden, "serve", str(folded)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2
    assert done.stderr == (
        "pareto-merging: serve: expected the serve extra (pip install 'pareto-merging[serve]'), got no module named "
        "fastapi\n"
    )


def test_an_interrupt_while_warming_up_is_one_line(folded: Path) -> None:
    endless = (
        "import threading, pareto_merging.serving.engine as engine\n"
        "def warm_up(self, progress):\n    print('warming', flush=True)\n    threading.Event().wait()\n"
        "engine.Engine.warm_up = warm_up\n"
        "from pareto_merging.cli.app import main; main()"
    )
    command = [sys.executable, "-c", endless, "serve", str(folded), "--port", "0", "--device", "cpu"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == "warming\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(WAIT) == 130
        assert process.stderr.read() == "pareto-merging: interrupted\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_end_the_process_with_nothing_lost(folded: Path, number: signal.Signals) -> None:
    command = [sys.executable, "-m", "pareto_merging", "serve", str(folded), "--port", "0", "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    with process:
        line = process.stdout.readline()
        assert line.endswith("  (docs: /docs)\n")
        url = line.split()[0]
        answered = 0
        with httpx.Client(base_url=url, trust_env=False, timeout=WAIT) as client:
            for _ in range(5):
                answered += client.post("/embed", json={"image": encoded()}).status_code == 200
            process.send_signal(number)
            # a client that goes on: refusals only, until there is nobody to ask
            with contextlib.suppress(httpx.TransportError):
                while True:
                    answered += client.post("/embed", json={"image": encoded()}).status_code == 200
        assert process.wait(WAIT) == 0
        assert process.stderr is not None
        error = process.stderr.read()
    assert f"stopped; {answered} requests answered" in error and "Traceback" not in error
