"""The server's process: uvicorn around the app, its socket, and how it stops."""

import asyncio
import contextlib
import errno
import ipaddress
import logging
import math
import os
import socket
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any
from weakref import WeakKeyDictionary

import torch
import uvicorn
from PIL import Image

from pareto_merging.errors import UserError, user_errors
from pareto_merging.serving.engine import Engine
from pareto_merging.serving.http import Service
from pareto_merging.serving.limits import Limits

# connections that stay open are told that the server stops before they are closed
DRAIN_SECONDS = 0.2
MAX_FILES = 2**16


class Server(uvicorn.Server):
    """uvicorn, which says when it is ready and that it stops. It closes connections that stay silent."""

    def __init__(self, service: Service, on_ready: Callable[[], None]) -> None:
        limits = service.limits
        config = uvicorn.Config(
            service.app,
            # unlike httptools it limits how long headers may be
            http="h11",
            ws="none",
            lifespan="on",
            log_config=None,
            log_level="error",
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=math.ceil(limits.idle),
            timeout_graceful_shutdown=limits.shutdown,
        )
        super().__init__(config)
        self._gate, self._on_ready = service.gate, on_ready
        # connection -> (its last request, since when it has been silent)
        self._silent: WeakKeyDictionary[Any, tuple[Any, float]] = WeakKeyDictionary()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # uvicorn raises the signal again when all is done, which would spoil the exit code
        self._gate.phase = "stopping"
        self.force_exit = self.should_exit
        self.should_exit = True

    async def on_tick(self, counter: int) -> bool:
        # uvicorn has no limit on how long a client takes for its first request or for a request's headers
        now = time.monotonic()
        for connection in list(self.server_state.connections) if counter % 10 == 0 else ():
            cycle: Any = getattr(connection, "cycle", None)
            if cycle is not None and not cycle.response_complete:
                self._silent.pop(connection, None)
                continue
            last, since = self._silent.setdefault(connection, (cycle, now))
            if last is not cycle:
                self._silent[connection] = (cycle, now)
            elif now - since > self._gate.limits.idle:
                connection.shutdown()
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        print(f"pareto-merging: stopping, {self._gate.pending} requests in hand", file=sys.stderr, flush=True)
        # what is cut off is counted and said at the end
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        for server in self.servers:
            server.close()
        # open connections are answered 503 for a moment, so that no client writes into one that is being closed
        await asyncio.sleep(DRAIN_SECONDS)
        await super().shutdown(sockets)


def run(
    file: Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    device: str = "auto",
    dtype: str | None = None,
    limits: Limits | None = None,
    threads: int | None = None,
    keep_merged: bool = True,
    progress: bool = True,
    on_warning: Callable[[str], None] = warnings.warn,
) -> int:
    """Serve a folded file until SIGTERM or Ctrl-C. Returns how many accepted requests were not answered in time.

    Args:
        port: 0 takes a free one. device, dtype, keep_merged: as for :class:`Engine`. threads: CPU threads of the model.

    Raises:
        UserError: a port in use, a host that is not here, and what :class:`Engine` raises.
    """
    limits = limits or Limits()
    with bind(host, port) as listener:
        bound = listener.getsockname()
        if not ipaddress.ip_address(bound[0]).is_loopback:
            on_warning(f"{host} can be reached from other machines, and there is no authentication")
        if threads is not None:
            torch.set_num_threads(threads)
        # what a client sends is answered, not logged; limits.pixels decides how large an image may be
        logging.getLogger("python_multipart").setLevel(logging.ERROR)
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        with user_errors():
            engine = Engine(file, device, dtype, max_batch=limits.max_batch, keep_merged=keep_merged)
        service = Service(engine, limits)
        try:
            service.batcher.warm_up(progress).result()
        except KeyboardInterrupt:
            # the interpreter would wait for the thread, which cannot be interrupted; there is nothing to keep
            print("pareto-merging: interrupted", file=sys.stderr, flush=True)
            os._exit(130)
        shown = f"[{bound[0]}]" if ":" in bound[0] else bound[0]
        with contextlib.suppress(ImportError, ValueError, OSError):
            import resource

            # as many open connections as the system allows: the usual soft limit is 1024
            _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, MAX_FILES), hard))
        server = Server(service, lambda: print(f"http://{shown}:{bound[1]}  (docs: /docs)", flush=True))
        server.run(sockets=[listener])
    print(f"pareto-merging: stopped; {service.gate.answered} requests answered", file=sys.stderr)
    return service.gate.cut_off


def bind(host: str, port: int) -> socket.socket:
    """Make a socket that holds host and port, and does not listen yet."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except (OSError, UnicodeError) as error:
        raise UserError(f"--host: expected a name or address of this machine, got {host!r}") from error
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise UserError(f"--port: expected a free port, got {port}, which is in use on {host}") from error
        if error.errno == errno.EADDRNOTAVAIL:
            raise UserError(f"--host: expected a name or address of this machine, got {host!r}") from error
        raise UserError(f"--port: expected a port that may be bound, got {port}: {error.strerror}") from error
    return listener
