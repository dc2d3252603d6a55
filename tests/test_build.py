"""What the build made: the library's symbols, the ISA of its code, the wheel, and rebuilding."""

import ctypes
import importlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "csrc" / "build"
LIBRARY = ROOT / "udlkernels" / "_C.so"
AVX512 = {"avx512", "avx512_bf16"}
AVX = AVX512 | {"avx2"}

needs_library = pytest.mark.skipif(not LIBRARY.is_file(), reason="the C++ kernels are not built")
needs_binutils = pytest.mark.skipif(
    sys.platform != "linux" or not (shutil.which("nm") and shutil.which("objdump")),
    reason="needs nm and objdump",
)


def _run(*command: object, **options) -> str:
    words = [str(part) for part in command]
    done = subprocess.run(words, capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _isas_in(name: str) -> set[str]:
    """The ISA namespaces that a demangled name mentions."""
    return set(re.findall(r"\budl::(base|avx2|avx512|avx512_bf16|neon)\b", name))


@pytest.fixture
def build_modules(monkeypatch):
    """The modules of the build step, which are no part of the installed package."""
    monkeypatch.syspath_prepend(str(BUILD))
    pytest.importorskip("setuptools", minversion="77")
    names = ("toolchain", "torch_headers", "extension", "backend")
    yield {name: importlib.import_module(name) for name in names}
    for name in names:
        sys.modules.pop(name)


@needs_library
@needs_binutils
def test_needs_no_python_and_no_unstable_torch_symbol():
    lines = _run("nm", "-DC", "--undefined-only", LIBRARY).splitlines()
    names = [line.split(maxsplit=1)[1] for line in lines]
    assert any(name.startswith("aoti_torch_") for name in names)
    unstable = [n for n in names if re.search(r"\b(c10|at|torch|caffe2)::", n)]
    python = [n for n in names if re.match(r"_?Py", n)]
    assert unstable == []
    assert python == []


@needs_library
@needs_binutils
def test_links_torch_without_python_or_a_path_of_the_build_machine():
    dynamic = _run("objdump", "-p", LIBRARY)
    needed = re.findall(r"NEEDED\s+(\S+)", dynamic)
    assert "libtorch_cpu.so" in needed
    assert [name for name in needed if "python" in name] == []
    assert re.findall(r"(?:RPATH|RUNPATH)\s+(\S+)", dynamic) == []


@needs_library
@needs_binutils
def test_exports_only_its_entry_points():
    lines = _run("nm", "-D", "--defined-only", LIBRARY).splitlines()
    symbols = {tuple(line.split()[-2:]) for line in lines}
    assert {kind for kind, _ in symbols} == {"T"}
    assert [name for _, name in symbols if not name.startswith("udlkernels_")] == []


@needs_library
@needs_binutils
def test_wide_vectors_stay_in_the_code_of_their_isa():
    function, wrong, widest = "", set(), set()
    for line in _run("objdump", "-dC", "--no-show-raw-insn", LIBRARY).splitlines():
        header = re.match(r"[0-9a-f]+ <(.*)>:$", line)
        if header:
            function = header[1]
        elif re.search("%zmm|%k[0-7]", line):
            widest.add("zmm")
            if not _isas_in(function) & AVX512:
                wrong.add(function)
        elif "%ymm" in line and not _isas_in(function) & AVX:
            wrong.add(function)
    assert wrong == set()
    assert widest == ({"zmm"} if "avx512" in _built() else set())


@needs_library
@needs_binutils
def test_isa_objects_share_no_function(build_modules, tmp_path):
    """The linker keeps one copy of a weak function for all: an inline one of std::, say."""
    toolchain = build_modules["toolchain"].find_toolchain()
    objects = build_modules["extension"].build(tmp_path / "_C.so")
    shared, inspected = [], 0
    for path in objects:
        isa = path.suffixes[-2].lstrip(".") if len(path.suffixes) > 1 else ""
        if isa not in toolchain.isas:
            continue
        for line in _run("nm", "-C", "--defined-only", "--extern-only", path).splitlines():
            _, kind, name = line.split(maxsplit=2)
            inspected += kind in "TWi"
            if kind in "TWi" and _isas_in(name) != {isa}:
                shared.append(f"{path.name}: {name}")
    assert inspected > 0
    assert shared == []


@needs_library
def test_library_names_the_isas_that_were_built(build_modules):
    toolchain = build_modules["toolchain"].find_toolchain()
    assert _built() == list(toolchain.isas)
    library = ctypes.CDLL(str(LIBRARY))
    for function in (library.udlkernels_isa_found, library.udlkernels_isa_active):
        function.restype = ctypes.c_char_p
        assert function().decode() in toolchain.isas


def _built() -> list[str]:
    importlib.import_module("torch")  # the library finds torch among the loaded ones
    function = ctypes.CDLL(str(LIBRARY)).udlkernels_isa_built
    function.restype = ctypes.c_char_p
    return [name for name in function().decode().split(",") if name]


@needs_library
def test_wheel_is_tagged_by_platform_alone_and_complete(tmp_path):
    pytest.importorskip("setuptools", minversion="77")
    script = f"import backend; backend.build_wheel({str(tmp_path)!r})"
    _run(sys.executable, "-c", script, cwd=ROOT, env=_environment(PYTHONPATH=str(BUILD)))
    (wheel,) = tmp_path.glob("*.whl")
    assert re.fullmatch(r"udlkernels-[\d.]+-py3-none-(linux|macosx)_\w+\.whl", wheel.name)
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"udlkernels/_C.so", "udlkernels/py.typed"} <= names
    assert _python_files("udlkernels") <= names
    for folder in ("models", "benchmarks"):
        assert {f"udlkernels/{name}" for name in _python_files(folder)} <= names
    tops = {name.split("/")[0] for name in names}
    assert [top for top in tops if top != "udlkernels" and not top.endswith(".dist-info")] == []


def _python_files(folder: str) -> set[str]:
    return {path.relative_to(ROOT).as_posix() for path in (ROOT / folder).rglob("*.py")}


def _environment(**extra: str) -> dict[str, str]:
    return {**os.environ, **extra}


def test_missing_compiler_says_what_to_install():
    command = [sys.executable, BUILD / "extension.py"]
    environment = _environment(CXX="no-such-compiler")
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 1
    assert "no-such-compiler" in done.stderr
    assert re.search("build-essential|xcode-select --install", done.stderr)
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("version", "usable"),
    [("2.10.1", False), ("1.13.0+cpu", False), ("2.11.0", True), ("3.0.0a0+git1", True)],
)
def test_torch_is_found_by_its_version(build_modules, tmp_path, version, usable):
    root = tmp_path / "torch"
    (root / "include/torch/csrc/stable").mkdir(parents=True)
    (root / "version.py").write_text(f"from typing import Optional\n__version__ = '{version}'\n")
    found = build_modules["torch_headers"].inspect(root)
    assert (found.version if found else None) == (version if usable else None)


@pytest.mark.parametrize(
    ("present", "switch", "expected"),
    [(True, "", []), (False, "", ["torch>=2.11"]), (False, "1", [])],
    ids=["torch-installed", "torch-missing", "no-extension"],
)
def test_torch_is_a_build_requirement_only_when_missing(
    build_modules, monkeypatch, present, switch, expected
):
    backend = build_modules["backend"]
    monkeypatch.setenv("UDLKERNELS_NO_EXTENSION", switch)
    monkeypatch.setattr(backend, "find_torch", lambda: "found" if present else None)
    assert backend.torch_requirement() == expected


@needs_library
def test_a_change_rebuilds_only_what_depends_on_it(tmp_path):
    shutil.copytree(BUILD, tmp_path / "csrc/build", ignore=shutil.ignore_patterns("__pycache__"))
    source = tmp_path / "csrc"
    (source / "one.h").write_text("inline int one() { return 1; }\n")
    (source / "one.cpp").write_text('#include "one.h"\nint use_one() { return one(); }\n')
    (source / "two.cpp").write_text("int two() { return 2; }\n")

    def compiled() -> set[str]:
        text = _run(sys.executable, source / "build/extension.py")
        return set(re.findall(r"(\w+)\.o$", text, re.MULTILINE))

    assert compiled() == {"one", "two"}
    assert compiled() == set()
    (source / "one.h").write_text("inline int one() { return 11; }\n")
    assert compiled() == {"one"}
    toolchain = source / "build/toolchain.py"
    toolchain.write_text(toolchain.read_text().replace('"-O3"', '"-O2"'))
    assert compiled() == {"one", "two"}
