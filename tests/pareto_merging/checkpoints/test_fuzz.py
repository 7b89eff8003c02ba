"""Two thousand damaged copies of each reader's file: an error of one line, or the right answer."""

from pathlib import Path

import pytest
import torch
from fuzz import mutants, readers, running, samples

from pareto_merging.errors import UserError

MUTATIONS, SEED = 2000, 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("reader", list(readers.READERS))
def test_damage_gives_an_error_or_the_right_answer(reader: str, tmp_path: Path) -> None:
    summary = running.fuzz(reader, MUTATIONS, SEED, keep=tmp_path)
    assert summary.found == 0, "\n".join(f"{one.index} ({one.kind}): {one.what}" for one in summary.findings)
    assert summary.refused + summary.right == MUTATIONS
    # neither a reader that refuses everything nor damage that does none
    assert summary.refused > MUTATIONS / 4
    assert summary.right > MUTATIONS / 100


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("reader", ["zip", "legacy", "safetensors"])
def test_the_same_seed_makes_the_same_mutants(reader: str) -> None:
    first = [mutants.mutate(reader, 3, index) for index in range(50)]
    assert first == [mutants.mutate(reader, 3, index) for index in range(50)]
    assert first != [mutants.mutate(reader, 4, index) for index in range(50)]


def _crash(path: Path) -> readers.Answer:
    import os
    import signal

    os.kill(os.getpid(), signal.SIGSEGV)
    return {}


def _hang(path: Path) -> readers.Answer:
    while True:
        pass


def _devour(path: Path) -> readers.Answer:
    return {"w": torch.zeros(2**28)}


def _raise(path: Path) -> readers.Answer:
    raise KeyError("a")


def _run(path: Path) -> readers.Answer:
    (path.parent / mutants.CANARY).touch()
    raise UserError("refused")


def _open(path: Path) -> readers.Answer:
    path.with_name("other").open("w").close()
    raise UserError("refused")


def _unpickle(path: Path) -> readers.Answer:
    import pickle

    try:
        pickle.loads(path.read_bytes())
    except Exception as error:
        raise UserError("broken") from error
    raise UserError("refused")


def _zeros(path: Path) -> readers.Answer:
    return {name: torch.zeros_like(tensor) for name, tensor in samples.sample("zip").tensors.items()}


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("reader", "bad", "said"),
    [
        ("zip", _crash, "SIGSEGV"),
        ("zip", _hang, "more than"),
        ("zip", _devour, "RuntimeError"),
        ("zip", _raise, "KeyError"),
        ("zip", _run, "the payload ran"),
        ("zip", _open, "for writing"),
        ("pickle", _unpickle, "pickle.find_class"),
        ("zip", _zeros, "differs from the right answer"),
    ],
)
def test_a_bad_reader_is_found_out(reader: str, bad: object, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    samples.sample(reader)
    good, calls = readers.READERS[reader], []

    def after_the_first(path: Path) -> readers.Answer:
        # the worker reads the valid file before its limits
        calls.append(path)
        return good(path) if len(calls) == 1 else bad(path)  # type: ignore[operator]

    monkeypatch.setattr(running, "SECONDS", 0.05)
    monkeypatch.setitem(readers.READERS, reader, after_the_first)
    summary = running.fuzz(reader, 12, 0)
    assert said in " ".join(finding.what for finding in summary.findings)


def test_what_comes_out_of_a_pickle_is_checked() -> None:
    readers.check_inert({"a": [1, (2.5, None)], "b": b"x"})
    for live in (print, torch.nn.Linear, torch.zeros(1), {"a": [(Path("x"),)]}):
        with pytest.raises(AssertionError, match="came out"):
            readers.check_inert(live)
