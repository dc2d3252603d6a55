"""Packages that only the models need."""

from importlib import util

from udlkernels._errors import ArgumentError


def require(package: str) -> None:
    if util.find_spec(package) is None:
        expected = "the package to be installed (pip install 'udlkernels[models]')"
        raise ArgumentError("train", package, expected, "none")
