"""What is in force on a device, and for how long."""

import contextlib
import dataclasses
import threading

import torch

from pmkernels import configs, dispatch
from pmkernels.configs import Configs

CPU = torch.device("cpu")
CUDA = torch.device("cuda")


def test_what_is_in_force_nests_and_comes_back() -> None:
    before = dispatch.in_force()
    outer, inner = Configs(file="sm_90"), Configs(multiprocessors=7, runs=False)
    with dispatch.using(outer) as given:
        assert given is dispatch.in_force() is outer
        assert dispatch.gpu_file(CPU) == "sm_90"
        with contextlib.suppress(KeyError), dispatch.using(inner):
            assert dispatch.multiprocessors(CUDA) == 7
            assert not dispatch.runs_kernels(CUDA)
            assert dispatch.gpu_file(CPU) == "default"
            raise KeyError("the context ends")
        assert dispatch.in_force() is outer
    assert dispatch.in_force() is before


def test_contexts_that_overlap_leave_nothing_behind() -> None:
    """As those of two threads may: the one that was entered first ends first."""
    before, one, other = dispatch.in_force(), Configs(file="sm_90"), Configs(multiprocessors=7)
    first, second = contextlib.ExitStack(), contextlib.ExitStack()
    first.enter_context(dispatch.using(one))
    second.enter_context(dispatch.using(other))
    first.close()
    assert dispatch.in_force() is other
    second.close()
    assert dispatch.in_force() is before


def test_what_is_in_force_is_so_in_the_threads_that_autograd_starts() -> None:
    seen: list[Configs] = []
    with dispatch.using(Configs(multiprocessors=7)) as given:
        thread = threading.Thread(target=lambda: seen.append(dispatch.in_force()))
        thread.start()
        thread.join()
    assert seen == [given]


def test_a_launch_is_given_what_fits_and_gives_what_is_used() -> None:
    asked: list[configs.Asked] = []

    def wider(wanted: configs.Asked, entry: configs.Entry) -> configs.Config:
        asked.append(wanted)
        return dataclasses.replace(entry.config, num_warps=2 * entry.config.num_warps)

    plain = dispatch.config("merge", torch.zeros(1, dtype=torch.float32), rows=5, rank=3)
    with dispatch.using(Configs(launch=wider)):
        changed = dispatch.config("merge", torch.zeros(1, dtype=torch.float32), rows=5, rank=3)
    assert changed == dataclasses.replace(plain, num_warps=2 * plain.num_warps)
    assert [(one.op, one.rows, one.rank) for one in asked] == [("merge", 8, 3)]
    assert dispatch.config("merge", torch.zeros(1, dtype=torch.float32), rows=5, rank=3) == plain
