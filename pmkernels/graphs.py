"""Capturing a computation as a CUDA graph, without harm where it cannot be captured.

A capture that fails can leave a process damaged: older releases of PyTorch stay on the capturing stream, keep the
random generator and the allocator in their capturing state, and every later computation suffers. So a computation is
first run once with PyTorch's synchronisation check set to raise: what waits for the GPU, or copies Python's numbers to
it, is found before any capture begins. What fails all the same is cleaned up after as far as PyTorch allows.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")


@functools.cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the one stream of a device for warming up and capturing. Libraries keep memory for each."""
    return torch.cuda.Stream(device)


@contextlib.contextmanager
def _aside(device: torch.device) -> Iterator[torch.cuda.Stream]:
    """Work on the side stream, in the order of what the caller launches."""
    stream = side_stream(device)
    with torch.cuda.device(device):
        stream.wait_stream(torch.cuda.current_stream(device))
        try:
            with torch.cuda.stream(stream):
                yield stream
        finally:
            torch.cuda.current_stream(device).wait_stream(stream)


def warm_up(function: Callable[[], Result], device: torch.device) -> Result:
    """Run ``function`` on the stream it is captured on later, and return its result.

    Kernels are compiled and libraries set up, which a capture must not do.
    """
    with _aside(device):
        return function()


def capture(
    function: Callable[[], Result], device: torch.device, pool: Any = None, *, probe: bool = True
) -> tuple[torch.cuda.CUDAGraph, Result]:
    """Capture ``function``, warmed up before, as a CUDA graph. Every replay writes its result anew.

    Nothing is computed by the capture itself, so replay it. Graphs captured with the same ``pool`` (of
    ``torch.cuda.graph_pool_handle()``) share memory: they must not run at the same time, and what else one has computed
    is lost when another runs.

    ``probe``: run it once more before, with PyTorch's check for synchronisation, which is one for all threads of the
    process: what cannot be captured is found out before it does harm.

    Raises:
        RuntimeError: it cannot be captured: the message says what it does. Anything that ``function`` raises.
    """
    if probe:
        before = torch.cuda.get_sync_debug_mode()
        with _aside(device):
            torch.cuda.set_sync_debug_mode("error")
            try:
                function()
            finally:
                torch.cuda.set_sync_debug_mode(before)
    graph = torch.cuda.CUDAGraph()
    pool = torch.cuda.graph_pool_handle() if pool is None else pool
    stream = side_stream(device)
    try:
        # the outer context restores the caller's stream where PyTorch's own does not
        with (
            torch.cuda.device(device),
            torch.cuda.stream(stream),
            # what other threads do on the GPU is not captured, and does no harm
            torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"),
        ):
            result = function()
    except BaseException as error:
        _recover(device, pool)
        first = error
        while first.__context__ is not None:
            # the end of a failed capture fails too, and says nothing
            first = first.__context__
        if isinstance(error, RuntimeError) and first is not error and isinstance(first, Exception):
            raise RuntimeError(str(first)) from error
        raise
    return graph, result


def _recover(device: torch.device, pool: Any) -> None:
    index = torch.cuda.current_device() if device.index is None else device.index
    with contextlib.suppress(Exception):
        # a fresh state of the generator, which is not capturing
        generator = torch.cuda.default_generators[index]
        generator.graphsafe_set_state(generator.clone_state())
    with contextlib.suppress(Exception):
        # an error where the end of the capture has done it
        torch._C._cuda_endAllocateToPool(index, pool)
        torch._C._cuda_releasePool(index, pool)
