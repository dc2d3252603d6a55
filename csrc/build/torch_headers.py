"""Finds an installed torch (headers and library) without importing it."""

from __future__ import annotations

import importlib.util
import re
import site
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MINIMUM = (2, 11)
REQUIREMENT = "torch>=2.11"


@dataclass(frozen=True)
class Torch:
    root: Path
    version: str

    @property
    def include(self) -> Path:
        return self.root / "include"

    @property
    def lib(self) -> Path:
        return self.root / "lib"


def find_torch() -> Torch | None:
    """The first usable torch: the build environment's own, else the one pip installs into."""
    for root in _candidates():
        torch = inspect(root)
        if torch is not None:
            return torch
    return None


def _candidates() -> Iterator[Path]:
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.origin:
        yield Path(spec.origin).parent
    # pip's isolated build hides site-packages from sys.path, but sysconfig still names them.
    paths = sysconfig.get_paths()
    folders = [paths["purelib"], paths["platlib"]]
    if _sees_system_packages():
        folders += site.getsitepackages([sys.base_prefix, sys.base_exec_prefix])
        folders.append(site.getusersitepackages())
    for folder in dict.fromkeys(folders):
        yield Path(folder) / "torch"


def _sees_system_packages() -> bool:
    if sys.prefix == sys.base_prefix:
        return True
    config = Path(sys.prefix) / "pyvenv.cfg"
    if not config.is_file():
        return False
    return bool(re.search(r"(?im)^include-system-site-packages\s*=\s*true", config.read_text()))


def inspect(root: Path) -> Torch | None:
    version_file = root / "version.py"
    if not version_file.is_file() or not (root / "include/torch/csrc/stable").is_dir():
        return None
    found = re.search(r"__version__\s*=\s*['\"]((\d+)\.(\d+)[^'\"]*)", version_file.read_text())
    if found is None or (int(found[2]), int(found[3])) < MINIMUM:
        return None
    return Torch(root, found[1])
