"""weight_norm: values, gradients, layouts, compilation, determinism, parametrization, errors."""

from __future__ import annotations

import copy

import pytest
import torch

import udlkernels
from tests.support import assert_compiles, assert_deterministic, assert_opcheck
from udlkernels import functional as U
from udlkernels import testing
from udlkernels.normalization.weight_norm import reference

SHAPES = [(7, 5), (3, 70, 9, 3), (5, 16), (300, 30, 3), (2, 5001)]
SMALL = [(7, 5), (3, 4, 3, 3), (2, 3000)]
OPS = "weight_norm_fwd", "weight_norm_bwd"


def _inputs(shape, dtype=torch.float32, device="cpu", dim=0, layout="contiguous", **kw):
    lengths = [n if d == dim else 1 for d, n in enumerate(shape)]
    param_dtype = kw.pop("param_dtype", dtype)
    return [
        testing.make(shape, dtype, layout=layout, device=device, **kw),
        testing.make(lengths, param_dtype, device=device, seed=1),
    ]


def _kernel(v, g):
    return U.weight_norm(v, g, implementation="kernel")


def _compare(inputs, dim=0, gradients=True):
    return testing.compare(
        lambda v, g: U.weight_norm(v, g, dim, implementation="kernel"),
        lambda v, g: reference.weight_norm(v, g, dim),
        [lambda v, g: torch._weight_norm(v, g, dim)],
        inputs,
        gradients=gradients,
    )


def test_values_and_gradients(every_backend, dtype):
    for shape in SMALL if every_backend.small else SHAPES:
        _compare(_inputs(shape, dtype, every_backend.device))


@pytest.mark.parametrize("dim", [1, 2, -1])
def test_other_dimensions(backend, dtype, dim):
    shape = (4, 6, 3)
    ours = _compare(_inputs(shape, dtype, backend.device, dim), dim)
    assert ours.outputs[0].is_contiguous()
    if dim == -1:
        v = testing.make(shape, dtype, device=backend.device)
        g = torch.ones((), dtype=dtype, device=backend.device)
        assert torch.equal(U.weight_norm(v, g, None), U.weight_norm(v, g.reshape(1, 1, 1), -1))


@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_layouts(backend, dtype, layout):
    for shape in SMALL[:2] if backend.small else SHAPES:
        _compare(_inputs(shape, dtype, backend.device, layout=layout))


@pytest.mark.parametrize("values", ["normal", "shifted", "constant", "zeros", "nonfinite"])
def test_values(backend, dtype, values):
    inputs = _inputs((6, 40), dtype, backend.device, values=values)
    _compare(inputs, gradients=values not in ("zeros", "nonfinite"))


def test_squares_that_overflow_are_rescaled(backend):
    v, g = _inputs((4, 40), device=backend.device)
    w = _kernel(v * 2.0**100, g)
    testing.check(w, reference.weight_norm(v.double(), g.double()), [torch._weight_norm(v, g, 0)])


def test_sixteen_bit_input_with_wider_lengths(backend):
    inputs = _inputs((6, 40), torch.float16, backend.device, param_dtype=torch.float32)
    ours = _compare(inputs)
    assert [g.dtype for g in ours.gradients] == [torch.float16, torch.float32]


def test_rows_of_one_element_are_signs(backend):
    v, g = _inputs((9, 1), device=backend.device)
    testing.check(_kernel(v, g), v.double().sign() * g.double(), [])


def test_rows_have_their_lengths(backend):
    v, g = _inputs((6, 40), device=backend.device)
    norms = _kernel(v, g.abs()).norm(dim=1, keepdim=True)
    testing.check(norms, g.abs().double(), [], reduction=40)


def test_gradcheck_on_the_kernel():
    for dim in (0, 1, -1):
        leaves = [t.requires_grad_() for t in _inputs((3, 4, 2), torch.float64, dim=dim)]
        assert torch.autograd.gradcheck(lambda v, g, d=dim: U.weight_norm(v, g, d), leaves)
        assert torch.autograd.gradgradcheck(lambda v, g, d=dim: U.weight_norm(v, g, d), leaves)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiled(dynamic):
    assert_compiles(_kernel, [_inputs((6, n)) for n in (40, 56)], OPS, "aot_eager", dynamic)


def test_compiled_by_inductor():
    assert_compiles(_kernel, [_inputs((6, 40))], OPS, "inductor", False)


def test_opcheck():
    op = torch.ops.udlkernels
    v, g = _inputs((6, 5, 3), layout="transposed")
    w, norm = op.weight_norm_fwd(v, g)
    assert_opcheck(op.weight_norm_fwd, (v, g))
    assert_opcheck(op.weight_norm_bwd, (w, v, g, norm, True))
    assert_opcheck(op.weight_norm_bwd, (w, v, g, norm, False))


def test_same_bits_at_any_thread_count(dtype_any):
    assert_deterministic(_kernel, _inputs((300, 700), dtype_any))


def test_a_row_does_not_depend_on_the_others(backend, dtype):
    v, g = _inputs((6, 40), dtype, backend.device)
    assert torch.equal(_kernel(v, g)[2:3], _kernel(v[2:3], g[2:3]))


@pytest.mark.parametrize("dim", [0, 1, None])
def test_parametrization_is_torchs(dim):
    torch.manual_seed(1)
    ours = udlkernels.nn.utils.parametrizations.weight_norm(torch.nn.Linear(6, 4), dim=dim)
    theirs = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(6, 4), dim=dim)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    theirs.load_state_dict(ours.state_dict())
    x = testing.make((5, 6))
    exact = copy.deepcopy(theirs).double()
    testing.compare(ours, exact, [theirs], [x])
    choices = udlkernels.explain(ours, x).choices
    assert [(c.op, c.implementation) for c in choices] == [("weight_norm", "kernel")]


def test_parametrization_loads_the_old_names():
    old = torch.nn.utils.weight_norm(torch.nn.Linear(6, 4))
    ours = udlkernels.nn.utils.parametrizations.weight_norm(torch.nn.Linear(6, 4))
    ours.load_state_dict(old.state_dict())
    assert torch.equal(ours.parametrizations.weight.original1, old.weight_v)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(v=torch.ones(3, 4).int()), "v: expected"),
        (dict(dim=2), "dim: expected"),
        (dict(dim=-2), "dim: expected"),
        (dict(g=torch.ones(4, 1)), "g: expected"),
        (dict(g=torch.ones(3)), "g: expected"),
        (dict(g=torch.ones(3, 1, device="meta")), "g: expected"),
        (dict(g=torch.ones(3, 1).int()), "g: expected"),
        (dict(implementation="fast"), "implementation: expected"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_input(change, message):
    with pytest.raises(udlkernels.ArgumentError, match=message):
        U.weight_norm(**(dict(v=torch.ones(3, 4), g=torch.ones(3, 1)) | change))


def test_no_elements():
    assert U.weight_norm(torch.ones(3, 0), torch.ones(3, 1)).shape == (3, 0)
