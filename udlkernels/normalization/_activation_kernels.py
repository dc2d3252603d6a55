"""The activations and their derivatives inside Triton kernels; numbered as in `_activation.py`."""

import triton
import triton.language as tl

_SQRT_HALF = tl.constexpr(0.7071067811865476)
_INVERSE_SQRT_2PI = tl.constexpr(0.3989422804014327)
_SQRT_8_OVER_PI = tl.constexpr(1.5957691216057308)
_CUBIC = tl.constexpr(0.044715)


@triton.jit
def activate(x, negative_slope, ACTIVATION: tl.constexpr):
    """The activation of x, float32 or float64."""
    if ACTIVATION == 1:
        return tl.where(x < 0, 0.0, x)
    elif ACTIVATION == 2:
        return tl.where(x > 0, x, x * negative_slope)
    elif ACTIVATION == 3:
        return x * (0.5 + 0.5 * tl.erf(x * _SQRT_HALF))
    elif ACTIVATION == 4:
        # (1 + tanh u) / 2 is the logistic function of 2u.
        return x / (1.0 + tl.exp(-x * (_SQRT_8_OVER_PI * (1.0 + _CUBIC * x * x))))
    elif ACTIVATION == 5:
        return x / (1.0 + tl.exp(-x))
    else:
        return x


@triton.jit
def activate_grad(x, negative_slope, ACTIVATION: tl.constexpr):
    """The activation's derivative at x."""
    if ACTIVATION == 1:
        return tl.where(x <= 0, 0.0, 1.0)
    elif ACTIVATION == 2:
        return tl.where(x > 0, 1.0, negative_slope)
    elif ACTIVATION == 3:
        normal_cdf = 0.5 + 0.5 * tl.erf(x * _SQRT_HALF)
        return normal_cdf + x * tl.exp(-0.5 * x * x) * _INVERSE_SQRT_2PI
    elif ACTIVATION == 4:
        u = x * (_SQRT_8_OVER_PI * (1.0 + _CUBIC * x * x))
        e = tl.exp(-tl.abs(u))
        q = 1.0 / (1.0 + e)
        du = _SQRT_8_OVER_PI * (1.0 + 3.0 * _CUBIC * x * x)
        return tl.where(u < 0, e * q, q) + x * (e * q * q) * du
    elif ACTIVATION == 5:
        e = tl.exp(-tl.abs(x))
        q = 1.0 / (1.0 + e)
        return tl.where(x < 0, e * q, q) + x * (e * q * q)
    else:
        return x * 0.0 + 1.0
