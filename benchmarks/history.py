"""Ratios of earlier runs, and the rows that fell well below them twice running."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .results import Measured, write_atomically

FALLEN_BELOW = 0.6
_KEPT = 9  # ratios of each row


@dataclass(frozen=True)
class Fall:
    """A row whose ratio stood below `FALLEN_BELOW` of its recorded one twice running."""

    id: str
    recorded: float
    ratio: float

    def __str__(self) -> str:
        return f"{self.id}: {self.ratio:.2f}x, recorded {self.recorded:.2f}x"


class History:
    """Per machine and row: the last accepted ratios, and how often running it was low since.

    Ratios depend on the processor, so each has its own record.
    """

    def __init__(self, path: Path, machine: str) -> None:
        self.path = path
        self.records: dict[str, dict[str, Any]] = (
            json.loads(path.read_text()) if path.exists() else {}
        )
        self.rows = self.records.setdefault(machine, {})

    def recorded(self, row: str) -> float | None:
        ratios = self.rows.get(row, {}).get("ratios")
        return statistics.median(ratios) if ratios else None

    def low(self, ratios: Mapping[str, float]) -> list[str]:
        """The rows that stand low in these ratios, to be measured a second time."""
        return [row for row, ratio in ratios.items() if self._is_low(row, ratio)]

    def add(self, ratios: Mapping[str, float]) -> list[Fall]:
        """Records a run and returns the rows that were low in the one before it too."""
        fallen = []
        for row, ratio in ratios.items():
            entry = self.rows.setdefault(row, {"ratios": [], "low": 0})
            if self._is_low(row, ratio):
                entry["low"] += 1
                if entry["low"] >= 2:
                    fallen.append(Fall(row, self.recorded(row) or 0.0, ratio))
            else:
                entry["low"] = 0
                entry["ratios"] = [*entry["ratios"], round(ratio, 3)][-_KEPT:]
        return fallen

    def save(self) -> None:
        write_atomically(self.path, json.dumps(self.records, indent=1, sort_keys=True) + "\n")

    def _is_low(self, row: str, ratio: float) -> bool:
        recorded = self.recorded(row)
        return recorded is not None and ratio < FALLEN_BELOW * recorded


def ratios(rows: Iterable[Measured]) -> dict[str, float]:
    """Ratio to eager PyTorch of every forward and step that counts, tiny inputs apart."""
    kept = (row for row in rows if row.counts and row.group == "model" and row.phase != "backward")
    found = {row.id: row.ratio() for row in kept}
    return {row: ratio[0] for row, ratio in found.items() if ratio is not None}
