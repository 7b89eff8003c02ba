"""Open hostile checkpoints and say what came of it.

``python -m support.verdicts FOLDER`` opens those that take memory or crash C code, each in a process of its own with
little memory, and prints one line of JSON for each.
"""

import json
import os
import re
import resource
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from support.hostile import cases
from support.payloads import CANARY

# bytes, and seconds on the processor for one reading: another process that wants it too does not count
MEMORY, SECONDS = 300 * 2**20, 4.0


def open_fully(path: Path, how: str) -> str:
    """Read all that a case has, by the lowest reader that knows it and by the one that users call; says what it was."""
    from pareto_merging.checkpoints import archives, checkpoint, heads, modules, pickles, safetensors
    from pareto_merging.errors import UserError

    if how == "machine":
        with path.open("rb") as stream:
            return type(pickles.read_pickle(stream, str(path))).__name__
    if path.is_dir():
        opened = checkpoint.open_checkpoint(path)
        return _sizes(opened[name] for name in opened)
    refused: UserError | None = None
    try:
        if path.suffix == ".safetensors":
            file = safetensors.SafetensorsFile(path)
            said = _sizes(map(file.read, file.shapes))
        else:
            archive = archives.open_archive(path)
            said = _sizes(map(archive.tensor, modules.find_tensors(archive.root, str(path)).values()))
    except UserError as error:
        refused = error
    # none of these is a CLIP: a UserError whatever it was before
    for reader in (checkpoint.open_checkpoint, heads.open_head):
        try:
            reader(path)
        except UserError:
            continue
        return f"{path}: opened by {reader.__name__}"
    if refused is not None:
        raise refused
    return said


def _sizes(tensors: Iterable[Any]) -> str:
    held = list(tensors)
    return f"{len(held)} tensors of {sum(tensor.nbytes for tensor in held)} bytes"


def verdict(path: Path, how: str) -> dict[str, Any]:
    """What happened: ``error`` (the text of a UserError), ``read``, or ``raised`` (anything else); and CPU seconds."""
    from pareto_merging.errors import UserError

    start = time.process_time()
    found: dict[str, Any]
    try:
        found = {"read": open_fully(path, how)}
    except UserError as error:
        found = {"error": str(error)}
    except BaseException as error:
        found = {"raised": f"{type(error).__name__}: {str(error)[:300]}"}
    # three readers read a file
    passes = 1 if how == "machine" or path.is_dir() else 3
    return {**found, "seconds": (time.process_time() - start) / passes}


def isolated(path: Path, how: str) -> dict[str, Any]:
    """As :func:`verdict`, in a fork with :data:`MEMORY` more memory than this process; it may be ``killed``."""
    sending, receiving = os.pipe()[::-1]
    child = os.fork()
    if not child:
        os.close(receiving)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        # more than a verdict allows to three readers; a fork begins at 0
        most = int(4 * SECONDS)
        resource.setrlimit(resource.RLIMIT_CPU, (most, most + 1))
        try:
            os.write(sending, json.dumps(verdict(path, how)).encode()[:60_000])
        finally:
            os._exit(0)
    os.close(sending)
    with os.fdopen(receiving, "rb") as pipe:
        answer = pipe.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status) or not answer:
        return {"killed": signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else "no answer"}
    return json.loads(answer)


def main(folder: Path, pattern: str = "", part: str = "0", parts: str = "1") -> None:
    """Open the heavy cases (or those that match), every ``parts``-th from ``part`` on; a line of JSON for each."""
    warnings.simplefilter("ignore")
    import open_clip  # noqa: F401 (before the limits)

    import pareto_merging.checkpoints.checkpoint  # noqa: F401

    chosen = [c for c in cases(folder / CANARY) if (re.search(pattern, c.name) if pattern else c.heavy)]
    for index, case in enumerate(chosen[int(part) :: int(parts)]):
        inside = folder / str(index)
        inside.mkdir()
        found = isolated(case.write(inside), case.how)
        shutil.rmtree(inside)
        print(json.dumps({"name": case.name, **found}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
