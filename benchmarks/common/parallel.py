"""Calls in several processes, each with its own torch."""

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any


def in_parallel(function: Callable[..., Any], calls: Sequence[tuple[Any, ...]], jobs: int) -> Iterator[tuple[Any, ...]]:
    """Call a function with each tuple of arguments. Yield those of every call that is done.

    ``jobs``: processes; 1: in this one, in order. A function's error ends it.
    """
    if jobs == 1:
        for arguments in calls:
            function(*arguments)
            yield arguments
        return
    # forked, torch's threads would hang
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        waiting = {pool.submit(function, *arguments): arguments for arguments in calls}
        for done in as_completed(waiting):
            done.result()
            yield waiting[done]
