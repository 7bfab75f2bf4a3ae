"""Dtypes of a training run and the bytes they cost: per parameter, per element of a value."""

from __future__ import annotations

from functools import cache

from pydantic import BaseModel, ConfigDict, Field

from ..ir.graph import Dtype
from . import yaml_files
from .efficiency import ComputeDtype

_FIXED_BYTES: dict[str, int] = {"float64": 8, "float32": 4, "int64": 8, "int32": 4, "bool": 1}
_WIDE_BYTES = 4  # "at least float32"


class Precision(BaseModel):
    """A recipe: what is computed in, and bytes kept per parameter.

    `linear_dtype`, where it differs, is what products of an activation with a parameter are in.
    `compute_bytes` of the copy that the forward pass reads, `master_bytes` of a second copy that
    the optimizer updates (0: there is none), `moment_bytes` of AdamW's two moments together,
    `gradient_bytes` of the accumulated gradient.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    compute_dtype: ComputeDtype
    linear_dtype: ComputeDtype | None = None
    compute_bytes: int = Field(gt=0)
    master_bytes: int = Field(ge=0)
    moment_bytes: int = Field(ge=0)
    gradient_bytes: int = Field(gt=0)

    @property
    def optimizer_bytes(self) -> int:
        """Master copy and moments: what ZeRO calls optimizer state."""
        return self.master_bytes + self.moment_bytes

    @property
    def state_bytes(self) -> int:
        """What is kept of a parameter from step to step: optimizer state, and where that has no
        master copy the only one there is."""
        return self.optimizer_bytes + (0 if self.master_bytes else self.compute_bytes)

    def element_bytes(self, dtype: Dtype) -> int:
        """Bytes of one element of a value; `model` and `wide` follow the recipe."""
        if dtype == "model":
            return self.compute_bytes
        if dtype == "wide":
            return max(_WIDE_BYTES, self.compute_bytes)
        return _FIXED_BYTES[dtype]

    @staticmethod
    @cache
    def preset(name: str) -> Precision:
        """`bf16`, `fp16`, `fp32`, `tf32`, `fp64`; raises InvalidInput with the nearest names."""
        entry = yaml_files.pick(yaml_files.packaged("precisions"), name, "precision")
        return yaml_files.validated(Precision, {"name": name, **entry}, f"precision {name}")
