"""Ahead-of-time compilation: what is read back is what the kernel costs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from udlkernels import _aot
from udlkernels._aot import Compiled, Entry
from udlkernels._aot_read import nvidia_occupancy

pytest.importorskip("triton")

KERNELS = """
import os

import triton
import triton.language as tl
from udlkernels._aot import Entry


@triton.jit
def _scale_kernel(x_ptr, y_ptr, n_cols, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    mask = cols < n_cols
    x = tl.load(x_ptr + row * stride + cols, mask=mask, other=0.0).to(tl.float32)
    y = x * tl.rsqrt(tl.sum(x * x, axis=0))
    tl.store(y_ptr + row * stride + cols, y.to(y_ptr.dtype.element_ty), mask=mask)


def _entry(name, block, warps, divisible=("x_ptr", "y_ptr", "n_cols", "stride"), kind="bf16"):
    signature = {"x_ptr": f"*{kind}", "y_ptr": f"*{kind}", "n_cols": "i32", "stride": "i32"}
    return Entry(name, _scale_kernel, signature, {"BLOCK": block}, divisible, warps)


class Fatal:
    cache_key = property(lambda self: os._exit(3))


AOT = (
    _entry("fits", 2048, 4),
    Entry("dies", Fatal(), {}),
    _entry("spills", 65536, 4, kind="fp32"),
    _entry("unaligned", 2048, 4, divisible=()),
)
"""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Compiled]:
    """Every entry for an NVIDIA and an AMD target, compiled under an interpreting parent."""
    folder = tmp_path_factory.mktemp("kernels")
    (folder / "aot_example.py").write_text(KERNELS)
    (folder / "run.py").write_text(
        "import pickle, sys\n"
        "from udlkernels import _aot\n"
        "if __name__ == '__main__':\n"
        "    todo = _aot.jobs(('sm_90', 'gfx942'), ['aot_example'])\n"
        "    pickle.dump(_aot.compile_all(todo), open(sys.argv[1], 'wb'))\n"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": _path(folder)}
    command = [sys.executable, str(folder / "run.py"), str(folder / "found")]
    subprocess.run(command, check=True, env=environment)
    import pickle

    found = pickle.loads((folder / "found").read_bytes())
    return {(kernel.entry, kernel.target): kernel for kernel in found}


def _path(folder: Path) -> str:
    package = Path(_aot.__file__).parents[1]
    return os.pathsep.join([str(folder), str(package)])


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_clean_kernel_has_wide_loads_and_no_spill(compiled, target):
    kernel = compiled["fits", target]
    assert kernel.ok
    assert kernel.registers > 0
    assert kernel.shared > 0
    assert 0 < kernel.loads_128 == kernel.loads
    assert 0 < kernel.stores_128 == kernel.stores
    assert kernel.instructions["all"] > kernel.loads + kernel.stores


@pytest.mark.slow
def test_spill_is_detected(compiled):
    kernel = compiled["spills", "sm_90"]
    assert kernel.spills > 0
    assert kernel.instructions["local"] > 0
    assert not kernel.ok


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_arguments_not_divisible_cost_the_wide_loads(compiled, target):
    kernel = compiled["unaligned", target]
    assert kernel.loads_128 == 0
    assert kernel.loads > compiled["fits", target].loads


@pytest.mark.slow
def test_crash_of_the_compiler_is_one_row(compiled):
    assert compiled["dies", "sm_90"].error == "the compiler's process ended with code 3"
    assert [name for name, _ in compiled] == [
        name for name in ("fits", "dies", "spills", "unaligned") for _ in ("sm_90", "gfx942")
    ]
    assert [name for (name, _), kernel in compiled.items() if kernel.error] == ["dies", "dies"]


@pytest.mark.slow
def test_every_kernel_of_the_package_compiles_somewhere():
    """One target here; `udlkernels kernels` compiles them all for every target."""
    modules = _aot.kernel_modules()
    assert modules
    for module in modules:
        found = _aot.entries(module)
        assert found, f"{module} declares no entries"
        names = [entry.name for entry in found]
        assert len(names) == len(set(names)), f"{module} names an entry twice"
        for entry in found:
            assert set(entry.targets) <= set(_aot.TARGETS)
            assert _aot._full_signature(entry)


class _Kernel:
    """As much of a Triton function as the declarations look at."""

    arg_names = ("x_ptr", "n", "BLOCK")
    cache_key = ""


@pytest.mark.parametrize(
    ("signature", "constexprs", "divisible"),
    [
        pytest.param({"x_ptr": "*fp32"}, {"BLOCK": 1}, (), id="missing"),
        pytest.param({"x_ptr": "*fp32", "n": "i32", "m": "i32"}, {"BLOCK": 1}, (), id="unknown"),
        pytest.param({"x_ptr": "*fp32", "n": "i32"}, {"BLOCK": 1}, ("BLOCK",), id="constexpr"),
    ],
)
def test_signature_that_does_not_fit_is_refused(signature, constexprs, divisible):
    with pytest.raises(ValueError, match="expected signature and constexprs to name"):
        _aot._full_signature(Entry("x", _Kernel, signature, constexprs, divisible))


def test_attributes_are_keyed_by_tuples():
    entry = Entry("x", _Kernel, {"x_ptr": "*fp32", "n": "i32"}, {"BLOCK": 1}, ("n",))
    assert _aot._attributes(entry, "cuda") == {(1,): [["tt.divisibility", 16]]}
    assert _aot._attributes(entry, "hip")[(0,)] == [["tt.pointer_range", 32]]


def test_module_without_entries_is_refused():
    with pytest.raises(TypeError, match="AOT"):
        _aot.entries("json")


def test_unknown_target_is_refused():
    with pytest.raises(ValueError, match="expected sm_NN or gfxNNN, got 'h100'"):
        _aot.gpu_target("h100")


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "expected"),
    [
        pytest.param(32, 0, 8, 1.0, id="full"),
        pytest.param(64, 0, 8, 0.5, id="registers"),
        pytest.param(32, 100_000, 8, 0.25, id="shared"),
        pytest.param(16, 0, 1, 0.5, id="blocks"),
    ],
)
def test_occupancy_is_bound_by_the_scarcest_resource(registers, shared, warps, expected):
    assert nvidia_occupancy(90, registers, shared, warps) == expected
