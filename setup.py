"""The compiled part of the package; everything else is declared in pyproject.toml."""

import os
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup

sys.path.insert(0, str(Path(__file__).parent / "csrc" / "build"))
from commands import BuildExtension, BuildWheel

pure = os.environ.get("UDLKERNELS_NO_EXTENSION") == "1"
beside = find_packages(include=["models*", "benchmarks*"])

setup(
    packages=find_packages(include=["udlkernels*"]) + [f"udlkernels.{name}" for name in beside],
    package_dir={"udlkernels.models": "models", "udlkernels.benchmarks": "benchmarks"},
    ext_modules=[] if pure else [Extension("udlkernels._C", sources=[])],
    cmdclass={"build_ext": BuildExtension, "bdist_wheel": BuildWheel},
)
