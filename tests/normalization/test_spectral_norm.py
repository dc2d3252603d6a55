"""spectral_norm: values, gradients, layouts, compilation, determinism, parametrization, errors."""

from __future__ import annotations

import pytest
import torch

import udlkernels
from tests.support import assert_compiles, assert_deterministic, assert_opcheck
from udlkernels import functional as U
from udlkernels import testing
from udlkernels.normalization.spectral_norm import reference

SHAPES = [(7, 5), (3, 70, 9, 3), (40, 16), (300, 30, 3), (2, 5001), (9, 1)]
SMALL = [(7, 5), (3, 4, 3, 3), (2, 1500)]
OPS = "spectral_norm_fwd", "spectral_norm_bwd"
MODES = [dict(), dict(n_power_iterations=3), dict(training=False)]


def _compare(weight, **mode):
    u = testing.make(weight.shape[:1], weight.dtype, device=weight.device, seed=3)
    iterations = 0 if not mode.get("training", True) else mode.get("n_power_iterations", 1)
    return testing.compare(
        lambda w: U.spectral_norm(w, u, implementation="kernel", **mode),
        lambda w: reference.spectral_norm(w, u.to(w.dtype), iterations),
        [],
        [weight],
        reduction=weight.numel(),
    )


def _kernel(weight, u):
    return U.spectral_norm(weight, u.detach(), implementation="kernel")[0]


def test_values_and_gradients(every_backend, dtype):
    for shape in SMALL if every_backend.small else SHAPES:
        for mode in MODES:
            _compare(testing.make(shape, dtype, device=every_backend.device), **mode)


@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_layouts(backend, dtype, layout):
    for shape in SMALL[:2] if backend.small else SHAPES[:4]:
        ours = _compare(testing.make(shape, dtype, layout=layout, device=backend.device))
        assert ours.outputs[0].is_contiguous()


def test_arguments_are_not_written(backend):
    weight, u = (testing.make(n, device=backend.device) for n in ((6, 8), (6,)))
    before = u.clone()
    for mode in MODES:
        _, new_u, v = U.spectral_norm(weight, u, implementation="kernel", **mode)
        assert torch.equal(u, before)
        assert new_u.data_ptr() != u.data_ptr()
        assert v.shape == (8,) and not new_u.requires_grad


def test_converges_to_the_largest_singular_value(backend):
    weight, u = (testing.make(n, device=backend.device) for n in ((6, 9), (6,)))
    y, u, _ = U.spectral_norm(weight, u, n_power_iterations=200, implementation="kernel")
    largest = torch.linalg.matrix_norm(y.double(), 2).float()
    testing.check(largest, torch.ones_like(largest), [], reduction=54)


def test_gradcheck_on_the_kernel():
    weight = testing.make((4, 3, 2), torch.float64)
    u, v = reference.power_iteration(weight, testing.make((4,), torch.float64), 5, 0.0)
    weight.requires_grad_()

    def fixed(w):
        from udlkernels.normalization.spectral_norm.op import normalize

        return normalize(w, u, v, 0, 1e-12)[0]

    assert torch.autograd.gradcheck(fixed, [weight])
    assert torch.autograd.gradgradcheck(fixed, [weight])


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiled(dynamic):
    inputs = [[testing.make((6, n)), testing.make((6,))] for n in (40, 56)]
    assert_compiles(_kernel, inputs, OPS, "aot_eager", dynamic)


def test_compiled_by_inductor():
    inputs = [testing.make((6, 40)), testing.make((6,))]
    assert_compiles(_kernel, [inputs], OPS, "inductor", False)


def test_opcheck():
    op = torch.ops.udlkernels
    weight, u = testing.make((6, 5, 3), layout="transposed"), testing.make((6,))
    y, new_u, v, sigma = op.spectral_norm_fwd(weight, u, None, 1, 1e-12)
    assert_opcheck(op.spectral_norm_fwd, (weight, u, None, 1, 1e-12))
    assert_opcheck(op.spectral_norm_fwd, (weight, None, v, 2, 1e-12))
    assert_opcheck(op.spectral_norm_fwd, (weight, u, v, 0, 1e-12))
    assert_opcheck(op.spectral_norm_bwd, (y, weight, new_u, v, sigma))


def test_same_bits_at_any_thread_count(dtype_any):
    weight, u = testing.make((300, 700), dtype_any), testing.make((300,), dtype_any)
    assert_deterministic(lambda w: U.spectral_norm(w, u, implementation="kernel"), [weight])


@pytest.mark.parametrize("make", [
    lambda: torch.nn.Linear(6, 4),
    lambda: torch.nn.Conv2d(3, 4, 3),
    lambda: torch.nn.ConvTranspose2d(3, 4, 3),
], ids=["linear", "conv", "transposed"])  # fmt: skip
def test_parametrization_is_torchs(make):
    ours = udlkernels.nn.utils.parametrizations.spectral_norm(make())
    theirs = torch.nn.utils.parametrizations.spectral_norm(make())
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    theirs.load_state_dict(ours.state_dict())
    exact = torch.nn.utils.parametrizations.spectral_norm(make()).double()
    exact.load_state_dict(ours.state_dict())
    x = testing.make((2, 6) if isinstance(ours, torch.nn.Linear) else (2, 3, 5, 5))
    for module in (ours, theirs, exact):
        module(x.to(module.weight.dtype)).square().sum().backward()
    for ours_buffer, theirs_buffer in zip(ours.buffers(), theirs.buffers(), strict=True):
        testing.check(ours_buffer, theirs_buffer.double(), [], reduction=36)
    grads = [m.parametrizations.weight.original.grad for m in (ours, theirs, exact)]
    testing.check(grads[0], grads[2], [grads[1]], reduction=36)
    for module in (ours, theirs, exact):
        module.eval()
    with torch.no_grad():
        before = ours.state_dict()["parametrizations.weight.0._u"].clone()
        testing.check(ours.weight, exact.weight, [theirs.weight], reduction=36)
        assert torch.equal(ours.state_dict()["parametrizations.weight.0._u"], before)


def test_two_forwards_before_a_backward():
    module = udlkernels.nn.utils.parametrizations.spectral_norm(torch.nn.Linear(6, 4))
    x = testing.make((3, 6))
    (module(x) - module(2 * x)).sum().backward()
    assert module.parametrizations.weight.original.grad.isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(weight=torch.ones(3)), "weight: expected"),
        (dict(weight=torch.ones(3, 4).int()), "weight: expected"),
        (dict(weight=torch.ones(3, 0)), "weight: expected"),
        (dict(u=torch.ones(4)), "u: expected"),
        (dict(u=torch.ones(3).int()), "u: expected"),
        (dict(u=torch.ones(3, device="meta")), "u: expected"),
        (dict(n_power_iterations=0), "n_power_iterations: expected"),
        (dict(eps=-1.0), "eps: expected"),
        (dict(implementation="torch"), "PyTorch has no such function"),
        (dict(implementation="fast"), "implementation: expected"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_input(change, message):
    with pytest.raises(udlkernels.ArgumentError, match=message):
        U.spectral_norm(**(dict(weight=torch.ones(3, 4), u=torch.ones(3)) | change))
