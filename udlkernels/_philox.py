"""Philox4x32-10 (Salmon et al., 2011) in plain torch: the random words behind every dropout.

Element `col` of row `row` uses word `col % 4` of counter `(col // 4, row)` under the key `seed`.
The C++ and Triton kernels produce the same bits, so a mask depends on nothing but the seed and an
element's place: not on the device, the threads or the block sizes.
"""

from __future__ import annotations

import torch

_LOW = 0xFFFFFFFF


def _multiply(a: int, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low 32 bits of a product of 32-bit numbers, without a 64-bit overflow."""
    high, low = a * (b >> 16), a * (b & 0xFFFF)
    return (high + (low >> 16)) >> 16, ((high << 16) + low) & _LOW


def words(seed: torch.Tensor, rows: int | torch.Tensor, cols: int) -> torch.Tensor:
    """Random 32-bit words, int64 [rows, cols]: of the first rows, or of those in a tensor."""
    device = seed.device
    groups = (cols + 3) // 4
    key = seed.reshape(())
    k0, k1 = key & _LOW, (key >> 32) & _LOW
    places = torch.arange(rows, device=device) if isinstance(rows, int) else rows.reshape(-1)
    row, count = places[:, None], places.numel()
    c0 = torch.arange(groups, device=device).expand(count, groups)
    c1 = (row & _LOW).expand(count, groups)
    c2 = (row >> 32).expand(count, groups)
    c3 = torch.zeros_like(c0)
    for _ in range(10):
        hi_a, lo_a = _multiply(0xD2511F53, c0)
        hi_b, lo_b = _multiply(0xCD9E8D57, c2)
        c0, c1, c2, c3 = hi_b ^ c1 ^ k0, lo_b, hi_a ^ c3 ^ k1, lo_a
        k0, k1 = (k0 + 0x9E3779B9) & _LOW, (k1 + 0xBB67AE85) & _LOW
    return torch.stack((c0, c1, c2, c3), -1).reshape(count, 4 * groups)[:, :cols]


def dropout(
    x: torch.Tensor, p: float, seed: torch.Tensor | None, cols: int,
    rows: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """x with elements zeroed with probability p and the rest scaled by 1 / (1 - p).

    Args:
        cols: how many elements of x make a row.
        rows: which row of the generator each row of x takes; None for 0, 1, 2 and so on.
    """
    if p <= 0 or seed is None or x.numel() == 0:
        return x
    places = x.numel() // cols if rows is None else rows
    dropped = words(seed, places, cols).reshape(x.shape) < threshold(p)
    scale = 1.0 / (1.0 - p) if p < 1 else 0.0
    return torch.where(dropped, torch.zeros((), dtype=x.dtype, device=x.device), x * scale)


def threshold(p: float) -> int:
    """An element is dropped where its word is below this."""
    return min(int(p * 2**32), _LOW)


def draw_seed(x: torch.Tensor) -> torch.Tensor:
    """A fresh seed from torch's generator of x's device."""
    return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=x.device)
