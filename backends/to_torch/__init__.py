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
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...ir.errors import InvalidInput
from ...ir.plan import Plan
from ..emission.parameters import parameters_source
from ..emission.settings import settings_source
from ..emission.text import formatted
from ..emission.weights import WEIGHTS, origin, save
from .names import for_torch, renamed_weights
from .program import model_source

TEMPLATES = Path(__file__).parent / "templates"


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
    if isinstance(weights, Mapping):
        weights = renamed_weights(plan.model, weights)
    elif weights is not None and for_torch(plan.model) is not plan.model:
        raise InvalidInput(
            f"weights {weights}: layers of this model are slices of stacked arrays, which torch "
            "programs hold one by one; load the file and give the arrays by name"
        )
    plan = replace(plan, model=for_torch(plan.model))
    target = Path(folder)
    texts = {
        "settings.py": settings_source(plan, origin(weights)),
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
            save(weights, target / WEIGHTS)
    except OSError as error:
        raise InvalidInput(f"folder {target}: cannot write it: {error.strerror}") from None
    formatted([target / name for name in texts])
    return target


__all__ = ["emit"]
