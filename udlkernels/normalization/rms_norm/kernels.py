"""rms_norm and add_rms_norm on a GPU: the row kernels without centring."""

from __future__ import annotations

import torch

from udlkernels.normalization import _row_kernels as rows


def rms_norm_fwd(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    n: int,
    eps: float,
    weight_offset: float,
    cast_before_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    y, _, rstd = rows.launch_forward(
        x, None, weight, None, n, eps, center=False, weight_offset=weight_offset,
        cast_before=cast_before_weight,
    )  # fmt: skip
    return y, rstd


def rms_norm_bwd(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    rstd: torch.Tensor,
    n: int,
    weight_offset: float,
    need_dx: bool,
    need_dweight: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    dx, _, dweight, _ = rows.launch_backward(
        dy, None, x, weight, rstd, n, center=False, weight_offset=weight_offset, need_dx=need_dx,
        dweight_like=weight if need_dweight else None,
    )  # fmt: skip
    return dx, dweight


def add_rms_norm_fwd(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    n: int,
    eps: float,
    weight_offset: float,
    cast_before_weight: bool,
    dropout_p: float,
    seed: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    return rows.launch_forward(
        x, residual, weight, None, n, eps, center=False, weight_offset=weight_offset,
        cast_before=cast_before_weight, dropout_p=dropout_p, seed=seed,
    )  # fmt: skip


def add_rms_norm_bwd(
    dy: torch.Tensor,
    ds: torch.Tensor | None,
    s: torch.Tensor,
    weight: torch.Tensor | None,
    rstd: torch.Tensor,
    n: int,
    weight_offset: float,
    dropout_p: float,
    seed: torch.Tensor | None,
    need_dweight: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    d_s, d_x, dweight, _ = rows.launch_backward(
        dy, ds, s, weight, rstd, n, center=False, weight_offset=weight_offset,
        dropout_p=dropout_p, seed=seed, dweight_like=weight if need_dweight else None,
    )  # fmt: skip
    return d_s, d_x, dweight


AOT = rows.entries("rms_norm", center=False)
