"""The thresholds of glibc's allocator, which it reads only when a process starts.

Imports no torch: the program starts again before it has loaded anything.
"""

from __future__ import annotations

import os
import platform
import sys

DEFAULT_FLAG = "--default-allocator"

# Without these, glibc gives large buffers back to the system after each call, and the page faults
# of the next allocation cost many times what the kernel does.
RAISED_ALLOCATOR = {
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),  # glibc ignores a larger value
    "MALLOC_TOP_PAD_": str(64 << 20),
}
_MARK = "UDLKERNELS_BENCH_ALLOCATOR"


def allocator() -> str:
    """In force here: "raised", "default", or "system" where it is not glibc's."""
    if platform.libc_ver()[0] != "glibc":
        return "system"
    raised = all(os.environ.get(name) == value for name, value in RAISED_ALLOCATOR.items())
    return "raised" if raised else "default"


def ensure_allocator(wanted: str, arguments: list[str]) -> None:
    """Starts this program again with the allocator asked for: glibc reads it only at the start."""
    if allocator() in (wanted, "system") or os.environ.get(_MARK) == wanted:
        return
    environment = {k: v for k, v in os.environ.items() if k not in RAISED_ALLOCATOR}
    if wanted == "raised":
        environment |= RAISED_ALLOCATOR
    environment[_MARK] = wanted
    command = [sys.executable, "-m", "udlkernels.benchmarks", *arguments]
    sys.stdout.flush()
    os.execve(sys.executable, command, environment)
