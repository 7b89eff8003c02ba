"""``python -m benchmarks.gpu_kernels_compile``: compile recorded launches for sm_90 by the Triton installed here.

Runs under the Python and Triton of the machine that the kernels go to, which need torch and triton and nothing else.
``--verify ARCHIVE`` unpacks an archive into an empty cache instead and asks for every launch again, with a compiler
that refuses to compile: all of them have to be found.
"""

import argparse
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

ARCHITECTURE = 90


@contextmanager
def _driver() -> Iterator[None]:
    import triton

    from benchmarks.common.launches import AbsentDriver

    before = triton.runtime.driver._active if hasattr(triton.runtime.driver, "_active") else None
    triton.runtime.driver.set_active(AbsentDriver(ARCHITECTURE))
    try:
        yield
    finally:
        triton.runtime.driver._active = before


class _Built:
    """A module in C that was built and not loaded. There is no driver to load it with."""

    def __getattr__(self, name: str) -> Any:
        return None


def _compile(launch: Any) -> dict[str, Any]:
    """Compile one launch, and its launcher where it has one of its own."""
    try:
        kernel = launch.compile()
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return {"fault": f"{launch.name}: {lines[0][:200]}"}
    entry = Path(next(iter(kernel.metadata_group.values()))).parent.name
    return {"entry": entry, "launchers": _launchers(kernel)}


def _launchers(kernel: Any) -> list[str]:
    """Build what a first launch would have gcc build. Only what has the same key on every machine is."""
    from triton.runtime import build

    if not hasattr(build, "compile_module_from_src") or hasattr(build, "compile_module_from_file"):
        return []
    from triton.backends.nvidia import driver

    built: list[str] = []

    def load(name: str, path: str) -> _Built:
        built.append(Path(path).parent.name)
        return _Built()

    with mock.patch.object(build, "_load_module_from_path", load):
        if not isinstance(getattr(driver.CudaUtils, "instance", None), driver.CudaUtils):
            driver.CudaUtils()
        driver.CudaLauncher(kernel.src, kernel.metadata)
    return built


def _stand_in_libcuda(folder: Path) -> Path:
    """Build a library by the name of the driver's, to link with.

    It has every function that Triton's sources call, as a linker drops a library that gives it nothing, and then nobody
    would look for the driver.
    """
    from triton.backends.nvidia import driver

    folder.mkdir(parents=True, exist_ok=True)
    backend = Path(driver.__file__).parent
    text = "".join(path.read_text(encoding="utf-8") for path in (backend / "driver.py", backend / "driver.c"))
    names = sorted(set(re.findall(r"\b(cu[A-Z][A-Za-z0-9_]*)\s*\(", text)))
    source, library = folder / "libcuda.c", folder / "libcuda.so.1"
    source.write_text("".join(f"int {name}(void) {{ return 0; }}\n" for name in names))
    compiler = os.environ.get("CC", "gcc")
    command = [compiler, "-shared", "-fPIC", "-w", str(source), "-Wl,-soname,libcuda.so.1", "-o", str(library)]
    subprocess.run(command, check=True)
    return folder


def about() -> dict[str, Any]:
    """Return the Triton and the Python here."""
    import triton

    return {"triton": triton.__version__, "python": f"cp{sysconfig.get_config_var('py_version_nodot')}"}


def compile_all(launches: Sequence[Any], folder: Path, jobs: int) -> dict[str, Any]:
    """Compile on ``jobs`` processes into ``folder``/cache; returns the index that is written beside it."""
    from benchmarks.common.record import write_json
    from benchmarks.gpu_kernels import triton_key

    os.environ["TRITON_LIBCUDA_PATH"] = str(_stand_in_libcuda(folder / "libcuda"))
    with _driver(), ProcessPoolExecutor(jobs, mp_context=get_context("fork")) as pool:
        results = list(_progress(pool.map(_compile, launches), len(launches)))
    faults = [result["fault"] for result in results if "fault" in result]
    made = [result for result in results if "fault" not in result]
    kernels = sorted({result["entry"] for result in made})
    launchers = sorted({entry for result in made for entry in result["launchers"]})
    description = {**about(), "kernels": len(kernels), "launchers": len(launchers), "arch": f"sm_{ARCHITECTURE}"}
    index = {"key": triton_key(), "about": description, "entries": [*kernels, *launchers], "faults": faults}
    write_json(folder / "index.json", index)
    return index


def _progress(done: Iterator[Any], count: int) -> Iterator[Any]:
    """Yield what is done, and print the time left every few seconds or in place."""
    start = time.monotonic()
    last = 0.0
    for number, result in enumerate(done, 1):
        now = time.monotonic()
        if now - last > (0.2 if sys.stderr.isatty() else 15) or number == count:
            last, left = now, (now - start) / number * (count - number)
            line = f"{about()['triton']}: {number} of {count} kernels, {left:.0f} s left"
            print(f"\r{line}   " if sys.stderr.isatty() else line, end="", file=sys.stderr, flush=True)
            print(file=sys.stderr, end="" if sys.stderr.isatty() and number < count else "\n", flush=True)
        yield result


def verify(archive: Path, launches: Sequence[Any]) -> tuple[int, list[str]]:
    """Return how many launches an unpacked archive answers, and what is wrong with the others."""
    from triton.backends.nvidia.compiler import CUDABackend

    from benchmarks.gpu_kernels import unpack

    report = unpack(archive)
    if not report.agrees:
        return 0, [str(report)]

    def refuse(*_: Any, **__: Any) -> None:
        raise LookupError("not in the cache")

    faults = []
    with _driver(), mock.patch.object(CUDABackend, "add_stages", refuse):
        for launch in launches:
            try:
                if not launch.compile().asm["cubin"]:
                    faults.append(f"{launch.name}: an empty cubin")
            except Exception as error:
                faults.append(f"{launch.name}: {error}")
    return len(launches) - len(faults), faults


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. The exit code is 1 if a kernel does not compile or is not found."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_kernels_compile", description=__doc__)
    of_record = "files of benchmarks.gpu_kernels_record"
    parser.add_argument("--launches", type=Path, nargs="+", required=True, help=of_record)
    parser.add_argument("--folder", type=Path, help="write cache/ and index.json there")
    parser.add_argument("--verify", type=Path, metavar="ARCHIVE", help="look every launch up in an archive")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: one per core)")
    chosen = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as empty:
        cache = Path(empty) if chosen.folder is None else chosen.folder.absolute() / "cache"
        cache.mkdir(parents=True, exist_ok=True)
        # a GPU machine has none of Triton's variables but the cache's folder
        for name in [name for name in os.environ if name.startswith(("TRITON_", "LLVM_"))]:
            del os.environ[name]
        os.environ["TRITON_CACHE_DIR"] = str(cache)
        from benchmarks.common.recording import Launches, read

        launches = Launches()
        for path in chosen.launches:
            launches.add(read(path))
        if chosen.verify is not None:
            number, faults = verify(chosen.verify, list(launches))
            print(f"Triton {about()['triton']}: {number} of {len(launches)} launches found in {chosen.verify}")
        else:
            index = compile_all(list(launches), chosen.folder.absolute(), chosen.jobs)
            faults = index["faults"]
            print(f"Triton {about()['triton']}: {index['about']['kernels']} kernels, {len(faults)} faults")
    for fault in faults:
        print(f"FAULT {fault}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
