"""From a plan to a folder of PyTorch source that trains: `emit(plan, folder)`.

program      model.py: `blocks`, `stages`, `counting`
parameters   parameters.py; `settings`: settings.py
body         statements over typed values; `lines`, `views` and `conversions` make them from ops
             and types, `peephole` joins them, `naming` writes them down
optable      how each kind of op is written
templates/   what every program has in common, copied as it is
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...ir.errors import InvalidInput
from ...ir.plan import Plan
from .parameters import parameters_source
from .program import model_source
from .settings import settings_source
from .source import formatted

TEMPLATES = Path(__file__).parent / "templates"
WEIGHTS = "weights.safetensors"


def emit(
    plan: Plan,
    folder: str | os.PathLike[str],
    weights: str | os.PathLike[str] | Mapping[str, Any] | None = None,
) -> Path:
    """Writes the program of a plan into a folder, which it makes, and returns the folder.

    `weights` is what training starts from: a safetensors or `.pt` file, or a folder of them, is
    named in the settings; a state dict is written beside the program. Raises UnsupportedOp for an
    op that has no line in the backend's table, InvalidInput where a size does not divide or the
    folder cannot be written.
    """
    target = Path(folder)
    texts = {
        "settings.py": settings_source(plan, _origin(weights)),
        "parameters.py": parameters_source(plan),
        "model.py": model_source(plan),
    }
    try:
        target.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            (target / name).write_text(text, encoding="utf-8")
        for template in sorted(TEMPLATES.iterdir()):
            if template.is_file():
                shutil.copyfile(template, target / template.name)
        if isinstance(weights, Mapping):
            _save(weights, target / WEIGHTS)
    except OSError as error:
        raise InvalidInput(f"folder {target}: cannot write it: {error.strerror}") from None
    formatted([target / name for name in texts])
    return target


def _origin(weights: str | os.PathLike[str] | Mapping[str, Any] | None) -> str | None:
    """Where the program finds its weights: relative to itself, or absolute."""
    if weights is None or isinstance(weights, Mapping):
        return None if weights is None else WEIGHTS
    path = Path(weights)
    if not path.exists():
        raise InvalidInput(f"weights {path}: no such file or folder")
    return str(path.resolve())


def _save(weights: Mapping[str, Any], path: Path) -> None:
    """A state dict as safetensors; tied tensors under each of their names."""
    from safetensors.torch import save_file

    save_file(
        {name: tensor.detach().clone().contiguous() for name, tensor in weights.items()}, path
    )


__all__ = ["emit"]
