"""The models of *Understanding Deep Learning*, one file each, named after the chapter.

A file is imported when its model is asked for, never before.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
import re
from typing import TYPE_CHECKING, Any

from udlkernels._errors import ArgumentError

if TYPE_CHECKING:
    from .task import Task


def names() -> list[str]:
    """The names of all models, by chapter."""
    found = (module.name for module in pkgutil.iter_modules(__path__))
    return sorted(name for name in found if re.match(r"ch\d\d_", name))


def load(name: str) -> Task[Any]:
    """The task that the model's file declares."""
    known = names()
    if name not in known:
        close = difflib.get_close_matches(name, known, n=3, cutoff=0.3)
        expected = " or ".join(close) if close else "a name that `udlkernels models` lists"
        raise ArgumentError("train", "model", expected, name)
    task: Task[Any] = importlib.import_module(f"{__name__}.{name}").TASK
    return task
