"""weight_norm and spectral_norm: torch's parametrizations on our kernels.

Arguments, errors and `state_dict` keys are those of torch.nn.utils.parametrizations, whose classes
ours extend; the parametrized module loads and saves the same checkpoints.
"""

from __future__ import annotations

from typing import cast

import torch
from torch.nn.utils import parametrizations as _torch

from udlkernels import functional as F
from udlkernels._dispatch import kernel_ready
from udlkernels.normalization.spectral_norm.op import normalize

__all__ = ["spectral_norm", "weight_norm"]


class _WeightNorm(_torch._WeightNorm):
    def forward(self, weight_g: torch.Tensor, weight_v: torch.Tensor) -> torch.Tensor:
        return F.weight_norm(weight_v, weight_g, self.dim)


class _SpectralNorm(_torch._SpectralNorm):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        if weight.ndim < 2 or not kernel_ready(weight, self._u, self._v):
            return super().forward(weight)
        moved = weight.movedim(self.dim, 0)
        if self.training:
            y, u, v = normalize(moved, None, self._v, self.n_power_iterations, self.eps)
            with torch.no_grad():
                self._u.copy_(u)
                self._v.copy_(v)
        else:
            y, _, _ = normalize(moved, self._u, self._v, 0, self.eps)
        return y.movedim(0, self.dim).contiguous()


def weight_norm(module: torch.nn.Module, name: str = "weight", dim: int = 0) -> torch.nn.Module:
    """torch.nn.utils.parametrizations.weight_norm, computed by `functional.weight_norm`."""
    return _exchange(_torch.weight_norm(module, name, dim), name, _WeightNorm)


def spectral_norm(
    module: torch.nn.Module,
    name: str = "weight",
    n_power_iterations: int = 1,
    eps: float = 1e-12,
    dim: int | None = None,
) -> torch.nn.Module:
    """torch.nn.utils.parametrizations.spectral_norm, on the kernels of the function."""
    module = _torch.spectral_norm(module, name, n_power_iterations, eps, dim)
    return _exchange(module, name, _SpectralNorm)


def _exchange(module: torch.nn.Module, name: str, form: type) -> torch.nn.Module:
    """The newest parametrization of `name` as one of ours."""
    parametrizations = cast(torch.nn.ModuleDict, module.parametrizations)
    newest = cast(torch.nn.ModuleList, parametrizations[name])[-1]
    newest.__class__ = form
    return module
