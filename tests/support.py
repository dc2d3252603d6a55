"""What every op's test asserts in the same way."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch._dynamo.backends.common import aot_autograd
from torch._functorch import config as functorch_config

from udlkernels import testing


def assert_compiles(
    fn: Callable[..., Any],
    input_sets: Sequence[Sequence[torch.Tensor | None]],
    ops: tuple[str, ...],
    backend: str = "aot_eager",
    dynamic: bool = False,
    gradients: bool = True,
) -> None:
    """Compiles in one graph; the kernels' ops stand in it; values and gradients are eager's bits.

    Args:
        ops: names of the forward and the backward op; without gradients of all in the forward.
        input_sets: one call each; with `dynamic` all must run without a second compilation.
    """
    graphs: list[str] = []

    def inspect(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        # A node that makes an op functional has the op as its first argument.
        graphs.append(" ".join(f"{node.target} {node.args[:1]}" for node in graph.graph.nodes))
        return graph

    def compiler(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        if backend == "aot_eager":
            return aot_autograd(fw_compiler=inspect, bw_compiler=inspect)(graph, inputs)
        from torch._inductor.compile_fx import compile_fx, compile_fx_inner

        def inner(inner_graph: torch.fx.GraphModule, inner_inputs: Any, **kwargs: Any) -> Any:
            inspect(inner_graph, inner_inputs)
            return compile_fx_inner(inner_graph, inner_inputs, **kwargs)

        with functorch_config.patch(enable_autograd_cache=False):  # it would skip `inner`
            return compile_fx(graph, inputs, inner_compile=inner)

    torch._dynamo.reset()
    compiled = torch.compile(fn, fullgraph=True, dynamic=dynamic, backend=compiler)
    for inputs in input_sets:
        torch.manual_seed(5)
        expected = testing.run(fn, inputs, gradients=gradients)
        torch.manual_seed(5)
        found = testing.run(compiled, inputs, gradients=gradients)
        _assert_same(found, expected)
    for op in ops:
        assert any(f"udlkernels.{op}" in graph for graph in graphs), (op, graphs)
    if dynamic:
        assert len(graphs) == 1 + gradients, f"{len(graphs)} graphs for {len(input_sets)} shapes"


def assert_deterministic(
    fn: Callable[..., Any], inputs: Sequence[torch.Tensor | None], gradients: bool = True
) -> None:
    """The same bits, outputs and gradients, twice over and at 1, 2 and 3 threads."""
    with testing.threads(1):
        expected = testing.run(fn, inputs, gradients=gradients)
    for count in (1, 2, 3):
        with testing.threads(count):
            _assert_same(testing.run(fn, inputs, gradients=gradients), expected)


def assert_rows_independent(
    fn: Callable[..., Any], inputs: Sequence[torch.Tensor | None], batched: Sequence[int] = (0,)
) -> None:
    """A sample's output and gradient are the same bits whatever is computed beside it.

    Args:
        batched: the positions of the inputs whose first dimension is the batch.
    """
    whole = testing.run(fn, inputs)
    size = inputs[batched[0]].shape[0]
    cotangents = testing.make_cotangents(whole.outputs)
    for part in (slice(0, 1), slice(size // 2, size // 2 + 2), slice(size - 3, size)):
        some = [t[part] if i in batched and t is not None else t for i, t in enumerate(inputs)]
        found = testing.run(fn, some, [c[part] for c in cotangents])
        for ours, theirs in zip(found.outputs, whole.outputs, strict=True):
            assert torch.equal(ours, theirs[part])
        for i in batched:
            assert torch.equal(found.gradients[i], whole.gradients[i][part])


def assert_opcheck(op: Any, args: tuple[Any, ...]) -> None:
    """torch.library.opcheck; gradients are not its business, they lie in an autograd.Function."""
    torch.library.opcheck(op.default, args)


def _assert_same(found: testing.Results, expected: testing.Results) -> None:
    pairs = [*zip(found.outputs, expected.outputs, strict=True)]
    pairs += [*zip(found.gradients, expected.gradients, strict=True)]
    for ours, theirs in pairs:
        if theirs is None:
            assert ours is None
        else:
            assert torch.equal(ours.nan_to_num(nan=7.0), theirs.nan_to_num(nan=7.0))


def docs_hooks() -> ModuleType:
    """docs/hooks.py, which writes the pages' generated parts; no part of the package."""
    path = Path(__file__).parents[1] / "docs" / "hooks.py"
    spec = importlib.util.spec_from_file_location("docs_hooks", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
