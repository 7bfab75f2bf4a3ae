"""Source text: indentation, docstrings, imports of what is used, and formatting by ruff."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path


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
