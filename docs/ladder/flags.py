"""Prints the compiler flags of this CPU's best instruction set, as the build uses them."""

import importlib
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "csrc" / "build"), str(ROOT)]

toolchain = importlib.import_module("toolchain").find_toolchain()
isa = importlib.import_module("udlkernels._library").isa_found() or next(iter(toolchain.isas))
print(*toolchain.compile_flags(isa), "-Icsrc")
