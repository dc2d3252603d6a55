"""What a run found, as data: one `Measured` a row and phase, and the `Run` around them."""

from __future__ import annotations

import json
import os
import statistics
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from .timing import ratio_interval

OURS = "ours"
EAGER = "eager"
COMPILED = "compile"
COPY = "copy"
READ = "read"
CEILINGS = (COPY, READ)  # of a row one of them is sampled, by the op's traffic
# A speed is believed only down to this share of the time that the ceilings allow.
SUSPECT_BELOW = 1 / 1.15


@dataclass
class Measured:
    """One row and phase.

    `floor` is the time at the ceiling of the op's traffic, `least` the shortest that can be
    believed, at the best bandwidth of any kind, `computing` the time of the flops at the dense
    product's ceiling. `words` are the shape's name and tags, `peer_flops` those of a peer that has
    other flops than the op. `flags` says why a speed does not count.
    """

    id: str
    op: str
    shape: str
    group: str
    layout: str
    dtype: str
    phase: str
    threads: int
    bytes: int
    flops: int
    floor: float = 0.0
    least: float = 0.0
    computing: float = 0.0
    implementation: str = "kernel"
    samples: dict[str, list[float]] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    errors: dict[str, Any] = field(default_factory=dict)
    flags: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    twin: str = ""
    allocator: str = ""
    words: list[str] = field(default_factory=list)
    peer_flops: dict[str, int] = field(default_factory=dict)

    @property
    def counts(self) -> bool:
        """Whether the speed may be reported as ours."""
        return bool(self.samples) and not self.flags

    @property
    def fell_back(self) -> bool:
        return "torch" in self.flags

    def seconds(self, contestant: str = OURS) -> float | None:
        found = self.samples.get(contestant)
        return statistics.median(found) if found else None

    def ratio(self, peer: str = EAGER) -> tuple[float, float, float] | None:
        """Peer's time over ours, with the ends of its confidence interval."""
        if not self.samples.get(OURS) or not self.samples.get(peer):
            return None
        return ratio_interval(self.samples[OURS], self.samples[peer])

    @property
    def peers(self) -> list[str]:
        return [name for name in self.samples if name not in (OURS, *CEILINGS)]

    def speed_ratio(self, peer: str) -> float | None:
        """Our flops per second over the peer's, each with its own flops."""
        ratio = self.ratio(peer)
        return ratio[0] * self.flops / self.peer_flops.get(peer, self.flops) if ratio else None

    @property
    def share(self) -> float | None:
        """Of the ceiling: 1 is as fast as a copy (or read) of as many bytes, allocated and timed
        alike, or as the dense product where that takes longer."""
        seconds, moving = self.seconds(), self.seconds(COPY) or self.seconds(READ)
        return max(moving, self.computing) / seconds if seconds and moving else None

    @property
    def cached_share(self) -> float | None:
        """Of the higher ceiling of buffers that stay where they are, or of the dense product's."""
        seconds = self.seconds()
        return self.floor / seconds if seconds and self.floor else None

    def judge(self) -> None:
        """Adds the flag of a time that cannot be true."""
        seconds = self.seconds()
        if seconds is not None and seconds < self.least * SUSPECT_BELOW:
            self.flags.append("suspect")


@dataclass
class Run:
    environment: dict[str, Any]
    settings: dict[str, Any]
    ceilings: dict[str, Any]
    rows: list[Measured]
    scaling: dict[str, dict[str, float]] = field(default_factory=dict)
    default_allocator: list[Measured] = field(default_factory=list)
    cases: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0

    def to_json(self) -> str:
        """Everything, raw samples included, and the figures drawn from them; a line a row."""
        rows = [json.dumps(_short(asdict(row) | _derived(row))) for row in self.rows]
        rest = {name: value for name, value in asdict(self).items() if name != "rows"}
        return json.dumps(_short(rest))[:-1] + ', "rows": [\n' + ",\n".join(rows) + "\n]}\n"


def read_rows(path: Path) -> list[Measured]:
    """The rows of a file that `Run.to_json` wrote."""
    names = {field.name for field in fields(Measured)}
    found = json.loads(path.read_text())["rows"]
    return [Measured(**{name: row[name] for name in names & row.keys()}) for row in found]


def write_atomically(path: Path, text: str) -> None:
    """The whole new file or the whole old one, whenever the process ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_text(text)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _short(value: Any) -> Any:
    """Floats to five digits, more than any sample has: a third of the file."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: _short(item) for key, item in value.items()}
    return [_short(item) for item in value] if isinstance(value, list | tuple) else value


def _derived(row: Measured) -> dict[str, Any]:
    return {
        "seconds": {name: row.seconds(name) for name in row.samples},
        "ratio": {name: row.ratio(name) for name in row.peers},
        "share": row.share,
        "cached_share": row.cached_share,
    }
