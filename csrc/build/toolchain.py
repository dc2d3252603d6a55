"""The compiler, and the flags of every kind of object."""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

# Every *.isa.cpp is compiled once per entry. The names are those of UDL_ISAS in csrc/isa.h, whose
# check of the CPU covers every flag here but prfchw: 64-bit CPUs without prefetchw skip it.
_AVX2 = ["-mavx2", "-mfma", "-mf16c", "-mprfchw"]
_AVX512 = [
    *_AVX2,
    *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"),
    "-mprefer-vector-width=512",
]
ISA_FLAGS: dict[str, dict[str, list[str]]] = {
    "X86": {
        "base": [],
        "avx2": _AVX2,
        "avx512": _AVX512,
        "avx512_bf16": [*_AVX512, "-mavx512bf16"],
    },
    "ARM": {"neon": []},
}

# Flags of the environment (CXXFLAGS) are not used: -march=native or -ffast-math there would break
# the choice of ISA at run time, or the results.
COMMON_FLAGS = [
    *("-std=c++17", "-O3", "-DNDEBUG", "-fPIC"),
    *("-fvisibility=hidden", "-fvisibility-inlines-hidden"),
    *("-fno-math-errno", "-fno-trapping-math"),
    *("-Wall", "-Wextra"),
    "-DTORCH_TARGET_VERSION=0x020b000000000000",
]

ROOT = Path(__file__).resolve().parents[2]
EXPORTS = Path(__file__).resolve().with_name("exports.map")
WITHOUT = "To install without the C++ kernels, set UDLKERNELS_NO_EXTENSION=1."


class BuildError(SystemExit):
    """Ends the build with a message in place of a traceback."""

    def __init__(self, message: str) -> None:
        super().__init__(f"\nudlkernels: {message}\n")


@dataclass(frozen=True)
class Toolchain:
    compiler: list[str]
    launcher: list[str]  # ccache, where there is one
    arch: str  # key of ISA_FLAGS
    version: str

    @property
    def isas(self) -> dict[str, list[str]]:
        return ISA_FLAGS[self.arch]

    def compile_flags(self, isa: str | None) -> list[str]:
        """Flags of an object: isa None for the files that are compiled once."""
        flags = [*COMMON_FLAGS, f"-DUDL_{self.arch}=1"]
        if isa is None:
            return [*flags, "-ffp-contract=off"]
        return [
            *flags,
            *self.isas[isa],
            "-ffp-contract=fast",
            f"-DUDL_ISA={isa}",
            f"-DUDL_ISA_{isa}=1",
        ]

    def link_flags(self) -> list[str]:
        """Only the entry points are exported, and torch is found among the loaded libraries."""
        if sys.platform == "darwin":
            return [
                *("-bundle", "-undefined", "dynamic_lookup"),
                "-Wl,-exported_symbol,_udlkernels_*",
            ]
        script = EXPORTS.relative_to(ROOT)
        return ["-shared", "-pthread", "-Wl,-z,defs", f"-Wl,--version-script={script}"]


def find_toolchain() -> Toolchain:
    """The compiler to use, tried on a small file; raises BuildError with what to install."""
    arch = {"x86_64": "X86", "amd64": "X86", "aarch64": "ARM", "arm64": "ARM"}.get(
        platform.machine().lower()
    )
    if arch is None or sys.platform == "win32":
        raise BuildError(
            "the C++ kernels are written for Linux and macOS on x86-64 and aarch64; this is "
            f"{platform.system()} on {platform.machine()}. {WITHOUT}"
        )
    compiler = _find_compiler()
    ccache = shutil.which("ccache")
    launcher = [ccache] if ccache and Path(compiler[0]).name != "ccache" else []
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True).stdout
    toolchain = Toolchain(compiler, launcher, arch, version.partition("\n")[0])
    _check(toolchain)
    return toolchain


def _find_compiler() -> list[str]:
    chosen = shlex.split(os.environ.get("CXX", ""))
    names = [chosen[0]] if chosen else ["c++", "g++", "clang++"]
    for name in names:
        path = shutil.which(name)
        if path:
            return [path, *chosen[1:]]
    raise BuildError(f"no C++ compiler found (looked for {', '.join(names)}).\n{_advice()}")


def _check(toolchain: Toolchain) -> None:
    flags = toolchain.compile_flags(list(toolchain.isas)[-1])
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "try.cpp")
        source.write_text("#include <string_view>\nint main() { return 0; }\n")
        command = [*toolchain.compiler, *flags, "-c", str(source), "-o", f"{folder}/try.o"]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise BuildError(
            f"the C++ compiler {toolchain.compiler[0]} does not work, or is too old (needed: "
            f"C++17 and {', '.join(toolchain.isas)}; GCC 10, Clang 12 or newer).\n"
            f"{done.stderr.strip()}\n{_advice()}"
        )


def _advice() -> str:
    if sys.platform == "darwin":
        install = "Install Apple's command line tools:  xcode-select --install"
    else:
        install = (
            "Install one:\n"
            "  Debian, Ubuntu:  sudo apt-get install build-essential\n"
            "  Fedora, RHEL:    sudo dnf install gcc-c++\n"
            "  conda:           conda install -c conda-forge cxx-compiler"
        )
    return f"{install}\nor name one in the environment variable CXX. {WITHOUT}"
