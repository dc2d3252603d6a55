"""`explain`: which implementation a call takes, and why not the others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from udlkernels import _dispatch


@dataclass
class Explanation:
    """The choices of one call, one for each op of the library that it reached."""

    choices: list[_dispatch.Choice]

    def __str__(self) -> str:
        if not self.choices:
            return "no op of udlkernels was called"
        return "\n".join(str(choice) for choice in self.choices)


def explain(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Runs `fn(*args, **kwargs)` once and names the implementation of every op it reached.

    Args:
        fn: a function of `udlkernels.functional` or `udlkernels.graph`, or anything that calls
            them: a module, a whole model.

    Returns:
        An object that prints one line an op, and one for every reason why another implementation
        was not taken; `.choices` holds the same as data.

    Raises:
        Whatever the call raises.
    """
    with _dispatch.recording() as choices:
        fn(*args, **kwargs)
    return Explanation(choices)
