"""From a plan to a folder of JAX source that trains: `emit(plan, folder)`.

program      model.py: `functions` writes the blocks and the loss
pipeline     which form the program of a plan with pipeline stages has
language     how functions are written: `optable` and `lines` ops, `conversions` what moves
verify       the program on host CPU devices against the single-device model
templates/   what programs have in common, copied as it is; `stages`, `ticks`: with a pipeline
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...ir.plan import Plan
from ..emission.folder import write_program
from .pipeline import program_form
from .program import model_source

TEMPLATES = Path(__file__).parent / "templates"


def emit(
    plan: Plan,
    folder: str | os.PathLike[str],
    weights: str | os.PathLike[str] | Mapping[str, Any] | None = None,
) -> Path:
    """Writes the program of a plan into a folder, which it makes, and returns the folder.

    `weights` is what training starts from, by the model's own names: a safetensors file or a folder
    of them is named in the settings; a mapping of arrays or tensors is written beside the program.
    Raises InvalidInput for a schedule that JAX programs do not run, and where a size does not
    divide or the folder cannot be written; UnsupportedOp for an op that has no line in the
    backend's table.
    """
    form = program_form(plan).kind
    templates = [TEMPLATES, *([TEMPLATES / form] if form != "whole" else [])]
    return write_program(plan, Path(folder), templates, model_source(plan), weights)


__all__ = ["emit"]
