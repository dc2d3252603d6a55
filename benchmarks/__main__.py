"""`python -m udlkernels.benchmarks`: the same as `udlkernels bench`, without rich and typer."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from .allocator import DEFAULT_FLAG, ensure_allocator

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own log: read when torch loads


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmarks; 1 where a row is wrong or fell, 2 for bad arguments."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    ensure_allocator("default" if DEFAULT_FLAG in given else "raised", given)

    from udlkernels._errors import ArgumentError

    from .settings import parse
    from .suite import run

    try:
        return run(parse(given))
    except ArgumentError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
