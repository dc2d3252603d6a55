"""What the pages are given at build time: docstrings, parts of source files, the change log.

A line of a page that begins with `:::` is replaced:

    ::: udlkernels.functional        every public function of the module, from its docstring
    ::: udlkernels.functional FAMILY those of one family
    ::: udlkernels.explain           one function or class
    ::: source PATH [PART]           a file, or what stands in it between `[PART]` and `[end]`
    ::: formula LATEX                a formula
    ::: markdown PATH                the text of a Markdown file
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
_LANGUAGES = {".py": "py", ".cpp": "cpp", ".h": "cpp"}
_SECTION = re.compile(r"(Args|Attributes|Returns|Raises|Numerical error|Source|Example):\s*(.*)")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """mkdocs calls this with the text of every page."""
    return expand(markdown)


def expand(text: str) -> str:
    """The text with every `:::` line replaced."""
    return re.sub(r"^::: (.+)$", lambda line: _directive(line[1].split()), text, flags=re.MULTILINE)


def _directive(words: list[str]) -> str:
    if words[0] == "source":
        return _source(ROOT / words[1], " ".join(words[2:]))
    if words[0] == "formula":
        return _formula(" ".join(words[1:]))
    if words[0] == "markdown":
        return (ROOT / words[1]).read_text()
    return "\n\n".join(_entries(*words))


def _source(path: Path, part: str) -> str:
    text = path.read_text()
    if part:
        text = text.partition(f"[{part}]\n")[2].partition("// [end]")[0]
        if not text:
            raise ValueError(f"{path.name} has no part [{part}]")
    return f"```{_LANGUAGES.get(path.suffix, 'text')}\n{text.strip()}\n```"


def _entries(name: str, family: str = "") -> Iterator[str]:
    try:
        found = importlib.import_module(name)
    except ModuleNotFoundError:
        module, _, attribute = name.rpartition(".")
        yield _entry(attribute, getattr(importlib.import_module(module), attribute))
        return
    for attribute in found.__all__:
        value = getattr(found, attribute)
        if not (inspect.isfunction(value) or inspect.isclass(value)):
            continue
        if family in ("", value.__module__.split(".")[1]):
            yield _entry(attribute, value)


def _entry(name: str, value: Any) -> str:
    signature = inspect.signature(value)
    shown = f"{name}{_without_types(signature)}"
    body = "\n\n".join(_paragraphs(inspect.getdoc(value) or ""))
    return f"### {name} {{: #{name} }}\n\n```text\n{shown}\n```\n\n{body}"


def _without_types(signature: inspect.Signature) -> str:
    plain = [
        p.replace(annotation=p.empty) for p in signature.parameters.values() if p.name != "self"
    ]
    text = str(signature.replace(parameters=plain, return_annotation=signature.empty))
    return text if len(text) < 88 else "(\n    " + text[1:-1].replace(", ", ",\n    ") + ",\n)"


def _paragraphs(docstring: str) -> Iterator[str]:
    for block in re.split(r"\n\s*\n(?=\S)", docstring):
        formula = re.match(r"\.\. math::\s*(.*)", block, re.DOTALL)
        section = _SECTION.match(block)
        if formula:
            yield _formula(" ".join(formula[1].split()))
        elif section:
            yield _section(section[1], block[section.start(2) :])
        else:
            yield _escaped(" ".join(block.split()))


def _formula(latex: str) -> str:
    from latex2mathml.converter import convert

    spelled = re.sub(r"\\text\{[^}]*\}", lambda text: text[0].replace(r"\_", "_"), latex)
    return f'<div class="formula">{convert(spelled, display="block")}</div>'


def _section(name: str, text: str) -> str:
    if name not in ("Args", "Attributes", "Raises"):
        return f"**{name}:** {_escaped(' '.join(text.split()))}"
    items = re.split(r"\n(?=    \S)", "\n" + text.strip("\n"))
    lines = []
    for item in filter(str.strip, items):
        names, _, meaning = " ".join(item.split()).partition(": ")
        lines.append(f"- `{names}`: {_escaped(meaning)}")
    return f"**{name}:**\n\n" + "\n".join(lines)


def _escaped(text: str) -> str:
    """Markdown's special characters as themselves, outside of `code`."""
    parts = text.split("`")
    parts[::2] = [re.sub(r"([*_\[\]<>])", r"\\\1", part) for part in parts[::2]]
    return "`".join(parts)
