"""layer_norm and add_layer_norm on a GPU: the row kernels with centring."""

from __future__ import annotations

import torch

from udlkernels.normalization import _row_kernels as rows


def layer_norm_fwd(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    n: int,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    y, _, stats = rows.launch_forward(x, None, weight, bias, n, eps, center=True)
    return y, stats


def layer_norm_bwd(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    stats: torch.Tensor,
    n: int,
    need_dx: bool,
    need_dweight: bool,
    need_dbias: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dx, _, dweight, dbias = rows.launch_backward(
        dy, None, x, weight, stats, n, center=True, need_dx=need_dx,
        dweight_like=weight if need_dweight else None, dbias_like=bias if need_dbias else None,
    )  # fmt: skip
    return dx, dweight, dbias


def add_layer_norm_fwd(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    n: int,
    eps: float,
    dropout_p: float,
    seed: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    return rows.launch_forward(
        x, residual, weight, bias, n, eps, center=True, dropout_p=dropout_p, seed=seed
    )


def add_layer_norm_bwd(
    dy: torch.Tensor,
    ds: torch.Tensor | None,
    s: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    stats: torch.Tensor,
    n: int,
    dropout_p: float,
    seed: torch.Tensor | None,
    need_dweight: bool,
    need_dbias: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    return rows.launch_backward(
        dy, ds, s, weight, stats, n, center=True, dropout_p=dropout_p, seed=seed,
        dweight_like=weight if need_dweight else None, dbias_like=bias if need_dbias else None,
    )  # fmt: skip


AOT = rows.entries("layer_norm", center=True)
