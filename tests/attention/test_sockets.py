"""PyTorch's own scaled_dot_product_attention on our kernels, and back."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import (
    SDPBackend,
    activate_flash_attention_impl,
    restore_flash_attention_impl,
    sdpa_kernel,
)
from torch.profiler import ProfilerActivity, profile

import udlkernels
from udlkernels import testing
from udlkernels.attention.attention import reference

pytestmark = pytest.mark.skipif(
    udlkernels._library._extension is None, reason="needs the C++ kernels"
)


@pytest.fixture
def active() -> Iterator[None]:
    udlkernels.attention.register()
    activate_flash_attention_impl("udlkernels")
    yield
    restore_flash_attention_impl()
    torch.compiler.reset()


def _inputs(dtype=torch.float32, layout="bhtd", heads=4, kv_heads=4):
    found = []
    for seed, count in enumerate((heads, kv_heads, kv_heads)):
        x = testing.make((2, count, 70, 32), dtype, seed=seed)
        if layout == "bthd":
            x = x.transpose(1, 2).contiguous().transpose(1, 2)
        elif layout == "sliced":
            x = testing.lay_out(x, "sliced")
        found.append(x)
    return found


def _ops(fn) -> str:
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        fn()
    return " ".join(event.key for event in profiler.key_averages())


def _oracle(q, k, v, mask=None, causal=False):
    boolean = mask is not None and mask.dtype == torch.bool
    return reference.attention(
        q, k, v, causal="top_left" if causal else None,
        mask=mask if boolean else None, bias=None if boolean else mask,
    )  # fmt: skip


@pytest.mark.parametrize("layout", ["bhtd", "bthd", "sliced"])
@pytest.mark.parametrize("kind", ["full", "causal", "bool", "float"])
def test_unmodified_code_runs_on_our_kernels(active, dtype_any, layout, kind):
    mask = {
        "bool": testing.make((2, 1, 70, 70)) > -1,
        "float": testing.make((70, 70), dtype_any),
    }.get(kind)
    inputs = _inputs(dtype_any, layout)

    def theirs(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=kind == "causal")

    def exact(q, k, v):
        wide = mask.to(q.dtype) if kind == "float" else mask
        return _oracle(q, k, v, wide, kind == "causal")

    assert "udlkernels::attention_fwd" in _ops(lambda: theirs(*inputs))

    def peer(q, k, v):
        with sdpa_kernel(SDPBackend.MATH):
            return theirs(q, k, v)

    testing.compare(theirs, exact, [peer], inputs, reduction=70)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiled(active, compiler):
    def model(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True) * 2

    for layout in ("bhtd", "bthd"):
        inputs = _inputs(layout=layout)
        compiled = torch.compile(model, backend=compiler, fullgraph=True)
        expected, found = testing.run(model, inputs), testing.run(compiled, inputs)
        assert "udlkernels::attention_fwd" in _ops(lambda c=compiled, i=inputs: testing.run(c, i))
        pairs = zip(expected.outputs + expected.gradients, found.outputs + found.gradients)  # noqa: B905
        for ours, theirs in pairs:
            testing.check(theirs, ours.double(), [])


def test_restored_it_is_pytorchs(active):
    inputs = _inputs()
    restore_flash_attention_impl()
    assert "udlkernels" not in _ops(lambda: F.scaled_dot_product_attention(*inputs))
    activate_flash_attention_impl("udlkernels")
    assert "udlkernels" in _ops(lambda: F.scaled_dot_product_attention(*inputs))


def test_grouped_heads(active):
    inputs = _inputs(heads=4, kv_heads=2)
    testing.compare(
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
        _oracle, [], inputs, reduction=70,
    )  # fmt: skip


def test_registering_activates_nothing():
    udlkernels.attention.register()
    assert "udlkernels" in torch.nn.attention.list_flash_attention_impls()
    assert "udlkernels" not in _ops(lambda: F.scaled_dot_product_attention(*_inputs()))
