"""batch_norm and batch_norm_act: values, statistics, gradients, layouts, modules, errors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import udlkernels
from tests.support import assert_compiles, assert_deterministic, assert_opcheck
from udlkernels import functional as U
from udlkernels import testing
from udlkernels.normalization._activation import ACTIVATIONS
from udlkernels.normalization.batch_norm import reference

SHAPES = [(6, 5), (100, 33), (3, 4, 1), (3, 5, 63), (2, 3, 5, 7), (5, 40, 9, 9), (2, 3, 4, 5, 6)]
SMALL = [(6, 5), (3, 4, 9), (2, 3, 4, 5)]


def _inputs(shape, dtype=torch.float32, device="cpu", layout="contiguous", values="normal"):
    x = testing.make(shape, dtype, values, layout, device)
    params = [testing.make((shape[1],), dtype, device=device, seed=seed) for seed in (1, 2)]
    return [x, *params]


def _kernel(x, w, b):
    return U.batch_norm(x, None, None, w, b, True, implementation="kernel")


def _oracle(x, w, b):
    return reference.batch_norm_act(x, None, None, w, b, True)


def _torch(x, w, b):
    return F.batch_norm(x, None, None, w, b, True)


def test_values_and_gradients(every_backend, dtype):
    for shape in SMALL if every_backend.small else SHAPES:
        testing.compare(_kernel, _oracle, [_torch], _inputs(shape, dtype, every_backend.device))


@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_layouts(backend, dtype, layout):
    for shape in (
        [(2, 3, 4, 5)] if backend.small else [(6, 24, 5, 7), (8, 3, 16, 18), (33, 20), (4, 17, 50)]
    ):
        if layout == "expanded" and len(shape) == 2:
            continue  # one value a channel: float64 cancels, the oracle has no more digits
        testing.compare(_kernel, _oracle, [_torch], _inputs(shape, dtype, backend.device, layout))


def test_channels_last_stays_channels_last(backend):
    x, w, b = _inputs((2, 8, 3, 4), device=backend.device, layout="channels_last")
    x.requires_grad_()
    y = _kernel(x, w, b)
    y.sum().backward()
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert _kernel(x.detach().contiguous(), w, b).is_contiguous()


@pytest.mark.parametrize("values", testing.VALUES)
def test_values(backend, dtype, values):
    inputs = _inputs((4, 6, 30), dtype, backend.device, values=values)
    gradients = values not in ("nonfinite", "constant", "zeros", "denormal")
    testing.compare(_kernel, _oracle, [_torch], inputs, gradients=gradients)


def test_squares_that_overflow_are_rescaled(backend):
    x = testing.make((4, 3, 16), device=backend.device)
    y = U.batch_norm(x * 2.0**100, None, None, training=True, implementation="kernel")
    exact = reference.batch_norm_act(x.double(), None, None, training=True, eps=0.0)
    testing.check(y, exact, [F.batch_norm(x, None, None, training=True, eps=1e-30)])


@pytest.mark.parametrize("momentum", [0.1, 1.0])
def test_running_statistics(backend, dtype, momentum):
    for shape in SMALL:
        x, w, b = _inputs(shape, dtype, backend.device)
        ours = [torch.full((shape[1],), v, device=backend.device, dtype=dtype) for v in (0.5, 2.0)]
        theirs = [t.clone() for t in ours]
        exact = [t.double() for t in ours]
        U.batch_norm(x, *ours, w, b, True, momentum, implementation="kernel")
        F.batch_norm(x, *theirs, w, b, True, momentum)
        reference.batch_norm_act(x.double(), *exact, None, None, True, momentum)
        for mine, other, right in zip(ours, theirs, exact, strict=True):
            testing.check(mine, right, [other], "running statistic")


def test_evaluation(backend, dtype):
    for shape in SMALL if backend.small else SHAPES:
        mean = testing.make((shape[1],), dtype, device=backend.device, seed=3)
        var = testing.make((shape[1],), dtype, device=backend.device, seed=4).abs() + 0.5
        testing.compare(
            lambda x, w, b, m=mean, v=var: U.batch_norm(
                x, m.to(x.dtype), v.to(x.dtype), w, b, implementation="kernel"
            ),
            lambda x, w, b, m=mean, v=var: reference.batch_norm_act(x, m, v, w, b),
            [lambda x, w, b, m=mean, v=var: F.batch_norm(x, m, v, w, b)],
            _inputs(shape, dtype, backend.device),
        )


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("with_residual", [False, True], ids=["plain", "residual"])
def test_batch_norm_act(backend, dtype, activation, with_residual):
    keywords = dict(activation=activation, negative_slope=0.2)
    for layout in ("contiguous", "channels_last"):
        shape = (4, 8, 3, 5) if backend.small else (4, 20, 6, 7)
        x, w, b = _inputs(shape, dtype, backend.device, layout)
        residual = testing.make(shape, dtype, layout=layout, device=backend.device, seed=9)
        testing.compare(
            lambda x, w, b, r: U.batch_norm_act(
                x, None, None, w, b, True, residual=r, implementation="kernel", **keywords
            ),
            lambda x, w, b, r: reference.batch_norm_act(
                x, None, None, w, b, True, residual=r, **keywords
            ),
            [],
            [x, w, b, residual if with_residual else None],
        )


def test_sixteen_bit_input_with_float32_parameters(backend, dtype):
    if dtype not in (torch.float16, torch.bfloat16):
        return
    x = testing.make((4, 6, 30), dtype, device=backend.device)
    params = [testing.make((6,), device=backend.device, seed=seed) for seed in (1, 2)]
    ours = testing.compare(_kernel, _oracle, [_torch], [x, *params])
    assert [g.dtype for g in ours.gradients] == [dtype, torch.float32, torch.float32]


def test_gradcheck_on_the_kernel():
    x, w, b = (t.requires_grad_() for t in _inputs((3, 2, 4), torch.float64))
    residual = testing.make((3, 2, 4), torch.float64, seed=9).requires_grad_()

    def fused(x, w, b, r):
        return U.batch_norm_act(
            x, None, None, w, b, True, activation="silu", residual=r, implementation="kernel"
        )

    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(_kernel, [x, w, b])
        assert check(fused, [x, w, b, residual])


@pytest.mark.parametrize("compiler", ["aot_eager-static", "aot_eager-dynamic", "inductor-static"])
def test_compiled(compiler):
    name, shapes = compiler.split("-")
    inputs = [_inputs((n, 6, 10)) for n in (4, 7)]
    ops = ("batch_norm_fwd", "batch_norm_bwd")
    assert_compiles(_kernel, inputs, ops, name, shapes == "dynamic")


def test_opcheck():
    x, w, b = _inputs((4, 6, 5, 5), layout="channels_last")
    mean, var = torch.zeros(6), torch.ones(6)
    op = torch.ops.udlkernels
    args = (x, None, w, b, mean, var, True, 0.1, 1e-5, 1, 0.01)
    y, stats, _, _ = op.batch_norm_fwd(*args)
    assert_opcheck(op.batch_norm_fwd, args)
    assert_opcheck(op.batch_norm_fwd, (x, x, None, None, mean, var, False, 0.1, 1e-5, 5, 0.01))
    back = (y, x, None, None, w, b, stats, True, 1, 0.01, True, False, True, True)
    assert_opcheck(op.batch_norm_bwd, back)
    assert_opcheck(op.batch_norm_moments, (x,))
    assert_opcheck(op.batch_norm_sums, (y, x, stats))
    means = torch.zeros(2, 6, dtype=torch.float64)
    assert_opcheck(op.batch_norm_dx, (y, x, w, stats, means))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_same_bits_at_any_thread_count(dtype_any, layout):
    for shape in [(16, 24, 20, 20), (32, 3, 40, 40), (700, 33), (5, 3, 1000)]:
        assert_deterministic(_kernel, _inputs(shape, dtype_any, layout=layout))


@pytest.mark.parametrize(
    ("ours", "theirs", "shape"),
    [
        (udlkernels.nn.BatchNorm1d, torch.nn.BatchNorm1d, (9, 5)),
        (udlkernels.nn.BatchNorm2d, torch.nn.BatchNorm2d, (3, 5, 4, 4)),
        (udlkernels.nn.BatchNorm3d, torch.nn.BatchNorm3d, (2, 5, 2, 3, 4)),
        (udlkernels.nn.LazyBatchNorm2d, torch.nn.LazyBatchNorm2d, (3, 5, 4, 4)),
    ],
    ids=["1d", "2d", "3d", "lazy"],
)
@pytest.mark.parametrize(
    "options",
    [{}, dict(momentum=None), dict(track_running_stats=False), dict(affine=False, eps=1e-3)],
    ids=["plain", "cumulative", "untracked", "bare"],
)
def test_modules_are_torchs(ours, theirs, shape, options):
    lazy = ours is udlkernels.nn.LazyBatchNorm2d
    one, other = (cls(**options) if lazy else cls(5, **options) for cls in (ours, theirs))
    assert isinstance(one, theirs)
    for training in (True, True, True, False):
        one.train(training), other.train(training)
        x = testing.make(shape, seed=int(torch.randint(99, ())))
        y, expected = one(x), other(x)
        testing.check(y, expected.double(), [])
    assert one.state_dict().keys() == other.state_dict().keys()
    if "track_running_stats" not in options:
        assert torch.equal(one.num_batches_tracked, other.num_batches_tracked)


def test_cumulative_statistics_compile_in_one_graph():
    ours, compiled = (udlkernels.nn.BatchNorm1d(5, momentum=None) for _ in range(2))
    call = torch.compile(compiled, backend="aot_eager", fullgraph=True)
    for seed in range(3):
        x = testing.make((4, 5, 6), seed=seed)
        assert torch.equal(ours(x), call(x))
    for name, buffer in ours.named_buffers():
        testing.check(compiled.get_buffer(name).float(), buffer.double(), [], name)


def test_accelerate_keeps_the_state():
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 4))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    assert type(udlkernels.accelerate(model)[0]) is udlkernels.nn.BatchNorm1d
    assert all(torch.equal(model.state_dict()[name], value) for name, value in state.items())
    assert type(udlkernels.restore(model)[0]) is torch.nn.BatchNorm1d
    with udlkernels.accelerated(model):
        assert type(model[0]) is udlkernels.nn.BatchNorm1d
    assert type(model[0]) is torch.nn.BatchNorm1d


def test_bad_input_gives_torchs_own_answer():
    x = testing.make((4, 5))
    for args in [
        (x, None, None),
        (x[:1], None, None, None, None, True),
        (x, torch.zeros(4), torch.ones(4)),
        (x, None, None, torch.ones(6), None, True),
        (x.int(), None, None, None, None, True),
        (x, None, None, None, None, True, 0.1, -1.0),
    ]:
        with pytest.raises(Exception) as ours:
            U.batch_norm(*args)
        with pytest.raises(Exception) as theirs:
            F.batch_norm(*args)
        assert (type(ours.value), str(ours.value)) == (type(theirs.value), str(theirs.value))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(activation="tanh"), "activation: expected"),
        (dict(residual=torch.ones(4, 6)), "residual: expected"),
        (dict(weight=torch.ones(6)), "weight has shape"),
        (dict(input=torch.ones(4, 5).int()), "input: expected a floating"),
        (dict(input=torch.ones(1, 5)), "more than 1 value per channel"),
        (dict(training=False), "without running statistics"),
        (dict(eps=float("nan")), "eps of nan"),
    ],
    ids=["activation", "residual", "weight", "integers", "one-value", "evaluation", "eps"],
)
def test_bad_input_to_batch_norm_act(change, message):
    arguments = dict(input=testing.make((4, 5)), training=True) | change
    with pytest.raises(udlkernels.ArgumentError, match=message):
        U.batch_norm_act(running_mean=None, running_var=None, **arguments)
