"""Builds csrc/ into udlkernels/_C.so; what has not changed is not compiled again.

    python csrc/build/extension.py            build in place
    python csrc/build/extension.py --verbose  the same, with the command lines

The objects stay in build/objects, apart for every torch they were compiled against. One is
compiled again when its source or a header that it includes (the compiler lists them) is newer, or
when its flags or the compiler differ.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from toolchain import EXPORTS, ROOT, BuildError, Toolchain, find_toolchain
from torch_headers import REQUIREMENT, Torch, find_torch

SOURCES = ROOT / "csrc"
FOLDER = ROOT / "build"
LIBRARY = ROOT / "udlkernels" / "_C.so"


@dataclass(frozen=True)
class Step:
    """One command, its output file, and the text that tells whether the output is still valid."""

    output: Path
    command: list[str]
    key: str

    @property
    def depfile(self) -> Path:
        return self.output.with_suffix(".d")

    @property
    def record(self) -> Path:
        return self.output.with_suffix(".key")

    def is_current(self, inputs: Sequence[Path]) -> bool:
        if not (self.output.is_file() and self.record.is_file()):
            return False
        if self.record.read_text() != self.key:
            return False
        built = self.output.stat().st_mtime_ns
        return all(path.is_file() and path.stat().st_mtime_ns < built for path in inputs)

    def run(self, verbose: bool) -> None:
        """Writes the output whole or not at all, dated from when its inputs began to be read."""
        self.output.parent.mkdir(parents=True, exist_ok=True)
        self.record.unlink(missing_ok=True)
        started = time.time_ns()
        partial = self.output.with_suffix(".partial")
        command = [*self.command, "-o", str(partial)]
        shown = shlex.join(command) if verbose else f"  {self.output.relative_to(FOLDER)}"
        print(f"{shown}\n", end="", flush=True)  # one write: threads print at the same time
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode != 0:
            raise BuildError(f"this command failed:\n{shlex.join(command)}\n{done.stderr}")
        print(done.stderr, end="")
        os.utime(partial, ns=(started, started))
        os.replace(partial, self.output)
        self.record.write_text(self.key)


def build(library: Path = LIBRARY, *, strict: bool = True, verbose: bool = False) -> list[Path]:
    """Compiles what changed, links, puts the result at `library`, and returns the objects.

    strict: warnings are errors.
    """
    toolchain = find_toolchain()
    torch = find_torch()
    if torch is None:
        raise BuildError(f"torch not found; install it first: pip install '{REQUIREMENT}'")
    folder = FOLDER / "objects" / f"torch-{torch.version}"
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder / "lock"):
        steps = list(_compile_steps(toolchain, torch, folder, strict))
        _run_parallel([step for step in steps if not _is_compiled(step)], verbose)
        objects = [step.output for step in steps]
        _remove_stale(folder, objects)
        link = _link_step(toolchain, torch, folder, objects)
        if not link.is_current([*objects, EXPORTS]):
            link.run(verbose)
        _install(link.output, library)
    return objects


def _compile_steps(
    toolchain: Toolchain, torch: Torch, folder: Path, strict: bool
) -> Iterator[Step]:
    for source in sorted(SOURCES.rglob("*.cpp")):
        name = source.relative_to(SOURCES)
        per_isa = name.name.endswith(".isa.cpp")
        stem = name.name.removesuffix(".isa.cpp" if per_isa else ".cpp")
        for isa in toolchain.isas if per_isa else [None]:
            output = folder / name.with_name(f"{stem}.{isa}.o" if isa else f"{stem}.o")
            flags = ["-I", "csrc", *toolchain.compile_flags(isa)]
            command = [*toolchain.launcher, *toolchain.compiler, *flags]
            command += ["-isystem", str(torch.include), *(["-Werror"] if strict else [])]
            command += ["-MMD", "-MF", str(output.with_suffix(".d")), "-c", f"csrc/{name}"]
            yield Step(output, command, _key(toolchain, flags))


def _link_step(toolchain: Toolchain, torch: Torch, folder: Path, objects: list[Path]) -> Step:
    flags = [*toolchain.link_flags(), *(str(path.relative_to(ROOT)) for path in objects)]
    command = [*toolchain.compiler, *flags, f"-L{torch.lib}", "-ltorch_cpu"]
    return Step(folder / "_C.so", command, _key(toolchain, flags))


def _key(toolchain: Toolchain, flags: list[str]) -> str:
    """Without torch's path: a later build may find the same torch in another place."""
    return f"{toolchain.version}\n{shlex.join(flags)}\n"


def _is_compiled(step: Step) -> bool:
    if not step.depfile.is_file():
        return False
    names = step.depfile.read_text().replace("\\\n", " ").partition(":")[2].split()
    return step.is_current([ROOT / name for name in names])


def _run_parallel(steps: list[Step], verbose: bool) -> None:
    if not steps:
        return
    print(f"compiling {len(steps)} objects", flush=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = [pool.submit(step.run, verbose) for step in steps]
        wait(jobs, return_when=FIRST_EXCEPTION)
        pool.shutdown(cancel_futures=True)
    for job in jobs:
        if not job.cancelled():
            job.result()


def _remove_stale(folder: Path, objects: list[Path]) -> None:
    for path in folder.rglob("*.o"):
        if path not in objects:
            for part in (path, path.with_suffix(".d"), path.with_suffix(".key")):
                part.unlink(missing_ok=True)


def _install(linked: Path, library: Path) -> None:
    """By a new file: a process that has the old one loaded keeps it."""
    if library.is_file() and library.read_bytes() == linked.read_bytes():
        return
    library.parent.mkdir(parents=True, exist_ok=True)
    partial = library.with_suffix(".partial")
    shutil.copyfile(linked, partial)
    os.replace(partial, library)
    print(f"built {library}")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description="Builds the C++ kernels in place.")
    parser.add_argument("--verbose", action="store_true", help="print the command lines")
    build(verbose=parser.parse_args().verbose)


if __name__ == "__main__":
    main()
