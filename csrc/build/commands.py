"""The setuptools commands that setup.py plugs in."""

from __future__ import annotations

import platform
from pathlib import Path

import extension
from setuptools import Extension
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext


class BuildExtension(build_ext):
    """Builds the library, whose file name is the same for every Python."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split(".")).with_suffix(".so"))

    def build_extension(self, ext: Extension) -> None:
        # Warnings are errors for developers, not for those who install with a newer compiler.
        strict = self.inplace or self.editable_mode
        extension.build(Path(self.get_ext_fullpath(ext.name)), strict=bool(strict))


class BuildWheel(bdist_wheel):
    """Tags the wheel by the platform alone: the library links no Python."""

    def get_tag(self) -> tuple[str, str, str]:
        _, _, system = super().get_tag()
        if self.root_is_pure:
            return "py3", "none", system
        # A universal Python on macOS: the library holds the code of one machine only.
        return "py3", "none", system.replace("universal2", platform.machine())
