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
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...ir.errors import InvalidInput
from ...ir.plan import Plan
from ..emission.folder import write_program
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
    return write_program(plan, Path(folder), [TEMPLATES], model_source(plan), weights)


__all__ = ["emit"]
