"""Ahead-of-time compilation of the Triton kernels, on a machine without any GPU.

Each op's `kernels.py` declares `AOT`, a tuple of `Entry` made from its launch table: one entry
for every specialisation that a launch can ask for. `compile_all` compiles them for each target in
processes apart, and reads registers, spills and instructions back.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from udlkernels._aot_read import read_amd, read_nvidia

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
_COMPILE_TIMEOUT = 300.0
_BATCH = 8  # compilations a process: starting one costs twice what a small kernel does


@dataclass(frozen=True)
class Entry:
    """One specialisation of one kernel.

    Args:
        name: readable and unique in its module, such as "rms_norm_fwd bf16 4096".
        fn: the function decorated with `triton.jit`.
        signature: type of every argument that is no constexpr: "*bf16", "i32", "fp32".
        constexprs: value of every constexpr argument.
        divisible: arguments (pointers and integers) known to be multiples of 16.
        num_warps, num_stages: as given at the launch.
        targets: where this specialisation can be launched.
    """

    name: str
    fn: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any] = field(default_factory=dict)
    divisible: tuple[str, ...] = ()
    num_warps: int = 4
    num_stages: int = 2
    targets: tuple[str, ...] = TARGETS


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of an entry; `error` holds the reason where it made nothing."""

    module: str
    entry: str
    target: str
    num_warps: int
    seconds: float = 0.0
    registers: int = 0
    spills: int = 0  # bytes on NVIDIA, registers on AMD
    shared: int = 0  # bytes
    occupancy: float = 0.0  # resident warps (waves) over the multiprocessor's limit
    loads: int = 0  # global loads of every width
    loads_128: int = 0  # those of 128 bits or more
    stores: int = 0
    stores_128: int = 0
    instructions: Mapping[str, int] = field(default_factory=dict)
    error: str = ""

    @property
    def ok(self) -> bool:
        return not self.error and self.spills == 0


@dataclass(frozen=True)
class Job:
    module: str
    index: int
    name: str
    target: str
    num_warps: int


def kernel_modules() -> list[str]:
    """Names of all `udlkernels.<family>.<op>.kernels` modules, in order."""
    root = Path(__file__).parent
    return [
        ".".join(("udlkernels", *path.relative_to(root).with_suffix("").parts))
        for path in sorted(root.glob("*/*/kernels.py"))
    ]


def entries(module: str) -> tuple[Entry, ...]:
    """The entries that a kernels module declares."""
    loaded = importlib.import_module(module)
    found = getattr(loaded, "AOT", None)
    if not isinstance(found, tuple) or not all(isinstance(entry, Entry) for entry in found):
        raise TypeError(f"{module}: AOT must be a tuple of udlkernels._aot.Entry")
    return found


def jobs(targets: Sequence[str] = TARGETS, modules: Iterable[str] | None = None) -> list[Job]:
    """Every (entry, target) pair to compile."""
    return [
        Job(module, index, entry.name, target, entry.num_warps)
        for module in (kernel_modules() if modules is None else modules)
        for index, entry in enumerate(entries(module))
        for target in targets
        if target in entry.targets
    ]


def gpu_target(name: str) -> Any:
    """Triton's target for a name such as "sm_90" or "gfx942"."""
    from triton.backends.compiler import GPUTarget

    if name.startswith("sm_") and name[3:].isdigit():
        return GPUTarget("cuda", int(name[3:]), 32)
    if name.startswith("gfx"):
        return GPUTarget("hip", name, 64 if name.startswith("gfx9") else 32)
    raise ValueError(f"[kernels] target: expected sm_NN or gfxNNN, got {name!r}")


def compile_entry(entry: Entry, target: str, module: str = "") -> Compiled:
    """Compiles one entry in this process. `TRITON_INTERPRET` must not be set."""
    import triton
    from triton.compiler import ASTSource

    if not hasattr(entry.fn, "cache_key"):
        raise RuntimeError(
            f"[kernels] {entry.name}: the Triton interpreter is on; unset TRITON_INTERPRET"
        )
    gpu = gpu_target(target)
    source = ASTSource(
        entry.fn, _full_signature(entry), dict(entry.constexprs), _attributes(entry, gpu.backend)
    )
    started = time.perf_counter()
    log = io.StringIO()
    with triton.knobs.compilation.scope(), triton.knobs.nvidia.scope():
        triton.knobs.compilation.always_compile = True  # the log exists only if ptxas really runs
        triton.knobs.nvidia.dump_ptxas_log = True
        with contextlib.redirect_stdout(log):
            options = {"num_warps": entry.num_warps, "num_stages": entry.num_stages}
            kernel = triton.compile(source, target=gpu, options=options)
    seconds = time.perf_counter() - started
    if gpu.backend == "cuda":
        facts = read_nvidia(kernel.asm["cubin"], log.getvalue(), gpu.arch, kernel.metadata)
    else:
        facts = read_amd(kernel.asm["amdgcn"], kernel.metadata)
    return Compiled(module, entry.name, target, entry.num_warps, seconds, **facts)


def compile_all(
    todo: Sequence[Job],
    *,
    workers: int | None = None,
    done: Callable[[Compiled], None] = lambda compiled: None,
) -> list[Compiled]:
    """Compiles all jobs in child processes, so that a crash of the compiler costs one row only."""
    with _compiling_environment():
        method = "forkserver" if hasattr(os, "fork") else "spawn"
        context = multiprocessing.get_context(method)
        if method == "forkserver":
            modules = dict.fromkeys(job.module for job in todo)
            context.set_forkserver_preload(["triton.compiler", *modules])

        def compile_batch(start: int) -> list[Compiled]:
            batch = todo[start : start + _BATCH]
            found: list[Compiled] = []
            while len(found) < len(batch):  # once, and again behind each crash
                for compiled in _in_process(context, batch[len(found) :]):
                    done(compiled)
                    found.append(compiled)
            return found

        with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
            batches = pool.map(compile_batch, range(0, len(todo), _BATCH))
            return [compiled for batch in batches for compiled in batch]


def _full_signature(entry: Entry) -> dict[str, str]:
    """Types in the order of the kernel's arguments, constexprs included."""
    names = list(entry.fn.arg_names)
    given = {**entry.signature, **dict.fromkeys(entry.constexprs, "constexpr")}
    if set(given) != set(names) or not set(entry.divisible) <= set(entry.signature):
        raise ValueError(
            f"[kernels] {entry.name}: expected signature and constexprs to name {names}, "
            f"got {sorted(given)} with divisible {sorted(entry.divisible)}"
        )
    return {name: given[name] for name in names}


def _attributes(entry: Entry, backend: str) -> dict[tuple[int], list[list[object]]]:
    """Keyed by tuples: Triton ignores any other form of key without a word."""
    attributes: dict[tuple[int], list[list[object]]] = {}
    for position, name in enumerate(entry.fn.arg_names):
        found: list[list[object]] = []
        if name in entry.divisible:
            found.append(["tt.divisibility", 16])
        if backend == "hip" and entry.signature.get(name, "").startswith("*"):
            found.append(["tt.pointer_range", 32])  # what a launch adds to tensors below 2 GB
        if found:
            attributes[(position,)] = found
    return attributes


@contextlib.contextmanager
def _compiling_environment() -> Iterator[None]:
    """The processes started inside compile for real, whatever this one does."""
    saved = dict(os.environ)
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # today's default, said aloud since 3.9
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(saved)


def _in_process(context: Any, batch: Sequence[Job]) -> Iterator[Compiled]:
    """What one child process makes of the jobs, up to and with the one that ends it."""
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(sender, batch), daemon=True)
    process.start()
    sender.close()
    try:
        for job in batch:
            if not receiver.poll(_COMPILE_TIMEOUT):
                process.terminate()
                yield _failed(job, f"no answer after {_COMPILE_TIMEOUT:.0f} s")
                return
            try:
                yield receiver.recv()
            except EOFError:
                process.join()
                yield _failed(job, f"the compiler's process ended with code {process.exitcode}")
                return
    finally:
        process.join()
        receiver.close()


def _child(sender: Any, batch: Sequence[Job]) -> None:
    for job in batch:
        try:
            compiled = compile_entry(entries(job.module)[job.index], job.target, job.module)
        except Exception as error:  # reported as a row, beside the others
            text = str(error).strip().splitlines() or [""]
            compiled = _failed(job, f"{type(error).__name__}: {text[0]}")
        sender.send(compiled)


def _failed(job: Job, reason: str) -> Compiled:
    return Compiled(job.module, job.name, job.target, job.num_warps, error=reason)
