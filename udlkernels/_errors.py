"""The one error class for bad arguments."""

from __future__ import annotations


class ArgumentError(ValueError, RuntimeError):
    """An argument that an op cannot accept: `[op] argument: expected …, got …`.

    Both a ValueError and a RuntimeError, since PyTorch raises now the one, now the other.
    """

    def __init__(self, op: str, argument: str, expected: str, got: object) -> None:
        super().__init__(f"[{op}] {argument}: expected {expected}, got {got}")
