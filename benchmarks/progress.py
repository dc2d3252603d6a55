"""Where a run stands, on standard error: a bar on a terminal, nothing in a log."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any


class Progress:
    """Counts rows; `note` says what happens between them."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.done = 0
        self._bar: Any = None
        self._task: Any = None
        if sys.stderr.isatty():
            self._bar = _rich_bar()

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task("", total=self.total)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, name: str) -> None:
        """The row `name` starts."""
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, description=name)
        self.done += 1

    def note(self, text: str) -> None:
        if self._bar is not None:
            self._bar.update(self._task, description=text)


def _rich_bar() -> Any:
    try:
        from rich import progress
        from rich.console import Console
    except ImportError:
        return None
    return progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
    )
