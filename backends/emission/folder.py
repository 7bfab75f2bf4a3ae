"""The folder of an emitted program: what is written for its plan, and what every program has."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...ir.errors import InvalidInput
from ...ir.plan import Plan
from .parameters import parameters_source
from .settings import settings_source
from .text import formatted
from .weights import WEIGHTS, origin, save

SHARED = Path(__file__).parent / "templates"
"""What programs of both backends have."""


def write_program(
    plan: Plan,
    target: Path,
    templates: Sequence[Path],
    model: str,
    weights: str | os.PathLike[str] | Mapping[str, Any] | None,
) -> Path:
    """Writes a program whose model.py is `model` into a folder, which it makes, and returns it.

    The files of the folders `templates` are copied as they are; weights that are given as a mapping
    are written beside the program. Raises InvalidInput where the folder cannot be written.
    """
    texts = {
        "settings.py": settings_source(plan, origin(weights)),
        "parameters.py": parameters_source(plan),
        "model.py": model,
    }
    try:
        target.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            (target / name).write_text(text, encoding="utf-8")
        for template in sorted(
            path for folder in (SHARED, *templates) for path in folder.iterdir()
        ):
            if template.is_file():
                shutil.copyfile(template, target / template.name)
        if isinstance(weights, Mapping):
            save(weights, target / WEIGHTS)
    except OSError as error:
        raise InvalidInput(f"folder {target}: cannot write it: {error.strerror}") from None
    formatted([target / name for name in texts])
    return target
