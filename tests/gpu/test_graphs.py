"""Captured graphs on a CUDA GPU: replays, and no harm done where a capture cannot be."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pmkernels.graphs import capture, side_stream, warm_up

pytestmark = pytest.mark.gpu


def here() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def healthy() -> None:
    """What a failed capture has been seen to break: the stream, random numbers, freed memory, the next capture."""
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert not torch.cuda.is_current_stream_capturing()
    assert torch.cuda.get_sync_debug_mode() == 0
    assert torch.randn(100, device="cuda").unique().numel() > 90
    torch.cuda.synchronize()
    del_me = torch.empty(2**28, device="cuda", dtype=torch.uint8)
    reserved = torch.cuda.memory_reserved()
    del del_me
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= reserved - 2**28
    x = torch.arange(5.0, device="cuda")
    warm_up(lambda: x * 2, here())
    graph, y = capture(lambda: x * 2, here())
    x.fill_(3)
    graph.replay()
    assert y.tolist() == [6.0] * 5


def test_a_replay_reads_what_is_there_now() -> None:
    healthy()


def waits(x: Tensor) -> Tensor:
    return x * float(x.sum())


def copies_numbers(x: Tensor) -> Tensor:
    return x * torch.tensor([1.0, 2.0, 3.0], device="cuda")


def raises(x: Tensor) -> Tensor:
    raise KeyError("the model's own")


@pytest.mark.parametrize("function", [waits, copies_numbers, raises])
def test_what_cannot_be_captured_says_so_and_harms_nothing(function: Callable[[Tensor], Tensor]) -> None:
    x = torch.ones(3, device="cuda")
    with pytest.raises((RuntimeError, KeyError), match=r"synchroniz|the model's own"):
        capture(lambda: function(x), here())
    healthy()


def test_a_capture_that_fails_in_the_middle_is_cleaned_up_after() -> None:
    """What the run before it cannot see: an error that only a capture has."""
    x = torch.ones(3, device="cuda")

    def only_while_capturing() -> Tensor:
        y = torch.randn(3, device="cuda") + x
        if torch.cuda.is_current_stream_capturing():
            raise ValueError("in the middle")
        return y

    warm_up(only_while_capturing, here())
    with pytest.raises((RuntimeError, ValueError), match="in the middle"):
        capture(only_while_capturing, here())
    healthy()


def test_one_side_stream_for_each_device() -> None:
    assert side_stream(here()) is side_stream(here())
    assert side_stream(here()).device == here()
