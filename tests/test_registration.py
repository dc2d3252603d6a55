"""Every public op and module is whole: documented, tested, measured, with kernels and fakes."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support import docs_hooks
from udlkernels import _library, benchmarks, functional, nn
from udlkernels.benchmarks.contestant import draw
from udlkernels.benchmarks.declaration import Row

ROOT = Path(__file__).parents[1]
OPS = list(functional.__all__)
MODULES = [name for name in nn.__all__ if inspect.isclass(getattr(nn, name))]
DROP_IN = [name for name in OPS if inspect.isfunction(getattr(torch.nn.functional, name, None))]
# What the constructors of modules are given.
ARGUMENTS = dict(num_features=4, num_channels=4, num_groups=2, normalized_shape=6, size=3)
ARGUMENTS |= dict(embed_dim=4, d_model=4, num_heads=2, nhead=2, num_layers=2)
ARGUMENTS |= dict(
    encoder_layer=torch.nn.TransformerEncoderLayer(4, 2, 8, batch_first=True),
    decoder_layer=torch.nn.TransformerDecoderLayer(4, 2, 8, batch_first=True),
)


def _package(op: str) -> str:
    """The op's folder as a module: `udlkernels.<family>.<folder>`."""
    package, _, last = getattr(functional, op).__module__.rpartition(".")
    assert last == "op", f"{op} is defined outside of an op.py"
    return package


def _schemas(package: str) -> list[str]:
    """The schemas that a folder's op.py defines."""
    source = Path(*package.split("."), "op.py")
    return re.findall(r"_library\.define\(\s*[rf]*\"(\w+)\(", (ROOT / source).read_text())


PACKAGES = sorted({_package(op) for op in OPS})
SCHEMAS = [
    pytest.param(package, schema, id=schema) for package in PACKAGES for schema in _schemas(package)
]


def _test_file(package: str) -> Path:
    _, family, folder = package.split(".")
    return ROOT / "tests" / family / f"test_{folder}.py"


def _sections(op: str) -> dict[str, str]:
    """A docstring's parts: "" is what stands before the first named one."""
    parts: dict[str, str] = {}
    name = ""
    for line in inspect.cleandoc(getattr(functional, op).__doc__ or "").splitlines():
        found = re.match(r"(Args|Returns|Raises|Numerical error|Source): ?(.*)", line)
        if found:
            name, line = found[1], found[2]
        parts[name] = f"{parts.get(name, '')}{line}\n"
    return parts


def test_every_name_is_a_function_of_its_own_folder():
    assert sorted(OPS) == OPS
    for op in OPS:
        assert getattr(functional, op).__name__ == op
        assert _package(op).startswith("udlkernels.")


@pytest.mark.parametrize("op", OPS)
def test_docstring_has_all_parts(op):
    parts = _sections(op)
    head = parts[""].splitlines()
    assert head[0].endswith(".") and head[1] == "", "one line, then an empty one"
    assert ".. math::" in parts[""], "the formula"
    for name in ("Args", "Returns", "Raises", "Numerical error", "Source"):
        assert parts.get(name, "").strip(), f"no {name}"
    assert re.search(r"\[[^\]]+\]", parts["Args"]), "shapes in brackets"
    described = {
        name.strip()
        for names in re.findall(r"^    ([\w, ]+):", parts["Args"], re.MULTILINE)
        for name in names.split(",")
    }
    assert described == set(inspect.signature(getattr(functional, op)).parameters)


@pytest.mark.parametrize("op", OPS)
def test_last_argument_is_the_implementation(op):
    *_, last = inspect.signature(getattr(functional, op)).parameters.values()
    assert last.name == "implementation"
    assert last.kind is inspect.Parameter.KEYWORD_ONLY
    assert last.default == "auto"


@pytest.mark.parametrize("op", DROP_IN)
def test_signature_begins_with_torchs(op):
    ours = list(inspect.signature(getattr(functional, op)).parameters.values())
    theirs = list(inspect.signature(getattr(torch.nn.functional, op)).parameters.values())
    assert [(p.name, p.kind, p.default) for p in ours[: len(theirs)]] == [
        (p.name, p.kind, p.default) for p in theirs
    ]
    extra = ours[len(theirs) :]
    assert {p.kind for p in extra} == {inspect.Parameter.KEYWORD_ONLY}


@pytest.mark.parametrize("op", OPS)
def test_has_a_reference(op):
    reference = importlib.import_module(f"{_package(op)}.reference")
    function = getattr(reference, op)
    assert len(inspect.getsource(function).splitlines()) <= 40


@pytest.mark.parametrize("op", OPS)
def test_has_a_test_file(op):
    file = _test_file(_package(op))
    assert file.is_file(), f"no {file.relative_to(ROOT)}"
    assert re.search(rf"\b{op}\(", file.read_text()), f"{file.name} never calls {op}"


@pytest.mark.parametrize("op", OPS)
def test_has_a_benchmark(op):
    declared = {benchmark.op: benchmark for benchmark in benchmarks.benchmarks()}
    assert op in declared
    assert declared[op].family == _package(op).split(".")[1]


class _Reached(TorchDispatchMode):
    """Collects the names of the library's schemas that are called inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "udlkernels":
            self.names.add(func.name().removeprefix("udlkernels::"))
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(bool(_library.extension_error), reason="the C++ kernels are not built")
@pytest.mark.parametrize("op", OPS)
def test_a_kernel_serves_the_benchmark(op):
    (declared,) = [found for found in benchmarks.benchmarks() if found.op == op]
    shape = min(declared.shapes, key=lambda shape: shape.numel)
    row = Row(declared, shape, torch.float32)
    arguments = draw(row, torch.device("cpu"))
    with _Reached() as reached:
        declared.run(**arguments, **shape.options, implementation="kernel")
    assert reached.names


def test_every_registered_schema_is_a_folders():
    registered = {
        name.removeprefix("udlkernels::").split(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("udlkernels::")
    }
    assert registered == {param.id for param in SCHEMAS}


@pytest.mark.parametrize(("package", "schema"), SCHEMAS)
def test_schema_has_a_fake_and_is_functional_unless_its_name_says_otherwise(package, schema):
    entry = torch._library.simple_registry.singleton.find(f"udlkernels::{schema}")
    assert entry.fake_impl.kernel is not None
    mutable = getattr(torch.ops.udlkernels, schema).default._schema.is_mutable
    assert mutable == schema.endswith("_")


@pytest.mark.skipif(bool(_library.extension_error), reason="the C++ kernels are not built")
@pytest.mark.parametrize(("package", "schema"), SCHEMAS)
def test_schema_has_a_kernel_for_the_cpu(package, schema):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"udlkernels::{schema}", "CPU")


@pytest.mark.parametrize(("package", "schema"), SCHEMAS)
def test_schema_has_a_launcher_for_gpus(package, schema):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"udlkernels::{schema}", "CUDA")
    pytest.importorskip("triton")
    kernels = importlib.import_module(f"{package}.kernels")
    ours = inspect.signature(getattr(kernels, schema)).parameters
    arguments = getattr(torch.ops.udlkernels, schema).default._schema.arguments
    assert len(ours) == len(arguments)


@pytest.mark.parametrize("package", [p for p in PACKAGES if _schemas(p)])
def test_kernels_are_compiled_ahead_of_time(package):
    pytest.importorskip("triton")
    from udlkernels import _aot

    assert f"{package}.kernels" in _aot.kernel_modules()
    assert _aot.entries(f"{package}.kernels")


@pytest.mark.parametrize(("package", "schema"), SCHEMAS)
def test_schema_is_checked_by_opcheck(package, schema):
    file = _test_file(package)
    checks = [
        node
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.FunctionDef) and "opcheck" in ast.unparse(node)
    ]
    assert any(re.search(rf"\b{schema}\b", ast.unparse(check)) for check in checks)


@pytest.mark.parametrize("name", MODULES)
def test_module_is_torchs(name):
    ours, theirs = getattr(nn, name), getattr(torch.nn, name, None)
    assert ours.__doc__
    assert ours.implementation == "auto"
    if theirs is None:
        assert issubclass(ours, torch.nn.Module)
        return
    # DistributedDataParallel refuses torch's SyncBatchNorm on the CPU, by its type.
    synced = theirs is torch.nn.SyncBatchNorm
    assert issubclass(ours, torch.nn.modules.batchnorm._BatchNorm if synced else theirs)
    assert _parameters(ours.__init__) == _parameters(theirs.__init__)
    assert list(_build(ours).state_dict()) == list(_build(theirs).state_dict())


def _parameters(function) -> list[tuple[str, object, object]]:
    return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]


def _build(module):
    required = [
        p.name
        for p in inspect.signature(module).parameters.values()
        if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD
    ]
    return module(*(ARGUMENTS[name] for name in required))


@pytest.mark.parametrize("op", OPS)
def test_stands_in_the_documentation(op):
    _, family, _ = _package(op).split(".")
    page = ROOT / "docs" / "pages" / f"{family}.md"
    text = docs_hooks().expand(page.read_text())
    assert re.search(rf"^#+ {op} ", text, re.MULTILINE)
