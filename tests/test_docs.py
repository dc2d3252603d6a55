"""README and docs: code blocks run, commands and links are right, the pages build."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support import docs_hooks
from udlkernels import _library

ROOT = Path(__file__).parents[1]
PAGES = ROOT / "docs" / "pages"
TEXTS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")]
TEXTS += sorted(PAGES.glob("*.md"))
EXAMPLE = ROOT / "docs" / "example_op"
COMMANDS = [
    pytest.param("pip install . && udlkernels bench --quick", id="bench"),
    pytest.param('pip install -e ".[dev]" && pytest -q', id="test"),
]
# A shape each, and how often a step runs on it.
LADDERS = [
    *(("layer_norm", shape, 16) for shape in ("5 67", "3 1", "7 256")),
    *(("attention", shape, 26) for shape in ("5 67 24", "1 1 2", "100 129 34")),
]
needs_library = pytest.mark.skipif(
    bool(_library.extension_error), reason="the C++ kernels are not built"
)


def _blocks(language: str) -> Iterator[tuple[str, str]]:
    """Name and text of the fenced blocks of a language."""
    for path in TEXTS:
        found = re.findall(rf"^```{language}\n(.*?)^```", path.read_text(), re.M | re.S)
        for number, block in enumerate(found, 1):
            yield f"{path.stem}-{number}", block


@pytest.mark.parametrize("code", [pytest.param(code, id=name) for name, code in _blocks("python")])
def test_python_block_runs(code, monkeypatch, tmp_path):
    threads = _threads()
    monkeypatch.chdir(tmp_path)
    try:
        exec(compile(code, "<documentation>", "exec"), {"__name__": "documentation"})
    finally:
        _threads(threads)


def _threads(count: int | None = None) -> int:
    import torch

    if count is not None:
        torch.set_num_threads(count)
    return torch.get_num_threads()


@pytest.mark.parametrize("command", COMMANDS)
def test_readme_gives_the_command_once_on_its_own(command):
    text = (ROOT / "README.md").read_text()
    assert text.count(command) == 1
    assert f"```bash\n{command}\n```" in text


def test_readme_example_is_short_and_gives_the_kernel(capsys):
    (code,) = [code for name, code in _blocks("python") if name.startswith("README")]
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    exec(code, {})
    expected = "layer_norm: torch" if _library.extension_error else "layer_norm: kernel"
    assert capsys.readouterr().out.startswith(expected)


def test_readme_shows_the_picture_that_exists():
    shown = "](docs/pages/images/speedup.png)" in (ROOT / "README.md").read_text()
    assert shown == (PAGES / "images" / "speedup.png").is_file()


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.stem)
def test_links_lead_somewhere(path):
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.M | re.S)
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    wrong = []
    for target in targets:
        file, _, anchor = target.partition("#")
        if re.match(r"https?:", target):
            continue
        found = path.parent / file if file else path
        if not found.exists() or (anchor and anchor not in _anchors(found)):
            wrong.append(target)
    assert wrong == []


def _anchors(path: Path) -> set[str]:
    titles = re.findall(r"^#+ (.*)$", docs_hooks().expand(path.read_text()), re.M)
    words = [re.sub(r"[^\w\s-]", "", title.partition(" {")[0]).strip().lower() for title in titles]
    return {re.sub(r"\s+", "-", title) for title in words}


def test_pages_build_strictly(tmp_path):
    pytest.importorskip("mkdocs")
    pytest.importorskip("latex2mathml")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet"]
    command += ["-f", "docs/mkdocs.yml", "--site-dir", str(tmp_path / "site")]
    _run(command, ROOT)
    page = (tmp_path / "site" / "normalization" / "index.html").read_text()
    assert 'id="layer_norm"' in page and "<math" in page
    assert ":::" not in re.sub(r"<[^>]+>", "", page)


@pytest.fixture(scope="module")
def ladder(tmp_path_factory) -> Callable[[str], str]:
    """The steps of a ladder, compiled by the command of its page."""

    @functools.cache
    def compiled(op: str) -> str:
        page = (PAGES / f"ladder_{op}.md").read_text()
        (command,) = re.findall(r"^c\+\+ .*$", page, flags=re.MULTILINE)
        if not shutil.which("c++"):
            pytest.skip("no C++ compiler of that name")
        program = tmp_path_factory.mktemp("ladder") / op
        command = command.replace(f"-o {op}_steps", f"-o {program}")
        _run(["bash", "-c", command.replace("$(python ", f"$({sys.executable} ")], ROOT)
        return str(program)

    return compiled


@needs_library
@pytest.mark.parametrize(("op", "shape", "steps"), LADDERS)
def test_ladder_steps_are_right(op, shape, steps, ladder, tmp_path):
    """On sizes too small to be timed; the program fails where a step is wrong."""
    printed = _run([ladder(op), *shape.split()], tmp_path)
    assert printed.count("error") + printed.count("left out") == steps, printed


@needs_library
def test_ladder_table_has_the_steps(ladder, tmp_path):
    printed = _run([ladder("attention"), "--table", "5", "67", "24"], tmp_path)
    rows = re.findall(r"^\|([^|]*)\|", printed, re.MULTILINE)
    page = (PAGES / "ladder_attention.md").read_text()
    assert rows == re.findall(r"^\|([^|]*)\|", page, re.MULTILINE)


@needs_library
@pytest.mark.slow
def test_example_op_can_be_added_as_the_page_says(tmp_path):
    """A copy of the project with the example's files: it builds, and the op's tests pass."""
    skipped = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "runs", "*.so")
    shutil.copytree(ROOT, tmp_path / "copy", ignore=skipped)
    shutil.copytree(ROOT / "csrc/build", tmp_path / "copy/csrc/build", dirs_exist_ok=True)
    shutil.copytree(EXAMPLE, tmp_path / "copy", dirs_exist_ok=True)
    objects = ROOT / "build" / "objects"
    if objects.is_dir():  # spares compiling all the others
        shutil.copytree(objects, tmp_path / "copy/build/objects")
    _export(tmp_path / "copy/udlkernels/functional.py", "center_rows")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "copy")}
    _run([sys.executable, "csrc/build/extension.py"], tmp_path / "copy", environment)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += ["tests/normalization/test_center_rows.py", "tests/test_registration.py"]
    printed = _run([*command, "-k", "center_rows"], tmp_path / "copy", environment)
    assert re.search(r"^\d{2,} passed", printed, re.MULTILINE), printed


def _export(path: Path, op: str) -> None:
    """What step 6 of the page says to do by hand."""
    imports, _, names = path.read_text().partition("\n__all__ = [")
    listed = sorted([*re.findall(r'"(\w+)"', names), op])
    line = f"from udlkernels.normalization.{op}.op import {op}\n"
    path.write_text(f"{imports}{line}\n__all__ = {listed}\n")


def _run(command: list[str], folder: Path, environment: dict[str, str] | None = None) -> str:
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout
