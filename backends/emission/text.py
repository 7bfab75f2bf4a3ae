"""Source text: names, indentation, docstrings, imports of what is used, formatting by ruff."""

from __future__ import annotations

import builtins
import keyword
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Collection, Mapping
from pathlib import Path

from ...ir.errors import InvalidInput


def identifier(text: str, reserved: Collection[str]) -> str:
    """A variable name close to a text, none of those that are reserved."""
    name = re.sub(r"\W+", "_", text).strip("_") or "x"
    if name[0].isdigit():
        name = f"x{name}"
    if name in reserved or keyword.iskeyword(name) or hasattr(builtins, name):
        name += "_"
    return name


def keyword_name(name: str) -> str:
    """The argument for a batch tensor, which callers pass by its name."""
    if not name.isidentifier() or keyword.iskeyword(name):
        raise InvalidInput(f"batch input {name!r}: its name must be usable as a Python argument")
    return name


def indented(text: str, levels: int = 1) -> str:
    """Every line that is not empty, moved to the right."""
    return "\n".join("    " * levels + line if line else "" for line in text.split("\n"))


def text_block(text: str) -> str:
    """A docstring."""
    text = text.strip()
    return f'"""{text}\n"""' if "\n" in text else f'"""{text}"""'


def imports(text: str, known: Mapping[str, str]) -> str:
    """`from MODULE import NAME, …` for every known name that occurs; `known` maps name → module."""
    words = set(re.findall(r"(?<![\w.])[A-Za-z_]\w*", re.sub(r'"""[\s\S]*?"""|#.*', "", text)))
    modules: dict[str, list[str]] = {}
    for name, module in known.items():
        if name in words:
            modules.setdefault(module, []).append(name)
    return "\n".join(
        f"from {module} import {', '.join(sorted(names))}"
        for module, names in sorted(modules.items())
    )


def constant(name: str, text: str) -> str:
    """A long literal in a few lines that a formatter leaves alone."""
    if len(text) < 80:
        return f"{name} = {text}"
    lines = textwrap.wrap(text[1:-1], 95, break_long_words=False, break_on_hyphens=False)
    body = "\n".join(f"    {line}" for line in lines)
    return f"# fmt: off\n{name} = {text[0]}\n{body},\n{text[-1]}\n# fmt: on"


def formatted(files: list[Path]) -> None:
    """Formats files by ruff where it is installed; they are well-formed anyway."""
    ruff = Path(sys.executable).with_name("ruff")
    command = str(ruff) if ruff.exists() else shutil.which("ruff")
    if command is None:
        return
    own = sorted({path.stem for file in files for path in file.parent.glob("*.py")})
    options = ["--quiet", "--no-cache", "--isolated", "--line-length", "100", *map(str, files)]
    sections = f"lint.isort.known-first-party = {own}"
    for arguments in (["check", "--select", "I", "--fix", "--config", sections], ["format"]):
        subprocess.run([command, *arguments, *options], check=False, capture_output=True)
